package sheaf

import (
	"context"
	"iter"
	"slices"
	"time"
)

// A Block is one piece of an input. Index counts from 0 in the order of the
// input; Offset is the place of the block's first byte in it, in bytes. Data
// is never shared with another Block: whoever receives a Block may keep it.
type Block struct {
	Index  int
	Offset int64
	Data   []byte
}

// State says where a replica is in its life.
type State string

// The states of a replica. Only a ready replica is part of a [View] that a
// [Resolver] yields; the record of replicas (package registry) holds them all.
const (
	Starting State = "starting" // runs, but does not answer yet
	Ready    State = "ready"    // answers; may be given blocks
	Draining State = "draining" // finishes what it has; gets nothing new
)

// A Replica is one running instance of a function, with an address of its own.
// ID is unique among all replicas that ever were: a function that is started
// again comes back as another replica. URL is the base of its address, as in
// "http://10.0.0.7:8080". Since is when it came into its State. The zero
// Replica stands for "any replica" in a [Request].
type Replica struct {
	Function string    `json:"function,omitempty"`
	ID       string    `json:"id"`
	URL      string    `json:"url"`
	State    State     `json:"state,omitempty"`
	Since    time.Time `json:"since,omitzero"`
}

// A View is the list of the ready replicas of one function at one epoch, in
// rank order: the rank of a replica is its place in Replicas, from 0. A later
// view has a greater Epoch. Desired is how many replicas the provider means to
// run, which may differ from the length of Replicas.
type View struct {
	Function string    `json:"function"`
	Epoch    uint64    `json:"epoch"`
	Desired  int       `json:"desired"`
	Replicas []Replica `json:"replicas"`
}

// A Request is one attempt to have a replica work on one block.
type Request struct {
	Job      string  // names the job; the same for all its blocks
	Function string  // the function that does the work
	Index    int     // of the block, from 0; in a broadcast the rank
	Attempt  int     // at this block, from 1
	To       Replica // the addressee; the zero Replica means any
	Rank     int     // of To in the view, from 0; means nothing when Size is 0
	Size     int     // of the view; 0 when no view is known
	Epoch    uint64  // of the view
	Body     []byte  // the block's data; a route must not change or keep it
	Trace    string  // W3C's traceparent of this attempt; "" when nobody traces the job
	// Saved is what the handler saved of its work at this block when it was
	// called for it before; empty at first.
	Saved []byte
	// Deadline is when the caller gives this attempt up. The context passed
	// beside the request ends then too; the route tells the replica.
	Deadline time.Time
}

// A Reply is a replica's whole answer to one [Request]. A route returns a
// Reply only for an answer that is complete: an answer that may have been cut
// is an error.
type Reply struct {
	Body []byte
	// From is the ID of the replica that answered, empty when unknown.
	From string
	// Verified says that a digest, set by the replica, proved Body whole.
	Verified bool
	// More says that the block is not done: Body is what the handler saved of its
	// work, to be brought back to any replica with the block.
	More bool
}

// A Route carries one request to one replica and brings its reply. Errors are
// [*CallError] where the route knows whose fault a failure is; any other error
// counts as a broken connection. Call must return soon after ctx ends, and may
// be called concurrently.
type Route interface {
	Call(ctx context.Context, req *Request) (*Reply, error)
}

// A Starter is a Route that can carry many calls without a goroutine for each.
// Where a Route is one, [Group.Scatter] makes use of it.
type Starter interface {
	Route
	// Start begins a call and returns soon. done is called once, later, from
	// another goroutine, when the route has let go of req and its Body; it must
	// return soon. cancel ends a call that has not ended: done then tells an
	// error, unless the answer has just come. It may be called at any time and
	// more than once. Nothing but cancel ends a call that hangs: req.Deadline is
	// for the replica to know.
	Start(req *Request, done func(*Reply, error)) (cancel func())
}

// RouteFunc is a function as a [Route].
type RouteFunc func(ctx context.Context, req *Request) (*Reply, error)

// Call calls f.
func (f RouteFunc) Call(ctx context.Context, req *Request) (*Reply, error) { return f(ctx, req) }

// A Resolver knows the replicas of functions.
//
// Watch yields the present view of the function as soon as it is known and
// then each later one, until the loop is left or ctx ends; a view that was
// overtaken may be left out. An error with which no view can be expected any
// more (such as [ErrNoFunction]) is yielded last. Watch may be called
// concurrently.
type Resolver interface {
	Watch(ctx context.Context, function string) iter.Seq2[View, error]
}

// Static is a [Resolver] whose views never change: the given replicas are
// ready, at epoch 1, whatever function is asked for. A replica without an ID
// has its URL for one; of several with one ID the first counts.
type Static []Replica

// Watch yields the one view and then waits for ctx to end.
func (s Static) Watch(ctx context.Context, function string) iter.Seq2[View, error] {
	return func(yield func(View, error) bool) {
		v := View{Function: function, Epoch: 1}
		for _, r := range s {
			if r.ID == "" {
				r.ID = r.URL
			}
			if !slices.ContainsFunc(v.Replicas, func(o Replica) bool { return o.ID == r.ID }) {
				v.Replicas = append(v.Replicas, r)
			}
		}
		v.Desired = len(v.Replicas)
		if yield(v, nil) {
			<-ctx.Done()
		}
	}
}

// A Result is what came back for one block, or from one rank of a broadcast.
type Result struct {
	Index    int           // of the block, or the rank, from 0
	Data     []byte        // the replica's answer
	From     string        // ID of the replica that gave it
	Attempts int           // made at the block so far, from 1
	Elapsed  time.Duration // of the attempt that answered
	Bytes    int           // length of the block that was sent
	Offset   int64         // of the block in the input, in bytes
	Verified bool          // a digest proved Data whole
	Trace    string        // W3C's traceparent of the attempt that answered; "" without one
}
