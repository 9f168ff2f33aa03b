package cgfs

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// domainController is one of v2 that no cgroup with processes can give to its
// children, as nearly all are.
func domainController(t testing.TB, s *Set) string {
	t.Helper()
	h, ok := s.Unified()
	if !ok {
		t.Fatal("no v2")
	}
	for _, c := range []string{"memory", "io", "hugetlb", "rdma", "misc"} {
		if h.Has(c) {
			return c
		}
	}
	if len(h.Controllers()) == 0 { // beside systemd v1 has them all
		t.Skip("needs v2: it has no controller here")
	}
	t.Fatal("v2 has no domain controller")
	return ""
}

// divisible is a cgroup of v2 that may give a domain controller to its
// children.
func divisible(t testing.TB) (p place, controller string) {
	t.Helper()
	cgtest.Require(t, cgtest.Root, cgtest.V2)
	cgtest.NoLeaks(t)
	s := open(t, Options{})
	controller = domainController(t, s)
	root, err := find(t, s, "unified").Open("/")
	check(t, err)
	defer root.Close()
	check(t, root.Enable(controller))
	return newPlace(t, s, "unified"), controller
}

func enter(t testing.TB, p place, pid int) {
	t.Helper()
	p.write(t, "cgroup.procs", strconv.Itoa(pid))
}

// cgroupOf is where the kernel says that a process is on v2.
func cgroupOf(t testing.TB, pid int) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	check(t, err)
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSpace(path)
		}
	}
	t.Fatalf("%d is in no cgroup of v2", pid)
	return ""
}

func TestKernelLeafDivides(t *testing.T) {
	p, controller := divisible(t)
	pid := cgtest.Child(t)
	enter(t, p, pid)
	child := mkdir(t, p.dir, "child")
	check(t, p.dir.Enable(controller))

	if got, want := cgroupOf(t, pid), p.dir.Path()+"/"+leafName; got != want {
		t.Errorf("the process is in %s, want %s", got, want)
	}
	if got := p.dir.h.Visible(cgroupOf(t, pid)); got != p.dir.Path() {
		t.Errorf("it counts in %s, want %s", got, p.dir.Path())
	}
	if names, hidden, err := p.dir.Children(); err != nil || !slices.Equal(names, []string{"child"}) || hidden != 0 {
		t.Errorf("children %q, %d hidden, %v", names, hidden, err)
	}
	leaf, err := p.dir.Leaf()
	check(t, err)
	defer leaf.Close()
	if has, err := child.Available(); err != nil || !slices.Contains(has, controller) {
		t.Errorf("the child has %q, %v", has, err)
	}
	// Whoever enters from now on is put there as well.
	other := cgtest.Child(t)
	f, err := p.dir.File("cgroup.procs", ForWrite)
	check(t, err)
	defer f.Close()
	check(t, p.dir.Enter(f, int32(other)))
	pids, err := leaf.Procs()
	check(t, err)
	if !slices.Contains(pids, int32(pid)) || !slices.Contains(pids, int32(other)) {
		t.Errorf("in the leaf: %v, want %d and %d", pids, pid, other)
	}
}

// The leaf's files belong to the owners of the cgroup's: who may put tasks
// there and no more can neither freeze nor limit them. Its directory is root's.
func TestKernelLeafOwners(t *testing.T) {
	p, controller := divisible(t)
	check(t, p.dir.SetOwner(1000, 1001))
	for _, file := range p.dir.h.DelegationFiles() {
		f, err := p.dir.File(file, ForFacts)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		check(t, err)
		check(t, f.SetOwner(1000, 1001))
		check(t, f.Close())
	}
	child, err := p.dir.Mkdir("child", 2000, 2001)
	check(t, err)
	defer child.Close()
	enter(t, p, cgtest.Child(t))
	check(t, p.dir.Enable(controller))
	leaf, err := p.dir.Leaf()
	check(t, err)
	defer leaf.Close()
	if a, err := leaf.Attr(); err != nil || a.UID != 0 || a.GID != 0 {
		t.Errorf("the leaf is %d:%d's, %v", a.UID, a.GID, err)
	}
	for file, uid := range map[string]uint32{"cgroup.procs": 1000, "cgroup.threads": 1000, "cgroup.freeze": 0, "cgroup.max.depth": 0} {
		if a, err := leaf.FileAttr(file); err != nil || a.UID != uid {
			t.Errorf("%s of the leaf is %d's, want %d's, %v", file, a.UID, uid, err)
		}
	}
	// The controller came when the child was there already: its limits are as
	// much the child's owner's as the others are.
	files, err := child.Files()
	check(t, err)
	found := false
	for _, file := range files {
		if ControllerOf(file) != controller {
			continue
		}
		found = true
		if a, err := child.FileAttr(file); err != nil || a.UID != 2000 || a.GID != 2001 {
			t.Errorf("%s of the child is %d:%d's, %v", file, a.UID, a.GID, err)
		}
	}
	if !found {
		t.Errorf("the child has no file of %s: %q", controller, files)
	}
}

// A directory that has the leaf's name is not the leaf. Somebody else's is not
// taken for it either: who owns it could freeze who is put there.
func TestKernelLeafMark(t *testing.T) {
	p, controller := divisible(t)
	impostor, err := p.dir.Mkdir(leafName, 1000, 1000)
	check(t, err)
	defer impostor.Close()
	pid := cgtest.Child(t)
	enter(t, p, pid)
	wantErr(t, "divide", p.dir.Enable(controller), unix.EEXIST)
	if got := cgroupOf(t, pid); got != p.dir.Path() {
		t.Errorf("the process is in %s", got)
	}
	if names, _, err := p.dir.Children(); err != nil || !slices.Equal(names, []string{leafName}) {
		t.Errorf("children %q, %v", names, err)
	}
	if got := p.dir.h.Visible(p.dir.Path() + "/" + leafName); got != p.dir.Path()+"/"+leafName {
		t.Errorf("it counts in %s", got)
	}
	// Root's own that has no mark yet was left by one that crashed just then.
	check(t, p.dir.Rmdir(leafName))
	orphan := mkdir(t, p.dir, leafName)
	check(t, p.dir.Enable(controller))
	if ok, err := orphan.IsLeaf(); err != nil || !ok {
		t.Errorf("the orphan is not the leaf: %v", err)
	}
}

// The kernel gives pids to the children of a cgroup with processes, and lets no
// process into these children then. Nor into one that gives it, once there are.
func TestKernelLeafThreadedControllers(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Unified)
	cgtest.NoLeaks(t)
	s := open(t, Options{})
	root, err := find(t, s, "unified").Open("/")
	check(t, err)
	defer root.Close()
	check(t, root.Enable("pids"))
	p := newPlace(t, s, "unified")
	pid := cgtest.Child(t)
	enter(t, p, pid)
	// An exited first thread stays, and is no process. And the list of processes
	// does not have one that left it elsewhere.
	cgtest.Headless(t, p.path)
	enter(t, p, cgtest.Headless(t, newPlace(t, s, "unified").path))
	child := mkdir(t, p.dir, "child")
	check(t, p.dir.Enable("pids"))
	if got, want := cgroupOf(t, pid), p.dir.Path()+"/"+leafName; got != want {
		t.Errorf("the process is in %s, want %s", got, want)
	}
	move := func(d *Dir, want string) {
		t.Helper()
		f, err := d.File("cgroup.procs", ForWrite)
		check(t, err)
		defer f.Close()
		check(t, d.Enter(f, int32(pid)))
		if got := cgroupOf(t, pid); got != want {
			t.Errorf("the process is in %s, want %s", got, want)
		}
	}
	move(child, child.Path())
	// With nobody in a child the kernel would take it into the cgroup itself.
	move(p.dir, p.dir.Path()+"/"+leafName)
	f, err := root.File("cgroup.procs", ForWrite)
	check(t, err)
	defer f.Close()
	check(t, root.Enter(f, int32(pid)))
	move(p.dir, p.dir.Path()+"/"+leafName)
	move(child, child.Path())
}

// What the killer of a cgroup's memory does counts as the cgroup's, also when
// its tasks are in a hidden leaf.
func TestKernelLeafOOM(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Unified)
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	check(t, e.set("memory.limit", "16M"))
	h, _ := e.s.Unified()
	d := e.dirs[h]
	const hog = `import time
while ".cgmanager-leaf" not in open("/proc/self/cgroup").read():
    time.sleep(0.05)
all = bytearray(1 << 26)`
	pid := cgtest.Child(t, "python3", "-c", hog)
	check(t, d.write("cgroup.procs", strconv.Itoa(pid)))
	check(t, d.Enable("memory"))
	const want = "oom_kill_disable 0\nunder_oom 0\noom_kill 1"
	for end := time.Now().Add(cgtest.Patience(10 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
		got, err := e.get("memory.oom_control")
		check(t, err)
		if got == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("memory.oom_control: %q, want %q", got, want)
		}
	}
}

// forkers starts n processes in p that fork all the time, until the test ends,
// and returns their pids.
func forkers(t *testing.T, p place, n int) []int32 {
	t.Helper()
	const program = `import os, random, sys, time
first = os.getpid()
open(sys.argv[2] + "/cgroup.procs", "w").write("0")
for i in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        end = time.time() + 600
        while time.time() < end and os.getppid() == first:
            pid = os.fork()
            if pid == 0:
                time.sleep(random.uniform(0.05, 0.35))
                os._exit(0)
            os.waitpid(pid, 0)
        os._exit(0)
    print(pid)
print("ready", flush=True)
time.sleep(600)`
	cmd := exec.Command("python3", "-c", program, strconv.Itoa(n), p.path)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	t.Cleanup(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		_ = cmd.Wait()
	})
	pids := []int32{int32(cmd.Process.Pid)}
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "ready"; {
		pid, err := strconv.Atoi(lines.Text())
		check(t, err)
		pids = append(pids, int32(pid))
	}
	if len(pids) != n+1 {
		t.Fatalf("%d of %d processes", len(pids)-1, n)
	}
	return pids
}

// 200 processes fork while their cgroup is divided: none is left behind, none
// is lost.
func TestKernelLeafForks(t *testing.T) {
	p, controller := divisible(t)
	processes, rounds := 200, 500
	if testing.Short() { // an emulated machine takes minutes for as many
		processes, rounds = 40, 10
	}
	pids := forkers(t, p, processes)
	cgtest.Eventually(t, 5*time.Second, "somebody forks", func() bool {
		return len(strings.Fields(p.read(t, "cgroup.procs"))) > len(pids)
	})
	began, most := time.Now(), 0
	for round := range rounds {
		check(t, p.dir.Enable(controller))
		if left := p.read(t, "cgroup.procs"); left != "" {
			t.Fatalf("round %d: left behind: %q", round, left)
		}
		leaf, err := p.dir.Leaf()
		check(t, err)
		in, err := leaf.Procs()
		check(t, err)
		most = max(most, len(in))
		for _, pid := range pids {
			if !slices.Contains(in, pid) {
				t.Fatalf("round %d: %d is lost: %s", round, pid, cgroupOf(t, int(pid)))
			}
		}
		// Back, for the next round; frozen, because moves wait for forks.
		check(t, p.dir.Freeze(t.Context()))
		p.write(t, "cgroup.subtree_control", "-"+controller)
		for end := time.Now().Add(cgtest.Patience(30 * time.Second)); len(in) > 0 && time.Now().Before(end); {
			for _, pid := range in {
				_ = os.WriteFile(filepath.Join(p.path, "cgroup.procs"), []byte(strconv.Itoa(int(pid))), 0)
			}
			in, err = leaf.Procs()
			check(t, err)
		}
		p.write(t, "cgroup.freeze", "0")
		check(t, leaf.Close())
		check(t, p.dir.Rmdir(leafName))
	}
	if most <= len(pids) {
		t.Errorf("nobody forked: at most %d processes", most)
	}
	t.Logf("%d rounds in %v, up to %d processes", rounds, time.Since(began).Round(time.Millisecond), most)
}

// Where a cgroup is frozen for the moment in which it is divided, whoever freezes
// it in that moment has it frozen, though it was already; and whoever thaws it has
// it thawed. Else a container that divides its own cgroup would undo its pause.
func TestKernelDivideLeavesAFreeze(t *testing.T) {
	for _, write := range []string{"1", "0", ""} {
		t.Run("write="+write, func(t *testing.T) {
			p, controller := divisible(t)
			mkdir(t, p.dir, "child")
			rounds := 0
			check(t, p.dir.divide(func() error {
				if rounds++; rounds == 1 {
					enter(t, p, cgtest.Child(t)) // one that forked
				} else {
					if got := p.read(t, "cgroup.freeze"); got != "1" {
						t.Errorf("cgroup.freeze is %s in round %d", got, rounds)
					}
					if write != "" {
						p.write(t, "cgroup.freeze", write)
					}
				}
				return p.dir.write("cgroup.subtree_control", "+"+controller)
			}))
			want := "0"
			if write == "1" {
				want = "1"
			}
			if got := p.read(t, "cgroup.freeze"); got != want || rounds != 2 {
				t.Errorf("cgroup.freeze is %s after %d rounds, want %s", got, rounds, want)
			}
			p.write(t, "cgroup.freeze", "0")
		})
	}
}
