// Package tracing sends spans to where OpenTelemetry's environment variables
// say. It is for the connector and the command: functions only pass W3C's trace
// context on, so that their images stay small.
package tracing

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	api "go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// Open returns a tracer whose spans go by OTLP over HTTP to the endpoint that
// OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT names, as
// in http://127.0.0.1:4318, and close, which sends the last ones, for up to
// five seconds. Without either variable the tracer records nothing. The other
// variables of OpenTelemetry's exporter hold, too.
func Open(ctx context.Context, getenv func(string) string, service, version string, log *slog.Logger) (t api.Tracer, close func(), err error) {
	if getenv("OTEL_EXPORTER_OTLP_ENDPOINT") == "" && getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" || getenv("OTEL_SDK_DISABLED") == "true" {
		return noop.NewTracerProvider().Tracer(""), func() {}, nil
	}
	out, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("environment variable OTEL_EXPORTER_OTLP_ENDPOINT cannot be used: %w", err)
	}
	if name := getenv("OTEL_SERVICE_NAME"); name != "" {
		service = name
	}
	var told atomic.Bool
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		if !told.Swap(true) {
			log.Warn("traces cannot be sent", "err", err)
		}
	}))
	p := trace.NewTracerProvider(trace.WithBatcher(out), trace.WithIDGenerator(ids{}),
		trace.WithResource(resource.NewSchemaless(attribute.String("service.name", service), attribute.String("service.version", version))))
	return p.Tracer("github.com/sheaf-project/sheaf"), func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = p.Shutdown(ctx) // the error handler has told
	}, nil
}

// carrier is any header with Get and Set.
type carrier struct {
	get func(string) string
	set func(string, string)
}

func (c carrier) Get(name string) string { return c.get(name) }
func (c carrier) Set(name, value string) { c.set(name, value) }
func (c carrier) Keys() []string         { return nil }

// Extract returns ctx within the span that a header names by traceparent.
func Extract(ctx context.Context, get func(name string) string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, carrier{get: get})
}

// Inject names the span of ctx in a header, if there is one.
func Inject(ctx context.Context, set func(name, value string)) {
	propagation.TraceContext{}.Inject(ctx, carrier{set: set})
}

// Record records a span that somebody else has begun, whose traceparent says,
// as a child of that of ctx. One of another trace, or of none, is left out.
func Record(ctx context.Context, t api.Tracer, name, traceparent string, begun, ended time.Time, attributes ...attribute.KeyValue) {
	own := api.SpanContextFromContext(ctx)
	other := api.SpanContextFromContext(Extract(context.Background(), func(name string) string {
		if name == "traceparent" {
			return traceparent
		}
		return ""
	}))
	if !other.IsValid() || other.TraceID() != own.TraceID() {
		return
	}
	_, span := t.Start(context.WithValue(ctx, spanKey{}, other.SpanID()), name, api.WithTimestamp(begun), api.WithAttributes(attributes...))
	span.End(api.WithTimestamp(ended))
}

type spanKey struct{}

// ids makes random IDs, but for a span that has one.
type ids struct{}

func (ids) NewIDs(ctx context.Context) (api.TraceID, api.SpanID) {
	var t api.TraceID
	_, _ = rand.Read(t[:]) // never fails: crypto/rand ends the program instead
	return t, ids{}.NewSpanID(ctx, t)
}

func (ids) NewSpanID(ctx context.Context, _ api.TraceID) api.SpanID {
	if id, ok := ctx.Value(spanKey{}).(api.SpanID); ok {
		return id
	}
	var id api.SpanID
	_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the program instead
	return id
}
