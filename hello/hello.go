// Package hello is a source of replica addresses for providers that tell none,
// such as faasd: replicas announce themselves.
//
// An announcement is a hint. Its address is the one that it came from, and a
// replica is there once whoever listens at that address has answered a
// challenge by its name: with a key, by a proof that is good for that address
// alone. It then counts for a lease, and must say hello again. Which functions
// there are, and how many replicas they shall have, is the provider's word; see
// registry.Source.
package hello

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// Unknown is the Desired of each View that a Source yields: announcements do
// not tell how many replicas a function shall have.
const Unknown = -2

// Defaults of a [Source].
const (
	DefaultLease       = 15 * time.Second
	DefaultMaxReplicas = 10_000
	DefaultRate        = 20
)

const (
	maxBody          = 4 << 10  // bytes of an announcement
	maxIdentity      = 64 << 10 // bytes of an answer to a challenge
	maxChallenges    = 64       // at once
	maxAddresses     = 16 << 10 // that say something within one second
	challengeTimeout = 3 * time.Second
)

// Why an announcement was not believed: the codes of the answers, and what
// [Source.Rejected] counts by, beside those of [wire.Signer.Verify].
const (
	CodeMethod      = "method_not_allowed"
	CodeMalformed   = "malformed"
	CodeTooLarge    = "too_large"
	CodePort        = "port"
	CodeAddress     = "address"
	CodeUnknown     = "unknown_function"
	CodeTaken       = "taken"       // another address has that replica
	CodeUnreachable = "unreachable" // nobody answers there
	CodeUnproven    = "unproven"    // somebody else does
	CodeRate        = "rate"
	CodeBusy        = "busy"
	CodeFull        = "full"
)

// private are the networks in which functions are, unless Networks says others.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fc00::/7"),
}

// metadata are addresses within those networks that belong to clouds.
var metadata = []netip.Addr{netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("100.100.100.200")}

// A Source takes announcements as an http.Handler, and tells of the replicas
// that have proven to be there. Its fields must not change once it is used. It
// may be used concurrently, but Replicas by one at a time.
type Source struct {
	// Known says whether there is a function, by its name with its namespace,
	// as the provider tells; must be set.
	Known func(function string) bool
	// Signer has the key that announcements and proofs are made with; nil means
	// that any replica that answers by its name is believed.
	Signer *wire.Signer
	// Lease is how long a proof counts; 0 means DefaultLease.
	Lease time.Duration
	// Networks are where replicas may be; none means the private ones.
	Networks []netip.Prefix
	// Loopback lets replicas be on this machine. It is for tests.
	Loopback bool
	// MaxReplicas is how many there may be; 0 means DefaultMaxReplicas.
	MaxReplicas int
	// Rate is how many announcements one address may send in a second; 0 means
	// DefaultRate.
	Rate int
	Log  *slog.Logger // nil means slog.Default

	once       sync.Once
	client     *http.Client
	challenges chan struct{} // a place for each
	begun      time.Time
	changed    chan struct{} // has a token when replicas may have changed

	mu       sync.Mutex // guards all below
	replicas map[string]*replica
	rejected map[string]uint64
	accepted uint64
	second   time.Time // that heard is for
	heard    map[netip.Addr]int
}

// A replica is one that has proven to be there.
type replica struct {
	hello  wire.Hello
	at     netip.AddrPort
	proven time.Time // by which its lease counts
	asked  time.Time
}

func (s *Source) init() {
	s.once.Do(func() {
		s.replicas, s.rejected = make(map[string]*replica), make(map[string]uint64)
		s.changed = make(chan struct{}, 1)
		s.challenges = make(chan struct{}, maxChallenges)
		s.begun = time.Now()
		s.client = &http.Client{
			Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxIdentity},
			Timeout:       challengeTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	})
}

func (s *Source) lease() time.Duration {
	if s.Lease > 0 {
		return s.Lease
	}
	return DefaultLease
}

// Rejected returns how many announcements were not believed, by code.
func (s *Source) Rejected() map[string]uint64 {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.rejected)
}

// Accepted returns how many announcements were believed, and how many replicas
// are in now.
func (s *Source) Accepted() (announcements uint64, replicas int) {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted, len(s.replicas)
}

// ServeHTTP takes an announcement: POST with a [wire.Hello]. It is answered when
// the replica has proven to be there, with a [wire.Welcome], or with a problem
// that says why it is not believed.
func (s *Source) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.init()
	if p := s.take(w, r); p != nil {
		s.mu.Lock()
		s.rejected[p.Code]++
		s.mu.Unlock()
		p.Write(w)
		return
	}
	body, err := json.Marshal(wire.Welcome{LeaseMS: s.lease().Milliseconds()})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(body, '\n')) // a replica that left needs no answer
}

var (
	label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	name  = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9._]{0,251}[A-Za-z0-9])?$`)
)

// take takes an announcement, or says why not.
func (s *Source) take(w http.ResponseWriter, r *http.Request) *wire.Problem {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return wire.Refuse(http.StatusMethodNotAllowed, CodeMethod, "an announcement is a POST")
	}
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return wire.Refuse(http.StatusForbidden, CodeAddress, "the announcement comes from no IP address")
	}
	addr := from.Addr().Unmap()
	if p := s.allowed(addr); p != nil {
		return p
	}
	if !s.within(addr) {
		return wire.Refuse(http.StatusTooManyRequests, CodeRate,
			fmt.Sprintf("%v announces more than %d times in a second; a replica does so every third of its lease", addr, s.rate())).Within(s.rate()).After(time.Second)
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(challengeTimeout)) // not every ResponseWriter can
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return wire.Refuse(http.StatusRequestEntityTooLarge, CodeTooLarge, fmt.Sprintf("an announcement has at most %d bytes", maxBody)).Within(maxBody)
	}
	var h wire.Hello
	if err != nil || json.Unmarshal(body, &h) != nil {
		return wire.Refuse(http.StatusBadRequest, CodeMalformed,
			`the announcement is not JSON such as {"function":"worker","namespace":"openfaas-fn","replica":"worker-1","port":8080}`)
	}
	if !label.MatchString(h.Function) || !label.MatchString(h.Namespace) || !name.MatchString(h.Replica) {
		return wire.Refuse(http.StatusBadRequest, CodeMalformed, "function, namespace and replica must be names as Kubernetes has them")
	}
	if h.Port < 1 || h.Port > 65535 {
		return wire.Refuse(http.StatusBadRequest, CodePort, fmt.Sprintf("port is %d; ports are from 1 to 65535", h.Port)).About("port")
	}
	if said, err := netip.ParseAddr(h.Address); h.Address != "" && (err != nil || said.Unmap() != addr) {
		return wire.Refuse(http.StatusForbidden, CodeAddress,
			fmt.Sprintf("address is %q, and the announcement comes from %v: a replica announces itself only, by its IP address or without one", wire.Cut(h.Address), addr)).About("address")
	}
	if p := s.Signer.VerifyHello(h, body, r.Header[wire.Signature], time.Now()); p != nil {
		return p
	}
	h.Address = addr.WithZone("").String()
	if !s.Known(h.Function + "." + h.Namespace) {
		return wire.Refuse(http.StatusNotFound, CodeUnknown,
			fmt.Sprintf("the provider lists no function %s in namespace %s; deploy it, or set sheaf_function and OPENFAAS_NAMESPACE to what it is deployed as", h.Function, h.Namespace)).After(time.Second)
	}
	next := &replica{hello: h, at: netip.AddrPortFrom(addr, uint16(h.Port))}
	if p := s.room(next); p != nil {
		return p
	}
	select {
	case s.challenges <- struct{}{}:
	default:
		return wire.Refuse(http.StatusServiceUnavailable, CodeBusy, fmt.Sprintf("%d replicas are being asked who they are; try again", maxChallenges)).Within(maxChallenges).After(time.Second)
	}
	draining, err := s.challenge(r.Context(), next)
	<-s.challenges
	switch {
	case errors.Is(err, errOther):
		s.drop(next)
		return wire.Refuse(http.StatusForbidden, CodeUnproven, fmt.Sprintf("at %v: %v", next.at, err))
	case err != nil:
		if errors.Is(err, syscall.ECONNREFUSED) {
			s.drop(next)
		}
		return wire.Refuse(http.StatusForbidden, CodeUnreachable, fmt.Sprintf("nobody at %v says who he is: %v", next.at, err))
	case draining:
		s.drop(next)
		return nil
	}
	return s.enter(next)
}

// allowed refuses addresses at which no replica can be.
func (s *Source) allowed(a netip.Addr) *wire.Problem {
	networks := s.Networks
	if len(networks) == 0 {
		networks = private
	}
	in := slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(a.WithZone("")) })
	switch {
	case a.IsLoopback() && s.Loopback:
		return nil
	case a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || slices.Contains(metadata, a), !in:
		return wire.Refuse(http.StatusForbidden, CodeAddress,
			fmt.Sprintf("no replica can be at %v: it is not in the networks of functions, which hello_networks sets", a)).About("address")
	}
	return nil
}

func (s *Source) rate() int {
	if s.Rate > 0 {
		return s.Rate
	}
	return DefaultRate
}

// within counts an announcement of an address, and says whether it may come in.
func (s *Source) within(a netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); s.heard == nil || now.Sub(s.second) >= time.Second {
		s.second, s.heard = now, make(map[netip.Addr]int)
	}
	if _, known := s.heard[a]; !known && len(s.heard) >= maxAddresses {
		return false
	}
	s.heard[a]++
	return s.heard[a] <= s.rate()
}

func (r *replica) key() string {
	return r.hello.Function + "." + r.hello.Namespace + "/" + r.hello.Replica
}

// room says whether there is a place for a replica.
func (s *Source) room(next *replica) *wire.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.placed(next)
}

// placed is room with s.mu held.
func (s *Source) placed(next *replica) *wire.Problem {
	most := s.MaxReplicas
	if most <= 0 {
		most = DefaultMaxReplicas
	}
	old := s.replicas[next.key()]
	switch {
	case old == nil && len(s.replicas) >= most:
		return wire.Refuse(http.StatusServiceUnavailable, CodeFull, fmt.Sprintf("there are %d replicas, the limit", most)).Within(most).After(s.lease())
	case old != nil && old.at != next.at && time.Since(old.proven) < s.lease():
		// It would be a way to take the place of another one.
		return wire.Refuse(http.StatusConflict, CodeTaken,
			fmt.Sprintf("replica %s is at another address; its lease must end first, or give this one a name of its own in sheaf_replica", next.hello.Replica)).After(s.lease() / 3)
	}
	return nil
}

// enter gives a replica a lease from now on.
func (s *Source) enter(next *replica) *wire.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.placed(next); p != nil {
		return p
	}
	next.proven = time.Now()
	next.asked = next.proven
	s.replicas[next.key()] = next
	s.accepted++
	s.tell()
	return nil
}

// drop forgets a replica, if it is where it is said to be.
func (s *Source) drop(gone *replica) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.replicas[gone.key()]; r != nil && r.at == gone.at {
		delete(s.replicas, gone.key())
		s.tell()
	}
}

// tell wakes Replicas. s.mu is held.
func (s *Source) tell() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// errOther says that whoever answers is not the replica.
var errOther = errors.New("whoever answers does not prove to be the replica")

// challenge asks whoever is at a replica's address to prove that he is it.
func (s *Source) challenge(ctx context.Context, r *replica) (draining bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, challengeTimeout)
	defer cancel()
	nonce := rand.Text()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.at.String()+"/_/sheaf?nonce="+nonce, nil)
	if err != nil {
		return false, err
	}
	req.Header.Set("User-Agent", "sheaf")
	resp, err := s.client.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIdentity))
	if err != nil {
		return false, err
	}
	var who struct {
		Function, Namespace, Replica, Nonce, Proof string
		Draining                                   bool
	}
	switch h := r.hello; {
	case resp.StatusCode != http.StatusOK || json.Unmarshal(body, &who) != nil:
		return false, fmt.Errorf("%w: it knows nothing of sheaf", errOther)
	case who.Function != h.Function || who.Replica != h.Replica || who.Namespace != h.Namespace:
		return false, fmt.Errorf("%w: it is another one", errOther) // its name is nobody's business
	case who.Nonce != nonce:
		return false, fmt.Errorf("%w: it did not answer the challenge", errOther)
	case !s.Signer.Proves(h, nonce, who.Proof):
		return false, fmt.Errorf("%w: both ends need the same key in the file that sheaf_key_file names, and no translation of addresses between them", errOther)
	}
	return who.Draining, nil
}

// Replicas yields, for each function with replicas that are in, those replicas,
// and again on each change, until the loop is left. Desired is [Unknown], Since
// is not known, epochs are 0. A function without replicas any more is told once.
// Nothing is told in the first half of a lease of a Source: until then there may
// be replicas that had no time to say hello. A View without a function says that
// all were told.
func (s *Source) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	s.init()
	return func(yield func(sheaf.View, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		select {
		case <-time.After(time.Until(s.begun.Add(s.lease() / 2))):
		case <-ctx.Done():
			return
		}
		tick := time.NewTicker(max(s.lease()/15, 10*time.Millisecond))
		defer tick.Stop()
		told := map[string][]sheaf.Replica{}
		for first := true; ; first = false {
			s.ask(ctx, &wg)
			now := s.views()
			for function := range told {
				if _, is := now[function]; !is {
					now[function] = nil
				}
			}
			for _, function := range slices.Sorted(maps.Keys(now)) {
				list := now[function]
				if slices.Equal(list, told[function]) {
					continue
				}
				if told[function] = list; len(list) == 0 {
					delete(told, function)
				}
				if !yield(sheaf.View{Function: function, Desired: Unknown, Replicas: slices.Clone(list)}, nil) {
					return
				}
			}
			if first && !yield(sheaf.View{}, nil) {
				return
			}
			select {
			case <-s.changed:
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}
}

// views returns the replicas whose leases have not ended, by function.
func (s *Source) views() map[string][]sheaf.Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := make(map[string][]sheaf.Replica)
	for key, r := range s.replicas {
		if time.Since(r.proven) >= s.lease() {
			delete(s.replicas, key)
			continue
		}
		function, _, _ := strings.Cut(key, "/")
		now[function] = append(now[function], sheaf.Replica{Function: r.hello.Function, ID: r.hello.Replica, State: sheaf.Ready,
			URL: "http://" + net.JoinHostPort(r.hello.Address, strconv.Itoa(r.hello.Port))})
	}
	for _, list := range now {
		slices.SortFunc(list, func(a, b sheaf.Replica) int { return strings.Compare(a.ID, b.ID) })
	}
	return now
}

// ask asks replicas that have not been for a while whether they are still there:
// one that died says no goodbye.
func (s *Source) ask(ctx context.Context, wg *sync.WaitGroup) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.replicas {
		if time.Since(r.asked) < s.lease()/6 {
			continue
		}
		select {
		case s.challenges <- struct{}{}:
		default:
			return
		}
		r.asked = time.Now()
		wg.Go(func() {
			draining, err := s.challenge(ctx, r)
			<-s.challenges
			if draining || errors.Is(err, errOther) || errors.Is(err, syscall.ECONNREFUSED) {
				s.drop(r)
			}
		})
	}
}
