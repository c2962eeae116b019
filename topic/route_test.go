package topic_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/routetest"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startNATS starts a server that takes messages of the given length; 0 means
// its default of 1 MiB.
func startNATS(t testing.TB, maxPayload int32) string {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true, MaxPayload: maxPayload})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("NATS did not start")
	}
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	return s.ClientURL()
}

func connect(t testing.TB, url string) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url, nats.MaxReconnects(-1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// front plays a gateway that passes /function/NAME on to url.
func front(t testing.TB, url string) string {
	t.Helper()
	client := wire.NewHTTP(256)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/function/") {
			http.NotFound(w, r)
			return
		}
		hr, err := http.NewRequestWithContext(r.Context(), http.MethodPost, url, r.Body)
		if err != nil {
			panic(err)
		}
		hr.Header, hr.ContentLength = r.Header.Clone(), r.ContentLength
		resp, err := client.Do(hr)
		if err != nil {
			http.Error(w, "no function", http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		maps.Copy(w.Header(), resp.Header)
		w.WriteHeader(resp.StatusCode)
		if _, err := io.Copy(w, resp.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(client.CloseIdleConnections)
	return srv.URL
}

// serve runs a server of the route.
func serve(t testing.TB, url, gateway string, change ...func(*topic.Server)) (stop func()) {
	t.Helper()
	nc := connect(t, url)
	s := &topic.Server{Conn: nc, Gateway: gateway, Grace: 10 * time.Second}
	for _, f := range change {
		f(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("the server of the route did not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

func route(t testing.TB, url string) *topic.Route {
	t.Helper()
	r, err := topic.New(connect(t, url), routetest.MaxReply)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// wait waits until somebody takes calls.
func wait(t testing.TB, url string) {
	t.Helper()
	nc := connect(t, url)
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		_, err := nc.Request(topic.Calls+"x", nil, 5*time.Second)
		if !errors.Is(err, nats.ErrNoResponders) {
			return
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatal("nobody takes calls")
		}
	}
}

func TestRoute(t *testing.T) {
	for name, payload := range map[string]int32{"parts of 1 MiB": 0, "parts of 4 KiB": 20 << 10} {
		t.Run(name, func(t *testing.T) {
			routetest.Run(t, func(t *testing.T, to string) (sheaf.Route, sheaf.Replica) {
				url := startNATS(t, payload)
				serve(t, url, front(t, to))
				wait(t, url)
				return route(t, url), sheaf.Replica{}
			})
		})
	}
}

func TestControl02OnlySignedAnswers(t *testing.T) {
	routetest.Signed(t, func(t *testing.T, to string, s *wire.Signer) (sheaf.Route, sheaf.Replica) {
		url := startNATS(t, 0)
		serve(t, url, front(t, to))
		wait(t, url)
		r := route(t, url)
		r.Sign(s)
		return r, sheaf.Replica{}
	})
}

func TestNobodyTakesBlocks(t *testing.T) {
	r := route(t, startNATS(t, 0))
	begun := time.Now()
	_, err := r.Call(t.Context(), &sheaf.Request{Function: "worker"})
	ce, ok := errors.AsType[*sheaf.CallError](err)
	if !ok || ce.Fault != sheaf.FaultLost || !strings.Contains(err.Error(), "no connector") || time.Since(begun) > 5*time.Second {
		t.Errorf("got %v after %v", err, time.Since(begun))
	}
	for _, name := range []string{"", "a b", "*", "worker.>", "a/b"} {
		_, err := r.Call(t.Context(), &sheaf.Request{Function: name})
		if ce, ok := errors.AsType[*sheaf.CallError](err); !ok || ce.Fault != sheaf.FaultRejected {
			t.Errorf("function %q: %v", name, err)
		}
	}
	if _, err := r.Call(t.Context(), &sheaf.Request{Function: "worker", To: sheaf.Replica{ID: "r1"}}); !errors.Is(err, sheaf.ErrNotAddressable) {
		t.Errorf("a replica: %v", err)
	}
}

// echo answers with the block.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	w.Header().Set(wire.Digest, wire.Sum(body))
	_, _ = w.Write(body)
}

// Many at once, one of two servers leaves meanwhile, and a third one stands in
// for it: no call is answered wrong, and those that break off can be made again.
func TestServersComeAndGo(t *testing.T) {
	fn := httptest.NewServer(http.HandlerFunc(echo))
	t.Cleanup(fn.Close)
	url := startNATS(t, 64<<10)
	gateway := front(t, fn.URL)
	stop := serve(t, url, gateway)
	serve(t, url, gateway)
	wait(t, url)
	r := route(t, url)
	var wg sync.WaitGroup
	var done atomic.Int64
	for i := range 16 {
		wg.Go(func() {
			for j := range 20 {
				body := strings.Repeat(fmt.Sprint(i, " ", j, "\n"), 1+i*j*100)
				reply, err := r.Call(t.Context(), &sheaf.Request{Job: "j", Function: "worker", Index: i, Attempt: 1, Body: []byte(body)})
				if err != nil || string(reply.Body) != body || !reply.Verified {
					t.Errorf("call %d of %d: %v", j, i, err)
				}
				done.Add(1)
			}
		})
	}
	for done.Load() < 100 {
		time.Sleep(time.Millisecond)
	}
	stop() // which drains
	serve(t, url, gateway)
	wg.Wait()
}

func TestBusy(t *testing.T) {
	began, open := make(chan struct{}), make(chan struct{})
	fn := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(began)
		<-open
		echo(w, r)
	}))
	t.Cleanup(fn.Close)
	url := startNATS(t, 0)
	serve(t, url, front(t, fn.URL), func(s *topic.Server) { s.Limit = 1 })
	wait(t, url)
	r := route(t, url)
	first := make(chan error, 1)
	go func() {
		_, err := r.Call(t.Context(), &sheaf.Request{Function: "worker", Body: []byte("x")})
		first <- err
	}()
	<-began
	_, err := r.Call(t.Context(), &sheaf.Request{Function: "worker", Body: []byte("x")})
	if ce, ok := errors.AsType[*sheaf.CallError](err); !ok || ce.Fault != sheaf.FaultThrottled || ce.RetryAfter != 50*time.Millisecond {
		t.Errorf("got %v, want to be told to wait", err)
	}
	close(open)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func BenchmarkCall(b *testing.B) {
	fn := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = "/"
		echo(w, r)
	}))
	defer fn.Close()
	for _, size := range []int{1 << 10, 256 << 10, 4 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			url := startNATS(b, 0)
			serve(b, url, fn.URL)
			wait(b, url)
			r := route(b, url)
			body := make([]byte, size)
			b.SetBytes(int64(2 * size))
			for b.Loop() {
				if _, err := r.Call(b.Context(), &sheaf.Request{Function: "worker", Body: body}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
