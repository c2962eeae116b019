package worker_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	module = "github.com/sheaf-project/sheaf"
	target = "./functions/worker"
	// maxBinary is how large the binary of an image may be, in bytes.
	maxBinary = 8 << 20
)

// goTool runs the go command in the module's root, as the build of an image
// does.
func goTool(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// TestImageDependencies: a worker image holds the standard library and this
// module, so that nothing else has to be watched for holes.
func TestImageDependencies(t *testing.T) {
	out := goTool(t, "list", "-deps", "-f", "{{.ImportPath}} {{.Standard}}", target)
	ours := 0
	for line := range strings.Lines(out) {
		path, standard, _ := strings.Cut(strings.TrimSpace(line), " ")
		if path == module || strings.HasPrefix(path, module+"/") {
			ours++
		} else if standard != "true" {
			t.Errorf("the worker depends on %s", path)
		}
	}
	if ours < 4 {
		t.Errorf("only %d packages are this module's; is it the right list?\n%s", ours, out)
	}
}

// TestImage builds the binary of an image, and lets it live once.
func TestImage(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "worker")
	goTool(t, "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, target)
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the binary has %d bytes", info.Size())
	if info.Size() > maxBinary {
		t.Errorf("the binary has %d bytes, and may have %d", info.Size(), maxBinary)
	}
	t.Run("wrong environment", func(t *testing.T) {
		for _, v := range []string{"max_inflight=abc", "max_block=0", "exec_timeout=x", "read_timeout=-1s"} {
			cmd := exec.CommandContext(t.Context(), binary)
			cmd.Env = []string{v}
			out, err := cmd.CombinedOutput()
			name, value, _ := strings.Cut(v, "=")
			if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 2 {
				t.Errorf("%s: %v, want exit code 2", v, err)
			}
			if s := string(out); strings.Count(s, "\n") != 1 || !strings.Contains(s, fmt.Sprintf("%s is %q; expected ", name, value)) {
				t.Errorf("%s: said %q, want one line with name, value and what was expected", v, s)
			}
		}
	})
	t.Run("a life", func(t *testing.T) {
		url := "http://" + freeAddress(t)
		cmd := exec.CommandContext(t.Context(), binary)
		cmd.Env = []string{"sheaf_listen=" + strings.TrimPrefix(url, "http://"), "sheaf_function=worker", "sheaf_replica=r1", "healthcheck_interval=0"}
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			resp, err := client.Get(url + "/_/ready")
			if err == nil {
				_ = resp.Body.Close()
				break
			}
			if time.Since(begun) > soon {
				t.Fatalf("it is not ready: %v\n%s", err, &said)
			}
		}
		resp, body := send(t, http.MethodPost, url, strings.NewReader("one two one\n"), wire.To, "worker/r1")
		if resp.StatusCode != 200 || resp.Header.Get(wire.Digest) != wire.Sum(body) || resp.Header.Get(wire.Replica) != "r1" {
			t.Errorf("got %s %v %q", resp.Status, resp.Header, body)
		}
		http.DefaultClient.CloseIdleConnections()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || said.Len() != 0 {
			t.Errorf("it ended by %v and said %q", err, &said)
		}
	})
}

// freeAddress is an address at which nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
