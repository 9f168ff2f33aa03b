package cgfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxAgain bounds how often a system call is tried again that the kernel or a
// signal interrupted.
const maxAgain = 64

// openBeneath is the one way in which a path of more than the kernel's own
// making reaches the kernel: beneath dirfd, without symbolic links, magic
// links or mounts, and never creating anything (openat2(2)).
func openBeneath(dirfd int, rel string, flags int) (fd int, err error) {
	how := unix.OpenHow{
		Flags: uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS |
			unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for range maxAgain {
		// EAGAIN: something was renamed meanwhile, so that the kernel could
		// not tell whether the path stays beneath.
		fd, err = unix.Openat2(dirfd, rel, &how)
		if err != unix.EAGAIN && err != unix.EINTR {
			break
		}
	}
	return fd, err
}

// Attr is the owner, the mode (whole st_mode) and the inode number of a
// directory or file. The kernel gives no number to a second cgroup while it
// runs (kernfs ids, on 64-bit hosts).
type Attr struct {
	UID, GID, Mode uint32
	Ino            uint64
}

func fstat(fd int) (Attr, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Attr{}, err
	}
	return Attr{UID: st.Uid, GID: st.Gid, Mode: st.Mode, Ino: st.Ino}, nil
}

// Dir is a handle on a cgroup's directory. It stays with this very cgroup:
// once that is removed every method fails, even if another one has its name.
// Methods may be called from several goroutines, except for Close.
type Dir struct {
	h    *Hierarchy
	fd   int
	path string
}

func (h *Hierarchy) openDir(dirfd int, rel, path, arg string) (*Dir, error) {
	fd, err := openBeneath(dirfd, rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: arg, Err: err}
	}
	return &Dir{h: h, fd: fd, path: path}, nil
}

// Path returns the path from the hierarchy's root, as it was resolved. On v1
// a rename may have changed the last components since.
func (d *Dir) Path() string { return d.path }

// Hierarchy returns the hierarchy that the directory is in.
func (d *Dir) Hierarchy() *Hierarchy { return d.h }

// IsRoot reports whether this is the hierarchy's root, which has no limits.
func (d *Dir) IsRoot() bool { return d.path == "/" }

func (d *Dir) below(rel string) string {
	if d.path == "/" {
		return "/" + rel
	}
	return d.path + "/" + rel
}

// Open opens a directory below: "a", "a/b". "" is a second handle on d itself.
func (d *Dir) Open(rel string) (*Dir, error) {
	if rel == "" {
		return d.h.openDir(d.fd, ".", d.path, d.path)
	}
	if err := checkRelative(rel); err != nil {
		return nil, err
	}
	return d.h.openDir(d.fd, rel, d.below(rel), rel)
}

// Attr returns the owner and mode of the directory.
func (d *Dir) Attr() (Attr, error) {
	a, err := fstat(d.fd)
	if err != nil {
		err = &os.PathError{Op: "stat", Path: d.path, Err: err}
	}
	return a, err
}

// FileAttr returns the owner and mode of a control file of d without opening
// it, for facts that nothing is done with but to decide.
func (d *Dir) FileAttr(name string) (Attr, error) {
	if err := checkFile(name); err != nil {
		return Attr{}, err
	}
	if d.h.emulates(name) {
		return d.deviceAttr(name)
	}
	var st unix.Stat_t
	err := unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.ENOENT // a child cgroup is no control file
	}
	if err != nil {
		return Attr{}, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return Attr{UID: st.Uid, GID: st.Gid, Mode: st.Mode, Ino: st.Ino}, nil
}

// Close lets go of the handle. A second Close does nothing.
func (d *Dir) Close() error {
	if d.fd < 0 {
		return nil
	}
	err := unix.Close(d.fd)
	d.fd = -1
	return err
}

// Rmdir removes one child. The kernel refuses with EBUSY while there are
// tasks or children in it.
func (d *Dir) Rmdir(name string) error {
	if err := checkFile(name); err != nil {
		return err
	}
	// The last component of unlinkat follows nothing, and there is only one.
	if err := unix.Unlinkat(d.fd, name, unix.AT_REMOVEDIR); err != nil {
		return &os.PathError{Op: "rmdir", Path: name, Err: err}
	}
	return nil
}

// Children returns the names of the child cgroups, sorted. hidden counts those
// that cannot be told to anybody: not UTF-8, or with control characters. A
// hidden leaf is left out.
func (d *Dir) Children() (names []string, hidden int, err error) {
	all, err := d.directories()
	if err != nil {
		return nil, 0, err
	}
	if slices.Contains(all, leafName) {
		if leaf, err := d.Leaf(); err == nil {
			_ = leaf.Close()
			all = slices.DeleteFunc(all, LeafName)
		}
	}
	count := len(all)
	names = slices.DeleteFunc(all, func(n string) bool { return !presentable(n) })
	hidden = count - len(names)
	slices.Sort(names)
	return names, hidden, nil
}

// Files returns the names of the control files in the order of readdir(3), and
// then those that this package makes.
func (d *Dir) Files() ([]string, error) {
	names, err := d.entries(unix.DT_REG)
	if err == nil && d.h.version == V2 && !d.IsRoot() {
		names = append(names, slices.Sorted(maps.Keys(deviceFiles))...)
	}
	return names, err
}

// maxEntries bounds how many children one directory is listed with.
const maxEntries = 1 << 20

func (d *Dir) entries(want byte) (names []string, err error) {
	defer func() {
		if err != nil {
			err = &os.PathError{Op: "readdir", Path: d.path, Err: err}
		}
	}()
	// A descriptor of its own: the position in the directory is shared by all
	// that use one.
	fd, err := openBeneath(d.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var buf [8192]byte
	for len(names) <= maxEntries {
		n, err := unix.Getdents(fd, buf[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return names, nil
		}
		if names, err = appendDirents(names, buf[:n], want); err != nil {
			return nil, err
		}
	}
	return nil, ErrTooBig
}

// appendDirents appends the names of type want from a buffer of struct
// linux_dirent64 (getdents64(2)): ino 8, off 8, reclen 2, type 1, name.
func appendDirents(names []string, b []byte, want byte) ([]string, error) {
	for len(b) > 19 {
		reclen := int(binary.NativeEndian.Uint16(b[16:]))
		if reclen <= 19 || reclen > len(b) {
			break
		}
		typ, name := b[18], b[19:reclen]
		b = b[reclen:]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		if typ == want && string(name) != "." && string(name) != ".." {
			names = append(names, string(name))
		}
	}
	if len(b) != 0 {
		return nil, errors.New("malformed directory entry")
	}
	return names, nil
}

// Procs reads cgroup.procs: the processes in the cgroup, in the numbers of
// the daemon's pid namespace, 0 for each that cannot be seen there.
func (d *Dir) Procs() ([]int32, error) { return d.numbers("cgroup.procs") }

// Threads reads tasks (v2: cgroup.threads): the threads in the cgroup, as
// Procs.
func (d *Dir) Threads() ([]int32, error) {
	if d.h.version == V2 {
		return d.numbers("cgroup.threads")
	}
	return d.numbers("tasks")
}

// maxNumbers bounds a list of tasks: PID_MAX_LIMIT numbers of at most 7 digits
// and a newline.
const maxNumbers = 8 << 22

func (d *Dir) numbers(file string) ([]int32, error) {
	b, err := d.read(file, maxNumbers)
	if err != nil {
		return nil, err
	}
	pids := make([]int32, 0, len(b)/4+1)
	for line := range bytes.FieldsSeq(b) {
		n, err := strconv.ParseInt(string(line), 10, 32)
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: file, Err: err}
		}
		pids = append(pids, int32(n))
	}
	return pids, nil
}

// read reads a control file of d.
func (d *Dir) read(file string, limit int) ([]byte, error) {
	f, err := d.File(file, ForRead)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Read(limit)
}

// write writes a control file of d.
func (d *Dir) write(file, value string) error {
	f, err := d.File(file, ForWrite)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Write(value)
}

// words reads a file of words.
func (d *Dir) words(file string) ([]string, error) {
	b, err := d.read(file, 4096)
	return strings.Fields(string(b)), err
}

// event reads a key of a flat keyed file: cgroup.events.
func (d *Dir) event(file, key string) (string, error) {
	b, err := d.read(file, 4096)
	if err != nil {
		return "", err
	}
	v, ok := flatKeyed(string(b), key)
	if !ok {
		return "", &os.PathError{Op: "read", Path: file, Err: errors.New("no " + key + " in it")}
	}
	return v, nil
}

// flatKeyed finds a key in a file of "KEY VALUE" lines.
func flatKeyed(content, key string) (string, bool) {
	for line := range strings.Lines(content) {
		if k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " "); k == key {
			return v, true
		}
	}
	return "", false
}

// Populated reports whether a task is in the cgroup or below. v2 says so
// itself, but for the root, which is; on v1 all below is looked at.
func (d *Dir) Populated() (bool, error) {
	if d.h.version == V2 {
		if d.IsRoot() {
			return true, nil
		}
		v, err := d.event("cgroup.events", "populated")
		return v == "1", err
	}
	errFound := errors.New("found")
	err := d.Walk(func(c *Dir) error {
		f, err := c.File("cgroup.procs", ForRead)
		if err != nil {
			return gone(err)
		}
		defer f.Close()
		var one [1]byte
		n, err := f.pread(one[:], 0)
		if n > 0 {
			return errFound
		}
		return gone(err)
	})
	if errors.Is(err, errFound) {
		return true, nil
	}
	return false, err
}

// gone drops the errors of a cgroup that was removed meanwhile.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Available returns the v2 controllers that d may enable for its children, and
// on v1 those of the hierarchy.
func (d *Dir) Available() ([]string, error) {
	if d.h.version == V1 {
		return d.h.controllers, nil
	}
	return d.words("cgroup.controllers")
}

// markPrefix starts the names of our extended attributes. trusted.* is for
// CAP_SYS_ADMIN in the first user namespace alone (xattr(7)): no container can
// set or even see one.
const markPrefix = "trusted.cgmanager."

// maxMark bounds the marks of other packages, in bytes.
const maxMark = 256

// Mark reads the mark called name; it reports false if there is none.
func (d *Dir) Mark(name string) (string, bool, error) { return d.mark(name, maxMark) }

func (d *Dir) mark(name string, limit int) (string, bool, error) {
	var small [maxMark]byte
	buf := small[:]
	n, err := unix.Fgetxattr(d.fd, markPrefix+name, buf)
	if err == unix.ERANGE && limit > len(buf) {
		buf = make([]byte, limit)
		n, err = unix.Fgetxattr(d.fd, markPrefix+name, buf)
	}
	switch {
	case err == unix.ENODATA:
		return "", false, nil
	case err != nil:
		return "", false, &os.PathError{Op: "read mark " + name, Path: d.path, Err: err}
	}
	return string(buf[:n]), true, nil
}

// SetMark sets the mark called name, at most 256 bytes.
func (d *Dir) SetMark(name, value string) error {
	if len(value) > maxMark {
		return fmt.Errorf("mark %s: %w", name, ErrTooBig)
	}
	return d.setMark(name, value)
}

func (d *Dir) setMark(name, value string) error {
	if err := unix.Fsetxattr(d.fd, markPrefix+name, []byte(value), 0); err != nil {
		return &os.PathError{Op: "set mark " + name, Path: d.path, Err: err}
	}
	return nil
}

// ClearMark removes the mark called name, if there is one.
func (d *Dir) ClearMark(name string) error {
	if err := unix.Fremovexattr(d.fd, markPrefix+name); err != nil && err != unix.ENODATA {
		return &os.PathError{Op: "clear mark " + name, Path: d.path, Err: err}
	}
	return nil
}

// SetOwner changes the owner of the directory alone; NoID leaves one as
// it is.
func (d *Dir) SetOwner(uid, gid uint32) error {
	// int(int32) makes the -1 of chown(2) out of ^uint32(0).
	if err := unix.Fchown(d.fd, int(int32(uid)), int(int32(gid))); err != nil {
		return &os.PathError{Op: "chown", Path: d.path, Err: err}
	}
	return nil
}

// SetMode changes the permission bits of the directory alone.
func (d *Dir) SetMode(mode uint32) error {
	if err := unix.Fchmod(d.fd, mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: d.path, Err: err}
	}
	return nil
}
