package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/tracing"
)

// jobFlags are the flags of run.
type jobFlags struct {
	file      string
	block     string
	workers   int
	split     string
	delimiter string
	route     string
	output    string
	kill      string
	gateway   string
	port      int
	verbose   bool

	victims, percent int // of kill
}

func parseJob(args []string, s std) (*jobFlags, error) {
	j := &jobFlags{}
	f := flags(s, "run", "run FILE [FLAGS]", "sheaf run --block 64KiB --workers 8 README.md")
	f.StringVar(&j.block, "block", "auto", "`size` of a block, such as 300, 64KiB or 1MiB; auto is a sixteenth of the file, from 1KiB to 1MiB")
	f.IntVar(&j.workers, "workers", 0, fmt.Sprintf("`number` of worker replicas (default %d, or those that are there with --gateway)", defaultWorkers()))
	f.StringVar(&j.split, "split", "lines", "what blocks are made of: lines, bytes, records, csv or json")
	f.StringVar(&j.delimiter, "delimiter", "", `what ends a record with --split records (\n), or separates fields with --split csv (,)`)
	f.StringVar(&j.route, "route", "direct", "how blocks travel: direct to a replica's address, through the gateway, or by messages on a topic")
	f.StringVar(&j.output, "output", "text", "`form` of the answer: text or json")
	f.StringVar(&j.kill, "kill", "", "kill -9 replicas on the way: `K@P%` kills K of them when P % of the input is done")
	f.StringVar(&j.gateway, "gateway", "", "`URL` of a running stack, or of an OpenFaaS gateway, to use instead of a new local stack")
	f.IntVar(&j.port, "port", 8080, "for the local stack's gateway; a free one is taken if it is in use, or for 0")
	f.BoolVar(&j.verbose, "verbose", false, "log what happens")
	rest, err := parse(f, args)
	if err != nil {
		return nil, err
	}
	given := map[string]bool{}
	f.Visit(func(fl *flag.Flag) { given[fl.Name] = true })
	switch {
	case len(rest) == 0:
		return nil, usagef("run needs a file, as in: sheaf run README.md")
	case len(rest) > 1:
		return nil, usagef("run takes one file, and got %d: %s", len(rest), strings.Join(rest, ", "))
	case given["workers"] && (j.workers < 1 || j.workers > maxWorkers):
		return nil, usagef("--workers is %d, and must be from 1 to %d", j.workers, maxWorkers)
	case j.port < 0 || j.port > 65535:
		return nil, usagef("--port is %d, and must be from 0 to 65535", j.port)
	}
	j.file = rest[0]
	if err := cmp.Or(
		oneOf("split", j.split, sheaf.Splits()...),
		oneOf("route", j.route, "direct", "gateway", "topic"),
		oneOf("output", j.output, "text", "json"),
	); err != nil {
		return nil, err
	}
	if given["delimiter"] && (j.delimiter == "" || j.split != "records" && j.split != "csv") {
		return nil, usagef("--delimiter is for --split records and --split csv, and must not be empty")
	}
	if j.block != "auto" {
		n, err := sheaf.ParseSize(j.block)
		if err != nil && !errors.Is(err, strconv.ErrRange) {
			return nil, usagef("--block: %v", err)
		}
		if err != nil || n < 1 || n > master.DefaultMaxBlock && j.gateway == "" {
			return nil, usagef("--block is %q, and must be from 1 byte to %s", j.block, sizeText(master.DefaultMaxBlock))
		}
	}
	return j, j.parseKill()
}

var killForm = regexp.MustCompile(`^(\d{1,4})@(\d{1,2}|100)%?$`)

func (j *jobFlags) parseKill() error {
	if j.kill == "" {
		return nil
	}
	m := killForm.FindStringSubmatch(j.kill)
	if m == nil {
		return usagef("--kill is %q, and must be K@P%%, such as 2@50%%", j.kill)
	}
	j.victims, _ = strconv.Atoi(m[1]) // digits, by the pattern
	j.percent, _ = strconv.Atoi(m[2])
	if j.victims < 1 {
		return usagef("--kill is %q, and must kill at least 1 replica", j.kill)
	}
	if j.file == "-" {
		return usagef("--kill needs a file, because the size of standard input is not known")
	}
	return nil
}

// runJob is the command that runs one job.
func runJob(ctx context.Context, args []string, s std) error {
	begun := time.Now()
	j, err := parseJob(args, s)
	if err != nil {
		return err
	}
	input, size, err := open(j.file, s.in)
	if err != nil {
		return err
	}
	defer input.Close()
	var client *gateway.Client
	base := j.gateway
	if base == "" {
		workers := j.workers
		if workers == 0 {
			workers = defaultWorkers()
		}
		st, err := start(ctx, local.Config{Port: j.port}, true, workers, s, j.verbose)
		if err != nil {
			return err
		}
		defer st.Close()
		base, client = st.URL, st.Client()
		j.workers = 0 // they are deployed
	} else {
		if client, err = newClient(base); err != nil {
			return err
		}
		defer client.Close()
	}
	tracer, flush, err := tracing.Open(ctx, os.Getenv, "sheaf", version, logger(s.err, j.verbose))
	if err != nil {
		return usageError{err}
	}
	defer flush()
	ctx, span := tracer.Start(ctx, "sheaf run", trace.WithTimestamp(begun), trace.WithAttributes(attribute.String("sheaf.route", j.route)))
	defer span.End()
	job := &jobRun{tracer: tracer, flags: j, std: s, client: client, base: strings.TrimSuffix(base, "/"), size: size, bar: newBar(s.err)}
	sum, err := job.post(ctx, input)
	job.bar.clear()
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
		return changed(err, input, size)
	}
	span.SetAttributes(attribute.Int("sheaf.blocks", sum.Blocks), attribute.Int("sheaf.replicas", sum.Replicas))
	total := time.Since(begun)
	work := time.Duration(sum.Elapsed * float64(time.Millisecond))
	fmt.Fprintf(s.err, "%s of up to %s on %s: %v in all, of which scatter-gather %v, start-up %v%s\n",
		count(sum.Blocks, "block"), sizeText(sum.BlockSize), count(sum.Replicas, "replica"), round(total), round(work), round(max(0, total-work)), job.note)
	return nil
}

// changed says so when the input is a file that is not as long as it was.
func changed(err error, input io.Reader, size int64) error {
	f, ok := input.(*os.File)
	if !ok || size < 0 {
		return err
	}
	info, failed := f.Stat()
	if failed != nil || info.Size() == size {
		return err
	}
	return fmt.Errorf("%s changed while it was read, from %d to %d bytes; run it again when it rests", f.Name(), size, info.Size())
}

// open opens the file, or standard input; size is -1 when it is not known. A
// file that says that it is empty may be one that is made as it is read.
func open(name string, in io.Reader) (io.ReadCloser, int64, error) {
	if name == "-" {
		return io.NopCloser(in), -1, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a folder; name a file, or - for standard input", name)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return f, -1, nil
	}
	return f, info.Size(), nil
}

// jobRun is a job under way, as the command sees it.
type jobRun struct {
	flags  *jobFlags
	std    std
	client *gateway.Client
	base   string
	size   int64
	bar    *bar
	gate   *gate
	note   string // for the summary
	tracer trace.Tracer
}

// jobSummary is what the master tells at the end.
type jobSummary struct {
	Blocks    int     `json:"blocks"`
	BlockSize int     `json:"block_size"`
	Replicas  int     `json:"replicas"`
	Elapsed   float64 `json:"elapsed_ms"`
}

// post sends the input to the master and prints the answer.
func (j *jobRun) post(ctx context.Context, input io.Reader) (jobSummary, error) {
	q := url.Values{}
	if j.flags.split != sheaf.Splits()[0] { // what a function does when nobody says
		q.Set("split", j.flags.split)
	}
	q.Set("route", j.flags.route)
	if j.flags.block != "auto" {
		q.Set("block", j.flags.block)
	}
	if j.flags.workers > 0 {
		q.Set("workers", strconv.Itoa(j.flags.workers))
	}
	if j.flags.delimiter != "" {
		q.Set("delimiter", j.flags.delimiter)
	}
	accept := map[string]string{"text": "text/plain", "json": "application/json"}[j.flags.output]
	events := j.streams(ctx)
	if events {
		accept = "text/event-stream"
		q.Set("output", j.flags.output)
	}
	if j.flags.victims > 0 {
		if j.size < 0 {
			return jobSummary{}, usagef("--kill needs a file whose size is known, and %s is none", j.flags.file)
		}
		if !events {
			return jobSummary{}, usagef("--kill needs a stack of sheaf's own, and %s is none", j.base)
		}
		j.gate = newGate(input, j.size, j.flags.percent)
		defer j.gate.open()
		input = j.gate
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, j.base+"/function/master?"+q.Encode(), input)
	if err != nil {
		return jobSummary{}, err
	}
	if j.size >= 0 {
		req.ContentLength = j.size
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	req.Header.Set("Accept", accept)
	tracing.Inject(ctx, req.Header.Set)
	transport := &http.Transport{DisableCompression: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return jobSummary{}, fmt.Errorf("call the master: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return jobSummary{}, refusal(resp)
	}
	if events {
		return j.follow(ctx, resp.Body)
	}
	if _, err := io.Copy(j.std.out, resp.Body); err != nil {
		return jobSummary{}, fmt.Errorf("the answer was cut: %w", err)
	}
	sum := jobSummary{}
	sum.Blocks, _ = strconv.Atoi(resp.Header.Get("Sheaf-Blocks")) // 0 when an unknown master does not tell
	sum.Replicas, _ = strconv.Atoi(resp.Header.Get("Sheaf-Replicas"))
	if d, err := time.ParseDuration(resp.Header.Get("Sheaf-Elapsed")); err == nil {
		sum.Elapsed = float64(d) / float64(time.Millisecond)
	}
	return sum, nil
}

// streams says whether the front passes events on while the input still comes.
// Only our own is known to.
func (j *jobRun) streams(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, j.base+"/healthz", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return strings.HasPrefix(resp.Header.Get("X-Served-By"), local.ProviderName)
}

// refusal is what a master or a gateway says in place of an answer.
func refusal(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // as much of the reason as can be had
	return reason(body, resp.Status)
}

func reason(problem []byte, otherwise string) error {
	var p struct{ Detail, Code string }
	if json.Unmarshal(problem, &p) == nil && p.Detail != "" {
		return fmt.Errorf("%s (%s)", p.Detail, p.Code)
	}
	return fmt.Errorf("the gateway answered %s: %s", otherwise, bytes.TrimSpace(problem))
}

// follow reads the master's events, prints the result and returns the summary.
func (j *jobRun) follow(ctx context.Context, body io.Reader) (jobSummary, error) {
	in := bufio.NewReaderSize(body, 64<<10)
	out := bufio.NewWriterSize(j.std.out, 64<<10)
	var event string
	var data []byte
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return jobSummary{}, fmt.Errorf("the answer was cut: %w", err)
		}
		line = line[:len(line)-1]
		if name, ok := bytes.CutPrefix(line, []byte("event: ")); ok {
			event, data = string(name), nil
			continue
		}
		if value, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
			if event == "result" { // printed as it comes
				if _, err := out.Write(append(value, '\n')); err != nil {
					return jobSummary{}, err
				}
				continue
			}
			data = append(append(data, value...), '\n')
			continue
		}
		if len(line) > 0 {
			continue // a comment, or a field without a value
		}
		switch event {
		case "progress":
			j.progress(ctx, data)
		case "block":
			j.record(ctx, data)
		case "result":
			j.bar.clear()
			if err := out.Flush(); err != nil {
				return jobSummary{}, err
			}
		case "error":
			return jobSummary{}, reason(data, "an error")
		case "done":
			var sum jobSummary
			return sum, errors.Join(json.Unmarshal(data, &sum), nil)
		}
		event, data = "", nil
	}
}

// jobProgress is the data of a progress event.
type jobProgress struct {
	Done     int   `json:"blocks_done"`
	Bytes    int64 `json:"bytes_done"`
	Received int64 `json:"bytes_received"`
	Replicas int   `json:"replicas"`
}

func (j *jobRun) progress(ctx context.Context, data []byte) {
	var p jobProgress
	if json.Unmarshal(data, &p) != nil {
		return // a newer master may say more than we know
	}
	j.bar.show(p, j.size)
	if j.gate != nil && j.gate.reached(p.Bytes) {
		j.killSome(ctx, p.Bytes)
		j.gate.open()
	}
}

// record records the span of a block, which the master tells of when the job is
// traced: its clock need not agree with ours, so the span ends now.
func (j *jobRun) record(ctx context.Context, data []byte) {
	var b struct {
		Block    int     `json:"block"`
		Offset   int64   `json:"offset"`
		Bytes    int     `json:"bytes"`
		Replica  string  `json:"replica"`
		Attempts int     `json:"attempts"`
		Elapsed  float64 `json:"elapsed_ms"`
		Trace    string  `json:"traceparent"`
	}
	if json.Unmarshal(data, &b) != nil {
		return // a newer master may say it otherwise
	}
	now := time.Now()
	tracing.Record(ctx, j.tracer, fmt.Sprintf("block %d", b.Block), b.Trace, now.Add(-time.Duration(b.Elapsed*float64(time.Millisecond))), now,
		attribute.Int("sheaf.block", b.Block), attribute.Int64("sheaf.offset", b.Offset), attribute.Int("sheaf.bytes", b.Bytes),
		attribute.String("sheaf.replica", b.Replica), attribute.Int("sheaf.attempts", b.Attempts))
}

// killSome ends replicas of the worker as kill -9 does: of those that there are
// now, as they become ready, within two seconds. What takes their place lives.
func (j *jobRun) killSome(ctx context.Context, done int64) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var here map[string]bool // replicas, and whether they still live
	killed := 0
	var failed error
	for v, err := range j.client.Replicas(ctx) {
		if err != nil {
			failed = err
			break
		}
		if v.Function != "worker."+local.Namespace {
			continue
		}
		if here == nil {
			here = map[string]bool{}
			for _, r := range v.Replicas {
				here[r.ID] = r.State != sheaf.Draining
			}
		}
		for _, r := range v.Replicas {
			if killed < j.flags.victims && here[r.ID] && r.State == sheaf.Ready && j.client.Kill(ctx, "worker", r.ID) == nil {
				here[r.ID] = false
				killed++
			}
		}
		if killed == min(j.flags.victims, len(here)) {
			break
		}
	}
	j.note = fmt.Sprintf("; killed %s at %d %%", count(killed, "replica"), done*100/max(j.size, 1))
	if killed == 0 && failed != nil {
		j.note += fmt.Sprintf(" (%v)", failed)
	}
}

// round shortens a duration for people.
func round(d time.Duration) time.Duration {
	switch {
	case d > 10*time.Second:
		return d.Round(100 * time.Millisecond)
	case d > time.Second:
		return d.Round(10 * time.Millisecond)
	case d > 10*time.Millisecond:
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(10 * time.Microsecond)
}

// count is n with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// sizeText writes a size as people do.
func sizeText(n int) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10 && n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
