package sheaf_test

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sheaf-project/sheaf"
)

// results yields a result with its index as data for each index given, then
// the error if there is one.
func results(err error, indexes ...int) iter.Seq2[sheaf.Result, error] {
	return func(yield func(sheaf.Result, error) bool) {
		for _, i := range indexes {
			if !yield(sheaf.Result{Index: i, Data: []byte(strconv.Itoa(i)), From: "r1", Offset: int64(10 * i), Bytes: 10, Attempts: 1}, nil) {
				return
			}
		}
		if err != nil {
			yield(sheaf.Result{}, err)
		}
	}
}

func text(b []byte) (string, error) { return string(b), nil }
func join(a, b string) string       { return a + " " + b }

func TestGatherReduceInOrder(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for _, test := range []struct {
		name    string
		indexes []int
		err     error
		gather  []string
		reduce  string
	}{
		{"none", nil, nil, nil, ""},
		{"one", []int{0}, nil, []string{"0"}, "0"},
		{"in order", []int{0, 1, 2}, nil, []string{"0", "1", "2"}, "0 1 2"},
		{"backwards", []int{2, 1, 0}, nil, []string{"0", "1", "2"}, "0 1 2"},
		{"mixed", []int{3, 0, 4, 1, 2}, nil, []string{"0", "1", "2", "3", "4"}, "0 1 2 3 4"},
		{"error at once", nil, broken, nil, ""},
		{"error after all", []int{1, 0}, broken, []string{"0", "1"}, "0 1"},
		{"error, the first missing", []int{2, 1}, broken, []string{"", "1", "2"}, "1 2"},
		{"error, some missing", []int{5, 0, 3}, broken, []string{"0", "", "", "3", "", "5"}, "0 3 5"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			gathered, err := sheaf.Gather(results(test.err, test.indexes...), text)
			if !slices.Equal(gathered, test.gather) || err != test.err {
				t.Errorf("Gather: %q, error %v, want %q", gathered, err, test.gather)
			}
			reduced, err := sheaf.Reduce(results(test.err, test.indexes...), text, join)
			if reduced != test.reduce || err != test.err {
				t.Errorf("Reduce: %q, error %v, want %q", reduced, err, test.reduce)
			}
			var order []int
			var last error
			for r, err := range sheaf.InOrder(results(test.err, test.indexes...)) {
				if last = err; err == nil {
					order = append(order, r.Index)
				}
			}
			slices.Sort(test.indexes)
			if !slices.Equal(order, test.indexes) || last != test.err {
				t.Errorf("InOrder: %v, error %v", order, last)
			}
		})
	}
}

func TestInOrderYieldsAsTheyCome(t *testing.T) {
	t.Parallel()
	pulled := 0
	source := func(yield func(sheaf.Result, error) bool) {
		for r := range results(nil, 0, 2, 1, 3) {
			pulled++
			if !yield(r, nil) {
				return
			}
		}
	}
	want := []int{1, 3, 3, 4} // pulled when each comes
	for r := range sheaf.InOrder(source) {
		if pulled != want[r.Index] {
			t.Errorf("result %d comes after %d were pulled, want %d", r.Index, pulled, want[r.Index])
		}
	}
}

func TestInOrderLeaveLoop(t *testing.T) {
	t.Parallel()
	for n := range 5 { // an iterator that went on would panic
		for range sheaf.InOrder(results(errors.New("broken"), 1, 0, 4, 3)) {
			if n--; n < 0 {
				break
			}
		}
	}
}

func TestDecodeError(t *testing.T) {
	t.Parallel()
	check := func(name string, err error) {
		t.Helper()
		var be *sheaf.BlockError
		if !errors.As(err, &be) || be.Index != 1 || be.Offset != 10 || be.Bytes != 10 || be.Attempts != 1 ||
			!errors.Is(err, strconv.ErrSyntax) || !strings.Contains(err.Error(), "replica r1") {
			t.Errorf("%s: error %v", name, err)
		}
	}
	decode := func(b []byte) (int, error) {
		if string(b) == "1" {
			b = []byte("one")
		}
		return strconv.Atoi(string(b))
	}
	_, err := sheaf.Gather(results(nil, 0, 1, 2), decode)
	check("Gather", err)
	sum, err := sheaf.Reduce(results(nil, 0, 1, 2), decode, func(a, b int) int { return a + b })
	check("Reduce", err)
	if sum != 0 {
		t.Errorf("sum %d", sum)
	}
}

func TestScatterInOrder(t *testing.T) {
	t.Parallel()
	bubble(t, "random delays", func(t *testing.T) {
		r := &route{f: func(context.Context, *sheaf.Request) (*sheaf.Reply, error) {
			time.Sleep(rand.N(time.Second))
			return nil, nil
		}}
		g := sheaf.Group{Route: by(t, r), Resolver: ready(8), Limit: 10}
		next := 0
		for r, err := range sheaf.InOrder(g.Scatter(t.Context(), words(300))) {
			if err != nil || r.Index != next {
				t.Fatalf("result %d, error %v, want result %d", r.Index, err, next)
			}
			next++
		}
		if next != 300 {
			t.Errorf("%d results", next)
		}
		in := thesisText()
		out, err := sheaf.Reduce(g.Scatter(t.Context(), sheaf.SplitLines(strings.NewReader(in), 50)), text,
			func(a, b string) string { return a + b })
		if err != nil || out != strings.ToUpper(in) {
			t.Errorf("the merged answer is not the sequential one; error %v", err)
		}
	})
	bubble(t, "a decoder that fails ends the scatter", func(t *testing.T) {
		r := &route{f: func(ctx context.Context, req *sheaf.Request) (*sheaf.Reply, error) {
			if req.Index > 0 {
				return hang(ctx)
			}
			return nil, nil
		}}
		g := sheaf.Group{Route: by(t, r), Resolver: ready(8)}
		_, err := sheaf.Gather(g.Scatter(t.Context(), words(10)), func(b []byte) (int, error) { return strconv.Atoi(string(b)) })
		if !errors.Is(err, strconv.ErrSyntax) || r.running.Load() != 0 {
			t.Errorf("error %v, %d calls run", err, r.running.Load())
		}
	})
}
