// Package wordcount is the job of the thesis: how often does each word occur.
//
// A word is a maximal run of bytes other than the six ASCII white-space
// characters (space, tab, line feed, vertical tab, form feed, carriage return).
// [Count] is the worker's part, on one block; [Counts] the master's, which
// merges the blocks' results. A word that a block's end cuts in two is put
// together again, so the answer is that of a sequential count whatever the
// blocks are.
//
// The package imports the standard library only.
package wordcount

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/sheaf-project/sheaf"
)

// A block's result is text: a line "word count" for each word, in the order in
// which they first occur, and before them up to two lines that begin with a
// space and tell what stands at the block's edges, where a word may have been
// cut:
//
//	" head WORD"   the block begins with WORD, without white space before it
//	" tail WORD"   the block ends with WORD, without white space after it
//	" whole WORD"  the block is WORD and nothing else; no bytes are no WORD
//
// Words at the edges are not counted in the other lines. A worker that leaves
// the edges out, because its blocks never cut words, may count all words.
const (
	headMark  = " head "
	tailMark  = " tail "
	wholeMark = " whole "
)

func isSpace(b byte) bool { return b == ' ' || b-'\t' < 5 }

// Count counts the words of one block. It is a worker.Func, and never fails.
func Count(_ context.Context, b sheaf.Block) ([]byte, error) {
	data := b.Data
	head := 0
	for head < len(data) && !isSpace(data[head]) {
		head++
	}
	if head == len(data) { // also of a block of no bytes, which ends no word
		return slices.Concat([]byte(wholeMark), data, []byte{'\n'}), nil
	}
	tail := len(data)
	for !isSpace(data[tail-1]) {
		tail--
	}
	t := newTable(tail - head)
	t.count(data[head:tail])
	out := make([]byte, 0, 64+head+len(data)-tail+len(t.text)+21*len(t.words))
	if head > 0 {
		out = append(append(append(out, headMark...), data[:head]...), '\n')
	}
	if tail < len(data) {
		out = append(append(append(out, tailMark...), data[tail:]...), '\n')
	}
	for i := range t.words {
		out = append(append(out, t.word(i)...), ' ')
		out = append(strconv.AppendInt(out, t.words[i].n, 10), '\n')
	}
	return out, nil
}

// blockCounts is a block's result, read; an edge that is not there is nil.
type blockCounts struct {
	head, tail, whole []byte
	total             int64 // of the counts
}

// errResult says that a result is not one of a word count.
var errResult = errors.New("it is not lines of a word and a count")

// errTotal says that counts are more than there can be.
var errTotal = errors.New("its counts add up to more than 63 bits hold")

// parse calls word for each counted word of a result, and returns its edges.
func parse(result []byte, word func(w []byte, n int64)) (b blockCounts, err error) {
	if len(result) > 0 && result[len(result)-1] != '\n' {
		return b, errResult // the last line has no end: it may have been cut
	}
	b.head, result = edge(result, headMark)
	b.tail, result = edge(result, tailMark)
	b.whole, result = edge(result, wholeMark)
	if b.whole != nil && (b.head != nil || b.tail != nil || len(result) > 0) {
		return b, errResult
	}
	for len(result) > 0 {
		at := 0
		for !isSpace(result[at]) { // the last byte is a line feed
			at++
		}
		if at == 0 || result[at] != ' ' {
			return b, errResult
		}
		end := at + 1 + bytes.IndexByte(result[at+1:], '\n')
		n, ok := number(result[at+1 : end])
		if !ok {
			return b, errResult
		}
		line := result[:end]
		result = result[end+1:]
		if b.total += n; b.total < 0 {
			return b, errTotal
		}
		word(line[:at], n)
	}
	return b, nil
}

// edge takes the line with the given mark from the front of a result. What is
// not such a line stays there, and is then refused if it is no other one.
func edge(result []byte, mark string) (word, rest []byte) {
	line, rest, _ := bytes.Cut(result, []byte{'\n'})
	word, ok := bytes.CutPrefix(line, []byte(mark))
	if !ok || slices.ContainsFunc(word, isSpace) {
		return nil, result
	}
	return word, rest
}

// number reads a positive decimal number of up to 18 digits.
func number(digits []byte) (int64, bool) {
	if len(digits) == 0 || len(digits) > 18 {
		return 0, false
	}
	var n int64
	for _, d := range digits {
		if d < '0' || d > '9' {
			return 0, false
		}
		n = 10*n + int64(d-'0')
	}
	return n, n > 0
}

// Counts is the answer: the counts of all words. The zero Counts is ready to
// use. It is not safe for concurrent use.
type Counts struct {
	t      *table
	open   []byte // a word that the end of the last block may have cut
	total  int64  // of the counts
	sorted []entry
}

type entry struct {
	word string
	n    int64
}

// Add merges the result of the next block, in block order. It refuses, by an
// error, what is not the result of a word count.
func (c *Counts) Add(r sheaf.Result) error {
	if c.t == nil {
		c.t = newTable(0)
	}
	b, err := parse(r.Data, c.t.add)
	if err != nil {
		return err
	}
	if c.total += b.total; c.total < 0 {
		return errTotal
	}
	if b.whole != nil {
		c.open = append(c.open, b.whole...)
		return nil
	}
	c.close(b.head)
	c.open = append(c.open[:0], b.tail...)
	return nil
}

// close counts the word that was cut, if there is one, together with its rest.
func (c *Counts) close(rest []byte) {
	c.open = append(c.open, rest...)
	if len(c.open) > 0 {
		c.t.add(c.open, 1)
	}
	c.open = c.open[:0]
}

// sort ends the merging: it puts the most frequent words first, and words of
// one count in the order of their bytes.
func (c *Counts) sort() []entry {
	if c.t == nil {
		c.t = newTable(0)
	}
	if c.sorted == nil {
		c.close(nil)
		c.sorted = c.t.entries()
		slices.SortFunc(c.sorted, func(a, b entry) int {
			return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.word, b.word))
		})
	}
	return c.sorted
}

// WriteText writes a line "word count" for each word, by count descending,
// then by the bytes of the word. No Add may follow.
func (c *Counts) WriteText(w io.Writer) error {
	out := bufio.NewWriterSize(w, 64<<10)
	for _, e := range c.sort() {
		line := append(append(out.AvailableBuffer(), e.word...), ' ')
		line = append(strconv.AppendInt(line, e.n, 10), '\n')
		if _, err := out.Write(line); err != nil {
			return err
		}
	}
	return out.Flush()
}

// WriteJSON writes one object {"word": count, ...} in the order of WriteText,
// and a line feed. Each byte of a word that is not UTF-8 becomes U+FFFD; words
// that are the same after that are counted together. No Add may follow.
func (c *Counts) WriteJSON(w io.Writer) error {
	out := bufio.NewWriterSize(w, 64<<10)
	before := "{"
	for _, e := range valid(c.sort()) {
		key, err := quote(e.word)
		if err != nil {
			return err
		}
		_, _ = out.WriteString(before) // the error stays, and comes with Flush
		_, _ = out.Write(key)
		_, _ = out.WriteString(": ")
		_, _ = out.Write(strconv.AppendInt(nil, e.n, 10))
		before = ", "
	}
	if before == "{" {
		_, _ = out.WriteString(before)
	}
	_, _ = out.WriteString("}\n")
	return out.Flush()
}

// valid returns entries with words that are UTF-8.
func valid(entries []entry) []entry {
	if !slices.ContainsFunc(entries, func(e entry) bool { return !utf8.ValidString(e.word) }) {
		return entries
	}
	t := newTable(0)
	for _, e := range entries {
		t.add([]byte(string([]rune(e.word))), e.n)
	}
	c := Counts{t: t}
	return c.sort()
}

// quote writes a word as a JSON string, without the escapes that only HTML
// needs.
func quote(word string) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(word); err != nil {
		return nil, fmt.Errorf("word %q: %w", word, err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte{'\n'}), nil
}

// Line returns the result of one block as JSON, for those who read results as
// they come: {"counts": {"word": count, ...}}. With mayCut set, the words at
// the block's edges, which the neighbouring blocks may continue, stand apart:
// "head", "tail", or "whole" for a block without white space.
func Line(r sheaf.Result, mayCut bool) (json.RawMessage, error) {
	var c Counts
	c.t = newTable(0)
	b, err := parse(r.Data, c.t.add)
	if err != nil {
		return nil, err
	}
	edges := [][]byte{b.head, b.tail, b.whole}
	if !mayCut {
		for _, w := range edges {
			if len(w) > 0 {
				c.t.add(w, 1)
			}
		}
		edges = [][]byte{nil, nil, nil}
	}
	var out bytes.Buffer
	out.WriteString(`{"counts": `)
	if err := c.WriteJSON(&out); err != nil {
		return nil, err
	}
	for i, name := range []string{"head", "tail", "whole"} {
		if len(edges[i]) == 0 {
			continue
		}
		word, err := quote(string([]rune(string(edges[i]))))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, `, "%s": %s`, name, word)
	}
	out.WriteString("}")
	return bytes.ReplaceAll(out.Bytes(), []byte{'\n'}, nil), nil
}
