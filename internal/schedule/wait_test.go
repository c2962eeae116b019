package schedule

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestWaitingHeap(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var heap, want []waiting
	for i := range 500 {
		w := waiting{Time(rnd.IntN(100)), i}
		heap, want = push(heap, w), append(want, w)
	}
	slices.SortFunc(want, func(a, b waiting) int {
		if a.before(b) {
			return -1
		}
		return 1
	})
	for i := range want {
		var w waiting
		if heap, w = pop(heap); w != want[i] {
			t.Fatalf("the %d. is %v, want %v", i, w, want[i])
		}
	}
}

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		name  string
		times []Time
		want  Time // the median is at least this and at most an eighth more
	}{
		{"one", []Time{time.Second}, time.Second},
		{"middle of three", []Time{time.Hour, time.Millisecond, time.Second}, time.Second},
		{"lower of two", []Time{time.Minute, time.Second}, time.Second},
		{"one in a hundred is slow", append(slices.Repeat([]Time{10 * time.Millisecond}, 99), time.Hour), 10 * time.Millisecond},
		{"longest", []Time{1 << 60}, 1 << 60},
	} {
		var h histogram
		if h.median() != 0 {
			t.Error("there is a median of nothing")
		}
		for _, d := range test.times {
			h.add(d)
		}
		if got := h.median(); got < test.want || got > test.want+test.want/8+1 {
			t.Errorf("%s: median %v, want %v", test.name, got, test.want)
		}
	}
	var h histogram
	for _, d := range []Time{-1, 0, 1} { // clocks may stand still
		h.add(d)
	}
	if got := h.median(); got > 16 {
		t.Errorf("median %v of no time", got)
	}
}
