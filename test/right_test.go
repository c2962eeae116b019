package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
)

// Whatever the input is, the answer is that of a sequential count.
func TestAnyInput(t *testing.T) {
	b := start(t, 4, nil)
	random := make([]byte, 200_000)
	rnd := rand.New(rand.NewPCG(3, 5))
	for i := range random {
		random[i] = byte(rnd.Uint32())
	}
	for _, c := range []struct{ name, query, input string }{
		{"empty", "block=300", ""},
		{"one byte", "block=300", "x"},
		{"one space", "block=300", " "},
		{"no final newline", "block=10", "a b c\nd e f\ng h"},
		{"CRLF", "block=7", "a b\r\nc d\r\n\r\ne"},
		{"lone CR and form feeds", "block=4", "a\rb\rc\fd\ve"},
		{"NUL and invalid UTF-8", "block=6", "a\x00b \xff\xfe\n\xff\xfe a\x00b\n\xc3\n"},
		{"a line of 70 kB", "block=300", "a b\n" + strings.Repeat("long ", 14_000) + "\nc d\n"},
		{"a word of 70 kB", "block=300", "a b\n" + strings.Repeat("x", 70_000) + "\nc d\n"},
		{"only newlines", "block=64KiB", strings.Repeat("\n", 1<<20)},
		{"random bytes by lines", "block=1KiB", string(random)},
		{"random bytes by bytes", "split=bytes&block=333", string(random)},
		{"random bytes by records", "split=records&delimiter=ab&block=500", string(random)},
		{"words cut by every block", "split=bytes&block=1", text(1, 3000)},
		{"CSV with quoted newlines", "split=csv&block=20", "a,\"b\nc d\",e\nf,\"g \"\"h\"\"\",i\n"},
		{"NDJSON", "split=json&block=30", `{"a": "b c"}` + "\n" + `{"d": ["e f", 1]}` + "\n"},
		{"BOM", "block=300", "\xef\xbb\xbfa b a"},
		{"default block", "", text(2, 300_000)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := b.count(c.query, c.input); got.body != sequential(c.input) {
				t.Errorf("the counts differ from a sequential count:\n%.300s\nwant\n%.300s", got.body, sequential(c.input))
			}
		})
	}
}

// A JSON array is its elements; the answer does not depend on the blocks.
func TestJSONArray(t *testing.T) {
	b := start(t, 3, nil)
	in := "[ {\"a\": \"x y\"},\n {\"a\": \"x z\"} , 7, \"s t\" ]"
	want := sequential("{\"a\": \"x y\"}\n{\"a\": \"x z\"}\n7\n\"s t\"\n")
	for size := 1; size < 80; size++ {
		if got := b.count(fmt.Sprintf("split=json&block=%d", size), in); got.body != want {
			t.Fatalf("block %d: %s", size, got.body)
		}
	}
}

func TestLongLineByBytes(t *testing.T) {
	b := start(t, 3, nil)
	in := strings.Repeat("four words in here, ", 64<<20/20)
	if got := b.count("split=bytes&block=1MiB", in); got.body != sequential(in) {
		t.Errorf("the counts differ from a sequential count: %.200s", got.body)
	}
	a, err := b.try(t.Context(), "split=lines&block=1MiB", strings.NewReader(in))
	if err != nil || a.status != http.StatusUnprocessableEntity || !strings.Contains(a.body, "record_too_long") {
		t.Errorf("as a line: %d %s %v", a.status, a.body, err)
	}
}

func TestHundredMegabytes(t *testing.T) {
	b := start(t, 2, nil)
	piece := text(9, 10<<20)
	want := map[string]int{}
	for line := range strings.Lines(sequential(piece)) {
		w, n, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		want[w], _ = strconv.Atoi(n)
	}
	// The piece ends within a line: ten of them make some words anew.
	last, first := piece[strings.LastIndexAny(piece, " \n")+1:], piece[:strings.IndexAny(piece, " \n")]
	a, err := b.try(t.Context(), "", io.MultiReader(readers(piece, 10)...), "Accept", "application/json")
	if err != nil || a.status != http.StatusOK {
		t.Fatal(a.status, a.body, err)
	}
	got := map[string]int{}
	if err := json.Unmarshal([]byte(a.body), &got); err != nil {
		t.Fatal(err)
	}
	for w := range want {
		want[w] *= 10
	}
	if last != "" {
		want[last] -= 9
		want[first] -= 9
		want[last+first] += 9
	}
	for w, n := range want {
		if got[w] != n {
			t.Errorf("%q: %d, want %d", w, got[w], n)
		}
		delete(got, w)
	}
	if len(got) > 0 {
		t.Errorf("words that are not there: %v", got)
	}
}

func readers(s string, n int) []io.Reader {
	rs := make([]io.Reader, n)
	for i := range rs {
		rs[i] = strings.NewReader(s)
	}
	return rs
}

// The ways to send and to ask for one thing give one thing.
func TestFormsAgree(t *testing.T) {
	b := start(t, 3, nil)
	in := thesisText()
	want := b.count("block=300", in).body
	for _, field := range []string{"file", "myfile"} {
		var form bytes.Buffer
		w := multipart.NewWriter(&form)
		part, err := w.CreateFormFile(field, "../../etc/passwd")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(part, in) // a bytes.Buffer takes everything
		_ = w.Close()
		if got := b.count("block=300", form.String(), "Content-Type", w.FormDataContentType()); got.body != want {
			t.Errorf("form field %s gives another answer", field)
		}
	}
	for _, query := range []string{"route=gateway", "function=worker", "function=worker.openfaas-fn", "verify=require", "route=gateway&function=worker.openfaas-fn"} {
		if got := b.count("block=300&"+query, in); got.body != want {
			t.Errorf("%s gives another answer", query)
		}
	}
	if b.count("block=300&output=json", in).body != b.count("block=300", in, "Accept", "application/json").body {
		t.Error("output=json gives another answer than Accept: application/json")
	}
	head := b.count("block=300", in).header
	for _, h := range []string{"Sheaf-Job", "Sheaf-Blocks", "Sheaf-Replicas", "Sheaf-Elapsed", "Content-Digest", "Content-Length"} {
		if head.Get(h) == "" {
			t.Errorf("header %s is missing", h)
		}
	}
}

func TestTwoAndTwentyUploadsAtOnce(t *testing.T) {
	b := start(t, 4, nil)
	for _, n := range []int{2, 20} {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				in := text(uint64(i), 50_000)
				if got := b.count("block=1KiB", in); got.body != sequential(in) {
					t.Errorf("upload %d of %d: the counts differ from a sequential count", i, n)
				}
			})
		}
		wg.Wait()
	}
}

// A thousand jobs leave nothing behind: no descriptor, thread or process.
func TestNothingGrows(t *testing.T) {
	b := start(t, 2, nil)
	in := thesisText()
	want := sequential(in)
	job := func() {
		if got := b.count("block=300", in); got.body != want {
			t.Fatal("the counts differ from a sequential count")
		}
	}
	for range 50 {
		job()
	}
	before := b.usage()
	for range 1000 {
		job()
	}
	after := b.usage()
	t.Logf("descriptors and threads before and after 1,000 jobs: %v, %v", before, after)
	for pid, was := range before {
		is, here := after[pid]
		if !here {
			t.Errorf("process %s has gone", pid)
		}
		if is.files > was.files+5 || is.threads > was.threads+5 {
			t.Errorf("process %s grew from %+v to %+v", pid, was, is)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d processes became %d", len(before), len(after))
	}
}

type usage struct{ files, threads int }

// usage is what the functions' processes hold.
func (b *bench) usage() map[string]usage {
	found := map[string]usage{}
	for _, pid := range functions(b.t, os.Getpid()) {
		files, _ := os.ReadDir(filepath.Join("/proc", pid, "fd"))
		threads, _ := os.ReadDir(filepath.Join("/proc", pid, "task"))
		found[pid] = usage{len(files), len(threads)}
	}
	return found
}

// functions are the processes that parent started.
func functions(t testing.TB, parent int) []string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var pids []string
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, ok := strings.Cut(string(stat), ") ")
		if f := strings.Fields(rest); ok && len(f) > 1 && f[1] == strconv.Itoa(parent) && f[0] != "Z" {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	return pids
}

// Broadcast and point to point, on real replicas.
func TestBroadcastAndSend(t *testing.T) {
	b := start(t, 5, nil)
	route := direct.New(0)
	defer route.Close()
	g := &sheaf.Group{Function: "worker", Route: route, Resolver: b.Registry}
	view := b.replicas("worker")
	heard := map[int]string{}
	for r, err := range g.Broadcast(t.Context(), []byte("to all\n")) {
		if err != nil {
			t.Fatal(err)
		}
		heard[r.Index] = r.From
	}
	if len(heard) != 5 {
		t.Errorf("%d of 5 ranks answered: %v", len(heard), heard)
	}
	for rank, replica := range view {
		r, err := g.Send(t.Context(), rank, []byte("to one\n"))
		if err != nil {
			t.Fatal(err)
		}
		if r.From != replica.ID || heard[rank] != replica.ID {
			t.Errorf("rank %d is %s; broadcast heard %s, send %s", rank, replica.ID, heard[rank], r.From)
		}
	}
	if _, err := g.Send(t.Context(), 5, nil); err == nil {
		t.Error("rank 5 of 5 replicas answered")
	}
}
