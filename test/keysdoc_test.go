package test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"cgmanager/privcheck"
)

var updateKeys = flag.Bool("update-keys", false, "write the list of files in docs/KEYS.md anew")

const keysDoc = "../docs/KEYS.md"

// section returns what stands between the two comments of a generated part of
// docs/KEYS.md, and what stands around it.
func section(t *testing.T, name string) (head, body, tail string) {
	t.Helper()
	doc, err := os.ReadFile(keysDoc)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+name+": begin -->\n", "<!-- "+name+": end -->\n"
	head, rest, ok := strings.Cut(string(doc), begin)
	body, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks %q or %q", keysDoc, begin, end)
	}
	return head + begin, body, end + tail
}

// TestKeysDocFiles keeps the list of files in docs/KEYS.md what the table of
// privcheck says.
func TestKeysDocFiles(t *testing.T) {
	head, body, tail := section(t, "files")
	var b strings.Builder
	for _, class := range []struct {
		class privcheck.KeyClass
		title string
	}{
		{privcheck.Delegable, "By whoever has write privilege over the file:"},
		{privcheck.HostRootOnly, "By host root alone:"},
	} {
		fmt.Fprintf(&b, "\n%s\n\n", class.title)
		for _, k := range privcheck.KeyPatterns() {
			if k.Class == class.class {
				fmt.Fprintf(&b, "* `%s`\n", k.Pattern)
			}
		}
	}
	b.WriteString("\n")
	if body == b.String() {
		return
	}
	if !*updateKeys {
		t.Fatalf("%s is not what the code says; go test ./test -run TestKeysDocFiles -update-keys", keysDoc)
	}
	if err := os.WriteFile(keysDoc, []byte(head+b.String()+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestKeysCanBeSet: no key writes a file that nobody may write. The first file
// of a cell is the one that is written.
func TestKeysCanBeSet(t *testing.T) {
	_, body, _ := section(t, "tables")
	n := 0
	for line := range strings.Lines(body) {
		cells := strings.Split(strings.Trim(line, "|\n"), "|")
		if len(cells) != 5 {
			continue
		}
		files := cells[2:4] // key, value, v1, v2, documented in
		if v := strings.TrimSpace(cells[0]); v == "v1" || v == "v2" {
			files = cells[2:3] // file of, name, on the other, conversion, source
		}
		for _, cell := range files {
			_, file, _ := strings.Cut(cell, "`")
			file, rest, ok := strings.Cut(file, "`")
			if !ok || strings.Contains(rest, "(read only)") {
				continue
			}
			file, _, _ = strings.Cut(file, " ")
			if file = strings.ReplaceAll(file, "SIZE", "2MB"); privcheck.ClassOf(file) == privcheck.NeverWritten {
				t.Errorf("%s: in %s", file, line)
			}
			n++
		}
	}
	if n < 30 {
		t.Errorf("found %d files only", n)
	}
}
