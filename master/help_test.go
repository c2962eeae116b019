package master_test

// help_test.go has what the tests of the master stand on: a master and its
// workers as real HTTP servers on loopback.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/worker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// counter is a worker as the worker function is.
func counter() http.Handler { return &worker.Handler{Func: wordcount.Count, Log: quiet} }

// doing is a worker that does f.
func doing(f worker.Func) http.Handler { return &worker.Handler{Func: f, Log: quiet} }

// plain is a function that counts words and knows nothing of sheaf.
var plain http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	for word, n := range sequential(data) {
		_, _ = fmt.Fprintf(w, "%s %d\n", word, n)
	}
})

// stack is a master with its workers.
type stack struct {
	*master.Handler
	url    string
	addr   string
	client *http.Client
}

// start runs a master that scatters over the given workers.
func start(t testing.TB, workers []http.Handler, change ...func(*master.Handler)) *stack {
	t.Helper()
	route := direct.New(0)
	t.Cleanup(route.Close)
	var replicas sheaf.Static
	for i, h := range workers {
		s := httptest.NewServer(h)
		t.Cleanup(s.Close)
		replicas = append(replicas, sheaf.Replica{Function: "worker", ID: "w" + strconv.Itoa(i), URL: s.URL, State: sheaf.Ready})
	}
	h := &master.Handler{
		Job:  master.Job{New: func() master.Answer { return new(wordcount.Counts) }, Line: wordcount.Line},
		Self: "master", Function: "worker", Resolver: replicas, Direct: route, Log: quiet,
	}
	for _, f := range change {
		f(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	t.Cleanup(client.CloseIdleConnections)
	return &stack{h, s.URL, s.Listener.Addr().String(), client}
}

// three is a stack of three word counters.
func three(t testing.TB, change ...func(*master.Handler)) *stack {
	t.Helper()
	return start(t, []http.Handler{counter(), counter(), counter()}, change...)
}

// answer is a whole answer of the master.
type answer struct {
	status int
	header http.Header
	body   string
}

func read(resp *http.Response) (answer, error) {
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(body)}, err
}

// post sends body with the given headers, as "Name: value".
func (s *stack) post(ctx context.Context, query string, body io.Reader, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/"+query, body)
	if err != nil {
		return answer{}, err
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	return read(resp)
}

// do is post for tests on whose goroutine it runs.
func (s *stack) do(t testing.TB, query, body string, headers ...string) answer {
	t.Helper()
	a, err := s.post(t.Context(), query, strings.NewReader(body), headers...)
	if err != nil {
		t.Fatalf("POST %s: %v", query, err)
	}
	return a
}

// works checks that the master still does its work.
func (s *stack) works(t testing.TB) {
	t.Helper()
	if a := s.do(t, "", "a b a\n"); a.status != http.StatusOK || a.body != "a 2\nb 1\n" {
		t.Fatalf("a job afterwards: %d %q", a.status, a.body)
	}
}

// dial opens a raw connection that sends text.
func (s *stack) dial(t testing.TB, text string) *net.TCPConn {
	t.Helper()
	c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// receive reads one answer from a raw connection.
func receive(t testing.TB, c net.Conn) answer {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodPost})
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	a, err := read(resp)
	if err != nil {
		t.Fatalf("answer %d was cut: %v", resp.StatusCode, err)
	}
	return a
}

// refused checks that a is a refusal in the form that every refusal has.
func refused(t testing.TB, a answer, status int, code string, says ...string) wire.Problem {
	t.Helper()
	var p wire.Problem
	if err := json.Unmarshal([]byte(a.body), &p); err != nil || a.status != status || p.Code != code {
		t.Fatalf("answer is %d %s %q, want %d %s", a.status, p.Code, a.body, status, code)
	}
	checkProblem(t, p, says...)
	if p.Status != status {
		t.Errorf("status in the body is %d, want %d", p.Status, status)
	}
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		t.Errorf("Content-Type is %q", got)
	}
	if got := a.header.Get("Content-Length"); got != strconv.Itoa(len(a.body)) {
		t.Errorf("Content-Length is %q, the body has %d bytes", got, len(a.body))
	}
	if got := a.header.Get("Sheaf-Code"); got != code {
		t.Errorf("Sheaf-Code is %q, want %q", got, code)
	}
	return p
}

func checkProblem(t testing.TB, p wire.Problem, says ...string) {
	t.Helper()
	if p.Type != "about:blank" || p.Title != http.StatusText(p.Status) {
		t.Errorf("type %q, title %q", p.Type, p.Title)
	}
	if p.Detail == "" || strings.ContainsAny(p.Detail, "\n\r") || strings.Contains(strings.ReplaceAll(p.Detail, "...", ""), ". ") {
		t.Errorf("detail is not one sentence: %q", p.Detail)
	}
	if len(p.Detail) > 600 {
		t.Errorf("detail has %d bytes: %q", len(p.Detail), p.Detail)
	}
	for _, secret := range []string{"goroutine ", ".go:", "/work/", "/home/", "/tmp/", "panic:", "0x"} {
		if strings.Contains(p.Detail, secret) {
			t.Errorf("detail tells %q: %q", secret, p.Detail)
		}
	}
	for _, s := range says {
		if !strings.Contains(p.Detail, s) {
			t.Errorf("detail does not say %q: %q", s, p.Detail)
		}
	}
}

// settled checks that the number of goroutines comes back to what it was.
func settled(t testing.TB, s *stack, before int, within time.Duration) {
	t.Helper()
	for end := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		s.client.CloseIdleConnections()
		if r, ok := s.Direct.(*direct.Route); ok {
			r.Close()
		}
		if runtime.NumGoroutine() <= before {
			return
		}
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, before the test %d:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// thesisText has the shape of the thesis's input: 1,654 bytes, 99 lines.
func thesisText() string {
	var b strings.Builder
	for i := range 98 {
		fmt.Fprintf(&b, "%s\n", strings.Join([]string{"this", "is", "line", strconv.Itoa(i % 41)}[:1+i%4], " "))
	}
	for b.Len() < 1651 {
		b.WriteString("is a ")
	}
	return b.String()[:1653] + "\n"
}

func sequential(data []byte) map[string]int64 {
	counts := map[string]int64{}
	for _, w := range bytes.FieldsFunc(data, func(r rune) bool { return strings.ContainsRune(" \t\n\v\f\r", r) }) {
		counts[string(w)]++
	}
	return counts
}

// want is the text answer for an input.
func want(data string) string {
	counts := sequential([]byte(data))
	var b strings.Builder
	for _, w := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), strings.Compare(a, b))
	}) {
		fmt.Fprintf(&b, "%s %d\n", w, counts[w])
	}
	return b.String()
}

// field is a part of a form; one with a file name is a file.
type field struct{ name, file, value string }

// form returns a form as a body, and its Content-Type header.
func form(t testing.TB, fields ...field) (body, header string) {
	t.Helper()
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for _, f := range fields {
		var w io.Writer
		var err error
		if f.file != "" {
			w, err = m.CreateFormFile(f.name, f.file)
		} else {
			w, err = m.CreateFormField(f.name)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.value); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String(), "Content-Type: " + m.FormDataContentType()
}
