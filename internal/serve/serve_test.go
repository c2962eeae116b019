package serve_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon is how long what happens "at once" may take on a busy machine.
const soon = 5 * time.Second

// running is a Server that serves on a port of its own.
type running struct {
	url   string
	stop  context.CancelFunc // the order to end
	ended chan error         // what Serve returned
	http  *http.Client
}

// A way is how calls come to a Handler: through net/http, or on the short way.
type way string

func bothWays(t *testing.T, test func(*testing.T, way)) {
	for _, w := range []way{"net/http", "short"} {
		t.Run(string(w), func(t *testing.T) { test(t, w) })
	}
}

// shortcut makes a BlockHandler of any Handler.
type shortcut struct{ http.Handler }

func (shortcut) Room() (int64, time.Duration) { return 1 << 20, soon }

func (shortcut) Admit(http.Header, time.Time) (a serve.Admission, p *wire.Problem) { return a, nil }

func (s shortcut) ServeBlock(ctx context.Context, _ serve.Admission, header http.Header, block []byte, readErr error, _ time.Time) ([]byte, bool, *wire.Problem) {
	if readErr != nil {
		return nil, false, wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, readErr.Error())
	}
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", bytes.NewReader(block))
	r.Header = header
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		return nil, false, wire.Refuse(w.Code, wire.CodeFailed, w.Body.String())
	}
	return w.Body.Bytes(), false, nil
}

// run serves s until the test ends.
func (w way) run(t *testing.T, s *serve.Server) *running {
	t.Helper()
	if w == "short" {
		s.Handler = shortcut{s.Handler}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{url: "http://" + l.Addr().String(), stop: cancel, ended: make(chan error, 1), http: &http.Client{Transport: &http.Transport{}}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.ended <- s.Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		r.http.CloseIdleConnections()
		<-done
	})
	return r
}

// get is the answer at path, with its body.
func (r *running) get(t *testing.T, path string, header ...string) (*http.Response, string) {
	t.Helper()
	method := http.MethodGet
	if path == "/" {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(t.Context(), method, r.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := r.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// wait is what Serve returned.
func (r *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.ended:
		return err
	case <-time.After(soon):
		t.Fatalf("Serve did not return within %v", soon)
		return nil
	}
}

// gate is a handler that says when a call has begun, and lets it end.
type gate struct {
	began chan struct{}
	open  chan struct{}
	cut   chan error // why the call's ctx ended before that
}

func newGate() *gate {
	return &gate{began: make(chan struct{}, 16), open: make(chan struct{}), cut: make(chan error, 16)}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.began <- struct{}{}
	select {
	case <-g.open:
		_, _ = io.WriteString(w, "done")
	case <-r.Context().Done():
		g.cut <- context.Cause(r.Context())
	}
}

// call begins a call through the gate and returns where its answer will be.
func (g *gate) call(t *testing.T, r *running) chan string {
	t.Helper()
	answer := make(chan string, 1)
	go func() {
		resp, err := r.http.Post(r.url, "", strings.NewReader("block"))
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		answer <- fmt.Sprint(resp.StatusCode, " ", string(body), " ", err)
	}()
	select {
	case <-g.began:
	case <-time.After(soon):
		t.Fatal("the call did not begin")
	}
	return answer
}

func TestHealthAndIdentity(t *testing.T) { bothWays(t, testHealthAndIdentity) }

func testHealthAndIdentity(t *testing.T, w way) {
	g := newGate()
	r := w.run(t, &serve.Server{Handler: g, Function: "worker", Replica: "r1", Version: "v7", MaxInflight: 2})
	answer := g.call(t, r)
	for _, path := range []string{"/_/health", "/_/ready"} {
		resp, body := r.get(t, path)
		if resp.StatusCode != 200 || resp.ContentLength != int64(len(body)) || resp.Header.Get(wire.Replica) != "r1" {
			t.Errorf("%s: %s %q %v", path, resp.Status, body, resp.Header)
		}
	}
	resp, body := r.get(t, "/_/sheaf")
	var got map[string]any
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("%v: %q", err, body)
	}
	want := map[string]any{"function": "worker", "replica": "r1", "version": "v7", "wire": 1.0, "inflight": 1.0, "max_inflight": 2.0, "draining": false}
	if fmt.Sprint(got) != fmt.Sprint(want) || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("identity is %v, want %v", got, want)
	}
	close(g.open)
	if got := <-answer; got != "200 done <nil>" {
		t.Errorf("the call got %q", got)
	}
}

func TestMisdirected(t *testing.T) { bothWays(t, testMisdirected) }

func testMisdirected(t *testing.T, w way) {
	ok := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	for _, c := range []struct {
		name              string
		function, replica string // who the server is
		to                string
		status            int
		code              string
	}{
		{"mine", "worker", "r1", "worker/r1", 200, ""},
		{"another replica's", "worker", "r1", "worker/r2", 421, wire.CodeMisdirected},
		{"another function's", "worker", "r1", "resizer/r1", 421, wire.CodeMisdirected},
		{"nobody in particular's", "worker", "r1", "", 200, ""},
		{"function is not known here", "", "r1", "worker/r1", 200, ""},
		{"function is not known here, another replica's", "", "r1", "worker/r2", 421, wire.CodeMisdirected},
		{"replica is nobody", "worker", "", "worker/r9", 200, ""},
		{"not an addressee", "worker", "r1", "r1", 400, wire.CodeEnvelope},
		{"a long one", "worker", "r1", "worker/" + strings.Repeat("r", 9999), 421, wire.CodeMisdirected},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := w.run(t, &serve.Server{Handler: ok, Function: c.function, Replica: c.replica})
			var header []string
			if c.to != "" {
				header = []string{wire.To, c.to}
			}
			resp, body := r.get(t, "/", header...)
			if resp.StatusCode != c.status || resp.Header.Get(wire.Code) != c.code || len(body) > 1000 {
				t.Errorf("got %s, code %q: %s", resp.Status, resp.Header.Get(wire.Code), body)
			}
			if got := resp.Header.Get(wire.Replica); got != c.replica {
				t.Errorf("answered as %q, want %q", got, c.replica)
			}
			if resp, _ := r.get(t, "/_/health", header...); resp.StatusCode != 200 {
				t.Errorf("health is %s for a prober that names somebody", resp.Status)
			}
		})
	}
}

func TestMaxInflight(t *testing.T) { bothWays(t, testMaxInflight) }

func testMaxInflight(t *testing.T, w way) {
	g := newGate()
	r := w.run(t, &serve.Server{Handler: g, MaxInflight: 2})
	first, second := g.call(t, r), g.call(t, r)
	for _, path := range []string{"/", "/_/ready"} {
		resp, body := r.get(t, path)
		if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "1" || resp.Header.Get(wire.RetryMS) != "50" ||
			resp.Header.Get(wire.Code) != wire.CodeBusy || !strings.Contains(body, `"limit":2`) || !strings.Contains(body, "max_inflight") {
			t.Errorf("%s: got %s %v %s, want a 429 that says how long to wait", path, resp.Status, resp.Header, body)
		}
	}
	if resp, _ := r.get(t, "/_/health"); resp.StatusCode != 200 {
		t.Errorf("a busy replica's health is %s", resp.Status)
	}
	close(g.open)
	<-first
	<-second
	if got := <-g.call(t, r); got != "200 done <nil>" {
		t.Errorf("after the others ended: %q", got)
	}
	if resp, _ := r.get(t, "/_/ready"); resp.StatusCode != 200 {
		t.Errorf("an idle replica's readiness is %s", resp.Status)
	}
}

// TestDrain: the running call ends in peace, and nobody can begin another.
func TestDrain(t *testing.T) { bothWays(t, testDrain) }

func testDrain(t *testing.T, w way) {
	g := newGate()
	r := w.run(t, &serve.Server{Handler: g, Grace: soon})
	answer := g.call(t, r)
	r.stop()
	addr := strings.TrimPrefix(r.url, "http://")
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		_ = c.Close()
		if time.Since(begun) > soon {
			t.Fatal("new connections are still taken")
		}
	}
	select {
	case err := <-r.ended:
		t.Fatalf("Serve returned %v while a call runs", err)
	case err := <-g.cut:
		t.Fatalf("the running call was cut: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(g.open)
	if got := <-answer; got != "200 done <nil>" {
		t.Errorf("the running call got %q", got)
	}
	if err := r.wait(t); err != nil {
		t.Errorf("Serve returned %v", err)
	}
}

// TestLinger: while those who send learn of the end, calls are still taken, but
// the replica is not ready.
func TestLinger(t *testing.T) { bothWays(t, testLinger) }

func testLinger(t *testing.T, w way) {
	g := newGate()
	close(g.open)
	const linger = 300 * time.Millisecond
	r := w.run(t, &serve.Server{Handler: g, Linger: linger})
	begun := time.Now()
	r.stop()
	for {
		resp, body := r.get(t, "/_/ready")
		if resp.StatusCode == 503 {
			if resp.Header.Get("Retry-After") != "1" || resp.Header.Get(wire.Code) != wire.CodeDraining || !strings.Contains(body, "end") {
				t.Errorf("got %v %s", resp.Header, body)
			}
			break
		}
		if time.Since(begun) > linger {
			t.Fatalf("still %s after the order to end", resp.Status)
		}
	}
	if got := <-g.call(t, r); got != "200 done <nil>" {
		t.Errorf("a call that comes while lingering got %q", got)
	}
	if _, body := r.get(t, "/_/sheaf"); !strings.Contains(body, `"draining":true`) {
		t.Errorf("identity is %s", body)
	}
	if err := r.wait(t); err != nil || time.Since(begun) < linger {
		t.Errorf("Serve returned %v after %v, want nil after %v", err, time.Since(begun), linger)
	}
}

// TestGrace: a call that does not end is cut, and the error says so.
func TestGrace(t *testing.T) { bothWays(t, testGrace) }

func testGrace(t *testing.T, w way) {
	g := newGate()
	r := w.run(t, &serve.Server{Handler: g, Grace: 50 * time.Millisecond})
	answer := g.call(t, r)
	r.stop()
	err := r.wait(t)
	if err == nil || err.Error() != "drain: 1 calls were cut after 50ms; raise write_timeout to give them longer" {
		t.Errorf("Serve returned %v", err)
	}
	if cause := <-g.cut; cause == nil || !strings.Contains(cause.Error(), "function ends") {
		t.Errorf("the call's ctx ended by %v", cause)
	}
	<-answer
}

// A connection that is open but says nothing is no call that could be cut.
func TestGraceSilentConnection(t *testing.T) { bothWays(t, testGraceSilentConnection) }

func testGraceSilentConnection(t *testing.T, w way) {
	r := w.run(t, &serve.Server{Handler: newGate(), Grace: 50 * time.Millisecond})
	c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if resp, _ := r.get(t, "/_/health"); resp.StatusCode != 200 { // so that c was accepted
		t.Fatal(resp.Status)
	}
	r.stop()
	if err := r.wait(t); err != nil {
		t.Errorf("Serve returned %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection ended by %v", err)
	}
}

// Whoever is refused is answered at once, even one whose body never comes.
func TestRefusalReadsNoBodyForEver(t *testing.T) { bothWays(t, testRefusalReadsNoBodyForEver) }

func testRefusalReadsNoBodyForEver(t *testing.T, w way) {
	r := w.run(t, &serve.Server{Handler: newGate(), Function: "worker", Replica: "r1"})
	c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(soon))
	fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nSheaf-To: worker/r2\r\nContent-Length: 10\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 421 {
		t.Errorf("got %s", resp.Status)
	}
}

func TestRunCannotListen(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := &serve.Server{Handler: http.NotFoundHandler(), Addr: l.Addr().String()}
	if err := s.Run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "listen: ") {
		t.Errorf("got %v", err)
	}
}

func TestServeListenerBreaks(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	s := &serve.Server{Handler: http.NotFoundHandler()}
	if err := s.Serve(t.Context(), l); err == nil || !strings.HasPrefix(err.Error(), "serve ") {
		t.Errorf("got %v", err)
	}
}
