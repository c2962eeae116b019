package http1

import (
	"bufio"
	"io"
	"net/http"
	"strings"
)

// PostsRoot says whether the head is that of a request that posts a body of a
// known length to "/", and asks for nothing else: whatever a server of HTTP/1.1
// might do with another one, there is only one thing to do with this.
func (h *Head) PostsRoot() bool {
	if h.Start != "POST / HTTP/1.1" || h.Length < 0 {
		return false
	}
	if host := h.Header["Host"]; len(host) != 1 || !hostname(host[0]) {
		return false
	}
	for _, key := range []string{"Expect", "Upgrade", "Trailer", "Te", "Content-Encoding"} {
		if h.Header[key] != nil {
			return false
		}
	}
	for _, value := range h.Header["Connection"] {
		if !strings.EqualFold(value, "close") && !strings.EqualFold(value, "keep-alive") {
			return false
		}
	}
	return true
}

// hostname says whether s is made of what the name of a host and its port are
// made of; servers do not agree on what else they refuse.
func hostname(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '-', c == '_', c == ':', c == '[', c == ']':
		default:
			return false
		}
	}
	return s != ""
}

// Body returns a reader of the h.Length bytes of body that follow the head in
// r. Its error is io.ErrUnexpectedEOF when they end early.
func (h *Head) Body(r *bufio.Reader) io.Reader { return &body{r: r, left: h.Length} }

// AppendStatus appends the status line of an answer.
func AppendStatus(b []byte, status int) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = append(b, byte('0'+status/100), byte('0'+status/10%10), byte('0'+status%10), ' ')
	return append(append(b, http.StatusText(status)...), "\r\n"...)
}
