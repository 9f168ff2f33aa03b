package rt

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/manager/polkit"
	"cgmanager/manager/rt/budget"
	"cgmanager/manager/rt/limits"
	"cgmanager/manager/rt/policy"
	"cgmanager/manager/rt/watchdog"
	"cgmanager/privcheck"
)

// Config says what is granted, and how it is watched.
type Config struct {
	// Scheduling is SCHED_RR or SCHED_FIFO: what is granted where the policy file
	// does not say.
	Scheduling int32
	// MaxPriority and MinNice bound what is granted where it does not say.
	MaxPriority, MinNice int32
	// RTTimeMax is the highest hard RLIMIT_RTTIME with which a process gets
	// realtime, in microseconds.
	RTTimeMax uint64
	Limits    Limits
	// Watchdog says how to watch; its Dir, Fund, Events and Log are filled in.
	Watchdog watchdog.Config
	// PolicyFile is the path of the policy file; one that does not exist says
	// nothing.
	PolicyFile string
	// Bus is the address of the bus on which polkit is asked, "" the system's.
	Bus string
	// State is the directory in which is noted what the next daemon must know.
	State string
}

// Service grants realtime.
type Service struct {
	Config
	*Ledger
	set      *cgfs.Set
	log      *logrus.Logger
	policy   *policy.File
	polkit   *polkit.Authority
	limits   *limits.Grants
	budgets  *budget.Budgets
	watchdog *watchdog.Supervisor

	// giving is held while limits are given, so that nobody is given any once ended
	// is set, by Exit or Close.
	giving sync.Mutex
	ended  atomic.Bool // set with giving held

	asking asking
	events events

	mu      sync.Mutex // held while a thread's scheduling is changed
	held    map[uint64]*held
	journal *journal // guarded by mu
}

// held are the handles behind a grant.
type held struct {
	thread *identity.Thread
	loan   *budget.Loan // nil where none was needed
}

// The reasons for which nothing is granted, beside the limits.
var (
	ErrExited = errors.New("realtime was ended by its administrator (Exit)")
	// ErrUnwatched: there is no watchdog that is realtime itself.
	ErrUnwatched = errors.New("nobody could keep watch over it")
	// ErrChanged: the thread, or what allowed it, was not the same right after.
	ErrChanged = errors.New("the thread ended or changed meanwhile")
)

// Open begins to grant, and takes up what an earlier daemon has granted.
func Open(c Config, set *cgfs.Set, host *identity.Host, log *logrus.Logger) (_ *Service, err error) {
	s := &Service{Config: c, Ledger: NewLedger(c.Limits, time.Now), set: set, log: log, held: make(map[uint64]*held)}
	if s.policy, err = policy.Open(c.PolicyFile); err != nil {
		return nil, err
	}
	if s.limits, err = limits.New(c.State, host, s.Granted, log); err != nil {
		return nil, fmt.Errorf("resource limits: %w", err)
	}
	if s.budgets, err = budget.New(set); err != nil {
		return nil, err
	}
	s.polkit = polkit.New(c.Bus)
	s.events.begin(s.event)
	w := c.Watchdog
	w.Dir, w.Log, w.Events = c.State, log, s.events.put
	w.Fund = func(pid int) error { return fund(set, pid) }
	s.watchdog = watchdog.New(w)
	if err := s.adopt(); err != nil {
		s.stop(false)
		return nil, fmt.Errorf("the grants of an earlier daemon: %w", err)
	}
	return s, nil
}

// fund brings a process to where the kernel budgets nothing: the root of the
// hierarchy that has the cpu controller.
func fund(set *cgfs.Set, pid int) error {
	h, ok := set.ByController("cpu")
	if !ok {
		return errors.New("no hierarchy has the cpu controller")
	}
	root, err := h.Open("/")
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.File("cgroup.procs", cgfs.ForWrite)
	if err != nil {
		return err
	}
	defer f.Close()
	return root.Enter(f, int32(pid))
}

func (s *Service) journalPath() string { return filepath.Join(s.State, "grants") }

// Close ends the service. With leave the next daemon takes up what is granted, else
// it is taken back.
func (s *Service) Close(leave bool) {
	s.end() // a request may be under way, for want of polkit's answer
	if !leave {
		s.RevokeAll()
		s.revokeAllLimits()
	}
	s.stop(leave)
}

func (s *Service) stop(leave bool) {
	s.watchdog.Close(leave)
	s.events.end()
	s.polkit.Close()
	s.budgets.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.held {
		h.thread.Close()
	}
	s.held = nil
	if s.journal == nil {
		return
	}
	if err := s.journal.close(leave); err != nil {
		s.log.WithError(err).Warn("close the journal of grants")
	}
}

// Reload reads the policy file again; if that fails what it said before holds.
func (s *Service) Reload() error {
	err := s.policy.Reload()
	if err != nil {
		s.log.WithError(err).Error("the realtime policy is not read again: what it said before holds")
		return err
	}
	s.log.WithField("rules", s.policy.Current().Rules()).Info("the realtime policy was read again")
	return nil
}

// end has nothing be granted any more. Who is being given limits has them by then.
func (s *Service) end() {
	s.giving.Lock()
	defer s.giving.Unlock()
	s.ended.Store(true)
}

// Exit takes back every grant and grants no more until Resume.
func (s *Service) Exit() int {
	s.end()
	n := s.RevokeAll()
	s.revokeAllLimits()
	return n
}

// Resume grants again after Exit.
func (s *Service) Resume() {
	if s.ended.Swap(false) {
		s.log.Info("realtime is granted again")
	}
}

// Exited reports whether nothing is granted since Exit.
func (s *Service) Exited() bool { return s.ended.Load() }

// Ready returns an error if nobody could watch what is granted.
func (s *Service) Ready() error {
	if s.Exited() {
		return ErrExited
	}
	if err := s.watchdog.Ready(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnwatched, err)
	}
	return nil
}

// Reserve holds a place for a grant, as the Ledger does. If a limit is reached,
// it looks first who of those that count has it no more.
func (s *Service) Reserve(accounts []string, t Thread) (r *Reservation, err error) {
	err = s.swept(accounts, func() error {
		r, err = s.Ledger.Reserve(accounts, t)
		return err
	})
	return r, err
}

// CheckUsers is the Ledger's, with the same second look.
func (s *Service) CheckUsers(accounts []string) error {
	return s.swept(accounts, func() error { return s.Ledger.CheckUsers(accounts) })
}

// CheckProcess is the Ledger's, with the same second look.
func (s *Service) CheckProcess(accounts []string, p Process) error {
	return s.swept(accounts, func() error { return s.Ledger.CheckProcess(accounts, p) })
}

func (s *Service) swept(accounts []string, ask func() error) error {
	err := ask()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrUsers), errors.Is(err, ErrTotal):
		accounts = nil // the place of anybody
	}
	s.mu.Lock()
	n := s.sweepLocked(s.List(accounts...))
	s.mu.Unlock()
	if n == 0 {
		return err
	}
	return ask()
}

// Current returns the grants of threads of the processes that which picks, the oldest
// first, and only those whose threads have them still. The others' are not looked at:
// whoever asks holds up all who ask for a grant.
func (s *Service) Current(which func(Process) bool) []Grant {
	picked := func(g *Grant) bool { return which(g.Thread.Process) }
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweepLocked(s.list(picked))
	return s.list(picked)
}

// Used returns the CPU time that the thread of a grant has used since.
func (s *Service) Used(g *Grant) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[g.ID]
	if h == nil {
		return 0
	}
	used, err := h.thread.CPU()
	if err != nil {
		return 0
	}
	return max(used-g.CPU, 0)
}

// limitsOf is what GrantLimits gives to a process.
func (s *Service) limitsOf(who policy.Target) *policy.Limits {
	v, ok := s.policy.Current().Decide(who)
	if !ok || !v.Allow {
		return nil
	}
	return v.Limits
}

// ErrNoLimits says that no rule of the policy file gives the process any.
var ErrNoLimits = errors.New("no rule of the host's realtime policy gives the process any resource limits")

// GrantLimits gives a process the resource limits that the policy file names, charged
// to the accounts, or returns ErrNoLimits.
func (s *Service) GrantLimits(d privcheck.Decision, p *identity.Process, who policy.Target, accounts []string) (map[string]string, error) {
	l := s.limitsOf(who)
	s.giving.Lock()
	defer s.giving.Unlock()
	switch {
	case s.Exited():
		return nil, ErrExited
	case l == nil:
		return nil, ErrNoLimits
	}
	return s.limits.Give(d, p, *l, s.RTTimeMax, accounts)
}

// RevokeLimits takes them back, from the process and its descendants in its
// container. It returns those that it could not reach.
func (s *Service) RevokeLimits(d privcheck.Decision, p *identity.Process, over limits.Over) ([]int32, error) {
	return s.limits.Revoke(d, p, over)
}

func (s *Service) revokeAllLimits() {
	left, err := s.limits.RevokeAll()
	if err != nil || len(left) > 0 {
		s.log.WithError(err).WithField("processes", left).Warn("processes keep the resource limits that they, or who started them, were given")
	}
}

// Given returns the limits that were given, the oldest first.
func (s *Service) Given() []limits.Given { return s.limits.List() }
