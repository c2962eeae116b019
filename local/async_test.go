package local_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/local"
)

// asyncFunction is a function that notes its runs in the file that its
// environment names, and does as its query says.
func asyncFunction() func(http.ResponseWriter, *http.Request) {
	var mu sync.Mutex
	calls := map[string]int{}
	note := func(what string, r *http.Request) {
		f, err := os.OpenFile(os.Getenv("runs"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return
		}
		defer f.Close()
		fmt.Fprintf(f, "%s %s\n", what, r.Header.Get("X-Call-Id"))
	}
	return func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/_/") {
			return
		}
		body, _ := io.ReadAll(r.Body)
		note("begin", r)
		mu.Lock()
		calls[r.Header.Get("X-Call-Id")]++
		n := calls[r.Header.Get("X-Call-Id")]
		mu.Unlock()
		if d, _ := time.ParseDuration(r.FormValue("sleep")); d > 0 {
			select {
			case <-time.After(d):
			case <-r.Context().Done():
				note("ended", r)
				return
			}
		}
		note("end", r)
		if fail, _ := strconv.Atoi(r.FormValue("fail")); n <= fail {
			if s := r.FormValue("after"); s != "" {
				w.Header().Set("Retry-After", s)
			}
			code, _ := strconv.Atoi(r.FormValue("code"))
			w.WriteHeader(code)
			fmt.Fprintf(w, "failure %d", n)
			return
		}
		if size, _ := strconv.Atoi(r.FormValue("size")); size > 0 {
			_, _ = w.Write(bytes.Repeat([]byte("x"), size))
			return
		}
		if r.FormValue("die") != "" && n == 1 {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "half")
			return
		}
		w.Header().Set("X-Extra", "kept")
		w.Header().Set("Set-Cookie", "a=b")
		fmt.Fprintf(w, "%s %s %s %q %q", r.Method, r.RequestURI, body, r.Header.Get("X-Mine"), r.Header.Get("X-Hop"))
	}
}

// asyncStack is a stack with an asynchronous function "job".
type asyncStack struct {
	*local.Stack
	t    *testing.T
	dir  string
	runs string
	cfg  local.AsyncConfig
}

// patient are settings under which tests need not be.
func patient() local.AsyncConfig {
	return local.AsyncConfig{Lease: time.Second, StopWait: 2 * time.Second,
		Retry:           local.Retry{MinWait: 20 * time.Millisecond, MaxWait: 100 * time.Millisecond},
		CallbackMinWait: 20 * time.Millisecond, CallbackMaxWait: 100 * time.Millisecond}
}

func newAsyncStack(t *testing.T, cfg local.AsyncConfig, annotations map[string]string) *asyncStack {
	t.Helper()
	dir := t.TempDir()
	s := &asyncStack{t: t, dir: filepath.Join(dir, "data"), runs: filepath.Join(dir, "runs"), cfg: cfg}
	s.start()
	t.Cleanup(func() { s.Close() })
	if bad := s.Provider.Deploy(types.FunctionDeployment{Service: "job", Image: "async", Annotations: &annotations,
		EnvVars: map[string]string{"runs": s.runs}}, true); bad != nil {
		t.Fatal(bad)
	}
	return s
}

func (s *asyncStack) start() {
	s.t.Helper()
	st, err := local.Start(local.Config{Command: command, Log: quiet, Version: "test", Dir: s.dir, Async: s.cfg})
	if err != nil {
		s.t.Fatal(err)
	}
	s.Stack = st
}

// do makes a request; headers are pairs.
func (s *asyncStack) do(method, path, body string, headers ...string) (*http.Response, string) {
	s.t.Helper()
	req, err := http.NewRequest(method, s.URL+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp, string(out)
}

// post makes an asynchronous call of job and returns its ID.
func (s *asyncStack) post(path, body string, headers ...string) string {
	s.t.Helper()
	resp, out := s.do("POST", "/async-function/job"+path, body, headers...)
	if resp.StatusCode != http.StatusAccepted {
		s.t.Fatalf("POST %s: %d %s", path, resp.StatusCode, out)
	}
	return resp.Header.Get("X-Call-Id")
}

// told is what is told of a call.
type told struct {
	ID, Function, State, Error string
	Attempts, Status, Redrives int
	Code                       string // of a refusal
	Callback                   struct {
		State, Error string
		Tries        int
	}
	Result *struct {
		Status     int
		Header     http.Header
		Body       string
		BodyBase64 string `json:"body_base64"`
	}
}

func (s *asyncStack) get(method, path string) (out told) {
	s.t.Helper()
	resp, body := s.do(method, path, "")
	if err := json.Unmarshal([]byte(body), &out); err != nil {
		s.t.Fatalf("%s %s: %d %s", method, path, resp.StatusCode, body)
	}
	return out
}

// wait waits until ok of the call.
func (s *asyncStack) wait(id, what string, ok func(told) bool) (last told) {
	s.t.Helper()
	begun := time.Now()
	for {
		if last = s.get("GET", "/system/async/"+url.PathEscape(id)); ok(last) {
			return last
		}
		if time.Since(begun) > 15*time.Second {
			s.t.Fatalf("call %s: not %s within 15 seconds: %+v", id, what, last)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (s *asyncStack) state(id, state string) told {
	s.t.Helper()
	return s.wait(id, state, func(c told) bool { return c.State == state })
}

// count counts what the function noted of a call.
func (s *asyncStack) count(what, id string) int {
	data, _ := os.ReadFile(s.runs)
	return strings.Count(string(data), what+" "+id+"\n")
}

// sink is where callbacks go.
type sink struct {
	*httptest.Server
	mu  sync.Mutex // guards got
	got map[string][]gotten
}

type gotten struct {
	header http.Header
	body   string
	path   string
}

// newSink collects callbacks; answer may refuse one by its status.
func newSink(t *testing.T, answer func(n int, w http.ResponseWriter) bool) *sink {
	k := &sink{got: make(map[string][]gotten)}
	n := 0
	k.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		k.mu.Lock()
		defer k.mu.Unlock()
		n++
		if answer != nil && !answer(n, w) {
			return
		}
		id := r.Header.Get("X-Call-Id")
		k.got[id] = append(k.got[id], gotten{r.Header, string(body), r.URL.Path})
	}))
	t.Cleanup(k.Close)
	return k
}

func (k *sink) of(id string) []gotten {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.got[id]
}

func (k *sink) size() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.got)
}

func TestAsyncCall(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.SigningKeyFile = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(cfg.SigningKeyFile, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	resp, _ := s.do("POST", "/async-function/job.openfaas-fn/a%2Fb?x=1&y=a%20b", "hello", "X-Callback-Url", k.URL+"/done", "X-Mine", "yes",
		"Connection", "X-Hop", "X-Hop", "no")
	id := resp.Header.Get("X-Call-Id")
	if resp.StatusCode != 202 || id == "" || resp.Header.Get("X-Start-Time") == "" || resp.Header.Get("Location") != "/async-function/job/-/"+id {
		t.Fatalf("%d %v", resp.StatusCode, resp.Header)
	}
	eventually(t, 10*time.Second, "the callback", func() bool { return len(k.of(id)) > 0 })
	want := `POST /a%2Fb?x=1&y=a%20b hello "yes" ""`
	got := k.of(id)[0]
	if got.body != want || got.path != "/done" {
		t.Errorf("callback %s: %s, want %s", got.path, got.body, want)
	}
	for name, value := range map[string]string{"X-Function-Name": "job.openfaas-fn", "X-Function-Status": "200", "X-Extra": "kept",
		"Set-Cookie": "", "Cookie": "", "X-Start-Time": resp.Header.Get("X-Start-Time")} {
		if got.header.Get(name) != value {
			t.Errorf("callback's %s is %q, want %q", name, got.header.Get(name), value)
		}
	}
	if d, err := strconv.ParseFloat(got.header.Get("X-Duration-Seconds"), 64); err != nil || d <= 0 || d > 10 {
		t.Errorf("X-Duration-Seconds: %q", got.header.Get("X-Duration-Seconds"))
	}
	stamp, sum, _ := strings.Cut(strings.TrimPrefix(got.header.Get(local.SignatureHeader), "t="), ",v1=")
	mac := hmac.New(sha256.New, []byte("secret"))
	mac.Write([]byte(stamp + "." + got.body))
	if sum != hex.EncodeToString(mac.Sum(nil)) {
		t.Errorf("signature %q", got.header.Get(local.SignatureHeader))
	}
	for _, path := range []string{"/system/async/" + id, "/system/async/" + id + "?function=job", "/async-function/job/-/" + id} {
		c := s.get("GET", path)
		if c.State != "succeeded" || c.ID != id || c.Function != "job" || c.Attempts != 1 || c.Result == nil || c.Result.Status != 200 ||
			c.Result.Body != want || c.Result.Header.Get("X-Extra") != "kept" {
			t.Errorf("%s: %+v", path, c)
		}
	}
	s.wait(id, "called back", func(c told) bool { return c.Callback.State == "delivered" && c.Callback.Tries == 1 })
	for _, path := range []string{"/system/async/nobody", "/async-function/job/-/nobody", "/async-function/other/-/" + id} {
		if c := s.get("GET", path); c.Code != "job_not_found" {
			t.Errorf("%s: %+v", path, c)
		}
	}
	// An ID is its caller's choice.
	const odd = "a/b?*>.%"
	if got := s.post("", "x", "X-Call-Id", odd); got != odd {
		t.Errorf("id %q", got)
	}
	s.state(odd, "succeeded")
	if c := s.get("GET", "/async-function/job/-/"+url.PathEscape(odd)); c.ID != odd {
		t.Errorf("%+v", c)
	}
}

func TestAsyncRefusals(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.BodyLimit, cfg.ResultLimit = 1000, 1000
	cfg.CallbackAllow = []string{"192.168.7.0/24", "hooks.example:8443", "::1"}
	cfg.Lookup = func(_ context.Context, host string) ([]netip.Addr, error) {
		switch host {
		case "public.example":
			return []netip.Addr{netip.MustParseAddr("93.184.216.34")}, nil
		case "unknown.example":
			return nil, fmt.Errorf("no such host")
		}
		return []netip.Addr{netip.MustParseAddr("93.184.216.34"), netip.MustParseAddr("10.0.0.1")}, nil
	}
	s := newAsyncStack(t, cfg, nil)
	if bad := s.Provider.Deploy(types.FunctionDeployment{Service: "odd", Image: "async", Annotations: &map[string]string{"com.openfaas.retry.codes": "teapot"}}, true); bad != nil {
		t.Fatal(bad)
	}
	for _, c := range []struct {
		method, path, body string
		header, value      string
		status             int
		code               string
	}{
		{"POST", "/async-function/nobody", "", "", "", 404, "function_not_found"},
		{"POST", "/async-function/job.dev", "", "", "", 404, "function_not_found"},
		{"POST", "/async-function/Job", "", "", "", 422, "bad_function_name"},
		{"POST", "/async-function/", "", "", "", 422, "bad_function_name"},
		{"POST", "/async-function/%2e%2e/system/functions", "", "", "", 422, "bad_function_name"},
		{"POST", "/async-function/odd", "", "", "", 422, "bad_parameter"},
		{"GET", "/async-function/job", "", "", "", 405, "method_not_allowed"},
		{"PUT", "/async-function/job", "", "", "", 405, "method_not_allowed"},
		{"POST", "/async-function/job", strings.Repeat("x", 1001), "", "", 413, "body_too_large"},
		{"POST", "/async-function/job", "", "X-Call-Id", "a b", 400, "bad_parameter"},
		{"POST", "/async-function/job", "", "X-Call-Id", strings.Repeat("x", 256), 400, "bad_parameter"},
		{"GET", "/system/async?state=lost", "", "", "", 422, "bad_parameter"},
		{"GET", "/system/async?limit=0", "", "", "", 422, "bad_parameter"},
		{"GET", "/system/async", "", "Origin", "http://evil.example", 403, "foreign_host"},
		{"POST", "/system/async/nobody/redrive", "", "", "", 404, "job_not_found"},
		{"DELETE", "/system/async/nobody", "", "", "", 404, "job_not_found"},
		{"DELETE", "/async-function/nobody", "", "", "", 404, "job_not_found"},
	} {
		var headers []string
		if c.header != "" {
			headers = []string{c.header, c.value}
		}
		resp, body := s.do(c.method, c.path, c.body, headers...)
		var p struct{ Code string }
		if err := json.Unmarshal([]byte(body), &p); err != nil || resp.StatusCode != c.status || p.Code != c.code {
			t.Errorf("%s %s: %d %s, want %d %s", c.method, c.path, resp.StatusCode, body, c.status, c.code)
		}
		if c.status == 405 && resp.Header.Get("Allow") != "POST" {
			t.Errorf("%s %s: Allow is %q", c.method, c.path, resp.Header.Get("Allow"))
		}
	}
	for callback, status := range map[string]int{
		"nonsense": 400, "://": 400, "http://": 400, "http:///path": 400, "file:///etc/passwd": 400, "gopher://a/": 400, "http://u:p@a.example/": 400,
		"http://public.example:0/": 400, "http://public.example:99999/": 400, "https://public.example/" + strings.Repeat("x", 2048): 400,
		"http://127.0.0.1:1/": 403, "http://[::ffff:127.0.0.1]/": 403, "http://169.254.169.254/latest/": 403, "http://10.1.2.3/": 403, "http://172.16.0.1/": 403,
		"http://192.168.1.1/": 403, "http://100.64.0.1/": 403, "http://0.0.0.0/": 403, "http://[::]/": 403, "http://[fd00:ec2::254]/": 403, "http://[fe80::1]/": 403,
		"http://[64:ff9b::7f00:1]/": 403, "http://[2002:7f00:1::]/": 403, "http://255.255.255.255/": 403, "http://[ff02::1]/": 403, "http://[::127.0.0.1]/": 403,
		"http://inside.example/": 403, "http://hooks.example/": 403,
		"http://public.example/": 202, "https://unknown.example/": 202, "https://hooks.example:8443/": 202, "http://192.168.7.9/": 202, "http://[::1]:1/": 202,
	} {
		resp, body := s.do("POST", "/async-function/job", "", "X-Callback-Url", callback)
		if resp.StatusCode != status {
			t.Errorf("callback %s: %d %s, want %d", callback, resp.StatusCode, body, status)
		}
		if code := map[int]string{400: "bad_callback_url", 403: "callback_not_allowed"}[status]; !strings.Contains(body, code) {
			t.Errorf("callback %s: %s, want %s", callback, body, code)
		}
	}
	s.state(s.post("", strings.Repeat("x", 700)), "succeeded")
	if c := s.state(s.post("?size=1001", ""), "failed"); c.Attempts != 1 || c.Status != 502 || !strings.Contains(c.Error, "result_too_large") {
		t.Errorf("an answer over the limit: %+v", c)
	}
}

func TestAsyncConfigThatCannotBe(t *testing.T) {
	t.Parallel()
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]local.AsyncConfig{
		"body limit":     {BodyLimit: 5 << 20},
		"duration":       {Lease: -1},
		"parallel":       {Parallel: -1},
		"code":           {Retry: local.Retry{Codes: []int{200}}},
		"allow-list":     {CallbackAllow: []string{"everywhere"}},
		"no signing key": {SigningKeyFile: empty + "2"},
		"empty key":      {SigningKeyFile: empty},
	} {
		if s, err := local.Start(local.Config{Command: command, Log: quiet, Async: cfg}); err == nil {
			s.Close()
			t.Errorf("%s: started", name)
		}
	}
}

// The lease is a fifth of what the function takes.
func TestAsyncSlowFunctionRunsOnce(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Lease = 300 * time.Millisecond
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	id := s.post("?sleep=1500ms", "", "X-Callback-Url", k.URL)
	s.state(id, "running")
	s.state(id, "succeeded")
	time.Sleep(700 * time.Millisecond) // two leases more
	if n := s.count("begin", id); n != 1 || len(k.of(id)) != 1 {
		t.Errorf("the function ran %d times and was called back %d times", n, len(k.of(id)))
	}
}

func TestAsyncRetries(t *testing.T) {
	t.Parallel()
	s := newAsyncStack(t, patient(), nil)
	if bad := s.Provider.Deploy(types.FunctionDeployment{Service: "own", Image: "async", EnvVars: map[string]string{"runs": s.runs},
		Annotations: &map[string]string{"com.openfaas.retry.attempts": "3", "com.openfaas.retry.codes": "418, 503",
			"com.openfaas.retry.min_wait": "300ms", "com.openfaas.retry.max_wait": "300ms"}}, true); bad != nil {
		t.Fatal(bad)
	}
	type want struct {
		path, state      string
		attempts, status int
		least            time.Duration
	}
	wants := map[string]want{}
	k := newSink(t, nil)
	begun := time.Now()
	for _, c := range []want{
		{"job?fail=3&code=503", "succeeded", 4, 200, 0},
		{"job?fail=2&code=429&after=1", "succeeded", 3, 200, 2 * time.Second},
		{"job?fail=1&code=408", "succeeded", 2, 200, 0},
		{"job?fail=1&code=500", "succeeded", 2, 200, 0},
		{"job?die=1", "succeeded", 2, 200, 0},
		{"job?fail=1&code=400", "failed", 1, 400, 0},
		{"job?fail=1&code=404", "failed", 1, 404, 0},
		{"job?fail=99&code=504", "failed", 10, 504, 0},
		{"own?fail=1&code=500", "failed", 1, 500, 0},
		{"own?fail=1&code=418", "succeeded", 2, 200, 240 * time.Millisecond},
		{"own?fail=9&code=503", "failed", 3, 503, 480 * time.Millisecond},
	} {
		resp, body := s.do("POST", "/async-function/"+c.path, "", "X-Callback-Url", k.URL)
		if resp.StatusCode != 202 {
			t.Fatal(body)
		}
		wants[resp.Header.Get("X-Call-Id")] = c
	}
	for id, want := range wants {
		c := s.wait(id, "over", func(c told) bool { return c.Callback.State == "delivered" })
		took := time.Since(begun)
		if c.State != want.state || c.Attempts != want.attempts || c.Status != want.status || took < want.least {
			t.Errorf("%s after %v: %+v", want.path, took, c)
		}
		if n := s.count("end", id); n != want.attempts {
			t.Errorf("%s: ran %d times", want.path, n)
		}
		// The last failure is told, too.
		if got := k.of(id); len(got) != 1 || got[0].header.Get("X-Function-Status") != strconv.Itoa(want.status) {
			t.Errorf("%s: callbacks %v", want.path, got)
		}
		if want.state == "failed" && !strings.Contains(c.Error, "failure ") {
			t.Errorf("%s: error %q", want.path, c.Error)
		}
	}
}

func TestAsyncNoReplica(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.FunctionWait = time.Millisecond
	cfg.Retry.Attempts = 3
	s := newAsyncStack(t, cfg, nil)
	s.Front.StartWait = 50 * time.Millisecond
	s.Provider.Deploy(deployment("never", "cheap"), true)
	for _, name := range []string{"never", "gone"} {
		s.Provider.Deploy(deployment(name, "cheap"), true)
		resp, _ := s.do("POST", "/async-function/"+name, "")
		if name == "gone" {
			s.Provider.Delete(name)
		}
		if c := s.state(resp.Header.Get("X-Call-Id"), "failed"); c.Attempts != 3 {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

func TestAsyncSameIDIsTheSameCall(t *testing.T) {
	t.Parallel()
	s := newAsyncStack(t, patient(), nil)
	if bad := s.Provider.Deploy(types.FunctionDeployment{Service: "other", Image: "async", EnvVars: map[string]string{"runs": s.runs}}, true); bad != nil {
		t.Fatal(bad)
	}
	var wg sync.WaitGroup
	var accepted atomic.Int32
	for range 20 {
		wg.Go(func() {
			if resp, _ := s.do("POST", "/async-function/job?sleep=300ms", "same", "X-Call-Id", "mine"); resp.StatusCode == 202 && resp.Header.Get("X-Call-Id") == "mine" {
				accepted.Add(1)
			}
		})
	}
	wg.Wait()
	s.state("mine", "succeeded")
	for _, again := range []bool{true, false} {
		path, status := "?sleep=300ms", 202
		if !again {
			path, status = "", 409
		}
		if resp, body := s.do("POST", "/async-function/job"+path, "same", "X-Call-Id", "mine"); resp.StatusCode != status {
			t.Errorf("%q: %d %s", path, resp.StatusCode, body)
		}
	}
	if resp, body := s.do("POST", "/async-function/job?sleep=300ms", "else", "X-Call-Id", "mine"); resp.StatusCode != 409 || !strings.Contains(body, "idempotency_conflict") {
		t.Errorf("another body: %d %s", resp.StatusCode, body)
	}
	time.Sleep(200 * time.Millisecond)
	if n := s.count("begin", "mine"); n != 1 || accepted.Load() != 20 {
		t.Errorf("20 times the same call: %d accepted, %d runs", accepted.Load(), n)
	}
	// A function may pass its ID on to another function.
	if resp, body := s.do("POST", "/async-function/other", "else", "X-Call-Id", "mine"); resp.StatusCode != 202 {
		t.Errorf("another function: %d %s", resp.StatusCode, body)
	}
	if c := s.get("GET", "/system/async/mine"); c.Code != "ambiguous_call" {
		t.Errorf("%+v", c)
	}
	if c := s.get("GET", "/system/async/mine?function=other"); c.Function != "other" {
		t.Errorf("%+v", c)
	}
}

func TestAsyncCancel(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Parallel = 1
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	running := s.post("?sleep=20s", "", "X-Callback-Url", k.URL)
	eventually(t, 10*time.Second, "the run", func() bool { return s.count("begin", running) == 1 })
	queued := s.post("", "", "X-Callback-Url", k.URL)
	if c := s.get("GET", "/async-function/job/-/"+queued); c.State != "queued" || c.Attempts != 0 {
		t.Errorf("%+v", c)
	}
	for range 2 {
		for _, path := range []string{"/async-function/job/-/" + queued, "/system/async/" + running, "/async-function/" + running} {
			if c := s.get("DELETE", path); c.State != "cancelled" {
				t.Errorf("%s: %+v", path, c)
			}
		}
	}
	after := s.post("", "")
	s.state(after, "succeeded") // the only place is free
	eventually(t, 5*time.Second, "the end of the running call", func() bool { return s.count("ended", running) == 1 })
	if c := s.get("DELETE", "/system/async/"+after); c.State != "succeeded" {
		t.Errorf("a call that is over: %+v", c)
	}
	if c := s.get("POST", "/system/async/"+running+"/redrive"); c.Code != "not_failed" {
		t.Errorf("%+v", c)
	}
	if n := s.count("begin", queued); n != 0 || k.size() != 0 {
		t.Errorf("a cancelled call ran %d times; %d callbacks", n, k.size())
	}
}

// A call that has no room is refused, and forgotten: it can be sent again.
func TestAsyncQueueIsFull(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Parallel, cfg.QueueLimit = 1, 100_000
	s := newAsyncStack(t, cfg, nil)
	running := s.post("?sleep=20s", "")
	s.state(running, "running")
	body := strings.Repeat("x", 20_000)
	var ids []string
	for i := range 10 {
		id := fmt.Sprint("call-", i)
		resp, out := s.do("POST", "/async-function/job", body, "X-Call-Id", id)
		if resp.StatusCode == 202 {
			ids = append(ids, id)
			continue
		}
		if resp.StatusCode != 503 || !strings.Contains(out, "queue_full") || resp.Header.Get("Retry-After") == "" {
			t.Fatalf("%d %s", resp.StatusCode, out)
		}
		if c := s.get("GET", "/system/async/"+id); c.Code != "job_not_found" {
			t.Errorf("%+v", c)
		}
	}
	if len(ids) != 4 {
		t.Errorf("%d calls of 20,000 bytes in 100,000", len(ids))
	}
	s.get("DELETE", "/system/async/"+running)
	for _, id := range ids {
		s.state(id, "succeeded")
	}
	s.state(s.post("", body, "X-Call-Id", "call-9"), "succeeded")
}

func TestAsyncRedrive(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Retry.Attempts = 2
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	id := s.post("?fail=3&code=503", "again", "X-Callback-Url", k.URL)
	ok := s.post("", "")
	s.state(id, "failed")
	s.state(ok, "succeeded")
	s.Close() // dead letters outlive the stack
	s.start()
	list := struct {
		Calls []told
		More  bool
	}{}
	_, body := s.do("GET", "/system/async?state=failed", "")
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Calls) != 1 || list.Calls[0].ID != id || !strings.Contains(list.Calls[0].Error, "503") || list.More {
		t.Fatalf("dead letters: %s", body)
	}
	_, body = s.do("GET", "/system/async?limit=1", "")
	if err := json.Unmarshal([]byte(body), &list); err != nil || len(list.Calls) != 1 || !list.More {
		t.Errorf("one of two: %s", body)
	}
	// The function is a new process and fails from the beginning: the first
	// redrive fails, too, and the second one does not.
	for i, state := range []string{"failed", "succeeded"} {
		if c := s.get("POST", "/system/async/"+id+"/redrive"); c.Redrives != i+1 {
			t.Fatalf("%+v", c)
		}
		c := s.wait(id, state, func(c told) bool { return c.State == state && c.Callback.State == "delivered" })
		if c.Redrives != i+1 || c.Attempts != 2 {
			t.Errorf("redrive %d: %+v", i+1, c)
		}
	}
	if got := k.of(id); len(got) != 3 || got[2].body != `POST /?fail=3&code=503 again "" ""` {
		t.Errorf("callbacks: %v", got)
	}
	if c := s.get("POST", "/system/async/"+id+"/redrive"); c.Code != "not_failed" {
		t.Errorf("%+v", c)
	}
}

func TestAsyncParallel(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Parallel = 3
	s := newAsyncStack(t, cfg, nil)
	var ids []string
	for range 9 {
		ids = append(ids, s.post("?sleep=200ms", ""))
	}
	for _, id := range ids {
		s.state(id, "succeeded")
	}
	data, err := os.ReadFile(s.runs)
	if err != nil {
		t.Fatal(err)
	}
	n, most := 0, 0
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, "begin") {
			n++
		} else {
			n--
		}
		most = max(most, n)
	}
	if most != 3 {
		t.Errorf("%d calls at once, want 3", most)
	}
}

// A slow function fills its own places, and nobody else's; after a restart, too.
func TestAsyncPlacesOfAFunction(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Parallel, cfg.StopWait = 2, time.Millisecond
	s := newAsyncStack(t, cfg, nil)
	if err := s.Provider.Deploy(types.FunctionDeployment{Service: "other", Image: "async", EnvVars: map[string]string{"runs": s.runs}}, true); err != nil {
		t.Fatal(err)
	}
	var slow []string
	for range 5 {
		slow = append(slow, s.post("?sleep=1m", ""))
	}
	for round := range 2 {
		running := func() (n int) {
			for _, id := range slow {
				if c := s.get("GET", "/system/async/"+id); c.State == "running" {
					n++
				}
			}
			return n
		}
		// Those that the restart cut short count as running until their turn comes.
		eventually(t, 20*time.Second, "two slow calls run", func() bool { return running() >= 2 })
		for i := range 5 {
			id := fmt.Sprintf("other-%d-%d", round, i)
			if resp, out := s.do("POST", "/async-function/other", "", "X-Call-Id", id); resp.StatusCode != http.StatusAccepted {
				t.Fatal(resp.Status, out)
			}
			s.state(id, "succeeded")
		}
		if round == 0 {
			if n := running(); n != 2 {
				t.Errorf("%d slow calls run, want 2", n)
			}
			s.Close()
			s.start()
		}
	}
}

// A stop lets calls finish, or runs them again, as the same attempt.
func TestAsyncStop(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.StopWait = 700 * time.Millisecond
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	short := s.post("?sleep=400ms", "", "X-Callback-Url", k.URL)
	long := s.post("?sleep=2s", "", "X-Callback-Url", k.URL)
	eventually(t, 10*time.Second, "both runs", func() bool { return s.count("begin", short)+s.count("begin", long) == 2 })
	begun := time.Now()
	s.Close()
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("Close took %v", took)
	}
	if s.count("end", short) != 1 || s.count("end", long) != 0 {
		t.Errorf("at the stop: short ended %d times, long %d times", s.count("end", short), s.count("end", long))
	}
	s.start()
	for id, runs := range map[string]int{short: 1, long: 2} {
		c := s.wait(id, "called back", func(c told) bool { return c.Callback.State == "delivered" })
		if c.State != "succeeded" || c.Attempts != 1 || s.count("begin", id) != runs {
			t.Errorf("%+v, %d runs", c, s.count("begin", id))
		}
	}
}

func TestAsyncThousandCallsAndARestart(t *testing.T) {
	const n = 1000
	s := newAsyncStack(t, patient(), nil)
	k := newSink(t, nil)
	begun := time.Now()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	var next, accepted atomic.Int32
	for range 8 {
		wg.Go(func() {
			for i := next.Add(1); i <= n; i = next.Add(1) {
				req, _ := http.NewRequest("POST", s.URL+"/async-function/job?sleep=20ms", strings.NewReader(fmt.Sprint(i)))
				req.Header.Set("X-Call-Id", fmt.Sprint("call-", i))
				req.Header.Set("X-Callback-Url", k.URL)
				resp, err := client.Do(req)
				if err != nil {
					t.Error(err)
					continue
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode == 202 {
					accepted.Add(1)
				}
			}
		})
	}
	wg.Wait()
	stored := time.Since(begun)
	before := k.size()
	s.Close()
	at := k.size()
	s.start()
	if accepted.Load() != n || at == n {
		t.Fatalf("%d of %d accepted; %d called back before the restart", accepted.Load(), n, at)
	}
	begun = time.Now()
	eventually(t, 30*time.Second, "all callbacks", func() bool { return k.size() == n })
	twice := 0
	for i := 1; i <= n; i++ {
		got := k.of(fmt.Sprint("call-", i))
		for _, g := range got {
			if g.body != fmt.Sprintf(`POST /?sleep=20ms %d "" ""`, i) {
				t.Errorf("call %d: %s", i, g.body)
			}
		}
		twice += len(got) - 1
	}
	t.Logf("%d calls stored in %v; called back %d when all were stored, %d when the stack was down, all %v after its start; %d twice",
		n, stored.Round(time.Millisecond), before, at, time.Since(begun).Round(time.Millisecond), twice)
}

// provideStack is a process that runs a stack on a folder and says where.
func provideStack(dir string) {
	s, err := local.Start(local.Config{Command: command, Log: quiet, Version: "test", Dir: dir, Async: patient()})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(s.URL)
	select {}
}

// A stack that is killed loses no call either.
func TestAsyncKilledStack(t *testing.T) {
	const n = 200
	k := newSink(t, nil)
	s := newAsyncStack(t, patient(), nil)
	s.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-stack", s.dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	s.URL = strings.TrimSpace(line)
	if err != nil || !strings.HasPrefix(s.URL, "http") {
		t.Errorf("the stack says %q, %v", line, err)
	}
	for i := range n {
		if t.Failed() {
			break
		}
		s.post("?sleep=50ms", "", "X-Call-Id", fmt.Sprint("call-", i), "X-Callback-Url", k.URL)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // it was killed
	at := k.size()
	s.start()
	eventually(t, 20*time.Second, "all callbacks", func() bool { return k.size() == n })
	begun := 0
	for i := range n {
		begun += s.count("begin", fmt.Sprint("call-", i))
	}
	t.Logf("%d of %d called back when the stack was killed; %d runs in all", at, n, begun)
	if begun > n+16 {
		t.Errorf("%d runs of %d calls: more than those that ran at the kill ran twice", begun, n)
	}
}

func TestCallbackThatFailsSometimes(t *testing.T) {
	t.Parallel()
	s := newAsyncStack(t, patient(), nil)
	const seed = 20
	random := rand.New(rand.NewPCG(seed, 0))
	refused := 0
	k := newSink(t, func(_ int, w http.ResponseWriter) bool {
		if random.Float64() < 0.3 {
			refused++
			w.WriteHeader(500)
			return false
		}
		return true
	})
	ids := map[string]bool{}
	for range 100 {
		ids[s.post("", "", "X-Callback-Url", k.URL)] = true
	}
	for id := range ids {
		s.wait(id, "called back", func(c told) bool { return c.Callback.State == "delivered" })
		if len(k.of(id)) != 1 || s.count("begin", id) != 1 {
			t.Errorf("seed %d: %d callbacks, %d runs", seed, len(k.of(id)), s.count("begin", id))
		}
	}
	if refused < 10 {
		t.Errorf("seed %d: only %d refused", seed, refused)
	}
}

// A sink that never answers well does not keep functions from running, and the
// result can be read.
func TestCallbackThatIsGivenUp(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.Parallel, cfg.CallbackTries = 1, 3
	s := newAsyncStack(t, cfg, nil)
	followed := newSink(t, nil)
	tries := map[string]*atomic.Int32{"/redirect": {}, "/broken": {}}
	bad := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tries[r.URL.Path].Add(1)
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, followed.URL, http.StatusTemporaryRedirect)
			return
		}
		panic(http.ErrAbortHandler)
	}))
	defer bad.Close()
	for path, n := range tries {
		id := s.post("", "", "X-Callback-Url", bad.URL+path)
		c := s.wait(id, "given up", func(c told) bool { return c.Callback.State == "failed" })
		if c.State != "succeeded" || c.Callback.Tries != 3 || n.Load() != 3 || c.Callback.Error == "" || c.Result == nil {
			t.Errorf("%s: %+v after %d", path, c, n.Load())
		}
	}
	if followed.size() != 0 {
		t.Error("a redirect was followed")
	}
	// A sink that hangs holds the only place for callbacks; functions run on.
	release := make(chan struct{})
	hangs := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer hangs.Close()
	defer close(release)
	first := s.post("", "", "X-Callback-Url", hangs.URL)
	s.state(first, "succeeded")
	begun := time.Now()
	for range 20 {
		s.state(s.post("", "", "X-Callback-Url", hangs.URL), "succeeded")
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("20 calls beside a callback that hangs: %v", took)
	}
}

// A name that leads to a public address when the call is made, and to this
// machine when it is called back, leads nowhere.
func TestCallbackThatIsRebound(t *testing.T) {
	t.Parallel()
	cfg := patient()
	cfg.CallbackAllow = []string{}
	var asked atomic.Int32
	cfg.Lookup = func(context.Context, string) ([]netip.Addr, error) {
		if asked.Add(1) == 1 {
			return []netip.Addr{netip.MustParseAddr("93.184.216.34")}, nil
		}
		return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::ffff:127.0.0.1")}, nil
	}
	s := newAsyncStack(t, cfg, nil)
	k := newSink(t, nil)
	_, port, _ := strings.Cut(strings.TrimPrefix(k.URL, "http://"), ":")
	id := s.post("", "kept", "X-Callback-Url", "http://rebind.example:"+port)
	c := s.wait(id, "refused", func(c told) bool { return c.Callback.State == "failed" })
	if !strings.Contains(c.Callback.Error, "not allowed") || c.Callback.Tries != 1 || c.Result == nil || !strings.Contains(c.Result.Body, "kept") || k.size() != 0 {
		t.Errorf("%+v, %d callbacks", c, k.size())
	}
}
