package routetest

// calls.go has the cases of calls that go well, or that the caller ends.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func ownAnswer(t *testing.T, open Open) {
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		answer(w, fmt.Appendf(nil, "%s of block %s", read(r), r.Header.Get(wire.Block)))
	})
	route, to := open(t, srv.URL)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			req := request(to, "answer "+strconv.Itoa(i))
			req.Index = i
			reply, err := call(t, route, req)
			if err != nil {
				t.Errorf("call %d: %v", i, err)
				return
			}
			if want := fmt.Sprintf("answer %d of block %d", i, i); string(reply.Body) != want || !reply.Verified {
				t.Errorf("call %d got %q (verified: %v), want %q", i, reply.Body, reply.Verified, want)
			}
		})
	}
	wg.Wait()
}

func envelope(t *testing.T, open Open) {
	var seen http.Header
	var length int64
	var method string
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		seen, length, method = r.Header.Clone(), r.ContentLength, r.Method
		answer(w, read(r))
	})
	route, to := open(t, srv.URL)
	for _, body := range []string{"a block", ""} {
		req := request(to, body)
		req.Job, req.Index, req.Attempt, req.Deadline = "job-7", 41, 3, time.Now().Add(10*time.Second)
		if to.ID != "" {
			req.Rank, req.Size, req.Epoch = 2, 5, 77
		}
		reply := must(t, route, req, body)
		if !reply.Verified {
			t.Error("the reply is not verified")
		}
		if string(req.Body) != body {
			t.Errorf("the route changed the body to %q", req.Body)
		}
		want := map[string]string{
			wire.Job: "job-7", wire.Block: "41", wire.Attempt: "3", wire.Digest: wire.Sum([]byte(body)),
			wire.To: "", wire.Rank: "", wire.Size: "", wire.Epoch: "",
		}
		if to.ID != "" {
			want[wire.To], want[wire.Rank], want[wire.Size], want[wire.Epoch] = Function+"/"+to.ID, "2", "5", "77"
		}
		for key, value := range want {
			if got := seen.Get(key); got != value {
				t.Errorf("body %q: header %s is %q, want %q", body, key, got, value)
			}
		}
		if ms, err := strconv.Atoi(seen.Get(wire.Deadline)); err != nil || ms < 5000 || ms > 10000 {
			t.Errorf("body %q: header %s is %q, want about 10000", body, wire.Deadline, seen.Get(wire.Deadline))
		}
		if length != int64(len(body)) || method != http.MethodPost {
			t.Errorf("body %q: %s of %d bytes, want POST of %d", body, method, length, len(body))
		}
		if enc := seen.Get("Accept-Encoding"); enc != "" {
			t.Errorf("body %q: Accept-Encoding is %q, want none", body, enc)
		}
	}
}

func cancelReaches(t *testing.T, open Open) {
	began, left := make(chan struct{}), make(chan struct{})
	srv := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		read(r)
		close(began)
		<-r.Context().Done()
		close(left)
	})
	route, to := open(t, srv.URL)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := route.Call(ctx, request(to, "x"))
		ended <- err
	}()
	within(t, "the function is called", began)
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("call returned %v, want it to wrap context.Canceled", err)
		}
		if ce, ok := errors.AsType[*sheaf.CallError](err); ok && ce.Fault == sheaf.FaultRefused {
			t.Errorf("a cancelled call blames the replica: %v", err)
		}
	case <-time.After(soon):
		t.Fatal("call did not return after its ctx was cancelled")
	}
	within(t, "the function sees that the caller left", left)
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(soon):
		t.Fatalf("not within %v: %s", soon, what)
	}
}

func deadline(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		sent string // before the function hangs
	}{
		{"before the answer", ""},
		{"in the answer", "half"},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
				read(r)
				if c.sent != "" {
					w.Header().Set("Content-Length", "1000")
					_, _ = w.Write([]byte(c.sent))
					_ = http.NewResponseController(w).Flush()
				}
				<-r.Context().Done()
			})
			route, to := open(t, srv.URL)
			req := request(to, "x")
			begun := time.Now()
			req.Deadline = begun.Add(100 * time.Millisecond)
			refused(t, route, req, sheaf.FaultTimeout)
			if took := time.Since(begun); took < 90*time.Millisecond || took > soon {
				t.Errorf("call took %v, want about 100ms", took)
			}
		})
	}
}

func large(t *testing.T, open Open) {
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		b := read(r)
		if _, err := wire.Check(r.Header, b); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if r.Header.Get(wire.Block) == "1" { // the length is not told
			w.Header().Set(wire.Digest, wire.Sum(b))
			_, _ = w.Write(b)
			return
		}
		answer(w, b)
	})
	route, to := open(t, srv.URL)
	body := strings.Repeat("sixteen bytes. \n", MaxReply/16)
	for i, framing := range []string{"length", "chunked"} {
		t.Run(framing, func(t *testing.T) {
			req := request(to, body)
			req.Index = i
			if !must(t, route, req, body).Verified {
				t.Error("the reply is not verified")
			}
		})
	}
}

func keptAlive(t *testing.T, open Open) {
	var opened, calls atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The answers are short, so that a front sends them only when it has let
		// its own connection go.
		b := read(r)[:10]
		switch calls.Add(1) % 5 { // no kind of answer may cost a connection
		case 1:
			wire.Refuse(http.StatusTooManyRequests, wire.CodeBusy, "busy").After(time.Second).Write(w)
		case 2:
			http.Error(w, strings.Repeat("bad ", 300), http.StatusInternalServerError)
		case 3:
			w.Header().Set(wire.Digest, wire.Sum(b))
			_, _ = w.Write(b) // its length is not told: chunked
			_ = http.NewResponseController(w).Flush()
		default:
			answer(w, b)
		}
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	route, to := open(t, srv.URL)
	body := bytes.Repeat([]byte("block\n"), 20000)
	good := 0
	for range 100 {
		if _, err := call(t, route, request(to, string(body))); err == nil {
			good++
		}
	}
	if good != 60 || calls.Load() != 100 {
		t.Errorf("%d good replies of %d calls, want 60 of 100", good, calls.Load())
	}
	most := int64(1)
	if to.ID == "" {
		// The front's client gives a connection up when it has not heard within
		// 50 ms that the request was written, which happens on a busy machine. A
		// kind of answer that costs a connection costs at least 20.
		most = 10
	}
	if n := opened.Load(); n < 1 || n > most {
		t.Errorf("100 calls one after another took %d connections, want %d at most", n, most)
	}
}
