package job

// sim_store_test.go is the JetStream of the simulated world, and what it checks
// whenever something is written to it.

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// server is the one JetStream: a log whose last entry for each key is kept,
// with the number that it has in the log.
type server struct {
	w         *world
	seq       uint64
	entries   map[string]*kept
	pieces    map[string][]byte
	awayUntil time.Duration
}

type kept struct {
	jetstream.KeyValueEntry // nil
	key                     string
	value                   []byte
	revision                uint64
	op                      jetstream.KeyValueOp
	before                  *kept // what a reader who is behind sees
}

func (e *kept) Key() string                     { return e.key }
func (e *kept) Value() []byte                   { return e.value }
func (e *kept) Revision() uint64                { return e.revision }
func (e *kept) Operation() jetstream.KeyValueOp { return e.op }
func (s *server) there(key string) (*kept, bool) {
	e := s.entries[key]
	return e, e != nil && e.op == jetstream.KeyValuePut
}

var (
	errLast = &jetstream.APIError{ErrorCode: jetstream.JSErrCodeStreamWrongLastSequence, Description: "wrong last sequence"}
	// errMeanwhile is what a cluster answers while another write is on its way.
	errMeanwhile = &jetstream.APIError{ErrorCode: jetstream.JSErrCodeStreamWrongLastSequenceConstant, Description: "wrong last sequence"}
)

// write stores an entry for a master.
func (s *server) write(m *master, key string, value []byte, op jetstream.KeyValueOp) uint64 {
	s.seq++
	old := s.entries[key]
	e := &kept{key: key, value: value, revision: s.seq, op: op, before: old}
	if old != nil {
		old.before = nil
	}
	s.w.judgeWrite(m, old, e)
	s.entries[key] = e
	if strings.HasSuffix(key, ".state") || strings.HasSuffix(key, ".progress") {
		for _, o := range s.w.masters {
			o.notice(e)
		}
	}
	return s.seq
}

// shown is what a reader of a key sees.
func (s *server) shown(key string) (*kept, error) {
	e, ok := s.there(key)
	if e != nil && strings.HasSuffix(key, ".state") && s.w.chance(80) {
		s.w.met("stale read")
		e = e.before
		ok = e != nil && e.op == jetstream.KeyValuePut
	}
	if !ok {
		return nil, jetstream.ErrKeyNotFound
	}
	return e, nil
}

// remote is a master's connection to the server.
type remote struct{ m *master }

type answer struct {
	e        *kept
	revision uint64
	list     []string
	data     []byte
	err      error
}

// call has the server do something for a coroutine, which waits for the answer
// as long as its context allows.
func (r remote) call(ctx context.Context, do func() answer) answer {
	w, m, t := r.m.w, r.m, r.m.w.current
	if m.dead {
		panic(killed{})
	}
	if ctx.Err() != nil {
		return answer{err: ctx.Err()}
	}
	there, back := w.ms(0, 2), w.ms(0, 2)
	arrives, returns := true, true
	again, limited := false, false
	switch {
	case m.cut():
		// The client keeps what it could not send, and sends it later.
		if arrives = w.rnd.IntN(2) == 0; arrives {
			w.met("late write")
			there = max(m.cutUntil-w.now, w.shelf.awayUntil-w.now, 0) + w.ms(1, 30)
		}
		limited = true
	case w.chance(20 * w.storm):
		w.met("request lost")
		arrives = false
	case w.chance(30 * w.storm):
		w.met("answer lost")
		returns = false
	case w.chance(20 * w.storm):
		w.met("late write")
		there, returns = w.ms(500, 5000), false
	case w.chance(20):
		w.met("twice")
		again = true
	case w.chance(20):
		there += w.ms(0, 200)
	}
	var got answer
	answered := false
	give := func(a answer) {
		if !answered {
			answered, got = true, a
			w.resume(t)
		}
	}
	if arrives {
		w.after(there, func() {
			a := do()
			if returns {
				w.after(back, func() { give(a) })
			}
			if again {
				w.after(w.ms(0, 5), func() { do() })
			}
		})
	}
	if limited || !arrives || !returns {
		limit := w.now + 5*time.Second
		if d, ok := ctx.Value(deadlineKey{}).(time.Duration); ok {
			limit = min(limit, d)
		}
		w.after(max(0, limit-w.now), func() { give(answer{err: context.DeadlineExceeded}) })
	}
	w.park()
	return got
}

func (r remote) away() error {
	if r.m.cut() {
		return nats.ErrDisconnected
	}
	return nil
}

func (r remote) get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	a := r.call(ctx, func() answer {
		e, err := r.m.w.shelf.shown(key)
		return answer{e: e, err: err}
	})
	if a.err != nil {
		return nil, a.err
	}
	return a.e, nil
}

func (r remote) create(ctx context.Context, key string, data []byte) (uint64, error) {
	s := &r.m.w.shelf
	a := r.call(ctx, func() answer {
		if _, ok := s.there(key); ok {
			return answer{err: jetstream.ErrKeyExists}
		}
		return answer{revision: s.write(r.m, key, data, jetstream.KeyValuePut)}
	})
	return a.revision, a.err
}

func (r remote) update(ctx context.Context, key string, data []byte, last uint64) (uint64, error) {
	s := &r.m.w.shelf
	a := r.call(ctx, func() answer {
		if e := s.entries[key]; e == nil && last != 0 || e != nil && e.revision != last {
			return answer{err: errLast}
		}
		return answer{revision: s.write(r.m, key, data, jetstream.KeyValuePut)}
	})
	return a.revision, a.err
}

func (r remote) putUnder(ctx context.Context, key string, data []byte, fence string, revision uint64) error {
	s := &r.m.w.shelf
	return r.call(ctx, func() answer {
		if e := s.entries[fence]; e == nil || e.revision != revision {
			return answer{err: errLast}
		}
		if s.w.chance(25) {
			s.w.met("refused meanwhile")
			return answer{err: errMeanwhile}
		}
		s.write(r.m, key, data, jetstream.KeyValuePut)
		return answer{}
	}).err
}

func (r remote) below(ctx context.Context, prefix string) ([]string, error) {
	s := &r.m.w.shelf
	a := r.call(ctx, func() answer {
		list := []string{}
		for key, e := range s.entries {
			if rest, ok := strings.CutPrefix(key, prefix); ok && e.op == jetstream.KeyValuePut {
				list = append(list, rest)
			}
		}
		slices.Sort(list)
		return answer{list: list}
	})
	return a.list, a.err
}

func (r remote) drop(ctx context.Context, keys string, before uint64) error {
	s := &r.m.w.shelf
	return r.call(ctx, func() answer {
		prefix := strings.TrimRight(keys, "*>")
		for key, e := range s.entries {
			if strings.HasPrefix(key, prefix) && e.revision < before {
				delete(s.entries, key)
			}
		}
		return answer{}
	}).err
}

func (r remote) remove(ctx context.Context, key string, last uint64) error {
	s := &r.m.w.shelf
	return r.call(ctx, func() answer {
		if e := s.entries[key]; e == nil || e.revision != last {
			return answer{err: errLast}
		}
		s.write(r.m, key, nil, jetstream.KeyValuePurge)
		return answer{}
	}).err
}

func (r remote) putPiece(ctx context.Context, subject string, data []byte) error {
	s := &r.m.w.shelf
	return r.call(ctx, func() answer {
		s.pieces[subject] = data
		return answer{}
	}).err
}

func (r remote) piece(ctx context.Context, subject string) ([]byte, error) {
	s := &r.m.w.shelf
	a := r.call(ctx, func() answer {
		if data, ok := s.pieces[subject]; ok {
			return answer{data: data}
		}
		return answer{err: jetstream.ErrMsgNotFound}
	})
	return a.data, a.err
}

func (r remote) dropPieces(ctx context.Context, subjects string) error {
	s := &r.m.w.shelf
	return r.call(ctx, func() answer {
		for subject := range s.pieces {
			if strings.HasPrefix(subject, strings.TrimSuffix(subjects, ">")) {
				delete(s.pieces, subject)
			}
		}
		return answer{}
	}).err
}

func (r remote) beat(_, master string) {
	w := r.m.w
	if r.m.cut() {
		return
	}
	for _, o := range w.masters {
		if o.dead || o.cut() {
			continue
		}
		if w.chance(30) {
			w.met("beat lost")
			continue
		}
		o.later(w.ms(0, 3), func() { o.s.heard(&nats.Msg{Data: []byte(master)}) })
	}
}

// judgeWrite checks the invariants of the store: whatever is written, the
// record has one chain of claims and one end, and what a run writes is written
// while the job is its own.
func (w *world) judgeWrite(m *master, old, e *kept) {
	rest := strings.TrimPrefix(e.key, "master.")
	id, what, _ := strings.Cut(rest, ".")
	j := w.job(id)
	if j == nil {
		w.fail("%s: nobody has this job", e.key)
		return
	}
	if what == "state" {
		w.judgeRecord(m, j, old, e)
		return
	}
	r := j.record()
	if r.State != Running || r.Owner != m.name {
		w.fail("fence: %s writes %s, and the job is %s, of %q", m.name, e.key, r.State, r.Owner)
	}
	kind, index, _ := strings.Cut(what, ".")
	i, _ := strconv.Atoi(index)
	switch kind {
	case "block":
		line, data, _ := bytes.Cut(e.value, []byte{'\n'})
		var h stored
		if err := json.Unmarshal(line, &h); err != nil {
			w.fail("block %d of %s: %v", i, id, err)
		}
		w.logf("result of block %d of %s by %s, epoch %d", i, id, m.name, h.Epoch)
		switch {
		case h.Epoch != r.Epoch:
			w.fail("fence: a result of epoch %d lands in epoch %d", h.Epoch, r.Epoch)
		case i >= j.blocks || !bytes.Equal(data, result(j.block(i))):
			w.fail("answer: block %d of %s has the result %q", i, id, data)
		case old != nil && old.op == jetstream.KeyValuePut && !bytes.Equal(old.value, e.value):
			w.fail("commit once: block %d of %s has a second result", i, id)
		}
	case "progress":
		var p Progress
		if err := json.Unmarshal(e.value, &p); err != nil || p.Queued+p.Running+p.Done+p.Failed+p.Stopped != p.Total || p.Total != j.blocks {
			w.fail("counts: %s of %d blocks: %+v", id, j.blocks, p)
		}
	}
}

func (w *world) judgeRecord(m *master, j *simJob, old, e *kept) {
	var before, r Record
	if old != nil && old.op == jetstream.KeyValuePut {
		if err := json.Unmarshal(old.value, &before); err != nil {
			w.fail("%v", err)
		}
	}
	if e.op != jetstream.KeyValuePut {
		w.fail("forgotten: job %s is removed", j.id)
		return
	}
	if err := json.Unmarshal(e.value, &r); err != nil {
		w.fail("%v", err)
	}
	w.logf("job %s is %s, owner %q epoch %d, written by %s", j.id, r.State, r.Owner, r.Epoch, m.name)
	done := 0
	for i := range j.blocks {
		if _, ok := w.shelf.there("master." + j.id + ".block." + strconv.Itoa(i)); ok {
			done++
		}
	}
	switch {
	case before.State == "" && r.State != Queued:
		w.fail("job %s begins as %s", j.id, r.State)
	case before.State == "":
	case r.Digest != before.Digest || r.Input != before.Input:
		w.fail("forgotten: job %s becomes another one", j.id)
	case r.Epoch < before.Epoch:
		w.fail("epochs: of job %s falls from %d to %d", j.id, before.Epoch, r.Epoch)
	case before.State.Final() && !(before.State == Failed && r.State == Queued && r.Redrives == before.Redrives+1):
		w.fail("one end: job %s is %s, and becomes %s", j.id, before.State, r.State)
	case r.State == Running && (r.Epoch != before.Epoch+1 || r.Owner != m.name):
		w.fail("epochs: a claim of job %s by %s has epoch %d of %q after %d", j.id, m.name, r.Epoch, r.Owner, before.Epoch)
	case (r.State == Succeeded || r.State == Failed) && (before.State != Running || before.Owner != m.name || before.Epoch != r.Epoch):
		w.fail("fence: %s ends job %s, which is %s, of %q, epoch %d", m.name, j.id, before.State, before.Owner, before.Epoch)
	case r.State == Cancelled && !j.cancelled:
		w.fail("job %s is cancelled, and nobody asked for it", j.id)
	case r.State == Succeeded && done < j.blocks-j.tolerate, r.State == Succeeded && !r.Lacks && done != j.blocks:
		w.fail("answer: job %s has succeeded with %d results of %d, tolerated %d", j.id, done, j.blocks, j.tolerate)
	case r.State == Failed && !j.mayFail(r):
		w.fail("job %s has failed without cause: %s", j.id, r.Error)
	case r.State.Final() && r.State != Cancelled && (r.Progress == nil || r.Progress.Done != done):
		w.fail("counts: job %s ends with %d results and says %+v", j.id, done, r.Progress)
	}
	if p := r.Progress; p != nil && (p.Queued+p.Running+p.Done+p.Failed+p.Stopped != p.Total || p.Total != j.blocks) {
		w.fail("counts: job %s of %d blocks ends with %+v", j.id, j.blocks, *p)
	}
	switch r.State {
	case Running:
		w.met("claim")
		if before.State == Running {
			w.met("take-over")
		}
		if done > 0 {
			w.met("resumed with results")
		}
	case Succeeded, Failed, Cancelled:
		w.met(string(r.State))
		if r.Lacks {
			w.met("lacking")
		}
	}
}
