package registry

import (
	"context"
	"iter"
	"maps"
	"slices"

	"github.com/sheaf-project/sheaf"
)

// Merge returns a Source that tells what all the given ones tell. A replica that
// several name, by one ID, is one, and is what the first of them says. Desired
// is what the first one says that knows, else -2. A function is gone when one
// says so. All is told when all have told all, and an error of one is one of the
// merged Source: whoever reads it again reads all of them again.
func Merge(sources ...Source) Source {
	if len(sources) == 1 {
		return sources[0]
	}
	return merged(sources)
}

type merged []Source

// heard is what one source said.
type heard struct {
	source int
	view   sheaf.View
	err    error
}

func (m merged) Replicas(ctx context.Context) iter.Seq2[sheaf.View, error] {
	return func(yield func(sheaf.View, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		said := make(chan heard)
		ended := make(chan struct{})
		for i, s := range m {
			go func() {
				defer func() { ended <- struct{}{} }()
				for v, err := range s.Replicas(ctx) {
					select {
					case said <- heard{i, v, err}:
					case <-ctx.Done():
						return
					}
					if err != nil {
						return
					}
				}
			}()
		}
		running := len(m)
		defer func() {
			cancel()
			for ; running > 0; running-- {
				<-ended
			}
		}()
		views := make([]map[string]sheaf.View, len(m)) // of each source
		for i := range views {
			views[i] = make(map[string]sheaf.View)
		}
		all := make([]bool, len(m))
		for {
			var h heard
			select {
			case h = <-said:
			case <-ended: // without a word: as a stream that ends
				running--
				return
			}
			switch {
			case h.err != nil:
				yield(sheaf.View{}, h.err)
				return
			case h.view.Function == "":
				all[h.source] = true
				if !slices.Contains(all, false) && !yield(sheaf.View{}, nil) {
					return
				}
				continue
			case h.view.Desired == unknown && len(h.view.Replicas) == 0, h.view.Desired < 0 && h.view.Desired != unknown:
				delete(views[h.source], Key(h.view.Function))
			default:
				views[h.source][Key(h.view.Function)] = h.view
			}
			if h.view.Desired >= 0 || h.view.Desired == unknown {
				h.view = merge(h.view.Function, views)
			}
			if !yield(h.view, nil) {
				return
			}
		}
	}
}

// merge makes one view of those that the sources have of a function.
func merge(function string, views []map[string]sheaf.View) sheaf.View {
	v := sheaf.View{Function: function, Desired: unknown}
	byID := make(map[string]sheaf.Replica)
	for _, of := range slices.Backward(views) {
		one, is := of[Key(function)]
		if !is {
			continue
		}
		if one.Desired != unknown {
			v.Desired = one.Desired
		}
		for _, r := range one.Replicas {
			byID[r.ID] = r
		}
	}
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		v.Replicas = append(v.Replicas, byID[id])
	}
	return v
}
