package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// TestKernelSocketActivation: a listening socket that a service manager passes
// is served, requests that waited in it included, and is left where it is in
// the end.
func TestKernelSocketActivation(t *testing.T) {
	harness.Require(t, "root")
	bin, dir := harness.Binary(t, "cgmanager"), harness.PublicDir(t)
	sock := filepath.Join(dir, "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	passed := os.NewFile(uintptr(fd), "sock")
	defer passed.Close()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: sock}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 16); err != nil {
		t.Fatal(err)
	}
	early := make(chan error, 1)
	go func() { early <- harness.Ping(sock) }() // before there is a daemon
	start := func(f *os.File, args ...string) *exec.Cmd {
		// LISTEN_PID is the daemon's own, which only the program that execs
		// it knows.
		cmd := exec.Command("/bin/sh", append([]string{
			"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" --state-dir "$@"`,
			bin, filepath.Join(dir, "state"),
		}, args...)...)
		cmd.ExtraFiles = []*os.File{f}
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		return cmd
	}
	daemon := start(passed)
	if err := <-early; err != nil {
		t.Errorf("a connection that came before the daemon: %v", err)
	}
	eventually(t, "the socket", func() bool { return harness.Ping(sock) == nil })
	if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := daemon.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(sock); err != nil {
		t.Errorf("the service manager's socket is gone: %v", err)
	}

	// Whoever connects between two daemons is served by the next one, and by one
	// that takes the place of that, whether it has the socket from the service
	// manager or from the other.
	for range 10 {
		waiting := make(chan error, 20)
		for range cap(waiting) {
			go func() { waiting <- harness.Ping(sock) }()
		}
		time.Sleep(time.Millisecond) // most of them are in the socket, whose others come while it starts
		daemon = start(passed)
		for range cap(waiting) {
			if err := <-waiting; err != nil {
				t.Errorf("a connection that came between two daemons: %v", err)
			}
		}
		for _, next := range []func() *exec.Cmd{
			func() *exec.Cmd { return start(passed, "--replace") },
			func() *exec.Cmd {
				cmd := exec.Command(bin, "--replace", "--state-dir", filepath.Join(dir, "state"))
				cmd.Stderr = os.Stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = cmd.Process.Kill() })
				return cmd
			},
		} {
			by := next()
			if err := daemon.Wait(); err != nil {
				t.Errorf("the daemon that was replaced: %v", err)
			}
			if err := harness.Ping(sock); err != nil {
				t.Error(err)
			}
			daemon = by
		}
		if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := daemon.Wait(); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(sock); err != nil {
			t.Fatalf("the service manager's socket is gone: %v", err)
		}
	}

	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	wrong := start(null)
	done := make(chan error, 1)
	go func() { done <- wrong.Wait() }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a descriptor that is no socket was taken")
		}
	case <-time.After(cgtest.Patience(5 * time.Second)):
		t.Error("a descriptor that is no socket is waited for")
	}
}

// TestKernelSocketsShown: where a service manager holds the one socket, clients
// find it at every address that they know, also before a daemon runs.
func TestKernelSocketsShown(t *testing.T) {
	harness.Require(t, "root", "unshare", "nsenter", "mount")
	t.Run("tmpfs", func(t *testing.T) { testShown(t, hostMounts, "cgmanager/sock", "manager") })
	t.Run("read-only tmpfs", func(t *testing.T) { testShown(t, readOnlyMounts, "cgmanager/sock", "manager") })
	t.Run("unified", func(t *testing.T) {
		harness.Require(t, "v2")
		testShown(t, unifiedMounts, "cgmanager/sock")
	})
}

func testShown(t *testing.T, mounts string, shown ...string) {
	p := harness.Start(t, harness.Spec{})
	host := mountHost(t, p, harness.PublicDir(t), mounts)
	root := fmt.Sprintf("/proc/%d/root", host.PID)
	cgroups := root + "/sys/fs/cgroup/"
	bin := harness.Binary(t, "cgmanager")
	run := func(code int, args ...string) {
		t.Helper()
		argv := append([]string{"/usr/bin/nsenter", "-m", "-t", strconv.Itoa(host.PID), "--", bin}, args...)
		if out, got := p.Exec(nil, argv...); got != code || (out == "") != (code == 0) {
			t.Errorf("%q: %d, %q", args, got, out)
		}
	}
	// listen stands for a service manager, which makes the socket anew.
	listen := func() *os.File {
		t.Helper()
		if err := os.MkdirAll(root+"/run/cgmanager", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(root+"/run/cgmanager", 0o755); err != nil {
			t.Fatal(err)
		}
		sock := root + "/run/cgmanager/sock"
		_ = os.Remove(sock)
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), sock)
		t.Cleanup(func() { _ = f.Close() })
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: sock}); err != nil {
			t.Fatal(err)
		}
		if err := unix.Listen(fd, 16); err != nil {
			t.Fatal(err)
		}
		return f
	}
	// reach connects at every address and sees that it is accepted.
	reach := func(f *os.File) {
		t.Helper()
		for _, s := range shown {
			c, err := dialRaw(cgroups + s)
			if err != nil {
				t.Errorf("%s: %v", s, err)
				continue
			}
			n, _, err := unix.Accept(int(f.Fd()))
			if err != nil {
				t.Errorf("%s is another socket: %v", s, err)
			} else {
				unix.Close(n)
			}
			unix.Close(c)
		}
	}
	entries := func() []string {
		t.Helper()
		var names []string
		all, err := os.ReadDir(cgroups)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range all {
			names = append(names, e.Name())
		}
		return names
	}
	flags := func() int64 {
		t.Helper()
		var fs unix.Statfs_t
		if err := unix.Statfs(cgroups, &fs); err != nil {
			t.Fatal(err)
		}
		return fs.Flags
	}
	before, mode := entries(), flags()

	run(1, "--mount-sockets") // there is no socket
	f := listen()
	run(0, "--mount-sockets")
	reach(f)
	run(0, "--mount-sockets") // once more changes nothing
	reach(f)
	for _, s := range shown {
		if err := unix.Chmod(cgroups+s, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("chmod %s: %v", s, err)
		}
	}
	f = listen() // after a stop and a start
	run(0, "--mount-sockets")
	reach(f)
	run(0, "--unmount-sockets")
	if got := entries(); !slices.Equal(got, before) {
		t.Errorf("left is %q, before there was %q", got, before)
	}
	run(0, "--unmount-sockets")
	if got := flags(); got != mode {
		t.Errorf("the mount's flags are %#x, before %#x", got, mode)
	}
	run(2, "--mount-sockets", "--unmount-sockets")
}

// TestKernelNotify: a service manager is told when the daemon serves, when it
// ends, and which process is the service's when one takes another's place.
func TestKernelNotify(t *testing.T) {
	harness.Require(t, "root")
	bin, dir := harness.Binary(t, "cgmanager"), harness.PublicDir(t)
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = manager.Close() }()
	start := func(args ...string) *exec.Cmd {
		cmd := exec.Command(bin, append([]string{"--listen", filepath.Join(dir, "sock"), "--state-dir", filepath.Join(dir, "state")}, args...)...)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		return cmd
	}
	told := func(want ...string) {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(cgtest.Patience(5 * time.Second))); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		for _, w := range want {
			n, err := manager.Read(b)
			if err != nil || string(b[:n]) != w {
				t.Fatalf("told %q, %v, want %q", b[:max(n, 0)], err, w)
			}
		}
	}
	one := start()
	told("READY=1")
	if err := harness.Ping(filepath.Join(dir, "sock")); err != nil {
		t.Error(err)
	}
	two := start("--replace")
	told("RELOADING=1", fmt.Sprint("MAINPID=", two.Process.Pid), "READY=1")
	if err := one.Wait(); err != nil {
		t.Error(err)
	}
	c, _, err := askControl(filepath.Join(dir, "state/control"), "replace 1")
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	told("RELOADING=1", "READY=1")
	if err := two.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	told("STOPPING=1")
	if err := two.Wait(); err != nil {
		t.Error(err)
	}
}
