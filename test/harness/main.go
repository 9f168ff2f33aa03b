package harness

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// puppetEnv is set in the environment of a puppet.
const puppetEnv = "CGM_TEST_PUPPET"

// Main runs the tests, or the puppet if this process is one. It does not
// return.
func Main(m *testing.M) {
	if os.Getenv(puppetEnv) != "" {
		puppetMain()
	}
	flag.Parse()
	if os.Geteuid() == 0 {
		sweepStale()
	}
	code := m.Run()
	if built.dir != "" && built.ours {
		if err := os.RemoveAll(built.dir); err != nil {
			fmt.Fprintln(os.Stderr, "harness:", err)
		}
	}
	os.Exit(code)
}

// Require skips the test if this machine lacks one of the features: "root",
// "v1", "v2", "unified" (a v2 that has the controllers, and no systemd), "userns",
// "systemd" (as the first process), "rtgroup" (a kernel that budgets realtime by
// cgroup), "sysresource" (CAP_SYS_RESOURCE), "vm" (a virtual machine, to install
// things on), "cc", or the name of another program. A feature that the environment
// variable CGM_REQUIRE lists (comma separated) must be there: its lack is a
// failure. Programs must be there as soon as it lists anything, because .ci/deps
// and test/vm/image install them.
func Require(t testing.TB, features ...string) {
	t.Helper()
	for _, f := range features {
		err := missing(f)
		if err == nil {
			continue
		}
		if required(f) {
			t.Fatalf("%s is required here: %v", f, err)
		}
		t.Skipf("needs %s: %v", f, err)
	}
}

// Has reports whether this machine has a feature of Require's, for a test that shows
// what happens with it and without.
func Has(feature string) bool { return missing(feature) == nil }

func required(feature string) bool {
	list := os.Getenv("CGM_REQUIRE")
	switch feature {
	case "root", "v1", "v2", "unified", "userns", "systemd", "rtgroup", "sysresource", "vm":
		return slices.Contains(strings.Split(list, ","), feature)
	case Polkitd:
		// Not in the machines' image: nothing of it depends on the layout.
		return list != "" && os.Getenv("CGM_VM") == ""
	}
	return list != ""
}

func missing(feature string) error {
	switch feature {
	case "root":
		if os.Geteuid() != 0 {
			return errors.New("not root")
		}
		return nil
	case "v1", "v2":
		for _, h := range Hierarchies() {
			if h.V2 == (feature == "v2") {
				return nil
			}
		}
		return errors.New("no such hierarchy is mounted")
	case "unified":
		if _, err := os.Stat("/run/systemd/system"); err == nil {
			return errors.New("systemd delegates here")
		}
		for _, h := range Hierarchies() {
			if h.V2 && slices.Contains(h.Controllers(), "memory") {
				return nil
			}
		}
		return errors.New("cgroup v2 has no controller memory here")
	case "userns":
		b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) == "0" {
			return errors.New("user.max_user_namespaces is 0")
		}
		return nil
	case "systemd":
		if b, err := os.ReadFile("/proc/1/comm"); err != nil || string(b) != "systemd\n" {
			return fmt.Errorf("the first process is %q", b)
		}
		return nil
	case "rtgroup":
		for _, h := range Hierarchies() {
			if _, err := os.Stat(filepath.Join(h.Mount, "cpu.rt_runtime_us")); err == nil {
				return nil
			}
		}
		return errors.New("no hierarchy has cpu.rt_runtime_us")
	case "sysresource":
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData // of 32 capabilities each
		if err := unix.Capget(&header, &data[0]); err != nil {
			return err
		}
		if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
			return errors.New("no CAP_SYS_RESOURCE")
		}
		return nil
	case "vm":
		if !Emulated() {
			return errors.New("not a machine of the tests' own (make test-vm)")
		}
		return nil
	case "cc":
		if os.Getenv("CGM_BIN") != "" {
			return nil
		}
	}
	_, err := exec.LookPath(feature)
	return err
}

var built struct {
	once sync.Once
	dir  string // guarded by once
	ours bool   // guarded by once
	err  error  // guarded by once
}

// Binary returns the path of one of the programs under test, built once a
// run, or taken from the directory that the environment variable CGM_BIN
// names. Everybody may execute it.
func Binary(t testing.TB, name string) string {
	t.Helper()
	built.once.Do(func() {
		if dir := os.Getenv("CGM_BIN"); dir != "" {
			built.dir = dir
			return
		}
		built.dir, built.err = os.MkdirTemp("", "cgmtest-bin-")
		if built.err != nil {
			return
		}
		built.ours = true
		if built.err = os.Chmod(built.dir, 0o755); built.err != nil {
			return
		}
		cmd := exec.Command("go", "build", "-trimpath", "-o", built.dir, "cgmanager/cmd/...")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, name)
}

// Program returns a small static program built from a C source in the test's
// testdata directory, with the given mode (setuid bits included) and owned by
// root. It takes a compiled one from CGM_BIN where there is one.
func Program(t testing.TB, source string, mode uint32) string {
	t.Helper()
	name := strings.TrimSuffix(filepath.Base(source), ".c")
	dir := PublicDir(t)
	path := filepath.Join(dir, name)
	// With CGM_BIN there may be no compiler.
	if b, err := os.ReadFile(filepath.Join(os.Getenv("CGM_BIN"), name)); err == nil && os.Getenv("CGM_BIN") != "" {
		if err := os.WriteFile(path, b, 0o700); err != nil {
			t.Fatal(err)
		}
	} else if out, err := exec.Command("cc", "-O1", "-Wall", "-Werror", "-static", "-o", path, source).CombinedOutput(); err != nil {
		t.Fatalf("cc %s: %v\n%s", source, err, out)
	}
	// chmod(2) takes the setuid bit as a number; os.Chmod would not.
	if err := unix.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// PublicDir makes a temporary directory that every user may search, also one
// without a name in a user namespace, and removes it after the test.
func PublicDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cgmtest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Emulated says that the machine is an emulated one, which is many times slower.
func Emulated() bool { return os.Getenv("CGM_VM") != "" }

// machines are the kinds of emulated machine.
var machines = []string{"legacy", "split", "hybrid", "unified", "unified-6.12", "systemd-unified", "systemd-hybrid"}

// Share returns all, or, in an emulated machine, one of so many parts: what takes
// long and depends on the layout little is spread over the kinds.
func Share[T any](all []T, parts int) []T {
	if !Emulated() {
		return all
	}
	first, n := max(slices.Index(machines, os.Getenv("CGM_VM")), 0)%parts, 0
	return slices.DeleteFunc(all, func(T) bool {
		n++
		return n%parts != first
	})
}

// Rounds returns n, or far fewer with -short.
func Rounds(n int) int {
	if testing.Short() {
		return max(n/20, 1)
	}
	return n
}
