package test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// said is what a command printed, and how it ended.
type said struct {
	out, err string
	code     int
}

// cli runs the command as a person does.
func cli(t *testing.T, stdin string, args ...string) said {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatalf("sheaf %s: %v", strings.Join(args, " "), err)
	}
	return said{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "input.txt")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

var summaryForm = regexp.MustCompile(`^\d+ blocks? of up to \S+ \S+ on \d+ replicas?: \S+ in all, of which scatter-gather \S+, start-up \S+(; killed \d+ replicas? at \d+ %)?\n$`)

func TestRun(t *testing.T) {
	in := text(7, 40_000)
	path, want := file(t, in), sequential(in)
	for _, c := range []struct {
		name  string
		args  []string
		stdin string
	}{
		{"a file", []string{path}, ""},
		{"standard input", []string{"-"}, in},
		{"flags after the file", []string{path, "--block", "300", "--workers", "3"}, ""},
		{"block with a unit", []string{"--block=4KiB", path}, ""},
		{"by bytes", []string{"--split", "bytes", "--block", "777", path}, ""},
		{"by records", []string{"--split", "records", "--delimiter", `w\x31`, "--block", "500", path}, ""},
		{"by CSV", []string{"--split", "csv", path}, ""},
		{"route gateway", []string{"--route", "gateway", path}, ""},
		{"route topic", []string{"--route", "topic", path}, ""},
		{"kills", []string{"--kill", "2@50%", "--block", "500", path}, ""},
		{"more kills than replicas", []string{"--kill", "99@50%", "--workers", "3", path}, ""},
		{"all killed", []string{"--kill", "4@20%", "--workers", "4", path}, ""},
		{"kill with one block", []string{"--kill", "1@50%", "--block", "1MiB", path}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := cli(t, c.stdin, append([]string{"run"}, c.args...)...)
			if got.code != 0 || got.out != want {
				t.Fatalf("exit code %d, right answer %v, stderr %s", got.code, got.out == want, got.err)
			}
			last := got.err[strings.LastIndexByte(strings.TrimSuffix(got.err, "\n"), '\n')+1:]
			if !summaryForm.MatchString(last) {
				t.Errorf("summary is %q", last)
			}
			if kill := strings.Contains(c.name, "kill"); kill != strings.Contains(last, "; killed ") || strings.Contains(last, "killed 0") {
				t.Errorf("summary of kills is %q", last)
			}
		})
	}
}

// Files that are made as they are read say that they are empty.
func TestRunFileWithoutSize(t *testing.T) {
	want, err := os.ReadFile("/proc/version")
	if err != nil {
		t.Fatal(err)
	}
	if got := cli(t, "", "run", "/proc/version"); got.code != 0 || got.out != sequential(string(want)) {
		t.Errorf("exit code %d: %s%s", got.code, got.out, got.err)
	}
	if got := cli(t, "", "run", "/dev/null"); got.code != 0 || got.out != "" || !strings.HasPrefix(got.err[strings.Index(got.err, "0 blocks"):], "0 blocks") {
		t.Errorf("/dev/null: exit code %d: %s%s", got.code, got.out, got.err)
	}
}

// A reader that leaves ends the command in order: nothing is left in the
// folder for temporary files.
func TestRunIntoHead(t *testing.T) {
	path, dir := file(t, text(8, 3<<20)), t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bash", "-c", `"$0" run "$1" | head -1; exit "${PIPESTATUS[0]}"`, binary, path)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	left, _ := os.ReadDir(dir)
	if n := bytes.Count(out, []byte("\n")); n != 1 || len(left) > 0 || strings.Contains(errs.String(), "goroutine") {
		t.Errorf("%d lines, %v, left behind %v: %s", n, err, left, errs.String())
	}
}

func TestRunJSON(t *testing.T) {
	got := cli(t, "b a b \xff\n", "run", "--output", "json", "-")
	var counts map[string]int
	if err := json.Unmarshal([]byte(got.out), &counts); err != nil || got.code != 0 {
		t.Fatalf("exit code %d: %v: %s%s", got.code, err, got.out, got.err)
	}
	if counts["b"] != 2 || counts["a"] != 1 || counts["\ufffd"] != 1 || len(counts) != 3 {
		t.Errorf("counts are %v", counts)
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"help"}, {"--help"}, {"run", "-h"}, {"up", "-h"}, {"ps", "--help"},
		{"submit", "-h"}, {"jobs", "-h"}, {"status", "-h"}, {"result", "-h"}, {"cancel", "-h"}, {"redrive", "-h"}} {
		got := cli(t, "", args...)
		if got.code != 0 || !strings.Contains(got.out+got.err, "or example") {
			t.Errorf("sheaf %v: exit code %d, and no example in %s%s", args, got.code, got.out, got.err)
		}
	}
	if got := cli(t, "", "version"); got.code != 0 || !strings.HasPrefix(got.out, "sheaf ") {
		t.Errorf("sheaf version: %+v", got)
	}
}

// startUp runs sheaf up and returns its process and the gateway's URL.
func startUp(t *testing.T, args ...string) (*exec.Cmd, string) {
	t.Helper()
	cmd, url, _ := startUpSaying(t, args...)
	return cmd, url
}

// startUpSaying returns what sheaf up said before it was up, too.
func startUpSaying(t *testing.T, args ...string) (cmd *exec.Cmd, url, before string) {
	t.Helper()
	cmd = exec.Command(binary, append([]string{"up"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its own, so that a signal to it is to it alone
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	in := bufio.NewReader(errs)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatalf("sheaf up ended: %v\n%s", err, before)
		}
		if m := regexp.MustCompile(`sheaf is up at (http://\S+) `).FindStringSubmatch(line); m != nil {
			go func() { _, _ = io.Copy(io.Discard, in) }()
			return cmd, m[1], before
		}
		before += line
	}
}

func TestUp(t *testing.T) {
	cmd, url := startUp(t, "--port", "0", "--workers", "3")
	resp, err := http.Get(url + "/healthz")
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("healthz: %v %v", resp, err)
	}
	resp.Body.Close()

	in := text(3, 20_000)
	path := file(t, in)
	for _, args := range [][]string{{"--block", "300"}, {"--workers", "5"}, {"--kill", "1@40%", "--block", "1KiB"}, {"--route", "gateway"}} {
		got := cli(t, "", append([]string{"run", path, "--gateway", url}, args...)...)
		if got.code != 0 || got.out != sequential(in) {
			t.Errorf("run %v: exit code %d, %s", args, got.code, got.err)
		}
	}
	listing := cli(t, "", "ps", "--gateway", url)
	if n := strings.Count(listing.out, "ready"); n < 5 || !strings.HasPrefix(listing.out, "FUNCTION") {
		t.Errorf("ps shows %d ready replicas:\n%s", n, listing.out)
	}
	var records []struct{ Function string }
	if err := json.Unmarshal([]byte(cli(t, "", "ps", "--gateway", url, "--output", "json").out), &records); err != nil || len(records) != 2 {
		t.Errorf("ps as JSON: %v %v", records, err)
	}

	pids := functions(t, cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("sheaf up ended with %v", err)
	}
	ended(t, pids, 0)
}

// ended checks that processes end in time.
func ended(t *testing.T, pids []string, within time.Duration) {
	t.Helper()
	if len(pids) == 0 {
		t.Fatal("there were no processes: the test shows nothing")
	}
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		var left []string
		for _, pid := range pids {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			if stat, err := os.ReadFile("/proc/" + pid + "/stat"); err == nil && syscall.Kill(n, 0) == nil && !bytes.Contains(stat, []byte(") Z ")) {
				left = append(left, pid)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Since(begun) > within {
			t.Fatalf("processes %v still run after %v", left, within)
		}
	}
}

// Nothing is left running when sheaf itself is killed by kill -9.
func TestKillSheaf(t *testing.T) {
	cmd, _ := startUp(t, "--port", "0", "--workers", "3")
	pids := functions(t, cmd.Process.Pid)
	if len(pids) != 5 {
		t.Fatalf("sheaf up runs %d processes, want a master, 3 workers and their guard", len(pids))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	ended(t, pids, 2*time.Second)

	// It could not remove its folder for temporary files; the next one does.
	left := func() []string {
		folders, err := filepath.Glob(filepath.Join(os.TempDir(), fmt.Sprintf("sheaf-%d-*", cmd.Process.Pid)))
		if err != nil {
			t.Fatal(err)
		}
		return folders
	}
	if len(left()) != 1 {
		t.Errorf("folders of the one that was killed: %v", left())
	}
	cli(t, "a\n", "run", "-")
	if len(left()) != 0 {
		t.Errorf("folders that are left: %v", left())
	}
}

func TestInterrupt(t *testing.T) {
	cmd := exec.Command(binary, "run", "-") // its standard input never comes
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // into the midst of the job; sooner is right, too
	pids := functions(t, cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("exit code %d: %s", code, errs.String())
	}
	ended(t, pids, 0)
}

// A taken port is said, and another one found; with --port of sheaf up it is an
// error that says what to do.
func TestTakenPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	got := cli(t, "a b a\n", "run", "--port", port, "-")
	if got.code != 0 || got.out != "a 2\nb 1\n" || !strings.Contains(got.err, "port "+port+" is taken; the gateway is at http://127.0.0.1:") {
		t.Errorf("run: %+v", got)
	}
	got = cli(t, "", "up", "--port", port)
	if got.code != 1 || !strings.Contains(got.err, "port "+port+" is taken; name another with --port") {
		t.Errorf("up: %+v", got)
	}
}
