package e2e_test

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// The harness itself: what a container looks like, from inside and from the
// host. Every other test relies on it.
func TestKernelHarness(t *testing.T) {
	harness.Require(t, "root", "userns")
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

// The forgeries that the impostor tests rely on reach whoever listens: the
// kernel lets container root name a host process that entered its pid
// namespace, and hands a number out a second time when it is told to.
func TestKernelHarnessForgery(t *testing.T) {
	harness.Require(t, "root", "userns", "cc")
	w := &world{T: t, Tree: harness.NewTree(t)}
	b := w.box("c1")
	h := harness.StartInPIDNSOf(t, b.Proc, harness.Spec{})
	want(t, "its pid namespaces", len(h.NSpid()), 2)
	want(t, "its uid", h.HostUID, uint32(0))
	root := w.host(0, ".")
	ours, theirs := root.Socketpair(unix.SOCK_DGRAM)
	root.PassCred(ours)
	fd := root.Give(theirs, b.Proc)
	if err := b.Send(fd, []byte("x"), &harness.Cred{PID: h.NSpid()[1]}); err != nil {
		t.Fatal(err)
	}
	d, err := root.Recv(ours, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	want(t, "the credential", *d.Cred, harness.Cred{PID: int32(h.HostPID), UID: b.HostUID, GID: b.HostGID})

	victim := harness.Program(t, "testdata/victim.c", 0o755)
	suid := harness.Program(t, "testdata/suid.c", 0o4755)
	p := w.placed(harness.Start(t, harness.Spec{PIDNS: true}), "c2")
	v := p.Launch(&harness.Cred{UID: 1000, GID: 1000}, victim, "pause")
	var pid int
	for range 100 { // on a slow machine it does not die at once
		if err := p.Run(reusePID, reuse{v.PID, 0, victim}, &pid); err != nil {
			t.Fatal(err)
		}
		if pid != 0 {
			break
		}
	}
	want(t, "the stranger's number", pid, v.PID)
	if hostPID(t, p, pid) == 0 {
		t.Error("the stranger is not found on the host")
	}
	var alive bool
	if err := p.Run(endStranger, struct{ Victim, PID int }{v.PID, pid}, &alive); err != nil || !alive {
		t.Errorf("the stranger's end: %v, %v", alive, err)
	}
	v.In.Close()
	v.Out.Close()

	u := w.host(1000, "c2")
	s := u.Launch(nil, victim, "exec", suid)
	if _, err := s.In.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	want(t, "where the setuid program is", record(t, s), u.Cgroups())
	if ws, err := s.End(cgtest.Patience(10 * time.Second)); err != nil || ws.ExitStatus() != 0 {
		t.Errorf("the setuid program's end: %v, %v", ws, err)
	}
}
