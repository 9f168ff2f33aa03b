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

// named is the thread that a request names, and its process; or the process alone.
type named struct {
	*call
	// subject is what errors call it.
	subject string
	proc    *identity.Process // the call's
	process rt.Process
	// leader is the process's first thread, until it is the thread itself.
	leader *identity.Thread
	thread *identity.Thread
	tid    int32
}

func threadSubject(id uint64) string {
	if id == 0 {
		return "the first thread"
	}
	return "thread " + strconv.FormatUint(id, 10)
}

func (n *named) close() {
	for _, t := range []*identity.Thread{n.thread, n.leader} {
		if t != nil {
			t.Close()
		}
	}
}

// name is the thread's, once it is open.
func (n *named) name() rt.Thread {
	return rt.Thread{Process: n.process, TID: n.thread.TID(), ThreadStarted: n.thread.Started()}
}

// open finds the process that a client of rtkit's names.
func (n *named) open(t api.Thread) error {
	if t.Own || t.Process == 1<<32-1 || t.Process == 1<<64-1 {
		return n.hold(n.r().proc)
	}
	pid, err := n.number(t.Process)
	if err != nil {
		return err
	}
	p, err := identity.Open(pid, -1)
	if err != nil {
		return gone(err)
	}
	n.call.close = append(n.call.close, p)
	if err := n.isNumber(pid, t.Process); err != nil {
		return err
	}
	return n.hold(p)
}

// openAround finds the process of a thread.
func (n *named) openAround(thread uint64) error {
	tid, err := n.number(thread)
	if err != nil {
		return err
	}
	t, err := identity.OpenTask(tid)
	if err != nil {
		return gone(err)
	}
	n.call.close = append(n.call.close, t)
	return n.hold(t.Process)
}

// openThread finds the thread, 0 the process's first one.
func (n *named) openThread(id uint64) (err error) {
	tid := n.proc.PID()
	if id != 0 {
		if tid, err = n.number(id); err != nil {
			return err
		}
	}
	if tid == n.leader.TID() {
		n.thread, n.leader = n.leader, nil
	} else if n.thread, err = n.proc.Thread(tid); err != nil {
		return err
	}
	n.tid = tid
	if id == 0 {
		return nil
	}
	return n.isNumber(tid, id)
}

// gone is err; a number that is no process's is that of none that is left.
func gone(err error) error {
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return identity.ErrGone
	}
	return err
}

func (n *named) hold(p *identity.Process) (err error) {
	n.proc = p
	if !p.Alive() {
		return identity.ErrGone
	}
	if n.leader, err = p.Thread(p.PID()); err != nil {
		return err
	}
	n.process = rt.Process{PID: p.PID(), Started: n.leader.Started()}
	return nil
}

// number returns the daemon's number for one of the requestor's. It is a hint:
// isNumber proves it once there is a handle.
func (n *named) number(id uint64) (int32, error) {
	if id > 1<<31-1 {
		return 0, identity.ErrGone // nobody has it, and it is not cut short
	}
	pid, ok := n.m.host.HostPID(n.r().proc, int64(id))
	if !ok {
		return 0, identity.ErrGone
	}
	return pid, nil
}

func (n *named) isNumber(here int32, id uint64) error {
	if pid, ok := n.m.host.PIDIn(n.r().proc, here); !ok || uint64(pid) != id {
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
		UID: bg.UID, EGID: bg.EGID, Groups: bg.Groups, Program: bg.Program, Container: bg.Container, Root: bg.Root, Maker: bg.Maker,
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
