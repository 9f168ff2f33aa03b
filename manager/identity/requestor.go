package identity

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"cgmanager/privcheck"
)

// ErrNotItsIDs says that a credential names ids that the process it names
// does not have: a forgery by somebody privileged over it.
var ErrNotItsIDs = errors.New("the credential's ids are not those of the process")

// Host knows the daemon's own namespaces.
type Host struct{ user, pid, cgroup ns }

// NewHost looks at the daemon's own namespaces.
func NewHost() (*Host, error) {
	fd, err := unix.Open("/proc/self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc/self: %w", err)
	}
	defer closeFD(fd)
	h := &Host{}
	for _, n := range []struct {
		name string
		to   *ns
	}{{"ns/user", &h.user}, {"ns/pid", &h.pid}, {"ns/cgroup", &h.cgroup}} {
		if *n.to, err = namespaceAt(fd, n.name); err != nil {
			return nil, fmt.Errorf("read /proc/self/%s: %w", n.name, err)
		}
	}
	return h, nil
}

// identityMap is the map of the daemon's own user namespace, seen from it.
var identityMap = privcheck.IDMap{{Inside: 0, Outside: 0, Count: privcheck.NoID}}

// Requestor gathers the facts about p as one who asks with the ids uid and
// gid. proven says that the kernel vouches for them (SO_PEERCRED of p itself);
// otherwise they must be among p's ids, else the error is ErrNotItsIDs. The
// caller asks p.Alive() after everything has been read.
func (h *Host) Requestor(p *Process, uid, gid uint32, proven bool) (privcheck.Requestor, error) {
	r := privcheck.Requestor{UID: uid, GID: gid, SamePIDNS: p.pidNS == h.pid}
	user, err := p.namespace("ns/user")
	if err != nil {
		return r, err
	}
	r.SameUserNS = user == h.user
	mayBeHostRoot := uid == 0 && r.SameUserNS && r.SamePIDNS
	if !proven {
		c, err := p.credentials()
		if err != nil {
			return r, err
		}
		if !c.hasIDs(uid, gid) {
			return r, ErrNotItsIDs
		}
	}
	if mayBeHostRoot {
		if r.SysAdmin, err = p.sysAdmin(); err != nil {
			return r, err
		}
		cg, err := p.namespace("ns/cgroup")
		if err != nil {
			return r, err
		}
		r.SameCgroupNS = cg == h.cgroup
	}
	r.Capable = r.Outside() || r.SysAdmin
	if r.SameUserNS {
		r.UIDs, r.GIDs = identityMap, identityMap
	} else {
		if r.UIDs, err = p.idMap("uid_map"); err != nil {
			return r, err
		}
		if r.GIDs, err = p.idMap("gid_map"); err != nil {
			return r, err
		}
	}
	if r.SameUserNS && !mayBeHostRoot {
		return r, nil
	}
	// The maps, or the capabilities, and the namespace must be of one moment: p
	// may have entered another namespace in between, and in one of its own
	// making it has every capability.
	if again, err := p.namespace("ns/user"); err != nil {
		return r, err
	} else if again != user {
		return r, fmt.Errorf("the process changed its user namespace: %w", unix.EAGAIN)
	}
	return r, nil
}

func (p *Process) idMap(name string) (privcheck.IDMap, error) {
	b, err := p.read(name)
	if err != nil {
		return nil, err
	}
	return ParseIDMap(b)
}

// InnerUID returns uid as seen from p's user namespace.
func (h *Host) InnerUID(p *Process, uid uint32) (uint32, bool) {
	user, err := p.namespace("ns/user")
	if err != nil {
		return 0, false
	}
	if user == h.user {
		return uid, uid != privcheck.NoID
	}
	m, err := p.idMap("uid_map")
	if err != nil {
		return 0, false
	}
	return m.ToInside(uid)
}

// maxNesting bounds how many namespaces are looked at on the way outwards; the
// kernel allows 32 of either type within each other.
const maxNesting = 34

// chain returns the namespaces of one type from p's own outwards, up to and
// not including the daemon's.
func (p *Process) chain(name string, host ns) ([]ns, error) {
	var out []ns
	err := p.outwards(name, host, func(n ns, _ int) error {
		out = append(out, n)
		return nil
	})
	return out, err
}

// outwards calls f for the namespaces that chain returns, with a handle on
// each.
func (p *Process) outwards(name string, host ns, f func(n ns, fd int) error) error {
	own, err := p.namespace(name)
	if err != nil {
		return err
	}
	if own == host {
		return nil
	}
	fd, err := unix.Openat(p.proc, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return gone(err)
	}
	defer func() { closeFD(fd) }()
	for range maxNesting {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		n := ns(st.Ino)
		if n == host {
			return nil
		}
		if err := f(n, fd); err != nil {
			return err
		}
		up, err := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		if err != nil {
			return fmt.Errorf("ioctl NS_GET_PARENT: %w", err)
		}
		closeFD(fd)
		fd = up
	}
	return errors.New("namespaces nested too deep")
}

// Makers returns the uids of those who made the user namespaces around p, each
// once, for accounting: whoever has a range of subordinate uids can make as many
// namespaces side by side as it likes, each with another uid.
func (h *Host) Makers(p *Process) ([]uint32, error) {
	var uids []uint32
	err := h.makers(p, func(uid uint32) {
		if !slices.Contains(uids, uid) {
			uids = append(uids, uid)
		}
	})
	return uids, err
}

// makers calls f with who made each of the user namespaces around p, from its own
// outwards.
func (h *Host) makers(p *Process, f func(uid uint32)) error {
	return p.outwards("ns/user", h.user, func(_ ns, fd int) error {
		uid, err := unix.IoctlGetUint32(fd, unix.NS_GET_OWNER_UID)
		if err != nil {
			return fmt.Errorf("ioctl NS_GET_OWNER_UID: %w", err)
		}
		f(uid)
		return nil
	})
}

// Containers names the containers around p for accounting: each user and each
// pid namespace from its own outwards, the daemon's not included.
func (h *Host) Containers(p *Process) ([]string, error) {
	around, err := h.Nesting(p)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range around.user {
		out = append(out, fmt.Sprintf("user:%d", n))
	}
	for _, n := range around.pid {
		out = append(out, fmt.Sprintf("pid:%d", n))
	}
	return out, nil
}

// Nesting names the user and the pid namespaces of a process, each from its own
// outwards to, not including, the daemon's.
type Nesting struct{ user, pid []ns }

// Nesting returns where p is among namespaces.
func (h *Host) Nesting(p *Process) (n Nesting, err error) {
	if n.user, err = p.chain("ns/user", h.user); err != nil {
		return n, err
	}
	n.pid, err = p.chain("ns/pid", h.pid)
	return n, err
}

// Encloses reports whether inner's user and pid namespaces are n's own or lie
// within them.
func (n Nesting) Encloses(inner Nesting) bool {
	return encloses(n.user, inner.user) && encloses(n.pid, inner.pid)
}

// Container names the container in which a process is: the inode numbers of its user
// and its pid namespace, 0 where that is the daemon's. A number may be another
// namespace's once this one is gone.
type Container struct{ User, PID uint64 }

// Container returns the innermost container.
func (n Nesting) Container() (c Container) {
	if len(n.user) > 0 {
		c.User = uint64(n.user[0])
	}
	if len(n.pid) > 0 {
		c.PID = uint64(n.pid[0])
	}
	return c
}

// Within reports whether the process is in the container or in one within it.
func (n Nesting) Within(c Container) bool {
	return (c.User == 0 || slices.Contains(n.user, ns(c.User))) && (c.PID == 0 || slices.Contains(n.pid, ns(c.PID)))
}

// Root returns the uid, in the daemon's numbers, that is 0 in the user namespace of p,
// whose Nesting n is; NoID where none is.
func (n Nesting) Root(p *Process) (uint32, error) {
	uids := identityMap
	if len(n.user) > 0 {
		var err error
		if uids, err = p.idMap("uid_map"); err != nil {
			return 0, err
		}
	}
	root, _ := uids.ToOutside(0)
	return root, nil
}

// Around reports whether the container is n's own or lies within it, where one of the two
// lies within the other.
func (n Nesting) Around(c Container) bool { return around(n.user, c.User) && around(n.pid, c.PID) }

func around(outer []ns, inner uint64) bool {
	return len(outer) == 0 || uint64(outer[0]) == inner || inner != 0 && !slices.Contains(outer, ns(inner))
}

// encloses compares namespaces of one type. None at all is the daemon's.
func encloses(outer, inner []ns) bool {
	return len(outer) == 0 || slices.Contains(inner, outer[0])
}
