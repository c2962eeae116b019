// Package broker is the way to a message bus: core NATS, JetStream, or NATS
// Streaming (which OpenFaaS CE ships). A [Bus] delivers the messages of topics
// to the members of one queue group, takes their outcomes, and buries the
// messages that nobody could work on, so that they can be sent again.
//
// The three do not promise the same. What each promises is in its
// [Guarantees], and docs/CONNECTOR.md shows the table.
package broker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/textproto"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/internal/login"
)

// A Type names a kind of bus.
type Type string

// The kinds of buses.
const (
	Auto      Type = "auto"      // found out by asking the server
	Core      Type = "nats"      // core NATS
	JetStream Type = "jetstream" // streams of NATS JetStream
	Streaming Type = "stan"      // NATS Streaming
)

// Types lists the values of broker_type.
func Types() []Type { return []Type{Auto, Core, JetStream, Streaming} }

// Defaults of a [Config].
const (
	DefaultGroup   = "sheaf-connector"
	DefaultCluster = "faas-cluster"
	DefaultStream  = "sheaf-topics"
	DefaultDead    = "sheaf.dead"
	DefaultAckWait = 30 * time.Second
	// deadAge is how long a buried message is kept, as long as there is room.
	deadAge = 7 * 24 * time.Hour
	// deadBytes is how many bytes of buried messages are kept; the oldest go first.
	deadBytes = 1 << 30
	// goneAfter is how long a durable place in a stream is kept for a topic to
	// which nobody listens any more.
	goneAfter = 7 * 24 * time.Hour
)

// Config says where a bus is and how it is used. The zero of every field but
// Conn is usable.
type Config struct {
	// Conn is the connection to NATS. It must reconnect for ever, as that of
	// Connect does. Closing it is up to the caller, after the Bus.
	Conn *nats.Conn
	Type Type // "" means auto
	// Group is the queue group: each message goes to one member. "" means
	// sheaf-connector.
	Group string
	// Cluster is the ID of the NATS Streaming cluster; "" means faas-cluster.
	Cluster string
	// Stream is the JetStream stream that is made for topics which no stream
	// holds, with Type jetstream; "" means sheaf-topics.
	Stream string
	// Dead is the subject under which messages are buried, as DEAD.TOPIC; ""
	// means sheaf.dead.
	Dead string
	// AckWait is how long a bus waits for an outcome before it delivers a
	// message again; 0 means 30 seconds. Only JetStream can be told that the
	// work goes on, so on NATS Streaming it must be longer than any work.
	AckWait time.Duration
	// Inflight is how many messages of one topic may be without an outcome; 0
	// means 64.
	Inflight int
	// Grace is how long, at the end of a Subscribe, messages that were taken
	// may wait for their outcome; 0 means 30 seconds.
	Grace time.Duration
	Log   *slog.Logger // nil means slog.Default
	// Lost is told how many messages of a topic a bus has thrown away; nil
	// means that they are only logged.
	Lost func(topic string, n int)
}

func (c *Config) withDefaults() {
	or := func(p *string, def string) {
		if *p == "" {
			*p = def
		}
	}
	or(&c.Group, DefaultGroup)
	or(&c.Cluster, DefaultCluster)
	or(&c.Stream, DefaultStream)
	or(&c.Dead, DefaultDead)
	or((*string)(&c.Type), string(Auto))
	if c.AckWait <= 0 {
		c.AckWait = DefaultAckWait
	}
	if c.Inflight <= 0 {
		c.Inflight = 64
	}
	if c.Grace <= 0 {
		c.Grace = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Lost == nil {
		c.Lost = func(string, int) {}
	}
}

// A Message is one message. One that was delivered must be given one outcome:
// Ack or Again.
type Message struct {
	Topic  string // the subject it was published on
	Reply  string // where an answer is wanted; "" for nowhere
	Header Header
	Data   []byte
	// Delivery counts the deliveries of this message, from 1; on a bus that
	// does not count, it is 1.
	Delivery int

	once  sync.Once
	ack   func() error
	again func() error
}

// Ack says that the message is done with, whatever came of it.
func (m *Message) Ack() (err error) {
	m.once.Do(func() {
		if m.ack != nil {
			err = m.ack()
		}
	})
	if err != nil {
		return fmt.Errorf("acknowledge a message of %s: %w", m.Topic, err)
	}
	return nil
}

// Lasting says whether the bus keeps the message until it has its outcome.
func (m *Message) Lasting() bool { return m.again != nil }

// Again gives the message back, to be delivered again to anybody of the group.
// Core NATS takes nothing back: ok is false then, and the message is gone.
func (m *Message) Again() (ok bool, err error) {
	m.once.Do(func() {
		if m.again != nil {
			ok, err = true, m.again()
		}
	})
	if err != nil {
		return ok, fmt.Errorf("give a message of %s back: %w", m.Topic, err)
	}
	return ok, nil
}

// A Bus delivers messages. Its methods may be called concurrently.
type Bus interface {
	// Guarantees says what this bus promises.
	Guarantees() Guarantees
	// Subscribe delivers the messages of a topic, which may hold wildcards,
	// until ctx ends; then it takes no more, delivers what it has taken, and
	// returns nil. deliver is called for one message at a time and may wait, so
	// that the bus holds the next ones back; it must arrange that the message
	// gets its outcome. When NATS is away Subscribe waits for it. It returns an
	// error only for a topic that this bus can never deliver.
	Subscribe(ctx context.Context, topic string, deliver func(*Message)) error
	// Bury puts a message aside, under DEAD.TOPIC, with the reason in its
	// headers. It does not give the message its outcome.
	Bury(ctx context.Context, m *Message, reason string) error
	// Redrive publishes buried messages of a topic again, or those of all
	// topics when topic is "", and returns how many. What it published is no
	// longer buried.
	Redrive(ctx context.Context, topic string) (int, error)
	// Ready says why the bus does not work at present, or nil.
	Ready() error
	// Close ends what the bus holds. Every Subscribe must have returned.
	Close()
}

// Headers that a Bus sets on a buried message.
const (
	HeaderReason = "Sheaf-Reason" // why it was buried, a sentence
	HeaderTopic  = "Sheaf-Topic"  // it was published on
)

// ErrWildcard says that a bus knows no wildcards.
var ErrWildcard = errors.New("this bus knows no wildcards; bind the function to whole topics")

// A Header is the header of a message: values by name, where names are case
// sensitive, as in NATS. Get and Set use the canonical form of HTTP, and Get
// finds any other.
type Header map[string][]string

// Get returns the first value of a name in any case, or "".
func (h Header) Get(name string) string {
	if v := h[textproto.CanonicalMIMEHeaderKey(name)]; len(v) > 0 {
		return v[0]
	}
	for k, v := range h {
		if len(v) > 0 && strings.EqualFold(k, name) {
			return v[0]
		}
	}
	return ""
}

// Set sets a name's only value.
func (h Header) Set(name, value string) {
	h.Del(name)
	h[textproto.CanonicalMIMEHeaderKey(name)] = []string{value}
}

// Del removes a name, in any case.
func (h Header) Del(name string) {
	for k := range h {
		if strings.EqualFold(k, name) {
			delete(h, k)
		}
	}
}

// Clone returns a deep copy, never nil.
func (h Header) Clone() Header {
	c := make(Header, len(h))
	for k, v := range h {
		c[k] = slices.Clone(v)
	}
	return c
}

// Options say how Connect connects, beside where.
type Options struct {
	Name        string // of the connection, as the server shows it
	Credentials string // path of a file with a user's credentials, or an nkey's seed; "" for none
	CA          string // path of a file with the certificates of authorities; "" for those of the system
	Log         *slog.Logger
}

// Connect returns a connection to the NATS at url that reconnects for ever, and
// that is returned even if no server is there yet. It fails only when url or a
// file cannot be used.
func Connect(url string, o Options) (*nats.Conn, error) {
	log := o.Log
	if log == nil {
		log = slog.Default()
	}
	opts := []nats.Option{
		nats.Name(o.Name), nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(250 * time.Millisecond),
		nats.PingInterval(10 * time.Second), nats.MaxPingsOutstanding(2),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("NATS is away; connecting again", "err", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) { log.Info("NATS is back", "server", nc.ConnectedServerName()) }),
		nats.ErrorHandler(func(_ *nats.Conn, s *nats.Subscription, err error) {
			switch {
			case errors.Is(err, nats.ErrSlowConsumer): // of which the bus tells more
			case s != nil:
				log.Warn("NATS", "subject", s.Subject, "err", err)
			default: // such as what permissions do not allow
				log.Warn("NATS", "err", err)
			}
		}),
	}
	if o.Credentials != "" {
		secret, err := os.ReadFile(o.Credentials)
		if err != nil {
			return nil, fmt.Errorf("credentials for NATS: %w", err)
		}
		user, err := login.Options(secret)
		if err != nil {
			return nil, fmt.Errorf("credentials for NATS: %s: %w", o.Credentials, err)
		}
		opts = append(opts, user...)
	}
	if o.CA != "" {
		pem, err := os.ReadFile(o.CA)
		if err != nil {
			return nil, fmt.Errorf("authorities for NATS: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("authorities for NATS: %s holds no certificate in PEM form", o.CA)
		}
		opts = append(opts, nats.Secure(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}))
	}
	nc, err := nats.Connect(url, opts...)
	if err != nil { // it repeats the URL, which may hold a password
		return nil, errors.New("the URL of NATS cannot be used; expected one such as nats://nats.openfaas:4222")
	}
	return nc, nil
}

// Open returns the bus that cfg asks for. It waits until NATS is there, since
// only the server can say what it is.
func Open(ctx context.Context, cfg Config) (Bus, error) {
	cfg.withDefaults()
	if !slices.Contains(Types(), cfg.Type) {
		return nil, fmt.Errorf("type of broker is %q, and must be one of %v", cfg.Type, Types())
	}
	if err := waitFor(ctx, cfg.Conn, cfg.Log); err != nil {
		return nil, err
	}
	switch cfg.Type {
	case Streaming:
		return openStreaming(ctx, cfg)
	case Auto:
		if hasStreaming(ctx, cfg) {
			return openStreaming(ctx, cfg)
		}
	}
	js, err := jetstream.New(cfg.Conn)
	if err != nil {
		return nil, fmt.Errorf("open JetStream: %w", err)
	}
	c := &core{Config: cfg, js: js}
	if cfg.Type == Core {
		return c, nil
	}
	return &streams{core: c}, nil
}

// waitFor waits until NATS is connected.
func waitFor(ctx context.Context, nc *nats.Conn, log *slog.Logger) error {
	told := false
	for begun := time.Now(); !nc.IsConnected(); {
		if !told && time.Since(begun) > time.Second {
			told = true
			log.Warn("NATS is not there yet; waiting for it")
		}
		if !pause(ctx, 50*time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return nil
}

// pause waits, and says whether ctx still runs.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// again runs f until it returns nil or ctx ends, with a pause after each error
// that grows to five seconds and is short again once f has run for long.
func again(ctx context.Context, log *slog.Logger, what string, f func() error) {
	wait := 50 * time.Millisecond
	for ctx.Err() == nil {
		begun := time.Now()
		err := f()
		if err == nil || ctx.Err() != nil {
			return
		}
		if time.Since(begun) > 10*time.Second {
			wait = 50 * time.Millisecond
		}
		log.Warn(what+"; trying again", "err", err, "pause", wait)
		pause(ctx, wait)
		wait = min(2*wait, 5*time.Second)
	}
}
