package manager

import (
	"cmp"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/rt/budget"
	"cgmanager/privcheck"
)

// maxValue bounds what is read of a control file, and so every reply.
const maxValue = 60 << 10

// Bounds of one request. Each write holds a descriptor until the end.
const (
	maxKeys   = 256
	maxWrites = 512
)

// setting is a key with a value, as the caller wrote them, and where the key
// lives on this host.
type setting struct {
	name, value string
	key         *cgfs.Key // nil for a kernel's own file name
	h           *cgfs.Hierarchy
	controller  string // "" for the core files
}

// settings are those of one request, sorted.
type settings struct {
	op   string
	name string // of the cgroup, as the caller wrote it
	all  []setting
}

// parse finds out where each key lives. Values are checked when the writes are
// planned, still before anything is written.
func (c *call) parse(name string, values map[string]string) (*settings, error) {
	s := &settings{op: c.op, name: name}
	if err := c.checkKeys(len(values)); err != nil {
		return nil, err
	}
	for k, v := range values {
		one, err := c.parseKey(k)
		if err != nil {
			return nil, err
		}
		if one.key != nil && one.key.ReadOnly {
			return nil, api.Errorf(api.Denied, "%s %q: key %q is read only", c.op, name, k)
		}
		one.value = v
		if err := c.checkValue(name, one); err != nil {
			return nil, err
		}
		s.all = append(s.all, one)
	}
	slices.SortFunc(s.all, func(a, b setting) int { return cmp.Compare(a.name, b.name) })
	return s, nil
}

// checkValue refuses a malformed value before anything is made or enabled for it.
// What depends on the values that there are is seen later.
func (c *call) checkValue(name string, s setting) error {
	if s.key == nil {
		return nil
	}
	nothing := func(string, string) (string, error) { return "", fs.ErrNotExist }
	if _, err := s.key.Writes(c.m.set, s.value, nothing); errors.Is(err, cgfs.ErrValue) {
		return c.kernel("key "+quote(s.name)+" of "+quote(name), err)
	}
	return nil
}

func (c *call) checkKeys(n int) error {
	if n > maxKeys {
		return api.Errorf(api.Limit, "%s: %d keys are too many, one request may have %d", c.op, n, maxKeys)
	}
	return nil
}

func (c *call) parseKey(name string) (setting, error) {
	s := setting{name: name}
	if k, ok := cgfs.FindKey(name); ok {
		s.key = k
		var err error
		s.h, s.controller, err = c.m.set.KeyHierarchy(k)
		if err != nil {
			return s, c.kernel(quote(name), err)
		}
		return s, nil
	}
	if err := cgfs.ValidFile(name); err != nil {
		return s, api.Errorf(api.Invalid, "%s: key %q: %v", c.op, name, err)
	}
	s.controller = cgfs.ControllerOf(name)
	if s.controller == "" {
		// A core file: version 2 has most of them. Those of version 1 (tasks,
		// notify_on_release, ...) are the same in every hierarchy.
		for _, h := range c.unnamed() {
			if s.h == nil || h.Version() == cgfs.V2 && strings.HasPrefix(name, "cgroup.") && name != "cgroup.procs" {
				s.h = h
			}
		}
		if s.h == nil {
			return s, api.Errorf(api.Unsupported, "%s: key %q: no hierarchy on this host", c.op, name)
		}
		return s, nil
	}
	h, ok := c.m.set.ByController(s.controller)
	if !ok {
		return s, c.kernel("key "+quote(name), c.m.set.Missing(s.controller))
	}
	s.h = h
	return s, nil
}

// onlyIn refuses keys of controllers that the request does not name, if it
// names any: also of one that shares its hierarchy with one named, or the answer
// would depend on the host.
func (c *call) onlyIn(s *settings, controllers []string) error {
	for _, one := range s.all {
		of := one.controller
		if of == "" && one.key != nil {
			of = one.key.V1Controller()
		}
		if len(controllers) > 0 && !slices.ContainsFunc(controllers, func(named string) bool {
			h, ok := c.m.set.ByController(named)
			return ok && h == one.h && covers(h, named, of)
		}) {
			return api.Errorf(api.Invalid, "%s %q: key %q belongs to the controller %s, which is not among those named", s.op, s.name, one.name, cmp.Or(of, one.h.Name()))
		}
	}
	return nil
}

// covers reports whether a controller of h, by either version's name, is the
// one called of. Files that every cgroup has are any controller's.
func covers(h *cgfs.Hierarchy, named, of string) bool {
	switch {
	case named == of, of == "":
		return true
	case h.Version() == cgfs.V2:
		on := h.Enables(of)
		return on != "" && on == h.Enables(named)
	}
	return !h.Has(named) // v2's name of the one that is meant
}

// controllers returns the controllers of h that the keys need.
func (s *settings) controllers(h *cgfs.Hierarchy) []string {
	var out []string
	for _, one := range s.all {
		ctrl := h.Enables(one.controller)
		if one.h == h && ctrl != "" && !slices.Contains(out, ctrl) {
			out = append(out, ctrl)
		}
	}
	return out
}

// write is one write to a control file: decided upon, and how to take it back.
type write struct {
	at       *place
	file     *cgfs.File
	value    string
	decision privcheck.Decision
	subject  string
	// old is what the file read before.
	old   string
	undos bool
}

// SetValue implements api.CGManager1.
func (m *Manager) SetValue(rq *api.Request, name string, values map[string]string) (err error) {
	c, err := m.begin("SetValue", rq)
	if err != nil {
		return err
	}
	defer c.end(&err)
	set, err := c.parse(name, values)
	if err != nil {
		return err
	}
	places, err := c.existing(name)
	if err != nil {
		return err
	}
	var u undo
	defer u.run()
	if err := c.setValues(set, places, c.reader(places, name), &u); err != nil {
		return err
	}
	u.release()
	return nil
}

// setValues plans every write, decides on every file, and only then writes;
// what cannot be taken back comes last. read gives what is there now.
func (c *call) setValues(set *settings, places []*place, read cgfs.Reader, u *undo) error {
	if len(set.all) == 0 {
		return nil
	}
	for _, at := range places {
		if err := c.give(at, set.controllers(at.h), in(quote(set.name), at.h)); err != nil {
			return err
		}
	}
	plan := newPlan(c, set, places, read)
	for _, s := range set.all {
		if s.key != nil && s.key.IsFile() && s.key.Translated(s.h) {
			plan.pending[s.controller+"/"+s.name] = s.value
		}
	}
	for _, s := range set.all {
		if err := plan.add(s); err != nil {
			return err
		}
	}
	if err := plan.decideAll(); err != nil {
		return err
	}
	ws := plan.writes
	if len(ws) > 1 {
		for _, w := range ws {
			if err := plan.remember(w); err != nil {
				return c.kernel(w.subject, err)
			}
		}
	}
	return c.write(ws, u)
}

// write writes in order. It is the only place that writes a control file's
// value.
func (c *call) write(ws []*write, u *undo) error {
	for _, w := range ws {
		if !w.decision.Allowed() {
			return api.Errorf(api.Denied, "%s %s: not decided", c.op, w.subject)
		}
		if err := writeLimit(w); err != nil {
			return c.unwritten(w.subject, w.at.dir, w.file.Name(), w.value, err)
		}
		if w.undos {
			u.add(func() {
				old, ok := cgfs.Restore(w.file.Name(), w.value, w.old)
				if !ok {
					return
				}
				if err := w.file.Write(old); err != nil {
					c.m.log.WithFields(logrus.Fields{"op": c.op, "target": w.subject}).WithError(err).Error("undo of a write failed")
				}
			})
		}
		c.done(w.subject, w.at.h, w.decision)
	}
	return nil
}

// unwritten is kernel for a write to a control file of d: about realtime the kernel's
// number alone says little.
func (c *call) unwritten(subject string, d *cgfs.Dir, file, value string, err error) error {
	if e := budget.Refusal(d, file, value, err); e != nil {
		e.Text = c.op + " " + subject + ": " + e.Text
		return e
	}
	return c.kernel(subject, err)
}

// writeLimit writes w. For a moment the kernel refuses a memory limit that is met
// already, because it takes back what it charged in advance on another processor
// only when that one gets to it.
func writeLimit(w *write) error {
	for try := 0; ; try++ {
		err := w.file.Write(w.value)
		if !errors.Is(err, unix.EBUSY) || try == 10 || !strings.HasPrefix(w.file.Name(), "memory.") {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// plan is the writes of one request, in the making.
type plan struct {
	*call
	places []*place
	read   cgfs.Reader
	name   string
	todo   []cgfs.Write
	keys   map[string]setting // by controller and file of the write
	writes []*write
	// pending holds values that are going to be written, by controller and
	// file: a later key is translated as if they were there.
	pending map[string]string
}

func newPlan(c *call, set *settings, places []*place, read cgfs.Reader) *plan {
	return &plan{call: c, places: places, read: read, name: set.name, keys: map[string]setting{}, pending: map[string]string{}}
}

func (p *plan) place(h *cgfs.Hierarchy) *place {
	for _, at := range p.places {
		if at.h == h {
			return at
		}
	}
	return nil
}

// add translates a key into writes.
func (p *plan) add(s setting) error {
	if err := p.decideName(s); err != nil {
		return err
	}
	todo := []cgfs.Write{{Controller: s.controller, File: s.name, Value: s.value, Final: cgfs.Final(s.name)}}
	if s.key != nil {
		var err error
		if todo, err = s.key.Writes(p.m.set, s.value, p.pendingOr); err != nil {
			return p.kernel(p.subject(s.name), err)
		}
	}
	for _, t := range todo {
		p.keys[t.Controller+"/"+t.File] = s
		p.pending[t.Controller+"/"+t.File] = t.Value
	}
	if p.todo = append(p.todo, todo...); len(p.todo) > maxWrites {
		return api.Errorf(api.Limit, "%s %q: the values come to more than %d writes", p.op, p.name, maxWrites)
	}
	return nil
}

// decideName decides on the control file that the caller named, where another
// one is written in its place: what nobody may write under one name, nobody
// may under the other.
func (p *plan) decideName(s setting) error {
	if s.key == nil || !s.key.IsFile() || privcheck.ClassOf(s.name) == privcheck.Delegable {
		return nil
	}
	at := p.place(s.h)
	if at == nil {
		return p.absent(s, s.h)
	}
	_, err := p.decide(p.subject(s.name), func(who *party) privcheck.Decision {
		return privcheck.SetValue(who.r, at.of(who), s.name, s.value, privcheck.Object{})
	})
	return err
}

func (p *plan) absent(s setting, h *cgfs.Hierarchy) error {
	return api.Errorf(api.NotFound, "%s %s: the cgroup does not exist in the hierarchy of %s", p.op, p.subject(s.name), h.Name())
}

func (p *plan) subject(key string) string { return "key " + quote(key) + " of " + quote(p.name) }

// decideAll orders the writes, opens their files, and decides on each.
func (p *plan) decideAll() error {
	todo, err := cgfs.Arrange(p.todo, p.read)
	if err != nil {
		return p.kernel(quote(p.name), err)
	}
	for _, t := range todo {
		s := p.keys[t.Controller+"/"+t.File]
		h := s.h
		if t.Controller != "" && t.Controller != s.controller {
			var ok bool
			if h, ok = p.m.set.ByController(t.Controller); !ok {
				return api.Errorf(api.Unsupported, "%s: key %q: this host has no controller %q", p.op, s.name, t.Controller)
			}
		}
		at := p.place(h)
		if at == nil {
			return p.absent(s, h)
		}
		w, err := p.planWrite(at, t.File, t.Value, p.subject(s.name))
		if err != nil {
			return err
		}
		p.writes = append(p.writes, w)
	}
	return nil
}

// planWrite opens a control file for writing and decides on it.
func (c *call) planWrite(at *place, file, value, subject string) (*write, error) {
	// What is no key for writing is refused before it is opened.
	if privcheck.ClassOf(file) == privcheck.NeverWritten {
		_, err := c.decide(subject, func(p *party) privcheck.Decision {
			return privcheck.SetValue(p.r, at.of(p), file, value, privcheck.Object{})
		})
		return nil, err
	}
	f, o, err := c.file(at, file, cgfs.ForWrite)
	if errors.Is(err, unix.ENOENT) {
		return nil, c.noSuchKey(at, file, subject).WithCause(err)
	}
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	d, err := c.decide(subject, func(p *party) privcheck.Decision {
		return privcheck.SetValue(p.r, at.of(p), file, value, o)
	})
	if err != nil {
		return nil, err
	}
	return &write{at: at, file: f, value: value, decision: d, subject: subject}, nil
}

// remember reads what a file holds before it is written.
func (p *plan) remember(w *write) error {
	if !cgfs.Readable(w.file.Name()) {
		return nil
	}
	f, err := w.at.dir.File(w.file.Name(), cgfs.ForRead)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := f.Read(maxValue)
	if err != nil {
		return err
	}
	w.old, w.undos = string(b), true
	return nil
}

// pendingOr reads what is going to be written, else what is there.
func (p *plan) pendingOr(controller, file string) (string, error) {
	if v, ok := p.pending[controller+"/"+file]; ok {
		return v, nil
	}
	return p.read(controller, file)
}

// reader reads control files of the cgroup called name, which is at places, or,
// where it does not exist in a hierarchy, of the nearest one above it that
// does, if the parties may.
func (c *call) reader(places []*place, name string) cgfs.Reader {
	return func(controller, file string) (string, error) {
		return c.readFile(places, controller, file, name)
	}
}

func (c *call) readFile(places []*place, controller, file, name string) (string, error) {
	h, ok := c.m.set.ByController(controller)
	if controller == "" {
		h, ok = c.m.set.Unified()
	}
	if !ok {
		return "", c.m.set.Missing(controller)
	}
	var at *place
	for _, p := range places {
		if p.h == h {
			at = p
		}
	}
	if at == nil {
		path := join(c.r().own(h), name)
		if err := c.confined(h, path, quote(name)); err != nil {
			return "", err
		}
		var err error
		if at, _, err = c.openDeepest(h, path); err != nil {
			return "", err
		}
	}
	return c.content(at, file, "key "+quote(file)+" of "+quote(name))
}

// content is what a cgfs.Reader of a place returns. The limits above count for
// who may read memory.stat: on v1 the kernel shows them there.
func (c *call) content(at *place, file, subject string) (string, error) {
	name := file
	if file == cgfs.LimitsInEffect {
		name = "memory.stat"
	}
	b, err := c.value(at, name, subject)
	if err == nil && file == cgfs.LimitsInEffect {
		return at.dir.LimitsInEffect()
	}
	return strings.TrimRight(string(b), "\n"), err
}

// noSuchKey is the error for a control file that a cgroup does not have: the
// kernel does not know it, or its controller was not given to the cgroup.
func (c *call) noSuchKey(at *place, file, subject string) *api.Error {
	e := api.Errorf(api.NotFound, "%s %s: no such key in the hierarchy of %s", c.op, subject, at.h.Name()).
		WithHint("docs/KEYS.md lists the keys, ListKeys (cgm listkeys) the files of a cgroup")
	if at.path == "/" {
		e.Text = c.op + " " + subject + ": the root of a hierarchy does not have this key (here that of " + at.h.Name() + ")"
		e.Hint = ""
		return e
	}
	ctrl := cgfs.ControllerOf(file)
	if at.h.Version() != cgfs.V2 || !at.h.Has(ctrl) {
		return e
	}
	if given, err := at.dir.Available(); err == nil && !slices.Contains(given, ctrl) {
		e.Text = c.op + " " + subject + ": the cgroup was not given the controller " + ctrl
		e.Hint = "on cgroup v2 it has to be enabled in every cgroup above; Create does so where it can"
	}
	return e
}

// value reads a control file if the parties may.
func (c *call) value(at *place, file, subject string) ([]byte, error) {
	f, err := at.dir.File(file, cgfs.ForRead)
	if errors.Is(err, unix.ENOENT) {
		return nil, c.noSuchKey(at, file, subject).WithCause(err)
	}
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	defer f.Close()
	a, err := f.Attr()
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	if _, err := c.decide(subject, func(p *party) privcheck.Decision {
		return privcheck.ReadValue(p.r, at.of(p), object(a))
	}); err != nil {
		return nil, err
	}
	b, err := f.Read(maxValue)
	if err != nil {
		return nil, c.kernel(subject, err)
	}
	return b, nil
}

// GetValue implements api.CGManager1.
func (m *Manager) GetValue(rq *api.Request, name string, keys []string) (_ map[string]string, err error) {
	c, err := m.begin("GetValue", rq)
	if err != nil {
		return nil, err
	}
	defer c.end(&err)
	if err := c.checkKeys(len(keys)); err != nil {
		return nil, err
	}
	out := make(map[string]string, len(keys))
	var places []*place
	for _, k := range keys {
		s, err := c.parseKey(k)
		if err != nil {
			return nil, err
		}
		if places == nil {
			if places, err = c.existing(name); err != nil {
				return nil, err
			}
		}
		v, err := c.get(s, places, name)
		if err != nil {
			return nil, err
		}
		out[k] = v
	}
	return out, nil
}

func (c *call) get(s setting, places []*place, name string) (string, error) {
	subject := "key " + quote(s.name) + " of " + quote(name)
	if s.key != nil && s.key.Translated(s.h) {
		v, err := s.key.Value(c.m.set, c.reader(places, name))
		if err != nil {
			return "", c.kernel(subject, err)
		}
		return v, nil
	}
	if s.controller == "" && (s.name == "tasks" || s.name == "cgroup.procs" || s.name == "cgroup.threads") {
		return c.tasksValue(places, s.name)
	}
	for _, at := range places {
		if at.h == s.h {
			b, err := c.value(at, s.name, subject)
			return strings.TrimRight(string(b), "\n"), err
		}
	}
	return "", api.Errorf(api.NotFound, "%s %s: the cgroup does not exist in the hierarchy of %s", c.op, subject, s.h.Name())
}
