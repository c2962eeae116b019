package broker

// streaming.go is the only file that knows NATS Streaming, which is at its end
// of life and which OpenFaaS CE still ships.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"github.com/nats-io/stan.go"
)

// streaming is NATS Streaming: durable queue subscriptions with manual
// acknowledgement. Its client does not reconnect; a session that the server
// has forgotten is replaced by a new one here, with all its subscriptions.
type streaming struct {
	Config

	mu      sync.Mutex    // guards all below
	session stan.Conn     // nil while there is none
	lost    chan struct{} // closed when session is lost; of the present session
	opened  chan struct{} // closed, and made anew, when a session opens

	stop context.CancelFunc
	wg   sync.WaitGroup
}

var _ Bus = (*streaming)(nil)

// sessionPings is how often the server is asked whether it knows the session,
// in seconds, and how often it may not answer.
const (
	sessionPing    = 2
	sessionMissing = 5
)

// hasStreaming says whether a NATS Streaming server answers.
func hasStreaming(ctx context.Context, c Config) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	// A request to discover the cluster that is not one: the server answers
	// with an error, and makes no session.
	_, err := c.Conn.RequestWithContext(ctx, stan.DefaultDiscoverPrefix+"."+c.Cluster, nil)
	return err == nil
}

func openStreaming(ctx context.Context, cfg Config) (Bus, error) {
	s := &streaming{Config: cfg, opened: make(chan struct{})}
	if err := s.connect(); err != nil {
		s.Log.Warn("NATS Streaming is not there yet; waiting for it", "cluster", s.Cluster, "err", err)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	s.wg.Go(func() { s.keep(run) })
	return s, nil
}

// connect opens a session.
func (s *streaming) connect() error {
	lost := make(chan struct{})
	session, err := stan.Connect(s.Cluster, s.Group+"-"+nuid.Next(), stan.NatsConn(s.Conn),
		stan.ConnectWait(3*time.Second), stan.PubAckWait(10*time.Second), stan.Pings(sessionPing, sessionMissing),
		stan.SetConnectionLostHandler(func(_ stan.Conn, err error) {
			s.Log.Warn("the session with NATS Streaming is lost; opening another", "err", err)
			close(lost)
		}))
	if err != nil {
		return fmt.Errorf("open a session with NATS Streaming cluster %s: %w", s.Cluster, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.session, s.lost = session, lost
	close(s.opened)
	s.opened = make(chan struct{})
	return nil
}

// keep keeps a session open.
func (s *streaming) keep(ctx context.Context) {
	for ctx.Err() == nil {
		s.mu.Lock()
		session, lost := s.session, s.lost
		s.mu.Unlock()
		if session == nil {
			if !s.Conn.IsConnected() || s.connect() != nil {
				pause(ctx, 500*time.Millisecond)
			}
			continue
		}
		select {
		case <-ctx.Done():
		case <-lost:
			s.mu.Lock()
			s.session = nil
			s.mu.Unlock()
			_ = session.Close() // the server may not know it any more
		}
	}
}

// current waits for a session.
func (s *streaming) current(ctx context.Context) (stan.Conn, <-chan struct{}, error) {
	for {
		s.mu.Lock()
		session, lost, opened := s.session, s.lost, s.opened
		s.mu.Unlock()
		if session != nil {
			return session, lost, nil
		}
		select {
		case <-opened:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("wait for NATS Streaming: %w", context.Cause(ctx))
		}
	}
}

func (s *streaming) Guarantees() Guarantees { return streamingGuarantees }

func (s *streaming) Subscribe(ctx context.Context, topic string, deliver func(*Message)) error {
	if HasWildcard(topic) {
		return fmt.Errorf("listen to %s: %w", topic, ErrWildcard)
	}
	busy := &sequences{held: map[uint64]bool{}}
	again(ctx, s.Log, "topic "+topic+" cannot be listened to", func() error {
		session, lost, err := s.current(ctx)
		if err != nil {
			return err
		}
		var taken sync.WaitGroup // messages whose outcome is open
		sub, err := session.QueueSubscribe(topic, s.Group, func(m *stan.Msg) {
			if ctx.Err() != nil || !busy.take(m.Sequence) {
				return // it comes again; or it did, because the work on it takes long
			}
			taken.Add(1)
			h, data := unseal(m.Data)
			end := sync.OnceFunc(func() { busy.leave(m.Sequence); taken.Done() })
			deliver(&Message{
				Topic: m.Subject, Header: h, Data: data, Delivery: 1 + int(m.RedeliveryCount),
				ack:   func() error { defer end(); return m.Ack() },
				again: func() error { end(); return nil }, // it comes again when AckWait is over
			})
		}, stan.DurableName(s.Group), stan.SetManualAckMode(), stan.AckWait(max(s.AckWait, time.Second)), stan.MaxInflight(s.Inflight))
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-lost:
			return errors.New("the session is lost")
		}
		// Outcomes can be told only while the subscription is open, and nothing
		// can be done about new messages until it is closed: they come again.
		done := make(chan struct{})
		go func() { taken.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(s.Grace):
		case <-lost:
		}
		_ = sub.Close() // which keeps the durable place; a session that is lost has closed it
		return nil
	})
	return nil
}

// sequences are the messages of a topic that are being worked on.
type sequences struct {
	mu   sync.Mutex // guards held
	held map[uint64]bool
}

func (s *sequences) take(n uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[n] {
		return false
	}
	s.held[n] = true
	return true
}

func (s *sequences) leave(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, n)
}

func (s *streaming) publish(ctx context.Context, topic string, h Header, data []byte) error {
	session, _, err := s.current(ctx)
	if err != nil {
		return err
	}
	return session.Publish(topic, seal(h, data))
}

func (s *streaming) Bury(ctx context.Context, m *Message, reason string) error {
	h := m.Header.Clone()
	h.Set(HeaderReason, reason)
	h.Set(HeaderTopic, m.Topic)
	if err := s.publish(ctx, s.Dead+"."+m.Topic, h, m.Data); err != nil {
		return fmt.Errorf("bury a message of %s: %w", m.Topic, err)
	}
	return nil
}

// redriveIdle is how long nothing may come from a channel of buried messages
// until all are taken: the server does not say when there are no more.
const redriveIdle = time.Second

func (s *streaming) Redrive(ctx context.Context, topic string) (n int, err error) {
	if topic == "" {
		return 0, fmt.Errorf("redrive dead letters: NATS Streaming cannot list its channels; name one topic: %w", ErrWildcard)
	}
	session, _, err := s.current(ctx)
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	came := make(chan *stan.Msg)
	leave := make(chan struct{})
	sub, err := session.QueueSubscribe(s.Dead+"."+topic, s.Group, func(m *stan.Msg) {
		select {
		case came <- m:
		case <-leave:
		}
	}, stan.DurableName(s.Group), stan.SetManualAckMode(), stan.DeliverAllAvailable(), stan.MaxInflight(1))
	if err != nil {
		return 0, fmt.Errorf("redrive dead letters of %s: %w", topic, err)
	}
	defer func() {
		close(leave)
		if e := sub.Close(); err == nil && e != nil && !errors.Is(e, nats.ErrConnectionClosed) {
			err = e
		}
	}()
	for {
		select {
		case m := <-came:
			if time.Unix(0, m.Timestamp).After(begun) {
				return n, nil // it has failed again
			}
			h, data := unseal(m.Data)
			to := strings.TrimPrefix(m.Subject, s.Dead+".")
			h.Del(HeaderReason)
			h.Del(HeaderTopic)
			if err := s.publish(ctx, to, h, data); err != nil {
				return n, fmt.Errorf("redrive dead letters of %s: %w", topic, err)
			}
			if err := m.Ack(); err != nil {
				return n, fmt.Errorf("redrive dead letters of %s: %w", topic, err)
			}
			n++
		case <-time.After(redriveIdle):
			return n, nil
		case <-ctx.Done():
			return n, context.Cause(ctx)
		}
	}
}

func (s *streaming) Ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session == nil || !s.Conn.IsConnected() {
		return errors.New("NATS Streaming is away")
	}
	return nil
}

func (s *streaming) Close() {
	s.stop()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session != nil {
		_ = s.session.Close() // the server forgets a session that does not say goodbye, later
		s.session = nil
	}
}
