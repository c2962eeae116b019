package registry_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/openfaas/faas-provider/types"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// broker is a NATS server in this process that can be stopped and started.
type broker struct {
	*server.Server
	dir  string
	port int
}

func newBroker(t *testing.T) *broker {
	t.Helper()
	b := &broker{dir: t.TempDir(), port: -1}
	b.start(t)
	u, err := url.Parse(b.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	if b.port, err = strconv.Atoi(u.Port()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.stop)
	return b
}

func (b *broker) start(t *testing.T) {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: b.port, JetStream: true, StoreDir: b.dir, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("NATS is not ready")
	}
	b.Server = s
}

func (b *broker) stop() {
	b.Shutdown()
	b.WaitForShutdown()
}

func (b *broker) connect(t *testing.T) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(b.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func (b *broker) open(t *testing.T) *registry.Registry {
	t.Helper()
	r, err := registry.Open(b.connect(t), quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// watch runs a watcher until the test, or the returned function, ends it. It
// must not end by itself.
func (b *broker) watch(t *testing.T, w *registry.Watcher) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	if w.Conn == nil {
		w.Conn = b.connect(t)
	}
	w.Log = quiet
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.Run(ctx); err != nil || ctx.Err() == nil {
			t.Errorf("the watcher ended: %v", err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return stop
}

// revision is the last revision of the bucket.
func (b *broker) revision(t *testing.T) uint64 {
	t.Helper()
	js, err := jetstream.New(b.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), "KV_"+registry.Bucket)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().State.LastSeq
}

func (b *broker) bucket(t *testing.T) jetstream.KeyValue {
	t.Helper()
	js, err := jetstream.New(b.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(t.Context(), registry.Bucket)
	if err != nil {
		t.Fatal(err)
	}
	return kv
}

// world is a provider and a source whose truth the test sets.
type world struct {
	mu     sync.Mutex // guards all below
	fns    map[string]sheaf.View
	labels map[string]map[string]string
	events []sheaf.View
	more   chan struct{} // closed, and made anew, at each change
	cut    chan struct{} // closed, and made anew, to break the streams
	silent bool          // the streams tell nothing
	list   func(ctx context.Context) ([]types.FunctionStatus, error)
	scaled []int
}

func newWorld() *world {
	return &world{fns: map[string]sheaf.View{}, labels: map[string]map[string]string{}, more: make(chan struct{}), cut: make(chan struct{})}
}

func (w *world) set(v sheaf.View) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tell(v)
}

// tell makes v the truth. w.mu is held.
func (w *world) tell(v sheaf.View) {
	if v.Desired < 0 {
		delete(w.fns, v.Function)
	} else {
		w.fns[v.Function] = v
	}
	w.events = append(w.events, v)
	close(w.more)
	w.more = make(chan struct{})
}

func (w *world) do(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// breakStreams ends all streams of addresses.
func (w *world) breakStreams() {
	w.do(func() { close(w.cut); w.cut = make(chan struct{}) })
}

func (w *world) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		w.mu.Lock()
		told := slices.Collect(maps.Values(w.fns))
		next := len(w.events)
		cut := w.cut
		w.mu.Unlock()
		for {
			w.mu.Lock()
			if w.silent {
				told = nil
			}
			more := w.more
			w.mu.Unlock()
			for _, v := range told {
				v.Replicas = slices.Clone(v.Replicas)
				if !yield(v, nil) {
					return
				}
			}
			w.mu.Lock()
			told = slices.Clone(w.events[next:])
			next = len(w.events)
			w.mu.Unlock()
			if len(told) > 0 {
				continue
			}
			select {
			case <-more:
			case <-cut:
				yield(sheaf.View{}, errors.New("stream is broken"))
				return
			case <-ctx.Done():
				return
			}
		}
	}
}

func (w *world) Functions(ctx context.Context) ([]types.FunctionStatus, error) {
	w.mu.Lock()
	list := w.list
	w.mu.Unlock()
	if list != nil {
		return list(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	out := []types.FunctionStatus{}
	for name, v := range w.fns {
		s := types.FunctionStatus{Name: name, Namespace: registry.DefaultNamespace, Replicas: uint64(v.Desired)}
		if l := w.labels[name]; l != nil {
			s.Labels = &l
		}
		out = append(out, s)
	}
	return out, nil
}

func (w *world) Scale(_ context.Context, function string, n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, ok := w.fns[function]
	if !ok {
		return errors.New("no such function")
	}
	w.scaled = append(w.scaled, n)
	v.Desired = n
	w.tell(v)
	return nil
}

var epochZero = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// rep is a replica that came into its state at second n.
func rep(id string, n int, s sheaf.State) sheaf.Replica {
	return sheaf.Replica{ID: id, URL: "http://" + id + ":8080", State: s, Since: epochZero.Add(time.Duration(n) * time.Second)}
}

func view(function string, reps ...sheaf.Replica) sheaf.View {
	return sheaf.View{Function: function, Desired: len(reps), Replicas: reps}
}

func ids(v sheaf.View) []string {
	out := []string{}
	for _, r := range v.Replicas {
		out = append(out, r.ID)
	}
	return out
}

type told struct {
	sheaf.View
	err error
	at  time.Time
}

// follow sends what Watch yields.
func follow(t *testing.T, r *registry.Registry, function string) <-chan told {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := make(chan told, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(out)
		for v, err := range r.Watch(ctx, function) {
			out <- told{v, err, time.Now()}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return out
}

// until returns the first of what is told that ok accepts.
func until(t *testing.T, in <-chan told, within time.Duration, what string, ok func(told) bool) told {
	t.Helper()
	late := time.After(within)
	var last told
	for {
		select {
		case x, open := <-in:
			if !open {
				t.Fatalf("%s: the watch ended; last was %v %v", what, ids(last.View), last.err)
			}
			if last = x; ok(x) {
				return x
			}
		case <-late:
			t.Fatalf("%s: not seen within %v; last was %v %v", what, within, ids(last.View), last.err)
		}
	}
}

func isReplicas(want ...string) func(told) bool {
	return func(x told) bool { return x.err == nil && slices.Equal(ids(x.View), want) }
}

func TestViewsAreReadyReplicasInRankOrderWithRisingEpochs(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	// Opened before there is a bucket, and before there is a watcher.
	views := follow(t, b.open(t), "worker")
	w.set(view("worker", rep("c", 3, sheaf.Ready), rep("s", 0, sheaf.Starting), rep("a", 1, sheaf.Ready), rep("d", 2, sheaf.Draining), rep("b", 2, sheaf.Ready)))
	time.Sleep(100 * time.Millisecond)
	b.watch(t, &registry.Watcher{Provider: w, Source: w})

	first := until(t, views, 2*time.Second, "first view", isReplicas("a", "b", "c"))
	if first.Function != "worker.openfaas-fn" || first.Desired != 5 || first.Replicas[0].URL != "http://a:8080" {
		t.Errorf("the view is %+v", first.View)
	}
	e, err := b.bucket(t).Get(t.Context(), "worker.openfaas-fn")
	if err != nil || e.Revision() != first.Epoch {
		t.Errorf("epoch %d is not the revision of the record (%v, %v)", first.Epoch, e, err)
	}
	// A rank changes only when one before it leaves; a new one comes last.
	last := first.Epoch
	for _, step := range []struct {
		name string
		now  sheaf.View
		want []string
	}{
		{"newcomer is last", view("worker", rep("z", 9, sheaf.Ready), rep("a", 1, sheaf.Ready), rep("b", 2, sheaf.Ready), rep("c", 3, sheaf.Ready)), []string{"a", "b", "c", "z"}},
		{"middle one leaves", view("worker", rep("z", 9, sheaf.Ready), rep("a", 1, sheaf.Ready), rep("c", 3, sheaf.Ready)), []string{"a", "c", "z"}},
		{"first one drains", view("worker", rep("z", 9, sheaf.Ready), rep("a", 10, sheaf.Draining), rep("c", 3, sheaf.Ready)), []string{"c", "z"}},
		{"ready at the same time: by name", view("worker", rep("z", 9, sheaf.Ready), rep("y", 9, sheaf.Ready)), []string{"y", "z"}},
		{"none", view("worker"), []string{}},
		{"back", view("worker", rep("n", 20, sheaf.Ready)), []string{"n"}},
	} {
		w.set(step.now)
		v := until(t, views, time.Second, step.name, isReplicas(step.want...))
		if v.Epoch <= last {
			t.Errorf("%s: epoch %d follows %d", step.name, v.Epoch, last)
		}
		last = v.Epoch
	}
}

func TestChangesAreKnownSoon(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker"))
	b.watch(t, &registry.Watcher{Provider: w, Source: w})
	views := follow(t, b.open(t), "worker")
	until(t, views, 2*time.Second, "first view", isReplicas())
	var took []time.Duration
	for i := range 100 {
		id := fmt.Sprintf("r%d", i)
		begun := time.Now()
		w.set(view("worker", rep(id, i, sheaf.Ready)))
		took = append(took, until(t, views, 2*time.Second, id, isReplicas(id)).at.Sub(begun))
	}
	slices.Sort(took)
	t.Logf("change to knowledge over %d changes: median %v, 99th %v, worst %v", len(took), took[50], took[98], took[99])
	if took[99] > time.Second {
		t.Errorf("a change was known after %v only", took[99])
	}
}

func TestFunctionThatIsNotDeployed(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	r := b.open(t)
	isGone := func(x told) bool { return errors.Is(x.err, sheaf.ErrNoFunction) }

	begun := time.Now()
	x := until(t, follow(t, r, "nobody"), 5*time.Second, "never deployed", isGone)
	if d := x.at.Sub(begun); d < 1500*time.Millisecond || d > 4*time.Second {
		t.Errorf("unknown function: error after %v, want about 2s", d)
	}
	late := follow(t, r, "late.openfaas-fn")
	time.Sleep(500 * time.Millisecond)
	w.set(view("late", rep("a", 1, sheaf.Ready)))
	until(t, late, time.Second, "deployed within the grace", isReplicas("a"))

	begun = time.Now()
	w.set(sheaf.View{Function: "late", Desired: -1})
	x = until(t, late, time.Second, "deleted", isGone)
	t.Logf("deletion known after %v", x.at.Sub(begun))
	if _, more := <-late; more {
		t.Error("the watch goes on after its last error")
	}
}

// A source may tell of the end, or of the replicas, of functions that nobody has
// heard of: pods of others, or what was there before this watcher.
func TestSourceTellsOfStrangers(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	views := follow(t, b.open(t), "worker")
	for _, v := range []sheaf.View{{Function: "stranger", Desired: -1}, {Function: "kube-dns.kube-system", Desired: -1}, {Function: "a.b.c", Desired: -1}} {
		w.set(v)
	}
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	until(t, views, 10*time.Second, "a function after them", isReplicas("a"))
}

func TestDeletionWhileTheStreamIsDown(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	views := follow(t, b.open(t), "worker")
	until(t, views, 2*time.Second, "first view", isReplicas("a"))
	w.do(func() { delete(w.fns, "worker") }) // no stream tells it
	w.breakStreams()
	until(t, views, 2*time.Second, "deleted", func(x told) bool { return errors.Is(x.err, sheaf.ErrNoFunction) })
}

// A record from before the watcher was there, of a function that is gone, must
// not stay for ever. One of a function that is not gone stays as it is, though
// the provider may answer before the source, or the source not at all.
func TestRecordOfAFormerWatcherIsCleared(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("old", rep("a", 1, sheaf.Ready)))
	w.set(view("kept", rep("k", 1, sheaf.Ready)))
	stop := b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	r := b.open(t)
	old, kept := follow(t, r, "old"), follow(t, r, "kept")
	until(t, old, 2*time.Second, "first view", isReplicas("a"))
	epoch := until(t, kept, 2*time.Second, "first view", isReplicas("k")).Epoch
	stop()
	w.do(func() { delete(w.fns, "old"); w.silent = true })
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	until(t, old, 2*time.Second, "cleared", func(x told) bool { return errors.Is(x.err, sheaf.ErrNoFunction) })
	if e, err := b.bucket(t).Get(t.Context(), "kept.openfaas-fn"); err != nil || e.Revision() != epoch {
		t.Errorf("the record of the other function changed with the watcher: %v, %v", e, err)
	}
	w.do(func() { w.silent = false })
	w.breakStreams()
	w.set(view("kept", rep("l", 2, sheaf.Ready)))
	until(t, kept, 2*time.Second, "told by the source", isReplicas("l"))
}

func TestNATSRestarts(t *testing.T) {
	for _, c := range []struct {
		name    string
		durable bool
		empty   bool
	}{
		{"same store", true, false},
		{"record in memory", false, false},
		{"empty store", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b, w := newBroker(t), newWorld()
			w.set(view("worker", rep("a", 1, sheaf.Ready)))
			w.set(view("doomed", rep("d", 1, sheaf.Ready)))
			b.watch(t, &registry.Watcher{Provider: w, Source: w, Durable: c.durable, Period: 100 * time.Millisecond})
			r := b.open(t)
			views, doomed := follow(t, r, "worker"), follow(t, r, "doomed")
			until(t, views, 2*time.Second, "first view", isReplicas("a"))
			for i := range 20 { // so that the epoch is well above that of a new bucket
				w.set(view("worker", rep("a", 1, sheaf.Ready), rep("b", i, sheaf.Starting)))
			}
			w.set(view("worker", rep("a", 1, sheaf.Ready)))
			last := until(t, views, 2*time.Second, "last view", func(x told) bool { return x.Desired == 1 && x.Epoch > 20 })
			until(t, doomed, 2*time.Second, "first view", isReplicas("d"))

			b.stop()
			time.Sleep(200 * time.Millisecond)
			// The last view holds, for those who ask only now, too.
			until(t, follow(t, r, "worker"), time.Second, "view without NATS", isReplicas("a"))
			w.set(sheaf.View{Function: "doomed", Desired: -1})
			if c.empty {
				b.dir = t.TempDir()
			}
			b.start(t)
			begun := time.Now()
			w.set(view("worker", rep("a", 1, sheaf.Ready), rep("b", 2, sheaf.Ready)))
			x := until(t, views, 8*time.Second, "view after the restart", isReplicas("a", "b"))
			t.Logf("%s: new view %v after the restart, epoch %d after %d", c.name, x.at.Sub(begun).Round(time.Millisecond), x.Epoch, last.Epoch)
			if x.Epoch <= last.Epoch {
				t.Errorf("epoch %d follows %d", x.Epoch, last.Epoch)
			}
			// Without any change at all, somebody new must see the record, too.
			until(t, follow(t, b.open(t), "worker"), 3*time.Second, "record was written again", isReplicas("a", "b"))
			until(t, doomed, 8*time.Second, "deleted while NATS was down", func(x told) bool { return errors.Is(x.err, sheaf.ErrNoFunction) })
			w.set(view("worker", rep("c", 3, sheaf.Ready)))
			until(t, views, time.Second, "change after that", isReplicas("c"))
		})
	}
}

// The bucket comes back although nothing changes, and masters keep their views
// meanwhile.
func TestLostRecordIsWrittenAgain(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, b *broker){
		"restart in memory": func(t *testing.T, b *broker) { b.stop(); b.start(t) },
		"bucket deleted": func(t *testing.T, b *broker) {
			js, err := jetstream.New(b.connect(t))
			if err == nil {
				err = js.DeleteKeyValue(t.Context(), registry.Bucket)
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"record deleted": func(t *testing.T, b *broker) {
			if err := b.bucket(t).Delete(t.Context(), "worker.openfaas-fn"); err != nil {
				t.Fatal(err)
			}
		},
		"record overwritten": func(t *testing.T, b *broker) {
			if _, err := b.bucket(t).Put(t.Context(), "worker.openfaas-fn", []byte("{garbage")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, w := newBroker(t), newWorld()
			w.set(view("worker", rep("a", 1, sheaf.Ready)))
			b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 100 * time.Millisecond})
			until(t, follow(t, b.open(t), "worker"), 2*time.Second, "first view", isReplicas("a"))
			lose(t, b)
			begun := time.Now()
			for {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				js, err := jetstream.New(b.connect(t))
				if err != nil {
					t.Fatal(err)
				}
				var rec registry.Record
				if kv, err := js.KeyValue(ctx, registry.Bucket); err == nil {
					if e, err := kv.Get(ctx, "worker.openfaas-fn"); err == nil {
						_ = json.Unmarshal(e.Value(), &rec)
					}
				}
				cancel()
				if len(rec.Replicas) == 1 {
					break
				}
				if time.Since(begun) > 5*time.Second {
					t.Fatal("the record was not written again within 5s")
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Logf("written again after %v", time.Since(begun).Round(time.Millisecond))
		})
	}
}

// A new watcher on a new bucket starts to count from 1. A view that has by
// chance the epoch of an earlier, other one must be seen all the same.
func TestSameEpochOtherView(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	stop := b.watch(t, &registry.Watcher{Provider: w, Source: w})
	views := follow(t, b.open(t), "worker")
	first := until(t, views, 2*time.Second, "first view", isReplicas("a"))
	stop()
	b.stop()
	b.dir = t.TempDir()
	b.start(t)
	w.set(view("worker", rep("b", 2, sheaf.Ready)))
	b.watch(t, &registry.Watcher{Provider: w, Source: w})
	x := until(t, views, 5*time.Second, "view of the new watcher", isReplicas("b"))
	t.Logf("epoch %d after %d", x.Epoch, first.Epoch)
}

func TestUndecodableRecordIsIgnored(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	stop := b.watch(t, &registry.Watcher{Provider: w, Source: w})
	r := b.open(t)
	views := follow(t, r, "worker")
	until(t, views, 2*time.Second, "first view", isReplicas("a"))
	stop()
	for _, bad := range []string{"", "null garbage", `{"replicas":"many"}`, "\x00\xff"} {
		if _, err := b.bucket(t).Put(t.Context(), "worker.openfaas-fn", []byte(bad)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.bucket(t).Put(t.Context(), "probe.openfaas-fn", []byte(`{"function":"probe.openfaas-fn","desired":0}`)); err != nil {
		t.Fatal(err)
	}
	until(t, follow(t, r, "probe"), time.Second, "what was written after it", isReplicas())
	until(t, follow(t, r, "worker"), time.Second, "the last good view", isReplicas("a"))
	if len(views) > 0 {
		t.Errorf("the watch told %v", <-views)
	}
}

func TestAtLeast(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	r := b.open(t)
	begun := time.Now()
	if _, err := r.AtLeast(t.Context(), "worker", 2); err == nil || time.Since(begun) > 11*time.Second {
		t.Errorf("without a watcher: %v after %v", err, time.Since(begun))
	}
	w.set(view("worker"))
	w.set(view("labelled"))
	w.do(func() { w.labels["labelled"] = map[string]string{"com.openfaas.scale.max": "3"} })
	b.watch(t, &registry.Watcher{Provider: w, Source: w})
	until(t, follow(t, r, "worker"), 2*time.Second, "first view", isReplicas())
	for _, c := range []struct {
		name     string
		function string
		n, want  int
		scaled   []int
	}{
		{"raises", "worker", 4, 4, []int{4}},
		{"does not lower", "worker", 2, 4, nil},
		{"leaves the same", "worker", 4, 4, nil},
		{"with the namespace", "worker.openfaas-fn", 5, 5, []int{5}},
		{"within the label", "labelled", 10, 3, []int{3}},
		{"at the label", "labelled", 10, 3, nil},
	} {
		w.do(func() { w.scaled = nil })
		got, err := r.AtLeast(t.Context(), c.function, c.n)
		w.do(func() {
			if err != nil || got != c.want || !slices.Equal(w.scaled, c.scaled) {
				t.Errorf("%s: got %d, %v, scaled to %v; want %d, scaled to %v", c.name, got, err, w.scaled, c.want, c.scaled)
			}
		})
	}
	for _, function := range []string{"nobody", "worker.elsewhere"} {
		if _, err := r.AtLeast(t.Context(), function, 2); !errors.Is(err, sheaf.ErrNoFunction) {
			t.Errorf("%s: %v", function, err)
		}
	}
	if _, err := r.AtLeast(t.Context(), "worker", 0); err == nil {
		t.Error("0 replicas are asked for without error")
	}
	// What the stream told is old; the provider has more by now.
	w.do(func() {
		w.silent = true
		v := w.fns["worker"]
		v.Desired = 9
		w.fns["worker"] = v
		w.scaled = nil
	})
	if got, err := r.AtLeast(t.Context(), "worker", 7); got != 9 || err != nil || len(w.scaled) > 0 {
		t.Errorf("with an old view: got %d, %v, scaled to %v; want 9, not scaled", got, err, w.scaled)
	}
}

// A provider that hangs holds up neither the asker nor the views.
func TestAtLeastOfAProviderThatHangs(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	b.watch(t, &registry.Watcher{Provider: w, Source: w})
	r := b.open(t)
	views := follow(t, r, "worker")
	until(t, views, 2*time.Second, "first view", isReplicas("a"))
	w.do(func() {
		w.list = func(ctx context.Context) ([]types.FunctionStatus, error) { <-ctx.Done(); return nil, ctx.Err() }
	})
	asked := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
		defer cancel()
		_, err := r.AtLeast(ctx, "worker", 3)
		asked <- err
	}()
	time.Sleep(100 * time.Millisecond)
	w.set(view("worker", rep("b", 2, sheaf.Ready)))
	until(t, views, time.Second, "change meanwhile", isReplicas("b"))
	if err := <-asked; err == nil {
		t.Error("a provider that hangs has scaled")
	}
}

func TestProviderAndSourceThatFail(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	r := b.open(t)
	views := follow(t, r, "worker")
	until(t, views, 2*time.Second, "first view", isReplicas("a"))
	var calls atomic.Int32
	n := 1
	for _, c := range []struct {
		name string
		list func(ctx context.Context) ([]types.FunctionStatus, error)
	}{
		{"API answers 500", func(context.Context) ([]types.FunctionStatus, error) { return nil, errors.New("500") }},
		{"API hangs", func(ctx context.Context) ([]types.FunctionStatus, error) { <-ctx.Done(); return nil, ctx.Err() }},
		{"API answers one empty list", func(context.Context) ([]types.FunctionStatus, error) {
			if calls.Add(1) == 1 {
				return []types.FunctionStatus{}, nil
			}
			return nil, errors.New("500")
		}},
	} {
		w.do(func() { w.list = c.list })
		w.breakStreams()
		time.Sleep(300 * time.Millisecond)
		until(t, follow(t, r, "worker"), time.Second, c.name+": last good record", func(x told) bool { return x.err == nil && len(x.Replicas) == 1 })
		n++
		id := fmt.Sprint("r", n)
		w.set(view("worker", rep(id, n, sheaf.Ready)))
		until(t, views, time.Second, c.name+": change that the stream tells", isReplicas(id))
	}
	w.do(func() { w.list = nil; w.silent = true })
	time.Sleep(200 * time.Millisecond)
	if len(views) > 0 {
		t.Errorf("a stream that says nothing changed the view: %v", <-views)
	}
	w.do(func() { w.silent = false })
	w.breakStreams()
	w.set(view("worker", rep("z", 99, sheaf.Ready)))
	until(t, views, time.Second, "all is well again", isReplicas("z"))
}

// The provider forgets its functions for a while, and the source, which did
// not, has no reason to tell its addresses again.
func TestProviderThatForgetsForAWhile(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	r := b.open(t)
	views := follow(t, r, "worker")
	until(t, views, 2*time.Second, "first view", isReplicas("a"))
	w.do(func() {
		w.list = func(context.Context) ([]types.FunctionStatus, error) { return []types.FunctionStatus{}, nil }
	})
	until(t, views, 2*time.Second, "gone", func(x told) bool { return errors.Is(x.err, sheaf.ErrNoFunction) })
	w.do(func() { w.list = nil })
	until(t, follow(t, r, "worker"), 2*time.Second, "back, with its addresses", isReplicas("a"))
}

func TestTwoWatchersAgree(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	for range 2 {
		b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	states := []sheaf.State{sheaf.Starting, sheaf.Ready, sheaf.Ready, sheaf.Draining}
	names := []string{"f0", "f1", "f2", "f3"}
	for i := range 200 {
		name := names[rnd.IntN(len(names))]
		switch rnd.IntN(12) {
		case 0:
			w.set(sheaf.View{Function: name, Desired: -1})
		case 1:
			w.breakStreams()
		default:
			var reps []sheaf.Replica
			for j := range rnd.IntN(6) {
				reps = append(reps, rep(fmt.Sprintf("%s-%d", name, j), rnd.IntN(i+1), states[rnd.IntN(len(states))]))
			}
			w.set(view(name, reps...))
		}
		if rnd.IntN(4) == 0 {
			time.Sleep(time.Duration(rnd.IntN(5)) * time.Millisecond)
		}
	}
	r := b.open(t)
	agreed := func() (string, bool) {
		w.mu.Lock()
		defer w.mu.Unlock()
		recs := r.Records()
		for _, rec := range recs {
			name, _, _ := cutKey(rec.Function)
			want, ok := w.fns[name]
			if !ok || rec.Desired != want.Desired || len(rec.Replicas) != len(want.Replicas) {
				return fmt.Sprintf("record %+v, want %+v", rec, want), false
			}
			for _, x := range want.Replicas {
				if !slices.ContainsFunc(rec.Replicas, func(y sheaf.Replica) bool {
					return x.ID == y.ID && x.State == y.State && x.Since.Equal(y.Since)
				}) {
					return fmt.Sprintf("record %+v, want %+v", rec, want), false
				}
			}
		}
		return fmt.Sprintf("%d records, want %d", len(recs), len(w.fns)), len(recs) == len(w.fns)
	}
	begun := time.Now()
	for {
		why, ok := agreed()
		if ok {
			break
		}
		if time.Since(begun) > 5*time.Second {
			t.Fatalf("no agreement after 5s: %s", why)
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("agreed %v after the last change", time.Since(begun).Round(time.Millisecond))

	time.Sleep(200 * time.Millisecond)
	before := b.revision(t)
	for range 40 { // the same again, and again
		w.mu.Lock()
		for _, v := range slices.Collect(maps.Values(w.fns)) {
			w.tell(v)
		}
		w.mu.Unlock()
		time.Sleep(50 * time.Millisecond)
	}
	after := b.revision(t)
	t.Logf("revision %d before and %d after 2s of the same", before, after)
	if before != after {
		t.Errorf("the epoch flaps: revision %d became %d without a change", before, after)
	}
	if why, ok := agreed(); !ok {
		t.Error(why)
	}
}

func cutKey(key string) (name, namespace string, ok bool) {
	for i := range key {
		if key[i] == '.' {
			return key[:i], key[i+1:], true
		}
	}
	return key, "", false
}

// A thousand changes a second must not make the watcher lag.
func TestFlapping(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	w.set(view("worker"))
	w.set(view("other"))
	b.watch(t, &registry.Watcher{Provider: w, Source: w})
	r := b.open(t)
	other := follow(t, r, "other")
	until(t, other, 2*time.Second, "first view", isReplicas())
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for i := range 1000 {
		<-tick.C
		w.set(view("worker", rep("a", i, sheaf.Ready)))
	}
	begun := time.Now()
	w.set(view("other", rep("z", 1, sheaf.Ready)))
	x := until(t, other, time.Second, "another function's change", isReplicas("z"))
	t.Logf("after 1000 changes in 1s, a change is known after %v", x.at.Sub(begun))
}

func TestServeHTTP(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	r := b.open(t)
	ts := httptest.NewServer(r)
	defer ts.Close()
	get := func(query string) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, ts.URL+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := ts.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	// Nothing is known, which is not the same as that there is nothing.
	resp := get("/")
	said, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !strings.Contains(string(said), "NATS") {
		t.Errorf("a record that was not read is %d %q, %v, %v", resp.StatusCode, said, resp.Header, err)
	}
	resp = get("/?watch=true")
	defer resp.Body.Close()
	if ct := resp.Header.Get("Content-Type"); ct != "application/x-ndjson" {
		t.Errorf("the stream is %s", ct)
	}
	lines := bufio.NewScanner(resp.Body)
	next := func(want func([]registry.Record) bool) {
		t.Helper()
		for lines.Scan() {
			if len(lines.Bytes()) == 0 { // a heartbeat
				continue
			}
			var list []registry.Record
			if err := json.Unmarshal(lines.Bytes(), &list); err != nil {
				t.Fatal(err)
			}
			if want(list) {
				return
			}
		}
		t.Fatalf("the stream ended: %v", lines.Err())
	}
	w.set(view("worker", rep("d", 1, sheaf.Draining), rep("a", 1, sheaf.Ready)))
	w.set(view("abc"))
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	next(func(l []registry.Record) bool {
		return len(l) == 2 && l[0].Function == "abc.openfaas-fn" && l[1].Function == "worker.openfaas-fn" &&
			len(l[1].Replicas) == 2 && l[1].Replicas[0].ID == "a" && l[1].Replicas[1].State == sheaf.Draining && l[1].Epoch > 0
	})
	w.set(sheaf.View{Function: "abc", Desired: -1})
	next(func(l []registry.Record) bool { return len(l) == 1 })
	resp2 := get("/")
	defer resp2.Body.Close()
	var list []registry.Record
	if err := json.NewDecoder(resp2.Body).Decode(&list); err != nil || len(list) != 1 {
		t.Errorf("the list is %v, %v", list, err)
	}

	w.set(view("other", rep("o", 1, sheaf.Ready)))
	for query, want := range map[string]string{
		"/?function=worker": "worker", "/?function=worker.openfaas-fn": "worker", "/?replica=a": "worker", "/?replica=o": "other",
	} {
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			var list []registry.Record
			resp := get(query)
			err := json.NewDecoder(resp.Body).Decode(&list)
			resp.Body.Close()
			if err == nil && len(list) == 1 && list[0].Function == want+".openfaas-fn" {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s answers %+v, %v", query, list, err)
			}
		}
	}
}

// The changes as events, as a browser's EventSource reads them.
func TestServeEvents(t *testing.T) {
	t.Parallel()
	b, w := newBroker(t), newWorld()
	r := b.open(t)
	ts := httptest.NewServer(r)
	defer ts.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, ts.URL+"/replicas?watch", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "text/event-stream")
	resp, err := ts.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if ct := resp.Header.Get("Content-Type"); ct != "text/event-stream" {
		t.Errorf("the stream is %s", ct)
	}
	b.watch(t, &registry.Watcher{Provider: w, Source: w, Period: 50 * time.Millisecond})
	lines := bufio.NewScanner(resp.Body)
	next := func() (event, data string) {
		t.Helper()
		for lines.Scan() {
			line := lines.Text()
			if e, ok := strings.CutPrefix(line, "event: "); ok {
				event = e
			}
			if d, ok := strings.CutPrefix(line, "data: "); ok {
				data = d
			}
			if line == "" && event != "" {
				return event, data
			}
		}
		t.Fatalf("the stream ended: %v", lines.Err())
		return "", ""
	}
	for _, v := range []sheaf.View{view("worker", rep("a", 1, sheaf.Ready)), view("other"), view("worker", rep("b", 2, sheaf.Ready))} {
		w.set(v)
		for {
			event, data := next()
			var rec registry.Record
			if err := json.Unmarshal([]byte(data), &rec); err != nil || event != "replicas" || rec.Function != v.Function+".openfaas-fn" || rec.Epoch == 0 {
				t.Fatalf("event %s %s, %v; want the replicas of %+v", event, data, err, v)
			}
			// The provider's count may come before the source's word.
			if len(rec.Replicas) == len(v.Replicas) && (len(rec.Replicas) == 0 || rec.Replicas[0].ID == v.Replicas[0].ID) {
				break
			}
		}
	}
	w.set(sheaf.View{Function: "worker", Desired: -1})
	if event, data := next(); event != "gone" || data != `{"function":"worker.openfaas-fn"}` {
		t.Errorf("event %s %s, want that worker is gone", event, data)
	}
}
