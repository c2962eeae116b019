package schedule

// replica.go keeps what the machine knows of each replica: its load, its
// health, and where it waits for work.

import (
	"slices"
	"time"
)

// out is the place of a replica that is not in the heap of idle ones.
const out = -1

// maxRetryAfter caps how long a throttling replica may ask us to wait.
const maxRetryAfter = 60 * time.Second

type replica struct {
	id      string
	rank    int
	gone    bool // not in the view
	running int
	slots   int // attempts it may have in flight
	place   int // in Machine.idle, or out
	used    uint64

	refused bool // the last thing it did was to refuse
	strikes int  // pauses since it last answered
	until   Time // paused until then
}

// anyone says whether r stands for all replicas, of which the route picks one.
func (r *replica) anyone() bool { return r.id == "" }

// judge draws the consequences of an attempt's end for its replica. When the
// route picks the replica, there is nobody to pause for being slow.
func (m *Machine) judge(now Time, a attempt, e Event) {
	r := a.replica
	was := r.refused
	slots := r.slots
	switch e.Outcome {
	case OK, Failed, Rejected:
		r.refused, r.strikes = false, 0
		r.slots = min(r.slots+1, m.cfg.PerReplica)
	case Lost:
		m.pause(now, r, m.cfg.Backoff, m.cfg.BackoffMax)
	case Canceled: // by a hedge that won: it may hang, and hold up what it is given next
		if now-a.started >= m.cfg.HedgeFloor && !r.anyone() {
			m.pause(now, r, m.cfg.HedgeFloor, 100*m.cfg.HedgeFloor)
		}
	case Refused:
		r.refused = true
		m.pause(now, r, m.cfg.RefusedWait, 10*m.cfg.RefusedWait)
	case Throttled:
		r.refused = false
		r.slots = max(1, r.running)
		if e.RetryAfter > 0 {
			r.until = max(r.until, now+min(e.RetryAfter, maxRetryAfter))
		} else {
			m.pause(now, r, m.cfg.Backoff, m.cfg.BackoffMax)
		}
	}
	if r.gone {
		return
	}
	m.slots += r.slots - slots
	if r.refused != was {
		if r.refused {
			m.usable--
		} else {
			m.usable++
		}
	}
	m.put(now, r)
}

// pause keeps a replica from work for a while that doubles with each pause
// since its last answer. What fails during a pause does not lengthen it.
func (m *Machine) pause(now Time, r *replica, first, most Time) {
	if r.until > now {
		return
	}
	d := first
	for i := 0; i < r.strikes && d < most; i++ {
		d *= 2
	}
	r.strikes++
	r.until = now + min(d, most)
}

// put places a replica where it belongs: among the idle, the paused or nowhere.
func (m *Machine) put(now Time, r *replica) {
	can := !r.gone && r.running < r.slots
	if can && r.until > now {
		can = false
		if !slices.Contains(m.paused, r) {
			m.paused = append(m.paused, r)
		}
	}
	switch {
	case can && r.place == out:
		r.place = len(m.idle)
		m.idle = append(m.idle, r)
		m.up(r.place)
	case can:
		m.down(m.up(r.place))
	case r.place != out:
		m.remove(r)
	}
}

// pick returns the least loaded idle replica for a block: one that it was not
// tried on, if there is one. With other set it must not be the last one,
// unless that stands for any.
func (m *Machine) pick(b *block, other bool) *replica {
	var aside []*replica
	var found *replica
	for len(m.idle) > 0 {
		r := m.idle[0]
		if r.anyone() || r != b.last && !slices.Contains(b.lost, r) {
			found = r
			break
		}
		m.remove(r)
		aside = append(aside, r)
	}
	for _, r := range aside {
		r.place = len(m.idle)
		m.idle = append(m.idle, r)
		m.up(r.place)
	}
	if found == nil && !other && len(aside) > 0 {
		found = aside[0]
	}
	return found
}

// before orders the idle replicas: least loaded first, then least lately used.
func before(a, b *replica) bool {
	if a.running != b.running {
		return a.running < b.running
	}
	if a.used != b.used {
		return a.used < b.used
	}
	return a.rank < b.rank
}

func (m *Machine) swap(i, j int) {
	h := m.idle
	h[i], h[j] = h[j], h[i]
	h[i].place, h[j].place = i, j
}

func (m *Machine) up(i int) int {
	for i > 0 {
		parent := (i - 1) / 2
		if !before(m.idle[i], m.idle[parent]) {
			break
		}
		m.swap(i, parent)
		i = parent
	}
	return i
}

func (m *Machine) down(i int) {
	for {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < len(m.idle); c++ {
			if before(m.idle[c], m.idle[least]) {
				least = c
			}
		}
		if least == i {
			return
		}
		m.swap(i, least)
		i = least
	}
}

func (m *Machine) remove(r *replica) {
	i, last := r.place, len(m.idle)-1
	m.swap(i, last)
	m.idle = m.idle[:last]
	r.place = out
	if i < last {
		m.down(m.up(i))
	}
}
