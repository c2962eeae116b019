package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/registry"
)

// A Stack is all of it in one process: NATS with JetStream, a provider with a
// gateway's front, the watcher and the record of replicas. It listens on
// loopback only. Every function finds nats_url, gateway_url and replicas_url in
// its environment, and a key to sign with, of which sheaf's functions make use.
// They take what is not signed, too: people call them by hand, and functions
// that know nothing of sheaf work beside them.
type Stack struct {
	URL      string // of the front
	NATS     string // URL
	Provider *Provider
	Front    *Front
	Registry *registry.Registry
	// ConnectorCreds is the file with which a connector logs in to NATS.
	ConnectorCreds string
	// BuildSecretFile has the secret that signs what is sent to POST /build.
	BuildSecretFile string

	log    *slog.Logger
	nats   natsServer
	logins *logins // to it
	store  *store
	brief  bool // store is removed at the end
	conns  []*nats.Conn
	http   *http.Server
	api    *gateway.Client
	before *gateway.Client // of Config.Gateway; nil without
	async  *asyncQueue
	stop   context.CancelFunc
	wg     sync.WaitGroup
	errs   chan error
}

// Config says how to start a Stack.
type Config struct {
	// Port to listen at; 0 means any free one.
	Port int
	// Command says how a replica of an image is started.
	Command func(image string) (argv []string, err error)
	// Dir is the folder in which functions, secrets and JetStream's streams are
	// kept for the next stack; empty means a temporary one.
	Dir string
	// Auth is who may use /system/...; the zero value lets everybody.
	Auth Auth
	// Gateway is the URL of an OpenFaaS gateway that has this stack as its
	// provider: functions find it in place of the stack's own front, and are
	// scaled through it, with the login that Auth is. "" means that there is
	// none.
	Gateway string
	// Community keeps the stack within what OpenFaaS's Community Edition allows:
	// see Front.Community. Where Async does not say, its queue takes 256,000
	// bytes, makes one call of a function at a time, and tries nothing again.
	Community bool
	// Async says how asynchronous calls are made.
	Async AsyncConfig
	// Build says how functions are built.
	Build BuildConfig
	// Version is told at /system/info.
	Version string
	// Healthy says why the stack is not ready yet, at /healthz; nil means that
	// it always is.
	Healthy func() error
	Log     *slog.Logger // nil means slog.Default
}

// Start starts a stack. Close ends it, and every process that it started.
func Start(cfg Config) (_ *Stack, err error) {
	if err := cfg.Auth.validate(); err != nil {
		return nil, err
	}
	if cfg.Community {
		cfg.Async = cfg.Async.community()
	}
	s := &Stack{log: cfg.Log, errs: make(chan error, 2)}
	if s.log == nil {
		s.log = slog.Default()
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(cfg.Port)))
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer func() {
		if err != nil {
			_ = l.Close() // it may be closed already
		}
	}()
	s.URL = "http://" + l.Addr().String()
	if s.brief = cfg.Dir == ""; s.brief {
		sweep()
		if cfg.Dir, err = os.MkdirTemp("", fmt.Sprintf("sheaf-%d-", os.Getpid())); err != nil {
			return nil, fmt.Errorf("start: %w", err)
		}
	}
	if s.store, err = openStore(cfg.Dir); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	s.Provider = NewProvider(cfg.Command, s.log)
	s.Provider.store = s.store
	s.Front = NewFront(s.Provider, cfg.Version)
	build, secret, err := newBuilder(cfg.Build, s.Provider, s.store, cfg.Command)
	if err != nil {
		return nil, err
	}
	s.Front.builder, s.BuildSecretFile = build, secret
	s.Provider.command, s.Provider.prepare = build.command, build.prepare
	s.Front.Healthy, s.Front.Auth, s.Front.Community = cfg.Healthy, cfg.Auth, cfg.Community
	s.http = &http.Server{Handler: s.Front, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 3 * time.Minute,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	if err := s.startNATS(); err != nil {
		return nil, err
	}
	watch, err := s.connect("sheaf watcher", roleWatcher)
	if err != nil {
		return nil, err
	}
	read, err := s.connect("sheaf front", roleFunctions)
	if err != nil {
		return nil, err
	}
	if s.Registry, err = registry.Open(read, s.log); err != nil {
		return nil, err
	}
	s.Front.Views = s.Registry
	key, err := s.store.signingKey()
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	for _, role := range []string{roleFunctions, roleConnector} {
		if err := s.store.write("", natsSeedFile+role, s.logins.seeds[role]); err != nil {
			return nil, fmt.Errorf("start: %w", err)
		}
	}
	s.ConnectorCreds = s.store.path("", natsSeedFile+roleConnector)
	s.Provider.Env = map[string]string{"nats_url": s.NATS, "nats_creds": s.store.path("", natsSeedFile+roleFunctions), "gateway_url": cmp.Or(cfg.Gateway, s.URL), "replicas_url": s.URL + "/replicas",
		"sheaf_key_file": key, "sheaf_unsigned": "accept"}
	if err := s.Provider.restore(); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	queue, err := s.connect("sheaf async", roleQueue)
	if err != nil {
		return nil, err
	}
	if s.async, err = newAsync(cfg.Async, s.Front, queue, s.log, s.errs); err != nil {
		return nil, err
	}
	s.wg.Go(func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.errs <- err
		}
	})
	if s.api, err = gateway.NewClient(s.URL, cfg.Auth.User, cfg.Auth.Password); err != nil {
		return nil, err
	}
	if cfg.Gateway != "" {
		if s.before, err = gateway.NewClient(cfg.Gateway, cfg.Auth.User, cfg.Auth.Password); err != nil {
			return nil, fmt.Errorf("start: gateway %s: %w", cfg.Gateway, err)
		}
	}
	w := &registry.Watcher{Conn: watch, Provider: cmp.Or(s.before, s.api), Source: s.api, Durable: !s.brief, Log: s.log}
	s.wg.Go(func() {
		if err := w.Run(ctx); err != nil && ctx.Err() == nil {
			s.errs <- err
		}
	})
	return s, nil
}

// natsServer is the NATS that a stack has now, or had last.
type natsServer struct {
	mu  sync.Mutex // guards now
	now *server.Server
}

// get is nil when none was ever started.
func (n *natsServer) get() *server.Server {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

// InProcessConn connects to it, for connections of this process.
func (n *natsServer) InProcessConn() (net.Conn, error) { return n.get().InProcessConn() }

func (s *Stack) startNATS() (err error) {
	if s.logins, err = newLogins(); err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	if err := s.runNATS(server.RANDOM_PORT); err != nil {
		return err
	}
	s.NATS = s.nats.get().ClientURL()
	return nil
}

func (s *Stack) runNATS(port int) error {
	n, err := server.NewServer(&server.Options{
		ServerName: "sheaf", Host: "127.0.0.1", Port: port,
		Users: s.logins.users, Nkeys: s.logins.nkeys,
		JetStream: true, StoreDir: filepath.Join(s.store.dir, natsFolder), NoSigs: true, NoLog: true, MaxPayload: 8 << 20,
	})
	if err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	s.nats.mu.Lock()
	s.nats.now = n
	s.nats.mu.Unlock()
	n.Start()
	if !n.ReadyForConnections(10 * time.Second) {
		return errors.New("start NATS: it was not ready within 10 seconds")
	}
	return nil
}

// ClientURL is where tools connect to NATS, with a login that may publish
// messages and hear the answers, and nothing else. It holds a password.
func (s *Stack) ClientURL() string {
	return "nats://" + url.UserPassword(roleClient, s.logins.password).String() + "@" + strings.TrimPrefix(s.NATS, "nats://")
}

// connect opens a connection to NATS, as one of the roles, that never gives up.
func (s *Stack) connect(name, role string) (*nats.Conn, error) {
	o, err := s.logins.options(role)
	if err != nil {
		return nil, err
	}
	nc, err := nats.Connect(s.NATS, append(o, nats.Name(name), nats.InProcessServer(&s.nats), nats.MaxReconnects(-1),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { s.log.Debug("NATS", "err", err) }))...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	s.conns = append(s.conns, nc)
	return nc, nil
}

// Command says how a replica of an image is started, that Config.Command knows
// or that was built here.
func (s *Stack) Command(image string) ([]string, error) { return s.Provider.command(image) }

// ConnectNATS opens a connection to NATS with the rights that functions have. It
// is the caller's to close.
func (s *Stack) ConnectNATS(name string) (*nats.Conn, error) {
	o, err := s.logins.options(roleFunctions)
	if err != nil {
		return nil, err
	}
	return nats.Connect(s.NATS, append(o, nats.Name(name))...)
}

// Client returns a client of the stack's own API.
func (s *Stack) Client() *gateway.Client { return s.api }

// Failed yields what broke the stack after it had started.
func (s *Stack) Failed() <-chan error { return s.errs }

// Close ends the stack and every process of its functions.
func (s *Stack) Close() {
	s.stop()
	if s.async != nil {
		s.async.Close() // its calls finish while there are replicas
	}
	if s.Provider != nil {
		s.Provider.Close()
	}
	if s.http != nil {
		_ = s.http.Close() // its clients see the end of their connections
	}
	if s.Registry != nil {
		s.Registry.Close()
	}
	s.wg.Wait()
	for _, nc := range s.conns {
		nc.Close()
	}
	if s.nats.get() != nil {
		s.StopNATS()
	}
	for _, c := range []*gateway.Client{s.api, s.before} {
		if c != nil {
			c.Close()
		}
	}
	if s.store != nil {
		if s.brief {
			_ = os.RemoveAll(s.store.dir) // a temporary folder; nothing in it is needed again
		}
		s.store.close()
	}
}

// StopNATS ends NATS and leaves the rest running, as its failure would: to see
// that jobs go on without it.
func (s *Stack) StopNATS() {
	n := s.nats.get()
	n.Shutdown()
	n.WaitForShutdown()
}

// StartNATS starts NATS again after StopNATS, at the same address, with what it
// had stored. Neither may be called while the other runs, nor during Close.
func (s *Stack) StartNATS() error {
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.NATS, "nats://"))
	if err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	return s.runNATS(n)
}

// sweep removes the temporary folders of stacks that were killed: their names
// hold the number of a process that is no more.
func sweep() {
	folders, _ := filepath.Glob(filepath.Join(os.TempDir(), "sheaf-*-*")) // the pattern is well-formed
	for _, f := range folders {
		number, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(f), "sheaf-"), "-")
		if pid, err := strconv.Atoi(number); err == nil && pid > 0 && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			_ = os.RemoveAll(f) // it may be another user's
		}
	}
}
