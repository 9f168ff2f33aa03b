package limits

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/manager/identity"
)

// search looks for those who have what an entry gave.
type search struct {
	g *Grants
	*entry
	// others are the grants beside it.
	others []*entry
	// found are the processes that have been dealt with, by pid: when they started.
	found map[int32]uint64
	// until is when the chase has to end, if not zero.
	until time.Time
	// seen are those that were listed in the last pass.
	seen map[int32]bool
	// left are those that were not reached.
	left map[int32]bool
}

// searchLocked makes a search; g.mu is held.
func (g *Grants) searchLocked(e *entry) *search {
	s := &search{g: g, entry: e, found: map[int32]uint64{}, left: map[int32]bool{}}
	for _, o := range g.entries {
		if o != e {
			s.others = append(s.others, o)
		}
	}
	return s
}

func (s *search) unreached() []int32 { return slices.Sorted(maps.Keys(s.left)) }

// Bounds of a search.
const (
	// searchTime is how long descendants are run after that fork meanwhile.
	searchTime = 3 * time.Second
	// chaseTime is how long those are looked for that may be ending and leaving
	// children all the time, if nothing of theirs is found. It may be anybody who
	// does.
	chaseTime = 2 * time.Second
	// restPasses is how many passes in a row must find nobody, restTime how far
	// apart: a child that was being forked is not seen until it is complete.
	restPasses = 3
	restTime   = 5 * time.Millisecond
)

// takeBack takes the limits back from everybody, until nobody who has them is
// found.
func (s *search) takeBack() error {
	begun := time.Now()
	until := begun.Add(chaseTime)
	if s.until.Before(until) && !s.until.IsZero() {
		until = s.until
	}
	for rest := 0; rest < restPasses; rest++ {
		found, lost, err := s.pass((*search).strip)
		if err != nil {
			return err
		}
		// One that ended unseen may have left a child that was not listed yet.
		if lost && time.Now().Before(until) {
			rest = -1
			if err := s.chase(); err != nil {
				return err
			}
		}
		if found {
			rest = -1
		}
		if found && time.Since(begun) > searchTime {
			return api.Errorf(api.Busy, "its descendants multiply faster than their limits are taken back").
				WithHint("stop them first (SIGSTOP, or freeze their cgroup), then ask again")
		}
		if !found && !lost {
			time.Sleep(restTime)
		}
	}
	// Only now: until here it is what descendants are known by.
	for pid, started := range s.found {
		if err := s.unbind(pid, started); err != nil {
			return err
		}
	}
	return nil
}

// any reports whether somebody has the limits. One that forks and ends can be missed in
// one pass.
func (s *search) any() (bool, error) {
	for range restPasses {
		found, _, err := s.pass(func(*search, *candidate) (bool, error) { return true, nil })
		if err != nil || found {
			return found, err
		}
	}
	return false, nil
}

// candidate is a process that was started after the grant, or the one that it was
// given to.
type candidate struct {
	*identity.Task
	started uint64
	limits  identity.RLimits
	inside  bool // the container
}

// pass looks at every process once and calls f for those that descend from the
// grant. found says that f did something, or came too late; lost that others ended
// before they were looked at for the first time. The latest come first: they may be about
// to end and leave a child.
func (s *search) pass(f func(*search, *candidate) (bool, error)) (found, lost bool, err error) {
	pids, err := identity.Processes()
	if err != nil {
		return false, false, err
	}
	seen := make(map[int32]bool, len(pids))
	for _, pid := range slices.Backward(pids) {
		did, err := s.visit(pid, f)
		switch {
		case errors.Is(err, identity.ErrGone):
			lost = lost || !s.seen[pid] // else it is a zombie, or none of the fleeting
		case err != nil:
			return false, false, err
		}
		found = found || did
		seen[pid] = true
	}
	s.seen = seen
	return found, lost, nil
}

// chase looks at each of the latest processes as soon as there is one, for a moment:
// one that does nothing but fork and end is met right after it was made, or not at
// all.
func (s *search) chase() error {
	seen := map[int32]bool{}
	for end := time.Now().Add(chaseTime / 10); time.Now().Before(end); {
		last, err := lastPID()
		if err != nil {
			return err
		}
		for pid := last; pid > last-8 && pid > 0; pid-- {
			if seen[pid] {
				continue
			}
			// The number is given out before there is a process to see.
			_, err := s.visit(pid, (*search).strip)
			switch {
			case err == nil:
				seen[pid] = true
			case !errors.Is(err, identity.ErrGone):
				return err
			}
		}
	}
	return nil
}

// lastPID returns the number that the kernel gave out last.
func lastPID() (int32, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) != 5 {
		return 0, fmt.Errorf("/proc/loadavg: %q", b)
	}
	pid, err := strconv.ParseInt(f[4], 10, 32)
	return int32(pid), err
}

func (s *search) visit(pid int32, f func(*search, *candidate) (bool, error)) (bool, error) {
	t, err := identity.OpenTask(pid)
	if err != nil {
		return false, err
	}
	defer t.Close()
	started, err := t.Started()
	if err != nil {
		return false, err
	}
	if !s.after(pid, started) {
		return false, nil
	}
	c := &candidate{Task: t, started: started}
	if c.limits, err = t.RLimits(); err != nil {
		return false, err
	}
	descends, err := s.descends(c)
	if err != nil || !descends {
		return false, err
	}
	did, err := f(s, c)
	if errors.Is(err, identity.ErrGone) || errors.Is(err, unix.ESRCH) {
		return true, nil // and what it left has the limits still
	}
	return did, err
}

// after reports whether the process is the one that was given the limits, or could
// have inherited them.
func (s *search) after(pid int32, started uint64) bool {
	return pid == s.PID && started == s.Started || started >= s.Ticks
}

// descends reports whether c has its limits from the grant.
func (s *search) descends(c *candidate) (bool, error) {
	n, err := s.g.host.Nesting(c.Process)
	if err != nil {
		return false, err
	}
	c.inside = n.Within(s.Container)
	if c.PID() == s.PID && c.started == s.Started {
		return true, nil
	}
	if before, ok := s.found[c.PID()]; ok && before == c.started {
		return true, nil
	}
	for _, o := range s.others {
		if c.PID() == o.PID && c.started == o.Started {
			return false, nil
		}
	}
	child, err := s.child(c)
	if err == nil && !child {
		child, err = s.marked(c)
	}
	if err != nil || !child {
		return false, err
	}
	return s.ofOwner(c)
}

// child reports whether c is a child of one that was found.
func (s *search) child(c *candidate) (bool, error) {
	ppid, err := c.Parent()
	if err != nil {
		return false, nil // of nobody who is visible here
	}
	started, ok := s.found[ppid]
	if !ok {
		return false, nil
	}
	p, err := identity.OpenTask(ppid)
	if err != nil {
		return false, nil // its parent has ended: it is told by its mark, in the next pass
	}
	defer p.Close()
	now, err := p.Started()
	return err == nil && now == started, nil
}

// marked reports whether c bears the grant's mark.
func (s *search) marked(c *candidate) (bool, error) {
	hard := c.limits[unix.RLIMIT_RTTIME].Max
	if hard > s.Mark || !c.inside && hard != s.Mark {
		return false, nil
	}
	for _, o := range s.others {
		if hard != o.Mark {
			continue
		}
		st, err := c.Status()
		if err != nil || slices.Contains(st.UIDs[:3], o.UID) {
			return false, err
		}
	}
	return true, nil
}

// ofOwner reports whether c can be of those whom the owner of the process that was given
// the limits may do this to: it runs as that user, or in a container that the user made.
// In a container it may also be one that became another user and bears the mark, or
// anybody, if the owner is root there.
func (s *search) ofOwner(c *candidate) (bool, error) {
	if s.Container != (identity.Container{}) && (s.Root || c.limits[unix.RLIMIT_RTTIME].Max == s.Mark) {
		return true, nil
	}
	st, err := c.Status()
	if err != nil || slices.Contains(st.UIDs[:3], s.UID) {
		return err == nil, err
	}
	makers, err := s.g.host.Makers(c.Process)
	return slices.Contains(makers, s.UID), err
}

// strip takes from c what the grant gave, and its realtime. It reports whether there
// was anything to do.
func (s *search) strip(c *candidate) (bool, error) {
	lower := s.without(c.limits)
	if !c.inside {
		if len(lower) > 0 {
			s.left[c.PID()] = true
		}
		return false, nil
	}
	if err := apply(c.Process, lower); errors.Is(err, unix.EAGAIN) {
		return true, nil // again in the next pass
	} else if err != nil {
		return false, err
	}
	did, err := s.demote(c)
	if err != nil {
		return false, err
	}
	// It is looked at again in the next pass: a thread that was being made when the
	// others were demoted is as they were.
	s.found[c.PID()] = c.started
	return did || len(lower) > 0, nil
}

// demote makes the threads of c SCHED_OTHER at nice 0, but those that hold a grant
// of their own, and reports whether there was one.
func (s *search) demote(c *candidate) (did bool, err error) {
	tids, err := c.Threads()
	if err != nil {
		return false, err
	}
	for _, tid := range tids {
		one, err := s.demoteThread(c, tid)
		if errors.Is(err, identity.ErrGone) {
			// It may have left another in its place.
			one, err = tid != c.PID(), nil
		}
		if err != nil {
			return false, err
		}
		did = did || one
	}
	return did, nil
}

func (s *search) demoteThread(c *candidate, tid int32) (did bool, err error) {
	th, err := c.Process.Thread(tid)
	if err != nil {
		return false, err
	}
	defer th.Close()
	now, err := th.Scheduling()
	if err != nil {
		return false, err
	}
	attr := unix.SchedAttr{Policy: uint32(now.Policy)}
	switch {
	case now.Policy == unix.SCHED_FIFO, now.Policy == unix.SCHED_RR:
		attr.Policy = unix.SCHED_NORMAL
	case now.Nice < 0 && now.Policy != unix.SCHED_DEADLINE:
	default:
		return false, nil
	}
	if s.g.granted(c.PID(), tid, now) {
		return false, nil
	}
	// By number, for want of a handle; it was this thread's a moment ago.
	if err := unix.SchedSetAttr(int(tid), &attr, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = identity.ErrGone
		}
		return false, err
	}
	return true, nil
}

// unbind puts the RLIMIT_RTTIME of one that was found back to what it was.
func (s *search) unbind(pid int32, started uint64) error {
	t, err := identity.OpenTask(pid)
	if errors.Is(err, identity.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer t.Close()
	now, err := t.Started()
	if err != nil || now != started {
		return nil // it has ended
	}
	ls, err := t.RLimits()
	if err != nil {
		return nil // as above
	}
	old, ours := s.unbound(ls)
	if !ours {
		return nil
	}
	err = apply(t.Process, identity.RLimits{unix.RLIMIT_RTTIME: old})
	if errors.Is(err, identity.ErrGone) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return err
}
