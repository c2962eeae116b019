// Package http1 reads the part of HTTP/1.1 that a block and its result need:
// strict, bounded and with few allocations. What it does not understand it
// refuses; it never guesses. A client and a server are built on it that speak
// plain HTTP with anybody, at a third of net/http's cost a call.
//
// It knows nothing of blocks or sheaf, and imports the standard library only.
package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
)

// MaxHead is how long a head may be, in bytes; readers must buffer as much.
const MaxHead = 16 << 10

// Errors of what came.
var (
	// ErrHeadTooLong comes when a head is longer than the reader's buffer.
	ErrHeadTooLong = errors.New("head of the message is too long")
	// ErrMalformed comes when a head is not HTTP/1, or is ambiguous.
	ErrMalformed = errors.New("malformed HTTP message")
)

// A Head is the start line and the header fields of a message. It is meant to
// be used again: what one Parse made is good until the next.
type Head struct {
	Start  string // the start line
	Header http.Header
	// Length is what Content-Length says; -1 without one.
	Length int64
	// Chunked says that Transfer-Encoding is chunked and nothing else.
	Chunked bool
	// Close and KeepAlive say that Connection holds such an option.
	Close, KeepAlive bool

	values []string // what Header's slices are parts of
}

// Complete returns the length of the head that b begins with, or 0 when it is
// not whole.
func Complete(b []byte) int {
	if i := bytes.Index(b, []byte("\r\n\r\n")); i >= 0 {
		return i + 4
	}
	return 0
}

// Wait waits until a whole head is in r's buffer, and returns its length. It
// returns io.EOF when nothing came, io.ErrUnexpectedEOF when a part did,
// ErrMalformed when a line ends otherwise than with carriage return and line
// feed, and ErrHeadTooLong when the buffer is full. Nothing is taken from r.
func Wait(r *bufio.Reader) (int, error) {
	seen := 0
	for {
		b, _ := r.Peek(r.Buffered()) // cannot fail: it is there
		from := max(0, seen-3)
		if n := Complete(b[from:]); n > 0 {
			return from + n, nil
		}
		for i := seen; i < len(b); i++ {
			if b[i] == '\n' && (i == 0 || b[i-1] != '\r') {
				return 0, ErrMalformed // some take that for the head's end, which would not come
			}
		}
		if seen = len(b); seen >= min(r.Size(), MaxHead) {
			return 0, ErrHeadTooLong
		}
		if _, err := r.Peek(seen + 1); err != nil {
			if err == io.EOF && r.Buffered() > 0 {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
	}
}

// Parse parses a head, with the blank line at its end. The strings in h are
// parts of text. The error is ErrMalformed.
func (h *Head) Parse(text string) error {
	if h.Header == nil {
		h.Header = make(http.Header, 8)
	}
	clear(h.Header)
	h.values = h.values[:0]
	h.Length, h.Chunked, h.Close, h.KeepAlive = -1, false, false, false
	start, rest, ok := strings.Cut(text, "\r\n")
	if !ok || !clean(start) {
		return ErrMalformed
	}
	h.Start = start
	for {
		line, more, ok := strings.Cut(rest, "\r\n")
		if !ok {
			return ErrMalformed
		}
		if line == "" {
			if more != "" {
				return ErrMalformed
			}
			return nil
		}
		rest = more
		key, value, ok := strings.Cut(line, ":")
		if !ok || !token(key) || !clean(value) {
			return ErrMalformed
		}
		if err := h.add(textproto.CanonicalMIMEHeaderKey(key), strings.Trim(value, " \t")); err != nil {
			return err
		}
	}
}

// add takes one field over, and what it says of the message's frame.
func (h *Head) add(key, value string) error {
	if old := h.Header[key]; old != nil {
		h.Header[key] = append(old, value) // has no room, so it moves elsewhere
	} else {
		h.values = append(h.values, value)
		n := len(h.values)
		h.Header[key] = h.values[n-1 : n : n]
	}
	switch key {
	case "Content-Length":
		if h.Length >= 0 || len(value) == 0 || len(value) > 18 {
			return ErrMalformed
		}
		for i := range len(value) {
			if value[i] < '0' || value[i] > '9' {
				return ErrMalformed
			}
		}
		h.Length, _ = strconv.ParseInt(value, 10, 64) // cannot fail: 18 digits
	case "Transfer-Encoding":
		if h.Chunked || !strings.EqualFold(value, "chunked") {
			return ErrMalformed
		}
		h.Chunked = true
	case "Connection":
		for option := range strings.SplitSeq(value, ",") {
			switch option = strings.Trim(option, " \t"); {
			case strings.EqualFold(option, "close"):
				h.Close = true
			case strings.EqualFold(option, "keep-alive"):
				h.KeepAlive = true
			}
		}
	}
	if h.Chunked && h.Length >= 0 {
		return ErrMalformed
	}
	return nil
}

// token says whether s may be the name of a header field.
func token(s string) bool {
	for i := range len(s) {
		if !tokens[s[i]] {
			return false
		}
	}
	return s != ""
}

var tokens = func() (t [256]bool) {
	for _, c := range []byte("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		t[c] = true
	}
	return t
}()

// clean says whether s holds no control characters but tabs: no line can hide
// in it, whatever a reader takes for the end of one.
func clean(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
