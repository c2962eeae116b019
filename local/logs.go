package local

import (
	"context"
	"sync"
	"time"

	"github.com/openfaas/faas-provider/logs"
)

// maxLogLines is how many lines of a function's log are kept.
const maxLogLines = 2000

// logBook keeps the last lines that a function's replicas wrote.
type logBook struct {
	mu    sync.Mutex // guards all below
	lines []logs.Message
	first int           // number of lines[0] in the function's life
	more  chan struct{} // closed, and made anew, at each line
}

func newLogBook() *logBook { return &logBook{more: make(chan struct{})} }

func (b *logBook) add(function, replica, text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.lines) >= 2*maxLogLines {
		b.first += maxLogLines
		b.lines = append([]logs.Message(nil), b.lines[maxLogLines:]...)
	}
	b.lines = append(b.lines, logs.Message{
		Name: function, Namespace: Namespace, Instance: replica, Timestamp: time.Now().UTC(), Text: text,
	})
	close(b.more)
	b.more = make(chan struct{})
}

// from returns the lines from number n on, the number of the next one, and
// what is closed when that comes.
func (b *logBook) from(n int) ([]logs.Message, int, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.first + len(b.lines)
	n = min(max(n, b.first), next)
	return append([]logs.Message(nil), b.lines[n-b.first:]...), next, b.more
}

// query sends the lines that q asks for to emit, and with q.Follow those to
// come until ctx ends or emit says false.
func (b *logBook) query(ctx context.Context, q logs.Request, emit func(logs.Message) bool) {
	wanted := func(m logs.Message) bool {
		return (q.Instance == "" || q.Instance == m.Instance) && (q.Since == nil || !m.Timestamp.Before(*q.Since))
	}
	lines, next, more := b.from(0)
	var picked []logs.Message
	for _, m := range lines {
		if wanted(m) {
			picked = append(picked, m)
		}
	}
	if q.Tail > 0 && len(picked) > q.Tail {
		picked = picked[len(picked)-q.Tail:]
	}
	for {
		for _, m := range picked {
			if !emit(m) {
				return
			}
		}
		if !q.Follow {
			return
		}
		select {
		case <-more:
		case <-ctx.Done():
			return
		}
		lines, next, more = b.from(next)
		picked = picked[:0]
		for _, m := range lines {
			if wanted(m) {
				picked = append(picked, m)
			}
		}
	}
}
