package master

// form.go writes the answer: as text, JSON, results as they come, or events.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"log/slog"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A form runs a job and writes its answer.
type form struct {
	media string
	lines bool // of which a part is a part of the whole
	write func(j *job, ctx context.Context, w http.ResponseWriter)
}

// The forms, the default first.
var forms = []*form{
	{"text/plain", false, func(j *job, ctx context.Context, w http.ResponseWriter) {
		if j.output == "json" { // asked for by one who cannot set headers
			j.json(ctx, w)
			return
		}
		j.whole(ctx, w, "text/plain; charset=utf-8", Answer.WriteText)
	}},
	{"application/json", false, (*job).json},
	{"application/x-ndjson", true, (*job).lines},
	{"text/event-stream", false, (*job).events},
}

// negotiate picks the form by the Accept header (RFC 9110, section 12.5.1): the
// one of the highest quality, the more usual one of equals.
func negotiate(accept []string) (*form, *wire.Problem) {
	if strings.TrimSpace(strings.Join(accept, "")) == "" {
		return forms[0], nil
	}
	best, quality := (*form)(nil), 0.0
	for _, f := range forms {
		q, specific := 0.0, -1
		for item := range strings.SplitSeq(strings.Join(accept, ","), ",") {
			media, params, err := mime.ParseMediaType(strings.TrimSpace(item))
			if err != nil {
				continue
			}
			s := -1
			switch kind, _, _ := strings.Cut(f.media, "/"); media {
			case f.media:
				s = 2
			case kind + "/*":
				s = 1
			case "*/*":
				s = 0
			}
			if s <= specific {
				continue
			}
			specific, q = s, 1
			if v, err := strconv.ParseFloat(params["q"], 64); err == nil {
				q = v
			}
		}
		if q > quality {
			best, quality = f, q
		}
	}
	if best == nil {
		names := make([]string, len(forms))
		for i, f := range forms {
			names[i] = f.media
		}
		return nil, wire.Refuse(http.StatusNotAcceptable, "not_acceptable",
			fmt.Sprintf("the answer cannot be had as %q; it can as %s", wire.Cut(strings.Join(accept, ", ")), strings.Join(names, ", ")))
	}
	return best, nil
}

func (j *job) json(ctx context.Context, w http.ResponseWriter) {
	j.whole(ctx, w, "application/json", Answer.WriteJSON)
}

// measure counts and digests an answer before it is sent, so that its headers
// can tell whoever reads it what a whole one is.
type measure struct {
	n   int64
	sum hash.Hash
}

func (m *measure) Write(p []byte) (int, error) {
	m.n += int64(len(p))
	return m.sum.Write(p)
}

// headers tells what was measured.
func (m *measure) headers(h http.Header, media string) {
	h.Set("Content-Type", media)
	h.Set("Content-Length", strconv.FormatInt(m.n, 10))
	h.Set(wire.Digest, "sha-256=:"+base64.StdEncoding.EncodeToString(m.sum.Sum(nil))+":")
	h.Set("X-Content-Type-Options", "nosniff")
}

// whole sends the merged answer when it is complete, or lacks no more than may
// be lacking, or a refusal.
func (j *job) whole(ctx context.Context, w http.ResponseWriter, media string, write func(Answer, io.Writer) error) {
	answer, err := j.merge(j.results(ctx))
	lacks, over, err := j.lacking(err)
	if j.tolerate.given && media == "application/json" {
		write = beside(lacks, write)
	}
	m := measure{sum: sha256.New()}
	if err == nil {
		err = j.guard(func() error { return write(answer, &m) })
	}
	if err != nil {
		j.refuse(ctx, w, err)
		return
	}
	h := w.Header()
	j.numbers(h)
	if lacks != nil {
		h.Set(wire.Missing, indexes(lacks))
	}
	m.headers(h, media)
	if over {
		j.fail(ctx, lacks)
		h.Set(wire.Code, "blocks_failed")
		w.WriteHeader(http.StatusFailedDependency)
	}
	_ = write(answer, w) // the client sees by its length what it got
}

// mostNamed is how many blocks without a result an answer names.
const mostNamed = 1000

// beside writes the answer as a member of an object that also names the blocks
// that it lacks.
func beside(lacks *sheaf.PartialError, write func(Answer, io.Writer) error) func(Answer, io.Writer) error {
	list := []missing{}
	if lacks != nil {
		list = missingOf(lacks, mostNamed)
	}
	return func(answer Answer, w io.Writer) error {
		names, err := json.Marshal(list)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, `{"missing": %s, "answer": `, names); err != nil {
			return err
		}
		if err := write(answer, w); err != nil {
			return err
		}
		_, err = io.WriteString(w, "}\n")
		return err
	}
}

// indexes lists blocks for a header.
func indexes(e *sheaf.PartialError) string {
	var b strings.Builder
	for n, m := range e.Missing {
		if n == mostNamed {
			b.WriteString(",...")
			break
		}
		if n > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Itoa(m.Index))
	}
	return b.String()
}

// fail notes that the job has no answer, and why.
func (j *job) fail(ctx context.Context, err error) {
	j.failed = true
	j.h.Log.LogAttrs(ctx, slog.LevelWarn, "job failed", slog.String("job", j.group.Job), slog.Any("err", err))
}

// refuse says why there is no answer. A client that is gone is not told.
func (j *job) refuse(ctx context.Context, w http.ResponseWriter, err error) {
	j.fail(ctx, err)
	j.numbers(w.Header())
	j.up.refuse(w, j.problem(err))
}

// blockLine is one line of application/x-ndjson.
type blockLine struct {
	Block    int             `json:"block"`
	Offset   int64           `json:"offset"`
	Bytes    int             `json:"bytes"`
	Replica  string          `json:"replica"`
	Attempts int             `json:"attempts"`
	Elapsed  float64         `json:"elapsed_ms"`
	Verified bool            `json:"verified"`
	Result   json.RawMessage `json:"result"`
}

// line is what is told of one block's result.
func (j *job) line(r sheaf.Result) (blockLine, error) {
	var result json.RawMessage
	if err := j.guard(func() (err error) { result, err = j.h.Job.Line(r, j.mayCut()); return err }); err != nil {
		return blockLine{}, badResult(r, err)
	}
	return blockLine{r.Index, r.Offset, r.Bytes, r.From, r.Attempts, inMilliseconds(r.Elapsed), r.Verified, result}, nil
}

// summary ends application/x-ndjson and text/event-stream: without it the
// stream was cut.
type summary struct {
	Job        string  `json:"job"`
	Blocks     int     `json:"blocks"`
	Bytes      int64   `json:"bytes"`
	BlockSize  int     `json:"block_size"`
	Replicas   int     `json:"replicas"`
	Unverified int     `json:"unverified"`
	Elapsed    float64 `json:"elapsed_ms"`
	Done       bool    `json:"done"`
	// Missing lists the blocks that the answer lacks, where that is tolerated.
	Missing []missing `json:"missing,omitempty"`
}

func (j *job) summary(lacks *sheaf.PartialError) summary {
	s := summary{Job: j.group.Job, Blocks: j.done, Bytes: j.up.received(), BlockSize: j.split.Size, Replicas: len(j.from),
		Unverified: j.unverified, Elapsed: inMilliseconds(j.elapsed()), Done: true}
	if j.sum != nil {
		s = *j.sum
	}
	if lacks != nil {
		s.Missing = missingOf(lacks, mostNamed)
	}
	return s
}

func inMilliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// stream prepares an answer that begins while the input still comes.
func (j *job) stream(w http.ResponseWriter, media string) *http.ResponseController {
	control := j.up.control
	if !j.up.whole() {
		control = interrupt(w)
	}
	w.Header().Set("Content-Type", media)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	return control
}

// lines sends each block's result as it comes, as a line of JSON, and a
// summary or an error as the last one.
func (j *job) lines(ctx context.Context, w http.ResponseWriter) {
	control := j.stream(w, "application/x-ndjson")
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	sent := false
	err := func() error {
		for r, err := range j.results(ctx) {
			if err != nil {
				return err
			}
			line, err := j.line(r)
			if err != nil {
				return err
			}
			sent = true
			if err := enc.Encode(line); err != nil {
				return err
			}
			_ = control.Flush() // a client that left ends ctx
		}
		return nil
	}()
	lacks, over, err := j.lacking(err)
	if lacks != nil {
		for _, m := range missingOf(lacks, len(lacks.Missing)) {
			_ = enc.Encode(m) // as above
		}
		if over {
			sent, err = true, lacks
		}
	}
	switch {
	case err == nil:
		_ = enc.Encode(j.summary(lacks)) // as above
	case !sent:
		j.refuse(ctx, w, err)
	default:
		j.fail(ctx, err)
		_ = enc.Encode(map[string]any{"error": j.problem(err), "done": false})
	}
}

// progress is the data of a progress event.
type progress struct {
	Job      string  `json:"job"`
	Done     int     `json:"blocks_done"`
	Bytes    int64   `json:"bytes_done"`
	Received int64   `json:"bytes_received"`
	Total    int64   `json:"bytes_total"` // -1 when it is not known
	Replicas int     `json:"replicas"`
	Elapsed  float64 `json:"elapsed_ms"`
}

const (
	progressEvery = 20 * time.Millisecond  // at most, when there is some
	aliveEvery    = 250 * time.Millisecond // at least, so that nobody on the way takes the stream for dead
)

// events sends progress events, then a result event with the merged answer
// and a done event with a summary; or an error event with a problem.
func (j *job) events(ctx context.Context, w http.ResponseWriter) {
	out := eventWriter{w: w, control: j.stream(w, "text/event-stream")}
	var now atomic.Pointer[progress]
	note := func() {
		now.Store(&progress{j.group.Job, j.done, j.bytes, j.up.received(), j.length, len(j.from), inMilliseconds(j.elapsed())})
	}
	note()
	stop := out.report(&now, func(p progress) progress {
		p.Received, p.Elapsed = j.up.received(), inMilliseconds(j.elapsed())
		return p
	})
	watched := func(results iter.Seq2[sheaf.Result, error]) iter.Seq2[sheaf.Result, error] {
		return func(yield func(sheaf.Result, error) bool) {
			for r, err := range results {
				note()
				if err == nil && j.traced() {
					out.json("block", tracedBlock{r.Index, r.Offset, r.Bytes, r.From, r.Attempts, inMilliseconds(r.Elapsed), r.Trace})
				}
				if !yield(r, err) {
					return
				}
			}
		}
	}
	answer, err := j.merge(watched(j.results(ctx)))
	stop()
	lacks, over, err := j.lacking(err)
	if err == nil {
		write := Answer.WriteText
		if j.output == "json" {
			write = Answer.WriteJSON
		}
		err = out.event("result", func(w io.Writer) error {
			return j.guard(func() error { return write(answer, w) })
		})
	}
	if over && err == nil {
		err = lacks
	}
	if err != nil {
		j.fail(ctx, err)
		out.json("error", j.problem(err))
		return
	}
	out.json("done", j.summary(lacks))
}

// tracedBlock is the data of a block event, by which whoever traces the job can
// make a span of each block. The master sends no spans itself.
type tracedBlock struct {
	Block    int     `json:"block"`
	Offset   int64   `json:"offset"`
	Bytes    int     `json:"bytes"`
	Replica  string  `json:"replica"`
	Attempts int     `json:"attempts"`
	Elapsed  float64 `json:"elapsed_ms"`
	Trace    string  `json:"traceparent"` // of the attempt that answered
}

// traced says whether whoever asked records the job's trace.
func (j *job) traced() bool { return strings.HasSuffix(j.group.Trace, "-01") }

// eventWriter writes server-sent events (WHATWG HTML, section 9.2), one after
// another.
type eventWriter struct {
	w       io.Writer
	control *http.ResponseController

	mu sync.Mutex // held while an event is written
}

// report sends what now points to, made fresh, as progress events: at once,
// when it changes and at the end, until stop is called, which waits for the
// last one.
func (e *eventWriter) report(now *atomic.Pointer[progress], fresh func(progress) progress) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		var told *progress
		var at time.Time
		for more := true; ; {
			if p := now.Load(); p != told || time.Since(at) >= aliveEvery {
				told, at = p, time.Now()
				e.json("progress", fresh(*p))
			}
			if !more {
				return
			}
			select {
			case <-tick.C:
			case <-end:
				more = false
			}
		}
	}()
	return func() { close(end); <-ended }
}

func (e *eventWriter) json(name string, v any) {
	_ = e.event(name, func(w io.Writer) error { return json.NewEncoder(w).Encode(v) }) // a client that left ends the job
}

// event writes one event; each line of the data gets a field of its own.
func (e *eventWriter) event(name string, data func(io.Writer) error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, _ = fmt.Fprintf(e.w, "event: %s\n", name) // an error of w comes again
	err := data(&dataWriter{w: e.w, start: true})
	_, _ = io.WriteString(e.w, "\n")
	return errors.Join(err, e.control.Flush())
}

// dataWriter puts "data: " before each line.
type dataWriter struct {
	w     io.Writer
	start bool // of a line
}

func (d *dataWriter) Write(p []byte) (int, error) {
	var b bytes.Buffer
	for rest := p; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte{'\n'})
		if d.start {
			b.WriteString("data: ")
		}
		b.Write(line)
		if ended {
			b.WriteByte('\n')
		}
		d.start = ended
		rest = after
	}
	if _, err := d.w.Write(b.Bytes()); err != nil {
		return 0, err
	}
	return len(p), nil
}
