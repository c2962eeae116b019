package routetest

// answers.go has the cases of answers that came whole but may not be taken for
// what they seem.

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func statuses(t *testing.T, open Open) {
	head := func(pairs ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(pairs); i += 2 {
			h.Set(pairs[i], pairs[i+1])
		}
		return h
	}
	problem := func(code string) http.Header {
		return head("Content-Type", wire.ContentType, wire.Code, code)
	}
	platform := head("X-OpenFaaS-Internal", "proxy")
	for _, c := range []struct {
		name   string
		status int
		header http.Header
		body   string
		fault  sheaf.Fault
		after  time.Duration
	}{
		{"created", 201, nil, "x", sheaf.FaultLost, 0},
		{"accepted, as by the async path", 202, nil, "", sheaf.FaultLost, 0},
		{"not modified", 304, nil, "", sheaf.FaultLost, 0},
		{"bad request", 400, nil, "no", sheaf.FaultRejected, 0},
		{"unauthorized", 401, nil, "", sheaf.FaultRejected, 0},
		{"not found", 404, nil, "no", sheaf.FaultRejected, 0},
		{"request timeout", 408, nil, "", sheaf.FaultLost, 0},
		{"too large", 413, nil, "", sheaf.FaultRejected, 0},
		{"misdirected", 421, nil, "", sheaf.FaultRefused, 0},
		{"unprocessable", 422, nil, "bad data", sheaf.FaultRejected, 0},
		{"too early", 425, nil, "", sheaf.FaultLost, 0},
		{"too many", 429, nil, "", sheaf.FaultThrottled, 0},
		{"too many, wait seconds", 429, head("Retry-After", "2"), "", sheaf.FaultThrottled, 2 * time.Second},
		{"too many, wait milliseconds", 429, head("Retry-After", "1", "Sheaf-Retry", "250"), "", sheaf.FaultThrottled, 250 * time.Millisecond},
		{"too many, wait nonsense", 429, head("Retry-After", "soon", "Sheaf-Retry", "-5"), "", sheaf.FaultThrottled, 0},
		{"handler failed", 500, nil, "boom", sheaf.FaultTask, 0},
		{"platform failed", 500, platform, "Can't reach service", sheaf.FaultLost, 0},
		{"not implemented", 501, nil, "", sheaf.FaultTask, 0},
		{"bad gateway", 502, nil, "", sheaf.FaultLost, 0},
		{"unavailable", 503, nil, "", sheaf.FaultLost, 0},
		{"unavailable, wait", 503, head("Retry-After", "3"), "", sheaf.FaultThrottled, 3 * time.Second},
		{"gateway timeout", 504, nil, "", sheaf.FaultLost, 0},
		{"block damaged", 400, problem(wire.CodeDamaged), `{"detail":"damaged"}`, sheaf.FaultLost, 0},
		{"upload truncated", 400, problem(wire.CodeTruncated), `{"detail":"cut"}`, sheaf.FaultLost, 0},
		{"block rejected", 422, problem(wire.CodeRejected), `{"detail":"bad row"}`, sheaf.FaultRejected, 0},
		{"handler's deadline", 504, problem(wire.CodeDeadline), `{"detail":"late"}`, sheaf.FaultTimeout, 0},
		{"handler panicked", 500, problem(wire.CodePanicked), `{"detail":"panicked"}`, sheaf.FaultTask, 0},
		{"draining", 503, problem(wire.CodeDraining), `{"detail":"ending"}`, sheaf.FaultThrottled, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				read(r)
				maps.Copy(w.Header(), c.header)
				w.WriteHeader(c.status)
				if c.status != http.StatusNoContent && c.status != http.StatusNotModified {
					_, _ = io.WriteString(w, c.body)
				}
			})
			route, to := open(t, srv.URL)
			ce := refused(t, route, request(to, "block"), c.fault)
			if ce.RetryAfter != c.after {
				t.Errorf("RetryAfter is %v, want %v", ce.RetryAfter, c.after)
			}
			if ce.Status != c.status {
				t.Errorf("Status is %d, want %d", ce.Status, c.status)
			}
			if ce.From != to.ID {
				t.Errorf("From is %q, want %q", ce.From, to.ID)
			}
			if strings.HasPrefix(c.body, "{") && (strings.Contains(ce.Error(), "{") || !strings.Contains(c.body, ce.Err.Error())) {
				t.Errorf("the error is %q, want the detail of %s", ce.Err, c.body)
			}
		})
	}
}

func damaged(t *testing.T, open Open) {
	for _, c := range []struct{ name, body, digest string }{
		{"another body's digest", "the answer", wire.Sum([]byte("The answer"))},
		{"one byte more", "the answer!", wire.Sum([]byte("the answer"))},
		{"empty", "", wire.Sum([]byte("the answer"))},
		{"not a digest", "the answer", "sha-256=:no:"},
		{"an empty digest", "the answer", "sha-256="},
		{"bad among unknown", "the answer", "sha-512=:eA==:, sha-256=:eA==:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				read(r)
				w.Header().Set(wire.Digest, c.digest)
				_, _ = io.WriteString(w, c.body)
			})
			route, to := open(t, srv.URL)
			refused(t, route, request(to, "x"), sheaf.FaultLost)
		})
	}
}

func unverified(t *testing.T, open Open) {
	for _, c := range []struct{ name, digest string }{
		{"no digest", ""},
		{"a digest that nobody here knows", "sha-512=:eA==:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				read(r)
				if c.digest != "" {
					w.Header().Set(wire.Digest, c.digest)
				}
				_, _ = io.WriteString(w, "plain text")
			})
			route, to := open(t, srv.URL)
			for range 2 {
				if reply := must(t, route, request(to, "x"), "plain text"); reply.Verified {
					t.Error("an answer without a digest is verified")
				}
			}
		})
	}
}

func empty(t *testing.T, open Open) {
	t.Run("without", func(t *testing.T) {
		srv := serve(t, func(_ http.ResponseWriter, r *http.Request) { read(r) })
		route, to := open(t, srv.URL)
		ce := refused(t, route, request(to, "x"), sheaf.FaultTask)
		if !errors.Is(ce, sheaf.ErrUnverified) || !strings.Contains(ce.Error(), "answer 204") {
			t.Errorf("got %v, want it to wrap ErrUnverified, and to say what to do", ce)
		}
	})
	t.Run("said by 204", func(t *testing.T) {
		digest := ""
		srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
			read(r)
			if digest != "" {
				w.Header().Set(wire.Digest, digest)
			}
			w.WriteHeader(http.StatusNoContent)
		})
		route, to := open(t, srv.URL)
		if must(t, route, request(to, "x"), "").Verified {
			t.Error("an empty answer without a digest is verified")
		}
		digest = wire.Sum([]byte("the answer"))
		refused(t, route, request(to, "x"), sheaf.FaultLost)
		digest = wire.Sum(nil)
		if !must(t, route, request(to, "x"), "").Verified {
			t.Error("an empty answer with its digest is not verified")
		}
		digest = ""
		refused(t, route, request(to, "x"), sheaf.FaultLost) // of a function whose answers carry one
	})
	t.Run("with", func(t *testing.T) {
		srv := serve(t, func(w http.ResponseWriter, r *http.Request) { read(r); answer(w, nil) })
		route, to := open(t, srv.URL)
		if !must(t, route, request(to, "x"), "").Verified {
			t.Error("an empty answer with its digest is not verified")
		}
	})
}

func staysVerified(t *testing.T, open Open) {
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if string(read(r)) == "sealed" {
			answer(w, []byte("ok"))
			return
		}
		_, _ = io.WriteString(w, "<html>an error page of somebody between")
	})
	route, to := open(t, srv.URL)
	must(t, route, request(to, "bare"), "<html>an error page of somebody between")
	must(t, route, request(to, "sealed"), "ok")
	ce := refused(t, route, request(to, "bare"), sheaf.FaultLost)
	if !errors.Is(ce, sheaf.ErrUnverified) {
		t.Errorf("got %v, want it to wrap ErrUnverified", ce)
	}
	other := request(to, "bare")
	other.Function = "another"
	other.To.Function = "another"
	if to.ID == "" { // the route's function may be part of its address
		return
	}
	must(t, route, other, "<html>an error page of somebody between")
}

func redirects(t *testing.T, open Open) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			var stolen atomic.Int64
			thief := serve(t, func(w http.ResponseWriter, r *http.Request) {
				stolen.Add(1 + int64(len(read(r))))
				answer(w, []byte("forged"))
			})
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				read(r)
				w.Header().Set("Location", thief.URL+"/elsewhere")
				w.Header().Set(wire.Digest, wire.Sum(nil))
				w.WriteHeader(status)
			})
			route, to := open(t, srv.URL)
			refused(t, route, request(to, "secret"), sheaf.FaultLost)
			if n := stolen.Load(); n != 0 {
				t.Errorf("the redirect was followed: its target saw %d requests and bytes", n)
			}
		})
	}
}

func gzipped(t *testing.T, open Open) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(bytes.Repeat([]byte("0"), 1<<20)) // into memory
	_ = z.Close()
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		read(r)
		w.Header().Set("Content-Encoding", "gzip")
		answer(w, packed.Bytes())
	})
	route, to := open(t, srv.URL)
	must(t, route, request(to, "x"), packed.String())
}

func tooLarge(t *testing.T, open Open) {
	var sent atomic.Int64
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if string(read(r)) == "length" {
			w.Header().Set("Content-Length", strconv.Itoa(MaxReply+1))
		}
		piece := make([]byte, 64<<10)
		for r.Context().Err() == nil && sent.Load() < 1<<30 {
			n, err := w.Write(piece)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	for _, framing := range []string{"length", "without end"} {
		t.Run(framing, func(t *testing.T) {
			sent.Store(0)
			route, to := open(t, srv.URL)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			refused(t, route, request(to, framing), sheaf.FaultRejected)
			runtime.ReadMemStats(&after)
			if got := after.TotalAlloc - before.TotalAlloc; got > 8*MaxReply {
				t.Errorf("refusing an answer over %d bytes took %d bytes of memory", MaxReply, got)
			}
			if n := sent.Load(); n > 8*MaxReply {
				t.Errorf("%d bytes were read of an answer that may have %d", n, MaxReply)
			}
		})
	}
}

func anotherAnswers(t *testing.T, open Open) {
	id := ""
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		read(r)
		w.Header().Set(wire.Replica, id)
		answer(w, []byte("answer"))
	})
	route, to := open(t, srv.URL)
	id = "replica-of-somebody-else"
	if to.ID == "" { // whoever answers is right, and is named
		if reply := must(t, route, request(to, "x"), "answer"); reply.From != id {
			t.Errorf("From is %q, want %q", reply.From, id)
		}
		return
	}
	refused(t, route, request(to, "x"), sheaf.FaultRefused)
	id = to.ID
	if reply := must(t, route, request(to, "x"), "answer"); reply.From != to.ID {
		t.Errorf("From is %q, want %q", reply.From, to.ID)
	}
}

func nothingListens(t *testing.T, open Open) {
	srv := httptest.NewServer(http.NotFoundHandler())
	srv.Close()
	route, to := open(t, srv.URL)
	// Where a front stands between, it is the front that says so, by 502.
	faults := []sheaf.Fault{sheaf.FaultRefused}
	if to.ID == "" {
		faults = append(faults, sheaf.FaultLost)
	}
	begun := time.Now()
	refused(t, route, request(to, "x"), faults...)
	if took := time.Since(begun); took > soon {
		t.Errorf("it took %v to see that nobody listens", took)
	}
}
