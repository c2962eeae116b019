// Package connector lets messages call functions. A function is bound to topics
// by its annotation `topic`; a message on a topic calls every function that is
// bound to it, all at once, and the set of their results goes to whoever asked.
//
// A message gets exactly one outcome. What could not be done is answered to a
// requester, or buried where it can be found and sent again; nothing is lost
// without being counted. The buses do not all promise the same: see package
// broker.
package connector

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/topic"
	"github.com/sheaf-project/sheaf/tracing"
)

// Defaults of a [Connector].
const (
	DefaultRebuild   = 5 * time.Second
	DefaultTimeout   = time.Minute
	DefaultInflight  = 64
	DefaultAttempts  = 4
	DefaultMinWait   = 250 * time.Millisecond
	DefaultMaxWait   = 10 * time.Second
	DefaultPatience  = 10 * time.Minute
	DefaultGrace     = 30 * time.Second
	DefaultMaxAnswer = 8 << 20 // bytes
	// maxDeliveries is how often a bus may deliver a message that never gets an
	// outcome: it may be what ends the connector.
	maxDeliveries = 10
)

// RedriveSubject is where a request has dead letters sent again: of the topic
// in its body, or of all topics when that is empty. The answer tells how many.
const RedriveSubject = "sheaf.redrive"

// A Connector takes messages from a bus and calls functions. Conn, Lookup and
// Gateway must be set, and Open called; the zero of every other field is usable. Its fields
// must not change once Run is called.
type Connector struct {
	Bus     broker.Bus // set by Open
	Conn    *nats.Conn // for answers
	Lookup  *Lookup
	Gateway string // URL
	// Topics are listened to, whether functions are bound to them or not. Nil
	// means those that functions are bound to.
	Topics []string
	// Resolver knows the replicas of functions whose annotation sheaf.deliver
	// is "all". When nil such functions cannot be called.
	Resolver sheaf.Resolver
	// Async has the gateway queue calls; results then never come back.
	Async       bool
	ContentType string // of messages that do not tell; "" means text/plain

	Rebuild  time.Duration // how often topics are asked for; 0 means 5 seconds
	Timeout  time.Duration // of one call; 0 means one minute
	Inflight int           // messages of one topic, and calls for one topic, at once; 0 means 64
	Attempts int           // at a function that fails; 0 means 4
	// MinWait is the pause after a first failed attempt, doubled for each next
	// one up to MaxWait; 0 means 250 ms, and 10 s.
	MinWait, MaxWait time.Duration
	// Patience is how long a message waits for a gateway or a function that
	// cannot be reached. Such attempts do not count. 0 means 10 minutes.
	Patience time.Duration
	// Grace is how long messages that are being worked on may go on when Run
	// ends; 0 means 30 seconds.
	Grace     time.Duration
	MaxAnswer int64 // bytes of one function's answer; 0 means 8 MiB

	PrintResponse, PrintBody, PrintSync bool
	Log                                 *slog.Logger // nil means slog.Default
	// Tracer records a span for each message, each call and each block of the
	// route topic. Nil records nothing; W3C's trace context is passed on in any
	// case.
	Tracer trace.Tracer

	caller  *wire.Caller
	metrics *metrics
	mu      sync.Mutex           // guards what follows
	long    map[string]time.Time // topics that are listened to, and since when

	opened  atomic.Bool // Bus is set
	listens atomic.Bool // topics are known and listened to
	failing atomic.Bool // the topics could not be asked for
}

// NewConnector returns a Connector with what it measures, so that Handler can
// show it before Run is called. Its fields are still to be set.
func NewConnector() *Connector {
	return &Connector{metrics: newMetrics()}
}

func (c *Connector) withDefaults() {
	duration := func(p *time.Duration, def time.Duration) {
		if *p <= 0 {
			*p = def
		}
	}
	duration(&c.Rebuild, DefaultRebuild)
	duration(&c.Timeout, DefaultTimeout)
	duration(&c.MinWait, DefaultMinWait)
	duration(&c.MaxWait, DefaultMaxWait)
	duration(&c.Patience, DefaultPatience)
	duration(&c.Grace, DefaultGrace)
	if c.Inflight <= 0 {
		c.Inflight = DefaultInflight
	}
	if c.Attempts <= 0 {
		c.Attempts = DefaultAttempts
	}
	if c.MaxAnswer <= 0 {
		c.MaxAnswer = DefaultMaxAnswer
	}
	if c.ContentType == "" {
		c.ContentType = "text/plain"
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Tracer == nil {
		c.Tracer = noop.NewTracerProvider().Tracer("")
	}
}

// Open opens the bus. It waits until NATS is there, and fails only when ctx ends
// or cfg cannot be. Who opens the bus closes it after Run: c.Bus.Close.
func (c *Connector) Open(ctx context.Context, cfg broker.Config) error {
	cfg.Conn = c.Conn
	cfg.Lost = func(topic string, n int) { c.metrics.messages.WithLabelValues(topic, outcomeLost).Add(float64(n)) }
	bus, err := broker.Open(ctx, cfg)
	if err != nil {
		return err
	}
	c.Bus = bus
	c.opened.Store(true)
	return nil
}

// Run takes messages until ctx ends. Then it takes no new ones, lets those that
// are being worked on end within Grace, gives the others back to the bus, and
// returns.
func (c *Connector) Run(ctx context.Context) {
	c.withDefaults()
	c.caller = &wire.Caller{HTTP: wire.NewHTTP(c.Inflight), MaxReply: c.MaxAnswer}
	defer c.caller.HTTP.CloseIdleConnections()
	// Work outlives ctx by Grace.
	work, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(c.Grace, cut) })()

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.redrives(ctx) })
	blocks := &topic.Server{Conn: c.Conn, Gateway: c.Gateway, Grace: c.Grace, Log: c.Log, Begin: c.routed}
	wg.Go(func() {
		if err := blocks.Run(ctx); err != nil {
			c.Log.Error("blocks of the route topic cannot be taken", "err", err)
		}
	})
	running := map[string]context.CancelFunc{}
	defer func() {
		for _, stop := range running {
			stop()
		}
	}()
	tick := time.NewTicker(c.Rebuild)
	defer tick.Stop()
	for {
		if c.load() {
			want := c.Topics
			if want == nil {
				want = c.Lookup.Topics()
			}
			want = c.cover(want)
			for _, topic := range want {
				if running[topic] == nil {
					listen, stop := context.WithCancel(ctx)
					running[topic] = stop
					c.note(topic, true)
					wg.Go(func() { c.listen(listen, work, topic) })
				}
			}
			for topic, stop := range running {
				if !slices.Contains(want, topic) {
					c.note(topic, false)
					stop()
					delete(running, topic)
				}
			}
			c.listens.Store(true)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// note says that a topic is listened to from now on, or no longer.
func (c *Connector) note(topic string, listened bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.long == nil {
		c.long = map[string]time.Time{}
	}
	if delete(c.long, topic); listened {
		c.long[topic] = time.Now()
	}
}

// settled is how long a topic must have been listened to until it is trusted
// to bring every message.
const settled = 2 * time.Second

// another says whether a message that came by a topic comes by another one,
// too, that is to work on it: of topics that overlap, the first by name. In the
// first seconds of a topic a message may be worked on twice, and is never left
// to somebody who does not get it.
func (c *Connector) another(topic, subject string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for other, since := range c.long {
		if other < topic && time.Since(since) >= settled && broker.Covers(other, subject) {
			return true
		}
	}
	return false
}

// cover leaves out the topics that others cover, so that a message comes once;
// a bus without wildcards has none that do.
func (c *Connector) cover(topics []string) []string {
	if c.Bus.Guarantees().Wildcards {
		return broker.Cover(topics)
	}
	return topics
}

// load asks for topics, and says whether they are known.
func (c *Connector) load() bool {
	before := c.Lookup.Topics()
	bad, err := c.Lookup.Load()
	if err != nil {
		c.metrics.reloads.WithLabelValues(outcomeFailed).Inc()
		if !c.failing.Swap(true) {
			c.Log.Warn("topics are not known; keeping the last ones", "err", err)
		}
		return c.listens.Load()
	}
	if c.failing.Swap(false) {
		c.Log.Info("topics are known again")
	}
	c.metrics.reloads.WithLabelValues(outcomeOK).Inc()
	c.metrics.loaded.SetToCurrentTime()
	after := c.Lookup.Topics()
	c.metrics.bound.Set(float64(len(after)))
	if !slices.Equal(before, after) || c.PrintSync {
		c.Log.Info("topics of functions", "topics", after)
		for topic, err := range bad {
			c.Log.Error("a function is bound to a topic that cannot be listened to", "topic", topic, "err", err)
		}
	}
	return true
}

// listen delivers one topic's messages until ctx ends, and waits for them.
func (c *Connector) listen(ctx, work context.Context, topic string) {
	t := &topicState{c: c, name: topic, stopped: ctx.Done(),
		slots: make(chan struct{}, c.Inflight), calls: make(chan struct{}, c.Inflight)}
	var wg sync.WaitGroup
	defer wg.Wait()
	err := c.Bus.Subscribe(ctx, topic, func(m *broker.Message) {
		t.slots <- struct{}{} // which holds the bus back
		wg.Go(func() {
			defer func() { <-t.slots }()
			t.handle(work, m)
		})
	})
	if err != nil {
		c.Log.Error("topic cannot be listened to", "topic", topic, "err", err)
	}
}

// redrives answers requests on RedriveSubject.
func (c *Connector) redrives(ctx context.Context) {
	requests := make(chan *nats.Msg, 16)
	sub, err := c.Conn.ChanQueueSubscribe(RedriveSubject, "sheaf-connector", requests)
	if err != nil {
		c.Log.Error("dead letters cannot be redriven", "err", err)
		return
	}
	defer func() { _ = sub.Unsubscribe() }() // it ends with its connection in any case
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-requests:
			limited, cancel := context.WithTimeout(ctx, time.Minute)
			n, err := c.Bus.Redrive(limited, string(m.Data))
			cancel()
			c.metrics.redriven.Add(float64(n))
			_ = m.Respond(redriven(n, err)) // who asked has a deadline of its own
		}
	}
}

// routed counts and traces a block of the route topic.
func (c *Connector) routed(ctx context.Context, function string, header http.Header) func(string, int, int) {
	ctx, span := c.Tracer.Start(tracing.Extract(ctx, header.Get), "block "+function, trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(attribute.String("sheaf.job", header.Get(wire.Job)), attribute.String("sheaf.block", header.Get(wire.Block)),
			attribute.String("sheaf.attempt", header.Get(wire.Attempt))))
	tracing.Inject(ctx, header.Set)
	return func(outcome string, in, out int) {
		if outcome != outcomeOK {
			span.SetStatus(codes.Error, outcome)
		}
		span.SetAttributes(attribute.Int("sheaf.bytes.in", in), attribute.Int("sheaf.bytes.out", out))
		span.End()
		c.metrics.blocks.WithLabelValues(outcome).Inc()
		c.metrics.bytes.WithLabelValues("in").Add(float64(in))
		c.metrics.bytes.WithLabelValues("out").Add(float64(out))
	}
}

// Ready says why messages do not call functions at present, or nil.
func (c *Connector) Ready() error {
	switch {
	case !c.opened.Load():
		return errNoBus
	case !c.listens.Load():
		return errNoTopics
	}
	return c.Bus.Ready()
}
