package local

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf"
)

// replica is one process of a function. What is in it changes under the
// provider's mutex.
type replica struct {
	sheaf.Replica
	generation int
	spec       types.FunctionDeployment
	process    *process
	calls      int           // that go through the front now
	used       uint64        // the function's turn when the front used it last
	end        chan struct{} // closed when it shall drain
	quiet      chan struct{} // closed when it drains and no call goes through the front
}

const (
	startTimeout = 30 * time.Second // for a new process to answer
	drainTimeout = 10 * time.Second // from the order to end to SIGKILL
	pipeTimeout  = time.Second      // for the last lines of one that has ended

	readyTimeout     = time.Second // for one answer of a process that starts
	livenessInterval = 5 * time.Second
	livenessMisses   = 3 // in a row, after which a replica hangs
)

var errEnded = errors.New("told to end")

// process starts r's process, marks r ready once it answers, and returns when
// it has ended. A replica that is told to end is given time to finish.
func (p *Provider) process(f *function, r *replica) error {
	argv, err := p.command(r.spec.Image)
	if err != nil {
		return err
	}
	addr, err := p.address()
	if err != nil {
		return err
	}
	defer p.leave(addr)
	secrets, err := p.mount(r)
	if err != nil {
		return err
	}
	defer p.unmount(secrets)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = p.environment(r, addr, secrets)
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = in, in
	ps, err := p.spawn.start(cmd)
	in.Close()
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	p.guard.began(ps.pid)
	var logged sync.WaitGroup
	logged.Go(func() { f.logs.copy(r.Function, r.ID, out) })
	exited := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		ps.kill() // what it left behind in its group, and what may hold the pipe
		p.guard.ended(ps.pid)
		_ = out.SetReadDeadline(time.Now().Add(pipeTimeout)) // one that left the group may still hold it
		logged.Wait()
		exited <- err
	}()
	p.mu.Lock()
	r.URL = "http://" + addr
	r.process = ps
	p.touch(f)
	p.mu.Unlock()

	ctx, cancel := context.WithCancel(p.ctx)
	var probes sync.WaitGroup
	defer probes.Wait()
	defer cancel()
	answered, hangs := make(chan error, 1), make(chan struct{}, 1)
	probes.Go(func() { answered <- p.answers(ctx, addr) })
	end := r.end
	var quiet <-chan struct{}
	var patience, deadline <-chan time.Time
	terminate := func() {
		quiet, patience = nil, nil
		ps.signal(syscall.SIGTERM)
	}
	for {
		select {
		case err := <-answered:
			answered = nil
			if err != nil && p.ctx.Err() == nil {
				f.logs.add(r.Function, r.ID, fmt.Sprintf("replica does not answer at %s within %v", addr, startTimeout))
				ps.kill()
				continue
			}
			p.mu.Lock()
			if r.State == sheaf.Starting {
				r.State, r.Since = sheaf.Ready, time.Now().UTC()
				p.touch(f)
				p.reconcile(f)
			}
			p.mu.Unlock()
			probes.Go(func() {
				if p.hangs(ctx, addr) {
					hangs <- struct{}{}
				}
			})
		case <-hangs:
			f.logs.add(r.Function, r.ID, fmt.Sprintf("replica hangs: %d times no answer at %s within %v; it is killed, and another one started", livenessMisses, addr, p.Liveness))
			ps.kill()
		case <-end:
			// A call may be on its way to the replica, which would refuse it, or
			// cut it, once it is told to end: calls through the front end first.
			end, quiet = nil, r.quiet
			patience, deadline = time.After(p.DrainTime/2), time.After(p.DrainTime)
		case <-quiet:
			terminate()
		case <-patience:
			terminate()
		case <-deadline:
			ps.kill()
		case <-p.ctx.Done():
			ps.kill()
			return <-exited
		case err := <-exited:
			return err
		}
	}
}

// ask gets a path of the function at addr, and returns the answer's status.
func (p *Provider) ask(ctx context.Context, addr, path string, within time.Duration) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return 0, err
	}
	resp, err := p.probe.Do(req)
	if err != nil {
		return 0, err
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 4096)) // only its status matters
	return resp.StatusCode, resp.Body.Close()
}

// hangs returns true when the function at addr has stopped to answer, and false
// at ctx's end. Whoever never said 200 at /_/health may be busy with a call, one
// at a time, and is left alone.
func (p *Provider) hangs(ctx context.Context, addr string) bool {
	tick := time.NewTicker(p.Liveness)
	defer tick.Stop()
	lives := false
	for misses := 0; misses < livenessMisses; {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		switch status, err := p.ask(ctx, addr, "/_/health", p.Liveness); {
		case err == nil:
			lives = lives || status == http.StatusOK
			misses = 0
		case lives && errors.Is(err, context.DeadlineExceeded):
			misses++
		}
	}
	return ctx.Err() == nil
}

// answers returns once the function at addr is ready: /_/ready says 200, or it
// is a plain HTTP function that answers anything but "not yet".
func (p *Provider) answers(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	pause := time.Millisecond
	for {
		status, err := p.ask(ctx, addr, "/_/ready", readyTimeout)
		if err == nil && status != http.StatusServiceUnavailable && status != http.StatusTooManyRequests {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
			pause = min(pause*5/4+100*time.Microsecond, 20*time.Millisecond)
		}
	}
}

// address finds a port for a replica that no other one has: a process that is
// still starting does not hold its own yet. A process of somebody else may take
// it first; the replica then fails to start, and the next one gets another.
func (p *Provider) address() (string, error) {
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", fmt.Errorf("find a free port: %w", err)
		}
		addr := l.Addr().String()
		p.mu.Lock()
		taken := p.ports[addr]
		p.ports[addr] = true
		p.mu.Unlock()
		if err := l.Close(); err != nil || !taken {
			return addr, err
		}
	}
}

// leave gives an address back.
func (p *Provider) leave(addr string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ports, addr)
}

// environment is what a replica's process sees: as in a container, only what
// the deployment and the provider say, who it is, where to listen, and where
// its secrets are.
func (p *Provider) environment(r *replica, addr, secrets string) []string {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		port = "8080"
	}
	env := []string{
		"port=" + port, "PORT=" + port, "sheaf_listen=" + addr,
		"OPENFAAS_NAME=" + r.Function, "OPENFAAS_NAMESPACE=" + Namespace,
		"HOSTNAME=" + r.ID, "sheaf_replica=" + r.ID,
		"healthcheck_interval=0s",
	}
	for _, k := range []string{"PATH", "HOME", "TMPDIR", "GOCOVERDIR", "SYSTEMROOT"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	for k, v := range p.Env { // of two settings of a name, the last one counts
		env = append(env, k+"="+v)
	}
	if r.spec.EnvProcess != "" {
		env = append(env, "fprocess="+r.spec.EnvProcess)
	}
	for k, v := range r.spec.EnvVars {
		env = append(env, k+"="+v)
	}
	if secrets != "" { // whatever path the deployment thinks they are at
		env = append(env, MountEnv+"="+secrets)
	}
	return env
}

// process is a process and the group that it leads.
type process struct {
	pid int
}

// kill ends the whole group at once.
func (p *process) kill() { p.signal(syscall.SIGKILL) }

// signal is sent to the whole group; one that has ended is not there to hear it.
func (p *process) signal(s syscall.Signal) { _ = syscall.Kill(-p.pid, s) }

// spawner starts processes from one thread of the operating system, which
// lives as long as the spawner: Linux kills a child with PR_SET_PDEATHSIG when
// the thread that started it ends, not the process.
type spawner struct {
	orders chan order
	closed sync.Once // of orders
	done   chan struct{}
}

type order struct {
	cmd  *exec.Cmd
	done chan error
}

func newSpawner() *spawner {
	s := &spawner{orders: make(chan order), done: make(chan struct{})}
	go s.run()
	return s
}

func (s *spawner) start(cmd *exec.Cmd) (*process, error) {
	own(cmd)
	o := order{cmd, make(chan error, 1)}
	s.orders <- o
	if err := <-o.done; err != nil {
		return nil, err
	}
	return &process{pid: cmd.Process.Pid}, nil
}

// close ends the spawner; no start may come after it.
func (s *spawner) close() {
	s.closed.Do(func() { close(s.orders) })
	<-s.done
}

func (s *spawner) run() {
	defer close(s.done)
	defer lockThread()()
	for o := range s.orders {
		o.done <- o.cmd.Start()
	}
}

// maxLogLine is how long a line of a function's log may be; a longer one is
// broken into several.
const maxLogLine = 16 << 10

// copy keeps the lines of a replica's output until it ends.
func (b *logBook) copy(function, replica string, r io.Reader) {
	in := bufio.NewReaderSize(r, maxLogLine)
	for {
		line, err := in.ReadSlice('\n')
		if len(line) > 0 {
			b.add(function, replica, trimEOL(line))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func trimEOL(line []byte) string {
	if n := len(line); n > 0 && line[n-1] == '\n' {
		line = line[:n-1]
	}
	return string(line)
}
