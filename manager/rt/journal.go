package rt

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"

	"cgmanager/manager/identity"
	"cgmanager/manager/rt/state"
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
	text, err := state.Read(path, maxJournal)
	if err != nil {
		return nil, err
	}
	boot, err := identity.BootID()
	if err != nil {
		return nil, err
	}
	var order []uint64
	grants := map[uint64]Grant{}
	first := true
	for line := range bytes.Lines(text) {
		var e entry
		err := json.Unmarshal(line, &e)
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
		first = false
	}
	var all []Grant
	for _, id := range order {
		if g, ok := grants[id]; ok {
			all = append(all, g)
			delete(grants, id)
		}
	}
	return all, nil
}

// writeJournal begins a journal with the grants that there are, in place of
// another. The file at path is the old one or the new, whatever happens.
func writeJournal(path string, grants []Grant) (*journal, error) {
	boot, err := identity.BootID()
	if err != nil {
		return nil, err
	}
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
	f, err := state.Replace(path, all.Bytes())
	if err != nil {
		return nil, err
	}
	return &journal{path: path, f: f, lines: len(grants)}, nil
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
		err = errors.Join(err, state.Remove(j.path))
	}
	return err
}
