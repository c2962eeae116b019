package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/tools/cache"

	"github.com/sheaf-project/sheaf"
)

// functionPort is where a function listens when its slice does not say.
const functionPort = 8080

// A directory holds the EndpointSlices of a namespace, as a reflector writes
// them, and tells which Services have changed.
type directory struct {
	// changed holds a token when there is something to take.
	changed chan struct{}

	mu     sync.Mutex // guards all below
	slices map[string]*discovery.EndpointSlice
	known  map[string]bool // Services, and whether they have changed
	synced bool            // slices holds all there were at first
}

var _ cache.ReflectorStore = (*directory)(nil)

func newDirectory() *directory {
	return &directory{
		changed: make(chan struct{}, 1),
		slices:  make(map[string]*discovery.EndpointSlice), known: make(map[string]bool),
	}
}

// again has everything told again, once it has been listed again.
func (d *directory) again() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.synced = false
	for service := range d.known {
		d.known[service] = true
	}
	select {
	case <-d.changed: // of the former reader
	default:
	}
}

// take returns the replicas of the Services that have changed since it was
// called last, none of one that is gone, and whether all have been told.
func (d *directory) take() (changed map[string][]sheaf.Replica, all bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.synced {
		return nil, false
	}
	changed = make(map[string][]sheaf.Replica)
	of := make(map[string][]*discovery.EndpointSlice)
	for _, s := range d.slices {
		if service := s.Labels[discovery.LabelServiceName]; d.known[service] {
			of[service] = append(of[service], s)
		}
	}
	for service, is := range d.known {
		if is {
			changed[service] = replicas(of[service])
			d.known[service] = false
			if of[service] == nil {
				delete(d.known, service)
			}
		}
	}
	return changed, true
}

// touch notes that the Service of a slice has changed. d.mu is held.
func (d *directory) touch(s *discovery.EndpointSlice) {
	if s == nil {
		return
	}
	if service := s.Labels[discovery.LabelServiceName]; service != "" {
		d.known[service] = true
	}
}

// tell wakes who takes.
func (d *directory) tell() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// Add takes a slice over, unless it is older than the one that is here.
func (d *directory) Add(obj any) error {
	s, ok := obj.(*discovery.EndpointSlice)
	if !ok {
		return fmt.Errorf("%T is no EndpointSlice", obj)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.slices[s.Name]
	if old != nil && (newer(old, s) > 0 || old.ResourceVersion == s.ResourceVersion) {
		return nil
	}
	d.touch(old)
	d.touch(s)
	d.slices[s.Name] = s
	d.tell()
	return nil
}

// Update is Add.
func (d *directory) Update(obj any) error { return d.Add(obj) }

// Delete forgets a slice, unless another one has its name by now.
func (d *directory) Delete(obj any) error {
	s, ok := obj.(*discovery.EndpointSlice)
	if !ok {
		return fmt.Errorf("%T is no EndpointSlice", obj)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if old := d.slices[s.Name]; old != nil && newer(old, s) <= 0 {
		d.touch(old)
		delete(d.slices, s.Name)
		d.tell()
	}
	return nil
}

// Replace takes over a whole list.
func (d *directory) Replace(list []any, _ string) error {
	here := make(map[string]*discovery.EndpointSlice, len(list))
	for _, obj := range list {
		s, ok := obj.(*discovery.EndpointSlice)
		if !ok {
			return fmt.Errorf("%T is no EndpointSlice", obj)
		}
		here[s.Name] = s
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, set := range []map[string]*discovery.EndpointSlice{d.slices, here} {
		for name := range set {
			if a, b := d.slices[name], here[name]; a == nil || b == nil || a.ResourceVersion != b.ResourceVersion {
				d.touch(set[name])
			}
		}
	}
	d.slices, d.synced = here, true
	d.tell()
	return nil
}

// Resync has nothing to do: what changes is told at once.
func (d *directory) Resync() error { return nil }

// newer compares the age of two slices: 1 when a was written after b, 0 also
// when that cannot be known.
func newer(a, b *discovery.EndpointSlice) int {
	n, err := resourceversion.CompareResourceVersion(a.ResourceVersion, b.ResourceVersion)
	if err != nil {
		return 0
	}
	return n
}

// place is one endpoint of one slice.
type place struct {
	sheaf.Replica
	uid   string // of the pod
	v6    bool
	slice *discovery.EndpointSlice
}

// replicas merges the slices of one Service: each pod is one replica, however
// many slices and address families it is in.
//
// A pod may be in two slices while it moves from one to the other: the one that
// was written last knows. So it does when two pods have had one name. Of two
// families IPv4 is taken. What is left is settled by the address, so that all
// who look agree.
func replicas(of []*discovery.EndpointSlice) []sheaf.Replica {
	type pod struct {
		place                           // that counts
		latest *discovery.EndpointSlice // that the pod is in
		ending bool                     // there is no way back
	}
	pods := make(map[[2]string]*pod) // by name and UID
	for _, s := range of {
		if s.AddressType != discovery.AddressTypeIPv4 && s.AddressType != discovery.AddressTypeIPv6 {
			continue // names are not addresses
		}
		for _, e := range s.Endpoints {
			p, ok := placeOf(s, e)
			if !ok {
				continue
			}
			key := [2]string{p.ID, p.uid}
			o := pods[key]
			switch {
			case o == nil:
				o = &pod{place: p, latest: s}
				pods[key] = o
			case cmp.Or(family(o.v6)-family(p.v6), newer(p.slice, o.slice), strings.Compare(o.URL, p.URL)) > 0:
				o.place = p
			}
			if newer(s, o.latest) > 0 {
				o.latest = s
			}
			o.ending = o.ending || p.State == sheaf.Draining
		}
	}
	best := make(map[string]*pod)
	for key, p := range pods {
		if p.ending {
			p.State = sheaf.Draining
		}
		o := best[key[0]]
		if o == nil || cmp.Or(newer(p.latest, o.latest), strings.Compare(o.uid, p.uid)) > 0 {
			best[key[0]] = p
		}
	}
	list := make([]sheaf.Replica, 0, len(best))
	for _, id := range slices.Sorted(maps.Keys(best)) {
		list = append(list, best[id].Replica)
	}
	return list
}

func family(v6 bool) int {
	if v6 {
		return 6
	}
	return 4
}

// placeOf reads an endpoint. ok is false when its address is none that a pod
// can have.
func placeOf(s *discovery.EndpointSlice, e discovery.Endpoint) (p place, ok bool) {
	if len(e.Addresses) == 0 {
		return place{}, false
	}
	// Of several addresses, by the API's words, the first one counts.
	ip, err := netip.ParseAddr(e.Addresses[0])
	if err != nil || ip.Is4() != (s.AddressType == discovery.AddressTypeIPv4) || !ip.IsGlobalUnicast() {
		return place{}, false
	}
	p = place{v6: ip.Is6(), slice: s}
	p.ID, p.uid = ip.String(), ip.String()
	if t := e.TargetRef; t != nil && t.Kind == "Pod" && t.Name != "" {
		p.ID, p.uid = t.Name, string(t.UID)
	}
	p.URL = "http://" + net.JoinHostPort(ip.String(), strconv.Itoa(port(s)))
	is := func(c *bool) bool { return c == nil || *c } // the API's words: nil is to be taken as true
	switch c := e.Conditions; {
	case c.Terminating != nil && *c.Terminating:
		p.State = sheaf.Draining
	case is(c.Ready) && is(c.Serving): // a Service may call its pods ready before they are
		p.State = sheaf.Ready
	default:
		p.State = sheaf.Starting
	}
	return p, true
}

// port is where a slice's endpoints listen: at the port named http, as a
// function's is, else at 8080 if that is one of them, else at the first.
func port(s *discovery.EndpointSlice) int {
	best := 0
	for _, p := range s.Ports {
		if p.Port == nil || p.Protocol != nil && *p.Protocol != "TCP" {
			continue
		}
		n := int(*p.Port)
		if p.Name != nil && strings.EqualFold(*p.Name, "http") {
			return n
		}
		if best == 0 || n == functionPort {
			best = n
		}
	}
	if best == 0 {
		return functionPort
	}
	return best
}
