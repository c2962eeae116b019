package sheaf_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sheaf-project/sheaf"
)

// heard is what came back from a broadcast: a word for each rank.
type heard map[int]string

// listen takes a broadcast to its end. Each rank becomes its answer, or
// "gone", or "failed after n".
func listen(t *testing.T, g *sheaf.Group) (heard, error) {
	t.Helper()
	got := heard{}
	for r, err := range g.Broadcast(t.Context(), []byte("hi")) {
		var re *sheaf.RankError
		rank := r.Index
		word := string(r.Data) + " from " + r.From
		switch {
		case errors.As(err, &re):
			rank = re.Rank
			word = fmt.Sprint("failed after ", re.Attempts)
			if errors.Is(err, sheaf.ErrReplicaGone) {
				word = "gone"
			}
			if named := fmt.Sprintf("rank %d (replica %s)", re.Rank, re.Replica); !strings.Contains(err.Error(), named) {
				t.Errorf("error %q does not name %s", err, named)
			}
		case err != nil:
			return got, err
		}
		if _, twice := got[rank]; twice {
			t.Errorf("rank %d is heard twice", rank)
		}
		got[rank] = word
	}
	return got, nil
}

func TestBroadcast(t *testing.T) {
	t.Parallel()
	all := heard{0: "HI from r0", 1: "HI from r1", 2: "HI from r2"}
	at := func(f func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error)) *route {
		return &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Rank == 1 {
				return f(ctx, req)
			}
			return nil, nil
		}}
	}
	for _, test := range []struct {
		name  string
		rank1 error // of each attempt at it, as long as attempts says
		times int
		want  string // of rank 1
	}{
		{"all answer", nil, 0, "HI from r1"},
		{"one task failure", fault(sheaf.FaultTask), 1, "HI from r1"},
		{"task failures", fault(sheaf.FaultTask), 9, "failed after 3"},
		{"rejected", fault(sheaf.FaultRejected), 9, "failed after 1"},
		{"refused is gone", fault(sheaf.FaultRefused), 1, "gone"},
		{"lost once", fault(sheaf.FaultLost), 1, "HI from r1"},
		{"lost", io.ErrUnexpectedEOF, 9, "failed after 3"},
		{"busy for long", fault(sheaf.FaultThrottled), 20, "HI from r1"},
	} {
		bubble(t, test.name, func(t *testing.T) {
			g := &sheaf.Group{Function: "f", Resolver: ready(3), Route: at(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				if req.Size != 3 || req.Epoch != 1 || req.Index != 1 || req.To.ID != "r1" || req.Function != "f" {
					t.Errorf("request %+v", req)
				}
				if req.Attempt <= test.times {
					return nil, test.rank1
				}
				return nil, nil
			})}
			want := maps.Clone(all)
			want[1] = test.want
			if got, err := listen(t, g); err != nil || !maps.Equal(got, want) {
				t.Errorf("heard %v, error %v, want %v", got, err, want)
			}
		})
	}
	bubble(t, "one at a time", func(t *testing.T) {
		g := &sheaf.Group{Resolver: ready(3), Limit: 1}
		g.Route = &route{f: func(context.Context, *sheaf.Request) (*sheaf.Reply, error) {
			if n := g.Route.(*route).running.Load(); n != 1 {
				t.Errorf("%d calls at once", n)
			}
			time.Sleep(time.Second)
			return nil, nil
		}}
		if got, err := listen(t, g); err != nil || !maps.Equal(got, all) {
			t.Errorf("heard %v, error %v", got, err)
		}
	})
	bubble(t, "unverified", func(t *testing.T) {
		g := &sheaf.Group{Resolver: ready(1), Verified: true, Route: sheaf.RouteFunc(func(context.Context, *sheaf.Request) (*sheaf.Reply, error) {
			return &sheaf.Reply{}, nil
		})}
		if got, err := listen(t, g); err != nil || got[0] != "failed after 1" {
			t.Errorf("heard %v, error %v", got, err)
		}
	})
}

func TestBroadcastMembership(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{0, 1} { // with limit 1 the others wait for their turn behind a
		bubble(t, fmt.Sprintf("one leaves and one joins, limit %d", limit), func(t *testing.T) {
			v := newViews()
			v.set("a", "b", "c")
			r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				switch req.To.ID {
				case "b":
					return hang(ctx)
				case "d":
					t.Error("a replica that joined later is called")
				case "a":
					time.Sleep(10 * time.Second)
				}
				return nil, nil
			}}
			begun := time.Now()
			go func() {
				time.Sleep(3 * time.Second)
				v.set("a", "c", "d")
			}()
			g := &sheaf.Group{Route: r, Resolver: v, Limit: limit}
			got, left := heard{}, time.Duration(0)
			for r, err := range g.Broadcast(t.Context(), []byte("hi")) {
				if errors.Is(err, sheaf.ErrReplicaGone) {
					left = time.Since(begun)
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				got[r.Index] = r.From
			}
			if want := (heard{0: "a", 2: "c"}); !maps.Equal(got, want) {
				t.Errorf("heard %v, want %v", got, want)
			}
			if left != 3*time.Second {
				t.Errorf("the rank that left is told after %v, want it at once", left)
			}
			// With limit 1 the one that hangs may have had its turn before a.
			if took := time.Since(begun); took != 10*time.Second && (limit == 0 || took != 13*time.Second) {
				t.Errorf("took %v: membership ends a broadcast, not a timer", took)
			}
		})
	}
	bubble(t, "all leave", func(t *testing.T) {
		v := newViews()
		v.set("a", "b")
		r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			v.set()
			return hang(ctx)
		}}
		got, err := listen(t, &sheaf.Group{Route: r, Resolver: v})
		if want := (heard{0: "gone", 1: "gone"}); err != nil || !maps.Equal(got, want) {
			t.Errorf("heard %v, error %v", got, err)
		}
	})
	bubble(t, "waits for the first replica", func(t *testing.T) {
		v := newViews()
		v.set()
		go func() {
			time.Sleep(time.Second)
			v.set("a")
		}()
		if got, err := listen(t, &sheaf.Group{Route: &route{}, Resolver: v}); err != nil || len(got) != 1 {
			t.Errorf("heard %v, error %v", got, err)
		}
	})
	bubble(t, "busy while it leaves", func(t *testing.T) {
		v := newViews()
		v.set("a")
		r := &route{f: func(context.Context, *sheaf.Request) (*sheaf.Reply, error) {
			return nil, &sheaf.CallError{Fault: sheaf.FaultThrottled, RetryAfter: time.Hour, Err: io.EOF}
		}}
		begun := time.Now()
		time.AfterFunc(time.Second, func() { v.set("b") })
		got, err := listen(t, &sheaf.Group{Route: r, Resolver: v})
		if err != nil || got[0] != "gone" || time.Since(begun) != time.Second {
			t.Errorf("after %v: heard %v, error %v", time.Since(begun), got, err)
		}
	})
}

func TestBroadcastEnds(t *testing.T) {
	t.Parallel()
	unknown := newViews()
	unknown.fail(sheaf.ErrNoFunction)
	for _, test := range []struct {
		name  string
		group sheaf.Group
		want  error
	}{
		{"without a resolver", sheaf.Group{Route: &route{}}, sheaf.ErrNotAddressable},
		{"without a replica", sheaf.Group{Route: &route{}, Resolver: ready(0)}, sheaf.ErrNoReplica},
		{"without a view", sheaf.Group{Route: &route{}, Resolver: silent{}}, sheaf.ErrNoReplica},
		{"without a function", sheaf.Group{Route: &route{}, Resolver: unknown}, sheaf.ErrNoFunction},
		{"on a route that cannot", sheaf.Group{Resolver: ready(3), Route: sheaf.RouteFunc(
			func(context.Context, *sheaf.Request) (*sheaf.Reply, error) { return nil, sheaf.ErrNotAddressable },
		)}, sheaf.ErrNotAddressable},
	} {
		// The resolver that fails was made outside of a bubble; it needs no clock.
		run := func(t *testing.T) {
			got, err := listen(t, &test.group)
			if !errors.Is(err, test.want) || len(got) != 0 {
				t.Errorf("broadcast: heard %v, error %v, want %v", got, err, test.want)
			}
			if _, err := test.group.Send(t.Context(), 0, nil); !errors.Is(err, test.want) {
				t.Errorf("send: error %v, want %v", err, test.want)
			}
		}
		if test.group.Resolver == unknown {
			t.Run(test.name, run)
		} else {
			bubble(t, test.name, run)
		}
	}
	hanging := func() *route {
		return &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Rank == 0 {
				return nil, nil
			}
			return hang(ctx)
		}}
	}
	bubble(t, "when the loop is left", func(t *testing.T) {
		r := hanging()
		for range (&sheaf.Group{Route: r, Resolver: ready(5)}).Broadcast(t.Context(), nil) {
			break
		}
		if n := r.running.Load(); n != 0 {
			t.Errorf("%d calls run", n)
		}
	})
	bubble(t, "with the cause of the context", func(t *testing.T) {
		r, cause := hanging(), errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		var last error
		for _, err := range (&sheaf.Group{Route: r, Resolver: ready(5)}).Broadcast(ctx, nil) {
			last = err
		}
		if n := r.running.Load(); n != 0 || !errors.Is(last, cause) {
			t.Errorf("%d calls run, error %v", n, last)
		}
	})
}

func TestSend(t *testing.T) {
	t.Parallel()
	t.Run("to its rank only", func(t *testing.T) {
		t.Parallel()
		for rank := range 3 {
			var called []string
			r := &route{f: func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
				called = append(called, req.To.ID)
				return nil, nil
			}}
			got, err := (&sheaf.Group{Route: r, Resolver: ready(3)}).Send(t.Context(), rank, []byte("hi"))
			id := fmt.Sprint("r", rank)
			if err != nil || got.Index != rank || got.From != id || string(got.Data) != "HI" || got.Attempts != 1 || got.Bytes != 2 {
				t.Errorf("rank %d: result %+v, error %v", rank, got, err)
			}
			if !slices.Equal(called, []string{id}) {
				t.Errorf("rank %d: calls to %v", rank, called)
			}
		}
	})
	for _, rank := range []int{-1, 3} {
		t.Run(fmt.Sprint("no rank ", rank), func(t *testing.T) {
			t.Parallel()
			_, err := (&sheaf.Group{Route: &route{}, Resolver: ready(3)}).Send(t.Context(), rank, nil)
			if !errors.Is(err, sheaf.ErrNoRank) || !strings.Contains(err.Error(), fmt.Sprint(rank)) {
				t.Errorf("error %v", err)
			}
		})
	}
	bubble(t, "the replica leaves", func(t *testing.T) {
		v := newViews()
		v.set("a", "b")
		r := &route{f: func(ctx context.Context, _ *sheaf.Request) (*sheaf.Reply, error) { return hang(ctx) }}
		go func() {
			synctest.Wait()
			v.set("c", "a") // rank 1 is another replica now, and must not get it
		}()
		_, err := (&sheaf.Group{Route: r, Resolver: v}).Send(t.Context(), 1, nil)
		if !errors.Is(err, sheaf.ErrReplicaGone) {
			t.Errorf("error %v", err)
		}
	})
	bubble(t, "the handler fails", func(t *testing.T) {
		r := sheaf.RouteFunc(func(context.Context, *sheaf.Request) (*sheaf.Reply, error) { return nil, fault(sheaf.FaultTask) })
		_, err := (&sheaf.Group{Route: r, Resolver: ready(2)}).Send(t.Context(), 1, nil)
		var re *sheaf.RankError
		var ce *sheaf.CallError
		if !errors.As(err, &re) || re.Rank != 1 || re.Attempts != 3 || !errors.As(err, &ce) || ce.Fault != sheaf.FaultTask {
			t.Errorf("error %v", err)
		}
	})
}

func TestNewJob(t *testing.T) {
	t.Parallel()
	a, b := sheaf.NewJob(), sheaf.NewJob()
	if len(a) != 16 || strings.Trim(a, "0123456789abcdef") != "" || a == b {
		t.Errorf("jobs %q and %q", a, b)
	}
}

func TestJobNamesThatCannotTravel(t *testing.T) {
	t.Parallel()
	for _, job := range []string{strings.Repeat("x", 65), "a b", "a\r\nSheaf-To: b", "ä"} {
		g := &sheaf.Group{Function: "worker", Job: job, Route: sheaf.RouteFunc(func(context.Context, *sheaf.Request) (*sheaf.Reply, error) {
			t.Error("a request was sent")
			return nil, nil
		})}
		for _, err := range g.Scatter(t.Context(), sheaf.SplitLines(strings.NewReader("a\n"), 10)) {
			if err == nil || !strings.Contains(err.Error(), "printable ASCII") {
				t.Errorf("job %q: %v", job, err)
			}
		}
	}
}

func TestStaticKnowsReplicasByTheirURL(t *testing.T) {
	t.Parallel()
	static := sheaf.Static{{URL: "http://a"}, {URL: "http://b"}, {URL: "http://a"}, {ID: "c", URL: "http://a"}}
	for v, err := range static.Watch(t.Context(), "worker") {
		if err != nil || len(v.Replicas) != 3 || v.Desired != 3 || v.Replicas[1].ID != "http://b" || v.Replicas[2].ID != "c" {
			t.Errorf("view %+v, error %v", v, err)
		}
		break
	}
}

func TestScatterEndsWhenNothingCanBeAddressed(t *testing.T) {
	t.Parallel()
	calls := 0
	g := &sheaf.Group{Function: "worker", Resolver: sheaf.Static{{ID: "a"}}, PerReplica: 1,
		Route: sheaf.RouteFunc(func(context.Context, *sheaf.Request) (*sheaf.Reply, error) {
			calls++
			return nil, fmt.Errorf("no URL: %w", sheaf.ErrNotAddressable)
		})}
	for _, err := range g.Scatter(t.Context(), sheaf.SplitLines(strings.NewReader("a\n"), 10)) {
		if !errors.Is(err, sheaf.ErrNotAddressable) || calls != 1 {
			t.Errorf("after %d calls: %v", calls, err)
		}
	}
}

// Of the blocks that were read each has a result, is missing, or was stopped.
func TestPartialErrorAccountsForAllBlocks(t *testing.T) {
	t.Parallel()
	held := make(chan struct{})
	g := &sheaf.Group{Function: "worker", Resolver: sheaf.Static{{ID: "a"}, {ID: "b"}},
		Route: sheaf.RouteFunc(func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			switch req.Index {
			case 0: // under way when block 1 is refused
				close(held)
				<-ctx.Done()
				return nil, ctx.Err()
			case 1:
				<-held
				return nil, &sheaf.CallError{Fault: sheaf.FaultRejected, Err: errors.New("bad")}
			}
			return &sheaf.Reply{Body: req.Body, From: req.To.ID}, nil
		})}
	values, err := sheaf.Gather(g.Scatter(t.Context(), sheaf.SplitLines(strings.NewReader("a\nb\nc\nd\n"), 2)),
		func(b []byte) (string, error) { return string(b), nil })
	p, ok := errors.AsType[*sheaf.PartialError](err)
	if !ok || len(p.Missing) != 1 || p.Missing[0].Index != 1 || !slices.Contains(p.Stopped, 0) ||
		p.Total >= 0 && p.Done+len(p.Missing)+len(p.Stopped) != p.Total || len(values) < 2 {
		t.Errorf("values %q, error %+v", values, err)
	}
}
