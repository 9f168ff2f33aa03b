package cgfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Bounds of a walk. Somebody else may have made the tree.
const (
	maxWalkDepth = 128 // each level holds a descriptor
	maxWalkCount = 1 << 17
)

// Walk calls f for every cgroup below d and then for d itself, children before
// their parents. It holds handles, so that f always gets what was found there,
// and passes over cgroups that vanish meanwhile. f must not close what it gets.
// It ends at f's first error, or with an error wrapping ErrTooBig at a tree
// that is too deep or too large.
func (d *Dir) Walk(f func(*Dir) error) error {
	w := walker{f: f}
	return w.walk(d, 0)
}

// Survey is Walk for whoever can do without what somebody has made too deep: it
// passes over that. Nobody's tree then keeps the others' from being seen.
func (d *Dir) Survey(f func(*Dir) error) error {
	w := walker{f: f, passOver: true}
	return w.walk(d, 0)
}

// RemoveTree removes the child called name with everything below. before, if
// it is not nil, is called for each cgroup just before it goes. The kernel
// refuses with EBUSY where there are tasks left; what went before is gone.
func (d *Dir) RemoveTree(name string, before func(*Dir) error) error {
	if before == nil {
		// What has nothing below goes at once.
		if err := d.Rmdir(name); err == nil || !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	top, err := d.Open(name)
	if err != nil {
		return err
	}
	defer top.Close()
	if before == nil {
		before = func(*Dir) error { return nil }
	}
	w := walker{f: before, after: (*Dir).Rmdir}
	if err := w.walk(top, 0); err != nil {
		return err
	}
	return d.Rmdir(name)
}

// walker is a walk under way.
type walker struct {
	f func(*Dir) error
	// after, if it is not nil, is called for each child once it has been walked.
	after func(parent *Dir, name string) error
	// passOver: what is too deep is no error.
	passOver bool
	count    int
}

func (w *walker) walk(d *Dir, depth int) error {
	if depth > maxWalkDepth && w.passOver {
		return nil
	}
	if w.count++; depth > maxWalkDepth || w.count > maxWalkCount {
		return fmt.Errorf("walk: %w: too many cgroups or levels", ErrTooBig)
	}
	if err := d.EachChild(func(c *Dir, name string) error {
		err := w.walk(c, depth+1)
		_ = c.Close()
		if err == nil && w.after != nil {
			err = gone(w.after(d, name))
		}
		return err
	}); err != nil {
		return err
	}
	return w.f(d)
}

// EachChild calls f for each child of d, hidden leaf or not and whatever its name,
// and passes over those that are gone before they are opened. f may close the
// child, and must not keep it. It ends at f's first error.
func (d *Dir) EachChild(f func(c *Dir, name string) error) error {
	names, err := d.directories()
	if err != nil {
		return gone(err)
	}
	for _, name := range names {
		c, err := d.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = f(c, name)
		_ = c.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// NumChildren returns how many children there are, hidden leaf or not. It costs the
// same however many they are.
func (d *Dir) NumChildren() (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: d.path, Err: err}
	}
	return max(int(st.Nlink)-2, 0), nil // kernfs counts directories into the links
}

// directories returns the names of the children. That there are none costs a fraction
// of listing its files.
func (d *Dir) directories() ([]string, error) {
	if n, err := d.NumChildren(); err != nil || n == 0 {
		return nil, err
	}
	return d.entries(unix.DT_DIR)
}

// Kill kills every task in the cgroup and below, those that fork meanwhile
// included (cgroup-v2.rst, cgroup.kill, since Linux 5.14). It returns an error
// wrapping ErrUnsupported where there is no such file, and the kernel's for a
// threaded cgroup.
func (d *Dir) Kill() error {
	err := d.write("cgroup.kill", "1")
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill: %w", ErrUnsupported)
	}
	return err
}
