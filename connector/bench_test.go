package connector_test

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/connector"
	"github.com/sheaf-project/sheaf/internal/bustest"
)

// BenchmarkFanOut has one message call five functions of 100 ms each.
func BenchmarkFanOut(b *testing.B) {
	r := newRig(b, broker.Core)
	for i := range 5 {
		r.bind(fmt.Sprint("f", i), "words", func(w http.ResponseWriter, _ *http.Request) { time.Sleep(100 * time.Millisecond) })
	}
	r.connect()
	for b.Loop() {
		r.ask("words", "x")
	}
}

// BenchmarkMessages has messages of 1 KiB call one function, 32 at a time, from
// publishing to the answer.
func BenchmarkMessages(b *testing.B) {
	for _, kind := range bustest.Kinds() {
		b.Run(string(kind), func(b *testing.B) {
			r := newRig(b, kind)
			r.bind("f", "words", nil)
			r.connect()
			body := make([]byte, 1<<10)
			var answered atomic.Int64
			sub, err := r.nc.Subscribe("answers", func(*nats.Msg) { answered.Add(1) })
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = sub.Unsubscribe() }()
			if err := r.nc.Flush(); err != nil {
				b.Fatal(err)
			}
			h := nats.Header{connector.HeaderReply: {"answers"}}
			begun := time.Now()
			n := 2000
			bodies := make([]string, n/32+1)
			for i := range bodies {
				bodies[i] = string(body)
			}
			for b.Loop() {
				answered.Store(0)
				var wg sync.WaitGroup
				for range 32 {
					wg.Go(func() { r.Publish("words", h, bodies...) })
				}
				wg.Wait()
				bustest.Until(b, "all answers", func() bool { return answered.Load() >= int64(32*len(bodies)) })
			}
			b.ReportMetric(float64(b.N*32*len(bodies))/time.Since(begun).Seconds(), "messages/s")
		})
	}
}
