package serve_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// echo answers with what came, and notes it.
type echo struct {
	mu   sync.Mutex // guards seen
	seen []string
}

func (e *echo) note(h http.Header, body []byte) []byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := fmt.Sprintf("%q %q", body, h["X-Test"])
	e.seen = append(e.seen, s)
	return []byte(s)
}

func (e *echo) take() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.seen
	e.seen = nil
	return s
}

func (e *echo) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || r.URL.Path != "/" {
		http.NotFound(w, r)
		return
	}
	b, err := wire.ReadBody(r.Body, r.ContentLength, 1<<16)
	if err != nil || len(b) > 1<<16 {
		wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, "cut").Write(w)
		return
	}
	watch(r.Context(), r.Header)
	_, _ = w.Write(e.note(r.Header, b))
}

// watch waits for the caller to leave, if h says so.
func watch(ctx context.Context, h http.Header) {
	if h["X-Watch"] == nil {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(soon):
		h.Set("X-Test", "nobody left")
	}
}

type shortEcho struct{ *echo }

func (shortEcho) Room() (int64, time.Duration) { return 1 << 16, soon }

func (shortEcho) Admit(http.Header, time.Time) (a serve.Admission, p *wire.Problem) { return a, nil }

func (e shortEcho) ServeBlock(ctx context.Context, _ serve.Admission, h http.Header, block []byte, err error, _ time.Time) ([]byte, bool, *wire.Problem) {
	if err != nil {
		return nil, false, wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, "cut")
	}
	watch(ctx, h)
	return e.note(h, block), false, nil
}

// pair is the same function behind net/http and on the short way.
type pair struct {
	addr  [2]string
	calls [2]*echo
	stop  func()
}

func newPair(t testing.TB) *pair {
	p := &pair{calls: [2]*echo{{}, {}}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i, h := range []http.Handler{p.calls[0], shortEcho{p.calls[1]}} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p.addr[i] = l.Addr().String()
		wg.Go(func() { _ = (&serve.Server{Handler: h, Function: "worker", Replica: "r1", Grace: soon}).Serve(ctx, l) })
	}
	p.stop = func() { cancel(); wg.Wait() }
	return p
}

// talk sends text, in pieces, then ends its side, and returns what it was told:
// the status of each answer, the bodies of those that are 200, and how it ended.
func talk(t testing.TB, addr, text string, pieces int) []string {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * soon))
	for i := range pieces {
		if _, err := io.WriteString(c, text[len(text)*i/pieces:len(text)*(i+1)/pieces]); err != nil {
			break // it has heard enough
		}
		if pieces > 1 {
			time.Sleep(time.Millisecond)
		}
	}
	_ = c.(*net.TCPConn).CloseWrite()
	var told []string
	for in := bufio.NewReader(c); ; {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
				told = append(told, "no end")
			}
			return told
		}
		body, err := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 {
			body = nil
		}
		told = append(told, fmt.Sprintf("%d %s %v", resp.StatusCode, body, err))
	}
}

// requests are what a server of HTTP/1.1 may be sent: B11 to B16 and C11 of the
// faults, and what is right.
var requests = map[string]string{
	"a block":                      "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nX-Test: 1\r\n\r\nabc",
	"an empty one":                 "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
	"names in lower case":          "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nx-test: 1\r\n\r\nabc",
	"three in a row":               strings.Repeat("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 3),
	"a probe between":              "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\naGET /_/health HTTP/1.1\r\nHost: x\r\n\r\nPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nb",
	"closes":                       "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\naPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nb",
	"keeps":                        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: Keep-Alive\r\n\r\na",
	"other options":                "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: x, close\r\n\r\naPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nb",
	"HTTP/1.0":                     "POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\na",
	"HTTP/1.0, kept":               "POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\na",
	"HTTP/1.2":                     "POST / HTTP/1.2\r\nHost: x\r\nContent-Length: 1\r\n\r\na",
	"HTTP/2":                       "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	"chunks":                       "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
	"expects":                      "POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na",
	"an absolute target":           "POST http://x/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na",
	"no body":                      "POST / HTTP/1.1\r\nHost: x\r\n\r\n",
	"a block too long":             "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n" + strings.Repeat("a", 65537),
	"short body":                   "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc",
	"cut head":                     "POST / HTTP/1.1\r\nHost: x\r\nContent-Len",
	"nothing":                      "",
	"length and chunks":            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /_/health HTTP/1.1\r\nHost: x\r\n\r\n",
	"two lengths":                  "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
	"the same length twice":        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
	"a list of lengths":            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\na",
	"a negative length":            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
	"a signed length":              "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
	"an exponent":                  "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1e0\r\n\r\na",
	"an empty length":              "POST / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n",
	"a length with zeros":          "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0003\r\n\r\nabc",
	"a length beyond numbers":      "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\na",
	"space before the colon":       "POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 1\r\n\r\na",
	"no host":                      "POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\na",
	"two hosts":                    "POST / HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 1\r\n\r\na",
	"a host that cannot be":        "POST / HTTP/1.1\r\nHost: x y\r\nContent-Length: 1\r\n\r\na",
	"an empty host":                "POST / HTTP/1.1\r\nHost:\r\nContent-Length: 1\r\n\r\na",
	"an unknown coding":            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
	"a folded line":                "POST / HTTP/1.1\r\nHost: x\r\nX-Test: a\r\n b\r\nContent-Length: 1\r\n\r\na",
	"line feeds only":              "POST / HTTP/1.1\nHost: x\nContent-Length: 1\n\na",
	"a line feed in a value":       "POST / HTTP/1.1\r\nHost: x\r\nX-Test: a\nContent-Length: 1\r\n\r\na",
	"a carriage return in a value": "POST / HTTP/1.1\r\nHost: x\r\nX-Test: a\rb\r\nContent-Length: 1\r\n\r\na",
	"NUL in a value":               "POST / HTTP/1.1\r\nHost: x\r\nX-Test: a\x00b\r\nContent-Length: 1\r\n\r\na",
	"NUL in a name":                "POST / HTTP/1.1\r\nHost: x\r\nX-\x00: a\r\nContent-Length: 1\r\n\r\na",
	"bytes over ASCII in a value":  "POST / HTTP/1.1\r\nHost: x\r\nX-Test: \xff\xfe\r\nContent-Length: 1\r\n\r\na",
	"tabs around a value":          "POST / HTTP/1.1\r\nHost: x\r\nX-Test:\t a\tb \t\r\nContent-Length: 1\r\n\r\na",
	"one name twice":               "POST / HTTP/1.1\r\nHost: x\r\nX-Test: a\r\nX-test: b\r\nContent-Length: 1\r\n\r\na",
	"9 KiB of head":                "POST / HTTP/1.1\r\nHost: x\r\nX-Test: " + strings.Repeat("a", 9<<10) + "\r\nContent-Length: 1\r\n\r\na",
	"2 MiB of head":                "POST / HTTP/1.1\r\nHost: x\r\nX-Test: " + strings.Repeat("a", 2<<20) + "\r\nContent-Length: 1\r\n\r\na",
	"two spaces":                   "POST  / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na",
	"an empty line first":          "\r\nPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na",
	"a block in the next head":     "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcdefPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
	"another replica's":            "POST / HTTP/1.1\r\nHost: x\r\nSheaf-To: worker/r2\r\nContent-Length: 3\r\n\r\nabcPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nb",
	"ends its side":                "POST / HTTP/1.1\r\nHost: x\r\nX-Watch: 1\r\nContent-Length: 1\r\n\r\na",
	"ends its side, and closes":    "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Watch: 1\r\nContent-Length: 1\r\n\r\na",
	"a host in quotes":             "POST / HTTP/1.1\r\nHost: \"x\"\r\nContent-Length: 1\r\n\r\na",
	"a host over ASCII":            "POST / HTTP/1.1\r\nHost: \xff\r\nContent-Length: 1\r\n\r\na",
	"a host in braces":             "POST / HTTP/1.1\r\nHost: {x}\r\nContent-Length: 1\r\n\r\na",
	"an upgrade":                   "POST / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\na",
}

// TestSameAsNetHTTP: whatever is sent, in whatever pieces, the short way calls
// the function as net/http does and answers as it does.
func TestSameAsNetHTTP(t *testing.T) {
	p := newPair(t)
	defer p.stop()
	for name, text := range requests {
		for _, pieces := range []int{1, 2, 7} {
			if pieces > 1 && len(text) > 1<<20 {
				continue // it is cut off somewhere
			}
			var told, seen [2][]string
			for i := range 2 {
				told[i] = talk(t, p.addr[i], text, pieces)
				seen[i] = p.calls[i].take()
			}
			if len(text) > 1<<16 { // whether the answer is read before the reset is luck
				told[0], told[1] = nil, nil
			}
			if fmt.Sprint(told[0]) != fmt.Sprint(told[1]) || fmt.Sprint(seen[0]) != fmt.Sprint(seen[1]) {
				t.Errorf("%s, in %d pieces: net/http answers %q to calls %q, the short way %q to %q", name, pieces, told[0], seen[0], told[1], seen[1])
			}
		}
	}
}

// hasty is a function whose blocks must come at once, and its results leave.
type hasty struct{ shortEcho }

func (hasty) Room() (int64, time.Duration) { return 1 << 16, 50 * time.Millisecond }

// What is set for a block does not hold for what follows it on the connection,
// which net/http serves.
func TestHandedOver(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = (&serve.Server{Handler: hasty{shortEcho{&echo{}}}, Grace: soon}).Serve(ctx, l) })
	defer wg.Wait()
	defer cancel()
	for name, c := range map[string]struct {
		text   string
		status int
	}{
		"a probe": {"GET /_/health HTTP/1.1\r\nHost: x\r\n\r\n", 200},
		"chunks":  {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 200},
		// The rest is not waited for: the connection ends after the answer, and not
		// by a reset, which might take the answer with it.
		"a block too long": {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat("a", 100_000), 400},
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			_ = nc.SetDeadline(time.Now().Add(2 * soon))
			in := bufio.NewReader(nc)
			for i, text := range []string{requests["a block"], c.text} {
				if _, err := io.WriteString(nc, text); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatalf("answer %d: %v", i, err)
				}
				_, err = io.Copy(io.Discard, resp.Body)
				if want := []int{200, c.status}[i]; err != nil || resp.StatusCode != want {
					t.Errorf("answer %d: %s %v, want %d", i, resp.Status, err, want)
				}
				time.Sleep(100 * time.Millisecond) // longer than the result of a block may take to leave
			}
			if c.status == 400 {
				if _, err = in.ReadByte(); err != io.EOF {
					t.Errorf("the connection ended by %v", err)
				}
			}
		})
	}
}

func FuzzSameAsNetHTTP(f *testing.F) {
	for _, text := range requests {
		if len(text) < 1<<10 {
			f.Add(text)
		}
	}
	p := newPair(f)
	defer p.stop()
	f.Fuzz(func(t *testing.T, text string) {
		var told, seen [2][]string
		for i := range 2 {
			told[i] = talk(t, p.addr[i], text, 1)
			seen[i] = p.calls[i].take()
		}
		if fmt.Sprint(seen[0]) != fmt.Sprint(seen[1]) {
			t.Fatalf("%q: net/http calls %q, the short way %q", text, seen[0], seen[1])
		}
		if len(told[1]) < len(seen[1]) {
			t.Fatalf("%q: answers %q to calls %q", text, told[1], seen[1])
		}
	})
}

// A head that comes a byte a second is cut off, and so is a silent connection:
// nobody holds a replica's connections for nothing.
func TestSlowHead(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	t.Cleanup(p.stop)
	var wg sync.WaitGroup
	defer wg.Wait()
	for name, text := range map[string]string{"silent": "", "slow": "POST / HTTP/1.1\r\nHost: x\r\nX: ",
		"slow after a block": "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\naPOST /"} {
		c, err := net.Dial("tcp", p.addr[1])
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan struct{})
		wg.Go(func() {
			_, _ = io.WriteString(c, text)
			for text != "" {
				select {
				case <-time.After(200 * time.Millisecond):
					_, _ = io.WriteString(c, "a")
				case <-closed:
					return
				}
			}
		})
		wg.Go(func() {
			defer c.Close()
			defer close(closed)
			begun := time.Now()
			_ = c.SetReadDeadline(begun.Add(20 * time.Second))
			_, err = io.Copy(io.Discard, c)
			if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
				t.Errorf("%s: the connection is still open after 20 s", name)
			}
			if took := time.Since(begun); took < 4*time.Second {
				t.Errorf("%s: it was closed after %v", name, took)
			}
		})
	}
}

// TestCallerLeavesLate: also one who leaves long after its block came, or after
// it sent many.
func TestCallerLeavesLate(t *testing.T) {
	g := newGate()
	r := way("short").run(t, &serve.Server{Handler: g})
	c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	for range 3 { // each takes longer than the server waits before it looks for the caller
		fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na")
		<-g.began
		time.Sleep(30 * time.Millisecond)
		g.open <- struct{}{}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "done" {
			t.Fatalf("got %q %v", body, err)
		}
	}
	fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na")
	<-g.began
	time.Sleep(30 * time.Millisecond)
	_ = c.Close()
	select {
	case <-g.cut:
	case <-time.After(soon):
		t.Error("the handler was not told that its caller left")
	}
}

// The next block may come while the last one is worked on.
func TestPipelined(t *testing.T) {
	g := newGate()
	r := way("short").run(t, &serve.Server{Handler: g})
	c, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	const block = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\na"
	fmt.Fprint(c, block)
	for range 4 {
		<-g.began
		time.Sleep(15 * time.Millisecond)
		fmt.Fprint(c, block)
		time.Sleep(5 * time.Millisecond)
		g.open <- struct{}{}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
	}
	<-g.began
	g.open <- struct{}{}
}

// TestBlockAllocations: what one block may take from the heap of a worker,
// beside what the function takes.
func TestBlockAllocations(t *testing.T) {
	p := newPair(t)
	defer p.stop()
	c, err := net.Dial("tcp", p.addr[1])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	block := []byte("POST / HTTP/1.1\r\nHost: x\r\nSheaf-Job: j\r\nSheaf-Block: 1\r\nSheaf-To: worker/r1\r\nContent-Length: 3\r\n\r\nabc")
	room := make([]byte, 4096)
	var before, after runtime.MemStats
	const n = 500
	for i := range n + 100 {
		if i == 100 {
			runtime.ReadMemStats(&before)
		}
		if _, err := c.Write(block); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(room); err != nil { // an answer comes in one piece
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	p.calls[1].take()
	// Of these, the function above takes 7.
	if got := float64(after.Mallocs-before.Mallocs) / n; got > 14 {
		t.Errorf("a block takes %.1f allocations, want 14 at most", got)
	}
}
