package manager

import (
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// Delete implements api.CGManager1.
func (m *Manager) Delete(rq *api.Request, name string) error {
	return m.delete("Delete", rq, name, false)
}

// DeleteForce implements api.CGManager1.
func (m *Manager) DeleteForce(rq *api.Request, name string) error {
	return m.delete("DeleteForce", rq, name, true)
}

func (m *Manager) delete(op string, rq *api.Request, name string, force bool) (err error) {
	c, err := m.begin(op, rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	places, err := c.existing(name)
	if err != nil {
		return err
	}
	removals := make([]*removal, 0, len(places))
	for _, p := range places {
		r, err := c.planRemove(p, quote(name))
		if err != nil {
			return err
		}
		removals = append(removals, r)
	}
	if force {
		if err := c.empty(removals); err != nil {
			return err
		}
	}
	return c.remove(removals)
}

// removal is a cgroup that is to go, with the directory above it.
type removal struct {
	at       *place
	above    *place
	name     string // the caller's own
	subject  string // name, with the hierarchy
	decision privcheck.Decision
}

// planRemove gathers and decides.
func (c *call) planRemove(p *place, name string) (*removal, error) {
	return c.planRemoval(p, name, privcheck.Remove)
}

func (c *call) planRemoval(p *place, name string, question func(privcheck.Requestor, privcheck.Place, string) privcheck.Decision) (*removal, error) {
	r := &removal{at: p, name: name, subject: in(name, p.h)}
	above := func(who *party) privcheck.Place { return privcheck.Place{Own: who.own(p.h)} }
	if p.path != "/" {
		var err error
		if r.above, err = c.open(p.h, parent(p.path)); err != nil {
			return nil, c.kernel(r.subject, err)
		}
		above = r.above.of
	}
	var err error
	r.decision, err = c.decide(r.subject, func(who *party) privcheck.Decision {
		return question(who.r, above(who), p.path)
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// remove removes the cgroups with what lies below. That no task is left in any
// of them is made sure before the first is removed.
func (c *call) remove(rs []*removal) error {
	for _, r := range rs {
		if !r.decision.Allowed() {
			return api.Errorf(api.Denied, "%s %s: not decided", c.op, r.subject)
		}
		busy, err := r.at.dir.Populated()
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return c.kernel(r.subject, err)
		}
		if busy {
			return c.inUse(r.subject)
		}
	}
	for _, r := range rs {
		if err := removeTree(r.above.dir, base(r.at.path)); err != nil {
			if errors.Is(err, unix.EBUSY) {
				return c.inUse(r.subject)
			}
			return c.kernel(r.subject, err)
		}
		c.m.reaper.gone(r.at.h, r.at.path)
		c.m.ledger.gone(r.at.h, r.at.path)
		c.done(r.name, r.at.h, r.decision)
	}
	return nil
}

func (c *call) inUse(subject string) error {
	return api.Errorf(api.Busy, "%s %s: there are tasks in it", c.op, subject).
		WithHint("move or kill them first")
}

// removeTree removes the cgroup that above knows as name, with what lies
// below. It is gone afterwards even if somebody else removed parts of it.
func removeTree(above *cgfs.Dir, name string) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := above.RemoveTree(name, nil)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		// A task that has just ended may hold its cgroup a moment longer.
		if !errors.Is(err, unix.EBUSY) || wait > 50*time.Millisecond {
			return err
		}
		dir, oerr := above.Open(name)
		if oerr != nil {
			continue
		}
		busy, oerr := dir.Populated()
		_ = dir.Close()
		if oerr == nil && busy {
			return err
		}
		time.Sleep(wait)
	}
}

// emptyDeadline bounds how long DeleteForce runs after tasks that fork.
const emptyDeadline = 2 * time.Second

// empty moves every task in the cgroups, and below, to the cgroup above.
func (c *call) empty(rs []*removal) error {
	deadline := time.Now().Add(emptyDeadline)
	for {
		left := false
		for _, r := range rs {
			pids, err := subtreeProcs(r.at.dir)
			if err != nil {
				return c.kernel(r.subject, err)
			}
			for _, pid := range pids {
				left = true
				if err := c.moveUp(r, pid); err != nil {
					return err
				}
			}
		}
		if !left {
			return nil
		}
		if time.Now().After(deadline) {
			return api.Errorf(api.Busy, "%s %s: its tasks fork faster than they can be moved", c.op, rs[0].subject).
				WithHint("Kill them instead")
		}
	}
}

func (c *call) moveUp(r *removal, pid int32) error {
	before := len(c.close)
	// Handles are let go task by task: there may be many.
	defer func() {
		for _, h := range c.close[before:] {
			h.Close()
		}
		c.close = c.close[:before]
	}()
	v, err := c.member(pid, "a task in "+r.subject)
	if v == nil {
		return err
	}
	err = c.move(v, []*place{r.above}, c.moveDecision)
	if e, ok := errors.AsType[*api.Error](err); ok && e.Kind == api.NotFound || errors.Is(err, errMoved) {
		return nil // ended, or moved, meanwhile
	}
	return err
}

// member opens a handle on a task found in a cgroup; nil if it has ended.
func (c *call) member(pid int32, subject string) (*victim, error) {
	if pid <= 0 {
		return nil, api.Errorf(api.Denied, "%s %s: it belongs to a namespace that is not visible", c.op, subject)
	}
	t, err := openTask(pid)
	if t == nil {
		return nil, err
	}
	c.close = append(c.close, t)
	return &victim{Task: t, subject: subject}, nil
}

// subtreeProcs returns the processes in dir and below, in the daemon's
// numbers. A list of processes of v2 does not have one that was moved after its
// first thread had exited; such are looked for by their threads where nothing
// else is left.
func subtreeProcs(dir *cgfs.Dir) ([]int32, error) {
	all, err := subtree(dir, (*cgfs.Dir).Procs)
	if err != nil || len(all) > 0 || dir.Hierarchy().Version() == cgfs.V1 {
		return all, err
	}
	tids, err := subtree(dir, (*cgfs.Dir).Threads)
	if err != nil {
		return nil, err
	}
	for _, tid := range tids {
		t, err := openTask(tid)
		if err != nil {
			return nil, err
		}
		if t != nil {
			all = append(all, t.PID())
			t.Close()
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// subtree returns what list says of dir and of the cgroups below.
func subtree(dir *cgfs.Dir, list func(*cgfs.Dir) ([]int32, error)) ([]int32, error) {
	var all []int32
	err := dir.Walk(func(d *cgfs.Dir) error {
		ids, err := list(d)
		// A threaded cgroup has no list of processes: the one above has them
		// that is the root of its threads (cgroup-v2.rst, "Threads").
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		all = append(all, ids...)
		return err
	})
	return all, err
}
