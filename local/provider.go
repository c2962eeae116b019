// Package local is an OpenFaaS-compatible provider, with a gateway's front, on
// this machine: functions are deployed, scaled and invoked by the API that
// faas-cli speaks, and their replicas are processes of the operating system,
// each with an address of its own.
//
// It is for development, tests and the first five minutes. It listens on
// loopback only, needs no docker and no account, and leaves nothing running but
// what a function moved out of its process group. What OpenFaaS's providers do
// not tell, it tells: where replicas are (GET /system/replicas).
package local

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// Namespace is the one namespace of a local provider.
const Namespace = "openfaas-fn"

// MaxReplicas bounds the replicas of a function; a function's label
// com.openfaas.scale.max may bound it further.
const MaxReplicas = 1000

// Labels that bound the number of a function's replicas.
const (
	LabelMin = "com.openfaas.scale.min"
	LabelMax = "com.openfaas.scale.max"
)

// A Provider runs functions. Make one with NewProvider.
type Provider struct {
	// DrainTime is how long a replica has to end, from the order to kill -9;
	// NewProvider sets it to 10 seconds. It must not change after the first
	// Deploy.
	DrainTime time.Duration
	// Liveness is how often a ready replica is asked whether it lives, by GET
	// /_/health, and how long it has to answer. One that has said 200 there,
	// and then gives no answer three times in a row, hangs: it is killed, and
	// another one started. NewProvider sets it to 5 seconds. It must not change
	// after the first Deploy.
	Liveness time.Duration
	// Env is what a replica finds in its environment when its deployment says
	// nothing else. It must not change after the first Deploy.
	Env map[string]string

	command func(image string) ([]string, error)
	prepare func(spec types.FunctionDeployment, build bool) error // what image does with a builder; nil without one
	log     *slog.Logger
	spawn   *spawner
	guard   *guard
	probe   *http.Client

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	store *store     // of a Stack; nil means that functions are forgotten and there are no secrets
	keep  sync.Mutex // held while what is in store changes; before mu

	mu        sync.Mutex // guards what is below, and the functions
	functions map[string]*function
	ports     map[string]bool // of replicas
	changed   chan struct{}   // closed, and made anew, at each change
	version   uint64          // counts changes
}

// function is a deployed function.
type function struct {
	spec        types.FunctionDeployment
	created     time.Time
	desired     int
	generation  int // of the spec
	replicas    []*replica
	invocations uint64
	turns       uint64 // of replicas
	failures    int    // replicas in a row that died young
	version     uint64
	logs        *logBook
}

// NewProvider returns a Provider without functions. command says how a replica
// of an image is started; its error is told to whoever deploys. A nil log means
// slog.Default. Close ends it.
func NewProvider(command func(image string) (argv []string, err error), log *slog.Logger) *Provider {
	ctx, cancel := context.WithCancel(context.Background())
	if log == nil {
		log = slog.Default()
	}
	p := &Provider{
		DrainTime: drainTimeout,
		Liveness:  livenessInterval,
		command:   command, log: log, ctx: ctx, cancel: cancel,
		spawn: newSpawner(),
		guard: newGuard(log),
		probe: &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, // a function must not send us elsewhere
		functions: make(map[string]*function),
		ports:     make(map[string]bool),
		changed:   make(chan struct{}),
	}
	return p
}

// Close ends all replicas, at once, and waits for them.
func (p *Provider) Close() {
	p.mu.Lock()
	p.cancel() // under the mutex: from here on, nothing begins
	p.mu.Unlock()
	p.wg.Wait()
	p.spawn.close()
	p.guard.close()
}

// touch tells the watchers that f changed. p.mu is held.
func (p *Provider) touch(f *function) {
	p.version++
	if f != nil {
		f.version = p.version
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

var functionName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// checkName refuses what cannot be the name of a function.
func checkName(name string) *wire.Problem {
	if !functionName.MatchString(name) {
		return wire.Refuse(http.StatusUnprocessableEntity, wire.CodeBadFunction,
			fmt.Sprintf("function name %q must be 1 to 63 lower-case letters, digits and inner hyphens", wire.Cut(name))).About("service")
	}
	return nil
}

func (p *Provider) unknown(name string) *wire.Problem {
	return wire.Refuse(http.StatusNotFound, wire.CodeNoFunction,
		fmt.Sprintf("function %q is not deployed; deploy it, or see /system/functions for those that are", wire.Cut(name)))
}

// Deploy creates a function, or changes it when create is false. The errors of
// Deploy, Delete, Scale and Kill are refusals as the API answers them.
func (p *Provider) Deploy(spec types.FunctionDeployment, create bool) error {
	if bad := checkName(spec.Service); bad != nil {
		return bad
	}
	if spec.Namespace != "" && spec.Namespace != Namespace {
		return foreign(spec.Namespace)
	}
	if err := p.image(spec, create || p.has(spec.Service)); err != nil {
		return err
	}
	least, most, err := bounds(spec)
	if err != nil {
		return wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter, err.Error()).About("labels")
	}
	for _, name := range spec.Secrets {
		if !p.hasSecret(name) {
			return wire.Refuse(http.StatusBadRequest, "unknown_secret",
				fmt.Sprintf("function %s wants secret %q, which does not exist; create it first, with faas-cli secret create", spec.Service, wire.Cut(name))).About("secrets")
		}
	}
	p.keep.Lock()
	defer p.keep.Unlock()
	k := kept{CreatedAt: time.Now().UTC(), Spec: spec}
	p.mu.Lock()
	f := p.functions[spec.Service]
	if f != nil {
		k.CreatedAt, k.Replicas = f.created, new(min(max(least, f.desired), most))
	}
	p.mu.Unlock()
	if f == nil && !create {
		return p.unknown(spec.Service)
	}
	if p.store != nil {
		if err := p.store.keepFunction(k); err != nil {
			return notKept("function "+spec.Service, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(k)
	p.warn(p.functions[spec.Service])
	return nil
}

// Annotations of sheaf's own that a function may have.
var annotations = []string{"sheaf.deliver"}

// warn says in a function's log, and in ours, which of its annotations look like
// ours and are not: one that is misspelt does nothing. p.mu is held.
func (p *Provider) warn(f *function) {
	if f.spec.Annotations == nil {
		return
	}
	for _, a := range slices.Sorted(maps.Keys(*f.spec.Annotations)) {
		if strings.HasPrefix(a, "sheaf.") && !slices.Contains(annotations, a) {
			says := fmt.Sprintf("annotation %s is not known and does nothing; known are %s", wire.Cut(a), strings.Join(annotations, ", "))
			f.logs.add(f.spec.Service, ProviderName, says)
			p.log.Warn(says, "function", f.spec.Service)
		}
	}
}

// image says why there is no image for a function. One that can be built is
// built, if it shall be now.
func (p *Provider) image(spec types.FunctionDeployment, build bool) error {
	if p.prepare != nil {
		return p.prepare(spec, build)
	}
	if _, err := p.command(spec.Image); err != nil {
		return unknownImage(err)
	}
	return nil
}

func unknownImage(err error) error {
	return wire.Refuse(http.StatusBadRequest, "unknown_image", err.Error()).About("image")
}

func (p *Provider) has(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.functions[name] != nil
}

// enter says whether work may still begin; p.wg counts it until it is done.
func (p *Provider) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return false
	}
	p.wg.Add(1)
	return true
}

// set makes or changes a function, whose spec has been checked. p.mu is held.
func (p *Provider) set(k kept) {
	f := p.functions[k.Spec.Service]
	if f == nil {
		f = &function{logs: newLogBook()}
		p.functions[k.Spec.Service] = f
	}
	f.spec, f.created = k.Spec, k.CreatedAt
	f.generation++
	f.failures = 0
	least, most, _ := bounds(f.spec) // they have been checked
	if f.desired = least; k.Replicas != nil {
		f.desired = min(*k.Replicas, most)
	}
	p.touch(f)
	p.reconcile(f)
}

// bounds reads how many replicas the labels allow.
func bounds(spec types.FunctionDeployment) (least, most int, err error) {
	least, most = 1, MaxReplicas
	if spec.Labels == nil {
		return least, most, nil
	}
	for label, n := range map[string]*int{LabelMin: &least, LabelMax: &most} {
		if s := (*spec.Labels)[label]; s != "" {
			if *n, err = strconv.Atoi(s); err != nil || *n < 0 || *n > MaxReplicas {
				return 0, 0, fmt.Errorf("label %s is %q, and must be a number from 0 to %d", label, wire.Cut(s), MaxReplicas)
			}
		}
	}
	if least > most {
		return 0, 0, fmt.Errorf("label %s is %d, above %s, which is %d", LabelMin, least, LabelMax, most)
	}
	return least, most, nil
}

// Delete removes a function: its replicas finish what they have and end.
func (p *Provider) Delete(name string) error {
	p.keep.Lock()
	defer p.keep.Unlock()
	p.mu.Lock()
	f := p.functions[name]
	p.mu.Unlock()
	if f == nil {
		return p.unknown(name)
	}
	if p.store != nil {
		if err := p.store.remove(functionsFolder, name+functionFile); err != nil {
			return notKept("function "+name, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.functions, name)
	f.desired = 0
	p.touch(nil)
	p.reconcile(f)
	return nil
}

// Scale sets how many replicas a function shall have, within its labels. They
// are kept as the function is.
func (p *Provider) Scale(name string, n int) error {
	p.keep.Lock()
	defer p.keep.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.functions[name]
	if f == nil {
		return p.unknown(name)
	}
	_, most, err := bounds(f.spec)
	if err != nil || n < 0 {
		return wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter, "replicas must be 0 or more").About("replicas")
	}
	n = min(n, most)
	if n == f.desired {
		return nil
	}
	if p.store != nil {
		p.mu.Unlock() // the disk may be slow; under keep, nobody else changes the function
		err := p.store.keepFunction(kept{CreatedAt: f.created, Spec: f.spec, Replicas: &n})
		p.mu.Lock()
		if err != nil {
			return notKept("function "+name, err)
		}
	}
	f.desired = n
	p.touch(f)
	p.reconcile(f)
	return nil
}

// Kill ends a replica as kill -9 does.
func (p *Provider) Kill(name, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.functions[name]
	if f == nil {
		return p.unknown(name)
	}
	for _, r := range f.replicas {
		if r.ID == id && r.process != nil {
			r.process.kill()
			return nil
		}
	}
	return wire.Refuse(http.StatusNotFound, wire.CodeNotFound, fmt.Sprintf("function %s has no running replica %q", name, wire.Cut(id)))
}

// reconcile starts and drains replicas until there are as many of the present
// generation as desired. Replicas of an older generation go as those of the
// present one become ready. p.mu is held.
func (p *Provider) reconcile(f *function) {
	var current, old []*replica
	ready := 0
	// Those that are not ready go first, and then the last to be ready: the
	// others keep their ranks.
	sorted := slices.Clone(f.replicas)
	slices.SortStableFunc(sorted, func(a, b *replica) int {
		if ra, rb := a.State == sheaf.Ready, b.State == sheaf.Ready; ra != rb {
			if ra {
				return -1
			}
			return 1
		}
		return a.Since.Compare(b.Since)
	})
	for _, r := range sorted {
		switch {
		case r.State == sheaf.Draining:
		case r.generation == f.generation:
			current = append(current, r)
			if r.State == sheaf.Ready {
				ready++
			}
		default:
			old = append(old, r)
		}
	}
	for ; len(current) < f.desired; current = append(current, nil) {
		p.begin(f)
	}
	for ; len(current) > f.desired; current = current[:len(current)-1] {
		p.drain(f, current[len(current)-1])
	}
	for keep := max(0, f.desired-ready); len(old) > keep; old = old[:len(old)-1] {
		p.drain(f, old[len(old)-1])
	}
}

// begin adds a replica to f and starts it. p.mu is held.
func (p *Provider) begin(f *function) {
	if p.ctx.Err() != nil {
		return
	}
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	r := &replica{
		Replica: sheaf.Replica{
			Function: f.spec.Service, ID: f.spec.Service + "-" + hex.EncodeToString(b[:]),
			State: sheaf.Starting, Since: time.Now().UTC(),
		},
		generation: f.generation,
		spec:       f.spec,
		end:        make(chan struct{}),
		quiet:      make(chan struct{}),
	}
	f.replicas = append(f.replicas, r)
	pause := time.Duration(0)
	if f.failures > 0 {
		pause = min(50*time.Millisecond<<min(f.failures, 8), 10*time.Second)
	}
	p.wg.Go(func() { p.live(f, r, pause) })
	p.touch(f)
}

// drain takes a replica out of the view and tells it to end. p.mu is held.
func (p *Provider) drain(f *function, r *replica) {
	r.State, r.Since = sheaf.Draining, time.Now().UTC()
	close(r.end)
	if r.calls == 0 {
		close(r.quiet)
	}
	p.touch(f)
}

// youth is the age before which a replica's death counts as a failed start.
const youth = time.Second

// live is the life of one replica, from its start to its removal.
func (p *Provider) live(f *function, r *replica, pause time.Duration) {
	begun := time.Now()
	err := errEnded
	select {
	case <-time.After(pause):
		begun = time.Now()
		err = p.process(f, r)
	case <-r.end:
	case <-p.ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	f.replicas = slices.DeleteFunc(f.replicas, func(o *replica) bool { return o == r })
	if r.State != sheaf.Draining && p.ctx.Err() == nil {
		switch {
		case time.Since(begun) >= youth:
			f.failures = 0
		case r.State == sheaf.Ready: // killed, perhaps: the next one comes soon, but not in a busy loop
			f.failures = max(f.failures, 1)
		default:
			f.failures++
		}
		f.logs.add(r.Function, r.ID, fmt.Sprintf("replica ended: %v", err))
		p.log.Info("replica ended", "function", r.Function, "replica", r.ID, "err", err)
	}
	p.touch(f)
	p.reconcile(f)
}

// views returns a View of every function that changed after the given version,
// with its replicas in all states.
func (p *Provider) views(after uint64) (views []sheaf.View, version uint64, changed <-chan struct{}, names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	names = slices.Sorted(maps.Keys(p.functions))
	for _, name := range names {
		if f := p.functions[name]; f.version > after {
			views = append(views, f.view())
		}
	}
	return views, p.version, p.changed, names
}

// view is the function's replicas in all states. p.mu is held.
func (f *function) view() sheaf.View {
	v := sheaf.View{Function: f.spec.Service + "." + Namespace, Desired: f.desired, Replicas: make([]sheaf.Replica, 0, len(f.replicas))}
	for _, r := range f.replicas {
		v.Replicas = append(v.Replicas, r.Replica)
	}
	return v
}

// status is the function as OpenFaaS tells it. p.mu is held.
func (f *function) status() types.FunctionStatus {
	s := f.spec
	available := 0
	for _, r := range f.replicas {
		if r.State == sheaf.Ready {
			available++
		}
	}
	return types.FunctionStatus{
		Name: s.Service, Image: s.Image, Namespace: Namespace, EnvProcess: s.EnvProcess, EnvVars: s.EnvVars,
		Constraints: s.Constraints, Secrets: s.Secrets, Labels: s.Labels, Annotations: s.Annotations,
		Limits: s.Limits, Requests: s.Requests, ReadOnlyRootFilesystem: s.ReadOnlyRootFilesystem,
		InvocationCount: float64(f.invocations), Replicas: uint64(f.desired), AvailableReplicas: uint64(available),
		CreatedAt: f.created,
	}
}

// Functions lists the functions, by name.
func (p *Provider) Functions() []types.FunctionStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]types.FunctionStatus, 0, len(p.functions))
	for _, name := range slices.Sorted(maps.Keys(p.functions)) {
		list = append(list, p.functions[name].status())
	}
	return list
}

var errNoReplica = errors.New("no replica is ready")

// take returns the ready replica of a function that has least to do, other
// than those in not, and counts a call for it; the caller gives it back with
// release. A function that was scaled to zero gets a replica.
func (p *Provider) take(ctx context.Context, name string, not []*replica) (*replica, error) {
	for {
		p.mu.Lock()
		f := p.functions[name]
		if f == nil {
			p.mu.Unlock()
			return nil, p.unknown(name)
		}
		if f.desired == 0 {
			f.desired = 1
			p.touch(f)
			p.reconcile(f)
		}
		var best *replica
		for _, r := range f.replicas {
			if r.State == sheaf.Ready && !slices.Contains(not, r) &&
				(best == nil || r.calls < best.calls || r.calls == best.calls && r.used < best.used) {
				best = r
			}
		}
		changed := p.changed
		if best != nil {
			if len(not) == 0 { // the first try of a call
				f.invocations++
			}
			f.turns++
			best.calls++
			best.used = f.turns
			p.mu.Unlock()
			return best, nil
		}
		p.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errNoReplica
		}
	}
}

func (p *Provider) release(r *replica) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.calls--
	if r.State == sheaf.Draining && r.calls == 0 {
		close(r.quiet) // take gives it no more
	}
}

// split takes "name" or "name.namespace" apart.
func split(name string) (string, bool) {
	name, ns, has := strings.Cut(name, ".")
	return name, !has || ns == Namespace
}
