package main

import (
	"testing"

	"github.com/sheaf-project/sheaf"
)

func TestMap(t *testing.T) {
	for block, want := range map[string]string{
		"":              "",
		"a line\nand b": "A LINE\nAND B",
	} {
		got, err := Map(t.Context(), sheaf.Block{Data: []byte(block)})
		if err != nil || string(got) != want {
			t.Errorf("Map of %q is %q, %v; want %q", block, got, err, want)
		}
	}
}
