package job_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/job"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// broker is a NATS server in this process that can be stopped and started.
type broker struct {
	*server.Server
	dir  string
	port int
	most int64
}

func newBroker(t *testing.T) *broker {
	t.Helper()
	b := &broker{dir: t.TempDir(), port: -1}
	b.start(t)
	t.Cleanup(func() { b.stop() })
	return b
}

func (b *broker) start(t *testing.T) {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: b.port, JetStream: true, StoreDir: b.dir, JetStreamMaxStore: b.most, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("NATS is not ready")
	}
	b.Server = s
	b.port = s.Addr().(*net.TCPAddr).Port
}

func (b *broker) stop() {
	b.Shutdown()
	b.WaitForShutdown()
}

// store opens a store as a master of its own does.
func (b *broker) store(t *testing.T, master string, change ...func(*job.Config)) *job.Store {
	t.Helper()
	nc, err := nats.Connect(b.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	cfg := job.Config{Function: "master", Master: master, Lease: 300 * time.Millisecond, StoreBytes: 64 << 20, InputBytes: 64 << 20, Log: quiet}
	for _, f := range change {
		f(&cfg)
	}
	s, err := job.Open(nc, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// run runs jobs until the function that it returns is called, or the test ends.
func run(t *testing.T, s *job.Store, work func(context.Context, *job.Lease)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.Run(ctx, work) })
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

// submit stores a job of the given input.
func submit(t *testing.T, s *job.Store, id, input string) job.Record {
	t.Helper()
	r, _, err := trySubmit(t.Context(), s, id, input)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func trySubmit(ctx context.Context, s *job.Store, id, input string) (job.Record, bool, error) {
	u, err := s.Upload(ctx, id, fmt.Sprintf("u%d", rand.Uint64()))
	if err != nil {
		return job.Record{}, false, err
	}
	defer u.Abort()
	if _, err := io.WriteString(u, input); err != nil {
		return job.Record{}, false, err
	}
	return u.Submit(ctx, job.Record{Spec: []byte(`{}`), Digest: "d" + input[:min(9, len(input))], Input: job.Input{Bytes: u.Bytes(), Blocks: 3}})
}

// eventually waits for a condition that is sure to come.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begun := time.Now(); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("after 20 s: %s", what)
		}
	}
}

func state(t *testing.T, s *job.Store, id string, want job.State) job.Record {
	t.Helper()
	var r job.Record
	eventually(t, fmt.Sprintf("job %s is not %s", id, want), func() bool {
		var err error
		r, err = s.Get(t.Context(), id)
		return err == nil && r.State == want
	})
	return r
}

// block is the result that a test's block has.
func block(i int) sheaf.Result {
	return sheaf.Result{Index: i, Data: fmt.Appendf(nil, "result of %d", i), From: "w", Attempts: 1, Elapsed: time.Millisecond, Bytes: 7, Offset: int64(7 * i), Verified: true}
}

func TestJob(t *testing.T) {
	b := newBroker(t)
	s := b.store(t, "a")
	big := strings.Repeat("0123456789abcdef", 100_000) // 1.6 MB: 4 pieces
	long := sheaf.Result{Index: 2, Data: bytes.Repeat([]byte("long\n"), 300_000), From: "w2"}
	run(t, s, func(ctx context.Context, l *job.Lease) {
		r := l.Record()
		got, err := io.ReadAll(s.Input(ctx, r))
		if err != nil || string(got) != big {
			t.Errorf("input is %d bytes, %v", len(got), err)
		}
		for _, r := range []sheaf.Result{block(1), long, block(0)} {
			l.Commit(ctx, r, func() {})
		}
		l.Progress(ctx, job.Progress{Total: 3, Done: 2, Running: 1})
		l.Wait()
		if err := l.Keep(ctx, []byte("kept")); err != nil {
			t.Error(err)
		}
		if err := l.End(ctx, func(r *job.Record) {
			r.State, r.Progress = job.Succeeded, &job.Progress{Total: 3, Done: 3}
		}); err != nil {
			t.Error(err)
		}
	})
	first := submit(t, s, "one", big)
	if first.State != job.Queued || first.Created.IsZero() || first.Revision == 0 {
		t.Errorf("submitted %+v", first)
	}
	r := state(t, b.store(t, "other"), "one", job.Succeeded)
	if r.Epoch != 1 || r.Owner != "a" || r.Expires.Sub(r.Finished) != 24*time.Hour || r.Progress.Done != 3 {
		t.Errorf("ended %+v", r)
	}
	done, err := s.Done(t.Context(), "one")
	if err != nil || !slices.Equal(done, []int{0, 1, 2}) {
		t.Errorf("done %v, %v", done, err)
	}
	want := []sheaf.Result{block(0), block(1), long}
	n := 0
	for got, err := range s.Results(t.Context(), "one", done) {
		if err != nil {
			t.Fatal(err)
		}
		if w := want[n]; !bytes.Equal(got.Data, w.Data) || got.Index != w.Index || got.From != w.From || got.Elapsed != w.Elapsed || got.Offset != w.Offset || got.Bytes != w.Bytes {
			t.Errorf("result %d is %.80v", n, got)
		}
		n++
	}
	if kept, err := s.Kept(t.Context(), "one"); err != nil || string(kept) != "kept" || n != 3 {
		t.Errorf("kept %q, %v; %d results", kept, err, n)
	}
	if _, err := s.Get(t.Context(), "two"); !errors.Is(err, job.ErrNotFound) {
		t.Errorf("another job is %v", err)
	}
	list, err := s.List(t.Context())
	if err != nil || len(list) != 1 || list[0].ID != "one" {
		t.Errorf("list is %v, %v", list, err)
	}
}

// Faults 11 and 75, bad inputs 53 and 54: of many that are sent at once under
// one ID one job comes to be, and one run.
func TestOneOfManySubmits(t *testing.T) {
	b := newBroker(t)
	var runs atomic.Int32
	stores := []*job.Store{b.store(t, "a"), b.store(t, "b"), b.store(t, "c")}
	for _, s := range stores {
		run(t, s, func(ctx context.Context, l *job.Lease) {
			runs.Add(1)
			if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
				t.Error(err)
			}
		})
	}
	var wg sync.WaitGroup
	var created, existed, conflicts atomic.Int32
	for i := range 30 {
		wg.Go(func() {
			input := "same"
			if i%3 == 2 {
				input = "other"
			}
			r, was, err := trySubmit(t.Context(), stores[i%3], "id", input)
			switch {
			case errors.Is(err, job.ErrConflict):
				conflicts.Add(1)
			case err != nil || r.ID != "id":
				t.Errorf("%+v, %v", r, err)
			case was:
				existed.Add(1)
			default:
				created.Add(1)
			}
		})
	}
	wg.Wait()
	if c, e, x := created.Load(), existed.Load(), conflicts.Load(); c != 1 || c+e+x != 30 || x != 10 && x != 20 {
		t.Errorf("%d created, %d existed, %d conflicts", c, e, x)
	}
	state(t, stores[0], "id", job.Succeeded)
	if n := runs.Load(); n != 1 {
		t.Errorf("%d runs", n)
	}
}

// Fault 6: a master that was stopped past its lease finds its job taken, and
// writes nothing.
func TestFence(t *testing.T) {
	b := newBroker(t)
	claimed, goOn, late := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	old := b.store(t, "old")
	oldRun, stopOld := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		old.Run(oldRun, func(ctx context.Context, l *job.Lease) {
			l.Commit(ctx, block(0), func() {})
			l.Wait()
			close(claimed)
			<-goOn
			other := context.WithoutCancel(ctx) // as one that was stopped and has not heard
			l.Commit(other, block(1), func() { t.Error("a result was stored under an old epoch") })
			l.Wait()
			if err := l.Keep(other, []byte("x")); !errors.Is(err, job.ErrFenced) {
				t.Errorf("keep: %v", err)
			}
			late <- l.End(other, func(r *job.Record) { r.State = job.Failed })
		})
	})
	t.Cleanup(func() { stopOld(); wg.Wait() })
	submit(t, old, "j", "input")
	<-claimed
	// Nobody hears the old one any more: it is another's turn.
	deaf := b.store(t, "new", func(c *job.Config) { c.Lease = time.Millisecond })
	run(t, deaf, func(ctx context.Context, l *job.Lease) {
		if r := l.Record(); r.Epoch != 2 || r.Owner != "new" {
			t.Errorf("claimed %+v", r)
		}
		done, err := deaf.Done(ctx, "j")
		if err != nil || !slices.Equal(done, []int{0}) {
			t.Errorf("found %v, %v", done, err)
		}
		goOn <- struct{}{}
		if err := <-late; !errors.Is(err, job.ErrFenced) {
			t.Errorf("the old one ended the job: %v", err)
		}
		l.Commit(ctx, block(1), func() {})
		l.Wait()
		if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
			t.Error(err)
		}
	})
	r := state(t, old, "j", job.Succeeded)
	if r.Epoch != 2 || r.Owner != "new" {
		t.Errorf("ended %+v", r)
	}
}

// A cancelled job's run ends at once, wherever it was cancelled.
func TestCancel(t *testing.T) {
	b := newBroker(t)
	s, other := b.store(t, "a"), b.store(t, "b")
	running, ended := make(chan struct{}), make(chan time.Time, 1)
	run(t, s, func(ctx context.Context, l *job.Lease) {
		close(running)
		<-ctx.Done()
		ended <- time.Now()
		if !errors.Is(context.Cause(ctx), job.ErrFenced) {
			t.Errorf("cause is %v", context.Cause(ctx))
		}
	})
	submit(t, s, "j", "input")
	<-running
	begun := time.Now()
	r, err := other.Cancel(t.Context(), "j")
	if err != nil || r.State != job.Cancelled || r.Progress.Stopped != 3 {
		t.Errorf("%+v, %v", r, err)
	}
	took := (<-ended).Sub(begun)
	t.Logf("the run ended after %v", took)
	if took > 5*time.Second {
		t.Errorf("the run ended after %v", took)
	}
	if again, err := s.Cancel(t.Context(), "j"); err != nil || again.Revision != r.Revision {
		t.Errorf("again: %+v, %v", again, err)
	}
	if _, err := s.Cancel(t.Context(), "none"); !errors.Is(err, job.ErrNotFound) {
		t.Errorf("no job: %v", err)
	}
	if _, err := s.Redrive(t.Context(), "j"); !errors.Is(err, job.ErrState) {
		t.Errorf("redriven: %v", err)
	}
}

// Fault 51: whatever the order, a job has one final state.
func TestCancelRacesEnd(t *testing.T) {
	b := newBroker(t)
	s, other := b.store(t, "a"), b.store(t, "b")
	var succeeded, cancelled int
	for i := range 40 {
		id := fmt.Sprintf("j%d", i)
		seen := map[job.State]bool{}
		var mu sync.Mutex
		note := func(st job.State) { mu.Lock(); seen[st] = true; mu.Unlock() }
		gate := make(chan struct{})
		stop := run(t, s, func(ctx context.Context, l *job.Lease) {
			<-gate
			if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err == nil {
				note(job.Succeeded)
			} else if !errors.Is(err, job.ErrFenced) && ctx.Err() == nil {
				t.Error(err)
			}
		})
		submit(t, s, id, "input")
		state(t, s, id, job.Running)
		var wg sync.WaitGroup
		wg.Go(func() {
			if r, err := other.Cancel(t.Context(), id); err != nil {
				t.Error(err)
			} else {
				note(r.State)
			}
		})
		close(gate)
		wg.Wait()
		stop()
		r, err := other.Get(t.Context(), id)
		if err != nil || !r.State.Final() || len(seen) != 1 || !seen[r.State] {
			t.Fatalf("job %s is %s, %v; seen were %v", id, r.State, err, seen)
		}
		if r.State == job.Succeeded {
			succeeded++
		} else {
			cancelled++
		}
	}
	t.Logf("%d succeeded, %d were cancelled", succeeded, cancelled)
}

// A redriven job keeps what it has, and runs under another epoch.
func TestRedrive(t *testing.T) {
	b := newBroker(t)
	s := b.store(t, "a")
	run(t, s, func(ctx context.Context, l *job.Lease) {
		if l.Record().Redrives == 0 {
			l.Commit(ctx, block(0), func() {})
			l.Commit(ctx, block(2), func() {})
			if err := l.End(ctx, func(r *job.Record) { r.State, r.Error = job.Failed, []byte(`{"status":424}`) }); err != nil {
				t.Error(err)
			}
			return
		}
		if done, err := s.Done(ctx, "j"); err != nil || !slices.Equal(done, []int{0, 2}) {
			t.Errorf("found %v, %v", done, err)
		}
		if in, err := io.ReadAll(s.Input(ctx, l.Record())); err != nil || string(in) != "input" {
			t.Errorf("input is %q, %v", in, err)
		}
		l.Commit(ctx, block(1), func() {})
		if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
			t.Error(err)
		}
	})
	submit(t, s, "j", "input")
	if r := state(t, s, "j", job.Failed); string(r.Error) != `{"status":424}` {
		t.Errorf("failed with %s", r.Error)
	}
	if r, err := s.Redrive(t.Context(), "j"); err != nil || r.State != job.Queued || r.Redrives != 1 || r.Error != nil {
		t.Errorf("redriven %+v, %v", r, err)
	}
	if r := state(t, s, "j", job.Succeeded); r.Epoch != 2 || r.Redrives != 1 {
		t.Errorf("ended %+v", r)
	}
	if _, err := s.Redrive(t.Context(), "j"); !errors.Is(err, job.ErrState) {
		t.Errorf("redriven again: %v", err)
	}
}

// A master that ends hands its jobs over, without a wait for its silence.
func TestHandOver(t *testing.T) {
	b := newBroker(t)
	day := func(c *job.Config) { c.Lease = 24 * time.Hour }
	a, other := b.store(t, "a", day), b.store(t, "b", day)
	claimed := make(chan struct{})
	stop := run(t, a, func(ctx context.Context, l *job.Lease) { close(claimed); <-ctx.Done() })
	submit(t, a, "j", "input")
	<-claimed
	stop()
	run(t, other, func(ctx context.Context, l *job.Lease) {
		if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
			t.Error(err)
		}
	})
	if r := state(t, other, "j", job.Succeeded); r.Owner != "b" || r.Epoch != 2 {
		t.Errorf("ended %+v", r)
	}
}

// Fault 31: NATS goes and comes back; what was stored is there, and a run goes
// on. Meanwhile nothing is accepted.
func TestNATSRestarts(t *testing.T) {
	b := newBroker(t)
	s := b.store(t, "a", func(c *job.Config) { c.Lease = time.Minute })
	half, goOn := make(chan struct{}), make(chan struct{})
	run(t, s, func(ctx context.Context, l *job.Lease) {
		l.Commit(ctx, block(0), func() {})
		l.Wait()
		close(half)
		<-goOn
		for i := range 2 { // stored when NATS is back
			l.Commit(ctx, block(1+i), func() {})
		}
		l.Wait()
		if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
			t.Error(err)
		}
	})
	submit(t, s, "j", "input")
	<-half
	b.stop()
	eventually(t, "the loss of NATS is not noticed", func() bool { return !s.Ready() })
	if _, _, err := trySubmit(t.Context(), s, "k", "input"); !errors.Is(err, job.ErrAway) {
		t.Errorf("without NATS: %v", err)
	}
	if _, err := s.Get(t.Context(), "j"); !errors.Is(err, job.ErrAway) {
		t.Errorf("without NATS: %v", err)
	}
	close(goOn)
	time.Sleep(100 * time.Millisecond) // the commits have begun
	b.start(t)
	if r := state(t, s, "j", job.Succeeded); r.Epoch != 1 {
		t.Errorf("ended %+v", r)
	}
	if done, err := s.Done(t.Context(), "j"); err != nil || len(done) != 3 {
		t.Errorf("done %v, %v", done, err)
	}
}

func TestLimits(t *testing.T) {
	b := newBroker(t)
	b.most = 4 << 20
	b.stop()
	b.start(t)
	s := b.store(t, "a", func(c *job.Config) { c.MaxQueued, c.StoreBytes, c.InputBytes = 2, 1<<20, 2<<20 })
	submit(t, s, "one", strings.Repeat("x", 600<<10))
	if _, _, err := trySubmit(t.Context(), s, "big", strings.Repeat("y", 8<<20)); !errors.Is(err, job.ErrFull) {
		t.Errorf("too much for the store: %v", err)
	}
	submit(t, s, "two", "input") // what was refused is not left behind
	if _, _, err := trySubmit(t.Context(), s, "three", "input"); !errors.Is(err, job.ErrTooMany) {
		t.Errorf("too many: %v", err)
	}
}

// What is expired is dropped, in two steps: the results, then the record; the
// ID can then be used again.
func TestExpiry(t *testing.T) {
	b := newBroker(t)
	s := b.store(t, "a", func(c *job.Config) { c.ResultTTL = 50 * time.Millisecond })
	run(t, s, func(ctx context.Context, l *job.Lease) {
		l.Commit(ctx, block(0), func() {})
		if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
			t.Error(err)
		}
	})
	submit(t, s, "j", "input")
	state(t, s, "j", job.Succeeded)
	eventually(t, "results are there", func() bool { done, err := s.Done(t.Context(), "j"); return err == nil && len(done) == 0 })
	if r, err := s.Get(t.Context(), "j"); err != nil || r.State != job.Succeeded || time.Now().Before(r.Expires) {
		t.Errorf("%+v, %v", r, err)
	}
	for _, err := range s.Results(t.Context(), "j", []int{0}) {
		if !errors.Is(err, job.ErrDamaged) {
			t.Errorf("a result that is gone: %v", err)
		}
	}
}

// The whole under fire: masters that come, stall past their lease and go, and
// each block is committed once.
func TestMastersComeAndGo(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	const blocks, jobs = 60, 3
	b := newBroker(t)
	watch := b.store(t, "watch")
	var mu sync.Mutex
	commits := map[string]int{}
	var stops []func()
	start := func(n int) {
		name, stall := fmt.Sprintf("m%d", n), time.Duration(rnd.IntN(150))*time.Millisecond
		at := int64(rnd.IntN(30))
		var steps atomic.Int64
		s := b.store(t, name, func(c *job.Config) {
			c.Lease = 60 * time.Millisecond
			c.Step = func(string) {
				if steps.Add(1)%30 == at {
					time.Sleep(stall)
				}
			}
		})
		stops = append(stops, run(t, s, func(ctx context.Context, l *job.Lease) {
			id := l.Record().ID
			done, err := s.Done(ctx, id)
			for i := range blocks {
				if err != nil || ctx.Err() != nil {
					return
				}
				if _, has := slices.BinarySearch(done, i); has {
					continue
				}
				l.Commit(ctx, block(i), func() {
					mu.Lock()
					commits[fmt.Sprintf("%s.%d", id, i)]++
					mu.Unlock()
				})
				time.Sleep(time.Millisecond)
			}
			l.Wait()
			if done, err = s.Done(ctx, id); err != nil || ctx.Err() != nil {
				return
			}
			if len(done) != blocks {
				t.Errorf("job %s has %d blocks", id, len(done))
			}
			_ = l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }) // or another one does
		}))
	}
	for n := range 3 {
		start(n)
	}
	for i := range jobs {
		submit(t, watch, fmt.Sprintf("j%d", i), "input")
	}
	for n := 3; n < 9; n++ {
		time.Sleep(time.Duration(rnd.IntN(80)) * time.Millisecond)
		stops[n-3]()
		start(n)
	}
	epochs := 0
	for i := range jobs {
		epochs += state(t, watch, fmt.Sprintf("j%d", i), job.Succeeded).Epoch
	}
	mu.Lock()
	defer mu.Unlock()
	for key, n := range commits {
		if n != 1 {
			t.Errorf("block %s was committed %d times (seed %d)", key, n, seed)
		}
	}
	t.Logf("%d jobs of %d blocks under %d epochs", jobs, blocks, epochs)
}

// A job that each of its masters leaves as it is says so to the next.
func TestDeaths(t *testing.T) {
	b := newBroker(t)
	s := b.store(t, "a", func(c *job.Config) { c.Lease = 20 * time.Millisecond })
	var seen []int
	run(t, s, func(ctx context.Context, l *job.Lease) {
		r := l.Record()
		seen = append(seen, r.Deaths)
		switch r.Epoch {
		case 3: // a block more than before
			l.Commit(ctx, block(0), func() {})
			l.Wait()
			l.Progress(ctx, job.Progress{Total: 3, Done: 1, Queued: 2})
			eventually(t, "progress is not seen", func() bool { _, p, _, _ := s.Known("j"); return p.Done == 1 })
		case 6:
			if err := l.End(ctx, func(r *job.Record) { r.State = job.Succeeded }); err != nil {
				t.Error(err)
			}
		}
	})
	submit(t, s, "j", "input")
	state(t, s, "j", job.Succeeded)
	if want := []int{0, 1, 2, 1, 2, 3}; !slices.Equal(seen, want) {
		t.Errorf("deaths were %v, want %v", seen, want)
	}
}
