package identity

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
)

// Thread is a handle on a thread: the directory /proc/PID/task/TID, which is of
// this thread alone. Once the thread has ended nothing can be read there, also if
// its number is another's by then.
type Thread struct {
	tid     int32
	dir     int // O_PATH
	file    int // its stat, or -1 after Rest
	started uint64
}

// Scheduling says how a thread is scheduled (sched(7)).
type Scheduling struct {
	// Policy is SCHED_OTHER, SCHED_FIFO, SCHED_RR and so on.
	Policy int32
	// Priority is the realtime priority, 0 where the policy has none.
	Priority int32
	// Nice is the nice level; the realtime policies do not look at it.
	Nice int32
}

// Thread makes a handle on the thread tid of the process, by the daemon's number.
// It returns ErrGone if the process has none, or none that still runs.
func (p *Process) Thread(tid int32) (*Thread, error) {
	fd, err := unix.Openat(p.proc, "task/"+strconv.Itoa(int(tid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(err)
	}
	t := &Thread{tid: tid, dir: fd, file: -1}
	if t.file, err = unix.Openat(fd, "stat", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		t.Close()
		return nil, gone(err)
	}
	st, err := t.stat()
	if err != nil {
		t.Close()
		return nil, err
	}
	t.started = st.started
	return t, nil
}

// Close lets go of the handle.
func (t *Thread) Close() {
	t.Rest()
	closeFD(t.dir)
	t.dir = -1
}

// Clone returns another handle on the thread.
func (t *Thread) Clone() (*Thread, error) {
	fd, err := unix.FcntlInt(uintptr(t.dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return &Thread{tid: t.tid, dir: fd, file: -1, started: t.started}, nil
}

// Rest lets go of what is only for looking at the thread often: a handle that is kept
// takes one descriptor then.
func (t *Thread) Rest() {
	if t.file >= 0 {
		closeFD(t.file)
		t.file = -1
	}
}

// TID returns the thread's id in the daemon's pid namespace.
func (t *Thread) TID() int32 { return t.tid }

// Started returns when the thread was started, in clock ticks since the host's
// boot: with the number it tells a thread from others.
func (t *Thread) Started() uint64 { return t.started }

// Alive reports whether the thread still runs. The number is its own as long as it
// does.
func (t *Thread) Alive() bool {
	_, err := t.stat()
	return err == nil
}

// Scheduling reads how the thread is scheduled.
func (t *Thread) Scheduling() (Scheduling, error) {
	st, err := t.stat()
	return st.scheduling, err
}

// CPU reads how long the thread has run, 0 where the kernel does not tell.
func (t *Thread) CPU() (time.Duration, error) {
	b, err := t.read("schedstat")
	if err != nil {
		return 0, err
	}
	first, _, _ := bytes.Cut(b, []byte{' '})
	ns, err := strconv.ParseInt(string(first), 10, 64)
	if err != nil {
		return 0, errMalformed
	}
	return time.Duration(ns), nil
}

// Cgroups reads the thread's cgroups, which on v1 need not be its process's.
func (t *Thread) Cgroups() (cgfs.ProcCgroup, error) {
	b, err := t.read("cgroup")
	return cgfs.ProcCgroup(b), err
}

func (t *Thread) read(name string) ([]byte, error) {
	fd, err := unix.Openat(t.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(err)
	}
	defer closeFD(fd)
	b, err := preadAll(fd, nil)
	return b, gone(err)
}

// stat is what is needed of a /proc/PID/task/TID/stat.
type stat struct {
	started    uint64
	scheduling Scheduling
}

// stat returns ErrGone also of a thread that has ended and is not reaped: a first
// thread that others outlive.
func (t *Thread) stat() (stat, error) {
	var b []byte
	var err error
	if t.file >= 0 {
		b, err = preadAll(t.file, nil)
	} else {
		b, err = t.read("stat")
	}
	if err != nil {
		return stat{}, gone(err)
	}
	state, st, err := parseStat(b)
	if err == nil && (state == 'Z' || state == 'X') {
		err = ErrGone
	}
	return st, err
}

// parseStat parses a stat file.
func parseStat(b []byte) (state byte, st stat, err error) {
	last := 0
	for number, f := range statFields(b) {
		last = number
		var to *int32
		switch number {
		case statState:
			state = f[0]
		case statNice:
			to = &st.scheduling.Nice
		case statStarted:
			if st.started, err = strconv.ParseUint(string(f), 10, 64); err != nil {
				return 0, st, errMalformed
			}
		case statPriority:
			to = &st.scheduling.Priority
		case statPolicy:
			to = &st.scheduling.Policy
		}
		if to != nil {
			v, err := strconv.ParseInt(string(f), 10, 32)
			if err != nil {
				return 0, st, errMalformed
			}
			*to = int32(v)
		}
	}
	if last < statPolicy {
		return 0, st, errMalformed
	}
	return state, st, nil
}

// Background is what a policy about realtime asks of a process.
type Background struct {
	// UID and EGID are the effective ids of its first thread, Groups the
	// supplementary ones, all in the daemon's own numbers.
	UID, EGID uint32
	Groups    []uint32
	// Program is the file that it runs, as its own mount namespace names it; ""
	// where that cannot be told.
	Program string
	// Container: it is in another user or pid namespace than the daemon. Root is
	// the uid, in the daemon's numbers, that is 0 in its user namespace; NoID
	// where none is.
	Container bool
	Root      uint32
	// Maker is who made the outermost user namespace around it, 0 where there is none.
	Maker uint32
}

// Background reads what a policy asks about. It counts only if the process is
// alive afterwards.
func (h *Host) Background(p *Process) (Background, error) {
	var bg Background
	b, err := p.read("status")
	if err != nil {
		return bg, err
	}
	st, err := ParseStatus(b)
	if err != nil {
		return bg, err
	}
	bg.UID, bg.EGID = st.UIDs[1], st.GIDs[1]
	if bg.Groups, err = parseGroups(b); err != nil {
		return bg, err
	}
	n, err := h.Nesting(p)
	if err != nil {
		return bg, err
	}
	bg.Container = len(n.user) > 0 || len(n.pid) > 0
	if bg.Root, err = n.Root(p); err != nil {
		return bg, err
	}
	if len(n.user) > 0 {
		if err := h.makers(p, func(uid uint32) { bg.Maker = uid }); err != nil {
			return bg, err
		}
	}
	buf := make([]byte, unix.PathMax)
	if n, err := unix.Readlinkat(p.proc, "exe", buf); err == nil {
		bg.Program = string(buf[:n])
	}
	return bg, nil
}

// parseGroups returns the supplementary groups that a /proc/PID/status names.
func parseGroups(status []byte) ([]uint32, error) {
	for line := range bytes.Lines(status) {
		rest, ok := bytes.CutPrefix(line, []byte("Groups:"))
		if !ok {
			continue
		}
		var groups []uint32
		for f := range bytes.FieldsSeq(rest) {
			gid, err := strconv.ParseUint(string(f), 10, 32)
			if err != nil {
				return nil, errMalformed
			}
			groups = append(groups, uint32(gid))
		}
		return groups, nil
	}
	return nil, errMalformed
}

// RTTimeMax returns the process's hard RLIMIT_RTTIME in microseconds, and false
// where there is none. It counts only if the process is alive afterwards.
func (p *Process) RTTimeMax() (uint64, bool, error) {
	var l unix.Rlimit
	// A tenth of what the file costs. It takes the same uid, or CAP_SYS_RESOURCE in the
	// process's user namespace. The number is the process's own as long as it is alive.
	err := unix.Prlimit(int(p.pid), unix.RLIMIT_RTTIME, nil, &l)
	if errors.Is(err, unix.EPERM) {
		var ls RLimits
		ls, err = p.RLimits()
		l = ls[unix.RLIMIT_RTTIME]
	}
	return l.Max, err == nil && l.Max != unix.RLIM_INFINITY, gone(err)
}

// EnclosesUser reports whether inner's user namespace is n's or lies within it.
func (n Nesting) EnclosesUser(inner Nesting) bool { return encloses(n.user, inner.user) }
