package bench

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
)

// The test binary is the peers' processes, as sheaf is.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == Command {
		os.Exit(Peer(os.Args[2]))
	}
	os.Exit(m.Run())
}

func self(t testing.TB) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Every peer gives the right answer; a wrong one would be seen.
func TestContenders(t *testing.T) {
	text := thesis()
	want, err := expected(text)
	if err != nil {
		t.Fatal(err)
	}
	if len(text) != 1654 || len(strings.Fields(string(text))) < 300 {
		t.Fatalf("the text has %d bytes", len(text))
	}
	list, stop, err := contenders(Config{Self: self(t)}, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for _, p := range list {
		took, cpu, err := p.measure(t.Context(), cut(text, 5), want, 3)
		if err != nil || took <= 0 || cpu <= 0 {
			t.Errorf("%s: took %v, cpu %v: %v", p.name, took, cpu, err)
		}
		if _, _, err := p.measure(t.Context(), cut(bytes.ToUpper(text), 5), want, 1); err == nil {
			t.Errorf("%s: a wrong answer is not seen", p.name)
		}
	}
}

// TestScatterAllocations: what a block of a warm scatter may take from the
// master's heap, from the splitter to the result: scheduler, route, digests. It
// is 9 now.
func TestScatterAllocations(t *testing.T) {
	crew, err := start(self(t), kindSheaf, 4, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer crew.stop()
	f := newSheaf(crew.addrs, nil)
	defer f.close()
	const n = 400
	blocks := cut(bytes.Repeat([]byte("a cat sat on the mat\n"), n), n)
	var before, after runtime.MemStats
	for range 3 { // the last of them counts
		runtime.ReadMemStats(&before)
		if _, err := f.round(t.Context(), blocks); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
	}
	if got := float64(after.Mallocs-before.Mallocs) / n; got > 14 {
		t.Errorf("a block takes %.1f allocations, want 14 at most", got)
	} else {
		t.Logf("a block takes %.1f allocations", got)
	}
}

// The text is the same on every machine.
func TestZipf(t *testing.T) {
	var a, b bytes.Buffer
	if err := Zipf(&a, 1<<20, 17); err != nil {
		t.Fatal(err)
	}
	if err := Zipf(&b, 1<<20, 17); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) || a.Len() < 1<<20 || a.Len() > 1<<20+200 {
		t.Errorf("%d and %d bytes", a.Len(), b.Len())
	}
	counts := map[string]int{}
	for w := range strings.FieldsSeq(a.String()) {
		counts[w]++
	}
	most := 0
	for _, n := range counts {
		most = max(most, n)
	}
	if len(counts) < 20_000 || most < 5_000 {
		t.Errorf("%d words, the most frequent one %d times", len(counts), most)
	}
}

func TestReport(t *testing.T) {
	r := Report{Machine: "m", Go: "go", Commit: "c", When: "w", Rounds: 7, Tables: []Table{{Name: "cold", Title: "T <1>", Unit: "ms", Columns: []string{"N=6", "N=35"},
		Rows: []Row{{"a", []Cell{{Median: 1234.5, Min: 1000, Max: 2000}, {Median: 0.01234}}}, {"b", []Cell{{Median: 12.345, Min: 12, Max: 13, Ratio: 0.5, CPU: 3}, {}}}}, Notes: []string{"note"}}}}
	for name, write := range map[string]func(*bytes.Buffer) error{
		"text": func(b *bytes.Buffer) error { return r.WriteText(b) }, "markdown": func(b *bytes.Buffer) error { return r.WriteMarkdown(b) },
		"html": func(b *bytes.Buffer) error { return r.WriteHTML(b) }, "json": func(b *bytes.Buffer) error { return r.WriteJSON(b) },
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		want := []string{"1234 [1000–2000]", "12.3 [12.0–13.0] ×0.50 (cpu 3.00)", "note", "N=35"}
		if name == "json" {
			want = []string{`"median": 1234.5`, `"ratio": 0.5`}
		}
		if name == "html" {
			want = append(want, "<svg", "T &lt;1&gt;")
		}
		for _, s := range want {
			if !strings.Contains(b.String(), s) {
				t.Errorf("%s has no %q:\n%s", name, s, b.String())
			}
		}
	}
}

// BenchmarkRound is a warm scatter over 6 and 35 worker processes, by sheaf and
// by its nearest peers.
func BenchmarkRound(b *testing.B) {
	for _, n := range []int{6, 35} {
		list, stop, err := contenders(Config{Self: self(b)}, n)
		if err != nil {
			b.Fatal(err)
		}
		blocks := cut(thesis(), n)
		for _, p := range list {
			b.Run(fmt.Sprintf("%s/N=%d", strings.ReplaceAll(p.name, " ", "_"), n), func(b *testing.B) {
				b.ReportAllocs()
				before := cpuOf(p.pids)
				for b.Loop() {
					if _, err := p.round(b.Context(), blocks); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric((cpuOf(p.pids)-before)*1e6/float64(b.N), "cpu-µs/op")
			})
		}
		stop()
	}
}
