package sheaf_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sheaf-project/sheaf"
)

// ready returns n replicas r0, r1, ... that stay.
func ready(n int) sheaf.Static {
	var s sheaf.Static
	for i := range n {
		s = append(s, sheaf.Replica{ID: fmt.Sprint("r", i), State: sheaf.Ready})
	}
	return s
}

// views is a Resolver whose view a test changes.
type views struct {
	mu      sync.Mutex // guards what follows
	view    sheaf.View
	err     error
	changed chan struct{} // closed at the next change
}

func newViews() *views { return &views{changed: make(chan struct{})} }

// set makes the replicas of the given IDs the ready ones.
func (v *views) set(ids ...string) {
	v.change(func() {
		v.view.Epoch++
		v.view.Replicas = nil
		for _, id := range ids {
			v.view.Replicas = append(v.view.Replicas, sheaf.Replica{ID: id})
		}
	})
}

func (v *views) fail(err error) { v.change(func() { v.err = err }) }

func (v *views) change(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
	close(v.changed)
	v.changed = make(chan struct{})
}

func (v *views) Watch(ctx context.Context, _ string) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		for seen := uint64(0); ; {
			v.mu.Lock()
			view, err, changed := v.view, v.err, v.changed
			v.mu.Unlock()
			if err != nil {
				yield(sheaf.View{}, err)
				return
			}
			if view.Epoch > seen {
				seen = view.Epoch
				if !yield(view, nil) {
					return
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}
}

// route is a RouteFunc that answers in capitals, unless f says otherwise. It
// counts the calls that run.
type route struct {
	f       func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error)
	running atomic.Int64
}

func (r *route) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	r.running.Add(1)
	defer r.running.Add(-1)
	if r.f != nil {
		if reply, err := r.f(ctx, req); reply != nil || err != nil {
			return reply, err
		}
	}
	return capitals(req), nil
}

func capitals(req *sheaf.Request) *sheaf.Reply {
	return &sheaf.Reply{Body: []byte(strings.ToUpper(string(req.Body))), From: req.To.ID, Verified: true}
}

// hang answers when ctx ends, as a replica that is stuck does.
func hang(ctx context.Context) (*sheaf.Reply, error) {
	<-ctx.Done()
	return nil, &sheaf.CallError{Fault: sheaf.FaultLost, Err: ctx.Err()}
}

func fault(f sheaf.Fault) error { return &sheaf.CallError{Fault: f, Err: errors.New("as planned")} }

// words yields n blocks "word 0\n", "word 1\n", ...
func words(n int) iter.Seq2[sheaf.Block, error] {
	return func(yield func(sheaf.Block, error) bool) {
		var offset int64
		for i := range n {
			data := fmt.Appendf(nil, "word %d\n", i)
			if !yield(sheaf.Block{Index: i, Offset: offset, Data: data}, nil) {
				return
			}
			offset += int64(len(data))
		}
	}
}

// drain returns all results, by index, and the error that ended them.
func drain(t *testing.T, results iter.Seq2[sheaf.Result, error]) (map[int]sheaf.Result, error) {
	t.Helper()
	all := map[int]sheaf.Result{}
	var end error
	for r, err := range results {
		if end != nil {
			t.Fatalf("result %v, %v comes after the error %v", r, err, end)
		}
		if err != nil {
			end = err
			continue
		}
		if _, twice := all[r.Index]; twice {
			t.Fatalf("block %d has two results", r.Index)
		}
		all[r.Index] = r
	}
	return all, end
}

// bubble runs f as two subtests with clocks of their own: one in which routes
// are called, one in which they are started.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	for _, way := range []string{"/calls", "/starts"} {
		t.Run(name+way, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, f)
		})
	}
}

// by is r, or r as a Starter, as the bubble wants it.
func by(t testing.TB, r sheaf.Route) sheaf.Route {
	if strings.HasSuffix(t.Name(), "/starts") {
		return starter{r}
	}
	return r
}

// starter is a Starter that makes calls on goroutines.
type starter struct{ sheaf.Route }

func (s starter) Start(req *sheaf.Request, done func(*sheaf.Reply, error)) (cancel func()) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		done(s.Call(ctx, req))
	}()
	return cancel
}

func TestScatter(t *testing.T) {
	t.Parallel()
	const n = 300
	for _, test := range []struct {
		name  string
		group sheaf.Group
	}{
		{"defaults", sheaf.Group{Resolver: ready(5)}},
		{"one replica, one at a time", sheaf.Group{Resolver: ready(1), PerReplica: 1}},
		{"one block held", sheaf.Group{Resolver: ready(3), Limit: 1}},
		{"one byte held", sheaf.Group{Resolver: ready(3), LimitBytes: 1}},
		{"route picks the replica", sheaf.Group{Limit: 7}},
		{"more replicas than blocks", sheaf.Group{Resolver: ready(2 * n), Limit: 2 * n}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			var mu sync.Mutex
			busy, jobs := map[string]int{}, map[string]bool{}
			r := &route{f: func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				mu.Lock()
				busy[req.To.ID]++
				jobs[req.Job] = true
				most := max(test.group.PerReplica, 2)
				if test.group.Resolver == nil {
					most = test.group.Limit
				}
				if test.group.PerReplica == 1 {
					most = 1
				}
				if busy[req.To.ID] > most {
					t.Errorf("%d calls at once on replica %q", busy[req.To.ID], req.To.ID)
				}
				if test.group.Resolver == nil && (req.To != sheaf.Replica{} || req.Size != 0) {
					t.Errorf("request goes to %+v of %d and there is no view", req.To, req.Size)
				}
				if s, ok := test.group.Resolver.(sheaf.Static); ok && (req.To != s[req.Rank] || req.Size != len(s) || req.Epoch != 1) {
					t.Errorf("request goes to %+v, rank %d of %d, epoch %d", req.To, req.Rank, req.Size, req.Epoch)
				}
				if req.Function != "worker" || req.Attempt != 1 || time.Until(req.Deadline) != sheaf.DefaultTimeout {
					t.Errorf("request %+v", req)
				}
				mu.Unlock()
				time.Sleep(rand.N(50 * time.Millisecond))
				mu.Lock()
				busy[req.To.ID]--
				mu.Unlock()
				return nil, nil
			}}
			g := test.group
			g.Function, g.Route, g.NoHedge = "worker", r, true
			results, err := drain(t, g.Scatter(t.Context(), words(n)))
			if err != nil || len(results) != n {
				t.Fatalf("%d results, error %v", len(results), err)
			}
			for b := range words(n) {
				r := results[b.Index]
				if string(r.Data) != strings.ToUpper(string(b.Data)) || r.Offset != b.Offset || r.Bytes != len(b.Data) ||
					r.Attempts != 1 || !r.Verified || (g.Resolver == nil) != (r.From == "") {
					t.Fatalf("result %+v of block %+v", r, b)
				}
			}
			if len(jobs) != 1 || jobs[""] {
				t.Errorf("jobs %v, want one name", jobs)
			}
		})
	}
	t.Run("no block", func(t *testing.T) {
		t.Parallel()
		g := sheaf.Group{Route: by(t, &route{}), Resolver: ready(0)}
		if results, err := drain(t, g.Scatter(t.Context(), words(0))); err != nil || len(results) != 0 {
			t.Errorf("%d results, error %v", len(results), err)
		}
	})
	t.Run("no route", func(t *testing.T) {
		t.Parallel()
		g := sheaf.Group{Function: "worker"}
		if _, err := drain(t, g.Scatter(t.Context(), words(1))); err == nil || !strings.Contains(err.Error(), "scatter to worker: group has no route") {
			t.Errorf("error %v", err)
		}
	})
}

func TestScatterRetries(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]func(ctx context.Context) (*sheaf.Reply, error){
		"task":          func(context.Context) (*sheaf.Reply, error) { return nil, fault(sheaf.FaultTask) },
		"lost":          func(context.Context) (*sheaf.Reply, error) { return nil, fault(sheaf.FaultLost) },
		"refused":       func(context.Context) (*sheaf.Reply, error) { return nil, fault(sheaf.FaultRefused) },
		"throttled":     func(context.Context) (*sheaf.Reply, error) { return nil, fault(sheaf.FaultThrottled) },
		"timeout":       func(context.Context) (*sheaf.Reply, error) { return nil, fault(sheaf.FaultTimeout) },
		"unknown fault": func(context.Context) (*sheaf.Reply, error) { return nil, fault(0) },
		"wrapped": func(context.Context) (*sheaf.Reply, error) {
			return nil, fmt.Errorf("call: %w", fault(sheaf.FaultTask))
		},
		"plain error":        func(context.Context) (*sheaf.Reply, error) { return nil, io.ErrUnexpectedEOF },
		"deadline of others": func(context.Context) (*sheaf.Reply, error) { return nil, context.DeadlineExceeded },
		"neither":            func(context.Context) (*sheaf.Reply, error) { return nil, nil },
		"hangs":              hang,
	} {
		for _, resolver := range []sheaf.Resolver{ready(1), ready(3), nil} {
			bubble(t, fmt.Sprintf("%s on %v", name, resolver), func(t *testing.T) {
				// Block 1 meets the fault once; of the others nobody notices.
				r := sheaf.RouteFunc(func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
					if req.Index == 1 && req.Attempt == 1 {
						return first(ctx)
					}
					return capitals(req), nil
				})
				g := sheaf.Group{Route: by(t, r), Resolver: resolver, NoHedge: true}
				results, err := drain(t, g.Scatter(t.Context(), words(4)))
				if err != nil || len(results) != 4 {
					t.Fatalf("%d results, error %v", len(results), err)
				}
				for i, r := range results {
					if want := map[bool]int{true: 2, false: 1}[i == 1]; r.Attempts != want {
						t.Errorf("block %d took %d attempts, want %d", i, r.Attempts, want)
					}
				}
			})
		}
	}
}

func TestScatterGivesUp(t *testing.T) {
	t.Parallel()
	plain := errors.New("plain")
	for _, test := range []struct {
		name     string
		err      error // of each attempt at block 2
		replicas int
		group    sheaf.Group
		attempts int
		poison   bool
		lost     []string
	}{
		{name: "rejected", err: fault(sheaf.FaultRejected), replicas: 3, attempts: 1},
		{name: "task", err: fault(sheaf.FaultTask), replicas: 3, attempts: 3},
		{name: "task, one attempt", err: fault(sheaf.FaultTask), replicas: 3, group: sheaf.Group{Attempts: 1}, attempts: 1},
		{name: "timeout", err: fault(sheaf.FaultTimeout), replicas: 3, attempts: 3},
		{name: "poison", err: fault(sheaf.FaultLost), replicas: 5, attempts: 3, poison: true, lost: []string{"r", "r", "r"}},
		{name: "poison over a plain route", err: plain, replicas: 5, attempts: 3, poison: true, lost: []string{"r", "r", "r"}},
		{name: "lost on too few replicas for poison", err: fault(sheaf.FaultLost), replicas: 2, attempts: 16, lost: []string{"r", "r"}},
	} {
		bubble(t, test.name, func(t *testing.T) {
			g := test.group
			g.Resolver, g.NoHedge, g.Job, g.Tolerate = ready(test.replicas), true, "j", 1
			g.Route = by(t, sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				if req.Index == 2 {
					return nil, test.err
				}
				return capitals(req), nil
			}))
			results, err := drain(t, g.Scatter(t.Context(), words(20)))
			var pe *sheaf.PartialError
			if !errors.As(err, &pe) || len(pe.Missing) != 1 {
				t.Fatalf("error %v names no missing block", err)
			}
			if len(results) != 19 || pe.Done != 19 || pe.Total != 20 || pe.Job != "j" {
				t.Errorf("%d results, and the error counts %d of %d in job %q", len(results), pe.Done, pe.Total, pe.Job)
			}
			m := pe.Missing[0]
			if m.Index != 2 || m.Offset != 14 || m.Bytes != 7 || m.Attempts != test.attempts || m.Poison != test.poison {
				t.Errorf("missing %+v", m)
			}
			if !errors.Is(err, test.err) {
				t.Errorf("error %q does not wrap the cause", err)
			}
			slices.Sort(m.Replicas)
			if len(slices.Compact(slices.Clone(m.Replicas))) != len(test.lost) || len(m.Replicas) != len(test.lost) {
				t.Errorf("lost over the block: %v, want %d distinct replicas", m.Replicas, len(test.lost))
			}
		})
	}
}

func TestScatterTolerate(t *testing.T) {
	t.Parallel()
	reject := func(bad ...int) sheaf.Route {
		return sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if slices.Contains(bad, req.Index) {
				return nil, fault(sheaf.FaultRejected)
			}
			return capitals(req), nil
		})
	}
	for _, test := range []struct {
		name     string
		tolerate int
		bad      []int
		all      bool // the other blocks have results
	}{
		{"none", 0, []int{5}, false},
		{"as many as tolerated", 3, []int{9, 5, 0}, true},
		{"one more", 2, []int{9, 5, 0}, false},
		{"all", 10, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, true},
	} {
		bubble(t, test.name, func(t *testing.T) {
			g := sheaf.Group{Route: reject(test.bad...), Resolver: ready(2), Tolerate: test.tolerate}
			results, err := drain(t, g.Scatter(t.Context(), words(10)))
			var pe *sheaf.PartialError
			if !errors.As(err, &pe) || pe.Done != len(results) {
				t.Fatalf("%d results, error %v", len(results), err)
			}
			var missing []int
			for _, m := range pe.Missing {
				missing = append(missing, m.Index)
			}
			if !slices.IsSorted(missing) {
				t.Errorf("missing %v are not in order", missing)
			}
			if test.all {
				slices.Sort(test.bad)
				if !slices.Equal(missing, test.bad) || len(results) != 10-len(test.bad) {
					t.Errorf("%d results, missing %v, want %v", len(results), missing, test.bad)
				}
			} else if len(missing) != test.tolerate+1 {
				t.Errorf("missing %v, %d are tolerated", missing, test.tolerate)
			}
		})
	}
}

func TestScatterVerified(t *testing.T) {
	t.Parallel()
	for _, verified := range []bool{true, false} {
		bubble(t, fmt.Sprint(verified), func(t *testing.T) {
			r := sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				return &sheaf.Reply{Verified: verified}, nil
			})
			g := sheaf.Group{Route: by(t, r), Resolver: ready(1), Verified: true}
			_, err := drain(t, g.Scatter(t.Context(), words(1)))
			if errors.Is(err, sheaf.ErrUnverified) == verified || (err == nil) != verified {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestScatterTime(t *testing.T) {
	t.Parallel()
	bubble(t, "throttled waits RetryAfter", func(t *testing.T) {
		begun := time.Now()
		var calls []time.Duration
		r := sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			calls = append(calls, time.Since(begun))
			if req.Attempt == 1 {
				return nil, &sheaf.CallError{Fault: sheaf.FaultThrottled, RetryAfter: 5 * time.Second, Err: io.EOF}
			}
			return capitals(req), nil
		})
		g := sheaf.Group{Route: by(t, r), Resolver: ready(1)}
		if _, err := drain(t, g.Scatter(t.Context(), words(1))); err != nil {
			t.Fatal(err)
		}
		if want := []time.Duration{0, 5 * time.Second}; !slices.Equal(calls, want) {
			t.Errorf("calls at %v, want %v", calls, want)
		}
	})
	bubble(t, "timeout ends an attempt", func(t *testing.T) {
		begun := time.Now()
		r := &route{f: func(ctx context.Context, _ *sheaf.Request) (*sheaf.Reply, error) { return hang(ctx) }}
		g := sheaf.Group{Route: by(t, r), Resolver: ready(1), Timeout: 2 * time.Second}
		_, err := drain(t, g.Scatter(t.Context(), words(1)))
		var be *sheaf.BlockError
		var ce *sheaf.CallError
		if !errors.As(err, &be) || be.Attempts != 3 || !errors.As(err, &ce) || ce.Fault != sheaf.FaultTimeout {
			t.Fatalf("error %v", err)
		}
		if took := time.Since(begun); took != 6*time.Second {
			t.Errorf("took %v", took)
		}
	})
	// One of 20 blocks hangs on the replica that gets it first.
	straggler := func(t *testing.T, noHedge bool) (took time.Duration, r sheaf.Result, canceled bool) {
		begun := time.Now()
		route := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Index == 19 && req.Attempt == 1 {
				reply, err := hang(ctx)
				canceled = errors.Is(ctx.Err(), context.Canceled) && time.Since(begun) < sheaf.DefaultTimeout
				return reply, err
			}
			time.Sleep(10 * time.Millisecond)
			return nil, nil
		}}
		g := sheaf.Group{Route: by(t, route), Resolver: ready(2), NoHedge: noHedge}
		results, err := drain(t, g.Scatter(t.Context(), words(20)))
		if err != nil || len(results) != 20 || route.running.Load() != 0 {
			t.Fatalf("%d results, error %v, %d calls run", len(results), err, route.running.Load())
		}
		return time.Since(begun), results[19], canceled
	}
	bubble(t, "hedge of a straggler", func(t *testing.T) {
		took, r, canceled := straggler(t, false)
		if took > time.Second || r.Attempts != 2 || !canceled {
			t.Errorf("took %v, result %+v, loser canceled: %v", took, r, canceled)
		}
	})
	bubble(t, "no hedge", func(t *testing.T) {
		took, r, canceled := straggler(t, true)
		if took < sheaf.DefaultTimeout || r.Attempts != 2 || canceled {
			t.Errorf("took %v, result %+v, first attempt canceled: %v", took, r, canceled)
		}
	})
}

func TestScatterViews(t *testing.T) {
	t.Parallel()
	bubble(t, "work begins with the first replica", func(t *testing.T) {
		v := newViews()
		var mu sync.Mutex
		first := map[string]time.Duration{} // call, by replica
		begun := time.Now()
		r := &route{f: func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			mu.Lock()
			if _, ok := first[req.To.ID]; !ok {
				first[req.To.ID] = time.Since(begun)
			}
			mu.Unlock()
			time.Sleep(100 * time.Millisecond)
			return nil, nil
		}}
		go func() {
			time.Sleep(time.Second)
			v.set("a")
			time.Sleep(time.Second)
			v.set("b", "a")
			time.Sleep(time.Second)
			v.set("b", "c")
		}()
		g := sheaf.Group{Route: by(t, r), Resolver: v}
		results, err := drain(t, g.Scatter(t.Context(), words(200)))
		if err != nil || len(results) != 200 {
			t.Fatalf("%d results, error %v", len(results), err)
		}
		want := map[string]time.Duration{"a": time.Second, "b": 2 * time.Second, "c": 3 * time.Second}
		if !maps.Equal(first, want) {
			t.Errorf("first calls at %v, want %v", first, want)
		}
	})
	bubble(t, "a replica that left gets nothing more", func(t *testing.T) {
		v := newViews()
		v.set("a", "b")
		r := &route{f: func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.To.ID == "a" && req.Epoch > 1 {
				t.Errorf("block %d goes to a replica that left", req.Index)
			}
			time.Sleep(time.Second)
			return nil, nil
		}}
		go func() {
			time.Sleep(1500 * time.Millisecond)
			v.set("b")
		}()
		g := sheaf.Group{Route: by(t, r), Resolver: v}
		if _, err := drain(t, g.Scatter(t.Context(), words(30))); err != nil {
			t.Error(err)
		}
	})
	bubble(t, "a call to a replica that left is hedged", func(t *testing.T) {
		v := newViews()
		v.set("a")
		r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.To.ID == "a" {
				v.set("b")
				return hang(ctx)
			}
			return nil, nil
		}}
		begun := time.Now()
		g := sheaf.Group{Route: by(t, r), Resolver: v}
		if _, err := drain(t, g.Scatter(t.Context(), words(1))); err != nil || time.Since(begun) > time.Second {
			t.Errorf("took %v, error %v", time.Since(begun), err)
		}
	})
	for _, test := range []struct {
		name     string
		resolver sheaf.Resolver
	}{
		{"an empty view", ready(0)},
		{"no view", silent{}},
		{"replicas that refuse", ready(3)},
	} {
		bubble(t, "no replica: "+test.name, func(t *testing.T) {
			begun := time.Now()
			refused := fault(sheaf.FaultRefused)
			r := sheaf.RouteFunc(func(context.Context, *sheaf.Request) (*sheaf.Reply, error) { return nil, refused })
			g := sheaf.Group{Route: by(t, r), Resolver: test.resolver, ReplicaWait: 7 * time.Second}
			_, err := drain(t, g.Scatter(t.Context(), words(3)))
			if took := time.Since(begun); !errors.Is(err, sheaf.ErrNoReplica) || took < 7*time.Second || took > 8*time.Second {
				t.Errorf("after %v: error %v", took, err)
			}
			if asked := test.name == "replicas that refuse"; errors.Is(err, refused) != asked {
				t.Errorf("error %v; the last attempt met %v", err, refused)
			}
		})
	}
	bubble(t, "a block that comes late has its full wait", func(t *testing.T) {
		v := newViews()
		v.set()
		blocks := func(yield func(sheaf.Block, error) bool) {
			time.Sleep(10 * time.Minute)
			if yield(sheaf.Block{Data: []byte("x")}, nil) {
				go func() {
					time.Sleep(20 * time.Second)
					v.set("a")
				}()
			}
		}
		g := sheaf.Group{Route: by(t, &route{}), Resolver: v}
		if results, err := drain(t, g.Scatter(t.Context(), blocks)); err != nil || len(results) != 1 {
			t.Errorf("%d results, error %v", len(results), err)
		}
	})
	bubble(t, "no function", func(t *testing.T) {
		v := newViews()
		v.set()
		go func() {
			time.Sleep(time.Second)
			v.fail(fmt.Errorf("resolve worker: %w", sheaf.ErrNoFunction))
		}()
		g := sheaf.Group{Route: by(t, &route{}), Resolver: v}
		if _, err := drain(t, g.Scatter(t.Context(), words(3))); !errors.Is(err, sheaf.ErrNoFunction) {
			t.Errorf("error %v", err)
		}
	})
}

// silent is a Resolver that never knows anything.
type silent struct{}

func (silent) Watch(ctx context.Context, _ string) iter.Seq2[sheaf.View, error] {
	return func(func(sheaf.View, error) bool) { <-ctx.Done() }
}

func TestScatterEnds(t *testing.T) {
	t.Parallel()
	bubble(t, "with the error of the input", func(t *testing.T) {
		broken := errors.New("broken")
		r := &route{}
		blocks := sheaf.SplitLines(io.MultiReader(strings.NewReader("a\nb\nc\n"), readerFunc(func([]byte) (int, error) {
			time.Sleep(time.Second)
			return 0, broken
		})), 2)
		results, err := drain(t, (&sheaf.Group{Route: by(t, r), Resolver: ready(1)}).Scatter(t.Context(), blocks))
		if !errors.Is(err, broken) || len(results) != 2 || r.running.Load() != 0 {
			t.Errorf("%d results, error %v, %d calls run", len(results), err, r.running.Load())
		}
	})
	bubble(t, "with the cause of the context", func(t *testing.T) {
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		r := &route{f: func(ctx context.Context, _ *sheaf.Request) (*sheaf.Reply, error) { return hang(ctx) }}
		begun := time.Now()
		_, err := drain(t, (&sheaf.Group{Route: by(t, r), Resolver: ready(1)}).Scatter(ctx, words(3)))
		if !errors.Is(err, cause) || time.Since(begun) != time.Second || r.running.Load() != 0 {
			t.Errorf("after %v: error %v, %d calls run", time.Since(begun), err, r.running.Load())
		}
	})
	bubble(t, "when the loop is left", func(t *testing.T) {
		r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Index == 0 {
				time.Sleep(time.Second)
				return nil, nil
			}
			<-ctx.Done()
			time.Sleep(time.Second) // to come home
			return nil, ctx.Err()
		}}
		begun := time.Now()
		for range (&sheaf.Group{Route: by(t, r), Resolver: ready(4)}).Scatter(t.Context(), words(100)) {
			break
		}
		if took := time.Since(begun); took != 2*time.Second || r.running.Load() != 0 {
			t.Errorf("left after %v with %d calls that run", took, r.running.Load())
		}
	})
	bubble(t, "when a read hangs, with the error before the wait", func(t *testing.T) {
		in, out := io.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for _, err := range (&sheaf.Group{Route: by(t, &route{}), Resolver: ready(1)}).Scatter(ctx, sheaf.SplitLines(in, 10)) {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
			_ = out.Close()
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestScatterHolds(t *testing.T) {
	t.Parallel()
	// A consumer that takes a result now and then: what was read and has no
	// result yet must never be more than the limits allow, and the one block
	// whose result is on its way to the consumer.
	for _, test := range []struct {
		name  string
		group sheaf.Group
		most  int // blocks of 7 bytes
	}{
		{"by default", sheaf.Group{Resolver: ready(100)}, sheaf.DefaultLimit},
		{"Limit", sheaf.Group{Resolver: ready(100), Limit: 10}, 10},
		{"Limit without a view", sheaf.Group{Limit: 10}, 10},
		{"LimitBytes", sheaf.Group{Resolver: ready(100), LimitBytes: 70}, 10},
		{"less than a block", sheaf.Group{Resolver: ready(100), LimitBytes: 1}, 1},
		{"two for each replica, or eight", sheaf.Group{Resolver: ready(1)}, 8},
	} {
		bubble(t, test.name, func(t *testing.T) {
			var read, taken atomic.Int64
			most := int64(0)
			blocks := func(yield func(sheaf.Block, error) bool) {
				for range 300 {
					most = max(most, read.Add(1)-taken.Load())
					if !yield(sheaf.Block{Data: []byte("7 bytes")}, nil) {
						return
					}
				}
			}
			g := test.group
			g.Route = by(t, &route{})
			for r, err := range g.Scatter(t.Context(), blocks) {
				if err != nil {
					t.Fatal(err)
				}
				taken.Add(1)
				if r.Index%20 == 0 {
					time.Sleep(time.Hour)
				}
			}
			least := min(test.most, 16) - 1 // less would leave replicas without work
			if taken.Load() != 300 || most > int64(test.most)+1 || most < int64(least) {
				t.Errorf("%d results; %d blocks were held, want %d to %d", taken.Load(), most, least, test.most+1)
			}
		})
	}
	bubble(t, "a block that is stuck stops the reading after 4 × Limit", func(t *testing.T) {
		var read atomic.Int64
		blocks := func(yield func(sheaf.Block, error) bool) {
			for read.Add(1) <= 300 {
				if !yield(sheaf.Block{Data: []byte("x")}, nil) {
					return
				}
			}
		}
		r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Index == 0 {
				time.Sleep(10 * time.Second)
				if n := read.Load(); n != 40 {
					t.Errorf("%d blocks were read, want 40", n)
				}
			}
			return nil, nil
		}}
		g := sheaf.Group{Route: by(t, r), Resolver: ready(3), Limit: 10, NoHedge: true}
		if results, err := drain(t, g.Scatter(t.Context(), blocks)); err != nil || len(results) != 300 {
			t.Errorf("%d results, error %v", len(results), err)
		}
	})
}

func BenchmarkScatter(b *testing.B) {
	r := sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
		return &sheaf.Reply{From: req.To.ID}, nil
	})
	g := sheaf.Group{Route: by(b, r), Resolver: ready(16)}
	b.ReportAllocs()
	for b.Loop() {
		for _, err := range g.Scatter(b.Context(), words(1000)) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

// A scatter that waits holds nothing of what it has yielded: neither the block
// nor its result.
func TestScatterLetsGo(t *testing.T) {
	const size = 1 << 20
	freed := make(chan string, 2)
	watched := func(what string) []byte {
		b := make([]byte, size)
		runtime.AddCleanup(&b[0], func(s string) { freed <- s }, what)
		return b
	}
	blocks := func(yield func(sheaf.Block, error) bool) {
		_ = yield(sheaf.Block{Data: watched("the block")}, nil) && yield(sheaf.Block{}, nil)
	}
	begun := make(chan struct{})
	route := sheaf.RouteFunc(func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
		if req.Index == 0 {
			<-begun // so that what follows is all there
			return &sheaf.Reply{Body: watched("the result")}, nil
		}
		close(begun)
		for range 2 {
			for what := ""; what == ""; {
				runtime.GC()
				select {
				case what = <-freed:
				case <-ctx.Done():
					return nil, ctx.Err()
				case <-time.After(10 * time.Millisecond):
				}
			}
		}
		return &sheaf.Reply{}, nil
	})
	g := sheaf.Group{Function: "f", Route: route, Resolver: ready(2), NoHedge: true, Attempts: 1, Timeout: 20 * time.Second}
	n := 0
	for r, err := range g.Scatter(t.Context(), blocks) {
		if err != nil {
			t.Fatalf("after %d results: %v", n, err)
		}
		n += 1 + len(r.Data)
	}
	if n != 2+size {
		t.Errorf("got %d", n)
	}
}

// A scatter sleeps while a call whose time is over takes long to end.
func TestScatterWaitsForLateEnds(t *testing.T) {
	t.Parallel()
	bubble(t, "late", func(t *testing.T) {
		r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Attempt > 1 {
				return nil, nil
			}
			reply, err := hang(ctx)
			time.Sleep(time.Second)
			return reply, err
		}}
		g := sheaf.Group{Route: by(t, r), Resolver: ready(2), Timeout: time.Second, NoHedge: true}
		if results, err := drain(t, g.Scatter(t.Context(), words(1))); err != nil || len(results) != 1 {
			t.Errorf("%d results, %v", len(results), err)
		}
	})
}
