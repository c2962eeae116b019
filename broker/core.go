package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// core is core NATS: what is published reaches who listens at that moment, at
// most once.
type core struct {
	Config
	js jetstream.JetStream
}

var _ Bus = (*core)(nil)

func (c *core) Guarantees() Guarantees { return coreGuarantees }

// pending is how many messages of one topic, and how many bytes of them, the
// client keeps while deliver waits. What comes beyond is lost, and told.
const (
	pendingMessages = 64 << 10
	pendingBytes    = 64 << 20
)

func (c *core) Subscribe(ctx context.Context, topic string, deliver func(*Message)) error {
	return c.listen(ctx, topic, deliver, nil)
}

// listen is Subscribe that also ends when leave yields.
func (c *core) listen(ctx context.Context, topic string, deliver func(*Message), leave <-chan struct{}) error {
	var lost atomic.Int64
	tell := func(s *nats.Subscription) {
		if n, err := s.Dropped(); err == nil {
			if more := int64(n) - lost.Swap(int64(n)); more > 0 {
				c.Log.Error("messages came faster than they could be worked on, and were lost", "topic", topic, "lost", more)
				c.Lost(topic, int(more))
			}
		}
	}
	sub, err := c.Conn.QueueSubscribe(topic, c.Group, func(m *nats.Msg) {
		tell(m.Sub)
		deliver(&Message{Topic: m.Subject, Reply: m.Reply, Header: Header(m.Header), Data: m.Data, Delivery: 1})
	})
	if err != nil {
		return fmt.Errorf("listen to %s: %w", topic, err)
	}
	_ = sub.SetPendingLimits(pendingMessages, pendingBytes) // it fails only for a closed subscription, which tells below
	ended := make(chan struct{})
	sub.SetClosedHandler(func(string) { close(ended) })
	select {
	case <-ctx.Done():
	case <-leave:
	case <-ended:
		return nil // with its connection
	}
	tell(sub)
	if err := sub.Drain(); err != nil {
		// NATS is away: nothing more comes, and what came waits in the client.
		if errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrBadSubscription) {
			return nil
		}
		_ = sub.Unsubscribe() // as good as it can be ended
	}
	select {
	case <-ended:
	case <-time.After(c.Grace):
	}
	return nil
}

// deadStream is the stream that keeps buried messages.
const deadStream = "sheaf-dead"

// grave makes the stream for buried messages, or finds it.
func (c *core) grave(ctx context.Context) (jetstream.Stream, error) {
	s, err := c.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: deadStream, Description: "messages that no function could work on",
		Subjects: []string{c.Dead + ".>"}, Storage: jetstream.FileStorage, MaxAge: deadAge, MaxBytes: deadBytes,
		Discard: jetstream.DiscardOld, AllowDirect: true,
	})
	if err != nil {
		return nil, fmt.Errorf("stream %s for dead letters: %w", deadStream, err)
	}
	return s, nil
}

func (c *core) Bury(ctx context.Context, m *Message, reason string) error {
	if _, err := c.grave(ctx); err != nil {
		if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) || errors.Is(err, nats.ErrNoResponders) {
			// Nothing here can keep it. Whoever listens gets it.
			if err := c.Conn.PublishMsg(c.dead(m, reason)); err != nil {
				return fmt.Errorf("bury a message of %s: %w", m.Topic, err)
			}
			return nil
		}
		return fmt.Errorf("bury a message of %s: %w", m.Topic, err)
	}
	if _, err := c.js.PublishMsg(ctx, c.dead(m, reason)); err != nil {
		return fmt.Errorf("bury a message of %s: %w", m.Topic, err)
	}
	return nil
}

// dead is the message as it is buried.
func (c *core) dead(m *Message, reason string) *nats.Msg {
	h := m.Header.Clone()
	h.Set(HeaderReason, oneLine(reason))
	h.Set(HeaderTopic, m.Topic)
	h.Del(jetstream.MsgIDHeader) // a second burial of the same message is no duplicate
	return &nats.Msg{Subject: c.Config.Dead + "." + m.Topic, Header: nats.Header(h), Data: m.Data}
}

func (c *core) Redrive(ctx context.Context, topic string) (int, error) {
	fail := func(n int, err error) (int, error) {
		return n, fmt.Errorf("redrive dead letters: %w", err)
	}
	s, err := c.grave(ctx)
	if err != nil {
		return fail(0, err)
	}
	filter := c.Config.Dead + ".>"
	if topic != "" {
		filter = c.Config.Dead + "." + topic
	}
	last := s.CachedInfo().State.LastSeq // what fails again comes after it
	n := 0
	for seq := s.CachedInfo().State.FirstSeq; seq <= last; {
		raw, err := s.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(filter))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return n, nil
		}
		if err != nil {
			return fail(n, err)
		}
		if raw.Sequence > last {
			return n, nil
		}
		h := Header(raw.Header).Clone()
		to := strings.TrimPrefix(raw.Subject, c.Config.Dead+".")
		h.Del(HeaderReason)
		h.Del(HeaderTopic)
		if err := c.publish(ctx, to, h, raw.Data); err != nil {
			return fail(n, err)
		}
		if err := s.DeleteMsg(ctx, raw.Sequence); err != nil {
			return fail(n, err)
		}
		n++
		seq = raw.Sequence + 1
	}
	return n, nil
}

// publish publishes a message, and waits until a stream has it if one holds the
// topic, or else until the server has it.
func (c *core) publish(ctx context.Context, topic string, h Header, data []byte) error {
	m := &nats.Msg{Subject: topic, Header: nats.Header(h), Data: data}
	if held, err := c.holder(ctx, topic); err != nil {
		return err
	} else if held != nil {
		_, err := c.js.PublishMsg(ctx, m)
		return err
	}
	if err := c.Conn.PublishMsg(m); err != nil {
		return err
	}
	return c.Conn.FlushWithContext(ctx)
}

// holder returns the stream that holds every message of a topic, or nil.
func (c *core) holder(ctx context.Context, topic string) (jetstream.Stream, error) {
	names := c.js.StreamNames(ctx, jetstream.WithStreamListSubject(topic))
	var found jetstream.Stream
	for name := range names.Name() {
		s, err := c.js.Stream(ctx, name)
		if err != nil {
			continue // it went meanwhile
		}
		for _, subject := range s.CachedInfo().Config.Subjects {
			if found == nil && Covers(subject, topic) {
				found = s
			}
		}
	}
	if err := names.Err(); err != nil && !absent(err) {
		return nil, fmt.Errorf("look for a stream that holds %s: %w", topic, err)
	}
	return found, nil
}

// absent says whether an error means that there is no JetStream.
func absent(err error) bool {
	return errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) ||
		errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrEndOfData)
}

func (c *core) Ready() error {
	if !c.Conn.IsConnected() {
		return errors.New("NATS is away")
	}
	return nil
}

func (c *core) Close() {}
