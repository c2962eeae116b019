package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/gateway"
)

// provider imitates a provider's API, and writes down what it was asked.
type provider struct {
	*httptest.Server
	mu    sync.Mutex // guards asked
	asked []string
}

// newProvider answers each "METHOD /path" by the handler named so.
func newProvider(t *testing.T, answers map[string]http.HandlerFunc) *provider {
	t.Helper()
	p := &provider{}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // what came is what is compared
		p.mu.Lock()
		p.asked = append(p.asked, strings.TrimSpace(r.Method+" "+r.RequestURI+" "+string(body)))
		p.mu.Unlock()
		if h := answers[r.Method+" "+r.URL.Path]; h != nil {
			h(w, r)
			return
		}
		http.NotFound(w, r)
	}))
	t.Cleanup(p.Close)
	return p
}

func (p *provider) client(t *testing.T) *gateway.Client {
	t.Helper()
	c, err := gateway.NewClient(p.URL, "admin", "pass word")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func (p *provider) requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.asked)
}

func say(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func TestNewClientRefuses(t *testing.T) {
	for name, url := range map[string]string{
		"empty":       "",
		"no scheme":   "127.0.0.1:8080",
		"a path":      "/system",
		"no host":     "http://",
		"file":        "file:///etc/passwd",
		"broken":      "http://[::1",
		"unix socket": "unix:///run/faas.sock",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := gateway.NewClient(url, "", ""); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", url)) {
				t.Errorf("got %v, want an error that names %q", err, url)
			}
		})
	}
}

func TestFunctions(t *testing.T) {
	for _, c := range []struct {
		name   string
		status int
		body   string
		want   []string // nil when it must fail
		says   string
	}{
		{"two", 200, `[{"name":"a","replicas":2,"availableReplicas":1},{"name":"b"}]`, []string{"a 2 1", "b 0 0"}, ""},
		{"none", 200, `[]`, []string{}, ""},
		{"null", 200, `null`, []string{}, ""},
		{"unauthorized", 401, `unauthorized`, nil, "401"},
		{"failing with an empty list", 500, `[]`, nil, "500"},
		{"failing with null", 503, `null`, nil, "503"},
		{"a page", 200, `<html>hello`, nil, "invalid character"},
		{"cut", 200, `[{"name":"a"},`, nil, "unexpected"},
		{"an object", 200, `{"error":"no"}`, nil, "cannot unmarshal"},
		{"not there", 404, "404 page not found", nil, "404"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newProvider(t, map[string]http.HandlerFunc{"GET /system/functions": say(c.status, c.body)})
			list, err := p.client(t).Functions(t.Context())
			if c.want == nil {
				if err == nil || !strings.HasPrefix(err.Error(), "list functions: ") || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v (%v), want an error that says %q", list, err, c.says)
				}
				if errors.Is(err, gateway.ErrNoAddresses) {
					t.Errorf("%v: nobody asked for addresses", err)
				}
				return
			}
			got := []string{}
			for _, f := range list {
				got = append(got, fmt.Sprint(f.Name, " ", f.Replicas, " ", f.AvailableReplicas))
			}
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("got %q (%v), want %q", got, err, c.want)
			}
		})
	}
}

func TestDeploy(t *testing.T) {
	for _, c := range []struct {
		name      string
		put, post int // status
		asked     string
		ok        bool
	}{
		{"changes what is there", 202, 0, "PUT", true},
		{"makes what is not", 404, 202, "PUT POST", true},
		{"cannot change", 500, 202, "PUT", false},
		{"cannot make", 404, 400, "PUT POST", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newProvider(t, map[string]http.HandlerFunc{
				"PUT /system/functions":  say(c.put, "put said"),
				"POST /system/functions": say(c.post, "post said"),
			})
			err := p.client(t).Deploy(t.Context(), types.FunctionDeployment{Service: "worker", Image: "sheaf/worker"})
			if (err == nil) != c.ok {
				t.Errorf("got %v", err)
			}
			if err != nil && !strings.HasPrefix(err.Error(), "deploy worker: ") {
				t.Errorf("got %q, want what was being done", err)
			}
			var methods []string
			for _, r := range p.requests() {
				method, rest, _ := strings.Cut(r, " /system/functions ")
				methods = append(methods, method)
				var spec types.FunctionDeployment
				if err := json.Unmarshal([]byte(rest), &spec); err != nil || spec.Service != "worker" {
					t.Errorf("%s carried %q", method, rest)
				}
			}
			if got := strings.Join(methods, " "); got != c.asked {
				t.Errorf("asked %s, want %s", got, c.asked)
			}
		})
	}
}

func TestScale(t *testing.T) {
	p := newProvider(t, map[string]http.HandlerFunc{
		"POST /system/scale-function/worker": say(202, ""),
		"POST /system/scale-function/broken": say(500, "no room"),
	})
	c := p.client(t)
	for _, n := range []int{4, -1} {
		if err := c.Scale(t.Context(), "worker", n); err != nil {
			t.Fatal(err)
		}
	}
	var req types.ScaleServiceRequest
	for i, want := range []uint64{4, 0} {
		_, body, _ := strings.Cut(p.requests()[i], "{")
		if err := json.Unmarshal([]byte("{"+body), &req); err != nil || req.Replicas != want || req.ServiceName != "worker" {
			t.Errorf("asked %s, want %d replicas of worker", p.requests()[i], want)
		}
	}
	for function, says := range map[string]string{"broken": "no room", "unknown": "not found"} {
		err := c.Scale(t.Context(), function, 2)
		if err == nil || !strings.HasPrefix(err.Error(), "scale "+function+" to 2: ") || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want an error that says %q", err, says)
		}
	}
}

// views collects what a stream yields, up to the first error.
func views(ctx context.Context, c *gateway.Client) (got []sheaf.View, err error) {
	for v, err := range c.Replicas(ctx) {
		if err != nil {
			return got, err
		}
		got = append(got, v)
	}
	return got, nil
}

func stream(lines ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for _, l := range lines {
			_, _ = io.WriteString(w, l)
			_ = http.NewResponseController(w).Flush()
		}
	}
}

func TestReplicas(t *testing.T) {
	const one = `{"function":"worker.openfaas-fn","desired":2,"replicas":[{"id":"r1","url":"http://127.0.0.1:1","state":"ready"}]}` + "\n"
	const beat = `{"function":"","desired":0,"replicas":null}` + "\n"
	const gone = `{"function":"worker.openfaas-fn","desired":-1,"replicas":null}` + "\n"
	for _, c := range []struct {
		name  string
		says  http.HandlerFunc
		views int
		err   error  // what it wraps
		text  string // or says
	}{
		{"changes, a heartbeat, gone, end", stream(one, beat, gone), 3, io.ErrUnexpectedEOF, ""},
		{"a line in two parts", stream(one[:20], one[20:]), 1, io.ErrUnexpectedEOF, ""},
		{"a cut line", stream(one, one[:20]), 1, nil, "unexpected end of JSON"},
		{"a page", stream("<html>\n"), 0, nil, "invalid character"},
		{"not there", nil, 0, gateway.ErrNoAddresses, "404"},
		{"failing", say(500, "boom\nbang"), 0, nil, `500 Internal Server Error: "boom\nbang"`},
		{"broken off", func(w http.ResponseWriter, r *http.Request) {
			stream(one)(w, r)
			panic(http.ErrAbortHandler)
		}, 1, io.ErrUnexpectedEOF, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			answers := map[string]http.HandlerFunc{}
			if c.says != nil {
				answers["GET /system/replicas"] = c.says
			}
			p := newProvider(t, answers)
			got, err := views(t.Context(), p.client(t))
			if len(got) != c.views {
				t.Errorf("got %d views, want %d", len(got), c.views)
			}
			if err == nil || c.err != nil && !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v %s", err, c.err, c.text)
			}
			if len(got) > 0 && (got[0].Function != "worker.openfaas-fn" || got[0].Replicas[0].URL != "http://127.0.0.1:1" || got[0].Replicas[0].State != sheaf.Ready) {
				t.Errorf("got %+v", got[0])
			}
			if got := p.requests(); !slices.Equal(got, []string{"GET /system/replicas?watch=true"}) {
				t.Errorf("asked %q", got)
			}
		})
	}
}

func TestReplicasSilence(t *testing.T) {
	for name, says := range map[string]http.HandlerFunc{
		"no answer":    func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"after a line": func(w http.ResponseWriter, r *http.Request) { stream("{}\n")(w, r); <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			c := newProvider(t, map[string]http.HandlerFunc{"GET /system/replicas": says}).client(t)
			c.SetSilence(50 * time.Millisecond)
			_, err := views(t.Context(), c)
			// The caller must not take it for the end of its own ctx.
			if err == nil || errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "silent") {
				t.Errorf("got %v, want an error that says that the stream fell silent", err)
			}
		})
	}
}

func TestReplicasHeartbeatsKeepTheStream(t *testing.T) {
	c := newProvider(t, map[string]http.HandlerFunc{"GET /system/replicas": func(w http.ResponseWriter, r *http.Request) {
		for range 5 {
			stream("{}\n")(w, r)
			time.Sleep(40 * time.Millisecond)
		}
	}}).client(t)
	c.SetSilence(120 * time.Millisecond)
	begun := time.Now()
	got, err := views(t.Context(), c)
	if len(got) != 5 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %d views and %v after %v, want 5 and the end of the stream", len(got), err, time.Since(begun))
	}
}

// A slow consumer is not a silent stream.
func TestReplicasSlowConsumer(t *testing.T) {
	c := newProvider(t, map[string]http.HandlerFunc{"GET /system/replicas": stream("{}\n", "{}\n", "{}\n")}).client(t)
	c.SetSilence(100 * time.Millisecond)
	n := 0
	for _, err := range c.Replicas(t.Context()) {
		if err != nil {
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Error(err)
			}
			break
		}
		if n++; n == 1 {
			time.Sleep(250 * time.Millisecond)
		}
	}
	if n != 3 {
		t.Errorf("got %d views, want 3", n)
	}
}

func TestReplicasEnds(t *testing.T) {
	left := make(chan struct{}, 2)
	p := newProvider(t, map[string]http.HandlerFunc{"GET /system/replicas": func(w http.ResponseWriter, r *http.Request) {
		stream("{}\n")(w, r)
		<-r.Context().Done()
		left <- struct{}{}
	}})
	c := p.client(t)
	t.Run("by leaving the loop", func(t *testing.T) {
		for _, err := range c.Replicas(t.Context()) {
			if err != nil {
				t.Error(err)
			}
			break
		}
		<-left
	})
	t.Run("by ctx", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var last error
		for _, err := range c.Replicas(ctx) {
			last = err
			cancel()
		}
		if !errors.Is(last, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", last)
		}
		<-left
	})
}

func TestKill(t *testing.T) {
	p := newProvider(t, map[string]http.HandlerFunc{
		"DELETE /system/replicas/worker/r1": say(202, ""),
		"DELETE /system/replicas/worker/r2": say(404, "no such replica"),
	})
	c := p.client(t)
	if err := c.Kill(t.Context(), "worker", "r1"); err != nil {
		t.Error(err)
	}
	err := c.Kill(t.Context(), "worker", "r2")
	if err == nil || !strings.Contains(err.Error(), "kill replica r2") || !strings.Contains(err.Error(), "no such replica") || errors.Is(err, gateway.ErrNoAddresses) {
		t.Errorf("got %v, want what the provider said", err)
	}
	if err := c.Kill(t.Context(), "../functions", "a/b"); err == nil {
		t.Error("a name made another path")
	}
	want := []string{"DELETE /system/replicas/worker/r1", "DELETE /system/replicas/worker/r2", "DELETE /system/replicas/..%2Ffunctions/a%2Fb"}
	if got := p.requests(); !slices.Equal(got, want) {
		t.Errorf("asked %q, want %q", got, want)
	}
}

func TestViews(t *testing.T) {
	p := newProvider(t, map[string]http.HandlerFunc{"GET /system/views": say(200, "{}\n{}\n")})
	c := p.client(t)
	for _, watch := range []bool{false, true} {
		body, err := c.Views(t.Context(), watch)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		if err := errors.Join(err, body.Close()); err != nil || string(got) != "{}\n{}\n" {
			t.Errorf("got %q (%v)", got, err)
		}
	}
	if got := p.requests(); !slices.Equal(got, []string{"GET /system/views", "GET /system/views?watch=true"}) {
		t.Errorf("asked %q", got)
	}
	if _, err := newProvider(t, nil).client(t).Views(t.Context(), false); !errors.Is(err, gateway.ErrNoAddresses) {
		t.Errorf("got %v, want ErrNoAddresses", err)
	}
}

// TestCredentials: each call carries them, and no error shows them.
func TestCredentials(t *testing.T) {
	deny := func(w http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); !ok || user != "admin" || password != "pass word" {
			t.Errorf("%s %s came with %q", r.Method, r.URL, r.Header.Get("Authorization"))
		}
		http.Error(w, "unauthorized", http.StatusUnauthorized)
	}
	p := newProvider(t, map[string]http.HandlerFunc{
		"GET /system/functions": deny, "PUT /system/functions": deny, "POST /system/scale-function/w": deny,
		"GET /system/replicas": deny, "GET /system/views": deny, "DELETE /system/replicas/w/r": deny,
	})
	c, ctx := p.client(t), t.Context()
	_, list := c.Functions(ctx)
	_, watch := views(ctx, c)
	_, record := c.Views(ctx, false)
	for name, err := range map[string]error{
		"functions": list, "replicas": watch, "views": record,
		"deploy": c.Deploy(ctx, types.FunctionDeployment{Service: "w"}), "scale": c.Scale(ctx, "w", 1), "kill": c.Kill(ctx, "w", "r"),
	} {
		if err == nil || !strings.Contains(err.Error(), "unauthorized") || strings.Contains(err.Error(), "pass word") {
			t.Errorf("%s: got %v, want that it is unauthorized", name, err)
		}
	}
	if n := len(p.requests()); n != 6 {
		t.Errorf("%d requests, want 6", n)
	}
	open := newProvider(t, map[string]http.HandlerFunc{"GET /system/functions": func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Authorization"); got != "" {
			t.Errorf("a client without a user sent %q", got)
		}
		_, _ = io.WriteString(w, "[]")
	}})
	bare, err := gateway.NewClient(open.URL, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	if _, err := bare.Functions(ctx); err != nil {
		t.Error(err)
	}
}
