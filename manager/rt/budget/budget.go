// Package budget lends realtime runtime to cgroups, where the kernel budgets it
// (RT_GROUP_SCHED, cgroup v1's cpu.rt_runtime_us; Documentation/scheduler/sched-rt-group.rst).
package budget

import (
	"time"

	"cgmanager/cgfs"
	"cgmanager/privcheck"
)

// Budgets knows what was lent.
type Budgets struct{}

// Loan is runtime lent to a cgroup for a thread in it.
type Loan struct{}

// New makes Budgets for the hierarchies; state is the directory in which what is lent
// is noted, so that the next daemon can give it back.
func New(set *cgfs.Set, state string) (*Budgets, error) { return nil, nil }

// Needed reports whether the kernel budgets realtime on this host.
func (b *Budgets) Needed() bool { return false }

// Take makes sure that a thread in the cgroup target has runtime: where there is
// none, it takes share (percent of the period) from what is left in the nearest
// cgroup above that has some, up to and not beyond top. d is the decision that
// allows it. The error says what is missing, in words for the requestor.
func (b *Budgets) Take(d privcheck.Decision, target, top string, share int) (*Loan, error) {
	return nil, nil
}

// Give gives it back, once no other thread needs it.
func (l *Loan) Give() error { return nil }

// Period is the kernel's default period.
const Period = time.Second
