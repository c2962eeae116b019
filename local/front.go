package local

// front.go is the HTTP face of the provider: what faas-cli and a gateway ask of
// a provider (/system/...), and what clients ask of a gateway (/function/...).

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/openfaas/faas-provider/logs"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A Front serves a Provider over HTTP.
type Front struct {
	Provider *Provider
	// Views answers /system/views, and /replicas for functions, which have no
	// login: the record of replicas.
	Views http.Handler
	// Healthy says why the stack is not ready; nil means that it is.
	Healthy func() error
	// Version is told at /system/info.
	Version string
	// Auth is who may use /system/...; the zero value lets everybody.
	Auth Auth
	// Community keeps within what OpenFaaS's Community Edition allows: replicas
	// from 1 to 5, 15 functions, no labels of other editions, one topic.
	Community bool
	// StartWait is how long a call waits for a first ready replica; 0 means
	// 30 seconds.
	StartWait time.Duration

	mux     *http.ServeMux
	proxy   *httputil.ReverseProxy
	builder *builder    // nil without a stack: then nothing is built
	async   *asyncQueue // nil without a stack: then nothing can be queued
}

// heartbeat is how often a stream of changes says that it lives.
const heartbeat = 5 * time.Second

// NewFront returns the front of p.
func NewFront(p *Provider, version string) *Front {
	f := &Front{Provider: p, Version: version, StartWait: startTimeout, mux: http.NewServeMux()}
	f.proxy = &httputil.ReverseProxy{
		Rewrite:      f.rewrite,
		Transport:    &balancer{p, wire.NewHTTP(256).Transport},
		BufferPool:   buffers{new(sync.Pool)},
		ErrorHandler: f.unreachable,
		ModifyResponse: func(resp *http.Response) error {
			// Not before: the headers of a 100 Continue would take them away.
			c := resp.Request.Context().Value(callKey{}).(*call)
			maps.Copy(resp.Header, c.head)
			c.last(resp.Header)
			return nil
		},
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
	for pattern, h := range map[string]func(http.ResponseWriter, *http.Request){
		"GET /healthz":                        f.health,
		"GET /system/info":                    f.info,
		"GET /system/namespaces":              func(w http.ResponseWriter, _ *http.Request) { reply(w, []string{Namespace}) },
		"/system/namespace/{name...}":         f.namespace,
		"GET /system/secrets":                 f.secrets,
		"POST /system/secrets":                f.secrets,
		"PUT /system/secrets":                 f.secrets,
		"DELETE /system/secrets":              f.secrets,
		"GET /system/functions":               f.list,
		"POST /system/functions":              func(w http.ResponseWriter, r *http.Request) { f.deploy(w, r, true) },
		"PUT /system/functions":               func(w http.ResponseWriter, r *http.Request) { f.deploy(w, r, false) },
		"DELETE /system/functions":            f.delete,
		"GET /system/function/{name}":         f.status,
		"POST /system/scale-function/{name}":  f.scale,
		"GET /system/logs":                    f.logs,
		"GET /system/replicas":                f.replicas,
		"GET /system/replicas/{name}":         f.replicas,
		"DELETE /system/replicas/{name}/{id}": f.kill,
		"GET /api/v1/query":                   f.invocations,
		"GET /system/views":                   f.views,
		"GET /replicas":                       f.views,
		"POST /build":                         f.build,
		"GET /publickey":                      f.publicKey,
		"/":                                   notFound,
	} {
		f.mux.HandleFunc(pattern, h)
	}
	return f
}

func notFound(w http.ResponseWriter, r *http.Request) {
	wire.Refuse(http.StatusNotFound, wire.CodeNotFound,
		fmt.Sprintf("there is nothing at %q; functions are at /function/NAME, the provider at /system/", wire.Cut(r.URL.Path))).Write(w)
}

// ServeHTTP answers a request. Calls of functions do not pass the mux, which
// would redirect what is not a clean path: a function sees its path as it was
// sent, and ".." cannot reach another function.
func (f *Front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/function/") {
		f.invoke(w, r)
		return
	}
	if f.async != nil && strings.HasPrefix(r.URL.Path, "/async-function/") {
		f.async.ServeHTTP(w, r)
		return
	}
	open := strings.HasPrefix(r.URL.Path, "/api/") || r.URL.Path == "/replicas" // a gateway's Prometheus, and functions, have no login
	if open || strings.HasPrefix(r.URL.Path, "/system/") {
		switch {
		case !fromHere(r):
			foreignHost(w)
			return
		case !open && !f.Auth.allows(r):
			unauthorized(w)
			return
		}
	}
	if r.Body != http.NoBody { // a stream of changes has none, and may last
		expect(w, requestTimeout)
	}
	f.mux.ServeHTTP(w, r)
}

const (
	requestTimeout = 5 * time.Second // for the body of a request to the provider
	refusalTimeout = time.Second     // for what is left of a body that nobody wants
)

// expect bounds how long the server waits for a request's body: it reads what
// is left of one before it answers.
func expect(w http.ResponseWriter, d time.Duration) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(d)) // not every ResponseWriter can
}

// fromHere refuses what a web page could make a browser on this machine send:
// a foreign Host (a name that was bound to loopback afterwards) or an Origin.
func fromHere(r *http.Request) bool {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return (host == "localhost" || ip != nil && ip.IsLoopback()) && r.Header.Get("Origin") == ""
}

func foreignHost(w http.ResponseWriter) {
	wire.Refuse(http.StatusForbidden, "foreign_host",
		"the provider's API is for this machine: the Host must be a loopback address, and no web page may call").Write(w)
}

func reply(w http.ResponseWriter, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		wire.Refuse(http.StatusInternalServerError, wire.CodeFailed, err.Error()).Write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
	_, _ = w.Write(append(body, '\n')) // a client that left needs no answer
}

// settle answers 202, or the refusal.
func settle(w http.ResponseWriter, err error) {
	if err == nil {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	p, ok := errors.AsType[*wire.Problem](err)
	if !ok {
		p = wire.Refuse(http.StatusInternalServerError, wire.CodeFailed, err.Error())
	}
	p.Write(w)
}

func (f *Front) health(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("X-Served-By", f.servedBy())
	if f.Healthy != nil {
		if err := f.Healthy(); err != nil {
			wire.Refuse(http.StatusServiceUnavailable, "not_ready", err.Error()).After(time.Second).Write(w)
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = fmt.Fprintln(w, "OK")
}

func (f *Front) info(w http.ResponseWriter, _ *http.Request) {
	version := types.VersionInfo{Release: f.Version, SHA: "-"}
	reply(w, map[string]any{
		"provider": types.ProviderInfo{Name: ProviderName, Version: &version, Orchestration: "processes"},
		"version":  version,
		"arch":     runtime.GOARCH,
	})
}

func (f *Front) views(w http.ResponseWriter, r *http.Request) { f.Views.ServeHTTP(w, r) }

func (f *Front) servedBy() string { return ProviderName + "/" + f.Version }

// ProviderName is what /system/info calls this provider.
const ProviderName = "sheaf-local"

// body reads the JSON body of a request to the provider, or answers that it
// cannot be read.
func body(w http.ResponseWriter, r *http.Request, v any) (ok bool) {
	data, err := io.ReadAll(io.LimitReader(r.Body, 1<<20+1))
	if err == nil && len(data) > 1<<20 {
		wire.Refuse(http.StatusRequestEntityTooLarge, "options_too_large", "the request is over 1 MiB").Within(1 << 20).Write(w)
		return false
	}
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		wire.Refuse(http.StatusBadRequest, "bad_json", fmt.Sprintf("the request is not the JSON that is expected here: %v", err)).Write(w)
	}
	return err == nil
}

func (f *Front) deploy(w http.ResponseWriter, r *http.Request, create bool) {
	var spec types.FunctionDeployment
	if !body(w, r, &spec) {
		return
	}
	if f.Community {
		if p := f.Provider.beyond(spec); p != nil {
			p.Write(w)
			return
		}
	}
	settle(w, f.Provider.Deploy(spec, create))
}

func (f *Front) delete(w http.ResponseWriter, r *http.Request) {
	var req types.DeleteFunctionRequest
	switch {
	case !body(w, r, &req):
	case req.Namespace != "" && req.Namespace != Namespace:
		f.Provider.unknown(req.FunctionName + "." + req.Namespace).Write(w)
	default:
		settle(w, f.Provider.Delete(req.FunctionName))
	}
}

// name is the function that the path and the query of a request to the
// provider name, and whether it can be here: there is one namespace.
func name(r *http.Request) (string, bool) {
	name, here := split(r.PathValue("name"))
	ns := r.URL.Query().Get("namespace")
	return name, here && (ns == "" || ns == Namespace)
}

func (f *Front) list(w http.ResponseWriter, r *http.Request) {
	if _, here := name(r); !here {
		reply(w, []types.FunctionStatus{})
		return
	}
	reply(w, f.Provider.Functions())
}

func (f *Front) status(w http.ResponseWriter, r *http.Request) {
	name, here := name(r)
	for _, s := range f.Provider.Functions() {
		if s.Name == name && here {
			reply(w, s)
			return
		}
	}
	f.Provider.unknown(name).Write(w)
}

// invocations answers the one query that an OpenFaaS gateway before this
// provider has for its Prometheus, without which it cannot list functions: how
// often each was called.
func (f *Front) invocations(w http.ResponseWriter, r *http.Request) {
	type sample struct {
		Metric map[string]string `json:"metric"`
		Value  []any             `json:"value"` // Unix seconds, and the number as text
	}
	samples := []sample{}
	if q := r.URL.Query().Get("query"); strings.Contains(q, "gateway_function_invocation_total") {
		for _, s := range f.Provider.Functions() {
			samples = append(samples, sample{map[string]string{"function_name": s.Name + "." + Namespace},
				[]any{time.Now().Unix(), strconv.FormatFloat(s.InvocationCount, 'f', -1, 64)}})
		}
	}
	reply(w, map[string]any{"status": "success", "data": map[string]any{"resultType": "vector", "result": samples}})
}

func (f *Front) scale(w http.ResponseWriter, r *http.Request) {
	var req types.ScaleServiceRequest
	name, here := name(r)
	read := body(w, r, &req)
	if f.Community { // as its gateway does, in silence
		req.Replicas = min(max(req.Replicas, 1), communityReplicas)
	}
	switch {
	case !read:
	case !here || req.Namespace != "" && req.Namespace != Namespace:
		f.Provider.unknown(r.PathValue("name")).Write(w)
	default:
		settle(w, f.Provider.Scale(name, int(min(req.Replicas, MaxReplicas))))
	}
}

func (f *Front) kill(w http.ResponseWriter, r *http.Request) {
	name, here := name(r)
	if !here {
		f.Provider.unknown(r.PathValue("name")).Write(w)
		return
	}
	settle(w, f.Provider.Kill(name, r.PathValue("id")))
}

// logs answers as faas-provider's log handler does: lines of JSON.
func (f *Front) logs(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	req := logs.Request{Name: q.Get("name"), Instance: q.Get("instance")}
	req.Follow, _ = strconv.ParseBool(q.Get("follow")) // anything else means no, as for OpenFaaS
	var err error
	if s := q.Get("tail"); s != "" {
		req.Tail, err = strconv.Atoi(s)
	}
	if s := q.Get("since"); s != "" && err == nil {
		var since time.Time
		since, err = time.Parse(time.RFC3339, s)
		req.Since = &since
	}
	if err != nil {
		wire.Refuse(http.StatusUnprocessableEntity, wire.CodeBadParameter, fmt.Sprintf("log request: %v", err)).Write(w)
		return
	}
	p := f.Provider
	p.mu.Lock()
	name, here := split(req.Name)
	fn := p.functions[name]
	p.mu.Unlock()
	if ns := q.Get("namespace"); fn == nil || !here || ns != "" && ns != Namespace {
		p.unknown(req.Name).Write(w)
		return
	}
	out := newLines(w)
	fn.logs.query(r.Context(), req, func(m logs.Message) bool { return out.send(m) })
}

// lines sends values as lines of JSON, each at once.
type lines struct {
	w    io.Writer
	ctrl *http.ResponseController
}

func newLines(w http.ResponseWriter) lines {
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	l := lines{w, http.NewResponseController(w)}
	_ = l.ctrl.Flush() // as below
	return l
}

func (l lines) send(v any) bool {
	body, err := json.Marshal(v)
	if err != nil {
		return false
	}
	if _, err = l.w.Write(append(body, '\n')); err != nil {
		return false
	}
	return l.ctrl.Flush() == nil
}

// replicas tells where the replicas of one or all functions are, and with
// watch=true again on each change: each line the whole of one function, a gone
// one with desired -1, and an empty line of an object as heartbeat.
func (f *Front) replicas(w http.ResponseWriter, r *http.Request) {
	p := f.Provider
	only, here := name(r)
	if !here {
		p.unknown(r.PathValue("name")).Write(w)
		return
	}
	of := func(v sheaf.View) bool { return only == "" || v.Function == only+"."+Namespace }
	views, version, changed, names := p.views(0)
	if r.URL.Query().Get("watch") != "true" {
		list := make([]sheaf.View, 0, len(views))
		for _, v := range views {
			if of(v) {
				list = append(list, v)
			}
		}
		switch {
		case only == "":
			reply(w, list)
		case len(list) == 0:
			p.unknown(only).Write(w)
		default:
			reply(w, list[0])
		}
		return
	}
	out := newLines(w)
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	known := map[string]bool{}
	for {
		here := map[string]bool{}
		for _, name := range names {
			here[name+"."+Namespace] = true
		}
		for name := range known {
			if !here[name] {
				views = append(views, sheaf.View{Function: name, Desired: -1})
			}
		}
		known = here
		for _, v := range views {
			if of(v) && !out.send(v) {
				return
			}
		}
		select {
		case <-changed:
			views, version, changed, names = p.views(version)
		case <-tick.C:
			views = nil
			if !out.send(sheaf.View{}) {
				return
			}
		case <-r.Context().Done():
			return
		case <-p.ctx.Done():
			return
		}
	}
}

// callKey is the context's key of the function that a call is for.
type callKey struct{}

// invoke passes a call on to a replica of the function.
func (f *Front) invoke(w http.ResponseWriter, r *http.Request) {
	name, _, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/function/"), "/")
	name, here := split(name)
	p := checkName(name)
	if p == nil && !here {
		p = f.Provider.unknown(name)
	}
	if p != nil {
		expect(w, refusalTimeout)
		p.Write(w)
		return
	}
	c := &call{name: name, wait: f.StartWait, head: http.Header{"X-Served-By": {f.servedBy()}}}
	if r.Header.Get("X-Call-Id") == "" {
		c.head.Set("X-Call-Id", rand.Text())
		r.Header.Set("X-Call-Id", c.head.Get("X-Call-Id"))
	}
	c.head.Set("X-Start-Time", strconv.FormatInt(time.Now().UnixNano(), 10))
	// A gateway before this one has said when the call began; of a call that its
	// queue has kept it says so twice, by which functions know.
	if r.Header.Get("X-Forwarded-Host") == "" || r.Header.Get("X-Start-Time") == "" {
		r.Header.Add("X-Start-Time", c.head.Get("X-Start-Time"))
	}
	// A function may answer while its input is still coming. Where that cannot
	// be had, it answers after.
	_ = http.NewResponseController(w).EnableFullDuplex()
	if c.wait <= 0 {
		c.wait = startTimeout
	}
	r = r.WithContext(context.WithValue(r.Context(), callKey{}, c))
	if r.Body != nil && r.Body != http.NoBody {
		c.open.Store(true)
		r.Body = &upload{r.Body, c}
	}
	f.proxy.ServeHTTP(w, r)
}

type call struct {
	name string
	wait time.Duration
	head http.Header           // of the answer, beside what the function sets
	open atomic.Bool           // the caller's body has not been read to its end
	cut  atomic.Pointer[error] // why it could not be
}

// last makes an answer the last one of its connection if it comes before the
// end of the body. In full duplex, Go's server would read the rest of the body
// after the handler, begin to watch for the caller to leave at its end, and
// panic ("invalid concurrent Body.Read call") when it then reads the next
// request: the caller would lose that one.
func (c *call) last(answer http.Header) {
	if c.open.Load() {
		answer.Set("Connection", "close")
	}
}

// upload is the body of a call. It keeps what went wrong with it, which is the
// caller's failure and not the replica's.
type upload struct {
	io.ReadCloser
	call *call
}

func (u *upload) Read(b []byte) (int, error) {
	n, err := u.ReadCloser.Read(b)
	switch {
	case err == io.EOF:
		u.call.open.Store(false)
	case err != nil:
		u.call.cut.CompareAndSwap(nil, &err)
	}
	return n, err
}

// rewrite leaves the function's name out of the path; the balancer fills in
// the replica's address.
func (f *Front) rewrite(pr *httputil.ProxyRequest) {
	_, rest, _ := strings.Cut(strings.TrimPrefix(pr.In.URL.EscapedPath(), "/function/"), "/")
	pr.Out.URL.Scheme, pr.Out.URL.Host = "http", "replica"
	pr.Out.URL.RawPath = "/" + rest
	if path, err := url.PathUnescape(pr.Out.URL.RawPath); err == nil {
		pr.Out.URL.Path = path
	}
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery // as it was sent, parsable or not
	pr.Out.Header["X-Forwarded-For"] = pr.In.Header["X-Forwarded-For"]
	pr.SetXForwarded()
}

// buffers are those in which answers are passed on.
type buffers struct{ *sync.Pool }

func (b buffers) Get() []byte {
	if p, ok := b.Pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, 32<<10)
}

func (b buffers) Put(buf []byte) { b.Pool.Put(&buf) }

// unreachable answers for a replica that could not.
func (f *Front) unreachable(w http.ResponseWriter, r *http.Request, err error) {
	c := r.Context().Value(callKey{}).(*call)
	maps.Copy(w.Header(), c.head)
	c.last(w.Header())
	if p, ok := errors.AsType[*wire.Problem](err); ok {
		p.Write(w)
		return
	}
	w.Header().Set("X-OpenFaaS-Internal", "proxy")
	name := c.name
	if cut := c.cut.Load(); cut != nil {
		wire.Refuse(http.StatusBadRequest, wire.CodeTruncated,
			fmt.Sprintf("the body of the call of %s could not be read to its end: %v", name, *cut)).Write(w)
		return
	}
	if errors.Is(err, errNoReplica) {
		wire.Refuse(http.StatusServiceUnavailable, wire.CodeNoReplicas,
			fmt.Sprintf("no replica of %s became ready in time; see the function's log", name)).After(time.Second).Write(w)
		return
	}
	wire.Refuse(http.StatusBadGateway, wire.CodeUnreachable,
		fmt.Sprintf("the replica of %s that had the call ended before it answered: %v", name, err)).Write(w)
}

// balancer sends a call to the replica that has least to do, and to another
// one if nothing listens there any more.
type balancer struct {
	p    *Provider
	base http.RoundTripper
}

func (b *balancer) RoundTrip(req *http.Request) (*http.Response, error) {
	c := req.Context().Value(callKey{}).(*call)
	ctx, cancel := context.WithTimeout(req.Context(), c.wait)
	defer cancel()
	var tried []*replica
	inbound := req.Body // the proxy closes it, when the answer is through
	for {
		r, err := b.p.take(ctx, c.name, tried)
		if err != nil {
			return nil, err
		}
		out, to := *req, *req.URL // a transport does not change the rest
		to.Host = strings.TrimPrefix(r.URL, "http://")
		out.URL = &to
		if inbound != nil {
			out.Body = io.NopCloser(inbound)
		}
		resp, err := b.base.RoundTrip(&out)
		if err == nil {
			if resp.StatusCode == http.StatusSwitchingProtocols { // the proxy needs the connection itself
				b.p.release(r)
			} else {
				resp.Body = &released{resp.Body, func() { b.p.release(r) }}
			}
			return resp, nil
		}
		b.p.release(r)
		if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "dial" {
			return nil, err
		}
		tried = append(tried, r)
	}
}

// released is a body that gives its replica back when it is closed.
type released struct {
	io.ReadCloser
	release func()
}

func (r *released) Close() error {
	if r.release != nil {
		r.release()
		r.release = nil
	}
	return r.ReadCloser.Close()
}
