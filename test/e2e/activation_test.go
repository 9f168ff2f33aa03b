package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	start := func(f *os.File) *exec.Cmd {
		// LISTEN_PID is the daemon's own, which only the program that execs
		// it knows.
		cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" --state-dir "$1"`,
			bin, filepath.Join(dir, "state"))
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
	case <-time.After(5 * time.Second):
		t.Error("a descriptor that is no socket is waited for")
	}
}
