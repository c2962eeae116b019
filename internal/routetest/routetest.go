// Package routetest is the suite that every route must pass. It plays the
// function: a server that answers well, badly, in part, or not at all. A bug
// found in one route becomes a case here, for all of them.
package routetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// MaxReply is the limit for an answer, in bytes, that the routes under test
// must be opened with.
const MaxReply = 8 << 20

// Function is the name of the function that the suite calls.
const Function = "worker"

// Open makes a route to the function that listens at url, and says whom
// requests shall name: the zero Replica when the route cannot address one. What
// it opens it closes by t.Cleanup.
type Open = func(t *testing.T, url string) (route sheaf.Route, to sheaf.Replica)

// soon is how long what happens "at once" may take on a busy machine.
const soon = 5 * time.Second

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, Open)
	}{
		{"each call gets its own answer", ownAnswer},
		{"the function sees the envelope", envelope},
		{"cancel reaches the function", cancelReaches},
		{"deadline ends the call", deadline},
		{"status says whose fault it was", statuses},
		{"an answer that is cut is no reply", cuts},
		{"an answer that ends cleanly but early is no reply", endsEarly},
		{"a damaged answer is no reply", damaged},
		{"an answer without a digest is unverified", unverified},
		{"an empty answer needs a digest", empty},
		{"a function that was verified stays so", staysVerified},
		{"redirects are not followed", redirects},
		{"gzip is not unpacked", gzipped},
		{"8 MiB both ways", large},
		{"an answer over the limit is refused", tooLarge},
		{"nothing listens", nothingListens},
		{"another replica answers", anotherAnswers},
		{"connections are kept", keptAlive},
		{"a cut connection sends nothing twice", sentOnce},
		{"a function that went and came back is reached", comesBack},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, open) })
	}
}

// serve starts the function.
func serve(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv
}

// answer is what a sheaf worker sends.
func answer(w http.ResponseWriter, body []byte) {
	w.Header().Set(wire.Digest, wire.Sum(body))
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

// request is one for the given body with a deadline far away.
func request(to sheaf.Replica, body string) *sheaf.Request {
	req := &sheaf.Request{Job: "job-1", Function: Function, Attempt: 1, To: to, Body: []byte(body), Deadline: time.Now().Add(time.Minute)}
	if to.ID != "" {
		req.Size, req.Epoch = 1, 1
	}
	return req
}

// call makes one call that must end within a minute, as the request says.
func call(t *testing.T, route sheaf.Route, req *sheaf.Request) (*sheaf.Reply, error) {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), req.Deadline)
	defer cancel()
	return route.Call(ctx, req)
}

// must is a call whose reply has to be body.
func must(t *testing.T, route sheaf.Route, req *sheaf.Request, body string) *sheaf.Reply {
	t.Helper()
	reply, err := call(t, route, req)
	if err != nil {
		t.Fatalf("call: %v", err)
	}
	if !bytes.Equal(reply.Body, []byte(body)) {
		t.Fatalf("reply of %d bytes %.60q, want %d bytes %.60q", len(reply.Body), reply.Body, len(body), body)
	}
	return reply
}

// refused is a call that has to fail with one of the faults.
func refused(t *testing.T, route sheaf.Route, req *sheaf.Request, faults ...sheaf.Fault) *sheaf.CallError {
	t.Helper()
	reply, err := call(t, route, req)
	ce, why := fails(reply, err, faults...)
	if why != "" {
		t.Fatal(why)
	}
	return ce
}

// fails says what is wrong with an outcome that must be one of the faults.
func fails(reply *sheaf.Reply, err error, faults ...sheaf.Fault) (ce *sheaf.CallError, why string) {
	if err == nil {
		return nil, fmt.Sprintf("got a reply, %.60q, want the fault %v", reply.Body, faults)
	}
	ce, ok := errors.AsType[*sheaf.CallError](err)
	if !ok {
		return nil, fmt.Sprintf("got %T (%v), want a *sheaf.CallError with the fault %v", err, err, faults)
	}
	if ce.Err == nil {
		return ce, "the CallError has no cause"
	}
	if slices.Contains(faults, ce.Fault) {
		return ce, ""
	}
	return ce, fmt.Sprintf("got the fault %q (%v), want %v", ce.Fault, err, faults)
}

// read takes in the block, so that the server watches for the caller to leave.
func read(r *http.Request) []byte {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil
	}
	return body
}
