package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	jobs "github.com/sheaf-project/sheaf/job"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/worker"
)

// loggedFunction is the environment variable that makes the test binary a
// worker that counts words, slowly, and appends a line with job and block to
// the file that it names.
const loggedFunction = "SHEAF_TEST_LOGGED"

func runLogged(log string) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	slow, _ := time.ParseDuration(os.Getenv("slow"))
	if os.Getenv("steps") != "" {
		runSteps(f, slow)
	}
	held := os.Getenv("held")
	worker.Main(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		if _, err := fmt.Fprintf(f, "%s %d\n", worker.CallOf(ctx).Job, b.Index); err != nil {
			return nil, err
		}
		select {
		case <-time.After(slow):
		case <-ctx.Done():
		}
		for held != "" && bytes.Contains(b.Data, []byte("held")) { // until the test lets it go
			if _, err := os.Stat(held); err != nil || ctx.Err() != nil {
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
		if _, err := os.Stat(held + ".poison"); err == nil && bytes.Contains(b.Data, []byte("poison")) {
			return nil, worker.Reject(errors.New("this block is poison"))
		}
		return wordcount.Count(ctx, b)
	})
}

// runs reads how often each block of each job was begun.
func runs(t *testing.T, log string) map[string]map[string]int {
	t.Helper()
	all, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	n := map[string]map[string]int{}
	for line := range strings.Lines(string(all)) {
		id, block, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n[id] == nil {
			n[id] = map[string]int{}
		}
		n[id][block]++
	}
	return n
}

// masters deploys a function that is a master of its own, for jobs of its own.
func (b *bench) masters(name string, n int, env map[string]string) {
	b.t.Helper()
	all := map[string]string{"worker_function": "logged", "GOMEMLIMIT": "44MiB"}
	maps.Copy(all, env)
	labels := map[string]string{local.LabelMin: strconv.Itoa(n), local.LabelMax: strconv.Itoa(n)}
	if err := b.Client().Deploy(b.t.Context(), types.FunctionDeployment{Service: name, Image: "sheaf/master", Labels: &labels, EnvVars: all}); err != nil {
		b.t.Fatal(err)
	}
}

// logged deploys the worker that logs.
func (b *bench) logged(n int, slow time.Duration) (log string) {
	b.t.Helper()
	log = filepath.Join(b.t.TempDir(), "runs.log")
	labels := map[string]string{local.LabelMin: strconv.Itoa(n), local.LabelMax: strconv.Itoa(n)}
	if err := b.Client().Deploy(b.t.Context(), types.FunctionDeployment{Service: "logged", Image: "logged", Labels: &labels,
		EnvVars: map[string]string{loggedFunction: log, "slow": slow.String(), "held": log + ".held"}}); err != nil {
		b.t.Fatal(err)
	}
	b.waitFor("logged", n)
	return log
}

// watchdog sees every entry of the store of jobs in the order in which they
// were stored, and tells of results that were not stored by the master that
// had the job then, and of jobs that had two final states in a row.
type watchdog struct {
	mu      sync.Mutex // guards all below
	faults  []string
	results int
	claims  int
	last    map[string]jobs.Record
	// A watch that NATS ends begins again without what was written over in the
	// meantime: a result can then be judged only once its job's record was seen.
	gap  int
	seen map[string]int // the gap after which a job's record was seen last
}

func (b *bench) watchdog() *watchdog {
	b.t.Helper()
	nc, err := b.ConnectNATS("test")
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(nc.Close)
	d := &watchdog{last: map[string]jobs.Record{}, seen: map[string]int{}}
	gap := func(*nats.Conn) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.gap++
	}
	nc.SetDisconnectErrHandler(func(nc *nats.Conn, _ error) { gap(nc) })
	nc.SetReconnectHandler(gap)
	js, err := jetstream.New(nc)
	if err != nil {
		b.t.Fatal(err)
	}
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) { // a master makes the bucket
		kv, err := js.KeyValue(b.t.Context(), jobs.Bucket)
		if err == nil {
			w, err := kv.WatchAll(b.t.Context(), jetstream.IncludeHistory())
			if err != nil {
				b.t.Fatal(err)
			}
			b.t.Cleanup(func() { _ = w.Stop() })
			go func() {
				for e := range w.Updates() {
					if e != nil {
						d.see(e)
					}
				}
			}()
			return d
		}
		if time.Since(begun) > 30*time.Second {
			b.t.Fatal(err)
		}
	}
}

func (d *watchdog) see(e jetstream.KeyValueEntry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	part := strings.SplitN(e.Key(), ".", 4)
	id := strings.TrimSuffix(part[0], "_openfaas-fn") + "/" + part[1]
	switch part[2] {
	case "state":
		var r jobs.Record
		if e.Operation() != jetstream.KeyValuePut || json.Unmarshal(e.Value(), &r) != nil {
			d.faults = append(d.faults, "not a record: "+e.Key())
			return
		}
		if was := d.last[id]; was.State.Final() && (r.State != jobs.Queued || r.Redrives != was.Redrives+1) {
			d.faults = append(d.faults, fmt.Sprintf("job %s went from %s to %s", id, was.State, r.State))
		}
		if r.State == jobs.Running {
			d.claims++
		}
		d.last[id] = r
		d.seen[id] = d.gap
	case "block":
		var head struct{ Epoch int }
		line, _, _ := bytes.Cut(e.Value(), []byte{'\n'})
		if err := json.Unmarshal(line, &head); err != nil {
			d.faults = append(d.faults, "not a result: "+e.Key())
		}
		d.results++
		if was := d.last[id]; d.seen[id] == d.gap && (was.State != jobs.Running || was.Epoch != head.Epoch) {
			d.faults = append(d.faults, fmt.Sprintf("block %s was stored under epoch %d, when the job was %s under epoch %d", part[3], head.Epoch, was.State, was.Epoch))
		}
	}
}

// check fails the test for whatever was wrong, and returns how many results
// were stored, and how much was wrong.
func (d *watchdog) check(t *testing.T) (results, wrong int) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.faults {
		t.Error(f)
	}
	t.Logf("%d results and %d claims were stored, %d of them wrongly", d.results, d.claims, len(d.faults))
	return d.results, len(d.faults)
}

// persist sends a request until it is answered by a master, as a client that
// retries does, and returns how often it was sent.
func (b *bench) persist(method, path, body string, header ...string) (a answer, tries int) {
	b.t.Helper()
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		tries++
		req, err := http.NewRequestWithContext(b.t.Context(), method, b.URL+path, strings.NewReader(body))
		if err != nil {
			b.t.Error(err)
			return a, tries
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Add(header[i], header[i+1])
		}
		if resp, err := client.Do(req); err == nil {
			a, err = whole(resp)
			if err == nil && a.status < 500 {
				return a, tries
			}
		}
		if time.Since(begun) > time.Minute {
			b.t.Errorf("%s %s: no answer within a minute; the last was %d %s", method, path, a.status, a.body)
			return a, tries
		}
	}
}

// Fault 5: a master is killed before and after each step that is stored.
// Another one goes on: one result, the right one, and no block that had a
// result is run again.
func TestMasterDiesAtEachStep(t *testing.T) {
	b := start(t, 1, nil)
	log := b.logged(3, 2*time.Millisecond)
	dog := b.watchdog()
	type death struct {
		step string
		nth  int
	}
	var deaths []death
	for _, step := range []string{"input", "submit", "claim", "end"} {
		for _, when := range []string{".before", ".after"} {
			deaths = append(deaths, death{step + when, 1})
		}
	}
	for _, nth := range []int{1, 13, 40} {
		deaths = append(deaths, death{"block.before", nth}, death{"block.after", nth})
	}
	names := make([]string, len(deaths))
	marks := t.TempDir()
	for i, d := range deaths {
		names[i] = fmt.Sprintf("m%d", i)
		b.masters(names[i], 2, map[string]string{"sheaf_kill_at": fmt.Sprintf("%s:%d:%s/%s", d.step, d.nth, marks, names[i])})
	}
	for _, name := range names {
		b.waitFor(name, 2)
	}
	in := text(7, 40_000)
	want := sequential(in)
	var wg sync.WaitGroup
	for i, d := range deaths {
		wg.Go(func() {
			path := "/function/" + names[i] + "/jobs"
			key := strings.ReplaceAll(d.step, ".", "-") + strconv.Itoa(d.nth)
			a, tries := b.persist("POST", path+"?block=1000", in, "Idempotency-Key", key)
			if a.status != 202 && a.status != 200 || tries > 3 {
				t.Errorf("%s: accepted after %d tries with %d %s", key, tries, a.status, a.body)
			}
			a, _ = b.persist("GET", path+"/"+key+"/result", "", "Prefer", "wait=50")
			if a.status != 200 || a.body != want {
				t.Errorf("%s: the result is %d %.200s", key, a.status, a.body)
			}
			told, _ := b.persist("GET", path+"/"+key, "")
			var j job
			if err := json.Unmarshal([]byte(told.body), &j); err != nil || j.State != "succeeded" || j.Blocks.Done != j.Blocks.Total {
				t.Errorf("%s: ended as %s", key, told.body)
			}
			if _, err := os.Stat(filepath.Join(marks, names[i])); err != nil {
				t.Errorf("%s: nobody died", key)
			}
			again := 0
			for _, n := range runs(t, log)[key] {
				again += n - 1
			}
			// What was under way at the death: 2 attempts on each of 3 workers, and
			// the results that were on their way to the store.
			if again > 14 || len(runs(t, log)[key]) != j.Blocks.Total {
				t.Errorf("%s: %d of %d blocks were run, %d again", key, len(runs(t, log)[key]), j.Blocks.Total, again)
			}
		})
	}
	wg.Wait()
	dog.check(t)
}

// Fault 6: a master is stopped for longer than its lease and then goes on. Its
// job is another's by then, and it writes nothing.
func TestMasterStopsPastItsLease(t *testing.T) {
	b := start(t, 1, nil)
	log := b.logged(2, 20*time.Millisecond)
	dog := b.watchdog()
	b.masters("chief", 2, nil)
	b.waitFor("chief", 2)
	in := text(8, 60_000)
	a, _ := b.persist("POST", "/function/chief/jobs?block=300", in, "Idempotency-Key", "stopped")
	if a.status != 202 {
		t.Fatalf("submit: %d %s", a.status, a.body)
	}
	var owner string
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		var j struct {
			job
			Master string
		}
		a := b.do("GET", "/function/chief/jobs/stopped", "")
		if json.Unmarshal([]byte(a.body), &j) == nil && j.State == "running" && j.Blocks.Done > 5 {
			owner = j.Master
			break
		}
		if time.Since(begun) > 30*time.Second {
			t.Fatalf("the job does not run: %s", a.body)
		}
	}
	pid := processOf(t, owner)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }() // it may have ended
	for dog.epoch("chief/stopped") < 2 {
		if time.Since(stopped) > 30*time.Second {
			t.Fatal("nobody took the job")
		}
		time.Sleep(time.Millisecond)
	}
	t.Logf("taken over after %v", time.Since(stopped))
	time.Sleep(300 * time.Millisecond)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	got, _ := b.persist("GET", "/function/chief/jobs/stopped/result", "", "Prefer", "wait=50")
	if got.status != 200 || got.body != sequential(in) {
		t.Errorf("the result is %d %.200s", got.status, got.body)
	}
	again := 0
	for _, n := range runs(t, log)["stopped"] {
		again += n - 1
	}
	t.Logf("%d blocks were run again", again)
	dog.check(t)
}

// epoch is the epoch of a running job.
func (d *watchdog) epoch(id string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last[id].Epoch
}

// processOf finds the process of a replica; a master's name begins with it.
func processOf(t *testing.T, master string) int {
	t.Helper()
	for _, pid := range functions(t, os.Getpid()) {
		env, err := os.ReadFile("/proc/" + pid + "/environ")
		if err != nil {
			continue
		}
		for v := range bytes.SplitSeq(env, []byte{0}) {
			if id, is := strings.CutPrefix(string(v), "sheaf_replica="); is && strings.HasPrefix(master, id+"-") {
				n, err := strconv.Atoi(pid)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	t.Fatalf("no process is master %s", master)
	return 0
}
