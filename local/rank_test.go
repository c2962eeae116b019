package local_test

// rank_test.go calls ranks from outside, through a gateway's front that gives
// each call to any replica.

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/registry"
	"github.com/sheaf-project/sheaf/worker"
)

var rankCalls = flag.Int("rank-calls", 1500, "calls of ranks while a function is scaled; make ranks takes 10,000")

// who is what a replica knows of a call.
type who struct {
	ID   string
	Data string
	worker.Call
}

// tell answers who was called. A block "chain" goes on from rank to rank, and
// each adds itself to the answer.
func tell(ctx context.Context, b sheaf.Block) ([]byte, error) {
	c := worker.CallOf(ctx)
	me := who{os.Getenv("sheaf_replica"), string(b.Data), c}
	if string(b.Data) != "chain" {
		return json.Marshal(me)
	}
	var rest []byte
	if c.Rank+1 < c.Size {
		group, err := worker.Siblings(ctx)
		if err != nil {
			return nil, err
		}
		r, err := group.Send(ctx, c.Rank+1, b.Data)
		if err != nil {
			return nil, err
		}
		rest = r.Data
	}
	return append(fmt.Appendf(nil, "%d %s\n", c.Rank, me.ID), rest...), nil
}

// ranked starts a stack with a function "who" of n replicas.
func ranked(t *testing.T, n int) *local.Stack {
	t.Helper()
	s, err := local.Start(local.Config{Command: command, Log: quiet, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	labels := map[string]string{local.LabelMin: strconv.Itoa(n)}
	if err := s.Client().Deploy(t.Context(), types.FunctionDeployment{Service: "who", Image: "who", Labels: &labels}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the record of all replicas", func() bool {
		l := s.Registry.Records()
		return len(l) == 1 && len(l[0].View().Replicas) == n
	})
	return s
}

// views collects each view that the watcher writes.
type views struct {
	mu     sync.Mutex
	at     map[uint64]sheaf.View
	latest atomic.Uint64
}

func listen(t *testing.T, s *local.Stack) *views {
	t.Helper()
	nc, err := s.ConnectNATS("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	v := &views{at: map[uint64]sheaf.View{}}
	if _, err = nc.Subscribe(registry.ChangesSubject+".>", func(m *nats.Msg) {
		var rec registry.Record
		if err := json.Unmarshal(m.Data, &rec); err != nil || m.Subject != registry.ChangesSubject+"."+rec.Function {
			t.Errorf("on %s: %s, %v", m.Subject, m.Data, err)
		}
		v.mu.Lock()
		v.at[rec.Epoch] = rec.View()
		v.mu.Unlock()
		v.latest.Store(rec.Epoch)
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, rec := range s.Registry.Records() {
		v.mu.Lock()
		v.at[rec.Epoch] = rec.View()
		v.mu.Unlock()
		v.latest.Store(max(v.latest.Load(), rec.Epoch))
	}
	return v
}

// askRank calls a path of the function.
func askRank(t *testing.T, s *local.Stack, path string, body string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+"/function/who"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, answer
}

// Each call of a rank reaches the replica that has this rank at the epoch that
// the answer names, while the function is scaled 5, 8, 4 and back.
func TestRanksWhileScaling(t *testing.T) {
	s := ranked(t, 4)
	defer http.DefaultClient.CloseIdleConnections()
	seen := listen(t, s)
	sizes := []int{5, 8, 4}
	var calls, good, none, away, broke, wrong atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() { // a new size after each 12th of the calls
		for n := 0; int(calls.Load()) < *rankCalls; n++ {
			if err := s.Client().Scale(t.Context(), "who", sizes[n%len(sizes)]); err != nil {
				t.Error(err)
			}
			for until := calls.Load() + int64(*rankCalls/12); calls.Load() < until && int(calls.Load()) < *rankCalls; {
				time.Sleep(time.Millisecond)
			}
		}
	})
	for w := range 8 {
		wg.Go(func() {
			for n := w; int(calls.Add(1)) <= *rankCalls; n++ {
				rank, before := n%8, seen.latest.Load()
				resp, body := askRank(t, s, fmt.Sprintf("/-/%d/", rank), strconv.Itoa(n))
				var p struct {
					Code  string
					Limit int
				}
				switch resp.StatusCode {
				case 200:
					good.Add(1)
				case 404:
					none.Add(1)
					if json.Unmarshal(body, &p) != nil || p.Code != "no_such_rank" || p.Limit > rank || p.Limit == 0 {
						t.Errorf("rank %d does not exist: %s", rank, body)
					}
					continue
				case 503:
					away.Add(1)
					continue
				default:
					broke.Add(1)
					t.Logf("rank %d: %d %s", rank, resp.StatusCode, body)
					continue
				}
				var me who
				if err := json.Unmarshal(body, &me); err != nil {
					t.Error(err)
					continue
				}
				epoch, _ := strconv.ParseUint(resp.Header.Get("Sheaf-Epoch"), 10, 64)
				var v sheaf.View
				for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && v.Epoch == 0; time.Sleep(time.Millisecond) {
					seen.mu.Lock()
					v = seen.at[epoch]
					seen.mu.Unlock()
				}
				switch {
				case rank >= len(v.Replicas) || v.Replicas[rank].ID != me.ID,
					me.Rank != rank, me.Size != len(v.Replicas), me.Epoch != epoch, me.Data != strconv.Itoa(n),
					resp.Header.Get("Sheaf-Replica") != me.ID, len(resp.Header["Sheaf-Replica"]) != 1,
					resp.Header.Get("Sheaf-Rank") != strconv.Itoa(rank), resp.Header.Get("Sheaf-Size") != strconv.Itoa(me.Size):
					wrong.Add(1)
					t.Errorf("call %d of rank %d: %+v with %v answered; the view is %+v", n, rank, me, resp.Header, v)
				case epoch+20 < before:
					t.Errorf("call %d was by epoch %d, long after %d was published", n, epoch, before)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d calls: %d answered, %d misrouted, %d of ranks that there were not, %d told to wait, %d broken; %d epochs",
		*rankCalls, good.Load(), wrong.Load(), none.Load(), away.Load(), broke.Load(), len(seen.at))
	if good.Load() < int64(*rankCalls/2) {
		t.Error("too few calls were answered")
	}
	if bad := away.Load() + broke.Load(); bad > int64(*rankCalls/50) {
		t.Errorf("%d calls failed", bad)
	}
}

func TestRankRefusals(t *testing.T) {
	s := ranked(t, 2)
	defer http.DefaultClient.CloseIdleConnections()
	for _, c := range []struct {
		path   string
		status int
		code   string
		says   string
	}{
		{"/-/2/", 404, "no_such_rank", "2 ready replicas"},
		{"/-/x/", 404, "no_such_rank", "no rank"},
		{"/-/-1/", 404, "no_such_rank", "no rank"},
		{"/-/1/nothing", 404, "not_found", "at / only"}, // the worker's own word
	} {
		resp, body := askRank(t, s, c.path, "x")
		var p struct{ Code, Detail string }
		if err := json.Unmarshal(body, &p); err != nil || resp.StatusCode != c.status || p.Code != c.code || !strings.Contains(p.Detail, c.says) {
			t.Errorf("%s answers %d %s", c.path, resp.StatusCode, body)
		}
	}
	for range 8 { // whichever replica has the call
		resp, body := askRank(t, s, "/-/1", "x")
		if resp.StatusCode != 200 || resp.Header.Get("Sheaf-Rank") != "1" {
			t.Errorf("/-/1 without a slash answers %d %s", resp.StatusCode, body)
		}
	}
	// A large body on its way to another replica.
	large := strings.Repeat("0123456789abcdef", 1<<18)
	for rank := range 2 {
		_, body := askRank(t, s, fmt.Sprintf("/-/%d/", rank), large)
		var me who
		if err := json.Unmarshal(body, &me); err != nil || me.Data != large || me.Rank != rank {
			t.Errorf("4 MiB to rank %d: %d bytes came back, %v", rank, len(body), err)
		}
	}
}

// Workers speak to each other, without a gateway or a master between them.
func TestChainOfSiblings(t *testing.T) {
	s := ranked(t, 6)
	defer http.DefaultClient.CloseIdleConnections()
	view := s.Registry.Records()[0].View()
	var want bytes.Buffer
	for rank, r := range view.Replicas {
		fmt.Fprintf(&want, "%d %s\n", rank, r.ID)
	}
	resp, body := askRank(t, s, "/-/0/", "chain")
	if resp.StatusCode != 200 || string(body) != want.String() {
		t.Errorf("%d\n%s, want\n%s", resp.StatusCode, body, want.String())
	}
}
