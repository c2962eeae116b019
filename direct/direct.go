// Package direct is the route straight to a replica's address, past every
// gateway and proxy. It is the only route that can address a rank.
package direct

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	dialTimeout = 3 * time.Second
	idleTimeout = 90 * time.Second // shorter than a worker keeps an idle connection
	idlePerHost = 64
)

// A Route calls replicas at the addresses that a view gives, over connections
// that it keeps alive. What answers there may be a sheaf worker or any other
// HTTP function: on the wire it is plain HTTP/1.1. It may be used concurrently.
//
// A block is sent once for each call: where a connection breaks, the caller
// decides about another attempt.
type Route struct {
	caller wire.Caller
	conns  sync.WaitGroup

	mu     sync.Mutex       // guards what follows, and the state of calls and connections
	hosts  map[string]*host // by URL, of replicas with connections
	idle   int              // connections without a call
	reaper *time.Timer
	closed bool
}

var _ sheaf.Starter = (*Route)(nil)

// New returns a Route. maxReply is how long an answer may be, in bytes; 0
// means 64 MiB.
func New(maxReply int64) *Route {
	return &Route{caller: wire.Caller{HTTP: wire.NewHTTP(idlePerHost), MaxReply: maxReply}, hosts: make(map[string]*host)}
}

// A host is the address of one replica, and the connections to it.
type host struct {
	url   string // as the view gives it
	addr  string // host:port
	start string // what each request begins with
	idle  []*conn
	conns int // all of them, and those that are being opened
}

// newHost takes a URL apart.
func newHost(base string) (*host, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, err
	}
	if u.Hostname() == "" || strings.ContainsFunc(u.Host, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return nil, fmt.Errorf("address %q names no host", base)
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	u.RawQuery, u.Fragment = "", ""
	path := strings.TrimSuffix(u.RequestURI(), "/") + "/"
	return &host{url: base, addr: net.JoinHostPort(u.Hostname(), port),
		start: "POST " + path + " HTTP/1.1\r\nHost: " + u.Host + "\r\nUser-Agent: sheaf\r\n"}, nil
}

// Sign makes the route sign what it sends and take signed answers only, unless
// s is lax. It must come before the first Call.
func (r *Route) Sign(s *wire.Signer) { r.caller.Signer = s }

// Call posts the request to req.To's address. It fails with
// sheaf.ErrNotAddressable when req names no replica, or one without a URL.
func (r *Route) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	lost := func(err error) error {
		return wire.Late(ctx, &sheaf.CallError{Fault: sheaf.FaultLost, From: req.To.ID, Err: err})
	}
	if ctx.Err() != nil {
		return nil, lost(ctx.Err())
	}
	if strings.HasPrefix(req.To.URL, "https://") {
		return r.caller.Post(ctx, strings.TrimSuffix(req.To.URL, "/")+"/", req)
	}
	type outcome struct {
		reply *sheaf.Reply
		err   error
	}
	ended := make(chan outcome, 1)
	cancel := r.Start(req, func(reply *sheaf.Reply, err error) { ended <- outcome{reply, err} })
	select {
	case o := <-ended:
		return o.reply, wire.Late(ctx, o.err)
	case <-ctx.Done():
		cancel()
		if o := <-ended; o.err == nil || errors.Is(o.err, sheaf.ErrNotAddressable) {
			return o.reply, o.err // it came just before
		}
		return nil, lost(ctx.Err())
	}
}

// Start begins a call, as [sheaf.Starter] says.
func (r *Route) Start(req *sheaf.Request, done func(*sheaf.Reply, error)) (cancel func()) {
	c := &call{route: r, req: req, done: done}
	switch u := req.To.URL; {
	case u == "":
		go done(nil, fmt.Errorf("direct route: the request names no replica: %w", sheaf.ErrNotAddressable))
		return func() {}
	case strings.HasPrefix(u, "https://"):
		ctx, stop := context.WithCancel(context.Background())
		go func() {
			defer stop()
			done(r.Call(ctx, req))
		}()
		return stop
	case !strings.HasPrefix(u, "http://"):
		go done(nil, fmt.Errorf("direct route: address %q of replica %s is not a URL such as http://10.0.0.7:8080: %w",
			u, req.To.ID, sheaf.ErrNotAddressable))
		return func() {}
	}
	r.mu.Lock()
	h := r.hosts[req.To.URL]
	if h == nil {
		var err error
		if h, err = newHost(req.To.URL); err != nil {
			r.mu.Unlock()
			go c.end(nil, refused(req, err))
			return func() {}
		}
		r.hosts[h.url] = h
	}
	if n := len(h.idle); n > 0 {
		conn := h.idle[n-1]
		h.idle[n-1] = nil
		h.idle = h.idle[:n-1]
		r.idle--
		conn.take(c)
		r.mu.Unlock()
		conn.send(c)
		return c.cancel
	}
	h.conns++
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	r.conns.Add(1)
	r.mu.Unlock()
	go r.open(ctx, h, c)
	return c.cancel
}

// open opens a connection for its first call, and lives as long as it does.
func (r *Route) open(ctx context.Context, h *host, c *call) {
	defer r.conns.Done()
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	nc, err := dialer.DialContext(ctx, "tcp", h.addr)
	c.stop()
	if err != nil {
		r.mu.Lock()
		r.forget(h)
		r.mu.Unlock()
		c.end(nil, refused(c.req, err))
		return
	}
	conn := newConn(r, h, nc)
	r.mu.Lock()
	conn.take(c)
	if c.canceled {
		_ = nc.Close() // the reader sees it
	}
	r.mu.Unlock()
	conn.send(c)
	conn.serve()
	r.mu.Lock()
	r.forget(h)
	r.mu.Unlock()
}

// forget takes a connection out of the count of its host. r.mu is held.
func (r *Route) forget(h *host) {
	if h.conns--; h.conns == 0 && r.hosts[h.url] == h {
		delete(r.hosts, h.url)
	}
}

func refused(req *sheaf.Request, err error) error {
	return &sheaf.CallError{Fault: sheaf.FaultRefused, From: req.To.ID, Err: err}
}

// reap closes connections that have been idle for long.
func (r *Route) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := time.Now().Add(-idleTimeout)
	for _, h := range r.hosts {
		for len(h.idle) > 0 && h.idle[0].since.Before(old) { // the first was used least lately
			h.idle[0].drop()
		}
	}
	if r.idle > 0 && !r.closed {
		r.reaper.Reset(idleTimeout / 3)
	} else {
		r.reaper = nil
	}
}

// Close closes the connections that are idle, and each other one at the end of
// its call, for which it waits.
func (r *Route) Close() {
	r.mu.Lock()
	r.closed = true
	if r.reaper != nil {
		r.reaper.Stop()
	}
	for _, h := range r.hosts {
		for len(h.idle) > 0 {
			h.idle[0].drop()
		}
	}
	r.mu.Unlock()
	r.conns.Wait()
	r.caller.HTTP.CloseIdleConnections()
}
