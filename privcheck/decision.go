package privcheck

// Decision is the answer to a question of privilege. The zero value denies,
// and only this package can make one that allows. Functions of package manager
// that change anything take one, so that a forgotten check does not compile.
type Decision struct {
	allowed bool
	clause  string
	reason  string
	hint    string
}

// Allowed reports whether the act may be done.
func (d Decision) Allowed() bool { return d.allowed }

// Clause names the clause of docs/SECURITY.md that decided, with the branch of
// it where there are several: "1 owner", "2 own uid". Where a clause leaves the
// answer to another, both are named, the asking one first: "4 sideways/1 group".
// It goes into the audit line and the golden matrix.
func (d Decision) Clause() string {
	if d.clause == "" {
		return "0 no decision"
	}
	return d.clause
}

// Reason says why the act was refused, in words fit for the requestor: lower
// case, no path and no id in it. It is empty where the act is allowed.
func (d Decision) Reason() string {
	if !d.allowed && d.reason == "" {
		return "nothing allows it"
	}
	return d.reason
}

// Hint says what the requestor can do about a refusal, "" where that is nothing
// or the reason says it.
func (d Decision) Hint() string { return d.hint }

func allow(clause string) Decision { return Decision{allowed: true, clause: clause} }

func deny(clause, reason string) Decision { return Decision{clause: clause, reason: reason} }

// hinted returns d with a hint.
func (d Decision) hinted(hint string) Decision {
	d.hint = hint
	return d
}

// about returns d, where it refuses, with a reason that says about what it is.
func (d Decision) about(what string) Decision {
	if !d.allowed {
		d.reason = what + ": " + d.Reason()
	}
	return d
}

// in returns d as what another clause answers because of it.
func (d Decision) in(clause string) Decision {
	d.clause = clause + "/" + d.Clause()
	return d
}

// All is the answer to several questions that must all be allowed: the first
// refusal, or else the last decision. No decision at all denies.
func All(ds ...Decision) Decision {
	var last Decision
	for _, d := range ds {
		if !d.allowed {
			return d
		}
		last = d
	}
	return last
}
