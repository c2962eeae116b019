package local

import (
	"os/exec"
	"runtime"
	"syscall"
)

// own makes cmd the leader of a process group that ends with this process,
// even when that is killed.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// lockThread keeps the goroutine on its thread.
func lockThread() (unlock func()) {
	runtime.LockOSThread()
	return runtime.UnlockOSThread
}
