package peer

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
)

// ErrOther says that somebody else, or nobody, is at the address of a replica:
// nothing of the request was sent.
var ErrOther = errors.New("the replica is not at its address any more")

const (
	dialTimeout = 3 * time.Second
	idleConn    = 60 * time.Second // shorter than a server keeps an idle connection
	maxIdentity = 64 << 10         // bytes
)

type targetKey struct{}

// To returns a context for a request that is for r alone, and the URL of r that
// the request must have, without a path.
func To(ctx context.Context, r sheaf.Replica) (context.Context, *url.URL) {
	// Connections are kept by the host of the URL. Here it stands for the
	// replica: an address may pass to another one.
	name := sha256.Sum256([]byte(r.Function + "/" + r.ID + "/" + r.URL))
	return context.WithValue(ctx, targetKey{}, r), &url.URL{Scheme: "http", Host: hex.EncodeToString(name[:16])}
}

// NewTransport returns a transport for requests to one replica, as To makes
// them. Before a new connection carries a request, whoever is at its other end
// must say, at /_/sheaf, that it is the replica: nobody else ever sees a byte of
// a body. Redirects are for the caller to refuse.
func NewTransport() *http.Transport {
	return &http.Transport{
		DialContext:         dial,
		MaxIdleConns:        1024,
		MaxIdleConnsPerHost: 32,
		IdleConnTimeout:     idleConn,
		DisableCompression:  true,
	}
}

// dial connects to the replica that ctx names, and to nobody else.
func dial(ctx context.Context, network, _ string) (net.Conn, error) {
	r, ok := ctx.Value(targetKey{}).(sheaf.Replica)
	if !ok {
		return nil, errors.New("the request names no replica")
	}
	u, err := url.Parse(r.URL)
	if err != nil || u.Scheme != "http" || u.Hostname() == "" {
		return nil, fmt.Errorf("%w: address %q of replica %s is not a URL such as http://10.0.0.7:8080", ErrOther, r.URL, r.ID)
	}
	port := u.Port()
	if port == "" {
		port = "80"
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext(ctx, network, net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOther, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	err = identify(c, u.Host, r)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("%w: %w", ErrOther, err)
	}
	return c, nil
}

// identify asks who is at the other end of a connection.
func identify(c net.Conn, host string, r sheaf.Replica) error {
	if _, err := io.WriteString(c, "GET /_/sheaf HTTP/1.1\r\nHost: "+host+"\r\nUser-Agent: sheaf\r\n\r\n"); err != nil {
		return err
	}
	in := bufio.NewReader(io.LimitReader(c, maxIdentity))
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return fmt.Errorf("ask who is there: %w", err)
	}
	body, err := io.ReadAll(resp.Body)
	var who struct{ Function, Replica string }
	switch {
	case err != nil:
		return fmt.Errorf("ask who is there: %w", err)
	case resp.StatusCode != http.StatusOK || json.Unmarshal(body, &who) != nil:
		return errors.New("whoever is there knows nothing of sheaf")
	case who.Replica != r.ID:
		return fmt.Errorf("replica %q is there", who.Replica)
	case who.Function != "" && r.Function != "" && who.Function != plain(r.Function):
		return fmt.Errorf("replica %q of %s is there", who.Replica, who.Function)
	case resp.Close || in.Buffered() > 0:
		return errors.New("the connection cannot carry another request")
	}
	return nil
}

// plain is a function's name without its namespace.
func plain(function string) string {
	name, _, _ := strings.Cut(function, ".")
	return name
}
