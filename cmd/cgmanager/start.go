package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api/server"
	"cgmanager/cmd/service"
)

// firstInherited is the first descriptor that a service manager passes
// (sd_listen_fds(3)).
const firstInherited = 3

// inherited returns the listening sockets that a service manager passed. What
// is not one is an error: it was meant to be served.
func inherited() ([]*server.Listener, error) {
	pid, n := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil // meant for another process
	}
	count, err := strconv.Atoi(n)
	if err != nil || count < 0 || count > 64 {
		return nil, fmt.Errorf("LISTEN_FDS=%q is not a number of descriptors", n)
	}
	var ls []*server.Listener
	for fd := firstInherited; fd < firstInherited+count; fd++ {
		unix.CloseOnExec(fd)
		domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		listening := 0
		if err == nil {
			listening, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		}
		if err != nil || domain != unix.AF_UNIX || listening == 0 {
			return nil, fmt.Errorf("descriptor %d, which was passed (LISTEN_FDS), is not a listening Unix socket", fd)
		}
		ls = append(ls, server.FromFile(os.NewFile(uintptr(fd), fmt.Sprintf("LISTEN_FDS[%d]", fd-firstInherited))))
	}
	return ls, nil
}

// sockets are those that the daemon serves.
type sockets struct {
	listeners []*server.Listener
	// shown: those of /run/cgmanager are seen below /sys/fs/cgroup as well, by
	// mounts of this daemon's; show: they will be its own by take.
	shown, show bool
	// dropped were another daemon's, and are not to be served any more.
	dropped []*server.Listener
	log     *logrus.Logger
}

// listen opens the sockets named, or else takes those that a service manager
// passed, or else opens the usual ones of this host. Where a daemon passes on its
// own, those stay: all of them, unless addresses are named.
func listen(addresses []string, passed []*server.Listener, log *logrus.Logger) (_ *sockets, err error) {
	s := &sockets{log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if len(addresses) == 0 {
		if s.listeners, err = inherited(); err != nil {
			return s, err
		}
	}
	paths := make([]string, len(addresses))
	for i, a := range addresses {
		if paths[i], err = service.SocketPath(a); err != nil {
			return s, err
		}
	}
	show := false
	switch {
	case len(passed) > 0:
		show = s.keep(passed, paths) && shows()
	case len(paths) == 0 && len(s.listeners) == 0:
		show = shows()
		paths = usual(show)
		for _, p := range paths {
			if dir := filepath.Dir(p); dir != service.CgroupDir {
				if err := service.SocketDir(dir); err != nil {
					return s, err
				}
			}
		}
	}
	for _, p := range paths {
		if slices.ContainsFunc(s.listeners, func(l *server.Listener) bool { return l.Path() == p }) {
			continue
		}
		l, err := server.Listen(p)
		if err != nil {
			return s, fmt.Errorf("%w%s", err, hint(err))
		}
		s.listeners = append(s.listeners, l)
	}
	if show {
		if err := mountSockets(); err != nil {
			log.WithError(err).Warnf("not served at %s (hint: clients find %s, or give them $CGMANAGER_ADDRESS)", service.LegacySocket, service.RunSocket)
			return s, nil
		}
		log.WithField("socket", service.LegacySocket).Info("serving")
		s.show = true
		s.shown = len(passed) == 0
	}
	return s, nil
}

// shows reports whether the sockets in /run/cgmanager are to be mounted at the
// addresses below /sys/fs/cgroup, where no socket can be made.
func shows() bool {
	var fs unix.Statfs_t
	if unix.Statfs(service.CgroupDir, &fs) != nil {
		return false
	}
	return fs.Type == unix.CGROUP2_SUPER_MAGIC || fs.Type == unix.TMPFS_MAGIC && fs.Flags&unix.ST_RDONLY != 0
}

// usual are the paths of this host's own sockets, but for what is shown.
func usual(shown bool) []string {
	var fs unix.Statfs_t
	if shown || unix.Statfs(service.CgroupDir, &fs) != nil || fs.Type != unix.TMPFS_MAGIC {
		return []string{service.RunSocket}
	}
	return []string{service.RunSocket, service.LegacySocket, service.SeedSocket}
}

// keep sorts what another daemon passes on: paths are what is wanted, or all is.
// It reports whether the daemon's own socket is among it, and wanted because
// nothing else was named.
func (s *sockets) keep(passed []*server.Listener, paths []string) (own bool) {
	for _, l := range passed {
		wanted := len(paths) == 0 || slices.Contains(paths, l.Path())
		same := slices.ContainsFunc(s.listeners, l.Is)
		if !wanted || same || l.Missing() {
			s.dropped = append(s.dropped, l)
			continue
		}
		s.listeners = append(s.listeners, l)
		own = own || len(paths) == 0 && l.Removed() && l.Path() == service.RunSocket
	}
	return own
}

// renew opens what the other daemon has removed after all: it was told to end
// while it passed its sockets on.
func (s *sockets) renew() error {
	for i, l := range s.listeners {
		if !l.Missing() {
			continue
		}
		n, err := server.Listen(l.Path())
		if err != nil {
			return fmt.Errorf("%w%s", err, hint(err))
		}
		s.log.WithField("socket", l.Path()).Info("opened again")
		s.listeners[i] = n
		if err := l.Release(); err != nil {
			return err
		}
	}
	return nil
}

// take makes the sockets this daemon's own, which is the only one from here on.
func (s *sockets) take() error {
	for _, l := range s.listeners {
		if err := l.Take(); err != nil {
			return fmt.Errorf("take over %s: %w", l.Name(), err)
		}
	}
	s.shown = s.show
	return nil
}

// drop removes those that are not wanted any more.
func (s *sockets) drop() {
	for _, l := range s.dropped {
		path := l.Path()
		s.log.WithField("socket", path).Info("not served any more")
		if path == service.RunSocket && l.Removed() && !s.shown {
			if err := unmountSockets(); err != nil {
				s.log.WithError(err).Warn("the mount of the sockets is left behind")
			}
		}
		err := l.Take()
		if err = errors.Join(err, l.Close()); err != nil {
			s.log.WithError(err).Warnf("close %s", path)
		}
	}
	s.dropped = nil
}

// close closes them, and removes what is the daemon's own.
func (s *sockets) close() error {
	var err error
	for _, l := range append(s.listeners, s.dropped...) {
		err = errors.Join(err, l.Close())
	}
	s.hide()
	return err
}

// hide takes back the mounts, once the sockets are closed.
func (s *sockets) hide() {
	if !s.shown {
		return
	}
	s.shown, s.show = false, false
	if err := unmountSockets(); err != nil {
		s.log.WithError(err).Warn("the mount of the sockets is left behind")
	}
}

// release leaves all of it to another daemon.
func (s *sockets) release() error {
	var err error
	for _, l := range s.listeners {
		err = errors.Join(err, l.Release())
	}
	return err
}

func hint(err error) string {
	if errors.Is(err, server.ErrInUse) {
		return " (hint: end the other daemon first; one serves the whole host)"
	}
	if errors.Is(err, unix.ENOENT) {
		return " (hint: make the directory of the socket; root alone should be able to write to it)"
	}
	return ""
}

// lock makes sure that no other daemon has the same state directory, for as
// long as this one lives: the kernel lets go of the lock with the process. It waits
// for one that is just ending.
func lock(dir string, wait time.Duration) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || !st.IsDir() || sys.Uid != 0 {
		return nil, fmt.Errorf("state directory %s: must be a directory of root's own", dir)
	}
	// It may have been there before; who can open it can lock it.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	// One at a time: a lock may have to be replaced.
	guard, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	defer guard.Close()
	if err := unix.Flock(int(guard.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	name := filepath.Join(dir, "lock")
	for end := time.Now().Add(wait); ; {
		late := !time.Now().Before(end) // before it is tried, or it would not be after a standstill
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("state directory: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			// For init scripts it is the pid file too.
			if err := writePID(f); err != nil {
				_ = f.Close()
				return nil, err
			}
			return func() {
				_ = f.Truncate(0)
				_ = f.Close()
			}, nil
		}
		pid := holder(f)
		_ = f.Close()
		switch {
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock the state directory: %w", err)
		case !server.Defunct(pid) && !late:
			time.Sleep(2 * time.Millisecond)
			continue
		case !server.Defunct(pid):
			return nil, fmt.Errorf("another cgmanager is running (it holds the lock in %s; hint: --replace takes its place; where it does not answer, end it)", dir)
		}
		// The kernel cannot end the last of it, nor let go of its lock.
		if err := os.Remove(name); err != nil {
			return nil, fmt.Errorf("state directory: %w", err)
		}
	}
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := fmt.Fprintln(f, os.Getpid())
	return err
}

// holder returns the process that holds a lock on f, or 0 (proc_locks(5)).
func holder(f *os.File) int {
	var st unix.Stat_t
	locks, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(locks)) {
		// 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF
		l := strings.Fields(line)
		if len(l) < 6 || l[1] != "FLOCK" || l[5] != file {
			continue
		}
		if pid, err := strconv.Atoi(l[4]); err == nil {
			return pid
		}
	}
	return 0
}
