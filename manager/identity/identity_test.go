package identity_test

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

func FuzzParseIDMap(f *testing.F) {
	f.Add([]byte("         0          0 4294967295\n"))
	f.Add([]byte("         0     100000      65536\n     65536     300000          1\n"))
	f.Add([]byte(""))
	f.Add([]byte("0 0\n"))
	f.Add([]byte("4294967295 1 1\n1 4294967295 4294967295\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := identity.ParseIDMap(b)
		if err != nil {
			if m != nil {
				t.Errorf("a map with an error: %v", m)
			}
			return
		}
		for _, r := range m {
			for _, id := range []uint32{r.Outside, r.Outside + r.Count - 1, r.Outside + r.Count, privcheck.NoID} {
				in, ok := m.ToInside(id)
				if !ok {
					continue
				}
				if id == privcheck.NoID || in == privcheck.NoID {
					t.Errorf("the id of nobody is mapped: %d -> %d", id, in)
				}
			}
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("Name:\tUid:\nTgid:\t1\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nNSpid:\t1\nCapEff:\t0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		st, err := identity.ParseStatus(b)
		if err == nil && (st.Tgid == 0 || len(st.NSpid) == 0) {
			t.Errorf("accepted without its facts: %+v", st)
		}
	})
}

func TestParseIDMap(t *testing.T) {
	m, err := identity.ParseIDMap([]byte("         0     100000      65536\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := privcheck.IDMap{{Inside: 0, Outside: 100000, Count: 65536}}
	if d := cmp.Diff(want, m); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{"0 0 0\n", "a b c\n", "0 0 1 2\n", "0 0\n", "-1 0 1\n", "0 4294967296 1\n"} {
		if m, err := identity.ParseIDMap([]byte(bad)); err == nil {
			t.Errorf("%q: accepted as %v", bad, m)
		}
	}
}

func open(t *testing.T, pid int) *identity.Process {
	t.Helper()
	p, err := identity.Open(int32(pid), -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func TestKernelProcessGone(t *testing.T) {
	cmd := exec.Command("sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := open(t, cmd.Process.Pid)
	if !p.Alive() || !p.Unreaped() {
		t.Error("a living process counts as ended")
	}
	if _, err := p.Cgroups(); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for p.Alive() {
		time.Sleep(time.Millisecond)
	}
	if !p.Unreaped() {
		t.Error("a zombie counts as reaped")
	}
	_ = cmd.Wait()
	if p.Unreaped() {
		t.Error("a reaped process counts as unreaped")
	}
	if _, err := p.Cgroups(); !errors.Is(err, identity.ErrGone) {
		t.Errorf("cgroups of a reaped process: %v", err)
	}
	if _, err := p.Status(); !errors.Is(err, identity.ErrGone) {
		t.Errorf("status of a reaped process: %v", err)
	}
	if _, err := identity.Open(int32(cmd.Process.Pid), -1); !errors.Is(err, identity.ErrGone) {
		t.Errorf("open of a reaped process: %v", err)
	}
}

func TestKernelRequestorForgedIDs(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	p := open(t, os.Getpid())
	r, err := host.Requestor(p, 0, 0, false)
	if err != nil || !r.HostRoot() {
		t.Errorf("root itself: %+v, %v", r, err)
	}
	if _, err := host.Requestor(p, 1000, 0, false); !errors.Is(err, identity.ErrNotItsIDs) {
		t.Errorf("a foreign uid: %v", err)
	}
	if _, err := host.Requestor(p, 0, 1000, false); !errors.Is(err, identity.ErrNotItsIDs) {
		t.Errorf("a foreign gid: %v", err)
	}
}

// A capability that root gave up is seen, and so is every id of a process, the
// same as in its status.
func TestKernelRequestorWithoutSysAdmin(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cmd := exec.Command("setpriv", "--bounding-set=-sys_admin", "sleep", "300")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	p := open(t, cmd.Process.Pid)
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		r, err := host.Requestor(p, 0, 0, false)
		if err != nil {
			t.Fatal(err)
		}
		st, err := p.Status()
		if err != nil {
			t.Fatal(err)
		}
		if !st.SysAdmin() && !r.SysAdmin && !r.HostRoot() {
			break
		}
		if time.Since(start) > cgtest.Patience(5*time.Second) {
			t.Fatalf("without CAP_SYS_ADMIN, %v: %+v", st.SysAdmin(), r)
		}
	}
	if _, err := host.Requestor(p, 0, 1, false); !errors.Is(err, identity.ErrNotItsIDs) {
		t.Errorf("a foreign gid: %v", err)
	}
}

// namespaced starts a process in a user and pid namespace of its own.
func namespaced(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

func TestKernelNamespacedRequestor(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	pid := namespaced(t)
	p, me := open(t, pid), open(t, os.Getpid())
	r, err := host.Requestor(p, 100000, 100000, true)
	if err != nil {
		t.Fatal(err)
	}
	if r.SameUserNS || r.SamePIDNS || r.HostRoot() || !r.Outside() {
		t.Errorf("a container's process counts as the host's: %+v", r)
	}
	if out, ok := r.UIDs.ToOutside(1000); !ok || out != 101000 {
		t.Errorf("its uid 1000 is %d, %v", out, ok)
	}
	if _, ok := r.UIDs.ToInside(1000); ok {
		t.Error("the host's uid 1000 is mapped")
	}
	if n, ok := host.HostPID(p, 1); !ok || n != int32(pid) {
		t.Errorf("its pid 1 is %d, %v; want %d", n, ok, pid)
	}
	if n, ok := host.PIDIn(p, int32(pid)); !ok || n != 1 {
		t.Errorf("its own pid is %d, %v", n, ok)
	}
	if n, ok := host.PIDIn(p, int32(os.Getpid())); ok {
		t.Errorf("a host's process is visible as %d", n)
	}
	if _, ok := host.HostPID(p, int64(pid)); ok {
		t.Error("the host's number means something inside")
	}
	inside, err := host.Nesting(p)
	if err != nil {
		t.Fatal(err)
	}
	outside, err := host.Nesting(me)
	if err != nil {
		t.Fatal(err)
	}
	if !outside.Encloses(inside) || !outside.Encloses(outside) || !inside.Encloses(inside) {
		t.Errorf("the host does not enclose the container: %v, %v", outside, inside)
	}
	if inside.Encloses(outside) {
		t.Errorf("the container encloses the host: %v, %v", outside, inside)
	}
	if names, err := host.Containers(p); err != nil || len(names) != 2 {
		t.Errorf("containers: %v, %v", names, err)
	}
	if names, err := host.Containers(me); err != nil || len(names) != 0 {
		t.Errorf("containers of the host: %v, %v", names, err)
	}
	if in, ok := host.InnerUID(p, 100000); !ok || in != 0 {
		t.Errorf("inner uid %d, %v", in, ok)
	}
}

// The way that kernels before 6.11 need gives the same answers as the ioctl.
func TestKernelPIDWithoutIoctl(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	pid := namespaced(t)
	other := namespaced(t) // has the same numbers in a namespace of its own
	p := open(t, pid)
	if n, ok := identity.SearchPID(host, p, 1); !ok || n != int32(pid) {
		t.Errorf("its pid 1 is %d, %v; want %d", n, ok, pid)
	}
	if _, ok := identity.SearchPID(host, p, 2); ok {
		t.Error("a pid that is not there was found")
	}
	if n, ok := identity.PIDAtLevel(host, p, "/proc/"+strconv.Itoa(pid)); !ok || n != 1 {
		t.Errorf("its own pid is %d, %v", n, ok)
	}
	if n, ok := identity.PIDAtLevel(host, p, "/proc/"+strconv.Itoa(other)); ok {
		t.Errorf("a neighbour's process is visible as %d", n)
	}
}

func TestKernelTaskMembers(t *testing.T) {
	self, err := identity.OpenTask(int32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	ms, err := self.Members()
	if err != nil {
		t.Fatal(err)
	}
	if len(ms) < 2 {
		t.Errorf("a Go program has %d threads", len(ms))
	}
	uid := uint32(os.Getuid())
	for _, m := range ms {
		if m.UIDs != [3]uint32{uid, uid, uid} {
			t.Errorf("thread %d: %v", m.TID, m.UIDs)
		}
	}
	for _, m := range ms {
		if m.TID == int32(os.Getpid()) {
			continue
		}
		th, err := identity.OpenTask(m.TID)
		if errors.Is(err, identity.ErrGone) {
			continue // it ended meanwhile
		}
		if err != nil {
			t.Fatalf("thread %d: %v", m.TID, err)
		}
		if th.Thread != m.TID || th.PID() != int32(os.Getpid()) {
			t.Errorf("thread %d: %d of %d", m.TID, th.Thread, th.PID())
		}
		th.Close()
		return
	}
}

func TestKernelTaskOfForeignDescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := identity.TaskOf(int(r.Fd())); err == nil {
		t.Error("a pipe counts as a pidfd")
	}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	task, err := identity.TaskOf(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer task.Close()
	if task.PID() != int32(os.Getpid()) {
		t.Errorf("pid %d", task.PID())
	}
}
