package connector

// lookup.go is the only file that knows OpenFaaS's connector-sdk. Of it, only
// the builder of the topic map and the map are used: its controller and its
// invoker call functions one after another, end the process when the gateway
// is away, and take a status 500 for success.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/openfaas/connector-sdk/types"
	provider "github.com/openfaas/faas-provider/types"
	"github.com/openfaas/go-sdk"

	"github.com/sheaf-project/sheaf/broker"
)

// Annotations of a function.
const (
	// AnnotationTopic lists the topics that call a function.
	AnnotationTopic = "topic"
	// AnnotationDeliver says who of a function's replicas gets a message: one
	// of them, or "all".
	AnnotationDeliver = "sheaf.deliver"
)

// A Binding is a function that a topic calls.
type Binding struct {
	Function string // with its namespace
	All      bool   // every replica gets the message
}

// A Lookup knows which functions each topic calls. Make one with NewLookup; it
// may be used concurrently.
type Lookup struct {
	builder *types.FunctionLookupBuilder
	tap     *tap
	client  *http.Client

	topics types.TopicMap
	mu     sync.Mutex      // guards all below
	all    map[string]bool // functions all of whose replicas get a message
	loaded bool
	bad    map[string]error // topics that cannot be listened to
}

// NewLookup returns a Lookup that asks the gateway or provider at gatewayURL.
// An empty user sends no credentials. delimiter separates the topics in an
// annotation.
func NewLookup(gatewayURL, delimiter, user, password string) *Lookup {
	l := &Lookup{tap: &tap{next: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 2, IdleConnTimeout: time.Minute}}, topics: types.NewTopicMap()}
	l.client = &http.Client{Transport: l.tap, Timeout: 20 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	var auth sdk.ClientAuth
	if user != "" {
		auth = &sdk.BasicAuth{Username: user, Password: password}
	}
	l.builder = types.NewFunctionLookupBuilder(gatewayURL, delimiter, l.client, auth)
	return l
}

// Close closes the connections that are idle.
func (l *Lookup) Close() { l.client.CloseIdleConnections() }

// Load asks for the topics anew, and returns those that cannot be listened to,
// which it leaves out. When it fails, all stays as it was.
func (l *Lookup) Load() (bad map[string]error, err error) {
	l.tap.begin()
	built, err := l.builder.Build()
	all := l.tap.end()
	if err != nil {
		return nil, fmt.Errorf("ask the gateway for topics: %w", err)
	}
	bad = map[string]error{}
	for topic := range built {
		if err := broker.CheckTopic(topic); err != nil {
			bad[topic] = err
			delete(built, topic)
		}
	}
	l.topics.Sync(&built)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all, l.loaded, l.bad = all, true, bad
	return bad, nil
}

// Topics returns all topics, sorted.
func (l *Lookup) Topics() []string {
	t := l.topics.Topics()
	slices.Sort(t)
	return t
}

// Match returns the functions that a message on the subject calls, each once,
// sorted by name.
func (l *Lookup) Match(subject string) []Binding {
	functions := map[string]bool{}
	for _, t := range l.topics.Topics() {
		if broker.Covers(t, subject) {
			for _, f := range l.topics.Match(t) {
				functions[f] = true
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]Binding, 0, len(functions))
	for _, f := range slices.Sorted(maps.Keys(functions)) {
		list = append(list, Binding{Function: f, All: l.all[f]})
	}
	return list
}

// tap stands between the SDK and the gateway. It makes errors of refusals,
// whose bodies the SDK would read as lists, and reads from the lists the
// annotation that the SDK does not hand on.
type tap struct {
	next *http.Transport

	mu  sync.Mutex // guards all
	all map[string]bool
}

func (t *tap) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all = map[string]bool{}
}

func (t *tap) end() map[string]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.all
}

// CloseIdleConnections is for http.Client's.
func (t *tap) CloseIdleConnections() { t.next.CloseIdleConnections() }

// maxList is how long an answer of the gateway may be, in bytes.
const maxList = 16 << 20

func (t *tap) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxList))
	_ = resp.Body.Close() // it was read
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusNotFound && strings.HasSuffix(r.URL.Path, "/namespaces") {
		body = []byte("[]") // there are no namespaces, so there is one
	} else if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %s: %.200q", r.Method, r.URL.Redacted(), resp.Status, bytes.TrimSpace(body))
	}
	if strings.HasSuffix(r.URL.Path, "/functions") {
		var list []provider.FunctionStatus
		if err := json.Unmarshal(body, &list); err != nil || list == nil {
			return nil, fmt.Errorf("%s %s: not a list of functions: %.200q", r.Method, r.URL.Redacted(), body)
		}
		t.read(list, r.URL.Query().Get("namespace"))
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

func (t *tap) read(list []provider.FunctionStatus, namespace string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range list {
		if f.Annotations != nil && (*f.Annotations)[AnnotationDeliver] == "all" {
			name := f.Name
			if namespace != "" {
				name += "." + namespace
			}
			t.all[name] = true
		}
	}
}
