package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// LeaseBucket is the JetStream key-value bucket that says which of several
// watchers writes the record. What is in it expires.
const LeaseBucket = "sheaf-watcher"

const (
	leaseKey  = "writer"
	leaseTime = 5 * time.Second         // from the last renewal until another one may write
	leaseSlip = 1500 * time.Millisecond // before that the writer stops by its own clock
	renewTime = time.Second
	unfitTime = 5 * time.Second // a writer without its source gives others a turn this often
	aside     = 2500 * time.Millisecond
)

// A lease lets one watcher at a time write. It keeps two from undoing each
// other's work while one knows less; it need not be strict, since each record
// is written by compare-and-set.
type lease struct {
	js  jetstream.JetStream
	kv  jetstream.KeyValue
	id  string
	rev uint64 // of our entry; 0 when we have none

	renewed time.Time
	unfit   time.Time // since when the holder's source has failed; zero: it works
	wait    time.Time // not before, after a turn for others
}

func newLease(js jetstream.JetStream) *lease { return &lease{js: js, id: rand.Text()} }

// held says whether we may write now.
func (l *lease) held() bool { return l.rev > 0 && time.Since(l.renewed) < leaseTime-leaseSlip }

// keep takes the lease if nobody has it, or renews it.
func (l *lease) keep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	now := time.Now()
	switch {
	case l.rev > 0 && !l.unfit.IsZero() && now.Sub(l.unfit) > unfitTime:
		l.unfit, l.wait = now, now.Add(aside)
		l.release(ctx)
		return nil
	case l.rev > 0 && now.Sub(l.renewed) < renewTime, now.Before(l.wait):
		return nil
	}
	if l.kv == nil {
		kv, err := l.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: LeaseBucket, Description: "which watcher writes the record of replicas", Storage: jetstream.MemoryStorage, TTL: leaseTime, History: 1,
		})
		if err != nil {
			return fmt.Errorf("make bucket %s: %w", LeaseBucket, err)
		}
		l.kv = kv
	}
	var err error
	if l.rev > 0 {
		l.rev, err = l.kv.Update(ctx, leaseKey, []byte(l.id), l.rev)
	} else {
		l.rev, err = l.kv.Create(ctx, leaseKey, []byte(l.id))
	}
	switch {
	case err == nil:
		l.renewed = now
	case errors.Is(err, jetstream.ErrKeyExists), errors.Is(err, jetstream.ErrKeyRevisionMismatch): // another one has it
		l.rev = 0
	default:
		l.rev, l.kv = 0, nil // the bucket may have been lost
		return fmt.Errorf("keep bucket %s: %w", LeaseBucket, err)
	}
	return nil
}

// release gives the lease back.
func (l *lease) release(ctx context.Context) {
	if l.rev > 0 && l.kv != nil {
		_ = l.kv.Delete(ctx, leaseKey, jetstream.LastRevision(l.rev)) // else it expires
	}
	l.rev = 0
}
