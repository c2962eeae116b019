package http1

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
)

// maxInterim is how many 1xx answers may come before the answer.
const maxInterim = 5

// Answers reads the answers to requests on one connection, one after another.
// What Next returns, and all it holds, is good until Next is called again.
type Answers struct {
	r    *bufio.Reader
	head Head
	resp http.Response
	body body
	end  bool // the connection ends with this answer
}

// NewAnswers returns a reader of answers from r, which must buffer MaxHead
// bytes. Requests must not be HEAD or CONNECT, whose answers have other frames.
func NewAnswers(r *bufio.Reader) *Answers { return &Answers{r: r} }

// Next reads the head of the next answer; its Body reads the rest. Interim
// (1xx) answers are passed over. The Response has no Request, and its Body need
// not be closed. The error is io.EOF when nothing came.
func (a *Answers) Next() (*http.Response, error) {
	for range maxInterim {
		n, err := Wait(a.r)
		if err != nil {
			return nil, err
		}
		raw, _ := a.r.Peek(n)           // it is there
		err = a.head.Parse(string(raw)) // the one copy of it
		_, _ = a.r.Discard(n)           // so is this
		if err != nil {
			return nil, err
		}
		minor, code, ok := status(a.head.Start)
		if !ok || code == http.StatusSwitchingProtocols {
			return nil, fmt.Errorf("%w: status line %.64q", ErrMalformed, a.head.Start)
		}
		if code < 200 {
			continue
		}
		a.resp = http.Response{StatusCode: code, Status: a.head.Start[9:], ProtoMajor: 1, ProtoMinor: minor,
			Header: a.head.Header, ContentLength: a.head.Length, Body: &a.body}
		a.end = a.head.Close || minor == 0 && !a.head.KeepAlive
		a.body = body{r: a.r, left: a.head.Length}
		switch {
		case code == http.StatusNoContent || code == http.StatusNotModified:
			// A 204 that tells of a body is wrong, and may be followed by one.
			a.end = a.end || a.head.Chunked || code == http.StatusNoContent && a.head.Length > 0
			a.resp.ContentLength, a.body.left = 0, 0
		case a.head.Chunked && minor == 0:
			return nil, fmt.Errorf("%w: chunks in HTTP/1.0", ErrMalformed)
		case a.head.Chunked:
			a.body.chunks = httputil.NewChunkedReader(a.r)
		case a.head.Length < 0: // the end of the connection ends the body
			a.body.toEOF, a.end = true, true
		}
		a.resp.Close = a.end
		return &a.resp, nil
	}
	return nil, fmt.Errorf("%w: more than %d interim answers", ErrMalformed, maxInterim-1)
}

// Reusable says whether the connection may carry another request: the answer
// was read to its end, nothing follows it, and the server did not say that it
// closes.
func (a *Answers) Reusable() bool {
	return !a.end && a.body.ended() && a.r.Buffered() == 0
}

// status reads "HTTP/1.x NNN reason".
func status(line string) (minor, code int, ok bool) {
	if len(line) < 12 || line[:7] != "HTTP/1." || line[7] != '0' && line[7] != '1' || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return 0, 0, false
	}
	code, err := strconv.Atoi(line[9:12])
	return int(line[7] - '0'), code, err == nil && code >= 100 && line[9] != '+' && line[9] != '-'
}

// body is the body of an answer: of a length, in chunks, or to the end of the
// connection.
type body struct {
	r      *bufio.Reader
	left   int64
	chunks io.Reader
	toEOF  bool
	done   bool // of chunks: the last one and the trailer were read
}

func (b *body) ended() bool {
	if b.chunks != nil {
		return b.done
	}
	return !b.toEOF && b.left == 0
}

func (b *body) Read(p []byte) (int, error) {
	switch {
	case b.done:
		return 0, io.EOF
	case b.chunks != nil:
		n, err := b.chunks.Read(p)
		if err == io.EOF {
			if err = b.trailer(); err == nil {
				b.done = true
				err = io.EOF
			}
		}
		return n, err
	case b.toEOF:
		return b.r.Read(p)
	case b.left == 0:
		return 0, io.EOF
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	switch {
	case err == io.EOF && b.left > 0:
		err = io.ErrUnexpectedEOF
	case err == nil && b.left == 0:
		err = io.EOF
	}
	return n, err
}

func (b *body) Close() error { return nil }

// trailer reads over what may follow the last chunk, to the blank line.
func (b *body) trailer() error {
	for size := 0; size < MaxHead; {
		line, err := b.r.ReadSlice('\n')
		switch {
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case string(line) == "\r\n":
			return nil
		}
		field, ok := strings.CutSuffix(string(line), "\r\n")
		if key, value, colon := strings.Cut(field, ":"); !ok || !colon || !token(key) || !clean(value) {
			return ErrMalformed
		}
		size += len(line)
	}
	return ErrHeadTooLong
}
