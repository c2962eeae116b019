package local_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/sheaf-project/sheaf/local"
)

// startNATS starts a stack that has been used a little, so that every stream
// is there.
func startNATS(t *testing.T) *local.Stack {
	t.Helper()
	s, err := local.Start(local.Config{Command: command, Log: quiet, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	eventually(t, 10*time.Second, "the bucket of views", func() bool {
		js, err := jetstream.New(as(t, s, "watcher"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = js.KeyValue(t.Context(), "sheaf-views")
		return err == nil
	})
	js, err := jetstream.New(as(t, s, "functions"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "sheaf-jobs"}); err != nil {
		t.Fatalf("functions make the bucket of jobs: %v", err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "sheaf-job-inputs", Subjects: []string{"sheaf.job.input.>"}}); err != nil {
		t.Fatalf("functions make the stream of inputs: %v", err)
	}
	return s
}

func as(t *testing.T, s *local.Stack, role string) *nats.Conn {
	t.Helper()
	nc, err := s.As(role)
	if err != nil {
		t.Fatalf("as %s: %v", role, err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// spoof is somebody in the account who listens wherever blocks or answers may
// come, and answers at once. It returns how many messages it has seen.
func spoof(t *testing.T, nc *nats.Conn) *atomic.Int64 {
	t.Helper()
	nc.SetErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}) // it is told what it may not
	var seen atomic.Int64
	see := func(m *nats.Msg) {
		seen.Add(1)
		_ = m.Respond([]byte("forged"))
	}
	for _, subject := range []string{">", "*.*", "work.>", "work.blocks", "sheaf.>", "sheaf.call.>", "sheaf.call.worker", "sheaf.inbox.>", "$JS.>", "$KV.>", "$KV.sheaf-views.>", "$SYS.>"} {
		for _, queue := range []string{"", "sheaf-connector", "another"} {
			if _, err := nc.QueueSubscribe(subject, queue, see); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = nc.Flush() // it may have been thrown out
	return &seen
}

// ask sends requests for work, which a worker answers, and counts whose answer
// won.
func ask(t *testing.T, worker, master *nats.Conn, subject string, n int) (right, wrong int) {
	t.Helper()
	if _, err := worker.QueueSubscribe(subject, "sheaf-connector", func(m *nats.Msg) { _ = m.Respond(m.Data) }); err != nil {
		t.Fatal(err)
	}
	if err := worker.Flush(); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		block := fmt.Sprintf("block %d", i)
		m, err := master.Request(subject, []byte(block), 10*time.Second)
		switch {
		case err != nil:
			t.Fatalf("request %d: %v", i, err)
		case string(m.Data) == block:
			right++
		default:
			wrong++
		}
	}
	return right, wrong
}

// Whoever has a client's login sees no block and wins no answer; where nobody
// is kept from anything, it sees all blocks and wins many.
func TestControl06SpoofersSeeNothing(t *testing.T) {
	const n = 200
	open, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	open.Start()
	defer open.Shutdown()
	if !open.ReadyForConnections(10 * time.Second) {
		t.Fatal("NATS does not start")
	}
	var conns [3]*nats.Conn
	for i := range conns {
		if conns[i], err = nats.Connect(open.ClientURL()); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	seen := spoof(t, conns[0])
	if _, wrong := ask(t, conns[1], conns[2], "work.blocks", n); seen.Load() < n || wrong == 0 {
		t.Errorf("without permissions the spoofer saw %d messages and won %d answers: this test shows nothing", seen.Load(), wrong)
	}

	s := startNATS(t)
	var spies []*atomic.Int64
	for _, role := range []string{"client", "functions", "queue", "watcher"} {
		spies = append(spies, spoof(t, as(t, s, role)))
	}
	if right, wrong := ask(t, as(t, s, "connector"), as(t, s, "client"), "work.blocks", n); right != n || wrong != 0 {
		t.Errorf("a topic: %d right and %d wrong answers", right, wrong)
	}
	if right, wrong := ask(t, as(t, s, "connector"), as(t, s, "functions"), "sheaf.call.worker", n); right != n || wrong != 0 {
		t.Errorf("route topic: %d right and %d wrong answers", right, wrong)
	}
	for i, seen := range spies {
		if seen.Load() != 0 {
			t.Errorf("spoofer %d saw %d messages", i, seen.Load())
		}
	}
}

// Nobody who lacks a login connects.
func TestControl06NoLoginNoConnection(t *testing.T) {
	s := startNATS(t)
	for name, url := range map[string]string{"none": s.NATS, "a wrong one": strings.Replace(s.NATS, "//", "//client:wrong@", 1)} {
		if nc, err := nats.Connect(url); !errors.Is(err, nats.ErrAuthorization) {
			if err == nil {
				nc.Close()
			}
			t.Errorf("%s: %v", name, err)
		}
	}
}

// refused publishes to a subject, and says whether that is forbidden.
func refused(t *testing.T, nc *nats.Conn, subject string) bool {
	t.Helper()
	nc.SetErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})
	if err := nc.Publish(subject, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil { // what the server says about it comes before the answer
		t.Fatal(err)
	}
	err := nc.LastError()
	return errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), `"`+subject+`"`)
}

// What a role does not work with it can neither read, nor change, nor delete.
func TestControl07NoStreamAdministration(t *testing.T) {
	s := startNATS(t)
	streams := map[string]string{"KV_sheaf-views": "watcher", "KV_sheaf-jobs": "functions", "sheaf-job-inputs": "functions",
		"sheaf-async-calls": "queue", "sheaf-async-records": "queue", "sheaf-async-results": "queue", "sheaf-async-callbacks": "queue", "sheaf-async-dead": "queue"}
	reads := map[string]bool{"functions KV_sheaf-views": true, "connector KV_sheaf-views": true}
	for _, role := range local.Roles() {
		t.Run(role, func(t *testing.T) {
			nc := as(t, s, role)
			nc.SetErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})
			for stream, owner := range streams {
				deny := []string{"STREAM.DELETE." + stream}
				if owner != role {
					deny = append(deny, "STREAM.UPDATE."+stream, "STREAM.PURGE."+stream, "STREAM.MSG.DELETE."+stream, "STREAM.CREATE."+stream)
					if !reads[role+" "+stream] {
						deny = append(deny, "STREAM.INFO."+stream, "STREAM.MSG.GET."+stream, "DIRECT.GET."+stream, "CONSUMER.CREATE."+stream,
							"CONSUMER.NAMES."+stream, "CONSUMER.MSG.NEXT."+stream+".any", "CONSUMER.DELETE."+stream+".any", "CONSUMER.DURABLE.CREATE."+stream+".any")
					}
				} else if role != "functions" {
					continue // it made the stream, and may do with it as it likes
				}
				for _, subject := range deny {
					if !refused(t, nc, "$JS.API."+subject) {
						t.Errorf("%s may ask for %s", role, subject)
					}
				}
			}
		})
	}
}

// No role but its owner writes where others look.
func TestControl07NoForeignWrites(t *testing.T) {
	s := startNATS(t)
	owners := map[string][]string{
		"$KV.sheaf-views.worker":   {"watcher"},
		"$KV.sheaf-jobs.x":         {"functions"},
		"sheaf.job.input.x":        {"functions"},
		"sheaf.async.call.x":       {"queue"},
		"sheaf.async.result.x":     {"queue"},
		"sheaf.scale":              {"functions"},
		"sheaf.call.worker":        {"functions", "connector"},
		"sheaf.cancel":             {"functions", "connector"},
		"sheaf.dead.orders":        {"connector"},
		"sheaf.inbox.UANYBODY.x.y": {"connector"}, // who asked for it, by a name that nobody can guess
		"$SYS.REQ.SERVER.PING":     {},
	}
	for _, role := range local.Roles() {
		for subject, allowed := range owners {
			nc := as(t, s, role)
			if got, want := refused(t, nc, subject), !slices.Contains(allowed, role); got != want {
				t.Errorf("%s publishes to %s: refused is %v, want %v", role, subject, got, want)
			}
			nc.Close()
		}
	}
}

// The login of functions is a file that only this user reads, and no secret
// stands in anybody's environment, on a page, or in the URL that functions get.
func TestControl18LoginsAreFiles(t *testing.T) {
	s := startNATS(t)
	if strings.Contains(s.NATS, "@") {
		t.Errorf("the URL that functions get holds a password")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, path := range []string{"/system/info", "/system/functions", "/healthz"} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		_, password, _ := strings.Cut(strings.TrimPrefix(s.ClientURL(), "nats://client:"), "@")
		password = strings.TrimSuffix(strings.TrimPrefix(s.ClientURL(), "nats://client:"), "@"+password)
		if err != nil || strings.Contains(string(body), password) || len(password) < 20 {
			t.Errorf("%s tells the login: %s (%v)", path, body, err)
		}
	}
}
