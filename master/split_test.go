package master_test

import (
	"bufio"
	"errors"
	"io"
	"iter"
	"net/http"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/master"
)

// scanned splits as many would: by a scanner, whose memory is used again for
// the next line, and whose error is forgotten.
func scanned(in io.Reader, _ int) iter.Seq2[sheaf.Block, error] {
	return func(yield func(sheaf.Block, error) bool) {
		s := bufio.NewScanner(in)
		for s.Scan() {
			if !yield(sheaf.Block{Data: append(s.Bytes(), '\n')}, nil) {
				return
			}
		}
	}
}

// A job with a Split of its own is as right as one without.
func TestOwnSplit(t *testing.T) {
	s := three(t, func(h *master.Handler) { h.Job.Split = scanned })
	in := thesisText()
	for range 3 {
		if a := s.do(t, "", in); a.status != http.StatusOK || a.body != want(in) {
			t.Fatalf("answer is %d %q", a.status, a.body)
		}
	}
	lines := s.do(t, "", in, "Accept: application/x-ndjson")
	if n := strings.Count(lines.body, "\n"); n != 100 || !strings.Contains(lines.body, `"done":true`) || strings.Count(lines.body, `"offset":0,`) != 1 {
		t.Errorf("%d lines of 99 blocks and a summary: %.300s", n, lines.body)
	}
	refused(t, s.do(t, "?split=csv", in), http.StatusUnprocessableEntity, "split_is_fixed", "leave split out")
	s.works(t)
}

// What an own Split gets wrong is an error, and never an answer that lacks a
// part of the input.
func TestOwnSplitFails(t *testing.T) {
	broken := func(after int, end func(yield func(sheaf.Block, error) bool)) func(io.Reader, int) iter.Seq2[sheaf.Block, error] {
		return func(in io.Reader, _ int) iter.Seq2[sheaf.Block, error] {
			return func(yield func(sheaf.Block, error) bool) {
				buf := make([]byte, 10)
				for range after {
					if _, err := io.ReadFull(in, buf); err != nil || !yield(sheaf.Block{Data: buf}, nil) {
						return
					}
				}
				end(yield)
			}
		}
	}
	in := thesisText()
	for _, c := range []struct {
		name   string
		split  func(io.Reader, int) iter.Seq2[sheaf.Block, error]
		in     string
		status int
		code   string
		says   string
	}{
		{"an error", broken(3, func(yield func(sheaf.Block, error) bool) { yield(sheaf.Block{}, errors.New("no line I know")) }),
			in, 422, "malformed_input", "the function cannot split the input: no line I know"},
		{"a panic", broken(3, func(func(sheaf.Block, error) bool) { panic("oh") }), in, 500, "job_panicked", "panicked"},
		{"an early end", broken(3, func(func(sheaf.Block, error) bool) {}), in, 422, "malformed_input", "ended after 30 bytes of blocks, before the input did"},
		{"a line that the scanner cannot take", scanned, in + strings.Repeat("x", 100_000) + "\n" + in, 422, "malformed_input", "before the input did"},
		{"a block over the limit", broken(1, func(yield func(sheaf.Block, error) bool) { yield(sheaf.Block{Data: make([]byte, 1<<10+1)}, nil) }),
			in, 422, "record_too_long", "a block of 1025 bytes at byte 10, over the limit of 1024"},
		{"too many blocks", broken(200, nil), in, 422, "too_many_blocks", "more than 100 blocks"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := three(t, func(h *master.Handler) { h.Job.Split, h.MaxBlock, h.MaxBlocks = c.split, 1<<10, 100 })
			refused(t, s.do(t, "", c.in), c.status, c.code, c.says)
		})
	}
	// An upload that is cut is the client's failure, though a scanner forgets it.
	s := three(t, func(h *master.Handler) { h.Job.Split = scanned })
	c := s.dial(t, "POST / HTTP/1.1\r\nHost: m\r\nContent-Length: 1000\r\n\r\na b\nc d\n")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	refused(t, receive(t, c), http.StatusBadRequest, "truncated_upload")
	s.works(t)
}
