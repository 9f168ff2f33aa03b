package e2e_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cgmanager/test/harness"
)

// onV2 reports whether a controller is the v2 hierarchy's.
func onV2(t *testing.T, ctrl string) bool { return harness.Find(t, ctrl).V2 }

// TestKernelBadInputOtherVersion: what this host's version of cgroups does not
// have is refused by name, with the hosts that have it, and nothing is done of
// what was asked with it.
func TestKernelBadInputOtherVersion(t *testing.T) {
	w := newWorld(t)
	b := w.box("own")
	w.Make("own/web", b.HostUID, b.HostGID)
	c := b.MustDial(w.d.Sock)
	defer c.Close()
	root := w.host(0, ".")
	r := root.MustDial(w.d.Sock)
	defer r.Close()

	// says makes a request that must be refused with an error of the name whose
	// text has all of the words.
	says := func(what, name string, words []string, ask func() error) {
		t.Helper()
		w.refused(what, func() error {
			err := ask()
			var de *harness.DBusError
			if !errors.As(err, &de) {
				t.Errorf("%s: %v", what, err)
				return err
			}
			if !strings.HasSuffix(de.Name, "."+name) {
				t.Errorf("%s: %s, want %s (%s)", what, de.Name, name, de.Text)
			}
			for _, word := range words {
				if !strings.Contains(de.Text, word) {
					t.Errorf("%s: %q does not say %q", what, de.Text, word)
				}
			}
			return err
		})
	}
	create := func(name string, ctrls []string, values map[string]string) func() error {
		return func() error { return second(c.V1("Create", name, ctrls, values)) }
	}
	set := func(c *harness.Conn, name string, values map[string]string) func() error {
		return func() error { return second(c.V1("SetValue", name, values)) }
	}
	get := func(key string) func() error {
		return func() error { return second(c.V1("GetValue", "web", []string{key})) }
	}
	set0 := func(c *harness.Conn, ctrl, name, key, value string) func() error {
		return func() error { return second(c.V0("SetValue", ctrl, name, key, value)) }
	}
	get0 := func(ctrl, key string) func() error {
		return func() error { return second(c.V0("GetValue", ctrl, "web", key)) }
	}

	// Unknown everywhere.
	for _, name := range []string{"nosuch", "", "cgroup", "memory.max", "Memory"} {
		says("Create in an unknown controller", "FileNotFound", []string{`"` + name + `"`, "ListControllers"}, create("new", []string{"memory", name}, nil))
		says("Create in an unknown controller, cgmanager0_0", "InvalidArgs", []string{`"` + name + `"`}, func() error {
			return second(c.V0("Create", "memory,"+name, "new"))
		})
	}
	says("an unknown key", "FileNotFound", []string{"nosuch.key"}, set(c, "web", map[string]string{"pids.max": "5", "nosuch.key": "1"}))
	says("an unknown key of a controller", "AccessDenied", []string{"memory.nosuch"}, set(c, "web", map[string]string{"pids.max": "5", "memory.nosuch": "1"}))

	// Known to v1 alone.
	if !slices.ContainsFunc(harness.Hierarchies(), func(h harness.Hierarchy) bool { return slices.Contains(h.Controllers(), "net_cls") }) {
		says("Create in net_cls", "NotSupported", []string{"net_cls", "cgroup v1"}, create("new", []string{"memory", "net_cls"}, nil))
		says("Create in net_cls, cgmanager0_0", "InvalidArgs", []string{"net_cls", "cgroup v1"}, func() error {
			return second(c.V0("Create", "memory,net_cls", "new"))
		})
		says("net_classid", "NotSupported", []string{"net_classid", "net_cls", "cgroup v1"}, set(c, "web", map[string]string{"pids.max": "5", "net_classid": "1"}))
		says("net_cls.classid", "NotSupported", []string{"net_cls.classid", "cgroup v1"}, create("new", nil, map[string]string{"net_cls.classid": "1"}))
	}

	// A file of the other version that has no equivalent here.
	key, version := "memory.high", "cgroup v2"
	if onV2(t, "memory") {
		key, version = "memory.swappiness", "cgroup v1"
	}
	words := []string{key, "the controller memory on " + version}
	says("Create with "+key, "NotSupported", words, create("new", nil, map[string]string{"pids.max": "5", key: "1"}))
	says("SetValue of "+key, "NotSupported", words, set(c, "web", map[string]string{"pids.max": "5", key: "1"}))
	says("GetValue of "+key, "NotSupported", words, get(key))
	says("SetValue of "+key+", cgmanager0_0", "InvalidArgs", words, set0(c, "memory", "web", key, "1"))
	says("SetValue of "+key+" to nothing, cgmanager0_0", "InvalidArgs", words, set0(c, "memory", "web", key, ""))
	says("GetValue of "+key+", cgmanager0_0", "InvalidArgs", words, get0("memory", key))

	// A file of v1 that nobody may write, or its host's root alone, stays so
	// where it means another file, or none.
	for _, key := range []string{"notify_on_release", "memory.use_hierarchy", "memory.usage_in_bytes", "cpuacct.usage_user", "cgroup.clone_children"} {
		for _, c := range []*harness.Conn{c, r} {
			web := "own/web"
			if c != r {
				web = "web"
			}
			says("SetValue of "+key, "AccessDenied", []string{key, "cannot be set"}, set(c, web, map[string]string{"pids.max": "5", key: "1"}))
			says("SetValue of "+key+", cgmanager0_0", "InvalidArgs", []string{key}, set0(c, "memory", web, key, "1"))
		}
	}
	says("SetValue of memory.oom_control", "AccessDenied", []string{"memory.oom_control", "host's root"}, set(c, "web", map[string]string{"memory.oom_control": "1"}))
	says("SetValue of memory.oom_control, cgmanager0_0", "InvalidArgs", []string{"memory.oom_control", "host's root"}, set0(c, "memory", "web", "memory.oom_control", "1"))
	says("SetValue of memory.oom_control to nothing, cgmanager0_0", "InvalidArgs", []string{"memory.oom_control", "host's root"}, set0(c, "memory", "web", "memory.oom_control", ""))
	if onV2(t, "memory") {
		says("SetValue of memory.oom_control by the host's root", "NotSupported", []string{"memory.oom_control", "cgroup v1"}, set(r, "own/web", map[string]string{"memory.oom_control": "1"}))
	}
	// Its own limits, under whichever name, are not a container's to change.
	for key, value := range map[string]string{
		"memory.limit_in_bytes": "64M", "memory.max": "64M", "memory.limit": "64M", "cpu.shares": "100", "cpu.weight": "100",
		"freezer.state": "THAWED", "cgroup.freeze": "0", "state": "thawed",
	} {
		says("SetValue of its own "+key, "AccessDenied", nil, set(c, "", map[string]string{key: value}))
	}
	// A key of a controller that is not named.
	for _, key := range []string{"pids.max", "cpu.shares", "cpu.weight"} {
		ctrl, _, _ := strings.Cut(key, ".")
		if harness.Find(t, ctrl) != harness.Find(t, "memory") {
			says("GetValue of "+key+" in memory", "InvalidArgs", []string{key}, get0("memory", key))
		}
	}
}

// TestKernelBadInputNotGiven: where the requestor's own cgroup was not given a
// controller, the error names it, and nothing is made.
func TestKernelBadInputNotGiven(t *testing.T) {
	harness.Require(t, "unified") // v1 gives every controller to every cgroup
	w := newWorld(t)
	w.Make("lean", 0, 0)
	w.Make("lean/own", 0, 0)
	if err := os.WriteFile(filepath.Join(w.Dir(harness.Find(t, "pids"), "lean"), "cgroup.subtree_control"), []byte("-pids"), 0); err != nil {
		t.Fatal(err)
	}
	b := w.box("lean/own/box")
	c := b.MustDial(w.d.Sock)
	defer c.Close()
	for what, ask := range map[string]func() error{
		"named": func() error { return second(c.V1("Create", "new", []string{"memory", "pids"}, map[string]string{})) },
		"needed by a key": func() error {
			return second(c.V1("Create", "new", []string{}, map[string]string{"memory.limit": "1G", "pids.limit": "5"}))
		},
		"named, the other": func() error { return second(c.V0("Create", "memory,pids", "new")) },
	} {
		w.refused(what, func() error {
			err := ask()
			var de *harness.DBusError
			if !errors.As(err, &de) || !strings.Contains(de.Text, "pids") || strings.Contains(de.Text, "memory") && !strings.Contains(what, "other") {
				t.Errorf("%s: %v does not name the controller", what, err)
			}
			return err
		})
		if w.Exists(harness.Find(t, "pids"), "lean/own/box/new") {
			t.Errorf("%s: the cgroup was made", what)
		}
	}
	// What it was given it may use.
	if _, err := c.V1("Create", "new", []string{"memory"}, map[string]string{"memory.limit": "64M"}); err != nil {
		t.Error(err)
	}
	if got, err := c.V0("GetValue", "memory", "new", "memory.limit_in_bytes"); err != nil || got[0] != "67108864" {
		t.Errorf("memory.limit_in_bytes reads %v, %v", got, err)
	}
	if _, err := c.V0("GetValue", "pids", "new", "pids.max"); err == nil || !strings.Contains(err.Error(), "not given the controller pids") {
		t.Errorf("pids.max: %v", err)
	}
}
