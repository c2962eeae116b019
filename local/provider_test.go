package local_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/local"
)

// The calls are those that faas-cli makes.
func TestFunctionAPI(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	if bad := m.SetSecret("tok", []byte("abc"), true); bad != nil {
		t.Fatal(bad)
	}
	spec := `{"service":"web","image":"web","envVars":{"version":"1"},"secrets":["tok"],"labels":{"com.openfaas.scale.min":"1","com.openfaas.scale.max":"3","role":"x"},"annotations":{"topic":"a, b"},"limits":{"memory":"64Mi","cpu":"100m"}}`
	for _, c := range []struct {
		name, method, path, body string
		status                   int
	}{
		{"update of what is not there", "PUT", "/system/functions", spec, 404},
		{"create", "POST", "/system/functions", spec, 202},
		{"update", "PUT", "/system/functions", spec, 202},
		{"unknown image", "POST", "/system/functions", `{"service":"b","image":"nosuch"}`, 400},
		{"bad name", "POST", "/system/functions", `{"service":"B_","image":"web"}`, 422},
		{"other namespace", "POST", "/system/functions", `{"service":"b","image":"web","namespace":"kube-system"}`, 403},
		{"own namespace", "PUT", "/system/functions", strings.Replace(spec, `"image"`, `"namespace":"openfaas-fn","image"`, 1), 202},
		{"label that is no number", "POST", "/system/functions", `{"service":"b","image":"web","labels":{"com.openfaas.scale.min":"x"}}`, 400},
		{"min over max", "POST", "/system/functions", `{"service":"b","image":"web","labels":{"com.openfaas.scale.min":"3","com.openfaas.scale.max":"2"}}`, 400},
		{"no JSON", "POST", "/system/functions", `<html>`, 400},
		{"status", "GET", "/system/function/web?usage=1", "", 200},
		{"status with the namespace", "GET", "/system/function/web.openfaas-fn?namespace=openfaas-fn", "", 200},
		{"status elsewhere", "GET", "/system/function/web?namespace=dev", "", 404},
		{"status of nobody", "GET", "/system/function/nobody", "", 404},
		{"scale of nobody", "POST", "/system/scale-function/nobody", `{"serviceName":"nobody","replicas":1}`, 404},
		{"scale elsewhere", "POST", "/system/scale-function/web?namespace=dev", `{"serviceName":"web","replicas":0}`, 404},
		{"scale", "POST", "/system/scale-function/web?namespace=openfaas-fn", `{"serviceName":"web","replicas":2}`, 202},
		{"replicas of nobody", "GET", "/system/replicas/nobody", "", 404},
		{"logs of nobody", "GET", "/system/logs?name=nobody", "", 404},
		{"logs elsewhere", "GET", "/system/logs?name=web&namespace=dev", "", 404},
		{"logs with a bad tail", "GET", "/system/logs?name=web&tail=x", "", 422},
		{"kill of nobody", "DELETE", "/system/replicas/web/web-0", "", 404},
		{"delete elsewhere", "DELETE", "/system/functions", `{"functionName":"web","namespace":"dev"}`, 404},
		{"delete of nobody", "DELETE", "/system/functions", `{"functionName":"nobody"}`, 404},
		{"healthz", "GET", "/healthz", "", 200},
		{"info", "GET", "/system/info", "", 200},
		{"nothing", "GET", "/system/nothing", "", 404},
	} {
		if status, body := m.call(c.method, c.path, c.body); status != c.status {
			t.Errorf("%s: %d %s, want %d", c.name, status, body, c.status)
		}
	}
	m.ready("web", 2)
	_, list := m.call("GET", "/system/functions", "")
	var got []types.FunctionStatus
	if err := json.Unmarshal([]byte(list), &got); err != nil || len(got) != 1 {
		t.Fatalf("list: %s, %v", list, err)
	}
	f := got[0]
	if f.Name != "web" || f.Image != "web" || f.Namespace != "openfaas-fn" || f.Replicas != 2 || f.AvailableReplicas != 2 || f.EnvVars["version"] != "1" ||
		(*f.Labels)["role"] != "x" || (*f.Annotations)["topic"] != "a, b" || f.Limits.Memory != "64Mi" || f.Secrets[0] != "tok" || f.CreatedAt.IsZero() {
		t.Errorf("list: %s", list)
	}
	if _, one := m.call("GET", "/system/function/web?usage=1", ""); "["+strings.TrimSpace(one)+"]" != strings.TrimSpace(list) {
		t.Errorf("status %s differs from the list %s", one, list)
	}
	if _, body := m.call("GET", "/system/functions?namespace=dev", ""); body != "[]\n" {
		t.Errorf("list elsewhere: %s", body)
	}
	if _, body := m.call("GET", "/system/namespaces", ""); body != "[\"openfaas-fn\"]\n" {
		t.Errorf("namespaces: %s", body)
	}

	m.call("POST", "/system/scale-function/web", `{"serviceName":"web","replicas":99}`)
	m.ready("web", 3) // the label
	if status, _ := m.call("PUT", "/system/functions", `{"service":"web","image":"web","labels":{"com.openfaas.scale.max":"2"}}`); status != 202 {
		t.Error(status)
	}
	m.ready("web", 2) // the new label
	m.call("POST", "/system/scale-function/web", `{"serviceName":"web","replicas":0}`)
	m.ready("web", 0)
	if status, body := m.call("POST", "/function/web", "hi"); status != 200 {
		t.Errorf("call of what is scaled to zero: %d %s", status, body)
	}
	m.ready("web", 1)
	pid := m.see("web").PID
	if status, body := m.call("DELETE", "/system/functions", `{"functionName":"web"}`); status != 202 {
		t.Errorf("delete: %d %s", status, body)
	}
	if status, _ := m.call("GET", "/system/function/web", ""); status != 404 {
		t.Errorf("deleted function has status %d", status)
	}
	eventually(t, 5*time.Second, "end of the deleted function's process", func() bool { return !alive(pid) })
}

func deployment(name, image string) types.FunctionDeployment {
	return types.FunctionDeployment{Service: name, Image: image}
}

// see calls a web function and returns what it saw.
func (m *machine) see(name string) (s seen) {
	m.t.Helper()
	if status, body := m.call("POST", "/function/"+name, ""); status != 200 || json.Unmarshal([]byte(body), &s) != nil {
		m.t.Fatalf("call of %s: %d %s", name, status, body)
	}
	return s
}

func TestKilledReplicaIsReplaced(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 3)
	before := m.ready("web", 3)
	s := m.see("web")
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var after []sheaf.Replica
	took := eventually(t, 5*time.Second, "the replacement", func() bool {
		after = m.ready("web", 3)
		return !slices.ContainsFunc(after, func(r sheaf.Replica) bool { return r.ID == s.Replica })
	})
	t.Logf("replaced after %v", took.Round(time.Millisecond))
	same := 0
	for _, r := range after {
		if slices.ContainsFunc(before, func(b sheaf.Replica) bool { return b.ID == r.ID && b.URL == r.URL }) {
			same++
		}
	}
	if same != 2 {
		t.Errorf("%d replicas stayed, want 2: %v then %v", same, before, after)
	}
	// By the API, with either form of the name.
	for _, name := range []string{"web", "web.openfaas-fn"} {
		victim := m.ready("web", 3)[0].ID
		if status, body := m.call("DELETE", "/system/replicas/"+name+"/"+victim, ""); status != 202 {
			t.Errorf("kill %s: %d %s", name, status, body)
		}
		eventually(t, 5*time.Second, "the replacement", func() bool {
			return !slices.ContainsFunc(m.ready("web", 3), func(r sheaf.Replica) bool { return r.ID == victim })
		})
	}
}

// A replica that hangs is killed and replaced; one that has never said that it
// lives is not.
func TestHungReplicaIsReplaced(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.Liveness = 300 * time.Millisecond
	m.deploy("web", "web", 1)
	plain := deployment("plain", "web")
	plain.EnvVars = map[string]string{"health": "404"}
	if bad := m.Deploy(plain, true); bad != nil {
		t.Fatal(bad)
	}
	m.ready("plain", 1)
	hung, busy := m.see("web"), m.see("plain")
	time.Sleep(5 * m.Liveness) // they have been asked
	for _, pid := range []int{busy.PID, hung.PID} {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, "the replacement", func() bool { return m.ready("web", 1)[0].ID != hung.Replica })
	if log := strings.Join(m.lines("name=web"), "\n"); !strings.Contains(log, "replica hangs: 3 times no answer") {
		t.Errorf("the log does not say that the replica hung:\n%s", log)
	}
	if now := m.ready("plain", 1)[0]; now.ID != busy.Replica {
		t.Errorf("%s, which never said that it lives, was replaced", busy.Replica)
	}
}

// A function that dies young is not started in a busy loop.
func TestBackOff(t *testing.T) {
	for _, c := range []struct {
		image string
		most  int
	}{{"crash", 7}, {"missing", 7}, {"shortlived", 25}} {
		t.Run(c.image, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			if bad := m.Deploy(deployment("f", c.image), true); bad != nil {
				t.Fatal(bad)
			}
			time.Sleep(2 * time.Second)
			starts := 0
			for _, l := range m.lines("name=f") {
				if strings.Contains(l, "replica ended") {
					starts++
				}
			}
			t.Logf("%s: %d starts in 2s", c.image, starts)
			if starts < 2 || starts > c.most {
				t.Errorf("%d starts in 2s, want 2 to %d", starts, c.most)
			}
			m.front.StartWait = 50 * time.Millisecond
			if c.image != "shortlived" {
				if status, body := m.call("POST", "/function/f", ""); status != 503 || !strings.Contains(body, "no_replicas") {
					t.Errorf("call: %d %s", status, body)
				}
			}
		})
	}
}

// storm calls a function again and again, from several callers, until stop is
// called, which returns the answers of the calls that did not succeed.
func (m *machine) storm(path string, callers int) (count *atomic.Int64, stop func() []string) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed []string
	count = new(atomic.Int64)
	ctx, cancel := context.WithCancel(context.Background())
	for range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				status, body, err := m.try("POST", path, "some body")
				if count.Add(1); status != 200 || err != nil {
					mu.Lock()
					failed = append(failed, fmt.Sprintf("%d %s %v", status, body, err))
					mu.Unlock()
				}
			}
		})
	}
	return count, func() []string { cancel(); wg.Wait(); return failed }
}

func TestNoCallIsLostWhileScaling(t *testing.T) {
	for _, image := range []string{"web", "worker", "stubborn"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			m.DrainTime = time.Second
			m.deploy("f", image, 1)
			path := "/function/f/sleep?for=20ms"
			if image == "worker" {
				path = "/function/f"
			}
			count, stop := m.storm(path, 8)
			rounds := 0
			for ; rounds < 3 || count.Load() < 200; rounds++ {
				for _, n := range []int{4, 1} {
					if bad := m.Scale("f", n); bad != nil {
						t.Fatal(bad)
					}
					m.ready("f", n)
				}
			}
			failed := stop()
			t.Logf("%s: %d of %d calls lost in %d rounds of 1 to 4 to 1", image, len(failed), count.Load(), rounds)
			if len(failed) > 0 {
				t.Errorf("lost: %v", failed[:min(len(failed), 5)])
			}
		})
	}
}

func TestUpdateRolls(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.DrainTime = time.Second
	m.deploy("f", "web", 3)
	before := m.ready("f", 3)
	count, stop := m.storm("/function/f/sleep?for=5ms", 4)
	for v := 2; v <= 4; v++ {
		spec := fmt.Sprintf(`{"service":"f","image":"web","envVars":{"version":"%d"},"labels":{"com.openfaas.scale.min":"3"}}`, v)
		if status, body := m.call("PUT", "/system/functions", spec); status != 202 {
			t.Fatal(status, body)
		}
		least := 3
		eventually(t, 10*time.Second, "all replicas anew", func() bool {
			view, ready := m.replicas("f"), 0
			for _, r := range view.Replicas {
				if r.State == sheaf.Ready {
					ready++
				}
			}
			least = min(least, ready)
			return len(view.Replicas) == 3 && ready == 3 && !slices.ContainsFunc(view.Replicas, func(r sheaf.Replica) bool {
				return slices.ContainsFunc(before, func(b sheaf.Replica) bool { return b.ID == r.ID })
			})
		})
		if least < 3 {
			t.Errorf("there were but %d ready replicas during the update", least)
		}
		before = m.ready("f", 3)
		if got := m.see("f").Version; got != strconv.Itoa(v) {
			t.Errorf("version %s answers after the update to %d", got, v)
		}
	}
	if failed := stop(); len(failed) > 0 {
		t.Errorf("%d of %d calls failed: %v", len(failed), count.Load(), failed[:min(len(failed), 5)])
	}
	t.Logf("0 of %d calls failed in 3 updates", count.Load())
}

// An update that cannot start leaves the old replicas at work.
func TestBrokenUpdateKeepsTheOld(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("f", "web", 2)
	if bad := m.Deploy(types.FunctionDeployment{Service: "f", Image: "crash", Labels: &map[string]string{local.LabelMin: "2"}}, false); bad != nil {
		t.Fatal(bad)
	}
	time.Sleep(500 * time.Millisecond)
	for range 5 {
		m.see("f")
	}
	if bad := m.Deploy(types.FunctionDeployment{Service: "f", Image: "web", Labels: &map[string]string{local.LabelMin: "2"}}, false); bad != nil {
		t.Fatal(bad)
	}
	m.ready("f", 2)
}

func TestScaleDownSparesWhoIsReady(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("f", "slow", 1)
	first := m.ready("f", 1)[0].ID
	for range 3 { // the replicas that are still starting go, not the one that works
		m.Scale("f", 4)
		time.Sleep(20 * time.Millisecond)
		m.Scale("f", 1)
		if got := m.ready("f", 1)[0].ID; got != first {
			t.Fatalf("replica %s is left, want %s", got, first)
		}
	}
	m.Scale("f", 3)
	ranks := m.ready("f", 3)
	slices.SortFunc(ranks, func(a, b sheaf.Replica) int { return a.Since.Compare(b.Since) })
	m.Scale("f", 2)
	left := m.ready("f", 2)
	if slices.ContainsFunc(left, func(r sheaf.Replica) bool { return r.ID == ranks[2].ID }) {
		t.Errorf("rank 2 stayed: %v of %v", left, ranks)
	}
}

func TestDrain(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.DrainTime = 2 * time.Second
	m.deploy("f", "web", 1)
	pid := m.see("f").PID
	answer := make(chan string, 1)
	go func() {
		_, body, err := m.try("POST", "/function/f/sleep?for=600ms", "")
		answer <- fmt.Sprint(body, err)
	}()
	time.Sleep(100 * time.Millisecond)
	m.Scale("f", 0)
	if v := m.replicas("f"); len(v.Replicas) != 1 || v.Replicas[0].State != sheaf.Draining || !alive(pid) {
		t.Errorf("while it drains: %+v, alive %v", v, alive(pid))
	}
	if got := <-answer; got != "slept <nil>" {
		t.Errorf("the running call ended with %q", got)
	}
	eventually(t, 20*time.Second, "the end", func() bool { return !alive(pid) })
	if log := m.lines("name=f"); !slices.Contains(log, "told to end") {
		t.Errorf("it was not told by SIGTERM: %q", log)
	}
}

func TestStubbornReplicaIsKilled(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.DrainTime = 400 * time.Millisecond
	m.deploy("f", "stubborn", 1)
	pid := m.see("f").PID
	cut := make(chan string, 1)
	go func() {
		status, _, err := m.try("POST", "/function/f/sleep?for=1m", "")
		cut <- fmt.Sprint(status, err)
	}()
	time.Sleep(50 * time.Millisecond)
	begun := time.Now()
	m.Scale("f", 0)
	eventually(t, 3*time.Second, "the end", func() bool { return !alive(pid) })
	if took := time.Since(begun); took < 350*time.Millisecond || took > 1500*time.Millisecond {
		t.Errorf("killed after %v, want 400ms", took)
	}
	if got := <-cut; got != "502 <nil>" {
		t.Errorf("the call it had ended with %s", got)
	}
}

func grandchild(t *testing.T, lines []string) int {
	t.Helper()
	for _, l := range lines {
		if s, ok := strings.CutPrefix(l, "grandchild "); ok {
			pid, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("no grandchild in %q", lines)
	return 0
}

func TestGrandchildEndsWithItsReplica(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("f", "fork", 1)
	leader, child := m.see("f").PID, grandchild(t, m.lines("name=f"))
	if !alive(child) {
		t.Fatal("no grandchild")
	}
	m.Scale("f", 0)
	eventually(t, 3*time.Second, "the end of both", func() bool { return !alive(leader) && !alive(child) })
}

// A process that left its group is out of reach, but must not hold up its
// replica's end, nor that of the provider.
func TestDaemonDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("f", "daemon", 1)
	child := grandchild(t, m.lines("name=f"))
	defer func() { _ = syscall.Kill(child, syscall.SIGKILL) }()
	m.Scale("f", 0)
	m.ready("f", 0)
	m.deploy("f", "web", 1)
	begun := time.Now()
	m.Close()
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("Close took %v", took)
	}
}

func TestCloseEndsAll(t *testing.T) {
	t.Parallel()
	p := local.NewProvider(command, quiet)
	for i, image := range []string{"web", "stubborn", "crash", "slow", "cheap"} {
		if bad := p.Deploy(types.FunctionDeployment{Service: fmt.Sprint("f", i), Image: image, Labels: &map[string]string{local.LabelMin: "2"}}, true); bad != nil {
			t.Fatal(bad)
		}
	}
	time.Sleep(200 * time.Millisecond)
	var wg sync.WaitGroup
	wg.Go(func() { // somebody who does not know yet
		for range 100 {
			p.Scale("f0", 3)
			p.Scale("f0", 1)
			time.Sleep(time.Millisecond)
		}
	})
	time.Sleep(20 * time.Millisecond)
	begun := time.Now()
	p.Close()
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("Close took %v", took)
	}
	wg.Wait()
	for _, f := range p.Functions() {
		if f.AvailableReplicas > 0 {
			t.Errorf("%s has %d replicas after Close", f.Name, f.AvailableReplicas)
		}
	}
}

// kill -9 of the provider's process takes its replicas with it.
func TestKilledProviderLeavesNoReplica(t *testing.T) {
	for _, image := range []string{"web", "stubborn", "fork"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], "-provider", image)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Wait() }()
			defer func() { _ = cmd.Process.Kill() }()
			in := bufio.NewScanner(out)
			if !in.Scan() || !strings.HasPrefix(in.Text(), "http://") {
				t.Fatalf("the provider said %q", in.Text())
			}
			m := &machine{t: t, url: in.Text(), http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
			m.ready("web", 3)
			pids := map[int]bool{}
			eventually(t, 5*time.Second, "calls of all three", func() bool { pids[m.see("web").PID] = true; return len(pids) == 3 })
			if image == "fork" {
				for _, l := range m.lines("name=web") {
					if strings.HasPrefix(l, "grandchild") {
						pids[grandchild(t, []string{l})] = true
					}
				}
				if len(pids) != 6 {
					t.Errorf("%d processes, want 3 replicas with a child each", len(pids))
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			took := eventually(t, 2*time.Second, "the end of the replicas", func() bool {
				for pid := range pids {
					if alive(pid) {
						return false
					}
				}
				return true
			})
			t.Logf("%s: replicas gone %v after kill -9 of the provider", image, took.Round(time.Millisecond))
		})
	}
}

// PR_SET_PDEATHSIG is about the thread that started a process: threads that
// come and go in the provider's process must not matter.
func TestReplicasSurviveThreads(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	churn := func() {
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
				time.Sleep(time.Millisecond)
			})
		}
		wg.Wait()
	}
	const n = 8
	m.deploy("f", "web", 1)
	for i := 2; i <= n; i++ { // started in between
		churn()
		lost := make(chan struct{})
		go func() { // by a thread that ends
			defer close(lost)
			runtime.LockOSThread()
			m.Scale("f", i)
		}()
		<-lost
	}
	before := m.ready("f", n)
	for range 20 {
		churn()
	}
	if after := m.ready("f", n); !slices.EqualFunc(before, after, func(a, b sheaf.Replica) bool { return a.ID == b.ID }) {
		t.Errorf("replicas %v became %v", before, after)
	}
	if log := m.lines("name=f"); len(log) > 0 {
		t.Errorf("log: %q", log)
	}
}

// This test is not parallel: it counts what the process has.
func TestProviderDoesNotGrow(t *testing.T) {
	m := newMachine(t)
	fds := func() int { e, _ := os.ReadDir("/proc/self/fd"); return len(e) }
	cycle := func(i int) {
		name := fmt.Sprint("f", i%7)
		image := "cheap"
		if i%5 == 0 {
			image = "web"
		}
		if bad := m.Deploy(deployment(name, image), true); bad != nil {
			t.Fatal(bad)
		}
		if image == "web" {
			m.see(name)
		}
		m.Scale(name, 2)
		if bad := m.Provider.Delete(name); bad != nil {
			t.Fatal(bad)
		}
	}
	settled := func() (int, int, int) {
		eventually(t, 15*time.Second, "the end of all processes", func() bool { return len(children()) == 1 }) // the guard is left
		m.http.CloseIdleConnections()
		time.Sleep(100 * time.Millisecond)
		return runtime.NumGoroutine(), fds(), len(children())
	}
	for i := range 20 {
		cycle(i)
	}
	g0, f0, c0 := settled()
	begun := time.Now()
	for i := range 300 {
		cycle(i)
	}
	took := time.Since(begun)
	g1, f1, c1 := settled()
	t.Logf("300 cycles in %v: goroutines %d to %d, files %d to %d, processes %d to %d", took.Round(time.Millisecond), g0, g1, f0, f1, c0, c1)
	if g1 > g0+5 || f1 > f0+5 || c1 > c0 {
		t.Error("the provider grows")
	}
}
