package manager

import (
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// On v2 a cgroup has the controllers that each cgroup above it gives to its
// children. What a request needs is given on the way down from the requestor's
// own cgroup; what that one has is for those above it to say.

// needs are controllers that a cgroup is to have.
type needs struct {
	must []string // the request fails without
	all  bool     // those besides that can be had: v1 has each cgroup in a hierarchy of each
}

// needs are those of a request that names controllers, or with none means all.
func (c *call) needs(h *cgfs.Hierarchy, controllers []string) needs {
	n := needs{all: len(controllers) == 0}
	for _, name := range controllers {
		if of, _ := c.m.set.ByController(name); of == h {
			n.must = append(n.must, h.Enables(name))
		}
	}
	return n
}

// enabling is a cgroup that is to give controllers to its children, decided
// upon.
type enabling struct {
	at        *place
	must, may []string
	decision  privcheck.Decision
}

// controllersOf returns those of the names that are controllers of h, sorted.
// What is none to the kernel is there anyway: freezer, devices.
func controllersOf(h *cgfs.Hierarchy, names []string) []string {
	cs := slices.DeleteFunc(slices.Clone(names), func(s string) bool { return !slices.Contains(h.Controllers(), s) })
	slices.Sort(cs)
	return slices.Compact(cs)
}

// planEnable finds out which cgroups on the way from the requestor's own one to
// path have to give what to their children, and decides for each. It changes
// nothing. On v1 there is nothing to do. may are those of a need for all that
// can be had.
func (c *call) planEnable(h *cgfs.Hierarchy, path, subject string, n needs) (steps []*enabling, may []string, err error) {
	own := c.r().own(h)
	n.must = controllersOf(h, n.must)
	if h.Version() == cgfs.V1 || !n.all && len(n.must) == 0 {
		return nil, nil, nil
	}
	if n.all {
		may = slices.DeleteFunc(slices.Clone(h.Controllers()), func(s string) bool { return slices.Contains(n.must, s) })
	}
	var coming []string // what the cgroup above will have given to this one
	for level := own; ; level = join(level, nextName(level, path)) {
		at, err := c.open(h, level)
		if errors.Is(err, unix.ENOENT) {
			return steps, may, nil // made by the request itself
		}
		if err != nil {
			return nil, nil, c.kernel(subject, err)
		}
		must, missing, err := lacking(at.dir, n.must, may)
		if err != nil {
			return nil, nil, c.kernel(subject, err)
		}
		if len(must)+len(missing) > 0 {
			has, err := at.dir.Available()
			if err != nil {
				return nil, nil, c.kernel(subject, err)
			}
			has = append(has, coming...)
			for _, name := range must {
				if !slices.Contains(has, name) {
					return nil, nil, c.notGiven(subject, name, level == own)
				}
			}
			lost := func(s string) bool { return slices.Contains(missing, s) && !slices.Contains(has, s) }
			may = slices.DeleteFunc(may, lost)
			missing = slices.DeleteFunc(missing, lost)
		}
		if level == path {
			return steps, may, nil // its own children are not of interest
		}
		if len(must)+len(missing) == 0 {
			continue
		}
		if err := c.limits(at, len(at.chain)); err != nil {
			return nil, nil, c.kernel(subject, err)
		}
		question := func(p *party) privcheck.Decision { return privcheck.Create(p.r, at.of(p)) }
		if len(must) == 0 && !c.entitled(question) {
			may = slices.DeleteFunc(may, func(s string) bool { return slices.Contains(missing, s) })
			coming = nil
			continue
		}
		d, err := c.decide("controllers for "+subject, question)
		if err != nil {
			return nil, nil, err
		}
		coming = slices.Concat(must, missing)
		steps = append(steps, &enabling{at: at, must: must, may: missing, decision: d})
	}
}

// lacking returns which of the controllers d does not give to its children.
func lacking(d *cgfs.Dir, must, may []string) (lacksMust, lacksMay []string, err error) {
	missing, err := d.Missing(slices.Concat(must, may)...)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range missing {
		if slices.Contains(must, name) {
			lacksMust = append(lacksMust, name)
		} else {
			lacksMay = append(lacksMay, name)
		}
	}
	return lacksMust, lacksMay, nil
}

// nextName is the component of path that follows level.
func nextName(level, path string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(path[len(level):], "/"), "/")
	return name
}

func (c *call) notGiven(subject, controller string, own bool) error {
	if !own {
		return api.Errorf(api.Unsupported, "%s %s: a cgroup on the way does not have the controller %q", c.op, subject, controller)
	}
	return api.Errorf(api.Unsupported, "%s %s: your own cgroup was not given the controller %q", c.op, subject, controller).
		WithHint("whoever manages the cgroup above yours has to enable it there; with cgroup v1 every cgroup has it")
}

// entitled reports whether question allows every party.
func (c *call) entitled(question func(p *party) privcheck.Decision) bool {
	for i := range c.parties {
		if !question(&c.parties[i]).Allowed() {
			return false
		}
	}
	return true
}

// enable acts on what planEnable planned. It is not undone: the limits of a
// cgroup that somebody else has made meanwhile would go with the controller.
func (c *call) enable(steps []*enabling, subject string) error {
	for _, s := range steps {
		if !s.decision.Allowed() {
			return api.Errorf(api.Denied, "%s %s: not decided", c.op, subject)
		}
		if err := c.enableAt(s.at, s.must, s.may); err != nil {
			err = c.kernel("controllers for "+subject, err)
			if e, ok := errors.AsType[*api.Error](err); ok && e.Kind == api.Busy {
				return e.WithHint("ask again; if it stays so, remove what a container runtime has left behind beside it: threaded cgroups keep others from having these controllers")
			}
			return err
		}
		c.done("controllers for "+subject, s.at.h, s.decision)
	}
	return nil
}

// enableAt gives controllers to the children of a cgroup. One of those that can
// be done without may be refused by the kernel.
func (c *call) enableAt(at *place, must, may []string) error {
	// Dividing freezes and thaws, as Kill does, and is done by one at a time: the
	// other would go on while what it counts on runs.
	defer c.m.freezing.lock(watchKey{at.h, at.path})()
	err := at.dir.Enable(slices.Concat(must, may)...)
	if err == nil {
		return nil
	}
	if err := at.dir.Enable(must...); err != nil {
		return err
	}
	if errors.Is(err, unix.EBUSY) {
		return nil // each of them would take as long to be refused
	}
	for _, name := range may {
		_ = at.dir.Enable(name)
	}
	return nil
}

// give makes sure that an existing cgroup has the controllers that values need.
func (c *call) give(at *place, controllers []string, subject string) error {
	steps, _, err := c.planEnable(at.h, at.path, subject, needs{must: controllers})
	if err != nil {
		return err
	}
	return c.enable(steps, subject)
}
