// Package limits gives processes resource limits, and takes them back (prlimit(2)).
package limits

import (
	"cgmanager/manager/identity"
	"cgmanager/manager/rt/policy"
	"cgmanager/privcheck"
)

// Grants knows who was given limits.
type Grants struct{}

// New makes Grants; state is the directory in which they are noted, for the next
// daemon.
func New(state string) (*Grants, error) { return nil, nil }

// Give raises the limits of a process that the decision allows. rttime is the hard
// RLIMIT_RTTIME that it is lowered to, in microseconds. It returns what was given, by
// name, or an *api.Error (Unsupported without CAP_SYS_RESOURCE).
func (g *Grants) Give(d privcheck.Decision, p *identity.Process, l policy.Limits, rttime uint64) (map[string]string, error) {
	return nil, nil
}

// Revoke takes back what p was given, from it and from all its descendants in its
// container, and makes their threads SCHED_OTHER. It returns the pids, in the daemon's
// numbers, of those that it could not reach.
func (g *Grants) Revoke(d privcheck.Decision, h *identity.Host, p *identity.Process) (unreached []int32, err error) {
	return nil, nil
}

// Given is an entry of List.
type Given struct {
	PID     int32
	Started string
	Since   int64
	Limits  map[string]string
}

// List returns what is given, the oldest first.
func (g *Grants) List() []Given { return nil }
