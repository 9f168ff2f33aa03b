package manager_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager"
)

const prisonerUID = 61000

// prisoner starts a process of a user's, and makes cgroups of the user's, a with x and
// y, beside a jail.
func prisoner(t *testing.T) (n, top string, pid int) {
	t.Helper()
	n = name(t)
	top = filepath.Join(cgtest.Own(t, "freezer"), n)
	for _, d := range []string{"", "/a", "/a/x", "/a/y", "/jail"} {
		if err := os.Mkdir(top+d, 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(d, "/a") {
			give(t, top+d, prisonerUID)
		}
	}
	return n, top, sleeper(t, prisonerUID)
}

// Who moves a task to and fro among its own cgroups does not take it out of a
// jail that it is put into meanwhile: nothing moves it between the last look at
// where it is and the move.
func TestKernelMoveIntoJail(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	n, top, pid := prisoner(t)
	victim := api.Victim{PID: int64(pid)}
	put(t, pid, top+"/a/x")
	rq := requestOf(t, m, os.Getpid(), prisonerUID)
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

// Who is moved by somebody else meanwhile, as by systemd when it starts a scope, is
// moved all the same, from where it is by then.
func TestKernelMoveWhileMoved(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	n := name(t)
	top := filepath.Join(cgtest.Own(t, "freezer"), n)
	for _, d := range []string{"", "/a", "/b", "/x"} {
		if err := os.Mkdir(top+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	pid := sleeper(t, 0)
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	root := self(t, m)
	for what, move := range map[string]func() error{
		"Move":    func() error { return m.Move(root, n+"/x", uint32(pid)) },
		"MoveFd":  func() error { return m.MoveFd(root, n+"/x", pidfd) },
		"MovePid": func() error { return m.MovePid0(root, "freezer", n+"/x", api.Victim{PID: int64(pid)}) },
		"MovePidAbs": func() error {
			x := strings.TrimPrefix(top, cgtest.Mount(t, "freezer")) + "/x"
			return m.MovePidAbs0(root, "freezer", x, api.Victim{PID: int64(pid)})
		},
	} {
		put(t, pid, top+"/a")
		if err := meanwhile(t, m, pid, move, top+"/b"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if got := read(t, "/proc/"+strconv.Itoa(pid)+"/cgroup"); !strings.Contains(got, n+"/x") {
			t.Errorf("%s: it is in %s", what, got)
		}
	}
}

// Who is jailed while its request is answered asks from the jail.
func TestKernelMoveFromJail(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	n, top, pid := prisoner(t)
	victim := api.Victim{PID: int64(pid)}
	where := func() string {
		_, at, _ := strings.Cut(read(t, "/proc/"+strconv.Itoa(pid)+"/cgroup"), n)
		at, _, _ = strings.Cut(at, "\n")
		return at
	}
	move := func() error { return m.MovePid0(requestOf(t, m, pid, prisonerUID), "freezer", "x", victim) }
	put(t, pid, top+"/a")
	if err := move(); err != nil || where() != "/a/x" {
		t.Fatalf("not jailed: %v, in %s", err, where())
	}
	put(t, pid, top+"/a")
	if err := meanwhile(t, m, pid, move, top+"/jail"); err == nil || where() != "/jail" {
		t.Errorf("jailed: %v, in %s", err, where())
	}
}

// meanwhile has a request begin that moves a process, and somebody else move it to dir
// before the request does.
func meanwhile(t *testing.T, m *manager.Manager, pid int, move func() error, dir string) error {
	t.Helper()
	release, waiting := m.HoldMoves(int32(pid))
	done := make(chan error, 1)
	go func() { done <- move() }()
	cgtest.Eventually(t, 10*time.Second, "the request waits", waiting)
	put(t, pid, dir)
	release()
	return <-done
}
