package e2e_test

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// How a process of the tests is prepared for realtime: with a hard RLIMIT_RTTIME, as
// every client of rtkit's.
var limitRealtime = harness.Inside("RLIMIT_RTTIME", func(us uint64) (struct{}, error) {
	return struct{}{}, unix.Setrlimit(unix.RLIMIT_RTTIME, &unix.Rlimit{Cur: us, Max: us})
})

// moreThreads starts threads that wait for ever, and returns their numbers.
var moreThreads = harness.Inside("threads", func(n int) ([]int, error) {
	tids := make(chan int)
	for range n {
		go func() {
			runtime.LockOSThread()
			tids <- unix.Gettid()
			select {}
		}()
	}
	all := make([]int, n)
	for i := range all {
		all[i] = <-tids
	}
	return all, nil
})

// scheduling says how a thread is scheduled: "rr 10 reset", "other -5".
var scheduling = harness.Inside("sched_getattr", func(tid int) (string, error) { return scheduled(tid) })

func scheduled(tid int) (string, error) {
	a, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		return "", err
	}
	s := map[uint32]string{unix.SCHED_RR: "rr", unix.SCHED_FIFO: "fifo", unix.SCHED_NORMAL: "other"}[a.Policy]
	if s == "other" {
		s = fmt.Sprintf("%s %d", s, a.Nice)
	} else {
		s = fmt.Sprintf("%s %d", s, a.Priority)
	}
	if a.Flags&unix.SCHED_FLAG_RESET_ON_FORK != 0 {
		s += " reset"
	}
	return s, nil
}

// The answers of rtkit's (reference, table 1.2).
var (
	rtDenied   = harness.DBusError{Name: "org.freedesktop.DBus.Error.AccessDenied", Text: "Operation not permitted"}
	rtBusy     = harness.DBusError{Name: "org.freedesktop.DBus.Error.AccessDenied", Text: "Device or resource busy"}
	rtNotFound = harness.DBusError{Name: "org.freedesktop.DBus.Error.Failed", Text: "No such file or directory"}
	rtInvalid  = harness.DBusError{Name: "org.freedesktop.DBus.Error.Failed", Text: "Invalid argument"}
	rtFailed   = harness.DBusError{Name: "org.freedesktop.DBus.Error.Failed", Text: "Input/output error"}
	rtGranted  = harness.DBusError{}
)

// realtimeWorld is a daemon that grants, by a rule, to the users 1000 to 1999 and to
// what they have in containers.
type realtimeWorld struct {
	*testing.T
	dir, sock string
	d         *service
	p         *harness.Proc
	args      []string
	rttime    uint64 // RLIMIT_RTTIME of its users
}

// rules is its policy file. Who is not named is asked of polkit, which is not there.
const rules = `
[[rule]]
uid = ["1000-1999", "100000-165535"]
container = "any"
`

func newRealtimeWorld(t *testing.T, args ...string) *realtimeWorld {
	t.Helper()
	harness.Require(t, "root")
	w := &realtimeWorld{T: t, dir: harness.PublicDir(t), p: harness.Start(t, harness.Spec{}), rttime: 200000}
	w.sock = w.dir + "/sock"
	w.policy(rules)
	for _, arg := range args {
		if us, ok := strings.CutPrefix(arg, "--rttime-usec-max="); ok {
			if _, err := fmt.Sscan(us, &w.rttime); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.args = append([]string{"--realtime-policy=" + w.dir + "/realtime.toml"}, args...)
	w.d = w.start()
	return w
}

func (w *realtimeWorld) policy(text string) {
	w.Helper()
	if err := os.WriteFile(w.dir+"/realtime.toml", []byte(text), 0o600); err != nil {
		w.Fatal(err)
	}
}

// start starts a daemon, which the test's end kills: its watchdog takes back then
// what is left, or the threads end with the test.
func (w *realtimeWorld) start(args ...string) *service {
	w.Helper()
	return startService(w.T, w.p, w.dir, w.sock, w.dir+"/state", append(w.args, args...)...).serve()
}

// user starts a process of a user's that may be realtime.
func (w *realtimeWorld) user(uid uint32) *harness.Proc {
	w.Helper()
	p := harness.Start(w.T, harness.Spec{UID: uid, GID: uid})
	w.limit(p, w.rttime)
	return p
}

func (w *realtimeWorld) limit(p *harness.Proc, us uint64) {
	w.Helper()
	if err := p.Run(limitRealtime, us, nil); err != nil {
		w.Fatal(err)
	}
}

func (w *realtimeWorld) threads(p *harness.Proc, n int) []uint64 {
	w.Helper()
	var tids []uint64
	if err := p.Run(moreThreads, n, &tids); err != nil {
		w.Fatal(err)
	}
	return tids
}

// is checks how a thread of p's, or of a process that it sees, is scheduled.
func (w *realtimeWorld) is(p *harness.Proc, tid uint64, want string) {
	w.Helper()
	var got string
	if err := p.Run(scheduling, tid, &got); err != nil || got != want {
		w.Errorf("thread %d is %q (%v), want %q", tid, got, err, want)
	}
}

// becomes waits until it is.
func (w *realtimeWorld) becomes(p *harness.Proc, tid uint64, want string) {
	w.Helper()
	eventually(w.T, fmt.Sprintf("thread %d is %s", tid, want), func() bool {
		var got string
		return p.Run(scheduling, tid, &got) == nil && got == want
	})
}

// answers checks an answer: rtGranted, or an error, name and text.
func (w *realtimeWorld) answers(what string, want harness.DBusError, values []any, err error) {
	w.Helper()
	var got *harness.DBusError
	switch {
	case err == nil && want == rtGranted:
		if len(values) > 0 {
			w.Errorf("%s: answered %v, want nothing", what, values)
		}
	case errors.As(err, &got) && got.Name == want.Name && got.Text == want.Text:
	default:
		w.Errorf("%s: %v, want %v", what, err, want.Name+": "+want.Text)
	}
}

// The table of what rtkit checks, in its order, with its errors. Where this daemon
// is meant to answer otherwise, the row says so.
func TestKernelRealtimeErrors(t *testing.T) {
	w := newRealtimeWorld(t, "--actions-per-burst-max=1000")
	p, other := w.user(1000), w.user(1001)
	c := p.MustDial(w.sock)
	own := uint64(p.PID)
	make := func(member string, args ...any) func(string, harness.DBusError) {
		return func(what string, want harness.DBusError) {
			t.Helper()
			values, err := c.RT(member, args...)
			w.answers(what, want, values, err)
		}
	}
	realtime := func(thread uint64, priority uint32) func(string, harness.DBusError) {
		return make("MakeThreadRealtime", thread, priority)
	}

	// Row 2: the texts are libdbus's.
	invalid := func(text string) harness.DBusError {
		return harness.DBusError{Name: "org.freedesktop.DBus.Error.InvalidArgs", Text: text}
	}
	make("MakeThreadRealtime", uint32(0), uint32(5))("2: uint32", invalid(`Argument 0 is specified to be of type "uint64", but is actually of type "uint32"`+"\n"))
	make("MakeThreadRealtime", uint64(0))("2: too few", invalid("Message has only 1 arguments, but more were expected"))
	make("MakeThreadRealtime", own, uint32(5), "more")("2: too many are ignored", rtGranted)

	// Row 5.
	gone := harness.Start(t, harness.Spec{UID: 1000, GID: 1000})
	gone.Stop()
	for _, pid := range []uint64{uint64(gone.PID), 0, 1 << 31, 1<<32 | own, 4194305, math.MaxInt64} {
		make("MakeThreadRealtimeWithPID", pid, uint64(0), uint32(5))(fmt.Sprint("5: process ", pid), rtNotFound)
	}
	// Row 7. rtkit takes what is beyond 2^32 for a thread of its own.
	for _, tid := range []uint64{uint64(other.PID), 1<<32 | own, 1 << 31, math.MaxUint64, 1} {
		realtime(tid, 5)(fmt.Sprint("7: thread ", tid), rtNotFound)
	}
	make("MakeThreadRealtimeWithPID", own, uint64(other.PID), uint32(5))("7: another's thread", rtNotFound)

	// Rows 10 and 11.
	for _, v := range []uint32{0, 100, math.MaxInt32, 1 << 31, math.MaxUint32} {
		realtime(0, v)(fmt.Sprint("10: priority ", v), rtInvalid)
	}
	for _, v := range []uint32{21, 99} {
		realtime(0, v)(fmt.Sprint("11: priority ", v), rtDenied)
	}
	for _, v := range []int32{-21, 20, math.MinInt32, math.MaxInt32} {
		make("MakeThreadHighPriority", uint64(0), v)(fmt.Sprint("10': nice ", v), rtInvalid)
	}
	make("MakeThreadHighPriority", uint64(0), int32(-16))("11': nice -16", rtDenied)

	// What comes first is what is told: 5 and 7 before 10, 10 before 14 and 16.
	make("MakeThreadRealtimeWithPID", uint64(other.PID), own, uint32(0))("7 before 10", rtNotFound)
	make("MakeThreadRealtimeWithPID", uint64(other.PID), uint64(0), uint32(0))("10 before 14", rtInvalid)

	// Row 14.
	make("MakeThreadRealtimeWithPID", uint64(other.PID), uint64(0), uint32(5))("14: another user's process", rtDenied)
	make("MakeThreadRealtimeWithPID", uint64(1), uint64(0), uint32(5))("14: the first process", rtDenied)
	w.is(other, uint64(other.PID), "other 0")

	// Row 16.
	q := harness.Start(t, harness.Spec{UID: 1000, GID: 1000})
	cq := q.MustDial(w.sock)
	values, err := cq.RT("MakeThreadRealtime", uint64(0), uint32(5))
	w.answers("16: RLIMIT_RTTIME unlimited", rtDenied, values, err)
	w.limit(q, 200001)
	values, err = cq.RT("MakeThreadRealtime", uint64(0), uint32(5))
	w.answers("16: RLIMIT_RTTIME 200001", rtDenied, values, err)
	w.is(q, uint64(q.PID), "other 0")
	values, err = cq.RT("MakeThreadHighPriority", uint64(0), int32(-5))
	w.answers("16: not asked for a nice level", rtGranted, values, err)
	w.is(q, uint64(q.PID), "other -5 reset")
	w.limit(q, 200000)
	values, err = cq.RT("MakeThreadRealtime", uint64(0), uint32(5))
	w.answers("16: RLIMIT_RTTIME 200000", rtGranted, values, err)
	w.is(q, uint64(q.PID), "rr 5 reset")

	// What is granted.
	tid := w.threads(p, 1)[0]
	realtime(tid, 20)("priority 20", rtGranted)
	w.is(p, tid, "rr 20 reset")
	realtime(tid, 1)("again, less", rtGranted)
	w.is(p, tid, "rr 1 reset")
	make("MakeThreadHighPriority", tid, int32(-15))("nice -15", rtGranted)
	w.is(p, tid, "other -15 reset")
	make("MakeThreadHighPriority", tid, int32(19))("nice 19", rtGranted)
	w.is(p, tid, "other 19 reset")
	for _, process := range []uint64{own, math.MaxUint32, math.MaxUint64} {
		make("MakeThreadRealtimeWithPID", process, uint64(0), uint32(7))(fmt.Sprint("0 is the first thread of ", process), rtGranted)
		w.is(p, own, "rr 7 reset")
		make("MakeThreadHighPriorityWithPID", process, uint64(0), int32(0))("back", rtGranted)
		w.is(p, own, "other 0 reset")
	}

	// Host root may help, which rtkit lets nobody (row 14).
	root := w.p.MustDial(w.sock)
	values, err = root.RT("MakeThreadRealtimeWithPID", uint64(other.PID), uint64(0), uint32(5))
	w.answers("14: root, for a user's process", rtGranted, values, err)
	w.is(other, uint64(other.PID), "rr 5 reset")

	// What is root's alone.
	for _, member := range []string{"ResetKnown", "ResetAll", "Exit"} {
		make(member)(member+" by a user", rtDenied)
	}
	realtime(tid, 9)("once more", rtGranted)
	values, err = root.RT("ResetKnown")
	w.answers("ResetKnown by root", rtGranted, values, err)
	w.is(p, tid, "other 0")
	w.is(other, uint64(other.PID), "other 0")

	// Its log lines, which administrators look for.
	for _, line := range []string{
		fmt.Sprintf("Successfully made thread %d of process %d owned by '1000' RT at priority 20.", tid, own),
		fmt.Sprintf("Successfully made thread %d of process %d owned by '1000' high priority at nice level -15.", tid, own),
		fmt.Sprintf("Successfully made thread %d of process %d owned by '0' RT at priority 5.", other.PID, other.PID),
		fmt.Sprintf("Successfully demoted thread %d of process %d.", tid, own),
		"Demoted 3 threads.", // and that of row 16
	} {
		if !strings.Contains(w.log(), line) {
			t.Errorf("the log has no line %q", line)
		}
	}
}

// Row 9: neither a rule nor polkit allows it. rtkit fails with ENOENT where there is
// no polkit; here the file decides alone.
func TestKernelRealtimePolicy(t *testing.T) {
	w := newRealtimeWorld(t)
	nobody := w.user(2000)
	c := nobody.MustDial(w.sock)
	try := func(what string, priority uint32, want harness.DBusError) {
		t.Helper()
		values, err := c.RT("MakeThreadRealtime", uint64(0), priority)
		w.answers(what, want, values, err)
	}
	try("9: no rule", 5, rtDenied)
	try("9 before 10", 0, rtDenied)

	w.reread("[[rule]]\nuid = 2000\nmax_priority = 60\npolicies = [\"fifo\"]\n")
	try("a rule", 60, rtGranted)
	w.is(nobody, uint64(nobody.PID), "fifo 60 reset")
	try("beyond the rule", 61, rtDenied)
	props, err := c.Call("org.freedesktop.DBus.Properties", "Get", harness.RT, "MaxRealtimePriority")
	if err == nil {
		t.Errorf("properties of the other object: %v", props)
	}
	// A file with a mistake changes nothing, and is complained about.
	w.reread("[[rule]]\nuid = 2000\nallow = maybe\n")
	try("the rule as before", 60, rtGranted)
	if log := w.log(); !strings.Contains(log, "realtime.toml:3:") {
		t.Errorf("the mistake is not told with its line:\n%s", log)
	}
	w.reread("[[rule]]\nuid = 2000\nallow = false\n")
	try("9: a rule refuses", 5, rtDenied)
}

// reread has the daemon read another policy.
func (w *realtimeWorld) reread(policy string) {
	w.Helper()
	w.policy(policy)
	before := len(w.log())
	if err := unix.Kill(w.d.pid, unix.SIGHUP); err != nil {
		w.Fatal(err)
	}
	eventually(w.T, "the policy is read again", func() bool { return strings.Contains(w.log()[before:], "realtime policy") })
}

func (w *realtimeWorld) log() string {
	w.Helper()
	b, err := os.ReadFile(w.dir + "/log")
	if err != nil {
		w.Fatal(err)
	}
	return string(b)
}

// Rows 4, 6, 8 and 12: limits. Those of one user, or container, are not another's.
func TestKernelRealtimeLimits(t *testing.T) {
	// The burst lasts as long as it takes a slow machine.
	w := newRealtimeWorld(t, "--users-max=3", "--actions-burst-sec=600")
	p := w.user(1000)
	c := p.MustDial(w.sock)
	tids := w.threads(p, 26)
	for i, tid := range tids {
		want := rtGranted
		if i >= 25 {
			want = rtBusy
		}
		values, err := c.RT("MakeThreadRealtime", tid, uint32(1))
		w.answers(fmt.Sprintf("8: thread %d", i+1), want, values, err)
	}
	// The 26th is refused for its number (8), one that has a grant for the burst (12),
	// and a bad priority before that (10).
	values, err := c.RT("MakeThreadRealtime", tids[0], uint32(2))
	w.answers("12: the 26th of the burst", rtBusy, values, err)
	values, err = c.RT("MakeThreadRealtime", tids[0], uint32(0))
	w.answers("10 before 12", rtInvalid, values, err)

	// Row 6.
	for i := range 16 {
		q := w.user(1001)
		cq := q.MustDial(w.sock)
		want := rtGranted
		if i >= 15 {
			want = rtBusy
		}
		values, err := cq.RT("MakeThreadRealtime", uint64(0), uint32(1))
		w.answers(fmt.Sprintf("6: process %d", i+1), want, values, err)
		if i == 15 {
			values, err = cq.RT("MakeThreadRealtime", uint64(1<<40), uint32(1))
			w.answers("6 before 7", rtBusy, values, err)
		}
		cq.Close()
	}

	// Row 4, at which rtkit crashes. The test's own processes are root's, who is
	// charged for nothing yet.
	for i, uid := range []uint32{1002, 1003} {
		q := w.user(uid)
		cq := q.MustDial(w.sock)
		values, err := cq.RT("MakeThreadRealtime", uint64(0), uint32(1))
		w.answers(fmt.Sprint("4: user ", uid), []harness.DBusError{rtGranted, rtBusy}[i], values, err)
		values, err = cq.RT("MakeThreadRealtimeWithPID", uint64(0), uint64(0), uint32(1))
		w.answers("4 before 5", []harness.DBusError{rtNotFound, rtBusy}[i], values, err)
		cq.Close()
	}
	// A place is free again once its thread has ended.
	p.Stop()
	q := w.user(1003)
	values, err = q.MustDial(w.sock).RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("4: a user's threads have ended", rtGranted, values, err)
}

// Row 13: what nobody can watch is not granted, unless the administrator wants it so.
func TestKernelRealtimeUnwatched(t *testing.T) {
	w := newRealtimeWorld(t)
	p := w.user(1000)
	// The watchdog's lock cannot be opened.
	if err := os.Mkdir(w.dir+"/state/watchdog", 0o700); err != nil {
		t.Fatal(err)
	}
	c := p.MustDial(w.sock)
	values, err := c.RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("13: there is no watchdog", rtDenied, values, err)
	w.is(p, uint64(p.PID), "other 0")
	if !strings.Contains(w.log(), "no watchdog") {
		t.Errorf("nothing is said about it:\n%s", w.log())
	}
	w.d.terminate()
	w.d = w.start("--no-canary")
	values, err = p.MustDial(w.sock).RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("--no-canary", rtGranted, values, err)
	w.is(p, uint64(p.PID), "rr 1 reset")
	w.d.terminate()
	w.is(p, uint64(p.PID), "other 0")
}

// Row 3: who asks cannot be told.
func TestKernelRealtimeWhoAsks(t *testing.T) {
	w := newRealtimeWorld(t)
	p, q := w.user(1000), w.user(1000)
	c := p.MustDial(w.sock).Give(q)
	p.Stop()
	values, err := c.RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("3: who connected has ended", rtFailed, values, err)
	w.is(q, uint64(q.PID), "other 0")
}

// What a daemon has granted ends with it, unless it is killed or replaced: then the
// next one takes it up, and takes it back in its turn.
func TestKernelRealtimeLifeCycle(t *testing.T) {
	w := newRealtimeWorld(t)
	p := w.user(1000)
	tids := w.threads(p, 3)
	grant := func() {
		t.Helper()
		c := p.MustDial(w.sock)
		defer c.Close()
		for _, tid := range tids[:2] {
			values, err := c.RT("MakeThreadRealtime", tid, uint32(3))
			w.answers("grant", rtGranted, values, err)
		}
		values, err := c.RT("MakeThreadHighPriority", tids[2], int32(-3))
		w.answers("grant", rtGranted, values, err)
	}
	check := func(realtime, high string) {
		t.Helper()
		w.is(p, tids[0], realtime)
		w.is(p, tids[1], realtime)
		w.is(p, tids[2], high)
	}
	listed := func() int {
		t.Helper()
		c := p.MustDial(w.sock)
		defer c.Close()
		values, err := c.V1("ListGrants")
		if err != nil {
			t.Fatal(err)
		}
		grants, _ := values[0].([][]any)
		return len(grants)
	}
	grants := filepath.Join(w.dir, "state", "grants")

	grant()
	check("rr 3 reset", "other -3 reset")
	w.d.terminate()
	check("other 0", "other 0")
	if _, err := os.Lstat(grants); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after an end in order the grants are still noted: %v", err)
	}

	// Killed: what is left is found, and one that changed meanwhile is not.
	w.d = w.start()
	grant()
	if err := unix.Kill(w.d.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w.d.wait(time.Second)
	check("rr 3 reset", "other -3 reset")
	attr := unix.SchedAttr{Policy: unix.SCHED_NORMAL}
	if err := unix.SchedSetAttr(int(tids[1]), &attr, 0); err != nil {
		t.Fatal(err)
	}
	w.d = w.start()
	if n := listed(); n != 2 {
		t.Errorf("%d grants are taken up, want 2", n)
	}
	w.is(p, tids[0], "rr 3 reset")
	w.is(p, tids[1], "other 0")

	// Replaced: it goes on, and is the new one's.
	next := w.start("--replace")
	if code := w.d.wait(5 * time.Second); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d", code)
	}
	w.d = next
	w.is(p, tids[0], "rr 3 reset")
	if n := listed(); n != 2 {
		t.Errorf("%d grants are taken over, want 2", n)
	}
	w.d.terminate()
	check("other 0", "other 0")

	// Killed, and nobody comes: the file is of no use to the next boot.
	w.d = w.start()
	grant()
	if err := unix.Kill(w.d.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w.d.wait(time.Second)
	b, err := os.ReadFile(grants)
	if err != nil {
		t.Fatal(err)
	}
	_, lines, _ := strings.Cut(string(b), "\n")
	if err := os.WriteFile(grants, []byte("{\"Boot\":\"another\"}\n"+lines), 0o600); err != nil {
		t.Fatal(err)
	}
	w.d = w.start()
	if n := listed(); n != 0 {
		t.Errorf("%d grants of another boot are taken up", n)
	}
	w.d.terminate()
}

// Exit ends realtime, and nothing else.
func TestKernelRealtimeExit(t *testing.T) {
	w := newRealtimeWorld(t)
	p := w.user(1000)
	c, root := p.MustDial(w.sock), w.p.MustDial(w.sock)
	values, err := c.RT("MakeThreadRealtime", uint64(0), uint32(3))
	w.answers("grant", rtGranted, values, err)
	values, err = root.RT("Exit")
	w.answers("Exit", rtGranted, values, err)
	w.is(p, uint64(p.PID), "other 0")
	values, err = c.RT("MakeThreadRealtime", uint64(0), uint32(3))
	w.answers("after Exit", rtDenied, values, err)
	values, err = c.RT("MakeThreadRealtime", "even with wrong arguments")
	w.answers("1 before 2, after Exit", rtDenied, values, err)
	if _, err := root.V1("ListControllers"); err != nil {
		t.Errorf("cgroups after Exit: %v", err)
	}
}

// canary is the flags of a watchdog that soon finds who takes too much. It takes a daemon
// that does not run for so long for starved, which happens in an emulated machine; there
// RLIMIT_RTTIME, which is the quicker one, must not end who takes too much before.
func canary() []string {
	period, rttime := time.Second, 200*time.Millisecond
	if harness.Emulated() {
		period, rttime = 3*period, 10*time.Second
	}
	return []string{
		"--canary-cheep-msec=300", fmt.Sprint("--canary-watchdog-msec=", period.Milliseconds()),
		fmt.Sprint("--rttime-usec-max=", rttime.Microseconds()),
	}
}

// hog starts a thread that waits until the file named exists, and then takes a CPU
// for itself, for at most as long as it is realtime and four seconds, or longer on a
// slow machine. The short sleeps are what RLIMIT_RTTIME begins to count anew with.
var hog = harness.Inside("hog", func(begin string) (int, error) {
	tid := make(chan int)
	go func() {
		runtime.LockOSThread()
		tid <- unix.Gettid()
		for {
			time.Sleep(5 * time.Millisecond)
			if _, err := os.Lstat(begin); err == nil {
				break
			}
		}
		for end := time.Now().Add(cgtest.Patience(4 * time.Second)); time.Now().Before(end); {
			for pause := time.Now().Add(50 * time.Millisecond); time.Now().Before(pause); {
			}
			attr, err := unix.SchedGetAttr(0, 0)
			if err != nil || attr.Policy == unix.SCHED_NORMAL {
				break
			}
			rest := unix.Timespec{Nsec: 500_000}
			_ = unix.Nanosleep(&rest, nil)
		}
		select {}
	}()
	return <-tid, nil
})

// Row 1: whose thread took a CPU for itself is refused for a while, before its
// arguments are looked at. Others are not.
func TestKernelRealtimeHog(t *testing.T) {
	w := newRealtimeWorld(t, append(canary(), "--canary-refuse-sec=600")...)
	p, q := w.user(1000), w.user(1001)
	good := w.threads(p, 1)[0]
	// hogs has another thread of p's take a CPU, until the daemon knows. It returns when
	// that had not begun yet.
	hogs := func(c *harness.Conn) (before time.Time) {
		t.Helper()
		begin := filepath.Join(harness.PublicDir(t), "begin")
		var bad uint64
		if err := p.Run(hog, begin, &bad); err != nil {
			t.Fatal(err)
		}
		for _, tid := range []uint64{bad, good} {
			values, err := c.RT("MakeThreadRealtime", tid, uint32(1))
			w.answers("grant", rtGranted, values, err)
		}
		known := len(w.log())
		before = time.Now()
		if err := os.WriteFile(begin, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		w.becomes(p, bad, "other 0")
		w.is(p, good, "rr 1 reset")
		eventually(t, "the daemon knows", func() bool { return strings.Contains(w.log()[known:], "it took more of a CPU than it may") })
		return before
	}
	c, cq := p.MustDial(w.sock), q.MustDial(w.sock)
	hogs(c)
	values, err := c.RT("MakeThreadRealtime", good, uint32(1))
	w.answers("1: refused for now", rtDenied, values, err)
	values, err = c.RT("MakeThreadRealtime", "no thread")
	w.answers("1 before 2", rtDenied, values, err)
	values, err = cq.RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("1: another user", rtGranted, values, err)
	var de *harness.DBusError
	if _, err := c.V1("Grant", uint32(good), "rr", int32(1)); !errors.As(err, &de) || !strings.Contains(de.Text, "recovering from a lockup") {
		t.Errorf("Grant, refused for now: %v", err)
	}

	w.d.terminate()
	w.d = w.start("--canary-refuse-sec=3")
	c = p.MustDial(w.sock)
	before := hogs(c)
	eventually(t, "it is not refused any more", func() bool {
		_, err := c.RT("MakeThreadRealtime", good, uint32(2))
		return err == nil
	})
	if d := time.Since(before); d < 3*time.Second {
		t.Errorf("it was refused for less than %v, want 3 s", d)
	}
}

// Whose thread took more than its budget in a container: that is refused for a while as
// a whole, with the containers in it, and nobody beside it or around it.
func TestKernelRealtimeHogInContainer(t *testing.T) {
	rw, w := newRealtimeContainers(t, append(canary(), "--canary-refuse-sec=600")...)
	// Where the kernel budgets realtime it lets nobody in there take much more.
	rw.reread(anybody + "budget = 2\n")
	one, two := w.realtimeBox("c1", 200000), w.realtimeBox("c2", 300000)
	inner := one.placedIn(harness.Spec{UserNS: true, PIDNS: true, MapFrom: 10000, MapSize: 20000}, "in")
	w.fund(inner.cg, 20000)
	p := one.user(1000)
	rw.limit(p, rw.rttime)
	var bad uint64
	if err := p.Run(startThread, struct{}{}, &bad); err != nil {
		t.Fatal(err)
	}
	good := rw.threads(p, 1)[0]
	c := p.MustDial(rw.sock)
	defer c.Close()
	for _, tid := range []uint64{bad, good} {
		values, err := c.RT("MakeThreadRealtime", tid, uint32(1))
		rw.answers("grant", rtGranted, values, err)
	}
	began := time.Now()
	if err := p.Run(hogFor, map[string]any{"Thread": bad, "For": cgtest.Patience(4 * time.Second)}, nil); err != nil {
		t.Fatal(err)
	}
	rw.becomes(p, bad, "other 0")
	rw.is(p, good, "rr 1 reset")
	eventually(t, "the daemon knows", func() bool { return strings.Contains(rw.log(), "it took more of a CPU than it may") })
	try := func(what string, p *harness.Proc, want harness.DBusError) {
		t.Helper()
		rw.limit(p, rw.rttime)
		rw.try(p, rw.sock, what, 0, 0, want)
	}
	try("its user", p, rtDenied)
	try("another user of the container", one.user(1001), rtDenied)
	try("root of the container", one.Proc, rtDenied)
	try("a container in it", inner.user(1000), rtDenied)
	try("the neighbour", two.user(1000), rtGranted)
	try("the user of the host with its number", w.host(p.HostUID, "."), rtGranted)
	try("another user of the host", w.host(1000, "."), rtGranted)

	// It is listed with what it took, since when, and what became of it.
	values, err := c.V1("ListGrants")
	if err != nil {
		t.Fatal(err)
	}
	rows, _ := values[0].([][]any)
	states := map[uint64]string{}
	for _, row := range rows {
		tid, _ := row[1].(uint32)
		since, _ := row[5].(int64)
		cpu, _ := row[6].(uint64)
		states[uint64(tid)] = fmt.Sprint(row[7])
		if since < began.Unix()-60 || since > time.Now().Unix() {
			t.Errorf("thread %d has it since %v", tid, time.Unix(since, 0))
		}
		if took := time.Duration(cpu) * time.Microsecond; uint64(tid) == bad && took < 20*time.Millisecond || took > time.Since(began) {
			t.Errorf("thread %d is said to have taken %v", tid, took)
		}
	}
	if len(rows) != 2 || states[bad] != "demoted" || states[good] != "granted" {
		t.Errorf("listed: %v", rows)
	}
}

// Row 18: in a cgroup without realtime runtime the kernel would refuse. For a process
// of the host it is taken from the cgroups above, and given back; a container has
// none to take from.
func TestKernelRealtimeBudget(t *testing.T) {
	harness.Require(t, "root", "rtgroup")
	top := cgtest.Mount(t, "cpu")
	dir := filepath.Join(top, cgtest.Name(t))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, "the cgroup is empty", func() bool { return os.Remove(dir) == nil })
	})
	runtime := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(dir + "/cpu.rt_runtime_us"); err != nil || string(b) != want+"\n" {
			t.Errorf("the cgroup's runtime is %q, %v; want %s", b, err, want)
		}
	}
	w := newRealtimeWorld(t)
	enter := func(p *harness.Proc) {
		t.Helper()
		if err := os.WriteFile(dir+"/cgroup.procs", fmt.Append(nil, p.HostPID), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	inside := harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 100000, MapSize: 65536})
	w.limit(inside, 200000)
	enter(inside)
	ci := inside.MustDial(w.sock)
	values, err := ci.RT("MakeThreadRealtime", uint64(1), uint32(1))
	w.answers("18: no runtime in the container", rtDenied, values, err)
	var de *harness.DBusError
	if _, err := ci.V1("Grant", uint32(1), "rr", int32(1)); !errors.As(err, &de) || !strings.Contains(de.Text, "runtime") {
		t.Errorf("Grant without runtime: %v", err)
	}
	runtime("0")
	p := w.user(1000)
	enter(p)
	c := p.MustDial(w.sock)
	values, err = c.RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("a user of the host", rtGranted, values, err)
	w.is(p, uint64(p.PID), "rr 1 reset")
	runtime("100000")
	if _, err := c.V1("Revoke", uint32(p.PID)); err != nil {
		t.Error(err)
	}
	w.is(p, uint64(p.PID), "other 0")
	runtime("0")

	// After a crash the loan is still the thread's, and given back in the end.
	values, err = c.RT("MakeThreadRealtime", uint64(0), uint32(1))
	w.answers("again", rtGranted, values, err)
	if err := unix.Kill(w.d.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w.d.wait(time.Second)
	runtime("100000")
	w.d = w.start()
	w.is(p, uint64(p.PID), "rr 1 reset")
	runtime("100000")
	w.d.terminate()
	w.is(p, uint64(p.PID), "other 0")
	runtime("0")
	inside.Stop()
	p.Stop()
}

// Who lists sees what it may have to do with, by its own numbers, and so it revokes.
func TestKernelRealtimeList(t *testing.T) {
	harness.Require(t, "root", "userns")
	w := newRealtimeWorld(t)
	root := harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 100000, MapSize: 65536})
	user := root.Spawn(harness.Spec{UID: 1000, GID: 1000})
	same := harness.Start(t, harness.Spec{UID: 101000, GID: 101000})
	w.limit(user, 200000)
	c, cr := user.MustDial(w.sock), root.MustDial(w.sock)
	tid := w.threads(user, 1)[0]
	values, err := c.RT("MakeThreadRealtime", tid, uint32(4))
	w.answers("its own thread", rtGranted, values, err)
	values, err = cr.RT("MakeThreadHighPriorityWithPID", uint64(user.PID), uint64(0), int32(-5))
	w.answers("root of the container, for a user's process", rtGranted, values, err)
	list := func(c *harness.Conn, want ...[]any) {
		t.Helper()
		values, err := c.V1("ListGrants")
		if err != nil {
			t.Fatal(err)
		}
		got, _ := values[0].([][]any)
		ok := len(got) == len(want)
		for i := 0; ok && i < len(got); i++ {
			ok = fmt.Sprint(got[i][:5]) == fmt.Sprint(want[i]) && got[i][7] == "granted"
		}
		if !ok {
			t.Errorf("listed %v, want %v", got, want)
		}
	}
	here := hostTID(t, user, tid)
	inside := [][]any{{user.PID, tid, 1000, "rr", 4}, {user.PID, user.PID, 1000, "other", -5}}
	outside := [][]any{{user.HostPID, here, 101000, "rr", 4}, {user.HostPID, user.HostPID, 101000, "other", -5}}
	list(cr, inside...)
	list(c, inside...)
	list(w.p.MustDial(w.sock), outside...)
	list(same.MustDial(w.sock), outside...) // the same user of the host's, around the container
	list(w.user(1000).MustDial(w.sock))

	refused := func(what string, err error, name string) {
		t.Helper()
		var de *harness.DBusError
		if !errors.As(err, &de) || de.Name != "org.freedesktop.DBus.Error."+name {
			t.Errorf("%s: %v, want %s", what, err, name)
		}
	}
	refused("Revoke by another user", second(w.user(1000).MustDial(w.sock).V1("Revoke", uint32(here))), "AccessDenied")
	if _, err := c.V1("Revoke", uint32(tid)); err != nil {
		t.Error(err)
	}
	w.is(user, tid, "other 0")
	w.is(user, uint64(user.PID), "other -5 reset")
	refused("Revoke once more", second(c.V1("Revoke", uint32(tid))), "FileNotFound")
	refused("Revoke by the host's number", second(c.V1("Revoke", uint32(here))), "FileNotFound")
	refused("a policy that there is not", second(c.V1("Grant", uint32(tid), "deadline", int32(1))), "InvalidArgs")
}
