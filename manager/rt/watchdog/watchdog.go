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
	// Cheep is how often the canary gives a sign, and Period for how long there
	// may be none, and the window over which a thread's CPU time counts
	// (--canary-cheep-msec, --canary-watchdog-msec).
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
	// to where there is a budget for it. May be nil.
	Fund func(pid int) error
	// Events is called, by one goroutine, for what the watchdog has done.
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
	// Share is how much of a CPU it may take over a period, in percent. 0 means 80.
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
	// Ended: the thread is no more.
	Ended
	// Starving: the canary starves; no ID.
	Starving
)

// Event is what the watchdog has done.
type Event struct {
	Kind EventKind
	// ID is the grant's.
	ID uint64
	// Used is the CPU time that the thread used within Window.
	Used, Window time.Duration
}

// Supervisor is the daemon's side: it starts the process with the first grant,
// again if it ends, and ends it after the last.
type Supervisor struct{}

// New makes a Supervisor; nothing is started yet.
func New(Config) *Supervisor { return nil }

// Ready starts the process if there is none, and returns an error where it is not
// realtime: then nothing may be granted.
func (s *Supervisor) Ready() error { return nil }

// Watch begins to watch a thread, before it is given what it is granted. The
// error is that of Ready, or says that too many are watched.
func (s *Supervisor) Watch(Grant) error { return nil }

// Unwatch lets a thread go. The process undoes nothing more of it.
func (s *Supervisor) Unwatch(id uint64) {}

// Close ends the process, which undoes nothing: who wants grants revoked has done
// so. With leave it goes on without the daemon, until the next one's is started or,
// after a time, nobody has: then it takes all grants back, and ends.
func (s *Supervisor) Close(leave bool) {}

// Main is the process. It returns its exit code.
func Main() int { return 1 }
