package job

// store.go opens the store, and keeps a copy of the records of one function's
// jobs in memory, by which a master sees what others do without asking.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// Bucket is the key-value bucket that holds records, progress and results,
	// under keys such as "master.ID.state" and "master.ID.block.0".
	Bucket = "sheaf-jobs"
	// InputStream is the stream that holds inputs in pieces.
	InputStream = "sheaf-job-inputs"

	subjects     = "$KV." + Bucket + "."
	inputSubject = "sheaf.job.input."
	beatSubject  = "sheaf.job.beat."
)

// Config says whose jobs a Store keeps, and within which limits. Function and
// Master must be set; the zero of every other field is usable.
type Config struct {
	Function string // whose jobs; its masters share them
	Master   string // this process, among all that ever were

	MaxQueued int           // jobs that are queued or running; 0 means 1000
	Parallel  int           // jobs that this master runs at once; 0 means 4
	ResultTTL time.Duration // how long a job is kept after its end; 0 means 24 h
	InputTTL  time.Duration // how long an input is kept at most; 0 means 7 days
	// StoreBytes is how much records and results may take in JetStream, and
	// InputBytes how much inputs may, over all functions; 0 means 1 GiB and
	// 4 GiB. It is less on a disk that is smaller.
	StoreBytes, InputBytes int64
	// Lease is how long a master may be silent before others take its jobs; 0
	// means 1.2 seconds.
	Lease time.Duration
	// Step is called before and after each step that is stored, with names such
	// as "claim.before"; tests end the process there. nil means not at all.
	Step func(name string)
	Log  *slog.Logger // nil means slog.Default
}

func (c Config) withDefaults() Config {
	or := func(p *int, n int) {
		if *p <= 0 {
			*p = n
		}
	}
	or(&c.MaxQueued, 1000)
	or(&c.Parallel, 4)
	for d, zero := range map[*time.Duration]time.Duration{
		&c.ResultTTL: 24 * time.Hour, &c.InputTTL: 7 * 24 * time.Hour, &c.Lease: 1200 * time.Millisecond,
	} {
		if *d <= 0 {
			*d = zero
		}
	}
	if c.StoreBytes <= 0 {
		c.StoreBytes = 1 << 30
	}
	if c.InputBytes <= 0 {
		c.InputBytes = 4 << 30
	}
	if c.Step == nil {
		c.Step = func(string) {}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// A Store keeps the jobs of one function. Make one with Open; it may be used
// concurrently.
type Store struct {
	cfg   Config
	space string // what keys of this function begin with
	nc    *nats.Conn
	js    jetstream.JetStream
	log   *slog.Logger
	stop  context.CancelFunc
	wg    sync.WaitGroup
	ready chan struct{} // closed when kv, stream and inputs are set
	host  host
	shelf shelf

	kv     jetstream.KeyValue
	stream jetstream.Stream // of kv
	inputs jetstream.Stream

	mu       sync.Mutex           // guards all below
	jobs     map[string]*seen     // by ID
	synced   bool                 // all that there was at first has been read
	changed  chan struct{}        // closed, and made anew, at each change
	beats    map[string]time.Time // when each master was heard last
	listened time.Time            // since when masters could be heard
	leases   map[string]*Lease    // of jobs that this master runs, by ID
}

// seen is a job as this master sees it.
type seen struct {
	Record
	at       time.Time // when this revision was seen
	progress Progress  // of a run
	counted  uint64    // revision of progress
	dropped  bool      // its results have been
}

// Open returns a Store over nc. It does not wait: JetStream may come later.
// Close ends it, but not nc.
func Open(nc *nats.Conn, cfg Config) (*Store, error) {
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open the store of jobs: %w", err)
	}
	cfg = cfg.withDefaults()
	ctx, stop := context.WithCancel(context.Background())
	s := &Store{
		cfg: cfg, space: strings.ReplaceAll(cfg.Function, ".", "_") + ".", nc: nc, js: js, log: cfg.Log, stop: stop,
		ready: make(chan struct{}), jobs: make(map[string]*seen), changed: make(chan struct{}),
		beats: make(map[string]time.Time), leases: make(map[string]*Lease), host: process{},
	}
	s.shelf = inJetStream{s}
	s.wg.Go(func() {
		for wait := 5 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, time.Second) {
			err := s.setUp(ctx)
			if err == nil {
				close(s.ready)
				s.follow(ctx)
				return
			}
			s.log.Debug("the store of jobs is not there, trying again", "err", err)
			pause(ctx, wait)
		}
	})
	return s, nil
}

// Close ends the Store.
func (s *Store) Close() {
	s.stop()
	s.wg.Wait()
}

// setUp makes the bucket and the stream, or takes those that are there.
func (s *Store) setUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	kv := jetstream.KeyValueConfig{Bucket: Bucket, Description: "jobs of sheaf", Storage: jetstream.FileStorage,
		MaxBytes: s.cfg.StoreBytes, LimitMarkerTTL: time.Minute}
	in := jetstream.StreamConfig{Name: InputStream, Subjects: []string{inputSubject + ">"}, Storage: jetstream.FileStorage,
		Discard: jetstream.DiscardNew, MaxBytes: s.cfg.InputBytes, MaxAge: s.cfg.InputTTL, MaxMsgsPerSubject: 1}
	// JetStream reserves what a stream may hold: on a small disk it may hold less.
	fit := func(size *int64, create func() error) error {
		err := create()
		for *size > 1<<20 && hasCode(err, insufficientStorage) {
			*size /= 2
			err = create()
		}
		return err
	}
	err := fit(&kv.MaxBytes, func() (err error) {
		if s.kv, err = s.js.KeyValue(ctx, Bucket); errors.Is(err, jetstream.ErrBucketNotFound) {
			s.kv, err = s.js.CreateKeyValue(ctx, kv)
		}
		return err
	})
	if err == nil {
		s.stream, err = s.js.Stream(ctx, "KV_"+Bucket)
	}
	if err == nil {
		err = fit(&in.MaxBytes, func() (err error) {
			if s.inputs, err = s.js.Stream(ctx, InputStream); errors.Is(err, jetstream.ErrStreamNotFound) {
				s.inputs, err = s.js.CreateStream(ctx, in)
			}
			return err
		})
	}
	return err
}

// open waits until the store can be asked, for a short time.
func (s *Store) open(ctx context.Context) error {
	t := time.NewTimer(5 * time.Second)
	defer t.Stop()
	select {
	case <-s.ready:
		if err := s.shelf.away(); err != nil {
			return fmt.Errorf("%w: %w", ErrAway, err)
		}
		return nil
	case <-t.C:
		return ErrAway
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrAway, context.Cause(ctx))
	}
}

// Ready says whether the store could be asked just now.
func (s *Store) Ready() bool {
	select {
	case <-s.ready:
		return s.shelf.away() == nil
	default:
		return false
	}
}

// follow keeps the copy of the records, whatever happens to NATS.
func (s *Store) follow(ctx context.Context) {
	for wait := 5 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, time.Second) {
		begun := time.Now()
		err := s.read(ctx)
		if time.Since(begun) > time.Second {
			wait = 5 * time.Millisecond
		}
		if ctx.Err() == nil {
			s.log.Debug("the records of jobs cannot be followed, trying again", "err", err)
		}
		pause(ctx, wait)
	}
}

func (s *Store) read(ctx context.Context) error {
	// After a reconnection the bucket may be another one; and masters that were
	// not heard meanwhile may have been alive.
	connected := s.nc.StatusChanged(nats.CONNECTED)
	defer s.nc.RemoveStatusListener(connected)
	beats, err := s.nc.Subscribe(beatSubject+strings.TrimSuffix(s.space, "."), s.heard)
	if err != nil {
		return err
	}
	defer func() { _ = beats.Unsubscribe() }() // it ends with its connection in any case
	gone := s.begin()
	w, err := s.kv.WatchFiltered(ctx, []string{s.space + "*.state", s.space + "*.progress"})
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }() // as above
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-connected:
			return errors.New("the connection is a new one")
		case e, ok := <-w.Updates():
			switch {
			case !ok:
				return errors.New("the watch of the bucket ended")
			case e == nil:
				s.caughtUp(gone)
			default:
				s.entry(gone, e)
			}
		}
	}
}

// begin returns the jobs that are known when the records are read anew: those
// that are not met again are gone.
func (s *Store) begin() (gone map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listened = s.host.now()
	gone = make(map[string]bool, len(s.jobs))
	for id := range s.jobs {
		gone[id] = true
	}
	return gone
}

// caughtUp says that all that there was has been read.
func (s *Store) caughtUp(gone map[string]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced = true
	for id := range gone {
		delete(s.jobs, id)
	}
	s.tell()
}

// entry takes one entry of the bucket over.
func (s *Store) entry(gone map[string]bool, e jetstream.KeyValueEntry) {
	id, what, _ := strings.Cut(strings.TrimPrefix(e.Key(), s.space), ".")
	if what == "state" {
		delete(gone, id)
	}
	s.apply(id, what, e)
}

// tell wakes those who wait for a change. s.mu is held.
func (s *Store) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// heard notes a heartbeat: a master's ID.
func (s *Store) heard(m *nats.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.beats) > 10_000 { // of masters that are long gone
		clear(s.beats)
		s.listened = s.host.now()
	}
	s.beats[string(m.Data)] = s.host.now()
}

// apply takes over what the bucket has of a job: its record, or its progress.
func (s *Store) apply(id, what string, e jetstream.KeyValueEntry) {
	if what == "progress" {
		s.mu.Lock()
		defer s.mu.Unlock()
		j := s.jobs[id]
		var p Progress
		if j == nil || e.Operation() != jetstream.KeyValuePut || e.Revision() <= j.counted || json.Unmarshal(e.Value(), &p) != nil {
			return
		}
		j.progress, j.counted = p, e.Revision()
		s.tell()
		return
	}
	if e.Operation() != jetstream.KeyValuePut {
		s.mu.Lock()
		defer s.mu.Unlock()
		if j := s.jobs[id]; j != nil && j.Revision < e.Revision() {
			delete(s.jobs, id)
			s.fenceOff(id, e.Revision())
			s.tell()
		}
		return
	}
	r, err := decode(e)
	if err != nil {
		s.log.Error("record of a job is not readable", "job", id, "err", err)
		return
	}
	s.saw(r)
}

// saw takes a record over, unless a later one is known.
func (s *Store) saw(r Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.jobs[r.ID]
	if j == nil {
		j = &seen{}
		s.jobs[r.ID] = j
	}
	if j.Revision >= r.Revision {
		return
	}
	if r.State == Queued {
		j.dropped = false
	}
	r.Error = nil // it may be long, and is asked for seldom
	j.Record, j.at = r, s.host.now()
	s.fenceOff(r.ID, r.Revision)
	s.tell()
}

// fenceOff ends the run of a job whose record another one has written. s.mu is
// held.
func (s *Store) fenceOff(id string, revision uint64) {
	if l := s.leases[id]; l != nil && !l.own && revision > l.fence {
		l.cancel(ErrFenced)
	}
}

func decode(e jetstream.KeyValueEntry) (Record, error) {
	var r Record
	if err := json.Unmarshal(e.Value(), &r); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	r.Revision = e.Revision()
	return r, nil
}

func (s *Store) key(id, what string) string { return s.space + id + "." + what }

// Get returns a job's record.
func (s *Store) Get(ctx context.Context, id string) (Record, error) {
	if err := s.open(ctx); err != nil {
		return Record{}, err
	}
	ctx, cancel := s.host.within(ctx, 5*time.Second)
	defer cancel()
	return s.get(ctx, id)
}

func (s *Store) get(ctx context.Context, id string) (Record, error) {
	e, err := s.shelf.get(ctx, s.key(id, "state"))
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		return Record{}, fmt.Errorf("%w as %q", ErrNotFound, id)
	case err != nil:
		return Record{}, fmt.Errorf("%w: %w", ErrAway, err)
	}
	r, err := decode(e)
	if err == nil {
		s.saw(r)
	}
	return r, err
}

// put writes a record if it still has the revision that it was read with, 0
// for one that is new, and returns it with its revision.
func (s *Store) put(ctx context.Context, r Record) (Record, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return r, err
	}
	if r.Revision == 0 {
		r.Revision, err = s.shelf.create(ctx, s.key(r.ID, "state"), body)
		if errors.Is(err, jetstream.ErrKeyExists) {
			err = errExists
		}
	} else {
		r.Revision, err = s.shelf.update(ctx, s.key(r.ID, "state"), body, r.Revision)
	}
	if err == nil {
		s.saw(r)
	}
	return r, err
}

var errExists = errors.New("there is a record")

// change changes a record as f says, unless f says no, whoever else does
// meanwhile. f may be called more than once; it says no to what it did before.
func (s *Store) change(ctx context.Context, id, step string, f func(*Record) (bool, error)) (Record, error) {
	if err := s.open(ctx); err != nil {
		return Record{}, err
	}
	var r Record
	for {
		err := s.persist(ctx, func(ctx context.Context) error {
			var err error
			if r, err = s.get(ctx, id); errors.Is(err, ErrNotFound) || errors.Is(err, ErrDamaged) {
				return nil
			}
			return err
		})
		if err != nil {
			return r, err
		}
		if r.ID == "" {
			return r, fmt.Errorf("%w as %q", ErrNotFound, id)
		}
		if ok, err := f(&r); !ok || err != nil {
			return r, err
		}
		s.cfg.Step(step + ".before")
		once, cancel := s.host.within(ctx, 5*time.Second)
		r, err = s.put(once, r)
		cancel()
		s.cfg.Step(step + ".after")
		switch {
		case err == nil:
			return r, nil
		case refused(err) != nil:
			return r, refused(err)
		case ctx.Err() != nil:
			return r, fmt.Errorf("%w: %w", ErrAway, err)
		case !taken(err): // it may have been written
			s.host.pause(ctx, 20*time.Millisecond)
		}
	}
}

// Known returns what this master knows of a job without asking: its record,
// without Error, how far its run is, and a channel that is closed when
// anything changes. ok is false for a job that it knows nothing of.
func (s *Store) Known(id string) (r Record, p Progress, changed <-chan struct{}, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j := s.jobs[id]; j != nil {
		return j.Record, j.counts(), s.changed, true
	}
	return Record{}, Progress{}, s.changed, false
}

// counts is how far a job is.
func (j *seen) counts() Progress {
	if j.Progress != nil && j.State.Final() {
		return *j.Progress
	}
	p := j.progress
	if n := max(j.Input.Blocks, p.Total); !j.State.Final() && (p.Total != n || j.State == Queued) { // before its run has counted
		p.Total, p.Running, p.Failed, p.Stopped = n, 0, 0, 0
		p.Queued = n - p.Done
	}
	return p
}

// List returns the records of all jobs, the newest first, without Error.
func (s *Store) List(ctx context.Context) ([]Record, error) {
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	for !s.synced {
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrAway, context.Cause(ctx))
		}
		s.mu.Lock()
	}
	list := make([]Record, 0, len(s.jobs))
	for _, j := range s.jobs {
		r := j.Record
		r.Progress = new(j.counts())
		list = append(list, r)
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b Record) int {
		if c := b.Created.Compare(a.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return list, nil
}

// pending counts the jobs that are queued or running.
func (s *Store) pending() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for j := range maps.Values(s.jobs) {
		if !j.State.Final() {
			n++
		}
	}
	return n
}

// Cancel ends a job that has not ended. One that has stays what it is.
func (s *Store) Cancel(ctx context.Context, id string) (Record, error) {
	r, err := s.change(ctx, id, "cancel", func(r *Record) (bool, error) {
		if r.State.Final() {
			return false, nil
		}
		now := s.host.now().UTC()
		r.State, r.Finished, r.Expires = Cancelled, now, now.Add(s.cfg.ResultTTL)
		_, p, _, _ := s.Known(id)
		p.Stopped += p.Queued + p.Running
		p.Queued, p.Running = 0, 0
		r.Progress = &p
		return true, nil
	})
	if err == nil && r.State == Cancelled {
		s.dropInput(id, r.Input.Upload)
	}
	return r, err
}

// Redrive queues a failed job again; the results that it has are kept.
func (s *Store) Redrive(ctx context.Context, id string) (Record, error) {
	var at time.Time
	r, err := s.change(ctx, id, "redrive", func(r *Record) (bool, error) {
		if !at.IsZero() && r.State == Queued {
			return false, nil // it was this call that queued it
		}
		if r.State != Failed {
			return false, fmt.Errorf("%w: job %s is %s, and only a failed one can be redriven", ErrState, id, r.State)
		}
		at = s.host.now()
		r.State, r.Owner, r.Redrives, r.Deaths = Queued, "", r.Redrives+1, 0
		r.Started, r.Finished, r.Expires, r.Error, r.Progress, r.Lacks = time.Time{}, time.Time{}, time.Time{}, nil, nil, false
		return true, nil
	})
	if err == nil { // what a handler had saved may be why it failed
		if err := s.shelf.drop(ctx, s.key(id, "saved.*"), r.Revision); err != nil {
			s.log.Debug("what handlers saved stays", "job", id, "err", err)
		}
	}
	return r, err
}
