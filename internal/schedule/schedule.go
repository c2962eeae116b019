// Package schedule decides which block of a scatter goes to which replica, and
// when: as a pure state machine.
//
// Events go into [Machine.Step] (a block was read, the view changed, an attempt
// ended, time passed) and commands come out (read blocks, start an attempt,
// cancel one, emit a result, give a block up). There is no goroutine, clock,
// network or random number inside: the same events give the same commands, so
// the machine that serves real jobs is the one that the simulator in this
// package's tests drives through ten thousand seeded disasters. The form is
// that of etcd's raft library: input and output are left to the user.
//
// Rules:
//
//   - Work goes to the first ready replica at once, then to the least loaded.
//   - A task failure counts against the block; a lost connection does not, but
//     a block over which several distinct replicas were lost is poison.
//   - A replica that refuses is left out, one that throttles is waited for, one
//     that keeps failing is given pauses that grow.
//   - When no block waits for a replica, an attempt that is much older than the
//     median gets a hedge on another one; so does an attempt whose replica left
//     the view. A replica that loses to a hedge is given a pause.
//   - A block's result is emitted once, whatever comes after it.
package schedule

import (
	"slices"
	"time"
)

// Time is the time since the scatter began.
type Time = time.Duration

// Never is a time that does not come.
const Never Time = -1

// Config holds the limits of one scatter. A zero field takes its default.
type Config struct {
	Limit      int // blocks held at once; 0 means 64
	PerReplica int // attempts in flight on one replica; 0 means 2
	Window     int // how far blocks may run ahead of the oldest unsettled one; 0 means 4 × Limit
	Attempts   int // task failures after which a block is given up; 0 means 3
	Losses     int // distinct replicas lost after which a block is poison; 0 means 3
	Faults     int // infrastructure failures after which a block is given up; 0 means 16
	Tolerate   int // blocks that may be given up before the scatter fails
	// TolerateShare is the same as a share of all blocks, from 0 to 1; the larger
	// of the two counts. It is known at the input's end.
	TolerateShare float64
	HedgeFloor    Time // an attempt younger than this gets no hedge; 0 means 200 ms
	NoHedge       bool // no hedges at all
	Backoff       Time // first pause after a failure; doubles up to BackoffMax; 0 means 20 ms
	BackoffMax    Time // 0 means 2 s
	RefusedWait   Time // first pause of a replica that refused; doubles up to 10 × that; 0 means 1 s
	ReplicaWait   Time // how long to wait for a replica before failing; 0 means 30 s
}

func (c Config) withDefaults() Config {
	or := func(p *int, n int) {
		if *p <= 0 {
			*p = n
		}
	}
	orTime := func(p *Time, t Time) {
		if *p <= 0 {
			*p = t
		}
	}
	or(&c.Limit, 64)
	or(&c.PerReplica, 2)
	or(&c.Window, 4*c.Limit)
	c.Window = max(c.Window, c.Limit)
	or(&c.Attempts, 3)
	or(&c.Losses, 3)
	or(&c.Faults, 16)
	orTime(&c.HedgeFloor, 200*time.Millisecond)
	orTime(&c.Backoff, 20*time.Millisecond)
	orTime(&c.BackoffMax, 2*time.Second)
	orTime(&c.RefusedWait, time.Second)
	orTime(&c.ReplicaWait, 30*time.Second)
	return c
}

// EventKind says what happened.
type EventKind uint8

// The events.
const (
	BlockRead   EventKind = iota + 1 // the next block in order was read
	InputEnd                         // the last block was read
	ViewChanged                      // Replicas are the ready ones now, in rank order
	Ended                            // Attempt ended with Outcome
	Tick                             // time passed
)

// Outcome is how an attempt ended.
type Outcome uint8

// The outcomes.
const (
	OK        Outcome = iota + 1
	Failed            // the handler failed
	Rejected          // the handler refuses the block for good
	Lost              // broken connection, damaged or foreign answer
	Refused           // nothing listens there
	Throttled         // busy; RetryAfter says how long
	TimedOut          // the attempt's deadline passed
	Canceled          // by a Cancel command
	Saved             // the handler has done a part of its work, and shall go on
)

// An Event goes into the machine.
type Event struct {
	Kind       EventKind
	Attempt    int
	Outcome    Outcome
	RetryAfter Time
	Replicas   []string
}

// CommandKind says what to do.
type CommandKind uint8

// The commands.
const (
	Read     CommandKind = iota + 1 // read N more blocks
	Start                           // start Attempt at Block on Replica, of rank Rank
	Cancel                          // cancel Attempt
	SetTimer                        // send Tick at time At; replaces the timer set before
	Emit                            // Attempt's answer is the result of Block
	GiveUp                          // Block has no result, for Reason
	Fail                            // the scatter ends here, for Reason
	Done                            // every block is settled
)

// Reason says why a block or a scatter was given up.
type Reason uint8

// The reasons.
const (
	TooManyFailures Reason = iota + 1 // of the handler, at this block
	BlockRejected                     // by the handler
	Poison                            // too many replicas were lost over the block
	TooManyFaults                     // of the infrastructure, at this block
	NoReplica                         // none was ready for too long
	Intolerable                       // more blocks were given up than is tolerated
)

// A Command comes out of the machine.
type Command struct {
	Kind    CommandKind
	Attempt int    // unique in the scatter, from 1
	Block   int    // index
	Number  int    // of the attempt at the block, from 1
	Replica string // ID
	Rank    int    // of Replica in the last view
	At      Time
	N       int
	Reason  Reason
}

// A Machine schedules one scatter. It is not safe for concurrent use.
type Machine struct {
	cfg Config
	out []Command

	// Blocks. Those in [low, read) are held; of them [fresh, read) were never
	// started. blocks is a ring over [low, low+Window).
	blocks  []block
	low     int // the oldest unsettled block
	fresh   int
	read    int
	credit  int // blocks asked for and not read yet
	settled int
	gaveUp  int
	ended   bool // no more input
	over    bool // Fail or Done is out

	retry   []int     // blocks to be started again, first come first
	delayed []waiting // blocks to be started again later: a heap by time

	attempts map[int]attempt
	order    []int // attempts by start; ended ones are swept out now and then
	orphans  []waiting
	next     int // the last attempt's id
	hedges   int // that run, or were for nothing

	replicas map[string]*replica
	idle     []*replica // may be given work: a heap, the least loaded first
	paused   []*replica // not before replica.until
	slots    int        // of all replicas in the view
	usable   int        // replicas in the view that did not refuse
	starved  Time       // since when blocks are held and usable is 0, or Never
	uses     uint64

	took  histogram
	timer Time
}

type block struct {
	number   int // attempts started
	running  [2]int
	failures int
	faults   int
	last     *replica
	lost     []*replica
	hedged   bool
	settled  bool
}

func (b *block) inFlight() bool { return b.running != [2]int{} }

type attempt struct {
	block   int
	replica *replica
	started Time
	hedge   bool // of a straggler
}

type waiting struct {
	at Time
	id int // of a block or an attempt
}

// New returns a machine with no block read and no replica known. Its first
// step should be ViewChanged or Tick.
func New(cfg Config) *Machine {
	cfg = cfg.withDefaults()
	return &Machine{
		cfg:      cfg,
		blocks:   make([]block, cfg.Window),
		attempts: make(map[int]attempt),
		replicas: make(map[string]*replica),
		starved:  Never,
		timer:    Never,
	}
}

// Held returns the number of blocks that are read and not settled.
func (m *Machine) Held() int { return m.read - m.settled }

// Step takes one event at the given time, which never goes back, and returns
// what to do. The returned slice is good until the next step.
func (m *Machine) Step(now Time, e Event) []Command {
	m.out = m.out[:0]
	if m.over {
		return m.out
	}
	switch e.Kind {
	case BlockRead:
		*m.block(m.read) = block{lost: m.block(m.read).lost[:0]}
		m.read++
		m.credit = max(0, m.credit-1)
	case InputEnd:
		m.ended = true
		m.tolerate()
	case ViewChanged:
		m.view(now, e.Replicas)
	case Ended:
		m.end(now, e)
	}
	m.wake(now)
	m.dispatch(now)
	m.hedge(now)
	m.finish(now)
	return m.out
}

func (m *Machine) emit(c Command) { m.out = append(m.out, c) }

func (m *Machine) block(i int) *block { return &m.blocks[i%len(m.blocks)] }

// view takes over the replicas that are ready now.
func (m *Machine) view(now Time, ids []string) {
	here := make(map[string]bool, len(ids))
	for rank, id := range ids {
		here[id] = true
		r := m.replicas[id]
		if r == nil {
			r = &replica{id: id, slots: m.cfg.PerReplica, place: out}
			m.replicas[id] = r
		}
		r.rank = rank
		r.gone = false
	}
	var gone []*replica
	for id, r := range m.replicas {
		if here[id] {
			continue
		}
		if !r.gone {
			r.gone = true
			gone = append(gone, r)
		}
		if r.running == 0 {
			delete(m.replicas, id)
		}
	}
	if len(gone) > 0 && !m.cfg.NoHedge {
		for _, id := range m.order {
			if a, ok := m.attempts[id]; ok && slices.Contains(gone, a.replica) {
				m.orphans = append(m.orphans, waiting{now + m.cfg.HedgeFloor, id})
			}
		}
	}
	m.idle, m.paused = m.idle[:0], m.paused[:0]
	m.slots, m.usable = 0, 0
	for _, id := range ids {
		r := m.replicas[id]
		m.slots += r.slots
		if !r.refused {
			m.usable++
		}
		r.place = out
		m.put(now, r)
	}
	for _, r := range gone {
		r.place = out
	}
}

// end takes note of how an attempt ended.
func (m *Machine) end(now Time, e Event) {
	a, ok := m.attempts[e.Attempt]
	if !ok {
		return // the answer came twice, or too late
	}
	delete(m.attempts, e.Attempt)
	r := a.replica
	r.running--
	m.judge(now, a, e)
	if r.gone && r.running == 0 && m.replicas[r.id] == r {
		delete(m.replicas, r.id)
	}
	if a.block < m.low || m.block(a.block).settled {
		return // another attempt won
	}
	b := m.block(a.block)
	for i := range b.running {
		if b.running[i] == e.Attempt {
			b.running[i] = 0
		}
	}
	var pause Time
	switch e.Outcome {
	case OK:
		m.took.add(now - a.started)
		if a.hedge {
			m.hedges-- // it was needed
		}
		m.emit(Command{Kind: Emit, Attempt: e.Attempt, Block: a.block, Number: b.number, Replica: r.id})
		m.settle(a.block)
		return
	case Rejected:
		m.giveUp(a.block, BlockRejected)
		return
	case Saved: // a block that is half done goes before those that are not begun
		m.took.add(now - a.started)
		if a.hedge {
			m.hedges--
		}
		b.failures, b.faults = 0, 0 // it gets on
		b.lost = b.lost[:0]
		if !b.inFlight() {
			b.hedged = false
			m.retry = slices.Insert(m.retry, 0, a.block)
		}
		return
	case Failed:
		b.failures++
		pause = m.backoff(b.failures, a.block)
	case TimedOut:
		b.failures++
	case Lost:
		b.faults++
		if !slices.Contains(b.lost, r) {
			b.lost = append(b.lost, r)
		}
		if b.faults > 1 {
			pause = m.backoff(b.faults-1, a.block)
		}
	}
	switch {
	case b.inFlight(): // its hedge still runs
	case b.failures >= m.cfg.Attempts:
		m.giveUp(a.block, TooManyFailures)
	case len(b.lost) >= m.cfg.Losses:
		m.giveUp(a.block, Poison)
	case b.faults >= m.cfg.Faults:
		m.giveUp(a.block, TooManyFaults)
	case pause > 0:
		m.delayed = push(m.delayed, waiting{now + pause, a.block})
	default:
		m.retry = append(m.retry, a.block)
	}
}

// backoff is the n-th pause, from 1: it doubles, and is spread by up to half
// so that blocks that failed together do not come back together.
func (m *Machine) backoff(n, block int) Time {
	d := m.cfg.Backoff
	for ; n > 1 && d < m.cfg.BackoffMax; n-- {
		d *= 2
	}
	d = min(d, m.cfg.BackoffMax)
	h := uint64(block)*0x9E3779B97F4A7C15 + uint64(n)*0xBF58476D1CE4E5B9
	h ^= h >> 31
	return d/2 + Time(h%uint64(d/2+1))
}

// settle ends a block: its other attempts are canceled, its place is freed.
func (m *Machine) settle(i int) {
	b := m.block(i)
	b.settled = true
	m.settled++
	for _, id := range b.running {
		if id != 0 {
			m.emit(Command{Kind: Cancel, Attempt: id, Block: i})
		}
	}
	b.running = [2]int{}
	b.last = nil
	clear(b.lost)
	for m.low < m.read && m.block(m.low).settled {
		m.low++
	}
}

func (m *Machine) giveUp(i int, why Reason) {
	m.emit(Command{Kind: GiveUp, Block: i, Number: m.block(i).number, Reason: why})
	m.settle(i)
	m.gaveUp++
	m.tolerate()
}

// tolerate fails the scatter when more blocks were given up than may be.
func (m *Machine) tolerate() {
	if m.cfg.TolerateShare > 0 && !m.ended {
		return // it may be a small share of what is yet to come
	}
	if m.gaveUp > max(m.cfg.Tolerate, int(m.cfg.TolerateShare*float64(m.read)+1e-9)) {
		m.fail(Intolerable)
	}
}

func (m *Machine) fail(why Reason) {
	m.over = true
	m.emit(Command{Kind: Fail, Reason: why})
}

// wake moves what has waited long enough.
func (m *Machine) wake(now Time) {
	for len(m.delayed) > 0 && m.delayed[0].at <= now {
		var w waiting
		m.delayed, w = pop(m.delayed)
		m.retry = append(m.retry, w.id)
	}
	for i := 0; i < len(m.paused); {
		r := m.paused[i]
		if r.until > now {
			i++
			continue
		}
		m.paused = slices.Delete(m.paused, i, i+1)
		m.put(now, r) // an answer may have made it idle in this very step
	}
}

// dispatch gives waiting blocks to idle replicas, and asks for more input.
func (m *Machine) dispatch(now Time) {
	if m.over {
		return
	}
	at := 0
	for at < len(m.retry) {
		i := m.retry[at]
		if b := m.block(i); i >= m.low && !b.settled {
			r := m.pick(b, false)
			if r == nil {
				break
			}
			m.start(now, i, r)
		}
		at++
	}
	m.retry = slices.Delete(m.retry, 0, at)
	for len(m.retry) == 0 && m.fresh < m.read {
		r := m.pick(m.block(m.fresh), false)
		if r == nil {
			break
		}
		m.start(now, m.fresh, r)
		m.fresh++
	}
	if m.ended {
		return
	}
	hold := min(m.cfg.Limit, max(8, 2*m.slots))
	n := min(hold-m.Held(), m.low+m.cfg.Window-m.read) - m.credit
	if n > 0 {
		m.credit += n
		m.emit(Command{Kind: Read, N: n})
	}
}

func (m *Machine) start(now Time, i int, r *replica) {
	b := m.block(i)
	m.next++
	b.number++
	if b.running[0] == 0 {
		b.running[0] = m.next
	} else {
		b.running[1] = m.next
	}
	b.last = r
	m.attempts[m.next] = attempt{block: i, replica: r, started: now}
	if len(m.order) > 2*len(m.attempts)+16 {
		m.order = slices.DeleteFunc(m.order, func(id int) bool { _, ok := m.attempts[id]; return !ok })
	}
	m.order = append(m.order, m.next)
	r.running++
	m.uses++
	r.used = m.uses
	m.put(now, r)
	m.emit(Command{Kind: Start, Attempt: m.next, Block: i, Number: b.number, Replica: r.id, Rank: r.rank})
}

// waits says whether a block waits for a replica or for its next attempt.
func (m *Machine) waits() bool {
	return len(m.retry) > 0 || m.fresh < m.read || len(m.delayed) > 0
}

// hedge starts second attempts at blocks whose first one hangs.
func (m *Machine) hedge(now Time) {
	if m.over || m.cfg.NoHedge {
		return
	}
	again := func(id int) bool { // false when no other replica is idle
		a, ok := m.attempts[id]
		if !ok || a.block < m.low {
			return true
		}
		b := m.block(a.block)
		if b.settled || b.hedged || b.running[0] == 0 || b.running[1] != 0 {
			return true
		}
		r := m.pick(b, true)
		if r == nil {
			return false
		}
		b.hedged = true
		m.start(now, a.block, r)
		return true
	}
	for len(m.orphans) > 0 && m.orphans[0].at <= now && again(m.orphans[0].id) {
		m.orphans = slices.Delete(m.orphans, 0, 1)
	}
	for {
		id, at := m.straggler()
		if id == 0 || at > now {
			return
		}
		before := m.next
		if !again(id) {
			return
		}
		if m.next > before {
			m.hedges++
			a := m.attempts[m.next]
			a.hedge = true
			m.attempts[m.next] = a
		}
	}
}

// straggler returns the oldest attempt that may get a hedge, and when; 0 when
// there is none. There is one only when no block waits for a replica: at the
// end of the input, or when the window is full behind a block that hangs.
func (m *Machine) straggler() (int, Time) {
	if m.waits() || 2*m.settled < m.read || m.took.n == 0 || m.cfg.NoHedge || m.hedges >= max(2, m.read/10) {
		return 0, Never
	}
	for len(m.order) > 0 {
		id := m.order[0]
		if a, ok := m.attempts[id]; ok && a.block >= m.low {
			if b := m.block(a.block); !b.settled && !b.hedged {
				return id, a.started + max(m.took.median()*3/2, m.cfg.HedgeFloor)
			}
		}
		m.order = m.order[1:]
	}
	return 0, Never
}

// finish ends the scatter when nothing is left to do, and sets the timer.
func (m *Machine) finish(now Time) {
	if m.over {
		return
	}
	if m.ended && m.settled == m.read {
		m.over = true
		m.emit(Command{Kind: Done})
		return
	}
	next := Never
	soonest := func(t Time) {
		if t > now && (next == Never || t < next) {
			next = t
		}
	}
	if len(m.delayed) > 0 {
		soonest(m.delayed[0].at)
	}
	wanted := m.waits() // a replica would be
	if len(m.orphans) > 0 {
		soonest(m.orphans[0].at)
		wanted = true
	}
	if id, at := m.straggler(); id != 0 {
		soonest(at)
		wanted = true
	}
	if wanted {
		for _, r := range m.paused {
			soonest(r.until)
		}
	}
	// A block that comes after a long silence has its full wait before it.
	switch {
	case m.usable > 0 || m.Held() == 0:
		m.starved = Never
	case m.starved == Never:
		m.starved = now
	}
	if m.waits() && m.usable == 0 && len(m.attempts) == 0 {
		if now >= m.starved+m.cfg.ReplicaWait {
			m.fail(NoReplica)
			return
		}
		soonest(m.starved + m.cfg.ReplicaWait)
	}
	if next != m.timer {
		m.timer = next
		m.emit(Command{Kind: SetTimer, At: next})
	}
}
