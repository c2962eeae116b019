package sheaf_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	"github.com/sheaf-project/sheaf"
)

const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

func TestIsTrace(t *testing.T) {
	t.Parallel()
	if !sheaf.IsTrace(traceparent) {
		t.Error("the example of the recommendation is refused")
	}
	for _, bad := range []string{"", "00", traceparent + "-", strings.ToUpper(traceparent), "01" + traceparent[2:], "ff" + traceparent[2:],
		strings.Replace(traceparent, "b7ad6b7169203331", "0000000000000000", 1), strings.Replace(traceparent, "0af7651916cd43dd8448eb211c80319c", strings.Repeat("0", 32), 1),
		strings.Replace(traceparent, "-b7", "_b7", 1), strings.Replace(traceparent, "af", "xf", 1), strings.Replace(traceparent, "-01", "\r\n01", 1)} {
		if sheaf.IsTrace(bad) {
			t.Errorf("%q is taken", bad)
		}
	}
}

// Each attempt is a span of its own in the job's trace, and the result names
// that which answered.
func TestTrace(t *testing.T) {
	t.Parallel()
	for _, parent := range []string{traceparent, ""} {
		var mu sync.Mutex
		seen := map[string]int{} // index of the block, by trace
		g := sheaf.Group{Function: "worker", Trace: parent, NoHedge: true, Route: sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			mu.Lock()
			defer mu.Unlock()
			if _, twice := seen[req.Trace]; twice && parent != "" {
				t.Errorf("two attempts are span %s", req.Trace)
			}
			seen[req.Trace] = req.Index
			if req.Attempt == 1 {
				return nil, &sheaf.CallError{Fault: sheaf.FaultTask, Err: context.Canceled}
			}
			return &sheaf.Reply{Body: []byte("x")}, nil
		})}
		n := 0
		for r, err := range g.Scatter(t.Context(), sheaf.SplitBytes(strings.NewReader("0123456789"), 1)) {
			if err != nil {
				t.Fatal(err)
			}
			n++
			mu.Lock()
			index, ok := seen[r.Trace]
			mu.Unlock()
			if parent == "" {
				if r.Trace != "" {
					t.Errorf("a job without a trace has the span %s", r.Trace)
				}
				continue
			}
			if !ok || index != r.Index || r.Trace[:36] != parent[:36] || r.Trace == parent || !sheaf.IsTrace(r.Trace) {
				t.Errorf("block %d was answered in span %q", r.Index, r.Trace)
			}
		}
		if n != 10 || parent != "" && len(seen) != 20 {
			t.Errorf("%d results, %d spans", n, len(seen))
		}
	}
	g := sheaf.Group{Trace: "nonsense", Route: sheaf.RouteFunc(nil)}
	for _, err := range g.Scatter(t.Context(), sheaf.SplitBytes(strings.NewReader("x"), 1)) {
		if err == nil || !strings.Contains(err.Error(), "traceparent") {
			t.Errorf("a trace that is none: %v", err)
		}
	}
}
