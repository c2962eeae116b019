package serve

// hello.go is for providers that tell nobody where replicas are: a replica
// announces itself, and proves to whoever asks that it is where it says.

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	helloTimeout = 5 * time.Second
	helloFirst   = 250 * time.Millisecond // after which a first failure is tried again
	helloEvery   = 5 * time.Second        // at most, until the answer says how long the lease is
)

// hello reads hello_url, and gives the replica a name if it has none of its own:
// on faasd each replica of a function has the function's name for its host name.
func (s *Server) hello(v *Vars) {
	s.Namespace = v.String("OPENFAAS_NAMESPACE", "openfaas-fn")
	if s.Hello = v.Getenv("hello_url"); s.Hello == "" {
		return
	}
	if u, err := url.Parse(s.Hello); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		v.fail("hello_url", s.Hello, "a URL such as http://sheaf-connector:8080/hello")
	}
	if s.Function == "" {
		v.fail("sheaf_function", "", "the function's name, because hello_url is set and the replica announces itself by it")
	}
	s.Function, _, _ = strings.Cut(s.Function, ".")
	if s.Replica == "" || s.Replica == s.Function {
		s.Replica = s.Function + "-" + strings.ToLower(rand.Text()[:10])
	}
}

// prove answers a challenge, for the address at which it came.
func (s *Server) prove(i *Identity, nonce string, r *http.Request) {
	at, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok || !wire.CheckNonce(nonce) || s.Function == "" || s.Replica == "" {
		return
	}
	i.Namespace, i.Nonce = s.Namespace, nonce
	i.Proof = s.Signer.Prove(wire.Hello{Function: s.Function, Namespace: s.Namespace, Replica: s.Replica,
		Address: at.AddrPort().Addr().Unmap().WithZone("").String(), Port: at.Port}, nonce)
}

// announce says hello until ctx ends, and then once more, to be asked and to
// say that it drains. The returned function waits for that.
func (s *Server) announce(ctx context.Context, at net.Addr, log *slog.Logger) (wait func()) {
	addr, ok := at.(*net.TCPAddr)
	if s.Hello == "" || !ok {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		client := &http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}, Timeout: helloTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		pause, failing := helloFirst, false
		for ctx.Err() == nil {
			lease, err := s.sayHello(ctx, client, addr.Port)
			wait := lease / 3
			if err != nil {
				wait, pause = pause, min(2*pause, helloEvery)
				if !failing && ctx.Err() == nil {
					log.Warn("the replica cannot announce itself; trying again", "url", s.Hello, "err", err)
				}
			} else {
				pause = helloFirst
			}
			failing = err != nil
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
		}
		for !s.draining.Load() { // Serve is about to say so
			time.Sleep(time.Millisecond)
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = s.sayHello(last, client, addr.Port) // else the lease ends
	}()
	return func() {
		s.draining.Store(true)
		cancel()
		<-done
	}
}

// sayHello announces the replica once, and returns how long that counts.
func (s *Server) sayHello(ctx context.Context, client *http.Client, port int) (lease time.Duration, err error) {
	h := wire.Hello{Function: s.Function, Namespace: s.Namespace, Replica: s.Replica, Port: port}
	body, err := json.Marshal(h)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.Hello, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	if signature := s.Signer.SignHello(h, body, time.Now()); signature != "" {
		req.Header.Set(wire.Signature, signature)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		var p wire.Problem
		if json.Unmarshal(said, &p) != nil || p.Detail == "" {
			p.Detail = wire.Cut(string(said))
		}
		return 0, fmt.Errorf("%s: %s", resp.Status, p.Detail)
	}
	var welcome wire.Welcome
	if err := json.Unmarshal(said, &welcome); err != nil || welcome.LeaseMS < 1 || welcome.LeaseMS > time.Hour.Milliseconds() {
		return 0, fmt.Errorf("the answer %q tells no lease; is hello_url that of a connector?", wire.Cut(string(said)))
	}
	return time.Duration(welcome.LeaseMS) * time.Millisecond, nil
}
