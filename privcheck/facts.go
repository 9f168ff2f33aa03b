package privcheck

import "strings"

// NoID is the id of nobody: unknown, or not mapped. It equals nothing, itself
// included.
const NoID = ^uint32(0)

// IDRange is a line of /proc/PID/uid_map or gid_map, read in the daemon's user
// namespace (user_namespaces(7)).
type IDRange struct{ Inside, Outside, Count uint32 }

// IDMap is the map of a user namespace. An empty map maps nothing.
type IDMap []IDRange

// ToInside returns the namespace's number for one of the daemon's own.
func (m IDMap) ToInside(id uint32) (uint32, bool) {
	for _, r := range m {
		if id != NoID && id >= r.Outside && id-r.Outside < r.Count {
			if in := r.Inside + (id - r.Outside); in >= r.Inside && in != NoID {
				return in, true
			}
		}
	}
	return NoID, false
}

// ToOutside returns the daemon's own number for one of the namespace's.
func (m IDMap) ToOutside(id uint32) (uint32, bool) {
	for _, r := range m {
		if id != NoID && id >= r.Inside && id-r.Inside < r.Count {
			if out := r.Outside + (id - r.Inside); out >= r.Outside && out != NoID {
				return out, true
			}
		}
	}
	return NoID, false
}

// Mapped reports whether the daemon's id is known inside.
func (m IDMap) Mapped(id uint32) bool {
	_, ok := m.ToInside(id)
	return ok
}

// Requestor is who asks. Its ids are the daemon's own numbers. A uid or gid
// that its own user namespace does not map matches no owner and no group, though
// the kernel, which compares the numbers underneath, would let it: such a
// process has no name by which anybody inside could have meant it.
type Requestor struct {
	UID, GID uint32
	// UIDs and GIDs are the maps of its user namespace. For the daemon's own
	// namespace they map each id to itself.
	UIDs, GIDs IDMap
	// SameUserNS, SamePIDNS and SameCgroupNS: it is in the daemon's own
	// namespace of that type.
	SameUserNS, SamePIDNS, SameCgroupNS bool
	// SysAdmin: CAP_SYS_ADMIN is in its effective set. It means the host's
	// only together with SameUserNS.
	SysAdmin bool
	// Capable: being called 0 in its user namespace makes it root there. A
	// process among the host's own that has given up CAP_SYS_ADMIN, as a
	// confined service does, is an owner like any other instead.
	Capable bool
}

// RootInUserNS reports whether r's uid is 0 in r's user namespace, and that
// means something.
func (r Requestor) RootInUserNS() bool {
	in, ok := r.UIDs.ToInside(r.UID)
	return ok && in == 0 && r.Capable
}

// Outside reports whether r is in another user or pid namespace than the
// daemon.
func (r Requestor) Outside() bool { return !r.SameUserNS || !r.SamePIDNS }

// is reports whether uid is r's.
func (r Requestor) is(uid uint32) bool { return uid == r.UID && r.UIDs.Mapped(uid) }

// owns reports whether r is the owner of o.
func (r Requestor) owns(o Object) bool { return r.is(o.UID) }

// inGroup reports whether r's gid is o's group.
func (r Requestor) inGroup(o Object) bool { return o.GID == r.GID && r.GIDs.Mapped(o.GID) }

// rootOver reports whether r is root in a user namespace in which o's owner and
// group are mapped: what the kernel asks before a capability counts for an
// inode (user_namespaces(7)).
func (r Requestor) rootOver(o Object) bool {
	return r.RootInUserNS() && r.UIDs.Mapped(o.UID) && r.GIDs.Mapped(o.GID)
}

// HostRoot reports whether r is uid 0 with effective CAP_SYS_ADMIN in the
// daemon's user, pid and cgroup namespaces.
func (r Requestor) HostRoot() bool {
	return r.UID == 0 && r.SysAdmin && r.SameUserNS && r.SamePIDNS && r.SameCgroupNS
}

// Access is what is asked of a directory or file, in the bits of a mode.
type Access uint32

// The kinds of access; they can be or-ed.
const (
	Search Access = 1
	Write  Access = 2
	Read   Access = 4
)

// Object is a directory or file: its owner in the daemon's own numbers, and
// its whole st_mode, with the bits of the file's type (inode(7)).
type Object struct {
	UID, GID uint32
	Mode     uint32
	// Hierarchical, of a cgroup's directory: every limit in force there binds
	// the cgroups below it too. Create and Move look at it.
	Hierarchical bool
}

// isDir reports whether o is a directory. What has no type is taken for a file:
// more is asked for that.
func (o Object) isDir() bool { return o.Mode&modeType == modeDir }

// Place says where a cgroup lies, seen from a requestor, in one hierarchy.
type Place struct {
	// Own is the requestor's current cgroup and Target the cgroup in
	// question, both as paths from the hierarchy's root: "/", "/a/b". An
	// empty or otherwise malformed path is unknown and lies nowhere.
	Own, Target string
	// Way holds the directories that must be searched to reach Target: Own,
	// and each one below it, Target itself not included. It is empty if Target
	// is Own; one too few or too many counts as unknown.
	Way []Object
	// Dir is Target's directory.
	Dir Object
	// From is where the requestor is, if Own is a scope that stands for that
	// cgroup (see Scope); empty if it is Own itself.
	From string
	// Left is what the task leaves behind that is to be moved from From.
	Left Left
}

// Left is what no longer binds a task that goes from a cgroup into a scope
// beside it: the limits in force on that cgroup and on those above it, up to and
// without the nearest one that has the scope below it too.
type Left struct {
	// Known: they were looked at, all of them.
	Known  bool
	Limits []Limit
}

// Limit is a limit in force.
type Limit struct {
	// Name is that of its file, or says what it is, where it has none.
	Name string
	// File is its file. What has none has no known owner (NoID).
	File Object
}

// Task is a task that is to be acted upon.
type Task struct {
	// Visible: it has a number in the requestor's pid namespace.
	Visible bool
	// UIDs are the real, effective and saved uids of all its threads, in the
	// daemon's own numbers. None means unknown.
	UIDs []uint32
	// Cgroup is where it is in the hierarchy in question, as a path from its
	// root; empty is unknown.
	Cgroup string
}

// RealtimeTask is a process, a thread of which is to be scheduled otherwise, or
// which is to be given resource limits.
type RealtimeTask struct {
	// Visible: it has a number in the requestor's pid namespace.
	Visible bool
	// Within: it is in the requestor's user namespace, or in one below that.
	Within bool
	// UIDs are the real, effective and saved uids of all its threads, in the
	// daemon's own numbers. None means unknown.
	UIDs []uint32
}

// Below reports whether path is dir or lies below it, compared component by
// component. Both are paths from a hierarchy's root. A path that does not
// start with "/", or has an empty, "." or ".." component, is below nothing and
// has nothing below it.
func Below(dir, path string) bool {
	if !clean(dir) || !clean(path) {
		return false
	}
	if dir == "/" || dir == path {
		return true
	}
	return strings.HasPrefix(path, dir) && path[len(dir)] == '/'
}

// CommonAncestor returns the nearest cgroup that a and b are both below, or ""
// if one of them is unknown.
func CommonAncestor(a, b string) string {
	if !clean(a) || !clean(b) {
		return ""
	}
	for !Below(a, b) {
		a = a[:strings.LastIndexByte(a, '/')]
		if a == "" {
			return "/"
		}
	}
	return a
}

// depth returns how many cgroups lie between a clean path and the root.
func depth(p string) int {
	if p == "/" {
		return 0
	}
	return strings.Count(p, "/")
}

// parentOf returns the cgroup above p, which must not be the root.
func parentOf(p string) (string, bool) {
	if !clean(p) || p == "/" {
		return "", false
	}
	return p[:max(strings.LastIndexByte(p, '/'), 1)], true
}

func clean(p string) bool {
	if p == "/" {
		return true
	}
	if p == "" || p[0] != '/' {
		return false
	}
	for c := range strings.SplitSeq(p[1:], "/") {
		if c == "" || c == "." || c == ".." {
			return false
		}
	}
	return true
}
