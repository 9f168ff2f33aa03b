package rt

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"cgmanager/manager/identity"
	"cgmanager/manager/polkit"
	"cgmanager/manager/rt/policy"
)

// The actions of polkit's, rtkit's own.
const (
	actionRealtime     = "org.freedesktop.RealtimeKit1.acquire-real-time"
	actionHighPriority = "org.freedesktop.RealtimeKit1.acquire-high-priority"
)

// The reasons for which somebody is not allowed what it asks for.
var (
	ErrNotAllowed = errors.New("neither a rule of the host's realtime policy nor polkit allows it")
	// ErrAsking: polkit was asked too much at once.
	ErrAsking = errors.New("polkit has not answered your other requests yet")
	// ErrRange: no thread can have such a priority or nice level.
	ErrRange = errors.New("there is no such")
	// ErrBeyond: it is more than may be had.
	ErrBeyond = errors.New("more than is allowed")
)

// Want is what is asked for.
type Want struct {
	// Policy is SCHED_RR, SCHED_FIFO or SCHED_NORMAL; Any lets the policy file
	// choose between the first two.
	Policy int32
	// Level is the priority, or the nice level of SCHED_NORMAL.
	Level int32
}

// Any is a Want's Policy that may be SCHED_RR or SCHED_FIFO.
const Any = -1

func (w Want) realtime() bool { return w.Policy != unix.SCHED_NORMAL }

// Asker is who asks, and for whom.
type Asker struct {
	UID      uint32
	Accounts []string
	// HostRoot is asked nothing. Outside: it is in a container.
	HostRoot, Outside bool
	// Target is the process that it is for, in the policy's terms and in polkit's.
	Target  policy.Target
	Process Process
}

// Allowance is what somebody may have.
type Allowance struct {
	maxPriority, minNice int32
	rr, fifo             bool
	preferred            int32
	// Share is how much of a CPU a thread may take, in percent; 0 leaves that to
	// the watchdog.
	Share int
	// By says who allows it, for the log.
	By string
}

// Allow says what who may have of what w asks for, or returns ErrNotAllowed or
// ErrAsking. It may wait for polkit.
func (s *Service) Allow(who *Asker, w Want) (Allowance, error) {
	own := Allowance{
		maxPriority: s.MaxPriority, minNice: s.MinNice, preferred: s.Scheduling,
		rr: s.Scheduling == unix.SCHED_RR, fifo: s.Scheduling == unix.SCHED_FIFO,
	}
	if v, ok := s.policy.Current().Decide(who.Target); ok {
		if !v.Allow {
			return own, fmt.Errorf("%w: rule at line %d refuses", ErrNotAllowed, v.Line)
		}
		return own.with(&v), nil
	}
	if who.HostRoot {
		own.rr, own.fifo, own.By = true, true, "host root"
		return own, nil
	}
	// To polkit uid 0 is the host's root wherever it is.
	if who.Outside && who.UID == 0 {
		return own, ErrNotAllowed
	}
	action := actionRealtime
	if !w.realtime() {
		action = actionHighPriority
	}
	ok, err := s.ask(action, who.Accounts, polkit.Subject{PID: uint32(who.Process.PID), Started: who.Process.Started, UID: who.UID})
	switch {
	case errors.Is(err, ErrAsking):
		return own, err
	case err != nil:
		return own, fmt.Errorf("%w: %w", ErrNotAllowed, err)
	case !ok:
		return own, ErrNotAllowed
	}
	own.By = "polkit"
	return own, nil
}

// with returns the allowance with what a rule says.
func (a Allowance) with(v *policy.Verdict) Allowance {
	a.By, a.Share = fmt.Sprintf("rule at line %d", v.Line), v.Budget
	if v.MaxPriority != nil {
		a.maxPriority = int32(*v.MaxPriority)
	}
	if v.MinNice != nil {
		a.minNice = int32(*v.MinNice)
	}
	if v.RR || v.FIFO {
		a.rr, a.fifo = v.RR, v.FIFO
	}
	return a
}

// Fit returns how a thread is to be scheduled, or ErrRange or ErrBeyond.
func (a *Allowance) Fit(w Want) (identity.Scheduling, error) {
	if !w.realtime() {
		switch {
		case w.Level < -20 || w.Level > 19:
			return identity.Scheduling{}, fmt.Errorf("%w nice level: %d (it is -20 to 19)", ErrRange, w.Level)
		case w.Level < a.minNice:
			return identity.Scheduling{}, fmt.Errorf("%w: nice level %d, and no less than %d may be had", ErrBeyond, w.Level, a.minNice)
		}
		return identity.Scheduling{Policy: unix.SCHED_NORMAL, Nice: w.Level}, nil
	}
	switch {
	case w.Level < 1 || w.Level > 99:
		return identity.Scheduling{}, fmt.Errorf("%w priority: %d (it is 1 to 99)", ErrRange, w.Level)
	case w.Level > a.maxPriority:
		return identity.Scheduling{}, fmt.Errorf("%w: priority %d, and no more than %d may be had", ErrBeyond, w.Level, a.maxPriority)
	}
	is := identity.Scheduling{Policy: w.Policy, Priority: w.Level}
	if w.Policy == Any {
		is.Policy = a.preferred
		if !a.has(is.Policy) {
			is.Policy = unix.SCHED_RR + unix.SCHED_FIFO - is.Policy
		}
	}
	if !a.has(is.Policy) {
		return is, fmt.Errorf("%w: that scheduling policy", ErrBeyond)
	}
	return is, nil
}

func (a *Allowance) has(policy int32) bool {
	return policy == unix.SCHED_RR && a.rr || policy == unix.SCHED_FIFO && a.fifo
}

// ClampLevel makes a priority of what came as one: what does not fit is out of any
// range.
func ClampLevel(priority uint32) int32 { return int32(min(priority, math.MaxInt32)) }

// Bounds returns what clients are told that a process may have: by the rule for it,
// or else by the daemon's own bounds. Whether polkit would allow it is not asked.
func (s *Service) Bounds(who policy.Target) (maxPriority, minNice int32) {
	a := Allowance{maxPriority: s.MaxPriority, minNice: s.MinNice}
	if v, ok := s.policy.Current().Decide(who); ok && v.Allow {
		a = a.with(&v)
	}
	return a.maxPriority, a.minNice
}
