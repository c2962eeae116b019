// Package master is the near end of a scatter: an upload comes in over HTTP, is
// split into blocks, scattered over the replicas of a worker function, and
// leaves as one merged answer, as text, JSON, results as they come, or events.
//
//	curl --data-binary @FILE 'http://127.0.0.1:8080/function/master?block=300'
//
// What is merged, and how it is written, is a [Job]; the rest is the same for
// every function. Main runs a master as a function of OpenFaaS.
package master

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/egress"
	"github.com/sheaf-project/sheaf/internal/wire"
	jobs "github.com/sheaf-project/sheaf/job"
)

// An Answer is what the results of a job's blocks are merged into. It is used
// by one goroutine.
type Answer interface {
	// Add merges the result of the next block, in block order. Its error ends
	// the job: the worker's result was not one.
	Add(r sheaf.Result) error
	// WriteText and WriteJSON write the answer. They are called after the last
	// Add, and may be called more than once; they must write the same each time.
	WriteText(w io.Writer) error
	WriteJSON(w io.Writer) error
}

// A Job says what a master's blocks come to.
type Job struct {
	// New returns the answer to no block at all.
	New func() Answer
	// Split cuts the input into blocks of about size bytes; nil means as the
	// request asks. A job with a Split of its own refuses requests that ask for
	// another. Only the Data of its blocks is looked at: it is copied, so it may
	// be used again for the next one, and numbered in the order in which it
	// comes. An error that it yields is the end of the job, and the input's fault.
	// It must cut the same input into the same blocks whenever size is the same: a
	// stored job that another master goes on with is split anew.
	Split func(input io.Reader, size int) iter.Seq2[sheaf.Block, error]
	// Line returns one block's result as JSON, for those who take results as
	// they come. mayCut says that the block's edges may lie within a record, as
	// far as is known: a Split of the job's own knows better.
	Line func(r sheaf.Result, mayCut bool) (json.RawMessage, error)
	// Both says that the function's replicas take blocks, too, so that it may be
	// its own worker, as package function has it. A master that is none cannot.
	Both bool
}

// Defaults of a [Handler].
const (
	DefaultMaxInput   = 64 << 30 // bytes
	DefaultMaxBlock   = 64 << 20 // bytes
	DefaultMaxBlocks  = 4_000_000
	DefaultMaxWorkers = 1000
	DefaultMemory     = 16 << 20 // bytes
	DefaultPatience   = time.Minute

	DefaultMaxJobInput  = 1 << 30 // bytes
	DefaultMaxJobResult = 1 << 30 // bytes
	DefaultMaxJobBlocks = 100_000
)

// A Handler is a master as an http.Handler. Job, Function, Resolver and Direct
// must be set; the zero of every other field is usable. It may be used
// concurrently, and its fields must not change meanwhile.
type Handler struct {
	Job      Job
	Self     string         // name of this function; it cannot scatter to itself
	Function string         // that does the work, unless a request names another
	Resolver sheaf.Resolver // of replicas
	Direct   sheaf.Route    // straight to a replica
	Gateway  sheaf.Route    // to some replica; nil means that there is no such route
	Topic    sheaf.Route    // by messages, to some replica; nil means that there is no such route
	// AtLeast asks for n replicas of a function, and returns how many there
	// will be. When nil, the number of replicas is what it is.
	AtLeast func(ctx context.Context, function string, n int) (int, error)

	// Namespaces are those whose functions a request may name; nil means only
	// OpenFaaS's default one.
	Namespaces []string

	MaxInput   int64         // bytes of one upload; 0 means 64 GiB
	MaxBlock   int           // bytes; 0 means 64 MiB
	MaxBlocks  int           // of one job; 0 means 4,000,000
	MaxWorkers int           // that a request may ask for; 0 means 1000
	Memory     int           // bytes of blocks held for one job; 0 means 16 MiB
	Patience   time.Duration // how long an upload may stall; 0 means one minute
	// ReplicaWait is how long blocks may wait while no replica is ready; 0
	// means 30 seconds.
	ReplicaWait time.Duration
	// Turns bounds what is in flight on a replica over all jobs, which take
	// turns; nil means no bound but each job's own.
	Turns *sheaf.Turns
	// Jobs keeps the jobs that are to outlive this process, and RunJobs runs
	// them; nil means that there are none.
	Jobs *jobs.Store
	// MaxJobInput and MaxJobResult are bytes of one such job: of its upload, and
	// of the results of its blocks; 0 means 1 GiB each. MaxJobBlocks is how many
	// blocks it may have; 0 means 100,000.
	MaxJobInput, MaxJobResult int64
	MaxJobBlocks              int
	// Inputs says from where inputs may be read that requests name by a URL; nil
	// means from nowhere. InputBuckets are the object stores of JetStream that
	// they may name.
	Inputs       *egress.Policy
	InputBuckets []string

	Log *slog.Logger // nil means slog.Default
}

var _ http.Handler = (*Handler)(nil)

// withDefaults returns a copy of h with every limit set.
func (h *Handler) withDefaults() *Handler {
	c := *h
	if c.MaxInput <= 0 {
		c.MaxInput = DefaultMaxInput
	}
	for p, n := range map[*int]int{
		&c.MaxBlock: DefaultMaxBlock, &c.MaxBlocks: DefaultMaxBlocks,
		&c.MaxWorkers: DefaultMaxWorkers, &c.Memory: DefaultMemory, &c.MaxJobBlocks: DefaultMaxJobBlocks,
	} {
		if *p <= 0 {
			*p = n
		}
	}
	if c.MaxJobInput <= 0 {
		c.MaxJobInput = DefaultMaxJobInput
	}
	if c.MaxJobResult <= 0 {
		c.MaxJobResult = DefaultMaxJobResult
	}
	if c.Patience <= 0 {
		c.Patience = DefaultPatience
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &c
}

// ServeHTTP runs one job.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begun := time.Now()
	h = h.withDefaults()
	if h.Jobs != nil && (strings.HasPrefix(r.URL.Path, "/jobs/") || r.URL.Path == "/jobs") {
		h.jobs(w, r)
		return
	}
	form, p := h.admit(w, r)
	if p == nil && h.durable(w, r, form) {
		return
	}
	if p != nil {
		refuse(w, r, p)
		return
	}
	up := openUpload(w, r, inputLimit{h.MaxInput, "max_input"}, h.Patience)
	defer up.close()
	j, p := h.prepare(r, up)
	if p != nil {
		up.refuse(w, p)
		up.drain()
		return
	}
	j.begun = begun
	ctx := r.Context()
	if j.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, j.timeout, errJobTimeout)
		defer cancel()
	}
	w.Header().Set(wire.Job, j.group.Job)
	form.write(j, ctx, w)
	h.Log.LogAttrs(ctx, slog.LevelInfo, "job ended", slog.String("job", j.group.Job),
		slog.String("function", j.group.Function), slog.Int("blocks", j.done), slog.Int("replicas", len(j.from)),
		slog.Int64("bytes", up.received()), slog.Duration("elapsed", j.elapsed()), slog.Bool("ok", !j.failed))
	if j.failed {
		up.drain()
	}
}

var errJobTimeout = errors.New("the job's time is over")

// admit refuses what can be refused before the body is looked at, and says in
// which form the answer is wanted.
func (h *Handler) admit(w http.ResponseWriter, r *http.Request) (*form, *wire.Problem) {
	if n := len(r.RequestURI); n > maxURI {
		return nil, wire.Refuse(http.StatusRequestURITooLong, "uri_too_long",
			fmt.Sprintf("the URL is %d bytes long, and may be %d; send the input as the body", n, maxURI)).Within(maxURI)
	}
	if r.URL.Path != "/" && r.URL.Path != "" {
		return nil, wire.Refuse(http.StatusNotFound, wire.CodeNotFound,
			fmt.Sprintf("the master has nothing at %q; post the input to its root", wire.Cut(r.URL.Path)))
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return nil, wire.Refuse(http.StatusMethodNotAllowed, wire.CodeMethod,
			fmt.Sprintf("the master takes its input by POST, not by %s", wire.Cut(r.Method)))
	}
	return negotiate(r.Header.Values("Accept"))
}

const maxURI = 8 << 10

// A job is one upload on its way.
type job struct {
	h        *Handler
	group    sheaf.Group
	split    sheaf.Splitter
	up       *upload
	params   params
	length   int64 // of the input, -1 when it is not known
	output   string
	timeout  time.Duration
	workers  int // that it asks for, 0 when it does not
	tolerate tolerance
	begun    time.Time
	took     time.Duration // of a job that is over
	// source yields the results of a job that is over; nil means to scatter.
	source func(context.Context) iter.Seq2[sheaf.Result, error]
	sum    *summary // of a job that is over
	stored []int    // blocks whose results source yields

	done       int // blocks that have a result
	bytes      int64
	from       map[string]bool // replicas that answered
	unverified int
	failed     bool
}

func (j *job) elapsed() time.Duration {
	if j.took > 0 {
		return j.took
	}
	return time.Since(j.begun)
}

// mayCut says whether a block may begin or end within a line.
func (j *job) mayCut() bool {
	return j.split.By == "bytes" || j.split.By == "records" || j.h.Job.Split != nil
}

// results scatters the blocks, and counts what comes back.
func (j *job) results(ctx context.Context) iter.Seq2[sheaf.Result, error] {
	return func(yield func(sheaf.Result, error) bool) {
		source := j.source
		if source == nil {
			source = func(ctx context.Context) iter.Seq2[sheaf.Result, error] {
				return j.group.Scatter(ctx, j.blocks(j.up))
			}
		}
		for r, err := range source(ctx) {
			if err != nil {
				j.up.leave() // Scatter waits for whoever reads the upload
				if cause := context.Cause(ctx); errors.Is(cause, errJobTimeout) {
					err = cause // attempts that it cut short may have failed the block first
				} else if cause != nil {
					err = cmp.Or(j.up.broken(), err)
				}
				yield(r, err)
				return
			}
			j.done++
			j.bytes += int64(r.Bytes)
			j.from[r.From] = true
			if !r.Verified {
				j.unverified++
			}
			if !yield(r, nil) {
				j.up.leave()
				return
			}
		}
	}
}

// blocks splits the input.
func (j *job) blocks(input io.Reader) iter.Seq2[sheaf.Block, error] {
	if j.h.Job.Split == nil {
		return j.split.Split(input)
	}
	return func(yield func(sheaf.Block, error) bool) {
		in := &reading{r: input}
		next, offset := 0, int64(0)
		left := false
		err := j.guard(func() error {
			for b, err := range j.h.Job.Split(in, j.split.Size) {
				switch n := len(b.Data); {
				case err != nil:
					return cmp.Or(in.err, err)
				case n > j.h.MaxBlock:
					return wire.Refuse(http.StatusUnprocessableEntity, "record_too_long",
						fmt.Sprintf("the function's Split made a block of %d bytes at byte %d, over the limit of %d; raise max_block, or split the input finer",
							n, offset, j.h.MaxBlock)).About("split").Within(j.h.MaxBlock)
				case next == j.h.MaxBlocks:
					return sheaf.ErrTooManyBlocks
				}
				b = sheaf.Block{Index: next, Offset: offset, Data: bytes.Clone(b.Data)}
				next++
				offset += int64(len(b.Data))
				if !yield(b, nil) {
					left = true
					return nil
				}
			}
			if in.err == nil && !in.end { // as bufio.Scanner does at a line that is too long for it
				if n, _ := io.ReadFull(in, make([]byte, 1)); n > 0 {
					return fmt.Errorf("its Split ended after %d bytes of blocks, before the input did", offset)
				}
			}
			return in.err // which the Split may have taken for the end
		})
		if err != nil && !left {
			yield(sheaf.Block{}, split(err))
		}
	}
}

// split tells errors of a function's own Split from others.
func split(err error) error {
	if _, ok := errors.AsType[*wire.Problem](err); ok || errors.Is(err, errPanicked) || errors.Is(err, sheaf.ErrTooManyBlocks) {
		return err
	}
	return wire.Refuse(http.StatusUnprocessableEntity, "malformed_input", fmt.Sprintf("the function cannot split the input: %v", err)).About("split")
}

// reading keeps how a reader ended.
type reading struct {
	r   io.Reader
	err error // not io.EOF
	end bool
}

func (r *reading) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	switch err {
	case nil:
	case io.EOF:
		r.end = true
	default:
		r.err = err
	}
	return n, err
}

// merge merges results, in block order, as they come. Beside a
// *sheaf.PartialError it returns what the blocks come to that are there.
func (j *job) merge(results iter.Seq2[sheaf.Result, error]) (Answer, error) {
	var answer Answer
	if err := j.guard(func() error { answer = j.h.Job.New(); return nil }); err != nil {
		return nil, err
	}
	for r, err := range sheaf.InOrder(results) {
		if err != nil {
			return answer, err
		}
		if err := j.guard(func() error { return answer.Add(r) }); err != nil {
			return nil, badResult(r, err)
		}
	}
	return answer, nil
}

func badResult(r sheaf.Result, err error) error {
	return &sheaf.BlockError{Index: r.Index, Offset: r.Offset, Bytes: r.Bytes, Attempts: r.Attempts,
		Err: fmt.Errorf("the result that replica %s gave cannot be merged: %w", r.From, err)}
}

var errPanicked = errors.New("the master's job panicked; its log has the stack")

// guard calls a function of the Job. A panic is an error: it must not pass
// through a scatter, which waits for an upload that nobody would end.
func (j *job) guard(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			j.h.Log.Error("job panicked", "job", j.group.Job, "panic", v, "stack", string(debug.Stack()))
			err = errPanicked
		}
	}()
	return f()
}

// numbers sets the headers that tell how the job went.
func (j *job) numbers(h http.Header) {
	h.Set(wire.Blocks, strconv.Itoa(j.done))
	h.Set(wire.Replicas, strconv.Itoa(len(j.from)))
	h.Set(wire.Unverified, strconv.Itoa(j.unverified))
	h.Set(wire.Elapsed, milliseconds(j.elapsed()))
}

// milliseconds writes a duration as in "12.345ms".
func milliseconds(d time.Duration) string {
	return strconv.FormatFloat(float64(d)/float64(time.Millisecond), 'f', 3, 64) + "ms"
}

// missing is a block that has no result, in a refusal.
type missing struct {
	Block    int    `json:"block"`
	Offset   int64  `json:"offset"`
	Bytes    int    `json:"bytes"`
	Attempts int    `json:"attempts"`
	Error    string `json:"error"`
}

// missingOf lists the first blocks without a result.
func missingOf(e *sheaf.PartialError, most int) []missing {
	list := make([]missing, 0, min(len(e.Missing), most))
	for _, m := range e.Missing[:cap(list)] {
		list = append(list, missing{m.Index, m.Offset, m.Bytes, m.Attempts, m.Err.Error()})
	}
	return list
}

// lacking returns why an answer lacks blocks that may be lacking in it: e is
// nil when it lacks none, and over says that it lacks more than may be. An err
// that has other reasons is returned as it is.
func (j *job) lacking(err error) (e *sheaf.PartialError, over bool, _ error) {
	e, ok := errors.AsType[*sheaf.PartialError](err)
	if !ok || !j.tolerate.given || len(e.Stopped) > 0 {
		return nil, false, err
	}
	total := max(e.Total, e.Done+len(e.Missing))
	return e, !j.tolerate.allows(total-e.Done, total), nil
}

// problem makes a refusal of whatever ended the job.
func (j *job) problem(err error) *wire.Problem {
	p := j.classify(err)
	p.Job = j.group.Job
	return p
}

func (j *job) classify(err error) *wire.Problem {
	if p, ok := errors.AsType[*wire.Problem](err); ok { // of reading the upload
		c := *p
		return &c
	}
	name := j.group.Function
	switch {
	case errors.Is(err, errJobTimeout):
		return wire.Refuse(http.StatusGatewayTimeout, "job_timeout",
			fmt.Sprintf("the job did not end within %v, its timeout; give it more time or more workers", j.timeout)).
			About("timeout").Within(j.timeout.String())
	case errors.Is(err, errPanicked):
		return wire.Refuse(http.StatusInternalServerError, "job_panicked", err.Error())
	case errors.Is(err, sheaf.ErrTooManyBlocks):
		p := wire.Refuse(http.StatusUnprocessableEntity, "too_many_blocks",
			fmt.Sprintf("the input makes more than %d blocks of %d bytes", j.h.MaxBlocks, j.split.Size)).
			About("block").Within(j.h.MaxBlocks)
		if j.length > 0 {
			p.Detail += fmt.Sprintf("; block=%d is large enough", enough(j.length, j.h.MaxBlocks))
		} else {
			p.Detail += "; take larger blocks"
		}
		return p
	case errors.Is(err, sheaf.ErrNoFunction):
		return wire.Refuse(http.StatusNotFound, wire.CodeNoFunction,
			fmt.Sprintf("function %q is not deployed; deploy it, or name another with function=", name)).About("function")
	case errors.Is(err, sheaf.ErrNoReplica):
		return wire.Refuse(http.StatusServiceUnavailable, wire.CodeNoReplicas,
			fmt.Sprintf("%v; see the log of %s, or scale it up", err, name)).After(5 * time.Second)
	}
	if e, ok := errors.AsType[*sheaf.RecordError](err); ok {
		if errors.Is(e, sheaf.ErrRecordTooLong) {
			return wire.Refuse(http.StatusUnprocessableEntity, "record_too_long",
				fmt.Sprintf("the record at byte %d is longer than the limit of %d bytes; ask for blocks that it fits into (block=, up to %d), or for split=bytes",
					e.Offset, e.Limit, j.h.MaxBlock)).About("split").Within(e.Limit)
		}
		return wire.Refuse(http.StatusUnprocessableEntity, "malformed_input", e.Error()).About("split")
	}
	if e, ok := errors.AsType[*sheaf.PartialError](err); ok {
		p := wire.Refuse(http.StatusFailedDependency, "blocks_failed", e.Error())
		if j.group.Verified && errors.Is(err, sheaf.ErrUnverified) {
			p = wire.Refuse(http.StatusFailedDependency, "unverified_results",
				fmt.Sprintf("%s answers without Content-Digest, so that nothing proves that its results are whole, as verify=require asks; have it send the header (docs/ANY-LANGUAGE.md), or leave verify=require out", name)).About("verify")
		}
		p.Missing = missingOf(e, 100)
		return p
	}
	if e, ok := errors.AsType[*sheaf.BlockError](err); ok {
		return wire.Refuse(http.StatusBadGateway, "bad_result", e.Error())
	}
	return wire.Refuse(http.StatusInternalServerError, "job_failed", err.Error())
}

// enough is a block size with which no input of n bytes makes more than most
// blocks: of two neighbouring blocks one is more than half full.
func enough(n int64, most int) int64 {
	return max(1, 2*n/int64(most)+1)
}
