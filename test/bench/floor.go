package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A floorFunc measures what the kernel alone takes for what a call does: it
// returns µs of this thread's processor time.
type floorFunc func(cg *cgroup, d time.Duration) (float64, error)

// repeat calls f for d and returns the processor time of one call.
func repeat(d time.Duration, f func(i int) error) (float64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := threadTime()
	if err != nil {
		return 0, err
	}
	n := 0
	for start := time.Now(); time.Since(start) < d; {
		for range 16 {
			if err := f(n); err != nil {
				return 0, err
			}
			n++
		}
	}
	after, err := threadTime()
	return micros(after-before) / float64(n), err
}

func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}

func floorRead(cg *cgroup, d time.Duration) (float64, error) {
	path := filepath.Join(cg.dir, "x", cg.key)
	var buf [4096]byte
	return repeat(d, func(int) error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		_, err = unix.Read(fd, buf[:])
		return errors.Join(err, unix.Close(fd))
	})
}

func floorMkdir(cg *cgroup, d time.Duration) (float64, error) {
	path := filepath.Join(cg.dir, "floor")
	return repeat(d, func(i int) error {
		if i%2 == 0 {
			return unix.Mkdir(path, 0o755)
		}
		return unix.Rmdir(path)
	})
}

func floorMove(cg *cgroup, d time.Duration) (float64, error) {
	vs, err := (&request{victim: true}).spawn(context.Background(), 1)
	if err != nil {
		return 0, err
	}
	defer vs.end()
	pid := []byte(strconv.Itoa(vs[0].Pid))
	paths := [2]string{filepath.Join(cg.dir, "a", "cgroup.procs"), filepath.Join(cg.dir, "b", "cgroup.procs")}
	return repeat(d, func(i int) error {
		fd, err := unix.Open(paths[i%2], unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		_, err = unix.Write(fd, pid)
		return errors.Join(err, unix.Close(fd))
	})
}

func floorRealtime(_ *cgroup, d time.Duration) (float64, error) {
	vs, err := (&request{victim: true}).spawn(context.Background(), 1)
	if err != nil {
		return 0, err
	}
	defer vs.end()
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: realtimePriority}
	return repeat(d, func(int) error { return unix.SchedSetAttr(vs[0].Pid, &attr, 0) })
}

// server is a process with a socket.
type server struct {
	cmd  *exec.Cmd
	path string
	dir  string
}

func (s *server) pid() int { return s.cmd.Process.Pid }

func (s *server) stop() error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Wait()
	return os.RemoveAll(s.dir)
}

// startServer runs argv, with PATH replaced by the path of a socket, and waits
// until it listens there.
func startServer(ctx context.Context, log *os.File, argv func(dir, path string) []string) (_ *server, err error) {
	s := &server{}
	if s.dir, err = os.MkdirTemp("", "cgmanager-bench-"); err != nil {
		return nil, err
	}
	s.path = filepath.Join(s.dir, "sock")
	args := argv(s.dir, s.path)
	s.cmd = exec.CommandContext(ctx, args[0], args[1:]...)
	s.cmd.Stderr = log
	s.cmd.Cancel = func() error { return s.cmd.Process.Signal(syscall.SIGTERM) }
	// A ^C is for the client, which cleans up.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := s.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.dir))
	}
	for deadline := time.Now().Add(stalled); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if c, err := dial(s.path, true); err == nil {
			c.close()
			return s, nil
		}
	}
	return nil, errors.Join(errors.New(args[0]+" does not serve its socket"), s.stop())
}

// echoArg makes this program the echo server.
const echoArg = "-echo-server"

func startEcho(ctx context.Context) (*server, error) {
	return startServer(ctx, os.Stderr, func(_, path string) []string {
		return []string{"/proc/self/exe", echoArg, path}
	})
}

// echo serves path until it is killed: one thread, one epoll instance, no
// runtime in the way. It answers what it reads with as many bytes.
func echo(path string) {
	runtime.LockOSThread()
	check := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(err)
	check(unix.Bind(l, &unix.SockaddrUnix{Name: path}))
	check(unix.Listen(l, unix.SOMAXCONN))
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	check(err)
	check(unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, l, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(l)}))
	var events [64]unix.EpollEvent
	var buf [4096]byte
	for {
		n, err := epollWait(ep, events[:])
		if errors.Is(err, errStalled) {
			continue
		}
		check(err)
		for _, e := range events[:n] {
			fd := int(e.Fd)
			if fd == l {
				c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
				check(err)
				check(unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, c, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(c)}))
				continue
			}
			n, err := unix.Read(fd, buf[:])
			if err != nil || n == 0 {
				_ = unix.Close(fd)
				continue
			}
			if _, err := unix.Write(fd, buf[:n]); err != nil {
				_ = unix.Close(fd)
			}
		}
	}
}
