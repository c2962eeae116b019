package sheaf

// split.go cuts an input into blocks of whole records.

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"
)

const (
	// DefaultMaxRecord is the longest record, in bytes, that a [Splitter]
	// with MaxRecord 0 takes when its Size is smaller: 16 MiB.
	DefaultMaxRecord = 16 << 20

	// readSize is what a splitter reads ahead of the block it fills.
	readSize = 64 << 10
)

// Splits lists what [Splitter.By] may be.
func Splits() []string { return []string{"lines", "bytes", "records", "csv", "json"} }

// A Splitter cuts an input into blocks of whole records, each block as many as
// fit into Size bytes. A record longer than Size makes a block of its own.
// A block is never empty, and an empty input makes no block.
//
// The blocks concatenated are the input, byte for byte, with one exception: of
// a JSON array the elements remain, each on a line of its own.
//
// It follows Algorithm 1 of the thesis (section 5.2, "whole lines up to the
// block size"), without the cap on the number of blocks that made it lose data.
type Splitter struct {
	// By says what a record is:
	//
	//	lines    a line with its line feed; "" means lines
	//	bytes    a byte, so blocks are of exactly Size, the last one shorter
	//	records  up to and with Delimiter
	//	csv      a line in the sense of RFC 4180: a quoted field may hold line feeds
	//	json     an element of an array at the top level, or else a line of JSON
	//	         values; a value may span lines. A block is newline-delimited JSON.
	By string
	// Size is the block size in bytes, at least 1.
	Size int
	// MaxRecord is the longest record in bytes. 0 means DefaultMaxRecord, or
	// Size if that is more. A longer one ends the split with a [*RecordError].
	MaxRecord int
	// MaxBlocks is how many blocks an input may make; one more ends the split
	// with ErrTooManyBlocks. 0 means any number.
	MaxBlocks int
	// Delimiter ends a record when By is "records" (1 to 16 bytes, "" means a
	// line feed), and separates fields when By is "csv" (1 byte, "" means a
	// comma). It is not used otherwise.
	Delimiter string
}

// Validate says what in s cannot be used.
func (s Splitter) Validate() error {
	switch {
	case s.By != "" && !slices.Contains(Splits(), s.By):
		return fmt.Errorf("split %q is not known; known are %s", s.By, strings.Join(Splits(), ", "))
	case s.Size < 1:
		return fmt.Errorf("block size %d is below 1 byte", s.Size)
	case s.MaxRecord < 0 || s.MaxBlocks < 0:
		return errors.New("a limit of a split is below 0")
	case s.By == "records" && len(s.Delimiter) > 16:
		return fmt.Errorf("delimiter of %d bytes is over the limit of 16", len(s.Delimiter))
	case s.By == "csv" && (len(s.Delimiter) > 1 || s.Delimiter == `"` || s.Delimiter == "\n"):
		return fmt.Errorf("field separator %q is not one byte, or is a quote or a line feed", s.Delimiter)
	}
	return nil
}

// SplitLines splits r into blocks of whole lines. See [Splitter].
func SplitLines(r io.Reader, size int) iter.Seq2[Block, error] {
	return Splitter{By: "lines", Size: size}.Split(r)
}

// SplitBytes splits r into blocks of exactly size bytes, the last one shorter.
func SplitBytes(r io.Reader, size int) iter.Seq2[Block, error] {
	return Splitter{By: "bytes", Size: size}.Split(r)
}

// SplitRecords splits r into blocks of whole records that end with delimiter.
func SplitRecords(r io.Reader, size int, delimiter string) iter.Seq2[Block, error] {
	return Splitter{By: "records", Size: size, Delimiter: delimiter}.Split(r)
}

// SplitCSV splits r into blocks of whole CSV records. A header line is a
// record like any other.
func SplitCSV(r io.Reader, size int) iter.Seq2[Block, error] {
	return Splitter{By: "csv", Size: size}.Split(r)
}

// SplitJSON splits r, a JSON array or newline-delimited JSON, into blocks of
// whole values, one a line.
func SplitJSON(r io.Reader, size int) iter.Seq2[Block, error] {
	return Splitter{By: "json", Size: size}.Split(r)
}

// Split yields the blocks of r, each as soon as it is full. An error ends the
// iteration: what Validate says, what reading r met (wrapped, with the byte at
// which it came), a [*RecordError], or ErrTooManyBlocks. Split does not close r.
func (s Splitter) Split(r io.Reader) iter.Seq2[Block, error] {
	return func(yield func(Block, error) bool) {
		if err := s.Validate(); err != nil {
			yield(Block{}, err)
			return
		}
		c := cutter{in: bufio.NewReaderSize(r, readSize), size: s.Size, maxBlocks: s.MaxBlocks, yield: yield}
		c.maxRecord = max(s.MaxRecord, s.Size)
		if s.MaxRecord == 0 {
			c.maxRecord = max(DefaultMaxRecord, s.Size)
		}
		var err error
		switch s.By {
		case "", "lines":
			err = c.records(&delimited{delim: []byte{'\n'}})
		case "bytes":
			err = c.bytes()
		case "records":
			d := []byte(s.Delimiter)
			if len(d) == 0 {
				d = []byte{'\n'}
			}
			err = c.records(newDelimited(d))
		case "csv":
			sep := byte(',')
			if s.Delimiter != "" {
				sep = s.Delimiter[0]
			}
			err = c.records(&csvRecord{sep: sep, fieldStart: true})
		case "json":
			err = c.json()
		}
		if err != nil && !errors.Is(err, errLeft) {
			yield(Block{}, err)
		}
	}
}

// errLeft says that the loop over the blocks was left.
var errLeft = errors.New("loop was left")

// A cutter reads an input and yields its blocks.
type cutter struct {
	in        *bufio.Reader
	size      int
	maxRecord int
	maxBlocks int
	yield     func(Block, error) bool

	index  int
	offset int64 // of the next block
	full   bool  // a block was filled to its size: allocate the next at once
}

// emit yields data, which begins at c.offset and stands for n bytes of input.
func (c *cutter) emit(data []byte, n int64) error {
	if c.maxBlocks > 0 && c.index >= c.maxBlocks {
		return fmt.Errorf("%w: the input makes more than %d at a block size of %d bytes; take larger blocks",
			ErrTooManyBlocks, c.maxBlocks, c.size)
	}
	b := Block{Index: c.index, Offset: c.offset, Data: data}
	c.index++
	c.offset += n
	if !c.yield(b, nil) {
		return errLeft
	}
	return nil
}

// fill reads into buf until it holds size bytes, and says whether the input
// ended there. A buffer grows as it fills, so that a small input needs little.
func (c *cutter) fill(buf []byte) (_ []byte, eof bool, err error) {
	for len(buf) < c.size {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, min(c.size-len(buf), max(readSize, len(buf))))
		}
		n, err := c.in.Read(buf[len(buf):min(cap(buf), c.size)])
		buf = buf[:len(buf)+n]
		if err != nil {
			return c.ended(buf, err)
		}
	}
	c.full = true
	if _, err := c.in.Peek(1); err != nil {
		return c.ended(buf, err)
	}
	return buf, false, nil
}

func (c *cutter) ended(buf []byte, err error) ([]byte, bool, error) {
	if err == io.EOF {
		return buf, true, nil
	}
	return nil, false, c.readError(int64(len(buf)), err)
}

func (c *cutter) readError(held int64, err error) error {
	return fmt.Errorf("read input at byte %d: %w", c.offset+held, err)
}

// next is a buffer for the next block that begins with carry.
func (c *cutter) next(carry []byte) []byte {
	n := min(c.size, readSize)
	if c.full {
		n = c.size
	}
	return append(make([]byte, 0, max(n, len(carry))), carry...)
}

// bytes yields blocks of exactly c.size bytes.
func (c *cutter) bytes() error {
	for {
		buf, eof, err := c.fill(c.next(nil))
		if err != nil {
			return err
		}
		if len(buf) > 0 {
			if err := c.emit(buf, int64(len(buf))); err != nil {
				return err
			}
		}
		if eof {
			return nil
		}
	}
}

// A record scanner finds where records end. It is told the input piece by
// piece, and starts anew after each end that it reports.
type scanner interface {
	// scan returns how many bytes of p belong to the record at hand, and
	// whether it ends with them; if it does not, all of p belongs to it.
	scan(p []byte) (n int, end bool, err error)
	// last returns the end of the last record that ends in p, which begins
	// where a record begins, or 0; the scanner is then in the midst of the
	// record after it.
	last(p []byte) (end int, err error)
	// eof says what is wrong with an input that ends here.
	eof() error
}

// lastByScan is last for scanners that must look at each record.
func lastByScan(s scanner, p []byte) (int, error) {
	end := 0
	for at := 0; at < len(p); {
		n, ended, err := s.scan(p[at:])
		if err != nil {
			return end, err
		}
		at += n
		if ended {
			end = at
		}
	}
	return end, nil
}

// records yields blocks of whole records: as many as fit into c.size, or one
// that is longer.
func (c *cutter) records(s scanner) error {
	malformed := func(at int, err error) error {
		return &RecordError{Offset: c.offset + int64(at), What: err.Error(), Err: ErrMalformed}
	}
	var carry []byte // the start of a record that did not fit into the last block
	for {
		buf, eof, err := c.fill(c.next(carry))
		if err != nil {
			return err
		}
		end, err := s.last(buf)
		if err != nil {
			return malformed(end, err)
		}
		if eof {
			if err := s.eof(); err != nil {
				return malformed(end, err)
			}
			if len(buf) == 0 {
				return nil
			}
			return c.emit(buf, int64(len(buf)))
		}
		if end == 0 {
			if buf, err = c.extend(buf, s); err != nil {
				return err
			}
			end = len(buf)
		}
		carry = append(carry[:0], buf[end:]...)
		if err := c.emit(buf[:end:end], int64(end)); err != nil {
			return err
		}
	}
}

// extend reads on until the one record in buf ends.
func (c *cutter) extend(buf []byte, s scanner) ([]byte, error) {
	for {
		p, err := c.in.Peek(max(1, c.in.Buffered()))
		if err == io.EOF {
			if err := s.eof(); err != nil {
				return nil, &RecordError{Offset: c.offset, What: err.Error(), Err: ErrMalformed}
			}
			return buf, nil
		}
		if err != nil {
			return nil, c.readError(int64(len(buf)), err)
		}
		n, end, err := s.scan(p)
		if err != nil {
			return nil, &RecordError{Offset: c.offset, What: err.Error(), Err: ErrMalformed}
		}
		if len(buf)+n > c.maxRecord {
			return nil, &RecordError{Offset: c.offset, Limit: c.maxRecord, Err: ErrRecordTooLong}
		}
		buf = append(buf, p[:n]...)
		if _, err := c.in.Discard(n); err != nil {
			return nil, c.readError(int64(len(buf)), err)
		}
		if end {
			return buf, nil
		}
	}
}

// delimited scans records that end with a delimiter, by the automaton of
// Knuth, Morris and Pratt: a delimiter may lie across two pieces of input, and
// one that overlaps itself ends where reading from the front finds it first.
type delimited struct {
	delim   []byte
	fail    []int // fail[i]: length of the longest border of delim[:i]; nil for one byte
	matched int
}

func newDelimited(delim []byte) *delimited {
	d := &delimited{delim: delim}
	if len(delim) == 1 {
		return d
	}
	d.fail = make([]int, len(delim)+1)
	for i, k := 1, 0; i < len(delim); i++ {
		for k > 0 && delim[i] != delim[k] {
			k = d.fail[k]
		}
		if delim[i] == delim[k] {
			k++
		}
		d.fail[i+1] = k
	}
	return d
}

func (d *delimited) scan(p []byte) (int, bool, error) {
	if d.fail == nil {
		if i := bytes.IndexByte(p, d.delim[0]); i >= 0 {
			return i + 1, true, nil
		}
		return len(p), false, nil
	}
	for i := 0; i < len(p); i++ {
		if d.matched == 0 { // skip at memory speed to where a delimiter may begin
			j := bytes.IndexByte(p[i:], d.delim[0])
			if j < 0 {
				return len(p), false, nil
			}
			i += j
		}
		for d.matched > 0 && p[i] != d.delim[d.matched] {
			d.matched = d.fail[d.matched]
		}
		if p[i] == d.delim[d.matched] {
			d.matched++
		}
		if d.matched == len(d.delim) {
			d.matched = 0
			return i + 1, true, nil
		}
	}
	return len(p), false, nil
}

func (d *delimited) last(p []byte) (int, error) {
	if d.fail == nil {
		return bytes.LastIndexByte(p, d.delim[0]) + 1, nil
	}
	d.matched = 0
	return lastByScan(d, p)
}

func (d *delimited) eof() error { return nil }

// csvRecord scans records of RFC 4180: a quote opens a quoted field only at
// the field's start, and two quotes inside one stand for a quote.
type csvRecord struct {
	sep        byte
	fieldStart bool
	quoted     bool // inside a quoted field
	quote      bool // the last byte was a quote inside a quoted field
}

func (c *csvRecord) scan(p []byte) (int, bool, error) {
	eol := -1 // the first line feed at or after i, once it is looked for
	for i := 0; i < len(p); {
		switch {
		case c.quote: // a second quote is data; anything else ends the quoted part
			c.quote = false
			if p[i] == '"' {
				i++
			} else {
				c.quoted = false
			}
		case c.quoted:
			j := bytes.IndexByte(p[i:], '"')
			if j < 0 {
				return len(p), false, nil
			}
			i += j + 1
			c.quote = true
		case c.fieldStart && p[i] == '"':
			c.fieldStart, c.quoted = false, true
			i++
		default:
			// Look for the line's end, once for the whole line; a quote before
			// it matters only if it stands at the start of a field.
			if eol < i {
				if eol = bytes.IndexByte(p[i:], '\n'); eol < 0 {
					eol = len(p)
				} else {
					eol += i
				}
			}
			line := p[i:eol]
			q := bytes.IndexByte(line, '"')
			if q > 0 {
				c.fieldStart = line[q-1] == c.sep
				i += q
				if !c.fieldStart {
					i++ // a quote inside a plain field is data
				}
				continue
			}
			if q == 0 { // not at the start of a field
				i++
				continue
			}
			if eol < len(p) {
				c.fieldStart = true
				return eol + 1, true, nil
			}
			c.fieldStart = line[len(line)-1] == c.sep
			return len(p), false, nil
		}
	}
	return len(p), false, nil
}

func (c *csvRecord) last(p []byte) (int, error) {
	*c = csvRecord{sep: c.sep, fieldStart: true}
	return lastByScan(c, p)
}

func (c *csvRecord) eof() error {
	if c.quoted && !c.quote {
		return errors.New("a quoted field of the CSV record that begins here has no closing quote")
	}
	return nil
}

// ParseSize reads a number of bytes as people write it: "300", "64KiB", "1MiB",
// "2GiB", "10kB", "1MB", "5B". The error says what was wrong; it wraps
// [strconv.ErrRange] when the number is one but does not fit.
func ParseSize(s string) (int, error) {
	digits := strings.TrimRight(s, "BKMGTikbmgt")
	unit := s[len(digits):]
	scale, ok := map[string]int64{
		"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
		"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
		"K": 1 << 10, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30,
	}[unit]
	n, err := strconv.ParseInt(digits, 10, 64)
	if errors.Is(err, strconv.ErrRange) && ok {
		return 0, fmt.Errorf("size %q: %w", s, strconv.ErrRange)
	}
	if err != nil || !ok {
		return 0, fmt.Errorf("size %q is not a whole number of bytes, such as 300, 64KiB or 1MiB", s)
	}
	if n > math.MaxInt64/scale || n < math.MinInt64/scale || n*scale > math.MaxInt {
		return 0, fmt.Errorf("size %q: %w", s, strconv.ErrRange)
	}
	return int(n * scale), nil
}
