package manager_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// A container that moves into cgroups of its own has no bound in each. What the
// daemon removes counts no more at once, with what was below; what others
// removed is noticed.
func TestKernelCgroupsPerContainerAreBounded(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	const limit = 8
	m := newBoundedManager(t, limit)
	pid, dir := container(t)
	rq := requestOf(t, m, pid, 100000)
	for _, n := range []string{"a", "b"} {
		if _, err := m.Create0(rq, "freezer", n); err != nil {
			t.Fatal(err)
		}
	}
	made := 2
	for _, n := range []string{"a", "b"} {
		put(t, pid, filepath.Join(dir, n))
		for i := range limit {
			if _, err := m.Create0(rq, "freezer", fmt.Sprint(i)); err == nil {
				made++
			} else if kind(err) != api.Limit {
				t.Fatal(err)
			}
		}
	}
	if made != limit {
		t.Errorf("%d cgroups were made, want %d", made, limit)
	}
	create := func(name string) error {
		_, err := m.Create0(rq, "freezer", name)
		return err
	}
	remove := func(name string) {
		t.Helper()
		if _, err := m.Remove0(rq, "freezer", name, true); err != nil {
			t.Fatal(err)
		}
	}
	put(t, pid, filepath.Join(dir, "a"))
	remove("0")
	if err := create("0"); err != nil {
		t.Errorf("after the daemon removed one: %v", err)
	}
	for i := range 3 {
		remove(fmt.Sprint(i))
	}
	put(t, pid, filepath.Join(dir, "b"))
	if err := create("n/below/and-below"); err != nil {
		t.Fatal(err)
	}
	if err := create("one"); kind(err) != api.Limit {
		t.Errorf("beyond the bound: %v", err)
	}
	remove("n")
	if err := create("n/below/and-below"); err != nil {
		t.Errorf("after the daemon removed three at once: %v", err)
	}
	if err := create("one"); kind(err) != api.Limit {
		t.Errorf("beyond the bound: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "b", "n", "below", "and-below")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // until it is looked for again
	if _, err := m.Create0(rq, "freezer", "again"); err != nil {
		t.Errorf("after one was removed: %v", err)
	}
}
