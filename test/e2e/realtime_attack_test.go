package e2e_test

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// resetOnForkBit is SCHED_RESET_ON_FORK.
const resetOnForkBit = 0x40000000

// runner is a thread, not the first, that will run another program.
var runner = make(chan string)

// startRunner starts it and returns its number.
var startRunner = harness.Inside("a thread that will exec", func(struct{}) (int, error) {
	tid := make(chan int)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		for what := range runner {
			switch what {
			case "less":
				// Everybody may take less of what they have.
				_ = unix.SchedSetAttr(0, &unix.SchedAttr{Policy: unix.SCHED_RR, Priority: 3, Flags: unix.SCHED_FLAG_RESET_ON_FORK}, 0)
			case "other":
				// Its nice level is what it was before it was realtime.
				priority := int32(0)
				_, _, _ = unix.RawSyscall(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_NORMAL|resetOnForkBit, uintptr(unsafe.Pointer(&priority)))
			case "exec":
				_ = syscall.Exec("/bin/sleep", []string{"sleep", "60"}, nil)
			}
		}
	}()
	return <-tid, nil
})

// runnerDoes tells it to do something, and waits until it has begun.
var runnerDoes = harness.Inside("have it done", func(what string) (struct{}, error) {
	runner <- what
	return struct{}{}, nil
})

// A thread that is not the first runs another program: it goes on as it was scheduled,
// and under the number of the first. It stays in sight, whatever it has made of what
// it was granted, and whatever the first one was granted.
func TestKernelRealtimeAttackExec(t *testing.T) {
	// A slow machine needs a while to run another program, which is realtime.
	w := newRealtimeWorld(t, "--rttime-usec-max=10000000")
	root := w.p.MustDial(w.sock)
	run := func(t *testing.T, first func(c *harness.Conn, tid uint64), does []string, became string, meanwhile func()) {
		p := w.user(1000)
		c := p.MustDial(w.sock)
		var tid uint64
		if err := p.Run(startRunner, struct{}{}, &tid); err != nil {
			t.Fatal(err)
		}
		first(c, tid)
		for _, what := range does {
			if err := p.Run(runnerDoes, what, nil); err != nil {
				t.Fatal(err)
			}
		}
		if meanwhile != nil {
			w.d.kill9()
		}
		go func() { _ = p.Run(runnerDoes, "exec", nil) }()
		pid := p.HostPID
		eventually(t, "another program runs", func() bool { return strings.HasPrefix(comm(pid), "sleep") })
		if got, err := scheduled(pid); err != nil || got != became {
			t.Fatalf("it is %q after execve(2) (%v), want %q: nothing is tried", got, err, became)
		}
		if meanwhile != nil {
			meanwhile()
			root = w.p.MustDial(w.sock)
		}
		grants, err := root.V1("ListGrants")
		if err != nil {
			t.Fatal(err)
		}
		policy, level, _ := strings.Cut(strings.TrimSuffix(became, " reset"), " ")
		if got := listed(grants, pid); got != policy+" "+level {
			t.Errorf("the grant is listed as %q, want %q: %v", got, policy+" "+level, grants)
		}
		if _, err := root.RT("ResetKnown"); err != nil {
			t.Fatal(err)
		}
		if got, err := scheduled(pid); err != nil || strings.TrimSuffix(got, " reset") != "other 0" {
			t.Errorf("revoked, it is %q (%v)", got, err)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	realtime := func(c *harness.Conn, tid uint64, priority uint32) {
		values, err := c.RT("MakeThreadRealtime", tid, priority)
		w.answers("realtime", rtGranted, values, err)
	}
	nice := func(c *harness.Conn, tid uint64, level int32) {
		values, err := c.RT("MakeThreadHighPriority", tid, level)
		w.answers("high priority", rtGranted, values, err)
	}
	thread := func(c *harness.Conn, tid uint64) { realtime(c, tid, 9) }
	both := func(c *harness.Conn, tid uint64) {
		nice(c, 0, -1)
		realtime(c, tid, 9)
	}
	niceFirst := func(c *harness.Conn, tid uint64) {
		nice(c, tid, -7)
		realtime(c, tid, 9)
	}
	t.Run("as it was", func(t *testing.T) { run(t, thread, nil, "rr 9 reset", nil) })
	t.Run("with less", func(t *testing.T) { run(t, thread, []string{"less"}, "rr 3 reset", nil) })
	t.Run("the first has a nice level", func(t *testing.T) { run(t, both, nil, "rr 9 reset", nil) })
	t.Run("with a nice level left", func(t *testing.T) { run(t, niceFirst, []string{"other"}, "other -7 reset", nil) })
	t.Run("while there is no daemon", func(t *testing.T) {
		run(t, thread, []string{"less"}, "rr 3 reset", func() { w.d = w.start() })
	})
}

// What root writes to a connection that somebody else has opened is no request of
// root's, who needs no rule.
func TestKernelRealtimeAttackOpener(t *testing.T) {
	w := newRealtimeWorld(t)
	p := w.user(2000)
	c := p.MustDial(w.sock)
	values, err := c.RT("MakeThreadRealtime", uint64(0), uint32(5))
	w.answers("a user whom no rule names", rtDenied, values, err)
	values, err = c.Give(w.p).RT("MakeThreadRealtimeWithPID", uint64(p.PID), uint64(0), uint32(5))
	w.answers("root, on that user's connection", rtDenied, values, err)
	w.is(p, uint64(p.PID), "other 0")
	values, err = w.p.MustDial(w.sock).RT("MakeThreadRealtimeWithPID", uint64(p.PID), uint64(0), uint32(5))
	w.answers("root, on its own", rtGranted, values, err)
}

// Containers that share their uids with each other and with the host have limits of
// their own all the same: one that is at its limit leaves the others theirs.
func TestKernelRealtimeAttackSharedUID(t *testing.T) {
	w := newRealtimeWorld(t, "--threads-per-user-max=2")
	w.policy("[[rule]]\ncontainer = \"any\"\n")
	w.d.terminate()
	w.d = w.start()
	try := func(what string, p *harness.Proc, tid uint64, want harness.DBusError) {
		t.Helper()
		c := p.MustDial(w.sock)
		defer c.Close()
		values, err := c.RT("MakeThreadHighPriority", tid, int32(-3))
		w.answers(what, want, values, err)
	}
	for _, uid := range []uint32{0, 1000} {
		name := fmt.Sprint("uid ", uid, ": ")
		one := harness.Start(t, harness.Spec{PIDNS: true}).Spawn(harness.Spec{UID: uid, GID: uid})
		for i, tid := range w.threads(one, 3) {
			try(fmt.Sprint(name, "thread ", i), one, tid, []harness.DBusError{rtGranted, rtGranted, rtBusy}[i])
		}
		other := harness.Start(t, harness.Spec{PIDNS: true}).Spawn(harness.Spec{UID: uid, GID: uid})
		try(name+"another container", other, 0, rtGranted)
		try(name+"the host", harness.Start(t, harness.Spec{UID: uid, GID: uid}), 0, rtGranted)
	}
}

func comm(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return string(b)
}

// listed is what ListGrants says of a process, "rr 5" for instance, each once.
func listed(values []any, pid int) string {
	var all []string
	grants, _ := values[0].([][]any)
	for _, g := range grants {
		if fmt.Sprint(g[0]) == strconv.Itoa(pid) {
			all = append(all, fmt.Sprint(g[3], " ", g[4]))
		}
	}
	return strings.Join(all, ", ")
}

// A process with so many threads that it takes long to look at all of them costs
// itself time, and no neighbour.
func TestKernelRealtimeAttackThreads(t *testing.T) {
	w := newRealtimeWorld(t)
	p, other := w.user(1000), w.user(1001)
	w.threads(p, 4000)
	c, co := p.MustDial(w.sock), other.MustDial(w.sock)
	ask := func(c *harness.Conn) time.Duration {
		began := time.Now()
		if _, err := c.RT("MakeThreadHighPriority", uint64(0), int32(-3)); err != nil {
			t.Error(err)
		}
		return time.Since(began)
	}
	alone := ask(c)
	done := make(chan []time.Duration, 1)
	go func() {
		var looks []time.Duration
		for range 12 {
			looks = append(looks, ask(c))
		}
		done <- looks
	}()
	// What else the machine does makes both slower: they are compared with each other.
	var looks, waits []time.Duration
	for len(waits) < 12 && looks == nil {
		waits = append(waits, ask(co))
		select {
		case looks = <-done:
		case <-time.After(alone / 4):
		}
	}
	if looks == nil {
		looks = <-done
	}
	slices.Sort(looks)
	slices.Sort(waits)
	if wait, look := waits[len(waits)/2], looks[len(looks)/2]; wait > look/4 {
		t.Errorf("a neighbour waits %v, where one look takes %v: %v and %v", wait, look, waits, looks)
	}
}
