package registry

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
)

// Heartbeat is how often a stream of the record says that it lives.
const Heartbeat = 5 * time.Second

// syncWait is how long a reader waits for a record that has not been read yet.
const syncWait = 2 * time.Second

// ServeHTTP shows the record: a JSON list of records in order of their
// functions. The query may name one function (function=worker), or one replica
// by its ID, whose function is then meant (replica=worker-abc).
//
// With watch in the query the answer goes on until the client leaves: a line
// with the list at each change, and an empty line as heartbeat. A client that
// accepts text/event-stream gets events instead: "replicas" with the record of
// each function that has changed, "gone" with {"function"} for one that is
// there no more.
//
// Before the record has been read, because NATS is away, the answer is 503.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	q := req.URL.Query()
	watch := q.Has("watch") && q.Get("watch") != "false"
	pick := func(list []Record) []Record {
		return slices.DeleteFunc(list, func(rec Record) bool {
			function, replica := q.Get("function"), q.Get("replica")
			return function != "" && rec.Function != Key(function) ||
				replica != "" && !slices.ContainsFunc(rec.Replicas, func(o sheaf.Replica) bool { return o.ID == replica })
		})
	}
	if watch {
		r.stream(w, req, pick)
		return
	}
	late := time.After(syncWait)
	for {
		list, synced, changed := r.list()
		if synced {
			body, err := json.Marshal(pick(list))
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write(append(body, '\n')) // the client may have left
			return
		}
		select {
		case <-changed:
		case <-req.Context().Done():
			return
		case <-late:
			w.Header().Set("Retry-After", "1")
			http.Error(w, "the record of replicas has not been read yet: NATS is away, or no watcher runs", http.StatusServiceUnavailable)
			return
		}
	}
}

// stream sends what changes.
func (r *Registry) stream(w http.ResponseWriter, req *http.Request, pick func([]Record) []Record) {
	write, beat := writeLine, "\n"
	w.Header().Set("Content-Type", "application/x-ndjson")
	if strings.Contains(req.Header.Get("Accept"), "text/event-stream") {
		write, beat = writeEvents(), ": \n\n"
		w.Header().Set("Content-Type", "text/event-stream")
	}
	w.Header().Set("Cache-Control", "no-store")
	control := http.NewResponseController(w)
	if control.Flush() != nil {
		return
	}
	tick := time.NewTicker(Heartbeat)
	defer tick.Stop()
	var last []byte
	for {
		list, synced, changed := r.list()
		if synced {
			list = pick(list)
			body, err := json.Marshal(list)
			if err != nil {
				return
			}
			if !bytes.Equal(body, last) {
				last = body
				if _, err := w.Write(write(list, body)); err != nil || control.Flush() != nil {
					return
				}
			}
		}
		select {
		case <-changed:
		case <-tick.C:
			if _, err := w.Write([]byte(beat)); err != nil || control.Flush() != nil {
				return
			}
		case <-req.Context().Done():
			return
		}
	}
}

func writeLine(_ []Record, body []byte) []byte { return append(slices.Clone(body), '\n') }

// writeEvents returns a function that makes events of what differs from the
// list before.
func writeEvents() func(list []Record, body []byte) []byte {
	last := make(map[string][]byte) // by function
	return func(list []Record, _ []byte) []byte {
		var b bytes.Buffer
		here := make(map[string][]byte, len(list))
		for _, rec := range list {
			body, err := json.Marshal(rec)
			if err != nil {
				continue
			}
			here[rec.Function] = body
			if !bytes.Equal(body, last[rec.Function]) {
				b.WriteString("event: replicas\ndata: " + string(body) + "\n\n")
			}
		}
		for function := range last {
			if _, is := here[function]; !is {
				body, _ := json.Marshal(map[string]string{"function": function}) // never fails
				b.WriteString("event: gone\ndata: " + string(body) + "\n\n")
			}
		}
		last = here
		return b.Bytes()
	}
}
