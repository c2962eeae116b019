package local

// async_front.go takes calls at /async-function/, and tells of them there and
// at /system/async.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	bodyTimeout  = time.Minute      // for the body of a call to come in
	storeTimeout = 10 * time.Second // for JetStream to store a call, or to tell of it
	maxCallID    = 255
	maxListed    = 1000
)

// ServeHTTP serves /async-function/: POST makes a call, and GET and DELETE of
// /async-function/NAME/-/ID tell of it and cancel it. DELETE of
// /async-function/ID cancels, too, as in OpenFaaS Pro.
func (a *asyncQueue) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	addressed, rest, inside := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/async-function/"), "/")
	if r.Method == http.MethodDelete && !inside {
		id, _ := url.PathUnescape(addressed) // the server has parsed it
		a.tellOf(w, r, "", id)
		return
	}
	name, here := split(addressed)
	if p := checkName(name); p != nil {
		p.Write(w)
		return
	}
	read := r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodDelete
	if id, is := strings.CutPrefix(rest, "-/"); is && read {
		id, _ = url.PathUnescape(id) // as above
		a.tellOf(w, r, name, id)
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		wire.Refuse(http.StatusMethodNotAllowed, wire.CodeMethod,
			fmt.Sprintf("%s is not for asynchronous calls, which are made by POST; /function/%s takes any method", wire.Cut(r.Method), name)).Write(w)
		return
	}
	a.accept(w, r, name, addressed, rest, here)
}

// accept answers 202 once a call is stored.
func (a *asyncQueue) accept(w http.ResponseWriter, r *http.Request, name, addressed, rest string, here bool) {
	if _, known, err := a.retry(name); !known || !here {
		a.front.Provider.unknown(addressed).Write(w)
		return
	} else if err != nil {
		wire.Refuse(http.StatusUnprocessableEntity, wire.CodeBadParameter,
			fmt.Sprintf("%s cannot be called asynchronously: %v", name, err)).About("annotations").Write(w)
		return
	}
	id := r.Header.Get("X-Call-Id")
	if id == "" {
		id = rand.Text()
	}
	if len(id) > maxCallID || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter,
			fmt.Sprintf("X-Call-Id must be up to %d printable ASCII characters without spaces", maxCallID)).About("X-Call-Id").Within(maxCallID).Write(w)
		return
	}
	callback := r.Header.Get("X-Callback-Url")
	if callback != "" {
		if p := a.policy.Check(r.Context(), callback); p != nil {
			p.Write(w)
			return
		}
	}
	select {
	case a.accepting <- struct{}{}:
		defer func() { <-a.accepting }()
	case <-r.Context().Done():
		return
	}
	body, p := a.body(w, r)
	if p != nil {
		p.Write(w)
		return
	}
	now := time.Now().UTC()
	c := &asyncCall{ID: id, Function: name, Addressed: addressed, Method: http.MethodPost, Host: r.Host, Path: rest, Query: r.URL.RawQuery,
		Header: r.Header.Clone(), Body: body, Callback: callback, Created: now}
	endToEnd(c.Header)
	start := strconv.FormatInt(now.UnixNano(), 10)
	c.Header.Set("X-Call-Id", id)
	c.Header.Set("X-Start-Time", start)
	if c.Header.Get("Idempotency-Key") == "" { // an attempt may come twice, and a function may care
		c.Header.Set("Idempotency-Key", id)
	}
	if _, has := c.Header["User-Agent"]; !has {
		c.Header.Set("User-Agent", "") // Go would set its own
	}
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		c.Header.Set("X-Forwarded-For", strings.Join(append(c.Header["X-Forwarded-For"], host), ", "))
	}
	c.Header.Set("X-Forwarded-Host", r.Host)
	c.Header.Set("X-Forwarded-Proto", "http")
	digest := sha256.New()
	for _, part := range []string{c.Path, c.Query, c.Callback, string(c.Body)} {
		fmt.Fprintf(digest, "%d:%s,", len(part), part)
	}
	c.Digest = hex.EncodeToString(digest.Sum(nil))
	h := w.Header()
	h.Set("X-Call-Id", id) // also with a refusal after which the call shall be sent again
	if p := a.enqueue(r.Context(), c); p != nil {
		p.Write(w)
		return
	}
	h.Set("X-Start-Time", start)
	h.Set("X-Served-By", a.front.servedBy())
	h.Set("Location", "/async-function/"+name+"/-/"+url.PathEscape(id))
	w.WriteHeader(http.StatusAccepted)
}

// body reads the body of a call.
func (a *asyncQueue) body(w http.ResponseWriter, r *http.Request) ([]byte, *wire.Problem) {
	tooLarge := wire.Refuse(http.StatusRequestEntityTooLarge, "body_too_large",
		fmt.Sprintf("the body is over %d bytes, which is what the queue stores of one call; call /function/ instead, which has no such limit, or store the data and send its address", a.cfg.BodyLimit)).Within(a.cfg.BodyLimit)
	if r.ContentLength > int64(a.cfg.BodyLimit) {
		return nil, tooLarge
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout)) // where that cannot be had, there is none
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, int64(a.cfg.BodyLimit)))
	_ = control.SetReadDeadline(time.Time{})
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, tooLarge
	}
	if err != nil {
		return nil, wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, fmt.Sprintf("the body could not be read to its end: %v", err))
	}
	return body, nil
}

// open waits for the streams, and returns a context for asking them.
func (a *asyncQueue) open(ctx context.Context) (context.Context, context.CancelFunc, *wire.Problem) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	select {
	case <-a.ready:
		return ctx, cancel, nil
	case <-a.ctx.Done():
	case <-ctx.Done():
	}
	return ctx, cancel, noStore(context.Cause(ctx))
}

func noStore(err error) *wire.Problem {
	return wire.Refuse(http.StatusServiceUnavailable, "queue_unavailable",
		fmt.Sprintf("the queue of asynchronous calls does not answer: %v; send the call again with the same X-Call-Id, and it is made once", err)).After(time.Second)
}

// enqueue stores a call: first its record, which makes it unique for longer
// than JetStream remembers IDs of messages, then the call itself.
func (a *asyncQueue) enqueue(ctx context.Context, c *asyncCall) *wire.Problem {
	ctx, cancel, p := a.open(ctx)
	defer cancel()
	if p != nil {
		return p
	}
	full := wire.Refuse(http.StatusServiceUnavailable, "queue_full", "too many asynchronous calls wait, or are remembered; try again later").After(5 * time.Second)
	if a.tooMany(ctx) {
		return full
	}
	key := callOf(c.Function, c.ID)
	created := false
	rec, err := a.change(ctx, key, c.record(), func(r *record) bool {
		created = r.Created.Equal(c.Created) && r.Digest == c.Digest
		return created
	})
	switch {
	case err != nil:
		return noStore(err)
	case rec.Digest != c.Digest:
		return wire.Refuse(http.StatusConflict, "idempotency_conflict",
			fmt.Sprintf("call %q of %s was made with another path, query, body or callback; another call needs another X-Call-Id", wire.Cut(c.ID), c.Function)).About("X-Call-Id")
	case !created && (rec.State != stateQueued || rec.Redrives > 0):
		return nil // it is stored, or over
	}
	// One that was recorded earlier and is queued may not have been stored:
	// its caller did not see 202, and sent it again.
	c.Created = rec.Created
	if err := a.lane(ctx, c.Function); err != nil {
		return noStore(err)
	}
	err = a.store(ctx, callSubject+generationOf(key, 0), pack(c), jetstream.WithExpectLastSequencePerSubject(0),
		jetstream.WithMsgID(generationOf(key, 0)+"."+strconv.FormatInt(rec.Created.UnixNano(), 10)))
	if errors.Is(err, errRefused) {
		_ = a.records.Purge(ctx, jetstream.WithPurgeSubject(recordSubject+key)) // or it goes in its time
		return full
	}
	if err != nil {
		return noStore(err)
	}
	return nil
}

// tooMany says whether there are too many records, as it was within the last
// second.
func (a *asyncQueue) tooMany(ctx context.Context) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.checked) > time.Second {
		if info, err := a.records.Info(ctx); err == nil {
			a.full, a.checked = info.State.Bytes > maxAsyncRecords, time.Now()
		}
	}
	return a.full
}

// system serves /system/async/ID.
func (a *asyncQueue) system(w http.ResponseWriter, r *http.Request) {
	function, here := split(r.URL.Query().Get("function"))
	if !here {
		a.front.Provider.unknown(r.URL.Query().Get("function")).Write(w)
		return
	}
	a.tellOf(w, r, function, r.PathValue("id"))
}

// result is an answer as it is shown.
type result struct {
	Status  int         `json:"status"`
	Header  http.Header `json:"header"`
	Seconds float64     `json:"seconds"`
	Body    string      `json:"body,omitempty"`
	Base64  string      `json:"body_base64,omitempty"` // of one that is not UTF-8
}

// tellOf answers with a call, after cancelling or redriving it if that is what
// is asked for. function is "" if the caller knows the ID only.
func (a *asyncQueue) tellOf(w http.ResponseWriter, r *http.Request, function, id string) {
	ctx, cancel, p := a.open(r.Context())
	defer cancel()
	if p == nil {
		function, p = a.find(ctx, function, id)
	}
	if p != nil {
		p.Write(w)
		return
	}
	key := callOf(function, id)
	shown := struct {
		record
		Result *result `json:"result,omitempty"`
	}{}
	switch r.Method {
	case http.MethodDelete:
		shown.record, p = a.cancel(ctx, key)
	case http.MethodPost:
		shown.record, p = a.redrive(ctx, key)
	default:
		var revision uint64
		var err error
		if shown.record, revision, err = a.get(ctx, key); err != nil {
			p = noStore(err)
		} else if revision == 0 {
			p = noJob(id)
		} else if shown.final() {
			shown.Result = a.result(ctx, key)
		}
	}
	if p != nil {
		p.Write(w)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	reply(w, shown)
}

func noJob(id string) *wire.Problem {
	return wire.Refuse(http.StatusNotFound, "job_not_found",
		fmt.Sprintf("there is no asynchronous call %q; it was never made, or was over so long ago that it is forgotten", wire.Cut(id)))
}

// find names the function whose call has the ID.
func (a *asyncQueue) find(ctx context.Context, function, id string) (string, *wire.Problem) {
	prefix := recordSubject + idKey(id) + "."
	filter := prefix + "*"
	if function != "" {
		if p := checkName(function); p != nil {
			return "", p
		}
		filter = prefix + function
	}
	info, err := a.records.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		return "", noStore(err)
	}
	var found []string
	for subject := range info.State.Subjects {
		found = append(found, strings.TrimPrefix(subject, prefix))
	}
	switch len(found) {
	case 0:
		return "", noJob(id)
	case 1:
		return found[0], nil
	}
	return "", wire.Refuse(http.StatusConflict, "ambiguous_call",
		fmt.Sprintf("functions %s all have a call %q; say which with ?function=NAME", strings.Join(found, ", "), wire.Cut(id))).About("function")
}

func (a *asyncQueue) result(ctx context.Context, key string) *result {
	m, err := a.results.GetLastMsgForSubject(ctx, resultSubject+key)
	if err != nil {
		return nil // a cancelled call has none, and an old one has none any more
	}
	var answer asyncAnswer
	if err := unpack(m.Data, &answer); err != nil {
		a.log.Error("stored result is not readable", "call", key, "err", err)
		return nil
	}
	out := &result{Status: answer.Status, Header: answer.Header, Seconds: answer.Seconds}
	if utf8.Valid(answer.Body) {
		out.Body = string(answer.Body)
	} else {
		out.Base64 = base64.StdEncoding.EncodeToString(answer.Body)
	}
	return out
}

// cancel ends a call that is not over. One that is stays what it is.
func (a *asyncQueue) cancel(ctx context.Context, key string) (record, *wire.Problem) {
	rec, err := a.change(ctx, key, record{}, func(r *record) bool {
		if r.ID == "" || r.final() {
			return false
		}
		r.State, r.Finished, r.NotBefore = stateCancelled, time.Now().UTC(), time.Time{}
		if r.Callback != nil {
			r.Callback.State, r.Callback.Error = callbackFailed, errCancelled.Error()
		}
		return true
	})
	switch {
	case err != nil:
		return rec, noStore(err)
	case rec.ID == "":
		return rec, noJob(key)
	case rec.State == stateCancelled:
		a.mu.Lock()
		if end := a.running[key]; end != nil {
			end(errCancelled)
		}
		a.mu.Unlock()
		// Whoever takes it sees that it is cancelled; but the record may be
		// forgotten before its turn comes.
		if err := a.calls.Purge(ctx, jetstream.WithPurgeSubject(callSubject+key+".*")); err != nil {
			return rec, noStore(err)
		}
	}
	return rec, nil
}

// redrive queues a failed call again, with all its attempts. The record
// changes first: until the call is stored, the dead letter is there to do the
// same again.
func (a *asyncQueue) redrive(ctx context.Context, key string) (record, *wire.Problem) {
	m, err := a.dead.GetLastMsgForSubject(ctx, deadSubject+key)
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return record{}, noStore(err)
	}
	rec, err := a.change(ctx, key, record{}, func(r *record) bool {
		if r.State != stateFailed || m == nil {
			return false
		}
		*r = record{ID: r.ID, Function: r.Function, State: stateQueued, Created: r.Created, Redrives: r.Redrives + 1, Callback: r.Callback, Digest: r.Digest}
		if r.Callback != nil {
			*r.Callback = delivered{URL: r.Callback.URL, State: callbackPending}
		}
		return true
	})
	switch {
	case err != nil:
		return rec, noStore(err)
	case rec.ID == "":
		return rec, noJob(key)
	case m == nil || rec.State != stateQueued:
		return rec, wire.Refuse(http.StatusConflict, "not_failed",
			fmt.Sprintf("the call is %s, and only a failed one that is still kept can be redriven", rec.State))
	}
	if err := a.lane(ctx, rec.Function); err != nil {
		return rec, noStore(err)
	}
	if err := a.store(ctx, callSubject+generationOf(key, rec.Redrives), m.Data, jetstream.WithExpectLastSequencePerSubject(0),
		jetstream.WithMsgID(generationOf(key, rec.Redrives)+"."+strconv.FormatInt(rec.Created.UnixNano(), 10))); err != nil {
		return rec, noStore(err)
	}
	// This letter, and not one that the call may have left meanwhile.
	if err := a.dead.DeleteMsg(ctx, m.Sequence); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		a.log.Warn("dead letter stays after it was redriven", "call", key, "err", err)
	}
	return rec, nil
}

// list lists calls, those that changed last at the end.
func (a *asyncQueue) list(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	state, limit := q.Get("state"), 100
	var err error
	if s := q.Get("limit"); s != "" {
		limit, err = strconv.Atoi(s)
	}
	if err != nil || limit < 1 || limit > maxListed {
		wire.Refuse(http.StatusUnprocessableEntity, wire.CodeBadParameter,
			fmt.Sprintf("limit is %q, and must be from 1 to %d", wire.Cut(q.Get("limit")), maxListed)).About("limit").Within(maxListed).Write(w)
		return
	}
	switch state {
	case "", stateQueued, stateRunning, stateRetrying, stateSucceeded, stateFailed, stateCancelled:
	default:
		wire.Refuse(http.StatusUnprocessableEntity, wire.CodeBadParameter,
			fmt.Sprintf("state is %q, and must be queued, running, retrying, succeeded, failed or cancelled", wire.Cut(state))).About("state").Write(w)
		return
	}
	ctx, cancel, p := a.open(r.Context())
	defer cancel()
	if p != nil {
		p.Write(w)
		return
	}
	found := struct {
		Calls []record `json:"calls"`
		More  bool     `json:"more"` // there are others
	}{Calls: []record{}}
	err = a.each(ctx, func(rec record) bool {
		if state != "" && rec.State != state {
			return true
		}
		if found.More = len(found.Calls) == limit; !found.More {
			found.Calls = append(found.Calls, rec)
		}
		return !found.More
	})
	if err != nil {
		noStore(err).Write(w)
		return
	}
	reply(w, found)
}

// each shows all records to f until f says that it is enough.
func (a *asyncQueue) each(ctx context.Context, f func(record) bool) error {
	cons, err := a.js.OrderedConsumer(ctx, recordStream, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return err
	}
	info, err := cons.Info(ctx)
	if err != nil {
		return err
	}
	for left := info.NumPending; left > 0; {
		batch, err := cons.FetchNoWait(int(min(left, 500)))
		if err != nil {
			return err
		}
		n := uint64(0)
		for m := range batch.Messages() {
			n++
			var rec record
			if err := json.Unmarshal(m.Data(), &rec); err != nil {
				return err
			}
			if !f(rec) {
				return nil
			}
		}
		if batch.Error() != nil || n == 0 { // records that changed meanwhile are counted, but not there
			return batch.Error()
		}
		left -= min(n, left)
	}
	return nil
}
