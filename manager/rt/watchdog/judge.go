package watchdog

import "time"

const (
	// looks is how many times a period a busy thread is looked at.
	looks = 10
	// history is how many samples of a thread's CPU time are kept: enough for a
	// period of looks, both its ends, and one that was out of turn.
	history = looks + 3
	// defaultShare is how much of a CPU a realtime thread may take, in percent.
	defaultShare = 80
	// starvingShare is how much of a CPU makes a thread suspect where the canary
	// starves, in percent.
	starvingShare = 20
	// busyShare is from how much of a CPU on a thread is looked at more often, in
	// percent. A thread that began to hog just before a look at which it had taken
	// less is found that much later than a period after it began.
	busyShare = 1
)

// judge decides who is demoted and who gets back what it had. It is told what there
// is to know and does nothing itself: no clock, no thread, no allocation.
type judge struct {
	period time.Duration
	slots  []slot

	// due is when the next look is to be.
	due time.Duration
	// boot is by how much CLOCK_BOOTTIME was ahead of CLOCK_MONOTONIC.
	boot time.Duration
	// torn: the machine stood still while the samples of the last look were taken.
	torn bool
	// orphan: the daemon is dead, and with it the canary.
	orphan bool

	// sang is when the canary was last known to sing, starved when it was last
	// known to starve (0: never), told when that was last said.
	sang, starved, told time.Duration
}

// slot is a watched thread.
type slot struct {
	state   state
	share   time.Duration // of CPU time over a period; 0: it may take all
	again   bool          // it was restored before, once
	began   time.Duration // when it was granted what it has
	n       int
	samples [history]sample // the last n are at the end, the newest last
}

// sample is what CPU time a thread had taken at a time.
type sample struct{ at, used time.Duration }

type state uint8

const (
	free state = iota
	granted
	// suspended: demoted because the canary starved; it may get it back.
	suspended
	// demoted: it hogged. Nothing more is done about it.
	demoted
)

// seen is what a look has seen.
type seen struct {
	// now is CLOCK_MONOTONIC, boot CLOCK_BOOTTIME, and done CLOCK_MONOTONIC after
	// the last sample was taken.
	now, boot, done time.Duration
	// sang: the canary gave a sign since the last look.
	sang bool
	// starving: it did not, and it would like to run.
	starving bool
}

// unknown is an act: realtime is to be taken from the threads that nobody granted it.
const unknown EventKind = -1

// act is what is to be done.
type act struct {
	// kind is Demoted, Starved or Restored, and slot whose; or Starving, or unknown.
	kind EventKind
	slot int
	// used is what the thread took of the window.
	used, window time.Duration
}

func (j *judge) tick() time.Duration { return j.period / looks }

// begin starts the first period.
func (j *judge) begin(now, boot time.Duration) {
	j.boot, j.sang, j.due = boot-now, now, now+j.tick()
}

// stoodStill goes on after a standstill: the time since the look before, and what
// anybody took in it, is cut out of what was seen, as though the look before had been
// just now. A hog is found on a machine that stands still now and then, too. The canary
// begins afresh: it may have been about to sing, and everybody would pay for its silence.
func (j *judge) stoodStill(now, boot time.Duration) {
	j.boot = boot - now
	j.sang = now
	if j.starved != 0 {
		j.starved, j.told = now, now
	}
	for i := range j.slots {
		j.slots[i].cut()
	}
	j.due = now + j.tick()
}

// add begins to watch a thread, that has taken so much CPU time up to now. The first
// look is soon: it shows whether the thread has begun at once.
func (j *judge) add(i int, now, used time.Duration, realtime bool, share int32, st state) {
	s := &j.slots[i]
	*s = slot{state: st, began: now}
	if share == 0 && realtime {
		share = defaultShare
	}
	s.share = j.period / 100 * time.Duration(share)
	s.sampled(now, used)
	j.due = min(j.due, now+j.tick())
}

// goOn has slot i go on with what was seen of its thread under the grant before:
// whoever is granted something anew would else begin afresh, and could take all by
// asking again and again. What a thread took while it might take all counts only if
// that was not for long: it may have been realtime until then.
func (j *judge) goOn(i int, before *slot) {
	s := &j.slots[i]
	if before.n > 0 && (before.share != 0 || s.began-before.began < j.period) {
		s.again, s.n, s.samples = before.again, before.n, before.samples
	}
}

// sampled notes what the thread has taken up to now.
func (s *slot) sampled(now, used time.Duration) {
	copy(s.samples[:], s.samples[1:])
	s.samples[history-1] = sample{now, used}
	s.n = min(s.n+1, history)
}

// cut takes out what lies between the last two samples.
func (s *slot) cut() {
	used, window := s.last()
	if window == 0 {
		return
	}
	first := history - s.n
	for i := history - 1; i > first; i-- {
		s.samples[i] = sample{s.samples[i-1].at + window, s.samples[i-1].used + used}
	}
	s.n--
}

// taken returns how much CPU time it took in the last period. Where a period begins
// between two samples, what was taken between them is counted as taken as late as
// can be: a thread that was idle until the last look but one may have begun just
// then. With a look every tick that is at most a tick's worth.
func (s *slot) taken(period time.Duration) time.Duration {
	now, sum := s.samples[history-1].at, time.Duration(0)
	for i := history - 1; i > history-s.n; i-- {
		a, b := s.samples[i-1], s.samples[i]
		if b.at <= now-period {
			break
		}
		// Less than before: execve(2) has put another thread in its place.
		sum += max(min(b.used-a.used, b.at-max(a.at, now-period)), 0)
	}
	return sum
}

// last returns what it took between the last two samples, and how long that was (0:
// there is one sample).
func (s *slot) last() (used, window time.Duration) {
	if s.n < 2 {
		return 0, 0
	}
	a, b := s.samples[history-2], s.samples[history-1]
	return b.used - a.used, b.at - a.at
}

// look judges what was seen; the samples of all slots were noted before. It appends
// to acts, which has room for an act for each slot and two more, and sets due.
func (j *judge) look(v seen, acts []act) []act {
	// Whoever sleeps past a look although nothing goes before it did not sleep: the
	// machine stood still, and the CPU time of who was running then may have gone on.
	slack := j.period / 5
	still := j.torn || v.now-j.due > slack || v.boot-v.now-j.boot > slack
	// A sample may be of after a standstill between the clock's reading and the last
	// sample, or of before it: then the next look knows as little as this one.
	j.torn = v.done-v.now > slack
	if still || j.torn {
		j.stoodStill(v.done, v.boot+(v.done-v.now))
		return acts
	}
	j.boot = v.boot - v.now
	if !j.orphan {
		acts = j.canary(v, acts)
	}
	busy := false
	for i := range j.slots {
		s := &j.slots[i]
		if s.state != granted {
			continue
		}
		if used := s.taken(j.period); s.share != 0 && used > s.share {
			s.state = demoted
			acts = append(acts, act{kind: Demoted, slot: i, used: used, window: j.period})
			continue
		}
		used, window := s.last()
		busy = busy || window == 0 || used > window/100*busyShare
	}
	if busy || j.starved != 0 {
		j.due = v.now + j.tick()
	} else {
		j.due = v.now + j.period
	}
	return acts
}

// canary judges the canary's silence or song.
func (j *judge) canary(v seen, acts []act) []act {
	switch {
	case v.sang:
		j.sang = v.now
		if j.starved != 0 && v.now-j.starved >= j.period {
			j.starved = 0
			return j.restore(acts)
		}
	case v.now-j.sang < j.period:
	case !v.starving:
		// It does not want to run: the daemon is stopped, or frozen.
		j.sang = v.now
	case j.starved == 0:
		// The first time it is those who take much, and who are most likely to be
		// why. Whoever else may be it has one more look's time.
		j.starved, j.told = v.now, v.now
		acts = append(acts, act{kind: Starving})
		return j.suspend(acts, j.period/100*starvingShare)
	default:
		j.starved = v.now
		if v.now-j.told >= j.period {
			j.told = v.now
			acts = append(acts, act{kind: Starving})
		}
		return j.suspend(append(acts, act{kind: unknown}), -1)
	}
	return acts
}

// suspend demotes the threads that took more in the last period.
func (j *judge) suspend(acts []act, more time.Duration) []act {
	for i := range j.slots {
		s := &j.slots[i]
		if s.state != granted {
			continue
		}
		used := s.taken(j.period)
		if used <= more || s.share != 0 && used > s.share {
			continue // who hogs is demoted for that
		}
		s.state = suspended
		acts = append(acts, act{kind: Starved, slot: i, used: used, window: j.period})
	}
	return acts
}

// restore gives back what was taken while the canary starved, once: who was there
// again when it starved again is left as it is.
func (j *judge) restore(acts []act) []act {
	for i := range j.slots {
		s := &j.slots[i]
		if s.state != suspended {
			continue
		}
		if s.again {
			s.state = demoted
			continue
		}
		s.state, s.again, s.n = granted, true, 0
		acts = append(acts, act{kind: Restored, slot: i})
	}
	return acts
}
