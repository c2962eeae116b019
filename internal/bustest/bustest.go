// Package bustest runs real servers of the buses in this process: NATS with and
// without JetStream, and NATS Streaming. They end and come back at their
// address when a test says so. Only tests import it.
package bustest

import (
	"context"
	"encoding/json"
	"net"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	streaming "github.com/nats-io/nats-streaming-server/server"
	"github.com/nats-io/nats-streaming-server/stores"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"
	"github.com/nats-io/stan.go"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf/broker"
)

// Soon is how long what happens "at once" may take on a busy machine.
const Soon = 20 * time.Second

// Kinds lists the buses.
func Kinds() []broker.Type { return []broker.Type{broker.Core, broker.JetStream, broker.Streaming} }

// Leaks are goroutines that the streaming server leaves behind.
func Leaks() []goleak.Option {
	return []goleak.Option{
		goleak.IgnoreAnyFunction("github.com/nats-io/nats-streaming-server/stores.(*FileMsgStore).backgroundTasks"),
		goleak.IgnoreAnyFunction("github.com/nats-io/nats-streaming-server/server.(*StanServer).performAckExpirationRedelivery"),
		goleak.IgnoreAnyFunction("github.com/nats-io/nats-server/v2/server.(*Server).accountConnectEvent"),
	}
}

// A Server is a server of one kind, that can end and come back at its address
// with what it has stored.
type Server struct {
	Kind broker.Type
	URL  string

	t      testing.TB
	port   int
	dir    string
	server *server.Server
	stan   *streaming.StanServer
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Start starts a server, which ends with the test.
func Start(t testing.TB, kind broker.Type) *Server {
	t.Helper()
	s := &Server{Kind: kind, t: t, dir: t.TempDir(), port: freePort(t)}
	s.URL = "nats://127.0.0.1:" + strconv.Itoa(s.port)
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Start starts it, again.
func (r *Server) Start() {
	r.t.Helper()
	if r.Kind == broker.Streaming {
		o := streaming.GetDefaultOptions()
		o.ID, o.StoreType, o.FilestoreDir = broker.DefaultCluster, stores.TypeFile, r.dir
		n := streaming.DefaultNatsServerOptions
		n.Host, n.Port, n.NoSigs = "127.0.0.1", r.port, true
		for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			s, err := streaming.RunServerWithOpts(o, &n)
			if err == nil {
				r.stan = s
				return
			}
			if time.Since(begun) > Soon {
				r.t.Fatal(err)
			}
		}
	}
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: r.port, NoSigs: true, NoLog: true,
		JetStream: r.Kind != broker.Core, StoreDir: r.dir})
	if err != nil {
		r.t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(Soon) {
		r.t.Fatal("the server did not start")
	}
	r.server = s
}

// Stop ends it.
func (r *Server) Stop() {
	if r.stan != nil {
		r.stan.Shutdown()
		r.stan = nil
	}
	if r.server != nil {
		r.server.Shutdown()
		r.server.WaitForShutdown()
		r.server = nil
	}
}

// Publish publishes as somebody would who knows nothing of sheaf.
func (r *Server) Publish(topic string, h nats.Header, bodies ...string) {
	r.t.Helper()
	nc, err := nats.Connect(r.URL, nats.Timeout(Soon))
	if err != nil {
		r.t.Fatal(err)
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), Soon)
	defer cancel()
	send := func(body string) error {
		return nc.PublishMsg(&nats.Msg{Subject: topic, Header: h, Data: []byte(body)})
	}
	switch r.Kind {
	case broker.Streaming:
		sc, err := stan.Connect(broker.DefaultCluster, nuid.Next(), stan.NatsConn(nc), stan.ConnectWait(Soon))
		if err != nil {
			r.t.Fatal(err)
		}
		defer sc.Close()
		send = func(body string) error {
			if len(h) > 0 {
				var block strings.Builder
				block.WriteString("NATS/1.0\r\n")
				for k, vs := range h {
					for _, v := range vs {
						block.WriteString(k + ": " + v + "\r\n")
					}
				}
				body = block.String() + "\r\n" + body
			}
			return sc.Publish(topic, []byte(body))
		}
	case broker.JetStream:
		js, err := jetstream.New(nc)
		if err != nil {
			r.t.Fatal(err)
		}
		send = func(body string) error {
			_, err := js.PublishMsg(ctx, &nats.Msg{Subject: topic, Header: h, Data: []byte(body)})
			return err
		}
	}
	for _, b := range bodies {
		if err := send(b); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := nc.FlushWithContext(ctx); err != nil {
		r.t.Fatal(err)
	}
}

// Listeners counts who listens to a topic, as the server knows it.
func (r *Server) Listeners(topic string) (n int) {
	switch r.Kind {
	case broker.Streaming:
		w := httptest.NewRecorder()
		r.stan.HandleChannelsz(w, httptest.NewRequest("GET", "/?subs=1&channel="+topic, nil))
		var ch streaming.Channelz
		if json.Unmarshal(w.Body.Bytes(), &ch) != nil {
			return 0
		}
		for _, s := range ch.Subscriptions {
			if !s.IsOffline {
				n++
			}
		}
		return n
	case broker.JetStream:
		nc, err := nats.Connect(r.URL)
		if err != nil {
			return 0
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			return 0
		}
		for name := range js.StreamNames(r.t.Context(), jetstream.WithStreamListSubject(topic)).Name() {
			s, err := js.Stream(r.t.Context(), name)
			if err != nil {
				return 0
			}
			for info := range s.ListConsumers(r.t.Context()).Info() {
				if info.Config.FilterSubject == topic {
					n += info.NumWaiting
				}
			}
		}
		return n
	}
	z, err := r.server.Subsz(&server.SubszOptions{Subscriptions: true, Limit: 10000})
	if err != nil {
		return 0
	}
	for _, s := range z.Subs {
		if s.Subject == topic {
			n++
		}
	}
	return n
}

// Until waits for a condition.
func Until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for begun := time.Now(); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > Soon {
			t.Fatalf("not within %v: %s", Soon, what)
		}
	}
}
