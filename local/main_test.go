package local_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/local"
	"github.com/sheaf-project/sheaf/worker"
)

// The test binary is its own functions, and its own provider to be killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case "-replica":
			replica(os.Args[2])
			return
		case "-provider":
			provide(os.Args[2])
			return
		case "-stack":
			provideStack(os.Args[2])
			return
		}
	}
	// A stream that somebody makes while the server shuts down leaves these two
	// in nats-server 2.15; a server that runs on leaves many others.
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server/ats.Register.func1"),
		goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server.(*fileStore).flushStreamStateLoop"))
}

var quiet = slog.New(slog.DiscardHandler)

// command makes a replica of an image, which is a mode of the test binary.
func command(image string) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	switch image {
	case "web", "worker", "crash", "shortlived", "stubborn", "slow", "async", "who":
		return []string{self, "-replica", image}, nil
	case "fork": // leaves a child of its own in its process group
		return []string{"sh", "-c", `sleep 1000 & echo "grandchild $!"; exec "$0" -replica web`, self}, nil
	case "daemon": // leaves one outside of it, which holds the output open
		return []string{"sh", "-c", `setsid sleep 1000 & echo "grandchild $!"; exec "$0" -replica web`, self}, nil
	case "cheap": // never becomes ready
		return []string{"sleep", "1000"}, nil
	case "missing":
		return []string{"/nonexistent/program"}, nil
	}
	return nil, fmt.Errorf("no image %q", image)
}

func replica(mode string) {
	switch mode {
	case "crash":
		fmt.Println("I crash")
		os.Exit(3)
	case "worker":
		worker.Main(func(_ context.Context, b sheaf.Block) ([]byte, error) { return bytes.ToUpper(b.Data), nil })
	case "who":
		worker.Main(tell)
	case "slow":
		time.Sleep(300 * time.Millisecond)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
	}
	ctx, stop := context.WithCancel(context.Background())
	if mode != "stubborn" {
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGTERM)
	}
	defer stop()
	srv := &http.Server{Addr: os.Getenv("sheaf_listen"), Handler: http.HandlerFunc(web)}
	if mode == "async" {
		srv.Handler = http.HandlerFunc(asyncFunction())
	}
	if mode == "shortlived" {
		go func() {
			time.Sleep(20 * time.Millisecond)
			os.Exit(4)
		}()
	}
	l, err := net.Listen("tcp", srv.Addr)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	srv.BaseContext = func(net.Listener) context.Context { return context.WithValue(ctx, listenerKey{}, l) }
	go func() { _ = srv.Serve(l) }()
	<-ctx.Done()
	fmt.Println("told to end")
	_ = srv.Shutdown(context.Background())
}

type listenerKey struct{}

// seen is what a function saw of a call.
type seen struct {
	Method, URI, Host, Body, Replica, Version string
	Header                                    http.Header
	PID                                       int
}

// web is a plain HTTP function.
func web(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	switch r.URL.Path {
	case "/_/ready":
	case "/_/health":
		if status, err := strconv.Atoi(os.Getenv("health")); err == nil {
			w.WriteHeader(status)
		}
	case "/log":
		for l := range strings.SplitSeq(r.FormValue("lines"), ",") {
			fmt.Println(l)
		}
	case "/sleep":
		d, _ := time.ParseDuration(r.FormValue("for"))
		time.Sleep(d)
		fmt.Fprint(w, "slept ", os.Getenv("version"))
	case "/stream":
		w.Header().Set("Content-Type", r.Header.Get("Accept"))
		for i := range 3 {
			if i > 0 {
				time.Sleep(150 * time.Millisecond)
			}
			fmt.Fprintf(w, "line %d\n", i)
			_ = control.Flush()
		}
	case "/duplex":
		_ = control.EnableFullDuplex()
		in := bufio.NewReader(r.Body)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			fmt.Fprint(w, "you said ", line)
			_ = control.Flush()
		}
	case "/deafen": // it lives on, but nobody can reach it
		w.Header().Set("Connection", "close")
		_ = r.Context().Value(listenerKey{}).(net.Listener).Close()
	case "/secret":
		secret, err := os.ReadFile(filepath.Join(os.Getenv(local.MountEnv), r.FormValue("name")))
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
		}
		_, _ = w.Write(secret)
	case "/environ":
		fmt.Fprint(w, strings.Join(os.Environ(), "\n"))
	case "/early":
		w.WriteHeader(http.StatusTooManyRequests)
		_ = control.Flush()
	case "/upload":
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Printf("upload of %d bytes: %v\n", n, err)
	case "/upgrade":
		conn, rw, err := control.Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(conn, rw)
	case "/die": // before, or in the middle of, an answer
		if n, _ := strconv.Atoi(r.FormValue("length")); n > 0 {
			w.Header().Set("Content-Length", strconv.Itoa(n))
		}
		if r.FormValue("after") != "" {
			fmt.Fprint(w, r.FormValue("after"))
			_ = control.Flush()
			time.Sleep(50 * time.Millisecond)
		}
		os.Exit(9)
	default:
		body, _ := io.ReadAll(r.Body)
		_ = json.NewEncoder(w).Encode(seen{r.Method, r.RequestURI, r.Host, string(body),
			os.Getenv("sheaf_replica"), os.Getenv("version"), r.Header, os.Getpid()})
	}
}

// provide is a process that runs a provider with three replicas of an image
// and says so.
func provide(image string) {
	p := local.NewProvider(command, quiet)
	if bad := p.Deploy(types.FunctionDeployment{Service: "web", Image: image, Labels: &map[string]string{local.LabelMin: "3"}}, true); bad != nil {
		fmt.Println(bad)
		os.Exit(1)
	}
	front := httptest.NewServer(local.NewFront(p, "test"))
	fmt.Println(front.URL)
	select {}
}

// machine is a provider with its front, for one test.
type machine struct {
	t *testing.T
	*local.Provider
	front *local.Front
	url   string
	http  *http.Client
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	p := local.NewProvider(command, quiet)
	closed, err := p.Keep(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, Provider: p, front: local.NewFront(p, "test"), http: &http.Client{Transport: &http.Transport{}}}
	ts := httptest.NewServer(m.front)
	m.url = ts.URL
	t.Cleanup(func() {
		m.http.CloseIdleConnections()
		p.Close()
		closed()
		ts.CloseClientConnections()
		ts.Close()
	})
	return m
}

// deploy deploys a function with n replicas and waits for them.
func (m *machine) deploy(name, image string, n int) {
	m.t.Helper()
	if bad := m.Deploy(types.FunctionDeployment{Service: name, Image: image, Labels: &map[string]string{local.LabelMin: strconv.Itoa(n)}}, true); bad != nil {
		m.t.Fatal(bad)
	}
	m.ready(name, n)
}

func (m *machine) ready(name string, n int) []sheaf.Replica {
	m.t.Helper()
	var ready []sheaf.Replica
	eventually(m.t, 10*time.Second, fmt.Sprintf("%d ready replicas of %s, and no others", n, name), func() bool {
		v := m.replicas(name)
		ready = slices.DeleteFunc(slices.Clone(v.Replicas), func(r sheaf.Replica) bool { return r.State != sheaf.Ready })
		return v.Desired == n && len(ready) == n && len(v.Replicas) == n
	})
	return ready
}

func (m *machine) replicas(name string) (v sheaf.View) {
	m.t.Helper()
	if _, body := m.call(http.MethodGet, "/system/replicas/"+name, ""); json.Unmarshal([]byte(body), &v) != nil {
		m.t.Fatalf("replicas: %s", body)
	}
	return v
}

// call makes a request and returns the status and the whole body.
func (m *machine) call(method, path, body string) (int, string) {
	m.t.Helper()
	status, out, err := m.try(method, path, body)
	if err != nil {
		m.t.Fatalf("%s %s: %v", method, path, err)
	}
	return status, out
}

func (m *machine) try(method, path, body string) (int, string, error) {
	req, err := http.NewRequest(method, m.url+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	resp, err := m.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(out), err
}

// raw sends bytes as they are, and reads one answer.
func (m *machine) raw(request string) (*http.Response, string) {
	m.t.Helper()
	return m.send(request, false)
}

// half is raw, and then sends no more.
func (m *machine) half(request string) (*http.Response, string) {
	m.t.Helper()
	return m.send(request, true)
}

func (m *machine) send(request string, half bool) (*http.Response, string) {
	m.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(m.url, "http://"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		m.t.Fatal(err)
	}
	if half {
		_ = conn.(*net.TCPConn).CloseWrite()
	}
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		m.t.Fatalf("%.40q: %v", request, err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp, string(body)
}

// lines returns the texts of a function's log.
func (m *machine) lines(query string) []string {
	m.t.Helper()
	status, body := m.call(http.MethodGet, "/system/logs?"+query, "")
	if status != http.StatusOK {
		m.t.Fatalf("logs: %d %s", status, body)
	}
	var out []string
	for l := range strings.Lines(body) {
		var line struct{ Text string }
		if err := json.Unmarshal([]byte(l), &line); err != nil {
			m.t.Fatal(err)
		}
		out = append(out, line.Text)
	}
	return out
}

func eventually(t *testing.T, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	begun := time.Now()
	for !ok() {
		if time.Since(begun) > within {
			t.Fatalf("%s: not within %v", what, within)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(begun)
}

// alive says whether a process runs; one that nobody has reaped does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z") && !strings.HasPrefix(after, "X")
}

// children are the processes that this one has started and not reaped.
func children() (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, d := range dirs {
		stat, err := os.ReadFile(d)
		if err != nil {
			continue
		}
		_, after, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(os.Getpid()) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(d)))
			pids = append(pids, pid)
		}
	}
	return pids
}
