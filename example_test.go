package sheaf_test

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/sheaf-project/sheaf"
)

// wordCount stands for a function that counts words, with three replicas.
// Package direct has the route to real ones, package registry their addresses.
var wordCount = &sheaf.Group{
	Function: "wordcount",
	Resolver: sheaf.Static{{ID: "a"}, {ID: "b"}, {ID: "c"}},
	Route: sheaf.RouteFunc(func(_ context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
		n := len(bytes.Fields(req.Body))
		return &sheaf.Reply{Body: []byte(strconv.Itoa(n)), From: req.To.ID}, nil
	}),
}

const poem = `The fog comes
on little cat feet.

It sits looking
over harbor and city
on silent haunches
and then moves on.
`

func ExampleGroup_Scatter() {
	decode := func(answer []byte) (int, error) { return strconv.Atoi(string(answer)) }
	add := func(a, b int) int { return a + b }

	blocks := sheaf.SplitLines(strings.NewReader(poem), 40)
	results := wordCount.Scatter(context.Background(), blocks)
	words, err := sheaf.Reduce(results, decode, add)

	fmt.Println(words, "words, error", err)
	// Output: 21 words, error <nil>
}

func ExampleReduce() {
	// The answers come in any order; they are merged in that of the blocks.
	blocks := sheaf.SplitLines(strings.NewReader(poem), 40)
	results := wordCount.Scatter(context.Background(), blocks)
	sum, err := sheaf.Reduce(results,
		func(answer []byte) (string, error) { return string(answer), nil },
		func(a, b string) string { return a + " + " + b })
	if err != nil {
		fmt.Println(err) // names the blocks that have no result
	}
	fmt.Println(sum)
	// Output: 7 + 7 + 7
}

func ExampleGroup_Broadcast() {
	answers := make([]string, 3)
	for answer, err := range wordCount.Broadcast(context.Background(), []byte("to each of you")) {
		if err != nil {
			fmt.Println(err) // a replica that left, by its rank
			continue
		}
		answers[answer.Index] = fmt.Sprintf("rank %d, replica %s: %s", answer.Index, answer.From, answer.Data)
	}
	fmt.Println(strings.Join(answers, "\n"))
	// Output:
	// rank 0, replica a: 4
	// rank 1, replica b: 4
	// rank 2, replica c: 4
}

func ExampleGroup_Send() {
	answer, err := wordCount.Send(context.Background(), 1, []byte("to you alone"))
	fmt.Printf("%s from replica %s, error %v\n", answer.Data, answer.From, err)
	// Output: 3 from replica b, error <nil>
}

func ExampleSplitLines() {
	for block, err := range sheaf.SplitLines(strings.NewReader(poem), 40) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("block %d at byte %d: %q\n", block.Index, block.Offset, block.Data)
	}
	// Output:
	// block 0 at byte 0: "The fog comes\non little cat feet.\n\n"
	// block 1 at byte 35: "It sits looking\nover harbor and city\n"
	// block 2 at byte 72: "on silent haunches\nand then moves on.\n"
}
