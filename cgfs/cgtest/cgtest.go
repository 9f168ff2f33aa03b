// Package cgtest helps tests that run against the real kernel: it says what a
// test needs, names cgroups that are the test's own, starts tasks to put into
// them, and cleans up. It uses plain files, not package cgfs, so that the
// tests of cgfs see it from outside.
package cgtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Requirement is something that a machine may lack.
type Requirement string

// The requirements.
const (
	Root    Requirement = "root"    // uid 0 of the first user namespace
	V1      Requirement = "v1"      // v1 hierarchies of memory, freezer, cpu and cpuset
	V2      Requirement = "v2"      // a cgroup2 mount
	Unified Requirement = "unified" // a cgroup2 mount that has the controllers
	Userns  Requirement = "userns"  // user namespaces may be made
)

// Require skips the test if the machine lacks something. Where the environment
// variable CGM_REQUIRE lists it ("root,v1,v2,userns"), the test fails instead.
func Require(t testing.TB, rs ...Requirement) {
	t.Helper()
	must := strings.Split(os.Getenv("CGM_REQUIRE"), ",")
	for _, r := range rs {
		err := lacks(r)
		if err == nil {
			continue
		}
		if slices.Contains(must, string(r)) {
			t.Fatalf("CGM_REQUIRE lists %s: %v", r, err)
		}
		t.Skipf("needs %s: %v", r, err)
	}
}

func lacks(r Requirement) error {
	switch r {
	case Root:
		if os.Geteuid() != 0 {
			return errors.New("not root")
		}
		m, err := os.ReadFile("/proc/self/uid_map")
		if err != nil {
			return err
		}
		if f := strings.Fields(string(m)); len(f) != 3 || f[2] != "4294967295" {
			return errors.New("in a user namespace")
		}
	case V1:
		for _, c := range []string{"memory", "freezer", "cpu", "cpuset"} {
			if _, v2, err := mountPoint(c); err != nil {
				return err
			} else if v2 {
				return fmt.Errorf("cgroup v2 has %s", c)
			}
		}
	case V2:
		_, _, err := mountPoint("unified")
		return err
	case Unified:
		if _, v2, err := mountPoint("memory"); err != nil || !v2 {
			return errors.New("cgroup v2 has no controller memory here")
		}
	case Userns:
		b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) == "0" {
			return errors.New("user.max_user_namespaces is 0")
		}
	default:
		return fmt.Errorf("unknown requirement %q", r)
	}
	return nil
}

// Mount returns where a controller (or name=X) is mounted on v1, or cgroup2 if
// that has it, or with "unified" cgroup2 in any case.
func Mount(t testing.TB, controller string) string {
	t.Helper()
	p, _, err := mountPoint(controller)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// OnV2 reports whether cgroup2 has the controller.
func OnV2(t testing.TB, controller string) bool {
	t.Helper()
	_, v2, err := mountPoint(controller)
	if err != nil {
		t.Fatal(err)
	}
	return v2
}

// Has reports whether a controller is mounted, on v1 or v2.
func Has(controller string) bool {
	_, _, err := mountPoint(controller)
	return err == nil
}

// Own is the cgroup in which the test was started, as a directory of the
// controller's hierarchy. If a daemon has since moved the test into a hidden
// leaf of it, that does not count.
func Own(t testing.TB, controller string) string {
	t.Helper()
	hierarchy := controller
	if OnV2(t, controller) {
		hierarchy = "unified"
	}
	for _, h := range started {
		if slices.Contains(strings.Split(h.controllers, ","), hierarchy) {
			return filepath.Join(Mount(t, controller), h.path)
		}
	}
	t.Fatalf("no cgroup in %s", controller)
	return ""
}

// OwnEverywhere is Own in every hierarchy that is mounted.
func OwnEverywhere(t testing.TB) []string {
	t.Helper()
	var dirs []string
	for _, h := range started {
		if c := first(strings.Split(h.controllers, ",")); Has(c) {
			dirs = append(dirs, Own(t, c))
		}
	}
	return dirs
}

// started is the cgroups that the test was started in, by hierarchy.
var started = func() (all []struct{ controllers, path string }) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			panic("/proc/self/cgroup: " + line)
		}
		if f[0] == "0" {
			f[1] = "unified"
		}
		if strings.HasPrefix(filepath.Base(f[2]), ".cgmanager-leaf") {
			f[2] = filepath.Dir(f[2])
		}
		all = append(all, struct{ controllers, path string }{f[1], f[2]})
	}
	return all
}()

// mountPoint finds the mount of a controller, and says whether it is cgroup2.
func mountPoint(controller string) (point string, v2 bool, err error) {
	points, err := mountPoints(func(fstype string, options []string) bool {
		return fstype == "cgroup" && slices.Contains(options, controller)
	})
	if err != nil || len(points) > 0 {
		return first(points), false, err
	}
	points, err = mountPoints(func(fstype string, _ []string) bool { return fstype == "cgroup2" })
	if err != nil {
		return "", false, err
	}
	if len(points) > 0 {
		b, err := os.ReadFile(filepath.Join(points[0], "cgroup.controllers"))
		if err != nil || core(controller) || slices.Contains(strings.Fields(string(b)), onV2(controller)) {
			return points[0], true, err
		}
	}
	return "", false, fmt.Errorf("%s is not mounted", controller)
}

// core reports whether v2 itself does what on v1 is a controller's.
func core(controller string) bool {
	return slices.Contains([]string{"unified", "freezer", "devices", "cpuacct"}, controller)
}

// onV2 is the name of a controller there.
func onV2(controller string) string {
	if controller == "blkio" {
		return "io"
	}
	return controller
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

func mountPoints(want func(fstype string, options []string) bool) ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var points []string
	for line := range strings.Lines(string(info)) {
		f := strings.Fields(line)
		i := slices.Index(f, "-")
		if i < 5 || i+3 >= len(f) {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		if want(f[i+1], strings.Split(f[i+3], ",")) {
			points = append(points, f[4])
		}
	}
	return points, nil
}

var serial atomic.Int64

// Name returns the name of a cgroup of the test's own, unique on the machine.
// At the end of the test whatever cgroups have it are removed, in every
// hierarchy, with all below. Tasks in them must be the test's own (Child) and
// end before; make the name first.
func Name(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("cgmtest-%d-%d", os.Getpid(), serial.Add(1))
	t.Cleanup(func() {
		points, err := mountPoints(func(fstype string, _ []string) bool {
			return fstype == "cgroup" || fstype == "cgroup2"
		})
		if err != nil {
			t.Error(err)
		}
		for _, p := range points {
			if err := removeAll(filepath.Join(p, name)); err != nil {
				t.Errorf("clean up: %v", err)
			}
		}
	})
	return name
}

// removeAll removes a cgroup with all below. A task that was killed leaves its
// cgroup only when it has been torn down.
func removeAll(dir string) error {
	thaw(dir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeAll(filepath.Join(dir, e.Name())))
		}
	}
	if err != nil {
		return err
	}
	if Until(5*time.Second, 10*time.Millisecond, func() bool {
		err = os.Remove(dir)
		return err == nil || errors.Is(err, fs.ErrNotExist)
	}) {
		return nil
	}
	return err
}

func thaw(dir string) {
	for file, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
		if f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0); err == nil {
			_, _ = f.WriteString(value)
			_ = f.Close()
		}
	}
}

// Discard gets rid of a named v1 hierarchy ("name=X") at the end of the test.
// The kernel keeps one that had a child when it was unmounted last, and a child
// that was removed counts as one until the kernel has freed it; then it takes
// another mount to let go of it. Who holds it must have closed it by then.
func Discard(t testing.TB, token string) {
	t.Helper()
	dir := t.TempDir()
	listed := func() bool {
		self, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(self), ":"+token+":")
	}
	t.Cleanup(func() {
		for end, round := time.Now().Add(Patience(20*time.Second)), 1; time.Now().Before(end); round++ {
			// It goes a while after it was unmounted, and a mount in the
			// meantime would only make another: longer each time, for a slow machine.
			for range 50 * round {
				if !listed() {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
			_ = exec.Command("unshare", "-m", "sh", "-c", `mount -t cgroup -o "none,$1" none "$2" && umount "$2"`, "sh", token, dir).Run()
		}
		t.Errorf("the hierarchy %s is left behind", token)
	})
}

// Child starts a program, without arguments one that sleeps, and returns its
// pid. It is killed at the end of the test, out of a frozen cgroup too if that
// is the test's own.
func Child(t testing.TB, argv ...string) int {
	t.Helper()
	if len(argv) == 0 {
		argv = []string{"sleep", "300"}
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		thawTask(pid)
		_ = cmd.Wait()
	})
	return pid
}

func thawTask(pid int) {
	self, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(self)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || !strings.Contains(f[2], "/cgmtest-") {
			continue
		}
		if f[1] == "" {
			f[1] = "unified"
		}
		if p, _, err := mountPoint(strings.Split(f[1], ",")[0]); err == nil {
			for dir := f[2]; strings.Contains(dir, "/cgmtest-"); dir = filepath.Dir(dir) {
				thaw(filepath.Join(p, dir))
			}
		}
	}
}

// Patience is how long to allow for what takes d at most on a machine that has
// nothing else to do: longer by as much as more wants to run (the load average
// of the last minute, sysinfo(2)) than there are processors, and in an emulated
// machine, which the environment variable CGM_VM tells of.
func Patience(d time.Duration) time.Duration {
	if os.Getenv("CGM_VM") != "" {
		d *= 20
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return d
	}
	load := float64(info.Loads[0]) / (1 << 16)
	return time.Duration(float64(d) * max(1, load/float64(runtime.NumCPU())))
}

// NoLeaks fails the test if it ends with more open descriptors or goroutines
// than it had. Call it first; tests that use it do not run in parallel.
func NoLeaks(t testing.TB) {
	t.Helper()
	fds, routines := openFDs(t), runtime.NumGoroutine()
	t.Cleanup(func() {
		var f, r int
		// Goroutines need a moment to end.
		if !Until(3*time.Second, 10*time.Millisecond, func() bool {
			f, r = openFDs(t), runtime.NumGoroutine()
			return f <= fds && r <= routines
		}) {
			t.Errorf("leak: %d descriptors were open, now %d; %d goroutines, now %d", fds, f, routines, r)
		}
	})
}

func openFDs(t testing.TB) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Error(err)
	}
	return len(entries)
}

// headlessEnv makes a test program a process without its first thread.
const headlessEnv = "CGMTEST_HEADLESS"

// The first thread ends while the program is set up: that is the one that init
// runs on.
func init() {
	if os.Getenv(headlessEnv) == "" {
		return
	}
	go func() {
		time.Sleep(5 * time.Minute)
		os.Exit(0)
	}()
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
}

// Headless starts a process whose first thread has exited and whose second
// goes on, in dir of any hierarchy, and returns its pid. The kernel says of the
// first thread from then on that its v1 cgroups are "/".
func Headless(t testing.TB, dir string) int {
	t.Helper()
	pid := Child(t, "env", headlessEnv+"=1", "/proc/"+strconv.Itoa(os.Getpid())+"/exe")
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + strconv.Itoa(pid)
	for end := time.Now().Add(Patience(10 * time.Second)); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(proc + "/status")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "State:\tZ") {
			if tasks, err := os.ReadDir(proc + "/task"); err != nil || len(tasks) < 2 {
				t.Fatalf("no thread but the first: %v", err)
			}
			return pid
		}
	}
	t.Fatal("the first thread does not end")
	return 0
}

// Eventually waits for a condition, as long as within, and longer on a slow machine.
// It is an error if it does not come.
func Eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	if !Until(within, 5*time.Millisecond, ok) {
		t.Errorf("%s: not within %v", what, within)
	}
}

// Until looks every so often whether a condition holds, as long as within, and longer
// on a slow machine, and says whether it came.
func Until(within, every time.Duration, ok func() bool) bool {
	for end := time.Now().Add(Patience(within)); ; time.Sleep(every) {
		// It is looked once more after the end: who looks may have stood still until then.
		late := time.Now().After(end)
		if ok() {
			return true
		}
		if late {
			return false
		}
	}
}
