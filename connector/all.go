package connector

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// toAll calls every replica of a function, and takes a receipt from each. It is
// complete by the record of replicas, not by a timer: each replica of one view
// has answered, or is named with the reason why it has not.
func (c *Connector) toAll(ctx context.Context, m *broker.Message, b Binding, id string, r *Result) error {
	if c.Resolver == nil {
		return &sheaf.CallError{Fault: sheaf.FaultRejected, Err: errors.New(
			"every replica shall get the message (annotation " + AnnotationDeliver + "), and the connector has no record of replicas; turn its watcher on")}
	}
	var mu sync.Mutex // guards answers
	answers := map[string]*wire.Passed{}
	group := sheaf.Group{
		Function: b.Function, Resolver: c.Resolver, Timeout: c.Timeout, Attempts: c.Attempts,
		Route: sheaf.RouteFunc(func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			h := c.header(ctx, m, id)
			for line := range strings.Lines(string(wire.Seal(req, time.Now()).Append(nil))) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
				h[name] = []string{value}
			}
			got, err := c.caller.Pass(ctx, strings.TrimSuffix(req.To.URL, "/")+"/", h, req.Body)
			if err != nil {
				return nil, err
			}
			if got.From != "" && got.From != req.To.ID {
				return nil, &sheaf.CallError{Fault: sheaf.FaultRefused, From: got.From, Err: errors.New("its address is now another replica's")}
			}
			mu.Lock()
			answers[req.To.ID] = got
			mu.Unlock()
			return &sheaf.Reply{Body: got.Body, From: req.To.ID}, nil
		}),
	}
	r.Receipts = nil
	var failed error
	missing := 0
	for res, err := range group.Broadcast(ctx, m.Data) {
		rank, ok := errors.AsType[*sheaf.RankError](err)
		switch {
		case err == nil:
			n := res.Index
			r.Receipts = append(r.Receipts, Result{Function: b.Function, OK: true, Replica: res.From, Rank: &n, Attempts: res.Attempts, Millis: float64(res.Elapsed.Microseconds()) / 1000})
		case ok:
			n := rank.Rank
			missing++
			r.Receipts = append(r.Receipts, Result{Function: b.Function, Replica: rank.Replica, Rank: &n, Attempts: rank.Attempts, Error: rank.Err.Error()})
		default:
			failed = err
		}
	}
	slices.SortFunc(r.Receipts, func(a, b Result) int { return *a.Rank - *b.Rank })
	for i := range r.Receipts {
		if got := answers[r.Receipts[i].Replica]; r.Receipts[i].OK && got != nil {
			r.Receipts[i].take(got.Status, got.Header, got.Body)
		}
	}
	switch {
	case errors.Is(failed, sheaf.ErrNoReplica), errors.Is(failed, sheaf.ErrNoFunction):
		return &sheaf.CallError{Fault: sheaf.FaultRefused, Err: failed}
	case failed != nil:
		return failed
	case missing > 0:
		// Those that have it must not get it twice: the receipts say who lacks it.
		for _, receipt := range r.Receipts {
			if !receipt.OK {
				return &sheaf.CallError{Fault: sheaf.FaultRejected, Err: fmt.Errorf("%d of %d replicas gave no receipt; rank %d (replica %s): %s",
					missing, len(r.Receipts), *receipt.Rank, receipt.Replica, receipt.Error)}
			}
		}
	}
	r.OK, r.Status = true, 200
	return nil
}
