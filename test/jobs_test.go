package test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// do calls the front.
func (b *bench) do(method, path, body string, header ...string) answer {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.URL+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	a, err := whole(resp)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func whole(resp *http.Response) (answer, error) {
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(body)}, err
}

const jobsPath = "/function/master/jobs"

// job is what is told of a job.
type job struct {
	ID, State string
	Blocks    struct{ Total, Queued, Running, Done, Failed, Stopped int }
	Attempts  int
	Replicas  int
	Epoch     int
	Redrives  int
	Error     struct{ Code string }
	Result    string
}

func (b *bench) job(a answer) (j job) {
	b.t.Helper()
	if err := json.Unmarshal([]byte(a.body), &j); err != nil {
		b.t.Fatalf("status %d, %v: %s", a.status, err, a.body)
	}
	return j
}

// submit makes a job, which must be accepted.
func (b *bench) submit(query, input string, header ...string) job {
	b.t.Helper()
	a := b.do("POST", jobsPath+"?"+query, input, header...)
	j := b.job(a)
	if a.status != http.StatusAccepted || j.ID == "" || a.header.Get("Location") != jobsPath+"/"+j.ID {
		b.t.Fatalf("submit: status %d, Location %q: %s", a.status, a.header.Get("Location"), a.body)
	}
	return j
}

// ended waits for the end of a job.
func (b *bench) ended(id string) job {
	b.t.Helper()
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		a := b.do("GET", jobsPath+"/"+id, "")
		if a.status == http.StatusOK {
			switch j := b.job(a); j.State {
			case "succeeded", "failed", "cancelled":
				return j
			}
		}
		if time.Since(begun) > time.Minute {
			b.t.Fatalf("job %s has not ended after a minute: %d %s", id, a.status, a.body)
		}
	}
}

func TestJobs(t *testing.T) {
	b := start(t, 3, nil)
	in := text(1, 300_000)
	want := sequential(in)
	j := b.submit("block=4KiB", in)
	if j.Blocks.Total != j.Blocks.Queued+j.Blocks.Running+j.Blocks.Done || j.Blocks.Total < 74 {
		t.Errorf("submitted as %+v", j)
	}
	end := b.ended(j.ID)
	if end.State != "succeeded" || end.Blocks.Done != j.Blocks.Total || end.Blocks.Total != j.Blocks.Total || end.Replicas < 1 || end.Attempts < end.Blocks.Done {
		t.Errorf("ended as %+v", end)
	}
	text := b.do("GET", end.Result, "")
	if text.status != 200 || text.body != want || text.header.Get("Content-Digest") == "" {
		t.Errorf("the result differs from a sequential count: %d %v", text.status, text.header)
	}
	sync := b.count("block=4KiB&output=json", in)
	for _, how := range []answer{b.do("GET", end.Result, "", "Accept", "application/json"), b.do("GET", end.Result+"?output=json", "")} {
		if how.body != sync.body {
			t.Error("the result as JSON differs from a synchronous answer")
		}
	}
	lines := strings.Split(strings.TrimSuffix(b.do("GET", end.Result, "", "Accept", "application/x-ndjson").body, "\n"), "\n")
	if last := lines[len(lines)-1]; len(lines) != end.Blocks.Total+1 || !strings.Contains(last, `"done":true`) {
		t.Errorf("%d lines, the last of which is %s", len(lines), last)
	}
	if events := b.do("GET", end.Result, "", "Accept", "text/event-stream").body; !strings.Contains(events, "event: result\ndata: ") || !strings.HasSuffix(events, "\n\n") {
		t.Errorf("events are %.300s", events)
	}
	if list := b.do("GET", jobsPath+"?state=succeeded", "").body; !strings.Contains(list, j.ID) {
		t.Errorf("the list lacks the job: %s", list)
	}
	for _, id := range []string{"none", "0"} {
		for _, path := range []string{"", "/result", "/events"} {
			if a := b.do("GET", jobsPath+"/"+id+path, ""); a.status != 404 || a.header.Get("Sheaf-Code") != "job_not_found" {
				t.Errorf("no job: %d %s", a.status, a.body)
			}
		}
	}
}

// Bad inputs 53 to 55, and that a queue may bring a call twice.
func TestSameJobTwice(t *testing.T) {
	b := start(t, 2, nil)
	in, other := text(2, 50_000), text(3, 50_000)
	first := b.submit("block=1KiB", in, "Idempotency-Key", "order/17")
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			a := b.do("POST", jobsPath+"?block=1KiB", in, "Idempotency-Key", "order/17")
			if again := b.job(a); a.status != 202 && a.status != 200 || again.ID != first.ID {
				t.Errorf("sent again: %d %s", a.status, a.body)
			}
		})
	}
	wg.Wait()
	for _, query := range []string{"block=1KiB", "block=2KiB"} {
		input := in
		if query == "block=1KiB" {
			input = other
		}
		if a := b.do("POST", jobsPath+"?"+query, input, "Idempotency-Key", "order/17"); a.status != 409 || a.header.Get("Sheaf-Code") != "idempotency_conflict" {
			t.Errorf("another job under the same key: %d %s", a.status, a.body)
		}
	}
	if a := b.do("POST", jobsPath, in, "Idempotency-Key", strings.Repeat("k", 256)); a.status != 400 {
		t.Errorf("a key of 256 bytes: %d %s", a.status, a.body)
	}
	if end := b.ended(first.ID); end.State != "succeeded" || end.Epoch != 1 {
		t.Errorf("ended as %+v", end)
	}
	// A synchronous call with a key is a job, too: it is done once, and answered
	// each time. So is one of OpenFaaS CE's queue, which two gateways have marked.
	for _, header := range [][]string{{"Idempotency-Key", "call-1"}, {"Idempotency-Key", "call-1"}} {
		if a := b.do("POST", "/function/master?block=1KiB", in, header...); a.status != 200 || a.body != sequential(in) || a.header.Get("Sheaf-Job") != "call-1" {
			t.Errorf("call with a key: %d, job %s", a.status, a.header.Get("Sheaf-Job"))
		}
	}
	if end := b.ended("call-1"); end.Epoch != 1 {
		t.Errorf("the call's job is %+v", end)
	}
	direct := b.replicas("master")[0].URL
	for range 2 {
		req, err := http.NewRequestWithContext(t.Context(), "POST", direct+"/", strings.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Add("X-Call-Id", "ce-1")
		req.Header.Add("X-Start-Time", "1")
		req.Header.Add("X-Start-Time", "2")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.Header.Get("Sheaf-Job") != "ce-1" || string(body) != sequential(in) {
			t.Errorf("call of a queue: %v, job %s, %v", resp.Status, resp.Header.Get("Sheaf-Job"), err)
		}
	}
	// One that a gateway numbered only is a plain call.
	if a := b.do("POST", "/function/master", in, "X-Call-Id", "plain"); a.status != 200 || a.header.Get("Sheaf-Job") == "plain" {
		t.Errorf("a plain call: %d, job %s", a.status, a.header.Get("Sheaf-Job"))
	}
	// Asynchronously, through the queue of the stack.
	if a := b.do("POST", "/async-function/master?block=1KiB", in, "X-Call-Id", "async-1"); a.status != 202 {
		t.Fatalf("asynchronous call: %d %s", a.status, a.body)
	}
	if end := b.ended("async-1"); end.State != "succeeded" {
		t.Errorf("the asynchronous call's job is %+v", end)
	}
	if a := b.do("GET", jobsPath+"/async-1/result", ""); a.body != sequential(in) {
		t.Error("the asynchronous call's result differs from a sequential count")
	}
}

// A cancelled job's attempts end at once, in the worker, too.
func TestCancelJob(t *testing.T) {
	b := start(t, 1, nil)
	log := t.TempDir() + "/slow.log"
	b.deploySlow(log)
	j := b.submit("function=slow&block=100", thesisText())
	seen := func(word string) bool {
		got, _ := os.ReadFile(log)
		return strings.Contains(string(got), word)
	}
	wait := func(word string) time.Time {
		t.Helper()
		for begun := time.Now(); !seen(word); time.Sleep(time.Millisecond) {
			if time.Since(begun) > 20*time.Second {
				t.Fatalf("the slow function never said %q", word)
			}
		}
		return time.Now()
	}
	wait("begun")
	begun := time.Now()
	a := b.do("DELETE", jobsPath+"/"+j.ID, "")
	if end := b.job(a); a.status != 200 || end.State != "cancelled" || end.Blocks.Stopped != j.Blocks.Total {
		t.Errorf("cancelled: %d %s", a.status, a.body)
	}
	took := wait("canceled").Sub(begun)
	t.Logf("the worker saw it after %v", took)
	if took > 5*time.Second { // 200 ms, on a machine that does nothing else
		t.Errorf("the worker saw it after %v", took)
	}
	if a := b.do("GET", jobsPath+"/"+j.ID+"/result", ""); a.status != 409 || a.header.Get("Sheaf-Code") != "job_cancelled" {
		t.Errorf("result of a cancelled job: %d %s", a.status, a.body)
	}
}

// Goal 12: what is told of a running job sums to its blocks and does not go
// back, and its events end with its end.
func TestProgressOfJobs(t *testing.T) {
	b := start(t, 2, nil)
	in := text(5, 4<<20)
	j := b.submit("block=2KiB", in)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events := make(chan string, 1)
	go func() {
		defer close(events)
		req, err := http.NewRequestWithContext(ctx, "GET", b.URL+jobsPath+"/"+j.ID+"/events", nil)
		if err != nil {
			return
		}
		resp, err := client.Do(req)
		if err != nil {
			return
		}
		defer resp.Body.Close()
		all, _ := io.ReadAll(resp.Body)
		events <- string(all)
	}()
	last, polls := job{}, 0
	for last.State != "succeeded" {
		now := b.job(b.do("GET", jobsPath+"/"+j.ID, ""))
		if sum := now.Blocks.Queued + now.Blocks.Running + now.Blocks.Done + now.Blocks.Failed + now.Blocks.Stopped; sum != j.Blocks.Total || now.Blocks.Total != sum {
			t.Fatalf("blocks do not sum to %d: %+v", j.Blocks.Total, now)
		}
		if now.Blocks.Done < last.Blocks.Done || now.Attempts < last.Attempts || now.Epoch < last.Epoch {
			t.Fatalf("went from %+v to %+v", last, now)
		}
		if now.State == "failed" || now.State == "cancelled" {
			t.Fatalf("ended as %+v", now)
		}
		last = now
		polls++
	}
	all := <-events
	if n := strings.Count(all, "event: progress\n"); n < 1 || strings.Count(all, "event: succeeded\n") != 1 || !strings.HasSuffix(all, "\n\n") {
		t.Errorf("%d progress events in %.400s", n, all)
	}
	if a := b.do("GET", last.Result, ""); a.body != sequential(in) {
		t.Error("the result differs from a sequential count")
	}
	t.Logf("%d polls of %d blocks", polls, last.Blocks.Total)
}
