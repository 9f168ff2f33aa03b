package cgfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A freezer is a controller of its own on v1 (cgroup-v1/freezer-subsystem.rst),
// and part of every cgroup but the root on v2 (cgroup-v2.rst, cgroup.freeze).
type freezer struct {
	file, freeze, thaw string
	// self tells what was asked of the cgroup itself, its ancestors aside.
	self string
	// settled reports whether every task in the cgroup and below has stopped.
	settled func(*Dir) (bool, error)
}

var (
	freezer1 = freezer{
		file: "freezer.state", freeze: "FROZEN", thaw: "THAWED",
		self: "freezer.self_freezing",
		settled: func(d *Dir) (bool, error) {
			w, err := d.words("freezer.state")
			return err == nil && len(w) == 1 && w[0] == "FROZEN", err
		},
	}
	freezer2 = freezer{
		file: "cgroup.freeze", freeze: "1", thaw: "0",
		self: "cgroup.freeze",
		settled: func(d *Dir) (bool, error) {
			v, err := d.event("cgroup.events", "frozen")
			return v == "1", err
		},
	}
)

func (d *Dir) freezer() (freezer, error) {
	switch {
	case d.IsRoot():
	case d.h.version == V2:
		return freezer2, nil
	case d.h.Has("freezer"):
		return freezer1, nil
	}
	return freezer{}, fmt.Errorf("freeze: %w", ErrUnsupported)
}

// CanFreeze reports whether the cgroup can be frozen: on v1 only in the
// freezer's hierarchy, and nowhere the root.
func (d *Dir) CanFreeze() bool {
	_, err := d.freezer()
	return err == nil
}

// Frozen reports whether somebody asked for the cgroup itself to be frozen;
// whether an ancestor is does not count.
func (d *Dir) Frozen() (bool, error) {
	f, err := d.freezer()
	if err != nil {
		return false, err
	}
	w, err := d.words(f.self)
	return err == nil && len(w) == 1 && w[0] == "1", err
}

// Freeze stops every task in the cgroup and below, and waits until all have
// stopped. At ctx's end it returns ctx's error and leaves the cgroup freezing:
// whether to thaw it is for the caller to say, who knows if it was frozen
// before.
func (d *Dir) Freeze(ctx context.Context) error {
	f, err := d.freezer()
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	for wait := 50 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		// On v1 a task that is forked or moved in while the cgroup is
		// freezing can be missed; asking again reaches it.
		if err := d.write(f.file, f.freeze); err != nil {
			return err
		}
		if done, err := f.settled(d); done || err != nil {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("freeze: %w", ctx.Err())
		case <-timer.C:
		}
	}
}

// Thaw lets the tasks go on, unless an ancestor is frozen.
func (d *Dir) Thaw() error {
	f, err := d.freezer()
	if err != nil {
		return err
	}
	return d.write(f.file, f.thaw)
}

// hold freezes d, a cgroup of v2 that is not frozen, for a moment. There is but
// one bit for all who freeze a cgroup, and no count: release thaws d only if
// nobody else has written the file since, so that what somebody else froze
// meanwhile stays so. If not all tasks have stopped at ctx's end, they stop later.
func (d *Dir) hold(ctx context.Context) (release func() error, err error) {
	w, err := d.watchWrites(freezer2.file)
	if err != nil {
		return nil, err
	}
	release = func() error {
		defer w.Close()
		if others, err := w.written(); err != nil || others {
			return err
		}
		return d.Thaw()
	}
	if err = d.write(freezer2.file, freezer2.freeze); err == nil {
		_, err = w.written() // it was us
	}
	for wait := 50 * time.Microsecond; err == nil; wait = min(2*wait, 10*time.Millisecond) {
		var done bool
		if done, err = freezer2.settled(d); done || ctx.Err() != nil {
			break
		}
		time.Sleep(wait)
	}
	if err != nil {
		return nil, errors.Join(err, gone(release()))
	}
	return release, nil
}

// writesWatch tells of writes to a control file, whoever makes them and through
// whichever mount (inotify(7)).
type writesWatch struct{ fd int }

func (d *Dir) watchWrites(file string) (*writesWatch, error) {
	f, err := d.File(file, ForFacts)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	// The link leads to the file that is open.
	if _, err := unix.InotifyAddWatch(fd, "/proc/self/fd/"+strconv.Itoa(f.Fd()), unix.IN_MODIFY); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("inotify_add_watch", err)
	}
	return &writesWatch{fd}, nil
}

// written reports whether the file was written since it was last asked.
func (w *writesWatch) written() (bool, error) {
	var events [4096]byte
	some := false
	for {
		switch _, err := unix.Read(w.fd, events[:]); err {
		case nil:
			some = true
		case unix.EINTR:
		case unix.EAGAIN:
			return some, nil
		default:
			return some, os.NewSyscallError("read", err)
		}
	}
}

func (w *writesWatch) Close() { _ = unix.Close(w.fd) }
