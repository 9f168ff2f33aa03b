package manager_test

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager"
)

// userIn starts a process of an unprivileged uid in a cgroup that belongs
// to it, and returns a request by that process.
func userIn(t *testing.T, m *manager.Manager, uid int, dir string) *api.Request {
	t.Helper()
	give(t, dir, uid)
	return requestor(t, m, uint32(uid), dir)
}

func TestKernelCgroupsPerOwnerAreBounded(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	const limit = 5
	m := newBoundedManager(t, limit)
	n := name(t)
	if _, err := m.Create(self(t, m), n, []string{"freezer"}, nil); err != nil {
		t.Fatal(err)
	}
	rq := userIn(t, m, 45001, filepath.Join(cgtest.Own(t, "freezer"), n))
	// Its own cgroup is its as well, and counts.
	for i := range limit - 1 {
		if _, err := m.Create(rq, fmt.Sprint(i), []string{"freezer"}, nil); err != nil {
			t.Fatalf("cgroup %d: %v", i, err)
		}
	}
	if _, err := m.Create(rq, "more", []string{"freezer"}, nil); kind(err) != api.Limit {
		t.Errorf("one more than allowed: %v", err)
	}
	if _, err := m.Create(self(t, m), n+"/root", []string{"freezer"}, nil); err != nil {
		t.Errorf("the host's root is bounded: %v", err)
	}
	if err := m.Delete(rq, "0"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // until it is counted again
	if _, err := m.Create(rq, "again", []string{"freezer"}, nil); err != nil {
		t.Errorf("after one was removed: %v", err)
	}
	if _, err := m.Create(rq, "a/b", []string{"freezer"}, nil); kind(err) != api.Limit {
		t.Errorf("two at once: %v", err)
	}
}

func TestKernelDepthIsBounded(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	n := name(t)
	deep := n
	for range manager.DefaultMaxDepth {
		deep += "/x"
	}
	_, err := m.Create(self(t, m), deep, []string{"pids"}, nil)
	if kind(err) != api.Limit {
		t.Errorf("too deep: %v", err)
	}
	if exists(filepath.Join(cgtest.Own(t, "pids"), n)) {
		t.Error("something was created")
	}
}
