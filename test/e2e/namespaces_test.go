package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cgmanager/test/harness"
)

// A container's root parcels out its cgroup by plain calls, one, two and three
// namespaces deep, and the host sees what it means.
func TestKernelNamespacesPlain(t *testing.T) {
	for level := 1; level <= 3; level++ {
		t.Run(fmt.Sprint("level ", level), func(t *testing.T) {
			w := newWorld(t)
			b := w.boxAt(level)
			t.Run("CGManager1", func(t *testing.T) { plainCGManager1(w.sub(t), b) })
			t.Run("cgmanager0_0", func(t *testing.T) { plainCGManager0(w.sub(t), b) })
		})
	}
}

func plainCGManager1(w *world, b *box) {
	t := w.T
	memory, pids := harness.Find(t, "memory"), harness.Find(t, "pids")
	c := b.MustDial(w.d.Sock)
	defer c.Close()
	a := asker{t, c}
	web := b.cg + "/web"
	rootID, userID := fmt.Sprintf("%d:%[1]d", b.first), fmt.Sprintf("%d:%[1]d", b.first+1000)

	want(t, "created", a.v1("Create", "web", []string{}, map[string]string{"pids.limit": "50"})[0], true)
	for _, h := range controllers() {
		want(t, h.Name+": owner of the new cgroup", w.owner(h, web, ""), rootID)
		want(t, h.Name+": owner of its tasks", w.owner(h, web, h.TasksFile()), rootID)
	}
	want(t, "pids.max", w.Read(pids, web, "pids.max"), "50")
	want(t, "created again", a.v1("Create", "web", []string{}, map[string]string{})[0], false)
	want(t, "children", a.v1("ListChildren", "")[0], []string{"web"})

	a.v1("Chown", "web", uint32(1000), uint32(1000))
	for _, h := range controllers() {
		want(t, h.Name+": owner after Chown", w.owner(h, web, ""), userID)
		want(t, h.Name+": owner of cgroup.procs after Chown", w.owner(h, web, "cgroup.procs"), userID)
	}
	want(t, "owner of the limit", w.owner(memory, web, memory.File("memory.limit_in_bytes")), rootID)

	a.v1("SetValue", "web", map[string]string{"memory.limit": "64M"})
	want(t, "memory.limit_in_bytes", w.Read(memory, web, "memory.limit_in_bytes"), "67108864")
	want(t, "values", a.v1("GetValue", "web", []string{"memory.limit", "pids.limit"})[0],
		map[string]string{"memory.limit": "67108864", "pids.limit": "50"})

	// The user that owns web moves itself, root moves another of that user's.
	u := b.user(1000)
	uc := u.MustDial(w.d.Sock)
	asker{t, uc}.v1("Move", "web", uint32(u.PID))
	uc.Close()
	want(t, "the user", w.in(u), web)
	u2 := b.user(1000)
	fd := b.PidFD(int(u2.PID))
	a.v1("MoveFd", "web", harness.FD(fd))
	b.Close(fd)
	want(t, "the other", w.in(u2), web)

	// Pids come back as the container's own; what it cannot see is counted.
	stranger := w.host(1000, ".")
	w.PlaceIn(stranger, web, controllers()...)
	pidsIn := []uint32{uint32(u.PID), uint32(u2.PID)}
	slices.Sort(pidsIn)
	want(t, "tasks", a.v1("ListTasks", "web"), []any{pidsIn, uint32(1)})
	want(t, "tasks of the host", strings.Count(w.Read(pids, web, "cgroup.procs"), "\n"), 2)
	// One that is not the container's cannot be killed with the rest.
	w.refused("kill a host process", func() error { return second(c.V1("Kill", "web")) })
	if !u.Alive() || !stranger.Alive() {
		t.Error("a refused Kill killed")
	}
	w.Place(stranger, ".")

	a.v1("Kill", "web")
	if !u.Dead(5*time.Second) || !u2.Dead(5*time.Second) {
		t.Error("Kill left a process")
	}
	if !stranger.Alive() || !b.Alive() {
		t.Error("Kill reached further")
	}
	a.v1("Delete", "web")
	for _, h := range controllers() {
		if w.Exists(h, web) {
			t.Errorf("%s: web is still there", h.Name)
		}
	}
	w.refused("delete what is gone", func() error { return second(c.V1("Delete", "web")) })
	w.refused("a limit of one's own", func() error {
		return second(c.V1("SetValue", "", map[string]string{"memory.limit": "max"}))
	})
}

func plainCGManager0(w *world, b *box) {
	t := w.T
	memory := harness.Find(t, "memory")
	c := b.MustDial(w.d.Sock)
	defer c.Close()
	a := asker{t, c}
	web := b.cg + "/web"
	userID := fmt.Sprintf("%d:%[1]d", b.first+1000)

	ctrls, _ := a.v0("ListControllers")[0].([]string)
	if !slices.Contains(ctrls, "memory") || !slices.Contains(ctrls, "pids") {
		t.Errorf("controllers are %q", ctrls)
	}
	want(t, "Create", a.v0("Create", "all", "web")[0], int32(-1))
	want(t, "Create again", a.v0("Create", "all", "web")[0], int32(1))
	a.v0("Chown", "all", "web", int32(1000), int32(1000))
	for _, h := range controllers() {
		want(t, h.Name+": owner after Chown", w.owner(h, web, ""), userID)
		want(t, h.Name+": owner of its tasks", w.owner(h, web, h.TasksFile()), userID)
	}
	a.v0("Chmod", "memory", "web", "tasks", int32(0o664))
	a.v0("SetValue", "memory", "web", "memory.limit_in_bytes", "32M")
	want(t, "memory.limit_in_bytes", w.Read(memory, web, "memory.limit_in_bytes"), "33554432")
	want(t, "GetValue", a.v0("GetValue", "memory", "web", "memory.limit_in_bytes")[0], "33554432")

	u := b.user(1000)
	a.v0("MovePid", "all", "web", u.PID)
	want(t, "the user", w.in(u), web)
	want(t, "GetPidCgroup", a.v0("GetPidCgroup", "memory", u.PID)[0], "web")
	// The old interface tells threads.
	wantThreads(t, "GetTasks", u, b, func() any { return a.v0("GetTasks", "memory", "web")[0] })
	rec, _ := a.v0("GetTasksRecursive", "memory", "")[0].([]int32)
	if !slices.Contains(rec, u.PID) || !slices.Contains(rec, 1) {
		t.Errorf("GetTasksRecursive is %v", rec)
	}
	want(t, "ListChildren", a.v0("ListChildren", "memory", "")[0], []string{"web"})
	keys, _ := a.v0("ListKeys", "memory", "web")[0].([][]any)
	if !slices.ContainsFunc(keys, func(k []any) bool {
		return k[0] == memory.TasksFile() && k[1] == uint32(1000) && k[2] == uint32(1000) && k[3] == uint32(0o100664)
	}) {
		t.Errorf("ListKeys has no tasks of 1000: %v", keys)
	}

	w.refused("MovePidAbs out of the container", func() error {
		return second(c.V0("MovePidAbs", "memory", "/", u.PID))
	})
	w.refused("GetTasks of the container around", func() error {
		return second(c.V0("GetTasks", "memory", "/"+filepath.Dir(b.cg)))
	})

	a.v0("MovePid", "all", "", u.PID)
	want(t, "the user, moved back", w.in(u), b.cg)
	want(t, "Remove", a.v0("Remove", "all", "web", int32(1))[0], int32(1))
	want(t, "Remove again", a.v0("Remove", "all", "web", int32(1))[0], int32(-1))

	// RemoveOnEmpty and Prune: gone with the last task, or because there is
	// none.
	a.v0("Create", "all", "auto")
	a.v0("Create", "all", "idle")
	a.v0("MovePid", "all", "auto", u.PID)
	a.v0("RemoveOnEmpty", "all", "auto")
	a.v0("Prune", "all", "idle")
	if !w.Exists(memory, b.cg+"/auto") {
		t.Error("RemoveOnEmpty removed a cgroup with a task")
	}
	u.Stop()
	for _, h := range controllers() {
		for _, cg := range []string{"auto", "idle"} {
			eventually(t, h.Name+": "+cg+" removed", func() bool { return !w.Exists(h, b.cg+"/"+cg) })
		}
	}
}

// threads returns the numbers of p's threads in b's pid namespace, sorted.
func threads(t *testing.T, p *harness.Proc, b *box) []int32 {
	t.Helper()
	var tids []int32
	for _, ns := range p.Threads() {
		tids = append(tids, ns[b.level()])
	}
	slices.Sort(tids)
	return tids
}

// wantThreads compares an answer with p's threads, once those were the same before and
// after it: Go starts threads as it likes.
func wantThreads(t *testing.T, what string, p *harness.Proc, b *box, ask func() any) {
	t.Helper()
	var before, got []int32
	eventually(t, what+": no thread is new meanwhile", func() bool {
		before = threads(t, p, b)
		got, _ = ask().([]int32)
		return slices.Equal(before, threads(t, p, b))
	})
	slices.Sort(got)
	want(t, what, got, before)
}

// The same by the sixteen *Scm calls, where a process acts for itself.
func TestKernelNamespacesScm(t *testing.T) {
	for level := 1; level <= 3; level++ {
		t.Run(fmt.Sprint("level ", level), func(t *testing.T) {
			w := newWorld(t)
			b := w.boxAt(level)
			scmCalls(w, b, b)
		})
	}
}

// And where the root of the container around acts for it, as a proxy does.
func TestKernelNamespacesScmProxy(t *testing.T) {
	w := newWorld(t)
	outer := w.box("c1")
	inner := outer.box("c2")
	innermost := inner.box("c3")
	t.Run("level 1 for level 2", func(t *testing.T) { scmCalls(w.sub(t), outer, inner) })
	t.Run("level 1 for level 3", func(t *testing.T) { scmCalls(w.sub(t), outer, innermost) })
	t.Run("level 2 for level 3", func(t *testing.T) { scmCalls(w.sub(t), inner, innermost) })
}

// scmCalls makes all *Scm calls with p as the peer, acting for the root of b.
func scmCalls(w *world, p, b *box) {
	t := w.T
	memory := harness.Find(t, "memory")
	c := p.MustDial(w.d.Sock)
	defer c.Close()
	me := p.sees(b.Proc)
	u := b.user(1000)
	victim := p.sees(u)
	web := b.cg + "/web"
	scm := func(member string, creds []harness.Cred, args ...any) any {
		t.Helper()
		r, err := c.Scm(member, creds, args...)
		if err != nil {
			t.Fatalf("%s%q: %v", member, args, err)
		}
		return r
	}
	for1 := []harness.Cred{me}
	for2 := []harness.Cred{me, victim}

	want(t, "CreateScm", scm("CreateScm", for1, "all", "web"), "1")
	want(t, "CreateScm again", scm("CreateScm", for1, "all", "web"), "2")
	want(t, "owner", w.owner(memory, web, ""), fmt.Sprintf("%d:%[1]d", b.first))
	owner := harness.Cred{PID: me.PID, UID: victim.UID, GID: victim.GID}
	want(t, "ChownScm", scm("ChownScm", []harness.Cred{me, owner}, "all", "web"), "1")
	for _, h := range controllers() {
		want(t, h.Name+": owner after ChownScm", w.owner(h, web, h.TasksFile()), fmt.Sprintf("%d:%[1]d", b.first+1000))
	}
	want(t, "ChmodScm", scm("ChmodScm", for1, "memory", "web", "tasks", int32(0o660)), "1")
	want(t, "SetValueScm", scm("SetValueScm", for1, "memory", "web", "memory.limit_in_bytes", "48M"), "1")
	want(t, "memory.limit_in_bytes", w.Read(memory, web, "memory.limit_in_bytes"), "50331648")
	want(t, "GetValueScm", scm("GetValueScm", for1, "memory", "web", "memory.limit_in_bytes"), "50331648")
	want(t, "MovePidScm", scm("MovePidScm", for2, "all", "web"), "1")
	want(t, "the victim", w.in(u), web)
	want(t, "GetPidCgroupScm", scm("GetPidCgroupScm", for2, "memory"), "web")
	abs := "/" + strings.TrimPrefix(web, p.cg+"/")
	want(t, "GetPidCgroupAbsScm", scm("GetPidCgroupAbsScm", for2, "memory"), abs)
	wantThreads(t, "GetTasksScm", u, p, func() any { return scm("GetTasksScm", for1, "memory", "web") })
	rec, _ := scm("GetTasksRecursiveScm", for1, "memory", "").([]int32)
	if !slices.Contains(rec, victim.PID) || !slices.Contains(rec, me.PID) {
		t.Errorf("GetTasksRecursiveScm is %v", rec)
	}
	want(t, "CreateScm below", scm("CreateScm", for1, "memory", "web/k1"), "1")
	want(t, "ListChildrenScm", scm("ListChildrenScm", for1, "memory", "web"), []string{"k1"})
	keys, _ := scm("ListKeysScm", for1, "memory", "web").([]string)
	if i := slices.Index(keys, memory.TasksFile()); i < 0 || len(keys) < i+4 {
		t.Errorf("ListKeysScm is %q", keys)
	} else {
		id := fmt.Sprint(b.first + 1000)
		want(t, "ListKeysScm of tasks", keys[i+1:i+4], []string{id, id, fmt.Sprint(0o100660)})
	}
	if p == b {
		w.refused("MovePidAbsScm for itself to the host's root", func() error {
			return second(c.Scm("MovePidAbsScm", for2, "memory", "/../.."))
		})
	} else {
		// A proxy of another container lets root inside out of nothing (clause 9).
		w.refused("MovePidAbsScm", func() error {
			return second(c.Scm("MovePidAbsScm", for2, "memory", "/"))
		})
		w.refused("MovePidAbsScm above the proxy", func() error {
			return second(c.Scm("MovePidAbsScm", for2, "memory", "/.."))
		})
	}
	want(t, "RemoveOnEmptyScm", scm("RemoveOnEmptyScm", for1, "all", "web"), "1")
	if !w.Exists(memory, web) {
		t.Error("RemoveOnEmptyScm removed a cgroup with a task")
	}
	want(t, "RemoveScm of a child", scm("RemoveScm", for1, "memory", "web/k1", int32(0)), "2")
	u.Stop()
	for _, h := range controllers() {
		eventually(t, h.Name+": web removed", func() bool { return !w.Exists(h, web) })
	}
	want(t, "RemoveScm of what is gone", scm("RemoveScm", for1, "all", "web", int32(1)), "1")
	want(t, "CreateScm", scm("CreateScm", for1, "all", "idle"), "1")
	want(t, "PruneScm", scm("PruneScm", for1, "all", "idle"), "1")
	for _, h := range controllers() {
		eventually(t, h.Name+": idle removed", func() bool { return !w.Exists(h, b.cg+"/idle") })
	}
}

// The uid 1000 of a container is not the uid 1000 of the host, nor that of the
// container around.
func TestKernelNamespacesUIDs(t *testing.T) { foreignUIDs(t, newWorld) }

func foreignUIDs(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	memory := harness.Find(t, "memory")
	outer := w.box("c1")
	inner := outer.box("c2")
	inside := inner.user(1000)
	outside := w.host(1000, inner.cg)
	between := outer.user(1000)
	w.Place(between, inner.cg)

	// One cgroup each in the same container, all next to each other.
	for name, p := range map[string]*harness.Proc{"inside": inside, "outside": outside, "between": between} {
		w.Make(inner.cg+"/"+name, w.uid(p), w.gid(p))
	}
	for name, p := range map[string]*harness.Proc{"inside": inside, "outside": outside, "between": between} {
		c := p.MustDial(w.sock())
		a := asker{t, c}
		a.v1("Create", name+"/own", []string{"memory"}, map[string]string{"memory.limit": "1M"})
		want(t, name+": owner", w.owner(memory, inner.cg+"/"+name+"/own", ""), fmt.Sprintf("%d:%d", w.uid(p), w.gid(p)))
		for _, other := range []string{"inside", "outside", "between"} {
			if other == name {
				continue
			}
			w.refused(name+" creates in that of "+other, func() error {
				return second(c.V1("Create", other+"/x", []string{"memory"}, map[string]string{}))
			})
			w.refused(name+" moves itself to that of "+other, func() error {
				return second(c.V1("Move", other, uint32(p.PID)))
			})
			w.refused(name+" changes the mode of that of "+other, func() error {
				return second(c.V0("Chmod", "memory", other, "", int32(0o777)))
			})
		}
		c.Close()
	}
	// Root of the inner container has nothing over an owner it does not map.
	c := inner.MustDial(w.sock())
	defer c.Close()
	for _, other := range []string{"outside", "between"} {
		w.refused("root creates in that of "+other, func() error {
			return second(c.V1("Create", other+"/x", []string{"memory"}, map[string]string{}))
		})
		w.refused("root chowns that of "+other, func() error {
			return second(c.V1("Chown", other, uint32(0), uint32(0)))
		})
	}
	w.refused("root chowns to an id that it has not", func() error {
		return second(c.V1("Chown", "inside", uint32(50000), uint32(0)))
	})
	w.refused("root kills tasks of others", func() error { return second(c.V1("Kill", "")) })
}

// The rights of whoever connected do not go with the socket.
func TestKernelNamespacesPassedSocket(t *testing.T) { passedSocket(t, newWorld) }

func passedSocket(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("plain", 0, 0)
	w.Make("jail", 0, 0)
	w.Make("jail/hosts", 0, 0)
	w.Make("jail/hosts/target", 0, 0)
	root := w.host(0, ".")
	user := w.host(1000, "jail")
	b := w.box("c1")
	w.Make("c1/hosts", 0, 0)
	w.Make("c1/hosts/target", 0, 0)

	// Root itself may do all of it.
	pids := harness.Find(t, "pids")
	for _, cg := range []string{"jail", "jail/hosts/target", "c1/hosts/target"} {
		if err := os.Chown(w.Dir(pids, cg)+"/pids.max", int(w.first()), int(w.first())); err != nil {
			t.Fatal(err)
		}
	}
	c := root.MustDial(w.sock())
	defer c.Close()
	own := asker{t, c}
	own.v1("SetValue", "jail", map[string]string{"pids.limit": "400"})
	own.v0("MovePidAbs", "memory", w.abs("plain"), root.PID)
	own.v0("MovePidAbs", "memory", w.abs(""), root.PID)

	for name, p := range map[string]*harness.Proc{"user": user, "container": b.Proc} {
		passed := c.Give(p)
		for what, attack := range map[string]func() error{
			"a limit of its own": func() error {
				return second(passed.V1("SetValue", "", map[string]string{"pids.limit": "max"}))
			},
			"a limit of the host's": func() error {
				return second(passed.V1("SetValue", "hosts/target", map[string]string{"pids.limit": "max"}))
			},
			"leaving":               func() error { return second(passed.V0("MovePidAbs", "memory", "/", p.PID)) },
			"leaving for the plain": func() error { return second(passed.V0("MovePidAbs", "memory", w.abs("plain"), p.PID)) },
			"creating in the host's": func() error {
				return second(passed.V1("Create", "hosts/target/x", []string{}, map[string]string{}))
			},
			"removing the host's":  func() error { return second(passed.V1("Delete", "hosts/target")) },
			"moving to the host's": func() error { return second(passed.V1("Move", "hosts/target", uint32(p.PID))) },
			"mode":                 func() error { return second(passed.V0("Chmod", "memory", "hosts/target", "", int32(0o777))) },
			"owner": func() error {
				return second(passed.V1("Chown", "hosts/target", p.UID, p.GID))
			},
			"a task of root's": func() error {
				return second(passed.V1("Move", "", uint32(root.PID)))
			},
			"an *Scm call": func() error {
				return second(passed.Scm("CreateScm", []harness.Cred{p.Cred}, "memory", "hosts/target/x"))
			},
		} {
			w.refused(name+": "+what, attack)
		}
		passed.Close()
	}

	// The other way round: root sends over a user's connection, and gets no
	// more than the user.
	uc := user.MustDial(w.sock())
	w.refused("root over a user's connection", func() error {
		byRoot := uc.Give(root)
		defer byRoot.Close()
		return second(byRoot.V1("SetValue", "jail", map[string]string{"pids.limit": "max"}))
	})
	uc.Close()

	// Whoever connected is dead: nobody can be judged in its place.
	dead := w.host(0, ".")
	left := dead.MustDial(w.sock()).Give(b.Proc)
	dead.Stop()
	w.refused("over a dead process's connection", func() error {
		return second(left.V1("Create", "x", []string{}, map[string]string{}))
	})
	left.Close()
}

// A container that is not placed in a hierarchy has no rights there.
func TestKernelNamespacesNotPlaced(t *testing.T) {
	w := newWorld(t)
	pids := harness.Find(t, "pids")
	p := harness.Start(t, boxSpec(0))
	var others []harness.Hierarchy
	for _, h := range harness.Hierarchies() {
		if h.Name != pids.Name {
			others = append(others, h)
		}
	}
	w.MakeIn("c1", p.HostUID, p.HostGID, others...)
	w.PlaceIn(p, "c1", others...)
	w.PlaceTop(p, pids)
	// Something there belongs to it all the same.
	w.MakeIn("mine", p.HostUID, p.HostGID, pids)
	mine := strings.TrimPrefix(w.Path("mine"), "/")
	want(t, "its cgroup of pids", p.Cgroups()[pids.Name], "/")

	c := p.MustDial(w.d.Sock)
	defer c.Close()
	w.refusedAll(map[string]func() error{
		"create":            func() error { return second(c.V1("Create", mine+"/x", []string{"pids"}, map[string]string{})) },
		"create at the top": func() error { return second(c.V1("Create", "cgmtest-top", []string{"pids"}, map[string]string{})) },
		"create everywhere": func() error { return second(c.V1("Create", "web", []string{}, map[string]string{})) },
		"create (old)":      func() error { return second(c.V0("Create", "pids", mine+"/x")) },
		"set":               func() error { return second(c.V1("SetValue", mine, map[string]string{"pids.limit": "7"})) },
		"set (old)":         func() error { return second(c.V0("SetValue", "pids", mine, "pids.max", "7")) },
		"get":               func() error { return second(c.V1("GetValue", mine, []string{"pids.limit"})) },
		"get (old)":         func() error { return second(c.V0("GetValue", "pids", mine, "pids.max")) },
		"list":              func() error { return second(c.V0("ListChildren", "pids", "")) },
		"tasks":             func() error { return second(c.V0("GetTasks", "pids", mine)) },
		"move":              func() error { return second(c.V0("MovePid", "pids", mine, p.PID)) },
		"remove":            func() error { return second(c.V0("Remove", "pids", mine, int32(1))) },
		"delete":            func() error { return second(c.V1("Delete", mine)) },
		"chown":             func() error { return second(c.V0("Chown", "pids", mine, int32(0), int32(0))) },
		"chmod":             func() error { return second(c.V0("Chmod", "pids", mine, "", int32(0o777))) },
		"keys":              func() error { return second(c.V0("ListKeys", "pids", mine)) },
		"*Scm": func() error {
			return second(c.Scm("CreateScm", []harness.Cred{p.Cred}, "pids", mine+"/x"))
		},
	})
	// Nor has uid 0 of a container that has a pid namespace alone, although
	// everything in the hierarchy is its uid's.
	w.MakeIn("hosts", 0, 0, pids)
	priv := harness.Start(t, harness.Spec{PIDNS: true})
	w.MakeIn("c2", 0, 0, others...)
	w.PlaceIn(priv, "c2", others...)
	w.PlaceTop(priv, pids)
	pc := priv.MustDial(w.d.Sock)
	defer pc.Close()
	hosts := strings.TrimPrefix(w.Path("hosts"), "/")
	for what, attack := range map[string]func() error{
		"create": func() error { return second(pc.V1("Create", hosts+"/x", []string{"pids"}, map[string]string{})) },
		"set":    func() error { return second(pc.V1("SetValue", hosts, map[string]string{"pids.limit": "7"})) },
		"get":    func() error { return second(pc.V1("GetValue", hosts, []string{"pids.limit"})) },
		"move":   func() error { return second(pc.V0("MovePid", "pids", hosts, priv.PID)) },
		"delete": func() error { return second(pc.V1("Delete", hosts)) },
		"chown":  func() error { return second(pc.V0("Chown", "pids", hosts, int32(1000), int32(1000))) },
		"list":   func() error { return second(pc.V0("ListChildren", "pids", "")) },
		"kill":   func() error { return second(pc.V1("Kill", hosts)) },
	} {
		w.refused("privileged container: "+what, attack)
	}

	// Where it is placed, it has its rights.
	if memory := harness.Find(t, "memory"); memory != pids {
		want(t, "created", asker{t, c}.v1("Create", "web", []string{"memory"}, map[string]string{})[0], true)
		want(t, "its own", w.Exists(memory, "c1/web"), true)
	}
}

// A process in a user namespace without a map is nobody.
func TestKernelNamespacesUnmapped(t *testing.T) { unmapped(t, newWorld) }

func unmapped(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("c1", 0, 0)
	w.Make("c1/sub", 0, 0)
	// To the kernel it still is uid 0 of the host.
	p := w.start(harness.Spec{UserNS: true, PIDNS: true, KeepIDs: true, SysAdmin: true})
	want(t, "its uid outside", w.uid(p), uint32(0))
	want(t, "its uid inside", p.UID, uint32(65534))
	w.Place(p, "c1")
	c, err := p.DialAs(w.sock(), "") // it cannot name an identity
	if err != nil {
		c, err = dialEmpty(p, w.sock())
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w.refusedAll(map[string]func() error{
		"create": func() error { return second(c.V1("Create", "x", []string{}, map[string]string{})) },
		"set":    func() error { return second(c.V1("SetValue", "sub", map[string]string{"pids.limit": "7"})) },
		"move":   func() error { return second(c.V1("Move", "sub", uint32(p.PID))) },
		"kill":   func() error { return second(c.V1("Kill", "")) },
		"delete": func() error { return second(c.V1("Delete", "sub")) },
		"chown":  func() error { return second(c.V1("Chown", "sub", uint32(0), uint32(0))) },
		"escape": func() error { return second(c.V0("MovePidAbs", "memory", "/", p.PID)) },
		"chmod":  func() error { return second(c.V0("Chmod", "memory", "sub", "", int32(0o777))) },
	})
}

func dialEmpty(p *harness.Proc, sock string) (*harness.Conn, error) {
	return p.DialAs(sock, "\r\nDATA")
}

// The root of a container without a user namespace is uid 0, and still not the
// host's root.
func TestKernelNamespacesPrivilegedContainer(t *testing.T) { privilegedContainer(t, newWorld) }

func privilegedContainer(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("plain", 0, 0)
	p := w.start(harness.Spec{PIDNS: true})
	b := w.placed(p, "c1")
	want(t, "its uid", w.uid(b.Proc), uint32(0))
	c := b.MustDial(w.sock())
	defer c.Close()
	a := asker{t, c}
	a.v1("Create", "web", []string{}, map[string]string{"pids.limit": "9"})
	u := b.user(1000)
	a.v1("Move", "web", uint32(u.PID))
	want(t, "the user", w.in(u), "c1/web")
	w.refusedAll(map[string]func() error{
		"its own limit":     func() error { return second(c.V1("SetValue", "", map[string]string{"pids.limit": "max"})) },
		"leaving":           func() error { return second(c.V0("MovePidAbs", "memory", "/", p.PID)) },
		"leaving for plain": func() error { return second(c.V0("MovePidAbs", "memory", w.abs("plain"), p.PID)) },
		"absolute name":     func() error { return second(c.V0("GetValue", "memory", w.abs("plain"), "memory.limit_in_bytes")) },
		"a host pid":        func() error { return second(c.V1("Move", "web", uint32(w.d.PID))) },
		"oom control": func() error {
			return second(c.V0("SetValue", "memory", "web", "memory.oom_control", "1"))
		},
	})
}

// The clients that people have log in from inside a user namespace.
func TestKernelNamespacesTools(t *testing.T) {
	harness.Require(t, "dbus-send", "gdbus", "busctl")
	w := newWorld(t)
	b := w.box("c1")
	inner := b.box("c2")
	const obj, iface = "/org/linuxcontainers/cgmanager", harness.V0
	addr := "unix:path=" + w.d.Sock
	for name, in := range map[string]*box{"level 1": b, "level 2": inner} {
		for _, as := range []*harness.Cred{nil, {UID: 1000, GID: 1000}} {
			who := name + " root"
			if as != nil {
				who = name + " user"
			}
			for what, tool := range map[string]struct {
				argv []string
				out  string
			}{
				"dbus-send --peer": {[]string{
					"dbus-send", "--peer=" + addr, "--print-reply", obj,
					"org.freedesktop.DBus.Properties.Get", "string:" + iface, "string:api_version",
				}, "int32 10"},
				"dbus-send --address": {[]string{
					"dbus-send", "--address=" + addr, "--print-reply", obj,
					iface + ".GetPidCgroup", "string:memory", "int32:1",
				}, `string "`},
				"dbus-send --bus": {[]string{
					"dbus-send", "--bus=" + addr, "--print-reply", "--dest=org.linuxcontainers.cgmanager", obj,
					iface + ".ListControllers",
				}, `string "memory"`},
				"gdbus": {[]string{
					"gdbus", "call", "--address", addr, "--dest", "org.linuxcontainers.cgmanager", "--object-path", obj,
					"--method", iface + ".ListControllers",
				}, "'memory'"},
				"busctl": {[]string{
					"busctl", "--address=" + addr, "call", "org.linuxcontainers.cgmanager", obj,
					iface, "ListControllers",
				}, `"memory"`},
			} {
				out, code := in.Exec(as, tool.argv...)
				if code != 0 || !strings.Contains(out, tool.out) {
					t.Errorf("%s: %s: exit code %d, want %q in\n%s", who, what, code, tool.out, out)
				}
			}
		}
	}
	// And they can change something.
	out, code := inner.Exec(nil, "gdbus", "call", "--address", addr, "--dest", "org.linuxcontainers.cgmanager", "--object-path", obj,
		"--method", harness.V1+".Create", "web", "['memory']", "{'memory.limit': '10M'}")
	if code != 0 || !w.Exists(harness.Find(t, "memory"), inner.cg+"/web") {
		t.Errorf("gdbus: Create: exit code %d: %s", code, out)
	}
}
