package function

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func shout(_ context.Context, b sheaf.Block) ([]byte, error) { return bytes.ToUpper(b.Data), nil }

// vars is an environment in which nobody listens at nats_url: a function starts
// before its neighbours.
func vars(pairs ...string) func(string) string {
	env := map[string]string{"nats_url": "nats://127.0.0.1:1"}
	for i := 0; i < len(pairs); i += 2 {
		env[pairs[i]] = pairs[i+1]
	}
	return func(name string) string { return env[name] }
}

func TestRoles(t *testing.T) {
	for _, c := range []struct {
		name    string
		env     func(string) string
		handler string
		limit   int // max_inflight of the process
	}{
		{"master", vars("sheaf_role", "master", "max_jobs", "7"), "*master.Handler", 7},
		{"worker", vars("sheaf_role", "worker", "max_inflight", "3"), "*worker.Handler", 3},
		{"both", vars("OPENFAAS_NAME", "upper", "max_inflight", "3"), "function.roles", 0},
		{"both, of a nameless function", vars("worker_function", "upper"), "function.roles", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, stop, err := env(Function{Map: shout}, c.env)
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			if got := fmt.Sprintf("%T", s.Handler); got != c.handler || s.MaxInflight != c.limit {
				t.Errorf("handler is %s with max_inflight %d, want %s with %d", got, s.MaxInflight, c.handler, c.limit)
			}
		})
	}
	for _, c := range []struct {
		name string
		f    Function
		env  func(string) string
		says string
	}{
		{"no Map", Function{}, vars("sheaf_role", "master"), "has no Map"},
		{"another role", Function{Map: shout}, vars("sheaf_role", "slave"), `sheaf_role is "slave"; expected master or worker, or nothing for both`},
		{"both without a name", Function{Map: shout}, vars(), `worker_function is ""; expected the name of this function`},
		{"both with a bad worker", Function{Map: shout}, vars("OPENFAAS_NAME", "a", "max_block", "x"), `max_block is "x"`},
		{"both with a bad master", Function{Map: shout}, vars("OPENFAAS_NAME", "a", "max_jobs", "x"), `max_jobs is "x"`},
		{"both at a bad port", Function{Map: shout}, vars("OPENFAAS_NAME", "a", "port", "x"), `port is "x"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := env(c.f, c.env)
			if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v, want one line with %q", err, c.says)
			}
		})
	}
}

// A replica with both roles scatters over itself, even if there is but one place
// for a job and one for a block.
func TestBothRoles(t *testing.T) {
	f := Function{Map: func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		if worker.CallOf(ctx).Job == "" {
			return nil, errors.New("a block without a job")
		}
		return shout(ctx, b)
	}}
	route := direct.New(0)
	defer route.Close()
	h := &master.Handler{Job: f.job(), Function: "upper", Direct: route}
	blocks, err := worker.Env(f.Map, vars("max_inflight", "1"))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(&serve.Server{Function: "upper", Replica: "r1",
		Handler: roles{inputs: &serve.Server{Handler: h, MaxInflight: 1}, blocks: blocks}})
	defer srv.Close()
	h.Resolver = sheaf.Static{{Function: "upper", ID: "r1", URL: srv.URL, State: sheaf.Ready}}

	in := strings.Repeat("the quick brown fox\n", 500)
	for range 3 {
		if got := post(t, srv.URL+"?block=300&function=upper", in, ""); got != strings.ToUpper(in) {
			t.Fatalf("answer has %d bytes, want %d in capitals: %.200s", len(got), len(in), got)
		}
	}
	// A block that comes from elsewhere is for the worker.
	if got := post(t, srv.URL, "a b", "j1"); got != "A B" {
		t.Errorf("the worker said %q", got)
	}
	resp, err := http.Get(srv.URL + "/_/sheaf")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var who serve.Identity
	if err := json.NewDecoder(resp.Body).Decode(&who); err != nil || who.Function != "upper" || who.Replica != "r1" {
		t.Errorf("it says that it is %+v, %v", who, err)
	}
}

// post posts until there is a place: one that answered counts for a moment more.
func post(t *testing.T, url, body, job string) string {
	t.Helper()
	for {
		status, answer := try(t, url, body, job)
		switch status {
		case http.StatusOK:
			return answer
		case http.StatusTooManyRequests:
		default:
			t.Fatalf("status %d: %s", status, answer)
		}
	}
}

func try(t *testing.T, url, body, job string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if job != "" {
		req.Header.Set(wire.Job, job)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

func written(t *testing.T, write func(io.Writer) error) string {
	t.Helper()
	var first, second bytes.Buffer
	if err := errors.Join(write(&first), write(&second)); err != nil || first.String() != second.String() {
		t.Fatalf("wrote %q, then %q: %v", &first, &second, err)
	}
	return first.String()
}

func TestConcat(t *testing.T) {
	for _, c := range []struct {
		results       []string
		text, jsonOut string
	}{
		{nil, "", "\"\"\n"},
		{[]string{"a<b", "", "\u2028c\n"}, "a<b\u2028c\n", "\"a<b\\u2028c\\n\"\n"},
		{[]string{"\xff", "\x00"}, "\xff\x00", "{\"base64\":\"/wA=\"}\n"},
	} {
		a := Concat()
		for _, r := range c.results {
			if err := a.Add(sheaf.Result{Data: []byte(r)}); err != nil {
				t.Fatal(err)
			}
		}
		if got := written(t, a.WriteText); got != c.text {
			t.Errorf("text is %q, want %q", got, c.text)
		}
		if got := written(t, a.WriteJSON); got != c.jsonOut {
			t.Errorf("JSON is %q, want %q", got, c.jsonOut)
		}
	}
	full := &concat{data: make([]byte, MaxConcat)}
	if err := full.Add(sheaf.Result{Data: []byte("x")}); err == nil || !strings.Contains(err.Error(), "268435456 bytes") {
		t.Errorf("one byte over the limit: %v", err)
	}
}

func TestJSON(t *testing.T) {
	merge := JSON(func(all, next map[string]int) (map[string]int, error) {
		for k, n := range next {
			if all[k] += n; all[k] > 10 {
				return nil, fmt.Errorf("too many of %s", k)
			}
		}
		return all, nil
	})
	for _, c := range []struct {
		results []string
		want    string
	}{
		{nil, "null\n"},
		{[]string{`{"a":1}`}, `{"a":1}` + "\n"},
		{[]string{`{"a":1}`, `{"<":2}`, ` {"a":3} `}, `{"<":2,"a":4}` + "\n"},
		{[]string{`{"a":1}`, `{"a":`}, "not the JSON"},
		{[]string{`{"a":1}`, `[1]`}, "not the JSON"},
		{[]string{``}, "not the JSON"},
		{[]string{`{"a":9}`, `{"a":9}`}, "too many of a"},
	} {
		a := merge()
		var err error
		for _, r := range c.results {
			err = errors.Join(err, a.Add(sheaf.Result{Data: []byte(r)}))
		}
		if err != nil {
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q: error is %v, want %q", c.results, err, c.want)
			}
			continue
		}
		if got := written(t, a.WriteText); got != c.want || written(t, a.WriteJSON) != got {
			t.Errorf("%q: answer is %q, want %q", c.results, got, c.want)
		}
	}
}

func TestLine(t *testing.T) {
	for in, want := range map[string]string{
		"":               `""`,
		"two\nlines <b>": `"two\nlines <b>"`,
		" {\"a\": 1}\n":  `{"a":1}`,
		"\xff":           `{"base64":"/w=="}`,
	} {
		got, err := line(sheaf.Result{Data: []byte(in)}, true)
		if err != nil || string(got) != want {
			t.Errorf("line of %q is %s, %v; want %s", in, got, err, want)
		}
	}
}

// What an author's Split may be: the library's own, or one that yields the same
// memory again and again.
func TestSplitOfAnAuthor(t *testing.T) {
	paragraphs := func(in io.Reader, size int) iter.Seq2[sheaf.Block, error] {
		return func(yield func(sheaf.Block, error) bool) {
			buf := make([]byte, 10)
			for {
				n, err := io.ReadFull(in, buf)
				if n > 0 && !yield(sheaf.Block{Index: 77, Data: buf[:n]}, nil) {
					return
				}
				if err == io.EOF || err == io.ErrUnexpectedEOF {
					return
				}
				if err != nil {
					yield(sheaf.Block{}, err)
					return
				}
			}
		}
	}
	in := strings.Repeat("0123456789abcdef\n", 100)
	for name, split := range map[string]func(io.Reader, int) iter.Seq2[sheaf.Block, error]{
		"own": paragraphs, "library's": sheaf.SplitBytes,
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewServer(&worker.Handler{Func: shout})
			defer w.Close()
			route := direct.New(0)
			defer route.Close()
			m := httptest.NewServer(&master.Handler{Job: Function{Map: shout, Split: split}.job(), Function: "w", Direct: route,
				Resolver: sheaf.Static{{Function: "w", ID: "w0", URL: w.URL, State: sheaf.Ready}}})
			defer m.Close()
			if got := post(t, m.URL, in, ""); got != strings.ToUpper(in) {
				t.Errorf("answer is %.100q", got)
			}
		})
	}
}
