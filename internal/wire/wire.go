// Package wire is the one place that knows how sheaf's messages look on the
// wire: header names, digests, problem bodies, and how a Request is an HTTP
// message. docs/WIRE.md is its manual for other languages.
//
// It imports the standard library only, because workers are built on it.
package wire

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
)

// Version is the version of the wire protocol, as /_/sheaf tells it.
const Version = 1

// Headers of a request that carries a block, and of its answer.
const (
	Job      = "Sheaf-Job"      // names the job
	Block    = "Sheaf-Block"    // index of the block, from 0; in a broadcast the rank
	Attempt  = "Sheaf-Attempt"  // at the block, from 1
	To       = "Sheaf-To"       // function/replica: the addressee
	Epoch    = "Sheaf-Epoch"    // of the view
	Rank     = "Sheaf-Rank"     // of the addressee in the view, from 0
	Size     = "Sheaf-Size"     // of the view
	Hop      = "Sheaf-Hop"      // a replica passed the request on by its rank; it is not passed on again
	Deadline = "Sheaf-Deadline" // milliseconds left for the attempt, so clocks need not agree
	Replica  = "Sheaf-Replica"  // in an answer: the ID of the replica that gave it
	Saved    = "Sheaf-Saved"    // bytes at the start of the body that the handler saved; 0 says that it may
	Digest   = "Content-Digest" // RFC 9530, sha-256 over the whole body, both ways
	Trace    = "Traceparent"    // W3C's trace context of the attempt
	Code     = "Sheaf-Code"     // in a refusal: the code of its problem body
	RetryMS  = "Sheaf-Retry"    // milliseconds, beside Retry-After, which counts seconds
)

// Headers of the answer of a master.
const (
	Blocks   = "Sheaf-Blocks"   // how many blocks the input made
	Replicas = "Sheaf-Replicas" // how many replicas answered
	Missing  = "Sheaf-Missing"  // indexes of the blocks that have no result, where that is tolerated
	// Unverified is how many blocks have results that no digest proves.
	Unverified = "Sheaf-Unverified"
	Elapsed    = "Sheaf-Elapsed" // from the first byte read to the last block merged, as in "12.5ms"
)

// Codes that a worker answers with and a route understands.
const (
	CodeDamaged      = "block_damaged"    // the body is not what its digest says
	CodeMisdirected  = "wrong_replica"    // the request is another replica's
	CodeBusy         = "busy"             // at max_inflight
	CodeDraining     = "draining"         // about to end
	CodeEnvelope     = "bad_envelope"     // a Sheaf- header that cannot be
	CodeTooLarge     = "block_too_large"  // over the worker's limit
	CodeRejected     = "block_rejected"   // by the handler
	CodeFailed       = "handler_failed"   // the handler returned an error
	CodePanicked     = "handler_panicked" // the handler panicked
	CodeDeadline     = "deadline_exceeded"
	CodeNotFound     = "not_found"
	CodeMethod       = "method_not_allowed"
	CodeTruncated    = "truncated_upload"
	CodeSlow         = "upload_too_slow"
	CodeNoFunction   = "function_not_found"
	CodeNoReplicas   = "no_replicas"
	CodeNoRank       = "no_such_rank"
	CodeNoRecord     = "replicas_unknown" // the record of replicas cannot be read
	CodeBadFunction  = "bad_function_name"
	CodeUnreachable  = "replica_unreachable"
	CodeBadParameter = "bad_parameter"
)

// An Envelope is what the headers of a request say about its body.
type Envelope struct {
	Job      string
	Block    int
	Attempt  int
	Function string // of the addressee; "" when anybody may answer
	Replica  string // ID of the addressee; "" when any replica may answer
	Rank     int
	Size     int // 0 when the sender knew no view
	Epoch    uint64
	Trace    string        // W3C's traceparent; "" without one
	Left     time.Duration // until the deadline; 0 when there is none
	Saved    int           // bytes at the start of the body that the handler saved before
	MaySave  bool          // the sender takes an answer that is not the last
}

// Seal returns the envelope of req at the given time.
func Seal(req *sheaf.Request, now time.Time) Envelope {
	e := Envelope{Job: req.Job, Block: req.Index, Attempt: req.Attempt, Rank: req.Rank, Size: req.Size, Epoch: req.Epoch, Trace: req.Trace}
	if req.To.ID != "" {
		e.Function, e.Replica = req.Function, req.To.ID
	}
	if !req.Deadline.IsZero() {
		e.Left = max(req.Deadline.Sub(now), time.Millisecond)
	}
	return e
}

// Append appends the envelope to b as header fields: a line for each, with the
// carriage return and line feed that end it.
func (e Envelope) Append(b []byte) []byte {
	b = appendField(b, Job, e.Job)
	b = appendNumber(b, Block, uint64(e.Block))
	b = appendNumber(b, Attempt, uint64(e.Attempt))
	if e.Replica != "" {
		b = append(append(append(b, To+": "...), e.Function...), '/')
		b = append(append(b, e.Replica...), "\r\n"...)
	}
	if e.Size > 0 {
		b = appendNumber(b, Rank, uint64(e.Rank))
		b = appendNumber(b, Size, uint64(e.Size))
		b = appendNumber(b, Epoch, e.Epoch)
	}
	if e.Trace != "" {
		b = appendField(b, Trace, e.Trace)
	}
	if ms := e.left(); ms > 0 {
		b = appendNumber(b, Deadline, uint64(ms))
	}
	return b
}

func appendField(b []byte, key, value string) []byte {
	return append(append(append(append(b, key...), ": "...), value...), "\r\n"...)
}

func appendNumber(b []byte, key string, n uint64) []byte {
	return append(strconv.AppendUint(append(append(b, key...), ": "...), n, 10), "\r\n"...)
}

// left is Left as it travels, in milliseconds.
func (e Envelope) left() int64 {
	if e.Left <= 0 {
		return 0
	}
	return max(1, e.Left.Milliseconds())
}

// Open reads the envelope from h. A request without Sheaf- headers is a plain
// call by somebody who knows nothing of sheaf, and has the zero Envelope. The
// error says which header cannot be, and why.
func Open(h http.Header) (Envelope, error) {
	var e Envelope
	var err error
	number := func(key string, most uint64) uint64 {
		v := h.Get(key)
		if v == "" {
			return 0
		}
		n, bad := strconv.ParseUint(v, 10, 64)
		if err == nil && (bad != nil || n > most) {
			err = fmt.Errorf("header %s is %q, and must be a number from 0 to %d", key, Cut(v), most)
		}
		return n
	}
	e.Block = int(number(Block, 1<<40))
	e.Attempt = int(number(Attempt, 1<<30))
	e.Rank = int(number(Rank, 1<<30))
	e.Size = int(number(Size, 1<<30))
	e.Epoch = number(Epoch, 1<<63)
	e.Left = time.Duration(number(Deadline, 1<<40)) * time.Millisecond
	e.Saved = int(number(Saved, 1<<40))
	e.MaySave = h[Saved] != nil
	if err != nil {
		return Envelope{}, err
	}
	e.Job = h.Get(Job)
	if len(e.Job) > 64 {
		return Envelope{}, fmt.Errorf("header %s is %d bytes long, and may be 64", Job, len(e.Job))
	}
	if e.Size > 0 && e.Rank >= e.Size {
		return Envelope{}, fmt.Errorf("header %s is %d, and must be below %s, which is %d", Rank, e.Rank, Size, e.Size)
	}
	if t := h.Get(Trace); sheaf.IsTrace(t) { // as W3C has it, what is none is as if it were not there
		e.Trace = t
	}
	if to := h.Get(To); to != "" {
		function, replica, ok := strings.Cut(to, "/")
		if !ok || replica == "" {
			return Envelope{}, fmt.Errorf("header %s is %q, and must be function/replica", To, Cut(to))
		}
		e.Function, e.Replica = function, replica
	}
	return e, nil
}

// Cut shortens a value that came from outside to 64 bytes, for messages.
func Cut(s string) string {
	if len(s) > 64 {
		return s[:61] + "..."
	}
	return s
}

// Sum returns the value of Content-Digest for body.
func Sum(body []byte) string {
	return string(appendSum(make([]byte, 0, 64), body))
}

func appendSum(b, body []byte) []byte {
	sum := sha256.Sum256(body)
	b = append(b, "sha-256=:"...)
	b = base64.StdEncoding.AppendEncode(b, sum[:])
	return append(b, ':')
}

// AppendResult appends to b the header fields of the answer that carries a
// worker's result, but for its length and the replica's name, in the form that
// [Envelope.Append] has. proof is of the request.
// With more it is not the result, but what the handler saved.
func AppendResult(b []byte, replica string, proof Proof, result []byte, more bool) []byte {
	b = append(b, "Content-Type: application/octet-stream\r\n"+Digest+": "...)
	digest := len(b)
	b = appendSum(b, result)
	end := len(b)
	b = append(b, "\r\n"...)
	if proof.Signed() {
		b = appendField(b, Signature, proof.Answer(replica, Content(string(b[digest:end]), more)))
	}
	return b
}

// Content is what the signature of an answer is over: its digest, and whether
// it is what the handler saved, which must not pass for a result.
func Content(digest string, more bool) string {
	if more {
		return "saved " + digest
	}
	return digest
}

// Body is the body of the message that carries req: what was saved, and the
// block.
func Body(req *sheaf.Request) []byte {
	if len(req.Saved) == 0 {
		return req.Body
	}
	return append(req.Saved[:len(req.Saved):len(req.Saved)], req.Body...)
}

// errDigest says that a body is not what its digest says.
var errDigest = errors.New("body does not match its Content-Digest")

// Check compares body with the Content-Digest in h. proved is false when h has
// none with an algorithm we know; the error is not nil when they differ.
func Check(h http.Header, body []byte) (proved bool, err error) {
	for _, field := range h[Digest] {
		for part := range strings.SplitSeq(field, ",") {
			name, value, ok := strings.Cut(strings.TrimSpace(part), "=")
			if !ok || !strings.EqualFold(name, "sha-256") {
				continue
			}
			var room [64]byte
			if sum := appendSum(room[:0], body); value != string(sum[len("sha-256="):]) {
				return false, errDigest
			}
			return true, nil
		}
	}
	return false, nil
}
