package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	apiclient "cgmanager/api/client"
	"cgmanager/test/harness"
)

// An hour's worth of containers, as a proxy and a daemon see it: each is created,
// limited, entered, killed and removed, over a connection of its own, while a
// thousand cgroups are there.
const (
	soakCycles = 10000
	// soakWindow is how many cycles at each end are compared.
	soakWindow = 1000
	// soakWarmUp come before those that count: the programs' heaps and the
	// kernel's caches grow to their size.
	soakWarmUp = 200
	// soakBlock cycles are measured at once, in turn with as many of the
	// kernel's own.
	soakBlock = 20
	// The cgroups alive are in soakChains chains of soakLinks, one below the
	// other. With the tree's own and the container's the last is in depth 11,
	// and what the cycles create below it in depth 12.
	soakChains, soakLinks = 112, 9
)

// What may grow between the first thousand cycles and the last. A goroutine has
// 2 KiB of stack at least: one left behind by every 20th cycle would show.
const (
	soakRSS     = 1 << 20 // bytes
	soakThreads = 4       // the runtime starts one where the kernel blocks another
	soakTime    = 1.10    // of the ratio of processor times
	// Where the machine is emulated there are few cycles, and the clocks of processor
	// time go on while the machine stands still.
	soakTimeEmulated = 2
	// soakMore is how many more windows there may be to tell growth, which
	// stays, from what others do to this machine's caches.
	soakMore = 3
)

// soakControllers are those that a container of this test is limited by.
var soakControllers = []string{"freezer", "memory", "pids"}

var soakLimits = map[string]string{"memory.limit": "64M", "pids.limit": "20"}

// chainName is a chain of cgroups, by its last.
func chainName(i int) string {
	return fmt.Sprintf("chain-%d", i) + strings.Repeat("/link", soakLinks-1)
}

// soakArgs are for soakLife.
type soakArgs struct {
	Sock     string
	From, To int
	Chains   int
}

// soakLife lives the lives of containers From to To-1, and returns how long the
// requests of each took.
var soakLife = harness.Inside("soak", func(a soakArgs) (times []time.Duration, err error) {
	for i := a.From; i < a.To; i++ {
		took, err := oneLife(a.Sock, fmt.Sprintf("%s/n-%d", chainName(i%a.Chains), i))
		if err != nil {
			return nil, fmt.Errorf("cycle %d: %w", i, err)
		}
		times = append(times, took)
	}
	return times, nil
})

func oneLife(sock, name string) (took time.Duration, err error) {
	pid, err := startSleeper()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, reap(pid)) }()
	ctx := context.Background()
	begin := time.Now()
	c, err := apiclient.DialAddress(ctx, sock)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if created, err := c.Create(ctx, name, soakControllers, nil); err != nil || !created {
		return 0, fmt.Errorf("Create: %v, %w", created, err)
	}
	if err := c.SetValue(ctx, name, soakLimits); err != nil {
		return 0, err
	}
	if err := c.Move(ctx, name, uint32(pid)); err != nil {
		return 0, err
	}
	if err := c.Kill(ctx, name); err != nil {
		return 0, err
	}
	if err := c.Delete(ctx, name); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

func startSleeper() (int, error) {
	return syscall.ForkExec("/bin/sleep", []string{"sleep", "600"}, &syscall.ProcAttr{Dir: "/", Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}})
}

// reap waits for a child that is killed, here if not before.
func reap(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		return err
	}
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// soakChain makes the chains From to To-1 in the container.
var soakChain = harness.Inside("soak chains", func(a soakArgs) (made int, err error) {
	ctx := context.Background()
	c, err := apiclient.DialAddress(ctx, a.Sock)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for i := a.From; i < a.To; i++ {
		if _, err := c.Create(ctx, chainName(i), soakControllers, nil); err != nil {
			return made, err
		}
		made += soakLinks
	}
	return made, nil
})

// rawLife does by the kernel alone what a cycle is about, and returns the
// processor and wall clock time of that. It is called on a locked thread.
func rawLife(dirs, limits []string) (cpu, wall time.Duration, err error) {
	pid, err := startSleeper()
	if err != nil {
		return 0, 0, err
	}
	reaped := false
	defer func() {
		if !reaped {
			err = errors.Join(err, reap(pid))
		}
	}()
	number := strconv.Itoa(pid)
	begin, cpuBegin := time.Now(), cpuClock(unix.CLOCK_THREAD_CPUTIME_ID)
	for _, d := range dirs {
		if err := unix.Mkdir(d, 0o755); err != nil {
			return 0, 0, err
		}
	}
	for i, l := range limits {
		if err := writeFile(l, []string{"67108864", "20"}[i]); err != nil {
			return 0, 0, err
		}
	}
	for _, d := range dirs {
		if err := writeFile(filepath.Join(d, "cgroup.procs"), number); err != nil {
			return 0, 0, err
		}
	}
	reaped = true
	if err := reap(pid); err != nil {
		return 0, 0, err
	}
	for _, d := range dirs {
		if err := unix.Rmdir(d); err != nil {
			return 0, 0, fmt.Errorf("rmdir %s: %w", d, err)
		}
	}
	return cpuClock(unix.CLOCK_THREAD_CPUTIME_ID) - cpuBegin, time.Since(begin), nil
}

// cpuClock reads a clock of processor time.
func cpuClock(clock int32) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(clock, &ts); err != nil {
		panic(err) // the process is there
	}
	return time.Duration(ts.Nano())
}

// processClock is the clock of the processor time of all threads of a process,
// also of those that have ended (clock_getcpuclockid(3)).
func processClock(pid int) int32 { return int32(^pid<<3 | 2) }

// footprint is what a program holds.
type footprint struct{ rss, fds, threads int }

func footprintOf(t *testing.T, pid int) (f footprint) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
		switch k {
		case "VmRSS":
			f.rss = n << 10
		case "Threads":
			f.threads = n
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil || f.rss == 0 || f.threads == 0 {
		t.Fatalf("process %d: %+v, %v", pid, f, err)
	}
	f.fds = len(fds)
	return f
}

// soaked is what was measured in some cycles: one entry for each block.
type soaked struct {
	daemon, proxy []footprint
	// cpu and wall are times of a cycle as ratios to the kernel's own.
	cpu, wall []float64
	// byDaemon, byProxy and byKernel are the processor time of a cycle, in µs.
	byDaemon, byProxy, byKernel []float64
}

// TestKernelSoak: nothing grows, and nothing becomes slower.
func TestKernelSoak(t *testing.T) {
	harness.Require(t, "root", "userns")
	cycles, warmUp, chains, alive := soakCycles, soakWarmUp, soakChains, 1000
	if testing.Short() {
		cycles, warmUp, chains, alive = 400, 40, 10, 90
	}
	if harness.Emulated() {
		cycles = 160
	}
	window := min(soakWindow, cycles/2)
	w := &world{T: t, Tree: harness.NewTree(t), d: harness.StartDaemon(t, "--log-level", "info")}
	b := w.box("c1")
	x := startProxy(t, b.Proc, w.d.Sock, "--log-level", "info")

	var made int
	if err := b.Run(soakChain, soakArgs{Sock: x.sock, To: chains}, &made); err != nil || made < alive {
		t.Fatalf("%d cgroups: %v", made, err)
	}
	deepest := chainName(0) + "/n-0"
	if depth := strings.Count(w.Path("c1/"+deepest), "/"); depth != 12 {
		t.Fatalf("%s is in depth %d", deepest, depth)
	}
	var hs []harness.Hierarchy
	for _, ctrl := range soakControllers {
		if h := harness.Find(t, ctrl); !slices.Contains(hs, h) {
			hs = append(hs, h)
		}
	}
	raw := "raw"
	w.MakeIn(raw, 0, 0, hs...)
	for range soakLinks {
		raw += "/link"
		w.MakeIn(raw, 0, 0, hs...)
	}
	w.MakeIn(raw+"/beside", 0, 0, hs...) // so that the one above gives controllers away
	raw += "/n"
	var dirs, limits []string
	for _, h := range hs {
		dirs = append(dirs, w.Dir(h, raw))
	}
	for ctrl, file := range map[string]string{"memory": "memory.limit_in_bytes", "pids": "pids.max"} {
		h := harness.Find(t, ctrl)
		limits = append(limits, filepath.Join(w.Dir(h, raw), h.File(file)))
	}
	slices.Sort(limits) // memory before pids

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	daemonClock, proxyClock := processClock(w.d.PID), processClock(x.pid)
	var first, last, all soaked
	began := time.Now()
	tolerated := soakTime
	if harness.Emulated() {
		tolerated = soakTimeEmulated
	}
	slower := func() bool { return median(last.cpu) > median(first.cpu)*tolerated }
	more := soakMore
	for i := -warmUp; i < cycles; i += soakBlock {
		daemonBefore, proxyBefore := cpuClock(daemonClock), cpuClock(proxyClock)
		var walls []time.Duration
		from := i + warmUp
		if err := b.Run(soakLife, soakArgs{x.sock, from, from + soakBlock, chains}, &walls); err != nil {
			t.Fatal(err)
		}
		daemon := float64(cpuClock(daemonClock)-daemonBefore) / soakBlock
		proxy := float64(cpuClock(proxyClock)-proxyBefore) / soakBlock
		var rawCPU, rawWalls []time.Duration
		for range soakBlock {
			c, wall, err := rawLife(dirs, limits)
			if err != nil {
				t.Fatal(err)
			}
			rawCPU, rawWalls = append(rawCPU, c), append(rawWalls, wall)
		}
		if i < 0 {
			continue
		}
		floor := 0.0
		for _, c := range rawCPU {
			floor += float64(c) / soakBlock
		}
		for _, s := range []struct {
			*soaked
			in bool
		}{{&first, i < window}, {&last, i >= cycles-window}, {&all, true}} {
			if s.in {
				s.daemon, s.proxy = append(s.daemon, footprintOf(t, w.d.PID)), append(s.proxy, footprintOf(t, x.pid))
				s.cpu = append(s.cpu, (daemon+proxy)/floor)
				s.wall = append(s.wall, float64(median(walls))/float64(median(rawWalls)))
				s.byDaemon, s.byProxy, s.byKernel = append(s.byDaemon, daemon/1e3), append(s.byProxy, proxy/1e3), append(s.byKernel, floor/1e3)
			}
		}
		if i+soakBlock >= cycles && more > 0 && !testing.Short() && slower() {
			more, cycles, last = more-1, cycles+window, soaked{}
		}
	}
	t.Logf("%d cycles in %v, with %d cgroups alive; processor time of a cycle: the daemon's %.0f µs, the proxy's %.0f µs, the kernel's own %.0f µs",
		cycles, time.Since(began).Round(time.Second), made, median(all.byDaemon), median(all.byProxy), median(all.byKernel))
	for name, of := range map[string]struct {
		pid    int
		blocks func(soaked) []footprint
	}{
		"daemon": {w.d.PID, func(s soaked) []footprint { return s.daemon }},
		"proxy":  {x.pid, func(s soaked) []footprint { return s.proxy }},
	} {
		was, is := typical(of.blocks(first)), typical(of.blocks(last))
		// After each block the last connection may have been open yet.
		eventually(t, fmt.Sprintf("the %s has no more than %d files open", name, was.fds), func() bool {
			is.fds = min(is.fds, footprintOf(t, of.pid).fds)
			return is.fds <= was.fds
		})
		t.Logf("%s: %d KiB, %d files, %d threads; in the last %d cycles %d KiB, %d, %d", name,
			was.rss>>10, was.fds, was.threads, window, is.rss>>10, is.fds, is.threads)
		grown := soakRSS
		if testing.Short() || harness.Emulated() {
			grown *= 4 // so early a heap still finds its size
		}
		if is.rss > was.rss+grown || is.fds > was.fds || is.threads > was.threads+soakThreads {
			t.Errorf("the %s grows: %+v, then %+v", name, was, is)
		}
	}
	t.Logf("ratio of processor time %.2f, then %.2f; of the wall clock's %.2f, then %.2f",
		median(first.cpu), median(last.cpu), median(first.wall), median(last.wall))
	if testing.Short() {
		return // too few for a median
	}
	// The clock on the wall shows what else the machine does.
	if slower() {
		t.Errorf("a cycle takes %.2f times the kernel's own processor time, %.2f in the beginning", median(last.cpu), median(first.cpu))
	}
}

// typical returns medians, and the least number of files: what was open in
// between is none of what is left behind.
func typical(all []footprint) (f footprint) {
	var rss, fds, threads []int
	for _, one := range all {
		rss, fds, threads = append(rss, one.rss), append(fds, one.fds), append(threads, one.threads)
	}
	return footprint{rss: median(rss), fds: slices.Min(fds), threads: median(threads)}
}

func median[T int | float64 | time.Duration](all []T) T {
	return slices.Sorted(slices.Values(all))[len(all)/2]
}
