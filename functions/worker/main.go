// Command worker is the worker function: it counts the words of blocks.
package main

import (
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/worker"
)

func main() { worker.Main(wordcount.Count) }
