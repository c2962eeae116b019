package worker_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/worker"
)

// saving saves its work after each byte of its block.
func saving(ctx context.Context, b sheaf.Block) ([]byte, error) {
	n, _ := strconv.Atoi(string(worker.Saved(ctx)))
	if n < len(b.Data) {
		return nil, fmt.Errorf("on the way: %w", worker.Save([]byte(strconv.Itoa(n+1))))
	}
	return fmt.Appendf(nil, "%s %d", b.Data, n), nil
}

// A caller that takes states brings them back; one that does not sees the
// result only.
func TestSave(t *testing.T) {
	h := &worker.Handler{Func: saving}
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- (&serve.Server{Handler: h}).Serve(ctx, l) }()
	t.Cleanup(func() { stop(); <-ended })
	route := direct.New(0)
	t.Cleanup(route.Close)
	for name, url := range map[string]string{"net/http": server.URL, "the short way": "http://" + l.Addr().String()} {
		resp, err := http.Post(url, "text/plain", strings.NewReader("abc"))
		if err != nil {
			t.Fatal(err)
		}
		var body bytes.Buffer
		_, err = body.ReadFrom(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || body.String() != "abc 3" {
			t.Errorf("%s, plain: %s %q %v", name, resp.Status, body.String(), err)
		}
		req := &sheaf.Request{Job: "j", Function: "w", Attempt: 1, To: sheaf.Replica{ID: url, URL: url}, Body: []byte("abc")}
		for n := 1; n <= 3; n++ {
			reply, err := route.Call(t.Context(), req)
			if err != nil || !reply.More || string(reply.Body) != strconv.Itoa(n) || !reply.Verified {
				t.Fatalf("%s, part %d: %+v %v", name, n, reply, err)
			}
			req.Saved = reply.Body
		}
		if reply, err := route.Call(t.Context(), req); err != nil || reply.More || string(reply.Body) != "abc 3" {
			t.Errorf("%s, at the end: %+v %v", name, reply, err)
		}
		g := sheaf.Group{Function: "w", Route: route, Resolver: sheaf.Static{{ID: url, URL: url}}}
		if r, err := g.Send(t.Context(), 0, []byte("abcd")); err != nil || string(r.Data) != "abcd 4" || r.Attempts != 5 {
			t.Errorf("%s, sent: %+v %v", name, r, err)
		}
		n := 0
		for r, err := range g.Scatter(t.Context(), sheaf.SplitBytes(strings.NewReader(strings.Repeat("ab", 50)), 2)) {
			if err != nil || string(r.Data) != "ab 2" || r.Attempts != 3 {
				t.Errorf("%s, scattered: %+v %v", name, r, err)
			}
			n++
		}
		if n != 50 {
			t.Errorf("%s: %d of 50 blocks have a result", name, n)
		}
	}
}

// What a handler saved is no result, whoever says so on the way; and a block
// cannot be taken for a state.
func TestControl02StatesAreNoResults(t *testing.T) {
	dir := t.TempDir()
	key(t, dir)
	s, err := worker.Env(saving, signedEnv(dir))
	if err != nil {
		t.Fatal(err)
	}
	turned := func(w http.ResponseWriter, r *http.Request) {
		a := httptest.NewRecorder()
		s.ServeHTTP(a, r)
		maps.Copy(w.Header(), a.Header())
		w.Header().Del(wire.Saved)
		if a.Code == http.StatusAccepted {
			a.Code = http.StatusOK
		} else if a.Code == http.StatusOK {
			a.Code = http.StatusAccepted
			w.Header().Set(wire.Saved, "0")
		}
		w.WriteHeader(a.Code)
		_, _ = w.Write(a.Body.Bytes())
	}
	server := httptest.NewServer(http.HandlerFunc(turned))
	t.Cleanup(server.Close)
	route := direct.New(0)
	t.Cleanup(route.Close)
	route.Sign(master(t, signingKey))
	for saved, body := range map[string]string{"": "abc", "3": "abc"} { // a state, and a result
		req := &sheaf.Request{Job: "j", Function: "worker", Attempt: 1, To: sheaf.Replica{ID: "worker-1", URL: server.URL}, Body: []byte(body), Saved: []byte(saved)}
		if reply, err := route.Call(t.Context(), req); err == nil {
			t.Errorf("saved %q: %+v was taken", saved, reply)
		}
	}
	signer := master(t, signingKey)
	r, _ := block(signer, 0, "worker", "1abc")
	r.Header.Set(wire.Saved, "1") // as somebody on the way may write
	if w := serveOne(s, r); w.Code != http.StatusUnauthorized {
		t.Errorf("a block of which a part was made a state: %d %s", w.Code, w.Body)
	}
	for _, saved := range []string{"5", "-1", "x"} {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("abc"))
		r.Header.Set(wire.Saved, saved)
		if w := serveOne(&worker.Handler{Func: saving}, r); w.Code != http.StatusBadRequest {
			t.Errorf("Sheaf-Saved: %s: %d %s", saved, w.Code, w.Body)
		}
	}
}
