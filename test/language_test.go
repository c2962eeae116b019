package test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf/local"
)

// watchdogFlag makes the test's binary a watchdog as OpenFaaS's classic one:
// each request is the input of a program, and its output the answer. It knows
// nothing of digests.
const watchdogFlag = "-watchdog"

func runWatchdog(program string) {
	err := http.ListenAndServe(os.Getenv("sheaf_listen"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/_/") {
			return
		}
		cmd := exec.CommandContext(r.Context(), "sh", program)
		cmd.Stdin = r.Body
		out, err := cmd.Output()
		w.Header().Set("X-Duration-Seconds", "0.001")
		if os.Getenv("digest") != "" {
			sum := sha256.Sum256(out)
			w.Header().Set("Content-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":")
		}
		switch {
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
		case len(out) == 0 && os.Getenv("empty") == "204":
			w.WriteHeader(http.StatusNoContent)
		default:
			_, _ = w.Write(out)
		}
	}))
	fmt.Println(err)
	os.Exit(1)
}

const anyLanguage = "../docs/ANY-LANGUAGE.md"

var programForm = regexp.MustCompile("(?ms)^```(\\w+) (\\S+)\n(.*?)^```$")

// pagePrograms are the programs of docs/ANY-LANGUAGE.md, by their names.
func pagePrograms(t *testing.T) map[string]string {
	t.Helper()
	page, err := os.ReadFile(anyLanguage)
	if err != nil {
		t.Fatal(err)
	}
	programs := map[string]string{}
	for _, m := range programForm.FindAllStringSubmatch(string(page), -1) {
		programs[m[2]] = m[3]
		if n := strings.Count(m[3], "\n"); n > 18 {
			t.Errorf("%s has %d lines, and should be short", m[2], n)
		}
	}
	for _, name := range []string{"count.py", "count.js", "count.sh"} {
		if programs[name] == "" {
			t.Fatalf("%s has no program %s, but %d others", anyLanguage, name, len(programs))
		}
	}
	return programs
}

// programStack is a stack that runs programs, each in three replicas.
func programStack(t *testing.T, programs map[string]string) *bench {
	t.Helper()
	dir := t.TempDir()
	for name, text := range programs {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", filepath.Dir(binary)+string(os.PathListSeparator)+os.Getenv("PATH"))
	b := startWith(t, local.Config{Command: func(image string) ([]string, error) {
		name, watched := strings.CutPrefix(image, "watchdog/")
		path := filepath.Join(dir, name)
		switch _, here := programs[name]; {
		case !here:
			return command(image)
		case watched:
			return []string{os.Args[0], watchdogFlag, path}, nil
		}
		return []string{path}, nil
	}})
	b.deploy("master", "sheaf/master", 1)
	b.waitFor("master", 1)
	return b
}

// counts that a function gives are right by every way to ask for them, and as
// verified as they should be.
func (b *bench) countsBy(function string, verified bool) {
	t := b.t
	t.Helper()
	b.waitFor(function, 3)
	in := text(11, 30_000) + "  end\tof \vit \f x\r\n\xff\xfe caf\xc3\xa9 a:b {}\n"
	for _, query := range []string{"block=1KiB", "block=700&route=gateway"} {
		a := b.count("function="+function+"&"+query, in)
		unverified := "0"
		if !verified {
			unverified = a.header.Get("Sheaf-Blocks")
		}
		if a.body != sequential(in) {
			t.Errorf("%s, %s: wrong answer", function, query)
		}
		if got := a.header.Get("Sheaf-Unverified"); got != unverified {
			t.Errorf("%s, %s: Sheaf-Unverified is %s of %s blocks, want %s", function, query, got, a.header.Get("Sheaf-Blocks"), unverified)
		}
	}
	a := b.count("function="+function+"&block=1KiB", in, "Accept", "application/x-ndjson")
	lines := strings.Split(strings.TrimSpace(a.body), "\n")
	for i, line := range lines {
		var l struct {
			Verified           *bool
			Blocks, Unverified int
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		if last := i == len(lines)-1; !last && (l.Verified == nil || *l.Verified != verified) || last && (l.Unverified != 0) == verified {
			t.Errorf("%s: line %s", function, line)
		}
	}
	required, err := b.try(t.Context(), "function="+function+"&verify=require&block=1KiB", strings.NewReader(in))
	switch {
	case err != nil:
		t.Error(err)
	case verified && (required.status != http.StatusOK || required.body != sequential(in)):
		t.Errorf("%s, verify=require: %d %.200s", function, required.status, required.body)
	case !verified && (required.status != http.StatusFailedDependency || !strings.Contains(required.body, `"unverified_results"`) ||
		!strings.Contains(required.body, function+" answers without Content-Digest")):
		t.Errorf("%s, verify=require: %d %.300s", function, required.status, required.body)
	}
}

// A shell script that knows nothing of sheaf, behind a watchdog that does not
// either; and the same one behind sheaf serve, which proves what it passes on.
func TestShellWorker(t *testing.T) {
	b := programStack(t, map[string]string{
		"count.sh":  pagePrograms(t)["count.sh"],
		"fails.sh":  "#!/usr/bin/env -S sheaf serve sh\ncat; echo no such thing >&2; exit 3\n",
		"orphan.sh": "#!/usr/bin/env -S sheaf serve sh\nsleep 1000 & cat\n",
		"long.sh":   "#!/usr/bin/env -S sheaf serve sh\nyes\n",
		"noop.sh":   "#!/usr/bin/env -S sheaf serve /nosuch\n",
	})
	b.deploy("plain", "watchdog/count.sh", 3)
	b.deploy("digested", "watchdog/count.sh", 3, map[string]string{"digest": "1"})
	b.deploy("served", "count.sh", 3)
	b.countsBy("plain", false)
	b.countsBy("digested", true)
	b.countsBy("served", true)

	// A block without words has an empty result.
	if a := b.count("function=served", " \n\n"); a.body != "" {
		t.Errorf("counts of nothing: %q", a.body)
	}
	a, err := b.try(t.Context(), "function=plain", strings.NewReader(" \n\n"))
	if err != nil || a.status != http.StatusFailedDependency || !strings.Contains(a.body, "after 3 attempts") || !strings.Contains(a.body, "answer 204 when it has no result") {
		t.Errorf("an empty answer: %v %d %s", err, a.status, a.body)
	}
	b.deploy("says", "watchdog/count.sh", 3, map[string]string{"empty": "204"})
	b.waitFor("says", 3)
	if a := b.count("function=says", " \n\n"); a.body != "" || a.header.Get("Sheaf-Unverified") != "1" {
		t.Errorf("counts of nothing, said by 204: %q %v", a.body, a.header)
	}

	// What a program wrote before it failed is no result.
	b.deploy("fails", "fails.sh", 1)
	b.waitFor("fails", 1)
	resp, err := client.Post(b.URL+"/function/fails", "text/plain", strings.NewReader("half"))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusInternalServerError || !strings.Contains(string(body), "exit status 3: no such thing") {
		t.Errorf("a program that fails: %d %s", resp.StatusCode, body)
	}
	// What it leaves running keeps nobody waiting, and what it writes has an end.
	b.deploy("orphan", "orphan.sh", 1)
	b.waitFor("orphan", 1)
	if status, said := ask(t, "POST", b.URL+"/function/orphan", "whole"); status != http.StatusInternalServerError || !strings.Contains(said, "still holds its output open") {
		t.Errorf("a program that leaves one running: %d %s", status, said)
	}
	b.deploy("long", "long.sh", 1)
	b.waitFor("long", 1)
	if status, said := ask(t, "POST", b.URL+"/function/long", ""); status != http.StatusInternalServerError || !strings.Contains(said, "67108864 bytes") {
		t.Errorf("a program without end: %d %.300s", status, said)
	}
	for _, args := range [][]string{{"serve"}, {"serve", "/nosuch"}, {"serve", "-x"}} {
		if got := cli(t, "", args...); got.code != 2 {
			t.Errorf("sheaf %v: %+v", args, got)
		}
	}
}
