package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
)

// Zipf writes n bytes of text, or a little more to end a line: words of a
// vocabulary of 100,000, the k-th of them as often as 1/k says. The same seed
// gives the same text, on every machine.
func Zipf(w io.Writer, n int64, seed uint64) error {
	const vocabulary = 100_000
	rnd := rand.New(rand.NewPCG(seed, 0))
	words := make([][]byte, vocabulary)
	for i := range words {
		word := make([]byte, 2+min(8, i/4000+rnd.IntN(7)))
		for k := range word {
			word[k] = byte('a' + rnd.IntN(26))
		}
		words[i] = word
	}
	// The k-th word is drawn by inverting the harmonic sum, ln k nearly.
	most := math.Log(vocabulary)
	out := bufio.NewWriterSize(w, 1<<20)
	column := 0
	for n > 0 || column > 0 {
		word := words[min(vocabulary-1, int(math.Exp(rnd.Float64()*most))-1)]
		end := byte(' ')
		if column += len(word) + 1; column > 70 || n <= int64(len(word)) {
			end, column = '\n', 0
		}
		_, _ = out.Write(word) // the error stays, and comes with Flush
		_ = out.WriteByte(end)
		n -= int64(len(word)) + 1
	}
	return out.Flush()
}

// alone counts the words of a file in this process, on so many threads: each
// reads its part, cut at a line's end, and the counts are merged.
func alone(path string, threads int) (*wordcount.Counts, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	const piece = 4 << 20
	n := int((info.Size() + piece - 1) / piece)
	// Results in order of pieces, which cut words as blocks do.
	results := make([][]byte, n)
	errs := make([]error, threads)
	next := make(chan int, n)
	for i := range n {
		next <- i
	}
	close(next)
	var wg sync.WaitGroup
	for t := range threads {
		wg.Go(func() {
			buf := make([]byte, piece)
			for i := range next {
				got, err := f.ReadAt(buf, int64(i)*piece)
				if err != nil && err != io.EOF {
					errs[t] = err
					return
				}
				results[i] = count(buf[:got])
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return merge(results)
}

// scattered counts the words of a file over sheaf's workers, by value.
func scattered(ctx context.Context, path string, f *bySheaf, block int) (*wordcount.Counts, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var c wordcount.Counts
	for r, err := range sheaf.InOrder(f.group.Scatter(ctx, sheaf.SplitBytes(file, block))) {
		if err == nil {
			err = c.Add(r)
		}
		if err != nil {
			return nil, err
		}
	}
	return &c, nil
}

// throughput measures the word count of a long text.
func throughput(ctx context.Context, c Config, dir string) ([]Table, error) {
	path := filepath.Join(dir, "zipf.txt")
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(c.Log, "throughput: generating %d bytes of text\n", c.Bytes)
	err = errors.Join(Zipf(file, c.Bytes, 17), file.Close())
	if err != nil {
		return nil, err
	}
	reference, err := alone(path, 2)
	if err != nil {
		return nil, err
	}
	want, err := said(reference)
	if err != nil {
		return nil, err
	}
	type run struct {
		name string
		f    func() (string, error) // "" where only the time counts
	}
	var runs []run
	for _, n := range []int{2, 35} {
		crew, err := start(c.Self, kindSheaf, n, nil)
		if err != nil {
			return nil, err
		}
		defer crew.stop()
		f := newSheaf(crew.addrs, nil)
		defer f.close()
		runs = append(runs, run{fmt.Sprintf("sheaf, by value to %d workers", n), func() (string, error) {
			counts, err := scattered(ctx, path, f, 1<<20)
			if err != nil {
				return "", err
			}
			return said(counts)
		}})
	}
	for _, n := range []int{1, 2} {
		runs = append(runs, run{fmt.Sprintf("one Go program, %d threads, the same counter", n), func() (string, error) {
			counts, err := alone(path, n)
			if err != nil {
				return "", err
			}
			return said(counts)
		}})
	}
	tool := func(name string, args ...string) {
		if _, err := exec.LookPath(args[0]); err != nil {
			return
		}
		runs = append(runs, run{name, func() (string, error) {
			cmd := exec.CommandContext(ctx, args[0], args[1:]...)
			cmd.Env = append(os.Environ(), "LC_ALL=C")
			var errs bytes.Buffer
			cmd.Stderr = &errs
			if err := cmd.Run(); err != nil {
				return "", fmt.Errorf("%s: %w: %s", name, err, errs.String())
			}
			return "", nil
		}})
	}
	tool("wc -w", "wc", "-w", path)
	const program = "{for(i=1;i<=NF;i++)c[$i]++} END{for(w in c)print w,c[w]}"
	tool("mawk", "mawk", program, path)
	if _, err := exec.LookPath("mawk"); err == nil {
		tool("GNU parallel and mawk", "parallel", "--pipepart", "-a", path, "--block", "10M", "mawk", "'"+program+"'")
	}
	values := make([][]float64, len(runs))
	for round := range c.Rounds {
		fmt.Fprintf(c.Log, "throughput: round %d of %d\n", round+1, c.Rounds)
		for k := range runs {
			i := (k + round) % len(runs)
			begun := time.Now()
			got, err := runs[i].f()
			took := time.Since(begun).Seconds()
			if err == nil && got != "" && got != want {
				err = errors.New("a wrong answer")
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", runs[i].name, err)
			}
			values[i] = append(values[i], took)
		}
	}
	t := Table{Name: "throughput", Title: fmt.Sprintf("Word count of %.3g MB of Zipf text (vocabulary 100,000), blocks of 1 MiB", float64(c.Bytes)/1e6), Unit: "s", Columns: []string{"elapsed"}}
	for i, cell := range cells(values, nil) {
		t.Rows = append(t.Rows, Row{runs[i].name, []Cell{cell}})
	}
	return []Table{t}, nil
}
