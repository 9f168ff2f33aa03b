// Package policy reads realtime.toml, which says who is granted what. It decides
// on facts alone, and knows no process. docs/man/cgmanager-realtime.toml.5.md
// describes the file.
package policy

import "slices"

// Target is what the rules ask about: the process that is to be granted something,
// in the host's numbers.
type Target struct {
	// UID is its effective uid, EGID its effective gid, and Groups its
	// supplementary ones.
	UID, EGID uint32
	Groups    []uint32
	// Program is the file that it runs, as its own mount namespace names it; ""
	// where that is not known.
	Program string
	// Container: it is not in the daemon's user and pid namespaces. Root is the
	// host's uid of the container's root, api.NoID where there is none.
	Container bool
	Root      uint32
	// Maker is the host's uid of who made the outermost user namespace around it, 0
	// where there is none.
	Maker uint32
}

// Verdict is what a rule gives. Whoever reads it changes nothing that it points to.
type Verdict struct {
	// Line of the file at which the rule stands, for the log.
	Line int
	// Allow is false where the rule refuses everything: all else is then nothing.
	Allow bool
	// MaxPriority is the highest priority (0 to MaxPriority, 0 is no realtime) and
	// MinNice the lowest nice level (-20 to 19) that is granted. nil: the rule does not
	// say, and the daemon's own bounds hold. What it says may be beyond those.
	MaxPriority, MinNice *int
	// RR and FIFO are the policies that may be granted. Both are false where the rule
	// does not say: the daemon's own policy is granted then.
	RR, FIFO bool
	// Budget is how much of a CPU a thread may take, in percent: of a period of the
	// watchdog's, and, where the kernel budgets, the cgroup's realtime runtime. 0 means
	// the default.
	Budget int
	// Limits are what GrantLimits gives; nil means nothing.
	Limits *Limits
}

// Limits are resource limits (setrlimit(2)). A field that is nil is left alone.
type Limits struct {
	// RTPrio is RLIMIT_RTPRIO, Nice the lowest nice level that RLIMIT_NICE allows,
	// MemLock RLIMIT_MEMLOCK in bytes (^0 means no limit).
	RTPrio  *uint64
	Nice    *int
	MemLock *uint64
}

// Table is a policy file that was read. It does not change any more.
type Table struct{ rules []rule }

// rule is a [[rule]]. Of each list that is not empty one element must fit.
type rule struct {
	uids, groups []span
	programs     []string
	// host and inside: it is for processes on the host, and for those in containers
	// whose root's uid is one of roots, or in any where there are none.
	host, inside bool
	roots        []span
	verdict      Verdict
}

// span is a range of ids, both ends included.
type span struct{ first, last uint32 }

func (s span) has(id uint32) bool { return s.first <= id && id <= s.last }

func has(spans []span, id uint32) bool {
	return slices.ContainsFunc(spans, func(s span) bool { return s.has(id) })
}

// Rules returns how many rules there are.
func (t *Table) Rules() int { return len(t.rules) }

// Decide returns what the first rule that matches says, and false if none does.
func (t *Table) Decide(who Target) (Verdict, bool) {
	i := slices.IndexFunc(t.rules, func(r rule) bool { return r.matches(who) })
	if i < 0 {
		return Verdict{}, false
	}
	return t.rules[i].verdict, true
}

func (r *rule) matches(who Target) bool {
	inside := who.Container && r.inside && (len(r.roots) == 0 || has(r.roots, who.Root))
	// Everybody can make a namespace: that is no way out of what the host refuses.
	fled := who.Container && r.host && !r.verdict.Allow && who.Maker != 0
	if !inside && !fled && (who.Container || !r.host) {
		return false
	}
	if len(r.uids) > 0 && !has(r.uids, who.UID) && (!fled || !has(r.uids, who.Maker)) {
		return false
	}
	if len(r.groups) > 0 && !has(r.groups, who.EGID) &&
		!slices.ContainsFunc(who.Groups, func(g uint32) bool { return has(r.groups, g) }) {
		return false
	}
	return len(r.programs) == 0 || slices.Contains(r.programs, who.Program)
}
