package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// A container that was given the directory of its cgroup alone does not get
// the file of its tasks by asking for it.
func TestKernelChownOfFilesThatTheHostKept(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	m := newManager(t)
	dir := filepath.Join(cgtest.Mount(t, "freezer"), cgtest.Name(t))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 100000, 100000); err != nil {
		t.Fatal(err)
	}
	pid := cgtest.Child(t, "setpriv", "--reuid", "100000", "--regid", "100000", "--clear-groups",
		"unshare", "--user", "--map-root-user", "sleep", "300")
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
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
	t.Cleanup(peer.Close)
	rq := &api.Request{Peer: peer, Opener: cred, Sender: cred}
	if err := m.Chown0(rq, "freezer", "", api.Owner{UID: 0, GID: 0}); kind(err) != api.Denied {
		t.Errorf("Chown: %v, want a refusal", err)
	}
	for _, f := range []string{"tasks", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
		st, err := os.Stat(filepath.Join(dir, f))
		if errors.Is(err, os.ErrNotExist) && f != "cgroup.procs" {
			continue // the other version's
		}
		if err != nil {
			t.Fatal(err)
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); !ok || sys.Uid != 0 {
			t.Errorf("%s belongs to %d now", f, sys.Uid)
		}
	}
	if _, err := m.Create0(rq, "freezer", "below"); err != nil {
		t.Fatal(err)
	}
	if err := m.Chown0(rq, "freezer", "below", api.Owner{UID: 0, GID: 0}); err != nil {
		t.Errorf("Chown of what it made: %v", err)
	}
}
