package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/openfaas/faas-provider/types"
	"go.uber.org/goleak"

	"github.com/sheaf-project/sheaf/broker"
	"github.com/sheaf-project/sheaf/internal/bustest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, append(bustest.Leaks(), goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))...)
}

// The process starts when neither NATS nor the gateway is there, says so, and
// works as soon as both are.
func TestStartsBeforeItsNeighbours(t *testing.T) {
	for _, kind := range bustest.Kinds() {
		t.Run(string(kind), func(t *testing.T) {
			srv := bustest.Start(t, kind)
			srv.Stop()
			var up atomic.Bool
			gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				user, password, _ := r.BasicAuth()
				switch {
				case !up.Load():
					http.Error(w, "starting", http.StatusServiceUnavailable)
				case strings.HasPrefix(r.URL.Path, "/system/") && (user != "admin" || password != "secret"):
					w.WriteHeader(http.StatusUnauthorized)
				case r.URL.Path == "/system/functions":
					notes := map[string]string{"topic": "words"}
					_ = json.NewEncoder(w).Encode([]types.FunctionStatus{{Name: "f", Annotations: &notes}})
				case strings.HasPrefix(r.URL.Path, "/function/f"):
					body, _ := io.ReadAll(r.Body)
					_, _ = io.WriteString(w, "f got "+string(body))
				default:
					http.NotFound(w, r)
				}
			}))
			defer gateway.Close()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			at := l.Addr().String()
			_ = l.Close()
			env := map[string]string{"gateway_url": gateway.URL, "broker_host": srv.URL, "sheaf_listen": at, "rebuild_interval": "100ms",
				"basic_auth": "true", "write_timeout": "5s"}
			if kind == broker.JetStream {
				env["broker_type"] = "jetstream" // otherwise no stream would hold the topic
			}
			d, err := read(func(name string) string { return env[name] }, func(name string) ([]byte, error) {
				return map[string][]byte{"/run/secrets/basic-auth-user": []byte("admin"), "/run/secrets/basic-auth-password": []byte("secret\n")}[name], nil
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- d.run(ctx) }()
			client := &http.Client{}
			defer client.CloseIdleConnections()
			get := func(path string) (int, string) {
				resp, err := client.Get("http://" + at + path)
				if err != nil {
					return 0, ""
				}
				defer resp.Body.Close()
				body, _ := io.ReadAll(resp.Body)
				return resp.StatusCode, string(body)
			}
			bustest.Until(t, "healthz", func() bool { status, _ := get("/healthz"); return status == 200 })
			if status, why := get("/readyz"); status != 503 || !strings.Contains(why, "NATS") {
				t.Errorf("without NATS readyz is %d %q", status, why)
			}
			srv.Start()
			bustest.Until(t, "only the gateway is missing", func() bool {
				status, why := get("/readyz")
				return status == 503 && strings.Contains(why, "gateway")
			})
			up.Store(true)
			bustest.Until(t, "readyz", func() bool { status, _ := get("/readyz"); return status == 200 })
			bustest.Until(t, "somebody listens", func() bool { return srv.Listeners("words") > 0 })

			nc, err := broker.Connect(srv.URL, broker.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			answers, err := nc.SubscribeSync("answers")
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			srv.Publish("words", nats.Header{"Sheaf-Reply": {"answers"}}, "x")
			m, err := answers.NextMsg(bustest.Soon)
			if err != nil || string(m.Data) != "f got x" {
				t.Errorf("answer is %v (%v)", m, err)
			}
			// A bus without JetStream holds no record, which is not the same as no replicas.
			if status, _ := get("/replicas"); status != 200 && status != 503 {
				t.Errorf("replicas is %d", status)
			}
			cancel()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("it ended with %v", err)
				}
			case <-time.After(bustest.Soon):
				t.Fatal("it did not end")
			}
		})
	}
}

// Told to end while it waits for NATS it ends.
func TestEndsWithoutNATS(t *testing.T) {
	env := map[string]string{"broker_host": "127.0.0.1:1", "sheaf_listen": "127.0.0.1:0"}
	d, err := read(func(name string) string { return env[name] }, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if err := d.run(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > bustest.Soon {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
}
