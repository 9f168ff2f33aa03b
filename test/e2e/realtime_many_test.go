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

// watchdogOf returns the number of the daemon's watchdog, or 0 if there is none.
func watchdogOf(t testing.TB, daemon int) int {
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
	ask := func(n int) (median time.Duration) {
		t.Helper()
		if err := p.Run(askAgain, map[string]any{"Sock": rw.sock, "Threads": threads, "N": n}, &median); err != nil {
			t.Fatal(err)
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
		name          string
		before, after footprint
	}{{"daemon", daemon, footprintOf(t, rw.d.pid)}, {"watchdog", watcher, footprintOf(t, dog)}} {
		t.Logf("%s: %+v, then %+v", x.name, x.before, x.after)
		// Go's heap and threads come and go. What a grant left behind would show as
		// thousands of files, and as megabytes.
		if x.after.rss > x.before.rss+6<<20 || x.after.fds > x.before.fds+2 || x.after.threads > x.before.threads+8 {
			t.Errorf("the %s grew from %+v to %+v (bytes, files, threads)", x.name, x.before, x.after)
		}
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
