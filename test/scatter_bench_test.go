package test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/functions/wordcount"
)

// BenchmarkScatter measures one warm scatter of the thesis's input over N
// worker processes, a block for each, side by side: by sheaf (scheduler,
// digests, accounting, merge), and by a bare fan-out of net/http to the same
// workers that checks nothing but still merges.
//
//	go test ./test -run '^$' -bench Scatter
func BenchmarkScatter(b *testing.B) {
	in := []byte(thesisText())
	for _, n := range []int{6, 12, 35} {
		s := start(b, n, nil)
		replicas := s.replicas("worker")
		size := (len(in) + n - 1) / n
		want := sequential(string(in))
		check := func(c *wordcount.Counts) {
			var out strings.Builder
			if err := c.WriteText(&out); err != nil || out.String() != want {
				b.Fatalf("wrong answer: %v", err)
			}
		}
		b.Run(fmt.Sprintf("sheaf/%d", n), func(b *testing.B) {
			route := direct.New(0)
			defer route.Close()
			g := sheaf.Group{Function: "worker", Route: route, Resolver: sheaf.Static(replicas)}
			for b.Loop() {
				var counts wordcount.Counts
				for r, err := range sheaf.InOrder(g.Scatter(b.Context(), sheaf.SplitBytes(bytes.NewReader(in), size))) {
					if err == nil {
						err = counts.Add(r)
					}
					if err != nil {
						b.Fatal(err)
					}
				}
				check(&counts)
			}
		})
		b.Run(fmt.Sprintf("nethttp/%d", n), func(b *testing.B) {
			transport := &http.Transport{MaxIdleConnsPerHost: 4}
			defer transport.CloseIdleConnections()
			bare := &http.Client{Transport: transport}
			for b.Loop() {
				answers := make([][]byte, n)
				var wg sync.WaitGroup
				for i := range n {
					wg.Go(func() {
						block := in[min(i*size, len(in)):min((i+1)*size, len(in))]
						resp, err := bare.Post(replicas[i].URL+"/", "application/octet-stream", bytes.NewReader(block))
						if err != nil {
							b.Error(err)
							return
						}
						defer resp.Body.Close()
						answers[i], _ = io.ReadAll(resp.Body) // a wrong answer is seen below
					})
				}
				wg.Wait()
				var counts wordcount.Counts
				for i, a := range answers {
					if err := counts.Add(sheaf.Result{Index: i, Data: a}); err != nil {
						b.Fatal(err)
					}
				}
				check(&counts)
			}
		})
	}
}
