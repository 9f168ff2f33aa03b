package limits

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"cgmanager/manager/identity"
	"cgmanager/manager/rt/state"
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

func newFile(dir string) (file, error) {
	boot, err := identity.BootID()
	return file{path: filepath.Join(dir, "limits"), boot: boot}, err
}

// read returns the entries that an earlier daemon noted.
func (f file) read() ([]*entry, error) {
	b, err := state.Read(f.path, maxFile)
	if b == nil || err != nil {
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

// write puts a new file in the place of the old one, or removes it if there is
// nothing to note.
func (f file) write(entries []*entry) error {
	if len(entries) == 0 {
		return state.Remove(f.path)
	}
	b, err := json.Marshal(content{Boot: f.boot, Entries: entries})
	if err != nil {
		return err
	}
	next, err := state.Replace(f.path, b)
	if err != nil {
		return err
	}
	return next.Close()
}
