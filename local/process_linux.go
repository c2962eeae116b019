package local

import (
	"os/exec"
	"runtime"
	"syscall"
)

// own makes cmd the leader of a process group. When this process is killed, cmd
// is, too, at once; the guard ends what cmd started.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// lockThread keeps the goroutine on its thread.
func lockThread() (unlock func()) {
	runtime.LockOSThread()
	return runtime.UnlockOSThread
}
