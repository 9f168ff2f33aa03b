package limits_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt/limits"
	"cgmanager/manager/rt/policy"
	"cgmanager/privcheck"
	"cgmanager/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// allowed is what host root is allowed.
var allowed = privcheck.Escape(privcheck.Requestor{SameUserNS: true, SamePIDNS: true, SameCgroupNS: true, SysAdmin: true, Capable: true})

// anybody is whom the host's root has privilege over.
func anybody(uint32, identity.Container) bool { return true }

// audio is what the tests' policy gives: priority 10, nice level -11, 1 MB of locked
// memory.
var audio = policy.Limits{RTPrio: new(uint64(10)), Nice: new(-11), MemLock: new(uint64(1 << 20))}

const rttime = 1000000

// grants makes Grants on a state directory. granted are threads that hold a grant
// of their own, of priority 6.
func grants(t *testing.T, state string, granted ...int) *limits.Grants {
	t.Helper()
	h, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	g, err := limits.New(state, h, func(_, tid int32, now identity.Scheduling) bool {
		return slices.Contains(granted, int(tid)) && now.Priority <= 6
	}, logrus.New())
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// container starts a container's first process.
func container(t *testing.T) *harness.Proc {
	t.Helper()
	return harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 100000, MapSize: 65536})
}

func open(t *testing.T, pid int) *identity.Process {
	t.Helper()
	p, err := identity.Open(int32(pid), -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

func give(t *testing.T, g *limits.Grants, p *harness.Proc) map[string]string {
	t.Helper()
	got, err := g.Give(allowed, open(t, p.HostPID), audio, rttime, nil)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// revoke takes back and expects to reach everybody.
func revoke(t *testing.T, g *limits.Grants, pid int) {
	t.Helper()
	left, err := g.Revoke(allowed, open(t, pid), anybody)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 0 {
		t.Errorf("not reached: %v", left)
	}
}

// limitsOf reads limits from outside, with the others' code: "rtprio 0 0 nice ...".
func limitsOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		for name, as := range map[string]string{"Max realtime priority": "rtprio", "Max nice priority": "nice", "Max locked memory": "memlock", "Max realtime timeout": "rttime"} {
			if rest, ok := strings.CutPrefix(line, name); ok {
				f := strings.Fields(rest)
				out[as] = f[0] + " " + f[1]
			}
		}
	}
	if len(out) != 4 {
		t.Fatalf("limits of %d: %s", pid, b)
	}
	return out
}

func policyOf(t *testing.T, tid int) (policy uint32, nice int32) {
	t.Helper()
	a, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		t.Fatal(err)
	}
	return a.Policy, a.Nice
}

func kind(err error) api.Kind {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e.Kind
	}
	return 0
}

// can says what a process can do by itself.
type can struct{ FIFO, Nice, Lock bool }

// whatCan tries it, and takes it back.
var whatCan = harness.Inside("what limits allow", func(struct{}) (can, error) {
	var c can
	attr := &unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: 10}
	c.FIFO = unix.SchedSetAttr(0, attr, 0) == nil
	c.Nice = unix.SchedSetAttr(0, &unix.SchedAttr{Nice: -11}, 0) == nil
	memory, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return c, err
	}
	defer func() { _ = unix.Munmap(memory) }()
	c.Lock = unix.Mlock(memory) == nil
	return c, unix.SchedSetAttr(0, &unix.SchedAttr{}, 0)
})

// beFIFO makes the process's first thread realtime, as far as its limits let it.
var beFIFO = harness.Inside("be realtime", func(priority uint32) (struct{}, error) {
	return struct{}{}, unix.SchedSetAttr(0, &unix.SchedAttr{Policy: unix.SCHED_FIFO, Priority: priority}, 0)
})

// lower lowers a limit of the process's own.
var lower = harness.Inside("lower a limit", func(l [2]uint64) (struct{}, error) {
	return struct{}{}, unix.Prlimit(0, int(l[0]), &unix.Rlimit{Cur: l[1], Max: l[1]}, nil)
})

func run(t *testing.T, p *harness.Proc, f string, args, result any) {
	t.Helper()
	if err := p.Run(f, args, result); err != nil {
		t.Fatal(err)
	}
}

func abilities(t *testing.T, p *harness.Proc) (c can) {
	t.Helper()
	run(t, p, whatCan, struct{}{}, &c)
	return c
}

// sleepers finds the processes that sleep for so long, once there are n.
func sleepers(t *testing.T, howLong string, n int) (pids []int) {
	t.Helper()
	if cgtest.Until(10*time.Second, 20*time.Millisecond, func() bool {
		pids = nil
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && string(b) == "sleep\x00"+howLong+"\x00" {
				pid, err := strconv.Atoi(strings.Split(f, "/")[2])
				if err != nil {
					t.Fatal(err)
				}
				pids = append(pids, pid)
			}
		}
		return len(pids) == n
	}) {
		return pids
	}
	t.Fatalf("%d processes sleep for %s, want %d", len(pids), howLong, n)
	return nil
}

// noMemory makes sure that 1 MB is more than p may lock by itself.
func noMemory(t *testing.T, p *harness.Proc) {
	t.Helper()
	if err := unix.Prlimit(p.HostPID, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 65536, Max: 65536}, nil); err != nil {
		t.Fatal(err)
	}
}

// A process that runs is given limits and uses them by itself; revoked, it cannot
// any more.
func TestKernelGiveAndRevoke(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	c := container(t)
	for name, p := range map[string]*harness.Proc{
		"a user of the host":    harness.Start(t, harness.Spec{UID: 61000, GID: 61000}),
		"root of a container":   c,
		"a user of a container": c.Spawn(harness.Spec{UID: 1000, GID: 1000}),
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			g := grants(t, state)
			noMemory(t, p)
			had := limitsOf(t, p.HostPID)
			if c := abilities(t, p); c != (can{}) {
				t.Fatalf("before: %+v", c)
			}
			got := give(t, g, p)
			want := map[string]string{"rtprio": "10", "nice": "-11", "memlock": "1048576", "rttime": "999999"}
			if !maps.Equal(got, want) {
				t.Errorf("given %v, want %v", got, want)
			}
			now := map[string]string{"rtprio": "10 10", "nice": "31 31", "memlock": "1048576 1048576", "rttime": "999999 999999"}
			if l := limitsOf(t, p.HostPID); !maps.Equal(l, now) {
				t.Errorf("limits %v, want %v", l, now)
			}
			if c := abilities(t, p); c != (can{true, true, true}) {
				t.Errorf("with the limits: %+v", c)
			}
			list := g.List()
			if len(list) != 1 || list[0].PID != int32(p.HostPID) || list[0].UID != p.HostUID || !maps.Equal(list[0].Limits, want) || time.Since(time.Unix(list[0].Since, 0)) > time.Minute {
				t.Errorf("list: %+v", list)
			}
			run(t, p, beFIFO, 10, nil)
			revoke(t, g, p.HostPID)
			if l := limitsOf(t, p.HostPID); !maps.Equal(l, had) {
				t.Errorf("limits %v, want %v as before", l, had)
			}
			if policy, _ := policyOf(t, p.HostPID); policy != unix.SCHED_NORMAL {
				t.Errorf("its policy is %d", policy)
			}
			if c := abilities(t, p); c != (can{}) {
				t.Errorf("revoked: %+v", c)
			}
			if list := g.List(); len(list) != 0 {
				t.Errorf("list: %+v", list)
			}
			if _, err := os.Stat(filepath.Join(state, "limits")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the note is left: %v", err)
			}
			if _, err := g.Revoke(allowed, open(t, p.HostPID), anybody); kind(err) != api.NotFound {
				t.Errorf("revoked twice: %v", err)
			}
		})
	}
}

// Whoever descends from the process loses it all as well, whatever it has done to
// get away; whoever does not keeps what it has.
func TestKernelRevokeDescendants(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	c := container(t)
	p := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	noMemory(t, p)
	had := limitsOf(t, p.HostPID)
	earlier := p.Spawn(harness.Spec{KeepIDs: true})
	give(t, g, p)
	given := limitsOf(t, p.HostPID)

	child := p.Spawn(harness.Spec{KeepIDs: true})
	grandchild := child.Spawn(harness.Spec{KeepIDs: true})
	below := child.Spawn(harness.Spec{UserNS: true, KeepIDs: true})
	for _, q := range []*harness.Proc{child, grandchild, below} {
		run(t, q, beFIFO, 9, nil)
	}
	// The host's root has taken the mark from this one: its parent tells.
	unmarked := p.Spawn(harness.Spec{KeepIDs: true})
	if err := unix.Prlimit(unmarked.HostPID, unix.RLIMIT_RTTIME, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, nil); err != nil {
		t.Fatal(err)
	}
	// A chain of parents leads to none of these.
	out, code := p.Exec(nil, "/bin/sh", "-c", `exec >/dev/null 2>&1
		chrt -f 5 sleep 70001 &
		setsid sh -c "chrt -r 4 sleep 70002 & exit" &
		(prlimit --rtprio=7:7 sleep 70003 &)
		(nice -n -5 chrt -f 3 prlimit --rtprio=0:0 --nice=0:0 sh -c "sleep 70004 & exit" &)
		prlimit --rttime=1000:1000 sh -c "sleep 70005 & exit"
		nice -n -7 sleep 70006 &`)
	if code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	orphans := map[string]int{}
	for _, s := range []string{"70001", "70002", "70003", "70004", "70005", "70006"} {
		orphans[s] = sleepers(t, s, 1)[0]
	}
	for s, want := range map[string]uint32{"70001": unix.SCHED_FIFO, "70002": unix.SCHED_RR, "70004": unix.SCHED_FIFO} {
		if policy, _ := policyOf(t, orphans[s]); policy != want {
			t.Fatalf("%s: policy %d, want %d: it tests nothing", s, policy, want)
		}
	}
	if _, nice := policyOf(t, orphans["70006"]); nice != -7 {
		t.Fatalf("nice %d: it tests nothing", nice)
	}
	// These are nobody's of them.
	neighbour := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	other := container(t)
	for _, q := range []*harness.Proc{neighbour, other} {
		if err := unix.Prlimit(q.HostPID, unix.RLIMIT_RTPRIO, &unix.Rlimit{Cur: 10, Max: 10}, nil); err != nil {
			t.Fatal(err)
		}
		run(t, q, beFIFO, 9, nil)
	}
	// The number alone is none: it is another container.
	if err := unix.Prlimit(other.HostPID, unix.RLIMIT_RTTIME, &unix.Rlimit{Cur: 150000, Max: 150000}, nil); err != nil {
		t.Fatal(err)
	}

	revoke(t, g, p.HostPID)
	for name, pid := range map[string]int{"itself": p.HostPID, "a child": child.HostPID, "a grandchild": grandchild.HostPID, "one without the mark": unmarked.HostPID, "one in a namespace below": below.HostPID, "an orphan": orphans["70001"], "one of another session": orphans["70002"], "a nice one": orphans["70006"], "one made earlier": earlier.HostPID} {
		if l := limitsOf(t, pid); !maps.Equal(l, had) {
			t.Errorf("%s: %v, want %v", name, l, had)
		}
		if policy, nice := policyOf(t, pid); policy != unix.SCHED_NORMAL || nice != 0 {
			t.Errorf("%s: policy %d, nice %d", name, policy, nice)
		}
	}
	for _, s := range []string{"70003", "70004", "70005"} {
		l := limitsOf(t, orphans[s])
		for _, name := range []string{"rtprio", "nice", "memlock"} {
			if l[name] != had[name] && l[name] == given[name] || name == "rtprio" && l[name] != "0 0" {
				t.Errorf("%s: %s is %s", s, name, l[name])
			}
		}
		if policy, nice := policyOf(t, orphans[s]); policy != unix.SCHED_NORMAL || nice != 0 {
			t.Errorf("%s: policy %d, nice %d", s, policy, nice)
		}
	}
	for name, q := range map[string]*harness.Proc{"a neighbour": neighbour, "another container": other} {
		if l := limitsOf(t, q.HostPID); l["rtprio"] != "10 10" {
			t.Errorf("%s: %v", name, l)
		}
		if policy, _ := policyOf(t, q.HostPID); policy != unix.SCHED_FIFO {
			t.Errorf("%s: policy %d", name, policy)
		}
	}
}

// Processes that fork and end, one after the other, are caught, if need be when it is
// asked again as the refusal says. On a busy machine one can be faster than who looks
// (docs/SECURITY.md), but not each time.
func TestKernelRevokeRunaway(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	for caught, round := 0, 0; caught < 2; round++ {
		away := runaways(t, strconv.Itoa(70110+round))
		if away == 0 {
			caught++
			continue
		}
		t.Logf("round %d: %d got away", round, away)
		if round-caught == 6 {
			t.Fatal("one got away in most rounds")
		}
	}
}

// runaways takes the limits back from two that end as a sleep for so long, and returns
// how many of them have theirs still.
func runaways(t *testing.T, howLong string) (away int) {
	t.Helper()
	g := grants(t, t.TempDir())
	c := container(t)
	defer c.Stop()
	p := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	give(t, g, p)
	if out, code := p.Exec(nil, "/bin/sh", "-c", `exec >/dev/null 2>&1
		hop() { [ $1 -lt 500 ] || exec sleep `+howLong+`; hop $(($1+1)) & exit; }
		hop 0 &
		hop 0 &`); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	err := error(api.Errorf(api.Busy, "not asked yet"))
	for end := time.Now().Add(cgtest.Patience(20 * time.Second)); kind(err) == api.Busy && time.Now().Before(end); {
		_, err = g.Revoke(allowed, open(t, p.HostPID), anybody)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range sleepers(t, howLong, 2) {
		if limitsOf(t, pid)["rtprio"] != "0 0" {
			away++
		}
	}
	return away
}

// On the host an orphan of another user is somebody else's.
func TestKernelRevokeOnTheHost(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	p := harness.Start(t, harness.Spec{UID: 61000, GID: 61000})
	give(t, g, p)
	service := harness.Start(t, harness.Spec{UID: 61001, GID: 61001})
	for number, v := range map[int]uint64{unix.RLIMIT_RTPRIO: 10, unix.RLIMIT_RTTIME: 150000} {
		if err := unix.Prlimit(service.HostPID, number, &unix.Rlimit{Cur: v, Max: v}, nil); err != nil {
			t.Fatal(err)
		}
	}
	run(t, service, beFIFO, 9, nil)
	if out, code := p.Exec(nil, "/bin/sh", "-c", `exec >/dev/null 2>&1; chrt -f 5 sleep 70021 &`); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	orphan := sleepers(t, "70021", 1)[0]
	handle := open(t, orphan)
	defer func() { _ = unix.PidfdSendSignal(handle.PidFD(), unix.SIGKILL, nil, 0) }()
	revoke(t, g, p.HostPID)
	if policy, _ := policyOf(t, orphan); policy != unix.SCHED_NORMAL || limitsOf(t, orphan)["rtprio"] != "0 0" {
		t.Errorf("the orphan: policy %d, %v", policy, limitsOf(t, orphan))
	}
	if policy, _ := policyOf(t, service.HostPID); policy != unix.SCHED_FIFO || limitsOf(t, service.HostPID)["rtprio"] != "10 10" {
		t.Errorf("a service: policy %d, %v", policy, limitsOf(t, service.HostPID))
	}
}

// A user of the host does not get away in a container of his own, under another
// uid.
func TestKernelRevokeInAUsersContainer(t *testing.T) {
	harness.Require(t, "root", "sysresource", "vm") // with a user who has more uids
	g := grants(t, t.TempDir())
	p := harness.Start(t, harness.Spec{UID: 1000, GID: 1000})
	give(t, g, p)
	if out, code := p.Exec(nil, "/bin/sh", "-c", `exec 2>&1 >/dev/null
		unshare --user --map-auto --map-root-user setpriv --reuid 5 --clear-groups chrt -f 5 sleep 70051 2>/dev/null &`); code != 0 || out != "" {
		t.Fatalf("%d: %s", code, out)
	}
	orphan := sleepers(t, "70051", 1)[0]
	handle := open(t, orphan)
	defer func() { _ = unix.PidfdSendSignal(handle.PidFD(), unix.SIGKILL, nil, 0) }()
	st, err := handle.Status()
	if err != nil || st.UIDs[0] < 100000 {
		t.Fatalf("its uid is %d, %v: it tests nothing", st.UIDs[0], err)
	}
	if policy, _ := policyOf(t, orphan); policy != unix.SCHED_FIFO {
		t.Fatalf("its policy is %d: it tests nothing", policy)
	}
	revoke(t, g, p.HostPID)
	if policy, _ := policyOf(t, orphan); policy != unix.SCHED_NORMAL || limitsOf(t, orphan)["rtprio"] != "0 0" {
		t.Errorf("policy %d, %v", policy, limitsOf(t, orphan))
	}
}

// beReaper has the process be the parent of descendants whose own has ended.
var beReaper = harness.Inside("be a subreaper", func(struct{}) (struct{}, error) {
	return struct{}{}, unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
})

// What a setuid program has made of a child of the process is somebody else's on the
// host, whoever its parent is.
func TestKernelRevokeSparesOtherUsersChildren(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	p := harness.Start(t, harness.Spec{UID: 61000, GID: 61000})
	run(t, p, beReaper, struct{}{}, nil)
	give(t, g, p)
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", `cp "$(command -v setpriv)" `+dir+` && chmod 4755 `+dir+`/setpriv && chmod 755 `+filepath.Dir(dir)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, code := p.Exec(nil, "/bin/sh", "-c", `exec 2>&1 >/dev/null
		`+dir+`/setpriv --reuid 61001 --clear-groups chrt -f 5 sleep 70061 2>/dev/null &`); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	other := sleepers(t, "70061", 1)[0]
	handle := open(t, other)
	defer func() { _ = unix.PidfdSendSignal(handle.PidFD(), unix.SIGKILL, nil, 0) }()
	st, err := handle.Status()
	if parent, perr := handle.Parent(); err != nil || perr != nil || parent != int32(p.HostPID) || !slices.Equal(st.UIDs[:3], []uint32{61001, 61001, 61001}) {
		t.Fatalf("its parent is %d, its uids are %v (%v, %v): it tests nothing", parent, st.UIDs, err, perr)
	}
	revoke(t, g, p.HostPID)
	if policy, _ := policyOf(t, other); policy != unix.SCHED_FIFO || limitsOf(t, other)["rtprio"] != "10 10" {
		t.Errorf("policy %d, %v", policy, limitsOf(t, other))
	}
}

// In a container other users' processes keep what they have by themselves, unless it
// is the container's root whose limits are taken back: it may have become anybody.
func TestKernelRevokeSparesOtherUsers(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	c := container(t)
	for name, spares := range map[*harness.Proc]bool{c: false, c.Spawn(harness.Spec{UID: 1000, GID: 1000}): true} {
		g := grants(t, t.TempDir())
		give(t, g, name)
		other := c.Spawn(harness.Spec{UID: 1001, GID: 1001})
		for number, v := range map[int]uint64{unix.RLIMIT_RTPRIO: 10, unix.RLIMIT_RTTIME: 150000} {
			if err := unix.Prlimit(other.HostPID, number, &unix.Rlimit{Cur: v, Max: v}, nil); err != nil {
				t.Fatal(err)
			}
		}
		run(t, other, beFIFO, 9, nil)
		revoke(t, g, name.HostPID)
		policy, _ := policyOf(t, other.HostPID)
		if l := limitsOf(t, other.HostPID)["rtprio"]; spares != (policy == unix.SCHED_FIFO) || spares != (l == "10 10") {
			t.Errorf("revoked from uid %d: another user's process has policy %d and rtprio %s; spared should be %t", name.HostUID, policy, l, spares)
		}
	}
}

// Who takes on another's mark gets nothing by it: not the RLIMIT_RTTIME that the other
// one had before.
func TestKernelGiveToAnImpostor(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	got := give(t, g, harness.Start(t, harness.Spec{UID: 61000, GID: 61000}))
	mark, err := strconv.ParseUint(got["rttime"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	p := harness.Start(t, harness.Spec{UID: 61001, GID: 61001})
	if err := unix.Prlimit(p.HostPID, unix.RLIMIT_RTTIME, &unix.Rlimit{Cur: rttime, Max: rttime}, nil); err != nil {
		t.Fatal(err)
	}
	run(t, p, lower, [2]uint64{unix.RLIMIT_RTTIME, mark}, nil)
	had := limitsOf(t, p.HostPID)
	give(t, g, p)
	revoke(t, g, p.HostPID)
	if l := limitsOf(t, p.HostPID); !maps.Equal(l, had) {
		t.Errorf("limits %v, want %v", l, had)
	}
}

// A thread with a grant of its own keeps that, and processes with limits of their
// own keep those, with what descends from them.
func TestKernelRevokeSparesOtherGrants(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	c := container(t)
	p := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	g := grants(t, t.TempDir())
	before := limitsOf(t, p.HostPID)
	give(t, g, p)
	after := p.Spawn(harness.Spec{KeepIDs: true})
	if second := give(t, g, after); second["rttime"] != "999998" {
		t.Errorf("the second: %v", second)
	}
	child := p.Spawn(harness.Spec{KeepIDs: true})
	run(t, child, beFIFO, 8, nil)
	run(t, after, beFIFO, 7, nil)
	if out, code := after.Exec(nil, "/bin/sh", "-c", `exec >/dev/null 2>&1; sleep 70031 &`); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	orphan := sleepers(t, "70031", 1)[0]
	revoke(t, g, p.HostPID)
	if policy, _ := policyOf(t, child.HostPID); policy != unix.SCHED_NORMAL {
		t.Errorf("a child without a grant of its own: policy %d", policy)
	}
	for name, pid := range map[string]int{"one with its own": after.HostPID, "its orphan": orphan} {
		if policy, _ := policyOf(t, pid); policy != unix.SCHED_FIFO || limitsOf(t, pid)["rtprio"] != "10 10" {
			t.Errorf("%s: policy %d, %v", name, policy, limitsOf(t, pid))
		}
	}
	revoke(t, g, after.HostPID)
	for name, pid := range map[string]int{"one with its own": after.HostPID, "its orphan": orphan} {
		if l := limitsOf(t, pid); !maps.Equal(l, before) {
			t.Errorf("%s: %v, want %v", name, l, before)
		}
	}

	// A thread that holds a grant.
	held := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	g = grants(t, t.TempDir(), held.HostPID)
	give(t, g, held)
	run(t, held, beFIFO, 6, nil)
	revoke(t, g, held.HostPID)
	if policy, _ := policyOf(t, held.HostPID); policy != unix.SCHED_FIFO || limitsOf(t, held.HostPID)["rtprio"] != "0 0" {
		t.Errorf("a thread with a grant of its own: policy %d, %v", policy, limitsOf(t, held.HostPID))
	}
	// That it holds one is no excuse for what it has by its limits.
	give(t, g, held)
	run(t, held, beFIFO, 8, nil)
	revoke(t, g, held.HostPID)
	if policy, _ := policyOf(t, held.HostPID); policy != unix.SCHED_NORMAL {
		t.Errorf("a thread with more than its grant: policy %d", policy)
	}
}

// One that has the limits and is not in the container is told of, and not touched.
func TestKernelRevokeUnreached(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	c := container(t)
	got := give(t, g, c)
	mark, err := strconv.ParseUint(got["rttime"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	out := harness.Start(t, harness.Spec{UID: 61000, GID: 61000})
	for number, v := range map[int]uint64{unix.RLIMIT_RTPRIO: 10, unix.RLIMIT_RTTIME: mark} {
		if err := unix.Prlimit(out.HostPID, number, &unix.Rlimit{Cur: v, Max: v}, nil); err != nil {
			t.Fatal(err)
		}
	}
	left, err := g.Revoke(allowed, open(t, c.HostPID), anybody)
	if err != nil || !slices.Equal(left, []int32{int32(out.HostPID)}) {
		t.Errorf("not reached: %v, %v, want %d", left, err, out.HostPID)
	}
	if l := limitsOf(t, out.HostPID); l["rtprio"] != "10 10" {
		t.Errorf("it was touched: %v", l)
	}
}

// The next daemon takes back what this one gave, also where only a descendant is
// left.
func TestKernelLimitsOfAnEarlierDaemon(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	state := t.TempDir()
	c := container(t)
	p := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	had := limitsOf(t, p.HostPID)
	earlier := grants(t, state)
	give(t, earlier, p)
	give(t, earlier, c)
	give(t, earlier, p) // again: it is one grant
	if out, code := p.Exec(nil, "/bin/sh", "-c", `exec >/dev/null 2>&1; sleep 70041 &`); code != 0 {
		t.Fatalf("%d: %s", code, out)
	}
	orphan := sleepers(t, "70041", 1)[0]

	g := grants(t, state)
	if list := g.List(); len(list) != 2 {
		t.Fatalf("list: %+v", list)
	}
	if _, err := g.Revoke(allowed, open(t, orphan), anybody); kind(err) != api.NotFound || !strings.Contains(err.Error(), "another one") {
		t.Errorf("revoked by a descendant: %v", err)
	}
	p.Stop()
	if list := grants(t, state).List(); len(list) != 2 {
		t.Fatalf("the process has ended, its child has not: %+v", list)
	}
	revoke(t, g, orphan)
	if l := limitsOf(t, orphan); !maps.Equal(l, had) {
		t.Errorf("limits %v, want %v", l, had)
	}
	if left, err := g.RevokeAll(); err != nil || len(left) != 0 {
		t.Errorf("all: %v, %v", left, err)
	}
	if l := limitsOf(t, c.HostPID); !maps.Equal(l, had) {
		t.Errorf("limits %v, want %v", l, had)
	}
	if list := grants(t, state).List(); len(list) != 0 {
		t.Errorf("list: %+v", list)
	}
}

// A grant that nobody has any more is forgotten.
func TestKernelLimitsForgotten(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	state := t.TempDir()
	g := grants(t, state)
	c := container(t)
	p := c.Spawn(harness.Spec{UID: 1000, GID: 1000})
	give(t, g, p)
	p.Stop()
	if list := g.List(); len(list) != 0 {
		t.Errorf("list: %+v", list)
	}
	if list := grants(t, state).List(); len(list) != 0 {
		t.Errorf("the next daemon's list: %+v", list)
	}
}

// What a process has is never lowered, but for the time.
func TestKernelGiveRaises(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	p := harness.Start(t, harness.Spec{UID: 61000, GID: 61000})
	for number, l := range map[int]unix.Rlimit{
		unix.RLIMIT_RTPRIO:  {Cur: 5, Max: 50},
		unix.RLIMIT_MEMLOCK: {Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY},
		unix.RLIMIT_RTTIME:  {Cur: 1000, Max: 150000},
	} {
		if err := unix.Prlimit(p.HostPID, number, &l, nil); err != nil {
			t.Fatal(err)
		}
	}
	had := limitsOf(t, p.HostPID)
	give(t, g, p)
	want := map[string]string{"rtprio": "10 50", "nice": "31 31", "memlock": "unlimited unlimited", "rttime": "1000 149999"}
	if l := limitsOf(t, p.HostPID); !maps.Equal(l, want) {
		t.Errorf("limits %v, want %v", l, want)
	}
	revoke(t, g, p.HostPID)
	if l := limitsOf(t, p.HostPID); !maps.Equal(l, had) {
		t.Errorf("limits %v, want %v", l, had)
	}
	// A limit that the policy says nothing about is not touched.
	if _, err := g.Give(allowed, open(t, p.HostPID), policy.Limits{Nice: new(-1)}, rttime, nil); err != nil {
		t.Fatal(err)
	}
	if l := limitsOf(t, p.HostPID); l["rtprio"] != had["rtprio"] || l["nice"] != "21 21" {
		t.Errorf("limits %v", l)
	}
	run(t, p, lower, [2]uint64{unix.RLIMIT_NICE, 10}, nil)
	revoke(t, g, p.HostPID)
	if l := limitsOf(t, p.HostPID); l["nice"] != had["nice"] {
		t.Errorf("limits %v", l)
	}
}

// What cannot be given changes nothing, and says why.
func TestKernelGiveRefused(t *testing.T) {
	harness.Require(t, "root", "userns", "sysresource")
	g := grants(t, t.TempDir())
	p := harness.Start(t, harness.Spec{UID: 61000, GID: 61000})
	had := limitsOf(t, p.HostPID)
	gone := harness.Start(t, harness.Spec{})
	ended := open(t, gone.HostPID)
	gone.Stop()
	for _, tc := range []struct {
		name   string
		d      privcheck.Decision
		p      *identity.Process
		l      policy.Limits
		rttime uint64
		kind   api.Kind
	}{
		{"not decided", privcheck.Decision{}, open(t, p.HostPID), audio, rttime, api.Denied},
		{"nothing", allowed, open(t, p.HostPID), policy.Limits{}, rttime, api.Denied},
		{"no time", allowed, open(t, p.HostPID), audio, 0, api.Invalid},
		{"ended", allowed, ended, audio, rttime, api.NotFound},
	} {
		if _, err := g.Give(tc.d, tc.p, tc.l, tc.rttime, nil); kind(err) != tc.kind {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.kind)
		}
		if l := limitsOf(t, p.HostPID); !maps.Equal(l, had) {
			t.Errorf("%s: limits %v, want %v", tc.name, l, had)
		}
	}
	give(t, g, p)
	if _, err := g.Revoke(privcheck.Decision{}, open(t, p.HostPID), anybody); kind(err) != api.Denied {
		t.Errorf("revoked, not decided: %v", err)
	}
	if _, err := g.Revoke(allowed, ended, anybody); kind(err) != api.NotFound {
		t.Errorf("revoked from one that has ended: %v", err)
	}
	if c := abilities(t, p); c != (can{true, true, true}) {
		t.Errorf("with the limits: %+v", c)
	}
}

// A note of another boot says nothing, and one that cannot be understood is set aside.
func TestFile(t *testing.T) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	h, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	started, err := open(t, os.Getpid()).Started() // it must not have ended
	if err != nil {
		t.Fatal(err)
	}
	entry := `{"PID":` + strconv.Itoa(os.Getpid()) + `,"Started":"` + strconv.FormatUint(started, 10) + `","Mark":999999,"Old":{"14":{"Cur":0,"Max":0}},"Given":{"14":{"Cur":10,"Max":18446744073709551615}}}`
	for _, tc := range []struct {
		name, content string
		entries       int
		ok            bool
	}{
		{"none", `{"Boot":"BOOT","Entries":[]}`, 0, true},
		{"one", `{"Boot":"BOOT","Entries":[` + entry + `]}`, 1, true},
		{"another boot", `{"Boot":"x","Entries":[` + entry + `]}`, 0, true},
		{"cut", `{"Boot":"BOOT","Entries":[` + entry, 0, false},
		{"empty", ``, 0, false},
		{"null", `{"Boot":"BOOT","Entries":[null]}`, 0, false},
		{"no pid", `{"Boot":"BOOT","Entries":[{}]}`, 0, false},
		{"less than was given", `{"Boot":"BOOT","Entries":[` + strings.Replace(entry, `"Old":{"14":{"Cur":0,"Max":0}}`, `"Old":{}`, 1) + `]}`, 0, false},
	} {
		state := t.TempDir()
		content := strings.ReplaceAll(tc.content, "BOOT", strings.TrimSpace(string(boot)))
		path := filepath.Join(state, "limits")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		log := logrus.New()
		var said strings.Builder
		log.SetOutput(&said)
		g, err := limits.New(state, h, func(int32, int32, identity.Scheduling) bool { return false }, log)
		if err != nil {
			t.Errorf("%s: the daemon does not start: %v", tc.name, err)
			continue
		}
		if tc.name == "one" && !maps.Equal(g.List()[0].Limits, map[string]string{"rtprio": "unlimited"}) {
			t.Errorf("%s: %+v", tc.name, g.List())
		}
		if len(g.List()) != tc.entries {
			t.Errorf("%s: %+v", tc.name, g.List())
		}
		if loud := strings.Contains(said.String(), "level=error"); loud == tc.ok {
			t.Errorf("%s: the log says %q", tc.name, said.String())
		}
		kept, err := os.ReadFile(path + ".bad")
		if tc.ok != errors.Is(err, os.ErrNotExist) || !tc.ok && string(kept) != content {
			t.Errorf("%s: kept aside: %q, %v", tc.name, kept, err)
		}
		if _, err := os.Stat(path); tc.ok != (err == nil) {
			t.Errorf("%s: the file: %v", tc.name, err)
		}
	}
}

// A daemon without the capability says so, and does nothing.
func TestKernelGiveWithoutCapability(t *testing.T) {
	harness.Require(t, "root")
	g := grants(t, t.TempDir())
	p := harness.Start(t, harness.Spec{UID: 61000, GID: 61000})
	had := limitsOf(t, p.HostPID)
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with its capabilities
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err = unix.Capget(&header, &data[0]); err != nil {
			return
		}
		data[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
		if err = unix.Capset(&header, &data[0]); err != nil {
			return
		}
		_, err = g.Give(allowed, open(t, p.HostPID), audio, rttime, nil)
	}()
	<-done
	if kind(err) != api.Unsupported || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
		t.Errorf("%v", err)
	}
	if l := limitsOf(t, p.HostPID); !maps.Equal(l, had) {
		t.Errorf("limits %v, want %v", l, had)
	}
	if list := g.List(); len(list) != 0 {
		t.Errorf("list: %+v", list)
	}
}
