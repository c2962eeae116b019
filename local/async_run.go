package local

// async_run.go makes the calls that the queue holds.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// maxRetryAfter bounds how long a function may put a call off.
const maxRetryAfter = time.Hour

// call makes one attempt at a call. Its record says which one: what JetStream
// counts are deliveries, also those that a stop of the stack cut short.
func (a *asyncQueue) call(msg jetstream.Msg) (wait time.Duration, done bool) {
	key, redrives := generation(msg.Subject(), callSubject)
	var c asyncCall
	if err := unpack(msg.Data(), &c); err != nil {
		a.log.Error("stored call is not readable and is dropped", "call", key, "err", err)
		return 0, true
	}
	ctx, cancel := context.WithCancelCause(a.life)
	defer cancel(nil)
	a.mu.Lock()
	_, twice := a.running[key]
	if !twice {
		a.running[key] = cancel // before the record says running, so that who cancels finds it
	}
	a.mu.Unlock()
	if twice { // NATS was away for longer than the lease
		return a.cfg.Lease, false
	}
	defer func() {
		a.mu.Lock()
		delete(a.running, key)
		a.mu.Unlock()
	}()

	retry, known, err := a.retry(c.Function)
	if err != nil {
		a.log.Warn("the function's annotations are not used", "function", c.Function, "err", err)
	}
	var begin bool
	rec, err := a.change(a.life, key, c.record(), func(r *record) bool {
		now := time.Now().UTC()
		begin, wait = false, 0
		switch {
		case r.Redrives != redrives || r.final():
			return false
		case now.Before(r.NotBefore):
			wait = r.NotBefore.Sub(now)
		case !known && time.Since(a.begun) < a.cfg.FunctionWait:
			wait = min(time.Second, a.cfg.FunctionWait)
		default:
			begin = true
		}
		if !begin {
			return false
		}
		if r.State != stateRunning { // otherwise a stop cut that attempt short: it is made again
			r.Attempts++
		}
		r.State, r.Started, r.NotBefore = stateRunning, now, time.Time{}
		return true
	})
	switch {
	case err != nil:
		return 0, false
	case rec.Redrives != redrives:
		return 0, true
	case rec.final():
		return 0, a.tellAgain(&c, key, rec)
	case !begin:
		return wait, false
	}

	answer := a.invoke(ctx, &c)
	switch context.Cause(ctx) {
	case nil:
	case errCancelled:
		return 0, true
	default:
		return 0, false
	}
	if answer.Status >= 400 && !answer.stop && rec.Attempts < retry.Attempts && (answer.again || slices.Contains(retry.Codes, answer.Status)) {
		wait = retry.wait(rec.Attempts, &answer)
		rec, err = a.change(a.life, key, rec, func(r *record) bool {
			if r.State != stateRunning || r.Redrives != redrives {
				return false
			}
			r.State, r.NotBefore = stateRetrying, time.Now().Add(wait).UTC()
			r.Status, r.Error = answer.Status, answer.error()
			return true
		})
		return wait, err == nil && rec.State != stateRetrying
	}
	return 0, a.finish(msg, &c, key, redrives, rec, answer)
}

// finish stores what came of a call, and only then says that it is over. A
// stop in between repeats the call, or the callback: neither is lost.
func (a *asyncQueue) finish(msg jetstream.Msg, c *asyncCall, key string, redrives int, rec record, answer asyncAnswer) bool {
	state := stateSucceeded
	if err := a.store(a.life, resultSubject+key, pack(answer)); err != nil {
		a.log.Error("result of an async call is not kept", "function", c.Function, "call", c.ID, "err", err)
	}
	if answer.Status >= 400 {
		state = stateFailed
		if err := a.store(a.life, deadSubject+key, msg.Data()); err != nil {
			a.log.Error("failed async call cannot be redriven", "function", c.Function, "call", c.ID, "err", err)
		}
	}
	rec, err := a.change(a.life, key, rec, func(r *record) bool {
		if r.State != stateRunning || r.Redrives != redrives {
			return false // cancelled at the last moment
		}
		r.State, r.Finished, r.Status, r.Error = state, time.Now().UTC(), answer.Status, ""
		if state == stateFailed {
			r.Error = answer.error()
		}
		return true
	})
	if err != nil {
		return false
	}
	a.log.Info("async call is over", "function", c.Function, "call", c.ID, "state", rec.State, "status", answer.Status, "attempts", rec.Attempts)
	return rec.State != state || a.tell(c, key, rec, answer)
}

// wait is the pause after an attempt, which the function may set itself.
func (r Retry) wait(attempt int, answer *asyncAnswer) time.Duration {
	d := backOff(r.MinWait, r.MaxWait, attempt)
	if answer.Status != http.StatusTooManyRequests && answer.Status != http.StatusServiceUnavailable {
		return d
	}
	after := answer.Header.Get("Retry-After")
	if n, err := strconv.Atoi(after); err == nil && n >= 0 {
		return min(time.Duration(min(n, 1<<20))*time.Second, maxRetryAfter)
	}
	if at, err := http.ParseTime(after); err == nil {
		return min(max(time.Until(at), 0), maxRetryAfter)
	}
	return d
}

// backOff doubles least with each attempt up to most, and moves it by a fifth
// at random: calls that failed together do not come back together.
func backOff(least, most time.Duration, attempt int) time.Duration {
	d := most
	if n := attempt - 1; n < 32 && least <= most>>n {
		d = least << n
	}
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

// retry is how the calls of a function are retried, and whether it is there.
func (a *asyncQueue) retry(function string) (r Retry, known bool, err error) {
	p := a.front.Provider
	p.mu.Lock()
	f := p.functions[function]
	var notes map[string]string
	if f != nil && f.spec.Annotations != nil {
		notes = *f.spec.Annotations
	}
	p.mu.Unlock()
	if a.front.Community { // which knows no such annotations
		return a.cfg.Retry, f != nil, nil
	}
	r, err = a.cfg.Retry.annotated(notes)
	return r, f != nil, err
}

// annotated is the policy with what a function's annotations change in it, or
// the policy as it is and which annotation cannot be.
func (r Retry) annotated(notes map[string]string) (Retry, error) {
	const prefix = "com.openfaas.retry."
	out := r
	var err error
	if s := notes[prefix+"attempts"]; s != "" {
		if out.Attempts, err = strconv.Atoi(s); err != nil || out.Attempts < 1 || out.Attempts > 1000 {
			return r, fmt.Errorf("annotation %sattempts is %q, and must be a number from 1 to 1000", prefix, wire.Cut(s))
		}
	}
	if s := notes[prefix+"codes"]; s != "" {
		out.Codes = nil
		for code := range strings.SplitSeq(s, ",") {
			n, err := strconv.Atoi(strings.TrimSpace(code))
			if err != nil || n < 400 || n > 599 {
				return r, fmt.Errorf("annotation %scodes is %q, and must be statuses from 400 to 599 with commas between", prefix, wire.Cut(s))
			}
			out.Codes = append(out.Codes, n)
		}
	}
	for name, d := range map[string]*time.Duration{"min_wait": &out.MinWait, "max_wait": &out.MaxWait} {
		if s := notes[prefix+name]; s != "" {
			if *d, err = time.ParseDuration(s); err != nil || *d <= 0 || *d > 24*time.Hour {
				return r, fmt.Errorf("annotation %s%s is %q, and must be a duration such as 10s, up to 24h", prefix, name, wire.Cut(s))
			}
		}
	}
	return out, nil
}

// invoke calls the function by the front's balancer.
func (a *asyncQueue) invoke(ctx context.Context, c *asyncCall) (answer asyncAnswer) {
	begun := time.Now()
	defer func() { answer.Seconds = time.Since(begun).Seconds() }()
	ctx, cancel := context.WithTimeout(ctx, a.cfg.CallTimeout)
	defer cancel()
	target := &call{name: c.Function, wait: a.front.StartWait}
	if target.wait <= 0 {
		target.wait = startTimeout
	}
	u := &url.URL{Scheme: "http", Host: "replica", RawPath: "/" + c.Path, RawQuery: c.Query}
	u.Path, _ = url.PathUnescape(u.RawPath) // it could be parsed when the call came
	req := (&http.Request{Method: c.Method, URL: u, Host: c.Host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: c.Header.Clone(), ContentLength: int64(len(c.Body))}).WithContext(context.WithValue(ctx, callKey{}, target))
	if len(c.Body) > 0 {
		req.Body = io.NopCloser(bytes.NewReader(c.Body))
	}
	resp, err := a.front.proxy.Transport.RoundTrip(req)
	if err == nil {
		defer resp.Body.Close()
		answer = asyncAnswer{Status: resp.StatusCode, Header: resp.Header}
		answer.Body, err = io.ReadAll(io.LimitReader(resp.Body, int64(a.cfg.ResultLimit)+1))
		endToEnd(answer.Header)
	}
	size := len(answer.Body)
	for name, values := range answer.Header {
		size += len(name) + len(strings.Join(values, ""))
	}
	switch {
	case err == nil && size > a.cfg.ResultLimit:
		answer = problemAnswer(wire.Refuse(http.StatusBadGateway, "result_too_large",
			fmt.Sprintf("the answer of %s is over %d bytes with its headers, which is what an asynchronous call keeps; have the function store it, and answer with its address",
				c.Function, a.cfg.ResultLimit)).Within(a.cfg.ResultLimit))
		answer.stop = true
	case err == nil:
	case context.Cause(ctx) == context.DeadlineExceeded:
		answer = problemAnswer(wire.Refuse(http.StatusGatewayTimeout, wire.CodeDeadline,
			fmt.Sprintf("%s did not answer within %v", c.Function, a.cfg.CallTimeout)).Within(a.cfg.CallTimeout.String()))
		answer.again = true
	default:
		p, ok := errors.AsType[*wire.Problem](err)
		switch {
		case ok:
		case errors.Is(err, errNoReplica):
			p = wire.Refuse(http.StatusServiceUnavailable, wire.CodeNoReplicas,
				fmt.Sprintf("no replica of %s became ready in time; see the function's log", c.Function))
		default:
			p = wire.Refuse(http.StatusBadGateway, wire.CodeUnreachable,
				fmt.Sprintf("the replica of %s that had the call ended before it answered: %v", c.Function, err))
		}
		answer = problemAnswer(p)
		answer.again = true
	}
	return answer
}

// recorder keeps what a Problem writes.
type recorder struct {
	asyncAnswer
}

func (r *recorder) Header() http.Header    { return r.asyncAnswer.Header }
func (r *recorder) WriteHeader(status int) { r.Status = status }
func (r *recorder) Write(b []byte) (int, error) {
	r.Body = append(r.Body, b...)
	return len(b), nil
}

func problemAnswer(p *wire.Problem) asyncAnswer {
	r := &recorder{asyncAnswer{Header: http.Header{}}}
	p.Write(r)
	return r.asyncAnswer
}

// error is a sentence on an answer that is a failure.
func (a *asyncAnswer) error() string {
	return fmt.Sprintf("status %d: %s", a.Status, strings.ToValidUTF8(string(a.Body[:min(len(a.Body), 500)]), "?"))
}

// endToEnd removes the headers that are for one connection only.
func endToEnd(h http.Header) {
	for _, list := range h["Connection"] {
		for name := range strings.SplitSeq(list, ",") {
			h.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
		"Te", "Trailer", "Transfer-Encoding", "Upgrade", "Expect", "Content-Length"} {
		h.Del(name)
	}
}
