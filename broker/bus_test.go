package broker_test

// bus_test.go is the suite that every bus must pass. Where a bus does not
// promise something, the suite shows that it does not happen, either, so that
// the table of guarantees can be believed.

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/bustest"
)

func TestBus(t *testing.T) {
	t.Log("\n" + broker.Table())
	for _, kind := range bustest.Kinds() {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			for _, c := range []struct {
				name string
				run  func(*testing.T, *rig)
			}{
				{"messages come once, with headers", comeOnce},
				{"a group shares", groupShares},
				{"no outcome: it comes again", comesAgain},
				{"given back: it comes again", givenBack},
				{"a member dies: another gets what it had", memberDies},
				{"what waits is delivered later", waits},
				{"long work is not delivered twice", longWork},
				{"wildcards", wildcards},
				{"the server goes and comes back", serverRestarts},
				{"buried and redriven", buriedAndRedriven},
				{"the bus is held back", heldBack},
				{"the end waits for outcomes", endWaits},
			} {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel()
					c.run(t, newRig(t, kind))
				})
			}
		})
	}
}

func TestTableIsInTheManual(t *testing.T) {
	t.Parallel()
	manual, err := os.ReadFile("../docs/CONNECTOR.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(manual), broker.Table()) {
		t.Errorf("docs/CONNECTOR.md does not hold the table of guarantees:\n%s", broker.Table())
	}
}

func comeOnce(t *testing.T, r *rig) {
	b := r.open()
	c := make(chan *broker.Message, 100)
	r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	r.publishMsgs("orders.new", nats.Header{"X-Color": {"red", "blue"}}, "one")
	m := receive(t, c, "a message")
	if m.Topic != "orders.new" || string(m.Data) != "one" || m.Delivery != 1 || m.Header.Get("x-color") != "red" || len(m.Header["X-Color"]) != 2 {
		t.Errorf("came %+v", m)
	}
	if err := m.Ack(); err != nil {
		t.Error(err)
	}
	r.publish("orders.new", "", "\x00\xff")
	for _, want := range []string{"", "\x00\xff"} {
		m := receive(t, c, "a message")
		if string(m.Data) != want {
			t.Errorf("came %q, want %q", m.Data, want)
		}
		_ = m.Ack()
	}
	if r.Kind != broker.JetStream { // which has no stream for it
		r.publish("orders.old", "not ours")
	}
	nothing(t, c, 3*time.Second, "after every outcome") // longer than AckWait
}

func groupShares(t *testing.T, r *rig) {
	var mu sync.Mutex
	seen := map[string]int{}
	by := [2]int{}
	for i := range 2 {
		r.subscribe(r.open(func(c *broker.Config) { c.Inflight = 8 }), "orders.new", func(m *broker.Message) {
			mu.Lock()
			seen[string(m.Data)]++
			by[i]++
			mu.Unlock()
			time.Sleep(time.Millisecond)
			_ = m.Ack()
		})
	}
	const n = 200
	r.publish("orders.new", bodies(n, "m")...)
	bustest.Until(t, "all messages", func() bool { mu.Lock(); defer mu.Unlock(); return len(seen) == n })
	time.Sleep(200 * time.Millisecond)
	mu.Lock()
	defer mu.Unlock()
	for body, times := range seen {
		if times != 1 {
			t.Errorf("message %s came %d times", body, times)
		}
	}
	if by[0] == 0 || by[1] == 0 {
		t.Errorf("the members got %v messages", by)
	}
}

func comesAgain(t *testing.T, r *rig) {
	b := r.open()
	c := make(chan *broker.Message, 100)
	stop := r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	r.publish("orders.new", "x")
	m := receive(t, c, "the message")
	// The member that has it dies.
	other := r.open()
	d := make(chan *broker.Message, 100)
	r.subscribe(other, "orders.new", func(m *broker.Message) { d <- m })
	_, _ = m.Again()
	stop()
	if !b.Guarantees().Acks {
		nothing(t, d, time.Second, "a bus without outcomes")
		return
	}
	again := receive(t, merge(c, d), "the message again")
	if string(again.Data) != "x" || b.Guarantees().Counts && again.Delivery < 2 {
		t.Errorf("came %q, delivery %d", again.Data, again.Delivery)
	}
	_ = again.Ack()
}

// A member that is gone without a word has told no outcome.
func memberDies(t *testing.T, r *rig) {
	var nc *nats.Conn
	b := r.open(func(c *broker.Config) { nc = c.Conn })
	c := make(chan *broker.Message, 100)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan struct{})
	go func() { defer close(ended); _ = b.Subscribe(ctx, "orders.new", func(m *broker.Message) { c <- m }) }()
	bustest.Until(t, "the subscription", func() bool { return r.Listeners("orders.new") > 0 })
	r.publish("orders.new", "x")
	had := receive(t, c, "the message")
	nc.Close()
	d := make(chan *broker.Message, 100)
	other := r.open()
	r.subscribe(other, "orders.new", func(m *broker.Message) { d <- m })
	if other.Guarantees().Acks {
		m := receive(t, d, "the message again")
		if string(m.Data) != "x" || m.Delivery < 2 {
			t.Errorf("came %q, delivery %d", m.Data, m.Delivery)
		}
		_ = m.Ack()
	} else {
		nothing(t, d, time.Second, "a bus without outcomes")
	}
	_ = had.Ack() // too late, and harmless
	cancel()
	select {
	case <-ended:
	case <-time.After(soon):
		t.Error("Subscribe did not end")
	}
}

func merge(a, b <-chan *broker.Message) <-chan *broker.Message {
	out := make(chan *broker.Message, 1)
	go func() {
		select {
		case m := <-a:
			out <- m
		case m := <-b:
			out <- m
		case <-time.After(soon):
		}
	}()
	return out
}

func givenBack(t *testing.T, r *rig) {
	b := r.open()
	c := make(chan *broker.Message, 100)
	r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	r.publish("orders.new", "x")
	m := receive(t, c, "the message")
	ok, err := m.Again()
	if ok != b.Guarantees().Acks || err != nil {
		t.Errorf("Again says %v, %v", ok, err)
	}
	if err := m.Ack(); err != nil { // only the first outcome counts
		t.Error(err)
	}
	if !ok {
		nothing(t, c, 500*time.Millisecond, "a bus that takes nothing back")
		return
	}
	m = receive(t, c, "the message again")
	if m.Delivery != 2 {
		t.Errorf("delivery %d, want 2", m.Delivery)
	}
	_ = m.Ack()
}

func waits(t *testing.T, r *rig) {
	b := r.open()
	c := make(chan *broker.Message, 100)
	stop := r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	stop()
	r.publish("orders.new", "while away")
	r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	if !b.Guarantees().Stored {
		nothing(t, c, 500*time.Millisecond, "a bus that stores nothing")
		return
	}
	m := receive(t, c, "what came meanwhile")
	_ = m.Ack()
	if string(m.Data) != "while away" {
		t.Errorf("came %q", m.Data)
	}
}

func longWork(t *testing.T, r *rig) {
	b := r.open(func(c *broker.Config) { c.AckWait = time.Second })
	c := make(chan *broker.Message, 100)
	r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	r.publish("orders.new", "x")
	m := receive(t, c, "the message")
	// With one member even a bus that cannot be told that the work goes on does
	// not deliver it a second time.
	nothing(t, c, 3500*time.Millisecond, "while it is worked on")
	if err := m.Ack(); err != nil {
		t.Error(err)
	}
	nothing(t, c, 1500*time.Millisecond, "after its outcome")
}

func wildcards(t *testing.T, r *rig) {
	b := r.open()
	if !b.Guarantees().Wildcards {
		for _, topic := range []string{"orders.*", "orders.>"} {
			if err := b.Subscribe(t.Context(), topic, func(*broker.Message) {}); !errors.Is(err, broker.ErrWildcard) {
				t.Errorf("%s: %v, want ErrWildcard", topic, err)
			}
		}
		return
	}
	c := make(chan *broker.Message, 100)
	r.subscribe(b, "orders.*", func(m *broker.Message) { _ = m.Ack(); c <- m })
	d := make(chan *broker.Message, 100)
	r.subscribe(b, "events.>", func(m *broker.Message) { _ = m.Ack(); d <- m })
	r.publish("orders.new", "1")
	r.publish("events.a.b", "2")
	if m := receive(t, c, "orders.new"); string(m.Data) != "1" || m.Topic != "orders.new" {
		t.Errorf("came %q on %s", m.Data, m.Topic)
	}
	if m := receive(t, d, "events.a.b"); string(m.Data) != "2" || m.Topic != "events.a.b" {
		t.Errorf("came %q on %s", m.Data, m.Topic)
	}
}

func serverRestarts(t *testing.T, r *rig) {
	b := r.open()
	c := make(chan *broker.Message, 100)
	r.subscribe(b, "orders.new", func(m *broker.Message) { _ = m.Ack(); c <- m })
	r.publish("orders.new", "before")
	receive(t, c, "the message before")
	for range 2 {
		r.Stop()
		bustest.Until(t, "the bus sees it", func() bool { return b.Ready() != nil })
		r.Start()
		bustest.Until(t, "the bus is back", func() bool { return b.Ready() == nil })
		r.listens("orders.new")
		r.publish("orders.new", "after")
		for {
			if m := receive(t, c, "the message after"); string(m.Data) == "after" {
				break
			}
		}
	}
}

func buriedAndRedriven(t *testing.T, r *rig) {
	b := r.open()
	c := make(chan *broker.Message, 100)
	r.subscribe(b, "orders.new", func(m *broker.Message) { _ = m.Ack(); c <- m })
	dead := make(chan *broker.Message, 100)
	if !b.Guarantees().Buries {
		r.subscribe(b, "dead.orders.new", func(m *broker.Message) { dead <- m })
		b = r.open(func(c *broker.Config) { c.Dead = "dead" })
	}
	for _, data := range []string{"one", "two"} {
		m := &broker.Message{Topic: "orders.new", Header: broker.Header{"X-Color": {"red"}}, Data: []byte(data)}
		if err := b.Bury(t.Context(), m, "because\nof this"); err != nil {
			t.Fatal(err)
		}
	}
	if !b.Guarantees().Buries {
		m := receive(t, dead, "the dead letter")
		if string(m.Data) != "one" || m.Header.Get(broker.HeaderReason) != "because of this" || m.Header.Get(broker.HeaderTopic) != "orders.new" {
			t.Errorf("came %+v", m)
		}
		if _, err := b.Redrive(t.Context(), ""); err == nil {
			t.Error("dead letters were redriven that nobody kept")
		}
		return
	}
	if n, err := b.Redrive(t.Context(), "orders.old"); n != 0 || err != nil {
		t.Errorf("another topic's: %d, %v", n, err)
	}
	if n, err := b.Redrive(t.Context(), "orders.new"); n != 2 || err != nil {
		t.Fatalf("redrive: %d, %v", n, err)
	}
	for _, want := range []string{"one", "two"} {
		m := receive(t, c, "the redriven message")
		if string(m.Data) != want || m.Topic != "orders.new" || m.Header.Get("X-Color") != "red" || m.Header.Get(broker.HeaderReason) != "" {
			t.Errorf("came %+v, want %s", m, want)
		}
	}
	if n, err := b.Redrive(t.Context(), "orders.new"); n != 0 || err != nil {
		t.Errorf("a second time: %d, %v", n, err)
	}
}

func heldBack(t *testing.T, r *rig) {
	b := r.open(func(c *broker.Config) { c.Inflight = 4 })
	open := make(chan struct{})
	var began, running, most atomic.Int64
	r.subscribe(b, "orders.new", func(m *broker.Message) {
		most.Store(max(most.Load(), running.Add(1)))
		began.Add(1)
		<-open
		running.Add(-1)
		_ = m.Ack()
	})
	r.publish("orders.new", bodies(50, "m")...)
	bustest.Until(t, "the first", func() bool { return began.Load() > 0 })
	time.Sleep(200 * time.Millisecond)
	if n := began.Load(); n != 1 {
		t.Errorf("%d deliveries while the first waits", n)
	}
	close(open)
	bustest.Until(t, "all", func() bool { return began.Load() >= 50 })
	if n := most.Load(); n != 1 {
		t.Errorf("%d deliveries at once", n)
	}
}

func endWaits(t *testing.T, r *rig) {
	b := r.open(func(c *broker.Config) { c.AckWait = 5 * time.Second })
	c := make(chan *broker.Message, 100)
	stop := r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	r.publish("orders.new", "x")
	m := receive(t, c, "the message")
	time.AfterFunc(300*time.Millisecond, func() { _ = m.Ack() })
	stop()
	if r.Kind == broker.Core {
		return // which knows no outcomes
	}
	time.Sleep(500 * time.Millisecond)
	r.subscribe(b, "orders.new", func(m *broker.Message) { c <- m })
	nothing(t, c, 6*time.Second, "the outcome came in time")
}

// Of two topics neither covers the other when some subject is only one's.
func TestCovers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		wide, narrow string
		want         bool
	}{
		{"a.b", "a.b", true}, {"a.b", "a.c", false}, {"a.*", "a.b", true}, {"a.*", "a.b.c", false}, {"a.>", "a.b.c", true},
		{"a.>", "a", false}, {"a.b", "a.*", false}, {"a.*", "a.*", true}, {"a.>", "a.*", true}, {"a.*", "a.>", false},
		{"a.*.c", "a.b.c", true}, {"a.*.c", "a.*.c", true}, {"a.*.c", "a.b.*", false}, {"a.*.>", "a.>", false}, {"a.>", "a.*.>", true},
		{"a.b", "a.b.c", false}, {"a.b.c", "a.b", false},
	} {
		if got := broker.Covers(c.wide, c.narrow); got != c.want {
			t.Errorf("Covers(%q, %q) is %v", c.wide, c.narrow, got)
		}
	}
	if got := broker.Cover([]string{"a.b", "a.*", "c", "c", "a.b.c", "x.*.z", "x.y.*"}); strings.Join(got, " ") != "a.* a.b.c c x.*.z x.y.*" {
		t.Errorf("Cover: %v", got)
	}
}

func TestOverlap(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"a.*.c", "a.b.*", true}, {"a.b", "a.b", true}, {"a.b", "a.c", false}, {"a.>", "a", false}, {"a.>", "a.b", true}, {"a.*", "a.b.c", false},
		{"a.*.>", "a.b.c.d", true}, {"a.*.c", "*.b.c", true}, {"a.>", "b.>", false},
	} {
		if broker.Overlap(c.a, c.b) != c.want || broker.Overlap(c.b, c.a) != c.want {
			t.Errorf("Overlap(%q, %q) is not %v", c.a, c.b, c.want)
		}
	}
}

func TestCheckTopic(t *testing.T) {
	t.Parallel()
	for _, good := range []string{"a", "orders.new", "orders.*", "orders.>", "a.*.c", "payment_published", "über.x"} {
		if err := broker.CheckTopic(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", ".", "a.", ".a", "a..b", "a b", "a.>.b", ">", "*", "*.a", "$JS.API.>", "$KV.x", "_INBOX.x", "sheaf.scale", "a\n"} {
		if broker.CheckTopic(bad) == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
