package rt

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"cgmanager/manager/identity"
)

// journal is the file in which grants are noted, for a daemon that comes after one
// that was killed, or takes its place: a line for each grant, and one for each end.
// Lines are written before what they are about is done. A line is written in one
// go; one that could not be written whole is left for what it is.
type journal struct {
	path  string
	f     *os.File
	lines int
	torn  bool // the last line has no end
}

// entry is a line. The first names the host's boot, and nothing else.
type entry struct {
	Boot  string `json:",omitempty"`
	Grant *Grant `json:",omitempty"`
	Ended uint64 `json:",omitempty"`
}

const (
	// maxJournal bounds what is read of a journal, in bytes.
	maxJournal = 64 << 20
	// slack is how many lines there may be that say nothing any more.
	slack = 4096
)

// readJournal returns the grants that a journal of this boot notes. What is
// malformed is left out: their threads are looked at anyway.
func readJournal(path string) ([]Grant, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0) //nolint:forbidigo // In a directory of root's own.
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || !st.Mode().IsRegular() || sys.Uid != 0 || st.Size() > maxJournal {
		return nil, fmt.Errorf("%s: not a file of the daemon's", path)
	}
	boot, err := identity.BootID()
	if err != nil {
		return nil, err
	}
	var order []uint64
	grants := map[uint64]Grant{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for first := true; lines.Scan(); first = false {
		var e entry
		err := json.Unmarshal(lines.Bytes(), &e)
		switch {
		case first && (err != nil || e.Boot != boot):
			return nil, nil
		case err != nil:
		case e.Grant != nil:
			grants[e.Grant.ID] = *e.Grant
			order = append(order, e.Grant.ID)
		case e.Ended != 0:
			delete(grants, e.Ended)
		}
	}
	var all []Grant
	for _, id := range order {
		if g, ok := grants[id]; ok {
			all = append(all, g)
			delete(grants, id)
		}
	}
	return all, lines.Err()
}

// writeJournal begins a journal with the grants that there are, in place of
// another. The file at path is the old one or the new, whatever happens.
func writeJournal(path string, grants []Grant) (_ *journal, err error) {
	boot, err := identity.BootID()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil { //nolint:forbidigo // The daemon's own.
		return nil, err
	}
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND|syscall.O_NOFOLLOW, 0o600) //nolint:forbidigo // In a directory of root's own.
	if err != nil {
		return nil, err
	}
	j := &journal{path: path, f: f}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(next) //nolint:forbidigo // As above.
		}
	}()
	var all bytes.Buffer
	lines := json.NewEncoder(&all)
	if err := lines.Encode(entry{Boot: boot}); err != nil {
		return nil, err
	}
	for i := range grants {
		if err := lines.Encode(entry{Grant: &grants[i]}); err != nil {
			return nil, err
		}
	}
	if _, err := f.Write(all.Bytes()); err != nil {
		return nil, err
	}
	j.lines = len(grants)
	return j, os.Rename(next, path) //nolint:forbidigo // As above.
}

func (j *journal) begun(g *Grant) error { return j.write(entry{Grant: g}) }

func (j *journal) ended(id uint64) error { return j.write(entry{Ended: id}) }

func (j *journal) write(e entry) error {
	if j == nil {
		return nil // it will be begun with all that there is
	}
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	j.lines++
	b = append(b, '\n')
	if j.torn {
		b = append([]byte{'\n'}, b...)
	}
	_, err = j.f.Write(b)
	j.torn = err != nil
	return err
}

// close ends the journal, and removes it unless the next daemon is to read it.
func (j *journal) close(leave bool) error {
	err := j.f.Close()
	if !leave {
		err = errors.Join(err, os.Remove(j.path)) //nolint:forbidigo // As above.
	}
	return err
}
