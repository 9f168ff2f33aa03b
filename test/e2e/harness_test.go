package e2e_test

import (
	"fmt"
	"testing"

	"cgmanager/test/harness"
)

// The harness itself: what a container looks like, from inside and from the
// host. Every other test relies on it.
func TestKernelHarness(t *testing.T) {
	harness.Require(t, "root", "userns", "v1", "v2")
	w := &world{T: t, Tree: harness.NewTree(t)}
	b := w.box("c1")
	cg := "c1"
	for level, first := range []uint32{100000, 110000, 115000} {
		t.Run(fmt.Sprint("level ", level+1), func(t *testing.T) {
			if b.HostUID != first || b.HostGID != first {
				t.Errorf("root is %d:%d on the host, want %d", b.HostUID, b.HostGID, first)
			}
			if b.PID != 1 || b.UID != 0 || b.GID != 0 {
				t.Errorf("root sees itself as %+v", b.Cred)
			}
			if got := w.in(b.Proc); got != cg {
				t.Errorf("it is in %s, want %s", got, cg)
			}
			u := b.user(1000)
			if u.HostUID != first+1000 || u.UID != 1000 {
				t.Errorf("user 1000 is %d on the host and %d inside", u.HostUID, u.UID)
			}
			if got := w.in(u); got != cg {
				t.Errorf("its child is in %s, want %s", got, cg)
			}
			out, code := b.Exec(nil, "sh", "-c", "echo $$; cat /proc/self/uid_map")
			t.Logf("%d: %s", code, out)
		})
		if level < 2 {
			b = b.box(fmt.Sprint("c", level+2))
			cg = b.cg
		}
	}
	before := w.Snapshot()
	if d := before.Diff(w.Snapshot()); len(d) > 0 {
		t.Errorf("two snapshots differ: %v", d)
	}
	h := harness.Find(t, "memory")
	w.Write(h, "c1", "memory.limit_in_bytes", "123M")
	if d := before.Diff(w.Snapshot()); len(d) != 1 {
		t.Errorf("a changed limit shows as %v", d)
	}
}
