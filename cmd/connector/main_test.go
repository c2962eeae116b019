package main

import (
	"io/fs"
	"strings"
	"testing"
)

func TestEnvironment(t *testing.T) {
	t.Parallel()
	files := func(name string) ([]byte, error) {
		switch name {
		case "/run/secrets/basic-auth-user", "/s/basic-auth-user":
			return []byte("admin\n"), nil
		case "/s/basic-auth-password", "/run/secrets/basic-auth-password":
			return []byte("secret\n"), nil
		}
		return nil, fs.ErrNotExist
	}
	for _, c := range []struct{ env, says string }{
		{"", ""},
		{"basic_auth=true", ""},
		{"basic_auth=1 secret_mount_path=/s", ""},
		{"basic_auth=true secret_mount_path=/no", `secret_mount_path is "/no"; expected a folder`},
		{"basic_auth=yes", `basic_auth is "yes"; expected true, false`},
		{"gateway_url=gateway:8080", `gateway_url is "gateway:8080"; expected a URL`},
		{"broker_type=kafka", `broker_type is "kafka"; expected one of [auto nats jetstream stan]`},
		{"topics=orders.new,orders.>", ""},
		{"topics=>", `topics is ">"; expected topics`},
		{"topics=a..b", `topics is "a..b"`},
		{"rebuild_interval=5", ""},
		{"rebuild_interval=0", `rebuild_interval is "0"; expected a duration over 0`},
		{"rebuild_interval=soon", `rebuild_interval is "soon"; expected a duration`},
		{"upstream_timeout=-5s", `upstream_timeout is "-5s"`},
		{"max_inflight=0", `max_inflight is "0"; expected a whole number from 1`},
		{"retry_attempts=many", `retry_attempts is "many"`},
		{"port=70000", `port is "70000"`},
		{"sheaf_listen=8080", `sheaf_listen is "8080"; expected host:port`},
		{"asynchronous_invocation=maybe", `asynchronous_invocation is "maybe"`},
		{"nats_creds=/no/creds", `nats_creds is "/no/creds"; expected the path`},
		{"replica_source=kube function_namespace=fn nats_url=nats://a:1 broker_host=b", ""},
		{"replica_source=dns", `replica_source is "dns"; expected gateway, kube or hello`},
		{"replica_source=kube,hello hello_lease=30s hello_networks=10.62.0.0/16,fd00::/8 hello_loopback=true", ""},
		{"replica_source=hello,hello", `replica_source is "hello,hello"; expected`},
		{"replica_source=hello hello_lease=1ms", `hello_lease is "1ms"; expected a duration from 1s to 1h`},
		{"replica_source=hello hello_networks=10.62.0.1", `hello_networks is "10.62.0.1"; expected networks`},
		{"replica_source=hello sheaf_key_file=/no/key", `sheaf_key_file is "/no/key"; expected a file`},
		{"print_response=true print_sync=1 print_response_body=false", ""},
	} {
		env := map[string]string{}
		for pair := range strings.FieldsSeq(c.env) {
			name, value, _ := strings.Cut(pair, "=")
			env[name] = value
		}
		d, err := read(func(name string) string { return env[name] }, files)
		switch {
		case c.says == "" && err != nil:
			t.Errorf("%s: %v", c.env, err)
		case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n")):
			t.Errorf("%s: %v, want %s", c.env, err, c.says)
		case env["basic_auth"] != "" && err == nil && (d.user != "admin" || d.password != "secret"):
			t.Errorf("%s: user %q, password %q", c.env, d.user, d.password)
		}
	}
}

func TestRedact(t *testing.T) {
	t.Parallel()
	for _, urls := range []string{"nats://u:secret@a:1", "nats://a,nats://u:secret@b", "nats://u:secret@a:1,nats://u:secret@b:2", "nats://secret@a", "nats://secret\x00@a"} {
		if got := redact(urls); strings.Contains(got, "secret") {
			t.Errorf("%q becomes %q", urls, got)
		}
	}
}

func TestBrokerHost(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		"": "nats://nats.openfaas:4222", "nats": "nats://nats:4222", "nats:4223": "nats://nats:4223",
		"nats://a:1,nats://b:2": "nats://a:1,nats://b:2", "tls://nats": "tls://nats", "::1": "nats://[::1]:4222",
	} {
		d, err := read(func(name string) string {
			if name == "broker_host" {
				return given
			}
			return ""
		}, nil)
		if err != nil || d.url != want {
			t.Errorf("%q becomes %q (%v), want %q", given, d.url, err, want)
		}
	}
}
