package worker

import (
	"context"
	"errors"
	"net/http"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/peer"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// ErrNoSiblings comes from Siblings when there is no way to learn of them.
var ErrNoSiblings = errors.New("the other replicas of this function are not known: set replicas_url to the record of replicas, " +
	"as http://sheaf-connector.openfaas:8080/replicas")

// Siblings returns the group of all replicas of the function whose Func was
// given ctx, itself among them: for messages between workers, straight from one
// to the other.
//
//	group, err := worker.Siblings(ctx)
//	...
//	next := (worker.CallOf(ctx).Rank + 1) % worker.CallOf(ctx).Size
//	result, err := group.Send(ctx, next, message)
//
// What is sent arrives at the other's Func as a block does, under the same job's
// name; its answer is the result. Ranks are those of the newest view, which may
// be newer than the one in which the call that Func answers came: its Epoch
// tells. A replica that waits for itself, in a ring, needs a place of its own
// among the calls that max_inflight allows. The error is ErrNoSiblings. The
// group is the caller's, to set its Timeout and the like.
func Siblings(ctx context.Context) (*sheaf.Group, error) {
	c, _ := ctx.Value(callKey{}).(call)
	if c.siblings == nil {
		return nil, ErrNoSiblings
	}
	return &sheaf.Group{Function: c.siblings.function, Job: c.Job, Trace: c.Trace, Route: c.siblings, Resolver: c.siblings.book}, nil
}

// siblings is the way to the other replicas of a function.
type siblings struct {
	function string
	book     *peer.Book
	caller   wire.Caller
}

func newSiblings(s *serve.Server) *siblings {
	if s.Peers == nil {
		return nil
	}
	return &siblings{function: s.Function, book: s.Peers, caller: wire.Caller{Signer: s.Signer, HTTP: &http.Client{
		Transport:     s.Peer(),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}}
}

// Call posts the request to its addressee, and to nobody else.
func (s *siblings) Call(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
	ctx, u := peer.To(ctx, req.To)
	reply, err := s.caller.Post(ctx, u.String()+"/", req)
	if e, ok := errors.AsType[*sheaf.CallError](err); ok && errors.Is(err, peer.ErrOther) && ctx.Err() == nil {
		e.Fault = sheaf.FaultRefused
	}
	return reply, err
}
