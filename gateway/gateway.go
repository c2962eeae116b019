// Package gateway talks to an OpenFaaS gateway or provider: it invokes
// functions (Route), and deploys, lists and scales them (Client) by OpenFaaS's
// own SDK.
package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/openfaas/faas-provider/types"
	"github.com/openfaas/go-sdk"

	"github.com/sheaf-project/sheaf"
)

// A Client uses the management API of a gateway or provider (/system/...). It
// may be used concurrently. Each call has a deadline of its own, of a minute.
type Client struct {
	base *url.URL
	http *http.Client // with a deadline for the whole call
	flow *http.Client // without one, for streams
	sdk  *sdk.Client
	user *sdk.BasicAuth

	silence time.Duration // of a stream of replicas, after which it is dead
}

const callTimeout = time.Minute

// stay follows no redirect: what is sent here is for the gateway only.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// NewClient returns a Client of the gateway at rawURL. An empty user sends no
// credentials.
func NewClient(rawURL, user, password string) (*Client, error) {
	base, err := url.Parse(rawURL)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, fmt.Errorf("gateway %q is not a URL such as http://127.0.0.1:8080", rawURL)
	}
	transport := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		ResponseHeaderTimeout: callTimeout,
		DisableCompression:    true,
	}
	c := &Client{
		base:    base,
		silence: streamSilence,
		http:    &http.Client{Timeout: callTimeout, Transport: transport, CheckRedirect: stay},
		flow:    &http.Client{Transport: transport, CheckRedirect: stay},
	}
	var auth sdk.ClientAuth
	if user != "" {
		c.user = &sdk.BasicAuth{Username: user, Password: password}
		auth = c.user
	}
	c.sdk = sdk.NewClient(base, auth, c.http)
	return c, nil
}

// Close closes the connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Functions lists the functions of the default namespace.
func (c *Client) Functions(ctx context.Context) ([]types.FunctionStatus, error) {
	// Not by the SDK, which does not look at the status: a failing gateway that
	// says "null" or "[]" would seem to have no functions.
	resp, err := c.call(ctx, c.http, http.MethodGet, "/system/functions")
	if err != nil {
		return nil, fmt.Errorf("list functions: %w", err)
	}
	defer resp.Body.Close()
	var list []types.FunctionStatus
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxList)).Decode(&list); err != nil {
		return nil, fmt.Errorf("list functions: %w", err)
	}
	return list, nil
}

// Deploy creates the function or changes it to spec.
func (c *Client) Deploy(ctx context.Context, spec types.FunctionDeployment) error {
	status, err := c.sdk.Update(ctx, spec)
	if status == http.StatusNotFound {
		_, err = c.sdk.Deploy(ctx, spec)
	}
	if err != nil {
		return fmt.Errorf("deploy %s: %w", spec.Service, err)
	}
	return nil
}

// Scale asks for n replicas of a function of the default namespace.
func (c *Client) Scale(ctx context.Context, function string, n int) error {
	if err := c.sdk.ScaleFunction(ctx, function, "", uint64(max(0, n))); err != nil {
		return fmt.Errorf("scale %s to %d: %w", function, n, err)
	}
	return nil
}

// maxList is how long the list of functions, or one line of a stream, may be.
const maxList = 16 << 20

// ErrNoAddresses comes from Replicas and Views when the provider cannot tell
// where replicas are; of OpenFaaS's own, none can.
var ErrNoAddresses = errors.New("the provider does not tell replica addresses")

// ErrUnauthorized comes from all but Deploy and Scale when the gateway does not
// know the user, or the password is wrong.
var ErrUnauthorized = errors.New("the gateway wants another login")

var errSilent = errors.New("the stream fell silent")

// Replicas yields, for each function, its replicas in all states, and again on
// each change, until the loop is left or the stream ends, which is an error. A
// View without replicas whose Desired is -1 says that the function is gone;
// one without a function says only that the stream lives. Epochs are 0.
func (c *Client) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		fail := func(err error) {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			yield(sheaf.View{}, fmt.Errorf("watch replicas: %w", err))
		}
		// A stream that says nothing for longer than two heartbeats is dead.
		silence := time.AfterFunc(c.silence, func() { cancel(errSilent) })
		defer silence.Stop()
		resp, err := c.addresses(ctx, "/system/replicas?watch=true")
		if err != nil {
			fail(err)
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, maxList)
		for lines.Scan() {
			silence.Stop() // while the loop's body runs nothing is read
			var v sheaf.View
			if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
				fail(err)
				return
			}
			if !yield(v, nil) {
				return
			}
			silence.Reset(c.silence)
		}
		if err := lines.Err(); err != nil {
			fail(err)
			return
		}
		fail(io.ErrUnexpectedEOF)
	}
}

// streamSilence is how long a stream of replicas may say nothing; a provider
// sends a line at least every five seconds.
const streamSilence = 12 * time.Second

// Kill ends a replica at once, as kill -9 does. Only a local provider can.
func (c *Client) Kill(ctx context.Context, function, replica string) error {
	path := "/system/replicas/" + url.PathEscape(function) + "/" + url.PathEscape(replica)
	resp, err := c.call(ctx, c.http, http.MethodDelete, path)
	if err != nil {
		return fmt.Errorf("kill replica %s: %w", replica, err)
	}
	return resp.Body.Close()
}

// Views returns the record of replicas that the front of a local provider or a
// connector shows. With watch set it is a stream, one line of JSON for each
// change, that ends with ctx. The caller closes it.
func (c *Client) Views(ctx context.Context, watch bool) (io.ReadCloser, error) {
	path := "/system/views"
	if watch {
		path += "?watch=true"
	}
	resp, err := c.addresses(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("read the record of replicas: %w", err)
	}
	return resp.Body, nil
}

type notFoundError struct{ error }

// addresses asks for what only a provider that knows its replicas has.
func (c *Client) addresses(ctx context.Context, path string) (*http.Response, error) {
	resp, err := c.call(ctx, c.flow, http.MethodGet, path)
	if _, none := errors.AsType[*notFoundError](err); none {
		return nil, fmt.Errorf("%w: %w", ErrNoAddresses, err)
	}
	return resp, err
}

// call sends a request with the credentials, and makes an error of a refusal.
func (c *Client) call(ctx context.Context, client *http.Client, method, path string) (*http.Response, error) {
	u, err := c.base.Parse(path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if c.user != nil {
		if err := c.user.Set(req); err != nil {
			return nil, err
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // as much as can be had of the reason
		err := fmt.Errorf("%s %s: %s: %q", method, req.URL.Redacted(), resp.Status, bytes.TrimSpace(said))
		switch resp.StatusCode {
		case http.StatusNotFound:
			err = &notFoundError{err}
		case http.StatusUnauthorized:
			err = fmt.Errorf("%w: %w", ErrUnauthorized, err)
		}
		return nil, err
	}
	return resp, nil
}
