package manager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

// Move implements api.CGManager1.
func (m *Manager) Move(rq *api.Request, name string, pid uint32) error {
	return m.moveTo("Move", rq, name, func(c *call) (*victim, error) {
		return c.victim(api.Victim{PID: int64(pid)})
	})
}

// MoveFd implements api.CGManager1.
func (m *Manager) MoveFd(rq *api.Request, name string, pidfd int) error {
	return m.moveTo("MoveFd", rq, name, func(c *call) (*victim, error) {
		t, err := identity.TaskOf(pidfd)
		if err != nil {
			return nil, api.Errorf(api.Invalid, "MoveFd %q: the descriptor is not a pidfd of a living process", name).WithCause(err)
		}
		c.close = append(c.close, t)
		return &victim{Task: t, subject: "the process of the descriptor"}, nil
	})
}

func (m *Manager) moveTo(op string, rq *api.Request, name string, who func(*call) (*victim, error)) error {
	return settled(func() (err error) {
		c, err := m.begin(op, rq)
		if err != nil {
			return err
		}
		defer c.end(&err)
		v, err := who(c)
		if err != nil {
			return err
		}
		places, err := c.existing(name)
		if err != nil {
			return err
		}
		return c.move(v, places, c.moveDecision)
	})
}

// errMoved says that the victim is not any more where, or whose, it was when it was
// decided upon.
var errMoved = errors.New("it was moved between decision and act")

// settled tries again what fails with errMoved, for a tenth of a second. Each try
// gathers all facts anew, where the requestor is as well: who was jailed meanwhile asks
// from the jail. Beside systemd such a move is nothing special: when a scope is started
// it brings the processes of the units beside it into cgroups of controllers that they
// had none of.
func settled(try func() error) error {
	err := try()
	for pause := time.Millisecond; errors.Is(err, errMoved) && pause < 100*time.Millisecond; pause *= 2 {
		time.Sleep(pause)
		err = try()
	}
	return err
}

// victim is a task that is to be acted upon.
type victim struct {
	*identity.Task
	subject string // the caller's own word for it
	members []identity.Member
	tasks   []privcheck.Task // of each member; Cgroup is set for each hierarchy
	// visible is of each party that was asked about, of several calls where a
	// proxy acts for somebody.
	visible map[*party]bool
}

// victim opens a handle on the task that the requestor names, and makes sure
// that it is the one.
func (c *call) victim(v api.Victim) (*victim, error) {
	subject := strconv.FormatInt(v.PID, 10)
	var pid int32
	if v.Cred != nil {
		subject, pid = "the task of the credential", v.Cred.PID
	} else {
		var ok bool
		if pid, ok = c.m.host.HostPID(c.r().proc, v.PID); !ok {
			return nil, c.noTask(subject)
		}
	}
	t, err := identity.OpenTask(pid)
	if errors.Is(err, identity.ErrGone) {
		return nil, c.noTask(subject)
	}
	if err != nil {
		return nil, c.kernel("task "+subject, err)
	}
	c.close = append(c.close, t)
	if v.Cred == nil {
		// The number may have been translated to a task that ended before
		// the handle was opened.
		if n, ok := c.m.host.PIDIn(c.r().proc, t.ID()); !ok || int64(n) != v.PID {
			return nil, c.noTask(subject)
		}
	}
	return &victim{Task: t, subject: "task " + subject}, nil
}

func (c *call) noTask(subject string) error {
	return api.Errorf(api.NotFound, "%s: no such task: %s", c.op, subject).
		WithHint("pids are those of your own pid namespace")
}

// gather reads the facts about the victim's threads: where they are in hs, or
// in all hierarchies if hs is empty.
func (c *call) gather(v *victim, hs ...*cgfs.Hierarchy) error {
	ms, err := v.Members(hs...)
	if err != nil {
		return c.kernel(v.subject, err)
	}
	v.members = ms
	v.tasks = v.tasks[:0]
	for i := range ms {
		v.tasks = append(v.tasks, privcheck.Task{UIDs: ms[i].UIDs[:]})
	}
	if v.visible == nil {
		v.visible = make(map[*party]bool, len(c.parties))
	}
	for i := range c.parties {
		p := &c.parties[i]
		_, v.visible[p] = c.m.host.PIDIn(p.proc, v.ID())
	}
	if !v.Alive() {
		return c.kernel(v.subject, identity.ErrGone)
	}
	return nil
}

// task is the i-th thread of v as a party sees it in h.
func (*call) task(v *victim, i int, h *cgfs.Hierarchy, who *party) privcheck.Task {
	t := v.tasks[i]
	t.Cgroup, _ = v.members[i].Cgroups.Cgroup(h)
	t.Visible = v.visible[who]
	return t
}

// A moveQuestion decides whether every party may move v to dst.
type moveQuestion func(v *victim, dst *place) (privcheck.Decision, error)

// moveDecision asks clause 4 for each thread of the victim.
func (c *call) moveDecision(v *victim, dst *place) (privcheck.Decision, error) {
	subject := in(v.subject, dst.h)
	dstTasks, err := c.tasksFile(dst)
	if err == nil {
		err = c.limits(dst, len(dst.chain)-1)
	}
	if err != nil {
		return privcheck.Decision{}, c.kernel(subject, err)
	}
	var last privcheck.Decision
	var common *place
	var commonTasks privcheck.Object
	from := ""
	for i := range v.members {
		at, _ := v.members[i].Cgroups.Cgroup(dst.h)
		if i > 0 && at == from && v.members[i].UIDs == v.members[i-1].UIDs {
			continue // the same facts as of the thread before it
		}
		if at != from || i == 0 {
			from, common = at, nil
			if !privcheck.Below(at, dst.path) {
				// Where a party may not even look, its decision says so without
				// the facts.
				if common, commonTasks, err = c.ancestor(dst.h, privcheck.CommonAncestor(at, dst.path)); err != nil {
					return privcheck.Decision{}, c.kernel(subject, err)
				}
			}
		}
		last, err = c.decide(subject, func(p *party) privcheck.Decision {
			var cp privcheck.Place
			if common != nil {
				cp = common.of(p)
			}
			to := dst.of(p)
			c.entering(p, dst.h, at, &to)
			return privcheck.Move(p.r, c.task(v, i, dst.h, p), to, dstTasks, cp, commonTasks)
		})
		if err != nil {
			return last, err
		}
	}
	return last, nil
}

// ancestor opens the common ancestor of two cgroups, nil if it does not lie
// below the own cgroup of every party.
func (c *call) ancestor(h *cgfs.Hierarchy, path string) (*place, privcheck.Object, error) {
	if path == "" {
		return nil, privcheck.Object{}, nil
	}
	for i := range c.parties {
		if !privcheck.Below(c.parties[i].own(h), path) {
			return nil, privcheck.Object{}, nil
		}
	}
	p, err := c.open(h, path)
	if err != nil {
		return nil, privcheck.Object{}, err
	}
	o, err := c.tasksFile(p)
	return p, o, err
}

// step is a move in one hierarchy, decided upon.
type step struct {
	dst      *place
	file     *cgfs.File
	decision privcheck.Decision
}

// move moves v to every one of dsts, or nowhere. The facts are read again
// after the move: a task that ended, or became somebody else's by a setuid
// exec, between decision and act is put back.
func (c *call) move(v *victim, dsts []*place, question moveQuestion) error {
	hs := make([]*cgfs.Hierarchy, 0, len(dsts))
	for _, dst := range dsts {
		hs = append(hs, dst.h)
	}
	if err := c.gather(v, hs...); err != nil {
		return err
	}
	if len(dsts) == 0 {
		return api.Errorf(api.NotFound, "%s %s: no such cgroup", c.op, v.subject)
	}
	steps := make([]step, 0, len(dsts))
	for _, dst := range dsts {
		d, err := question(v, dst)
		if err != nil {
			return err
		}
		name := "cgroup.procs"
		if v.Thread != 0 {
			if name, err = threadFile(dst); err != nil {
				return c.kernel(in(v.subject, dst.h), err)
			}
		}
		f, _, err := c.file(dst, name, cgfs.ForWrite)
		if err != nil {
			return c.kernel(in(v.subject, dst.h), err)
		}
		steps = append(steps, step{dst: dst, file: f, decision: d})
	}
	// One move of a process at a time: between the last look at where it is and
	// the move nobody else who asks the daemon puts it into a jail.
	defer c.m.moving.lock(v.PID())()
	if err := c.unmoved(v, steps, hs); err != nil {
		return err
	}
	if !v.Alive() {
		return c.kernel(v.subject, identity.ErrGone)
	}
	for i := range steps {
		if err := c.act(v, &steps[i]); err != nil {
			c.putBack(v, steps[:i]) // the kernel moves a whole process or none of it
			return c.unwritten(in(v.subject, steps[i].dst.h), steps[i].dst.dir, steps[i].file.Name(), "", err)
		}
	}
	if err := c.verify(v); err != nil {
		c.putBack(v, steps)
		return err
	}
	for i := range steps {
		c.done(v.subject, steps[i].dst.h, steps[i].decision)
		c.m.reaper.filled(steps[i].dst.h, steps[i].dst.path)
		for _, m := range v.members {
			if from, ok := m.Cgroups.Cgroup(steps[i].dst.h); ok {
				c.m.reaper.left(steps[i].dst.h, from)
			}
		}
	}
	return nil
}

// unmoved makes sure that the victim still is where, and whose, it was when it
// was decided upon. Whoever writes to the files themselves can still come in
// between (docs/SECURITY.md, "What remains").
func (c *call) unmoved(v *victim, steps []step, hs []*cgfs.Hierarchy) error {
	now, err := v.Members(hs...)
	if err != nil {
		return c.kernel(v.subject, err)
	}
	facts := func(m *identity.Member) string {
		b := make([]byte, 0, 256)
		for _, uid := range m.UIDs {
			b = binary.NativeEndian.AppendUint32(b, uid)
		}
		for i := range steps {
			at, _ := m.Cgroups.Cgroup(steps[i].dst.h)
			b = append(append(b, at...), 0)
		}
		return string(b)
	}
	known := make(map[string]bool, 1)
	for i := range v.members {
		known[facts(&v.members[i])] = true
	}
	for i := range now {
		if !known[facts(&now[i])] {
			return api.Errorf(api.Busy, "%s %s: somebody else keeps moving it", c.op, v.subject).
				WithHint("try again").WithCause(errMoved)
		}
	}
	return nil
}

func threadFile(dst *place) (string, error) {
	if dst.h.Version() == cgfs.V1 {
		return "tasks", nil
	}
	f, err := dst.dir.File("cgroup.type", cgfs.ForRead)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := f.Read(64)
	if err != nil {
		return "", err
	}
	if string(b) != "threaded\n" {
		return "", fmt.Errorf("a single thread cannot be moved here: %w", cgfs.ErrUnsupported)
	}
	return "cgroup.threads", nil
}

// act is the one place where a task is moved.
func (c *call) act(v *victim, s *step) error {
	if !s.decision.Allowed() {
		return api.Errorf(api.Denied, "%s %s: not decided", c.op, v.subject)
	}
	return s.dst.dir.Enter(s.file, v.ID())
}

// verify checks that what was moved is what was decided upon.
func (c *call) verify(v *victim) error {
	if !v.Unreaped() {
		return c.kernel(v.subject, identity.ErrGone)
	}
	now, err := v.Owners()
	if errors.Is(err, identity.ErrGone) {
		return nil // a zombie of the right process: nobody else was moved
	}
	if err != nil {
		return c.kernel(v.subject, err)
	}
	known := make(map[[3]uint32]bool, 1)
	for _, m := range v.members {
		known[m.UIDs] = true
	}
	for _, uids := range now {
		if !known[uids] {
			c.refused(v.subject, requestor, privcheck.Decision{}, "the task changed its user while it was moved")
			return api.Errorf(api.Denied, "%s %s: the task changed its user while it was moved", c.op, v.subject)
		}
	}
	return nil
}

// putBack takes back moves that were made. Threads of the victim go where
// they were. If the victim ended and its pid is another's by now, that one was
// moved by mistake; it has just been born and goes where its parent is.
func (c *call) putBack(v *victim, steps []step) {
	for i := range steps {
		s := &steps[i]
		if v.Unreaped() {
			c.putBackVictim(v, s.dst.h)
			continue
		}
		stranger, err := identity.OpenTask(v.ID())
		if err != nil {
			continue
		}
		c.putBackStranger(stranger, s)
		stranger.Close()
	}
}

func (c *call) putBackVictim(v *victim, h *cgfs.Hierarchy) {
	from, ok := v.members[0].Cgroups.Cgroup(h)
	if !ok {
		return
	}
	for _, m := range v.members[1:] {
		if at, _ := m.Cgroups.Cgroup(h); at != from {
			// Its threads were spread over several cgroups.
			for _, m := range v.members {
				if at, ok := m.Cgroups.Cgroup(h); ok {
					c.restore(h, at, h.TasksFile(), m.TID)
				}
			}
			return
		}
	}
	file := "cgroup.procs" // with threads that were born meanwhile
	if v.Thread != 0 {
		file = h.TasksFile()
	}
	c.restore(h, from, file, v.ID())
}

func (c *call) putBackStranger(t *identity.Task, s *step) {
	cg, err := t.Cgroups()
	if err != nil {
		return
	}
	if at, ok := cg.Cgroup(s.dst.h); !ok || at != s.dst.path {
		return
	}
	from, err := t.ParentCgroups()
	if err != nil {
		return
	}
	if path, ok := from.Cgroup(s.dst.h); ok && path != s.dst.path {
		c.restore(s.dst.h, path, "cgroup.procs", t.ID())
	}
}

// restore writes a task back to where it was.
func (c *call) restore(h *cgfs.Hierarchy, path, file string, id int32) {
	dir, err := h.Open(path)
	if err == nil {
		defer dir.Close()
		var f *cgfs.File
		if f, err = dir.File(file, cgfs.ForWrite); err == nil {
			err = dir.Enter(f, id)
			_ = f.Close()
		}
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		c.m.log.WithFields(logrus.Fields{"op": c.op, "target": path, "task": id}).WithError(err).Error("putting a task back failed")
	}
}
