// Package test runs sheaf as its users do: real jobs, over HTTP, on the local
// provider, with master and workers as processes of their own.
package test

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/local"
)

// binary is the sheaf command, built once; it is in scratch, a folder that the
// tests share.
var binary, scratch string

func TestMain(m *testing.M) {
	if log := os.Getenv(slowFunction); log != "" {
		runSlow(log)
	}
	if log := os.Getenv(loggedFunction); log != "" {
		runLogged(log)
	}
	if len(os.Args) == 2 && os.Args[1] == echoFlag {
		runEcho()
	}
	if len(os.Args) == 2 && os.Args[1] == noteFlag {
		runNote()
	}
	if len(os.Args) == 2 && os.Args[1] == slowFlag {
		runSlowWorker()
	}
	if len(os.Args) == 3 && os.Args[1] == watchdogFlag {
		runWatchdog(os.Args[2])
	}
	dir, err := os.MkdirTemp("", "sheaf-test-")
	if err != nil {
		panic(err)
	}
	scratch, binary = dir, filepath.Join(dir, "sheaf")
	build := exec.Command("go", "build", "-o", binary, "./cmd/sheaf")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build sheaf: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// command runs the functions that are in the sheaf command, or in this test.
func command(image string) ([]string, error) {
	if image == "slow" || image == "logged" {
		return []string{os.Args[0]}, nil
	}
	return []string{binary, "function", strings.TrimPrefix(image, "sheaf/")}, nil
}

// bench is a stack with a master and some workers.
type bench struct {
	*local.Stack
	t testing.TB
}

// startWith starts a stack without functions.
func startWith(t testing.TB, cfg local.Config) *bench {
	t.Helper()
	cfg.Version, cfg.Log = "test", slog.New(slog.DiscardHandler)
	s, err := local.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return &bench{s, t}
}

// start starts a stack with a warm master and so many warm workers.
func start(t testing.TB, workers int, env map[string]string) *bench {
	t.Helper()
	b := startWith(t, local.Config{Command: command})
	b.deploy("master", "sheaf/master", 1, map[string]string{"nats_url": b.NATS, "gateway_url": b.URL, "GOMEMLIMIT": "44MiB", "GOGC": "50"}, env)
	b.deploy("worker", "sheaf/worker", workers, env)
	b.waitFor("master", 1)
	b.waitFor("worker", workers)
	return b
}

func (b *bench) deploy(name, image string, replicas int, envs ...map[string]string) {
	b.t.Helper()
	env := map[string]string{}
	for _, e := range envs {
		maps.Copy(env, e)
	}
	labels := map[string]string{local.LabelMin: fmt.Sprint(replicas), local.LabelMax: fmt.Sprint(local.MaxReplicas)}
	if err := b.Client().Deploy(b.t.Context(), types.FunctionDeployment{Service: name, Image: image, Labels: &labels, EnvVars: env}); err != nil {
		b.t.Fatal(err)
	}
}

// replicas are the ready replicas of a function, by rank.
func (b *bench) replicas(name string) []sheaf.Replica {
	for _, r := range b.Registry.Records() {
		if r.Function == name+"."+local.Namespace {
			return r.View().Replicas
		}
	}
	return nil
}

// waitFor waits until the record has exactly n ready replicas of a function.
func (b *bench) waitFor(name string, n int) {
	b.t.Helper()
	for begun := time.Now(); len(b.replicas(name)) != n; time.Sleep(time.Millisecond) {
		if time.Since(begun) > 30*time.Second {
			b.t.Fatalf("%s has %d ready replicas after 30 s, want %d", name, len(b.replicas(name)), n)
		}
	}
}

// scale sets the number of workers and waits for it.
func (b *bench) scale(n int) {
	b.t.Helper()
	if err := b.Client().Scale(b.t.Context(), "worker", n); err != nil {
		b.t.Fatal(err)
	}
	b.waitFor("worker", n)
}

// answer is what a master sent.
type answer struct {
	status int
	header http.Header
	body   string
}

var client = &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// try posts input to the master and returns its whole answer.
func (b *bench) try(ctx context.Context, query string, input io.Reader, header ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.URL+"/function/master?"+query, input)
	if err != nil {
		return answer{}, err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(body)}, err
}

// count posts input and returns the counts; anything but 200 fails the test.
func (b *bench) count(query, input string, header ...string) answer {
	b.t.Helper()
	a, err := b.try(b.t.Context(), query, strings.NewReader(input), header...)
	if err != nil {
		b.t.Fatalf("%s: %v", query, err)
	}
	if a.status != http.StatusOK {
		b.t.Fatalf("%s: status %d: %s", query, a.status, a.body)
	}
	return a
}

// sequential counts words as one program would, written apart from the code
// under test: by splitting at the six white-space bytes.
func sequential(input string) string {
	counts := map[string]int{}
	for _, w := range bytes.FieldsFunc(latin(input), func(r rune) bool { return strings.ContainsRune(" \t\n\v\f\r", r) }) {
		counts[string(unlatin(w))]++
	}
	words := make([]string, 0, len(counts))
	for w := range counts {
		words = append(words, w)
	}
	slices.SortFunc(words, func(a, b string) int { return cmp.Or(counts[b]-counts[a], strings.Compare(a, b)) })
	var out strings.Builder
	for _, w := range words {
		fmt.Fprintf(&out, "%s %d\n", w, counts[w])
	}
	return out.String()
}

// latin makes a rune of each byte, so that FieldsFunc sees bytes.
func latin(s string) []byte {
	runes := make([]rune, len(s))
	for i := range len(s) {
		runes[i] = rune(s[i])
	}
	return []byte(string(runes))
}

func unlatin(b []byte) []byte {
	var out []byte
	for _, r := range string(b) {
		out = append(out, byte(r))
	}
	return out
}

// text makes n bytes of words with a few frequent and many rare ones, in
// lines, always the same for a seed.
func text(seed uint64, n int) string {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var b strings.Builder
	b.Grow(n + 64)
	for b.Len() < n {
		for range 1 + rnd.IntN(12) {
			fmt.Fprintf(&b, "w%d ", int(rnd.ExpFloat64()*200))
		}
		b.WriteByte('\n')
	}
	return b.String()[:n]
}

// thesisText has the shape of the thesis's input: 1,654 bytes in 99 lines, of
// few distinct words. Blocks of whole lines waste a little: at 300, 150, 100 and
// 50 bytes they are a few more than the thesis's 6, 11, 17 and 35.
func thesisText() string {
	rnd := rand.New(rand.NewPCG(1654, 99))
	words := strings.Fields("this is a cat the cat sat on mat and dog ran far so we saw it go by 18 times")
	lengths := make([]int, 99)
	left := 1654
	for i := range lengths {
		lengths[i] = 2
		left -= 2
	}
	for left > 0 {
		if i := rnd.IntN(len(lengths)) * rnd.IntN(len(lengths)) / len(lengths); lengths[i] < 49 {
			lengths[i]++
			left--
		}
	}
	rnd.Shuffle(len(lengths), func(i, j int) { lengths[i], lengths[j] = lengths[j], lengths[i] })
	var b strings.Builder
	for _, n := range lengths {
		for end := b.Len() + n - 1; b.Len() < end; {
			w := words[rnd.IntN(len(words))]
			b.WriteString(w[:min(len(w), end-b.Len())])
			if b.Len() < end {
				b.WriteByte(' ')
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}
