package egress_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/egress"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func policy(t *testing.T, lookup func(string) []string, allow ...string) *egress.Policy {
	t.Helper()
	p, err := egress.New(egress.Config{Param: "url", Code: "call", Calls: "calls to", List: "the list", Example: "https://example.com/x", Allow: allow,
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			var addrs []netip.Addr
			for _, a := range lookup(host) {
				addrs = append(addrs, netip.MustParseAddr(a))
			}
			return addrs, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Control 8: what is not public is refused, in every form that it can be
// written in.
func TestControl08Check(t *testing.T) {
	names := map[string][]string{"public.example": {"93.184.216.34"}, "mixed.example": {"93.184.216.34", "10.0.0.1"}, "inside.example": {"10.0.0.1"}}
	p := policy(t, func(host string) []string { return names[host] }, "192.168.7.0/24", "hooks.example:8443", "127.1.1.1")
	for url, code := range map[string]string{
		"https://public.example/x":              "",
		"http://93.184.216.34":                  "",
		"http://192.168.7.9/":                   "",
		"http://hooks.example:8443/":            "",
		"http://HOOKS.example:8443/":            "",
		"http://127.1.1.1:1/":                   "",
		"http://[2606:4700::1111]/":             "",
		"http://unknown.example/":               "",
		"http://mixed.example/":                 "call_not_allowed",
		"http://inside.example/":                "call_not_allowed",
		"http://hooks.example:8444/inside":      "",
		"http://127.0.0.1/":                     "call_not_allowed",
		"http://0.0.0.0/":                       "call_not_allowed",
		"http://10.1.2.3/":                      "call_not_allowed",
		"http://172.31.0.1/":                    "call_not_allowed",
		"http://192.168.8.1/":                   "call_not_allowed",
		"http://100.64.0.1/":                    "call_not_allowed",
		"http://169.254.169.254/":               "call_not_allowed",
		"http://198.18.0.1/":                    "call_not_allowed",
		"http://224.0.0.1/":                     "call_not_allowed",
		"http://255.255.255.255/":               "call_not_allowed",
		"http://[::1]/":                         "call_not_allowed",
		"http://[::]/":                          "call_not_allowed",
		"http://[::ffff:10.0.0.1]/":             "call_not_allowed",
		"http://[::ffff:a9fe:a9fe]/":            "call_not_allowed",
		"http://[64:ff9b::a00:1]/":              "call_not_allowed",
		"http://[2002:a00:1::]/":                "call_not_allowed",
		"http://[fd00::1]/":                     "call_not_allowed",
		"http://[fe80::1%25eth0]/":              "call_not_allowed",
		"http://[ff02::1]/":                     "call_not_allowed",
		"ftp://public.example/":                 "bad_call_url",
		"//public.example/":                     "bad_call_url",
		"http:///x":                             "bad_call_url",
		"http://a:secret@public.example/":       "bad_call_url",
		"http://public.example:0/":              "bad_call_url",
		"http://public.example:70000/":          "bad_call_url",
		"http://public.example:x/":              "bad_call_url",
		"%zz":                                   "bad_call_url",
		"":                                      "bad_call_url",
		"http://x/" + strings.Repeat("x", 2048): "bad_call_url",
	} {
		got := ""
		if no := p.Check(t.Context(), url); no != nil {
			got = no.Code
			if no.Param != "url" || strings.Contains(no.Detail, "secret") {
				t.Errorf("%q: %+v", url, no)
			}
		}
		if got != code {
			t.Errorf("%.60q: %q, want %q", url, got, code)
		}
	}
	for _, entry := range []string{"", "x", "10.0.0.0/33", ":80", "host:"} {
		if _, err := egress.New(egress.Config{Allow: []string{entry}}); err == nil {
			t.Errorf("allow-list entry %q was taken", entry)
		}
	}
}

// A name that leads elsewhere by the time of the call leads nowhere, a redirect
// is not followed, and an answer is not unpacked.
func TestControl08Client(t *testing.T) {
	calls := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls++
		if r.URL.Path == "/moved" {
			http.Redirect(w, r, "/", http.StatusFound)
			return
		}
		if r.Header.Get("Accept-Encoding") != "" {
			t.Errorf("Accept-Encoding is %q", r.Header.Get("Accept-Encoding"))
		}
		_, _ = io.WriteString(w, "here")
	}))
	t.Cleanup(srv.Close)
	_, port, _ := strings.Cut(strings.TrimPrefix(srv.URL, "http://"), ":")
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	rebound := policy(t, func(string) []string { return []string{"127.0.0.1", "::ffff:127.0.0.1"} })
	_, err := rebound.Client(5 * time.Second).Get("http://public.example:" + port)
	if p, ok := errors.AsType[*wire.Problem](err); !ok || p.Code != "call_not_allowed" || calls != 0 {
		t.Errorf("rebound: %v, %d calls", err, calls)
	}
	allowed := policy(t, func(string) []string { return []string{"127.0.0.1"} }, "public.example:"+port)
	for path, status := range map[string]int{"/": 200, "/moved": 302} {
		resp, err := allowed.Client(5 * time.Second).Get("http://public.example:" + port + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != status {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
	nowhere := policy(t, func(string) []string { return nil })
	if _, err := nowhere.Client(time.Second).Get("http://nowhere.example/"); err == nil || !strings.Contains(err.Error(), "has no address") {
		t.Errorf("nowhere: %v", err)
	}
}
