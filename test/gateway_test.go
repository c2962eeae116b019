package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/worker"
)

// The stack as the provider of a gateway of OpenFaaS's Community Edition, with
// its queue: TestBehindImitation has a gateway that does what the real one was
// measured to do, TestBehindGateway the real one, if there is one.

// noteFlag makes the test's binary a function that notes its runs in the file
// that its environment names, and takes as long as its query says; slowFlag a
// worker that counts words, takes as long as its environment says, and does the
// same.
const (
	noteFlag = "-note-function"
	slowFlag = "-slow-worker"
)

func noteRun(words ...any) {
	if os.Getenv("runs") == "" {
		return
	}
	f, err := os.OpenFile(os.Getenv("runs"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	fmt.Fprintln(f, words...)
}

func runNote() {
	panic(http.ListenAndServe(os.Getenv("sheaf_listen"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/_/") {
			return
		}
		body, _ := io.ReadAll(r.Body)
		noteRun("begin", r.Header.Get("X-Call-Id"))
		d, _ := time.ParseDuration(r.URL.Query().Get("sleep"))
		time.Sleep(d)
		noteRun("end", r.Header.Get("X-Call-Id"))
		status, _ := strconv.Atoi(r.URL.Query().Get("status"))
		w.Header().Set("X-Extra", "kept")
		w.WriteHeader(max(status, http.StatusOK))
		_ = json.NewEncoder(w).Encode(noted{r.Method, r.RequestURI, string(body), r.Header})
	})))
}

// noted is what the function saw of a call.
type noted struct {
	Method, URI, Body string
	Header            http.Header
}

func runSlowWorker() {
	worker.Main(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		noteRun("block", b.Index)
		d, _ := time.ParseDuration(os.Getenv("sleep"))
		time.Sleep(d)
		return wordcount.Count(ctx, b)
	})
}

// behind is a stack with a gateway before it.
type behind struct {
	*bench
	gateway string
	ackWait time.Duration // of its queue
	runs    string        // file of noted runs

	mu        sync.Mutex // guards callbacks
	callbacks map[string][]callback
	sink      *httptest.Server
}

type callback struct {
	header http.Header
	body   string
	path   string
}

// startBehind starts a stack at port, with the functions that the tests call.
func startBehind(t testing.TB, gateway string, port int) *behind {
	t.Helper()
	b := &behind{gateway: gateway, runs: filepath.Join(t.TempDir(), "runs"), callbacks: map[string][]callback{}}
	b.bench = startWith(t, local.Config{Port: port, Gateway: gateway, Command: func(image string) ([]string, error) {
		if image == "note" || image == "slow" {
			return []string{os.Args[0], map[string]string{"note": noteFlag, "slow": slowFlag}[image]}, nil
		}
		return command(image)
	}})
	b.sink = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		b.mu.Lock()
		defer b.mu.Unlock()
		id := r.Header.Get("X-Call-Id")
		b.callbacks[id] = append(b.callbacks[id], callback{r.Header, string(body), r.URL.Path})
	}))
	t.Cleanup(b.sink.Close)
	b.deploy("master", "sheaf/master", 1)
	b.deploy("worker", "sheaf/worker", 2)
	b.deploy("note", "note", 1, map[string]string{"runs": b.runs})
	for name, n := range map[string]int{"master": 1, "worker": 2, "note": 1} {
		b.waitFor(name, n)
	}
	return b
}

// call calls the gateway.
func (b *behind) call(method, path, body string, header ...string) answer {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.gateway+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(got)}
}

// queue makes an asynchronous call with a callback and returns its ID.
func (b *behind) queue(path, body string) string {
	b.t.Helper()
	a := b.call("POST", "/async-function/"+path, body, "X-Callback-Url", b.sink.URL+"/done")
	if a.status != http.StatusAccepted || a.header.Get("X-Call-Id") == "" {
		b.t.Fatalf("async call of %s: %d %s", path, a.status, a.body)
	}
	return a.header.Get("X-Call-Id")
}

// called waits until there are n callbacks of a call.
func (b *behind) called(id string, n int) []callback {
	b.t.Helper()
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		b.mu.Lock()
		got := b.callbacks[id]
		b.mu.Unlock()
		if len(got) >= n {
			return got
		}
		if time.Since(begun) > time.Minute {
			b.t.Fatalf("call %s: %d callbacks after a minute, want %d", id, len(got), n)
		}
	}
}

// lines counts lines of the file of noted runs.
func (b *behind) lines(line string) int {
	data, _ := os.ReadFile(b.runs)
	return strings.Count("\n"+string(data), "\n"+line+"\n")
}

// The same job gives the same answer by every way to ask for it.
func (b *behind) answersAreTheSame(t *testing.T) {
	in := text(21, 60_000)
	want := sequential(in)
	for name, path := range map[string]string{
		"as curl": "/function/master?block=4KiB", "as faas-cli invoke": "/function/master.openfaas-fn?block=4KiB", "with a slash": "/function/master/?block=4KiB",
		"blocks through the gateway": "/function/master?block=4KiB&route=gateway", "straight to the stack": "",
	} {
		a := b.bench.count("block=4KiB", in)
		if path != "" {
			a = b.call("POST", path, in, "Content-Type", "text/plain")
		}
		if a.status != http.StatusOK || a.body != want || a.header.Get("Content-Digest") == "" || a.header.Get("X-Call-Id") == "" {
			t.Errorf("%s: %d, right answer %v, headers %v", name, a.status, a.body == want, a.header)
		}
	}
	id := b.queue("master?block=4KiB", in)
	got := b.called(id, 1)[0]
	if got.body != want || got.path != "/done" || got.header.Get("X-Function-Status") != "200" || got.header.Get("X-Function-Name") == "" ||
		got.header.Get("X-Duration-Seconds") == "" || got.header.Get("Sheaf-Blocks") == "" {
		t.Errorf("callback: right answer %v, %s, headers %v", got.body == want, got.path, got.header)
	}
	if again := b.call("POST", "/async-function/master.openfaas-fn?block=4KiB", in, "X-Callback-Url", b.sink.URL+"/done", "X-Call-Id", "chosen"); again.status != http.StatusAccepted {
		t.Errorf("%d %s", again.status, again.body)
	}
	if got := b.called("chosen", 1)[0]; got.body != want || got.header.Get("X-Function-Name") != "master.openfaas-fn" || got.header.Get("Sheaf-Job") != "chosen" {
		t.Errorf("callback: right answer %v, headers %v", got.body == want, got.header)
	}
}

// A gateway that gives 5 replicas where 35 are wished is enough.
func (b *behind) replicasAreClamped(t *testing.T) {
	in := text(22, 100_000)
	for _, ask := range []int{35, 0} {
		if a := b.call("POST", "/system/scale-function/worker", fmt.Sprintf(`{"serviceName":"worker","replicas":%d}`, ask)); a.status != http.StatusAccepted && a.status != http.StatusOK {
			t.Fatalf("scale to %d: %d %s", ask, a.status, a.body)
		}
		b.waitFor("worker", map[int]int{35: 5, 0: 1}[ask])
	}
	a := b.call("POST", "/function/master?block=1KiB&workers=35", in)
	b.waitFor("worker", 5)
	if n, _ := strconv.Atoi(a.header.Get("Sheaf-Replicas")); a.status != http.StatusOK || a.body != sequential(in) || n < 1 || n > 5 {
		t.Errorf("35 workers: %d, right answer %v, %d replicas", a.status, a.body == sequential(in), n)
	}
	a = b.call("POST", "/function/master?block=1KiB&workers=35", in)
	if n, _ := strconv.Atoi(a.header.Get("Sheaf-Replicas")); a.status != http.StatusOK || a.body != sequential(in) || n < 2 || n > 5 {
		t.Errorf("35 workers, again: %d, right answer %v, %d replicas", a.status, a.body == sequential(in), n)
	}
}

// What the queue does not take is refused with its limit, and there is another
// way for it.
func (b *behind) largeInputs(t *testing.T) {
	in := text(23, 256_001)
	a := b.call("POST", "/async-function/master", in, "X-Callback-Url", b.sink.URL)
	if a.status == http.StatusAccepted || !strings.Contains(a.body, "256000 bytes") {
		t.Errorf("an input of 256,001 bytes: %d %s", a.status, a.body)
	}
	if id := b.queue("master", in[:256_000]); b.called(id, 1)[0].body != sequential(in[:256_000]) {
		t.Error("an input of 256,000 bytes: wrong answer")
	}
	if a := b.call("POST", "/function/master", in); a.status != http.StatusOK || a.body != sequential(in) {
		t.Errorf("the same input, synchronously: %d", a.status)
	}
	made := b.call("POST", "/function/master/jobs", in)
	j := b.job(made)
	if made.status != http.StatusAccepted || j.ID == "" {
		t.Fatalf("the same input as a job: %d %s", made.status, made.body)
	}
	if a := b.call("GET", "/function/master/jobs/"+j.ID+"/result", "", "Prefer", "wait=60"); a.status != http.StatusOK || a.body != sequential(in) {
		t.Errorf("the result of the job: %d %.300s", a.status, a.body)
	}
}

// What a function sees of a call, and what a caller gets of an answer.
func (b *behind) whatFunctionsSee(t *testing.T) {
	var n noted
	a := b.call("GET", "/function/note/a/b?x=1&status=418", "", "X-Call-Id", "mine", "X-Mine", "yes")
	if err := json.Unmarshal([]byte(a.body), &n); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	if a.status != http.StatusTeapot || a.header.Get("X-Extra") != "kept" || n.Method != "GET" || n.URI != "/a/b?x=1&status=418" ||
		n.Header.Get("X-Call-Id") != "mine" || n.Header.Get("X-Mine") != "yes" || len(n.Header["X-Start-Time"]) != 1 {
		t.Errorf("a synchronous call: %d %v %+v", a.status, a.header, n)
	}
	id := b.queue("note/a/b?x=1", "hello")
	got := b.called(id, 1)[0]
	if err := json.Unmarshal([]byte(got.body), &n); err != nil {
		t.Fatalf("%v: %s", err, got.body)
	}
	// The gateway says twice when the call began.
	if n.Method != "POST" || n.URI != "/a/b?x=1" || n.Body != "hello" || n.Header.Get("X-Call-Id") != id || len(n.Header["X-Start-Time"]) != 2 ||
		n.Header.Get("X-Callback-Url") == "" || !strings.HasPrefix(n.Header.Get("User-Agent"), "openfaas-ce/nats-queue-worker") || got.header.Get("X-Extra") != "kept" {
		t.Errorf("an asynchronous call: %+v, callback %v", n, got.header)
	}
	// A failure is told, and not tried again.
	id = b.queue("note?status=500", "")
	if got := b.called(id, 1)[0]; got.header.Get("X-Function-Status") != "500" || b.lines("begin "+id) != 1 {
		t.Errorf("a failure: %v, %d runs", got.header, b.lines("begin "+id))
	}
	if a := b.call("POST", "/function/nosuch", ""); a.status != http.StatusNotFound && a.status != http.StatusServiceUnavailable {
		t.Errorf("no such function: %d %s", a.status, a.body)
	}
	id = b.queue("nosuch", "")
	if got := b.called(id, 1)[0].header.Get("X-Function-Status"); got != "404" && got != "503" {
		t.Errorf("no such function, asynchronously: status %s", got)
	}
}

// The queue makes one call at a time.
func (b *behind) oneAtATime(t *testing.T) {
	var ids []string
	for range 3 {
		ids = append(ids, b.queue("note?sleep="+(b.ackWait/10).String(), ""))
	}
	for _, id := range ids {
		b.called(id, 1)
	}
	data, err := os.ReadFile(b.runs)
	if err != nil {
		t.Fatal(err)
	}
	running, most := 0, 0
	for line := range strings.Lines(string(data)) {
		word, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		for _, ours := range ids {
			if id == ours {
				running += map[string]int{"begin": 1, "end": -1}[word]
				most = max(most, running)
			}
		}
	}
	if most != 1 {
		t.Errorf("%d calls at once, want 1", most)
	}
}

// A call that takes longer than the queue waits is made again, with the same
// ID. A job that is called so runs once, and every callback has its answer.
func (b *behind) slowCalls(t *testing.T) {
	slow := 5 * b.ackWait / 2
	id := b.queue("note?sleep="+slow.String(), "")
	b.called(id, 2)
	if n := b.lines("begin " + id); n < 2 {
		t.Errorf("a slow function ran %d times; the queue is not what it was when it was measured", n)
	}
	// One block after another, so that the job takes as long.
	const blocks = 5
	b.deploy("slow", "slow", 1, map[string]string{"runs": b.runs, "max_inflight": "1", "sleep": (slow / blocks).String()})
	b.waitFor("slow", 1)
	in := strings.Repeat("a word or two\n", 10*blocks)
	id = b.queue(fmt.Sprintf("master?function=slow&block=%d", len(in)/blocks), in)
	for _, got := range b.called(id, 2) {
		if got.body != sequential(in) || got.header.Get("X-Function-Status") != "200" || got.header.Get("Sheaf-Job") != id {
			t.Errorf("callback of a slow job: %v, right answer %v", got.header, got.body == sequential(in))
		}
	}
	for i := range blocks {
		if n := b.lines(fmt.Sprint("block ", i)); n != 1 {
			t.Errorf("block %d of the slow job ran %d times, want once", i, n)
		}
	}
}

func (b *behind) all(t *testing.T) {
	t.Run("the same answers", b.answersAreTheSame)
	t.Run("replicas are clamped", b.replicasAreClamped)
	t.Run("large inputs", b.largeInputs)
	t.Run("what functions see", b.whatFunctionsSee)
	t.Run("one at a time", b.oneAtATime)
	t.Run("slow calls", b.slowCalls)
	t.Run("list", func(t *testing.T) {
		var list []types.FunctionStatus
		a := b.call("GET", "/system/functions", "")
		if err := json.Unmarshal([]byte(a.body), &list); err != nil || len(list) != 4 {
			t.Fatalf("%d %v %s", a.status, err, a.body)
		}
		for _, f := range list {
			if f.InvocationCount < 1 && f.Name != "slow" && f.Name != "worker" {
				t.Errorf("%s was called %v times", f.Name, f.InvocationCount)
			}
		}
	})
}

// A gateway of OpenFaaS's Community Edition that runs, with NATS Streaming and
// its queue-worker, is used as it is:
//
//	OPENFAAS_GATEWAY       its URL, such as http://127.0.0.1:8080
//	OPENFAAS_PROVIDER_PORT the port at 127.0.0.1 where it looks for its provider,
//	                       and for Prometheus; the test listens there
//	OPENFAAS_ACK_WAIT      ack_wait of the queue-worker, such as 5s
func TestBehindGateway(t *testing.T) {
	gateway := os.Getenv("OPENFAAS_GATEWAY")
	if gateway == "" {
		t.Log("OPENFAAS_GATEWAY names no gateway; TestBehindImitation has one that does as the real one did")
		return
	}
	port, err := strconv.Atoi(os.Getenv("OPENFAAS_PROVIDER_PORT"))
	if err != nil {
		t.Fatalf("OPENFAAS_PROVIDER_PORT: %v", err)
	}
	b := startBehind(t, gateway, port)
	if b.ackWait, err = time.ParseDuration(os.Getenv("OPENFAAS_ACK_WAIT")); err != nil {
		t.Fatalf("OPENFAAS_ACK_WAIT: %v", err)
	}
	waitHealthy(t, gateway)
	b.all(t)
}

// waitHealthy waits until a gateway has found its provider.
func waitHealthy(t testing.TB, gateway string) {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		resp, err := client.Get(gateway + "/healthz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("the gateway finds no provider: %v", err)
		}
	}
}

// imitation is a gateway and a queue that do what those of the Community
// Edition were measured to do.
type imitation struct {
	provider *url.URL
	ackWait  time.Duration
	queued   chan queuedCall
	url      string
	ids      int // of calls without one; by mu
	mu       sync.Mutex
}

type queuedCall struct {
	function, path, query, callback string
	header                          http.Header
	body                            []byte
	again                           int // deliveries that were made before
}

const imitationLimit = 256_000 // bytes of an asynchronous call

func (g *imitation) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch kind {
	case "function", "async-function":
		if r.Header.Get("X-Call-Id") == "" { // only then the answer tells it
			g.mu.Lock()
			g.ids++
			r.Header.Set("X-Call-Id", fmt.Sprint("imitation-", g.ids))
			g.mu.Unlock()
			w.Header().Set("X-Call-Id", r.Header.Get("X-Call-Id"))
		}
		now := strconv.FormatInt(time.Now().UnixNano(), 10)
		r.Header.Add("X-Start-Time", now)
		if kind == "function" {
			g.pass(w, r)
			return
		}
		w.Header().Set("X-Start-Time", now)
		body, _ := io.ReadAll(r.Body)
		if len(body) > imitationLimit {
			http.Error(w, fmt.Sprintf("request body too large (%d bytes), maximum: %d bytes", len(body), imitationLimit), http.StatusInternalServerError)
			return
		}
		function, path, _ := strings.Cut(rest, "/")
		g.queued <- queuedCall{function, path, r.URL.RawQuery, r.Header.Get("X-Callback-Url"), r.Header.Clone(), body, 0}
		w.WriteHeader(http.StatusAccepted)
	case "system":
		if strings.HasPrefix(rest, "scale-function/") {
			var req types.ScaleServiceRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			req.Replicas = min(max(req.Replicas, 1), 5)
			body, _ := json.Marshal(req)
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		}
		g.pass(w, r)
	default:
		g.pass(w, r)
	}
}

// pass passes a request on, and the whole of the answer when it is there.
func (g *imitation) pass(w http.ResponseWriter, r *http.Request) {
	out := r.Clone(r.Context())
	out.RequestURI, out.URL.Scheme, out.URL.Host, out.Host = "", g.provider.Scheme, g.provider.Host, ""
	out.Header.Set("X-Forwarded-Host", r.Host)
	out.Header.Set("X-Forwarded-For", r.RemoteAddr)
	resp, err := client.Do(out)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	_, _ = w.Write(body)
}

// work makes the calls of the queue, one at a time; one that takes longer than
// ackWait is delivered again, to another worker, while it still runs, and at
// most twice more.
func (g *imitation) work(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-g.queued:
			done := make(chan struct{})
			wg.Go(func() { defer close(done); g.deliver(ctx, c) })
			select {
			case <-done:
			case <-ctx.Done():
			case <-time.After(g.ackWait):
				if c.again++; c.again <= 2 {
					wg.Go(func() {
						select {
						case g.queued <- c:
						case <-ctx.Done():
						}
					})
				}
			}
		}
	}
}

func (g *imitation) deliver(ctx context.Context, c queuedCall) {
	send := func(url string, header http.Header, body []byte) (*http.Response, []byte) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return nil, nil
		}
		req.Header = header.Clone()
		req.Close = true
		resp, err := client.Do(req)
		if err != nil {
			return nil, nil
		}
		defer resp.Body.Close()
		answer, _ := io.ReadAll(resp.Body)
		return resp, answer
	}
	c.header.Set("User-Agent", "openfaas-ce/nats-queue-worker")
	target := g.url + "/function/" + c.function + "/" + c.path
	if c.query != "" {
		target += "?" + c.query
	}
	begun := time.Now()
	resp, answer := send(target, c.header, c.body)
	if c.callback == "" || ctx.Err() != nil {
		return
	}
	header, status := http.Header{}, http.StatusServiceUnavailable
	if resp != nil {
		header, status = resp.Header.Clone(), resp.StatusCode
	}
	header.Set("X-Call-Id", c.header.Get("X-Call-Id"))
	header.Set("X-Function-Name", c.function)
	header.Set("X-Function-Status", strconv.Itoa(status))
	header.Set("X-Duration-Seconds", fmt.Sprintf("%f", time.Since(begun).Seconds()))
	_, _ = send(c.callback, header, answer)
}

func TestBehindImitation(t *testing.T) {
	g := &imitation{ackWait: time.Second, queued: make(chan queuedCall, 100)}
	srv := httptest.NewServer(g)
	defer srv.Close()
	g.url = srv.URL
	// Until the stack is there, the gateway has no provider.
	b := &behind{}
	ready := make(chan struct{})
	srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-ready:
			g.ServeHTTP(w, r)
		default:
			w.WriteHeader(http.StatusBadGateway)
		}
	})
	b = startBehind(t, srv.URL, 0)
	b.ackWait = g.ackWait
	var err error
	if g.provider, err = url.Parse(b.URL); err != nil {
		t.Fatal(err)
	}
	close(ready)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { g.work(ctx) })
	defer wg.Wait()
	defer cancel()
	b.all(t)
}
