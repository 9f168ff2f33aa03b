package harness

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// RefusedAll is Refused for many attacks with one picture of the tree before
// and one after them all: a picture costs more than a request.
func (tr *Tree) RefusedAll(t testing.TB, attacks map[string]func() error) {
	t.Helper()
	before := tr.Snapshot()
	for _, what := range slices.Sorted(maps.Keys(attacks)) {
		err := attacks[what]()
		if err == nil {
			t.Errorf("%s: no error", what)
		} else if why := Unclean(err); why != "" {
			t.Errorf("%s: %s: %v", what, why, err)
		} else {
			t.Logf("%s: %v", what, err)
		}
	}
	if d := before.Diff(tr.Snapshot()); len(d) > 0 {
		t.Errorf("one of %d attacks changed\n  %s", len(attacks), strings.Join(d, "\n  "))
	}
}
