// Command connector lets messages call functions, and keeps the record of
// replicas. It is configured by its environment: see docs/CONNECTOR.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/connector"
	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/hello"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/kube"
	"github.com/sheaf-project/sheaf/registry"
	"github.com/sheaf-project/sheaf/tracing"
)

func main() {
	d, err := read(os.Getenv, os.ReadFile)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, cancel) // a second signal ends the process at once
	err = d.run(ctx)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// daemon is the process: a connector, the watcher beside it, and what both show.
type daemon struct {
	connector *connector.Connector
	broker    broker.Config
	url       string // of the bus
	record    string // URL of the NATS that holds the record of replicas
	options   broker.Options
	listen    string
	sources   []string      // of addresses
	hello     *hello.Source // nil unless it is one of them
	namespace string        // of functions, on Kubernetes
	watch     bool
	durable   bool
	user      string
	password  string
	delimiter string
	log       *slog.Logger
	getenv    func(string) string
}

// read reads the environment.
func read(getenv func(string) string, readFile func(string) ([]byte, error)) (*daemon, error) {
	v := serve.Vars{Getenv: getenv}
	c := connector.NewConnector()
	d := &daemon{connector: c, log: slog.Default(), getenv: getenv}
	expected := func(name, value, what string) error {
		return fmt.Errorf("environment variable %s is %q; expected %s", name, wire.Cut(value), what)
	}
	var bad error // the first
	fail := func(name, value, what string) {
		if bad == nil {
			bad = expected(name, value, what)
		}
	}
	boolean := func(name string, def bool) bool {
		switch s := getenv(name); s {
		case "":
			return def
		case "true", "1":
			return true
		case "false", "0":
			return false
		default:
			fail(name, s, "true, false, 1 or 0")
			return def
		}
	}
	positive := func(name string, def time.Duration) time.Duration {
		n := v.Duration(name, def)
		if n == 0 && v.Err == nil {
			fail(name, getenv(name), "a duration over 0, such as 30s")
		}
		return n
	}
	c.Gateway = v.String("gateway_url", "http://gateway.openfaas:8080")
	c.Async = boolean("asynchronous_invocation", false)
	c.ContentType = v.String("content_type", "text/plain")
	c.Rebuild = positive("rebuild_interval", connector.DefaultRebuild)
	c.Timeout = positive("upstream_timeout", connector.DefaultTimeout)
	c.Inflight = v.Int("max_inflight", connector.DefaultInflight, 1, 1<<16)
	c.Attempts = v.Int("retry_attempts", connector.DefaultAttempts, 1, 1000)
	c.MinWait = positive("retry_min_wait", connector.DefaultMinWait)
	c.MaxWait = positive("retry_max_wait", connector.DefaultMaxWait)
	c.Patience = positive("retry_unreachable", connector.DefaultPatience)
	c.Grace = positive("write_timeout", connector.DefaultGrace)
	c.MaxAnswer = int64(v.Int("max_answer", connector.DefaultMaxAnswer, 1, 1<<40))
	c.PrintResponse, c.PrintBody, c.PrintSync = boolean("print_response", false), boolean("print_response_body", false), boolean("print_sync", false)
	d.delimiter = v.String("topic_delimiter", ",")
	for t := range strings.SplitSeq(getenv("topics"), d.delimiter) {
		if t = strings.TrimSpace(t); t == "" {
			continue
		}
		if err := broker.CheckTopic(t); err != nil {
			fail("topics", t, "topics such as orders.new or orders.*: "+err.Error())
		}
		c.Topics = append(c.Topics, t)
	}

	kind := broker.Type(v.String("broker_type", string(broker.Auto)))
	known := false
	for _, t := range broker.Types() {
		known = known || t == kind
	}
	if !known {
		fail("broker_type", string(kind), fmt.Sprintf("one of %v", broker.Types()))
	}
	d.broker = broker.Config{
		Type: kind, Group: v.String("queue_group", broker.DefaultGroup), Cluster: v.String("broker_cluster", broker.DefaultCluster),
		Stream: v.String("broker_stream", broker.DefaultStream), Dead: v.String("dead_letter", broker.DefaultDead),
		AckWait: positive("ack_wait", broker.DefaultAckWait), Inflight: c.Inflight, Grace: c.Grace,
	}
	d.url = natsURL(v.String("broker_host", v.String("nats_url", "nats://nats.openfaas:4222")))
	d.record = natsURL(v.String("nats_url", d.url))
	d.namespace = v.String("function_namespace", registry.DefaultNamespace)
	for one := range strings.SplitSeq(v.String("replica_source", sourceGateway), ",") {
		if one = strings.TrimSpace(one); one != sourceGateway && one != sourceKube && one != sourceHello || slices.Contains(d.sources, one) {
			fail("replica_source", getenv("replica_source"), fmt.Sprintf("%s, %s or %s, or several of them, each once, with commas between", sourceGateway, sourceKube, sourceHello))
		}
		d.sources = append(d.sources, one)
	}
	if slices.Contains(d.sources, sourceHello) {
		d.hello = &hello.Source{Signer: v.Signer(), Lease: positive("hello_lease", hello.DefaultLease), Loopback: boolean("hello_loopback", false), Log: d.log}
		if lease := d.hello.Lease; lease < time.Second || lease > time.Hour {
			fail("hello_lease", getenv("hello_lease"), "a duration from 1s to 1h")
		}
		for one := range strings.SplitSeq(getenv("hello_networks"), ",") {
			if one = strings.TrimSpace(one); one == "" {
				continue
			}
			network, err := netip.ParsePrefix(one)
			if err != nil {
				fail("hello_networks", one, "networks such as 10.62.0.0/16, with commas between")
			}
			d.hello.Networks = append(d.hello.Networks, network)
		}
	}
	d.options = broker.Options{Name: "sheaf connector " + getenv("HOSTNAME"), Credentials: getenv("nats_creds"), CA: getenv("nats_ca")}
	for name, file := range map[string]string{"nats_creds": d.options.Credentials, "nats_ca": d.options.CA} {
		if file != "" {
			if _, err := readFile(file); err != nil {
				fail(name, file, "the path of a file that can be read")
			}
		}
	}
	d.listen = v.String("sheaf_listen", fmt.Sprintf(":%d", v.Int("port", 8080, 1, 65535)))
	if _, _, err := net.SplitHostPort(d.listen); err != nil {
		fail("sheaf_listen", d.listen, "host:port, such as 127.0.0.1:8080")
	}
	d.watch, d.durable = boolean("watcher", true), boolean("watcher_durable", false)
	if u, err := url.Parse(c.Gateway); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		fail("gateway_url", c.Gateway, "a URL such as http://gateway.openfaas:8080")
	}
	if boolean("basic_auth", false) {
		folder := v.String("secret_mount_path", "/run/secrets/")
		for name, into := range map[string]*string{"basic-auth-user": &d.user, "basic-auth-password": &d.password} {
			text, err := readFile(filepath.Join(folder, name))
			if err != nil {
				fail("secret_mount_path", folder, "a folder with the files basic-auth-user and basic-auth-password, or basic_auth=false")
			}
			*into = strings.TrimSpace(string(text))
		}
	}
	return d, errors.Join(v.Err, bad)
}

// Sources of replica addresses.
const (
	sourceGateway = "gateway" // the stream that the local provider has beside its gateway
	sourceKube    = "kube"    // the EndpointSlices of Kubernetes
	sourceHello   = "hello"   // replicas announce themselves
)

// natsURL makes a URL of what OpenFaaS's connectors take: a host, or host:port.
func natsURL(s string) string {
	if strings.Contains(s, "://") {
		return s
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		s = net.JoinHostPort(s, "4222")
	}
	return "nats://" + s
}

// run runs the process until ctx ends.
func (d *daemon) run(ctx context.Context) error {
	c := d.connector
	nc, err := broker.Connect(d.url, d.options)
	if err != nil { // the URL may hold a password
		return fmt.Errorf("environment variable broker_host: %w", err)
	}
	defer nc.Close()
	tracer, flush, err := tracing.Open(ctx, d.getenv, "sheaf-connector", "", d.log)
	if err != nil {
		return err
	}
	defer flush()
	c.Conn, c.Tracer = nc, tracer
	c.Lookup = connector.NewLookup(c.Gateway, d.delimiter, d.user, d.password)
	defer c.Lookup.Close()
	views := nc
	if d.record != d.url {
		if views, err = broker.Connect(d.record, d.options); err != nil {
			return fmt.Errorf("environment variable nats_url: %w", err)
		}
		defer views.Close()
	}
	record, err := registry.Open(views, d.log)
	if err != nil {
		return err
	}
	defer record.Close()
	c.Resolver = record
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", d.listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	var watcher *registry.Watcher
	if d.watch {
		api, err := gateway.NewClient(c.Gateway, d.user, d.password)
		if err != nil {
			return err
		}
		defer api.Close()
		if watcher, err = d.newWatcher(views, api); err != nil {
			return err
		}
		c.Show(watcherMetrics{watcher.Stats})
	}
	mux := http.NewServeMux()
	mux.Handle("/", c.Front(record))
	if d.watch && d.hello != nil {
		mux.Handle("/hello", d.hello)
		c.Show(helloMetrics{d.hello})
	}
	front := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug)}
	var wg sync.WaitGroup
	defer wg.Wait()
	broken := make(chan error, 1)
	wg.Go(func() {
		if err := front.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			broken <- fmt.Errorf("serve %s: %w", l.Addr(), err)
		}
	})
	defer func() { _ = front.Close() }() // who watches it sees the end of the connection
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wg.Go(func() {
		select {
		case err := <-broken:
			cancel(err)
		case <-ctx.Done():
		}
	})
	d.log.Info("connector starts", "gateway", c.Gateway, "broker", redact(d.url), "type", d.broker.Type, "topics", c.Topics, "listen", l.Addr().String())
	if watcher != nil {
		wg.Go(func() { d.keep(ctx, watcher) })
	}
	if err := c.Open(ctx, d.broker); err != nil {
		if ctx.Err() != nil {
			return nil // it was told to end before NATS was there
		}
		return err
	}
	defer c.Bus.Close()
	c.Run(ctx)
	_ = nc.FlushTimeout(5 * time.Second) // the last answers and outcomes; without NATS there is nothing to flush to
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// newWatcher makes the watcher of the sources that replica_source names.
func (d *daemon) newWatcher(nc *nats.Conn, api *gateway.Client) (*registry.Watcher, error) {
	provider := &listed{Provider: api}
	var sources []registry.Source
	for _, one := range d.sources {
		switch one {
		case sourceKube:
			source, err := kube.InCluster(d.namespace, d.log)
			if err != nil {
				return nil, fmt.Errorf("environment variable replica_source names kube: %w", err)
			}
			sources = append(sources, source)
		case sourceHello:
			d.hello.Known = provider.has
			sources = append(sources, d.hello)
		default:
			sources = append(sources, api)
		}
	}
	return &registry.Watcher{Conn: nc, Provider: provider, Source: registry.Merge(sources...), Durable: d.durable, Log: d.log}, nil
}

// keep keeps the record of replicas, again and again.
func (d *daemon) keep(ctx context.Context, w *registry.Watcher) {
	told := false
	for ctx.Err() == nil {
		if err := w.Run(ctx); err != nil && ctx.Err() == nil && !told && w.Conn.IsConnected() {
			told = true
			d.log.Warn("the record of replicas cannot be kept; trying again", "err", err)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// redact takes the users, who may be tokens, out of URLs that are separated by commas.
func redact(s string) string {
	var list []string
	for part := range strings.SplitSeq(s, ",") {
		u, err := url.Parse(strings.TrimSpace(part))
		if err != nil {
			return "" // nobody knows what is in it
		}
		u.User = nil
		list = append(list, u.String())
	}
	return strings.Join(list, ",")
}
