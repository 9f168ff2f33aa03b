package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api/server"
	"cgmanager/cmd/service"
	"cgmanager/proxy"
)

const (
	// serveDir holds the proxy's own socket. It is mounted over the places
	// where clients look, and stays when the proxy ends: what containers
	// further in have bind-mounted of it shows the next one's socket.
	serveDir = "/run/cgproxy"
	// lockFile is held as long as a proxy serves the usual places.
	lockFile = "/run/cgproxy.lock"
)

// place is a directory in which clients look for the socket, and where the
// daemon's, which is mounted there, goes meanwhile.
type place struct{ dir, aside string }

// places are those of this container.
func places() []place {
	run := place{service.RunDir, service.RunDir + ".lower"}
	switch fsType(service.CgroupDir) {
	case unix.TMPFS_MAGIC:
		return []place{run, {service.LegacyDir, service.LegacyDir + ".lower"}}
	case unix.CGROUP2_SUPER_MAGIC:
		// Directories there are cgroups: none can be made for what is taken
		// aside, and the one of the name is served only if it is there.
		if isDir(service.LegacyDir) {
			return []place{run, {service.LegacyDir, run.aside}}
		}
	}
	return []place{run}
}

func fsType(path string) int64 {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0
	}
	return fs.Type
}

func isDir(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.IsDir()
}

func isSocket(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode().Type() == os.ModeSocket
}

// holds reports whether the directory holds a daemon's socket, or would if there
// was a daemon: something is mounted there.
func holds(dir string) bool {
	if same(dir, serveDir) {
		return false
	}
	return isSocket(filepath.Join(dir, service.SocketName)) || isDir(dir) && mountID(dir) != mountID(filepath.Dir(dir))
}

// mountID returns the id of the mount that a path is on; statx(2).
func mountID(path string) uint64 {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &st); err != nil {
		return 0
	}
	return st.Mnt_id
}

// same reports whether two directories are one, which a bind mount shows twice.
func same(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// lock makes sure that one proxy at a time serves the usual places.
func lock() (unlock func(), err error) {
	f, err := os.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w (hint: cgproxy needs a /run of the container's own that it may write, or --listen)", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.New("another cgproxy serves this container already (hint: one is enough; end it first to start another one)")
		}
		return nil, &os.PathError{Op: "flock", Path: lockFile, Err: err}
	}
	return func() { _ = f.Close() }, nil
}

// findLower returns the socket of the daemon to ask, which answers.
func findLower(o options, log *logrus.Logger) (string, error) {
	candidates := []string{o.lower}
	if o.lower == "" {
		candidates = nil
		for _, p := range places() {
			// One taken aside already is of a proxy that was killed.
			for _, dir := range []string{p.aside, p.dir} {
				if holds(dir) {
					candidates = append(candidates, filepath.Join(dir, service.SocketName))
					break
				}
			}
		}
		if candidates == nil {
			return "", fmt.Errorf("there is no cgmanager socket in this container, neither %s/%s nor %s/%s (hint: bind-mount the host's %s into it, or name the socket with --lower)",
				service.RunDir, service.SocketName, service.LegacyDir, service.SocketName, service.RunDir)
		}
	}
	var failed error
	for _, path := range candidates {
		lower, err := proxy.New(proxy.Config{Lower: path, Wait: o.wait}).Check()
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("the daemon to ask, at %s: %w%s", path, err, hint(err)))
			continue
		}
		if lower.PID != 0 && len(o.listen) == 0 {
			return "", fmt.Errorf("the daemon at %s runs in this very pid namespace: here nobody needs a proxy (hint: start cgproxy inside a container into which %s is bind-mounted)", path, filepath.Dir(path))
		}
		fields := log.WithField("lower", path)
		if lower.Original {
			fields.Info("asking the original cgmanager, which knows cgmanager0_0 alone, and one proxy")
		} else {
			fields.Debug("asking cgmanager")
		}
		return path, nil
	}
	return "", failed
}

// hint says what to do about a daemon that does not answer, or cannot be used.
func hint(err error) string {
	switch {
	case errors.Is(err, proxy.ErrVersion):
		return " (hint: upgrade cgmanager on the host, or run the cgproxy that came with it)"
	case errors.Is(err, unix.ECONNREFUSED):
		return " (hint: the socket is stale: start cgmanager on the host; if it runs, the socket alone was bind-mounted and is an old one's: bind-mount its directory instead)"
	case errors.Is(err, unix.ENOENT):
		return " (hint: bind-mount the directory of the host's socket, and start cgmanager there)"
	case errors.Is(err, unix.EACCES):
		return " (hint: the directories above the socket must be open to root of this container)"
	}
	return ""
}

// takeAside makes way for the proxy's own socket at the usual places: what is
// mounted there is mounted aside as well, and covered. A killed proxy's mounts
// are used as they are. lower is where the daemon answers now, and the result
// where it does then; keep says that it was named and stays where it is. end
// takes everything back.
func takeAside(lower string, keep bool) (_ string, end func() error, err error) {
	var undo []func() error
	end = func() (err error) {
		for _, u := range slices.Backward(undo) {
			err = errors.Join(err, u())
		}
		undo = nil
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w%s", err, mountHint(err)), end())
		}
	}()
	if err := service.SocketDir(serveDir); err != nil {
		return "", end, err
	}
	aside := map[string]bool{}
	for _, p := range places() {
		if !keep {
			if !aside[p.aside] { // two places may be one directory, mounted twice
				if aside[p.aside], err = bindAside(p, &undo); err != nil {
					return "", end, err
				}
			}
			if lower == filepath.Join(p.dir, service.SocketName) {
				lower = filepath.Join(p.aside, service.SocketName)
			}
		} else if same(filepath.Dir(lower), p.dir) {
			return "", end, fmt.Errorf("--lower %s: that place is to be served (hint: leave --lower out, or give --listen)", lower)
		}
	}
	for _, p := range places() {
		if err := coverPlace(p.dir, &undo); err != nil {
			return "", end, err
		}
	}
	return lower, end, nil
}

func mountHint(err error) string {
	if errors.Is(err, unix.EPERM) {
		return " (hint: cgproxy needs CAP_SYS_ADMIN over its mount namespace: start it as root of a container that has one, or use --lower and --listen)"
	}
	return ""
}

// bindAside makes what is at the place visible aside too, if there is something.
func bindAside(p place, undo *[]func() error) (done bool, err error) {
	if !holds(p.aside) {
		if !holds(p.dir) {
			return false, nil
		}
		if err := os.Mkdir(p.aside, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return false, err
		}
		if err := unix.Mount(p.dir, p.aside, "", unix.MS_BIND, ""); err != nil {
			return false, errors.Join(&os.PathError{Op: "mount on", Path: p.aside, Err: err}, os.Remove(p.aside))
		}
		// What covers the place would cover this as well where mounts are shared,
		// and the proxy would ask itself.
		if err := unix.Mount("", p.aside, "", unix.MS_PRIVATE, ""); err != nil {
			return false, errors.Join(&os.PathError{Op: "make private", Path: p.aside, Err: err}, unmount(p.aside), os.Remove(p.aside))
		}
	}
	*undo = append(*undo, func() error {
		if err := unmount(p.aside); err != nil {
			return err
		}
		return os.Remove(p.aside)
	})
	return true, nil
}

// coverPlace mounts the proxy's directory over a place, which it makes if need
// be.
func coverPlace(dir string, undo *[]func() error) error {
	if !same(dir, serveDir) {
		made := os.Mkdir(dir, 0o755)
		if made != nil && !errors.Is(made, os.ErrExist) {
			return made
		}
		if made == nil {
			*undo = append(*undo, func() error { return os.Remove(dir) })
		}
		if err := unix.Mount(serveDir, dir, "", unix.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "mount on", Path: dir, Err: err}
		}
	}
	*undo = append(*undo, func() error {
		if !same(dir, serveDir) {
			return nil // somebody else has mounted something there
		}
		return unmount(dir)
	})
	return nil
}

func unmount(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: dir, Err: err}
	}
	return nil
}

// usualSockets are where the proxy listens; the first one is seen at every place.
func usualSockets() []string {
	paths := []string{filepath.Join(serveDir, service.SocketName)}
	if fsType(service.CgroupDir) == unix.TMPFS_MAGIC {
		paths = append(paths, service.SeedSocket)
	}
	return paths
}

// listenAt opens the sockets. Where they are the usual ones, it can do without
// all but the first.
func listenAt(paths []string, usual bool, log *logrus.Logger) (ls []*server.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range ls {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	for i, path := range paths {
		l, err := server.Listen(path)
		switch {
		case err == nil:
			ls = append(ls, l)
		case usual && i > 0:
			log.WithError(err).Warnf("not served at %s (hint: clients find the other sockets)", path)
		case errors.Is(err, server.ErrInUse):
			return ls, fmt.Errorf("%w (hint: a proxy or a daemon serves there already; end it first)", err)
		case errors.Is(err, unix.ENOENT):
			return ls, fmt.Errorf("%w (hint: make the directory of the socket; root alone should be able to write to it)", err)
		default:
			return ls, err
		}
	}
	return ls, nil
}
