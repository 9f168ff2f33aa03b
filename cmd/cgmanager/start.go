package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api/server"
	"cgmanager/cmd/service"
)

// The sockets of a host. Those below /sys/fs/cgroup are for hosts where that is
// a tmpfs that can be written to; elsewhere, and where a service manager holds
// runSocket, mountSockets shows it there.
const (
	cgroupDir    = "/sys/fs/cgroup"
	seedSocket   = cgroupDir + "/manager"
	legacySocket = cgroupDir + "/cgmanager/sock"
	runSocket    = "/run/cgmanager/sock"
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

// listen opens the sockets named, or else takes those that a service manager
// passed, or else opens the usual ones of this host. end takes back what else
// it did, once they are closed.
func listen(addresses []string, log *logrus.Logger) (_ []*server.Listener, end func(), err error) {
	end = func() {}
	if len(addresses) == 0 {
		if ls, err := inherited(); err != nil || len(ls) > 0 {
			return ls, end, err
		}
	}
	var paths []string
	for _, a := range addresses {
		p, err := service.SocketPath(a)
		if err != nil {
			return nil, end, err
		}
		paths = append(paths, p)
	}
	show := false
	if len(paths) == 0 {
		paths = append(paths, runSocket)
		var fs unix.Statfs_t
		if err := unix.Statfs(cgroupDir, &fs); err == nil {
			tmpfs := fs.Type == unix.TMPFS_MAGIC
			if tmpfs && fs.Flags&unix.ST_RDONLY == 0 {
				paths = append(paths, legacySocket, seedSocket)
			} else {
				show = tmpfs || fs.Type == unix.CGROUP2_SUPER_MAGIC
			}
		}
		for _, p := range paths {
			if dir := filepath.Dir(p); dir != cgroupDir {
				if err := service.SocketDir(dir); err != nil {
					return nil, end, err
				}
			}
		}
	}
	var ls []*server.Listener
	defer func() {
		if err != nil {
			for _, l := range ls {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	for _, p := range paths {
		l, err := server.Listen(p)
		if err != nil {
			return ls, end, fmt.Errorf("%w%s", err, hint(err))
		}
		ls = append(ls, l)
	}
	if show {
		if err := mountSockets(); err != nil {
			log.WithError(err).Warnf("not served at %s (hint: clients find %s, or give them $CGMANAGER_ADDRESS)", legacySocket, runSocket)
			return ls, end, nil
		}
		log.WithField("socket", legacySocket).Info("serving")
		end = func() {
			if err := unmountSockets(); err != nil {
				log.WithError(err).Warn("the mount of the sockets is left behind")
			}
		}
	}
	return ls, end, nil
}

func hint(err error) string {
	if errors.Is(err, server.ErrInUse) {
		return " (hint: end the other daemon first; one serves the whole host)"
	}
	return ""
}

// lock makes sure that no other daemon has the same state directory, for as
// long as this one lives: the kernel lets go of the lock with the process.
func lock(dir string) (unlock func(), err error) {
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
	for {
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
		case !server.Defunct(pid):
			return nil, fmt.Errorf("another cgmanager is running (it holds the lock in %s; hint: end it first)", dir)
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
