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
}

var _ http.Handler = (*Handler)(nil)

// A Call is what a Func may want to know beside its block.
type Call struct {
	Job     string // names the job; "" when the caller knows nothing of sheaf
	Attempt int    // at this block, from 1
	Rank    int    // of this replica in the caller's view, from 0
	Size    int    // of that view; 0 when the caller had none
	Epoch   uint64 // of that view
}

type callKey struct{}

// CallOf returns the call that ctx, as a Func was given it, belongs to.
func CallOf(ctx context.Context) Call {
	c, _ := ctx.Value(callKey{}).(Call)
	return c
}

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
// which blocks and results are signed).
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
	result, proof, p := h.serve(w, r, begun)
	if p != nil {
		if r.Context().Err() == nil {
			h.log().LogAttrs(r.Context(), slog.LevelDebug, "block refused", slog.String("job", wire.Cut(r.Header.Get(wire.Job))),
				slog.String("block", wire.Cut(r.Header.Get(wire.Block))), slog.String("code", p.Code), slog.String("why", p.Detail))
		}
		p.Write(w)
		return
	}
	head := w.Header()
	head["Content-Type"] = []string{"application/octet-stream"}
	head["Content-Length"] = []string{strconv.Itoa(len(result))}
	digest := wire.Sum(result)
	head[wire.Digest] = []string{digest}
	if proof.Signed() {
		head[wire.Signature] = []string{proof.Answer(head.Get(wire.Replica), digest)}
	}
	// A caller who does not read must not keep the replica busy for ever. The
	// server lifts the deadline for the connection's next block.
	_ = control.SetWriteDeadline(time.Now().Add(h.patience()))
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

func (h *Handler) serve(w http.ResponseWriter, r *http.Request, begun time.Time) (result []byte, proof wire.Proof, p *wire.Problem) {
	if r.URL.Path != "/" && r.URL.Path != "" {
		return nil, proof, wire.Refuse(http.StatusNotFound, wire.CodeNotFound, "a worker takes blocks at / only")
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return nil, proof, wire.Refuse(http.StatusMethodNotAllowed, wire.CodeMethod, "a worker takes blocks by POST only")
	}
	e, err := wire.Open(r.Header)
	if err != nil {
		return nil, proof, wire.Refuse(http.StatusBadRequest, wire.CodeEnvelope, err.Error())
	}
	if proof, p = h.signer.Verify(e, h.function, r.Header.Get(wire.Digest), r.Header[wire.Signature], begun); p != nil {
		return nil, proof, p
	}
	data, p := h.read(w, r)
	if p != nil {
		return nil, proof, p
	}
	digested, err := wire.Check(r.Header, data)
	if err == nil && proof.Signed() && !digested {
		err = errors.New("its Content-Digest is none that we know")
	}
	if err != nil {
		return nil, proof, wire.Refuse(http.StatusBadRequest, wire.CodeDamaged,
			fmt.Sprintf("the block arrived damaged: %v; send it again", err))
	}
	ctx := context.WithValue(r.Context(), callKey{}, Call{Job: e.Job, Attempt: e.Attempt, Rank: e.Rank, Size: e.Size, Epoch: e.Epoch})
	limit := e.Left
	if limit > 0 { // the caller counts from when it began to send
		limit = max(limit-time.Since(begun), time.Millisecond)
	}
	if h.MaxTime > 0 && (limit == 0 || h.MaxTime < limit) {
		limit = h.MaxTime
	}
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	result, err = h.call(ctx, sheaf.Block{Index: e.Block, Data: data})
	if err == nil {
		return result, proof, nil
	}
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
	return nil, proof, p
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

// read reads the body, which must come whole, soon, and within the limit.
func (h *Handler) read(w http.ResponseWriter, r *http.Request) ([]byte, *wire.Problem) {
	most := h.MaxBlock
	if most <= 0 {
		most = DefaultMaxBlock
	}
	tooLarge := func() ([]byte, *wire.Problem) {
		return nil, wire.Refuse(http.StatusRequestEntityTooLarge, wire.CodeTooLarge,
			fmt.Sprintf("the block is over the limit of %d bytes, which max_block sets; take smaller blocks", most)).Within(most)
	}
	if r.ContentLength > most {
		return tooLarge()
	}
	data, err := wire.ReadBody(r.Body, r.ContentLength, most) // to its end, so that the server watches for the caller to leave
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, wire.Refuse(http.StatusRequestTimeout, wire.CodeSlow,
			fmt.Sprintf("the block did not arrive within %v, which read_timeout sets", h.patience())).Within(h.patience().String())
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	if err != nil {
		return nil, wire.Refuse(http.StatusBadRequest, wire.CodeTruncated, fmt.Sprintf("the block was cut: %v", err))
	}
	if int64(len(data)) > most {
		return tooLarge()
	}
	return data, nil
}
