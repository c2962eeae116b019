package local_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"net/url"
	"strconv"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/local"
)

func TestStack(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	for i := range 2 {
		begun := time.Now()
		s, err := local.Start(local.Config{Command: command, Log: quiet, Version: "test"})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Client().Deploy(t.Context(), types.FunctionDeployment{Service: "web", Image: "web", Labels: &map[string]string{local.LabelMin: "2"}}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the record of both replicas", func() bool {
			l := s.Registry.Records()
			return len(l) == 1 && len(l[0].View().Replicas) == 2
		})
		t.Logf("start %d: 2 replicas in the record after %v", i+1, time.Since(begun).Round(time.Millisecond))
		if n, err := s.Registry.AtLeast(t.Context(), "web", 3); n != 3 || err != nil {
			t.Errorf("at least 3: %d, %v", n, err)
		}
		eventually(t, 10*time.Second, "the record of the third", func() bool { return len(s.Registry.Records()[0].View().Replicas) == 3 })

		u, err := url.Parse(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		port, err := strconv.Atoi(u.Port())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := local.Start(local.Config{Port: port, Command: command, Log: quiet}); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("a port that is taken: %v", err)
		}
		select {
		case err := <-s.Failed():
			t.Error(err)
		default:
		}
		begun = time.Now()
		s.Close()
		t.Logf("closed in %v", time.Since(begun).Round(time.Millisecond))
		if left, _ := filepath.Glob(filepath.Join(tmp, "*")); len(left) > 0 {
			t.Errorf("Close left %v", left)
		}
		if n := len(children()); n > 0 {
			t.Errorf("Close left %d processes", n)
		}
		if _, err := os.Stat(tmp); err != nil {
			t.Error(err)
		}
	}
}
