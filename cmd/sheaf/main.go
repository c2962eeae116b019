// Command sheaf runs sheaf's functions on this machine, and talks to those that
// run elsewhere. See sheaf help.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/internal/bench"
	"github.com/sheaf-project/sheaf/master"
	"github.com/sheaf-project/sheaf/worker"
)

// version of the command and of the functions in it; a release sets it.
var version = "dev"

// Exit codes.
const (
	exitFailed      = 1   // the job, or the stack, failed
	exitUsage       = 2   // the command line is wrong
	exitInterrupted = 130 // by ^C
	exitPipe        = 141 // the reader of the answer left
)

func main() {
	// The functions that the local provider runs are in this very binary.
	if len(os.Args) == 3 && os.Args[1] == functionCommand {
		switch os.Args[2] {
		case "witness":
			runWitness()
		case "worker":
			worker.Main(wordcount.Count)
		case "master":
			master.Main(master.Job{New: func() master.Answer { return new(wordcount.Counts) }, Line: wordcount.Line})
		}
	}
	if len(os.Args) == 3 && os.Args[1] == bench.Command {
		os.Exit(bench.Peer(os.Args[2]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// A reader that leaves (| head) shall not end the process before it has
	// cleaned up: writing then returns EPIPE.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	context.AfterFunc(ctx, stop) // a second ^C ends the process at once
	err := run(ctx, os.Args[1:], std{os.Stdin, os.Stdout, os.Stderr})
	interrupted := ctx.Err() != nil
	stop()
	var usage usageError
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, syscall.EPIPE):
		os.Exit(exitPipe) // whoever read the answer has enough of it
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "sheaf: %v\n", err)
		os.Exit(exitUsage)
	case interrupted:
		fmt.Fprintln(os.Stderr, "sheaf: interrupted")
		os.Exit(exitInterrupted)
	default:
		fmt.Fprintf(os.Stderr, "sheaf: %v\n", err)
		os.Exit(exitFailed)
	}
}

// std is where a command reads and writes: results on out, all else on err.
type std struct {
	in  io.Reader
	out io.Writer
	err io.Writer
}

// usageError says what is wrong with the command line.
type usageError struct{ error }

func usagef(format string, a ...any) error { return usageError{fmt.Errorf(format, a...)} }

const help = `sheaf scatters a file over the replicas of a function and gathers the answer.

Usage: sheaf COMMAND [FLAGS]

  run FILE    run a job on FILE (- is standard input) and print the answer
  up          keep a local stack running: gateway, NATS, master and worker
  ps          show the replicas of functions: rank, address, state, epoch
  serve CMD   be a worker: each block is the input of a program, its output the result

  submit FILE  store a job that goes on without you, and print its ID; FILE may be a URL
  jobs         list jobs
  status ID    tell how far a job is
  result ID    print the answer of a job
  cancel ID    end a job
  redrive ID   run those blocks of a failed job again that have no result

  conform     print what is promised on each way to a function, and check it
  bench       measure sheaf side by side with what else one could build
  version     print the version
  help        print this; sheaf COMMAND -h prints a command's flags

For example:

  sheaf run README.md                    # count the words of a file
  sheaf run --block 300 --workers 6 FILE # in blocks of 300 bytes, on 6 replicas
  sheaf up                               # then, in another terminal:
  curl --data-binary @FILE http://127.0.0.1:8080/function/master
  sheaf submit --wait FILE               # it survives the master, and you

Exit codes: 0 done, 1 failed, 2 wrong command line, 130 interrupted, 141 the
reader of the answer left.
`

func run(ctx context.Context, args []string, s std) error {
	if len(args) == 0 {
		fmt.Fprint(s.err, help)
		return usagef("no command given")
	}
	switch args[0] {
	case "run":
		return runJob(ctx, args[1:], s)
	case "up":
		return up(ctx, args[1:], s)
	case "ps":
		return ps(ctx, args[1:], s)
	case "serve":
		return serve(args[1:], s)
	case "submit":
		return submitJob(ctx, args[1:], s)
	case "jobs":
		return listJobs(ctx, args[1:], s)
	case "status":
		return jobCommand("status", http.MethodGet, "", "sheaf status --output json 3WQH6B2V5ZLE4C7XJ3N2YAMKRT")(ctx, args[1:], s)
	case "result":
		return jobResult(ctx, args[1:], s)
	case "cancel":
		return jobCommand("cancel", http.MethodDelete, "", "sheaf cancel 3WQH6B2V5ZLE4C7XJ3N2YAMKRT")(ctx, args[1:], s)
	case "redrive":
		return jobCommand("redrive", http.MethodPost, "/redrive", "sheaf redrive 3WQH6B2V5ZLE4C7XJ3N2YAMKRT")(ctx, args[1:], s)
	case "conform":
		return conform(ctx, args[1:], s)
	case "bench":
		return benchmark(ctx, args[1:], s)
	case "version", "--version", "-version":
		fmt.Fprintln(s.out, "sheaf", version)
		return nil
	case "help", "-h", "--help", "-help":
		fmt.Fprint(s.out, help)
		return nil
	}
	return usagef("command %q is not known; sheaf help lists the commands", args[0])
}

// flags returns a set of flags whose help shows an example.
func flags(s std, name, usage, example string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // parse says what is wrong, once
	f.Usage = func() {
		fmt.Fprintf(s.out, "Usage: sheaf %s\n\nFor example: %s\n\nFlags:\n", usage, example)
		f.SetOutput(s.out)
		f.PrintDefaults()
		f.SetOutput(io.Discard)
	}
	return f
}

// parse parses flags that may stand before, between and after the arguments,
// and returns those.
func parse(f *flag.FlagSet, args []string) ([]string, error) {
	help := f.Usage
	f.Usage = func() {} // a wrong flag is said in one line
	var rest []string
	for {
		if err := f.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				help()
				return nil, err
			}
			return nil, usagef("%s: %v; sheaf %s -h lists the flags", f.Name(), err, f.Name())
		}
		used := len(args) - f.NArg()
		if used > 0 && args[used-1] == "--" {
			return append(rest, f.Args()...), nil
		}
		if f.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, f.Arg(0))
		args = f.Args()[1:]
	}
}

// oneOf checks the value of a flag.
func oneOf(name, value string, known ...string) error {
	if slices.Contains(known, value) {
		return nil
	}
	return usagef("--%s is %q, and must be one of %s", name, value, strings.Join(known, ", "))
}
