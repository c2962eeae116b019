package bench

// peers.go is what runs at the far end: one process for each worker, which
// counts the words of a block, however it comes.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/worker"
)

// Command is the hidden command of sheaf that is a peer's process: its argument
// is a kind.
const Command = "bench-peer"

// The kinds of peers.
const (
	kindSheaf   = "sheaf"    // sheaf's worker
	kindNetHTTP = "net-http" // net/http's server
	kindHand    = "hand"     // a server of HTTP/1.1 in thirty lines, that checks nothing
	kindTCP     = "tcp"      // frames: four bytes of length, then the bytes
	kindNATS    = "nats"     // answers NATS requests
)

// natsEnv tells a peer where NATS is, and its subject.
const natsEnv, subjectEnv = "SHEAF_BENCH_NATS", "SHEAF_BENCH_SUBJECT"

// Peer is a worker's process of a kind. It prints its address, and ends with
// its standard input.
func Peer(kind string) int {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until whoever started this is gone
		cancel()
	}()
	if err := peer(ctx, kind); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func count(block []byte) []byte {
	out, err := wordcount.Count(context.Background(), sheaf.Block{Data: block})
	if err != nil {
		panic(err) // it never fails
	}
	return out
}

func peer(ctx context.Context, kind string) error {
	if kind == kindNATS {
		nc, err := nats.Connect(os.Getenv(natsEnv))
		if err != nil {
			return err
		}
		defer nc.Close()
		if _, err := nc.Subscribe(os.Getenv(subjectEnv), func(m *nats.Msg) { _ = m.Respond(count(m.Data)) }); err != nil {
			return err
		}
		if err := nc.Flush(); err != nil {
			return err
		}
		fmt.Println(os.Getenv(subjectEnv))
		<-ctx.Done()
		return nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	fmt.Println(l.Addr())
	switch kind {
	case kindSheaf:
		s, err := worker.Env(wordcount.Count, func(name string) string {
			switch name {
			case "sheaf_function":
				return "worker"
			case "sheaf_replica":
				return l.Addr().String()
			case "sheaf_key_file":
				return os.Getenv(name)
			}
			return ""
		})
		if err != nil {
			return err
		}
		s.Linger, s.Log = 0, slog.New(slog.DiscardHandler)
		return s.Serve(ctx, l)
	case kindNetHTTP:
		return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b := make([]byte, r.ContentLength)
			if _, err := io.ReadFull(r.Body, b); err != nil {
				return
			}
			out := count(b)
			w.Header().Set("Content-Length", strconv.Itoa(len(out)))
			_, _ = w.Write(out)
		}))
	case kindHand:
		return each(l, hand)
	case kindTCP:
		return each(l, frames)
	}
	return fmt.Errorf("no kind %q", kind)
}

// each serves each connection on a goroutine.
func each(l net.Listener, serve func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			serve(c)
		}()
	}
}

func frames(c net.Conn) {
	in := bufio.NewReaderSize(c, 32<<10)
	var out []byte
	for {
		block, err := readFrame(in)
		if err != nil {
			return
		}
		out = appendFrame(out[:0], count(block))
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

func readFrame(r *bufio.Reader) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(size[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func appendFrame(b, body []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

func hand(c net.Conn) {
	in := bufio.NewReaderSize(c, 32<<10)
	var out []byte
	for {
		block, err := readHand(in)
		if err != nil {
			return
		}
		out = append(out[:0], "HTTP/1.1 200 OK\r\n"...)
		out = appendHand(out, count(block))
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

// readHand reads a message: of its head only the length.
func readHand(r *bufio.Reader) ([]byte, error) {
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return nil, err
		}
		if len(line) <= 2 {
			break
		}
		if v, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(v))); err != nil {
				return nil, err
			}
		}
	}
	if length < 0 {
		return nil, errors.New("no length")
	}
	b := make([]byte, length)
	_, err := io.ReadFull(r, b)
	return b, err
}

func appendHand(b, body []byte) []byte {
	b = append(b, "Content-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	return append(append(b, "\r\n\r\n"...), body...)
}

// A crew is n processes of one kind.
type crew struct {
	addrs []string
	cmds  []*exec.Cmd
	stdin []io.Closer
}

// start starts n processes at once and waits for their addresses.
func start(self, kind string, n int, env func(i int) []string) (*crew, error) {
	c := &crew{}
	var outs []io.Reader
	for i := range n {
		cmd := exec.Command(self, Command, kind)
		cmd.Env = os.Environ()
		if env != nil {
			cmd.Env = append(cmd.Env, env(i)...)
		}
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		if err == nil {
			var out io.Reader
			if out, err = cmd.StdoutPipe(); err == nil {
				outs = append(outs, out)
				err = cmd.Start()
			}
		}
		if err != nil {
			c.stop()
			return nil, err
		}
		c.cmds, c.stdin = append(c.cmds, cmd), append(c.stdin, in)
	}
	for _, out := range outs {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			c.stop()
			return nil, fmt.Errorf("a worker of kind %s did not start: %w", kind, err)
		}
		c.addrs = append(c.addrs, strings.TrimSpace(line))
	}
	return c, nil
}

func (c *crew) pids() []int {
	var pids []int
	for _, cmd := range c.cmds {
		pids = append(pids, cmd.Process.Pid)
	}
	return pids
}

// stop ends the processes.
func (c *crew) stop() {
	for i, cmd := range c.cmds {
		_ = c.stdin[i].Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed, as it was told
	}
}
