package master

// jobs.go is the API of jobs that outlive their callers, and the masters that
// run them:
//
//	POST   /jobs              makes a job of an input
//	GET    /jobs              lists jobs
//	GET    /jobs/ID           tells of a job
//	DELETE /jobs/ID           cancels it
//	GET    /jobs/ID/events    tells of it as it goes on
//	GET    /jobs/ID/result    its answer
//	POST   /jobs/ID/redrive   runs the blocks again that have no result
//
// What runs them is in run.go.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
	jobs "github.com/sheaf-project/sheaf/job"
)

const (
	maxKey    = 255 // bytes of an Idempotency-Key
	maxListed = 1000
	mostWait  = time.Hour // that Prefer may ask for
)

// jobs serves /jobs and what is below it.
func (h *Handler) jobs(w http.ResponseWriter, r *http.Request) {
	rest := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/jobs"), "/")
	id, what, _ := strings.Cut(rest, "/")
	serve, known := map[string]func(*Handler, http.ResponseWriter, *http.Request, string) *wire.Problem{
		"POST ": (*Handler).submit, "GET ": (*Handler).listJobs,
		"GET id": (*Handler).tellJob, "DELETE id": (*Handler).cancelJob,
		"GET id/events": (*Handler).followJob, "GET id/result": (*Handler).jobResult, "POST id/redrive": (*Handler).redriveJob,
	}, map[string]string{"": "GET, POST", "id": "GET, DELETE", "id/events": "GET", "id/result": "GET", "id/redrive": "POST"}
	place := ""
	if rest != "" {
		place = "id"
		if what != "" {
			place += "/" + what
		}
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	f := serve[method+" "+place]
	var p *wire.Problem
	switch {
	case len(r.RequestURI) > maxURI:
		p = wire.Refuse(http.StatusRequestURITooLong, "uri_too_long", fmt.Sprintf("the URL is %d bytes long, and may be %d", len(r.RequestURI), maxURI)).Within(maxURI)
	case place != "" && !jobs.ValidID(id):
		p = wire.Refuse(http.StatusBadRequest, "bad_job_id",
			fmt.Sprintf("job ID %q must be 1 to 64 letters, digits, hyphens and underscores", wire.Cut(id))).Within(64)
	case known[place] == "":
		p = wire.Refuse(http.StatusNotFound, wire.CodeNotFound, fmt.Sprintf("a job has nothing at %q; it has events, result and redrive", wire.Cut(what)))
	case f == nil:
		w.Header().Set("Allow", known[place])
		p = wire.Refuse(http.StatusMethodNotAllowed, wire.CodeMethod, fmt.Sprintf("this takes %s, not %s", known[place], wire.Cut(r.Method)))
	default:
		p = f(h, w, r, id)
	}
	if p != nil {
		refuse(w, r, p)
	}
}

// jobProblem makes a refusal of what the store says.
func jobProblem(err error) *wire.Problem {
	switch {
	case errors.Is(err, jobs.ErrNotFound):
		return wire.Refuse(http.StatusNotFound, "job_not_found", fmt.Sprintf("%v; it was never made, or is over so long that it is forgotten", err))
	case errors.Is(err, jobs.ErrConflict):
		return wire.Refuse(http.StatusConflict, "idempotency_conflict", fmt.Sprintf("%v; send another Idempotency-Key with it", err)).About("Idempotency-Key")
	case errors.Is(err, jobs.ErrTooMany):
		return wire.Refuse(http.StatusTooManyRequests, "too_many_jobs", fmt.Sprintf("%v, which max_queued sets; send the job again later", err)).After(5 * time.Second)
	case errors.Is(err, jobs.ErrFull):
		return wire.Refuse(http.StatusInsufficientStorage, "store_full", fmt.Sprintf("%v; wait until jobs expire, or give JetStream more room (job_input_bytes, job_store_bytes)", err))
	case errors.Is(err, jobs.ErrState):
		return wire.Refuse(http.StatusConflict, "not_failed", err.Error())
	case errors.Is(err, jobs.ErrDamaged):
		return wire.Refuse(http.StatusInternalServerError, "job_damaged", fmt.Sprintf("%v; send its input again as a new job", err))
	case errors.Is(err, jobs.ErrAway):
		return wire.Refuse(http.StatusServiceUnavailable, "store_unavailable", fmt.Sprintf("%v; send the request again, with the same Idempotency-Key", err)).After(time.Second)
	}
	return nil
}

// storeProblem is jobProblem for errors that can be of nothing else.
func storeProblem(err error) *wire.Problem {
	if p := jobProblem(err); p != nil {
		return p
	}
	return jobProblem(fmt.Errorf("%w: %w", jobs.ErrAway, err))
}

// key is what tells whether a request was sent before: its Idempotency-Key, or
// the X-Call-Id that a gateway or a queue gives to each call.
func key(r *http.Request) (string, *wire.Problem) {
	for _, name := range []string{"Idempotency-Key", "X-Call-Id"} {
		v := r.Header.Values(name)
		if len(v) == 0 {
			continue
		}
		if len(v) > 1 || v[0] == "" || len(v[0]) > maxKey || strings.ContainsFunc(v[0], func(c rune) bool { return c <= ' ' || c > '~' }) {
			return "", wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter,
				fmt.Sprintf("%s must be one value of 1 to %d printable ASCII characters without spaces", name, maxKey)).About(name).Within(maxKey)
		}
		return v[0], nil
	}
	return rand.Text(), nil
}

// jobID is the ID of the job of a key: the key itself, if it can be one.
func jobID(key string) string {
	if jobs.ValidID(key) {
		return key
	}
	sum := sha256.Sum256([]byte(key))
	return "key-" + hex.EncodeToString(sum[:16])
}

// preference reads Prefer (RFC 7240): whether the answer may come later, and
// how long it is waited for.
func preference(r *http.Request) (async bool, wait time.Duration, given bool, p *wire.Problem) {
	for item := range strings.SplitSeq(strings.Join(r.Header.Values("Prefer"), ","), ",") {
		item, _, _ = strings.Cut(item, ";")
		name, value, _ := strings.Cut(strings.TrimSpace(item), "=")
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "respond-async":
			async = true
		case "wait":
			value = strings.Trim(strings.TrimSpace(value), `"`)
			s, err := strconv.ParseFloat(value, 64)
			if err != nil || !(s >= 0 && s <= mostWait.Seconds()) {
				return false, 0, false, wire.Refuse(http.StatusBadRequest, wire.CodeBadParameter,
					fmt.Sprintf("Prefer asks to wait for %q, and must ask for 0 to %v seconds", wire.Cut(value), mostWait.Seconds())).About("Prefer").Within(mostWait.Seconds())
			}
			wait, given = time.Duration(s*float64(time.Second)), true
		}
	}
	return async, wait, given, nil
}

// submit makes a job, and answers when it is stored.
func (h *Handler) submit(w http.ResponseWriter, r *http.Request, _ string) *wire.Problem {
	_, wait, waits, p := preference(r)
	var f *form
	if p == nil && waits {
		f, p = negotiate(r.Header.Values("Accept"))
	}
	if p != nil {
		return p
	}
	rec, _, ok := h.accept(w, r)
	if !ok {
		return nil
	}
	if waits {
		w.Header().Set("Preference-Applied", fmt.Sprintf("wait=%v", wait.Seconds()))
		return h.answer(w, r, rec, f, wait)
	}
	status := http.StatusAccepted
	if rec.State.Final() { // it was sent before
		status = http.StatusOK
	}
	w.Header().Set("Location", base(h, r)+"/jobs/"+rec.ID)
	h.tell(w, r, status, rec)
	return nil
}

// durable serves a call of the master's root whose job shall outlive it, if it
// is one: of somebody who may send it again, or wants no answer now. A queue
// sends a call again when it got no answer; ours says so by the
// Idempotency-Key that it sends, and that of OpenFaaS CE by the X-Start-Time
// that the gateway adds each time a call passes it: an asynchronous one passes
// twice. A call that is sent again after its job has failed has the blocks run
// again that have no result.
func (h *Handler) durable(w http.ResponseWriter, r *http.Request, form *form) bool {
	if h.Jobs == nil {
		return false
	}
	async, wait, waits, p := preference(r)
	given := len(r.Header.Values("Idempotency-Key")) > 0
	queued := len(r.Header.Values("X-Start-Time")) > 1 && r.Header.Get("X-Call-Id") != ""
	if p == nil && !async && !waits && !given && (!queued || !h.Jobs.Ready()) {
		return false
	}
	if p == nil {
		if rec, existed, ok := h.accept(w, r); ok {
			if existed && rec.State == jobs.Failed {
				if again, err := h.Jobs.Redrive(r.Context(), rec.ID); err == nil {
					rec = again // otherwise somebody else has done so, or it cannot be
				}
			}
			switch {
			case waits:
				w.Header().Set("Preference-Applied", fmt.Sprintf("wait=%v", wait.Seconds()))
				p = h.answer(w, r, rec, form, wait)
			case async:
				w.Header().Set("Preference-Applied", "respond-async")
				w.Header().Set("Location", base(h, r)+"/jobs/"+rec.ID)
				h.tell(w, r, http.StatusAccepted, rec)
			default:
				p = h.answer(w, r, rec, form, -1)
			}
		}
	}
	if p != nil {
		refuse(w, r, p)
	}
	return true
}

// base is the path at which the client finds this master: at its root, or
// behind a gateway, which marks its calls.
func base(h *Handler, r *http.Request) string {
	if r.Header.Get("X-Call-Id") != "" || r.Header.Get("X-Forwarded-Host") != "" {
		return "/function/" + h.Self
	}
	return ""
}

// accept stores the job that a request asks for. ok is false when it has
// refused it.
func (h *Handler) accept(w http.ResponseWriter, r *http.Request) (rec jobs.Record, existed, ok bool) {
	limited := *h
	limited.MaxBlocks = min(h.MaxBlocks, h.MaxJobBlocks)
	k, p := key(r)
	if p != nil {
		refuse(w, r, p)
		return rec, false, false
	}
	id := jobID(k)
	up := openUpload(w, r, inputLimit{min(h.MaxInput, h.MaxJobInput), "max_job_input"}, h.Patience)
	defer up.close()
	if r.URL.Query().Has("input") && r.ContentLength == 0 {
		rec, existed, p = limited.refer(r, id)
	} else {
		var j *job
		if j, p = limited.prepare(r, up); p == nil {
			j.group.Job = id
			rec, existed, p = h.store(r.Context(), j, id)
		}
	}
	if p != nil {
		p.Job = id
	}
	if p != nil {
		up.refuse(w, p)
		up.drain()
		return rec, false, false
	}
	w.Header().Set(wire.Job, id)
	return rec, existed, true
}

// storing and fetching say by a Problem why an input cannot be stored or read:
// a function's own Split may stand between, and is not to blame.
type storing struct{ io.Writer }

func (s storing) Write(p []byte) (int, error) {
	n, err := s.Writer.Write(p)
	if err != nil {
		err = storeProblem(err)
	}
	return n, err
}

type fetching struct{ io.Reader }

func (f fetching) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if err != nil && err != io.EOF {
		if p := jobProblem(err); p != nil && !errors.Is(err, jobs.ErrNotFound) {
			err = p
		} else {
			err = inputProblem(err)
		}
	}
	return n, err
}

// store uploads the input of a job, looking whether it can be split, and then
// its record.
func (h *Handler) store(ctx context.Context, j *job, id string) (rec jobs.Record, existed bool, _ *wire.Problem) {
	u, err := h.Jobs.Upload(ctx, id, rand.Text())
	if err != nil {
		return rec, false, storeProblem(err)
	}
	defer u.Abort()
	sum := sha256.New()
	blocks := 0
	for _, err := range j.blocks(io.TeeReader(j.up, io.MultiWriter(sum, storing{u}))) {
		if err != nil {
			j.up.leave()
			if cause := context.Cause(ctx); cause != nil {
				if broken := j.up.broken(); broken != nil {
					err = broken
				}
			}
			return rec, false, j.problem(err)
		}
		blocks++
	}
	return h.commit(ctx, u, j, requestDigest(j.params, sum), jobs.Input{Bytes: u.Bytes(), Blocks: blocks})
}

// refer stores a job whose input is somewhere else.
func (h *Handler) refer(r *http.Request, id string) (rec jobs.Record, existed bool, _ *wire.Problem) {
	ps, p := readQuery(r.URL.RawQuery)
	if p != nil {
		return rec, false, p
	}
	in, p := h.reach(r.Context(), ps["input"])
	if p != nil {
		return rec, false, p
	}
	if in.Bytes > h.MaxInput {
		return rec, false, inputLimit{h.MaxInput, "max_input"}.passed()
	}
	j, p := h.plan(ps, &upload{length: in.Bytes, total: in.Bytes})
	if p != nil {
		return rec, false, p
	}
	j.group.Job = id
	sum := sha256.New()
	fmt.Fprintf(sum, "%d %s", in.Bytes, in.Version)
	u, err := h.Jobs.Upload(r.Context(), id, rand.Text())
	if err != nil {
		return rec, false, storeProblem(err)
	}
	defer u.Abort()
	return h.commit(r.Context(), u, j, requestDigest(ps, sum), in)
}

// commit stores the record of a job whose input is stored.
func (h *Handler) commit(ctx context.Context, u *jobs.Upload, j *job, digest string, in jobs.Input) (rec jobs.Record, existed bool, _ *wire.Problem) {
	j.params["block"] = strconv.Itoa(j.split.Size)
	spec, err := json.Marshal(j.params)
	if err != nil {
		return rec, false, j.problem(err)
	}
	rec, existed, err = u.Submit(ctx, jobs.Record{Spec: spec, Digest: digest, Input: in})
	if err != nil {
		return rec, false, storeProblem(err)
	}
	return rec, existed, nil
}

// requestDigest tells jobs apart. In which form the answer is wanted does not
// make another job.
func requestDigest(ps params, input hash.Hash) string {
	sum := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(ps)) {
		if name != "output" {
			fmt.Fprintf(sum, "%d:%s=%d:%s,", len(name), name, len(ps[name]), ps[name])
		}
	}
	sum.Write(input.Sum(nil))
	return hex.EncodeToString(sum.Sum(nil))
}

// shownJob is a job as it is told of.
type shownJob struct {
	ID       string          `json:"id"`
	State    jobs.State      `json:"state"`
	Function string          `json:"function"` // that does the work
	Created  time.Time       `json:"created"`
	Started  time.Time       `json:"started,omitzero"`
	Finished time.Time       `json:"finished,omitzero"`
	Expires  time.Time       `json:"expires,omitzero"`
	Bytes    int64           `json:"bytes"`
	Blocks   shownBlocks     `json:"blocks"`
	Attempts int             `json:"attempts"`
	Replicas int             `json:"replicas"`
	Elapsed  float64         `json:"elapsed_ms"`
	Master   string          `json:"master,omitempty"` // that has it, or had it last
	Epoch    int             `json:"epoch"`            // how often a master has claimed it
	Redrives int             `json:"redrives"`         // how often it was queued again
	Error    json.RawMessage `json:"error,omitempty"`
	Result   string          `json:"result"` // where the answer is, or will be
}

type shownBlocks struct {
	Total   int `json:"total"`
	Queued  int `json:"queued"`
	Running int `json:"running"`
	Done    int `json:"done"`
	Failed  int `json:"failed"`
	Stopped int `json:"stopped"`
	// Open says that there may be more: the input is read as it is worked on.
	Open bool `json:"open,omitempty"`
}

func (h *Handler) show(r *http.Request, rec jobs.Record) shownJob {
	p := jobs.Progress{Total: max(0, rec.Input.Blocks), Queued: max(0, rec.Input.Blocks)}
	if rec.Progress != nil {
		p = *rec.Progress
	} else if known, now, _, ok := h.Jobs.Known(rec.ID); ok && known.Redrives == rec.Redrives {
		// What this master knows may be a little older than the record: blocks
		// that were done then still are.
		p = now
		p.Queued += max(0, rec.Input.Blocks-p.Total)
		p.Total = max(p.Total, rec.Input.Blocks)
	}
	s := shownJob{ID: rec.ID, State: rec.State, Function: h.Function, Created: rec.Created, Started: rec.Started, Finished: rec.Finished,
		Expires: rec.Expires, Bytes: rec.Input.Bytes, Blocks: shownBlocks{p.Total, p.Queued, p.Running, p.Done, p.Failed, p.Stopped, rec.Input.Blocks < 0 && !rec.State.Final()},
		Attempts: p.Attempts, Replicas: p.Replicas, Master: rec.Owner, Epoch: rec.Epoch, Redrives: rec.Redrives, Error: rec.Error,
		Result: base(h, r) + "/jobs/" + rec.ID + "/result"}
	if ps, err := specOf(rec); err == nil && ps["function"] != "" {
		s.Function = ps["function"]
	}
	switch {
	case rec.State.Final() && !rec.Started.IsZero():
		s.Elapsed = inMilliseconds(rec.Finished.Sub(rec.Started))
	case rec.State == jobs.Running:
		s.Elapsed = inMilliseconds(max(0, time.Since(rec.Started)))
	}
	return s
}

// tell answers with a job.
func (h *Handler) tell(w http.ResponseWriter, r *http.Request, status int, rec jobs.Record) {
	if !rec.State.Final() {
		w.Header().Set("Retry-After", "1")
	}
	sendJSON(w, status, h.show(r, rec))
}

func sendJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		wire.Refuse(http.StatusInternalServerError, wire.CodeFailed, err.Error()).Write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // a client that left needs no answer
}

func (h *Handler) listJobs(w http.ResponseWriter, r *http.Request, _ string) *wire.Problem {
	state, limit := jobs.State(r.URL.Query().Get("state")), 100
	if state != "" && !slices.Contains(jobs.States(), state) {
		return wire.Refuse(http.StatusUnprocessableEntity, "unknown_state",
			fmt.Sprintf("state %q is not known; known are %v", wire.Cut(string(state)), jobs.States())).About("state").Within(jobs.States())
	}
	if s := r.URL.Query().Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > maxListed {
			return outOfRange("limit", s, 1, maxListed)
		}
		limit = n
	}
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	all, err := h.Jobs.List(ctx)
	if err != nil {
		return storeProblem(err)
	}
	list := []shownJob{}
	for _, rec := range all {
		if (state == "" || rec.State == state) && len(list) < limit {
			list = append(list, h.show(r, rec))
		}
	}
	sendJSON(w, http.StatusOK, list)
	return nil
}

// get returns a job's record, unless it is forgotten.
func (h *Handler) get(ctx context.Context, id string) (jobs.Record, *wire.Problem) {
	rec, err := h.Jobs.Get(ctx, id)
	if err != nil {
		return rec, storeProblem(err)
	}
	if rec.State.Final() && time.Now().After(rec.Expires) {
		p := wire.Refuse(http.StatusGone, "job_expired", fmt.Sprintf("job %s was kept until %s, as job_ttl says, and is dropped", id, rec.Expires.Format(time.RFC3339)))
		p.Job = id
		return rec, p
	}
	return rec, nil
}

func (h *Handler) tellJob(w http.ResponseWriter, r *http.Request, id string) *wire.Problem {
	rec, p := h.get(r.Context(), id)
	if p == nil {
		h.tell(w, r, http.StatusOK, rec)
	}
	return p
}

func (h *Handler) cancelJob(w http.ResponseWriter, r *http.Request, id string) *wire.Problem {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	rec, err := h.Jobs.Cancel(ctx, id)
	if err != nil {
		return storeProblem(err)
	}
	h.tell(w, r, http.StatusOK, rec)
	return nil
}

func (h *Handler) redriveJob(w http.ResponseWriter, r *http.Request, id string) *wire.Problem {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	if _, p := h.get(ctx, id); p != nil {
		return p
	}
	rec, err := h.Jobs.Redrive(ctx, id)
	if err != nil {
		return storeProblem(err)
	}
	w.Header().Set("Location", base(h, r)+"/jobs/"+rec.ID)
	h.tell(w, r, http.StatusAccepted, rec)
	return nil
}

// followJob sends a progress event at each change, and one event named after
// the final state at the end.
func (h *Handler) followJob(w http.ResponseWriter, r *http.Request, id string) *wire.Problem {
	rec, p := h.get(r.Context(), id)
	if p != nil {
		return p
	}
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	out := eventWriter{w: w, control: control}
	alive := time.NewTicker(15 * time.Second)
	defer alive.Stop()
	var told shownJob
	for {
		known, _, changed, ok := h.Jobs.Known(id)
		if !ok && rec.Revision == 0 {
			return nil // forgotten while it was watched
		}
		if ok {
			rec = known
		}
		if rec.State.Final() {
			if whole, err := h.Jobs.Get(r.Context(), id); err == nil {
				rec = whole // with its error
			}
		}
		s := h.show(r, rec)
		if rec.State.Final() {
			out.json(string(rec.State), s)
			return nil
		}
		if same := s; func() bool { same.Elapsed, told.Elapsed = 0, 0; return !sameJob(same, told) }() {
			out.json("progress", s)
			told = s
		}
		rec.Revision = 0
		select {
		case <-changed:
		case <-alive.C:
			told = shownJob{}
		case <-r.Context().Done():
			return nil
		}
	}
}

func sameJob(a, b shownJob) bool {
	return a.State == b.State && a.Blocks == b.Blocks && a.Attempts == b.Attempts && a.Epoch == b.Epoch && a.Redrives == b.Redrives
}

// jobResult answers with what a job came to, in any of the forms. With
// Prefer: wait=N it waits for the end, and otherwise answers with what is
// there.
func (h *Handler) jobResult(w http.ResponseWriter, r *http.Request, id string) *wire.Problem {
	_, wait, waits, p := preference(r)
	if p != nil {
		return p
	}
	form, p := negotiate(r.Header.Values("Accept"))
	if p != nil {
		return p
	}
	rec, p := h.get(r.Context(), id)
	if p != nil {
		return p
	}
	if waits {
		w.Header().Set("Preference-Applied", fmt.Sprintf("wait=%v", wait.Seconds()))
	}
	w.Header().Set(wire.Job, id)
	return h.answer(w, r, rec, form, wait)
}

// answer waits for the end of a job, as long as wait says or, when it is
// negative, the client stays, and answers with what it came to.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, rec jobs.Record, form *form, wait time.Duration) *wire.Problem {
	ctx := r.Context()
	from := 0
	if v := r.URL.Query().Get("from"); v != "" && r.Method != http.MethodPost {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 {
			return outOfRange("from", v, 0, h.MaxJobBlocks)
		}
		if !form.lines {
			return bad("from", "from is for application/x-ndjson only; ask for it with Accept")
		}
		from = n
	}
	var late <-chan time.Time
	if wait >= 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		late = t.C
	}
	for over := false; !rec.State.Final() && !over; {
		known, _, changed, ok := h.Jobs.Known(rec.ID)
		if ok && known.Revision >= rec.Revision {
			if rec = known; rec.State.Final() {
				break
			}
		}
		select {
		case <-changed:
		case <-late:
			over = true
		case <-ctx.Done():
			return nil // nobody is left to be told; the job goes on
		}
	}
	if !rec.State.Final() {
		return h.partial(w, r, rec, form, from)
	}
	rec, p := h.get(ctx, rec.ID) // with its error
	if p != nil {
		return p
	}
	return h.ended(w, r, rec, form, from)
}

// specOf returns the parameters of a job.
func specOf(rec jobs.Record) (params, error) {
	ps := params{}
	if err := json.Unmarshal(rec.Spec, &ps); err != nil {
		return nil, fmt.Errorf("%w: %w", jobs.ErrDamaged, err)
	}
	return ps, nil
}

// over makes a job, in the sense of the forms, of one that is over or under
// way: its results are those that are stored, of the blocks from the given one
// on.
func (h *Handler) over(w http.ResponseWriter, r *http.Request, rec jobs.Record, from int) (*job, *wire.Problem) {
	ps, err := specOf(rec)
	if err != nil {
		return nil, storeProblem(err)
	}
	if v, given := r.URL.Query()["output"]; given && len(v) == 1 && r.Method != http.MethodPost {
		ps["output"] = v[0]
	}
	j, p := h.plan(ps, openUpload(w, r, inputLimit{0, "max_job_input"}, h.Patience)) // it has no body, or that was read
	if p != nil {
		return nil, p
	}
	done, err := h.Jobs.Done(r.Context(), rec.ID)
	var lacks *sheaf.PartialError
	if err == nil {
		lacks, err = h.kept(r.Context(), rec)
	}
	if err != nil {
		return nil, storeProblem(err)
	}
	at, _ := slices.BinarySearch(done, from)
	j.stored = done[at:]
	j.group.Job, j.length = rec.ID, rec.Input.Bytes
	j.source = h.results(rec.ID, j.stored, lacks)
	j.up.count.Store(rec.Input.Bytes)
	return j, nil
}

// results yields stored results, and at the end why others are missing.
func (h *Handler) results(id string, blocks []int, lacks *sheaf.PartialError) func(context.Context) iter.Seq2[sheaf.Result, error] {
	return func(ctx context.Context) iter.Seq2[sheaf.Result, error] {
		return func(yield func(sheaf.Result, error) bool) {
			for r, err := range h.Jobs.Results(ctx, id, blocks) {
				if !yield(r, err) || err != nil {
					return
				}
			}
			if lacks != nil {
				yield(sheaf.Result{}, lacks)
			}
		}
	}
}

// ended answers with what a job came to that is over.
func (h *Handler) ended(w http.ResponseWriter, r *http.Request, rec jobs.Record, form *form, from int) *wire.Problem {
	switch {
	case rec.State == jobs.Cancelled:
		p := wire.Refuse(http.StatusConflict, "job_cancelled", fmt.Sprintf("job %s was cancelled at %s", rec.ID, rec.Finished.Format(time.RFC3339)))
		p.Job = rec.ID
		return p
	case rec.State == jobs.Failed && !rec.Lacks:
		p := &wire.Problem{}
		if err := json.Unmarshal(rec.Error, p); err != nil || p.Status < 400 {
			p = wire.Refuse(http.StatusInternalServerError, "job_failed", "the job failed, and why is not known")
		}
		return p
	}
	j, p := h.over(w, r, rec, from)
	if p != nil {
		return p
	}
	defer j.up.close()
	j.took = rec.Finished.Sub(rec.Started)
	if n := rec.Progress; n != nil {
		j.sum = &summary{Job: rec.ID, Blocks: n.Done, Bytes: rec.Input.Bytes, BlockSize: j.split.Size, Replicas: n.Replicas,
			Unverified: n.Unverified, Elapsed: inMilliseconds(j.took), Done: true}
	}
	form.write(j, r.Context(), w)
	return nil
}

// partial answers with the results of a job under way: those of the blocks from
// the given one up to the first that has none, as lines of JSON. The link leads
// to the rest: both bodies, one after the other, are the whole.
func (h *Handler) partial(w http.ResponseWriter, r *http.Request, rec jobs.Record, form *form, from int) *wire.Problem {
	link := base(h, r) + "/jobs/" + rec.ID + "/result"
	if !form.lines {
		w.Header().Set("Link", "<"+link+`>; rel="next"`)
		h.tell(w, r, http.StatusAccepted, rec)
		return nil
	}
	j, p := h.over(w, r, rec, from)
	if p != nil {
		return p
	}
	defer j.up.close()
	n := 0
	for n < len(j.stored) && j.stored[n] == from+n {
		n++
	}
	write := func(to io.Writer) error {
		enc := json.NewEncoder(to)
		enc.SetEscapeHTML(false)
		for res, err := range h.Jobs.Results(r.Context(), rec.ID, j.stored[:n]) {
			if err != nil {
				return err
			}
			line, err := j.line(res)
			if err != nil {
				return err
			}
			if err := enc.Encode(line); err != nil {
				return err
			}
		}
		return nil
	}
	m := measure{sum: sha256.New()}
	if err := write(&m); err != nil {
		return j.problem(err)
	}
	m.headers(w.Header(), "application/x-ndjson")
	w.Header().Set("Link", fmt.Sprintf("<%s?from=%d>; rel=\"next\"", link, from+n))
	w.Header().Set(wire.Missing, gaps(j.stored[n:], from+n, rec.Input.Blocks))
	w.Header().Set("Retry-After", "1")
	w.WriteHeader(http.StatusAccepted)
	_ = write(w) // the client sees by its length what it got
	return nil
}

// gaps lists the blocks from the given one on that are not among done, as in
// "3-7,9,12-"; total is -1 when it is not known.
func gaps(done []int, from, total int) string {
	var list []string
	add := func(a, b int) { // b is not among them; -1 means that there is no end
		switch {
		case b < 0:
			list = append(list, fmt.Sprintf("%d-", a))
		case b == a+1:
			list = append(list, strconv.Itoa(a))
		case b > a:
			list = append(list, fmt.Sprintf("%d-%d", a, b-1))
		}
	}
	for _, i := range done {
		add(from, i)
		from = i + 1
		if len(list) == mostNamed {
			total = -1
			break
		}
	}
	add(from, total)
	return strings.Join(list, ",")
}

// keep and kept store and read which blocks of a job have no result, and why.
func (h *Handler) keep(ctx context.Context, l *jobs.Lease, e *sheaf.PartialError) error {
	body, err := json.Marshal(struct {
		Missing []missing `json:"missing"`
		Done    int       `json:"done"`
		Total   int       `json:"total"`
	}{missingOf(e, mostNamed), e.Done, e.Total})
	if err != nil {
		return err
	}
	return l.Keep(ctx, body)
}

func (h *Handler) kept(ctx context.Context, rec jobs.Record) (*sheaf.PartialError, error) {
	if !rec.Lacks {
		return nil, nil
	}
	body, err := h.Jobs.Kept(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	var k struct {
		Missing     []missing
		Done, Total int
	}
	if err := json.Unmarshal(body, &k); err != nil {
		return nil, fmt.Errorf("%w: %w", jobs.ErrDamaged, err)
	}
	e := &sheaf.PartialError{Job: rec.ID, Done: k.Done, Total: k.Total}
	for _, m := range k.Missing {
		e.Missing = append(e.Missing, &sheaf.BlockError{Index: m.Block, Offset: m.Offset, Bytes: m.Bytes, Attempts: m.Attempts, Err: errors.New(m.Error)})
	}
	return e, nil
}
