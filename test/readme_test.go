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
	_, url := startUp(t, "--port", "0", "--workers", "4")
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append([]string{"../README.md"}, pages...) {
		t.Run(filepath.Base(path), func(t *testing.T) { page(t, path, url) })
	}
}

func page(t *testing.T, path, url string) {
	rounds := 1
	if *update {
		rounds = 10 // README.md counts its own words: what it shows changes what it counts
	}
	for round := range rounds {
		shown, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		real, commands := consoles(t, string(shown), url)
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
var varying = regexp.MustCompile(`\d+(\.\d+)?(µs|ms|s)\b|\d+ blocks? of up to|on \d+ replicas?|at \d+ %|127\.0\.0\.1:\d+|(worker|master)-[0-9a-f]{8}|\d\d:\d\d:\d\d +\d+| +`)

// consoles runs the commands of the console blocks of a text, and returns it
// with what they print below them, and how many they were.
func consoles(t *testing.T, text, url string) (shown string, commands int) {
	t.Helper()
	var out strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "```console"):
			inside = !strings.Contains(line, "faas-cli") || os.Getenv("FAAS_CLI") != ""
		case inside && strings.HasPrefix(line, "```"):
			inside = false
		case inside && strings.HasPrefix(line, "$ "):
			commands++
			out.WriteString(line)
			out.WriteString(shell(t, strings.TrimPrefix(line, "$ "), url))
			continue
		case inside:
			continue // what it showed before
		}
		out.WriteString(line)
	}
	return out.String(), commands
}

// shell runs a command line in the root of the repository.
func shell(t *testing.T, line, url string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-o", "pipefail", "-c", strings.ReplaceAll(line, "http://127.0.0.1:8080", url))
	cmd.Dir = ".."
	t.Cleanup(func() { _ = os.Remove("../counts.txt") }) // which one of them writes
	path := []string{filepath.Dir(binary)}
	if cli := os.Getenv("FAAS_CLI"); cli != "" {
		path = append(path, filepath.Dir(cli))
	}
	path = append(path, os.Getenv("PATH"))
	cmd.Env = append(os.Environ(), "PATH="+strings.Join(path, string(os.PathListSeparator)), "OPENFAAS_URL="+url)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", line, err, out.String(), errs.String())
	}
	said := errs.String()
	if i := strings.Index(said, "port 8080 is taken"); i >= 0 { // on this machine, now
		_, said, _ = strings.Cut(said[i:], "\n")
	}
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
