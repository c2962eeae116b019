package topic

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A Route calls functions by messages. It cannot address a replica. It may be
// used concurrently. Make one with New.
type Route struct {
	caller wire.Caller
	bus    *transport
}

var _ sheaf.Route = (*Route)(nil)

// New returns a Route over nc, which stays the caller's to close, after the
// Route. maxReply is how long an answer may be, in bytes; 0 means 64 MiB.
func New(nc *nats.Conn, maxReply int64) (*Route, error) {
	t := &transport{nc: nc, inbox: nc.NewInbox(), calls: map[string]chan *nats.Msg{}}
	var err error
	if t.sub, err = nc.Subscribe(t.inbox+".*", t.dispatch); err != nil {
		return nil, fmt.Errorf("route topic: %w", err)
	}
	return &Route{bus: t, caller: wire.Caller{MaxReply: maxReply, HTTP: &http.Client{
		Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}}, nil
}

// Sign makes the route sign what it sends and take signed answers only, unless
// s is lax. It must come before the first Call.
func (r *Route) Sign(s *wire.Signer) { r.caller.Signer = s }

// Call sends the request to a connector. It fails with sheaf.ErrNotAddressable
// when req names a replica.
func (r *Route) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	if req.To.ID != "" {
		return nil, fmt.Errorf("route topic: %w", sheaf.ErrNotAddressable)
	}
	if req.Function == "" || strings.ContainsAny(req.Function, " \t\r\n*>/?#%") {
		return nil, &sheaf.CallError{Fault: sheaf.FaultRejected, Err: fmt.Errorf("function %q has no subject; its name may hold no blank, wildcard or slash", wire.Cut(req.Function))}
	}
	return r.caller.Post(ctx, "http://"+Calls+"/"+req.Function, req)
}

// Close ends the Route. Calls that are under way fail.
func (r *Route) Close() { _ = r.bus.sub.Unsubscribe() } // it ends with its connection in any case

// transport carries HTTP requests by messages.
type transport struct {
	nc    *nats.Conn
	inbox string
	sub   *nats.Subscription

	mu    sync.Mutex // guards calls
	calls map[string]chan *nats.Msg
}

// dispatch hands a frame to the call that it is for. The other side sends one
// frame and waits, but for what says that it works: that one may be dropped.
func (t *transport) dispatch(m *nats.Msg) {
	t.mu.Lock()
	c := t.calls[token(m.Subject)]
	t.mu.Unlock()
	select {
	case c <- m:
	default:
	}
}

var (
	errAway   = errors.New("NATS is away")
	errNobody = errors.New("no connector takes blocks from NATS; see that one runs, and that both have the same nats_url")
)

// RoundTrip sends a request and returns its answer, whose body comes in parts.
func (t *transport) RoundTrip(hr *http.Request) (*http.Response, error) {
	body := []byte(nil)
	if hr.Body != nil {
		defer hr.Body.Close()
		var err error
		if body, err = io.ReadAll(hr.Body); err != nil {
			return nil, err
		}
	}
	if !t.nc.IsConnected() {
		return nil, errAway
	}
	x := &exchange{t: t, ctx: hr.Context(), id: nuid.Next(), frames: make(chan *nats.Msg, 8), size: partSize(t.nc)}
	t.mu.Lock()
	t.calls[x.id] = x.frames
	t.mu.Unlock()
	resp, err := x.call(hr, body)
	if err != nil {
		x.leave(true)
		return nil, err
	}
	return resp, nil
}

// An exchange is one call, as its caller sees it.
type exchange struct {
	t      *transport
	ctx    context.Context
	id     string
	frames chan *nats.Msg
	size   int
	once   sync.Once
}

// leave ends the exchange. cancel tells the other side, if that may still work.
func (x *exchange) leave(cancel bool) {
	x.once.Do(func() {
		x.t.mu.Lock()
		delete(x.t.calls, x.id)
		x.t.mu.Unlock()
		if cancel {
			_ = x.t.nc.Publish(Cancels, []byte(x.id)) // unheard, the call ends at its deadline
		}
	})
}

func (x *exchange) subject() string { return x.t.inbox + "." + x.id }

// next waits for the next frame that matters.
func (x *exchange) next() (*nats.Msg, error) {
	quiet := time.NewTimer(silence)
	defer quiet.Stop()
	for {
		select {
		case m := <-x.frames:
			switch {
			case len(m.Data) == 0 && first(m.Header, "Status") == "503":
				return nil, errNobody
			case first(m.Header, headerFrame) == frameWorking:
				quiet.Reset(silence)
				continue
			case first(m.Header, headerFrame) == frameBroken:
				return nil, errors.New(string(m.Data))
			}
			return m, nil
		case <-quiet.C:
			return nil, errSilent
		case <-x.ctx.Done():
			return nil, context.Cause(x.ctx)
		}
	}
}

// call sends the request, in as many parts as are asked for, and waits for the
// head of the answer.
func (x *exchange) call(hr *http.Request, body []byte) (*http.Response, error) {
	part := body[:min(len(body), x.size)]
	m := &nats.Msg{Subject: Calls + strings.TrimPrefix(hr.URL.Path, "/"), Reply: x.subject(), Header: nats.Header(hr.Header.Clone()), Data: part}
	m.Header[headerLength] = []string{strconv.Itoa(len(body))}
	sent := len(part)
	if err := x.t.nc.PublishMsg(m); err != nil {
		return nil, err
	}
	for {
		m, err := x.next()
		if err != nil {
			return nil, err
		}
		switch first(m.Header, headerFrame) {
		case frameMore:
			part = body[sent:min(len(body), sent+x.size)]
			sent += len(part)
			if err := x.t.nc.PublishMsg(frame(m.Reply, framePart, part)); err != nil {
				return nil, err
			}
		case frameAnswer:
			return x.answer(hr, m)
		default:
			return nil, fmt.Errorf("the connector sent a frame %q that is not known", wire.Cut(first(m.Header, headerFrame)))
		}
	}
}

// answer makes a response of the head of an answer.
func (x *exchange) answer(hr *http.Request, m *nats.Msg) (*http.Response, error) {
	status := number(m.Header, headerStatus)
	if status < 100 || status > 999 {
		return nil, fmt.Errorf("the connector told no status, but %q", wire.Cut(first(m.Header, headerStatus)))
	}
	b := &answerBody{x: x, part: m.Data}
	if first(m.Header, headerMore) != "" {
		b.more = m.Reply
	}
	strip(m.Header)
	resp := &http.Response{Status: http.StatusText(status), StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header(m.Header), ContentLength: -1, Body: b, Request: hr}
	if n := number(m.Header, "Content-Length"); n >= 0 {
		resp.ContentLength = int64(n)
	} else if b.more == "" {
		resp.ContentLength = int64(len(m.Data))
	}
	return resp, nil
}

// answerBody asks for the parts of an answer as they are read.
type answerBody struct {
	x    *exchange
	part []byte
	more string // where to ask for the next part; "" when there is none
	err  error
}

func (b *answerBody) Read(p []byte) (int, error) {
	for len(b.part) == 0 {
		switch {
		case b.err != nil:
			return 0, b.err
		case b.more == "":
			b.err = io.EOF
			b.x.leave(false)
			return 0, io.EOF
		}
		if b.err = b.fetch(); b.err != nil {
			return 0, b.err
		}
	}
	n := copy(p, b.part)
	b.part = b.part[n:]
	return n, nil
}

func (b *answerBody) fetch() error {
	ask := frame(b.more, frameMore, nil)
	ask.Reply = b.x.subject()
	if err := b.x.t.nc.PublishMsg(ask); err != nil {
		return err
	}
	m, err := b.x.next()
	if err != nil {
		return err
	}
	if first(m.Header, headerFrame) != framePart {
		return fmt.Errorf("the connector sent a frame %q in an answer", wire.Cut(first(m.Header, headerFrame)))
	}
	b.part, b.more = m.Data, ""
	if first(m.Header, headerMore) != "" {
		b.more = m.Reply
	}
	return nil
}

func (b *answerBody) Close() error {
	b.x.leave(b.more != "" || b.err != nil && !errors.Is(b.err, io.EOF))
	b.part, b.more = nil, ""
	if b.err == nil {
		b.err = errors.New("read after close")
	}
	return nil
}
