package main

import (
	"go/parser"
	"go/token"
	"os"
	"testing"
)

// Every bug can be planted where the table says, and is Go code then.
func TestPlanted(t *testing.T) {
	t.Chdir("../..")
	if len(mutants) < 25 {
		t.Errorf("%d bugs", len(mutants))
	}
	names := map[string]bool{}
	for i, m := range mutants {
		code, err := m.apply()
		if err != nil {
			t.Errorf("%d, %s: %v", i+1, m.bug, err)
			continue
		}
		if _, err := parser.ParseFile(token.NewFileSet(), m.file, code, 0); err != nil {
			t.Errorf("%d, %s: %v", i+1, m.bug, err)
		}
		if names[m.bug] {
			t.Errorf("%s stands twice", m.bug)
		}
		names[m.bug] = true
	}
}

// A few of them, of quick rooms, are caught; one that changes nothing, one that
// cannot be planted, and one that does not compile are not.
func TestSample(t *testing.T) {
	t.Chdir("../..")
	sound := &baseline{done: map[string]func() error{}}
	sample := 0
	for _, m := range mutants {
		if m.file != "internal/wire/sign.go" || m.room != "./internal/wire" {
			continue
		}
		sample++
		if got := plant(m, sound); !got.caught {
			t.Errorf("%s: %s", m.bug, got.what)
		}
	}
	if sample == 0 {
		t.Error("the sample is empty")
	}
	none := mutant{"nothing", "split.go", [][2]string{{"package sheaf", "package sheaf // as it was"}}, "./internal/login", "Options"}
	broken := mutant{"no Go", "internal/login/login.go", [][2]string{{"package login", "package login; func f() { 1 }"}}, "./internal/login", "Options"}
	gone := mutant{"nowhere", "split.go", [][2]string{{"there is no such line", ""}}, "./internal/login", "Options"}
	noTest := mutant{"no test", "split.go", [][2]string{{"package sheaf", "package sheaf // as it was"}}, "./internal/login", "TestThatIsNone"}
	for _, m := range []mutant{none, broken, gone, noTest} {
		if got := plant(m, sound); got.caught {
			t.Errorf("%s is caught by %s", m.bug, got.what)
		}
	}
	if _, err := os.Stat("go.mod"); err != nil {
		t.Fatal(err)
	}
}
