package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
)

// A Provider tells which functions there are and how many replicas each shall
// have, and scales them. A gateway.Client is one.
type Provider interface {
	Functions(ctx context.Context) ([]types.FunctionStatus, error)
	Scale(ctx context.Context, function string, n int) error
}

// A Source tells where replicas are: a View of each function with its replicas
// in all states, again on each change; Desired -1 says that the function is
// gone, and a View without a function that the source lives. A gateway.Client
// of a local provider is one.
type Source interface {
	Replicas(ctx context.Context) iter.Seq2[sheaf.View, error]
}

// A Watcher keeps the record of replicas. Its fields must not change once Run
// is called. Several Watchers of one provider agree: they write only what
// differs from what is there.
type Watcher struct {
	Conn     *nats.Conn
	Provider Provider
	Source   Source
	// Period is how often the provider is asked for counts; 0 means 1 second.
	Period time.Duration
	// Durable keeps the record on disk. Otherwise it is gone with the NATS
	// server, and written again.
	Durable bool
	Log     *slog.Logger // nil means slog.Default

	kv    jetstream.KeyValue
	known map[string]*watched
}

// watched is what the watcher knows of one function.
type watched struct {
	status  *types.FunctionStatus // of the provider; nil before it told
	view    *sheaf.View           // of the source; nil before it told
	written Record                // what the bucket holds, by our knowledge
}

// scaleOrder is a request for replicas with the way to answer it.
type scaleOrder struct {
	scaleRequest
	answer func(scaleReply)
}

// Run keeps the record until ctx ends. It returns an error only if it cannot
// begin; what fails later is tried again.
func (w *Watcher) Run(ctx context.Context) error {
	if w.Log == nil {
		w.Log = slog.Default()
	}
	if w.Period <= 0 {
		w.Period = time.Second
	}
	w.known = make(map[string]*watched)
	js, err := jetstream.New(w.Conn)
	if err != nil {
		return fmt.Errorf("watcher: %w", err)
	}
	if err := w.open(ctx, js); err != nil {
		return fmt.Errorf("watcher: %w", err)
	}
	orders := make(chan scaleOrder)
	sub, err := w.Conn.QueueSubscribe(ScaleSubject, "watcher", func(m *nats.Msg) { w.order(ctx, m, orders) })
	if err != nil {
		return fmt.Errorf("watcher: take scale requests: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }() // ends with its connection in any case

	views := make(chan sheaf.View)
	counts := make(chan []types.FunctionStatus)
	poll := make(chan struct{}, 1)
	poll <- struct{}{}
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	go func() { defer close(done); w.source(ctx, views, poll) }()
	polled := make(chan struct{})
	go func() { defer close(polled); w.poll(ctx, poll, counts) }()
	defer func() { cancel(); <-done; <-polled }()

	again := time.NewTicker(w.Period)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case v := <-views:
			w.seen(v)
		case list := <-counts:
			w.counted(list)
		case o := <-orders:
			o.answer(w.scale(ctx, o.scaleRequest))
		case <-again.C: // what could not be written before
			select {
			case poll <- struct{}{}:
			default:
			}
		}
		if err := w.write(ctx); err != nil && ctx.Err() == nil {
			w.Log.Warn("record of replicas is not writable; trying again", "err", err)
			if errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, jetstream.ErrNoStreamResponse) ||
				errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, nats.ErrNoResponders) {
				err = w.open(ctx, js)
			}
			if err != nil {
				w.Log.Debug("bucket", "err", err)
			}
		}
	}
}

// open makes or finds the bucket, and forgets what it held before.
func (w *Watcher) open(ctx context.Context, js jetstream.JetStream) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	storage := jetstream.MemoryStorage
	if w.Durable {
		storage = jetstream.FileStorage
	}
	kv, err := js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: Bucket, Description: "replicas of functions; the revision is the epoch", Storage: storage, History: 1,
	})
	if err != nil {
		return fmt.Errorf("make bucket %s: %w", Bucket, err)
	}
	w.kv = kv
	for _, k := range w.known {
		k.written = Record{}
	}
	return nil
}

// source reads the stream of addresses, again and again.
func (w *Watcher) source(ctx context.Context, views chan<- sheaf.View, poll chan<- struct{}) {
	pause := 10 * time.Millisecond
	for ctx.Err() == nil {
		for v, err := range w.Source.Replicas(ctx) {
			if err != nil {
				if ctx.Err() == nil {
					w.Log.Warn("addresses are not known; asking again", "err", err, "pause", pause)
				}
				break
			}
			pause = 10 * time.Millisecond
			select {
			case views <- v:
			case <-ctx.Done():
				return
			}
		}
		select { // whatever was missed
		case poll <- struct{}{}:
		default:
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, 2*time.Second)
		case <-ctx.Done():
		}
	}
}

// poll asks the provider for its functions when told to.
func (w *Watcher) poll(ctx context.Context, when <-chan struct{}, counts chan<- []types.FunctionStatus) {
	for {
		select {
		case <-when:
		case <-ctx.Done():
			return
		}
		ask, cancel := context.WithTimeout(ctx, 10*time.Second)
		list, err := w.Provider.Functions(ask)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				w.Log.Warn("functions are not known; keeping the last list", "err", err)
			}
			continue
		}
		select {
		case counts <- list:
		case <-ctx.Done():
			return
		}
	}
}

func (w *Watcher) of(key string) *watched {
	k := w.known[key]
	if k == nil {
		k = &watched{}
		w.known[key] = k
	}
	return k
}

// seen takes over what the source told.
func (w *Watcher) seen(v sheaf.View) {
	switch {
	case v.Function == "": // a heartbeat
	case v.Desired < 0:
		if k := w.known[Key(v.Function)]; k != nil {
			k.view, k.status = nil, nil
		}
	default:
		w.of(Key(v.Function)).view = &v
	}
}

// counted takes over what the provider told. A function that it does not list
// is gone, whatever the source told of it.
func (w *Watcher) counted(list []types.FunctionStatus) {
	here := make(map[string]bool, len(list))
	for _, s := range list {
		name := s.Name
		if s.Namespace != "" {
			name += "." + s.Namespace
		}
		here[Key(name)] = true
		w.of(Key(name)).status = &s
	}
	for key, k := range w.known {
		if !here[key] && k.status != nil { // it was listed once: not one that is too new
			k.view, k.status = nil, nil
		}
	}
}

// record merges what is known of a function. ok is false when it is gone.
func (k *watched) record(key string) (rec Record, ok bool) {
	rec = Record{Function: key}
	if k.status != nil {
		rec.Desired = int(k.status.Replicas)
	}
	if k.view != nil {
		rec.Desired = k.view.Desired
		rec.Replicas = slices.Clone(k.view.Replicas)
		order(rec.Replicas)
	}
	return rec, k.status != nil || k.view != nil
}

// write brings the bucket up to date.
func (w *Watcher) write(ctx context.Context) error {
	for _, key := range slices.Sorted(maps.Keys(w.known)) {
		k := w.known[key]
		rec, here := k.record(key)
		if here && k.written.Epoch > 0 && same(rec, k.written) {
			continue
		}
		if err := w.put(ctx, key, rec, here); err != nil {
			return err
		}
		if !here {
			delete(w.known, key)
		}
	}
	return nil
}

// put writes one record by compare-and-set, so that of two watchers the one
// that knows less does not undo the other's work unseen.
func (w *Watcher) put(ctx context.Context, key string, rec Record, here bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	body, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	k := w.known[key]
	for {
		epoch := k.written.Epoch
		if epoch == 0 { // another watcher, or our former self, may have written
			e, err := w.kv.Get(ctx, key)
			switch {
			case err == nil:
				var old Record
				epoch = e.Revision()
				if json.Unmarshal(e.Value(), &old) == nil && here && same(rec, old) {
					k.written = rec
					k.written.Epoch = epoch
					return nil
				}
			case !errors.Is(err, jetstream.ErrKeyNotFound):
				return err
			case !here:
				return nil
			}
		}
		if !here {
			return w.kv.Delete(ctx, key)
		}
		if epoch == 0 {
			epoch, err = w.kv.Create(ctx, key, body)
		} else {
			epoch, err = w.kv.Update(ctx, key, body, epoch)
		}
		if errors.Is(err, jetstream.ErrKeyExists) {
			k.written = Record{}
			continue
		}
		if err != nil {
			return err
		}
		k.written = rec
		k.written.Epoch = epoch
		return nil
	}
}

// order takes a scale request from NATS to the watcher's loop.
func (w *Watcher) order(ctx context.Context, m *nats.Msg, orders chan<- scaleOrder) {
	answer := func(a scaleReply) {
		if body, err := json.Marshal(a); err == nil {
			_ = m.Respond(body) // the asker has a deadline of its own
		}
	}
	var req scaleRequest
	if err := json.Unmarshal(m.Data, &req); err != nil || req.Function == "" || req.Replicas < 1 {
		answer(scaleReply{Error: "the request names no function, or fewer than 1 replica"})
		return
	}
	select {
	case orders <- scaleOrder{req, answer}:
	case <-ctx.Done():
	}
}

// scale raises a function's replicas to what is asked, as far as its labels
// allow. It never lowers them: others may be using them.
func (w *Watcher) scale(ctx context.Context, req scaleRequest) scaleReply {
	k := w.known[Key(req.Function)]
	if k == nil || k.status == nil && k.view == nil {
		return scaleReply{Error: sheaf.ErrNoFunction.Error()}
	}
	rec, _ := k.record(req.Function)
	n := max(req.Replicas, rec.Desired)
	if k.status != nil && k.status.Labels != nil {
		if most, err := strconv.Atoi((*k.status.Labels)["com.openfaas.scale.max"]); err == nil {
			n = max(min(n, most), rec.Desired)
		}
	}
	if n == rec.Desired {
		return scaleReply{Replicas: n}
	}
	name, _, _ := strings.Cut(req.Function, ".")
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	if err := w.Provider.Scale(ctx, name, n); err != nil {
		return scaleReply{Error: err.Error()}
	}
	return scaleReply{Replicas: n}
}
