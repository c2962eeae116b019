package test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// files is a server of files that gives ranges, and is not always well.
type files struct {
	*httptest.Server
	requests atomic.Int64

	mu      sync.Mutex // guards all below
	content string
	version string
	breaks  func(n int64) bool // whether to break off the n-th answer midway
	plain   bool               // gives no ranges
}

func newFiles(t *testing.T, content string) *files {
	f := &files{content: content, version: `"1"`}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := f.requests.Add(1)
		f.mu.Lock()
		content, version, breaks, plain := f.content, f.version, f.breaks, f.plain
		f.mu.Unlock()
		switch {
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/file", http.StatusFound)
			return
		case r.URL.Path != "/file":
			http.NotFound(w, r)
			return
		case plain:
			r.Header.Del("Range")
		case breaks != nil && breaks(n):
			w.Header().Set("ETag", version)
			w = &breaking{ResponseWriter: w, left: 100_000}
		}
		if version != "" {
			w.Header().Set("ETag", version)
		}
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(content))
	}))
	t.Cleanup(f.Close)
	return f
}

// breaking breaks the connection after some bytes.
type breaking struct {
	http.ResponseWriter
	left int
}

func (b *breaking) Write(p []byte) (int, error) {
	if len(p) > b.left {
		_, _ = b.ResponseWriter.Write(p[:b.left])
		panic(http.ErrAbortHandler)
	}
	b.left -= len(p)
	return b.ResponseWriter.Write(p)
}

// Inputs by reference: at a URL, whose server breaks off, changes or gives no
// ranges; in an object store; and where they must not be.
func TestInputByReference(t *testing.T) {
	in := text(12, 3<<20)
	f := newFiles(t, in)
	at := strings.TrimPrefix(f.URL, "http://")
	b := start(t, 2, map[string]string{"job_input_allow": at + ",127.9.9.9"})
	named := func(ref string) string { return "block=64KiB&input=" + url.QueryEscape(ref) }
	ends := func(name string, j job, state, code string) job {
		t.Helper()
		end := b.ended(j.ID)
		if end.State != state || end.Error.Code != code {
			t.Errorf("%s: ended as %+v", name, end)
		}
		return end
	}
	right := func(name string, j job, want string) {
		t.Helper()
		end := ends(name, j, "succeeded", "")
		if end.Blocks.Total != end.Blocks.Done {
			t.Errorf("%s: %+v", name, end)
		}
		if a := b.do("GET", jobsPath+"/"+j.ID+"/result", ""); a.status != 200 || a.body != want {
			t.Errorf("%s: the result is %d %.100s", name, a.status, a.body)
		}
	}
	want := sequential(in)
	right("well", b.submit(named(f.URL+"/file"), ""), want)

	f.mu.Lock()
	before := f.requests.Load()
	f.breaks = func(n int64) bool { return n < before+8 }
	f.mu.Unlock()
	broken := b.submit(named(f.URL+"/file"), "", "Idempotency-Key", "broken")
	right("breaking off", broken, want)
	if n := f.requests.Load() - before; n < 5 {
		t.Errorf("%d requests: nothing broke off", n)
	}
	f.mu.Lock()
	f.breaks = nil
	f.mu.Unlock()
	if a := b.do("POST", jobsPath+"?"+named(f.URL+"/file"), "", "Idempotency-Key", "broken"); a.status != 200 {
		t.Errorf("the same again: %d %s", a.status, a.body)
	}

	// It changes while it is read.
	f.mu.Lock()
	f.breaks = func(n int64) bool {
		f.version = `"` + fmt.Sprint(n) + `"` // f.mu is not held here, but only one request is under way
		return true
	}
	f.mu.Unlock()
	ends("changing", b.submit(named(f.URL+"/file"), ""), "failed", "input_changed")
	f.mu.Lock()
	f.breaks, f.version = nil, `"2"`
	f.mu.Unlock()
	if a := b.do("POST", jobsPath+"?"+named(f.URL+"/file"), "", "Idempotency-Key", "broken"); a.status != 409 {
		t.Errorf("another file under the same key: %d %s", a.status, a.body)
	}

	set := func(content, version string, plain bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.content, f.version, f.plain = content, version, plain
	}
	set("", `"empty"`, false)
	right("empty", b.submit(named(f.URL+"/file"), ""), "")
	for _, c := range []struct {
		name, ref, body, version string
		plain                    bool
		status                   int
		code                     string
	}{
		{"no ranges", f.URL + "/file", "", `"1"`, true, 422, "input_without_ranges"},
		{"no version", f.URL + "/file", "", "", false, 422, "input_without_version"},
		{"a weak version", f.URL + "/file", "", `W/"1"`, false, 422, "input_without_version"},
		{"not there", f.URL + "/none", "", `"1"`, false, 422, "input_not_found"},
		{"elsewhere", f.URL + "/moved", "", `"1"`, false, 422, "input_redirected"},
		{"nobody there", "http://127.9.9.9:1/x", "", "", false, 502, "input_unreachable"},
		{"loopback", "http://127.0.0.1:1/x", "", "", false, 403, "input_not_allowed"},
		{"metadata", "http://169.254.169.254/latest", "", "", false, 403, "input_not_allowed"},
		{"private", "http://10.0.0.1/", "", "", false, 403, "input_not_allowed"},
		{"v4 in v6", "http://[::ffff:127.0.0.1]:1/", "", "", false, 403, "input_not_allowed"},
		{"a file", "file:///etc/passwd", "", "", false, 400, "bad_input_url"},
		{"gopher", "gopher://example.com/", "", "", false, 400, "bad_input_url"},
		{"a user", "http://u:p@" + at + "/file", "", "", false, 400, "bad_input_url"},
		{"no URL", "x", "", "", false, 400, "bad_input_url"},
		{"empty", "", "", "", false, 400, "bad_input_url"},
		{"both", f.URL + "/file", "a body", `"1"`, false, 400, "bad_parameter"},
		{"another bucket", "nats://sheaf-jobs/x", "", "", false, 403, "input_not_allowed"},
		{"no bucket yet", "nats://sheaf-inputs/x", "", "", false, 422, "input_not_found"},
	} {
		set("some text\n", c.version, c.plain)
		if a := b.do("POST", jobsPath+"?"+named(c.ref), c.body); a.status != c.status || a.header.Get("Sheaf-Code") != c.code || strings.Contains(a.body, "u:p@") {
			t.Errorf("%s: %d %s", c.name, a.status, a.body)
		}
	}
	if a := b.do("POST", "/function/master?"+named(f.URL+"/file"), "x"); a.status != 400 {
		t.Errorf("of a plain call: %d %s", a.status, a.body)
	}

	set(in, `"3"`, false)
	if got := cli(t, "", "submit", "--wait", "--gateway", b.URL, f.URL+"/file"); got.code != 0 || got.out != want {
		t.Errorf("sheaf submit URL: %d %s", got.code, got.err)
	}

	nc, err := b.ConnectNATS("test")
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	bucket, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "sheaf-inputs", MaxBytes: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bucket.PutString(ctx, "logs/monday", in); err != nil {
		t.Fatal(err)
	}
	right("an object", b.submit(named("nats://sheaf-inputs/logs/monday"), ""), want)
}
