package test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"
)

// Fault 2: a random worker is killed every 100 ms during 50 jobs of 1 MiB.
// Each job's answer is right, and none is lost.
func TestKillsWhileJobsRun(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	b := start(t, 4, nil)
	ctx, stop := context.WithCancel(t.Context())
	kills := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 0))
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			if rs := b.replicas("worker"); len(rs) > 0 && b.Client().Kill(ctx, "worker", rs[rnd.IntN(len(rs))].ID) == nil {
				kills++
			}
		}
	})
	for job := range 50 {
		in := text(uint64(job), 1<<20)
		if got := b.count("block=16KiB", in); got.body != sequential(in) {
			t.Errorf("job %d: the counts differ from a sequential count (seed %d)", job, seed)
		}
	}
	stop()
	wg.Wait()
	t.Logf("50 jobs right, %d replicas killed", kills)
	if kills == 0 {
		t.Error("no replica was killed: the test shows nothing")
	}
}

// Work starts with the first ready replica; a job does not wait for the rest,
// and a job that finds no replica at all waits for one.
func TestStartsAtOnce(t *testing.T) {
	b := start(t, 1, nil)
	in := thesisText()
	if err := b.Client().Scale(t.Context(), "worker", 20); err != nil {
		t.Fatal(err)
	}
	if got := b.count("block=50", in); got.body != sequential(in) {
		t.Error("while replicas join: the counts differ from a sequential count")
	}
	b.scale(0)
	if err := b.Client().Scale(t.Context(), "worker", 3); err != nil {
		t.Fatal(err)
	}
	if got := b.count("block=50", in); got.body != sequential(in) {
		t.Error("from no replica: the counts differ from a sequential count")
	}
}

// A job asks the watcher for replicas, over NATS: functions hold no credentials
// of the gateway.
func TestWorkersAreAskedFor(t *testing.T) {
	b := start(t, 1, nil)
	in := text(1, 100_000)
	if got := b.count("workers=6&block=1KiB", in); got.body != sequential(in) {
		t.Error("the counts differ from a sequential count")
	}
	b.waitFor("worker", 6)
}

// Scaling in the midst of jobs loses nothing: replicas finish what they have.
func TestScaleWhileJobsRun(t *testing.T) {
	b := start(t, 4, nil)
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
			}
			if err := b.Client().Scale(t.Context(), "worker", []int{1, 5, 2, 8, 3}[i%5]); err != nil {
				t.Error(err)
			}
		}
	})
	for job := range 30 {
		in := text(uint64(job), 256<<10)
		if got := b.count("block=4KiB", in); got.body != sequential(in) {
			t.Errorf("job %d: the counts differ from a sequential count", job)
		}
	}
	close(done)
	wg.Wait()
}

// Fault 50: the client goes. The job stops within a second, and the workers'
// handlers see it.
func TestClientGoes(t *testing.T) {
	b := start(t, 1, nil)
	log := t.TempDir() + "/slow.log"
	// A plain HTTP function as worker: it notes when a call begins and when its
	// caller goes.
	b.deploySlow(log)
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, err := b.try(ctx, "function=slow&block=100", strings.NewReader(thesisText()))
		if err == nil {
			t.Error("a call that was cancelled came back")
		}
	}()
	wait := func(word string) time.Time {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
			seen, _ := os.ReadFile(log)
			if strings.Contains(string(seen), word) {
				return time.Now()
			}
			if time.Since(begun) > 10*time.Second {
				t.Fatalf("the slow function never said %q: %s", word, seen)
			}
		}
	}
	wait("begun")
	cancel()
	left := time.Now()
	<-gone
	if took := wait("canceled").Sub(left); took > time.Second {
		t.Errorf("the worker saw the client's going after %v", took)
	}
}

// slowFunction is the environment variable that makes the test binary a slow
// plain function, with its log's path.
const slowFunction = "SHEAF_TEST_SLOW"

func (b *bench) deploySlow(log string) {
	b.t.Helper()
	labels := map[string]string{}
	err := b.Client().Deploy(b.t.Context(), types.FunctionDeployment{Service: "slow", Image: "slow", Labels: &labels,
		EnvVars: map[string]string{slowFunction: log}})
	if err != nil {
		b.t.Fatal(err)
	}
	b.waitFor("slow", 1)
}

// runSlow is a plain HTTP function that works for a minute.
func runSlow(log string) {
	note := func(word string) {
		f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			panic(err)
		}
		defer f.Close()
		fmt.Fprintln(f, word)
	}
	err := http.ListenAndServe("127.0.0.1:"+os.Getenv("port"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			return
		}
		_, _ = io.Copy(io.Discard, r.Body) // the watch for the caller begins at its end
		note("begun")
		select {
		case <-r.Context().Done():
			note("canceled")
		case <-time.After(time.Minute):
		}
	}))
	panic(err)
}

// Masters keep the last view when NATS is away, and need it for nothing else.
func TestNATSAway(t *testing.T) {
	b := start(t, 3, nil)
	in := thesisText()
	want := sequential(in)
	b.count("block=100", in)
	b.StopNATS()
	for range 3 {
		if got := b.count("block=100", in); got.body != want {
			t.Error("without NATS: the counts differ from a sequential count")
		}
	}
}

// Faults 9 and 10: a worker hangs (SIGSTOP). Its blocks go to another one, and
// it gets no more than a few; the job does not wait for its time to run out.
func TestHungWorker(t *testing.T) {
	for _, query := range []string{"", "block=1000", "route=gateway"} {
		t.Run(query, func(t *testing.T) {
			b := start(t, 4, nil)
			in := text(6, 2<<20)
			want := sequential(in)
			pids := functions(t, os.Getpid())
			for _, pid := range pids {
				args, err := os.ReadFile("/proc/" + pid + "/cmdline")
				if err != nil || !strings.Contains(string(args), "worker") {
					continue
				}
				n, err := strconv.Atoi(pid)
				if err != nil {
					t.Fatal(err)
				}
				if err := syscall.Kill(n, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				if got := b.count(query, in); got.body != want {
					t.Error("the counts differ from a sequential count")
				}
				took := time.Since(begun)
				t.Logf("with 1 of 4 workers hung: %v", took)
				if took > 20*time.Second { // a third of the time for one attempt
					t.Errorf("the job waited for the hung worker: %v", took)
				}
				return
			}
			t.Fatalf("no worker among processes %v", pids)
		})
	}
}

// An address that refuses is left out: the record is behind when it still
// names a replica that was killed.
func TestAllButOneKilled(t *testing.T) {
	b := start(t, 4, nil)
	b.count("", "a") // the master has read the record
	b.StopNATS()     // and nobody tells it what follows
	for _, r := range b.replicas("worker")[:3] {
		if err := b.Client().Kill(t.Context(), "worker", r.ID); err != nil {
			t.Fatal(err)
		}
	}
	in := text(4, 300_000)
	begun := time.Now()
	if got := b.count("block=2KiB", in); got.body != sequential(in) {
		t.Error("the counts differ from a sequential count")
	}
	t.Logf("with 1 of 4 addresses alive and the record stale: %v", time.Since(begun))
}
