package sheaf_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf"
)

func FuzzSplitLines(f *testing.F) {
	for _, text := range texts {
		f.Add(text, 7)
	}
	f.Fuzz(func(t *testing.T, in string, size int) {
		size = 1 + abs(size)%(2*readSize)
		got, err := split(t, sheaf.Splitter{Size: size}, in)
		if err != nil {
			t.Fatal(err)
		}
		checkBlocks(t, got, greedy(slices.Collect(strings.Lines(in)), size))
	})
}

func FuzzSplitRecords(f *testing.F) {
	f.Add("one::two:::three::", "::", 5)
	f.Add("aaabaaaab", "aab", 1)
	f.Add("abababababc", "abab", 3)
	f.Add("x--\r\n--", "-", 2)
	f.Fuzz(func(t *testing.T, in, delimiter string, size int) {
		if delimiter == "" || len(delimiter) > 16 {
			return
		}
		size = 1 + abs(size)%(2*readSize)
		got, err := split(t, sheaf.Splitter{By: "records", Size: size, Delimiter: delimiter}, in)
		if err != nil {
			t.Fatal(err)
		}
		checkBlocks(t, got, greedy(strings.SplitAfter(in, delimiter), size))
	})
}

func FuzzSplitCSV(f *testing.F) {
	f.Add("a,\"b\nc\"\"\"\nd,e\"f\n", 3)
	f.Add("\"\",\"\"\"\"\n\"x\"y,\n", 1)
	f.Add("a,\"b", 8)
	f.Add("\"a\r\nb\",\"\"c\"\r\n", 5)
	f.Fuzz(func(t *testing.T, in string, size int) {
		size = 1 + abs(size)%(2*readSize)
		got, err := split(t, sheaf.Splitter{By: "csv", Size: size}, in)
		records := csvRecords(in, ',')
		if err == nil {
			checkBlocks(t, got, greedy(records, size))
			return
		}
		// Only a quote without end can be wrong, and only in the last record.
		last := len(in) - len(records[len(records)-1])
		var re *sheaf.RecordError
		if !errors.As(err, &re) || !errors.Is(err, sheaf.ErrMalformed) || re.Offset != int64(last) {
			t.Fatalf("error %v, want malformed input at byte %d", err, last)
		}
		if !strings.HasPrefix(in[:last], strings.Join(got, "")) {
			t.Fatal("the blocks before the error are not the input before it")
		}
	})
}

func FuzzSplitJSON(f *testing.F) {
	f.Add(`[1,{"a":[2,"]"]},"x\"y", null]`, 3)
	f.Add("{\"a\":1}\n[2,\n3]\n\"four\"\n", 1)
	f.Add("[\n]\n", 9)
	f.Add("\xef\xbb\xbf [true ,false]", 2)
	f.Add(`[[[[]]],"`, 2)
	f.Fuzz(func(t *testing.T, in string, size int) {
		size = 1 + abs(size)%(2*readSize)
		got, err := split(t, sheaf.Splitter{By: "json", Size: size}, in)
		if err != nil {
			if !errors.Is(err, sheaf.ErrMalformed) {
				t.Fatalf("error %v, want it malformed", err)
			}
			if json.Valid([]byte(in)) {
				t.Fatalf("valid JSON is refused: %v", err)
			}
			return
		}
		whole := strings.Join(got, "")
		if !startsArray(in) {
			if whole != in {
				t.Fatal("the blocks are not the input")
			}
			return
		}
		var want []json.RawMessage
		if json.Unmarshal([]byte(strings.TrimPrefix(in, "\xef\xbb\xbf")), &want) != nil {
			return // what is between the brackets and commas is not judged
		}
		lines := slices.Collect(strings.Lines(whole))
		if len(lines) != len(want) {
			t.Fatalf("%d elements, want %d", len(lines), len(want))
		}
		for i, line := range lines {
			if compact(t, []byte(line)) != compact(t, want[i]) {
				t.Fatalf("element %d is %q, want %q", i, line, want[i])
			}
		}
		checkBlocks(t, got, greedy(lines, size))
	})
}

func compact(t *testing.T, value []byte) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, value); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func abs(n int) int {
	if n < 0 {
		n = ^n
	}
	return n
}

// A size that is taken is what its digits and unit say, and never negative for
// digits without a sign.
func FuzzParseSize(f *testing.F) {
	for _, v := range []string{"0", "300", "64KiB", "1MiB", "9223372036854775807", "9223372036854775808", "8388608TiB", "-1", "+5", "1.5", "kB", "5 B"} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		n, err := sheaf.ParseSize(v)
		if err != nil {
			if n != 0 || strings.ContainsAny(err.Error(), "\n\r") {
				t.Errorf("%q: %d beside %q", v, n, err)
			}
			return
		}
		if n < 0 && !strings.HasPrefix(v, "-") {
			t.Errorf("%q became %d", v, n)
		}
		if again, err := sheaf.ParseSize(strconv.Itoa(n)); err != nil || again != n {
			t.Errorf("%q became %d, which becomes %d (%v)", v, n, again, err)
		}
	})
}
