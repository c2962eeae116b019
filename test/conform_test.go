package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
)

// conformed is what sheaf conform says as JSON.
type conformed struct {
	Hold, Broken int
	NotChecked   int `json:"not_checked"`
	Checks       []struct{ Path, Promise, Effects, Check, Result, Detail string }
}

func conformAt(t *testing.T, code int, args ...string) (all conformed, of map[string]string) {
	t.Helper()
	got := cli(t, "", append([]string{"conform", "--output", "json"}, args...)...)
	if err := json.Unmarshal([]byte(got.out), &all); err != nil || got.code != code {
		t.Fatalf("exit code %d, want %d: %v\n%s\n%s", got.code, code, err, got.out, got.err)
	}
	of = map[string]string{}
	count := map[string]int{}
	for _, c := range all.Checks {
		if c.Detail == "" || c.Path == "" || c.Promise == "" || c.Effects == "" {
			t.Errorf("a promise lacks something: %+v", c)
		}
		of[c.Check] = c.Result
		count[c.Result]++
	}
	if all.Hold != count["holds"] || all.Broken != count["BROKEN"] || all.NotChecked != count["not checked"] || len(of) != len(all.Checks) {
		t.Errorf("counts are wrong: %+v", all)
	}
	return all, of
}

// On a stack of its own all holds, but for the bus that is not in the command;
// and the page on reliability has the same promises.
func TestConform(t *testing.T) {
	all, of := conformAt(t, 0)
	for check, result := range of {
		if result != "holds" && check != "topic-stan" {
			t.Errorf("%s: %s", check, result)
		}
	}
	page, err := os.ReadFile("../docs/RELIABILITY.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all.Checks {
		if !strings.Contains(string(page), fmt.Sprintf("| %s | %s | %s | `%s` | %s:", c.Path, c.Promise, c.Effects, c.Check, c.Result)) {
			t.Errorf("docs/RELIABILITY.md lacks %s (make reliability writes it anew)", c.Check)
		}
	}
	if !regexp.MustCompile(`\*\*wrong answers\*\* \| \*\*0\*\* \|\n\| \*\*jobs lost\*\* \| \*\*0\*\*`).Match(page) {
		t.Error("docs/RELIABILITY.md does not tell of a soak without wrong answers and lost jobs")
	}
}

// At somebody else's gateway nothing is killed, and what cannot be seen there
// is not said to hold. One that answers wrong is found out.
func TestConformAtAGateway(t *testing.T) {
	_, url := startUp(t, "--port", "0", "--workers", "3")
	_, of := conformAt(t, 0, "--gateway", url)
	for check, result := range of {
		want := "holds"
		switch check {
		case "async-runs-again", "async-same-id", "job-survives", "topic-core", "topic-jetstream", "topic-stan", "rank-once":
			want = "not checked"
		}
		if result != want {
			t.Errorf("%s: %s, want %s", check, result, want)
		}
	}
	liar := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in, err := io.ReadAll(r.Body)
		switch {
		case err != nil:
		case strings.HasPrefix(r.URL.Path, "/async-function/"), r.URL.Path == "/function/master/jobs" && r.Method == http.MethodPost:
			w.WriteHeader(http.StatusAccepted)
			fmt.Fprintf(w, `{"id":%q}`, r.Header.Get("Idempotency-Key"))
		case strings.HasPrefix(r.URL.Path, "/function/worker/-/"):
			w.Header().Set("Sheaf-Rank", "0")
			w.Header().Set("Sheaf-Replica", "always-me")
		case strings.HasSuffix(r.URL.Path, "/result"):
			fmt.Fprint(w, "w0 1\n")
		case strings.HasPrefix(r.URL.Path, "/function/master/jobs"):
			fmt.Fprint(w, `{"state":"succeeded","blocks":{"total":1,"done":1}}`)
		default: // all words but the last one
			fmt.Fprint(w, strings.TrimSuffix(sequential(string(in)), "\n"))
		}
	}))
	defer liar.Close()
	_, of = conformAt(t, 1, "--gateway", liar.URL)
	for _, check := range []string{"plain-direct", "plain-gateway", "plain-topic", "async-is-a-job", "job-same-key", "rank-reaches"} {
		if of[check] != "BROKEN" {
			t.Errorf("a gateway that lies: %s: %s", check, of[check])
		}
	}
	empty := httptest.NewServer(http.NotFoundHandler())
	defer empty.Close()
	if all, _ := conformAt(t, 1, "--gateway", empty.URL); all.Hold != 0 || all.Broken != 0 {
		t.Errorf("a gateway without functions: %+v", all)
	}
}
