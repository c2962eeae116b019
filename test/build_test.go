package test

// build_test.go builds and deploys functions without docker: by what faas-cli
// leaves or sends, and by faas-cli itself when FAAS_CLI names one.

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"
	"github.com/openfaas/go-sdk/builder"
	"github.com/openfaas/go-sdk/stack"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/gateway"
)

// site is a running sheaf up that builds.
type site struct {
	t      testing.TB
	url    string
	secret string // file
	dir    string // where faas-cli runs; its folder build is sheaf's, too
	api    *gateway.Client
}

// newSite starts sheaf up, with this module served as if it were published.
func newSite(t *testing.T) *site {
	t.Helper()
	withModules(t)
	s := &site{t: t, dir: t.TempDir(), secret: file(t, "a secret of builds\n")}
	_, s.url = startUp(t, "--port", "0", "--workers", "2", "--build-dir", filepath.Join(s.dir, "build"), "--payload-secret", s.secret)
	var err error
	if s.api, err = gateway.NewClient(s.url, "", ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.api.Close)
	return s
}

// deploy deploys a function of a stack file as faas-cli does.
func (s *site) deploy(name string, f stack.Function) {
	s.t.Helper()
	if err := s.api.Deploy(s.t.Context(), types.FunctionDeployment{Service: name, Image: f.Image, EnvVars: f.Environment,
		EnvProcess: "/handler", Labels: f.Labels, Annotations: f.Annotations, ReadOnlyRootFilesystem: f.ReadOnlyRootFilesystem}); err != nil {
		s.t.Fatal(err)
	}
}

// replicas are the IDs of a function's replicas, in any state.
func (s *site) replicas(name string) (ids []string, ready bool) {
	s.t.Helper()
	for v, err := range s.api.Replicas(s.t.Context()) {
		if err != nil {
			s.t.Fatal(err)
		}
		if v.Function == name+".openfaas-fn" {
			ready = len(v.Replicas) == v.Desired
			for _, r := range v.Replicas {
				ids = append(ids, r.ID)
				ready = ready && r.State == sheaf.Ready
			}
			return ids, ready
		}
	}
	return nil, false
}

// renewed waits until a function has only replicas that are ready and none of
// those that were there.
func (s *site) renewed(name string, old []string) {
	s.t.Helper()
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		ids, ready := s.replicas(name)
		if ready && !slices.ContainsFunc(ids, func(id string) bool { return slices.Contains(old, id) }) {
			return
		}
		if time.Since(begun) > time.Minute {
			s.t.Fatalf("%s has replicas %v after a minute, and before %v", name, ids, old)
		}
	}
}

func (s *site) post(name, input string) string {
	s.t.Helper()
	resp, err := client.Post(s.url+"/function/"+name, "application/octet-stream", strings.NewReader(input))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		s.t.Fatalf("%s: %s %v %s", name, resp.Status, err, body)
	}
	return string(body)
}

// says waits until a function says something: replicas of another build may
// still be there.
func (s *site) says(name, input, want string) {
	s.t.Helper()
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		got := s.post(name, input)
		if got == want {
			return
		}
		if time.Since(begun) > time.Minute {
			s.t.Fatalf("%s says %.200q after a minute, want %.200q", name, got, want)
		}
	}
}

// Contexts that faas-cli up --shrinkwrap leaves are built when their functions
// are deployed, in whatever order that is, and do their work; and so do those
// that faas-cli up --remote-builder sends.
func TestDeployWithoutDocker(t *testing.T) {
	s := newSite(t)
	functions := stackFile(t, "stack.yml").Functions
	old := map[string][]string{}
	for name := range functions {
		old[name], _ = s.replicas(name)
	}
	contexts := builder.WithBuildDir(filepath.Join(s.dir, "build"))
	templates := builder.WithTemplateDir("../template")
	if _, err := builder.CreateBuildContext("master", filepath.Join("..", functions["master"].Handler), "sheaf-go", nil, contexts, templates); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"worker", "master"} { // the one without a context of its own first
		s.deploy(name, functions[name])
	}
	for name := range functions {
		s.renewed(name, old[name])
	}
	in := text(11, 50_000)
	if got := s.post("master", in); got != sequential(in) {
		t.Errorf("the pair of stack.yml answers %.200q", got)
	}

	// A fresh function: one, with both roles.
	if _, err := builder.CreateBuildContext("shout", starter().Handler, "sheaf-go", nil, contexts, templates); err != nil {
		t.Fatal(err)
	}
	s.deploy("shout", stack.Function{Image: "me/shout:latest", Labels: &map[string]string{"com.openfaas.scale.min": "3"}})
	s.says("shout", in, strings.ToUpper(in))

	// And one that is sent.
	dir := contextOf(t, "sent", starter(), "../template")
	handler := filepath.Join(dir, "function", "handler.go")
	for path, change := range map[string][2]string{
		handler: {"ToUpper", "ToLower"}, filepath.Join(dir, "function", "handler_test.go"): {`A LINE\nAND B`, `a line\nand b`},
	} {
		data, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(strings.Replace(string(data), change[0], change[1], 1)), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	archive := filepath.Join(t.TempDir(), "req.tar")
	if err := builder.MakeTar(archive, dir, &builder.BuildConfig{Image: "me/sent:latest"}); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	result, err := builder.NewFunctionBuilder(u, &http.Client{}, builder.WithHmacAuth("a secret of builds")).Build(archive)
	if err != nil || result.Status != builder.BuildSuccess {
		t.Fatalf("%+v, %v", result, err)
	}
	s.deploy("sent", stack.Function{Image: "me/sent:latest"})
	s.says("sent", in, strings.ToLower(in))
}

// faas runs a command of faas-cli where the site's stack file is.
func (s *site) faas(binary string, args ...string) string {
	s.t.Helper()
	cmd := faasCommand(s.t, binary, s.t.TempDir(), s.url, args...)
	cmd.Dir = s.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("faas-cli %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	s.t.Logf("$ faas-cli %s\n%s", strings.Join(args, " "), out)
	return string(out)
}

func (s *site) change(name, from, to string) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte(strings.Replace(string(data), from, to, 1)), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// The same by the faas-cli that FAAS_CLI names, from template pull on.
func TestRealFaasCLIBuilds(t *testing.T) {
	faasCLI := os.Getenv("FAAS_CLI")
	if faasCLI == "" {
		t.Log("FAAS_CLI names no binary of faas-cli; what it leaves and sends is built by TestDeployWithoutDocker")
		return
	}
	// template pull wants what is committed in a repository.
	repository := t.TempDir()
	if err := os.CopyFS(filepath.Join(repository, "template"), os.DirFS("../template")); err != nil {
		t.Fatal(err)
	}
	in(t, repository, "git", "init", "-q")
	in(t, repository, "git", "add", ".")
	in(t, repository, "git", "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", "template")

	s := newSite(t)
	s.faas(faasCLI, "template", "pull", repository)
	if said := s.faas(faasCLI, "new", "--list"); !strings.Contains(said, "- sheaf-go") {
		t.Errorf("new --list: %s", said)
	}
	said := s.faas(faasCLI, "new", "shout", "--lang", "sheaf-go", "--prefix", "me", "--gateway", s.url)
	for _, says := range []string{"Function created in folder: shout", "\n  go test ./...\n", "\n  faas-cli up\n"} {
		if !strings.Contains(said, says) {
			t.Errorf("new does not say %q: %s", says, said)
		}
	}
	in(t, filepath.Join(s.dir, "shout"), "go", "test", "./...")
	input := text(12, 5_000)
	s.faas(faasCLI, "up", "-f", "stack.yaml", "--shrinkwrap", "--skip-push")
	s.says("shout", input, strings.ToUpper(input))
	s.change("shout/handler.go", "ToUpper", "ToTitle")
	s.faas(faasCLI, "build", "-f", "stack.yaml", "--shrinkwrap")
	s.faas(faasCLI, "deploy", "-f", "stack.yaml")
	s.says("shout", "a \u01c9\n", "A \u01c8\n") // in the case of titles
	s.change("shout/handler.go", "ToTitle", "ToLower")
	s.change("shout/handler_test.go", `A LINE\nAND B`, `a line\nand b`)
	if said := s.faas(faasCLI, "up", "-f", "stack.yaml", "--remote-builder", s.url, "--payload-secret", s.secret); !strings.Contains(said, "shout success building and pushing image: me/shout:latest") {
		t.Errorf("up --remote-builder: %s", said)
	}
	s.says("shout", "A B\n", "a b\n")

	// This repository's own stack file, in both ways.
	for _, name := range []string{"stack.yml", "functions"} {
		if err := copyTo(filepath.Join(s.dir, name), filepath.Join("..", name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, how := range [][]string{{"--shrinkwrap", "--skip-push"}, {"--remote-builder", s.url, "--payload-secret", s.secret}} {
		old, _ := s.replicas("master")
		s.faas(faasCLI, append([]string{"up", "-f", "stack.yml", "--gateway", s.url}, how...)...)
		s.renewed("master", old)
		if got := s.post("master", input); got != sequential(input) {
			t.Errorf("%v: the pair of stack.yml answers %.200q", how, got)
		}
	}
}

// copyTo copies a file or a folder.
func copyTo(to, from string) error {
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

// What sheaf up refuses of the flags of building.
func TestUpRefusesBuildFlags(t *testing.T) {
	for secret, says := range map[string]string{filepath.Join(t.TempDir(), "nosuch"): "no such file", file(t, " \n"): "is empty"} {
		if got := cli(t, "", "up", "--port", "0", "--payload-secret", secret); got.code != 2 || !strings.Contains(got.err, "--payload-secret: ") || !strings.Contains(got.err, says) {
			t.Errorf("%s: exit code %d, %s", secret, got.code, fmt.Sprint(got.out, got.err))
		}
	}
}
