package packaging_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

const runSocket = "/run/cgmanager/sock"

// sockets are the addresses at which a host of this kind is served.
func sockets(t *testing.T) []string {
	t.Helper()
	s := []string{runSocket, "/sys/fs/cgroup/cgmanager/sock"}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		s = append(s, "/sys/fs/cgroup/manager")
	}
	return s
}

// sh runs a script and returns what it printed.
func sh(t *testing.T, script string) string {
	t.Helper()
	out, code := try(t, script)
	if code != 0 {
		t.Fatalf("%s\n%d: %s", script, code, out)
	}
	return out
}

func try(t *testing.T, script string) (string, int) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-ec", script)
	// The runlevel is what sysvinit would note; systemd does not ask.
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=2", "PREVLEVEL=N")
	cmd.WaitDelay = cgtest.Patience(5 * time.Second) // a daemon that keeps our output open
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrWaitDelay) {
		t.Errorf("%s\na process that it left holds its output open", script)
	} else if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	cgtest.Eventually(t, 10*time.Second, what, ok)
}

// deb returns the path of the package: the first one, or the later one.
func deb(t *testing.T, dir string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(os.Getenv("CGM_DEBS"), dir, "cgmanager_*.deb"))
	if err != nil || len(found) != 1 {
		t.Fatalf("packages in CGM_DEBS=%q: %q, %v", os.Getenv("CGM_DEBS"), found, err)
	}
	return found[0]
}

// served checks that every address is served, and returns who serves them.
func served(t *testing.T) int {
	t.Helper()
	for _, s := range sockets(t) {
		if err := harness.Ping(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	return daemon(t)
}

// daemon returns the daemon's number: it is the only process of this name, once one
// that it has replaced has ended.
func daemon(t *testing.T) (pid int) {
	t.Helper()
	var out string
	eventually(t, "there is one daemon", func() bool {
		out = sh(t, "ps -eo pid=,comm=,args= | awk '$2 == \"cgmanager\" && !/--hold-scope|--realtime-watchdog/ {print $1}'")
		var err error
		pid, err = strconv.Atoi(strings.TrimSpace(out))
		return err == nil
	})
	if pid == 0 {
		t.Fatalf("daemons: %q", out)
	}
	return pid
}

// noDaemon says whether there is none, nor one that has ended and that nobody has
// waited for yet.
func noDaemon(t *testing.T) func() bool {
	return func() bool {
		_, code := try(t, "pgrep -x cgmanager")
		return code == 1
	}
}

// knocking connects again and again, each time with a request, until the
// function that it returns is called: that one returns how often, and the errors.
func knocking() (stop func() (int, []error)) {
	end := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	n, errs := 0, []error(nil)
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				time.Sleep(30 * time.Millisecond) // there is other work to do
				err := harness.Ping(runSocket)
				// Who has connected to a daemon that ends, and asks after
				// that, is surely not served, and connects again: once.
				if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
					err = harness.Ping(runSocket)
				}
				mu.Lock()
				n++
				if err != nil {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	return func() (int, []error) {
		close(end)
		wg.Wait()
		return n, errs
	}
}

// TestKernelPackage installs the Debian package, uses it, upgrades it and purges
// it, as an administrator would, under systemd or with init scripts.
func TestKernelPackage(t *testing.T) {
	harness.Require(t, "root", "vm")
	_, err := os.Stat("/run/systemd/system")
	systemd := err == nil
	before := cgroups(t)
	// Others come and go.
	const mounted = "cut -d' ' -f4,5 /proc/self/mountinfo | grep 'cgm\\|/sys/fs/cgroup' | sort"
	mounts := sh(t, mounted)
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := try(t, `dpkg --purge cgmanager; cat /var/log/cgmanager.log || true
				[ ! -d /run/systemd/system ] || journalctl --no-pager -n 60 -u 'cgmanager*'`)
			t.Log(out)
		}
	})

	sh(t, "dpkg -i "+deb(t, ""))
	pid := served(t)
	if out := sh(t, "cgmanager --version; cgproxy --version; cgm --version"); strings.Count(out, "1.0~test1\n") != 3 {
		t.Errorf("versions: %q", out)
	}
	files := strings.Fields(sh(t, "dpkg -L cgmanager"))
	if systemd {
		state(t, "cgmanager.socket", "active", "enabled")
		state(t, "cgmanager.service", "active", "enabled")
		state(t, "cgproxy.service", "inactive", "enabled") // this is no container
		exposure(t)
	} else {
		sh(t, "/etc/init.d/cgmanager status; /etc/init.d/cgmanager start") // once more is no error
		if got := daemon(t); got != pid {
			t.Errorf("a second start: %d, before %d", got, pid)
		}
		if out, code := try(t, "/etc/init.d/cgproxy start"); code != 0 || !strings.Contains(out, "Not starting") {
			t.Errorf("the proxy, which is for containers: %d, %q", code, out)
		}
		inContainer(t)
	}
	use(t, systemd)
	realtime(t, systemd)

	// What runs goes on, with its limit.
	live := start(t, systemd)
	alive := func(when string) {
		t.Helper()
		if got := live.limit(t); got != "50" {
			t.Errorf("%s the limit is %q", when, got)
		}
	}
	alive("at first")
	knocks := knocking()
	sh(t, "dpkg -i "+deb(t, "later"))
	n, errs := knocks()
	if len(errs) > 0 || n == 0 {
		t.Errorf("of %d connections while it was upgraded failed %d: %v", n, len(errs), errs[:min(len(errs), 3)])
	}
	t.Logf("%d connections during the upgrade", n)
	later := served(t)
	if later == pid {
		t.Errorf("the old daemon (%d) still serves", pid)
	}
	if out := sh(t, "cgm --version; readlink /proc/"+strconv.Itoa(later)+"/exe"); !strings.Contains(out, "1.0~test2\n/usr/sbin/cgmanager\n") {
		t.Errorf("after the upgrade: %q", out)
	}
	alive("after the upgrade")

	t.Run("killed", func(t *testing.T) {
		if err := unix.Kill(later, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if systemd {
			if err := harness.Ping(runSocket); err != nil { // it waits in the socket
				t.Error(err)
			}
		} else {
			if out, code := try(t, "/etc/init.d/cgmanager status"); code != 1 {
				t.Errorf("status of a daemon that was killed: %d, %q", code, out)
			}
			sh(t, "/etc/init.d/cgmanager start")
		}
		if got := served(t); got == later {
			t.Error("it was not killed")
		}
		alive("after kill -9")
	})
	t.Run("stopped", func(t *testing.T) {
		control(t, systemd, "stop")
		if !systemd {
			eventually(t, "no daemon is left", noDaemon(t))
		}
		for _, s := range sockets(t) {
			if err := harness.Ping(s); err == nil {
				t.Errorf("%s is served", s)
			}
		}
		if out, code := try(t, "/etc/init.d/cgmanager status"); code == 0 && !systemd {
			t.Errorf("status: %d, %q", code, out)
		}
		control(t, systemd, "start")
		served(t)
		control(t, systemd, "restart")
		served(t)
		alive("after a restart")
	})

	sh(t, "dpkg --remove cgmanager")
	if err := harness.Ping(runSocket); err == nil {
		t.Error("it is served after the removal")
	}
	sh(t, "dpkg --purge cgmanager")
	alive("after the purge")
	live.end(t)
	for _, f := range append(files, "/run/cgmanager", "/run/cgmanager.private", "/sys/fs/cgroup/cgmanager", "/sys/fs/cgroup/manager",
		"/var/log/cgmanager.log", "/var/log/cgproxy.log") {
		if !regexp.MustCompile("cgm|cgproxy|/cgroup/").MatchString(f) {
			continue // a directory of others
		}
		if _, err := os.Lstat(f); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", f, err)
		}
	}
	if out := sh(t, "find /etc /lib/systemd /usr /var/lib/systemd /var/lib/dpkg/info -name '*cgmanager*' -o -name '*cgproxy*'"); out != "" {
		t.Errorf("left is\n%s", out)
	}
	eventually(t, "nothing is left running", func() bool {
		return sh(t, "ps -eo comm= | grep -x 'cgmanager\\|cgproxy' || true") == ""
	})
	if got := sh(t, mounted); got != mounts {
		t.Errorf("mounts after it\n%s\nbefore\n%s", got, mounts)
	}
	var now []string
	for end := time.Now().Add(cgtest.Patience(5 * time.Second)); !slices.Equal(now, before); now = cgroups(t) {
		time.Sleep(20 * time.Millisecond)
		if time.Now().After(end) {
			t.Fatalf("cgroups after it\n%s\nbefore\n%s", strings.Join(now, "\n"), strings.Join(before, "\n"))
		}
	}
}

// inContainer uses the package's scripts in a container that has the host's files,
// and the directory of its socket.
func inContainer(t *testing.T) {
	t.Helper()
	out := sh(t, `cgm run ct -- env container=test unshare -m -p -f -C --mount-proc sh -ec '
		mkdir -p /tmp/aside
		mount --bind /run/cgmanager /tmp/aside
		mount -t tmpfs run /run
		mount -t tmpfs nothing /sys/fs/cgroup/cgmanager
		mkdir /run/cgmanager
		/etc/init.d/cgproxy start # has nothing to serve yet
		mount --bind -o ro /tmp/aside /run/cgmanager
		/etc/init.d/cgmanager start
		/etc/init.d/cgproxy start
		CGMANAGER_ADDRESS=/run/cgproxy/sock cgm ping # it serves at once
		/etc/init.d/cgproxy status
		cgm create all x
		cgm run y --set pids.limit=9 -- cgm get "" pids.limit
		cgm remove all x
		/etc/init.d/cgproxy stop
		[ ! -e /run/cgmanager.lower/sock ]
		[ ! -e /run/cgproxy.pid ]
		umount /tmp/aside
		' </dev/null; rmdir /tmp/aside`)
	if strings.Count(out, "Not starting") != 2 || !strings.Contains(out, "cgproxy is running.\n9\n") {
		t.Errorf("in a container: %s", out)
	}
}

func control(t *testing.T, systemd bool, verb string) {
	t.Helper()
	switch {
	case !systemd:
		sh(t, "/etc/init.d/cgmanager "+verb)
	case verb == "stop":
		sh(t, "systemctl stop cgmanager.service cgmanager.socket")
	default:
		sh(t, "systemctl "+verb+" cgmanager.service")
	}
}

// cgroups lists all cgroups of the host but those of systemd's units, which come
// and go.
func cgroups(t *testing.T) []string {
	t.Helper()
	var dirs []string
	for _, h := range harness.Hierarchies() {
		err := filepath.WalkDir(h.Mount, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || !d.IsDir() {
				return err
			}
			switch filepath.Ext(path) {
			case ".slice", ".service", ".scope", ".mount", ".socket":
				return fs.SkipDir
			}
			dirs = append(dirs, path)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(dirs)
	return dirs
}

func state(t *testing.T, unit, active, enabled string) {
	t.Helper()
	out, _ := try(t, "systemctl is-active "+unit+" || true; systemctl is-enabled "+unit)
	if out != active+"\n"+enabled+"\n" {
		t.Errorf("%s: %q, want %s and %s", unit, out, active, enabled)
	}
}

// exposure has systemd judge the service: it is green below 5.
func exposure(t *testing.T) {
	t.Helper()
	out := sh(t, "systemd-analyze security --no-pager cgmanager.service")
	m := regexp.MustCompile(`Overall exposure level for cgmanager.service: ([0-9.]+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("systemd-analyze security: %s", out)
	}
	if e, err := strconv.ParseFloat(m[1], 64); err != nil || e > 4 {
		t.Errorf("exposure %s:\n%s", m[1], out)
	}
	t.Logf("exposure %s", m[1])
}

// use does a bit of everything with the daemon that is installed: under systemd
// it has few capabilities and a filter of system calls.
func use(t *testing.T, systemd bool) {
	t.Helper()
	script := `set -e
	cgm status >/dev/null
	cgm run demo --set memory.limit=100M --set pids.limit=50 -- cgm get '' memory.limit pids.limit
	cgm run batch -- sleep 300 &
	for i in $(seq 300); do cgm gettasks all batch 2>/dev/null | grep -q . && break; sleep 0.1; done
	cgm freeze batch; for i in $(seq 300); do cgm get batch state | grep -x frozen && break; sleep 0.1; done; cgm thaw batch; cgm kill batch
	cgm create all alice; cgm chown all alice 1000 1000
	cgm set alice 'devices_blacklist=c 1:5 rwm' cpus_allowed=0
	sh -c 'cgm movepid all alice $$
		exec setpriv --reuid 1000 --regid 1000 --clear-groups cgm run job --set memory.limit=64M -- sh -c "
			! head -c 1 /dev/zero 2>/dev/null && echo no zero"'
	sh -c 'cgm movepid all alice $$
		exec setpriv --reuid 1000 --regid 1000 --clear-groups unshare -U -r -p -f --mount-proc \
			cgm run job --set pids.limit=20 -- cgm get "" pids.limit'
	sh -c 'cgm movepid all alice $$
		exec setpriv --reuid 1000 --regid 1000 --clear-groups unshare -U -r -p -f -C --mount-proc \
			sh -c "cgm create all a/b && cgm set a/b pids.limit=7 && cgm get a/b pids.limit && cgm chown all a 0 0 && cgm remove all a 1"'
	sh -c 'cgm movepid all alice $$
		exec setpriv --reuid 1000 --regid 1000 --clear-groups cgm delegate ci --set pids.limit=30 -- echo delegated' 2>/dev/null
	cgm remove all alice 1
	`
	want := "memory.limit=104857600\npids.limit=50\nfrozen\nno zero\n20\n7\ndelegated\n"
	in := ""
	if systemd {
		in = "systemd-run --quiet --collect --pipe --wait -p Delegate=yes " // it acts in what is delegated
	}
	file := filepath.Join(t.TempDir(), "use")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := sh(t, in+"sh "+file+" </dev/null"); out != want {
		t.Errorf("it said\n%s\nwant\n%s", out, want)
	}
}

// realtime has the daemon that is installed give realtime and limits: under systemd
// with few capabilities and a filter of system calls, and by D-Bus activation.
func realtime(t *testing.T, systemd bool) {
	t.Helper()
	want := "SCHED_RR|SCHED_RESET_ON_FORK"
	if out := sh(t, "cgm rt run --priority 10 -- sh -c 'chrt -p $$'"); !strings.Contains(out, want) {
		t.Errorf("granted: %q", out)
	}
	reload := "kill -HUP $(cat /run/cgmanager.private/lock)"
	if systemd {
		reload = "systemctl reload cgmanager"
	}
	sh(t, `cat >/etc/cgmanager/realtime.toml <<'END'
[[rule]]
uid = 1000
container = "any"
limits = { rtprio = 60, memlock = "64M" }
END
`+reload)
	given := "setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'cgm rt limits $$ >/dev/null && ulimit -l && chrt -f 30 chrt -p 0'"
	eventually(t, "the limits of the new policy", func() bool {
		out, _ := try(t, given)
		return strings.HasPrefix(out, "65536\n") && strings.Contains(out, "SCHED_FIFO")
	})
	sh(t, "cgm rt reset")
	if !systemd {
		return
	}
	const get = "busctl get-property org.freedesktop.RealtimeKit1 /org/freedesktop/RealtimeKit1 org.freedesktop.RealtimeKit1 MinNiceLevel"
	property := func(when string) {
		t.Helper()
		if out, code := try(t, get); out != "i -15\n" {
			t.Errorf("%s on the system bus: %d, %q", when, code, out)
		}
	}
	property("at first")
	if out, code := try(t, "setpriv --reuid 1000 --regid 1000 --clear-groups "+
		"busctl call org.freedesktop.RealtimeKit1 /org/freedesktop/RealtimeKit1 org.freedesktop.RealtimeKit1 Exit"); code == 0 || !strings.Contains(out, "ccess denied") {
		t.Errorf("Exit by a user: %d, %q", code, out)
	}
	sh(t, "rtkitctl --exit")
	if out, code := try(t, "cgm rt run --priority 10 -- true"); code == 0 {
		t.Errorf("granted after Exit: %q", out)
	}
	property("activated after Exit")
	sh(t, "cgm rt run --priority 10 -- true; systemctl stop cgmanager.service cgmanager.socket")
	property("activated with the daemon")
	sh(t, "systemctl start cgmanager.socket")
	served(t)
}

// box is a process in a cgroup with a limit, made through the daemon.
type box struct {
	cmd *exec.Cmd
	pid string // of the process inside
}

func start(t *testing.T, systemd bool) *box {
	t.Helper()
	argv := []string{"cgm", "run", "box", "--set", "pids.limit=50", "--", "sleep", "98765"}
	if systemd {
		argv = append([]string{"systemd-run", "--quiet", "--collect", "--pipe", "--wait", "-p", "Delegate=yes"}, argv...)
	}
	b := &box{cmd: exec.Command(argv[0], argv[1:]...)}
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.cmd.Process.Kill() })
	eventually(t, "the box", func() bool {
		out, _ := try(t, "pgrep -fx 'sleep 98765' || true")
		b.pid = strings.TrimSpace(out)
		return b.pid != ""
	})
	return b
}

// limit returns what pids.max of the process says, "" if there is no process.
func (b *box) limit(t *testing.T) string {
	t.Helper()
	pid, err := strconv.Atoi(b.pid)
	if err != nil {
		t.Fatalf("the box is %q", b.pid)
	}
	for name, path := range harness.CgroupsOf(pid) {
		for _, h := range harness.Hierarchies() {
			if h.Name != name {
				continue
			}
			// A hidden leaf is below it.
			for dir := filepath.Join(h.Mount, path); strings.HasPrefix(dir, h.Mount+"/"); dir = filepath.Dir(dir) {
				if filepath.Base(dir) != "box" {
					continue
				}
				if v, err := os.ReadFile(dir + "/pids.max"); err == nil {
					return strings.TrimSpace(string(v))
				}
			}
		}
	}
	return fmt.Sprintf("none for %v", harness.CgroupsOf(pid))
}

// end ends it, when there is no daemon to remove its cgroup.
func (b *box) end(t *testing.T) {
	t.Helper()
	pid, _ := strconv.Atoi(b.pid)
	in := harness.CgroupsOf(pid)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = b.cmd.Wait()
	for _, h := range harness.Hierarchies() {
		if path, ok := in[h.Name]; ok && filepath.Base(path) == "box" {
			if err := os.Remove(filepath.Join(h.Mount, path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		}
	}
}
