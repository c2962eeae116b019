package charts

// documented_test.go holds the chart and the dashboard against the connector.

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func source(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestEnvironmentIsRead: the connector knows each variable that the chart sets.
// A wrong name would be silence, not an error.
func TestEnvironmentIsRead(t *testing.T) {
	page := source(t, "../docs/CONNECTOR.md")
	_, page, _ = strings.Cut(page, "## Environment")
	page, _, ok := strings.Cut(page, "\n## ")
	if !ok {
		t.Fatal("docs/CONNECTOR.md has no section Environment")
	}
	each(t, func(t *testing.T, values map[string]any) {
		for _, e := range pods(objects(t, values))["connector"].Spec.Containers[0].Env {
			switch e.Name {
			case "GOMEMLIMIT", "no_proxy": // of Go
			default:
				if !strings.Contains(page, "`"+e.Name+"`") {
					t.Errorf("the connector does not read %s", e.Name)
				}
			}
		}
	})
}

// exported are the metrics of the connector's source: each name with its labels.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	made := regexp.MustCompile(`(counter|gauge|histogram)\("(sheaf_[a-z_]+)", "[^"]*"((?:, "[a-z_]+")*)\)`)
	all := map[string][]string{}
	for _, m := range made.FindAllStringSubmatch(source(t, "../connector/metrics.go"), -1) {
		labels := regexp.MustCompile(`[a-z_]+`).FindAllString(m[3], -1)
		if m[1] != "histogram" {
			all[m[2]] = labels
			continue
		}
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			all[m[2]+suffix] = append([]string{"le"}, labels...)
		}
	}
	if len(all) < 10 {
		t.Fatalf("only %d metrics are found in the connector's source: is it written in another way now?", len(all))
	}
	return all
}

// TestDashboard: each query asks for metrics that the connector exports, by
// labels that they have, and each metric is on the dashboard.
func TestDashboard(t *testing.T) {
	var dashboard struct {
		Title  string
		UID    string
		Panels []struct {
			ID      int
			Type    string
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	text := source(t, "sheaf/dashboards/sheaf.json")
	if err := json.Unmarshal([]byte(text), &dashboard); err != nil {
		t.Fatal(err)
	}
	metrics := exported(t)
	shown := map[string]bool{}
	ids := map[int]bool{}
	word := regexp.MustCompile(`[a-z_]+`)
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("%s: two panels have the id %d", p.Title, p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s asks for nothing", p.Title)
		}
		for _, target := range p.Targets {
			var labels []string
			for _, name := range regexp.MustCompile(`sheaf_[a-z_]+`).FindAllString(target.Expr, -1) {
				of, known := metrics[name]
				if !known {
					t.Errorf("%s: the connector exports no %s", p.Title, name)
				}
				shown[name] = true
				labels = append(labels, of...)
			}
			if len(labels) == 0 && !strings.Contains(target.Expr, "sheaf_") {
				t.Errorf("%s: a query asks for nothing of sheaf's", p.Title)
			}
			for _, by := range regexp.MustCompile(`by \(([^)]*)\)|\{([a-z_]+)[=!]`).FindAllStringSubmatch(target.Expr, -1) {
				for _, l := range word.FindAllString(by[1]+by[2], -1) {
					if !slices.Contains(labels, l) {
						t.Errorf("%s: no metric of %q has the label %s", p.Title, target.Expr, l)
					}
				}
			}
		}
	}
	for name := range metrics {
		if !shown[name] && !strings.HasSuffix(name, "_sum") && !strings.HasSuffix(name, "_count") {
			t.Errorf("%s is not on the dashboard", name)
		}
	}
	for i, p := range dashboard.Panels {
		for _, q := range dashboard.Panels[i+1:] {
			if a, b := p.GridPos, q.GridPos; a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("%s lies over %s", p.Title, q.Title)
			}
		}
	}
	// As Grafana's sidecar gets it.
	maps := only[*corev1.ConfigMap](objects(t, map[string]any{"dashboard": map[string]any{"create": true}}))
	i := slices.IndexFunc(maps, func(m *corev1.ConfigMap) bool { return m.Labels["grafana_dashboard"] == "1" })
	if i < 0 || maps[i].Data["sheaf.json"] != strings.TrimSpace(text) {
		t.Error("the ConfigMap does not hold the dashboard as it is")
	}
}
