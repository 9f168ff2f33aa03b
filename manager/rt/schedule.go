package rt

import (
	"fmt"

	"golang.org/x/sys/unix"

	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

// relevant reports whether a thread that is scheduled so has something to take
// back.
func relevant(s identity.Scheduling) bool {
	// A thread may make itself SCHED_BATCH and keep its nice level.
	return realtime(s.Policy) || s.Policy != unix.SCHED_DEADLINE && s.Nice < 0
}

// explains reports whether a thread that was granted g can have come to be scheduled
// so by itself: everybody may take less than they have.
func (g *Grant) explains(s identity.Scheduling) bool {
	// Or it has the nice level that it had before.
	return g.covers(s) || realtime(g.Policy) && !realtime(s.Policy)
}

// covers reports whether what a thread has is what it was granted, or less.
func (g *Grant) covers(s identity.Scheduling) bool {
	if realtime(s.Policy) {
		return s.Policy == g.Policy && s.Priority <= g.Priority
	}
	return !realtime(g.Policy) && s.Nice >= g.Nice
}

func realtime(policy int32) bool { return policy == unix.SCHED_RR || policy == unix.SCHED_FIFO }

// resetOnFork is SCHED_FLAG_RESET_ON_FORK (sched(7)): what is granted to a thread is
// not inherited, and only a privileged thread can drop the flag.
const resetOnFork = unix.SCHED_FLAG_RESET_ON_FORK

// schedule sets how a thread is scheduled. The kernel has no handle for it: the
// number is the thread's own as long as that lives, so the handle is looked at right
// before and right after. If the thread ended in between, its number may be another
// thread's by then, which was given what it was not meant to have: that is taken
// back, and ErrGone returned.
func schedule(d privcheck.Decision, t *identity.Thread, s identity.Scheduling) error {
	if !d.Allowed() {
		return unix.EPERM
	}
	if !t.Alive() {
		return identity.ErrGone
	}
	attr := unix.SchedAttr{Policy: uint32(s.Policy), Flags: resetOnFork, Priority: uint32(s.Priority), Nice: s.Nice}
	if err := unix.SchedSetAttr(int(t.TID()), &attr, 0); err != nil {
		return fmt.Errorf("sched_setattr: %w", err)
	}
	if t.Alive() {
		return nil
	}
	if attr, err := unix.SchedGetAttr(int(t.TID()), 0); err == nil && is(attr, s) {
		_ = ordinary(t.TID()) // as good as it can be undone
	}
	return identity.ErrGone
}

// ordinary makes a thread SCHED_OTHER at nice 0.
func ordinary(tid int32) error {
	attr := unix.SchedAttr{Policy: unix.SCHED_NORMAL}
	if err := unix.SchedSetAttr(int(tid), &attr, 0); err != nil {
		return fmt.Errorf("sched_setattr: %w", err)
	}
	return nil
}

// is reports whether a thread has what a grant gives.
func is(a *unix.SchedAttr, s identity.Scheduling) bool {
	return int32(a.Policy) == s.Policy && int32(a.Priority) == s.Priority && a.Flags&resetOnFork != 0 &&
		(realtime(s.Policy) || a.Nice == s.Nice)
}

// reset makes a thread SCHED_OTHER at nice 0 again. What is not scheduled as a grant
// leaves it is not touched: a thread that is demoted already, or that has begun
// something else. It reports whether the thread was.
func reset(t *identity.Thread) (done bool, err error) {
	// A thread that gives up realtime between the two looks may have a nice level left.
	for range 3 {
		now, err := t.Scheduling()
		if err != nil || !relevant(now) {
			return false, err
		}
		// By number, as in schedule. A thread that has the number by now is not likely to
		// be scheduled like this one, with the flag.
		attr, err := unix.SchedGetAttr(int(t.TID()), 0)
		if err != nil {
			return false, fmt.Errorf("sched_getattr: %w", err)
		}
		if attr.Flags&resetOnFork == 0 {
			return false, nil
		}
		if int32(attr.Policy) == now.Policy {
			err = ordinary(t.TID())
			return err == nil, err
		}
	}
	return false, nil
}
