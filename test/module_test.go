package test

// module_test.go serves this module, which may be published nowhere, from a
// module proxy in a folder: what is built of a template needs it.

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	modmodule "golang.org/x/mod/module"
	modzip "golang.org/x/mod/zip"
)

// templateVersion is the version of this module that the template asks for.
const templateVersion = "v0.1.0"

var proxyFolder = flag.String("proxy", "", "write a module proxy with this module into the folder (make proxy)")

// moduleFile is a file of this module, as its zip file wants it.
type moduleFile struct{ root, path string }

func (f moduleFile) Path() string                 { return f.path }
func (f moduleFile) Lstat() (os.FileInfo, error)  { return os.Lstat(filepath.Join(f.root, f.path)) }
func (f moduleFile) Open() (io.ReadCloser, error) { return os.Open(filepath.Join(f.root, f.path)) }

// writeProxy writes a module proxy (go help goproxy) that has this module, as it
// is now, at templateVersion.
func writeProxy(dir string) error {
	const root = ".."
	var files []modzip.File
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path == root {
				return nil
			}
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if err == nil || strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "build" {
				return filepath.SkipDir // another module, or no part of one
			}
			return nil
		}
		name, err := filepath.Rel(root, path)
		if ext := filepath.Ext(path); ext == ".go" || ext == ".mod" || ext == ".sum" || d.Name() == "LICENSE" {
			files = append(files, moduleFile{root, filepath.ToSlash(name)})
		}
		return err
	})
	if err != nil {
		return err
	}
	folder := filepath.Join(dir, filepath.FromSlash(module), "@v")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := modzip.Create(&archive, modmodule.Version{Path: module, Version: templateVersion}, files); err != nil {
		return err
	}
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		return err
	}
	info, err := json.Marshal(map[string]any{"Version": templateVersion, "Time": time.Now().UTC()})
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		"list": []byte(templateVersion + "\n"), templateVersion + ".info": info,
		templateVersion + ".mod": mod, templateVersion + ".zip": archive.Bytes(),
	} {
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// moduleEnv is the environment in which the Go tool finds this module as if it
// were published, and all others where it has them already: nothing is fetched.
var moduleEnv = sync.OnceValues(func() ([]string, error) {
	proxy := filepath.Join(scratch, "proxy")
	if err := writeProxy(proxy); err != nil {
		return nil, fmt.Errorf("write a module proxy: %w", err)
	}
	out, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err != nil {
		return nil, err
	}
	return []string{
		"GOPROXY=file://" + proxy + ",file://" + filepath.Join(strings.TrimSpace(string(out)), "cache", "download"),
		"GOMODCACHE=" + filepath.Join(scratch, "modules"), // ours must not stay for others
		"GOSUMDB=off", "GOWORK=off", "GOTOOLCHAIN=local", "GOFLAGS=-mod=mod -trimpath -modcacherw",
	}, nil
})

// withModules sets moduleEnv for the test, and for what it starts.
func withModules(t testing.TB) {
	t.Helper()
	env, err := moduleEnv()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
}

// in runs a command in a folder, and returns what it printed.
func in(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// make proxy: whoever works on sheaf builds functions of the template as if this
// module were published.
func TestWriteProxy(t *testing.T) {
	dir := *proxyFolder
	if dir == "" {
		dir = t.TempDir()
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	// A module of a version must never change, and this one does.
	for _, old := range []string{"proxy", "modules/" + module + "@" + templateVersion, "modules/cache/download/" + module} {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeProxy(filepath.Join(dir, "proxy")); err != nil {
		t.Fatal(err)
	}
	public := strings.TrimSpace(in(t, ".", "go", "env", "GOPROXY"))
	fmt.Printf("export GOPROXY=file://%s,%s GONOSUMDB=%s GOMODCACHE=%s GOFLAGS='-mod=mod -modcacherw'\n",
		filepath.Join(dir, "proxy"), public, module, filepath.Join(dir, "modules"))
}

// A copy of a folder, that a test may change.
func copied(t testing.TB, from string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

const templateFolder = "../template/sheaf-go"

// The template has the go.mod and go.sum that go mod tidy makes, but for the sum
// of this module itself, which is known when it is published.
func TestTemplateIsTidy(t *testing.T) {
	withModules(t)
	starter := copied(t, templateFolder+"/function")
	in(t, starter, "go", "mod", "tidy")
	for _, name := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join(starter, name))
		if err != nil {
			t.Fatal(err)
		}
		var want strings.Builder
		for line := range strings.Lines(string(data)) {
			if name == "go.mod" || !strings.HasPrefix(line, module+" ") {
				want.WriteString(line)
			}
		}
		if !strings.Contains(string(data), module+" "+templateVersion) {
			t.Errorf("%s of the template does not ask for %s", name, templateVersion)
		}
		path := filepath.Join(templateFolder, "function", name)
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) == want.String() {
			continue
		}
		if !*update {
			t.Errorf("%s is not tidy (make template writes it anew)", path)
		} else if err := os.WriteFile(path, []byte(want.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
