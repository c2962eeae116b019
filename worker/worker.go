// Package worker is the far end of a scatter: it makes a function of Go, which
// turns a block into a result, a function of OpenFaaS.
//
//	func main() {
//		worker.Main(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
//			return bytes.ToUpper(b.Data), nil
//		})
//	}
//
// The process is its own server, with health, readiness, limits and draining,
// so its image needs no watchdog and holds standard-library code only.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A Func works on one block. It may be called concurrently, and more than once
// for the same block. ctx ends when the caller has gone or given up, and when
// the time for the attempt is over. Func may keep or change b.Data.
//
// An error is an answer, too: the caller tries again, on another replica, a
// few times. [Reject] makes one that is final.
type Func func(ctx context.Context, b sheaf.Block) ([]byte, error)

// Defaults of a [Handler].
const (
	DefaultMaxBlock    = 128 << 20        // bytes
	DefaultReadTimeout = 60 * time.Second // for the body of one block
)

// A Handler is a Func as an http.Handler. The zero value of each field but
// Func is usable.
type Handler struct {
	Func Func
	// MaxBlock is how long a block may be, in bytes; 0 means 128 MiB.
	MaxBlock int64
	// ReadTimeout is for the arrival of a block, and for the result to leave; 0
	// means one minute.
	ReadTimeout time.Duration
	// MaxTime is how long Func may take; 0 means as long as the caller waits.
	MaxTime time.Duration
	Log     *slog.Logger // nil means slog.Default

	signer   *wire.Signer // nil when nothing is signed
	function string       // that this is, for its signatures

	siblings *siblings // nil when they are not known
}

var _ http.Handler = (*Handler)(nil)

// A Call is what a Func may want to know beside its block.
type Call struct {
	Job     string // names the job; "" when the caller knows nothing of sheaf
	Attempt int    // at this block, from 1
	Rank    int    // of this replica in the caller's view, from 0
	Size    int    // of that view; 0 when the caller had none
	Epoch   uint64 // of that view
	Trace   string // W3C's traceparent, to be handed on to whom the Func calls; "" without one
}

type callKey struct{}

// CallOf returns the call that ctx, as a Func was given it, belongs to.
func CallOf(ctx context.Context) Call {
	c, _ := ctx.Value(callKey{}).(call)
	return c.Call
}

// call is what a context holds.
type call struct {
	Call
	saved    []byte
	siblings *siblings
}

// Saved returns what the Func has saved of its work at this block when it was
// called for it before, or nil. See [Save].
func Saved(ctx context.Context) []byte {
	c, _ := ctx.Value(callKey{}).(call)
	return c.saved
}

// Save makes the error with which a Func returns when it has done a part of its
// work: state is what it needs to go on. It is called again with the same block
// and the state, which [Saved] returns; on another replica if this one dies
// meanwhile, so that no more is lost than what was done since. Each time costs
// the way of the block and the state to the caller and back, and so a Func does
// well to save every few seconds; each of its parts has the time of a whole
// attempt.
//
// A caller that cannot take a state does not see it: the Func is called again at
// once, here. A Func that saves must leave b.Data as it is.
func Save(state []byte) error { return saved{state} }

type saved struct{ state []byte }

func (saved) Error() string { return "the work was saved, and is not done" }

type rejection struct{ error }

func (r rejection) Unwrap() error { return r.error }

// Reject says that the block itself is bad: it is not tried again, and the
// caller is told err.
func Reject(err error) error { return rejection{err} }

// Main runs f as a function of OpenFaaS, and ends the process when it is told
// to. It reads the environment: port, max_inflight, exec_timeout (the longest
// that f may take), read_timeout (for a block to arrive), write_timeout (for
// running calls to end after SIGTERM), healthcheck_interval (how long new calls
// are taken after SIGTERM), max_block (bytes), sheaf_key_file (a secret, with
// which blocks and results are signed), replicas_url (where the record of
// replicas is, for calls of ranks and [Siblings]), hello_url (where the replica
// announces itself, for providers that tell no addresses).
func Main(f Func) {
	os.Exit(serve.Main(func(getenv func(string) string) (*serve.Server, func(), error) {
		s, err := Env(f, getenv)
		return s, func() {}, err
	}))
}

// Env is the server of f as a function of OpenFaaS, by the environment that Main
// reads. Its error names the variable, its value and what was expected.
func Env(f Func, getenv func(string) string) (*serve.Server, error) {
	s, err := serve.Env(getenv)
	if err != nil {
		return nil, err
	}
	v := serve.Vars{Getenv: getenv}
	s.Handler = &Handler{
		Func:        f,
		MaxBlock:    int64(v.Int("max_block", DefaultMaxBlock, 1, 1<<31-1)),
		ReadTimeout: v.Duration("read_timeout", DefaultReadTimeout),
		MaxTime:     v.Duration("exec_timeout", 0),
		signer:      s.Signer,
		function:    s.Function,
		siblings:    newSiblings(s),
	}
	return s, v.Err
}

// ServeHTTP reads a block, calls Func and sends its result with its length and
// digest.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begun := time.Now()
	control := http.NewResponseController(w)
	// Not every ResponseWriter can, so the error is not looked at, here and below.
	_ = control.SetReadDeadline(begun.Add(h.patience()))
	result, more, proof, p := h.serve(w, r, begun)
	if p != nil {
		h.refused(r.Context(), r.Header, p).Write(w)
		return
	}
	head := w.Header()
	head["Content-Type"] = []string{"application/octet-stream"}
	head["Content-Length"] = []string{strconv.Itoa(len(result))}
	digest := wire.Sum(result)
	head[wire.Digest] = []string{digest}
	if proof.Signed() {
		head[wire.Signature] = []string{proof.Answer(head.Get(wire.Replica), wire.Content(digest, more))}
	}
	// A caller who does not read must not keep the replica busy for ever. The
	// server lifts the deadline for the connection's next block.
	_ = control.SetWriteDeadline(time.Now().Add(h.patience()))
	if more {
		head[wire.Saved] = []string{"0"}
		w.WriteHeader(http.StatusAccepted)
	}
	_, _ = w.Write(result) // the caller sees by the digest what it got
}

func (h *Handler) patience() time.Duration {
	if h.ReadTimeout > 0 {
		return h.ReadTimeout
	}
	return DefaultReadTimeout
}

func (h *Handler) log() *slog.Logger {
	if h.Log != nil {
		return h.Log
	}
	return slog.Default()
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request, begun time.Time) (result []byte, more bool, proof wire.Proof, p *wire.Problem) {
	if r.URL.Path != "/" && r.URL.Path != "" {
		return nil, false, proof, wire.Refuse(http.StatusNotFound, wire.CodeNotFound, "a worker takes blocks at / only")
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return nil, false, proof, wire.Refuse(http.StatusMethodNotAllowed, wire.CodeMethod, "a worker takes blocks by POST only")
	}
	a, p := h.admit(r.Header, begun)
	if p != nil {
		return nil, false, proof, p
	}
	if r.ContentLength > h.most() {
		return nil, false, proof, h.tooLarge()
	}
	data, err := wire.ReadBody(r.Body, r.ContentLength, h.most()) // to its end, so that the server watches for the caller to leave
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	}
	result, more, p = h.work(r.Context(), a, r.Header, data, err, begun)
	return result, more, a.Proof, p
}

// admit looks at the header of a block.
func (h *Handler) admit(header http.Header, begun time.Time) (a serve.Admission, p *wire.Problem) {
	e, err := wire.Open(header)
	if err != nil {
		return a, wire.Refuse(http.StatusBadRequest, wire.CodeEnvelope, err.Error())
	}
	proof, p := h.signer.Verify(e, h.function, header.Get(wire.Digest), header[wire.Signature], begun)
	return serve.Admission{Envelope: e, Proof: proof}, p
}

// The short way of internal/serve for blocks: Room, Admit and ServeBlock do what
// ServeHTTP does.
var _ serve.BlockHandler = (*Handler)(nil)

// Room returns how long a block may be, in bytes, and how long it may take to
// arrive and its result to leave. It is for the server of this module.
func (h *Handler) Room() (most int64, patience time.Duration) { return h.most(), h.patience() }

// Admit looks at the header of a block before it is read. It is for the server
// of this module.
func (h *Handler) Admit(header http.Header, begun time.Time) (serve.Admission, *wire.Problem) {
	a, p := h.admit(header, begun)
	return a, h.refused(context.Background(), header, p)
}

// ServeBlock works on a block that was admitted. It is for the server of this
// module.
func (h *Handler) ServeBlock(ctx context.Context, a serve.Admission, header http.Header, block []byte, readErr error, begun time.Time) ([]byte, bool, *wire.Problem) {
	result, more, p := h.work(ctx, a, header, block, readErr, begun)
	return result, more, h.refused(ctx, header, p)
}

// refused logs a refusal that somebody is told, and returns it.
func (h *Handler) refused(ctx context.Context, header http.Header, p *wire.Problem) *wire.Problem {
	if p != nil && ctx.Err() == nil {
		h.log().LogAttrs(ctx, slog.LevelDebug, "block refused", slog.String("job", wire.Cut(header.Get(wire.Job))),
			slog.String("block", wire.Cut(header.Get(wire.Block))), slog.String("code", p.Code), slog.String("why", p.Detail))
	}
	return p
}

// work calls Func with a block, of which readErr says why it did not come
// whole.
func (h *Handler) work(parent context.Context, a serve.Admission, header http.Header, data []byte, readErr error, begun time.Time) (result []byte, more bool, _ *wire.Problem) {
	switch {
	case errors.Is(readErr, os.ErrDeadlineExceeded):
		return nil, false, wire.Refuse(http.StatusRequestTimeout, wire.CodeSlow,
			fmt.Sprintf("the block did not arrive within %v, which read_timeout sets", h.patience())).Within(h.patience().String())
	case readErr != nil:
		return nil, false, wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, fmt.Sprintf("the block was cut: %v", readErr))
	case int64(len(data)) > h.most():
		return nil, false, h.tooLarge()
	case a.Envelope.Saved > len(data):
		return nil, false, wire.Refuse(http.StatusBadRequest, wire.CodeEnvelope,
			fmt.Sprintf("header %s is %d, and the body has %d bytes", wire.Saved, a.Envelope.Saved, len(data)))
	}
	digested, err := wire.Check(header, data)
	if err == nil && a.Proof.Signed() && !digested {
		err = errors.New("its Content-Digest is none that we know")
	}
	if err != nil {
		return nil, false, wire.Refuse(http.StatusBadRequest, wire.CodeDamaged,
			fmt.Sprintf("the block arrived damaged: %v; send it again", err))
	}
	e := a.Envelope
	what := call{Call: Call{Job: e.Job, Attempt: e.Attempt, Rank: e.Rank, Size: e.Size, Epoch: e.Epoch, Trace: e.Trace}, siblings: h.siblings}
	what.saved, data = data[:e.Saved:e.Saved], data[e.Saved:]
	limit := e.Left
	if limit > 0 { // the caller counts from when it began to send
		limit = max(limit-time.Since(begun), time.Millisecond)
	}
	if h.MaxTime > 0 && (limit == 0 || h.MaxTime < limit) {
		limit = h.MaxTime
	}
	ctx := &blockCtx{parent: parent, call: what}
	if limit > 0 {
		ctx.deadline = time.Now().Add(limit)
	}
	defer ctx.end()
	result, err = h.call(ctx, sheaf.Block{Index: e.Block, Data: data})
	for part, ok := errors.AsType[saved](err); ok; part, ok = errors.AsType[saved](err) {
		if e.MaySave {
			return part.state, true, nil
		}
		what.saved = part.state
		result, err = h.call(context.WithValue(ctx, callKey{}, what), sheaf.Block{Index: e.Block, Data: data})
	}
	if err == nil {
		return result, false, nil
	}
	var p *wire.Problem
	switch {
	case errors.As(err, &rejection{}):
		p = wire.Refuse(http.StatusUnprocessableEntity, wire.CodeRejected, err.Error())
	case errors.Is(err, errPanicked):
		p = wire.Refuse(http.StatusInternalServerError, wire.CodePanicked, err.Error())
	case ctx.Err() != nil:
		p = wire.Refuse(http.StatusGatewayTimeout, wire.CodeDeadline,
			fmt.Sprintf("the handler did not end within %v, the time for this attempt; take smaller blocks or more time", limit.Round(time.Millisecond)))
	default:
		p = wire.Refuse(http.StatusInternalServerError, wire.CodeFailed, err.Error())
	}
	p.Job = e.Job
	return nil, false, p
}

var errPanicked = errors.New("the handler panicked; its log has the stack")

// call calls Func. A panic is an error: the process lives on.
func (h *Handler) call(ctx context.Context, b sheaf.Block) (result []byte, err error) {
	defer func() {
		if v := recover(); v != nil {
			h.log().Error("handler panicked", "block", b.Index, "panic", v, "stack", string(debug.Stack()))
			err = errPanicked
		}
	}()
	return h.Func(ctx, b)
}

func (h *Handler) most() int64 {
	if h.MaxBlock > 0 {
		return h.MaxBlock
	}
	return DefaultMaxBlock
}

func (h *Handler) tooLarge() *wire.Problem {
	return wire.Refuse(http.StatusRequestEntityTooLarge, wire.CodeTooLarge,
		fmt.Sprintf("the block is over the limit of %d bytes, which max_block sets; take smaller blocks", h.most())).Within(h.most())
}
