package bench

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/sheaf-project/sheaf"
	"github.com/sheaf-project/sheaf/functions/wordcount"
	"github.com/sheaf-project/sheaf/internal/wire"
)

// thesis is a text of 1,654 bytes and 392 words, as the thesis's cat.txt is.
func thesis() []byte {
	rnd := rand.New(rand.NewPCG(1654, 392))
	words := strings.Fields("the cat sat on a mat and it was not his cat but her dog that ran to see him go by for we are as one of us in")
	var b []byte
	for len(b) < 1654 {
		b = append(append(b, words[rnd.IntN(len(words))]...), ' ')
	}
	b = b[:1654]
	b[1653] = '\n'
	return b
}

// cut cuts text into n blocks, wherever that is.
func cut(text []byte, n int) [][]byte {
	size := (len(text) + n - 1) / n
	blocks := make([][]byte, n)
	for i := range n {
		blocks[i] = text[min(i*size, len(text)):min((i+1)*size, len(text))]
	}
	return blocks
}

// said is an answer as text.
func said(c *wordcount.Counts) (string, error) {
	var b strings.Builder
	err := c.WriteText(&b)
	return b.String(), err
}

// expected is the answer to text, counted in one piece.
func expected(text []byte) (string, error) {
	c, err := merge([][]byte{count(text)})
	if err != nil {
		return "", err
	}
	return said(c)
}

// contender is a peer with its processes.
type contender struct {
	name string
	fanout
	pids []int
}

// contenders starts all peers with n workers each. The first is sheaf.
func contenders(c Config, n int) (list []contender, stop func(), err error) {
	var stops []func()
	stop = func() {
		for i := len(stops) - 1; i >= 0; i-- {
			stops[i]()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	crews := map[string]*crew{}
	srv, err := natsServer()
	if err != nil {
		return nil, nil, err
	}
	stops = append(stops, srv.Shutdown)
	for _, kind := range []string{kindSheaf, kindHand, kindTCP, kindNetHTTP, kindNATS} {
		crews[kind], err = start(c.Self, kind, n, func(i int) []string {
			return []string{natsEnv + "=" + srv.ClientURL(), subjectEnv + "=" + fmt.Sprint("worker.", i)}
		})
		if err != nil {
			return nil, nil, err
		}
		stops = append(stops, crews[kind].stop)
	}
	add := func(name, kind string, f fanout, e error) {
		if e != nil {
			err = e
			return
		}
		stops = append(stops, f.close)
		list = append(list, contender{name, f, append(crews[kind].pids(), os.Getpid())})
	}
	add("sheaf", kindSheaf, newSheaf(crews[kindSheaf].addrs, nil), nil)
	hand, e := newHand(crews[kindHand].addrs)
	add("hand-written HTTP/1.1, both ends", kindHand, hand, e)
	tcp, e := newTCP(crews[kindTCP].addrs)
	add("TCP, frames", kindTCP, tcp, e)
	add("net/http, both ends", kindNetHTTP, newNetHTTP(crews[kindNetHTTP].addrs), nil)
	viaNATS, e := newNATS(srv, crews[kindNATS].addrs)
	add("NATS request/reply, fanned out", kindNATS, viaNATS, e)
	add("sheaf, plain net/http workers", kindNetHTTP, newSheaf(crews[kindNetHTTP].addrs, nil), nil)
	mixed, e := newHand(crews[kindNetHTTP].addrs)
	add("hand-written client, net/http workers", kindNetHTTP, mixed, e)
	return list, stop, err
}

// latency measures one warm scatter over n workers, for each n.
func latency(ctx context.Context, c Config) ([]Table, error) {
	t := Table{Name: "latency", Title: "Warm scatter of 1,654 bytes over N worker processes, a block for each: count words, gather, merge", Unit: "µs a round"}
	var plain float64
	for _, n := range c.Sizes {
		fmt.Fprintf(c.Log, "latency: %d workers\n", n)
		text := thesis()
		want, err := expected(text)
		if err != nil {
			return nil, err
		}
		blocks := cut(text, n)
		list, stop, err := contenders(c, n)
		if err != nil {
			return nil, err
		}
		values, cpu := make([][]float64, len(list)), make([][]float64, len(list))
		each := max(20, 2000/n)
		for round := range c.Rounds + 1 {
			for k := range list {
				i := (k + round) % len(list)
				took, used, err := list[i].measure(ctx, blocks, want, each)
				if err != nil {
					stop()
					return nil, fmt.Errorf("%s, %d workers: %w", list[i].name, n, err)
				}
				if round > 0 { // the first one warms up
					values[i], cpu[i] = append(values[i], took), append(cpu[i], used)
				}
			}
		}
		stop()
		t.Columns = append(t.Columns, fmt.Sprint("N=", n))
		if t.Rows == nil {
			for _, p := range list {
				t.Rows = append(t.Rows, Row{Name: p.name})
			}
		}
		for i, cell := range cells(values, cpu) {
			t.Rows[i].Cells = append(t.Rows[i].Cells, cell)
		}
		var ratios []float64
		for k := range values[5] {
			ratios = append(ratios, values[5][k]/values[6][k])
		}
		plain = median(ratios)
		t.Notes = append(t.Notes, fmt.Sprintf("N=%d: sheaf over plain net/http workers takes %.2f of the hand-written client's time.", n, plain))
	}
	return []Table{t}, nil
}

// measure runs rounds one after another, and returns the median of what one
// took and the processor time of one, in microseconds.
func (p contender) measure(ctx context.Context, blocks [][]byte, want string, n int) (took, cpu float64, err error) {
	times := make([]float64, n)
	before := cpuOf(p.pids)
	var last *wordcount.Counts
	for i := range n {
		begun := time.Now()
		if last, err = p.round(ctx, blocks); err != nil {
			return 0, 0, err
		}
		times[i] = float64(time.Since(begun)) / 1e3
	}
	cpu = (cpuOf(p.pids) - before) * 1e6 / float64(n)
	got, err := said(last)
	if err == nil && got != want {
		err = fmt.Errorf("a wrong answer: %.200q, want %.200q", got, want)
	}
	return median(times), cpu, err
}

// cold measures from nothing to the merged answer: sheaf run, the command,
// against the bare spawning of as many processes with a hand-written fan-out.
func cold(ctx context.Context, c Config, dir string) ([]Table, error) {
	text := thesis()
	want, err := expected(text)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "thesis.txt")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return nil, err
	}
	t := Table{Name: "cold", Title: "Cold: nothing runs; N processes are started, 1,654 bytes scattered, the answer printed", Unit: "ms",
		Rows: []Row{{Name: "sheaf run (stack, provider, registry and all)"}, {Name: "N bare processes, hand-written HTTP/1.1"}, {Name: "the thesis (its own cluster)"}}}
	for _, n := range c.Sizes {
		fmt.Fprintf(c.Log, "cold: %d workers\n", n)
		values := make([][]float64, 2)
		size := (len(text) + n - 1) / n
		for round := range c.Rounds {
			for k := range 2 {
				begun := time.Now()
				var got string
				if (k+round)%2 == 0 {
					cmd := exec.CommandContext(ctx, c.Self, "run", "--port", "0", "--split", "bytes", "--workers", fmt.Sprint(n), "--block", fmt.Sprint(size), path)
					var out, errs bytes.Buffer
					cmd.Stdout, cmd.Stderr = &out, &errs
					if err := cmd.Run(); err != nil {
						return nil, fmt.Errorf("sheaf run: %w: %s", err, errs.String())
					}
					got = out.String()
				} else {
					got, err = bare(ctx, c, cut(text, n))
					if err != nil {
						return nil, err
					}
				}
				took := float64(time.Since(begun)) / 1e6
				if got != want {
					return nil, fmt.Errorf("a wrong answer: %.200q", got)
				}
				values[(k+round)%2] = append(values[(k+round)%2], took)
			}
		}
		t.Columns = append(t.Columns, fmt.Sprint("N=", n))
		for i, cell := range cells(values, nil) {
			t.Rows[i].Cells = append(t.Rows[i].Cells, cell)
		}
		s := thesisSeconds[n] * 1e3
		t.Rows[2].Cells = append(t.Rows[2].Cells, Cell{Median: s, Min: s, Max: s})
	}
	t.Notes = append(t.Notes, "The thesis measured 6, 11, 17 and 35 workers; its 11 stands in our column 12.")
	return []Table{t}, nil
}

// thesisSeconds are the times of the thesis's Figure 17.
var thesisSeconds = map[int]float64{6: 4.58, 12: 5.87, 17: 10.10, 35: 18.77}

// bare starts processes, fans one round out over them, and ends them.
func bare(ctx context.Context, c Config, blocks [][]byte) (string, error) {
	crew, err := start(c.Self, kindHand, len(blocks), nil)
	if err != nil {
		return "", err
	}
	defer crew.stop()
	f, err := newHand(crew.addrs)
	if err != nil {
		return "", err
	}
	defer f.close()
	counts, err := f.round(ctx, blocks)
	if err != nil {
		return "", err
	}
	return said(counts)
}

// overhead measures what a block costs beside its work: 4,000 blocks of 64
// bytes over two workers, signed and not.
func overhead(ctx context.Context, c Config, dir string) ([]Table, error) {
	fmt.Fprintln(c.Log, "overhead")
	key := []byte("a key for measuring with\n")
	file := filepath.Join(dir, "key")
	if err := os.WriteFile(file, key, 0o600); err != nil {
		return nil, err
	}
	signer, err := wire.NewSigner(key)
	if err != nil {
		return nil, err
	}
	signer.Namespace = "openfaas-fn" // that of functions which are told of none
	plain, err := start(c.Self, kindSheaf, 2, nil)
	if err != nil {
		return nil, err
	}
	defer plain.stop()
	signed, err := start(c.Self, kindSheaf, 2, func(int) []string { return []string{"sheaf_key_file=" + file} })
	if err != nil {
		return nil, err
	}
	defer signed.stop()
	const blocks = 4000
	text := bytes.Repeat([]byte("a cat sat on the mat and did not do anything else for some time\n"), blocks)
	want, err := expected(text)
	if err != nil {
		return nil, err
	}
	list := []contender{
		{"digests", newSheaf(plain.addrs, nil), append(plain.pids(), os.Getpid())},
		{"digests and signatures", newSheaf(signed.addrs, signer), append(signed.pids(), os.Getpid())},
	}
	values, cpu, master := make([][]float64, 2), make([][]float64, 2), make([][]float64, 2)
	for round := range c.Rounds + 1 {
		for k := range list {
			i := (k + round) % 2
			before := cpuOf([]int{os.Getpid()})
			took, used, err := list[i].measure(ctx, cut(text, blocks), want, 1)
			if err != nil {
				return nil, err
			}
			if round > 0 {
				values[i], cpu[i] = append(values[i], took/blocks), append(cpu[i], used/blocks)
				master[i] = append(master[i], (cpuOf([]int{os.Getpid()})-before)*1e6/blocks)
			}
		}
	}
	t := Table{Name: "overhead", Title: "Cost of a block of 64 bytes, 4,000 of them over 2 workers", Unit: "µs a block", Columns: []string{"elapsed", "processor, both ends", "processor, master"}}
	for i, p := range list {
		p.close()
		row := Row{Name: p.name}
		for _, v := range [][][]float64{values, cpu, master} {
			row.Cells = append(row.Cells, cells(v[i:i+1], nil)[0])
		}
		t.Rows = append(t.Rows, row)
	}
	begun := time.Now()
	const sums = 20_000
	for range sums {
		_ = wire.Sum(text[:64])
	}
	t.Notes = append(t.Notes, fmt.Sprintf("A digest of 64 bytes takes %.2f µs; a block has four of them made, two at each end.", float64(time.Since(begun).Microseconds())/sums))
	req := &sheaf.Request{Job: sheaf.NewJob(), Function: "worker", Index: 1000, Attempt: 1, Size: 2, Epoch: 1, Body: text[:64],
		To: sheaf.Replica{ID: plain.addrs[0]}, Deadline: time.Now().Add(time.Minute)}
	var fields [2]int
	for i, caller := range []*wire.Caller{{}, {Signer: signer}} {
		head, _, err := caller.AppendHead(nil, req, req.Body, time.Now())
		if err != nil {
			return nil, err
		}
		fields[i] = len(head)
	}
	t.Notes = append(t.Notes, fmt.Sprintf("sheaf's header fields of a request are %d bytes, %d with a signature.", fields[0], fields[1]))
	return []Table{t}, nil
}
