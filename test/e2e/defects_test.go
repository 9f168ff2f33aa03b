package e2e_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// The defects of the original daemon, by the numbers under which they were
// written down when its behaviour was recorded. Each is an attack that worked
// on it.

// user is a host user's process in a cgroup, with its connection.
func (w *world) user(id uint32, cg string) (*harness.Proc, *harness.Conn) {
	w.Helper()
	p := w.host(id, cg)
	return p, p.MustDial(w.sock())
}

// scm is an *Scm call in which the caller acts for itself.
func scm(c *harness.Conn, member string, args ...any) error {
	creds := []harness.Cred{c.P.Cred}
	if harness.Credentials(member) == 2 {
		creds = append(creds, c.P.Cred)
	}
	return second(c.Scm(member, creds, args...))
}

// 1. A "/" in a key led out of the cgroup: a user changed its parent's limit,
// and read every file of the host that its uid may read.
func TestKernelDefect1KeyTraversal(t *testing.T) { keyTraversal(t, newWorld) }

func keyTraversal(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("own", 1000, 1000)
	w.Make("own/kid", 1000, 1000)
	w.Make("own/kid/sub", 1000, 1000)
	memory, freezer := harness.Find(t, "memory"), harness.Find(t, "freezer")
	for _, h := range []harness.Hierarchy{memory, freezer} {
		for _, cg := range []string{"own", "own/kid", "own/kid/sub"} {
			// Nothing but the way there stops the user.
			for _, kind := range []string{"memory.*", "freezer.*", "cgroup.freeze"} {
				files, _ := filepath.Glob(w.Dir(h, cg) + "/" + kind)
				for _, f := range files {
					if err := unix.Chown(f, int(w.first()+1000), int(w.first()+1000)); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	_, c := w.user(1000, "own/kid")
	defer c.Close()
	// The same values by an honest name are given and taken.
	asker{t, c}.v0("SetValue", "memory", "sub", "memory.limit_in_bytes", "77000000")
	up := strings.Repeat("../", 12)
	keys := []string{
		"../memory.limit_in_bytes", "../../memory.limit_in_bytes", "/../memory.limit_in_bytes",
		"sub/../../memory.limit_in_bytes", "a/../../memory.limit_in_bytes", "./memory.limit_in_bytes",
		"sub/memory.limit_in_bytes", "//memory.limit_in_bytes", "..", ".", "/", "../tasks", "../cgroup.procs",
		up + "etc/hostname", "/" + up + "etc/hostname", "/etc/hostname", up + "proc/sys/kernel/hostname",
		up + "sys/fs/cgroup/memory/memory.limit_in_bytes",
	}
	attacks := map[string]func() error{}
	for _, key := range keys {
		for _, cg := range []string{"", "sub", w.abs("own/kid"), w.abs("own/kid/sub")} {
			what := fmt.Sprintf("of %q with key %q", cg, key)
			attacks["SetValue "+what] = func() error { return second(c.V0("SetValue", "memory", cg, key, "88000000")) }
			attacks["GetValue "+what] = func() error { return second(c.V0("GetValue", "memory", cg, key)) }
			if strings.HasPrefix(cg, "/") {
				continue
			}
			attacks["SetValueScm "+what] = func() error { return scm(c, "SetValueScm", "memory", cg, key, "88000000") }
			attacks["GetValueScm "+what] = func() error { return scm(c, "GetValueScm", "memory", cg, key) }
			attacks["Chmod "+what] = func() error { return second(c.V0("Chmod", "memory", cg, key, int32(0o666))) }
			attacks["ChmodScm "+what] = func() error { return scm(c, "ChmodScm", "memory", cg, key, int32(0o666)) }
			attacks["CGManager1.SetValue "+what] = func() error {
				return second(c.V1("SetValue", cg, map[string]string{key: "88000000"}))
			}
			attacks["CGManager1.GetValue "+what] = func() error { return second(c.V1("GetValue", cg, []string{key})) }
		}
	}
	attacks["SetValue of the freezer"] = func() error { return second(c.V0("SetValue", "freezer", "", "../freezer.state", "FROZEN")) }
	w.RefusedAll(t, attacks)
}

// 2. Paths were compared without a "/": a client in edA saw and moved tasks of
// edA2.
func TestKernelDefect2PrefixOfAName(t *testing.T) { prefixOfAName(t, newWorld) }

func prefixOfAName(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	for _, uid := range []uint32{0, 1000} {
		name := fmt.Sprint("ed", uid)
		w.Make(name, uid, uid)
		w.Make(name+"/own", uid, uid)
		w.Make(name+"2", uid, uid)
		w.Make(name+"2/own", uid, uid)
		t.Run(fmt.Sprint("uid ", uid), func(t *testing.T) {
			w := w.sub(t)
			v := w.host(uid, name+"2")
			w.watch = []*harness.Proc{v}
			p, c := w.user(uid, name)
			defer c.Close()
			pid := v.PID
			fd := p.PidFD(int(v.PID))
			victims := []harness.Cred{p.Cred, v.Cred}
			attacks := map[string]func() error{
				"GetPidCgroup":    func() error { return second(c.V0("GetPidCgroup", "memory", pid)) },
				"MovePid":         func() error { return second(c.V0("MovePid", "memory", "own", pid)) },
				"MovePid all":     func() error { return second(c.V0("MovePid", "all", "own", pid)) },
				"Move":            func() error { return second(c.V1("Move", "own", uint32(pid))) },
				"MoveFd":          func() error { return second(c.V1("MoveFd", "own", harness.FD(fd))) },
				"GetPidCgroupScm": func() error { return second(c.Scm("GetPidCgroupScm", victims, "memory")) },
				"MovePidScm":      func() error { return second(c.Scm("MovePidScm", victims, "memory", "own")) },
				"GetTasks":        func() error { return second(c.V0("GetTasks", "memory", w.abs(name+"2"))) },
				"ListKeys":        func() error { return second(c.V0("ListKeys", "memory", w.abs(name+"2"))) },
				"GetValue": func() error {
					return second(c.V0("GetValue", "memory", w.abs(name+"2"), "memory.limit_in_bytes"))
				},
				"ListChildren":      func() error { return second(c.V0("ListChildren", "memory", w.abs(name+"2"))) },
				"GetTasksRecursive": func() error { return second(c.V0("GetTasksRecursive", "memory", w.abs(name+"2"))) },
				"SetValue": func() error {
					return second(c.V0("SetValue", "memory", w.abs(name+"2/own"), "memory.limit_in_bytes", "80000000"))
				},
			}
			if uid != 0 { // the kernel does not let it name another process
				maps.DeleteFunc(attacks, func(what string, _ func() error) bool { return strings.HasSuffix(what, "Scm") })
			}
			w.refusedAll(attacks)
			// Its own it moves.
			mine := w.host(uid, name)
			asker{t, c}.v0("MovePid", "memory", "own", mine.PID)
			want(t, "its own task", asker{t, c}.v0("GetPidCgroup", "memory", mine.PID)[0], "own")
		})
	}
}

// 3. ListKeys answered for every cgroup of the host.
func TestKernelDefect3ListKeysUnconfined(t *testing.T) { listKeysUnconfined(t, newWorld) }

func listKeysUnconfined(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("edA", 1000, 1000)
	w.Make("edA/sub", 1000, 1000)
	w.Make("edA2", 1000, 1000)
	_, c := w.user(1000, "edA")
	defer c.Close()
	for _, cg := range []string{"", "sub", w.abs("edA/sub"), w.abs("edA")} {
		if r := (asker{t, c}).v0("ListKeys", "freezer", cg); len(r[0].([][]any)) == 0 {
			t.Errorf("ListKeys %q: nothing", cg)
		}
	}
	attacks := map[string]func() error{}
	for _, ctrl := range []string{"memory", "freezer", "name=systemd", "hugetlb"} {
		for _, cg := range []string{w.abs("edA2"), w.Base, "/", w.abs("edA/../edA2"), "../edA2", ".."} {
			what := fmt.Sprintf("%s %q", ctrl, cg)
			attacks["ListKeys "+what] = func() error { return second(c.V0("ListKeys", ctrl, cg)) }
			if cg == "/" {
				continue // the proxy's own cgroup, which is the requestor's here
			}
			attacks["ListKeysScm "+what] = func() error { return scm(c, "ListKeysScm", ctrl, cg) }
		}
	}
	w.RefusedAll(t, attacks)
}

// 4. Chmod took any mode, setuid and sticky bits included.
func TestKernelDefect4ChmodOfAnyMode(t *testing.T) { chmodOfAnyMode(t, newWorld) }

func chmodOfAnyMode(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("box", 0, 0)
	w.Make("box/sub", 0, 0)
	w.Make("box/sub2", 1000, 1000)
	for _, who := range []struct {
		uid uint32
		cg  string
	}{{0, "sub"}, {1000, "sub2"}} {
		_, c := w.user(who.uid, "box")
		defer c.Close()
		attacks := map[string]func() error{
			"Chmod of all": func() error { return second(c.V0("Chmod", "all", who.cg, "", int32(0o7777))) },
		}
		for _, file := range []string{"", "tasks"} {
			for _, mode := range []int32{0o7777, 0o1000, 0o2755, 0o4755, 0o10644, 0o100644, 0o40755, 4095, -1, -0o777, 1 << 30} {
				attacks[fmt.Sprintf("Chmod %q to %#o", file, mode)] = func() error {
					return second(c.V0("Chmod", "memory", who.cg, file, mode))
				}
				attacks[fmt.Sprintf("ChmodScm %q to %#o", file, mode)] = func() error {
					return scm(c, "ChmodScm", "memory", who.cg, file, mode)
				}
			}
		}
		w.RefusedAll(t, attacks)
		memory := harness.Find(t, "memory")
		for _, mode := range []int32{0, 0o777, 0o750} {
			asker{t, c}.v0("Chmod", "memory", who.cg, "", mode)
			var st unix.Stat_t
			if err := unix.Stat(w.Dir(memory, who.cg), &st); err == nil {
				t.Errorf("%q is not below box", who.cg)
			}
			if err := unix.Stat(w.Dir(memory, "box/"+who.cg), &st); err != nil || int32(st.Mode&0o7777) != mode {
				t.Errorf("mode %o after Chmod to %o (%v)", st.Mode, mode, err)
			}
		}
	}
}

// 5. A client that left after the first kick of an *Scm call leaked the passed
// socket in the daemon, 23 of 23 times.
func TestKernelDefect5ScmLeak(t *testing.T) {
	w := newWorld(t)
	w.Make("box", 1000, 1000)
	p := w.host(1000, "box")
	for i := range 23 {
		for _, leave := range []string{"before the kick", "after it", "the connection", "the socket", "between two"} {
			c := p.MustDial(w.d.Sock)
			member, args := "CreateScm", []any{"memory", "x"}
			if leave == "between two" {
				member, args = "MovePidScm", []any{"memory", ""}
			}
			x, err := c.OpenScm(member, args...)
			if err != nil {
				t.Fatal(err)
			}
			switch leave {
			case "before the kick":
			case "between two":
				if err := x.Kick(p.Cred); err != nil {
					t.Fatal(err)
				}
				fallthrough
			default:
				if d, err := x.Result(); err != nil || string(d.Data) != "1" {
					t.Fatalf("round %d: %q, %v instead of a kick", i, d.Data, err)
				}
			}
			// A datagram socket shows no end of file, and the test keeps it.
			if leave != "the connection" {
				x.Close()
			} else {
				defer x.Close()
			}
			if leave != "the socket" {
				c.Close()
			} else {
				defer c.Close()
			}
		}
	}
	// While 23 of the connections are still there.
	eventually(t, "what was passed is closed", func() bool { return datagramSockets(t, w.d) == 0 })
	if w.Exists(harness.Find(t, "memory"), "box/x") {
		t.Error("a call without a credential was carried out")
	}
}

// datagramSockets counts the daemon's sockets of type SOCK_DGRAM: it has none
// of its own. The type is a column of /proc/PID/net/unix (proc_pid_net(5)).
func datagramSockets(t *testing.T, d *harness.Daemon) int {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", d.PID)
	table, err := os.ReadFile(proc + "net/unix")
	if err != nil {
		t.Fatal(err)
	}
	datagram := map[string]bool{}
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) >= 7 && f[4] == "0002" {
			datagram["socket:["+f[6]+"]"] = true
		}
	}
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink(proc + "fd/" + fd.Name()); err == nil && datagram[to] {
			n++
		}
	}
	return n
}

// 6. Chown forgot cgroup.procs, so that the new owner could not move a process.
func TestKernelDefect6ChownForgetsProcs(t *testing.T) { chownForgetsProcs(t, newWorld) }

func chownForgetsProcs(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("box", 0, 0)
	w.Make("box/plain", 0, 0)
	w.Make("box/scm", 0, 0)
	w.Make("box/new", 0, 0)
	p, c := w.user(0, "box")
	defer c.Close()
	memory := harness.Find(t, "memory")
	limit := func(cg string) string { return w.owner(memory, cg, memory.File("memory.limit_in_bytes")) }
	before := limit("box/plain")
	asker{t, c}.v0("Chown", "all", "plain", int32(1000), int32(1001))
	asker{t, c}.v1("Chown", "new", uint32(1000), uint32(1001))
	if _, err := c.Scm("ChownScm", []harness.Cred{p.Cred, {PID: p.PID, UID: 1000, GID: 1001}}, "all", "scm"); err != nil {
		t.Fatal(err)
	}
	for _, cg := range []string{"box/plain", "box/scm", "box/new"} {
		for _, h := range harness.Hierarchies() {
			if h.Named() && cg == "box/new" {
				continue // where no controller is named, no name= hierarchy is meant
			}
			files := []string{"", "cgroup.procs"}
			if h.V2 {
				files = append(files, "cgroup.threads", "cgroup.subtree_control")
			} else {
				files = append(files, "tasks")
			}
			for _, f := range files {
				want(t, fmt.Sprintf("the owner of %s:%s/%s", h.Name, cg, f), w.owner(h, cg, f), "1000:1001")
			}
		}
		want(t, "the owner of a limit", limit(cg), before)
	}
}

// 7. --max-depth was compared with where the requestor is, not with what it
// wants.
func TestKernelDefect7MaxDepth(t *testing.T) {
	harness.Require(t, "root")
	for _, depth := range []int{16, 5} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			tree := harness.NewTree(t)
			var args []string
			if depth != 16 {
				args = append(args, fmt.Sprint("--max-depth=", depth))
			}
			w := &world{T: t, Tree: tree, d: harness.StartDaemon(t, args...)}
			w.Make("box", 0, 0)
			_, c := w.user(0, "box") // at depth 2
			defer c.Close()
			levels := func(n int) string { return strings.TrimSuffix(strings.Repeat("d/", n), "/") }
			for _, n := range []int{depth - 1, depth, depth + 20} {
				for _, ctrl := range []string{"memory", "all", "hugetlb"} {
					w.refused(fmt.Sprint("Create ", ctrl, n), func() error { return second(c.V0("Create", ctrl, levels(n))) })
				}
				w.refused("CreateScm", func() error { return scm(c, "CreateScm", "memory", levels(n)) })
				w.refused("CGManager1.Create", func() error {
					return second(c.V1("Create", levels(n), []string{}, map[string]string{}))
				})
			}
			asker{t, c}.v0("Create", "memory", levels(depth-2))
			if !w.Exists(harness.Find(t, "memory"), "box/"+levels(depth-2)) {
				t.Error("the deepest that is allowed was not created")
			}
			// Level by level does not lead further either.
			w.refused("one more", func() error { return second(c.V0("Create", "memory", levels(depth-2)+"/x")) })
			p, err := c.V0("Remove", "memory", "d", int32(1))
			if err != nil {
				t.Fatal(p, err)
			}
		})
	}
}

// 8. SetValue misspelt two of the keys that it meant to refuse.
func TestKernelDefect8SetValueKeys(t *testing.T) { setValueKeys(t, newWorld) }

func setValueKeys(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("own", 0, 0)
	w.Make("own/sub", 0, 0)
	w.Make("user", 1000, 1000)
	w.Make("user/sub", 1000, 1000)
	v := w.host(1000, "user/sub")
	w.watch = []*harness.Proc{v}
	for _, who := range []struct {
		uid uint32
		cg  string
	}{{0, "own"}, {1000, "user"}} {
		_, c := w.user(who.uid, who.cg)
		defer c.Close()
		attacks := map[string]func() error{
			// Not of the root either, unless from there.
			"release_agent of the root": func() error {
				return second(c.V0("SetValue", "name=systemd", "/", "release_agent", "/bin/false"))
			},
		}
		for _, key := range []string{
			"release_agent", "notify_on_release", "release-agent", "notify-on-release",
			"tasks", "cgroup.procs", "cgroup.event_control", "cgroup.clone_children", "memory.force_empty", "memory.pressure_level",
		} {
			for _, slash := range []string{"", "/"} {
				attacks["SetValue "+slash+key] = func() error { return second(c.V0("SetValue", "memory", "sub", slash+key, "1")) }
				attacks["SetValueScm "+slash+key] = func() error { return scm(c, "SetValueScm", "memory", "sub", slash+key, "1") }
			}
			attacks["CGManager1.SetValue "+key] = func() error {
				return second(c.V1("SetValue", "sub", map[string]string{key: "1"}))
			}
		}
		for _, key := range []string{"cgroup.procs", "cgroup.threads", "cgroup.type", "cgroup.subtree_control", "cgroup.kill", "cgroup.freeze.x", "cgroup.pressure"} {
			attacks["SetValue on v2 "+key] = func() error { return second(c.V0("SetValue", "hugetlb", "sub", key, "1")) }
		}
		w.RefusedAll(t, attacks)
	}
}

// CVE-2014-1425: the original let limits be changed above one's own cgroup.
func TestKernelCVE20141425LimitsAbove(t *testing.T) { limitsAbove(t, newWorld) }

func limitsAbove(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	b := w.box("c1")
	w.Make("c1/kid", w.uid(b.Proc), w.gid(b.Proc))
	w.Make("user", 1000, 1000)
	w.Make("user/own", 1000, 1000)
	w.Make("user/own/kid", 1000, 1000)
	memory, pids := harness.Find(t, "memory"), harness.Find(t, "pids")
	own := func(cg string, uid uint32) {
		// Whoever made the container was careless: the limit files are its root's.
		for h, f := range map[harness.Hierarchy]string{memory: "memory.limit_in_bytes", pids: "pids.max"} {
			if err := unix.Chown(w.Dir(h, cg)+"/"+f, int(w.first()+uid), int(w.first()+uid)); err != nil {
				t.Fatal(err)
			}
		}
	}
	own("c1", w.uid(b.Proc))
	own("c1/kid", w.uid(b.Proc))
	own("user", 1000)
	own("user/own", 1000)
	own("user/own/kid", 1000)
	w.Write(pids, "c1", "pids.max", "100")
	w.Write(pids, "user", "pids.max", "100")

	above := func(t *testing.T, c *harness.Conn, names []string) {
		attacks := map[string]func() error{}
		for _, name := range names {
			for what, attack := range map[string]func() error{
				"SetValue memory":    func() error { return second(c.V0("SetValue", "memory", name, "memory.limit_in_bytes", "-1")) },
				"SetValue pids":      func() error { return second(c.V0("SetValue", "pids", name, "pids.max", "max")) },
				"SetValueScm":        func() error { return scm(c, "SetValueScm", "pids", name, "pids.max", "max") },
				"SetValue key":       func() error { return second(c.V0("SetValue", "pids", name, "pids.limit", "max")) },
				"CGManager1":         func() error { return second(c.V1("SetValue", name, map[string]string{"pids.limit": "max"})) },
				"CGManager1, memory": func() error { return second(c.V1("SetValue", name, map[string]string{"memory.limit": "max"})) },
				"CGManager1.Create": func() error {
					return second(c.V1("Create", name, []string{"pids"}, map[string]string{"pids.limit": "max"}))
				},
				"Chown":  func() error { return second(c.V0("Chown", "pids", name, int32(0), int32(0))) },
				"Remove": func() error { return second(c.V0("Remove", "pids", name, int32(1))) },
			} {
				switch {
				case name == "" && (what == "Chown" || what == "Remove"):
				case strings.HasPrefix(name, "/") && what == "Remove":
					// For Remove that is a name below, and what is not there counts as removed.
				default:
					attacks[fmt.Sprintf("%s of %q", what, name)] = attack
				}
			}
		}
		w.RefusedAll(t, attacks)
	}
	t.Run("container root", func(t *testing.T) {
		c := b.MustDial(w.sock())
		defer c.Close()
		asker{t, c}.v0("SetValue", "pids", "kid", "pids.max", "50")
		// Its own cgroup is what others confined it with.
		above(t, c, []string{"", "..", "../", "kid/../..", w.Base, w.abs("c1"), w.abs("user"), "../user"})
	})
	t.Run("root of a container inside", func(t *testing.T) {
		in := b.box("kid2")
		own("c1/kid2", w.uid(in.Proc))
		c := in.MustDial(w.sock())
		defer c.Close()
		above(t, c, []string{"", "..", w.abs("c1/kid2"), w.abs("c1"), "../.."})
	})
	t.Run("user", func(t *testing.T) {
		_, c := w.user(1000, "user/own/kid")
		defer c.Close()
		above(t, c, []string{"..", "../..", w.abs("user"), w.abs("user/own"), "/", "/user", w.abs("user/own/kid") + "/.."})
	})
	t.Run("user by a move", func(t *testing.T) {
		// Confined below, it may not move itself to where it could.
		p, c := w.user(1000, "user/own/kid")
		defer c.Close()
		w := w.sub(t)
		for _, name := range []string{w.abs("user"), "..", "/", w.abs("user/own")} {
			w.refused("MovePid", func() error { return second(c.V0("MovePid", "pids", name, p.PID)) })
			w.refused("MovePidAbs", func() error { return second(c.V0("MovePidAbs", "pids", name, p.PID)) })
			w.refused("Move", func() error { return second(c.V1("Move", name, uint32(p.PID))) })
		}
	})
}
