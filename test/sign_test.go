package test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The local stack has a key, and its functions use it, whichever way blocks go.
// Those that have another are refused.
func TestSignedStack(t *testing.T) {
	b := start(t, 2, nil)
	other := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(other, []byte("a key that the master does not have\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.deploy("keyless", "sheaf/worker", 1, map[string]string{"sheaf_key_file": ""})
	b.deploy("stranger", "sheaf/worker", 1, map[string]string{"sheaf_key_file": other})
	b.deploy("strict", "sheaf/worker", 1, map[string]string{"sheaf_unsigned": "refuse"})
	for _, name := range []string{"keyless", "stranger", "strict"} {
		b.waitFor(name, 1)
	}
	const input = "a b a\n"
	for _, c := range []struct{ query, refused string }{
		{"verify=require", ""},
		{"verify=require&route=gateway", ""},
		{"function=strict&verify=require", ""},
		{"function=strict&verify=require&route=gateway", ""},
		{"function=keyless", ""}, // it is development, where a digest proves that a result is whole
		{"function=keyless&verify=require", ""},
		{"function=stranger", "same key"},
		{"function=stranger&route=gateway", "same key"},
	} {
		a, err := b.try(t.Context(), c.query, strings.NewReader(input))
		switch {
		case err != nil:
			t.Errorf("%s: %v", c.query, err)
		case c.refused == "" && (a.status != http.StatusOK || a.body != sequential(input)):
			t.Errorf("%s: %d %s", c.query, a.status, a.body)
		case c.refused != "" && (a.status < 400 || !strings.Contains(a.body, c.refused)):
			t.Errorf("%s: %d %s, want a refusal that says %q", c.query, a.status, a.body, c.refused)
		}
	}
	if status, body := ask(t, http.MethodPost, b.URL+"/function/worker", "by hand"); status != http.StatusOK {
		t.Errorf("a call by hand: %d %s", status, body)
	}
	if status, body := ask(t, http.MethodPost, b.URL+"/function/strict", "by hand"); status != http.StatusUnauthorized || !strings.Contains(body, "signature_missing") {
		t.Errorf("a call by hand where all must be signed: %d %s", status, body)
	}
}
