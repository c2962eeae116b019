// A sheaf function: the input is split into blocks, Map works on each of them,
// on many replicas at once, and the results are merged into one answer.
//
// Keep the names handler.go and handler_test.go: OpenFaaS lays this folder over
// the template's, whose files of these names take the place of missing ones.
package main

import (
	"bytes"
	"context"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/function"
)

// A function has defaults for all but Map: the input is split by lines (a request may
// ask for another way, as ?split=csv), and the answer is the results, one after
// the other. To split or merge in another way, set Split or Merge:
//
//	Split: sheaf.SplitCSV,
//	Merge: function.JSON(func(all, next int) (int, error) { return all + next, nil }),
func main() { function.Main(function.Function{Map: Map}) }

// Map works on one block. It may run many times at once, and more than once for
// the same block. Its error makes the block run again, on another replica, a few
// times; worker.Reject(err) ends the job.
func Map(_ context.Context, b sheaf.Block) ([]byte, error) {
	return bytes.ToUpper(b.Data), nil
}
