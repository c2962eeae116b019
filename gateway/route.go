package gateway

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A Route calls functions through an OpenFaaS gateway, which picks the replica:
// it works wherever the gateway does, and costs what the gateway costs. It
// carries no credentials: /function/ is open on every gateway. It may be used
// concurrently.
type Route struct {
	base   string
	caller wire.Caller
}

var _ sheaf.Route = (*Route)(nil)

// NewRoute returns a Route over the gateway at base, as in
// "http://gateway.openfaas:8080". maxReply is how long an answer may be, in
// bytes; 0 means 64 MiB.
func NewRoute(base string, maxReply int64) *Route {
	return &Route{
		base:   strings.TrimSuffix(base, "/") + "/function/",
		caller: wire.Caller{HTTP: wire.NewHTTP(256), MaxReply: maxReply},
	}
}

// Sign makes the route sign what it sends and take signed answers only, unless
// s is lax. It must come before the first Call.
func (r *Route) Sign(s *wire.Signer) { r.caller.Signer = s }

// Call posts the request to the function. It fails with
// sheaf.ErrNotAddressable when req names a replica.
func (r *Route) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	if req.To.ID != "" {
		return nil, fmt.Errorf("gateway route: %w", sheaf.ErrNotAddressable)
	}
	return r.caller.Post(ctx, r.base+url.PathEscape(req.Function), req)
}

// Close closes the connections that are idle.
func (r *Route) Close() { r.caller.HTTP.CloseIdleConnections() }
