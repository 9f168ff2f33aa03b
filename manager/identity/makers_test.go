package identity_test

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
)

// comm is the name of the program that a process runs.
func comm(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	return strings.TrimSpace(string(b))
}

// Whoever makes namespaces side by side is charged for all of them.
func TestKernelMakers(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	if uids, err := host.Makers(open(t, namespaced(t))); err != nil || !slices.Equal(uids, []uint32{0}) {
		t.Errorf("root's namespace was made by %v, %v", uids, err)
	}
	if uids, err := host.Makers(open(t, os.Getpid())); err != nil || len(uids) != 0 {
		t.Errorf("the host's namespace was made by %v, %v", uids, err)
	}
	pid := cgtest.Child(t, "setpriv", "--reuid", "61000", "--regid", "61000", "--clear-groups",
		"unshare", "--user", "--map-root-user", "unshare", "--user", "sleep", "300")
	cgtest.Eventually(t, 5*time.Second, "it runs sleep", func() bool { return comm(pid) == "sleep" })
	if uids, err := host.Makers(open(t, pid)); err != nil || !slices.Equal(uids, []uint32{61000}) {
		t.Errorf("the namespaces of 61000 were made by %v, %v", uids, err)
	}
}
