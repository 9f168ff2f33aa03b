package watchdog

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// waiter waits for a pipe or for a time, and wakes one thread, once, for it. Go's own
// timers would not do: each wakes the runtime's monitor as well, and so does each
// system call of package unix that follows; a wake-up became ten. So the kernel keeps
// the time (timerfd), Go's poller waits for both in one descriptor (epolls nest), and
// what follows in the loops of this package is raw.
type waiter struct {
	epoll *os.File
	conn  syscall.RawConn
	ready func(fd uintptr) bool // made once: the loop allocates nothing
	timer int
	pipe  bool // there is something to read, or its end
	late  bool // the time has come
}

// newWaiter makes a waiter for what comes through pipe.
func newWaiter(pipe int) (*waiter, error) {
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		_ = unix.Close(timer)
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	w := &waiter{timer: timer}
	for _, fd := range []int{pipe, timer} {
		err = errors.Join(err, unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}))
	}
	// Only what does not block is given to Go's poller.
	err = errors.Join(err, unix.SetNonblock(ep, true))
	w.epoll = os.NewFile(uintptr(ep), "epoll")
	if err == nil {
		w.conn, err = w.epoll.SyscallConn()
	}
	if err == nil {
		// The poller must have taken it: a deadline that cannot be set says no.
		err = w.epoll.SetReadDeadline(time.Time{})
	}
	if err != nil {
		w.close()
		return nil, os.NewSyscallError("epoll", err)
	}
	w.ready = func(fd uintptr) bool {
		var events [2]unix.EpollEvent
		n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, fd, uintptr(unsafe.Pointer(&events)), 2, 0, 0, 0)
		if errno != 0 {
			return errno != unix.EINTR // the loop finds out
		}
		for _, e := range events[:n] {
			if int(e.Fd) == w.timer {
				w.late = true
			} else {
				w.pipe = true
			}
		}
		return n > 0
	}
	return w, nil
}

// at sets the time to wait for, in CLOCK_MONOTONIC, and then every so often (0: once).
func (w *waiter) at(t, every time.Duration) {
	spec := unix.ItimerSpec{
		Value:    unix.NsecToTimespec(int64(max(t, 1))), // 0 would stop it
		Interval: unix.NsecToTimespec(int64(every)),
	}
	_, _, _ = syscall.RawSyscall6(unix.SYS_TIMERFD_SETTIME, uintptr(w.timer), unix.TFD_TIMER_ABSTIME,
		uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
}

// wait waits, and says what for: something is in the pipe, or the time has come.
func (w *waiter) wait() (pipe, late bool, err error) {
	w.pipe, w.late = false, false
	if err := w.conn.Read(w.ready); err != nil {
		return false, false, err
	}
	if w.late {
		var n [8]byte
		_, _ = rawRead(w.timer, n[:])
	}
	return w.pipe, w.late, nil
}

// forget has the waiter wait for nothing but the time.
func (w *waiter) forget(pipe int) {
	_ = w.control(func(ep int) error { return unix.EpollCtl(ep, unix.EPOLL_CTL_DEL, pipe, nil) })
}

func (w *waiter) control(f func(ep int) error) error {
	var err error
	return errors.Join(w.conn.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

func (w *waiter) close() {
	_ = w.epoll.Close()
	_ = unix.Close(w.timer)
}

// rawRead is read(2) of what does not block. It does not tell Go's scheduler, which
// would wake its monitor.
func rawRead(fd int, b []byte) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return int(n), errno
}

// rawPread is the same with pread(2), from the beginning.
func rawPread(fd int, b []byte) (int, unix.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
	return int(n), errno
}

// clocks tells the time; in tests, another.
type clocks interface {
	// now returns CLOCK_MONOTONIC and CLOCK_BOOTTIME.
	now() (mono, boot time.Duration)
}

type kernelClocks struct{}

func (kernelClocks) now() (mono, boot time.Duration) {
	return clock(unix.CLOCK_MONOTONIC), clock(unix.CLOCK_BOOTTIME)
}

// clock returns a clock's time, or 0 if there is no such clock.
func clock(id int32) time.Duration {
	var ts unix.Timespec
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOCK_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&ts)), 0)
	return time.Duration(ts.Nano())
}

// cpuClock is the clock of the CPU time of a process (clock_getcpuclockid(3)), which
// shows that it ran at all: what neither of us needs to say, the other reads there.
func cpuClock(pid int) int32 { return int32(^pid<<3 | 2) }
