package manager

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// Delegate implements api.CGManager1.
func (m *Manager) Delegate(rq *api.Request, name string, controllers []string) (_ string, err error) {
	c, err := m.begin("Delegate", rq)
	if err != nil {
		return "", err
	}
	defer c.end(&err)
	if err := c.checkName(name); err != nil {
		return "", err
	}
	hs, err := c.delegable(name, controllers)
	if err != nil {
		return "", err
	}
	shown, err := c.shown(hs[0], name)
	if err != nil {
		return "", err
	}
	var plans []*creation
	for _, h := range hs {
		n := c.needs(h, controllers)
		p, err := c.planCreate(h, join(c.r().own(h), name), quote(name), n)
		if err != nil {
			return "", err
		}
		if p.missing == "" {
			if _, err := c.planDelegate(p); err != nil {
				return "", err
			}
			// Unlike Create, this gives to what is there all that can be had.
			if p.enable, p.may, err = c.planEnable(h, p.at.path, p.subject, n); err != nil {
				return "", err
			}
		}
		plans = append(plans, p)
	}
	var u undo
	defer u.run()
	for _, p := range plans {
		if _, err := c.create(p, &u); err != nil {
			return "", err
		}
		// What was just made is looked at like what was there before.
		d, err := c.planDelegate(p)
		if err != nil {
			return "", err
		}
		if err := c.delegate(p, d, &u); err != nil {
			return "", err
		}
	}
	u.release()
	for _, p := range plans {
		c.done(p.name, p.at.h, p.decision)
	}
	return shown, nil
}

// delegable returns the hierarchies of the controllers. Where none is named it
// returns those in which somebody has put the requestor into a cgroup: the host's
// processes too are at a hierarchy's root for want of a better place.
func (c *call) delegable(name string, controllers []string) ([]*cgfs.Hierarchy, error) {
	if len(controllers) > 0 {
		return c.hierarchies(controllers)
	}
	hs := slices.DeleteFunc(c.unnamed(), func(h *cgfs.Hierarchy) bool {
		return !c.placed(h) || c.r().own(h) == "/" && !c.r().r.HostRoot()
	})
	if len(hs) == 0 {
		return nil, c.nowhere(name)
	}
	return hs, nil
}

// shown is the path of the cgroup called name as the requestor's own cgroup
// namespace shows it.
func (c *call) shown(h *cgfs.Hierarchy, name string) (string, error) {
	cgroups := c.r().cgroups
	if c.r().scope != "" {
		// It is no part of where r is, which is all that its namespace shows.
		return join(c.r().own(h), name), nil
	}
	if !c.r().r.SameCgroupNS {
		var err error
		if cgroups, err = c.r().proc.OwnCgroups(); err != nil {
			return "", c.unknown(c.r().role, err)
		}
	}
	own, ok := cgroups.Path(h)
	if from, _ := c.r().cgroups.Path(h); ok && from != h.Visible(from) {
		own, ok = parent(own), own != "/" // it is in a hidden leaf
	}
	if !ok {
		return "", api.Errorf(api.Unsupported, "%s %q: your own cgroup is not within your cgroup namespace", c.op, name).
			WithHint("whoever entered a container's namespaces has to enter its cgroup, too")
	}
	return join(own, name), nil
}

// delegation is what is going to change about a cgroup that is delegated.
type delegation struct {
	decision privcheck.Decision
	given    []string // files of delegation, for the requestor
	limits   []string // all others that it could write, for the host's root
}

// planDelegate decides over a cgroup that exists, and each file in it.
func (c *call) planDelegate(p *creation) (*delegation, error) {
	if err := c.limits(p.at, len(p.at.chain)); err != nil {
		return nil, c.kernel(p.subject, err)
	}
	var plan delegation
	var err error
	if plan.decision, err = c.decide(p.subject, func(who *party) privcheck.Decision {
		return privcheck.Delegate(who.r, p.at.of(who))
	}); err != nil {
		return nil, err
	}
	files, err := p.at.dir.Files()
	if err != nil {
		return nil, c.kernel(p.subject, err)
	}
	for _, name := range files {
		a, err := p.at.dir.FileAttr(name)
		if err != nil {
			return nil, c.kernel(p.subject, err)
		}
		if !slices.Contains(p.at.h.DelegationFiles(), name) {
			if privcheck.DelegateLimit(c.r().r, p.at.of(c.r()), object(a)).Allowed() {
				plan.limits = append(plan.limits, name)
			}
			continue
		}
		question := func(who *party) privcheck.Decision { return privcheck.DelegateFile(who.r, p.at.of(who), object(a)) }
		if !overTasks(name) && !c.entitled(question) {
			continue // it stays with whoever kept it, and nothing depends on it
		}
		if _, err := c.decide(p.subject, question); err != nil {
			return nil, err
		}
		plan.given = append(plan.given, name)
	}
	return &plan, nil
}

// overTasks reports whether a file of delegation is one without which the subtree
// cannot be managed: those of the tasks, and on v2 that of the controllers.
func overTasks(name string) bool {
	return name == "tasks" || strings.HasPrefix(name, "cgroup.")
}

// delegate makes the cgroup at p.at one that the requestor can manage by itself,
// and its limits the host's.
func (c *call) delegate(p *creation, plan *delegation, u *undo) error {
	if !plan.decision.Allowed() {
		return api.Errorf(api.Denied, "%s %s: not decided", c.op, p.subject)
	}
	r := c.r().r
	c.leafFollows(p.at, u)
	// The limits go first: who has the directory cannot take them back.
	for _, name := range plan.limits {
		if err := c.withdraw(p, name, u); err != nil {
			return err
		}
	}
	for _, name := range append(plan.given, "") {
		if err := c.setOwner(p, name, r.UID, r.GID, u); err != nil {
			return err
		}
	}
	if err := p.at.dir.MirrorLeaf(); err != nil {
		return c.kernel(p.subject, err)
	}
	if p.at.h.Version() == cgfs.V2 {
		if err := c.bound(p, u); err != nil {
			return err
		}
		// Not undone, and so the last: see enable.
		if err := c.passOn(p); err != nil {
			return err
		}
	}
	p.decision = plan.decision
	return nil
}

// passOn enables the controllers for what is going to be below the cgroup: the
// named ones, or all that it has.
func (c *call) passOn(p *creation) error {
	have, err := p.at.dir.Available()
	if err == nil {
		may := slices.DeleteFunc(have, func(s string) bool { return !slices.Contains(p.may, s) })
		err = c.enableAt(p.at, p.must, may)
	}
	if err != nil {
		return c.kernel(p.subject, err)
	}
	return nil
}

// bound gives the kernel the daemon's own bounds to keep for what is made below
// the cgroup without the daemon, unless it has others already.
func (c *call) bound(p *creation, u *undo) error {
	for name, limit := range map[string]int{
		// The hidden leaf of a cgroup is a level to the kernel.
		"cgroup.max.depth":       max(c.m.maxDepth-depth(p.at.path), 0) + 1,
		"cgroup.max.descendants": c.m.quota.max,
	} {
		now, err := c.contents(p.at, name)
		if err == nil && now == "max" {
			err = put(p.at, name, strconv.Itoa(limit))
		}
		if err != nil {
			return c.kernel(p.subject, err)
		}
		if now != "max" {
			continue
		}
		u.add(func() {
			if err := put(p.at, name, now); err != nil {
				c.m.log.WithFields(logrus.Fields{"op": c.op, "target": p.subject}).WithError(err).Error("undo of a bound failed")
			}
		})
	}
	return nil
}

// contents reads a control file of one value.
func (*call) contents(at *place, name string) (string, error) {
	f, err := at.dir.File(name, cgfs.ForRead)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := f.Read(maxValue)
	return strings.TrimSpace(string(b)), err
}

// put writes a control file of one value.
func put(at *place, name, value string) error {
	f, err := at.dir.File(name, cgfs.ForWrite)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Write(value)
}

// owner is a directory or file whose owner and mode can be changed.
type owner interface {
	owned
	SetMode(mode uint32) error
}

// ownerOf calls f on the directory of the cgroup (name "") or on one of its
// files. A file that is gone by now went with its controller.
func ownerOf(at *place, name string, f func(owner) error) error {
	if name == "" {
		return f(at.dir)
	}
	file, err := at.dir.File(name, cgfs.ForFacts)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	return f(file)
}

// setOwner changes the owner of the cgroup's directory (name "") or of one of
// its files.
func (c *call) setOwner(p *creation, name string, uid, gid uint32, u *undo) error {
	err := ownerOf(p.at, name, func(o owner) error {
		before, err := o.Attr()
		// Files that cgroup v2 does not have go with another (cgfs).
		if err != nil || before.UID == uid && before.GID == gid {
			return err
		}
		u.add(func() {
			if err := ownerOf(p.at, name, func(o owner) error {
				return errors.Join(o.SetOwner(before.UID, before.GID), o.SetMode(before.Mode&0o7777))
			}); err != nil {
				c.m.log.WithFields(logrus.Fields{"op": c.op, "target": p.subject}).WithError(err).Error("undo of a change of owner failed")
			}
		})
		return o.SetOwner(uid, gid)
	})
	if err != nil {
		return c.kernel(p.subject, err)
	}
	return nil
}

// withdraw gives a limit to the host's root, and leaves no way to write it to
// anybody else. The mode is looked at when the requestor can change it no more.
// The file stays in its group, so that a container may read what binds it.
func (c *call) withdraw(p *creation, name string, u *undo) error {
	if err := c.setOwner(p, name, 0, c.r().r.GID, u); err != nil {
		return err
	}
	const othersWrite = 0o022
	if err := ownerOf(p.at, name, func(o owner) error {
		now, err := o.Attr()
		if err == nil && now.Mode&othersWrite != 0 {
			err = o.SetMode(now.Mode & 0o7777 &^ othersWrite)
		}
		return err
	}); err != nil {
		return c.kernel(p.subject, err)
	}
	return nil
}
