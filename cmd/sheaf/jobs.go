package main

// jobs.go has the commands for jobs that outlive their callers: submit, jobs,
// status, result, cancel and redrive.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sheaf-project/sheaf"
)

const (
	waitPiece   = 20 * time.Second // that the master is asked to wait at once: below what gateways allow a call
	submitTries = 5
)

// jobClient talks to the master of jobs.
type jobClient struct {
	std
	gateway string
	master  string
	output  string
	http    *http.Client
}

// newJobClient takes the flags that all commands for jobs have.
func newJobClient(f *flag.FlagSet, s std) *jobClient {
	c := &jobClient{std: s, http: &http.Client{Transport: &http.Transport{DisableCompression: true}}}
	f.StringVar(&c.gateway, "gateway", defaultGateway(), "`URL` of the stack, or of an OpenFaaS gateway")
	f.StringVar(&c.master, "master", "master", "`name` of the function that keeps the jobs")
	f.StringVar(&c.output, "output", "text", "`form`: text or json")
	return c
}

// args parses the command line of a command that takes n arguments.
func (c *jobClient) args(f *flag.FlagSet, args []string, what string, n int) ([]string, error) {
	rest, err := parse(f, args)
	if err != nil {
		return nil, err
	}
	if len(rest) != n {
		return nil, usagef("%s takes %s, and got %d: %s", f.Name(), what, len(rest), strings.Join(rest, ", "))
	}
	return rest, oneOf("output", c.output, "text", "json")
}

// call calls the master. Whatever is not one of its answers is an error.
func (c *jobClient) call(ctx context.Context, method, path string, body io.Reader, length int64, header map[string]string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.gateway, "/")+"/function/"+c.master+"/jobs"+path, body)
	if err != nil {
		return nil, usageError{err}
	}
	if body != nil {
		req.ContentLength = length
		req.GetBody = nil // a second try is ours to make
		if length == 0 {
			req.Body = http.NoBody
		}
	}
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("call the master: %w; is a stack running there? sheaf up starts one", err)
	}
	return resp, nil
}

// jobInfo is what the master tells of a job.
type jobInfo struct {
	ID       string    `json:"id"`
	State    string    `json:"state"`
	Function string    `json:"function"`
	Created  time.Time `json:"created"`
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished"`
	Expires  time.Time `json:"expires"`
	Bytes    int64     `json:"bytes"`
	Blocks   struct {
		Total   int `json:"total"`
		Queued  int `json:"queued"`
		Running int `json:"running"`
		Done    int `json:"done"`
		Failed  int `json:"failed"`
		Stopped int `json:"stopped"`
	} `json:"blocks"`
	Attempts int     `json:"attempts"`
	Replicas int     `json:"replicas"`
	Elapsed  float64 `json:"elapsed_ms"`
	Epoch    int     `json:"epoch"`
	Redrives int     `json:"redrives"`
	Error    struct {
		Detail, Code string
	} `json:"error"`
}

func (j *jobInfo) final() bool {
	return j.State == "succeeded" || j.State == "failed" || j.State == "cancelled"
}

// tell calls the master and prints what it tells of a job.
func (c *jobClient) tell(ctx context.Context, method, path string) error {
	resp, err := c.call(ctx, method, path, nil, 0, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return refusal(resp)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("the answer was cut: %w", err)
	}
	return c.show(body)
}

func (c *jobClient) show(body []byte) error {
	if c.output == "json" {
		_, err := c.out.Write(body)
		return err
	}
	var j jobInfo
	if err := json.Unmarshal(body, &j); err != nil {
		return fmt.Errorf("the master's answer is not a job: %w", err)
	}
	w := tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "job\t%s\nstate\t%s\nfunction\t%s\n", j.ID, j.State, j.Function)
	fmt.Fprintf(w, "input\t%d bytes\nblocks\t%s\n", j.Bytes, j.counts())
	fmt.Fprintf(w, "attempts\t%d on %s\n", j.Attempts, count(j.Replicas, "replica"))
	fmt.Fprintf(w, "created\t%s\n", j.Created.Local().Format(time.DateTime))
	if j.Elapsed > 0 {
		fmt.Fprintf(w, "elapsed\t%v\n", round(time.Duration(j.Elapsed*float64(time.Millisecond))))
	}
	if j.final() {
		fmt.Fprintf(w, "kept until\t%s\n", j.Expires.Local().Format(time.DateTime))
	}
	if j.Epoch > 1 || j.Redrives > 0 {
		fmt.Fprintf(w, "run by\t%s in a row, %s\n", count(j.Epoch, "master"), count(j.Redrives, "redrive"))
	}
	if j.Error.Detail != "" {
		fmt.Fprintf(w, "error\t%s (%s)\n", j.Error.Detail, j.Error.Code)
	}
	return w.Flush()
}

// counts says in which states the blocks are.
func (j *jobInfo) counts() string {
	list := []string{}
	for _, c := range []struct {
		n    int
		name string
	}{{j.Blocks.Done, "done"}, {j.Blocks.Running, "running"}, {j.Blocks.Queued, "queued"}, {j.Blocks.Failed, "failed"}, {j.Blocks.Stopped, "stopped"}} {
		if c.n > 0 {
			list = append(list, fmt.Sprintf("%d %s", c.n, c.name))
		}
	}
	if len(list) == 0 {
		return "0"
	}
	return fmt.Sprintf("%d: %s", j.Blocks.Total, strings.Join(list, ", "))
}

// submitJob is the command that makes a job.
func submitJob(ctx context.Context, args []string, s std) error {
	f := flags(s, "submit", "submit FILE|URL [FLAGS]", "sheaf submit --block 64KiB --wait README.md")
	c := newJobClient(f, s)
	q := url.Values{}
	for name, usage := range map[string]string{
		"block":     "`size` of a block, such as 300, 64KiB or 1MiB (default a sixteenth of the file, from 1KiB to 1MiB)",
		"split":     "what blocks are made of: lines, bytes, records, csv or json",
		"delimiter": `what ends a record with --split records (\n), or separates fields with --split csv (,)`,
		"function":  "`name` of the function that does the work",
		"workers":   "`number` of its replicas to ask for",
		"route":     "how blocks travel: direct to a replica's address, or through the gateway",
		"timeout":   "how long the job may take, such as 10m",
		"tolerate":  "how many blocks may have no result, such as 5 or 5%",
	} {
		f.Func(name, usage, func(v string) error { q.Set(name, v); return nil })
	}
	key := f.String("key", "", "`name` of the job, by which it can be sent again without being done again")
	wait := f.Bool("wait", false, "wait for the end, and print the answer")
	rest, err := c.args(f, args, "one file, - for standard input, or a URL", 1)
	if err != nil {
		return err
	}
	if err := checkSubmit(q); err != nil {
		return err
	}
	if *key == "" {
		*key = rand.Text()
	}
	file := rest[0]
	for _, scheme := range []string{"http://", "https://", "nats://"} {
		if strings.HasPrefix(file, scheme) { // the master reads it
			q.Set("input", file)
			file = os.DevNull
		}
	}
	body, err := c.submit(ctx, file, q, *key)
	if err != nil {
		return err
	}
	var j jobInfo
	if err := json.Unmarshal(body, &j); err != nil || j.ID == "" {
		return fmt.Errorf("the master's answer is not a job: %s", bytes.TrimSpace(body))
	}
	if *wait {
		fmt.Fprintf(s.err, "job %s is stored; it goes on when this command is ended\n", j.ID)
		return c.result(ctx, j.ID, true)
	}
	if c.output == "json" {
		_, err := s.out.Write(body)
		return err
	}
	_, err = fmt.Fprintln(s.out, j.ID)
	return err
}

// checkSubmit refuses what can be refused without the master.
func checkSubmit(q url.Values) error {
	if v := q.Get("block"); v != "" && v != "auto" {
		if n, err := sheaf.ParseSize(v); err != nil || n < 1 {
			return usagef("--block is %q, and must be a whole number of bytes, such as 300, 64KiB or 1MiB", v)
		}
	}
	var err error
	if q.Has("split") {
		err = oneOf("split", q.Get("split"), sheaf.Splits()...)
	}
	if q.Has("route") {
		err = cmp.Or(err, oneOf("route", q.Get("route"), "direct", "gateway"))
	}
	if v := q.Get("workers"); q.Has("workers") {
		if n, bad := strconv.Atoi(v); bad != nil || n < 1 {
			err = cmp.Or(err, usagef("--workers is %q, and must be a number from 1", v))
		}
	}
	return err
}

// submit sends a file until it is stored: under one key it is one job, however
// often it is sent.
func (c *jobClient) submit(ctx context.Context, file string, q url.Values, key string) ([]byte, error) {
	for try := 1; ; try++ {
		input, size, err := open(file, c.in)
		if err != nil {
			return nil, err
		}
		if file == os.DevNull {
			size = 0
		}
		body, again, err := c.send(ctx, input, size, q, key)
		_ = input.Close() // it was only read
		if err == nil || !again || file == "-" || try == submitTries || ctx.Err() != nil {
			return body, changed(err, input, size)
		}
		fmt.Fprintf(c.err, "sheaf: %v; sending it again\n", err)
		select {
		case <-time.After(time.Duration(try) * 300 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (c *jobClient) send(ctx context.Context, input io.Reader, size int64, q url.Values, key string) (body []byte, again bool, err error) {
	resp, err := c.call(ctx, http.MethodPost, "?"+q.Encode(), io.NopCloser(input), size,
		map[string]string{"Content-Type": "application/octet-stream", "Idempotency-Key": key})
	if err != nil {
		return nil, !errors.As(err, new(usageError)), err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted && resp.StatusCode != http.StatusOK {
		return nil, resp.StatusCode == http.StatusBadGateway || resp.StatusCode == http.StatusServiceUnavailable, refusal(resp)
	}
	body, err = io.ReadAll(resp.Body)
	return body, true, err
}

// listJobs is the command that lists jobs.
func listJobs(ctx context.Context, args []string, s std) error {
	f := flags(s, "jobs", "jobs [FLAGS]", "sheaf jobs --state failed")
	c := newJobClient(f, s)
	state := f.String("state", "", "only those that are queued, running, succeeded, failed or cancelled")
	limit := f.Int("limit", 100, "at most so many, the newest first; up to 1000")
	if _, err := c.args(f, args, "no argument", 0); err != nil {
		return err
	}
	if err := oneOf("state", *state, "", "queued", "running", "succeeded", "failed", "cancelled"); err != nil {
		return err
	}
	if *limit < 1 || *limit > 1000 {
		return usagef("--limit is %d, and must be from 1 to 1000", *limit)
	}
	q := url.Values{"limit": {strconv.Itoa(*limit)}}
	if *state != "" {
		q.Set("state", *state)
	}
	resp, err := c.call(ctx, http.MethodGet, "?"+q.Encode(), nil, 0, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refusal(resp)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("the answer was cut: %w", err)
	}
	if c.output == "json" {
		_, err := s.out.Write(body)
		return err
	}
	var list []jobInfo
	if err := json.Unmarshal(body, &list); err != nil {
		return fmt.Errorf("the master's answer is not a list of jobs: %w", err)
	}
	w := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "JOB\tSTATE\tFUNCTION\tDONE\tBLOCKS\tCREATED\tELAPSED")
	for _, j := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%v\n", j.ID, j.State, j.Function, j.Blocks.Done, j.Blocks.Total,
			j.Created.Local().Format(time.DateTime), round(time.Duration(j.Elapsed*float64(time.Millisecond))))
	}
	return w.Flush()
}

// jobCommand makes a command that does one thing to a job and tells of it.
func jobCommand(name, method, path, example string) func(context.Context, []string, std) error {
	return func(ctx context.Context, args []string, s std) error {
		f := flags(s, name, name+" ID [FLAGS]", example)
		c := newJobClient(f, s)
		rest, err := c.args(f, args, "the ID of one job", 1)
		if err != nil {
			return err
		}
		return c.tell(ctx, method, "/"+url.PathEscape(rest[0])+path)
	}
}

// jobResult is the command that prints the answer of a job.
func jobResult(ctx context.Context, args []string, s std) error {
	f := flags(s, "result", "result ID [FLAGS]", "sheaf result --wait 3WQH6B2V5ZLE4C7XJ3N2YAMKRT > counts.txt")
	c := newJobClient(f, s)
	wait := f.Bool("wait", false, "wait for the end of the job")
	rest, err := c.args(f, args, "the ID of one job", 1)
	if err != nil {
		return err
	}
	return c.result(ctx, rest[0], *wait)
}

// result prints the answer of a job. One that lacks more blocks than may be
// lacking is printed, too, and is an error.
func (c *jobClient) result(ctx context.Context, id string, wait bool) error {
	header := map[string]string{"Accept": map[string]string{"text": "text/plain", "json": "application/json"}[c.output]}
	if wait {
		header["Prefer"] = fmt.Sprintf("wait=%d", int(waitPiece.Seconds()))
	}
	for try := 1; ; try++ {
		resp, err := c.call(ctx, http.MethodGet, "/"+url.PathEscape(id)+"/result", nil, 0, header)
		switch {
		case err == nil && resp.StatusCode == http.StatusAccepted:
			try = 0
			if wait {
				resp.Body.Close()
				continue
			}
			defer resp.Body.Close()
			var j jobInfo
			if err := json.NewDecoder(resp.Body).Decode(&j); err != nil {
				return fmt.Errorf("the master's answer is not a job: %w", err)
			}
			return fmt.Errorf("job %s is %s, blocks %s; sheaf result --wait waits for its end", j.ID, j.State, j.counts())
		case wait && try < submitTries && ctx.Err() == nil && (err != nil || resp.StatusCode == http.StatusBadGateway || resp.StatusCode == http.StatusServiceUnavailable):
			if err == nil {
				resp.Body.Close() // its master may have died, and another one is there
			}
			select {
			case <-time.After(time.Duration(try) * 300 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return err
		}
		defer resp.Body.Close()
		lacks := resp.Header.Get("Sheaf-Missing")
		if resp.StatusCode != http.StatusOK && (lacks == "" || resp.StatusCode != http.StatusFailedDependency) {
			return refusal(resp)
		}
		if _, err := io.Copy(c.out, resp.Body); err != nil {
			return fmt.Errorf("the answer was cut: %w", err)
		}
		if lacks != "" {
			fmt.Fprintf(c.err, "without a result: blocks %s\n", lacks)
		}
		if resp.StatusCode != http.StatusOK {
			return errors.New("more blocks have no result than is tolerated; sheaf redrive runs them again")
		}
		return nil
	}
}
