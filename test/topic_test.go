package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/gateway"
)

// upTopics runs sheaf up, and returns the gateway's URL and a client of the
// NATS that it tells of.
func upTopics(t *testing.T, args ...string) (url string, nc *nats.Conn) {
	t.Helper()
	cmd := exec.Command(binary, append([]string{"up", "--port", "0"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that a signal to it is to it alone
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() })
	var said strings.Builder
	in := bufio.NewReader(errs)
	for {
		line, err := in.ReadString('\n')
		said.WriteString(line)
		if err != nil {
			t.Fatalf("sheaf up ended: %v\n%s", err, said.String())
		}
		if m := regexp.MustCompile(`sheaf is up at (http://\S+) `).FindStringSubmatch(line); m != nil {
			url = m[1]
		}
		if m := regexp.MustCompile(`nats --server (\S+) request words`).FindStringSubmatch(line); m != nil {
			go func() { _, _ = io.Copy(io.Discard, in) }()
			if nc, err = nats.Connect(m[1]); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			return url, nc
		}
	}
}

// What sheaf up says can be typed: a text on the master's topic comes back as
// the merged answer.
func TestMessageToTheMaster(t *testing.T) {
	url, nc := upTopics(t, "--workers", "3")
	in := text(5, 100_000)
	m, err := nc.Request("words", []byte(in), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if string(m.Data) != sequential(in) || m.Header.Get("Sheaf-Function") != "master.openfaas-fn" || m.Header.Get("Sheaf-Status") != "200" {
		t.Errorf("answer is %v %.200q", m.Header, m.Data)
	}
	asJSON, err := nc.RequestMsg(&nats.Msg{Subject: "words", Header: nats.Header{"Accept": {"application/json"}}, Data: []byte("a b a")}, time.Minute)
	if err != nil || string(asJSON.Data) != "{\"a\": 2, \"b\": 1}\n" {
		t.Errorf("JSON: %q, %v", asJSON.Data, err)
	}
	// Blocks by messages, of all sizes that parts and payloads have.
	for _, query := range []string{"?route=topic", "?route=topic&block=300", "?route=topic&block=1&split=bytes&timeout=1m"} {
		body := in
		if strings.Contains(query, "block=1&") {
			body = in[:500]
		}
		resp, err := http.Post(url+"/function/master"+query, "text/plain", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(got) != sequential(body) {
			t.Errorf("%s: %s %.200q (%v)", query, resp.Status, got, err)
		}
	}
	big := text(6, 9<<20)
	got := cli(t, big, "run", "-", "--gateway", url, "--route", "topic", "--block", "3MiB")
	if got.code != 0 || got.out != sequential(big) {
		t.Errorf("blocks of 3 MiB: exit code %d, %s", got.code, got.err)
	}
}

// A message reaches every replica of a function that asks for it, and each
// gives a receipt; a topic that is new works within the rebuild interval.
func TestMessageToEveryReplica(t *testing.T) {
	url, nc := upTopics(t, "--workers", "2")
	client, err := gateway.NewClient(url, "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	const n = 7
	if err := client.Deploy(t.Context(), types.FunctionDeployment{Service: "every", Image: "sheaf/worker",
		Labels:      &map[string]string{"com.openfaas.scale.min": fmt.Sprint(n), "com.openfaas.scale.max": "20"},
		Annotations: &map[string]string{"topic": "news.*", "sheaf.deliver": "all"}}); err != nil {
		t.Fatal(err)
	}
	type result struct {
		Function, Replica, Body, Error string
		OK                             bool
		Rank                           *int
		Receipts                       []result
	}
	var set struct {
		Code    string
		Results []result
	}
	ask := func() {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(100 * time.Millisecond) {
			m, err := nc.Request("news.today", []byte("a b a"), 20*time.Second)
			if err == nil {
				set.Code, set.Results = "", nil
				if err = json.Unmarshal(m.Data, &set); err != nil {
					t.Fatalf("answer is %v %q", m.Header, m.Data)
				}
				if len(set.Results) == 1 && len(set.Results[0].Receipts) == n {
					return
				}
			}
			if time.Since(begun) > time.Minute {
				t.Fatalf("not %d receipts within a minute: %v %+v", n, err, set)
			}
		}
	}
	ask()
	ids := map[string]bool{}
	for i, r := range set.Results[0].Receipts {
		if !r.OK || r.Rank == nil || *r.Rank != i || !strings.Contains(r.Body, "b 1\n") {
			t.Errorf("receipt %d is %+v", i, r)
		}
		ids[r.Replica] = true
	}
	if len(ids) != n || set.Code != "" || !set.Results[0].OK {
		t.Errorf("receipts of %d replicas, %+v", len(ids), set)
	}
	// One that dies gives no receipt, and is named, or is not in the view any
	// more; whoever stays has the message.
	victim := slices.Sorted(func(yield func(string) bool) {
		for id := range ids {
			if !yield(id) {
				return
			}
		}
	})[0]
	if err := client.Kill(t.Context(), "every", victim); err != nil {
		t.Fatal(err)
	}
	m, err := nc.Request("news.today", []byte("a b a"), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	set.Code, set.Results = "", nil
	if err := json.Unmarshal(m.Data, &set); err != nil || len(set.Results) != 1 {
		t.Fatalf("answer is %q", m.Data)
	}
	for _, r := range set.Results[0].Receipts {
		if r.Replica == victim && (r.OK || r.Error == "") || r.Replica != victim && !r.OK {
			t.Errorf("receipt %+v; %s was killed", r, victim)
		}
	}
	if len(set.Results[0].Receipts) < n-1 {
		t.Errorf("%d receipts", len(set.Results[0].Receipts))
	}
}
