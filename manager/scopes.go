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

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/manager/systemd"
	"cgmanager/privcheck"
)

// scopes are what the manager asks for on a host whose first process is systemd. Each
// cgroup has one writer there: systemd, but for what it has delegated. A requestor
// whose own cgroup it has not delegated is given a scope of its own beside that,
// by systemd, and its names are relative to the scope.
type scopes struct {
	set *cgfs.Set
	log *logrus.Logger
	// tree is the hierarchy by whose cgroups systemd knows its units.
	tree *cgfs.Hierarchy
	hold func() (Holder, error)
	// starting holds back other requests of a uid that wait for a scope.
	starting locks[uint32]

	tending sync.Mutex // held by tend
	mu      sync.Mutex
	// there are the scopes that may still exist, by path, with what holds them
	// if this daemon has started it. Guarded by mu.
	there  map[string]Holder
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

// newScopes returns nil on a host that systemd does not run.
func newScopes(c Config) (*scopes, error) {
	if c.Hold == nil || !systemd.Running() {
		return nil, nil
	}
	cgroups, err := cgroupsOfFirst()
	if err != nil {
		return nil, fmt.Errorf("look where systemd is: %w", err)
	}
	sc := &scopes{set: c.Hierarchies, log: c.Log, hold: c.Hold, there: make(map[string]Holder)}
	for _, h := range c.Hierarchies.Hierarchies() {
		// systemd puts itself there, in v2 if it uses that at all.
		if path, _ := cgroups.Path(h); path == "/init.scope" && (h.Version() == cgfs.V2 || h.Has("name=systemd")) {
			sc.tree = h
		}
	}
	if sc.tree == nil {
		return nil, errors.New("systemd is the first process here, but the hierarchy that it uses is not among those managed")
	}
	return sc, sc.load()
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
func (sc *scopes) load() error {
	top, err := sc.tree.Open("/")
	if err != nil {
		return err
	}
	defer top.Close()
	return sc.loadFrom(top)
}

func (sc *scopes) loadFrom(slice *cgfs.Dir) error {
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
			err = sc.loadFrom(d)
		} else if _, ok, _ := d.Mark(scopeMark); ok {
			sc.tend1(d.Path(), nil)
		}
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (sc *scopes) close() {
	sc.mu.Lock()
	sc.closed = true
	if sc.timer != nil {
		sc.timer.Stop()
	}
	sc.mu.Unlock()
	sc.tending.Lock() // waits for tend
	defer sc.tending.Unlock()
}

// itsControllers are the v1 controllers that systemd manages.
var itsControllers = []string{"cpu", "cpuacct", "blkio", "memory", "devices", "pids"}

// managed reports whether systemd makes its units' cgroups in h.
func (sc *scopes) managed(h *cgfs.Hierarchy) bool {
	return h == sc.tree || h.Version() == cgfs.V1 && (h.Has("name=systemd") || slices.ContainsFunc(itsControllers, h.Has))
}

// scoped reports whether a scope has a cgroup in h.
func scoped(h *cgfs.Hierarchy) bool { return !h.Named() || h.Has("name=systemd") }

// delegated reports whether the cgroup path is no unit's of systemd, or below
// one that it has delegated. Another systemd's unit, below that, counts alike.
func (sc *scopes) delegated(path string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if !systemd.IsUnit(first) {
		return true
	}
	for ; path != "/"; path = parent(path) {
		d, err := sc.tree.Open(path)
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
func (sc *scopes) look(p *party) {
	own := p.present(sc.tree)
	if own == "" || sc.delegated(own) {
		return
	}
	p.undelegated = true
	if scope := scopePath(p.r.UID, own); sc.isScope(scope, p.r.UID, own) {
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
func (sc *scopes) isScope(path string, uid uint32, own string) bool {
	if path == "" {
		return false
	}
	d, err := sc.tree.Open(path)
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
	sc := c.m.scopes
	if sc == nil {
		return nil
	}
	for i := range c.parties {
		sc.look(&c.parties[i])
	}
	if r := c.r(); r.undelegated && r.scope == "" && !slices.Contains(changesNothing, c.op) {
		return c.obtain(r)
	}
	return nil
}

// obtain gets a scope for p.
func (c *call) obtain(p *party) error {
	sc := c.m.scopes
	defer sc.starting.lock(p.r.UID)()
	own := p.present(sc.tree)
	path := scopePath(p.r.UID, own)
	if sc.isScope(path, p.r.UID, own) { // another request was faster
		p.scope = path
		return nil
	}
	s := privcheck.Session{Own: own}
	if path != "" && !p.r.HostRoot() && !p.r.Outside() {
		s.Left = sc.left(p.present, path, sc.set.Hierarchies()...)
		s.Scopes = sc.count(path, p.r.UID)
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
	if err := sc.start(d, p, own, path); err != nil {
		c.m.log.WithFields(c.fields("scope", d)).WithError(err).Error("systemd gave no scope")
		kind, text := api.Internal, "systemd gave no scope; the daemon's log says more"
		if errors.Is(err, context.DeadlineExceeded) {
			kind, text = api.Busy, "systemd takes too long to start a scope for you"
		}
		return api.Errorf(kind, "%s: %s", c.op, text).WithCause(err)
	}
	p.scope = path
	f := c.fields("scope", d)
	f["in"], f["scope"] = sc.tree.Name(), path
	c.m.log.WithFields(f).Info("done")
	return nil
}

// count is how many scopes a uid has beside the one at path.
func (sc *scopes) count(path string, uid uint32) int {
	slice, err := sc.tree.Open(parent(path))
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
func (sc *scopes) left(at func(*cgfs.Hierarchy) string, scope string, hs ...*cgfs.Hierarchy) privcheck.Left {
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
				if l.Name == "devices.list" && sc.allDevices(own) {
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
func (sc *scopes) allDevices(path string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	all, err := systemd.AllDevices(ctx, path)
	if err != nil {
		sc.log.WithError(err).Warn("systemd does not say which devices a unit may use")
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
		dst.Left = c.m.scopes.left(p.present, p.scope, h)
	}
}
