// Command mutants plants bugs in this project's code, one at a time, and sees
// whether the tests catch them. A suite that catches no planted bug proves
// nothing.
//
//	go run ./test/mutants            all of them
//	go run ./test/mutants -only 3    the third
//
// Nothing in the tree is changed: a bug is an overlay of the Go tool. Each runs
// only the tests that should catch it, which must pass without it. A bug that
// cannot be planted any more, because the code has changed, is a failure.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// patience is how long the tests of one bug may take.
const patience = 3 * time.Minute

func main() {
	only := flag.Int("only", 0, "`number` of the one bug to plant; 0 is all")
	parallel := flag.Int("parallel", 2, "bugs that are planted at once")
	flag.Parse()
	if err := run(*only, *parallel); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// outcome is what came of a bug.
type outcome struct {
	caught bool
	what   string // the test that caught it, or why nobody did
	took   time.Duration
}

func run(only, parallel int) error {
	chosen := mutants
	if only != 0 {
		if only < 1 || only > len(mutants) {
			return fmt.Errorf("there is no bug %d; they are 1 to %d", only, len(mutants))
		}
		chosen = mutants[only-1 : only]
	}
	results := make([]outcome, len(chosen))
	sound := &baseline{done: map[string]func() error{}}
	slots := make(chan struct{}, max(1, parallel))
	var wg sync.WaitGroup
	for i, m := range chosen {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			results[i] = plant(m, sound)
			fmt.Fprintf(os.Stderr, "%2d of %d: %s: %s\n", i+1, len(chosen), m.bug, results[i].what)
		})
	}
	wg.Wait()
	fmt.Println("| | planted bug | in | caught by | s |")
	fmt.Println("|---|---|---|---|---|")
	missed := 0
	for i, r := range results {
		m, mark := chosen[i], "`"+r.what+"`"
		if !r.caught {
			missed++
			mark = "**nobody**: " + r.what
		}
		fmt.Printf("| %d | %s | `%s` | %s | %.0f |\n", i+1, m.bug, m.file, mark, r.took.Seconds())
	}
	fmt.Printf("\n%d of %d planted bugs are caught\n", len(results)-missed, len(results))
	if missed > 0 {
		return fmt.Errorf("%d planted bugs are not caught", missed)
	}
	return nil
}

// apply returns the file with the bug in it. Each edit must have one place.
func (m mutant) apply() ([]byte, error) {
	code, err := os.ReadFile(m.file)
	if err != nil {
		return nil, err
	}
	for _, e := range m.edits {
		if n := bytes.Count(code, []byte(e[0])); n != 1 {
			return nil, fmt.Errorf("cannot be planted: %q stands %d times in %s", e[0], n, m.file)
		}
		code = bytes.Replace(code, []byte(e[0]), []byte(e[1]), 1)
	}
	return code, nil
}

// plant runs the tests with a bug.
func plant(m mutant, sound *baseline) outcome {
	begun := time.Now()
	fail := func(err error) outcome { return outcome{what: err.Error(), took: time.Since(begun)} }
	code, err := m.apply()
	if err != nil {
		return fail(err)
	}
	if err := sound.check(m); err != nil {
		return fail(err)
	}
	dir, err := os.MkdirTemp("", "mutant-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	path, err := filepath.Abs(m.file)
	if err != nil {
		return fail(err)
	}
	planted, overlay := filepath.Join(dir, "planted.go"), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]map[string]string{"Replace": {path: planted}})
	if err == nil {
		err = os.WriteFile(planted, code, 0o600)
	}
	if err == nil {
		err = os.WriteFile(overlay, list, 0o600)
	}
	if err != nil {
		return fail(err)
	}
	begun = time.Now()
	out, err := test(m, "-overlay", overlay)
	switch {
	case err == nil:
		return fail(fmt.Errorf("the tests %s of %s pass", m.tests, m.room))
	case strings.Contains(out, "[build failed]") || strings.Contains(out, "[setup failed]"):
		return fail(fmt.Errorf("it does not compile: %.300s", out))
	}
	return outcome{caught: true, what: catcher(out), took: time.Since(begun)}
}

// catcher is the first test that failed.
func catcher(out string) string {
	name := ""
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "--- FAIL: "); ok {
			name, _, _ = strings.Cut(rest, " ")
			break
		}
		if rest, ok := strings.CutPrefix(line, "panic: "); ok {
			return "panic: " + strings.TrimSpace(rest)[:min(60, len(strings.TrimSpace(rest)))]
		}
	}
	if name == "" {
		return "its end"
	}
	return name
}

func test(m mutant, flags ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience+time.Minute)
	defer cancel()
	args := append([]string{"test", "-count=1", "-failfast", "-timeout", patience.String(), "-run", m.tests}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, m.room)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// baseline knows which tests pass without a bug.
type baseline struct {
	mu   sync.Mutex // guards done
	done map[string]func() error
}

func (b *baseline) check(m mutant) error {
	b.mu.Lock()
	key := m.room + " " + m.tests
	if b.done[key] == nil {
		b.done[key] = sync.OnceValue(func() error {
			out, err := test(m, "-v")
			if err != nil {
				return fmt.Errorf("the tests fail without it: %.500s", out)
			}
			if !strings.Contains(out, "--- PASS: ") {
				return fmt.Errorf("no test of %s is called %s", m.room, m.tests)
			}
			return nil
		})
	}
	f := b.done[key]
	b.mu.Unlock()
	return f()
}
