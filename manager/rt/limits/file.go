package limits

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"cgmanager/manager/identity"
)

// file is where entries are noted, whole each time: there are few.
type file struct {
	path string
	// boot is the host's boot: entries of another one mean nothing.
	boot string
}

// content is a file's.
type content struct {
	Boot    string
	Entries []*entry
}

// maxFile bounds what is read of a file, in bytes.
const maxFile = 16 << 20

func newFile(state string) (file, error) {
	boot, err := identity.BootID()
	return file{path: filepath.Join(state, "limits"), boot: boot}, err
}

// read returns the entries that an earlier daemon noted.
func (f file) read() ([]*entry, error) {
	r, err := os.OpenFile(f.path, os.O_RDONLY|unix.O_NOFOLLOW, 0) //nolint:forbidigo // In a directory of root's own.
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxFile))
	if err != nil {
		return nil, err
	}
	var c content
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("%s: %w", f.path, err)
	}
	if c.Boot != f.boot {
		return nil, nil
	}
	for _, e := range c.Entries {
		if e == nil || e.PID <= 0 || len(e.Old) != len(e.Given) {
			return nil, fmt.Errorf("%s: an entry makes no sense", f.path)
		}
	}
	return c.Entries, nil
}

// aside keeps a file that could not be read, for people, and makes room for a new one.
func (f file) aside() error { return os.Rename(f.path, f.path+".bad") } //nolint:forbidigo // As above.

// write puts a new file in the place of the old one, or removes it if there is
// nothing to note.
func (f file) write(entries []*entry) error {
	if len(entries) == 0 {
		err := os.Remove(f.path) //nolint:forbidigo // In a directory of root's own.
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	b, err := json.Marshal(content{Boot: f.boot, Entries: entries})
	if err != nil {
		return err
	}
	next := f.path + ".new"
	if err := os.WriteFile(next, b, 0o600); err != nil { //nolint:forbidigo // As above.
		return err
	}
	return os.Rename(next, f.path) //nolint:forbidigo // As above.
}
