package function_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/function"
)

// Map counts the lines of a block that hold a word, and Merge adds the counts
// up. In a program of its own, function.Main(count) is all of main.
func Example() {
	count := function.Function{
		Map: func(_ context.Context, b sheaf.Block) ([]byte, error) {
			n := 0
			for line := range strings.Lines(string(b.Data)) {
				if strings.Contains(line, "error") {
					n++
				}
			}
			return json.Marshal(n)
		},
		Merge: function.JSON(func(all, next int) (int, error) { return all + next, nil }),
	}
	// What a master and its workers do of it, block by block:
	answer := count.Merge()
	for _, block := range []string{"ok\nerror 1\n", "error 2\nerror 3\n"} {
		result, err := count.Map(context.Background(), sheaf.Block{Data: []byte(block)})
		if err != nil {
			fmt.Println(err)
			return
		}
		if err := answer.Add(sheaf.Result{Data: result}); err != nil {
			fmt.Println(err)
			return
		}
	}
	if err := answer.WriteText(os.Stdout); err != nil {
		fmt.Println(err)
	}
	// Output: 3
}
