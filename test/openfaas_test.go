package test

// openfaas_test.go holds the stack files and the template against what OpenFaaS's
// own tools make of them.

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/go-sdk/builder"
	"github.com/openfaas/go-sdk/stack"
	"gopkg.in/yaml.v3"
)

// stackFile parses a stack file of this repository as faas-cli does.
func stackFile(t testing.TB, name string) *stack.Services {
	t.Helper()
	s, err := stack.ParseYAMLFile(filepath.Join("..", name), "", "", true)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keysOf reads a YAML object's keys in the order in which they stand.
func keysOf(t testing.TB, data []byte) (keys []string) {
	t.Helper()
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(doc.Content[0].Content); i += 2 {
		keys = append(keys, doc.Content[0].Content[i].Value)
	}
	return keys
}

// ceRefuses says why OpenFaaS's Community Edition refuses a function, or "".
func ceRefuses(f stack.Function) string {
	if f.Labels != nil {
		for _, pro := range []string{"com.openfaas.scale.type", "com.openfaas.scale.target", "com.openfaas.scale.zero"} {
			for label := range *f.Labels {
				if strings.HasPrefix(label, pro) {
					return "label " + label
				}
			}
		}
		for _, bound := range []string{"com.openfaas.scale.min", "com.openfaas.scale.max"} {
			if v, ok := (*f.Labels)[bound]; ok {
				if n, err := strconv.Atoi(v); err != nil || n < 1 || n > 5 {
					return "label " + bound + " is " + v
				}
			}
		}
	}
	if f.Annotations != nil {
		if topic := (*f.Annotations)["topic"]; strings.Contains(topic, ",") {
			return "topic " + topic
		}
	}
	return ""
}

func TestStackFiles(t *testing.T) {
	for name, community := range map[string]bool{"stack.yml": true, "stack.pro.yml": false} {
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join("..", name))
			if err != nil {
				t.Fatal(err)
			}
			if keys := keysOf(t, data); keys[len(keys)-1] != "functions" {
				t.Errorf("the last key is %s: faas-cli new --append needs functions there", keys[len(keys)-1])
			}
			for _, set := range []struct{ env, image string }{
				{"", "registry.example.com/sheaf/master:latest"},
				{"SERVER=reg.internal:5000 OWNER=me TAG=1.2", "reg.internal:5000/me/master:1.2"},
			} {
				for v := range strings.FieldsSeq(set.env) {
					k, v, _ := strings.Cut(v, "=")
					t.Setenv(k, v)
				}
				s := stackFile(t, name)
				if got := slices.Sorted(maps.Keys(s.Functions)); !slices.Equal(got, []string{"master", "worker"}) {
					t.Fatalf("functions are %v", got)
				}
				for fn, f := range s.Functions {
					if f.Image != set.image || f.Language != "sheaf-go" || f.SkipBuild != (fn == "worker") || f.Environment["sheaf_role"] != fn {
						t.Errorf("%s with %q: %+v", fn, set.env, f)
					}
					for _, v := range []string{"read_timeout", "write_timeout", "exec_timeout", "healthcheck_interval"} {
						if d, err := time.ParseDuration(f.Environment[v]); err != nil || d <= 0 {
							t.Errorf("%s: %s is %q", fn, v, f.Environment[v])
						}
					}
					if f.Labels == nil || (*f.Labels)["com.openfaas.scale.min"] == "" || (*f.Labels)["com.openfaas.scale.max"] == "" || f.Limits == nil || f.Limits.Memory == "" {
						t.Errorf("%s lacks bounds: %+v", fn, f)
					}
					if why := ceRefuses(f); (why == "") != community {
						t.Errorf("%s: the Community Edition refuses it because of %q", fn, why)
					}
				}
			}
			s := stackFile(t, name)
			if s.Provider.GatewayURL != "http://127.0.0.1:8080" {
				t.Errorf("gateway is %s; only the default lets OPENFAAS_URL name another", s.Provider.GatewayURL)
			}
		})
	}
}

// contextOf assembles the build context of a function as faas-cli build does.
func contextOf(t testing.TB, name string, f stack.Function, templates string) string {
	t.Helper()
	dir, err := builder.CreateBuildContext(name, f.Handler, f.Language, nil, builder.WithBuildDir(t.TempDir()), builder.WithTemplateDir(templates))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// dockerBuild does in a build context what its Dockerfile does: it runs the RUN
// lines of the build stage where WORKDIR says, with what ARG and ENV set. It
// knows as much of Dockerfiles as the template's needs, and fails at the rest.
func dockerBuild(dir string) (said string, err error) {
	data, err := os.ReadFile(filepath.Join(dir, "Dockerfile"))
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	stages, wd, runs := 0, dir, 0
	var env []string
	for line := range strings.Lines(string(data)) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		if stages > 1 {
			break
		}
		switch word {
		case "", "#", "COPY":
		case "FROM":
			stages++
		case "WORKDIR":
			within, ok := strings.CutPrefix(rest, "/src")
			if !ok {
				return out.String(), fmt.Errorf("WORKDIR %s", rest)
			}
			wd = filepath.Join(dir, within)
		case "ARG", "ENV":
			for _, v := range []string{rest} {
				name, value, given := strings.Cut(v, "=")
				if word == "ENV" {
					env = append(env, strings.Fields(v)...)
				} else if given && stages == 1 && os.Getenv(name) == "" {
					env = append(env, name+"="+strings.Trim(value, `"`))
				}
			}
		case "RUN":
			runs++
			cmd := exec.Command("sh", "-ec", rest)
			cmd.Dir, cmd.Env = wd, append(os.Environ(), env...)
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				return out.String(), fmt.Errorf("RUN %s: %w", rest, err)
			}
		default:
			return out.String(), fmt.Errorf("Dockerfile: %s is not known here", line)
		}
	}
	if runs < 2 {
		return out.String(), fmt.Errorf("the Dockerfile ran %d commands", runs)
	}
	return out.String(), nil
}

// program runs a function's binary, and returns its URL once it is ready.
func program(t testing.TB, path string, env ...string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	cmd := exec.Command(path)
	cmd.Env = append([]string{"sheaf_listen=" + addr, "sheaf_replica=r1", "healthcheck_interval=0", "nats_url=nats://127.0.0.1:1"}, env...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		resp, err := client.Get("http://" + addr + "/_/ready")
		if err == nil {
			_ = resp.Body.Close()
			return "http://" + addr
		}
		if time.Since(begun) > 30*time.Second {
			t.Fatalf("it is not ready: %v\n%s", err, &errs)
		}
	}
}

// block sends a block, and returns the result.
func block(t testing.TB, url, data string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Sheaf-Job", "j1")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Digest") == "" {
		t.Fatalf("%s %v %v %s", resp.Status, err, resp.Header, body)
	}
	return string(body)
}

// starter is the handler folder that faas-cli new makes.
func starter() stack.Function {
	return stack.Function{Language: "sheaf-go", Handler: templateFolder + "/function"}
}

// Without docker, every function that is built becomes what its image would hold:
// the very context that faas-cli sends, built by the Dockerfile's own commands,
// with the test gate, from nothing but its files and a module proxy; and it works.
func TestBuildOfEveryFunction(t *testing.T) {
	withModules(t)
	functions := map[string]stack.Function{"starter": starter()}
	for name, f := range stackFile(t, "stack.yml").Functions {
		if !f.SkipBuild {
			f.Handler = filepath.Join("..", f.Handler)
			functions[name] = f
		}
	}
	if len(functions) != 2 {
		t.Fatalf("functions are %v", functions)
	}
	for name, f := range functions {
		t.Run(name, func(t *testing.T) {
			dir := contextOf(t, name, f, "../template")
			said, err := dockerBuild(dir)
			if err != nil {
				t.Fatalf("%v\n%s", err, said)
			}
			t.Log(said)
			binary := filepath.Join(dir, "handler")
			want := map[string]string{"starter": " A B A\n", "master": "a 2\nb 1\n"}[name]
			for _, env := range [][]string{{"sheaf_role=worker"}, {"OPENFAAS_NAME=" + name}} {
				if got := block(t, program(t, binary, env...), " a b a\n"); got != want {
					t.Errorf("%v: the result is %q, want %q", env, got, want)
				}
			}
		})
	}
	// The gate: a bad test is the end of the build.
	dir := contextOf(t, "bad", starter(), "../template")
	bad := "package main\n\nimport \"testing\"\n\nfunc TestBad(t *testing.T) { t.Fatal(\"stop here\") }\n"
	if err := os.WriteFile(filepath.Join(dir, "function", "bad_test.go"), []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	said, err := dockerBuild(dir)
	if _, stat := os.Stat(filepath.Join(dir, "handler")); err == nil || stat == nil || !strings.Contains(said, "stop here") {
		t.Errorf("a build whose tests fail: %v\n%s", err, said)
	}
}

// faas-cli new copies the starter, whose tests pass as it is.
func TestStarterPasses(t *testing.T) {
	withModules(t)
	if said := in(t, copied(t, templateFolder+"/function"), "go", "test", "./..."); !strings.Contains(said, "ok") {
		t.Errorf("go test says %s", said)
	}
}

// The template keeps to the rules of its own README.
func TestTemplate(t *testing.T) {
	lang, err := stack.ParseYAMLForLanguageTemplate(templateFolder + "/template.yml")
	if err != nil {
		t.Fatal(err)
	}
	if lang.Language != "sheaf-go" || lang.FProcess == "" || lang.HandlerFolder != "" {
		t.Errorf("template.yml is %+v", lang)
	}
	for _, command := range []string{"go test ./...", "faas-cli up"} {
		if !strings.Contains(lang.WelcomeMessage, "\n  "+command+"\n") {
			t.Errorf("the welcome message does not show %q:\n%s", command, lang.WelcomeMessage)
		}
	}
	data, err := os.ReadFile(templateFolder + "/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	build, ship, found := strings.Cut(string(data), "\nFROM scratch AS ship\n")
	if !found {
		t.Fatal("the Dockerfile has no last stage from scratch")
	}
	for _, line := range []string{"ARG GO_IMAGE=golang:1.26-alpine", "FROM --platform=${BUILDPLATFORM:-linux/amd64} ${GO_IMAGE} AS build",
		"ARG TARGETPLATFORM", "ARG BUILDPLATFORM", "ARG TARGETOS", "ARG TARGETARCH", "RUN go test ./..."} {
		if !strings.Contains(build, "\n"+line+"\n") {
			t.Errorf("the build stage lacks %q", line)
		}
	}
	if strings.Index(build, "RUN go test") > strings.Index(build, "go build") {
		t.Error("the gate stands after the build")
	}
	if !strings.Contains(ship, "\nUSER 65532:65532\n") || !strings.Contains(ship, "\nCMD [\"/handler\"]\n") || strings.Contains(ship, "\nRUN ") {
		t.Errorf("the last stage is\n%s", ship)
	}
	if strings.Contains(string(data), "fwatchdog") || strings.Count(string(data), "\nFROM ") != 2 {
		t.Error("there is a watchdog in the image")
	}
	for _, f := range []string{"handler.go", "handler_test.go", "go.mod", "go.sum"} {
		if _, err := os.Stat(filepath.Join(templateFolder, "function", f)); err != nil {
			t.Error(err)
		}
	}
}

// faas-cli new, in this repository, must not make git ignore the template: the
// lines that it would add are there, and are not the last word.
func TestGitignoreKeepsTheTemplate(t *testing.T) {
	data, err := os.ReadFile("../.gitignore")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(data), "\n")
	for _, line := range []string{"template", "build", ".secrets"} {
		if !slices.Contains(lines, line) {
			t.Errorf(".gitignore lacks the line %q, which faas-cli new would put at its end", line)
		}
	}
	if i := slices.Index(lines, "!/template/"); i < slices.Index(lines, "template") {
		t.Error(".gitignore swallows the template")
	}
}
