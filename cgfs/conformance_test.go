package cgfs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// TestKernelConformance is the same on every layout of cgroups: what a caller
// of this package does, and what comes of it.
func TestKernelConformance(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	t.Run("tree", func(t *testing.T) {
		cgtest.NoLeaks(t)
		e := newEverywhere(t)
		for h, d := range e.dirs {
			t.Run(h.Name(), func(t *testing.T) { conformTree(t, h, d) })
		}
	})
	t.Run("keys", conformKeys)
	t.Run("pids.limit", conformPids)
	t.Run("memory.limit", conformMemory)
	t.Run("cpus_allowed", conformCpus)
	t.Run("cpus_number", conformQuota)
	t.Run("state", conformState)
}

// conformTree makes, owns, lists, fills, walks and removes cgroups below top.
func conformTree(t *testing.T, h *Hierarchy, top *Dir) {
	const uid, gid = 1000, 1001
	a, err := top.Mkdir("a", uid, gid)
	check(t, err)
	defer a.Close()
	b, err := a.Mkdir("b", uid, gid)
	check(t, err)
	defer b.Close()
	for _, file := range h.DelegationFiles() {
		at, err := b.FileAttr(file)
		if errors.Is(err, fs.ErrNotExist) && h.Version() == V2 {
			continue // of a controller that is not enabled
		}
		if err != nil || at.UID != uid || at.GID != gid {
			t.Errorf("%s belongs to %d:%d, %v", file, at.UID, at.GID, err)
		}
	}
	if names, hidden, err := top.Children(); err != nil || hidden != 0 || !slices.Equal(names, []string{"a"}) {
		t.Errorf("children: %q, %d hidden, %v", names, hidden, err)
	}
	again, err := h.Open(b.Path())
	check(t, err)
	defer again.Close()

	pid := int32(cgtest.Child(t))
	check(t, again.write(h.TasksFile(), strconv.Itoa(int(pid))))
	for what, list := range map[string]func() ([]int32, error){"procs": b.Procs, "threads": b.Threads} {
		if pids, err := list(); err != nil || !slices.Equal(pids, []int32{pid}) {
			t.Errorf("%s: %d, %v; want %d", what, pids, err, pid)
		}
	}
	self, err := os.ReadFile("/proc/" + strconv.Itoa(int(pid)) + "/cgroup")
	check(t, err)
	if path, ok := ProcCgroup(self).Path(h); !ok || path != b.Path() {
		t.Errorf("the task says %q, %v; want %q", path, ok, b.Path())
	}
	if populated, err := a.Populated(); err != nil || !populated {
		t.Errorf("populated: %v, %v", populated, err)
	}
	if a.CanFreeze() {
		ctx, cancel := context.WithTimeout(t.Context(), cgtest.Patience(10*time.Second))
		defer cancel()
		check(t, a.Freeze(ctx))
		if frozen, err := a.Frozen(); err != nil || !frozen {
			t.Errorf("frozen: %v, %v", frozen, err)
		}
		check(t, a.Thaw())
	} else {
		wantErr(t, "freeze", a.Freeze(t.Context()), ErrUnsupported)
	}
	wantErr(t, "remove with a task", top.RemoveTree("a", nil), unix.EBUSY)
	root, err := h.Open("/")
	check(t, err)
	defer root.Close()
	check(t, root.write(h.TasksFile(), strconv.Itoa(int(pid))))
	var seen []string
	check(t, top.RemoveTree("a", func(d *Dir) error {
		seen = append(seen, strings.TrimPrefix(d.Path(), top.Path()))
		return nil
	}))
	if !slices.Equal(seen, []string{"/a/b", "/a"}) {
		t.Errorf("removed %q", seen)
	}
	if names, _, err := top.Children(); err != nil || len(names) != 0 {
		t.Errorf("left: %q, %v", names, err)
	}
}

// conformKeys: a key that this host's layout has takes a value and shows it; of
// any other the error says on which host it would work.
func conformKeys(t *testing.T) {
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	for _, row := range []struct{ key, value, want, needs string }{
		{"memory.limit", "64M", "67108864", ""},
		{"memory.soft_limit", "32M", "33554432", ""},
		{"swap.limit", "16M", "16777216", ""},
		{"swap.soft_limit", "8M", "8388608", "the controller memory on cgroup v2"},
		{"cpus_allowed", "0", "0", ""},
		{"cpus_fraction", "50", "50", ""},
		{"cpus_number", "0.25", "0.25", ""},
		{"cpu_share_percent", "200", "200", ""},
		{"hugetlb_limit", "2MB=4M", "2MB=4194304", ""},
		{"pids.limit", "7", "7", ""},
		{"state", "frozen", "frozen", ""},
		{"state", "thawed", "thawed", ""},
		{"net_classid", "0x100001", "1048577", "the controller net_cls on cgroup v1"},
		{"net_prio_interface_map", "lo 5", "lo 5", "the controller net_prio on cgroup v1"},
		{"rt.runtime", "0", "0", "the controller cpu on cgroup v1"},
	} {
		k, ok := FindKey(row.key)
		if !ok {
			t.Errorf("no key %s", row.key)
			continue
		}
		err := e.set(row.key, row.value)
		if row.needs != "" && !e.has(row.needs) {
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "needs "+row.needs) {
				t.Errorf("set %s: got %v, want ErrUnsupported that says: needs %s", row.key, err, row.needs)
			}
			if _, err := k.Value(e.s, e.read); !errors.Is(err, ErrUnsupported) {
				t.Errorf("get %s: got %v, want ErrUnsupported", row.key, err)
			}
			continue
		}
		if kernelLacks(row.key, err) {
			continue
		}
		got, gerr := e.get(row.key)
		if strings.HasPrefix(row.key, "hugetlb") && strings.Contains(got, row.want) {
			got = row.want // the other sizes do not matter
		}
		if err != nil || gerr != nil || got != row.want {
			t.Errorf("%s set to %q (%v) reads %q, %v; want %q", row.key, row.value, err, got, gerr, row.want)
		}
	}
}

// has reports whether this host is as the words say that end the text of an
// ErrUnsupported: "the controller C on cgroup vN".
func (e everywhere) has(needs string) bool {
	c, on, _ := strings.Cut(strings.TrimPrefix(needs, "the controller "), " on cgroup v")
	h, ok := e.s.ByController(c)
	return ok && strconv.Itoa(int(h.Version())) == on
}

// run starts a shell script in the test's cgroup in every hierarchy, and
// returns its output and how it ended.
func (e everywhere) run(t *testing.T, script string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cgtest.Patience(30*time.Second))
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", "read go; "+script)
	in, err := cmd.StdinPipe()
	check(t, err)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	check(t, cmd.Start())
	for h, d := range e.dirs {
		if err := d.write(h.TasksFile(), strconv.Itoa(cmd.Process.Pid)); err != nil {
			t.Errorf("%s: %v", h.Name(), err)
		}
	}
	_, err = in.Write([]byte("go\n"))
	check(t, err)
	check(t, in.Close())
	err = cmd.Wait()
	return strings.TrimSpace(out.String()), err
}

func conformPids(t *testing.T) {
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	const fork = "/bin/true; echo $?"
	check(t, e.set("pids.limit", "2"))
	if out, err := e.run(t, fork); err != nil || out != "0" {
		t.Errorf("a fork within the limit: %q, %v", out, err)
	}
	check(t, e.set("pids.limit", "1"))
	if out, err := e.run(t, fork); err == nil && out == "0" {
		t.Errorf("a fork beyond the limit: %q, %v", out, err)
	}
}

func conformMemory(t *testing.T) {
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	const allocate = "exec dd if=/dev/zero of=/dev/null bs=64M count=1"
	if out, err := e.run(t, allocate); err != nil {
		t.Fatalf("without a limit: %q, %v", out, err)
	}
	check(t, e.set("memory.limit", "16M"))
	check(t, e.set("swap.limit", "0"))
	out, err := e.run(t, allocate)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("beyond the limit: %q, %v, want killed", out, err)
	}
	if v, err := e.get("memory.limit"); err != nil || v != "16777216" {
		t.Errorf("the limit is now %s, %v", v, err)
	}
}

func conformCpus(t *testing.T) {
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	check(t, e.set("cpus_allowed", "0"))
	out, err := e.run(t, "grep ^Cpus_allowed_list: /proc/self/status")
	if err != nil || strings.Join(strings.Fields(out), " ") != "Cpus_allowed_list: 0" {
		t.Errorf("a task says %q, %v", out, err)
	}
}

// conformQuota: a task that computes for two seconds gets the tenth of the time
// that it is allowed, and not much more.
func conformQuota(t *testing.T) {
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	check(t, e.set("cpus_number", "0.1"))
	var got, took float64
	// A machine that stood still may have charged that to the task, which gives it
	// back later.
	for end := time.Now().Add(cgtest.Patience(10 * time.Second)); got == 0 || got > 0.3*took; {
		start := time.Now()
		if start.After(end) {
			t.Errorf("%.2f s of %.2f s, want a tenth", got, took)
			break
		}
		out, err := e.run(t, "timeout 2 sh -c 'while :; do :; done'; times")
		check(t, err)
		took += time.Since(start).Seconds()
		// The second line is the user and system time of the children (times(1)).
		_, children, _ := strings.Cut(out, "\n")
		times := strings.Fields(children)
		if len(times) != 2 {
			t.Fatalf("times: %q", out)
		}
		for _, spent := range times {
			d, err := time.ParseDuration(spent)
			check(t, err)
			got += d.Seconds()
		}
	}
}

// conformState: what is frozen does nothing, and goes on when it is thawed.
func conformState(t *testing.T) {
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	pid := cgtest.Child(t, "sh", "-c", "while :; do :; done")
	for h, d := range e.dirs {
		check(t, d.write(h.TasksFile(), strconv.Itoa(pid)))
	}
	cpu := func() uint64 {
		t.Helper()
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/schedstat")
		check(t, err)
		n, err := strconv.ParseUint(strings.Fields(string(b))[0], 10, 64)
		check(t, err)
		return n
	}
	runs := func() bool {
		t.Helper()
		before := cpu()
		for range 50 {
			time.Sleep(10 * time.Millisecond)
			if cpu() != before {
				return true
			}
		}
		return false
	}
	check(t, e.set("state", "frozen"))
	cgtest.Eventually(t, 5*time.Second, "what is frozen stops", func() bool { return !runs() })
	check(t, e.set("state", "thawed"))
	cgtest.Eventually(t, 5*time.Second, "it runs, thawed", runs)
}
