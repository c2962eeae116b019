package wire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"github.com/sheaf-project/sheaf"
)

// DefaultMaxReply is how long an answer may be, in bytes, when a Caller does
// not say: 64 MiB.
const DefaultMaxReply = 64 << 20

// A Caller sends requests as HTTP messages and judges the answers. Its fields
// must not change once it is used; it may be used concurrently.
type Caller struct {
	// HTTP does the transport. It must not follow redirects nor decompress;
	// NewHTTP makes one.
	HTTP *http.Client
	// MaxReply is how long an answer may be, in bytes; 0 means 64 MiB.
	MaxReply int64
	// Signer signs requests, and asks for signed answers; nil does neither.
	Signer *Signer

	proved sync.Map // of functions: an answer carried a digest
	signed sync.Map // of functions: an answer was signed
	named  sync.Map // of functions: an answer to an addressee named it
}

// NewHTTP returns a client for calls to replicas: connections are kept alive,
// perHost of them idle for each address; redirects are not followed (a replica
// could send a block anywhere), answers are not decompressed, and no proxy
// from the environment stands between.
func NewHTTP(perHost int) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext:           (&net.Dialer{Timeout: 3 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
			MaxIdleConns:          4096,
			MaxIdleConnsPerHost:   perHost,
			IdleConnTimeout:       90 * time.Second,
			DisableCompression:    true,
			ResponseHeaderTimeout: 0, // the attempt's deadline ends it
			WriteBufferSize:       32 << 10,
			ReadBufferSize:        32 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// AppendHead appends to b the header fields of the message that carries req,
// but for those that tell where it goes (Host) and where it ends
// (Content-Length). Each is a line with its carriage return and line feed. The
// Proof is for Judge. The error says that req holds a name that no header can
// carry.
//
// The body of the message is what [Body] returns, and given here.
func (c *Caller) AppendHead(b []byte, req *sheaf.Request, body []byte, now time.Time) ([]byte, Proof, error) {
	e := Seal(req, now)
	e.Saved = len(req.Saved)
	for _, name := range []string{req.Job, req.Function, req.To.ID} {
		if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return b, Proof{}, fmt.Errorf("name %q holds a control character, which no header can carry", Cut(name))
		}
	}
	b = e.Append(b)
	b = appendNumber(b, Saved, uint64(e.Saved))
	b = append(b, "Content-Type: application/octet-stream\r\n"+Digest+": "...)
	at := len(b)
	b = appendSum(b, body)
	if c.Signer == nil {
		return append(b, "\r\n"...), Proof{}, nil
	}
	signature, proof := c.Signer.Sign(e, req.Function, string(b[at:]), now)
	return appendField(append(b, "\r\n"...), Signature, signature), proof, nil
}

// Post sends req to url and returns the answer, as Judge sees it.
func (c *Caller) Post(ctx context.Context, url string, req *sheaf.Request) (*sheaf.Reply, error) {
	fail := func(f sheaf.Fault, err error) (*sheaf.Reply, error) {
		return nil, Late(ctx, &sheaf.CallError{Fault: f, From: req.To.ID, Err: err})
	}
	body := Body(req)
	head, proof, err := c.AppendHead(nil, req, body, time.Now())
	if err != nil {
		return fail(sheaf.FaultRejected, err)
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return fail(sheaf.FaultRefused, err)
	}
	if len(body) == 0 {
		hr.Body, hr.ContentLength = http.NoBody, 0
	}
	hr.GetBody = nil // a transport that sends again in silence would run the handler twice unseen
	for line := range strings.SplitSeq(strings.TrimSuffix(string(head), "\r\n"), "\r\n") {
		key, value, _ := strings.Cut(line, ": ")
		hr.Header[key] = []string{value}
	}
	resp, err := c.HTTP.Do(hr)
	if err != nil {
		if isRefused(err) {
			return fail(sheaf.FaultRefused, err)
		}
		return fail(sheaf.FaultLost, err)
	}
	defer resp.Body.Close()
	reply, err := c.Judge(req, proof, resp)
	return reply, Late(ctx, err)
}

// Late makes the fault of err, when it is a *sheaf.CallError, a timeout if ctx
// ran out of time and nobody answered: it is why the transport broke off,
// wherever it was.
func Late(ctx context.Context, err error) error {
	if ce, ok := err.(*sheaf.CallError); ok && (ce.Status == 0 || ce.Status == http.StatusOK) && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		ce.Fault = sheaf.FaultTimeout
	}
	return err
}

// Judge reads the answer to req, of which AppendHead made proof, and returns it,
// or a *sheaf.CallError. It does not close resp.Body.
//
// Status 200 alone is not trusted: through a watchdog or a proxy the answer of
// a replica that died half-way looks like a clean 200 with a short body. The
// digest that the replica put into the header decides. An answer without one
// is taken, as unverified, only if no answer of this function was ever proved,
// and its body is not empty; an empty result without a digest is said by 204,
// which a replica that died does not send.
func (c *Caller) Judge(req *sheaf.Request, proof Proof, resp *http.Response) (*sheaf.Reply, error) {
	fail := func(f sheaf.Fault, err error) (*sheaf.Reply, error) {
		return nil, &sheaf.CallError{Fault: f, Status: resp.StatusCode, From: req.To.ID, Err: err}
	}
	from := resp.Header.Get(Replica)
	named := from != "" && req.To.ID != ""
	if req.To.ID != "" {
		if from != "" && from != req.To.ID {
			return fail(sheaf.FaultRefused, fmt.Errorf("its address is now that of replica %s", Cut(from)))
		}
		from = req.To.ID
	}
	more := resp.StatusCode == http.StatusAccepted && resp.Header[Saved] != nil
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent && !more {
		return nil, judge(resp, from)
	}
	limit := c.MaxReply
	if limit <= 0 {
		limit = DefaultMaxReply
	}
	if resp.ContentLength > limit {
		return fail(sheaf.FaultRejected, fmt.Errorf("answer of %d bytes is over the limit of %d", resp.ContentLength, limit))
	}
	body, err := ReadBody(resp.Body, resp.ContentLength, limit)
	if err != nil {
		return fail(sheaf.FaultLost, fmt.Errorf("answer was cut after %d bytes: %w", len(body), err))
	}
	if int64(len(body)) > limit {
		return fail(sheaf.FaultRejected, fmt.Errorf("answer is over the limit of %d bytes", limit))
	}
	proved, err := Check(resp.Header, body)
	if err == nil && c.Signer != nil {
		proved, err = c.check(req.Function, proof, resp.Header, proved, more)
	}
	switch {
	case err != nil:
		return fail(sheaf.FaultLost, fmt.Errorf("answer of %d bytes: %w", len(body), err))
	case req.To.ID != "" && !named && has(&c.named, req.Function):
		return fail(sheaf.FaultRefused, errors.New("its address is now somebody's who does not name himself, and others of this function do"))
	case more && !proved:
		return fail(sheaf.FaultLost, fmt.Errorf("%w: what a handler saves must have one", sheaf.ErrUnverified))
	case proved:
		if _, known := c.proved.Load(req.Function); !known {
			c.proved.Store(req.Function, nil)
		}
	default:
		if _, others := c.proved.Load(req.Function); others {
			return fail(sheaf.FaultLost, fmt.Errorf("%w, and others of this function do", sheaf.ErrUnverified))
		}
		if len(body) == 0 && resp.StatusCode == http.StatusOK {
			return fail(sheaf.FaultTask, fmt.Errorf("%w and is empty, as that of a replica that died; have the function answer 204 when it has no result, or set %s", sheaf.ErrUnverified, Digest))
		}
	}
	if named && !has(&c.named, req.Function) {
		c.named.Store(req.Function, nil)
	}
	return &sheaf.Reply{Body: body, From: from, Verified: proved, More: more}, nil
}

func has(functions *sync.Map, name string) bool {
	_, ok := functions.Load(name)
	return ok
}

// A Passed is the answer to a message that is no block.
type Passed struct {
	Status int // 200 to 299
	Header http.Header
	Body   []byte
	From   string // ID of the replica, "" when it does not say
}

// Pass posts a message that is no block, with the given headers, and returns
// the whole answer if its status is 200 to 299, or else a *sheaf.CallError. An
// answer needs no digest, but one that it has must match.
func (c *Caller) Pass(ctx context.Context, url string, header http.Header, body []byte) (*Passed, error) {
	fail := func(f sheaf.Fault, status int, err error) (*Passed, error) {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			f = sheaf.FaultTimeout
		}
		return nil, &sheaf.CallError{Fault: f, Status: status, Err: err}
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return fail(sheaf.FaultRejected, 0, err)
	}
	if len(body) == 0 {
		hr.Body, hr.ContentLength = http.NoBody, 0
	}
	hr.Header, hr.GetBody = header, nil
	resp, err := c.HTTP.Do(hr)
	if err != nil {
		if isRefused(err) {
			return fail(sheaf.FaultRefused, 0, err)
		}
		return fail(sheaf.FaultLost, 0, err)
	}
	defer resp.Body.Close()
	from := resp.Header.Get(Replica)
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, judge(resp, from)
	}
	limit := c.MaxReply
	if limit <= 0 {
		limit = DefaultMaxReply
	}
	got, err := ReadBody(resp.Body, resp.ContentLength, limit)
	switch {
	case err != nil:
		return fail(sheaf.FaultLost, resp.StatusCode, fmt.Errorf("answer was cut after %d bytes: %w", len(got), err))
	case int64(len(got)) > limit:
		return fail(sheaf.FaultRejected, resp.StatusCode, fmt.Errorf("answer is over the limit of %d bytes", limit))
	}
	if _, err := Check(resp.Header, got); err != nil {
		return fail(sheaf.FaultLost, resp.StatusCode, fmt.Errorf("answer of %d bytes: %w", len(got), err))
	}
	return &Passed{Status: resp.StatusCode, Header: resp.Header, Body: got, From: from}, nil
}

// check looks at the signature of an answer whose digest is right, or was not
// given. In signed mode only a signature proves an answer; a lax Signer takes a
// digest for a proof, too, of a function of which nothing signed was seen: it
// shows that the answer is whole, though not whose it is.
func (c *Caller) check(function string, p Proof, h http.Header, digested, more bool) (proved bool, err error) {
	digest := h.Get(Digest)
	if digest != "" {
		digest = Content(digest, more)
	}
	signed, err := p.Check(c.Signer, h.Get(Replica), digest, h[Signature])
	switch {
	case err != nil:
		return false, err
	case signed && !digested:
		return false, errForged
	case signed:
		if _, known := c.signed.Load(function); !known {
			c.signed.Store(function, nil)
		}
		return true, nil
	}
	if _, others := c.signed.Load(function); others {
		return false, fmt.Errorf("%w: others of this function are", errUnsigned)
	}
	return digested, nil
}

// ReadBody reads a body that is said to be n bytes long, or any number when n
// is negative, to its end, but no more than limit+1 bytes. What is said is not
// trusted: memory is taken as bytes come, in doubling steps.
func ReadBody(r io.Reader, n, limit int64) ([]byte, error) {
	most, room := limit+1, int64(4096)
	if n >= 0 {
		most, room = min(n, limit)+1, 1<<20 // one more, for the read that meets the end
	}
	b := make([]byte, 0, min(room, most))
	for {
		if len(b) == cap(b) {
			if int64(len(b)) == most {
				return b, nil
			}
			b = append(make([]byte, 0, min(2*int64(cap(b)), most)), b...)
		}
		got, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+got]
		if err == io.EOF {
			if int64(len(b)) < n {
				return b, io.ErrUnexpectedEOF
			}
			return b, nil
		}
		if err != nil {
			return b, err
		}
	}
}

// judge makes an error of an answer that is not 200.
func judge(resp *http.Response, from string) error {
	// What could be read is good enough for a message; all of a Problem fits.
	snippet, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	e := &sheaf.CallError{Status: resp.StatusCode, From: from, Err: errors.New(reason(resp, snippet))}
	code := resp.Header.Get(Code)
	// The gateway or a provider speaks, not the function.
	platform := resp.Header.Get("X-Openfaas-Internal") != ""
	switch s := resp.StatusCode; {
	case s == http.StatusMisdirectedRequest:
		e.Fault = sheaf.FaultRefused // somebody else lives there now
	case s == http.StatusTooManyRequests,
		s == http.StatusServiceUnavailable && (resp.Header.Get("Retry-After") != "" || code == CodeDraining):
		e.Fault = sheaf.FaultThrottled
		e.RetryAfter = retryAfter(resp.Header, time.Now())
	case code == CodeDeadline:
		e.Fault = sheaf.FaultTimeout
	case code == CodeDamaged, code == CodeTruncated, code == CodeReplayed:
		e.Fault = sheaf.FaultLost
	case s == http.StatusBadGateway, s == http.StatusServiceUnavailable, s == http.StatusGatewayTimeout,
		s == http.StatusRequestTimeout, s == http.StatusTooEarly, s < 400:
		e.Fault = sheaf.FaultLost
	case s >= 500 && platform:
		e.Fault = sheaf.FaultLost
	case s >= 500:
		e.Fault = sheaf.FaultTask
	default:
		e.Fault = sheaf.FaultRejected
	}
	return e
}

// reason is what the body of a refusal says, in one line.
func reason(resp *http.Response, body []byte) string {
	if strings.HasPrefix(resp.Header.Get("Content-Type"), ContentType) {
		var p Problem
		if json.Unmarshal(body, &p) == nil && p.Detail != "" {
			return oneLine(p.Detail)
		}
	}
	if loc := resp.Header.Get("Location"); loc != "" && resp.StatusCode < 400 {
		return fmt.Sprintf("redirect to %q is not followed", Cut(loc))
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(body)), "\n")
	if line == "" {
		return http.StatusText(resp.StatusCode)
	}
	if len(line) > 200 {
		line = line[:197] + "..."
	}
	return strconv.Quote(line)
}

// oneLine quotes what would break a line of a log or steer a terminal: anybody
// may have written it.
func oneLine(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// retryAfter reads how long to wait: our own milliseconds, or the standard's
// seconds or date. 0 means that nothing was said.
func retryAfter(h http.Header, now time.Time) time.Duration {
	if ms, err := strconv.ParseInt(h.Get(RetryMS), 10, 32); err == nil && ms > 0 {
		return time.Duration(ms) * time.Millisecond
	}
	v := h.Get("Retry-After")
	if s, err := strconv.ParseInt(v, 10, 32); err == nil && s > 0 {
		return time.Duration(s) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, t.Sub(now))
	}
	return 0
}

// isRefused says whether nothing was sent because nobody could be reached.
func isRefused(err error) bool {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return true
	}
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}
