package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
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

// poisoned makes an input of lines that are a block each with block=6, some of
// which a worker refuses, and its count without those.
func poisoned(n int, bad ...int) (input, left string) {
	var in, out strings.Builder
	for i := range n {
		line := fmt.Sprintf("w%d x\n", i%10)
		if slices.Contains(bad, i) {
			line = "poison\n"
		} else {
			out.WriteString(line)
		}
		in.WriteString(line)
	}
	return in.String(), sequential(out.String())
}

// Goals 8, 10 and 27: of 100 blocks 7 fail. What is tolerated decides over the
// status, not over the body; and a redrive runs those 7 again and no other.
func TestToleratedAndRedriven(t *testing.T) {
	b := start(t, 1, nil)
	log := b.logged(2, 0)
	poison := log + ".held.poison"
	if err := os.WriteFile(poison, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bad := []int{3, 20, 21, 50, 77, 98, 99}
	in, left := poisoned(100, bad...)
	named := func(of string) bool { return of == "3,20,21,50,77,98,99" }
	type outcome struct {
		Missing []struct {
			Block, Bytes, Attempts int
			Offset                 int64
			Error                  string
		}
		Answer json.RawMessage
	}
	for _, way := range []string{"synchronous", "job"} {
		ask := func(tolerate, accept string) answer {
			query := "?function=logged&block=6"
			if tolerate != "" {
				query += "&tolerate=" + url.QueryEscape(tolerate)
			}
			if way == "synchronous" {
				return b.do("POST", "/function/master"+query, in, "Accept", accept)
			}
			j := b.job(b.do("POST", jobsPath+query, in))
			if end := b.ended(j.ID); end.Blocks.Total != 100 || end.Blocks.Done != 93 || end.Blocks.Failed != 7 {
				t.Errorf("ended as %+v", end)
			}
			return b.do("GET", jobsPath+"/"+j.ID+"/result", "", "Accept", accept)
		}
		if a := ask("", "text/plain"); a.status != 424 || a.header.Get("Sheaf-Code") != "blocks_failed" || !strings.Contains(a.body, "this block is poison") {
			t.Errorf("%s, nothing tolerated: %d %s", way, a.status, a.body)
		}
		for _, c := range []struct {
			tolerate string
			status   int
		}{{"10", 200}, {"7", 200}, {"7%", 200}, {"6", 424}, {"5", 424}, {"6.9%", 424}, {"0", 424}} {
			if a := ask(c.tolerate, "text/plain"); a.status != c.status || a.body != left || !named(a.header.Get("Sheaf-Missing")) {
				t.Errorf("%s, tolerate=%s: %d %.300q, missing %s", way, c.tolerate, a.status, a.body, a.header.Get("Sheaf-Missing"))
			}
		}
		var both []string
		for _, tolerate := range []string{"10", "5"} {
			a := ask(tolerate, "application/json")
			var o outcome
			if err := json.Unmarshal([]byte(a.body), &o); err != nil || len(o.Missing) != 7 || len(o.Answer) == 0 {
				t.Fatalf("%s, tolerate=%s: %d %v %s", way, tolerate, a.status, err, a.body)
			}
			for i, m := range o.Missing {
				if m.Block != bad[i] || m.Bytes != 7 || m.Attempts != 1 || !strings.Contains(m.Error, "this block is poison") {
					t.Errorf("%s: missing is %+v", way, m)
				}
			}
			both = append(both, string(o.Answer))
			lines := strings.Split(strings.TrimSpace(ask(tolerate, "application/x-ndjson").body), "\n")
			last := lines[len(lines)-1]
			if len(lines) != 101 || strings.Contains(last, `"done":true`) != (tolerate == "10") || strings.Contains(last, "blocks_failed") != (tolerate == "5") {
				t.Errorf("%s, tolerate=%s: %d lines, the last %s", way, tolerate, len(lines), last)
			}
			events := ask(tolerate, "text/event-stream").body
			if !strings.Contains(events, "event: result\n") || strings.Contains(events, "event: done\n") != (tolerate == "10") || strings.Contains(events, "event: error\n") != (tolerate == "5") {
				t.Errorf("%s, tolerate=%s: events %.500s", way, tolerate, events)
			}
		}
		if both[0] != both[1] {
			t.Errorf("%s: the answers differ: %s and %s", way, both[0], both[1])
		}
	}
	for _, c := range []string{"-1", "101%", "-1%", "x", "5%%", "", "NaN%", "1.5", "1e400%"} {
		if a := b.do("POST", "/function/master?tolerate="+url.QueryEscape(c), in); a.status != 400 && a.status != 422 {
			t.Errorf("tolerate=%s: %d %s", c, a.status, a.body)
		}
	}

	j := b.submit("function=logged&block=6", in)
	if end := b.ended(j.ID); end.State != "failed" || end.Error.Code != "blocks_failed" || end.Blocks.Failed != 7 || end.Blocks.Done != 93 {
		t.Errorf("ended as %+v", end)
	}
	if err := os.Remove(poison); err != nil {
		t.Fatal(err)
	}
	before := runs(t, log)[j.ID]
	if a := b.do("POST", jobsPath+"/"+j.ID+"/redrive", ""); a.status != 202 || b.job(a).Redrives != 1 {
		t.Errorf("redrive: %d %s", a.status, a.body)
	}
	if end := b.ended(j.ID); end.State != "succeeded" || end.Blocks.Done != 100 {
		t.Errorf("after the redrive: %+v", end)
	}
	if a := b.do("GET", jobsPath+"/"+j.ID+"/result", ""); a.body != sequential(in) {
		t.Error("after the redrive the counts differ from a sequential count")
	}
	for block, n := range runs(t, log)[j.ID] {
		i, _ := strconv.Atoi(block)
		if want := before[block]; slices.Contains(bad, i) && n != want+1 || !slices.Contains(bad, i) && n != want {
			t.Errorf("block %d was run %d times, %d of them before the redrive", i, n, want)
		}
	}
	if a := b.do("POST", jobsPath+"/"+j.ID+"/redrive", ""); a.status != 409 || a.header.Get("Sheaf-Code") != "not_failed" {
		t.Errorf("redrive of a success: %d %s", a.status, a.body)
	}
}

// Goal N15: what there is after a while, what is missing, and the rest: both
// bodies are the whole.
func TestAnswerInParts(t *testing.T) {
	b := start(t, 1, nil)
	log := b.logged(2, 0)
	held := log + ".held"
	if err := os.WriteFile(held, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	in := strings.Repeat("a b\n", 20) + "held\n" + strings.Repeat("c\n", 30)
	lines := "application/x-ndjson"
	part := b.do("POST", jobsPath+"?function=logged&block=4", in, "Prefer", "wait=1", "Accept", lines)
	missing, next := part.header.Get("Sheaf-Missing"), part.header.Get("Link")
	if part.status != 202 || strings.Count(part.body, "\n") != 20 || !strings.HasPrefix(missing, "20") || part.header.Get("Preference-Applied") != "wait=1" {
		t.Fatalf("first part: %d, missing %s, %s", part.status, missing, part.body)
	}
	link, ok := strings.CutSuffix(strings.TrimPrefix(next, "<"), `>; rel="next"`)
	if !ok || !strings.HasSuffix(link, "/result?from=20") {
		t.Fatalf("the link is %s", next)
	}
	if a := b.do("GET", strings.TrimSuffix(link, "?from=20"), "", "Prefer", "wait=0"); a.status != 202 || b.job(a).State != "running" {
		t.Errorf("as text: %d %s", a.status, a.body)
	}
	if err := os.Remove(held); err != nil {
		t.Fatal(err)
	}
	rest := b.do("GET", link, "", "Prefer", "wait=30", "Accept", lines)
	all := b.do("GET", strings.TrimSuffix(link, "?from=20"), "", "Accept", lines)
	if rest.status != 200 || all.status != 200 || part.body+rest.body != all.body {
		t.Errorf("the parts are not the whole:\n%s---\n%s---\n%s", part.body, rest.body, all.body)
	}
	if n := strings.Count(all.body, "\n"); n != 20+1+15+1 {
		t.Errorf("the whole has %d lines", n)
	}
	if a := b.do("GET", link, ""); a.status != 400 {
		t.Errorf("from as text: %d %s", a.status, a.body)
	}
	if a := b.do("GET", link, "", "Prefer", "wait=x"); a.status != 400 {
		t.Errorf("wait=x: %d %s", a.status, a.body)
	}
}

func TestJobRefusals(t *testing.T) {
	b := start(t, 1, map[string]string{"max_job_input": "1000", "max_job_blocks": "100", "max_job_result": "20", "max_queued": "1", "replica_wait": "1s"})
	for _, c := range []struct {
		name, method, path, body string
		status                   int
		code                     string
	}{
		{"too large", "POST", "", strings.Repeat("x\n", 600), 413, "input_too_large"},
		{"too many blocks", "POST", "?block=2", strings.Repeat("x\n", 200), 422, "too_many_blocks"},
		{"bad parameter", "POST", "?block=x", "a", 400, "bad_parameter"},
		{"unknown parameter", "POST", "?blocks=1", "a", 400, "bad_parameter"},
		{"malformed", "POST", "?split=json", "{", 422, "malformed_input"},
		{"own worker", "POST", "?function=master", "a", 422, "depth_exceeded"},
		{"method", "PUT", "", "", 405, "method_not_allowed"},
		{"method of a job", "POST", "/id", "", 405, "method_not_allowed"},
		{"nothing there", "GET", "/id/more", "", 404, "not_found"},
		{"dots", "GET", "/..%2f..", "", 400, "bad_job_id"},
		{"NUL", "GET", "/a%00", "", 400, "bad_job_id"},
		{"long", "GET", "/" + strings.Repeat("a", 65), "", 400, "bad_job_id"},
		{"slash", "GET", "/a%2fb/result", "", 404, "not_found"},
		{"state", "GET", "?state=done", "", 422, "unknown_state"},
		{"limit", "GET", "?limit=0", "", 422, "out_of_range"},
		{"forgotten", "DELETE", "/none", "", 404, "job_not_found"},
		{"forgotten redrive", "POST", "/none/redrive", "", 404, "job_not_found"},
	} {
		if a := b.do(c.method, jobsPath+c.path, c.body); a.status != c.status || a.header.Get("Sheaf-Code") != c.code || !strings.Contains(a.body, `"detail"`) {
			t.Errorf("%s: %d %s, want %d %s", c.name, a.status, a.body, c.status, c.code)
		}
	}
	j := b.submit("block=5", "a1 b1 c1 d1 e1 f1 g1\n")
	if end := b.ended(j.ID); end.State != "failed" || end.Error.Code != "result_too_large" {
		t.Errorf("a result over the limit: %+v", end)
	}
	if a := b.do("GET", jobsPath+"/"+j.ID+"/result", ""); a.status != 413 || a.header.Get("Sheaf-Code") != "result_too_large" {
		t.Errorf("its result: %d %s", a.status, a.body)
	}
	b.scale(0)
	first := b.submit("", "a")
	if a := b.do("POST", jobsPath, "b"); a.status != 429 || a.header.Get("Sheaf-Code") != "too_many_jobs" || a.header.Get("Retry-After") == "" {
		t.Errorf("a second one: %d %s", a.status, a.body)
	}
	if a := b.do("DELETE", jobsPath+"/"+first.ID, ""); a.status != 200 {
		t.Errorf("cancel: %d %s", a.status, a.body)
	}
	b.StopNATS()
	for _, a := range []answer{b.do("POST", jobsPath, "a"), b.do("GET", jobsPath, ""), b.do("GET", first.Result, "")} {
		if a.status != 503 || a.header.Get("Sheaf-Code") != "store_unavailable" {
			t.Errorf("without NATS: %d %s", a.status, a.body)
		}
	}
}

func TestJobCommands(t *testing.T) {
	_, at := startUp(t, "--port", "0", "--workers", "2")
	in := text(9, 30_000)
	path, want := file(t, in), sequential(in)
	sheaf := func(code int, args ...string) said {
		t.Helper()
		got := cli(t, in, append(args, "--gateway", at)...)
		if got.code != code {
			t.Errorf("sheaf %s: exit code %d, want %d: %s%s", strings.Join(args, " "), got.code, code, got.out, got.err)
		}
		return got
	}
	id := strings.TrimSpace(sheaf(0, "submit", path, "--block", "1KiB", "--key", "monday").out)
	if id != "monday" {
		t.Errorf("the ID is %q", id)
	}
	if again := sheaf(0, "submit", path, "--block", "1KiB", "--key", "monday"); strings.TrimSpace(again.out) != id {
		t.Errorf("sent again: %+v", again)
	}
	if other := sheaf(1, "submit", path, "--block", "2KiB", "--key", "monday"); !strings.Contains(other.err, "idempotency_conflict") || other.out != "" {
		t.Errorf("another job of that name: %+v", other)
	}
	if got := sheaf(0, "result", "--wait", id); got.out != want {
		t.Error("the result differs from a sequential count")
	}
	if got := sheaf(0, "result", id, "--output", "json"); !json.Valid([]byte(got.out)) {
		t.Errorf("as JSON: %.200s", got.out)
	}
	if got := sheaf(0, "submit", "-", "--wait", "--split", "bytes", "--block", "999"); got.out != want || !strings.Contains(got.err, "is stored") {
		t.Errorf("from standard input, waited for: %.300s", got.err)
	}
	for _, says := range []string{"state       succeeded", "blocks      30: 30 done", "kept until  20"} {
		if got := sheaf(0, "status", id); !strings.Contains(got.out, says) {
			t.Errorf("the status does not say %q: %s", says, got.out)
		}
	}
	var j job
	if got := sheaf(0, "status", id, "--output", "json"); json.Unmarshal([]byte(got.out), &j) != nil || j.State != "succeeded" {
		t.Errorf("the status as JSON: %s", got.out)
	}
	if got := sheaf(0, "jobs"); !strings.HasPrefix(got.out, "JOB ") || strings.Count(got.out, "succeeded") != 2 {
		t.Errorf("jobs: %s", got.out)
	}
	var list []job
	if got := sheaf(0, "jobs", "--state", "failed", "--output", "json"); json.Unmarshal([]byte(got.out), &list) != nil || len(list) != 0 {
		t.Errorf("failed jobs: %s", got.out)
	}
	if got := sheaf(0, "cancel", id); !strings.Contains(got.out, "succeeded") {
		t.Errorf("cancel of a success: %s", got.out)
	}
	if got := sheaf(1, "redrive", id); !strings.Contains(got.err, "not_failed") {
		t.Errorf("redrive of a success: %s", got.err)
	}
	if got := sheaf(1, "result", "none"); !strings.Contains(got.err, "job_not_found") || got.out != "" {
		t.Errorf("the result of no job: %+v", got)
	}
	for _, args := range [][]string{{"submit"}, {"submit", path, path}, {"submit", path, "--block", "x"}, {"submit", path, "--split", "x"}, {"submit", path, "--workers", "0"},
		{"status"}, {"result"}, {"cancel", "a", "b"}, {"jobs", "x"}, {"jobs", "--state", "x"}, {"jobs", "--limit", "0"}, {"status", "x", "--output", "xml"}} {
		if got := sheaf(2, args...); got.out != "" || !strings.HasPrefix(got.err, "sheaf: ") {
			t.Errorf("sheaf %v: %+v", args, got)
		}
	}
	if got := cli(t, "", "submit", path, "--gateway", "http://127.0.0.1:1"); got.code != 1 || strings.Count(got.err, "sending it again") != 4 {
		t.Errorf("nobody there: %+v", got)
	}
	if got := sheaf(1, "submit", "/none"); !strings.Contains(got.err, "no such file") {
		t.Errorf("no file: %+v", got)
	}
}

// Bad input 63: no room for what is sent is 507, and the next job that fits is
// taken.
func TestStoreOfJobsIsFull(t *testing.T) {
	b := start(t, 1, map[string]string{"job_input_bytes": "1048576"})
	if a := b.do("POST", jobsPath, text(1, 3<<20)); a.status != 507 || a.header.Get("Sheaf-Code") != "store_full" {
		t.Errorf("3 MiB into 1 MiB: %d %s", a.status, a.body)
	}
	in := text(2, 100_000)
	if end := b.ended(b.submit("", in).ID); end.State != "succeeded" {
		t.Errorf("afterwards: %+v", end)
	}
}
