package cgfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A cgroup of v2 that has processes cannot give domain controllers to its
// children (cgroup-v2.rst, "No Internal Process Constraint"). Dividing it moves
// its processes into one child, the hidden leaf, which is not told of: who is in
// the leaf counts as in the cgroup above it. The name only saves looking at
// every cgroup; a leaf is what has the mark, which nobody but the host's root
// can set. Its directory is root's, so that nothing is made below it.
const (
	leafName = ".cgmanager-leaf"
	leafMark = "leaf"
)

// LeafName reports whether a component of a path is kept for hidden leaves.
func LeafName(component string) bool { return component == leafName }

// IsLeaf reports whether d is a hidden leaf.
func (d *Dir) IsLeaf() (bool, error) {
	if d.h.version == V1 || !strings.HasSuffix(d.path, "/"+leafName) {
		return false, nil
	}
	_, ok, err := d.Mark(leafMark)
	return ok, err
}

// Leaf opens d's hidden leaf. It returns an error wrapping fs.ErrNotExist if
// there is none.
func (d *Dir) Leaf() (*Dir, error) {
	if d.h.version == V1 {
		return nil, &os.PathError{Op: "open", Path: "leaf", Err: unix.ENOENT}
	}
	leaf, err := d.Open(leafName)
	if err != nil {
		return nil, err
	}
	ok, err := leaf.IsLeaf()
	if err == nil && !ok {
		err = &os.PathError{Op: "open", Path: "leaf", Err: unix.ENOENT}
	}
	if err != nil {
		_ = leaf.Close()
		return nil, err
	}
	return leaf, nil
}

// Visible returns the cgroup in which a task counts that the kernel says is in
// path: of a hidden leaf, the one above.
func (h *Hierarchy) Visible(path string) string {
	above, ok := strings.CutSuffix(path, "/"+leafName)
	if !ok || h.version == V1 {
		return path
	}
	d, err := h.Open(path)
	if err != nil {
		return path // gone, and nothing is done there any more
	}
	defer d.Close()
	if ok, err := d.IsLeaf(); err != nil || !ok {
		return path
	}
	if above == "" {
		return "/"
	}
	return above
}

// makeLeaf opens d's hidden leaf, and makes it where there is none. Whoever may
// put tasks into d may put them into the leaf, and whoever may freeze or limit d
// may do the same to the leaf: its files belong to the owners of d's.
func (d *Dir) makeLeaf() (*Dir, error) {
	leaf, err := d.Leaf()
	if !errors.Is(err, fs.ErrNotExist) {
		return leaf, err
	}
	leaf, err = d.Mkdir(leafName, 0, 0)
	if errors.Is(err, unix.EEXIST) {
		leaf, err = d.adoptLeaf()
	}
	if err != nil {
		return nil, err
	}
	if err = leaf.SetMark(leafMark, "1"); err == nil {
		err = leaf.mirror(d)
	}
	if err != nil {
		_ = leaf.Close()
		return nil, err
	}
	return leaf, nil
}

// adoptLeaf opens what has the leaf's name. It becomes the leaf if it is root's
// and has no children: one that was made a moment ago by somebody who did not
// get to mark it. Another's is not taken over, because who owns its files could
// freeze and kill those who are put there.
func (d *Dir) adoptLeaf() (*Dir, error) {
	leaf, err := d.Open(leafName)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(leaf.fd, &st); err == nil && (st.Uid != 0 || st.Gid != 0 || st.Nlink != 2) {
		err = &os.PathError{Op: "mkdir", Path: leafName, Err: unix.EEXIST}
	}
	if err != nil {
		_ = leaf.Close()
		return nil, err
	}
	return leaf, nil
}

// MirrorLeaf gives the files of d's hidden leaf, if it has one, to the owners
// that d's own have now, with their modes: who has d no more must not keep the
// leaf.
func (d *Dir) MirrorLeaf() error {
	leaf, err := d.Leaf()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer leaf.Close()
	return leaf.mirror(d)
}

// mirror gives each of the leaf's files to the owner of its parent's, and the
// mode of that.
func (d *Dir) mirror(parent *Dir) error {
	names, err := d.Files()
	if err != nil {
		return err
	}
	for _, name := range names {
		a, err := parent.FileAttr(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the controller is given to the children, not to the parent
		}
		if err != nil {
			return err
		}
		if err := d.setFileOwner(name, a.UID, a.GID); err != nil {
			return err
		}
		if err := d.setFileMode(name, a.Mode&0o777); err != nil {
			return err
		}
	}
	return nil
}

func (d *Dir) setFileMode(name string, mode uint32) error {
	a, err := d.FileAttr(name)
	if err != nil || a.Mode&0o777 == mode {
		return gone(err)
	}
	f, err := d.File(name, ForFacts)
	if err != nil {
		return gone(err)
	}
	defer f.Close()
	return f.SetMode(mode)
}

// setFileOwner gives a file to somebody, who may have it already.
func (d *Dir) setFileOwner(name string, uid, gid uint32) error {
	a, err := d.FileAttr(name)
	if err != nil || a.UID == uid && a.GID == gid {
		return gone(err)
	}
	f, err := d.File(name, ForFacts)
	if err != nil {
		return gone(err)
	}
	defer f.Close()
	return f.SetOwner(uid, gid)
}

// Enable gives v2 controllers to d's children, all or none; those that they
// have already are fine. Where d itself has processes, these move into its
// hidden leaf, none lost or left behind however they fork. The new files in the
// children belong to whoever owns the limits there are. It returns an error
// wrapping ErrNoController if one of the controllers is not available to d,
// else what the kernel says. On v1 there is nothing to enable.
func (d *Dir) Enable(ctrls ...string) error {
	missing, err := d.Missing(ctrls...)
	if err != nil || len(missing) == 0 {
		return err
	}
	available, err := d.Available()
	if err != nil {
		return err
	}
	for _, c := range missing {
		if !slices.Contains(available, c) {
			return fmt.Errorf("enable %q: %w", c, ErrNoController)
		}
	}
	enable := func() error { return d.give(missing) }
	if err = enable(); errors.Is(err, unix.EOPNOTSUPP) {
		var more []string
		if more, err = d.unthread(); err != nil {
			return err
		}
		missing = append(missing, more...)
		err = enable()
	}
	if errors.Is(err, unix.EBUSY) {
		err = d.divide(enable)
	}
	if err != nil {
		return err
	}
	return d.handOver(missing)
}

// give writes controllers to cgroup.subtree_control. The kernel takes those that
// can do with threads (cpu, cpuset, pids) of a cgroup that has processes too, and
// makes it the root of a threaded subtree: no process could be moved into a child
// any more. So that is EBUSY here, as it is for the others.
func (d *Dir) give(ctrls []string) error {
	domain, err := d.isDomain()
	if err != nil {
		return err
	}
	busy := &os.PathError{Op: "enable", Path: "cgroup.subtree_control", Err: unix.EBUSY}
	if domain {
		// Not Procs, which has those too of which the first thread alone is left
		// here, exited: the kernel does not move it, and does not mind it.
		if tids, err := d.Threads(); err != nil {
			return err
		} else if len(tids) > 0 {
			return busy
		}
	}
	if err := d.write("cgroup.subtree_control", "+"+strings.Join(ctrls, " +")); err != nil || !domain {
		return err
	}
	if still, err := d.isDomain(); err != nil || still {
		return err
	}
	// A process came in just then.
	if err := d.write("cgroup.subtree_control", "-"+strings.Join(ctrls, " -")); err != nil {
		return err
	}
	return busy
}

// isDomain reports whether d is a cgroup like most: neither threaded, nor the
// root of a threaded subtree, nor the hierarchy's.
func (d *Dir) isDomain() (bool, error) {
	if d.IsRoot() {
		return false, nil
	}
	kind, err := d.words("cgroup.type")
	return slices.Equal(kind, []string{"domain"}), err
}

// unthread takes back the controllers that d gives to its children, and returns
// them. Whoever gave those that can do with threads (cpu, cpuset, pids), and
// could not give others because d has processes, has made d the root of a threaded
// subtree, where no child can have others any more (cgroup-v2.rst, "Threads");
// container runtimes leave that behind when they try, with the child that they
// wanted. If a child uses what it has, be it for tasks or to set a limit, or is
// threaded itself, which it cannot cease to be, the error wraps EBUSY.
func (d *Dir) unthread() ([]string, error) {
	busy := &os.PathError{Op: "enable", Path: "cgroup.subtree_control", Err: unix.EBUSY}
	kind, err := d.words("cgroup.type")
	if err != nil {
		return nil, err
	}
	given, err := d.words("cgroup.subtree_control")
	if err != nil {
		return nil, err
	}
	if len(given) == 0 || !slices.Equal(kind, []string{"domain", "threaded"}) {
		return nil, busy
	}
	leaf, err := d.makeLeaf()
	if err != nil {
		return nil, err
	}
	defer leaf.Close()
	children, err := d.directories()
	if err != nil {
		return nil, err
	}
	for _, name := range children {
		if ok, err := d.unused(name, leaf, given); gone(err) != nil {
			return nil, err
		} else if err == nil && !ok {
			return nil, busy
		}
	}
	return given, d.write("cgroup.subtree_control", "-"+strings.Join(given, " -"))
}

// unused reports whether a child of a threaded subtree's root has no tasks, no
// children and no limits: the values of ctrls are those of fresh.
func (d *Dir) unused(name string, fresh *Dir, ctrls []string) (bool, error) {
	c, err := d.Open(name)
	if err != nil {
		return false, err
	}
	defer c.Close()
	// An invalid domain can have no tasks.
	if kind, err := c.words("cgroup.type"); err != nil || !slices.Equal(kind, []string{"domain", "invalid"}) {
		return false, err
	}
	if below, err := c.directories(); err != nil || len(below) > 0 {
		return false, err
	}
	files, err := c.Files()
	if err != nil {
		return false, err
	}
	for _, file := range files {
		if !slices.Contains(ctrls, ControllerOf(file)) || strings.HasSuffix(file, ".pressure") {
			continue
		}
		a, err := c.FileAttr(file)
		if err != nil {
			return false, err
		}
		if a.Mode&0o600 != 0o600 {
			continue
		}
		has, err := c.words(file)
		if err != nil {
			return false, err
		}
		if set, err := fresh.words(file); err != nil || !slices.Equal(has, set) {
			return false, err
		}
	}
	return true, nil
}

// Missing returns which of the controllers d does not give to its children.
func (d *Dir) Missing(ctrls ...string) ([]string, error) {
	if d.h.version == V1 || len(ctrls) == 0 {
		return nil, nil
	}
	enabled, err := d.words("cgroup.subtree_control")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(ctrls), func(c string) bool { return slices.Contains(enabled, c) }), nil
}

// handOver gives the files of controllers that were enabled just now to those
// who own the other limits in the child: the owner of cgroup.freeze, which is
// never delegated (or of cgroup.procs, for what is).
func (d *Dir) handOver(ctrls []string) error {
	children, err := d.directories()
	if err != nil {
		return err
	}
	for _, name := range children {
		c, err := d.Open(name)
		if err == nil {
			err = c.receive(ctrls)
			_ = c.Close()
		}
		if gone(err) != nil {
			return err
		}
	}
	return nil
}

func (d *Dir) receive(ctrls []string) error {
	limits, err := d.FileAttr("cgroup.freeze")
	if err != nil {
		return err
	}
	tasks, err := d.FileAttr("cgroup.procs")
	if err != nil {
		return err
	}
	if limits.UID|limits.GID|tasks.UID|tasks.GID == 0 {
		return nil // all of it is root's, as new files are
	}
	files, err := d.Files()
	if err != nil {
		return err
	}
	for _, file := range files {
		if !slices.Contains(ctrls, ControllerOf(file)) {
			continue
		}
		a := limits
		if slices.Contains(d.h.delegation, file) {
			a = tasks
		}
		if err := d.setFileOwner(file, a.UID, a.GID); err != nil {
			return err
		}
	}
	return nil
}

// Bounds of dividing. Where some are left after the first round they are
// frozen: what is frozen can be moved, and does not fork. A crowd is frozen at
// once, because each move waits for all forks of the host, and takes a hundred
// times as long among processes that fork.
const (
	divideDeadline = 10 * time.Second
	divideCrowd    = 16
)

// divide moves d's processes into its hidden leaf until enable succeeds. A
// child is born where its parent is, so the processes in d can only be children
// of those that are.
func (d *Dir) divide(enable func() error) (failed error) {
	leaf, err := d.makeLeaf()
	if err != nil {
		return err
	}
	defer leaf.Close()
	into, err := leaf.File("cgroup.procs", ForWrite)
	if err != nil {
		return err
	}
	defer into.Close()
	ctx, cancel := context.WithTimeout(context.Background(), divideDeadline)
	defer cancel()
	running := 1 // rounds
	if there, err := d.Procs(); err != nil {
		return err
	} else if len(there) > divideCrowd {
		running = 0
	}
	for round := 0; ; round++ {
		if round == running {
			if was, err := d.Frozen(); err != nil || was {
				continue
			}
			short, end := context.WithTimeout(ctx, divideDeadline/5)
			// One that does not stop does not fork either.
			release, err := d.hold(short)
			end()
			if err != nil {
				return err
			}
			defer func() { failed = errors.Join(failed, gone(release())) }()
		}
		if round > running {
			// Somebody puts others in as fast as they are moved.
			time.Sleep(time.Duration(min(round, 20)) * time.Millisecond)
		}
		if err := d.empty(into); err != nil {
			return err
		}
		if err := enable(); !errors.Is(err, unix.EBUSY) || ctx.Err() != nil {
			return err
		}
	}
}

// Enter moves a task by its number, which it writes to f, d's file of tasks. A
// process goes into d's hidden leaf where d is divided.
func (d *Dir) Enter(f *File, id int32) error {
	number := strconv.Itoa(int(id))
	if d.h.version == V1 || f.Name() != "cgroup.procs" {
		return f.Write(number)
	}
	divided, err := d.divided()
	if err != nil {
		return err
	}
	if !divided {
		if err := f.Write(number); !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	leaf, err := d.makeLeaf()
	if err != nil {
		return err
	}
	defer leaf.Close()
	return leaf.write("cgroup.procs", number)
}

// divided reports whether d is to have no processes itself because it gives
// controllers to its children. The kernel lets some in where these controllers
// can do with threads and no child has a process yet: see give.
func (d *Dir) divided() (bool, error) {
	given, err := d.words("cgroup.subtree_control")
	if err != nil || len(given) == 0 {
		return false, err
	}
	return d.isDomain()
}

// empty moves each process that is in d. The list of processes does not have one
// that came here after its first thread had exited; any thread's number moves it.
func (d *Dir) empty(into *File) error {
	for _, list := range []func() ([]int32, error){d.Procs, d.Threads} {
		ids, err := list()
		if err != nil {
			return err
		}
		for _, id := range ids {
			if id <= 0 {
				return &os.PathError{Op: "divide", Path: "cgroup.procs", Err: unix.EBUSY} // outside the daemon's pid namespace
			}
			if err := d.shift(into, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// shift moves one that was seen in d. If it ended meanwhile and its number became
// another's, that one was moved by mistake: it has just been born, and goes where
// its parent is.
func (d *Dir) shift(into *File, id int32) error {
	number := strconv.Itoa(int(id))
	before, err := readStat(number)
	if err != nil {
		return nil // it has ended
	}
	if d.placeOf(number) != d.path {
		return nil // somebody has moved it
	}
	if err := into.Write(number); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	now, err := readStat(number)
	if err != nil || now.start == before.start {
		return nil // it has ended
	}
	at := d.placeOf(now.parent)
	if at == "" || at == d.path || at == d.path+"/"+leafName {
		return nil
	}
	home, err := d.h.Open(at)
	if err != nil {
		return err
	}
	defer home.Close()
	if err := home.write("cgroup.procs", number); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// placeOf returns where the kernel says that a task is in d's hierarchy, "" if it
// has ended.
func (d *Dir) placeOf(id string) string {
	b, err := os.ReadFile("/proc/" + id + "/cgroup")
	if err != nil {
		return ""
	}
	path, _ := ProcCgroup(b).Path(d.h)
	return path
}

// taskStat is of /proc/PID/stat: the parent's number, and when the task was born,
// in ticks since the host started (proc_pid_stat(5)).
type taskStat struct{ parent, start string }

func readStat(id string) (taskStat, error) {
	b, err := os.ReadFile("/proc/" + id + "/stat")
	if err != nil {
		return taskStat{}, err
	}
	// The program's name, in parentheses, may be anything.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return taskStat{}, unix.EINVAL
	}
	return taskStat{parent: f[1], start: f[19]}, nil
}
