package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/registry"
)

// A Stack is all of it in one process: NATS with JetStream, a provider with a
// gateway's front, the watcher and the record of replicas. It listens on
// loopback only.
type Stack struct {
	URL      string // of the front
	NATS     string // URL
	Provider *Provider
	Front    *Front
	Registry *registry.Registry

	log   *slog.Logger
	nats  *server.Server
	dir   string // of JetStream
	conns []*nats.Conn
	http  *http.Server
	api   *gateway.Client
	stop  context.CancelFunc
	wg    sync.WaitGroup
	errs  chan error
}

// Config says how to start a Stack.
type Config struct {
	// Port to listen at; 0 means any free one.
	Port int
	// Command says how a replica of an image is started.
	Command func(image string) (argv []string, err error)
	// Version is told at /system/info.
	Version string
	// Healthy says why the stack is not ready yet, at /healthz; nil means that
	// it always is.
	Healthy func() error
	Log     *slog.Logger // nil means slog.Default
}

// Start starts a stack. Close ends it, and every process that it started.
func Start(cfg Config) (_ *Stack, err error) {
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
	s.Provider = NewProvider(cfg.Command, s.log)
	s.Front = NewFront(s.Provider, cfg.Version)
	s.Front.Healthy = cfg.Healthy
	s.http = &http.Server{Handler: s.Front, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 3 * time.Minute,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	if err := s.startNATS(); err != nil {
		return nil, err
	}
	watch, err := s.connect("sheaf watcher")
	if err != nil {
		return nil, err
	}
	read, err := s.connect("sheaf front")
	if err != nil {
		return nil, err
	}
	if s.Registry, err = registry.Open(read, s.log); err != nil {
		return nil, err
	}
	s.Front.Views = s.Registry
	s.wg.Go(func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.errs <- err
		}
	})
	if s.api, err = gateway.NewClient(s.URL, "", ""); err != nil {
		return nil, err
	}
	w := &registry.Watcher{Conn: watch, Provider: s.api, Source: s.api, Log: s.log}
	s.wg.Go(func() {
		if err := w.Run(ctx); err != nil && ctx.Err() == nil {
			s.errs <- err
		}
	})
	return s, nil
}

func (s *Stack) startNATS() (err error) {
	if s.dir, err = os.MkdirTemp("", "sheaf-nats-"); err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	s.nats, err = server.NewServer(&server.Options{
		ServerName: "sheaf", Host: "127.0.0.1", Port: server.RANDOM_PORT,
		JetStream: true, StoreDir: s.dir, NoSigs: true, NoLog: true, MaxPayload: 8 << 20,
	})
	if err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	s.nats.Start()
	if !s.nats.ReadyForConnections(10 * time.Second) {
		return errors.New("start NATS: it was not ready within 10 seconds")
	}
	s.NATS = s.nats.ClientURL()
	return nil
}

// connect opens a connection to NATS that never gives up.
func (s *Stack) connect(name string) (*nats.Conn, error) {
	nc, err := nats.Connect(s.NATS, nats.Name(name), nats.InProcessServer(s.nats), nats.MaxReconnects(-1))
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	s.conns = append(s.conns, nc)
	return nc, nil
}

// Client returns a client of the stack's own API.
func (s *Stack) Client() *gateway.Client { return s.api }

// Failed yields what broke the stack after it had started.
func (s *Stack) Failed() <-chan error { return s.errs }

// Close ends the stack and every process of its functions.
func (s *Stack) Close() {
	s.stop()
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
	if s.nats != nil {
		s.nats.Shutdown()
		s.nats.WaitForShutdown()
	}
	if s.api != nil {
		s.api.Close()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir) // a temporary folder; nothing in it is needed again
	}
}

// StopNATS ends NATS and leaves the rest running, as its failure would: to see
// that jobs go on without it.
func (s *Stack) StopNATS() {
	s.nats.Shutdown()
	s.nats.WaitForShutdown()
}
