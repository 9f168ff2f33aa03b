package manager

import (
	"errors"
	"fmt"
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
// host's, and to the users who made their user namespaces. What was removed, by
// whomever, is noticed when a bound is reached. A new daemon starts afresh.
type ledger struct {
	max     int
	mu      sync.Mutex
	made    map[quotaKey]*made // guarded by mu
	sweepAt int                // guarded by mu
}

// made holds the paths that are charged to somebody.
type made struct {
	paths map[string]struct{}
	swept time.Time
}

func newLedger(limit int) *ledger {
	return &ledger{max: limit, made: make(map[quotaKey]*made), sweepAt: maxQuotaKeys}
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
		have := l.made[quotaKey{h, o}]
		if have == nil || len(have.paths)+len(paths) <= l.max {
			continue
		}
		if time.Since(have.swept) > recount {
			have.sweep(h)
		}
		if len(have.paths)+len(paths) > l.max {
			return nil, api.Errorf(api.Limit, "%s: you have %d cgroups in %s already, no more than %d are allowed", c.op, len(have.paths), h.Name(), l.max).
				WithHint("remove those that are not in use")
		}
	}
	if len(l.made) >= l.sweepAt {
		for k, m := range l.made {
			if m.sweep(k.h); len(m.paths) == 0 {
				delete(l.made, k)
			}
		}
		l.sweepAt = max(maxQuotaKeys, 2*len(l.made))
	}
	for _, o := range owners {
		k := quotaKey{h, o}
		if l.made[k] == nil {
			l.made[k] = &made{paths: make(map[string]struct{})}
		}
		for _, p := range paths {
			l.made[k].paths[p] = struct{}{}
		}
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, o := range owners {
			if m := l.made[quotaKey{h, o}]; m != nil {
				for _, p := range paths {
					delete(m.paths, p)
				}
			}
		}
	}, nil
}

// sweep forgets what is there no more.
func (m *made) sweep(h *cgfs.Hierarchy) {
	for p := range m.paths {
		d, err := h.Open(p)
		if err == nil {
			_ = d.Close()
		} else if errors.Is(err, unix.ENOENT) {
			delete(m.paths, p)
		}
	}
	m.swept = time.Now()
}
