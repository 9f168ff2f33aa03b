package e2e_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// raceTime bounds a race in time, should its rounds not fit; raceLimit bounds it
// on a machine that has other things to do.
const (
	raceTime  = 60 * time.Second
	raceLimit = 8 * time.Minute
)

// rounds calls f n times, or as often as fits into raceTime, but half of them at
// least: a race that was hardly run shows nothing.
func rounds(t *testing.T, n int, f func(round int)) {
	t.Helper()
	roundsUntil(t, n, func() bool { return true }, f)
}

// roundsUntil is rounds, and goes on until enough was seen: who comes first is a
// matter of luck and of the machine. It ends without that at raceLimit.
func roundsUntil(t *testing.T, n int, enough func() bool, f func(round int)) {
	t.Helper()
	n = harness.Rounds(n)
	start := time.Now()
	for i := 0; ; i++ {
		switch took := time.Since(start); {
		case i >= n && enough():
			return
		case took > raceTime && i >= n/2 && enough(), took > raceLimit && i >= n/2:
			t.Logf("%d of %d rounds fit in %v", i, n, took)
			return
		case took > raceLimit:
			t.Fatalf("only %d of %d rounds fit in %v", i, n, took)
		}
		f(i)
		if t.Failed() {
			t.Fatalf("in round %d", i)
		}
	}
}

// pausable is who can be stopped wherever it is.
type pausable interface {
	Pause() error
	Resume() error
}

// race makes a request and, at a random moment of its first while, or of as long as
// a request takes on a slow machine, lets the rival do something. Every second time
// the daemon, or a proxy on the way to it, is stopped meanwhile, wherever it is, so
// that the rival comes in between for sure.
func (w *world) race(while time.Duration, request, rival func() error) error {
	w.Helper()
	while = max(while, w.pace)
	jitter := time.Duration(rand.Int64N(int64(while)))
	var paused pausable // nothing, or one of those through whom the request goes
	if i := rand.IntN(2 * (1 + len(w.proxies))); i == 0 {
		paused = w.d
	} else if i <= len(w.proxies) {
		paused = w.proxies[i-1]
	}
	res := make(chan error)
	go func() {
		spin(jitter)
		if paused == nil {
			res <- rival()
			return
		}
		err := paused.Pause()
		if err == nil {
			err = rival()
		}
		res <- errors.Join(err, paused.Resume())
	}()
	start := time.Now()
	err := request()
	if paused == nil { // one stall changes little, a slow machine all
		w.pace += (min(time.Since(start), 4*while) - w.pace) / 8
	}
	if err := <-res; err != nil {
		w.Fatal(err)
	}
	if why := clean(err); why != "" {
		w.Error(why)
	}
	return err
}

// clean returns what is wrong with the answer to a request in a race, which
// may succeed or fail.
func clean(err error) string {
	var de *harness.DBusError
	if err == nil || errors.As(err, &de) && !strings.Contains(de.Text, "internal error") {
		return ""
	}
	return fmt.Sprintf("not a clean answer: %v", err)
}

// spin waits for so short a time that sleeping would be too coarse.
func spin(d time.Duration) {
	start := time.Now()
	if coarse := 2 * time.Millisecond; d > 4*coarse { // others want the processor
		time.Sleep(d - coarse)
	}
	for time.Since(start) < d {
	}
}

// reuse is the argument of reusePID.
type reuse struct {
	Victim  int
	UID     uint32
	Program string
}

// reusePID runs in a container's first process: it kills its child Victim and
// starts another program, as UID, that gets the number (ns_last_pid, which
// the kernel keeps for each pid namespace). It returns the new one's number.
var reusePID = harness.Inside("reusePID", func(a reuse) (int, error) {
	if err := unix.Kill(a.Victim, unix.SIGKILL); err != nil {
		return 0, err
	}
	// It does not die while it is frozen.
	for end := time.Now().Add(max(20*time.Millisecond, cgtest.Patience(5*time.Millisecond))); ; {
		pid, err := unix.Wait4(a.Victim, nil, unix.WNOHANG, nil)
		if err != nil {
			return 0, err
		}
		if pid == a.Victim {
			break
		}
		if time.Now().After(end) {
			return 0, nil
		}
	}
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(fmt.Sprint(a.Victim-1)), 0); err != nil {
		return 0, err
	}
	// Standard input is nothing: it would end at once if it were read.
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(p[0])
	// The write end stays open until the process is ended.
	strangers[a.Victim] = p[1]
	return syscall.ForkExec(a.Program, []string{a.Program, "pause"}, &syscall.ProcAttr{
		Dir: "/", Files: []uintptr{uintptr(p[0]), 1, 2},
		Sys: &syscall.SysProcAttr{
			Pdeathsig:  syscall.SIGKILL,
			Credential: &syscall.Credential{Uid: a.UID, Gid: a.UID},
		},
	})
})

// strangers are the write ends of the standard inputs of what reusePID
// started, by the number that was to be reused.
var strangers = map[int]int{}

// endStranger ends what reusePID started and tells whether it still lived.
var endStranger = harness.Inside("endStranger", func(a struct{ Victim, PID int }) (bool, error) {
	defer delete(strangers, a.Victim)
	if err := unix.Close(strangers[a.Victim]); err != nil {
		return false, err
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(a.PID, &ws, 0, nil); err != nil {
		return false, err
	}
	return ws.Exited() && ws.ExitStatus() == 0, nil
})

// A victim ends while the request is on its way, and a stranger gets its
// number: it must not be moved or killed in its place.
func TestKernelRacePIDReuse(t *testing.T) {
	harness.Require(t, "cc")
	// In a container the number that the requestor wrote is reused, which the
	// daemon has to translate; on the host, that by which the daemon knows it.
	t.Run("container", func(t *testing.T) { pidReuse(t, newWorld, true) })
	t.Run("host", func(t *testing.T) { pidReuse(t, newWorld, false) })
}

func pidReuse(t *testing.T, newWorld func(*testing.T) *world, container bool) {
	t.Helper()
	w := newWorld(t)
	victim := harness.Program(t, "testdata/victim.c", 0o755)
	b := w.placed(w.start(harness.Spec{PIDNS: container}), "c1")
	w.Make("c1/dst", 1000, 1000)
	r := b.user(1000)
	c := r.MustDial(w.d.Sock)
	defer c.Close()

	race := func(t *testing.T, while time.Duration, uid uint32, prepare, request func(pid int) error, check func(host int, err error)) {
		hits, done := 0, 0
		enough := func() bool { return hits >= harness.Rounds(1000)/4 }
		roundsUntil(t, 1000, enough, func(int) {
			v := b.Launch(&harness.Cred{UID: 1000, GID: 1000}, victim, "pause")
			if err := prepare(v.PID); err != nil {
				t.Fatal(err)
			}
			var pid int
			err := w.race(while, func() error { return request(v.PID) },
				func() error { return b.Run(reusePID, reuse{v.PID, uid, victim}, &pid) })
			if pid == 0 {
				if _, err := v.End(cgtest.Patience(5 * time.Second)); err != nil {
					t.Fatal(err)
				}
				return
			}
			v.In.Close()
			v.Out.Close()
			if err == nil {
				done++
			}
			if pid == v.PID {
				hits++
				host := pid
				if container {
					host = hostPID(t, b, pid)
				}
				if host != 0 {
					check(host, err)
				}
			}
			var alive bool
			if err := b.Run(endStranger, struct{ Victim, PID int }{v.PID, pid}, &alive); err != nil {
				t.Fatal(err)
			}
			if !alive {
				t.Errorf("the stranger was killed; the answer was %v", err)
			}
		})
		t.Logf("the number was reused %d times, the request succeeded %d times", hits, done)
		if !enough() {
			t.Error("the number was hardly ever reused")
		}
	}
	t.Run("Move", func(t *testing.T) {
		race(t, 1200*time.Microsecond, 0, nothing, func(pid int) error { return second(c.V1("Move", "dst", uint32(pid))) },
			func(host int, err error) {
				all := harness.CgroupsOf(host)
				for _, h := range harness.Hierarchies() {
					if cg := all[h.Name]; cg != w.Path("c1") {
						t.Errorf("the stranger is in %s:%s; the answer was %v", h.Name, cg, err)
					}
				}
			})
	})
	t.Run("MovePid", func(t *testing.T) {
		race(t, 1200*time.Microsecond, 0, nothing, func(pid int) error { return second(c.V0("MovePid", "all", "dst", int32(pid))) },
			func(host int, err error) {
				all := harness.CgroupsOf(host)
				for _, h := range harness.Hierarchies() {
					if cg := all[h.Name]; cg != w.Path("c1") {
						t.Errorf("the stranger is in %s:%s; the answer was %v", h.Name, cg, err)
					}
				}
			})
	})
	if container {
		return // Kill takes no number from the requestor
	}
	// The victim is in dst when it ends; the stranger never is. Without the
	// freezer's hierarchy nothing holds the victim while Kill looks at it.
	enter := func(ctrls string) func(int) error {
		return func(pid int) error { return second(c.V0("MovePid", ctrls, "dst", int32(pid))) }
	}
	kill := func(int) error { return second(c.V1("Kill", "dst")) }
	t.Run("Kill", func(t *testing.T) { race(t, 6*time.Millisecond, 0, enter("pids,freezer"), kill, func(int, error) {}) })
	t.Run("Kill, a stranger of the same user", func(t *testing.T) {
		race(t, 6*time.Millisecond, 1000, enter("pids"), kill, func(int, error) {})
	})
}

func nothing(int) error { return nil }

// hostPID finds the process that has a number in the container, by looking at
// the container's cgroups.
func hostPID(t *testing.T, b *box, pid int) int {
	t.Helper()
	h := harness.Find(t, "pids")
	nspid := regexp.MustCompile(`(?m)^NSpid:.*\t(\d+)$`)
	for _, cg := range []string{b.cg, b.cg + "/dst"} {
		for f := range strings.FieldsSeq(b.w.Read(h, cg, "cgroup.procs")) {
			st, err := os.ReadFile(filepath.Join("/proc", f, "status"))
			if err == nil && nspid.FindStringSubmatch(string(st))[1] == fmt.Sprint(pid) {
				var n int
				_, _ = fmt.Sscan(f, &n)
				return n
			}
		}
	}
	return 0
}

// A cgroup is renamed, or removed, and another owner's takes its name while
// requests about it are on their way: that one must not be touched.
func TestKernelRaceReplacedCgroup(t *testing.T) { replacedCgroup(t, newWorld) }

func replacedCgroup(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	pids := harness.Find(t, "pids")
	w.Make("yard", 0, 0)
	r, v, other := w.host(1000, "yard"), w.host(1000, "yard"), w.host(1001, "yard")
	w.watch = []*harness.Proc{r, v, other}
	c := r.MustDial(w.sock())
	defer c.Close()
	dir := w.Dir(pids, "yard")
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	requests := []func() error{
		func() error { return second(c.V0("Create", "pids", "a/x")) },
		func() error {
			return second(c.V1("Create", "a/x/y", []string{"pids"}, map[string]string{"pids.limit": "5"}))
		},
		func() error { return second(c.V0("SetValue", "pids", "a", "pids.max", "6")) },
		func() error { return second(c.V1("SetValue", "a", map[string]string{"pids.limit": "6"})) },
		func() error { return second(c.V0("MovePid", "pids", "a", v.PID)) },
		func() error { return second(c.V1("Move", "a", uint32(v.PID))) },
		func() error { return second(c.V0("Chmod", "pids", "a", "", int32(0o770))) },
		func() error { return second(c.V0("Chmod", "pids", "a", "tasks", int32(0o666))) },
		func() error { return second(c.V0("RemoveOnEmpty", "pids", "a/none")) },
		func() error { return second(c.V1("Kill", "a")) },
	}
	outcome := map[bool]int{}
	both := func() bool { return testing.Short() || outcome[true] > 0 && outcome[false] > 0 }
	roundsUntil(t, 1000, both, func(round int) {
		w.MakeIn("yard/a", 1000, 1000, pids)
		must(os.Chown(filepath.Join(at("a"), "pids.max"), int(w.first()+1000), int(w.first()+1000)))
		request := requests[round%len(requests)]
		bystander := round%len(requests) == len(requests)-1
		replaced := true
		err := w.race(500*time.Microsecond, request, func() error {
			// Removing fails if the request has put something in: then rename,
			// which v2 does not know.
			if pids.V2 {
				if replaced = os.Remove(at("a")) == nil; !replaced {
					return nil
				}
			} else if round/len(requests)%2 == 0 || os.Remove(at("a")) != nil {
				if err := os.Rename(at("a"), at("b")); err != nil {
					return err
				}
			}
			err := os.Mkdir(at("a"), 0o755)
			if err == nil {
				err = os.WriteFile(at("a/pids.max"), []byte("77"), 0)
			}
			if err == nil && bystander { // for Kill to hit
				err = os.WriteFile(at("a/cgroup.procs"), []byte(fmt.Sprint(other.HostPID)), 0)
			}
			return err
		})
		outcome[err == nil]++
		if bystander {
			w.Write(pids, "yard", "cgroup.procs", fmt.Sprint(other.HostPID))
		}
		for _, p := range w.watch {
			if !p.Alive() {
				t.Fatal("Kill reached another cgroup")
			}
		}
		if replaced {
			// What the other owner made is as it was.
			want(t, "limit", w.Read(pids, "yard/a", "pids.max"), "77")
			want(t, "tasks", w.Read(pids, "yard/a", "cgroup.procs"), "")
			var st unix.Stat_t
			must(unix.Stat(at("a"), &st))
			want(t, "mode", st.Mode&0o7777, uint32(0o755))
			want(t, "owner", st.Uid, uint32(0))
			want(t, "links", st.Nlink, uint64(2)) // no child
			must(unix.Stat(filepath.Join(at("a"), pids.TasksFile()), &st))
			want(t, "mode of tasks", st.Mode&0o7777, uint32(0o644))
		}

		w.Write(pids, "yard", "cgroup.procs", fmt.Sprint(v.HostPID))
		for _, d := range []string{"b/x/y", "b/x", "b", "a/x/y", "a/x", "a"} {
			if err := os.Remove(at(d)); err != nil && !errors.Is(err, unix.ENOENT) {
				t.Fatal(err)
			}
		}
	})
	t.Logf("%d requests succeeded on the old one, %d were refused", outcome[true], outcome[false])
	if !both() {
		t.Error("there was no race: widen the jitter")
	}
}

// The host moves the requestor between two calls: the next call is confined to
// the new cgroup.
func TestKernelRaceMovedRequestor(t *testing.T) { movedRequestor(t, newWorld) }

func movedRequestor(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	pids := harness.Find(t, "pids")
	for _, cg := range []string{"x", "y", "jail"} {
		w.Make(cg, 1000, 1000)
	}
	w.Own("jail", 0, 0)
	r := w.host(1000, "x")
	c := r.MustDial(w.sock())
	defer c.Close()
	in := func(cg, name string) bool { return w.Exists(pids, cg+"/"+name) }
	rounds(t, 1000, func(round int) {
		cg, other := "x", "y"
		if round%2 == 1 {
			cg, other = other, cg
		}
		w.PlaceIn(r, cg, pids)
		name := fmt.Sprint("n", round)
		if _, err := c.V0("Create", "pids", name); err != nil {
			t.Fatal(err)
		}
		if !in(cg, name) || in(other, name) {
			t.Fatalf("in %s it created in %s: %v, in %s: %v", cg, cg, in(cg, name), other, in(other, name))
		}
		where, err := c.V0("GetPidCgroup", "pids", r.PID)
		if err != nil || len(where) != 1 || (where[0] != "" && where[0] != "/") {
			t.Fatalf("its own cgroup is %q, %v", where, err)
		}
		w.PlaceIn(r, "jail", pids)
		if _, err := c.V0("Create", "pids", name+"x"); err == nil {
			t.Fatal("in the jail it created something")
		}
		if _, err := c.V0("Remove", "pids", name, int32(0)); err == nil && !in(cg, name) {
			t.Fatal("from the jail it removed something")
		}
		w.PlaceIn(r, cg, pids)
		if got, err := c.V0("Remove", "pids", name, int32(0)); err != nil || got[0] != int32(1) {
			t.Fatalf("Remove: %v, %v", got, err)
		}
	})

	// And while a call is on its way: it lands in one of the two.
	rounds(t, 500, func(round int) {
		name := fmt.Sprint("m", round)
		w.PlaceIn(r, "x", pids)
		err := w.race(300*time.Microsecond,
			func() error { return second(c.V0("Create", "pids", name)) },
			func() error {
				return os.WriteFile(filepath.Join(w.Dir(pids, "y"), "cgroup.procs"), []byte(fmt.Sprint(r.HostPID)), 0)
			})
		made := 0
		for _, cg := range []string{"x", "y"} {
			if in(cg, name) {
				made++
				if err := os.Remove(w.Dir(pids, cg+"/"+name)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err == nil && made != 1 || err != nil && made != 0 {
			t.Errorf("%d cgroups made; the answer was %v", made, err)
		}
	})
}

// reapAll runs in a subreaper: it collects what a killed fork bomb leaves.
var reapAll = harness.Inside("reapAll", func(struct{}) (int, error) {
	n := 0
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		switch {
		case pid > 0:
			n++
		case errors.Is(err, unix.EINTR):
		default:
			return n, nil
		}
	}
})

var becomeSubreaper = harness.Inside("becomeSubreaper", func(struct{}) (int, error) {
	return 0, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
})

// A fork bomb of 200 processes is killed whole, or the answer is Busy.
func TestKernelRaceKillForkBomb(t *testing.T) {
	harness.Require(t, "cc")
	w := newWorld(t)
	victim := harness.Program(t, "testdata/victim.c", 0o755)
	pids, freezer := harness.Find(t, "pids"), harness.Find(t, "freezer")
	w.Make("yard", 0, 0)
	hs := []harness.Hierarchy{pids}
	if freezer.Name != pids.Name {
		hs = append(hs, freezer)
	}
	w.MakeIn("yard/k", 1000, 1000, hs...)
	launcher, r := w.host(1000, "yard"), w.host(1000, "yard")
	mate := w.host(1000, "yard")
	w.watch = []*harness.Proc{launcher, r, mate}
	if err := launcher.Run(becomeSubreaper, struct{}{}, nil); err != nil {
		t.Fatal(err)
	}
	c := r.MustDial(w.d.Sock)
	defer c.Close()
	busy, largest := 0, 0
	current := func() (n int) {
		t.Helper()
		_, _ = fmt.Sscan(w.Read(pids, "yard/k", "pids.current"), &n)
		return n
	}
	rounds(t, 1000, func(round int) {
		// Small ones are quicker to kill: more rounds fit.
		w.Write(pids, "yard/k", "pids.max", []string{"200", "16", "40", "16", "16"}[round%5])
		bomb := launcher.Launch(nil, victim, "bomb")
		defer bomb.In.Close()
		defer bomb.Out.Close()
		for _, h := range hs {
			w.Write(h, "yard/k", "cgroup.procs", fmt.Sprint(bomb.PID))
		}
		if _, err := bomb.In.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		spin(time.Duration(rand.Int64N(int64(8 * time.Millisecond))))
		if !testing.Short() && round%20 == 0 { // a large one, however long it takes to grow
			eventually(t, "the bomb grows", func() bool { return current() >= 100 })
		}
		largest = max(largest, current())
		patient := time.Now().Add(cgtest.Patience(10 * time.Second))
		for try := 0; ; try++ {
			_, err := c.V1("Kill", "k")
			if err == nil {
				break
			}
			var de *harness.DBusError
			if !errors.As(err, &de) || de.Name != "org.linuxcontainers.CGManager1.Error.Busy" || try >= 20 && time.Now().After(patient) {
				t.Fatalf("Kill: %v", err)
			}
			busy++
		}
		// All are dead, at once: cgroup.procs may still list who is ending.
		deadline := time.Now().Add(cgtest.Patience(5 * time.Second))
		for alive := ""; ; {
			if alive = running(t, w.Read(pids, "yard/k", "cgroup.procs")); alive == "" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("alive after Kill: %s", alive)
			}
			time.Sleep(200 * time.Microsecond)
		}
		deadline = time.Now().Add(cgtest.Patience(10 * time.Second))
		for current() != 0 {
			if err := launcher.Run(reapAll, struct{}{}, nil); err != nil {
				t.Fatal(err)
			}
			if time.Now().After(deadline) {
				t.Fatal("zombies stay")
			}
		}
		for _, p := range w.watch {
			if !p.Alive() {
				t.Fatal("Kill reached outside")
			}
		}
	})
	t.Logf("up to %d processes at the time of Kill; %d times Busy", largest, busy)
	want(t, "freezer.state", w.Read(freezer, "yard/k", "freezer.state"), "THAWED")
	if !testing.Short() && largest < 100 {
		t.Errorf("the bomb had only %d processes", largest)
	}
}

// running returns those of the pids that are not ending.
func running(t *testing.T, procs string) string {
	t.Helper()
	var out []string
	for pid := range strings.FieldsSeq(procs) {
		st, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		if err != nil {
			continue
		}
		if _, after, ok := strings.Cut(string(st), ") "); ok && after[0] != 'Z' && after[0] != 'X' {
			out = append(out, pid)
		}
	}
	return strings.Join(out, " ")
}

// The attacker turns its own pair to a service between the daemon's look at
// it and its writing. The service may get bytes then: as the attacker's, who
// could have sent them there itself, and never as those of root.
func TestKernelRaceTurnedSideChannel(t *testing.T) { turnedSideChannel(t, newWorld) }

func turnedSideChannel(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("yard", 1000, 1000)
	r := w.host(1000, "yard")
	turner := w.host(1000, "yard")
	root := w.host(0, ".")
	path := filepath.Join(w.dir(), "service")
	fd := root.Socket(unix.SOCK_DGRAM)
	root.PassCred(fd)
	root.Bind(fd, path)
	if err := unix.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	c := r.MustDial(w.sock())
	defer c.Close()
	answers := map[string]int{}
	raced := func() bool { return testing.Short() || answers["to the service"] > 0 }
	drain := func() {
		for {
			d, err := root.Recv(fd, 0)
			if err != nil {
				return
			}
			answers["to the service"]++
			if d.Cred == nil || d.Cred.UID != 1000 || d.Cred.GID != 1000 {
				t.Errorf("the service got %q from %+v", d.Data, d.Cred)
			}
		}
	}
	roundsUntil(t, 500, raced, func(round int) {
		ours, theirs := r.Socketpair(unix.SOCK_DGRAM)
		theirsToo := r.Give(theirs, turner)
		if round%2 == 0 {
			// The credential waits for the daemon, so that it goes on at once.
			if err := r.Send(ours, []byte{0}, &r.Cred); err != nil {
				t.Fatal(err)
			}
		}
		err := w.race(600*time.Microsecond,
			func() error { return second(c.V0("GetTasksRecursiveScm", "pids", "", harness.FD(theirs))) },
			func() error { _ = turner.Connect(theirsToo, path); return nil })
		turner.Close(theirsToo)
		if err != nil {
			answers["refused"]++
		} else {
			answers["taken"]++
		}
		r.Close(ours)
		r.Close(theirs)
		drain()
	})
	time.Sleep(300 * time.Millisecond) // what comes late
	drain()
	t.Log(answers)
	if !raced() {
		t.Error("there was no race: widen the jitter")
	}
}
