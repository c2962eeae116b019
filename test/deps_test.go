package test

// deps_test.go keeps the rooms of docs/ARCHITECTURE.md apart: who may import
// whom, and what may stand in go.mod.

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sheaf-project/sheaf"

// rooms says for each package which packages of this module it may import, and
// which modules. A package that is not here fails: a new room is a decision.
// Arrows point down only, and adapters do not import each other.
var rooms = map[string]struct{ own, modules []string }{
	// The core: the standard library only.
	"":                  {own: []string{"internal/schedule"}},
	"internal/schedule": {},
	"internal/wire":     {own: []string{""}},
	"internal/http1":    {},
	"internal/egress":   {own: []string{"internal/wire"}},
	"internal/peer":     {own: []string{""}},
	"internal/serve":    {own: []string{"", "internal/http1", "internal/peer", "internal/wire"}},

	"internal/routetest": {own: []string{"", "internal/wire"}},

	"internal/login": {modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nkeys"}},

	// Only tests import it, and with it the server of NATS Streaming.
	"internal/bustest": {own: []string{"broker"}, modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nuid", "github.com/nats-io/stan.go",
		"github.com/nats-io/nats-server/v2", "github.com/nats-io/nats-streaming-server", "go.uber.org/goleak"}},

	// Adapters, each to one neighbour.
	"worker":   {own: []string{"", "internal/peer", "internal/serve", "internal/wire"}},
	"direct":   {own: []string{"", "internal/http1", "internal/wire"}},
	"gateway":  {own: []string{"", "internal/wire"}, modules: []string{"github.com/openfaas/faas-provider", "github.com/openfaas/go-sdk"}},
	"registry": {own: []string{""}, modules: []string{"github.com/nats-io/nats.go", "github.com/openfaas/faas-provider"}},
	"hello":    {own: []string{"", "internal/wire"}},
	"kube":     {own: []string{""}, modules: []string{"github.com/go-logr/logr", "k8s.io/api", "k8s.io/apimachinery", "k8s.io/client-go", "k8s.io/klog/v2"}},
	"tracing":  {modules: []string{"go.opentelemetry.io/otel", "go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp", "go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/trace"}},
	"topic":    {own: []string{"", "internal/wire"}, modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nuid"}},
	"broker":   {own: []string{"internal/login"}, modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nuid", "github.com/nats-io/stan.go"}},

	"job": {own: []string{""}, modules: []string{"github.com/nats-io/nats.go"}},

	// What wires adapters together.
	"master": {own: []string{"", "direct", "gateway", "internal/egress", "internal/login", "internal/serve", "internal/wire", "job", "registry", "topic"},
		modules: []string{"github.com/nats-io/nats.go"}},
	"connector": {own: []string{"", "broker", "internal/wire", "topic", "tracing"},
		modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nuid", "github.com/openfaas/connector-sdk",
			"github.com/openfaas/faas-provider", "github.com/openfaas/go-sdk", "github.com/prometheus/client_golang", "go.opentelemetry.io/otel", "go.opentelemetry.io/otel/trace"}},
	"local": {own: []string{"", "gateway", "internal/egress", "internal/login", "internal/wire", "registry"},
		modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nats-server/v2", "github.com/nats-io/nkeys", "github.com/openfaas/faas-provider"}},

	// What a function's author writes against.
	"function": {own: []string{"", "internal/serve", "internal/wire", "master", "worker"}},

	// Functions and commands.
	"test/mutants":        {},
	"test/sbom":           {},
	"test/reliability":    {},
	"functions/wordcount": {own: []string{""}},
	"functions/worker":    {own: []string{"functions/wordcount", "worker"}},
	"functions/master":    {own: []string{"function", "functions/wordcount", "master"}},
	"cmd/connector": {own: []string{"broker", "connector", "gateway", "hello", "internal/serve", "internal/wire", "kube", "registry", "tracing"},
		modules: []string{"github.com/nats-io/nats.go", "github.com/openfaas/faas-provider", "github.com/prometheus/client_golang"}},
	"internal/bench": {own: []string{"", "direct", "functions/wordcount", "internal/wire", "worker"},
		modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nats-server/v2"}},
	"cmd/sheaf": {own: []string{"", "broker", "connector", "tracing", "functions/wordcount", "gateway", "internal/bench", "local", "master", "registry", "worker"},
		modules: []string{"github.com/nats-io/nats.go", "github.com/openfaas/faas-provider", "go.opentelemetry.io/otel", "go.opentelemetry.io/otel/trace", "golang.org/x/term", "gopkg.in/yaml.v3"}},
	"test": {},
}

type listed struct {
	ImportPath string
	Imports    []string
	Standard   bool
	Module     *struct{ Path string }
}

// list runs go list in the module's root.
func list(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Standard,Module"}, args...)...)
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("go list: %v\n%s", err, e.Stderr)
		}
		t.Fatal(err)
	}
	var packages []listed
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); err == io.EOF {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func TestArrowsPointDown(t *testing.T) {
	t.Parallel()
	moduleOf := map[string]string{} // of packages that are not ours
	for _, p := range list(t, "-deps", "./...") {
		switch {
		case p.Standard:
			moduleOf[p.ImportPath] = "std"
		case p.Module != nil:
			moduleOf[p.ImportPath] = p.Module.Path
		}
	}
	for _, p := range list(t, "./...") {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		room, known := rooms[name]
		if !known {
			t.Errorf("package %q is no known room: give it a place in docs/ARCHITECTURE.md and here", name)
			continue
		}
		for _, imp := range p.Imports {
			switch m := moduleOf[imp]; m {
			case "std":
			case module:
				own := strings.TrimPrefix(strings.TrimPrefix(imp, module), "/")
				if !slices.Contains(room.own, own) {
					t.Errorf("%q imports %q: the arrow is not in docs/ARCHITECTURE.md", name, own)
				}
			default:
				if !slices.Contains(room.modules, m) {
					t.Errorf("%q imports %s: only the room of that neighbour may", name, imp)
				}
			}
		}
	}
}

// The end-user licence of OpenFaaS CE covers these: they may be talked to over
// HTTP, and must not be built upon.
func TestNoModuleUnderTheCommunityLicence(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("go", "list", "-m", "all")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		path, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		for _, bad := range []string{"github.com/openfaas/faas", "github.com/openfaas/faas/gateway", "github.com/openfaas/faas-netes", "github.com/openfaas/faasd"} {
			if path == bad || strings.HasPrefix(path, bad+"/") {
				t.Errorf("%s is in the module graph", path)
			}
		}
	}
}
