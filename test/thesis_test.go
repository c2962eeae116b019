package test

// thesis_test.go holds the thesis ("Enabling scatter-gather communication
// between serverless function on a novel framework", 2020) against sheaf: its
// experiment, and what its artifact got wrong. Each test names the place.

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf"
)

// Thesis chapter 6: the input has 1,654 bytes.
func TestThesisInput(t *testing.T) {
	in := thesisText()
	if len(in) != 1654 || strings.Count(in, "\n") != 99 {
		t.Fatalf("the input has %d bytes and %d lines, the thesis's 1,654 and 99", len(in), strings.Count(in, "\n"))
	}
}

// Thesis chapter 6, figures 12 to 16: block sizes 300, 150, 100 and 50. In its
// artifact all blocks share one array, so that 41 of 41 words are miscounted
// (its own figure 12 shows "this 18 is 18 a 18" from two workers).
func TestThesisExperiment(t *testing.T) {
	b := start(t, 6, nil)
	in := thesisText()
	want := sequential(in)
	for _, size := range []int{300, 150, 100, 50} {
		if got := b.count(fmt.Sprintf("block=%d", size), in); got.body != want {
			t.Errorf("block %d: the counts differ from a sequential count:\n%s", size, got.body)
		}
	}
}

// Thesis section 5.2, Algorithm 1: blocks of whole lines. Its artifact drops
// blocks over a cap (26 % of the file at block 50) and the whole file at a line
// of 64 KiB.
func TestThesisEverySize(t *testing.T) {
	b := start(t, 4, nil)
	in := thesisText()
	want := sequential(in)
	for size := 1; size <= 2000; size++ {
		var joined strings.Builder
		for block, err := range sheaf.SplitLines(strings.NewReader(in), size) {
			if err != nil {
				t.Fatalf("block %d: %v", size, err)
			}
			joined.Write(block.Data)
		}
		if joined.String() != in {
			t.Fatalf("block %d: the blocks do not add up to the input", size)
		}
		if got := b.count(fmt.Sprintf("block=%d", size), in); got.body != want {
			t.Fatalf("block %d: the counts differ from a sequential count", size)
		}
	}
}

// Thesis section 5.3 and figures 13 to 16: a worker answers one message and
// ends, and a second upload ends the master. Here both go on.
func TestThesisSecondUpload(t *testing.T) {
	b := start(t, 2, nil)
	in := thesisText()
	before := b.replicas("worker")
	for range 3 {
		if got := b.count("block=50", in); got.body != sequential(in) {
			t.Fatal("the counts differ from a sequential count")
		}
	}
	if after := b.replicas("worker"); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("the workers changed over three uploads:\n%v\n%v", before, after)
	}
}
