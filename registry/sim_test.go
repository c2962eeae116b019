package registry

// sim_test.go is a world in one thread, by a seed: two watchers of one
// provider, which crash, come again, are behind, hear the source and the
// provider in different orders and write at the same time, to a bucket that
// loses requests and answers and is itself lost; and a reader that follows it,
// loses its connection and reads it anew. What merges, decides and writes is
// the Watcher's own code, and what reads is the Registry's; the bucket, the
// provider and the source are models. After each write and each read it checks
// what must never happen, and at the end that the record is what there is.
//
// A failing seed is run again with
//
//	go test ./registry -run 'TestSimulation$' -seed N -v

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
)

var (
	oneSeed  = flag.Uint64("seed", 0, "run only this seed of the simulation, with its trace")
	numSeeds = flag.Uint64("seeds", 1000, "how many seeds to simulate")
)

var met = []string{"deploy", "remove", "start", "ready", "crash", "address again", "watcher crash", "watcher behind", "list lost", "stream broken",
	"list behind", "request lost", "answer lost", "overtaken", "bucket lost", "reader anew", "reader behind", "record removed", "two write"}

func TestSimulation(t *testing.T) {
	if *oneSeed != 0 {
		if err := newWorld(*oneSeed, testWriter{t}).run(); err != nil {
			t.Fatalf("seed %d: %v", *oneSeed, err)
		}
		return
	}
	seen := map[string]int{}
	for seed := uint64(1); seed <= *numSeeds; seed++ {
		w := newWorld(seed, io.Discard)
		if err := w.run(); err != nil {
			t.Fatalf("seed %d: %v\nrun it again: go test ./registry -run 'TestSimulation$' -seed %d -v", seed, err, seed)
		}
		for k, n := range w.seen {
			seen[k] += n
		}
	}
	var table strings.Builder
	for _, k := range met {
		fmt.Fprintf(&table, "%12d  %s\n", seen[k], k)
		if *numSeeds >= 1000 && seen[k] == 0 {
			t.Errorf("%d seeds never met %q", *numSeeds, k)
		}
	}
	t.Logf("%d seeds, no violation\n%s", *numSeeds, table.String())
}

func TestSameSeedSameTrace(t *testing.T) {
	for seed := uint64(1); seed <= 100; seed++ {
		a, b := fnv.New64a(), fnv.New64a()
		if err := newWorld(seed, a).run(); err != nil {
			t.Fatal(seed, err)
		}
		if err := newWorld(seed, b).run(); err != nil {
			t.Fatal(seed, err)
		}
		if a.Sum64() != b.Sum64() {
			t.Fatalf("seed %d gave two traces", seed)
		}
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

type world struct {
	rnd   *rand.Rand
	trace io.Writer
	seen  map[string]int
	err   error
	step  int
	calm  bool

	functions map[string]*simFunction // that are deployed
	next      int
	of        map[string]string // the function of each replica that ever was

	bucket   simBucket
	watchers []*simWatcher
	reader   *Registry
	pending  []*held           // entries on their way to the reader
	epochs   map[string]uint64 // that the reader saw
}

type simFunction struct {
	desired  int
	replicas []sheaf.Replica
}

// simWatcher is a Watcher, and what is on its way to it.
type simWatcher struct {
	*Watcher
	views  []sheaf.View
	lists  [][]types.FunctionStatus
	behind int // steps
}

type held struct {
	jetstream.KeyValueEntry // nil
	key                     string
	value                   []byte
	revision                uint64
	op                      jetstream.KeyValueOp
}

func (e *held) Key() string                     { return e.key }
func (e *held) Value() []byte                   { return e.value }
func (e *held) Revision() uint64                { return e.revision }
func (e *held) Operation() jetstream.KeyValueOp { return e.op }

// simBucket is the bucket, its stream and the JetStream that has it.
type simBucket struct {
	jetstream.JetStream // nil, and so below
	w                   *world
	entries             map[string]*held
	seq                 uint64
	made                time.Time
	lost                bool
	busy                bool // one watcher writes while another is about to
}

type simKV struct {
	jetstream.KeyValue
	b *simBucket
	o *simWatcher
}

type simStream struct {
	jetstream.Stream
	b *simBucket
}

func newWorld(seed uint64, trace io.Writer) *world {
	w := &world{
		rnd: rand.New(rand.NewPCG(seed, 0x2E61)), trace: trace, seen: map[string]int{}, functions: map[string]*simFunction{},
		of: map[string]string{}, epochs: map[string]uint64{},
	}
	w.bucket = simBucket{w: w, entries: map[string]*held{}, made: time.Unix(1, 0)}
	w.reader = &Registry{log: slog.New(slog.DiscardHandler), records: map[string]Record{}, changed: make(chan struct{})}
	w.watchers = []*simWatcher{w.watcher(), w.watcher()}
	return w
}

func (w *world) fail(format string, a ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("at step %d: "+format, append([]any{w.step}, a...)...)
		w.logf("VIOLATION %v", w.err)
	}
}

func (w *world) logf(format string, a ...any) {
	if w.trace != io.Discard {
		fmt.Fprintf(w.trace, "%d "+format+"\n", append([]any{w.step}, a...)...)
	}
}

func (w *world) met(kind string) { w.seen[kind]++; w.logf("%s", kind) }

func (w *world) chance(p int) bool { return !w.calm && w.rnd.IntN(100) < p }

// watcher starts one, as Run does.
func (w *world) watcher() *simWatcher {
	o := &simWatcher{Watcher: &Watcher{Log: w.reader.log, known: map[string]*watched{}}}
	o.erase = func(_ context.Context, key string, last uint64) error { return w.bucket.erase(o, key, last) }
	for o.kv == nil {
		_ = o.open(context.Background(), &simOpen{&w.bucket, o})
	}
	w.tellAll(o)
	return o
}

// tellAll is the beginning of the source's stream.
func (w *world) tellAll(o *simWatcher) {
	o.views = nil
	for _, key := range w.deployed() {
		o.views = append(o.views, w.view(key))
	}
	o.views = append(o.views, sheaf.View{})
}

func (w *world) deployed() (keys []string) {
	for key := range w.functions {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func (w *world) view(key string) sheaf.View {
	f := w.functions[key]
	if f == nil {
		return sheaf.View{Function: key, Desired: -1}
	}
	return sheaf.View{Function: key, Desired: f.desired, Replicas: slices.Clone(f.replicas)}
}

func (w *world) list() (list []types.FunctionStatus) {
	for _, key := range w.deployed() {
		name, namespace, _ := strings.Cut(key, ".")
		list = append(list, types.FunctionStatus{Name: name, Namespace: namespace, Replicas: uint64(w.functions[key].desired)})
	}
	return list
}

// changed has the source tell of a function.
func (w *world) changed(key string) {
	for _, o := range w.watchers {
		o.views = append(o.views, w.view(key))
	}
}

func (w *world) run() error {
	for w.step = 1; w.step <= 150 && w.err == nil; w.step++ {
		w.life()
		for _, o := range w.watchers {
			w.turn(o)
		}
		w.read()
	}
	// From here on nothing changes and nothing fails.
	w.calm = true
	for _, o := range w.watchers {
		o.behind, o.lists = 0, nil
		o.round++
		w.tellAll(o)
	}
	writes := 0
	for round := range 60 {
		before := w.bucket.seq
		for _, o := range w.watchers {
			for range len(o.views) + 1 {
				w.turn(o)
			}
		}
		if round >= 40 {
			writes += int(w.bucket.seq - before)
		}
		w.step++
	}
	if writes > 0 {
		w.fail("agree: the watchers go on writing: %d times after all is said", writes)
	}
	w.anew()
	for len(w.pending) > 0 {
		w.read()
	}
	w.judge()
	return w.err
}

// life is what happens to functions and replicas.
func (w *world) life() {
	keys := w.deployed()
	switch x := w.rnd.IntN(100); {
	case x < 8 && len(keys) < 3:
		key := Key(fmt.Sprintf("f%d", 1+w.rnd.IntN(4)))
		if w.functions[key] == nil {
			w.met("deploy")
			w.functions[key] = &simFunction{desired: 1 + w.rnd.IntN(3)}
			w.changed(key)
		}
	case x < 11 && len(keys) > 0:
		key := keys[w.rnd.IntN(len(keys))]
		w.met("remove")
		delete(w.functions, key)
		w.changed(key)
	case x < 30 && len(keys) > 0:
		key := keys[w.rnd.IntN(len(keys))]
		f := w.functions[key]
		w.next++
		r := sheaf.Replica{Function: key, ID: fmt.Sprintf("r%d", w.next), URL: fmt.Sprintf("http://10.0.0.%d", 1+w.rnd.IntN(6)), State: sheaf.Starting, Since: time.Unix(int64(w.step), 0)}
		for _, other := range w.of {
			if strings.HasSuffix(other, " "+r.URL) && !strings.HasPrefix(other, key+" ") {
				w.met("address again")
				break
			}
		}
		w.of[r.ID] = key + " " + r.URL
		w.met("start")
		f.replicas = append(slices.Clone(f.replicas), r)
		w.changed(key)
	case x < 55 && len(keys) > 0:
		key := keys[w.rnd.IntN(len(keys))]
		f := w.functions[key]
		if len(f.replicas) == 0 {
			return
		}
		list, i := slices.Clone(f.replicas), w.rnd.IntN(len(f.replicas))
		if list[i].State != sheaf.Ready {
			w.met("ready")
			list[i].State, list[i].Since = sheaf.Ready, time.Unix(int64(w.step), 0)
		} else {
			w.met("crash")
			list = slices.Delete(list, i, i+1)
		}
		f.replicas = list
		w.changed(key)
	case x < 57:
		w.met("bucket lost")
		w.bucket.entries, w.bucket.seq, w.bucket.lost = map[string]*held{}, 0, true
		w.bucket.made = w.bucket.made.Add(time.Second)
		clear(w.epochs)
		w.pending = nil
		w.anew()
	}
}

// turn has a watcher do one of the things that its loop does.
func (w *world) turn(o *simWatcher) {
	ctx := context.Background()
	if o.behind > 0 {
		o.behind--
		return
	}
	switch {
	case w.chance(2):
		w.met("watcher crash")
		*o = *w.watcher()
		return
	case w.chance(3):
		w.met("watcher behind")
		o.behind = w.rnd.IntN(15)
		return
	case w.chance(3):
		w.met("stream broken")
		o.round++
		w.tellAll(o)
	}
	var err error
	switch x := w.rnd.IntN(3); {
	case x == 0 && len(o.views) > 0 || w.calm && len(o.views) > 0:
		v := o.views[0]
		o.views = o.views[1:]
		o.seen(v)
	case x == 1:
		switch {
		case w.chance(10):
			w.met("list lost")
		case w.chance(10):
			w.met("list behind")
			o.lists = append(o.lists, w.list())
		default:
			o.lists = append(o.lists, w.list())
			o.counted(o.lists[0])
			o.lists = o.lists[1:]
		}
	default:
		err = o.look(ctx, &simOpen{&w.bucket, o})
	}
	if err == nil {
		_ = o.write(ctx) // it is tried again
	}
}

// read gives the reader what has come, in order.
func (w *world) read() {
	if w.chance(4) {
		w.anew()
	}
	for len(w.pending) > 0 {
		if w.chance(20) {
			w.met("reader behind")
			return
		}
		e := w.pending[0]
		w.pending = w.pending[1:]
		w.reader.apply(e)
		if e.op != jetstream.KeyValuePut {
			continue
		}
		rec, _, _, _ := w.reader.get(e.key)
		if rec.Epoch < w.epochs[e.key] {
			w.fail("epochs: of %s falls from %d to %d", e.key, w.epochs[e.key], rec.Epoch)
		}
		w.epochs[e.key] = rec.Epoch
	}
}

// anew has the reader follow the bucket from the start, as Registry.read does.
func (w *world) anew() {
	w.met("reader anew")
	w.pending = nil
	missing := map[string]Record{}
	for _, rec := range w.reader.Records() {
		missing[rec.Function] = rec
	}
	var all []*held
	for _, e := range w.bucket.entries {
		delete(missing, e.key)
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *held) int { return int(a.revision) - int(b.revision) })
	w.reader.drop(missing)
	w.pending = all
}

// judge compares the record with what there is.
func (w *world) judge() {
	for _, key := range w.deployed() {
		f := w.functions[key]
		want := Record{Function: key, Desired: f.desired, Replicas: slices.Clone(f.replicas)}
		order(want.Replicas)
		got, known, _, _ := w.reader.get(key)
		if !known || !same(got, want) {
			w.fail("converge: the record of %s is %+v and must be %+v", key, got, want)
		}
	}
	for _, rec := range w.reader.Records() {
		if w.functions[rec.Function] == nil {
			w.fail("converge: there is a record of %s, which is gone", rec.Function)
		}
	}
}

// simOpen is the bucket as one watcher opens it.
type simOpen struct {
	*simBucket
	o *simWatcher
}

func (s *simOpen) CreateOrUpdateKeyValue(context.Context, jetstream.KeyValueConfig) (jetstream.KeyValue, error) {
	if s.w.chance(5) {
		return nil, context.DeadlineExceeded
	}
	s.lost = false
	return &simKV{b: s.simBucket, o: s.o}, nil
}

func (s *simOpen) KeyValue(context.Context, string) (jetstream.KeyValue, error) {
	return nil, context.DeadlineExceeded
}

func (s *simOpen) Stream(context.Context, string) (jetstream.Stream, error) {
	return &simStream{b: s.simBucket}, nil
}

func (s *simStream) CachedInfo() *jetstream.StreamInfo {
	return &jetstream.StreamInfo{Created: s.b.made, State: jetstream.StreamState{LastSeq: s.b.seq, Msgs: uint64(len(s.b.entries))}}
}

func (s *simStream) Info(context.Context, ...jetstream.StreamInfoOpt) (*jetstream.StreamInfo, error) {
	switch {
	case s.b.w.chance(5):
		return nil, context.DeadlineExceeded
	case s.b.lost:
		return nil, jetstream.ErrStreamNotFound
	}
	return s.CachedInfo(), nil
}

func (s *simStream) Purge(_ context.Context, opts ...jetstream.StreamPurgeOpt) error {
	var r jetstream.StreamPurgeRequest
	for _, o := range opts {
		if err := o(&r); err != nil {
			return err
		}
	}
	s.b.seq = max(s.b.seq, r.Sequence-1)
	return nil
}

func (k *simKV) Keys(context.Context, ...jetstream.WatchOpt) (keys []string, err error) {
	for key, e := range k.b.entries {
		if e.op == jetstream.KeyValuePut {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys, nil
}

func (k *simKV) Get(_ context.Context, key string) (jetstream.KeyValueEntry, error) {
	if k.b.w.chance(3) {
		return nil, context.DeadlineExceeded
	}
	if e := k.b.entries[key]; e != nil && e.op == jetstream.KeyValuePut {
		return e, nil
	}
	return nil, jetstream.ErrKeyNotFound
}

func (k *simKV) Create(_ context.Context, key string, value []byte, _ ...jetstream.KVCreateOpt) (uint64, error) {
	return k.b.put(k.o, key, value, jetstream.KeyValuePut, func(e *held) error {
		if e != nil && e.op == jetstream.KeyValuePut {
			return jetstream.ErrKeyExists
		}
		return nil
	})
}

func (k *simKV) Update(_ context.Context, key string, value []byte, last uint64) (uint64, error) {
	return k.b.put(k.o, key, value, jetstream.KeyValuePut, mustBe(last))
}

func (b *simBucket) erase(o *simWatcher, key string, last uint64) error {
	_, err := b.put(o, key, nil, jetstream.KeyValueDelete, mustBe(last))
	return err
}

func mustBe(last uint64) func(*held) error {
	return func(e *held) error {
		if e == nil && last != 0 || e != nil && e.revision != last {
			return jetstream.ErrKeyRevisionMismatch
		}
		return nil
	}
}

// put writes an entry, if it may be.
func (b *simBucket) put(o *simWatcher, key string, value []byte, op jetstream.KeyValueOp, may func(*held) error) (uint64, error) {
	w := b.w
	if !b.busy && w.chance(15) { // another watcher is quicker
		b.busy = true
		for _, other := range w.watchers {
			if other.Watcher != o.Watcher {
				w.met("two write")
				w.turn(other)
			}
		}
		b.busy = false
	}
	if w.chance(4) {
		w.met("request lost")
		return 0, context.DeadlineExceeded
	}
	if b.lost {
		return 0, jetstream.ErrNoStreamResponse
	}
	if err := may(b.entries[key]); err != nil {
		w.met("overtaken")
		return 0, err
	}
	b.seq++
	e := &held{key: key, value: value, revision: b.seq, op: op}
	b.entries[key] = e
	w.pending = append(w.pending, e)
	w.logf("%s of revision %d: %s", key, b.seq, value)
	if op == jetstream.KeyValuePut {
		w.judgeRecord(key, value)
	} else {
		w.met("record removed")
	}
	if w.chance(4) {
		w.met("answer lost")
		return 0, context.DeadlineExceeded
	}
	return b.seq, nil
}

// judgeRecord checks what is written: the replicas of the function itself, each
// once, the ready ones first and by age.
func (w *world) judgeRecord(key string, value []byte) {
	var rec Record
	if err := json.Unmarshal(value, &rec); err != nil || rec.Function != key {
		w.fail("the record of %s is %q: %v", key, value, err)
	}
	ids := map[string]bool{}
	for i, r := range rec.Replicas {
		switch {
		case !strings.HasPrefix(w.of[r.ID], key+" "):
			w.fail("foreign: replica %s is in the record of %s, and is of %s", r.ID, key, w.of[r.ID])
		case ids[r.ID]:
			w.fail("once: replica %s stands twice in the record of %s", r.ID, key)
		case i > 0 && r.State == sheaf.Ready && (rec.Replicas[i-1].State != sheaf.Ready || rec.Replicas[i-1].Since.After(r.Since)):
			w.fail("ranks: replica %s of %s stands after one that is younger", r.ID, key)
		}
		ids[r.ID] = true
	}
}
