package broker

import (
	"bytes"
	"maps"
	"slices"
	"strings"
)

// header.go writes headers before the data of a message, for the bus that has
// none. The form is that in which NATS itself sends them.

const headerLine = "NATS/1.0\r\n"

// seal returns data with headers before it.
func seal(h Header, data []byte) []byte {
	if len(h) == 0 && !bytes.HasPrefix(data, []byte(headerLine)) {
		return data
	}
	var b bytes.Buffer
	b.WriteString(headerLine)
	for _, k := range slices.Sorted(maps.Keys(h)) {
		for _, v := range h[k] {
			b.WriteString(k + ": " + oneLine(v) + "\r\n")
		}
	}
	b.WriteString("\r\n")
	b.Write(data)
	return b.Bytes()
}

// unseal takes the headers off. What does not look like them is data.
func unseal(data []byte) (Header, []byte) {
	rest, ok := bytes.CutPrefix(data, []byte(headerLine))
	if !ok {
		return Header{}, data
	}
	h := Header{}
	for {
		line, after, ok := bytes.Cut(rest, []byte("\r\n"))
		if !ok {
			return Header{}, data
		}
		rest = after
		if len(line) == 0 {
			return h, rest
		}
		k, v, ok := strings.Cut(string(line), ":")
		if !ok || k == "" || strings.ContainsAny(k, " \t") {
			return Header{}, data
		}
		h[k] = append(h[k], strings.TrimSpace(v))
	}
}

// oneLine makes a value that fits into a header.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}
