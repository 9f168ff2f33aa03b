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
func (b *beside) tend1(path string, holder Holder) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if old := b.scopes[path]; old != nil {
		old.Close() // of an earlier one of that name: it has ended
	}
	b.scopes[path] = holder
	b.againLocked(lookAgain)
}

// againLocked has tend called after a while, unless it is going to be called.
func (b *beside) againLocked(after time.Duration) {
	if b.closed || b.timer != nil {
		return
	}
	b.timer = time.AfterFunc(after, b.tend)
}

// soon is when to look for what is left of a scope that has just been ended.
const soon = time.Second

// tend ends the scopes whose cgroup is gone and that nobody uses, and removes
// what is left of those that have ended.
func (b *beside) tend() {
	b.tending.Lock()
	defer b.tending.Unlock()
	b.mu.Lock()
	var paths []string
	if !b.closed {
		for path, holder := range b.scopes {
			paths = append(paths, path)
			if holder != nil && holder.Ended() {
				b.scopes[path] = nil
			}
		}
	}
	b.timer = nil
	b.mu.Unlock()
	after := lookAgain
	for _, path := range paths {
		ended, gone := b.tendTo(path)
		if ended {
			after = soon
		}
		if gone {
			b.mu.Lock()
			if holder := b.scopes[path]; holder == nil || holder.Ended() {
				delete(b.scopes, path)
			}
			b.mu.Unlock()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.scopes) > 0 {
		b.againLocked(after)
	}
}

// tendTo reports whether it has ended the process that holds a scope, and
// whether the scope and all that belongs to it are gone.
func (b *beside) tendTo(path string) (ended, gone bool) {
	d, err := b.tree.Open(path)
	if errors.Is(err, unix.ENOENT) {
		return false, b.removeElsewhere(path)
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
	if session, err := b.tree.Open(own); err == nil {
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
	process, start, at, err := b.process(pids[0])
	if err != nil {
		return false, false
	}
	defer process.Close()
	if mark != fmt.Sprintf("%d %s", pids[0], start) || !privcheck.Below(path, at) {
		return false, false
	}
	if err := unix.PidfdSendSignal(process.PidFD(), unix.SIGKILL, nil, 0); err != nil {
		return false, false
	}
	b.log.WithFields(logrus.Fields{"op": "scope", "target": path}).Info("ended: what it stood for is gone, and nothing else is in it")
	return true, false
}

// removeElsewhere removes a scope's cgroups where systemd does not. It reports
// false where tasks are left in one.
func (b *beside) removeElsewhere(path string) bool {
	all := true
	for _, h := range b.set.Hierarchies() {
		if b.managed(h) || !scoped(h) {
			continue
		}
		for at := path; at != "/"; at = parent(at) {
			above, err := h.Open(parent(at))
			if err != nil {
				continue
			}
			removed := b.removeMade(above, base(at), at == path)
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
func (*beside) removeMade(above *cgfs.Dir, name string, all bool) bool {
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
func (b *beside) process(pid int32) (p *identity.Process, start, path string, err error) {
	if p, err = identity.Open(pid, -1); err != nil {
		return nil, "", "", err
	}
	start, err = p.Started()
	if err == nil {
		var cgroups cgfs.ProcCgroup
		cgroups, err = p.Cgroups()
		path, _ = cgroups.Cgroup(b.tree)
	}
	if err != nil {
		p.Close()
		return nil, "", "", err
	}
	return p, start, path, nil
}
