package sheaf

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"time"
)

// Defaults of a [Group].
const (
	DefaultLimit       = 64
	DefaultLimitBytes  = 64 << 20
	DefaultPerReplica  = 2
	DefaultAttempts    = 3
	DefaultTimeout     = time.Minute
	DefaultReplicaWait = 30 * time.Second
)

// A Group is the replicas of one function, as a caller addresses them. Its
// fields must not change while it is used; a Group may be used concurrently.
type Group struct {
	// Function names the function: "worker", or "worker.dev" in another
	// namespace.
	Function string
	// Route carries the requests. It must be set.
	Route Route
	// Resolver tells which replicas there are. When it is nil the Route picks a
	// replica itself, as a gateway does, and ranks cannot be addressed.
	Resolver Resolver
	// Job names the job in every request: up to 64 printable ASCII characters.
	// "" means a new random name for each call of Scatter, Broadcast or Send.
	Job string
	// Trace is W3C's traceparent of the job, of which each attempt is a child.
	// "" means that nobody traces it.
	Trace string
	// Limit is how many blocks are held in memory at once. 0 means 64.
	Limit int
	// LimitBytes is how many bytes of blocks are held in memory before reading
	// stops until some are settled; one block is always held. 0 means 64 MiB.
	LimitBytes int64
	// PerReplica is how many attempts may be in flight on one replica: 1 leaves
	// it idle while an answer travels. 0 means 2. Without a Resolver, Limit is
	// the only bound.
	PerReplica int
	// Attempts is how often a handler may fail on a block, or run out of time,
	// before the block is given up. 0 means 3. Attempts that infrastructure
	// broke do not count.
	Attempts int
	// Timeout is the time for one attempt. 0 means one minute.
	Timeout time.Duration
	// ReplicaWait is how long blocks may wait while no replica is ready. 0
	// means 30 seconds.
	ReplicaWait time.Duration
	// Tolerate is how many blocks may be given up before Scatter stops. In any
	// case the iteration then ends with a [*PartialError] that names them.
	Tolerate int
	// TolerateShare is the same as a share of all blocks, from 0 to 1; the
	// larger of the two counts. What it comes to is known when the last block
	// has been read, and a scatter is not stopped before for too many.
	TolerateShare float64
	// Verified refuses answers that no digest proves whole, as of functions that
	// know nothing of sheaf.
	Verified bool
	// NoHedge forbids second attempts at stragglers, for handlers that are too
	// dear to run twice. They may still run twice after a fault.
	NoHedge bool
	// Turns, when it is not nil, is shared with the groups of other jobs, which
	// then take turns on the replicas that they have in common.
	Turns *Turns
}

func (g *Group) withDefaults() (Group, error) {
	if g.Route == nil {
		return Group{}, errors.New("group has no route")
	}
	c := *g
	or := func(p *int, n int) {
		if *p <= 0 {
			*p = n
		}
	}
	or(&c.Limit, DefaultLimit)
	or(&c.PerReplica, DefaultPerReplica)
	or(&c.Attempts, DefaultAttempts)
	if c.LimitBytes <= 0 {
		c.LimitBytes = DefaultLimitBytes
	}
	if c.Timeout <= 0 {
		c.Timeout = DefaultTimeout
	}
	if c.ReplicaWait <= 0 {
		c.ReplicaWait = DefaultReplicaWait
	}
	if !(c.TolerateShare >= 0 && c.TolerateShare <= 1) {
		return Group{}, fmt.Errorf("tolerated share %v of the blocks must be from 0 to 1", c.TolerateShare)
	}
	if c.Job == "" {
		c.Job = NewJob()
	}
	if c.Trace != "" && !IsTrace(c.Trace) {
		return Group{}, fmt.Errorf("trace %.64q must be a traceparent of W3C's trace context, version 00, or empty", c.Trace)
	}
	if len(c.Job) > maxJob || strings.ContainsFunc(c.Job, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return Group{}, fmt.Errorf("job %q must be 1 to %d printable ASCII characters without spaces", c.Job, maxJob)
	}
	return c, nil
}

// maxJob is how long the name of a job may be, in bytes: it travels in a header.
const maxJob = 64

// NewJob returns a new random name for a job: 16 hexadecimal digits.
func NewJob() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// Broadcast sends body to every replica of one view, and yields one Result or
// one error for each rank of it, in the order in which they come. The view is
// the first one with a ready replica.
//
// It is complete by membership, not by a timer: the iteration ends when every
// replica of that view has answered or is known to be gone, because a later
// view lacks it or because nothing listens at its address any more. An error
// is a [*RankError]; it wraps ErrReplicaGone for a replica that left, and does
// not end the iteration. Any other error ends it: ErrNoReplica,
// ErrNotAddressable, or the end of ctx.
//
// Leaving the loop cancels the calls in flight and waits for them.
func (g *Group) Broadcast(ctx context.Context, body []byte) iter.Seq2[Result, error] {
	return func(yield func(Result, error) bool) {
		err := g.address(ctx, body, func(v View) (from, to int, err error) {
			return 0, len(v.Replicas), nil
		}, yield)
		if err != nil {
			yield(Result{}, fmt.Errorf("broadcast to %s: %w", g.Function, err))
		}
	}
}

// Send sends body to the replica of the given rank, from 0, and returns its
// answer; Index of the Result is the rank. It fails with ErrNoRank when the
// view has no such rank, ErrReplicaGone when the replica leaves before it
// answers, ErrNotAddressable when the route cannot address a replica, and with
// a [*RankError] when the handler fails.
func (g *Group) Send(ctx context.Context, rank int, body []byte) (Result, error) {
	var result Result
	var failed error
	err := g.address(ctx, body, func(v View) (from, to int, err error) {
		if rank < 0 || rank >= len(v.Replicas) {
			return 0, 0, fmt.Errorf("%w as %d: the view of epoch %d has %s, ranks count from 0",
				ErrNoRank, rank, v.Epoch, count(len(v.Replicas), "replica"))
		}
		return rank, rank + 1, nil
	}, func(r Result, err error) bool {
		result, failed = r, err
		return true
	})
	if err = errors.Join(err, failed); err != nil {
		return Result{}, fmt.Errorf("send to %s: %w", g.Function, err)
	}
	return result, nil
}

// errLeftView cancels calls to a replica that a later view lacks.
var errLeftView = fmt.Errorf("%w: it left the view", ErrReplicaGone)

// address sends body to the ranks of one view that choose picks, and yields
// what each answers.
func (g *Group) address(ctx context.Context, body []byte,
	choose func(View) (from, to int, err error), yield func(Result, error) bool) error {
	c, err := g.withDefaults()
	if err != nil {
		return err
	}
	if c.Resolver == nil {
		return ErrNotAddressable
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	views := make(chan View)
	failed := make(chan error, 1)
	wg.Go(func() {
		for v, err := range c.Resolver.Watch(ctx, c.Function) {
			if err != nil {
				failed <- err
				return
			}
			select {
			case views <- v:
			case <-ctx.Done():
				return
			}
		}
	})

	var view View
	wait := time.NewTimer(c.ReplicaWait)
	defer wait.Stop()
	for len(view.Replicas) == 0 {
		select {
		case view = <-views:
		case err := <-failed:
			return err
		case <-wait.C:
			return fmt.Errorf("%w after %v", ErrNoReplica, c.ReplicaWait)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	from, to, err := choose(view)
	if err != nil {
		return err
	}

	type answer struct {
		result Result
		err    error
	}
	answers := make(chan answer)
	leave := make(map[string]context.CancelCauseFunc, to-from)
	slots := make(chan struct{}, c.Limit)
	for rank := from; rank < to; rank++ {
		member, drop := context.WithCancelCause(ctx)
		defer drop(nil)
		leave[view.Replicas[rank].ID] = drop
		wg.Go(func() {
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
			case <-member.Done(): // ask says why
			}
			r, err := c.ask(member, view, rank, body)
			select {
			case answers <- answer{r, err}:
			case <-ctx.Done():
			}
		})
	}
	for left := to - from; left > 0; {
		select {
		case a := <-answers:
			left--
			if a.err != nil && errors.Is(a.err, ErrNotAddressable) {
				return a.err
			}
			if !yield(a.result, a.err) {
				return nil
			}
		case v := <-views:
			here := make(map[string]bool, len(v.Replicas))
			for _, r := range v.Replicas {
				here[r.ID] = true
			}
			for id, drop := range leave {
				if !here[id] {
					drop(errLeftView)
				}
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// ask calls one rank of a view until it answers, fails for good or is gone.
// Only gone and rejected are final at once: a busy replica is asked again for
// as long as it stays, a failing one Attempts times.
func (g *Group) ask(ctx context.Context, view View, rank int, body []byte) (Result, error) {
	to := view.Replicas[rank]
	var saved []byte
	for n, failures := 1, 0; ; n++ {
		fail := func(err error) (Result, error) {
			return Result{}, &RankError{Rank: rank, Replica: to.ID, Attempts: n, Err: err}
		}
		begun := time.Now()
		trace := childTrace(g.Trace)
		reply, err := g.call(ctx, &Request{
			Job: g.Job, Function: g.Function, Index: rank, Attempt: n,
			To: to, Rank: rank, Size: len(view.Replicas), Epoch: view.Epoch, Body: body, Saved: saved, Trace: trace,
		})
		if err == nil && reply.More && n < maxLegs {
			saved = reply.Body
			continue
		}
		if err == nil && reply.More {
			err = fmt.Errorf("the handler has saved its work %d times and is not done", n)
			return fail(err)
		}
		if err == nil {
			return Result{Index: rank, Data: reply.Body, From: reply.From, Attempts: n,
				Elapsed: time.Since(begun), Bytes: len(body), Verified: reply.Verified, Trace: trace}, nil
		}
		if ctx.Err() != nil {
			return fail(context.Cause(ctx))
		}
		if errors.Is(err, ErrNotAddressable) {
			return Result{}, err // no failure of this rank: it ends the whole
		}
		pause := 20 * time.Millisecond << min(n, 6)
		switch fault, after := faultOf(err); fault {
		case FaultRefused:
			return fail(fmt.Errorf("%w: %w", ErrReplicaGone, err))
		case FaultRejected:
			return fail(err)
		case FaultThrottled:
			pause = max(pause, after)
		default:
			if failures++; failures >= g.Attempts {
				return fail(err)
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
	}
}

// call makes one attempt, within Timeout once its turn has come.
func (g *Group) call(ctx context.Context, req *Request) (*Reply, error) {
	if g.Turns != nil {
		done, err := g.Turns.take(ctx, req)
		if err != nil {
			return nil, err
		}
		defer done()
	}
	req.Deadline = time.Now().Add(g.Timeout)
	ctx, cancel := context.WithDeadline(ctx, req.Deadline)
	defer cancel()
	reply, err := g.Route.Call(ctx, req)
	switch {
	case err == nil:
		return g.accept(reply)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, g.late(req.To.ID, err)
	}
	return nil, err
}
