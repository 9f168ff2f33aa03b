package manager

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// ListControllers implements api.CGManager1.
func (m *Manager) ListControllers(rq *api.Request, name *string) (_ []string, err error) {
	if name == nil {
		return m.set.Controllers(), nil
	}
	c, err := m.begin("ListControllers", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	places, err := c.existing(*name)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range places {
		if _, err := c.decide(quote(*name), func(who *party) privcheck.Decision {
			return privcheck.Over(who.r, p.of(who), p.object(), privcheck.Search)
		}); err != nil {
			return nil, err
		}
		for _, ctrl := range m.set.Controllers() {
			if h, ok := m.set.ByController(ctrl); ok && h == p.h {
				out = append(out, ctrl)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// ListChildren implements api.CGManager1: the union over all hierarchies.
func (m *Manager) ListChildren(rq *api.Request, name string) (_ []string, err error) {
	c, err := m.begin("ListChildren", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	places, err := c.existing(name)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range places {
		names, err := c.children(p, quote(name))
		if err != nil {
			return nil, err
		}
		out = append(out, names...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (c *call) children(p *place, subject string) ([]string, error) {
	if _, err := c.decide(subject, func(who *party) privcheck.Decision {
		return privcheck.ReadValue(who.r, p.of(who), p.object())
	}); err != nil {
		return nil, err
	}
	names, _, err := p.dir.Children()
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	return names, nil
}

// ListTasks implements api.CGManager1: the union over all hierarchies.
func (m *Manager) ListTasks(rq *api.Request, name string) (_ []uint32, _ uint32, err error) {
	c, err := m.begin("ListTasks", rq)
	if err != nil {
		return nil, 0, err
	}
	defer c.end(&err)
	places, err := c.existing(name)
	if err != nil {
		return nil, 0, err
	}
	pids, err := c.tasks(places, "cgroup.procs", quote(name))
	if err != nil {
		return nil, 0, err
	}
	seen, hidden := c.translate(pids)
	return seen, uint32(hidden), nil
}

// tasks returns the union of what the places' files of tasks hold, sorted, in
// the daemon's numbers. file is "tasks", "cgroup.procs" or "cgroup.threads".
// Tasks that the daemon itself cannot see are 0, each for itself.
func (c *call) tasks(places []*place, file, subject string) ([]int32, error) {
	var all []int32
	for _, p := range places {
		o, err := c.tasksFile(p)
		if err != nil {
			return nil, c.kernel(subject, err)
		}
		if _, err := c.decide(subject, func(who *party) privcheck.Decision {
			return privcheck.ReadValue(who.r, p.of(who), o)
		}); err != nil {
			return nil, err
		}
		pids, err := members(p.dir, file)
		if err != nil {
			return nil, c.kernel(subject, err)
		}
		all = append(all, pids...)
	}
	slices.Sort(all)
	zeros := 0
	for zeros < len(all) && all[zeros] <= 0 {
		zeros++
	}
	return append(all[:zeros:zeros], slices.Compact(all[zeros:])...), nil
}

// members returns the tasks in d, those in its hidden leaf included: processes if
// file is "cgroup.procs", else threads, of which "tasks" is v1's list.
func members(d *cgfs.Dir, file string) ([]int32, error) {
	list := (*cgfs.Dir).Threads
	if file == "cgroup.procs" {
		list = (*cgfs.Dir).Procs
	}
	pids, err := list(d)
	if err != nil {
		return nil, err
	}
	leaf, err := d.Leaf()
	if errors.Is(err, unix.ENOENT) {
		return pids, nil
	}
	if err != nil {
		return nil, err
	}
	defer leaf.Close()
	more, err := list(leaf)
	return append(pids, more...), err
}

// translate turns the daemon's pids into the requestor's, sorted, and counts
// those that it cannot see.
func (c *call) translate(pids []int32) (seen []uint32, hidden int) {
	seen = make([]uint32, 0, len(pids))
	for _, pid := range pids {
		if n, ok := c.m.host.PIDIn(c.r().proc, pid); ok {
			seen = append(seen, n)
		} else {
			hidden++
		}
	}
	slices.Sort(seen)
	return seen, hidden
}

// tasksValue is a file of tasks read as a value: the requestor's numbers, one
// a line.
func (c *call) tasksValue(places []*place, file string) (string, error) {
	pids, err := c.tasks(places, file, "key "+quote(file))
	if err != nil {
		return "", err
	}
	seen, _ := c.translate(pids)
	var b strings.Builder
	for i, pid := range seen {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(strconv.FormatUint(uint64(pid), 10))
		if b.Len() > maxValue {
			return "", api.Errorf(api.Limit, "%s: too many tasks for a value", c.op).WithHint("use ListTasks")
		}
	}
	return b.String(), nil
}

// keys lists the control files of a place.
func (c *call) keys(p *place, subject string) ([]api.Key, error) {
	if _, err := c.decide(subject, func(who *party) privcheck.Decision {
		return privcheck.ReadValue(who.r, p.of(who), p.object())
	}); err != nil {
		return nil, err
	}
	names, err := p.dir.Files()
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	out := make([]api.Key, 0, len(names))
	for _, n := range names {
		f, err := p.dir.File(n, cgfs.ForFacts)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, c.kernel(subject, err)
		}
		a, err := f.Attr()
		_ = f.Close()
		if err != nil {
			return nil, c.kernel(subject, err)
		}
		k := api.Key{Name: n, UID: a.UID, GID: a.GID, Mode: a.Mode}
		if !c.scm {
			k.UID, _ = c.r().r.UIDs.ToInside(a.UID)
			k.GID, _ = c.r().r.GIDs.ToInside(a.GID)
		}
		out = append(out, k)
	}
	return out, nil
}
