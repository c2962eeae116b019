package sheaf

import (
	"cmp"
	"context"
	"sync"
)

// Turns lets jobs that share replicas take turns. It bounds how many requests
// are in flight on each replica over every [Group] that names it, and gives a
// place that becomes free to the next job in the round, so that a job of ten
// blocks beside one of ten thousand waits for one block of the other at a
// time, and not for all of them: the round robin of fair queueing (Nagle, RFC
// 970). The time that a request waits for its turn is not taken from the
// Timeout of its attempt.
//
// Its zero value is ready. It may be used concurrently, and must not be copied
// or changed once used.
type Turns struct {
	// PerReplica is how many requests may be in flight on one replica at once,
	// over all jobs. 0 means 8.
	PerReplica int
	// PerFunction is the same for a function whose replicas the route picks. 0
	// means 256.
	PerFunction int

	mu    sync.Mutex
	lines map[turnKey]*line
}

// Defaults of [Turns].
const (
	DefaultTurnsPerReplica  = 8
	DefaultTurnsPerFunction = 256
)

// turnKey names what requests wait for: a replica, or with no ID any replica.
type turnKey struct{ function, replica string }

// A line is the jobs that wait for one replica, in the order of the round.
type line struct {
	taken int
	round []*jobInLine
}

// A jobInLine is one job's requests that wait, first come first.
type jobInLine struct {
	job   string
	calls []chan struct{}
}

// turnOf names what a request waits for.
func turnOf(req *Request) turnKey { return turnKey{req.Function, req.To.ID} }

// try takes a turn if one is free. leave ends it.
func (t *Turns) try(req *Request) (l *line, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l = t.line(turnOf(req))
	if l.taken >= t.most(req) {
		return nil, false
	}
	l.taken++
	return l, true
}

// most is how many requests may be in flight where req goes.
func (t *Turns) most(req *Request) int {
	if req.To.ID == "" {
		return cmp.Or(max(t.PerFunction, 0), DefaultTurnsPerFunction)
	}
	return cmp.Or(max(t.PerReplica, 0), DefaultTurnsPerReplica)
}

// line returns the line for key. t.mu is held.
func (t *Turns) line(key turnKey) *line {
	if t.lines == nil {
		t.lines = make(map[turnKey]*line)
	}
	l := t.lines[key]
	if l == nil {
		l = new(line)
		t.lines[key] = l
	}
	return l
}

// take waits for a turn, and returns the function that ends it. It fails with
// the cause of ctx's end.
func (t *Turns) take(ctx context.Context, req *Request) (done func(), err error) {
	key := turnOf(req)
	t.mu.Lock()
	l := t.line(key)
	done = func() { t.leave(key, l) }
	if l.taken < t.most(req) {
		l.taken++
		t.mu.Unlock()
		return done, nil
	}
	mine := make(chan struct{})
	l.add(req.Job, mine)
	t.mu.Unlock()
	select {
	case <-mine:
		return done, nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	waits := l.drop(req.Job, mine)
	t.mu.Unlock()
	if !waits { // the turn came at the same moment: it is another's
		done()
	}
	return nil, context.Cause(ctx)
}

// leave gives the place to the next in line.
func (t *Turns) leave(key turnKey, l *line) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if next := l.next(); next != nil {
		close(next)
		return
	}
	if l.taken--; l.taken == 0 {
		delete(t.lines, key)
	}
}

// add puts a request at the end of its job's.
func (l *line) add(job string, call chan struct{}) {
	for _, j := range l.round {
		if j.job == job {
			j.calls = append(j.calls, call)
			return
		}
	}
	l.round = append(l.round, &jobInLine{job, []chan struct{}{call}})
}

// next takes the first request of the first job, which goes to the end of the
// round; nil when nobody waits.
func (l *line) next() chan struct{} {
	if len(l.round) == 0 {
		return nil
	}
	j := l.round[0]
	call := j.calls[0]
	j.calls = j.calls[1:]
	l.round = l.round[1:]
	if len(j.calls) > 0 {
		l.round = append(l.round, j)
	}
	return call
}

// drop takes a request out, and says whether it was still there.
func (l *line) drop(job string, call chan struct{}) bool {
	for i, j := range l.round {
		if j.job != job {
			continue
		}
		for k, c := range j.calls {
			if c != call {
				continue
			}
			j.calls = append(j.calls[:k:k], j.calls[k+1:]...)
			if len(j.calls) == 0 {
				l.round = append(l.round[:i:i], l.round[i+1:]...)
			}
			return true
		}
	}
	return false
}
