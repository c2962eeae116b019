// Command worker is the worker function alone: it counts the words of blocks,
// and holds standard-library code only. functions/master is both roles.
package main

import (
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/worker"
)

func main() { worker.Main(wordcount.Count) }
