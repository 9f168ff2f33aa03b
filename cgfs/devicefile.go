package cgfs

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// deviceFiles are the files of v1's devices controller, which every cgroup of
// v2 but the root has too as far as this package's callers can tell, with their
// modes.
var deviceFiles = map[string]uint32{"devices.allow": 0o200, "devices.deny": 0o200, "devices.list": 0o444}

// emulates reports whether this package makes the file, and not the kernel.
func (h *Hierarchy) emulates(file string) bool {
	_, ok := deviceFiles[file]
	return ok && h.version == V2
}

// The rules live in the kernel alone: a cgroup that has rules of its own has
// them in the mark, and a program made of them attached. One without follows
// those of the nearest cgroup above that has some. So that nothing is ever
// allowed that the marks deny, whenever the daemon ends, what takes something
// away sets the program first, and what gives something sets the mark first.
//
// On v1 a new cgroup gets a copy of its parent's rules, and what the parent is
// given later is not given to it. That is made good when the parent is given
// something: its children get rules of their own just before.
const devicesMark = "devices"

// deviceFile opens one of deviceFiles. cgroup.freeze stands in for its owner:
// every cgroup but the root has it, and it is never delegated.
func (d *Dir) deviceFile(name string, what For) (*File, error) {
	a, err := d.deviceAttr(name)
	if err != nil {
		return nil, err
	}
	// As kernfs, which opens no file for what it cannot do, root or not.
	if what == ForRead && a.Mode&0o444 == 0 || what == ForWrite && a.Mode&0o222 == 0 {
		return nil, &os.PathError{Op: "open", Path: name, Err: unix.EINVAL}
	}
	own, err := d.Open("")
	if err != nil {
		return nil, err
	}
	return &File{name: name, fd: own.fd, attr: a, devices: own}, nil
}

func (d *Dir) deviceAttr(name string) (Attr, error) {
	if d.IsRoot() {
		return Attr{}, fmt.Errorf("%s: %w: the root of cgroup v2 has no device rules, the cgroups below it have", name, ErrUnsupported)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(d.fd, "cgroup.freeze", &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return Attr{}, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return Attr{UID: st.Uid, GID: st.Gid, Mode: unix.S_IFREG | deviceFiles[name], Ino: st.Ino}, nil
}

func (f *File) readDevices(limit int) ([]byte, error) {
	if f.name != "devices.list" {
		return nil, f.failed("read", unix.EINVAL)
	}
	list, err := f.devices.deviceList()
	if err == nil && len(list) > limit {
		err = ErrTooBig
	}
	if err != nil {
		return nil, f.failed("read", err)
	}
	return []byte(list), nil
}

func (f *File) writeDevices(value string) error {
	if f.name == "devices.list" {
		return f.failed("write", unix.EINVAL)
	}
	if value == "" {
		return nil // of a write of no bytes the controller never hears
	}
	return f.failed("write", f.devices.changeDevices(value, f.name == "devices.allow"))
}

func (f *File) failed(op string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: op, Path: f.name, Err: err}
}

// unchangeable refuses to give away a file that is not there.
func (f *File) unchangeable() error {
	return fmt.Errorf("%s: %w: on cgroup v2 it goes with cgroup.freeze", f.name, ErrUnsupported)
}

// deviceList reads devices.list.
func (d *Dir) deviceList() (string, error) {
	d.h.devices.Lock()
	defer d.h.devices.Unlock()
	parent, err := d.policyAbove(nil)
	if err != nil {
		return "", err
	}
	p, _, err := d.policy(parent)
	return p.list(), err
}

// changeDevices writes devices.allow (give) or devices.deny.
func (d *Dir) changeDevices(value string, give bool) error {
	d.h.devices.Lock()
	defer d.h.devices.Unlock()
	parent, err := d.policyAbove((*Dir).nests)
	if err != nil {
		return err
	}
	if err := d.nests(); err != nil {
		return err
	}
	now, own, err := d.policy(parent)
	if err != nil {
		return err
	}
	children := false
	if err := d.eachChild(func(*Dir) error { children = true; return nil }); err != nil {
		return err
	}
	next, taken, err := now.change(value, give, parent, children)
	if err != nil {
		return err
	}
	if len(next.exceptions) > maxDeviceRules {
		return fmt.Errorf("%w: more than %d device rules", ErrTooBig, maxDeviceRules)
	}
	same := next.equal(now)
	switch {
	case same && !own:
		// It needs no rules of its own.
	case give && !same:
		if err := d.settle(now, own); err != nil {
			return err
		}
		err = d.setPolicy(next, true)
	default:
		err = d.setPolicy(next, false)
	}
	if err != nil || taken == nil {
		return err
	}
	count := 0
	err = d.takeBelow(*taken, next, next, 0, &count)
	if errors.Is(err, ErrTooBig) {
		// d's program binds them all. A tree that somebody grew beyond the
		// bounds must not stand in the way.
		return nil
	}
	return err
}

// settle gives rules of their own to d and to all its children that have none:
// those that they go by.
func (d *Dir) settle(now devicePolicy, own bool) error {
	prog, err := now.load()
	if err != nil {
		return err
	}
	defer func() { _ = prog.Close() }()
	one := func(c *Dir) error {
		if err := c.attachDevices(prog); err != nil {
			return err
		}
		return c.setMark(devicesMark, now.encode())
	}
	if !own {
		if err := one(d); err != nil {
			return err
		}
	}
	return d.eachChild(func(c *Dir) error {
		if _, own, err := c.policy(now); own || err != nil {
			return err
		}
		return one(c)
	})
}

// setPolicy gives d rules of its own, which allow more than those before or
// less.
func (d *Dir) setPolicy(p devicePolicy, more bool) error {
	prog, err := p.load()
	if err != nil {
		return err
	}
	defer func() { _ = prog.Close() }()
	if more {
		if err := d.setMark(devicesMark, p.encode()); err != nil {
			return err
		}
		return d.attachDevices(prog)
	}
	if err := d.attachDevices(prog); err != nil {
		return err
	}
	return d.setMark(devicesMark, p.encode())
}

// takeBelow takes e from every cgroup below d that has rules of its own. top
// are the rules of the cgroup that it was taken from, parent those of d.
func (d *Dir) takeBelow(e deviceException, top, parent devicePolicy, depth int, count *int) error {
	return d.eachChild(func(c *Dir) error {
		if *count++; depth >= maxWalkDepth || *count > maxWalkCount {
			return fmt.Errorf("walk: %w: too many cgroups or levels", ErrTooBig)
		}
		now, own, err := c.policy(parent)
		if err != nil {
			return err
		}
		next := parent
		if own {
			if next = now.lose(e, top, parent); !next.equal(now) {
				if err := c.setPolicy(next, false); err != nil {
					return err
				}
			}
		}
		return c.takeBelow(e, top, next, depth+1, count)
	})
}

// eachChild calls f for each child of d but a hidden leaf, which is a part of
// d, and passes over those that vanish meanwhile.
func (d *Dir) eachChild(f func(*Dir) error) error {
	return d.EachChild(func(c *Dir, _ string) error {
		leaf, err := c.IsLeaf()
		if err == nil && !leaf {
			err = f(c)
		}
		return gone(err)
	})
}

// policyAbove returns the rules that bind d's parent. before, if it is not nil,
// is asked about each cgroup above d first. It returns an error wrapping ENODEV
// if d was removed.
func (d *Dir) policyAbove(before func(*Dir) error) (devicePolicy, error) {
	p := devicePolicy{allow: true}
	at, err := d.h.Open("/")
	if err != nil {
		return p, err
	}
	defer func() { _ = at.Close() }()
	for name := range strings.SplitSeq(strings.TrimPrefix(d.path, "/"), "/") {
		if before != nil {
			if err := before(at); err != nil {
				return p, err
			}
		}
		if p, _, err = at.policy(p); err != nil {
			return p, err
		}
		next, err := at.Open(name)
		if err != nil {
			return p, err
		}
		_ = at.Close()
		at = next
	}
	// No cgroup of v2 is ever renamed; but d could be gone and another one have
	// its name.
	there, err := at.Attr()
	if err != nil {
		return p, err
	}
	here, err := d.Attr()
	if err == nil && here.Ino != there.Ino {
		err = unix.ENODEV
	}
	return p, err
}

// policy returns d's own rules, or parent if it has none.
func (d *Dir) policy(parent devicePolicy) (p devicePolicy, own bool, err error) {
	s, own, err := d.mark(devicesMark, maxDevicesMark)
	if err != nil || !own {
		return parent, false, err
	}
	if p, err = decodeDevicePolicy(s); err != nil {
		err = &os.PathError{Op: "read mark " + devicesMark, Path: d.path, Err: err}
	}
	return p, true, err
}

// maxDevicesMark is more than maxDeviceRules rules take:
// "c 4294967294:4294967294 rwm" has 28 bytes with its end.
const maxDevicesMark = 16 << 10
