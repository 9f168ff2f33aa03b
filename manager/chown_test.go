package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// A container that was given the directory of its cgroup alone does not get
// the file of its tasks by asking for it.
func TestKernelChownOfFilesThatTheHostKept(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	m := newManager(t)
	pid, dir := container(t)
	rq := requestOf(t, m, pid, 100000)
	if err := m.Chown0(rq, "freezer", "", api.Owner{UID: 0, GID: 0}); kind(err) != api.Denied {
		t.Errorf("Chown: %v, want a refusal", err)
	}
	for _, f := range []string{"tasks", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
		st, err := os.Stat(filepath.Join(dir, f))
		if errors.Is(err, os.ErrNotExist) && f != "cgroup.procs" {
			continue // the other version's
		}
		if err != nil {
			t.Fatal(err)
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); !ok || sys.Uid != 0 {
			t.Errorf("%s belongs to %d now", f, sys.Uid)
		}
	}
	if _, err := m.Create0(rq, "freezer", "below"); err != nil {
		t.Fatal(err)
	}
	if err := m.Chown0(rq, "freezer", "below", api.Owner{UID: 0, GID: 0}); err != nil {
		t.Errorf("Chown of what it made: %v", err)
	}
}
