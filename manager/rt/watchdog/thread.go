package watchdog

import (
	"errors"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// thread is a watched thread.
type thread struct {
	grant Grant
	// schedstat is /proc/PID/task/TID/schedstat, opened once: it is this thread's,
	// whoever may have its number later, and says ESRCH when it is gone.
	schedstat int
}

// errGone says that there is no such thread any more.
var errGone = errors.New("no such thread")

// openThread opens what is known of the thread that g names.
func openThread(g Grant) (thread, error) {
	var name [64]byte
	path := append(name[:0], "/proc/"...)
	path = strconv.AppendInt(path, int64(g.PID), 10)
	path = append(path, "/task/"...)
	path = strconv.AppendInt(path, int64(g.TID), 10)
	dir, errno := openAt(unix.AT_FDCWD, append(path, 0), unix.O_PATH|unix.O_DIRECTORY)
	if errno != 0 {
		return thread{}, goneOr(errno)
	}
	defer unix.Close(dir)
	st, errno := readStat(dir)
	if errno != 0 {
		return thread{}, goneOr(errno)
	}
	if st.started != g.Started {
		return thread{}, errGone
	}
	fd, errno := openAt(dir, []byte("schedstat\x00"), unix.O_RDONLY)
	if errno != 0 {
		return thread{}, goneOr(errno)
	}
	return thread{grant: g, schedstat: fd}, nil
}

func goneOr(errno unix.Errno) error {
	if errno == unix.ENOENT || errno == unix.ESRCH {
		return errGone
	}
	return errno
}

// used returns the CPU time that the thread has taken so far.
func (t *thread) used() (time.Duration, error) {
	var b [64]byte
	n, errno := rawPread(t.schedstat, b[:])
	if errno != 0 {
		return 0, goneOr(errno)
	}
	ns, _ := number(b[:n])
	return time.Duration(ns), nil
}

func (t *thread) close() {
	_ = unix.Close(t.schedstat)
	*t = thread{}
}

// isRealtime reports whether a policy is one.
func isRealtime(policy uint32) bool { return policy == unix.SCHED_FIFO || policy == unix.SCHED_RR }

// demote takes from the thread what it was granted: SCHED_OTHER, nice 0. It returns
// errGone also for one that has given it up itself.
//
// The kernel takes a number, and no handle, to set a thread's scheduling. That the
// thread is alive, and so the number its own, is seen on the handle right before. If
// it is gone right after, another may have got the number in between, and been given
// what every thread begins with; for that all numbers of the host had to be used up
// within these microseconds.
func (t *thread) demote() error {
	attr, err := t.attr()
	if err != nil {
		return err
	}
	if isRealtime(uint32(t.grant.Policy)) != isRealtime(attr.Policy) || !isRealtime(attr.Policy) && attr.Nice >= 0 {
		return errGone
	}
	return t.set(&unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL})
}

// restore gives it back, if the thread is as demote left it.
func (t *thread) restore() error {
	attr, err := t.attr()
	if err != nil {
		return err
	}
	if attr.Policy != unix.SCHED_NORMAL || attr.Nice != 0 {
		return errGone
	}
	return t.set(&unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: uint32(t.grant.Policy), Flags: unix.SCHED_FLAG_RESET_ON_FORK,
		Priority: uint32(t.grant.Priority), Nice: t.grant.Nice,
	})
}

// attr returns the thread's scheduling.
func (t *thread) attr() (attr unix.SchedAttr, err error) {
	_, _, errno := syscall.RawSyscall6(unix.SYS_SCHED_GETATTR, uintptr(t.grant.TID),
		uintptr(unsafe.Pointer(&attr)), unix.SizeofSchedAttr, 0, 0, 0)
	if errno != 0 {
		return attr, goneOr(errno)
	}
	// The thread is alive after the reading: it was its own.
	_, err = t.used()
	return attr, err
}

func (t *thread) set(attr *unix.SchedAttr) error {
	if _, err := t.used(); err != nil {
		return err
	}
	if err := unix.SchedSetAttr(int(t.grant.TID), attr, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return errGone
		}
		return err
	}
	_, err := t.used()
	return err
}
