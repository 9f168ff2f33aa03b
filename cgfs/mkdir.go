package cgfs

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Mkdir makes one child, which belongs to uid and gid with all its files, and
// opens it. That it exists already is an error (EEXIST). A new v1 cpuset gets
// its parent's cpus and mems, without which no task could enter it.
func (d *Dir) Mkdir(name string, uid, gid uint32) (*Dir, error) {
	if err := checkFile(name); err != nil {
		return nil, err
	}
	if d.h.version == V2 && d.h.reserved(name) {
		return nil, fmt.Errorf("%w %q: it could be a control file's", ErrName, name)
	}
	// The kernel gives a new cgroup's directory and files to the fsuid and
	// fsgid of whoever makes it.
	if err := asOwner(uid, gid, func() error { return unix.Mkdirat(d.fd, name, 0o755) }); err != nil {
		return nil, &os.PathError{Op: "mkdir", Path: name, Err: err}
	}
	c, err := d.Open(name)
	if err != nil {
		return nil, err
	}
	// Who may write the parent can have put another directory in this place
	// by now. One of its own is all the same; anybody else's is not ours.
	a, err := c.Attr()
	if err == nil && (a.UID != uid || a.GID != gid) {
		err = &os.PathError{Op: "mkdir", Path: name, Err: unix.ESTALE}
	}
	if err == nil && d.h.version == V1 && d.h.Has("cpuset") {
		if err = c.inheritCpuset(d); err != nil {
			err = errors.Join(err, d.Rmdir(name))
		}
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// reserved reports whether a control file could have this name, now or once
// its controller is enabled. The kernel would then fail to enable it for the
// directory's whole generation (cgroup-v2.rst: "naming collisions").
func (h *Hierarchy) reserved(name string) bool {
	prefix, _, dotted := strings.Cut(name, ".")
	return dotted && (prefix == "cgroup" || slices.Contains(h.controllers, prefix))
}

// inheritCpuset copies the parent's cpus and mems. cgroup.clone_children would
// do the same for everybody else's children too.
func (d *Dir) inheritCpuset(parent *Dir) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		theirs, err := parent.words(file)
		if err != nil {
			return err
		}
		if len(theirs) == 0 {
			continue // the parent was never set up, and takes no tasks either
		}
		if err := d.write(file, theirs[0]); err != nil {
			return err
		}
	}
	return nil
}

// asOwner calls f on a thread with the file system ids uid and gid and with
// the capabilities that this process has.
func asOwner(uid, gid uint32, f func() error) error {
	if uid == 0 && gid == 0 {
		return f()
	}
	if uid == NoID || gid == NoID {
		return unix.EINVAL
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		clean, err := withFSIDs(uid, gid, f)
		// A thread whose credentials are not what they were is never used
		// again: it ends with the goroutine that is locked to it.
		if clean {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// NoID leaves an id as it is (chown(2)), and is nobody's.
const NoID = ^uint32(0)

// secbitNoSetuidFixup is SECBIT_NO_SETUID_FIXUP of linux/securebits.h.
const secbitNoSetuidFixup = 1 << 2

// withFSIDs is asOwner on the calling thread. It reports whether the thread
// has its own credentials back.
func withFSIDs(uid, gid uint32, f func() error) (clean bool, err error) {
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err != nil {
		return true, os.NewSyscallError("prctl", err)
	}
	// Without this bit a change of the fsuid takes CAP_DAC_OVERRIDE and its
	// like along (capabilities(7)), and who acts for a container's root below
	// somebody else's directory needs them.
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits|secbitNoSetuidFixup), 0, 0, 0); err != nil {
		return true, os.NewSyscallError("prctl", err)
	}
	err = setFSIDs(uid, gid)
	if err == nil {
		err = f()
	}
	if e := setFSIDs(0, 0); e != nil {
		return false, errors.Join(err, e)
	}
	if e := unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits), 0, 0, 0); e != nil {
		return false, errors.Join(err, os.NewSyscallError("prctl", e))
	}
	return true, err
}

// setFSIDs sets the calling thread's file system ids. The calls report no
// failure but by the id that is still in force (setfsuid(2)).
func setFSIDs(uid, gid uint32) error {
	const query = -1
	_, _ = unix.SetfsgidRetGid(int(gid))
	_, _ = unix.SetfsuidRetUid(int(uid))
	if g, err := unix.SetfsgidRetGid(query); err != nil || uint32(g) != gid {
		return os.NewSyscallError("setfsgid", unix.EPERM)
	}
	if u, err := unix.SetfsuidRetUid(query); err != nil || uint32(u) != uid {
		return os.NewSyscallError("setfsuid", unix.EPERM)
	}
	return nil
}
