package test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/worker"
)

const (
	steps     = 20 // that one block takes
	stepsSave = 2  // after so many the work is saved
)

// runSteps is a worker that counts words in steps, and saves its work. It
// appends a line for each step: its process, job and block, and the step.
func runSteps(log *os.File, slow time.Duration) {
	worker.Main(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		begin := 0
		state, mark, _ := bytes.Cut(worker.Saved(ctx), []byte("|"))
		if len(state) > 0 {
			var err error
			if begin, err = strconv.Atoi(string(state)); err != nil || len(mark) != 20_000 {
				return nil, worker.Reject(fmt.Errorf("the state is %.20q and %d bytes", state, len(mark)))
			}
		}
		for i := begin; i < steps; i++ {
			fmt.Fprintf(log, "%d %s %d %d\n", os.Getpid(), worker.CallOf(ctx).Job, b.Index, i)
			select {
			case <-time.After(slow):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if n := i + 1; n%stepsSave == 0 && n < steps {
				return nil, worker.Save(append([]byte(strconv.Itoa(n)+"|"), bytes.Repeat([]byte("s"), 20_000)...))
			}
		}
		return wordcount.Count(ctx, b)
	})
}

// Anchor A4 and goal 32: a worker that is killed at 60 % of a block has saved
// its work, and another one goes on from there: at most 45 % of the block are
// done again. So it is when the master dies, too, if the job is stored.
func TestResumeFromCheckpoint(t *testing.T) {
	b := start(t, 1, nil)
	log := t.TempDir() + "/steps.log"
	labels := map[string]string{"com.openfaas.scale.min": "2", "com.openfaas.scale.max": "2"}
	if err := b.Client().Deploy(t.Context(), types.FunctionDeployment{Service: "steps", Image: "logged", Labels: &labels,
		EnvVars: map[string]string{loggedFunction: log, "steps": "1", "slow": "15ms"}}); err != nil {
		t.Fatal(err)
	}
	b.waitFor("steps", 2)
	in := text(11, 5000)
	type step struct{ pid, number int }
	done := func(job string) (list []step) {
		all, err := os.ReadFile(log)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(all)) {
			var s step
			var id string
			var block int
			if _, err := fmt.Sscan(line, &s.pid, &id, &block, &s.number); err == nil && id == job {
				list = append(list, s)
			}
		}
		return list
	}
	// waitStep waits until a job is at a step, and returns who does it.
	waitStep := func(job string, number int) int {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(time.Millisecond) {
			for _, s := range done(job) {
				if s.number == number {
					return s.pid
				}
			}
			if time.Since(begun) > 30*time.Second {
				t.Fatalf("job %s never came to step %d: %v", job, number, done(job))
			}
		}
	}
	for _, route := range []string{"direct", "gateway"} {
		for _, victim := range []string{"worker", "master", "nobody"} {
			t.Run(route+", "+victim+" killed", func(t *testing.T) {
				id := route + "-" + victim
				query := "function=steps&block=10KiB&route=" + route
				b.submit(query, in, "Idempotency-Key", id)
				pid := waitStep(id, steps*6/10)
				switch victim {
				case "worker":
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				case "master":
					if err := b.Client().Kill(t.Context(), "master", b.replicas("master")[0].ID); err != nil {
						t.Fatal(err)
					}
				}
				a, _ := b.persist("GET", jobsPath+"/"+id+"/result", "", "Prefer", "wait=30")
				if a.status != 200 || a.body != sequential(in) {
					t.Errorf("the result is %d %.200s", a.status, a.body)
				}
				again := len(done(id)) - steps
				t.Logf("%d of %d steps were done again", again, steps)
				if again < 0 || again*100 > 45*steps || victim == "nobody" && again != 0 {
					t.Errorf("%d of %d steps were done again: %v", again, steps, done(id))
				}
				b.waitFor("steps", 2)
				b.waitFor("master", 1)
			})
		}
	}
	// A plain caller sees nothing of it.
	if a := b.do("POST", "/function/steps", in); a.status != 200 || len(a.body) < 100 {
		t.Errorf("a plain call: %d %.100s", a.status, a.body)
	}
	// A synchronous job resumes, too.
	var ended atomic.Bool
	go func() {
		for !ended.Load() {
			all, _ := os.ReadFile(log)
			lines := strings.Split(strings.TrimSpace(string(all)), "\n")
			if f := strings.Fields(lines[len(lines)-1]); len(f) == 4 && f[3] == strconv.Itoa(steps*6/10) && !strings.Contains(f[1], "-") {
				if pid, err := strconv.Atoi(f[0]); err == nil {
					_ = syscall.Kill(pid, syscall.SIGKILL)
					return
				}
			}
			time.Sleep(time.Millisecond)
		}
	}()
	a := b.count("function=steps&block=10KiB", in)
	ended.Store(true)
	if again := len(done(a.header.Get("Sheaf-Job"))) - steps; a.body != sequential(in) || again < 1 || again*100 > 45*steps {
		t.Errorf("synchronously: %d steps were done again", again)
	}
}
