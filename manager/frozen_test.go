package manager_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// Kill has to thaw what somebody else froze, or its tasks would not die; in the
// end it is frozen again, also where Kill gives up because it does not get
// empty.
func TestKernelKillLeavesFrozen(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	dir := filepath.Join(cgtest.Own(t, "freezer"), n)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, cgtest.Child(t), dir)
	state, freeze := freezer(t)
	write(t, filepath.Join(dir, state), freeze)
	second := strconv.Itoa(cgtest.Child(t))
	entered := make(chan error, 1)
	go func() {
		for range 5000 {
			if !frozen(dir) {
				entered <- os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(second), 0)
				return
			}
			time.Sleep(50 * time.Microsecond)
		}
		entered <- nil
	}()
	err := m.Kill(rq, n)
	if err != nil && kind(err) != api.Busy {
		t.Errorf("Kill: %v", err)
	}
	if err := <-entered; err != nil {
		t.Fatal(err)
	}
	if !frozen(dir) {
		t.Errorf("the cgroup that somebody froze is not frozen (Kill: %v)", err)
	}
}
