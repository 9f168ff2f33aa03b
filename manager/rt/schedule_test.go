package rt

import (
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/manager/identity"
)

// What a thread has beyond its grant it has from elsewhere, RLIMIT_RTPRIO for
// instance: the grant is no excuse for that. What it may have made of its grant by
// itself is the grant's.
func TestCoversExplains(t *testing.T) {
	rr := Grant{Policy: unix.SCHED_RR, Priority: 9}
	nice := Grant{Policy: unix.SCHED_NORMAL, Nice: -5}
	s := func(policy, priority, nice int32) identity.Scheduling {
		return identity.Scheduling{Policy: policy, Priority: priority, Nice: nice}
	}
	for _, c := range []struct {
		g                *Grant
		now              identity.Scheduling
		covers, explains bool
	}{
		{&rr, s(unix.SCHED_RR, 9, 0), true, true},
		{&rr, s(unix.SCHED_RR, 1, -7), true, true},
		{&rr, s(unix.SCHED_RR, 10, 0), false, false},
		{&rr, s(unix.SCHED_FIFO, 9, 0), false, false},
		{&rr, s(unix.SCHED_NORMAL, 0, -7), false, true},
		{&rr, s(unix.SCHED_BATCH, 0, -7), false, true},
		{&nice, s(unix.SCHED_NORMAL, 0, -5), true, true},
		{&nice, s(unix.SCHED_BATCH, 0, -4), true, true},
		{&nice, s(unix.SCHED_NORMAL, 0, -6), false, false},
		{&nice, s(unix.SCHED_FIFO, 1, -5), false, false},
	} {
		if got := c.g.covers(c.now); got != c.covers {
			t.Errorf("%+v covers %+v: %t", *c.g, c.now, got)
		}
		if got := c.g.explains(c.now); got != c.explains {
			t.Errorf("%+v explains %+v: %t", *c.g, c.now, got)
		}
	}
}
