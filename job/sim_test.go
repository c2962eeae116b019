package job

// sim_test.go is a world in one thread: virtual time, masters that crash, stop,
// go on and disagree about the time, a JetStream that loses requests and
// answers, is away or behind, replicas that fail in every way, clients that
// send a job twice, cancel it and have it run again. It drives by a seed the
// real Store and Lease of this package, the real Machine of internal/schedule,
// and has answers judged by the real Caller of internal/wire. After each write
// it checks that what must never happen has not, and at the end that what must
// happen has. The same seed gives the same trace.
//
// Code that waits (for JetStream, for time) is a coroutine here: it runs until
// it waits, and only one runs at a time.
//
// What is a model, and not the product's code: JetStream; the loop around the
// machine (scatter.go of the root package) and the run of a job (run.go of
// master), which are goroutines; replicas and the network.
//
// A failing seed is run again with
//
//	go test ./job -run 'TestSimulation$' -seed N -v

import (
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"iter"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
)

var (
	oneSeed  = flag.Uint64("seed", 0, "run only this seed of the simulation, with its trace")
	numSeeds = flag.Uint64("seeds", 10_000, "how many seeds to simulate")
)

// faults are the kinds that a simulation must meet, and the rows of faults
// that they stand for.
var faults = []struct{ kind, what string }{
	{"master crash", "a master is killed, anywhere"},
	{"crash at step", "a master is killed right before or after a step that is stored"},
	{"master stop", "a master is stopped past its lease, and goes on"},
	{"master leave", "a master ends in order, and hands its jobs over"},
	{"skew", "the clocks of masters differ by up to an hour"},
	{"request lost", "JetStream does not get a request"},
	{"answer lost", "JetStream has done it, and its answer is lost"},
	{"late write", "a request arrives long after its sender has given it up"},
	{"twice", "JetStream gets a request twice"},
	{"refused meanwhile", "a cluster refuses a fenced write while another one is on its way"},
	{"stale read", "JetStream answers a read with what was there before"},
	{"store away", "JetStream is away for seconds"},
	{"cut off", "one master is cut off from JetStream"},
	{"watch behind", "what a master sees of others' writes is seconds old"},
	{"beat lost", "a heartbeat is lost"},
	{"submitted twice", "a queue or a client gives one job to two masters"},
	{"client leaves", "a client leaves while its job is being stored, and comes again"},
	{"conflict", "another input comes with the same key"},
	{"cancel", "a client cancels, at any time"},
	{"redrive", "a failed job is run again"},
	{"replica crash", "a replica is killed"},
	{"refuse", "nobody listens at an address"},
	{"another's address", "another function has the address of a replica"},
	{"cut", "an answer is cut, and ends cleanly"},
	{"damaged", "an answer is not what its digest says"},
	{"page", "a proxy answers 200 with a page of its own"},
	{"redirect", "a replica redirects"},
	{"throttle", "a replica is busy"},
	{"fail", "the handler fails"},
	{"reject", "the handler rejects the block"},
	{"poison", "a block kills every replica"},
	{"timeout", "a replica hangs"},
	{"straggler", "a replica is 20 times slower"},
	{"late answer", "the answer comes after the attempt was cancelled"},
	{"answer twice", "the answer comes twice"},
	{"save", "the handler saves its work, and goes on elsewhere"},
	{"join", "replicas join"},
	{"leave", "replicas leave"},
	{"view behind", "a master's view is behind"},
}

// ends are what else a simulation must meet.
var ends = []string{"claim", "take-over", "fenced off", "resumed with results", "resumed with saved work", "hedge",
	"succeeded", "failed", "cancelled", "lacking"}

func TestSimulation(t *testing.T) {
	if *oneSeed != 0 {
		w := newWorld(*oneSeed, testWriter{t})
		if err := w.run(); err != nil {
			t.Fatalf("seed %d: %v", *oneSeed, err)
		}
		return
	}
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	begun := time.Now()
	seen := map[string]int{}
	// Planted bugs must be found by the first thousand (test/mutants).
	first := min(*numSeeds, 1000)
	if !t.Run("first", func(t *testing.T) { simulate(t, 1, first, seen) }) || !t.Run("rest", func(t *testing.T) { simulate(t, first+1, *numSeeds, seen) }) {
		return
	}
	var table strings.Builder
	fmt.Fprintf(&table, "%d seeds in %v, no violation\n", *numSeeds, time.Since(begun).Round(time.Second))
	tell := func(kind, what string) {
		fmt.Fprintf(&table, "%12d  %-24s %s\n", seen[kind], kind, what)
		// A simulation that never meets a fault shows nothing.
		if *numSeeds >= 1000 && seen[kind] == 0 {
			t.Errorf("%d seeds never met %q", *numSeeds, kind)
		}
	}
	for _, f := range faults {
		tell(f.kind, f.what)
	}
	for _, kind := range ends {
		tell(kind, "")
	}
	t.Log(table.String())
}

// simulate runs the seeds from one to another, and counts what they met.
func simulate(t *testing.T, from, to uint64, seen map[string]int) {
	var (
		mu     sync.Mutex // guards what follows, and seen
		seed   = from
		failed = to + 1
		why    error
	)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) { // each world is one thread, and nothing is shared
		wg.Go(func() {
			mu.Lock()
			defer mu.Unlock()
			for seed <= to && why == nil {
				own := seed
				seed++
				w := newWorld(own, nil)
				mu.Unlock()
				err := w.run()
				mu.Lock()
				for k, n := range w.seen {
					seen[k] += n
				}
				if err != nil && own < failed {
					failed, why = own, err
				}
			}
		})
	}
	wg.Wait()
	if why != nil {
		t.Fatalf("seed %d: %v\nrun it again: go test ./job -run 'TestSimulation$' -seed %d -v", failed, why, failed)
	}
}

func TestSameSeedSameTrace(t *testing.T) {
	for seed := uint64(1); seed <= 100; seed++ {
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

const (
	simLease  = 1200 * time.Millisecond
	endWithin = 5 * time.Minute // after the last fault
	blockSize = 4
)

// world is all that there is.
type world struct {
	rnd   *rand.Rand
	trace io.Writer // nil when nobody looks
	seen  map[string]int
	err   error

	now    time.Duration
	agenda agenda
	order  int
	calm   bool // faults have ended
	storm  int  // how much more JetStream fails than elsewhere

	chaosFor time.Duration

	threads []*thread
	current *thread

	shelf   server
	masters []*master // all that ever were
	jobs    []*simJob

	replicas map[string]*simReplica // by ID
	at       map[string]*simReplica // by address: who listens there
	listed   []sheaf.Replica        // the view
	epoch    uint64
	next     int
}

type entry struct {
	at    time.Duration
	order int
	do    func()
}

// agenda is a heap: what comes first, first.
type agenda []entry

func (a agenda) before(i, j int) bool {
	return a[i].at < a[j].at || a[i].at == a[j].at && a[i].order < a[j].order
}

func (a *agenda) push(e entry) {
	*a = append(*a, e)
	h := *a
	for i := len(h) - 1; i > 0 && h.before(i, (i-1)/2); i = (i - 1) / 2 {
		h[i], h[(i-1)/2] = h[(i-1)/2], h[i]
	}
}

func (a *agenda) pop() entry {
	h := *a
	first, last := h[0], len(h)-1
	h[0], h[last] = h[last], entry{}
	h = h[:last]
	*a = h
	for i := 0; ; {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < last; c++ {
			if h.before(c, least) {
				least = c
			}
		}
		if least == i {
			return first
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
}

func newWorld(seed uint64, trace io.Writer) *world {
	w := &world{
		rnd: rand.New(rand.NewPCG(seed, 0x10B5)), trace: trace, seen: map[string]int{},
		replicas: map[string]*simReplica{}, at: map[string]*simReplica{},
	}
	w.shelf = server{w: w, entries: map[string]*kept{}, pieces: map[string][]byte{}}
	return w
}

func (w *world) logf(format string, a ...any) {
	if w.trace != nil {
		fmt.Fprintf(w.trace, "%v "+format+"\n", append([]any{w.now}, a...)...)
	}
}

func (w *world) fail(format string, a ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("at %v: "+format, append([]any{w.now}, a...)...)
		w.logf("VIOLATION %v", w.err)
	}
}

func (w *world) met(kind string) { w.seen[kind]++; w.logf("%s", kind) }

func (w *world) after(d time.Duration, do func()) {
	w.order++
	w.agenda.push(entry{w.now + d, w.order, do})
}

func (w *world) ms(lo, hi int) time.Duration {
	return time.Duration(lo)*time.Millisecond + time.Duration(w.rnd.IntN((hi-lo)*1000+1))*time.Microsecond
}

// chance is true p times in a thousand, as long as faults last.
func (w *world) chance(p int) bool { return !w.calm && w.rnd.IntN(1000) < p }

func (w *world) run() error {
	defer w.stopAll()
	w.chaosFor = 6 * time.Second
	if w.storm = 1; w.rnd.IntN(4) == 0 {
		w.storm = 2 + w.rnd.IntN(7)
		w.chaosFor = 14 * time.Second
	}
	for range 1 + w.rnd.IntN(3) {
		w.boot()
	}
	for range 1 + w.rnd.IntN(4) {
		w.join()
	}
	for range 1 + w.rnd.IntN(2) {
		w.order++
		w.newJob()
	}
	w.after(time.Millisecond, w.chaos)
	w.after(w.chaosFor, func() { // from here on all must come to an end
		w.calm = true
		w.logf("calm")
		w.shelf.awayUntil = w.now
		for _, m := range w.masters {
			m.cutUntil = min(m.cutUntil, w.now)
		}
		w.boot()
		w.join()
		w.join()
	})
	steps := 0
	over, soon := time.Duration(0), w.rnd.IntN(4) > 0
	for w.err == nil && !(w.calm && w.allOver()) {
		e := w.agenda.pop()
		w.now = e.at
		if steps++; steps > 300_000 {
			w.fail("no end after %d events: something runs in circles", steps)
		}
		if w.now > w.chaosFor+endWithin {
			w.fail("liveness: not over %v after the last fault: %s", endWithin, w.left())
		}
		e.do()
		if steps%64 == 0 {
			w.threads = slices.DeleteFunc(w.threads, func(t *thread) bool { return t.over })
			// Most worlds need not be watched long after all is over.
			switch {
			case !w.allOver():
				over = w.now
			case soon && w.now > over+time.Second:
				return w.err
			}
		}
	}
	return w.err
}

func (w *world) allOver() bool {
	for _, j := range w.jobs {
		if !j.accepted || !j.record().State.Final() {
			return false
		}
	}
	return true
}

// left says which jobs are not over.
func (w *world) left() string {
	var b strings.Builder
	for _, j := range w.jobs {
		if r := j.record(); !j.accepted || !r.State.Final() {
			fmt.Fprintf(&b, "job %s is %q, accepted %v, owner %q, epoch %d; ", j.id, r.State, j.accepted, r.Owner, r.Epoch)
		}
	}
	return b.String()
}

// A thread is a coroutine of a master, or of a client if that is nil.
type thread struct {
	m     *master
	next  func() (struct{}, bool)
	stop  func()
	yield func(struct{}) bool
	over  bool
}

// killed unwinds a coroutine whose process is gone.
type killed struct{}

func (w *world) spawn(m *master, f func()) {
	t := &thread{m: m}
	t.next, t.stop = iter.Pull(func(yield func(struct{}) bool) {
		t.yield = yield
		defer func() {
			t.over = true
			if r := recover(); r != nil && r != any(killed{}) {
				panic(r)
			}
		}()
		f()
	})
	w.threads = append(w.threads, t)
	w.after(0, func() { w.resume(t) })
}

// resume lets a coroutine go on, once its process is not stopped.
func (w *world) resume(t *thread) {
	if t.over {
		return
	}
	if t.m != nil {
		if t.m.dead {
			return
		}
		if t.m.stoppedUntil > w.now {
			t.m.do(func() { w.resume(t) })
			return
		}
	}
	before := w.current
	w.current = t
	t.next()
	w.current = before
}

// park waits to be resumed.
func (w *world) park() {
	t := w.current
	if t == nil || t.m != nil && t.m.dead || !t.yield(struct{}{}) {
		panic(killed{})
	}
}

func (w *world) sleep(d time.Duration) {
	if t := w.current; t != nil {
		w.after(d, func() { w.resume(t) })
	}
	w.park()
}

func (w *world) stopAll() {
	for _, m := range w.masters {
		m.dead = true
	}
	w.current = nil
	for _, t := range w.threads {
		t.stop()
	}
}

// chaos lets masters and replicas come, stop and die, and JetStream go away.
func (w *world) chaos() {
	if w.calm {
		return
	}
	up := w.up()
	switch ids := w.ups(); {
	case w.chance(30):
		w.join()
	case len(ids) > 0 && w.chance(40):
		w.crashReplica(w.replicas[ids[w.rnd.IntN(len(ids))]])
	case len(ids) > 0 && w.chance(20): // leaves in order: unlisted first, then drained
		r := w.replicas[ids[w.rnd.IntN(len(ids))]]
		w.met("leave")
		w.unlist(r.ID, 0)
		w.after(w.ms(100, 900), func() { w.goneReplica(r) })
	case len(up) > 0 && w.chance(30):
		w.met("master crash")
		w.kill(up[w.rnd.IntN(len(up))])
	case len(up) > 0 && w.chance(40):
		m := up[w.rnd.IntN(len(up))]
		d := w.ms(50, 4000)
		if d > simLease {
			w.met("master stop")
		}
		m.stoppedUntil = max(m.stoppedUntil, w.now+d)
	case len(up) > 0 && w.chance(20):
		w.met("master leave")
		m := up[w.rnd.IntN(len(up))]
		m.leaving = true
		m.cancel()
		w.after(w.ms(500, 3000), func() { w.kill(m) })
	case len(up) < 2 && w.chance(200):
		w.boot()
	case w.chance(15):
		w.met("store away")
		w.shelf.awayUntil = w.now + w.ms(100, 3000)
		for _, m := range up {
			m.disconnect(w.shelf.awayUntil)
		}
	case len(up) > 0 && w.chance(25):
		w.met("cut off")
		up[w.rnd.IntN(len(up))].disconnect(w.now + w.ms(100, 4000))
	}
	w.after(w.ms(5, 120), w.chaos)
}
