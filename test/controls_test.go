package test

// controls_test.go holds the table of docs/SECURITY.md against the tests, and
// what can be seen of the controls by reading the code.

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The table of docs/SECURITY.md names tests that are there, of each control at
// least one or a reason, and every test that is named after a control.
func TestControlsAreListed(t *testing.T) {
	page, err := os.ReadFile("../docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	testFunc := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		code, err := os.ReadFile(path)
		for _, m := range testFunc.FindAllStringSubmatch(string(code), -1) {
			there[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile(`(?m)^\| C(\d+) \|.*\|([^|]*)\|$`)
	listed := map[string]bool{}
	number := 0
	for _, m := range row.FindAllStringSubmatch(string(page), -1) {
		number++
		if m[1] != fmt.Sprint(number) {
			t.Fatalf("control C%s stands where C%d should", m[1], number)
		}
		names := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(m[2], -1)
		if len(names) == 0 {
			t.Errorf("C%d has no test", number)
		}
		for _, n := range names {
			listed[n[1]] = true
			if !there[n[1]] {
				t.Errorf("C%d names %s, which is no test", number, n[1])
			}
		}
	}
	if number != 20 {
		t.Errorf("the table has %d controls, and there are 20", number)
	}
	for name := range there {
		if regexp.MustCompile(`^TestControl\d\d`).MatchString(name) && !listed[name] {
			t.Errorf("%s is not in the table", name)
		}
	}
}

// source is a file of the project that is no test.
type source struct {
	path string
	file *ast.File
	set  *token.FileSet
}

func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch name := d.Name(); {
		case err != nil:
			return err
		case d.IsDir() && (name == "testdata" || name == "template" || strings.HasPrefix(name, ".") && name != ".."):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		all = append(all, source{strings.TrimPrefix(filepath.ToSlash(path), "../"), f, set})
		return err
	})
	if err != nil || len(all) < 50 {
		t.Fatalf("%d files: %v", len(all), err)
	}
	return all
}

// secretName is what a value is called that must be compared in constant time.
var secretName = regexp.MustCompile(`(?i)^(mac|sum|want|got)?(mac|hmac|password|passwd|secret|seed|signature|sig|signingkey)s?$`)

// looseCompares finds comparisons of secrets that take as long as they agree.
func looseCompares(set *token.FileSet, f *ast.File) (found []string) {
	name := func(e ast.Expr) string {
		for {
			switch x := e.(type) {
			case *ast.Ident:
				return x.Name
			case *ast.SelectorExpr:
				return x.Sel.Name
			case *ast.SliceExpr:
				e = x.X
			case *ast.IndexExpr:
				e = x.X
			case *ast.ParenExpr:
				e = x.X
			case *ast.CallExpr: // a conversion
				if len(x.Args) != 1 {
					return ""
				}
				e = x.Args[0]
			default:
				return ""
			}
		}
	}
	constant := func(e ast.Expr) bool { // that there is one, or none, is no secret
		if id, ok := e.(*ast.Ident); ok {
			return id.Name == "nil"
		}
		lit, ok := e.(*ast.BasicLit)
		return ok && (lit.Value == `""` || lit.Kind == token.INT)
	}
	say := func(n ast.Node, what string) {
		found = append(found, fmt.Sprintf("line %d: %s", set.Position(n.Pos()).Line, what))
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch x := n.(type) {
		case *ast.BinaryExpr:
			if (x.Op == token.EQL || x.Op == token.NEQ) && !constant(x.X) && !constant(x.Y) {
				if len, ok := x.X.(*ast.CallExpr); ok && name(len.Fun) == "len" {
					return true
				}
				if len, ok := x.Y.(*ast.CallExpr); ok && name(len.Fun) == "len" {
					return true
				}
				for _, e := range []ast.Expr{x.X, x.Y} {
					if secretName.MatchString(name(e)) {
						say(x, name(e)+" is compared by "+x.Op.String())
					}
				}
			}
		case *ast.CallExpr:
			fun, ok := x.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Equal", "EqualFold", "Compare", "HasPrefix", "DeepEqual"}, fun.Sel.Name) {
				return true
			}
			if pkg, ok := fun.X.(*ast.Ident); ok && slices.Contains([]string{"hmac", "subtle"}, pkg.Name) {
				return true
			}
			for _, e := range x.Args {
				if secretName.MatchString(name(e)) && fun.Sel.Name != "HasPrefix" {
					say(x, name(e)+" is compared by "+fun.Sel.Name)
				}
			}
		}
		return true
	})
	return found
}

// Secrets and MACs are compared in constant time only.
func TestControl05ConstantTimeCompares(t *testing.T) {
	for _, bad := range []string{
		"package p; func f(mac, b []byte) bool { return string(mac) == string(b) }",
		"package p; func f() bool { return bytes.Equal(got, x.mac[:]) }",
		"package p; func f() bool { return u.Password != password }",
		"package p; func f() bool { return strings.EqualFold(a, signature) }",
	} {
		set := token.NewFileSet()
		f, err := parser.ParseFile(set, "", bad, 0)
		if err != nil {
			t.Fatal(err)
		}
		if len(looseCompares(set, f)) == 0 {
			t.Errorf("not found: %s", bad)
		}
	}
	for _, s := range sources(t) {
		for _, found := range looseCompares(s.set, s.file) {
			t.Errorf("%s, %s; take hmac.Equal or subtle.ConstantTimeCompare", s.path, found)
		}
	}
}

// fields returns the names that a literal of pkg.name sets, for each one in f.
func fields(f *ast.File, pkg, name string) (all [][]string) {
	ast.Inspect(f, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		sel, ok := lit.Type.(*ast.SelectorExpr)
		if !ok || sel.Sel.Name != name {
			return true
		}
		if id, ok := sel.X.(*ast.Ident); !ok || id.Name != pkg {
			return true
		}
		set := []string{}
		for _, e := range lit.Elts {
			if kv, ok := e.(*ast.KeyValueExpr); ok {
				set = append(set, kv.Key.(*ast.Ident).Name)
			}
		}
		all = append(all, set)
		return true
	})
	return all
}

// ofTheUser are files that speak to where their user told them to, or to what
// they have started themselves.
func ofTheUser(path string) bool {
	return strings.HasPrefix(path, "cmd/sheaf/") || strings.HasPrefix(path, "internal/bench/")
}

// No client follows redirects, keeps cookies, or asks the environment for a
// proxy; nobody uses the default one, which does it all.
func TestControl10NoRedirectsCookiesProxies(t *testing.T) {
	clients := 0
	for _, s := range sources(t) {
		for _, set := range fields(s.file, "http", "Client") {
			clients++
			if !slices.Contains(set, "CheckRedirect") && !ofTheUser(s.path) {
				t.Errorf("%s: an http.Client without CheckRedirect follows redirects", s.path)
			}
			if slices.Contains(set, "Jar") {
				t.Errorf("%s: an http.Client keeps cookies", s.path)
			}
			if !slices.Contains(set, "Transport") {
				t.Errorf("%s: an http.Client with the default transport asks the environment for a proxy", s.path)
			}
		}
		for _, set := range fields(s.file, "http", "Transport") {
			if slices.Contains(set, "Proxy") {
				t.Errorf("%s: an http.Transport uses a proxy", s.path)
			}
			if !slices.Contains(set, "DisableCompression") && !ofTheUser(s.path) {
				t.Errorf("%s: an http.Transport unpacks what it did not ask for", s.path)
			}
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && !ofTheUser(s.path) {
				if id, ok := sel.X.(*ast.Ident); ok && id.Name == "http" &&
					slices.Contains([]string{"DefaultClient", "DefaultTransport", "Get", "Post", "PostForm", "Head"}, sel.Sel.Name) {
					t.Errorf("%s: http.%s follows redirects and proxies", s.path, sel.Sel.Name)
				}
			}
			return true
		})
	}
	if clients < 5 {
		t.Errorf("only %d clients were found: this test shows nothing", clients)
	}
}

// Every server bounds the time for headers, and no program listens without.
func TestControl11ServersHaveTimeLimits(t *testing.T) {
	servers := 0
	for _, s := range sources(t) {
		for _, set := range fields(s.file, "http", "Server") {
			servers++
			for _, name := range []string{"ReadHeaderTimeout", "IdleTimeout"} {
				if !slices.Contains(set, name) {
					t.Errorf("%s: an http.Server without %s", s.path, name)
				}
			}
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && strings.HasPrefix(sel.Sel.Name, "ListenAndServe") {
				if id, ok := sel.X.(*ast.Ident); ok && id.Name == "http" {
					t.Errorf("%s: http.%s has no time limits", s.path, sel.Sel.Name)
				}
			}
			return true
		})
	}
	if servers < 2 {
		t.Errorf("only %d servers were found: this test shows nothing", servers)
	}
}
