package cgfs

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables of docs/KEYS.md anew")

// TestKeysDoc keeps the tables of docs/KEYS.md what the code says. They stand
// between two comments; the rest of the file is written by hand.
func TestKeysDoc(t *testing.T) {
	const path, begin, end = "../docs/KEYS.md", "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(doc), begin)
	old, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks its comments %q and %q", path, begin, end)
	}
	want := keyTables()
	if old == want {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the code says; go test ./cgfs -run TestKeysDoc -update", path)
	}
	if err := os.WriteFile(path, []byte(head+begin+want+end+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}

func keyTables() string {
	var b strings.Builder
	b.WriteString("\n## Abstract keys\n\n| key | value | v1 | v2 | documented in |\n|---|---|---|---|---|\n")
	for _, k := range abstractKeys {
		name := "`" + k.Name + "`"
		if k.ReadOnly {
			name += " (read only)"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", name, k.doc, k.v1.cell(), k.v2.cell(), k.source)
	}
	b.WriteString("\n## Control files that are translated\n\n| file of | name | on the other | conversion | source |\n|---|---|---|---|---|\n")
	files := slices.Clone(fileKeys)
	for _, file := range []string{"limit_in_bytes", "usage_in_bytes", "max_usage_in_bytes", "failcnt", "rsvd.limit_in_bytes", "rsvd.usage_in_bytes", "max", "current", "events", "events.local", "rsvd.max", "rsvd.current"} {
		k, ok := FindKey("hugetlb.1KB." + file)
		if !ok {
			panic(file)
		}
		files = append(files, k)
	}
	none := map[Version][]string{}
	for _, k := range files {
		other := map[Version]*binding{V1: k.v2, V2: k.v1}[k.file]
		name := "`" + strings.ReplaceAll(k.Name, "1KB", "SIZE") + "`"
		if other == nil {
			none[k.file] = append(none[k.file], name)
			continue
		}
		fmt.Fprintf(&b, "| v%d | %s | %s | %s | %s |\n", k.file, name, strings.ReplaceAll(other.cell(), "1KB", "SIZE"), k.doc, k.source)
	}
	for _, v := range []Version{V1, V2} {
		fmt.Fprintf(&b, "\nOf these files of v%d the other version has no equivalent, and says so: %s.\n", v, strings.Join(none[v], ", "))
	}
	b.WriteString("\n")
	return b.String()
}

func (b *binding) cell() string {
	switch {
	case b == nil:
		return "not supported"
	case b.files == "":
		return "nothing (read only)"
	}
	s := "`" + strings.ReplaceAll(b.files, ", ", "`, `") + "`"
	if b.set == nil {
		s += " (read only)"
	}
	return s
}
