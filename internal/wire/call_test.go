package wire_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// The whole of Post's contract is in package routetest. Here is what a route's
// caller does not see.

func caller(t *testing.T) *wire.Caller {
	c := &wire.Caller{HTTP: wire.NewHTTP(4)}
	t.Cleanup(c.HTTP.CloseIdleConnections)
	return c
}

func TestPostRetryAfter(t *testing.T) {
	in := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	for _, c := range []struct {
		name        string
		after, ours string
		least, most time.Duration
	}{
		{"unsaid", "", "", 0, 0},
		{"seconds", "7", "", 7 * time.Second, 7 * time.Second},
		{"zero", "0", "", 0, 0},
		{"negative", "-7", "", 0, 0},
		{"more than an int32", "99999999999", "", 0, 0},
		{"a date", in(time.Minute), "", 50 * time.Second, time.Minute},
		{"a date that is over", in(-time.Hour), "", 0, 0},
		{"a word", "later", "", 0, 0},
		{"ours alone", "", "50", 50 * time.Millisecond, 50 * time.Millisecond},
		{"ours is finer", "1", "50", 50 * time.Millisecond, 50 * time.Millisecond},
		{"ours is nonsense", "2", "x", 2 * time.Second, 2 * time.Second},
		{"ours is zero", "2", "0", 2 * time.Second, 2 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for key, value := range map[string]string{"Retry-After": c.after, wire.RetryMS: c.ours} {
					if value != "" {
						w.Header().Set(key, value)
					}
				}
				w.WriteHeader(http.StatusTooManyRequests)
			}))
			defer srv.Close()
			_, err := caller(t).Post(t.Context(), srv.URL, &sheaf.Request{})
			ce, ok := errors.AsType[*sheaf.CallError](err)
			if !ok || ce.Fault != sheaf.FaultThrottled || ce.RetryAfter < c.least || ce.RetryAfter > c.most {
				t.Errorf("got %v after %v, want from %v to %v", err, ce.RetryAfter, c.least, c.most)
			}
		})
	}
}

// What a refusal says ends up in logs and on terminals.
func TestPostReason(t *testing.T) {
	for _, c := range []struct {
		name, kind, body string
		want             string
	}{
		{"a sentence", wire.ContentType, `{"detail":"row 7 has no id, \"x\" is not one: é"}`, `row 7 has no id, "x" is not one: é`},
		{"lines", wire.ContentType, `{"detail":"one\ntwo"}`, `"one\ntwo"`},
		{"a steered terminal", wire.ContentType, `{"detail":"\u001b[2Jgone \u202edlrow"}`, `"\x1b[2Jgone \u202edlrow"`},
		{"with a charset", wire.ContentType + "; charset=utf-8", `{"detail":"no"}`, "no"},
		{"no detail", wire.ContentType, `{"title":"no"}`, `"{\"title\":\"no\"}"`},
		{"cut JSON", wire.ContentType, `{"detail":"no`, `"{\"detail\":\"no"`},
		{"a detail of the greatest length", wire.ContentType, `{"detail":"` + strings.Repeat(`\u0001`, 2048) + `"}`, `"` + strings.Repeat(`\x01`, 2048) + `"`},
		{"text", "text/plain", "  first line\x1b[2J\nsecond line\n", `"first line\x1b[2J"`},
		{"nothing", "text/plain", "", "Bad Request"},
		{"long", "text/plain", strings.Repeat("x", 1<<20), `"` + strings.Repeat("x", 197) + `..."`},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", c.kind)
				w.WriteHeader(http.StatusBadRequest)
				_, _ = io.WriteString(w, c.body)
			}))
			defer srv.Close()
			_, err := caller(t).Post(t.Context(), srv.URL, &sheaf.Request{})
			ce, ok := errors.AsType[*sheaf.CallError](err)
			if !ok || ce.Err.Error() != c.want {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
}

// No proxy of the environment, no cookie and no password in an error.
func TestPostKeepsToItself(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Cookie") != "" {
			t.Error("a cookie was sent back")
		}
		http.SetCookie(w, &http.Cookie{Name: "a", Value: "b"})
		_, _ = io.WriteString(w, "ok")
	}))
	c := caller(t)
	for range 2 {
		if _, err := c.Post(t.Context(), srv.URL, &sheaf.Request{}); err != nil {
			t.Fatal(err)
		}
	}
	if p := c.HTTP.Transport.(*http.Transport).Proxy; p != nil {
		t.Error("the transport asks the environment for a proxy")
	}
	srv.Close()
	_, err := c.Post(t.Context(), strings.Replace(srv.URL, "http://", "http://user:secret@", 1), &sheaf.Request{})
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v, want an error without the password", err)
	}
}

// A call that is cancelled while it connects does not speak against the
// replica: the scheduler would leave a refusing one out.
func TestPostEndedWhileDialling(t *testing.T) {
	for _, c := range []struct {
		name  string
		ctx   func() (context.Context, context.CancelFunc)
		fault sheaf.Fault
	}{
		{"cancelled", func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx, cancel
		}, sheaf.FaultLost},
		{"too late", func() (context.Context, context.CancelFunc) {
			return context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
		}, sheaf.FaultTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := c.ctx()
			defer cancel()
			_, err := caller(t).Post(ctx, "http://127.0.0.1:1", &sheaf.Request{})
			ce, ok := errors.AsType[*sheaf.CallError](err)
			if !ok || ce.Fault != c.fault {
				t.Errorf("got %v, want the fault %v", err, c.fault)
			}
		})
	}
}

func TestReadBody(t *testing.T) {
	const limit = 5 << 20
	body := func(n int) string { return strings.Repeat("0123456789abcdef", n/16+1)[:n] }
	for _, c := range []struct {
		name string
		sent int
		said int64
		want int
		err  error
	}{
		{"nothing", 0, 0, 0, nil},
		{"nothing, unsaid", 0, -1, 0, nil},
		{"a little", 10, 10, 10, nil},
		{"a little, unsaid", 10, -1, 10, nil},
		{"a first step", 4096, -1, 4096, nil},
		{"1 MiB", 1 << 20, 1 << 20, 1 << 20, nil},
		{"3 MiB and 1 byte", 3<<20 + 1, 3<<20 + 1, 3<<20 + 1, nil},
		{"3 MiB and 1 byte, unsaid", 3<<20 + 1, -1, 3<<20 + 1, nil},
		{"the limit", limit, limit, limit, nil},
		{"the limit, unsaid", limit, -1, limit, nil},
		{"over the limit", limit + 100, limit + 100, limit + 1, nil},
		{"over the limit, unsaid", limit + 100, -1, limit + 1, nil},
		{"less than said", 10, 11, 10, io.ErrUnexpectedEOF},
		{"nothing of what was said", 0, 11, 0, io.ErrUnexpectedEOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(body(c.sent)), iotest.DataErrReader(strings.NewReader(body(c.sent))), iotest.HalfReader(strings.NewReader(body(c.sent)))} {
				got, err := wire.ReadBody(r, c.said, limit)
				if string(got) != body(c.want) || !errors.Is(err, c.err) {
					t.Errorf("%T: got %d bytes (%v), want %d (%v)", r, len(got), err, c.want, c.err)
				}
			}
		})
	}
	t.Run("a claim takes no memory", func(t *testing.T) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := wire.ReadBody(strings.NewReader("little"), 1<<30, 1<<31); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
			t.Errorf("it took %s bytes", strconv.FormatUint(n, 10))
		}
	})
}
