package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/openfaas/faas-provider/types"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/bustest"
	"github.com/sheaf-project/sheaf/internal/serve"
)

// A replica that announces itself stands in the record of a connector that takes
// announcements, and /metrics counts it, what was refused, and the watcher.
func TestHello(t *testing.T) {
	srv := bustest.Start(t, broker.JetStream)
	gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode([]types.FunctionStatus{{Name: "worker", Namespace: "openfaas-fn", Replicas: 1, AvailableReplicas: 1}})
	}))
	defer gateway.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := "http://" + l.Addr().String()
	_ = l.Close()
	key := t.TempDir() + "/key"
	if err := os.WriteFile(key, []byte("a key of sixteen bytes or more"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"gateway_url": gateway.URL, "nats_url": srv.URL, "sheaf_listen": strings.TrimPrefix(at, "http://"), "replica_source": "hello",
		"hello_loopback": "true", "hello_lease": "3s", "sheaf_key_file": key}
	d, err := read(func(name string) string { return env[name] }, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 2)
	go func() { ended <- d.run(ctx) }()
	own := map[string]string{"sheaf_function": "worker", "sheaf_listen": "127.0.0.1:0", "hello_url": at + "/hello", "sheaf_key_file": key, "healthcheck_interval": "0"}
	replica, err := serve.Env(func(name string) string { return own[name] })
	if err != nil {
		t.Fatal(err)
	}
	replica.Handler = http.NotFoundHandler()
	go func() { ended <- replica.Run(ctx) }()

	client := &http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	get := func(path string) string {
		resp, err := client.Get(at + path)
		if err != nil {
			return ""
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return string(body)
	}
	bustest.Until(t, "the replica stands in the record", func() bool {
		return strings.Contains(get("/replicas?function=worker"), fmt.Sprintf(`"id":%q`, replica.Replica))
	})
	resp, err := client.Post(at+"/hello", "application/json", strings.NewReader(`{"function":"worker","namespace":"openfaas-fn","replica":"x","port":70000}`))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	metrics := get("/metrics")
	for _, line := range []string{`sheaf_announce_rejected_total{reason="port"} 1`, "sheaf_announced_replicas 1", "sheaf_watcher_writing 1",
		"sheaf_watcher_source_up 1", "sheaf_watcher_functions 1", "sheaf_watcher_write_failures_total 0"} {
		if !strings.Contains(metrics, "\n"+line+"\n") {
			t.Errorf("the metrics lack %s", line)
		}
	}
	manual, err := os.ReadFile("../../docs/CONNECTOR.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(metrics) {
		if name, ok := strings.CutPrefix(line, "# TYPE sheaf_"); ok {
			if name, _, _ = strings.Cut(name, " "); !strings.Contains(string(manual), "`sheaf_"+name+"`") {
				t.Errorf("docs/CONNECTOR.md lacks sheaf_%s", name)
			}
		}
	}
	cancel()
	for range 2 {
		if err := <-ended; err != nil {
			t.Errorf("it ended with %v", err)
		}
	}
}
