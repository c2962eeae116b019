package wire_test

import (
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSealWriteOpen(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	to := sheaf.Replica{ID: "worker-7/x"}
	for _, c := range []struct {
		name string
		req  sheaf.Request
		want wire.Envelope
	}{
		{"first block, any replica", sheaf.Request{Job: "j", Function: "f", Attempt: 1}, wire.Envelope{Job: "j", Attempt: 1}},
		{"addressed", sheaf.Request{Job: "j", Function: "f.ns", Index: 9, Attempt: 2, To: to, Rank: 3, Size: 4, Epoch: 1 << 62},
			wire.Envelope{Job: "j", Block: 9, Attempt: 2, Function: "f.ns", Replica: "worker-7/x", Rank: 3, Size: 4, Epoch: 1 << 62}},
		{"rank 0 of 1", sheaf.Request{To: to, Size: 1}, wire.Envelope{Replica: "worker-7/x", Size: 1}},
		{"rank without a size means nothing", sheaf.Request{Rank: 3, Epoch: 5}, wire.Envelope{}},
		{"deadline", sheaf.Request{Deadline: now.Add(1500 * time.Millisecond)}, wire.Envelope{Left: 1500 * time.Millisecond}},
		{"deadline below a millisecond", sheaf.Request{Deadline: now.Add(time.Microsecond)}, wire.Envelope{Left: time.Millisecond}},
		{"deadline that is over", sheaf.Request{Deadline: now.Add(-time.Hour)}, wire.Envelope{Left: time.Millisecond}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := fields(t, wire.Seal(&c.req, now).Append(nil))
			got, err := wire.Open(h)
			if err != nil || got != c.want {
				t.Errorf("got %+v (%v), want %+v from %v", got, err, c.want, h)
			}
			for key := range h { // nobody else sees to it
				if key != http.CanonicalHeaderKey(key) {
					t.Errorf("%s is not the canonical form of a header", key)
				}
			}
		})
	}
}

// fields takes lines of a header apart.
func fields(t *testing.T, lines []byte) http.Header {
	t.Helper()
	h := http.Header{}
	for line := range strings.Lines(string(lines)) {
		key, value, ok := strings.Cut(strings.TrimSuffix(line, "\r\n"), ": ")
		if !ok || !strings.HasSuffix(line, "\r\n") || h[key] != nil {
			t.Fatalf("line %q in %q", line, lines)
		}
		h[key] = []string{value}
	}
	return h
}

func TestOpenPlainCall(t *testing.T) {
	if e, err := wire.Open(http.Header{"Content-Type": {"text/plain"}}); err != nil || e != (wire.Envelope{}) {
		t.Errorf("got %+v (%v), want the zero Envelope", e, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	long := strings.Repeat("7", 1000)
	for _, c := range []struct {
		name, says string
		header     map[string]string
	}{
		{"block is a word", `header Sheaf-Block is "x"`, map[string]string{wire.Block: "x"}},
		{"block is negative", `header Sheaf-Block is "-1"`, map[string]string{wire.Block: "-1"}},
		{"block has a sign", `header Sheaf-Block is "+1"`, map[string]string{wire.Block: "+1"}},
		{"block is a fraction", `header Sheaf-Block is "1.5"`, map[string]string{wire.Block: "1.5"}},
		{"block is hexadecimal", `header Sheaf-Block is "0x10"`, map[string]string{wire.Block: "0x10"}},
		{"block is beyond all bounds", `header Sheaf-Block is "777`, map[string]string{wire.Block: long}},
		{"attempt is too great", `header Sheaf-Attempt is`, map[string]string{wire.Attempt: "9999999999"}},
		{"epoch is negative", `header Sheaf-Epoch is "-3"`, map[string]string{wire.Epoch: "-3"}},
		{"deadline is a duration", `header Sheaf-Deadline is "10s"`, map[string]string{wire.Deadline: "10s"}},
		{"deadline would overflow", `header Sheaf-Deadline is`, map[string]string{wire.Deadline: "9223372036854775807"}},
		{"rank is the size", `header Sheaf-Rank is 4`, map[string]string{wire.Rank: "4", wire.Size: "4"}},
		{"rank is over the size", `header Sheaf-Rank is 5`, map[string]string{wire.Rank: "5", wire.Size: "4"}},
		{"job is long", "header Sheaf-Job is 65 bytes long", map[string]string{wire.Job: strings.Repeat("j", 65)}},
		{"addressee without a function", `header Sheaf-To is "r1"`, map[string]string{wire.To: "r1"}},
		{"addressee without a replica", `header Sheaf-To is "f/"`, map[string]string{wire.To: "f/"}},
		{"two are bad, the first is named", `header Sheaf-Block is "a"`, map[string]string{wire.Block: "a", wire.Deadline: "b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := http.Header{}
			for key, value := range c.header {
				h.Set(key, value)
			}
			e, err := wire.Open(h)
			if err == nil || !strings.HasPrefix(err.Error(), c.says) {
				t.Fatalf("got %+v (%v), want %q", e, err, c.says)
			}
			if e != (wire.Envelope{}) {
				t.Errorf("got %+v beside the error", e)
			}
			if len(err.Error()) > 200 {
				t.Errorf("the error repeats %d bytes of the header", len(err.Error()))
			}
		})
	}
}

func FuzzOpen(f *testing.F) {
	f.Add("job", "3", "1", "f/r", "0", "2", "7", "1000")
	f.Add("", "", "", "", "", "", "", "")
	f.Add("j", "-1", "99999999999", "/", "4", "4", "18446744073709551615", "0")
	f.Add("j", "1", "1", "a/b/c", "1", "0", "9223372036854775808", "1099511627776")
	f.Fuzz(func(t *testing.T, job, block, attempt, to, rank, size, epoch, deadline string) {
		h := http.Header{
			wire.Job: {job}, wire.Block: {block}, wire.Attempt: {attempt}, wire.To: {to},
			wire.Rank: {rank}, wire.Size: {size}, wire.Epoch: {epoch}, wire.Deadline: {deadline},
		}
		e, err := wire.Open(h)
		if err != nil {
			if e != (wire.Envelope{}) || strings.ContainsAny(err.Error(), "\n\r") {
				t.Fatalf("got %+v beside %q", e, err)
			}
			return
		}
		if e.Block < 0 || e.Attempt < 0 || e.Rank < 0 || e.Size < 0 || e.Left < 0 || e.Size > 0 && e.Rank >= e.Size {
			t.Fatalf("took %+v", e)
		}
		if e.Size == 0 {
			e.Rank, e.Epoch = 0, 0 // they mean nothing without a size and are not sent
		}
		if strings.ContainsFunc(e.Job+e.Function+e.Replica, unicode.IsControl) {
			return // no header brings that, nor may one carry it
		}
		again := fields(t, e.Append(nil))
		if back, err := wire.Open(again); err != nil || back != e {
			t.Fatalf("%+v came back as %+v (%v)", e, back, err)
		}
	})
}

func TestSum(t *testing.T) {
	// The example of RFC 9530, section 2, of which the digest is known.
	const want = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
	if got := wire.Sum([]byte("{\"hello\": \"world\"}\n")); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCheck(t *testing.T) {
	body := []byte("a body")
	sum := wire.Sum(body)
	bad := wire.Sum([]byte("another"))
	for _, c := range []struct {
		name   string
		field  []string
		proved bool
		ok     bool
	}{
		{"none", nil, false, true},
		{"an empty field", []string{""}, false, true},
		{"right", []string{sum}, true, true},
		{"wrong", []string{bad}, false, false},
		{"right, in capitals", []string{strings.Replace(sum, "sha", "SHA", 1)}, true, true},
		{"wrong, in capitals", []string{strings.Replace(bad, "sha", "SHA", 1)}, false, false},
		{"value in lower case", []string{strings.ToLower(sum)}, false, false},
		{"unknown algorithm", []string{"sha-512=:eA==:"}, false, true},
		{"name that only begins so", []string{"sha-256-x=:eA==:"}, false, true},
		{"unknown, then right", []string{"md5=:eA==:, " + sum}, true, true},
		{"right, then unknown", []string{sum + ",md5=:eA==:"}, true, true},
		{"unknown, then wrong", []string{"md5=:eA==:,\t" + bad}, false, false},
		{"in a second field", []string{"md5=:eA==:", sum}, true, true},
		{"wrong in a second field", []string{"md5=:eA==:", bad}, false, false},
		{"without colons", []string{strings.ReplaceAll(sum, ":", "")}, false, false},
		{"without padding", []string{strings.Replace(sum, "=:", ":", 2)}, false, true}, // "sha-256:": no digest at all
		{"empty value", []string{"sha-256="}, false, false},
		{"no value", []string{"sha-256"}, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			proved, err := wire.Check(http.Header{wire.Digest: c.field}, body)
			if proved != c.proved || (err == nil) != c.ok {
				t.Errorf("proved is %v (%v) for %q, want %v", proved, err, c.field, c.proved)
			}
		})
	}
}

func TestCut(t *testing.T) {
	for in, want := range map[string]int{"": 0, "short": 5, strings.Repeat("x", 64): 64, strings.Repeat("x", 65): 64, strings.Repeat("x", 9999): 64} {
		if got := wire.Cut(in); len(got) != want {
			t.Errorf("%d bytes became %d, want %d", len(in), len(got), want)
		}
	}
}
