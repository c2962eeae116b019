package test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// ask makes a request and returns its status and answer.
func ask(t *testing.T, method, url, body string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(answer)
}

// echoProgram makes a program of the echo function in a folder.
func echoProgram(t *testing.T, dir, name string) {
	t.Helper()
	script := fmt.Sprintf("#!/bin/sh\nexec '%s' %s\n", os.Args[0], echoFlag)
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
}

// Executable files of the folder that --programs names can be deployed, and
// nothing else.
func TestUpPrograms(t *testing.T) {
	dir, data := t.TempDir(), filepath.Join(t.TempDir(), "data")
	echoProgram(t, dir, "echo.sh")
	if err := os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd, url := startUp(t, "--port", "0", "--workers", "1", "--programs", dir, "--data", data)
	deploy := func(name, image string) (int, string) {
		t.Helper()
		body, err := json.Marshal(map[string]string{"service": name, "image": image})
		if err != nil {
			t.Fatal(err)
		}
		return ask(t, "POST", url+"/system/functions", string(body))
	}
	for i, image := range []string{"echo.sh", "./echo.sh:latest", filepath.Join(dir, "echo.sh")} {
		name := fmt.Sprint("echo", i)
		if status, said := deploy(name, image); status != http.StatusAccepted {
			t.Errorf("image %s: %d %s", image, status, said)
		}
		if status, said := ask(t, "POST", url+"/function/"+name+"/x", "hello"); status != http.StatusOK || !strings.Contains(said, "POST /x") || !strings.HasSuffix(said, " hello") {
			t.Errorf("image %s: %d %s", image, status, said)
		}
	}
	for image, says := range map[string]string{
		"notes.txt": "chmod +x", "nosuch": "no such file", "../echo.sh": "is not in", "/bin/sh": "is not in", ".": "not an executable file", "": "not an executable file",
	} {
		if status, said := deploy("no", image); status != http.StatusBadRequest || !strings.Contains(said, says) || !strings.Contains(said, "unknown_image") {
			t.Errorf("image %q: %d %s", image, status, said)
		}
	}
	// A stack that comes back without what its functions need says so, at once.
	if status, said := deploy("worker", "echo.sh"); status != http.StatusAccepted {
		t.Fatal(status, said)
	}
	_ = cmd.Process.Signal(os.Interrupt)
	_ = cmd.Wait()
	_, url, before := startUpSaying(t, "--port", "0", "--workers", "2", "--data", data)
	if n := strings.Count(before, "cannot run until it is deployed anew"); n != 4 || !strings.Contains(before, `function worker cannot run until it is deployed anew: image "echo.sh" is not known here`) {
		t.Errorf("it said:\n%s", before)
	}
	if status, said := deploy("worker", "sheaf/worker"); status != http.StatusAccepted {
		t.Fatal(status, said)
	}
	if got := cli(t, "a b a\n", "run", "-", "--gateway", url); got.code != 0 || got.out != "a 2\nb 1\n" {
		t.Errorf("run: %+v", got)
	}
}

// Where callbacks may go, and what signs them, is said by flags.
func TestUpCallbacks(t *testing.T) {
	dir, keys := t.TempDir(), t.TempDir()
	echoProgram(t, dir, "echo.sh")
	key := filepath.Join(keys, "key")
	if err := os.WriteFile(key, []byte("open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := make(chan *http.Request, 10)
	bodies := make(chan string, 10)
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		bodies <- string(body)
		got <- r
	}))
	defer srv.Close()
	for _, c := range []struct {
		allow  string
		status int
	}{{"", http.StatusForbidden}, {"10.0.0.0/8", http.StatusForbidden}, {"192.0.2.1, 127.0.0.1", http.StatusAccepted}} {
		_, url := startUp(t, "--port", "0", "--workers", "1", "--programs", dir, "--callback-key-file", key, "--callback-allow", c.allow)
		if status, said := ask(t, "POST", url+"/system/functions", `{"service":"echo","image":"echo.sh"}`); status != http.StatusAccepted {
			t.Fatal(status, said)
		}
		if status, said := ask(t, "POST", url+"/async-function/echo", "hello", "X-Callback-Url", srv.URL); status != c.status {
			t.Errorf("--callback-allow %q: %d %s", c.allow, status, said)
		}
	}
	select {
	case r := <-got:
		body := <-bodies
		m := regexp.MustCompile(`^t=(\d+),v1=([0-9a-f]{64})$`).FindStringSubmatch(r.Header.Get("X-Sheaf-Signature"))
		if m == nil {
			t.Fatalf("headers %v", r.Header)
		}
		mac := hmac.New(sha256.New, []byte("open sesame"))
		fmt.Fprintf(mac, "%s.%s", m[1], body)
		if want := hex.EncodeToString(mac.Sum(nil)); m[2] != want || !strings.HasSuffix(body, "hello") {
			t.Errorf("signature %s of %q, want %s", m[2], body, want)
		}
	case <-time.After(20 * time.Second):
		t.Error("no callback within 20 s")
	}
	for flags, says := range map[string]string{
		"--callback-key-file " + key + "2": "signing key",
		"--callback-allow everywhere":      `"everywhere" must be an address, a CIDR or host:port`,
		"--programs " + key:                "must be a folder",
	} {
		if got := cli(t, "", append([]string{"up", "--port", "0"}, strings.Fields(flags)...)...); got.code != 2 || !strings.Contains(got.err, says) {
			t.Errorf("up %s: exit code %d, %s", flags, got.code, got.err)
		}
	}
}

// With --community, what OpenFaaS's Community Edition refuses is refused, and
// what it cuts down is.
func TestUpCommunity(t *testing.T) {
	_, url := startUp(t, "--port", "0", "--workers", "1", "--community")
	in := text(41, 300_000)
	for _, size := range []int{256_000, 256_001} {
		status, said := ask(t, "POST", url+"/async-function/master", in[:size])
		if want := map[int]int{256_000: http.StatusAccepted, 256_001: http.StatusRequestEntityTooLarge}[size]; status != want ||
			size > 256_000 && !strings.Contains(said, "over 256000 bytes") {
			t.Errorf("%d bytes: %d %s", size, status, said)
		}
	}
	// 35 replicas are 5, 0 are 1, and a job that asks for 35 is right.
	replicas := func(want int) {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			_, said := ask(t, "GET", url+"/system/function/worker", "")
			if strings.Contains(said, fmt.Sprintf(`"replicas":%d,"availableReplicas":%d,`, want, want)) {
				return
			}
			if time.Since(begun) > 20*time.Second {
				t.Fatalf("not %d replicas: %s", want, said)
			}
		}
	}
	for asked, want := range map[int]int{35: 5, 0: 1} {
		if status, said := ask(t, "POST", url+"/system/scale-function/worker", fmt.Sprintf(`{"replicas":%d}`, asked)); status != http.StatusAccepted {
			t.Fatal(status, said)
		}
		replicas(want)
	}
	if status, said := ask(t, "POST", url+"/function/master?workers=35&block=1KiB", in); status != http.StatusOK || said != sequential(in) {
		t.Errorf("a job that asks for 35 workers: %d, right answer %v", status, said == sequential(in))
	}
	replicas(5)
	for more, says := range map[string]string{
		`"labels":{"com.openfaas.scale.max":"6"}`:         "com.openfaas.scale.max is 6, over 5",
		`"labels":{"com.openfaas.scale.zero":"true"}`:     "com.openfaas.scale.zero is set",
		`"labels":{"com.openfaas.scale.type":"rps"}`:      "com.openfaas.scale.type is set",
		`"annotations":{"topic":"a,b"}`:                   "more than one topic",
		`"labels":{"com.openfaas.scale.min":"5"}`:         "",
		`"annotations":{"topic":"a"}`:                     "",
		`"labels":{"com.openfaas.scale.min":"3","a":"b"}`: "",
	} {
		status, said := ask(t, "POST", url+"/system/functions", `{"service":"other","image":"sheaf/worker",`+more+`}`)
		if says == "" && status != http.StatusAccepted || says != "" && (status != http.StatusBadRequest || !strings.Contains(said, says) || !strings.Contains(said, "community_limit")) {
			t.Errorf("%s: %d %s", more, status, said)
		}
	}
	for n := 4; n <= 16; n++ { // beside master, worker and other
		status, said := ask(t, "POST", url+"/system/functions", fmt.Sprintf(`{"service":"f%d","image":"sheaf/worker"}`, n))
		if want := map[bool]int{true: http.StatusBadRequest, false: http.StatusAccepted}[n > 15]; status != want {
			t.Errorf("function %d: %d %s", n, status, said)
		}
	}
	if status, said := ask(t, "PUT", url+"/system/functions", `{"service":"f4","image":"sheaf/worker"}`); status != http.StatusAccepted {
		t.Errorf("a change of one of 15: %d %s", status, said)
	}
	if got := cli(t, "", "up", "--port", "0", "--community", "--workers", "6"); got.code != 2 || !strings.Contains(got.err, "from 1 to 5") {
		t.Errorf("6 workers: %+v", got)
	}
}
