package http1_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/sheaf-project/sheaf/internal/http1"
)

func answers(text string) *http1.Answers {
	return http1.NewAnswers(bufio.NewReaderSize(strings.NewReader(text), http1.MaxHead))
}

func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		name, text string
		status     int
		body       string
		reusable   bool
	}{
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, "abc", true},
		{"no reason, no body", "HTTP/1.1 404\r\nContent-Length: 0\r\n\r\n", 404, "", true},
		{"an empty reason", "HTTP/1.1 503 \r\ncontent-length:0\r\n\r\n", 503, "", true},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n", 200, "abc", true},
		{"chunks and a trailer", "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0\r\nX: y\r\nZ: w\r\n\r\n", 200, "a", true},
		{"to the end", "HTTP/1.1 200 OK\r\n\r\nabc", 200, "abc", false},
		{"closes", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: foo, Close\r\n\r\na", 200, "a", false},
		{"1.0", "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", 200, "a", false},
		{"1.0, kept", "HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\na", 200, "a", true},
		{"more than was asked for", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab", 200, "a", false},
		{"interim", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", 200, "a", true},
		{"no content", "HTTP/1.1 204 No Content\r\n\r\n", 204, "", true},
		{"no content, but a length", "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, "", false},
		{"no content, but chunks", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", 204, "", false},
		{"not modified", "HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", 304, "", true},
		{"value with spaces", "HTTP/1.1 200 OK\r\nX:\t a b \r\nContent-Length: 0\r\n\r\n", 200, "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for name, r := range map[string]io.Reader{"at once": strings.NewReader(c.text), "byte by byte": iotest.OneByteReader(strings.NewReader(c.text))} {
				a := http1.NewAnswers(bufio.NewReaderSize(r, http1.MaxHead))
				resp, err := a.Next()
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				body, err := io.ReadAll(resp.Body)
				if err != nil || string(body) != c.body || resp.StatusCode != c.status {
					t.Errorf("%s: got %d %q (%v), want %d %q", name, resp.StatusCode, body, err, c.status, c.body)
				}
				// Byte by byte, what follows has not come yet.
				if got := a.Reusable(); got != c.reusable && (name == "at once" || c.name != "more than was asked for") {
					t.Errorf("%s: reusable is %v, want %v", name, got, c.reusable)
				}
			}
		})
	}
}

func TestAnswersRefused(t *testing.T) {
	ok := "HTTP/1.1 200 OK\r\n"
	for name, text := range map[string]string{
		"HTTP/2":                  "HTTP/2.0 200 OK\r\n\r\n",
		"not HTTP":                "220 mail.example.com ESMTP\r\n\r\n",
		"a letter in the status":  "HTTP/1.1 2x0 OK\r\n\r\n",
		"a sign in the status":    "HTTP/1.1 +20 OK\r\n\r\n",
		"a long status":           "HTTP/1.1 2000 OK\r\n\r\n",
		"switching protocols":     "HTTP/1.1 101 Switching Protocols\r\n\r\n",
		"interim without end":     strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 9),
		"two lengths":             ok + "Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
		"a list of lengths":       ok + "Content-Length: 1, 1\r\n\r\na",
		"a negative length":       ok + "Content-Length: -1\r\n\r\na",
		"a signed length":         ok + "Content-Length: +1\r\n\r\na",
		"an exponent":             ok + "Content-Length: 1e3\r\n\r\na",
		"a length beyond numbers": ok + "Content-Length: 99999999999999999999\r\n\r\na",
		"length and chunks":       ok + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"chunks and length":       ok + "Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
		"another coding":          ok + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
		"chunked twice":           ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"chunks in 1.0":           "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"space before the colon":  ok + "Content-Length : 1\r\n\r\na",
		"a folded line":           ok + "X: a\r\n b\r\nContent-Length: 1\r\n\r\na",
		"no colon":                ok + "Content-Length 1\r\n\r\na",
		"no name":                 ok + ": 1\r\n\r\na",
		"a bare carriage return":  ok + "X: a\rb\r\nContent-Length: 1\r\n\r\na",
		"a bare line feed":        ok + "X: a\nContent-Length: 1\r\n\r\na",
		"NUL":                     ok + "X: a\x00b\r\nContent-Length: 1\r\n\r\na",
		"NUL in the start line":   "HTTP/1.1 200 O\x00K\r\nContent-Length: 1\r\n\r\na",
	} {
		if resp, err := answers(text).Next(); !errors.Is(err, http1.ErrMalformed) {
			t.Errorf("%s: got %v %v, want ErrMalformed", name, resp, err)
		}
	}
	if _, err := answers(ok + "X: " + strings.Repeat("a", http1.MaxHead)).Next(); !errors.Is(err, http1.ErrHeadTooLong) {
		t.Errorf("a long head: got %v", err)
	}
	if _, err := answers("").Next(); err != io.EOF {
		t.Errorf("nothing: got %v", err)
	}
}

// An answer that ends early is an error, wherever it ends.
func TestAnswersCut(t *testing.T) {
	for _, whole := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nX: y\r\n\r\n",
	} {
		for n := 1; n < len(whole); n++ {
			a := answers(whole[:n])
			resp, err := a.Next()
			if err == nil {
				_, err = io.ReadAll(resp.Body)
			}
			if err != io.ErrUnexpectedEOF || resp != nil && a.Reusable() {
				t.Errorf("%q: got %v", whole[:n], err)
			}
		}
	}
	endless := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X: y\r\n", http1.MaxHead)
	resp, err := answers(endless).Next()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, http1.ErrHeadTooLong) {
		t.Errorf("a trailer without end: got %v", err)
	}
}

// One reader takes many answers; none sees a field of the one before.
func TestAnswersFollowEachOther(t *testing.T) {
	var text strings.Builder
	for i := range 50 {
		fmt.Fprintf(&text, "HTTP/1.1 200 OK\r\nX-%d: %d\r\nX-%d: again\r\nContent-Length: 1\r\n\r\n%d", i, i, i, i%10)
	}
	a := answers(text.String())
	for i := range 50 {
		resp, err := a.Next()
		if err != nil {
			t.Fatal(err)
		}
		want := http.Header{"Content-Length": {"1"}, fmt.Sprint("X-", i): {fmt.Sprint(i), "again"}}
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != fmt.Sprint(i%10) || !reflect.DeepEqual(resp.Header, want) {
			t.Fatalf("answer %d: %v %q (%v), want %v", i, resp.Header, body, err, want)
		}
	}
}

func TestAnswersAllocate(t *testing.T) {
	const text = "HTTP/1.1 200 OK\r\nSheaf-Replica: r1\r\nContent-Type: text/plain\r\nContent-Digest: sha-256=:x:\r\nContent-Length: 3\r\n\r\nabc"
	in := strings.NewReader("")
	r := bufio.NewReaderSize(in, http1.MaxHead)
	a := http1.NewAnswers(r)
	room := make([]byte, 8)
	if n := testing.AllocsPerRun(200, func() {
		in.Reset(text)
		resp, err := a.Next()
		if err != nil {
			t.Fatal(err)
		}
		if n, err := resp.Body.Read(room); n != 3 || err != io.EOF {
			t.Fatal(n, err)
		}
	}); n > 1 {
		t.Errorf("an answer takes %v allocations, want 1", n)
	}
}

// What Answers takes, net/http reads in the same way.
func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nX: y\r\n\r\n",
		"HTTP/1.0 200 OK\r\nconnection: Keep-Alive\r\nx: y\r\nX: z\r\n\r\nabc",
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a := answers(text)
		resp, err := a.Next()
		if err != nil {
			return
		}
		body, err := io.ReadAll(resp.Body)
		theirs := bufio.NewReader(strings.NewReader(text))
		want, werr := http.ReadResponse(theirs, nil)
		for werr == nil && want.StatusCode < 200 {
			want, werr = http.ReadResponse(theirs, nil)
		}
		if werr != nil {
			t.Fatalf("took %q, of which net/http says: %v", text, werr)
		}
		wbody, werr := io.ReadAll(want.Body)
		refused := errors.Is(err, http1.ErrMalformed) || errors.Is(err, http1.ErrHeadTooLong) // a trailer, of which net/http takes more
		if resp.StatusCode != want.StatusCode || string(body) != string(wbody) || !refused && (err == nil) != (werr == nil) {
			t.Fatalf("%q: got %d %q (%v), net/http %d %q (%v)", text, resp.StatusCode, body, err, want.StatusCode, wbody, werr)
		}
		h := want.Header.Clone()
		mine := resp.Header.Clone()
		for _, k := range []string{"Content-Length", "Transfer-Encoding", "Trailer", "Connection"} { // net/http takes some of them out
			delete(h, k)
			delete(mine, k)
		}
		if !reflect.DeepEqual(mine, h) {
			t.Fatalf("%q: header %q, net/http %q", text, mine, h)
		}
		if want.Close && a.Reusable() && resp.StatusCode >= 200 {
			t.Fatalf("%q: would be used again, net/http closes", text)
		}
	})
}
