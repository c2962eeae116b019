package sheaf

import (
	"crypto/rand"
	"encoding/hex"
	"strings"
)

// trace.go knows the form of W3C's trace context, version 00 of its header
// traceparent: 00-TRACE-SPAN-FLAGS in hexadecimal digits.

const (
	traceLen  = 55
	spanAt    = 36 // where the span's ID begins
	spanLen   = 16
	traceAt   = 3
	traceEnds = 35
)

// IsTrace says whether s is a traceparent of version 00, as W3C's trace context
// has it.
func IsTrace(s string) bool {
	if len(s) != traceLen || !strings.HasPrefix(s, "00-") || s[traceEnds] != '-' || s[spanAt+spanLen] != '-' {
		return false
	}
	digits := func(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }
	trace, span := s[traceAt:traceEnds], s[spanAt:spanAt+spanLen]
	return digits(trace) && digits(span) && digits(s[traceLen-2:]) && strings.Trim(trace, "0") != "" && strings.Trim(span, "0") != ""
}

// childTrace is a span of its own in the trace of parent; "" has none.
func childTrace(parent string) string {
	if parent == "" {
		return ""
	}
	var id [spanLen / 2]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the program instead
	id[0] |= 1              // an ID of zeros is none
	return parent[:spanAt] + hex.EncodeToString(id[:]) + parent[spanAt+spanLen:]
}
