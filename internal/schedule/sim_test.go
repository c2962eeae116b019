package schedule_test

// sim_test.go is a world in one thread: virtual time, replicas that crash,
// refuse, truncate, hang, throttle, join and leave, answers that come twice or
// too late. It drives the real Machine through it by a seed, and checks after
// each step that what must never happen has not, and at the end that what must
// happen has. The same seed gives the same trace.
//
// A failing seed is run again with
//
//	go test ./internal/schedule -run TestSimulation -seed N -v

import (
	"container/heap"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/schedule"
)

var (
	oneSeed  = flag.Uint64("seed", 0, "run only this seed of the simulation, with its trace")
	numSeeds = flag.Uint64("seeds", 10_000, "how many seeds to simulate")
)

func TestSimulation(t *testing.T) {
	if *oneSeed != 0 {
		w := newWorld(*oneSeed, testWriter{t})
		if err := w.run(); err != nil {
			t.Fatalf("seed %d: %v", *oneSeed, err)
		}
		return
	}
	seen := map[string]int{}
	for seed := uint64(1); seed <= *numSeeds; seed++ {
		w := newWorld(seed, io.Discard)
		if err := w.run(); err != nil {
			t.Fatalf("seed %d: %v\nrun it again: go test ./internal/schedule -run TestSimulation -seed %d -v", seed, err, seed)
		}
		for k, n := range w.seen {
			seen[k] += n
		}
	}
	// A simulation that never meets a fault shows nothing.
	if *numSeeds >= 1000 {
		for _, k := range []string{"crash", "refuse", "truncate", "save", "delay", "duplicate", "late", "join", "leave",
			"throttle", "poison", "reject", "fail", "timeout", "hedge", "emit", "give up", "done", "failed", "share failed"} {
			if seen[k] == 0 {
				t.Errorf("%d seeds never met %q", *numSeeds, k)
			}
		}
	}
	t.Logf("%d seeds: %v", *numSeeds, seen)
}

func TestSameSeedSameTrace(t *testing.T) {
	for seed := uint64(1); seed <= 200; seed++ {
		a, b := fnv.New64a(), fnv.New64a()
		if err := newWorld(seed, a).run(); err != nil {
			t.Fatal(seed, err)
		}
		if err := newWorld(seed, b).run(); err != nil {
			t.Fatal(seed, err)
		}
		if a.Sum64() != b.Sum64() {
			t.Fatalf("seed %d gave two traces", seed)
		}
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

// world is the simulated surroundings of one Machine.
type world struct {
	rnd   *rand.Rand
	trace io.Writer
	seen  map[string]int
	m     *schedule.Machine
	cfg   schedule.Config

	now    time.Duration
	agenda agenda
	seq    int

	calm     bool // faults have ended
	blocks   []simBlock
	read     int
	asked    int
	replicas map[string]*simReplica
	listed   []string // the view that the machine knows
	next     int
	attempts map[int]*simAttempt
	timer    int // generation

	outcome schedule.CommandKind
	reason  schedule.Reason
	err     error
}

type simBlock struct {
	poison, reject bool
	failures       int // the handler fails so many times
	emitted, gone  bool
	started        int
	failed         int             // task failures the machine was told of
	faults         int             // lost attempts it was told of
	lost           map[string]bool // replicas
	running        int
}

type simReplica struct {
	up      bool
	refuses bool // up, but nothing listens yet
	slow    int
	limit   int // throttles above so many
	running map[int]bool
}

type simAttempt struct {
	block    int
	replica  string
	canceled bool
	ended    bool // the machine was told
	ok       bool
}

type entry struct {
	at  time.Duration
	seq int
	do  func()
}

type agenda []entry

func (a agenda) Len() int { return len(a) }
func (a agenda) Less(i, j int) bool {
	return a[i].at < a[j].at || a[i].at == a[j].at && a[i].seq < a[j].seq
}
func (a agenda) Swap(i, j int) { a[i], a[j] = a[j], a[i] }
func (a *agenda) Push(x any)   { *a = append(*a, x.(entry)) }
func (a *agenda) Pop() any {
	old := *a
	x := old[len(old)-1]
	*a = old[:len(old)-1]
	return x
}

func newWorld(seed uint64, trace io.Writer) *world {
	rnd := rand.New(rand.NewPCG(seed, 0x5EAF))
	w := &world{
		rnd: rnd, trace: trace, seen: map[string]int{},
		replicas: map[string]*simReplica{}, attempts: map[int]*simAttempt{},
	}
	w.cfg = schedule.Config{
		Limit: 1 + rnd.IntN(40), PerReplica: 1 + rnd.IntN(4), Tolerate: max(0, rnd.IntN(6)-3),
		Attempts: 3, Losses: 3, Faults: 16, ReplicaWait: 30 * time.Second,
	}
	if rnd.IntN(4) == 0 {
		w.cfg.TolerateShare = rnd.Float64() / 10
	}
	w.m = schedule.New(w.cfg)
	w.blocks = make([]simBlock, rnd.IntN(80))
	for i := range w.blocks {
		b := &w.blocks[i]
		b.lost = map[string]bool{}
		switch x := rnd.IntN(400); {
		case x == 0:
			b.poison = true
		case x == 1:
			b.reject = true
		case x < 20:
			b.failures = 1 + rnd.IntN(3)
		}
	}
	return w
}

func (w *world) logf(format string, a ...any) {
	fmt.Fprintf(w.trace, "%v "+format+"\n", append([]any{w.now}, a...)...)
}

func (w *world) fail(format string, a ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("at %v: "+format, append([]any{w.now}, a...)...)
		w.logf("VIOLATION %v", w.err)
	}
}

func (w *world) after(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.agenda, entry{w.now + d, w.seq, do})
}

func (w *world) ms(lo, hi int) time.Duration {
	return time.Duration(lo)*time.Millisecond + time.Duration(w.rnd.IntN((hi-lo)*1000+1))*time.Microsecond
}

// chance is true p times in a hundred, as long as faults last.
func (w *world) chance(p int) bool { return !w.calm && w.rnd.IntN(100) < p }

func (w *world) run() error {
	for range w.rnd.IntN(6) {
		w.after(w.ms(0, 50), w.join)
	}
	w.after(time.Millisecond, w.chaos)
	w.after(2*time.Second, func() { // from here on it must come to an end
		w.calm = true
		for range 2 {
			w.join()
		}
	})
	w.step(schedule.Event{Kind: schedule.Tick})
	steps := 0
	for w.err == nil && w.outcome == 0 {
		if len(w.agenda) == 0 {
			w.fail("nothing is left to happen, and the scatter has not ended: %d read, held %d", w.read, w.m.Held())
			break
		}
		e := heap.Pop(&w.agenda).(entry)
		w.now = e.at
		if steps++; steps > 200_000 {
			w.fail("no end after %d events: the machine runs in circles", steps)
			break
		}
		if w.now > 10*time.Minute {
			w.fail("not over after %v", w.now)
			break
		}
		e.do()
	}
	if w.err == nil {
		w.judge()
	}
	return w.err
}

// chaos lets replicas come, go and die.
func (w *world) chaos() {
	if w.calm {
		return
	}
	switch ids := w.ups(); {
	case w.chance(12):
		w.join()
	case len(ids) > 0 && w.chance(10):
		w.crash(ids[w.rnd.IntN(len(ids))])
	case len(ids) > 0 && w.chance(5): // leaves in order: unlisted first, then drained
		id := ids[w.rnd.IntN(len(ids))]
		w.seen["leave"]++
		w.logf("leave %s", id)
		w.unlist(id, 0)
	}
	w.after(w.ms(1, 60), w.chaos)
}

func (w *world) ups() []string {
	var ids []string
	for id, r := range w.replicas {
		if r.up {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (w *world) join() {
	w.next++
	id := fmt.Sprintf("r%d", w.next)
	r := &simReplica{up: true, slow: 1, limit: 100, running: map[int]bool{}}
	if w.chance(8) {
		r.slow = 20 + w.rnd.IntN(200)
	}
	if w.chance(15) {
		r.limit = 1 + w.rnd.IntN(2)
	}
	if w.chance(5) {
		r.refuses = true
		w.after(w.ms(1, 3000), func() { r.refuses = false })
	}
	w.replicas[id] = r
	w.seen["join"]++
	w.logf("join %s slow %d limit %d", id, r.slow, r.limit)
	w.after(w.ms(0, 20), func() {
		if r.up {
			w.listed = append(w.listed, id)
			w.view()
		}
	})
}

func (w *world) crash(id string) {
	r := w.replicas[id]
	if !r.up {
		return
	}
	r.up = false
	w.seen["crash"]++
	w.logf("crash %s", id)
	attempts := make([]int, 0, len(r.running))
	for a := range r.running {
		attempts = append(attempts, a)
	}
	slices.Sort(attempts)
	for _, a := range attempts {
		w.after(w.ms(0, 2), func() { w.end(a, schedule.Lost, 0) })
	}
	w.unlist(id, w.ms(0, 400)) // the watcher is behind
	w.after(w.ms(5, 500), w.join)
}

func (w *world) unlist(id string, late time.Duration) {
	w.after(late, func() {
		w.listed = slices.DeleteFunc(w.listed, func(l string) bool { return l == id })
		w.view()
	})
}

func (w *world) view() {
	if w.rnd.IntN(10) == 0 { // ranks may change
		w.rnd.Shuffle(len(w.listed), func(i, j int) { w.listed[i], w.listed[j] = w.listed[j], w.listed[i] })
	}
	w.logf("view %v", w.listed)
	w.step(schedule.Event{Kind: schedule.ViewChanged, Replicas: slices.Clone(w.listed)})
}

// step sends one event and carries the commands out.
func (w *world) step(e schedule.Event) {
	if w.outcome != 0 || w.err != nil {
		return
	}
	for _, c := range slices.Clone(w.m.Step(w.now, e)) {
		w.logf("command %+v", c)
		w.carry(c)
	}
	if h := w.m.Held(); h > w.cfg.Limit {
		w.fail("holds %d blocks, limit %d", h, w.cfg.Limit)
	}
}

func (w *world) carry(c schedule.Command) {
	switch c.Kind {
	case schedule.Read:
		w.asked += c.N
		for range c.N {
			w.after(w.ms(0, 3), w.readOne)
		}
	case schedule.SetTimer:
		w.timer++
		if g := w.timer; c.At != schedule.Never {
			var late time.Duration // as real timers are
			if w.chance(25) {
				late = w.ms(0, 60)
			}
			w.after(max(0, c.At-w.now)+late, func() {
				if g == w.timer {
					w.step(schedule.Event{Kind: schedule.Tick})
				}
			})
		}
	case schedule.Start:
		w.start(c)
	case schedule.Cancel:
		a := w.attempts[c.Attempt]
		a.canceled = true
		w.blocks[a.block].running--
		delete(w.replicas[a.replica].running, c.Attempt)
		if w.chance(10) {
			w.seen["late"]++ // its answer still comes, as if it were in time
		} else {
			w.after(w.ms(0, 1), func() { w.end(c.Attempt, schedule.Canceled, 0) })
		}
	case schedule.Emit:
		b := &w.blocks[c.Block]
		a := w.attempts[c.Attempt]
		switch {
		case b.emitted:
			w.fail("block %d is emitted twice", c.Block)
		case b.gone:
			w.fail("block %d is emitted after it was given up", c.Block)
		case a.block != c.Block || !a.ok:
			w.fail("block %d is emitted from attempt %d, which did not answer for it", c.Block, c.Attempt)
		}
		b.emitted = true
		w.seen["emit"]++
	case schedule.GiveUp:
		b := &w.blocks[c.Block]
		if b.emitted || b.gone {
			w.fail("block %d is given up after it was settled", c.Block)
		}
		b.gone = true
		w.seen["give up"]++
		switch {
		case c.Reason == schedule.TooManyFailures && b.failed < w.cfg.Attempts,
			c.Reason == schedule.Poison && len(b.lost) < w.cfg.Losses,
			c.Reason == schedule.TooManyFaults && b.faults < w.cfg.Faults,
			c.Reason == schedule.BlockRejected && !b.reject:
			w.fail("block %d is given up for reason %d without cause: %+v", c.Block, c.Reason, b)
		}
		if c.Reason == schedule.Poison {
			w.seen["poison"]++
		}
	case schedule.Fail, schedule.Done:
		w.outcome, w.reason = c.Kind, c.Reason
	}
}

func (w *world) readOne() {
	if w.asked == 0 {
		w.fail("a block was read that was not asked for")
	}
	w.asked--
	if w.read < len(w.blocks) {
		w.read++
		w.step(schedule.Event{Kind: schedule.BlockRead})
	} else if w.read == len(w.blocks) {
		w.read++ // once
		w.step(schedule.Event{Kind: schedule.InputEnd})
	}
}

func (w *world) start(c schedule.Command) {
	b := &w.blocks[c.Block]
	r := w.replicas[c.Replica]
	b.started++
	b.running++
	switch {
	case b.emitted || b.gone:
		w.fail("block %d is started after it was settled", c.Block)
	case c.Block >= w.read:
		w.fail("block %d is started before it was read", c.Block)
	case c.Number != b.started:
		w.fail("block %d: attempt is numbered %d and is number %d", c.Block, c.Number, b.started)
	case c.Rank >= len(w.listed) || w.listed[c.Rank] != c.Replica:
		w.fail("attempt on %s, which is not rank %d of the view %v", c.Replica, c.Rank, w.listed)
	case b.running > 2:
		w.fail("block %d has %d attempts in flight", c.Block, b.running)
	case len(r.running) >= w.cfg.PerReplica:
		w.fail("replica %s has %d attempts in flight and gets another", c.Replica, len(r.running))
	}
	if b.running == 2 {
		w.seen["hedge"]++
	}
	a := &simAttempt{block: c.Block, replica: c.Replica}
	w.attempts[c.Attempt] = a
	if !r.up || r.refuses {
		w.seen["refuse"]++
		r.running[c.Attempt] = true
		w.after(w.ms(0, 1), func() { w.end(c.Attempt, schedule.Refused, 0) })
		return
	}
	r.running[c.Attempt] = true
	switch {
	case len(r.running) > r.limit:
		w.seen["throttle"]++
		wait := time.Duration(w.rnd.IntN(3)) * time.Second / 2
		w.after(w.ms(0, 1), func() { w.end(c.Attempt, schedule.Throttled, wait) })
	case b.poison:
		w.after(w.ms(1, 10), func() { w.crash(c.Replica) })
	case b.reject:
		w.seen["reject"]++
		w.after(w.ms(1, 10), func() { w.end(c.Attempt, schedule.Rejected, 0) })
	case b.failures > 0:
		b.failures--
		w.seen["fail"]++
		w.after(w.ms(1, 10), func() { w.end(c.Attempt, schedule.Failed, 0) })
	case w.chance(3):
		w.seen["truncate"]++
		w.after(w.ms(1, 10), func() { w.end(c.Attempt, schedule.Lost, 0) })
	case w.chance(3):
		w.seen["save"]++
		w.after(w.ms(1, 10)*time.Duration(r.slow), func() { w.end(c.Attempt, schedule.Saved, 0) })
	case w.chance(2): // hangs: the deadline ends it
		w.seen["timeout"]++
		w.after(5*time.Second, func() { w.end(c.Attempt, schedule.TimedOut, 0) })
	default:
		d := w.ms(1, 10) * time.Duration(r.slow)
		if w.chance(10) { // one block takes longer than others
			d += w.ms(0, 200)
		}
		if r.slow > 1 {
			w.seen["delay"]++
		}
		w.after(d, func() { w.end(c.Attempt, schedule.OK, 0) })
		if w.chance(5) {
			w.seen["duplicate"]++
			w.after(d+w.ms(0, 30), func() { w.end(c.Attempt, schedule.OK, 0) })
		}
	}
}

// end tells the machine how an attempt ended. Of a replica that has crashed
// nothing is heard but that.
func (w *world) end(id int, o schedule.Outcome, wait time.Duration) {
	a := w.attempts[id]
	b := &w.blocks[a.block]
	r := w.replicas[a.replica]
	if !a.ended && !a.canceled && (o == schedule.OK || o == schedule.Saved) && !r.up {
		return
	}
	if !a.ended {
		a.ended = true
		a.ok = o == schedule.OK
		if !a.canceled {
			b.running--
		}
		delete(r.running, id)
		if !b.emitted && !b.gone {
			switch o {
			case schedule.Saved:
				b.failed, b.faults = 0, 0
				clear(b.lost)
			case schedule.Failed, schedule.TimedOut:
				b.failed++
			case schedule.Lost:
				b.faults++
				b.lost[a.replica] = true
			}
		}
	}
	w.logf("ended %d %d", id, o)
	w.step(schedule.Event{Kind: schedule.Ended, Attempt: id, Outcome: o, RetryAfter: wait})
}

// tolerated is how many blocks may be given up.
func (w *world) tolerated() int {
	return max(w.cfg.Tolerate, int(w.cfg.TolerateShare*float64(len(w.blocks))+1e-9))
}

// judge checks the end: done means every block once, failed means for a cause.
func (w *world) judge() {
	emitted, gone := 0, 0
	for i := range w.blocks {
		b := &w.blocks[i]
		switch {
		case b.emitted:
			emitted++
		case b.gone:
			gone++
		case w.outcome == schedule.Done:
			w.fail("done, and block %d has neither a result nor an error", i)
		}
	}
	switch {
	case w.outcome == schedule.Done:
		w.seen["done"]++
		if emitted+gone != len(w.blocks) || gone > w.tolerated() {
			w.fail("done with %d results and %d given up of %d, tolerated %d", emitted, gone, len(w.blocks), w.tolerated())
		}
	case w.reason == schedule.Intolerable:
		w.seen["failed"]++
		if gone <= w.tolerated() {
			w.fail("failed with %d given up, tolerated %d", gone, w.tolerated())
		}
		if w.cfg.TolerateShare > 0 {
			w.seen["share failed"]++
			if w.read <= len(w.blocks) { // the end was not read: nobody knows how many there are
				w.fail("failed for a share before the input's end")
			}
		}
	case w.reason == schedule.NoReplica:
		w.fail("failed for want of a replica, and there were always some within 30 s")
	}
	w.logf("end %d %d", w.outcome, w.reason)
}
