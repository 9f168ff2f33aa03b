package manager

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt"
	"cgmanager/privcheck"
)

var errRealtime = api.Errorf(api.Unsupported, "realtime is not served by this daemon")

// KeepGrants has Close leave what is granted of realtime to the next daemon.
func (m *Manager) KeepGrants() { m.keepGrants = true }

// ReloadRealtime reads the policy file again. The service's log says what came of it.
func (m *Manager) ReloadRealtime() {
	if m.rt != nil {
		_ = m.rt.Reload() // what it said before holds
	}
}

// ResumeRealtime grants again after Exit.
func (m *Manager) ResumeRealtime() {
	if m.rt != nil {
		m.rt.Resume()
	}
}

// RealtimeRefused implements api.RealtimeKit1. Who asks is only looked at while
// somebody is refused.
func (m *Manager) RealtimeRefused(rq *api.Request) error {
	if m.rt == nil {
		return errRealtime
	}
	if !m.rt.Exited() && !m.rt.Refusing() {
		return nil
	}
	c, err := m.beginAnywhere("RealtimeKit1", rq)
	if err != nil {
		return nil // the request itself will say so
	}
	defer c.release()
	return c.refusedForNow()
}

// refusedForNow returns the error with which the requestor is refused whatever it
// asks for.
func (c *call) refusedForNow() error {
	if c.m.rt.Exited() {
		return c.realtime("", rt.ErrExited)
	}
	accounts, err := c.chargedTo()
	if err != nil {
		return err
	}
	left := c.m.rt.Refused(accounts)
	if left <= 0 {
		return nil
	}
	const reason = "Recovering from system lockup, not allowing further RT threads."
	c.refused("", requestor, privcheck.Decision{}, reason)
	return api.Errorf(api.Denied, "%s: recovering from a lockup, nothing is granted for another %d s", c.op, int(left.Seconds())+1)
}

// askers are those who ask: all parties but the proxies, who act for others.
func (c *call) askers() []*party {
	var all []*party
	for i := range c.parties {
		if p := &c.parties[i]; p.role != proxy || i == 0 {
			all = append(all, p)
		}
	}
	return all
}

// chargedTo names the accounts of those who ask.
func (c *call) chargedTo() ([]string, error) {
	var all []string
	for _, p := range c.askers() {
		names, err := c.m.accounts(p.proc, p.cred.UID)
		if err != nil {
			return nil, err
		}
		if len(names) == 0 {
			names = []string{"uid:0"} // nobody is without limits here
		}
		if names, err = c.m.ofContainer(names, p); err != nil {
			return nil, err
		}
		for _, n := range names {
			if !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	return all, nil
}

// ofContainer has the uid of one in a container be its container's own: the host's
// user with that number, and those of other containers, are others. What it gains is
// bounded by the container's account. The uid of who made the container stays.
func (m *Manager) ofContainer(names []string, p *party) ([]string, error) {
	outermost := ""
	for _, n := range names {
		if !strings.HasPrefix(n, "uid:") {
			outermost = n
		}
	}
	if outermost == "" {
		return names, nil
	}
	makers, err := m.host.Makers(p.proc)
	if err != nil || slices.Contains(makers, p.cred.UID) && p.cred.UID != 0 {
		return names, err
	}
	own := fmt.Sprintf("uid:%d", p.cred.UID)
	for i, n := range names {
		if n == own {
			names[i] = own + "@" + outermost
		}
	}
	return names, nil
}

// realtime turns what goes wrong with a request about realtime into an error for
// the requestor, and writes the audit line of a refusal.
func (c *call) realtime(subject string, err error) error {
	if d, ok := errors.AsType[*decided](err); ok {
		return d.Unwrap()
	}
	what := c.op
	if subject != "" {
		what += " " + subject
	}
	if e, ok := errors.AsType[*api.Error](err); ok {
		if e.Kind == api.Denied || e.Kind == api.Limit {
			c.refused(subject, requestor, privcheck.Decision{}, e.Text)
		}
		if e.Kind == api.Internal {
			c.failed(subject, cmp.Or(e.Cause, err))
		}
		told := *e
		told.Text = what + ": " + e.Text
		return &told
	}
	e := &api.Error{Kind: api.Denied, Cause: err}
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
	}
	reason := ""
	switch {
	case is(identity.ErrGone):
		e.Kind, reason = api.NotFound, "it does not exist, or is not in your pid namespace"
	case is(rt.ErrUsers, rt.ErrProcesses, rt.ErrThreads, rt.ErrTotal, rt.ErrBurst, rt.ErrAsking):
		e.Kind, reason = api.Limit, err.Error()
	case is(rt.ErrRange):
		e.Kind, reason = api.Invalid, err.Error()
	case is(rt.ErrNotAllowed):
		reason, e.Hint = rt.ErrNotAllowed.Error(), "the host's administrator can add a rule to its realtime.toml"
	case is(rt.ErrBeyond):
		reason, e.Hint = err.Error(), "cgm rt status shows the bounds; the host's administrator can add a rule to its realtime.toml"
	case is(rt.ErrExited):
		reason, e.Hint = err.Error(), "the host's administrator can start it again: rtkitctl --start, or without a system bus SIGUSR1 to the daemon"
	case is(rt.ErrChanged, rt.ErrNoLimits):
		reason = err.Error()
	case is(rt.ErrUnwatched):
		reason = rt.ErrUnwatched.Error()
	case is(unix.EPERM, unix.EACCES):
		reason = "the kernel refuses"
	default:
		return c.kernel(subject, err)
	}
	if e.Kind == api.Denied || e.Kind == api.Limit {
		c.refused(subject, requestor, privcheck.Decision{}, err.Error())
	}
	e.Text = what + ": " + reason
	return e
}

// decided is a refusal of decide's: it has its text, and its audit line.
type decided struct{ error }

func (d *decided) Unwrap() error { return d.error }

// beginServed is beginAnywhere, for requests that are refused where realtime is not served.
func (m *Manager) beginServed(op string, rq *api.Request) (*call, error) {
	if m.rt == nil {
		return nil, errRealtime
	}
	return m.beginAnywhere(op, rq)
}

// beginRealtime is beginServed, for requests that are also refused while the
// requestor is refused for now.
func (m *Manager) beginRealtime(op string, rq *api.Request) (*call, error) {
	c, err := m.beginServed(op, rq)
	if err != nil {
		return nil, err
	}
	if m.rt.Exited() || m.rt.Refusing() {
		if err := c.refusedForNow(); err != nil {
			c.release()
			return nil, err
		}
	}
	return c, nil
}

// Revoke implements api.CGManager1.
func (m *Manager) Revoke(rq *api.Request, thread uint32) error {
	c, err := m.beginServed("Revoke", rq)
	if err != nil {
		return err
	}
	defer c.release()
	id := uint64(thread)
	n := &named{call: c, subject: threadSubject(id)}
	defer n.close()
	if err := n.openAround(id); err != nil {
		return c.realtime(n.subject, err)
	}
	if err := n.openThread(id); err != nil {
		return c.realtime(n.subject, err)
	}
	d, err := c.overProcess(n.subject, n.proc)
	if err != nil {
		return c.realtime(n.subject, err)
	}
	has, ok := m.rt.Of(n.name())
	if !ok {
		return api.Errorf(api.NotFound, "Revoke %s: nothing was granted to it", n.subject)
	}
	m.rt.Revoke(has)
	m.log.WithFields(c.fields(n.subject, d)).Info("done")
	return nil
}

// ListGrants implements api.CGManager1.
func (m *Manager) ListGrants(rq *api.Request) ([]api.Grant, error) {
	c, err := m.beginServed("ListGrants", rq)
	if err != nil {
		return nil, err
	}
	defer c.release()
	visible := map[rt.Process]api.Grant{}
	for _, name := range m.rt.Processes() {
		if p, ok := c.entry(name.PID, name); ok {
			visible[name] = p
		}
	}
	var all []api.Grant
	for _, g := range m.rt.Current(func(p rt.Process) bool { _, ok := visible[p]; return ok }) {
		p := visible[g.Thread.Process]
		tid, ok := m.host.PIDIn(c.r().proc, g.Thread.TID)
		if !ok {
			continue
		}
		p.TID, p.Since, p.CPU = tid, g.Since.Unix(), uint64(m.rt.Used(&g).Microseconds())
		p.Policy, p.Level, p.State = "rr", g.Priority, "granted"
		switch g.Policy {
		case unix.SCHED_FIFO:
			p.Policy = "fifo"
		case unix.SCHED_NORMAL:
			p.Policy, p.Level = "other", g.Nice
		}
		if g.Demoted {
			p.State = "demoted"
		}
		all = append(all, p)
	}
	for _, g := range m.rt.Given() {
		if p, ok := c.entry(g.PID, rt.Process{PID: g.PID, Started: g.Started}); ok {
			p.Policy, p.Since, p.State = "limits", g.Since, "granted"
			if level, err := strconv.ParseInt(g.Limits["rtprio"], 10, 32); err == nil {
				p.Level = int32(level)
			}
			all = append(all, p)
		}
	}
	slices.SortStableFunc(all, func(a, b api.Grant) int { return cmp.Compare(a.Since, b.Since) })
	return all, nil
}

// entry begins an entry of ListGrants, if the process is the one that is named and
// every party has privilege over it.
func (c *call) entry(pid int32, name rt.Process) (g api.Grant, ok bool) {
	p, err := identity.Open(pid, -1)
	if err != nil {
		return g, false
	}
	defer p.Close()
	// First what costs least: there may be thousands that a container does not see.
	if g.PID, ok = c.m.host.PIDIn(c.r().proc, pid); !ok {
		return g, false
	}
	st, err := p.Status()
	if err != nil {
		return g, false
	}
	facts, err := c.realtimeFacts(p)
	if err != nil {
		return g, false
	}
	for i := range c.parties {
		if who := &c.parties[i]; !privcheck.Realtime(who.r, facts(who)).Allowed() {
			return g, false
		}
	}
	if now, err := rt.ProcessOf(p); err != nil || now != name {
		return g, false
	}
	g.UID, _ = c.r().r.UIDs.ToInside(st.UIDs[1])
	return g, true
}

// GrantLimits implements api.CGManager1.
func (m *Manager) GrantLimits(rq *api.Request, pid uint32) (map[string]string, error) {
	c, err := m.beginRealtime("GrantLimits", rq)
	if err != nil {
		return nil, err
	}
	defer c.release()
	n, d, err := c.limited(pid)
	if err != nil {
		return nil, err
	}
	target, err := m.target(n.proc)
	if err != nil {
		return nil, c.realtime(n.subject, err)
	}
	accounts, err := c.chargedTo()
	if err != nil {
		return nil, err
	}
	given, err := m.rt.GrantLimits(d, n.proc, target, accounts)
	if err != nil {
		return nil, c.realtime(n.subject, err)
	}
	m.log.WithFields(c.fields(n.subject, d)).WithField("limits", given).Info("done")
	return given, nil
}

// limited finds the process whose limits are to be changed, and asks clause 10.
func (c *call) limited(pid uint32) (*named, privcheck.Decision, error) {
	n := &named{call: c, subject: "process " + strconv.FormatUint(uint64(pid), 10)}
	defer n.close() // nothing is asked about its threads
	if err := n.open(api.Thread{Process: uint64(pid)}); err != nil {
		return nil, privcheck.Decision{}, c.realtime(n.subject, err)
	}
	d, err := c.overProcess(n.subject, n.proc)
	if err != nil {
		return nil, d, c.realtime(n.subject, err)
	}
	return n, d, nil
}

// RevokeLimits implements api.CGManager1. Of those that it could not reach the ones
// that the requestor cannot see are 0.
func (m *Manager) RevokeLimits(rq *api.Request, pid uint32) ([]uint32, error) {
	c, err := m.beginServed("RevokeLimits", rq)
	if err != nil {
		return nil, err
	}
	defer c.release()
	n, d, err := c.limited(pid)
	if err != nil {
		return nil, err
	}
	left, err := m.rt.RevokeLimits(d, n.proc, c.overUser)
	if err != nil {
		return nil, c.realtime(n.subject, err)
	}
	unreached := make([]uint32, 0, len(left))
	for _, pid := range left {
		n, _ := m.host.PIDIn(c.r().proc, pid)
		unreached = append(unreached, n)
	}
	m.log.WithFields(c.fields(n.subject, d)).WithField("unreached", left).Info("done")
	return unreached, nil
}

// overUser asks clause 10 about the processes of a user of a container, as limits.Over.
func (c *call) overUser(uid uint32, in identity.Container) bool {
	for i := range c.parties {
		who := &c.parties[i]
		around, err := c.m.host.Nesting(who.proc)
		t := privcheck.RealtimeTask{Visible: true, Within: true, UIDs: []uint32{uid}}
		if err != nil || !around.Around(in) || !privcheck.Realtime(who.r, t).Allowed() {
			return false
		}
	}
	return true
}

// ResetKnown implements api.RealtimeKit1.
func (m *Manager) ResetKnown(rq *api.Request) error {
	return m.reset("ResetKnown", rq, func() (int, error) { return m.rt.RevokeAll(), nil })
}

// ResetAll implements api.RealtimeKit1.
func (m *Manager) ResetAll(rq *api.Request) error {
	return m.reset("ResetAll", rq, func() (int, error) { return m.rt.ResetAll() })
}

// Exit implements api.RealtimeKit1.
func (m *Manager) Exit(rq *api.Request) error {
	return m.reset("Exit", rq, func() (int, error) { return m.rt.Exit(), nil })
}

// reset does what concerns everybody. Nobody is refused it for now: it is what ends a
// lockup.
func (m *Manager) reset(op string, rq *api.Request, act func() (int, error)) error {
	c, err := m.beginServed(op, rq)
	if err != nil {
		return err
	}
	defer c.release()
	d, err := c.decide("", func(p *party) privcheck.Decision { return privcheck.RealtimeAll(p.r) })
	if err != nil {
		return err
	}
	n, err := act()
	if err != nil {
		return c.realtime("", err)
	}
	m.log.WithFields(c.fields("", d)).Infof("Demoted %d threads.", n)
	return nil
}

// RealtimeProperties implements api.RealtimeKit1.
func (m *Manager) RealtimeProperties(rq *api.Request) (api.RealtimeProperties, error) {
	if m.rt == nil {
		return api.RealtimeProperties{}, errRealtime
	}
	p := api.RealtimeProperties{
		RTTimeUSecMax: int64(m.rt.RTTimeMax), MaxRealtimePriority: m.rt.MaxPriority, MinNiceLevel: m.rt.MinNice,
	}
	c, err := m.beginAnywhere("Get", rq)
	if err != nil {
		return p, err
	}
	defer c.release()
	target, err := m.target(c.r().proc)
	if err != nil {
		return p, c.realtime("", err)
	}
	p.MaxRealtimePriority, p.MinNiceLevel = m.rt.Bounds(target)
	return p, nil
}
