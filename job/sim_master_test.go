package job

// sim_master_test.go is the masters of the simulated world, the jobs that
// clients give them, and the replicas that do the work.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/schedule"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// master is a process with a Store.
type master struct {
	w      *world
	name   string
	s      *Store
	ctx    context.Context
	cancel context.CancelFunc
	skew   time.Duration
	caller wire.Caller
	proved bool
	jobs   sync.WaitGroup
	count  map[*sync.WaitGroup]int

	dead, leaving bool
	stoppedUntil  time.Duration
	held          []func() // what is to be done when it goes on
	cutUntil      time.Duration
	connection    int
	watched       time.Duration // when the last entry that is on its way comes
	reads         time.Duration // when it goes on to read what comes
	gone          map[string]bool
	last          time.Time // when it looked around last
	view          sheaf.View
	viewed        time.Duration
	runs          []*run
}

var quietLog = slog.New(slog.DiscardHandler)

// boot starts a master.
func (w *world) boot() {
	m := &master{w: w, name: fmt.Sprintf("m%d", len(w.masters)+1), count: map[*sync.WaitGroup]int{}}
	w.masters = append(w.masters, m)
	if w.rnd.IntN(2) == 0 {
		w.met("skew")
		m.skew = w.ms(-3_600_000, 3_600_000)
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	ready := make(chan struct{})
	close(ready)
	cfg := Config{Function: "master", Master: m.name, Parallel: 1 + w.rnd.IntN(3), Lease: simLease, Log: quietLog, Step: func(string) {
		if w.chance(8) {
			w.met("crash at step")
			w.kill(m)
			panic(killed{})
		}
	}}
	m.s = &Store{cfg: cfg.withDefaults(), space: "master.", log: quietLog, stop: m.cancel, ready: ready, host: process1{m}, shelf: remote{m},
		jobs: map[string]*seen{}, changed: make(chan struct{}), beats: map[string]time.Time{}, leases: map[string]*Lease{}}
	w.logf("boot %s", m.name)
	m.connect()
	v := sheaf.View{Function: "worker", Epoch: w.epoch, Replicas: w.listed}
	m.viewed = w.now + w.ms(0, 20)
	m.later(m.viewed-w.now, func() { m.newView(v) })
	m.last = m.s.host.now()
	m.later(w.ms(0, 120), m.tick)
	m.later(w.ms(0, 240), m.beat)
}

// up lists the masters that run.
func (w *world) up() []*master {
	var list []*master
	for _, m := range w.masters {
		if !m.dead && !m.leaving {
			list = append(list, m)
		}
	}
	return list
}

func (w *world) kill(m *master) {
	if m.dead {
		return
	}
	w.logf("%s is dead", m.name)
	m.dead = true
	if len(w.up()) < 3 {
		w.after(w.ms(10, 1500), w.boot)
	}
}

// later has a master do something, once it is not stopped.
func (m *master) later(d time.Duration, do func()) {
	m.w.after(d, func() { m.do(do) })
}

// do has a master do something now, or when it goes on: in the order in which
// it was told.
func (m *master) do(do func()) {
	switch {
	case m.dead:
	case m.stoppedUntil > m.w.now || len(m.held) > 0:
		if m.held = append(m.held, do); len(m.held) == 1 {
			m.w.after(m.stoppedUntil-m.w.now, m.goOn)
		}
	default:
		do()
	}
}

func (m *master) goOn() {
	if m.stoppedUntil > m.w.now {
		m.w.after(m.stoppedUntil-m.w.now, m.goOn)
		return
	}
	m.reads = m.w.now
	if m.w.rnd.IntN(2) == 0 { // what others wrote it may read last
		m.reads += m.w.ms(0, 30)
	}
	held := m.held
	m.held = nil
	for _, do := range held {
		if !m.dead {
			do()
		}
	}
}

// tick is one turn of Store.Run.
func (m *master) tick() {
	m.s.awake(m.last)
	m.take()
	m.last = m.s.host.now()
	m.later(simLease/10, m.tick)
}

func (m *master) take() {
	if !m.leaving {
		m.s.take(m.ctx, &m.jobs, m.work)
	}
}

func (m *master) beat() {
	m.s.shelf.beat("", m.name)
	m.later(simLease/beatsPerLease, m.beat)
}

func (m *master) cut() bool { return m.w.now < m.cutUntil || m.w.now < m.w.shelf.awayUntil }

// disconnect cuts a master off from JetStream.
func (m *master) disconnect(until time.Duration) {
	m.cutUntil = max(m.cutUntil, until)
	m.connection++
	m.w.after(m.cutUntil-m.w.now+time.Millisecond, func() {
		if !m.cut() {
			m.connect()
		}
	})
}

// connect follows the records from the start.
func (m *master) connect() {
	m.connection++
	m.watched = 0
	m.later(m.w.ms(0, 20), func() { m.gone = m.s.begin() })
	m.watched = m.w.now + 20*time.Millisecond
	var all []*kept
	for _, e := range m.w.shelf.entries {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *kept) int { return int(a.revision) - int(b.revision) })
	for _, e := range all {
		m.notice(e)
	}
	m.entry(func() { m.s.caughtUp(m.gone) })
}

// notice has a master see an entry, after those before it.
func (m *master) notice(e *kept) {
	if !strings.HasSuffix(e.key, ".state") && !strings.HasSuffix(e.key, ".progress") {
		return
	}
	m.entry(func() {
		id, _, _ := strings.Cut(strings.TrimPrefix(e.key, "master."), ".")
		before, _, _, _ := m.s.Known(id)
		m.s.entry(m.gone, e)
		if now, _, _, ok := m.s.Known(id); ok && now.Revision < before.Revision {
			m.w.fail("epochs: what %s knows of job %s falls from revision %d to %d", m.name, id, before.Revision, now.Revision)
		}
		m.take() // Run wakes up at each change
	})
}

func (m *master) entry(do func()) {
	w := m.w
	if m.dead || m.cut() {
		return
	}
	d := w.ms(0, 4)
	if w.chance(10) {
		w.met("watch behind")
		d = w.ms(500, 3000)
	}
	m.watched = max(m.watched+time.Microsecond, w.now+d)
	connection := m.connection
	var read func()
	read = func() {
		switch {
		case connection != m.connection:
		case w.now < m.reads:
			m.later(m.reads-w.now, read)
		default:
			do()
		}
	}
	m.later(m.watched-w.now, read)
}

// process1 is the host of a master.
type process1 struct{ m *master }

var beginning = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (p process1) now() time.Time { return beginning.Add(p.m.w.now + p.m.skew) }

func (p process1) pause(ctx context.Context, d time.Duration) {
	if ctx.Err() == nil {
		p.m.w.sleep(d)
	}
}

func (p process1) within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	at := p.m.w.now + d
	if before, ok := ctx.Value(deadlineKey{}).(time.Duration); ok {
		at = min(at, before)
	}
	inner, cancel := context.WithCancel(ctx)
	return virtual{inner, p.m.w, at}, cancel
}

func (p process1) start(wg *sync.WaitGroup, f func()) {
	p.m.count[wg]++
	p.m.w.spawn(p.m, func() {
		defer func() { p.m.count[wg]-- }()
		f()
	})
}

func (p process1) wait(wg *sync.WaitGroup) {
	for p.m.count[wg] > 0 {
		p.m.w.sleep(3 * time.Millisecond)
	}
}

// virtual is a context with a deadline in virtual time.
type virtual struct {
	context.Context
	w  *world
	at time.Duration
}

type deadlineKey struct{}

func (v virtual) Err() error {
	if err := v.Context.Err(); err != nil || v.w.now < v.at {
		return err
	}
	return context.DeadlineExceeded
}

func (v virtual) Value(key any) any {
	if key == (deadlineKey{}) {
		return v.at
	}
	return v.Context.Value(key)
}

// most is how many masters may die over a job in a row; it is maxDeaths of
// package master.
const most = 5

// work runs a job that this master has claimed, as master.runJob does.
func (m *master) work(ctx context.Context, l *Lease) {
	w, rec := m.w, l.Record()
	j := w.job(rec.ID)
	r := &run{w: w, m: m, l: l, j: j, ctx: ctx, attempts: map[int]*simAttempt{}, saved: map[int][]byte{}}
	if len(l.saved) > 0 {
		w.met("resumed with saved work")
	}
	why := ""
	done, err := m.s.Done(ctx, rec.ID)
	if err == nil {
		r.done, r.kept = done, len(done)
		r.input, err = io.ReadAll(m.s.Input(ctx, rec))
	}
	switch {
	case err != nil:
		why = err.Error()
	case !bytes.Equal(r.input, j.input):
		w.fail("answer: the input of job %s has become %q", rec.ID, r.input)
	case rec.Deaths > most:
		why = "masters died"
	default:
		why = r.scatter()
	}
	if ctx.Err() != nil {
		if errors.Is(context.Cause(ctx), ErrFenced) {
			w.met("fenced off")
		}
		return
	}
	if why == "" {
		why, err = r.finish()
	}
	if errors.Is(err, ErrAway) || ctx.Err() != nil {
		return
	}
	state := Succeeded
	var problem json.RawMessage
	if why != "" {
		state = Failed
		problem, _ = json.Marshal(why)
	}
	last, cancel := m.s.host.within(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	_ = l.End(last, func(rec *Record) { // what is wrong with it another master sees
		p := r.progress()
		p.Stopped, p.Queued, p.Running = p.Queued+p.Running, 0, 0
		rec.State, rec.Error, rec.Lacks, rec.Progress = state, problem, len(r.missing) > 0, &p
	})
}

// run is one run of a job: the loop around the machine.
type run struct {
	w     *world
	m     *master
	l     *Lease
	j     *simJob
	ctx   context.Context
	input []byte
	done  []int // blocks that had a result before

	machine  *schedule.Machine
	begun    time.Duration
	inbox    []happened
	waits    *thread
	turn     int
	timer    int
	view     sheaf.View
	index    []int // of the blocks of this run
	next     int   // the block to be read next
	attempts map[int]*simAttempt
	saved    map[int][]byte
	missing  []int
	why      string
	over     bool

	kept, tried int
}

type happened struct {
	event schedule.Event
	reply *sheaf.Reply
	view  *sheaf.View
}

type simAttempt struct {
	block    int
	number   int
	to       sheaf.Replica
	begun    time.Duration
	canceled bool
	ended    bool
	reply    *sheaf.Reply
}

func (r *run) progress() Progress {
	p := Progress{Total: r.j.blocks, Done: r.kept, Failed: len(r.missing), Attempts: r.tried}
	for _, a := range r.attempts {
		if !a.ended {
			p.Running = 1
		}
	}
	p.Running = min(p.Running, p.Total-p.Done-p.Failed)
	p.Queued = p.Total - p.Done - p.Failed - p.Running
	return p
}

func (r *run) put(h happened) {
	r.inbox = append(r.inbox, h)
	r.wake()
}

func (r *run) wake() {
	if t := r.waits; t != nil {
		r.waits = nil
		r.w.after(0, func() { r.w.resume(t) })
	}
}

// scatter works on the blocks that have no result. It returns why the job
// fails.
func (r *run) scatter() string {
	w, m := r.w, r.m
	r.begun = w.now
	r.machine = schedule.New(schedule.Config{Limit: 1 + w.rnd.IntN(16), PerReplica: 1 + w.rnd.IntN(3), TolerateShare: 1, ReplicaWait: 30 * time.Second})
	m.runs = append(m.runs, r)
	var told sync.WaitGroup
	m.s.host.start(&told, func() {
		var last Progress
		for !r.over && r.ctx.Err() == nil {
			if p := r.progress(); p != last {
				last = p
				r.l.Progress(r.ctx, p)
			}
			m.s.host.pause(r.ctx, 100*time.Millisecond)
		}
	})
	v := m.view
	r.inbox = []happened{{event: schedule.Event{Kind: schedule.Tick}}, {view: &v}}
	for !r.over && r.ctx.Err() == nil {
		for len(r.inbox) > 0 && !r.over {
			h := r.inbox[0]
			r.inbox = r.inbox[1:]
			r.step(h)
		}
		if r.over || r.ctx.Err() != nil {
			break
		}
		r.turn++
		turn := r.turn
		r.waits = w.current
		w.after(200*time.Millisecond, func() { // sees that the context has ended
			if r.turn == turn {
				r.wake()
			}
		})
		w.park()
	}
	r.over = true
	m.runs = slices.DeleteFunc(m.runs, func(o *run) bool { return o == r })
	r.l.Wait()
	m.s.host.wait(&told)
	return r.why
}

func (r *run) step(h happened) {
	w := r.w
	switch {
	case h.view != nil:
		r.view = *h.view
		h.event.Kind = schedule.ViewChanged
		for _, rep := range r.view.Replicas {
			h.event.Replicas = append(h.event.Replicas, rep.ID)
		}
	case h.event.Kind == schedule.Ended:
		a := r.attempts[h.event.Attempt]
		if h.event.Outcome == schedule.OK && a.reply == nil {
			a.reply = h.reply
		}
		if h.event.Outcome == schedule.Saved {
			r.saved[a.block] = h.reply.Body
		}
	}
	var result *sheaf.Result
	for _, c := range r.machine.Step(w.now-r.begun, h.event) {
		switch c.Kind {
		case schedule.Read:
			for range c.N {
				r.readOne()
			}
		case schedule.SetTimer:
			r.timer++
			if g := r.timer; c.At != schedule.Never {
				w.after(max(0, c.At-(w.now-r.begun))+w.ms(0, 2), func() {
					if g == r.timer && !r.over {
						r.put(happened{event: schedule.Event{Kind: schedule.Tick}})
					}
				})
			}
		case schedule.Start:
			r.start(c)
		case schedule.Cancel:
			a := r.attempts[c.Attempt]
			a.canceled = true
			if w.chance(100) {
				w.met("late answer")
			} else {
				r.ended(c.Attempt, schedule.Canceled, 0, nil)
			}
		case schedule.Emit:
			a := r.attempts[c.Attempt]
			result = &sheaf.Result{Index: a.block, Data: a.reply.Body, From: a.reply.From, Attempts: c.Number, Verified: a.reply.Verified, Bytes: blockSize}
		case schedule.GiveUp:
			r.missing = append(r.missing, r.index[c.Block])
		case schedule.Fail:
			r.over = true
			r.why = fmt.Sprintf("scatter failed for reason %d", c.Reason)
		case schedule.Done:
			r.over = true
		}
	}
	if result != nil {
		for len(r.l.slots) == cap(r.l.slots) && r.ctx.Err() == nil {
			r.m.s.host.pause(r.ctx, time.Millisecond)
		}
		if r.ctx.Err() == nil {
			r.l.Commit(r.ctx, *result, func() { r.kept++ })
		}
	}
}

// readOne reads the next block that has no result.
func (r *run) readOne() {
	e := schedule.Event{Kind: schedule.BlockRead}
	for r.next < r.j.blocks && slices.Contains(r.done, r.next) {
		r.next++
	}
	switch {
	case r.next < r.j.blocks:
		r.index = append(r.index, r.next)
		r.next++
	case r.next == r.j.blocks:
		r.next++
		e.Kind = schedule.InputEnd
	default:
		return
	}
	r.inbox = append(r.inbox, happened{event: e})
}

func (r *run) start(c schedule.Command) {
	w, i := r.w, r.index[c.Block]
	a := &simAttempt{block: i, number: c.Number, to: r.view.Replicas[c.Rank], begun: w.now}
	r.attempts[c.Attempt] = a
	r.tried++
	if e, ok := w.shelf.there(fmt.Sprintf("master.%s.block.%d", r.j.id, i)); ok {
		var h stored
		line, _, _ := bytes.Cut(e.value, []byte{'\n'})
		if err := json.Unmarshal(line, &h); err != nil || h.Epoch < r.l.rec.Epoch {
			w.fail("done again: block %d of %s has a result of epoch %d, and is run in epoch %d", i, r.j.id, h.Epoch, r.l.rec.Epoch)
		}
	}
	for _, o := range r.attempts {
		if o != a && o.block == i && !o.ended {
			w.met("hedge")
		}
	}
	req := &sheaf.Request{Job: r.j.id, Function: "worker", Index: i, Attempt: c.Number, To: a.to, Rank: c.Rank, Size: len(r.view.Replicas),
		Epoch: r.view.Epoch, Body: r.input[i*blockSize : min(len(r.input), (i+1)*blockSize)], Saved: r.saved[i]}
	w.spawn(r.m, func() {
		if len(req.Saved) == 0 {
			req.Saved = r.l.Saved(r.ctx, i)
		}
		reply, err := w.call(r, req)
		if err == nil && reply.More {
			r.l.Save(r.ctx, i, reply.Body)
		}
		outcome, wait := schedule.OK, time.Duration(0)
		if err != nil {
			outcome = schedule.Lost
			if ce, ok := errors.AsType[*sheaf.CallError](err); ok {
				outcome, wait = map[sheaf.Fault]schedule.Outcome{
					sheaf.FaultTask: schedule.Failed, sheaf.FaultRejected: schedule.Rejected, sheaf.FaultLost: schedule.Lost,
					sheaf.FaultRefused: schedule.Refused, sheaf.FaultThrottled: schedule.Throttled, sheaf.FaultTimeout: schedule.TimedOut,
				}[ce.Fault], ce.RetryAfter
			}
		} else if reply.More {
			if outcome = schedule.Saved; a.canceled {
				outcome = schedule.Canceled
			}
		}
		r.ended(c.Attempt, outcome, wait, reply)
		if err == nil && w.chance(30) {
			w.met("answer twice")
			w.sleep(w.ms(0, 50))
			r.put(happened{event: schedule.Event{Kind: schedule.Ended, Attempt: c.Attempt, Outcome: outcome}, reply: reply})
		}
	})
}

func (r *run) ended(id int, o schedule.Outcome, wait time.Duration, reply *sheaf.Reply) {
	a := r.attempts[id]
	if a.ended {
		return
	}
	a.ended = true
	r.put(happened{event: schedule.Event{Kind: schedule.Ended, Attempt: id, Outcome: o, RetryAfter: wait}, reply: reply})
}

// finish reads what is stored and merges it, as master's run.finish does.
func (r *run) finish() (why string, err error) {
	s, id := r.m.s, r.j.id
	done, err := s.Done(r.ctx, id)
	if err != nil {
		return err.Error(), err
	}
	if len(r.missing) == 0 && len(done) != r.j.blocks {
		return "damaged: results are gone", nil
	}
	var answer []byte
	for _, i := range done {
		res, err := s.result(r.ctx, id, i)
		if err != nil {
			return err.Error(), err
		}
		answer = append(answer, res.Data...)
	}
	if len(r.missing) == 0 {
		if !bytes.Equal(answer, r.j.fold()) {
			r.w.fail("answer: of job %s is %q, and in order it is %q", id, answer, r.j.fold())
		}
		return "", nil
	}
	if err := r.l.Keep(r.ctx, fmt.Append(nil, r.missing)); err != nil {
		return err.Error(), err
	}
	if len(r.missing) > r.j.tolerate {
		return "blocks are missing", nil
	}
	return "", nil
}

// simJob is a job as its client knows it.
type simJob struct {
	w                   *world
	id                  string
	input               []byte
	blocks, tolerate    int
	accepted, cancelled bool
	poison, reject      int // a block, or -1
	failures, legs      map[int]int
	pace                int // how much longer than a short one a block takes

	known Record
}

func (j *simJob) block(i int) []byte {
	return j.input[i*blockSize : min(len(j.input), (i+1)*blockSize)]
}

// result is what the function makes of a block.
func result(block []byte) []byte {
	h := fnv.New64a()
	h.Write(block)
	return strconv.AppendUint(nil, h.Sum64()|1, 36)
}

// fold is what one process would answer.
func (j *simJob) fold() (answer []byte) {
	for i := range j.blocks {
		answer = append(answer, result(j.block(i))...)
	}
	return answer
}

// record is what JetStream holds of a job.
func (j *simJob) record() Record {
	e, ok := j.w.shelf.there("master." + j.id + ".state")
	if !ok {
		if j.accepted {
			j.w.fail("forgotten: job %s was accepted and is not there", j.id)
		}
		return Record{}
	}
	if j.known.Revision != e.revision {
		j.known, _ = decode(e)
	}
	return j.known
}

// mayFail says whether a job that is about to fail has a cause.
func (j *simJob) mayFail(r Record) bool {
	var why string
	if err := json.Unmarshal(r.Error, &why); err != nil {
		return false
	}
	return why == "blocks are missing" && r.Lacks && r.Progress != nil && r.Progress.Failed > j.tolerate ||
		why == "masters died" && r.Deaths > most && j.w.silent() > most
}

// silent counts what makes a master fall silent.
func (w *world) silent() (n int) {
	for _, kind := range []string{"master crash", "crash at step", "master stop", "master leave", "store away", "cut off", "beat lost"} {
		n += w.seen[kind]
	}
	return n
}

func (w *world) job(id string) *simJob {
	for _, j := range w.jobs {
		if j.id == id {
			return j
		}
	}
	return nil
}

func (w *world) newJob() {
	j := &simJob{w: w, id: fmt.Sprintf("j%d", len(w.jobs)+1), blocks: 1 + w.rnd.IntN(10), poison: -1, reject: -1, failures: map[int]int{}, legs: map[int]int{}}
	j.input = make([]byte, (j.blocks-1)*blockSize+1+w.rnd.IntN(blockSize))
	for i := range j.input {
		j.input[i] = byte('a' + w.rnd.IntN(26))
	}
	switch w.rnd.IntN(30) {
	case 0:
		j.poison = w.rnd.IntN(j.blocks)
	case 1:
		j.reject = w.rnd.IntN(j.blocks)
	}
	if w.rnd.IntN(4) == 0 {
		j.tolerate = 1
	}
	if w.rnd.IntN(8) == 0 {
		j.failures[w.rnd.IntN(j.blocks)] = 1 + w.rnd.IntN(4)
	}
	if w.rnd.IntN(4) == 0 {
		j.legs[w.rnd.IntN(j.blocks)] = 1 + w.rnd.IntN(3)
	}
	j.pace = []int{1, 10, 60}[w.rnd.IntN(3)]
	w.jobs = append(w.jobs, j)
	w.after(w.ms(0, 1500), func() {
		w.spawn(nil, func() { j.send(0) })
		if w.chance(250) {
			w.met("submitted twice")
			w.spawn(nil, func() { j.send(1) })
		}
		if w.chance(150) {
			at := w.ms(0, 3000)
			w.spawn(nil, func() {
				w.sleep(at)
				for !j.accepted {
					w.sleep(100 * time.Millisecond)
				}
				if w.calm {
					return
				}
				w.met("cancel")
				j.cancelled = true
				_ = j.ask(func(m *master) error {
					ctx, stop := m.s.host.within(context.Background(), 10*time.Second)
					defer stop()
					_, err := m.s.Cancel(ctx, j.id)
					return err
				})
			})
		}
		w.spawn(nil, j.look)
	})
}

// ask has any master do something for a client. It fails with ErrAway if that
// gives no answer.
func (j *simJob) ask(f func(*master) error) error {
	w, t := j.w, j.w.current
	up := w.up()
	if len(up) == 0 {
		w.sleep(50 * time.Millisecond)
		return ErrAway
	}
	m := up[w.rnd.IntN(len(up))]
	answered := false
	err := ErrAway
	give := func() {
		if !answered {
			answered = true
			w.resume(t)
		}
	}
	w.spawn(m, func() {
		e := f(m)
		w.after(w.ms(0, 2), func() {
			if !answered {
				err = e
				give()
			}
		})
	})
	w.after(12*time.Second, give)
	w.park()
	return err
}

// send gives the job to masters until one has accepted it.
func (j *simJob) send(client int) {
	w := j.w
	for n := 1; ; n++ {
		name := fmt.Sprintf("c%dn%d", client, n)
		err := j.ask(func(m *master) error {
			r, err := j.submit(m, name, j.input)
			if err == nil {
				j.accepted = true
				if r.Digest != fmt.Sprintf("%x", j.input) {
					w.fail("job %s is accepted as another: %q", j.id, r.Digest)
				}
			} else if errors.Is(err, ErrConflict) {
				w.fail("job %s is refused: %v", j.id, err)
			}
			return err
		})
		if err == nil {
			break
		}
		w.sleep(w.ms(1, 200))
	}
	if w.chance(50) {
		w.met("conflict")
		_ = j.ask(func(m *master) error {
			_, err := j.submit(m, fmt.Sprintf("c%dx", client), []byte("another"))
			if err == nil {
				w.fail("forgotten: another input is accepted as job %s", j.id)
			}
			return err
		})
	}
}

func (j *simJob) submit(m *master, name string, input []byte) (Record, error) {
	ctx := context.Background()
	if j.w.chance(100) {
		j.w.met("client leaves")
		short, stop := m.s.host.within(ctx, j.w.ms(0, 30))
		defer stop()
		ctx = short
	}
	u, err := m.s.Upload(ctx, j.id, name)
	if err != nil {
		return Record{}, err
	}
	defer u.Abort()
	if _, err := u.Write(input); err != nil {
		return Record{}, err
	}
	r, _, err := u.Submit(ctx, Record{Digest: fmt.Sprintf("%x", input), Input: Input{Bytes: int64(len(input)), Blocks: j.blocks}})
	return r, err
}

// look has a job that failed run again, now and then.
func (j *simJob) look() {
	w := j.w
	for range 3 {
		hasty := w.chance(100) // and sees only then that it has not failed
		for !j.accepted || !hasty && j.record().State != Failed {
			if w.calm {
				return
			}
			w.sleep(w.ms(50, 450))
		}
		if w.calm || w.rnd.IntN(2) == 0 {
			return
		}
		w.sleep(w.ms(0, 2000))
		w.met("redrive")
		_ = j.ask(func(m *master) error { // that it has not failed, or is another's to see
			ctx, stop := m.s.host.within(context.Background(), 10*time.Second)
			defer stop()
			_, err := m.s.Redrive(ctx, j.id)
			return err
		})
	}
}

// simReplica is a process of a function.
type simReplica struct {
	sheaf.Replica
	up      bool
	refuses bool
	slow    int
	limit   int
	running int
}

func (w *world) ups() []string {
	var ids []string
	for id, r := range w.replicas {
		if r.up && r.Function == "worker" {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// join starts a replica, at an address that is free.
func (w *world) join() {
	w.met("join")
	r := w.listen("worker", fmt.Sprintf("10.0.0.%d", w.freeAddress()))
	w.after(w.ms(0, 50), func() {
		if r.up {
			w.listed = append(slices.Clone(w.listed), r.Replica)
			w.views()
		}
	})
}

func (w *world) freeAddress() int {
	for a := 1 + w.rnd.IntN(4); ; a++ {
		if r := w.at[fmt.Sprintf("10.0.0.%d", a)]; r == nil || !r.up {
			return a
		}
	}
}

func (w *world) listen(function, url string) *simReplica {
	w.next++
	r := &simReplica{Replica: sheaf.Replica{Function: function, ID: fmt.Sprintf("r%d", w.next), URL: url, State: sheaf.Ready}, up: true, slow: 1, limit: 100}
	if w.chance(60) {
		r.slow = 20
	}
	if w.chance(100) {
		r.limit = 1
	}
	if w.chance(50) {
		r.refuses = true
		w.after(w.ms(1, 2000), func() { r.refuses = false })
	}
	w.replicas[r.ID], w.at[url] = r, r
	w.logf("%s of %s at %s", r.ID, function, url)
	return r
}

func (w *world) crashReplica(r *simReplica) {
	if !r.up {
		return
	}
	w.met("replica crash")
	w.goneReplica(r)
	w.unlist(r.ID, w.ms(0, 1000)) // the watcher is behind
	w.after(w.ms(5, 500), w.join)
}

func (w *world) goneReplica(r *simReplica) {
	r.up = false
	if w.at[r.URL] == r && w.chance(300) {
		o := w.listen("other", r.URL)
		w.after(w.ms(100, 5000), func() { o.up = false })
	}
}

func (w *world) unlist(id string, late time.Duration) {
	w.after(late, func() {
		w.listed = slices.DeleteFunc(slices.Clone(w.listed), func(r sheaf.Replica) bool { return r.ID == id })
		w.views()
	})
}

// views tells all masters of the view.
func (w *world) views() {
	w.epoch++
	v := sheaf.View{Function: "worker", Epoch: w.epoch, Replicas: w.listed}
	for _, m := range w.masters {
		if m.dead {
			continue
		}
		d := w.ms(0, 5)
		if w.chance(50) {
			w.met("view behind")
			d = w.ms(300, 3000)
		}
		m.viewed = max(m.viewed+time.Microsecond, w.now+d)
		m.later(m.viewed-w.now, func() { m.newView(v) })
	}
}

func (m *master) newView(v sheaf.View) {
	if v.Epoch < m.view.Epoch {
		m.w.fail("epochs: the view of %s falls from %d to %d", m.name, m.view.Epoch, v.Epoch)
	}
	m.view = v
	for _, r := range m.runs {
		r.put(happened{view: &v})
	}
}

// call carries a block to whoever has the replica's address, and has the answer
// judged.
func (w *world) call(r *run, req *sheaf.Request) (*sheaf.Reply, error) {
	fault := func(f sheaf.Fault) (*sheaf.Reply, error) {
		return nil, &sheaf.CallError{Fault: f, From: req.To.ID, Err: errors.New("simulated")}
	}
	if req.To.Function != req.Function {
		w.fail("foreign: a block of %s goes to %s of %s", req.Function, req.To.ID, req.To.Function)
	}
	w.sleep(w.ms(0, 1))
	rep := w.at[req.To.URL]
	if rep == nil || !rep.up || rep.refuses {
		w.met("refuse")
		return fault(sheaf.FaultRefused)
	}
	body := result(req.Body)
	header := http.Header{wire.Replica: {rep.ID}, wire.Digest: {wire.Sum(body)}}
	judge := func(status int, body []byte) (*sheaf.Reply, error) {
		reply, err := r.m.caller.Judge(req, wire.Proof{}, &http.Response{StatusCode: status, Header: header,
			ContentLength: int64(len(body)), Body: io.NopCloser(bytes.NewReader(body))})
		if err == nil {
			r.m.proved = r.m.proved || reply.Verified
		}
		return reply, err
	}
	if rep.ID != req.To.ID {
		w.met("another's address")
		if w.chance(500) { // one that does not look whom the block is for
			return judge(http.StatusOK, body)
		}
		return judge(http.StatusMisdirectedRequest, nil)
	}
	rep.running++
	defer func() { rep.running-- }()
	j, i := r.j, req.Index
	d := w.ms(1, 10) * time.Duration(min(j.pace*rep.slow, 200))
	if rep.slow > 1 {
		w.met("straggler")
	}
	if w.chance(20) { // hangs
		w.met("timeout")
		w.sleep(3 * time.Second)
		return fault(sheaf.FaultTimeout)
	}
	if rep.running > rep.limit {
		w.met("throttle")
		if w.rnd.IntN(2) == 0 {
			header.Set("Retry-After", "1")
		}
		return judge(http.StatusTooManyRequests, nil)
	}
	w.sleep(d)
	if i == j.poison {
		w.met("poison")
		w.crashReplica(rep)
	}
	if !rep.up {
		return fault(sheaf.FaultLost)
	}
	switch {
	case i == j.reject:
		w.met("reject")
		header.Set(wire.Code, wire.CodeRejected)
		return judge(http.StatusUnprocessableEntity, nil)
	case j.failures[i] > 0:
		j.failures[i]--
		w.met("fail")
		header.Set(wire.Code, wire.CodeFailed)
		return judge(http.StatusInternalServerError, nil)
	case w.chance(25):
		w.met("cut")
		return judge(http.StatusOK, body[:w.rnd.IntN(len(body))])
	case w.chance(15):
		w.met("damaged")
		body[w.rnd.IntN(len(body))] ^= 1
		return judge(http.StatusOK, body)
	case r.m.proved && w.chance(15):
		w.met("page")
		header = http.Header{}
		return judge(http.StatusOK, []byte("<html>"))
	case w.chance(10):
		w.met("redirect")
		header = http.Header{"Location": {"http://elsewhere"}}
		return judge(http.StatusTemporaryRedirect, nil)
	}
	if len(req.Saved) > 0 && string(req.Saved[:2]) != fmt.Sprintf("%d:", i) {
		w.fail("answer: block %d of %s goes on with %q, which is another's", i, j.id, req.Saved)
	}
	if legs := j.legs[i]; len(req.Saved)-2 < legs && legs > 0 {
		w.met("save")
		state := req.Saved
		if len(state) == 0 {
			state = fmt.Appendf(nil, "%d:", i)
		}
		state = append(slices.Clone(state), 'x')
		header.Set(wire.Saved, "1")
		header.Set(wire.Digest, wire.Sum(state))
		return judge(http.StatusAccepted, state)
	}
	return judge(http.StatusOK, body)
}
