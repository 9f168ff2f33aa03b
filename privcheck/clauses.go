package privcheck

import (
	"slices"
	"strconv"
	"strings"
)

// The questions. Every Place given for one question must be of the same
// hierarchy; a request over several hierarchies asks once for each, and a
// request of several parties (opener, sender, proxy) once for each party.
//
// Each function is one ordered list: a refusal returns at once, and what no
// line allows is denied by the last one.

// Bits of st_mode (inode(7)).
const (
	modeType   = 0o170000
	modeDir    = 0o040000
	modeSticky = 0o001000
	modePerm   = 0o000777
)

// Periods of realtime that an unprivileged requestor may set, in microseconds.
// Shorter ones cost the whole host in timer interrupts, longer ones let one
// cgroup hold a cpu for as long as its runtime says.
const (
	minRTPeriod = 10_000
	maxRTPeriod = 1_000_000
)

// Over answers clause 1: may r have the access want to obj, which is the
// directory p.Dir or a file in it?
func Over(r Requestor, p Place, obj Object, want Access) Decision {
	if d := reach(r, p, obj); !d.allowed {
		return d
	}
	return access(r, obj, want)
}

// reach answers the part of clause 1 that no mode bit of obj can change: obj
// is in r's subtree, and every directory on the way to it can be searched.
func reach(r Requestor, p Place, obj Object) Decision {
	if !clean(p.Own) || !clean(p.Target) {
		return deny("1 unknown", "where the cgroup lies is not known")
	}
	if d := confined(r, p.Own); !d.allowed {
		return d
	}
	if !Below(p.Own, p.Target) {
		return deny("1 subtree", "the cgroup is not below your own")
	}
	if len(p.Way) != depth(p.Target)-depth(p.Own) {
		return deny("1 unknown", "the way to the cgroup is not known")
	}
	for _, dir := range p.Way {
		if !access(r, dir, Search).allowed {
			return deny("1 search", "a directory on the way cannot be searched by you")
		}
	}
	if !obj.isDir() && !access(r, p.Dir, Search).allowed {
		return deny("1 search", "the cgroup's directory cannot be searched by you")
	}
	return allow("1 reach")
}

// confined refuses an outside requestor in a hierarchy in which nobody placed
// it: "below its own cgroup" would be the whole host.
func confined(r Requestor, own string) Decision {
	if r.Outside() && own == "/" {
		return deny("1 outside root", "you are in no cgroup of your own in this hierarchy")
	}
	return allow("1 confined")
}

// access compares with what the kernel's generic_permission() does for one
// inode, except that unmapped ids match nothing, that CAP_DAC_OVERRIDE is taken
// from being root in the user namespace, and that bits for others mean the
// others of the owner's own user namespace.
func access(r Requestor, o Object, want Access) Decision {
	granted := func(shift uint, clause, reason string) Decision {
		if Access(o.Mode>>shift)&want == want {
			return allow(clause)
		}
		return deny(clause, reason)
	}
	switch {
	case r.UID == NoID || r.GID == NoID || o.UID == NoID || o.GID == NoID || want == 0:
		return deny("1 unknown", "whose it is is not known")
	case r.rootOver(o):
		return allow("1 root")
	case r.owns(o):
		return granted(6, "1 owner", "its mode does not let the owner")
	case r.inGroup(o):
		return granted(3, "1 group", "its mode does not let the group")
	// One whose group it is by an id that is not mapped is not one of the others.
	case r.UIDs.Mapped(o.UID) && o.GID != r.GID:
		return granted(0, "1 others", "you are neither its owner nor root in your user namespace")
	}
	return deny("1 unmapped", "its owner or group is not mapped in your user namespace")
}

// OverTask answers clause 2: has r, whose own cgroup is own, privilege over t?
func OverTask(r Requestor, own string, t Task) Decision {
	if !t.Visible {
		return deny("2 invisible", "the task is not visible in your pid namespace")
	}
	if d := confined(r, own); !d.allowed {
		return d.in("2")
	}
	if !Below(own, t.Cgroup) {
		return deny("2 subtree", "the task is not in your cgroup or below it")
	}
	return overIDs(r, t.UIDs)
}

// overIDs answers the part of clause 2 that is about whose the task is.
func overIDs(r Requestor, uids []uint32) Decision {
	if len(uids) == 0 {
		return deny("2 unknown", "whose task it is is not known")
	}
	clause := "2 own uid"
	for _, uid := range uids {
		switch {
		case r.is(uid):
		case r.RootInUserNS() && r.UIDs.Mapped(uid):
			clause = "2 root"
		default:
			return deny("2 uid", "the task is not yours")
		}
	}
	return allow(clause)
}

// escapes reports whether one of the cgroups above has limits that do not bind
// what is put below it. Only the host's root may do so.
func escapes(r Requestor, above ...Object) bool {
	return !r.HostRoot() && slices.ContainsFunc(above, func(dir Object) bool { return !dir.Hierarchical })
}

// flatReason is why nothing is put below such a cgroup.
const flatReason = "a cgroup above it has limits that would not bind it (throttling of block devices); leave this hierarchy out"

// Create answers clause 3. parent is the deepest directory that exists on the
// way to the new cgroup; its Target is that directory's path.
func Create(r Requestor, parent Place) Decision {
	return create(r, parent).about("the cgroup above it")
}

// create is Create, for a place that is what the request names.
func create(r Requestor, parent Place) Decision {
	if r.UID == NoID || r.GID == NoID {
		return deny("3 unknown", "who you are is not known")
	}
	d := Over(r, parent, parent.Dir, Write|Search).in("3")
	if !d.allowed {
		return d
	}
	if escapes(r, append(slices.Clip(parent.Way), parent.Dir)...) {
		return deny("3 flat", flatReason)
	}
	return d
}

// Session is a cgroup in a tree that systemd manages and has not delegated.
type Session struct {
	// Own is the requestor's own cgroup in systemd's tree.
	Own string
	// Left has the limits of every hierarchy that a scope would not be under.
	Left Left
	// Scopes is how many its uid has already.
	Scopes int
}

// MaxScopes is how many scopes a uid may have at the same time.
const MaxScopes = 64

// Scope answers clause 3 for a requestor in a cgroup that systemd has not
// delegated: may systemd, which does what the daemon asks, be asked for a scope
// of r's own in the slice around that cgroup (SliceOf)?
func Scope(r Requestor, s Session) Decision {
	slice, ok := SliceOf(s.Own)
	switch {
	case r.UID == NoID || r.GID == NoID || !ok:
		return deny("3 unknown", "who you are, or where, is not known")
	case r.Outside():
		return deny("3 undelegated", "systemd manages your cgroup and has not delegated it")
	case r.HostRoot():
		return allow("3 scope host root")
	case slice != "/user.slice/user-"+strconv.FormatUint(uint64(r.UID), 10)+".slice":
		return deny("3 undelegated", "systemd manages your cgroup and has not delegated it")
	case s.Scopes >= MaxScopes:
		return deny("3 scopes", "you have too many scopes already")
	}
	if d := leaves(r, s.Left); !d.allowed {
		return d.in("3")
	}
	return allow("3 scope")
}

// leaves reports whether r may go, or let a task go, to where the limits are not
// in force. Those that clause 6 lets r write are no obstacle: r could lift them.
func leaves(r Requestor, l Left) Decision {
	if !l.Known {
		return deny("3 unknown", "the limits in force are not known")
	}
	for _, limit := range l.Limits {
		if r.UID == 0 || ClassOf(limit.Name) != Delegable || !access(r, limit.File, Write).allowed {
			return deny("3 limit", "a limit that is not yours to lift is in force where you are and would not bind a scope ("+limit.Name+")")
		}
	}
	return allow("3 leaves")
}

// SliceOf returns the innermost slice of systemd's own around a cgroup: of
// /user.slice/user-1000.slice/session-1.scope the first two. It is "/" where
// there is none, and false for a path that is unknown.
func SliceOf(path string) (string, bool) {
	if !clean(path) {
		return "", false
	}
	slice := ""
	for c := range strings.SplitSeq(path[1:], "/") {
		if !strings.HasSuffix(c, ".slice") {
			break
		}
		slice += "/" + c
	}
	if slice == "" {
		slice = "/"
	}
	return slice, true
}

// Move answers clause 4: may r move t to the cgroup dst? dstTasks is dst's
// file of tasks (on v2 cgroup.procs). common is the nearest common ancestor of
// t.Cgroup and dst.Target with commonTasks its file of tasks; they are looked at
// only if dst is neither where the task is nor below that.
func Move(r Requestor, t Task, dst Place, dstTasks Object, common Place, commonTasks Object) Decision {
	// The cgroup that a scope stands for, and none below it: into that somebody
	// may have put the task.
	entering := dst.From != "" && t.Cgroup == dst.From && !Below(dst.Own, t.Cgroup)
	over := dst.Own
	if entering {
		over = dst.From
	}
	if d := OverTask(r, over, t); !d.allowed {
		return d.in("4")
	}
	d := Over(r, dst, dstTasks, Write)
	if !d.allowed {
		return d.in("4")
	}
	// On its way up a task only comes under more limits.
	if !Below(dst.Target, t.Cgroup) && escapes(r, dst.Way...) {
		return deny("4 flat", flatReason)
	}
	if entering {
		if !r.HostRoot() {
			if d := leaves(r, dst.Left); !d.allowed {
				return d.in("4")
			}
		}
		return d.in("4 scope")
	}
	if Below(t.Cgroup, dst.Target) {
		return d.in("4 down")
	}
	if common.Own != dst.Own || common.Target != CommonAncestor(t.Cgroup, dst.Target) {
		return deny("4 unknown", "the common ancestor of the two cgroups is not known")
	}
	d = Over(r, common, commonTasks, Write).about("the task would leave a cgroup from which you may not take it")
	return d.in("4 sideways")
}

// Chown answers clause 5 for the directory p.Dir. uid and gid are the daemon's
// own numbers, NoID where the request leaves one as it is; unmapped says that
// the request named an id that r's user namespace does not map.
func Chown(r Requestor, p Place, uid, gid uint32, unmapped bool) Decision {
	if !r.RootInUserNS() {
		return deny("5 not root", "you are not root in your user namespace")
	}
	if unmapped || uid != NoID && !r.UIDs.Mapped(uid) || gid != NoID && !r.GIDs.Mapped(gid) {
		return deny("5 unmapped", "the new owner is not mapped in your user namespace")
	}
	if d := reach(r, p, p.Dir); !d.allowed {
		return d.in("5")
	}
	// The mode's bits give no right to change an owner.
	if !r.rootOver(p.Dir) {
		return deny("5 owner", "its present owner is not mapped in your user namespace")
	}
	return allow("5 root")
}

// ChownFile answers clause 5 for a file that changes hands with p.Dir. One that
// was left to somebody outside r's user namespace stays theirs: who has the
// directory alone was not given the right over the tasks in it.
func ChownFile(r Requestor, p Place, file Object, uid, gid uint32, unmapped bool) Decision {
	d := Chown(r, p, uid, gid, unmapped)
	if d.allowed && !r.rootOver(file) {
		return deny("5 owner", "the present owner of a file in it is not mapped in your user namespace")
	}
	return d
}

// Chmod answers clause 5 for obj, p.Dir or a file in it, and a new mode.
func Chmod(r Requestor, p Place, obj Object, mode uint32) Decision {
	if mode&^uint32(modePerm) != 0 {
		return deny("5 mode", "the mode has bits other than those of 0777")
	}
	if d := reach(r, p, obj); !d.allowed {
		return d.in("5")
	}
	// Else a container whose limits belong to an id that is mapped inside could
	// let the container around it write them.
	if r.Outside() && p.Target == p.Own && !obj.isDir() {
		return deny("5 own", "a container does not change the files of its own cgroup, only of those below")
	}
	switch {
	case r.rootOver(obj):
		return allow("5 root")
	case r.owns(obj):
		return allow("5 owner")
	}
	return deny("5 owner", "you are neither its owner nor root in your user namespace")
}

// SetValue answers clause 6: may r write value to the kernel's file called
// name, which is file, in the cgroup p?
func SetValue(r Requestor, p Place, name, value string, file Object) Decision {
	// What may be written where one cannot get to is not worth a word.
	if d := reach(r, p, file); !d.allowed {
		return d.in("6")
	}
	switch ClassOf(name) {
	case Delegable:
		if name == rtPeriod && !modestPeriod(value) && !r.HostRoot() {
			return deny("6 period", "a period outside 10 ms to 1 s is for the host's root alone")
		}
	case HostRootOnly:
		if !r.HostRoot() {
			return deny("6 host root", "this key is for the host's root alone")
		}
		if name == releaseAgent && p.Target != "/" {
			return deny("6 key", "this key is only set at a hierarchy's root")
		}
	default:
		return deny("6 key", "this key cannot be set").hinted("docs/KEYS.md lists those that can, and cgm(1) those that mean the same on every host")
	}
	// The limits of a container's own cgroup are what its host set for it, even
	// where the files belong to an id that is mapped inside. The same goes for
	// uid 0 that is not the host's root: a service without its capabilities, a
	// container that shares the host's pid namespace.
	if p.Target == p.Own && (r.Outside() || r.UID == 0 && !r.HostRoot()) {
		return deny("6 own", "a container does not change its own cgroup, only those below")
	}
	return Over(r, p, file, Write).in("6")
}

// modestPeriod reports whether value is a period that clause 6 lets everybody
// set. Only a plain decimal number can be one: the kernel reads a leading 0 as
// octal (kstrtoull), so that "0010000" is 4096 there.
func modestPeriod(value string) bool {
	value = strings.TrimSpace(value)
	us, err := strconv.ParseUint(value, 10, 64)
	return err == nil && value[0] != '0' && us >= minRTPeriod && us <= maxRTPeriod
}

// Remove answers clause 7 for Remove, Delete and Prune: parent is the directory
// above the cgroup that goes, which is called target.
func Remove(r Requestor, parent Place, target string) Decision {
	if target == parent.Own {
		return deny("7 own", "your own cgroup is not yours to remove")
	}
	if above, ok := parentOf(target); !ok || above != parent.Target {
		return deny("7 unknown", "where the cgroup lies is not known")
	}
	d := Over(r, parent, parent.Dir, Write|Search).about("the cgroup above it")
	// Below a directory with the sticky bit each removes only its own (inode(7)).
	// Whose the cgroup is is not among the facts: only the directory's owner.
	if d.allowed && parent.Dir.Mode&modeSticky != 0 && !r.owns(parent.Dir) && !r.rootOver(parent.Dir) {
		return deny("7 sticky", "the directory above it is sticky and not yours")
	}
	return d.in("7")
}

// RemoveOnEmpty answers clause 7 for RemoveOnEmpty: as Remove, but the host's
// root, which could leave it, may name its own cgroup. A login service so marks
// the one that it has put itself and the session into.
func RemoveOnEmpty(r Requestor, parent Place, target string) Decision {
	if target == parent.Own && target != "/" && r.HostRoot() {
		return allow("7 host root")
	}
	return Remove(r, parent, target)
}

// Kill answers clause 7 for Kill: may r kill tasks, which are all those in the
// cgroup p and below? None at all need only be reached.
func Kill(r Requestor, p Place, tasks []Task) Decision {
	// As for a file in it: the tasks are read there.
	if d := reach(r, p, Object{}); !d.allowed {
		return d.in("7")
	}
	for _, t := range tasks {
		if !Below(p.Target, t.Cgroup) {
			return deny("7 unknown", "a task is not where it was")
		}
		if d := OverTask(r, p.Own, t); !d.allowed {
			return d.in("7")
		}
	}
	return allow("7 kill")
}

// Delegate answers clause 7 for Delegate, about a cgroup p that is there by now:
// as Create below it, and as Chown to r itself, for which owning it is enough.
func Delegate(r Requestor, p Place) Decision {
	if p.Target == "/" {
		return deny("7 root", "a hierarchy's root cannot be delegated")
	}
	d := create(r, p)
	if d.allowed && !r.owns(p.Dir) && !r.rootOver(p.Dir) {
		return deny("7 owner", "you are neither its owner nor root over it in your user namespace")
	}
	return d.in("7")
}

// DelegateFile answers clause 7 for a file of delegation of p, which is going to
// be r's: as ChownFile, except that r need not be root for what it owns.
func DelegateFile(r Requestor, p Place, file Object) Decision {
	d := Delegate(r, p)
	if d.allowed && !r.owns(file) && !r.rootOver(file) {
		return deny("7 owner", "a file in it is somebody else's, who has kept the right over its tasks")
	}
	return d
}

// DelegateLimit answers clause 7 for any other file of p: is it to be the host's?
// That is refused where r could do nothing to the file anyway: such a limit stays
// with whoever has set it.
func DelegateLimit(r Requestor, p Place, file Object) Decision {
	d := Delegate(r, p)
	if d.allowed && !r.owns(file) && !r.rootOver(file) && !access(r, file, Write).allowed {
		return deny("7 limit", "it is not yours already")
	}
	return d
}

// ReadValue answers clause 8 for a file of a cgroup, or its directory
// (ListChildren, ListKeys).
func ReadValue(r Requestor, p Place, obj Object) Decision {
	return Over(r, p, obj, Read).in("8")
}

// PidCgroup answers clause 8 for GetPidCgroup: base is the cgroup that the
// answer is relative to.
func PidCgroup(r Requestor, t Task, base string) Decision {
	if !t.Visible {
		return deny("8 invisible", "the task is not visible in your pid namespace")
	}
	if d := confined(r, base); !d.allowed {
		return d.in("8")
	}
	if !Below(base, t.Cgroup) {
		return deny("8 subtree", "the task is not below the cgroup that the answer is relative to")
	}
	return allow("8 task")
}

// Escape answers clause 9: may r move a task anywhere (MovePidAbs)?
func Escape(r Requestor) Decision {
	if r.HostRoot() {
		return allow("9 host root")
	}
	d := deny("9 host root", "only the host's root may move a task out of its own cgroup")
	if r.Outside() && r.RootInUserNS() {
		return d.hinted(ownProxy)
	}
	return d
}

// ownProxy is what root of a container can do about clause 9.
const ownProxy = "start a cgproxy in your own container"

// EscapeTo answers clause 9 for a requestor r, in the cgroup own, behind a
// proxy whose own cgroup is proxyOwn: may r move t to dst, at or below
// proxyOwn? home says that the innermost proxy, which this is or encloses, is in
// r's own container: the proxy of the container around would let r out of what
// that one confined it to. That the proxy could make the move itself is a question
// of its own (Move).
func EscapeTo(r, proxy Requestor, own, proxyOwn string, t Task, dst string, home bool) Decision {
	if !r.RootInUserNS() {
		return deny("9 not root", "you are not root in your user namespace")
	}
	if !proxy.RootInUserNS() {
		return deny("9 proxy", "the proxy is not root in its user namespace")
	}
	if !home {
		return deny("9 container", "the proxy is not one of your own container").hinted(ownProxy)
	}
	if d := confined(proxy, proxyOwn); !d.allowed {
		return d.in("9")
	}
	if !Below(proxyOwn, own) {
		return deny("9 chain", "you are not in the proxy's cgroup or below it")
	}
	if !Below(proxyOwn, dst) {
		return deny("9 subtree", "the cgroup is not below the proxy's own")
	}
	if d := OverTask(r, own, t); !d.allowed {
		return d.in("9")
	}
	return allow("9 proxy")
}

// Realtime answers clause 10: may r have a thread of t scheduled otherwise, or t
// given resource limits? How much is a question of policy and limits.
func Realtime(r Requestor, t RealtimeTask) Decision {
	switch {
	case !t.Visible:
		return deny("10 invisible", "the process is not visible in your pid namespace")
	// Else whoever is called 0 in a namespace of its own making would be root over
	// those of its uid outside, who were confined otherwise.
	case !t.Within:
		return deny("10 namespace", "the process is not in your user namespace or in one below it")
	}
	return overIDs(r, t.UIDs).in("10")
}

// RealtimeAll answers clause 10 for what concerns the threads of the whole host:
// ResetKnown, ResetAll and Exit.
func RealtimeAll(r Requestor) Decision {
	if r.HostRoot() {
		return allow("10 host root")
	}
	return deny("10 host root", "this is for the host's root alone")
}

// RealtimeKept answers clause 10 for a thread that an earlier daemon has granted
// realtime: may it keep it? It may if it is the same thread and has it still.
func RealtimeKept(same bool) Decision {
	if !same {
		return deny("10 kept", "it is not the thread that was granted it")
	}
	return allow("10 kept")
}
