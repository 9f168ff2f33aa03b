package cgfs

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// For says what a File handle is wanted for.
type For int

// The purposes: facts and ownership alone (O_PATH), reading, writing.
const (
	ForFacts For = iota
	ForRead
	ForWrite
)

// File is a handle on a control file: what is read, written or given away is
// the file that was looked at.
type File struct {
	name string
	fd   int
	attr Attr
	// devices is the cgroup of one of deviceFiles on v2, nil for a file of the
	// kernel's own. fd is its directory then.
	devices *Dir
}

// File opens a control file of d, never creating one: for facts, and for the
// act that may follow on the same handle. name is one component.
func (d *Dir) File(name string, what For) (*File, error) {
	if err := checkFile(name); err != nil {
		return nil, err
	}
	if d.h.emulates(name) {
		return d.deviceFile(name, what)
	}
	flags := unix.O_PATH
	switch what {
	case ForFacts:
	case ForRead:
		flags = unix.O_RDONLY
	case ForWrite:
		flags = unix.O_WRONLY
	}
	fd, err := openBeneath(d.fd, name, flags)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := &File{name: name, fd: fd}
	if f.attr, err = fstat(fd); err == nil && f.attr.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.ENOENT // a child cgroup is no control file
	}
	if err != nil {
		_ = f.Close()
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return f, nil
}

// Name returns the file's name.
func (f *File) Name() string { return f.name }

// Attr returns the owner and mode that the file had when it was opened.
func (f *File) Attr() (Attr, error) { return f.attr, nil }

func (f *File) pread(b []byte, off int64) (n int, err error) {
	for range maxAgain {
		if n, err = unix.Pread(f.fd, b, off); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, &os.PathError{Op: "read", Path: f.name, Err: err}
	}
	return n, nil
}

// maxNumber is more than a line of a list of tasks is long.
const maxNumber = 16

// Read returns the whole content. Beyond limit bytes it returns an error
// wrapping ErrTooBig.
func (f *File) Read(limit int) ([]byte, error) {
	if f.devices != nil {
		return f.readDevices(limit)
	}
	var page [4096]byte // most files fit: the kernel shows them in one go
	n, err := f.pread(page[:], 0)
	content := append([]byte(nil), page[:n]...)
	// A control file is one record, or a list of numbers, of which one more
	// would have fitted into the room that is left.
	for n > len(page)-maxNumber && err == nil && len(content) <= limit {
		n, err = f.pread(page[:], int64(len(content)))
		content = append(content, page[:n]...)
	}
	if err != nil {
		return nil, err
	}
	if len(content) > limit {
		return nil, fmt.Errorf("read %s: %w", f.name, ErrTooBig)
	}
	return content, nil
}

// maxValue is the most that the kernel takes in one write to a control file,
// with its final zero byte (kernfs_fop_write_iter): it drops what is beyond.
const maxValue = 4095

// Write writes value with one write(2). A value with a zero byte in it, where
// the kernel would stop reading, is refused with ErrValue.
func (f *File) Write(value string) error {
	if len(value) > maxValue {
		return fmt.Errorf("write %s: %w", f.name, ErrTooBig)
	}
	if strings.IndexByte(value, 0) >= 0 {
		return fmt.Errorf("write %s: %w: a zero byte in it", f.name, ErrValue)
	}
	if f.devices != nil {
		return f.writeDevices(value)
	}
	var n int
	var err error
	for range maxAgain {
		if n, err = unix.Write(f.fd, []byte(value)); err != unix.EINTR {
			break
		}
	}
	if err == nil && n != len(value) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: f.name, Err: err}
	}
	return nil
}

// SetOwner changes the owner; NoID leaves an id as it is.
func (f *File) SetOwner(uid, gid uint32) error {
	if f.devices != nil {
		return f.unchangeable()
	}
	if err := unix.Fchownat(f.fd, "", int(int32(uid)), int(int32(gid)), unix.AT_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "chown", Path: f.name, Err: err}
	}
	return nil
}

// SetMode changes the permission bits.
func (f *File) SetMode(mode uint32) error {
	if f.devices != nil {
		return f.unchangeable()
	}
	mode &= 0o7777
	err := unix.Fchmodat(f.fd, "", mode, unix.AT_EMPTY_PATH)
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
		// Before Linux 6.6 there is no fchmodat2, and fchmod refuses an
		// O_PATH descriptor. The link leads to the file that is open.
		err = unix.Chmod("/proc/self/fd/"+strconv.Itoa(f.fd), mode)
	}
	if err != nil {
		return &os.PathError{Op: "chmod", Path: f.name, Err: err}
	}
	return nil
}

// Fd returns the descriptor, for poll(2). It stays f's.
func (f *File) Fd() int { return f.fd }

// Close lets go of the handle. A second Close does nothing.
func (f *File) Close() error {
	if f.fd < 0 {
		return nil
	}
	err := unix.Close(f.fd)
	f.fd = -1
	return err
}
