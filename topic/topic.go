// Package topic is the route by messages: a caller publishes a block, a
// connector takes it, calls the function through the gateway, and sends the
// result to the caller's inbox. The caller needs a way to NATS and none to the
// gateway.
//
// A message carries an HTTP request, and others its answer, with all headers:
// so a route by messages judges answers exactly as the other routes do. What is
// longer than NATS takes travels in parts, of which each is asked for by who
// receives it, so that nobody holds more than one. docs/WIRE.md has the frames.
package topic

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// Subjects of the route.
const (
	// Calls is what the subjects of calls begin with; the function follows.
	Calls = "sheaf.call."
	// Cancels is where a caller says that it no longer wants an answer.
	Cancels = "sheaf.cancel"
	// group is the queue group of those that take calls.
	group = "sheaf-connector"
)

// Headers of frames. All others are those of the HTTP messages.
const (
	headerFrame  = "Sheaf-Frame"  // what the message is
	headerLength = "Sheaf-Length" // in a call: bytes of the whole block
	headerMore   = "Sheaf-More"   // there are more parts, to be asked for at the reply subject
	headerStatus = "Sheaf-Status" // in an answer: of HTTP
)

// Frames.
const (
	frameMore    = "more"    // the next part is wanted, at the reply subject
	framePart    = "part"    // a part
	frameAnswer  = "answer"  // an answer, with its first part
	frameWorking = "working" // the call is still being worked on
	frameBroken  = "broken"  // the call or its answer broke off; the data says why
)

const (
	// beat is how often who works on a call says so.
	beat = 2 * time.Second
	// silence is after how long without a word the other side is lost.
	silence = 10 * time.Second
	// most is how long a part may be, whatever NATS takes.
	most = 1 << 20
	// room is what NATS's limit leaves for headers.
	room = 16 << 10
)

// partSize is how long a part may be on a connection.
func partSize(nc *nats.Conn) int {
	return max(1<<10, min(most, int(nc.MaxPayload())-room))
}

// frame returns a message of one kind.
func frame(to, kind string, data []byte) *nats.Msg {
	m := &nats.Msg{Subject: to, Header: nats.Header{}, Data: data}
	m.Header[headerFrame] = []string{kind}
	return m
}

// strip takes the headers of frames out.
func strip(h nats.Header) {
	for _, name := range []string{headerFrame, headerLength, headerMore, headerStatus} {
		delete(h, name)
	}
}

func first(h nats.Header, name string) string {
	if v := h[name]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// number reads a header that counts; -1 when it is not there or cannot be.
func number(h nats.Header, name string) int {
	n, err := strconv.Atoi(first(h, name))
	if err != nil || n < 0 {
		return -1
	}
	return n
}

// token is the last token of a subject.
func token(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }

var errSilent = errors.New("nothing was heard of the call for " + silence.String())
