//go:build languages

package test

import (
	"strings"
	"testing"
)

// The workers of docs/ANY-LANGUAGE.md in Python and Node: as they stand there,
// and without their digests. Both must be on this machine.
func TestLanguages(t *testing.T) {
	programs := pagePrograms(t)
	for _, name := range []string{"count.py", "count.js"} {
		programs["bare-"+name] = without(programs[name], "Content-Digest")
	}
	b := programStack(t, programs)
	for _, language := range []string{"py", "js"} {
		b.deploy(language, "count."+language, 3)
		b.deploy("bare-"+language, "bare-count."+language, 3)
	}
	for _, language := range []string{"py", "js"} {
		b.countsBy(language, true)
		b.countsBy("bare-"+language, false)
		if a := b.count("function="+language, " \n\n"); a.body != "" {
			t.Errorf("%s: counts of nothing: %q", language, a.body)
		}
	}
}

// without drops the lines of a program that hold a word.
func without(program, word string) string {
	var out strings.Builder
	for line := range strings.Lines(program) {
		if !strings.Contains(line, word) {
			out.WriteString(line)
		}
	}
	return out.String()
}
