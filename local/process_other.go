//go:build !linux

package local

import (
	"os/exec"
	"syscall"
)

// own makes cmd the leader of a process group. Here, unlike on Linux, the
// group outlives this process if that is killed.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
}

func lockThread() (unlock func()) { return func() {} }
