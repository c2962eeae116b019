// Package registry is the record of replicas: which replicas a function has,
// where they are, and in what state.
//
// The [Watcher] makes it: it merges what the provider tells (counts) with what
// a source of addresses tells, and keeps one [Record] for each function in a
// bucket of NATS JetStream. The revision of a record is the epoch of its view.
// A [Registry] reads it, in functions that hold no credentials of the gateway:
// it keeps the last record when NATS is away, and asks the watcher, over NATS,
// for more replicas.
package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf"
)

const (
	// Bucket is the JetStream key-value bucket that holds the records, under
	// keys such as "worker.openfaas-fn".
	Bucket = "sheaf-views"
	// ChangesSubject, with a dot and a record's key after it, is where the watcher
	// publishes each record that it has written, as JSON with its epoch; one whose
	// function is gone has desired -1. These are messages of core NATS, for
	// whoever listens: nats sub 'sheaf.changes.>'.
	ChangesSubject = "sheaf.changes"
	// ScaleSubject is where the watcher takes requests for more replicas.
	ScaleSubject = "sheaf.scale"
	// DefaultNamespace is the namespace of a function that names none.
	DefaultNamespace = "openfaas-fn"
)

// Key returns the key of a function's record: its name with its namespace.
func Key(function string) string {
	if strings.Contains(function, ".") {
		return function
	}
	return function + "." + DefaultNamespace
}

// A Record is what is known of one function: its replicas in all states,
// those that are ready in rank order.
type Record struct {
	Function string          `json:"function"` // with its namespace
	Epoch    uint64          `json:"epoch,omitempty"`
	Desired  int             `json:"desired"`
	Replicas []sheaf.Replica `json:"replicas"`
}

// View returns the ready replicas.
func (r Record) View() sheaf.View {
	v := sheaf.View{Function: r.Function, Epoch: r.Epoch, Desired: r.Desired}
	for _, rep := range r.Replicas {
		if rep.State == sheaf.Ready {
			v.Replicas = append(v.Replicas, rep)
		}
	}
	return v
}

// order sorts replicas by rank: the one that has been ready longest is rank 0,
// so that a rank changes only when one before it leaves. Replicas that are not
// ready come after those that are.
func order(replicas []sheaf.Replica) {
	slices.SortFunc(replicas, func(a, b sheaf.Replica) int {
		if ra, rb := a.State == sheaf.Ready, b.State == sheaf.Ready; ra != rb {
			if ra {
				return -1
			}
			return 1
		}
		return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.ID, b.ID))
	})
}

// same says whether two records tell the same, whatever their epochs.
func same(a, b Record) bool {
	return a.Desired == b.Desired && slices.EqualFunc(a.Replicas, b.Replicas, func(x, y sheaf.Replica) bool {
		return x.ID == y.ID && x.URL == y.URL && x.State == y.State && x.Since.Equal(y.Since)
	})
}

// A Registry reads the record. Make one with Open; it may be used concurrently.
type Registry struct {
	js     jetstream.JetStream
	nc     *nats.Conn
	log    *slog.Logger
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // guards all below
	records map[string]Record
	synced  bool          // what the bucket held at first was read
	changed chan struct{} // closed, and made anew, at each change
}

var _ sheaf.Resolver = (*Registry)(nil)

// Open returns a Registry that follows the record over nc. It does not wait:
// the record may come later, or NATS may. A nil log means slog.Default. Close
// ends it.
func Open(nc *nats.Conn, log *slog.Logger) (*Registry, error) {
	if log == nil {
		log = slog.Default()
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open the record of replicas: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Registry{js: js, nc: nc, log: log, cancel: cancel, records: make(map[string]Record), changed: make(chan struct{})}
	r.wg.Go(func() { r.follow(ctx) })
	return r, nil
}

// Close ends the Registry, but not its connection.
func (r *Registry) Close() {
	r.cancel()
	r.wg.Wait()
}

// follow keeps reading the bucket, whatever happens to it.
func (r *Registry) follow(ctx context.Context) {
	pause := 5 * time.Millisecond
	for ctx.Err() == nil {
		begun := time.Now()
		err := r.read(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > time.Second {
			pause = 5 * time.Millisecond
		}
		r.log.Debug("record of replicas is not readable, trying again", "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, time.Second)
	}
}

// lostWait is how long a function that was known may be missing from a bucket
// that is read again, until it counts as gone: a bucket that NATS lost is empty
// at first, and the watcher fills it. A function that was deleted has left a
// mark in the bucket, and does not wait.
const lostWait = 5 * time.Second

// read follows the bucket until it cannot be followed any more.
func (r *Registry) read(ctx context.Context) error {
	// After a reconnection the bucket may be another one, and the client would
	// go on after the last revision of the former, 10 seconds later.
	connected := r.nc.StatusChanged(nats.CONNECTED)
	defer r.nc.RemoveStatusListener(connected)
	ask, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	kv, err := r.js.KeyValue(ask, Bucket)
	if err != nil {
		return err
	}
	w, err := kv.WatchAll(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }() // it ends with its connection in any case
	r.mu.Lock()
	missing := maps.Clone(r.records)
	r.mu.Unlock()
	var lost <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-connected:
			return errors.New("the connection is a new one")
		case e, ok := <-w.Updates():
			if !ok {
				return errors.New("the watch of the bucket ended")
			}
			if e != nil {
				delete(missing, e.Key())
			} else if len(missing) > 0 {
				lost = time.After(lostWait)
			}
			r.apply(e)
		case <-lost:
			r.drop(missing)
		}
	}
}

// drop forgets functions.
func (r *Registry) drop(gone map[string]Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key := range gone {
		delete(r.records, key)
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// apply takes one entry over; nil says that all there were at first are read.
func (r *Registry) apply(e jetstream.KeyValueEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case e == nil:
		r.synced = true
	case e.Operation() != jetstream.KeyValuePut:
		delete(r.records, e.Key())
	default:
		var rec Record
		if err := json.Unmarshal(e.Value(), &rec); err != nil {
			r.log.Error("record of a function is not readable; keeping the last one", "function", e.Key(), "err", err)
			return
		}
		rec.Epoch = e.Revision()
		r.records[e.Key()] = rec
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// get returns a function's record, and what is closed at the next change.
func (r *Registry) get(key string) (rec Record, known, synced bool, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, known = r.records[key]
	return rec, known, r.synced, r.changed
}

// newFunctionWait is how long a function that the record lacks may take to
// appear in it: it may have been deployed just now.
const newFunctionWait = 2 * time.Second

// Watch yields the views of a function as [sheaf.Resolver] says. The error
// sheaf.ErrNoFunction comes when the record has been read and the function is
// not in it, two seconds long at first. Without NATS, Watch waits.
func (r *Registry) Watch(ctx context.Context, function string) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		key := Key(function)
		var last Record
		var patience <-chan time.Time // runs once the record has been read
		seen, expired := false, false
		for {
			rec, known, synced, changed := r.get(key)
			switch {
			// The epoch alone does not tell: a bucket that was lost may count
			// from 1 again.
			case known && (!seen || rec.Epoch != last.Epoch || !same(rec, last)):
				seen, last = true, rec
				if !yield(rec.View(), nil) {
					return
				}
			case !known && synced && (seen || expired):
				yield(sheaf.View{}, fmt.Errorf("%s: %w", function, sheaf.ErrNoFunction))
				return
			}
			if synced && patience == nil {
				patience = time.After(newFunctionWait)
			}
			select {
			case <-changed:
			case <-patience:
				expired = true
			case <-ctx.Done():
				return
			}
		}
	}
}

// Records returns all records, by function.
func (r *Registry) Records() []Record {
	list, _, _ := r.list()
	return list
}

// list returns all records, whether the bucket has been read, and what is
// closed at the next change.
func (r *Registry) list() (list []Record, synced bool, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list = make([]Record, 0, len(r.records))
	for _, k := range slices.Sorted(maps.Keys(r.records)) {
		list = append(list, r.records[k])
	}
	return list, r.synced, r.changed
}

// scaleRequest asks for at least so many replicas.
type scaleRequest struct {
	Function string `json:"function"`
	Replicas int    `json:"replicas"`
}

type scaleReply struct {
	Replicas int    `json:"replicas"`
	Error    string `json:"error,omitempty"`
}

// AtLeast asks the watcher to have at least n replicas of a function run, and
// returns how many it will have run: fewer when the function's labels or the
// provider do not allow n.
func (r *Registry) AtLeast(ctx context.Context, function string, n int) (int, error) {
	body, err := json.Marshal(scaleRequest{Key(function), n})
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	msg, err := r.nc.RequestWithContext(ctx, ScaleSubject, body)
	if err != nil {
		return 0, fmt.Errorf("ask the watcher for %d replicas of %s: %w", n, function, err)
	}
	var answer scaleReply
	if err := json.Unmarshal(msg.Data, &answer); err != nil {
		return 0, fmt.Errorf("answer of the watcher: %w", err)
	}
	if answer.Error == sheaf.ErrNoFunction.Error() {
		return 0, fmt.Errorf("%s: %w", function, sheaf.ErrNoFunction)
	}
	if answer.Error != "" {
		return 0, fmt.Errorf("ask the watcher for %d replicas of %s: %s", n, function, answer.Error)
	}
	return answer.Replicas, nil
}
