package rt

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"cgmanager/manager/identity"
)

// Limits bound what an account may have. An account is a uid of the host or a
// container; a grant counts in every account around who asked for it, and a limit
// holds for each of them.
type Limits struct {
	// Users bounds the uids that have anything.
	Users int
	// Processes and Threads bound those of an account that have grants.
	Processes, Threads int
	// Actions bounds the grants that are made in the name of an account within
	// Burst.
	Actions int
	Burst   time.Duration
	// Refuse is for how long an account is refused whose thread has starved
	// others, and everybody where it is not known whose it was.
	Refuse time.Duration
	// Total bounds all grants: each costs descriptors of the daemon's. 0 means no
	// bound.
	Total int
}

// The limits that were reached.
var (
	ErrUsers     = errors.New("too many users have realtime threads already")
	ErrProcesses = errors.New("too many of your processes, or of your container's, have realtime threads already")
	ErrThreads   = errors.New("too many threads of yours, or of your container's, have been granted it already")
	ErrBurst     = errors.New("too many requests of yours, or of your container's, within a short time")
	ErrTotal     = errors.New("too many realtime threads on this host already")
)

// Process names a process for as long as the host runs: the daemon's number for
// it, and when it was started, in clock ticks.
type Process struct {
	PID     int32
	Started uint64
}

// Thread names a thread in the same way.
type Thread struct {
	Process
	TID           int32
	ThreadStarted uint64
}

// Grant is what a thread was given.
type Grant struct {
	ID     uint64
	Thread Thread
	// UID is that of who asked, Accounts whom it is charged to, the innermost
	// container first.
	UID      uint32
	Accounts []string
	// Policy is SCHED_RR or SCHED_FIFO with a Priority, or SCHED_OTHER with a
	// Nice level.
	Policy, Priority, Nice int32
	// Share is how much of a CPU it may take, in percent, 0 where that is left to
	// the watchdog.
	Share int32
	Since time.Time
	// CPU is what the thread had used before.
	CPU time.Duration
	// Top is the cgroup up to which runtime was lent to it.
	Top string
	// Demoted: the watchdog has taken it back for now.
	Demoted bool
}

// Ledger is the bookkeeping of grants: it knows no thread and no clock but the one
// it is given.
type Ledger struct {
	limits Limits
	now    func() time.Time

	mu       sync.Mutex
	id       uint64              // of the last reservation; guarded by mu
	accounts map[string]*account // guarded by mu
	users    int                 // accounts of uids that have threads; guarded by mu
	grants   map[uint64]*Grant   // guarded by mu
	threads  map[Thread]*Grant   // guarded by mu
	reserved int                 // guarded by mu
	all      time.Time           // everybody is refused until then; guarded by mu
	lastHog  time.Time           // guarded by mu
	until    time.Time           // nobody is refused after that; guarded by mu
	sweepAt  int                 // guarded by mu
}

// account is what is charged to an account. A thread is there once for its grant
// and once for each reservation.
type account struct {
	processes map[Process]int
	threads   map[Thread]int
	// began is when the burst that runs, or ran last, has begun.
	began   time.Time
	actions int
	// refused is until when; strikes counts what led to it.
	refused time.Time
	strikes int
}

// NewLedger makes a Ledger. now is the clock, which must not go backwards.
func NewLedger(l Limits, now func() time.Time) *Ledger {
	return &Ledger{
		limits: l, now: now, sweepAt: minSweep,
		accounts: make(map[string]*account), grants: make(map[uint64]*Grant), threads: make(map[Thread]*Grant),
	}
}

// minSweep is how many accounts there are before those are looked for of which
// nothing need be known any more.
const minSweep = 256

func isUser(name string) bool { return strings.HasPrefix(name, "uid:") }

// Reservation holds a place for a grant.
type Reservation struct {
	l        *Ledger
	id       uint64
	accounts []string
	thread   Thread
	over     bool
}

// ID is that of the grant to be.
func (r *Reservation) ID() uint64 { return r.id }

// CheckUsers returns ErrUsers if the accounts have a uid that has nothing yet, and
// too many others do.
func (l *Ledger) CheckUsers(accounts []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.checkUsersLocked(accounts)
}

func (l *Ledger) checkUsersLocked(accounts []string) error {
	more := 0
	for _, name := range accounts {
		if a := l.accounts[name]; isUser(name) && (a == nil || len(a.threads) == 0) {
			more++
		}
	}
	if more > 0 && l.users+more > l.limits.Users {
		return ErrUsers
	}
	return nil
}

// CheckProcess returns ErrProcesses if the process would be one too many for an
// account.
func (l *Ledger) CheckProcess(accounts []string, p Process) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.checkProcessLocked(accounts, p)
}

func (l *Ledger) checkProcessLocked(accounts []string, p Process) error {
	for _, name := range accounts {
		if a := l.accounts[name]; a != nil && a.processes[p] == 0 && len(a.processes) >= l.limits.Processes {
			return ErrProcesses
		}
	}
	return nil
}

// Reserve holds a place in every account, or returns ErrUsers, ErrProcesses,
// ErrThreads or ErrTotal. A thread that has a grant already needs no second place.
// The reservation must be committed or cancelled.
func (l *Ledger) Reserve(accounts []string, t Thread) (*Reservation, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.checkUsersLocked(accounts); err != nil {
		return nil, err
	}
	if err := l.checkProcessLocked(accounts, t.Process); err != nil {
		return nil, err
	}
	for _, name := range accounts {
		if a := l.accounts[name]; a != nil && a.threads[t] == 0 && len(a.threads) >= l.limits.Threads {
			return nil, ErrThreads
		}
	}
	if l.limits.Total > 0 && len(l.grants)+l.reserved >= l.limits.Total {
		return nil, ErrTotal
	}
	l.chargeLocked(accounts, t)
	l.reserved++
	l.id++
	return &Reservation{l: l, id: l.id, accounts: accounts, thread: t}, nil
}

// Cancel gives the place back, unless it was committed.
func (r *Reservation) Cancel() {
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	if r.over {
		return
	}
	r.over = true
	r.l.reserved--
	r.l.acquitLocked(r.accounts, r.thread)
}

// Commit makes a grant of the reservation: g with its ID, Thread, Accounts and
// Since set. It returns the one that it replaces, if there is one.
func (r *Reservation) Commit(g Grant) (now Grant, before *Grant) {
	l := r.l
	l.mu.Lock()
	defer l.mu.Unlock()
	r.over = true
	l.reserved--
	g.ID, g.Thread, g.Accounts, g.Since = r.id, r.thread, r.accounts, l.now()
	if before = l.threads[g.Thread]; before != nil {
		l.dropLocked(before)
	}
	l.addLocked(&g)
	return g, before
}

// Adopt takes up a grant of an earlier daemon's, whatever the limits, under a new
// ID. Its place in the accounts is taken.
func (l *Ledger) Adopt(g Grant) Grant {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.id++
	g.ID = l.id
	l.chargeLocked(g.Accounts, g.Thread)
	if before := l.threads[g.Thread]; before != nil {
		l.dropLocked(before)
	}
	l.addLocked(&g)
	return g
}

func (l *Ledger) addLocked(g *Grant) {
	l.grants[g.ID] = g
	l.threads[g.Thread] = g
}

// dropLocked forgets a grant.
func (l *Ledger) dropLocked(g *Grant) {
	delete(l.grants, g.ID)
	if l.threads[g.Thread] == g {
		delete(l.threads, g.Thread)
	}
	l.acquitLocked(g.Accounts, g.Thread)
}

// Remove forgets a grant and returns it, or false if there is none.
func (l *Ledger) Remove(id uint64) (Grant, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.grants[id]
	if g == nil {
		return Grant{}, false
	}
	l.dropLocked(g)
	return *g, true
}

// Get returns a grant, or false if there is none.
func (l *Ledger) Get(id uint64) (Grant, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.grants[id]; g != nil {
		return *g, true
	}
	return Grant{}, false
}

// Of returns the grant of a thread, or false if it has none.
func (l *Ledger) Of(t Thread) (Grant, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.threads[t]; g != nil {
		return *g, true
	}
	return Grant{}, false
}

// Granted reports whether a thread, by the daemon's numbers, is scheduled so, or
// better, by a grant.
func (l *Ledger) Granted(pid, tid int32, now identity.Scheduling) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for t, g := range l.threads {
		if t.PID == pid && t.TID == tid {
			return g.covers(now)
		}
	}
	return false
}

// List returns the grants that are charged to one of the accounts, or all if none
// are named, the oldest first.
func (l *Ledger) List(accounts ...string) []Grant {
	return l.list(func(g *Grant) bool {
		return len(accounts) == 0 || slices.ContainsFunc(g.Accounts, func(a string) bool { return slices.Contains(accounts, a) })
	})
}

// Processes returns those whose threads have grants, in no order.
func (l *Ledger) Processes() []Process {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := map[Process]struct{}{}
	for t := range l.threads {
		all[t.Process] = struct{}{}
	}
	return slices.Collect(maps.Keys(all))
}

// list returns the grants that which picks, the oldest first.
func (l *Ledger) list(which func(*Grant) bool) []Grant {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []Grant
	for _, g := range l.grants {
		if which(g) {
			all = append(all, *g)
		}
	}
	slices.SortFunc(all, func(a, b Grant) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// SetDemoted notes that the watchdog has taken a grant back, or given it back.
func (l *Ledger) SetDemoted(id uint64, demoted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.grants[id]; g != nil {
		g.Demoted = demoted
	}
}

// Change notes that the thread of a grant is scheduled otherwise now.
func (l *Ledger) Change(id uint64, policy, priority, nice int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.grants[id]; g != nil {
		g.Policy, g.Priority, g.Nice = policy, priority, nice
	}
}

// chargeLocked charges a thread to accounts once more.
func (l *Ledger) chargeLocked(accounts []string, t Thread) {
	for _, name := range accounts {
		a := l.accountLocked(name)
		if len(a.threads) == 0 && isUser(name) {
			l.users++
		}
		a.threads[t]++
		a.processes[t.Process]++
	}
}

// acquitLocked takes that back.
func (l *Ledger) acquitLocked(accounts []string, t Thread) {
	for _, name := range accounts {
		a := l.accounts[name]
		if a == nil {
			continue
		}
		if a.threads[t]--; a.threads[t] <= 0 {
			delete(a.threads, t)
		}
		if a.processes[t.Process]--; a.processes[t.Process] <= 0 {
			delete(a.processes, t.Process)
		}
		if len(a.threads) == 0 && isUser(name) {
			l.users--
		}
	}
}

// accountLocked returns an account, made if need be.
func (l *Ledger) accountLocked(name string) *account {
	a := l.accounts[name]
	if a != nil {
		return a
	}
	if len(l.accounts) >= l.sweepAt {
		now := l.now()
		maps.DeleteFunc(l.accounts, func(_ string, a *account) bool {
			return len(a.threads) == 0 && now.Sub(a.began) >= l.limits.Burst && now.Sub(a.refused) >= forget*l.limits.Refuse
		})
		l.sweepAt = max(minSweep, 2*len(l.accounts))
	}
	a = &account{processes: make(map[Process]int), threads: make(map[Thread]int)}
	l.accounts[name] = a
	return a
}

// Act counts a grant that is about to be made, or returns ErrBurst where an
// account has made too many just now. Then it counts in none of them.
func (l *Ledger) Act(accounts []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	for _, name := range accounts {
		if a := l.accounts[name]; a != nil && now.Sub(a.began) < l.limits.Burst && a.actions >= l.limits.Actions {
			return ErrBurst
		}
	}
	for _, name := range accounts {
		a := l.accountLocked(name)
		if a.began.IsZero() || now.Sub(a.began) >= l.limits.Burst {
			a.began, a.actions = now, 0
		}
		a.actions++
	}
	return nil
}

const (
	// maxRefuse bounds for how long an account is refused after one more hog.
	maxRefuse = time.Hour
	// forget is how many times Refuse an account must have kept the peace for its
	// strikes to be forgotten.
	forget = 2
	// outer is how many containers within an account must have been refused, one
	// after the other, for it to be refused as a whole: new ones cost nothing.
	outer = 4
)

// Hog notes that the thread of a grant took more than its share. The innermost of
// the accounts is refused for a while, twice as long with each further strike. It
// returns which, and for how long.
func (l *Ledger) Hog(id uint64) (name string, how time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	l.lastHog = now
	l.all = time.Time{} // it was this one
	g := l.grants[id]
	if g == nil || len(g.Accounts) == 0 || l.limits.Refuse <= 0 {
		return "", 0
	}
	fresh := true
	for i, n := range g.Accounts {
		a := l.accountLocked(n)
		if i == 0 {
			fresh = !now.Before(a.refused)
		} else if !fresh {
			break
		}
		if now.Sub(a.refused) >= forget*l.limits.Refuse {
			a.strikes = 0
		}
		a.strikes++
		strikes := a.strikes
		if i > 0 {
			strikes -= outer - 1
		}
		d := l.refusal(strikes)
		if i == 0 {
			name, how = n, d
		}
		// Noted for the outer ones too: strikes are forgotten with time.
		if end := now.Add(d); end.After(a.refused) {
			a.refused = end
			l.refuseLocked(end)
		}
	}
	return name, how
}

// refusal is for how long an account is refused after so many strikes.
func (l *Ledger) refusal(strikes int) time.Duration {
	d := l.limits.Refuse
	if strikes < 1 {
		return 0
	}
	for range strikes - 1 {
		if d *= 2; d >= maxRefuse {
			break
		}
	}
	return min(d, max(maxRefuse, l.limits.Refuse))
}

// Starved notes that the host starves. Unless a hog was found within the window,
// everybody is refused for a while, which it returns.
func (l *Ledger) Starved(window time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if !l.lastHog.IsZero() && now.Sub(l.lastHog) < window {
		return 0
	}
	l.all = now.Add(l.limits.Refuse)
	l.refuseLocked(l.all)
	return l.limits.Refuse
}

func (l *Ledger) refuseLocked(until time.Time) {
	if until.After(l.until) {
		l.until = until
	}
}

// Refusing reports whether anybody is refused.
func (l *Ledger) Refusing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now().Before(l.until)
}

// Refused returns for how much longer one of the accounts is refused.
func (l *Ledger) Refused(accounts []string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	end := l.all
	for _, name := range accounts {
		if a := l.accounts[name]; a != nil && a.refused.After(end) {
			end = a.refused
		}
	}
	return max(end.Sub(now), 0)
}
