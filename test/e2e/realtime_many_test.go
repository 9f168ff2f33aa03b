package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/rt/watchdog"
	"cgmanager/test/harness"
)

// askAgain makes so many requests for the threads in turn, all of which are to be
// granted, and returns how long the median took.
var askAgain = harness.Inside("ask again", func(a struct {
	Sock    string
	Threads []uint64
	N       int
},
) (time.Duration, error) {
	took := make([]time.Duration, 0, a.N)
	for i := range a.N {
		q := wanted{Sock: a.Sock, Process: 1<<32 - 1, Thread: a.Threads[i%len(a.Threads)], Realtime: i%7 > 0, Level: int32(i%15) + 1}
		if !q.Realtime {
			q.Level = -q.Level
		}
		start := time.Now()
		answer, err := q.ask()
		took = append(took, time.Since(start))
		if err != nil || answer != rtGranted {
			return 0, fmt.Errorf("request %d: %w", i, errors.Join(err, &answer))
		}
	}
	slices.Sort(took)
	return took[len(took)/2], nil
})

// watchdogOf returns the number of the daemon's watchdog, or 0 if there is none. Who is
// the child of a thread that has just ended is that of another, which may have been
// looked at before: nobody is found twice only if there is nobody.
func watchdogOf(t testing.TB, daemon int) int {
	t.Helper()
	if dog := watchdogSeen(t, daemon); dog != 0 {
		return dog
	}
	return watchdogSeen(t, daemon)
}

func watchdogSeen(t testing.TB, daemon int) int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", daemon))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, _ := os.ReadFile(f) // a thread that has ended has none
		for pid := range strings.FieldsSeq(string(b)) {
			line, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			if strings.Contains(string(line), "\x00"+watchdog.Arg) {
				n, err := strconv.Atoi(pid)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	return 0
}

// The daemon and its watchdog outlive any number of grants (rtkit kills itself after
// some two thousand), and grow by none of them.
func TestKernelRealtimeTwentyThousand(t *testing.T) {
	rw := newRealtimeWorld(t, "--actions-per-burst-max=1000000", "--log-level=warning")
	t.Cleanup(func() { rw.d.terminate() })
	p := rw.user(1000)
	threads := rw.threads(p, 10)
	// ask is one request after the other, the next of which goes on where the last one
	// of a part ended: no part takes too long to wait for on a slow machine.
	ask := func(n int) (median time.Duration) {
		t.Helper()
		const part = 10 * 7 * 15
		for ; n > 0; n -= part {
			if err := p.Run(askAgain, map[string]any{"Sock": rw.sock, "Threads": threads, "N": min(n, part)}, &median); err != nil {
				t.Fatal(err)
			}
		}
		return median
	}
	n := harness.Rounds(20000)
	ask(n / 5)
	dog := watchdogOf(t, rw.d.pid)
	if dog == 0 {
		t.Fatal("there is no watchdog")
	}
	daemon, watcher := footprintOf(t, rw.d.pid), footprintOf(t, dog)
	t.Logf("%d grants, median %v", n-n/5, ask(n-n/5))
	if now := watchdogOf(t, rw.d.pid); now != dog {
		t.Fatalf("the watchdog is process %d, it was %d", now, dog)
	}
	for _, x := range []struct {
		name   string
		pid    int
		before footprint
	}{{"daemon", rw.d.pid, daemon}, {"watchdog", dog, watcher}} {
		// Go's heap and threads come and go. What a grant left behind would show as
		// thousands of files, and as megabytes, and stay.
		var after footprint
		if !cgtest.Until(5*time.Second, 50*time.Millisecond, func() bool {
			after = footprintOf(t, x.pid)
			return after.rss <= x.before.rss+6<<20 && after.fds <= x.before.fds+2 && after.threads <= x.before.threads+8
		}) {
			t.Errorf("the %s grew from %+v to %+v (bytes, files, threads)", x.name, x.before, after)
		}
		t.Logf("%s: %+v, then %+v", x.name, x.before, after)
	}
	if rss := footprintOf(t, dog).rss; rss >= 8e6 {
		t.Errorf("the watchdog takes %d bytes", rss)
	}
	st, err := os.Stat(filepath.Join(rw.dir, "state", "grants"))
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > 4<<20 {
		t.Errorf("the grants are noted in %d bytes", st.Size())
	}
	for i, tid := range threads {
		last := n - n/5 - len(threads) + i // of the second run, which began with the first thread
		q := wanted{Realtime: last%7 > 0, Level: int32(last%15) + 1}
		if !q.Realtime {
			q.Level = -q.Level
		}
		rw.is(p, tid, q.scheduled())
	}
}

// asleep is how often the threads of the processes have waited for something, each of
// which ends with a wake-up.
func asleep(t *testing.T, pids ...int) (n int) {
	t.Helper()
	for _, pid := range pids {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil || len(files) == 0 {
			t.Fatalf("process %d: %v", pid, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			_, rest, _ := strings.Cut(string(b), "\nvoluntary_ctxt_switches:")
			var of int
			if _, err := fmt.Sscan(rest, &of); err != nil {
				t.Fatalf("%s: %v", f, err)
			}
			n += of
		}
	}
	return n
}

// With a grant to a thread that does nothing, daemon and watchdog together wake up
// twenty times a minute at most.
func TestKernelRealtimeIdle(t *testing.T) {
	harness.Require(t, "root")
	if testing.Short() {
		t.Log("it takes a minute")
		return
	}
	rw := newRealtimeWorld(t)
	t.Cleanup(func() { rw.d.terminate() })
	p := rw.user(1000)
	c := p.MustDial(rw.sock)
	tid := rw.threads(p, 1)[0]
	values, err := c.RT("MakeThreadRealtime", tid, uint32(5))
	rw.answers("grant", rtGranted, values, err)
	c.Close()
	dog := watchdogOf(t, rw.d.pid)
	if dog == 0 {
		t.Fatal("there is no watchdog")
	}
	// The first look at a new thread is early, and the deadline of a login comes ten
	// seconds after it, whoever has logged in long since.
	time.Sleep(12 * time.Second)
	theirs, ours := asleep(t, dog), asleep(t, rw.d.pid)
	time.Sleep(time.Minute)
	theirs, ours = asleep(t, dog)-theirs, asleep(t, rw.d.pid)-ours
	t.Logf("wake-ups a minute: watchdog %d, daemon %d", theirs, ours)
	if theirs+ours > 20 {
		t.Errorf("%d wake-ups a minute", theirs+ours)
	}
	if theirs < 5 || ours < 5 {
		t.Error("it does not look, or the canary does not sing")
	}
	rw.is(p, tid, "rr 5 reset")
}
