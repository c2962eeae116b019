package sheaf

// attempt.go carries the attempts of a scatter: on the route's own goroutines
// where the route is a Starter, and else on one for each.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/sheaf-project/sheaf/internal/schedule"
)

// attempt is one in flight.
type attempt struct {
	s      *scatter
	id     int // to the machine
	req    Request
	begun  time.Time
	cancel func()
	turn   *line // that it has, if there are turns

	// Of the loop only.
	canceled bool
	timedOut bool
	over     bool
}

// start begins an attempt.
func (s *scatter) start(c schedule.Command) {
	b := s.held[c.Block]
	a := &attempt{s: s, id: c.Attempt, begun: time.Now(),
		req: Request{Job: s.g.Job, Function: s.g.Function, Index: c.Block, Attempt: c.Number, Body: b.Data, Saved: b.saved, Trace: childTrace(s.g.Trace)}}
	if s.g.Resolver != nil {
		a.req.To, a.req.Rank, a.req.Size, a.req.Epoch = s.view.Replicas[c.Rank], c.Rank, len(s.view.Replicas), s.view.Epoch
	}
	s.running[c.Attempt] = a
	s.wg.Add(1)
	if s.starter == nil || !a.myTurn() {
		ctx, cancel := context.WithCancel(s.ctx)
		a.cancel = cancel
		go func() {
			defer s.wg.Done()
			defer cancel()
			reply, err := s.g.call(ctx, &a.req)
			s.tell(a.ended(reply, err))
		}()
		return
	}
	a.req.Deadline = a.begun.Add(s.g.Timeout)
	if len(s.timed) > 2*len(s.running)+16 {
		s.timed = slices.DeleteFunc(s.timed, func(a *attempt) bool { return a.over })
	}
	s.timed = append(s.timed, a)
	a.cancel = s.starter.Start(&a.req, a.done)
}

// myTurn takes a turn, unless others have to end before.
func (a *attempt) myTurn() (ok bool) {
	if a.s.g.Turns == nil {
		return true
	}
	a.turn, ok = a.s.g.Turns.try(&a.req)
	return ok
}

// done takes the outcome from a Starter.
func (a *attempt) done(reply *Reply, err error) {
	s := a.s
	defer s.wg.Done()
	if a.turn != nil {
		s.g.Turns.leave(turnOf(&a.req), a.turn)
	}
	if err == nil {
		reply, err = s.g.accept(reply)
	}
	s.tell(a.ended(reply, err))
}

func (a *attempt) ended(reply *Reply, err error) happening {
	return happening{event: schedule.Event{Kind: schedule.Ended, Attempt: a.id}, reply: reply, took: time.Since(a.begun), trace: a.req.Trace, err: err}
}

// expire ends the attempts of the starter whose time is over.
func (s *scatter) expire() {
	now := time.Now()
	for _, a := range s.timed {
		if a.req.Deadline.After(now) {
			return
		}
		if !a.over && !a.timedOut {
			a.timedOut = true
			a.cancel()
		}
	}
}

// maxLegs is how often a handler may save its work at one block: one that never
// ends shall.
const maxLegs = 10_000

// attemptEnded takes an attempt out of those in flight, and says how it ended.
func (s *scatter) attemptEnded(h *happening) {
	a := s.running[h.event.Attempt]
	delete(s.running, h.event.Attempt)
	a.over = true
	a.req.Body, a.req.Saved = nil, nil // timed may hold a for a while
	switch {
	case h.err == nil && h.reply.More:
		b := s.held[a.req.Index]
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
	case a.timedOut:
		h.err = s.g.late(a.req.To.ID, h.err)
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
	if b := s.held[a.req.Index]; b != nil {
		b.err = h.err
		if h.event.Outcome == schedule.Lost {
			id := a.req.To.ID
			if ce, ok := errors.AsType[*CallError](h.err); ok && id == "" {
				id = ce.From
			}
			if id != "" && !slices.Contains(b.lost, id) {
				b.lost = append(b.lost, id)
			}
		}
	}
}

// late is the error of an attempt whose time was over when err ended it.
func (g *Group) late(replica string, err error) error {
	if ce, ok := errors.AsType[*CallError](err); ok {
		err = ce.Err // who and what is said anew
	}
	return &CallError{Fault: FaultTimeout, From: replica, Err: fmt.Errorf("no answer within %v: %w", g.Timeout, err)}
}

// accept checks what a route returned without an error.
func (g *Group) accept(reply *Reply) (*Reply, error) {
	switch {
	case reply == nil:
		return nil, &CallError{Fault: FaultLost, Err: errors.New("route returned neither a reply nor an error")}
	case g.Verified && !reply.Verified:
		return nil, &CallError{Fault: FaultRejected, From: reply.From, Err: ErrUnverified}
	}
	return reply, nil
}
