// Package job keeps jobs in NATS JetStream, so that they outlive the masters
// that run them: the input, a record of how far the job is, who runs it, and
// the result of each block.
//
// A job's record is one entry of the bucket sheaf-jobs, and changes only by
// compare-and-set: that it is queued, that a master has taken it (a claim),
// that it has ended. The revision of a claim is its fence: whatever a master
// writes for a job it writes under the condition that the record still has that
// revision, which the server checks. A master that was stopped, lost its
// connection or thinks itself alive can therefore write nothing once another
// one has claimed the job, however wrong anybody's clock is. That a master is
// alive it says by a heartbeat, and silence only means that others may try.
//
// A block's result is written once under such a fence and never computed again.
// The answer of a job is not stored: it is merged from the results of its
// blocks whenever it is read, as it would have been while they came.
package job

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A State is where a job is in its life. The last three are final, but that a
// failed job may be queued again by Redrive.
type State string

// The states of a job.
const (
	Queued    State = "queued"    // stored, and run by nobody yet
	Running   State = "running"   // claimed by a master
	Succeeded State = "succeeded" // its result can be read
	Failed    State = "failed"    // Error says why; the results of some blocks may be there
	Cancelled State = "cancelled" // by its caller
)

// States lists them.
func States() []State { return []State{Queued, Running, Succeeded, Failed, Cancelled} }

// Final says whether nobody works at a job of this state.
func (s State) Final() bool { return s == Succeeded || s == Failed || s == Cancelled }

// A Record is what is known of a job.
type Record struct {
	ID    string `json:"id"`
	State State  `json:"state"`
	// Spec says what to do with the input, in words that only the master
	// knows; Digest tells jobs apart that were given the same ID: it is over
	// Spec and the input.
	Spec   json.RawMessage `json:"spec"`
	Digest string          `json:"digest"`
	Input  Input           `json:"input"`

	Created  time.Time `json:"created"`
	Started  time.Time `json:"started,omitzero"` // when it was first claimed
	Finished time.Time `json:"finished,omitzero"`
	Expires  time.Time `json:"expires,omitzero"` // its result is dropped then

	Owner    string `json:"owner,omitempty"`    // the master that claimed it last, or accepted it
	Epoch    int    `json:"epoch,omitempty"`    // how often it was claimed
	Redrives int    `json:"redrives,omitempty"` // how often it was queued again
	// Deaths is how many masters in a row fell silent, or left it, without a
	// block done more than Done, which were done when the last of them claimed it.
	Deaths int `json:"deaths,omitempty"`
	Done   int `json:"done,omitempty"`

	// What a final state came with.
	Progress *Progress       `json:"progress,omitempty"`
	Error    json.RawMessage `json:"error,omitempty"`
	// Lacks says that some blocks have no result, and that the answer is what
	// the others come to.
	Lacks bool `json:"lacks,omitempty"`

	// Revision of the record; the fence of whoever wrote it.
	Revision uint64 `json:"-"`
}

// Input is the input of a job: stored in pieces, or somewhere else.
type Input struct {
	Bytes  int64  `json:"bytes"`  // -1 when it is not known
	Blocks int    `json:"blocks"` // that it makes, -1 when that is not known
	Upload string `json:"upload,omitempty"`
	Pieces int    `json:"pieces,omitempty"`
	// URL is where the input is if it was not uploaded, and Version what its
	// owner calls the state of it that the job was accepted with.
	URL     string `json:"url,omitempty"`
	Version string `json:"version,omitempty"`
}

// Progress counts the blocks of a job. The five states sum to Total, which
// grows while the input is read if nobody could say before how many there are.
type Progress struct {
	Total      int `json:"total"`
	Queued     int `json:"queued"`
	Running    int `json:"running"`
	Done       int `json:"done"`
	Failed     int `json:"failed"`
	Stopped    int `json:"stopped"` // neither done nor failed when the job ended
	Attempts   int `json:"attempts"`
	Replicas   int `json:"replicas"`   // that gave results
	Unverified int `json:"unverified"` // results that no digest proved whole
}

// Errors. They come wrapped; test with errors.Is.
var (
	// ErrNotFound comes when there is no job of an ID, or none any more.
	ErrNotFound = errors.New("no such job")
	// ErrConflict comes when the ID is another job's.
	ErrConflict = errors.New("the ID is another job's")
	// ErrFull comes when JetStream has no room for what shall be stored.
	ErrFull = errors.New("the store of jobs is full")
	// ErrTooMany comes when as many jobs wait or run as may.
	ErrTooMany = errors.New("too many jobs are queued")
	// ErrAway comes when JetStream does not answer in time.
	ErrAway = errors.New("the store of jobs does not answer")
	// ErrState comes when a job is not in a state for what was asked.
	ErrState = errors.New("the job's state does not allow it")
	// ErrFenced is the cause with which the context of a run ends whose job
	// another master has claimed, or that was cancelled.
	ErrFenced = errors.New("the job is not this master's any more")
	// ErrChanged comes when an input that is kept elsewhere is not what it was
	// when the job was accepted.
	ErrChanged = errors.New("the input has changed")
	// ErrDamaged comes when what is stored is not what was stored.
	ErrDamaged = errors.New("the stored job is damaged")
)

var idForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// ValidID says whether id may be a job's: 1 to 64 letters, digits, hyphens and
// underscores.
func ValidID(id string) bool { return idForm.MatchString(id) }

// taken says whether err means that somebody else has written meanwhile.
func taken(err error) bool {
	return hasCode(err, jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func hasCode(err error, codes ...jetstream.ErrorCode) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && slices.Contains(codes, api.ErrorCode)
}

// JetStream's codes for having no room.
const (
	insufficientStorage   = jetstream.ErrorCode(10047)
	insufficientResources = jetstream.ErrorCode(10023)
	storeFailed           = jetstream.ErrorCode(10077) // a stream is at one of its limits, or the disk is full
	accountExceeded       = jetstream.ErrorCode(10002)
)

// refused says whether JetStream has said no, which it would say again.
func refused(err error) error {
	switch {
	case hasCode(err, storeFailed, insufficientResources, insufficientStorage, accountExceeded):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, nats.ErrConnectionClosed):
		return err
	}
	return nil
}

// persist calls f until it succeeds, is refused, or ctx ends. f must be such
// that doing it twice is doing it once: a call that fails may have been
// carried out.
func (s *Store) persist(ctx context.Context, f func(context.Context) error) error {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		once, cancel := s.host.within(ctx, 5*time.Second)
		err := f(once)
		cancel()
		if err == nil || taken(err) || errors.Is(err, ErrFenced) || errors.Is(err, ErrDamaged) {
			return err
		}
		if no := refused(err); no != nil {
			return no
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ErrAway, err)
		}
		s.host.pause(ctx, wait)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
