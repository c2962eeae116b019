package main

import (
	"io"
	"sync"
	"time"
)

// gate holds the end of an upload back until the replicas are killed, so that
// the kill falls into the midst of the job even if that takes milliseconds.
type gate struct {
	in    io.Reader
	mark  int64 // bytes done at which to kill
	hold  int64 // bytes that pass before
	sent  int64
	once  sync.Once
	ready chan struct{}

	mu    sync.Mutex // guards what is below
	moved time.Time  // when the progress last changed
	done  int64
	fired bool
}

// newGate lets half of what comes after percent of the input pass.
func newGate(in io.Reader, size int64, percent int) *gate {
	mark := size * int64(percent) / 100
	return &gate{in: in, mark: mark, hold: mark + (size-mark)/2, ready: make(chan struct{}), moved: time.Now()}
}

// open lets the rest pass.
func (g *gate) open() { g.once.Do(func() { close(g.ready) }) }

// reached says, once, that the mark is reached, or that it cannot be because
// blocks wait for what is held back.
func (g *gate) reached(done int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if done != g.done {
		g.done, g.moved = done, time.Now()
	}
	if g.fired || done < g.mark && time.Since(g.moved) < 300*time.Millisecond {
		return false
	}
	g.fired = true
	return true
}

func (g *gate) Read(p []byte) (int, error) {
	select {
	case <-g.ready:
		return g.in.Read(p)
	default:
	}
	if g.sent >= g.hold {
		<-g.ready
		return g.in.Read(p)
	}
	n, err := g.in.Read(p[:min(int64(len(p)), g.hold-g.sent)])
	g.sent += int64(n)
	return n, err
}
