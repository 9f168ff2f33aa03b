package budget_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/rt/budget"
	"cgmanager/privcheck"
	"cgmanager/test/harness"
)

// allowed is what host root is allowed.
var allowed = privcheck.Escape(privcheck.Requestor{SameUserNS: true, SamePIDNS: true, SameCgroupNS: true, SysAdmin: true, Capable: true})

func open(t *testing.T) *cgfs.Set {
	t.Helper()
	set, err := cgfs.Open(cgfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	})
	return set
}

func budgets(t *testing.T, set *cgfs.Set) *budget.Budgets {
	t.Helper()
	b, err := budget.New(set)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// tree is cgroups of the test's own.
type tree struct {
	t         *testing.T
	top, path string
}

// plant makes cgroups below one that has the runtime, in microseconds of a
// second.
func plant(t *testing.T, runtime string, names ...string) *tree {
	t.Helper()
	harness.Require(t, "root", "rtgroup")
	mount := cgtest.Mount(t, "cpu")
	name := cgtest.Name(t)
	tr := &tree{t: t, top: "/" + name, path: filepath.Join(mount, name)}
	for _, n := range append([]string{""}, names...) {
		if err := os.Mkdir(filepath.Join(tr.path, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The cgroups of another test count for a while after they were removed.
	var err error
	if !cgtest.Until(5*time.Second, 20*time.Millisecond, func() bool {
		err = os.WriteFile(filepath.Join(tr.path, "cpu.rt_runtime_us"), []byte(runtime), 0)
		return !errors.Is(err, unix.EINVAL)
	}) || err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// For the other tests: what is removed counts for a while.
		for _, n := range append([]string{""}, slices.Sorted(slices.Values(names))...) {
			defer func() { _ = os.WriteFile(filepath.Join(tr.path, n, "cpu.rt_runtime_us"), []byte("0"), 0) }()
		}
	})
	return tr
}

func (tr *tree) set(name, file, value string) {
	tr.t.Helper()
	if err := os.WriteFile(filepath.Join(tr.path, name, file), []byte(value), 0); err != nil {
		tr.t.Fatal(err)
	}
}

func (tr *tree) get(name string) string {
	tr.t.Helper()
	b, err := os.ReadFile(filepath.Join(tr.path, name, "cpu.rt_runtime_us"))
	if err != nil {
		tr.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// has checks runtimes: "a 50000 a/b 0".
func (tr *tree) has(want string) {
	tr.t.Helper()
	f := strings.Fields(want)
	for i := 0; i < len(f); i += 2 {
		if got := tr.get(f[i]); got != f[i+1] {
			tr.t.Errorf("%q has %s us, want %s", f[i], got, f[i+1])
		}
	}
}

func (tr *tree) marked(name string) bool {
	_, err := unix.Getxattr(filepath.Join(tr.path, name), "trusted.cgmanager.realtime", make([]byte, 64))
	return err == nil
}

// take borrows for the cgroup called name from within the top one.
func (tr *tree) take(b *budget.Budgets, name string, share int) *budget.Loan {
	tr.t.Helper()
	l, err := b.Take(allowed, filepath.Join(tr.top, name), tr.top, share)
	if err != nil {
		tr.t.Fatalf("take %d %% for %q: %v", share, name, err)
	}
	return l
}

func give(t *testing.T, l *budget.Loan) {
	t.Helper()
	if err := l.Give(); err != nil {
		t.Fatal(err)
	}
}

func kind(err error) api.Kind {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e.Kind
	}
	return 0
}

// Nothing is lent where there are so many cgroups that to look at them would hold up
// everybody: neither below the cgroup that lends nor below the thread's.
func TestKernelCrowded(t *testing.T) {
	for _, where := range []string{"", "a"} {
		tr := plant(t, "100000", "a")
		b := budgets(t, open(t))
		give(t, tr.take(b, "a", 5))
		for i := range 4097 {
			dir := filepath.Join(tr.path, where, strconv.Itoa(i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Remove(dir) })
		}
		_, err := b.Take(allowed, filepath.Join(tr.top, "a"), tr.top, 5)
		if kind(err) != api.Limit || !strings.Contains(err.Error(), "4096 cgroups") {
			t.Errorf("below %q: %v", where, err)
		}
		tr.has("a 0")
		// Whose cgroup has runtime of its own needs no loan.
		if _, err := b.Take(allowed, tr.top, tr.top, 5); err != nil {
			t.Errorf("below %q: %v", where, err)
		}
	}
}

// A thread in a cgroup without runtime gets realtime, and none can any more after
// the runtime has been given back.
func TestKernelLoanLetsAThreadBeRealtime(t *testing.T) {
	tr := plant(t, "100000", "a", "a/b", "c")
	b := budgets(t, open(t))
	if !b.Needed() {
		t.Fatal("the kernel budgets, and nothing is needed")
	}
	pid := cgtest.Child(t)
	tr.set("a/b", "cgroup.procs", strconv.Itoa(pid))
	fifo := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 5}
	other := &unix.SchedAttr{Size: unix.SizeofSchedAttr}
	if err := unix.SchedSetAttr(pid, fifo, 0); !errors.Is(err, unix.EPERM) {
		t.Fatalf("realtime without runtime: %v", err)
	}
	l := tr.take(b, "a/b", 5)
	tr.has("a 50000 a/b 50000")
	if err := unix.SchedSetAttr(pid, fifo, 0); err != nil {
		t.Fatal(err)
	}
	if err := l.Give(); kind(err) != api.Busy {
		t.Errorf("given back under a realtime thread: %v", err)
	}
	tr.has("a 50000 a/b 50000")
	if err := unix.SchedSetAttr(pid, other, 0); err != nil {
		t.Fatal(err)
	}
	// It is due, and goes with the next opportunity.
	give(t, tr.take(b, "c", 1))
	tr.has("a 0 a/b 0")
	if tr.marked("a") || tr.marked("a/b") {
		t.Error("still marked")
	}
	if err := unix.SchedSetAttr(pid, fifo, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("realtime without runtime: %v", err)
	}
}

// Several threads in one cgroup have the largest share that one of them asked
// for, and cgroups side by side have theirs through the one above.
func TestKernelLoansAddUp(t *testing.T) {
	tr := plant(t, "300000", "a", "a/b", "a/c")
	b := budgets(t, open(t))
	first := tr.take(b, "a/b", 5)
	second := tr.take(b, "a/b", 5)
	tr.has("a 50000 a/b 50000")
	larger := tr.take(b, "a/b", 8)
	tr.has("a 80000 a/b 80000")
	beside := tr.take(b, "a/c", 10)
	tr.has("a 180000 a/b 80000 a/c 100000")
	between := tr.take(b, "a", 2)
	tr.has("a 200000")
	give(t, first)
	give(t, first) // twice is once
	tr.has("a 200000 a/b 80000")
	give(t, larger)
	tr.has("a 170000 a/b 50000")
	give(t, second)
	tr.has("a 120000 a/b 0 a/c 100000")
	give(t, beside)
	tr.has("a 20000 a/c 0")
	give(t, between)
	tr.has("a 0")
}

// What was lent to a container from further out can be lent on inside, and goes
// back when nobody needs it.
func TestKernelLoanOfALoan(t *testing.T) {
	tr := plant(t, "100000", "a", "a/b", "a/c")
	b := budgets(t, open(t))
	outer := tr.take(b, "a", 5)
	inner, err := b.Take(allowed, filepath.Join(tr.top, "a/b"), filepath.Join(tr.top, "a"), 5)
	if err != nil {
		t.Fatal(err)
	}
	tr.has("a 50000 a/b 50000")
	if _, err := b.Take(allowed, filepath.Join(tr.top, "a/c"), filepath.Join(tr.top, "a"), 1); kind(err) != api.Limit {
		t.Errorf("more than was lent to the container: %v", err)
	}
	give(t, outer)
	tr.has("a 50000 a/b 50000")
	give(t, inner)
	tr.has("a 0 a/b 0")
}

// A loan that fails halfway leaves nothing behind.
func TestKernelLoanUndone(t *testing.T) {
	tr := plant(t, "100000", "a", "a/b")
	tr.set("a/b", "cpu.rt_period_us", "3") // 1 of 3 is more than 5 percent
	b := budgets(t, open(t))
	if _, err := b.Take(allowed, filepath.Join(tr.top, "a/b"), tr.top, 5); kind(err) != api.Limit {
		t.Errorf("%v", err)
	}
	tr.has("a 0 a/b 0")
	if tr.marked("a") || tr.marked("a/b") {
		t.Error("marked")
	}
	tr.set("a/b", "cpu.rt_period_us", "1000000")
	give(t, tr.take(b, "a/b", 5))
	tr.has("a 0 a/b 0")
}

// Shares count in the cgroup's own period.
func TestKernelLoanOfAnotherPeriod(t *testing.T) {
	tr := plant(t, "100000", "a", "a/b")
	tr.set("a/b", "cpu.rt_period_us", "100000")
	b := budgets(t, open(t))
	l := tr.take(b, "a/b", 5)
	tr.has("a 50000 a/b 5000")
	give(t, l)
	tr.has("a 0 a/b 0")
}

// Nothing is lent beyond what there is, nor from further up than top, and then
// nothing is changed.
func TestKernelLoanRefused(t *testing.T) {
	tr := plant(t, "100000", "a", "a/b", "c", "set", "set/d")
	tr.set("c", "cpu.rt_runtime_us", "70000")
	tr.set("set", "cpu.rt_runtime_us", "10000")
	b := budgets(t, open(t))
	at := func(name string) string { return filepath.Join(tr.top, name) }
	for _, tc := range []struct {
		name, target, top string
		d                 privcheck.Decision
		share             int
		kind              api.Kind
		text              string
	}{
		{"too little left", at("a/b"), tr.top, allowed, 5, api.Limit, `cgroup "a/b" needs 5 % of each CPU for realtime, and your own cgroup has 2 % left`},
		{"a limit on the way", at("set/d"), tr.top, allowed, 2, api.Limit, `cgroup "set/d" needs 2 % of each CPU for realtime, and the cgroup above has 1 % left`},
		{"not beyond top", at("a/b"), at("a"), allowed, 1, api.Denied, `cgroup "b" has no realtime runtime`},
		{"top itself", at("a"), at("a"), allowed, 1, api.Denied, `the thread's cgroup has no realtime runtime`},
		{"outside", at("a/b"), at("c"), allowed, 1, api.Denied, "outside your own"},
		{"a name that only starts like top", at("a/b"), tr.top[:len(tr.top)-1], allowed, 1, api.Denied, "outside your own"},
		{"nobody decided", at("a/b"), tr.top, privcheck.Decision{}, 1, api.Denied, "not decided"},
		{"share 0", at("a/b"), tr.top, allowed, 0, api.Invalid, "1 to 100"},
		{"share 101", at("a/b"), tr.top, allowed, 101, api.Invalid, "1 to 100"},
		{"no such cgroup", at("gone"), tr.top, allowed, 1, api.NotFound, "is gone"},
	} {
		_, err := b.Take(tc.d, tc.target, tc.top, tc.share)
		if kind(err) != tc.kind || err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v, want %v with %q", tc.name, err, tc.kind, tc.text)
		}
		if err != nil && strings.Contains(err.Error(), tr.top) {
			t.Errorf("%s: the host's path is in %q", tc.name, err)
		}
		for _, n := range []string{"a", "a/b", "set/d"} {
			if tr.marked(n) {
				t.Errorf("%s: %q is marked", tc.name, n)
			}
		}
		tr.has("a 0 a/b 0 c 70000 set 10000 set/d 0")
	}
	// What has runtime needs none, wherever it is.
	for _, top := range []string{tr.top, at("a")} {
		l, err := b.Take(allowed, at("c"), top, 50)
		if err != nil {
			t.Fatal(err)
		}
		give(t, l)
	}
	tr.has("c 70000")
}

// What somebody has set since is theirs.
func TestKernelLoanThatSomebodyChanged(t *testing.T) {
	tr := plant(t, "500000", "a", "a/b")
	b := budgets(t, open(t))
	l := tr.take(b, "a/b", 5)
	tr.set("a", "cpu.rt_runtime_us", "200000")
	give(t, l)
	tr.has("a 200000 a/b 0")
	l = tr.take(b, "a/b", 5)
	tr.set("a/b", "cpu.rt_runtime_us", "60000")
	tr.take(b, "a/b", 7)
	give(t, l)
	tr.has("a 200000 a/b 60000")
	if tr.marked("a") || tr.marked("a/b") {
		t.Error("still marked")
	}
}

// Who may set the runtime of cgroups of its own keeps no loan by that, nor one after
// the other.
func TestKernelLoanIsNotKept(t *testing.T) {
	tr := plant(t, "500000", "a", "a/b", "a/b/c", "a/d")
	b := budgets(t, open(t))
	for i := range 4 {
		l := tr.take(b, "a/b", 10)
		tr.set("a/b", "cpu.rt_runtime_us", "99999") // it is somebody's own
		tr.set("a/b/c", "cpu.rt_runtime_us", "99998")
		give(t, l)
		tr.has("a 0 a/b 0 a/b/c 0")
		if t.Failed() {
			t.Fatalf("the %d. time", i+1)
		}
	}
	// What another loan needs stays, and what is set above the loans is not touched.
	tr.set("", "cpu.rt_runtime_us", "400000")
	l, other := tr.take(b, "a/b", 10), tr.take(b, "a/d", 5)
	tr.set("a/b", "cpu.rt_runtime_us", "99999")
	give(t, l)
	tr.has("a 50000 a/b 0 a/d 50000")
	give(t, other)
	tr.has("a 0 a/d 0")
	tr.has(". 400000")
}

// A cgroup that is removed takes its share along.
func TestKernelLoanToARemovedCgroup(t *testing.T) {
	tr := plant(t, "500000", "a", "a/b", "a/c")
	b := budgets(t, open(t))
	l := tr.take(b, "a/b", 5)
	other := tr.take(b, "a/c", 6)
	if err := os.Remove(filepath.Join(tr.path, "a/b")); err != nil {
		t.Fatal(err)
	}
	give(t, l)
	tr.has("a 60000 a/c 60000")
	give(t, other)
	tr.has("a 0 a/c 0")
}

// The kernel counts a cgroup for some milliseconds after it was removed. On a busy machine
// it may be longer than is waited for, but not each time.
func TestKernelLoanAfterARemoval(t *testing.T) {
	tr := plant(t, "100000", "a")
	b := budgets(t, open(t))
	late := 0
	// again is take, once more only where the kernel takes longer than that.
	again := func(name string) *budget.Loan {
		t.Helper()
		l, err := b.Take(allowed, filepath.Join(tr.top, name), tr.top, 10)
		if err == nil {
			return l
		}
		if late++; late > 5 {
			t.Fatalf("take, when a cgroup was removed: %v, for the %d. time", err, late)
		}
		cgtest.Eventually(t, 5*time.Second, "the kernel counts it no more", func() bool {
			l, err = b.Take(allowed, filepath.Join(tr.top, name), tr.top, 10)
			return err == nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for range 20 {
		if err := os.Mkdir(filepath.Join(tr.path, "gone"), 0o755); err != nil {
			t.Fatal(err)
		}
		l := again("gone")
		if err := os.Remove(filepath.Join(tr.path, "gone")); err != nil {
			t.Fatal(err)
		}
		give(t, l)
		give(t, again("a"))
	}
}

// The next daemon finds what was lent, keeps what is needed still, and gives back
// the rest.
func TestKernelLoansOfAnEarlierDaemon(t *testing.T) {
	tr := plant(t, "100000", "a", "a/b", "a/c")
	set := open(t)
	earlier := budgets(t, set)
	tr.take(earlier, "a/b", 5)
	tr.take(earlier, "a/c", 5)
	earlier.Close() // without giving back

	// There is nothing left: it must be what was lent.
	b := budgets(t, set)
	tr.has("a 100000 a/b 50000 a/c 50000")
	l := tr.take(b, "a/b", 5)
	tr.has("a 100000 a/b 50000 a/c 50000")
	if err := b.Settle(); err != nil {
		t.Fatal(err)
	}
	tr.has("a 50000 a/b 50000 a/c 0")
	give(t, l)
	tr.has("a 0 a/b 0 a/c 0")
}

// A daemon that ended between its mark and its write leaves a cgroup as it was,
// and one that somebody else has set since is not taken for a loan.
func TestKernelLoanCutShort(t *testing.T) {
	tr := plant(t, "500000", "a", "b", "c")
	tr.set("b", "cpu.rt_runtime_us", "50000")
	tr.set("c", "cpu.rt_runtime_us", "70000")
	for name, mark := range map[string]string{"a": "50000 0", "b": "80000 50000", "c": "50000 0"} {
		if err := unix.Setxattr(filepath.Join(tr.path, name), "trusted.cgmanager.realtime", []byte(mark), 0); err != nil {
			t.Fatal(err)
		}
	}
	b := budgets(t, open(t))
	if err := b.Settle(); err != nil {
		t.Fatal(err)
	}
	tr.has("a 0 b 0 c 70000")
	for _, n := range []string{"a", "b", "c"} {
		if tr.marked(n) {
			t.Errorf("%q is marked", n)
		}
	}
}
