// Package gateway talks to an OpenFaaS gateway or provider: it invokes
// functions (Route), and deploys, lists and scales them (Client) by OpenFaaS's
// own SDK.
package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
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
}

const callTimeout = time.Minute

// NewClient returns a Client of the gateway at rawURL. An empty user sends no
// credentials.
func NewClient(rawURL, user, password string) (*Client, error) {
	base, err := url.Parse(rawURL)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, fmt.Errorf("gateway %q is not a URL such as http://127.0.0.1:8080", rawURL)
	}
	transport := &http.Transport{ResponseHeaderTimeout: callTimeout, DisableCompression: true}
	c := &Client{
		base: base,
		http: &http.Client{Timeout: callTimeout, Transport: transport},
		flow: &http.Client{Transport: transport},
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
	list, err := c.sdk.GetFunctions(ctx, "")
	if err != nil {
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

// ErrNoAddresses comes from Replicas when the provider cannot tell where
// replicas are; of OpenFaaS's own, none can.
var ErrNoAddresses = errors.New("the provider does not tell replica addresses")

// Replicas yields, for each function, its replicas in all states, and again on
// each change, until the loop is left or the stream ends, which is an error. A
// View without replicas whose Desired is -1 says that the function is gone;
// one without a function says only that the stream lives. Epochs are 0.
func (c *Client) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		fail := func(err error) { yield(sheaf.View{}, fmt.Errorf("watch replicas: %w", err)) }
		resp, err := c.get(ctx, "/system/replicas?watch=true")
		if err != nil {
			fail(err)
			return
		}
		defer resp.Body.Close()
		// A stream that says nothing for longer than two heartbeats is dead.
		silence := time.AfterFunc(streamSilence, cancel)
		defer silence.Stop()
		lines := bufio.NewScanner(resp.Body)
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			silence.Reset(streamSilence)
			var v sheaf.View
			if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
				fail(err)
				return
			}
			if !yield(v, nil) {
				return
			}
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
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete,
		c.base.JoinPath("/system/replicas", function, replica).String(), nil)
	if err != nil {
		return err
	}
	resp, err := c.do(c.http, req)
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
	resp, err := c.get(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("read the record of replicas: %w", err)
	}
	return resp.Body, nil
}

func (c *Client) get(ctx context.Context, path string) (*http.Response, error) {
	u, err := c.base.Parse(path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	return c.do(c.flow, req)
}

// do sends req with the credentials, and makes an error of a refusal.
func (c *Client) do(client *http.Client, req *http.Request) (*http.Response, error) {
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
		if resp.StatusCode == http.StatusNotFound {
			return nil, fmt.Errorf("%w (404 from %s)", ErrNoAddresses, req.URL.Redacted())
		}
		return nil, fmt.Errorf("%s %s: %s: %s", req.Method, req.URL.Redacted(), resp.Status, said)
	}
	return resp, nil
}
