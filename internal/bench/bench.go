// Package bench measures sheaf side by side with what else one could build: the
// same work, the same processes, the same machine, the same minute. Peers take
// turns round by round, so that what disturbs one disturbs all; what counts are
// the ratios of one round.
//
// It is for the command sheaf bench. No other room imports it.
package bench

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// Config says what is measured.
type Config struct {
	Self   string // this command's path; it is the peers' processes, too
	Parts  []string
	Rounds int   // of each measurement; 0 means 7
	Sizes  []int // numbers of workers; nil means 6, 12, 17 and 35
	Bytes  int64 // of text for the throughput; 0 means 100 MB
	Log    io.Writer
}

// Parts are what can be measured.
func Parts() []string { return []string{"latency", "cold", "overhead", "growth", "throughput"} }

// A Report is what came out.
type Report struct {
	Machine string  `json:"machine"`
	Go      string  `json:"go"`
	Commit  string  `json:"commit"`
	When    string  `json:"when"`
	Rounds  int     `json:"rounds"`
	Tables  []Table `json:"tables"`
}

// A Table is one comparison. Cells of a row belong to the columns.
type Table struct {
	Name    string   `json:"name"`
	Title   string   `json:"title"`
	Unit    string   `json:"unit"`
	Columns []string `json:"columns"`
	Rows    []Row    `json:"rows"`
	Notes   []string `json:"notes,omitempty"`
}

// A Row is one peer.
type Row struct {
	Name  string `json:"name"`
	Cells []Cell `json:"cells"`
}

// A Cell is the median over the rounds, between the least and the most.
type Cell struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	// Ratio is the median over the rounds of sheaf's value divided by this one's;
	// 0 where nothing is compared.
	Ratio float64 `json:"ratio,omitempty"`
	// CPU is the processor time of all processes together, where it was taken.
	CPU float64 `json:"cpu,omitempty"`
}

// Run measures.
func Run(ctx context.Context, c Config) (*Report, error) {
	c.Rounds = cmp.Or(c.Rounds, 7)
	c.Bytes = cmp.Or(c.Bytes, 100e6)
	if c.Sizes == nil {
		c.Sizes = []int{6, 12, 17, 35}
	}
	if c.Log == nil {
		c.Log = io.Discard
	}
	r := &Report{Machine: machine(), Go: runtime.Version(), Commit: commit(), When: time.Now().UTC().Format(time.DateOnly), Rounds: c.Rounds}
	dir, err := os.MkdirTemp("", "sheaf-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for _, part := range c.Parts {
		var t []Table
		switch part {
		case "latency":
			t, err = latency(ctx, c)
		case "cold":
			t, err = cold(ctx, c, dir)
		case "overhead":
			t, err = overhead(ctx, c, dir)
		case "growth":
			t, err = growth(ctx, c)
		case "throughput":
			t, err = throughput(ctx, c, dir)
		default:
			err = fmt.Errorf("part %q is not known; the parts are %s", part, strings.Join(Parts(), ", "))
		}
		if err != nil {
			return nil, fmt.Errorf("bench %s: %w", part, err)
		}
		r.Tables = append(r.Tables, t...)
	}
	return r, nil
}

// cells makes the cells of peers: values[peer][round]. The ratio is that of
// peer 0, which is sheaf.
func cells(values [][]float64, cpu [][]float64) []Cell {
	out := make([]Cell, len(values))
	for i, v := range values {
		out[i] = Cell{Median: median(v), Min: slices.Min(v), Max: slices.Max(v)}
		if i > 0 {
			ratios := make([]float64, len(v))
			for k := range v {
				ratios[k] = values[0][k] / v[k]
			}
			out[i].Ratio = median(ratios)
		}
		if cpu != nil {
			out[i].CPU = median(cpu[i])
		}
	}
	return out
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// machine tells what this runs on, without its name.
func machine() string {
	model := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	return fmt.Sprintf("%s/%s, %d × %s", runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), model)
}

func commit() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		rev, dirty := "", ""
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				rev = s.Value[:min(10, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				dirty = " with changes"
			}
		}
		if rev != "" {
			return rev + dirty
		}
	}
	if out, err := exec.Command("git", "rev-parse", "--short=10", "HEAD").Output(); err == nil {
		return strings.TrimSpace(string(out))
	}
	return "unknown"
}

// cpuOf returns the processor time of processes, all threads, in seconds: the
// kernel counts it in nanoseconds. A process that is gone counts nothing.
func cpuOf(pids []int) float64 {
	total := 0.0
	for _, pid := range pids {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // none matches where there is no Linux
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				continue // the thread has ended
			}
			var ran float64
			if _, err := fmt.Sscan(string(b), &ran); err == nil {
				total += ran / 1e9
			}
		}
	}
	return total
}
