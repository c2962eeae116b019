package test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/local"
)

// step is one command of faas-cli, and the HTTP calls that the real one made
// for it. testdata/faascli.json is a recording of faas-cli 0.18.12.
type step struct {
	Command []string  `json:"command"`
	Input   string    `json:"input,omitempty"`
	Code    int       `json:"code,omitempty"` // exit code
	Says    string    `json:"says,omitempty"` // a part of what it prints
	Calls   []apiCall `json:"calls"`
}

// apiCall is a request, and the answer with all that differs between two runs
// replaced by plain.
type apiCall struct {
	Method string            `json:"method"`
	Target string            `json:"target"`
	Header map[string]string `json:"header"`
	Body   string            `json:"body,omitempty"`
	Status int               `json:"status"`
	Answer string            `json:"answer,omitempty"`
}

const (
	cliRecording = "testdata/faascli.json"
	cliStack     = "testdata/faascli.yaml"
	cliSecret    = "testdata/faascli.secret"
	cliPassword  = "open sesame" // of the recording
	cliLogin     = "Basic YWRtaW46b3BlbiBzZXNhbWU="
	echoFlag     = "-echo-function"
)

// runEcho is a function that tells what it was called with, and logs it. It is
// the test's binary with echoFlag.
func runEcho() {
	err := http.ListenAndServe(os.Getenv("sheaf_listen"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_/ready" {
			return
		}
		fmt.Println(r.Method, r.RequestURI)
		body, err := io.ReadAll(r.Body)
		if name := r.FormValue("secret"); err == nil && name != "" {
			body, err = os.ReadFile(filepath.Join(os.Getenv(local.MountEnv), name))
		}
		if err != nil {
			fmt.Println(err)
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if r.FormValue("teapot") != "" {
			w.WriteHeader(http.StatusTeapot)
		}
		fmt.Fprintf(w, "%s %s X-A=%q %s", r.Method, r.RequestURI, r.Header.Get("X-A"), body)
	}))
	fmt.Println(err)
	os.Exit(1)
}

var (
	timeForm    = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
	replicaForm = regexp.MustCompile(`(bare|full)-[0-9a-f]{8}\b`)
	archForm    = regexp.MustCompile(`"arch":"\w+"`)
)

// plain replaces what differs between two runs.
func plain(s string) string {
	s = timeForm.ReplaceAllString(s, "TIME")
	s = replicaForm.ReplaceAllString(s, "$1-REPLICA")
	return archForm.ReplaceAllString(s, `"arch":"ARCH"`)
}

func cliSteps(t *testing.T) (steps []step) {
	t.Helper()
	data, err := os.ReadFile(cliRecording)
	if err == nil {
		err = json.Unmarshal(data, &steps)
	}
	if err != nil {
		t.Fatal(err)
	}
	return steps
}

// startCLI starts a stack with a login and no function.
func startCLI(t *testing.T) *bench {
	t.Helper()
	s, err := local.Start(local.Config{
		Command: func(image string) ([]string, error) {
			if strings.HasSuffix(image, "echo:latest") {
				return []string{os.Args[0], echoFlag}, nil
			}
			return nil, fmt.Errorf("no image %q", image)
		},
		Auth: local.Auth{User: "admin", Password: cliPassword}, Version: "test", Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return &bench{s, t}
}

// settled waits until every function has the replicas that it shall have, and
// none of an older deployment.
func (b *bench) settled() {
	b.t.Helper()
	list := apiCall{Method: http.MethodGet, Target: "/system/replicas", Header: map[string]string{"Authorization": cliLogin}}
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		var views []sheaf.View
		if _, body := b.replay(list); json.Unmarshal([]byte(body), &views) != nil {
			b.t.Fatal(body)
		}
		if !slices.ContainsFunc(views, func(v sheaf.View) bool {
			return len(v.Replicas) != v.Desired || slices.ContainsFunc(v.Replicas, func(r sheaf.Replica) bool { return r.State != sheaf.Ready })
		}) {
			return
		}
		if time.Since(begun) > 30*time.Second {
			b.t.Fatalf("the functions are not ready after 30 s: %v", views)
		}
	}
}

// An unmodified faas-cli finds what it expects: what it sent in a recorded
// conversation is sent again, and the answers are as they were.
func TestRecordedFaasCLI(t *testing.T) {
	b := startCLI(t)
	for _, s := range cliSteps(t) {
		for _, c := range s.Calls {
			b.settled()
			var status int
			var answer string
			// A line of a log comes a little after the call that it tells of.
			for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
				status, answer = b.replay(c)
				answer = plain(answer)
				if status == c.Status && answer == c.Answer || c.Method != http.MethodGet || time.Since(begun) > 5*time.Second {
					break
				}
			}
			if status != c.Status || answer != c.Answer {
				t.Errorf("faas-cli %s: %s %s: status %d, want %d; answer\n%s\nwant\n%s",
					strings.Join(s.Command, " "), c.Method, c.Target, status, c.Status, answer, c.Answer)
			}
		}
	}
}

func (b *bench) replay(c apiCall) (int, string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), c.Method, b.URL+c.Target, strings.NewReader(c.Body))
	if err != nil {
		b.t.Fatal(err)
	}
	for k, v := range c.Header {
		req.Header.Set(k, v)
	}
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// The commands of the recording by the faas-cli that FAAS_CLI names.
func TestRealFaasCLI(t *testing.T) {
	faasCLI := os.Getenv("FAAS_CLI")
	if faasCLI == "" {
		t.Log("FAAS_CLI names no binary of faas-cli; the recording of one is played by TestRecordedFaasCLI")
		return
	}
	b := startCLI(t)
	home := t.TempDir()
	for _, s := range cliSteps(t) {
		b.settled()
		said, code := faas(t, faasCLI, home, b.URL, s)
		t.Logf("faas-cli %s: exit code %d\n%s", strings.Join(s.Command, " "), code, said)
		if code != s.Code || !strings.Contains(said, s.Says) {
			t.Errorf("faas-cli %s: exit code %d, want %d; want it to say %q", strings.Join(s.Command, " "), code, s.Code, s.Says)
		}
	}
	b.followed(faasCLI, home)
	// The login that faas-cli has left is sheaf's, too.
	t.Setenv("OPENFAAS_CONFIG", filepath.Join(home, ".openfaas"))
	if got := cli(t, "", "ps", "--gateway", b.URL); got.code != 0 || !strings.Contains(got.out, "full.openfaas-fn") {
		t.Errorf("sheaf ps with faas-cli's login: exit code %d, %s%s", got.code, got.out, got.err)
	}
	t.Setenv("OPENFAAS_CONFIG", t.TempDir())
	if got := cli(t, "", "ps", "--gateway", b.URL); got.code != 1 || !strings.Contains(got.err, "faas-cli login --gateway "+b.URL) {
		t.Errorf("sheaf ps without a login: exit code %d, %s%s", got.code, got.out, got.err)
	}
}

// followed sees faas-cli logs show a line at once, and without end.
func (b *bench) followed(faasCLI, home string) {
	b.t.Helper()
	cmd := faasCommand(b.t, faasCLI, home, b.URL, "logs", "full", "--tail", "--since", "1s")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	stuck := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer func() {
		stuck.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	}()
	in := bufio.NewReader(out)
	for i := range 3 {
		path := fmt.Sprintf("/line-%d", i)
		b.replay(apiCall{Method: http.MethodGet, Target: "/function/full" + path})
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				b.t.Fatalf("faas-cli logs ended before it showed %s: %v", path, err)
			}
			if strings.Contains(line, "GET "+path) {
				break
			}
		}
	}
}

// faasCommand is a command of faas-cli in this folder, with another home.
func faasCommand(t testing.TB, binary, home, gateway string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary, args...)
	cmd.Env = []string{"HOME=" + home, "OPENFAAS_URL=" + gateway, "PATH=" + os.Getenv("PATH")}
	return cmd
}

func faas(t *testing.T, binary, home, gateway string, s step) (said string, code int) {
	t.Helper()
	cmd := faasCommand(t, binary, home, gateway, s.Command...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(s.Input), &out, &out
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// sheaf up --auth --data: the command's own clients use faas-cli's login, and
// what is deployed is there again after a restart.
func TestUpWithALogin(t *testing.T) {
	config, data := t.TempDir(), filepath.Join(t.TempDir(), "data")
	t.Setenv("OPENFAAS_CONFIG", config)
	password := file(t, cliPassword+"\n")
	up := func(workers string) (end func(), url string) {
		cmd, url := startUp(t, "--port", "0", "--workers", workers, "--password-file", password, "--data", data)
		saved := fmt.Sprintf("auths:\n  - gateway: %s\n    auth: basic\n    token: %s\n", url,
			base64.StdEncoding.EncodeToString([]byte("admin:"+cliPassword)))
		if err := os.WriteFile(filepath.Join(config, "config.yml"), []byte(saved), 0o600); err != nil {
			t.Fatal(err)
		}
		return func() {
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
		}, url
	}
	api := func(method, url, body string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth("admin", cliPassword)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, _ := io.ReadAll(resp.Body)
		if resp.StatusCode >= 300 {
			t.Fatalf("%s %s: %s %s", method, url, resp.Status, answer)
		}
		return string(answer)
	}
	in := text(5, 20_000)
	path := file(t, in)
	end, url := up("2")
	api("POST", url+"/system/functions", `{"service":"another","image":"sheaf/worker:latest"}`)
	for i, workers := range []int{2, 3} {
		if i > 0 {
			end()
			end, url = up(fmt.Sprint(workers))
		}
		if got := cli(t, "", "run", path, "--gateway", url); got.code != 0 || got.out != sequential(in) {
			t.Errorf("start %d: run: exit code %d, %s", i, got.code, got.err)
		}
		if got := cli(t, "", "run", path, "--gateway", url, "--kill", "1@40%"); got.code != 0 || got.out != sequential(in) {
			t.Errorf("start %d: run with a kill: exit code %d, %s", i, got.code, got.err)
		}
		listing := cli(t, "", "ps", "--gateway", url)
		if listing.code != 0 || !strings.Contains(listing.out, "another.openfaas-fn") {
			t.Errorf("start %d: ps: %s%s", i, listing.out, listing.err)
		}
		if got := api("GET", url+"/system/function/worker", ""); !strings.Contains(got, fmt.Sprintf(`"replicas":%d,`, workers)) {
			t.Errorf("start %d: %s", i, got)
		}
	}
	defer end()
	t.Setenv("OPENFAAS_CONFIG", t.TempDir())
	if got := cli(t, "", "ps", "--gateway", url); got.code != 1 || !strings.Contains(got.err, "faas-cli login --gateway "+url) {
		t.Errorf("ps without a login: exit code %d, %s", got.code, got.err)
	}
	if got := cli(t, "", "up", "--port", "0", "--data", data); got.code != 1 || !strings.Contains(got.err, "in use by another stack") {
		t.Errorf("a second stack: exit code %d, %s", got.code, got.err)
	}
	if got := cli(t, "", "up", "--port", "0", "--password-file", filepath.Join(data, "nosuch")); got.code != 2 || !strings.Contains(got.err, "--password-file") {
		t.Errorf("no password: exit code %d, %s", got.code, got.err)
	}
}
