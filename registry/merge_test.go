package registry_test

import (
	"context"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/registry"
)

// Two sources are one: a replica that both name is one, as the first one says.
func TestMergedSources(t *testing.T) {
	t.Parallel()
	b, provider, first, second := newBroker(t), newWorld(), newWorld(), newWorld()
	provider.set(sheaf.View{Function: "worker", Desired: 3})
	lie := rep("b", 2, sheaf.Ready)
	lie.URL = "http://10.9.9.9:8080"
	first.set(view("worker", rep("a", 1, sheaf.Ready), rep("b", 2, sheaf.Ready)))
	second.set(view("worker", lie, rep("c", 3, sheaf.Ready)))
	b.watch(t, &registry.Watcher{Provider: provider, Source: registry.Merge(bare{first}, bare{second}), Period: 20 * time.Millisecond})
	r := b.open(t)
	worker := follow(t, r, "worker")
	x := until(t, worker, 10*time.Second, "three replicas", func(x told) bool { return x.err == nil && len(x.Replicas) == 3 })
	if x.Desired != 3 {
		t.Errorf("%d are desired", x.Desired)
	}
	for _, one := range x.Replicas {
		if one.URL == lie.URL {
			t.Errorf("the second one's word counts: %+v", one)
		}
	}
	first.set(view("worker", rep("a", 1, sheaf.Ready)))
	x = until(t, worker, 10*time.Second, "the second one's word", func(x told) bool { return x.err == nil && len(x.Replicas) == 3 && at(x.View, "b") == lie.URL })
	second.set(view("worker"))
	until(t, worker, 10*time.Second, "the first one's alone", isReplicas("a"))
	first.set(view("worker"))
	until(t, worker, 10*time.Second, "none", isReplicas())
}

func at(v sheaf.View, id string) string {
	for _, r := range v.Replicas {
		if r.ID == id {
			return r.URL
		}
	}
	return ""
}

// One that fails, or ends, ends the merged one, and nothing of it runs on.
func TestMergedSourceFails(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.set(view("worker", rep("a", 1, sheaf.Ready)))
	failed := false
	for _, err := range registry.Merge(w, failing{}).Replicas(t.Context()) {
		failed = failed || err != nil
	}
	if !failed {
		t.Error("it ended without a word")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range registry.Merge(w, w).Replicas(ctx) {
		cancel()
	}
	for range registry.Merge(w, w).Replicas(t.Context()) {
		break
	}
}
