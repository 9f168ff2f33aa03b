package manager_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// Who moves a task to and fro among its own cgroups does not take it out of a
// jail that it is put into meanwhile: nothing moves it between the last look at
// where it is and the move.
func TestKernelMoveIntoJail(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	n := name(t)
	top := filepath.Join(cgtest.Own(t, "freezer"), n)
	const uid = 61000
	for _, d := range []string{"", "/a", "/a/x", "/a/y", "/jail"} {
		if err := os.Mkdir(top+d, 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(d, "/a") {
			give(t, top+d, uid)
		}
	}
	pid := cgtest.Child(t, "setpriv", "--reuid", strconv.Itoa(uid), "--clear-groups", "--regid", strconv.Itoa(uid), "sleep", "300")
	victim := api.Victim{PID: int64(pid)}
	put(t, pid, top+"/a/x")
	rq := requestOf(t, m, os.Getpid(), uid)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				_ = m.MovePid0(rq, "freezer", n+"/a/"+[]string{"x", "y"}[i%2], victim)
			}
		}
	}()
	root := self(t, m)
	escaped := 0
	for range 300 {
		// The attacker's own move may have come first.
		err := m.MovePid0(root, "freezer", n+"/jail", victim)
		for range 1000 {
			if err == nil {
				break
			}
			err = m.MovePid0(root, "freezer", n+"/jail", victim)
		}
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			if !strings.Contains(read(t, "/proc/"+strconv.Itoa(pid)+"/cgroup"), n+"/jail") {
				escaped++
				break
			}
		}
		put(t, pid, top+"/a/x")
	}
	close(stop)
	<-done
	if escaped > 0 {
		t.Errorf("escaped from the jail %d times of 300", escaped)
	}
}
