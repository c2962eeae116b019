package topic

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// Defaults of a [Server].
const (
	DefaultLimit    = 256
	DefaultMaxBlock = 128 << 20
	DefaultGrace    = 30 * time.Second
	// longest is how long a call without a deadline may take.
	longest = 10 * time.Minute
)

// A Server takes calls from NATS and passes them to a gateway. Conn and Gateway
// must be set; the zero of every other field is usable. Its fields must not
// change once Run is called. Several Servers share the calls.
type Server struct {
	Conn     *nats.Conn
	Gateway  string        // URL
	Limit    int           // calls at once, beyond which callers are told to wait; 0 means 256
	MaxBlock int           // bytes; 0 means 128 MiB
	Grace    time.Duration // for calls to end when Run ends; 0 means 30 seconds
	// Begin is told of each call that begins, with the headers that it will have,
	// which it may change. What it returns is told how the call ended: "ok",
	// "refused" or "broken", with the bytes of block and result. Nil means nobody.
	Begin func(ctx context.Context, function string, header http.Header) (end func(outcome string, in, out int))
	Log   *slog.Logger // nil means slog.Default

	http  *http.Client
	inbox string
	slots chan struct{}

	mu    sync.Mutex // guards calls
	calls map[string]*call
}

// A call is one that is being worked on.
type call struct {
	s      *Server
	to     string // the caller's inbox
	id     string
	cancel context.CancelCauseFunc
	frames chan *nats.Msg
	size   int
}

var errLeft = errors.New("the caller no longer wants the answer")

// Run takes calls until ctx ends, and lets those that are being worked on end
// within Grace.
func (s *Server) Run(ctx context.Context) error {
	if s.Limit <= 0 {
		s.Limit = DefaultLimit
	}
	if s.MaxBlock <= 0 {
		s.MaxBlock = DefaultMaxBlock
	}
	if s.Grace <= 0 {
		s.Grace = DefaultGrace
	}
	if s.Log == nil {
		s.Log = slog.Default()
	}
	if s.Begin == nil {
		s.Begin = func(context.Context, string, http.Header) func(string, int, int) { return func(string, int, int) {} }
	}
	s.http, s.inbox, s.slots, s.calls = wire.NewHTTP(s.Limit), s.Conn.NewInbox(), make(chan struct{}, s.Limit), map[string]*call{}
	defer s.http.CloseIdleConnections()
	work, cut := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cut()

	var subs []*nats.Subscription
	listen := func(sub *nats.Subscription, err error) error {
		if err != nil {
			return fmt.Errorf("take calls from NATS: %w", err)
		}
		subs = append(subs, sub)
		return nil
	}
	defer func() {
		for _, sub := range subs {
			_ = sub.Unsubscribe() // it ends with its connection in any case
		}
	}()
	if err := errors.Join(
		listen(s.Conn.Subscribe(s.inbox+".*", func(m *nats.Msg) {
			s.mu.Lock()
			c := s.calls[token(m.Subject)]
			s.mu.Unlock()
			if c != nil {
				select {
				case c.frames <- m:
				default: // the caller asks for one part at a time
				}
			}
		})),
		listen(s.Conn.Subscribe(Cancels, func(m *nats.Msg) {
			s.mu.Lock()
			c := s.calls[string(m.Data)]
			s.mu.Unlock()
			if c != nil {
				c.cancel(errLeft)
			}
		})),
		listen(s.Conn.QueueSubscribe(Calls+">", group, func(m *nats.Msg) {
			if m.Reply == "" {
				return // nobody waits for what would come of it
			}
			select {
			case s.slots <- struct{}{}:
			default:
				s.busy(m)
				return
			}
			wg.Go(func() {
				defer func() { <-s.slots }()
				s.serve(work, m)
			})
		})),
	); err != nil {
		return err
	}
	<-ctx.Done()
	// Calls that the client has taken are still served.
	last := subs[len(subs)-1]
	gone := make(chan struct{})
	last.SetClosedHandler(func(string) { close(gone) })
	if last.Drain() == nil {
		select {
		case <-gone:
		case <-time.After(s.Grace):
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(s.Grace):
		cut()
		<-done
	}
	return nil
}

// busy tells a caller to wait.
func (s *Server) busy(m *nats.Msg) {
	s.Begin(context.Background(), strings.TrimPrefix(m.Subject, Calls), http.Header(m.Header))("refused", 0, 0)
	answer := frame(m.Reply, frameAnswer, []byte("the connector works on as many blocks as it may"))
	answer.Header.Set(headerStatus, strconv.Itoa(http.StatusTooManyRequests))
	answer.Header.Set(wire.RetryMS, "50")
	_ = s.Conn.PublishMsg(answer) // unheard, the caller gives up by itself
}

// serve works on one call.
func (s *Server) serve(ctx context.Context, m *nats.Msg) {
	limit := longest
	if ms := number(m.Header, wire.Deadline); ms > 0 {
		limit = min(limit, time.Duration(ms)*time.Millisecond)
	}
	ctx, done := context.WithTimeout(ctx, limit)
	defer done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c := &call{s: s, to: m.Reply, id: token(m.Reply), cancel: cancel, frames: make(chan *nats.Msg, 2), size: partSize(s.Conn)}
	s.mu.Lock()
	s.calls[c.id] = c
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.calls, c.id)
		s.mu.Unlock()
	}()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	wg.Go(func() {
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = s.Conn.PublishMsg(frame(c.to, frameWorking, nil)) // the next one may be heard
			case <-stop:
				return
			}
		}
	})
	end := s.Begin(ctx, strings.TrimPrefix(m.Subject, Calls), http.Header(m.Header))
	in, out, err := c.work(ctx, m)
	if err == nil {
		end("ok", in, out)
		return
	}
	end("broken", in, out)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	s.Log.Debug("a block's call broke off", "subject", m.Subject, "err", err)
	if !errors.Is(err, errLeft) && !errors.Is(err, context.DeadlineExceeded) { // the caller's deadline has come, too
		_ = s.Conn.PublishMsg(frame(c.to, frameBroken, []byte(err.Error()))) // unheard, the caller gives up by itself
	}
}

// work passes the call on and its answer back.
func (c *call) work(ctx context.Context, m *nats.Msg) (in, out int, err error) {
	body, err := c.body(ctx, m)
	if err != nil {
		return len(body), 0, err
	}
	function := strings.TrimPrefix(m.Subject, Calls)
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(c.s.Gateway, "/")+"/function/"+url.PathEscape(function), bytes.NewReader(body))
	if err != nil {
		return len(body), 0, err
	}
	if len(body) == 0 {
		hr.Body, hr.ContentLength = http.NoBody, 0
	}
	hr.GetBody = nil // a transport that sends again in silence would run the handler twice unseen
	strip(m.Header)
	hr.Header = http.Header(m.Header)
	resp, err := c.s.http.Do(hr)
	if err != nil {
		return len(body), 0, err
	}
	defer resp.Body.Close()
	size := c.size
	if n := resp.ContentLength; n >= 0 {
		size = int(min(n+1, int64(size))) // one more, for the read that meets the end
	}
	buf := make([]byte, size)
	head := frame(c.to, frameAnswer, nil)
	maps.Copy(head.Header, resp.Header)
	head.Header[headerFrame] = []string{frameAnswer}
	head.Header[headerStatus] = []string{strconv.Itoa(resp.StatusCode)}
	if resp.ContentLength >= 0 {
		head.Header["Content-Length"] = []string{strconv.FormatInt(resp.ContentLength, 10)}
	} else {
		delete(head.Header, "Content-Length")
	}
	for next := head; ; {
		n, err := fill(resp.Body, buf)
		end := errors.Is(err, io.EOF)
		if err != nil && !end {
			return len(body), out, fmt.Errorf("answer was cut after %d bytes: %w", out+n, err)
		}
		out += n
		next.Data = buf[:n]
		if end {
			return len(body), out, c.s.Conn.PublishMsg(next)
		}
		next.Header[headerMore] = []string{"1"}
		next.Reply = c.subject()
		if err := c.s.Conn.PublishMsg(next); err != nil {
			return len(body), out, err
		}
		to, err := c.asked(ctx)
		if err != nil {
			return len(body), out, err
		}
		next = frame(to, framePart, nil)
	}
}

// fill reads until buf is full or the reader's error, which may be io.EOF.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var k int
		k, err = r.Read(buf[n:])
		n += k
	}
	return n, err
}

func (c *call) subject() string { return c.s.inbox + "." + c.id }

// body returns the whole block, asking for the parts that the call did not bring.
func (c *call) body(ctx context.Context, m *nats.Msg) ([]byte, error) {
	whole := number(m.Header, headerLength)
	switch {
	case whole < len(m.Data):
		return nil, errors.New("the call does not tell how long its block is")
	case whole > c.s.MaxBlock:
		return nil, fmt.Errorf("the block has %d bytes, and a connector takes %d", whole, c.s.MaxBlock)
	case whole == len(m.Data):
		return m.Data, nil
	}
	body := append(make([]byte, 0, min(whole, 8<<20)), m.Data...) // memory is taken as bytes come
	for len(body) < whole {
		ask := frame(c.to, frameMore, nil)
		ask.Reply = c.subject()
		if err := c.s.Conn.PublishMsg(ask); err != nil {
			return body, err
		}
		part, err := c.heard(ctx)
		if err != nil {
			return body, err
		}
		if first(part.Header, headerFrame) != framePart || len(part.Data) == 0 || len(body)+len(part.Data) > whole {
			return body, errors.New("the caller sent a part that does not fit")
		}
		body = append(body, part.Data...)
	}
	return body, nil
}

// asked waits until the caller wants the next part, and says where.
func (c *call) asked(ctx context.Context) (string, error) {
	m, err := c.heard(ctx)
	if err != nil {
		return "", err
	}
	if first(m.Header, headerFrame) != frameMore || m.Reply == "" {
		return "", errors.New("the caller sent a frame that was not asked for")
	}
	return m.Reply, nil
}

// heard waits for a frame of the caller.
func (c *call) heard(ctx context.Context) (*nats.Msg, error) {
	quiet := time.NewTimer(silence)
	defer quiet.Stop()
	select {
	case m := <-c.frames:
		return m, nil
	case <-quiet.C:
		return nil, errSilent
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
