package registry_test

import (
	"context"
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
