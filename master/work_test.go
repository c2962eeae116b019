package master_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/worker"
)

// forms of the answer, and how a failed job looks in each.
var accepts = []string{"text/plain", "application/json", "application/x-ndjson", "text/event-stream"}

// failed checks that a job in any form ended with a problem of the given code.
func failed(t *testing.T, accept string, a answer, status int, code string, says ...string) wire.Problem {
	t.Helper()
	var p wire.Problem
	switch {
	case a.status != http.StatusOK:
		return refused(t, a, status, code, says...)
	case accept == "text/event-stream":
		list := events(t, a.body)
		last := list[len(list)-1]
		if err := json.Unmarshal([]byte(last.data), &p); err != nil || last.name != "error" {
			t.Fatalf("%s: the last event is %v", accept, last)
		}
	case accept == "application/x-ndjson":
		var last struct {
			Error *wire.Problem `json:"error"`
			Done  *bool         `json:"done"`
		}
		lines := strings.Split(strings.TrimSuffix(a.body, "\n"), "\n")
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || last.Error == nil || last.Done == nil || *last.Done {
			t.Fatalf("%s: the last line is %q", accept, lines[len(lines)-1])
		}
		p = *last.Error
	default:
		t.Fatalf("%s: answer is 200 %q, want %d %s", accept, a.body, status, code)
	}
	if p.Status != status || p.Code != code {
		t.Fatalf("%s: the problem is %+v, want %d %s", accept, p, status, code)
	}
	checkProblem(t, p, says...)
	return p
}

func TestWorkerFails(t *testing.T) {
	poison := []byte("poison")
	for _, c := range []struct {
		name    string
		worker  http.Handler
		status  int
		code    string
		missing bool
		says    []string
	}{
		{"it says no", doing(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
			if bytes.Contains(b.Data, poison) {
				return nil, worker.Reject(errors.New("this block is poison"))
			}
			return wordcount.Count(ctx, b)
		}), 424, "blocks_failed", true, []string{"block 2 ", "this block is poison"}},
		{"it fails", doing(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
			if bytes.Contains(b.Data, poison) {
				return nil, errors.New("out of luck")
			}
			return wordcount.Count(ctx, b)
		}), 424, "blocks_failed", true, []string{"out of luck", "3 attempts"}},
		{"it panics", doing(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
			if bytes.Contains(b.Data, poison) {
				panic("no")
			}
			return wordcount.Count(ctx, b)
		}), 424, "blocks_failed", true, nil},
		{"it answers a page", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if data, err := io.ReadAll(r.Body); err == nil && bytes.Contains(data, poison) {
				_, _ = io.WriteString(w, "<html><body>It works!</body></html>\n")
				return
			}
			_, _ = io.WriteString(w, "a 1\n")
		}), 502, "bad_result", false, []string{"block 2 ", "replica w0", "word and a count"}},
	} {
		for _, accept := range accepts {
			t.Run(c.name+", "+accept, func(t *testing.T) {
				s := start(t, []http.Handler{c.worker})
				a := s.do(t, "?block=2", "a\nb\npoison\nc\n", "Accept: "+accept)
				p := failed(t, accept, a, c.status, c.code, c.says...)
				if p.Job == "" || p.Job != a.header.Get("Sheaf-Job") {
					t.Errorf("job is %q, the header says %q", p.Job, a.header.Get("Sheaf-Job"))
				}
				if !c.missing {
					return
				}
				list, ok := p.Missing.([]any)
				if !ok || len(list) != 1 {
					t.Fatalf("missing is %v", p.Missing)
				}
				m := list[0].(map[string]any)
				if m["block"] != 2.0 || m["offset"] != 4.0 || m["bytes"] != 7.0 || m["error"] == "" || m["attempts"].(float64) < 1 {
					t.Errorf("missing is %v", m)
				}
			})
		}
	}
}

func TestRecordTooLong(t *testing.T) {
	s := three(t)
	in := "a b\nc\n" + strings.Repeat("x", sheaf.DefaultMaxRecord+1) + "\n"
	a := s.do(t, "?block=1KiB", in)
	if p := refused(t, a, 422, "record_too_long", "byte 6", "16777216"); p.Limit != 16777216.0 {
		t.Errorf("limit is %v", p.Limit)
	}
	s.works(t)
}

// views is a resolver that yields the same things to everybody, and then waits.
type views struct {
	list []sheaf.View
	err  error
}

func (v views) Watch(ctx context.Context, _ string) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		for _, view := range v.list {
			if !yield(view, nil) {
				return
			}
		}
		if v.err != nil {
			yield(sheaf.View{}, v.err)
			return
		}
		<-ctx.Done()
	}
}

func TestNoFunction(t *testing.T) {
	for _, accept := range accepts {
		s := three(t, func(h *master.Handler) { h.Resolver = views{err: fmt.Errorf("look: %w", sheaf.ErrNoFunction)} })
		a := s.do(t, "?function=other", "a b\n", "Accept: "+accept)
		if p := failed(t, accept, a, 404, "function_not_found", `"other"`); p.Param != "function" {
			t.Errorf("param is %q", p.Param)
		}
	}
}

func TestNoReplicas(t *testing.T) {
	for _, accept := range accepts {
		s := three(t, func(h *master.Handler) {
			h.Resolver, h.ReplicaWait = views{list: []sheaf.View{{Epoch: 1}}}, 50*time.Millisecond
		})
		a := s.do(t, "", "a b\n", "Accept: "+accept)
		failed(t, accept, a, 503, "no_replicas", "50ms", "worker")
		if a.status == 503 && a.header.Get("Retry-After") != "5" {
			t.Errorf("Retry-After is %q", a.header.Get("Retry-After"))
		}
	}
}

func TestReplicasThatRefuse(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := "http://" + l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s := three(t, func(h *master.Handler) {
		h.Resolver, h.ReplicaWait = sheaf.Static{{ID: "gone", URL: dead}}, 100*time.Millisecond
	})
	refused(t, s.do(t, "", "a b\n"), 503, "no_replicas")
}

func TestJobTimeout(t *testing.T) {
	s := start(t, []http.Handler{hanging(nil), hanging(nil), hanging(nil), hanging(nil)})
	for range 10 {
		for _, accept := range accepts {
			begun := time.Now()
			a := s.do(t, "?timeout=30ms&block=2", "a\nb\nc\nd\ne\n", "Accept: "+accept)
			if p := failed(t, accept, a, 504, "job_timeout", "30ms"); p.Param != "timeout" || p.Limit != "30ms" {
				t.Errorf("problem is %+v", p)
			}
			if d := time.Since(begun); d > 2*time.Second {
				t.Errorf("it took %v", d)
			}
		}
	}
}

// hanging is a worker that works until its caller goes, and says so to left.
func hanging(left chan<- time.Time) http.Handler {
	return doing(func(ctx context.Context, _ sheaf.Block) ([]byte, error) {
		<-ctx.Done()
		if left != nil {
			left <- time.Now()
		}
		return nil, ctx.Err()
	})
}

func TestGatewayRoute(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle("POST /function/worker", http.StripPrefix("/function/worker", counter()))
	s := start(t, []http.Handler{mux}, func(h *master.Handler) {
		route := gateway.NewRoute(h.Resolver.(sheaf.Static)[0].URL, 0)
		t.Cleanup(route.Close)
		h.Gateway, h.Resolver = route, views{err: sheaf.ErrNoFunction}
	})
	in := thesisText()
	if a := s.do(t, "?route=gateway&block=100", in); a.status != 200 || a.body != want(in) {
		t.Errorf("answer is %d %q", a.status, a.body)
	}
}

// While an upload stalls, a block of it fails: the answer comes at once.
func TestBlockFailsWhileTheUploadStalls(t *testing.T) {
	long := strings.Repeat("very ", 500) + "bad" // makes an answer that net/http does not hold back
	for _, why := range []string{"bad", long} {
		for _, accept := range accepts {
			for _, head := range []string{"Content-Length: 100000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n2710\r\n"} {
				t.Run(fmt.Sprintf("%.4s %s %.8s", why, accept, head), func(t *testing.T) {
					s := start(t, []http.Handler{doing(func(context.Context, sheaf.Block) ([]byte, error) {
						return nil, worker.Reject(errors.New(why))
					})})
					before := runtime.NumGoroutine()
					begun := time.Now()
					c := s.dial(t, "POST /?block=1000&split=bytes HTTP/1.1\r\nHost: m\r\nAccept: "+accept+"\r\n"+head+strings.Repeat("a b\n", 2500)+"\r\n")
					if strings.HasPrefix(accept, "text/event") {
						r := bufio.NewReader(c)
						for line := ""; line != "event: error\n"; {
							var err error
							if line, err = r.ReadString('\n'); err != nil {
								t.Fatal(err)
							}
						}
					} else {
						a := receive(t, c)
						if a.status != 424 || !strings.Contains(a.body, "blocks_failed") {
							t.Fatalf("answer is %d %q", a.status, a.body)
						}
					}
					if d := time.Since(begun); d > time.Second {
						t.Errorf("the answer took %v", d)
					}
					if err := c.Close(); err != nil {
						t.Fatal(err)
					}
					settled(t, s, before, 3*time.Second)
				})
			}
		}
	}
}

// The rest of an upload whose job has failed is not the next request.
func TestRestOfAnUploadIsNoRequest(t *testing.T) {
	const hidden = "POST /?block=1 HTTP/1.1\r\nHost: m\r\nContent-Length: 2\r\n\r\na\n"
	for _, accept := range accepts {
		t.Run(accept, func(t *testing.T) {
			t.Parallel()
			release := make(chan struct{})
			s := start(t, []http.Handler{doing(func(context.Context, sheaf.Block) ([]byte, error) {
				<-release
				return nil, worker.Reject(errors.New("bad"))
			})})
			c := s.dial(t, fmt.Sprintf("POST /?block=10&split=bytes HTTP/1.1\r\nHost: m\r\nAccept: %s\r\nContent-Length: %d\r\n\r\n0123456789x", accept, 11+2*len(hidden)))
			close(release)
			time.Sleep(50 * time.Millisecond)
			_, _ = io.WriteString(c, hidden) // the master may have ended the connection
			time.Sleep(2500 * time.Millisecond)
			_, _ = io.WriteString(c, hidden)
			_ = c.CloseWrite() // as above
			all, _ := io.ReadAll(c)
			if n := strings.Count(string(all), "HTTP/1.1 "); n != 1 {
				t.Errorf("%d answers came: %q", n, all)
			}
		})
	}
}

func TestClientGone(t *testing.T) {
	for _, c := range []struct {
		name, head, body string
	}{
		{"during the upload", "Content-Length: 100000", "a b\nc d\n"},
		{"during a chunked upload", "Transfer-Encoding: chunked", "8\r\na b\nc d\n\r\n"},
		{"during the work", "Content-Length: 8", "a b\nc d\n"},
		{"during a form's upload", "Content-Type: multipart/form-data; boundary=B\r\nContent-Length: 9000",
			"--B\r\nContent-Disposition: form-data; name=file\r\n\r\na b\nc d\n" + strings.Repeat("x\n", 4000)},
	} {
		for _, accept := range accepts {
			t.Run(c.name+", "+accept, func(t *testing.T) {
				left := make(chan time.Time, 100)
				begun := make(chan struct{}, 100)
				hang := hanging(left)
				s := start(t, []http.Handler{http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					begun <- struct{}{}
					hang.ServeHTTP(w, r)
				})})
				before := runtime.NumGoroutine()
				conn := s.dial(t, "POST /?block=4&split=bytes HTTP/1.1\r\nHost: m\r\nAccept: "+accept+"\r\n"+c.head+"\r\n\r\n"+c.body)
				select {
				case <-begun:
				case <-time.After(5 * time.Second):
					t.Fatal("no block reached the worker")
				}
				gone := time.Now()
				if err := conn.Close(); err != nil {
					t.Fatal(err)
				}
				select {
				case at := <-left:
					if d := at.Sub(gone); d > time.Second {
						t.Errorf("the worker was told after %v", d)
					}
				case <-time.After(5 * time.Second):
					t.Fatal("the worker was never told")
				}
				settled(t, s, before, 3*time.Second)
			})
		}
	}
}

func TestManyUploadsAtOnce(t *testing.T) {
	s := three(t)
	for _, n := range []int{2, 20} {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), 7))
				var in strings.Builder
				for range 20_000 {
					fmt.Fprintf(&in, "u%d-%d%c", i, rng.IntN(300), " \n"[rng.IntN(2)])
				}
				split := []string{"lines", "bytes"}[i%2]
				a, err := s.post(t.Context(), "?block=3000&split="+split, strings.NewReader(in.String()))
				if err != nil || a.status != http.StatusOK || a.body != want(in.String()) {
					t.Errorf("upload %d of %d: %v %d %.200q", i, n, err, a.status, a.body)
				}
			})
		}
		wg.Wait()
	}
}

func descriptors() int {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0 // not on this system
	}
	return len(list)
}

func TestThousandJobsLeaveNothing(t *testing.T) {
	s := three(t)
	in := thesisText()
	right := want(in)
	before, files := 0, 0
	for i := range 1000 {
		accept := accepts[i%2]
		if i%50 == 0 {
			accept = accepts[i/50%4]
		}
		a := s.do(t, "?block=300", in, "Accept: "+accept)
		if a.status != 200 || accept == "text/plain" && a.body != right {
			t.Fatalf("job %d: %d %q", i, a.status, a.body)
		}
		if i == 100 {
			before, files = runtime.NumGoroutine(), descriptors()
		}
	}
	// The connections to the workers that are kept alive may differ a little.
	if now := runtime.NumGoroutine(); now > before+20 {
		t.Errorf("%d goroutines after 100 jobs, %d after 1000", before, now)
	}
	if now := descriptors(); now > files+20 {
		t.Errorf("%d descriptors after 100 jobs, %d after 1000", files, now)
	}
}

// faulty is an answer that panics, or fails, where it is told to.
type faulty struct {
	wordcount.Counts
	where string
	err   error
}

func (f *faulty) at(where string) error {
	if f.where != where {
		return nil
	}
	if f.err == nil {
		panic("a bug in " + where)
	}
	return f.err
}

func (f *faulty) Add(r sheaf.Result) error {
	return errors.Join(f.at("Add"), f.Counts.Add(r))
}
func (f *faulty) WriteText(w io.Writer) error {
	return errors.Join(f.at("WriteText"), f.Counts.WriteText(w))
}
func (f *faulty) WriteJSON(w io.Writer) error {
	return errors.Join(f.at("WriteJSON"), f.Counts.WriteJSON(w))
}

func TestPanicInTheJob(t *testing.T) {
	for _, c := range []struct {
		where   string
		err     error
		accepts []string
		status  int
		code    string
	}{
		{"New", nil, []string{accepts[0], accepts[3]}, 500, "job_panicked"},
		{"Add", nil, []string{accepts[0], accepts[1], accepts[3]}, 500, "job_panicked"},
		{"Line", nil, accepts[2:3], 500, "job_panicked"},
		{"WriteText", nil, []string{accepts[0], accepts[3]}, 500, "job_panicked"},
		{"WriteJSON", nil, accepts[1:2], 500, "job_panicked"},
		{"WriteJSON", errors.New("no room"), accepts[1:2], 500, "job_failed"},
		{"WriteText", errors.New("no room"), accepts[3:], 500, "job_failed"},
	} {
		for _, accept := range c.accepts {
			t.Run(fmt.Sprintf("%s %v %s", c.where, c.err, accept), func(t *testing.T) {
				var on atomic.Bool
				on.Store(true)
				s := three(t, func(h *master.Handler) {
					line := h.Job.Line
					h.Job.New = func() master.Answer {
						if !on.Load() {
							return new(wordcount.Counts)
						}
						f := &faulty{where: c.where, err: c.err}
						_ = f.at("New") // it panics
						return f
					}
					h.Job.Line = func(r sheaf.Result, mayCut bool) (json.RawMessage, error) {
						if c.where == "Line" {
							panic("a bug in Line")
						}
						return line(r, mayCut)
					}
				})
				failed(t, accept, s.do(t, "", "a b\nc\n", "Accept: "+accept), c.status, c.code)
				on.Store(false)
				s.works(t)
			})
		}
	}
}

// A panic in Add must not wait for an upload that stalls.
func TestPanicWhileTheUploadStalls(t *testing.T) {
	s := three(t, func(h *master.Handler) { h.Job.New = func() master.Answer { return &faulty{where: "Add"} } })
	before := runtime.NumGoroutine()
	begun := time.Now()
	c := s.dial(t, "POST /?block=4&split=bytes HTTP/1.1\r\nHost: m\r\nContent-Length: 1000\r\n\r\na b\nc d\n")
	refused(t, receive(t, c), 500, "job_panicked")
	if d := time.Since(begun); d > time.Second {
		t.Errorf("the answer took %v", d)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	settled(t, s, before, 3*time.Second)
}
