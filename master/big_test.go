package master_test

import (
	"context"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/master"
)

// repeated reads text over and over, n bytes of it.
type repeated struct {
	text string
	at   int
	n    int64
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.n)]
	n := 0
	for n < len(p) {
		c := copy(p[n:], r.text[r.at:])
		n += c
		r.at = (r.at + c) % len(r.text)
	}
	r.n -= int64(n)
	return n, nil
}

func TestOneLineOf64MiB(t *testing.T) {
	s := three(t)
	const n = 64 << 20
	a, err := s.post(t.Context(), "?split=bytes&block=1000000", &repeated{text: "ab cde ", n: n})
	if err != nil {
		t.Fatal(err)
	}
	// 64 MiB are 9,586,980 times the text and "ab c".
	if want := "ab 9586981\ncde 9586980\nc 1\n"; a.status != 200 || a.body != want {
		t.Errorf("answer is %d %.200q, want %q", a.status, a.body, want)
	}
}

func TestOneWordOf16MiB(t *testing.T) {
	s := three(t)
	const n = 16 << 20
	a, err := s.post(t.Context(), "?split=bytes&block=1000000", &repeated{text: "x", n: n})
	if err != nil {
		t.Fatal(err)
	}
	if a.status != 200 || len(a.body) != n+3 || strings.Trim(a.body, "x") != " 1\n" {
		t.Errorf("answer is %d, %d bytes", a.status, len(a.body))
	}
}

// The master and its workers, which share this process here, hold blocks and
// not the input.
func TestInputIsNotHeld(t *testing.T) {
	s := three(t, func(h *master.Handler) { h.Memory = 2 << 20 })
	const n = 128 << 20
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	var peak atomic.Uint64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak.Store(max(peak.Load(), m.HeapAlloc))
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	a, err := s.post(t.Context(), "?block=128KiB", &repeated{text: "the quick brown fox\njumps over\n", n: n})
	close(stop)
	<-stopped
	if err != nil || a.status != 200 || !strings.HasPrefix(a.body, "the 4329605\nbrown 4329604\nfox 4329604\n") {
		t.Fatalf("answer is %v %d %.200q", err, a.status, a.body)
	}
	grown := int64(peak.Load()) - int64(before.HeapAlloc)
	t.Logf("the heap grew by %d KiB for %d MiB of input", grown>>10, n>>20)
	if grown > 24<<20 {
		t.Errorf("the heap grew by %d MiB for an input of %d MiB", grown>>20, n>>20)
	}
}

// Workers that are slow slow the reading down: little more than Memory is read.
// A client that leaves then is missed by the events that do not reach it; in
// the other forms nothing tells, as TCP keeps its leaving behind its data.
func TestBackPressure(t *testing.T) {
	var read atomic.Int64
	left := make(chan time.Time, 100)
	s := start(t, []http.Handler{hanging(left)}, func(h *master.Handler) { h.Memory = 1 << 20 })
	ctx, cancel := context.WithCancel(t.Context())
	body := readerFunc(func(p []byte) (int, error) {
		clear(p)
		read.Add(int64(len(p)))
		return len(p), nil
	})
	ended := make(chan error, 1)
	go func() {
		_, err := s.post(ctx, "?block=64KiB&split=bytes", body, "Accept: text/event-stream")
		ended <- err
	}()
	last := int64(-1)
	for now := read.Load(); now != last; now = read.Load() {
		last = now
		time.Sleep(200 * time.Millisecond)
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("a job without an end ended")
	}
	select {
	case <-left:
	case <-time.After(2 * time.Second):
		t.Error("the worker was not told that the client left")
	}
	if last > 32<<20 { // Memory, what is read ahead, and the buffers of the sockets
		t.Errorf("%d MiB were read while nothing was done", last>>20)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
