package master

// params.go reads what a request asks for: the query, and the fields of a form.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/registry"
)

// Parameters of a job, as its query names them.
var parameters = []string{"block", "workers", "split", "delimiter", "function", "route", "verify", "timeout", "output", "tolerate", "input"}

// params are the parameters of one request.
type params map[string]string

func (ps params) set(name, value string) *wire.Problem {
	if !slices.Contains(parameters, name) {
		return wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter,
			fmt.Sprintf("parameter %q is not known; known are %s", wire.Cut(name), strings.Join(parameters, ", "))).About(wire.Cut(name))
	}
	if _, twice := ps[name]; twice {
		return wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter,
			fmt.Sprintf("parameter %s is given twice", name)).About(name)
	}
	ps[name] = value
	return nil
}

func readQuery(raw string) (params, *wire.Problem) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter, fmt.Sprintf("the query cannot be read: %v", err))
	}
	ps := params{}
	for _, name := range slices.Sorted(maps.Keys(values)) { // of two faults always the same is told
		for _, v := range values[name] {
			if p := ps.set(name, v); p != nil {
				return nil, p
			}
		}
	}
	return ps, nil
}

func bad(param, format string, a ...any) *wire.Problem {
	return wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter, fmt.Sprintf(format, a...)).About(param)
}

func outOfRange(param, value string, least, most any) *wire.Problem {
	return wire.Refuse(http.StatusUnprocessableEntity, "out_of_range",
		fmt.Sprintf("%s is %q, and must be from %v to %v", param, wire.Cut(value), least, most)).
		About(param).Within(map[string]any{"min": least, "max": most})
}

func unknown(param, value string, known []string) *wire.Problem {
	return wire.Refuse(http.StatusUnprocessableEntity, "unknown_"+param,
		fmt.Sprintf("%s %q is not known; known are %s", param, wire.Cut(value), strings.Join(known, ", "))).About(param).Within(known)
}

// oneOf returns the parameter, or the first of known when it is not given.
func (ps params) oneOf(param string, known ...string) (string, *wire.Problem) {
	v, given := ps[param]
	if !given {
		return known[0], nil
	}
	if !slices.Contains(known, v) {
		return "", unknown(param, v, known)
	}
	return v, nil
}

// Bounds of what a block size is when none is asked for.
const (
	leastAuto = 1 << 10
	mostAuto  = 1 << 20
)

// AutoBlock is the block size for an input of n bytes when none is asked for:
// a sixteenth of it, but at least 1 KiB and at most 1 MiB, so that a few
// replicas have a few blocks each; 256 KiB when n is not known (below 0).
func AutoBlock(n int64) int {
	if n < 0 {
		return 256 << 10
	}
	return int(min(max(n/16, leastAuto), mostAuto))
}

func (h *Handler) block(ps params, up *upload, by string) (int, *wire.Problem) {
	length := up.length
	v, given := ps["block"]
	if !given || v == "auto" {
		return AutoBlock(up.total), nil // a form is little longer than its file
	}
	size, err := sheaf.ParseSize(v)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && (size < 1 || size > h.MaxBlock):
		return 0, outOfRange("block", v, 1, h.MaxBlock)
	case err != nil:
		return 0, bad("block", "block is %q, and must be a whole number of bytes, such as 300, 64KiB or 1MiB", wire.Cut(v))
	}
	// Only blocks of bytes can be counted before they are read.
	if blocks := (length + int64(size) - 1) / int64(size); by == "bytes" && blocks > int64(h.MaxBlocks) {
		return 0, wire.Refuse(http.StatusUnprocessableEntity, "too_many_blocks",
			fmt.Sprintf("block %q makes %d blocks of %d bytes, more than %d; block=%d is large enough",
				wire.Cut(v), blocks, length, h.MaxBlocks, (length-1)/int64(h.MaxBlocks)+1)).About("block").Within(h.MaxBlocks)
	}
	return size, nil
}

func (h *Handler) workers(ps params) (int, *wire.Problem) {
	v, given := ps["workers"]
	if !given {
		return 0, nil
	}
	n, err := strconv.Atoi(v)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && (n < 1 || n > h.MaxWorkers):
		return 0, outOfRange("workers", v, 1, h.MaxWorkers)
	case err != nil:
		return 0, bad("workers", "workers is %q, and must be a whole number", wire.Cut(v))
	}
	return n, nil
}

const (
	leastTimeout = time.Millisecond
	mostTimeout  = 24 * time.Hour
)

func (ps params) timeout() (time.Duration, *wire.Problem) {
	v, given := ps["timeout"]
	if !given {
		return 0, nil
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		return 0, bad("timeout", "timeout is %q, and must be a duration such as 30s or 5m", wire.Cut(v))
	}
	if d < leastTimeout || d > mostTimeout {
		return 0, outOfRange("timeout", v, leastTimeout.String(), mostTimeout.String())
	}
	return d, nil
}

var functionName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$`)

func (h *Handler) function(ps params) (string, *wire.Problem) {
	v, given := ps["function"]
	if !given {
		return h.Function, nil
	}
	if !functionName.MatchString(v) {
		return "", wire.Refuse(http.StatusUnprocessableEntity, wire.CodeBadFunction,
			fmt.Sprintf("function %q must be 1 to 63 lower-case letters, digits and inner hyphens, or such a name with a namespace after a dot", wire.Cut(v))).About("function")
	}
	name, namespace, named := strings.Cut(v, ".")
	allowed := h.Namespaces
	if allowed == nil {
		allowed = []string{registry.DefaultNamespace}
	}
	if named && !slices.Contains(allowed, namespace) {
		return "", wire.Refuse(http.StatusForbidden, "namespace_not_allowed",
			fmt.Sprintf("namespace %q is not allowed; allowed are %s, which namespaces sets", wire.Cut(namespace), strings.Join(allowed, ", "))).About("function")
	}
	if name == h.Self {
		return "", wire.Refuse(http.StatusUnprocessableEntity, "depth_exceeded",
			fmt.Sprintf("function %q is the master itself, which cannot be its own worker", v)).About("function")
	}
	return v, nil
}

// delimiter reads an escaped delimiter: \n \r \t \0 \\ and \xHH.
func delimiter(v string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(v); i++ {
		if v[i] != '\\' {
			b.WriteByte(v[i])
			continue
		}
		if i++; i == len(v) {
			return "", false
		}
		switch v[i] {
		case 'n':
			b.WriteByte('\n')
		case 'r':
			b.WriteByte('\r')
		case 't':
			b.WriteByte('\t')
		case '0':
			b.WriteByte(0)
		case '\\':
			b.WriteByte('\\')
		case 'x':
			if i+2 >= len(v) {
				return "", false
			}
			n, err := strconv.ParseUint(v[i+1:i+3], 16, 8)
			if err != nil {
				return "", false
			}
			b.WriteByte(byte(n))
			i += 2
		default:
			return "", false
		}
	}
	return b.String(), true
}

func (ps params) splitter(by string) (sheaf.Splitter, *wire.Problem) {
	s := sheaf.Splitter{By: by, Size: 1}
	v, given := ps["delimiter"]
	if !given {
		return s, nil
	}
	if by != "records" && by != "csv" {
		return s, bad("delimiter", "delimiter is for split=records and split=csv, not for split=%s", by)
	}
	d, ok := delimiter(v)
	if s.Delimiter = d; !ok || d == "" {
		return s, wire.Refuse(http.StatusUnprocessableEntity, "bad_delimiter",
			fmt.Sprintf(`delimiter %q must be 1 to 16 bytes, of which \n \r \t \0 \\ and \xHH may stand for one`, wire.Cut(v))).About("delimiter").Within(16)
	}
	if err := s.Validate(); err != nil {
		return s, wire.Refuse(http.StatusUnprocessableEntity, "bad_delimiter", err.Error()).About("delimiter").Within(16)
	}
	return s, nil
}

// tolerance is how many blocks may have no result. The zero value is none, and
// then an answer that lacks blocks is refused without what there is of it.
type tolerance struct {
	given bool
	count int
	share float64 // of all blocks; used when count is 0
}

func (t tolerance) allows(missing, total int) bool {
	return missing <= max(t.count, int(t.share*float64(total)))
}

func (ps params) tolerance() (tolerance, *wire.Problem) {
	v, given := ps["tolerate"]
	if !given {
		return tolerance{}, nil
	}
	if digits, percent := strings.CutSuffix(v, "%"); percent {
		n, err := strconv.ParseFloat(digits, 64)
		switch {
		case err == nil && n >= 0 && n <= 100:
			return tolerance{given: true, share: n / 100}, nil
		case err == nil || errors.Is(err, strconv.ErrRange):
			return tolerance{}, outOfRange("tolerate", v, "0%", "100%")
		}
	} else {
		n, err := strconv.Atoi(v)
		switch {
		case err == nil && n >= 0:
			return tolerance{given: true, count: n}, nil
		case err == nil || errors.Is(err, strconv.ErrRange):
			return tolerance{}, outOfRange("tolerate", v, 0, math.MaxInt)
		}
	}
	return tolerance{}, bad("tolerate", "tolerate is %q, and must be a number of blocks, such as 5, or a share of them, such as 5%%", wire.Cut(v))
}

// prepare makes a job of a request.
func (h *Handler) prepare(r *http.Request, up *upload) (*job, *wire.Problem) {
	ps, p := readQuery(r.URL.RawQuery)
	if p != nil {
		return nil, p
	}
	if p = up.begin(r, ps); p != nil {
		return nil, p
	}
	if _, given := ps["input"]; given {
		return nil, bad("input", "input names an input for a job, without one in the request; post it to /jobs, without a body")
	}
	j, p := h.plan(ps, up)
	if p != nil {
		return nil, p
	}
	if t := r.Header.Get(wire.Trace); sheaf.IsTrace(t) {
		j.group.Trace = t
	}
	h.atLeast(r.Context(), j)
	return j, nil
}

// atLeast asks for the replicas that a job wants, if it wants any.
func (h *Handler) atLeast(ctx context.Context, j *job) {
	if j.workers == 0 || h.AtLeast == nil {
		return
	}
	if _, err := h.AtLeast(ctx, j.group.Function, j.workers); err != nil && ctx.Err() == nil {
		h.Log.Warn("replicas could not be asked for; going on with those that are there", "job", j.group.Job, "err", err)
	}
}

// plan makes a job of parameters; up is its input.
func (h *Handler) plan(ps params, up *upload) (*job, *wire.Problem) {
	j := &job{h: h, up: up, params: ps, length: up.length, from: map[string]bool{}}
	by, p := ps.oneOf("split", sheaf.Splits()...)
	if p != nil {
		return nil, p
	}
	if _, asked := ps["split"]; asked && h.Job.Split != nil {
		return nil, wire.Refuse(http.StatusUnprocessableEntity, "split_is_fixed",
			fmt.Sprintf("split is %q, but this function splits its input in a way of its own; leave split out", by)).About("split")
	}
	if j.split, p = ps.splitter(by); p != nil {
		return nil, p
	}
	if j.split.Size, p = h.block(ps, up, by); p != nil {
		return nil, p
	}
	j.split.MaxBlocks = h.MaxBlocks
	if j.workers, p = h.workers(ps); p != nil {
		return nil, p
	}
	function, p := h.function(ps)
	if p != nil {
		return nil, p
	}
	route, p := ps.oneOf("route", "direct", "gateway", "topic")
	if p != nil {
		return nil, p
	}
	verify, p := ps.oneOf("verify", "auto", "require")
	if p != nil {
		return nil, p
	}
	if j.output, p = ps.oneOf("output", "text", "json"); p != nil {
		return nil, p
	}
	if j.timeout, p = ps.timeout(); p != nil {
		return nil, p
	}
	if j.tolerate, p = ps.tolerance(); p != nil {
		return nil, p
	}
	j.group = sheaf.Group{
		Function: function, Route: h.Direct, Resolver: h.Resolver, Job: sheaf.NewJob(),
		Limit:      min(max(h.Memory/j.split.Size, 4), 256),
		LimitBytes: int64(max(h.Memory, 4*j.split.Size)),
		Verified:   verify == "require", ReplicaWait: h.ReplicaWait, Turns: h.Turns,
	}
	if j.tolerate.given { // what there is is answered in any case
		j.group.TolerateShare = 1
	}
	if route != "direct" {
		j.group.Route, j.group.Resolver = h.Gateway, nil
		if route == "topic" {
			j.group.Route = h.Topic
		}
		if j.group.Route == nil {
			return nil, unknown("route", route, []string{"direct"})
		}
		j.group.Limit = min(j.group.Limit, 64)
	}
	return j, nil
}
