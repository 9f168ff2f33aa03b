package manager_test

import (
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// contained starts a process with uid 100000 in a cgroup, in a user and pid
// namespace of its own if asked for.
func contained(t *testing.T, dir string, namespaces bool) api.Cred {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if namespaces {
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWPID
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = ids, ids
		cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
	} else {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 100000, Gid: 100000}
	}
	pid := start(t, cmd)
	put(t, pid, dir)
	return api.Cred{PID: int32(pid), UID: 100000, GID: 100000}
}

// A proxy around the container lets its root out as little as the daemon does: what
// the proxy sees and could move, the requestor's own processes among it.
func TestKernelEscapeNotByAProxyAround(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	m := newManager(t)
	proxy := self(t, m)
	n := name(t)
	if _, err := m.Create(proxy, n+"/jail", []string{"freezer"}, nil); err != nil {
		t.Fatal(err)
	}
	jail := filepath.Join(cgtest.Own(t, "freezer"), n, "jail")
	r := contained(t, jail, true)
	hidden := contained(t, jail, false) // the same uid, in the host's pid namespace
	rq := &api.Request{Peer: proxy.Peer, Opener: proxy.Opener, Sender: proxy.Sender, For: &r}
	for what, victim := range map[string]api.Cred{"a task that it does not see": hidden, "itself": r} {
		err := m.MovePidAbs0(rq, "freezer", "/"+n, api.Victim{Cred: &victim})
		if kind(err) != api.Denied {
			t.Errorf("%s: %v", what, err)
		}
		if got := read(t, filepath.Join(jail, "cgroup.procs")); !slices.Contains(strings.Fields(got), strconv.Itoa(int(victim.PID))) {
			t.Errorf("%s: it was moved", what)
		}
	}
}

// Root of a container without a proxy is told what would let it leave its cgroup.
func TestKernelEscapeNeedsAProxy(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	m := newManager(t)
	n := name(t)
	if _, err := m.Create(self(t, m), n, []string{"freezer"}, nil); err != nil {
		t.Fatal(err)
	}
	r := contained(t, filepath.Join(cgtest.Own(t, "freezer"), n), true)
	err := m.MovePidAbs0(request(t, m, r), "freezer", "/", api.Victim{PID: 1})
	if e, ok := errors.AsType[*api.Error](err); !ok || e.Kind != api.Denied || e.Hint != "start a cgproxy in your own container" {
		t.Errorf("got %v", err)
	}
}
