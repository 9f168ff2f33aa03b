package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// domain are controllers of v2 that no cgroup with tasks can give to its
// children, and values for them. Where v1 has memory and pids there are others.
func domain(t *testing.T, h harness.Hierarchy) (controllers []string, values map[string]string) {
	t.Helper()
	has := h.Controllers()
	if slices.Contains(has, "memory") && slices.Contains(has, "pids") {
		return []string{"memory", "pids"}, map[string]string{"memory.limit": "32M", "pids.limit": "10"}
	}
	for _, c := range []string{"hugetlb", "misc", "rdma"} {
		if slices.Contains(has, c) {
			return []string{c}, map[string]string{}
		}
	}
	if len(has) == 0 { // beside systemd v1 has them all
		t.Skip("needs v2: it has no controller here")
	}
	t.Fatalf("v2 has no domain controller, only %q", has)
	return nil, nil
}

// rawCgroup is where the kernel says that a process is on v2.
func rawCgroup(t testing.TB, pid int) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if cg, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(cg, "\n")
		}
	}
	t.Fatalf("%d is in no cgroup of v2", pid)
	return ""
}

// A container whose first process sits in the cgroup that must be divided asks
// for two children with limits, and gets them; also while a process sits there
// that nobody inside could move, or see.
func TestKernelNestedDivide(t *testing.T) {
	harness.Require(t, "v2")
	for _, nsenter := range []bool{false, true} {
		t.Run(fmt.Sprintf("nsenter=%v", nsenter), func(t *testing.T) {
			w := newWorld(t)
			h := harness.Find(t, "unified")
			ctrls, values := domain(t, h)
			enableAbove(t, w, h, ctrls)
			b := w.box("c1")
			in := b.Spawn(harness.Spec{CgroupNS: true})
			procs := []*harness.Proc{b.Proc, in}
			hidden := uint32(0)
			if nsenter {
				procs = append(procs, w.host(1000, "c1"))
				hidden = 1
			}
			c := asker{t, in.MustDial(w.d.Sock)}
			defer c.c.Close()

			for _, name := range []string{"a", "b"} {
				want(t, "Create "+name, c.v1("Create", name, ctrls, values), []any{true})
			}
			for _, name := range []string{"a", "b"} {
				if len(values) > 0 {
					want(t, "memory.max of "+name, w.Read(h, "c1/"+name, "memory.max"), "33554432")
					want(t, "pids.max of "+name, w.Read(h, "c1/"+name, "pids.max"), "10")
				}
				for _, ctrl := range ctrls {
					if got := w.Read(h, "c1/"+name, "cgroup.controllers"); !slices.Contains(strings.Fields(got), ctrl) {
						t.Errorf("%s has %q, not %s", name, got, ctrl)
					}
				}
			}
			// What there was is all in one hidden place, and nothing tells of it.
			leaf := w.Path("c1/.cgmanager-leaf")
			for _, p := range procs {
				want(t, "the kernel's place of a process", rawCgroup(t, p.HostPID), leaf)
			}
			if left, err := os.ReadFile(filepath.Join(w.Dir(h, "c1"), "cgroup.procs")); err != nil || len(left) > 0 {
				t.Errorf("left behind: %q, %v", left, err)
			}
			want(t, "ListChildren", c.v1("ListChildren", ""), []any{[]string{"a", "b"}})
			inside := []uint32{uint32(b.PID), uint32(in.PID)}
			slices.Sort(inside)
			want(t, "ListTasks", c.v1("ListTasks", ""), []any{inside, hidden})
			want(t, "GetPidCgroup", c.v0("GetPidCgroup", ctrls[0], in.PID), []any{"/"})
			for _, name := range []string{".cgmanager-leaf", "a/.cgmanager-leaf/x"} {
				if _, err := c.c.V1("Create", name, ctrls, map[string]string{}); err == nil {
					t.Errorf("Create %q was not refused", name)
				}
			}
			if _, err := c.c.V1("ListTasks", ".cgmanager-leaf"); err == nil {
				t.Error("the leaf can be named")
			}

			// Down, up again, down, and away.
			child := b.Spawn(harness.Spec{})
			for _, move := range []struct{ to, is string }{{"a", "c1/a"}, {"", "c1/.cgmanager-leaf"}, {"b", "c1/b"}} {
				c.v1("Move", move.to, uint32(child.PID))
				want(t, "the place after Move "+strconv.Quote(move.to), rawCgroup(t, child.HostPID), w.Path(move.is))
			}
			want(t, "GetPidCgroup of the child", c.v0("GetPidCgroup", ctrls[0], child.PID), []any{"b"})
			if _, err := c.c.V1("Delete", "b"); err == nil {
				t.Error("b was removed with a task in it")
			}
			c.v1("DeleteForce", "b")
			want(t, "the place after DeleteForce", rawCgroup(t, child.HostPID), leaf)
			c.v1("Delete", "a")
			want(t, "ListChildren", c.v1("ListChildren", ""), []any{[]string{}})
			for _, p := range procs {
				if !p.Alive() {
					t.Errorf("a process was lost")
				}
			}
		})
	}
}

// enableAbove gives the tree's cgroups what the host's administrator would.
func enableAbove(t *testing.T, w *world, h harness.Hierarchy, ctrls []string) {
	t.Helper()
	for _, dir := range []string{h.Mount, w.Dir(h, "")} {
		f, err := os.OpenFile(filepath.Join(dir, "cgroup.subtree_control"), os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString("+" + strings.Join(ctrls, " +"))
			_ = f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// A container cannot reach through the hidden leaf what it could not before: a
// process of the host that is put there is neither frozen, nor limited, nor
// killed, nor moved by root inside, who has the cgroup file system as well.
func TestKernelLeafGivesNothing(t *testing.T) {
	harness.Require(t, "v2")
	w := newWorld(t)
	h := harness.Find(t, "unified")
	ctrls, _ := domain(t, h)
	enableAbove(t, w, h, ctrls)
	b := w.box("c1")
	outer := w.host(1000, "c1")
	w.watch = append(w.watch, outer)
	c := asker{t, b.MustDial(w.d.Sock)}
	defer c.c.Close()
	c.v1("Create", "a", ctrls, map[string]string{})
	leaf := w.Dir(h, "c1/.cgmanager-leaf")
	for _, file := range []string{"cgroup.freeze", "cgroup.kill", "cgroup.max.depth"} {
		var st, above unix.Stat_t
		if unix.Lstat(filepath.Join(w.Dir(h, "c1"), file), &above) != nil {
			continue // cgroup.kill is of 5.14
		}
		if err := unix.Lstat(filepath.Join(leaf, file), &st); err != nil || st.Uid != above.Uid || st.Gid != above.Gid {
			t.Errorf("%s of the leaf is %d:%d's, of the cgroup %d:%d's, %v", file, st.Uid, st.Gid, above.Uid, above.Gid, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat(leaf, &st); err != nil || st.Uid != 0 || st.Mode&0o022 != 0 {
		t.Errorf("the leaf is %d's with mode %o, %v", st.Uid, st.Mode, err)
	}
	w.refused("Move of the outer process", func() error { return second(c.c.V1("Move", "a", uint32(outer.PID))) })
	w.refused("Kill", func() error { return second(c.c.V1("Kill", "")) })
	w.refused("SetValue state", func() error {
		return second(c.c.V1("SetValue", "", map[string]string{"state": "frozen"}))
	})
	w.refused("SetValue in the leaf", func() error {
		return second(c.c.V1("SetValue", ".cgmanager-leaf", map[string]string{"state": "frozen"}))
	})
}
