package manager_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// A container that moves into cgroups of its own has no bound in each.
func TestKernelCgroupsPerContainerAreBounded(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	const limit = 8
	m := newBoundedManager(t, limit)
	dir := filepath.Join(cgtest.Mount(t, "freezer"), cgtest.Name(t))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 100000, 100000); err != nil {
		t.Fatal(err)
	}
	pid := cgtest.Child(t, "setpriv", "--reuid", "100000", "--regid", "100000", "--clear-groups",
		"unshare", "--user", "--map-root-user", "sleep", "300")
	place := func(dir string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	place(dir)
	for range 1000 {
		if strings.Contains(read(t, "/proc/"+strconv.Itoa(pid)+"/uid_map"), "100000") {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	cred := api.Cred{PID: int32(pid), UID: 100000, GID: 100000}
	peer, err := m.Open(cred, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	rq := &api.Request{Peer: peer, Opener: cred, Sender: cred}
	for _, n := range []string{"a", "b"} {
		if _, err := m.Create0(rq, "freezer", n); err != nil {
			t.Fatal(err)
		}
	}
	made := 2
	for _, n := range []string{"a", "b"} {
		place(filepath.Join(dir, n))
		for i := range limit {
			if _, err := m.Create0(rq, "freezer", fmt.Sprint(i)); err == nil {
				made++
			} else if kind(err) != api.Limit {
				t.Fatal(err)
			}
		}
	}
	if made != limit {
		t.Errorf("%d cgroups were made, want %d", made, limit)
	}
	if err := os.Remove(filepath.Join(dir, "a", "0")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // until it is looked for again
	if _, err := m.Create0(rq, "freezer", "again"); err != nil {
		t.Errorf("after one was removed: %v", err)
	}
}
