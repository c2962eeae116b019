package main

import (
	"context"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/internal/bench"
)

// benchmark is the command that measures sheaf beside its peers.
func benchmark(ctx context.Context, args []string, s std) error {
	f := flags(s, "bench", "bench [PART...] [FLAGS]", "sheaf bench latency --workers 6,35 --json bench.json")
	rounds := f.Int("rounds", 7, "`number` of times that each peer is measured, in turns")
	workers := f.String("workers", "6,12,17,35", "`numbers` of workers to scatter over")
	size := f.String("size", "100MB", "`size` of the text that the throughput is measured with")
	asJSON := f.String("json", "", "`file` for the results as JSON")
	asHTML := f.String("html", "", "`file` for a page with plots")
	asMarkdown := f.String("markdown", "", "`file` for the tables as Markdown")
	parts, err := parse(f, args)
	if err != nil {
		return err
	}
	for _, p := range parts {
		if !slices.Contains(bench.Parts(), p) {
			return usagef("bench has no part %q; its parts are %s", p, strings.Join(bench.Parts(), ", "))
		}
	}
	if len(parts) == 0 {
		parts = bench.Parts()
	}
	if *rounds < 1 || *rounds > 1000 {
		return usagef("--rounds is %d, and must be from 1 to 1000", *rounds)
	}
	c := bench.Config{Parts: parts, Rounds: *rounds, Log: s.err}
	for n := range strings.SplitSeq(*workers, ",") {
		v, err := strconv.Atoi(n)
		if err != nil || v < 1 || v > 1000 {
			return usagef("--workers is %q, and must be numbers from 1 to 1000 with commas between, such as 6,35", *workers)
		}
		c.Sizes = append(c.Sizes, v)
	}
	bytes, err := sheaf.ParseSize(*size)
	if err != nil || bytes < 1 {
		return usagef("--size is %q, and must be a size such as 100MB or 1GiB", *size)
	}
	c.Bytes = int64(bytes)
	if c.Self, err = os.Executable(); err != nil {
		return err
	}
	r, err := bench.Run(ctx, c)
	if err != nil {
		return err
	}
	for path, write := range map[string]func(io.Writer) error{*asJSON: r.WriteJSON, *asHTML: r.WriteHTML, *asMarkdown: r.WriteMarkdown} {
		if path == "" {
			continue
		}
		var b strings.Builder
		if err := write(&b); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			return err
		}
	}
	return r.WriteText(s.out)
}
