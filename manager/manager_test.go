package manager_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager"
)

// newManager starts a Manager on this machine's hierarchies.
func newManager(t testing.TB) *manager.Manager {
	t.Helper()
	return newBoundedManager(t, 0)
}

// newBoundedManager is newManager with a bound on cgroups, 0 for the usual one.
func newBoundedManager(t testing.TB, maxCgroups int) *manager.Manager {
	t.Helper()
	set, err := cgfs.Open(cgfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	m, err := manager.New(manager.Config{Hierarchies: set, MaxCgroups: maxCgroups, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Close()
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// self is a request by the test itself, whose own cgroup is wherever it runs.
func self(t testing.TB, m *manager.Manager) *api.Request {
	t.Helper()
	return request(t, m, api.Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
}

// request is one by who has a connection of its own.
func request(t testing.TB, m *manager.Manager, cred api.Cred) *api.Request {
	t.Helper()
	peer, err := m.Open(cred, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(peer.Close)
	return &api.Request{Peer: peer, Opener: cred, Sender: cred}
}

// requestOf is a request by a process that has the id as its uid and gid.
func requestOf(t testing.TB, m *manager.Manager, pid int, id uint32) *api.Request {
	t.Helper()
	return request(t, m, api.Cred{PID: int32(pid), UID: id, GID: id})
}

// start starts a program that runs until the test ends.
func start(t *testing.T, cmd *exec.Cmd) (pid int) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

// sleeper starts a process with the id.
func sleeper(t *testing.T, id uint32) (pid int) {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	return start(t, cmd)
}

// container makes a cgroup of the freezer's that belongs to uid 100000, with a process
// of that uid in it, root of a user namespace. It returns the cgroup's directory.
func container(t *testing.T) (pid int, dir string) {
	t.Helper()
	dir = filepath.Join(cgtest.Mount(t, "freezer"), cgtest.Name(t))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 100000, 100000); err != nil {
		t.Fatal(err)
	}
	pid = cgtest.Child(t, "setpriv", "--reuid", "100000", "--regid", "100000", "--clear-groups",
		"unshare", "--user", "--map-root-user", "sleep", "300")
	put(t, pid, dir)
	// When it runs sleep, its namespace has both maps.
	cgtest.Eventually(t, 5*time.Second, "a user namespace", func() bool {
		return read(t, "/proc/"+strconv.Itoa(pid)+"/comm") == "sleep"
	})
	return pid, dir
}

// put puts a process into the cgroup in dir.
func put(t *testing.T, pid int, dir string) {
	t.Helper()
	write(t, filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid))
}

func write(t *testing.T, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func kind(err error) api.Kind {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e.Kind
	}
	return 0
}

// name is a cgroup name that is removed wherever the test left it, below the
// test's own cgroups.
func name(t *testing.T) string {
	t.Helper()
	n := fmt.Sprintf("cgmtest-m-%d-%d", os.Getpid(), time.Now().UnixNano()%1e9)
	t.Cleanup(func() {
		for _, dir := range cgtest.OwnEverywhere(t) {
			top := filepath.Join(dir, n)
			var dirs []string
			_ = filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, p)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				cgtest.Until(time.Second, 5*time.Millisecond, func() bool {
					err := os.Remove(dir)
					return err == nil || errors.Is(err, os.ErrNotExist)
				})
			}
			if exists(top) {
				t.Errorf("left behind: %s", top)
			}
		}
	})
	return n
}

// give gives a cgroup's directory and its files of delegation to uid.
func give(t *testing.T, dir string, uid int) {
	t.Helper()
	for _, f := range []string{"", "tasks", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
		if err := os.Chown(filepath.Join(dir, f), uid, uid); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// freezer is the file that freezes a cgroup of this host, and what freezes.
func freezer(t *testing.T) (file, frozen string) {
	t.Helper()
	if cgtest.OnV2(t, "freezer") {
		return "cgroup.freeze", "1"
	}
	return "freezer.state", "FROZEN"
}

// frozen reports whether somebody asked for the cgroup in dir to be frozen.
func frozen(dir string) bool {
	for _, f := range []string{"freezer.self_freezing", "cgroup.freeze"} {
		if b, err := os.ReadFile(filepath.Join(dir, f)); err == nil {
			return strings.TrimSpace(string(b)) == "1"
		}
	}
	return false
}

// lastKey is written after all others, because it may reclaim; what it says is
// the kernel's to parse.
func lastKey(t *testing.T) string {
	t.Helper()
	if cgtest.OnV2(t, "memory") {
		return "memory.max"
	}
	return "memory.limit_in_bytes"
}

func TestKernelCreateAllOrNothing(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	_, err := m.Create(rq, n+"/web", []string{"memory", "cpuset", "pids"}, map[string]string{
		"memory.limit": "64M", "memory.soft_limit": "32M", "pids.limit": "10", "zz": "",
	})
	if err == nil {
		t.Fatal("an unknown key was accepted")
	}
	_, err = m.Create(rq, n+"/web", []string{"memory", "cpuset", "pids"}, map[string]string{
		"memory.soft_limit": "33554432", "cpus_allowed": "0", "pids.max": "10", lastKey(t): "garbage",
	})
	if err == nil {
		t.Fatal("a limit that the kernel cannot parse was accepted")
	}
	if !strings.Contains(err.Error(), lastKey(t)) {
		t.Errorf("the error does not name the key: %v", err)
	}
	for _, c := range []string{"memory", "cpuset", "pids"} {
		if exists(filepath.Join(cgtest.Own(t, c), n)) {
			t.Errorf("%s: something is left behind", c)
		}
	}
	created, err := m.Create(rq, n+"/web", []string{"memory", "cpuset", "pids"}, map[string]string{
		"memory.soft_limit": "33554432", "cpus_allowed": "0", "pids.max": "10",
	})
	if err != nil || !created {
		t.Fatalf("Create = %v, %v", created, err)
	}
	if got := read(t, filepath.Join(cgtest.Own(t, "pids"), n, "web/pids.max")); got != "10" {
		t.Errorf("pids.max = %q", got)
	}
	if freezer := cgtest.Own(t, "freezer"); freezer != cgtest.Own(t, "memory") && exists(filepath.Join(freezer, n)) {
		t.Error("created in a hierarchy that was not named")
	}
}

// What is a controller on v1 alone needs nothing on v2, at no level.
func TestKernelCreateWithoutControllers(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n+"/a/b", []string{"freezer", "devices"}, map[string]string{"state": "thawed"}); err != nil {
		t.Fatal(err)
	}
	if v, err := m.GetValue(rq, n+"/a/b", []string{"state"}); err != nil || v["state"] != "thawed" {
		t.Errorf("state: %q, %v", v, err)
	}
}

func TestKernelSetValueAllOrNothing(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n, []string{"memory", "cpu", "pids", "cpuset"}, map[string]string{
		"memory.soft_limit": "64M", "cpu_share_percent": "50", "pids.limit": "50",
	}); err != nil {
		t.Fatal(err)
	}
	before := map[string]string{
		"memory.soft_limit": "", "cpu_share_percent": "", "pids.max": "", "cpus_allowed": "",
	}
	for k := range before {
		v, err := m.GetValue(rq, n, []string{k})
		if err != nil {
			t.Fatal(err)
		}
		before[k] = v[k]
	}
	err := m.SetValue(rq, n, map[string]string{
		"cpu_share_percent": "10", "memory.soft_limit": "1048576", "cpus_allowed": "0", "pids.max": "5",
		lastKey(t): "garbage",
	})
	if err == nil || !strings.Contains(err.Error(), lastKey(t)) {
		t.Fatalf("a limit that the kernel cannot parse: %v", err)
	}
	for k, want := range before {
		v, err := m.GetValue(rq, n, []string{k})
		if err != nil {
			t.Fatal(err)
		}
		if v[k] != want {
			t.Errorf("%s = %q, was %q", k, v[k], want)
		}
	}
}

func TestKernelMoveListKillDelete(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n, nil, nil); err != nil {
		t.Fatal(err)
	}
	pid := cgtest.Child(t)
	if err := m.Move(rq, n, uint32(pid)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"memory", "freezer", "unified"} {
		if !cgtest.Has(c) {
			continue
		}
		if got := read(t, filepath.Join(cgtest.Own(t, c), n, "cgroup.procs")); got != strconv.Itoa(pid) {
			t.Errorf("%s: cgroup.procs = %q, want %d", c, got, pid)
		}
	}
	pids, hidden, err := m.ListTasks(rq, n)
	if err != nil || hidden != 0 || len(pids) != 1 || pids[0] != uint32(pid) {
		t.Errorf("ListTasks = %v, %d, %v", pids, hidden, err)
	}
	if err := m.Delete(rq, n); kind(err) != api.Busy {
		t.Errorf("Delete of a cgroup with a task: %v", err)
	}
	if err := m.Kill(rq, n); err != nil {
		t.Fatal(err)
	}
	if pids, _, err := m.ListTasks(rq, n); err != nil || len(pids) != 0 {
		t.Errorf("after Kill: %v, %v", pids, err)
	}
	if err := m.Delete(rq, n); err != nil {
		t.Error(err)
	}
	if err := m.Delete(rq, n); kind(err) != api.NotFound {
		t.Errorf("Delete again: %v", err)
	}
}

func TestKernelDeleteForce(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n+"/a/b", nil, nil); err != nil {
		t.Fatal(err)
	}
	pid := cgtest.Child(t)
	if err := m.Move(rq, n+"/a/b", uint32(pid)); err != nil {
		t.Fatal(err)
	}
	if err := m.DeleteForce(rq, n+"/a"); err != nil {
		t.Fatal(err)
	}
	if pids, hidden, err := m.ListTasks(rq, n); err != nil || hidden != 0 || !slices.Equal(pids, []uint32{uint32(pid)}) {
		t.Errorf("in the parent are %d and %d hidden, %v; want %d", pids, hidden, err, pid)
	}
	if exists(filepath.Join(cgtest.Own(t, "memory"), n, "a")) {
		t.Error("the cgroup is still there")
	}
	if err := m.Kill(rq, n); err != nil {
		t.Error(err)
	}
}

func TestKernelRemoveOnEmpty(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	ctrls := []string{"memory"}
	if cgtest.Has("unified") && !cgtest.OnV2(t, "memory") {
		available := strings.Fields(read(t, filepath.Join(cgtest.Own(t, "unified"), "cgroup.controllers")))
		ctrls = append(ctrls, available[:min(1, len(available))]...)
	}
	for _, ctrl := range ctrls {
		t.Run(ctrl, func(t *testing.T) {
			if _, err := m.Create0(rq, ctrl, n); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(cgtest.Own(t, ctrl), n)
			if err := m.RemoveOnEmpty0(rq, ctrl, n); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond)
			if !exists(dir) {
				t.Fatal("removed before it was filled")
			}
			pid := cgtest.Child(t)
			if err := m.MovePid0(rq, ctrl, n, api.Victim{PID: int64(pid)}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond)
			if !exists(dir) {
				t.Fatal("removed with a task in it")
			}
			p, err := os.FindProcess(pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Kill(); err != nil {
				t.Fatal(err)
			}
			cgtest.Eventually(t, 2*time.Second, "removed when its only task had ended", func() bool { return !exists(dir) })
		})
	}
}

// Pairs of limits that bound each other are written in the order that the
// kernel takes, whichever way they go.
func TestKernelSetValueOfPairs(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n, []string{"memory", "cpu"}, nil); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []string{"64M", "512M", "32M"} {
		if err := m.SetValue(rq, n, map[string]string{"memory.limit": limit, "swap.limit": "16M"}); err != nil {
			t.Errorf("memory.limit %s with swap: %v", limit, err)
		}
		got, err := m.GetValue(rq, n, []string{"memory.limit", "swap.limit"})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %v", limit, got)
		if got["swap.limit"] != "16777216" {
			t.Errorf("swap.limit = %q", got["swap.limit"])
		}
	}
	for _, limit := range []string{"104857600", "838860800", "52428800"} {
		if err := m.SetValue(rq, n, map[string]string{"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}); err != nil {
			t.Errorf("%s: %v", limit, err)
		}
	}
}
