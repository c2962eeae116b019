// Command master is the word count as a function, in both roles: as a master it
// scatters an upload over the worker function and merges the counts, and as a
// worker it counts the words of blocks. sheaf_role says which; see package
// function. functions/worker is the worker alone, without a client of NATS.
package main

import (
	"github.com/sheaf-project/sheaf/function"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/master"
)

func main() { function.Main(count) }

var count = function.Function{
	Map:   wordcount.Count,
	Merge: func() master.Answer { return new(wordcount.Counts) },
	Line:  wordcount.Line,
}
