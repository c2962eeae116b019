package broker_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/bustest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, bustest.Leaks()...) }

const soon = bustest.Soon

// A rig is a server and the subscriptions that a test made.
type rig struct {
	*bustest.Server
	t *testing.T

	mu   sync.Mutex     // guards subs
	subs map[string]int // by topic
}

func newRig(t *testing.T, kind broker.Type) *rig {
	t.Helper()
	return &rig{Server: bustest.Start(t, kind), t: t, subs: map[string]int{}}
}

// quiet logs with -v only.
func quiet(t *testing.T) *slog.Logger {
	var w io.Writer = io.Discard
	if testing.Verbose() {
		w = os.Stderr
	}
	return slog.New(slog.NewTextHandler(w, nil)).With("test", t.Name())
}

// open opens a bus of the rig, with short times.
func (r *rig) open(change ...func(*broker.Config)) broker.Bus {
	r.t.Helper()
	nc, err := broker.Connect(r.URL, broker.Options{Name: r.t.Name(), Log: quiet(r.t)})
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := broker.Config{Conn: nc, Type: r.Kind, AckWait: 2 * time.Second, Grace: 5 * time.Second, Log: quiet(r.t)}
	for _, f := range change {
		f(&cfg)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), soon)
	defer cancel()
	b, err := broker.Open(ctx, cfg)
	if err != nil {
		nc.Close()
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { b.Close(); nc.Close() })
	return b
}

func (r *rig) publish(topic string, bodies ...string) {
	r.t.Helper()
	r.Publish(topic, nil, bodies...)
}

func (r *rig) publishMsgs(topic string, h nats.Header, bodies ...string) {
	r.t.Helper()
	r.Publish(topic, h, bodies...)
}

// subscribe subscribes in the background; stop ends it and waits.
func (r *rig) subscribe(b broker.Bus, topic string, deliver func(*broker.Message)) (stop func()) {
	r.t.Helper()
	r.mu.Lock()
	r.subs[topic]++
	r.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Subscribe(ctx, topic, deliver) }()
	done := false
	stop = func() {
		if done {
			return
		}
		done = true
		r.mu.Lock()
		r.subs[topic]--
		r.mu.Unlock()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				r.t.Errorf("subscribe %s: %v", topic, err)
			}
		case <-time.After(soon):
			r.t.Errorf("subscribe %s did not end", topic)
		}
	}
	r.t.Cleanup(stop)
	r.listens(topic)
	return stop
}

// listens waits until as many subscriptions of a topic are there as were made.
func (r *rig) listens(topic string) {
	r.t.Helper()
	r.mu.Lock()
	want := r.subs[topic]
	r.mu.Unlock()
	bustest.Until(r.t, "the subscription to "+topic, func() bool { return r.Listeners(topic) >= want })
}

// receive takes what comes.
func receive(t *testing.T, c <-chan *broker.Message, what string) *broker.Message {
	t.Helper()
	select {
	case m := <-c:
		return m
	case <-time.After(soon):
		t.Fatalf("not within %v: %s", soon, what)
		return nil
	}
}

// nothing checks that nothing comes for as long as a bus would need.
func nothing(t *testing.T, c <-chan *broker.Message, d time.Duration, what string) {
	t.Helper()
	select {
	case m := <-c:
		t.Errorf("%s: came %q on %s, delivery %d", what, m.Data, m.Topic, m.Delivery)
	case <-time.After(d):
	}
}

func bodies(n int, name string) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprint(name, i)
	}
	return list
}
