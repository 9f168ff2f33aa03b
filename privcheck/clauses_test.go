package privcheck_test

import (
	"testing"

	. "cgmanager/privcheck"
)

const (
	dir  = 0o040000
	file = 0o100000
)

var (
	identity = IDMap{{Inside: 0, Outside: 0, Count: NoID}}
	shifted  = IDMap{{Inside: 0, Outside: 100000, Count: 65536}}
)

// Who asks in the tables below.
var (
	hostRoot = host(0, 0, true)
	owner    = host(1000, 1000, false)
	other    = host(1001, 1001, false)
	ctRoot   = Requestor{UID: 100000, GID: 100000, UIDs: shifted, GIDs: shifted, SysAdmin: true, Capable: true}
	ctUser   = Requestor{UID: 101000, GID: 101000, UIDs: shifted, GIDs: shifted, Capable: true}
	// privRoot is root of a container without a user namespace.
	privRoot = Requestor{UIDs: identity, GIDs: identity, SameUserNS: true, SameCgroupNS: true, SysAdmin: true, Capable: true}
	// unmapped is the owner in a user namespace without a map.
	unmapped = Requestor{UID: 1000, GID: 1000, SysAdmin: true, Capable: true}
)

func host(uid, gid uint32, admin bool) Requestor {
	return Requestor{
		UID: uid, GID: gid, UIDs: identity, GIDs: identity,
		SameUserNS: true, SamePIDNS: true, SameCgroupNS: true, SysAdmin: admin, Capable: admin,
	}
}

// noCaps is uid 0 of the host without CAP_SYS_ADMIN, pidHost root of a
// container that has a cgroup namespace alone.
var (
	noCaps  = host(0, 0, false)
	pidHost = Requestor{UIDs: identity, GIDs: identity, SameUserNS: true, SamePIDNS: true, SysAdmin: true, Capable: true}
)

// d and f are a directory and a file.
func d(uid, gid, perm uint32) Object {
	return Object{UID: uid, GID: gid, Mode: dir | perm, Hierarchical: true}
}
func f(uid, gid, perm uint32) Object { return Object{UID: uid, GID: gid, Mode: file | perm} }

// flat is the directory of a cgroup with limits that do not bind those below.
func flat(uid uint32) Object { return Object{UID: uid, GID: uid, Mode: dir | 0o755} }

// own is r's own cgroup /a, below its child /a/b; both belong to uid.
func own(uid uint32) Place   { return Place{Own: "/a", Target: "/a", Dir: d(uid, uid, 0o755)} }
func child(uid uint32) Place { return at("/a", "/a/b", d(uid, uid, 0o755), d(uid, uid, 0o755)) }

func at(own, target string, o Object, way ...Object) Place {
	return Place{Own: own, Target: target, Way: way, Dir: o}
}

func task(cgroup string, uids ...uint32) Task {
	return Task{Visible: true, UIDs: uids, Cgroup: cgroup}
}

// row is a line of a table: what was decided, and what must be. A refusal is
// marked by "no " before its clause.
type row struct {
	name string
	got  Decision
	want string
}

func check(t *testing.T, rows []row) {
	t.Helper()
	for _, r := range rows {
		got := r.got.Clause()
		if !r.got.Allowed() {
			got = "no " + got
		}
		if got != r.want {
			t.Errorf("%s: got %q, want %q", r.name, got, r.want)
		}
		if (r.got.Reason() == "") != r.got.Allowed() {
			t.Errorf("%s: allowed %v with reason %q", r.name, r.got.Allowed(), r.got.Reason())
		}
	}
}

func TestOver(t *testing.T) {
	// A container root whose namespace maps its uid but not the group 5.
	half := ctRoot
	half.GIDs = IDMap{{Inside: 0, Outside: 100000, Count: 1}}
	noID := owner
	noID.UID = NoID
	noGroup := host(1001, NoID, false)
	lone := unmapped
	lone.UIDs = IDMap{{Inside: 7, Outside: 1001, Count: 1}}

	check(t, []row{
		{"owner writes its file", Over(owner, child(1000), f(1000, 1000, 0o644), Write), "1 owner"},
		{"in its own cgroup too", Over(owner, own(1000), f(1000, 1000, 0o644), Write), "1 owner"},
		{"owner's bits bind the owner, not the others'", Over(owner, child(1000), f(1000, 1000, 0o466), Write), "no 1 owner"},
		{"all of the access", Over(owner, child(1000), d(1000, 1000, 0o355), Read|Write), "no 1 owner"},
		{"no access at all", Over(owner, child(1000), f(1000, 1000, 0o644), 0), "no 1 unknown"},
		{"group", Over(other, child(1000), f(1000, 1001, 0o060), Write), "1 group"},
		{"group's bits bind the group, not the others'", Over(other, child(1000), f(1000, 1001, 0o606), Write), "no 1 group"},
		{"others", Over(other, child(1000), f(1000, 1000, 0o644), Read), "1 others"},
		{"others' bits", Over(other, child(1000), f(1000, 1000, 0o644), Write), "no 1 others"},

		{"host root overrides the mode", Over(hostRoot, at("/", "/", d(0, 0, 0o555)), d(0, 0, 0o555), Write|Search), "1 root"},
		{"and other owners", Over(hostRoot, child(1000), f(1000, 1000, 0), Write), "1 root"},
		{"but not its own place", Over(hostRoot, at("/a", "/b", d(0, 0, 0o777)), f(0, 0, 0o666), Write), "no 1 subtree"},
		{"container root over its users", Over(ctRoot, child(100000), f(101000, 101000, 0), Write), "1 root"},
		{"not where the owner is not mapped", Over(ctRoot, child(100000), f(0, 100000, 0o644), Write), "no 1 group"},
		{"not where the group is not mapped", Over(half, child(100000), f(101000, 5, 0o644), Write), "no 1 others"},
		{"there it is an owner like any", Over(half, child(100000), f(100000, 5, 0o644), Write), "1 owner"},
		{"container user is no root", Over(ctUser, child(100000), f(100000, 100000, 0o600), Read), "no 1 others"},
		{"others where the owner is mapped", Over(ctUser, child(100000), f(100000, 100000, 0o644), Read), "1 others"},
		{"others where the owner is not mapped", Over(ctUser, child(100000), f(0, 0, 0o666), Read), "no 1 unmapped"},
		{"root of a privileged container", Over(privRoot, child(0), f(0, 0, 0o644), Write), "1 root"},

		{"sibling", Over(owner, at("/a", "/b", d(1000, 1000, 0o777)), f(1000, 1000, 0o666), Write), "no 1 subtree"},
		{"sibling with a common prefix", Over(owner, at("/a", "/ab", d(1000, 1000, 0o777)), f(1000, 1000, 0o666), Write), "no 1 subtree"},
		{"ancestor", Over(owner, at("/a/b", "/a", d(1000, 1000, 0o777)), f(1000, 1000, 0o666), Write), "no 1 subtree"},
		{"dots", Over(owner, at("/a", "/a/../b", d(1000, 1000, 0o777), d(1000, 1000, 0o755), d(1000, 1000, 0o755)), f(1000, 1000, 0o666), Write), "no 1 unknown"},
		{"a root own cgroup for one of the host", Over(owner, at("/", "/b", d(1000, 1000, 0o755), d(0, 0, 0o555)), f(1000, 1000, 0o644), Write), "1 owner"},
		{"a root own cgroup for another user namespace", Over(ctRoot, at("/", "/b", d(100000, 100000, 0o755), d(100000, 100000, 0o755)), f(100000, 100000, 0o644), Write), "no 1 outside root"},
		{"a root own cgroup for another pid namespace", Over(privRoot, at("/", "/b", d(0, 0, 0o755), d(0, 0, 0o555)), f(0, 0, 0o644), Write), "no 1 outside root"},

		{"search on the way", Over(owner, at("/a", "/a/b", d(1000, 1000, 0o755), d(0, 0, 0o700)), f(1000, 1000, 0o644), Write), "no 1 search"},
		{"search on the way further down", Over(owner, at("/a", "/a/b/c", d(1000, 1000, 0o755), d(0, 0, 0o755), d(0, 0, 0o700)), f(1000, 1000, 0o644), Write), "no 1 search"},
		{"search in the directory of a file", Over(owner, at("/a", "/a/b", d(0, 0, 0o700), d(0, 0, 0o755)), f(1000, 1000, 0o644), Write), "no 1 search"},
		{"which reading the directory does not need", Over(owner, at("/a", "/a/b", d(1000, 1000, 0o600), d(0, 0, 0o755)), d(1000, 1000, 0o600), Read), "1 owner"},
		{"a way too short", Over(owner, at("/a", "/a/b", d(1000, 1000, 0o755)), f(1000, 1000, 0o644), Write), "no 1 unknown"},
		{"a way too long", Over(owner, at("/a", "/a", d(1000, 1000, 0o755), d(1000, 1000, 0o755)), f(1000, 1000, 0o644), Write), "no 1 unknown"},

		{"unmapped in its own user namespace", Over(unmapped, child(1000), f(1000, 1000, 0o600), Write), "no 1 search"},
		{"owns nothing", Over(lone, at("/a", "/a", d(1001, 1001, 0o755)), f(1000, 1000, 0o600), Write), "no 1 unmapped"},
		{"is none of the others of its group", Over(lone, at("/a", "/a", d(1001, 1001, 0o755)), f(1001, 1000, 0o606), Write), "no 1 unmapped"},
		{"is in no group", Over(lone, at("/a", "/a", d(1001, 1001, 0o755)), f(1001, 1000, 0o660), Write), "no 1 unmapped"},
		{"unknown uid of the requestor", Over(noID, own(1000), f(NoID, 1000, 0o666), Write), "no 1 search"},
		{"unknown owner", Over(owner, own(1000), f(NoID, 1000, 0o666), Write), "no 1 unknown"},
		{"unknown gid of the requestor", Over(noGroup, own(1000), f(1000, 1000, 0o606), Write), "no 1 search"},
		{"unknown group", Over(owner, own(1000), f(1000, NoID, 0o666), Write), "no 1 unknown"},
		{"unknown own cgroup", Over(hostRoot, at("", "/a", d(0, 0, 0o755)), f(0, 0, 0o644), Write), "no 1 unknown"},
		{"unknown target", Over(hostRoot, at("/", "", d(0, 0, 0o755)), f(0, 0, 0o644), Write), "no 1 unknown"},
		{"nobody at all", Over(Requestor{}, own(0), f(0, 0, 0o777), Write), "no 1 search"},
	})
}

func TestOverTask(t *testing.T) {
	hidden := task("/a", 1000)
	hidden.Visible = false
	check(t, []row{
		{"own uid", OverTask(owner, "/a", task("/a/b", 1000, 1000, 1000)), "2 own uid"},
		{"another's", OverTask(owner, "/a", task("/a", 1001)), "no 2 uid"},
		{"a saved uid of another", OverTask(owner, "/a", task("/a", 1000, 1000, 0)), "no 2 uid"},
		{"host root over all", OverTask(hostRoot, "/", task("/a", 0, 1000)), "2 root"},
		{"container root over its users", OverTask(ctRoot, "/a", task("/a", 101000)), "2 root"},
		{"not over the host's", OverTask(ctRoot, "/a", task("/a", 101000, 0)), "no 2 uid"},
		{"the same number inside is another uid", OverTask(ctUser, "/a", task("/a", 1000)), "no 2 uid"},
		{"invisible", OverTask(owner, "/a", hidden), "no 2 invisible"},
		{"sibling", OverTask(owner, "/a", task("/ab", 1000)), "no 2 subtree"},
		{"ancestor", OverTask(owner, "/a", task("/", 1000)), "no 2 subtree"},
		{"host root in a cgroup", OverTask(hostRoot, "/a", task("/b", 0)), "no 2 subtree"},
		{"outside in the root", OverTask(ctRoot, "/", task("/a", 100000)), "no 2/1 outside root"},
		{"unmapped", OverTask(unmapped, "/a", task("/a", 1000)), "no 2 uid"},
		{"nobody's", OverTask(host(NoID, 0, false), "/a", task("/a", NoID)), "no 2 uid"},
		{"nobody's for root", OverTask(hostRoot, "/", task("/a", NoID)), "no 2 uid"},
		{"no uids known", OverTask(hostRoot, "/", task("/a")), "no 2 unknown"},
		{"no cgroup known", OverTask(hostRoot, "/", task("", 0)), "no 2 subtree"},
	})
}

func TestCreate(t *testing.T) {
	sticky := child(0)
	sticky.Dir.Mode = dir | 0o1777
	check(t, []row{
		{"below one's own directory", Create(owner, child(1000)), "3/1 owner"},
		{"below another's", Create(other, child(1000)), "no 3/1 others"},
		{"below a directory that all may write", Create(other, sticky), "3/1 others"},
		{"write is not enough", Create(owner, at("/a", "/a/b", d(1000, 1000, 0o655), d(0, 0, 0o755))), "no 3/1 owner"},
		{"search is not enough", Create(owner, at("/a", "/a/b", d(1000, 1000, 0o555), d(0, 0, 0o755))), "no 3/1 owner"},
		{"beside oneself", Create(owner, at("/a/b", "/a", d(1000, 1000, 0o755))), "no 3/1 subtree"},
		{"below a limit that does not bind it", Create(owner, at("/a", "/a/b", flat(1000), d(1000, 1000, 0o755))), "no 3 flat"},
		{"anywhere below it", Create(owner, at("/a", "/a/b", d(1000, 1000, 0o755), flat(1000))), "no 3 flat"},
		{"below it, as container root", Create(ctRoot, at("/a", "/a", flat(100000))), "no 3 flat"},
		{"below it, as root of a privileged container", Create(privRoot, at("/a", "/a", flat(0))), "no 3 flat"},
		{"below it, as the host's root", Create(hostRoot, at("/a", "/a/b", flat(0), flat(0))), "3/1 root"},
		{"below it, where one may not anyway", Create(other, at("/a", "/a", flat(1000))), "no 3/1 others"},
		{"no gid to give", Create(host(1000, NoID, false), child(1000)), "no 3 unknown"},
		{"no uid to give", Create(host(NoID, 1000, false), sticky), "no 3 unknown"},
	})
}

func TestMove(t *testing.T) {
	mine, root := f(1000, 1000, 0o644), f(0, 0, 0o644)
	other := at("/a", "/a/c", d(1000, 1000, 0o755), d(1000, 1000, 0o755))
	top := Place{Own: "/", Target: "/", Dir: d(0, 0, 0o555)}
	check(t, []row{
		{"down", Move(owner, task("/a", 1000), child(1000), mine, Place{}, Object{}), "4 down/1 owner"},
		{"to where it is", Move(owner, task("/a/b", 1000), child(1000), mine, Place{}, Object{}), "4 down/1 owner"},
		{"down, somebody else's task", Move(owner, task("/a", 0), child(1000), mine, Place{}, Object{}), "no 4/2 uid"},
		{"down, into somebody else's", Move(owner, task("/a", 1000), child(1000), root, Place{}, Object{}), "no 4/1 others"},
		{"sideways under one's own", Move(owner, task("/a/b", 1000), other, mine, own(1000), mine), "4 sideways/1 owner"},
		{"sideways out of another's jail", Move(owner, task("/a/b", 1000), other, mine, own(0), root), "no 4 sideways/1 others"},
		{"sideways into somebody else's", Move(owner, task("/a/b", 1000), other, root, own(1000), mine), "no 4/1 others"},
		{"up", Move(owner, task("/a/b", 1000), own(1000), mine, own(1000), mine), "4 sideways/1 owner"},
		{"up, into somebody else's", Move(owner, task("/a/b", 1000), own(0), root, own(0), root), "no 4/1 others"},
		{"down, from a limit that does not bind below", Move(owner, task("/a", 1000), at("/a", "/a/b", d(1000, 1000, 0o755), flat(1000)), mine, Place{}, Object{}), "no 4 flat"},
		{"down, past such a limit", Move(owner, task("/a", 1000), at("/a", "/a/b/c", d(1000, 1000, 0o755), d(1000, 1000, 0o755), flat(1000)), mine, Place{}, Object{}), "no 4 flat"},
		{"down, to such a limit", Move(owner, task("/a", 1000), at("/a", "/a/b", flat(1000), d(1000, 1000, 0o755)), mine, Place{}, Object{}), "4 down/1 owner"},
		{"sideways below it", Move(owner, task("/a/b", 1000), at("/a", "/a/c", d(1000, 1000, 0o755), flat(1000)), mine, own(1000), mine), "no 4 flat"},
		{"up, below it", Move(owner, task("/a/b/c", 1000), at("/a", "/a/b", d(1000, 1000, 0o755), flat(1000)), mine, at("/a", "/a/b", d(1000, 1000, 0o755), flat(1000)), mine), "4 sideways/1 owner"},
		{"up, to it", Move(owner, task("/a/b", 1000), at("/a", "/a", flat(1000)), mine, at("/a", "/a", flat(1000)), mine), "4 sideways/1 owner"},
		{"to where it is, below it", Move(owner, task("/a/b", 1000), at("/a", "/a/b", d(1000, 1000, 0o755), flat(1000)), mine, Place{}, Object{}), "4 down/1 owner"},
		{"from it, as the host's root", Move(hostRoot, task("/a", 0), at("/a", "/a/b", d(0, 0, 0o755), flat(0)), root, Place{}, Object{}), "4 down/1 root"},
		{"a task from elsewhere", Move(owner, task("/c", 1000), child(1000), mine, Place{Own: "/a", Target: "/", Dir: d(1000, 1000, 0o777)}, mine), "no 4/2 subtree"},
		{"to elsewhere", Move(owner, task("/a", 1000), at("/a", "/c", d(1000, 1000, 0o777)), mine, Place{Own: "/a", Target: "/"}, mine), "no 4/1 subtree"},
		{"a false ancestor", Move(owner, task("/a/b", 1000), other, mine, other, mine), "no 4 unknown"},
		{"an ancestor for another requestor", Move(hostRoot, task("/a/b", 0), at("/", "/c", d(0, 0, 0o755), d(0, 0, 0o755)), root, Place{Own: "/x", Target: "/"}, root), "no 4 unknown"},
		{"no ancestor", Move(owner, task("/a/b", 1000), other, mine, Place{Own: "/a"}, mine), "no 4 unknown"},
		{"host root, anywhere below its own", Move(hostRoot, task("/a/b", 1000), at("/", "/c", d(0, 0, 0o755), d(0, 0, 0o555)), root, top, root), "4 sideways/1 root"},
	})
}

func TestScope(t *testing.T) {
	const login = "/user.slice/user-1000.slice/session-1.scope"
	free := Left{Known: true}
	in := func(own string, l Left, scopes int) Session { return Session{Own: own, Left: l, Scopes: scopes} }
	limit := func(name string, o Object) Left { return Left{Known: true, Limits: []Limit{{Name: name, File: o}}} }
	theirs := limit("memory.max", f(0, 0, 0o644))
	check(t, []row{
		{"a login session", Scope(owner, in(login, free, 0)), "3 scope"},
		{"below the user's own systemd", Scope(owner, in("/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope", free, 0)), "3 scope"},
		{"host root anywhere", Scope(hostRoot, in("/system.slice/x.service", theirs, 1000)), "3 scope host root"},
		{"a service", Scope(owner, in("/system.slice/x.service", free, 0)), "no 3 undelegated"},
		{"another user's session", Scope(other, in(login, free, 0)), "no 3 undelegated"},
		{"a number that starts alike", Scope(host(100, 100, false), in(login, free, 0)), "no 3 undelegated"},
		{"a slice below the user's", Scope(owner, in("/user.slice/user-1000.slice/user-1000-x.slice/a.scope", free, 0)), "no 3 undelegated"},
		{"not where it only looks like it", Scope(owner, in("/x.scope"+login, free, 0)), "no 3 undelegated"},
		{"a container", Scope(ctRoot, in("/user.slice/user-100000.slice/session-1.scope", free, 0)), "no 3 undelegated"},
		{"root of one with the host's uids", Scope(privRoot, in("/user.slice/user-0.slice/session-1.scope", free, 0)), "no 3 undelegated"},
		{"no path", Scope(owner, in("", free, 0)), "no 3 unknown"},
		{"nobody", Scope(host(NoID, 0, false), in(login, free, 0)), "no 3 unknown"},
		{"as many as allowed", Scope(owner, in(login, free, MaxScopes-1)), "3 scope"},
		{"one too many", Scope(owner, in(login, free, MaxScopes)), "no 3 scopes"},
		{"limits that nobody looked at", Scope(owner, in(login, Left{}, 0)), "no 3/3 unknown"},
		{"a limit of root's", Scope(owner, in(login, theirs, 0)), "no 3/3 limit"},
		{"a limit of its own", Scope(owner, in(login, limit("memory.max", f(1000, 1000, 0o644)), 0)), "3 scope"},
		{"of its own, without the right to write it", Scope(owner, in(login, limit("memory.max", f(1000, 1000, 0o444)), 0)), "no 3/3 limit"},
		{"its own file, but no key", Scope(owner, in(login, limit("io.prio.class", f(1000, 1000, 0o644)), 0)), "no 3/3 limit"},
		{"one without a file", Scope(owner, in(login, limit("device program", Object{UID: NoID, GID: NoID}), 0)), "no 3/3 limit"},
		{"uid 0 lifts none", Scope(noCaps, in("/user.slice/user-0.slice/session-1.scope", theirs, 0)), "no 3/3 limit"},
	})
}

// A scope stands for the cgroup that its owner is in: tasks of that one enter it.
func TestMoveIntoScope(t *testing.T) {
	const from, scope = "/u/session", "/u/scope"
	dst := func(l Left) Place {
		p := at(scope, scope+"/x", d(1000, 1000, 0o755), d(1000, 1000, 0o755))
		p.From, p.Left = from, l
		return p
	}
	tasks := f(1000, 1000, 0o644)
	free := Left{Known: true}
	bound := Left{Known: true, Limits: []Limit{{Name: "pids.max", File: f(0, 0, 0o644)}}}
	move := func(r Requestor, v Task, p Place) Decision { return Move(r, v, p, tasks, Place{}, Object{}) }
	root := dst(bound)
	root.Dir, root.Way = d(0, 0, 0o755), []Object{d(0, 0, 0o755)}
	elsewhere := dst(free)
	elsewhere.From = ""
	check(t, []row{
		{"from the session", move(owner, task(from, 1000), dst(free)), "4 scope/1 owner"},
		{"from within the scope", Move(owner, task(scope, 1000), dst(Left{}), tasks, Place{}, Object{}), "4 down/1 owner"},
		{"of another user", move(owner, task(from, 1001), dst(free)), "no 4/2 uid"},
		{"from below the session", move(owner, task(from+"/jail", 1000), dst(free)), "no 4/2 subtree"},
		{"from above it", move(owner, task("/u", 1000), dst(free)), "no 4/2 subtree"},
		{"from elsewhere", move(owner, task("/u/session2", 1000), dst(free)), "no 4/2 subtree"},
		{"from under a limit", move(owner, task(from, 1000), dst(bound)), "no 4/3 limit"},
		{"from under limits that nobody looked at", move(owner, task(from, 1000), dst(Left{})), "no 4/3 unknown"},
		{"host root leaves limits", move(hostRoot, task(from, 0), root), "4 scope/1 root"},
		{"no scope", move(owner, task(from, 1000), elsewhere), "no 4/2 subtree"},
	})
}

func TestSliceOf(t *testing.T) {
	for path, want := range map[string]string{
		"/":                                "/",
		"/init.scope":                      "/",
		"/a.slice":                         "/a.slice",
		"/a.slice/a-b.slice/x.scope":       "/a.slice/a-b.slice",
		"/a.slice/x.service/b.slice/c":     "/a.slice",
		"/lxc/a.slice":                     "/",
		"/user.slice/user-1.slice/s.scope": "/user.slice/user-1.slice",
	} {
		if got, ok := SliceOf(path); !ok || got != want {
			t.Errorf("SliceOf(%q) = %q, %v, want %q", path, got, ok, want)
		}
	}
	for _, path := range []string{"", "a.slice", "/a.slice/../b.slice", "/a.slice//x"} {
		if got, ok := SliceOf(path); ok {
			t.Errorf("SliceOf(%q) = %q", path, got)
		}
	}
}

func TestChown(t *testing.T) {
	half := ctRoot
	half.GIDs = IDMap{{Inside: 0, Outside: 100000, Count: 1}}
	check(t, []row{
		{"host root", Chown(hostRoot, child(0), 1000, 1000, false), "5 root"},
		{"host root, one id", Chown(hostRoot, child(0), 1000, NoID, false), "5 root"},
		{"host root, the other id", Chown(hostRoot, child(0), NoID, 1000, false), "5 root"},
		{"host root, neither", Chown(hostRoot, child(0), NoID, NoID, false), "5 root"},
		{"owner is not root", Chown(owner, child(1000), 1001, NoID, false), "no 5 not root"},
		{"not even to itself", Chown(owner, child(1000), 1000, 1000, false), "no 5 not root"},
		{"container root", Chown(ctRoot, child(100000), 101000, 101000, false), "5 root"},
		{"to a uid of the host", Chown(ctRoot, child(100000), 1000, 101000, false), "no 5 unmapped"},
		{"to a gid of the host", Chown(ctRoot, child(100000), 101000, 1000, false), "no 5 unmapped"},
		{"to an id that could not be translated", Chown(ctRoot, child(100000), NoID, NoID, true), "no 5 unmapped"},
		{"what the host owns", Chown(ctRoot, at("/a", "/a/b", d(0, 0, 0o777), d(100000, 100000, 0o755)), 100000, 100000, false), "no 5 owner"},
		{"what a group of the host has", Chown(half, at("/a", "/a/b", d(100000, 5, 0o777), d(100000, 100000, 0o755)), 100000, 100000, false), "no 5 owner"},
		{"a file with it", ChownFile(ctRoot, child(100000), f(100000, 100000, 0o644), 101000, 101000, false), "5 root"},
		{"a file that the host kept", ChownFile(ctRoot, child(100000), f(0, 0, 0o666), 101000, 101000, false), "no 5 owner"},
		{"a file, not the directory", ChownFile(ctRoot, child(0), f(100000, 100000, 0o644), 101000, 101000, false), "no 5/1 search"},
		{"elsewhere", Chown(hostRoot, at("/a", "/b", d(0, 0, 0o755)), 0, 0, false), "no 5/1 subtree"},
		{"outside in the root", Chown(ctRoot, at("/", "/b", d(100000, 100000, 0o755), d(100000, 100000, 0o755)), 100000, 100000, false), "no 5/1 outside root"},
		{"unmapped", Chown(unmapped, child(1000), NoID, NoID, false), "no 5 not root"},
	})
}

func TestChmod(t *testing.T) {
	mine := f(1000, 1000, 0)
	check(t, []row{
		{"owner, whatever the bits", Chmod(owner, child(1000), mine, 0o777), "5 owner"},
		{"owner of the directory alone", Chmod(owner, child(1000), f(0, 0, 0o666), 0o666), "no 5 owner"},
		{"group", Chmod(other, child(1000), f(1000, 1001, 0o660), 0o666), "no 5 owner"},
		{"host root", Chmod(hostRoot, child(1000), mine, 0), "5 root"},
		{"container root over its users'", Chmod(ctRoot, child(100000), f(101000, 101000, 0o644), 0o600), "5 root"},
		{"container root over the host's", Chmod(ctRoot, child(100000), f(0, 0, 0o644), 0o666), "no 5 owner"},
		{"set-user-id", Chmod(hostRoot, child(1000), mine, 0o4755), "no 5 mode"},
		{"sticky", Chmod(hostRoot, child(1000), mine, 0o1777), "no 5 mode"},
		{"a type", Chmod(hostRoot, child(1000), mine, dir|0o755), "no 5 mode"},
		{"elsewhere", Chmod(hostRoot, at("/a", "/b", d(0, 0, 0o755)), mine, 0o644), "no 5/1 subtree"},
		{"its directory, closed", Chmod(owner, at("/a", "/a", d(1000, 1000, 0)), d(1000, 1000, 0), 0o700), "5 owner"},
		{"a file in a closed directory", Chmod(owner, at("/a", "/a", d(1000, 1000, 0)), mine, 0o700), "no 5/1 search"},
		{"a container, its own limits", Chmod(ctRoot, own(100000), f(100000, 100000, 0o644), 0o666), "no 5 own"},
		{"so a privileged container", Chmod(privRoot, own(0), f(0, 0, 0o644), 0o666), "no 5 own"},
		{"a container, its own directory", Chmod(ctRoot, own(100000), d(100000, 100000, 0o755), 0o775), "5 root"},
		{"one of the host, its own files", Chmod(owner, own(1000), mine, 0o644), "5 owner"},
		{"unmapped", Chmod(unmapped, own(1000), d(1000, 1000, 0o755), 0o777), "no 5 owner"},
	})
}

func TestSetValue(t *testing.T) {
	const limit = "memory.limit_in_bytes"
	mine := f(1000, 1000, 0o644)
	theirs := f(100000, 100000, 0o644)
	root := f(0, 0, 0o644)
	top := at("/", "/", d(0, 0, 0o555))
	below := at("/", "/b", d(0, 0, 0o755), d(0, 0, 0o555))
	noCap := hostRoot
	noCap.SysAdmin = false
	otherCgroupNS := hostRoot
	otherCgroupNS.SameCgroupNS = false
	rt := func(r Requestor, value string) Decision {
		return SetValue(r, child(1000), "cpu.rt_period_us", value, mine)
	}
	check(t, []row{
		{"owner", SetValue(owner, child(1000), limit, "1M", mine), "6/1 owner"},
		{"owner in its own cgroup", SetValue(owner, own(1000), limit, "1M", mine), "6/1 owner"},
		{"owner, a limit that the host set", SetValue(owner, own(1000), limit, "1M", root), "no 6/1 others"},
		{"container root below", SetValue(ctRoot, child(100000), limit, "1M", theirs), "6/1 root"},
		{"container root in its own cgroup", SetValue(ctRoot, own(100000), limit, "1M", theirs), "no 6 own"},
		{"so of a privileged container", SetValue(privRoot, own(0), limit, "1M", root), "no 6 own"},
		{"which may below", SetValue(privRoot, child(0), limit, "1M", root), "6/1 root"},
		{"ancestor", SetValue(owner, at("/a/b", "/a", d(1000, 1000, 0o755)), limit, "1M", mine), "no 6/1 subtree"},

		{"never", SetValue(hostRoot, top, "tasks", "1", root), "no 6 key"},
		{"unknown", SetValue(hostRoot, top, "memory.new_thing", "1", root), "no 6 key"},
		{"a path", SetValue(hostRoot, below, "../memory.limit_in_bytes", "1", root), "no 6 key"},
		{"an absolute path", SetValue(hostRoot, below, "/memory.limit_in_bytes", "1", root), "no 6 key"},
		{"nothing", SetValue(hostRoot, below, "", "1", root), "no 6 key"},

		{"host root's", SetValue(hostRoot, below, "memory.oom_control", "1", root), "6/1 root"},
		{"not an owner's", SetValue(owner, child(1000), "memory.oom_control", "1", mine), "no 6 host root"},
		{"not container root's", SetValue(ctRoot, child(100000), "memory.oom_control", "1", theirs), "no 6 host root"},
		{"not privileged container root's", SetValue(privRoot, child(0), "memory.oom_control", "1", root), "no 6 host root"},
		{"not root's without its capability", SetValue(noCap, below, "memory.oom_control", "1", root), "no 6 host root"},
		{"not root's of another cgroup namespace", SetValue(otherCgroupNS, below, "memory.oom_control", "1", root), "no 6 host root"},
		{"release_agent of a hierarchy", SetValue(hostRoot, top, "release_agent", "/x", root), "6/1 root"},
		{"release_agent elsewhere", SetValue(hostRoot, below, "release_agent", "/x", root), "no 6 key"},
		{"release_agent for others", SetValue(noCap, top, "release_agent", "/x", root), "no 6 host root"},
		{"release_agent from outside", SetValue(privRoot, top, "release_agent", "/x", root), "no 6/1 outside root"},
		{"elsewhere, whatever the key", SetValue(owner, at("/a", "/b", d(1000, 1000, 0o755)), "tasks", "0", mine), "no 6/1 subtree"},

		{"shortest period", rt(owner, "10000\n"), "6/1 owner"},
		{"too short a period", rt(owner, "9999"), "no 6 period"},
		{"longest period", rt(owner, "1000000"), "6/1 owner"},
		{"too long a period", rt(owner, "1000001"), "no 6 period"},
		{"a period that wraps", rt(owner, "18446744073709561616"), "no 6 period"},
		{"a period that the kernel reads otherwise", rt(owner, "0010000"), "no 6 period"},
		{"an odd period", rt(owner, "0x2710"), "no 6 period"},
		{"no period", rt(owner, ""), "no 6 period"},
		{"host root's period", SetValue(hostRoot, below, "cpu.rt_period_us", "100", root), "6/1 root"},
	})
}

func TestRemoveOnEmpty(t *testing.T) {
	session := Place{Own: "/a/b", Target: "/a"} // what a session's process sees above its own cgroup
	check(t, []row{
		{"a child, as Remove", RemoveOnEmpty(owner, own(1000), "/a/b"), "7/1 owner"},
		{"another's child, as Remove", RemoveOnEmpty(owner, own(0), "/a/b"), "no 7/1 others"},
		{"oneself", RemoveOnEmpty(owner, session, "/a/b"), "no 7 own"},
		{"oneself as root of a container", RemoveOnEmpty(privRoot, session, "/a/b"), "no 7 own"},
		{"oneself as the host's root", RemoveOnEmpty(hostRoot, session, "/a/b"), "7 host root"},
		{"beside oneself as the host's root", RemoveOnEmpty(hostRoot, session, "/a/c"), "no 7/1 subtree"},
		{"a hierarchy's root", RemoveOnEmpty(hostRoot, at("/", "/", d(0, 0, 0o555)), "/"), "no 7 own"},
	})
}

func TestRemove(t *testing.T) {
	sticky := func(uid uint32) Place { return at("/a", "/a", d(uid, uid, 0o1777)) }
	check(t, []row{
		{"a child", Remove(owner, own(1000), "/a/b"), "7/1 owner"},
		{"what another left there", Remove(ctRoot, own(100000), "/a/b"), "7/1 root"},
		{"from another's directory", Remove(owner, own(0), "/a/b"), "no 7/1 others"},
		{"oneself", Remove(owner, at("/a/b", "/a", d(1000, 1000, 0o777)), "/a/b"), "no 7 own"},
		{"a root", Remove(hostRoot, at("/", "/", d(0, 0, 0o755)), "/"), "no 7 own"},
		{"a cgroup of another parent", Remove(owner, own(1000), "/b/c"), "no 7 unknown"},
		{"a grandchild", Remove(owner, own(1000), "/a/b/c"), "no 7 unknown"},
		{"the parent itself", Remove(owner, own(1000), "/a"), "no 7 own"},
		{"below the root", Remove(hostRoot, at("/", "/", d(0, 0, 0o555)), "/a"), "7/1 root"},
		{"from a directory that all may write", Remove(other, at("/a", "/a", d(0, 0, 0o777)), "/a/b"), "7/1 others"},
		{"upwards by name", Remove(owner, own(1000), "/a/.."), "no 7 unknown"},
		{"from a sticky directory of no use", Remove(other, at("/a", "/a", d(0, 0, 0o1755)), "/a/b"), "no 7/1 others"},
		{"from a sticky directory", Remove(other, sticky(0), "/a/b"), "no 7 sticky"},
		{"from one's own sticky directory", Remove(owner, sticky(1000), "/a/b"), "7/1 owner"},
		{"root, from a sticky directory", Remove(ctRoot, sticky(101000), "/a/b"), "7/1 root"},
	})
}

func TestKill(t *testing.T) {
	check(t, []row{
		{"all one's own", Kill(owner, own(1000), []Task{task("/a", 1000), task("/a/b", 1000)}), "7 kill"},
		{"one is another's", Kill(owner, own(1000), []Task{task("/a", 1000), task("/a/b", 1001)}), "no 7/2 uid"},
		{"one has left", Kill(hostRoot, child(0), []Task{task("/a", 0)}), "no 7 unknown"},
		{"none", Kill(owner, child(1000), nil), "7 kill"},
		{"none, elsewhere", Kill(hostRoot, at("/a", "/b", d(0, 0, 0o755)), nil), "no 7/1 subtree"},
		{"none, out of reach", Kill(owner, at("/a", "/a/b", d(0, 0, 0o700), d(1000, 1000, 0o755)), nil), "no 7/1 search"},
	})
}

func TestRead(t *testing.T) {
	check(t, []row{
		{"a file", ReadValue(owner, child(1000), f(1000, 1000, 0o444)), "8/1 owner"},
		{"a file that only takes", ReadValue(owner, child(1000), f(1000, 1000, 0o200)), "no 8/1 owner"},
		{"its own limits", ReadValue(owner, own(1000), f(0, 0, 0o644)), "8/1 others"},
		{"its own limits, in a container", ReadValue(ctRoot, own(100000), f(0, 0, 0o644)), "no 8/1 unmapped"},
		{"a directory", ReadValue(owner, child(1000), d(1000, 1000, 0o400)), "8/1 owner"},
		{"the ancestor's", ReadValue(hostRoot, at("/a/b", "/a", d(0, 0, 0o755)), f(0, 0, 0o644)), "no 8/1 subtree"},
	})
}

func TestPidCgroup(t *testing.T) {
	hidden := task("/a", 1000)
	hidden.Visible = false
	check(t, []row{
		{"another's task", PidCgroup(owner, task("/a/b", 0), "/a"), "8 task"},
		{"of unknown owner", PidCgroup(owner, task("/a/b"), "/a"), "8 task"},
		{"sibling with a common prefix", PidCgroup(owner, task("/ab", 1000), "/a"), "no 8 subtree"},
		{"invisible", PidCgroup(owner, hidden, "/a"), "no 8 invisible"},
		{"host, from the root", PidCgroup(owner, task("/x", 0), "/"), "8 task"},
		{"outside, from the root", PidCgroup(ctRoot, task("/x", 100000), "/"), "no 8/1 outside root"},
		{"unknown", PidCgroup(owner, task("", 1000), "/a"), "no 8 subtree"},
		{"unknown base", PidCgroup(owner, task("/a", 1000), ""), "no 8 subtree"},
	})
}

func TestEscape(t *testing.T) {
	noCap, noUser, noPID, noCgroup, notZero := hostRoot, hostRoot, hostRoot, hostRoot, hostRoot
	noCap.SysAdmin = false
	noUser.SameUserNS = false
	noPID.SamePIDNS = false
	noCgroup.SameCgroupNS = false
	notZero.UID = 1000
	check(t, []row{
		{"host root", Escape(hostRoot), "9 host root"},
		{"without the capability", Escape(noCap), "no 9 host root"},
		{"of another user namespace", Escape(noUser), "no 9 host root"},
		{"of another pid namespace", Escape(noPID), "no 9 host root"},
		{"of another cgroup namespace", Escape(noCgroup), "no 9 host root"},
		{"not uid 0", Escape(notZero), "no 9 host root"},
		{"container root", Escape(ctRoot), "no 9 host root"},
	})
}

func TestEscapeTo(t *testing.T) {
	mine := task("/c/r", 100000)
	check(t, []row{
		{"up to the proxy's", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", mine, "/c/x", true), "9 proxy"},
		{"a user", EscapeTo(ctUser, ctRoot, "/c/r", "/c", task("/c/r", 101000), "/c/x", true), "no 9 not root"},
		{"behind a user", EscapeTo(ctRoot, ctUser, "/c/r", "/c", mine, "/c/x", true), "no 9 proxy"},
		{"behind the proxy of the container around", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", mine, "/c/x", false), "no 9 container"},
		{"above the proxy", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", mine, "/", true), "no 9 subtree"},
		{"not below the proxy", EscapeTo(ctRoot, ctRoot, "/d/r", "/c", task("/d/r", 100000), "/c/x", true), "no 9 chain"},
		{"a proxy that nobody placed", EscapeTo(ctRoot, ctRoot, "/c/r", "/", mine, "/c/x", true), "no 9/1 outside root"},
		{"a task of others", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", task("/c/r", 0), "/c/x", true), "no 9/2 uid"},
		{"a task not under the requestor's", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", task("/c/y", 100000), "/c/x", true), "no 9/2 subtree"},
	})
}

func TestDecision(t *testing.T) {
	yes := OverTask(owner, "/a", task("/a", 1000))
	no := OverTask(owner, "/a", task("/a", 0))
	check(t, []row{
		{"zero", Decision{}, "no 0 no decision"},
		{"none", All(), "no 0 no decision"},
		{"one zero", All(yes, Decision{}), "no 0 no decision"},
		{"the first refusal", All(yes, no, yes), "no 2 uid"},
		{"all", All(Escape(hostRoot), yes), "2 own uid"},
	})
}

// TestReason: what a requestor is told names what stands against it.
func TestReason(t *testing.T) {
	jail := Move(owner, task("/a/b", 1000), at("/a", "/a/c", d(1000, 1000, 0o755), d(1000, 1000, 0o755)), f(1000, 1000, 0o644), own(0), f(0, 0, 0o644))
	for want, got := range map[string]string{
		"nothing allows it":     Decision{}.Reason(),
		"the task is not yours": OverTask(owner, "/a", task("/a", 0)).Reason(),
		"the cgroup above it: you are neither its owner nor root in your user namespace":                                          Create(owner, at("/a", "/a", d(0, 0, 0o755))).Reason(),
		"you are neither its owner nor root in your user namespace":                                                               Delegate(owner, at("/a", "/a/b", d(0, 0, 0o755), d(0, 0, 0o755))).Reason(),
		"the task would leave a cgroup from which you may not take it: you are neither its owner nor root in your user namespace": jail.Reason(),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestHint: a container's root is told what lets it leave its own cgroup, and
// nobody who could do nothing with it.
func TestHint(t *testing.T) {
	const proxy = "start a cgproxy in your own container"
	for _, c := range []struct {
		name string
		d    Decision
		want string
	}{
		{"container root", Escape(ctRoot), proxy},
		{"a user in a container", Escape(ctUser), ""},
		{"a user of the host", Escape(owner), ""},
		{"host root", Escape(hostRoot), ""},
		{"behind the proxy of the container around", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", task("/c/r", 100000), "/c/x", false), proxy},
		{"a key that nobody sets", SetValue(hostRoot, at("/", "/a", d(0, 0, 0o755), d(0, 0, 0o755)), "tasks", "1", f(0, 0, 0o644)), "docs/KEYS.md lists those that can, and cgm(1) those that mean the same on every host"},
		{"above the proxy", EscapeTo(ctRoot, ctRoot, "/c/r", "/c", task("/c/r", 100000), "/", true), ""},
	} {
		if got := c.d.Hint(); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestUIDZeroIsNotRoot(t *testing.T) {
	limit := f(0, 0, 0o644)
	for _, r := range []struct {
		name string
		got  Decision
		want bool
	}{
		{"host root sets its own cgroup's limit", SetValue(hostRoot, own(0), "pids.max", "max", limit), true},
		{"without capabilities it does not", SetValue(noCaps, own(0), "pids.max", "max", limit), false},
		{"nor in a cgroup namespace", SetValue(pidHost, own(0), "pids.max", "max", limit), false},
		{"below its own it owns what is there", SetValue(noCaps, child(0), "pids.max", "max", limit), true},
		{"and not what others have", SetValue(noCaps, child(1000), "pids.max", "max", f(1000, 1000, 0o644)), false},
		{"host root has all tasks", OverTask(hostRoot, "/", task("/a", 1000)), true},
		{"without capabilities its own", OverTask(noCaps, "/", task("/a", 0)), true},
		{"and no others", OverTask(noCaps, "/", task("/a", 1000)), false},
		{"nor does it give away", Chown(noCaps, child(0), 1000, 1000, false), false},
		{"a privileged container's root has its tasks", OverTask(privRoot, "/a", task("/a/b", 1000)), true},
	} {
		if r.got.Allowed() != r.want {
			t.Errorf("%s: allowed = %v (%s)", r.name, r.got.Allowed(), r.got.Clause())
		}
	}
}

func TestRealtime(t *testing.T) {
	task := func(uids ...uint32) RealtimeTask { return RealtimeTask{Visible: true, Within: true, UIDs: uids} }
	hidden, around := task(1000), task(1000)
	hidden.Visible, around.Within = false, false
	check(t, []row{
		{"its own", Realtime(owner, task(1000, 1000, 1000)), "10/2 own uid"},
		{"another's", Realtime(owner, task(1001)), "no 10/2 uid"},
		{"root's", Realtime(owner, task(0)), "no 10/2 uid"},
		{"one thread is root's", Realtime(owner, task(1000, 1000, 1000, 1000, 0, 1000)), "no 10/2 uid"},
		{"a setuid program", Realtime(owner, task(1000, 0, 0)), "no 10/2 uid"},
		{"not visible", Realtime(owner, hidden), "no 10 invisible"},
		{"around its user namespace", Realtime(owner, around), "no 10 namespace"},
		{"nothing known", Realtime(owner, RealtimeTask{Visible: true, Within: true}), "no 10/2 unknown"},
		{"unknown ids", Realtime(owner, task(NoID)), "no 10/2 uid"},
		{"host root, anybody's", Realtime(hostRoot, task(1000, 0, 100000)), "10/2 root"},
		{"host root, not visible", Realtime(hostRoot, hidden), "no 10 invisible"},
		{"a service without capabilities", Realtime(noCaps, task(1000)), "no 10/2 uid"},
		{"its own, without capabilities", Realtime(noCaps, task(0)), "10/2 own uid"},
		{"root of a container, its user's", Realtime(ctRoot, task(101000)), "10/2 root"},
		{"root of a container, the host's", Realtime(ctRoot, task(1000)), "no 10/2 uid"},
		{"root of a container, the host's of its uids", Realtime(ctRoot, RealtimeTask{Visible: true, UIDs: []uint32{101000}}), "no 10 namespace"},
		{"a container's user, its own", Realtime(ctUser, task(101000)), "10/2 own uid"},
		{"a container's user, its root's", Realtime(ctUser, task(100000)), "no 10/2 uid"},
		{"without maps", Realtime(unmapped, task(1000)), "no 10/2 uid"},
		{"all threads: host root", RealtimeAll(hostRoot), "10 host root"},
		{"all threads: a user", RealtimeAll(owner), "no 10 host root"},
		{"all threads: uid 0 without capabilities", RealtimeAll(noCaps), "no 10 host root"},
		{"all threads: a container's root", RealtimeAll(ctRoot), "no 10 host root"},
		{"all threads: a privileged container's root", RealtimeAll(privRoot), "no 10 host root"},
		{"all threads: in a cgroup namespace", RealtimeAll(pidHost), "no 10 host root"},
		{"kept", RealtimeKept(true), "10 kept"},
		{"another thread", RealtimeKept(false), "no 10 kept"},
	})
}
