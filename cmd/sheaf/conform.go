package main

// conform.go prints what is promised on each way to a function, and runs the
// check that shows it.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/connector"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/worker"
)

// witnessImage is a function that notes each of its runs. Only the stack of
// conform has it.
const witnessImage = "sheaf/witness"

// Topics of the witness: one that no stream holds, and one that a stream does.
const (
	coreTopic = "conform.core"
	keptTopic = "conform.kept"
)

// witness appends each block that it is called with to the file that its
// environment names. One that begins with "die" ends its process, the first
// time.
func witness(_ context.Context, b sheaf.Block) ([]byte, error) {
	path := os.Getenv("runs")
	before, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	line := append(bytes.Clone(b.Data), '\n')
	if _, err := f.Write(line); err != nil {
		return nil, err
	}
	if bytes.HasPrefix(line, []byte("die")) && !bytes.Contains(before, line) {
		os.Exit(1)
	}
	return append([]byte("did "), b.Data...), nil
}

// A promise is what may be relied on, and the check that shows it.
type promise struct {
	Path    string `json:"path"`
	Promise string `json:"promise"`
	Effects string `json:"effects"` // how often what it does takes effect
	Check   string `json:"check"`
	Result  string `json:"result"` // one of the following
	Detail  string `json:"detail"`

	run   func(context.Context, *conformance) (string, error)
	ours  bool   // it can be run on a stack of conform's own only
	never string // why it cannot be run at all here
}

// What came of a check.
const (
	resultHolds  = "holds"
	resultBroken = "BROKEN"
	resultNone   = "not checked"
)

// notHere says that what a check needs is not at the gateway.
type notHere struct{ why string }

func (n notHere) Error() string { return n.why }

// promises lists them. docs/RELIABILITY.md has the same table.
func promises() []*promise {
	const once, most, least = "exactly once", "at most once", "at least once"
	return []*promise{
		{Path: "plain call, route direct", Promise: "the answer is the sequential one, or an error that names what is missing; blocks may run again", Effects: most + " (answer), " + least + " (blocks)",
			Check: "plain-direct", run: plainBy("direct")},
		{Path: "plain call, route gateway", Promise: "as above", Effects: most + " (answer), " + least + " (blocks)", Check: "plain-gateway", run: plainBy("gateway")},
		{Path: "plain call, route topic", Promise: "as above", Effects: most + " (answer), " + least + " (blocks)", Check: "plain-topic", run: plainBy("topic")},
		{Path: "asynchronous call", Promise: "202 means stored; a run that its replica dies in is made again; the callback comes until it is taken, each time with the same ID and body", Effects: least,
			Check: "async-runs-again", run: asyncRunsAgain, ours: true},
		{Path: "asynchronous call", Promise: "the same X-Call-Id is the same call", Effects: once + " per ID, unless a run fails", Check: "async-same-id", run: asyncSameID, ours: true},
		{Path: "asynchronous call of a master", Promise: "it is a durable job under its X-Call-Id", Effects: once, Check: "async-is-a-job", run: asyncIsAJob},
		{Path: "durable job", Promise: "the same key and input are one job, another input is refused; the answer is the sequential one, and stays", Effects: once, Check: "job-same-key", run: jobSameKey},
		{Path: "durable job", Promise: "it goes on when its master, its workers and NATS end; each block's result counts once", Effects: once + " (results), " + least + " (blocks)", Check: "job-survives", run: jobSurvives, ours: true},
		{Path: "topic message, core NATS", Promise: "it calls each function that is bound; nobody there means that nothing is kept, and who asked is told", Effects: most, Check: "topic-core", run: topicCore, ours: true},
		{Path: "topic message, JetStream", Promise: "it waits while no connector runs, and is worked on again when its function dies", Effects: least, Check: "topic-jetstream", run: topicJetStream, ours: true},
		{Path: "topic message, NATS Streaming", Promise: "as JetStream; work longer than ack_wait may run twice", Effects: least, Check: "topic-stan",
			never: "the command has no NATS Streaming server in it; go test ./broker -run TestBus runs the checks on a real one"},
		{Path: "rank, /-/K/", Promise: "the call reaches the replica of rank K, and no other; a rank that is not there is refused", Effects: most, Check: "rank-reaches", run: rankReaches},
		{Path: "rank, /-/K/", Promise: "a call whose replica dies is not made again", Effects: most, Check: "rank-once", run: rankOnce, ours: true},
	}
}

// conformance is a run of the checks.
type conformance struct {
	url    string
	own    *stack // nil at a gateway of somebody else
	client *http.Client
	auth   local.Auth
	runs   string // file of the witness
	rnd    *rand.Rand
}

// conform is the command.
func conform(ctx context.Context, args []string, s std) error {
	f := flags(s, "conform", "conform [FLAGS]", "sheaf conform --gateway http://127.0.0.1:8080")
	url := f.String("gateway", "", "`URL` of a gateway with the functions master and worker; without it a stack is started, on which more can be checked")
	output := f.String("output", "text", "`form`: text, json or markdown")
	verbose := f.Bool("verbose", false, "log what happens")
	rest, err := parse(f, args)
	if err == nil && len(rest) > 0 {
		err = usagef("conform takes no argument, and got %q", rest[0])
	}
	if err == nil {
		err = oneOf("output", *output, "text", "json", "markdown")
	}
	if err != nil {
		return err
	}
	c := &conformance{url: strings.TrimSuffix(*url, "/"), rnd: rand.New(rand.NewPCG(1, 1)),
		client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableCompression: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
	defer c.client.CloseIdleConnections()
	if c.url == "" {
		end, err := c.start(ctx, s, *verbose)
		if err != nil {
			return err
		}
		defer end()
	} else if _, _, err := c.do(ctx, http.MethodGet, "/healthz", ""); err != nil {
		return fmt.Errorf("gateway %s cannot be reached: %w", c.url, err)
	}
	all := promises()
	count := map[string]int{}
	for _, p := range all {
		p.check(ctx, c)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		count[p.Result]++
		if *output == "text" {
			if _, err := fmt.Fprintf(s.out, "%-11s  %s: %s\n             %s; check %s: %s\n", p.Result, p.Path, p.Promise, p.Effects, p.Check, p.Detail); err != nil {
				return err
			}
		}
	}
	switch *output {
	case "text":
		_, err = fmt.Fprintf(s.out, "\n%d hold, %d broken, %d not checked\n", count[resultHolds], count[resultBroken], count[resultNone])
	case "json":
		e := json.NewEncoder(s.out)
		e.SetEscapeHTML(false)
		err = e.Encode(map[string]any{"version": version, "gateway": c.url, "own_stack": c.own != nil, "checks": all,
			"hold": count[resultHolds], "broken": count[resultBroken], "not_checked": count[resultNone]})
	case "markdown":
		err = markdown(s.out, all)
	}
	switch {
	case err != nil:
		return err
	case count[resultBroken] > 0:
		return fmt.Errorf("%s broken", promisesBroken(count[resultBroken]))
	case count[resultHolds] == 0:
		return fmt.Errorf("nothing could be checked at %s; deploy master and worker there", c.url)
	}
	return nil
}

func promisesBroken(n int) string {
	if n == 1 {
		return "1 promise is"
	}
	return fmt.Sprintf("%d promises are", n)
}

func markdown(out io.Writer, all []*promise) error {
	var b strings.Builder
	b.WriteString("| path | promise | effects | check | result |\n|---|---|---|---|---|\n")
	for _, p := range all {
		fmt.Fprintf(&b, "| %s | %s | %s | `%s` | %s: %s |\n", p.Path, p.Promise, p.Effects, p.Check, p.Result, p.Detail)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// check runs the check of a promise, if it can be.
func (p *promise) check(ctx context.Context, c *conformance) {
	switch {
	case p.never != "":
		p.Result, p.Detail = resultNone, p.never
		return
	case p.ours && c.own == nil:
		p.Result, p.Detail = resultNone, "somebody's gateway: nothing may be killed there, and nobody counts runs; sheaf conform without --gateway checks it"
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("the check was not over within 2 minutes"))
	defer cancel()
	detail, err := p.run(ctx, c)
	var absent notHere
	switch {
	case errors.As(err, &absent):
		p.Result, p.Detail = resultNone, absent.why
	case err != nil && errors.Is(err, ctx.Err()) && ctx.Err() != nil:
		p.Result, p.Detail = resultBroken, context.Cause(ctx).Error()
	case err != nil:
		p.Result, p.Detail = resultBroken, err.Error()
	default:
		p.Result, p.Detail = resultHolds, detail
	}
}

// start starts a stack with the witness.
func (c *conformance) start(ctx context.Context, s std, verbose bool) (end func(), err error) {
	dir, err := os.MkdirTemp("", "sheaf-conform-")
	if err != nil {
		return nil, err
	}
	c.runs = filepath.Join(dir, "runs")
	known := command("")
	cfg := local.Config{Command: func(image string) ([]string, error) {
		if image == witnessImage {
			self, err := os.Executable()
			return []string{self, functionCommand, "witness"}, err
		}
		return known(image)
	}}
	cfg.Async.Retry.MinWait, cfg.Async.CallbackMinWait = 50*time.Millisecond, 50*time.Millisecond
	st, err := start(ctx, cfg, false, 4, s, verbose)
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	c.own, c.url = st, st.URL
	end = func() { st.Close(); _ = os.RemoveAll(dir) }
	err = st.warm(ctx)
	if err == nil {
		err = st.Client().Scale(ctx, "master", 2)
	}
	if err == nil {
		err = st.Client().Deploy(ctx, types.FunctionDeployment{Service: "witness", Image: witnessImage,
			Labels: &map[string]string{local.LabelMin: "3", local.LabelMax: "3"}, EnvVars: map[string]string{"runs": c.runs},
			Annotations: &map[string]string{connector.AnnotationTopic: coreTopic + "," + keptTopic}})
	}
	if err == nil {
		err = c.await(ctx, "replicas", func() (bool, error) {
			return len(c.replicas("witness")) == 3 && len(c.replicas("master")) == 2, nil
		})
	}
	if err != nil {
		end()
		return nil, err
	}
	return end, nil
}

// replicas are the ready ones of a function of our own stack, by rank.
func (c *conformance) replicas(name string) []sheaf.Replica {
	for _, r := range c.own.Registry.Records() {
		if r.Function == name+"."+local.Namespace {
			return r.View().Replicas
		}
	}
	return nil
}

// await waits until ok.
func (c *conformance) await(ctx context.Context, what string, ok func() (bool, error)) error {
	for {
		yes, err := ok()
		if yes || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// times is how often the witness ran a body.
func (c *conformance) times(body string) (int, error) {
	all, err := os.ReadFile(c.runs)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(all)) {
		if line == body+"\n" {
			n++
		}
	}
	return n, nil
}

// do makes a request and reads its whole answer.
func (c *conformance) do(ctx context.Context, method, path, body string, header ...string) (*http.Response, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, strings.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err == nil && resp.StatusCode == http.StatusNotFound && resp.Header.Get("Sheaf-Code") != "no_such_rank" && strings.HasPrefix(path, "/function/") && !strings.Contains(path, "/jobs/") {
		return nil, "", notHere{fmt.Sprintf("%s answers 404: %s", path, cutText(string(answer)))}
	}
	return resp, string(answer), err
}

func cutText(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return s[:min(len(s), 200)]
}

// input makes n bytes of words, and what one process counts in them.
func (c *conformance) input(n int) (text, want string, err error) {
	var b strings.Builder
	for b.Len() < n {
		fmt.Fprintf(&b, "w%d", int(c.rnd.ExpFloat64()*200))
		b.WriteByte(" \n"[c.rnd.IntN(8)/7])
	}
	text = b.String()[:n]
	result, err := wordcount.Count(context.Background(), sheaf.Block{Data: []byte(text)})
	if err != nil {
		return "", "", err
	}
	var counts wordcount.Counts
	if err := counts.Add(sheaf.Result{Data: result}); err != nil {
		return "", "", err
	}
	var out strings.Builder
	err = counts.WriteText(&out)
	return text, out.String(), err
}

// killing kills a worker each 40 ms until the function that it returns is
// called, which tells how many.
func (c *conformance) killing(ctx context.Context) (stop func() int) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var n int
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(40 * time.Millisecond):
			}
			if rs := c.replicas("worker"); len(rs) > 1 && c.own.Client().Kill(ctx, "worker", rs[n%len(rs)].ID) == nil {
				n++
			}
		}
	})
	return func() int { cancel(); wg.Wait(); return n }
}

// plainBy compares answers with what one process counts, while workers die.
func plainBy(route string) func(context.Context, *conformance) (string, error) {
	return func(ctx context.Context, c *conformance) (string, error) {
		stop := func() int { return 0 }
		if c.own != nil {
			stop = c.killing(ctx)
		}
		defer func() { stop() }()
		const calls = 6
		right := 0
		for begun, n := time.Now(), 0; n < calls || c.own != nil && time.Since(begun) < time.Second; n++ {
			text, want, err := c.input(200_000 + n)
			if err != nil {
				return "", err
			}
			resp, got, err := c.do(ctx, http.MethodPost, "/function/master?block=1KiB&route="+route, text)
			switch {
			case err != nil:
				return "", err
			case resp.StatusCode == http.StatusUnprocessableEntity && strings.Contains(got, route):
				return "", notHere{"the master there has no route " + route + ": " + cutText(got)}
			case resp.StatusCode == http.StatusFailedDependency && c.own == nil && strings.Contains(got, nats.ErrNoResponders.Error()):
				return "", notHere{"no connector takes blocks there"}
			case resp.StatusCode == http.StatusFailedDependency && c.own != nil: // it names the blocks: that is promised, too
				if !strings.Contains(got, `"missing"`) {
					return "", fmt.Errorf("an error that does not say what is missing: %s", cutText(got))
				}
			case resp.StatusCode != http.StatusOK:
				return "", fmt.Errorf("a call was answered %s: %s", resp.Status, cutText(got))
			case got != want:
				return "", fmt.Errorf("an answer differs from what one process counts, at byte %d", differ(got, want))
			default:
				right++
			}
		}
		if right == 0 {
			return "", errors.New("no call was answered whole")
		}
		if c.own == nil {
			return "answers are those of one process (nobody was killed)", nil
		}
		end := stop()
		stop = func() int { return 0 }
		if end == 0 {
			return "", errors.New("no worker could be killed: the check shows nothing")
		}
		return "while workers were killed, answers were those of one process", nil
	}
}

func differ(a, b string) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// taker takes callbacks: it refuses the first, and keeps what came.
type taker struct {
	*httptest.Server
	mu   sync.Mutex // guards came
	came []string   // ID and body
}

func takeCallbacks() *taker {
	t := &taker{}
	t.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		t.came = append(t.came, r.Header.Get("X-Call-Id")+" "+r.Header.Get("X-Function-Status")+" "+string(body))
		if len(t.came) == 1 {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	return t
}

func (t *taker) calls() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.came)
}

func asyncRunsAgain(ctx context.Context, c *conformance) (string, error) {
	t := takeCallbacks()
	defer t.Close()
	const id, body = "conform-die", "die asynchronously"
	resp, got, err := c.do(ctx, http.MethodPost, "/async-function/witness", body, "X-Call-Id", id, "X-Callback-Url", t.URL)
	if err != nil || resp.StatusCode != http.StatusAccepted {
		return "", fmt.Errorf("the call was not accepted: %s (%w)", cutText(got), err)
	}
	if err := c.await(ctx, "two callbacks", func() (bool, error) { return len(t.calls()) >= 2, nil }); err != nil {
		return "", err
	}
	n, err := c.times(body)
	if err != nil || n != 2 {
		return "", fmt.Errorf("it ran %d times, and should have died once and run again (%w)", n, err)
	}
	for _, came := range t.calls() {
		if came != id+" 200 did "+body {
			return "", fmt.Errorf("a callback is %q", cutText(came))
		}
	}
	return "the replica died in the first run, the second one did it; the first callback was refused, the second was the same", nil
}

func asyncSameID(ctx context.Context, c *conformance) (string, error) {
	const id, body = "conform-twice", "asynchronously, once"
	for range 5 {
		resp, got, err := c.do(ctx, http.MethodPost, "/async-function/witness", body, "X-Call-Id", id)
		if err != nil || resp.StatusCode != http.StatusAccepted {
			return "", fmt.Errorf("the call was not accepted: %s (%w)", cutText(got), err)
		}
	}
	if err := c.await(ctx, "the call's end", func() (bool, error) {
		_, got, err := c.do(ctx, http.MethodGet, "/async-function/witness/-/"+id, "")
		return strings.Contains(got, `"succeeded"`), err
	}); err != nil {
		return "", err
	}
	time.Sleep(300 * time.Millisecond) // for a second run, were there one
	if n, err := c.times(body); err != nil || n != 1 {
		return "", fmt.Errorf("it ran %d times (%w)", n, err)
	}
	resp, got, err := c.do(ctx, http.MethodPost, "/async-function/witness", "something else", "X-Call-Id", id)
	if err != nil || resp.StatusCode != http.StatusConflict {
		return "", fmt.Errorf("another call under the same ID was not refused: %s (%w)", cutText(got), err)
	}
	return "sent 5 times, it ran once; another body under its ID was refused with 409", nil
}

// key is a name that nobody has used before.
func key(what string) string {
	return "conform-" + what + "-" + strconv.FormatInt(time.Now().UnixNano(), 36)
}

// ended waits for the end of a job, and compares its result, twice.
func (c *conformance) ended(ctx context.Context, id, want string) error {
	var told struct {
		State  string
		Blocks struct{ Total, Done int }
	}
	if err := c.await(ctx, "job "+id, func() (bool, error) {
		resp, got, err := c.do(ctx, http.MethodGet, "/function/master/jobs/"+id, "")
		if err != nil || resp.StatusCode != http.StatusOK {
			return false, nil // a master that dies, or does not know of it yet; the time is bounded
		}
		if err := json.Unmarshal([]byte(got), &told); err != nil {
			return false, fmt.Errorf("job %s: %w: %s", id, err, cutText(got))
		}
		if told.State == "failed" || told.State == "cancelled" {
			return false, fmt.Errorf("job %s: %s", id, cutText(got))
		}
		return told.State == "succeeded", nil
	}); err != nil {
		return err
	}
	if told.Blocks.Done != told.Blocks.Total || told.Blocks.Total == 0 {
		return fmt.Errorf("job %s succeeded with %d of %d blocks", id, told.Blocks.Done, told.Blocks.Total)
	}
	for range 2 {
		resp, got, err := c.do(ctx, http.MethodGet, "/function/master/jobs/"+id+"/result", "")
		if err != nil || resp.StatusCode != http.StatusOK || got != want {
			return fmt.Errorf("the result of job %s differs from what one process counts, at byte %d (%w)", id, differ(got, want), err)
		}
	}
	return nil
}

// submitted reads whether a job was accepted.
func submitted(resp *http.Response, got string) error {
	switch {
	case resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Sheaf-Code") == "store_unavailable",
		resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(got, "store_unavailable"):
		return notHere{"there is no JetStream at the gateway: " + cutText(got)}
	case resp.StatusCode != http.StatusAccepted && resp.StatusCode != http.StatusOK:
		return fmt.Errorf("the job was answered %s: %s", resp.Status, cutText(got))
	}
	return nil
}

func asyncIsAJob(ctx context.Context, c *conformance) (string, error) {
	text, want, err := c.input(50_000)
	if err != nil {
		return "", err
	}
	// The master must be there, and must keep jobs: a queue takes calls of any.
	resp, got, err := c.do(ctx, http.MethodGet, "/function/master/jobs?limit=1", "")
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", notHere{fmt.Sprintf("the master there keeps no jobs: %s: %s", resp.Status, cutText(got))}
	}
	id := key("async")
	resp, got, err = c.do(ctx, http.MethodPost, "/async-function/master?block=1KiB", text, "X-Call-Id", id)
	if err != nil {
		return "", err
	}
	if resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusNotImplemented {
		return "", notHere{"the gateway takes no asynchronous calls: " + resp.Status}
	}
	if resp.StatusCode != http.StatusAccepted {
		return "", fmt.Errorf("the call was answered %s: %s", resp.Status, cutText(got))
	}
	if own := resp.Header.Get("X-Call-Id"); own != "" {
		id = own // some gateways make their own
	}
	return "its result is that of one process, and can be read by its ID", c.ended(ctx, id, want)
}

func jobSameKey(ctx context.Context, c *conformance) (string, error) {
	text, want, err := c.input(50_000)
	if err != nil {
		return "", err
	}
	id := key("job")
	for range 5 {
		resp, got, err := c.do(ctx, http.MethodPost, "/function/master/jobs?block=1KiB", text, "Idempotency-Key", id)
		if err != nil {
			return "", err
		}
		if err := submitted(resp, got); err != nil {
			return "", err
		}
		var told struct{ ID string }
		if err := json.Unmarshal([]byte(got), &told); err != nil || told.ID != id {
			return "", fmt.Errorf("the job is %q, and should be %q (%w)", told.ID, id, err)
		}
	}
	resp, got, err := c.do(ctx, http.MethodPost, "/function/master/jobs?block=1KiB", text+"!", "Idempotency-Key", id)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusConflict {
		return "", fmt.Errorf("another input under the same key was answered %s: %s", resp.Status, cutText(got))
	}
	return "sent 5 times, it was one job; another input was refused with 409; its result, read twice, is that of one process", c.ended(ctx, id, want)
}

func jobSurvives(ctx context.Context, c *conformance) (string, error) {
	for size := 2_000_000; ; size *= 2 {
		epoch, err := c.survive(ctx, size)
		if err != nil {
			return "", err
		}
		if epoch > 1 { // it was another's in the end
			return "all masters and a worker were killed, NATS ended and came back: the result is that of one process", nil
		}
		if size > 16_000_000 {
			return "", errors.New("each job was over before its master could be killed: the check shows nothing")
		}
	}
}

// survive kills what runs a job, and returns how many masters had it.
func (c *conformance) survive(ctx context.Context, size int) (epoch int, err error) {
	text, want, err := c.input(size)
	if err != nil {
		return 0, err
	}
	id := key("survives")
	resp, got, err := c.do(ctx, http.MethodPost, "/function/master/jobs?block=1KiB", text, "Idempotency-Key", id)
	if err != nil {
		return 0, err
	}
	if err := submitted(resp, got); err != nil {
		return 0, err
	}
	if err := c.await(ctx, "a master with the job", func() (bool, error) {
		_, got, err := c.do(ctx, http.MethodGet, "/function/master/jobs/"+id, "")
		return !strings.Contains(got, `"queued",`), err
	}); err != nil {
		return 0, err
	}
	for _, r := range c.replicas("master") {
		_ = c.own.Client().Kill(ctx, "master", r.ID) // it may have gone; the epoch tells
	}
	if rs := c.replicas("worker"); len(rs) > 0 {
		_ = c.own.Client().Kill(ctx, "worker", rs[0].ID)
	}
	c.own.StopNATS()
	time.Sleep(200 * time.Millisecond)
	if err := c.own.StartNATS(); err != nil {
		return 0, err
	}
	if err := c.ended(ctx, id, want); err != nil {
		return 0, err
	}
	var told struct{ Epoch int }
	_, got, err = c.do(ctx, http.MethodGet, "/function/master/jobs/"+id, "")
	if err != nil || json.Unmarshal([]byte(got), &told) != nil || told.Epoch < 1 {
		return 0, fmt.Errorf("what is told of the job is %s (%w)", cutText(got), err)
	}
	return told.Epoch, nil
}

// bus connects to our own NATS as the connector does, for streams.
func (c *conformance) bus(ctx context.Context) (nc *nats.Conn, js jetstream.JetStream, err error) {
	if nc, err = broker.Connect(c.own.NATS, broker.Options{Name: "sheaf conform", Credentials: c.own.ConnectorCreds}); err != nil {
		return nil, nil, err
	}
	if js, err = jetstream.New(nc); err != nil {
		nc.Close()
		return nil, nil, err
	}
	return nc, js, c.await(ctx, "NATS", func() (bool, error) { return nc.IsConnected(), nil })
}

// away ends the connector, and returns what starts another one.
func (c *conformance) away() (back func() error) {
	c.own.stop()
	c.own.wg.Wait()
	c.own.nats.Close()
	c.own.stop = nil
	return func() error { return c.own.connect(c.auth, logger(io.Discard, false)) }
}

// listens waits until a message on a topic runs the witness.
func (c *conformance) listens(ctx context.Context, nc *nats.Conn, topic string) error {
	var n atomic.Int64
	return c.await(ctx, "topic "+topic, func() (bool, error) {
		body := fmt.Sprintf("is %s there %d", topic, n.Add(1))
		if err := nc.Publish(topic, []byte(body)); err != nil {
			return false, err
		}
		time.Sleep(100 * time.Millisecond)
		ran, err := c.times(body)
		return ran > 0, err
	})
}

func topicCore(ctx context.Context, c *conformance) (string, error) {
	nc, err := nats.Connect(c.own.ClientURL())
	if err != nil {
		return "", err
	}
	defer nc.Close()
	if err := c.listens(ctx, nc, coreTopic); err != nil {
		return "", err
	}
	const asked, gone = "core, asked", "core, gone"
	m, err := nc.RequestWithContext(ctx, coreTopic, []byte(asked))
	if err != nil || string(m.Data) != "did "+asked {
		return "", fmt.Errorf("a request was not answered by the function (%w)", err)
	}
	back := c.away()
	if err := nc.Publish(coreTopic, []byte(gone)); err != nil {
		return "", errors.Join(err, back())
	}
	_, none := nc.RequestWithContext(ctx, coreTopic, []byte(gone))
	if err := back(); err != nil {
		return "", err
	}
	if !errors.Is(none, nats.ErrNoResponders) {
		return "", fmt.Errorf("while no connector ran a request was answered otherwise than by no responders: %w", none)
	}
	if err := c.listens(ctx, nc, coreTopic); err != nil {
		return "", err
	}
	n, err := c.times(gone)
	m2, err2 := c.times(asked)
	if err := errors.Join(err, err2); err != nil || n != 0 || m2 != 1 {
		return "", fmt.Errorf("a message ran %d times, and one that was sent while no connector ran %d times (%w)", m2, n, err)
	}
	return "a request ran once and was answered; while no connector ran, messages were not kept, and who asked was told so", nil
}

func topicJetStream(ctx context.Context, c *conformance) (string, error) {
	nc, js, err := c.bus(ctx)
	if err != nil {
		return "", err
	}
	defer nc.Close()
	if _, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: "conform", Subjects: []string{keptTopic}, Storage: jetstream.FileStorage}); err != nil {
		return "", err
	}
	if err := c.listens(ctx, nc, keptTopic); err != nil {
		return "", err
	}
	// Until the stream was there the topic was core NATS's: what counts is that
	// the connector has a place in the stream.
	stream, err := js.Stream(ctx, "conform")
	if err != nil {
		return "", err
	}
	if err := c.await(ctx, "the connector's place in the stream", func() (bool, error) {
		info, err := stream.Info(ctx)
		return err == nil && info.State.Consumers > 0, err
	}); err != nil {
		return "", err
	}
	const kept, dies = "kept for later", "die in the midst of a message"
	back := c.away()
	_, err = js.Publish(ctx, keptTopic, []byte(kept))
	if err = errors.Join(err, back()); err != nil {
		return "", err
	}
	if _, err := js.Publish(ctx, keptTopic, []byte(dies)); err != nil {
		return "", err
	}
	for body, want := range map[string]int{kept: 1, dies: 2} {
		if err := c.await(ctx, "a message's runs", func() (bool, error) {
			n, err := c.times(body)
			return n >= want, err
		}); err != nil {
			return "", fmt.Errorf("%q: %w", body, err)
		}
	}
	return "a message that was sent while no connector ran came later; one whose function died was worked on again", nil
}

// rankReaches calls each rank of the worker, and one that is not there.
func rankReaches(ctx context.Context, c *conformance) (string, error) {
	for tries := 0; ; tries++ {
		ids := map[string]bool{}
		var wrong error
		for rank := 0; wrong == nil; rank++ {
			resp, got, err := c.do(ctx, http.MethodPost, fmt.Sprintf("/function/worker/-/%d/", rank), "to be or not to be")
			if err != nil {
				return "", err
			}
			if resp.StatusCode == http.StatusNotFound && rank > 0 {
				break
			}
			id := resp.Header.Get("Sheaf-Replica")
			switch {
			case resp.StatusCode != http.StatusOK:
				wrong = fmt.Errorf("rank %d answers %s: %s", rank, resp.Status, cutText(got))
			case resp.Header.Get("Sheaf-Rank") != strconv.Itoa(rank) || id == "" || ids[id]:
				wrong = fmt.Errorf("rank %d was answered by rank %q, replica %q", rank, resp.Header.Get("Sheaf-Rank"), id)
			case c.own != nil && (rank >= len(c.replicas("worker")) || c.replicas("worker")[rank].ID != id):
				wrong = fmt.Errorf("rank %d was answered by %s, and the record has it otherwise", rank, id)
			}
			ids[id] = true
		}
		if wrong == nil {
			break
		}
		if tries == 5 { // replicas may come and go, which changes ranks
			return "", wrong
		}
		time.Sleep(time.Second)
	}
	return "each rank was answered by a replica of its own; one beyond the last was refused with 404", nil
}

func rankOnce(ctx context.Context, c *conformance) (string, error) {
	if err := c.await(ctx, "3 replicas", func() (bool, error) { return len(c.replicas("witness")) == 3, nil }); err != nil {
		return "", err
	}
	const body = "die at rank 0"
	resp, got, err := c.do(ctx, http.MethodPost, "/function/witness/-/0/", body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode < 500 {
		return "", fmt.Errorf("the replica died, and the call was answered %s: %s", resp.Status, cutText(got))
	}
	time.Sleep(300 * time.Millisecond) // for a second run, were there one
	if n, err := c.times(body); err != nil || n != 1 {
		return "", fmt.Errorf("it ran %d times (%w)", n, err)
	}
	return "the replica of rank 0 died in the call: it ran once, and the caller got an error", nil
}

// runWitness is the process of the witness.
func runWitness() { worker.Main(witness) }
