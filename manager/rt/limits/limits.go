package limits

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt/policy"
	"cgmanager/manager/rt/state"
	"cgmanager/privcheck"
)

// resources are the limits that are given, by the names of Give's answer, in the
// order in which they are set: what bounds realtime comes before what allows it.
var resources = []struct {
	name   string
	number int
}{
	{"rttime", unix.RLIMIT_RTTIME},
	{"rtprio", unix.RLIMIT_RTPRIO},
	{"nice", unix.RLIMIT_NICE},
	{"memlock", unix.RLIMIT_MEMLOCK},
}

// Grants knows who was given limits. Its methods may be called from several
// goroutines.
type Grants struct {
	host    *identity.Host
	granted func(pid, tid int32, now identity.Scheduling) bool
	file    file

	mu      sync.Mutex
	entries []*entry // the oldest first; guarded by mu
	// pruned is when those that nobody has any more were looked for last, next where
	// that goes on; guarded by mu.
	pruned time.Time
	next   int
}

// entry is what one process was given.
type entry struct {
	PID     int32
	Started uint64 `json:",string"`
	// UID is its real uid, Root whether that is root in its user namespace.
	UID       uint32
	Root      bool
	Container identity.Container
	// Accounts are whom it is charged to.
	Accounts []string
	// Since is when it was given, in seconds since 1970, Ticks the same in the clock
	// that processes' starts are told in.
	Since int64
	Ticks uint64
	// Old is what the process had, Given what it has been given; both name the same
	// limits. Mark is the hard RLIMIT_RTTIME by which it was known from the first.
	Old, Given identity.RLimits
	Mark       uint64

	// revoking: somebody is taking it back.
	revoking bool
}

// New makes Grants; dir is the directory in which they are noted, for the next daemon.
// A file there that makes no sense is set aside, as limits.bad, and log says so: what
// else the daemon serves does not depend on it. granted reports whether a thread is
// scheduled so by a grant of its own, which is left alone where limits are taken back;
// both are the daemon's numbers.
func New(dir string, h *identity.Host, granted func(pid, tid int32, now identity.Scheduling) bool, log *logrus.Logger) (*Grants, error) {
	f, err := newFile(dir)
	if err != nil {
		return nil, fmt.Errorf("limits that were given: %w", err)
	}
	g := &Grants{host: h, granted: granted, file: f}
	if g.entries, err = f.read(); err != nil {
		log.WithError(errors.Join(err, state.SetAside(f.path))).
			Errorf("It is not known to whom an earlier daemon gave resource limits: they keep them. What it noted is kept as %s.bad.", f.path)
	}
	return g, nil
}

// privileged returns an *api.Error if the daemon may not set others' limits.
func privileged() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // of 32 capabilities each
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return unprivileged(nil)
	}
	return nil
}

func unprivileged(cause error) error {
	return api.Errorf(api.Unsupported, "the daemon lacks CAP_SYS_RESOURCE, without which nobody sets another process's resource limits").
		WithHint("whoever runs the host gives it to the daemon, or to the machine that it runs in").WithCause(cause)
}

// Give raises the limits of a process that the decision allows, never below what it
// has, and lowers its RLIMIT_RTTIME to rttime microseconds or a few less; it is charged
// to the accounts. It returns what the process has by that, by name: all or nothing. It
// returns an *api.Error: Unsupported without CAP_SYS_RESOURCE, NotFound if the process
// has ended, Limit if an account has too many, Busy if the process changes its limits
// itself at the same time.
func (g *Grants) Give(d privcheck.Decision, p *identity.Process, l policy.Limits, rttime uint64, accounts []string) (map[string]string, error) {
	if !d.Allowed() {
		return nil, api.Errorf(api.Denied, "give limits: not decided")
	}
	if err := privileged(); err != nil {
		return nil, err
	}
	if rttime == 0 {
		return nil, api.Errorf(api.Invalid, "give limits: an RLIMIT_RTTIME of 0 leaves a realtime thread no time at all")
	}
	want := wanted(l)
	if len(want) == 0 {
		return nil, api.Errorf(api.Denied, "the policy file gives the process no limits")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	e, err := g.entryLocked(p)
	if err != nil {
		return nil, forRequestor(err)
	}
	if e.revoking {
		return nil, revoking()
	}
	if !slices.ContainsFunc(g.entries, e.same) {
		e.Accounts = accounts
		if err := g.roomLocked(accounts); err != nil {
			return nil, err
		}
	}
	now, err := p.RLimits()
	if err != nil {
		return nil, forRequestor(err)
	}
	g.planLocked(e, now, want, rttime)
	before := slices.Clone(g.entries)
	if i := slices.IndexFunc(g.entries, e.same); i >= 0 {
		g.entries[i] = e
	} else {
		g.entries = append(g.entries, e)
	}
	// Noted first: what is given and not noted could never be taken back.
	if err := g.file.write(g.entries); err != nil {
		g.entries = before
		return nil, forRequestor(err)
	}
	if err := apply(p, e.Given); err != nil {
		g.entries = before
		return nil, forRequestor(errors.Join(err, g.file.write(g.entries)))
	}
	return e.words(), nil
}

// Bounds on the processes that have limits: of one account, and of all. Each costs a
// look at every process of the host when it is taken back, or has ended.
const (
	maxAccount = 256
	maxAll     = 4096
)

// roomLocked returns an error if one more is too many for one of the accounts.
func (g *Grants) roomLocked(accounts []string) error {
	err := full(g.entries, accounts)
	if err != nil && g.pruneLocked() {
		err = full(g.entries, accounts)
	}
	return err
}

func full(entries []*entry, accounts []string) error {
	if len(entries) >= maxAll {
		return api.Errorf(api.Limit, "too many processes on this host have been given limits already")
	}
	for _, name := range accounts {
		n := 0
		for _, e := range entries {
			if slices.Contains(e.Accounts, name) {
				n++
			}
		}
		if n >= maxAccount {
			return api.Errorf(api.Limit, "%d processes of yours, or of your container's, have been given limits already, no more can be", n).
				WithHint("take them back from others first (RevokeLimits)")
		}
	}
	return nil
}

func revoking() error {
	return api.Errorf(api.Busy, "its limits are being taken back").WithHint("ask again")
}

// forRequestor makes an error that may be told of one of the kernel's.
func forRequestor(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, identity.ErrGone), errors.Is(err, unix.ESRCH):
		return api.Errorf(api.NotFound, "no such process").WithCause(err)
	case errors.Is(err, unix.EPERM):
		return unprivileged(err)
	case errors.Is(err, unix.EAGAIN):
		return api.Errorf(api.Busy, "the process changes its limits itself").WithHint("ask again").WithCause(err)
	}
	return api.AsError(err)
}

// wanted are the limits that the policy gives, by the kernel's numbers and measure.
func wanted(l policy.Limits) map[int]uint64 {
	want := map[int]uint64{}
	if l.RTPrio != nil {
		want[unix.RLIMIT_RTPRIO] = *l.RTPrio
	}
	if l.Nice != nil {
		want[unix.RLIMIT_NICE] = uint64(max(20-*l.Nice, 0)) // getrlimit(2)
	}
	if l.MemLock != nil {
		want[unix.RLIMIT_MEMLOCK] = *l.MemLock
	}
	return want
}

// entryLocked returns a copy of p's entry, or a new one.
func (g *Grants) entryLocked(p *identity.Process) (*entry, error) {
	started, err := p.Started()
	if err != nil {
		return nil, err
	}
	if e := g.findLocked(p.PID(), started); e != nil {
		c := *e
		c.Old, c.Given = maps.Clone(e.Old), maps.Clone(e.Given)
		return &c, nil
	}
	st, err := p.Status()
	if err != nil {
		return nil, err
	}
	n, err := g.host.Nesting(p)
	if err != nil {
		return nil, err
	}
	root, err := n.Root(p)
	if err != nil {
		return nil, err
	}
	ticks, err := ticks()
	if err != nil {
		return nil, err
	}
	return &entry{
		PID: p.PID(), Started: started, UID: st.UIDs[0], Root: st.UIDs[0] == root, Container: n.Container(),
		Since: time.Now().Unix(), Ticks: ticks,
		Old: identity.RLimits{}, Given: identity.RLimits{},
	}, nil
}

// ticks is now in the clock that proc_pid_stat(5) tells a process's start in: the
// time since boot in units of 1/100 s, USER_HZ on all that Go runs on.
func ticks() (uint64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("clock_gettime: %w", err)
	}
	return uint64(ts.Nano()) / 1e7, nil
}

func (g *Grants) findLocked(pid int32, started uint64) *entry {
	for _, e := range g.entries {
		if e.PID == pid && e.Started == started {
			return e
		}
	}
	return nil
}

func (e *entry) same(other *entry) bool { return e.PID == other.PID && e.Started == other.Started }

// planLocked fills in what a process with the limits now is given.
func (g *Grants) planLocked(e *entry, now identity.RLimits, want map[int]uint64, rttime uint64) {
	had := maps.Clone(now)
	for _, q := range g.entries {
		// What it has inherited is not its own.
		if now[unix.RLIMIT_RTTIME].Max == q.Mark && !q.same(e) {
			maps.Copy(had, q.without(now))
			// Who has lowered its own to the mark of somebody else gets nothing
			// back that was never its own.
			if old, ok := q.unbound(now); ok && q.UID == e.UID && q.Container == e.Container {
				had[unix.RLIMIT_RTTIME] = old
			}
		}
	}
	for number, v := range want {
		if _, ok := e.Old[number]; !ok {
			e.Old[number] = had[number]
		}
		n := now[number]
		e.Given[number] = unix.Rlimit{Cur: max(n.Cur, v), Max: max(n.Max, v)}
	}
	n := now[unix.RLIMIT_RTTIME]
	if e.Mark == 0 {
		e.Old[unix.RLIMIT_RTTIME] = had[unix.RLIMIT_RTTIME]
		e.Mark = g.markLocked(min(rttime, n.Max))
	}
	hard := min(n.Max, rttime, e.Mark)
	e.Given[unix.RLIMIT_RTTIME] = unix.Rlimit{Cur: min(n.Cur, hard), Max: hard}
}

// markLocked returns the highest number below v that is no other grant's mark.
func (g *Grants) markLocked(v uint64) uint64 {
	taken := func(e *entry) bool { return e.Mark == v }
	for v > 0 {
		if v--; !slices.ContainsFunc(g.entries, taken) {
			break
		}
	}
	return v
}

// words is what was given, for people: a number, or "unlimited", in the unit of the
// policy file.
func (e *entry) words() map[string]string {
	out := map[string]string{}
	for _, r := range resources {
		l, ok := e.Given[r.number]
		switch {
		case !ok:
		case r.number == unix.RLIMIT_NICE:
			out[r.name] = strconv.Itoa(20 - int(min(l.Max, 40)))
		case l.Max == unix.RLIM_INFINITY:
			out[r.name] = "unlimited"
		default:
			out[r.name] = strconv.FormatUint(l.Max, 10)
		}
	}
	return out
}

// apply sets limits and makes sure that it was p that got them; else it puts back
// what was there.
func apply(p *identity.Process, ls identity.RLimits) (err error) {
	if !p.Alive() {
		return identity.ErrGone
	}
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()
	pid := int(p.PID())
	for _, r := range resources {
		l, ok := ls[r.number]
		if !ok {
			continue
		}
		var old unix.Rlimit
		if err := unix.Prlimit(pid, r.number, &l, &old); err != nil {
			return fmt.Errorf("prlimit %s: %w", r.name, err)
		}
		undo = append(undo, func() { _ = unix.Prlimit(pid, r.number, &old, nil) })
	}
	now, err := p.RLimits()
	if err != nil {
		return err
	}
	if !p.Alive() { // or it was another that had the number since
		return identity.ErrGone
	}
	for number, l := range ls {
		if now[number] != l {
			return fmt.Errorf("limits read back: %w", unix.EAGAIN)
		}
	}
	return nil
}

// without returns which of the limits ls change when what e gave is taken away, and
// to what. What is above that somebody else has given, what is not above Old is no
// more than there was.
func (e *entry) without(ls identity.RLimits) identity.RLimits {
	changed := identity.RLimits{}
	for number, given := range e.Given {
		if number == unix.RLIMIT_RTTIME {
			continue
		}
		l, old := ls[number], e.Old[number]
		if l.Max > old.Max && l.Max <= given.Max {
			l.Max = old.Max
		}
		if l.Cur > old.Cur && l.Cur <= given.Cur {
			l.Cur = old.Cur
		}
		if l.Cur = min(l.Cur, l.Max); l != ls[number] {
			changed[number] = l
		}
	}
	return changed
}

// unbound returns the RLIMIT_RTTIME to put back, and whether it is as it was given:
// a lower one is the process's own doing.
func (e *entry) unbound(ls identity.RLimits) (unix.Rlimit, bool) {
	now, given, old := ls[unix.RLIMIT_RTTIME], e.Given[unix.RLIMIT_RTTIME], e.Old[unix.RLIMIT_RTTIME]
	if now.Max != given.Max {
		return now, false
	}
	if now.Cur == given.Cur {
		now.Cur = old.Cur
	}
	now.Max = old.Max
	return now, true
}

// Over reports whether a requestor has privilege over the processes of a user of a
// container that lies around one over which it has, or within, or is that one's own.
type Over func(uid uint32, c identity.Container) bool

// Revoke takes back what p was given, from it and from all its descendants in its
// container, and makes their threads SCHED_OTHER at nice 0 but those that hold a
// grant of their own. Memory that they have locked stays locked. It returns the pids,
// in the daemon's numbers, of descendants that it could not reach, which are not
// touched: those that have left the container, or could not be looked at. A descendant
// stands for a process that has ended, if the requestor has privilege over that one's
// owner: the number by which it is known anybody can take on. It returns an *api.Error: NotFound if p was
// given nothing, Unsupported without CAP_SYS_RESOURCE, Busy if the descendants
// multiply too fast, and then is to be asked again.
func (g *Grants) Revoke(d privcheck.Decision, p *identity.Process, over Over) (unreached []int32, err error) {
	if !d.Allowed() {
		return nil, api.Errorf(api.Denied, "take limits back: not decided")
	}
	e, err := g.of(p, over)
	if err != nil {
		return nil, forRequestor(err)
	}
	return g.revoke(e, time.Time{})
}

// RevokeAll is Revoke for everything that was given, for a daemon that ends.
func (g *Grants) RevokeAll() (unreached []int32, err error) {
	g.mu.Lock()
	all := slices.Clone(g.entries)
	g.mu.Unlock()
	var errs []error
	until := time.Now().Add(chaseTime)
	// The latest first: what they had inherited is another's.
	for _, e := range slices.Backward(all) {
		u, err := g.revoke(e, until)
		unreached = append(unreached, u...)
		errs = append(errs, err)
	}
	slices.Sort(unreached)
	return slices.Compact(unreached), errors.Join(errs...)
}

// of finds the entry that p stands for.
func (g *Grants) of(p *identity.Process, over Over) (*entry, error) {
	started, err := p.Started()
	if err != nil {
		return nil, err
	}
	ls, err := p.RLimits()
	if err != nil {
		return nil, err
	}
	n, err := g.host.Nesting(p)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if e := g.findLocked(p.PID(), started); e != nil {
		return e, nil
	}
	for _, e := range g.entries {
		if ls[unix.RLIMIT_RTTIME].Max != e.Mark || !n.Within(e.Container) || !over(e.UID, e.Container) {
			continue
		}
		if !e.ended() {
			return nil, api.Errorf(api.NotFound, "the process has its limits from another one, to which they were given").
				WithHint("take them back from that one")
		}
		return e, nil
	}
	return nil, api.Errorf(api.NotFound, "the process was given no limits")
}

// ended reports whether the process that was given the limits has ended.
func (e *entry) ended() bool {
	p, err := identity.Open(e.PID, -1)
	if err != nil {
		return errors.Is(err, identity.ErrGone)
	}
	defer p.Close()
	started, err := p.Started()
	return errors.Is(err, identity.ErrGone) || err == nil && started != e.Started
}

// revoke takes back what an entry says. until, if it is not zero, is when those who
// fork and end all the time are chased no more.
func (g *Grants) revoke(e *entry, until time.Time) ([]int32, error) {
	if err := privileged(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	if !slices.Contains(g.entries, e) {
		g.mu.Unlock()
		return nil, api.Errorf(api.NotFound, "its limits have been taken back")
	}
	if e.revoking {
		g.mu.Unlock()
		return nil, revoking()
	}
	e.revoking = true
	s := g.searchLocked(e)
	s.until = until
	g.mu.Unlock()

	err := s.takeBack()

	g.mu.Lock()
	defer g.mu.Unlock()
	e.revoking = false
	if err != nil {
		return s.unreached(), forRequestor(err)
	}
	if err := g.dropLocked(e); err != nil {
		return s.unreached(), forRequestor(err)
	}
	return s.unreached(), nil
}

// dropLocked forgets entries.
func (g *Grants) dropLocked(gone ...*entry) error {
	g.entries = slices.DeleteFunc(g.entries, func(e *entry) bool { return slices.Contains(gone, e) })
	return g.file.write(g.entries)
}

// Given is an entry of List.
type Given struct {
	// PID and UID are the daemon's numbers of the process and its owner. It may have
	// ended, with descendants left.
	PID     int32
	UID     uint32
	Started uint64
	// Since is when it was given, in seconds since 1970.
	Since int64
	// Limits are by name, as Give returned them.
	Limits map[string]string
}

// List returns what is given, the oldest first. What nobody has any more goes by
// and by.
func (g *Grants) List() []Given {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pruneLocked()
	out := make([]Given, 0, len(g.entries))
	for _, e := range g.entries {
		out = append(out, Given{PID: e.PID, UID: e.UID, Started: e.Started, Since: e.Since, Limits: e.words()})
	}
	slices.SortStableFunc(out, func(a, b Given) int { return cmp.Compare(a.Since, b.Since) })
	return out
}

// Descendants of processes that have ended are looked for this often, and for so long:
// what is left over has its turn the next time.
const (
	pruneEvery = 5 * time.Second
	pruneTime  = 100 * time.Millisecond
)

// pruneLocked forgets processes that have ended and left no descendants. It reports
// whether there were any.
func (g *Grants) pruneLocked() bool {
	begun := time.Now()
	if begun.Sub(g.pruned) < pruneEvery {
		return false
	}
	var gone []*entry
	for n := 0; n < len(g.entries) && time.Since(begun) < pruneTime; n++ {
		e := g.entries[g.next%len(g.entries)]
		g.next++
		if e.revoking || !e.ended() {
			continue
		}
		if left, err := g.searchLocked(e).any(); err == nil && !left {
			gone = append(gone, e)
		}
	}
	if len(gone) > 0 {
		_ = g.dropLocked(gone...) // else the next daemon finds out
	}
	g.pruned = time.Now()
	return len(gone) > 0
}
