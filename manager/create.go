package manager

import (
	"errors"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

func quote(s string) string { return strconv.Quote(s) }

// Create implements api.CGManager1.
func (m *Manager) Create(rq *api.Request, name string, controllers []string, values map[string]string) (_ bool, err error) {
	c, err := m.begin("Create", rq)
	if err != nil {
		return false, err
	}
	defer c.end(&err)
	if err := c.checkName(name); err != nil {
		return false, err
	}
	hs := c.unnamed()
	if len(controllers) > 0 {
		if hs, err = c.hierarchies(controllers); err != nil {
			return false, err
		}
	}
	set, err := c.parse(name, values)
	if err != nil {
		return false, err
	}
	if err := c.onlyIn(set, controllers); err != nil {
		return false, err
	}
	var plans []*creation
	for _, h := range hs {
		n := c.needs(h, controllers)
		n.must = append(n.must, set.controllers(h)...)
		p, err := c.planCreate(h, join(c.r().own(h), name), quote(name), n)
		if err != nil {
			return false, err
		}
		plans = append(plans, p)
	}
	var u undo
	defer u.run()
	created := false
	places := make([]*place, 0, len(plans))
	for _, p := range plans {
		made, err := c.create(p, &u)
		if err != nil {
			return false, err
		}
		created = created || made
		places = append(places, p.at)
	}
	if err := c.setValues(set, places, c.reader(places, name), &u); err != nil {
		return false, err
	}
	u.release()
	return created, nil
}

// creation is a cgroup that is to be made, all checked: what exists of it, and
// what is missing.
type creation struct {
	at       *place
	missing  string
	name     string // the caller's own
	subject  string // name, with the hierarchy
	decision privcheck.Decision
	// enable is for the directories that exist; those that are made on the way
	// give must, and may as far as they can.
	enable    []*enabling
	must, may []string
}

// planCreate gathers and decides; it changes nothing.
func (c *call) planCreate(h *cgfs.Hierarchy, path, name string, n needs) (*creation, error) {
	subject := in(name, h)
	if c.r().own(h) == "" {
		return nil, api.Errorf(api.Denied, "%s %s: you have no cgroup in this hierarchy", c.op, subject)
	}
	if err := c.confined(h, path, subject); err != nil {
		return nil, err
	}
	if depth(path) > c.m.maxDepth {
		return nil, api.Errorf(api.Limit, "%s %s: more than %d levels below the hierarchy's root", c.op, subject, c.m.maxDepth)
	}
	at, missing, err := c.openDeepest(h, path)
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	if missing != "" {
		if err := c.limits(at, len(at.chain)); err != nil {
			return nil, c.kernel(subject, err)
		}
	}
	d, err := c.decide(subject, func(p *party) privcheck.Decision {
		if missing == "" {
			return privcheck.Over(p.r, at.of(p), at.object(), privcheck.Search)
		}
		return privcheck.Create(p.r, at.of(p))
	})
	if err != nil {
		return nil, err
	}
	p := &creation{at: at, missing: missing, name: name, subject: subject, decision: d, must: controllersOf(h, n.must)}
	p.enable, p.may, err = c.planEnable(h, path, subject, n)
	return p, err
}

// create makes what is missing. Afterwards p.at is the cgroup itself.
func (c *call) create(p *creation, u *undo) (bool, error) {
	if !p.decision.Allowed() {
		return false, api.Errorf(api.Denied, "%s %s: not decided", c.op, p.subject)
	}
	if p.missing == "" {
		return false, c.enable(p.enable, p.subject)
	}
	r := c.r().r
	names := strings.Split(p.missing, "/")
	release, err := c.m.quota.take(c, p.at.h, len(names))
	if err != nil {
		return false, err
	}
	u.add(release)
	paths := make([]string, len(names))
	for i, at := 0, p.at.path; i < len(names); i++ {
		at = join(at, names[i])
		paths[i] = at
	}
	if release, err = c.m.ledger.charge(c, p.at.h, paths); err != nil {
		return false, err
	}
	u.add(release)
	if err := c.enable(p.enable, p.subject); err != nil {
		return false, err
	}
	for i, name := range names {
		if i > 0 {
			if err := c.enableAt(p.at, p.must, p.may); err != nil {
				return false, c.kernel("controllers for "+p.subject, err)
			}
		}
		child, err := p.at.dir.Mkdir(name, r.UID, r.GID)
		if errors.Is(err, unix.EEXIST) && i < len(names)-1 {
			// Somebody made a parent meanwhile: look again who it belongs to.
			return false, api.Errorf(api.Busy, "%s %s: a cgroup on the way was made by somebody else just now", c.op, p.subject)
		}
		if errors.Is(err, unix.EEXIST) {
			return false, api.Errorf(api.Exists, "%s %s: it was made by somebody else just now", c.op, p.subject)
		}
		if errors.Is(err, unix.EAGAIN) {
			return false, api.Errorf(api.Limit, "%s %s: a cgroup above it may have no more cgroups, or levels of them, below it (cgroup.max.descendants, cgroup.max.depth)", c.op, p.subject)
		}
		if err != nil {
			return false, c.kernel(p.subject, err)
		}
		a, err := child.Attr()
		above := p.at.dir
		u.add(func() {
			if err := above.Rmdir(name); err != nil {
				c.m.log.WithFields(logrus.Fields{"op": c.op, "target": p.subject}).WithError(err).Error("undo of a creation failed")
			}
		})
		c.close = append(c.close, handle{above})
		p.at.dir, p.at.path = child, join(p.at.path, name)
		if err != nil {
			return false, c.kernel(p.subject, err)
		}
		p.at.chain = append(p.at.chain, object(a))
	}
	p.missing = ""
	c.done(p.name, p.at.h, p.decision)
	return true, nil
}
