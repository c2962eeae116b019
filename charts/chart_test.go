// Package charts tests the chart: that helm and Kubernetes take it, that it
// gives away no right that it need not, and that its documentation is true.
package charts

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

var update = flag.Bool("update", false, "write the chart's README.md anew")

// sets are the values that the chart is tested with: none, and the files of
// testdata, each as a user may have it.
func sets(t *testing.T) map[string]map[string]any {
	t.Helper()
	all := map[string]map[string]any{"default": {}}
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no value sets in testdata: %v", err)
	}
	for _, f := range files {
		v, err := chartutil.ReadValuesFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(filepath.Base(f), ".yaml")] = v
	}
	return all
}

func load(t *testing.T) *chart.Chart {
	t.Helper()
	c, err := loader.Load("sheaf")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const release, releaseNamespace = "sheaf", "openfaas"

// render is what helm template prints, by file.
func render(t *testing.T, values map[string]any) (map[string]string, error) {
	t.Helper()
	c := load(t)
	v, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{Name: release, Namespace: releaseNamespace, IsInstall: true, Revision: 1}, nil)
	if err != nil {
		return nil, err
	}
	return engine.Render(c, v)
}

// objects are what the chart installs, decoded as the Kubernetes API does it
// when told to be strict: an unknown field, or one that stands twice, fails.
func objects(t *testing.T, values map[string]any) []runtime.Object {
	t.Helper()
	files, err := render(t, values)
	if err != nil {
		t.Fatal(err)
	}
	decoder := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	var all []runtime.Object
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		for docs := k8syaml.NewYAMLReader(bufio.NewReader(strings.NewReader(files[name]))); ; {
			doc, err := docs.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(bytes.TrimSpace(doc)) == 0 {
				continue
			}
			o, _, err := decoder.Decode(doc, nil, nil)
			if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, doc)
			}
			all = append(all, o)
		}
	}
	return all
}

// only returns the objects of one kind.
func only[T runtime.Object](all []runtime.Object) []T {
	var some []T
	for _, o := range all {
		if x, ok := o.(T); ok {
			some = append(some, x)
		}
	}
	return some
}

func each(t *testing.T, f func(t *testing.T, values map[string]any)) {
	t.Helper()
	all := sets(t)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) { f(t, all[name]) })
	}
}

// TestLint is helm lint --strict.
func TestLint(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		l := lint.AllWithKubeVersion("sheaf", values, releaseNamespace, nil)
		for _, m := range l.Messages {
			if m.Severity >= support.WarningSev {
				t.Error(m)
			}
		}
	})
}

// TestObjects: each object decodes strictly, is named once, and stands in a
// namespace that the chart may speak of.
func TestObjects(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		seen := map[string]bool{}
		all := objects(t, values)
		for _, o := range all {
			m := o.(metav1.Object)
			id := fmt.Sprintf("%s %s/%s", o.GetObjectKind().GroupVersionKind().Kind, m.GetNamespace(), m.GetName())
			if seen[id] {
				t.Error("twice:", id)
			}
			seen[id] = true
			if !slices.Contains([]string{releaseNamespace, "openfaas-fn", "jobs"}, m.GetNamespace()) {
				t.Error("in no namespace of ours:", id)
			}
			if m.GetLabels()["app.kubernetes.io/instance"] != release {
				t.Error("without the release's label:", id)
			}
		}
		if len(only[*appsv1.Deployment](all)) != 1 {
			t.Error("there is not one Deployment, the connector's")
		}
	})
}

// pods are the pods that the chart makes, by component.
func pods(all []runtime.Object) map[string]corev1.PodTemplateSpec {
	m := map[string]corev1.PodTemplateSpec{}
	for _, d := range only[*appsv1.Deployment](all) {
		m[d.Spec.Template.Labels["app.kubernetes.io/component"]] = d.Spec.Template
	}
	for _, s := range only[*appsv1.StatefulSet](all) {
		m[s.Spec.Template.Labels["app.kubernetes.io/component"]] = s.Spec.Template
	}
	return m
}

// TestPodsAreConfined: control 17. No root, no writable root, no capability,
// no privilege, no unbounded memory; and no token where none is needed.
func TestPodsAreConfined(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		for name, p := range pods(objects(t, values)) {
			for _, complaint := range unconfined(p.Spec) {
				t.Errorf("%s: %s", name, complaint)
			}
			if token := p.Spec.AutomountServiceAccountToken; token == nil || *token != (name == "connector") {
				t.Errorf("%s: automountServiceAccountToken is %v", name, token)
			}
		}
	})
}

// unconfined tells what a pod may do that it need not.
func unconfined(p corev1.PodSpec) (complaints []string) {
	complain := func(format string, args ...any) { complaints = append(complaints, fmt.Sprintf(format, args...)) }
	if s := p.SecurityContext; s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.RunAsUser == nil || *s.RunAsUser == 0 {
		complain("may run as root")
	} else if s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		complain("has no seccomp profile")
	}
	if p.HostNetwork || p.HostPID || p.HostIPC {
		complain("shares namespaces with the node")
	}
	for _, v := range p.Volumes {
		if v.HostPath != nil {
			complain("mounts the node's %s", v.HostPath.Path)
		}
	}
	for _, c := range slices.Concat(p.InitContainers, p.Containers) {
		s := c.SecurityContext
		if s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
			complain("%s: may gain privileges", c.Name)
		}
		if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
			complain("%s: may write to its root", c.Name)
		}
		if s == nil || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 {
			complain("%s: has capabilities", c.Name)
		}
		if s != nil && s.Privileged != nil && *s.Privileged {
			complain("%s: is privileged", c.Name)
		}
		if c.Resources.Limits.Memory().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() {
			complain("%s: has no memory limit, or asks for no memory or CPU", c.Name)
		}
		if c.LivenessProbe == nil || c.ReadinessProbe == nil {
			complain("%s: is not probed", c.Name)
		}
	}
	return complaints
}

// TestRights: control 15. The whole of the chart's rights in Kubernetes is to
// read EndpointSlices of the functions' namespace.
func TestRights(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		all := objects(t, values)
		if n := len(only[*rbacv1.ClusterRole](all)) + len(only[*rbacv1.ClusterRoleBinding](all)); n > 0 {
			t.Errorf("%d objects give rights in the whole cluster", n)
		}
		namespace := "openfaas-fn"
		if f, ok := values["functions"].(map[string]any); ok && f["namespace"] != nil {
			namespace = f["namespace"].(string)
		}
		account := pods(all)["connector"].Spec.ServiceAccountName
		roles, bindings := only[*rbacv1.Role](all), only[*rbacv1.RoleBinding](all)
		if r, ok := values["rbac"].(map[string]any); ok && r["create"] == false {
			if len(roles)+len(bindings) > 0 {
				t.Error("rbac.create is off, and there are roles")
			}
			return
		}
		if len(roles) != 1 || len(bindings) != 1 {
			t.Fatalf("%d roles and %d bindings, want one of each", len(roles), len(bindings))
		}
		want := []rbacv1.PolicyRule{{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"get", "list", "watch"}}}
		if fmt.Sprint(roles[0].Rules) != fmt.Sprint(want) || roles[0].Namespace != namespace {
			t.Errorf("the role is %v in %s, want %v in %s", roles[0].Rules, roles[0].Namespace, want, namespace)
		}
		b := bindings[0]
		if b.Namespace != namespace || b.RoleRef.Kind != "Role" || b.RoleRef.Name != roles[0].Name ||
			len(b.Subjects) != 1 || b.Subjects[0].Kind != "ServiceAccount" || b.Subjects[0].Name != account || b.Subjects[0].Namespace != releaseNamespace {
			t.Errorf("the binding gives %v to %v in %s", b.RoleRef, b.Subjects, b.Namespace)
		}
	})
}

// TestScraped: the Prometheus of OpenFaaS keeps pods by these annotations, and
// takes port and path from them.
func TestScraped(t *testing.T) {
	p := pods(objects(t, nil))["connector"]
	for k, v := range map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "8080", "prometheus.io/path": "/metrics"} {
		if p.Annotations[k] != v {
			t.Errorf("annotation %s is %q, want %q", k, p.Annotations[k], v)
		}
	}
	if port := p.Spec.Containers[0].Ports[0]; port.ContainerPort != 8080 {
		t.Errorf("the container's first port is %d", port.ContainerPort)
	}
}

// TestImages: an image has the name that the values give, without the host of
// a registry unless they name one, and a digest goes before a tag. None is of
// OpenFaaS's Community Edition, whose licence forbids to ship it.
func TestImages(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		for name, p := range pods(objects(t, values)) {
			for _, c := range p.Spec.Containers {
				if strings.Contains(c.Image, "openfaas/") {
					t.Errorf("%s: image %s", name, c.Image)
				}
				if host, _, _ := strings.Cut(c.Image, "/"); len(values) == 0 && strings.ContainsAny(host, ".") && strings.Contains(c.Image, "/") {
					t.Errorf("%s: image %s names a registry", name, c.Image)
				}
			}
		}
	})
	digest := "sha256:" + strings.Repeat("0", 64)
	p := pods(objects(t, map[string]any{"connector": map[string]any{"image": map[string]any{"repository": "registry.example.com/me/connector", "tag": "v1", "digest": digest}}}))
	if got, want := p["connector"].Spec.Containers[0].Image, "registry.example.com/me/connector@"+digest; got != want {
		t.Errorf("image is %s, want %s", got, want)
	}
}

// TestSecretsAreMounted: control 18. Secrets come as files of Secrets that the
// user made; the chart makes none and puts none into the environment.
func TestSecretsAreMounted(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		all := objects(t, values)
		if n := len(only[*corev1.Secret](all)); n > 0 {
			t.Errorf("the chart makes %d Secrets", n)
		}
		for name, p := range pods(all) {
			for _, c := range p.Spec.Containers {
				for _, e := range c.Env {
					if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
						t.Errorf("%s: variable %s holds a secret", name, e.Name)
					}
				}
				for _, m := range c.VolumeMounts {
					i := slices.IndexFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
					if i < 0 {
						if name == "nats" && m.Name == "data" { // of a claim
							continue
						}
						t.Errorf("%s: mounts %s, which is no volume", name, m.Name)
						continue
					}
					if s := p.Spec.Volumes[i].Secret; s != nil && (!m.ReadOnly || s.DefaultMode == nil || *s.DefaultMode&0o007 != 0) {
						t.Errorf("%s: everybody may read %s, or it may be written", name, m.Name)
					}
				}
			}
		}
	})
}

// TestRefused: values that cannot work are refused when the chart is rendered,
// by a sentence that names them.
func TestRefused(t *testing.T) {
	for _, c := range []struct{ name, values, want string }{
		{"unknown key", "conector: {}", "conector"},
		{"unknown key below", "connector: {replica: 2}", "replica"},
		{"wrong type", "connector: {replicas: two}", "replicas"},
		{"negative", "connector: {replicas: -1}", "replicas"},
		{"no such broker", "broker: {type: kafka}", "type"},
		{"no URL", "nats: {enabled: false}", "nats.external.url"},
		{"two NATS", "nats: {enabled: true, external: {url: nats://nats.example.com:4222}}", "nats.enabled=false"},
		{"not a URL", "nats: {enabled: false, external: {url: nats.example.com}}", "url"},
		{"password in a URL", "nats: {enabled: false, external: {url: 'nats://me:secret@nats.example.com:4222'}}", "url"},
		{"no account", "serviceAccount: {create: false}", "serviceAccount.name"},
		{"comma", "connector: {topicDelimiter: ','}", "topicDelimiter"},
		{"not a duration", "connector: {rebuildInterval: soon}", "rebuildInterval"},
		{"not a name", "functions: {workers: [Worker_1]}", "workers"},
		{"tag and host", "connector: {image: {repository: 'sheaf/connector:v1'}}", "repository"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, err := chartutil.ReadValues([]byte(c.values))
			if err != nil {
				t.Fatal(err)
			}
			if _, err = render(t, v); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error that names %s", err, c.want)
			}
		})
	}
}

// TestSchemaKnowsAllValues: values.yaml and values.schema.json have the same
// keys, and nothing else is taken.
func TestSchemaKnowsAllValues(t *testing.T) {
	c := load(t)
	var schema any
	if err := json.Unmarshal(c.Schema, &schema); err != nil {
		t.Fatal(err)
	}
	var compare func(path string, value, schema any)
	compare = func(path string, value, s any) {
		m, ok := value.(map[string]any)
		node := s.(map[string]any)
		if node["type"] == nil && node["enum"] == nil {
			t.Errorf("%s has no type in the schema", path)
		}
		props, _ := node["properties"].(map[string]any)
		if !ok || props == nil {
			return
		}
		if node["additionalProperties"] != false {
			t.Errorf("the schema takes anything below %q", path)
		}
		for k, v := range m {
			if props[k] == nil {
				t.Errorf("%s.%s is not in the schema", path, k)
				continue
			}
			compare(path+"."+k, v, props[k])
		}
		for k := range props {
			if _, ok := m[k]; !ok && k != "global" {
				t.Errorf("%s.%s is in the schema and not in values.yaml", path, k)
			}
		}
	}
	compare("", map[string]any(c.Values), schema)
}

// A setting is a leaf of values.yaml.
type setting struct{ key, value, comment string }

// settings reads values.yaml with its comments.
func settings(t *testing.T) []setting {
	t.Helper()
	b, err := os.ReadFile("sheaf/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	var all []setting
	var walk func(path string, n *yaml.Node)
	walk = func(path string, n *yaml.Node) {
		for i := 0; i < len(n.Content); i += 2 {
			k, v := n.Content[i], n.Content[i+1]
			key := strings.TrimPrefix(path+"."+k.Value, ".")
			comment := strings.Join(strings.Fields(strings.ReplaceAll(k.HeadComment, "#", " ")), " ")
			if comment == "" && v.Kind == yaml.MappingNode && len(v.Content) > 0 {
				walk(key, v)
				continue
			}
			if comment == "" {
				t.Errorf("%s has no comment", key)
			}
			var value any
			if err := v.Decode(&value); err != nil {
				t.Fatal(err)
			}
			text, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, setting{key, string(text), comment})
		}
	}
	walk("", doc.Content[0])
	return all
}

// TestReadmeTable: the chart's README shows all values as they are.
func TestReadmeTable(t *testing.T) {
	const from, to = "<!-- values -->\n", "<!-- end of values -->\n"
	b, err := os.ReadFile("sheaf/README.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(b), from)
	_, after, ok2 := strings.Cut(rest, to)
	if !ok1 || !ok2 {
		t.Fatalf("README.md lacks the marks %q and %q", from, to)
	}
	var table strings.Builder
	table.WriteString("| value | default | what |\n|---|---|---|\n")
	for _, s := range settings(t) {
		fmt.Fprintf(&table, "| `%s` | `%s` | %s |\n", s.key, s.value, s.comment)
	}
	want := before + from + table.String() + to + after
	if string(b) == want {
		return
	}
	if !*update {
		t.Fatal("sheaf/README.md does not show values.yaml as it is: run make chart-readme")
	}
	if err := os.WriteFile("sheaf/README.md", []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestNotes: what helm prints after an installation names this release.
func TestNotes(t *testing.T) {
	each(t, func(t *testing.T, values map[string]any) {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		notes := files["sheaf/templates/NOTES.txt"]
		url := regexp.MustCompile(`nats_url=(\S+)`).FindStringSubmatch(notes)
		if url == nil {
			t.Fatalf("the notes do not say where NATS is:\n%s", notes)
		}
		for _, e := range pods(objects(t, values))["connector"].Spec.Containers[0].Env {
			if e.Name == "nats_url" && e.Value != url[1] {
				t.Errorf("the notes give %s, the connector has %s", url[1], e.Value)
			}
		}
	})
}
