package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/cmd/service"
)

// mountpointMark is an attribute of what the daemon made to mount its sockets
// on.
const mountpointMark = "trusted.cgmanager.mountpoint"

// place is an address below service.CgroupDir where no socket of its own is, but
// something of /run/cgmanager is seen.
type place struct{ shown, at string }

// places are those of this host: the directory, and, where service.CgroupDir is a tmpfs,
// the socket of the seeds. Beside hierarchies of cgroups there is no room for a
// file.
func places() ([]place, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(service.CgroupDir, &fs); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: service.CgroupDir, Err: err}
	}
	dir := place{filepath.Dir(service.RunSocket), filepath.Dir(service.LegacySocket)}
	switch fs.Type {
	case unix.TMPFS_MAGIC:
		return []place{dir, {service.RunSocket, service.SeedSocket}}, nil
	case unix.CGROUP2_SUPER_MAGIC:
		return []place{dir}, nil
	}
	return nil, fmt.Errorf("%s: neither cgroups nor a tmpfs with some is mounted there", service.CgroupDir)
}

// mountSockets makes the sockets in /run/cgmanager visible at every other address
// that clients know. unmountSockets takes it back.
func mountSockets() error {
	all, err := places()
	if err != nil {
		return err
	}
	for _, p := range all {
		if err := p.mount(); err != nil {
			return errors.Join(err, unmountSockets())
		}
	}
	return nil
}

func unmountSockets() error {
	all, err := places()
	for _, p := range all {
		err = errors.Join(err, p.unmount())
	}
	return err
}

// stat looks at the place, and says whether what is to be seen there is.
func (p place) stat() (at unix.Stat_t, same bool, err error) {
	if err := unix.Lstat(p.at, &at); err != nil {
		return at, false, &os.PathError{Op: "stat", Path: p.at, Err: err}
	}
	var shown unix.Stat_t
	if err := unix.Lstat(p.shown, &shown); err != nil && !errors.Is(err, unix.ENOENT) {
		return at, false, &os.PathError{Op: "stat", Path: p.shown, Err: err}
	}
	return at, at.Dev == shown.Dev && at.Ino == shown.Ino, nil
}

// mount mounts on a cgroup where service.CgroupDir is the unified hierarchy: there is no
// other way to give existing clients the address that they know. The cgroup is
// made, or was empty: the mount hides it. A mount that a daemon left behind is
// taken over.
func (p place) mount() (err error) {
	made, err := p.create()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && made {
			_ = p.remove()
		}
	}()
	at, same, err := p.stat()
	if err != nil || same { // a daemon that was killed left it
		return err
	}
	if at.Nlink == 0 { // so did one whose directory or socket is gone
		if err := p.detach(); err != nil {
			return err
		}
	}
	if err := p.free(); err != nil {
		return err
	}
	if err := unix.Mount(p.shown, p.at, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "mount", Path: p.at, Err: err}
	}
	const readOnly = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", p.at, "", unix.MS_REMOUNT|unix.MS_BIND|readOnly, ""); err != nil {
		return errors.Join(&os.PathError{Op: "mount read-only", Path: p.at, Err: err}, p.detach())
	}
	return nil
}

// unmount takes back what mount did; what others made or mounted there stays.
func (p place) unmount() error {
	at, same, err := p.stat()
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	// Without a link it is a mount of what is gone by now.
	if err != nil || !same && at.Nlink > 0 {
		return err
	}
	if err := p.detach(); err != nil {
		return err
	}
	if _, err := unix.Lgetxattr(p.at, mountpointMark, nil); err != nil {
		return nil //nolint:nilerr // somebody else made it
	}
	if err := p.remove(); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return nil
}

func (p place) detach() error {
	if err := unix.Unmount(p.at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: p.at, Err: err}
	}
	return nil
}

// create makes what to mount on, a directory or a file like what is to be shown,
// unless there is something.
func (p place) create() (made bool, err error) {
	var shown unix.Stat_t
	if err := unix.Lstat(p.shown, &shown); err != nil {
		return false, &os.PathError{Op: "stat", Path: p.shown, Err: err}
	}
	err = writable(func() error {
		if shown.Mode&unix.S_IFMT == unix.S_IFDIR {
			err = unix.Mkdir(p.at, 0o755)
		} else {
			err = unix.Mknod(p.at, unix.S_IFREG|0o600, 0)
		}
		if err != nil {
			return err
		}
		if err := unix.Lsetxattr(p.at, mountpointMark, []byte("1"), 0); err != nil {
			return errors.Join(err, p.remove())
		}
		return nil
	})
	switch {
	case errors.Is(err, unix.EEXIST):
		return false, nil
	case err != nil:
		return false, &os.PathError{Op: "make", Path: p.at, Err: err}
	}
	return true, nil
}

func (p place) remove() error {
	err := writable(func() error { return os.Remove(p.at) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// writable does what changes service.CgroupDir itself. systemd keeps that tmpfs
// read-only where there are v1 hierarchies: it is writable for the moment of f,
// to root alone as before.
func writable(f func() error) error {
	err := f()
	if !errors.Is(err, unix.EROFS) {
		return err
	}
	var fs unix.Statfs_t
	if serr := unix.Statfs(service.CgroupDir, &fs); serr != nil || fs.Type != unix.TMPFS_MAGIC {
		return err
	}
	// These have the same numbers as flags of statfs and of mount.
	flags := uintptr(fs.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("", service.CgroupDir, "", unix.MS_REMOUNT|flags, ""); err != nil {
		return &os.PathError{Op: "make writable", Path: service.CgroupDir, Err: err}
	}
	err = f()
	if merr := unix.Mount("", service.CgroupDir, "", unix.MS_REMOUNT|unix.MS_RDONLY|flags, ""); merr != nil {
		err = errors.Join(err, &os.PathError{Op: "make read-only again", Path: service.CgroupDir, Err: merr})
	}
	return err
}

// free returns an error if what is at the place may not be hidden: a cgroup that
// has tasks or children, or another's mount. A socket and its directory may: a
// daemon that lives keeps the next one from serving.
func (p place) free() error {
	var fs unix.Statfs_t
	if err := unix.Statfs(p.at, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: p.at, Err: err}
	}
	var at, parent unix.Stat_t
	if err := errors.Join(unix.Lstat(p.at, &at), unix.Stat(service.CgroupDir, &parent)); err != nil {
		return &os.PathError{Op: "stat", Path: p.at, Err: err}
	}
	if at.Dev != parent.Dev {
		return fmt.Errorf("%s: something else is mounted there", p.at)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil
	}
	entries, err := os.ReadDir(p.at)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			return fmt.Errorf("%s: the cgroup is in use: it has children", p.at)
		}
	}
	events, err := os.ReadFile(p.at + "/cgroup.events")
	if err != nil {
		return err
	}
	if !strings.Contains("\n"+string(events), "\npopulated 0\n") {
		return fmt.Errorf("%s: the cgroup is in use: it has tasks", p.at)
	}
	return nil
}
