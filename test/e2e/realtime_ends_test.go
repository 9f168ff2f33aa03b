package e2e_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// hogFor has a thread take a CPU for so long, or until it is realtime no more. It
// sleeps now and then, so that RLIMIT_RTTIME does not end it.
var hogFor = harness.Inside("take a CPU", func(a struct {
	Thread int
	For    time.Duration
},
) (struct{}, error) {
	threadsOf[a.Thread] <- func() {
		for end := time.Now().Add(a.For); time.Now().Before(end); time.Sleep(200 * time.Microsecond) {
			for spin := time.Now().Add(40 * time.Millisecond); time.Now().Before(spin); {
			}
			if attr, err := unix.SchedGetAttr(0, 0); err != nil || attr.Policy != unix.SCHED_RR {
				return
			}
		}
	}
	return struct{}{}, nil
})

// What a daemon has granted before it was killed, or replaced, is watched again: a
// thread that takes a CPU then is demoted, and one that does not keeps what it has.
func TestKernelRealtimeWatchedAgain(t *testing.T) {
	for _, how := range []string{"killed", "replaced"} {
		t.Run(how, func(t *testing.T) {
			rw := newRealtimeWorld(t, canary()...)
			p := rw.user(1000)
			c := p.MustDial(rw.sock)
			var hog, quiet uint64
			for _, tid := range []*uint64{&hog, &quiet} {
				if err := p.Run(startThread, struct{}{}, tid); err != nil {
					t.Fatal(err)
				}
				values, err := c.RT("MakeThreadRealtime", *tid, uint32(5))
				rw.answers("grant", rtGranted, values, err)
			}
			c.Close()
			before := watchdogOf(t, rw.d.pid)
			old := rw.d
			if how == "killed" {
				if err := unix.Kill(old.pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				old.wait(time.Second)
				rw.d = rw.start()
			} else {
				rw.d = rw.start("--replace")
				if code := old.wait(5 * time.Second); code != 0 {
					t.Errorf("the daemon that was replaced ended with %d", code)
				}
			}
			t.Cleanup(func() { rw.d.terminate() })
			rw.is(p, hog, "rr 5 reset")
			if now := watchdogOf(t, rw.d.pid); now == 0 || now == before {
				t.Errorf("the watchdog of the new daemon is process %d, that of the old one %d", now, before)
			}
			eventually(t, "the old watchdog is gone", func() bool { return !isWatchdog(before) })
			start := time.Now()
			if err := p.Run(hogFor, map[string]any{"Thread": hog, "For": cgtest.Patience(6 * time.Second)}, nil); err != nil {
				t.Fatal(err)
			}
			rw.becomes(p, hog, "other 0")
			t.Logf("demoted after %v", time.Since(start))
			rw.is(p, quiet, "rr 5 reset")
		})
	}
}

func isWatchdog(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.Contains(string(b), "cgmanager")
}

// The watchdog is there from the first grant to the last, and as long as the daemon.
func TestKernelRealtimeWatchdogLife(t *testing.T) {
	rw := newRealtimeWorld(t, canary()...)
	p := rw.user(1000)
	c := p.MustDial(rw.sock)
	if dog := watchdogOf(t, rw.d.pid); dog != 0 {
		t.Errorf("before the first grant there is a watchdog, process %d", dog)
	}
	grant := func() (tid uint64, dog int) {
		t.Helper()
		if err := p.Run(startThread, struct{}{}, &tid); err != nil {
			t.Fatal(err)
		}
		values, err := c.RT("MakeThreadRealtime", tid, uint32(5))
		rw.answers("grant", rtGranted, values, err)
		if dog = watchdogOf(t, rw.d.pid); dog == 0 {
			t.Fatal("nobody watches what is granted")
		}
		// Every thread of it is realtime, above all that is granted.
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", dog))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			var n int
			if _, err := fmt.Sscan(f.Name(), &n); err != nil {
				t.Fatal(err)
			}
			if got, err := scheduled(n); err != nil || got != "fifo 99" {
				t.Errorf("thread %d of the watchdog is %q (%v), want fifo 99", n, got, err)
			}
		}
		return tid, dog
	}
	tid, dog := grant()
	if err := p.Run(endThread, tid, nil); err != nil {
		t.Fatal(err)
	}
	// It lingers a little, for the next one.
	cgtest.Eventually(t, 20*time.Second, "the watchdog ends after the last grant", func() bool { return watchdogOf(t, rw.d.pid) == 0 })
	if isWatchdog(dog) {
		t.Errorf("process %d is still there", dog)
	}
	_, again := grant()
	c.Close()
	rw.d.terminate()
	if isWatchdog(again) {
		t.Errorf("the watchdog, process %d, has outlived a daemon that ended in order", again)
	}
}

// Exit takes everything back and ends the watchdog; the daemon goes on, and a new one
// grants again.
func TestKernelRealtimeExitEndsTheWatchdog(t *testing.T) {
	rw := newRealtimeWorld(t, canary()...)
	p := rw.user(1000)
	tids := rw.threads(p, 3)
	c, root := p.MustDial(rw.sock), rw.p.MustDial(rw.sock)
	for _, tid := range tids {
		values, err := c.RT("MakeThreadRealtime", tid, uint32(5))
		rw.answers("grant", rtGranted, values, err)
	}
	dog := watchdogOf(t, rw.d.pid)
	values, err := c.RT("Exit")
	rw.answers("Exit by a user", rtDenied, values, err)
	rw.is(p, tids[0], "rr 5 reset")
	values, err = root.RT("Exit")
	rw.answers("Exit", rtGranted, values, err)
	for _, tid := range tids {
		rw.is(p, tid, "other 0")
	}
	values, err = c.RT("MakeThreadHighPriority", uint64(0), int32(-1))
	rw.answers("after Exit", rtDenied, values, err)
	if err := second(c.V1("GrantLimits", uint32(p.PID))); err == nil {
		t.Error("GrantLimits after Exit")
	}
	cgtest.Eventually(t, 20*time.Second, "the watchdog ends", func() bool { return !isWatchdog(dog) })
	if _, err := root.V1("ListControllers"); err != nil {
		t.Errorf("cgroups after Exit: %v", err)
	}
	c.Close()
	root.Close()
	rw.d.terminate()
	rw.d = rw.start()
	t.Cleanup(func() { rw.d.terminate() })
	c = p.MustDial(rw.sock)
	defer c.Close()
	values, err = c.RT("MakeThreadRealtime", uint64(0), uint32(5))
	rw.answers("a new daemon", rtGranted, values, err)
}

// ResetAll takes realtime from whoever it was that gave it, but not from root's
// threads, unless the administrator wants it so. It reaches all of the machine.
func TestKernelRealtimeResetAll(t *testing.T) {
	harness.Require(t, "root", "vm")
	w := newRealtimeWorld(t)
	p, roots := w.user(1000), harness.Start(t, harness.Spec{})
	tids := w.threads(p, 3)
	elsewhere := func() {
		t.Helper()
		for tid, attr := range map[uint64]unix.SchedAttr{
			tids[0]: {Policy: unix.SCHED_FIFO, Priority: 7}, tids[1]: {Policy: unix.SCHED_NORMAL, Nice: -4},
			uint64(roots.PID): {Policy: unix.SCHED_RR, Priority: 6},
		} {
			if err := unix.SchedSetAttr(int(tid), &attr, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		flags  []string
		root   string // how root's thread is then
		demote int
	}{
		{nil, "rr 6", 2},
		{[]string{"--canary-demote-root"}, "other 0", 3},
	} {
		w.d.terminate()
		w.d = w.start(c.flags...)
		elsewhere()
		user, root := p.MustDial(w.sock), w.p.MustDial(w.sock)
		values, err := user.RT("MakeThreadRealtime", tids[2], uint32(5))
		w.answers("grant", rtGranted, values, err)
		values, err = user.RT("ResetAll")
		w.answers("ResetAll by a user", rtDenied, values, err)
		w.is(p, tids[0], "fifo 7")
		w.is(p, tids[2], "rr 5 reset")
		values, err = root.RT("ResetAll")
		w.answers("ResetAll", rtGranted, values, err)
		w.is(p, tids[0], "other 0")
		w.is(p, tids[1], "other -4") // that is not realtime
		w.is(p, tids[2], "other 0")
		w.is(w.p, uint64(roots.PID), c.root)
		if line := fmt.Sprintf("Demoted %d threads.", c.demote); !strings.Contains(w.log(), line) {
			t.Errorf("%v: the log has no line %q:\n%s", c.flags, line, w.log())
		}
		user.Close()
		root.Close()
	}
	w.d.terminate()
}
