//go:build !linux

package local

import (
	"os/exec"
	"syscall"
)

// own makes cmd the leader of a process group. When this process is killed,
// only the guard ends it.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
}

func lockThread() (unlock func()) { return func() {} }
