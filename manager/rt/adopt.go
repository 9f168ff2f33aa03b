package rt

import (
	"errors"

	"golang.org/x/sys/unix"

	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

// adopt takes up the grants whose threads still have what they were given.
func (s *Service) adopt() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before, err := readJournal(s.journalPath())
	if err != nil {
		s.log.WithError(err).Warn("the grants of an earlier daemon are not all known")
	}
	var gone []Grant
	for _, g := range before {
		if t := still(&g); t != nil {
			g = s.Adopt(g)
			t.Rest()
			s.held[g.ID] = &held{thread: t}
			s.lendAgainLocked(&g)
		} else {
			gone = append(gone, g)
		}
	}
	for _, g := range gone {
		if next, ok := s.movedLocked(&g); ok {
			s.lendAgainLocked(&next)
		}
	}
	if err := s.budgets.Settle(); err != nil {
		s.log.WithError(err).Warn("give realtime runtime back")
	}
	grants := s.List()
	if s.journal, err = writeJournal(s.journalPath(), grants); err != nil || len(grants) == 0 {
		return err
	}
	err = s.watchdog.Ready()
	for i := range grants {
		if err == nil {
			err = s.watchLocked(&grants[i])
		}
	}
	if err != nil {
		s.log.WithError(err).Errorf("Nobody would watch them: the %d threads that an earlier daemon has granted realtime are demoted.", len(grants))
		s.revokeLocked(grants)
		return nil
	}
	s.log.WithField("threads", len(grants)).Info("supervising what an earlier daemon has granted")
	return nil
}

// lendAgainLocked lends to a thread what an earlier daemon has lent to it.
func (s *Service) lendAgainLocked(g *Grant) {
	h := s.held[g.ID]
	loan, err := s.lend(privcheck.RealtimeKept(true), h.thread, g.Policy, g.Top, int(g.Share))
	if err != nil {
		s.log.WithError(err).WithFields(fieldsOf(g)).Warn("lend realtime runtime to a thread that had it before")
	}
	h.loan = loan
}

// still returns a handle on the thread of a grant of an earlier daemon's, or nil if
// it is another, or has it no more.
func still(g *Grant) *identity.Thread {
	p, err := identity.Open(g.Thread.PID, -1)
	if err != nil {
		return nil
	}
	defer p.Close()
	t, err := threadOf(p, &g.Thread)
	if err != nil {
		return nil
	}
	now, err := t.Scheduling()
	attr, aerr := unix.SchedGetAttr(int(t.TID()), 0)
	if err != nil || aerr != nil || !relevant(now) || attr.Flags&resetOnFork == 0 || !t.Alive() {
		t.Close()
		return nil
	}
	return t
}

// threadOf returns a handle on the thread that is named, or ErrGone.
func threadOf(p *identity.Process, name *Thread) (*identity.Thread, error) {
	started, err := ProcessOf(p)
	if err != nil || started != name.Process {
		return nil, errors.Join(err, identity.ErrGone)
	}
	t, err := p.Thread(name.TID)
	if err != nil {
		return nil, err
	}
	if t.Started() != name.ThreadStarted {
		t.Close()
		return nil, identity.ErrGone
	}
	return t, nil
}

// ProcessOf names a process.
func ProcessOf(p *identity.Process) (Process, error) {
	t, err := p.Thread(p.PID())
	if err != nil {
		return Process{}, err
	}
	defer t.Close()
	return Process{p.PID(), t.Started()}, nil
}

// movedLocked looks for the thread of a grant that is gone where execve(2) has put
// it: the program goes on as the first thread, under the process's number, and as the
// thread was scheduled. It is granted the same there, in place of what that number was
// granted before: who had that has ended. It returns the new grant, or false if the
// thread is not there, or what is there is in sight already.
func (s *Service) movedLocked(g *Grant) (next Grant, ok bool) {
	next = *g
	next.Thread.TID, next.Thread.ThreadStarted = g.Thread.PID, g.Thread.Started
	if next.Thread == g.Thread {
		return next, false
	}
	t := still(&next)
	if t == nil {
		return next, false
	}
	now, err := t.Scheduling()
	before, has := s.Of(next.Thread)
	inSight := has && !before.Demoted && realtime(now.Policy) == realtime(before.Policy)
	if err != nil || inSight || !g.explains(now) {
		t.Close()
		return next, false
	}
	next.Policy, next.Priority, next.Nice, next.Demoted = now.Policy, now.Priority, now.Nice, false
	next = s.Adopt(next)
	t.Rest()
	s.held[next.ID] = &held{thread: t}
	if h := s.held[g.ID]; h != nil {
		s.held[next.ID].loan, h.loan = h.loan, nil
	}
	if has {
		s.replacedLocked(&before)
	}
	return next, true
}

// followLocked is movedLocked, and goes on watching the thread.
func (s *Service) followLocked(g *Grant) {
	next, ok := s.movedLocked(g)
	if !ok {
		return
	}
	err := s.noteLocked(&next)
	if err == nil {
		err = s.watchLocked(&next)
	}
	if err != nil {
		s.log.WithError(err).WithField("pid", next.Thread.PID).Error("cannot watch a thread that ran another program")
		s.revokeLocked([]Grant{next})
	}
}
