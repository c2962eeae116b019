package gateway_test

import (
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/internal/routetest"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, url string) sheaf.Route {
	r := gateway.NewRoute(url, routetest.MaxReply)
	t.Cleanup(r.Close)
	return r
}

// TestRoute has the function behind a front, as a gateway is one.
func TestRoute(t *testing.T) {
	routetest.Run(t, func(t *testing.T, fn string) (sheaf.Route, sheaf.Replica) {
		return open(t, front(t, fn)), sheaf.Replica{}
	})
}

// TestRouteBare has the function in the place of the gateway: what the function
// does to its connection, the gateway does here.
func TestRouteBare(t *testing.T) {
	routetest.Run(t, func(t *testing.T, fn string) (sheaf.Route, sheaf.Replica) {
		return open(t, fn), sheaf.Replica{}
	})
}

func TestControl02OnlySignedAnswers(t *testing.T) {
	routetest.Signed(t, func(t *testing.T, fn string, s *wire.Signer) (sheaf.Route, sheaf.Replica) {
		r := gateway.NewRoute(front(t, fn), routetest.MaxReply)
		r.Sign(s)
		t.Cleanup(r.Close)
		return r, sheaf.Replica{}
	})
}

// front is a gateway that passes /function/worker on to fn.
func front(t *testing.T, fn string) string {
	t.Helper()
	target, err := url.Parse(fn)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 16}
	proxy := http.StripPrefix("/function/"+routetest.Function, &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0),
	})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Otherwise the server closes the request's body as soon as the answer
		// begins, the transport may still be about to see the end of that body,
		// and cuts the connection to the function in the midst of its answer.
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		proxy.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(func() {
		srv.Close()
		transport.CloseIdleConnections()
	})
	return srv.URL
}

func TestNotAddressable(t *testing.T) {
	_, err := gateway.NewRoute("http://127.0.0.1:1", 0).Call(t.Context(),
		&sheaf.Request{Function: "worker", To: sheaf.Replica{ID: "r1", URL: "http://127.0.0.1:1"}})
	if !errors.Is(err, sheaf.ErrNotAddressable) {
		t.Errorf("got %v, want ErrNotAddressable", err)
	}
}

func TestNoGateway(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	srv.Close()
	for name, base := range map[string]string{"nothing listens": srv.URL, "not a URL": "http://[::1"} {
		t.Run(name, func(t *testing.T) {
			_, err := open(t, base).Call(t.Context(), &sheaf.Request{Function: "worker", Deadline: time.Now().Add(time.Second)})
			ce, ok := errors.AsType[*sheaf.CallError](err)
			if !ok || ce.Fault != sheaf.FaultRefused {
				t.Errorf("got %v, want FaultRefused", err)
			}
		})
	}
}

// TestPath: a function's name is one segment of the path, whatever is in it.
func TestPath(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.RequestURI)
	}))
	defer srv.Close()
	for function, want := range map[string]string{
		"worker":             "/function/worker",
		"worker.openfaas":    "/function/worker.openfaas",
		"w/../../system/x":   "/function/w%2F..%2F..%2Fsystem%2Fx",
		"w?x=1#y":            "/function/w%3Fx=1%23y",
		"w HTTP/1.1\r\nA: b": "", // it stands in a header, too, and is refused
	} {
		for _, base := range []string{srv.URL, srv.URL + "/"} {
			reply, err := open(t, base).Call(t.Context(), &sheaf.Request{Function: function, Body: []byte("x")})
			if ce, ok := errors.AsType[*sheaf.CallError](err); want == "" && ok && ce.Fault == sheaf.FaultRejected {
				continue
			}
			if err != nil {
				t.Errorf("function %q: %v", function, err)
			} else if got := string(reply.Body); got != want {
				t.Errorf("function %q was called at %s, want %s", function, got, want)
			}
		}
	}
}

// TestPlatformSpeaks: what the platform says when it has no function to ask is
// not the function's failure.
func TestPlatformSpeaks(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-OpenFaaS-Internal", "faas-netes")
		http.Error(w, "Can't reach service for: worker.", http.StatusInternalServerError)
	}))
	defer srv.Close()
	_, err := open(t, srv.URL).Call(t.Context(), &sheaf.Request{Function: "worker"})
	ce, ok := errors.AsType[*sheaf.CallError](err)
	if !ok || ce.Fault != sheaf.FaultLost || !strings.Contains(ce.Error(), "Can't reach service") {
		t.Errorf("got %v, want FaultLost with what the platform said", err)
	}
}
