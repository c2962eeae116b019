package serve

// blocks.go is the short way for blocks: a server of HTTP/1.1 for the one kind
// of request that comes a million times, a POST to "/" with a length. Whatever
// else comes on a connection (a probe, chunks, an upgrade, a head that is odd
// in any way) is handed to net/http, unread, with the rest of the connection.
// So net/http decides about all that is unusual, as it always did.

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sheaf-project/sheaf/internal/http1"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A BlockHandler is a Handler that also takes blocks the short way.
type BlockHandler interface {
	http.Handler
	// Room returns how long a block may be, in bytes, and how long it may take
	// to arrive, and its result to leave.
	Room() (most int64, patience time.Duration)
	// Admit looks at the header of a block, which began to arrive at the given
	// time, before the block is read. A block that is refused here may be
	// brought to ServeHTTP instead; one that is admitted is not.
	Admit(header http.Header, begun time.Time) (Admission, *wire.Problem)
	// ServeBlock works on a block that was admitted. readErr says why it did not
	// come whole; it is an os.ErrDeadlineExceeded when it took too long. ctx ends
	// when the caller has gone. header must not be kept.
	// more says that result is not one, but what the handler saved of its work.
	ServeBlock(ctx context.Context, a Admission, header http.Header, block []byte, readErr error, begun time.Time) (result []byte, more bool, p *wire.Problem)
}

// An Admission is what the header of a block has told.
type Admission struct {
	Envelope wire.Envelope
	Proof    wire.Proof // for the answer's signature
}

const (
	headTimeout = 5 * time.Second // for a head to arrive
	idleTimeout = 3 * time.Minute // longer than a route keeps an idle connection
	bufferSize  = 8 << 10
	together    = 16 << 10 // a result up to this long is sent in one piece with its head
)

// blocks serves the connections of one listener.
type blocks struct {
	s       *Server
	handler BlockHandler
	base    context.Context // of all calls
	rest    *http.Server    // serves what is not for the short way
	others  handover
	log     *slog.Logger
	most    int64
	wait    time.Duration
	wg      sync.WaitGroup

	l net.Listener

	date    atomic.Pointer[date]
	closing atomic.Bool

	mu    sync.Mutex // guards conns
	conns map[*blockConn]struct{}
}

func newBlocks(base context.Context, s *Server, h BlockHandler, rest *http.Server, log *slog.Logger, l net.Listener) *blocks {
	f := &blocks{s: s, handler: h, base: base, rest: rest, log: log, l: l, conns: make(map[*blockConn]struct{}),
		others: handover{conns: make(chan net.Conn), closed: make(chan struct{}), addr: l.Addr()}}
	f.most, f.wait = h.Room()
	return f
}

// serve accepts connections until shutdown closes the listener, or it breaks.
func (f *blocks) serve() error {
	f.mu.Lock()
	if f.closing.Load() {
		f.mu.Unlock()
		return http.ErrServerClosed
	}
	f.wg.Go(func() { _ = f.rest.Serve(&f.others) }) // ends by shutdown
	f.mu.Unlock()
	var pause time.Duration
	for {
		nc, err := f.l.Accept()
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.ENOBUFS) {
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			f.log.Debug("accept", "err", err, "pause", pause)
			time.Sleep(pause)
			continue
		}
		f.mu.Lock()
		switch {
		case f.closing.Load():
			err = http.ErrServerClosed
			if nc != nil {
				_ = nc.Close()
			}
		case err == nil:
			c := &blockConn{f: f, nc: nc, r: bufio.NewReaderSize(nc, bufferSize), looked: make(chan struct{}, 1)}
			f.conns[c] = struct{}{}
			f.wg.Go(c.serve)
		}
		f.mu.Unlock()
		if err != nil {
			_ = f.others.Close()
			return err
		}
		pause = 0
	}
}

// shutdown closes the listener and the idle connections, and waits until all
// others have ended their blocks, or ctx ends.
func (f *blocks) shutdown(ctx context.Context) error {
	f.mu.Lock()
	f.closing.Store(true)
	_ = f.l.Close()
	for c := range f.conns {
		if !c.busy.Load() {
			_ = c.nc.Close()
		}
	}
	f.mu.Unlock()
	err := f.rest.Shutdown(ctx)
	ended := make(chan struct{})
	go func() { f.wg.Wait(); close(ended) }()
	select {
	case <-ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// close ends all connections. Who works on a block has been told by the end of
// its context.
func (f *blocks) close() error {
	f.mu.Lock()
	for c := range f.conns {
		_ = c.nc.Close()
	}
	f.mu.Unlock()
	return f.rest.Close()
}

// date is the time as answers tell it, for one second.
type date struct {
	second int64
	text   []byte
}

// appendDate appends the time in the form of RFC 9110.
func (f *blocks) appendDate(b []byte, now time.Time) []byte {
	d := f.date.Load()
	if d == nil || d.second != now.Unix() {
		d = &date{now.Unix(), now.UTC().AppendFormat(nil, http.TimeFormat)}
		f.date.Store(d)
	}
	return append(b, d.text...)
}

// blockConn is one connection. One goroutine reads blocks, has them worked on
// and writes results.
type blockConn struct {
	f         *blocks
	nc        net.Conn
	r         *bufio.Reader
	head      http1.Head
	out       []byte
	last      bool          // the connection ends with this answer
	admission Admission     // of the block at hand
	refusal   *wire.Problem // of it, before it was read

	busy            atomic.Bool // a block is worked on
	readBy, writeBy time.Time   // deadlines that are set; zero is none

	ctx    context.Context // ends when the caller has gone
	cancel context.CancelCauseFunc
	looked chan struct{} // has a token when lookOut is done

	mu      sync.Mutex // guards what follows
	working bool       // on a block
	looks   bool       // lookOut runs
}

func (c *blockConn) serve() {
	handed := false
	defer func() {
		if v := recover(); v != nil {
			c.f.log.Error("serving a block panicked", "panic", v, "stack", string(debug.Stack()))
		}
		c.f.mu.Lock()
		delete(c.f.conns, c)
		c.f.mu.Unlock()
		if !handed {
			_ = c.nc.Close()
		}
	}()
	c.ctx, c.cancel = context.WithCancelCause(c.f.base)
	defer c.cancel(nil)
	c.readUntil(time.Now().Add(headTimeout), 0)
	for {
		if _, err := c.r.Peek(1); err != nil || !c.is(true) {
			return
		}
		begun := time.Now()
		n, err := c.wait(begun)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil || !c.plain(n, begun) {
			_ = c.nc.SetDeadline(time.Time{}) // net/http sets its own, but for writing
			handed = c.f.others.take(&replay{Conn: c.nc, r: c.r})
			return
		}
		_, _ = c.r.Discard(n) // it is there
		if !c.block(begun) || !c.is(false) {
			return
		}
		c.readUntil(begun.Add(idleTimeout), idleTimeout/16)
	}
}

// is notes whether the connection works on a block. It returns false when the
// server ends, and the connection shall: either this sees that, or the one who
// ends it sees what is noted here.
func (c *blockConn) is(busy bool) bool {
	c.busy.Store(busy)
	return !c.f.closing.Load()
}

// readUntil sets the deadline for reading, unless the one that is set differs
// by no more than slack.
func (c *blockConn) readUntil(t time.Time, slack time.Duration) {
	if c.readBy.IsZero() || t.Sub(c.readBy).Abs() > slack {
		c.readBy = t
		_ = c.nc.SetReadDeadline(t) // that a connection is closed is seen when it is read
	}
}

// wait waits for a head and returns its length.
func (c *blockConn) wait(begun time.Time) (int, error) {
	b, _ := c.r.Peek(c.r.Buffered()) // it is there
	if n := http1.Complete(b); n > 0 {
		return n, nil // as nearly always: a head comes in one piece
	}
	c.readUntil(begun.Add(headTimeout), 0)
	return http1.Wait(c.r)
}

// plain says whether the request, whose head is n bytes long, goes the short
// way. Who is refused unread does so only if the block need not be waited for.
func (c *blockConn) plain(n int, begun time.Time) bool {
	b, _ := c.r.Peek(n) // it is there
	if c.head.Parse(string(b)) != nil || !c.head.PostsRoot() || c.head.Length > c.f.most {
		return false
	}
	c.last = c.head.Close
	s := c.f.s
	c.refusal = nil
	if !s.mine(c.head.Header) {
		c.refusal = s.misdirected(c.head.Header)
	}
	if c.refusal == nil {
		if !s.enter() {
			c.refusal = busy(s.MaxInflight)
		} else if c.admission, c.refusal = c.f.handler.Admit(c.head.Header, begun); c.refusal != nil {
			s.inflight.Add(-1)
		}
	}
	return c.refusal == nil || int64(c.r.Buffered()-n) >= c.head.Length
}

// block reads a block, has it worked on and writes what came of it. It returns
// false when the connection is over.
func (c *blockConn) block(begun time.Time) bool {
	if p := c.refusal; p != nil {
		c.refusal = nil
		_, _ = c.r.Discard(int(c.head.Length)) // it is there
		return c.refuse(p)
	}
	defer c.f.s.inflight.Add(-1)
	if int64(c.r.Buffered()) < c.head.Length {
		c.readUntil(begun.Add(c.f.wait), 0)
	}
	data, readErr := wire.ReadBody(c.head.Body(c.r), c.head.Length, c.f.most)
	if readErr != nil {
		c.last = true // where the next request would begin is not known
	}
	c.begin()
	result, more, p := c.f.handler.ServeBlock(callerCtx{c.ctx, c}, c.admission, c.head.Header, data, readErr, begun)
	c.end()
	if c.ctx.Err() != nil {
		c.last = true // the caller has left, or ended its side only, and waits for the answer
	}
	if p != nil {
		return c.refuse(p)
	}
	status := http.StatusOK
	if more {
		status = http.StatusAccepted
	}
	b := http1.AppendStatus(c.out[:0], status)
	if more {
		b = append(b, wire.Saved+": 0\r\n"...)
	}
	b = wire.AppendResult(b, c.f.s.Replica, c.admission.Proof, result, more)
	return c.send(b, result)
}

// refuse writes a problem.
func (c *blockConn) refuse(p *wire.Problem) bool {
	a := short{header: make(http.Header)}
	p.Write(&a)
	b := http1.AppendStatus(c.out[:0], a.status)
	for key, values := range a.header {
		if key != "Content-Length" {
			for _, v := range values {
				b = append(append(append(append(b, key...), ": "...), v...), "\r\n"...)
			}
		}
	}
	return c.send(b, a.body)
}

// send writes an answer, of which b is the head so far. It returns whether the
// connection lives on.
func (c *blockConn) send(b, body []byte) bool {
	if c.f.s.Replica != "" {
		b = append(append(append(b, wire.Replica+": "...), c.f.s.Replica...), "\r\n"...)
	}
	now := time.Now()
	b = append(c.f.appendDate(append(b, "Date: "...), now), "\r\n"...)
	if c.last = c.last || c.f.closing.Load(); c.last {
		b = append(b, "Connection: close\r\n"...)
	}
	b = strconv.AppendInt(append(b, "Content-Length: "...), int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	// A caller who does not read must not keep the replica busy for ever.
	if until := now.Add(c.f.wait); until.Sub(c.writeBy) > c.f.wait/8 {
		c.writeBy = until
		_ = c.nc.SetWriteDeadline(until)
	}
	var err error
	if len(body) <= together {
		b = append(b, body...)
		_, err = c.nc.Write(b)
	} else {
		_, err = (&net.Buffers{b, body}).WriteTo(c.nc)
	}
	c.out = b[:0]
	return err == nil && !c.last
}

// callerCtx is the context that blocks of a connection get. It watches for the
// caller to leave from when somebody first asks: most handlers never do, and a
// watch costs more than a small block.
type callerCtx struct {
	context.Context
	c *blockConn
}

func (x callerCtx) Done() <-chan struct{} {
	x.c.look()
	return x.Context.Done()
}

func (x callerCtx) Err() error {
	x.c.look()
	return x.Context.Err()
}

// begin and end stand around the work on a block.
func (c *blockConn) begin() {
	c.mu.Lock()
	c.working = true
	c.mu.Unlock()
}

func (c *blockConn) end() {
	c.mu.Lock()
	c.working = false
	looks := c.looks
	if looks {
		_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // long ago
	}
	c.mu.Unlock()
	if looks {
		<-c.looked
		c.looks = false
		c.readBy = time.Time{} // so that it is set anew
	}
}

// look begins to watch for the caller to leave, while a block is worked on.
func (c *blockConn) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.working || c.looks {
		return
	}
	c.looks = true
	_ = c.nc.SetReadDeadline(time.Time{})
	go c.lookOut()
}

// lookOut waits for anything to come: at this time that is the end of the
// connection, or the next request, which stays where it is.
func (c *blockConn) lookOut() {
	if _, err := c.r.Peek(1); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.cancel(errLeft)
	}
	c.looked <- struct{}{}
}

var errLeft = errors.New("the caller has left")

// short is an http.ResponseWriter for a short answer.
type short struct {
	header http.Header
	status int
	body   []byte
}

func (s *short) Header() http.Header         { return s.header }
func (s *short) WriteHeader(status int)      { s.status = status }
func (s *short) Write(b []byte) (int, error) { s.body = append(s.body, b...); return len(b), nil }

// replay is a connection of which a part was read already.
type replay struct {
	net.Conn
	r *bufio.Reader
}

// Read reads what r holds first, and then past it.
func (c *replay) Read(p []byte) (int, error) {
	if c.r != nil {
		if n := c.r.Buffered(); n > 0 {
			return c.r.Read(p[:min(n, len(p))])
		}
		c.r = nil
	}
	return c.Conn.Read(p)
}

// CloseWrite ends our side. net/http does so after an answer that it gives
// before the request has ended, and then waits: a connection that is closed at
// once would take that answer with it.
func (c *replay) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// handover is the net.Listener from which net/http takes connections that are
// not for the short way.
type handover struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

// take hands c over; false when nobody takes it any more.
func (h *handover) take(c net.Conn) bool {
	select {
	case h.conns <- c:
		return true
	case <-h.closed:
		return false
	}
}

func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handover) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *handover) Addr() net.Addr { return h.addr }
