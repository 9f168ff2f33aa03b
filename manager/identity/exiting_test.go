package identity_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
)

// The kernel says of a task that has begun to exit that its v1 cgroups are "/",
// wherever it was. A process lives on behind such a first thread, and whoever
// believed it would take it for one that nobody ever confined.
func TestKernelFirstThreadExited(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	set, err := cgfs.Open(cgfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	})
	h, _ := set.ByController("freezer")
	dir := filepath.Join(cgtest.Mount(t, "freezer"), cgtest.Name(t))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	task, err := identity.OpenTask(int32(cgtest.Headless(t, dir)))
	if err != nil {
		t.Fatal(err)
	}
	defer task.Close()
	cg, err := task.Cgroups()
	if err != nil {
		t.Fatal(err)
	}
	if at, _ := cg.Path(h); at != "/" || !cg.AtRoot() {
		t.Fatalf("this kernel says %q of its first thread: nothing to test", at)
	}
	if !task.Alive() || !task.LeaderExiting() {
		t.Errorf("alive %v, first thread exiting %v, want true of both", task.Alive(), task.LeaderExiting())
	}
	for _, hs := range [][]*cgfs.Hierarchy{nil, {h}} {
		ms, err := task.Members(hs...)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range ms {
			if at, _ := m.Cgroups.Path(h); m.TID == task.PID() || at != "/"+filepath.Base(dir) {
				t.Errorf("member %d of process %d in %q; want the threads that are left, in %q", m.TID, task.PID(), at, "/"+filepath.Base(dir))
			}
		}
	}
	me, err := identity.OpenTask(int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer me.Close()
	if me.LeaderExiting() {
		t.Error("the test itself is said to exit")
	}
	if err := unix.Kill(int(task.PID()), unix.SIGKILL); err != nil {
		t.Error(err)
	}
}
