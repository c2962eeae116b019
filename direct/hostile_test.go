package direct_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A replica that answers blocks without reading them fills the connection up.
// Whoever begins the call that does not fit any more is not held up: a scatter
// has all its other replicas, and the deadlines, to look after.
func TestStartDoesNotWaitForTheReplica(t *testing.T) {
	answer := make(chan struct{})
	to := listen(t, func(c net.Conn, _ int64) {
		_ = c.(*net.TCPConn).SetReadBuffer(4 << 10)
		for range answer {
			_, _ = io.WriteString(c, pong)
		}
	})
	defer close(answer)
	r := open(t)
	for range 5000 {
		ended := make(chan error, 1)
		begun := make(chan func(), 1)
		go func() {
			begun <- r.Start(block(to, strings.Repeat("x", 4000)), func(_ *sheaf.Reply, err error) { ended <- err })
		}()
		var cancel func()
		select {
		case cancel = <-begun:
		case <-time.After(soon):
			t.Error("Start waits for a replica that does not read")
			return
		}
		select {
		case answer <- struct{}{}:
		case <-time.After(soon):
		}
		select {
		case <-ended:
		case <-time.After(time.Second):
			cancel()
			<-ended
			return // it was full, and nobody waited
		}
	}
	t.Fatal("the connection never was full")
}

// trouble plays a replica that answers each block with its own text, with its
// digest, in one of the ways that HTTP/1.1 knows, and then breaks off, falls
// silent or goes on, as chance has it.
func trouble(c net.Conn, chance *rand.Rand) {
	tcp := c.(*net.TCPConn)
	in := bufio.NewReader(c)
	for {
		if chance.IntN(40) == 0 {
			_ = tcp.SetLinger(0) // as one that dies: RST
			return
		}
		if chance.IntN(20) == 0 {
			return // while it is idle
		}
		body, err := take(in)
		if err != nil {
			return
		}
		head := "HTTP/1.1 200 OK\r\n" + wire.Digest + ": " + wire.Sum([]byte(body)) + "\r\n"
		text, last := "", false
		switch chance.IntN(6) {
		case 0:
			text = head + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\nX: y\r\n\r\n", len(body), body)
			if body == "" {
				text = head + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
			}
		case 1:
			text, last = head+"Connection: close\r\n\r\n"+body, true
		case 2:
			text = "HTTP/1.1 100 Continue\r\n\r\n" + head + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
		default:
			text = head + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
		}
		if chance.IntN(10) == 0 {
			text, last = text[:chance.IntN(len(text))], true
			if chance.IntN(2) == 0 {
				_ = tcp.SetLinger(0)
			}
		}
		for len(text) > 0 {
			n := len(text)
			if chance.IntN(4) == 0 {
				n = 1 + chance.IntN(n)
			}
			if _, err := io.WriteString(c, text[:n]); err != nil {
				return
			}
			text = text[n:]
			if chance.IntN(8) == 0 {
				time.Sleep(time.Duration(chance.IntN(3000)) * time.Microsecond)
			}
		}
		if last {
			return
		}
	}
}

// descriptors is how many files the process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// TestEachCallGetsItsOwnAnswer: thousands of calls at once over connections
// that break at any byte, and are canceled at any time. Who gets an answer gets
// the one to his own request, and each connection is closed in the end.
func TestEachCallGetsItsOwnAnswer(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	before := descriptors(t)
	var tos []sheaf.Replica
	for i := range 4 {
		to := listen(t, func(c net.Conn, n int64) { trouble(c, rand.New(rand.NewPCG(seed, uint64(i)<<32|uint64(n)))) })
		tos = append(tos, to)
	}
	r := direct.New(0)
	var right, broken, canceled atomic.Int64
	var wg sync.WaitGroup
	for caller := range 32 {
		wg.Go(func() {
			chance := rand.New(rand.NewPCG(seed, uint64(caller)))
			for i := range 200 {
				size := chance.IntN(8 << 10)
				if chance.IntN(10) == 0 {
					size = chance.IntN(300 << 10)
				}
				text := strings.Repeat(fmt.Sprintf("caller %d call %d ", caller, i), 1+size/16)
				ended := make(chan struct{})
				var ends atomic.Int64
				cancel := r.Start(block(tos[chance.IntN(len(tos))], text), func(reply *sheaf.Reply, err error) {
					switch {
					case ends.Add(1) > 1:
						t.Errorf("caller %d call %d ended twice", caller, i)
						return
					case err == nil && string(reply.Body) != text:
						t.Errorf("caller %d call %d got %.40q", caller, i, reply.Body)
					case err == nil:
						right.Add(1)
					case errors.Is(err, context.Canceled):
						canceled.Add(1)
					default:
						broken.Add(1)
						if ce, ok := errors.AsType[*sheaf.CallError](err); !ok || ce.Fault != sheaf.FaultLost && ce.Fault != sheaf.FaultRefused {
							t.Errorf("caller %d call %d: %v, which is no broken connection", caller, i, err)
						}
					}
					close(ended)
				})
				if chance.IntN(5) == 0 {
					time.Sleep(time.Duration(chance.IntN(2000)) * time.Microsecond)
					cancel()
				}
				select {
				case <-ended:
				case <-time.After(4 * soon):
					t.Errorf("caller %d call %d did not end", caller, i)
					cancel()
					<-ended
				}
			}
		})
	}
	wg.Wait()
	r.Close()
	t.Logf("%d right, %d broken, %d canceled", right.Load(), broken.Load(), canceled.Load())
	if right.Load() == 0 || broken.Load() == 0 || canceled.Load() == 0 {
		t.Error("it was not what it is meant to be")
	}
	for begun := time.Now(); descriptors(t) > before+len(tos)+2; time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > 2*soon {
			t.Fatalf("%d files are open, there were %d", descriptors(t), before)
		}
	}
}

// The address of a replica passed to another function, which answers with a
// digest and does not name itself: that is no answer of the replica.
func TestAddressOfSomebodyElse(t *testing.T) {
	name := wire.Replica + ": r1\r\n"
	var calls atomic.Int64
	to := listen(t, func(c net.Conn, _ int64) {
		in := bufio.NewReader(c)
		for {
			if _, err := take(in); err != nil {
				return
			}
			head := "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n" + wire.Digest + ": " + wire.Sum([]byte("pong")) + "\r\n"
			if calls.Add(1) == 1 {
				head += name
			}
			_, _ = io.WriteString(c, head+"\r\npong")
		}
	})
	r := open(t)
	if reply, err := r.Call(t.Context(), block(to, "ping")); err != nil || reply.From != "r1" {
		t.Fatalf("got %v %v", reply, err)
	}
	reply, err := r.Call(t.Context(), block(to, "ping"))
	if ce, ok := errors.AsType[*sheaf.CallError](err); !ok || ce.Fault != sheaf.FaultRefused {
		t.Errorf("got %v %v, want FaultRefused", reply, err)
	}
	other := block(to, "ping") // of a function whose replicas never named themselves
	other.Function = "any"
	if _, err := r.Call(t.Context(), other); err != nil {
		t.Error(err)
	}
}
