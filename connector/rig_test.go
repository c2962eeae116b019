package connector_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/openfaas/faas-provider/types"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/connector"
	"github.com/sheaf-project/sheaf/internal/bustest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, bustest.Leaks()...) }

// A platform plays a gateway and the functions behind it.
type platform struct {
	*httptest.Server

	mu        sync.Mutex // guards all below
	functions map[string]http.HandlerFunc
	notes     map[string]map[string]string // annotations
	calls     map[string][]string          // bodies, by function
	broken    int                          // status of all answers; 0 means none
}

func newPlatform(t testing.TB) *platform {
	p := &platform{functions: map[string]http.HandlerFunc{}, notes: map[string]map[string]string{}, calls: map[string][]string{}}
	p.Server = httptest.NewServer(http.HandlerFunc(p.serve))
	t.Cleanup(p.Close)
	return p
}

// bind deploys a function. A nil handler echoes.
func (p *platform) bind(name, topic string, h http.HandlerFunc, more ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.functions[name] = h
	p.notes[name] = map[string]string{"topic": topic}
	for i := 0; i < len(more); i += 2 {
		p.notes[name][more[i]] = more[i+1]
	}
}

func (p *platform) remove(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.functions, name)
	delete(p.notes, name)
}

func (p *platform) breaks(status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.broken = status
}

func (p *platform) called(name string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.calls[name]...)
}

func (p *platform) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	broken := p.broken
	p.mu.Unlock()
	switch {
	case broken != 0:
		http.Error(w, "broken", broken)
	case r.URL.Path == "/system/namespaces":
		_, _ = io.WriteString(w, `["openfaas-fn"]`)
	case r.URL.Path == "/system/functions":
		p.mu.Lock()
		list := []types.FunctionStatus{}
		for name, notes := range p.notes {
			list = append(list, types.FunctionStatus{Name: name, Annotations: &notes})
		}
		p.mu.Unlock()
		_ = json.NewEncoder(w).Encode(list)
	case strings.HasPrefix(r.URL.Path, "/function/"):
		name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/function/"), ".openfaas-fn")
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		p.mu.Lock()
		h, ok := p.functions[name]
		p.calls[name] = append(p.calls[name], string(body))
		p.mu.Unlock()
		switch {
		case !ok:
			http.NotFound(w, r)
		case h == nil:
			w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
			_, _ = io.WriteString(w, name+" got "+string(body))
		default:
			r.Body = io.NopCloser(strings.NewReader(string(body)))
			h(w, r)
		}
	default:
		http.NotFound(w, r)
	}
}

func quiet() *slog.Logger {
	var w io.Writer = io.Discard
	if testing.Verbose() {
		w = os.Stderr
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// A rig is a bus, a platform and connectors between them.
type rig struct {
	*bustest.Server
	*platform
	t  testing.TB
	nc *nats.Conn // of a client
}

func newRig(t testing.TB, kind broker.Type) *rig {
	t.Helper()
	r := &rig{Server: bustest.Start(t, kind), platform: newPlatform(t), t: t}
	r.nc = r.client()
	return r
}

func (r *rig) client() *nats.Conn {
	r.t.Helper()
	nc, err := broker.Connect(r.Server.URL, broker.Options{Name: "client", Log: quiet()})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(nc.Close)
	return nc
}

// connect runs a connector, with short times. stop ends it and waits.
func (r *rig) connect(change ...func(*connector.Connector)) (c *connector.Connector, stop func()) {
	r.t.Helper()
	c = connector.NewConnector()
	nc, err := broker.Connect(r.Server.URL, broker.Options{Name: "connector", Log: quiet()})
	if err != nil {
		r.t.Fatal(err)
	}
	c.Conn, c.Gateway, c.Log = nc, r.platform.URL, quiet()
	c.Lookup = connector.NewLookup(c.Gateway, ",", "", "")
	c.Rebuild, c.Timeout = 100*time.Millisecond, 20*time.Second
	c.MinWait, c.MaxWait, c.Grace, c.Attempts = 10*time.Millisecond, 100*time.Millisecond, 5*time.Second, 3
	for _, f := range change {
		f(c)
	}
	if err := c.Open(r.t.Context(), broker.Config{Type: r.Kind, AckWait: 5 * time.Second, Log: quiet(), Inflight: c.Inflight, Grace: c.Grace}); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(2 * bustest.Soon):
			r.t.Error("the connector did not end")
			return
		}
		c.Bus.Close()
		nc.Close()
		c.Lookup.Close()
	})
	r.t.Cleanup(stop)
	bustest.Until(r.t, "the connector is ready", func() bool { return c.Ready() == nil })
	for _, topic := range broker.Cover(c.Lookup.Topics()) {
		if r.Kind != broker.Streaming {
			r.listens(topic)
		}
	}
	if r.Kind == broker.Streaming { // nothing covers anything
		for _, topic := range c.Lookup.Topics() {
			if !broker.HasWildcard(topic) {
				r.listens(topic)
			}
		}
	}
	return c, stop
}

func (r *rig) listens(topic string) {
	r.t.Helper()
	bustest.Until(r.t, "somebody listens to "+topic, func() bool { return r.Listeners(topic) > 0 })
}

// ask publishes a message and waits for its answer, by the reply subject where
// the bus has one, and else by the header that names one.
func (r *rig) ask(topic, body string, header ...string) *nats.Msg {
	r.t.Helper()
	h := nats.Header{}
	for i := 0; i < len(header); i += 2 {
		h.Add(header[i], header[i+1])
	}
	if r.Kind == broker.Core {
		m, err := r.nc.RequestMsg(&nats.Msg{Subject: topic, Header: h, Data: []byte(body)}, bustest.Soon)
		if err != nil {
			r.t.Fatalf("ask %s: %v", topic, err)
		}
		return m
	}
	inbox := r.nc.NewInbox()
	sub, err := r.nc.SubscribeSync(inbox)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := r.nc.Flush(); err != nil {
		r.t.Fatal(err)
	}
	h.Set(connector.HeaderReply, inbox)
	r.Publish(topic, h, body)
	m, err := sub.NextMsg(bustest.Soon)
	if err != nil {
		r.t.Fatalf("ask %s: %v", topic, err)
	}
	return m
}

// set reads an answer that is a set.
func (r *rig) set(m *nats.Msg) connector.Results {
	r.t.Helper()
	var s connector.Results
	if err := json.Unmarshal(m.Data, &s); err != nil || m.Header.Get("Content-Type") != connector.MediaType {
		r.t.Fatalf("answer is no set: %s %q (%v)", m.Header, m.Data, err)
	}
	return s
}

// onAll runs a test on each bus.
func onAll(t *testing.T, f func(*testing.T, *rig)) {
	t.Parallel()
	for _, kind := range bustest.Kinds() {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			f(t, newRig(t, kind))
		})
	}
}
