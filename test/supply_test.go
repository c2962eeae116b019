package test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// run runs a command in a folder and returns what it prints.
func run(t *testing.T, dir string, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, errs.String())
	}
	return out
}

// The same source gives the same worker, byte by byte, wherever it lies.
func TestControl19SameSourceSameBinary(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	var binaries [2][]byte
	for i, folder := range []string{"here", "elsewhere/deeper"} {
		dir := filepath.Join(t.TempDir(), folder)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"go.mod", "go.sum", "internal", "worker", "functions"} {
			if err := copyTree(filepath.Join(root, name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		core, err := filepath.Glob(filepath.Join(root, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range core {
			if err := copyTree(file, filepath.Join(dir, filepath.Base(file))); err != nil {
				t.Fatal(err)
			}
		}
		out := filepath.Join(t.TempDir(), "worker")
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, "./functions/worker")
		build.Dir = dir
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if binaries[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(binaries[0], binaries[1]) {
		t.Errorf("two builds in two folders differ: %d and %d bytes", len(binaries[0]), len(binaries[1]))
	}
	if bytes.Contains(binaries[0], []byte(root)) {
		t.Errorf("the binary holds the path of its source")
	}
}

func copyTree(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.CopyFS(to, os.DirFS(from))
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}

// The bill of materials names every module that a binary is made of.
func TestControl19BillOfMaterials(t *testing.T) {
	var bill struct {
		BOMFormat, SpecVersion string
		Metadata               struct{ Component struct{ Name string } }
		Components             []struct{ Name, Version, PURL string }
	}
	if err := json.Unmarshal(run(t, "..", "go", "run", "./test/sbom", binary), &bill); err != nil {
		t.Fatal(err)
	}
	if bill.BOMFormat != "CycloneDX" || bill.SpecVersion != "1.6" || bill.Metadata.Component.Name != "sheaf" {
		t.Errorf("the bill is of %+v", bill.Metadata)
	}
	billed := map[string]string{}
	for _, c := range bill.Components {
		billed[c.Name] = c.Version
		if c.PURL != "pkg:golang/"+c.Name+"@"+c.Version || c.Version == "" {
			t.Errorf("component %+v", c)
		}
	}
	for m := range strings.Lines(string(run(t, "..", "go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}", "./cmd/sheaf"))) {
		path, version, ok := strings.Cut(strings.TrimSpace(m), " ")
		if ok && billed[path] != version {
			t.Errorf("%s %s is billed as %q", path, version, billed[path])
		}
	}
	if len(billed) < 10 || billed["std"] == "" {
		t.Errorf("%d components", len(billed))
	}
}

// What runs anywhere holds no module with known holes: the server of NATS
// Streaming, which only tests start, and no nats-server before 2.14.3.
func TestControl19NoModuleWithKnownHoles(t *testing.T) {
	deps := string(run(t, "..", "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}} {{.Version}}{{end}}", "./cmd/...", "./functions/..."))
	if strings.Contains(deps, "nats-streaming-server") {
		t.Error("a binary holds the server of NATS Streaming")
	}
	for line := range strings.Lines(deps) {
		version, ok := strings.CutPrefix(strings.TrimSpace(line), "github.com/nats-io/nats-server/v2 v2.")
		if !ok {
			continue
		}
		minor, patch, _ := strings.Cut(version, ".")
		a, err := strconv.Atoi(minor)
		b, bad := strconv.Atoi(patch)
		if err != nil || bad != nil || a < 14 || a == 14 && b < 3 {
			t.Fatalf("nats-server 2.%s is older than 2.14.3", version)
		}
	}
	run(t, "..", "go", "mod", "verify")
}
