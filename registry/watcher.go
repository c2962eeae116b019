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
	"sync"
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
// gone, and a View without a function that the source lives and has told all.
// A gateway.Client of a local provider is one.
//
// A source that knows addresses only, such as kube.Source, says Desired -2:
// which of its names are functions, and how many replicas they shall have, is
// then the provider's word alone. A Replica whose Since is zero is dated by the
// watcher, when it first hears of it in its state.
type Source interface {
	Replicas(ctx context.Context) iter.Seq2[sheaf.View, error]
}

// A Watcher keeps the record of replicas. Its fields must not change once Run
// is called. Of several Watchers of one provider one writes, and another one
// goes on within seconds when it ends; all take requests for more replicas.
type Watcher struct {
	Conn     *nats.Conn
	Provider Provider
	Source   Source
	// Period is how often the provider is asked for counts; 0 means 1 second.
	Period time.Duration
	// Durable keeps the record on disk. Otherwise it is gone with the NATS
	// server, and written again. A record that is there stays as it is kept.
	Durable bool
	Log     *slog.Logger // nil means slog.Default

	kv     jetstream.KeyValue
	stream jetstream.Stream // that the bucket is
	made   time.Time        // when it was made
	last   uint64           // the greatest revision seen
	known  map[string]*watched
	round  int // of the source: how many streams have broken
	lease  *lease
	// erase is kv.Delete of a given revision; the simulator of sim_test.go has another.
	erase func(ctx context.Context, key string, last uint64) error

	counting sync.Mutex // guards stats
	stats    Stats
}

// Stats counts what a Watcher has done since Run began, and says how it is.
type Stats struct {
	Writing          bool      // it is the one that writes
	Functions        int       // that it knows of
	Writes           uint64    // of records
	LastWrite        time.Time // zero before the first one
	WriteFailures    uint64    // attempts to bring the record up to date that failed
	SourceUp         bool      // addresses come
	SourceFailures   uint64    // streams of addresses that broke
	ProviderFailures uint64    // lists of functions that could not be had
	ScaleRequests    uint64    // for more replicas
	Scaled           uint64    // of these, that raised the number
}

// Stats returns the counts. It may be called concurrently with Run.
func (w *Watcher) Stats() Stats {
	w.counting.Lock()
	defer w.counting.Unlock()
	return w.stats
}

func (w *Watcher) count(f func(*Stats)) {
	w.counting.Lock()
	defer w.counting.Unlock()
	f(&w.stats)
}

// watched is what the watcher knows of one function.
type watched struct {
	status  *types.FunctionStatus // of the provider; nil before it told
	view    *sheaf.View           // of the source; nil before it told
	former  []sheaf.Replica       // from the bucket, until the source tells
	dated   []sheaf.Replica       // as they were written, or are about to be
	told    int                   // the round in which the source told of it
	missed  int                   // lists of the provider in a row that lack it
	written Record                // what the bucket holds; Epoch 0: not known
	erased  bool                  // the bucket holds nothing of it
}

// goneAfter is how many lists of the provider must lack a function until it is
// gone: one may have been made before the function was, or be empty because
// the provider has only just started. The source's word is enough at once.
const goneAfter = 2

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
	w.erase = func(ctx context.Context, key string, last uint64) error {
		return w.kv.Delete(ctx, key, jetstream.LastRevision(last))
	}
	js, err := jetstream.New(w.Conn)
	if err != nil {
		return fmt.Errorf("watcher: %w", err)
	}
	if err := w.open(ctx, js); err != nil {
		return fmt.Errorf("watcher: %w", err)
	}
	w.lease = newLease(js)
	if err := w.lease.keep(ctx); err != nil {
		return fmt.Errorf("watcher: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if w.Conn.IsConnected() {
			w.lease.release(ctx)
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sub, err := w.Conn.QueueSubscribe(ScaleSubject, "watcher", func(m *nats.Msg) { w.order(ctx, m) })
	if err != nil {
		return fmt.Errorf("watcher: take scale requests: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }() // ends with its connection in any case

	views := make(chan sheaf.View)
	broken := make(chan struct{})
	counts := make(chan []types.FunctionStatus)
	poll := make(chan struct{}, 1)
	poll <- struct{}{}
	var wg sync.WaitGroup
	wg.Go(func() { w.source(ctx, views, broken, poll) })
	wg.Go(func() { w.poll(ctx, poll, counts) })
	defer func() { cancel(); wg.Wait() }()

	again := time.NewTicker(w.Period)
	defer again.Stop()
	failing := false
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case v := <-views:
			w.seen(v)
			w.lease.unfit = time.Time{}
			w.count(func(s *Stats) { s.SourceUp = true })
		case <-broken:
			w.round++
			if w.lease.unfit.IsZero() {
				w.lease.unfit = time.Now()
			}
			w.count(func(s *Stats) { s.SourceUp = false; s.SourceFailures++ })
		case list := <-counts:
			w.counted(list)
		case <-again.C:
			nudge(poll)
			before := w.lease.held()
			if err = w.lease.keep(ctx); err == nil {
				err = w.look(ctx, js)
			}
			if !before {
				w.forget() // another one may have written
			}
		}
		writes := w.lease.held()
		if err == nil && writes {
			err = w.write(ctx)
		}
		w.count(func(s *Stats) {
			s.Writing, s.Functions = writes, len(w.known)
			if err != nil && ctx.Err() == nil {
				s.WriteFailures++
			}
		})
		if err != nil && !failing && ctx.Err() == nil {
			w.Log.Warn("record of replicas is not writable; trying again", "err", err)
		}
		failing = err != nil
	}
}

// nudge asks for a poll, unless one is asked for already.
func nudge(poll chan<- struct{}) {
	select {
	case poll <- struct{}{}:
	default:
	}
}

// look finds out whether the bucket is as we left it. NATS may have lost it,
// and another watcher, or a person, may have written to it; what it holds is
// then read again before it is written.
func (w *Watcher) look(ctx context.Context, js jetstream.JetStream) error {
	ask, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	info, err := w.stream.Info(ask)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return w.open(ctx, js)
	case err != nil:
		return fmt.Errorf("look at bucket %s: %w", Bucket, err)
	case !info.Created.Equal(w.made):
		return w.open(ctx, js)
	case info.State.LastSeq != w.last:
		w.last = info.State.LastSeq
		w.forget()
	}
	return nil
}

// forget leaves open what the bucket holds.
func (w *Watcher) forget() {
	for _, k := range w.known {
		k.written, k.erased = Record{}, false
	}
}

// open makes or finds the bucket, and forgets what it held before. Functions
// that it holds from earlier are known from then on: they keep their replicas
// until the source has spoken, and are removed if nobody tells of them.
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
	if err != nil { // one that is there, and kept in another way, is as good
		if there, bad := js.KeyValue(ctx, Bucket); bad == nil {
			kv, err = there, nil
		}
	}
	if err != nil {
		return fmt.Errorf("make bucket %s: %w", Bucket, err)
	}
	stream, err := js.Stream(ctx, "KV_"+Bucket)
	if err != nil {
		return fmt.Errorf("open bucket %s: %w", Bucket, err)
	}
	info := stream.CachedInfo()
	if info.State.Msgs == 0 && info.State.LastSeq < w.last {
		// A bucket that was lost and made again counts on from where it was:
		// epochs rise, whatever happens to NATS.
		if err := stream.Purge(ctx, jetstream.WithPurgeSequence(w.last+1)); err != nil {
			return fmt.Errorf("set the epoch of bucket %s: %w", Bucket, err)
		}
	}
	keys, err := kv.Keys(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
		return fmt.Errorf("read bucket %s: %w", Bucket, err)
	}
	w.kv, w.stream, w.made, w.last = kv, stream, info.Created, max(w.last, info.State.LastSeq)
	for _, key := range keys {
		k := w.of(key)
		var old Record
		if e, err := kv.Get(ctx, key); err == nil && json.Unmarshal(e.Value(), &old) == nil {
			k.former, k.dated = old.Replicas, old.Replicas
		}
	}
	w.forget()
	return nil
}

// source reads the stream of addresses, again and again.
func (w *Watcher) source(ctx context.Context, views chan<- sheaf.View, broken, poll chan<- struct{}) {
	pause := 10 * time.Millisecond
	failing := false
	for ctx.Err() == nil {
		for v, err := range w.Source.Replicas(ctx) {
			if err != nil {
				if !failing && ctx.Err() == nil {
					w.Log.Warn("addresses are not known; asking again", "err", err)
				}
				failing = true
				break
			}
			pause, failing = 10*time.Millisecond, false
			select {
			case views <- v:
			case <-ctx.Done():
				return
			}
		}
		nudge(poll) // for whatever was missed
		select {
		case broken <- struct{}{}:
		case <-ctx.Done():
			return
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
	failing := false
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
			w.count(func(s *Stats) { s.ProviderFailures++ })
			if !failing && ctx.Err() == nil {
				w.Log.Warn("functions are not known; keeping the last list", "err", err)
			}
			failing = true
			continue
		}
		failing = false
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

// unknown is the Desired of a source that knows addresses only.
const unknown = -2

// seen takes over what the source told.
func (w *Watcher) seen(v sheaf.View) {
	switch {
	case v.Function == "": // a heartbeat, by when the source has told all
		for _, k := range w.known {
			k.former = nil
			if k.view != nil && k.told != w.round { // it went while nobody heard it
				if k.view = nil; k.status == nil {
					k.missed = goneAfter
				}
			}
		}
	case v.Desired == unknown && len(v.Replicas) == 0:
		if k := w.known[Key(v.Function)]; k != nil {
			k.view, k.former = nil, nil
		}
	case v.Desired < 0 && v.Desired != unknown:
		if k := w.known[Key(v.Function)]; k != nil {
			k.view, k.status, k.former, k.missed = nil, nil, nil, goneAfter
		}
	default:
		k := w.of(Key(v.Function))
		k.view, k.former, k.missed, k.told = &v, nil, 0, w.round
	}
}

// keyOf is the key of a function that the provider lists.
func keyOf(s types.FunctionStatus) string {
	if s.Namespace == "" {
		return Key(s.Name)
	}
	return s.Name + "." + s.Namespace
}

// counted takes over what the provider told.
func (w *Watcher) counted(list []types.FunctionStatus) {
	here := make(map[string]bool, len(list))
	for _, s := range list {
		key := keyOf(s)
		here[key] = true
		k := w.of(key)
		k.status, k.missed = &s, 0
	}
	for key, k := range w.known {
		// One that only the source tells of, and no list did yet, is new.
		if !here[key] && (k.status != nil || k.view == nil) {
			k.missed++
		}
	}
}

// record merges what is known of a function. ok is false when it is gone, or
// nothing was told of it yet.
func (k *watched) record(key string) (rec Record, ok bool) {
	rec = Record{Function: key, Replicas: k.former}
	if k.status != nil {
		rec.Desired = int(k.status.Replicas)
	}
	told := k.view != nil && k.view.Desired != unknown // of the function itself
	if told {
		rec.Desired = k.view.Desired
	}
	if k.view != nil {
		rec.Replicas = k.date(k.view.Replicas)
		order(rec.Replicas)
	}
	return rec, k.missed < goneAfter && (k.status != nil || told)
}

// date returns replicas with the time since when they have been in their state:
// what the source says, else what the record says, else now. Watchers that come
// later, or look at the same time, so agree on ranks.
func (k *watched) date(replicas []sheaf.Replica) []sheaf.Replica {
	now := time.Now().UTC()
	list := slices.Clone(replicas)
	for i, r := range list {
		if !r.Since.IsZero() {
			continue
		}
		list[i].Since = now
		for _, o := range k.dated {
			if o.ID == r.ID && o.State == r.State {
				list[i].Since = o.Since
			}
		}
	}
	k.dated = list
	return slices.Clone(list)
}

// write brings the bucket up to date.
func (w *Watcher) write(ctx context.Context) error {
	for _, key := range slices.Sorted(maps.Keys(w.known)) {
		k := w.known[key]
		rec, here := k.record(key)
		switch {
		case here && k.written.Epoch > 0 && same(rec, k.written):
			continue
		case !here && (k.missed < goneAfter || k.erased):
			continue
		}
		if err := w.put(ctx, key, rec, here); err != nil {
			return fmt.Errorf("write the record of %s: %w", key, err)
		}
		k.erased = !here
		if !here && k.view == nil {
			delete(w.known, key)
		}
		// What the source told of a function is kept even when the provider
		// lists it no more: if that was a mistake, the source has no reason to
		// tell it again.
	}
	return nil
}

// put writes one record by compare-and-set, so that of two watchers the one
// that knows less does not undo the other's work unseen.
func (w *Watcher) put(ctx context.Context, key string, rec Record, here bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	k := w.known[key]
	for {
		epoch := k.written.Epoch
		if epoch == 0 { // another watcher, or our former self, may have written
			e, err := w.kv.Get(ctx, key)
			switch {
			case err == nil:
				var old Record
				epoch = e.Revision()
				if json.Unmarshal(e.Value(), &old) == nil && here {
					k.dated = old.Replicas
					if rec, _ = k.record(key); same(rec, old) {
						k.written = rec
						k.written.Epoch = epoch
						return nil
					}
				}
			case !errors.Is(err, jetstream.ErrKeyNotFound):
				return err
			case !here:
				return nil
			}
		}
		body, err := json.Marshal(rec)
		switch {
		case err != nil:
		case !here:
			err = w.erase(ctx, key, epoch)
			epoch = 0
		case epoch == 0:
			epoch, err = w.kv.Create(ctx, key, body)
		default:
			epoch, err = w.kv.Update(ctx, key, body, epoch)
		}
		if errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			k.written = Record{}
			continue
		}
		if err != nil {
			return err
		}
		k.written = rec
		k.written.Epoch = epoch
		w.last = max(w.last, epoch)
		w.publish(key, rec, epoch)
		w.count(func(s *Stats) { s.Writes++; s.LastWrite = time.Now() })
		return nil
	}
}

// publish tells listeners what was written. Those who must not miss it read the
// bucket.
func (w *Watcher) publish(key string, rec Record, epoch uint64) {
	if rec.Epoch = epoch; epoch == 0 {
		rec = Record{Function: key, Desired: -1}
	}
	body, err := json.Marshal(rec)
	if err == nil {
		err = w.Conn.Publish(ChangesSubject+"."+key, body)
	}
	if err != nil {
		w.Log.Debug("change of replicas is not published", "function", key, "err", err)
	}
}

// order answers a scale request. It runs beside the watcher's loop, which a
// provider that hangs must not hold up; requests are taken one after another.
func (w *Watcher) order(ctx context.Context, m *nats.Msg) {
	w.count(func(s *Stats) { s.ScaleRequests++ })
	var req scaleRequest
	answer := scaleReply{Error: "the request names no function, or fewer than 1 replica"}
	if err := json.Unmarshal(m.Data, &req); err == nil && req.Function != "" && req.Replicas > 0 {
		answer = w.scale(ctx, req)
	}
	if body, err := json.Marshal(answer); err == nil {
		_ = m.Respond(body) // the asker has a deadline of its own
	}
}

// scale raises a function's replicas to what is asked, as far as its labels
// allow. It never lowers them, since others may be using them: how many there
// are is asked of the provider now, as what the watcher knows may be old.
func (w *Watcher) scale(ctx context.Context, req scaleRequest) scaleReply {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	list, err := w.Provider.Functions(ctx)
	if err != nil {
		return scaleReply{Error: err.Error()}
	}
	key := Key(req.Function)
	i := slices.IndexFunc(list, func(s types.FunctionStatus) bool { return keyOf(s) == key })
	if i < 0 {
		return scaleReply{Error: sheaf.ErrNoFunction.Error()}
	}
	n, has := req.Replicas, int(list[i].Replicas)
	if labels := list[i].Labels; labels != nil {
		if most, err := strconv.Atoi((*labels)["com.openfaas.scale.max"]); err == nil {
			n = min(n, most)
		}
	}
	if n <= has {
		return scaleReply{Replicas: has}
	}
	if err := w.Provider.Scale(ctx, strings.TrimSuffix(key, "."+DefaultNamespace), n); err != nil {
		return scaleReply{Error: err.Error()}
	}
	w.count(func(s *Stats) { s.Scaled++ })
	return scaleReply{Replicas: n}
}
