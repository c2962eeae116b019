package sheaf_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sheaf-project/sheaf"
)

// servers are replicas that work on so many requests at once, and let the
// others queue, first come first. They count what they hold.
type servers struct {
	atOnce int
	takes  time.Duration
	rnd    *rand.Rand // spreads takes by half, when it is set

	mu    sync.Mutex
	slots map[string]chan struct{}
	held  map[string]int
	most  int
}

func (s *servers) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	s.mu.Lock()
	if s.slots == nil {
		s.slots, s.held = map[string]chan struct{}{}, map[string]int{}
	}
	id := req.To.ID
	if s.slots[id] == nil {
		s.slots[id] = make(chan struct{}, s.atOnce)
	}
	slot := s.slots[id]
	s.held[id]++
	s.most = max(s.most, s.held[id])
	d := s.takes
	if s.rnd != nil {
		d += time.Duration(s.rnd.Int64N(int64(s.takes))) - s.takes/2
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.held[id]--
		s.mu.Unlock()
	}()
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-slot }()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return &sheaf.Reply{Body: req.Body, From: id, Verified: true}, nil
}

// spend scatters n blocks, and returns how long that took.
func spend(ctx context.Context, t *testing.T, g sheaf.Group, n int) time.Duration {
	begun := time.Now()
	blocks := func(yield func(sheaf.Block, error) bool) {
		for i := range n {
			if !yield(sheaf.Block{Data: []byte{byte(i)}}, nil) {
				return
			}
		}
	}
	got := 0
	for _, err := range g.Scatter(ctx, blocks) {
		if err != nil {
			if ctx.Err() == nil {
				t.Error(err)
			}
			return 0
		}
		got++
	}
	if got != n {
		t.Errorf("%d results of %d blocks", got, n)
	}
	return time.Since(begun)
}

// A job of 10 blocks beside one of 10,000 takes at most twice its time, though
// each replica works on one block at a time.
func TestSmallJobBesideALargeOne(t *testing.T) {
	for _, replicas := range []int{1, 3, 10} {
		for _, other := range []int{1, 2} {
			t.Run(fmt.Sprintf("%d replicas, %d large jobs", replicas, other), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := &servers{atOnce: 1, takes: 100 * time.Millisecond}
					turns := &sheaf.Turns{PerReplica: 1}
					g := sheaf.Group{Function: "worker", Route: s, Resolver: ready(replicas), Turns: turns, NoHedge: true}
					alone := spend(t.Context(), t, g, 10)
					ctx, cancel := context.WithCancel(t.Context())
					var wg sync.WaitGroup
					greedy := g
					greedy.PerReplica = 16
					for range other {
						wg.Go(func() { spend(ctx, t, greedy, 10_000) })
					}
					time.Sleep(time.Second) // they have the replicas
					beside := spend(t.Context(), t, g, 10)
					cancel()
					wg.Wait()
					// Its share is one of all jobs; the block that runs when it comes is one more.
					if limit := time.Duration(1+other)*alone + s.takes; beside > limit {
						t.Errorf("10 blocks took %v alone and %v beside %d jobs of 10,000: over %v", alone, beside, other, limit)
					}
					if s.most > 1 {
						t.Errorf("a replica had %d requests, and may have 1", s.most)
					}
				})
			})
		}
	}
}

// However many jobs there are, a replica has no more requests than it may
// have, and every block gets its result, when some jobs are canceled, too.
func TestTurnsBound(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	bubble(t, "jobs", func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		s := &servers{atOnce: 5, takes: 10 * time.Millisecond, rnd: rand.New(rand.NewPCG(seed, 2))}
		g := sheaf.Group{Function: "worker", Route: by(t, s), Resolver: ready(3), Turns: &sheaf.Turns{PerReplica: 3}}
		var wg sync.WaitGroup
		for job := range 40 {
			ctx, cancel := t.Context(), context.CancelFunc(func() {})
			if job%4 == 0 {
				ctx, cancel = context.WithTimeout(ctx, time.Duration(1+rnd.IntN(300))*time.Millisecond)
			}
			n := 1 + rnd.IntN(60)
			wg.Go(func() {
				defer cancel()
				spend(ctx, t, g, n)
			})
		}
		wg.Wait()
		if s.most > 3 {
			t.Errorf("seed %d: a replica had %d requests, and may have 3", seed, s.most)
		}
		if d := spend(t.Context(), t, g, 9); d > 4*3*s.takes {
			t.Errorf("seed %d: places were lost: 9 blocks took %v after all others", seed, d)
		}
	})
}

// The time in line is not taken from the attempt's.
func TestTurnsKeepTheTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &servers{atOnce: 1, takes: 50 * time.Millisecond}
		g := sheaf.Group{Function: "worker", Route: s, Resolver: ready(1), Turns: &sheaf.Turns{PerReplica: 1}, Timeout: 60 * time.Millisecond, Attempts: 1}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { spend(t.Context(), t, g, 5) })
		}
		wg.Wait()
	})
}

// Where the route picks the replica, the function as a whole is bounded.
func TestTurnsOfAFunction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &servers{atOnce: 100, takes: 10 * time.Millisecond}
		g := sheaf.Group{Function: "worker", Route: s, Turns: &sheaf.Turns{PerFunction: 7}}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { spend(t.Context(), t, g, 50) })
		}
		wg.Wait()
		if s.most != 7 {
			t.Errorf("%d requests were in flight, and 7 may be", s.most)
		}
	})
}

func TestTolerateShare(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		share       float64
		bad, blocks int
		stops       bool
	}{
		{0.05, 5, 100, false}, {0.05, 6, 100, true}, {0.29, 29, 100, false}, {0, 1, 100, true}, {1, 100, 100, false}, {0.05, 1, 10, true},
	} {
		g := sheaf.Group{Function: "worker", Resolver: ready(3), TolerateShare: c.share,
			Route: sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				if req.Index < c.bad {
					return nil, &sheaf.CallError{Fault: sheaf.FaultRejected, Err: errors.New("no")}
				}
				return &sheaf.Reply{Body: req.Body}, nil
			})}
		got := 0
		var partial *sheaf.PartialError
		for _, err := range g.Scatter(t.Context(), sheaf.SplitBytes(strings.NewReader(strings.Repeat("x", c.blocks)), 1)) {
			if err == nil {
				got++
			} else if !errors.As(err, &partial) {
				t.Fatal(err)
			}
		}
		if partial == nil {
			t.Fatalf("%+v: no partial error", c)
		}
		if stopped := len(partial.Missing) < c.bad || got+len(partial.Missing) < c.blocks; partial.Total != c.blocks && !c.stops {
			t.Errorf("%+v: total %d, stopped %v", c, partial.Total, stopped)
		}
		if !c.stops && (len(partial.Missing) != c.bad || got != c.blocks-c.bad) {
			t.Errorf("%+v: %d results, %d missing", c, got, len(partial.Missing))
		}
	}
	g := sheaf.Group{Function: "worker", Route: sheaf.RouteFunc(nil), TolerateShare: 1.5}
	for _, err := range g.Scatter(t.Context(), sheaf.SplitBytes(strings.NewReader("x"), 1)) {
		if err == nil {
			t.Error("a share of 150 % is accepted")
		}
	}
}
