package kube

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/sheaf-project/sheaf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	seed   = flag.Uint64("seed", 0, "of the random tests; 0 takes another one each time")
	events = flag.Int("events", 10000, "of the random tests")
)

const namespace = "openfaas-fn"

// random prints the seed that a failing test can be run with again.
func random(t *testing.T) *rand.Rand {
	n := *seed
	if n == 0 {
		n = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("run it again with -seed %d", n)
		}
	})
	return rand.New(rand.NewPCG(n, 4))
}

// pod is a pod as it is in truth.
type pod struct {
	name, uid, v4, v6 string // v6 is empty on a cluster of one family
	state             sheaf.State
}

// cluster is what a controller of EndpointSlices does: pods come, become
// ready, end and go, and move between slices; each write of a slice has a new
// resource version.
type cluster struct {
	r       *rand.Rand
	rv, ids int
	pods    map[string]map[string]*pod // by Service and name
	home    map[string]string          // of a pod's name: the number of its slice
	slices  map[string]*discovery.EndpointSlice
	emit    func(kind string, s *discovery.EndpointSlice)
}

func newCluster(r *rand.Rand, emit func(string, *discovery.EndpointSlice)) *cluster {
	return &cluster{r: r, pods: map[string]map[string]*pod{}, home: map[string]string{}, slices: map[string]*discovery.EndpointSlice{}, emit: emit}
}

var services = []string{"master", "worker", "thumbnail", "grep"}

// step changes one thing.
func (c *cluster) step() {
	service := services[c.r.IntN(len(services))]
	pods := c.pods[service]
	if pods == nil {
		pods = map[string]*pod{}
		c.pods[service] = pods
	}
	names := slices.Sorted(maps.Keys(pods))
	switch n := c.r.IntN(100); {
	case n < 30 && len(pods) < 12 || len(pods) == 0:
		c.ids++
		p := &pod{name: fmt.Sprintf("%s-%d", service, c.ids), state: sheaf.Starting}
		if c.r.IntN(4) == 0 { // as a StatefulSet names its pods; two of a name are never there at once
			p.name = service + "-0"
			if pods[p.name] != nil {
				return
			}
		}
		p.uid = fmt.Sprintf("uid-%d", c.ids)
		p.v4 = fmt.Sprintf("10.%d.%d.%d", c.ids>>14&255, c.ids>>6&255, 1+c.ids&63)
		if c.r.IntN(2) == 0 {
			p.v6 = fmt.Sprintf("fd00::%x", c.ids)
		}
		pods[p.name] = p
		c.home[p.name] = strconv.Itoa(c.r.IntN(3))
		c.write(service, c.home[p.name])
	case n < 55:
		p := pods[names[c.r.IntN(len(names))]]
		if p.state == sheaf.Draining {
			return
		}
		p.state = map[sheaf.State]sheaf.State{sheaf.Starting: sheaf.Ready, sheaf.Ready: sheaf.Starting}[p.state]
		c.write(service, c.home[p.name])
	case n < 70:
		p := pods[names[c.r.IntN(len(names))]]
		p.state = sheaf.Draining
		c.write(service, c.home[p.name])
	case n < 85: // it goes
		p := pods[names[c.r.IntN(len(names))]]
		delete(pods, p.name)
		c.write(service, c.home[p.name])
	case n < 97: // it moves to another slice: for a while it is in both, and the old one may say old things
		p := pods[names[c.r.IntN(len(names))]]
		from := c.home[p.name]
		c.home[p.name] = strconv.Itoa(c.r.IntN(3))
		if p.state == sheaf.Starting {
			p.state = sheaf.Ready
		}
		c.write(service, c.home[p.name])
		c.write(service, from)
	default: // the Service is deleted
		delete(c.pods, service)
		for i := range 3 {
			c.write(service, strconv.Itoa(i))
		}
	}
}

// write writes the slices of a number as they should be.
func (c *cluster) write(service, number string) {
	families := []discovery.AddressType{discovery.AddressTypeIPv4, discovery.AddressTypeIPv6}
	if c.r.IntN(2) == 0 {
		slices.Reverse(families)
	}
	for _, family := range families {
		name := service + "-" + number + "-" + string(family)
		s := &discovery.EndpointSlice{
			TypeMeta:    metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"},
			AddressType: family,
			Ports:       []discovery.EndpointPort{{Name: new("http"), Port: new(int32(8080)), Protocol: ptr(core.ProtocolTCP)}},
		}
		for _, key := range slices.Sorted(maps.Keys(c.pods[service])) {
			p := c.pods[service][key]
			address := p.v4
			if family == discovery.AddressTypeIPv6 {
				address = p.v6
			}
			if c.home[p.name] == number && address != "" {
				s.Endpoints = append(s.Endpoints, discovery.Endpoint{
					Addresses:  []string{address},
					Conditions: conditions(p.state),
					TargetRef:  &core.ObjectReference{Kind: "Pod", Namespace: namespace, Name: p.name, UID: types.UID(p.uid)},
				})
			}
		}
		old := c.slices[name]
		c.rv++
		meta := metav1.ObjectMeta{Name: name, Namespace: namespace, UID: types.UID(fmt.Sprint("slice-", c.rv)), ResourceVersion: strconv.Itoa(c.rv),
			Labels: map[string]string{discovery.LabelServiceName: service, discovery.LabelManagedBy: "endpointslice-controller.k8s.io"}}
		if old != nil {
			meta.UID = old.UID
		}
		s.ObjectMeta = meta
		switch {
		case old == nil && s.Endpoints == nil:
			c.rv--
		case s.Endpoints == nil && c.r.IntN(2) == 0: // or it stays, empty
			delete(c.slices, name)
			gone := old.DeepCopy()
			gone.ResourceVersion = s.ResourceVersion
			c.emit("DELETED", gone)
		case old == nil:
			c.slices[name] = s
			c.emit("ADDED", s)
		default:
			c.slices[name] = s
			c.emit("MODIFIED", s)
		}
	}
}

func conditions(s sheaf.State) discovery.EndpointConditions {
	switch s {
	case sheaf.Ready:
		return discovery.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)}
	case sheaf.Draining:
		return discovery.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
	}
	return discovery.EndpointConditions{Ready: new(false), Serving: new(false), Terminating: new(false)}
}

//go:fix inline
func ptr[T any](v T) *T { return new(v) }

// truth is what a reader should know, without Services that have no pods.
func (c *cluster) truth() map[string][]sheaf.Replica {
	all := map[string][]sheaf.Replica{}
	for service, pods := range c.pods {
		for _, name := range slices.Sorted(maps.Keys(pods)) {
			p := pods[name]
			all[service] = append(all[service], sheaf.Replica{ID: p.name, URL: "http://" + p.v4 + ":8080", State: p.state})
		}
	}
	return all
}

func (c *cluster) list() []any {
	var list []any
	for _, name := range slices.Sorted(maps.Keys(c.slices)) {
		list = append(list, c.slices[name])
	}
	return list
}

// Whatever a watch does to its events (twice, an old one again, lost ones and
// then a list), the directory ends where the truth is.
func TestDirectoryConverges(t *testing.T) {
	r := random(t)
	d := newDirectory()
	type event struct {
		kind string
		s    *discovery.EndpointSlice
	}
	var pending, past []event
	c := newCluster(r, func(kind string, s *discovery.EndpointSlice) { pending = append(pending, event{kind, s}) })
	apply := func(e event) {
		var err error
		switch e.kind {
		case "ADDED":
			err = d.Add(e.s)
		case "MODIFIED":
			err = d.Update(e.s)
		case "DELETED":
			err = d.Delete(e.s)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Replace(nil, "0"); err != nil {
		t.Fatal(err)
	}
	known := map[string][]sheaf.Replica{}
	for n, told := 0, 0; n < *events; n++ {
		c.step()
		lost := r.IntN(50) == 0
		if !lost {
			for _, e := range pending {
				apply(e)
				if r.IntN(5) == 0 {
					apply(e)
				}
				if old := len(past) - 1 - r.IntN(20); old >= 0 && r.IntN(5) == 0 && past[old].kind == "MODIFIED" && d.slices[past[old].s.Name] != nil {
					apply(past[old])
				}
			}
		}
		past = append(past, pending...)
		pending = nil
		if lost {
			if r.IntN(2) == 0 { // as after an error
				d.again()
				if _, all := d.take(); all {
					t.Fatal("a directory that is listed again is told before it is")
				}
			}
			if err := d.Replace(c.list(), "1"); err != nil {
				t.Fatal(err)
			}
		}
		views, _ := d.take()
		for service, replicas := range views {
			told++
			if len(replicas) == 0 {
				delete(known, service)
				continue
			}
			known[service] = replicas
		}
		if want := c.truth(); !reflect.DeepEqual(known, want) {
			t.Fatalf("after event %d of %d:\nknown %v\ntruth %v", n, *events, known, want)
		}
		if n == *events-1 && told > 6*n {
			t.Errorf("%d views were told for %d events", told, n)
		}
	}
}

// api is an API server that serves the bytes of list and watch.
type api struct {
	*httptest.Server
	t *testing.T

	mu      sync.Mutex // guards all below
	c       *cluster
	log     []string // events as lines of JSON
	first   int      // resource version of log[0]
	change  chan struct{}
	cut     chan struct{}
	down    bool
	noFlow  bool // it does not know lists as streams
	lists   int
	gone    int
	flow    int
	refused int
}

func newAPI(t *testing.T) *api {
	a := &api{t: t, first: 1, change: make(chan struct{}), cut: make(chan struct{})}
	a.c = newCluster(random(t), func(kind string, s *discovery.EndpointSlice) {
		line, err := json.Marshal(map[string]any{"type": kind, "object": s})
		if err != nil {
			t.Error(err)
		}
		a.log = append(a.log, string(line))
		close(a.change)
		a.change = make(chan struct{})
	})
	a.Server = httptest.NewServer(a)
	t.Cleanup(a.Close)
	return a
}

func (a *api) Close() {
	a.do(func() { close(a.cut); a.cut = make(chan struct{}); a.down = true })
	a.CloseClientConnections()
	a.Server.Close()
}

func (a *api) do(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	q := r.URL.Query()
	if r.Method != http.MethodGet || r.URL.Path != "/apis/discovery.k8s.io/v1/namespaces/"+namespace+"/endpointslices" ||
		q.Get("labelSelector") != discovery.LabelServiceName {
		a.t.Errorf("unexpected request, outside the role: %s %s", r.Method, r.URL)
	}
	if a.down {
		a.refused++
		status(w, 503, "ServiceUnavailable")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if q.Get("watch") == "" {
		a.lists++
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1",
			"metadata": map[string]any{"resourceVersion": strconv.Itoa(a.c.rv)}, "items": append([]any{}, a.c.list()...)})
		return
	}
	next := 0 // in log
	if from := q.Get("resourceVersion"); q.Get("sendInitialEvents") == "true" {
		if a.noFlow {
			status(w, 422, "Invalid")
			return
		}
		a.flow++
		for _, s := range a.c.list() {
			line, _ := json.Marshal(map[string]any{"type": "ADDED", "object": s})
			fmt.Fprintf(w, "%s\n", line)
		}
		fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}}}`+"\n", a.c.rv)
		next = len(a.log)
	} else if n, err := strconv.Atoi(from); err != nil || n < a.first-1 {
		a.gone++
		status(w, 410, "Expired")
		return
	} else {
		next = n - a.first + 1
	}
	next += a.first - 1 // counted from the beginning
	flush := http.NewResponseController(w)
	cut := a.cut
	for {
		for ; next-a.first+1 < len(a.log); next++ {
			if next-a.first+1 < 0 {
				fmt.Fprintf(w, `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}}`+"\n")
				a.gone++
				return
			}
			fmt.Fprintln(w, a.log[next-a.first+1])
		}
		change := a.change
		a.mu.Unlock()
		err := flush.Flush()
		select {
		case <-change:
		case <-cut:
		case <-r.Context().Done():
		}
		a.mu.Lock()
		select {
		case <-cut:
			return
		case <-r.Context().Done():
			return
		default:
		}
		if err != nil {
			return
		}
	}
}

func status(w http.ResponseWriter, code int, reason string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reason, code)
}

// reader keeps what a Source tells.
type reader struct {
	mu    sync.Mutex
	known map[string][]sheaf.Replica
	all   int // how often all were told
	fails []error
}

func read(t *testing.T, s *Source) *reader {
	t.Helper()
	rd := &reader{known: map[string][]sheaf.Replica{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			for v, err := range s.Replicas(ctx) {
				rd.mu.Lock()
				switch name := v.Function; {
				case err != nil:
					rd.fails = append(rd.fails, err)
				case name == "":
					rd.all++
				case v.Desired != Unknown:
					t.Errorf("a view tells that %d replicas are desired", v.Desired)
				case len(v.Replicas) == 0:
					delete(rd.known, name)
				default:
					rd.known[name] = v.Replicas
				}
				rd.mu.Unlock()
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return rd
}

// knows waits until the reader knows the truth.
func (rd *reader) knows(t *testing.T, a *api) {
	t.Helper()
	want := map[string][]sheaf.Replica{}
	a.do(func() {
		for service, list := range a.c.truth() {
			for i := range list {
				list[i].Function = service
			}
			want[service+"."+namespace] = list
		}
	})
	var known map[string][]sheaf.Replica
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		rd.mu.Lock()
		known = maps.Clone(rd.known)
		rd.mu.Unlock()
		if reflect.DeepEqual(known, want) {
			return
		}
	}
	t.Fatalf("the reader does not learn the truth:\nknown %v\ntruth %v\nfailures %v", known, want, rd.fails)
}

func source(t *testing.T, a *api) *Source {
	t.Helper()
	s, err := New(&rest.Config{Host: a.URL}, namespace, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // what client-go's transport keeps alive is no leak of ours
		a.CloseClientConnections()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return s
}

// A real client on a real server, which cuts watches, forgets old versions and
// goes away.
func TestSourceConverges(t *testing.T) {
	a := newAPI(t)
	rd := read(t, source(t, a))
	for n := range *events {
		a.do(func() {
			a.c.step()
			switch a.c.r.IntN(400) {
			case 0, 1, 2: // a watch ends, as it does every few minutes
				close(a.cut)
				a.cut = make(chan struct{})
			case 3: // and its version has been compacted away
				a.first += len(a.log)
				a.log = nil
				close(a.cut)
				a.cut = make(chan struct{})
			case 4:
				a.noFlow = !a.noFlow
			case 5:
				a.down = true
				close(a.cut)
				a.cut = make(chan struct{})
			case 6, 7:
				a.down = false
			}
		})
		if n%100 == 0 { // let it meet them
			time.Sleep(2 * time.Millisecond)
		}
		if n%1000 == 999 {
			a.do(func() { a.down = false })
			rd.knows(t, a)
		}
	}
	a.do(func() { a.down = false; a.first += len(a.log); a.log = nil; close(a.cut); a.cut = make(chan struct{}) })
	a.do(func() { a.c.step() })
	rd.knows(t, a)
	a.do(func() {
		t.Logf("%d lists, %d of them as streams, %d versions too old, %d refusals", a.lists+a.flow, a.flow, a.gone, a.refused)
		if a.gone == 0 {
			t.Error("no watch met 410 Gone")
		}
	})
}

// What was told stays until the API server is back; an outage is an error.
func TestServerThatIsAway(t *testing.T) {
	a := newAPI(t)
	a.do(func() {
		for range 20 {
			a.c.step()
		}
	})
	rd := read(t, source(t, a))
	rd.knows(t, a)
	a.do(func() { a.down = true; close(a.cut); a.cut = make(chan struct{}) })
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		rd.mu.Lock()
		fails := len(rd.fails)
		rd.mu.Unlock()
		if fails > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the outage is not told")
		}
	}
	rd.knows(t, a)
	a.do(func() {
		for range 20 {
			a.c.step()
		}
		a.down = false
	})
	rd.knows(t, a)
	rd.mu.Lock()
	defer rd.mu.Unlock()
	if rd.all < 2 {
		t.Errorf("that all were told was said %d times, and should be after each start", rd.all)
	}
}

// One slice at a time, for what the random cluster does not make.
func TestReplicasOfSlices(t *testing.T) {
	ref := func(name, uid string) *core.ObjectReference {
		return &core.ObjectReference{Kind: "Pod", Name: name, UID: types.UID(uid)}
	}
	slice := func(rv string, family discovery.AddressType, ports []discovery.EndpointPort, endpoints ...discovery.Endpoint) *discovery.EndpointSlice {
		return &discovery.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: rv, ResourceVersion: rv}, AddressType: family, Ports: ports, Endpoints: endpoints}
	}
	at := func(address string, c discovery.EndpointConditions, ref *core.ObjectReference) discovery.Endpoint {
		return discovery.Endpoint{Addresses: []string{address}, Conditions: c, TargetRef: ref}
	}
	named := func(name string, n int32) discovery.EndpointPort {
		return discovery.EndpointPort{Name: &name, Port: &n}
	}
	v4, v6 := discovery.AddressTypeIPv4, discovery.AddressTypeIPv6
	ready, starting, draining := conditions(sheaf.Ready), conditions(sheaf.Starting), conditions(sheaf.Draining)
	for _, c := range []struct {
		name   string
		slices []*discovery.EndpointSlice
		want   []string
	}{
		{"conditions that are not set are true", []*discovery.EndpointSlice{slice("1", v4, nil, at("10.0.0.1", discovery.EndpointConditions{}, ref("a", "1")))},
			[]string{"a http://10.0.0.1:8080 ready"}},
		{"a Service that publishes pods which are not ready", []*discovery.EndpointSlice{slice("1", v4, nil,
			at("10.0.0.1", discovery.EndpointConditions{Ready: new(true), Serving: new(false)}, ref("a", "1")))},
			[]string{"a http://10.0.0.1:8080 starting"}},
		{"without a pod the address is the ID", []*discovery.EndpointSlice{slice("1", v4, nil, at("10.0.0.1", ready, nil),
			at("10.0.0.2", ready, &core.ObjectReference{Kind: "Node", Name: "n"}))},
			[]string{"10.0.0.1 http://10.0.0.1:8080 ready", "10.0.0.2 http://10.0.0.2:8080 ready"}},
		{"one pod with two families", []*discovery.EndpointSlice{slice("9", v6, nil, at("fd00::1", ready, ref("a", "1"))), slice("1", v4, nil, at("10.0.0.1", ready, ref("a", "1")))},
			[]string{"a http://10.0.0.1:8080 ready"}},
		{"IPv6 alone", []*discovery.EndpointSlice{slice("1", v6, nil, at("FD00:0::1", ready, ref("a", "1")))}, []string{"a http://[fd00::1]:8080 ready"}},
		{"a pod that ends ends in both families", []*discovery.EndpointSlice{slice("2", v6, nil, at("fd00::1", draining, ref("a", "1"))), slice("1", v4, nil, at("10.0.0.1", ready, ref("a", "1")))},
			[]string{"a http://10.0.0.1:8080 draining"}},
		{"the slice that was written last knows", []*discovery.EndpointSlice{slice("10", v4, nil, at("10.0.0.1", ready, ref("a", "1"))), slice("9", v4, nil, at("10.0.0.1", starting, ref("a", "1")))},
			[]string{"a http://10.0.0.1:8080 ready"}},
		{"a name that another pod had", []*discovery.EndpointSlice{slice("10", v4, nil, at("10.0.0.2", ready, ref("a-0", "2"))), slice("9", v4, nil, at("10.0.0.1", draining, ref("a-0", "1")))},
			[]string{"a-0 http://10.0.0.2:8080 ready"}},
		{"the port named http", []*discovery.EndpointSlice{slice("1", v4, []discovery.EndpointPort{named("metrics", 8081), named("http", 9000)}, at("10.0.0.1", ready, ref("a", "1")))},
			[]string{"a http://10.0.0.1:9000 ready"}},
		{"8080 before others", []*discovery.EndpointSlice{slice("1", v4, []discovery.EndpointPort{named("m", 8081), named("", 8080)}, at("10.0.0.1", ready, ref("a", "1")))},
			[]string{"a http://10.0.0.1:8080 ready"}},
		{"the only port", []*discovery.EndpointSlice{slice("1", v4, []discovery.EndpointPort{named("", 5000)}, at("10.0.0.1", ready, ref("a", "1")))},
			[]string{"a http://10.0.0.1:5000 ready"}},
		{"addresses that no pod has", []*discovery.EndpointSlice{
			slice("1", v4, nil, at("127.0.0.1", ready, ref("a", "1")), at("169.254.169.254", ready, ref("b", "1")), at("0.0.0.0", ready, ref("c", "1")), at("db.example.com", ready, ref("d", "1")), at("fd00::1", ready, ref("e", "1"))),
			slice("2", discovery.AddressTypeFQDN, nil, at("db.example.com", ready, ref("f", "1"))),
			slice("3", v4, nil, discovery.Endpoint{TargetRef: ref("g", "1")}),
		}, []string{}},
	} {
		for range 8 { // in both orders, and whatever order maps have
			got := []string{}
			for _, r := range replicas(c.slices) {
				got = append(got, fmt.Sprintf("%s %s %s", r.ID, r.URL, r.State))
			}
			if !slices.Equal(got, c.want) {
				t.Fatalf("%s: got %q, want %q", c.name, got, c.want)
			}
			slices.Reverse(c.slices)
		}
	}
}

// Outside a cluster the error says what is missing.
func TestInClusterOutside(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := InCluster(namespace, nil); err == nil {
		t.Error("no error")
	}
	if _, err := New(&rest.Config{Host: "http://[::1"}, namespace, nil); err == nil {
		t.Error("no error for a host that is none")
	}
}
