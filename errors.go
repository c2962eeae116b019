package sheaf

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Sentinel errors. They come wrapped; test with [errors.Is].
var (
	// ErrNoReplica comes when no replica of the function was ready for as long
	// as [Group.ReplicaWait] allows while blocks were waiting.
	ErrNoReplica = errors.New("no replica is ready")
	// ErrNoFunction comes from a [Resolver] when no such function is deployed.
	ErrNoFunction = errors.New("function is not deployed")
	// ErrNoRank comes from [Group.Send] when the view has no such rank.
	ErrNoRank = errors.New("no such rank")
	// ErrReplicaGone comes for a rank whose replica left before it answered.
	ErrReplicaGone = errors.New("replica is gone")
	// ErrNotAddressable comes when a rank is addressed over a route that can
	// only reach "some replica", such as a gateway.
	ErrNotAddressable = errors.New("route cannot address a replica")
	// ErrRecordTooLong comes, inside a [*RecordError], from a splitter that met
	// a record over the limit.
	ErrRecordTooLong = errors.New("record is too long")
	// ErrMalformed comes, inside a [*RecordError], from a splitter whose input
	// is not what it splits: a quote without an end, JSON that is cut.
	ErrMalformed = errors.New("malformed input")
	// ErrUnverified comes when an answer is required to be proved whole, by a
	// digest or, where there is a key, by a signature, and is not.
	ErrUnverified = errors.New("answer is not proved by a digest or a signature")
	// ErrTooManyBlocks comes when an input makes more blocks than are allowed.
	ErrTooManyBlocks = errors.New("too many blocks")
)

// A Fault says whose failure a failed attempt was, and so what follows.
type Fault uint8

// The faults. The zero Fault is not used by a [CallError].
const (
	// FaultTask: the handler failed (a 5xx of its own). Another attempt may
	// help; counts against the block.
	FaultTask Fault = iota + 1
	// FaultRejected: the handler says that the block itself is bad (a 4xx).
	// No other attempt is made.
	FaultRejected
	// FaultLost: the connection broke, or the answer came back cut, damaged or
	// from somebody else. Infrastructure: does not count as the block's failure
	// unless too many distinct replicas are lost over it.
	FaultLost
	// FaultRefused: nothing listens at the address, or somebody else does. The
	// replica is left out, and asked again after a second, then two, four, ...
	FaultRefused
	// FaultThrottled: the replica is busy (429, or 503 with Retry-After) and
	// did not take the block.
	FaultThrottled
	// FaultTimeout: the attempt's deadline passed. Counts against the block.
	FaultTimeout
)

func (f Fault) String() string {
	names := [...]string{"unknown", "task failed", "rejected", "lost", "refused", "throttled", "timed out"}
	if int(f) < len(names) {
		return names[f]
	}
	return names[0]
}

// A CallError is a failed attempt, as a [Route] reports it.
type CallError struct {
	Fault      Fault
	Status     int           // HTTP status, 0 when there was none
	RetryAfter time.Duration // with FaultThrottled: wait so long; 0 when unsaid
	From       string        // ID of the replica, empty when unknown
	Err        error         // the cause, never nil
}

// Error says what went wrong, and where.
func (e *CallError) Error() string {
	var b strings.Builder
	if e.From != "" {
		fmt.Fprintf(&b, "replica %s: ", e.From)
	}
	fmt.Fprintf(&b, "%s: ", e.Fault)
	if e.Status != 0 {
		fmt.Fprintf(&b, "status %d: ", e.Status)
	}
	fmt.Fprint(&b, e.Err)
	return b.String()
}

// Unwrap returns the cause.
func (e *CallError) Unwrap() error { return e.Err }

// faultOf classifies what a route returned.
func faultOf(err error) (Fault, time.Duration) {
	if ce, ok := errors.AsType[*CallError](err); ok {
		return ce.Fault, ce.RetryAfter
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return FaultTimeout, 0
	}
	return FaultLost, 0
}

// A RankError says why one rank of a view has not answered a message.
type RankError struct {
	Rank     int    // in the view, from 0
	Replica  string // its ID
	Attempts int    // made to reach it
	Err      error  // the cause, never nil; ErrReplicaGone when it left
}

// Error names the rank, its replica and the cause.
func (e *RankError) Error() string {
	return fmt.Sprintf("rank %d (replica %s) after %s: %v", e.Rank, e.Replica, count(e.Attempts, "attempt"), e.Err)
}

// Unwrap returns the cause.
func (e *RankError) Unwrap() error { return e.Err }

// A BlockError says why one block has no result.
type BlockError struct {
	Index    int
	Offset   int64    // of the block in the input, in bytes
	Bytes    int      // length of the block
	Attempts int      // made at it
	Replicas []string // IDs of the replicas that were lost over it
	Poison   bool     // given up because it took too many replicas down
	Err      error    // what the last attempt met, never nil
}

// Error names the block, its place in the input and the cause.
func (e *BlockError) Error() string {
	why := ""
	if e.Poison {
		why = fmt.Sprintf("took down %d replicas: ", len(e.Replicas))
	}
	return fmt.Sprintf("block %d (bytes %d to %d) after %s: %s%v",
		e.Index, e.Offset, e.Offset+int64(e.Bytes), count(e.Attempts, "attempt"), why, e.Err)
}

// Unwrap returns the cause.
func (e *BlockError) Unwrap() error { return e.Err }

// A PartialError says that some blocks have no result, and which. It ends the
// iteration over the results of a scatter. Of the blocks that were read, each
// has a result, is Missing, or was Stopped.
type PartialError struct {
	Job     string
	Missing []*BlockError // those that were given up, in block order, at least one
	Stopped []int         // indexes of those that were under way when that ended the scatter
	Done    int           // blocks that have a result
	Total   int           // blocks in the input, -1 when it was not read to its end
}

// Error names the first missing block and counts the others.
func (e *PartialError) Error() string {
	of := ""
	if e.Total >= 0 {
		of = fmt.Sprintf(" of %d", e.Total)
	}
	s := fmt.Sprintf("%d%s blocks have a result; missing: %v", e.Done, of, e.Missing[0])
	if n := len(e.Missing) - 1; n > 0 {
		s += fmt.Sprintf(" (and %s more)", count(n, "block"))
	}
	if n := len(e.Stopped); n > 0 {
		s += fmt.Sprintf("; %s under way stopped with it", count(n, "block"))
	}
	return s
}

// Unwrap returns the errors of the missing blocks.
func (e *PartialError) Unwrap() []error {
	errs := make([]error, len(e.Missing))
	for i, m := range e.Missing {
		errs[i] = m
	}
	return errs
}

func (e *PartialError) add(m *BlockError) {
	i, _ := slices.BinarySearchFunc(e.Missing, m, func(a, b *BlockError) int { return a.Index - b.Index })
	e.Missing = slices.Insert(e.Missing, i, m)
}

// A RecordError says where in its input a splitter could not go on.
type RecordError struct {
	Offset int64 // of the record's first byte in the input
	Limit  int   // of a record in bytes, with ErrRecordTooLong
	What   string
	Err    error // ErrRecordTooLong or ErrMalformed
}

// Error says what is wrong with which record.
func (e *RecordError) Error() string {
	if errors.Is(e.Err, ErrRecordTooLong) {
		return fmt.Sprintf("record at byte %d is longer than the limit of %d bytes; raise the limit or split by bytes", e.Offset, e.Limit)
	}
	return fmt.Sprintf("byte %d: %s", e.Offset, e.What)
}

// Unwrap returns ErrRecordTooLong or ErrMalformed.
func (e *RecordError) Unwrap() error { return e.Err }

// count is n with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
