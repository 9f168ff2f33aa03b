package watchdog

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// onEachCPU runs f for each CPU, by turns.
func onEachCPU(t *testing.T, f func(t *testing.T, cpu int)) {
	for cpu := range runtime.NumCPU() {
		t.Run(fmt.Sprintf("cpu%d", cpu), func(t *testing.T) { f(t, cpu) })
	}
}

// period is that of the tests' watchdogs.
const period = time.Second

// inTime is how long a hog runs realtime at the most: for a period, and what it waits
// meanwhile for who else is realtime on its CPU.
var inTime = slower(period + 200*time.Millisecond)

// A thread that sleeps a little now and then, and is never stopped by RLIMIT_RTTIME,
// is demoted within a period; one that plays beside it on the same CPU is not.
func TestKernelWatchdogHog(t *testing.T) {
	harness.Require(t, "root")
	onEachCPU(t, func(t *testing.T, cpu int) {
		k := newKennel(t, Config{})
		bad, good := newSpinner(t, hog, 20, cpu), newSpinner(t, audio, 20, cpu)
		if err := k.Ready(); err != nil {
			t.Fatal(err)
		}
		o := newObserver(t, bad)
		k.watch(bad, good)
		e := k.next(slower(5 * time.Second))
		if e.Kind != Demoted || e.ID != bad.ID {
			t.Fatalf("%+v", e)
		}
		o.demoted(inTime)
		t.Logf("it took %v of %v", e.Used, e.Window)
		if bad.realtime() {
			t.Error("the hog is realtime")
		}
		if attr, err := unix.SchedGetAttr(int(bad.TID), 0); err != nil || attr.Policy != unix.SCHED_NORMAL || attr.Nice != 0 || attr.Flags != 0 {
			t.Errorf("%+v, %v", attr, err)
		}
		time.Sleep(1500 * time.Millisecond)
		if !good.realtime() {
			t.Error("the thread that plays is not realtime any more")
		}
		k.quiet()
	})
}

// A hog that is granted it again and again, under another ID each time, is none the
// less one.
func TestKernelWatchdogGrantedAgain(t *testing.T) {
	harness.Require(t, "root")
	k := newKennel(t, Config{})
	bad := newSpinner(t, hog, 20, 0)
	k.watch(bad)
	rounds := 10
	if harness.Emulated() {
		rounds = 50 // what is seen in a look that is late says nothing
	}
	for range rounds {
		time.Sleep(400 * time.Millisecond)
		again := bad.Grant
		again.ID++
		if err := k.Watch(again); err != nil {
			t.Fatal(err)
		}
		k.Unwatch(bad.ID)
		bad.Grant = again
		if !bad.realtime() {
			break
		}
	}
	if bad.realtime() {
		t.Error("it was not demoted within four periods")
	}
}

// The same with the periods that are the default.
func TestKernelWatchdogDefaultPeriod(t *testing.T) {
	harness.Require(t, "root")
	if testing.Short() {
		t.Log("for a shorter time")
		return
	}
	k := newKennel(t, Config{Cheep: 5 * time.Second, Period: 10 * time.Second})
	bad, good := newSpinner(t, hog, 60, 0), newSpinner(t, audio, 60, 0)
	if err := k.Ready(); err != nil {
		t.Fatal(err)
	}
	o := newObserver(t, bad)
	k.watch(bad, good)
	if e := k.next(12 * time.Second); e.Kind != Demoted || e.ID != bad.ID {
		t.Errorf("%+v", e)
	}
	o.demoted(10 * inTime)
	if bad.realtime() || !good.realtime() {
		t.Error("not the hog alone was demoted")
	}
	k.quiet()
}

// With a hog on every CPU it acts in time all the same.
func TestKernelWatchdogAllCPUs(t *testing.T) {
	harness.Require(t, "root")
	t.Run("granted", func(t *testing.T) {
		k := newKennel(t, Config{})
		good := newSpinner(t, audio, 20, 0)
		k.watch(good)
		var bad []*spinner
		for cpu := range runtime.NumCPU() {
			bad = append(bad, newSpinner(t, hog, 20, cpu))
		}
		o := newObserver(t, bad...)
		k.watch(bad...)
		for range bad {
			if e := k.next(slower(5 * time.Second)); e.Kind != Demoted || e.ID == good.ID {
				t.Errorf("%+v", e)
			}
		}
		for _, s := range bad {
			o.demoted(inTime)
			if s.realtime() {
				t.Error("a hog is realtime")
			}
		}
		if !good.realtime() {
			t.Error("the thread that plays is not realtime any more")
		}
		k.quiet()
	})
	// Threads that nobody told the watchdog of leave nothing to anybody else. The
	// one it was told of goes before them.
	t.Run("unknown", func(t *testing.T) {
		k := newKennel(t, Config{})
		bad := newSpinner(t, hog, 20, 0)
		bad.Priority = 21
		if err := k.Watch(bad.Grant); err != nil {
			t.Fatal(err)
		}
		var others []*spinner
		for cpu := range runtime.NumCPU() {
			others = append(others, newSpinner(t, hog, 20, cpu))
		}
		o := newObserver(t, bad)
		bad.grant()
		for _, s := range others {
			s.grant()
		}
		e := k.next(slower(5 * time.Second))
		if e.Kind != Demoted || e.ID != bad.ID {
			t.Errorf("%+v", e)
		}
		o.demoted(inTime)
		if bad.realtime() {
			t.Error("the hog is realtime")
		}
		for _, s := range others {
			if !s.realtime() {
				t.Error("a thread that was granted nothing was demoted")
			}
		}
	})
}

// A daemon that is stopped or killed, and a watchdog that is.
func TestKernelWatchdogEnds(t *testing.T) {
	harness.Require(t, "root")
	// What is seen in a look that is late says nothing.
	period, cheep := period, period/2
	if harness.Emulated() {
		period, cheep = 3*period, 3*cheep
	}
	inTime := slower(period + 200*time.Millisecond)
	start := func(t *testing.T, grace time.Duration) *keeper {
		return newKeeper(t, period, cheep, grace, 60, false, false, t.TempDir())
	}
	// demoted grants it to one, waits until it is demoted, and sees that another is not.
	demoted := func(t *testing.T, bad, good *spinner, within time.Duration) {
		t.Helper()
		o := newObserver(t, bad)
		bad.grant()
		o.demoted(within)
		if !good.realtime() {
			t.Error("the thread that plays is not realtime any more")
		}
	}
	onEachCPU(t, func(t *testing.T, cpu int) {
		t.Run("daemon stopped", func(t *testing.T) {
			k := start(t, time.Minute)
			bad, good := newSpinner(t, hog, 20, cpu), newSpinner(t, audio, 20, cpu)
			for _, s := range []*spinner{bad, good} {
				if err := k.tell("watch", s.Grant); err != "" {
					t.Fatal(err)
				}
			}
			if err := harness.Pause(k.cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			good.grant()
			demoted(t, bad, good, inTime)
			time.Sleep(3 * period) // it does not sing, and is not starved
			if !good.realtime() {
				t.Error("a daemon that is stopped was taken for starved")
			}
			if err := k.cmd.Process.Signal(unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if e := k.next(slower(2 * time.Second)); e.Kind != Demoted || e.ID != bad.ID {
				t.Errorf("%+v", e)
			}
			if before := k.dog; k.tell("ready", Grant{}) != "" || k.dog != before {
				t.Error("another watchdog was started")
			}
		})
		t.Run("daemon killed", func(t *testing.T) {
			k := start(t, slower(4*time.Second))
			bad, good := newSpinner(t, hog, 20, cpu), newSpinner(t, audio, 20, cpu)
			nice := newSpinner(t, audio, 20, cpu)
			nice.Policy, nice.Priority, nice.Nice = unix.SCHED_NORMAL, 0, -10
			k.watch(good, nice)
			if err := k.tell("watch", bad.Grant); err != "" {
				t.Fatal(err)
			}
			o := newObserver(t, bad, good) // which sees who is the first
			killed := time.Now()
			if err := k.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = k.cmd.Wait()
			bad.grant()
			if tid := o.demoted(inTime); tid != bad.TID {
				t.Errorf("thread %d was demoted first, which plays", tid)
			}
			until(t, "taken back", slower(6*time.Second), func() bool { return !good.realtime() })
			if took := time.Since(killed); took < 3500*time.Millisecond {
				t.Errorf("taken back after %v", took)
			}
			if attr, err := unix.SchedGetAttr(int(nice.TID), 0); err != nil || attr.Nice != 0 {
				t.Errorf("%+v, %v", attr, err)
			}
			until(t, "ended", slower(2*time.Second), func() bool { return !isWatchdog(k.dog) })
		})
		for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
			t.Run("watchdog "+unix.SignalName(signal), func(t *testing.T) {
				k := start(t, time.Minute)
				bad, good := newSpinner(t, hog, 20, cpu), newSpinner(t, audio, 20, cpu)
				k.watch(good)
				if err := k.tell("watch", bad.Grant); err != "" {
					t.Fatal(err)
				}
				before := k.dog
				if err := unix.Kill(before, signal); err != nil {
					t.Fatal(err)
				}
				until(t, "ended", slower(2*time.Second), func() bool { return !isWatchdog(before) })
				// The daemon, which is not realtime, starts another first.
				demoted(t, bad, good, cgtest.Patience(2*period))
				if err := k.tell("ready", Grant{}); err != "" || k.dog == before {
					t.Errorf("%q, and watchdog %d after %d", err, k.dog, before)
				}
			})
		}
		// What a service manager sends to all of a service's processes is not for it.
		t.Run("signals", func(t *testing.T) {
			k := start(t, time.Minute)
			good := newSpinner(t, audio, 20, cpu)
			k.watch(good)
			for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE} {
				if err := unix.Kill(k.dog, signal); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(100 * time.Millisecond)
			if before := k.dog; k.tell("ready", Grant{}) != "" || k.dog != before {
				t.Error("it ended")
			}
		})
	})
}

func isWatchdog(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return err == nil && string(b) == "cgm-watchdog\n" && !isZombie(pid)
}

// isZombie reports whether a process has ended, and nobody has waited for it yet.
func isZombie(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Contains(string(b), ") Z ")
}

// The watchdog of the next daemon takes the place of one that was left.
func TestKernelWatchdogLeft(t *testing.T) {
	harness.Require(t, "root")
	dir := t.TempDir()
	a := newKeeper(t, time.Second, 500*time.Millisecond, time.Minute, 60, false, false, dir)
	good := newSpinner(t, audio, 40, -1)
	a.watch(good)
	a.tell("leave", Grant{})
	time.Sleep(500 * time.Millisecond)
	if !isWatchdog(a.dog) || !good.realtime() {
		t.Fatal("it did not stay")
	}
	b := newKeeper(t, time.Second, 500*time.Millisecond, slower(3*time.Second), 60, false, false, dir)
	if err := b.tell("watch", good.Grant); err != "" {
		t.Fatal(err)
	}
	if isWatchdog(a.dog) || !isWatchdog(b.dog) {
		t.Error("the one that was left has not ended")
	}
	time.Sleep(slower(4 * time.Second))
	if !good.realtime() {
		t.Error("the grant was taken back")
	}
}

// jumping clocks are ahead of the kernel's.
type jumping struct{ mono, boot time.Duration }

func (j *jumping) now() (mono, boot time.Duration) {
	mono, boot = kernelClocks{}.now()
	return mono + j.mono, boot + j.boot
}

// Clocks that jump, as after suspend or in a machine that stood still, demote nobody:
// not one that is all but a hog, and not because of a canary that sings a few times a
// period and wants to at every moment. Without a jump who is a hog is demoted.
func TestKernelWatchdogClocks(t *testing.T) {
	harness.Require(t, "root")
	tree, cpu := harness.NewTree(t), harness.Find(t, "cpu")
	tree.MakeIn("slow", 0, 0, cpu)
	if cpu.V2 {
		tree.Write(cpu, "slow", "cpu.max", "20000 400000")
	} else {
		tree.Write(cpu, "slow", "cpu.cfs_period_us", "400000")
		tree.Write(cpu, "slow", "cpu.cfs_quota_us", "20000")
	}
	daemon := newSpinner(t, rough, 60, -1)
	daemon.begin()
	if err := harness.Place(tree.Dir(cpu, "slow"), strconv.Itoa(int(daemon.PID))); err != nil {
		t.Fatal(err)
	}
	almost := "70000 30000"
	if harness.Emulated() {
		almost = "10000 90000" // when the machine itself waits counts as well
	}
	for _, c := range []struct {
		name string
		how  string
		jump jumping
		want EventKind
	}{
		{"suspended", almost, jumping{boot: time.Hour}, 0},
		{"stood still", almost, jumping{mono: time.Hour, boot: time.Hour}, 0},
		{"no jump", hog, jumping{}, Demoted},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSpinner(t, c.how, 300, 0)
			at := &jumping{}
			d, reports := hound(t, at, int(daemon.PID))
			d.watch(order{grant: s.Grant})
			s.grant()
			most, every := 50, 10
			if harness.Emulated() {
				every = 3 // so slow a canary might starve before more, and begins afresh with each
			}
			if c.want != 0 {
				most = 2000                         // a look that is late says nothing
				d.judge.orphan = harness.Emulated() // there the canary might
			}
			for i := range most {
				d.sleep()
				if i%every == 0 {
					at.mono += c.jump.mono
					at.boot += c.jump.boot
				}
				d.look()
				if !s.realtime() {
					break
				}
			}
			var kind EventKind
			all := reports()
			if len(all) > 0 {
				kind = all[0].Kind
			}
			if kind != c.want || s.realtime() != (c.want == 0) {
				t.Errorf("%+v; realtime: %v", all, s.realtime())
			}
		})
	}
}

// Where it cannot be realtime, nothing is granted, and it is said why.
func TestKernelWatchdogNotRealtime(t *testing.T) {
	harness.Require(t, "root")
	t.Run("no right", func(t *testing.T) {
		k := newKeeper(t, time.Second, time.Second, time.Second, 20, false, true, t.TempDir())
		for _, verb := range []string{"ready", "watch"} {
			if err := k.tell(verb, Grant{}); !strings.Contains(err, "sched_setscheduler(SCHED_FIFO, 99): operation not permitted") {
				t.Errorf("%s: %q", verb, err)
			}
		}
	})
	t.Run("no budget", func(t *testing.T) {
		cpu := harness.Find(t, "cpu")
		tree := harness.NewTree(t)
		tree.MakeIn("unfunded", 0, 0, cpu)
		dir := t.TempDir()
		// Where the tree is rooted there is runtime.
		if err := os.Symlink(cpu.Mount, filepath.Join(dir, "cpu")); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(filepath.Join(tree.Dir(cpu, "unfunded"), "cpu.rt_runtime_us"))
		budgets := err == nil // RT_GROUP_SCHED, and v1
		for _, fund := range []bool{false, true} {
			k := newKeeper(t, time.Second, time.Second, time.Second, 20, fund, false, dir)
			if err := harness.Place(tree.Dir(cpu, "unfunded"), strconv.Itoa(k.cmd.Process.Pid)); err != nil {
				t.Fatal(err)
			}
			said := k.tell("ready", Grant{})
			if refused := said != ""; refused != (budgets && !fund) {
				t.Errorf("budgets %v, funded %v: %q", budgets, fund, said)
			}
			_ = k.cmd.Process.Kill()
			_ = k.cmd.Wait()
			killWatchdog(k.dog)
		}
	})
}

// With NoCanary there is no process, and nothing is watched.
func TestNoCanary(t *testing.T) {
	s := New(Config{NoCanary: true})
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
	if err := s.Watch(Grant{ID: 1, PID: 1, TID: 1}); err != nil {
		t.Error(err)
	}
	s.Unwatch(1)
	if s.proc != nil {
		t.Error("a process was started")
	}
	s.Close(false)
}

// Threads that are gone, and grants that come and go.
func TestKernelWatchdogGrants(t *testing.T) {
	harness.Require(t, "root")
	k := newKennel(t, Config{Linger: time.Minute})
	linger := func(d time.Duration) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.config.Linger = d
	}
	s := newSpinner(t, audio, 120, -1)
	wrong := s.Grant
	wrong.ID, wrong.Started = 7, wrong.Started+1
	if err := k.Watch(wrong); err != nil {
		t.Fatal(err)
	}
	if e := k.next(slower(time.Second)); e.Kind != Ended || e.ID != 7 {
		t.Errorf("of another with its number: %+v", e)
	}
	pid := k.pid()
	fds := func(pid int) int {
		all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	rounds := 20000
	if harness.Emulated() {
		rounds = 2000
	}
	theirs, ours := fds(pid), fds(os.Getpid())
	k.watch(s)
	k.Unwatch(s.ID)
	for i := range rounds {
		g := s.Grant
		g.ID = uint64(1000 + i)
		if err := k.Watch(g); err != nil {
			t.Fatal(err)
		}
		switch i % 3 {
		case 1: // watched anew
			if err := k.Watch(g); err != nil {
				t.Fatal(err)
			}
		case 2: // replaced by another
			old := g.ID
			g.ID += uint64(rounds)
			if err := k.Watch(g); err != nil {
				t.Fatal(err)
			}
			k.Replaced(old)
		}
		k.Unwatch(g.ID)
	}
	// The last of them is told of although nothing else is.
	g := s.Grant
	for _, id := range []uint64{1, 2} {
		g.ID = id
		if err := k.Watch(g); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "both", slower(time.Second), func() bool { return fds(pid) == theirs+2 })
	time.Sleep(10 * time.Millisecond) // it has looked at them, too
	k.Replaced(1)
	until(t, "one of them", slower(time.Second), func() bool { return fds(pid) == theirs+1 })
	k.Unwatch(2)
	until(t, "as it was", slower(time.Second), func() bool { return fds(pid) == theirs })
	if n := fds(os.Getpid()); n > ours {
		t.Errorf("%d descriptors, %d before", n, ours)
	}
	if k.pid() != pid {
		t.Error("another process was started")
	}
	if rss := status(t, pid, "VmRSS:"); rss > 8<<10 {
		t.Errorf("it takes %d KB", rss)
	}
	k.quiet()
	// A thread that ends, and one that gave up what it had.
	k.watch(s)
	s.end()
	if e := k.next(slower(2 * time.Second)); e.Kind != Ended || e.ID != s.ID {
		t.Errorf("%+v", e)
	}
	tired := newSpinner(t, hog, 60, 0)
	tired.Share = 1 // it takes more than that also on a busy machine
	if err := k.Watch(tired.Grant); err != nil {
		t.Fatal(err)
	}
	linger(time.Second)
	tired.begin() // and is not realtime
	if e := k.next(slower(2 * time.Second)); e.Kind != Ended || e.ID != tired.ID {
		t.Errorf("%+v", e)
	}
	// With nobody to watch it stays for a while only.
	until(t, "ended", slower(3*time.Second), func() bool { return !isWatchdog(pid) })
	linger(time.Minute)
	if err := k.Ready(); err != nil {
		t.Error(err)
	}
	if k.pid() == pid {
		t.Error("it did not end")
	}
}

// status returns a number of a process's status.
func status(t testing.TB, pid int, name string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, name); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s", name)
	return 0
}

// tasks returns the threads of a process.
func tasks(t testing.TB, pid int) []string {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// What it costs in memory. All its threads are realtime, and all its descriptors its
// own.
func TestKernelWatchdogFigures(t *testing.T) {
	harness.Require(t, "root")
	k := newKeeper(t, 10*time.Second, 5*time.Second, time.Second, 120, false, false, t.TempDir())
	k.watch(newSpinner(t, still, 120, -1))
	for _, task := range tasks(t, k.dog) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", k.dog, task))
		if err != nil {
			t.Fatal(err)
		}
		if st, errno := parseStat(b); errno != 0 || st.policy != unix.SCHED_FIFO || st.priority != priority {
			t.Errorf("thread %s: %+v, %v", task, st, errno)
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd", k.dog)
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		if link, _ := os.Readlink(filepath.Join(dir, e.Name())); link == "/proc/version" {
			t.Errorf("descriptor %s is not its own", e.Name())
		}
	}
	rss, locked := status(t, k.dog, "VmRSS:"), status(t, k.dog, "VmLck:")
	t.Logf("VmRSS %d KB (anonymous %d KB), VmLck %d KB, %d threads", rss, status(t, k.dog, "RssAnon:"), locked, len(tasks(t, k.dog)))
	if rss > 8<<10 {
		t.Errorf("it takes %d KB", rss)
	}
	if locked == 0 {
		t.Error("nothing is locked")
	}
}

// Hogs that nobody told the watchdog of leave nothing to anybody, not even the 5 %
// that the kernel keeps otherwise. The canary starves; they lose realtime, not those
// of root; and who was granted it has it again when the canary sings.
func TestKernelWatchdogStarving(t *testing.T) {
	harness.Require(t, "root", "vm")
	const limit = "/proc/sys/kernel/sched_rt_runtime_us"
	before, err := os.ReadFile(limit)
	if err != nil {
		t.Fatal(err)
	}
	k := newKennel(t, Config{DemoteUnknown: true})
	good, roots := newSpinner(t, audio, 120, 0), newSpinner(t, still, 120, 0)
	k.watch(good)
	roots.grant()
	var bad []*spinner
	for cpu := range runtime.NumCPU() {
		bad = append(bad, spinnerOf(t, 1000, rough, 40, cpu))
	}
	if err := os.WriteFile(limit, []byte("-1"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(limit, before, 0); err != nil {
			t.Error(err)
		}
	})
	unfair(t)
	for _, s := range bad {
		s.begin() // they compute, and wait for no CPU when they are given it
	}
	began := time.Now()
	for _, s := range bad {
		s.grant()
	}
	var kinds []EventKind
	for len(kinds) == 0 || kinds[len(kinds)-1] != Restored {
		e := k.next(30 * time.Second)
		kinds = append(kinds, e.Kind)
		t.Logf("after %v: %+v", time.Since(began), e)
	}
	if kinds[0] != Starving || kinds[1] != Starved {
		t.Errorf("%v", kinds)
	}
	for _, s := range bad {
		if s.realtime() {
			t.Error("a hog is realtime")
		}
	}
	if !roots.realtime() || !good.realtime() {
		t.Error("others were demoted for good")
	}
}

// unfair takes from threads that are not realtime what Linux 6.12 and later keep for
// them beside (the fair server, Documentation/scheduler/sched-debug.rst).
func unfair(t *testing.T) {
	t.Helper()
	debug := t.TempDir()
	if err := unix.Mount("debugfs", debug, "debugfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(debug, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	servers, err := filepath.Glob(debug + "/sched/fair_server/cpu*/runtime")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range servers {
		before, err := os.ReadFile(name)
		if err == nil {
			err = os.WriteFile(name, []byte("0"), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(name, before, 0); err != nil {
				t.Error(err)
			}
		})
	}
}

// A loop that is ended again and again is given up, and the daemon told who is not
// watched any more.
func TestKernelWatchdogGivenUp(t *testing.T) {
	harness.Require(t, "root")
	k := newKennel(t, Config{})
	s := newSpinner(t, audio, 60, -1)
	k.watch(s)
	kills := 0
	var last *process
	for end := time.Now().Add(cgtest.Patience(30 * time.Second)); len(k.events) == 0; time.Sleep(200 * time.Millisecond) {
		if kills > 2*restarts || time.Now().After(end) {
			t.Fatalf("killed %d times, and not given up", kills)
		}
		k.mu.Lock()
		if k.proc != nil && k.proc != last { // its end may not have been noticed yet
			last = k.proc
			last.kill()
			kills++
		}
		k.mu.Unlock()
	}
	if e := k.next(time.Second); e.Kind != Lost || e.ID != s.ID {
		t.Errorf("%+v", e)
	}
	k.mu.Lock()
	before := k.before
	k.mu.Unlock()
	if err := k.Ready(); err == nil && time.Now().Before(before) {
		t.Error("ready at once")
	}
}

// hound is the second stage within the test's own process, with other clocks and
// another daemon.
func hound(t *testing.T, c clocks, daemon int) (d *dog, reports func() (all []Event)) {
	t.Helper()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	canary, fd, err := newCanary()
	if err != nil {
		t.Fatal(err)
	}
	scan, err := newScanner()
	if err != nil {
		t.Fatal(err)
	}
	task, errno := taskDir(daemon)
	if errno != 0 {
		t.Fatal(errno)
	}
	d = &dog{clocks: c, parent: daemon, in: -1, out: pipe[1], canary: fd, scan: scan, task: task}
	d.judge = judge{period: time.Second, slots: make([]slot, 0, MaxWatched)}
	d.threads, d.acts = make([]thread, 0, MaxWatched), make([]act, 0, MaxWatched+2)
	now, boot := c.now()
	d.judge.begin(now, boot)
	t.Cleanup(func() {
		for i := range d.threads {
			d.release(i)
		}
		scan.close()
		canary.Close()
		for _, fd := range []int{pipe[0], pipe[1], task} {
			unix.Close(fd)
		}
	})
	return d, func() (all []Event) {
		for {
			var b [reportSize]byte
			if n, err := unix.Read(pipe[0], b[:]); err != nil || n != reportSize {
				return all
			}
			var r report
			r.get(b[:])
			all = append(all, r.event)
		}
	}
}

// sleep sleeps until the next look.
func (d *dog) sleep() {
	now, _ := d.clocks.now()
	time.Sleep(d.judge.due - now)
}

// What the process before this one took because the canary starved is given back,
// but not to who has something else by now.
func TestKernelWatchdogSuspended(t *testing.T) {
	harness.Require(t, "root")
	d, reports := hound(t, kernelClocks{}, os.Getpid())
	same, other := newSpinner(t, audio, 20, -1), newSpinner(t, audio, 20, -1)
	same.begin()
	other.begin()
	if err := unix.Setpriority(unix.PRIO_PROCESS, int(other.TID), 5); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*spinner{same, other} {
		d.watch(order{grant: s.Grant, flags: wasSuspended})
	}
	var all []Event
	// After a look that is late the canary begins afresh.
	for i, end := 0, time.Now().Add(cgtest.Patience(10*time.Second)); i < 15 || len(all) < 2 && time.Now().Before(end); i++ {
		d.sleep()
		d.look()
		all = append(all, reports()...)
	}
	if len(all) != 2 || all[0].Kind != Restored || all[0].ID != same.ID || all[1].Kind != Ended || all[1].ID != other.ID {
		t.Errorf("%+v", all)
	}
	if attr, err := unix.SchedGetAttr(int(same.TID), 0); err != nil || attr.Policy != unix.SCHED_RR || attr.Priority != 20 || attr.Flags&unix.SCHED_FLAG_RESET_ON_FORK == 0 {
		t.Errorf("%+v, %v", attr, err)
	}
	if other.realtime() {
		t.Error("a thread that was given another nice level is realtime")
	}
}

// Looking allocates nothing: there is no collector.
func TestKernelWatchdogAllocatesNothing(t *testing.T) {
	harness.Require(t, "root")
	d, _ := hound(t, kernelClocks{}, os.Getpid())
	for range 10 {
		s := newSpinner(t, audio, 20, -1)
		d.watch(order{grant: s.Grant})
	}
	d.judge.orphan = true // the test need not wait for the canary
	again := order{grant: d.threads[1].grant}
	for _, c := range []struct {
		name string
		f    func()
	}{
		{"look", d.look},
		{"wantsToRun", func() { d.scan.wantsToRun(d.task) }},
		{"report", func() { d.report(report{}) }},
		{"demote", func() { _ = d.threads[0].demote() }},
		{"watch", func() { d.watch(again) }},
	} {
		if n := testing.AllocsPerRun(100, c.f); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}
