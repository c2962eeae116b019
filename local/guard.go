package local

import (
	"fmt"
	"io"
	"log/slog"
	"os/exec"
	"sync"
	"syscall"
)

// A guard ends what replicas have started when this process is killed: Linux
// ends a replica then, but not that replica's own children. It is a shell that
// is told which process groups there are, and kills them when it hears no
// more. A process that leaves its group escapes it.
type guard struct {
	mu  sync.Mutex // guards in
	in  io.WriteCloser
	cmd *exec.Cmd
}

// guardScript reads "+ GROUP" and "- GROUP", and at the end of its input kills
// the groups that are left.
const guardScript = `: sheaf ends its replicas with this; trap '' HUP INT TERM
live=
while read -r what group; do
	left=
	for g in $live; do [ "$g" = "$group" ] || left="$left $g"; done
	live=$left
	[ "$what" = - ] || live="$live $group"
done
for g in $live; do kill -9 "-$g"; done`

// newGuard starts a guard; without a shell there is none.
func newGuard(log *slog.Logger) *guard {
	g := &guard{cmd: exec.Command("/bin/sh", "-c", guardScript)}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to our group is not for it
	in, err := g.cmd.StdinPipe()
	if err == nil {
		err = g.cmd.Start()
	}
	if err != nil {
		log.Warn("what replicas start will outlive a kill of this process", "err", err)
		return &guard{}
	}
	g.in = in
	return g
}

// began and ended tell of a process group.
func (g *guard) began(group int) { g.tell('+', group) }
func (g *guard) ended(group int) { g.tell('-', group) }

func (g *guard) tell(what rune, group int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.in != nil {
		_, _ = fmt.Fprintf(g.in, "%c %d\n", what, group) // a guard that was killed cannot be helped
	}
}

// close ends the guard; every group must have ended.
func (g *guard) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.in != nil {
		_ = g.in.Close()
		_ = g.cmd.Wait() // its exit status says nothing
		g.in = nil
	}
}
