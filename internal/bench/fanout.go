package bench

// fanout.go is the near end of each peer: blocks out, answers back, merged.

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A fanout sends one block to each worker, at once, and returns the merged
// answer.
type fanout interface {
	round(ctx context.Context, blocks [][]byte) (*wordcount.Counts, error)
	close()
}

// merge merges answers in block order, as sheaf does.
func merge(answers [][]byte) (*wordcount.Counts, error) {
	var c wordcount.Counts
	for i, a := range answers {
		if err := c.Add(sheaf.Result{Index: i, Data: a}); err != nil {
			return nil, err
		}
	}
	return &c, nil
}

// bySheaf is the whole of sheaf: scheduler, envelope, digests, accounting.
type bySheaf struct {
	route *direct.Route
	group sheaf.Group
}

func newSheaf(addrs []string, signer *wire.Signer) *bySheaf {
	var replicas sheaf.Static
	for _, a := range addrs {
		replicas = append(replicas, sheaf.Replica{Function: "worker", ID: a, URL: "http://" + a, State: sheaf.Ready})
	}
	s := &bySheaf{route: direct.New(0)}
	if signer != nil {
		s.route.Sign(signer)
	}
	s.group = sheaf.Group{Function: "worker", Route: s.route, Resolver: replicas, Turns: &sheaf.Turns{}}
	return s
}

func (s *bySheaf) round(ctx context.Context, blocks [][]byte) (*wordcount.Counts, error) {
	var c wordcount.Counts
	for r, err := range sheaf.InOrder(s.group.Scatter(ctx, func(yield func(sheaf.Block, error) bool) {
		for _, b := range blocks {
			if !yield(sheaf.Block{Data: b}, nil) {
				return
			}
		}
	})) {
		if err == nil {
			err = c.Add(r)
		}
		if err != nil {
			return nil, err
		}
	}
	return &c, nil
}

func (s *bySheaf) close() { s.route.Close() }

// byNetHTTP is net/http's client, a goroutine for each block.
type byNetHTTP struct {
	addrs  []string
	client *http.Client
}

func newNetHTTP(addrs []string) *byNetHTTP {
	return &byNetHTTP{addrs, &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

func (f *byNetHTTP) round(_ context.Context, blocks [][]byte) (*wordcount.Counts, error) {
	answers, errs := make([][]byte, len(blocks)), make([]error, len(blocks))
	var wg sync.WaitGroup
	for i, b := range blocks {
		wg.Go(func() {
			resp, err := f.client.Post("http://"+f.addrs[i]+"/", "application/octet-stream", bytes.NewReader(b))
			if err != nil {
				errs[i] = err
				return
			}
			defer resp.Body.Close()
			answers[i], errs[i] = io.ReadAll(resp.Body)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return merge(answers)
}

func (f *byNetHTTP) close() { f.client.CloseIdleConnections() }

// byConn writes to all connections and then reads from all, on one goroutine:
// nothing is checked, nobody is waited for in another order. It is the least
// that a fan-out over connections can do.
type byConn struct {
	conns []net.Conn
	in    []*bufio.Reader
	out   []byte
	write func(b, block []byte, i int) []byte
	read  func(*bufio.Reader) ([]byte, error)
}

func dial(addrs []string, write func(b, block []byte, i int) []byte, read func(*bufio.Reader) ([]byte, error)) (*byConn, error) {
	f := &byConn{write: write, read: read}
	for _, a := range addrs {
		c, err := net.Dial("tcp", a)
		if err != nil {
			f.close()
			return nil, err
		}
		f.conns, f.in = append(f.conns, c), append(f.in, bufio.NewReaderSize(c, 32<<10))
	}
	return f, nil
}

func newHand(addrs []string) (*byConn, error) {
	return dial(addrs, func(b, block []byte, i int) []byte {
		b = append(append(append(b, "POST / HTTP/1.1\r\nHost: "...), addrs[i]...), "\r\n"...)
		return appendHand(b, block)
	}, readHand)
}

func newTCP(addrs []string) (*byConn, error) {
	return dial(addrs, func(b, block []byte, _ int) []byte { return appendFrame(b, block) }, readFrame)
}

func (f *byConn) round(_ context.Context, blocks [][]byte) (*wordcount.Counts, error) {
	for i, b := range blocks {
		f.out = f.write(f.out[:0], b, i)
		if _, err := f.conns[i].Write(f.out); err != nil {
			return nil, err
		}
	}
	answers := make([][]byte, len(blocks))
	for i := range blocks {
		var err error
		if answers[i], err = f.read(f.in[i]); err != nil {
			return nil, err
		}
	}
	return merge(answers)
}

func (f *byConn) close() {
	for _, c := range f.conns {
		_ = c.Close()
	}
}

// byNATS publishes a request to each worker, with one inbox for all answers.
type byNATS struct {
	srv      *server.Server
	nc       *nats.Conn
	sub      *nats.Subscription
	inbox    string
	subjects []string
}

func natsServer() (*server.Server, error) {
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		return nil, err
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		s.Shutdown()
		return nil, fmt.Errorf("the NATS server did not start")
	}
	return s, nil
}

func newNATS(srv *server.Server, subjects []string) (*byNATS, error) {
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		return nil, err
	}
	f := &byNATS{srv: srv, nc: nc, inbox: nc.NewInbox(), subjects: subjects}
	if f.sub, err = nc.SubscribeSync(f.inbox + ".*"); err != nil {
		nc.Close()
		return nil, err
	}
	return f, nil
}

func (f *byNATS) round(_ context.Context, blocks [][]byte) (*wordcount.Counts, error) {
	for i, b := range blocks {
		if err := f.nc.PublishRequest(f.subjects[i], fmt.Sprint(f.inbox, ".", i), b); err != nil {
			return nil, err
		}
	}
	if err := f.nc.Flush(); err != nil {
		return nil, err
	}
	answers := make([][]byte, len(blocks))
	for range blocks {
		m, err := f.sub.NextMsg(10 * time.Second)
		if err != nil {
			return nil, err
		}
		var i int
		if _, err := fmt.Sscan(m.Subject[strings.LastIndexByte(m.Subject, '.')+1:], &i); err != nil || i < 0 || i >= len(answers) {
			return nil, fmt.Errorf("an answer to %s", m.Subject)
		}
		answers[i] = m.Data
	}
	return merge(answers)
}

func (f *byNATS) close() { f.nc.Close() }
