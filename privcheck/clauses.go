package privcheck

// The questions. Every Place given for one question must be of the same
// hierarchy; a request over several hierarchies asks once for each, and a
// request of several parties (opener, sender, proxy) once for each party.

// Over answers clause 1: may r have the access want to obj, which is the
// directory p.Dir or a file in it?
func Over(r Requestor, p Place, obj Object, want Access) Decision { panic("todo") }

// OverTask answers clause 2: has r, whose own cgroup is own, privilege over t?
func OverTask(r Requestor, own string, t Task) Decision { panic("todo") }

// Create answers clause 3. parent is the deepest directory that exists on the
// way to the new cgroup; its Target is that directory's path.
func Create(r Requestor, parent Place) Decision { panic("todo") }

// Move answers clause 4: may r move t to the cgroup dst? dstTasks is dst's
// file of tasks (on v2 cgroup.procs). common is the nearest common ancestor of
// t.Cgroup and dst.Target with commonTasks its file of tasks; they are looked at
// only if dst is neither where the task is nor below that.
func Move(r Requestor, t Task, dst Place, dstTasks Object, common Place, commonTasks Object) Decision {
	panic("todo")
}

// Chown answers clause 5 for the directory p.Dir. uid and gid are the daemon's
// own numbers, NoID where the request leaves one as it is; unmapped says that
// the request named an id that r's user namespace does not map.
func Chown(r Requestor, p Place, uid, gid uint32, unmapped bool) Decision { panic("todo") }

// Chmod answers clause 5 for obj, p.Dir or a file in it, and a new mode.
func Chmod(r Requestor, p Place, obj Object, mode uint32) Decision { panic("todo") }

// SetValue answers clause 6: may r write value to the kernel's file called
// name, which is file, in the cgroup p?
func SetValue(r Requestor, p Place, name, value string, file Object) Decision { panic("todo") }

// Remove answers clause 7 for Remove, Delete, RemoveOnEmpty and Prune: parent
// is the directory above the cgroup that goes, which is called target.
func Remove(r Requestor, parent Place, target string) Decision { panic("todo") }

// ReadValue answers clause 8 for a file of a cgroup, or its directory
// (ListChildren, ListKeys).
func ReadValue(r Requestor, p Place, obj Object) Decision { panic("todo") }

// PidCgroup answers clause 8 for GetPidCgroup: base is the cgroup that the
// answer is relative to.
func PidCgroup(r Requestor, t Task, base string) Decision { panic("todo") }

// Escape answers clause 9: may r move a task anywhere (MovePidAbs)?
func Escape(r Requestor) Decision { panic("todo") }

// EscapeTo answers clause 9 for a requestor r, in the cgroup own, behind a
// proxy whose own cgroup is proxyOwn: may r move t to dst, at or below
// proxyOwn? dst and dstTasks are as the proxy sees them; that the proxy could
// make the move itself is a question of its own (Move).
func EscapeTo(r, proxy Requestor, own, proxyOwn string, t Task, dst string, nested bool) Decision {
	panic("todo")
}
