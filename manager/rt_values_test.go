package manager_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// What the kernel refuses about realtime runtime is told in words.
func TestKernelRuntimeRefused(t *testing.T) {
	harness.Require(t, "root", "rtgroup")
	mount := cgtest.Mount(t, "cpu")
	m := newManager(t)
	top := filepath.Join(mount, cgtest.Name(t))
	for _, n := range []string{"", "a", "a/b", "c", "c/d"} {
		if err := os.Mkdir(filepath.Join(top, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	set := func(name, runtime string) {
		t.Helper()
		write(t, filepath.Join(top, name, "cpu.rt_runtime_us"), runtime)
	}
	set("", "100000")
	set("a", "50000")
	set("a/b", "50000")
	t.Cleanup(func() {
		for _, n := range []string{"a/b", "a", "c", ""} {
			set(n, "0")
		}
	})
	rq := requestor(t, m, 0, top)
	thread := sleeper(t, 0)
	put(t, thread, filepath.Join(top, "a", "b"))
	if err := unix.SchedSetAttr(thread, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		values map[string]string
		kind   api.Kind
		text   string
	}{
		{"a/b", map[string]string{"rt.runtime": "0"}, api.Busy, `key "rt.runtime" of "a/b": a realtime thread is in the cgroup`},
		{"a/b", map[string]string{"rt.runtime": "60000"}, api.Limit, `the cgroup above it does not have so much realtime runtime left`},
		{"a", map[string]string{"rt.runtime": "1000001"}, api.Invalid, `a realtime runtime of 1000001 us is more than the period of 1000000 us`},
		{"a", map[string]string{"rt.runtime": "40000"}, api.Invalid, `the cgroups below it have more realtime runtime than that, 5 % of their periods together`},
		{"a", map[string]string{"rt.period": "40000"}, api.Invalid, `a realtime runtime of 50000 us is more than the period of 40000 us`},
		{"c", map[string]string{"rt.runtime": "60000"}, api.Limit, `left`},
		{"c", map[string]string{"cpu.rt_runtime_us": "60000"}, api.Limit, `left`},
		{"c", map[string]string{"cpu.rt_runtime_us": "much"}, api.Invalid, `no such realtime runtime`},
	} {
		err := m.SetValue(rq, tc.name, tc.values)
		if kind(err) != tc.kind || err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s %v: %v, want %v with %q", tc.name, tc.values, err, tc.kind, tc.text)
		}
	}
	if _, err := m.Create(rq, "new", []string{"cpu"}, map[string]string{"rt.runtime": "60000"}); kind(err) != api.Limit || exists(filepath.Join(top, "new")) {
		t.Errorf("Create with more than there is: %v", err)
	}
	if err := m.SetValue(rq, "c", map[string]string{"rt.runtime": "50000"}); err != nil {
		t.Errorf("all that is left: %v", err)
	}
	if got := read(t, filepath.Join(top, "c", "cpu.rt_runtime_us")); got != "50000" {
		t.Errorf("c has %s", got)
	}
	if err := m.MovePid0(rq, "cpu", "c/d", api.Victim{PID: int64(thread)}); kind(err) != api.Denied || !strings.Contains(err.Error(), "no realtime runtime") {
		t.Errorf("a realtime thread into a cgroup without runtime: %v", err)
	}
	if got := read(t, "/proc/"+strconv.Itoa(thread)+"/cgroup"); !strings.Contains(got, "/a/b") {
		t.Errorf("it is in %s", got)
	}
}
