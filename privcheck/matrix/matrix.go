// Package matrix is a small world in which every kind of requestor asks every
// method for every kind of cgroup. privcheck's tests write the answers to
// testdata/matrix.golden, where a change of policy shows line by line; the
// end-to-end tests build the same world out of real cgroups and processes and
// put the same questions to the daemon.
//
// # The world
//
// There are two trees, both below one directory of the test's own (Base stands
// for it), the same in every hierarchy. Directories have mode 0755 and control
// files 0644, as the kernel makes them; user and group of an owner are the same
// number; all numbers are the host's.
//
//	                      tree "host"   tree "container"
//	T          ancestor   uid 1000      uid 100000
//	T/own      own        uid 1000      uid 100000   its limits: uid 0
//	T/own/child child     uid 1000      uid 100000
//	T/own/box             uid 1000      uid 100000   empty
//	T/sibling  sibling    uid 1000      uid 100000
//	T/own2     prefix     uid 1000      uid 100000   a sibling whose name begins like own's
//	far-T      foreign    uid 1000      uid 100000
//
// Of "own" the owner has the directory, tasks and cgroup.procs, as after Chown;
// of all others it has every file, as after Create. So the elders and siblings
// belong to the very owner: nothing but where they lie speaks against it.
//
// Each cgroup but box holds one victim, a process of the tree's owner; in child
// it is the tree's second user's: 1001, or 101000. The victims of the
// container's tree are in its user and pid namespace, those of the host's tree
// in the host's. A requestor sits in its tree's own, and beside it a companion
// of its own uid and namespaces. No two requestors are there at once.
//
//	host-root       tree host       uid 0 with all capabilities, the daemon's namespaces
//	owner           tree host       uid 1000, the daemon's namespaces
//	other-user      tree host       uid 1001, the daemon's namespaces
//	unmapped        tree host       uid 1000, a user namespace without maps, the daemon's pid namespace
//	container-root  tree container  uid 100000, which is 0 in the container
//	container-user  tree container  uid 101000, which is 1000 in the container
//
// The container is a user namespace with the maps 0 100000 65536 and a pid
// namespace.
//
// # The questions
//
// A method is asked about the cgroup of its row. What cannot be written in its
// grammar of names (a sibling, in most) is asked by the nearest that can, such
// as "../sibling", and must fail all the same. Further:
//
//   - Create asks for "new" below the cgroup.
//   - Chown names the second user, by the number that it has for the requestor
//     (1000 in the container; 1001 for those of the host, unmapped included).
//   - Chmod asks for the mode that is there already, of the directory or of
//     the file in parentheses.
//   - SetValue writes what is there already, except to tasks: there, 0.
//   - Move, MoveFd and MovePid put the companion into the cgroup; with ":out"
//     they put the cgroup's victim into box. GetPidCgroup asks for the victim.
//   - Delete and Remove are asked with the victims of the cgroup and below gone;
//     an answer that it is busy counts as allowed. Remove is recursive.
//   - Kill of own, where allowed, ends the requestor too.
//   - Grant, Revoke, GrantLimits and RevokeLimits name the cgroup's victim. Where it
//     is does not matter; policy, and what was granted, are no questions of privilege.
//   - In the calls that end in Scm the requestor is its own proxy.
//
// Requests without a controller list touch every hierarchy; the answer is the
// same in all of them. The others name memory, of version 1.
package matrix

import (
	"slices"
	"strings"

	"cgmanager/privcheck"
)

// Base stands for the directory, below each hierarchy's root, that holds the
// two trees. A test that builds them takes a name of its own.
const Base = "/base"

// Cgroup is a cgroup of the world.
type Cgroup struct {
	// Tree is "host" or "container".
	Tree string
	// Name is what the rows call it; box has one too, but no rows.
	Name string
	// Path is where it lies below Base: "host/own".
	Path string
	// Owner has the directory and the files of delegation, uid and gid.
	Owner uint32
	// Limits has the other files, uid and gid.
	Limits uint32
	// Victim is the uid and gid of the process in it, -1 where there is none.
	Victim int64
}

// Requestor is one of those who ask.
type Requestor struct {
	// Name is what the rows call it.
	Name string
	// Tree is where it sits, in the cgroup own.
	Tree string
	// UID is its uid and gid.
	UID uint32
	// NoMap: it is in a user namespace of its own, without maps.
	NoMap bool
}

// Row is a question and its answer.
type Row struct {
	Requestor, Cgroup string
	// Interface is "CGManager1" or "cgmanager0_0".
	Interface string
	Method    string
	// Key is the key or file that a method is asked for, or "".
	Key string
	// Out: the method moves the cgroup's victim into box.
	Out      bool
	Decision privcheck.Decision
}

// String returns the row as a line of the golden file.
func (r Row) String() string {
	var b strings.Builder
	b.WriteString(r.Requestor + " " + r.Cgroup + " " + r.Interface + "." + r.Method)
	if r.Key != "" {
		b.WriteString("(" + r.Key + ")")
	}
	if r.Out {
		b.WriteString(":out")
	}
	if r.Decision.Allowed() {
		b.WriteString(" → allow ")
	} else {
		b.WriteString(" → deny ")
	}
	b.WriteString(r.Decision.Clause())
	return b.String()
}

// Requestors returns those who ask.
func Requestors() []Requestor {
	return []Requestor{
		{Name: "host-root", Tree: "host", UID: 0},
		{Name: "owner", Tree: "host", UID: 1000},
		{Name: "other-user", Tree: "host", UID: 1001},
		{Name: "container-root", Tree: "container", UID: 100000},
		{Name: "container-user", Tree: "container", UID: 101000},
		{Name: "unmapped", Tree: "host", UID: 1000, NoMap: true},
	}
}

// Cgroups returns the cgroups of both trees, each after its parent.
func Cgroups() []Cgroup {
	var all []Cgroup
	for _, t := range []struct {
		tree          string
		owner, second uint32
	}{{"host", 1000, 1001}, {"container", 100000, 101000}} {
		add := func(name, path string, limits uint32, victim int64) {
			all = append(all, Cgroup{t.tree, name, path, t.owner, limits, victim})
		}
		add("ancestor", t.tree, t.owner, int64(t.owner))
		add("own", t.tree+"/own", 0, int64(t.owner))
		add("child", t.tree+"/own/child", t.owner, int64(t.second))
		add("box", t.tree+"/own/box", t.owner, -1)
		add("sibling", t.tree+"/sibling", t.owner, int64(t.owner))
		add("prefix", t.tree+"/own2", t.owner, int64(t.owner))
		add("foreign", "far-"+t.tree, t.owner, int64(t.owner))
	}
	return all
}

// Names returns the cgroups of the rows, in their order.
func Names() []string {
	return []string{"own", "child", "sibling", "prefix", "ancestor", "foreign"}
}

// Rows returns every question with the answer that privcheck gives.
func Rows() []Row {
	var rows []Row
	for _, who := range Requestors() {
		for _, name := range Names() {
			q := newQuestion(who, name)
			for _, m := range methods {
				rows = append(rows, Row{
					Requestor: who.Name, Cgroup: name, Interface: m.iface, Method: m.name,
					Key: m.key, Out: m.out, Decision: m.decide(q),
				})
			}
		}
	}
	return rows
}

// method is a method with what its row asks for.
type method struct {
	iface, name, key string
	out              bool
	decide           func(*question) privcheck.Decision
}

const (
	limit = "memory.limit_in_bytes"
	oom   = "memory.oom_control"
	tasks = "tasks"
)

var methods = newMethods()

func newMethods() []method {
	var all []method
	one := func(name, key string, decide func(*question) privcheck.Decision) {
		all = append(all, method{iface: "CGManager1", name: name, key: key, decide: decide})
	}
	one("ListControllers", "", (*question).look)
	one("Create", "", (*question).create)
	one("SetValue", limit, set(limit))
	one("SetValue", oom, set(oom))
	one("SetValue", tasks, set(tasks))
	one("GetValue", limit, get(limit))
	one("GetValue", tasks, get(tasks))
	one("ListChildren", "", (*question).list)
	one("ListTasks", "", get(tasks))
	one("Chown", "", (*question).chown)
	one("Move", "", (*question).moveIn)
	one("MoveFd", "", (*question).moveIn)
	one("Delete", "", (*question).remove)
	one("DeleteForce", "", (*question).deleteForce)
	one("Kill", "", (*question).kill)
	one("Delegate", "", (*question).delegate)
	for _, name := range []string{"Grant", "Revoke", "GrantLimits", "RevokeLimits"} {
		one(name, "", (*question).realtime)
	}
	for _, name := range []string{"Move", "MoveFd"} {
		all = append(all, method{"CGManager1", name, "", true, (*question).moveOut})
	}

	// Of the original's interface each method is there twice.
	zero := func(name, key string, out bool, plain, scm func(*question) privcheck.Decision) {
		all = append(all,
			method{"cgmanager0_0", name, key, out, plain},
			method{"cgmanager0_0", name + "Scm", key, out, scm})
	}
	both := func(name, key string, decide func(*question) privcheck.Decision) {
		zero(name, key, false, decide, decide)
	}
	both("GetPidCgroup", "", (*question).pidCgroup)
	zero("GetPidCgroupAbs", "", false, (*question).pidCgroupAbs, (*question).pidCgroup)
	both("MovePid", "", (*question).moveIn)
	zero("MovePid", "", true, (*question).moveOut, (*question).moveOut)
	zero("MovePidAbs", "", false, (*question).escape, (*question).escapeIn)
	zero("MovePidAbs", "", true, (*question).escape, (*question).escapeOut)
	both("Create", "", (*question).create)
	both("Chown", "", (*question).chown)
	both("Chmod", "", (*question).chmodDir)
	both("Chmod", limit, (*question).chmodLimit)
	both("GetValue", limit, get(limit))
	both("GetValue", tasks, get(tasks))
	both("SetValue", limit, set(limit))
	both("SetValue", oom, set(oom))
	both("SetValue", tasks, set(tasks))
	both("Remove", "", (*question).remove)
	both("GetTasks", "", get(tasks))
	both("GetTasksRecursive", "", (*question).tasksBelow)
	both("ListChildren", "", (*question).list)
	both("RemoveOnEmpty", "", (*question).removeOnEmpty)
	both("Prune", "", (*question).remove)
	both("ListKeys", "", (*question).list)
	return all
}

// question is who asks about what, as the facts that a daemon would gather.
type question struct {
	r                privcheck.Requestor
	own, target, box Cgroup
	companion        privcheck.Task
	victim           privcheck.Task
}

func newQuestion(who Requestor, name string) *question {
	find := func(name string) Cgroup {
		all := Cgroups()
		return all[slices.IndexFunc(all, func(c Cgroup) bool { return c.Tree == who.Tree && c.Name == name })]
	}
	q := &question{r: facts(who), own: find("own"), box: find("box"), target: find(name)}
	q.companion = task(q.own, int64(who.UID))
	q.victim = task(q.target, q.target.Victim)
	return q
}

func facts(who Requestor) privcheck.Requestor {
	r := privcheck.Requestor{UID: who.UID, GID: who.UID, SamePIDNS: true, SameCgroupNS: true}
	switch {
	case who.NoMap:
		r.SysAdmin = true // in its own namespace
	case who.Tree == "container":
		r.UIDs = privcheck.IDMap{{Inside: 0, Outside: 100000, Count: 65536}}
		r.SamePIDNS = false
		r.SysAdmin = who.UID == 100000
	default:
		r.UIDs = privcheck.IDMap{{Inside: 0, Outside: 0, Count: privcheck.NoID}}
		r.SameUserNS = true
		r.SysAdmin = who.UID == 0
	}
	r.GIDs = r.UIDs
	r.Capable = r.Outside() || r.SysAdmin
	return r
}

func (c Cgroup) path() string { return Base + "/" + c.Path }

func (c Cgroup) dir() privcheck.Object {
	return privcheck.Object{UID: c.Owner, GID: c.Owner, Mode: 0o040755, Hierarchical: true}
}

func (c Cgroup) file(name string) privcheck.Object {
	if name == tasks {
		return privcheck.Object{UID: c.Owner, GID: c.Owner, Mode: 0o100644}
	}
	return privcheck.Object{UID: c.Limits, GID: c.Limits, Mode: 0o100644}
}

func task(c Cgroup, uid int64) privcheck.Task {
	return privcheck.Task{Visible: true, UIDs: []uint32{uint32(uid)}, Cgroup: c.path()}
}

// at returns the cgroup at path. That above the trees is root's.
func at(path string) Cgroup {
	for _, c := range Cgroups() {
		if c.path() == path {
			return c
		}
	}
	return Cgroup{Path: strings.TrimPrefix(path, Base+"/"), Victim: -1}
}

// place is where c lies for the requestor.
func (q *question) place(path string) privcheck.Place {
	p := privcheck.Place{Own: q.own.path(), Target: path, Dir: at(path).dir()}
	for dir := q.own.path(); dir != path && privcheck.Below(dir, path); {
		p.Way = append(p.Way, at(dir).dir())
		next, _, _ := strings.Cut(strings.TrimPrefix(path, dir+"/"), "/")
		dir += "/" + next
	}
	return p
}

func (q *question) here() privcheck.Place { return q.place(q.target.path()) }

func (q *question) look() privcheck.Decision {
	return privcheck.Over(q.r, q.here(), q.target.dir(), privcheck.Search)
}

func (q *question) list() privcheck.Decision {
	return privcheck.ReadValue(q.r, q.here(), q.target.dir())
}

func get(key string) func(*question) privcheck.Decision {
	return func(q *question) privcheck.Decision {
		return privcheck.ReadValue(q.r, q.here(), q.target.file(key))
	}
}

func set(key string) func(*question) privcheck.Decision {
	return func(q *question) privcheck.Decision {
		return privcheck.SetValue(q.r, q.here(), key, "0", q.target.file(key))
	}
}

func (q *question) create() privcheck.Decision { return privcheck.Create(q.r, q.here()) }

func (q *question) chown() privcheck.Decision {
	id := uint32(1001)
	if q.own.Tree == "container" {
		id = 101000
	}
	return privcheck.Chown(q.r, q.here(), id, id, !q.r.UIDs.Mapped(id))
}

func (q *question) chmodDir() privcheck.Decision {
	return privcheck.Chmod(q.r, q.here(), q.target.dir(), 0o755)
}

func (q *question) chmodLimit() privcheck.Decision {
	return privcheck.Chmod(q.r, q.here(), q.target.file(limit), 0o644)
}

func (q *question) move(t privcheck.Task, to string) privcheck.Decision {
	common := privcheck.CommonAncestor(t.Cgroup, to)
	return privcheck.Move(q.r, t, q.place(to), at(to).file(tasks), q.place(common), at(common).file(tasks))
}

func (q *question) moveIn() privcheck.Decision  { return q.move(q.companion, q.target.path()) }
func (q *question) moveOut() privcheck.Decision { return q.move(q.victim, q.box.path()) }

func (q *question) realtime() privcheck.Decision {
	return privcheck.Realtime(q.r, privcheck.RealtimeTask{
		Visible: q.victim.Visible,
		// The victims are in their tree's user namespace; unmapped is in one below it.
		Within: q.r.SameUserNS || q.own.Tree == "container",
		UIDs:   q.victim.UIDs,
	})
}

func (q *question) escape() privcheck.Decision { return privcheck.Escape(q.r) }

func (q *question) escapeTo(t privcheck.Task, to string) privcheck.Decision {
	return privcheck.All(
		privcheck.EscapeTo(q.r, q.r, q.own.path(), q.own.path(), t, to, true),
		q.move(t, to))
}

func (q *question) escapeIn() privcheck.Decision {
	return q.escapeTo(q.companion, q.target.path())
}
func (q *question) escapeOut() privcheck.Decision { return q.escapeTo(q.victim, q.box.path()) }

func (q *question) pidCgroup() privcheck.Decision {
	return privcheck.PidCgroup(q.r, q.victim, q.own.path())
}

// pidCgroupAbs: the answer is relative to the hierarchy's root for one of the
// host, and to its own cgroup for one of a container.
func (q *question) pidCgroupAbs() privcheck.Decision {
	if q.r.Outside() {
		return q.pidCgroup()
	}
	return privcheck.PidCgroup(q.r, q.victim, "/")
}

// above is the cgroup above the target.
func (q *question) above() string {
	p := q.target.path()
	return p[:strings.LastIndexByte(p, '/')]
}

func (q *question) remove() privcheck.Decision {
	return privcheck.Remove(q.r, q.place(q.above()), q.target.path())
}

func (q *question) removeOnEmpty() privcheck.Decision {
	return privcheck.RemoveOnEmpty(q.r, q.place(q.above()), q.target.path())
}

func (q *question) deleteForce() privcheck.Decision {
	ds := []privcheck.Decision{q.remove()}
	for _, t := range q.allTasks() {
		ds = append(ds, q.move(t, q.above()))
	}
	return privcheck.All(append(ds, q.remove())...)
}

func (q *question) kill() privcheck.Decision {
	return privcheck.Kill(q.r, q.here(), q.allTasks())
}

func (q *question) delegate() privcheck.Decision {
	return privcheck.All(
		privcheck.Delegate(q.r, q.here()),
		privcheck.DelegateFile(q.r, q.here(), q.target.file(tasks)))
}

// allTasks are those in the target and below.
func (q *question) allTasks() []privcheck.Task {
	var all []privcheck.Task
	if privcheck.Below(q.target.path(), q.own.path()) {
		all = append(all, task(q.own, int64(q.r.UID)), q.companion)
	}
	for _, c := range q.below() {
		if c.Victim >= 0 {
			all = append(all, task(c, c.Victim))
		}
	}
	return all
}

// below are the target and the cgroups below it.
func (q *question) below() []Cgroup {
	return slices.DeleteFunc(Cgroups(), func(c Cgroup) bool {
		return !privcheck.Below(q.target.path(), c.path())
	})
}

func (q *question) tasksBelow() privcheck.Decision {
	var ds []privcheck.Decision
	for _, c := range q.below() {
		ds = append(ds, privcheck.ReadValue(q.r, q.place(c.path()), c.file(tasks)))
	}
	return privcheck.All(ds...)
}
