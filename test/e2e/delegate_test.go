package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// delegators makes those who delegate: a user of the host, a container's root,
// and a user in the container, each in a cgroup that it was given.
func delegators(w *world) map[string]*box {
	b := w.box("c1")
	w.Make("c1/user", b.first+1000, b.first+1000)
	inside := b.user(1000)
	w.Place(inside, "c1/user")
	w.Make("user", 1000, 1000)
	return map[string]*box{
		"host user":      {w: w, Proc: w.host(1000, "user"), cg: "user"},
		"container root": b,
		"container user": {w: w, Proc: inside, cg: "c1/user", first: b.first},
	}
}

// delegationFiles are those that Delegate gives away in h.
func delegationFiles(t *testing.T, h harness.Hierarchy) []string {
	t.Helper()
	if !h.V2 {
		return []string{"tasks", "cgroup.procs"}
	}
	b, err := os.ReadFile("/sys/kernel/cgroup/delegate")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b))
}

// TestKernelDelegate: whoever delegates owns exactly the directory and the files
// of delegation, in every hierarchy; the limits are out of reach, over the socket
// and around it; below, everything is allowed, over the socket and around it.
func TestKernelDelegate(t *testing.T) {
	harness.Require(t, "root", "userns")
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t)}
	for name, p := range delegators(w) {
		t.Run(name, func(t *testing.T) {
			w := w.sub(t)
			c := p.MustDial(w.d.Sock)
			a := asker{t, c}
			a.v1("Create", "web", []string{}, map[string]string{})
			// A mode that lets all write does not outlast the owner.
			for _, h := range controllers() {
				file := "cgroup.clone_children"
				if h.V2 {
					file = "cgroup.freeze"
				}
				if err := p.Run(chmod, filepath.Join(w.Dir(h, p.cg), "web", file), nil); err != nil {
					t.Fatal(err)
				}
			}
			web := p.cg + "/web"
			for range 2 {
				want(t, "the path", a.v1("Delegate", "web", []string{}), []any{w.Path(web)})
				for _, h := range controllers() {
					checkOwners(t, w, h, web, p)
				}
			}
			below(t, w, p, web)
			for _, h := range controllers() {
				var open []string
				if err := p.Run(writable, w.Dir(h, web), &open); err != nil {
					t.Fatal(err)
				}
				for _, file := range open {
					if !slices.Contains(delegationFiles(t, h), file) {
						t.Errorf("%s: %s can be written directly", h.Name, file)
					}
				}
				if len(open) < 2 {
					t.Errorf("%s: nothing but %q can be written", h.Name, open)
				}
			}
			for key, value := range map[string]string{"pids.limit": "5", "memory.limit": "1G", "cpu.shares": "100", "cgroup.max.depth": "9", "state": "frozen"} {
				w.refused(key, func() error { return second(c.V1("SetValue", "web", map[string]string{key: value})) })
			}
		})
	}
}

// writable returns the control files of a cgroup's directory that the process
// may open for writing.
var writable = harness.Inside("writable", func(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		fd, err := unix.Open(filepath.Join(dir, e.Name()), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			_ = unix.Close(fd)
			names = append(names, e.Name())
		}
	}
	return names, nil
})

// chmod lets everybody write a file.
var chmod = harness.Inside("chmod", func(path string) (bool, error) {
	return true, unix.Chmod(path, 0o666)
})

func checkOwners(t *testing.T, w *world, h harness.Hierarchy, cg string, p *box) {
	t.Helper()
	his := fmt.Sprintf("%d:%d", p.HostUID, p.HostGID)
	limits := fmt.Sprintf("0:%d", p.HostGID)
	want(t, h.Name+": owner of the directory", w.owner(h, cg, ""), his)
	entries, err := os.ReadDir(w.Dir(h, cg))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		switch {
		case e.IsDir():
		case slices.Contains(delegationFiles(t, h), e.Name()):
			want(t, h.Name+": owner of "+e.Name(), w.owner(h, cg, e.Name()), his)
		default:
			want(t, h.Name+": owner of "+e.Name(), w.owner(h, cg, e.Name()), limits)
			if info, err := e.Info(); err != nil || info.Mode()&0o022 != 0 {
				t.Errorf("%s: mode of %s: %v, %v", h.Name, e.Name(), info.Mode(), err)
			}
		}
	}
}

// below makes cgroups in a delegated one, over the socket and around it, and
// sets limits there.
func below(t *testing.T, w *world, p *box, cg string) {
	t.Helper()
	a := asker{t, p.MustDial(w.d.Sock)}
	name := filepath.Base(cg)
	a.v1("Create", name+"/made", []string{}, map[string]string{})
	for _, h := range controllers() {
		dir := filepath.Join(w.Dir(h, cg), "direct")
		if out, code := p.Exec(nil, "mkdir", dir); code != 0 {
			t.Errorf("%s: mkdir below: %s", h.Name, out)
			continue
		}
		want(t, h.Name+": owner below", w.owner(h, cg+"/direct", ""), fmt.Sprintf("%d:%d", p.HostUID, p.HostGID))
		if !h.V2 {
			continue
		}
		// What its own cgroup was given is there to be used.
		given := w.Read(h, p.cg, "cgroup.controllers")
		want(t, "controllers in it", w.Read(h, cg, "cgroup.controllers"), given)
		want(t, "controllers below", w.Read(h, cg+"/direct", "cgroup.controllers"), given)
		if w.Read(h, cg, "cgroup.max.depth") == "max" || w.Read(h, cg, "cgroup.max.descendants") == "max" {
			t.Error("what is made below without the daemon is not bounded")
		}
	}
	for _, h := range controllers() {
		if strings.Contains(h.Name, "pids") || h.V2 && strings.Contains(w.Read(h, cg, "cgroup.controllers"), "pids") {
			a.v1("SetValue", name+"/made", map[string]string{"pids.limit": "7"})
			want(t, "the limit below", w.Read(h, cg+"/made", "pids.max"), "7")
			var open []string
			if err := p.Run(writable, w.Dir(h, cg)+"/direct", &open); err != nil || !slices.Contains(open, "pids.max") {
				t.Errorf("%s: of the limits below, %q can be written directly (%v)", h.Name, open, err)
			}
		}
	}
}

// TestKernelDelegateAllOrNothing: where a file of delegation in one hierarchy was
// kept by the host, nothing changes hands in any; likewise where a controller that
// is named is not there.
func TestKernelDelegateAllOrNothing(t *testing.T) {
	harness.Require(t, "root", "userns")
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t)}
	w.Make("user", 1000, 1000)
	u := w.host(1000, "user")
	c := u.MustDial(w.d.Sock)
	asker{t, c}.v1("Create", "kept", []string{}, map[string]string{})
	hs := controllers()
	last := hs[len(hs)-1]
	if err := unix.Chown(filepath.Join(w.Dir(last, "user/kept"), last.TasksFile()), 0, 0); err != nil {
		t.Fatal(err)
	}
	w.refused("a file that the host kept", func() error { return second(c.V1("Delegate", "kept", []string{})) })
	w.refused("no such controller", func() error { return second(c.V1("Delegate", "new", []string{"nosuch"})) })
	w.refused("one of two", func() error { return second(c.V1("Delegate", "new", []string{"freezer", "nosuch"})) })
	other := w.host(1001, "user").MustDial(w.d.Sock)
	w.refused("another user's", func() error { return second(other.V1("Delegate", "kept", []string{})) })
	w.refused("another user's, new", func() error { return second(other.V1("Delegate", "new", []string{})) })
	w.refused("beside one's own", func() error { return second(c.V1("Delegate", "../x", []string{})) })
}

// TestKernelDelegateLimitsStay: limits that were set before stay, whoever set them;
// those that the host set on a container's cgroup do not become anybody's.
func TestKernelDelegateLimitsStay(t *testing.T) {
	harness.Require(t, "root", "userns")
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t)}
	b := w.box("c1")
	a := asker{t, b.MustDial(w.d.Sock)}
	keys := map[string]string{"state": "thawed"}
	for _, h := range controllers() {
		if strings.Contains(h.Name, "pids") {
			keys["pids.limit"] = "33"
		}
	}
	a.v1("Create", "sub", []string{}, keys)
	a.v1("Delegate", "sub", []string{})
	var asked []string
	for key := range keys {
		asked = append(asked, key)
	}
	// The container reads what binds it, though it may not write it.
	want(t, "the values", a.v1("GetValue", "sub", asked), []any{keys})
	// Its own cgroup's limits, which are the host's, stay the host's alone.
	a.v1("Delegate", "", []string{})
	for _, h := range controllers() {
		file := "notify_on_release"
		if h.V2 {
			file = "cgroup.max.depth"
		}
		want(t, h.Name+": owner of a limit of the container", w.owner(h, "c1", file), "0:0")
	}
}

// TestKernelDelegatePath: the path is that of /proc/self/cgroup in the container,
// and of its mount of the hierarchy.
func TestKernelDelegatePath(t *testing.T) {
	harness.Require(t, "root", "userns")
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t)}
	w.Make("c1", 100000, 100000)
	w.Make("c1/own", 100000, 100000)
	outer := harness.Start(t, boxSpec(0))
	w.Place(outer, "c1/own")
	spec := boxSpec(1)
	spec.CgroupNS = true
	inner := outer.Spawn(spec)
	h := controllers()[0]
	for _, p := range []struct {
		name, path string
		proc       *harness.Proc
	}{
		{"in the host's namespace", w.Path("c1/own/a"), outer},
		{"at the root of its own", "/b", inner},
	} {
		t.Run(p.name, func(t *testing.T) {
			if p.proc == inner {
				w.Own("c1/own", inner.HostUID, inner.HostGID)
			}
			a := asker{t, p.proc.MustDial(w.d.Sock)}
			name := filepath.Base(p.path)
			want(t, "the path", a.v1("Delegate", name, []string{}), []any{p.path})
			a.v1("Move", name, uint32(p.proc.PID))
			out, _ := p.proc.Exec(nil, "cat", "/proc/self/cgroup")
			at := harness.ParseCgroups(out)[h.Name]
			if at != p.path && filepath.Dir(at) != p.path {
				t.Errorf("it is in %q, told %q", at, p.path)
			}
		})
	}
	// Below what it is in now the path goes on.
	a := asker{t, inner.MustDial(w.d.Sock)}
	want(t, "the path", a.v1("Delegate", "c", []string{}), []any{"/b/c"})
	// Who is outside of its cgroup namespace has no path for it.
	w.Make("aside", inner.HostUID, inner.HostGID)
	w.Place(inner, "aside")
	w.refused("outside its namespace", func() error { return second(a.c.V1("Delegate", "d", []string{})) })
}

// TestKernelDelegateAfterThreads: a runtime that tried without a delegation has
// given its children what threads can do with, which keeps all else from them.
func TestKernelDelegateAfterThreads(t *testing.T) {
	harness.Require(t, "root", "userns", "unified")
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t)}
	h := harness.Find(t, "unified")
	w.give("c1", 100000)
	b := harness.Start(t, boxSpec(0))
	w.Place(b, "c1")
	w.Write(h, "c1", "cgroup.subtree_control", "+pids")
	want(t, "the type", w.Read(h, "c1", "cgroup.type"), "domain threaded")
	// The limit of a child is not to be lost on the way.
	if err := os.Mkdir(w.Dir(h, "c1/tried"), 0o755); err != nil {
		t.Fatal(err)
	}
	w.Write(h, "c1/tried", "pids.max", "5")
	c := b.MustDial(w.d.Sock)
	if _, err := c.V1("Delegate", "sub", []string{"memory"}); err == nil {
		t.Error("a controller was taken from a child that uses it")
	}
	want(t, "the limit", w.Read(h, "c1/tried", "pids.max"), "5")
	w.Write(h, "c1/tried", "pids.max", "max")
	a := asker{t, c}
	a.v1("Delegate", "sub", []string{"memory"})
	want(t, "controllers", w.Read(h, "c1/sub", "cgroup.controllers"), "memory pids")
	want(t, "controllers below", w.Read(h, "c1/sub", "cgroup.subtree_control"), "memory")
	a.v1("Move", "sub", uint32(b.PID))
	a.v1("Create", "new", []string{}, map[string]string{"pids.limit": "9"})
}
