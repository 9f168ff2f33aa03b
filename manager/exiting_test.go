package manager_test

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// A process whose first thread has exited is not in the root of every v1
// hierarchy, though the kernel says so, and has not ended: it stays confined to where it is, and
// who moves it does not move it "down" from there.
func TestKernelFirstThreadExited(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	mount := cgtest.Own(t, "freezer")
	n := "/" + name(t)
	const uid = 61000
	for _, d := range []string{n, n + "/own", n + "/jail"} {
		if err := os.Mkdir(mount+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	state, _ := freezer(t)
	for _, f := range []string{n, n + "/" + state} {
		if err := os.Chown(mount+f, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	give(t, mount+n+"/own", uid)

	rq := requestOf(t, m, cgtest.Headless(t, mount+n+"/own"), uid)
	if err := m.SetValue0(rq, "freezer", n, "freezer.state", "FROZEN"); kind(err) != api.Denied {
		t.Errorf("a value above its own cgroup: %v, want a refusal", err)
	}
	if frozen(mount + n) {
		t.Error("the cgroup above is frozen")
	}

	// What is left of such a process is moved and judged like any other.
	rq = requestOf(t, m, os.Getpid(), uid)
	root := self(t, m)
	victim := int32(cgtest.Headless(t, mount+n+"/jail"))
	if err := m.MovePid0(root, "freezer", strings.TrimPrefix(n, "/")+"/own", api.Victim{PID: int64(victim)}); err != nil {
		t.Errorf("the host's root moves it: %v", err)
	}
	// On v2 the exited first thread stays behind, and the lists of processes with
	// it (cgroup_migrate_add_task).
	for _, tid := range threads(t, victim) {
		if b := read(t, fmt.Sprintf("/proc/%d/task/%d/cgroup", victim, tid)); !strings.Contains(b, n+"/own") {
			t.Errorf("thread %d of it is not in the destination:\n%s", tid, b)
		}
	}
	if err := m.MovePid0(rq, "freezer", strings.TrimPrefix(n, "/")+"/jail", api.Victim{PID: int64(victim)}); kind(err) != api.Denied {
		t.Errorf("another's process: %v, want a refusal", err)
	}
}

// On v2 the kernel goes on to say of a first thread that has exited where it was
// then, and does not list its process where that is moved later. It is confined to
// nothing that could be told, so it has no rights; and it is killed all the same.
func TestKernelFirstThreadExitedThenMoved(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V2)
	m := newManager(t)
	mount := cgtest.Own(t, "unified")
	n := "/" + name(t)
	const uid = 61000
	for _, d := range []string{n, n + "/own", n + "/own/jail"} {
		if err := os.Mkdir(mount+d, 0o755); err != nil {
			t.Fatal(err)
		}
		give(t, mount+d, uid)
	}
	pid := cgtest.Headless(t, mount+n+"/own")
	put(t, pid, mount+n+"/own/jail")
	rq := requestOf(t, m, pid, uid)
	if names, err := m.ListChildren(rq, ""); kind(err) != api.Denied {
		t.Errorf("it sees the cgroup that it was taken out of: %q, %v", names, err)
	}
	if _, err := m.Create(rq, "x", []string{"freezer"}, nil); kind(err) != api.Denied {
		t.Errorf("it makes a cgroup: %v", err)
	}
	if err := m.Kill(self(t, m), strings.TrimPrefix(n, "/")+"/own/jail"); err != nil {
		t.Errorf("Kill: %v", err)
	}
	cgtest.Eventually(t, 5*time.Second, "it dies", func() bool {
		return strings.Contains(read(t, mount+n+"/own/jail/cgroup.events"), "populated 0")
	})
}

// Threads that come and go all the time are not seen at rest at the first look,
// and no reason to tell who kills the process that the kernel is busy.
func TestKernelKillRestless(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V2)
	m := newManager(t)
	mount := cgtest.Own(t, "unified")
	const program = `import threading
def restless():
    while True:
        t = threading.Thread(target=lambda: None); t.start(); t.join()
for i in range(8): threading.Thread(target=restless).start()
print(flush=True)`
	rq := self(t, m)
	for round := range 5 {
		n := "cgmtest-restless-" + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(round)
		if err := os.Mkdir(mount+"/"+n, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cgtest.Eventually(t, 2*time.Second, "its cgroup is empty", func() bool { return os.Remove(mount+"/"+n) == nil })
		})
		cmd := exec.Command("python3", "-c", program)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		put(t, start(t, cmd), mount+"/"+n)
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		if err := m.Kill(rq, n); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
}

// threads lists the threads of a process but the first.
func threads(t *testing.T, pid int32) []int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	var tids []int
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if int32(tid) != pid {
			tids = append(tids, tid)
		}
	}
	if len(tids) == 0 {
		t.Fatal("no thread is left")
	}
	return tids
}
