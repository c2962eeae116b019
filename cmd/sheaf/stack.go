package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/connector"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/tracing"
)

// functionCommand is the hidden command that runs a function in this binary.
const functionCommand = "function"

// Images of the functions in this binary.
const (
	masterImage = "sheaf/master"
	workerImage = "sheaf/worker"
)

// masterTopic is the topic that calls the master.
const masterTopic = "words"

// maxWorkers is how many worker replicas the local stack runs at most, and
// maxCommunity with --community.
const (
	maxWorkers   = local.MaxReplicas
	maxCommunity = 5
)

// defaultWorkers is how many worker replicas run when nobody says: enough to
// have something to scatter over.
func defaultWorkers() int { return max(4, runtime.NumCPU()) }

// command says how a replica of an image is started: of a function in this
// binary, or of an executable file in the folder programs, unless that is "".
func command(programs string) func(image string) ([]string, error) {
	return func(image string) ([]string, error) {
		name := strings.TrimSuffix(image, ":latest") // which faas-cli adds to what a stack file says
		switch name {
		case masterImage, workerImage:
			self, err := os.Executable()
			return []string{self, functionCommand, filepath.Base(name)}, err
		}
		if programs == "" {
			return nil, fmt.Errorf("image %q is not known here; the local provider has %s and %s, and with --programs FOLDER the executable files of a folder", image, masterImage, workerImage)
		}
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(programs, path)
		}
		within, err := filepath.Rel(programs, path)
		if err != nil || !filepath.IsLocal(within) {
			return nil, fmt.Errorf("image %q is not in %s, the folder of --programs", image, programs)
		}
		info, err := os.Stat(path)
		switch {
		case err != nil:
			return nil, fmt.Errorf("image %q is neither %s nor %s, nor a file in %s: %w", image, masterImage, workerImage, programs, err)
		case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
			return nil, fmt.Errorf("image %q is %s, which is not an executable file; make it one with chmod +x", image, path)
		}
		return []string{path}, nil
	}
}

// stack is a local stack with master and worker on it.
type stack struct {
	*local.Stack
	ready atomic.Bool // master and worker are warm

	connector *connector.Connector // messages on topics call functions
	nats      *nats.Conn           // its
	stop      context.CancelFunc   // of it
	wg        sync.WaitGroup
}

// connect starts a connector on the stack's NATS.
func (st *stack) connect(auth local.Auth, log *slog.Logger) error {
	nc, err := broker.Connect(st.NATS, broker.Options{Name: "sheaf connector", Credentials: st.ConnectorCreds, Log: log})
	if err != nil {
		return err
	}
	c := connector.NewConnector()
	c.Conn, c.Gateway, c.Resolver, c.Log = nc, st.URL, st.Registry, log
	c.Lookup = connector.NewLookup(st.URL, ",", auth.User, auth.Password)
	c.Rebuild, c.Grace = time.Second, 2*time.Second
	ctx, stop := context.WithCancel(context.Background())
	tracer, flush, err := tracing.Open(ctx, os.Getenv, "sheaf-connector", version, log)
	if err != nil {
		stop()
		nc.Close()
		return usageError{err}
	}
	c.Tracer = tracer
	st.connector, st.nats, st.stop = c, nc, stop
	st.wg.Go(func() {
		defer c.Lookup.Close()
		defer flush()
		if c.Open(ctx, broker.Config{Grace: c.Grace, Log: log}) == nil { // else the stack ends
			c.Run(ctx)
			c.Bus.Close()
		}
	})
	return nil
}

// Close ends the stack: first what calls its functions.
func (st *stack) Close() {
	if st.stop != nil {
		st.stop()
		st.wg.Wait()
		st.nats.Close()
	}
	st.Stack.Close()
}

// start starts a local stack at cfg's port, or at any free one if that is taken
// and may be another, and deploys master and worker.
func start(ctx context.Context, cfg local.Config, orAny bool, workers int, s std, verbose bool) (*stack, error) {
	if cfg.Command == nil {
		cfg.Command = command("")
	}
	st := &stack{}
	port := cfg.Port
	cfg.Version, cfg.Log = version, logger(s.err, verbose)
	cfg.Healthy = func() error {
		if !st.ready.Load() {
			return errors.New("master and worker are starting; ask again")
		}
		return nil
	}
	var err error
	st.Stack, err = local.Start(cfg)
	if errors.Is(err, syscall.EADDRINUSE) && orAny {
		cfg.Port = 0
		if st.Stack, err = local.Start(cfg); err == nil {
			fmt.Fprintf(s.err, "port %d is taken; the gateway is at %s\n", port, st.URL)
		}
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("port %d is taken; name another with --port, or 0 for any free one", port)
	}
	if err != nil {
		return nil, err
	}
	if err := st.deploy(ctx, workers, most(cfg.Community)); err != nil {
		st.Close()
		return nil, err
	}
	if err := st.connect(cfg.Auth, cfg.Log); err != nil {
		st.Close()
		return nil, err
	}
	return st, nil
}

// logger logs what matters, or everything.
func logger(w io.Writer, verbose bool) *slog.Logger {
	level := slog.LevelError
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// deploy deploys master and worker. One that is there, because the stack was
// here before, stays as it is, but for the number of workers.
func (st *stack) deploy(ctx context.Context, workers, most int) error {
	there := map[string]bool{}
	for _, f := range st.Provider.Functions() {
		there[f.Name] = true
	}
	if there["worker"] {
		if err := st.Client().Scale(ctx, "worker", workers); err != nil {
			return err
		}
	}
	labels := func(least int) *map[string]string {
		return &map[string]string{local.LabelMin: fmt.Sprint(least), local.LabelMax: fmt.Sprint(most)}
	}
	for _, spec := range []types.FunctionDeployment{{
		Service: "master", Image: masterImage, Labels: labels(1), Annotations: &map[string]string{connector.AnnotationTopic: masterTopic},
		EnvVars: map[string]string{"worker_function": "worker", "GOMEMLIMIT": "44MiB", "GOGC": "50",
			"job_input_allow": "127.0.0.0/8,::1"},
	}, {
		Service: "worker", Image: workerImage, Labels: labels(workers),
		EnvVars: map[string]string{"GOMEMLIMIT": "32MiB"},
	}} {
		if there[spec.Service] {
			continue
		}
		if err := st.Client().Deploy(ctx, spec); err != nil {
			return err
		}
	}
	return nil
}

// images names the functions whose images are not here, and says why: they were
// deployed by another stack, and are kept.
func (st *stack) images() map[string]error {
	missing := map[string]error{}
	for _, f := range st.Provider.Functions() {
		if _, err := st.Command(f.Image); err != nil {
			missing[f.Name] = err
		}
	}
	return missing
}

// warm waits until as many replicas are ready as were deployed.
func (st *stack) warm(ctx context.Context) error {
	missing := st.images()
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("master and worker were not ready within a minute"))
	defer cancel()
	for {
		ready := true
		for _, name := range []string{"master", "worker"} {
			ok := missing[name] != nil
			for _, r := range st.Registry.Records() {
				ok = ok || r.Function == name+"."+local.Namespace && r.Desired > 0 && len(r.View().Replicas) >= r.Desired
			}
			ready = ready && ok
		}
		if ready && st.connector.Ready() == nil {
			st.ready.Store(true)
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-st.Failed():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// split takes a list with commas apart. That of "" has no element, and is not nil.
func split(list string) []string {
	out := []string{}
	for e := range strings.SplitSeq(list, ",") {
		if e = strings.TrimSpace(e); e != "" {
			out = append(out, e)
		}
	}
	return out
}

// absolute is where a file or folder is, wherever the process goes; "" is "".
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// most is how many worker replicas there may be.
func most(community bool) int {
	if community {
		return maxCommunity
	}
	return maxWorkers
}

// up is the command that keeps a stack running.
func up(ctx context.Context, args []string, s std) error {
	f := flags(s, "up", "up [FLAGS]", "sheaf up --port 8080 --workers 4")
	port := f.Int("port", 8080, "to listen at, on 127.0.0.1; 0 means any free `port`")
	workers := f.Int("workers", defaultWorkers(), "`number` of worker replicas")
	data := f.String("data", "", "`folder` in which functions, secrets and queues are kept for the next time; without it they are forgotten")
	auth := f.Bool("auth", false, "ask who uses /system/...: user admin, with a random password that faas-cli login is told")
	passwordFile := f.String("password-file", "", "`file` with the password to ask for; means --auth")
	programs := f.String("programs", "", "`folder` whose executable files may be deployed as functions: the image is the file's name")
	buildDir := f.String("build-dir", "build", "`folder` in which faas-cli up --shrinkwrap leaves what is built when it is deployed; it need not exist yet")
	secretFile := f.String("payload-secret", "", "`file` with the secret that faas-cli up --remote-builder signs builds with; without it one is made")
	community := f.Bool("community", false, "keep within what OpenFaaS's Community Edition allows: 5 replicas, 15 functions, asynchronous calls of 256,000 bytes")
	behind := f.String("behind", "", "`URL` of an OpenFaaS gateway that has this stack as its provider: functions call and are scaled through it")
	keyFile := f.String("callback-key-file", "", "`file` with the key that signs callbacks of asynchronous calls")
	allow := f.String("callback-allow", "127.0.0.0/8,::1", "`list` of where callbacks may go beside public addresses: addresses, CIDRs and host:port, with commas between")
	verbose := f.Bool("verbose", false, "log what happens")
	rest, err := parse(f, args)
	given := map[string]bool{}
	f.Visit(func(fl *flag.Flag) { given[fl.Name] = true })
	if *community && !given["workers"] {
		*workers = min(*workers, maxCommunity)
	}
	switch {
	case err != nil:
		return err
	case len(rest) > 0:
		return usagef("up takes no argument, and got %q", rest[0])
	case *port < 0 || *port > 65535:
		return usagef("--port is %d, and must be from 0 to 65535", *port)
	case *workers < 1 || *workers > most(*community):
		return usagef("--workers is %d, and must be from 1 to %d", *workers, most(*community))
	}
	cfg := local.Config{Port: *port, Dir: *data, Gateway: *behind, Community: *community}
	cfg.Async.SigningKeyFile, cfg.Async.CallbackAllow = *keyFile, split(*allow)
	if err := cfg.Async.Validate(); err != nil {
		return usageError{err}
	}
	if *programs != "" {
		if *programs, err = filepath.Abs(*programs); err != nil {
			return err
		}
		if info, err := os.Stat(*programs); err != nil || !info.IsDir() {
			return usagef("--programs is %q, and must be a folder", *programs)
		}
	}
	cfg.Command = command(*programs)
	if cfg.Build.SecretFile, err = absolute(*secretFile); err != nil {
		return err
	}
	if cfg.Build.Dir, err = absolute(*buildDir); err != nil {
		return err
	}
	if err := cfg.Build.Validate(); err != nil {
		return usagef("--payload-secret: %w", err)
	}
	var login string
	if *auth || *passwordFile != "" {
		if cfg.Auth, login, err = newLogin(*passwordFile); err != nil {
			return err
		}
	}
	begun := time.Now()
	st, err := start(ctx, cfg, !given["port"], *workers, s, *verbose)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := st.warm(ctx); err != nil {
		return err
	}
	for name, err := range st.images() {
		fmt.Fprintf(s.err, "function %s cannot run until it is deployed anew: %v\n", name, err)
	}
	fmt.Fprintf(s.err, `sheaf is up at %[1]s after %[2]v: master, and worker with %[3]d replicas. End it with ^C.

Try, in another terminal:
  curl --data-binary @README.md %[1]s/function/master
  curl -F file=@README.md -H 'Accept: application/json' '%[1]s/function/master?block=300'
  curl -N --data-binary @README.md -H 'Accept: application/x-ndjson' %[1]s/function/master
  sheaf ps --watch --gateway %[1]s
  nats --server %[5]s request %[6]s 'to be or not to be'

Build and deploy functions with faas-cli (faas-cli new --lang sheaf-go NAME), by either of
  faas-cli up --gateway %[1]s --shrinkwrap --skip-push
  faas-cli up --gateway %[1]s --remote-builder %[1]s --payload-secret %[4]s
`, st.URL, time.Since(begun).Round(time.Millisecond), *workers, st.BuildSecretFile, st.ClientURL(), masterTopic)
	if login != "" {
		fmt.Fprintf(s.err, "\nThe API asks for a login:\n  %s --gateway %s\n", login, st.URL)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-st.Failed():
		return err
	}
}
