package job

// lease.go runs jobs: who may take one, and what its master writes for it.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf"
)

const (
	beatsPerLease  = 5
	othersWait     = 500 * time.Millisecond // before a job is taken that another master has accepted
	commitsAtOnce  = 8                      // results of one job on their way to JetStream
	resultsAhead   = 8                      // results that are read before they are needed
	expiredFor     = time.Hour              // how long a job whose results were dropped is remembered
	sweepEvery     = time.Second
	handOverWithin = 2 * time.Second
)

// Run takes jobs that wait for a master, and those of masters that have fallen
// silent, and has work do each, until ctx ends and the last work has returned.
// The context of work ends with ErrFenced when the job was cancelled or taken
// by another master, and with ctx; a job that work does not End after ctx ended
// is handed over to whoever is there. A job that work leaves otherwise is run
// again.
func (s *Store) Run(ctx context.Context, work func(context.Context, *Lease)) {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	// Beats go on until the last job has ended or is handed over.
	beating, still := context.WithCancel(context.WithoutCancel(ctx))
	defer still()
	wg.Go(func() { s.beat(beating) })
	wg.Go(func() { s.sweep(ctx) })
	var jobs sync.WaitGroup
	defer still()
	defer jobs.Wait()
	tick := time.NewTicker(s.cfg.Lease / 10)
	defer tick.Stop()
	for last := s.host.now(); ; last = s.host.now() {
		s.awake(last)
		changed, free := s.take(ctx, &jobs, work)
		if !free {
			changed = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// awake is told when this process looked around last: if that is long ago it
// was stopped, and has heard nobody meanwhile.
func (s *Store) awake(last time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.host.now(); now.Sub(last) > s.cfg.Lease/2 {
		s.listened = now
	}
}

// beat tells the other masters that this one lives.
func (s *Store) beat(ctx context.Context) {
	tick := time.NewTicker(s.cfg.Lease / beatsPerLease)
	defer tick.Stop()
	for {
		s.shelf.beat(beatSubject+strings.TrimSuffix(s.space, "."), s.cfg.Master)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// take claims the jobs that may be claimed, the oldest first, as many as this
// master may run.
func (s *Store) take(ctx context.Context, wg *sync.WaitGroup, work func(context.Context, *Lease)) (changed <-chan struct{}, free bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.host.now()
	var open []*seen
	for _, j := range s.jobs {
		if s.leases[j.ID] == nil && s.claimable(j, now) {
			open = append(open, j)
		}
	}
	slices.SortFunc(open, func(a, b *seen) int { return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.ID, b.ID)) })
	for _, j := range open {
		if len(s.leases) >= s.cfg.Parallel {
			return s.changed, false
		}
		l := &Lease{s: s, rec: j.Record, fence: j.Revision, own: true}
		run, cancel := context.WithCancelCause(ctx)
		l.cancel = cancel
		s.leases[j.ID] = l
		s.host.start(wg, func() {
			defer func() {
				cancel(nil)
				s.mu.Lock()
				delete(s.leases, l.rec.ID)
				s.tell()
				s.mu.Unlock()
			}()
			l.run(run, work)
			if ctx.Err() == nil && !l.ended {
				s.host.pause(ctx, s.cfg.Lease/10) // whatever went wrong shall not go wrong at full speed
			}
		})
	}
	return s.changed, len(s.leases) < s.cfg.Parallel
}

// claimable says whether a job waits for a master, or its master is silent.
// s.mu is held.
func (s *Store) claimable(j *seen, now time.Time) bool {
	switch {
	case j.State == Queued && (j.Owner == "" || j.Owner == s.cfg.Master):
		return true
	case j.State == Queued:
		return now.Sub(j.at) > othersWait
	case j.State != Running:
		return false
	case j.Owner == s.cfg.Master:
		return true // its run here was left
	}
	heard := s.listened
	for _, t := range []time.Time{j.at, s.beats[j.Owner]} {
		if t.After(heard) {
			heard = t
		}
	}
	return now.Sub(heard) > s.cfg.Lease
}

// A Lease is a job that this master runs. Its methods may be called
// concurrently, but End is the last one.
type Lease struct {
	s      *Store
	rec    Record
	fence  uint64 // revision of the claim; does not change while work runs
	cancel context.CancelCauseFunc
	own    bool // a record of its own is on its way, which shall not fence it off; guarded by s.mu
	ended  bool
	saved  map[int]bool // blocks of which a handler has saved its work in an earlier run

	pending sync.WaitGroup
	slots   chan struct{}
}

// Record is the job as it was claimed.
func (l *Lease) Record() Record { return l.rec }

// run claims the job and has work do it.
func (l *Lease) run(ctx context.Context, work func(context.Context, *Lease)) {
	s := l.s
	err := l.claim(ctx)
	if err != nil {
		if !errors.Is(err, ErrFenced) {
			s.log.Debug("a job could not be claimed", "job", l.rec.ID, "err", err)
		}
		return
	}
	s.log.Info("job claimed", "job", l.rec.ID, "epoch", l.rec.Epoch)
	l.slots = make(chan struct{}, commitsAtOnce)
	if l.rec.Epoch > 1 {
		l.findSaved(ctx)
	}
	work(ctx, l)
	l.Wait()
	if !l.ended && ctx.Err() != nil && !errors.Is(context.Cause(ctx), ErrFenced) {
		// This master ends: others need not wait until it has been silent.
		last, cancel := s.host.within(context.WithoutCancel(ctx), handOverWithin)
		defer cancel()
		r := l.rec
		r.State, r.Owner = Queued, ""
		if _, err := s.put(last, r); err != nil {
			s.log.Debug("a job is not handed over; it waits until this master has been silent", "job", r.ID, "err", err)
		}
	}
}

// claim writes this master into the record.
func (l *Lease) claim(ctx context.Context) error {
	s, r := l.s, l.rec
	if _, p, _, _ := s.Known(r.ID); r.State == Running {
		if p.Done > r.Done {
			r.Deaths, r.Done = 0, p.Done
		}
		r.Deaths++
	}
	r.State, r.Owner, r.Epoch = Running, s.cfg.Master, r.Epoch+1
	if r.Started.IsZero() {
		r.Started = s.host.now().UTC()
	}
	s.cfg.Step("claim.before")
	got, err := s.claimed(ctx, r)
	s.cfg.Step("claim.after")
	if err != nil {
		return err
	}
	s.mu.Lock()
	l.rec, l.fence, l.own = got, got.Revision, false
	if j := s.jobs[r.ID]; j == nil || j.Revision != got.Revision {
		l.cancel(ErrFenced) // somebody was quicker to write again
	}
	s.mu.Unlock()
	return nil
}

func (s *Store) claimed(ctx context.Context, r Record) (Record, error) {
	once, cancel := s.host.within(ctx, 5*time.Second)
	defer cancel()
	got, err := s.put(once, r)
	if err == nil {
		return got, nil
	}
	if !taken(err) { // it may have been written
		again, cancel := s.host.within(ctx, 5*time.Second)
		defer cancel()
		if there, e := s.get(again, r.ID); e == nil && there.Owner == r.Owner && there.Epoch == r.Epoch && there.State == Running {
			return there, nil
		}
		return r, err
	}
	return r, ErrFenced
}

// put writes an entry of the job under its fence.
func (l *Lease) put(ctx context.Context, what string, data []byte) error {
	s := l.s
	key, state := s.key(l.rec.ID, what), s.key(l.rec.ID, "state")
	for {
		err := s.persist(ctx, func(ctx context.Context) error { return s.shelf.putUnder(ctx, key, data, state, l.fence) })
		if !taken(err) {
			return err
		}
		// A cluster also refuses one while another under the same fence is on
		// its way.
		r, err := s.get(ctx, l.rec.ID)
		if err == nil && r.Revision != l.fence || errors.Is(err, ErrNotFound) {
			l.cancel(ErrFenced)
			return ErrFenced
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.host.pause(ctx, 2*time.Millisecond)
	}
}

// stored is what stands before a block's result.
type stored struct {
	Offset   int64         `json:"offset"`
	Bytes    int           `json:"bytes"`
	From     string        `json:"from"`
	Attempts int           `json:"attempts"`
	Elapsed  time.Duration `json:"elapsed_ns"`
	Verified bool          `json:"verified"`
	Epoch    int           `json:"epoch"`
	Size     int           `json:"size"` // of the result
	Digest   string        `json:"digest"`
	Parts    int           `json:"parts,omitempty"` // that it is stored in, when it is long
}

// Commit stores the result of a block, and calls then when it is stored. It
// may return before that; an error ends the run's context with it as cause.
func (l *Lease) Commit(ctx context.Context, r sheaf.Result, then func()) {
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return
	}
	l.s.host.start(&l.pending, func() {
		defer func() { <-l.slots }()
		l.s.cfg.Step("block.before")
		if err := l.commit(ctx, r); err != nil {
			l.cancel(fmt.Errorf("store the result of block %d: %w", r.Index, err))
			return
		}
		l.s.cfg.Step("block.after")
		then()
	})
}

func (l *Lease) commit(ctx context.Context, r sheaf.Result) error {
	sum := sha256.Sum256(r.Data)
	head := stored{r.Offset, r.Bytes, r.From, r.Attempts, r.Elapsed, r.Verified, l.rec.Epoch, len(r.Data), hex.EncodeToString(sum[:]), 0}
	data := r.Data
	if len(data) > pieceBytes {
		for piece := range slices.Chunk(data, pieceBytes) {
			if err := l.put(ctx, fmt.Sprintf("part.%d.%d.%d", r.Index, l.rec.Epoch, head.Parts), piece); err != nil {
				return err
			}
			head.Parts++
		}
		data = nil
	}
	line, err := json.Marshal(head)
	if err != nil {
		return err
	}
	return l.put(ctx, "block."+strconv.Itoa(r.Index), append(append(line, '\n'), data...))
}

// Progress tells how far the run is. It is no loss when that fails.
func (l *Lease) Progress(ctx context.Context, p Progress) {
	body, err := json.Marshal(p)
	if err == nil {
		short, cancel := l.s.host.within(ctx, time.Second)
		defer cancel()
		err = l.put(short, "progress", body)
	}
	if err != nil {
		l.s.log.Debug("progress of a job is not told", "job", l.rec.ID, "err", err)
	}
}

// maxSaved is how much of a block's state is stored, in bytes: more is held by
// the master alone, and lost with it.
const maxSaved = pieceBytes

// Save stores what a handler has saved of its work at a block, for a master
// that comes after this one. It is no loss when that fails.
func (l *Lease) Save(ctx context.Context, block int, state []byte) {
	if len(state) > maxSaved {
		return
	}
	l.s.cfg.Step("save.before")
	short, cancel := l.s.host.within(ctx, 5*time.Second)
	defer cancel()
	if err := l.put(short, "saved."+strconv.Itoa(block), state); err != nil {
		l.s.log.Debug("what a handler saved is not stored", "job", l.rec.ID, "block", block, "err", err)
	}
	l.s.cfg.Step("save.after")
}

// Saved returns what a handler had saved of its work at a block, before this
// run, or nil.
func (l *Lease) Saved(ctx context.Context, block int) []byte {
	if !l.saved[block] {
		return nil
	}
	e, err := l.s.shelf.get(ctx, l.s.key(l.rec.ID, "saved."+strconv.Itoa(block)))
	if err != nil {
		l.s.log.Debug("what a handler saved cannot be read; it begins anew", "job", l.rec.ID, "block", block, "err", err)
		return nil
	}
	return e.Value()
}

// findSaved looks for what handlers have saved before this run.
func (l *Lease) findSaved(ctx context.Context) {
	ctx, cancel := l.s.host.within(ctx, 5*time.Second)
	defer cancel()
	list, err := l.s.shelf.below(ctx, l.s.key(l.rec.ID, "saved."))
	if err != nil {
		l.s.log.Debug("what handlers saved cannot be read; they begin anew", "job", l.rec.ID, "err", err)
		return
	}
	l.saved = make(map[int]bool, len(list))
	for _, index := range list {
		if i, err := strconv.Atoi(index); err == nil {
			l.saved[i] = true
		}
	}
}

// Keep stores something about the job beside its results, which Kept reads.
func (l *Lease) Keep(ctx context.Context, data []byte) error { return l.put(ctx, "kept", data) }

// Kept returns what Keep has stored for a job, or nil.
func (s *Store) Kept(ctx context.Context, id string) (data []byte, err error) {
	err = s.persist(ctx, func(ctx context.Context) error {
		e, err := s.shelf.get(ctx, s.key(id, "kept"))
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil
		}
		if err == nil {
			data = e.Value()
		}
		return err
	})
	return data, err
}

// Wait waits until every Commit so far is stored.
func (l *Lease) Wait() { l.s.host.wait(&l.pending) }

// End stores the final state that f writes into the record. It fails with
// ErrFenced if the job has become another's.
func (l *Lease) End(ctx context.Context, f func(*Record)) error {
	s, r := l.s, l.rec
	l.Wait()
	r.Finished = s.host.now().UTC()
	r.Expires = r.Finished.Add(s.cfg.ResultTTL)
	f(&r)
	s.cfg.Step("end.before")
	s.mu.Lock()
	l.own = true
	s.mu.Unlock()
	err := s.persist(ctx, func(ctx context.Context) error {
		_, err := s.put(ctx, r)
		if !taken(err) {
			return err
		}
		if there, err := s.get(ctx, r.ID); err != nil {
			return err
		} else if there.Revision != l.fence && there.Epoch == r.Epoch && there.Owner == r.Owner && there.State == r.State && there.Redrives == r.Redrives {
			return nil // it was this call, whose answer did not come
		}
		return ErrFenced
	})
	s.cfg.Step("end.after")
	if err == nil {
		l.ended = true
		if r.State != Failed { // one that failed may run again
			s.dropInput(r.ID, r.Input.Upload)
		}
	}
	return err
}

// Done returns the indexes of the blocks that have a result, in order.
func (s *Store) Done(ctx context.Context, id string) ([]int, error) {
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	var done []int
	err := s.persist(ctx, func(ctx context.Context) error {
		list, err := s.shelf.below(ctx, s.key(id, "block."))
		if err != nil {
			return err
		}
		done = make([]int, 0, len(list))
		for _, index := range list {
			if i, err := strconv.Atoi(index); err == nil {
				done = append(done, i)
			}
		}
		return nil
	})
	slices.Sort(done)
	return done, err
}

// Results reads the stored results of the given blocks, in the order that they
// are given in. A result that is not what was stored, or is not there, is
// ErrDamaged and the last thing yielded.
func (s *Store) Results(ctx context.Context, id string, blocks []int) iter.Seq2[sheaf.Result, error] {
	return func(yield func(sheaf.Result, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		type read struct {
			sheaf.Result
			err error
		}
		var ahead []chan read
		for at := 0; at < len(blocks) || len(ahead) > 0; {
			for len(ahead) < resultsAhead && at < len(blocks) {
				c, i := make(chan read, 1), blocks[at]
				at++
				ahead = append(ahead, c)
				wg.Go(func() {
					r, err := s.result(ctx, id, i)
					c <- read{r, err}
				})
			}
			r := <-ahead[0]
			ahead = ahead[1:]
			if !yield(r.Result, r.err) || r.err != nil {
				return
			}
		}
	}
}

func (s *Store) result(ctx context.Context, id string, i int) (sheaf.Result, error) {
	get := func(what string) (data []byte, err error) {
		err = s.persist(ctx, func(ctx context.Context) error {
			e, err := s.shelf.get(ctx, s.key(id, what))
			if errors.Is(err, jetstream.ErrKeyNotFound) {
				return nil
			}
			if err == nil {
				data = e.Value()
			}
			return err
		})
		if err == nil && data == nil {
			err = fmt.Errorf("%w: the result of block %d is gone", ErrDamaged, i)
		}
		return data, err
	}
	entry, err := get("block." + strconv.Itoa(i))
	if err != nil {
		return sheaf.Result{}, err
	}
	line, data, _ := bytes.Cut(entry, []byte{'\n'})
	var h stored
	if err := json.Unmarshal(line, &h); err != nil {
		return sheaf.Result{}, fmt.Errorf("%w: the result of block %d: %w", ErrDamaged, i, err)
	}
	for n := range h.Parts {
		part, err := get(fmt.Sprintf("part.%d.%d.%d", i, h.Epoch, n))
		if err != nil {
			return sheaf.Result{}, err
		}
		data = append(data[:len(data):len(data)], part...)
	}
	if sum := sha256.Sum256(data); len(data) != h.Size || hex.EncodeToString(sum[:]) != h.Digest {
		return sheaf.Result{}, fmt.Errorf("%w: the result of block %d is not what was stored", ErrDamaged, i)
	}
	return sheaf.Result{Index: i, Data: data, From: h.From, Attempts: h.Attempts, Elapsed: h.Elapsed,
		Bytes: h.Bytes, Offset: h.Offset, Verified: h.Verified}, nil
}

// sweep drops what is expired.
func (s *Store) sweep(ctx context.Context) {
	for ctx.Err() == nil {
		now := s.host.now()
		var results, all []Record
		s.mu.Lock()
		for _, j := range s.jobs {
			if !j.State.Final() || now.Before(j.Expires) {
				continue
			}
			if !j.dropped {
				results = append(results, j.Record)
				j.dropped = true
			}
			if now.After(j.Expires.Add(expiredFor)) {
				all = append(all, j.Record)
			}
		}
		s.mu.Unlock()
		for _, r := range results {
			s.dropResults(ctx, r)
		}
		for _, r := range all {
			short, cancel := s.host.within(ctx, 5*time.Second)
			err := s.shelf.remove(short, s.key(r.ID, "state"), r.Revision)
			cancel()
			if err != nil {
				s.log.Debug("an expired job stays a while", "job", r.ID, "err", err)
			}
		}
		s.host.pause(ctx, sweepEvery)
	}
}

// dropResults removes what is stored for a job beside its record. Only what is
// older than that record: the ID may be another job's by now.
func (s *Store) dropResults(ctx context.Context, r Record) {
	s.dropInput(r.ID, r.Input.Upload)
	for _, what := range []string{"block.*", "part.>", "progress", "kept", "saved.*"} {
		short, cancel := s.host.within(ctx, 5*time.Second)
		err := s.shelf.drop(short, s.key(r.ID, what), r.Revision)
		cancel()
		if err != nil {
			s.log.Debug("results of an expired job stay a while", "job", r.ID, "err", err)
			s.mu.Lock()
			if j := s.jobs[r.ID]; j != nil {
				j.dropped = false
			}
			s.mu.Unlock()
		}
	}
}
