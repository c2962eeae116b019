package worker_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/worker"
)

const signingKey = "the key of this worker and its master"

// signedWorker is a worker as a function is, with a key, and how often its Func
// has run.
func signedWorker(t *testing.T, env map[string]string) (http.Handler, *atomic.Int64) {
	t.Helper()
	dir := t.TempDir()
	key(t, dir)
	var runs atomic.Int64
	s, err := worker.Env(func(_ context.Context, b sheaf.Block) ([]byte, error) {
		runs.Add(1)
		return bytes.ToUpper(b.Data), nil
	}, func(name string) string {
		if v, ok := env[name]; ok {
			return v
		}
		return signedEnv(dir)(name)
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, &runs
}

// key writes the key into a folder, and signedEnv is the environment of a worker
// that reads it there.
func key(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "sheaf-key"), []byte(signingKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func signedEnv(dir string) func(string) string {
	return func(name string) string {
		return map[string]string{"secret_mount_path": dir, "sheaf_key_file": "sheaf-key",
			"OPENFAAS_NAME": "worker", "OPENFAAS_NAMESPACE": "openfaas-fn", "sheaf_replica": "worker-1"}[name]
	}
}

// master is who has the key, or thinks so.
func master(t *testing.T, key string) *wire.Signer {
	t.Helper()
	s, err := wire.NewSigner([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	s.Namespace = "openfaas-fn"
	return s
}

// block is a request with a block, signed for the function.
func block(s *wire.Signer, index int, function, data string) (*http.Request, wire.Proof) {
	now, digest := time.Now(), wire.Sum([]byte(data))
	e := wire.Seal(&sheaf.Request{Job: "job-1", Function: function, Index: index, Attempt: 1, Deadline: now.Add(time.Minute)}, now)
	r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(data))
	for line := range strings.Lines(string(e.Append(nil))) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		r.Header.Set(key, value)
	}
	r.Header.Set(wire.Digest, digest)
	header, proof := s.Sign(e, function, digest, now)
	if proof.Signed() {
		r.Header.Set(wire.Signature, header)
	}
	return r, proof
}

func serveOne(h http.Handler, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestSignedBlock(t *testing.T) {
	h, runs := signedWorker(t, nil)
	s := master(t, signingKey)
	for i := range 100 {
		r, proof := block(s, i, "worker", fmt.Sprintf("block %d", i))
		w := serveOne(h, r)
		if want := fmt.Sprintf("BLOCK %d", i); w.Code != 200 || w.Body.String() != want {
			t.Fatalf("block %d: %d %q", i, w.Code, w.Body)
		}
		if ok, err := proof.Check(s, "worker-1", w.Header().Get(wire.Digest), w.Header()[wire.Signature]); !ok || err != nil {
			t.Fatalf("block %d: its answer is not proved: %v", i, err)
		}
	}
	if runs.Load() != 100 {
		t.Errorf("100 blocks ran %d times", runs.Load())
	}
}

// A stranger posts 10,000 blocks in all the ways that it can think of.
func TestControl01StrangersRunNothing(t *testing.T) {
	h, runs := signedWorker(t, nil)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	right, stranger := master(t, signingKey), master(t, "a key that the stranger made up")
	ways := []struct {
		code    string
		request func(i int) *http.Request
	}{
		{wire.CodeUnsigned, func(int) *http.Request {
			return httptest.NewRequest(http.MethodPost, "/", strings.NewReader("plain"))
		}},
		{wire.CodeUnsigned, func(i int) *http.Request { r, _ := block(nil, i, "worker", "enveloped"); return r }},
		{wire.CodeForged, func(i int) *http.Request { r, _ := block(stranger, i, "worker", "another key"); return r }},
		{wire.CodeForged, func(i int) *http.Request { r, _ := block(right, i, "other", "another function's"); return r }},
		{wire.CodeForged, func(i int) *http.Request { r, _ := block(right, i, "worker.dev", "another namespace's"); return r }},
		{wire.CodeForged, func(i int) *http.Request {
			r, _ := block(right, i, "worker", "a block")
			r.Header.Set(wire.Block, "12345678")
			return r
		}},
		{wire.CodeForged, func(i int) *http.Request {
			r, _ := block(right, i, "worker", "a block")
			r.Header.Set(wire.Signature, fmt.Sprintf("%s%064x", strings.Split(r.Header.Get(wire.Signature), "v1=")[0]+"v1=", rnd.Uint64()))
			return r
		}},
		{wire.CodeForged, func(i int) *http.Request { // the digest goes with the stranger's own body
			r, _ := block(right, i, "worker", "a block")
			own := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("a hoax!"))
			own.Header = r.Header
			own.Header.Set(wire.Digest, wire.Sum([]byte("a hoax!")))
			return own
		}},
		{wire.CodeDamaged, func(i int) *http.Request { // the digest stays
			r, _ := block(right, i, "worker", "a block")
			own := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("a hoax!"))
			own.Header = r.Header
			return own
		}},
	}
	for i := range 10_000 {
		way := ways[i%len(ways)]
		w := serveOne(h, way.request(i))
		want := http.StatusUnauthorized
		if way.code == wire.CodeDamaged {
			want = http.StatusBadRequest
		}
		if w.Code != want || w.Header().Get(wire.Code) != way.code || w.Header().Get("Content-Type") != wire.ContentType {
			t.Fatalf("request %d, way %d: %d %s, want %d %s", i, i%len(ways), w.Code, w.Body, want, way.code)
		}
		if strings.Contains(w.Body.String(), signingKey) {
			t.Fatalf("the refusal tells the key: %s", w.Body)
		}
	}
	if runs.Load() != 0 {
		t.Errorf("a stranger's blocks ran %d times", runs.Load())
	}
}

// Somebody recorded 1,000 blocks and sends each again, three times.
func TestControl04RecordedBlocksRunOnce(t *testing.T) {
	h, runs := signedWorker(t, nil)
	s := master(t, signingKey)
	type record struct {
		header http.Header
		body   string
	}
	var tape []record
	for i := range 1000 {
		body := fmt.Sprintf("block %d", i)
		r, _ := block(s, i, "worker", body)
		tape = append(tape, record{r.Header.Clone(), body})
		if w := serveOne(h, r); w.Code != 200 {
			t.Fatalf("block %d: %d %s", i, w.Code, w.Body)
		}
	}
	for range 3 {
		for i, rec := range tape {
			r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(rec.body))
			r.Header = rec.header.Clone()
			if w := serveOne(h, r); w.Code != http.StatusConflict || w.Header().Get(wire.Code) != wire.CodeReplayed {
				t.Fatalf("block %d again: %d %s", i, w.Code, w.Body)
			}
		}
	}
	if runs.Load() != 1000 {
		t.Errorf("1,000 blocks ran %d times", runs.Load())
	}
}

// On the short way, too: a block runs once, its answer is proved, and a
// stranger's does not run.
func TestSignedShort(t *testing.T) {
	h, runs := signedWorker(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		s := h.(*serve.Server)
		s.Linger = 0
		_ = s.Serve(ctx, l)
	})
	defer wg.Wait()
	defer cancel()
	s := master(t, signingKey)
	stranger := master(t, "a key that the stranger made up")
	post := func(r *http.Request) *http.Response {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		out, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+l.Addr().String(), bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		out.Header = r.Header
		resp, err := http.DefaultClient.Do(out)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp
	}
	for i := range 3 {
		r, proof := block(s, i, "worker", "a block")
		resp := post(r)
		if ok, err := proof.Check(s, "worker-1", resp.Header.Get(wire.Digest), resp.Header[wire.Signature]); resp.StatusCode != 200 || !ok || err != nil {
			t.Errorf("block %d: %s, proved %v: %v", i, resp.Status, ok, err)
		}
		r.Body = io.NopCloser(strings.NewReader("a block"))
		if resp := post(r); resp.StatusCode != http.StatusConflict || resp.Header.Get(wire.Code) != wire.CodeReplayed {
			t.Errorf("block %d again: %s", i, resp.Status)
		}
		forged, _ := block(stranger, i, "worker", "a block")
		if resp := post(forged); resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("a stranger's block: %s", resp.Status)
		}
		damaged, _ := block(s, i, "worker", "a block")
		damaged.Body = io.NopCloser(strings.NewReader("a hoax!"))
		if resp := post(damaged); resp.Header.Get(wire.Code) != wire.CodeDamaged {
			t.Errorf("a damaged block: %s", resp.Status)
		}
	}
	if runs.Load() != 3 {
		t.Errorf("3 blocks ran %d times", runs.Load())
	}
}

// In development people call a worker by hand; what is signed must be right
// all the same.
func TestUnsignedAccepted(t *testing.T) {
	h, runs := signedWorker(t, map[string]string{"sheaf_unsigned": "accept"})
	if w := serveOne(h, httptest.NewRequest(http.MethodPost, "/", strings.NewReader("plain"))); w.Code != 200 || w.Body.String() != "PLAIN" || w.Header()[wire.Signature] != nil {
		t.Errorf("a plain call: %d %s", w.Code, w.Body)
	}
	r, _ := block(master(t, "a key that the stranger made up"), 0, "worker", "a block")
	if w := serveOne(h, r); w.Code != http.StatusUnauthorized {
		t.Errorf("a wrong signature: %d %s", w.Code, w.Body)
	}
	if runs.Load() != 1 {
		t.Errorf("Func ran %d times", runs.Load())
	}
}

// Every file that is no key ends the process before it serves anything.
func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"empty": "", "blank": "\n\n", "short": "hunter2\n", "three": strings.Repeat(signingKey+"\n", 3),
		"huge": strings.Repeat("k", 1<<20), "good": signingKey, "two": signingKey + "\r\n" + signingKey + "2\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		file, function, unsigned, says string
	}{
		{"good", "worker", "", ""},
		{"two", "worker", "refuse", ""},
		{filepath.Join(dir, "good"), "worker", "accept", ""},
		{"", "", "", ""},
		{"missing", "worker", "", "sheaf_key_file is \"missing\"; expected a file"},
		{"/", "worker", "", "sheaf_key_file is \"/\"; expected a file"},
		{"empty", "worker", "", "sheaf_key_file is \"empty\"; expected a file"},
		{"blank", "worker", "", "sheaf_key_file is \"blank\"; expected a file"},
		{"huge", "worker", "", "sheaf_key_file is \"huge\"; expected a file"},
		{"short", "worker", "", "a key of 7 bytes"},
		{"three", "worker", "", "3 lines"},
		{"good", "", "", "sheaf_function is \"\"; expected the function's name"},
		{"good", "worker", "sometimes", "sheaf_unsigned is \"sometimes\"; expected refuse or accept"},
	} {
		t.Run(filepath.Base(c.file)+"/"+c.function+"/"+c.unsigned, func(t *testing.T) {
			_, err := worker.Env(upper, func(name string) string {
				return map[string]string{"secret_mount_path": dir, "sheaf_key_file": c.file, "OPENFAAS_NAME": c.function, "sheaf_unsigned": c.unsigned}[name]
			})
			if c.says == "" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("got %v, want %q", err, c.says)
			}
			if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), signingKey) || len(err.Error()) > 300 {
				t.Errorf("it is not one short line without the secret: %v", err)
			}
		})
	}
}
