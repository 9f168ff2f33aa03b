package manager_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	cred := api.Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	peer, err := m.Open(cred, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(peer.Close)
	return &api.Request{Peer: peer, Opener: cred, Sender: cred}
}

// own returns the test's own cgroup of a controller, as a directory.
func own(t testing.TB, controller string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if controller == "unified" && f[0] == "0" || slices.Contains(strings.Split(f[1], ","), controller) {
			return filepath.Join(cgtest.Mount(t, controller), f[2])
		}
	}
	t.Fatalf("no cgroup in %s", controller)
	return ""
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
		for _, c := range []string{"memory", "freezer", "cpu", "cpuacct", "cpuset", "pids", "blkio", "devices", "unified"} {
			top := filepath.Join(own(t, c), n)
			var dirs []string
			_ = filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, p)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				for range 100 {
					if err := os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
						break
					}
					time.Sleep(5 * time.Millisecond)
				}
			}
			if exists(top) {
				t.Errorf("left behind: %s", top)
			}
		}
	})
	return n
}

// lastKey is written after all others, because it may reclaim; what it says is
// the kernel's to parse.
const lastKey = "memory.limit_in_bytes"

func TestKernelCreateAllOrNothing(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
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
		"memory.soft_limit_in_bytes": "33554432", "memory.swappiness": "10", "pids.max": "10", lastKey: "garbage",
	})
	if err == nil {
		t.Fatal("a limit that the kernel cannot parse was accepted")
	}
	if !strings.Contains(err.Error(), lastKey) {
		t.Errorf("the error does not name the key: %v", err)
	}
	for _, c := range []string{"memory", "cpuset", "pids"} {
		if exists(filepath.Join(own(t, c), n)) {
			t.Errorf("%s: something is left behind", c)
		}
	}
	created, err := m.Create(rq, n+"/web", []string{"memory", "cpuset", "pids"}, map[string]string{
		"memory.soft_limit_in_bytes": "33554432", "memory.swappiness": "10", "pids.max": "10",
	})
	if err != nil || !created {
		t.Fatalf("Create = %v, %v", created, err)
	}
	if got := read(t, filepath.Join(own(t, "pids"), n, "web/pids.max")); got != "10" {
		t.Errorf("pids.max = %q", got)
	}
	if exists(filepath.Join(own(t, "freezer"), n)) {
		t.Error("created in a hierarchy that was not named")
	}
}

func TestKernelSetValueAllOrNothing(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n, []string{"memory", "cpu", "pids", "cpuset"}, map[string]string{
		"memory.swappiness": "20", "cpu.shares": "512", "pids.limit": "50",
	}); err != nil {
		t.Fatal(err)
	}
	before := map[string]string{
		"memory.swappiness": "20", "cpu.shares": "512", "pids.max": "50",
		"memory.soft_limit_in_bytes": "",
	}
	for k := range before {
		v, err := m.GetValue(rq, n, []string{k})
		if err != nil {
			t.Fatal(err)
		}
		before[k] = v[k]
	}
	err := m.SetValue(rq, n, map[string]string{
		"cpu.shares": "100", "memory.soft_limit_in_bytes": "1048576", "memory.swappiness": "60", "pids.max": "5",
		lastKey: "garbage",
	})
	if err == nil || !strings.Contains(err.Error(), lastKey) {
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
	cgtest.Require(t, cgtest.Root, cgtest.V1, cgtest.V2)
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
		if got := read(t, filepath.Join(own(t, c), n, "cgroup.procs")); got != strconv.Itoa(pid) {
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
	cgtest.Require(t, cgtest.Root, cgtest.V1, cgtest.V2)
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
	if got := read(t, filepath.Join(own(t, "memory"), n, "cgroup.procs")); got != strconv.Itoa(pid) {
		t.Errorf("the task is not in the parent: %q", got)
	}
	if exists(filepath.Join(own(t, "memory"), n, "a")) {
		t.Error("the cgroup is still there")
	}
	if err := m.Kill(rq, n); err != nil {
		t.Error(err)
	}
}

func TestKernelRemoveOnEmpty(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1, cgtest.V2)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	for _, ctrl := range []string{"memory", "hugetlb"} {
		t.Run(ctrl, func(t *testing.T) {
			if _, err := m.Create0(rq, ctrl, n); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(own(t, map[string]string{"memory": "memory", "hugetlb": "unified"}[ctrl]), n)
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
			for range 100 {
				if !exists(dir) {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
			t.Error("not removed when its only task had ended")
		})
	}
}

// Pairs of limits that bound each other are written in the order that the
// kernel takes, whichever way they go.
func TestKernelSetValueOfPairs(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
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
