// Command reliability runs what shows that sheaf loses nothing and answers
// nothing wrong, and writes what came of it, as Markdown, between the marks of
// docs/RELIABILITY.md. No number on that page is written by hand.
//
//	go run ./test/reliability -jobs 500 -kill 100ms -master 5s -nats 20s
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// page is the page, and the marks of what is generated in it.
const (
	page  = "docs/RELIABILITY.md"
	begin = "<!-- what make reliability writes -->\n"
	end   = "<!-- end -->\n"
)

// report is what TestSoak writes.
type report struct {
	Seed                      uint64
	Command, Commit, Machine  string
	Seconds                   float64
	Jobs, Faults, Failed      map[string]int
	Wrong, Lost, Again, Stale int
	Blocks, Repeats, Stored   int
}

// suites are tests that inject faults one by one.
var suites = []struct{ what, room, run string }{
	{"connections of every route cut at each byte of an answer, by FIN, RST and hanging; answers damaged, redirected, packed, too large, of another replica", "./direct ./gateway ./topic", "Route"},
	{"blocks meant for another function or replica, and answers of another one", "./internal/serve ./internal/wire", "."},
	{"masters killed before and after each step that they store; stopped past their lease", "./test", "TestMasterDiesAtEachStep|TestMasterStopsPastItsLease"},
	{"workers killed, hung, scaled away; the record stale; NATS away; the client gone", "./test", "TestKillsWhileJobsRun|TestHungWorker|TestAllButOneKilled|TestNATSAway|TestScaleWhileJobsRun|TestClientGoes|TestResumeFromCheckpoint"},
	{"no room in the store of jobs", "./test", "TestStoreOfJobsIsFull"},
	{"few descriptors; addresses that are another function's by now", "./test", "TestFewDescriptors|TestAddressOfAnother"},
	{"asynchronous calls: replicas that die, the stack stopped and killed, callbacks that fail", "./local", "TestAsync|TestCallback"},
	{"buses ended and started again, work slower than the acknowledgement, connectors ended", "./broker ./connector", "."},
	{"the record of replicas: NATS away, providers that fail, streams that stall", "./registry", "."},
}

func main() {
	jobs := flag.Int("jobs", 500, "of the soak")
	kill := flag.Duration("kill", 100*time.Millisecond, "a worker fails so often")
	master := flag.Duration("master", 5*time.Second, "a master fails so often")
	nats := flag.Duration("nats", 20*time.Second, "NATS ends so often")
	seed := flag.Uint64("seed", 0, "of the soak; 0 means another each time")
	seeds := flag.Int("seeds", 100_000, "of the simulation")
	flag.Parse()
	if err := run(*jobs, *kill, *master, *nats, *seed, *seeds); err != nil {
		fmt.Fprintln(os.Stderr, "reliability:", err)
		os.Exit(1)
	}
}

func run(jobs int, kill, master, nats time.Duration, seed uint64, seeds int) error {
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(old), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks its marks", page)
	}
	var out strings.Builder
	dir, err := os.MkdirTemp("", "reliability-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "soak.json")
	if _, err := test("./test", "TestSoak$", "-timeout", "3h", "-soak.jobs", fmt.Sprint(jobs), "-soak.kill", kill.String(), "-soak.master", master.String(),
		"-soak.nats", nats.String(), "-soak.seed", fmt.Sprint(seed), "-soak.report", file); err != nil {
		return err
	}
	if err := soak(&out, file); err != nil {
		return err
	}
	if err := simulation(&out, seeds); err != nil {
		return err
	}
	if err := cases(&out); err != nil {
		return err
	}
	if err := promises(&out); err != nil {
		return err
	}
	return os.WriteFile(page, []byte(head+begin+out.String()+end+tail), 0o644)
}

// soak tells of the soak.
func soak(out *strings.Builder, file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var r report
	if err := json.Unmarshal(data, &r); err != nil {
		return err
	}
	jobs, faults := 0, 0
	for n := range maps.Values(r.Jobs) {
		jobs += n
	}
	for n := range maps.Values(r.Faults) {
		faults += n
	}
	fmt.Fprintf(out, "\n## The soak\n\n`%s` at commit `%s`, %s: %.0f s.\n\n| | |\n|---|---|\n", r.Command, r.Commit, r.Machine, r.Seconds)
	for _, k := range slices.Sorted(maps.Keys(r.Jobs)) {
		fmt.Fprintf(out, "| %ss with the right answer | %d |\n", k, r.Jobs[k])
	}
	fmt.Fprintf(out, "| **all jobs** | **%d** |\n| **wrong answers** | **%d** |\n| **jobs lost** | **%d** |\n", jobs, r.Wrong, r.Lost)
	failed := 0
	for n := range maps.Values(r.Failed) {
		failed += n
	}
	fmt.Fprintf(out, "| jobs that said that they failed, and were right when done again | %d |\n", failed)
	fmt.Fprintf(out, "| requests that were sent again | %d |\n| blocks run, of which again | %d, %d |\n| results stored, by masters that had lost their job | %d, %d |\n\n", r.Again, r.Blocks, r.Repeats, r.Stored, r.Stale)
	fmt.Fprintf(out, "| fault | times |\n|---|---|\n")
	for _, k := range slices.Sorted(maps.Keys(r.Faults)) {
		fmt.Fprintf(out, "| %s | %d |\n", k, r.Faults[k])
	}
	fmt.Fprintf(out, "| **all** | **%d** |\n", faults)
	return nil
}

// simulation tells of the simulation of the scheduler.
func simulation(out *strings.Builder, seeds int) error {
	said, err := test("./internal/schedule", "TestSimulation$", "-timeout", "1h", "-seeds", fmt.Sprint(seeds))
	if err != nil {
		return err
	}
	m := regexp.MustCompile(`(\d+) seeds: map\[([^\]]*)\]`).FindSubmatch(said.text)
	if m == nil {
		return fmt.Errorf("the simulation did not tell what it met: %s", said.text)
	}
	fmt.Fprintf(out, "\n## The simulation\n\n`make sim SEEDS=%s`: the scheduler under seeds 1 to %s, each a world of faults; no check failed. What it met:\n\n| event | times |\n|---|---|\n", m[1], m[1])
	for _, kv := range regexp.MustCompile(`([a-z][a-z ]*):(\d+)`).FindAllSubmatch(m[2], -1) {
		fmt.Fprintf(out, "| %s | %s |\n", kv[1], kv[2])
	}
	return nil
}

// cases counts the cases of the suites.
func cases(out *strings.Builder) error {
	fmt.Fprint(out, "\n## Faults one by one\n\n| what fails | tests | passed | failed |\n|---|---|---|---|\n")
	for _, s := range suites {
		said, err := test(s.room, s.run, "-timeout", "20m")
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "| %s | `go test %s -run '%s'` | %d | %d |\n", s.what, s.room, strings.ReplaceAll(s.run, "|", `\|`), said.passed, said.failed)
	}
	return nil
}

// promises has sheaf conform check itself.
func promises(out *strings.Builder) error {
	fmt.Fprint(out, "\n## What is promised, and whether it holds\n\n`sheaf conform`:\n\n")
	cmd := exec.Command("go", "run", "./cmd/sheaf", "conform", "--output", "markdown")
	cmd.Stderr = os.Stderr
	table, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd.Args, err, table)
	}
	out.Write(table)
	return nil
}

// outcome is what a run of tests said.
type outcome struct {
	text           []byte
	passed, failed int // tests and their parts
}

// test runs tests, and fails if one does, or if there are none.
func test(rooms, run string, args ...string) (*outcome, error) {
	all := slices.Concat([]string{"test", "-json", "-count=1", "-run", run}, strings.Fields(rooms), args)
	fmt.Fprintln(os.Stderr, "go", strings.Join(all, " "))
	cmd := exec.Command("go", all...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	o := &outcome{}
	var bad bytes.Buffer
	in := bufio.NewReader(stdout)
	for {
		line, err := in.ReadBytes('\n')
		var e struct{ Action, Test, Output string }
		if json.Unmarshal(line, &e) == nil {
			o.text = append(o.text, e.Output...)
			switch {
			case e.Test != "" && e.Action == "pass":
				o.passed++
			case e.Test != "" && e.Action == "fail":
				o.failed++
				fmt.Fprintln(&bad, e.Test)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	err = cmd.Wait()
	switch {
	case err != nil:
		return nil, fmt.Errorf("go %s: %w\n%s\n%s", strings.Join(all, " "), err, bad.Bytes(), o.text[max(0, len(o.text)-8000):])
	case o.passed == 0:
		return nil, fmt.Errorf("go %s: no test ran", strings.Join(all, " "))
	}
	return o, nil
}
