package rt

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt/policy"
	"cgmanager/manager/rt/watchdog"
	"cgmanager/privcheck"
)

// executesEnv makes the test's program one that a second thread of executes another.
const executesEnv = "CGM_TEST_EXECUTES"

// The main goroutine of such a one keeps the first thread. Later it might be on another.
func init() {
	if os.Getenv(executesEnv) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if os.Getenv(executesEnv) != "" {
		executes()
	}
	os.Exit(m.Run())
}

// executes says the number of its second thread, which runs sleep(1) when it is told.
func executes() {
	go func() {
		runtime.LockOSThread()
		fmt.Println(unix.Gettid())
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		panic(syscall.Exec("/bin/sleep", []string{"sleep", "300"}, nil))
	}()
	select {}
}

func openService(t *testing.T, state string) *Service {
	t.Helper()
	cgtest.Require(t, cgtest.Root)
	set, err := cgfs.Open(cgfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = set.Close() })
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(t.Output())
	s, err := Open(Config{
		Scheduling: unix.SCHED_RR, MaxPriority: 20, MinNice: -15, RTTimeMax: 200000,
		Limits:   Limits{Users: 10, Processes: 10, Threads: 10, Actions: 100, Burst: time.Second, Refuse: time.Second},
		Watchdog: watchdog.Config{NoCanary: true}, PolicyFile: filepath.Join(state, "none"), State: state,
	}, set, host, log)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sleeper starts a process, and returns handles on it and its thread.
func sleeper(t *testing.T) (*identity.Process, *identity.Thread) {
	t.Helper()
	return handles(t, int32(cgtest.Child(t, "sleep", "300")), 0)
}

func handles(t *testing.T, pid, tid int32) (*identity.Process, *identity.Thread) {
	t.Helper()
	p, err := identity.Open(pid, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	if tid == 0 {
		tid = pid
	}
	th, err := p.Thread(tid)
	if err != nil {
		t.Fatal(err)
	}
	return p, th
}

func order(t *testing.T, s *Service, p *identity.Process, th *identity.Thread, to identity.Scheduling) *Order {
	t.Helper()
	name, err := ProcessOf(p)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Reserve([]string{"uid:0"}, Thread{Process: name, TID: th.TID(), ThreadStarted: th.Started()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Cancel)
	return &Order{
		Reservation: r, Thread: th, To: to, Top: "/",
		Verify: func() (privcheck.Decision, error) { return privcheck.RealtimeKept(true), nil },
	}
}

var rr10 = identity.Scheduling{Policy: unix.SCHED_RR, Priority: 10}

func anybody(Process) bool { return true }

func isNow(t *testing.T, tid int32, policy, priority uint32, nice int32) {
	t.Helper()
	a, err := unix.SchedGetAttr(int(tid), 0)
	if err != nil || a.Policy != policy || a.Priority != priority || a.Nice != nice {
		t.Errorf("thread %d is %+v (%v), want policy %d, priority %d, nice %d", tid, a, err, policy, priority, nice)
	}
}

// What is not in order right before the act leaves the thread as it is; right after
// it, the thread has nothing any more (rows 15, 17 and 19 of the table).
func TestKernelGrantUndone(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	no := errors.New("no")
	for _, before := range []bool{false, true} {
		p, th := sleeper(t)
		tid := th.TID()
		want := [2]uint32{unix.SCHED_NORMAL, 0}
		if before {
			if err := s.Grant(order(t, s, p, th, identity.Scheduling{Policy: unix.SCHED_FIFO, Priority: 3})); err != nil {
				t.Fatal(err)
			}
			want = [2]uint32{unix.SCHED_FIFO, 3}
			_, th = handles(t, p.PID(), 0)
		}
		o := order(t, s, p, th, rr10)
		o.Verify = func() (privcheck.Decision, error) { return privcheck.Decision{}, no }
		if err := s.Grant(o); !errors.Is(err, no) {
			t.Errorf("refused before: %v", err)
		}
		isNow(t, tid, want[0], want[1], 0)
		o.Verify = func() (privcheck.Decision, error) { return privcheck.Decision{}, nil }
		if err := s.Grant(o); !errors.Is(err, unix.EPERM) && !strings.Contains(fmt.Sprint(err), "not decided") {
			t.Errorf("not decided: %v", err)
		}
		isNow(t, tid, want[0], want[1], 0)
		n := 0
		o.Verify = func() (privcheck.Decision, error) {
			if n++; n == 2 {
				isNow(t, tid, unix.SCHED_RR, 10, 0)
				return privcheck.Decision{}, no
			}
			return privcheck.RealtimeKept(true), nil
		}
		if err := s.Grant(o); !errors.Is(err, no) {
			t.Errorf("refused after: %v", err)
		}
		isNow(t, tid, unix.SCHED_NORMAL, 0, 0)
		if g := s.List(); len(g) != 0 {
			t.Errorf("granted after all: %v", g)
		}
		th.Close()
	}
}

// What is not decided, or is not there any more, is not done.
func TestKernelSchedule(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	p, th := sleeper(t)
	defer th.Close()
	if err := schedule(privcheck.Decision{}, th, rr10); !errors.Is(err, unix.EPERM) {
		t.Errorf("not decided: %v", err)
	}
	isNow(t, th.TID(), unix.SCHED_NORMAL, 0, 0)
	if err := schedule(privcheck.RealtimeKept(true), th, rr10); err != nil {
		t.Error(err)
	}
	isNow(t, th.TID(), unix.SCHED_RR, 10, 0)
	_ = unix.PidfdSendSignal(p.PidFD(), unix.SIGKILL, nil, 0)
	cgtest.Eventually(t, 5*time.Second, "the process ends", func() bool { return !th.Alive() })
	if err := schedule(privcheck.RealtimeKept(true), th, rr10); !errors.Is(err, identity.ErrGone) {
		t.Errorf("a thread that ended: %v", err)
	}
}

// The number of a thread that ended is another's: it is not touched.
func TestKernelScheduleNumber(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	first := exec.Command("sleep", "300")
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	pid := first.Process.Pid
	_, th := handles(t, int32(pid), 0)
	defer th.Close()
	_ = first.Process.Kill()
	_ = first.Wait()
	for range 500 { // whoever forks meanwhile gets it first
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", fmt.Append(nil, pid-1), 0); err != nil {
			t.Fatal(err)
		}
		next := exec.Command("nice", "-n", "5", "sleep", "300")
		if err := next.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = next.Process.Kill()
			_ = next.Wait()
		})
		if next.Process.Pid != pid {
			_ = next.Process.Kill()
			continue
		}
		cgtest.Eventually(t, 5*time.Second, "it is nice", func() bool {
			a, err := unix.SchedGetAttr(pid, 0)
			return err == nil && a.Nice == 5
		})
		if err := schedule(privcheck.RealtimeKept(true), th, rr10); !errors.Is(err, identity.ErrGone) {
			t.Errorf("a thread that ended: %v", err)
		}
		if done, err := reset(th); done || !errors.Is(err, identity.ErrGone) {
			t.Errorf("reset of a thread that ended: %v, %v", done, err)
		}
		isNow(t, int32(pid), unix.SCHED_NORMAL, 0, 5)
		return
	}
	t.Fatal("the number is never free")
}

// A request that is under way when the daemon ends gets nothing, and one about what is
// granted does no harm.
func TestKernelClosed(t *testing.T) {
	s := openService(t, t.TempDir())
	p, th := sleeper(t)
	defer th.Close()
	o := order(t, s, p, th, rr10)
	s.Close(false)
	if err := s.Grant(o); !errors.Is(err, ErrExited) {
		t.Errorf("granted by one that is closed: %v", err)
	}
	isNow(t, th.TID(), unix.SCHED_NORMAL, 0, 0)
	if g := s.Current(anybody); len(g) != 0 || s.RevokeAll() != 0 {
		t.Errorf("granted: %v", g)
	}
}

// What takes all limits back takes those back too that are being given, and who comes
// then is given none.
func TestKernelExitWhileLimitsAreGiven(t *testing.T) {
	state := t.TempDir()
	rules := "[[rule]]\nuid = 0\n[rule.limits]\nrtprio = 5\n"
	if err := os.WriteFile(filepath.Join(state, "none"), []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	s := openService(t, state)
	defer s.Close(false)
	p, th := sleeper(t)
	defer th.Close()
	give := func() chan error {
		c := make(chan error, 1)
		go func() {
			_, err := s.GrantLimits(privcheck.RealtimeKept(true), p, policy.Target{}, []string{"uid:0"})
			c <- err
		}()
		return c
	}
	if err := <-give(); errors.Is(err, ErrNoLimits) {
		t.Fatal("the rule says nothing")
	}
	const while = 50 * time.Millisecond
	s.giving.Lock()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		s.Exit()
	}()
	time.Sleep(while)
	if s.Exited() {
		t.Error("who is given limits at this moment is not waited for")
	}
	s.giving.Unlock()
	<-exited
	if left := s.Given(); len(left) > 0 {
		t.Errorf("limits are left: %v", left)
	}
	s.Resume()

	s.giving.Lock()
	late := give()
	time.Sleep(while)
	s.ended.Store(true) // as end does
	s.giving.Unlock()
	if err := <-late; !errors.Is(err, ErrExited) {
		t.Errorf("given after the end: %v", err)
	}
}

// A thread that ends at the last moment: nobody has got anything.
func TestKernelGrantGone(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	p, th := sleeper(t)
	defer th.Close()
	o := order(t, s, p, th, rr10)
	o.Verify = func() (privcheck.Decision, error) {
		_ = unix.PidfdSendSignal(p.PidFD(), unix.SIGKILL, nil, 0)
		cgtest.Eventually(t, 5*time.Second, "the process ends", func() bool { return !th.Alive() })
		return privcheck.RealtimeKept(true), nil
	}
	if err := s.Grant(o); !errors.Is(err, identity.ErrGone) {
		t.Errorf("granted to one that ended: %v", err)
	}
	if g := s.List(); len(g) != 0 {
		t.Errorf("granted: %v", g)
	}
}

// executing starts a process and returns handles on its second thread, and what has
// that execute another program.
func executing(t *testing.T) (p *identity.Process, th *identity.Thread, execute func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), executesEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var tid int32
	if _, err := fmt.Fscan(out, &tid); err != nil {
		t.Fatal(err)
	}
	pid := int32(cmd.Process.Pid)
	if tid == pid {
		t.Fatal("the second thread is the first")
	}
	p, th = handles(t, pid, tid)
	return p, th, func() {
		t.Helper()
		if _, err := fmt.Fprintln(in); err != nil {
			t.Fatal(err)
		}
		cgtest.Eventually(t, 5*time.Second, "it runs sleep", func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			return err == nil && string(b) == "sleep\n"
		})
		isNow(t, pid, unix.SCHED_RR, 10, 0) // else there is nothing to follow
	}
}

// A thread that executes another program goes on as the first thread of its process,
// as it was scheduled, and under another number.
func TestKernelGrantFollows(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	for _, end := range []string{"sweep", "revoke"} {
		p, th, execute := executing(t)
		pid := p.PID()
		if err := s.Grant(order(t, s, p, th, rr10)); err != nil {
			t.Fatal(err)
		}
		execute()
		if end == "sweep" {
			g := s.Current(anybody)
			if len(g) != 1 || g[0].Thread.TID != pid {
				t.Errorf("granted to %v, want the first thread of %d", g, pid)
			}
		}
		if n := s.RevokeAll(); n != 1 {
			t.Errorf("%d threads demoted, want 1", n)
		}
		isNow(t, pid, unix.SCHED_NORMAL, 0, 0)
	}
}

// Nobody looks any more at what a demoted thread takes. One that takes its number by
// execve(2) is looked at.
func TestKernelGrantFollowsPastDemoted(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	p, th, execute := executing(t)
	_, first := handles(t, p.PID(), 0)
	if err := s.Grant(order(t, s, p, first, rr10)); err != nil {
		t.Fatal(err)
	}
	before := s.List()[0]
	if err := ordinary(p.PID()); err != nil {
		t.Fatal(err)
	}
	s.SetDemoted(before.ID, true)
	if err := s.Grant(order(t, s, p, th, rr10)); err != nil {
		t.Fatal(err)
	}
	execute()
	g := s.Current(anybody)
	if len(g) != 1 || g[0].ID == before.ID || g[0].Demoted || g[0].Thread.TID != p.PID() {
		t.Errorf("granted: %+v, want one that is not demoted", g)
	}
}

// What a thread made of itself is not undone.
func TestKernelRevokeSpares(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	p, th := sleeper(t)
	if err := s.Grant(order(t, s, p, th, rr10)); err != nil {
		t.Fatal(err)
	}
	// Somebody privileged has made it realtime for good.
	attr := unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: 30}
	if err := unix.SchedSetAttr(int(p.PID()), &attr, 0); err != nil {
		t.Fatal(err)
	}
	if n := s.RevokeAll(); n != 0 {
		t.Errorf("%d threads demoted, want none", n)
	}
	isNow(t, p.PID(), unix.SCHED_FIFO, 30, 0)
}

// Who revokes one grant revokes no other.
func TestKernelRevokeOne(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	var pids []int32
	for range 2 {
		p, th := sleeper(t)
		if err := s.Grant(order(t, s, p, th, rr10)); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, p.PID())
	}
	first := s.List()[0]
	if !s.Revoke(first) {
		t.Error("nothing was demoted")
	}
	if s.Revoke(first) {
		t.Error("demoted twice")
	}
	isNow(t, pids[0], unix.SCHED_NORMAL, 0, 0)
	isNow(t, pids[1], unix.SCHED_RR, 10, 0)
	if n := s.RevokeAll(); n != 1 {
		t.Errorf("%d threads demoted, want 1", n)
	}
	isNow(t, pids[1], unix.SCHED_NORMAL, 0, 0)
}

// Who lists grants has none looked at but those that it may see.
func TestKernelCurrent(t *testing.T) {
	s := openService(t, t.TempDir())
	defer s.Close(false)
	var names []Process
	for range 3 {
		p, th := sleeper(t)
		o := order(t, s, p, th, rr10)
		if err := s.Grant(o); err != nil {
			t.Fatal(err)
		}
		names = append(names, o.Reservation.thread.Process)
	}
	for _, gone := range names[:2] {
		if err := ordinary(gone.PID); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Processes(); len(got) != 3 {
		t.Errorf("processes: %v, want %v", got, names)
	}
	got := s.Current(func(p Process) bool { return p == names[0] || p == names[2] })
	if len(got) != 1 || got[0].Thread.Process != names[2] {
		t.Errorf("listed: %+v, want the one of %d", got, names[2].PID)
	}
	left := s.List()
	if len(left) != 2 || left[0].Thread.Process != names[1] {
		t.Errorf("left: %+v, want those of %d and %d", left, names[1].PID, names[2].PID)
	}
	if got := s.Current(anybody); len(got) != 1 {
		t.Errorf("listed: %+v, want one", got)
	}
}

// The journal is read whatever is in it.
func TestKernelJournal(t *testing.T) {
	state := t.TempDir()
	s := openService(t, state)
	p, th := sleeper(t)
	q, _ := sleeper(t)
	if err := s.Grant(order(t, s, p, th, rr10)); err != nil {
		t.Fatal(err)
	}
	s.Close(true)
	isNow(t, p.PID(), unix.SCHED_RR, 10, 0)
	path := filepath.Join(state, "grants")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	boot, line, _ := strings.Cut(text, "\n")
	another := strings.ReplaceAll(line, fmt.Sprintf(":%d,", p.PID()), fmt.Sprintf(":%d,", q.PID()))
	for name, c := range map[string]struct {
		text string
		want int
	}{
		"as it was":            {text, 1},
		"a torn line":          {text + `{"Grant":{"ID":7,"Thr`, 1},
		"rubbish":              {boot + "\n\x00\xff\n[]\n" + line, 1},
		"another boot":         {"{\"Boot\":\"x\"}\n" + line, 0},
		"no boot":              {line, 0},
		"a torn boot":          {boot[1:] + "\n" + line, 0},
		"empty":                {"", 0},
		"ended":                {text + "{\"Ended\":1}\n", 0},
		"another's start":      {strings.ReplaceAll(text, "Started\":", "Started\":1"), 0},
		"twice":                {text + line, 1},
		"one who has it not":   {boot + "\n" + another, 0},
		"no such process":      {boot + "\n" + strings.ReplaceAll(line, fmt.Sprintf(":%d,", p.PID()), ":-1,"), 0},
		"a line without bound": {text + strings.Repeat("x", 2<<20), 1},
	} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		s := openService(t, state)
		if n := len(s.List()); n != c.want {
			t.Errorf("%s: %d grants are taken up, want %d", name, n, c.want)
		}
		isNow(t, q.PID(), unix.SCHED_NORMAL, 0, 0)
		s.Close(true)
	}
	// Not the daemon's own file.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(elsewhere, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	s = openService(t, state)
	if n := len(s.List()); n != 0 {
		t.Errorf("%d grants are taken up through a link", n)
	}
	s.Close(false)
	if b, err := os.ReadFile(elsewhere); err != nil || string(b) != text {
		t.Errorf("what the link names was changed: %q, %v", b, err)
	}
	if left, err := os.ReadDir(state); err != nil || len(left) != 0 {
		t.Errorf("left in the state directory: %v, %v", left, err)
	}
}

// A line that could not be written whole, for want of room, spoils no other.
func TestKernelJournalTorn(t *testing.T) {
	cgtest.Require(t, cgtest.Root) // whose file it must be
	path := filepath.Join(t.TempDir(), "grants")
	j, err := writeJournal(path, []Grant{{ID: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.f.WriteString(`{"Grant":{"ID":2,"Thr`); err != nil {
		t.Fatal(err)
	}
	whole := j.f
	if j.f, err = os.Open(path); err != nil { // nothing can be written there
		t.Fatal(err)
	}
	if err := j.begun(&Grant{ID: 2}); err == nil {
		t.Error("what was not written was said to be")
	}
	_ = j.f.Close()
	j.f = whole
	for id := range uint64(2) {
		if err := j.begun(&Grant{ID: 3 + id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.ended(1); err != nil {
		t.Fatal(err)
	}
	if err := j.close(true); err != nil {
		t.Fatal(err)
	}
	grants, err := readJournal(path)
	if err != nil || len(grants) != 2 || grants[0].ID != 3 || grants[1].ID != 4 {
		t.Errorf("%+v, %v", grants, err)
	}
}

// Grant after grant the journal stays short.
func TestKernelJournalShort(t *testing.T) {
	state := t.TempDir()
	s := openService(t, state)
	defer s.Close(false)
	p, th := sleeper(t)
	for i := range 3 * slack {
		o := order(t, s, p, th, identity.Scheduling{Policy: unix.SCHED_NORMAL, Nice: int32(-1 - i%10)})
		if err := s.Grant(o); err != nil {
			t.Fatal(err)
		}
		var err error
		if th, err = p.Thread(p.PID()); err != nil {
			t.Fatal(err)
		}
	}
	th.Close()
	b, err := os.ReadFile(filepath.Join(state, "grants"))
	if n := strings.Count(string(b), "\n"); err != nil || n > slack+10 {
		t.Errorf("the journal has %d lines (%v)", n, err)
	}
	if n := len(s.List()); n != 1 {
		t.Errorf("%d grants, want 1", n)
	}
}
