package local_test

import (
	"strings"
	"testing"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/connector"
)

// An annotation that looks like sheaf's and is none is told in the function's
// log, where faas-cli logs shows it.
func TestUnknownAnnotations(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for name, c := range map[string]struct {
		annotations map[string]string
		warns       string
	}{
		"good":     {map[string]string{connector.AnnotationDeliver: "all", "topic": "a", "sheafy.x": "1"}, ""},
		"misspelt": {map[string]string{"sheaf.delivr": "all"}, "annotation sheaf.delivr is not known and does nothing; known are " + connector.AnnotationDeliver},
	} {
		if err := m.Deploy(types.FunctionDeployment{Service: name, Image: "web", Annotations: &c.annotations}, true); err != nil {
			t.Fatal(err)
		}
		m.ready(name, 1)
		_, body := m.call("GET", "/system/logs?name="+name, "")
		if c.warns == "" && strings.Contains(body, "annotation") || !strings.Contains(body, c.warns) {
			t.Errorf("%s: the log is %s, want %q in it", name, body, c.warns)
		}
	}
}
