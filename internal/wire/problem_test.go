package wire_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/sheaf-project/sheaf/internal/wire"
)

func TestProblemWrite(t *testing.T) {
	for _, c := range []struct {
		name    string
		problem *wire.Problem
		body    string
		header  map[string]string
	}{
		{
			"least", wire.Refuse(422, wire.CodeRejected, "row 7 has no id"),
			`{"type":"about:blank","title":"Unprocessable Entity","status":422,"code":"block_rejected","detail":"row 7 has no id"}`,
			map[string]string{"Sheaf-Code": "block_rejected", "Retry-After": "", "Sheaf-Retry": ""},
		},
		{
			"all", &wire.Problem{Type: "t", Title: "T", Status: 413, Code: "c", Detail: "d", Param: "p", Limit: 128, Job: "j", Missing: []int{1}},
			`{"type":"t","title":"T","status":413,"code":"c","detail":"d","param":"p","limit":128,"job":"j","missing":[1]}`,
			map[string]string{"Sheaf-Code": "c"},
		},
		{
			"chained", wire.Refuse(429, wire.CodeBusy, "busy").About("workers").Within("1m0s").After(50 * time.Millisecond),
			`{"type":"about:blank","title":"Too Many Requests","status":429,"code":"busy","detail":"busy","param":"workers","limit":"1m0s"}`,
			map[string]string{"Retry-After": "1", "Sheaf-Retry": "50"},
		},
		{
			"two and a half seconds", wire.Refuse(503, wire.CodeDraining, "ending").After(2500 * time.Millisecond),
			`{"type":"about:blank","title":"Service Unavailable","status":503,"code":"draining","detail":"ending"}`,
			map[string]string{"Retry-After": "3", "Sheaf-Retry": "2500"},
		},
		{
			"a limit that is not JSON", wire.Refuse(400, "c", "d").Within(func() {}),
			`{"type":"about:blank","status":500,"detail":"a refusal could not be written"}`,
			map[string]string{"Sheaf-Code": "c"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			w.Header().Set("Content-Encoding", "gzip") // of the answer that is not given
			c.problem.Write(w)
			if got := strings.TrimSuffix(w.Body.String(), "\n"); got != c.body {
				t.Errorf("got  %s\nwant %s", got, c.body)
			}
			if w.Code != c.problem.Status {
				t.Errorf("status %d, want %d", w.Code, c.problem.Status)
			}
			want := map[string]string{
				"Content-Type": "application/problem+json", "X-Content-Type-Options": "nosniff", "Content-Encoding": "",
				"Content-Length": fmt.Sprint(w.Body.Len()),
			}
			for _, m := range []map[string]string{want, c.header} {
				for key, value := range m {
					if got := w.Header().Get(key); got != value {
						t.Errorf("header %s is %q, want %q", key, got, value)
					}
				}
			}
		})
	}
}

func TestProblemIsAnError(t *testing.T) {
	var err error = wire.Refuse(400, "c", "the sentence")
	if p, ok := errors.AsType[*wire.Problem](fmt.Errorf("read: %w", err)); !ok || p.Code != "c" || err.Error() != "the sentence" {
		t.Errorf("got %v", err)
	}
}

// A handler's error may be as long as it likes; a refusal may not.
func TestProblemDetailIsBounded(t *testing.T) {
	for name, detail := range map[string]string{"long": strings.Repeat("x", 1<<20), "multi-byte": strings.Repeat("€", 1000)} {
		p := wire.Refuse(500, wire.CodeFailed, detail)
		if len(p.Detail) > 2048 || len(p.Detail) < 2000 || !strings.HasSuffix(p.Detail, "...") || !utf8.ValidString(p.Detail) {
			t.Errorf("%s: got %d bytes that end %q", name, len(p.Detail), p.Detail[len(p.Detail)-9:])
		}
		if body, err := json.Marshal(p); err != nil || len(body) > 16<<10 {
			t.Errorf("%s: %d bytes (%v)", name, len(body), err)
		}
	}
}
