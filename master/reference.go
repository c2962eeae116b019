package master

// reference.go reads inputs that are somewhere else: at an HTTP URL whose server
// gives ranges, or in an object store of JetStream. They are read in pieces as
// blocks are asked for, and never held whole.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf/internal/egress"
	"github.com/sheaf-project/sheaf/internal/wire"
	jobs "github.com/sheaf-project/sheaf/job"
)

const (
	rangeBytes = 8 << 20 // that are asked for at once
	rangeTries = 6       // in a row that bring nothing
)

// InputPolicy is where inputs may be beside public addresses, as
// [egress.Config.Allow] says.
func InputPolicy(allow []string) (*egress.Policy, error) {
	return egress.New(egress.Config{Param: "input", Code: "input", Calls: "inputs from", List: "the list job_input_allow of the master",
		Example: "https://example.com/file", Allow: allow})
}

// reach finds out how long an input that is somewhere else is, and what its
// owner calls the state in which it is now.
func (h *Handler) reach(ctx context.Context, ref string) (jobs.Input, *wire.Problem) {
	in := jobs.Input{URL: ref, Blocks: -1}
	if rest, is := strings.CutPrefix(ref, "nats://"); is {
		bucket, name, ok := strings.Cut(rest, "/")
		if !ok || name == "" || !slices.Contains(h.InputBuckets, bucket) {
			return in, wire.Refuse(http.StatusForbidden, "input_not_allowed",
				fmt.Sprintf("input %q must be nats://BUCKET/NAME with one of the buckets %s, which job_input_buckets sets", wire.Cut(ref), strings.Join(h.InputBuckets, ", "))).About("input")
		}
		size, version, err := h.Jobs.Object(ctx, bucket, name)
		if err != nil {
			return in, inputProblem(err)
		}
		in.Bytes, in.Version = size, version
		return in, nil
	}
	if h.Inputs == nil {
		return in, wire.Refuse(http.StatusForbidden, "input_not_allowed", "this master takes no inputs by reference; send the input").About("input")
	}
	if p := h.Inputs.Check(ctx, ref); p != nil {
		return in, p
	}
	r := h.remote(ctx, in)
	defer r.close()
	if err := r.open(0); err != nil {
		return in, inputProblem(err)
	}
	in.Bytes, in.Version = r.in.Bytes, r.in.Version
	return in, nil
}

// referred reads an input that is somewhere else.
func (h *Handler) referred(ctx context.Context, in jobs.Input) io.Reader {
	if rest, is := strings.CutPrefix(in.URL, "nats://"); is {
		bucket, name, _ := strings.Cut(rest, "/")
		return h.Jobs.ObjectInput(ctx, bucket, name, in)
	}
	return h.remote(ctx, in)
}

// inputProblem says why an input cannot be read.
func inputProblem(err error) *wire.Problem {
	if p, ok := errors.AsType[*wire.Problem](err); ok {
		return p
	}
	switch {
	case errors.Is(err, jobs.ErrChanged):
		return wire.Refuse(http.StatusConflict, "input_changed", fmt.Sprintf("%v; make a new job of it", err)).About("input")
	case errors.Is(err, jobs.ErrNotFound):
		return wire.Refuse(http.StatusUnprocessableEntity, "input_not_found", fmt.Sprintf("the input is not there: %v", err)).About("input")
	case errors.Is(err, jobs.ErrAway):
		return jobProblem(err)
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // without the URL, which may hold a signature
	}
	return wire.Refuse(http.StatusBadGateway, "input_unreachable", fmt.Sprintf("the input cannot be read: %v", err)).About("input")
}

// remote reads an input over HTTP, a range after another. One that breaks off
// is asked for again from where it broke.
type remote struct {
	ctx      context.Context
	client   *http.Client
	patience time.Duration
	in       jobs.Input // Version is "" until it is known
	at       int64
	body     io.ReadCloser
	left     int64 // of the range at hand
	stop     context.CancelFunc
	stalled  *time.Timer
}

func (h *Handler) remote(ctx context.Context, in jobs.Input) *remote {
	return &remote{ctx: ctx, client: h.Inputs.Client(0), patience: h.Patience, in: in}
}

// refusedInput is a status that another try would bring again.
type refusedInput struct{ error }

func (r refusedInput) Unwrap() error { return r.error }

// open asks for the range that begins at the given byte.
func (r *remote) open(at int64) error {
	ctx, stop := context.WithCancel(r.ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.in.URL, nil)
	if err != nil {
		stop()
		return refusedInput{err}
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", at, at+rangeBytes-1))
	req.Header.Set("User-Agent", "sheaf")
	timer := time.AfterFunc(r.patience, stop)
	resp, err := r.client.Do(req)
	if err != nil {
		timer.Stop()
		stop()
		if p, ok := errors.AsType[*wire.Problem](err); ok { // the name leads to where it must not
			return refusedInput{p}
		}
		return err
	}
	r.body, r.stop, r.stalled = resp.Body, stop, timer
	if err := r.judge(resp, at); err != nil {
		r.close()
		return err
	}
	return nil
}

// judge looks whether an answer is the range that was asked for, of the input
// that the job was accepted with.
func (r *remote) judge(resp *http.Response, at int64) error {
	no := func(status int, code, detail string) error {
		return refusedInput{wire.Refuse(status, code, detail).About("input")}
	}
	changed := func(what string) error {
		return refusedInput{fmt.Errorf("%w: %s", jobs.ErrChanged, what)}
	}
	known := r.in.Version != ""
	switch s := resp.StatusCode; {
	case s == http.StatusPartialContent:
	case s == http.StatusOK && !known && resp.ContentLength == 0,
		s == http.StatusRequestedRangeNotSatisfiable && !known && resp.Header.Get("Content-Range") == "bytes */0":
		r.in.Bytes, r.in.Version = 0, "empty"
		return nil
	case s == http.StatusOK && known:
		return changed("its server gives no ranges of it any more")
	case s == http.StatusOK:
		return no(http.StatusUnprocessableEntity, "input_without_ranges", "the input's server gives no ranges of it (Accept-Ranges: bytes); send the input, or have it where ranges can be had")
	case s == http.StatusRequestedRangeNotSatisfiable && known:
		return changed("it is shorter than it was")
	case s == http.StatusTooManyRequests || s >= 500:
		return fmt.Errorf("its server answers %s", resp.Status)
	case s >= 300 && s < 400:
		return no(http.StatusUnprocessableEntity, "input_redirected", "the input's server redirects, which is not followed; name the address that it leads to")
	default:
		return no(http.StatusUnprocessableEntity, "input_not_found", fmt.Sprintf("the input's server answers %s", resp.Status))
	}
	span, total, _ := strings.Cut(strings.TrimPrefix(resp.Header.Get("Content-Range"), "bytes "), "/")
	first, last, _ := strings.Cut(span, "-")
	a, errA := strconv.ParseInt(first, 10, 64)
	b, errB := strconv.ParseInt(last, 10, 64)
	n, errN := strconv.ParseInt(total, 10, 64)
	if errA != nil || errB != nil || errN != nil || a != at || b < a || b >= n {
		return no(http.StatusBadGateway, "input_unreachable", fmt.Sprintf("the input's server gives the range %q, and was asked for byte %d on", wire.Cut(resp.Header.Get("Content-Range")), at))
	}
	v := version(resp.Header)
	switch {
	case v == "":
		return no(http.StatusUnprocessableEntity, "input_without_version", "the input's server tells neither a strong ETag nor Last-Modified of it, so nobody could see that it changes while it is read; send the input")
	case known && (v != r.in.Version || n != r.in.Bytes):
		return changed(fmt.Sprintf("it was %s with %d bytes, and is %s with %d", wire.Cut(r.in.Version), r.in.Bytes, wire.Cut(v), n))
	}
	r.in.Version, r.in.Bytes, r.left = v, n, min(b-a+1, rangeBytes)
	return nil
}

// version is what a server calls the state of what it gives.
func version(h http.Header) string {
	if tag := h.Get("ETag"); tag != "" && !strings.HasPrefix(tag, "W/") {
		return tag
	}
	return h.Get("Last-Modified")
}

func (r *remote) close() {
	if r.body != nil {
		r.stalled.Stop()
		r.stop()
		_ = r.body.Close() // what was wanted of it was read
		r.body = nil
	}
}

// Read reads on. Its error is a *wire.Problem.
func (r *remote) Read(p []byte) (int, error) {
	for tries := 0; ; {
		if r.at == r.in.Bytes {
			r.close()
			return 0, io.EOF
		}
		var err error
		if r.body == nil {
			err = r.open(r.at)
		}
		if err == nil {
			r.stalled.Reset(r.patience)
			var n int
			n, err = r.body.Read(p[:min(int64(len(p)), r.left)])
			r.stalled.Stop() // whoever reads may take its time
			r.at += int64(n)
			r.left -= int64(n)
			if r.left == 0 || err != nil {
				r.close()
			}
			if n > 0 {
				return n, nil
			}
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
		}
		if final, ok := errors.AsType[refusedInput](err); ok {
			return 0, inputProblem(final.error)
		}
		if tries++; tries == rangeTries || r.ctx.Err() != nil {
			return 0, inputProblem(err)
		}
		select {
		case <-time.After(50 * time.Millisecond << tries):
		case <-r.ctx.Done():
		}
	}
}
