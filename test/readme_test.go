package test

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the output that README.md and docs/*.md show anew")

// The commands of README.md and of the pages in docs run, and print what is
// shown below them, but for times and names that differ from run to run. Those
// that need faas-cli run when FAAS_CLI names one.
func TestReadme(t *testing.T) {
	programs := filepath.Join(t.TempDir(), "programs")
	if err := os.Mkdir(programs, 0o755); err != nil {
		t.Fatal(err)
	}
	_, url := startUp(t, "--port", "0", "--workers", "4", "--programs", programs)
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append([]string{"../README.md"}, pages...) {
		t.Run(filepath.Base(path), func(t *testing.T) { page(t, path, url, filepath.Dir(programs)) })
	}
}

// page runs the commands of a page, in the root of the repository, or in the
// folder tutorial when their block says so.
func page(t *testing.T, path, url, tutorial string) {
	rounds := 1
	if *update {
		rounds = 10 // README.md counts its own words: what it shows changes what it counts
	}
	for round := range rounds {
		shown, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		real, commands := consoles(t, string(shown), url, tutorial)
		if path == "../README.md" && commands < 4 {
			t.Fatalf("README.md has %d commands, and should have more", commands)
		}
		if varying.ReplaceAllString(real, "~") == varying.ReplaceAllString(string(shown), "~") {
			return
		}
		if !*update {
			t.Fatalf("%s shows other output than its commands print (make readme writes it anew):\n%s", path, difference(string(shown), real))
		}
		if err := os.WriteFile(path, []byte(real), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Logf("round %d: written anew", round)
	}
	t.Fatalf("%s does not come to rest", path)
}

// varying is what may differ: times, sizes of blocks that follow from the
// README's own length, ports, IDs, epochs, and the blanks that make columns.
var varying = regexp.MustCompile(`\d+(\.\d+)?(µs|ms|s)\b|\(cached\)|\d+ blocks? of up to|on \d+ replicas?|at \d+ %|127\.0\.0\.1:\d+|(worker|master)-[0-9a-f]{8}|\d\d:\d\d:\d\d +\d+| +`)

// consoles runs the commands of the console blocks of a text, and returns it
// with what they print below them, and how many they were. Blocks of code that
// say file=NAME are written to that file before.
func consoles(t *testing.T, text, url, tutorial string) (shown string, commands int) {
	t.Helper()
	var out strings.Builder
	var dir, file string // of the block
	var code *strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		info, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && !inside && code == nil:
			dir, file = "..", attribute(info, "file")
			if attribute(info, "in") == "tutorial" {
				dir = tutorial
			}
			inside = strings.HasPrefix(info, "console") && (!strings.Contains(info, "faas-cli") || os.Getenv("FAAS_CLI") != "")
			if file != "" {
				code = new(strings.Builder)
			}
		case fence:
			if code != nil {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(code.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			inside, code = false, nil
		case code != nil:
			code.WriteString(line)
		case inside && strings.HasPrefix(line, "$ "):
			commands++
			out.WriteString(line)
			out.WriteString(shell(t, dir, strings.TrimPrefix(line, "$ "), url))
			continue
		case inside:
			continue // what it showed before
		}
		out.WriteString(line)
	}
	return out.String(), commands
}

// downloads is what the Go tool says of modules that it has not met.
var downloads = regexp.MustCompile(`(?m)^go: downloading .*\n`)

// attribute is the value of name=VALUE in what follows the beginning of a block.
func attribute(info, name string) string {
	for field := range strings.FieldsSeq(info) {
		if value, ok := strings.CutPrefix(field, name+"="); ok {
			return value
		}
	}
	return ""
}

// shell runs a command line in a folder.
func shell(t *testing.T, dir, line, url string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-o", "pipefail", "-c", strings.ReplaceAll(line, "http://127.0.0.1:8080", url))
	cmd.Dir = dir
	t.Cleanup(func() { _ = os.Remove("../counts.txt") }) // which one of them writes
	path := []string{filepath.Dir(binary)}
	if cli := os.Getenv("FAAS_CLI"); cli != "" {
		path = append(path, filepath.Dir(cli))
	}
	path = append(path, os.Getenv("PATH"))
	cmd.Env = append(os.Environ(), "PATH="+strings.Join(path, string(os.PathListSeparator)), "OPENFAAS_URL="+url)
	if dir != ".." { // a user's folder, who has sheaf as a module
		modules, err := moduleEnv()
		if err != nil {
			t.Fatal(err)
		}
		root, err := filepath.Abs("..")
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(append(cmd.Env, modules...), "SHEAF="+root)
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", line, err, out.String(), errs.String())
	}
	said := errs.String()
	if i := strings.Index(said, "port 8080 is taken"); i >= 0 { // on this machine, now
		_, said, _ = strings.Cut(said[i:], "\n")
	}
	said = downloads.ReplaceAllString(said, "")
	return strings.ReplaceAll(out.String()+said, url, "http://127.0.0.1:8080")
}

// difference is the lines in which two texts differ.
func difference(a, b string) string {
	var out strings.Builder
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range max(len(as), len(bs)) {
		var x, y string
		if i < len(as) {
			x = as[i]
		}
		if i < len(bs) {
			y = bs[i]
		}
		if varying.ReplaceAllString(x, "~") != varying.ReplaceAllString(y, "~") {
			out.WriteString("- " + x + "\n+ " + y + "\n")
		}
	}
	return out.String()
}

// CI runs the very commands that the README names.
func TestCIRunsTheReadme(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	ci, err := os.ReadFile("../.ci/run")
	if err != nil {
		t.Fatal(err)
	}
	const tests = "go test ./...\n"
	if !bytes.Contains(readme, []byte("    "+tests)) || !bytes.Contains(ci, []byte("\n"+tests)) {
		t.Errorf("README.md and .ci/run do not both have the line %q", tests)
	}
}
