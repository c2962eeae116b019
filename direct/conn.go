package direct

// conn.go is one connection to a replica: a goroutine that reads answers, and
// requests that whoever begins a call writes.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/http1"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// inline is how long a message may be, in bytes, that is written by whoever
// begins the call: it fits the socket's empty buffer, so nobody waits.
const inline = 8 << 10

// brief is how long whoever begins a call at least tries to write it, and twice
// that at most: the buffer is not empty if the replica answers what it does not
// read.
const brief = 50 * time.Millisecond

// A call is one request on its way.
type call struct {
	route *Route
	req   *sheaf.Request
	done  func(*sheaf.Reply, error)
	stop  context.CancelFunc // of opening a connection

	// Guarded by route.mu.
	conn     *conn // that carries it
	canceled bool
	proof    wire.Proof // of the request that is being written
}

// cancel ends the call, unless it has ended.
func (c *call) cancel() {
	c.route.mu.Lock()
	defer c.route.mu.Unlock()
	c.canceled = true
	if c.stop != nil {
		c.stop()
	}
	if c.conn != nil {
		_ = c.conn.nc.Close() // the reader tells
	}
}

// end tells the outcome.
func (c *call) end(reply *sheaf.Reply, err error) {
	if err != nil {
		c.route.mu.Lock()
		canceled := c.canceled
		c.route.mu.Unlock()
		if canceled {
			err = &sheaf.CallError{Fault: sheaf.FaultLost, From: c.req.To.ID, Err: context.Canceled}
		}
	}
	c.done(reply, err)
}

type conn struct {
	route   *Route
	host    *host
	nc      net.Conn
	r       *bufio.Reader
	answers *http1.Answers
	head    []byte // of the request that is written; used again

	// Guarded by route.mu.
	call    *call // in flight
	writing bool  // its request is being written
	written *sync.Cond
	writeBy time.Time // the deadline for writing; zero is none
	limited bool      // it is the last one for this request
	unsent  error     // why nothing of it was written
	broken  bool      // carries no other call
	since   time.Time // when it became idle
}

func newConn(r *Route, h *host, nc net.Conn) *conn {
	c := &conn{route: r, host: h, nc: nc, r: bufio.NewReaderSize(nc, http1.MaxHead), written: sync.NewCond(&r.mu)}
	c.answers = http1.NewAnswers(c.r)
	return c
}

// take makes k the call in flight. route.mu is held.
func (c *conn) take(k *call) { c.call, k.conn, c.writing = k, c, true }

// send writes the request: a short one at once, so that no other goroutine has
// to wake for it.
func (c *conn) send(k *call) {
	if len(k.req.Saved)+len(k.req.Body) <= inline/2 {
		c.write(k)
	} else {
		c.route.conns.Go(func() { c.write(k) })
	}
}

func (c *conn) write(k *call) {
	body := wire.Body(k.req)
	now := time.Now()
	b, proof, unsent := c.route.caller.AppendHead(append(c.head[:0], c.host.start...), k.req, body, now)
	if proof.Signed() {
		c.route.mu.Lock()
		k.proof = proof
		c.route.mu.Unlock()
	}
	b = append(b, "Content-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	var err error
	switch {
	case unsent != nil:
		err = unsent
	case len(b)+len(body) <= inline:
		b = append(b, body...)
		if c.writeBy.Sub(now) < brief {
			c.allow(now.Add(2 * brief))
		}
		var n int
		if n, err = c.nc.Write(b); errors.Is(err, os.ErrDeadlineExceeded) && c.allow(time.Time{}) {
			c.head = b
			c.writeRest(b[n:])
			return
		}
	default:
		if !c.writeBy.IsZero() {
			c.allow(time.Time{})
		}
		_, err = (&net.Buffers{b, body}).WriteTo(c.nc)
	}
	c.head = b
	c.wrote(unsent, err)
}

// writeRest writes the rest of a request, for as long as that takes.
func (c *conn) writeRest(b []byte) {
	c.route.conns.Go(func() {
		_, err := c.nc.Write(b)
		c.wrote(nil, err)
	})
}

// allow sets the deadline for writing, unless it is the last one already.
func (c *conn) allow(until time.Time) bool {
	c.route.mu.Lock()
	defer c.route.mu.Unlock()
	if c.limited {
		return false
	}
	c.writeBy = until
	_ = c.nc.SetWriteDeadline(until)
	return true
}

// wrote notes how the writing of a request ended.
func (c *conn) wrote(unsent, err error) {
	c.route.mu.Lock()
	defer c.route.mu.Unlock()
	c.writing = false
	c.written.Signal()
	if err == nil {
		return
	}
	c.broken, c.unsent = true, unsent
	if unsent != nil {
		_ = c.nc.Close() // the reader tells
		return
	}
	// The replica may have told why it did not read to the end. If so, the
	// answer is here.
	_ = c.nc.SetReadDeadline(time.Now().Add(time.Second))
}

// serve reads answers until the connection ends.
func (c *conn) serve() {
	for {
		_, err := c.r.Peek(1)
		c.route.mu.Lock()
		k := c.call
		if k == nil { // nobody asked: only the end may come
			c.drop()
			c.route.mu.Unlock()
			return
		}
		proof := k.proof
		c.route.mu.Unlock()
		var reply *sheaf.Reply
		var resp *http.Response
		if err != nil {
			err = lost(k.req, fmt.Errorf("the connection broke before an answer came: %w", err))
		} else if resp, err = c.answers.Next(); err != nil {
			err = lost(k.req, fmt.Errorf("the answer was cut or is not HTTP/1.1: %w", err))
		} else {
			reply, err = c.route.caller.Judge(k.req, proof, resp)
		}
		more, unsent := c.finish(resp != nil)
		if unsent != nil {
			err = &sheaf.CallError{Fault: sheaf.FaultRejected, From: k.req.To.ID, Err: unsent}
		}
		k.end(reply, err)
		if !more {
			return
		}
	}
}

func lost(req *sheaf.Request, err error) error {
	return &sheaf.CallError{Fault: sheaf.FaultLost, From: req.To.ID, Err: err}
}

// finish lets go of the call in flight, whose answer was read as far as it will
// be, and of its block. more is false when the connection ends with it; it is
// closed then.
func (c *conn) finish(answered bool) (more bool, unsent error) {
	r := c.route
	r.mu.Lock()
	defer r.mu.Unlock()
	more = answered && c.answers.Reusable()
	if c.writing && more {
		// Most likely the writer has not come back from its last system call.
		// But the replica may have refused a block of which it read only a part.
		_ = c.nc.SetWriteDeadline(time.Now().Add(brief))
		c.limited = true
	}
	if !more {
		_ = c.nc.Close() // ends the writing
	}
	for c.writing {
		c.written.Wait()
	}
	k := c.call
	c.call, k.conn = nil, nil
	if !more || c.broken || k.canceled || r.closed || len(c.host.idle) >= idlePerHost {
		c.broken = true
		_ = c.nc.Close()
		return false, c.unsent
	}
	if c.limited {
		_ = c.nc.SetWriteDeadline(time.Time{})
		c.limited, c.writeBy = false, time.Time{}
	}
	c.since = time.Now()
	c.host.idle = append(c.host.idle, c)
	r.idle++
	if r.reaper == nil {
		r.reaper = time.AfterFunc(idleTimeout/3, r.reap)
	}
	return true, nil
}

// drop closes a connection that may be idle. route.mu is held.
func (c *conn) drop() {
	if i := slices.Index(c.host.idle, c); i >= 0 {
		c.host.idle = slices.Delete(c.host.idle, i, i+1)
		c.route.idle--
	}
	c.broken = true
	_ = c.nc.Close()
}
