package manager

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
)

// ledger bounds what a container makes wherever it is: quota counts below the
// requestor's own cgroup, and whoever moves into one of a thousand cgroups of
// its own, or makes namespaces side by side, has a thousand counts there. The
// cgroups made are charged to every container around the requestor, up to the
// host's, and to the users who made their user namespaces. What the daemon
// removes is charged no more; what others removed is noticed when a bound is
// reached. A new daemon starts afresh.
type ledger struct {
	max     int
	mu      sync.Mutex
	tops    map[*cgfs.Hierarchy]*charged // the hierarchies' roots; guarded by mu
	made    map[quotaKey]*made           // guarded by mu
	sweepAt int                          // guarded by mu
}

// charged is a cgroup that is charged to somebody, or lies above one that is.
type charged struct {
	above  *charged // nil for a root
	name   string
	below  map[string]*charged
	owners []quotaKey
	// making counts the requests that may be about to make it. Until they are
	// done its absence says nothing.
	making int
}

// made are the cgroups that are charged to somebody.
type made struct {
	cgroups map[*charged]struct{}
	swept   time.Time
}

func newLedger(limit int) *ledger {
	return &ledger{max: limit, tops: make(map[*cgfs.Hierarchy]*charged), made: make(map[quotaKey]*made), sweepAt: maxQuotaKeys}
}

// charge charges new cgroups, by their paths, to the containers around whoever
// asks, or refuses. The returned function gives them back.
func (l *ledger) charge(c *call, h *cgfs.Hierarchy, paths []string) (func(), error) {
	r := c.r()
	if !r.r.Outside() {
		return func() {}, nil // its uid is counted everywhere
	}
	owners, err := c.m.host.Containers(r.proc)
	if err != nil {
		return nil, c.kernel("counting cgroups", err)
	}
	makers, err := c.m.host.Makers(r.proc)
	if err != nil {
		return nil, c.kernel("counting cgroups", err)
	}
	for _, uid := range makers {
		if uid != 0 {
			owners = append(owners, fmt.Sprintf("uid:%d", uid))
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range owners {
		k := quotaKey{h, o}
		have := l.made[k]
		if have == nil || len(have.cgroups)+len(paths) <= l.max {
			continue
		}
		if time.Since(have.swept) > recount {
			l.sweepLocked(k)
		}
		if len(have.cgroups)+len(paths) > l.max {
			return nil, api.Errorf(api.Limit, "%s: you have %d cgroups in %s already, no more than %d are allowed", c.op, len(have.cgroups), h.Name(), l.max).
				WithHint("remove those that are not in use")
		}
	}
	if len(l.made) >= l.sweepAt {
		for k := range l.made {
			l.sweepLocked(k)
		}
		l.sweepAt = max(maxQuotaKeys, 2*len(l.made))
	}
	b := &bill{l: l}
	for _, p := range paths {
		n := l.atLocked(h, p, true)
		n.making++
		b.cgroups = append(b.cgroups, n)
		for _, o := range owners {
			b.addLocked(n, quotaKey{h, o})
		}
	}
	c.close = append(c.close, b)
	return b.giveBack, nil
}

// bill is what a request was charged.
type bill struct {
	l       *ledger
	cgroups []*charged
	added   []item
}

// item is a charge that was not there before.
type item struct {
	n *charged
	k quotaKey
}

func (b *bill) addLocked(n *charged, k quotaKey) {
	m := b.l.made[k]
	if m == nil {
		m = &made{cgroups: make(map[*charged]struct{})}
		b.l.made[k] = m
	}
	if _, there := m.cgroups[n]; !there {
		m.cgroups[n] = struct{}{}
		n.owners = append(n.owners, k)
		b.added = append(b.added, item{n, k})
	}
}

// giveBack takes the request's own charges back.
func (b *bill) giveBack() {
	b.l.mu.Lock()
	defer b.l.mu.Unlock()
	for _, i := range b.added {
		b.l.acquitLocked(i.n, i.k)
	}
	b.added = nil
}

// Close says that the request is over, and made what it makes.
func (b *bill) Close() {
	b.l.mu.Lock()
	defer b.l.mu.Unlock()
	for _, n := range b.cgroups {
		n.making--
		b.l.pruneLocked(n)
	}
}

// gone forgets a cgroup that was removed, with those below, unless it is there
// again.
func (l *ledger) gone(h *cgfs.Hierarchy, path string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := l.atLocked(h, path, false); n != nil && absent(h, path) {
		l.forgetLocked(n)
	}
}

// atLocked returns what is known of a cgroup, or nil. With add it is made known.
func (l *ledger) atLocked(h *cgfs.Hierarchy, path string, add bool) *charged {
	n := l.tops[h]
	if n == nil && add {
		n = &charged{}
		l.tops[h] = n
	}
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if n == nil || name == "" {
			return n
		}
		next := n.below[name]
		if next == nil && add {
			next = &charged{above: n, name: name}
			if n.below == nil {
				n.below = make(map[string]*charged)
			}
			n.below[name] = next
		}
		n = next
	}
	return n
}

// path is that of a cgroup from its hierarchy's root.
func (n *charged) path() string {
	if n.above == nil {
		return "/"
	}
	return join(n.above.path(), n.name)
}

// acquitLocked takes a charge back.
func (l *ledger) acquitLocked(n *charged, k quotaKey) {
	n.owners = slices.DeleteFunc(n.owners, func(o quotaKey) bool { return o == k })
	if m := l.made[k]; m != nil {
		if delete(m.cgroups, n); len(m.cgroups) == 0 {
			delete(l.made, k)
		}
	}
}

// forgetLocked takes all charges of a cgroup that is not there back, and of
// those below, but for what is about to be made.
func (l *ledger) forgetLocked(n *charged) {
	for _, b := range n.below {
		l.forgetLocked(b)
	}
	if n.making > 0 {
		return
	}
	for _, k := range slices.Clone(n.owners) {
		l.acquitLocked(n, k)
	}
	l.pruneLocked(n)
}

// pruneLocked drops what nothing is known of, up to the root.
func (l *ledger) pruneLocked(n *charged) {
	for n.above != nil && n.making == 0 && len(n.owners) == 0 && len(n.below) == 0 {
		delete(n.above.below, n.name)
		n = n.above
	}
}

// sweepLocked forgets what is there no more of somebody's.
func (l *ledger) sweepLocked(k quotaKey) {
	m := l.made[k]
	if m == nil {
		return
	}
	for n := range m.cgroups {
		if absent(k.h, n.path()) {
			l.forgetLocked(n)
		}
	}
	m.swept = time.Now()
}

// absent reports whether there is surely no such cgroup.
func absent(h *cgfs.Hierarchy, path string) bool {
	d, err := h.Open(path)
	if err == nil {
		_ = d.Close()
	}
	return errors.Is(err, unix.ENOENT)
}
