package test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
)

// BenchmarkThesis prints the thesis's table (chapter 6: 1,654 bytes; block
// sizes 300, 150, 100, 50; a worker for each block) with sheaf's times beside
// its 4.58, 5.87, 10.10 and 18.77 seconds. Its own cluster had three nodes, so
// the machines differ; what a replica is, too: a pod there, a process here.
//
//	go test ./test -run '^$' -bench Thesis -benchtime 1x
//
// Cold is from zero worker replicas: the job asks for as many as it has blocks,
// and begins with the first. "All ready" is how long it took until all of them
// were. Warm is the median of 101 jobs when all are ready, with the extremes.
func BenchmarkThesis(b *testing.B) {
	in := thesisText()
	want := sequential(in)
	thesis := map[int]float64{300: 4.58, 150: 5.87, 100: 10.10, 50: 18.77}
	s := start(b, 1, nil)
	for b.Loop() {
		fmt.Printf("\n%5s  %6s  %7s  %8s  %11s  %14s  %s\n", "block", "blocks", "workers", "thesis", "sheaf cold", "(all ready)", "sheaf warm")
		for _, size := range []int{300, 150, 100, 50} {
			n := 0
			for range sheaf.SplitLines(strings.NewReader(in), size) {
				n++
			}
			job := func(query string) time.Duration {
				begun := time.Now()
				a := s.count(fmt.Sprintf("block=%d&%s", size, query), in)
				took := time.Since(begun)
				if a.body != want || a.header.Get("Sheaf-Blocks") != fmt.Sprint(n) {
					b.Fatalf("block %d: wrong answer", size)
				}
				return took
			}
			job("") // the master has met its first job
			var colds, alls []time.Duration
			for range 5 {
				s.scale(0)
				begun := time.Now()
				colds = append(colds, job(fmt.Sprintf("workers=%d", n)))
				s.waitFor("worker", n)
				alls = append(alls, time.Since(begun))
			}
			for range 20 {
				job("")
			}
			var warms []time.Duration
			for range 101 {
				warms = append(warms, job(""))
			}
			slices.Sort(colds)
			slices.Sort(alls)
			slices.Sort(warms)
			ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1000) }
			fmt.Printf("%5d  %6d  %7d  %6.2f s  %11s  %14s  %s (%s to %s)\n", size, n, n, thesis[size],
				ms(colds[2]), ms(alls[2]), ms(warms[50]), ms(warms[0]), ms(warms[100]))
		}
	}
}
