package rt

import (
	"errors"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"cgmanager/manager/identity"
)

// Revoke takes a grant back. It reports whether a thread was demoted.
func (s *Service) Revoke(g Grant) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revokeLocked([]Grant{g}) > 0
}

// RevokeAll takes every grant back. It returns how many threads were demoted.
func (s *Service) RevokeAll() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revokeLocked(s.List())
}

// ResetAll takes back every grant, and realtime from every other thread of the host
// but root's.
func (s *Service) ResetAll() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.revokeLocked(s.List())
	more, err := s.watchdog.DemoteUnknown()
	return n + more, err
}

func (s *Service) revokeLocked(grants []Grant) (n int) {
	// Before any thread is touched: the watchdog must not restore it afterwards.
	suspended := false
	for i := range grants {
		s.watchdog.Unwatch(grants[i].ID)
		suspended = suspended || grants[i].Demoted
	}
	if suspended {
		time.Sleep(lastAct)
	}
	for i := range grants {
		if s.demoteLocked(&grants[i]) {
			n++
		}
	}
	return n
}

// lastAct is how long the watchdog may take with what it has begun. It goes before
// everything else on the host, and reads at once what it is told.
const lastAct = 20 * time.Millisecond

// demoteLocked takes a grant back that is not watched any more.
func (s *Service) demoteLocked(g *Grant) bool {
	h := s.held[g.ID]
	if h == nil {
		return false
	}
	done, err := reset(h.thread)
	if errors.Is(err, identity.ErrGone) {
		s.followLocked(g)
		if next, ok := s.Of(Thread{Process: g.Thread.Process, TID: g.Thread.PID, ThreadStarted: g.Thread.Started}); ok && next.ID != g.ID {
			done = s.revokeLocked([]Grant{next}) > 0
		}
	} else if err != nil {
		s.log.WithError(err).WithFields(fieldsOf(g)).Error("demote a thread")
	}
	s.endLocked(g)
	if done {
		s.log.WithFields(fieldsOf(g)).Infof("Successfully demoted thread %d of process %d.", g.Thread.TID, g.Thread.PID)
	}
	return done
}

// endLocked forgets a grant, with what it holds.
func (s *Service) endLocked(g *Grant) {
	s.watchdog.Unwatch(g.ID)
	s.Remove(g.ID)
	s.releaseLocked(g)
}

// releaseLocked gives back what is held for a grant.
func (s *Service) releaseLocked(g *Grant) {
	if h := s.held[g.ID]; h != nil {
		delete(s.held, g.ID)
		s.giveLocked(h.loan)
		h.thread.Close()
	}
	if err := s.journal.ended(g.ID); err != nil {
		s.log.WithError(err).Warn("note the end of a grant")
	}
}

// sweepLocked ends those of the grants whose threads are gone or have nothing to take
// back. It returns how many there were.
func (s *Service) sweepLocked(grants []Grant) (n int) {
	for i := range grants {
		if s.settleLocked(&grants[i]) {
			n++
		}
	}
	return n
}

// settleLocked ends a grant that nobody has any more.
func (s *Service) settleLocked(g *Grant) (over bool) {
	h := s.held[g.ID]
	if h == nil {
		return false
	}
	now, err := h.thread.Scheduling()
	if err == nil && (g.Demoted || relevant(now)) {
		return false
	}
	if errors.Is(err, identity.ErrGone) {
		s.followLocked(g)
	}
	s.endLocked(g)
	return true
}

func fieldsOf(g *Grant) logrus.Fields {
	f := logrus.Fields{"target": g.Thread.TID, "pid": g.Thread.PID, "uid": g.UID}
	if len(g.Accounts) > 1 {
		f["container"] = strings.Join(g.Accounts, ",")
	}
	return f
}
