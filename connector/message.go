package connector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/tracing"
)

// topicState is what bounds one topic.
type topicState struct {
	c       *Connector
	name    string
	stopped <-chan struct{} // the topic is listened to no more
	slots   chan struct{}   // messages
	calls   chan struct{}
}

// handle works on one message and gives it its outcome. ctx ends when the
// connector cannot wait any longer.
func (t *topicState) handle(ctx context.Context, m *broker.Message) {
	c := t.c
	// Core NATS gives a message to one subscription of a queue group, whatever
	// their topics; JetStream has a consumer for each.
	if m.Lasting() && c.another(t.name, m.Topic) {
		_ = m.Ack() // if that is not heard it comes again, and is left to the other again
		return
	}
	begun := time.Now()
	c.metrics.inflight.WithLabelValues(t.name).Inc()
	ctx, span := c.Tracer.Start(tracing.Extract(ctx, m.Header.Get), "message "+t.name, trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(attribute.String("messaging.system", "nats"), attribute.String("messaging.destination.name", m.Topic),
			attribute.Int("messaging.message.body.size", len(m.Data))))
	outcome := t.work(ctx, m)
	if outcome == outcomeFailed {
		span.SetStatus(codes.Error, outcome)
	}
	span.SetAttributes(attribute.String("sheaf.outcome", outcome))
	span.End()
	c.metrics.inflight.WithLabelValues(t.name).Dec()
	c.metrics.messages.WithLabelValues(t.name, outcome).Inc()
	c.metrics.handling.WithLabelValues(t.name).Observe(time.Since(begun).Seconds())
	c.Log.LogAttrs(ctx, slog.LevelDebug, "message", slog.String("topic", m.Topic), slog.String("outcome", outcome),
		slog.Int("bytes", len(m.Data)), slog.Duration("elapsed", time.Since(begun)))
}

func (t *topicState) work(ctx context.Context, m *broker.Message) (outcome string) {
	c := t.c
	set := Results{Topic: m.Topic, Results: []Result{}}
	functions := c.Lookup.Match(m.Topic)
	if only := m.Header.Get(HeaderFunctions); only != "" {
		names := strings.Split(only, ",")
		functions = slices.DeleteFunc(functions, func(b Binding) bool { return !slices.Contains(names, b.Function) })
	}
	switch {
	case len(m.Data) == 0:
		set.Code, set.Error, outcome = codeEmpty, "the message is empty; a function is called with what a message holds", outcomeEmpty
	case len(functions) == 0:
		set.Code, outcome = codeNoMatch, outcomeUnmatched
		set.Error = fmt.Sprintf("no function matched topic %s; bind one by the annotation %s", m.Topic, AnnotationTopic)
	case m.Delivery > maxDeliveries:
		set.Code, outcome = codeFailed, outcomeFailed
		set.Error = fmt.Sprintf("the message was delivered %d times and never got an outcome: whoever worked on it ended", m.Delivery)
	default:
		var ended bool
		if set.Results, ended = t.callAll(ctx, m, functions); ended {
			return t.giveBack(m, set)
		}
		failed := set.failed()
		if len(failed) == 0 {
			outcome = outcomeOK
			break
		}
		set.Code, outcome = codeFailed, outcomeFailed
		set.Error = fmt.Sprintf("%d of %d functions failed; first %s: %s", len(failed), len(set.Results), failed[0].Function, failed[0].Error)
	}
	t.settle(ctx, m, set)
	return outcome
}

// settle answers, buries what failed unless who asked was told, and gives the
// message its outcome.
func (t *topicState) settle(ctx context.Context, m *broker.Message, set Results) {
	c := t.c
	told := c.answer(m, set)
	if set.Code != "" && (!told || m.Lasting()) {
		dead := &broker.Message{Topic: m.Topic, Header: m.Header.Clone(), Data: m.Data}
		if failed := set.failed(); len(failed) > 0 { // a redrive calls only those again
			names := make([]string, len(failed))
			for i, r := range failed {
				names[i] = r.Function
			}
			dead.Header.Set(HeaderFunctions, strings.Join(names, ","))
		}
		if ok, hopeless := c.bury(ctx, dead, set.Error); !ok {
			if !hopeless {
				if back, err := m.Again(); back && err == nil {
					return // somebody may be able to, later
				}
			}
			c.Log.Error("a message is lost", "topic", m.Topic, "bytes", len(m.Data), "why", set.Error)
			c.metrics.messages.WithLabelValues(t.name, outcomeLost).Inc()
		}
	}
	if err := m.Ack(); err != nil {
		c.Log.Warn("a message that is done will come again", "topic", m.Topic, "err", err)
	}
}

// bury tries for a minute. hopeless says that it will never be possible.
func (c *Connector) bury(ctx context.Context, m *broker.Message, reason string) (ok, hopeless bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		err := c.Bus.Bury(ctx, m, reason)
		if err == nil {
			c.Log.Warn("a message was buried", "topic", m.Topic, "bytes", len(m.Data), "why", reason)
			return true, false
		}
		if errors.Is(err, nats.ErrMaxPayload) && (len(m.Header) > 1 || len(reason) > shortReason) {
			// Its headers and the reason are what it is too long by.
			only := m.Header.Get(HeaderFunctions)
			m.Header = broker.Header{}
			if only != "" {
				m.Header.Set(HeaderFunctions, only)
			}
			reason = reason[:min(len(reason), shortReason)]
			continue
		}
		if hopeless = errors.Is(err, nats.ErrMaxPayload); hopeless || errors.Is(err, nats.ErrConnectionClosed) || !sleep(ctx, wait) {
			c.Log.Error("a message cannot be buried", "topic", m.Topic, "err", err)
			return false, hopeless
		}
	}
}

// shortReason is how long the reason in a dead letter may be that is almost too
// long for NATS, in bytes.
const shortReason = 100

// giveBack is for a message that the connector cannot end in time.
func (t *topicState) giveBack(m *broker.Message, set Results) string {
	c := t.c
	if back, err := m.Again(); back {
		if err != nil { // it comes again all the same, later
			c.Log.Warn("a message is given back by silence", "topic", m.Topic, "err", err)
		}
		return outcomeReturned
	}
	set.Code, set.Error = codeEnding, "the connector ended before every function had answered; send the message again"
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	t.settle(ctx, m, set)
	return outcomeFailed
}

// callAll calls every function at once. ended says that some could not be
// called to the end because the connector ends.
func (t *topicState) callAll(ctx context.Context, m *broker.Message, functions []Binding) (results []Result, ended bool) {
	id := nuid.Next() // the same in all attempts, so that a function can tell repetitions
	results = make([]Result, len(functions))
	stopped := make([]bool, len(functions))
	var wg sync.WaitGroup
	for i, b := range functions {
		wg.Go(func() { results[i], stopped[i] = t.call(ctx, m, b, id) })
	}
	wg.Wait()
	return results, slices.Contains(stopped, true)
}

// call calls one function until it has done its work, fails for good, or the
// connector ends.
func (t *topicState) call(ctx context.Context, m *broker.Message, b Binding, id string) (r Result, ended bool) {
	c := t.c
	r = Result{Function: b.Function}
	begun, failures, wait := time.Now(), 0, c.MinWait
	for {
		select {
		case t.calls <- struct{}{}:
		case <-ctx.Done():
			r.Error = "the connector ended"
			return r, true
		}
		r.Attempts++
		err := c.attempt(ctx, m, b, id, &r)
		<-t.calls
		if err == nil {
			r.Error = ""
			return r, false
		}
		r.OK, r.Error = false, err.Error()
		if ctx.Err() != nil {
			return r, true
		}
		pause := wait
		switch fault, after := faultOf(err); fault {
		case sheaf.FaultRejected:
			return r, false
		case sheaf.FaultRefused, sheaf.FaultThrottled: // it is away, or busy
			if time.Since(begun) >= c.Patience {
				r.Error = fmt.Sprintf("given up after %v: %s", c.Patience, r.Error)
				return r, false
			}
			pause = max(pause, min(after, c.MaxWait))
		default:
			if failures++; failures >= c.Attempts {
				return r, false
			}
		}
		c.metrics.retries.WithLabelValues(b.Function).Inc()
		pause += time.Duration(rand.Int64N(int64(pause)/4 + 1))
		select {
		case <-time.After(pause):
		case <-t.stopped: // no more pauses: whoever goes on can do it again
			return r, true
		case <-ctx.Done():
			return r, true
		}
		wait = min(2*wait, c.MaxWait)
	}
}

// faultOf classifies a failed call. What a gateway says of functions that it
// does not reach is nobody's failure, as is a gateway that nothing reaches.
func faultOf(err error) (sheaf.Fault, time.Duration) {
	ce, ok := errors.AsType[*sheaf.CallError](err)
	switch {
	case !ok:
		return sheaf.FaultLost, 0
	case ce.Fault == sheaf.FaultLost && ce.Status >= 500:
		return sheaf.FaultRefused, 0
	}
	return ce.Fault, ce.RetryAfter
}

// attempt calls a function once.
func (c *Connector) attempt(ctx context.Context, m *broker.Message, b Binding, id string, r *Result) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	begun := time.Now()
	ctx, span := c.Tracer.Start(ctx, "call "+b.Function, trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(attribute.String("sheaf.function", b.Function), attribute.Int("sheaf.attempt", r.Attempts)))
	defer span.End()
	err := func() error {
		if b.All {
			return c.toAll(ctx, m, b, id, r)
		}
		path := "/function/"
		if c.Async {
			path = "/async-function/"
		}
		got, err := c.caller.Pass(ctx, strings.TrimSuffix(c.Gateway, "/")+path+url.PathEscape(b.Function), c.header(ctx, m, id), m.Data)
		if err != nil {
			if ce, ok := errors.AsType[*sheaf.CallError](err); ok {
				r.Status, r.Replica = ce.Status, ce.From
			}
			return err
		}
		r.Replica = got.From
		r.take(got.Status, got.Header, got.Body)
		return nil
	}()
	took := time.Since(begun)
	r.Millis = float64(took.Microseconds()) / 1000
	c.metrics.seconds.WithLabelValues(b.Function).Observe(took.Seconds())
	outcome := outcomeOK
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
		fault, _ := faultOf(err)
		outcome = strings.ReplaceAll(fault.String(), " ", "_")
	}
	c.metrics.calls.WithLabelValues(b.Function, outcome).Inc()
	if c.PrintResponse || err != nil {
		attrs := []slog.Attr{slog.String("topic", m.Topic), slog.String("function", b.Function), slog.Int("status", r.Status), slog.Duration("elapsed", took)}
		if err != nil {
			attrs = append(attrs, slog.Any("err", err))
		} else if c.PrintBody {
			attrs = append(attrs, slog.String("body", r.Body))
		}
		level := slog.LevelInfo
		if err != nil && !c.PrintResponse {
			level = slog.LevelDebug
		}
		c.Log.LogAttrs(ctx, level, "function called", attrs...)
	}
	return err
}

// hop are headers that belong to a connection, not to a message.
var hop = []string{"Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "Te", "Trailer",
	"Transfer-Encoding", "Upgrade", "Host", "Content-Length", "Expect"}

// travels says whether a header may pass between a message and a call.
func travels(name string) bool {
	name = textproto.CanonicalMIMEHeaderKey(name)
	return !slices.Contains(hop, name) && !strings.HasPrefix(name, "Sheaf-") && !strings.HasPrefix(name, "Nats-")
}

// header makes the headers of a call from those of a message.
func (c *Connector) header(ctx context.Context, m *broker.Message, id string) http.Header {
	h := http.Header{}
	for name, values := range m.Header {
		if !travels(name) || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r) }) {
			continue
		}
		for _, v := range values {
			if !strings.ContainsFunc(v, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
				h.Add(name, v)
			}
		}
	}
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", c.ContentType)
	}
	if h.Get("X-Call-Id") == "" {
		h.Set("X-Call-Id", id)
	}
	h.Set("X-Topic", m.Topic)
	h.Set("X-Connector", "sheaf")
	h.Set("User-Agent", "sheaf-connector")
	tracing.Inject(ctx, h.Set)
	return h
}

// answer tells who asked what came of a message, and says whether somebody did.
func (c *Connector) answer(m *broker.Message, set Results) bool {
	to := m.Header.Get(HeaderReply)
	if to == "" {
		to = m.Reply
	}
	if to == "" {
		return false
	}
	out := c.compose(m, set)
	out.Subject = to
	most := int(c.Conn.MaxPayload())
	if most > 0 && out.Size() > most {
		for i := range set.Results {
			r := &set.Results[i]
			r.Body, r.Base64, r.body, r.header, r.Type, r.Receipts = "", nil, nil, nil, "", nil
		}
		set.Code, set.Error = codeTooLarge, fmt.Sprintf("the answer has %d bytes, and NATS takes %d, which its max_payload sets; the functions did their work", out.Size(), most)
		if failed := set.failed(); len(failed) > 0 {
			set.Error = fmt.Sprintf("the answer has %d bytes, and NATS takes %d; %d functions failed", out.Size(), most, len(failed))
		}
		out = c.compose(m, set)
		out.Subject = to
	}
	if err := c.Conn.PublishMsg(out); err != nil {
		c.metrics.replies.WithLabelValues(outcomeFailed).Inc()
		c.Log.Warn("an answer cannot be sent", "topic", m.Topic, "to", to, "err", err)
		return false
	}
	c.metrics.replies.WithLabelValues(outcomeOK).Inc()
	return true
}

// compose writes an answer. That of a single function that did its work is the
// answer, unless the set was asked for.
func (c *Connector) compose(m *broker.Message, set Results) *nats.Msg {
	out := &nats.Msg{Header: nats.Header{}}
	if len(set.Results) == 1 && set.Code == "" && set.Results[0].Receipts == nil && m.Header.Get(HeaderResults) != "set" {
		r := set.Results[0]
		for name, values := range r.header {
			if travels(name) {
				out.Header[name] = values
			}
		}
		out.Header.Set(HeaderFunction, r.Function)
		out.Header.Set(HeaderStatus, strconv.Itoa(r.Status))
		if r.Replica != "" {
			out.Header.Set(wire.Replica, r.Replica)
		}
		out.Data = r.body
		return out
	}
	out.Header.Set("Content-Type", MediaType)
	if set.Code != "" {
		out.Header.Set(HeaderCode, set.Code)
	}
	out.Data = set.encode()
	return out
}

// sleep waits, and says whether ctx still runs.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
