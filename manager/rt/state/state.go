// Package state keeps the files in which a daemon notes what the next one must know
// of realtime, in a directory of its own. What they say, and what becomes of one that
// makes no sense, is their owners' (docs/ARCHITECTURE.md, "State, and another daemon").
package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Read returns what a file holds, or nil if there is none. One that is not the
// daemon's own regular file, is a link, or has more than most bytes is not read.
func Read(path string, most int64) ([]byte, error) {
	// A FIFO is not waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) //nolint:forbidigo // In a directory of root's own.
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("read %s: not a file of the daemon's", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("read %s: more than %d bytes", path, most)
	}
	return b, err
}

// Replace puts a file with this content in the place of the one at path, which is the
// old one or the new one whatever happens. It returns the new one, to append to.
func Replace(path string, content []byte) (_ *os.File, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil { //nolint:forbidigo // The daemon's own.
		return nil, err
	}
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND|unix.O_NOFOLLOW, 0o600) //nolint:forbidigo // In a directory of root's own.
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = Remove(next)
		}
	}()
	if _, err := f.Write(content); err != nil {
		return nil, err
	}
	if err := os.Rename(next, path); err != nil { //nolint:forbidigo // As above.
		return nil, err
	}
	return f, nil
}

// Remove removes a file, if there is one.
func Remove(path string) error {
	err := os.Remove(path) //nolint:forbidigo // In a directory of root's own.
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// SetAside renames a file that makes no sense to PATH.bad, for people to look at.
func SetAside(path string) error { return os.Rename(path, path+".bad") } //nolint:forbidigo // As above.
