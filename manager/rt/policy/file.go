package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// MaxFile is how large a file may be, in bytes.
const MaxFile = 64 << 10

// Load reads a file. An error names the file, and where its text is wrong an *Error
// the line and column. A file that does not exist is an empty Table. One that
// somebody else than root can write is not read: it would give away the machine.
func Load(path string) (*Table, error) {
	// A FIFO is not waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0) //nolint:forbidigo // The administrator's own path.
	if errors.Is(err, fs.ErrNotExist) {
		return &Table{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the realtime policy: %w", err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("read the realtime policy: %w", &os.PathError{Op: "fstat", Path: path, Err: err})
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("the realtime policy %s is no regular file", path)
	case st.Uid != 0:
		return nil, fmt.Errorf("the realtime policy %s belongs to uid %d: it has to be root's (chown root %[1]s)", path, st.Uid)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("the realtime policy %s can be written by others than root, mode %04o (chmod go-w %[1]s)", path, st.Mode&0o7777)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read the realtime policy: %w", err)
	}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("the realtime policy %s has more than %d bytes", path, MaxFile)
	}
	return parse(path, data, names{user: userID, group: groupID})
}

func userID(name string) (uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, err
	}
	return parseID(u.Uid)
}

func groupID(name string) (uint32, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return parseID(g.Gid)
}

func parseID(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	return uint32(id), err
}

// File is a policy file and what it said when it was read last.
type File struct {
	path  string
	table atomic.Pointer[Table]
}

// Open reads a file as Load does.
func Open(path string) (*File, error) {
	f := &File{path: path}
	if err := f.Reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// Reload reads the file again. Where that fails, what it said before is kept.
func (f *File) Reload() error {
	t, err := Load(f.path)
	if err == nil {
		f.table.Store(t)
	}
	return err
}

// Current returns what the file says.
func (f *File) Current() *Table { return f.table.Load() }
