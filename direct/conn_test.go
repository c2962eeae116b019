package direct_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
)

// soon is how long what happens "at once" may take on a busy machine.
const soon = 5 * time.Second

// listen plays replicas by hand: each connection is given to script, with its
// number from 1.
func listen(t *testing.T, script func(c net.Conn, n int64)) sheaf.Replica {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var n atomic.Int64
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(4 * soon))
				script(c, n.Add(1))
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return sheaf.Replica{Function: "worker", ID: "r1", URL: "http://" + l.Addr().String()}
}

func open(t *testing.T) *direct.Route {
	t.Helper()
	r := direct.New(0)
	t.Cleanup(r.Close)
	return r
}

func block(to sheaf.Replica, body string) *sheaf.Request {
	return &sheaf.Request{Job: "j", Function: "worker", Attempt: 1, To: to, Body: []byte(body)}
}

// take reads one request and its body.
func take(in *bufio.Reader) (body string, err error) {
	r, err := http.ReadRequest(in)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

const pong = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npong"

// A replica that refuses a block before it has read it is heard, and nobody
// waits until all of it is written.
func TestRefusedBeforeTheBlockCame(t *testing.T) {
	to := listen(t, func(c net.Conn, _ int64) {
		in := bufio.NewReader(c)
		if _, err := http.ReadRequest(in); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nSheaf-Code: block_too_large\r\n\r\n")
		_, _ = io.Copy(io.Discard, io.LimitReader(in, 1)) // and nothing more, until the caller leaves
		time.Sleep(100 * time.Millisecond)
	})
	begun := time.Now()
	_, err := open(t).Call(t.Context(), block(to, strings.Repeat("x", 32<<20)))
	if ce, ok := errors.AsType[*sheaf.CallError](err); !ok || ce.Fault != sheaf.FaultRejected || ce.Status != 413 {
		t.Errorf("got %v, want a rejection by 413", err)
	}
	if took := time.Since(begun); took > soon {
		t.Errorf("it took %v", took)
	}
}

// What a replica says unasked is nobody's answer.
func TestUnaskedAnswer(t *testing.T) {
	said := make(chan struct{})
	to := listen(t, func(c net.Conn, n int64) {
		in := bufio.NewReader(c)
		for {
			if _, err := take(in); err != nil {
				return
			}
			_, _ = io.WriteString(c, pong)
			if n == 1 {
				time.Sleep(20 * time.Millisecond) // after the call has ended
				_, _ = io.WriteString(c, strings.Replace(pong, "pong", "evil", 1))
				_, _ = io.Copy(io.Discard, in) // until the connection is closed
				close(said)
			}
		}
	})
	r := open(t)
	for i := range 2 {
		reply, err := r.Call(t.Context(), block(to, "ping"))
		if err != nil || string(reply.Body) != "pong" {
			t.Fatalf("call %d: got %v %v", i, reply, err)
		}
		if i == 0 {
			select {
			case <-said:
			case <-time.After(soon):
				t.Fatal("the connection was not closed")
			}
		}
	}
}

// A name that would break out of its header is not sent.
func TestNamesThatNoHeaderCanCarry(t *testing.T) {
	var bytes atomic.Int64
	to := listen(t, func(c net.Conn, _ int64) {
		n, _ := io.Copy(io.Discard, c)
		bytes.Add(n)
	})
	r := open(t)
	for _, change := range []func(*sheaf.Request){
		func(q *sheaf.Request) { q.Job = "j\r\nSheaf-Block: 9" },
		func(q *sheaf.Request) { q.Function = "w\n" },
		func(q *sheaf.Request) { q.To.ID = "r\x00" },
	} {
		req := block(to, "x")
		change(req)
		_, err := r.Call(t.Context(), req)
		if ce, ok := errors.AsType[*sheaf.CallError](err); !ok || ce.Fault != sheaf.FaultRejected {
			t.Errorf("got %v, want FaultRejected", err)
		}
	}
	if n := bytes.Load(); n != 0 {
		t.Errorf("%d bytes were sent", n)
	}
}

// Calls end in every order of answers and cancels, each once, and nothing stays
// behind: goleak looks at the end.
func TestStartAndCancel(t *testing.T) {
	to := listen(t, func(c net.Conn, _ int64) {
		in := bufio.NewReader(c)
		for {
			body, err := take(in)
			if err != nil {
				return
			}
			if strings.HasPrefix(body, "hang") {
				_, _ = io.Copy(io.Discard, in)
				return
			}
			_, _ = io.WriteString(c, pong)
		}
	})
	r := direct.New(0)
	var wg sync.WaitGroup
	for i := range 300 {
		body := "ping"
		if i%3 == 0 {
			body = "hang"
		}
		if i%5 == 0 {
			body += strings.Repeat(" ", 1<<20)
		}
		wg.Add(1)
		var ends atomic.Int64
		begun := time.Now()
		cancel := r.Start(block(to, body), func(reply *sheaf.Reply, err error) {
			defer wg.Done()
			if ends.Add(1) > 1 {
				t.Errorf("call %d ended twice", i)
			}
			switch {
			case err == nil && string(reply.Body) != "pong":
				t.Errorf("call %d: got %q", i, reply.Body)
			case err != nil && !errors.Is(err, context.Canceled):
				t.Errorf("call %d: %v", i, err)
			case err == nil && i%3 == 0:
				t.Errorf("call %d hangs, and ended well", i)
			case time.Since(begun) > 4*soon:
				t.Errorf("call %d took %v", i, time.Since(begun))
			}
		})
		switch i % 4 {
		case 0:
			cancel()
		case 1:
			time.AfterFunc(time.Duration(i)*10*time.Microsecond, cancel)
		default:
			if i%3 == 0 {
				time.AfterFunc(time.Millisecond, func() { cancel(); cancel() })
			} else {
				wg.Go(func() { time.Sleep(time.Second); cancel() }) // long after its end
			}
		}
	}
	wg.Wait()
	reply, err := r.Call(t.Context(), block(to, "ping")) // what was canceled spoiled nothing
	if err != nil || string(reply.Body) != "pong" {
		t.Errorf("afterwards: %v %v", reply, err)
	}
	r.Close()
	if _, err := r.Call(t.Context(), block(to, "ping")); err != nil { // closed means: keeps nothing
		t.Errorf("after Close: %v", err)
	}
}

// TestAllocations: what one warm call may take from the heap.
func TestAllocations(t *testing.T) {
	to := listen(t, func(c net.Conn, _ int64) {
		in := make([]byte, 4096) // a request comes in one piece
		for {
			if _, err := c.Read(in); err != nil {
				return
			}
			_, _ = io.WriteString(c, pong)
		}
	})
	r := open(t)
	ended := make(chan error, 1)
	done := func(_ *sheaf.Reply, err error) { ended <- err }
	req := block(to, "ping")
	if n := testing.AllocsPerRun(500, func() {
		r.Start(req, done)
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
	}); n > 8 {
		t.Errorf("a warm call takes %v allocations, want 8 at most", n)
	}
}
