//go:build memory

package test

// memory_test.go holds the memory of a large job down. It needs room for a file
// of 1 GiB, and some seconds: make memory.

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// 1 GiB through sheaf run: the master's peak is at most 64 MiB, each worker's at
// most 48 MiB.
func TestMemoryOfAGigabyte(t *testing.T) {
	path := filepath.Join(t.TempDir(), "large.txt")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := bufio.NewWriter(f)
	piece := text(1, 1<<20)
	for range 1024 {
		if _, err := io.WriteString(w, piece); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	f.Close()

	cmd := exec.Command(binary, "run", "--block", "1MiB", path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	peaks := map[string]int{}
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		case <-time.After(20 * time.Millisecond):
			for _, pid := range functions(t, cmd.Process.Pid) {
				args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
				if role := strings.Split(string(args), "\x00"); len(role) > 2 {
					peaks[role[2]+" "+pid] = max(peaks[role[2]+" "+pid], peak(pid))
				}
			}
		}
	}
	if len(peaks) < 2 {
		t.Fatalf("saw only the processes %v", peaks)
	}
	for who, kib := range peaks {
		limit := 48
		if strings.HasPrefix(who, "master") {
			limit = 64
		}
		t.Logf("%s: peak %.1f MiB, limit %d MiB", who, float64(kib)/1024, limit)
		if kib > limit<<10 {
			t.Errorf("%s: peak %.1f MiB is over %d MiB", who, float64(kib)/1024, limit)
		}
	}
}

// peak is the largest resident set of a process so far, in KiB.
func peak(pid string) int {
	status, _ := os.ReadFile("/proc/" + pid + "/status") // it may have ended
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, _ := strconv.Atoi(strings.Fields(rest)[0])
			return n
		}
	}
	return 0
}
