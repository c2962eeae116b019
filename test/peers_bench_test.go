package test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// BenchmarkPeers prints what our front and queue take beside those of OpenFaaS's
// Community Edition, in one run on one machine: the same function on the same
// replica, called in turns of 300. Without the gateway of TestBehindGateway it
// prints our own numbers.
//
//	OPENFAAS_GATEWAY=http://127.0.0.1:8080 OPENFAAS_PROVIDER_PORT=8081 OPENFAAS_ACK_WAIT=3s \
//		go test ./test -run '^$' -bench Peers -benchtime 1x
func BenchmarkPeers(b *testing.B) {
	gateway, ackWait := os.Getenv("OPENFAAS_GATEWAY"), 3*time.Second
	port := 0
	if gateway != "" {
		var err error
		if port, err = strconv.Atoi(os.Getenv("OPENFAAS_PROVIDER_PORT")); err != nil {
			b.Fatalf("OPENFAAS_PROVIDER_PORT: %v", err)
		}
		if ackWait, err = time.ParseDuration(os.Getenv("OPENFAAS_ACK_WAIT")); err != nil {
			b.Fatalf("OPENFAAS_ACK_WAIT: %v", err)
		}
	}
	s := startBehind(b, gateway, port)
	s.ackWait = ackWait
	s.deploy("quick", "note", 1) // notes nothing
	s.waitFor("quick", 1)
	fronts := []struct{ name, url string }{{"sheaf", s.URL}}
	if gateway != "" {
		fronts = append(fronts, struct{ name, url string }{"OpenFaaS CE", gateway})
		waitHealthy(b, gateway)
	}
	for b.Loop() {
		targets := []struct{ name, url string }{{"no gateway", s.replicas("quick")[0].URL + "/"}}
		for _, f := range fronts {
			targets = append(targets, struct{ name, url string }{f.name, f.url + "/function/quick"})
		}
		took := map[string][]time.Duration{}
		for round := range 11 { // the first warms up
			for _, target := range targets {
				for range 300 {
					d := s.oneCall(target.url)
					if round > 0 {
						took[target.name] = append(took[target.name], d)
					}
				}
			}
		}
		fmt.Printf("\n%-12s  %9s  %9s  %9s\n", "a call", "median", "99 %", "overhead")
		var bare time.Duration
		for _, target := range targets {
			d := took[target.name]
			slices.Sort(d)
			if target.name == "no gateway" {
				bare = d[len(d)/2]
			}
			fmt.Printf("%-12s  %6d µs  %6d µs  %6d µs\n", target.name, d[len(d)/2].Microseconds(), d[len(d)*99/100].Microseconds(), (d[len(d)/2] - bare).Microseconds())
		}
		fmt.Printf("\n%-12s  %14s  %14s\n", "asynchronous", "1,000 calls", "slow function")
		for _, f := range fronts {
			begun := time.Now()
			s.flood(f.url, 1000)
			all := time.Since(begun)
			fmt.Printf("%-12s  %6.0f calls/s  %9d runs\n", f.name, 1000/all.Seconds(), s.runsOfSlow(f.url))
		}
	}
}

// oneCall calls a function with 1 KiB.
func (b *behind) oneCall(url string) time.Duration {
	begun := time.Now()
	resp, err := client.Post(url, "application/octet-stream", bytes.NewReader(make([]byte, 1024)))
	if err != nil {
		b.t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK {
		b.t.Fatal(resp.Status, err)
	}
	return time.Since(begun)
}

// flood makes n asynchronous calls and waits for all callbacks.
func (b *behind) flood(front string, n int) {
	ids := make(chan string, n)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range n / 8 {
				ids <- b.post(front+"/async-function/quick", "hello")
			}
		})
	}
	wg.Wait()
	close(ids)
	for id := range ids {
		b.called(id, 1)
	}
}

// runsOfSlow is how often a function runs that takes two and a half times as
// long as the queue waits, or would wait.
func (b *behind) runsOfSlow(front string) int {
	slow := 5 * b.ackWait / 2
	id := b.post(front+"/async-function/note?sleep="+slow.String(), "")
	b.called(id, 1)
	for runs := 0; runs != b.lines("begin "+id); { // none begins for as long as one takes
		runs = b.lines("begin " + id)
		time.Sleep(slow + b.ackWait)
	}
	return b.lines("begin " + id)
}

// post makes an asynchronous call with a callback and returns its ID.
func (b *behind) post(url, body string) string {
	req, err := http.NewRequestWithContext(b.t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("X-Callback-Url", b.sink.URL)
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted {
		b.t.Fatal(resp.Status)
	}
	return resp.Header.Get("X-Call-Id")
}
