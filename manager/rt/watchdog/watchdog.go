// Package watchdog keeps watch over threads that were granted realtime or high
// priority: a process of its own, realtime from exec, that demotes who takes too
// much. DESIGN 8 and docs/REALTIME.md say why it is a process.
package watchdog

import (
	"time"

	"github.com/sirupsen/logrus"
)

// Arg is the only argument of the process that Main runs in.
const Arg = "--realtime-watchdog"

// Config says how to watch.
type Config struct {
	// Cheep is how often, at most, the canary is given a reason to run, which it is
	// whenever the watchdog looks; Period for how long it may not get to, how often
	// the watchdog looks at least, and the window over which a thread's CPU time
	// counts (--canary-cheep-msec, 0: 5 s; --canary-watchdog-msec, 0: 10 s).
	Cheep, Period time.Duration
	// DemoteUnknown takes realtime, where the canary starves, from all threads of
	// the host but root's; with DemoteRoot from root's too.
	DemoteUnknown, DemoteRoot bool
	// NoCanary: no process is started and nobody is watched.
	NoCanary bool
	// Dir is the daemon's state directory. A watchdog there that outlived its
	// daemon is ended by the one that is started next.
	Dir string
	// Fund brings a new process, which the kernel refuses realtime in its cgroup,
	// to where there is a budget for it. It does not call the Supervisor. May be nil.
	Fund func(pid int) error
	// Grace is for how long the process watches on when the daemon is dead (0: 30 s),
	// Linger for how long when there is nobody to watch (0: 10 s).
	Grace, Linger time.Duration
	// Events is called, once at a time, for what the watchdog has done. It may call
	// the Supervisor.
	Events func(Event)
	Log    *logrus.Logger
}

// Grant is a thread to watch, in the numbers of the daemon's pid namespace.
type Grant struct {
	// ID is the daemon's own name for the grant.
	ID       uint64
	PID, TID int32
	// Started is when the thread was started (field 22, proc_pid_stat(5)), which
	// with TID tells it from all others.
	Started uint64
	// Policy (SCHED_RR, SCHED_FIFO, or SCHED_OTHER with Nice), Priority and Nice are
	// what it was granted, and what it is given back.
	Policy, Priority, Nice int32
	// Share is how much of a CPU it may take over a period, in percent. 0 means 80 for
	// a realtime thread, and all for one with a nice level, which cannot keep others
	// from running.
	Share int32
}

// EventKind says what the watchdog has done.
type EventKind int

// The kinds of Event.
const (
	// Demoted: the thread took more than its share.
	Demoted EventKind = iota + 1
	// Starved: the thread was demoted because the canary starved, which it need not
	// have caused.
	Starved
	// Restored: the thread has again what it was granted.
	Restored
	// Ended: the thread is no more, or has given up itself what it was granted.
	Ended
	// Starving: the canary starves; no ID.
	Starving
	// Lost: the thread is not watched any more, though it may live: for want of
	// descriptors, or because there is no watchdog. The grant is to be revoked.
	Lost
)

// Event is what the watchdog has done.
type Event struct {
	Kind EventKind
	// ID is the grant's.
	ID uint64
	// Used is the CPU time that the thread used within Window.
	Used, Window time.Duration
}
