package bench

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
)

// growth measures how the cost of a block and of a worker change with their
// numbers: blocks from 10 to 100,000 on two workers, and workers from 1 to 64.
func growth(ctx context.Context, c Config) ([]Table, error) {
	blocks := Table{Name: "growth-blocks", Title: "Blocks of 64 bytes on 2 workers", Unit: "µs a block; MiB of the master at the end",
		Rows: []Row{{Name: "elapsed"}, {Name: "processor, master"}, {Name: "resident memory of the master, MiB"}}}
	crew, err := start(c.Self, kindSheaf, 2, nil)
	if err != nil {
		return nil, err
	}
	defer crew.stop()
	f := newSheaf(crew.addrs, nil)
	defer f.close()
	line := []byte("a cat sat on the mat and did not do anything else for some time\n")
	p := contender{"sheaf", f, []int{os.Getpid()}}
	for _, n := range []int{10, 100, 1000, 10_000, 100_000} {
		fmt.Fprintf(c.Log, "growth: %d blocks\n", n)
		text := bytes.Repeat(line, n)
		want, err := expected(text)
		if err != nil {
			return nil, err
		}
		var took, cpu, rss []float64
		for range c.Rounds {
			t, used, err := p.measure(ctx, cut(text, n), want, max(1, 2000/n))
			if err != nil {
				return nil, err
			}
			took, cpu = append(took, t/float64(n)), append(cpu, used/float64(n))
			rss = append(rss, resident())
		}
		blocks.Columns = append(blocks.Columns, fmt.Sprint(n))
		for i, v := range [][]float64{took, cpu, rss} {
			blocks.Rows[i].Cells = append(blocks.Rows[i].Cells, cells([][]float64{v}, nil)[0])
		}
	}
	workers := Table{Name: "growth-workers", Title: "A block of 64 bytes for each of N workers", Unit: "µs a round",
		Rows: []Row{{Name: "sheaf"}, {Name: "TCP, frames"}}}
	sizes := []int{1, 2, 4, 8, 16, 32, 64}
	var xs []float64
	ys := make([][]float64, 2)
	for _, n := range sizes {
		fmt.Fprintf(c.Log, "growth: %d workers\n", n)
		values, err := side(ctx, c, n, line)
		if err != nil {
			return nil, err
		}
		workers.Columns = append(workers.Columns, fmt.Sprint("N=", n))
		xs = append(xs, float64(n))
		for i, cell := range cells(values, nil) {
			workers.Rows[i].Cells = append(workers.Rows[i].Cells, cell)
			ys[i] = append(ys[i], cell.Median)
		}
	}
	for i, row := range workers.Rows {
		slope, at0, r2 := fit(xs, ys[i])
		workers.Notes = append(workers.Notes, fmt.Sprintf("%s fits %.0f µs + %.1f µs × N, R² %.4f.", row.Name, at0, slope, r2))
	}
	return []Table{blocks, workers}, nil
}

// side measures sheaf and TCP with n workers, in turns.
func side(ctx context.Context, c Config, n int, line []byte) ([][]float64, error) {
	text := bytes.Repeat(line, n)
	want, err := expected(text)
	if err != nil {
		return nil, err
	}
	a, err := start(c.Self, kindSheaf, n, nil)
	if err != nil {
		return nil, err
	}
	defer a.stop()
	b, err := start(c.Self, kindTCP, n, nil)
	if err != nil {
		return nil, err
	}
	defer b.stop()
	ours := newSheaf(a.addrs, nil)
	defer ours.close()
	ours.group.Limit = max(64, 2*n)
	tcp, err := newTCP(b.addrs)
	if err != nil {
		return nil, err
	}
	defer tcp.close()
	values := make([][]float64, 2)
	list := []contender{{"sheaf", ours, nil}, {"tcp", tcp, nil}}
	for round := range c.Rounds + 1 {
		for k := range list {
			i := (k + round) % 2
			took, _, err := list[i].measure(ctx, cut(text, n), want, max(10, 1000/n))
			if err != nil {
				return nil, fmt.Errorf("%s, %d workers: %w", list[i].name, n, err)
			}
			if round > 0 {
				values[i] = append(values[i], took)
			}
		}
	}
	return values, nil
}

// fit is the line through points by least squares.
func fit(x, y []float64) (slope, at0, r2 float64) {
	n := float64(len(x))
	var sx, sy, sxx, sxy, syy float64
	for i := range x {
		sx, sy = sx+x[i], sy+y[i]
		sxx, sxy, syy = sxx+x[i]*x[i], sxy+x[i]*y[i], syy+y[i]*y[i]
	}
	slope = (n*sxy - sx*sy) / (n*sxx - sx*sx)
	at0 = (sy - slope*sx) / n
	r := (n*sxy - sx*sy) / math.Sqrt((n*sxx-sx*sx)*(n*syy-sy*sy))
	return slope, at0, r * r
}

// resident is this process's resident memory in MiB; 0 when it is not known.
func resident() float64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 64) // 0 when it is no number
			return kb / 1024
		}
	}
	return 0
}
