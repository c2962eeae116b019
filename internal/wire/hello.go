package wire

// hello.go is how a replica says where it is, and proves it: it announces
// itself, is asked at the address from which it did, and answers for that
// address alone.

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"time"
)

// A Hello is what a replica announces, as JSON, by POST. Its address is the one
// that the announcement comes from, whatever it says.
type Hello struct {
	Function  string `json:"function"`
	Namespace string `json:"namespace"`
	Replica   string `json:"replica"` // its ID
	Port      int    `json:"port"`    // at which it serves
	// Address may name the IP address of the replica. It must be the one that
	// the announcement comes from; "" means that.
	Address string `json:"address,omitempty"`
}

// A Welcome is the answer to a Hello that was believed.
type Welcome struct {
	LeaseMS int64 `json:"lease_ms"` // after which the replica is forgotten, unless it says hello again
}

// maxNonce is how long the nonce of a challenge may be, in bytes.
const maxNonce = 64

// CheckNonce says whether a challenge has a nonce that may be answered: letters
// and digits, 16 to 64.
func CheckNonce(nonce string) bool {
	for _, c := range []byte(nonce) {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return len(nonce) >= 16 && len(nonce) <= maxNonce
}

// signedFor is what a Hello is signed for: nothing that a function can be
// named, so that no signature of a block passes for one of a Hello, nor the
// other way round.
func (h Hello) signedFor() string { return "hello " + h.Function + "." + h.Namespace }

// SignHello returns the value of the Signature header for h, whose JSON is
// body; "" when s is nil.
func (s *Signer) SignHello(h Hello, body []byte, now time.Time) string {
	header, _ := s.Sign(Envelope{Function: h.Function, Replica: h.Replica}, h.signedFor(), Sum(body), now)
	return header
}

// VerifyHello checks the Signature header of h, whose JSON is body. It passes
// once.
func (s *Signer) VerifyHello(h Hello, body []byte, header []string, now time.Time) *Problem {
	_, p := s.Verify(Envelope{Function: h.Function, Replica: h.Replica}, h.signedFor(), Sum(body), header, now)
	return p
}

// Prove answers a challenge: h must hold who answers, and Address and Port those
// at which the challenge came. It returns "" when s is nil.
//
// The address is part of it because the proof of one replica, had by somebody
// who passes challenges on to it, must not prove that he is the replica.
func (s *Signer) Prove(h Hello, nonce string) string {
	if s == nil {
		return ""
	}
	mac := s.keys[0].once(h.challenge(nonce))
	return hex.EncodeToString(mac[:])
}

// Proves says whether proof is what Prove returns with one of the keys. A nil s
// asks for none, and a lax one forgives that there is none.
func (s *Signer) Proves(h Hello, nonce, proof string) bool {
	if s == nil || s.Lax && proof == "" {
		return true
	}
	given, err := hex.DecodeString(proof)
	right := false
	for _, k := range s.keys {
		mac := k.once(h.challenge(nonce))
		right = hmac.Equal(mac[:], given) || right
	}
	return right && err == nil
}

func (h Hello) challenge(nonce string) []byte {
	b := []byte("sheaf replica 1\n")
	for _, part := range [...]string{nonce, h.Function, h.Namespace, h.Replica, h.Address, strconv.Itoa(h.Port)} {
		b = append(append(b, part...), '\n')
	}
	return b
}

// once makes one MAC.
func (k *signKey) once(text []byte) [sha256.Size]byte {
	m := k.macer()
	defer k.pool.Put(m)
	return m.mac(text)
}
