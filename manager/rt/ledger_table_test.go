package rt

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// clock is the Ledger's in the tests.
type clock struct{ now time.Time }

func (c *clock) after(d time.Duration) { c.now = c.now.Add(d) }

func newTestLedger(l Limits) (*Ledger, *clock) {
	c := &clock{time.Unix(1_000_000, 0)}
	return NewLedger(l, func() time.Time { return c.now }), c
}

var usual = Limits{Users: 4, Processes: 2, Threads: 3, Actions: 3, Burst: 20 * time.Second, Refuse: 300 * time.Second}

func thread(pid, tid int32) Thread {
	return Thread{Process: Process{pid, uint64(pid)}, TID: tid, ThreadStarted: uint64(tid)}
}

// grantTo makes a grant, or fails the test unless the error is want.
func grantTo(t *testing.T, l *Ledger, th Thread, want error, accounts ...string) Grant {
	t.Helper()
	r, err := l.Reserve(accounts, th)
	if !errors.Is(err, want) {
		t.Fatalf("thread %v for %v: %v, want %v", th.TID, accounts, err, want)
	}
	if err != nil {
		return Grant{}
	}
	g, _ := r.Commit(Grant{})
	return g
}

func TestLedgerLimits(t *testing.T) {
	l, _ := newTestLedger(usual)
	a, b := []string{"user:1", "uid:1000"}, []string{"user:2", "uid:1001"}
	grantTo(t, l, thread(10, 11), nil, a...)
	grantTo(t, l, thread(10, 12), nil, a...)
	grantTo(t, l, thread(20, 20), nil, a...)
	grantTo(t, l, thread(30, 30), ErrProcesses, a...)
	grantTo(t, l, thread(10, 13), ErrThreads, a...)
	grantTo(t, l, thread(10, 13), ErrThreads, "user:9", "user:1", "uid:7") // in a container in it
	grantTo(t, l, thread(10, 13), nil, b...)                               // its neighbour
	if err := l.CheckProcess(a, Process{30, 30}); !errors.Is(err, ErrProcesses) {
		t.Errorf("one process more: %v", err)
	}
	if err := l.CheckProcess(a, Process{20, 21}); !errors.Is(err, ErrProcesses) {
		t.Errorf("another process by the same number: %v", err)
	}
	if err := l.CheckProcess(a, Process{20, 20}); err != nil {
		t.Errorf("a process that has some: %v", err)
	}
	// Again is no more, and takes the place of what was.
	again := grantTo(t, l, thread(10, 11), nil, a...)
	if n := len(l.List(a...)); n != 3 {
		t.Errorf("%d grants, want 3", n)
	}
	if _, ok := l.Remove(again.ID); !ok {
		t.Error("the grant is not there")
	}
	grantTo(t, l, thread(10, 14), nil, a...)

	// Users: a, b, and two more.
	grantTo(t, l, thread(40, 40), nil, "uid:1")
	grantTo(t, l, thread(41, 41), nil, "uid:2")
	grantTo(t, l, thread(42, 42), ErrUsers, "uid:3")
	if err := l.CheckUsers([]string{"user:5", "uid:3"}); !errors.Is(err, ErrUsers) {
		t.Errorf("one user more: %v", err)
	}
	if err := l.CheckUsers([]string{"user:5", "uid:2"}); err != nil {
		t.Errorf("a user who has some: %v", err)
	}
	l.Remove(grantTo(t, l, thread(41, 41), nil, "uid:2").ID)
	grantTo(t, l, thread(42, 42), nil, "uid:3")
}

// A place that is held counts, and is free again.
func TestLedgerReservations(t *testing.T) {
	l, _ := newTestLedger(usual)
	var held []*Reservation
	for i := range int32(3) {
		r, err := l.Reserve([]string{"uid:1"}, thread(10, i))
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, r)
	}
	grantTo(t, l, thread(10, 9), ErrThreads, "uid:1")
	// Two requests about the same thread hold one place.
	same, err := l.Reserve([]string{"uid:1"}, thread(10, 0))
	if err != nil {
		t.Fatal(err)
	}
	held[0].Cancel()
	grantTo(t, l, thread(10, 9), ErrThreads, "uid:1")
	same.Cancel()
	same.Cancel()
	grantTo(t, l, thread(10, 9), nil, "uid:1")
	held[1].Commit(Grant{})
	held[1].Cancel() // nothing: it was committed
	held[2].Cancel()
	if n := len(l.List()); n != 2 {
		t.Errorf("%d grants, want 2", n)
	}
	// One by another moves to its account.
	g := grantTo(t, l, thread(10, 9), nil, "uid:2")
	if n := len(l.List("uid:1")); n != 1 {
		t.Errorf("uid 1 has %d grants, want 1", n)
	}
	if now, ok := l.Of(thread(10, 9)); !ok || now.ID != g.ID {
		t.Errorf("the thread's grant is %v, %v", now, ok)
	}
	total := usual
	total.Total = 1
	l, _ = newTestLedger(total)
	grantTo(t, l, thread(1, 1), nil, "uid:1")
	grantTo(t, l, thread(2, 2), ErrTotal, "uid:2")
}

func TestLedgerBurst(t *testing.T) {
	l, c := newTestLedger(usual)
	act := func(want error, accounts ...string) {
		t.Helper()
		if err := l.Act(accounts); !errors.Is(err, want) {
			t.Errorf("%v: %v, want %v", accounts, err, want)
		}
	}
	act(nil, "uid:1")
	c.after(19 * time.Second)
	act(nil, "uid:1")
	act(nil, "uid:1")
	act(ErrBurst, "uid:1")
	act(ErrBurst, "user:5", "uid:1")
	act(nil, "user:5", "uid:2") // what was refused did not count for user:5
	act(nil, "user:5", "uid:2")
	act(nil, "user:5", "uid:2")
	act(ErrBurst, "user:5", "uid:3")
	c.after(time.Second)
	act(nil, "uid:1")
	act(nil, "uid:1")
	act(nil, "uid:1")
	act(ErrBurst, "uid:1")
}

func TestLedgerRefusals(t *testing.T) {
	l, c := newTestLedger(usual)
	a := []string{"user:1", "uid:1"}
	g := grantTo(t, l, thread(1, 1), nil, a...)
	other := grantTo(t, l, thread(2, 2), nil, "uid:2")
	left := func(want time.Duration, accounts ...string) {
		t.Helper()
		if d := l.Refused(accounts); d != want {
			t.Errorf("%v refused for %v, want %v", accounts, d, want)
		}
		if l.Refusing() != (want > 0) && want > 0 {
			t.Error("nobody is refused, it says")
		}
	}
	left(0, a...)
	if l.Refusing() {
		t.Error("somebody is refused from the beginning")
	}
	if name, d := l.Hog(g.ID); name != "user:1" || d != 300*time.Second {
		t.Errorf("refused %s for %v", name, d)
	}
	left(300*time.Second, a...)
	left(0, "uid:1") // the user's other containers
	left(0, "uid:2")
	c.after(100 * time.Second)
	left(200*time.Second, a...)
	if _, d := l.Hog(g.ID); d != 600*time.Second {
		t.Errorf("the second time %v", d)
	}
	for range 10 {
		l.Hog(g.ID)
	}
	left(time.Hour, a...)
	left(0, "uid:1")
	c.after(time.Hour)
	left(0, a...)
	if l.Refusing() {
		t.Error("somebody is refused for ever")
	}
	// It has kept the peace long enough.
	c.after(600 * time.Second)
	if _, d := l.Hog(g.ID); d != 300*time.Second {
		t.Errorf("after the peace %v", d)
	}
	c.after(2 * time.Hour)

	// Nobody's fault that is known: everybody.
	if d := l.Starved(20 * time.Second); d != 300*time.Second {
		t.Errorf("starved: %v", d)
	}
	left(300*time.Second, "uid:77")
	l.Hog(other.ID) // it is known now
	left(0, "uid:77")
	left(300*time.Second, "uid:2")
	if d := l.Starved(20 * time.Second); d != 0 {
		t.Errorf("starved just after a hog was found: %v", d)
	}
	none := usual
	none.Refuse = 0
	l, _ = newTestLedger(none)
	l.Hog(grantTo(t, l, thread(1, 1), nil, a...).ID)
	left(0, a...)
}

// Whoever makes a new container for each hog is refused as a whole in the end.
func TestLedgerFreshContainers(t *testing.T) {
	l, _ := newTestLedger(usual)
	for i := range int32(6) {
		if d, want := l.Refused([]string{"uid:1"}), i >= outer; (d > 0) != want {
			t.Errorf("after %d containers the user is refused for %v", i, d)
		}
		g := grantTo(t, l, thread(1, i), nil, fmt.Sprintf("user:%d", i), "uid:1")
		l.Hog(g.ID)
		l.Remove(g.ID)
	}
}

// Accounts of which nothing need be known are forgotten.
func TestLedgerForgets(t *testing.T) {
	l, c := newTestLedger(usual)
	for i := range 10 * minSweep {
		if err := l.Act([]string{fmt.Sprintf("user:%d", i)}); err != nil {
			t.Fatal(err)
		}
		c.after(usual.Burst / minSweep)
	}
	if n := len(l.accounts); n > 3*minSweep {
		t.Errorf("%d accounts are kept", n)
	}
}
