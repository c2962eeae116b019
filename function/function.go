// Package function is what the author of a function writes against: one
// program that can be both ends of a scatter.
//
//	func main() { function.Main(function.Function{Map: shout}) }
//
//	func shout(ctx context.Context, b sheaf.Block) ([]byte, error) {
//		return bytes.ToUpper(b.Data), nil
//	}
//
// Map works on one block, on any replica. Split and Merge, how the input becomes
// blocks and their results one answer, have defaults: as the request asks, by
// lines; and one result after the other.
//
// One image serves both roles. The environment variable sheaf_role says which a
// replica plays:
//
//	master   takes inputs, and scatters their blocks over the function that
//	         worker_function names
//	worker   takes blocks
//	(empty)  both: it takes inputs, and scatters them over its own replicas
//
// Two functions of one image, a master and its workers, scale apart. One
// function with both roles is the simplest thing that works.
package function

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"os"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/serve"
	"github.com/sheaf-project/sheaf/internal/wire"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/worker"
)

// A Function is what a function does. Only Map must be set.
type Function struct {
	// Map works on one block. It may be called concurrently, and more than once
	// for the same block: see [worker.Func].
	Map worker.Func
	// Split cuts an input into blocks of about size bytes; sheaf.SplitCSV is
	// one. nil means as the request asks (split=lines, bytes, records, csv or
	// json), by lines when it asks for nothing. See [master.Job].
	Split func(input io.Reader, size int) iter.Seq2[sheaf.Block, error]
	// Merge returns the answer to no block at all, into which the results are
	// merged in the order of the blocks. nil means [Concat]; [JSON] makes one
	// for results that are JSON.
	Merge func() master.Answer
	// Line returns one block's result as JSON, for clients that take results as
	// they come; see [master.Job]. nil means the result itself if it is JSON,
	// else as a JSON string, and as {"base64": string} when it is no text.
	Line func(r sheaf.Result, mayCut bool) (json.RawMessage, error)
}

// Roles that the environment variable sheaf_role names.
const (
	RoleMaster = "master"
	RoleWorker = "worker"
)

// Main runs f as a function of OpenFaaS in the role that sheaf_role names, and
// ends the process when it is told to. A master reads the environment as
// [master.Main] does, a worker as [worker.Main] does. A replica with both roles
// reads both, counts jobs (max_jobs) and blocks (max_inflight) apart, and
// scatters over its own function unless worker_function names another.
func Main(f Function) {
	os.Exit(serve.Main(func(getenv func(string) string) (*serve.Server, func(), error) {
		return env(f, getenv)
	}))
}

var errNoMap = errors.New("the function has no Map; set it in function.Main(function.Function{Map: ...})")

// env makes the server of the role that the environment names.
func env(f Function, getenv func(string) string) (*serve.Server, func(), error) {
	if f.Map == nil {
		return nil, nil, errNoMap
	}
	switch role := getenv("sheaf_role"); role {
	case RoleMaster:
		return master.Env(f.job(), getenv)
	case RoleWorker:
		s, err := worker.Env(f.Map, getenv)
		return s, func() {}, err
	case "":
		return both(f, getenv)
	default:
		return nil, nil, fmt.Errorf("environment variable sheaf_role is %q; expected %s or %s, or nothing for both", wire.Cut(role), RoleMaster, RoleWorker)
	}
}

func (f Function) job() master.Job {
	j := master.Job{New: f.Merge, Split: f.Split, Line: f.Line}
	if j.New == nil {
		j.New = Concat
	}
	if j.Line == nil {
		j.Line = line
	}
	return j
}

// both makes the server of a replica with both roles: what names a job is a
// block, and all else an input. Jobs and blocks are counted apart: jobs that
// took the places of their own blocks would wait for ever.
func both(f Function, getenv func(string) string) (*serve.Server, func(), error) {
	self, err := serve.Env(getenv)
	if err != nil {
		return nil, nil, err
	}
	if self.Function == "" && getenv("worker_function") == "" {
		return nil, nil, errors.New("environment variable worker_function is \"\"; expected the name of this function, which the platform does not tell, " +
			"for a replica with both roles; or set sheaf_role to master or worker")
	}
	blocks, err := worker.Env(f.Map, getenv)
	if err != nil {
		return nil, nil, err
	}
	job := f.job()
	job.Both = true
	inputs, stop, err := master.Env(job, func(name string) string {
		if v := getenv(name); v != "" || name != "worker_function" {
			return v
		}
		return self.Function
	})
	if err != nil {
		return nil, nil, err
	}
	self.MaxInflight = 0
	self.Peers = blocks.Peers // which it closes
	self.Handler = roles{inputs, blocks}
	return self, stop, nil
}

// roles are the two roles of one replica.
type roles struct{ inputs, blocks *serve.Server }

func (r roles) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Header.Get(wire.Job) != "" {
		r.blocks.ServeHTTP(w, req)
		return
	}
	r.inputs.ServeHTTP(w, req)
}
