package master

// run.go runs the jobs that are stored.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
	jobs "github.com/sheaf-project/sheaf/job"
)

// maxDeaths is how many masters in a row may die over a job without a block
// done: it may be the job that kills them.
const maxDeaths = 5

// patience is how much longer than a client a stored job waits for a replica.
const patience = 10

// RunJobs runs the jobs that are stored in Jobs, beside the other masters that
// do, until ctx ends.
func (h *Handler) RunJobs(ctx context.Context) {
	h = h.withDefaults()
	h.Jobs.Run(ctx, func(ctx context.Context, l *jobs.Lease) { h.runJob(ctx, l) })
}

// runJob does what is left to do of a job, and stores how it ended, unless
// that is another master's affair: ctx ends then.
func (h *Handler) runJob(ctx context.Context, l *jobs.Lease) {
	rec := l.Record()
	log := h.Log.With("job", rec.ID, "epoch", rec.Epoch)
	run, err := h.resume(ctx, l)
	if err == nil && rec.Deaths > maxDeaths {
		err = wire.Refuse(http.StatusInternalServerError, "masters_died",
			fmt.Sprintf("%d masters in a row died over the job, or were stopped, without a block done; see their logs, and give them more memory or the job smaller blocks", rec.Deaths)).Within(maxDeaths)
	}
	if err == nil {
		err = run.scatter(ctx)
	}
	if left := context.Cause(ctx); left != nil {
		if p := jobProblem(left); p == nil || p.Status != http.StatusInsufficientStorage {
			log.Info("job is left", "why", left)
			return
		}
		err = left // another master would find no more room
	}
	var lacks *sheaf.PartialError
	if err == nil || errors.As(err, &lacks) {
		err = run.finish(ctx, lacks)
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	state := jobs.Succeeded
	var problem json.RawMessage
	if err != nil {
		if context.Cause(ctx) != nil && errors.Is(context.Cause(ctx), jobs.ErrFenced) || errors.Is(err, jobs.ErrAway) {
			log.Info("job is left", "why", err)
			return
		}
		state = jobs.Failed
		p := jobProblem(err)
		if p == nil {
			p = run.job.problem(err)
		}
		p.Job = rec.ID
		if problem, err = json.Marshal(p); err != nil {
			problem = nil
		}
	}
	err = l.End(last, func(r *jobs.Record) {
		r.State, r.Error, r.Lacks = state, problem, run.lacks != nil
		r.Progress = new(run.ended())
	})
	log.Info("job ended", "state", state, "err", err)
}

// jobRun is one run of a stored job.
type jobRun struct {
	h      *Handler
	l      *jobs.Lease
	job    *job
	before int   // blocks that an earlier run had read
	done   []int // blocks that had a result before, in order
	lacks  *sheaf.PartialError

	mu       sync.Mutex // guards all below
	index    []int      // of the blocks of this run: a scatter counts those that it gets from 0
	blocks   int        // read so far
	read     bool       // all of them
	kept     int        // results that are stored, with those of before
	failed   int
	attempts int
	inFlight map[int]int // attempts by block
	results  int64       // bytes
	from     map[string]bool
}

// resume makes a run of a record: of all blocks that have no result yet.
func (h *Handler) resume(ctx context.Context, l *jobs.Lease) (*jobRun, error) {
	rec := l.Record()
	run := &jobRun{h: h, l: l, inFlight: map[int]int{}, from: map[string]bool{}}
	run.job = &job{h: h, from: run.from, length: rec.Input.Bytes}
	run.job.group.Job = rec.ID
	ps, err := specOf(rec)
	if err != nil {
		return run, err
	}
	limited := *h
	limited.MaxBlocks = h.MaxJobBlocks
	input := h.Jobs.Input(ctx, rec)
	if rec.Input.URL != "" {
		input = h.referred(ctx, rec.Input)
	}
	up := &upload{length: rec.Input.Bytes, total: rec.Input.Bytes, src: fetching{input}, left: make(chan struct{})}
	j, p := limited.plan(ps, up)
	if p != nil {
		return run, p
	}
	run.job = j
	j.begun = rec.Started
	j.group.Job = rec.ID
	j.group.ReplicaWait = patience * max(h.ReplicaWait, time.Second)
	j.group.TolerateShare = 1 // what can be done is done: a redrive need not do it again
	j.group.Route = run.route(j.group.Route)
	if run.done, err = h.Jobs.Done(ctx, rec.ID); err != nil {
		return run, err
	}
	run.kept = len(run.done)
	_, before, _, _ := h.Jobs.Known(rec.ID)
	run.attempts, run.before = max(before.Attempts, len(run.done)), before.Total // each result took one
	h.atLeast(ctx, j)
	return run, nil
}

// route counts attempts, and gives blocks the index that they have in the job.
func (r *jobRun) route(to sheaf.Route) sheaf.Route {
	return sheaf.RouteFunc(func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
		r.mu.Lock()
		own := *req
		own.Index = r.index[req.Index]
		r.attempts++
		r.inFlight[own.Index]++
		r.mu.Unlock()
		defer func() {
			r.mu.Lock()
			if r.inFlight[own.Index]--; r.inFlight[own.Index] == 0 {
				delete(r.inFlight, own.Index)
			}
			r.mu.Unlock()
		}()
		if len(own.Saved) == 0 {
			own.Saved = r.l.Saved(ctx, own.Index)
		}
		reply, err := to.Call(ctx, &own)
		if err == nil && reply.More {
			r.l.Save(ctx, own.Index, reply.Body)
		}
		return reply, err
	})
}

// missing yields the blocks that have no result.
func (r *jobRun) missing() iter.Seq2[sheaf.Block, error] {
	return func(yield func(sheaf.Block, error) bool) {
		for b, err := range r.job.blocks(r.job.up) {
			if err == nil {
				r.mu.Lock()
				r.blocks++
				_, has := slices.BinarySearch(r.done, b.Index)
				if !has {
					r.index = append(r.index, b.Index)
				}
				r.mu.Unlock()
				if has {
					continue
				}
			}
			if !yield(b, err) {
				return
			}
		}
		r.mu.Lock()
		r.read = true
		r.mu.Unlock()
	}
}

// scatter has the missing blocks worked on, and stores their results as they
// come. Its error is a *sheaf.PartialError when some could not be.
func (r *jobRun) scatter(ctx context.Context) error {
	j := r.job
	if j.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadlineCause(ctx, j.begun.Add(j.timeout), errJobTimeout)
		defer cancel()
	}
	told := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		var last jobs.Progress
		for {
			if p := r.progress(); p != last {
				last = p
				r.l.Progress(ctx, p)
			}
			select {
			case <-told:
				return
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	err := func() error {
		for res, err := range j.group.Scatter(ctx, r.missing()) {
			if err != nil {
				return err
			}
			r.mu.Lock()
			res.Index = r.index[res.Index]
			r.results += int64(len(res.Data))
			r.from[res.From] = true
			over := r.results > r.h.MaxJobResult
			r.mu.Unlock()
			if over {
				return wire.Refuse(http.StatusRequestEntityTooLarge, "result_too_large",
					fmt.Sprintf("the results of the blocks are over %d bytes in all, which max_job_result sets", r.h.MaxJobResult)).Within(r.h.MaxJobResult)
			}
			r.l.Commit(ctx, res, func() {
				r.mu.Lock()
				r.kept++
				r.mu.Unlock()
			})
		}
		return nil
	}()
	r.l.Wait()
	close(told)
	wg.Wait()
	if errors.Is(context.Cause(ctx), errJobTimeout) && err != nil {
		return errJobTimeout
	}
	if e, ok := errors.AsType[*sheaf.PartialError](err); ok {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, m := range e.Missing {
			m.Index = r.index[m.Index]
		}
		r.failed = len(e.Missing)
		e.Done, e.Total = r.kept, r.blocks
		return e
	}
	return err
}

// progress is how far the run is.
func (r *jobRun) progress() jobs.Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := jobs.Progress{Total: max(r.l.Record().Input.Blocks, r.blocks, r.kept, r.before), Done: r.kept, Failed: r.failed,
		Running: len(r.inFlight), Attempts: r.attempts, Replicas: len(r.from)}
	p.Running = min(p.Running, p.Total-p.Done-p.Failed)
	p.Queued = p.Total - p.Done - p.Failed - p.Running
	return p
}

// ended is how far the run came.
func (r *jobRun) ended() jobs.Progress {
	r.mu.Lock()
	if r.read { // to the end
		r.before = 0
	}
	r.mu.Unlock()
	p := r.progress()
	p.Stopped += p.Queued + p.Running
	p.Queued, p.Running = 0, 0
	p.Unverified = r.job.unverified
	return p
}

// finish merges what is stored, to see that it can be merged, and decides
// whether what is lacking may be.
func (r *jobRun) finish(ctx context.Context, lacks *sheaf.PartialError) error {
	j, rec := r.job, r.l.Record()
	done, err := r.h.Jobs.Done(ctx, rec.ID)
	if err != nil {
		return err
	}
	r.lacks = nil
	if lacks == nil && len(done) != r.blocks {
		return fmt.Errorf("%w: %d of its %d blocks have a result", jobs.ErrDamaged, len(done), r.blocks)
	}
	clear(r.from)
	j.unverified = 0
	_, err = j.merge(func(yield func(sheaf.Result, error) bool) {
		for res, err := range r.h.results(rec.ID, done, lacks)(ctx) {
			if err == nil {
				r.from[res.From] = true
				if !res.Verified {
					j.unverified++
				}
			}
			if !yield(res, err) {
				return
			}
		}
	})
	if lacks == nil {
		return err
	}
	e, over, err := j.lacking(err)
	if err != nil {
		return err // of the merge, or that nothing may be lacking
	}
	if err := r.h.keep(ctx, r.l, e); err != nil {
		return err
	}
	r.lacks = e
	if over {
		return e
	}
	return nil
}
