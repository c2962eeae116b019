package wordcount_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
)

// sequential counts words byte by byte, in one pass and without blocks.
func sequential(data []byte) map[string]int64 {
	counts := map[string]int64{}
	var word []byte
	for _, b := range data {
		switch b {
		case ' ', '\t', '\n', '\v', '\f', '\r':
			if len(word) > 0 {
				counts[string(word)]++
			}
			word = word[:0]
		default:
			word = append(word, b)
		}
	}
	if len(word) > 0 {
		counts[string(word)]++
	}
	return counts
}

// text writes counts as the answer should be.
func text(counts map[string]int64) string {
	words := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), strings.Compare(a, b))
	})
	var b strings.Builder
	for _, w := range words {
		fmt.Fprintf(&b, "%s %d\n", w, counts[w])
	}
	return b.String()
}

func result(t testing.TB, data []byte) sheaf.Result {
	t.Helper()
	out, err := wordcount.Count(t.Context(), sheaf.Block{Data: data})
	if err != nil {
		t.Fatalf("Count: %v", err)
	}
	return sheaf.Result{Data: out, Bytes: len(data)}
}

// counts merges blocks.
func counts(t testing.TB, blocks ...[]byte) *wordcount.Counts {
	t.Helper()
	c := new(wordcount.Counts)
	for i, b := range blocks {
		if err := c.Add(result(t, bytes.Clone(b))); err != nil {
			t.Fatalf("Add block %d %q: %v", i, b, err)
		}
	}
	return c
}

func textOf(t testing.TB, c *wordcount.Counts) string {
	t.Helper()
	var first, second bytes.Buffer
	for _, w := range []*bytes.Buffer{&first, &second} {
		if err := c.WriteText(w); err != nil {
			t.Fatalf("WriteText: %v", err)
		}
	}
	if first.String() != second.String() {
		t.Fatalf("WriteText wrote %q, then %q", first.String(), second.String())
	}
	return first.String()
}

func jsonOf(t testing.TB, c *wordcount.Counts) string {
	t.Helper()
	var first, second bytes.Buffer
	for _, w := range []*bytes.Buffer{&first, &second} {
		if err := c.WriteJSON(w); err != nil {
			t.Fatalf("WriteJSON: %v", err)
		}
	}
	if first.String() != second.String() {
		t.Fatalf("WriteJSON wrote %q, then %q", first.String(), second.String())
	}
	return first.String()
}

// checkJSON compares the JSON answer with what the counts come to when each
// bad byte is U+FFFD.
func checkJSON(t testing.TB, got string, want map[string]int64) {
	t.Helper()
	if !json.Valid([]byte(got)) || !utf8.ValidString(got) {
		t.Fatalf("not JSON in UTF-8: %q", got)
	}
	var have map[string]int64
	if err := json.Unmarshal([]byte(got), &have); err != nil {
		t.Fatal(err)
	}
	clean := map[string]int64{}
	for w, n := range want {
		var b strings.Builder
		for len(w) > 0 {
			r, size := utf8.DecodeRuneInString(w)
			b.WriteRune(r) // U+FFFD for one bad byte
			w = w[size:]
		}
		clean[b.String()] += n
	}
	if !maps.Equal(have, clean) {
		t.Fatalf("JSON answer is %v, want %v", have, clean)
	}
}

// cut cuts data at the places that seed draws.
func cut(data []byte, seed uint64, pieces int) [][]byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	at := []int{0, len(data)}
	for range pieces {
		at = append(at, rng.IntN(len(data)+1))
	}
	slices.Sort(at)
	var blocks [][]byte
	for i := 1; i < len(at); i++ {
		blocks = append(blocks, data[at[i-1]:at[i]])
	}
	return blocks
}

func checkPartition(t testing.TB, data []byte, blocks [][]byte) {
	t.Helper()
	want := sequential(data)
	if got := textOf(t, counts(t, blocks...)); got != text(want) {
		t.Fatalf("input %q in blocks %q\n got %q\nwant %q", data, blocks, got, text(want))
	}
	checkJSON(t, jsonOf(t, counts(t, blocks...)), want)
}

func TestAnyPartitionCountsLikeASequentialRun(t *testing.T) {
	inputs := map[string]string{
		"empty":            "",
		"one byte":         "x",
		"one space":        " ",
		"one word":         "sheaf",
		"no final newline": "a b\nb c",
		"crlf":             "a b\r\nb a\r\n",
		"all white space":  " \t\n\v\f\r",
		"nul":              "a\x00b \x00 a\x00b\n",
		"bad utf-8":        "\xff \xfe\xff \xff\nü \xc3 \xbc",
		"not white space":  "a\u00a0b\u2003c\u0085d\x1ce\x1fff",
		"marks as words":   " head x\n tail y\n whole z\nhead 1\n",
		"numbers":          "1 2 3\n1 1\n18446744073709551616 -1\n",
	}
	for name, in := range inputs {
		t.Run(name, func(t *testing.T) {
			data := []byte(in)
			for size := 1; size <= len(data)+1; size++ {
				checkPartition(t, data, slices.Collect(slices.Chunk(data, size)))
			}
			for seed := range uint64(50) { // also with blocks that are empty
				checkPartition(t, data, cut(data, seed, int(seed%9)))
			}
		})
	}
	t.Run("random", func(t *testing.T) {
		const alphabet = "ab \t\n\v\f\r\x00\xff\xc3\xa9é"
		for seed := range uint64(2000) {
			rng := rand.New(rand.NewPCG(seed, 2))
			data := make([]byte, rng.IntN(64))
			for i := range data {
				data[i] = alphabet[rng.IntN(len(alphabet))]
			}
			checkPartition(t, data, cut(data, seed, rng.IntN(10)))
		}
	})
}

func FuzzWordCount(f *testing.F) {
	f.Add([]byte("a b\nb a\n"), uint64(1), uint8(3))
	f.Add([]byte("\xff\x00 \v\xc3"), uint64(2), uint8(200))
	f.Add([]byte(" head x\n tail y\n whole z\n"), uint64(3), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, seed uint64, pieces uint8) {
		checkPartition(t, data, cut(data, seed, int(pieces)))
	})
}

func FuzzResult(f *testing.F) {
	f.Add([]byte(" head a\n tail b\nc 1\n"))
	f.Add([]byte(" whole a\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := sheaf.Result{Data: data}
		var c wordcount.Counts
		added := c.Add(r)
		for _, mayCut := range []bool{false, true} {
			line, err := wordcount.Line(r, mayCut)
			if taken := added == nil; taken != (err == nil) {
				t.Fatalf("result %q: Add takes it: %v, Line says: %v", data, taken, err)
			}
			if err == nil && (!json.Valid(line) || bytes.ContainsRune(line, '\n')) {
				t.Fatalf("Line of %q is %q", data, line)
			}
		}
		for line := range strings.Lines(textOf(t, &c)) {
			if strings.Count(line, " ") != 1 || strings.ContainsAny(line, "\t\v\f\r") || strings.Contains(line, " -") {
				t.Fatalf("result %q became the answer %q", data, line)
			}
		}
		if !json.Valid([]byte(jsonOf(t, &c))) {
			t.Fatalf("result %q became JSON %q", data, jsonOf(t, &c))
		}
	})
}

func TestWhiteSpaceIsSixBytes(t *testing.T) {
	for b := range 256 {
		got := textOf(t, counts(t, []byte{'x', byte(b), 'y'}))
		want := "x" + string([]byte{byte(b)}) + "y 1\n"
		if strings.IndexByte(" \t\n\v\f\r", byte(b)) >= 0 {
			want = "x 1\ny 1\n"
		}
		if got != want {
			t.Errorf("byte %#02x: answer is %q, want %q", b, got, want)
		}
	}
}

func TestTextIsByCountThenBytes(t *testing.T) {
	got := textOf(t, counts(t, []byte("b a \xff z Z é 10 9 b a b")))
	if want := "b 3\na 2\n10 1\n9 1\nZ 1\nz 1\né 1\n\xff 1\n"; got != want {
		t.Errorf("answer is %q, want %q", got, want)
	}
}

func TestJSON(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"empty", "", "{}\n"},
		{"white space", " \n\t", "{}\n"},
		{"by count", "b a b", `{"b": 2, "a": 1}` + "\n"},
		{"no escapes for HTML", "<b>&amp;</b>", `{"<b>&amp;</b>": 1}` + "\n"},
		{"quotes and backslash", `"a\b"`, `{"\"a\\b\"": 1}` + "\n"},
		{"control bytes", "\x00\x1b", `{"\u0000\u001b": 1}` + "\n"},
		{"one mark for a bad byte", "\xff\xfe x\xffy", "{\"x\ufffdy\": 1, \"\ufffd\ufffd\": 1}\n"},
		{"bad words that become equal", "a \xff \xfe \xff a", "{\"\ufffd\": 3, \"a\": 2}\n"},
		{"a bad word and its mark", "\xff \ufffd", "{\"\ufffd\": 2}\n"},
		{"a cut rune", "\xe2\x82", "{\"\ufffd\ufffd\": 1}\n"},
		{"a surrogate", "\xed\xa0\x80", "{\"\ufffd\ufffd\ufffd\": 1}\n"},
		{"byte-order mark", "\ufeffa", "{\"\ufeffa\": 1}\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := jsonOf(t, counts(t, []byte(c.in)))
			if got != c.want {
				t.Errorf("answer is %q, want %q", got, c.want)
			}
			checkJSON(t, got, sequential([]byte(c.in)))
		})
	}
}

func TestTextAfterJSON(t *testing.T) {
	c := counts(t, []byte("\xff \xfe a a"))
	before := textOf(t, c)
	jsonOf(t, c)
	if after := textOf(t, c); after != before {
		t.Errorf("text is %q before JSON and %q after it", before, after)
	}
	if before != "a 2\n\xfe 1\n\xff 1\n" {
		t.Errorf("text is %q", before)
	}
}

func TestGarbageIsRefused(t *testing.T) {
	for _, c := range []struct{ name, data string }{
		{"truncated last line", "a 1\nb 12"},
		{"truncated before the count", "a 1\nb "},
		{"no count", "a\n"},
		{"empty count", "a \n"},
		{"empty line", "a 1\n\n"},
		{"no word", " 1\n"},
		{"negative", "a -1\n"},
		{"plus", "a +1\n"},
		{"zero", "a 0\n"},
		{"fraction", "a 1.5\n"},
		{"exponent", "a 1e3\n"},
		{"hexadecimal", "a 0x1\n"},
		{"overflow", "a 9223372036854775808\n"},
		{"sum overflows", strings.Repeat("a 999999999999999999\n", 10)},
		{"carriage return", "a 1\r\n"},
		{"two words", "a b 1\n"},
		{"tab in a word", "a\tb 1\n"},
		{"two spaces", "a  1\n"},
		{"an HTML page", "<!DOCTYPE html>\n<html><body>502 Bad Gateway</body></html>\n"},
		{"a line of HTML that ends in a number", "<h1>Not found: error 404\n"},
		{"JSON", `{"a": 1}` + "\n"},
		{"a NUL page", strings.Repeat("\x00", 512)},
		{"two heads", " head a\n head b\n"},
		{"two tails", " tail a\n tail b\n"},
		{"tail before head", " tail a\n head b\n"},
		{"head after a word", "a 1\n head b\n"},
		{"whole and head", " head a\n whole b\n"},
		{"whole and a word", " whole a\nb 1\n"},
		{"whole twice", " whole a\n whole b\n"},
		{"head of two words", " head a b\n"},
		{"unknown edge", " middle a\n"},
		{"a refusal of a worker", `{"type":"about:blank","status":500}` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var counts wordcount.Counts
			if err := counts.Add(sheaf.Result{Data: []byte(c.data)}); err == nil {
				t.Errorf("%q was taken as a result", c.data)
			}
			for _, mayCut := range []bool{false, true} {
				if line, err := wordcount.Line(sheaf.Result{Data: []byte(c.data)}, mayCut); err == nil {
					t.Errorf("%q became the line %s", c.data, line)
				}
			}
		})
	}
	t.Run("sum of blocks overflows", func(t *testing.T) {
		var counts wordcount.Counts
		var err error
		for range 10 {
			if err = counts.Add(sheaf.Result{Data: []byte("a 999999999999999999\n")}); err != nil {
				break
			}
		}
		if err == nil {
			t.Error("a count over 63 bits was taken")
		}
	})
}

func TestPlainWorkerWithoutEdges(t *testing.T) {
	var c wordcount.Counts
	for _, data := range []string{"a 2\nb 1\n", "", "b 3\n"} {
		if err := c.Add(sheaf.Result{Data: []byte(data)}); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := textOf(t, &c), "b 4\na 2\n"; got != want {
		t.Errorf("answer is %q, want %q", got, want)
	}
}

func TestPlainAndOwnWorkersTogether(t *testing.T) {
	var c wordcount.Counts
	for _, r := range []sheaf.Result{result(t, []byte("a b\n")), {Data: []byte("b 2\n")}, result(t, []byte("a b\n"))} {
		if err := c.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := textOf(t, &c), "b 4\na 2\n"; got != want {
		t.Errorf("answer is %q, want %q", got, want)
	}
}

func TestLine(t *testing.T) {
	for _, c := range []struct {
		name, block string
		mayCut      bool
		want        string
	}{
		{"empty", "", true, `{"counts": {}}`},
		{"edges stand apart", "a b b c", true, `{"counts": {"b": 2}, "head": "a", "tail": "c"}`},
		{"edges counted", "a b b c", false, `{"counts": {"b": 2, "a": 1, "c": 1}}`},
		{"whole", "abc", true, `{"counts": {}, "whole": "abc"}`},
		{"whole counted", "abc", false, `{"counts": {"abc": 1}}`},
		{"a line", "a b\n", true, `{"counts": {"b": 1}, "head": "a"}`},
		{"edges that are a word within", "a b a", false, `{"counts": {"a": 2, "b": 1}}`},
		{"bad bytes", "\xff \xff \xfe", true, "{\"counts\": {\"\ufffd\": 1}, \"head\": \"\ufffd\", \"tail\": \"\ufffd\"}"},
		{"bad bytes counted", "\xff \xff \xfe", false, "{\"counts\": {\"\ufffd\": 3}}"},
		{"no escapes for HTML", "<a> & <b>", true, `{"counts": {"&": 1}, "head": "<a>", "tail": "<b>"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := wordcount.Line(result(t, []byte(c.block)), c.mayCut)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != c.want {
				t.Errorf("line is %s, want %s", got, c.want)
			}
			if !json.Valid(got) {
				t.Errorf("line %s is not JSON", got)
			}
		})
	}
}

func TestSameBlockSameBytes(t *testing.T) {
	data := []byte(strings.Repeat("the quick brown fox jumps over the lazy dog ", 200))
	want := result(t, data).Data
	for range 20 {
		if got := result(t, bytes.Clone(data)).Data; !bytes.Equal(got, want) {
			t.Fatalf("the same block gave %q and %q", want, got)
		}
	}
}

func TestCountLeavesTheBlockAlone(t *testing.T) {
	data := []byte("a b c\nlonger words here")
	before := bytes.Clone(data)
	out := result(t, data).Data
	if !bytes.Equal(data, before) {
		t.Errorf("the block became %q", data)
	}
	kept := bytes.Clone(out)
	clear(data) // a result must not share the block's memory
	if !bytes.Equal(out, kept) {
		t.Errorf("the result shares memory with its block")
	}
}

func TestAddKeepsNothingOfAResult(t *testing.T) {
	var c wordcount.Counts
	for _, block := range []string{"ab", "cd e", "f g"} {
		r := result(t, []byte(block))
		if err := c.Add(r); err != nil {
			t.Fatal(err)
		}
		clear(r.Data)
	}
	if got, want := textOf(t, &c), "abcd 1\nef 1\ng 1\n"; got != want {
		t.Errorf("answer is %q, want %q", got, want)
	}
}

func TestZeroCounts(t *testing.T) {
	if got := textOf(t, new(wordcount.Counts)); got != "" {
		t.Errorf("text of no block is %q", got)
	}
	if got := jsonOf(t, new(wordcount.Counts)); got != "{}\n" {
		t.Errorf("JSON of no block is %q", got)
	}
}

func corpus(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 3))
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "w%d ", int(rng.ExpFloat64()*500))
		if rng.IntN(12) == 0 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()[:n]
}

func BenchmarkCount(b *testing.B) {
	block := sheaf.Block{Data: corpus(1 << 20)}
	b.SetBytes(int64(len(block.Data)))
	for b.Loop() {
		if _, err := wordcount.Count(context.Background(), block); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	r := result(b, corpus(1<<20))
	b.SetBytes(int64(len(r.Data)))
	for b.Loop() {
		if err := new(wordcount.Counts).Add(r); err != nil {
			b.Fatal(err)
		}
	}
}
