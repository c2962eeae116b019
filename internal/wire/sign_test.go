package wire_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	oldKey = "the old key, of 30 bytes or so"
	newKey = "the new key, of 30 bytes or so"
)

func signer(t testing.TB, secret string) *wire.Signer {
	t.Helper()
	s, err := wire.NewSigner([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	s.Namespace = "openfaas-fn"
	return s
}

// signed is a request of which everything can be changed.
type signed struct {
	envelope         wire.Envelope
	function, digest string
	header           []string
	now              time.Time
}

func example(s *wire.Signer) (signed, wire.Proof) {
	r := signed{
		envelope: wire.Envelope{Job: "job-1", Block: 7, Attempt: 2, Function: "worker.openfaas-fn", Replica: "worker-3",
			Rank: 1, Size: 4, Epoch: 9, Left: 1500 * time.Millisecond},
		function: "worker", digest: wire.Sum([]byte("a block")), now: time.Now(),
	}
	header, proof := s.Sign(r.envelope, r.function, r.digest, r.now)
	r.header = []string{header}
	return r, proof
}

func (r signed) verify(s *wire.Signer) (wire.Proof, *wire.Problem) {
	return s.Verify(r.envelope, r.function, r.digest, r.header, r.now)
}

func TestSignVerify(t *testing.T) {
	for _, c := range []struct{ name, here, there string }{
		{"one key", newKey, newKey},
		{"line ends are no part of it", newKey, newKey + "\r\n\n"},
		{"the worker knows the new key already", oldKey, newKey + "\n" + oldKey + "\n"},
		{"the worker does not use the old key any more", newKey + "\n" + oldKey, newKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, want := example(signer(t, c.here))
			proof, p := r.verify(signer(t, c.there))
			if p != nil || !proof.Signed() {
				t.Fatalf("refused: %v", p)
			}
			sum := wire.Sum([]byte("a result"))
			if ok, err := want.Check(signer(t, c.here), "worker-3", sum, []string{proof.Answer("worker-3", sum)}); !ok || err != nil {
				t.Errorf("its answer is refused: %v", err)
			}
		})
	}
}

func TestSignNamesTheNamespace(t *testing.T) {
	here, there := signer(t, newKey), signer(t, newKey)
	r, _ := example(here)
	r.function = "worker.openfaas-fn"
	if _, p := r.verify(there); p != nil {
		t.Errorf("the name with its default namespace is refused: %v", p)
	}
	r, _ = example(here)
	other := signer(t, newKey)
	other.Namespace = "dev"
	if _, p := r.verify(other); p == nil || p.Code != wire.CodeForged {
		t.Errorf("the function of that name in another namespace takes it: %v", p)
	}
}

// Whatever is changed in a request, its signature is not right any more, and
// all that is wrong is refused alike.
func TestVerifyRefuses(t *testing.T) {
	mac := strings.Repeat("ab", 32)
	for name, change := range map[string]func(*signed){
		"job":                func(r *signed) { r.envelope.Job = "job-2" },
		"block":              func(r *signed) { r.envelope.Block++ },
		"attempt":            func(r *signed) { r.envelope.Attempt++ },
		"addressee":          func(r *signed) { r.envelope.Replica = "worker-4" },
		"no addressee":       func(r *signed) { r.envelope.Function, r.envelope.Replica = "", "" },
		"rank":               func(r *signed) { r.envelope.Rank++ },
		"size":               func(r *signed) { r.envelope.Size++ },
		"epoch":              func(r *signed) { r.envelope.Epoch++ },
		"deadline":           func(r *signed) { r.envelope.Left += time.Millisecond },
		"no deadline":        func(r *signed) { r.envelope.Left = 0 },
		"function":           func(r *signed) { r.function = "other" },
		"namespace":          func(r *signed) { r.function = "worker.dev" },
		"digest":             func(r *signed) { r.digest = wire.Sum([]byte("another block")) },
		"no digest":          func(r *signed) { r.digest = "" },
		"time":               func(r *signed) { r.header[0] = strings.Replace(r.header[0], "t=1", "t=2", 1) },
		"nonce":              func(r *signed) { r.header[0] = strings.Replace(r.header[0], ".1,", ".2,", 1) },
		"two headers":        func(r *signed) { r.header = append(r.header, r.header[0]) },
		"sha1":               func(r *signed) { r.header = []string{"sha1=" + mac[:40]} },
		"empty":              func(r *signed) { r.header = []string{""} },
		"short":              func(r *signed) { r.header[0] = r.header[0][:len(r.header[0])-2] },
		"long":               func(r *signed) { r.header[0] += "00" },
		"no hexadecimal":     func(r *signed) { r.header[0] = r.header[0][:len(r.header[0])-1] + "x" },
		"the MAC alone":      func(r *signed) { r.header = []string{"v1=" + mac} },
		"another MAC":        func(r *signed) { r.header[0] = r.header[0][:len(r.header[0])-64] + mac },
		"no time":            func(r *signed) { r.header[0] = r.header[0][strings.Index(r.header[0], "n="):] },
		"a version to come":  func(r *signed) { r.header[0] = strings.Replace(r.header[0], "v1=", "v2=", 1) },
		"10 KiB of anything": func(r *signed) { r.header = []string{strings.Repeat("t=1,n=", 1700)} },
	} {
		t.Run(name, func(t *testing.T) {
			there := signer(t, newKey+"\n"+oldKey)
			there.Lax = rand.IntN(2) == 0
			r, _ := example(signer(t, newKey))
			change(&r)
			proof, p := r.verify(there)
			if p == nil || p.Status != http.StatusUnauthorized || p.Code != wire.CodeForged || proof.Signed() {
				t.Fatalf("got %+v", p)
			}
			wrong, _ := example(signer(t, "a key that nobody has"))
			if _, other := wrong.verify(there); other == nil || *other != *p {
				t.Errorf("it says %q, and for a wrong key %q", p.Detail, other)
			}
		})
	}
}

func TestVerifyMissing(t *testing.T) {
	s := signer(t, newKey)
	if _, p := s.Verify(wire.Envelope{}, "worker", "", nil, time.Now()); p == nil || p.Code != wire.CodeUnsigned || p.Status != 401 {
		t.Errorf("got %+v", p)
	}
	s.Lax = true
	if proof, p := s.Verify(wire.Envelope{}, "worker", "", nil, time.Now()); p != nil || proof.Signed() || proof.Answer("r", "d") != "" {
		t.Errorf("lax: got %+v", p)
	}
	var none *wire.Signer
	if proof, p := none.Verify(wire.Envelope{}, "worker", "", []string{"x"}, time.Now()); p != nil || proof.Signed() {
		t.Errorf("without a key: got %+v", p)
	}
	if header, proof := none.Sign(wire.Envelope{}, "worker", "", time.Now()); header != "" || proof.Signed() {
		t.Errorf("without a key: signed %q", header)
	}
}

func TestVerifyAge(t *testing.T) {
	for _, c := range []struct {
		after time.Duration
		ok    bool
	}{{0, true}, {4 * time.Minute, true}, {-4 * time.Minute, true}, {6 * time.Minute, false}, {-6 * time.Minute, false}} {
		r, _ := example(signer(t, newKey))
		r.now = r.now.Add(c.after)
		_, p := r.verify(signer(t, newKey))
		if c.ok != (p == nil) || p != nil && (p.Code != wire.CodeExpired || !strings.Contains(p.Detail, r.now.UTC().Format(time.RFC3339))) {
			t.Errorf("after %v: %+v", c.after, p)
		}
	}
}

// A request passes once, in whatever order requests come, from however many.
func TestControl04RequestsPassOnce(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 4))
	there := signer(t, newKey)
	var all []signed
	for range 20 {
		here := signer(t, newKey)
		for range 200 {
			r, _ := example(here)
			all = append(all, r)
		}
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var passed atomic.Int64
	for range 3 {
		var wg sync.WaitGroup
		for part := range 4 {
			wg.Go(func() {
				for _, r := range all[part*len(all)/4 : (part+1)*len(all)/4] {
					if _, p := r.verify(there); p == nil {
						passed.Add(1)
					} else if p.Code != wire.CodeReplayed || p.Status != http.StatusConflict {
						t.Errorf("refused as %s", p.Code)
					}
				}
			})
		}
		wg.Wait()
	}
	if passed.Load() != int64(len(all)) {
		t.Errorf("%d requests passed %d times", len(all), passed.Load())
	}
}

// What is too far behind to be known passes no second time, and neither does
// what came from a Signer that was forgotten because there were many others.
func TestControl04OldRequestsPassNever(t *testing.T) {
	there, here := signer(t, newKey), signer(t, newKey)
	first, _ := example(here)
	for range 1 << 17 {
		here.Sign(first.envelope, first.function, first.digest, first.now)
	}
	late, _ := example(here)
	if _, p := late.verify(there); p != nil {
		t.Fatalf("the 131,000th is refused: %v", p)
	}
	if _, p := first.verify(there); p == nil || p.Code != wire.CodeReplayed {
		t.Errorf("the first, which came last: %v", p)
	}
	for i := range 2000 { // Signers, each a millisecond later
		r, _ := example(signer(t, newKey))
		at := late.now.Add(time.Duration(i) * time.Millisecond)
		s := signer(t, newKey)
		header, _ := s.Sign(r.envelope, r.function, r.digest, at)
		r.header, r.now = []string{header}, at
		if _, p := r.verify(there); p != nil {
			t.Fatalf("Signer %d is refused: %v", i, p)
		}
	}
	if _, p := late.verify(there); p == nil || p.Code != wire.CodeExpired {
		t.Errorf("a request of a Signer that was forgotten: %v", p)
	}
}

func TestProofCheck(t *testing.T) {
	here := signer(t, newKey)
	r, want := example(here)
	proof, p := r.verify(signer(t, newKey))
	if p != nil {
		t.Fatal(p)
	}
	sum := wire.Sum([]byte("a result"))
	right := proof.Answer("worker-3", sum)
	r2, _ := example(here)
	proof2, p := r2.verify(signer(t, newKey))
	if p != nil {
		t.Fatal(p)
	}
	if ok, err := want.Check(here, "worker-3", sum, []string{right}); !ok || err != nil {
		t.Fatalf("the right one is refused: %v", err)
	}
	for name, c := range map[string]struct {
		replica, digest string
		header          []string
	}{
		"another replica":             {"worker-4", sum, []string{right}},
		"another result":              {"worker-3", wire.Sum([]byte("another")), []string{right}},
		"no digest":                   {"worker-3", "", []string{proof.Answer("worker-3", "")}},
		"the answer to another":       {"worker-3", sum, []string{proof2.Answer("worker-3", sum)}},
		"the request's own signature": {"worker-3", sum, []string{"v1=" + r.header[0][len(r.header[0])-64:]}},
		"two":                         {"worker-3", sum, []string{right, right}},
		"none":                        {"worker-3", sum, nil},
		"empty":                       {"worker-3", sum, []string{""}},
		"short":                       {"worker-3", sum, []string{right[:len(right)-2]}},
		"no hexadecimal":              {"worker-3", sum, []string{right[:len(right)-1] + "x"}},
		"without a version":           {"worker-3", sum, []string{right[3:]}},
	} {
		t.Run(name, func(t *testing.T) {
			if ok, err := want.Check(here, c.replica, c.digest, c.header); ok || err == nil {
				t.Error("it was taken")
			}
		})
	}
	if ok, err := (wire.Proof{}).Check(here, "worker-3", sum, []string{right}); ok || err == nil {
		t.Error("an answer to a request that was not sent was taken")
	}
	here.Lax = true
	if ok, err := want.Check(here, "worker-3", sum, nil); ok || err != nil {
		t.Errorf("lax, without a signature: %v, %v", ok, err)
	}
	if ok, err := want.Check(here, "worker-3", sum, []string{"v1=" + strings.Repeat("00", 32)}); ok || err == nil {
		t.Error("lax, with a wrong one: it was taken")
	}
}

func TestParseKeys(t *testing.T) {
	for secret, says := range map[string]string{
		"":                     "empty",
		"\n\r\n":               "empty",
		"hunter2\n":            "a key of 7 bytes",
		newKey + "\nhunter2":   "a key of 7 bytes",
		newKey + "\nb\nc\nd\n": "4 lines",
	} {
		keys, err := wire.ParseKeys([]byte(secret))
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "new key") {
			t.Errorf("%q: got %q, %v", secret, keys, err)
		}
	}
	keys, err := wire.ParseKeys([]byte(" spaces are part of it\r\n" + oldKey))
	if err != nil || len(keys) != 2 || string(keys[0]) != " spaces are part of it" || string(keys[1]) != oldKey {
		t.Errorf("got %q, %v", keys, err)
	}
}

// What a header holds crashes nobody, and passes only if it was signed.
func FuzzVerify(f *testing.F) {
	key := fmt.Sprintf("the key of this process: %x", rand.Uint64()) // others fuzz beside it
	here := signer(f, key)
	r, _ := example(here)
	f.Add(r.header[0])
	f.Add("t=,n=,v1=")
	f.Add(fmt.Sprintf("t=%d,n=0123456789abcdef.18446744073709551615,v1=%064x", r.now.UnixMilli(), 1))
	f.Fuzz(func(t *testing.T, header string) {
		r := r
		right := header == r.header[0]
		r.header = []string{header}
		if _, p := r.verify(signer(t, key)); (p == nil) != right {
			t.Fatalf("%q: %v", header, p)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	here, there := signer(b, newKey), signer(b, newKey)
	e := wire.Envelope{Job: "0123456789abcdef", Block: 7, Attempt: 1, Function: "worker.openfaas-fn", Replica: "worker-3", Rank: 1, Size: 4, Epoch: 9, Left: time.Minute}
	digest, now := wire.Sum(nil), time.Now()
	b.ReportAllocs()
	for b.Loop() { // all that one block costs, at both ends
		header, want := here.Sign(e, "worker", digest, now)
		proof, p := there.Verify(e, "worker", digest, []string{header}, now)
		if p != nil {
			b.Fatal(p)
		}
		if ok, err := want.Check(here, "worker-3", digest, []string{proof.Answer("worker-3", digest)}); !ok {
			b.Fatal(err)
		}
	}
}
