package master

import (
	"strings"
	"testing"
	"time"
)

func env(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

func TestEnvRefusesBadEnvironment(t *testing.T) {
	for _, c := range []struct{ name, value, expected string }{
		{"max_input", "abc", "a whole number from 1 to 1125899906842624"},
		{"max_input", "0", "a whole number from 1"},
		{"max_input", "1e9", "a whole number"},
		{"max_block", "-1", "from 1 to 2147483647"},
		{"max_block", "2147483648", "from 1 to 2147483647"},
		{"max_blocks", "many", "a whole number"},
		{"max_workers", "1048577", "from 1 to 1048576"},
		{"max_jobs", "0", "from 1"},
		{"max_jobs", "abc", "a whole number"},
		{"max_result", "64MiB", "a whole number"},
		{"job_memory", "1.5", "a whole number"},
		{"read_timeout", "soon", "a duration such as 30s"},
		{"read_timeout", "-1s", "a duration"},
		{"replica_wait", "5 minutes", "a duration"},
		{"replica_inflight", "0", "from 1"},
		{"job_input_allow", "10.0.0.0/99", "addresses, CIDRs or host:port"},
		{"parallel_jobs", "0", "from 1"},
		{"max_job_input", "1GiB", "a whole number"},
		{"job_ttl", "a day", "a duration"},
		{"job_lease", "-1s", "a duration"},
		{"sheaf_kill_at", "now", "block.after:3:/tmp/mark"},
		{"port", "70000", "from 1 to 65535"},
		{"max_inflight", "abc", "a whole number"},
		{"write_timeout", "x", "a duration"},
		{"worker_function", "w/../admin", "the name of a function"},
		{"worker_function", "Worker", "the name of a function"},
		{"worker_function", "master", "another function than this one"},
		{"worker_function", "master.openfaas-fn", "another function than this one"},
		{"gateway_url", "gateway.openfaas:8080", "a URL such as http://gateway.openfaas:8080"},
		{"gateway_url", "ftp://gateway", "a URL"},
		{"gateway_url", "http://", "a URL"},
		{"gateway_url", "http://[::1", "a URL"},
		{"nats_url", "nats://sheaf:hunter2@%zz", "URLs such as nats://nats.openfaas:4222"},
		{"max_input", strings.Repeat("9", 5000), "a whole number"},
	} {
		t.Run(c.name+"="+c.value[:min(len(c.value), 20)], func(t *testing.T) {
			s, stop, err := Env(Job{}, env(map[string]string{c.name: c.value}))
			if err == nil {
				stop()
				t.Fatalf("it was taken: %+v", s)
			}
			for _, says := range []string{c.name, c.expected} {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("error does not say %q: %v", says, err)
				}
			}
			if c.name != "nats_url" && !strings.Contains(err.Error(), c.value[:min(len(c.value), 60)]) {
				t.Errorf("error does not tell the value: %v", err)
			}
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "\n") || len(err.Error()) > 300 {
				t.Errorf("error is not one short line without secrets: %v", err)
			}
		})
	}
}

func TestEnv(t *testing.T) {
	const away = "nats://127.0.0.1:1" // nobody listens: a master starts before its neighbours
	s, stop, err := Env(Job{}, env(map[string]string{"nats_url": away}))
	if err != nil {
		t.Fatal(err)
	}
	stop()
	h := s.Handler.(*Handler)
	if h.Self != "master" || h.Function != "worker" || h.MaxInput != DefaultMaxInput || h.MaxBlock != DefaultMaxBlock ||
		h.MaxBlocks != DefaultMaxBlocks || h.MaxWorkers != DefaultMaxWorkers || h.Memory != DefaultMemory ||
		h.Patience != DefaultPatience || h.ReplicaWait != 30*time.Second || s.MaxInflight != 100 {
		t.Errorf("defaults are %+v", h)
	}
	s, stop, err = Env(Job{Both: true}, env(map[string]string{"nats_url": away, "OPENFAAS_NAME": "both", "worker_function": "both"}))
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if h := s.Handler.(*Handler); h.Self != "" || h.Function != "both" {
		t.Errorf("one with both roles has %q for itself and %q for its worker", h.Self, h.Function)
	}
	s, stop, err = Env(Job{}, env(map[string]string{
		"nats_url": away, "OPENFAAS_NAME": "boss", "worker_function": "count.dev", "max_input": "10", "max_block": "9",
		"max_blocks": "8", "max_workers": "7", "max_jobs": "6", "job_memory": "5", "read_timeout": "4", "replica_wait": "3s", "replica_inflight": "2",
		"gateway_url": "https://gateway/",
	}))
	if err != nil {
		t.Fatal(err)
	}
	stop()
	h = s.Handler.(*Handler)
	if h.Self != "boss" || h.Function != "count.dev" || h.MaxInput != 10 || h.MaxBlock != 9 || h.MaxBlocks != 8 ||
		h.MaxWorkers != 7 || h.Memory != 5 || h.Patience != 4*time.Second || h.ReplicaWait != 3*time.Second || h.Turns.PerReplica != 2 || s.MaxInflight != 6 {
		t.Errorf("read %+v", h)
	}
}

func TestDelimiter(t *testing.T) {
	for _, c := range []struct {
		in, want string
		ok       bool
	}{
		{"", "", true}, {";", ";", true}, {`\n`, "\n", true}, {`\r\n`, "\r\n", true}, {`a\tb`, "a\tb", true},
		{`\0`, "\x00", true}, {`\\`, `\`, true}, {`\x1e`, "\x1e", true}, {`\xFF\x00`, "\xff\x00", true},
		{`\`, "", false}, {`a\`, "", false}, {`\x`, "", false}, {`\x4`, "", false}, {`\xg0`, "", false}, {`\x+1`, "", false},
		{`\q`, "", false}, {`\N`, "", false},
	} {
		if got, ok := delimiter(c.in); ok != c.ok || ok && got != c.want {
			t.Errorf("delimiter(%q) is %q, %v; want %q, %v", c.in, got, ok, c.want, c.ok)
		}
	}
}

// A block size that a refusal names must be one that works.
func TestEnough(t *testing.T) {
	for _, most := range []int{1, 2, 3, 7, 100} {
		for n := int64(1); n < 400; n++ {
			size := enough(n, most)
			// At worst every second block holds one record of one byte, since
			// the next record only just does not fit beside it.
			blocks, left := 0, n
			for ; left > size; left -= 1 + size {
				blocks += 2
			}
			if left > 0 {
				blocks++
			}
			if blocks > most {
				t.Fatalf("%d bytes make %d blocks of %d, more than %d", n, blocks, size, most)
			}
		}
	}
}
