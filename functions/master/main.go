// Command master is the master function: it scatters an upload over the
// worker function and merges the word counts.
package main

import (
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/master"
)

func main() {
	master.Main(master.Job{New: func() master.Answer { return new(wordcount.Counts) }, Line: wordcount.Line})
}
