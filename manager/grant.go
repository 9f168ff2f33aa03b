package manager

import (
	"errors"
	"fmt"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt"
	"cgmanager/privcheck"
)

// MakeThreadRealtime implements api.RealtimeKit1.
func (m *Manager) MakeThreadRealtime(rq *api.Request, t api.Thread, priority uint32) error {
	return m.makeThread("MakeThreadRealtime", rq, t, rt.Want{Policy: rt.Any, Level: rt.ClampLevel(priority)})
}

// MakeThreadHighPriority implements api.RealtimeKit1.
func (m *Manager) MakeThreadHighPriority(rq *api.Request, t api.Thread, nice int32) error {
	return m.makeThread("MakeThreadHighPriority", rq, t, rt.Want{Policy: unix.SCHED_NORMAL, Level: nice})
}

// makeThread answers as rtkit does: who asks is not told more than an errno.
func (m *Manager) makeThread(op string, rq *api.Request, t api.Thread, w rt.Want) (err error) {
	c, err := m.beginRealtime(op, rq)
	if errors.Is(err, errUnknown) {
		// What rtkit says when the bus cannot tell it who asks.
		return &api.Error{Kind: api.Internal, Text: api.AsError(err).Text, Cause: err}
	}
	if err != nil {
		return err
	}
	defer c.release()
	return c.grant(w, threadSubject(t.ID), func(n *named) error { return n.open(t) }, func(n *named) error { return n.openThread(t.ID) })
}

// Grant implements api.CGManager1.
func (m *Manager) Grant(rq *api.Request, thread uint32, scheduling string, level int32) error {
	policies := map[string]int32{"rr": unix.SCHED_RR, "fifo": unix.SCHED_FIFO, "other": unix.SCHED_NORMAL}
	w, ok := policies[scheduling]
	if !ok {
		return api.Errorf(api.Invalid, "Grant %d: no such policy: %q", thread, scheduling).WithHint("rr, fifo, or other with a nice level")
	}
	c, err := m.beginRealtime("Grant", rq)
	if err != nil {
		return err
	}
	defer c.release()
	id := uint64(thread)
	return c.grant(rt.Want{Policy: w, Level: level}, threadSubject(id), func(n *named) error { return n.openAround(id) }, func(n *named) error { return n.openThread(id) })
}

// grant makes a grant. The order of what is asked is rtkit's (docs/REALTIME.md),
// and so is that the first thing that is not in order is what the requestor is told.
func (c *call) grant(w rt.Want, subject string, openProcess, openThread func(*named) error) (err error) {
	n := &named{call: c, subject: subject}
	defer n.close()
	s := c.m.rt
	accounts, err := c.chargedTo()
	if err != nil {
		return err
	}
	fail := func(err error) error { return c.realtime(subject, err) }
	if err := s.CheckUsers(accounts); err != nil {
		return fail(err)
	}
	if err := openProcess(n); err != nil {
		return fail(err)
	}
	if err := s.CheckProcess(accounts, n.process); err != nil {
		return fail(err)
	}
	if err := openThread(n); err != nil {
		return fail(err)
	}
	place, err := s.Reserve(accounts, n.name())
	if err != nil {
		return fail(err)
	}
	defer place.Cancel()
	target, err := c.m.target(n.proc)
	if err != nil {
		return fail(err)
	}
	// Bytes that root wrote to somebody's connection are not root's request.
	var a rt.Allowance
	var to identity.Scheduling
	for _, p := range c.askers() {
		if a, err = s.Allow(&rt.Asker{
			UID: p.cred.UID, Accounts: accounts, HostRoot: p.r.HostRoot(), Outside: p.r.Outside(), Target: target, Process: n.process,
		}, w); err != nil {
			return fail(err)
		}
		if to, err = a.Fit(w); err != nil {
			return fail(err)
		}
	}
	r := c.r()
	if err := s.Act(accounts); err != nil {
		return fail(err)
	}
	if err := s.Ready(); err != nil {
		return fail(err)
	}
	order := &rt.Order{Reservation: place, Thread: n.thread, To: to, Share: a.Share, UID: r.cred.UID}
	if s.Budgets() {
		order.Top = c.lender()
	}
	var last privcheck.Decision
	order.Verify = func() (privcheck.Decision, error) {
		last, err = n.verify(w.Policy)
		return last, err
	}
	if err := s.Grant(order); err != nil {
		return fail(err)
	}
	n.thread = nil // the service's
	c.granted(n, to, last, a.By)
	return nil
}

// granted writes the audit line.
func (c *call) granted(n *named, to identity.Scheduling, d privcheck.Decision, by string) {
	if !c.m.log.IsLevelEnabled(logrus.InfoLevel) {
		return
	}
	f := c.fields(n.subject, d)
	f["by"] = by
	tid, pid, uid := n.tid, n.proc.PID(), c.r().cred.UID
	if to.Policy == unix.SCHED_NORMAL {
		c.m.log.WithFields(f).Infof("Successfully made thread %d of process %d owned by '%d' high priority at nice level %d.", tid, pid, uid, to.Nice)
		return
	}
	c.m.log.WithFields(f).Infof("Successfully made thread %d of process %d owned by '%d' RT at priority %d.", tid, pid, uid, to.Priority)
}

// verify makes sure of all on which a grant depends.
func (n *named) verify(scheduling int32) (privcheck.Decision, error) {
	d, err := n.overProcess(n.subject, n.proc)
	if err != nil {
		return d, err
	}
	if scheduling != unix.SCHED_NORMAL {
		max, limited, err := n.proc.RTTimeMax()
		if err != nil {
			return privcheck.Decision{}, errors.Join(rt.ErrChanged, err)
		}
		if bound := n.m.rt.RTTimeMax; !limited || max > bound {
			return privcheck.Decision{}, api.Errorf(api.Denied, "the process's hard RLIMIT_RTTIME is not %d us or less", bound).
				WithHint(fmt.Sprintf("set it first: prlimit --rttime=%d, or setrlimit(2)", bound))
		}
	}
	// The handle on the process is of that one alone, so it is the same if it is alive.
	if !n.proc.Alive() || !n.thread.Alive() {
		return privcheck.Decision{}, rt.ErrChanged
	}
	return d, nil
}

// lender returns the cgroup from which, and from those below it, realtime runtime may
// be taken for the requestor: the host's root for one of the host, and for one of a
// container the cgroup of the container's first process, if the requestor's is in or
// below that. It is "" for a container that has no cgroup of its own: its threads have
// runtime where they are, or get none.
func (c *call) lender() string {
	cpu, ok := c.m.set.ByController("cpu")
	if !ok {
		return ""
	}
	r := c.r()
	if !r.r.Outside() {
		return "/"
	}
	own := r.own(cpu)
	if own == "/" {
		return ""
	}
	if first, ok := c.m.host.HostPID(r.proc, 1); ok {
		if at := c.cgroupOfFirst(first, cpu); at != "/" && privcheck.Below(at, own) {
			return at
		}
	}
	return own
}

// cgroupOfFirst returns where the first process of the requestor's pid namespace
// is, "" if that is not the first process of the requestor's container.
func (c *call) cgroupOfFirst(pid int32, h *cgfs.Hierarchy) string {
	p, err := identity.Open(pid, -1)
	if err != nil {
		return ""
	}
	defer p.Close()
	r := c.r()
	theirs, err := c.m.host.Nesting(p)
	own, oerr := c.m.host.Nesting(r.proc)
	if err != nil || oerr != nil || !theirs.Encloses(own) || !own.Encloses(theirs) {
		return ""
	}
	cgroups, err := p.Cgroups()
	if err != nil || !p.Alive() || p.LeaderExiting() {
		return ""
	}
	at, _ := cgroups.Cgroup(h)
	return at
}
