package manager

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// The mark of RemoveOnEmpty and its values. It stays in the kernel, on the
// cgroup's directory: whoever starts after a crash finds it there. On v1
// notify_on_release is set as well, as the original does, for others to see.
const (
	autoremove = "autoremove"
	// unfilled: no task has been seen in the cgroup yet. It stays.
	unfilled = "unfilled"
	// filled: it goes once no task is left in it and below.
	filled = "filled"
)

// reaper removes marked cgroups once they have been filled and are empty.
//
// On v2 the kernel tells by cgroup.events, but not where somebody else removes
// the cgroup within 10 ms of its last change. On v1 it would tell a program that
// is named for the whole hierarchy (release_agent), which is not ours to set:
// the reaper waits for one of the tasks in the cgroup to end, then looks again;
// for tasks that leave otherwise it looks when the daemon moves one, and every
// lookAgain while there is such a mark at all.
type reaper struct {
	set *cgfs.Set
	log *logrus.Logger
	// removed is told what was removed.
	removed func(*cgfs.Hierarchy, string)
	// ep waits for all handles; it is polled by the Go runtime, so that an
	// idle daemon is not woken.
	ep   *os.File
	wake int // eventfd
	// again is when to look without a cause; run's own. Zero is never.
	again time.Time

	mu      sync.Mutex
	watched map[watchKey]*watch // guarded by mu, as are the watches' fields
	todo    []*watch            // to be looked at; guarded by mu
	byFD    map[int32]*watch    // guarded by mu
	closed  bool                // guarded by mu

	done chan struct{}
}

type watchKey struct {
	h    *cgfs.Hierarchy
	path string
}

type watch struct {
	key watchKey
	// fd is a pidfd of a task in it (v1), or that of events (v2); -1 is none.
	fd     int
	events *cgfs.File
	// filled: the daemon itself has put a task into it or below, which may
	// have ended before anybody looked.
	filled bool
}

// lookAgain is how often cgroups with a mark are looked at without a cause.
const lookAgain = 30 * time.Second

// maxWatchFDs bounds the handles that are held; what is beyond waits for
// lookAgain.
const maxWatchFDs = 4096

// newReaper starts looking after marked cgroups. removed is called after one was
// removed.
func newReaper(set *cgfs.Set, log *logrus.Logger, removed func(*cgfs.Hierarchy, string)) (*reaper, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	if err := unix.SetNonblock(ep, true); err != nil {
		return nil, fmt.Errorf("set epoll nonblocking: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, wake, &ev); err != nil {
		return nil, fmt.Errorf("epoll_ctl: %w", err)
	}
	r := &reaper{
		set: set, log: log, removed: removed, ep: os.NewFile(uintptr(ep), "epoll"), wake: wake,
		watched: make(map[watchKey]*watch), byFD: make(map[int32]*watch), done: make(chan struct{}),
	}
	go r.run()
	return r, nil
}

func (r *reaper) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.poke()
	<-r.done
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range r.watched {
		r.unwatchLocked(w)
	}
	_ = r.ep.Close()
	_ = unix.Close(r.wake)
}

func (r *reaper) poke() {
	one := [8]byte{1}
	_, _ = unix.Write(r.wake, one[:])
}

// mark marks a cgroup. The decision has been made.
func (r *reaper) mark(d *cgfs.Dir) error {
	busy, err := d.Populated()
	if err != nil {
		return err
	}
	state := unfilled
	if busy {
		state = filled
	}
	if err := d.SetMark(autoremove, state); err != nil {
		return err
	}
	if d.Hierarchy().Version() == cgfs.V1 {
		f, err := d.File("notify_on_release", cgfs.ForWrite)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := f.Write("1"); err != nil {
			return err
		}
	}
	r.add(watchKey{d.Hierarchy(), d.Path()})
	return nil
}

func (r *reaper) add(k watchKey) {
	r.mu.Lock()
	// A watch of that name may be of a cgroup that is just being removed.
	if old, ok := r.watched[k]; ok {
		r.forgetLocked(old)
	}
	w := &watch{key: k, fd: -1}
	r.watched[k] = w
	r.todo = append(r.todo, w)
	r.mu.Unlock()
	r.poke()
}

// filled tells that a task was put into a cgroup, left that one was taken
// out.
func (r *reaper) filled(h *cgfs.Hierarchy, path string) { r.changed(h, path, true) }
func (r *reaper) left(h *cgfs.Hierarchy, path string)   { r.changed(h, path, false) }

func (r *reaper) changed(h *cgfs.Hierarchy, path string, filled bool) {
	r.mu.Lock()
	found := false
	if len(r.watched) > 0 {
		for {
			if w, ok := r.watched[watchKey{h, path}]; ok {
				r.todo, found = append(r.todo, w), true
				w.filled = w.filled || filled
			}
			if path == "/" || path == "" {
				break
			}
			path = parent(path)
		}
	}
	r.mu.Unlock()
	if found {
		r.poke()
	}
}

// gone tells that a cgroup was removed, with what was below it.
func (r *reaper) gone(h *cgfs.Hierarchy, path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, w := range r.watched {
		if k.h == h && privcheck.Below(path, k.path) {
			r.forgetLocked(w)
		}
	}
}

func (r *reaper) forgetLocked(w *watch) {
	r.unwatchLocked(w)
	delete(r.watched, w.key)
}

func (r *reaper) unwatchLocked(w *watch) {
	if w.fd >= 0 {
		delete(r.byFD, int32(w.fd))
		if w.events != nil {
			_ = w.events.Close()
		} else {
			_ = unix.Close(w.fd)
		}
		w.fd, w.events = -1, nil
	}
}

func (r *reaper) run() {
	defer close(r.done)
	r.scan()
	conn, err := r.ep.SyscallConn()
	if err != nil {
		r.log.WithError(err).Error("RemoveOnEmpty: cannot wait for events")
		return
	}
	var events [64]unix.EpollEvent
	for {
		n := 0
		r.setDeadline()
		err := conn.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), events[:], 0)
			return err == nil && n > 0
		})
		due := errors.Is(err, os.ErrDeadlineExceeded)
		if err != nil && !due {
			return
		}
		if due {
			r.again = time.Time{}
		}
		if r.collect(events[:max(n, 0)], due) {
			return
		}
		for {
			w := r.next()
			if w == nil {
				break
			}
			r.look(w)
		}
	}
}

func (r *reaper) setDeadline() {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case len(r.watched) == 0:
		r.again = time.Time{}
	case r.again.IsZero(): // else events without end would put it off
		r.again = time.Now().Add(lookAgain)
	}
	_ = r.ep.SetReadDeadline(r.again)
}

// collect notes what has to be looked at. It reports whether it is time to
// end.
func (r *reaper) collect(events []unix.EpollEvent, due bool) (end bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range events {
		if int(e.Fd) == r.wake {
			var b [8]byte
			_, _ = unix.Read(r.wake, b[:])
		} else if w, ok := r.byFD[e.Fd]; ok {
			r.todo = append(r.todo, w)
		}
	}
	if due {
		for _, w := range r.watched {
			r.todo = append(r.todo, w)
		}
	}
	return r.closed
}

func (r *reaper) next() *watch {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.todo) > 0 {
		w := r.todo[0]
		r.todo = r.todo[1:]
		if r.watched[w.key] == w {
			return w
		}
	}
	r.todo = nil
	return nil
}

// scan finds the marks of an earlier run.
func (r *reaper) scan() {
	for _, h := range r.set.Hierarchies() {
		top, err := h.Open("/")
		if err != nil {
			continue
		}
		err = top.Survey(func(d *cgfs.Dir) error {
			if _, ok, err := d.Mark(autoremove); err == nil && ok && d.Path() != "/" {
				r.add(watchKey{h, d.Path()})
			}
			return nil
		})
		_ = top.Close()
		if err != nil {
			r.log.WithField("hierarchy", h.Name()).WithError(err).Warn("RemoveOnEmpty: not every mark of an earlier run was looked for")
		}
	}
}

// look looks at a marked cgroup: it goes if it was filled and is empty.
func (r *reaper) look(w *watch) {
	keep, err := r.lookAt(w)
	if err != nil {
		r.log.WithFields(logrus.Fields{"hierarchy": w.key.h.Name(), "target": w.key.path}).WithError(err).Debug("RemoveOnEmpty")
	}
	if !keep {
		r.mu.Lock()
		if r.watched[w.key] == w {
			r.forgetLocked(w)
		}
		r.mu.Unlock()
	}
}

func (r *reaper) lookAt(w *watch) (keep bool, err error) {
	d, err := w.key.h.Open(w.key.path)
	if err != nil {
		return !vanished(err), err
	}
	defer d.Close()
	state, ok, err := d.Mark(autoremove)
	if err != nil || !ok {
		return err != nil && !vanished(err), err
	}
	// Watched first, looked at then: what happens in between is an event.
	if err := r.await(w, d); err != nil {
		return !vanished(err), err
	}
	busy, err := d.Populated()
	if err != nil {
		return !vanished(err), err
	}
	if busy {
		if state != filled {
			return true, d.SetMark(autoremove, filled)
		}
		return true, nil
	}
	if state != filled && !r.wasFilled(w) {
		return true, nil
	}
	above, err := w.key.h.Open(parent(w.key.path))
	if err != nil {
		return true, err
	}
	defer above.Close()
	if err := removeTree(above, base(w.key.path)); err != nil {
		return true, err
	}
	r.removed(w.key.h, w.key.path)
	r.log.WithFields(logrus.Fields{"op": "RemoveOnEmpty", "hierarchy": w.key.h.Name(), "target": w.key.path}).Info("removed: empty")
	return false, nil
}

// vanished reports whether the cgroup is there no more: it cannot be opened, or
// was removed after it was (ENOENT for its files, ENODEV for open ones).
func vanished(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) }

func (r *reaper) wasFilled(w *watch) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return w.filled
}

// await makes sure that an event comes when d may have become empty: the end
// of one of its tasks (v1), a change of cgroup.events (v2).
func (r *reaper) await(w *watch, d *cgfs.Dir) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watched[w.key] != w {
		return nil
	}
	if w.events != nil {
		return acknowledge(w.events)
	}
	r.unwatchLocked(w)
	if len(r.byFD) >= maxWatchFDs {
		return nil
	}
	if w.key.h.Version() == cgfs.V2 {
		f, err := d.File("cgroup.events", cgfs.ForRead)
		if err != nil {
			return err
		}
		if err = acknowledge(f); err == nil {
			err = r.control(f.Fd(), unix.EPOLLPRI)
		}
		if err != nil {
			_ = f.Close()
			return err
		}
		w.fd, w.events = f.Fd(), f
		r.byFD[int32(w.fd)] = w
		return nil
	}
	pids, err := subtreeProcs(d)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(int(pid), 0)
		if err != nil {
			continue
		}
		if err := r.control(fd, unix.EPOLLIN); err != nil {
			_ = unix.Close(fd)
			return err
		}
		w.fd = fd
		r.byFD[int32(fd)] = w
		return nil
	}
	return nil
}

// acknowledge reads cgroup.events: the kernel tells of changes since it was
// read last.
func acknowledge(f *cgfs.File) error {
	_, err := f.Read(4096)
	return err
}

func (r *reaper) control(fd int, events uint32) error {
	conn, err := r.ep.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	if err := conn.Control(func(ep uintptr) {
		cerr = unix.EpollCtl(int(ep), unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
	}); err != nil {
		return err
	}
	return cerr
}
