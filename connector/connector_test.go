package connector_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/connector"
	"github.com/sheaf-project/sheaf/internal/bustest"
)

func TestOneFunctionAnswers(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		r.bind("upper", "words", func(w http.ResponseWriter, req *http.Request) {
			body, _ := io.ReadAll(req.Body)
			w.Header().Set("X-From-Function", req.Header.Get("X-Color"))
			w.Header().Set("Content-Type", "text/upper")
			if req.Header.Get("X-Topic") != "words" || req.Header.Get("X-Connector") != "sheaf" || req.Header.Get("X-Call-Id") == "" ||
				req.Header.Get("Sheaf-Results") != "" || req.Header.Get("Content-Type") != "text/plain" {
				t.Errorf("the function saw %v", req.Header)
			}
			_, _ = io.WriteString(w, strings.ToUpper(string(body)))
		})
		r.connect()
		m := r.ask("words", "hello", "X-Color", "red", "Connection", "close")
		if string(m.Data) != "HELLO" || m.Header.Get("X-From-Function") != "red" || m.Header.Get("Content-Type") != "text/upper" ||
			m.Header.Get(connector.HeaderFunction) != "upper.openfaas-fn" || m.Header.Get(connector.HeaderStatus) != "200" {
			t.Errorf("answer is %v %q", m.Header, m.Data)
		}
		s := r.set(r.ask("words", "hello", connector.HeaderResults, "set"))
		if len(s.Results) != 1 || s.Results[0].Body != "HELLO" || !s.Results[0].OK || s.Topic != "words" {
			t.Errorf("set is %+v", s)
		}
	})
}

func TestEveryFunctionIsCalledAtOnce(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		const n = 5
		var here, most atomic.Int64
		all := make(chan struct{})
		for i := range n {
			r.bind(fmt.Sprint("f", i), "words", func(w http.ResponseWriter, _ *http.Request) {
				// Nobody answers before all are called: one after another this
				// would never end.
				if most.Store(max(most.Load(), here.Add(1))); here.Load() == n {
					close(all)
				}
				select {
				case <-all:
				case <-time.After(bustest.Soon):
				}
				_, _ = io.WriteString(w, fmt.Sprint(i))
			})
		}
		r.connect()
		s := r.set(r.ask("words", "x"))
		if len(s.Results) != n || s.Code != "" {
			t.Fatalf("set is %+v", s)
		}
		for i, res := range s.Results {
			if res.Function != fmt.Sprintf("f%d.openfaas-fn", i) || res.Body != fmt.Sprint(i) || !res.OK || res.Status != 200 || res.Attempts != 1 {
				t.Errorf("result %d is %+v", i, res)
			}
		}
	})
}

func TestNobodyAndNothing(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		r.bind("f", "words", nil)
		r.connect(func(c *connector.Connector) { c.Topics = []string{"words", "unbound"} })
		r.listens("unbound")
		m := r.ask("unbound", "x")
		if s := r.set(m); s.Code != "no_function_matched" || len(s.Results) != 0 || !strings.Contains(s.Error, "unbound") || m.Header.Get(connector.HeaderCode) != s.Code {
			t.Errorf("nobody: %+v", s)
		}
		if s := r.set(r.ask("words", "")); s.Code != "empty_message" {
			t.Errorf("nothing: %+v", s)
		}
		if calls := r.called("f"); len(calls) != 0 {
			t.Errorf("the function was called with %q", calls)
		}
	})
}

func TestWildcardsAndSeveralTopics(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		r.bind("one", "orders.new, events.a", nil)
		r.bind("star", "orders.*", nil)
		r.bind("tail", "orders.>", nil)
		r.bind("bad", ">", nil)
		r.connect()
		want := map[string][]string{
			"orders.new": {"one", "star", "tail"}, "orders.old": {"star", "tail"}, "orders.a.b": {"tail"}, "events.a": {"one"},
		}
		if r.Kind == broker.Streaming {
			// A function that is bound by a wildcard is called for the topics
			// that some other function names.
			delete(want, "orders.old")
			delete(want, "orders.a.b")
		}
		for topic, names := range want {
			s := r.set(r.ask(topic, "x", connector.HeaderResults, "set"))
			var got []string
			for _, res := range s.Results {
				got = append(got, strings.TrimSuffix(res.Function, ".openfaas-fn"))
			}
			if !slices.Equal(got, names) {
				t.Errorf("%s called %v, want %v", topic, got, names)
			}
		}
		for _, name := range []string{"one", "star", "tail"} {
			for _, body := range r.called(name) {
				if body != "x" {
					t.Errorf("%s got %q", name, body)
				}
			}
		}
		if n := len(r.called("one")); n != 2 {
			t.Errorf("one was called %d times, want 2", n)
		}
		if n := len(r.called("bad")); n != 0 {
			t.Errorf("a function that is bound to everything was called %d times", n)
		}
	})
}

// A message that comes by two topics calls each function once, and gets one
// answer.
func TestTopicsThatOverlap(t *testing.T) {
	t.Parallel()
	for _, kind := range []broker.Type{broker.Core, broker.JetStream} { // the third knows no wildcards
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, kind)
			r.bind("f", "a.*.c", nil)
			r.bind("g", "a.b.*", nil)
			r.connect()
			time.Sleep(2500 * time.Millisecond) // until both topics are trusted
			s := r.set(r.ask("a.b.c", "x"))
			if len(s.Results) != 2 || s.Code != "" {
				t.Errorf("set is %+v", s)
			}
			if m := r.ask("a.x.c", "y"); string(m.Data) != "f got y" {
				t.Errorf("answer is %q", m.Data)
			}
			if m := r.ask("a.b.x", "z"); string(m.Data) != "g got z" {
				t.Errorf("answer is %q", m.Data)
			}
			time.Sleep(300 * time.Millisecond)
			if f, g := r.called("f"), r.called("g"); len(f) != 2 || len(g) != 2 {
				t.Errorf("f was called with %q, g with %q", f, g)
			}
		})
	}
}

func TestTopicsChangeOnTheFly(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		r.bind("f", "one", nil)
		c, _ := r.connect()
		if m := r.ask("one", "1"); string(m.Data) != "f got 1" {
			t.Errorf("answer is %q", m.Data)
		}
		r.bind("f", "two", nil)
		r.bind("g", "three", nil)
		r.listens("two")
		r.listens("three")
		if m := r.ask("two", "2"); string(m.Data) != "f got 2" {
			t.Errorf("answer is %q", m.Data)
		}
		if m := r.ask("three", "3"); string(m.Data) != "g got 3" {
			t.Errorf("answer is %q", m.Data)
		}
		bustest.Until(t, "nobody listens to one", func() bool { return r.Listeners("one") == 0 })
		r.remove("g")
		bustest.Until(t, "the topic is gone", func() bool { return !slices.Contains(c.Lookup.Topics(), "three") })
	})
}

func TestFailuresAreTriedAgainThenBuried(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		var failing atomic.Bool
		failing.Store(true)
		r.bind("good", "words", nil)
		r.bind("bad", "words", func(w http.ResponseWriter, req *http.Request) {
			if failing.Load() {
				http.Error(w, "no such user", http.StatusInternalServerError)
				return
			}
			_, _ = io.WriteString(w, "ok now")
		})
		r.bind("worse", "words", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "never", http.StatusUnprocessableEntity) })
		r.connect()
		s := r.set(r.ask("words", "x"))
		if s.Code != "calls_failed" || len(s.Results) != 3 {
			t.Fatalf("set is %+v", s)
		}
		for _, want := range []connector.Result{{Function: "bad.openfaas-fn", Status: 500, Attempts: 3}, {Function: "good.openfaas-fn", OK: true, Status: 200, Attempts: 1},
			{Function: "worse.openfaas-fn", Status: 422, Attempts: 1}} {
			i := slices.IndexFunc(s.Results, func(r connector.Result) bool { return r.Function == want.Function })
			if got := s.Results[i]; got.OK != want.OK || got.Status != want.Status || got.Attempts != want.Attempts {
				t.Errorf("%+v, want %+v", got, want)
			}
		}
		if r.Kind == broker.Core {
			return // who asked was told
		}
		failing.Store(false)
		r.remove("worse")
		bustest.Until(t, "a redrive", func() bool {
			m, err := r.nc.Request(connector.RedriveSubject, []byte("words"), bustest.Soon)
			return err == nil && strings.Contains(string(m.Data), `"redriven":1`)
		})
		bustest.Until(t, "bad did its work", func() bool { return len(r.called("bad")) == 4 })
		if calls := r.called("good"); len(calls) != 1 {
			t.Errorf("good was called %d times", len(calls))
		}
	})
}

// A dead letter is its message with a reason, and so a little longer.
func TestADeadLetterThatIsTooLong(t *testing.T) {
	t.Parallel()
	r := newRig(t, broker.JetStream)
	r.bind("f", "words", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, strings.Repeat("no ", 60), http.StatusUnprocessableEntity)
	})
	c, _ := r.connect()
	front := httptest.NewServer(c.Front(nil))
	defer front.Close()
	counts := func(outcome, n string) bool {
		resp, err := http.Get(front.URL + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return strings.Contains(string(body), `sheaf_messages_total{outcome="`+outcome+`",topic="words"} `+n+"\n")
	}
	r.Publish("words", nil, strings.Repeat("x", 1<<20-300)) // fits without the whole reason
	bustest.Until(t, "the first is done with", func() bool { return counts("failed", "1") })
	if counts("lost", "1") {
		t.Error("a dead letter was lost that could have been kept")
	}
	r.Publish("words", nil, strings.Repeat("x", 1<<20-50)) // does not fit at all
	bustest.Until(t, "the second is done with", func() bool { return counts("failed", "2") && counts("lost", "1") })
	time.Sleep(300 * time.Millisecond)
	if n := len(r.called("f")); n != 2 {
		t.Errorf("the function was called %d times by 2 messages", n)
	}
	m, err := r.nc.Request(connector.RedriveSubject, []byte("words"), bustest.Soon)
	if err != nil || !strings.Contains(string(m.Data), `"redriven":1`) {
		t.Errorf("redrive: %v %v", m, err)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestTheGatewayIsAway(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		r.bind("f", "words", nil)
		c, _ := r.connect()
		for _, status := range []int{500, 502, 401} {
			r.breaks(status)
			time.Sleep(300 * time.Millisecond) // several reloads
			if c.Ready() != nil || !slices.Contains(c.Lookup.Topics(), "words") {
				t.Fatalf("status %d: ready %v, topics %v", status, c.Ready(), c.Lookup.Topics())
			}
			r.breaks(0)
		}
		r.breaks(503)
		answered := make(chan string, 1)
		go func() { answered <- string(r.ask("words", "x").Data) }()
		time.Sleep(time.Second) // far longer than all attempts at a function that fails
		r.breaks(0)
		select {
		case got := <-answered:
			if got != "f got x" {
				t.Errorf("answer is %q", got)
			}
		case <-time.After(bustest.Soon):
			t.Error("no answer after the gateway is back")
		}
	})
}

func TestTheBusIsAway(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		r.bind("f", "words", nil)
		c, _ := r.connect()
		for i := range 2 {
			r.Stop()
			bustest.Until(t, "the connector sees it", func() bool { return c.Ready() != nil })
			r.Start()
			bustest.Until(t, "the connector is back", func() bool { return c.Ready() == nil })
			r.listens("words")
			bustest.Until(t, "the client is back", r.nc.IsConnected)
			if m := r.ask("words", fmt.Sprint(i)); string(m.Data) != fmt.Sprint("f got ", i) {
				t.Errorf("answer is %q", m.Data)
			}
		}
	})
}

func TestTheEnd(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		began := make(chan struct{}, 10)
		r.bind("slow", "words", func(w http.ResponseWriter, _ *http.Request) {
			began <- struct{}{}
			time.Sleep(500 * time.Millisecond)
			_, _ = io.WriteString(w, "done")
		})
		_, stop := r.connect()
		answered := make(chan string, 1)
		go func() { answered <- string(r.ask("words", "x").Data) }()
		<-began
		stop()
		select {
		case got := <-answered:
			if got != "done" {
				t.Errorf("answer is %q", got)
			}
		case <-time.After(bustest.Soon):
			t.Error("what was being worked on was dropped")
		}
		if n := len(r.called("slow")); n != 1 {
			t.Errorf("called %d times", n)
		}
	})
}

func TestTwoShareTheLoad(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		var mu sync.Mutex
		seen := map[string]int{}
		r.bind("f", "words", func(w http.ResponseWriter, req *http.Request) {
			body, _ := io.ReadAll(req.Body)
			mu.Lock()
			seen[string(body)]++
			mu.Unlock()
			time.Sleep(5 * time.Millisecond)
		})
		few := func(c *connector.Connector) { c.Inflight = 4 }
		r.connect(few)
		_, stop := r.connect(few)
		const n = 200
		bodies := make([]string, n)
		for i := range bodies {
			bodies[i] = fmt.Sprint("m", i)
		}
		r.Publish("words", nil, bodies[:n/2]...)
		stop() // one leaves in the middle
		r.Publish("words", nil, bodies[n/2:]...)
		bustest.Until(t, "all messages", func() bool { mu.Lock(); defer mu.Unlock(); return len(seen) == n })
		mu.Lock()
		defer mu.Unlock()
		for body, times := range seen {
			if times != 1 {
				t.Errorf("%s was worked on %d times", body, times)
			}
		}
	})
}

// Nothing is recorded here; the trace goes on all the same.
func TestTraceContextIsPassedOn(t *testing.T) {
	onAll(t, func(t *testing.T, r *rig) {
		const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
		r.bind("f", "words", func(w http.ResponseWriter, req *http.Request) {
			_, _ = io.WriteString(w, req.Header.Get("Traceparent"))
		})
		r.connect()
		if m := r.ask("words", "x", "traceparent", parent); string(m.Data) != parent {
			t.Errorf("the function saw the trace %q", m.Data)
		}
		if m := r.ask("words", "x"); string(m.Data) != "" {
			t.Errorf("the function saw the trace %q of a message without one", m.Data)
		}
	})
}

func TestFront(t *testing.T) {
	t.Parallel()
	r := newRig(t, broker.Core)
	r.bind("f", "words", nil)
	c := connector.NewConnector()
	front := httptest.NewServer(c.Front(nil))
	defer front.Close()
	get := func(path string) (int, string) {
		resp, err := http.Get(front.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	if status, _ := get("/healthz"); status != 200 {
		t.Errorf("healthz is %d", status)
	}
	if status, body := get("/readyz"); status != 503 || !strings.Contains(body, "NATS") {
		t.Errorf("readyz is %d %q", status, body)
	}
	ready, _ := r.connect()
	r.ask("words", "x")
	front.Config.Handler = ready.Front(nil)
	if status, _ := get("/readyz"); status != 200 {
		t.Errorf("readyz is %d", status)
	}
	bustest.Until(t, "the outcome is counted", func() bool {
		_, body := get("/metrics")
		return strings.Contains(body, `sheaf_messages_total{outcome="ok",topic="words"} 1`) &&
			strings.Contains(body, `sheaf_calls_total{function="f.openfaas-fn",outcome="ok"} 1`) && strings.Contains(body, "sheaf_topics 1")
	})
	http.DefaultClient.CloseIdleConnections()
}
