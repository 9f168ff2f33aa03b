// Package limits gives processes resource limits, and takes them back (prlimit(2)).
package limits

import (
	"cgmanager/manager/identity"
	"cgmanager/manager/rt/policy"
	"cgmanager/privcheck"
)

// Grants knows who was given limits. Its methods may be called from several
// goroutines.
type Grants struct{}

// New makes Grants; state is the directory in which they are noted, for the next
// daemon. granted reports whether a thread holds a grant of its own, which is left
// alone where limits are taken back; both are the daemon's numbers.
func New(state string, h *identity.Host, granted func(pid, tid int32) bool) (*Grants, error) {
	return &Grants{}, nil
}

// Give raises the limits of a process that the decision allows. rttime is the hard
// RLIMIT_RTTIME that it is lowered to, in microseconds, or a few less: the number
// marks what descends from the process. It returns what was given, by name, or an
// *api.Error (Unsupported without CAP_SYS_RESOURCE).
func (g *Grants) Give(d privcheck.Decision, p *identity.Process, l policy.Limits, rttime uint64) (map[string]string, error) {
	return nil, nil
}

// Revoke takes back what p was given, from it and from all its descendants in its
// container, and makes their threads SCHED_OTHER. It returns the pids, in the daemon's
// numbers, of those that it could not reach. A descendant stands for a process that
// has ended.
func (g *Grants) Revoke(d privcheck.Decision, p *identity.Process) (unreached []int32, err error) {
	return nil, nil
}

// RevokeAll is Revoke for everything that was given, for a daemon that ends.
func (g *Grants) RevokeAll() (unreached []int32, err error) { return nil, nil }

// Given is an entry of List.
type Given struct {
	// PID and UID are the daemon's numbers of the process, which may have ended.
	PID     int32
	UID     uint32
	Started string
	Since   int64
	Limits  map[string]string
}

// List returns what is given, the oldest first.
func (g *Grants) List() []Given { return nil }
