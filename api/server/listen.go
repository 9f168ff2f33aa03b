package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a listening socket.
type Listener struct {
	file *os.File
	// path is where the socket is to be removed in the end, if the inode
	// there is still the one of stat; empty for a service manager's.
	path string
	stat unix.Stat_t
	// ours: it ends with us. Else others have it too.
	ours bool
}

// ErrInUse says that somebody listens at the path already.
var ErrInUse = errors.New("another daemon answers there")

// Listen makes a listening socket at path that everybody may connect to: the
// kernel's credentials decide who may do what. A socket that nobody listens on
// any more is replaced; where somebody does, Listen returns an error wrapping
// ErrInUse. Of several callers at the same moment one has the socket.
func Listen(path string) (_ *Listener, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("listen on %s: %w", path, err)
		}
	}()
	unlock, err := lockPath(path)
	if err != nil {
		return nil, err
	}
	defer unlock()
	at := path
	stale, err := isStale(path)
	if err != nil {
		return nil, err
	}
	if stale {
		at = path + ".new"
		if err := unix.Unlink(at); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	l := &Listener{path: path, ours: true}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	// Before listen: what arrives before an option is set carries no
	// credential.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return nil, os.NewSyscallError("setsockopt SO_PASSCRED", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: at}); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	// The umask took bits away. Nobody can connect before listen.
	if err := unix.Chmod(at, 0o777); err != nil {
		return nil, os.NewSyscallError("chmod", err)
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	if stale {
		if err := unix.Rename(at, path); err != nil {
			return nil, os.NewSyscallError("rename", err)
		}
	}
	if err := unix.Lstat(path, &l.stat); err != nil {
		return nil, os.NewSyscallError("lstat", err)
	}
	l.file = os.NewFile(uintptr(fd), path)
	return l, nil
}

// lockPath keeps others from looking at the socket at path, or replacing it,
// until unlock: between bind and listen it looks as if nobody cared for it. The
// lock is a file beside it that is there for that long only, because others see
// the directory; they cannot take it, because root alone can open it.
func lockPath(path string) (unlock func(), err error) {
	name := path + ".lock"
	for range 200 {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, os.NewSyscallError("open the lock", err)
		}
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		var ours, there unix.Stat_t
		if err == nil {
			err = unix.Fstat(fd, &ours)
		}
		if err == nil {
			err = unix.Lstat(name, &there)
		}
		if err == nil && ours.Dev == there.Dev && ours.Ino == there.Ino {
			return func() {
				_ = unix.Unlink(name)
				_ = unix.Close(fd)
			}, nil
		}
		// Somebody has it, or has removed it since it was opened.
		if cerr := unix.Close(fd); cerr != nil {
			return nil, cerr
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil, ErrInUse
}

// isStale reports whether there is a socket at path that nobody listens on.
func isStale(path string) (bool, error) {
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, os.NewSyscallError("lstat", err)
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return false, errors.New("there is something that is not a socket")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return false, os.NewSyscallError("socket", err)
	}
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if err == nil {
		// Who called listen, and may be no more than a thread in close.
		if cred, cerr := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); cerr == nil && Defunct(int(cred.Pid)) {
			err = unix.ECONNREFUSED
		}
	}
	if cerr := unix.Close(fd); cerr != nil {
		return false, cerr
	}
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return true, nil
	case err == nil, errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EPROTOTYPE):
		return false, ErrInUse // EAGAIN: its backlog is full
	}
	return false, os.NewSyscallError("connect", err)
}

// Defunct reports whether a process was killed or has ended, but is still there
// because the kernel holds up a thread of it, as a stranger's file system can in
// close. Its sockets and locks stay for as long, and nobody serves them. It is
// false for a process that cannot be looked at.
func Defunct(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status")) //nolint:forbidigo // The kernel's own path.
	if err != nil || pid <= 0 {
		return false
	}
	const kill = 1 << (unix.SIGKILL - 1)
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch name {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd": // the kernel's way of ending each thread
			if set, err := strconv.ParseUint(value, 16, 64); err == nil && set&kill != 0 {
				return true
			}
		}
	}
	return false
}

// FromFile returns the listening socket f, which a service manager made. It is
// not removed in the end.
func FromFile(f *os.File) *Listener { return &Listener{file: f} }

// Take makes a socket of another daemon's this one's own: Close removes it, if
// that one made it. Clients see this process as the one that listens.
func (l *Listener) Take() error {
	l.ours = l.path != ""
	if !l.ours {
		return nil
	}
	return l.control(func(fd int) error { return os.NewSyscallError("listen", unix.Listen(fd, unix.SOMAXCONN)) })
}

// Release closes the socket and leaves it to others.
func (l *Listener) Release() error { return l.file.Close() }

// Missing reports whether the socket is to be removed in the end and is not where
// it was made any more.
func (l *Listener) Missing() bool {
	var st unix.Stat_t
	return l.path != "" && (unix.Lstat(l.path, &st) != nil || st.Dev != l.stat.Dev || st.Ino != l.stat.Ino)
}

// Removed reports whether the socket is to be removed in the end, by whoever has it
// then: no service manager made it.
func (l *Listener) Removed() bool { return l.path != "" }

// Is reports whether both are the same socket.
func (l *Listener) Is(other *Listener) bool {
	var a, b unix.Stat_t
	err := errors.Join(
		l.control(func(fd int) error { return unix.Fstat(fd, &a) }),
		other.control(func(fd int) error { return unix.Fstat(fd, &b) }))
	return err == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// Path returns where the socket is, as far as that is known.
func (l *Listener) Path() string {
	if l.path != "" {
		return l.path
	}
	path := ""
	_ = l.control(func(fd int) error {
		if sa, err := unix.Getsockname(fd); err == nil {
			if u, ok := sa.(*unix.SockaddrUnix); ok {
				path = u.Name
			}
		}
		return nil
	})
	return path
}

// Name returns the path of the socket, or the name of its file.
func (l *Listener) Name() string { return l.file.Name() }

// Close stops listening and removes the socket, unless another one is there
// by now.
func (l *Listener) Close() error {
	if !l.ours {
		return l.Release()
	}
	// Closing is not enough where a copy of the descriptor is left, such as
	// in a thread that a stranger's file system holds up in close: clients
	// would connect and wait for ever.
	err := l.control(func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
	err = errors.Join(err, l.file.Close())
	unlock, lerr := lockPath(l.path)
	if errors.Is(lerr, unix.ENOENT) {
		return err // the directory is gone, and the socket with it
	}
	if lerr != nil {
		return errors.Join(err, lerr)
	}
	defer unlock()
	if !l.Missing() {
		err = errors.Join(err, os.NewSyscallError("unlink", unix.Unlink(l.path)))
	}
	return err
}

func (l *Listener) control(f func(fd int) error) error {
	rc, err := l.file.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := rc.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// prepare readies a socket, wherever it came from, and returns its descriptor,
// which is good until Close.
func (l *Listener) prepare() (fd int, err error) {
	err = l.control(func(n int) error {
		fd = n
		if err := unix.SetsockoptInt(n, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
			return fmt.Errorf("%s: %w", l.Name(), os.NewSyscallError("setsockopt SO_PASSCRED", err))
		}
		return os.NewSyscallError("fcntl", unix.SetNonblock(n, true))
	})
	return fd, err
}

// listener is a Listener that a Server accepts from.
type listener struct {
	*Listener
	s      *Server
	fd     int
	events uint32 // what epoll watches for
	closed bool
}

// acceptBatch is how many connections are accepted before others get a turn.
const acceptBatch = 16

func (l *listener) ready(uint32) {
	l.accept(acceptBatch)
}

// accept takes up to n connections. Called with mu held.
func (l *listener) accept(n int) {
	s := l.s
	for range n {
		if s.places() >= s.limits.TotalConnections || s.opening >= maxOpening {
			s.pause()
			return
		}
		fd, _, err := unix.Accept4(l.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case err == nil:
			s.open(fd)
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
		case errors.Is(err, unix.EAGAIN):
			if s.draining { // nobody can connect any more
				l.finish()
			}
			return
		default:
			// Out of descriptors or memory: others than ours may give some
			// back, so look again in a while.
			s.log.WithError(err).Warn("accept")
			s.pause()
			s.start(&s.retry, &s.retries)
			return
		}
	}
}

// seal lets nobody connect any more. Who has connected is accepted, in turn with
// the rest and as the bounds allow; then the socket is closed. One that is not
// ours is closed at once: others have it too. In a handover all stay open. Called
// with mu held.
func (l *listener) seal() {
	switch {
	case l.s.handover:
		l.closed = true
		if err := l.s.watch(l.fd, l, 0, &l.events); err != nil {
			l.s.log.WithError(err).Error("forget a listening socket")
		}
		return
	case l.ours:
		err := unix.Shutdown(l.fd, unix.SHUT_RD)
		if err == nil {
			return
		}
		l.s.log.WithError(err).Warn("shutdown of a listening socket")
	}
	l.finish()
}

// finish closes the socket and logs what goes wrong. Called with mu held.
func (l *listener) finish() {
	if err := l.close(); err != nil {
		l.s.log.WithError(err).Warn("close a listening socket")
	}
	l.s.checkEmpty()
}

func (l *listener) close() error {
	if l.closed {
		return nil
	}
	l.closed = true
	err := l.s.watch(l.fd, l, 0, &l.events)
	return errors.Join(err, l.Close())
}

// pause stops accepting until resume. Called with mu held.
func (s *Server) pause() {
	if s.paused {
		return
	}
	s.paused = true
	s.watchListeners(0)
}

// resume accepts again. Called with mu held.
func (s *Server) resume() {
	if !s.paused || s.stopped {
		return
	}
	s.paused = false
	s.retry.stop()
	s.watchListeners(unix.EPOLLIN)
}

func (s *Server) watchListeners(events uint32) {
	for _, l := range s.listeners {
		if l.closed {
			continue
		}
		if err := s.watch(l.fd, l, events, &l.events); err != nil {
			s.log.WithError(err).Error("watch a listening socket")
		}
	}
}
