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
	Root   Requirement = "root"   // uid 0 of the first user namespace
	V1     Requirement = "v1"     // v1 hierarchies of memory, freezer, cpu and cpuset
	V2     Requirement = "v2"     // a cgroup2 mount
	Userns Requirement = "userns" // user namespaces may be made
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
			if _, err := mountPoint(c); err != nil {
				return err
			}
		}
	case V2:
		_, err := mountPoint("unified")
		return err
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

// Mount returns where a v1 controller (or name=X) is mounted, or with
// "unified" cgroup2.
func Mount(t testing.TB, controller string) string {
	t.Helper()
	p, err := mountPoint(controller)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func mountPoint(controller string) (string, error) {
	points, err := mountPoints(func(fstype string, options []string) bool {
		return controller == "unified" && fstype == "cgroup2" ||
			fstype == "cgroup" && slices.Contains(options, controller)
	})
	if err == nil && len(points) == 0 {
		err = fmt.Errorf("%s is not mounted", controller)
	}
	if err != nil {
		return "", err
	}
	return points[0], nil
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
	for range 200 {
		if err = os.Remove(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
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
		for range 20 {
			// It goes a while after it was unmounted, and a mount in the
			// meantime would only make another.
			for range 50 {
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
		if p, err := mountPoint(strings.Split(f[1], ",")[0]); err == nil {
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
		d *= 5
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
		for range 100 { // goroutines need a moment to end
			f, r = openFDs(t), runtime.NumGoroutine()
			if f <= fds && r <= routines {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("leak: %d descriptors were open, now %d; %d goroutines, now %d", fds, f, routines, r)
	})
}

func openFDs(t testing.TB) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Error(err)
	}
	return len(entries)
}

// Headless starts a process whose first thread has exited and whose second
// goes on, in dir of a v1 hierarchy, and returns its pid. The kernel says of the
// first thread from then on that it is in "/".
func Headless(t testing.TB, dir string) int {
	t.Helper()
	const program = `import ctypes, threading, time
threading.Thread(target=time.sleep, args=(300,)).start()
ctypes.CDLL(None).pthread_exit(None)`
	pid := Child(t, "python3", "-c", program)
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "State:\tZ") {
			return pid
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the first thread does not end")
	return 0
}
