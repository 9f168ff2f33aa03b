package privcheck_test

import (
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"

	. "cgmanager/privcheck"
)

// world is a question with arbitrary facts, read from a fuzzer's bytes. Ids,
// paths and modes come from small sets, so that coincidences, on which every
// right rests, are frequent.
type world struct {
	data []byte
	r    Requestor
	p    Place
	obj  Object
	t    Task
	dst  Place
	up   Place
	key  string
	val  string
}

func (w *world) next(n int) int {
	if len(w.data) == 0 {
		return 0
	}
	b := w.data[0]
	w.data = w.data[1:]
	return int(b) % n
}

func (w *world) id() uint32 {
	if w.next(8) == 7 && len(w.data) >= 4 {
		id := binary.LittleEndian.Uint32(w.data)
		w.data = w.data[4:]
		return id
	}
	return []uint32{0, 1000, 1001, 100000, 101000, 65534, NoID}[w.next(7)]
}

func (w *world) idMap() IDMap {
	switch w.next(4) {
	case 0:
		return identity
	case 1:
		return shifted
	case 2:
		return IDMap{{Inside: w.id(), Outside: w.id(), Count: w.id()}}
	}
	return nil
}

func (w *world) path() string {
	return []string{"/", "/a", "/ab", "/a/b", "/a/b/c", "/a/bc", "/x", "", "a", "/a/../x", "/a//b", "/a/"}[w.next(12)]
}

func (w *world) object() Object {
	modes := []uint32{0, dir | 0o755, dir | 0o777, dir | 0o1777, file | 0o644, file | 0o666, file | 0o777, file | 0o606, file | 0o066, ^uint32(0)}
	return Object{UID: w.id(), GID: w.id(), Mode: modes[w.next(len(modes))], Hierarchical: w.next(4) != 0}
}

func (w *world) place(own string) Place {
	p := Place{Own: own, Target: w.path(), Dir: w.object()}
	for range w.next(4) {
		p.Way = append(p.Way, w.object())
	}
	return p
}

func newWorld(data []byte) *world {
	w := &world{data: data}
	w.r = Requestor{
		UID: w.id(), GID: w.id(), UIDs: w.idMap(), GIDs: w.idMap(),
		SameUserNS: w.next(2) == 1, SamePIDNS: w.next(2) == 1, SameCgroupNS: w.next(2) == 1, SysAdmin: w.next(2) == 1,
		Capable: w.next(2) == 1,
	}
	own := w.path()
	w.p, w.dst, w.up = w.place(own), w.place(own), w.place(own)
	w.obj = w.object()
	w.t = Task{Visible: w.next(4) != 0, Cgroup: w.path()}
	for range w.next(3) {
		w.t.UIDs = append(w.t.UIDs, w.id())
	}
	w.key = []string{"memory.limit_in_bytes", "memory.oom_control", "tasks", "release_agent", "cpu.rt_period_us"}[w.next(5)]
	w.val = []string{"1", "20000"}[w.next(2)]
	return w
}

// named is a question of the surface.
type named struct {
	name string
	ask  func(*world) Decision
}

var overCgroup = []named{
	{"Over", func(w *world) Decision { return Over(w.r, w.p, w.obj, Write) }},
	{"ReadValue", func(w *world) Decision { return ReadValue(w.r, w.p, w.obj) }},
	{"Create", func(w *world) Decision { return Create(w.r, w.p) }},
	{"Chown", func(w *world) Decision { return Chown(w.r, w.p, w.id(), w.id(), false) }},
	{"Chmod", func(w *world) Decision { return Chmod(w.r, w.p, w.obj, 0o755) }},
	{"SetValue", func(w *world) Decision { return SetValue(w.r, w.p, w.key, w.val, w.obj) }},
	{"Remove", func(w *world) Decision {
		return Remove(w.r, w.p, strings.TrimSuffix(w.p.Target, "/")+"/gone")
	}},
	{"RemoveOnEmpty", func(w *world) Decision {
		return RemoveOnEmpty(w.r, w.p, strings.TrimSuffix(w.p.Target, "/")+"/gone")
	}},
	{"Kill", func(w *world) Decision { return Kill(w.r, w.p, nil) }},
	{"Move", func(w *world) Decision { return Move(w.r, w.t, w.p, w.obj, w.up, w.obj) }},
}

var overTask = []named{
	{"OverTask", func(w *world) Decision { return OverTask(w.r, w.p.Own, w.t) }},
	{"Move", func(w *world) Decision { return Move(w.r, w.t, w.dst, w.obj, w.up, w.obj) }},
	{"Kill", func(w *world) Decision { return Kill(w.r, w.p, []Task{w.t}) }},
	{"EscapeTo", func(w *world) Decision {
		return EscapeTo(w.r, w.r, w.p.Own, w.p.Own, w.t, w.dst.Target, true)
	}},
}

// escapes says in the plainest way who escapes a limit of the cgroups above.
func escapes(r Requestor, above []Object) bool {
	if r.UID == 0 && r.SysAdmin && r.SameUserNS && r.SamePIDNS && r.SameCgroupNS {
		return false
	}
	for _, dir := range above {
		if !dir.Hierarchical {
			return true
		}
	}
	return false
}

// isPath says in the plainest way what a path from a hierarchy's root is.
func isPath(p string) bool {
	return p == "/" || strings.HasPrefix(p, "/") && !strings.HasSuffix(p, "/") &&
		!strings.Contains(p, "//") && !strings.Contains(p+"/", "/./") && !strings.Contains(p+"/", "/../")
}

// isBelow says the same of "at or below".
func isBelow(dir, p string) bool {
	return isPath(dir) && isPath(p) && strings.HasPrefix(p+"/", strings.TrimSuffix(dir, "/")+"/")
}

// FuzzOverCgroup: whatever the facts, nothing is allowed outside the requestor's
// own subtree, in a hierarchy where nobody placed a container, behind a way that
// is not known, or to an id that is nobody's.
func FuzzOverCgroup(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, q := range overCgroup {
			w := newWorld(data)
			if d := q.ask(w); !d.Allowed() {
				if d.Reason() == "" || strings.ContainsAny(d.Reason(), "/0123456789") && !strings.Contains(d.Reason(), "ms") && !strings.Contains(d.Reason(), "0777") {
					t.Errorf("%s: refused for %q", q.name, d.Reason())
				}
				continue
			}
			levels := strings.Count(strings.TrimSuffix(w.p.Target, "/"), "/") - strings.Count(strings.TrimSuffix(w.p.Own, "/"), "/")
			switch {
			case !isBelow(w.p.Own, w.p.Target):
				t.Errorf("%s: %q allowed from %q", q.name, w.p.Target, w.p.Own)
			case w.p.Own == "/" && (!w.r.SameUserNS || !w.r.SamePIDNS):
				t.Errorf("%s: allowed from outside, in the root", q.name)
			case len(w.p.Way) != levels:
				t.Errorf("%s: allowed with %d directories for %d levels", q.name, len(w.p.Way), levels)
			case q.name == "Create" && escapes(w.r, append(w.p.Way, w.p.Dir)):
				t.Errorf("Create: allowed below limits that do not bind it")
			case q.name == "Move" && !isBelow(w.p.Target, w.t.Cgroup) && escapes(w.r, w.p.Way):
				t.Errorf("Move: allowed below limits that do not bind it")
			case w.r.UID == NoID && (q.name != "Kill" || levels > 0):
				t.Errorf("%s: allowed to nobody", q.name)
			case q.name != "Kill" && q.name != "Create" && !strings.HasPrefix(q.name, "Remove") && q.name != "Chown" &&
				(w.obj.UID == NoID || q.name != "Chmod" && w.obj.GID == NoID):
				t.Errorf("%s: allowed over nobody's", q.name)
			case q.name == "SetValue" && w.p.Own == w.p.Target && w.r.Outside():
				t.Errorf("%s: an outside requestor changes its own cgroup", q.name)
			}
		}
	})
}

// FuzzOverTask: nothing is allowed over a task that is hidden, elsewhere, of
// unknown owner, or that has one uid that is neither the requestor's nor, for
// its root, mapped.
func FuzzOverTask(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, q := range overTask {
			w := newWorld(data)
			if !q.ask(w).Allowed() {
				continue
			}
			if !w.t.Visible || len(w.t.UIDs) == 0 || !isBelow(w.p.Own, w.t.Cgroup) {
				t.Errorf("%s: allowed over %+v from %q", q.name, w.t, w.p.Own)
			}
			inside, ok := w.r.UIDs.ToInside(w.r.UID)
			for _, uid := range w.t.UIDs {
				if uid == NoID || !ok || uid != w.r.UID && (inside != 0 || !w.r.UIDs.Mapped(uid)) {
					t.Errorf("%s: %+v allowed over uid %d", q.name, w.r, uid)
				}
			}
			if q.name == "Move" && !isBelow(w.dst.Own, w.dst.Target) {
				t.Errorf("Move: to %q allowed from %q", w.dst.Target, w.dst.Own)
			}
			if q.name == "Move" && !isBelow(w.t.Cgroup, w.dst.Target) &&
				(!isBelow(w.up.Target, w.t.Cgroup) || !isBelow(w.up.Target, w.dst.Target)) {
				t.Errorf("Move: from %q to %q by way of %q", w.t.Cgroup, w.dst.Target, w.up.Target)
			}
		}
	})
}

// FuzzUnknown: taking a fact away never turns a refusal into permission.
func FuzzUnknown(f *testing.F) {
	seed(f)
	takeAway := map[string]func(*world){
		"uid":     func(w *world) { w.r.UID = NoID },
		"gid":     func(w *world) { w.r.GID = NoID },
		"uid map": func(w *world) { w.r.UIDs = nil },
		"gid map": func(w *world) { w.r.GIDs = nil },
		"own":     func(w *world) { w.p.Own = "" },
		"target":  func(w *world) { w.p.Target = "" },
		"way": func(w *world) {
			if w.p.Target != w.p.Own { // to itself there is none
				w.p.Way = nil
			}
		},
		"owner":       func(w *world) { w.obj.UID = NoID },
		"group":       func(w *world) { w.obj.GID = NoID },
		"mode":        func(w *world) { w.obj.Mode = 0 },
		"dir's owner": func(w *world) { w.p.Dir.UID = NoID },
		"task":        func(w *world) { w.t = Task{} },
		"task's uids": func(w *world) { w.t.UIDs = nil },
		"task's place": func(w *world) {
			w.t.Cgroup = ""
		},
		"capable":    func(w *world) { w.r.Capable = false },
		"namespaces": func(w *world) { w.r.SameUserNS, w.r.SamePIDNS, w.r.SameCgroupNS = false, false, false },
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, q := range append(overCgroup, overTask...) {
			if q.ask(newWorld(data)).Allowed() {
				continue
			}
			for what, forget := range takeAway {
				w := newWorld(data)
				forget(w)
				if d := q.ask(w); d.Allowed() {
					t.Errorf("%s: allowed (%s) once the %s is unknown", q.name, d.Clause(), what)
				}
			}
		}
	})
}

// FuzzPaths: Below and CommonAncestor agree with the plainest way to say it.
func FuzzPaths(f *testing.F) {
	for _, pair := range [][2]string{{"/", "/a"}, {"/a", "/ab"}, {"/a/b", "/a/c"}, {"/a/..", "/"}, {"", "/"}, {"/a/", "//"}, {"/a/b/c", "/a"}} {
		f.Add(pair[0], pair[1])
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if got, want := Below(a, b), isBelow(a, b); got != want {
			t.Errorf("Below(%q, %q) = %v, want %v", a, b, got, want)
		}
		c := CommonAncestor(a, b)
		if c != CommonAncestor(b, a) {
			t.Errorf("CommonAncestor(%q, %q) depends on the order", a, b)
		}
		if !isPath(a) || !isPath(b) {
			if c != "" {
				t.Errorf("CommonAncestor(%q, %q) = %q", a, b, c)
			}
			return
		}
		if !isBelow(c, a) || !isBelow(c, b) {
			t.Fatalf("CommonAncestor(%q, %q) = %q", a, b, c)
		}
		// None nearer: the next component towards a does not lead to b.
		if rest, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(a, c), "/"), "/"); c != a {
			if nearer := strings.TrimSuffix(c, "/") + "/" + rest; isBelow(nearer, b) {
				t.Errorf("CommonAncestor(%q, %q) = %q, but %q is nearer", a, b, c, nearer)
			}
		}
	})
}

func seed(f *testing.F) {
	f.Helper()
	f.Add([]byte(nil))
	random := rand.New(rand.NewPCG(7, 7))
	for range 300 {
		b := make([]byte, 96)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		f.Add(b)
	}
}
