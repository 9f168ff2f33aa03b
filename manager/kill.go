package manager

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

// killDeadline bounds how long Kill runs after tasks that fork or do not
// die.
const killDeadline = 5 * time.Second

func openTask(pid int32) (*identity.Task, error) {
	t, err := identity.OpenTask(pid)
	if errors.Is(err, identity.ErrGone) {
		return nil, nil
	}
	return t, err
}

// Kill implements api.CGManager1. It freezes what it can, looks at every task,
// and only if it may kill all of them kills any; then again, until none is
// left: a task that forked before it was frozen has left a child.
func (m *Manager) Kill(rq *api.Request, name string) (err error) {
	c, err := m.begin("Kill", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	places, err := c.existing(name)
	if err != nil {
		return err
	}
	// The right to look at the cgroup at all, tasks or not.
	for _, p := range places {
		if _, err := c.decide(in(quote(name), p.h), func(who *party) privcheck.Decision {
			return privcheck.Kill(who.r, p.of(who), nil)
		}); err != nil {
			return err
		}
	}
	// One at a time: what one thaws another may still count on. The places are
	// in the order of the hierarchies, so two do not wait for each other.
	for _, p := range places {
		defer m.freezing.lock(watchKey{p.h, p.path})()
	}
	k := &killing{call: c, places: places, subject: quote(name), deadline: time.Now().Add(killDeadline)}
	return k.run()
}

type killing struct {
	*call
	places   []*place
	subject  string
	deadline time.Time
	decision privcheck.Decision
	killed   int
	frozen   []*place // those that this round froze, or found so
}

func (k *killing) run() error {
	for {
		left, err := k.round()
		// The threads of what dies go one after the other, for as long as a busy
		// machine takes: not seen at rest this time, but maybe the next.
		if errors.Is(err, unix.EAGAIN) && time.Now().Before(k.deadline) {
			left, err = true, nil
		}
		if err != nil {
			return err
		}
		if !left {
			if k.killed > 0 {
				for _, p := range k.places {
					k.done(k.subject, p.h, k.decision)
				}
			}
			return nil
		}
		if time.Now().After(k.deadline) {
			return api.Errorf(api.Busy, "Kill %s: tasks are left after %v", k.subject, killDeadline).
				WithHint("ask again; a task that waits for the kernel dies when the kernel lets it")
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// round decides, freezes, decides again, kills, and thaws. It reports whether there was
// anything to kill. Handles on tasks are held one at a time, however many tasks
// there are: every task is decided upon before the first is killed, and each
// once more just before it is.
func (k *killing) round() (left bool, err error) {
	// Else whoever may name a cgroup could stop what is in it, again and again.
	if err := k.allowed(); err != nil {
		return false, err
	}
	thaw := k.freeze()
	died := false
	defer func() { thaw(died) }()
	pids, err := k.tasks()
	if err != nil || len(pids) == 0 {
		return false, err
	}
	var running []int32
	for _, pid := range pids {
		frozen := true
		err := k.with(pid, func(v *victim) (err error) {
			frozen, err = k.decideOne(v)
			return err
		})
		if err != nil {
			return false, err
		}
		if !frozen {
			running = append(running, pid)
		}
	}
	var stopped []int32
	defer func() {
		if err != nil {
			k.resume(stopped)
		}
	}()
	if stopped, err = k.stop(running); err != nil {
		return false, err
	}
	if k.atOnce() {
		died = true
	}
	for _, pid := range pids {
		if err := k.with(pid, func(v *victim) error {
			if _, err := k.decideOne(v); err != nil {
				return err
			}
			if unix.PidfdSendSignal(v.PidFD(), unix.SIGKILL, nil, 0) == nil {
				k.killed++
				died = true
			}
			return nil
		}); err != nil {
			return false, err
		}
	}
	return true, nil
}

// atOnce has the kernel kill all there is in a cgroup of v2, where it can. It
// looks at nobody, so this is for the host's root, who may kill any task.
func (k *killing) atOnce() bool {
	for i := range k.parties {
		if !k.parties[i].r.HostRoot() {
			return false
		}
	}
	done := false
	for _, p := range k.places {
		if p.dir.Kill() == nil {
			done = true
			k.killed++
		}
	}
	return done
}

// allowed decides on every task while all of them run.
func (k *killing) allowed() error {
	pids, err := k.tasks()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := k.with(pid, func(v *victim) error {
			_, err := k.decideOne(v)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// with calls f with a handle on a task; not if the task has ended, and it may
// end while f looks at it.
func (k *killing) with(pid int32, f func(v *victim) error) error {
	if pid <= 0 {
		return api.Errorf(api.Denied, "Kill %s: there is a task in it that is not visible", k.subject)
	}
	t, err := openTask(pid)
	if err != nil {
		return k.kernel(k.subject, err)
	}
	if t == nil {
		return nil
	}
	defer t.Close()
	if err := f(&victim{Task: t, subject: "a task in " + k.subject}); err != nil && !errors.Is(err, identity.ErrGone) {
		return k.kernel(k.subject, err)
	}
	return nil
}

// stop stops tasks that no freezer holds, because a stopped task cannot exec a
// program of somebody else, and decides once more. It returns those that it
// stopped, also with an error: the caller lets them go on if they are not to be
// killed after all. Their owner can let them go on at any time; that is the
// owner's own race to lose.
func (k *killing) stop(pids []int32) (stopped []int32, err error) {
	for _, pid := range pids {
		err := k.with(pid, func(v *victim) error {
			if _, err := k.decideOne(v); err != nil {
				return err
			}
			if was, err := v.Stopped(); err != nil || was {
				return err
			}
			if err := unix.PidfdSendSignal(v.PidFD(), unix.SIGSTOP, nil, 0); errors.Is(err, unix.ESRCH) {
				return identity.ErrGone
			} else if err != nil {
				return err
			}
			stopped = append(stopped, pid)
			if err := k.awaitStop(v); err != nil {
				return err
			}
			_, err := k.decideOne(v)
			return err
		})
		if err != nil {
			return stopped, err
		}
	}
	return stopped, nil
}

// stopDeadline bounds how long a task may take to stop. One that waits in the
// kernel for what does not come takes for ever.
const stopDeadline = 200 * time.Millisecond

func (k *killing) awaitStop(v *victim) error {
	for end := time.Now().Add(stopDeadline); ; time.Sleep(100 * time.Microsecond) {
		done, err := v.Stopped()
		if err != nil || done {
			return err
		}
		if time.Now().After(end) {
			err := api.Errorf(api.Busy, "Kill %s: a task does not stop", k.subject).
				WithHint("ask again, or put the cgroup into the freezer's hierarchy too")
			if k.killed > 0 {
				// It is dying, perhaps, and a busy machine lets it wait.
				return err.WithCause(unix.EAGAIN)
			}
			return err
		}
	}
}

// resume lets stopped tasks go on.
func (k *killing) resume(pids []int32) {
	for _, pid := range pids {
		_ = k.with(pid, func(v *victim) error {
			return unix.PidfdSendSignal(v.PidFD(), unix.SIGCONT, nil, 0)
		})
	}
}

// decideOne asks clause 7 for one task. The error is ErrGone if it has ended,
// or is in none of the cgroups any more: one that is about to end is in the
// hierarchy's root, and the number may by now be a task's that never was here.
func (k *killing) decideOne(v *victim) (frozen bool, err error) {
	if err := k.gather(v); err != nil {
		return false, err
	}
	if !k.inside(v) {
		return false, identity.ErrGone
	}
	for _, p := range k.places {
		for i := range v.members {
			at, _ := v.members[i].Cgroups.Cgroup(p.h)
			inside := privcheck.Below(p.path, at)
			if inside && slices.Contains(k.frozen, p) {
				frozen = true
			}
			k.decision, err = k.decide(in(v.subject, p.h), func(who *party) privcheck.Decision {
				return privcheck.All(
					privcheck.OverTask(who.r, who.own(p.h), k.task(v, i, p.h, who)),
					privcheck.Kill(who.r, p.of(who), nil),
				)
			})
			if err != nil {
				return false, err
			}
		}
	}
	return frozen, nil
}

// inside reports whether a thread of v is in one of the cgroups or below.
func (k *killing) inside(v *victim) bool {
	for _, p := range k.places {
		for i := range v.members {
			if at, _ := v.members[i].Cgroups.Cgroup(p.h); privcheck.Below(p.path, at) {
				return true
			}
		}
	}
	return false
}

// freeze freezes the cgroups where the host can. The returned function takes
// that back, except that what somebody else had frozen before stays so.
func (k *killing) freeze() (thaw func(died bool)) {
	k.frozen = k.frozen[:0]
	var before []bool
	// Version 2 comes last in the set and is frozen first: a task that the v1
	// freezer holds does not get to where version 2 counts it as frozen.
	for _, p := range slices.Backward(k.places) {
		if !p.dir.CanFreeze() {
			continue
		}
		was, err := p.dir.Frozen()
		if err == nil && !was {
			ctx, cancel := context.WithTimeout(context.Background(), min(time.Until(k.deadline), time.Second))
			err = p.dir.Freeze(ctx)
			cancel()
		}
		if err != nil {
			// Its tasks are stopped one by one instead.
			k.m.log.WithFields(logrus.Fields{"op": k.op, "target": in(k.subject, p.h)}).WithError(err).Debug("freezing")
			if !was {
				k.thaw(p)
			}
			continue
		}
		k.frozen, before = append(k.frozen, p), append(before, was)
	}
	return func(died bool) {
		for i, p := range k.frozen {
			if !before[i] {
				k.thaw(p)
			} else if died && p.h.Version() == cgfs.V1 {
				// A task frozen by the v1 freezer does not die; it is given the
				// time to, and nothing in it runs, because SIGKILL is pending.
				k.thaw(p)
				_ = k.awaitEmpty(p)
				// Also past the deadline: it was not ours to thaw for good.
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				err := p.dir.Freeze(ctx)
				cancel()
				if err != nil {
					k.m.log.WithFields(logrus.Fields{"op": k.op, "target": in(k.subject, p.h)}).WithError(err).Debug("freezing again")
				}
			}
		}
	}
}

// thaw thaws a cgroup that was frozen, unless it has gone: one that is to be removed
// when empty goes as soon as its tasks have died.
func (k *killing) thaw(p *place) {
	if err := p.dir.Thaw(); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		k.m.log.WithFields(logrus.Fields{"op": k.op, "target": in(k.subject, p.h)}).WithError(err).Error("thawing failed")
	}
}

func (k *killing) awaitEmpty(p *place) error {
	for {
		busy, err := p.dir.Populated()
		if err != nil || !busy || time.Now().After(k.deadline) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// tasks returns the union of the processes in the cgroups and below.
func (k *killing) tasks() ([]int32, error) {
	var all []int32
	for _, p := range k.places {
		pids, err := subtreeProcs(p.dir)
		if err != nil {
			return nil, k.kernel(k.subject, err)
		}
		all = append(all, pids...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}
