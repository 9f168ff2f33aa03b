package watchdog

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// spinEnv tells a process that it is a thread to watch: "busy idle seconds cpu", how
// long in microseconds it computes and sleeps by turns (0: it never does, and no
// RLIMIT_RTTIME bounds it), its life, and where.
const spinEnv = "CGM_TEST_SPIN"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == Arg {
		os.Exit(Main())
	}
	if how := os.Getenv(spinEnv); how != "" {
		spin(how)
	}
	if how := os.Getenv(observeEnv); how != "" {
		observe(how)
	}
	if how := os.Getenv(keepEnv); how != "" {
		keep(how)
	}
	harness.Main(m)
}

// spin computes and sleeps. Whatever it is granted, it is dead in time.
func spin(how string) {
	var busy, rest, seconds, cpu int
	if _, err := fmt.Sscan(how, &busy, &rest, &seconds, &cpu); err != nil {
		panic(err)
	}
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	must(dieIn(seconds))
	if rest > 0 {
		bound := uint64(200_000)
		if harness.Emulated() {
			bound = 10_000_000 // 50 ms may count as 200 there, and who is killed is no hog
		}
		must(unix.Setrlimit(unix.RLIMIT_RTTIME, &unix.Rlimit{Cur: bound, Max: bound}))
	}
	if cpu >= 0 {
		var set unix.CPUSet
		set.Set(cpu)
		must(unix.SchedSetaffinity(0, &set))
	}
	fmt.Println(unix.Gettid())
	var line [1]byte
	_, _ = os.Stdin.Read(line[:]) // go
	pause := unix.NsecToTimespec(int64(rest) * 1000)
	var now unix.Timespec
	for {
		// No call here lets Go's scheduler in: this thread would go on only once one
		// has run that is not realtime.
		_, _, _ = syscall.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&now)), 0)
		for end := now.Nano() + int64(busy)*1000; now.Nano() < end; {
			_, _, _ = syscall.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&now)), 0)
		}
		if rest > 0 {
			_, _, _ = syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
		}
	}
}

// nap sleeps without Go's scheduler: one of its timers has the runtime's monitor run for
// a while.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_, _, _ = syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// dieIn has the kernel kill this process: nothing needs to run for it. In an emulated
// machine that is later.
func dieIn(seconds int) error {
	life := slower(time.Duration(seconds) * time.Second)
	event := struct {
		value          uint64
		signal, notify int32
		_              [48]byte
	}{signal: int32(unix.SIGKILL)}
	var id int32
	if _, _, errno := syscall.RawSyscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC,
		uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&id))); errno != 0 {
		return errno
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(life))}
	if _, _, errno := syscall.RawSyscall6(unix.SYS_TIMER_SETTIME, uintptr(id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// spinner is such a process.
type spinner struct {
	Grant
	t     testing.TB
	cmd   *exec.Cmd
	start io.WriteCloser
}

const (
	hog   = "50000 500" // it never uses up RLIMIT_RTTIME
	still = "0 1000000"
	rough = "1000000 0"
)

// audio is one that plays. If an emulated machine's processor stands still while it
// runs, that counts as its own time: there it runs seldom.
var audio = map[bool]string{false: "2000 8000", true: "500 9500"}[harness.Emulated()]

// newSpinner starts one on a CPU (-1: any), that lives for a few seconds and does
// nothing until it is told to.
func newSpinner(t testing.TB, how string, seconds, cpu int) *spinner {
	t.Helper()
	return spinnerOf(t, 0, how, seconds, cpu)
}

// spinnerOf starts one of another user's.
func spinnerOf(t testing.TB, uid uint32, how string, seconds, cpu int) *spinner {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", fmt.Sprintf("%s=%s %d %d", spinEnv, how, seconds, cpu))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	cmd.Stderr = os.Stderr
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
	s := &spinner{t: t, cmd: cmd, start: in}
	t.Cleanup(s.end)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	tid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	s.Grant = Grant{ID: uint64(tid), PID: int32(cmd.Process.Pid), TID: int32(tid), Policy: unix.SCHED_RR, Priority: 20}
	s.Started = startOf(t, cmd.Process.Pid, tid)
	return s
}

func startOf(t testing.TB, pid, tid int) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
	if err != nil {
		t.Fatal(err)
	}
	st, errno := parseStat(b)
	if errno != 0 {
		t.Fatal(errno)
	}
	return st.started
}

// grant does what the daemon does, and has it begin.
func (s *spinner) grant() {
	s.t.Helper()
	attr := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: uint32(s.Policy), Priority: uint32(s.Priority), Nice: s.Nice,
		Flags: unix.SCHED_FLAG_RESET_ON_FORK,
	}
	if err := unix.SchedSetAttr(int(s.TID), &attr, 0); err != nil {
		s.t.Fatal(err)
	}
	s.begin()
}

func (s *spinner) begin() {
	s.t.Helper()
	if _, err := s.start.Write([]byte("\n")); err != nil {
		s.t.Fatal(err)
	}
}

// realtime says whether it is.
func (s *spinner) realtime() bool {
	s.t.Helper()
	attr, err := unix.SchedGetAttr(int(s.TID), 0)
	if err != nil {
		s.t.Fatalf("the thread is gone: %v", err)
	}
	return isRealtime(attr.Policy)
}

func (s *spinner) end() {
	if isZombie(int(s.PID)) {
		s.t.Logf("process %d had ended before", s.PID)
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// observeEnv tells a process that it is an observer: its life in seconds, and the
// threads that it looks at, by process, number and start.
const observeEnv = "CGM_TEST_OBSERVE"

// observed is a thread that an observer looks at.
type observed struct {
	thread
	realtime bool
	had      time.Duration // the CPU time, when it became realtime
	began    time.Time     // to run as such, or when it was last looked at after a stall
}

// stall is by how much a look is late where the machine stood still: nothing else that
// the tests start goes before who looks. For the watchdog, too, what was then says nothing.
const stall = period / 10

// observe says for how long each of the threads ran realtime, once it is no more.
func observe(how string) {
	in := strings.NewReader(how)
	var seconds int
	if _, err := fmt.Fscan(in, &seconds); err != nil {
		panic(err)
	}
	must(dieIn(seconds))
	var all []*observed
	for {
		var g Grant
		if _, err := fmt.Fscan(in, &g.PID, &g.TID, &g.Started); err != nil {
			break
		}
		t, err := openThread(g)
		must(err)
		all = append(all, &observed{thread: t})
	}
	fmt.Println("ready")
	// Seldom enough to leave those that are looked at their CPU.
	pause, last := slower(10*time.Millisecond), time.Now()
	for ; len(all) > 0; nap(pause) {
		stood := time.Since(last) > pause+stall
		all = slices.DeleteFunc(all, func(o *observed) bool { return o.look(stood) })
		last = time.Now()
	}
	os.Exit(0)
}

// look looks at it, and returns whether it need not any more. The machine may have stood
// still since the last look.
func (o *observed) look(stood bool) bool {
	used, uerr := o.used()
	attr, err := o.attr()
	now := time.Now()
	if err != nil || uerr != nil {
		return true
	}
	if stood && !o.began.IsZero() {
		o.began = now
	}
	switch is := isRealtime(attr.Policy); {
	case is && !o.realtime:
		o.realtime, o.had = true, used
	case is && o.began.IsZero() && used-o.had > time.Millisecond:
		o.began = now
	case !is && !o.began.IsZero():
		fmt.Println(o.grant.TID, int64(now.Sub(o.began)))
		return true
	}
	return false
}

// observer is such a process. All its threads go before those that are looked at: what
// it says does not depend on what else the machine has to do, as what the test itself
// would see does.
type observer struct {
	t    testing.TB
	said *bufio.Reader
}

// newObserver starts one. Those that are to be timed are not realtime yet.
func newObserver(t testing.TB, spinners ...*spinner) *observer {
	t.Helper()
	how := observeEnv + "=60"
	for _, s := range spinners {
		how += fmt.Sprintf(" %d %d %d", s.PID, s.TID, s.Started)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", how)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	func() {
		// A process is scheduled as the thread was that it comes from.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 50}, 0); err != nil {
			t.Fatal(err)
		}
		err = cmd.Start()
		must(unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr}, 0))
	}()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	o := &observer{t: t, said: bufio.NewReader(out)}
	if line, err := o.said.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the observer: %q, %v", line, err)
	}
	return o
}

// demoted waits until the next of the threads is realtime no more, and checks that it
// was for no longer than so long. It returns which it is.
func (o *observer) demoted(within time.Duration) (tid int32) {
	o.t.Helper()
	var took time.Duration
	if _, err := fmt.Fscan(o.said, &tid, &took); err != nil {
		o.t.Fatalf("the observer: %v", err) // it was not within its life
	}
	if took > within {
		o.t.Errorf("thread %d was demoted after %v, later than %v", tid, took, within)
	}
	o.t.Logf("thread %d was demoted after %v", tid, took)
	return tid
}

// keepEnv tells a process that it is a daemon of which there is nothing but a
// Supervisor: "period cheep grace seconds fund drop dir", the first three in
// milliseconds, then its life, whether it can fund, and whether it may not make
// anything realtime.
const keepEnv = "CGM_TEST_KEEP"

// keep does what it is told on its standard input, and tells what happens.
func keep(how string) {
	var period, cheep, grace, seconds int
	var fund, drop bool
	var dir string
	if _, err := fmt.Sscan(how, &period, &cheep, &grace, &seconds, &fund, &drop, &dir); err != nil {
		panic(err)
	}
	must(dieIn(seconds))
	if drop {
		// The process comes from this thread.
		runtime.LockOSThread()
		must(unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_NICE, 0, 0, 0))
	}
	c := Config{
		Period: time.Duration(period) * time.Millisecond, Cheep: time.Duration(cheep) * time.Millisecond,
		Grace: time.Duration(grace) * time.Millisecond, Dir: dir, Log: logrus.New(),
		Events: func(e Event) { fmt.Println("event", int(e.Kind), e.ID, int64(e.Used), int64(e.Window)) },
	}
	if fund {
		c.Fund = func(pid int) error {
			return os.WriteFile(filepath.Join(dir, "cpu", "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		}
	}
	s := New(c)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var verb string
		var g Grant
		_, _ = fmt.Sscan(in.Text(), &verb, &g.ID, &g.PID, &g.TID, &g.Started, &g.Policy, &g.Priority, &g.Nice, &g.Share)
		var err error
		switch verb {
		case "ready":
			err = s.Ready()
		case "watch":
			err = s.Watch(g)
		case "unwatch":
			s.Unwatch(g.ID)
		case "leave":
			s.Close(true)
		}
		s.mu.Lock()
		pid := 0
		if s.proc != nil {
			pid = s.proc.pid
		}
		s.mu.Unlock()
		fmt.Println("done", pid, err)
		if verb == "leave" {
			os.Exit(0)
		}
	}
	os.Exit(0)
}

// keeper is such a process.
type keeper struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	dog  int // the watchdog's pid, when it last said
	done chan string
	happ chan Event
}

// newKeeper starts one.
func newKeeper(t testing.TB, period, cheep, grace time.Duration, seconds int, fund, drop bool, dir string) *keeper {
	t.Helper()
	k := &keeper{t: t, done: make(chan string, 10), happ: make(chan Event, 1000)}
	k.cmd = exec.Command("/proc/self/exe")
	k.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %d %d %t %t %s", keepEnv,
		period.Milliseconds(), cheep.Milliseconds(), grace.Milliseconds(), seconds, fund, drop, dir))
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	k.cmd.Stderr = os.Stderr
	// Descriptors that whoever started the daemon has left it with.
	var err error
	for range 4 {
		f, err := os.Open("/proc/version")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		k.cmd.ExtraFiles = append(k.cmd.ExtraFiles, f)
	}
	if k.in, err = k.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if rest, ok := strings.CutPrefix(lines.Text(), "done "); ok {
				k.done <- rest
				continue
			}
			var e Event
			if _, err := fmt.Sscanf(lines.Text(), "event %d %d %d %d", &e.Kind, &e.ID, &e.Used, &e.Window); err == nil {
				k.happ <- e
			}
		}
	}()
	t.Cleanup(func() {
		_ = k.cmd.Process.Kill()
		_ = k.cmd.Wait()
		if k.dog != 0 {
			// It would end after the grace time.
			killWatchdog(k.dog)
		}
	})
	return k
}

// killWatchdog kills the process if it is one.
func killWatchdog(pid int) {
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && string(b) == "cgm-watchdog\n" {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// tell has it do something, and returns its error.
func (k *keeper) tell(verb string, g Grant) string {
	k.t.Helper()
	fmt.Fprintln(k.in, verb, g.ID, g.PID, g.TID, g.Started, g.Policy, g.Priority, g.Nice, g.Share)
	select {
	case s := <-k.done:
		pid, err, _ := strings.Cut(s, " ")
		if n, _ := strconv.Atoi(pid); n != 0 {
			k.dog = n
		}
		if err == "<nil>" {
			return ""
		}
		return err
	case <-time.After(cgtest.Patience(30 * time.Second)):
		k.t.Fatal("no answer")
		return ""
	}
}

// next waits for an event, and fails the test without one.
func next(t testing.TB, events <-chan Event, within time.Duration) Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(cgtest.Patience(within)):
		t.Fatalf("nothing happened for %v", within)
		return Event{}
	}
}

// watch watches spinners, grants, and has them begin.
func (k *keeper) watch(spinners ...*spinner) {
	k.t.Helper()
	for _, s := range spinners {
		if err := k.tell("watch", s.Grant); err != "" {
			k.t.Fatal(err)
		}
	}
	for _, s := range spinners {
		s.grant()
	}
}

// next waits for an event, and fails without one.
func (k *keeper) next(within time.Duration) Event {
	k.t.Helper()
	return next(k.t, k.happ, within)
}

// until waits for something, and fails when it does not come to be.
func until(t testing.TB, what string, within time.Duration, f func() bool) time.Duration {
	t.Helper()
	began, patience := time.Now(), cgtest.Patience(within)
	for !f() {
		if time.Since(began) > patience {
			t.Fatalf("not %s within %v", what, within)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

// kennel is a Supervisor, and what it tells.
type kennel struct {
	*Supervisor
	t      testing.TB
	log    *harness.Said
	events chan Event
}

// newKennel makes one with a period of a second, unless told otherwise.
func newKennel(t testing.TB, c Config) *kennel {
	t.Helper()
	k := &kennel{t: t, log: &harness.Said{}, events: make(chan Event, 1000)}
	if c.Period == 0 {
		c.Cheep, c.Period = 500*time.Millisecond, period
	}
	if c.Dir == "" {
		c.Dir = t.TempDir()
	}
	c.Events = func(e Event) { k.events <- e }
	c.Log = logrus.New()
	c.Log.SetOutput(k.log)
	k.Supervisor = New(c)
	t.Cleanup(func() {
		k.Close(false)
		if t.Failed() {
			t.Log(k.log)
		}
	})
	return k
}

// watch watches spinners, grants, and has them begin.
func (k *kennel) watch(spinners ...*spinner) {
	k.t.Helper()
	for _, s := range spinners {
		if err := k.Watch(s.Grant); err != nil {
			k.t.Fatal(err)
		}
	}
	for _, s := range spinners {
		s.grant()
	}
}

// next waits for an event, and fails without one.
func (k *kennel) next(within time.Duration) Event {
	k.t.Helper()
	return next(k.t, k.events, within)
}

// quiet fails if there are events.
func (k *kennel) quiet() {
	k.t.Helper()
	select {
	case e := <-k.events:
		k.t.Errorf("unexpected: %+v", e)
	default:
	}
}

// pid returns the process's.
func (k *kennel) pid() int {
	k.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.proc == nil {
		k.t.Fatal("there is no watchdog")
	}
	return k.proc.pid
}

// slower is how much longer things take in an emulated machine.
func slower(d time.Duration) time.Duration {
	if harness.Emulated() {
		return 5 * d
	}
	return d
}
