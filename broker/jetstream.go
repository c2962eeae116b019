package broker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// streams is JetStream: each topic has a durable consumer, from which the
// members of the group pull. With Type auto only the topics that some stream
// holds are; the others are listened to as core NATS does.
type streams struct {
	*core
	making sync.Mutex // of the stream for topics, held while it is changed
}

var _ Bus = (*streams)(nil)

// Guarantees tells of topics that a stream holds.
func (s *streams) Guarantees() Guarantees { return streamGuarantees }

// lookAgain is how often a topic is looked for in streams, while none holds it.
const lookAgain = 5 * time.Second

func (s *streams) Subscribe(ctx context.Context, topic string, deliver func(*Message)) error {
	again(ctx, s.Log, "topic "+topic+" cannot be listened to", func() error {
		ask, cancel := context.WithTimeout(ctx, 10*time.Second)
		held, err := s.holder(ask, topic)
		if err == nil && held == nil && s.Type == JetStream {
			held, err = s.hold(ask, topic)
		}
		cancel()
		switch {
		case err != nil:
			return err
		case held != nil:
			return s.consume(ctx, held, topic, deliver)
		}
		// No stream holds it. One may, later.
		leave := make(chan struct{})
		var wg sync.WaitGroup
		looking, stop := context.WithCancel(ctx)
		wg.Go(func() {
			for pause(looking, lookAgain) {
				if held, err := s.holder(looking, topic); err == nil && held != nil {
					close(leave)
					return
				}
			}
		})
		err = s.listen(ctx, topic, deliver, leave)
		stop()
		wg.Wait()
		if err == nil && ctx.Err() == nil {
			return errors.New("a stream holds it now") // so it is looked for at once
		}
		return err
	})
	return nil
}

// hold has the stream for topics hold a topic, too.
func (s *streams) hold(ctx context.Context, topic string) (jetstream.Stream, error) {
	s.making.Lock()
	defer s.making.Unlock()
	for {
		old, err := s.js.Stream(ctx, s.Stream)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			made, err := s.js.CreateStream(ctx, jetstream.StreamConfig{
				Name: s.Stream, Description: "topics of functions", Subjects: []string{topic},
				Storage: jetstream.FileStorage, MaxAge: deadAge, MaxBytes: deadBytes, Discard: jetstream.DiscardOld,
			})
			if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
				continue // another connector was first
			}
			if err != nil {
				return nil, fmt.Errorf("make stream %s: %w", s.Stream, err)
			}
			return made, nil
		}
		if err != nil {
			return nil, fmt.Errorf("open stream %s: %w", s.Stream, err)
		}
		cfg := old.CachedInfo().Config
		cfg.Subjects = disjoint(append(slices.Clone(cfg.Subjects), topic))
		changed, err := s.js.UpdateStream(ctx, cfg)
		if err != nil {
			return nil, fmt.Errorf("have stream %s hold %s: %w", s.Stream, topic, err)
		}
		// Another connector may have added a topic of its own at this moment.
		if slices.ContainsFunc(changed.CachedInfo().Config.Subjects, func(o string) bool { return Covers(o, topic) }) {
			return changed, nil
		}
	}
}

// durable is the name of the consumer of a topic: names may hold no dots and
// no wildcards.
func (s *streams) durable(topic string) string {
	sum := sha256.Sum256([]byte(topic))
	return s.Group + "-" + hex.EncodeToString(sum[:6])
}

// consumer makes or finds the durable consumer of a topic. A new one begins at
// what is published from now on, or where the group had stopped in topics that
// this one overlaps with: whatever waits for them may become this one's.
func (s *streams) consumer(ctx context.Context, held jetstream.Stream, topic string) (jetstream.Consumer, error) {
	cfg := jetstream.ConsumerConfig{
		Durable: s.durable(topic), Description: "connector, topic " + topic, FilterSubject: topic,
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: s.AckWait, MaxAckPending: 100 * s.Inflight, MaxDeliver: -1,
		DeliverPolicy: jetstream.DeliverNewPolicy, InactiveThreshold: goneAfter, Metadata: map[string]string{"sheaf-group": s.Group},
	}
	old, err := held.Consumer(ctx, cfg.Durable)
	switch {
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		list := held.ListConsumers(ctx)
		for info := range list.Info() {
			if info.Config.Metadata["sheaf-group"] != s.Group || !Overlap(topic, info.Config.FilterSubject) {
				continue
			}
			if next := info.AckFloor.Stream + 1; cfg.OptStartSeq == 0 || next < cfg.OptStartSeq {
				cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, next
			}
		}
		if err := list.Err(); err != nil {
			return nil, fmt.Errorf("list consumers: %w", err)
		}
	case err != nil:
		return nil, fmt.Errorf("consumer of %s: %w", topic, err)
	default: // where it began cannot be changed
		was := old.CachedInfo().Config
		cfg.DeliverPolicy, cfg.OptStartSeq = was.DeliverPolicy, was.OptStartSeq
	}
	made, err := held.CreateOrUpdateConsumer(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("consumer of %s: %w", topic, err)
	}
	return made, nil
}

// consume delivers from a stream until ctx ends, and then what was pulled.
func (s *streams) consume(ctx context.Context, held jetstream.Stream, topic string, deliver func(*Message)) error {
	ask, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	consumer, err := s.consumer(ask, held, topic)
	if err != nil {
		return err
	}
	// Few are pulled ahead: what waits here, other members of the group cannot
	// work on.
	pulled, err := consumer.Messages(jetstream.PullMaxMessages(max(2, s.Inflight/4)), jetstream.PullHeartbeat(5*time.Second))
	if err != nil {
		return fmt.Errorf("pull from %s: %w", topic, err)
	}
	defer context.AfterFunc(ctx, pulled.Drain)()
	for {
		m, err := pulled.Next()
		switch {
		case errors.Is(err, jetstream.ErrMsgIteratorClosed):
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("pull from %s: %w", topic, err)
		case errors.Is(err, jetstream.ErrNoHeartbeat) && ctx.Err() == nil && !s.Conn.IsConnected():
			continue // it pulls again when NATS is back
		case err != nil:
			pulled.Stop()
			return fmt.Errorf("pull from %s: %w", topic, err)
		}
		deliver(s.message(m))
	}
}

// message is a delivery whose lease is extended until it has its outcome.
func (s *streams) message(m jetstream.Msg) *Message {
	done := make(chan struct{})
	out := &Message{Topic: m.Subject(), Header: Header(m.Headers()), Data: m.Data(), Delivery: 1}
	if meta, err := m.Metadata(); err == nil {
		out.Delivery = int(meta.NumDelivered)
	}
	settle := func(f func() error) func() error {
		return func() error { close(done); return f() }
	}
	out.ack, out.again = settle(m.Ack), settle(m.Nak)
	go func() { // ends with the outcome, that every message gets
		tick := time.NewTicker(s.AckWait / 3)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				_ = m.InProgress() // while NATS is away the lease may end: then the message comes again
			}
		}
	}()
	return out
}
