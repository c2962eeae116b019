package hello_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/hello"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/worker"
)

const key = "a key of sixteen bytes or more"

func TestMain(m *testing.M) {
	if os.Getenv("sheaf_function") != "" { // a replica
		worker.Main(func(_ context.Context, b sheaf.Block) ([]byte, error) { return b.Data, nil })
	}
	goleak.VerifyTestMain(m)
}

func signer(t *testing.T, key string) *wire.Signer {
	t.Helper()
	s, err := wire.NewSigner([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	s.Namespace = "openfaas-fn"
	return s
}

func known(function string) bool { return function == "worker.openfaas-fn" }

// start serves a source, and returns its URL and what shows the replicas that
// it tells of, as ID=URL.
func start(t *testing.T, s *hello.Source) (at string, replicas func() []string) {
	t.Helper()
	srv := httptest.NewServer(s)
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	views := map[string][]string{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for v, err := range s.Replicas(ctx) {
			if err != nil {
				t.Error(err)
			}
			list := []string{}
			for _, r := range v.Replicas {
				list = append(list, r.ID+"="+r.URL)
			}
			if v.Function != "" && (v.Desired != hello.Unknown || v.Function != "worker.openfaas-fn") {
				t.Errorf("it tells %+v", v)
			}
			mu.Lock()
			views[v.Function] = list
			mu.Unlock()
		}
	}()
	t.Cleanup(func() { cancel(); <-done; srv.Close() })
	return srv.URL, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(views["worker.openfaas-fn"])
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 seconds", what)
		}
	}
}

// say sends an announcement and returns the status, and the code of a refusal.
func say(t *testing.T, at string, s *wire.Signer, h wire.Hello, when time.Time) (status int, code string) {
	t.Helper()
	body, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	return post(t, at, body, s.SignHello(h, body, when))
}

func post(t *testing.T, at string, body []byte, signature string) (status int, code string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, at, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if signature != "" {
		req.Header.Set(wire.Signature, signature)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.StatusCode, ""
	}
	var p wire.Problem
	if resp.Header.Get("Content-Type") != wire.ContentType || json.Unmarshal(text, &p) != nil || p.Detail == "" {
		t.Errorf("the answer is %s %q, want a problem", resp.Status, text)
	}
	return resp.StatusCode, p.Code
}

// replica is a server of a replica in this process, which announces nothing.
func replica(t *testing.T, id string, s *wire.Signer) wire.Hello {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	server := &serve.Server{Handler: http.NotFoundHandler(), Function: "worker", Namespace: "openfaas-fn", Replica: id, Signer: s}
	go func() {
		defer close(done)
		if err := server.Serve(ctx, l); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return wire.Hello{Function: "worker", Namespace: "openfaas-fn", Replica: id, Port: port(l.Addr())}
}

func port(a net.Addr) int { return a.(*net.TCPAddr).Port }

// Worker processes announce themselves to a source, and are told where they are
// until they drain or die.
func TestWorkersAnnounceThemselves(t *testing.T) {
	t.Parallel()
	for _, keys := range []string{"", key} {
		t.Run(fmt.Sprintf("key of %d bytes", len(keys)), func(t *testing.T) {
			t.Parallel()
			s := &hello.Source{Known: known, Loopback: true, Lease: 3 * time.Second}
			file := ""
			if keys != "" {
				s.Signer = signer(t, keys)
				file = t.TempDir() + "/key"
				if err := os.WriteFile(file, []byte(keys), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			at, replicas := start(t, s)
			begin := func() *exec.Cmd {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), "sheaf_function=worker", "OPENFAAS_NAME=", "HOSTNAME=worker", "sheaf_listen=127.0.0.1:0", "hello_url="+at+"/hello",
					"sheaf_key_file="+file, "healthcheck_interval=2s")
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
				return cmd
			}
			first := begin()
			until(t, "the first replica", func() bool { return len(replicas()) == 1 })
			one := replicas()[0]
			second := begin()
			until(t, "the second replica", func() bool { return len(replicas()) == 2 })
			begin()
			until(t, "the third replica", func() bool { return len(replicas()) == 3 })
			for _, r := range replicas() {
				id, u, _ := strings.Cut(r, "=")
				if !strings.HasPrefix(id, "worker-") || !strings.HasPrefix(u, "http://127.0.0.1:") {
					t.Errorf("a replica is %s", r)
				}
			}
			_ = first.Process.Kill() // no goodbye: nobody listens any more
			until(t, "the end of the one that died", func() bool { return len(replicas()) == 2 && !slices.Contains(replicas(), one) })
			_ = second.Process.Signal(syscall.SIGTERM)
			until(t, "the end of the one that drains", func() bool { return len(replicas()) == 1 })
			if second.ProcessState != nil {
				t.Error("it has ended")
			}
			before, _ := s.Accepted() // two leases are six announcements
			until(t, "two leases", func() bool { n, _ := s.Accepted(); return n >= before+7 })
			if list := replicas(); len(list) != 1 {
				t.Errorf("after two leases the replicas are %q, rejected %v", list, s.Rejected())
			}
		})
	}
}

// A replica that does not say hello again is forgotten, also if something at
// its address still takes connections, or goes on to prove itself.
func TestLeaseEnds(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"it is well", "it hangs"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			k := signer(t, key)
			s := &hello.Source{Known: known, Loopback: true, Lease: 2 * time.Second, Signer: signer(t, key)}
			at, replicas := start(t, s)
			h := replica(t, "worker-a", k)
			if how == "it hangs" {
				front := &relay{to: h.Port}
				h.Port = front.start(t)
				s.Signer, k = nil, nil // a proof does not pass through it
			}
			if status, code := say(t, at, k, h, time.Now()); status != 200 {
				t.Fatalf("it is refused: %d %s", status, code)
			}
			until(t, "the replica", func() bool { return len(replicas()) == 1 })
			until(t, "the end of its lease", func() bool { return len(replicas()) == 0 })
			if status, code := say(t, at, k, h, time.Now()); how == "it is well" && status != 200 {
				t.Errorf("it may not come again: %d %s", status, code)
			}
		})
	}
}

// relay passes the first challenge on to a replica, and the others if it must.
type relay struct {
	to    int
	all   bool
	calls atomic.Int64
}

func (r *relay) start(t *testing.T) int {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: fmt.Sprintf("127.0.0.1:%d", r.to)})
	proxy.Transport = &http.Transport{DisableKeepAlives: true}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.calls.Add(1) > 1 && !r.all {
			<-req.Context().Done()
			return
		}
		proxy.ServeHTTP(w, req)
	}))
	t.Cleanup(srv.Close)
	return port(srv.Listener.Addr())
}

// Nobody gets another one's place, nor one of his own without the key.
func TestLiars(t *testing.T) {
	t.Parallel()
	k := signer(t, key)
	s := &hello.Source{Known: known, Loopback: true, Lease: time.Minute, Signer: signer(t, key)}
	srv := httptest.NewServer(s)
	defer srv.Close()
	at := srv.URL
	honest := replica(t, "worker-a", k)
	if status, code := say(t, at, k, honest, time.Now()); status != 200 {
		t.Fatalf("the honest one is refused: %d %s", status, code)
	}
	through := func(id string) wire.Hello { // passes challenges on to another replica
		victim := replica(t, id, k)
		victim.Port = (&relay{to: victim.Port, all: true}).start(t)
		return victim
	}
	as := func(h wire.Hello, change func(*wire.Hello)) wire.Hello { change(&h); return h }
	for _, c := range []struct {
		name  string
		hello wire.Hello
		key   *wire.Signer
		code  string
	}{
		{"at another one's address", as(honest, func(h *wire.Hello) { h.Replica = "worker-liar" }), k, hello.CodeUnproven},
		{"passes the challenge on", through("worker-b"), k, hello.CodeUnproven},
		{"its own server has no key", replica(t, "worker-c", nil), k, hello.CodeUnproven},
		{"its own server has another key", replica(t, "worker-d", signer(t, "another key, also long")), k, hello.CodeUnproven},
		{"announces with another key", replica(t, "worker-e", k), signer(t, "another key, also long"), wire.CodeForged},
		{"announces without a key", replica(t, "worker-f", k), nil, wire.CodeUnsigned},
		{"takes another one's name", replica(t, "worker-a", k), k, hello.CodeTaken},
		{"is nobody", wire.Hello{Function: "worker", Namespace: "openfaas-fn", Replica: "worker-g", Port: 1}, k, hello.CodeUnreachable},
	} {
		before := s.Rejected()[c.code]
		if status, code := say(t, at, c.key, c.hello, time.Now()); status == 200 || code != c.code {
			t.Errorf("%s: %d %q, want %s", c.name, status, code, c.code)
		}
		if after := s.Rejected()[c.code]; after != before+1 {
			t.Errorf("%s: counted %d times", c.name, after-before)
		}
	}

	// What was heard once is good for nothing, not even with another body.
	fresh := replica(t, "worker-h", k)
	body, _ := json.Marshal(fresh)
	signature := k.SignHello(fresh, body, time.Now())
	if status, code := post(t, at, body, signature); status != 200 {
		t.Fatalf("it is refused: %d %s", status, code)
	}
	if status, code := post(t, at, body, signature); status != 409 || code != wire.CodeReplayed {
		t.Errorf("a replay: %d %s", status, code)
	}
	fresh.Port = honest.Port
	changed, _ := json.Marshal(fresh)
	if status, code := post(t, at, changed, signature); status != 401 || code != wire.CodeForged {
		t.Errorf("a replay with another port: %d %s", status, code)
	}
	if _, n := s.Accepted(); n != 2 {
		t.Errorf("%d replicas are in, want the 2 honest ones", n)
	}
	// Nor is the signature of a block that of an announcement.
	block, _ := k.Sign(wire.Envelope{Function: "worker", Replica: "worker-h"}, "worker.openfaas-fn", wire.Sum(body), time.Now())
	if status, code := post(t, at, body, block); status != 401 || code != wire.CodeForged {
		t.Errorf("a block's signature: %d %s", status, code)
	}
}

// Without a key whoever passes challenges on is believed: it is what a key is
// for, and docs/CONNECTOR.md says so.
func TestWithoutKeyNamesAreBelieved(t *testing.T) {
	t.Parallel()
	s := &hello.Source{Known: known, Loopback: true}
	srv := httptest.NewServer(s)
	defer srv.Close()
	victim := replica(t, "worker-b", nil)
	victim.Port = (&relay{to: victim.Port, all: true}).start(t)
	if status, code := say(t, srv.URL, nil, victim, time.Now()); status != 200 {
		t.Errorf("%d %s", status, code)
	}
}

// What cannot be an announcement is ignored, and counted (the catalogue of
// faults, B65).
func TestBadAnnouncements(t *testing.T) {
	t.Parallel()
	k := signer(t, key)
	good := `{"function":"worker","namespace":"openfaas-fn","replica":"worker-1","port":8080}`
	with := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	for _, c := range []struct {
		name, from, body, code string
		age                    time.Duration
		key                    *wire.Signer
	}{
		{name: "port 0", body: with("8080", "0"), code: hello.CodePort},
		{name: "port 70000", body: with("8080", "70000"), code: hello.CodePort},
		{name: "port -1", body: with("8080", "-1"), code: hello.CodePort},
		{name: "port as a word", body: with("8080", `"http"`), code: hello.CodeMalformed},
		{name: "from loopback", from: "127.0.0.1", code: hello.CodeAddress},
		{name: "from loopback, mapped", from: "::ffff:127.0.0.1", code: hello.CodeAddress},
		{name: "from loopback of IPv6", from: "::1", code: hello.CodeAddress},
		{name: "from the metadata service", from: "169.254.169.254", code: hello.CodeAddress},
		{name: "from the metadata service, mapped", from: "::ffff:169.254.169.254", code: hello.CodeAddress},
		{name: "from the metadata service of IPv6", from: "fd00:ec2::254", code: hello.CodeAddress},
		{name: "from a link", from: "fe80::1%eth0", code: hello.CodeAddress},
		{name: "from nowhere", from: "0.0.0.0", code: hello.CodeAddress},
		{name: "from the internet", from: "203.0.113.9", code: hello.CodeAddress},
		{name: "names loopback", body: with("8080", `8080,"address":"127.0.0.1"`), code: hello.CodeAddress},
		{name: "names the metadata service", body: with("8080", `8080,"address":"169.254.169.254"`), code: hello.CodeAddress},
		{name: "names another one", body: with("8080", `8080,"address":"10.62.0.8"`), code: hello.CodeAddress},
		{name: "a host name", body: with("8080", `8080,"address":"worker.openfaas-fn"`), code: hello.CodeAddress},
		{name: "unknown function", body: with("worker", "other"), code: hello.CodeUnknown},
		{name: "unknown namespace", body: with("openfaas-fn", "other"), code: hello.CodeUnknown},
		{name: "bad MAC", key: signer(t, "another key, also long"), code: wire.CodeForged},
		{name: "old time", age: 6 * time.Minute, code: wire.CodeExpired},
		{name: "future time", age: -6 * time.Minute, code: wire.CodeExpired},
		{name: "10 MiB", body: strings.Repeat(" ", 10<<20) + good, code: hello.CodeTooLarge},
		{name: "nothing", body: " ", code: hello.CodeMalformed},
		{name: "a list", body: "[]", code: hello.CodeMalformed},
		{name: "two", body: good + good, code: hello.CodeMalformed},
		{name: "no name", body: with("worker-1", ""), code: hello.CodeMalformed},
		{name: "a path for a name", body: with("worker-1", "../x"), code: hello.CodeMalformed},
		{name: "a line end in a name", body: with("worker-1", `a\nb`), code: hello.CodeMalformed},
		{name: "a dot in a function", body: with("worker", "worker.x"), code: hello.CodeMalformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := &hello.Source{Known: known, Signer: signer(t, key)}
			from := netip.AddrPortFrom(netip.MustParseAddr("10.62.0.7"), 40000)
			if c.from != "" {
				from = netip.AddrPortFrom(netip.MustParseAddr(c.from), 40000)
			}
			if c.body == "" {
				c.body = good
			}
			if c.key == nil {
				c.key = k
			}
			body := strings.NewReader(c.body)
			req := httptest.NewRequest(http.MethodPost, "/hello", body)
			req.RemoteAddr = from.String()
			var h wire.Hello
			_ = json.Unmarshal([]byte(c.body), &h) // some are none
			req.Header.Set(wire.Signature, c.key.SignHello(h, []byte(c.body), time.Now().Add(-c.age)))
			w := httptest.NewRecorder()
			s.ServeHTTP(w, req)
			var p wire.Problem
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Code != c.code || p.Status != w.Code || w.Code < 400 || p.Detail == "" {
				t.Errorf("the answer is %d %s (%v), want %s", w.Code, w.Body, err, c.code)
			}
			if read := len(c.body) - body.Len(); read > 64<<10 {
				t.Errorf("%d bytes of it were read", read)
			}
			if n := s.Rejected(); len(n) != 1 || n[c.code] != 1 {
				t.Errorf("counted as %v", n)
			}
			if _, in := s.Accepted(); in != 0 {
				t.Errorf("%d replicas are in", in)
			}
		})
	}
	s := &hello.Source{Known: known}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/hello", nil))
	if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "POST" {
		t.Errorf("GET: %d", w.Code)
	}
}

// A flood costs little: one address has its share, there are so many replicas
// and no more, and so many are asked at once.
func TestFlood(t *testing.T) {
	t.Parallel()
	h := replica(t, "worker-a", nil)
	s := &hello.Source{Known: known, Loopback: true, Rate: 3}
	srv := httptest.NewServer(s)
	defer srv.Close()
	passed := 0
	for range 300 {
		if status, code := say(t, srv.URL, nil, h, time.Now()); status == 200 {
			passed++
		} else if status != 429 || code != hello.CodeRate {
			t.Fatalf("%d %s", status, code)
		}
	}
	if n := s.Rejected()[hello.CodeRate]; passed < 3 || n != uint64(300-passed) || passed > 200 {
		t.Errorf("%d passed, %d were counted", passed, n)
	}

	full := &hello.Source{Known: known, Loopback: true, Rate: 1000, MaxReplicas: 2}
	other := httptest.NewServer(full)
	defer other.Close()
	for i, want := range []string{"", "", hello.CodeFull} {
		if _, code := say(t, other.URL, nil, replica(t, fmt.Sprint("worker-", i), nil), time.Now()); code != want {
			t.Errorf("replica %d: %q, want %q", i, code, want)
		}
	}

	// Those who hang when they are asked hold 64 places, and not for long.
	var hanging, most atomic.Int64
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		for n := hanging.Add(1); ; {
			if old := most.Load(); old >= n || most.CompareAndSwap(old, n) {
				break
			}
		}
		<-r.Context().Done()
		hanging.Add(-1)
	}))
	defer slow.Close()
	busy := &hello.Source{Known: known, Loopback: true, Rate: 1000}
	third := httptest.NewServer(busy)
	defer third.Close()
	var wg sync.WaitGroup
	for i := range 150 {
		wg.Go(func() {
			lie := wire.Hello{Function: "worker", Namespace: "openfaas-fn", Replica: fmt.Sprint("worker-", i), Port: port(slow.Listener.Addr())}
			if _, code := say(t, third.URL, nil, lie, time.Now()); code != hello.CodeBusy && code != hello.CodeUnreachable {
				t.Errorf("code %q", code)
			}
		})
	}
	wg.Wait()
	if n := busy.Rejected(); n[hello.CodeBusy]+n[hello.CodeUnreachable] != 150 || most.Load() > 64 || most.Load() == 0 {
		t.Errorf("%d were asked at once; counted as %v", most.Load(), n)
	}
}
