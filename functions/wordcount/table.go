package wordcount

import (
	"bytes"
	"hash/maphash"
)

// table counts words, and keeps the order in which they came. It is a hash
// table with open addresses, and one piece of memory for the text of all words:
// whatever it holds, the garbage collector sees three slices without pointers.
type table struct {
	slots []uint32 // place in words + 1, or 0; a power of two of them, at most half full
	words []word
	text  []byte // of all words, one after another
}

type word struct {
	n    int64
	at   int // in text
	size int
	hash uint32
}

// seed is the same for all tables of a process; who chooses words must not
// choose where they go.
var seed = maphash.MakeSeed()

// newTable returns a table for the words of so many bytes of text.
func newTable(size int) *table {
	n := 256
	for n < size/16 && n < 1<<14 { // it grows if that is not enough
		n *= 2
	}
	return &table{slots: make([]uint32, n)}
}

func (t *table) word(i int) []byte {
	w := &t.words[i]
	return t.text[w.at : w.at+w.size]
}

func (t *table) add(w []byte, n int64) {
	hash := uint32(maphash.Bytes(seed, w))
	mask := uint32(len(t.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		at := t.slots[i]
		if at == 0 {
			t.slots[i] = uint32(len(t.words) + 1)
			break
		}
		if e := &t.words[at-1]; e.hash == hash && e.size == len(w) && bytes.Equal(t.text[e.at:e.at+len(w)], w) {
			e.n += n
			return
		}
	}
	t.words = append(t.words, word{n: n, at: len(t.text), size: len(w), hash: hash})
	t.text = append(t.text, w...)
	if 2*len(t.words) > len(t.slots) {
		t.grow()
	}
}

func (t *table) grow() {
	t.slots = make([]uint32, 2*len(t.slots))
	mask := uint32(len(t.slots) - 1)
	for k := range t.words {
		i := t.words[k].hash & mask
		for t.slots[i] != 0 {
			i = (i + 1) & mask
		}
		t.slots[i] = uint32(k + 1)
	}
}

func (t *table) count(data []byte) {
	for i := 0; i < len(data); {
		if isSpace(data[i]) {
			i++
			continue
		}
		start := i
		for i < len(data) && !isSpace(data[i]) {
			i++
		}
		t.add(data[start:i], 1)
	}
}

// entries returns all words with their counts, in the order in which they came.
func (t *table) entries() []entry {
	text := string(t.text)
	list := make([]entry, len(t.words))
	for i, w := range t.words {
		list[i] = entry{text[w.at : w.at+w.size], w.n}
	}
	return list
}
