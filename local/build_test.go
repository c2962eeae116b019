package local_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"
	"github.com/openfaas/go-sdk/builder"

	"github.com/sheaf-project/sheaf/local"
)

// source is a function that always says the same, as files of a build context.
func source(says string) map[string]string {
	return map[string]string{
		"Dockerfile":      "FROM scratch\n",
		"function/go.mod": "module handler\n\ngo 1.26\n",
		"function/main.go": fmt.Sprintf(`package main

import (
	"fmt"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, says) })
	fmt.Println(http.ListenAndServe(os.Getenv("sheaf_listen"), nil))
}

const says = %q
`, says),
		"function/main_test.go": "package main\n\nimport \"testing\"\n\nfunc TestSays(t *testing.T) {\n\tif says == \"nonsense\" {\n\t\tt.Fatal(\"it says nonsense\")\n\t}\n}\n",
	}
}

// with returns files with one changed, or with "" removed.
func with(files map[string]string, name, content string) map[string]string {
	changed := map[string]string{}
	maps.Copy(changed, files)
	if changed[name] = content; content == "" {
		delete(changed, name)
	}
	return changed
}

func writeFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// yard is a stack that builds.
type yard struct {
	*local.Stack
	t      *testing.T
	dir    string // of build contexts
	secret string
}

func newYard(t *testing.T, change ...func(*local.Config)) *yard {
	t.Helper()
	cfg := local.Config{Command: command, Log: quiet, Build: local.BuildConfig{Dir: filepath.Join(t.TempDir(), "build")}}
	for _, f := range change {
		f(&cfg)
	}
	s, err := local.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	secret, err := os.ReadFile(s.BuildSecretFile)
	if err != nil {
		t.Fatal(err)
	}
	return &yard{s, t, cfg.Build.Dir, strings.TrimSpace(string(secret))}
}

// context leaves a build context as faas-cli up --shrinkwrap does.
func (y *yard) context(name string, files map[string]string) {
	y.t.Helper()
	writeFiles(y.t, filepath.Join(y.dir, name), files)
}

func (y *yard) deploy(name, image string) error {
	return y.Client().Deploy(y.t.Context(), types.FunctionDeployment{Service: name, Image: image})
}

// says waits until a function says something.
func (y *yard) says(name, want string) {
	y.t.Helper()
	var got string
	eventually(y.t, 20*time.Second, fmt.Sprintf("%s to say %q", name, want), func() bool {
		resp, err := http.Get(y.URL + "/function/" + name)
		if err != nil {
			y.t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		got = string(body)
		return got == want
	})
}

// archive is what faas-cli up --remote-builder sends.
func archive(t *testing.T, image string, files map[string]string) []byte {
	t.Helper()
	dir, path := filepath.Join(t.TempDir(), "context"), filepath.Join(t.TempDir(), "req.tar")
	writeFiles(t, dir, files)
	if err := builder.MakeTar(path, dir, &builder.BuildConfig{Image: image, BuildArgs: map[string]string{"ADDITIONAL_PACKAGE": ""}}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// send sends a build, signed, and returns the lines of the answer.
func (y *yard) send(ctx context.Context, body []byte, change ...func(*http.Request)) (int, []builder.BuildResult, string) {
	y.t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, y.URL+"/build", bytes.NewReader(body))
	if err != nil {
		y.t.Fatal(err)
	}
	mac := hmac.New(sha256.New, []byte(y.secret))
	mac.Write(body)
	req.Header.Set("X-Build-Signature", "sha256="+hex.EncodeToString(mac.Sum(nil)))
	req.Header.Set("Accept", "application/x-ndjson")
	for _, f := range change {
		f(req)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err.Error()
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil, err.Error()
	}
	var lines []builder.BuildResult
	if resp.StatusCode == http.StatusOK {
		for line := range strings.Lines(string(data)) {
			var r builder.BuildResult
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				y.t.Fatalf("%v: %s", err, line)
			}
			lines = append(lines, r)
		}
	}
	return resp.StatusCode, lines, string(data)
}

// What faas-cli leaves in a folder is built when it is deployed, and again when
// it has changed.
func TestBuildDir(t *testing.T) {
	y := newYard(t)
	err := y.deploy("hello", "me/hello:1")
	if err == nil || !strings.Contains(err.Error(), `no image \\\"me/hello:1\\\"; nor was it built here, and there is no build context `+filepath.Join(y.dir, "hello")) {
		t.Fatalf("without a context: %v", err)
	}
	y.context("hello", source("hello"))
	if err := y.deploy("hello", "me/hello:1"); err != nil {
		t.Fatal(err)
	}
	y.says("hello", "hello")
	// A second function of the image has no context of its own: the image is
	// the same, or its name leads to the context.
	for image, name := range map[string]string{"me/hello:1": "again", "reg.example.com:5000/me/hello@sha256:00": "digest", "hello": "bare"} {
		if err := y.deploy(name, image); err != nil {
			t.Fatal(err)
		}
		y.says(name, "hello")
	}
	y.context("hello", source("hello again"))
	if err := y.deploy("hello", "me/hello:1"); err != nil {
		t.Fatal(err)
	}
	y.says("hello", "hello again")
	// The gate: what fails its tests is not deployed, and what was there stays.
	y.context("hello", source("nonsense"))
	if err := y.deploy("hello", "me/hello:1"); err == nil || !strings.Contains(err.Error(), "it says nonsense") {
		t.Fatalf("a context whose tests fail: %v", err)
	}
	if err := y.deploy("other", "other"); err == nil || strings.Contains(err.Error(), "hello") {
		t.Errorf("another function: %v", err)
	}
	y.says("hello", "hello again")
	// An image that is known otherwise is not looked for.
	y.context("web", source("not me"))
	if err := y.deploy("web", "web"); err != nil {
		t.Fatal(err)
	}
	var got seen
	eventually(t, 10*time.Second, "the image web", func() bool {
		resp, err := http.Get(y.URL + "/function/web")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return json.NewDecoder(resp.Body).Decode(&got) == nil && got.PID > 0
	})
}

// Contexts that cannot be built are refused with a sentence.
func TestBuildRefuses(t *testing.T) {
	y := newYard(t)
	for _, c := range []struct {
		name  string
		files map[string]string
		says  string
	}{
		{"another language", map[string]string{"Dockerfile": "FROM python\n", "function/handler.py": "pass\n"}, "sheaf builds contexts of Go templates such as sheaf-go"},
		{"a template with a watchdog", with(with(source(""), "function/main.go", "package function\n"), "function/main_test.go", ""), "sheaf builds contexts of Go templates such as sheaf-go"},
		{"no go.mod", with(source(""), "function/go.mod", ""), "sheaf builds contexts of Go templates such as sheaf-go"},
		{"code that does not compile", with(source(""), "function/main.go", "package main\n\nfunc main() { x }\n"), "undefined: x"},
		{"a module that is nowhere", with(source(""), "function/main.go", "package main\n\nimport _ \"example.invalid/x\"\n\nfunc main() {}\n"), "example.invalid/x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("GOPROXY", "off")
			y.t = t
			y.context("bad", c.files)
			if err := y.deploy("bad", "bad"); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("deploy: %v, want %q", err, c.says)
			}
			status, lines, said := y.send(t.Context(), archive(t, "bad", c.files))
			if status != 200 || lines[len(lines)-1].Status != builder.BuildFailed || !strings.Contains(lines[len(lines)-1].Error, c.says) {
				t.Errorf("POST /build: %d %s, want %q", status, said, c.says)
			}
		})
	}
	t.Run("a link out of the context", func(t *testing.T) {
		y.t = t
		y.context("bad", source(""))
		if err := os.Symlink("/etc/passwd", filepath.Join(y.dir, "bad", "link")); err != nil {
			t.Fatal(err)
		}
		if err := y.deploy("bad", "bad"); err == nil || !strings.Contains(err.Error(), "neither a file nor a folder") {
			t.Errorf("deploy: %v", err)
		}
	})
	t.Run("no Go tool", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		y.t = t
		y.context("bad", source("no tool"))
		if err := y.deploy("bad", "bad"); err == nil || !strings.Contains(err.Error(), "there is no Go tool on the PATH of sheaf") || !strings.Contains(err.Error(), "install Go 1.26") {
			t.Errorf("deploy: %v", err)
		}
	})
	if left, err := os.ReadDir(filepath.Join(filepath.Dir(y.BuildSecretFile), "builds")); err != nil || len(left) > 0 {
		t.Errorf("folders of builds that are left: %v, %v", left, err)
	}
}

// OpenFaaS's own client of the Function Builder API gets what it expects.
func TestBuilderAPI(t *testing.T) {
	data := t.TempDir()
	y := newYard(t, func(c *local.Config) { c.Dir = data })
	u, err := url.Parse(y.URL)
	if err != nil {
		t.Fatal(err)
	}
	client := builder.NewFunctionBuilder(u, &http.Client{}, builder.WithHmacAuth(y.secret))
	for i, says := range []string{"one", "two", "two"} {
		path := filepath.Join(t.TempDir(), "req.tar")
		if err := os.WriteFile(path, archive(t, "example.com/x/remote:latest", source(says)), 0o600); err != nil {
			t.Fatal(err)
		}
		var last builder.BuildResult
		var log []string
		if i == 0 { // all at once
			if last, err = client.Build(path); err != nil {
				t.Fatal(err)
			}
			log = last.Log
		} else {
			stream, err := client.BuildWithStream(path)
			if err != nil {
				t.Fatal(err)
			}
			for r, err := range stream.Results() {
				if err != nil {
					t.Fatal(err)
				}
				if last = r; r.Status == builder.BuildInProgress {
					log = append(log, r.Log...)
				}
			}
		}
		if last.Status != builder.BuildSuccess || last.Image != "example.com/x/remote:latest" || last.Error != "" {
			t.Fatalf("build %d: %+v", i, last)
		}
		if want := []string{"go test ./...", "go test ./...", "nothing has changed since it was built"}[i]; !slices.Contains(log, want) {
			t.Errorf("build %d: log is %q, want %q in it", i, log, want)
		}
		if err := y.deploy("remote", last.Image); err != nil {
			t.Fatal(err)
		}
		y.says("remote", says)
	}
	// A program that no image has any more is not kept.
	count := func(folder string) int {
		t.Helper()
		left, err := os.ReadDir(filepath.Join(data, folder))
		if err != nil {
			t.Fatal(err)
		}
		return len(left)
	}
	if n := count("programs"); n != 1 {
		t.Errorf("%d programs are kept, of one image", n)
	}
	// Of images that no function has, only so many are kept.
	for i := range 40 {
		if status, _, said := y.send(t.Context(), archive(t, fmt.Sprintf("idle:%d", i), source("two"))); status != 200 || !strings.Contains(said, `"success"`) {
			t.Fatalf("%d %s", status, said)
		}
	}
	if images, programs := count("images"), count("programs"); images != 34 || programs != 1 {
		t.Errorf("%d images with %d programs are kept, want 32, that which was built last, and that of the function, with one", images, programs)
	}
	// The image, and the secret, are there after a restart.
	y.Close()
	again := newYard(t, func(c *local.Config) { c.Dir = data })
	again.says("remote", "two")
	if again.secret != y.secret {
		t.Error("the secret is another one")
	}
}

// What is not signed is not looked at, and what cannot be right is refused.
func TestBuilderAPIRefuses(t *testing.T) {
	y := newYard(t)
	good := archive(t, "me/x:latest", source("x"))
	header := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	files := func(entries ...*tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range append(entries, &tar.Header{Name: "com.openfaas.docker.config", Size: 16, Mode: 0o600}) {
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if h.Name == "com.openfaas.docker.config" && h.Size == 16 {
				_, _ = io.WriteString(w, `{"image":"me/x"}`)
			} else {
				_, _ = w.Write(make([]byte, h.Size))
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	many := make([]*tar.Header, 10_001)
	for i := range many {
		many[i] = &tar.Header{Name: fmt.Sprintf("context/%d/", i), Typeflag: tar.TypeDir, Mode: 0o700}
	}
	regular := func(name string) *tar.Header { return &tar.Header{Name: name, Size: 1, Mode: 0o600} }
	for _, c := range []struct {
		name   string
		body   []byte
		change func(*http.Request)
		status int
		says   string
	}{
		{"no signature", good, header("X-Build-Signature", ""), 401, "--payload-secret FILE"},
		{"no hex", good, header("X-Build-Signature", "sha256=xyz"), 401, "bad_build_signature"},
		{"half a signature", good, header("X-Build-Signature", "sha256=00ff"), 401, "bad_build_signature"},
		{"another signature", good, header("X-Build-Signature", "sha256="+strings.Repeat("00", 32)), 401, "bad_build_signature"},
		{"another body", good, func(r *http.Request) {
			r.Body = io.NopCloser(bytes.NewReader(append(bytes.Clone(good[:len(good)-1]), 1)))
		}, 401, "bad_build_signature"},
		{"too long", nil, func(r *http.Request) {
			r.ContentLength = 128<<20 + 1
			r.Body = io.NopCloser(io.LimitReader(zeros{}, r.ContentLength))
			r.Header.Set("Expect", "100-continue") // or the answer may come while it is sent
		}, 413, "over the limit of 134217728 bytes"},
		{"too long, and the length is not told", nil, func(r *http.Request) {
			r.ContentLength = -1
			r.Body = io.NopCloser(io.LimitReader(zeros{}, 128<<20+1))
		}, 413, "over the limit of 134217728 bytes"},
		{"from a web page", good, header("Origin", "http://example.com"), 403, "foreign_host"},
		{"by another name", good, func(r *http.Request) { r.Host = "evil.example.com" }, 403, "foreign_host"},
		{"no archive", []byte("hello"), nil, 400, "not a tar archive"},
		{"an empty archive", nil, nil, 400, "lacks com.openfaas.docker.config"},
		{"half an archive", good[:700], nil, 400, "the build context"},
		{"a config that is no JSON", archiveOf(t, "{"), nil, 400, "not the JSON that is expected"},
		{"no image", archiveOf(t, "{}"), nil, 400, `\"\" is not the name of an image`},
		{"an image with a blank", archiveOf(t, `{"image":"a b"}`), nil, 400, "is not the name of an image"},
		{"an image of the provider", archiveOf(t, `{"image":"web"}`), nil, 400, "is this provider's own"},
		{"another platform", archiveOf(t, `{"image":"x","platforms":["plan9/mips"]}`), nil, 400, "the image is for plan9/mips"},
		{"build secrets", files(regular("com.openfaas.secrets")), nil, 400, "build secrets, which this builder does not take"},
		{"a path out of it", files(regular("context/../../x")), nil, 400, "no file or folder of the folder context"},
		{"an absolute path", files(regular("/etc/x")), nil, 400, "no file or folder of the folder context"},
		{"a link", files(&tar.Header{Name: "context/l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}), nil, 400, "no file or folder of the folder context"},
		{"a hard link", files(&tar.Header{Name: "context/l", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}), nil, 400, "no file or folder of the folder context"},
		{"a device", files(&tar.Header{Name: "context/d", Typeflag: tar.TypeChar}), nil, 400, "no file or folder of the folder context"},
		{"a file twice", files(regular("context/a"), regular("context/a")), nil, 400, "twice"},
		{"a long path", files(regular("context/" + strings.Repeat("a/", 600) + "b")), nil, 400, "path within it"},
		{"too many folders", files(many...), nil, 400, "more than 10000 files and folders"},
	} {
		t.Run(c.name, func(t *testing.T) {
			y.t = t
			var change []func(*http.Request)
			if c.change != nil {
				change = append(change, c.change)
			}
			if status, _, said := y.send(t.Context(), c.body, change...); status != c.status || !strings.Contains(said, c.says) {
				t.Errorf("status %d %s, want %d and %q", status, said, c.status, c.says)
			}
		})
	}
	for path, status := range map[string]int{"/build": 404, "/publickey": 501} {
		resp, err := http.Get(y.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != status {
			t.Errorf("GET %s: %s", path, resp.Status)
		}
	}
	if left, err := os.ReadDir(filepath.Join(filepath.Dir(y.BuildSecretFile), "images")); err != nil || len(left) > 0 {
		t.Errorf("images that were made: %v, %v", left, err)
	}
	for _, empty := range []string{"", " \n"} {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte(empty), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := (local.BuildConfig{SecretFile: path}).Validate(); err == nil || !strings.Contains(err.Error(), "is empty") {
			t.Errorf("an empty secret: %v", err)
		}
	}
}

// archiveOf is an archive with nothing but a config.
func archiveOf(t *testing.T, config string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "com.openfaas.docker.config", Size: int64(len(config)), Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(w, config)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// sleeper is a context whose tests write their process's number into a file, and
// sleep.
func sleeper(file, salt string) map[string]string {
	return with(source(salt), "function/main_test.go", fmt.Sprintf(`package main

import (
	"fmt"
	"os"
	"testing"
	"time"
)

func TestSleep(t *testing.T) {
	if err := os.WriteFile(%q, []byte(fmt.Sprint(os.Getpid())), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(10 * time.Minute)
}
`, file))
}

// pid waits for a sleeper to run.
func pid(t *testing.T, file string) (pid int) {
	t.Helper()
	eventually(t, time.Minute, "a test to run", func() bool {
		data, err := os.ReadFile(file)
		if err == nil {
			_, err = fmt.Sscan(string(data), &pid)
		}
		return err == nil
	})
	return pid
}

func gone(t *testing.T, pid int) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("the end of process %d", pid), func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(stat, []byte(") Z ")) || syscall.Kill(pid, 0) != nil
	})
}

// A build is bounded in time and number, and ends with who asked for it and with
// the stack; nothing that it started is left.
func TestBuildsAreBounded(t *testing.T) {
	t.Run("time", func(t *testing.T) {
		y := newYard(t, func(c *local.Config) { c.Build.Time = 2 * time.Second })
		file := filepath.Join(t.TempDir(), "pid")
		status, lines, said := y.send(t.Context(), archive(t, "me/slow", sleeper(file, "time")))
		if status != 200 || len(lines) == 0 || lines[len(lines)-1].Status != builder.BuildFailed || !strings.Contains(lines[len(lines)-1].Error, "took too long: over 2s") {
			t.Errorf("%d %s", status, said)
		}
		if _, err := os.Stat(file); err == nil { // on a busy machine it may not have come so far
			gone(t, pid(t, file))
		}
	})
	t.Run("number", func(t *testing.T) {
		y := newYard(t, func(c *local.Config) { c.Build.Parallel = 1 })
		first := filepath.Join(t.TempDir(), "pid")
		ctx, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer leave()
		wg.Go(func() { y.send(ctx, archive(t, "me/slow", sleeper(first, "number"))) })
		running := pid(t, first)
		// A second one waits, until the first one's client has left.
		done := make(chan string, 1)
		wg.Go(func() {
			_, _, said := y.send(t.Context(), archive(t, "quick", source("quick")))
			done <- said
		})
		select {
		case said := <-done:
			t.Fatalf("the second build did not wait: %s", said)
		case <-time.After(300 * time.Millisecond):
		}
		leave()
		if said := <-done; !strings.Contains(said, `"status":"success"`) {
			t.Errorf("the second build: %s", said)
		}
		gone(t, running)
	})
	t.Run("the end of the stack", func(t *testing.T) {
		y := newYard(t)
		file := filepath.Join(t.TempDir(), "pid")
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { y.send(t.Context(), archive(t, "me/slow", sleeper(file, "end"))) })
		running := pid(t, file)
		y.Close()
		gone(t, running)
	})
}
