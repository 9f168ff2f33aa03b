// Package test holds what is tested about the repository as a whole.
package test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "cgmanager"

// rule says what the Go files of a folder may import. It is the table of
// docs/ARCHITECTURE.md; a folder that no rule is for may hold no Go file.
type rule struct {
	// folder, or with "/..." it and all below; the first that fits counts.
	folder string
	// ours lists what of this module may be imported, "/..." as above.
	ours []string
	// std lists the only packages beside ours that may be imported; nil
	// allows all but those in closed.
	std []string
	// tests: test files keep to the rule too, except for std.
	tests bool
}

// pure is what computes and cannot do anything: no I/O, no clock, no printing.
var pure = []string{"cmp", "errors", "slices", "strconv", "strings"}

var rules = []rule{
	{folder: "privcheck", std: pure, tests: true, ours: []string{"privcheck/matrix"}},
	{folder: "privcheck/matrix", std: pure, tests: true, ours: []string{"privcheck"}},
	{folder: "cgfs/...", tests: true, ours: []string{"cgfs/..."}},
	{folder: "api"},
	{folder: "api/server", ours: []string{"api", "api/wire"}},
	{folder: "api/bus", ours: []string{"api", "api/wire"}},
	{folder: "api/...", ours: []string{"api"}},
	{folder: "manager", ours: []string{"api", "privcheck", "cgfs", "manager/..."}},
	// What manager is made of does not know manager.
	{folder: "manager/...", ours: []string{"api", "privcheck", "cgfs", "manager/..."}},
	{folder: "proxy/...", ours: []string{"api/...", "proxy/..."}},
	{folder: "cmd/...", ours: []string{"..."}},
	{folder: "test/...", ours: []string{"..."}},
}

// closed lists packages that only some folders may import, outside tests.
var closed = map[string][]string{
	// A root daemon that runs programs is a way in.
	"os/exec": {"cmd/...", "test/...", "cgfs/cgtest"},
	// The wire format.
	"github.com/coreos/go-systemd/v22/dbus": {"manager/systemd"},
	"github.com/godbus/dbus/v5":             {"manager/systemd", "manager/polkit", "api/...", "cmd/...", "test/..."},
}

// helpers are there for tests alone.
var helpers = []string{"test/...", "cgfs/cgtest", "privcheck/matrix"}

// within reports whether p is what pattern names.
func within(pattern, p string) bool {
	if pattern == "..." {
		return true
	}
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return p == dir || strings.HasPrefix(p, dir+"/")
	}
	return p == pattern
}

func anyWithin(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return within(pattern, p) })
}

// violation says what is wrong with a file importing pkg, or "".
func violation(file, pkg string) string {
	folder, isTest := path.Dir(file), strings.HasSuffix(file, "_test.go")
	i := slices.IndexFunc(rules, func(r rule) bool { return within(r.folder, folder) })
	if i < 0 {
		return "the folder is not in the table"
	}
	r := rules[i]
	if ours, ok := strings.CutPrefix(pkg, module+"/"); ok || pkg == module {
		switch {
		case !isTest && anyWithin(helpers, ours) && !anyWithin(helpers, folder):
			return "that is for tests alone"
		case ours == folder && isTest: // package x_test
			return ""
		case isTest && within("test/...", ours):
			return "" // the harness
		case isTest && !r.tests:
			return ""
		case strings.HasPrefix(folder, "manager/") && ours == "manager":
			return "a part of manager does not import manager"
		case !anyWithin(r.ours, ours):
			return "may not import that of ours"
		}
		return ""
	}
	if isTest {
		return ""
	}
	if r.std != nil && !slices.Contains(r.std, pkg) {
		return "imports nothing but " + strings.Join(r.std, " ")
	}
	if folders, ok := closed[pkg]; ok && !anyWithin(folders, folder) {
		return "only for " + strings.Join(folders, " ")
	}
	return ""
}

// TestImports reads the imports of every Go file. It parses them itself: the
// answer of "go list" would not be among what the test's cached result depends on.
func TestImports(t *testing.T) {
	root := ".."
	files, used := 0, map[string]bool{}
	err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && name != root && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata" || e.Name() == "vendor") {
			return filepath.SkipDir
		}
		if e.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		files++
		rel := filepath.ToSlash(strings.TrimPrefix(name, root+string(filepath.Separator)))
		used[path.Dir(rel)] = true
		for _, imp := range f.Imports {
			pkg, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			if v := violation(rel, pkg); v != "" {
				t.Errorf("%s imports %s: %s", rel, pkg, v)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 || !used["privcheck"] || !used["manager"] || !used["cgfs"] || !used["api"] {
		t.Errorf("only %d files found: %v", files, used)
	}
}

// TestImportRules makes sure that the rules refuse what they are for.
func TestImportRules(t *testing.T) {
	for _, tc := range []struct {
		file, pkg string
		ok        bool
	}{
		{"privcheck/a.go", "strings", true},
		{"privcheck/a.go", "fmt", false},
		{"privcheck/a.go", "os", false},
		{"privcheck/a.go", "unsafe", false},
		{"privcheck/a.go", "C", false},
		{"privcheck/a.go", "golang.org/x/sys/unix", false},
		{"privcheck/a.go", "cgmanager/cgfs", false},
		{"privcheck/a.go", "cgmanager/privcheck/matrix", false},
		{"privcheck/a_test.go", "os", true},
		{"privcheck/a_test.go", "cgmanager/privcheck/matrix", true},
		{"privcheck/a_test.go", "cgmanager/manager", false},
		{"privcheck/matrix/a.go", "cgmanager/privcheck", true},
		{"privcheck/matrix/a.go", "os", false},
		{"privcheck/other/a.go", "strings", false},
		{"cgfs/a.go", "os", true},
		{"cgfs/a.go", "cgmanager/privcheck", false},
		{"cgfs/a.go", "github.com/godbus/dbus/v5", false},
		{"cgfs/a_test.go", "cgmanager/manager", false},
		{"cgfs/a_test.go", "cgmanager/cgfs/cgtest", true},
		{"cgfs/a.go", "cgmanager/cgfs/cgtest", false},
		{"cgfs/a.go", "os/exec", false},
		{"cgfs/cgtest/a.go", "os/exec", true},
		{"cgfs/cgtest/a.go", "cgmanager/cgfs", true},
		{"cgfs/a_test.go", "cgmanager/cgfs", true},
		{"api/a.go", "cgmanager/api/wire", false},
		{"api/server/a.go", "cgmanager/api/wire", true},
		{"api/server/a.go", "cgmanager/manager", false},
		{"api/server/a.go", "cgmanager/privcheck", false},
		{"api/wire/a.go", "cgmanager/api", true},
		{"api/wire/a.go", "cgmanager/api/server", false},
		{"api/client/a.go", "cgmanager/cgfs", false},
		{"manager/a.go", "cgmanager/privcheck", true},
		{"manager/a.go", "cgmanager/manager/identity", true},
		{"manager/a.go", "cgmanager/api/wire", false},
		{"manager/a.go", "cgmanager/api/server", false},
		{"manager/a.go", "github.com/godbus/dbus/v5", false},
		{"manager/a.go", "os/exec", false},
		{"manager/a_test.go", "os/exec", true},
		{"manager/a_test.go", "cgmanager/test/harness", true},
		{"manager/identity/a.go", "cgmanager/cgfs", true},
		{"manager/identity/a.go", "cgmanager/manager", false},
		{"manager/identity/a.go", "cgmanager/api/wire", false},
		{"proxy/a.go", "cgmanager/api/client", true},
		{"proxy/a.go", "cgmanager/cgfs", false},
		{"proxy/a.go", "cgmanager/manager", false},
		{"proxy/a.go", "cgmanager/privcheck", false},
		{"cmd/cgm/a.go", "cgmanager/api/client", true},
		{"cmd/cgm/a.go", "os/exec", true},
		{"cmd/cgm/a.go", "cgmanager/test/harness", false},
		{"cmd/cgm/a.go", "cgmanager/privcheck/matrix", false},
		{"test/harness/a.go", "cgmanager/manager", true},
		{"util/a.go", "strings", false},
		{"a.go", "strings", false},
	} {
		if v := violation(tc.file, tc.pkg); (v == "") != tc.ok {
			t.Errorf("%s imports %s: %q, want allowed %v", tc.file, tc.pkg, fmt.Sprint(v), tc.ok)
		}
	}
}
