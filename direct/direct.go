// Package direct is the route straight to a replica's address, past every
// gateway and proxy. It is the only route that can address a rank.
package direct

import (
	"context"
	"fmt"
	"strings"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A Route calls replicas at the addresses that a view gives, over connections
// that it keeps alive. What answers there may be a sheaf worker or any other
// HTTP function. It may be used concurrently.
type Route struct {
	caller wire.Caller
}

var _ sheaf.Route = (*Route)(nil)

// New returns a Route. maxReply is how long an answer may be, in bytes; 0
// means 64 MiB.
func New(maxReply int64) *Route {
	return &Route{caller: wire.Caller{HTTP: wire.NewHTTP(64), MaxReply: maxReply}}
}

// Call posts the request to req.To's address. It fails with
// sheaf.ErrNotAddressable when req names no replica, or one without a URL.
func (r *Route) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	if req.To.URL == "" {
		return nil, fmt.Errorf("direct route: the request names no replica: %w", sheaf.ErrNotAddressable)
	}
	if !strings.HasPrefix(req.To.URL, "http://") && !strings.HasPrefix(req.To.URL, "https://") {
		return nil, fmt.Errorf("direct route: address %q of replica %s is not a URL such as http://10.0.0.7:8080: %w",
			req.To.URL, req.To.ID, sheaf.ErrNotAddressable)
	}
	return r.caller.Post(ctx, strings.TrimSuffix(req.To.URL, "/")+"/", req)
}

// Close closes the connections that are idle.
func (r *Route) Close() { r.caller.HTTP.CloseIdleConnections() }
