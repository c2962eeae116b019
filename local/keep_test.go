package local_test

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/local"
)

// Everything under /system/ asks for the login, by whatever path it is
// reached; nothing else does.
func TestAuth(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	m.front.Auth = local.Auth{User: "admin", Password: "open sesame"}
	ask := func(method, path, user, password string) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, m.url+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		if user != "" {
			req.SetBasicAuth(user, password)
		}
		resp, err := m.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode == http.StatusUnauthorized && (resp.Header.Get("WWW-Authenticate") != `Basic realm="Restricted"` ||
			resp.Header.Get("Content-Type") != "application/problem+json" || !bytes.Contains(body, []byte("invalid credentials"))) {
			t.Errorf("%s %s: refused with %v %s", method, path, resp.Header, body)
		}
		return resp
	}
	for _, route := range []string{
		"GET /system/info", "GET /system/namespaces", "GET /system/namespace/openfaas-fn", "POST /system/namespace/", "DELETE /system/namespace/dev",
		"GET /system/functions", "POST /system/functions", "PUT /system/functions", "DELETE /system/functions",
		"GET /system/function/web", "POST /system/scale-function/web", "GET /system/logs?name=web",
		"GET /system/secrets", "POST /system/secrets", "PUT /system/secrets", "DELETE /system/secrets",
		"GET /system/replicas", "GET /system/replicas?watch=true", "GET /system/replicas/web", "DELETE /system/replicas/web/x",
		"GET /system/views", "GET /system/views?watch=true", "GET /system/nothing", "GET /%73ystem/functions", "GET /system%2Ffunctions",
		"GET /x/../system/functions", "GET //system/functions",
	} {
		method, path, _ := strings.Cut(route, " ")
		if resp := ask(method, path, "", ""); resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d without a login", route, resp.StatusCode)
		}
	}
	for _, c := range []struct {
		name, user, password string
		status               int
	}{
		{"right", "admin", "open sesame", 200},
		{"wrong password", "admin", "open", 401},
		{"empty password", "admin", "", 401},
		{"longer password", "admin", "open sesame!", 401},
		{"wrong user", "root", "open sesame", 401},
		{"turned round", "open sesame", "admin", 401},
	} {
		if resp := ask("GET", "/system/functions", c.user, c.password); resp.StatusCode != c.status {
			t.Errorf("%s: %d, want %d", c.name, resp.StatusCode, c.status)
		}
	}
	for _, path := range []string{"/healthz", "/function/web"} {
		if resp := ask("GET", path, "", ""); resp.StatusCode != 200 {
			t.Errorf("%s: %d without a login", path, resp.StatusCode)
		}
	}
	for _, half := range []local.Auth{{User: "admin"}, {Password: "x"}} {
		if s, err := local.Start(local.Config{Command: command, Log: quiet, Auth: half}); err == nil {
			s.Close()
			t.Errorf("half a login is taken")
		}
	}
}

func TestNamespaces(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for _, c := range []struct {
		method, path string
		status       int
		says         string
	}{
		{"GET", "/system/namespace/openfaas-fn", 200, `{"name":"openfaas-fn"}`},
		{"GET", "/system/namespace/dev", 404, "has only openfaas-fn"},
		{"GET", "/system/namespace/", 404, "has only openfaas-fn"},
		{"POST", "/system/namespace/", 501, "others cannot be made"},
		{"PUT", "/system/namespace/openfaas-fn", 501, "cannot be changed"},
		{"DELETE", "/system/namespace/openfaas-fn", 501, "cannot be changed"},
	} {
		if status, body := m.call(c.method, c.path, `{"name":"dev"}`); status != c.status || !strings.Contains(body, c.says) {
			t.Errorf("%s %s: %d %s, want %d and %q", c.method, c.path, status, body, c.status, c.says)
		}
	}
}

func TestSecretsAPI(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for _, c := range []struct {
		name, method, body string
		status             int
	}{
		{"create", "POST", `{"name":"tok","value":"abc"}`, 202},
		{"create again", "POST", `{"name":"tok","value":"abc"}`, 409},
		{"create here by name", "POST", `{"name":"a.b-1","namespace":"openfaas-fn","rawValue":"AAH/"}`, 202},
		{"create elsewhere", "POST", `{"name":"b","namespace":"dev","value":"abc"}`, 403},
		{"update", "PUT", `{"name":"tok","value":"abd"}`, 202},
		{"update of nothing", "PUT", `{"name":"nosuch","value":"abd"}`, 404},
		{"remove", "DELETE", `{"name":"a.b-1"}`, 202},
		{"remove again", "DELETE", `{"name":"a.b-1"}`, 404},
		{"without a value", "POST", `{"name":"b"}`, 400},
		{"without a name", "POST", `{"value":"b"}`, 400},
		{"no JSON", "POST", `abc`, 400},
		{"over 1 MiB", "POST", `{"name":"big","value":"` + strings.Repeat("x", 1<<20) + `"}`, 413},
		{"longest name", "POST", `{"name":"` + strings.Repeat("a", 253) + `","value":"x"}`, 202},
		{"remove it", "DELETE", `{"name":"` + strings.Repeat("a", 253) + `"}`, 202},
		{"name too long", "POST", `{"name":"` + strings.Repeat("a", 254) + `","value":"x"}`, 400},
		{"path", "POST", `{"name":"../tok","value":"x"}`, 400},
		{"path to remove", "DELETE", `{"name":"../functions/web.json"}`, 400},
		{"absolute path", "POST", `{"name":"/etc/passwd","value":"x"}`, 400},
		{"slash", "POST", `{"name":"a/b","value":"x"}`, 400},
		{"dots", "POST", `{"name":"..","value":"x"}`, 400},
		{"hidden", "POST", `{"name":".new-1","value":"x"}`, 400},
		{"upper case", "POST", `{"name":"Tok","value":"x"}`, 400},
		{"NUL", "POST", `{"name":"t\u0000k","value":"x"}`, 400},
		{"other method", "PATCH", `{"name":"tok"}`, 404},
	} {
		if status, body := m.call(c.method, "/system/secrets", c.body); status != c.status {
			t.Errorf("%s: %d %s, want %d", c.name, status, body, c.status)
		}
	}
	if _, body := m.call("GET", "/system/secrets?namespace=openfaas-fn", ""); body != `[{"name":"tok","namespace":"openfaas-fn"}]`+"\n" {
		t.Errorf("list: %s", body)
	}
	if _, body := m.call("GET", "/system/secrets?namespace=dev", ""); body != "[]\n" {
		t.Errorf("list elsewhere: %s", body)
	}
	p := local.NewProvider(command, quiet) // without a folder
	defer p.Close()
	if bad := p.SetSecret("tok", []byte("x"), true); bad == nil || bad.Error() != "this provider has no folder for secrets" {
		t.Errorf("no folder: %v", bad)
	}
}

// A secret reaches the functions that name it, as a file that only we can
// read, and nobody else: no list, log, error or environment has it.
func TestSecretIsKept(t *testing.T) {
	const canary = "canary-4f1c"
	var log safeBuffer
	dir := t.TempDir()
	s, err := local.Start(local.Config{Command: command, Dir: dir, Version: "test",
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m := &machine{t: t, Provider: s.Provider, front: s.Front, url: s.URL, http: &http.Client{Transport: &http.Transport{}}}
	defer m.http.CloseIdleConnections()
	var said strings.Builder
	ask := func(method, path, body string) (int, string) {
		status, out := m.call(method, path, body)
		if !strings.HasPrefix(path, "/function/") {
			said.WriteString(out)
		}
		return status, out
	}
	for _, name := range []string{"tok", "second"} {
		ask("POST", "/system/secrets", `{"name":"`+name+`","value":"`+canary+`"}`)
		ask("POST", "/system/secrets", `{"name":"`+name+`","value":"`+canary+`"}`)
	}
	const spec = `{"service":"web","image":"web","secrets":["tok","second"],"envVars":{"secret_mount_path":"/var/openfaas/secrets"}}`
	if status, body := ask("POST", "/system/functions", strings.Replace(spec, `"second"`, `"nosuch"`, 1)); status != 400 || !strings.Contains(body, `secret \"nosuch\", which does not exist`) {
		t.Errorf("deploy with an unknown secret: %d %s", status, body)
	}
	if status, body := ask("POST", "/system/functions", strings.Replace(spec, `"second"`, `"../lock"`, 1)); status != 400 {
		t.Errorf("deploy with a path for a secret: %d %s", status, body)
	}
	if status, body := ask("POST", "/system/functions", spec); status != 202 {
		t.Fatalf("deploy: %d %s", status, body)
	}
	id := m.ready("web", 1)[0].ID
	secret := func() string { _, body := ask("GET", "/function/web/secret?name=tok", ""); return body }
	if got := secret(); got != canary {
		t.Errorf("the function reads %q", got)
	}
	ask("PUT", "/system/secrets", `{"name":"tok","value":"`+canary+`2"}`)
	if got := secret(); got != canary+"2" {
		t.Errorf("after an update the function reads %q", got)
	}
	if _, env := ask("GET", "/function/web/environ", ""); strings.Contains(env, canary) || !strings.Contains(env, "nats_url="+s.NATS) || !strings.Contains(env, "gateway_url="+s.URL) {
		t.Errorf("environment: %s", env)
	}
	for path, mode := range map[string]os.FileMode{"secrets": 0o700, "secrets/tok": 0o600, "functions/web.json": 0o600, "mounts/" + id: 0o700} {
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, want %v, %v", path, info.Mode(), mode, err)
		}
	}
	ask("DELETE", "/system/secrets", `{"name":"tok"}`)
	ask("GET", "/system/secrets", "")
	ask("GET", "/system/functions", "")
	if bad := m.Kill("web", id); bad != nil {
		t.Fatal(bad)
	}
	eventually(t, 5*time.Second, "a replica that misses its secret says so", func() bool {
		return strings.Contains(strings.Join(m.lines("name=web"), "\n"), `secret "tok" does not exist`)
	})
	ask("GET", "/system/logs?name=web", "")
	if left, _ := os.ReadDir(filepath.Join(dir, "mounts")); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
	if all := said.String() + log.String(); strings.Contains(all, canary) {
		t.Errorf("the secret is in %s", all)
	}
}

// safeBuffer may be written to while it is read.
type safeBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// What is deployed, and when it was, outlives the stack.
func TestStackKeeps(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "er")
	start := func() (*local.Stack, *machine) {
		t.Helper()
		s, err := local.Start(local.Config{Command: command, Dir: dir, Log: quiet, Auth: local.Auth{User: "admin", Password: "x"}})
		if err != nil {
			t.Fatal(err)
		}
		return s, &machine{t: t, Provider: s.Provider, url: strings.Replace(s.URL, "//", "//admin:x@", 1), http: &http.Client{Transport: &http.Transport{}}}
	}
	s, m := start()
	m.SetSecret("tok", []byte("abc"), true)
	spec := types.FunctionDeployment{Service: "web", Image: "web", Secrets: []string{"tok"}, EnvVars: map[string]string{"version": "1"},
		Labels: &map[string]string{local.LabelMin: "2", "a": "b"}, Annotations: &map[string]string{}, Limits: &types.FunctionResources{CPU: "1"}}
	gone := spec
	gone.Service = "gone"
	for _, f := range []types.FunctionDeployment{spec, gone} {
		if err := s.Client().Deploy(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	m.ready("web", 2)
	_, before := m.call("GET", "/system/function/web", "")
	if bad := m.Delete("gone"); bad != nil {
		t.Fatal(bad)
	}
	if second, err := local.Start(local.Config{Command: command, Dir: dir, Log: quiet}); err == nil {
		second.Close()
		t.Error("two stacks use one folder")
	} else if !strings.Contains(err.Error(), dir+" is in use by another stack") {
		t.Errorf("second stack: %v", err)
	}
	m.http.CloseIdleConnections()
	s.Close()

	s, m = start()
	m.ready("web", 2)
	if _, after := m.call("GET", "/system/function/web", ""); after != before {
		t.Errorf("after the restart: %sbefore: %s", after, before)
	}
	// As many replicas as it was scaled to, also none.
	for _, n := range []int{4, 0, 2} {
		if err := m.Scale("web", n); err != nil {
			t.Fatal(err)
		}
		m.http.CloseIdleConnections()
		s.Close()
		s, m = start()
		if f := m.Functions()[0]; int(f.Replicas) != n {
			t.Errorf("scaled to %d before the restart, %d after it", n, f.Replicas)
		}
	}
	m.ready("web", 2)
	eventually(t, 10*time.Second, "the record of both replicas, and of no other", func() bool {
		l := s.Registry.Records()
		return len(l) == 1 && len(l[0].View().Replicas) == 2
	})
	if _, body := m.call("GET", "/function/web/secret?name=tok", ""); body != "abc" {
		t.Errorf("the secret is %q", body)
	}
	spec.EnvVars["version"] = "2"
	if err := s.Client().Deploy(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	var one struct{ CreatedAt time.Time }
	var two struct{ CreatedAt time.Time }
	_, body := m.call("GET", "/system/function/web", "")
	if json.Unmarshal([]byte(before), &one) != nil || json.Unmarshal([]byte(body), &two) != nil || !one.CreatedAt.Equal(two.CreatedAt) {
		t.Errorf("created at %v, after an update %v", one.CreatedAt, two.CreatedAt)
	}
	m.http.CloseIdleConnections()
	s.Close()

	path := filepath.Join(dir, "functions", "web.json")
	for _, c := range []struct{ name, file, content, says string }{
		{"cut", "web.json", `{"spec":{"serv`, "unexpected end of JSON input"},
		{"empty", "web.json", "", "unexpected end of JSON input"},
		{"of another function", "web.json", `{"spec":{"service":"other","image":"web"}}`, `it is of function "other"`},
		{"bad name", "web.json", `{"spec":{"service":"../x","image":"web"}}`, "must be 1 to 63 lower-case letters"},
		{"bad count", "web.json", `{"spec":{"service":"web","image":"web"},"replicas":-1}`, "may want from 0 to 1000"},
		{"bad label", "web.json", `{"spec":{"service":"web","image":"web","labels":{"com.openfaas.scale.min":"x"}}}`, "must be a number"},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := local.Start(local.Config{Command: command, Dir: dir, Log: quiet})
		if err == nil {
			s.Close()
			t.Errorf("%s: it starts", c.name)
		} else if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// What a killed stack was about to write, and had mounted, is in nobody's way.
	for _, left := range []string{"functions/.new-1", "secrets/.new-2", "mounts/web-00000000"} {
		if err := os.WriteFile(filepath.Join(dir, left), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, m = start()
	defer s.Close()
	defer m.http.CloseIdleConnections()
	if _, body := m.call("GET", "/system/functions", ""); body != "[]\n" {
		t.Errorf("functions: %s", body)
	}
	if _, body := m.call("GET", "/system/secrets", ""); body != `[{"name":"tok","namespace":"openfaas-fn"}]`+"\n" {
		t.Errorf("secrets: %s", body)
	}
}

// A folder that cannot be written to refuses, and nothing is half deployed.
func TestFolderThatFails(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := local.NewProvider(command, quiet)
	closed, err := p.Keep(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer closed()
	defer p.Close()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := p.Deploy(types.FunctionDeployment{Service: "web", Image: "web"}, true); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("deploy: %v", err)
	}
	if err := p.SetSecret("tok", []byte("canary"), true); err == nil || !strings.Contains(err.Error(), "no such file") || strings.Contains(err.Error(), "canary") {
		t.Errorf("secret: %v", err)
	}
	if n := len(p.Functions()); n != 0 {
		t.Errorf("%d functions are deployed", n)
	}
}

// A call that finds a replica deaf, and goes to another, is one invocation.
func TestInvocationCount(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 2)
	m.call("GET", "/function/web/deafen", "")
	for range 4 {
		m.call("GET", "/function/web", "")
	}
	if n := m.Functions()[0].InvocationCount; n != 5 {
		t.Errorf("%v invocations, want 5", n)
	}
}
