package peer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/peer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon is how long what happens "at once" may take on a busy machine.
const soon = 10 * time.Second

// record serves the record of one function, as a connector does.
type record struct {
	*httptest.Server
	mu      sync.Mutex // guards all below
	list    []sheaf.View
	changed chan struct{}
	query   string
	down    bool
}

func newRecord(t *testing.T) *record {
	r := &record{changed: make(chan struct{})}
	r.Server = httptest.NewServer(r)
	t.Cleanup(func() { r.set(nil, true); r.Close() })
	return r
}

// set changes the record; down ends its streams, and lets no other begin.
func (r *record) set(list []sheaf.View, down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list, r.down = list, down
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *record) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	for {
		r.mu.Lock()
		list, down, changed := r.list, r.down, r.changed
		r.query = req.URL.RawQuery
		r.mu.Unlock()
		if down {
			w.WriteHeader(http.StatusServiceUnavailable) // means nothing in mid-stream
			fmt.Fprintln(w, "the record is away")
			return
		}
		_ = json.NewEncoder(w).Encode(list)
		fmt.Fprintln(w) // a heartbeat
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-req.Context().Done():
			return
		}
	}
}

func view(epoch uint64, replicas ...sheaf.Replica) []sheaf.View {
	return []sheaf.View{{Function: "worker.openfaas-fn", Epoch: epoch, Replicas: replicas}}
}

func book(t *testing.T, url, function, replica string) *peer.Book {
	t.Helper()
	b, err := peer.NewBook(url, function, replica)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func TestBook(t *testing.T) {
	t.Parallel()
	r := newRecord(t)
	r.set(view(7, sheaf.Replica{ID: "a", State: sheaf.Ready}, sheaf.Replica{ID: "b", State: sheaf.Ready},
		sheaf.Replica{ID: "c", State: sheaf.Starting}, sheaf.Replica{ID: "d", State: sheaf.Draining}), false)
	b := book(t, r.URL+"/replicas?token=x", "worker", "me")
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	v, err := b.Await(ctx, nil)
	if err != nil || v.Epoch != 7 || len(v.Replicas) != 2 || v.Replicas[1].ID != "b" {
		t.Fatalf("the view is %+v, %v; want the two that are ready", v, err)
	}
	if r.mu.Lock(); r.query != "function=worker&token=x&watch=true" {
		t.Errorf("it asked %q", r.query)
	}
	r.mu.Unlock()

	var epochs []uint64
	for v, err := range b.Watch(ctx, "") {
		epochs = append(epochs, v.Epoch)
		if err != nil || v.Epoch == 9 {
			break
		}
		r.set(view(9), false)
	}
	if len(epochs) != 2 || epochs[0] != 7 {
		t.Errorf("it yielded epochs %v", epochs)
	}

	// What was said last counts while the record is away; afterwards it goes on.
	r.set(nil, true)
	for range 3 {
		time.Sleep(20 * time.Millisecond)
		if v, err = b.Await(ctx, nil); err != nil || v.Epoch != 9 {
			t.Errorf("without the record: %+v, %v", v, err)
		}
	}
	brief, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	defer stop()
	if _, err := b.Await(brief, func(v sheaf.View) bool { return v.Epoch > 9 }); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, peer.ErrUnknown) {
		t.Errorf("a newer view than there is: %v", err)
	}
	r.set(view(12), false)
	if v, err = b.Await(ctx, func(v sheaf.View) bool { return v.Epoch > 9 }); err != nil || v.Epoch != 12 {
		t.Errorf("after the record came back: %+v, %v", v, err)
	}
	// A record that does not know us, as one that begins to.
	r.set([]sheaf.View{}, false)
	if v, err = b.Await(ctx, func(v sheaf.View) bool { return v.Epoch != 12 }); err != nil || len(v.Replicas) != 0 {
		t.Errorf("a function that the record lacks: %+v, %v", v, err)
	}
}

// A replica that does not know its function's name is found by its own.
func TestBookByReplica(t *testing.T) {
	t.Parallel()
	r := newRecord(t)
	r.set(view(1), false)
	b := book(t, r.URL, "", "worker-abc")
	if _, err := b.Await(t.Context(), nil); err != nil {
		t.Error(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.query != "replica=worker-abc&watch=true" {
		t.Errorf("it asked %q", r.query)
	}
}

func TestBookWithoutRecord(t *testing.T) {
	t.Parallel()
	r := newRecord(t)
	r.set(nil, true)
	nonsense := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "<html>") }))
	t.Cleanup(nonsense.Close)
	away := httptest.NewServer(http.RedirectHandler(r.URL, http.StatusFound))
	t.Cleanup(away.Close)
	for url, says := range map[string]string{r.URL: "the record is away", nonsense.URL: "invalid character", away.URL: "302", "http://127.0.0.1:1": "refused"} {
		t.Run(says, func(t *testing.T) {
			t.Parallel()
			b := book(t, url, "worker", "")
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			_, err := b.Await(ctx, nil)
			cancel()
			if !errors.Is(err, peer.ErrUnknown) || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q in it", url, err, says)
			}
			b.Close()
			if _, err := b.Await(ctx, nil); !errors.Is(err, peer.ErrUnknown) {
				t.Errorf("a book that is closed: %v", err)
			}
		})
	}
	for _, url := range []string{"", "replicas", "ftp://x/", "http://", "http://[::1"} {
		if _, err := peer.NewBook(url, "f", ""); err == nil {
			t.Errorf("no error for the record at %q", url)
		}
	}
}

// replica is a sheaf function, and what it got.
type replica struct {
	sheaf.Replica
	bodies atomic.Int64 // bytes of bodies that came
	calls  atomic.Int64
}

func newReplica(t *testing.T, id, identity string) *replica {
	r := &replica{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/_/sheaf" {
			fmt.Fprint(w, identity)
			return
		}
		r.calls.Add(1)
		n, _ := io.Copy(io.Discard, req.Body)
		r.bodies.Add(n)
		fmt.Fprint(w, id)
	}))
	t.Cleanup(srv.Close)
	r.Replica = sheaf.Replica{Function: "worker.openfaas-fn", ID: id, URL: srv.URL}
	return r
}

func post(t *testing.T, tr *http.Transport, r sheaf.Replica, body string) (string, error) {
	t.Helper()
	ctx, u := peer.To(t.Context(), r)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String()+"/", bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	return string(said), err
}

// An address that passed to somebody else gets no byte of a body (F8), even of
// one to whom it was right before.
func TestOthersGetNothing(t *testing.T) {
	t.Parallel()
	tr := peer.NewTransport()
	defer tr.CloseIdleConnections()
	a := newReplica(t, "a", `{"function":"worker","replica":"a"}`)
	for range 3 {
		if said, err := post(t, tr, a.Replica, "block"); err != nil || said != "a" {
			t.Fatalf("%q, %v", said, err)
		}
	}
	if a.calls.Load() != 3 || a.bodies.Load() != 15 {
		t.Errorf("%d calls with %d bytes came", a.calls.Load(), a.bodies.Load())
	}
	wrong := []*replica{
		a, // as another replica was there once
		newReplica(t, "other", `{"function":"worker","replica":"z"}`),
		newReplica(t, "function", `{"function":"shop","replica":"b"}`),
		newReplica(t, "plain", `hello`),
		newReplica(t, "empty", ``),
	}
	for _, w := range wrong {
		to := w.Replica
		to.ID = "b"
		if said, err := post(t, tr, to, "secret"); !errors.Is(err, peer.ErrOther) {
			t.Errorf("%s took the call for b: %q, %v", w.ID, said, err)
		}
		if w != a && w.calls.Load() > 0 || a.bodies.Load() != 15 {
			t.Errorf("%s got %d calls that are not its own", w.ID, w.calls.Load())
		}
	}
	for _, to := range []sheaf.Replica{{ID: "b", URL: "http://127.0.0.1:1"}, {ID: "b", URL: "https://127.0.0.1:1"}, {ID: "b"}, {ID: "b", URL: "http://%"}} {
		if _, err := post(t, tr, to, "secret"); !errors.Is(err, peer.ErrOther) {
			t.Errorf("nobody at %q: %v", to.URL, err)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, a.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.RoundTrip(req); err == nil {
		t.Error("a request that names no replica went somewhere")
	}
}

// Whoever listens and says nothing, or too much, does not hold a call up.
func TestSilentAddress(t *testing.T) {
	t.Parallel()
	for name, talk := range map[string]string{"silent": "", "noisy": "HTTP/1.1 200 OK\r\nContent-Length: 35\r\n\r\n" + `{"function":"worker","replica":"b"}` + "HTTP/1.1 200 OK\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var got sync.WaitGroup
			got.Go(func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = io.WriteString(c, talk)
				said, _ := io.ReadAll(c)
				if strings.Contains(string(said), "secret") {
					t.Errorf("it was told %q", said)
				}
			})
			tr := peer.NewTransport()
			defer tr.CloseIdleConnections()
			if _, err := post(t, tr, sheaf.Replica{Function: "worker", ID: "b", URL: "http://" + l.Addr().String()}, "secret"); !errors.Is(err, peer.ErrOther) {
				t.Errorf("%v", err)
			}
			got.Wait()
		})
	}
}
