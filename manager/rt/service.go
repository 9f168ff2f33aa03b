package rt

import (
	"cmp"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
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

func (s *Service) watchLocked(g *Grant) error {
	if err := s.watchdog.Watch(watchdog.Grant{
		ID: g.ID, PID: g.Thread.PID, TID: g.Thread.TID, Started: g.Thread.ThreadStarted,
		Policy: g.Policy, Priority: g.Priority, Nice: g.Nice, Share: g.Share,
	}); err != nil {
		return fmt.Errorf("%w: %w", ErrUnwatched, err)
	}
	return nil
}

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

// endLocked forgets a grant, with what it holds.
func (s *Service) endLocked(g *Grant) {
	s.watchdog.Unwatch(g.ID)
	s.Remove(g.ID)
	if h := s.held[g.ID]; h != nil {
		delete(s.held, g.ID)
		s.giveLocked(h.loan)
		h.thread.Close()
	}
	if err := s.journal.ended(g.ID); err != nil {
		s.log.WithError(err).Warn("note the end of a grant")
	}
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

func fieldsOf(g *Grant) logrus.Fields {
	f := logrus.Fields{"target": g.Thread.TID, "pid": g.Thread.PID, "uid": g.UID}
	if len(g.Accounts) > 1 {
		f["container"] = strings.Join(g.Accounts, ",")
	}
	return f
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
	if h := s.held[g.ID]; h != nil {
		delete(s.held, g.ID)
		s.giveLocked(h.loan)
		h.thread.Close()
	}
	if err := s.journal.ended(g.ID); err != nil {
		s.log.WithError(err).Warn("note the end of a grant")
	}
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
func (s *Service) RevokeLimits(d privcheck.Decision, p *identity.Process) ([]int32, error) {
	return s.limits.Revoke(d, p)
}

func (s *Service) revokeAllLimits() {
	left, err := s.limits.RevokeAll()
	if err != nil || len(left) > 0 {
		s.log.WithError(err).WithField("processes", left).Warn("processes keep the resource limits that they, or who started them, were given")
	}
}

// Given returns the limits that were given, the oldest first.
func (s *Service) Given() []limits.Given { return s.limits.List() }
