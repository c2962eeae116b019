package test

// soak_test.go runs jobs of all three ways at once while everything that they
// stand on is killed, stopped, slowed and taken away, and compares each answer
// with a sequential count. make soak runs it at full size, and make reliability
// writes what came of it to docs/RELIABILITY.md.

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/local"
)

var (
	soakJobs   = flag.Int("soak.jobs", 18, "jobs that run while everything fails: plain calls, durable jobs and asynchronous calls in turn")
	soakKill   = flag.Duration("soak.kill", 150*time.Millisecond, "a worker is killed, stopped or slowed so often")
	soakMaster = flag.Duration("soak.master", time.Second, "a master is killed, or stopped for longer than its lease, so often; 0 means never")
	soakNATS   = flag.Duration("soak.nats", 2*time.Second, "NATS ends so often, and comes back; 0 means never")
	soakSeed   = flag.Uint64("soak.seed", 0, "what fails, and when; 0 means another each time")
	soakReport = flag.String("soak.report", "", "`file` to write what happened to, as JSON")
)

// soakPatience is how long a job may take in all. One that was accepted and has
// not ended by then is lost.
const soakPatience = 3 * time.Minute

// soakCallbacks is how many of 100 callbacks fail.
const soakCallbacks = 30

// report is what happened in a soak.
type report struct {
	Seed    uint64
	Command string
	Commit  string
	Machine string
	Seconds float64
	Jobs    map[string]int // with the right answer, by the way they came
	Faults  map[string]int // by kind
	Wrong   int            // answers that differ from a sequential count
	Lost    int            // jobs that were accepted and never ended
	Failed  map[string]int // jobs that ended as failed, by code; each was right when it was redriven, or sent again
	Again   int            // requests that were not answered, or refused for now, and sent again
	Blocks  int            // that were run
	Repeats int            // of blocks
	Stored  int            // results of blocks of jobs
	Stale   int            // of those and of final states, by a master that had lost its job
}

// soak is a soak under way.
type soak struct {
	*bench
	sink *httptest.Server

	mu     sync.Mutex // guards all below
	report report
	calls  map[string]*soakCall // asynchronous ones, by ID
}

// soakCall is what an asynchronous call expects.
type soakCall struct {
	want   string
	failed string        // what the callback said, if the call failed
	told   bool          // a callback was taken
	done   chan struct{} // closed then
}

func (s *soak) fault(kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Faults[kind]++
}

// wrong notes an answer that is not the right one.
func (s *soak) wrong(what, got string) {
	s.t.Errorf("%s: a wrong answer: %.200s", what, got)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Wrong++
}

func (s *soak) lost(what, last string) {
	s.t.Errorf("%s: not over after %v: %.500s", what, soakPatience, last)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Lost++
}

// failed notes a job that says that it failed, and why. It is done again.
func (s *soak) failed(what, code, body string) {
	s.t.Logf("%s failed, and is done again: %.600s", what, body)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Failed[code]++
}

func (s *soak) again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Again++
}

// pid finds the process of a replica; 0 means that it has ended.
func (s *soak) pid(replica string) int {
	for _, pid := range functions(s.t, os.Getpid()) {
		env, err := os.ReadFile("/proc/" + pid + "/environ")
		if err == nil && slices.Contains(strings.Split(string(env), "\x00"), "sheaf_replica="+replica) {
			n, _ := strconv.Atoi(pid) // it is the name of a folder of /proc
			return n
		}
	}
	return 0
}

// halt stops a replica's process for so long.
func halt(pid int, d time.Duration) {
	if syscall.Kill(pid, syscall.SIGSTOP) == nil {
		time.Sleep(d)
		_ = syscall.Kill(pid, syscall.SIGCONT) // it may have been killed
	}
}

// every does what fails so often, until ctx ends, and waits for it.
func every(ctx context.Context, seed, stream uint64, interval time.Duration, fail func(rnd *rand.Rand, wg *sync.WaitGroup)) {
	if interval <= 0 {
		return
	}
	rnd := rand.New(rand.NewPCG(seed, stream))
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(interval/2 + time.Duration(rnd.Int64N(int64(interval)))):
			fail(rnd, &wg)
		}
	}
}

func between(rnd *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(rnd.Int64N(int64(most-least)))
}

// failWorker kills a worker, stops it for a while, or slows it to a tenth.
func (s *soak) failWorker(rnd *rand.Rand, wg *sync.WaitGroup) {
	how, which, d := rnd.IntN(10), rnd.Int(), between(rnd, 200*time.Millisecond, 1500*time.Millisecond)
	rs := s.replicas("logged")
	if len(rs) == 0 {
		return
	}
	r := rs[which%len(rs)].ID
	if how < 6 {
		if s.Client().Kill(context.Background(), "logged", r) == nil {
			s.fault("worker killed (kill -9)")
		}
		return
	}
	pid := s.pid(r)
	if pid == 0 {
		return
	}
	if how < 8 {
		s.fault("worker stopped for up to 1.5 s (SIGSTOP, SIGCONT)")
		wg.Go(func() { halt(pid, d) })
		return
	}
	s.fault("worker slowed to a tenth for up to 1.5 s")
	wg.Go(func() {
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			halt(pid, 18*time.Millisecond)
		}
	})
}

// failMaster kills a master, or stops it for longer than its lease.
func (s *soak) failMaster(rnd *rand.Rand, wg *sync.WaitGroup) {
	how, which, d := rnd.IntN(10), rnd.Int(), between(rnd, 1300*time.Millisecond, 2500*time.Millisecond)
	rs := s.replicas("chief")
	if len(rs) == 0 {
		return
	}
	r := rs[which%len(rs)].ID
	if how < 7 {
		if s.Client().Kill(context.Background(), "chief", r) == nil {
			s.fault("master killed (kill -9)")
		}
	} else if pid := s.pid(r); pid != 0 {
		s.fault("master stopped for longer than its lease (SIGSTOP, SIGCONT)")
		wg.Go(func() { halt(pid, d) })
	}
}

// failNATS ends NATS, and starts it again on what it had stored.
func (s *soak) failNATS(rnd *rand.Rand, _ *sync.WaitGroup) {
	s.StopNATS()
	s.fault("NATS ended and started again, away for up to 1.5 s")
	time.Sleep(between(rnd, 100*time.Millisecond, 1500*time.Millisecond))
	if err := s.StartNATS(); err != nil {
		s.t.Errorf("NATS does not start again: %v", err)
	}
}

// listen takes callbacks, of which some fail: refused, cut off once they were
// read, or left without an answer.
func (s *soak) listen(seed uint64) {
	var mu sync.Mutex // guards rnd
	rnd := rand.New(rand.NewPCG(seed, 4))
	s.sink = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		id, status := r.Header.Get("X-Call-Id"), r.Header.Get("X-Function-Status")
		s.mu.Lock()
		c := s.calls[id]
		s.mu.Unlock()
		if c == nil || status == "200" && string(body) != c.want {
			s.wrong("callback of call "+id, string(body))
			return
		}
		mu.Lock()
		fail, how := rnd.IntN(100) < soakCallbacks, rnd.IntN(3)
		mu.Unlock()
		switch {
		case fail && how == 0:
			s.fault("callback refused (500)")
			w.WriteHeader(http.StatusInternalServerError)
			return
		case fail && how == 1:
			s.fault("callback reset once it was read")
			if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
				_ = conn.(*net.TCPConn).SetLinger(0)
				_ = conn.Close()
			}
			return
		case fail:
			s.fault("callback closed without an answer")
			panic(http.ErrAbortHandler)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if c.told {
			s.report.Faults["callback that came twice"]++
			return
		}
		if c.told = true; status != "200" {
			c.failed = status + " " + string(body)
		}
		close(c.done)
	}))
	s.t.Cleanup(s.sink.Close)
}

// send sends a request once. Anything but a whole answer is ok false.
func (s *soak) send(method, path, body string, header ...string) (a answer, ok bool) {
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, s.URL+path, strings.NewReader(body))
	if err != nil {
		s.t.Error(err)
		return a, false
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err == nil {
		a, err = whole(resp)
	}
	if err != nil {
		a.body = err.Error()
	}
	return a, err == nil
}

// until sends a request, again and again, until its status is one of those. All
// other answers must say that it may be sent again.
func (s *soak) until(end time.Time, method, path, body string, header []string, statuses ...int) (a answer, ok bool) {
	for time.Now().Before(end) {
		var whole bool
		if a, whole = s.send(method, path, body, header...); whole {
			if slices.Contains(statuses, a.status) {
				return a, true
			}
			if a.status < 500 && a.status != http.StatusTooManyRequests {
				s.t.Errorf("%s %s: %d %s", method, path, a.status, a.body)
			}
		}
		s.again()
		time.Sleep(50 * time.Millisecond)
	}
	return a, false
}

// plain is a call that is answered, or sent again by its caller.
func (s *soak) plain(i int, in, want string) bool {
	path := "/function/chief?block=600"
	if i%2 == 1 {
		path += "&route=gateway"
	}
	end := time.Now().Add(soakPatience)
	a, ok := s.until(end, "POST", path, in, nil, http.StatusOK, http.StatusFailedDependency)
	for ok && a.status == http.StatusFailedDependency { // a block took down three replicas, by chance: it is named
		s.failed(fmt.Sprintf("plain call %d", i), a.header.Get("Sheaf-Code"), a.body)
		a, ok = s.until(end, "POST", path, in, nil, http.StatusOK, http.StatusFailedDependency)
	}
	if !ok {
		s.lost(fmt.Sprintf("plain call %d", i), a.body)
		return false
	}
	if a.body != want {
		s.wrong(fmt.Sprintf("plain call %d", i), a.body)
		return false
	}
	return true
}

// durable is a job that is stored, and asked for until it is over.
func (s *soak) durable(key, in, want string) bool {
	end := time.Now().Add(soakPatience)
	a, ok := s.until(end, "POST", "/function/chief/jobs?block=600", in, []string{"Idempotency-Key", key}, http.StatusOK, http.StatusAccepted)
	if !ok {
		s.lost(key, "it was never accepted: "+a.body)
		return false
	}
	return s.settle(key, want, end)
}

// async is an asynchronous call, which a callback tells of.
func (s *soak) async(key, in, want string) bool {
	end := time.Now().Add(soakPatience)
	c := &soakCall{want: want, done: make(chan struct{})}
	s.mu.Lock()
	s.calls[key] = c
	s.mu.Unlock()
	a, ok := s.until(end, "POST", "/async-function/chief?block=600", in, []string{"X-Call-Id", key, "X-Callback-Url", s.sink.URL}, http.StatusAccepted)
	if !ok {
		s.lost(key, "it was never accepted: "+a.body)
		return false
	}
	select {
	case <-c.done:
	case <-time.After(time.Until(end)):
		a, _ := s.send("GET", "/system/async/"+key, "")
		s.lost(key, "no callback came: "+a.body)
		return false
	}
	if c.failed != "" {
		s.t.Logf("%s: called back as failed: %.300s", key, c.failed)
	}
	return s.settle(key, want, end) // it is a job, too
}

// settle waits for the end of a job, redrives it if it failed, and compares.
func (s *soak) settle(key, want string, end time.Time) bool {
	path := "/function/chief/jobs/" + key
	for time.Now().Before(end) {
		a, ok := s.until(end, "GET", path, "", nil, http.StatusOK)
		var j job
		if err := json.Unmarshal([]byte(a.body), &j); ok && err != nil {
			s.wrong(key, a.body)
			return false
		}
		switch j.State {
		case "succeeded":
			if a, ok = s.until(end, "GET", path+"/result", "", nil, http.StatusOK); ok && a.body != want {
				s.wrong(key, a.body)
			}
			return ok && a.body == want
		case "failed":
			s.failed(key, j.Error.Code, a.body)
			s.until(end, "POST", path+"/redrive", "", nil, http.StatusOK, http.StatusAccepted, http.StatusConflict) // it may have been redriven, and the answer lost
		case "cancelled":
			s.wrong(key, "nobody cancelled it: "+a.body)
			return false
		}
		time.Sleep(20 * time.Millisecond)
	}
	a, _ := s.send("GET", path, "")
	s.lost(key, a.body)
	return false
}

// Goals 20 and 21, faults 2, 5, 6, 9, 10, 31, 35, 48, 54, 55: workers, masters
// and NATS fail at random, and callbacks, too. Each job that was accepted is
// right in the end; none is lost; no master writes for a job that it has lost.
func TestSoak(t *testing.T) {
	seed := *soakSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	call := fmt.Sprintf("make soak JOBS=%d KILL=%v MASTER=%v NATS=%v SEED=%d", *soakJobs, *soakKill, *soakMaster, *soakNATS, seed)
	t.Log(call)
	b := startWith(t, local.Config{Command: command, Async: local.AsyncConfig{
		Lease: 2 * time.Second, StopWait: time.Second, Retry: local.Retry{Attempts: 100, MinWait: 100 * time.Millisecond, MaxWait: time.Second},
		CallbackMinWait: 50 * time.Millisecond, CallbackMaxWait: 500 * time.Millisecond}})
	s := &soak{bench: b, calls: map[string]*soakCall{}, report: report{Seed: seed, Command: call, Jobs: map[string]int{}, Faults: map[string]int{}, Failed: map[string]int{}}}
	log := b.logged(5, 15*time.Millisecond)
	b.masters("chief", 3, nil)
	b.waitFor("chief", 3)
	dog := b.watchdog()
	s.listen(seed)

	begun := time.Now()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var failing, wg sync.WaitGroup
	failing.Go(func() { every(ctx, seed, 1, *soakKill, s.failWorker) })
	failing.Go(func() { every(ctx, seed, 2, *soakMaster, s.failMaster) })
	failing.Go(func() { every(ctx, seed, 3, *soakNATS, s.failNATS) })
	next := make(chan int)
	for range 6 {
		wg.Go(func() {
			for i := range next {
				in := text(seed+uint64(i), 60_000)
				want, key := sequential(in), fmt.Sprintf("soak-%d", i)
				var way string
				var right bool
				switch i % 3 {
				case 0:
					way, right = "plain call", s.plain(i/3, in, want)
				case 1:
					way, right = "durable job", s.durable(key, in, want)
				case 2:
					way, right = "asynchronous call with callback", s.async(key, in, want)
				}
				if right {
					s.mu.Lock()
					s.report.Jobs[way]++
					s.mu.Unlock()
				}
			}
		})
	}
	for i := range *soakJobs {
		next <- i
	}
	close(next)
	wg.Wait()
	stop()
	failing.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	r := &s.report
	r.Seconds = time.Since(begun).Seconds()
	for _, job := range runs(t, log) {
		for n := range maps.Values(job) {
			r.Blocks++
			r.Repeats += n - 1
		}
	}
	r.Stored, r.Stale = dog.check(t)
	right, faults := 0, 0
	for n := range maps.Values(r.Jobs) {
		right += n
	}
	for n := range maps.Values(r.Faults) {
		faults += n
	}
	t.Logf("%d jobs right of %d: %v; wrong %d, lost %d, failed at first %v", right, *soakJobs, r.Jobs, r.Wrong, r.Lost, r.Failed)
	t.Logf("%d faults in %.0f s: %v; %d blocks, %d of them again; %d requests sent again", faults, r.Seconds, r.Faults, r.Blocks, r.Repeats, r.Again)
	if right != *soakJobs && !t.Failed() {
		t.Error("jobs are missing")
	}
	if faults == 0 {
		t.Error("nothing failed: the test shows nothing")
	}
	if *soakReport != "" {
		s.write()
	}
}

// write writes the report for docs/RELIABILITY.md.
func (s *soak) write() {
	said := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).Output()
		if err != nil {
			s.t.Error(err)
		}
		return strings.TrimSpace(string(out))
	}
	r := &s.report
	r.Commit = said("git", "rev-parse", "--short=12", "HEAD")
	if said("git", "status", "--porcelain", "--", "../*.go", "../go.mod") != "" {
		r.Commit += ", changed"
	}
	r.Machine = fmt.Sprintf("%d cores, %s, %s", runtime.NumCPU(), memorySize(s.t), runtime.GOOS+"/"+runtime.GOARCH)
	out, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(*soakReport, append(out, '\n'), 0o644); err != nil {
		s.t.Error(err)
	}
}

// memorySize is how much memory the machine has.
func memorySize(t testing.TB) string {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	var kib int
	if _, err := fmt.Sscanf(string(info), "MemTotal: %d kB", &kib); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%.0f GiB", float64(kib)/(1<<20))
}
