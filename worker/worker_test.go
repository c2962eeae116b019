package worker_test

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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon is how long what happens "at once" may take on a busy machine.
const soon = 5 * time.Second

// log is a log that can be read while it is written.
type log struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// A way is how a block comes to a Handler: through net/http, as under any
// server, or on the short way of this module's own.
type way string

func bothWays(t *testing.T, test func(*testing.T, way)) {
	for _, w := range []way{"net/http", "short"} {
		t.Run(string(w), func(t *testing.T) { test(t, w) })
	}
}

// server is a Handler that serves at URL.
type server struct {
	URL   string
	Close func()
}

// start serves h until the test ends, and returns its log, too.
func (w way) start(t *testing.T, h *worker.Handler) (*server, *log) {
	t.Helper()
	l := &log{}
	h.Log = slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if w != "short" {
		srv := httptest.NewServer(h)
		t.Cleanup(srv.Close)
		return &server{srv.URL, srv.Close}, l
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		s := serve.Server{Handler: h, Grace: soon, Log: slog.New(slog.DiscardHandler)}
		if err := s.Serve(ctx, listener); err != nil {
			t.Error(err)
		}
	})
	stop := func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return &server{"http://" + listener.Addr().String(), stop}, l
}

func upper(_ context.Context, b sheaf.Block) ([]byte, error) { return bytes.ToUpper(b.Data), nil }

// send sends a request and returns the answer with its body.
func send(t *testing.T, method, url string, body io.Reader, header ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, got
}

// problem reads a refusal and checks its form.
func problem(t *testing.T, resp *http.Response, body []byte, status int, code string) wire.Problem {
	t.Helper()
	var p wire.Problem
	if err := json.Unmarshal(body, &p); err != nil {
		t.Fatalf("%v: %s %q", err, resp.Status, body)
	}
	if resp.StatusCode != status || p.Status != status || p.Code != code || resp.Header.Get(wire.Code) != code ||
		resp.Header.Get("Content-Type") != wire.ContentType || p.Detail == "" {
		t.Errorf("got %s, want %d and code %s: %s", resp.Status, status, code, body)
	}
	if resp.Header.Get(wire.Digest) != "" {
		t.Error("a refusal carries a digest")
	}
	return p
}

func TestAnswers(t *testing.T) { bothWays(t, testAnswers) }

func testAnswers(t *testing.T, w way) {
	empty := func(context.Context, sheaf.Block) ([]byte, error) { return nil, nil }
	length := func(_ context.Context, b sheaf.Block) ([]byte, error) { return []byte(strconv.Itoa(len(b.Data))), nil }
	for _, c := range []struct {
		name string
		f    worker.Func
		body io.Reader
		want string
		head []string
	}{
		{"a block", upper, strings.NewReader("block"), "BLOCK", nil},
		{"with its digest", upper, strings.NewReader("block"), "BLOCK", []string{wire.Digest, wire.Sum([]byte("block"))}},
		{"with a digest that nobody here knows", upper, strings.NewReader("block"), "BLOCK", []string{wire.Digest, "md5=:eA==:"}},
		{"an empty block", length, nil, "0", []string{wire.Digest, wire.Sum(nil)}},
		{"an empty result", empty, strings.NewReader("block"), "", nil},
		{"an empty block, an empty result", empty, nil, "", nil},
		{"its length is not told", upper, io.MultiReader(strings.NewReader("bl"), strings.NewReader("ock")), "BLOCK", nil},
		{"no byte of an untold length", length, io.MultiReader(), "0", nil},
		{"bytes that are no text", func(_ context.Context, b sheaf.Block) ([]byte, error) { return b.Data, nil },
			strings.NewReader("\x00\xff\xfe\r\n\r\n"), "\x00\xff\xfe\r\n\r\n", []string{"Content-Type", "text/html"}},
		{"of the greatest length", length, strings.NewReader(strings.Repeat("x", 3<<20)), "3145728", nil},
		{"a result of some MiB", func(context.Context, sheaf.Block) ([]byte, error) { return make([]byte, 5<<20), nil },
			nil, string(make([]byte, 5<<20)), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv, _ := w.start(t, &worker.Handler{Func: c.f, MaxBlock: 3 << 20})
			resp, got := send(t, http.MethodPost, srv.URL, c.body, c.head...)
			if resp.StatusCode != 200 || string(got) != c.want {
				t.Fatalf("got %s and %d bytes %.40q, want %d bytes %.40q", resp.Status, len(got), got, len(c.want), c.want)
			}
			if resp.ContentLength != int64(len(got)) || resp.Header.Get(wire.Digest) != wire.Sum(got) ||
				resp.Header.Get("Content-Type") != "application/octet-stream" {
				t.Errorf("got length %d and headers %v", resp.ContentLength, resp.Header)
			}
		})
	}
}

func TestRefuses(t *testing.T) { bothWays(t, testRefuses) }

func testRefuses(t *testing.T, w way) {
	const secret = "s3cr3t-block-content"
	fail := func(err error) worker.Func {
		return func(context.Context, sheaf.Block) ([]byte, error) { return []byte("not a result"), err }
	}
	for _, c := range []struct {
		name         string
		f            worker.Func // nil when it must not be called
		method, path string
		body         io.Reader
		head         []string
		status       int
		code, detail string
	}{
		{"GET", nil, "GET", "/", nil, nil, 405, wire.CodeMethod, "POST"},
		{"PUT", nil, "PUT", "/", strings.NewReader(secret), nil, 405, wire.CodeMethod, "POST"},
		{"another path", nil, "POST", "/admin", strings.NewReader(secret), nil, 404, wire.CodeNotFound, "at / only"},
		{"a path up", nil, "POST", "/../", strings.NewReader(secret), nil, 404, wire.CodeNotFound, "at / only"},
		{"a damaged block", nil, "POST", "/", strings.NewReader(secret), []string{wire.Digest, wire.Sum([]byte("another"))}, 400, wire.CodeDamaged, "send it again"},
		{"a digest on nothing", nil, "POST", "/", nil, []string{wire.Digest, wire.Sum([]byte("another"))}, 400, wire.CodeDamaged, ""},
		{"a bad envelope", nil, "POST", "/", strings.NewReader(secret), []string{wire.Block, "-1"}, 400, wire.CodeEnvelope, wire.Block},
		{"a rank that cannot be", nil, "POST", "/", strings.NewReader(secret), []string{wire.Rank, "2", wire.Size, "2"}, 400, wire.CodeEnvelope, wire.Rank},
		{"too large", nil, "POST", "/", strings.NewReader(strings.Repeat(secret, 100)), nil, 413, wire.CodeTooLarge, "1024"},
		{"too large, its length is not told", nil, "POST", "/", io.MultiReader(strings.NewReader(strings.Repeat(secret, 100))), nil, 413, wire.CodeTooLarge, "max_block"},
		{"too large by a byte", nil, "POST", "/", strings.NewReader(strings.Repeat("x", 1025)), nil, 413, wire.CodeTooLarge, "1024"},
		{"an error", fail(errors.New("no database")), "POST", "/", strings.NewReader(secret), nil, 500, wire.CodeFailed, "no database"},
		{"a rejection", fail(worker.Reject(errors.New("row 7 has no id"))), "POST", "/", strings.NewReader(secret), nil, 422, wire.CodeRejected, "row 7 has no id"},
		{"a rejection, wrapped", fail(fmt.Errorf("parse: %w", worker.Reject(io.ErrUnexpectedEOF))), "POST", "/", strings.NewReader(secret), nil, 422, wire.CodeRejected, "parse: unexpected EOF"},
		{"a deadline of the handler's own", fail(context.DeadlineExceeded), "POST", "/", strings.NewReader(secret), nil, 500, wire.CodeFailed, "deadline"},
		{"a panic", func(_ context.Context, b sheaf.Block) ([]byte, error) { panic("cannot take " + string(b.Data)) },
			"POST", "/", strings.NewReader(secret), nil, 500, wire.CodePanicked, "panicked"},
		{"a panic by nil", func(context.Context, sheaf.Block) ([]byte, error) { panic(nil) }, "POST", "/", strings.NewReader(secret), nil, 500, wire.CodePanicked, "panicked"},
		{"a panic that would abort", func(context.Context, sheaf.Block) ([]byte, error) { panic(http.ErrAbortHandler) },
			"POST", "/", strings.NewReader(secret), nil, 500, wire.CodePanicked, "panicked"},
		{"a deadline", func(ctx context.Context, _ sheaf.Block) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() },
			"POST", "/", strings.NewReader(secret), []string{wire.Deadline, "30"}, 504, wire.CodeDeadline, "did not end within"},
		{"a deadline, another error", func(ctx context.Context, _ sheaf.Block) ([]byte, error) { <-ctx.Done(); return nil, io.EOF },
			"POST", "/", strings.NewReader(secret), []string{wire.Deadline, "1"}, 504, wire.CodeDeadline, "did not end within"},
	} {
		t.Run(c.name, func(t *testing.T) {
			called := false
			f := func(ctx context.Context, b sheaf.Block) ([]byte, error) {
				called = true
				if c.f == nil {
					return nil, nil
				}
				return c.f(ctx, b)
			}
			srv, l := w.start(t, &worker.Handler{Func: f, MaxBlock: 1024})
			resp, body := send(t, c.method, srv.URL+c.path, c.body, append(c.head, wire.Job, "job-7")...)
			p := problem(t, resp, body, c.status, c.code)
			if !strings.Contains(p.Detail, c.detail) {
				t.Errorf("detail is %q, want it to say %q", p.Detail, c.detail)
			}
			if bytes.Contains(body, []byte("s3cr3t")) || bytes.Contains(body, []byte("goroutine")) || bytes.Contains(body, []byte("not a result")) {
				t.Errorf("the refusal tells too much: %s", body)
			}
			if called != (c.f != nil) {
				t.Errorf("the handler was called: %v", called)
			}
			if c.status == 405 && resp.Header.Get("Allow") != "POST" {
				t.Errorf("Allow is %q", resp.Header.Get("Allow"))
			}
			if c.status == 413 && p.Limit != 1024.0 {
				t.Errorf("limit is %v", p.Limit)
			}
			if c.f != nil && p.Job != "job-7" {
				t.Errorf("job is %q", p.Job)
			}
			if c.code == wire.CodePanicked && !strings.Contains(l.String(), "worker_test.go") {
				t.Errorf("the log has no stack: %s", l)
			}
			// The process lives, and has its next block.
			if resp, _ := send(t, http.MethodPost, srv.URL, nil, wire.Block, "x"); resp.StatusCode != 400 {
				t.Errorf("the next request got %s", resp.Status)
			}
		})
	}
}

// A body that is shorter than its length says must never reach the Func, over
// any ResponseWriter.
func TestShortBody(t *testing.T) {
	h := &worker.Handler{Func: func(_ context.Context, b sheaf.Block) ([]byte, error) {
		t.Errorf("called with %q", b.Data)
		return nil, nil
	}}
	for _, body := range []string{"", "short"} {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.ContentLength = 100
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		problem(t, w.Result(), w.Body.Bytes(), 400, wire.CodeTruncated)
	}
}

// dial sends what is given on a bare connection.
func dial(t *testing.T, url, text string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(soon))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func receive(t *testing.T, c net.Conn) (*http.Response, []byte) {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

func TestTruncated(t *testing.T) { bothWays(t, testTruncated) }

func testTruncated(t *testing.T, w way) {
	for name, text := range map[string]string{
		"no byte of ten":      "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n",
		"five bytes of ten":   "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345",
		"chunks without end":  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
		"a chunk cut":         "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123",
		"chunks badly framed": "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n12345\r\n0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			srv, _ := w.start(t, &worker.Handler{Func: func(_ context.Context, b sheaf.Block) ([]byte, error) {
				t.Errorf("called with %q", b.Data)
				return nil, nil
			}})
			c := dial(t, srv.URL, text)
			_ = c.CloseWrite()
			resp, body := receive(t, c)
			problem(t, resp, body, 400, wire.CodeTruncated)
		})
	}
}

func TestSlowUpload(t *testing.T) { bothWays(t, testSlowUpload) }

func testSlowUpload(t *testing.T, w way) {
	for name, c := range map[string]struct {
		text   string
		status int
		code   string
	}{
		"half a block":        {"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345", 408, wire.CodeSlow},
		"half a chunk":        {"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123", 408, wire.CodeSlow},
		"refused before that": {"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345", 405, wire.CodeMethod},
	} {
		t.Run(name, func(t *testing.T) {
			srv, _ := w.start(t, &worker.Handler{Func: upper, ReadTimeout: 50 * time.Millisecond})
			resp, body := receive(t, dial(t, srv.URL, c.text))
			if p := problem(t, resp, body, c.status, c.code); c.status == 408 && (!strings.Contains(p.Detail, "read_timeout") || p.Limit != "50ms") {
				t.Errorf("the refusal does not say what to change: %s", body)
			}
		})
	}
}

// The time for a block to arrive is not the time to work on it, nor does it
// count for the connection's next block.
func TestReadTimeoutEndsWithTheBlock(t *testing.T) { bothWays(t, testReadTimeoutEndsWithTheBlock) }

func testReadTimeoutEndsWithTheBlock(t *testing.T, w way) {
	srv, _ := w.start(t, &worker.Handler{ReadTimeout: 40 * time.Millisecond, Func: func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
			if string(b.Data) == "bad" {
				return nil, errors.New("bad")
			}
			return b.Data, nil
		}
	}})
	for range 2 {
		if resp, body := send(t, http.MethodPost, srv.URL, strings.NewReader("x")); resp.StatusCode != 200 {
			t.Fatalf("got %s %s", resp.Status, body)
		}
	}
	resp, body := send(t, http.MethodPost, srv.URL, strings.NewReader("bad"))
	problem(t, resp, body, 500, wire.CodeFailed)
}

// A caller who takes no answer must not keep the replica busy.
func TestSlowDownload(t *testing.T) {
	h := &worker.Handler{ReadTimeout: 50 * time.Millisecond, Func: func(context.Context, sheaf.Block) ([]byte, error) {
		return make([]byte, 64<<20), nil
	}}
	ended := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		h.ServeHTTP(w, r)
	}))
	defer srv.Close()
	dial(t, srv.URL, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
	select {
	case <-ended:
	case <-time.After(soon):
		t.Error("the handler waits for ever")
	}
}

func TestSlowDownloadShort(t *testing.T) {
	srv, _ := way("short").start(t, &worker.Handler{ReadTimeout: 50 * time.Millisecond, Func: func(context.Context, sheaf.Block) ([]byte, error) {
		return make([]byte, 64<<20), nil
	}})
	c := dial(t, srv.URL, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
	time.Sleep(300 * time.Millisecond) // is how long nobody reads
	if n, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) || n >= 64<<20 {
		t.Errorf("read %d bytes (%v), want the connection closed before the end", n, err)
	}
}

func TestCallOf(t *testing.T) { bothWays(t, testCallOf) }

func testCallOf(t *testing.T, w way) {
	var got worker.Call
	var block sheaf.Block
	srv, _ := w.start(t, &worker.Handler{Func: func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		got, block = worker.CallOf(ctx), b
		return nil, nil
	}})
	send(t, http.MethodPost, srv.URL, strings.NewReader("data"), wire.Job, "j", wire.Block, "41", wire.Attempt, "2",
		wire.To, "worker/r1", wire.Rank, "3", wire.Size, "5", wire.Epoch, "77")
	if want := (worker.Call{Job: "j", Attempt: 2, Rank: 3, Size: 5, Epoch: 77}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if block.Index != 41 || string(block.Data) != "data" {
		t.Errorf("got block %+v", block)
	}
	send(t, http.MethodPost, srv.URL, nil)
	if got != (worker.Call{}) {
		t.Errorf("a plain call is %+v", got)
	}
	if c := worker.CallOf(t.Context()); c != (worker.Call{}) {
		t.Errorf("a foreign ctx has %+v", c)
	}
}

// TestDeadline: what the caller leaves and what the replica allows, whichever
// is less, ends the handler's ctx.
func TestDeadline(t *testing.T) { bothWays(t, testDeadline) }

func testDeadline(t *testing.T, w way) {
	for _, c := range []struct {
		name        string
		left        string
		most        time.Duration
		least, want time.Duration // of what is left; 0 means no deadline
	}{
		{"none", "", 0, 0, 0},
		{"the caller's", "60000", 0, 50 * time.Second, 60 * time.Second},
		{"the replica's", "", 20 * time.Second, 15 * time.Second, 20 * time.Second},
		{"the caller's is less", "10000", 20 * time.Second, 5 * time.Second, 10 * time.Second},
		{"the replica's is less", "60000", 20 * time.Second, 15 * time.Second, 20 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			var left time.Duration
			srv, _ := w.start(t, &worker.Handler{MaxTime: c.most, Func: func(ctx context.Context, _ sheaf.Block) ([]byte, error) {
				left = 0
				if d, ok := ctx.Deadline(); ok {
					left = time.Until(d)
				}
				return nil, nil
			}})
			var head []string
			if c.left != "" {
				head = []string{wire.Deadline, c.left}
			}
			send(t, http.MethodPost, srv.URL, strings.NewReader("x"), head...)
			if left < c.least || left > c.want {
				t.Errorf("the handler has %v, want %v", left, c.want)
			}
		})
	}
	t.Run("runs while the block arrives", func(t *testing.T) {
		var left time.Duration
		srv, _ := w.start(t, &worker.Handler{Func: func(ctx context.Context, _ sheaf.Block) ([]byte, error) {
			d, _ := ctx.Deadline()
			left = time.Until(d)
			return nil, nil
		}})
		c := dial(t, srv.URL, "POST / HTTP/1.1\r\nHost: x\r\nSheaf-Deadline: 10000\r\nContent-Length: 2\r\n\r\n1")
		time.Sleep(150 * time.Millisecond) // is what the upload takes
		_, _ = io.WriteString(c, "2")
		receive(t, c)
		if left > 9900*time.Millisecond {
			t.Errorf("after an upload of 150ms the handler has %v of 10s", left)
		}
	})
}

// TestCallerLeaves: the handler's ctx ends with the caller, who may have sent a
// block or an empty one.
func TestCallerLeaves(t *testing.T) { bothWays(t, testCallerLeaves) }

func testCallerLeaves(t *testing.T, w way) {
	for name, text := range map[string]string{
		"a block":        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12345",
		"a chunked one":  "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n",
		"an empty block": "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			began, left := make(chan struct{}), make(chan error, 1)
			srv, l := w.start(t, &worker.Handler{Func: func(ctx context.Context, _ sheaf.Block) ([]byte, error) {
				close(began)
				<-ctx.Done()
				left <- ctx.Err()
				return nil, ctx.Err()
			}})
			c := dial(t, srv.URL, text)
			<-began
			_ = c.Close()
			select {
			case err := <-left:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("ctx ended by %v", err)
				}
			case <-time.After(soon):
				t.Fatal("the handler was not told that its caller left")
			}
			srv.Close()
			if s := l.String(); s != "" {
				t.Errorf("a caller who left is a line in the log: %s", s)
			}
		})
	}
}

// TestOwnData: a Func may keep and change its block, whoever comes next.
func TestOwnData(t *testing.T) { bothWays(t, testOwnData) }

func testOwnData(t *testing.T, w way) {
	var mu sync.Mutex
	var kept [][]byte
	srv, _ := w.start(t, &worker.Handler{Func: func(_ context.Context, b sheaf.Block) ([]byte, error) {
		mu.Lock()
		defer mu.Unlock()
		kept = append(kept, b.Data)
		return b.Data[:1], nil
	}})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			send(t, http.MethodPost, srv.URL, strings.NewReader(strings.Repeat(string(rune('a'+i)), 1000)))
		})
	}
	wg.Wait()
	for _, data := range kept {
		if string(data) != strings.Repeat(string(data[:1]), 1000) {
			t.Errorf("a kept block was changed: %.40q", data)
		}
	}
}

// What fills the log at Debug is cut: a caller decides what is in it.
func TestLogIsBounded(t *testing.T) { bothWays(t, testLogIsBounded) }

func testLogIsBounded(t *testing.T, w way) {
	srv, l := w.start(t, &worker.Handler{Func: upper})
	send(t, http.MethodPost, srv.URL, nil, wire.Job, strings.Repeat("j", 9999), wire.Block, strings.Repeat("9", 9999))
	if n := len(l.String()); n == 0 || n > 1000 {
		t.Errorf("a refusal writes %d bytes into the log", n)
	}
}
