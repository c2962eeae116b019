package job

// outside.go is all that a Store asks of the world once it is open: time,
// goroutines and JetStream. The simulator of sim_test.go has others.

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// host is the time and the goroutines of a process.
type host interface {
	now() time.Time
	pause(ctx context.Context, d time.Duration)
	within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc)
	start(wg *sync.WaitGroup, f func())
	wait(wg *sync.WaitGroup)
}

// shelf is what is kept in JetStream. Its errors are those of its client.
type shelf interface {
	away() error // why it cannot be asked just now, or nil
	get(ctx context.Context, key string) (jetstream.KeyValueEntry, error)
	create(ctx context.Context, key string, data []byte) (revision uint64, err error)
	update(ctx context.Context, key string, data []byte, last uint64) (revision uint64, err error)
	// putUnder stores an entry if the one of another key has the given revision.
	putUnder(ctx context.Context, key string, data []byte, fence string, revision uint64) error
	// below returns what comes after prefix in the keys that begin so.
	below(ctx context.Context, prefix string) ([]string, error)
	// drop removes entries without a trace, and those only that are older than
	// the given revision. remove leaves a mark for a minute.
	drop(ctx context.Context, keys string, before uint64) error
	remove(ctx context.Context, key string, last uint64) error

	putPiece(ctx context.Context, subject string, data []byte) error
	piece(ctx context.Context, subject string) ([]byte, error)
	dropPieces(ctx context.Context, subjects string) error

	beat(subject, master string)
}

// process is the host that a Store has.
type process struct{}

func (process) now() time.Time                             { return time.Now() }
func (process) pause(ctx context.Context, d time.Duration) { pause(ctx, d) }
func (process) start(wg *sync.WaitGroup, f func())         { wg.Go(f) }
func (process) wait(wg *sync.WaitGroup)                    { wg.Wait() }
func (process) within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, d)
}

// inJetStream is the shelf that a Store has.
type inJetStream struct{ s *Store }

func (j inJetStream) away() error {
	if !j.s.nc.IsConnected() {
		return nats.ErrDisconnected
	}
	return nil
}

func (j inJetStream) get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	return j.s.kv.Get(ctx, key)
}

func (j inJetStream) create(ctx context.Context, key string, data []byte) (uint64, error) {
	return j.s.kv.Create(ctx, key, data)
}

func (j inJetStream) update(ctx context.Context, key string, data []byte, last uint64) (uint64, error) {
	return j.s.kv.Update(ctx, key, data, last)
}

func (j inJetStream) putUnder(ctx context.Context, key string, data []byte, fence string, revision uint64) error {
	_, err := j.s.js.PublishMsg(ctx, &nats.Msg{Subject: subjects + key, Data: data},
		jetstream.WithExpectLastSequenceForSubject(revision, subjects+fence))
	return err
}

func (j inJetStream) below(ctx context.Context, prefix string) ([]string, error) {
	info, err := j.s.stream.Info(ctx, jetstream.WithSubjectFilter(subjects+prefix+"*"))
	if err != nil {
		return nil, err
	}
	list := make([]string, 0, len(info.State.Subjects))
	for subject := range info.State.Subjects {
		list = append(list, strings.TrimPrefix(subject, subjects+prefix))
	}
	return list, nil
}

func (j inJetStream) drop(ctx context.Context, keys string, before uint64) error {
	return j.s.stream.Purge(ctx, jetstream.WithPurgeSubject(subjects+keys), jetstream.WithPurgeSequence(before))
}

func (j inJetStream) remove(ctx context.Context, key string, last uint64) error {
	return j.s.kv.Purge(ctx, key, jetstream.LastRevision(last), jetstream.PurgeTTL(time.Minute))
}

func (j inJetStream) putPiece(ctx context.Context, subject string, data []byte) error {
	_, err := j.s.js.Publish(ctx, subject, data)
	return err
}

func (j inJetStream) piece(ctx context.Context, subject string) ([]byte, error) {
	m, err := j.s.inputs.GetLastMsgForSubject(ctx, subject)
	if err != nil {
		return nil, err
	}
	return m.Data, nil
}

func (j inJetStream) dropPieces(ctx context.Context, subjects string) error {
	return j.s.inputs.Purge(ctx, jetstream.WithPurgeSubject(subjects))
}

func (j inJetStream) beat(subject, master string) {
	// Without a connection nobody hears it, and others may take the jobs.
	_ = j.s.nc.Publish(subject, []byte(master))
}
