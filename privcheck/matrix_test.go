package privcheck_test

import (
	"flag"
	"os"
	"slices"
	"strings"
	"testing"

	"cgmanager/privcheck/matrix"
)

var update = flag.Bool("update", false, "write testdata/matrix.golden anew")

// TestMatrix compares the policy with the one that was reviewed.
func TestMatrix(t *testing.T) {
	const golden = "testdata/matrix.golden"
	var got []string
	for _, row := range matrix.Rows() {
		got = append(got, row.String())
	}
	if *update {
		if err := os.WriteFile(golden, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	shown := 0
	for _, line := range got {
		if !slices.Contains(want, line) && shown < 20 {
			t.Errorf("not in %s: %s", golden, line)
			shown++
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d rows, want %d", len(got), len(want))
	}
	if t.Failed() {
		t.Log("if the policy changed on purpose: go test ./privcheck -run TestMatrix -update")
	}
}

// TestMatrixRows checks that the matrix can fail: no row is there twice, each
// requestor and each method is refused somewhere, and allowed somewhere, except
// those that never are.
func TestMatrixRows(t *testing.T) {
	seen := map[string]bool{}
	allowed, refused := map[string]bool{}, map[string]bool{}
	for _, row := range matrix.Rows() {
		question, _, _ := strings.Cut(row.String(), " → ")
		if seen[question] {
			t.Errorf("twice: %s", question)
		}
		seen[question] = true
		method := strings.Fields(question)[2]
		for _, what := range []string{row.Requestor, row.Cgroup, method} {
			if row.Decision.Allowed() {
				allowed[what] = true
			} else {
				refused[what] = true
			}
		}
	}
	never := func(what string) bool {
		return strings.Contains(what, "SetValue") && strings.HasSuffix(what, "(tasks)")
	}
	for what := range refused {
		if allowed[what] == never(what) {
			t.Errorf("%s: allowed somewhere %v", what, allowed[what])
		}
	}
	for what := range allowed {
		if !refused[what] {
			t.Errorf("%s is never refused", what)
		}
	}
}
