package manager

import (
	"errors"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// place is a cgroup of one hierarchy, held open, with the facts about the
// directories that lead to it.
type place struct {
	h    *cgfs.Hierarchy
	path string // from the hierarchy's root
	dir  *cgfs.Dir
	// chain holds the directories from first, which is at or above the own
	// cgroup of every party that could reach path, down to path itself.
	first string
	chain []privcheck.Object
	top   *cgfs.Dir // at first; see call.top
}

// of returns the place as a party sees it.
func (p *place) of(who *party) privcheck.Place {
	own := who.own(p.h)
	v := privcheck.Place{Own: own, Target: p.path, Dir: p.chain[len(p.chain)-1]}
	if from := depth(own) - depth(p.first); from >= 0 && from < len(p.chain) && privcheck.Below(own, p.path) {
		v.Way = p.chain[from : len(p.chain)-1]
	}
	return v
}

func (p *place) object() privcheck.Object { return p.chain[len(p.chain)-1] }

func object(a cgfs.Attr) privcheck.Object {
	return privcheck.Object{UID: a.UID, GID: a.GID, Mode: a.Mode}
}

// depth counts the components of a path: 0 for "/".
func depth(path string) int {
	if path == "/" {
		return 0
	}
	return strings.Count(path, "/")
}

func join(dir, name string) string {
	if name == "" {
		return dir
	}
	if dir == "/" {
		return "/" + name
	}
	return dir + "/" + name
}

func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// confined refuses path if it does not lie below the own cgroup of every
// party. It is asked before anything is opened, so that nobody learns from an
// error what exists elsewhere.
func (c *call) confined(h *cgfs.Hierarchy, path, subject string) error {
	if err := c.nestedIn(h, subject); err != nil {
		return err
	}
	for i := range c.parties {
		if own := c.parties[i].own(h); !privcheck.Below(own, path) {
			_, err := c.decide(subject, func(p *party) privcheck.Decision {
				return privcheck.Over(p.r, privcheck.Place{Own: p.own(h), Target: path}, privcheck.Object{}, privcheck.Search)
			})
			if err == nil {
				err = api.Errorf(api.Denied, "%s %s: the cgroup is not below your own", c.op, subject)
			}
			return err
		}
	}
	return nil
}

// first returns the shallowest own cgroup among the parties, or path if that
// is shallower still: the directories from there on are needed as facts.
func (c *call) first(h *cgfs.Hierarchy, path string) string {
	first := path
	for i := range c.parties {
		if own := c.parties[i].own(h); privcheck.Below(own, first) {
			first = own
		}
	}
	return first
}

// top opens the directory at path, from where the call looks at what lies
// below, once per call. The call closes it.
func (c *call) top(h *cgfs.Hierarchy, path string) (*cgfs.Dir, error) {
	for _, d := range c.tops {
		if d.Hierarchy() == h && d.Path() == path {
			return d, nil
		}
	}
	d, err := h.Open(path)
	if err == nil {
		c.tops = append(c.tops, d)
	}
	return d, err
}

// open opens the cgroup path of h. The call closes it.
func (c *call) open(h *cgfs.Hierarchy, path string) (*place, error) {
	p, rest, err := c.openDeepest(h, path)
	if err != nil {
		return nil, err
	}
	if rest != "" {
		return nil, unix.ENOENT
	}
	return p, nil
}

// openDeepest opens the deepest directory that exists on the way to path, at
// or below the parties' own cgroups, and returns what is missing.
func (c *call) openDeepest(h *cgfs.Hierarchy, path string) (p *place, missing string, err error) {
	if path == "" {
		return nil, "", unix.ENOENT
	}
	first := c.first(h, path)
	top, err := c.top(h, first)
	if err != nil {
		return nil, "", err
	}
	p = &place{h: h, path: first, dir: top, first: first, top: top}
	c.close = append(c.close, p)
	rest := strings.TrimPrefix(path[len(first):], "/")
	if first == "/" {
		rest = path[1:]
	}
	for {
		a, err := p.dir.Attr()
		if err != nil {
			return nil, "", err
		}
		p.chain = append(p.chain, object(a))
		if rest == "" {
			return p, "", nil
		}
		name, after, _ := strings.Cut(rest, "/")
		next, err := p.dir.Open(name)
		if errors.Is(err, unix.ENOENT) {
			return p, rest, nil
		}
		if err != nil {
			return nil, "", err
		}
		p.Close()
		p.dir, p.path, rest = next, join(p.path, name), after
	}
}

// limits gathers which of the first n directories of p's chain have no limits
// but such as bind the cgroups below. The host's root, who may escape them, and
// hierarchies that have no others are not kept waiting for it.
func (c *call) limits(p *place, n int) error {
	for i := range n {
		p.chain[i].Hierarchical = !p.h.Flat()
	}
	free := !slices.ContainsFunc(c.parties, func(who party) bool { return !who.r.HostRoot() })
	if !p.h.Flat() || free {
		return nil
	}
	dir, rest := p.top, strings.TrimPrefix(p.path[len(p.first):], "/")
	defer func() { closeUnless(dir, p.top) }()
	for i := range n {
		flat, err := dir.FlatLimits()
		if err != nil {
			return err
		}
		p.chain[i].Hierarchical = !flat
		if i == n-1 || rest == "" {
			break
		}
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		next, err := dir.Open(name)
		if err != nil {
			return err
		}
		closeUnless(dir, p.top)
		dir = next
	}
	return nil
}

func closeUnless(dir, kept *cgfs.Dir) {
	if dir != kept {
		_ = dir.Close()
	}
}

// Close closes the directory, unless it is the call's.
func (p *place) Close() {
	closeUnless(p.dir, p.top)
}

// handle closes a directory or file with the call.
type handle struct{ io.Closer }

func (h handle) Close() { _ = h.Closer.Close() }

// file opens a control file of a place and gathers the facts about it. The
// call closes it.
func (c *call) file(p *place, name string, what cgfs.For) (*cgfs.File, privcheck.Object, error) {
	f, err := p.dir.File(name, what)
	if err != nil {
		return nil, privcheck.Object{}, err
	}
	c.close = append(c.close, handle{f})
	a, err := f.Attr()
	if err != nil {
		return nil, privcheck.Object{}, err
	}
	return f, object(a), nil
}

// tasksFile gathers the facts about the file that stands for the right to put
// tasks into a cgroup.
func (*call) tasksFile(p *place) (privcheck.Object, error) {
	a, err := p.dir.FileAttr(p.h.TasksFile())
	return object(a), err
}

// hierarchies resolves names of controllers, each hierarchy once, in the order
// of the set.
func (c *call) hierarchies(names []string) ([]*cgfs.Hierarchy, error) {
	if len(names) == 1 {
		if h, ok := c.m.set.ByController(names[0]); ok {
			return []*cgfs.Hierarchy{h}, nil
		}
	}
	want := make(map[*cgfs.Hierarchy]bool, len(names))
	for _, n := range names {
		h, ok := c.m.set.ByController(n)
		if !ok {
			kind, text := classify(c.m.set.Missing(n))
			return nil, api.Errorf(kind, "%s: %s", c.op, text).
				WithHint("ListControllers (cgm listcontrollers) names those that this host has")
		}
		want[h] = true
	}
	var hs []*cgfs.Hierarchy
	for _, h := range c.m.set.Hierarchies() {
		if want[h] {
			hs = append(hs, h)
		}
	}
	return hs, nil
}

// unnamed returns the hierarchies that a request without a controller list
// means: all but those with a name and no controller.
func (c *call) unnamed() []*cgfs.Hierarchy {
	var hs []*cgfs.Hierarchy
	for _, h := range c.m.set.Hierarchies() {
		if !h.Named() {
			hs = append(hs, h)
		}
	}
	return hs
}

// checkName checks a name of CGManager1.
func (c *call) checkName(name string) error {
	if err := cgfs.ValidName(name); err != nil {
		return api.Errorf(api.Invalid, "%s %q: %v", c.op, name, err)
	}
	if slices.ContainsFunc(strings.Split(name, "/"), cgfs.LeafName) {
		return api.Errorf(api.Invalid, "%s %q: the name is kept for the daemon's own use", c.op, name)
	}
	return nil
}

// placed reports whether the requestor has a place of its own in h: an outside
// one at a hierarchy's root was never put anywhere, and has no rights there.
func (c *call) placed(h *cgfs.Hierarchy) bool {
	own := c.r().own(h)
	return own != "" && (own != "/" || !c.r().r.Outside())
}

// existing opens the cgroup called name in every unnamed hierarchy in which
// it exists and the requestor has a place. None at all is an error.
func (c *call) existing(name string) ([]*place, error) {
	if err := c.checkName(name); err != nil {
		return nil, err
	}
	var ps []*place
	placed := false
	for _, h := range c.unnamed() {
		if !c.placed(h) {
			continue
		}
		placed = true
		path := join(c.r().own(h), name)
		if err := c.confined(h, path, quote(name)); err != nil {
			return nil, err
		}
		p, err := c.open(h, path)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, c.kernel(quote(name), err)
		}
		ps = append(ps, p)
	}
	if len(ps) > 0 {
		return ps, nil
	}
	if !placed {
		return nil, c.nowhere(name)
	}
	return nil, api.Errorf(api.NotFound, "%s %q: no such cgroup", c.op, name)
}

// nowhere refuses a requestor that nobody has put into a cgroup.
func (c *call) nowhere(name string) error {
	c.refused(quote(name), requestor, privcheck.Decision{}, "not placed in any hierarchy")
	return api.Errorf(api.Denied, "%s %q: you are in no cgroup of your own in any hierarchy", c.op, name).
		WithHint("whoever started the container has to put it into a cgroup first")
}

// in is a subject with the hierarchy it lies in, for errors that concern one
// of several.
func in(subject string, h *cgfs.Hierarchy) string { return subject + " in " + h.Name() }

// undo takes back what was done so far, last first, unless released.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u *undo) release() { *u = nil }

func (u *undo) run() {
	for _, f := range slices.Backward(*u) {
		f()
	}
	*u = nil
}
