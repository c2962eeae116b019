package local_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
)

// A function sees a call as it was sent, but for its own name in the path.
func TestFunctionSeesTheCall(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	for _, c := range []struct{ name, target, uri string }{
		{"name", "/function/web", "/"},
		{"slash", "/function/web/", "/"},
		{"with the namespace", "/function/web.openfaas-fn", "/"},
		{"sub-path", "/function/web.openfaas-fn/a/b", "/a/b"},
		{"query", "/function/web/a?x=1&y=a%20b&x=2", "/a?x=1&y=a%20b&x=2"},
		{"query without a path", "/function/web?q", "/?q"},
		{"query that cannot be parsed", "/function/web?a;b=%zz", "/?a;b=%zz"},
		{"encoded slash", "/function/web/a%2Fb", "/a%2Fb"},
		{"lower-case encoding", "/function/web/a%2fb%3fc", "/a%2fb%3fc"},
		{"double slash", "/function/web//a//b", "//a//b"},
		{"dots", "/function/web/../admin", "/../admin"},
		{"encoded dots", "/function/web/%2e%2e/admin", "/%2e%2e/admin"},
		{"inner dots", "/function/web/a/./b/../c", "/a/./b/../c"},
		{"space and unicode", "/function/web/a%20b/%C3%A9", "/a%20b/%C3%A9"},
	} {
		resp, body := m.raw("GET " + c.target + " HTTP/1.1\r\nHost: faas.example\r\nConnection: close\r\n\r\n")
		var s seen
		if err := json.Unmarshal([]byte(body), &s); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: %d %s", c.name, resp.StatusCode, body)
			continue
		}
		if s.URI != c.uri {
			t.Errorf("%s: %s arrives as %q, want %q", c.name, c.target, s.URI, c.uri)
		}
	}
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"} {
		resp, body := m.raw(method + " /function/web HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
		if resp.StatusCode != 200 {
			t.Errorf("%s: status %d %s", method, resp.StatusCode, body)
		}
		if method == "HEAD" {
			if body != "" || resp.ContentLength <= 0 {
				t.Errorf("HEAD: %q, length %d", body, resp.ContentLength)
			}
		} else if !strings.Contains(body, `"Method":"`+method+`"`) || !strings.Contains(body, `"Body":"hi"`) {
			t.Errorf("%s: the function saw %s", method, body)
		}
	}
}

func TestHeadersOfACall(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	resp, body := m.raw("POST /function/web HTTP/1.1\r\nHost: faas.example\r\nConnection: close, X-Hop\r\nX-Hop: secret\r\nKeep-Alive: 5\r\n" +
		"Proxy-Authorization: secret\r\nTe: gzip\r\nX-Keep: kept\r\nX-Forwarded-For: 192.0.2.7\r\nContent-Length: 0\r\n\r\n")
	var s seen
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatal(err, body)
	}
	for _, name := range []string{"X-Hop", "Keep-Alive", "Proxy-Authorization", "Te", "Connection"} {
		if v, has := s.Header[name]; has {
			t.Errorf("the hop's header %s: %q reaches the function", name, v)
		}
	}
	id := s.Header.Get("X-Call-Id")
	if id == "" || resp.Header.Get("X-Call-Id") != id {
		t.Errorf("X-Call-Id is %q for the function and %q for the caller", id, resp.Header.Get("X-Call-Id"))
	}
	if s.Header.Get("X-Start-Time") == "" || resp.Header.Get("X-Start-Time") == "" || resp.Header.Get("X-Served-By") == "" {
		t.Errorf("start time %q and %q, served by %q", s.Header.Get("X-Start-Time"), resp.Header.Get("X-Start-Time"), resp.Header.Get("X-Served-By"))
	}
	if s.Header.Get("X-Forwarded-For") != "192.0.2.7, 127.0.0.1" || s.Header.Get("X-Forwarded-Host") != "faas.example" ||
		s.Header.Get("X-Forwarded-Proto") != "http" || s.Header.Get("X-Keep") != "kept" {
		t.Errorf("the function saw %v", s.Header)
	}
	resp, body = m.raw("GET /function/web HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Call-Id: mine\r\n\r\n")
	if !strings.Contains(body, `"X-Call-Id":["mine"]`) || resp.Header.Get("X-Call-Id") != "" {
		t.Errorf("a caller's own id: the function saw %s, the answer has %q", body, resp.Header.Get("X-Call-Id"))
	}
}

func TestCallsThatAreRefused(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.front.StartWait = 100 * time.Millisecond
	m.deploy("web", "web", 1)
	m.Deploy(deployment("never", "cheap"), true)
	for _, c := range []struct {
		target string
		status int
		code   string
	}{
		{"/function/nobody", 404, "function_not_found"},
		{"/function/web.dev", 404, "function_not_found"},
		{"/function/web.openfaas-fn.x", 404, "function_not_found"},
		{"/function/", 422, "bad_function_name"},
		{"/function/Web", 422, "bad_function_name"},
		{"/function/-web", 422, "bad_function_name"},
		{"/function/a%20b", 422, "bad_function_name"},
		{"/function/..%2Fweb", 422, "bad_function_name"},
		{"/function/%2e%2e/web", 422, "bad_function_name"},
		{"/function/../system/functions", 422, "bad_function_name"},
		{"/function%2Fweb", 422, "bad_function_name"},
		{"/function//web", 422, "bad_function_name"},
		{"/function/" + strings.Repeat("a", 64), 422, "bad_function_name"},
		{"/function/never", 503, "no_replicas"},
		{"/elsewhere", 404, "not_found"},
		{"/async-function/web", 404, "not_found"},
	} {
		resp, body := m.raw("GET " + c.target + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		var p struct{ Code string }
		if err := json.Unmarshal([]byte(body), &p); err != nil || resp.StatusCode != c.status || p.Code != c.code {
			t.Errorf("%s: %d %s, want %d %s", c.target, resp.StatusCode, body, c.status, c.code)
		}
		if c.status == 503 && resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: no Retry-After", c.target)
		}
	}
}

func TestOnlyThisMachineMayManage(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for _, c := range []struct {
		target, headers string
		status          int
	}{
		{"/system/functions", "Host: 127.0.0.1:8080", 200},
		{"/system/functions", "Host: localhost", 200},
		{"/system/functions", "Host: [::1]:8080", 200},
		{"/system/functions", "Host: evil.example", 403},
		{"/system/functions", "Host: localhost.evil.example:8080", 403},
		{"/system/functions", "Host: 192.168.0.1", 403},
		{"/system/functions", "Host: 127.0.0.1\r\nOrigin: http://evil.example", 403},
		{"/system/functions", "Host: 127.0.0.1\r\nOrigin: null", 403},
		{"/system/replicas?watch=true", "Host: evil.example", 403},
		{"/healthz", "Host: evil.example", 200},
	} {
		if resp, body := m.raw("GET " + c.target + " HTTP/1.1\r\n" + c.headers + "\r\nConnection: close\r\n\r\n"); resp.StatusCode != c.status {
			t.Errorf("%s with %q: %d %s, want %d", c.target, c.headers, resp.StatusCode, body, c.status)
		}
	}
	for _, target := range []string{"//system/functions", "/x/../system/functions", "/system%2Ffunctions", "/%73ystem/functions"} {
		if resp, body := m.raw("GET " + target + " HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"); resp.StatusCode == 200 {
			t.Errorf("%s is answered to a foreign host: %s", target, body)
		}
	}
}

func TestAnswersAreStreamed(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	for _, accept := range []string{"text/event-stream", "application/x-ndjson", "text/plain"} {
		req, err := http.NewRequest("GET", m.url+"/function/web/stream", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", accept)
		resp, err := m.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var at []time.Time
		for in := bufio.NewScanner(resp.Body); in.Scan(); {
			at = append(at, time.Now())
		}
		resp.Body.Close()
		if len(at) != 3 || at[1].Sub(at[0]) < 75*time.Millisecond || at[2].Sub(at[1]) < 75*time.Millisecond {
			t.Errorf("%s: lines came at %v", accept, at)
		}
	}
}

func TestFullDuplex(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	body, in := io.Pipe()
	req, err := http.NewRequest("POST", m.url+"/function/web/duplex", body)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.WriteString(in, "first\n") }()
	resp, err := m.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for i := range 5 { // each line is sent only once the one before has been answered
		if !lines.Scan() {
			t.Fatal(lines.Err())
		}
		if want := []string{"first", "line 0", "line 1", "line 2", "line 3"}[i]; lines.Text() != "you said "+want {
			t.Fatalf("%q, want %q", lines.Text(), want)
		}
		fmt.Fprintf(in, "line %d\n", i)
	}
	in.Close()
}

func TestUpgrade(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	conn, err := net.Dial("tcp", strings.TrimPrefix(m.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprint(conn, "GET /function/web/upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "echo" {
		t.Fatalf("%v, %v", resp, err)
	}
	for _, word := range []string{"ping\n", "pong\n"} {
		fmt.Fprint(conn, word)
		if got, err := in.ReadString('\n'); got != word || err != nil {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// A caller who leaves in the middle of the body is at fault, not the replica.
func TestTruncatedUpload(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	for name, request := range map[string]string{
		"length":  "Content-Length: 1000\r\n\r\nonly this",
		"chunked": "Transfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n",
		"garbage": "Transfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\nzz\r\n",
	} {
		resp, body := m.half("POST /function/web/upload HTTP/1.1\r\nHost: x\r\n" + request)
		if resp.StatusCode != 400 || !strings.Contains(body, "truncated_upload") {
			t.Errorf("%s: %d %s", name, resp.StatusCode, body)
		}
	}
	eventually(t, 3*time.Second, "the function's errors", func() bool {
		n := 0
		for _, l := range m.lines("name=web") {
			if strings.Contains(l, "upload of ") && strings.Contains(l, "unexpected EOF") {
				n++
			}
		}
		return n == 3
	})
	m.see("web") // it lives
	// The replica's death in the middle of an upload is not the caller's fault.
	body, in := io.Pipe()
	go func() {
		_, _ = io.WriteString(in, "some")
		time.Sleep(200 * time.Millisecond)
		in.Close()
	}()
	resp, err := m.http.Post(m.url+"/function/web/die", "text/plain", body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 502 {
		t.Errorf("the replica died in the middle of an upload: %d", resp.StatusCode)
	}
}

func TestFunctionThatDies(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	for i, c := range []struct {
		name, query string
		status      int // 0: the answer is broken
	}{
		{"before it answers", "", 502},
		{"in a chunked answer", "?after=half", 0},
		{"in an answer with a length", "?after=half&length=8", 0},
	} {
		name := fmt.Sprint("web", i)
		m.deploy(name, "web", 1)
		// By POST: a GET would be sent again by the client itself, and unseen.
		resp, err := m.http.Post(m.url+"/function/"+name+"/die"+c.query, "text/plain", nil)
		if err != nil {
			if c.status != 0 {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if c.status == 0 && err == nil {
			t.Errorf("%s: the caller got a clean %d %q", c.name, resp.StatusCode, body)
		}
		if c.status != 0 && (resp.StatusCode != c.status || resp.Header.Get("X-OpenFaaS-Internal") != "proxy") {
			t.Errorf("%s: %d %s", c.name, resp.StatusCode, body)
		}
	}
}

// While a killed replica still counts as ready, and after, calls wait for
// somebody who answers.
func TestCallsAfterAKill(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	for range 5 {
		if bad := m.Kill("web", m.ready("web", 1)[0].ID); bad != nil {
			t.Fatal(bad)
		}
		eventually(t, time.Second, "the end of the process", func() bool {
			v := m.replicas("web")
			return len(v.Replicas) == 0 || v.Replicas[0].State == sheaf.Starting
		})
		if status, body := m.call("POST", "/function/web", ""); status != 200 {
			t.Errorf("%d %s", status, body)
		}
	}
}

// An answer that comes before the body was read must not spoil the next call on
// the same connection.
func TestAnswerBeforeTheBody(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	reused := 0
	for i := range 50 {
		status, body := m.call("POST", "/function/web/early", strings.Repeat("x", 1+i*i*200))
		if status != 429 {
			t.Fatalf("%d %s", status, body)
		}
		req, err := http.NewRequest("POST", m.url+"/function/web", strings.NewReader("hi"))
		if err != nil {
			t.Fatal(err)
		}
		trace := &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
			if c.Reused {
				reused++
			}
		}}
		resp, err := m.http.Do(req.WithContext(httptrace.WithClientTrace(t.Context(), trace)))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.Close {
			t.Fatal("the connection is closed after a call that read its body")
		}
	}
	t.Logf("%d of 50 calls after an early answer on a connection used before", reused)
}

// A call that nobody takes waits for a replica that does.
func TestReplicaThatRefuses(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 1)
	m.call("POST", "/function/web/deafen", "")
	m.front.StartWait = 100 * time.Millisecond
	if status, body := m.call("POST", "/function/web", "hi"); status != 503 {
		t.Errorf("%d %s", status, body)
	}
	m.front.StartWait = 10 * time.Second
	answer := make(chan string, 1)
	go func() {
		status, body, err := m.try("POST", "/function/web", "hi")
		answer <- fmt.Sprint(status, body, err)
	}()
	time.Sleep(50 * time.Millisecond)
	m.Scale("web", 2)
	if got := <-answer; !strings.HasPrefix(got, "200") || !strings.Contains(got, `"Body":"hi"`) {
		t.Error(got)
	}
}

func TestLogs(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 2)
	write := func(words string) string {
		status, body := m.call("POST", "/function/web/log?lines="+words, "")
		if status != 200 {
			t.Fatal(body)
		}
		return body
	}
	want := func(query string, want ...string) {
		t.Helper()
		var got []string
		eventually(t, 2*time.Second, fmt.Sprintf("%s: %q", query, want), func() bool {
			got = m.lines(query)
			return slices.Equal(got, want)
		})
	}
	write("a,b,c")
	want("name=web", "a", "b", "c")
	want("name=web.openfaas-fn&tail=-1", "a", "b", "c")
	want("name=web&tail=2", "b", "c")
	since := time.Now()
	time.Sleep(2 * time.Millisecond)
	long := strings.Repeat("x", 20000)
	write("d," + long)
	want("name=web&since="+url.QueryEscape(since.Format(time.RFC3339Nano)), "d", long[:16384], long[16384:])
	var lines []struct{ Name, Namespace, Instance, Text string }
	_, body := m.call("GET", "/system/logs?name=web", "")
	for dec := json.NewDecoder(strings.NewReader(body)); dec.More(); {
		lines = append(lines, struct{ Name, Namespace, Instance, Text string }{})
		if err := dec.Decode(&lines[len(lines)-1]); err != nil {
			t.Fatal(err)
		}
	}
	of := map[string][]string{}
	for _, l := range lines {
		if l.Name != "web" || l.Namespace != "openfaas-fn" {
			t.Errorf("line %+v", l)
		}
		of[l.Instance] = append(of[l.Instance], l.Text)
	}
	for id, texts := range of {
		want("name=web&instance="+id, texts...)
	}
	if len(of) != 2 {
		t.Errorf("%d instances have written, want 2", len(of))
	}

	resp, err := m.http.Get(m.url + "/system/logs?name=web&follow=true&tail=1")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	follow := bufio.NewScanner(resp.Body)
	for _, want := range []string{long[16384:], "e", "f"} {
		if want == "e" {
			write("e,f")
		}
		if !follow.Scan() || !strings.Contains(follow.Text(), `"text":"`+want+`"`) {
			t.Fatalf("%.80q, %v, want %.80q", follow.Text(), follow.Err(), want)
		}
	}
	if ct := resp.Header.Get("Content-Type"); ct != "application/x-ndjson" {
		t.Error(ct)
	}
}

func TestReplicaStream(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.deploy("web", "web", 2)
	m.deploy("other", "web", 1)
	if _, body := m.call("GET", "/system/replicas", ""); strings.Count(body, `"function":"web.openfaas-fn"`) != 1 || strings.Count(body, `"state":"ready"`) != 3 {
		t.Errorf("replicas: %s", body)
	}
	watch := func(path string) <-chan sheaf.View {
		resp, err := m.http.Get(m.url + path + "?watch=true")
		if err != nil {
			t.Fatal(err)
		}
		out := make(chan sheaf.View, 100)
		var wg sync.WaitGroup
		wg.Go(func() {
			for dec := json.NewDecoder(resp.Body); ; {
				var v sheaf.View
				if dec.Decode(&v) != nil {
					return
				}
				out <- v
			}
		})
		t.Cleanup(func() { resp.Body.Close(); wg.Wait() })
		return out
	}
	next := func(in <-chan sheaf.View, within time.Duration, what string, ok func(sheaf.View) bool) sheaf.View {
		t.Helper()
		late := time.After(within)
		for {
			select {
			case v := <-in:
				if ok(v) {
					return v
				}
			case <-late:
				t.Fatalf("%s: not told within %v", what, within)
			}
		}
	}
	all, one := watch("/system/replicas"), watch("/system/replicas/web.openfaas-fn")
	both := map[string]int{}
	for len(both) < 2 {
		v := next(all, time.Second, "first views", func(v sheaf.View) bool { return v.Function != "" })
		both[v.Function] = len(v.Replicas)
	}
	if both["web.openfaas-fn"] != 2 || both["other.openfaas-fn"] != 1 {
		t.Errorf("first views: %v", both)
	}
	next(one, time.Second, "first view", func(v sheaf.View) bool { return len(v.Replicas) == 2 })
	m.Scale("web", 1)
	for _, in := range []<-chan sheaf.View{all, one} {
		next(in, time.Second, "drain", func(v sheaf.View) bool {
			return v.Desired == 1 && slices.ContainsFunc(v.Replicas, func(r sheaf.Replica) bool { return r.State == sheaf.Draining })
		})
		next(in, 5*time.Second, "end", func(v sheaf.View) bool { return v.Desired == 1 && len(v.Replicas) == 1 })
	}
	m.Provider.Delete("other")
	m.Provider.Delete("web")
	for _, in := range []<-chan sheaf.View{all, one} {
		next(in, time.Second, "deletion", func(v sheaf.View) bool { return v.Function == "web.openfaas-fn" && v.Desired == -1 })
	}
	for len(one) > 0 {
		if v := <-one; v.Function == "other.openfaas-fn" {
			t.Errorf("a watch of web tells %+v", v)
		}
	}
	begun := time.Now()
	next(all, 6*time.Second, "heartbeat", func(v sheaf.View) bool { return v.Function == "" })
	t.Logf("heartbeat after %v", time.Since(begun).Round(time.Millisecond))
}

// A caller that announces a body and sends none gets its refusal all the same,
// and the headers of an answer come with it, not with a 100 Continue.
func TestBodiesThatDoNotCome(t *testing.T) {
	m := newMachine(t)
	for _, path := range []string{"/function/nosuch", "/function/No", "/nothing"} {
		begun := time.Now()
		resp, body := m.raw("POST " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n")
		if resp.StatusCode < 400 || time.Since(begun) > 15*time.Second {
			t.Errorf("%s: %d after %v: %s", path, resp.StatusCode, time.Since(begun), body)
		}
	}
	m.deploy("web", "web", 1)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, m.url+"/function/web", strings.NewReader("hi"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Expect", "100-continue")
	transport := &http.Transport{ExpectContinueTimeout: 5 * time.Second}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.Header.Get("X-Call-Id") == "" || resp.Header.Get("X-Served-By") == "" {
		t.Errorf("%d with headers %v", resp.StatusCode, resp.Header)
	}
}
