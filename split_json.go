package sheaf

// split_json.go cuts JSON: newline-delimited values, or the elements of one
// array. It looks at strings, brackets and commas only; whether a number or a
// word is one is for whoever reads the values.

import (
	"bytes"
	"errors"
	"io"
)

// maxJSONDepth bounds the nesting of a value, as encoding/json does.
const maxJSONDepth = 10_000

// jsonValue follows the structure of JSON values byte by byte.
type jsonValue struct {
	open    []byte // brackets that are open, outermost first
	str     bool   // inside a string
	escaped bool   // after a backslash inside a string
}

// step takes one byte. It says whether the byte belongs to the inside of a
// value (a string, an array, an object) rather than to the top level.
func (v *jsonValue) step(b byte) (inside bool, err error) {
	if v.str {
		switch {
		case v.escaped:
			v.escaped = false
		case b == '\\':
			v.escaped = true
		case b == '"':
			v.str = false
		case b == '\n':
			return true, errors.New("a JSON string has no closing quote on its line")
		}
		return true, nil
	}
	switch b {
	case '"':
		v.str = true
		return true, nil
	case '{', '[':
		if len(v.open) == maxJSONDepth {
			return true, errors.New("JSON is nested deeper than 10000 levels")
		}
		v.open = append(v.open, b)
		return true, nil
	case '}', ']':
		want := byte('{')
		if b == ']' {
			want = '['
		}
		n := len(v.open)
		if n == 0 {
			return false, errors.New("JSON has a closing bracket that nothing opened")
		}
		if v.open[n-1] != want {
			return true, errors.New("JSON has a closing bracket of the wrong kind")
		}
		v.open = v.open[:n-1]
		return true, nil
	}
	return len(v.open) > 0, nil
}

func (v *jsonValue) eof() error {
	if v.str || len(v.open) > 0 {
		return errors.New("JSON ends in the midst of the value that begins here")
	}
	return nil
}

// jsonLine scans records of newline-delimited JSON; a value may span lines.
type jsonLine struct{ jsonValue }

func (l *jsonLine) scan(p []byte) (int, bool, error) {
	for i := 0; i < len(p); i++ {
		i += l.skip(p[i:])
		if i == len(p) {
			break
		}
		inside, err := l.step(p[i])
		if err != nil {
			return i, false, err
		}
		if p[i] == '\n' && !inside {
			return i + 1, true, nil
		}
	}
	return len(p), false, nil
}

// skip returns how many bytes at the beginning of p change nothing: step need
// not see them.
func (v *jsonValue) skip(p []byte) int {
	if v.escaped {
		return 0
	}
	stops := &stopsOutside
	if v.str {
		stops = &stopsInString
	}
	for i, b := range p {
		if stops[b] {
			return i
		}
	}
	return len(p)
}

// The bytes that change the state of a jsonValue, inside a string and outside;
// neither is ever written to.
var (
	stopsInString = [256]bool{'"': true, '\\': true, '\n': true}
	stopsOutside  = [256]bool{'"': true, '{': true, '}': true, '[': true, ']': true, '\n': true, '\r': true}
)

func (l *jsonLine) last(p []byte) (int, error) {
	l.open, l.str, l.escaped = l.open[:0], false, false
	return lastByScan(l, p)
}

// json yields the elements of an array, or else lines of values. An input whose
// first value is an array is that array; nothing may follow it.
func (c *cutter) json() error {
	// Read no further than to the first value: what is here may be all that a
	// slow input has for now.
	for want := 1; want <= readSize; {
		head, err := c.in.Peek(max(want, c.in.Buffered()))
		trimmed := bytes.TrimPrefix(head, []byte("\xef\xbb\xbf")) // a byte-order mark
		trimmed = bytes.TrimLeft(trimmed, " \t\r\n")
		switch {
		case len(trimmed) > 0 && trimmed[0] == '[':
			return c.jsonArray(len(head) - len(trimmed))
		case len(trimmed) > 0 && (len(head) >= 3 || trimmed[0] != '\xef'), err == io.EOF:
			return c.records(&jsonLine{})
		case err != nil:
			return c.readError(int64(len(head)), err)
		}
		want = len(head) + 1
	}
	return c.records(&jsonLine{})
}

// jsonArray yields the elements of the array that begins at byte skip, each as
// it stands but with line breaks between its tokens made spaces, on a line of
// its own.
func (c *cutter) jsonArray(skip int) error {
	if _, err := c.in.Discard(skip + 1); err != nil {
		return c.readError(int64(skip), err)
	}
	var (
		pos     = int64(skip) + 1 // in the input, of the next byte
		v       jsonValue
		buf     []byte // whole elements, then the one at hand
		end     int    // of the whole elements in buf
		start   int64  // in the input, of the block
		element int64  // in the input, of the element at hand
		gap     bool   // space follows the element at hand
		some    bool   // an element came before
	)
	fail := func(at int64, what string) error {
		return &RecordError{Offset: at, What: what, Err: ErrMalformed}
	}
	flush := func() error { // yields buf[:end] and keeps the element after it
		rest := append([]byte(nil), buf[end:]...)
		c.offset = start
		err := c.emit(buf[:end:end], 0)
		buf, end, start = rest, 0, element
		return err
	}
	tooLong := func() error {
		if len(buf)-end <= c.maxRecord {
			return nil
		}
		return &RecordError{Offset: element, Limit: c.maxRecord, Err: ErrRecordTooLong}
	}
	for {
		if len(v.open) > 0 || v.str { // what changes nothing is taken at once
			p, _ := c.in.Peek(c.in.Buffered()) // it is there
			if n := v.skip(p); n > 0 {
				buf = append(buf, p[:n]...)
				pos += int64(n)
				if _, err := c.in.Discard(n); err != nil {
					return c.readError(pos, err)
				}
				if err := tooLong(); err != nil {
					return err
				}
			}
		}
		b, err := c.in.ReadByte()
		if err == io.EOF {
			return fail(pos, "the JSON array has no end")
		}
		if err != nil {
			c.offset = 0
			return c.readError(pos, err)
		}
		at := pos
		pos++
		top := len(v.open) == 0 && !v.str
		if top && (b == ',' || b == ']') {
			gap = false
			if len(buf) > end { // an element ends here
				buf = append(buf, '\n')
				if end > 0 && len(buf) > c.size {
					if err := flush(); err != nil {
						return err
					}
				}
				end, some = len(buf), true
			} else if b == ',' || some {
				return fail(at, "the JSON array lacks an element here")
			}
			if b == ',' {
				continue
			}
			break
		}
		space := b == ' ' || b == '\t' || b == '\r' || b == '\n'
		if _, err := v.step(b); err != nil {
			return fail(at, err.Error())
		}
		if top && space {
			gap = len(buf) > end
			continue
		}
		if gap {
			return fail(at, "the JSON array lacks a comma before this")
		}
		if len(buf) == end {
			element = at
			if end == 0 {
				start = at
			}
		}
		if space && !v.str {
			b = ' '
		}
		buf = append(buf, b)
		if err := tooLong(); err != nil {
			return err
		}
	}
	for {
		b, err := c.in.ReadByte()
		if err == io.EOF {
			break
		}
		if err != nil {
			c.offset = 0
			return c.readError(pos, err)
		}
		if b != ' ' && b != '\t' && b != '\r' && b != '\n' {
			return fail(pos, "something follows the end of the JSON array")
		}
		pos++
	}
	if end == 0 {
		return nil
	}
	return flush()
}
