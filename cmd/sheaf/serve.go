package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/worker"
)

// maxOutput is how long the result of a program may be, in bytes.
const maxOutput = 64 << 20

// serve makes a worker of a program that reads a block from its standard input
// and writes the result to its standard output, as a watchdog of OpenFaaS does;
// but a result counts only if the program ended with 0, and has a digest. It
// returns only if the command line is wrong.
func serve(args []string, s std) error {
	f := flags(s, "serve", "serve COMMAND [ARGUMENTS]", "port=8081 sheaf serve tr a-z A-Z")
	for len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) > 0 && strings.HasPrefix(args[0], "-") {
		if _, err := parse(f, args); err != nil {
			return err
		}
	}
	if len(args) == 0 {
		return usagef("serve needs a program, as in: sheaf serve tr a-z A-Z")
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return usagef("serve: %w", err)
	}
	worker.Main(func(ctx context.Context, b sheaf.Block) ([]byte, error) {
		return runProgram(ctx, path, args[1:], b.Data)
	})
	return nil
}

// runProgram runs a program on a block. What it started ends with it.
func runProgram(ctx context.Context, path string, args []string, block []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	out, errs := &limited{most: maxOutput}, &limited{most: 1 << 10, drop: true}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(block), out, errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for what it started to close its output
	err := cmd.Run()
	if cmd.Process != nil {
		_ = cmd.Cancel() // what it left behind in its group
	}
	switch {
	case out.over: // which ended the program
		err = fmt.Errorf("its output is longer than may be, %d bytes", maxOutput)
	case errors.Is(err, exec.ErrWaitDelay):
		err = errors.New("it ended, but something that it started still holds its output open")
	}
	if text := bytes.TrimSpace(errs.kept); len(text) > 0 {
		fmt.Fprintf(os.Stderr, "%s\n", text)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, text)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return out.kept, nil
}

// limited keeps so many bytes that are written to it. More are an error, or are
// dropped. It is no bytes.Buffer, whose ReadFrom would read on without end.
type limited struct {
	kept []byte
	most int
	drop bool
	over bool // more was written
}

func (l *limited) Write(p []byte) (int, error) {
	fits := min(len(p), l.most-len(l.kept))
	l.kept = append(l.kept, p[:fits]...)
	l.over = l.over || fits < len(p)
	if l.over && !l.drop {
		return fits, io.ErrShortWrite
	}
	return len(p), nil
}
