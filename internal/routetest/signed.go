package routetest

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// Key is a secret that routes can sign with.
const Key = "the key that both ends of the suite have"

// OpenSigned makes a route that signs as s does; see [Open].
type OpenSigned = func(t *testing.T, url string, s *wire.Signer) (route sheaf.Route, to sheaf.Replica)

func signer(t *testing.T, key string) *wire.Signer {
	t.Helper()
	s, err := wire.NewSigner([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	s.Namespace = "openfaas-fn"
	return s
}

// signedAnswer answers body as a worker with the key does.
func signedAnswer(w http.ResponseWriter, r *http.Request, s *wire.Signer, replica, body string) {
	data := read(r)
	e, err := wire.Open(r.Header)
	digest := r.Header.Get(wire.Digest)
	proof, p := s.Verify(e, Function, digest, r.Header[wire.Signature], time.Now())
	if err != nil || p != nil || wire.Sum(data) != digest {
		http.Error(w, fmt.Sprintf("%v, %v", err, p), http.StatusBadRequest)
		return
	}
	w.Header().Set(wire.Replica, replica)
	w.Header().Set(wire.Signature, proof.Answer(replica, wire.Sum([]byte(body))))
	answer(w, []byte(body))
}

// Signed runs what a route must do that signs: the function gets what it can
// verify, and of its answers only those pass that it signed for this request.
func Signed(t *testing.T, open OpenSigned) {
	t.Run("what is signed passes", func(t *testing.T) {
		there := signer(t, Key)
		srv := serve(t, func(w http.ResponseWriter, r *http.Request) { signedAnswer(w, r, there, "r1", "a result") })
		route, to := open(t, srv.URL, signer(t, Key))
		for range 3 {
			if reply := must(t, route, request(to, "a block"), "a result"); !reply.Verified {
				t.Error("the reply is not verified")
			}
		}
	})
	t.Run("a refused signature ends the block", func(t *testing.T) {
		srv := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			wire.Refuse(http.StatusUnauthorized, wire.CodeForged, "no").Write(w)
		})
		route, to := open(t, srv.URL, signer(t, Key))
		refused(t, route, request(to, "a block"), sheaf.FaultRejected)
	})
	t.Run("a replay is sent anew", func(t *testing.T) {
		srv := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			wire.Refuse(http.StatusConflict, wire.CodeReplayed, "again").Write(w)
		})
		route, to := open(t, srv.URL, signer(t, Key))
		refused(t, route, request(to, "a block"), sheaf.FaultLost)
	})
	t.Run("what is not signed passes a lax one only", func(t *testing.T) {
		there := signer(t, Key)
		var calls atomic.Int64
		srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if calls.Add(1) == 3 {
				signedAnswer(w, r, there, "r1", "a result")
				return
			}
			answer(w, []byte("a result"))
		})
		strict, to := open(t, srv.URL, signer(t, Key))
		refused(t, strict, request(to, "a block"), sheaf.FaultLost)
		s := signer(t, Key)
		s.Lax = true
		lax, to := open(t, srv.URL, s)
		// Its digest proves it whole, as long as nobody has shown to have the key.
		if reply := must(t, lax, request(to, "a block"), "a result"); !reply.Verified {
			t.Error("a reply with a digest is not verified")
		}
		if reply := must(t, lax, request(to, "a block"), "a result"); !reply.Verified {
			t.Error("a signed reply is not verified")
		}
		refused(t, lax, request(to, "a block"), sheaf.FaultLost) // it has the key, so it must use it
	})
	t.Run("TestControl02: of 10,000 forged answers none passes", func(t *testing.T) { forged(t, open) })
}

// forged has somebody answer who sees everything and lacks the key.
func forged(t *testing.T, open OpenSigned) {
	there := signer(t, Key)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	var recorded string // the signature of a right answer
	ways := []func(w http.ResponseWriter, r *http.Request){
		func(w http.ResponseWriter, r *http.Request) { // none
			read(r)
			answer(w, []byte("forged"))
		},
		func(w http.ResponseWriter, r *http.Request) { // of an earlier answer, which was the same
			read(r)
			w.Header().Set(wire.Signature, recorded)
			answer(w, []byte("a result"))
		},
		func(w http.ResponseWriter, r *http.Request) { // the request's own
			read(r)
			v := r.Header.Get(wire.Signature)
			w.Header().Set(wire.Signature, v[strings.LastIndex(v, "v1="):])
			answer(w, []byte("forged"))
		},
		func(w http.ResponseWriter, r *http.Request) { // at random
			read(r)
			w.Header().Set(wire.Signature, fmt.Sprintf("v1=%016x%016x%016x%016x", rnd.Uint64(), rnd.Uint64(), rnd.Uint64(), rnd.Uint64()))
			answer(w, []byte("forged"))
		},
		func(w http.ResponseWriter, r *http.Request) { // a right one, beside another body and its digest
			rec := newRecorder()
			signedAnswer(rec, r, there, "r1", "a result")
			w.Header().Set(wire.Replica, "r1")
			w.Header().Set(wire.Signature, rec.Header().Get(wire.Signature))
			answer(w, []byte("forged"))
		},
		func(w http.ResponseWriter, r *http.Request) { // a right one, beside another body, without a digest
			rec := newRecorder()
			signedAnswer(rec, r, there, "r1", "a result")
			w.Header().Set(wire.Replica, "r1")
			w.Header().Set(wire.Signature, rec.Header().Get(wire.Signature))
			w.Header().Set("Content-Length", strconv.Itoa(len("forged")))
			_, _ = w.Write([]byte("forged"))
		},
	}
	n := -1
	srv := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if n < 0 {
			signedAnswer(w, r, there, "r1", "a result")
			recorded = w.Header().Get(wire.Signature)
			return
		}
		ways[n%len(ways)](w, r)
	})
	route, to := open(t, srv.URL, signer(t, Key))
	must(t, route, request(to, "a block"), "a result")
	for n = range 10_000 {
		req := request(to, "a block")
		req.Index = n
		if reply, err := call(t, route, req); err == nil {
			t.Fatalf("answer %d, forged in way %d, is taken: %q", n, n%len(ways), reply.Body)
		} else if _, why := fails(reply, err, sheaf.FaultLost); why != "" {
			t.Fatalf("answer %d: %s", n, why)
		}
	}
}

// recorder is an answer that nobody gets.
type recorder struct{ header http.Header }

func newRecorder() recorder                  { return recorder{http.Header{}} }
func (r recorder) Header() http.Header       { return r.header }
func (recorder) Write(p []byte) (int, error) { return len(p), nil }
func (recorder) WriteHeader(int)             {}
