package local

// async.go is the store of the calls that /async-function/ takes: what is
// configured, which streams there are, and how a call's record changes. How a
// call comes in is in async_front.go, how it runs in async_run.go, and how its
// caller is told in async_callback.go.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/internal/egress"
)

// Retry says how often and when a call is tried again.
type Retry struct {
	// Attempts in all; 0 means 10.
	Attempts int
	// Codes are the statuses of a function that are tried again; nil means
	// 408, 429, 500, 502, 503 and 504. That no replica could be reached is
	// always tried again.
	Codes []int
	// MinWait is the pause before the second attempt, and doubles with each
	// further one; 0 means 10 seconds.
	MinWait time.Duration
	// MaxWait bounds the pause; 0 means 120 seconds.
	MaxWait time.Duration
}

// AsyncConfig says how asynchronous calls are stored, run and told.
type AsyncConfig struct {
	// Parallel is how many calls of one function run at once, whatever the
	// others do, and how many callbacks of all; 0 means 16.
	Parallel int
	// BodyLimit is the longest body of a call that is stored, and ResultLimit
	// the longest answer, in bytes; 0 means 4 MiB, which is also the most.
	BodyLimit, ResultLimit int
	// QueueLimit is how many bytes of calls wait at most, and how many of
	// callbacks, results and dead letters are kept, each; 0 means 1 GiB. It is
	// less on a disk that is smaller.
	QueueLimit int64
	// ResultTTL is how long a result can be read; 0 means an hour.
	ResultTTL time.Duration
	// DeadTTL is how long a failed call can be redriven; 0 means 7 days.
	DeadTTL time.Duration
	// Lease is how long a call that runs may go unheard of before another
	// attempt begins. It is extended while the function runs; 0 means 10
	// seconds.
	Lease time.Duration
	// CallTimeout bounds one attempt; 0 means an hour.
	CallTimeout time.Duration
	// FunctionWait is how long after the start of the queue a call waits for
	// its function to be deployed, which counts as no attempt; 0 means a
	// minute.
	FunctionWait time.Duration
	// StopWait is how long Close lets running calls finish; the rest run again
	// after the next start. 0 means 5 seconds.
	StopWait time.Duration
	// Retry is the default; a function's annotations
	// com.openfaas.retry.attempts, .codes, .min_wait and .max_wait change it.
	Retry Retry

	// CallbackTries is how often a callback is tried; 0 means 20.
	CallbackTries int
	// CallbackFor is how long a callback is tried; 0 means 24 hours.
	CallbackFor time.Duration
	// CallbackMinWait is the pause after the first try, and doubles with each
	// further one up to CallbackMaxWait; 0 means 10 seconds, and 2 hours.
	CallbackMinWait, CallbackMaxWait time.Duration
	// CallbackAllow lists where callbacks may go beside public addresses: each
	// an address, a CIDR or host:port. nil means 127.0.0.0/8 and ::1, because
	// on this provider callers are called back on their own machine; an empty
	// list allows public addresses only.
	CallbackAllow []string
	// Lookup finds the addresses of a callback's host; nil means the system's
	// resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// SigningKeyFile holds the key that signs callbacks, and is read anew for
	// each, so that a key can be changed. A callback then has the header
	//
	//	X-Sheaf-Signature: t=UNIX,v1=HEX
	//
	// where HEX is the HMAC-SHA256, under the file's content without trailing
	// line ends, of the decimal UNIX seconds, a dot, and the body. "" signs
	// nothing. A file of two lines has two keys, while they rotate, and makes
	// two v1 fields, of which one must be right.
	SigningKeyFile string
}

// maxAsyncBody keeps a message, with its headers, below NATS's limit of 8 MiB.
const maxAsyncBody = 4 << 20

func orElse[T int | int64 | time.Duration](v *T, zero T) {
	if *v == 0 {
		*v = zero
	}
}

// Validate says what in the config cannot be.
func (c AsyncConfig) Validate() error {
	_, err := c.filled()
	return err
}

// filled returns the config with what zero means, or why it cannot be.
func (c AsyncConfig) filled() (AsyncConfig, error) {
	orElse(&c.Parallel, 16)
	orElse(&c.BodyLimit, maxAsyncBody)
	orElse(&c.ResultLimit, maxAsyncBody)
	orElse(&c.QueueLimit, 1<<30)
	orElse(&c.Retry.Attempts, 10)
	orElse(&c.CallbackTries, 20)
	for d, zero := range map[*time.Duration]time.Duration{
		&c.ResultTTL: time.Hour, &c.DeadTTL: 7 * 24 * time.Hour, &c.Lease: 10 * time.Second, &c.CallTimeout: time.Hour,
		&c.FunctionWait: time.Minute, &c.StopWait: 5 * time.Second, &c.Retry.MinWait: 10 * time.Second, &c.Retry.MaxWait: 2 * time.Minute,
		&c.CallbackFor: 24 * time.Hour, &c.CallbackMinWait: 10 * time.Second, &c.CallbackMaxWait: 2 * time.Hour,
	} {
		orElse(d, zero)
		if *d < 0 {
			return c, fmt.Errorf("async: a duration is %v, and must not be negative", *d)
		}
	}
	if c.Retry.Codes == nil {
		c.Retry.Codes = []int{http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout}
	}
	if c.CallbackAllow == nil {
		c.CallbackAllow = []string{"127.0.0.0/8", "::1/128"}
	}
	switch {
	case c.Parallel < 1 || c.Parallel > 1000:
		return c, fmt.Errorf("async: Parallel is %d, and must be from 1 to 1000", c.Parallel)
	case c.BodyLimit < 1 || c.BodyLimit > maxAsyncBody, c.ResultLimit < 1 || c.ResultLimit > maxAsyncBody:
		return c, fmt.Errorf("async: BodyLimit is %d and ResultLimit %d, and they must be from 1 to %d", c.BodyLimit, c.ResultLimit, maxAsyncBody)
	case c.QueueLimit < 1 || c.Retry.Attempts < 1 || c.CallbackTries < 1:
		return c, errors.New("async: QueueLimit, Retry.Attempts and CallbackTries must be at least 1")
	}
	for _, code := range c.Retry.Codes {
		if code < 400 || code > 599 {
			return c, fmt.Errorf("async: retry code %d must be from 400 to 599", code)
		}
	}
	if _, err := c.callbackPolicy(); err != nil {
		return c, err
	}
	if c.SigningKeyFile != "" {
		if _, err := c.key(); err != nil {
			return c, err
		}
	}
	return c, nil
}

// key reads the signing key.
func (c AsyncConfig) key() ([]byte, error) {
	key, err := os.ReadFile(c.SigningKeyFile)
	if err != nil {
		return nil, fmt.Errorf("async: signing key: %w", err)
	}
	if key = bytes.TrimRight(key, "\r\n"); len(key) == 0 {
		return nil, fmt.Errorf("async: signing key file %s is empty", c.SigningKeyFile)
	}
	return key, nil
}

// The streams. Calls and callbacks are work queues: a message is gone once it
// is acknowledged. The others keep the last message of a subject for a time.
// A subject ends in the call's key, and where a call may be redriven, in how
// often that was done: a redriven call cannot be mistaken for its former self.
const (
	callStream     = "sheaf-async-calls"
	callbackStream = "sheaf-async-callbacks"
	recordStream   = "sheaf-async-records"
	resultStream   = "sheaf-async-results"
	deadStream     = "sheaf-async-dead"

	callSubject     = "sheaf.async.call."
	callbackSubject = "sheaf.async.callback."
	recordSubject   = "sheaf.async.record."
	resultSubject   = "sheaf.async.result."
	deadSubject     = "sheaf.async.dead."
)

// maxAsyncCalls is how many calls may wait, and maxAsyncRecords how many bytes
// of records there may be when another call is taken.
const (
	maxAsyncCalls   = 100_000
	maxAsyncRecords = 256 << 20
)

// insufficientStorage is JetStream's code for a stream that may grow larger than
// the disk.
const insufficientStorage = jetstream.ErrorCode(10047)

// States of a call. The last three are final.
const (
	stateQueued    = "queued"
	stateRunning   = "running"
	stateRetrying  = "retrying"
	stateSucceeded = "succeeded"
	stateFailed    = "failed"
	stateCancelled = "cancelled"
)

// States of a callback.
const (
	callbackPending   = "pending"
	callbackDelivered = "delivered"
	callbackFailed    = "failed"
)

// record is what is told of a call.
type record struct {
	ID        string     `json:"id"`
	Function  string     `json:"function"`
	State     string     `json:"state"`
	Attempts  int        `json:"attempts"`
	Status    int        `json:"status,omitempty"` // of the last attempt
	Error     string     `json:"error,omitempty"`  // of the last attempt
	Created   time.Time  `json:"created"`
	Started   time.Time  `json:"started,omitzero"`    // the last attempt
	NotBefore time.Time  `json:"not_before,omitzero"` // the next attempt
	Finished  time.Time  `json:"finished,omitzero"`
	Redrives  int        `json:"redrives,omitempty"`
	Callback  *delivered `json:"callback,omitempty"`
	Digest    string     `json:"digest"` // of the request
}

// delivered is how far a callback has come.
type delivered struct {
	URL   string `json:"url"`
	State string `json:"state"`
	Tries int    `json:"tries"`
	Error string `json:"error,omitempty"`
}

func (r *record) final() bool {
	return r.State == stateSucceeded || r.State == stateFailed || r.State == stateCancelled
}

// asyncCall is a call as it is stored. It is stored by gob, as its answer is:
// the values of headers are bytes, and JSON would not keep all of them.
type asyncCall struct {
	ID, Function string
	Addressed    string // the function as the caller named it
	Method, Host string
	Path, Query  string // after the function's name, as they were sent
	Header       http.Header
	Body         []byte
	Callback     string
	Created      time.Time
	Digest       string
}

func (c *asyncCall) record() record {
	r := record{ID: c.ID, Function: c.Function, State: stateQueued, Created: c.Created, Digest: c.Digest}
	if c.Callback != "" {
		r.Callback = &delivered{URL: c.Callback, State: callbackPending}
	}
	return r
}

// asyncAnswer is what came of a call.
type asyncAnswer struct {
	Status  int
	Header  http.Header
	Body    []byte
	Seconds float64

	again bool // no function answered, so another attempt may
	stop  bool // another attempt would bring the same
}

func pack(v any) []byte {
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(v); err != nil {
		panic(err) // a type that gob cannot encode: a bug that every test sees
	}
	return b.Bytes()
}

func unpack(data []byte, v any) error { return gob.NewDecoder(bytes.NewReader(data)).Decode(v) }

// idKey makes a call's ID, which is its caller's choice, a token of a subject.
func idKey(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16])
}

// callOf is the key of a call: a function may pass its X-Call-Id on to another
// function, and that is another call.
func callOf(function, id string) string { return idKey(id) + "." + function }

// asyncQueue keeps calls until they have been made, however often the stack is
// restarted meanwhile. Make one with newAsync.
type asyncQueue struct {
	cfg    AsyncConfig
	front  *Front
	nc     *nats.Conn
	js     jetstream.JetStream
	log    *slog.Logger
	policy *egress.Policy // of callbacks
	client *http.Client
	begun  time.Time

	accepting chan struct{} // bounds the bodies in memory that come in
	ready     chan struct{} // closed when the streams are there
	records   jetstream.Stream
	results   jetstream.Stream
	dead      jetstream.Stream
	calls     jetstream.Stream

	ctx  context.Context // until nothing new begins
	stop context.CancelFunc
	life context.Context // until what runs is ended
	kill context.CancelCauseFunc
	wg   sync.WaitGroup

	mu      sync.Mutex                         // guards all below
	running map[string]context.CancelCauseFunc // by key
	lanes   map[string]bool                    // consumers that are worked for
	checked time.Time                          // when full was found out
	full    bool                               // there are too many records
}

var (
	errCancelled = errors.New("cancelled by its caller")
	errStopping  = errors.New("the stack is ending")
)

// newAsync starts the queue on what nc's JetStream has kept, and attaches it to
// the front. It does not wait for JetStream; calls do. What breaks it goes to
// failed. Close ends it.
func newAsync(cfg AsyncConfig, front *Front, nc *nats.Conn, log *slog.Logger, failed chan<- error) (*asyncQueue, error) {
	cfg, err := cfg.filled()
	if err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("async: %w", err)
	}
	a := &asyncQueue{cfg: cfg, front: front, nc: nc, js: js, log: log, begun: time.Now(),
		accepting: make(chan struct{}, 64), ready: make(chan struct{}), running: make(map[string]context.CancelCauseFunc), lanes: make(map[string]bool)}
	a.policy, _ = cfg.callbackPolicy() // filled has tried it
	a.client = a.policy.Client(callbackTimeout)
	a.ctx, a.stop = context.WithCancel(context.Background())
	a.life, a.kill = context.WithCancelCause(context.Background())
	front.async = a
	for pattern, h := range map[string]http.HandlerFunc{
		"GET /system/async":               a.list,
		"GET /system/async/{id}":          a.system,
		"DELETE /system/async/{id}":       a.system,
		"POST /system/async/{id}/redrive": a.system,
	} {
		front.mux.HandleFunc(pattern, h)
	}
	a.wg.Go(func() {
		if err := a.run(); err != nil && a.ctx.Err() == nil {
			select {
			case failed <- fmt.Errorf("async: %w", err):
			default: // something else broke first
			}
		}
	})
	return a, nil
}

// Close lets running calls finish for AsyncConfig.StopWait, and hands the rest back
// to the queue.
func (a *asyncQueue) Close() {
	a.mu.Lock()
	a.stop() // under the mutex: from here on, no lane begins
	a.mu.Unlock()
	late := time.AfterFunc(a.cfg.StopWait, func() { a.kill(errStopping) })
	a.wg.Wait()
	late.Stop()
	a.kill(errStopping)
	_ = a.nc.FlushTimeout(time.Second) // the last acknowledgements; one that is lost is made up for
}

// run makes the streams and works until Close.
func (a *asyncQueue) run() error {
	setup, cancel := context.WithTimeout(a.ctx, 30*time.Second)
	defer cancel()
	limit := a.cfg.QueueLimit
	callbacks, err := a.streams(setup, limit)
	// JetStream reserves what a stream may hold, of a part of the disk.
	for limit > 1<<20 && hasCode(err, insufficientStorage) {
		limit /= 2
		a.log.Warn("the disk is small: fewer async calls are kept", "bytes", limit)
		callbacks, err = a.streams(setup, limit)
	}
	if err != nil {
		return err
	}
	if err := a.revive(setup); err != nil {
		return err
	}
	close(a.ready)
	return a.work(setup, callbacks, "sheaf", callbackSubject+">", a.callback)
}

// revive makes lanes for the calls that an earlier stack has left.
func (a *asyncQueue) revive(ctx context.Context) error {
	info, err := a.calls.Info(ctx, jetstream.WithSubjectFilter(callSubject+">"))
	if err != nil {
		return err
	}
	left := map[string]bool{}
	for subject := range info.State.Subjects {
		key, _ := generation(subject, callSubject)
		left[key[strings.IndexByte(key, '.')+1:]] = true
	}
	consumers := a.calls.ConsumerNames(ctx)
	for name := range consumers.Name() {
		if function, is := strings.CutPrefix(name, lanePrefix); !is || !left[function] {
			if err := a.calls.DeleteConsumer(ctx, name); err != nil {
				return fmt.Errorf("consumer %s: %w", name, err)
			}
		}
	}
	if err := consumers.Err(); err != nil {
		return err
	}
	for function := range left {
		if err := a.lane(ctx, function); err != nil {
			return err
		}
	}
	return nil
}

// lanePrefix begins the name of the consumer of a function's calls.
const lanePrefix = "call-"

// lane makes sure that a function's calls are made. Each function has a
// consumer and places of its own: one that is slow keeps no other waiting.
func (a *asyncQueue) lane(ctx context.Context, function string) error {
	a.mu.Lock()
	has := a.lanes[lanePrefix+function]
	a.mu.Unlock()
	if has {
		return nil
	}
	return a.work(ctx, a.calls, lanePrefix+function, callSubject+"*."+function+".*", a.call)
}

// work handles the messages of a stream that the filter names, by the consumer
// of that name, until Close.
func (a *asyncQueue) work(ctx context.Context, stream jetstream.Stream, name, filter string, handle func(jetstream.Msg) (time.Duration, bool)) error {
	// A call that waits for its next attempt counts as pending: the limit
	// must not keep others from running.
	cons, err := stream.CreateOrUpdateConsumer(ctx, jetstream.ConsumerConfig{Durable: name, FilterSubject: filter,
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: a.cfg.Lease, MaxDeliver: -1, MaxAckPending: 2 * maxAsyncCalls})
	if err != nil {
		return fmt.Errorf("consumer of %s: %w", stream.CachedInfo().Config.Name, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.lanes[name] || a.ctx.Err() != nil { // what is stored waits for the next stack
		return nil
	}
	a.lanes[name] = true
	for range a.cfg.Parallel {
		a.wg.Go(func() { a.pull(cons, handle) })
	}
	return nil
}

// streams makes the streams, each for so many bytes at most, or changes them.
func (a *asyncQueue) streams(ctx context.Context, limit int64) (callbacks jetstream.Stream, err error) {
	queue := jetstream.StreamConfig{Retention: jetstream.WorkQueuePolicy, Discard: jetstream.DiscardNew,
		MaxMsgs: maxAsyncCalls, MaxBytes: limit, Storage: jetstream.FileStorage, Duplicates: 2 * time.Minute}
	keep := jetstream.StreamConfig{Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, MaxMsgsPerSubject: 1,
		MaxBytes: limit, Storage: jetstream.FileStorage, AllowDirect: true}
	for _, s := range []struct {
		to            *jetstream.Stream
		cfg           jetstream.StreamConfig
		name, subject string
		age           time.Duration
	}{
		{&a.calls, queue, callStream, callSubject, 0},
		{&callbacks, queue, callbackStream, callbackSubject, 0},
		{&a.results, keep, resultStream, resultSubject, a.cfg.ResultTTL},
		{&a.dead, keep, deadStream, deadSubject, a.cfg.DeadTTL},
		{&a.records, keep, recordStream, recordSubject, 0},
	} {
		s.cfg.Name, s.cfg.Subjects, s.cfg.MaxAge = s.name, []string{s.subject + ">"}, s.age
		if s.age > 0 {
			s.cfg.Duplicates = min(2*time.Minute, s.age)
		}
		if s.to == &a.records { // each record has its own time to live, and none is dropped before it
			s.cfg.AllowMsgTTL, s.cfg.MaxBytes = true, -1
		}
		if *s.to, err = a.js.CreateOrUpdateStream(ctx, s.cfg); err != nil {
			return nil, fmt.Errorf("stream %s: %w", s.name, err)
		}
	}
	return callbacks, nil
}

// pull takes one message at a time, so that none waits, its lease running, for
// another one to end. handle says after how long a message shall come again,
// or that it is done.
func (a *asyncQueue) pull(cons jetstream.Consumer, handle func(jetstream.Msg) (wait time.Duration, done bool)) {
	for a.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(a.ctx, 30*time.Second)
		msg, err := cons.Next(jetstream.FetchContext(ctx))
		cancel()
		if err != nil { // there is nothing to do, or NATS is away
			a.pause(a.ctx, 50*time.Millisecond)
			continue
		}
		wait, done := a.leased(msg, handle)
		switch {
		case done:
			err = msg.Ack()
		case wait <= 0:
			err = msg.Nak()
		default:
			err = msg.NakWithDelay(wait)
		}
		if err != nil {
			a.log.Warn("message of the async queue comes again", "subject", msg.Subject(), "err", err)
		}
	}
}

// leased handles a message and tells JetStream meanwhile that it is worked on.
func (a *asyncQueue) leased(msg jetstream.Msg, handle func(jetstream.Msg) (time.Duration, bool)) (time.Duration, bool) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(max(a.cfg.Lease/3, time.Millisecond))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if err := msg.InProgress(); err != nil {
					a.log.Warn("lease is not extended", "subject", msg.Subject(), "err", err)
				}
			case <-done:
				return
			}
		}
	})
	defer wg.Wait()
	defer close(done)
	return handle(msg)
}

func (a *asyncQueue) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// ttl is how long a record is kept. That of a call which is not finished goes,
// too, should its message have been lost.
func (a *asyncQueue) ttl(r record) time.Duration {
	d := a.cfg.ResultTTL
	if !r.final() || r.State == stateFailed || r.Callback != nil && r.Callback.State == callbackPending {
		d = max(d, a.cfg.DeadTTL, a.cfg.CallbackFor)
	}
	return max(d.Truncate(time.Second), time.Second) // NATS counts seconds
}

// get reads a record and its revision, which is 0 if there is none.
func (a *asyncQueue) get(ctx context.Context, key string) (r record, revision uint64, err error) {
	m, err := a.records.GetLastMsgForSubject(ctx, recordSubject+key)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return record{}, 0, nil
	}
	if err != nil {
		return record{}, 0, err
	}
	return r, m.Sequence, json.Unmarshal(m.Data, &r)
}

// put writes a record if its revision is still the given one.
func (a *asyncQueue) put(ctx context.Context, key string, r record, revision uint64) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = a.js.Publish(ctx, recordSubject+key, body,
		jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithMsgTTL(a.ttl(r)))
	return err
}

// taken says whether err means that there is a message already, or another
// revision.
func taken(err error) bool {
	return hasCode(err, jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func hasCode(err error, codes ...jetstream.ErrorCode) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && slices.Contains(codes, api.ErrorCode)
}

// change changes a record as f says, unless f says no, whoever else changes it
// meanwhile, and however long NATS is away: until ctx ends. f may be called
// more than once. A record that is missing begins as zero.
func (a *asyncQueue) change(ctx context.Context, key string, zero record, f func(*record) bool) (r record, err error) {
	err = a.persist(ctx, func(ctx context.Context) error {
		var revision uint64
		if r, revision, err = a.get(ctx, key); err != nil {
			return err
		}
		if revision == 0 {
			r = zero
		}
		if r.Callback != nil {
			r.Callback = new(*r.Callback) // zero keeps its own
		}
		if !f(&r) {
			return nil
		}
		return a.put(ctx, key, r, revision)
	})
	return r, err
}

var errRefused = errors.New("JetStream refused")

// store publishes a message once: a second one of the same ID, or on a work
// queue's subject that has one, is the same message. That JetStream refuses is
// errRefused at once; that it does not answer is no error until ctx ends.
func (a *asyncQueue) store(ctx context.Context, subject string, data []byte, opts ...jetstream.PublishOpt) error {
	var refused error
	err := a.persist(ctx, func(ctx context.Context) error {
		_, err := a.js.Publish(ctx, subject, data, opts...)
		if taken(err) {
			return nil
		}
		if _, api := errors.AsType[*jetstream.APIError](err); api || errors.Is(err, nats.ErrMaxPayload) {
			refused = fmt.Errorf("%w: %w", errRefused, err)
			return nil
		}
		return err
	})
	if err == nil {
		err = refused
	}
	return err
}

// persist calls f until it succeeds or ctx ends.
func (a *asyncQueue) persist(ctx context.Context, f func(context.Context) error) error {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := f(once)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || errors.Is(err, nats.ErrConnectionClosed) {
			return err
		}
		if taken(err) { // somebody else was first: see what they did
			continue
		}
		a.log.Debug("async queue waits for JetStream", "err", err)
		a.pause(ctx, wait)
	}
}

// generation splits a subject of a work queue into key and redrives.
func generation(subject, prefix string) (key string, redrives int) {
	rest := strings.TrimPrefix(subject, prefix)
	i := strings.LastIndexByte(rest, '.')
	redrives, _ = strconv.Atoi(rest[i+1:]) // we wrote it
	return rest[:i], redrives
}

func generationOf(key string, redrives int) string { return key + "." + strconv.Itoa(redrives) }
