package connector

import (
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Front returns what the connector shows over HTTP:
//
//	/healthz   200 while the process lives
//	/readyz    200 while messages call functions; else 503 with the reason
//	/metrics   for Prometheus
//	/replicas  the record of replicas, by the given handler; nil means none
func (c *Connector) Front(replicas http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintln(w, "ok") // a prober that left needs no answer
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := c.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.metrics.registry, promhttp.HandlerOpts{}))
	if replicas != nil {
		mux.Handle("GET /replicas", replicas)
	}
	return mux
}

// Show adds metrics of somebody else to those that Front shows. It panics if
// some of them have been added before.
func (c *Connector) Show(others prometheus.Collector) { c.metrics.registry.MustRegister(others) }
