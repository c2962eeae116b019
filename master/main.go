package master

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/direct"
	"github.com/sheaf-project/sheaf/gateway"
	"github.com/sheaf-project/sheaf/internal/login"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	jobs "github.com/sheaf-project/sheaf/job"
	"github.com/sheaf-project/sheaf/registry"
	"github.com/sheaf-project/sheaf/topic"
)

// Main runs job as a function of OpenFaaS, and ends the process when it is told
// to. Beside what every sheaf function reads (package worker), it reads from
// the environment:
//
//	nats_url         where the record of replicas is; nats://nats.openfaas:4222
//	nats_creds       a secret to log in there with: an nkey's seed, or credentials
//	gateway_url      for route=gateway; http://gateway.openfaas:8080
//	worker_function  that does the work; "worker"
//	namespaces       whose functions a request may name, separated by commas; openfaas-fn
//	max_input, max_block  bytes
//	max_result       bytes of one block's result; twice max_block and a little
//	max_blocks, max_workers, max_jobs numbers
//	job_memory       bytes of blocks held for one job
//	read_timeout     how long an upload may stall
//	replica_wait     how long blocks wait while no replica is ready
//	replica_inflight requests in flight on one replica, over all jobs; 8
//
// and, for jobs that outlive their callers (docs/JOBS.md):
//
//	max_queued       jobs that wait or run, over all masters; 1000
//	parallel_jobs    that this master runs at once; 4
//	max_job_input, max_job_result  bytes of one job's upload, and of its results; 1 GiB
//	max_job_blocks   of one job; 100,000
//	job_ttl          how long a job is kept after its end; 24h
//	job_input_ttl    how long an input is kept at most; 168h
//	job_store_bytes, job_input_bytes  in JetStream, over all jobs; 1 GiB and 4 GiB
//	job_input_allow  where inputs may be that a job names by URL, beside public addresses: addresses, CIDRs, host:port
//	job_input_buckets  object stores of JetStream that jobs may name; sheaf-inputs
//	job_lease        how long a master may be silent before others take its jobs; 1200ms
func Main(job Job) {
	os.Exit(serve.Main(func(getenv func(string) string) (*serve.Server, func(), error) {
		return Env(job, getenv)
	}))
}

// Env is the server of job as a function of OpenFaaS, by the environment that
// Main reads. stop ends what it holds open, when it serves no more. The error
// names the variable, its value and what was expected.
func Env(job Job, getenv func(string) string) (s *serve.Server, stop func(), err error) {
	s, err = serve.Env(getenv)
	if err != nil {
		return nil, nil, err
	}
	v := serve.Vars{Getenv: getenv}
	const most = 1 << 50
	self := s.Function
	if self == "" {
		self = "master"
	}
	h := &Handler{
		Job:        job,
		Self:       self,
		Function:   v.String("worker_function", "worker"),
		Namespaces: strings.Split(v.String("namespaces", registry.DefaultNamespace), ","),
		MaxInput:   int64(v.Int("max_input", DefaultMaxInput, 1, most)),
		MaxBlock:   v.Int("max_block", DefaultMaxBlock, 1, 1<<31-1),
		MaxBlocks:  v.Int("max_blocks", DefaultMaxBlocks, 1, 1<<40),
		MaxWorkers: v.Int("max_workers", DefaultMaxWorkers, 1, 1<<20),
		Memory:     v.Int("job_memory", DefaultMemory, 1, most),
		Patience:   v.Duration("read_timeout", DefaultPatience),

		ReplicaWait: v.Duration("replica_wait", sheaf.DefaultReplicaWait),
		Turns:       &sheaf.Turns{PerReplica: v.Int("replica_inflight", sheaf.DefaultTurnsPerReplica, 1, 1<<20)},
		Log:         slog.Default(),
	}
	h.MaxJobInput = int64(v.Int("max_job_input", DefaultMaxJobInput, 1, most))
	h.MaxJobResult = int64(v.Int("max_job_result", DefaultMaxJobResult, 1, most))
	h.MaxJobBlocks = v.Int("max_job_blocks", DefaultMaxJobBlocks, 1, 1<<30)
	h.InputBuckets = strings.Split(v.String("job_input_buckets", "sheaf-inputs"), ",")
	allow := strings.FieldsFunc(v.String("job_input_allow", ""), func(r rune) bool { return r == ',' || r == ' ' })
	kept := jobs.Config{
		Function: self + "." + v.String("OPENFAAS_NAMESPACE", registry.DefaultNamespace), Master: s.Replica + "-" + rand.Text()[:8],
		MaxQueued: v.Int("max_queued", 1000, 1, 1<<30), Parallel: v.Int("parallel_jobs", 4, 1, 1<<20),
		ResultTTL: v.Duration("job_ttl", 24*time.Hour), InputTTL: v.Duration("job_input_ttl", 7*24*time.Hour),
		StoreBytes: int64(v.Int("job_store_bytes", 1<<30, 1<<20, most)), InputBytes: int64(v.Int("job_input_bytes", 4<<30, 1<<20, most)),
		Lease: v.Duration("job_lease", 1200*time.Millisecond), Log: h.Log,
	}
	s.MaxInflight = v.Int("max_jobs", 100, 1, 1<<20)
	// A block that is one word, or all different short ones, has a result that
	// is longer than it is itself.
	maxResult := int64(v.Int("max_result", 2*h.MaxBlock+1<<10, 1, most))
	natsURL := v.String("nats_url", "nats://nats.openfaas:4222")
	gatewayURL := v.String("gateway_url", "http://gateway.openfaas:8080")
	if v.Err != nil {
		return nil, nil, v.Err
	}
	expected := func(name, value, what string) (*serve.Server, func(), error) {
		return nil, nil, fmt.Errorf("environment variable %s is %q; expected %s", name, wire.Cut(value), what)
	}
	if !functionName.MatchString(h.Function) {
		return expected("worker_function", h.Function, "the name of a function, as worker or worker.openfaas-fn")
	}
	if name, _, _ := strings.Cut(h.Function, "."); job.Both {
		h.Self = ""
	} else if name == self {
		return expected("worker_function", h.Function, "another function than this one, which takes inputs and no blocks")
	}
	if u, err := url.Parse(gatewayURL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return expected("gateway_url", gatewayURL, "a URL such as http://gateway.openfaas:8080")
	}
	var user []nats.Option
	if secret := v.Secret("nats_creds"); secret != nil {
		if user, err = login.Options(secret); err != nil {
			return expected("nats_creds", getenv("nats_creds"), "a file, or a secret of the function, with a login for NATS; "+err.Error())
		}
	}
	if v.Err != nil {
		return nil, nil, v.Err
	}
	if h.Inputs, err = InputPolicy(allow); err != nil {
		return expected("job_input_allow", strings.Join(allow, ","), "addresses, CIDRs or host:port, separated by commas")
	}
	nc, err := nats.Connect(natsURL, append(user, nats.Name("sheaf master "+s.Replica),
		nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(250*time.Millisecond),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { h.Log.Warn("NATS", "err", err) }))...)
	if err != nil { // it repeats the value, which may hold a password
		return nil, nil, errors.New("environment variable nats_url cannot be used; expected URLs such as nats://nats.openfaas:4222")
	}
	reg, err := registry.Open(nc, h.Log)
	if err != nil {
		nc.Close()
		return nil, nil, err
	}
	if kept.Step, err = killAt(v.String("sheaf_kill_at", "")); err == nil {
		h.Jobs, err = jobs.Open(nc, kept)
	}
	if err != nil {
		reg.Close()
		nc.Close()
		return nil, nil, err
	}
	messages, err := topic.New(nc, maxResult)
	if err != nil {
		h.Jobs.Close()
		reg.Close()
		nc.Close()
		return nil, nil, err
	}
	straight, through := direct.New(maxResult), gateway.NewRoute(gatewayURL, maxResult)
	straight.Sign(s.Signer)
	through.Sign(s.Signer)
	messages.Sign(s.Signer)
	h.Resolver, h.AtLeast, h.Direct, h.Gateway, h.Topic = reg, reg.AtLeast, straight, through, messages
	s.Handler = h
	running, leave := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { h.RunJobs(running) })
	return s, func() {
		leave()
		wg.Wait()
		h.Jobs.Close()
		reg.Close()
		messages.Close()
		nc.Close()
		straight.Close()
		through.Close()
	}, nil
}

var killForm = regexp.MustCompile(`^([a-z]+\.(?:before|after)):([1-9][0-9]{0,5}):(/.+)$`)

// killAt returns a hook that ends this process as kill -9 does when it comes to
// a step for the n-th time, as in "block.after:3:/tmp/mark". It does so once:
// it makes the file, and does nothing when that is there. It is for tests that
// masters die at the worst of times; "" is no hook.
func killAt(value string) (func(string), error) {
	if value == "" {
		return nil, nil
	}
	m := killForm.FindStringSubmatch(value)
	if m == nil {
		return nil, fmt.Errorf("environment variable sheaf_kill_at is %q; expected a step, a number and a file, such as block.after:3:/tmp/mark", wire.Cut(value))
	}
	n, _ := strconv.ParseInt(m[2], 10, 64) // digits, by the pattern
	var passed atomic.Int64
	return func(step string) {
		if step != m[1] || passed.Add(1) != n {
			return
		}
		if f, err := os.OpenFile(m[3], os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
			_ = f.Close() // it was made, which is all
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}, nil
}
