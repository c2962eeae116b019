package serve_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/sheaf-project/sheaf/internal/peer"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// whoami answers who it is, with the path, query and ranks that it saw.
func whoami(id string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		h := r.Header
		fmt.Fprintf(w, "%s %s to=%s %s/%s@%s hop=%s %s", id, r.URL.RequestURI(), h.Get(wire.To), h.Get(wire.Rank), h.Get(wire.Size), h.Get(wire.Epoch), h.Get(wire.Hop), body)
	})
}

func TestRanks(t *testing.T) { bothWays(t, testRanks) }

func testRanks(t *testing.T, way way) {
	var list atomic.Value // of the record
	record := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, list.Load())
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(record.Close) // after the servers, which follow it
	urls := map[string]string{}
	for _, id := range []string{"a", "b"} {
		book, err := peer.NewBook(record.URL, "worker", id)
		if err != nil {
			t.Fatal(err)
		}
		urls[id] = way.run(t, &serve.Server{Handler: whoami(id), Function: "worker", Replica: id, Peers: book}).url
	}
	list.Store(fmt.Sprintf(`[{"function":"worker.openfaas-fn","epoch":5,"replicas":[{"id":"a","url":%q,"state":"ready"},{"id":"b","url":%q,"state":"ready"}]}]`,
		urls["a"], urls["b"]))
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	post := func(url, path string, header ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+path, strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		said, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(said)
	}
	for _, c := range []struct{ at, path, want string }{
		{"a", "/-/0/x%2Fy?q=1", "a /x%2Fy?q=1 to= 0/2@5 hop= body"},                      // its own rank
		{"b", "/-/0/x%2Fy?q=1", "a /x%2Fy?q=1 to=worker.openfaas-fn/a 0/2@5 hop=1 body"}, // the other's
		{"a", "/-/1", "b / to=worker.openfaas-fn/b 1/2@5 hop=1 body"},                    // no slash is the root
		{"a", "/-/1/-/0/", "b /-/0/ to=worker.openfaas-fn/b 1/2@5 hop=1 body"},           // once only
		{"b", "/-/00/?a;b=%zz", "a /?a;b=%zz to=worker.openfaas-fn/a 0/2@5 hop=1 body"},  // a query that cannot be parsed
		{"b", "/-/1/", "b / to= 1/2@5 hop= body"},                                        // its own
		{"b", "/-/0//x/../y", "a //x/../y to=worker.openfaas-fn/a 0/2@5 hop=1 body"},     // a path is not cleaned
		{"a", "/-/1/%C3%A4", "b /%C3%A4 to=worker.openfaas-fn/b 1/2@5 hop=1 body"},       // nor decoded
		{"a", "/-/1/?x", "b /?x to=worker.openfaas-fn/b 1/2@5 hop=1 body"},
		{"b", "/-/0/?", "a / to=worker.openfaas-fn/a 0/2@5 hop=1 body"},
		{"a", "/-/0/", "a / to= 0/2@5 hop= body"},
	} {
		// What a client says about ranks does not count.
		resp, said := post(urls[c.at], c.path, wire.Rank, "7", wire.Epoch, "1", wire.Size, "9", wire.To, "shop/x")
		if resp.StatusCode != 200 || said != c.want {
			t.Errorf("%s at %s: %d %q, want %q", c.path, c.at, resp.StatusCode, said, c.want)
		}
		if h := resp.Header; h.Get(wire.Size) != "2" || h.Get(wire.Epoch) != "5" || len(h[wire.Replica]) != 1 || h.Get(wire.Replica) != said[:1] {
			t.Errorf("%s at %s: the answer has %v", c.path, c.at, h)
		}
	}
	if resp, said := post(urls["a"], "/-/2/"); resp.StatusCode != 404 || !strings.Contains(said, `"limit":2`) || resp.Header.Get(wire.Code) != wire.CodeNoRank {
		t.Errorf("a rank too many: %d %s", resp.StatusCode, said)
	}
	// A call that was passed on to the wrong one stops there.
	if resp, _ := post(urls["a"], "/x", wire.Hop, "1", wire.To, "worker/b"); resp.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("a call for b at a: %d", resp.StatusCode)
	}
}

func TestRanksThatAreNotKnown(t *testing.T) {
	s := way("net/http").run(t, &serve.Server{Handler: whoami("a"), Replica: "a"})
	resp, err := s.http.Get(s.url + "/-/0/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var p wire.Problem
	if err := json.NewDecoder(resp.Body).Decode(&p); err != nil || resp.StatusCode != 503 || p.Code != wire.CodeNoRecord || !strings.Contains(p.Detail, "replicas_url") {
		t.Errorf("%d %+v, %v", resp.StatusCode, p, err)
	}
	if _, err := serve.Env(env("replicas_url", "connector:8081")); err == nil || !strings.Contains(err.Error(), "replicas_url") {
		t.Errorf("a replicas_url that is none: %v", err)
	}
	if s, err := serve.Env(env("replicas_url", "http://connector:8081/replicas")); err != nil || s.Peers == nil {
		t.Errorf("%v", err)
	}
}
