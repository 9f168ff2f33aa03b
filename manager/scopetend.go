package manager

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

// tend1 looks after a scope from now on.
func (sc *scopes) tend1(path string, holder Holder) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if old := sc.there[path]; old != nil {
		old.Close() // of an earlier one of that name: it has ended
	}
	sc.there[path] = holder
	sc.againLocked(lookAgain)
}

// againLocked has tend called after a while, unless it is going to be called.
func (sc *scopes) againLocked(after time.Duration) {
	if sc.closed || sc.timer != nil {
		return
	}
	sc.timer = time.AfterFunc(after, sc.tend)
}

// soon is when to look for what is left of a scope that has just been ended.
const soon = time.Second

// tend ends the scopes whose cgroup is gone and that nobody uses, and removes
// what is left of those that have ended.
func (sc *scopes) tend() {
	sc.tending.Lock()
	defer sc.tending.Unlock()
	sc.mu.Lock()
	var paths []string
	if !sc.closed {
		for path, holder := range sc.there {
			paths = append(paths, path)
			if holder != nil && holder.Ended() {
				sc.there[path] = nil
			}
		}
	}
	sc.timer = nil
	sc.mu.Unlock()
	after := lookAgain
	for _, path := range paths {
		ended, gone := sc.tendTo(path)
		if ended {
			after = soon
		}
		if gone {
			sc.mu.Lock()
			if holder := sc.there[path]; holder == nil || holder.Ended() {
				delete(sc.there, path)
			}
			sc.mu.Unlock()
		}
	}
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if len(sc.there) > 0 {
		sc.againLocked(after)
	}
}

// tendTo reports whether it has ended the process that holds a scope, and
// whether the scope and all that belongs to it are gone.
func (sc *scopes) tendTo(path string) (ended, gone bool) {
	d, err := sc.tree.Open(path)
	if errors.Is(err, unix.ENOENT) {
		return false, sc.removeElsewhere(path)
	}
	if err != nil {
		return false, false
	}
	defer d.Close()
	mark, _, err := d.Mark(scopeMark)
	_, own, ok := strings.Cut(mark, " ")
	if err != nil || !ok {
		return false, false
	}
	if session, err := sc.tree.Open(own); err == nil {
		_ = session.Close()
		return false, false
	} else if !errors.Is(err, unix.ENOENT) {
		return false, false
	}
	pids, err := subtreeProcs(d)
	if err != nil || len(pids) != 1 {
		return false, false
	}
	mark, _, err = d.Mark(holderMark)
	if err != nil {
		return false, false
	}
	process, start, at, err := sc.process(pids[0])
	if err != nil {
		return false, false
	}
	defer process.Close()
	if mark != fmt.Sprintf("%d %d", pids[0], start) || !privcheck.Below(path, at) {
		return false, false
	}
	if err := unix.PidfdSendSignal(process.PidFD(), unix.SIGKILL, nil, 0); err != nil {
		return false, false
	}
	sc.log.WithFields(logrus.Fields{"op": "scope", "target": path}).Info("ended: what it stood for is gone, and nothing else is in it")
	return true, false
}

// removeElsewhere removes a scope's cgroups where systemd does not. It reports
// false where tasks are left in one.
func (sc *scopes) removeElsewhere(path string) bool {
	all := true
	for _, h := range sc.set.Hierarchies() {
		if sc.managed(h) || !scoped(h) {
			continue
		}
		for at := path; at != "/"; at = parent(at) {
			above, err := h.Open(parent(at))
			if err != nil {
				continue
			}
			removed := sc.removeMade(above, base(at), at == path)
			_ = above.Close()
			if !removed {
				all = all && at != path
				break
			}
		}
	}
	return all
}

// removeMade removes a cgroup that has the mark, with what is below if all.
func (*scopes) removeMade(above *cgfs.Dir, name string, all bool) bool {
	d, err := above.Open(name)
	if err != nil {
		return errors.Is(err, unix.ENOENT)
	}
	_, made, err := d.Mark(madeMark)
	_ = d.Close()
	if err != nil || !made {
		return false
	}
	if all {
		return above.RemoveTree(name, nil) == nil
	}
	return above.Rmdir(name) == nil
}

// process opens a handle on a process, and returns when it was started and where
// it is in systemd's tree.
func (sc *scopes) process(pid int32) (p *identity.Process, start uint64, path string, err error) {
	if p, err = identity.Open(pid, -1); err != nil {
		return nil, 0, "", err
	}
	start, err = p.Started()
	if err == nil {
		var cgroups cgfs.ProcCgroup
		cgroups, err = p.Cgroups()
		path, _ = cgroups.Cgroup(sc.tree)
	}
	if err != nil {
		p.Close()
		return nil, 0, "", err
	}
	return p, start, path, nil
}
