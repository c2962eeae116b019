package main

import (
	"bytes"
	"testing"

	"github.com/sheaf-project/sheaf"
)

// What one replica maps, another one merges: the pair fits together.
func TestMapAndMergeFit(t *testing.T) {
	answer := count.Merge()
	for i, block := range []string{"to be or n", "ot to", " be\n"} {
		result, err := count.Map(t.Context(), sheaf.Block{Index: i, Data: []byte(block)})
		if err != nil {
			t.Fatal(err)
		}
		if err := answer.Add(sheaf.Result{Index: i, Data: result, Bytes: len(block)}); err != nil {
			t.Fatal(err)
		}
		if _, err := count.Line(sheaf.Result{Index: i, Data: result}, true); err != nil {
			t.Fatal(err)
		}
	}
	var got bytes.Buffer
	if err := answer.WriteText(&got); err != nil || got.String() != "be 2\nto 2\nnot 1\nor 1\n" {
		t.Errorf("answer is %q, %v", got.String(), err)
	}
}
