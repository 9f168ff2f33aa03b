package cgfs

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// ProcCgroup is the content of a /proc/PID/cgroup (cgroups(7)).
type ProcCgroup []byte

// Path returns the path in h as the kernel gave it, from the root of h as the
// daemon sees it. " (deleted)" is never cut off: a cgroup's name may end so.
// It reports false if there is no line for h, or the last line was cut short,
// or the cgroup is outside the daemon's cgroup namespace ("/..").
func (p ProcCgroup) Path(h *Hierarchy) (string, bool) {
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			return "", false // cut short it would be the path of an ancestor
		}
		line := p[:end]
		p = p[end+1:]
		if len(line) <= len(h.id) || string(line[:len(h.id)]) != h.id || line[len(h.id)] != ':' {
			continue
		}
		line = line[len(h.id)+1:]
		// No controller and no hierarchy's name has a colon in it
		// (cgroup1_parse_param in the kernel's cgroup-v1.c).
		_, path, ok := bytes.Cut(line, []byte{':'})
		if !ok || len(path) == 0 || path[0] != '/' ||
			bytes.Equal(path, []byte("/..")) || bytes.HasPrefix(path, []byte("/../")) {
			return "", false
		}
		return string(path), true
	}
	return "", false
}

// Cgroup returns the cgroup in h in which the task counts: Path, or if that is
// a hidden leaf the one above it.
func (p ProcCgroup) Cgroup(h *Hierarchy) (string, bool) {
	path, ok := p.Path(h)
	if !ok {
		return "", false
	}
	return h.Visible(path), true
}

// AtRoot reports whether it says "/" of some hierarchy of version 1, or of some
// among hs where those are all of version 1. The kernel says so also of a task
// that has begun to exit, wherever it was.
func (p ProcCgroup) AtRoot(hs ...*Hierarchy) bool {
	if len(hs) > 0 && !slices.ContainsFunc(hs, func(h *Hierarchy) bool { return h.version != V1 }) {
		return slices.ContainsFunc(hs, func(h *Hierarchy) bool {
			path, _ := p.Path(h)
			return path == "/"
		})
	}
	for line := range bytes.Lines(p) {
		if bytes.HasSuffix(line, []byte(":/\n")) && !bytes.HasPrefix(line, []byte("0:")) {
			return true
		}
	}
	return false
}

// RootAlone reports whether it says "/" of every hierarchy of version 1, or there
// is none. Only then can it be of a task that has begun to exit, which on version
// 2 is said to be where it was at that moment, wherever its process is now.
func (p ProcCgroup) RootAlone() bool {
	for line := range bytes.Lines(p) {
		if !bytes.HasPrefix(line, []byte("0:")) && !bytes.HasSuffix(line, []byte(":/\n")) {
			return false
		}
	}
	return true
}

// attached is a hierarchy that exists in the kernel, mounted or not.
type attached struct {
	id     string
	tokens []string // controllers, and name=X
}

// parseAttached reads the hierarchies off a /proc/PID/cgroup. That of version
// 2, once it has been mounted, is the one with id 0 and no tokens.
func parseAttached(data string) ([]attached, error) {
	var as []attached
	for line := range strings.Lines(data) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || f[0] == "" {
			return nil, fmt.Errorf("cgroup line %q: malformed", line)
		}
		a := attached{id: f[0]}
		if f[1] != "" {
			a.tokens = strings.Split(f[1], ",")
		}
		as = append(as, a)
	}
	return as, nil
}
