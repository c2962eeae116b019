package test

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// Only the watcher's word counts as to where replicas are: functions and
// clients of NATS cannot write into the record.
func TestControl03NobodyForgesAddresses(t *testing.T) {
	b := start(t, 1, nil)
	before := b.replicas("worker")
	const forged = `{"function":"worker.openfaas-fn","replicas":[{"id":"evil","url":"http://127.0.0.1:1","state":"ready"}],"desired":1}`
	functions, err := b.ConnectNATS("forger")
	if err != nil {
		t.Fatal(err)
	}
	defer functions.Close()
	client, err := nats.Connect(b.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, nc := range []*nats.Conn{functions, client} {
		nc.SetErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})
		for _, subject := range []string{"$KV.sheaf-views.worker", "$KV.sheaf-views.worker.openfaas-fn", "sheaf.hello", "sheaf.views"} {
			for range 100 {
				if err := nc.Publish(subject, []byte(forged)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		if a := b.count("", "a b a\n"); a.body != sequential("a b a\n") {
			t.Fatalf("%+v", a)
		}
	}
	if after := b.replicas("worker"); len(after) != 1 || after[0].ID != before[0].ID || after[0].URL != before[0].URL {
		t.Errorf("the record is %+v, was %+v", after, before)
	}
}

// 500 connections that send a byte now and then, at the front and at a worker,
// keep no job from running, and are ended.
func TestControl11Slowloris(t *testing.T) {
	b := start(t, 2, nil)
	front := strings.TrimPrefix(b.URL, "http://")
	worker := strings.TrimPrefix(b.replicas("worker")[0].URL, "http://")
	var wg sync.WaitGroup
	ended := make(chan struct{}, 500)
	stop := make(chan struct{})
	for i := range 500 {
		addr := front
		if i%2 == 0 {
			addr = worker
		}
		wg.Go(func() {
			defer func() { ended <- struct{}{} }()
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return // it takes no more
			}
			defer c.Close()
			go func() { <-stop; _ = c.Close() }()
			if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nX-Slow: "); err != nil {
				return
			}
			for {
				if _, err := c.Write([]byte("a")); err != nil {
					return
				}
				_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				if _, err := c.Read(make([]byte, 1)); err != nil && !os.IsTimeout(err) {
					return // told that it is too slow
				}
			}
		})
	}
	in := text(5, 50_000)
	for range 5 {
		if a := b.count("block=1KiB", in); a.body != sequential(in) {
			t.Errorf("a job beside them: %d %.100s", a.status, a.body)
		}
	}
	late := time.After(60 * time.Second)
	for n := range 500 {
		select {
		case <-ended:
		case <-late:
			close(stop)
			t.Fatalf("%d of 500 connections were not ended within a minute", 500-n)
		}
	}
	close(stop)
	wg.Wait()
}

// What clients name is a label: no name of theirs makes, or reads, a file
// outside of the stack's folder.
func TestControl12LabelsAreNoPaths(t *testing.T) {
	root := t.TempDir()
	canary := filepath.Join(root, "canary")
	if err := os.WriteFile(canary, []byte("canary-in-a-file"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, base := startUp(t, "--port", "0", "--workers", "1", "--data", filepath.Join(root, "a", "data"))
	for _, name := range []string{"../../canary", "..%2f..%2fcanary", "....//canary", canary, "..", ".", "a\\..\\..\\canary", "%2e%2e/canary", "canary%00.txt", strings.Repeat("../", 40) + "etc/passwd"} {
		quoted := strings.ReplaceAll(strings.ReplaceAll(name, `\`, `\\`), `"`, `\"`)
		form := "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"" + quoted + "\"\r\n\r\na b a\r\n--b--\r\n"
		for _, c := range []struct {
			method, target, body string
			header               []string
		}{
			{"POST", "/function/master", form, []string{"Content-Type", "multipart/form-data; boundary=b"}},
			{"GET", "/function/" + name, "", nil},
			{"POST", "/function/" + url.PathEscape(name), "x", nil},
			{"POST", "/function/master?function=" + url.QueryEscape(name), "x", nil},
			{"POST", "/async-function/" + url.PathEscape(name), "x", nil},
			{"POST", "/async-function/worker", "x", []string{"X-Call-Id", strings.Map(ascii, name)}},
			{"GET", "/async-function/worker/-/" + url.PathEscape(name), "", nil},
			{"POST", "/function/master/jobs", "x", []string{"Idempotency-Key", strings.Map(ascii, name)}},
			{"GET", "/function/master/jobs/" + url.PathEscape(name), "", nil},
			{"GET", "/function/master/jobs/" + url.PathEscape(name) + "/result", "", nil},
			{"POST", "/system/functions", fmt.Sprintf(`{"service":%q,"image":"sheaf/worker"}`, name), nil},
			{"POST", "/system/functions", fmt.Sprintf(`{"service":"x","image":%q}`, name), nil},
			{"POST", "/system/functions", fmt.Sprintf(`{"service":"x","image":"sheaf/worker","secrets":[%q]}`, name), nil},
			{"POST", "/system/secrets", fmt.Sprintf(`{"name":%q,"value":"v"}`, name), nil},
			{"DELETE", "/system/secrets", fmt.Sprintf(`{"name":%q}`, name), nil},
			{"GET", "/system/function/" + url.PathEscape(name), "", nil},
			{"GET", "/system/replicas/" + url.PathEscape(name), "", nil},
		} {
			if status, body := ask(t, c.method, base+c.target, c.body, c.header...); strings.Contains(body, "canary-in-a-file") || strings.Contains(body, "root:") || status == http.StatusInternalServerError {
				t.Errorf("%s %s with %q: %d %.200s", c.method, c.target, name, status, body)
			}
		}
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(root, path); err == nil && rel != "." && rel != "canary" && rel != "a" && !strings.HasPrefix(rel, filepath.Join("a", "data")) {
			t.Errorf("%s was made", rel)
		}
		return nil // what is being removed meanwhile is no matter
	})
	if err != nil {
		t.Fatal(err)
	}
}

func ascii(r rune) rune {
	if r <= ' ' || r > '~' {
		return '_'
	}
	return r
}

// A message whose end two readers may see at different places is one request at
// most, or none: nothing of its body is taken for a request.
func TestControl13NoSmuggling(t *testing.T) {
	b := start(t, 1, nil)
	const inner = "POST /_/smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(inner), inner)
	for where, addr := range map[string]string{"front": strings.TrimPrefix(b.URL, "http://"), "worker": strings.TrimPrefix(b.replicas("worker")[0].URL, "http://")} {
		path := "/"
		if where == "front" {
			path = "/function/worker"
		}
		for name, c := range map[string]struct{ head, body string }{
			"two lengths":               {"Content-Length: 0\r\nContent-Length: " + fmt.Sprint(len(inner)), inner},
			"lengths in a list":         {fmt.Sprintf("Content-Length: 0, %d", len(inner)), inner},
			"a negative length":         {"Content-Length: -1", inner},
			"a length with a sign":      {fmt.Sprintf("Content-Length: +%d", len(inner)), inner},
			"a length in hexadecimal":   {fmt.Sprintf("Content-Length: 0x%x", len(inner)), inner},
			"a length like 1e3":         {"Content-Length: 1e3", inner},
			"a blank before the colon":  {fmt.Sprintf("Content-Length : %d", len(inner)), inner},
			"a folded line":             {fmt.Sprintf("Content-Length:\r\n %d", len(inner)), inner},
			"an unknown encoding":       {"Transfer-Encoding: xchunked", chunked},
			"chunked twice":             {"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", chunked},
			"chunked, then identity":    {"Transfer-Encoding: chunked, identity", chunked},
			"encoding after a tab":      {"Transfer-Encoding:\x0bchunked", chunked},
			"a name with a blank":       {"Transfer Encoding: chunked", chunked},
			"a bare line feed":          {"X: y\nTransfer-Encoding: xchunked", chunked},
			"a carriage return inside":  {"X: y\rContent-Length: 0", inner},
			"a NUL":                     {"X: \x00y", inner},
			"two hosts":                 {"Host: y\r\nContent-Length: 0", inner},
			"length and chunked":        {fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked", len(chunked)), chunked},
			"length after chunked":      {fmt.Sprintf("Transfer-Encoding: chunked\r\nContent-Length: %d", len(chunked)), chunked},
			"a chunk size that is bad":  {"Transfer-Encoding: chunked", "5;\r\x00\r\nhello\r\n0\r\n\r\n"},
			"a chunk size with a sign":  {"Transfer-Encoding: chunked", "+5\r\nhello\r\n0\r\n\r\n"},
			"a chunk longer than said":  {"Transfer-Encoding: chunked", "2\r\nhello\r\n0\r\n\r\n"},
			"a chunk size that is huge": {"Transfer-Encoding: chunked", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"},
		} {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: x\r\n"+c.head+"\r\n\r\n"+c.body); err != nil {
				conn.Close()
				continue // refused already
			}
			_ = conn.(*net.TCPConn).CloseWrite()
			r := bufio.NewReader(conn)
			answers := 0
			for {
				resp, err := http.ReadResponse(r, nil)
				if err != nil {
					break
				}
				answer, _ := io.ReadAll(resp.Body)
				answers++
				if strings.Contains(string(answer), "smuggled") && resp.StatusCode == http.StatusNotFound || answers > 1 && resp.StatusCode != http.StatusBadRequest {
					t.Errorf("%s, %s: answer %d is %d %.200s", where, name, answers, resp.StatusCode, answer)
				}
			}
			conn.Close()
		}
		// One that is rightly put behind the other is seen as a second one, so the
		// above shows something.
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, "POST "+path+" HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"+inner); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		for i, want := range []int{http.StatusOK, http.StatusNotFound} {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%s: answer %d: %v", where, i+1, err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != want {
				t.Errorf("%s: answer %d is %s, want %d", where, i+1, resp.Status, want)
			}
		}
		conn.Close()
		if status, _ := ask(t, http.MethodPost, "http://"+addr+path, "fine"); status != http.StatusOK {
			t.Errorf("%s answers %d after it all", where, status)
		}
	}
}

// The jobs and calls of one function are not another one's.
func TestControl14JobsAreTheirFunctions(t *testing.T) {
	b := start(t, 1, nil)
	b.deploy("other", "sheaf/master", 1, map[string]string{"nats_url": b.NATS, "gateway_url": b.URL})
	b.waitFor("other", 1)
	for i := range 5 {
		status, body := ask(t, http.MethodPost, b.URL+"/function/master/jobs", fmt.Sprintf("a b %d", i), "Idempotency-Key", fmt.Sprintf("key-%d", i))
		if status != http.StatusAccepted && status != http.StatusOK {
			t.Fatalf("%d %s", status, body)
		}
		_, id, _ := strings.Cut(body, `"id":"`)
		id, _, _ = strings.Cut(id, `"`)
		if id == "" {
			t.Fatalf("no id in %s", body)
		}
		for _, c := range [][2]string{{"GET", ""}, {"GET", "/result"}, {"GET", "/events"}, {"DELETE", ""}, {"POST", "/redrive"}} {
			if status, body := ask(t, c[0], b.URL+"/function/other/jobs/"+id+c[1], ""); status != http.StatusNotFound || !strings.Contains(body, "job_not_found") {
				t.Errorf("%s %s of another function: %d %s", c[0], c[1], status, body)
			}
		}
		if status, body := ask(t, http.MethodGet, b.URL+"/function/master/jobs/"+id, ""); status != http.StatusOK || strings.Contains(body, "cancelled") {
			t.Errorf("the job itself: %d %s", status, body)
		}
	}
	if status, body := ask(t, http.MethodGet, b.URL+"/function/other/jobs", ""); status != http.StatusOK || strings.Contains(body, "key-") || strings.Count(body, `"id"`) != 0 {
		t.Errorf("the other function lists %s", body)
	}
	if status, body := ask(t, http.MethodPost, b.URL+"/function/master?function=worker.kube-system", "x"); status != http.StatusForbidden || !strings.Contains(body, "namespace_not_allowed") {
		t.Errorf("a namespace that is not allowed: %d %s", status, body)
	}
}

// Secrets are in no output: of the command with all that it can log, of the
// functions, of refusals, and in no argument of a process.
func TestControl18NoSecretInAnyOutput(t *testing.T) {
	const canary = "canary-0fb1d2-do-not-print"
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	password, callback := filepath.Join(dir, "password"), filepath.Join(dir, "callback")
	for _, f := range []string{password, callback} {
		if err := os.WriteFile(f, []byte(canary+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(binary, "up", "--port", "0", "--workers", "1", "--data", data, "--password-file", password, "--callback-key-file", callback, "--verbose")
	out := &lines{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var base string
	within(t, time.Minute, "sheaf up", func() bool {
		_, after, ok := strings.Cut(out.String(), "sheaf is up at ")
		base, _, _ = strings.Cut(after, " ")
		return ok && base != ""
	})
	login := []string{"Authorization", basic("admin", canary)}
	var said strings.Builder
	say := func(method, target, body string, header ...string) {
		status, answer := ask(t, method, base+target, body, header...)
		fmt.Fprintln(&said, method, target, status, answer)
	}
	say("POST", "/system/secrets", fmt.Sprintf(`{"name":"token","value":%q}`, canary), login...)
	say("POST", "/system/secrets", fmt.Sprintf(`{"name":"token","value":%q}`, canary), login...)
	say("PUT", "/system/secrets", fmt.Sprintf(`{"name":"unknown","value":%q}`, canary), login...)
	say("POST", "/system/secrets", fmt.Sprintf(`{"name":"broken","value":%q`, canary), login...)
	say("GET", "/system/secrets", "", login...)
	say("POST", "/system/functions", `{"service":"holder","image":"sheaf/worker","secrets":["token"],"envVars":{"sheaf_key_file":"token"}}`, login...)
	say("GET", "/system/functions", "", login...)
	say("GET", "/system/info", "", login...)
	say("GET", "/system/functions", "", "Authorization", basic("admin", canary+"x"))
	say("POST", "/function/master", "a b a")
	say("POST", "/function/worker", "x", "Sheaf-Signature", "t=1,n=0123456789abcdef.1,v1="+strings.Repeat("0", 64), "Sheaf-Job", "j")
	say("POST", "/function/holder", "x", "Sheaf-Signature", "wrong")
	say("POST", "/async-function/worker", "x", "X-Callback-Url", "http://127.0.0.1:1/done")
	say("GET", "/system/logs?name=holder&tail=100", "", login...)
	say("GET", "/system/logs?name=worker&tail=100", "", login...)
	say("GET", "/system/logs?name=master&tail=100", "", login...)
	secrets := map[string]string{"the canary": canary}
	for _, name := range []string{"signing-key", "nats-functions", "nats-connector"} {
		text, err := os.ReadFile(filepath.Join(data, name))
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(data, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s may be read by others: %v %v", name, info.Mode(), err)
		}
		secrets[name] = strings.TrimSpace(string(text))
	}
	var arguments strings.Builder
	for _, pid := range append(functions(t, cmd.Process.Pid), fmt.Sprint(cmd.Process.Pid)) {
		for _, what := range []string{"cmdline", "environ"} {
			text, _ := os.ReadFile(filepath.Join("/proc", pid, what)) // it may have ended
			arguments.WriteString(string(text))
		}
	}
	_ = cmd.Process.Signal(os.Interrupt)
	_ = cmd.Wait()
	for name, secret := range secrets {
		for where, text := range map[string]string{"sheaf up": out.String(), "answers": said.String(), "arguments and environments": arguments.String()} {
			if strings.Contains(text, secret) {
				i := strings.Index(text, secret)
				t.Errorf("%s stands in %s: %q", name, where, text[max(0, i-200):min(len(text), i+60)])
			}
		}
	}
	if !strings.Contains(said.String(), "signature_invalid") || !strings.Contains(said.String(), "a 2") {
		t.Errorf("nothing happened: %s", said.String())
	}
}

func basic(user, password string) string {
	r := &http.Request{Header: http.Header{}}
	r.SetBasicAuth(user, password)
	return r.Header.Get("Authorization")
}

// lines is a log that can be read while it is written.
type lines struct {
	mu  sync.Mutex // guards buf
	buf strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// within waits until done.
func within(t *testing.T, most time.Duration, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(most); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, most)
		}
	}
}
