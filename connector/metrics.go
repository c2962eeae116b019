package connector

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are what /metrics shows. Labels are topics as functions bind to
// them, never the subjects of messages, of which there may be any number.
type metrics struct {
	registry *prometheus.Registry

	messages *prometheus.CounterVec   // topic, outcome
	calls    *prometheus.CounterVec   // function, outcome
	retries  *prometheus.CounterVec   // function
	replies  *prometheus.CounterVec   // outcome
	redriven prometheus.Counter       // messages
	reloads  *prometheus.CounterVec   // outcome
	seconds  *prometheus.HistogramVec // of a call, by function
	handling *prometheus.HistogramVec // of a message, by topic
	inflight *prometheus.GaugeVec     // messages, by topic
	bound    prometheus.Gauge         // topics
	loaded   prometheus.Gauge         // when topics were last asked for
	blocks   *prometheus.CounterVec   // of the route topic, by outcome
	bytes    *prometheus.CounterVec   // of the route topic, by direction
}

// Outcomes of a message.
const (
	outcomeOK        = "ok"        // every function did its work
	outcomeFailed    = "failed"    // some function did not
	outcomeUnmatched = "unmatched" // no function listens to the topic
	outcomeEmpty     = "empty"     // nothing in it
	outcomeReturned  = "returned"  // given back, because the connector ends
	outcomeLost      = "lost"      // thrown away by the bus or by its client
)

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	histogram := func(name, help string, labels ...string) *prometheus.HistogramVec {
		h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help,
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}}, labels)
		m.registry.MustRegister(h)
		return h
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
		m.registry.MustRegister(g)
		return g
	}
	m.messages = counter("sheaf_messages_total", "Messages that came, by topic and outcome.", "topic", "outcome")
	m.calls = counter("sheaf_calls_total", "Calls of functions, each attempt, by function and outcome.", "function", "outcome")
	m.retries = counter("sheaf_call_retries_total", "Calls that were made again after a failure, by function.", "function")
	m.replies = counter("sheaf_replies_total", "Answers to messages, by outcome.", "outcome")
	m.redriven = counter("sheaf_redriven_total", "Dead letters that were sent again.").WithLabelValues()
	m.reloads = counter("sheaf_topic_reloads_total", "Times that the topics of functions were asked for, by outcome.", "outcome")
	m.seconds = histogram("sheaf_call_seconds", "Time of one call of a function.", "function")
	m.handling = histogram("sheaf_message_seconds", "Time from a message's arrival to its outcome.", "topic")
	m.inflight = gauge("sheaf_messages_inflight", "Messages that are being worked on, by topic.", "topic")
	m.bound = gauge("sheaf_topics", "Topics that functions are bound to.").WithLabelValues()
	m.loaded = gauge("sheaf_topics_loaded_timestamp_seconds", "When the topics were last read from the gateway.").WithLabelValues()
	m.blocks = counter("sheaf_route_blocks_total", "Blocks that came by the route topic, by outcome.", "outcome")
	m.bytes = counter("sheaf_route_bytes_total", "Bytes of blocks (in) and results (out) that went by the route topic.", "direction")
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}
