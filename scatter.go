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
			defer s.stop()
			err = s.run(blocks, yield)
			s.stop()
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
	starter Starter // the group's route, if it is one
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup // of goroutines, and of attempts that the starter carries
	machine *schedule.Machine
	begun   time.Time
	timer   *time.Timer
	tick    time.Duration // when the machine wants to be woken, or schedule.Never
	set     time.Duration // when the timer will fire
	inbox   inbox

	allowed atomic.Int64  // blocks that may be read, in all
	bytes   atomic.Int64  // of the blocks that are held
	more    chan struct{} // filled when allowed has gone up, or bytes down

	view    View
	held    map[int]*heldBlock
	running map[int]*attempt
	timed   []*attempt // those that the starter carries, by deadline; some have ended
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

// happening is what goroutines tell the one that runs the machine.
type happening struct {
	event schedule.Event
	block *heldBlock
	view  *View
	reply *Reply
	took  time.Duration
	trace string // of the attempt that ended
	err   error  // with event.Kind Ended the attempt's; otherwise it ends the scatter
}

// inbox holds what has happened until the loop takes it. Nobody waits to put
// something in: how much there can be is bounded by the blocks that were asked
// for and the attempts that were begun; of views only the last one counts.
type inbox struct {
	wake chan struct{} // filled when there is something

	mu   sync.Mutex // guards what follows
	list []happening
	view *View
}

func (b *inbox) put(h happening) {
	b.mu.Lock()
	if h.view != nil && h.err == nil {
		b.view = h.view
	} else {
		b.list = append(b.list, h)
	}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take empties the inbox. The slice that it returns takes the place of the one
// that it is given.
func (b *inbox) take(old []happening) []happening {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := b.list
	b.list = old[:0]
	if b.view != nil {
		list = append(list, happening{event: schedule.Event{Kind: schedule.ViewChanged}, view: b.view})
		b.view = nil
	}
	return list
}

func newScatter(ctx context.Context, g *Group) *scatter {
	s := &scatter{
		g:       g,
		begun:   time.Now(),
		timer:   time.NewTimer(time.Hour),
		tick:    schedule.Never,
		inbox:   inbox{wake: make(chan struct{}, 1)},
		more:    make(chan struct{}, 1),
		held:    make(map[int]*heldBlock),
		running: make(map[int]*attempt),
		missing: PartialError{Job: g.Job, Total: -1},
	}
	s.starter, _ = g.Route.(Starter)
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

// stop ends all that runs.
func (s *scatter) stop() {
	s.cancel()
	for _, a := range s.running {
		a.cancel()
	}
}

// run is the loop around the machine. It returns when all is settled.
func (s *scatter) run(blocks iter.Seq2[Block, error], yield func(Result, error) bool) error {
	defer s.timer.Stop()
	s.wg.Go(func() { s.input(blocks) })
	first := happening{event: schedule.Event{Kind: schedule.Tick}}
	if s.g.Resolver == nil {
		first.event = schedule.Event{Kind: schedule.ViewChanged, Replicas: anyReplica}
	} else {
		s.wg.Go(s.watch)
	}
	batch := []happening{first}
	for {
		for i := range batch {
			if done, err := s.step(&batch[i], yield); done {
				return err
			}
		}
		clear(batch) // it must not hold results and blocks until the next one comes
		s.setTimer()
		select {
		case <-s.inbox.wake:
			batch = s.inbox.take(batch)
		case <-s.timer.C:
			s.expire()
			batch = append(batch[:0], happening{event: schedule.Event{Kind: schedule.Tick}})
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
	}
}

// setTimer sets the timer for what comes next: the machine's tick, or the first
// deadline of an attempt that the starter carries.
func (s *scatter) setTimer() {
	for len(s.timed) > 0 && (s.timed[0].over || s.timed[0].timedOut) {
		s.timed = s.timed[1:]
	}
	next := s.tick
	if len(s.timed) > 0 {
		if at := s.timed[0].req.Deadline.Sub(s.begun); next == schedule.Never || at < next {
			next = at
		}
	}
	if next == schedule.Never {
		next = time.Hour
	}
	// An early tick does no harm, so the timer is only ever moved forward.
	if next < s.set || s.set <= time.Since(s.begun) {
		s.set = next
		s.timer.Reset(next - time.Since(s.begun))
	}
}

// tell hands h to the loop, unless that has ended.
func (s *scatter) tell(h happening) bool {
	s.inbox.put(h)
	return s.ctx.Err() == nil
}

// input reads blocks as far as the machine has asked for them.
func (s *scatter) input(blocks iter.Seq2[Block, error]) {
	read := int64(0)
	mayRead := func() bool {
		for s.ctx.Err() == nil {
			if read < s.allowed.Load() && s.bytes.Load() < s.g.LimitBytes {
				read++
				return true
			}
			select {
			case <-s.more:
			case <-s.ctx.Done():
			}
		}
		return false
	}
	if !mayRead() {
		return
	}
	for b, err := range blocks {
		s.bytes.Add(int64(len(b.Data)))
		h := happening{event: schedule.Event{Kind: schedule.BlockRead}, block: &heldBlock{Block: b}, err: err}
		if !s.tell(h) || err != nil || !mayRead() {
			return
		}
	}
	s.tell(happening{event: schedule.Event{Kind: schedule.InputEnd}})
}

// mayReadMore wakes the reader of blocks.
func (s *scatter) mayReadMore() {
	select {
	case s.more <- struct{}{}:
	default:
	}
}

// watch passes the function's views on.
func (s *scatter) watch() {
	for v, err := range s.g.Resolver.Watch(s.ctx, s.g.Function) {
		if !s.tell(happening{event: schedule.Event{Kind: schedule.ViewChanged}, view: &v, err: err}) || err != nil {
			return
		}
	}
}

// step gives the machine one event and carries its commands out. done says
// that the scatter is over.
func (s *scatter) step(h *happening, yield func(Result, error) bool) (done bool, err error) {
	if h.err != nil && (h.event.Kind != schedule.Ended || errors.Is(h.err, ErrNotAddressable)) {
		return true, h.err // no other attempt would fare better
	}
	switch h.event.Kind {
	case schedule.BlockRead:
		h.block.Index = s.read
		s.held[s.read] = h.block
		s.read++
	case schedule.InputEnd:
		s.ended = true
	case schedule.ViewChanged:
		if s.g.Resolver != nil {
			s.view = *h.view
			h.event.Replicas = make([]string, len(h.view.Replicas))
			for i, r := range h.view.Replicas {
				h.event.Replicas[i] = r.ID
			}
		}
	case schedule.Ended:
		s.attemptEnded(h)
	}
	var result *Result // one at most: of the attempt that ended
	for _, c := range s.machine.Step(time.Since(s.begun), h.event) {
		switch c.Kind {
		case schedule.Read:
			s.allowed.Add(int64(c.N))
			s.mayReadMore()
		case schedule.Start:
			s.start(c)
		case schedule.Cancel:
			s.running[c.Attempt].canceled = true
			s.running[c.Attempt].cancel()
		case schedule.SetTimer:
			s.tick = c.At
		case schedule.Emit:
			b := s.release(c.Block)
			s.missing.Done++
			result = &Result{Index: c.Block, Data: h.reply.Body, From: h.reply.From, Attempts: c.Number,
				Elapsed: h.took, Bytes: len(b.Data), Offset: b.Offset, Verified: h.reply.Verified, Trace: h.trace}
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
	s.mayReadMore()
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
