package routetest

// cut.go has the cases of connections that end where they should not. They are
// made by a server of bare TCP: net/http would mend some of them.

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// raw is a server that reads requests and lets a script write to the
// connection. The script returns false to have it closed.
type raw struct {
	url   string
	calls atomic.Int64
	conns atomic.Int64

	mu   sync.Mutex // guards open
	open map[net.Conn]bool
}

func serveRaw(t *testing.T, script func(c *net.TCPConn, call int64) bool) *raw {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &raw{url: "http://" + l.Addr().String(), open: map[net.Conn]bool{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns.Add(1)
			s.mu.Lock()
			s.open[c] = true
			s.mu.Unlock()
			wg.Go(func() {
				s.serve(c.(*net.TCPConn), script)
				s.mu.Lock()
				delete(s.open, c)
				s.mu.Unlock()
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		s.mu.Lock()
		for c := range s.open {
			_ = c.Close()
		}
		s.mu.Unlock()
		wg.Wait()
	})
	return s
}

func (s *raw) serve(c *net.TCPConn, script func(*net.TCPConn, int64) bool) {
	in := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		if !script(c, s.calls.Add(1)) {
			return
		}
	}
}

// The ways in which a connection ends.
const (
	fin  = "FIN"
	rst  = "RST"
	hang = "hang"
)

// end ends a connection in one of the ways.
func end(c *net.TCPConn, how string) {
	switch how {
	case rst:
		_ = c.SetLinger(0)
	case hang:
		_, _ = io.Copy(io.Discard, c) // until the caller leaves
	}
}

// framings are whole answers whose ends are told in the three ways of HTTP/1.
func framings() map[string]string {
	const body = "the whole answer, of which no part may be taken for all\n"
	head := "HTTP/1.1 200 OK\r\nContent-Digest: " + wire.Sum([]byte(body)) + "\r\n"
	return map[string]string{
		"length":  head + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)) + body,
		"chunked": head + "Transfer-Encoding: chunked\r\n\r\n" + fmt.Sprintf("10\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n", body[:16], len(body)-16, body[16:]),
		"closed":  head + "Connection: close\r\n\r\n" + body,
	}
}

func cuts(t *testing.T, open Open) {
	for framing, whole := range framings() {
		for _, how := range []string{fin, rst, hang} {
			t.Run(framing+" "+how, func(t *testing.T) {
				var at atomic.Int64
				srv := serveRaw(t, func(c *net.TCPConn, _ int64) bool {
					_, _ = io.WriteString(c, whole[:at.Load()])
					end(c, how)
					return false
				})
				route, to := open(t, srv.url)
				step, fault := 1, sheaf.FaultLost
				patience := time.Minute
				if how == hang {
					step, fault = len(whole)/4, sheaf.FaultTimeout
					patience = 20 * time.Millisecond
				}
				for n := 0; n < len(whole); n += step {
					at.Store(int64(n))
					req := request(to, "x")
					req.Deadline = time.Now().Add(patience)
					reply, err := call(t, route, req)
					if _, why := fails(reply, err, fault); why != "" {
						t.Errorf("cut by %s at byte %d of %d: %s", how, n, len(whole), why)
					}
				}
				if how == fin { // the suite itself must send a good answer
					at.Store(int64(len(whole)))
					if reply, err := call(t, route, request(to, "x")); err != nil || !reply.Verified {
						t.Errorf("the whole answer was refused: %v", err)
					}
				}
			})
		}
	}
}

func endsEarly(t *testing.T, open Open) {
	const body = "the whole answer"
	var n atomic.Int64
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		read(r)
		w.Header().Set(wire.Digest, wire.Sum([]byte(body)))
		_ = http.NewResponseController(w).Flush() // so that it is chunked
		_, _ = io.WriteString(w, body[:n.Load()])
	})
	route, to := open(t, srv.URL)
	for ; n.Load() < int64(len(body)); n.Add(1) {
		reply, err := call(t, route, request(to, "x"))
		if _, why := fails(reply, err, sheaf.FaultLost); why != "" {
			t.Errorf("ended after %d of %d bytes: %s", n.Load(), len(body), why)
		}
	}
	must(t, route, request(to, "x"), body)
}

const pong = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\npong"

// sentOnce: a connection that is kept alive breaks just when the next block was
// written to it. The function has the block, so only the caller may send it
// again, as another attempt.
func sentOnce(t *testing.T, open Open) {
	for _, how := range []string{fin, rst} {
		for _, body := range []string{"block", ""} {
			t.Run(fmt.Sprintf("%s, %d bytes", how, len(body)), func(t *testing.T) {
				srv := serveRaw(t, func(c *net.TCPConn, call int64) bool {
					if call == 1 {
						_, _ = io.WriteString(c, pong)
						return true
					}
					end(c, how)
					return false
				})
				route, to := open(t, srv.url)
				must(t, route, request(to, body), "pong")
				refused(t, route, request(to, body), sheaf.FaultLost)
				if n := srv.calls.Load(); n != 2 {
					t.Errorf("the function was called %d times by 2 calls", n)
				}
			})
		}
	}
}

// comesBack: a connection that is closed while idle costs no call.
func comesBack(t *testing.T, open Open) {
	closed := make(chan struct{}, 1)
	srv := serveRaw(t, func(c *net.TCPConn, _ int64) bool {
		_, _ = io.WriteString(c, strings.Replace(pong, "\r\n\r\n", "\r\nConnection: keep-alive\r\n\r\n", 1))
		closed <- struct{}{}
		return false
	})
	route, to := open(t, srv.url)
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		reply, err := route.Call(ctx, request(to, "x"))
		cancel()
		if err != nil || string(reply.Body) != "pong" {
			t.Fatalf("got %v, want pong", err)
		}
		<-closed
		time.Sleep(20 * time.Millisecond) // for the close to be seen: it is no answer that could be waited for
	}
	if n := srv.calls.Load(); n != 5 {
		t.Errorf("the function was called %d times by 5 calls", n)
	}
}
