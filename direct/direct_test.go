package direct_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/internal/routetest"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRoute(t *testing.T) {
	routetest.Run(t, func(t *testing.T, url string) (sheaf.Route, sheaf.Replica) {
		r := direct.New(routetest.MaxReply)
		t.Cleanup(r.Close)
		return r, sheaf.Replica{Function: routetest.Function, ID: "r1", URL: url, State: sheaf.Ready}
	})
}

func TestNotAddressable(t *testing.T) {
	for name, to := range map[string]sheaf.Replica{
		"no replica": {},
		"no address": {ID: "r1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := direct.New(0).Call(t.Context(), &sheaf.Request{Function: "worker", To: to})
			if !errors.Is(err, sheaf.ErrNotAddressable) {
				t.Errorf("got %v, want ErrNotAddressable", err)
			}
		})
	}
}

// Where a replica can not be reached at all nothing was sent, so the block may
// go elsewhere at once.
func TestUnreachableAddresses(t *testing.T) {
	for name, url := range map[string]string{
		"not a URL":      "http://[::1",
		"a bad port":     "http://127.0.0.1:99999",
		"an unknown TLD": "http://replica.invalid:8080",
	} {
		t.Run(name, func(t *testing.T) {
			r := direct.New(0)
			defer r.Close()
			_, err := r.Call(t.Context(), &sheaf.Request{Function: "worker", To: sheaf.Replica{ID: "r1", URL: url}})
			ce, ok := errors.AsType[*sheaf.CallError](err)
			if !ok || ce.Fault != sheaf.FaultRefused || ce.From != "r1" {
				t.Errorf("got %v, want FaultRefused by r1", err)
			}
		})
	}
}

// A view may name the base with or without its slash.
func TestPath(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.URL.Path)
	}))
	defer srv.Close()
	r := direct.New(0)
	defer r.Close()
	for base, want := range map[string]string{"": "/", "/": "/", "/under": "/under/", "/under/": "/under/"} {
		reply, err := r.Call(t.Context(), &sheaf.Request{To: sheaf.Replica{ID: "r1", URL: srv.URL + base}})
		if err != nil || string(reply.Body) != want {
			t.Errorf("base %q: got %v (%v), want %q", base, reply, err, want)
		}
	}
}

func BenchmarkCall(b *testing.B) {
	body := make([]byte, 1<<20)
	sum := wire.Sum(body)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, _ := wire.ReadBody(r.Body, r.ContentLength, 1<<30)
		w.Header().Set(wire.Digest, sum)
		_, _ = w.Write(got)
	}))
	defer srv.Close()
	r := direct.New(0)
	defer r.Close()
	b.SetBytes(int64(2 * len(body)))
	for b.Loop() {
		req := &sheaf.Request{To: sheaf.Replica{ID: "r1", URL: srv.URL}, Body: body, Deadline: time.Now().Add(time.Minute)}
		if _, err := r.Call(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}

func TestControl02OnlySignedAnswers(t *testing.T) {
	routetest.Signed(t, func(t *testing.T, url string, s *wire.Signer) (sheaf.Route, sheaf.Replica) {
		r := direct.New(routetest.MaxReply)
		r.Sign(s)
		t.Cleanup(r.Close)
		return r, sheaf.Replica{Function: routetest.Function, ID: "r1", URL: url, State: sheaf.Ready}
	})
}
