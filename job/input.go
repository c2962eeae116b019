package job

// input.go stores inputs in pieces, and reads them.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	pieceBytes  = 512 << 10 // below NATS's default limit of 1 MiB, with headers
	writesAhead = 4         // pieces of one input that are on their way to JetStream
)

// An Upload stores the input of a job that is about to be. Its pieces bear a
// name of their own, so that two uploads for one ID do not meet.
type Upload struct {
	s      *Store
	id     string
	name   string
	buf    []byte
	pieces int
	bytes  int64
	done   bool

	ctx    context.Context
	cancel context.CancelCauseFunc
	slots  chan struct{}
	wg     sync.WaitGroup
}

// Upload begins an upload. It fails with ErrAway, or with ErrTooMany when no
// job more may be queued. Submit or Abort ends it.
func (s *Store) Upload(ctx context.Context, id, name string) (*Upload, error) {
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	if n := s.pending(); n >= s.cfg.MaxQueued {
		return nil, fmt.Errorf("%w: %d are, the limit", ErrTooMany, n)
	}
	u := &Upload{s: s, id: id, name: name, slots: make(chan struct{}, writesAhead)}
	u.ctx, u.cancel = context.WithCancelCause(ctx)
	return u, nil
}

// Bytes is how much was written.
func (u *Upload) Bytes() int64 { return u.bytes }

// Write stores a part of the input. Its error is ErrFull or ErrAway.
func (u *Upload) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		if u.buf == nil {
			u.buf = make([]byte, 0, min(pieceBytes, max(len(rest), 4096))) // most inputs are short
		}
		n := min(len(rest), pieceBytes-len(u.buf))
		u.buf = append(u.buf, rest[:n]...)
		rest = rest[n:]
		if len(u.buf) == pieceBytes {
			u.send()
		}
	}
	u.bytes += int64(len(p))
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return len(p), nil
}

func (u *Upload) send() {
	piece, n := u.buf, u.pieces
	u.buf = nil
	u.pieces++
	select {
	case u.slots <- struct{}{}:
	case <-u.ctx.Done():
		return
	}
	u.s.host.start(&u.wg, func() {
		defer func() { <-u.slots }()
		u.s.cfg.Step("input.before")
		// A minute is for JetStream; how slow the client is does not count.
		ctx, cancel := u.s.host.within(u.ctx, time.Minute)
		defer cancel()
		err := u.s.persist(ctx, func(ctx context.Context) error {
			return u.s.shelf.putPiece(ctx, u.s.pieceSubject(u.id, u.name, n), piece)
		})
		if err != nil {
			u.cancel(fmt.Errorf("store the input: %w", err))
		}
		u.s.cfg.Step("input.after")
	})
}

func (s *Store) pieceSubject(id, upload string, n int) string {
	return inputSubject + s.space + id + "." + upload + "." + strconv.Itoa(n)
}

// Submit stores the job, after its input: it is queued, then, and will end.
// When there is a job of this ID already, that one is returned, with existed
// true, or ErrConflict if its Digest is another. ErrAway leaves open whether it
// is stored: the input is kept until its time is over.
func (u *Upload) Submit(ctx context.Context, r Record) (_ Record, existed bool, err error) {
	if len(u.buf) > 0 {
		u.send()
	}
	u.s.host.wait(&u.wg)
	if u.ctx.Err() != nil {
		return Record{}, false, context.Cause(u.ctx)
	}
	r.Input.Upload, r.Input.Pieces = u.name, u.pieces
	r.ID, r.State, r.Created, r.Owner = u.id, Queued, u.s.host.now().UTC(), u.s.cfg.Master
	r.Revision = 0
	u.s.cfg.Step("submit.before")
	ctx, cancel := u.s.host.within(ctx, 10*time.Second)
	defer cancel()
	there := r
	err = u.s.persist(ctx, func(ctx context.Context) (err error) {
		if there, err = u.s.put(ctx, r); errors.Is(err, errExists) || taken(err) {
			there, err = u.s.get(ctx, u.id) // another job's, or this one's after all
		}
		return err
	})
	u.s.cfg.Step("submit.after")
	if err != nil {
		if errors.Is(err, ErrAway) {
			u.keep() // the record may have been written, and then needs its input
		}
		u.Abort()
		return Record{}, false, fmt.Errorf("store the job: %w", err)
	}
	if existed = there.Input.Upload != u.name; existed {
		u.Abort()
	}
	u.keep()
	if there.Digest != r.Digest {
		err = fmt.Errorf("%w: job %s has another input or other parameters", ErrConflict, u.id)
	}
	return there, existed, err
}

// keep has Abort do nothing.
func (u *Upload) keep() {
	u.cancel(nil)
	u.done = true
}

// Abort drops what was uploaded. After Submit it does nothing.
func (u *Upload) Abort() {
	if u.done {
		return
	}
	u.done = true
	u.cancel(errors.New("upload aborted"))
	u.s.host.wait(&u.wg)
	u.s.dropInput(u.id, u.name)
}

// dropInput removes the pieces of an input that nobody will read any more;
// those that cannot be removed go when their time is over.
func (s *Store) dropInput(id, upload string) {
	ctx, cancel := s.host.within(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.shelf.dropPieces(ctx, inputSubject+s.space+id+"."+upload+".>"); err != nil {
		s.log.Debug("an input stays until its time is over", "job", id, "err", err)
	}
}

// Input reads the input that was uploaded for a job. A piece that is missing
// is ErrDamaged: its time was over, or JetStream has lost it.
func (s *Store) Input(ctx context.Context, r Record) io.Reader {
	return &pieces{s: s, ctx: ctx, r: r}
}

type pieces struct {
	s    *Store
	ctx  context.Context
	r    Record
	next int
	rest []byte
	got  int64
}

func (p *pieces) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if p.next == p.r.Input.Pieces {
			if p.got != p.r.Input.Bytes {
				return 0, fmt.Errorf("%w: its input has %d bytes, and had %d", ErrDamaged, p.got, p.r.Input.Bytes)
			}
			return 0, io.EOF
		}
		err := p.s.persist(p.ctx, func(ctx context.Context) error {
			piece, err := p.s.shelf.piece(ctx, p.s.pieceSubject(p.r.ID, p.r.Input.Upload, p.next))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return nil
			}
			if err == nil {
				p.rest = piece
			}
			return err
		})
		if err != nil {
			return 0, err
		}
		if len(p.rest) == 0 {
			return 0, fmt.Errorf("%w: piece %d of its input is gone; inputs are kept for %v", ErrDamaged, p.next, p.s.cfg.InputTTL)
		}
		p.next++
		p.got += int64(len(p.rest))
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// Object tells how long an object of a JetStream object store is, and what
// tells it from what it may become. It fails with ErrNotFound or ErrAway.
func (s *Store) Object(ctx context.Context, bucket, name string) (size int64, version string, err error) {
	info, err := s.object(ctx, bucket, name)
	if err != nil {
		return 0, "", err
	}
	return int64(info.Size), info.NUID + " " + info.Digest, nil
}

func (s *Store) object(ctx context.Context, bucket, name string) (*jetstream.ObjectInfo, error) {
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	store, err := s.js.ObjectStore(ctx, bucket)
	var info *jetstream.ObjectInfo
	if err == nil {
		info, err = store.GetInfo(ctx, name)
	}
	switch {
	case errors.Is(err, jetstream.ErrBucketNotFound), errors.Is(err, jetstream.ErrObjectNotFound), errors.Is(err, jetstream.ErrInvalidStoreName):
		return nil, fmt.Errorf("%w: object %q of bucket %q: %w", ErrNotFound, name, bucket, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrAway, err)
	}
	return info, nil
}

// ObjectInput reads an object that a job was accepted with. It fails with
// ErrChanged when it is another one by now, and with ErrDamaged when it does not
// come whole.
func (s *Store) ObjectInput(ctx context.Context, bucket, name string, in Input) io.Reader {
	return &object{s: s, ctx: ctx, bucket: bucket, name: name, in: in}
}

type object struct {
	s            *Store
	ctx          context.Context
	bucket, name string
	in           Input
	r            jetstream.ObjectResult
	got          int64
}

func (o *object) Read(p []byte) (int, error) {
	if o.r == nil {
		size, version, err := o.s.Object(o.ctx, o.bucket, o.name)
		if err != nil {
			return 0, err
		}
		if size != o.in.Bytes || version != o.in.Version {
			return 0, fmt.Errorf("%w: object %q of bucket %q was stored anew", ErrChanged, o.name, o.bucket)
		}
		store, err := o.s.js.ObjectStore(o.ctx, o.bucket)
		if err == nil {
			o.r, err = store.Get(o.ctx, o.name)
		}
		if err != nil {
			return 0, fmt.Errorf("%w: %w", ErrAway, err)
		}
	}
	n, err := o.r.Read(p)
	o.got += int64(n)
	if err == io.EOF {
		if failed := o.r.Error(); failed != nil || o.got != o.in.Bytes {
			return n, fmt.Errorf("%w: object %q ended after %d of %d bytes: %w", ErrDamaged, o.name, o.got, o.in.Bytes, errors.Join(failed, io.ErrUnexpectedEOF))
		}
	}
	if err != nil {
		_ = o.r.Close() // it has been read, or cannot be
	}
	return n, err
}
