package test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf/local"
)

// faas-cli runs a file in .openfaas/plugins of the home folder in its own place
// when its first argument is the file's name: with the file's path as argument
// 0, the arguments after the name, and its own environment. TestPlugin does the
// same, and asks the faas-cli that FAAS_CLI names to do it.
func TestPlugin(t *testing.T) {
	home, elsewhere := t.TempDir(), t.TempDir()
	plugins := filepath.Join(home, ".openfaas", "plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		t.Fatal(err)
	}
	plugin := filepath.Join(plugins, "sheaf")
	in := text(31, 20_000)
	path := file(t, in)
	b := startWith(t, local.Config{Command: command, Auth: local.Auth{User: "admin", Password: cliPassword}})
	b.deploy("master", "sheaf/master", 1)
	b.deploy("worker", "sheaf/worker", 2)
	b.waitFor("master", 1)
	b.waitFor("worker", 2)
	saved := fmt.Sprintf("auths:\n  - gateway: %s\n    auth: basic\n    token: %s\n", b.URL, base64.StdEncoding.EncodeToString([]byte("admin:"+cliPassword)))
	login := filepath.Join(home, ".openfaas", "config.yml")

	// run makes faas-cli sheaf ARGS, by what runs it.
	type runner struct {
		name string
		args func(args ...string) *exec.Cmd
	}
	runners := []runner{{"as faas-cli does", func(args ...string) *exec.Cmd {
		return &exec.Cmd{Path: plugin, Args: append([]string{plugin}, args...)}
	}}}
	if cli := os.Getenv("FAAS_CLI"); cli != "" {
		runners = append(runners, runner{"by faas-cli", func(args ...string) *exec.Cmd { return exec.Command(cli, append([]string{"sheaf"}, args...)...) }})
	} else {
		t.Log("FAAS_CLI names no binary of faas-cli")
	}
	for _, installed := range []string{"a link", "a copy"} {
		if installed == "a link" {
			if err := os.Symlink(binary, plugin); err != nil {
				t.Fatal(err)
			}
		} else {
			program, err := os.ReadFile(binary)
			if err == nil {
				err = os.Remove(plugin)
			}
			if err == nil {
				err = os.WriteFile(plugin, program, 0o700)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range runners {
			run := func(stdin string, args ...string) said {
				t.Helper()
				cmd := r.args(args...)
				var out, errs bytes.Buffer
				cmd.Dir, cmd.Env = elsewhere, []string{"HOME=" + home, "PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir()}
				cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
				if err := cmd.Run(); cmd.ProcessState == nil {
					t.Fatal(err)
				}
				return said{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
			}
			what := installed + ", " + r.name
			if got := run("", "run", path); got.code != 0 || got.out != sequential(in) {
				t.Errorf("%s: run FILE: exit code %d, %s", what, got.code, got.err)
			}
			if got := run(in, "run", "--gateway", b.URL, "-"); got.code != 0 || got.out != sequential(in) {
				t.Errorf("%s: run -: exit code %d, %s", what, got.code, got.err)
			}
			if got := run("", "run"); got.code != 2 || !strings.Contains(got.err, "run needs a file") {
				t.Errorf("%s: run: exit code %d, %s%s", what, got.code, got.out, got.err)
			}
			// The login that faas-cli has saved, or has not.
			if got := run("", "ps", "--gateway", b.URL); got.code != 1 || !strings.Contains(got.err, "faas-cli login --gateway "+b.URL) {
				t.Errorf("%s: ps without a login: exit code %d, %s%s", what, got.code, got.out, got.err)
			}
			if err := os.WriteFile(login, []byte(saved), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := run("", "ps", "--gateway", b.URL); got.code != 0 || strings.Count(got.out, "ready") != 3 {
				t.Errorf("%s: ps: exit code %d, %s%s", what, got.code, got.out, got.err)
			}
			if err := os.Remove(login); err != nil {
				t.Fatal(err)
			}
		}
	}
}
