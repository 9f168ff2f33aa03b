package e2e_test

import (
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// becomeMember makes a process of root's one of a user's, with supplementary groups,
// who may neither lock memory nor be realtime.
var becomeMember = harness.Inside("setgroups", func(a struct {
	UID    int
	Groups []int
},
) (struct{}, error) {
	for _, r := range []int{unix.RLIMIT_MEMLOCK, unix.RLIMIT_RTPRIO} {
		if err := unix.Setrlimit(r, &unix.Rlimit{}); err != nil {
			return struct{}{}, err
		}
	}
	if err := unix.Setgroups(a.Groups); err != nil {
		return struct{}{}, err
	}
	if err := unix.Setresgid(a.UID, a.UID, a.UID); err != nil {
		return struct{}{}, err
	}
	return struct{}{}, unix.Setresuid(a.UID, a.UID, a.UID)
})

// newSession makes a process the first of a session.
var newSession = harness.Inside("setsid", func(struct{}) (int, error) { return unix.Setsid() })

// plainly has a thread make itself SCHED_FIFO by itself, and locks so many bytes of
// memory: what went wrong with each.
var plainly = harness.Inside("sched_setscheduler, mlock", func(a struct{ Thread, Bytes int }) (said [2]string, _ error) {
	err := make(chan error)
	threadsOf[a.Thread] <- func() {
		attr := unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: 50, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
		err <- unix.SchedSetAttr(0, &attr, 0)
	}
	said[0] = fmt.Sprint(<-err)
	b, merr := unix.Mmap(-1, 0, a.Bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if merr != nil {
		return said, merr
	}
	said[1] = fmt.Sprint(unix.Mlock(b))
	return said, unix.Munmap(b)
})

// What the realtime LSM and pam_limits gave @audio: a running process gets it, uses
// plain sched_setscheduler and mlock, and can no more after it was revoked; nor can what
// it has started meanwhile, in whatever session.
func TestKernelRealtimeGrantLimits(t *testing.T) {
	harness.Require(t, "root")
	const audio, locked = 60029, 2 << 20
	group := "60029"
	gid := audio
	if g, err := user.LookupGroup("audio"); err == nil {
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			t.Fatal(err)
		}
		group = `"audio"`
	} else if harness.Emulated() {
		t.Fatal(err)
	}
	rw := newRealtimeWorld(t)
	rw.d.terminate()
	rw.policy(fmt.Sprintf("[[rule]]\ngroup = %s\n[rule.limits]\nrtprio = 70\nmemlock = \"64M\"\n", group))
	rw.d = rw.start()
	t.Cleanup(func() {
		if !rw.d.finished {
			rw.d.terminate()
		}
	})

	// member is a process of user 1000's.
	member := func(groups ...int) *harness.Proc {
		t.Helper()
		p := harness.Start(t, harness.Spec{})
		if err := p.Run(becomeMember, map[string]any{"UID": 1000, "Groups": groups}, nil); err != nil {
			t.Fatal(err)
		}
		p.UID, p.GID = 1000, 1000
		return p
	}
	thread := func(p *harness.Proc) (tid uint64) {
		t.Helper()
		if err := p.Run(startThread, struct{}{}, &tid); err != nil {
			t.Fatal(err)
		}
		return tid
	}
	can := func(what string, p *harness.Proc, tid uint64, want [2]string) {
		t.Helper()
		var got [2]string
		if err := p.Run(plainly, map[string]any{"Thread": tid, "Bytes": locked}, &got); err != nil || got != want {
			t.Errorf("%s: sched_setscheduler and mlock are %q (%v), want %q", what, got, err, want)
		}
	}
	neither := [2]string{unix.EPERM.Error(), unix.EPERM.Error()}
	both := [2]string{"<nil>", "<nil>"}

	p, other := member(gid), member(gid+1)
	first := thread(p)
	can("before", p, first, neither)
	c := p.MustDial(rw.sock)
	defer c.Close()
	if !harness.Has("sysresource") {
		if harness.Emulated() {
			t.Fatal("the machine lacks CAP_SYS_RESOURCE: nothing would be shown")
		}
		// It says so, and gives nothing.
		_, err := c.V1("GrantLimits", uint32(p.PID))
		e, ok := errors.AsType[*harness.DBusError](err)
		if !ok || e.Name != "org.freedesktop.DBus.Error.NotSupported" {
			t.Errorf("without CAP_SYS_RESOURCE: %v, want NotSupported", err)
		}
		can("refused", p, first, neither)
		return
	}
	given, err := c.V1("GrantLimits", uint32(p.PID))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("given: %v", given)
	can("granted", p, first, both)
	rw.is(p, first, "fifo 50 reset")

	// Its children, one of which goes away, and one of those whose parent has ended.
	child := p.Spawn(harness.Spec{KeepIDs: true})
	away := p.Spawn(harness.Spec{KeepIDs: true})
	if err := away.Run(newSession, struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	descendant := away.Spawn(harness.Spec{KeepIDs: true})
	tids := map[*harness.Proc]uint64{p: first}
	for _, q := range []*harness.Proc{child, away, descendant} {
		tids[q] = thread(q)
		can("a descendant", q, tids[q], both)
		rw.is(q, tids[q], "fifo 50 reset")
	}

	// Nobody else, nor for nothing.
	oc := other.MustDial(rw.sock)
	defer oc.Close()
	if err := second(oc.V1("GrantLimits", uint32(other.PID))); err == nil {
		t.Error("who is not in the group is given limits")
	}
	can("who is not in the group", other, thread(other), neither)
	stranger := rw.user(1001)
	sc := stranger.MustDial(rw.sock)
	defer sc.Close()
	for _, member := range []string{"GrantLimits", "RevokeLimits"} {
		if err := second(sc.V1(member, uint32(p.PID))); err == nil {
			t.Errorf("%s by another user", member)
		}
	}
	rw.is(p, first, "fifo 50 reset")

	unreached, err := c.V1("RevokeLimits", uint32(p.PID))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("unreached: %v", unreached)
	for q, tid := range tids {
		var got string
		if err := q.Run(scheduling, tid, &got); err != nil || got != "other 0" && got != "other 0 reset" {
			t.Errorf("revoked: thread %d is %q (%v), want it demoted", tid, got, err)
		}
		can("revoked", q, thread(q), neither)
	}

	// Given again, and the daemon ends: nobody keeps it.
	if _, err := c.V1("GrantLimits", uint32(p.PID)); err != nil {
		t.Fatal(err)
	}
	again := thread(p)
	can("granted again", p, again, both)
	rw.d.terminate()
	can("after the daemon's end", p, thread(p), neither)
}

// The number by which descendants are known anybody can take on: it gives nobody a say
// over others' limits, once the process that was given them has ended.
func TestKernelRealtimeLimitsOfOthers(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	// On a slow machine a program that is realtime starts in less than ten seconds.
	rw := newRealtimeWorld(t, "--rttime-usec-max=10000000")
	rw.d.terminate()
	rw.policy(anybody + "[rule.limits]\nrtprio = 70\n")
	rw.d = rw.start()
	t.Cleanup(func() { rw.d.terminate() })

	p := harness.Start(t, harness.Spec{UID: 1000, GID: 1000})
	c := p.MustDial(rw.sock)
	given, err := c.V1("GrantLimits", uint32(p.PID))
	if err != nil {
		t.Fatal(err)
	}
	words, _ := given[0].(map[string]string)
	mark, err := strconv.ParseUint(words["rttime"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	out, code := p.Exec(nil, "/bin/sh", "-c", "chrt -f 5 sleep 70071 >/dev/null 2>&1 & echo $!")
	orphan, err := strconv.Atoi(strings.TrimSpace(out))
	if code != 0 || err != nil {
		t.Fatalf("%d: %q", code, out)
	}
	t.Cleanup(func() { _ = unix.Kill(orphan, unix.SIGKILL) })
	eventually(t, "the descendant is realtime", func() bool {
		got, err := scheduled(orphan)
		return err == nil && got == "fifo 5" && comm(orphan) == "sleep\n"
	})
	c.Close()
	p.Stop()
	is := func(want string) {
		t.Helper()
		if got, err := scheduled(orphan); err != nil || got != want {
			t.Errorf("the descendant is %q (%v), want %q", got, err, want)
		}
	}
	is("fifo 5")

	user := harness.Start(t, harness.Spec{UID: 1000, GID: 1000})
	for what, q := range map[string]*harness.Proc{
		"another user":                     harness.Start(t, harness.Spec{UID: 1001, GID: 1001}),
		"root of a container":              harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 200000, MapSize: 60000}),
		"root of a container with the uid": harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 0, MapSize: 60000}),
		"root of a namespace over the uid": harness.Start(t, harness.Spec{UserNS: true, MapFrom: 1000, MapSize: 1}),
	} {
		rw.limit(q, mark)
		c := q.MustDial(rw.sock)
		defer c.Close()
		_, err := c.V1("RevokeLimits", uint32(q.PID))
		e, ok := errors.AsType[*harness.DBusError](err)
		if !ok || e.Name != "org.freedesktop.DBus.Error.FileNotFound" {
			t.Errorf("%s: %v, want FileNotFound", what, err)
		}
		is("fifo 5")
	}
	c = user.MustDial(rw.sock)
	defer c.Close()
	if _, err := c.V1("RevokeLimits", uint32(orphan)); err != nil {
		t.Error(err)
	}
	is("other 0")
}
