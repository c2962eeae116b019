package registry_test

import (
	"context"
	"errors"
	"iter"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/registry"
)

// bare is a source that knows addresses only, as that of Kubernetes: not how
// many replicas there shall be, nor since when they are as they are.
type bare struct{ *world }

func (b bare) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		for v, err := range b.world.Replicas(ctx) {
			v.Desired = -2
			for i := range v.Replicas {
				v.Replicas[i].Since = time.Time{}
			}
			if !yield(v, err) {
				return
			}
		}
	}
}

// The provider's word says what is a function and how many replicas it shall
// have, the source's where they are: 3 of 5 ready.
func TestSourceOfAddressesOnly(t *testing.T) {
	t.Parallel()
	b, provider, addresses := newBroker(t), newWorld(), newWorld()
	ready := func(names ...string) (list []sheaf.Replica) {
		for _, name := range names {
			list = append(list, rep(name, 0, sheaf.Ready))
		}
		return list
	}
	addresses.set(view("kubernetes", ready("k")...)) // a Service that is no function
	addresses.set(view("worker", append(ready("b", "c"), rep("a", 0, sheaf.Starting))...))
	watch := func() (stop func()) {
		return b.watch(t, &registry.Watcher{Provider: provider, Source: bare{addresses}, Period: 20 * time.Millisecond})
	}
	stop := watch()
	provider.set(sheaf.View{Function: "worker", Desired: 5})
	r := b.open(t)
	worker := follow(t, r, "worker")
	x := until(t, worker, 10*time.Second, "2 of 5", isReplicas("b", "c"))
	if x.Desired != 5 {
		t.Errorf("%d replicas are desired, want the provider's 5", x.Desired)
	}

	// One that becomes ready later comes after those that are, and stays there.
	addresses.set(view("worker", ready("a", "b", "c")...))
	until(t, worker, 10*time.Second, "3 of 5", isReplicas("b", "c", "a"))
	if list := r.Records(); len(list) != 1 || list[0].Desired != 5 || len(list[0].Replicas) != 3 || list[0].Replicas[0].Since.IsZero() {
		t.Errorf("the record is %+v", list)
	}

	// Neither a watcher that comes after it nor a second one changes that.
	time.Sleep(100 * time.Millisecond)
	before := b.revision(t)
	stop()
	watch()
	watch()
	time.Sleep(300 * time.Millisecond)
	if after := b.revision(t); after != before {
		t.Errorf("revision %d became %d with other watchers; the record is %+v", before, after, r.Records())
	}
	provider.set(sheaf.View{Function: "worker", Desired: 4})
	x = until(t, worker, 10*time.Second, "another count", func(x told) bool { return x.Desired == 4 })
	if !isReplicas("b", "c", "a")(x) {
		t.Errorf("the ranks are %v", ids(x.View))
	}

	addresses.set(view("worker"))
	until(t, worker, 10*time.Second, "no replicas", func(x told) bool { return isReplicas()(x) && x.Desired == 4 })
	addresses.set(view("worker", ready("d")...))
	until(t, worker, 10*time.Second, "a new one", isReplicas("d"))
	provider.set(sheaf.View{Function: "worker", Desired: -1})
	until(t, worker, 10*time.Second, "the end of the function", func(x told) bool { return x.err != nil })
}

// Of two watchers that see different things one writes, until it ends: epochs
// do not flap, whoever is right. The other one goes on, also when the writer
// could not say goodbye.
func TestOneOfTwoWatchersWrites(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"stopped", "cut off"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			b, old, present := newBroker(t), newWorld(), newWorld()
			old.set(view("worker", rep("a", 1, sheaf.Ready)))
			present.set(view("worker", rep("b", 2, sheaf.Ready)))
			first := &registry.Watcher{Provider: old, Source: old, Period: 20 * time.Millisecond, Conn: b.connect(t)}
			stop := b.watch(t, first)
			r := b.open(t)
			worker := follow(t, r, "worker")
			until(t, worker, 10*time.Second, "the first one's view", isReplicas("a"))
			second := &registry.Watcher{Provider: present, Source: present, Period: 20 * time.Millisecond}
			b.watch(t, second)
			time.Sleep(300 * time.Millisecond)
			before := b.revision(t)
			for range 20 { // the second one has news, and tells what it has again and again
				present.set(view("worker", rep("b", 2, sheaf.Ready)))
				time.Sleep(50 * time.Millisecond)
			}
			if after := b.revision(t); after != before {
				t.Errorf("revision %d became %d: two watchers write", before, after)
			}
			if s := first.Stats(); !s.Writing || !s.SourceUp || s.Writes == 0 || s.Functions != 1 || s.LastWrite.IsZero() {
				t.Errorf("the first one says %+v", s)
			}
			if s := second.Stats(); s.Writing || !s.SourceUp || s.Writes != 0 {
				t.Errorf("the second one says %+v", s)
			}
			if how == "stopped" {
				stop()
			} else {
				first.Conn.Close()
			}
			x := until(t, worker, 30*time.Second, "the second one's view", isReplicas("b"))
			if x.Epoch <= before {
				t.Errorf("epoch %d came after %d", x.Epoch, before)
			}
		})
	}
}

// A writer whose source is broken gives others a turn.
func TestWriterWithoutItsSource(t *testing.T) {
	t.Parallel()
	b, blind, seeing := newBroker(t), newWorld(), newWorld()
	blind.set(view("worker", rep("a", 1, sheaf.Ready)))
	seeing.set(view("worker", rep("b", 2, sheaf.Ready)))
	first := &registry.Watcher{Provider: blind, Source: failing{}, Period: 20 * time.Millisecond}
	b.watch(t, first)
	r := b.open(t)
	worker := follow(t, r, "worker")
	until(t, worker, 10*time.Second, "a record without addresses", func(x told) bool { return x.err == nil && x.Desired == 1 })
	b.watch(t, &registry.Watcher{Provider: seeing, Source: seeing, Period: 20 * time.Millisecond})
	until(t, worker, 60*time.Second, "the view of the one that sees", isReplicas("b"))
	if s := first.Stats(); s.Writing || s.SourceUp || s.SourceFailures == 0 {
		t.Errorf("the one without a source says %+v", s)
	}
}

// failing is a source that fails.
type failing struct{}

func (failing) Replicas(context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) { yield(sheaf.View{}, errors.New("no addresses")) }
}
