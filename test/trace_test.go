package test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// A job is one trace: a span for each block under that of the command, and
// under these the spans of the connector, when blocks travel by messages.
func TestOneTraceForAJob(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	spans := map[string]*otlp.Span{} // by ID
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var req collector.ExportTraceServiceRequest
		if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(body, &req) != nil {
			t.Errorf("%s %s: %v", r.Method, r.URL.Path, err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rs := range req.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					spans[string(s.SpanId)] = s
				}
			}
		}
	}))
	defer srv.Close()
	in := text(9, 20_000)
	cmd := exec.Command(binary, "run", "--port", "0", "--route", "topic", "--block", "1KiB", "-")
	cmd.Env = append(os.Environ(), "OTEL_EXPORTER_OTLP_ENDPOINT="+srv.URL)
	cmd.Stdin = strings.NewReader(in)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil || out.String() != sequential(in) {
		t.Fatalf("%v, right answer %v: %s", err, out.String() == sequential(in), errs.String())
	}
	var blocks int
	if _, err := fmt.Sscanf(errs.String(), "%d blocks", &blocks); err != nil {
		t.Fatalf("summary is %q", errs.String())
	}
	mu.Lock()
	defer mu.Unlock()
	var root *otlp.Span
	for _, s := range spans {
		if s.Name == "sheaf run" {
			root = s
		}
	}
	if root == nil || len(root.ParentSpanId) != 0 {
		t.Fatalf("of %d spans none is the command's", len(spans))
	}
	seen, called := map[string]bool{}, 0
	for _, s := range spans {
		if !bytes.Equal(s.TraceId, root.TraceId) {
			t.Errorf("span %q is of another trace", s.Name)
		}
		parent := spans[string(s.ParentSpanId)]
		switch {
		case s == root:
		case s.Name == "block worker": // the connector's; one of an attempt that lost to another has no block
			if parent != nil && strings.HasPrefix(parent.Name, "block ") {
				called++
			}
		case strings.HasPrefix(s.Name, "block "):
			if parent != root || seen[s.Name] {
				t.Errorf("span %q is not the command's child, or comes twice", s.Name)
			}
			seen[s.Name] = true
		default:
			t.Errorf("span %q", s.Name)
		}
		if s.StartTimeUnixNano > s.EndTimeUnixNano {
			t.Errorf("span %q ends before it begins", s.Name)
		}
	}
	if len(seen) != blocks || called != blocks || blocks < 10 {
		t.Errorf("%d blocks, %d spans of blocks, %d calls under them", blocks, len(seen), called)
	}
}
