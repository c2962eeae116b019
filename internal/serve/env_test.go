package serve_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf/internal/serve"
)

func env(pairs ...string) func(string) string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return func(name string) string { return m[name] }
}

func TestEnv(t *testing.T) {
	for _, c := range []struct {
		name string
		vars []string
		want *serve.Server
	}{
		{"nothing", nil, &serve.Server{Addr: ":8080", Linger: 2 * time.Second, Grace: 30 * time.Second}},
		{
			"all of OpenFaaS's",
			[]string{"port", "9090", "OPENFAAS_NAME", "worker", "HOSTNAME", "pod-1", "max_inflight", "8", "healthcheck_interval", "5s", "write_timeout", "1m"},
			&serve.Server{Addr: ":9090", Function: "worker", Replica: "pod-1", MaxInflight: 8, Linger: 5 * time.Second, Grace: time.Minute},
		},
		{
			"ours go first",
			[]string{"port", "9090", "sheaf_listen", "127.0.0.1:0", "OPENFAAS_NAME", "a", "sheaf_function", "b", "HOSTNAME", "c", "sheaf_replica", "d"},
			&serve.Server{Addr: "127.0.0.1:0", Function: "b", Replica: "d", Linger: 2 * time.Second, Grace: 30 * time.Second},
		},
		{
			"bare seconds",
			[]string{"healthcheck_interval", "0", "write_timeout", "90"},
			&serve.Server{Addr: ":8080", Grace: 90 * time.Second},
		},
		{
			"parts of seconds",
			[]string{"healthcheck_interval", "250ms", "write_timeout", "1.5s"},
			&serve.Server{Addr: ":8080", Linger: 250 * time.Millisecond, Grace: 1500 * time.Millisecond},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := serve.Env(env(c.vars...))
			if err != nil {
				t.Fatal(err)
			}
			show := func(s *serve.Server) string {
				return fmt.Sprint(s.Addr, " ", s.Function, " ", s.Replica, " ", s.MaxInflight, " ", s.Linger, " ", s.Grace)
			}
			if show(s) != show(c.want) {
				t.Errorf("got  %s\nwant %s", show(s), show(c.want))
			}
		})
	}
}

func TestEnvRefuses(t *testing.T) {
	for _, c := range []struct{ name, value, expected string }{
		{"hello_url", "connector:8080/hello", "a URL such as http://sheaf-connector:8080/hello"},
		{"port", "http", "a whole number from 1 to 65535"},
		{"port", "0", "a whole number from 1 to 65535"},
		{"port", "70000", "a whole number from 1 to 65535"},
		{"port", "-1", "a whole number from 1 to 65535"},
		{"port", " 8080", "a whole number from 1 to 65535"},
		{"max_inflight", "abc", "a whole number from 0 to 1048576"},
		{"max_inflight", "-1", "a whole number from 0 to 1048576"},
		{"max_inflight", "1.5", "a whole number from 0 to 1048576"},
		{"max_inflight", "99999999999999999999", "a whole number from 0 to 1048576"},
		{"max_inflight", "1\nport=2", "a whole number from 0 to 1048576"},
		{"healthcheck_interval", "soon", "a duration such as 30s or 2m"},
		{"healthcheck_interval", "-5", "a duration such as 30s or 2m"},
		{"healthcheck_interval", "-5s", "a duration such as 30s or 2m"},
		{"write_timeout", "5 s", "a duration such as 30s or 2m"},
		{"write_timeout", "1e9s", "a duration such as 30s or 2m"},
		{"write_timeout", "9223372036854775807", "a duration such as 30s or 2m"},
		{"write_timeout", "99999999999", "a duration such as 30s or 2m"},
		{"sheaf_listen", "8080", "host:port, such as 127.0.0.1:8080"},
	} {
		t.Run(c.name+" "+c.value, func(t *testing.T) {
			_, err := serve.Env(env(c.name, c.value))
			want := fmt.Sprintf("environment variable %s is %q; expected %s", c.name, c.value, c.expected)
			if err == nil || err.Error() != want {
				t.Errorf("got  %v\nwant %s", err, want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Error("the error is more than one line")
			}
		})
	}
	t.Run("the first of two", func(t *testing.T) {
		_, err := serve.Env(env("port", "x", "write_timeout", "y"))
		if err == nil || !strings.Contains(err.Error(), "port") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a long one is cut", func(t *testing.T) {
		_, err := serve.Env(env("port", strings.Repeat("9", 9999)))
		if err == nil || len(err.Error()) > 200 {
			t.Errorf("got %v", err)
		}
	})
}

func TestMainExitCodes(t *testing.T) {
	stopped := 0
	for _, c := range []struct {
		name          string
		build         func(func(string) string) (*serve.Server, func(), error)
		code, stopped int
	}{
		{"the environment is wrong", func(func(string) string) (*serve.Server, func(), error) {
			return nil, nil, errors.New("environment variable x is wrong (of a test)")
		}, 2, 0},
		{"serving failed", func(func(string) string) (*serve.Server, func(), error) {
			return &serve.Server{Addr: "256.0.0.1:1"}, func() { stopped++ }, nil
		}, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			stopped = 0
			if code := serve.Main(c.build); code != c.code || stopped != c.stopped {
				t.Errorf("exit code %d (stopped %d times), want %d (%d)", code, stopped, c.code, c.stopped)
			}
		})
	}
}

// A replica that announces itself has a name of its own: on faasd its host is
// named as its function.
func TestEnvHello(t *testing.T) {
	url := "http://connector:8080/hello"
	if _, err := serve.Env(env("hello_url", url)); err == nil || !strings.Contains(err.Error(), "sheaf_function") {
		t.Errorf("without a function: %v", err)
	}
	for _, c := range []struct{ host, replica, want string }{
		{"", "", "worker-"}, {"worker", "", "worker-"}, {"worker-7d9f-x", "", "worker-7d9f-x"}, {"worker", "mine", "mine"},
	} {
		get := env("hello_url", url, "sheaf_function", "worker.team", "HOSTNAME", c.host, "sheaf_replica", c.replica, "OPENFAAS_NAMESPACE", "team")
		a, err := serve.Env(get)
		if err != nil {
			t.Fatal(err)
		}
		b, err := serve.Env(get)
		if err != nil {
			t.Fatal(err)
		}
		made := strings.HasSuffix(c.want, "-")
		if !strings.HasPrefix(a.Replica, c.want) || made != (a.Replica != b.Replica) || !made && a.Replica != c.want || a.Function != "worker" || a.Namespace != "team" || a.Hello != url {
			t.Errorf("%+v: function %s in %s, replicas %s and %s", c, a.Function, a.Namespace, a.Replica, b.Replica)
		}
	}
}
