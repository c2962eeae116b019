package function

// answer.go has answers for results that need no code of their own.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/master"
)

// MaxConcat is how long an answer of [Concat] may be, in bytes: the master holds
// all of it until it is complete.
const MaxConcat = 256 << 20

// Concat returns an answer that is one result after the other, in the order of
// the blocks. As JSON it is a string, or {"base64": string} when it is no text.
// It may be up to MaxConcat bytes long.
func Concat() master.Answer { return new(concat) }

type concat struct{ data []byte }

func (c *concat) Add(r sheaf.Result) error {
	if len(c.data)+len(r.Data) > MaxConcat {
		return fmt.Errorf("the answer would be over the limit of %d bytes that a master holds; take the results as they come, with Accept: application/x-ndjson", MaxConcat)
	}
	if len(c.data)+len(r.Data) > cap(c.data) {
		c.data = slices.Grow(c.data, max(len(r.Data), len(c.data))) // twice as much each time
	}
	c.data = append(c.data, r.Data...)
	return nil
}

func (c *concat) WriteText(w io.Writer) error {
	_, err := w.Write(c.data)
	return err
}

func (c *concat) WriteJSON(w io.Writer) error { return writeJSON(w, text(c.data)) }

// JSON returns a Merge for results that are JSON values of a T: the answer is
// merge(merge(first, second), third) and so on, in the order of the blocks, as
// JSON in one line. merge may change and return all, which is nobody else's. An
// input without blocks answers with T's zero. A result that is no T, and an
// error of merge, end the job.
func JSON[T any](merge func(all, next T) (T, error)) func() master.Answer {
	return func() master.Answer { return &merged[T]{merge: merge} }
}

type merged[T any] struct {
	merge func(all, next T) (T, error)
	all   T
	some  bool // there was a result
}

func (m *merged[T]) Add(r sheaf.Result) error {
	var next T
	if err := json.Unmarshal(r.Data, &next); err != nil {
		return fmt.Errorf("it is not the JSON that is expected: %w", err)
	}
	if !m.some {
		m.all, m.some = next, true
		return nil
	}
	all, err := m.merge(m.all, next)
	m.all = all
	return err
}

func (m *merged[T]) WriteText(w io.Writer) error { return writeJSON(w, m.all) }
func (m *merged[T]) WriteJSON(w io.Writer) error { return writeJSON(w, m.all) }

// line is a result as JSON, when the function does not say how.
func line(r sheaf.Result, _ bool) (json.RawMessage, error) {
	if json.Valid(r.Data) {
		var b bytes.Buffer
		err := json.Compact(&b, r.Data)
		return b.Bytes(), err
	}
	var b bytes.Buffer
	err := writeJSON(&b, text(r.Data))
	return bytes.TrimSuffix(b.Bytes(), []byte{'\n'}), err
}

// text is what stands for bytes in JSON.
func text(data []byte) any {
	if utf8.Valid(data) {
		return string(data)
	}
	return struct {
		Base64 []byte `json:"base64"`
	}{data}
}

// writeJSON writes v and a line feed, without the escapes that only HTML needs.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
