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

// The interface cgmanager0_0. Each method names its controllers, in a list or
// as "all". With more than one hierarchy a refusal in some of them is passed
// over, as clients of the original rely on, and so is one in which the cgroup
// does not exist.

// slashes says what a leading "/" of a cgroup's name means to a method.
type slashes int

const (
	// relative: nothing; the name is below the requestor's own cgroup.
	relative slashes = iota
	// absolute: the hierarchy's root, or what stands for it in a container.
	absolute
	// forbidden: an error.
	forbidden
)

// controllers0 resolves a controller argument.
func (c *call) controllers0(arg string) ([]*cgfs.Hierarchy, error) {
	if arg == "all" {
		return c.m.set.Hierarchies(), nil
	}
	names := strings.Split(arg, ",")
	return c.hierarchies(names)
}

// several reports whether a controller argument is of several hierarchies, or
// would be on a host of v1: what may be asked of one at a time does not depend
// on the host.
func several(arg string, hs []*cgfs.Hierarchy) bool {
	return len(hs) != 1 || hs[0].Version() == cgfs.V2 && (arg == "all" || strings.Contains(arg, ","))
}

// controller0 resolves a controller argument that means one hierarchy.
func (c *call) controller0(arg string) (*cgfs.Hierarchy, error) {
	hs, err := c.controllers0(arg)
	if err != nil {
		return nil, err
	}
	if several(arg, hs) {
		return nil, api.Errorf(api.Invalid, "%s: one controller at a time, not %q", c.op, arg)
	}
	return hs[0], nil
}

// path0 resolves a cgroup argument to a path from h's root.
func (c *call) path0(h *cgfs.Hierarchy, arg string, s slashes) (string, error) {
	from := c.r().own(h)
	if strings.HasPrefix(arg, "/") {
		switch s {
		case relative:
		case absolute:
			from = c.root0(h)
		case forbidden:
			return "", api.Errorf(api.Invalid, "%s %q: the name starts with a slash", c.op, arg)
		}
	}
	if strings.Contains(arg, "..") {
		return "", api.Errorf(api.Invalid, "%s %q: \"..\" in the name", c.op, arg)
	}
	name := strings.Join(slices.DeleteFunc(strings.Split(arg, "/"), func(s string) bool { return s == "" }), "/")
	if err := c.checkName(name); err != nil {
		return "", err
	}
	if from == "" {
		return "", api.Errorf(api.Denied, "%s %q: you have no cgroup in %s", c.op, arg, h.Name())
	}
	return join(from, name), nil
}

// root0 is what "/" means in h: to a requestor in a container its own cgroup,
// behind a proxy in a container the proxy's, and to others the hierarchy's root.
func (c *call) root0(h *cgfs.Hierarchy) string {
	if from := &c.parties[c.root]; from.r.Outside() {
		return from.own(h)
	}
	return "/"
}

// open0 opens the cgroup that a method names in one hierarchy, for reading and
// setting values: those take a leading "/" as the hierarchy's root.
func (c *call) open0(controller, cgroup string) (*place, string, error) {
	h, err := c.controller0(controller)
	if err != nil {
		return nil, "", err
	}
	return c.openIn0(h, cgroup, absolute)
}

func (c *call) openIn0(h *cgfs.Hierarchy, cgroup string, s slashes) (*place, string, error) {
	subject := in(quote(cgroup), h)
	path, err := c.path0(h, cgroup, s)
	if err != nil {
		return nil, subject, err
	}
	if err := c.confined(h, path, subject); err != nil {
		return nil, subject, err
	}
	p, err := c.open(h, path)
	if err != nil {
		return nil, subject, c.kernel(subject, err)
	}
	return p, subject, nil
}

func isKind(err error, k api.Kind) bool {
	e, ok := errors.AsType[*api.Error](err)
	return ok && e.Kind == k
}

// each runs f for every hierarchy of a list. Refusals, and hierarchies in
// which the cgroup is missing, are errors only where there is one hierarchy;
// found reports whether the cgroup exists in any.
func (c *call) each(controller string, f func(h *cgfs.Hierarchy) error) (found bool, err error) {
	hs, err := c.controllers0(controller)
	if err != nil {
		return false, err
	}
	for _, h := range hs {
		err := f(h)
		missing := isKind(err, api.NotFound)
		found = found || !missing
		if several(controller, hs) && (missing || isKind(err, api.Denied)) {
			continue
		}
		if err != nil {
			return found, err
		}
	}
	return found, nil
}

func (c *call) missing0(cgroup string) error {
	return api.Errorf(api.NotFound, "%s %q: no such cgroup", c.op, cgroup)
}

// Create0 implements api.CGManager0.
func (m *Manager) Create0(rq *api.Request, controller, cgroup string) (_ api.Existed, err error) {
	c, err := m.begin("Create", rq)
	if err != nil {
		return 0, err
	}
	defer c.end(&err)
	existed := api.DidNotExist
	var plans []*creation
	if _, err := c.each(controller, func(h *cgfs.Hierarchy) error {
		path, err := c.path0(h, cgroup, relative)
		if err != nil {
			return err
		}
		var named []string
		if controller != "all" {
			named = strings.Split(controller, ",")
		}
		p, err := c.planCreate(h, path, quote(cgroup), c.needs(h, named))
		if err != nil {
			return err
		}
		if p.missing == "" && path != c.r().own(h) {
			existed = api.DidExist
		}
		plans = append(plans, p)
		return nil
	}); err != nil {
		return 0, err
	}
	var u undo
	defer u.run()
	for _, p := range plans {
		if _, err := c.create(p, &u); isKind(err, api.Exists) {
			existed = api.DidExist // somebody else was faster
		} else if err != nil {
			return 0, err
		}
	}
	u.release()
	return existed, nil
}

// Chown0 implements api.CGManager0.
func (m *Manager) Chown0(rq *api.Request, controller, cgroup string, owner api.Owner) (err error) {
	c, err := m.begin("Chown", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	found, err := c.each(controller, func(h *cgfs.Hierarchy) error {
		p, _, err := c.openIn0(h, cgroup, relative)
		if err != nil {
			return err
		}
		return c.chown([]*place{p}, quote(cgroup), owner)
	})
	if err == nil && !found {
		return c.missing0(cgroup)
	}
	return err
}

// Chmod0 implements api.CGManager0.
func (m *Manager) Chmod0(rq *api.Request, controller, cgroup, file string, mode int32) (err error) {
	c, err := m.begin("Chmod", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	if mode < 0 || mode > 0o777 {
		// Not a refusal, which a list of controllers would pass over.
		return api.Errorf(api.Invalid, "Chmod %q: mode %#o: not one of 0000 to 0777", cgroup, uint32(mode))
	}
	if file != "" {
		if err := cgfs.ValidFile(file); err != nil {
			return api.Errorf(api.Invalid, "Chmod %q: file %q: %v", cgroup, file, err)
		}
	}
	found, err := c.each(controller, func(h *cgfs.Hierarchy) error {
		p, _, err := c.openIn0(h, cgroup, relative)
		if err != nil {
			return err
		}
		return c.chmod([]*place{p}, quote(cgroup), file, mode)
	})
	if err == nil && !found {
		return c.missing0(cgroup)
	}
	return err
}

// key0 is the name of a control file: one component. The leading slash that
// lxcfs writes is accepted.
func (c *call) key0(cgroup, key string) (string, error) {
	key = strings.TrimPrefix(key, "/")
	if err := cgfs.ValidFile(key); err != nil {
		return "", api.Errorf(api.Invalid, "%s %q: key %q: %v", c.op, cgroup, key, err)
	}
	return key, nil
}

// translated0 finds the key by which a control file's name of the other version
// is translated; nil where the name is h's own. Where both versions have a file
// of the name, v1's is meant: that is what clients of this interface know.
func (c *call) translated0(h *cgfs.Hierarchy, name, subject string) (*setting, error) {
	k, ok := cgfs.FindFile(name, cgfs.V1)
	if !ok || !k.Translated(h) {
		return nil, nil
	}
	in, controller, err := c.m.set.KeyHierarchy(k)
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	if in != h {
		return nil, api.Errorf(api.NotFound, "%s %s: no such key in the hierarchy of %s", c.op, subject, h.Name())
	}
	return &setting{name: name, key: k, h: h, controller: controller}, nil
}

// reader0 reads control files of one place; subject is the key that needs them.
func (c *call) reader0(p *place, subject string) cgfs.Reader {
	return func(_, file string) (string, error) { return c.content(p, file, subject) }
}

// GetValue0 implements api.CGManager0.
func (m *Manager) GetValue0(rq *api.Request, controller, cgroup, key string) (_ string, err error) {
	c, err := m.begin("GetValue", rq)
	if err != nil {
		return "", err
	}
	defer c.end(&err)
	key, err = c.key0(cgroup, key)
	if err != nil {
		return "", err
	}
	p, _, err := c.open0(controller, cgroup)
	if err != nil {
		return "", err
	}
	subject := "key " + quote(key) + " of " + quote(cgroup)
	switch key {
	case "tasks", "cgroup.procs", "cgroup.threads":
		return c.tasksValue([]*place{p}, key)
	}
	s, err := c.translated0(p.h, key, subject)
	if err != nil {
		return "", err
	}
	if s != nil {
		v, err := s.key.Value(m.set, c.reader0(p, subject))
		if err != nil {
			return "", c.kernel(subject, err)
		}
		return v, nil
	}
	b, err := c.value(p, key, subject)
	return strings.TrimRight(string(b), "\n"), err
}

// SetValue0 implements api.CGManager0. As in the original, the empty value is
// accepted and writes nothing.
func (m *Manager) SetValue0(rq *api.Request, controller, cgroup, key, value string) (err error) {
	c, err := m.begin("SetValue", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	key, err = c.key0(cgroup, key)
	if err != nil {
		return err
	}
	p, subject, err := c.open0(controller, cgroup)
	if err != nil {
		return err
	}
	s, err := c.translated0(p.h, key, "key "+quote(key)+" of "+quote(cgroup))
	if err != nil {
		return err
	}
	if s != nil {
		s.value = value
		return c.setTranslated0(p, cgroup, s)
	}
	w, err := c.planWrite(p, p.h.FileName(key), value, "key "+quote(key)+" of "+subject)
	if err != nil || value == "" {
		return err
	}
	var u undo
	return c.write([]*write{w}, &u)
}

func (c *call) setTranslated0(p *place, cgroup string, s *setting) error {
	set := &settings{op: c.op, name: cgroup, all: []setting{*s}}
	places, read := []*place{p}, c.reader0(p, "key "+quote(s.name)+" of "+quote(cgroup))
	if s.value == "" {
		return newPlan(c, set, places, read).decideName(*s)
	}
	var u undo
	defer u.run()
	if err := c.setValues(set, places, read, &u); err != nil {
		return err
	}
	u.release()
	return nil
}

// Remove0 implements api.CGManager0. What is not there counts as removed.
func (m *Manager) Remove0(rq *api.Request, controller, cgroup string, recursive bool) (_ api.Existed, err error) {
	c, err := m.begin("Remove", rq)
	if err != nil {
		return 0, err
	}
	defer c.end(&err)
	var rs []*removal
	if _, err := c.each(controller, func(h *cgfs.Hierarchy) error {
		p, subject, err := c.openIn0(h, cgroup, relative)
		if isKind(err, api.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		r, err := c.planRemove(p, quote(cgroup))
		if err != nil {
			return err
		}
		if names, hidden, err := p.dir.Children(); err != nil {
			return c.kernel(subject, err)
		} else if !recursive && len(names)+hidden > 0 {
			return api.Errorf(api.Busy, "%s %s: there are cgroups below it", c.op, subject).
				WithHint("remove it recursively")
		}
		rs = append(rs, r)
		return nil
	}); err != nil {
		return 0, err
	}
	if len(rs) == 0 {
		return api.DidNotExist, nil
	}
	if err := c.remove(rs); err != nil {
		return 0, err
	}
	return api.DidExist, nil
}

// victim0 opens the victim of a cgmanager0_0 call.
func (m *Manager) victim0(op string, rq *api.Request, v api.Victim) (*call, *victim, error) {
	c, err := m.begin(op, rq)
	if err != nil {
		return nil, nil, err
	}
	t, err := c.victim(v)
	if err != nil {
		c.release()
		return nil, nil, err
	}
	return c, t, nil
}

// GetPidCgroup0 implements api.CGManager0: the answer is relative to the
// requestor's own cgroup, "/" being that.
func (m *Manager) GetPidCgroup0(rq *api.Request, controller string, v api.Victim) (_ string, err error) {
	c, t, err := m.victim0("GetPidCgroup", rq, v)
	if err != nil {
		return "", err
	}
	defer c.end(&err)
	h, path, err := c.pidCgroup(controller, t, func(p *party, h *cgfs.Hierarchy) string { return p.own(h) })
	if err != nil {
		return "", err
	}
	rel := strings.TrimPrefix(strings.TrimPrefix(path, c.r().own(h)), "/")
	if rel == "" {
		return "/", nil
	}
	return rel, nil
}

// GetPidCgroupAbs0 implements api.CGManager0: the answer starts with "/", as
// root0 has it, but through a proxy that is always the proxy's own cgroup: what
// MovePidAbs counts from.
func (m *Manager) GetPidCgroupAbs0(rq *api.Request, controller string, v api.Victim) (_ string, err error) {
	c, t, err := m.victim0("GetPidCgroupAbs", rq, v)
	if err != nil {
		return "", err
	}
	defer c.end(&err)
	from := c.root0
	if c.proxies >= 0 {
		from = c.parties[c.root].own
	}
	h, path, err := c.pidCgroup(controller, t, func(_ *party, h *cgfs.Hierarchy) string { return from(h) })
	if err != nil {
		return "", err
	}
	return "/" + strings.TrimPrefix(strings.TrimPrefix(path, from(h)), "/"), nil
}

func (c *call) pidCgroup(controller string, v *victim, from func(*party, *cgfs.Hierarchy) string) (*cgfs.Hierarchy, string, error) {
	h, err := c.controller0(controller)
	if err != nil {
		return nil, "", err
	}
	if err := c.nestedIn(h, in(v.subject, h)); err != nil {
		return nil, "", err
	}
	if err := c.gather(v, h); err != nil {
		return nil, "", err
	}
	if _, err := c.decide(in(v.subject, h), func(p *party) privcheck.Decision {
		return privcheck.PidCgroup(p.r, c.task(v, 0, h, p), from(p, h))
	}); err != nil {
		return nil, "", err
	}
	path, _ := v.members[0].Cgroups.Cgroup(h)
	return h, path, nil
}

// MovePid0 implements api.CGManager0.
func (m *Manager) MovePid0(rq *api.Request, controller, cgroup string, v api.Victim) error {
	return settled(func() (err error) {
		c, t, err := m.victim0("MovePid", rq, v)
		if err != nil {
			return err
		}
		defer c.end(&err)
		return c.move0(controller, cgroup, t, forbidden, c.confined, c.moveDecision)
	})
}

// move0 moves v in each hierarchy of a list in which the cgroup exists and
// every party is entitled; in at least one.
func (c *call) move0(controller, cgroup string, v *victim, s slashes, confined func(*cgfs.Hierarchy, string, string) error, question moveQuestion) error {
	hs, err := c.controllers0(controller)
	if err != nil {
		return err
	}
	if len(hs) > 1 {
		if err := c.gather(v, hs...); err != nil {
			return err
		}
	}
	var dsts []*place
	var refusal error
	found, err := c.each(controller, func(h *cgfs.Hierarchy) error {
		path, err := c.path0(h, cgroup, s)
		if err != nil {
			return err
		}
		subject := in(quote(cgroup), h)
		if err := confined(h, path, subject); err != nil {
			refusal = err
			return err
		}
		p, err := c.open(h, path)
		if err != nil {
			return c.kernel(subject, err)
		}
		if several(controller, hs) { // which of them: move asks again
			if _, err := question(v, p); err != nil {
				refusal = err
				return err
			}
		}
		dsts = append(dsts, p)
		return nil
	})
	switch {
	case err != nil:
		return err
	case len(dsts) == 0 && refusal != nil:
		return refusal
	case !found:
		return c.missing0(cgroup)
	}
	return c.move(v, dsts, question)
}

// MovePidAbs0 implements api.CGManager0 (clause 9). Without a proxy it is for
// the host's root; the cgroup is then counted from the hierarchy's root.
// Through a proxy it is counted from the proxy's own cgroup.
func (m *Manager) MovePidAbs0(rq *api.Request, controller, cgroup string, v api.Victim) error {
	if !strings.HasPrefix(cgroup, "/") {
		cgroup = "/" + cgroup
	}
	return settled(func() (err error) {
		c, t, err := m.victim0("MovePidAbs", rq, v)
		if err != nil {
			return err
		}
		defer c.end(&err)
		if c.proxies >= 0 {
			return c.escape(controller, cgroup, t)
		}
		d, err := c.decide(quote(cgroup), func(p *party) privcheck.Decision { return privcheck.Escape(p.r) })
		if err != nil {
			return err
		}
		anywhere := func(*cgfs.Hierarchy, string, string) error { return nil }
		return c.move0(controller, cgroup, t, absolute, anywhere, func(*victim, *place) (privcheck.Decision, error) { return d, nil })
	})
}

// escape moves a task for a requestor behind a proxy, up to the proxy's own
// cgroup and no further: the requestor by clause 9, and the proxy, from whose
// cgroup the name is counted, must be able to make the move itself.
func (c *call) escape(controller, cgroup string, v *victim) error {
	if err := c.gather(v); err != nil { // for the requestor, whom the proxy's call does not know
		return err
	}
	home, err := c.home()
	if err != nil {
		return err
	}
	behind := &call{m: c.m, op: c.op, scm: true, parties: c.behind(), proxies: -1}
	defer behind.release()
	question := func(v *victim, dst *place) (privcheck.Decision, error) {
		if err := c.nestedIn(dst.h, in(v.subject, dst.h)); err != nil {
			return privcheck.Decision{}, err
		}
		for i := range v.members {
			for j := range home {
				r := &c.parties[j]
				if _, err := behind.decide(in(v.subject, dst.h), func(p *party) privcheck.Decision {
					return privcheck.EscapeTo(r.r, p.r, r.own(dst.h), p.own(dst.h), c.task(v, i, dst.h, r), dst.path, home[j])
				}); err != nil {
					return privcheck.Decision{}, err
				}
			}
		}
		return behind.moveDecision(v, dst)
	}
	err = behind.move0(controller, cgroup, v, relative, behind.confined, question)
	c.changes = behind.changes
	return err
}

// GetTasks0 implements api.CGManager0.
func (m *Manager) GetTasks0(rq *api.Request, controller, cgroup string) (_ []int32, err error) {
	c, err := m.begin("GetTasks", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	p, subject, err := c.open0(controller, cgroup)
	if err != nil {
		return nil, err
	}
	pids, err := c.tasks([]*place{p}, "tasks", subject)
	if err != nil {
		return nil, err
	}
	return c.pids0(pids), nil
}

// GetTasksRecursive0 implements api.CGManager0.
func (m *Manager) GetTasksRecursive0(rq *api.Request, controller, cgroup string) (_ []int32, err error) {
	c, err := m.begin("GetTasksRecursive", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	hs, err := c.controllers0(controller)
	if err != nil {
		return nil, err
	}
	var all []int32
	_, err = c.each(controller, func(h *cgfs.Hierarchy) error {
		p, subject, err := c.openIn0(h, cgroup, absolute)
		if err != nil {
			return err
		}
		pids, err := c.tasksBelow(p, subject)
		all = append(all, pids...)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(hs) > 1 {
		slices.Sort(all)
		all = slices.Compact(all)
	}
	return c.pids0(all), nil
}

// tasksBelow returns the tasks in a cgroup and in those below it that every
// party may read.
func (c *call) tasksBelow(p *place, subject string) ([]int32, error) {
	if len(p.chain) > maxLevels {
		return nil, api.Errorf(api.Limit, "%s %s: more than %d levels of cgroups", c.op, subject, maxLevels)
	}
	all, err := c.tasks([]*place{p}, "tasks", subject)
	if err != nil {
		return nil, err
	}
	names, _, err := p.dir.Children()
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	for _, name := range names {
		below, err := c.child(p, name)
		if err != nil {
			continue // removed meanwhile
		}
		pids, err := c.tasksBelow(below, subject)
		_ = below.dir.Close()
		if isKind(err, api.Denied) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, pids...)
		if len(all) > maxTasks {
			return nil, api.Errorf(api.Limit, "%s %s: too many tasks", c.op, subject)
		}
	}
	return all, nil
}

// maxLevels bounds how deep GetTasksRecursive goes: each level holds a
// descriptor, and who has the file system itself can make any number.
const maxLevels = 128

// maxTasks bounds an answer: as int32 it must fit into a message.
const maxTasks = 15 << 10

// child opens a child of a place. The caller closes its directory.
func (c *call) child(p *place, name string) (*place, error) {
	dir, err := p.dir.Open(name)
	if err != nil {
		return nil, err
	}
	a, err := dir.Attr()
	if err != nil {
		_ = dir.Close()
		return nil, err
	}
	return &place{h: p.h, path: join(p.path, name), dir: dir, first: p.first, chain: append(slices.Clip(p.chain), object(a))}, nil
}

// pids0 are pids as an answer of cgmanager0_0 has them: the requestor's
// numbers, those that it cannot see left out; in an *Scm call the daemon's.
func (c *call) pids0(pids []int32) []int32 {
	if c.scm {
		return pids
	}
	seen, _ := c.translate(pids)
	out := make([]int32, len(seen))
	for i, n := range seen {
		out[i] = int32(n)
	}
	return out
}

// ListChildren0 implements api.CGManager0.
func (m *Manager) ListChildren0(rq *api.Request, controller, cgroup string) (_ []string, err error) {
	c, err := m.begin("ListChildren", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	p, subject, err := c.open0(controller, cgroup)
	if err != nil {
		return nil, err
	}
	return c.children(p, subject)
}

// ListKeys0 implements api.CGManager0.
func (m *Manager) ListKeys0(rq *api.Request, controller, cgroup string) (_ []api.Key, err error) {
	c, err := m.begin("ListKeys", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	p, subject, err := c.open0(controller, cgroup)
	if err != nil {
		return nil, err
	}
	return c.keys(p, subject)
}

// ListControllers0 implements api.CGManager0.
func (m *Manager) ListControllers0(*api.Request) ([]string, error) {
	return m.set.Controllers(), nil
}

// RemoveOnEmpty0 implements api.CGManager0: the cgroup goes once a task has
// been in it and none is left.
func (m *Manager) RemoveOnEmpty0(rq *api.Request, controller, cgroup string) (err error) {
	c, err := m.begin("RemoveOnEmpty", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	found, err := c.each(controller, func(h *cgfs.Hierarchy) error {
		p, _, err := c.openIn0(h, cgroup, relative)
		if err != nil {
			return err
		}
		r, err := c.planRemoval(p, quote(cgroup), privcheck.RemoveOnEmpty)
		if err != nil {
			return err
		}
		return c.mark(r)
	})
	if err == nil && !found {
		return c.missing0(cgroup)
	}
	return err
}

// mark is the one place that sets a RemoveOnEmpty mark.
func (c *call) mark(r *removal) error {
	if !r.decision.Allowed() {
		return api.Errorf(api.Denied, "%s %s: not decided", c.op, r.subject)
	}
	if err := c.m.reaper.mark(r.at.dir); err != nil {
		return c.kernel(r.subject, err)
	}
	c.done(r.name, r.at.h, r.decision)
	return nil
}

// Prune0 implements api.CGManager0: what is empty goes at once, the cgroup
// itself included; what is not is marked.
func (m *Manager) Prune0(rq *api.Request, controller, cgroup string) (err error) {
	c, err := m.begin("Prune", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	_, err = c.each(controller, func(h *cgfs.Hierarchy) error {
		p, _, err := c.openIn0(h, cgroup, relative)
		if err != nil {
			return err
		}
		r, err := c.planRemove(p, quote(cgroup))
		if err != nil {
			return err
		}
		return c.prune(r)
	})
	return err
}

func (c *call) prune(r *removal) error {
	if !r.decision.Allowed() {
		return api.Errorf(api.Denied, "%s %s: not decided", c.op, r.subject)
	}
	if busy, err := r.at.dir.Populated(); err != nil {
		return c.kernel(r.subject, err)
	} else if !busy {
		return c.remove([]*removal{r})
	}
	// As the place sees its descendants: all of them go with it (clause 7).
	err := r.at.dir.Walk(func(d *cgfs.Dir) error {
		err := r.prunable(d)
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
			if leaf, err := d.IsLeaf(); err != nil || leaf {
				return err // it goes with the one above
			}
			return c.m.reaper.mark(d)
		}
		return err
	})
	if err != nil {
		return c.kernel(r.subject, err)
	}
	c.done(r.name, r.at.h, r.decision)
	return nil
}

// prunable removes a cgroup met on the walk if nothing is in it.
func (r *removal) prunable(d *cgfs.Dir) error {
	up, err := r.at.h.Open(parent(d.Path()))
	if err != nil {
		return err
	}
	defer up.Close()
	err = up.Rmdir(base(d.Path()))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
