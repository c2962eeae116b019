package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/sheaf-project/sheaf/hello"
	"github.com/sheaf-project/sheaf/registry"
)

// watcherMetrics shows what a watcher counts.
type watcherMetrics struct{ stats func() registry.Stats }

func about(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	watcherWriting   = about("sheaf_watcher_writing", "1 if this connector's watcher is the one that writes the record of replicas.")
	watcherFunctions = about("sheaf_watcher_functions", "Functions that the watcher knows of.")
	watcherWrites    = about("sheaf_watcher_writes_total", "Records of replicas that were written.")
	watcherLast      = about("sheaf_watcher_last_write_timestamp_seconds", "When a record was last written; 0 before the first.")
	watcherFailures  = about("sheaf_watcher_write_failures_total", "Attempts to bring the record of replicas up to date that failed.")
	sourceUp         = about("sheaf_watcher_source_up", "1 if addresses of replicas come.")
	sourceFailures   = about("sheaf_watcher_source_failures_total", "Streams of addresses that broke.")
	providerFailures = about("sheaf_watcher_provider_failures_total", "Lists of functions that could not be had from the gateway.")
	scaleRequests    = about("sheaf_watcher_scale_requests_total", "Requests for more replicas.")
	scaled           = about("sheaf_watcher_scaled_total", "Requests for more replicas that raised the number.")

	announceRejected = about("sheaf_announce_rejected_total", "Announcements of replicas that were not believed, by reason.", "reason")
	announceAccepted = about("sheaf_announce_accepted_total", "Announcements of replicas that were believed.")
	announced        = about("sheaf_announced_replicas", "Replicas that have announced themselves and hold a lease.")
)

func (watcherMetrics) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{watcherWriting, watcherFunctions, watcherWrites, watcherLast, watcherFailures, sourceUp,
		sourceFailures, providerFailures, scaleRequests, scaled} {
		to <- d
	}
}

func (m watcherMetrics) Collect(to chan<- prometheus.Metric) {
	s := m.stats()
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	last := 0.0
	if !s.LastWrite.IsZero() {
		last = float64(s.LastWrite.UnixMilli()) / 1000
	}
	for d, v := range map[*prometheus.Desc]float64{watcherWriting: flag(s.Writing), watcherFunctions: float64(s.Functions), watcherLast: last, sourceUp: flag(s.SourceUp)} {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
	for d, v := range map[*prometheus.Desc]uint64{watcherWrites: s.Writes, watcherFailures: s.WriteFailures, sourceFailures: s.SourceFailures,
		providerFailures: s.ProviderFailures, scaleRequests: s.ScaleRequests, scaled: s.Scaled} {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v))
	}
}

// helloMetrics shows what a source of announcements counts.
type helloMetrics struct{ source *hello.Source }

func (helloMetrics) Describe(to chan<- *prometheus.Desc) {
	to <- announceRejected
	to <- announceAccepted
	to <- announced
}

func (m helloMetrics) Collect(to chan<- prometheus.Metric) {
	for reason, n := range m.source.Rejected() {
		to <- prometheus.MustNewConstMetric(announceRejected, prometheus.CounterValue, float64(n), reason)
	}
	accepted, replicas := m.source.Accepted()
	to <- prometheus.MustNewConstMetric(announceAccepted, prometheus.CounterValue, float64(accepted))
	to <- prometheus.MustNewConstMetric(announced, prometheus.GaugeValue, float64(replicas))
}
