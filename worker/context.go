package worker

import (
	"context"
	"sync"
	"time"
)

// blockCtx is the context of one block. It becomes a real one, with a timer,
// when somebody first asks whether it has ended: most handlers never do, and a
// timer costs more than a small block.
type blockCtx struct {
	parent   context.Context
	call     call
	deadline time.Time // zero when there is none

	mu     sync.Mutex // guards what follows
	real   context.Context
	cancel context.CancelFunc
	over   bool // the handler has returned
}

var _ context.Context = (*blockCtx)(nil)

// made returns the real context.
func (c *blockCtx) made() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real == nil {
		if c.deadline.IsZero() {
			c.real, c.cancel = context.WithCancel(c.parent)
		} else {
			c.real, c.cancel = context.WithDeadline(c.parent, c.deadline)
		}
		if c.over {
			c.cancel()
		}
	}
	return c.real
}

// end ends the context: the handler has returned.
func (c *blockCtx) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	if c.cancel != nil {
		c.cancel()
	}
}

func (c *blockCtx) Done() <-chan struct{} { return c.made().Done() }

func (c *blockCtx) Err() error { return c.made().Err() }

func (c *blockCtx) Deadline() (time.Time, bool) {
	if d, ok := c.parent.Deadline(); ok && (c.deadline.IsZero() || d.Before(c.deadline)) {
		return d, true
	}
	return c.deadline, !c.deadline.IsZero()
}

func (c *blockCtx) Value(key any) any {
	if key == (callKey{}) {
		return c.call
	}
	c.mu.Lock()
	real := c.real
	c.mu.Unlock()
	if real == nil {
		real = c.parent
	}
	return real.Value(key)
}
