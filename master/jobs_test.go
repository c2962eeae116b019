package master_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/job"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/worker"
)

// keeping makes a master of a handler that keeps its jobs at the broker.
func keeping(t *testing.T, broker *server.Server, name string) func(*master.Handler) {
	return func(h *master.Handler) {
		nc, err := nats.Connect(broker.ClientURL())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		store, err := job.Open(nc, job.Config{Function: "master", Master: name, StoreBytes: 64 << 20, InputBytes: 64 << 20, Lease: 300 * time.Millisecond, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(store.Close)
		h.Jobs = store
		ctx, stop := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { h.RunJobs(ctx) })
		t.Cleanup(func() { stop(); wg.Wait() })
	}
}

func newBroker(t *testing.T) *server.Server {
	t.Helper()
	b, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	b.Start()
	t.Cleanup(func() { b.Shutdown(); b.WaitForShutdown() })
	if !b.ReadyForConnections(10 * time.Second) {
		t.Fatal("NATS is not ready")
	}
	return b
}

// Three masters share jobs: whoever is asked tells the same, and each job is
// done once, while some are cancelled, some fail and some are asked for in
// parts.
func TestMastersShareJobs(t *testing.T) {
	broker := newBroker(t)
	slow := doing(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		if strings.Contains(string(b.Data), "poison") {
			return nil, worker.Reject(fmt.Errorf("no"))
		}
		if strings.Contains(string(b.Data), "endless") {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if len(worker.Saved(ctx)) == 0 && strings.Contains(string(b.Data), "save") {
			return nil, worker.Save([]byte("once"))
		}
		return wordcount.Count(ctx, b)
	})
	workers := []http.Handler{slow, slow}
	var masters []*stack
	for i := range 3 {
		masters = append(masters, start(t, workers, keeping(t, broker, fmt.Sprintf("m%d", i))))
	}
	call := func(i int, method, path, body string, header ...string) answer {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, masters[i%3].url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range header {
			name, value, _ := strings.Cut(h, ": ")
			req.Header.Set(name, value)
		}
		resp, err := masters[i%3].client.Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", method, path, err)
			return answer{}
		}
		a, err := read(resp)
		if err != nil {
			t.Errorf("%s %s: %v", method, path, err)
		}
		return a
	}
	var wg sync.WaitGroup
	for i := range 36 {
		wg.Go(func() {
			id := fmt.Sprintf("j%d", i)
			in, ends := strings.Repeat("a b save\nc\n", 50+i), "succeeded"
			switch i % 4 {
			case 1:
				in, ends = in+"poison\n", "failed"
			case 2:
				in, ends = in+"endless\n", "cancelled"
			}
			query := "?block=40"
			if i%3 == 0 {
				query += "&tolerate=50%25"
				if ends == "failed" {
					ends = "succeeded"
				}
			}
			if a := call(i, "POST", "/jobs"+query, in, "Idempotency-Key: "+id); a.status != 202 && a.status != 200 {
				t.Errorf("%s: %d %s", id, a.status, a.body)
				return
			}
			if a := call(i+1, "GET", "/jobs/"+id+"/result", "", "Prefer: wait=0.05", "Accept: application/x-ndjson"); a.status != 200 && a.status != 202 && a.status != 424 {
				t.Errorf("%s: a part is %d %s", id, a.status, a.body)
			}
			if ends == "cancelled" {
				if a := call(i+2, "DELETE", "/jobs/"+id, ""); a.status != 200 {
					t.Errorf("%s: cancel is %d %s", id, a.status, a.body)
				}
			}
			a := call(i+2, "GET", "/jobs/"+id+"/result", "", "Prefer: wait=30")
			if a.status != map[string]int{"succeeded": 200, "failed": 424, "cancelled": 409}[ends] {
				t.Errorf("%s: the result is %d %s", id, a.status, a.body)
			}
			if i%4 == 0 && a.body != want(in) {
				t.Errorf("%s: the result is %s", id, a.body)
			}
			var told struct {
				State  string
				Blocks struct{ Total, Done, Failed, Stopped int }
			}
			if err := json.Unmarshal([]byte(call(i, "GET", "/jobs/"+id, "").body), &told); err != nil || told.State != ends ||
				told.Blocks.Done+told.Blocks.Failed+told.Blocks.Stopped != told.Blocks.Total {
				t.Errorf("%s: %+v, want %s", id, told, ends)
			}
			if e := call(i+1, "GET", "/jobs/"+id+"/events", ""); !strings.Contains(e.body, "event: "+ends+"\n") {
				t.Errorf("%s: events are %s", id, e.body)
			}
		})
	}
	wg.Wait()
	if a := call(0, "GET", "/jobs?limit=1000", ""); strings.Count(a.body, `"id"`) != 36 {
		t.Errorf("the list has %d jobs", strings.Count(a.body, `"id"`))
	}
}
