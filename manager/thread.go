package manager

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt"
	"cgmanager/manager/rt/policy"
	"cgmanager/privcheck"
)

// granting is a grant on its way.
type granting struct {
	*call
	subject string
	proc    *identity.Process
	process rt.Process
	leader  *identity.Thread // the process's first one, until it is the thread
	thread  *identity.Thread
	tid     int32
	want    rt.Want
}

func threadSubject(id uint64) string {
	if id == 0 {
		return "the first thread"
	}
	return "thread " + strconv.FormatUint(id, 10)
}

func (g *granting) close() {
	for _, t := range []*identity.Thread{g.thread, g.leader} {
		if t != nil {
			t.Close()
		}
	}
}

// open finds the process that a client of rtkit's names.
func (g *granting) open(t api.Thread) error {
	if t.Own || t.Process == 1<<32-1 || t.Process == 1<<64-1 {
		return g.hold(g.r().proc)
	}
	pid, err := g.number(t.Process)
	if err != nil {
		return err
	}
	p, err := identity.Open(pid, -1)
	if err != nil {
		return gone(err)
	}
	g.call.close = append(g.call.close, p)
	if err := g.isNumber(pid, t.Process); err != nil {
		return err
	}
	return g.hold(p)
}

// openAround finds the process of a thread.
func (g *granting) openAround(thread uint64) error {
	tid, err := g.number(thread)
	if err != nil {
		return err
	}
	t, err := identity.OpenTask(tid)
	if err != nil {
		return gone(err)
	}
	g.call.close = append(g.call.close, t)
	return g.hold(t.Process)
}

// openThread finds the thread, 0 the process's first one.
func (g *granting) openThread(id uint64) (err error) {
	tid := g.proc.PID()
	if id != 0 {
		if tid, err = g.number(id); err != nil {
			return err
		}
	}
	if tid == g.leader.TID() {
		g.thread, g.leader = g.leader, nil
	} else if g.thread, err = g.proc.Thread(tid); err != nil {
		return err
	}
	g.tid = tid
	if id == 0 {
		return nil
	}
	return g.isNumber(tid, id)
}

// gone is err; a number that is no process's is that of none that is left.
func gone(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return identity.ErrGone
	}
	return err
}

func (g *granting) hold(p *identity.Process) (err error) {
	g.proc = p
	if !p.Alive() {
		return identity.ErrGone
	}
	if g.leader, err = p.Thread(p.PID()); err != nil {
		return err
	}
	g.process = rt.Process{PID: p.PID(), Started: g.leader.Started()}
	return nil
}

// number returns the daemon's number for one of the requestor's. It is a hint:
// isNumber proves it once there is a handle.
func (g *granting) number(id uint64) (int32, error) {
	if id > 1<<31-1 {
		return 0, identity.ErrGone // nobody has it, and it is not cut short
	}
	n, ok := g.m.host.HostPID(g.r().proc, int64(id))
	if !ok {
		return 0, identity.ErrGone
	}
	return n, nil
}

func (g *granting) isNumber(here int32, id uint64) error {
	if n, ok := g.m.host.PIDIn(g.r().proc, here); !ok || uint64(n) != id {
		return identity.ErrGone
	}
	return nil
}

// target is what the policy asks about a process.
func (m *Manager) target(p *identity.Process) (policy.Target, error) {
	bg, err := m.host.Background(p)
	if err == nil && !p.Alive() {
		err = identity.ErrGone
	}
	return policy.Target{
		UID: bg.UID, EGID: bg.EGID, Groups: bg.Groups, Program: bg.Program, Container: bg.Container, Root: bg.Root,
	}, err
}

// overProcess asks clause 10 about a process, for every party.
func (c *call) overProcess(subject string, p *identity.Process) (privcheck.Decision, error) {
	facts, err := c.realtimeFacts(p)
	if err != nil {
		return privcheck.Decision{}, err
	}
	d, err := c.decide(subject, func(who *party) privcheck.Decision { return privcheck.Realtime(who.r, facts(who)) })
	if err != nil {
		return d, &decided{err}
	}
	return d, nil
}

// realtimeFacts gathers what clause 10 asks of a process.
func (c *call) realtimeFacts(p *identity.Process) (func(who *party) privcheck.RealtimeTask, error) {
	uids, err := (&identity.Task{Process: p}).Owners()
	if err != nil {
		return nil, err
	}
	at, err := c.m.host.Nesting(p)
	if err != nil {
		return nil, err
	}
	tasks := make(map[*party]privcheck.RealtimeTask, len(c.parties))
	for i := range c.parties {
		who := &c.parties[i]
		around, err := c.m.host.Nesting(who.proc)
		if err != nil {
			return nil, err
		}
		t := privcheck.RealtimeTask{Within: around.EnclosesUser(at)}
		_, t.Visible = c.m.host.PIDIn(who.proc, p.PID())
		for j := range uids {
			t.UIDs = append(t.UIDs, uids[j][:]...)
		}
		tasks[who] = t
	}
	if !p.Alive() {
		return nil, identity.ErrGone
	}
	return func(who *party) privcheck.RealtimeTask { return tasks[who] }, nil
}
