package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mountpointMark is an attribute of the cgroup that the daemon made to mount
// its sockets on.
const mountpointMark = "trusted.cgmanager.mountpoint"

// mountSockets makes the directory dir visible at point, a cgroup of the
// unified hierarchy: there is no other way to give existing clients the address
// that they know. The cgroup is made, or was empty: the mount hides it. A mount
// that a daemon left behind is taken over. unmount takes all of it back.
func mountSockets(dir, point string) (unmount func() error, err error) {
	var sockets unix.Stat_t
	if err := unix.Lstat(dir, &sockets); err != nil {
		return nil, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	shown := func() (st unix.Stat_t, same bool, err error) {
		if err := unix.Lstat(point, &st); err != nil {
			return st, false, &os.PathError{Op: "stat", Path: point, Err: err}
		}
		return st, st.Dev == sockets.Dev && st.Ino == sockets.Ino, nil
	}
	unmount = func() error {
		if _, same, err := shown(); err != nil || !same {
			return err
		}
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return &os.PathError{Op: "unmount", Path: point, Err: err}
		}
		if _, err := unix.Lgetxattr(point, mountpointMark, nil); err != nil {
			return nil //nolint:nilerr // somebody else made it
		}
		if err := unix.Rmdir(point); err != nil && !errors.Is(err, unix.EBUSY) {
			return &os.PathError{Op: "rmdir", Path: point, Err: err}
		}
		return nil
	}

	if err := unix.Mkdir(point, 0o755); err == nil {
		defer func() {
			if err != nil {
				_ = unix.Rmdir(point)
			}
		}()
		if err := unix.Lsetxattr(point, mountpointMark, []byte("1"), 0); err != nil {
			return nil, &os.PathError{Op: "mark", Path: point, Err: err}
		}
	} else if !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mkdir", Path: point, Err: err}
	}
	st, same, err := shown()
	if err != nil {
		return nil, err
	}
	if same { // a daemon that was killed left it
		return unmount, nil
	}
	if st.Nlink == 0 { // so did one whose directory is gone
		if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return nil, &os.PathError{Op: "unmount", Path: point, Err: err}
		}
	}
	if err := emptyCgroup(point); err != nil {
		return nil, err
	}
	if err := unix.Mount(dir, point, "", unix.MS_BIND, ""); err != nil {
		return nil, &os.PathError{Op: "mount", Path: point, Err: err}
	}
	const readOnly = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", point, "", unix.MS_REMOUNT|unix.MS_BIND|readOnly, ""); err != nil {
		return nil, errors.Join(&os.PathError{Op: "mount read-only", Path: point, Err: err}, unmount())
	}
	return unmount, nil
}

// emptyCgroup returns an error if path is no cgroup, or one that has tasks or
// children.
func emptyCgroup(path string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s: something else is mounted there", path)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			return fmt.Errorf("%s: the cgroup is in use: it has children", path)
		}
	}
	events, err := os.ReadFile(path + "/cgroup.events")
	if err != nil {
		return err
	}
	if !strings.Contains("\n"+string(events), "\npopulated 0\n") {
		return fmt.Errorf("%s: the cgroup is in use: it has tasks", path)
	}
	return nil
}
