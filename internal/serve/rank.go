package serve

// rank.go makes ranks reachable from outside: a call of /-/K/... that any
// gateway gives to any replica goes on to the one of rank K, and to no other.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/peer"
	"github.com/sheaf-project/sheaf/internal/wire"
)

const (
	// rankPath is what the path of a call for a rank begins with.
	rankPath = "/-/"
	// rankWait is how long a call waits for the record, and for a newer one when
	// a replica is not where the record says.
	rankWait = 5 * time.Second
	// maxHops is how many calls may be on their way through this replica.
	maxHops = 1024
)

// hop is a call on its way to another replica.
type hop struct {
	rank  int
	view  sheaf.View
	path  string // escaped
	query string
	url   *url.URL
	other error // the replica is not there; nothing was sent
}

type hopKey struct{}

// byRank answers a call for a rank: here if it is ours, else from where it is.
func (s *Server) byRank(w http.ResponseWriter, r *http.Request) {
	number, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), rankPath), "/")
	rank, err := strconv.ParseUint(number, 10, 31)
	if err != nil {
		refuse(w, wire.Refuse(http.StatusNotFound, wire.CodeNoRank,
			fmt.Sprintf("%q is no rank; the path of a call for a rank is /-/K/..., and ranks are whole numbers from 0", wire.Cut(number))))
		return
	}
	if s.Peers == nil {
		refuse(w, wire.Refuse(http.StatusServiceUnavailable, wire.CodeNoRecord,
			"this replica does not know the others: replicas_url is not set; set it to the record of replicas, as http://sheaf-connector.openfaas:8080/replicas"))
		return
	}
	if s.hops.Add(1) > maxHops {
		s.hops.Add(-1)
		refuse(w, busy(maxHops))
		return
	}
	defer s.hops.Add(-1)
	ctx, cancel := context.WithTimeout(r.Context(), rankWait)
	defer cancel()
	h := &hop{rank: int(rank), path: "/" + rest, query: r.URL.RawQuery}
	for {
		old := h.view.Epoch
		view, err := s.Peers.Await(ctx, func(v sheaf.View) bool { return len(v.Replicas) > 0 && v.Epoch != old })
		if err != nil {
			refuse(w, h.lost(err))
			return
		}
		h.view = view
		if h.rank >= len(view.Replicas) {
			refuse(w, wire.Refuse(http.StatusNotFound, wire.CodeNoRank,
				fmt.Sprintf("there is no rank %d: the function has %d ready replicas at epoch %d, and ranks count from 0", h.rank, len(view.Replicas), view.Epoch)).
				Within(len(view.Replicas)))
			return
		}
		to := view.Replicas[h.rank]
		if to.ID == s.Replica {
			s.here(w, r, h)
			return
		}
		if s.forward(w, r, to, h); h.other == nil {
			return
		}
	}
}

// lost is the refusal of a call whose rank could not be found.
func (h *hop) lost(err error) *wire.Problem {
	switch {
	case errors.Is(err, peer.ErrUnknown):
		return wire.Refuse(http.StatusServiceUnavailable, wire.CodeNoRecord, err.Error()).After(time.Second)
	case h.other != nil:
		return wire.Refuse(http.StatusServiceUnavailable, wire.CodeUnreachable,
			fmt.Sprintf("rank %d cannot be reached, and the record, at epoch %d, knows no other: %v", h.rank, h.view.Epoch, h.other)).After(time.Second)
	default:
		return wire.Refuse(http.StatusServiceUnavailable, wire.CodeNoReplicas, "no replica of this function is ready").After(time.Second)
	}
}

// address sets what a request says about its addressee. One that is signed
// stays as it was signed: the target is known to be there.
func (h *hop) address(header http.Header, to string) {
	if header[wire.Signature] != nil {
		return
	}
	h.head(header)
	if delete(header, wire.To); to != "" {
		header[wire.To] = []string{to}
	}
}

// head sets what a message says about the rank that it is to or from.
func (h *hop) head(header http.Header) {
	header[wire.Rank] = []string{strconv.Itoa(h.rank)}
	header[wire.Size] = []string{strconv.Itoa(len(h.view.Replicas))}
	header[wire.Epoch] = []string{strconv.FormatUint(h.view.Epoch, 10)}
}

// here answers a call for our own rank.
func (s *Server) here(w http.ResponseWriter, r *http.Request, h *hop) {
	r = r.Clone(r.Context())
	r.URL.Path, r.URL.RawPath = unescape(h.path)
	h.address(r.Header, "") // it is ours by its rank
	h.head(w.Header())
	s.serve(w, r)
}

// unescape returns the path of a URL, and the escaped one for where that
// matters.
func unescape(escaped string) (path, raw string) {
	path, err := url.PathUnescape(escaped)
	if err != nil {
		return escaped, ""
	}
	return path, escaped
}

// forward passes the call on, unless the replica is not there: h.other is then
// set, and nothing has been read of the body nor written.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, to sheaf.Replica, h *hop) {
	h.other = nil
	ctx, target := peer.To(r.Context(), to)
	h.url = target
	out := r.WithContext(context.WithValue(ctx, hopKey{}, h))
	if r.Body != nil && r.Body != http.NoBody {
		out.Body = io.NopCloser(r.Body) // it may be sent to another one
	}
	mine := w.Header()[wire.Replica]
	delete(w.Header(), wire.Replica) // the other one says who it is
	s.proxy().ServeHTTP(w, out)
	if h.other != nil {
		w.Header()[wire.Replica] = mine
	}
}

// Peer returns the transport for requests to other replicas, as [peer.To] makes
// them. Serve closes its connections in the end.
func (s *Server) Peer() http.RoundTripper {
	s.proxy()
	return s.peers
}

// proxy returns the way to other replicas.
func (s *Server) proxy() *httputil.ReverseProxy {
	s.once.Do(func() {
		s.peers = peer.NewTransport()
		s.through = &httputil.ReverseProxy{
			Transport:     s.peers,
			FlushInterval: -1,
			Rewrite: func(pr *httputil.ProxyRequest) {
				h := pr.In.Context().Value(hopKey{}).(*hop)
				*pr.Out.URL = *h.url
				pr.Out.URL.Path, pr.Out.URL.RawPath = unescape(h.path)
				pr.Out.URL.RawQuery = h.query
				pr.Out.Host = pr.In.Host
				for _, key := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
					if v := pr.In.Header[key]; v != nil {
						pr.Out.Header[key] = v
					}
				}
				h.address(pr.Out.Header, h.view.Function+"/"+h.view.Replicas[h.rank].ID)
				pr.Out.Header[wire.Hop] = []string{"1"}
				delete(pr.Out.Header, "Expect") // the body comes whenever it is asked for
			},
			ModifyResponse: func(resp *http.Response) error {
				resp.Request.Context().Value(hopKey{}).(*hop).head(resp.Header)
				return nil
			},
			ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
				h := r.Context().Value(hopKey{}).(*hop)
				if errors.Is(err, peer.ErrOther) && r.Context().Err() == nil {
					h.other = err
					return
				}
				h.head(w.Header())
				refuse(w, wire.Refuse(http.StatusBadGateway, wire.CodeUnreachable,
					fmt.Sprintf("rank %d, replica %s, broke off before it answered; it may have done the work: %v", h.rank, h.view.Replicas[h.rank].ID, err)))
			},
		}
	})
	return s.through
}
