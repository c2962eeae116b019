package sheaf

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
)

// InOrder yields results in the order of their index. It holds those that came
// early; [Group.Scatter] bounds how many that can be (4 × Limit, or all that
// follow a block that was given up and tolerated). An error is
// yielded last, after the results that are there, so that it may be known
// which ones are missing.
func InOrder(results iter.Seq2[Result, error]) iter.Seq2[Result, error] {
	return func(yield func(Result, error) bool) {
		early := make(map[int]Result)
		next := 0
		for r, err := range results {
			if err != nil {
				for _, i := range slices.Sorted(maps.Keys(early)) {
					if !yield(early[i], nil) {
						return
					}
				}
				yield(Result{}, err)
				return
			}
			if r.Index != next {
				early[r.Index] = r
				continue
			}
			for ok := true; ok; r, ok = early[next] {
				delete(early, next)
				next++
				if !yield(r, nil) {
					return
				}
			}
		}
	}
}

// Gather decodes all results and returns the values in block order. An error
// of results is returned beside the values that are there: after a
// [*PartialError] the value of a missing block is T's zero. A result that
// decode refuses is a [*BlockError].
func Gather[T any](results iter.Seq2[Result, error], decode func([]byte) (T, error)) ([]T, error) {
	var values []T
	for r, err := range results {
		if err != nil {
			if p, ok := errors.AsType[*PartialError](err); ok {
				values = extend(values, max(p.Total, p.Missing[len(p.Missing)-1].Index+1))
			}
			return values, err
		}
		v, err := decode(r.Data)
		if err != nil {
			return values, decodeError(r, err)
		}
		values = extend(values, r.Index+1)
		values[r.Index] = v
	}
	return values, nil
}

// extend returns values with zeros added until there are n.
func extend[T any](values []T, n int) []T {
	if n <= len(values) {
		return values
	}
	return append(values, make([]T, n-len(values))...)
}

// Reduce decodes each result and merges it into one value, in block order and
// as the results come: merge(merge(first, second), third), and so on. Without
// a block the value is T's zero. An error of results is returned beside what
// was merged of the blocks that are there; a result that decode refuses is a
// [*BlockError].
func Reduce[T any](results iter.Seq2[Result, error], decode func([]byte) (T, error), merge func(T, T) T) (T, error) {
	var sum T
	first := true
	for r, err := range InOrder(results) {
		if err != nil {
			return sum, err
		}
		v, err := decode(r.Data)
		if err != nil {
			return sum, decodeError(r, err)
		}
		if first {
			sum, first = v, false
		} else {
			sum = merge(sum, v)
		}
	}
	return sum, nil
}

func decodeError(r Result, err error) error {
	return &BlockError{Index: r.Index, Offset: r.Offset, Bytes: r.Bytes, Attempts: r.Attempts,
		Err: fmt.Errorf("decode the answer of replica %s: %w", r.From, err)}
}
