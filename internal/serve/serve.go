// Package serve is the process around a function: it listens, tells its
// identity, health and readiness, bounds what is in flight, and drains when it
// is told to end. It takes the place of a watchdog in the image, so it answers
// the paths that one answers.
//
//	/_/health   200 as long as the process lives
//	/_/ready    200; 429 when max_inflight calls are running, 503 while draining
//	/_/sheaf    who this is, as JSON: function, replica, version, wire, inflight
//
//	/-/K/...    whatever the replica of rank K answers to /...
//
// Everything else goes to the function's handler: through net/http, or, for the
// blocks of a [BlockHandler], on a shorter way.
package serve

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sheaf-project/sheaf/internal/peer"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// A Server runs one replica of a function. Its fields must not change once Run
// or Serve is called.
type Server struct {
	Handler http.Handler // the function; must be set
	Addr    string       // to listen at; "" means ":8080"
	// Function and Replica are who this is; an empty Function is not known, an
	// empty Replica is nobody in particular.
	Function, Replica string
	Version           string // of the function, told at /_/sheaf
	MaxInflight       int    // calls at once; 0 means any number
	// Linger is how long new calls are still taken after the order to end,
	// while those who send them learn of it. 0 means not at all.
	Linger time.Duration
	// Grace is how long running calls then have to end. 0 means 30 seconds.
	Grace time.Duration
	// Peers knows the other replicas of the function, for calls of ranks; nil
	// means that they are not known. Serve closes it in the end.
	Peers *peer.Book
	// Hello is where the replica announces itself, as
	// http://sheaf-connector:8080/hello, for as long as it serves; "" means
	// nowhere.
	Hello string
	// Namespace is that of the function, where it announces itself.
	Namespace string
	Log       *slog.Logger // nil means slog.Default
	// Signer is for whoever signs or checks blocks and results; nil when they
	// are not signed.
	Signer *wire.Signer

	once     sync.Once // for what follows
	peers    *http.Transport
	through  *httputil.ReverseProxy
	hops     atomic.Int64
	inflight atomic.Int64
	draining atomic.Bool
}

// Env reads a Server from a function's environment: port (8080) or
// sheaf_listen (host:port), max_inflight, healthcheck_interval (2s; the
// Linger), write_timeout (the Grace), OPENFAAS_NAME or sheaf_function,
// sheaf_replica or HOSTNAME, sheaf_version (that of the build), what
// [Vars.Signer] reads, replicas_url (where the record of replicas is;
// OPENFAAS_NAMESPACE is part of the function's name there), and hello_url (where
// the replica announces itself; one that has no name of its own gets one). The
// error names the variable, its value and what was expected.
func Env(getenv func(string) string) (*Server, error) {
	v := Vars{Getenv: getenv}
	s := &Server{
		Addr:        ":" + strconv.Itoa(v.Int("port", 8080, 1, 65535)),
		Function:    v.String("sheaf_function", v.String("OPENFAAS_NAME", "")),
		Replica:     v.String("sheaf_replica", v.String("HOSTNAME", "")),
		Version:     v.String("sheaf_version", built()),
		MaxInflight: v.Int("max_inflight", 0, 0, 1<<20),
		Linger:      v.Duration("healthcheck_interval", 2*time.Second),
		Grace:       v.Duration("write_timeout", 30*time.Second),
	}
	s.Addr = v.String("sheaf_listen", s.Addr)
	if _, _, err := net.SplitHostPort(s.Addr); err != nil {
		v.fail("sheaf_listen", s.Addr, "host:port, such as 127.0.0.1:8080")
	}
	if s.Signer = v.Signer(); s.Signer != nil && s.Function == "" {
		v.fail("sheaf_function", "", "the function's name, because sheaf_key_file is set and signatures are over it")
	}
	s.hello(&v)
	// Nothing is asked there before somebody wants to know.
	record := v.String("replicas_url", "http://sheaf-connector.openfaas:8080/replicas")
	function := s.Function
	if ns := getenv("OPENFAAS_NAMESPACE"); function != "" && ns != "" && !strings.Contains(function, ".") {
		function += "." + ns
	}
	var err error
	if s.Peers, err = peer.NewBook(record, function, s.Replica); err != nil {
		v.fail("replicas_url", record, "a URL such as http://sheaf-connector.openfaas:8080/replicas")
	}
	return s, v.Err
}

// built is the version that the Go tool wrote into the binary.
func built() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return ""
}

// Vars reads variables of an environment and keeps the first error.
type Vars struct {
	Getenv func(string) string
	Err    error
}

func (v *Vars) fail(name, value, expected string) {
	if v.Err == nil {
		v.Err = fmt.Errorf("environment variable %s is %q; expected %s", name, wire.Cut(value), expected)
	}
}

// String returns the variable, or def when it is empty.
func (v *Vars) String(name, def string) string {
	if s := v.Getenv(name); s != "" {
		return s
	}
	return def
}

// Int returns the variable, or def when it is empty.
func (v *Vars) Int(name string, def, least, most int) int {
	s := v.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < least || n > most {
		v.fail(name, s, fmt.Sprintf("a whole number from %d to %d", least, most))
	}
	return n
}

// Duration returns the variable, "10s" or a bare number of seconds as
// OpenFaaS's watchdogs take it, or def when it is empty.
func (v *Vars) Duration(name string, def time.Duration) time.Duration {
	s := v.Getenv(name)
	if s == "" {
		return def
	}
	text := s
	if _, err := strconv.Atoi(s); err == nil {
		text += "s"
	}
	d, err := time.ParseDuration(text) // knows what overflows
	if err != nil || d < 0 {
		v.fail(name, s, "a duration such as 30s or 2m")
	}
	return d
}

// SecretFolder is where OpenFaaS mounts the secrets of a function, unless
// secret_mount_path says otherwise.
const SecretFolder = "/var/openfaas/secrets"

// Secret returns what is in the file that the variable names, without the line
// ends at its end, or nil when the variable is empty. A name without a slash is
// that of a secret of the function. A file that is missing, empty or over 64
// KiB is an error, which tells nothing of what is in it.
func (v *Vars) Secret(name string) []byte {
	path := v.Getenv(name)
	if path == "" {
		return nil
	}
	file := path
	if !strings.Contains(path, "/") {
		file = filepath.Join(v.String("secret_mount_path", SecretFolder), path)
	}
	const expected = "a file, or the name of a secret of the function, that can be read and is not empty"
	f, err := os.Open(file)
	if err != nil {
		v.fail(name, path, expected)
		return nil
	}
	defer f.Close()
	const most = 64 << 10
	secret, err := io.ReadAll(io.LimitReader(f, most+1))
	secret = bytes.TrimRight(secret, "\r\n")
	if err != nil || len(secret) == 0 || len(secret) > most {
		v.fail(name, path, expected)
		return nil
	}
	return secret
}

// Signer reads sheaf_key_file, the secret with which blocks and results are
// signed (see [wire.ParseKeys]), sheaf_unsigned (refuse; accept, for
// development, takes what is not signed, too) and OPENFAAS_NAMESPACE. It
// returns nil when sheaf_key_file is empty.
func (v *Vars) Signer() *wire.Signer {
	unsigned := v.String("sheaf_unsigned", "refuse")
	if unsigned != "refuse" && unsigned != "accept" {
		v.fail("sheaf_unsigned", unsigned, "refuse or accept")
	}
	secret := v.Secret("sheaf_key_file")
	if secret == nil {
		return nil
	}
	s, err := wire.NewSigner(secret)
	if err != nil {
		v.fail("sheaf_key_file", v.Getenv("sheaf_key_file"),
			"a file with a key of 16 bytes or more, or two on two lines while they rotate; "+err.Error())
		return nil
	}
	s.Lax = unsigned == "accept"
	s.Namespace = v.String("OPENFAAS_NAMESPACE", "openfaas-fn")
	return s
}

// Main runs a function to its end: it makes the Server, listens until SIGTERM
// or SIGINT, drains, and returns the exit code of the process: 0, 1 when
// serving failed, 2 when the environment is wrong. stop is called at the end.
func Main(build func(getenv func(string) string) (s *Server, stop func(), err error)) int {
	s, stop, err := build(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	defer stop()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	context.AfterFunc(ctx, cancel) // a second signal ends the process at once
	if err := s.Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Run listens at Addr and serves until ctx ends and the calls in flight have
// ended, or Grace is over.
func (s *Server) Run(ctx context.Context) error {
	addr := s.Addr
	if addr == "" {
		addr = ":8080"
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return s.Serve(ctx, l)
}

// Serve is Run on a listener that is open already; it closes it.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	log := s.Log
	if log == nil {
		log = slog.Default()
	}
	base, cut := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cut(nil)
	srv := &http.Server{
		Handler:           s,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: headTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	defer s.forget()
	serve, shutdown, closeAll := func() error { return srv.Serve(l) }, srv.Shutdown, srv.Close
	if h, ok := s.Handler.(BlockHandler); ok {
		b := newBlocks(base, s, h, srv, log, l)
		serve, shutdown, closeAll = b.serve, b.shutdown, b.close
	}
	served := make(chan error, 1)
	go func() { served <- serve() }()
	said := s.announce(ctx, l.Addr(), log)
	defer said()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	s.draining.Store(true)
	if s.Linger > 0 {
		time.Sleep(s.Linger)
	}
	grace := s.Grace
	if grace <= 0 {
		grace = 30 * time.Second
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	err := shutdown(last)
	if err != nil {
		n := s.inflight.Load()
		cut(fmt.Errorf("function ends: %w", err))
		_ = closeAll() // it is what shutdown could not do
		// Without a call it waited only for a connection on which nothing came.
		err = nil
		if n > 0 {
			err = fmt.Errorf("drain: %d calls were cut after %v; raise write_timeout to give them longer", n, grace)
		}
	}
	if e := <-served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// forget ends what the Server holds open to other replicas.
func (s *Server) forget() {
	if s.Peers != nil {
		s.Peers.Close()
	}
	s.proxy()
	s.peers.CloseIdleConnections()
}

// ServeHTTP answers the paths under /_/, passes calls of a rank on to it, and
// the rest to Handler, unless it is another replica's mail (421) or one call
// too many (429).
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.Replica != "" {
		w.Header()[wire.Replica] = []string{s.Replica}
	}
	switch r.URL.Path {
	case "/_/health":
		s.say(w, http.StatusOK, "ok")
		return
	case "/_/ready":
		s.ready(w)
		return
	case "/_/sheaf":
		s.identity(w, r)
		return
	}
	if strings.HasPrefix(r.URL.Path, rankPath) && r.Header[wire.Hop] == nil {
		s.byRank(w, r)
		return
	}
	s.serve(w, r)
}

// serve passes a call to the function.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if p := s.misdirected(r.Header); p != nil {
		refuse(w, p)
		return
	}
	if !s.enter() {
		refuse(w, busy(s.MaxInflight))
		return
	}
	defer s.inflight.Add(-1)
	s.Handler.ServeHTTP(w, r)
}

// enter counts a call that may run; one that may not is not counted, so that it
// takes nobody's place.
func (s *Server) enter() bool {
	for {
		n := s.inflight.Load()
		if s.MaxInflight > 0 && n >= int64(s.MaxInflight) {
			return false
		}
		if s.inflight.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// refuse sends p. The server first reads what is left of a small body, which
// must not take long.
func refuse(w http.ResponseWriter, p *wire.Problem) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(time.Second)) // not every ResponseWriter can
	p.Write(w)
}

func busy(limit int) *wire.Problem {
	return wire.Refuse(http.StatusTooManyRequests, wire.CodeBusy,
		fmt.Sprintf("the replica already runs %d calls, the limit that max_inflight sets; wait, or add replicas", limit)).
		Within(limit).After(50 * time.Millisecond)
}

func (s *Server) ready(w http.ResponseWriter) {
	switch {
	case s.draining.Load():
		wire.Refuse(http.StatusServiceUnavailable, wire.CodeDraining,
			"the replica is about to end and takes no new calls").After(time.Second).Write(w)
	case s.MaxInflight > 0 && s.inflight.Load() >= int64(s.MaxInflight):
		busy(s.MaxInflight).Write(w)
	default:
		s.say(w, http.StatusOK, "ready")
	}
}

func (s *Server) say(w http.ResponseWriter, status int, word string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(word)+1))
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, word) // a prober that left needs no answer
}

// An Identity is what /_/sheaf tells.
type Identity struct {
	Function    string `json:"function"`
	Replica     string `json:"replica"`
	Version     string `json:"version"`
	Wire        int    `json:"wire"`
	Inflight    int64  `json:"inflight"`
	MaxInflight int    `json:"max_inflight"`
	Draining    bool   `json:"draining"`
	// Namespace and Proof answer a challenge; see [wire.Signer.Prove].
	Namespace string `json:"namespace,omitempty"`
	Nonce     string `json:"nonce,omitempty"`
	Proof     string `json:"proof,omitempty"`
}

func (s *Server) identity(w http.ResponseWriter, r *http.Request) {
	i := Identity{
		Function: s.Function, Replica: s.Replica, Version: s.Version, Wire: wire.Version,
		Inflight: s.inflight.Load(), MaxInflight: s.MaxInflight, Draining: s.draining.Load(),
	}
	if nonce := r.URL.Query().Get("nonce"); nonce != "" {
		s.prove(&i, nonce, r)
	}
	body, err := json.Marshal(i)
	if err != nil {
		wire.Refuse(http.StatusInternalServerError, wire.CodeFailed, err.Error()).Write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

// mine says that a request names this replica, and has no need of misdirected.
func (s *Server) mine(h http.Header) bool {
	function, replica, _ := strings.Cut(h.Get(wire.To), "/")
	name, _, _ := strings.Cut(function, ".") // without its namespace
	return replica != "" && replica == s.Replica && name == s.Function
}

// misdirected refuses a request that names another addressee: an address may
// have passed to another replica, or to another function.
func (s *Server) misdirected(h http.Header) *wire.Problem {
	if h[wire.To] == nil {
		return nil
	}
	e, err := wire.Open(h)
	if err != nil {
		return wire.Refuse(http.StatusBadRequest, wire.CodeEnvelope, err.Error())
	}
	name, _, _ := strings.Cut(e.Function, ".") // without its namespace
	if s.Replica != "" && e.Replica != s.Replica || s.Function != "" && name != s.Function {
		return wire.Refuse(http.StatusMisdirectedRequest, wire.CodeMisdirected,
			fmt.Sprintf("this is replica %s of %s, the request is for %s of %s",
				s.Replica, s.Function, wire.Cut(e.Replica), wire.Cut(e.Function)))
	}
	return nil
}
