package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// bar shows progress on a terminal, and nothing elsewhere.
type bar struct {
	out   io.Writer // nil when there is no terminal
	shown bool
	last  time.Time
}

func newBar(w io.Writer) *bar {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &bar{out: f}
	}
	return &bar{}
}

const barWidth = 30

// show draws the bar, at most twenty times a second.
func (b *bar) show(p jobProgress, size int64) {
	if b.out == nil || time.Since(b.last) < 50*time.Millisecond {
		return
	}
	b.last, b.shown = time.Now(), true
	if size > 0 {
		n := int(min(p.Bytes, size) * barWidth / size)
		fmt.Fprintf(b.out, "\r\x1b[K[%s%s] %3d %%  %d blocks, %d replicas", strings.Repeat("█", n), strings.Repeat("░", barWidth-n),
			min(p.Bytes, size)*100/size, p.Done, p.Replicas)
		return
	}
	fmt.Fprintf(b.out, "\r\x1b[K%d bytes in, %d blocks done, %d replicas", p.Received, p.Done, p.Replicas)
}

// clear takes the bar away.
func (b *bar) clear() {
	if b.shown {
		fmt.Fprint(b.out, "\r\x1b[K")
		b.shown = false
	}
}
