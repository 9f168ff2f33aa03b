package e2e_test

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// The conformance suite of the daemon over its socket: what one client asks and
// is answered, to the letter, on every layout of cgroups. What a host may have
// and another not (a controller, a version's own file) is not in here.

// client is somebody who asks, with a program to put into cgroups.
type client struct {
	w *world
	t *testing.T
	*harness.Proc
	c      *harness.Conn
	victim string // the program
	pid    int    // of the process that answers name as V
	// cg is its own cgroup, below the tree. root: it is root in a container.
	cg   string
	root bool
}

// TestKernelConformance asks as a user of the host, as the root of a container,
// and as one that has a cgroup namespace of its own.
func TestKernelConformance(t *testing.T) {
	harness.Require(t, "cc")
	for _, who := range []string{"host user", "container root", "container root with a cgroup namespace"} {
		for name, script := range map[string]func(*client){"CGManager1": conform1, "cgmanager0_0": conform0} {
			t.Run(who+", "+name, func(t *testing.T) {
				w := newWorld(t)
				c := &client{w: w, t: t, cg: "own", root: who != "host user"}
				if c.root {
					c.Proc = w.box(c.cg).Proc
				} else {
					w.Make(c.cg, 1000, 1000)
					c.Proc = w.host(1000, c.cg)
				}
				if strings.Contains(who, "namespace") {
					c.Proc = c.Spawn(harness.Spec{CgroupNS: true})
				}
				c.victim = harness.Program(t, "testdata/victim.c", 0o755)
				c.c = c.MustDial(w.d.Sock)
				defer c.c.Close()
				script(c)
			})
		}
	}
}

// answer is what a client gets to see: the values of a reply, or the error's
// name, and the pid of the victim as V.
func (c *client) answer(r []any, err error) string {
	var de *harness.DBusError
	switch {
	case errors.As(err, &de):
		return de.Name[strings.LastIndex(de.Name, ".")+1:]
	case err != nil:
		return err.Error()
	}
	s := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprint(r), "["), "]")
	if c.pid != 0 {
		s = regexp.MustCompile(`\b`+strconv.Itoa(c.pid)+`\b`).ReplaceAllString(s, "V")
	}
	return s
}

func (c *client) v1(want, member string, args ...any) {
	c.t.Helper()
	c.is(want, harness.V1, member, args)
}

// v0 is v1 for the old interface, in which every refusal has the one name and
// says what it is first.
func (c *client) v0(want, member string, args ...any) {
	c.t.Helper()
	c.is(want, harness.V0, member, args)
}

func (c *client) is(want, iface, member string, args []any) {
	c.t.Helper()
	var r []any
	err := unhurried(member, func() (err error) {
		r, err = c.c.Call(iface, member, args...)
		return err
	})
	if got := c.answer(r, err); got != want {
		c.t.Errorf("%s%q is answered %q (%v), want %q", member, args, got, err, want)
	}
	var de *harness.DBusError
	if errors.As(err, &de) && iface == harness.V0 && !strings.HasPrefix(de.Text, "invalid request: ") {
		c.t.Errorf("%s%q is refused with %q", member, args, de.Text)
	}
}

// becomes waits until the answer is the one wanted.
func (c *client) becomes(want, iface, member string, args ...any) {
	c.t.Helper()
	var got string
	for end := time.Now().Add(cgtest.Patience(5 * time.Second)); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = c.answer(c.c.Call(iface, member, args...)); got == want {
			return
		}
	}
	c.t.Errorf("%s%q stays %q, want %q", member, args, got, want)
}

// launch starts the program, which is V from then on.
func (c *client) launch(args ...string) *harness.Child {
	c.t.Helper()
	v := c.Launch(nil, append([]string{c.victim}, args...)...)
	c.pid = v.PID
	return v
}

// begin lets the program do what it is there for, and returns what it says and
// how it ends.
func (c *client) begin(v *harness.Child) (string, unix.WaitStatus) {
	c.t.Helper()
	if _, err := v.In.Write([]byte{1}); err != nil {
		c.t.Fatal(err)
	}
	said, err := v.Said(cgtest.Patience(10 * time.Second))
	if err != nil {
		c.t.Errorf("%v: after %q", err, said)
	}
	return said, c.end(v)
}

func (c *client) end(v *harness.Child) unix.WaitStatus {
	c.t.Helper()
	ws, err := v.End(cgtest.Patience(5 * time.Second))
	if err != nil {
		c.t.Error(err)
	}
	return ws
}

// host is what the host's root reads in a cgroup of the client's.
func (c *client) host(want, ctrl, name, file string) {
	c.t.Helper()
	if got := c.w.Read(harness.Find(c.t, ctrl), c.cg+"/"+name, file); got != want {
		c.t.Errorf("%s of %s is %q on the host, want %q", file, name, got, want)
	}
}

// mine is the answer to what only root in a container may.
func (c *client) mine(yes, no string) string {
	if c.root {
		return yes
	}
	return no
}

type (
	list   = []string
	values = map[string]string
)

func conform1(c *client) {
	// Create, and what is there then.
	c.v1("true", "Create", "web", list{}, values{})
	c.v1("false", "Create", "web", list{}, values{})
	c.v1("true", "Create", "web/sub", list{"memory", "pids"}, values{"pids.limit": "7"})
	c.v1("true", "Create", "web/cpu", list{"cpu"}, values{"cpu_share_percent": "50"})
	c.v1("[web]", "ListChildren", "")
	c.v1("[cpu sub]", "ListChildren", "web")
	c.v1("[] 0", "ListTasks", "web")
	c.v1("map[memory.limit:max pids.limit:7]", "GetValue", "web/sub", list{"memory.limit", "pids.limit"})
	c.v1("map[cpu_share_percent:50]", "GetValue", "web/cpu", list{"cpu_share_percent"})
	c.host("7", "pids", "web/sub", "pids.max")

	// Limits, by the names of either version.
	c.v1("", "SetValue", "web", values{"memory.limit": "16M", "pids.limit": "3", "cpus_allowed": "0"})
	c.v1("map[cpus_allowed:0 memory.limit:16777216 pids.limit:3 state:thawed]", "GetValue", "web",
		list{"memory.limit", "pids.limit", "cpus_allowed", "state"})
	c.v1("map[memory.limit_in_bytes:16777216 memory.max:16777216 pids.max:3]", "GetValue", "web",
		list{"memory.limit_in_bytes", "memory.max", "pids.max"})
	c.host("3", "pids", "web", "pids.max")
	c.host("16777216", "memory", "web", "memory.limit_in_bytes")

	// They bind.
	v := c.launch("fork", "9")
	c.v1("", "Move", "web", uint32(c.pid))
	c.v1("[V] 0", "ListTasks", "web")
	if said, _ := c.begin(v); said != "2" {
		c.t.Errorf("%q processes beside the first, want 2", said)
	}
	v = c.launch("eat", "64")
	fd := c.PidFD(c.pid)
	c.v1("", "MoveFd", "web", harness.FD(fd))
	c.Close(fd)
	if said, ws := c.begin(v); said != "" || ws.Signal() != unix.SIGKILL {
		c.t.Errorf("who used more memory than it may: %q, %v", said, ws)
	}
	c.becomes("[] 0", harness.V1, "ListTasks", "web")

	// Freezing, killing, deleting.
	v = c.launch("pause")
	c.v1("", "Move", "web", uint32(c.pid))
	c.v1("", "SetValue", "web", values{"state": "frozen"})
	c.becomes("map[state:frozen]", harness.V1, "GetValue", "web", list{"state"})
	v.In.Close()
	time.Sleep(50 * time.Millisecond)
	c.v1("[V] 0", "ListTasks", "web")
	c.v1("", "SetValue", "web", values{"state": "thawed"})
	c.becomes("map[state:thawed]", harness.V1, "GetValue", "web", list{"state"})
	c.becomes("[] 0", harness.V1, "ListTasks", "web")
	if ws := c.end(v); ws.ExitStatus() != 0 {
		c.t.Errorf("who was frozen and thawed: %v", ws)
	}
	v = c.launch("pause")
	c.v1("", "Move", "web", uint32(c.pid))
	c.v1("", "Kill", "web")
	if ws := c.end(v); ws.Signal() != unix.SIGKILL {
		c.t.Errorf("who was killed: %v", ws)
	}
	c.v1("", "Kill", "web")
	v = c.launch("pause")
	c.v1("", "Move", "web/sub", uint32(c.pid))
	c.v1("Busy", "Delete", "web")
	c.v1("", "DeleteForce", "web")
	c.v1("[]", "ListChildren", "")
	want(c.t, "where the task of a deleted cgroup is", c.where(v), "")
	c.v1("FileNotFound", "Delete", "web")
	if ws := c.end(v); ws.ExitStatus() != 0 {
		c.t.Errorf("who was in a deleted cgroup: %v", ws)
	}

	// Giving away, and back up.
	c.v1("true", "Create", "a/b/given", list{}, values{})
	c.v1(c.mine("", "AccessDenied"), "Chown", "a/b/given", uint32(5), uint32(5))
	v = c.launch("pause")
	c.v1("", "Move", "a/b", uint32(c.pid))
	want(c.t, "where it is", c.where(v), "a/b")
	c.v1("", "Move", "", uint32(c.pid))
	want(c.t, "where it is", c.where(v), "")
	c.end(v)
	c.v1("", "Delete", "a")

	// Refusals.
	c.v1("true", "Create", "e", list{}, values{})
	for _, name := range []string{"..", "../x", "/x", "e//x", "e/", ".", "e/../../x", "a\nb"} {
		c.v1("InvalidArgs", "Create", name, list{}, values{})
	}
	c.v1("FileNotFound", "Create", "x", list{"nosuch"}, values{})
	c.v1("InvalidArgs", "Create", "x", list{"memory"}, values{"memory.limit": "much"})
	c.v1("InvalidArgs", "Create", "x", list{"memory"}, values{"pids.limit": "1"})
	c.v1("[e]", "ListChildren", "")
	c.v1("AccessDenied", "SetValue", "e", values{"nosuch": "1"})
	c.v1("InvalidArgs", "SetValue", "e", values{"pids.limit": "1", "memory.limit": "-5"})
	c.v1("map[pids.limit:max]", "GetValue", "e", list{"pids.limit"})
	c.v1("AccessDenied", "SetValue", "e", values{"cgroup.procs": "0"})
	c.v1(c.mine("AccessDenied", "AccessDenied"), "SetValue", "", values{"pids.limit": "5"})
	c.v1("FileNotFound", "SetValue", "gone", values{"pids.limit": "5"})
	c.v1("FileNotFound", "GetValue", "gone", list{"pids.limit"})
	c.v1("FileNotFound", "ListTasks", "gone")
	c.v1("FileNotFound", "Move", "e", uint32(1<<22-1))
	c.v1("FileNotFound", "Move", "gone", uint32(c.PID))
	c.v1("", "Delete", "e")
}

// where is V's cgroup, by the host, below the client's.
func (c *client) where(v *harness.Child) string {
	c.t.Helper()
	cg := c.w.in(&harness.Proc{HostPID: hostChild(c.t, c.Proc, v.PID)})
	if rest, ok := strings.CutPrefix(cg+"/", c.cg+"/"); ok {
		return strings.TrimSuffix(rest, "/")
	}
	return cg
}

func conform0(c *client) {
	ctrls, err := c.c.V0("ListControllers")
	if err != nil {
		c.t.Fatal(err)
	}
	for _, name := range (list{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids"}) {
		if !slices.Contains(ctrls[0].([]string), name) {
			c.t.Errorf("no controller %s in %q", name, ctrls[0])
		}
	}
	c.v0("-1", "Create", "all", "old")
	c.v0("1", "Create", "all", "old")
	c.v0("-1", "Create", "memory", "old/sub")
	c.v0("[old]", "ListChildren", "memory", "")
	c.v0("[sub]", "ListChildren", "memory", "old")
	c.v0("[]", "GetTasks", "memory", "old")
	c.v0("1024", "GetValue", "cpu", "old", "cpu.shares")
	c.v0("THAWED", "GetValue", "freezer", "old", "freezer.state")
	c.v0("9223372036854771712", "GetValue", "memory", "old/sub", "memory.limit_in_bytes")
	c.v0("max", "GetValue", "pids", "old", "pids.max")

	c.v0("", "SetValue", "memory", "old", "memory.limit_in_bytes", "16M")
	c.v0("16777216", "GetValue", "memory", "old", "memory.limit_in_bytes")
	c.v0("", "SetValue", "pids", "old", "pids.max", "3")
	c.v0("3", "GetValue", "pids", "old", "pids.max")
	c.v0("", "SetValue", "cpuset", "old", "cpuset.cpus", "0")
	c.v0("0", "GetValue", "cpuset", "old", "cpuset.cpus")
	c.v0("", "SetValue", "cpu", "old", "cpu.shares", "2")
	c.v0("2", "GetValue", "cpu", "old", "cpu.shares")
	c.host("3", "pids", "old", "pids.max")
	c.host("16777216", "memory", "old", "memory.limit_in_bytes")

	v := c.launch("fork", "9")
	c.v0("", "MovePid", "all", "old", int32(c.pid))
	c.v0("[V]", "GetTasks", "memory", "old")
	c.v0("V", "GetValue", "memory", "old", "tasks")
	c.v0("old", "GetPidCgroup", "memory", int32(c.pid))
	if said, _ := c.begin(v); said != "2" {
		c.t.Errorf("%q processes beside the first, want 2", said)
	}
	v = c.launch("eat", "64")
	c.v0("", "MovePid", "all", "old", int32(c.pid))
	if said, ws := c.begin(v); said != "" || ws.Signal() != unix.SIGKILL {
		c.t.Errorf("who used more memory than it may: %q, %v", said, ws)
	}
	c.becomes("[]", harness.V0, "GetTasks", "memory", "old")

	v = c.launch("pause")
	c.v0("", "MovePid", "all", "old", int32(c.pid))
	c.v0("", "SetValue", "freezer", "old", "freezer.state", "FROZEN")
	c.becomes("FROZEN", harness.V0, "GetValue", "freezer", "old", "freezer.state")
	v.In.Close()
	time.Sleep(50 * time.Millisecond)
	c.v0("[V]", "GetTasks", "freezer", "old")
	c.v0("", "SetValue", "freezer", "old", "freezer.state", "THAWED")
	c.becomes("THAWED", harness.V0, "GetValue", "freezer", "old", "freezer.state")
	if ws := c.end(v); ws.ExitStatus() != 0 {
		c.t.Errorf("who was frozen and thawed: %v", ws)
	}
	c.becomes("[]", harness.V0, "GetTasks", "memory", "old")

	v = c.launch("pause")
	c.v0("", "MovePid", "all", "old/sub", int32(c.pid))
	c.v0("[V]", "GetTasksRecursive", "memory", "old")
	c.v0("InvalidArgs", "Remove", "all", "old", int32(1))
	c.v0("", "MovePid", "all", "", int32(c.pid))
	want(c.t, "where it is", c.where(v), "")
	c.v0("", "Chmod", "memory", "old", "tasks", int32(0o664))
	c.v0("1", "Remove", "all", "old", int32(1))
	c.v0("-1", "Remove", "all", "old", int32(1))
	c.end(v)

	c.v0("-1", "Create", "all", "e")
	c.v0(c.mine("", "InvalidArgs"), "Chown", "memory", "e", int32(5), int32(5))
	for _, name := range []string{"..", "../x", "e/../../x"} {
		c.v0("InvalidArgs", "Create", "memory", name)
	}
	c.v0("InvalidArgs", "Create", "nosuch", "x")
	c.v0("InvalidArgs", "SetValue", "memory", "e", "nosuch", "1")
	c.v0("InvalidArgs", "SetValue", "memory", "e", "memory.limit_in_bytes", "much")
	c.v0("InvalidArgs", "SetValue", "memory", "e", "tasks", "1")
	c.v0("InvalidArgs", "SetValue", "memory", "gone", "memory.limit_in_bytes", "1M")
	c.v0("InvalidArgs", "SetValue", "memory", "", "memory.limit_in_bytes", "1M")
	c.v0("InvalidArgs", "GetValue", "memory", "gone", "memory.limit_in_bytes")
	for _, ctrls := range (list{"memory,freezer", "all"}) { // one at a time
		c.v0("InvalidArgs", "GetValue", ctrls, "e", "memory.limit_in_bytes")
		c.v0("InvalidArgs", "GetTasks", ctrls, "e")
		c.v0("InvalidArgs", "GetPidCgroup", ctrls, c.PID)
	}
	c.v0("InvalidArgs", "Chown", "memory", "gone", int32(-1), int32(-1))
	c.v0("InvalidArgs", "MovePid", "memory", "gone", c.PID)
	c.v0("InvalidArgs", "MovePid", "memory", "e", int32(1<<22-1))
	c.v0("InvalidArgs", "MovePidAbs", "memory", "/", c.PID)
	c.v0("InvalidArgs", "GetTasks", "memory", "gone")
	c.v0("[e]", "ListChildren", "memory", "")
	c.v0("1", "Remove", "all", "e", int32(1))
}
