package sheaf

// scatter.go drives the scheduler with real time, real routes and real input.

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sheaf-project/sheaf/internal/schedule"
)

// Scatter sends each block to a replica of the group's function and yields the
// results as they come, in any order; [InOrder], [Gather] and [Reduce] put
// them into block order. Work begins with the first block and the first ready
// replica; nobody waits for the others.
//
// Each block yields one Result. Blocks whose attempts broke are sent again,
// elsewhere. When more blocks have to be given up than is tolerated, or when some
// were given up by the end, the last thing yielded is a [*PartialError] that
// names them. Any other error ends the iteration, too: an error of blocks,
// ErrNoReplica, ErrNoFunction, or the cause of ctx's end.
//
// Blocks are read ahead of need, on another goroutine, up to Limit of them; a
// consumer that is slow to take results slows the reading down. Leaving the
// loop cancels the attempts in flight and waits for them, and for blocks to
// return: a read that hangs must be ended by whoever owns the reader, on
// leaving the loop or on the error, which is yielded before the wait.
func (g *Group) Scatter(ctx context.Context, blocks iter.Seq2[Block, error]) iter.Seq2[Result, error] {
	return func(yield func(Result, error) bool) {
		c, err := g.withDefaults()
		if err == nil {
			s := newScatter(ctx, &c)
			defer s.wg.Wait()
			defer s.cancel()
			err = s.run(blocks, yield)
			s.cancel()
		}
		if err != nil && !errors.Is(err, errLeft) {
			yield(Result{}, fmt.Errorf("scatter to %s: %w", g.Function, err))
		}
	}
}

// anyReplica is the one member of the view when the route picks the replica.
var anyReplica = []string{""}

// scatter is one call of Scatter.
type scatter struct {
	g       *Group
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	machine *schedule.Machine
	begun   time.Time
	timer   *time.Timer
	events  chan happening
	credit  chan struct{} // one for each block that may be read
	bytes   atomic.Int64  // of the blocks that are held
	freed   chan struct{} // filled when bytes has gone down

	view    View
	held    map[int]*heldBlock
	running map[int]*call
	missing PartialError
	read    int
	ended   bool
	lastErr error // what the last failed attempt met
}

// heldBlock is a block that has no result yet.
type heldBlock struct {
	Block
	err   error    // of the last attempt
	lost  []string // replicas
	saved []byte   // what a handler saved of its work
	legs  int      // how often one did
}

// call is an attempt in flight.
type call struct {
	index    int
	replica  string // its ID, empty when the route picks one
	cancel   context.CancelFunc
	canceled bool
}

// happening is what goroutines tell the one that runs the machine.
type happening struct {
	event schedule.Event
	block Block
	view  View
	reply *Reply
	took  time.Duration
	err   error // with event.Kind Ended the attempt's; otherwise it ends the scatter
}

func newScatter(ctx context.Context, g *Group) *scatter {
	s := &scatter{
		g:       g,
		begun:   time.Now(),
		timer:   time.NewTimer(time.Hour),
		events:  make(chan happening, 16),
		credit:  make(chan struct{}, g.Limit),
		freed:   make(chan struct{}, 1),
		held:    make(map[int]*heldBlock),
		running: make(map[int]*call),
		missing: PartialError{Job: g.Job, Total: -1},
	}
	s.timer.Stop()
	s.ctx, s.cancel = context.WithCancel(ctx)
	cfg := schedule.Config{
		Limit: g.Limit, PerReplica: g.PerReplica, Attempts: g.Attempts,
		Tolerate: g.Tolerate, TolerateShare: g.TolerateShare,
		ReplicaWait: g.ReplicaWait, NoHedge: g.NoHedge,
	}
	if g.Resolver == nil {
		cfg.PerReplica = g.Limit
	}
	s.machine = schedule.New(cfg)
	return s
}

// run is the loop around the machine. It returns when all is settled.
func (s *scatter) run(blocks iter.Seq2[Block, error], yield func(Result, error) bool) error {
	defer s.timer.Stop()
	s.wg.Go(func() { s.input(blocks) })
	first := schedule.Event{Kind: schedule.Tick}
	if s.g.Resolver == nil {
		first = schedule.Event{Kind: schedule.ViewChanged, Replicas: anyReplica}
	} else {
		s.wg.Go(s.watch)
	}
	if done, err := s.step(happening{event: first}, yield); done {
		return err
	}
	for {
		var h happening
		select {
		case h = <-s.events:
		case <-s.timer.C:
			h.event.Kind = schedule.Tick
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
		if done, err := s.step(h, yield); done {
			return err
		}
	}
}

// tell hands h to the loop, unless that has ended.
func (s *scatter) tell(h happening) bool {
	select {
	case s.events <- h:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// input reads blocks as far as the machine has asked for them.
func (s *scatter) input(blocks iter.Seq2[Block, error]) {
	mayRead := func() bool {
		select {
		case <-s.credit:
		case <-s.ctx.Done():
			return false
		}
		for s.bytes.Load() >= s.g.LimitBytes {
			select {
			case <-s.freed:
			case <-s.ctx.Done():
				return false
			}
		}
		return true
	}
	if !mayRead() {
		return
	}
	for b, err := range blocks {
		s.bytes.Add(int64(len(b.Data)))
		h := happening{event: schedule.Event{Kind: schedule.BlockRead}, block: b, err: err}
		if !s.tell(h) || err != nil || !mayRead() {
			return
		}
	}
	s.tell(happening{event: schedule.Event{Kind: schedule.InputEnd}})
}

// watch passes the function's views on.
func (s *scatter) watch() {
	for v, err := range s.g.Resolver.Watch(s.ctx, s.g.Function) {
		if !s.tell(happening{event: schedule.Event{Kind: schedule.ViewChanged}, view: v, err: err}) || err != nil {
			return
		}
	}
}

// step gives the machine one event and carries its commands out. done says
// that the scatter is over.
func (s *scatter) step(h happening, yield func(Result, error) bool) (done bool, err error) {
	if h.err != nil && (h.event.Kind != schedule.Ended || errors.Is(h.err, ErrNotAddressable)) {
		return true, h.err // no other attempt would fare better
	}
	switch h.event.Kind {
	case schedule.BlockRead:
		h.block.Index = s.read
		s.read++
		s.held[h.block.Index] = &heldBlock{Block: h.block}
	case schedule.InputEnd:
		s.ended = true
	case schedule.ViewChanged:
		if s.g.Resolver != nil {
			s.view = h.view
			h.event.Replicas = make([]string, len(h.view.Replicas))
			for i, r := range h.view.Replicas {
				h.event.Replicas[i] = r.ID
			}
		}
	case schedule.Ended:
		s.attemptEnded(&h)
	}
	var result *Result // one at most: of the attempt that ended
	for _, c := range s.machine.Step(time.Since(s.begun), h.event) {
		switch c.Kind {
		case schedule.Read:
			for range c.N {
				s.credit <- struct{}{} // has room: the machine asks for Limit at most
			}
		case schedule.Start:
			s.start(c)
		case schedule.Cancel:
			s.running[c.Attempt].canceled = true
			s.running[c.Attempt].cancel()
		case schedule.SetTimer:
			s.timer.Stop()
			if c.At != schedule.Never {
				s.timer.Reset(c.At - time.Since(s.begun))
			}
		case schedule.Emit:
			b := s.release(c.Block)
			s.missing.Done++
			result = &Result{Index: c.Block, Data: h.reply.Body, From: h.reply.From, Attempts: c.Number,
				Elapsed: h.took, Bytes: len(b.Data), Offset: b.Offset, Verified: h.reply.Verified}
		case schedule.GiveUp:
			b := s.release(c.Block)
			s.missing.add(&BlockError{Index: c.Block, Offset: b.Offset, Bytes: len(b.Data), Attempts: c.Number,
				Replicas: b.lost, Poison: c.Reason == schedule.Poison, Err: b.err})
		case schedule.Fail:
			done = true
			if err = s.partial(); c.Reason == schedule.NoReplica {
				err = s.noReplica()
			}
		case schedule.Done:
			done = true
			if len(s.missing.Missing) > 0 {
				err = s.partial()
			}
		}
	}
	// The consumer may take its time: replicas have got their next blocks before.
	if result != nil && !yield(*result, nil) {
		return true, errLeft
	}
	return done, err
}

// release lets go of a settled block.
func (s *scatter) release(i int) *heldBlock {
	b := s.held[i]
	delete(s.held, i)
	s.bytes.Add(-int64(len(b.Data)))
	select {
	case s.freed <- struct{}{}:
	default:
	}
	return b
}

func (s *scatter) partial() error {
	if s.ended {
		s.missing.Total = s.read
	}
	s.missing.Stopped = slices.Sorted(maps.Keys(s.held))
	return &s.missing
}

func (s *scatter) noReplica() error {
	if s.lastErr == nil {
		return fmt.Errorf("%w after %v", ErrNoReplica, s.g.ReplicaWait)
	}
	return fmt.Errorf("%w after %v; the last attempt met: %w", ErrNoReplica, s.g.ReplicaWait, s.lastErr)
}

// start makes an attempt on a goroutine of its own.
func (s *scatter) start(c schedule.Command) {
	b := s.held[c.Block]
	req := &Request{Job: s.g.Job, Function: s.g.Function, Index: c.Block, Attempt: c.Number, Body: b.Data, Saved: b.saved}
	if s.g.Resolver != nil {
		req.To, req.Rank, req.Size, req.Epoch = s.view.Replicas[c.Rank], c.Rank, len(s.view.Replicas), s.view.Epoch
	}
	ctx, cancel := context.WithCancel(s.ctx)
	s.running[c.Attempt] = &call{index: c.Block, replica: c.Replica, cancel: cancel}
	s.wg.Go(func() {
		defer cancel()
		begun := time.Now()
		reply, err := s.g.call(ctx, req)
		s.tell(happening{
			event: schedule.Event{Kind: schedule.Ended, Attempt: c.Attempt},
			reply: reply, took: time.Since(begun), err: err,
		})
	})
}

// maxLegs is how often a handler may save its work at one block: one that never
// ends shall.
const maxLegs = 10_000

// attemptEnded takes an attempt out of those in flight, and says how it ended.
func (s *scatter) attemptEnded(h *happening) {
	a := s.running[h.event.Attempt]
	delete(s.running, h.event.Attempt)
	switch {
	case h.err == nil && h.reply.More:
		b := s.held[a.index]
		if b == nil || a.canceled { // another attempt has won
			h.event.Outcome = schedule.Canceled
			return
		}
		if b.legs++; b.legs <= maxLegs {
			b.saved = h.reply.Body
			h.event.Outcome = schedule.Saved
			return
		}
		h.err = &CallError{Fault: FaultRejected, From: h.reply.From, Err: fmt.Errorf("the handler has saved its work %d times and is not done", maxLegs)}
	case h.err == nil:
		h.event.Outcome = schedule.OK
		return
	case a.canceled:
		h.event.Outcome = schedule.Canceled
		return
	}
	s.lastErr = h.err
	fault, after := faultOf(h.err)
	h.event.RetryAfter = after
	h.event.Outcome = map[Fault]schedule.Outcome{
		FaultTask: schedule.Failed, FaultRejected: schedule.Rejected, FaultLost: schedule.Lost,
		FaultRefused: schedule.Refused, FaultThrottled: schedule.Throttled, FaultTimeout: schedule.TimedOut,
	}[fault]
	if h.event.Outcome == 0 {
		h.event.Outcome = schedule.Lost // a route that says nothing we know
	}
	if b := s.held[a.index]; b != nil {
		b.err = h.err
		if h.event.Outcome == schedule.Lost {
			id := a.replica
			if ce, ok := errors.AsType[*CallError](h.err); ok && id == "" {
				id = ce.From
			}
			if id != "" && !slices.Contains(b.lost, id) {
				b.lost = append(b.lost, id)
			}
		}
	}
}
