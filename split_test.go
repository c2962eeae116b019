package sheaf_test

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/sheaf-project/sheaf"
)

// readSize is what a splitter reads ahead, as in split.go.
const readSize = 64 << 10

// collect returns the blocks before the error that ends them, if one does.
func collect(blocks iter.Seq2[sheaf.Block, error]) ([]sheaf.Block, error) {
	var all []sheaf.Block
	for b, err := range blocks {
		if err != nil {
			return all, err
		}
		all = append(all, b)
	}
	return all, nil
}

// split checks what holds for every splitter, and returns the blocks' data.
func split(t testing.TB, s sheaf.Splitter, in string) ([]string, error) {
	t.Helper()
	blocks, err := collect(s.Split(strings.NewReader(in)))
	data := make([]string, len(blocks))
	offset := int64(0)
	for i, b := range blocks {
		data[i] = string(b.Data)
		if b.Index != i {
			t.Fatalf("block %d has index %d", i, b.Index)
		}
		if len(b.Data) == 0 {
			t.Fatalf("block %d is empty", i)
		}
		if isArray := s.By == "json" && startsArray(in); !isArray {
			if b.Offset != offset {
				t.Fatalf("block %d has offset %d, want %d", i, b.Offset, offset)
			}
			offset += int64(len(b.Data))
		}
	}
	// Who receives a block may do with its memory what it likes, at once and
	// after the next ones came.
	for i, b := range blocks {
		scribble(b)
		if i+1 < len(blocks) && string(blocks[i+1].Data) != data[i+1] {
			t.Fatalf("blocks %d and %d share memory", i, i+1)
		}
	}
	i := 0
	for b, err := range s.Split(strings.NewReader(in)) {
		if err == nil && string(b.Data) != data[i] {
			t.Fatalf("block %d shares memory with the ones before it", i)
		}
		scribble(b)
		i++
	}
	return data, err
}

// scribble overwrites all of a block's memory.
func scribble(b sheaf.Block) {
	whole := b.Data[:cap(b.Data)]
	for i := range whole {
		whole[i] = 0xAA
	}
}

func startsArray(in string) bool {
	in = strings.TrimPrefix(in, "\xef\xbb\xbf")
	return strings.HasPrefix(strings.TrimLeft(in, " \t\r\n"), "[")
}

// greedy packs records into blocks as the thesis's Algorithm 1 does: as many
// whole ones as fit, or one that is longer.
func greedy(records []string, size int) []string {
	blocks := []string{}
	for len(records) > 0 {
		n, bytes := 1, len(records[0])
		for n < len(records) && bytes+len(records[n]) <= size {
			bytes += len(records[n])
			n++
		}
		if bytes > 0 { // SplitAfter ends in an empty string
			blocks = append(blocks, strings.Join(records[:n], ""))
		}
		records = records[n:]
	}
	return blocks
}

func checkBlocks(t testing.TB, got, want []string) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("block %d is %.60q (%d bytes), want %.60q (%d bytes)", i, got[i], len(got[i]), want[i], len(want[i]))
		}
	}
	t.Fatalf("%d blocks, want %d", len(got), len(want))
}

// thesisText is as large as the thesis's cat.txt: 1,654 bytes in 99 lines.
func thesisText() string {
	rnd := rand.New(rand.NewPCG(1654, 99))
	var b strings.Builder
	for i := range 99 {
		n := rnd.IntN(27)
		if i == 98 {
			n = 1654 - b.Len() - 1
		}
		for range n {
			b.WriteByte(" abcdefgh"[rnd.IntN(9)])
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// texts are inputs that splitters have been known to lose bytes of.
var texts = map[string]string{
	"empty":                "",
	"one byte":             "x",
	"one newline":          "\n",
	"only newlines":        strings.Repeat("\n", 57),
	"no final newline":     "one\ntwo\nthree",
	"CRLF":                 "one\r\ntwo\r\n\r\nthree\r\n",
	"NUL":                  "a\x00b\n\x00\n\x00\x00c",
	"invalid UTF-8":        "\xff\xfe\n\xc3\n\xe2\x82\n",
	"line over the buffer": "a\n" + strings.Repeat("b", 70_000) + "\nc\n",
	"long last line":       "a\n" + strings.Repeat("b", 70_000),
	"lines of ten":         strings.Repeat("123456789\n", 40),
}

func TestSplitLinesThesis(t *testing.T) {
	t.Parallel()
	text := thesisText()
	lines := slices.Collect(strings.Lines(text))
	if len(text) != 1654 || len(lines) != 99 {
		t.Fatalf("the text has %d bytes in %d lines", len(text), len(lines))
	}
	for size := 1; size <= 2000; size++ {
		got, err := split(t, sheaf.Splitter{Size: size}, text)
		if err != nil {
			t.Fatalf("size %d: %v", size, err)
		}
		checkBlocks(t, got, greedy(lines, size))
	}
}

func TestSplitLines(t *testing.T) {
	t.Parallel()
	for name, text := range texts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, size := range []int{1, 2, 3, 9, 10, 11, 19, 20, 21, 57, 58, 4096, readSize - 1, readSize, readSize + 1, 1 << 20} {
				got, err := split(t, sheaf.Splitter{By: "lines", Size: size}, text)
				if err != nil {
					t.Fatalf("size %d: %v", size, err)
				}
				checkBlocks(t, got, greedy(slices.Collect(strings.Lines(text)), size))
			}
		})
	}
}

func TestSplitBytes(t *testing.T) {
	t.Parallel()
	for name, text := range texts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, size := range []int{1, 2, 7, 57, readSize - 1, readSize, readSize + 1, 1 << 20} {
				want := []string{}
				for c := range slices.Chunk([]byte(text), size) {
					want = append(want, string(c))
				}
				got, err := split(t, sheaf.Splitter{By: "bytes", Size: size}, text)
				if err != nil {
					t.Fatal(err)
				}
				checkBlocks(t, got, want)
			}
		})
	}
	t.Run("64 MiB without a line feed", func(t *testing.T) {
		t.Parallel()
		total := 0
		for b, err := range sheaf.SplitBytes(io.LimitReader(zeros{}, 64<<20), 1<<20) {
			if err != nil || len(b.Data) != 1<<20 {
				t.Fatalf("block %d has %d bytes, error %v", b.Index, len(b.Data), err)
			}
			total += len(b.Data)
		}
		if total != 64<<20 {
			t.Errorf("blocks hold %d bytes", total)
		}
	})
}

// zeros is an input without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestSplitRecords(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, delimiter, in string }{
		{"line feed by default", "", "a\nb\nc"},
		{"one byte", "\x00", "a\x00b\x00\x00c\x00"},
		{"many bytes", "--\n", "a--\nb-\nc---\n--\nlast"},
		{"UTF-8", "…", "a…b……c\xe2\x80d…"},
		{"overlaps itself", "aa", "aaaaabaaacaa"},
		{"border inside", "abab", "ababababcabababab"},
		{"border of a border", "aabaaab", "aabaabaaabaabaaabaaab"},
		{"never met", "||", "a|b|c|"},
		{"delimiters only", "::", "::::::::"},
		{"cut at the end", "::", "a::b:"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			delimiter := test.delimiter
			if delimiter == "" {
				delimiter = "\n"
			}
			// Put the input across the edge of the read buffer at each place.
			for pad := range len(test.in) + 2 {
				in := test.in
				if pad > 0 {
					in = strings.Repeat("z", readSize-pad) + in + in
				}
				records := strings.SplitAfter(in, delimiter)
				for _, size := range []int{1, 2, 3, 5, 8, readSize - 3, readSize, readSize + 2} {
					got, err := split(t, sheaf.Splitter{By: "records", Size: size, Delimiter: test.delimiter}, in)
					if err != nil {
						t.Fatal(err)
					}
					checkBlocks(t, got, greedy(records, size))
				}
			}
		})
	}
}

// csvRecords cuts in after each record, in the sense of RFC 4180.
func csvRecords(in string, sep byte) []string {
	var records []string
	start, fieldStart, quoted := 0, true, false
	for i := 0; i < len(in); i++ {
		switch b := in[i]; {
		case quoted && b == '"' && i+1 < len(in) && in[i+1] == '"':
			i++
		case quoted:
			quoted = b != '"'
			fieldStart = false
		case b == '"' && fieldStart:
			quoted = true
		case b == '\n':
			records, start, fieldStart = append(records, in[start:i+1]), i+1, true
		default:
			fieldStart = b == sep
		}
	}
	if start < len(in) {
		records = append(records, in[start:])
	}
	return records
}

func TestSplitCSV(t *testing.T) {
	t.Parallel()
	quoted := strings.Repeat(`"a ""quoted"" one","two`+"\n"+`lines",plain`+"\n", 7)
	for _, test := range []struct{ name, in string }{
		{"plain", "a,b\nc,d\n"},
		{"no final line feed", "a,b\nc,d"},
		{"CRLF", "a,\"b\r\nc\"\r\nd,e\r\n"},
		{"quoted line feeds", quoted},
		{"only quotes", `"",""""` + "\n" + `"""",""` + "\n"},
		{"quoted to the end", "a,\"b\nc\""},
		{"empty fields and lines", ",\n\n,,\n\"\",\n"},
		{"bare quotes in plain fields", "5\" disk,a\"b\n6\",x\"\"\n"},
		{"bare quote before a comma", "a\",\"b\nc\",d\n"},
		{"wide", strings.Repeat(`"x",`, 300) + "\n" + strings.Repeat("y,", 300) + "\n"},
		{"over the read buffer", "a,\"" + strings.Repeat("long\n", 15_000) + "\"\nb,c\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			want := readCSV(t, test.in)
			for _, size := range []int{1, 2, 3, 5, 8, 13, 30, 100, readSize, 1 << 20} {
				got, err := split(t, sheaf.Splitter{By: "csv", Size: size}, test.in)
				if err != nil {
					t.Fatal(err)
				}
				checkBlocks(t, got, greedy(csvRecords(test.in, ','), size))
				var rows [][]string
				for _, block := range got { // each block reads as CSV by itself
					rows = append(rows, readCSV(t, block)...)
				}
				if !reflect.DeepEqual(rows, want) {
					t.Fatalf("size %d: blocks read as %q, want %q", size, rows, want)
				}
			}
		})
	}
	t.Run("quotes at the edge of the read buffer", func(t *testing.T) {
		t.Parallel()
		for pad := range len(quoted) {
			in := "\"" + strings.Repeat("p", readSize-pad) + "\"\n" + quoted
			got, err := split(t, sheaf.Splitter{By: "csv", Size: 40}, in)
			if err != nil {
				t.Fatal(err)
			}
			checkBlocks(t, got, greedy(csvRecords(in, ','), 40))
		}
	})
	t.Run("another separator", func(t *testing.T) {
		t.Parallel()
		in := "a;\"b\nc\"\nd,\"e\nf\n"
		got, err := split(t, sheaf.Splitter{By: "csv", Size: 1, Delimiter: ";"}, in)
		if err != nil {
			t.Fatal(err)
		}
		checkBlocks(t, got, csvRecords(in, ';'))
	})
}

func readCSV(t *testing.T, in string) [][]string {
	t.Helper()
	r := csv.NewReader(strings.NewReader(in))
	r.LazyQuotes, r.FieldsPerRecord = true, -1
	rows, err := r.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

func TestSplitCSVIsLinear(t *testing.T) {
	t.Parallel()
	// One line with a million quotes: looking for its end at each of them would
	// take minutes.
	in := strings.Repeat(`"x",y"z,`, 400_000)
	s := sheaf.Splitter{By: "csv", Size: len(in)}
	if got, err := split(t, s, in); err != nil || len(got) != 1 {
		t.Fatalf("%d blocks, error %v", len(got), err)
	}
}

func TestSplitJSON(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, in string }{
		{"empty", ""},
		{"space only", " \n\t\n"},
		{"lines", `{"a":1}` + "\n" + `[2]` + "\n" + `"three"` + "\n4\nnull\n"},
		{"no final line feed", "{}\n{}"},
		{"empty lines", "\n{}\n\n\n{}\n"},
		{"values over lines", "{\n \"a\": [\n1,\n2]\n}\n{\n}\n7\n"},
		{"brackets in strings", `{"a":"}]{["}` + "\n" + `{"b":"\"}\\"}` + "\n"},
		{"several to a line", `1 2 {"a":3} [4]` + "\n5\n"},
		{"empty array", " [ ]\n"},
		{"array", `[1,"two",{"three":[3,3,3]},[],null,-4.5e3]`},
		{"pretty array", "\n[\n  {\n    \"a\": 1,\n    \"b\": \"x, y]\"\n  },\n  [\n    1,\r\n\t2\n  ]\n]\n"},
		{"escapes in an array", `["\\","\"",",]\\\"","é\u00e9"]`},
		{"nested array", "[" + strings.Repeat("[", 200) + strings.Repeat("]", 200) + ",1]"},
		{"long elements", `["` + strings.Repeat("x", 70_000) + `",1,"` + strings.Repeat("y", 70_000) + `"]`},
		{"array after a byte-order mark", "\xef\xbb\xbf[1,2]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			want := decodeJSON(t, test.in)
			if startsArray(test.in) {
				want = want[0].([]any)
			}
			step := 40
			if len(test.in) > readSize {
				step = 2
			}
			for size := 1; size <= len(test.in)+2; size += 1 + size/step {
				got, err := split(t, sheaf.Splitter{By: "json", Size: size}, test.in)
				if err != nil {
					t.Fatalf("size %d: %v", size, err)
				}
				var values []any
				for _, block := range got { // each block is JSON by itself
					values = append(values, decodeJSON(t, block)...)
				}
				if fmt.Sprint(values) != fmt.Sprint(want) {
					t.Fatalf("size %d: blocks hold %.200v, want %.200v", size, values, want)
				}
				whole := strings.Join(got, "")
				if !startsArray(test.in) {
					if whole != test.in {
						t.Fatalf("size %d: the blocks are not the input", size)
					}
					continue
				}
				if strings.Count(whole, "\n") != len(want) {
					t.Fatalf("size %d: %d elements do not stand one to a line: %.200q", size, len(want), whole)
				}
				checkBlocks(t, got, greedy(slices.Collect(strings.Lines(whole)), size))
			}
		})
	}
	t.Run("offsets in an array", func(t *testing.T) {
		t.Parallel()
		blocks, err := collect(sheaf.SplitJSON(strings.NewReader(` [ 1, "bb" ,{"c":3}]`), 1))
		if err != nil {
			t.Fatal(err)
		}
		var offsets []int64
		for _, b := range blocks {
			offsets = append(offsets, b.Offset)
		}
		if want := []int64{3, 6, 12}; !slices.Equal(offsets, want) {
			t.Errorf("offsets %v, want %v", offsets, want)
		}
	})
}

func decodeJSON(t *testing.T, in string) []any {
	t.Helper()
	values := []any{}
	for d := json.NewDecoder(strings.NewReader(strings.TrimPrefix(in, "\xef\xbb\xbf"))); ; {
		var v any
		if err := d.Decode(&v); err == io.EOF {
			return values
		} else if err != nil {
			t.Fatalf("%v in %.80q", err, in)
		}
		values = append(values, v)
	}
}

func TestSplitMalformed(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, by, in string
		offset       int64
	}{
		{"CSV quote without end", "csv", "a,b\nc,\"d\ne\n", 4},
		{"CSV quote without end in a long record", "csv", "a\n\"" + strings.Repeat("b", 70_000), 2},
		{"CSV quote doubled at the end", "csv", `a,"b""`, 0},
		{"JSON cut in an object", "json", "{}\n{\"a\":", 3},
		{"JSON cut in a string", "json", "1\n\"ab", 2},
		{"JSON string over a line", "json", "1\n\"ab\n\"", 2},
		{"JSON bracket of the wrong kind", "json", "{}\n{]\n", 3},
		{"JSON bracket too many", "json", "{}\n}\n", 3},
		{"JSON nested too deep", "json", "1\n" + strings.Repeat("[", 10_001), 2},
		{"array without end", "json", "[1,2", 4},
		{"array cut in a string", "json", `["a`, 3},
		{"array cut after a comma", "json", "[1,", 3},
		{"array with a trailing comma", "json", "[1,]", 3},
		{"array with a leading comma", "json", "[,1]", 1},
		{"array with two commas", "json", "[1,,2]", 3},
		{"array without a comma", "json", "[1 2]", 3},
		{"array without a comma between objects", "json", "[{}\n{}]", 4},
		{"array with a brace too many", "json", "[{}}]", 3},
		{"array closed by a brace", "json", "[[1}]", 3},
		{"array with a line feed in a string", "json", "[\"a\nb\"]", 3},
		{"array with something behind it", "json", "[1]\n[2]", 4},
		{"array nested too deep", "json", strings.Repeat("[", 10_002), 10_001},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			for _, size := range []int{1, 3, 1 << 20} {
				_, err := split(t, sheaf.Splitter{By: test.by, Size: size}, test.in)
				var re *sheaf.RecordError
				if !errors.As(err, &re) || !errors.Is(err, sheaf.ErrMalformed) {
					t.Fatalf("size %d: error %v is no RecordError of malformed input", size, err)
				}
				if re.Offset != test.offset || !strings.Contains(err.Error(), fmt.Sprint("byte ", test.offset)) {
					t.Errorf("size %d: error %q at byte %d, want %d", size, err, re.Offset, test.offset)
				}
			}
		})
	}
}

func TestSplitLimits(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 20)
	for _, test := range []struct {
		name, in string
		splitter sheaf.Splitter
		blocks   int   // before the error
		offset   int64 // of the record that is too long, -1 for none
	}{
		{"line just short enough", "a\n" + long[1:] + "\n", sheaf.Splitter{Size: 4, MaxRecord: 20}, 2, -1},
		{"line too long", "a\n" + long + "\nb\n", sheaf.Splitter{Size: 4, MaxRecord: 20}, 1, 2},
		{"last line too long", "a\nb\n" + long + "x", sheaf.Splitter{Size: 4, MaxRecord: 20}, 1, 4},
		{"record too long", "a::b::" + long, sheaf.Splitter{By: "records", Delimiter: "::", Size: 4, MaxRecord: 10}, 2, 6},
		{"CSV record too long", "a\n\"\n\n" + long + "\"\n", sheaf.Splitter{By: "csv", Size: 4, MaxRecord: 10}, 1, 2},
		{"JSON line too long", "1\n\"" + long + "\"\n", sheaf.Splitter{By: "json", Size: 4, MaxRecord: 10}, 1, 2},
		{"JSON element too long", `[1, "` + long + `"]`, sheaf.Splitter{By: "json", Size: 1, MaxRecord: 10}, 0, 4},
		{"default grows with the size", long, sheaf.Splitter{Size: 1 << 10}, 1, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			blocks, err := split(t, test.splitter, test.in)
			if len(blocks) != test.blocks {
				t.Errorf("%d blocks %q, want %d", len(blocks), blocks, test.blocks)
			}
			var re *sheaf.RecordError
			switch {
			case test.offset < 0 && err != nil:
				t.Error(err)
			case test.offset >= 0 && !(errors.As(err, &re) && errors.Is(err, sheaf.ErrRecordTooLong)):
				t.Errorf("error %v, want %v", err, sheaf.ErrRecordTooLong)
			case test.offset >= 0 && (re.Offset != test.offset || re.Limit != test.splitter.MaxRecord):
				t.Errorf("error %v, want it at byte %d", err, test.offset)
			}
		})
	}
	t.Run("longer than the default", func(t *testing.T) {
		t.Parallel()
		_, err := collect(sheaf.SplitLines(io.LimitReader(zeros{}, sheaf.DefaultMaxRecord+1), 10))
		if !errors.Is(err, sheaf.ErrRecordTooLong) {
			t.Errorf("error %v", err)
		}
	})
	for _, by := range sheaf.Splits() {
		t.Run("MaxBlocks of "+by, func(t *testing.T) {
			t.Parallel()
			s := sheaf.Splitter{By: by, Size: 2, MaxBlocks: 3}
			if blocks, err := split(t, s, "1\n2\n3\n"); len(blocks) != 3 || err != nil {
				t.Errorf("%d blocks and error %v, want 3", len(blocks), err)
			}
			if blocks, err := split(t, s, "1\n2\n3\n4\n"); len(blocks) != 3 || !errors.Is(err, sheaf.ErrTooManyBlocks) {
				t.Errorf("%d blocks and error %v, want 3 and %v", len(blocks), err, sheaf.ErrTooManyBlocks)
			}
		})
	}
}

func TestSplitterValidate(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		splitter sheaf.Splitter
		ok       bool
	}{
		{"zero", sheaf.Splitter{}, false},
		{"lines", sheaf.Splitter{Size: 1}, true},
		{"unknown", sheaf.Splitter{By: "words", Size: 1}, false},
		{"negative size", sheaf.Splitter{Size: -1}, false},
		{"negative limit", sheaf.Splitter{Size: 1, MaxRecord: -1}, false},
		{"negative blocks", sheaf.Splitter{Size: 1, MaxBlocks: -1}, false},
		{"delimiter of 16", sheaf.Splitter{By: "records", Size: 1, Delimiter: strings.Repeat("x", 16)}, true},
		{"delimiter of 17", sheaf.Splitter{By: "records", Size: 1, Delimiter: strings.Repeat("x", 17)}, false},
		{"separator of two", sheaf.Splitter{By: "csv", Size: 1, Delimiter: ",,"}, false},
		{"separator is a quote", sheaf.Splitter{By: "csv", Size: 1, Delimiter: `"`}, false},
		{"separator is a line feed", sheaf.Splitter{By: "csv", Size: 1, Delimiter: "\n"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			err := test.splitter.Validate()
			if (err == nil) != test.ok {
				t.Errorf("Validate says %v", err)
			}
			blocks, got := collect(test.splitter.Split(strings.NewReader("a\n")))
			if fmt.Sprint(got) != fmt.Sprint(err) || (err == nil) != (len(blocks) > 0) {
				t.Errorf("Split yields %d blocks and %v, want what Validate says: %v", len(blocks), got, err)
			}
		})
	}
}

// inputs has something to split for each splitter.
var inputs = map[string]string{
	"lines":   strings.Repeat("a line\n\nand one more\n", 30),
	"bytes":   strings.Repeat("0123456789", 30),
	"records": strings.Repeat("a record::and:one::", 30),
	"csv":     strings.Repeat("plain,\"quoted\n\"\"twice\"\"\",5\"\n", 30),
	"json":    strings.Repeat("{\"a\": [1,\n\"}\"]}\n", 30),
	"array":   " [" + strings.Repeat(`{"a": [1, "]"]} , `, 30) + "0]\n",
}

func eachInput(t *testing.T, f func(t *testing.T, s sheaf.Splitter, in string)) {
	for name, in := range inputs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := sheaf.Splitter{By: name, Size: 50, Delimiter: "::"}
			if name == "csv" {
				s.Delimiter = ","
			}
			if name == "array" {
				s.By = "json"
			}
			f(t, s, in)
		})
	}
}

func TestSplitAnyReader(t *testing.T) {
	t.Parallel()
	eachInput(t, func(t *testing.T, s sheaf.Splitter, in string) {
		want, err := collect(s.Split(strings.NewReader(in)))
		if err != nil || len(want) < 3 {
			t.Fatalf("%d blocks, error %v", len(want), err)
		}
		for name, r := range map[string]io.Reader{
			"one byte":       iotest.OneByteReader(strings.NewReader(in)),
			"half":           iotest.HalfReader(strings.NewReader(in)),
			"data with EOF":  iotest.DataErrReader(strings.NewReader(in)),
			"both":           iotest.DataErrReader(iotest.OneByteReader(strings.NewReader(in))),
			"nothing so far": &hesitant{in: strings.NewReader(in)},
		} {
			got, err := collect(s.Split(r))
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s: other blocks than at once; error %v", name, err)
			}
		}
	})
}

// hesitant returns no byte and no error every other time.
type hesitant struct {
	in io.Reader
	no bool
}

func (h *hesitant) Read(p []byte) (int, error) {
	if h.no = !h.no; h.no {
		return 0, nil
	}
	return h.in.Read(p[:1])
}

func TestSplitReadError(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	eachInput(t, func(t *testing.T, s sheaf.Splitter, in string) {
		for _, test := range []struct {
			name string
			r    io.Reader
			want error
			at   int
		}{
			{"at once", iotest.ErrReader(broken), broken, 0},
			{"midway", io.MultiReader(strings.NewReader(in[:77]), iotest.ErrReader(broken)), broken, 77},
			{"within the first block", io.MultiReader(strings.NewReader(in[:7]), iotest.ErrReader(broken)), broken, 7},
			{"with data", iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader(in))), iotest.ErrTimeout, 1},
		} {
			_, err := collect(s.Split(test.r))
			if !errors.Is(err, test.want) {
				t.Errorf("%s: error %v, want it to wrap %v", test.name, err, test.want)
			} else if at := fmt.Sprintf("at byte %d:", test.at); !strings.Contains(err.Error(), at) {
				t.Errorf("%s: error %q, want it %s", test.name, err, at)
			}
		}
	})
}

func TestSplitYieldsAsSoonAsFull(t *testing.T) {
	t.Parallel()
	// What is read at most ahead of the block in hand: a block and the read
	// buffer, whatever the length of the input.
	eachInput(t, func(t *testing.T, s sheaf.Splitter, in string) {
		s.Size = 200_000
		body := strings.Repeat(in, 2_000_000/len(in))
		if startsArray(in) {
			body = "[" + strings.Repeat(`"element",`, 200_000) + "0]"
		}
		r := &counting{in: strings.NewReader(body)}
		for b, err := range s.Split(r) {
			if err != nil {
				t.Fatal(err)
			}
			end := int(b.Offset) + len(b.Data)
			if ahead := r.n - end; ahead > s.Size+readSize {
				t.Fatalf("block %d ends at byte %d, and %d bytes are read", b.Index, end, r.n)
			}
		}
	})
	t.Run("of a slow input", func(t *testing.T) {
		t.Parallel()
		eachInput(t, func(t *testing.T, s sheaf.Splitter, in string) {
			r := &counting{in: iotest.OneByteReader(strings.NewReader(in))}
			for b, err := range s.Split(r) {
				if err != nil {
					t.Fatal(err)
				}
				if b.Index == 0 && r.n > 3*s.Size {
					t.Fatalf("the first block of %d bytes came after %d bytes", len(b.Data), r.n)
				}
			}
		})
	})
}

// counting counts what was read.
type counting struct {
	in io.Reader
	n  int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	c.n += n
	return n, err
}

func TestSplitLeaveLoop(t *testing.T) {
	t.Parallel()
	eachInput(t, func(t *testing.T, s sheaf.Splitter, in string) {
		for range s.Split(strings.NewReader(in)) {
			break // an iterator that went on would panic
		}
	})
}

func TestSplitLinesAllocations(t *testing.T) {
	// Not parallel: AllocsPerRun forbids it.
	text := bytes.Repeat([]byte("a short line\n"), 200_000)
	const size = 64 << 10
	blocks := (len(text) + size - 1) / size
	allocs := testing.AllocsPerRun(3, func() {
		for _, err := range sheaf.SplitLines(bytes.NewReader(text), size) {
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	if most := float64(2*blocks + 20); allocs > most {
		t.Errorf("%.0f allocations for %d blocks of %d lines, want at most %.0f", allocs, blocks, 200_000, most)
	}
}

func TestSplitSmallInputTakesLittle(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := collect(sheaf.SplitLines(strings.NewReader("a\n"), 1<<30)); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("a line of two bytes took %d bytes of memory", n)
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		in   string
		want int
		err  error // nil: none; strconv.ErrRange; errAny: any other
	}{
		{"300", 300, nil},
		{"0", 0, nil},
		{"-5", -5, nil},
		{"5B", 5, nil},
		{"10kB", 10_000, nil},
		{"10KB", 10_000, nil},
		{"1MB", 1_000_000, nil},
		{"3GB", 3_000_000_000, nil},
		{"1TB", 1_000_000_000_000, nil},
		{"64KiB", 64 << 10, nil},
		{"64k", 64 << 10, nil},
		{"64K", 64 << 10, nil},
		{"1MiB", 1 << 20, nil},
		{"1M", 1 << 20, nil},
		{"2GiB", 2 << 30, nil},
		{"2G", 2 << 30, nil},
		{"1TiB", 1 << 40, nil},
		{"9223372036854775807", math.MaxInt64, nil},
		{"9223372036854775808", 0, strconv.ErrRange},
		{"9007199254740992KiB", 0, strconv.ErrRange},
		{"99999999999999999999GiB", 0, strconv.ErrRange},
		{"-9007199254740993KiB", 0, strconv.ErrRange},
		{"", 0, errAny},
		{"B", 0, errAny},
		{"KiB", 0, errAny},
		{"1.5MiB", 0, errAny},
		{"1 MiB", 0, errAny},
		{" 1", 0, errAny},
		{"1mib", 0, errAny},
		{"1PiB", 0, errAny},
		{"1Ki", 0, errAny},
		{"0x10", 0, errAny},
		{"1_000", 0, errAny},
		{"many", 0, errAny},
		{"99999999999999999999Ki", 0, errAny},
	} {
		t.Run(test.in, func(t *testing.T) {
			t.Parallel()
			got, err := sheaf.ParseSize(test.in)
			switch {
			case got != test.want:
				t.Errorf("got %d, want %d", got, test.want)
			case (err != nil) != (test.err != nil), errors.Is(err, strconv.ErrRange) != (test.err == strconv.ErrRange):
				t.Errorf("error %v, want %v", err, test.err)
			case err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%q", test.in)):
				t.Errorf("error %q does not say what was wrong", err)
			}
		})
	}
}

var errAny = errors.New("any error")

func BenchmarkSplit(b *testing.B) {
	for name, in := range map[string]string{
		"lines": "a line of some length, as logs have them\n",
		"csv":   "1,\"a quoted field\",plain,\"another\"\n",
		"json":  `{"a":1,"b":["x","y"]}` + "\n",
	} {
		b.Run(name, func(b *testing.B) {
			text := bytes.Repeat([]byte(in), 8<<20/len(in))
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				for _, err := range (sheaf.Splitter{By: name, Size: 1 << 20}).Split(bytes.NewReader(text)) {
					if err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
