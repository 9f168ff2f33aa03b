package manager

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/manager/systemd"
	"cgmanager/privcheck"
)

// beside is what the manager does on a host whose first process is systemd. Each
// cgroup has one writer there: systemd, but for what it has delegated. A requestor
// whose own cgroup it has not delegated is given a scope of its own beside that,
// by systemd, and its names are relative to the scope.
type beside struct {
	set *cgfs.Set
	log *logrus.Logger
	// tree is the hierarchy by whose cgroups systemd knows its units.
	tree *cgfs.Hierarchy
	hold func() (Holder, error)
	// starting holds back other requests of a uid that wait for a scope.
	starting locks[uint32]

	tending sync.Mutex // held by tend
	mu      sync.Mutex
	// scopes are those that may still be there, by path, with what holds them
	// if this daemon has started it. Guarded by mu.
	scopes map[string]Holder
	timer  *time.Timer // calls tend, while there are scopes; guarded by mu
	closed bool        // guarded by mu
}

// A Holder is a process that a scope begins with, since systemd starts none that
// is empty, and that keeps it while its owner puts no other process there.
type Holder interface {
	// PID is its pid.
	PID() int32
	// Keep makes it go on, as uid and gid. It ends with the daemon otherwise.
	Keep(uid, gid uint32) error
	// Ended reports whether it has ended, and if so lets go of its pid.
	Ended() bool
	// Close ends it.
	Close()
}

const (
	// scopeMark, on a scope's cgroup: "UID PATH", whose it is and which cgroup
	// it stands for.
	scopeMark = "scope"
	// holderMark, on the same: "PID START", the process that holds it.
	holderMark = "holder"
	// madeMark is on cgroups made because a scope is called so, in hierarchies
	// that systemd leaves alone.
	madeMark = "made"
)

// startTimeout is how long systemd may take to start a scope.
const startTimeout = 20 * time.Second

// newBeside returns nil on a host that systemd does not run.
func newBeside(c Config) (*beside, error) {
	if c.Hold == nil || !systemd.Running() {
		return nil, nil
	}
	cgroups, err := cgroupsOfFirst()
	if err != nil {
		return nil, fmt.Errorf("look where systemd is: %w", err)
	}
	b := &beside{set: c.Hierarchies, log: c.Log, hold: c.Hold, scopes: make(map[string]Holder)}
	for _, h := range c.Hierarchies.Hierarchies() {
		// systemd puts itself there, in v2 if it uses that at all.
		if path, _ := cgroups.Path(h); path == "/init.scope" && (h.Version() == cgfs.V2 || h.Has("name=systemd")) {
			b.tree = h
		}
	}
	if b.tree == nil {
		return nil, errors.New("systemd is the first process here, but the hierarchy that it uses is not among those managed")
	}
	return b, b.load()
}

func cgroupsOfFirst() (cgfs.ProcCgroup, error) {
	first, err := identity.Open(1, -1)
	if err != nil {
		return nil, err
	}
	defer first.Close()
	return first.Cgroups()
}

// load finds the scopes of an earlier run.
func (b *beside) load() error {
	top, err := b.tree.Open("/")
	if err != nil {
		return err
	}
	defer top.Close()
	return b.loadFrom(top)
}

func (b *beside) loadFrom(slice *cgfs.Dir) error {
	names, _, err := slice.Children()
	if err != nil {
		return nil //nolint:nilerr // it was removed meanwhile
	}
	for _, name := range names {
		isSlice := strings.HasSuffix(name, ".slice")
		if !isSlice && !strings.HasPrefix(name, scopePrefix) {
			continue
		}
		d, err := slice.Open(name)
		if err != nil {
			continue
		}
		if isSlice {
			err = b.loadFrom(d)
		} else if _, ok, _ := d.Mark(scopeMark); ok {
			b.tend1(d.Path(), nil)
		}
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *beside) close() {
	b.mu.Lock()
	b.closed = true
	if b.timer != nil {
		b.timer.Stop()
	}
	b.mu.Unlock()
	b.tending.Lock() // waits for tend
	defer b.tending.Unlock()
}

// itsControllers are the v1 controllers that systemd manages.
var itsControllers = []string{"cpu", "cpuacct", "blkio", "memory", "devices", "pids"}

// managed reports whether systemd makes its units' cgroups in h.
func (b *beside) managed(h *cgfs.Hierarchy) bool {
	return h == b.tree || h.Version() == cgfs.V1 && (h.Has("name=systemd") || slices.ContainsFunc(itsControllers, h.Has))
}

// scoped reports whether a scope has a cgroup in h.
func scoped(h *cgfs.Hierarchy) bool { return !h.Named() || h.Has("name=systemd") }

// delegated reports whether the cgroup path is no unit's of systemd, or below
// one that it has delegated. Another systemd's unit, below that, counts alike.
func (b *beside) delegated(path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if !systemd.IsUnit(first) {
		return true
	}
	for ; path != "/"; path = parent(path) {
		d, err := b.tree.Open(path)
		if err != nil {
			return false
		}
		marked, err := d.Delegated()
		_ = d.Close()
		if err == nil && marked {
			return true
		}
		if err != nil || systemd.IsUnit(base(path)) {
			return false
		}
	}
	return false
}

// look finds out how p's own cgroup stands to systemd.
func (b *beside) look(p *party) {
	own := p.present(b.tree)
	if own == "" || b.delegated(own) {
		return
	}
	p.undelegated = true
	if scope := scopePath(p.r.UID, own); b.isScope(scope, p.r.UID, own) {
		p.scope = scope
	}
}

const scopePrefix = "cgm-"

// scopePath returns the path of the scope that stands for the cgroup own, of
// those of a uid; "" where there can be none.
func scopePath(uid uint32, own string) string {
	slice, ok := privcheck.SliceOf(own)
	if !ok || len(own) > maxScopedPath {
		return ""
	}
	name := base(own)
	if stem, isScope := strings.CutSuffix(name, ".scope"); isScope && parent(own) == slice && systemd.IsUnit(name) && len(stem) < 128 {
		name = stem
	} else {
		sum := sha256.Sum256([]byte(own))
		name = hex.EncodeToString(sum[:8])
	}
	return join(slice, scopePrefix+strconv.FormatUint(uint64(uid), 10)+"-"+name+".scope")
}

// maxScopedPath leaves room for a uid in a mark.
const maxScopedPath = 240

func scopeOf(uid uint32, own string) string {
	return strconv.FormatUint(uint64(uid), 10) + " " + own
}

// isScope reports whether the scope at path is there for uid and own.
func (b *beside) isScope(path string, uid uint32, own string) bool {
	if path == "" {
		return false
	}
	d, err := b.tree.Open(path)
	if err != nil {
		return false
	}
	defer d.Close()
	mark, ok, err := d.Mark(scopeMark)
	return err == nil && ok && mark == scopeOf(uid, own)
}

// changesNothing are the requests that need no scope. MovePidAbs names its cgroup
// from the hierarchy's root, and is the host root's.
var changesNothing = []string{
	"GetValue", "ListKeys", "ListChildren", "ListControllers", "ListTasks", "GetTasks", "GetTasksRecursive",
	"GetPidCgroup", "GetPidCgroupAbs", "MovePidAbs",
}

// establish finds the parties' scopes, and asks for the requestor's where the
// request may change something.
func (c *call) establish() error {
	b := c.m.beside
	if b == nil {
		return nil
	}
	for i := range c.parties {
		b.look(&c.parties[i])
	}
	if r := c.r(); r.undelegated && r.scope == "" && !slices.Contains(changesNothing, c.op) {
		return c.obtain(r)
	}
	return nil
}

// obtain gets a scope for p.
func (c *call) obtain(p *party) error {
	b := c.m.beside
	defer b.starting.lock(p.r.UID)()
	own := p.present(b.tree)
	path := scopePath(p.r.UID, own)
	if b.isScope(path, p.r.UID, own) { // another request was faster
		p.scope = path
		return nil
	}
	s := privcheck.Session{Own: own}
	if path != "" && !p.r.HostRoot() && !p.r.Outside() {
		s.Left = b.left(p.present, path, b.set.Hierarchies()...)
		s.Scopes = b.count(path, p.r.UID)
	}
	d, err := c.decide("in your own cgroup", func(who *party) privcheck.Decision { return privcheck.Scope(who.r, s) })
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e.WithHint("set Delegate=yes in the unit that you run in, or start it by systemd-run --scope -p Delegate=yes")
	}
	if err != nil {
		return err
	}
	if path == "" {
		return api.Errorf(api.Limit, "%s: the path of your own cgroup is too long for a scope beside it", c.op)
	}
	if err := b.start(d, p, own, path); err != nil {
		c.m.log.WithFields(c.fields("scope", d)).WithError(err).Error("systemd gave no scope")
		kind, text := api.Internal, "systemd gave no scope; the daemon's log says more"
		if errors.Is(err, context.DeadlineExceeded) {
			kind, text = api.Busy, "systemd takes too long to start a scope for you"
		}
		return api.Errorf(kind, "%s: %s", c.op, text).WithCause(err)
	}
	p.scope = path
	f := c.fields("scope", d)
	f["in"], f["scope"] = b.tree.Name(), path
	c.m.log.WithFields(f).Info("done")
	return nil
}

// count is how many scopes a uid has beside the one at path.
func (b *beside) count(path string, uid uint32) int {
	slice, err := b.tree.Open(parent(path))
	if err != nil {
		return privcheck.MaxScopes
	}
	defer slice.Close()
	names, _, err := slice.Children()
	if err != nil {
		return privcheck.MaxScopes
	}
	prefix, n := scopePrefix+strconv.FormatUint(uint64(uid), 10)+"-", 0
	for _, name := range names {
		if strings.HasPrefix(name, prefix) {
			n++
		}
	}
	return n
}

// left gathers what no longer binds who goes from where at says into the scope at
// path: the limits in force up to the nearest common ancestor, and there those
// that bind the tasks of one cgroup alone.
func (b *beside) left(at func(*cgfs.Hierarchy) string, scope string, hs ...*cgfs.Hierarchy) privcheck.Left {
	var out privcheck.Left
	for _, h := range hs {
		if !scoped(h) {
			continue
		}
		own := at(h)
		common := privcheck.CommonAncestor(own, scope)
		if common == "" {
			return privcheck.Left{}
		}
		for ; own != common; own = parent(own) {
			limits, err := inForce(h, own)
			if err != nil {
				return privcheck.Left{}
			}
			for _, l := range limits {
				if l.Name == "devices.list" && b.allDevices(own) {
					continue
				}
				out.Limits = append(out.Limits, privcheck.Limit{Name: l.Name, File: object(l.Attr)})
			}
		}
		if flat, err := flatLimits(h, common); err != nil {
			return privcheck.Left{}
		} else if flat {
			out.Limits = append(out.Limits, privcheck.Limit{Name: "blkio.throttle", File: privcheck.Object{UID: privcheck.NoID, GID: privcheck.NoID}})
		}
	}
	out.Known = true
	return out
}

// allDevices asks systemd, the one writer of its unit's device rules, what the
// kernel does not show of them.
func (b *beside) allDevices(path string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	all, err := systemd.AllDevices(ctx, path)
	if err != nil {
		b.log.WithError(err).Warn("systemd does not say which devices a unit may use")
	}
	return err == nil && all
}

func inForce(h *cgfs.Hierarchy, path string) ([]cgfs.Limit, error) {
	d, err := h.Open(path)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.InForce()
}

func flatLimits(h *cgfs.Hierarchy, path string) (bool, error) {
	if !h.Flat() {
		return false, nil
	}
	d, err := h.Open(path)
	if err != nil {
		return false, err
	}
	defer d.Close()
	return d.FlatLimits()
}

// entering adds what Move needs to know of a task at path that may come from the
// cgroup that a party's scope stands for.
func (c *call) entering(p *party, h *cgfs.Hierarchy, path string, dst *privcheck.Place) {
	if p.scope == "" || !scoped(h) {
		return
	}
	dst.From = p.present(h)
	if path == dst.From && !p.r.HostRoot() {
		dst.Left = c.m.beside.left(p.present, p.scope, h)
	}
}

// start has systemd make a scope, and gives it to p.
func (b *beside) start(d privcheck.Decision, p *party, own, path string) error {
	if !d.Allowed() {
		return errors.New("not decided")
	}
	holder, err := b.hold()
	if err != nil {
		return fmt.Errorf("start the process that holds the scope: %w", err)
	}
	kept := false
	defer func() {
		if !kept {
			holder.Close()
		}
	}()
	slice := parent(path)
	unit, _, _ := strings.Cut(strings.TrimPrefix(own[len(slice):], "/"), "/")
	if slice == "/" {
		unit = base(own)
	}
	s := systemd.Scope{
		Name: base(path), Slice: base(slice), PID: holder.PID(),
		Description: fmt.Sprintf("Control groups of UID %d in %s", p.r.UID, unit),
	}
	if slice == "/" {
		s.Slice = "-.slice"
	}
	for _, h := range b.set.Hierarchies() {
		if h.Version() == cgfs.V1 && b.managed(h) && !h.Named() {
			s.Controllers = append(s.Controllers, slices.DeleteFunc(slices.Clone(h.Controllers()), func(ctrl string) bool {
				return !slices.Contains(itsControllers, ctrl)
			})...)
		}
	}
	if systemd.IsUnit(unit) {
		// It ends when systemd is told to stop the unit, as a session's
		// processes do or do not at its end (logind.conf(5), KillUserProcesses=).
		s.PartOf = unit
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := systemd.Start(ctx, s); err != nil {
		return err
	}
	if err := b.furnish(holder.PID(), p, own, path); err != nil {
		b.removeElsewhere(path)
		return err
	}
	if err := holder.Keep(p.r.UID, p.r.GID); err != nil {
		b.removeElsewhere(path)
		return err
	}
	kept = true
	b.tend1(path, holder)
	return nil
}

// furnish gives the new scope to p and makes its cgroups in the hierarchies that
// systemd leaves alone.
func (b *beside) furnish(holder int32, p *party, own, path string) error {
	process, start, at, err := b.process(holder)
	if err != nil {
		return err
	}
	process.Close()
	if at != path {
		return fmt.Errorf("systemd did not put process %d into %s", holder, path)
	}
	for _, h := range b.set.Hierarchies() {
		if !scoped(h) {
			continue
		}
		var d *cgfs.Dir
		if b.managed(h) {
			d, err = h.Open(path)
		} else {
			d, err = makeAll(h, path)
		}
		if err != nil {
			return fmt.Errorf("in %s: %w", h.Name(), err)
		}
		err = give(d, p.r.UID, p.r.GID)
		if err == nil && h == b.tree {
			err = errors.Join(
				d.SetMark(holderMark, fmt.Sprintf("%d %s", holder, start)),
				d.SetMark(scopeMark, scopeOf(p.r.UID, own)))
		}
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// makeAll makes what is missing on the way to path. All of it is root's.
func makeAll(h *cgfs.Hierarchy, path string) (*cgfs.Dir, error) {
	d, err := h.Open("/")
	if err != nil {
		return nil, err
	}
	for name := range strings.SplitSeq(path[1:], "/") {
		next, err := d.Open(name)
		if errors.Is(err, unix.ENOENT) {
			if next, err = d.Mkdir(name, 0, 0); err == nil {
				err = next.SetMark(madeMark, "1")
			}
		}
		_ = d.Close()
		if err != nil {
			return nil, err
		}
		d = next
	}
	return d, nil
}

// give gives a cgroup away, with its files of delegation and none of its limits.
func give(d *cgfs.Dir, uid, gid uint32) error {
	for _, name := range d.Hierarchy().DelegationFiles() {
		f, err := d.File(name, cgfs.ForFacts)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		err = f.SetOwner(uid, gid)
		_ = f.Close()
		if err != nil {
			return err
		}
	}
	return d.SetOwner(uid, gid)
}

// process opens a handle on a process, and returns when it was started and where
// it is in systemd's tree.
func (b *beside) process(pid int32) (p *identity.Process, start, path string, err error) {
	if p, err = identity.Open(pid, -1); err != nil {
		return nil, "", "", err
	}
	start, err = p.Started()
	if err == nil {
		var cgroups cgfs.ProcCgroup
		cgroups, err = p.Cgroups()
		path, _ = cgroups.Cgroup(b.tree)
	}
	if err != nil {
		p.Close()
		return nil, "", "", err
	}
	return p, start, path, nil
}

// tend1 looks after a scope from now on.
func (b *beside) tend1(path string, holder Holder) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if old := b.scopes[path]; old != nil {
		old.Close() // of an earlier one of that name: it has ended
	}
	b.scopes[path] = holder
	b.againLocked(lookAgain)
}

// againLocked has tend called after a while, unless it is going to be called.
func (b *beside) againLocked(after time.Duration) {
	if b.closed || b.timer != nil {
		return
	}
	b.timer = time.AfterFunc(after, b.tend)
}

// soon is when to look for what is left of a scope that has just been ended.
const soon = time.Second

// tend ends the scopes whose cgroup is gone and that nobody uses, and removes
// what is left of those that have ended.
func (b *beside) tend() {
	b.tending.Lock()
	defer b.tending.Unlock()
	b.mu.Lock()
	var paths []string
	if !b.closed {
		for path, holder := range b.scopes {
			paths = append(paths, path)
			if holder != nil && holder.Ended() {
				b.scopes[path] = nil
			}
		}
	}
	b.timer = nil
	b.mu.Unlock()
	after := lookAgain
	for _, path := range paths {
		ended, gone := b.tendTo(path)
		if ended {
			after = soon
		}
		if gone {
			b.mu.Lock()
			if holder := b.scopes[path]; holder == nil || holder.Ended() {
				delete(b.scopes, path)
			}
			b.mu.Unlock()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.scopes) > 0 {
		b.againLocked(after)
	}
}

// tendTo reports whether it has ended the process that holds a scope, and
// whether the scope and all that belongs to it are gone.
func (b *beside) tendTo(path string) (ended, gone bool) {
	d, err := b.tree.Open(path)
	if errors.Is(err, unix.ENOENT) {
		return false, b.removeElsewhere(path)
	}
	if err != nil {
		return false, false
	}
	defer d.Close()
	mark, _, err := d.Mark(scopeMark)
	_, own, ok := strings.Cut(mark, " ")
	if err != nil || !ok {
		return false, false
	}
	if session, err := b.tree.Open(own); err == nil {
		_ = session.Close()
		return false, false
	} else if !errors.Is(err, unix.ENOENT) {
		return false, false
	}
	pids, err := subtreeProcs(d)
	if err != nil || len(pids) != 1 {
		return false, false
	}
	mark, _, err = d.Mark(holderMark)
	if err != nil {
		return false, false
	}
	process, start, at, err := b.process(pids[0])
	if err != nil {
		return false, false
	}
	defer process.Close()
	if mark != fmt.Sprintf("%d %s", pids[0], start) || !privcheck.Below(path, at) {
		return false, false
	}
	if err := unix.PidfdSendSignal(process.PidFD(), unix.SIGKILL, nil, 0); err != nil {
		return false, false
	}
	b.log.WithFields(logrus.Fields{"op": "scope", "target": path}).Info("ended: what it stood for is gone, and nothing else is in it")
	return true, false
}

// removeElsewhere removes a scope's cgroups where systemd does not. It reports
// false where tasks are left in one.
func (b *beside) removeElsewhere(path string) bool {
	all := true
	for _, h := range b.set.Hierarchies() {
		if b.managed(h) || !scoped(h) {
			continue
		}
		for at := path; at != "/"; at = parent(at) {
			above, err := h.Open(parent(at))
			if err != nil {
				continue
			}
			removed := b.removeMade(above, base(at), at == path)
			_ = above.Close()
			if !removed {
				all = all && at != path
				break
			}
		}
	}
	return all
}

// removeMade removes a cgroup that has the mark, with what is below if all.
func (*beside) removeMade(above *cgfs.Dir, name string, all bool) bool {
	d, err := above.Open(name)
	if err != nil {
		return errors.Is(err, unix.ENOENT)
	}
	_, made, err := d.Mark(madeMark)
	_ = d.Close()
	if err != nil || !made {
		return false
	}
	if all {
		return above.RemoveTree(name, nil) == nil
	}
	return above.Rmdir(name) == nil
}
