package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// hostMounts makes what a host of v1 and hybrid hierarchies has: a tmpfs with
// the hierarchies in it at /sys/fs/cgroup, and /run.
const hostMounts = `set -e
umask 077
aside=$1; shift
mount --make-rprivate /
mount -t tmpfs aside "$aside"
i=0
for m in "$@"; do
	mkdir "$aside/$i"; mount --bind "$m" "$aside/$i"; i=$((i+1))
done
mount -t tmpfs cgroup /sys/fs/cgroup
chmod 755 /sys/fs/cgroup
i=0
for m in "$@"; do
	mkdir -p -m 755 "/sys/fs/cgroup/${m##*/}"; mount --bind "$aside/$i" "/sys/fs/cgroup/${m##*/}"; i=$((i+1))
done
umount -R "$aside"
` + runMount

// unifiedMounts makes what a unified host has: the one hierarchy at
// /sys/fs/cgroup, and /run. The tmpfs is because nothing can be mounted on
// itself.
const unifiedMounts = `set -e
umask 077
mount --make-rprivate /
mount -t tmpfs cgroup /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
` + runMount

const runMount = `mount -t tmpfs run /run
chmod 755 /run
echo ready
exec sleep 300`

// readOnlyMounts makes what systemd leaves of hostMounts.
var readOnlyMounts = strings.Replace(hostMounts, "umount -R", "mount -o remount,ro,nosuid,nodev,noexec /sys/fs/cgroup\numount -R", 1)

// mountHost makes a mount namespace with the script, which lasts as long as the
// child of p that it returns. dir is the test's own.
func mountHost(t *testing.T, p *harness.Proc, dir, script string) *harness.Child {
	t.Helper()
	if err := os.Mkdir(dir+"/aside", 0o700); err != nil {
		t.Fatal(err)
	}
	argv := []string{"/usr/bin/unshare", "-m", "/bin/bash", "-c", script, "bash", dir + "/aside"}
	for _, h := range harness.Hierarchies() {
		argv = append(argv, h.Mount)
	}
	host := p.Launch(nil, argv...)
	t.Cleanup(func() {
		if err := host.Kill(); err != nil {
			t.Error(err)
		}
		if _, err := host.End(time.Second); err != nil {
			t.Error(err)
		}
	})
	ready := make([]byte, 6)
	if n, err := host.Out.Read(ready); err != nil || string(ready[:n]) != "ready\n" {
		t.Fatalf("the mount namespace: %q, %v", ready[:n], err)
	}
	return host
}

// The daemon on its real sockets, in a mount namespace of its own.
func TestKernelNothingLostDefaults(t *testing.T) {
	harness.Require(t, "root", "unshare", "nsenter", "mount")
	t.Run("tmpfs", func(t *testing.T) {
		testDefaults(t, hostMounts, "/run/cgmanager/sock", "/sys/fs/cgroup/cgmanager/sock", "/sys/fs/cgroup/manager")
	})
	t.Run("read-only tmpfs", func(t *testing.T) {
		testDefaults(t, readOnlyMounts, "/run/cgmanager/sock", "/sys/fs/cgroup/cgmanager/sock", "/sys/fs/cgroup/manager")
	})
	t.Run("unified", func(t *testing.T) {
		harness.Require(t, "v2")
		testDefaults(t, unifiedMounts, "/run/cgmanager/sock", "/sys/fs/cgroup/cgmanager/sock")
	})
}

func testDefaults(t *testing.T, mounts string, paths ...string) {
	p := harness.Start(t, harness.Spec{})
	dir := harness.PublicDir(t)
	host := mountHost(t, p, dir, mounts)
	root := fmt.Sprintf("/proc/%d/root", host.PID)
	sockets := make([]string, len(paths))
	for i, path := range paths {
		sockets[i] = root + path
	}
	in := func(argv ...string) []string {
		return append([]string{"/usr/bin/nsenter", "-m", "-t", strconv.Itoa(host.PID), "--"}, argv...)
	}
	bin := harness.Binary(t, "cgmanager")

	// served checks everything that a daemon on the usual sockets shows.
	served := func() (pid int) {
		t.Helper()
		for _, s := range sockets {
			eventually(t, s, func() bool { return harness.Ping(s) == nil })
			fd, err := dialRaw(s)
			if err != nil {
				t.Fatal(err)
			}
			cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
			unix.Close(fd)
			if err != nil || pid != 0 && pid != int(cred.Pid) {
				t.Fatalf("%s: %v, %v", s, cred, err)
			}
			pid = int(cred.Pid)
		}
		modes := map[string]uint32{
			root + "/run/cgmanager":           unix.S_IFDIR | 0o755,
			root + "/sys/fs/cgroup/cgmanager": unix.S_IFDIR | 0o755,
			root + "/run/cgmanager.private":   unix.S_IFDIR | 0o700,
		}
		for _, s := range sockets {
			modes[s] = unix.S_IFSOCK | 0o777
		}
		for path, mode := range modes {
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil || st.Mode != mode || st.Uid != 0 || st.Gid != 0 {
				t.Errorf("%s is %o of %d:%d (%v), want %o of root", path, st.Mode, st.Uid, st.Gid, err, mode)
			}
		}
		for _, d := range []string{"/run/cgmanager", "/sys/fs/cgroup/cgmanager"} {
			entries, err := os.ReadDir(root + d)
			if err != nil || len(entries) != 1 || entries[0].Name() != "sock" {
				t.Errorf("%s holds %v (%v)", d, entries, err)
			}
		}
		return pid
	}
	removed := func() {
		t.Helper()
		for _, s := range sockets {
			if _, err := os.Lstat(s); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left: %v", s, err)
			}
		}
	}

	t.Run("in the foreground, with the original's flags", func(t *testing.T) {
		s := p.Launch(nil, in(bin, "--max-depth=16", "--skip", "nosuch", "--allow-autoremove-premounted", "--autoremove-premounted-set-release-agent")...)
		if pid := served(); pid != s.PID {
			t.Errorf("served by %d, not %d", pid, s.PID)
		}
		// A client without an address finds it.
		out, code := p.Exec(nil, in(harness.Binary(t, "cgm"), "apiversion")...)
		if code != 0 || out != "10\n" {
			t.Errorf("cgm: %d, %q", code, out)
		}
		// So does a second daemon.
		if out, code := p.Exec(nil, in(bin)...); code != 1 || !strings.Contains(out, "another cgmanager") {
			t.Errorf("a second daemon: %d, %q", code, out)
		}
		served()
		terminate(t, s)
		removed()
	})
	t.Run("--daemon", func(t *testing.T) {
		// Its log goes where standard error goes, also from the background.
		background := in("/bin/bash", "-c", `exec "$@" 2>"$0"`, dir+"/log", bin, "--daemon")
		if out, code := p.Exec(nil, background...); code != 0 {
			t.Fatalf("%d, %q", code, out)
		}
		for _, s := range sockets {
			if err := harness.Ping(s); err != nil {
				t.Errorf("%s when the parent has ended: %v", s, err)
			}
		}
		pid := served()
		if sid, err := unix.Getsid(pid); err != nil || sid != pid {
			t.Errorf("in session %d, %v", sid, err)
		}
		// What an init script looks at.
		if b, err := os.ReadFile(root + "/run/cgmanager.private/lock"); err != nil || string(b) != strconv.Itoa(pid)+"\n" {
			t.Errorf("the lock holds %q, %v, want %d", b, err, pid)
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || string(b) != "cgmanager\n" {
			t.Errorf("its name is %q, %v", b, err)
		}
		for fd := range 2 {
			if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil || to != "/dev/null" {
				t.Errorf("fd %d is %s, %v", fd, to, err)
			}
		}
		// A second one says why, and is not in the background.
		if out, code := p.Exec(nil, in(bin, "--daemon")...); code != 1 || !strings.Contains(out, "another cgmanager") {
			t.Errorf("a second daemon: %d, %q", code, out)
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pidfd)
		if err := unix.PidfdSendSignal(pidfd, unix.SIGTERM, nil, 0); err != nil {
			t.Fatal(err)
		}
		poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, int(patience()/time.Millisecond)); n != 1 || err != nil {
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			t.Errorf("the daemon did not end in a second: %v", err)
		}
		removed()
	})
	t.Run("--sigstop", func(t *testing.T) {
		s := p.Launch(nil, in(bin, "--sigstop")...)
		eventually(t, "the daemon stops itself", func() bool {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.PID))
			_, after, _ := strings.Cut(string(b), ") ")
			return err == nil && strings.HasPrefix(after, "T")
		})
		// Who waits for that can connect now.
		for _, path := range sockets {
			fd, err := dialRaw(path)
			if err != nil {
				t.Errorf("%s: %v", path, err)
				continue
			}
			unix.Close(fd)
		}
		if err := unix.Kill(s.PID, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		served()
		terminate(t, s)
		removed()
	})
	t.Run("--replace", func(t *testing.T) {
		s := p.Launch(nil, in(bin)...)
		served()
		// Mounts and sockets stay what they are, in every container.
		inodes := func() (all []uint64) {
			for _, s := range append(sockets, root+"/run/cgmanager", root+"/sys/fs/cgroup/cgmanager") {
				var st unix.Stat_t
				if err := unix.Lstat(s, &st); err != nil {
					t.Error(err)
				}
				all = append(all, st.Ino)
			}
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", host.PID))
			if err != nil {
				t.Error(err)
			}
			for line := range strings.Lines(string(b)) {
				if id, err := strconv.ParseUint(strings.Fields(line)[0], 10, 64); err == nil && strings.Contains(line, "cgmanager") {
					all = append(all, id)
				}
			}
			return all
		}
		before := inodes()
		for range 3 {
			next := p.Launch(nil, in(bin, "--replace")...)
			endsWell(t, s)
			served()
			if after := inodes(); !slices.Equal(before, after) {
				t.Errorf("sockets and mounts were %v, are %v", before, after)
			}
			s = next
		}
		terminate(t, s)
		removed()
	})
	t.Run("after kill -9", func(t *testing.T) {
		s := p.Launch(nil, in(bin)...)
		served()
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.End(time.Second); err != nil {
			t.Fatal(err)
		}
		s = p.Launch(nil, in(bin)...)
		served()
		terminate(t, s)
		removed()
	})
}

// terminate asks a program to end, and waits until it has done so in order.
func terminate(t *testing.T, s *harness.Child) {
	t.Helper()
	if err := unix.Kill(s.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	endsWell(t, s)
}

// endsWell waits until a program has ended in order; service.terminate sees how long
// that takes.
func endsWell(t *testing.T, s *harness.Child) {
	t.Helper()
	if ws, err := s.End(cgtest.Patience(5 * time.Second)); err != nil || !ws.Exited() || ws.ExitStatus() != 0 {
		t.Errorf("ended with %v, %v", ws, err)
	}
}

// On a unified host the old address is a mount on a cgroup that nobody uses.
func TestKernelSocketsOnACgroup(t *testing.T) {
	harness.Require(t, "root", "unshare", "nsenter", "mount", "v2")
	p := harness.Start(t, harness.Spec{})
	dir := harness.PublicDir(t)
	host := mountHost(t, p, dir, unifiedMounts)
	root := fmt.Sprintf("/proc/%d/root", host.PID)
	point, sock := root+"/sys/fs/cgroup/cgmanager", root+"/sys/fs/cgroup/cgmanager/sock"
	run := root + "/run/cgmanager/sock"
	bin := harness.Binary(t, "cgmanager")
	nsenter := []string{"/usr/bin/nsenter", "-m", "-t", strconv.Itoa(host.PID), "--"}
	start := func(args ...string) *harness.Child {
		t.Helper()
		argv := append([]string{"/bin/bash", "-c", `exec "$@" 2>>"$0"`, dir + "/log", bin}, args...)
		s := p.Launch(nil, append(nsenter, argv...)...)
		eventually(t, run, func() bool { return harness.Ping(run) == nil })
		return s
	}
	end := func(s *harness.Child) {
		t.Helper()
		terminate(t, s)
	}
	is := func(what string, there bool) {
		t.Helper()
		if _, err := os.Lstat(point); (err == nil) != there {
			t.Errorf("%s: the cgroup is there: %v, %v", what, err == nil, err)
		}
	}
	is("before", false)

	s := start()
	if err := harness.Ping(sock); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(point+"/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write beside the socket: %v", err)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.End(time.Second); err != nil {
		t.Fatal(err)
	}
	is("after kill -9", true)
	// The next one takes over what is left, also if its directory is gone.
	s = start()
	if err := harness.Ping(sock); err != nil {
		t.Error(err)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.End(time.Second); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(root + "/run/cgmanager"); err != nil {
		t.Fatal(err)
	}
	s = start()
	if err := harness.Ping(sock); err != nil {
		t.Error(err)
	}
	end(s)
	is("after the end", false)

	// What somebody else has made and uses is not hidden.
	for what, use := range map[string]func() func(){
		"children": func() func() {
			if err := os.Mkdir(point+"/child", 0o755); err != nil {
				t.Fatal(err)
			}
			return func() { _ = os.Remove(point + "/child") }
		},
		"tasks": func() func() {
			if err := os.WriteFile(point+"/cgroup.procs", []byte(strconv.Itoa(p.HostPID)), 0); err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := os.WriteFile(root+"/sys/fs/cgroup/cgroup.procs", []byte(strconv.Itoa(p.HostPID)), 0); err != nil {
					t.Error(err)
				}
			}
		},
	} {
		if err := os.Mkdir(point, 0o755); err != nil {
			t.Fatal(err)
		}
		unuse := use()
		s := start()
		if _, err := os.Lstat(point + "/cgroup.procs"); err != nil {
			t.Errorf("a cgroup with %s is hidden: %v", what, err)
		}
		if log, err := os.ReadFile(dir + "/log"); err != nil || !strings.Contains(string(log), "it has "+what) {
			t.Errorf("what the daemon says of a cgroup with %s: %v\n%s", what, err, log)
		}
		end(s)
		is("in use, after the end", true)
		unuse()
		if err := os.Remove(point); err != nil {
			t.Error(err)
		}
	}
	// One that is empty stays its maker's.
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	s = start()
	if err := harness.Ping(sock); err != nil {
		t.Error(err)
	}
	end(s)
	is("somebody else's, after the end", true)
	if err := os.Remove(point); err != nil {
		t.Error(err)
	}
	// Who names addresses gets those.
	if err := os.MkdirAll(root+"/run/cgmanager", 0o755); err != nil {
		t.Fatal(err)
	}
	s = start("--listen", "unix:path=/run/cgmanager/sock")
	is("--listen", false)
	end(s)
}
