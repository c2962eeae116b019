package local

// async_callback.go tells the callers of calls what came of them: where a
// callback may go, and how it is sent.

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/internal/egress"
	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	callbackTimeout = 10 * time.Second
	callbackAnswer  = 1 << 10 // bytes that are read of an answer
)

// asyncCallback is a callback as it is stored.
type asyncCallback struct {
	ID, Addressed, URL string
	Created            time.Time
	Answer             asyncAnswer
}

// tell queues the callback of a call that is over.
func (a *asyncQueue) tell(c *asyncCall, key string, rec record, answer asyncAnswer) (done bool) {
	if rec.Callback == nil || rec.Callback.State != callbackPending {
		return true
	}
	subject := generationOf(key, rec.Redrives)
	err := a.store(a.life, callbackSubject+subject,
		pack(asyncCallback{ID: c.ID, Addressed: c.Addressed, URL: c.Callback, Created: c.Created, Answer: answer}),
		jetstream.WithExpectLastSequencePerSubject(0), jetstream.WithMsgID(subject+"."+strconv.FormatInt(c.Created.UnixNano(), 10)))
	if err == nil {
		return true
	}
	if !errors.Is(err, errRefused) {
		return false
	}
	// There is no room: the caller can still read the result.
	return a.told(key, rec.Redrives, func(d *delivered) { d.State, d.Error = callbackFailed, err.Error() }) == nil
}

// tellAgain queues the callback of a call that was over when it came again: a
// stop came between its end and its callback.
func (a *asyncQueue) tellAgain(c *asyncCall, key string, rec record) (done bool) {
	if rec.Callback == nil || rec.Callback.State != callbackPending {
		return true
	}
	var answer asyncAnswer
	err := a.persist(a.life, func(ctx context.Context) error {
		m, err := a.results.GetLastMsgForSubject(ctx, resultSubject+key)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			answer = problemAnswer(wire.Refuse(http.StatusGone, "result_gone", "the result was dropped before it could be sent"))
			return nil
		case err != nil:
			return err
		}
		return unpack(m.Data, &answer)
	})
	return err == nil && a.tell(c, key, rec, answer)
}

// told notes how far a callback has come.
func (a *asyncQueue) told(key string, redrives int, f func(*delivered)) error {
	_, err := a.change(a.life, key, record{}, func(r *record) bool {
		if r.Callback == nil || r.Redrives != redrives {
			return false
		}
		f(r.Callback)
		return true
	})
	return err
}

// callback tries once to send a callback.
func (a *asyncQueue) callback(msg jetstream.Msg) (wait time.Duration, done bool) {
	key, redrives := generation(msg.Subject(), callbackSubject)
	meta, err := msg.Metadata()
	var c asyncCallback
	if err == nil {
		err = unpack(msg.Data(), &c)
	}
	if err != nil {
		a.log.Error("stored callback is not readable and is dropped", "call", key, "err", err)
		return 0, true
	}
	tries := int(meta.NumDelivered)
	err = a.send(a.life, &c)
	if err != nil && a.life.Err() != nil {
		return 0, false
	}
	_, forbidden := errors.AsType[*wire.Problem](err)
	state := callbackPending
	switch {
	case err == nil:
		state = callbackDelivered
	case forbidden, tries >= a.cfg.CallbackTries, time.Since(meta.Timestamp) >= a.cfg.CallbackFor:
		state = callbackFailed
		a.log.Warn("callback is given up", "function", c.Addressed, "call", c.ID, "tries", tries, "err", err)
	}
	// A callback that arrived must not be sent again because this cannot be
	// noted.
	_ = a.told(key, redrives, func(d *delivered) {
		d.State, d.Tries, d.Error = state, tries, ""
		if err != nil {
			d.Error = err.Error()
		}
	})
	return backOff(a.cfg.CallbackMinWait, a.cfg.CallbackMaxWait, tries), state != callbackPending
}

// send posts a callback. Whatever is not a 2xx is an error, a redirect too.
func (a *asyncQueue) send(ctx context.Context, c *asyncCallback) error {
	ctx, cancel := context.WithTimeout(ctx, callbackTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL, bytes.NewReader(c.Answer.Body))
	if err != nil {
		return err
	}
	req.GetBody = nil // each try is counted
	maps.Copy(req.Header, c.Answer.Header)
	endToEnd(req.Header)
	req.Header.Del("Set-Cookie")
	req.Header.Del("Cookie")
	for name, value := range map[string]string{
		"User-Agent":         a.front.servedBy(),
		"X-Call-Id":          c.ID,
		"X-Function-Name":    c.Addressed,
		"X-Function-Status":  strconv.Itoa(c.Answer.Status),
		"X-Duration-Seconds": strconv.FormatFloat(c.Answer.Seconds, 'f', 6, 64),
		"X-Start-Time":       strconv.FormatInt(c.Created.UnixNano(), 10),
		"X-Served-By":        a.front.servedBy(),
	} {
		req.Header.Set(name, value)
	}
	req.Header.Del(SignatureHeader)
	if a.cfg.SigningKeyFile != "" {
		key, err := a.cfg.key()
		if err != nil {
			return err // better late than unsigned
		}
		req.Header.Set(SignatureHeader, sign(key, time.Now(), c.Answer.Body))
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, callbackAnswer)); err != nil {
		a.log.Debug("answer to a callback breaks off", "call", c.ID, "err", err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("the callback was answered with %s", resp.Status)
	}
	return nil
}

// SignatureHeader is the header of a signed callback; see
// AsyncConfig.SigningKeyFile.
const SignatureHeader = "X-Sheaf-Signature"

// sign returns the header of a callback signed with the key of a file, or with
// each of its lines.
func sign(key []byte, now time.Time, body []byte) string {
	t := strconv.FormatInt(now.Unix(), 10)
	var header strings.Builder
	header.WriteString("t=" + t)
	for line := range bytes.Lines(key) { // two while they rotate: the receiver knows one of them
		if line = bytes.TrimRight(line, "\r\n"); len(line) == 0 {
			continue
		}
		mac := hmac.New(sha256.New, line)
		mac.Write([]byte(t + "."))
		mac.Write(body)
		header.WriteString(",v1=" + hex.EncodeToString(mac.Sum(nil)))
	}
	return header.String()
}

// callbackPolicy is where callbacks may go.
func (c AsyncConfig) callbackPolicy() (*egress.Policy, error) {
	p, err := egress.New(egress.Config{Param: "X-Callback-Url", Code: "callback", Calls: "callbacks to", List: "the allow-list of the stack",
		Example: "https://example.com/done", Allow: c.CallbackAllow, Lookup: c.Lookup})
	if err != nil {
		return nil, fmt.Errorf("async: callback allow-list %w", err)
	}
	return p, nil
}
