package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Signature is the header that proves who wrote a request, or its answer:
//
//	Sheaf-Signature: t=UNIX_MILLISECONDS,n=NONCE,v1=HEX   (a request)
//	Sheaf-Signature: v1=HEX                               (its answer)
const Signature = "Sheaf-Signature"

// Codes of a request whose signature is refused.
const (
	CodeUnsigned = "signature_missing"
	CodeForged   = "signature_invalid"
	CodeExpired  = "signature_expired"
	CodeReplayed = "replayed"
)

// SignatureAge is how far the time in a signature may be from the clock of
// whoever checks it, either way.
const SignatureAge = 5 * time.Minute

// minKey is how short a key may be, in bytes.
const minKey = 16

// A Signer signs requests and answers with a key that both ends share, and
// checks those of others. The nil Signer signs nothing and asks for nothing.
// A Signer may be used concurrently.
//
// What is signed is an HMAC-SHA256 over all that an answer depends on: the
// function with its namespace, the whole [Envelope], the time, a nonce and the
// body's digest. The answer's is over the request's, the replica and the
// digest of the result, so that it is an answer to no other request.
type Signer struct {
	// Lax takes what is not signed at all, as in development, where functions
	// that know nothing of sheaf work beside those that do. What is signed must
	// be signed right.
	Lax bool
	// Namespace is that of functions that are named without one.
	Namespace string

	keys  []*signKey
	nonce string // of this Signer, followed by a dot and a number for each request
	count atomic.Uint64
	seen  replays
}

// ParseKeys reads a secret file: one key, or two on two lines while they
// rotate, of at least 16 bytes each. The first one signs, both are good to
// check with. Line ends are no part of a key. The error repeats nothing of the
// secret.
func ParseKeys(secret []byte) (keys [][]byte, err error) {
	for line := range bytes.Lines(secret) {
		if line = bytes.TrimRight(line, "\r\n"); len(line) > 0 {
			keys = append(keys, line)
		}
	}
	switch {
	case len(keys) == 0:
		return nil, errors.New("it is empty")
	case len(keys) > 2:
		return nil, fmt.Errorf("it has %d lines", len(keys))
	}
	for _, k := range keys {
		if len(k) < minKey {
			return nil, fmt.Errorf("it has a key of %d bytes", len(k))
		}
	}
	return keys, nil
}

// NewSigner returns a Signer with the keys of a secret file; see [ParseKeys].
func NewSigner(secret []byte) (*Signer, error) {
	keys, err := ParseKeys(secret)
	if err != nil {
		return nil, err
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the program instead
	s := &Signer{nonce: hex.EncodeToString(id[:])}
	for _, k := range keys {
		s.keys = append(s.keys, &signKey{pool: sync.Pool{New: func() any { return &macer{h: hmac.New(sha256.New, k)} }}})
	}
	return s, nil
}

// signKey is a key. The pool keeps states that have the key worked in already,
// since a MAC is made and one checked for each block at both of its ends.
type signKey struct{ pool sync.Pool } // of *macer

// A macer makes one MAC after the other.
type macer struct {
	h    hash.Hash
	text []byte
	sum  []byte
}

func (k *signKey) macer() *macer { return k.pool.Get().(*macer) }

func (m *macer) mac(text []byte) (sum [sha256.Size]byte) {
	m.h.Reset()
	m.h.Write(text)
	m.sum = m.h.Sum(m.sum[:0])
	copy(sum[:], m.sum)
	return sum
}

// A Proof ties an answer to the one request that it answers. The zero Proof
// belongs to a request that was not signed.
type Proof struct {
	key *signKey
	mac [sha256.Size]byte
}

// Signed says whether the request was.
func (p Proof) Signed() bool { return p.key != nil }

// Sign returns the value of the Signature header for a request to function,
// whose body has the digest that its Content-Digest header gives, and what
// proves its answer. It returns "" when s is nil.
func (s *Signer) Sign(e Envelope, function, digest string, now time.Time) (header string, p Proof) {
	if s == nil {
		return "", Proof{}
	}
	if e.Size == 0 { // as it travels
		e.Rank, e.Epoch = 0, 0
	}
	b := make([]byte, 0, 192)
	b = append(b, "t="...)
	b = strconv.AppendInt(b, now.UnixMilli(), 10)
	b = append(b, ",n="...)
	b = append(b, s.nonce...)
	b = append(b, '.')
	b = strconv.AppendUint(b, s.count.Add(1), 10)
	p.key = s.keys[0]
	m := p.key.macer()
	m.text = s.text(m.text[:0], e, function, digest, b)
	p.mac = m.mac(m.text)
	p.key.pool.Put(m)
	b = append(b, ",v1="...)
	return string(hex.AppendEncode(b, p.mac[:])), p
}

// text appends to b what the MAC of a request is over. None of its parts can
// hold a line end: they are numbers, or came or go as headers.
func (s *Signer) text(b []byte, e Envelope, function, digest string, when []byte) []byte {
	b = append(b, "sheaf request 1\n"...)
	b = append(b, function...)
	if !strings.Contains(function, ".") {
		b = append(append(b, '.'), s.Namespace...)
	}
	b = append(b, '\n')
	b = append(append(b, when...), '\n')
	for _, part := range [...]string{e.Job, e.Function, e.Replica, digest} {
		b = append(append(b, part...), '\n')
	}
	for _, n := range [...]uint64{uint64(e.Block), uint64(e.Attempt), uint64(e.Rank), uint64(e.Size), e.Epoch, uint64(e.left())} {
		b = append(strconv.AppendUint(b, n, 10), '\n')
	}
	if e.Saved > 0 {
		b = append(strconv.AppendInt(append(b, "saved "...), int64(e.Saved), 10), '\n')
	}
	return b
}

// Verify checks the Signature header of a request that came to function, with
// the digest that its Content-Digest header gives; whoever calls it must still
// check the body by that. It returns what the answer is to be signed with. A
// request passes once.
func (s *Signer) Verify(e Envelope, function, digest string, header []string, now time.Time) (Proof, *Problem) {
	if s == nil || s.Lax && len(header) == 0 {
		return Proof{}, nil
	}
	if len(header) == 0 {
		return Proof{}, Refuse(http.StatusUnauthorized, CodeUnsigned,
			"the request carries no "+Signature+"; this function takes signed ones only, because sheaf_key_file is set")
	}
	signed, ok := parseSignature(header)
	var p Proof
	for _, k := range s.keys { // each, so that the time does not tell which one it was
		m := k.macer()
		m.text = s.text(m.text[:0], e, function, digest, signed.when)
		if mac := m.mac(m.text); hmac.Equal(mac[:], signed.mac[:]) {
			p = Proof{k, mac}
		}
		k.pool.Put(m)
	}
	if !ok || p.key == nil || digest == "" {
		return Proof{}, Refuse(http.StatusUnauthorized, CodeForged,
			"the "+Signature+" of the request is not right; both ends need the same key in the file that sheaf_key_file names")
	}
	if age := now.Sub(signed.time); age > SignatureAge || age < -SignatureAge {
		return Proof{}, expired(now)
	}
	switch s.seen.take(signed.session, signed.number, signed.time, now) {
	case taken:
		return Proof{}, Refuse(http.StatusConflict, CodeReplayed, "the request was here before; make a new one with a nonce of its own")
	case forgotten:
		return Proof{}, expired(now)
	}
	return p, nil
}

func expired(now time.Time) *Problem {
	return Refuse(http.StatusUnauthorized, CodeExpired,
		fmt.Sprintf("the %s was made over %v from now, which is %s here; set the clocks", Signature, SignatureAge, now.UTC().Format(time.RFC3339))).
		Within(SignatureAge.String())
}

// signature is a Signature header of a request.
type signature struct {
	when    []byte // all before the MAC
	time    time.Time
	session string
	number  uint64
	mac     [sha256.Size]byte
}

// parseSignature reads a header. One that is malformed comes back as something
// that no key makes, so that it takes as long as any wrong one.
func parseSignature(header []string) (s signature, ok bool) {
	when, mac, found := strings.Cut(header[0], ",v1=")
	t, nonce, both := strings.Cut(when, ",n=")
	ms, err := strconv.ParseInt(strings.TrimPrefix(t, "t="), 10, 64)
	session, number, dotted := strings.Cut(nonce, ".")
	n, bad := strconv.ParseUint(number, 10, 64)
	if len(header) != 1 || !found || !both || err != nil || !dotted || bad != nil || len(session) != 16 || len(mac) != 2*len(s.mac) {
		return signature{}, false
	}
	if _, err := hex.Decode(s.mac[:], []byte(mac)); err != nil {
		return signature{}, false
	}
	s.when, s.time, s.session, s.number = []byte(when), time.UnixMilli(ms), session, n
	return s, true
}

// Answer returns the value of the Signature header for the answer that replica
// gives, whose body has the given digest; "" when the request was not signed.
func (p Proof) Answer(replica, digest string) string {
	if p.key == nil {
		return ""
	}
	mac := p.answer(replica, digest)
	return string(hex.AppendEncode([]byte("v1="), mac[:]))
}

func (p Proof) answer(replica, digest string) [sha256.Size]byte {
	m := p.key.macer()
	defer p.key.pool.Put(m)
	b := append(m.text[:0], "sheaf answer 1\n"...)
	b = append(b, p.mac[:]...)
	b = append(append(b, replica...), '\n')
	m.text = append(append(b, digest...), '\n')
	return m.mac(m.text)
}

// Errors of [Proof.Check].
var (
	errUnsigned = errors.New("answer is not signed; the function needs the key that sheaf_key_file names here")
	errForged   = errors.New("answer is signed wrongly, or answers another request")
)

// Check says whether an answer's Signature header proves it to be what the
// replica answered to this request, which was signed by s. signed is false when
// there is none, which only a lax s forgives. Nothing answers a request that was
// not signed, such as one that has not been sent.
func (p Proof) Check(s *Signer, replica, digest string, header []string) (signed bool, err error) {
	if p.key == nil {
		return false, errForged
	}
	if len(header) == 0 {
		if s.Lax {
			return false, nil
		}
		return false, errUnsigned
	}
	var mac [sha256.Size]byte
	text, ok := strings.CutPrefix(header[0], "v1=")
	if len(header) != 1 || !ok || len(text) != 2*len(mac) || digest == "" {
		return false, errForged
	}
	if _, err := hex.Decode(mac[:], []byte(text)); err != nil {
		return false, errForged
	}
	if want := p.answer(replica, digest); !hmac.Equal(want[:], mac[:]) {
		return false, errForged
	}
	return true, nil
}

// replays remembers which requests have passed. Each Signer numbers its
// requests, so that one bit for each is enough, in a window that moves along
// with the highest number (as in IPsec, RFC 4303, section 3.4.3). Only what is
// signed right comes here, so strangers cannot fill it.
type replays struct {
	mu       sync.Mutex
	sessions map[string]*window
	floor    time.Time // older requests of unknown Signers may have been forgotten
}

const (
	windowBits  = 1 << 16 // how far requests of one Signer may overtake each other
	maxSessions = 512     // 8 KiB each
)

type window struct {
	highest uint64
	latest  time.Time // in a signature
	bits    [windowBits / 64]uint64
}

type verdict int

const (
	fresh verdict = iota
	taken
	forgotten
)

// take notes that a request came, and says whether it may pass.
func (r *replays) take(session string, n uint64, signed, now time.Time) verdict {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.sessions[session]
	if w == nil {
		if !signed.After(r.floor) {
			return forgotten
		}
		if len(r.sessions) >= maxSessions {
			r.evict(now)
		}
		if r.sessions == nil {
			r.sessions = make(map[string]*window)
		}
		w = &window{}
		r.sessions[session] = w
	}
	if signed.After(w.latest) {
		w.latest = signed
	}
	if n > w.highest {
		if n-w.highest >= windowBits {
			clear(w.bits[:])
		} else {
			for i := w.highest + 1; i <= n; i++ {
				w.bits[i%windowBits/64] &^= 1 << (i % 64)
			}
		}
		w.highest = n
	} else if w.highest-n >= windowBits {
		return taken // too long ago to know
	}
	bit := &w.bits[n%windowBits/64]
	if *bit&(1<<(n%64)) != 0 {
		return taken
	}
	*bit |= 1 << (n % 64)
	return fresh
}

// evict forgets Signers whose requests are too old to pass, or else the one
// whose last is the oldest.
func (r *replays) evict(now time.Time) {
	var oldest string
	for id, w := range r.sessions {
		if now.Sub(w.latest) > SignatureAge {
			delete(r.sessions, id)
		} else if o := r.sessions[oldest]; o == nil || w.latest.Before(o.latest) {
			oldest = id
		}
	}
	if len(r.sessions) >= maxSessions {
		if l := r.sessions[oldest].latest; l.After(r.floor) {
			r.floor = l
		}
		delete(r.sessions, oldest)
	}
}
