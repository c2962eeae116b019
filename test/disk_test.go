//go:build machine

package test

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf/local"
)

// Faults 31 and 56: the disk of the store fills up. New jobs are refused with a
// sentence, plain calls go on, and what was stored can be read. NATS itself
// takes nothing more until it starts again; then all that was accepted is
// there. It mounts a tmpfs, which takes root: make faults.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount a tmpfs, which takes root: %v %s", err, out)
	}
	t.Cleanup(func() { // after the stack, which is started later
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	b := startWith(t, local.Config{Command: command, Dir: filepath.Join(dir, "data")})
	b.deploy("master", "sheaf/master", 1, map[string]string{"worker_function": "worker"})
	b.deploy("worker", "sheaf/worker", 2)
	b.waitFor("master", 1)
	b.waitFor("worker", 2)
	in := text(1, 100_000)
	want := sequential(in)
	if end := b.ended(b.submit("", in, "Idempotency-Key", "before").ID); end.State != "succeeded" {
		t.Fatalf("before: %+v", end)
	}
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	_ = filler.Close() // it is full, as it should be
	a := b.do("POST", jobsPath, text(2, 2<<20), "Idempotency-Key", "while")
	if a.status != http.StatusServiceUnavailable && a.status != http.StatusInsufficientStorage || !strings.Contains(a.body, `"detail":"`) {
		t.Errorf("while the disk is full a job is answered %d %s", a.status, a.body)
	}
	t.Logf("refused with %d %s", a.status, a.body)
	if got := b.count("", in); got.body != want {
		t.Error("while the disk is full: a plain call differs from a sequential count")
	}
	if a := b.do("GET", jobsPath+"/before/result", ""); a.status != 200 || a.body != want {
		t.Errorf("while the disk is full a result is %d %.200s", a.status, a.body)
	}
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	b.StopNATS()
	if err := b.StartNATS(); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"while", "after"} {
		if a, _ := b.persist("POST", jobsPath, in, "Idempotency-Key", key); a.status != 202 && a.status != 200 {
			t.Errorf("with room again: %d %s", a.status, a.body)
		}
		if end := b.ended(key); end.State != "succeeded" {
			t.Errorf("with room again: %+v", end)
		}
	}
	for _, key := range []string{"before", "while", "after"} {
		if a, _ := b.persist("GET", jobsPath+"/"+key+"/result", ""); a.body != want {
			t.Errorf("the result of %s is %d %.200s", key, a.status, a.body)
		}
	}
}
