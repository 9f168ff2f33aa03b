package harness

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// Daemon is a running cgmanager with a socket of its own.
type Daemon struct {
	// Sock is the path of its socket, Dir the directory around it, which
	// everybody may search.
	Sock, Dir string
	PID       int

	t       testing.TB
	cmd     *exec.Cmd
	log     string
	done    chan struct{} // closed when the process has ended
	stopped bool
	fds     int
	threads int
}

// StartDaemon starts the daemon, waits until it serves, and stops it at the
// end of the test, which fails if the daemon does not end in a second (longer
// on a busy machine) with code 0, or holds more open files than in the
// beginning.
func StartDaemon(t testing.TB, args ...string) *Daemon {
	t.Helper()
	bin := Binary(t, "cgmanager")
	d := &Daemon{t: t, Dir: PublicDir(t), done: make(chan struct{})}
	d.Sock = filepath.Join(d.Dir, "sock")
	d.log = filepath.Join(d.Dir, "log")
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	args = append([]string{
		"--listen", "unix:path=" + d.Sock,
		"--state-dir", filepath.Join(d.Dir, "state"),
		"--log-level", "debug",
	}, args...)
	d.cmd = exec.Command(bin, args...)
	// The machine's own polkit is not asked, nor its bus held, unless the test says so.
	d.cmd.Env = append([]string{"DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent"}, os.Environ()...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = deathsig()
	if err := onSpawner(d.cmd.Start); err != nil {
		t.Fatal(err)
	}
	d.PID = d.cmd.Process.Pid
	go func() {
		_ = d.cmd.Wait()
		close(d.done)
	}()
	t.Cleanup(d.stop)
	deadline := time.Now().Add(cgtest.Patience(10 * time.Second))
	for {
		if err := ping(d.Sock, true); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the daemon does not serve: %v\n%s", err, d.Log())
		}
		select {
		case <-d.done:
			t.Fatalf("the daemon ended: %v\n%s", d.cmd.ProcessState, d.Log())
		case <-time.After(5 * time.Millisecond):
		}
	}
	d.fds, d.threads = d.settledFDs(), d.count("task")
	return d
}

// Log returns what the daemon logged so far.
func (d *Daemon) Log() string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	if len(b) > 16<<10 {
		b = b[len(b)-16<<10:]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	return string(b)
}

// Alive reports whether the daemon runs.
func (d *Daemon) Alive() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// watchdogFiles is how many files the daemon has open for its watchdog.
const watchdogFiles = 5

// Watchdog returns the process that watches realtime threads for the daemon, or 0 where
// there is none.
func (d *Daemon) Watchdog() int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, _ := os.ReadFile(path) // one that has ended is nobody's
		// PID (NAME) STATE PPID …, proc_pid_stat(5).
		pid, after, _ := strings.Cut(string(b), " (cgm-watchdog) ")
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(d.PID) {
			n, _ := strconv.Atoi(pid)
			return n
		}
	}
	return 0
}

// FDs returns how many files the daemon has open.
func (d *Daemon) FDs() int { return d.count("fd") }

// Files says what each of its descriptors is (proc_pid_fd(5)).
func (d *Daemon) Files() map[string]string {
	files := map[string]string{}
	dir := filepath.Join("/proc", strconv.Itoa(d.PID), "fd")
	e, _ := os.ReadDir(dir) // a daemon that ended has none
	for _, e := range e {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			files[e.Name()] = to
		}
	}
	return files
}

// Pause stops the daemon wherever it is, so that what races with it wins;
// Resume lets it go on.
func (d *Daemon) Pause() error { return Pause(d.PID) }

// Pause stops a process of the test's and waits until all its threads are: the first
// one may stand still while another goes on reading.
func Pause(pid int) error {
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return err
	}
	for end := time.Now().Add(cgtest.Patience(5 * time.Second)); time.Now().Before(end); {
		if runs, err := runs(pid); err != nil || !runs {
			return err
		}
	}
	return fmt.Errorf("process %d does not stop", pid)
}

// runs reports whether a thread of a process is not stopped.
func runs(pid int) (bool, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "task")
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join(dir, task.Name(), "stat"))
		if err != nil {
			return true, nil //nolint:nilerr // it has ended meanwhile
		}
		if _, after, _ := strings.Cut(string(b), ") "); !strings.HasPrefix(after, "T") {
			return true, nil
		}
	}
	return false, nil
}

// Resume lets a paused daemon go on.
func (d *Daemon) Resume() error { return d.cmd.Process.Signal(unix.SIGCONT) }

func (d *Daemon) count(dir string) int {
	e, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(d.PID), dir))
	if err != nil {
		return -1
	}
	return len(e)
}

// settledFDs waits until the number of the daemon's open files no longer changes, for a
// few seconds at most, and returns it.
func (d *Daemon) settledFDs() int {
	last, same := -1, 0
	cgtest.Until(5*time.Second, 10*time.Millisecond, func() bool {
		n := d.FDs()
		if n == last {
			same++
		} else {
			last, same = n, 0
		}
		return same == 5
	})
	return last
}

func (d *Daemon) stop() {
	if d.stopped {
		return
	}
	d.stopped = true
	if d.Alive() && d.fds > 0 {
		var n int
		if !cgtest.Until(5*time.Second, 10*time.Millisecond, func() bool {
			n = d.FDs()
			// The watchdog stays for a while after the last grant.
			return n <= d.fds || n <= d.fds+watchdogFiles && d.Watchdog() != 0
		}) {
			d.t.Errorf("the daemon has %d files open, %d before the test:\n%s", n, d.fds, d.fdNames())
		}
		// Go keeps its threads. One that is stuck in the kernel shows as one
		// for each request of a test; a handful says nothing.
		if n := d.count("task"); n > d.threads+24 {
			d.t.Errorf("the daemon has %d threads, %d before the test", n, d.threads)
		}
	}
	alive := d.Alive()
	_ = d.cmd.Process.Signal(unix.SIGCONT) // a failed test may have left it paused
	start := time.Now()
	_ = d.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-d.done:
		if took := time.Since(start); alive && took > cgtest.Patience(time.Second) {
			d.t.Errorf("the daemon took %v to end", took)
		}
	case <-time.After(cgtest.Patience(5 * time.Second)):
		_ = d.cmd.Process.Signal(unix.SIGQUIT)
		select {
		case <-d.done:
		case <-time.After(time.Second):
			_ = d.cmd.Process.Kill()
			<-d.done
		}
		d.t.Errorf("the daemon did not end within 5 s of SIGTERM")
	}
	if code := d.cmd.ProcessState.ExitCode(); code != 0 {
		d.t.Errorf("the daemon ended with %v", d.cmd.ProcessState)
	}
	if d.t.Failed() {
		d.t.Logf("the daemon's log:\n%s", d.Log())
	}
}

func (d *Daemon) fdNames() string {
	var b strings.Builder
	dir := filepath.Join("/proc", strconv.Itoa(d.PID), "fd")
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		to, _ := os.Readlink(filepath.Join(dir, e.Name()))
		fmt.Fprintf(&b, "  %s -> %s\n", e.Name(), to)
	}
	return b.String()
}

// Pipelines says whether calls may go in one write with the login: the kernel
// gives a pidfd of a socket's peer (Linux 6.5, SO_PEERPIDFD). See
// docs/PROTOCOL.md.
var Pipelines = sync.OnceValue(func() bool {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
})

// Read is read(2), and Write write(2), but for interruptions, which the Go
// runtime's signals bring where a socket has a timeout (signal(7)).
func Read(fd int, b []byte) (int, error) { return uninterrupted(unix.Read, fd, b) }

// Write is described with Read.
func Write(fd int, b []byte) (int, error) { return uninterrupted(unix.Write, fd, b) }

func uninterrupted(f func(int, []byte) (int, error), fd int, b []byte) (n int, err error) {
	for {
		if n, err = f(fd, b); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// Login writes the login on a fresh connection and, where calls must wait for
// the answer, reads and returns that.
func Login(fd int, login []byte) (answer []byte, err error) {
	if n, err := Write(fd, login); err != nil || n < len(login) {
		return nil, fmt.Errorf("write: %d, %w", n, err)
	}
	buf := make([]byte, 4096)
	for !Pipelines() && !bytes.Contains(answer, []byte("OK ")) {
		n, err := Read(fd, buf)
		if err != nil {
			return answer, err
		}
		if n == 0 {
			return answer, fmt.Errorf("closed after %q", answer)
		}
		answer = append(answer, buf[:n]...)
	}
	return answer, nil
}

// Begin is Login for data that goes on after the login, in the same write
// where that is possible.
func Begin(fd int, data []byte) (answer []byte, err error) {
	end := bytes.Index(data, []byte("BEGIN\r\n"))
	if end >= 0 && !Pipelines() {
		end += len("BEGIN\r\n")
		if answer, err = Login(fd, data[:end]); err != nil {
			return answer, err
		}
		data = data[end:]
	}
	for len(data) > 0 {
		n, err := Write(fd, data)
		if err != nil {
			return answer, err
		}
		data = data[n:]
	}
	return answer, nil
}

// Ping asks for an answer, with the rights of the test.
func Ping(sock string) error { return ping(sock, false) }

// ping is Ping. With gone it waits, after the answer, until the daemon has closed its
// end too.
func ping(sock string, gone bool) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(cgtest.Patience(5 * time.Second)))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: sock}); err != nil {
		return err
	}
	got, err := Begin(fd, append(handshake("30"), encodeCall(1, objectPath, ifacePeer, "Ping", nil)...))
	if err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for !bytes.Contains(got, []byte("\r\nAGREE_UNIX_FD\r\nl\x02")) {
		n, err := Read(fd, buf)
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("closed")
		}
		got = append(got, buf[:n]...)
	}
	if !gone {
		return nil
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return err
	}
	n, err := Read(fd, buf)
	if err == nil && n > 0 {
		err = fmt.Errorf("%d bytes after the answer", n)
	}
	return err
}
