package rt

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"cgmanager/api"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt/budget"
	"cgmanager/manager/rt/watchdog"
	"cgmanager/privcheck"
)

// Order is a grant to be made.
type Order struct {
	Reservation *Reservation
	// Thread is the service's once it was granted.
	Thread *identity.Thread
	To     identity.Scheduling
	// Share is how much of a CPU it may take, in percent, as a rule says; 0 where
	// none does.
	Share int
	// UID is that of who asks, in the daemon's numbers.
	UID uint32
	// Verify makes sure, from the handles, of all on which the grant depends. It is
	// asked right before the act and right after.
	Verify func() (privcheck.Decision, error)
	// Top is the cgroup up to which realtime runtime may be taken, in the hierarchy
	// of the cpu controller.
	Top string
}

// Grant makes a grant. The watchdog must be Ready. On any error the thread has what
// it had before, or, if it or the facts changed meanwhile, nothing.
func (s *Service) Grant(o *Order) error {
	// Nobody waits meanwhile: a process may have any number of threads to look at.
	d, err := o.Verify()
	if err != nil {
		return err
	}
	g := Grant{
		ID: o.Reservation.ID(), Thread: o.Reservation.thread, UID: o.UID, Accounts: o.Reservation.accounts, Since: time.Now(),
		Policy: o.To.Policy, Priority: o.To.Priority, Nice: o.To.Nice, Share: int32(o.Share), Top: o.Top,
	}
	if err := s.grant(d, o, &g); err != nil {
		return err
	}
	if _, err := o.Verify(); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.undoLocked(o, &g)
		return err
	}
	o.Thread.Close()
	return nil
}

// grant acts. What it does may have to be undone.
func (s *Service) grant(d privcheck.Decision, o *Order, g *Grant) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Exited() {
		return ErrExited
	}
	if !relevant(o.To) {
		return s.lowerLocked(d, o, g)
	}
	// That of the order may not be closed by who revokes the grant at once.
	thread, err := o.Thread.Clone()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			thread.Close()
		}
	}()
	if g.CPU, err = o.Thread.CPU(); err != nil {
		return err
	}
	loan, err := s.lend(d, o.Thread, o.To.Policy, o.Top, o.Share)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.giveLocked(loan)
		}
	}()
	if err := s.noteLocked(g); err != nil {
		return err
	}
	if err := s.watchLocked(g); err != nil {
		_ = s.journal.ended(g.ID)
		return err
	}
	if err := schedule(d, o.Thread, o.To); err != nil {
		if errors.Is(err, identity.ErrGone) {
			s.undoLocked(o, g) // it may have had it, and be elsewhere
		}
		s.watchdog.Unwatch(g.ID)
		_ = s.journal.ended(g.ID)
		return err
	}
	_, before := o.Reservation.Commit(*g)
	s.held[g.ID] = &held{thread: thread, loan: loan}
	if before != nil {
		s.replacedLocked(before)
	}
	return nil
}

// undoLocked takes back what was not to be given, and whatever the thread was
// granted before: it is not what it was.
func (s *Service) undoLocked(o *Order, g *Grant) {
	if before, ok := s.Of(o.Reservation.thread); ok {
		s.revokeLocked([]Grant{before})
	}
	_, err := reset(o.Thread)
	if errors.Is(err, identity.ErrGone) {
		if next, ok := s.movedLocked(g); ok {
			s.revokeLocked([]Grant{next})
		}
	} else if err != nil {
		s.log.WithError(err).Error("demote a thread that changed while it was granted realtime")
	}
}

// replacedLocked lets go of a grant that another has taken the place of.
func (s *Service) replacedLocked(g *Grant) {
	s.watchdog.Replaced(g.ID)
	s.releaseLocked(g)
}

// lowerLocked is Grant for what gives a thread no more than any other has: there is
// nothing to be taken back, and nothing to be watched.
func (s *Service) lowerLocked(d privcheck.Decision, o *Order, g *Grant) error {
	if err := schedule(d, o.Thread, o.To); err != nil {
		return err
	}
	_, before := o.Reservation.Commit(*g)
	s.Remove(g.ID)
	if before != nil {
		s.replacedLocked(before)
	}
	return nil
}

func (s *Service) watchLocked(g *Grant) error {
	if err := s.watchdog.Watch(watchdog.Grant{
		ID: g.ID, PID: g.Thread.PID, TID: g.Thread.TID, Started: g.Thread.ThreadStarted,
		Policy: g.Policy, Priority: g.Priority, Nice: g.Nice, Share: g.Share,
	}); err != nil {
		return fmt.Errorf("%w: %w", ErrUnwatched, err)
	}
	return nil
}

// noteLocked notes a grant for the next daemon.
func (s *Service) noteLocked(g *Grant) error {
	grants := s.List()
	if s.journal.lines > 2*len(grants)+slack {
		next, err := writeJournal(s.journalPath(), grants)
		if err != nil {
			return fmt.Errorf("the journal of grants: %w", err)
		}
		_ = s.journal.f.Close() // it is no file any more
		s.journal = next
	}
	if err := s.journal.begun(g); err != nil {
		return fmt.Errorf("the journal of grants: %w", err)
	}
	return nil
}

// defaultRuntime is how much of a CPU is lent to a thread's cgroup where no rule
// says, in percent.
const defaultRuntime = 10

// Budgets reports whether the kernel budgets realtime, so that Order.Top matters.
func (s *Service) Budgets() bool { return s.budgets.Needed() }

// lend makes sure that the thread's cgroup has realtime runtime, where the kernel
// budgets it.
func (s *Service) lend(d privcheck.Decision, t *identity.Thread, policy int32, top string, share int) (*budget.Loan, error) {
	if !realtime(policy) || !s.budgets.Needed() {
		return nil, nil
	}
	cpu, ok := s.set.ByController("cpu")
	if !ok {
		return nil, nil
	}
	cgroups, err := t.Cgroups()
	if err != nil {
		return nil, err
	}
	target, ok := cgroups.Cgroup(cpu)
	if !ok {
		return nil, identity.ErrGone
	}
	return s.budgets.Take(d, target, top, cmp.Or(share, defaultRuntime))
}

// giveLocked gives runtime back.
func (s *Service) giveLocked(l *budget.Loan) {
	if l == nil {
		return
	}
	if err := l.Give(); err != nil {
		level := logrus.WarnLevel
		if api.AsError(err).Kind == api.Busy {
			level = logrus.DebugLevel // another realtime thread is there yet
		}
		s.log.WithError(err).Log(level, "give realtime runtime back")
	}
}
