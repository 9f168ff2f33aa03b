package identity

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
)

// Task is a handle on a process, or on one thread of it that does not lead
// it.
type Task struct {
	*Process
	// Thread is the thread's id, or 0 if the Task is the whole process.
	Thread int32
}

// Member is a thread of a Task with the facts that a decision needs.
type Member struct {
	TID int32
	// UIDs are its real, effective and saved uid.
	UIDs    [3]uint32
	Cgroups cgfs.ProcCgroup
}

// OpenTask makes a handle on the task called id in the daemon's pid namespace:
// the process of that pid, or the thread of that tid. It returns ErrGone if
// there is none.
func OpenTask(id int32) (*Task, error) {
	if id <= 0 {
		return nil, ErrGone
	}
	p, err := openProven(id, -1)
	if err == nil {
		return &Task{Process: p}, nil
	}
	// For a thread that does not lead its process pidfd_open fails with
	// EINVAL, since Linux 6.9 with ENOENT (pidfd_open(2)).
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	tgid, err := tgidOf(id)
	if err != nil {
		return nil, err
	}
	if p, err = openProven(tgid, -1); err != nil {
		return nil, err
	}
	t := &Task{Process: p, Thread: id}
	if _, err := t.member(id, nil); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func openProven(pid int32, pidfd int) (*Process, error) {
	p, err := open(pid, pidfd)
	if err != nil {
		return nil, err
	}
	return p.proven()
}

func tgidOf(tid int32) (int32, error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(int(tid))+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, gone(err)
	}
	defer closeFD(fd)
	b, err := preadAll(fd, nil)
	if err != nil {
		return 0, gone(err)
	}
	st, err := ParseStatus(b)
	return st.Tgid, err
}

// TaskOf makes a handle on the process behind pidfd, which stays the
// caller's.
func TaskOf(pidfd int) (*Task, error) {
	own, err := unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("dup: %w", err)
	}
	pid, err := pidOfFD(own)
	if err != nil {
		closeFD(own)
		return nil, err
	}
	p, err := openProven(pid, own)
	if err != nil {
		return nil, err
	}
	return &Task{Process: p}, nil
}

// pidOfFD returns the pid of the process behind a pidfd, in the daemon's pid
// namespace. It returns ErrGone if the process is reaped or not visible here,
// and another error if pidfd is none.
func pidOfFD(pidfd int) (int32, error) {
	// No ioctl before it is known to be a pidfd: the descriptor is a
	// stranger's, and a file system of theirs may serve ioctls too.
	if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); errors.Is(err, unix.ESRCH) {
		return 0, ErrGone
	} else if err != nil {
		return 0, errors.New("not a pidfd")
	}
	// The fdinfo names the pid, 0 if it is not visible here, -1 once it is
	// reaped (pidfd_open(2)).
	fd, err := unix.Open("/proc/self/fdinfo/"+strconv.Itoa(pidfd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open fdinfo: %w", err)
	}
	defer closeFD(fd)
	b, err := preadAll(fd, nil)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.ParseInt(strings.TrimSpace(v), 10, 32)
			if err != nil || pid <= 0 {
				return 0, ErrGone
			}
			return int32(pid), nil
		}
	}
	return 0, errors.New("not a pidfd")
}

// ID is the number by which the kernel's control files know the task.
func (t *Task) ID() int32 {
	if t.Thread != 0 {
		return t.Thread
	}
	return t.pid
}

// maxThreads bounds how many threads of one process are looked at.
const maxThreads = 1 << 15

// Members returns the threads that the task stands for: one, or all of a
// process. Threads that have begun to exit are left out: they run no more, the
// kernel does not move them, and v1 says "/" of them wherever they were. It
// returns ErrGone if none is left, and an error wrapping EAGAIN if threads come
// and go faster than they can be looked at. If hs names any hierarchies, only
// what the members' cgroups say of those is made sure of.
func (t *Task) Members(hs ...*cgfs.Hierarchy) ([]Member, error) {
	if t.Thread != 0 {
		m, err := t.member(t.Thread, hs)
		if err != nil {
			return nil, err
		}
		return []Member{m}, nil
	}
	single, err := t.single()
	if err != nil {
		return nil, err
	}
	if single {
		m, err := t.leader(hs)
		if err == nil {
			return []Member{m}, nil
		}
		// It may be exiting because it has left a thread in its place.
		if !errors.Is(err, ErrGone) {
			return nil, err
		}
	}
	for range maxScans {
		ms, whole, err := t.scan(hs)
		switch {
		case err != nil:
			return nil, err
		case !whole:
			continue
		case len(ms) == 0:
			return nil, ErrGone
		}
		return ms, nil
	}
	return nil, fmt.Errorf("its threads come and go: %w", unix.EAGAIN)
}

// maxScans bounds how often the threads of a process are looked at, until none
// of them ends meanwhile.
const maxScans = 16

// scan looks at the threads once. whole says that it saw every thread that was
// listed: one that ended meanwhile may have left another in its place, which
// was not. A leader that exits before its threads is not missed.
func (t *Task) scan(hs []*cgfs.Hierarchy) (ms []Member, whole bool, err error) {
	tids, err := t.Threads()
	if err != nil {
		return nil, false, err
	}
	whole = true
	ms = make([]Member, 0, len(tids))
	for _, tid := range tids {
		m, err := t.member(tid, hs)
		switch {
		case err == nil:
			ms = append(ms, m)
		case !errors.Is(err, ErrGone):
			return nil, false, err
		case tid != t.pid:
			whole = false
		}
	}
	return ms, whole, nil
}

// Threads returns the numbers of the process's threads, sorted. It returns ErrGone
// if the process has ended.
func (t *Task) Threads() ([]int32, error) {
	fd, err := unix.Openat(t.proc, "task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(err)
	}
	defer closeFD(fd)
	var tids []int32
	buf := make([]byte, 8192)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return nil, gone(err)
		}
		if n == 0 {
			slices.Sort(tids)
			return slices.Compact(tids), nil
		}
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			tid, err := strconv.ParseInt(name, 10, 32)
			if err != nil {
				continue
			}
			if len(tids) == maxThreads {
				return nil, errors.New("too many threads")
			}
			tids = append(tids, int32(tid))
		}
	}
}

// Owners returns the real, effective and saved uid of the threads that Members
// would return, with the same errors.
func (t *Task) Owners() ([][3]uint32, error) {
	if t.Thread == 0 {
		single, err := t.single()
		if err != nil {
			return nil, err
		}
		if single {
			c, err := t.credentials()
			if err == nil {
				return [][3]uint32{[3]uint32(c.uids[:3])}, nil
			}
			if !errors.Is(err, ErrGone) {
				return nil, err
			}
		}
	}
	ms, err := t.Members()
	uids := make([][3]uint32, 0, len(ms))
	for _, m := range ms {
		uids = append(uids, m.UIDs)
	}
	return uids, err
}

// single reports whether the process has one thread: the kernel counts threads
// into the links of the directory, 2 + 1.
func (t *Task) single() (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(t.proc, "task", &st, 0); err != nil {
		return false, gone(err)
	}
	return st.Nlink == 3, nil
}

// leader is the facts about a process of one thread.
func (t *Task) leader(hs []*cgfs.Hierarchy) (Member, error) {
	c, err := t.credentials()
	if err != nil {
		return Member{}, err
	}
	cg, err := t.Cgroups()
	if err != nil {
		return Member{}, err
	}
	if cg.AtRoot(hs...) && t.exiting(t.pid) {
		return Member{}, ErrGone
	}
	return Member{TID: t.pid, UIDs: [3]uint32(c.uids[:3]), Cgroups: cg}, nil
}

func (t *Task) member(tid int32, hs []*cgfs.Hierarchy) (Member, error) {
	dir := "task/" + strconv.Itoa(int(tid)) + "/"
	b, err := t.read(dir + "status")
	if err != nil {
		return Member{}, err
	}
	st, err := ParseStatus(b)
	if err != nil {
		return Member{}, err
	}
	b, err = t.read(dir + "cgroup")
	if err != nil {
		return Member{}, err
	}
	cg := cgfs.ProcCgroup(b)
	if (cg.AtRoot(hs...) || tid == t.pid && cg.RootAlone()) && t.exiting(tid) {
		return Member{}, ErrGone
	}
	return Member{TID: tid, UIDs: [3]uint32(st.UIDs[:3]), Cgroups: cg}, nil
}

// ParentCgroups reads the cgroups of the process's parent, in which it was
// born.
func (t *Task) ParentCgroups() (cgfs.ProcCgroup, error) {
	ppid, err := t.Parent()
	if err != nil {
		return nil, err
	}
	p, err := Open(ppid, -1)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return p.Cgroups()
}

// Parent returns the number of the process's parent, in the daemon's pid
// namespace. It may have ended by now, and the number be another's.
func (p *Process) Parent() (int32, error) {
	b, err := p.read("status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		v, ok := strings.CutPrefix(line, "PPid:")
		if !ok {
			continue
		}
		ppid, err := strconv.ParseInt(strings.TrimSpace(v), 10, 32)
		if err != nil || ppid <= 0 {
			return 0, errMalformed
		}
		return int32(ppid), nil
	}
	return 0, errMalformed
}
