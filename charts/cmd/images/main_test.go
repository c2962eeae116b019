package main

import (
	"bytes"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestRun makes the worker's image and pushes it to a registry in this process.
func TestRun(t *testing.T) {
	s := httptest.NewServer(registry.New())
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	out := t.TempDir()
	var stdout, stderr bytes.Buffer
	if err := run(t.Context(), []string{"-root", "../../..", "-out", out, "-prefix", host + "/me/", "-tag", "v1", "-platforms", "linux/amd64", "-push", "worker"}, &stdout, &stderr); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	ref, err := name.ParseReference(host + "/me/worker:v1")
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := pushed.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if want := host + "/me/worker:v1@" + digest.String() + " " + filepath.Join(out, "worker.tar") + "\n"; stdout.String() != want {
		t.Errorf("printed %q, want %q", &stdout, want)
	}
	if _, err := os.Stat(filepath.Join(out, "worker.tar")); err != nil {
		t.Error(err)
	}
}

func TestRunRefuses(t *testing.T) {
	for want, args := range map[string][]string{
		"no image \"gateway\"":       {"gateway"},
		"such as linux/amd64":        {"-platforms", "amd64", "worker"},
		"names no registry":          {"-root", "../../..", "-out", t.TempDir(), "-platforms", "linux/amd64", "-push", "worker"},
		"images -h":                  {"-nothing"},
		"is not the name of an imag": {"-root", "../../..", "-out", t.TempDir(), "-platforms", "linux/amd64", "-prefix", "sheaf/Me/", "worker"},
	} {
		var stdout, stderr bytes.Buffer
		if err := run(t.Context(), args, &stdout, &stderr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want an error with %q", args, err, want)
		}
	}
}
