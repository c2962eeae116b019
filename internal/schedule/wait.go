package schedule

// wait.go holds the two small structures the machine counts time with: a heap
// of what waits, and a histogram of how long attempts took.

import "math/bits"

// push adds w to the heap h, the earliest first.
func push(h []waiting, w waiting) []waiting {
	h = append(h, w)
	for i := len(h) - 1; i > 0; {
		parent := (i - 1) / 2
		if !h[i].before(h[parent]) {
			break
		}
		h[i], h[parent] = h[parent], h[i]
		i = parent
	}
	return h
}

// pop takes the earliest from h.
func pop(h []waiting) ([]waiting, waiting) {
	w := h[0]
	last := len(h) - 1
	h[0] = h[last]
	h = h[:last]
	for i := 0; ; {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < len(h); c++ {
			if h[c].before(h[least]) {
				least = c
			}
		}
		if least == i {
			return h, w
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
}

func (w waiting) before(o waiting) bool { return w.at < o.at || w.at == o.at && w.id < o.id }

// A histogram counts durations in buckets that are an eighth of a power of two
// wide, so that a median is right to about 12 %.
type histogram struct {
	n       int
	buckets [64 * 8]int32
}

func (h *histogram) add(d Time) {
	h.n++
	h.buckets[bucket(d)]++
}

func bucket(d Time) int {
	u := uint64(max(d, 8))
	e := bits.Len64(u) - 4 // u>>e lies in [8, 16)
	return e*8 + int(u>>e) - 8
}

// median is the upper end of the bucket that holds the median; 0 when empty.
func (h *histogram) median() Time {
	seen := 0
	for i, c := range h.buckets {
		seen += int(c)
		if seen > 0 && 2*seen >= h.n {
			return Time(uint64(8+i%8+1) << (i / 8))
		}
	}
	return 0
}
