package test

// machine_test.go has faults of the machine: few descriptors, and addresses
// that are given to somebody else.

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/local"
)

// Fault 72: master and worker that may open few files answer as many calls at
// once as a third of them, and do not end. (More callers than descriptors can
// take all of the master's: docs/RELIABILITY.md says so.)
func TestFewDescriptors(t *testing.T) {
	b := startWith(t, local.Config{Command: func(image string) ([]string, error) {
		return []string{"/bin/sh", "-c", fmt.Sprintf("ulimit -n 48 && exec '%s' function %s", binary, strings.TrimPrefix(image, "sheaf/"))}, nil
	}})
	b.deploy("master", "sheaf/master", 1, map[string]string{"worker_function": "few"})
	b.deploy("few", "sheaf/worker", 2)
	b.waitFor("master", 1)
	b.waitFor("few", 2)
	before := fmt.Sprint(b.replicas("master")[0].ID, b.replicas("few")[0].ID, b.replicas("few")[1].ID)
	in := text(1, 20_000)
	want := sequential(in)
	var right, later atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			a, err := b.try(t.Context(), "block=500", strings.NewReader(in))
			switch {
			case err != nil:
				t.Errorf("a call was not answered: %v", err)
			case a.status == http.StatusOK && a.body == want:
				right.Add(1)
			case a.status == http.StatusTooManyRequests, a.status >= 502 && a.status <= 504, a.status == http.StatusFailedDependency:
				later.Add(1)
			default:
				t.Errorf("a call was answered %d %.300s", a.status, a.body)
			}
		})
	}
	wg.Wait()
	t.Logf("of 16 calls at once with 48 descriptors each: %d right, %d refused for now", right.Load(), later.Load())
	if got := b.count("block=500", in); got.body != want {
		t.Error("afterwards: the counts differ from a sequential count")
	}
	if after := fmt.Sprint(b.replicas("master")[0].ID, b.replicas("few")[0].ID, b.replicas("few")[1].ID); after != before {
		t.Errorf("replicas ended: %s became %s", before, after)
	}
	if right.Load() == 0 {
		t.Error("no call was right")
	}
}

// Fault 8: an address of the record is another function's by now. That runs no
// block, and its answer is no result, whether it speaks sheaf or not.
func TestAddressOfAnother(t *testing.T) {
	for _, who := range []string{"a function of sheaf", "a plain function"} {
		t.Run(who, func(t *testing.T) {
			b := start(t, 2, nil)
			in := text(3, 200_000)
			want := sequential(in)
			if got := b.count("block=1KiB", in); got.body != want {
				t.Fatal("the counts differ from a sequential count")
			}
			b.StopNATS() // nobody tells the master what follows
			gone := b.replicas("worker")[0]
			addr := strings.TrimPrefix(gone.URL, "http://")
			if err := b.Client().Kill(t.Context(), "worker", gone.ID); err != nil {
				t.Fatal(err)
			}
			var calls atomic.Int64
			log := t.TempDir() + "/runs.log"
			if who == "a plain function" {
				var l net.Listener
				for begun := time.Now(); ; time.Sleep(time.Millisecond) {
					var err error
					if l, err = net.Listen("tcp", addr); err == nil {
						break
					}
					if time.Since(begun) > 10*time.Second {
						t.Fatal(err)
					}
				}
				srv := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					calls.Add(1)
					fmt.Fprint(w, "wrong 1\n")
				})}
				go func() { _ = srv.Serve(l) }()
				t.Cleanup(func() { _ = srv.Close() })
			} else {
				var cmd *exec.Cmd
				for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
					cmd = exec.Command(os.Args[0])
					cmd.Env = append(os.Environ(), loggedFunction+"="+log, "sheaf_listen="+addr, "sheaf_replica=other-1", "OPENFAAS_NAME=other", "OPENFAAS_NAMESPACE=openfaas-fn")
					if err := cmd.Start(); err != nil {
						t.Fatal(err)
					}
					up := false
					for range 100 {
						if c, err := net.Dial("tcp", addr); err == nil {
							up = c.Close() == nil
							break
						}
						time.Sleep(10 * time.Millisecond)
					}
					if up {
						break
					}
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
					if time.Since(begun) > 10*time.Second {
						t.Fatal("the other function does not start")
					}
				}
				t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
			}
			for range 5 {
				if got := b.count("block=1KiB", in); got.body != want {
					t.Error("the counts differ from a sequential count")
				}
			}
			if ran, err := os.ReadFile(log); err == nil && len(ran) > 0 {
				t.Errorf("the other function ran blocks: %s", ran)
			}
			t.Logf("%d blocks were sent to a plain function, and none of its answers was taken", calls.Load())
		})
	}
}
