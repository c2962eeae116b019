// Package peer lets a replica find the other replicas of its function, and
// speak to exactly the one it means. It is for functions, which hold neither
// credentials nor a connection to NATS: the record of replicas comes by HTTP,
// from the connector or whatever else serves it.
package peer

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
	"strings"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
)

const (
	silence  = 12 * time.Second // of a stream that sends a line every 5 s, after which it is dead
	memory   = time.Minute      // how long the last word counts while there is no other
	idleTime = time.Minute      // without a reader, after which a stream ends
	maxLine  = 16 << 20         // bytes
)

// ErrUnknown says that the replicas of the function are not known.
var ErrUnknown = errors.New("the replicas of this function are not known")

// A Book knows the replicas of one function. It asks for them when somebody
// first wants to know, follows their changes from then on, and stops a minute
// after the last question. What it said last counts for a minute when the
// record cannot be reached.
type Book struct {
	url    string
	client *http.Client
	wg     sync.WaitGroup

	mu      sync.Mutex // guards all below
	view    sheaf.View
	heard   time.Time // when the record said so, or that nothing had changed
	err     error     // why it says nothing now
	changed chan struct{}
	used    time.Time
	stop    context.CancelFunc // nil while nothing is followed
	closed  bool
}

var _ sheaf.Resolver = (*Book)(nil)

// NewBook returns a Book of the record at recordURL, such as
// "http://sheaf-connector.openfaas:8080/replicas". Of function, as
// "worker.openfaas-fn", and replica, an ID, one may be empty: the function that
// has the replica is then meant. Close ends it.
func NewBook(recordURL, function, replica string) (*Book, error) {
	u, err := url.Parse(recordURL)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, errors.New("not a URL such as http://sheaf-connector.openfaas:8080/replicas")
	}
	q := u.Query()
	q.Set("watch", "true")
	if function != "" {
		q.Set("function", function)
	} else {
		q.Set("replica", replica)
	}
	u.RawQuery = q.Encode()
	return &Book{
		url: u.String(), changed: make(chan struct{}),
		client: &http.Client{Transport: &http.Transport{ResponseHeaderTimeout: 5 * time.Second, DisableCompression: true, IdleConnTimeout: 10 * time.Second},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}, nil
}

// Close ends what the Book follows.
func (b *Book) Close() {
	b.mu.Lock()
	b.closed = true
	if b.stop != nil {
		b.stop()
	}
	b.mu.Unlock()
	b.wg.Wait()
	b.client.CloseIdleConnections()
}

// Await returns the present view as soon as ok, which may be nil, accepts it.
// When ctx ends before that, the error is ErrUnknown with its reason, or ctx's
// if a view is known.
func (b *Book) Await(ctx context.Context, ok func(sheaf.View) bool) (sheaf.View, error) {
	for {
		view, known, changed, err := b.get()
		if known && (ok == nil || ok(view)) {
			return view, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if known {
				return sheaf.View{}, ctx.Err()
			}
			if err == nil {
				err = errors.New("the record has not answered yet")
			}
			return sheaf.View{}, fmt.Errorf("%w: %w", ErrUnknown, err)
		}
	}
}

// Watch yields views as [sheaf.Resolver] says. There is one function to know,
// whatever is asked for.
func (b *Book) Watch(ctx context.Context, _ string) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		var last uint64
		for {
			v, err := b.Await(ctx, func(v sheaf.View) bool { return v.Epoch != last })
			if err != nil || !yield(v, nil) {
				return
			}
			last = v.Epoch
		}
	}
}

// get returns what is known now, and has it followed.
func (b *Book) get() (view sheaf.View, known bool, changed <-chan struct{}, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used = time.Now()
	if b.stop == nil && !b.closed {
		ctx, stop := context.WithCancel(context.Background())
		b.stop = stop
		b.wg.Go(func() { b.follow(ctx) })
	}
	return b.view, !b.heard.IsZero() && time.Since(b.heard) < memory, b.changed, b.err
}

// hear takes over what the record said; nil says that nothing changed.
func (b *Book) hear(view *sheaf.View) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = nil
	if view == nil {
		if !b.heard.IsZero() {
			b.heard = time.Now()
		}
		return
	}
	b.heard, b.view = time.Now(), *view
	b.tell()
}

// tell wakes all who wait. b.mu is held.
func (b *Book) tell() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// unused ends the Book's stream when nobody has asked for long.
func (b *Book) unused() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.used) < idleTime {
		return false
	}
	b.heard = time.Time{} // it would be old when somebody asks again
	b.stop()
	b.stop = nil
	return true
}

// follow keeps the view until ctx ends or nobody wants it any more.
func (b *Book) follow(ctx context.Context) {
	pause := 10 * time.Millisecond
	for {
		begun := time.Now()
		err := b.read(ctx)
		if ctx.Err() != nil || b.unused() {
			return
		}
		b.mu.Lock()
		b.err = err
		b.tell()
		b.mu.Unlock()
		if time.Since(begun) > time.Second {
			pause = 10 * time.Millisecond
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, time.Second)
		case <-ctx.Done():
			return
		}
	}
}

// read reads the record's stream to its end.
func (b *Book) read(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(silence, func() { cancel(errors.New("the record of replicas fell silent")) })
	defer quiet.Stop()
	fail := func(err error) error {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("read the record of replicas: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.url, nil)
	if err != nil {
		return fail(err)
	}
	resp, err := b.client.Do(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 200)) // as much as can be had of the reason
		return fail(fmt.Errorf("%s answered %s: %q", req.URL.Host, resp.Status, strings.TrimSpace(string(said))))
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		quiet.Reset(silence)
		var view *sheaf.View
		if len(lines.Bytes()) > 0 {
			var list []sheaf.View
			if err := json.Unmarshal(lines.Bytes(), &list); err != nil {
				return fail(err)
			}
			view = ready(list)
		}
		b.hear(view)
		if b.unused() {
			return nil
		}
	}
	if err := lines.Err(); err != nil {
		return fail(err)
	}
	return fail(io.ErrUnexpectedEOF)
}

// ready is the view of the one record that was asked for: its ready replicas,
// which stand in rank order.
func ready(list []sheaf.View) *sheaf.View {
	if len(list) != 1 {
		return &sheaf.View{}
	}
	v := list[0]
	all := v.Replicas
	v.Replicas = nil
	for _, r := range all {
		if r.State == sheaf.Ready {
			v.Replicas = append(v.Replicas, r)
		}
	}
	return &v
}
