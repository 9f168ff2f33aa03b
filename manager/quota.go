package manager

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"cgmanager/api"
	"cgmanager/cgfs"
)

// DefaultMaxCgroups is how many cgroups an owner may have in a hierarchy.
const DefaultMaxCgroups = 4096

// quota bounds the cgroups per owner and hierarchy: those cost kernel memory
// that no limit of version 1 accounts for. An owner is a uid of the host, or a
// container, which is everything below the requestor's own cgroup whatever uid
// it has. The counts are hints that save a walk; where one reaches the bound,
// the hierarchy is counted again. The host's root is not bounded.
type quota struct {
	max int
	mu  sync.Mutex
	n   map[quotaKey]*quotaCount // guarded by mu
}

type quotaKey struct {
	h     *cgfs.Hierarchy
	owner string
}

type quotaCount struct {
	n       int
	counted time.Time
}

// recount is how long a count that reached the bound is believed.
const recount = time.Second

func newQuota(limit int) *quota {
	if limit == 0 {
		limit = DefaultMaxCgroups
	}
	return &quota{max: limit, n: make(map[quotaKey]*quotaCount)}
}

// take charges n new cgroups in h to whoever asks, or refuses. The returned
// function gives them back.
func (q *quota) take(c *call, h *cgfs.Hierarchy, n int) (func(), error) {
	r := c.r()
	if r.r.HostRoot() {
		return func() {}, nil
	}
	key, from, mine := quotaKey{h: h}, "/", func(a cgfs.Attr) bool { return a.UID == r.r.UID }
	if r.r.Outside() {
		from, mine = r.own(h), func(cgfs.Attr) bool { return true }
		key.owner = from
	} else {
		key.owner = fmt.Sprint(r.r.UID)
	}
	q.mu.Lock()
	count, ok := q.n[key]
	fresh := ok && (count.n+n <= q.max || time.Since(count.counted) < recount)
	q.mu.Unlock()
	if !fresh {
		have, err := census(h, from, mine)
		if err != nil {
			return nil, c.kernel("counting cgroups", err)
		}
		count = &quotaCount{n: have, counted: time.Now()}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.n) > maxQuotaKeys {
		clear(q.n)
	}
	q.n[key] = count
	if count.n+n > q.max {
		return nil, api.Errorf(api.Limit, "%s: you have %d cgroups in %s already, no more than %d are allowed", c.op, count.n, h.Name(), q.max).
			WithHint("remove those that are not in use")
	}
	count.n += n
	return func() {
		q.mu.Lock()
		count.n -= n
		q.mu.Unlock()
	}, nil
}

// maxQuotaKeys bounds the table; counts are hints and may be forgotten.
const maxQuotaKeys = 4096

// census counts the cgroups below path that mine says are the owner's. The
// daemon makes none that a survey passes over for their depth.
func census(h *cgfs.Hierarchy, path string, mine func(cgfs.Attr) bool) (int, error) {
	top, err := h.Open(path)
	if err != nil {
		return 0, err
	}
	defer top.Close()
	n := 0
	err = top.Survey(func(d *cgfs.Dir) error {
		a, err := d.Attr()
		if err != nil {
			return nil //nolint:nilerr // removed meanwhile: not counted
		}
		if d.Path() != path && mine(a) {
			n++
		}
		return nil
	})
	if errors.Is(err, cgfs.ErrTooBig) {
		err = nil // a container's own are too many then; a user's are among those of others
	}
	return n, err
}
