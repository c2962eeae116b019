package master

import (
	"strings"
	"testing"

	"github.com/sheaf-project/sheaf/internal/wire"
)

// Whatever parameters hold, they are taken within bounds or refused with one
// sentence.
func FuzzParameters(f *testing.F) {
	for _, v := range []string{`\n`, `a\x1e`, `\x`, "5%", "NaN%", "1e3%", "-0", "101%", "0x1p-2%", "300", "64KiB", "9223372036854775807T", "1h", "\xff"} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		if d, ok := delimiter(v); ok && len(d) > len(v) {
			t.Errorf("delimiter %q became %q", v, d)
		}
		tol, p := params{"tolerate": v}.tolerance()
		if p == nil && (tol.count < 0 || !(tol.share >= 0 && tol.share <= 1) || tol.allows(1, 0) && tol.count == 0) {
			t.Errorf("tolerate %q became %+v", v, tol)
		}
		s, bad := params{"delimiter": v}.splitter("records")
		if bad == nil && (len(s.Delimiter) < 1 || len(s.Delimiter) > 16) {
			t.Errorf("delimiter %q became %q", v, s.Delimiter)
		}
		for _, p := range []*wire.Problem{p, bad} {
			if p != nil && (strings.ContainsAny(p.Error(), "\n\r\x1b") || len(p.Error()) > 600) {
				t.Errorf("%q is refused with %q", v, p.Error())
			}
		}
	})
}
