package schedule_test

// scale_test.go drives the machine that serves real jobs with many more
// replicas and blocks than one machine has, in virtual time: what it costs the
// master to decide, and how that grows.
//
//	go test ./internal/schedule -run TestScale -scale -v

import (
	"container/heap"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/schedule"
)

var scale = flag.Bool("scale", false, "simulate up to 10,000 replicas and 1,000,000 blocks")

// answers are the attempts that will end, by time.
type answers []answer

type answer struct {
	at      time.Duration
	attempt int
}

func (a answers) Len() int           { return len(a) }
func (a answers) Less(i, j int) bool { return a[i].at < a[j].at }
func (a answers) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *answers) Push(x any)        { *a = append(*a, x.(answer)) }
func (a *answers) Pop() any {
	last := len(*a) - 1
	x := (*a)[last]
	*a = (*a)[:last]
	return x
}

// A run is what one simulated job came to.
type scaleRun struct {
	virtual  time.Duration // from the first block to the last
	real     time.Duration // that the machine took, in all its steps
	steps    int
	attempts int
	allocs   float64 // a block
	heap     uint64  // most that was in use, in bytes
}

// simulate runs a job of so many blocks on so many replicas. A block takes 20 ms
// or so (log-normal, sigma 0.5), one in a thousand takes 50 times as long, and
// one in ten thousand is lost.
func simulate(t *testing.T, replicas, blocks int, seed uint64) scaleRun {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 1))
	m := schedule.New(schedule.Config{Limit: max(64, 3*replicas), PerReplica: 2})
	ids := make([]string, replicas)
	for i := range ids {
		ids[i] = fmt.Sprint("replica-", i)
	}
	var r scaleRun
	var agenda answers
	now, timer := time.Duration(0), schedule.Never
	asked, read, emitted := 0, 0, 0
	settled := make([]bool, blocks)
	of := make(map[int]int) // blocks of attempts
	done := false
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	step := func(e schedule.Event) {
		begun := time.Now()
		commands := m.Step(now, e)
		r.real += time.Since(begun)
		r.steps++
		for _, c := range commands {
			switch c.Kind {
			case schedule.Read:
				asked += c.N
			case schedule.Start:
				r.attempts++
				took := time.Duration(20e6 * math.Exp(rnd.NormFloat64()/2))
				if rnd.IntN(1000) == 0 {
					took *= 50
				}
				of[c.Attempt] = c.Block
				heap.Push(&agenda, answer{now + took, c.Attempt})
			case schedule.Cancel:
				heap.Push(&agenda, answer{now, c.Attempt})
			case schedule.SetTimer:
				timer = c.At
			case schedule.Emit:
				if settled[c.Block] {
					t.Fatalf("seed %d: block %d has two results", seed, c.Block)
				}
				settled[c.Block] = true
				emitted++
			case schedule.GiveUp, schedule.Fail:
				t.Fatalf("seed %d: gave up: %+v", seed, c)
			case schedule.Done:
				done = true
			}
		}
	}
	step(schedule.Event{Kind: schedule.ViewChanged, Replicas: ids})
	for !done {
		for asked > 0 && read < blocks {
			asked--
			read++
			step(schedule.Event{Kind: schedule.BlockRead})
			if read == blocks {
				step(schedule.Event{Kind: schedule.InputEnd})
			}
		}
		if done {
			break
		}
		if len(agenda) == 0 && timer == schedule.Never {
			t.Fatalf("seed %d: nothing will happen, and %d of %d blocks are done", seed, emitted, blocks)
		}
		if timer != schedule.Never && (len(agenda) == 0 || timer <= agenda[0].at) {
			now = max(now, timer)
			step(schedule.Event{Kind: schedule.Tick})
			continue
		}
		a := heap.Pop(&agenda).(answer)
		if _, runs := of[a.attempt]; !runs {
			continue // it was canceled before, or ended
		}
		delete(of, a.attempt)
		now = max(now, a.at)
		outcome := schedule.OK
		if rnd.IntN(10_000) == 0 {
			outcome = schedule.Lost
		}
		step(schedule.Event{Kind: schedule.Ended, Attempt: a.attempt, Outcome: outcome})
		if r.steps%100_000 == 0 {
			runtime.ReadMemStats(&after)
			r.heap = max(r.heap, after.HeapInuse)
		}
	}
	runtime.ReadMemStats(&after)
	r.heap = max(r.heap, after.HeapInuse)
	r.allocs = float64(after.Mallocs-before.Mallocs) / float64(blocks)
	r.virtual = now
	if emitted != blocks {
		t.Fatalf("seed %d: %d results of %d blocks", seed, emitted, blocks)
	}
	return r
}

func TestScale(t *testing.T) {
	sizes := [][2]int{{10, 20_000}, {1000, 20_000}}
	if *scale {
		sizes = [][2]int{{10, 1_000_000}, {100, 1_000_000}, {1000, 1_000_000}, {10_000, 10_000}, {10_000, 100_000}, {10_000, 1_000_000}}
	}
	for _, s := range sizes {
		begun := time.Now()
		r := simulate(t, s[0], s[1], 17)
		t.Logf("%6d replicas, %7d blocks: %8v virtual, %.2f µs of the machine a block, %.3f attempts a block, %.1f allocations a block (simulator and all), heap %3d MiB; simulated in %v",
			s[0], s[1], r.virtual.Round(time.Millisecond), float64(r.real.Nanoseconds())/1e3/float64(s[1]), float64(r.attempts)/float64(s[1]), r.allocs, r.heap>>20, time.Since(begun).Round(time.Millisecond))
		// Hedges are bounded, whatever the size.
		if r.attempts > s[1]+s[1]/9+10 {
			t.Errorf("%d attempts at %d blocks", r.attempts, s[1])
		}
	}
}
