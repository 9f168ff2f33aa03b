package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"cgmanager/cmd/service"
	"cgmanager/manager"
)

// holdArg is the only argument of the process that holds a scope of systemd's.
const holdArg = "--hold-scope"

// heldScope is such a process, as the daemon sees it.
type heldScope struct {
	pid   int
	in    *os.File
	ended bool
}

// startHolder starts one. It waits for a word, as root: until it is in the scope
// nobody else may get hold of it. It is no exec.Cmd, which holds a descriptor and
// has a thread wait for as long as the process lives.
func startHolder() (manager.Holder, error) {
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		_ = in.Close()
		return nil, err
	}
	defer null.Close()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"cgmanager", holdArg}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"GOMAXPROCS=1"},
		Files: []uintptr{out.Fd(), null.Fd(), null.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		_ = in.Close()
		return nil, err
	}
	return &heldScope{pid: pid, in: in}, nil
}

// PID implements manager.Holder.
func (h *heldScope) PID() int32 { return int32(h.pid) }

// Keep implements manager.Holder.
func (h *heldScope) Keep(uid, gid uint32) error {
	_, err := fmt.Fprintln(h.in, uid, gid)
	return errors.Join(err, h.in.Close())
}

// Close implements manager.Holder.
func (h *heldScope) Close() {
	_ = h.in.Close()
	if !h.ended {
		_ = syscall.Kill(h.pid, syscall.SIGKILL)
		h.reap(0)
	}
}

// Ended implements manager.Holder.
func (h *heldScope) Ended() bool {
	if !h.ended {
		h.reap(syscall.WNOHANG)
	}
	return h.ended
}

func (h *heldScope) reap(options int) {
	for {
		pid, err := syscall.Wait4(h.pid, nil, options, nil)
		if !errors.Is(err, syscall.EINTR) {
			h.ended = pid == h.pid || err != nil
			return
		}
	}
}

// hold is that process: told to, it becomes who its scope belongs to, and does
// nothing until it is ended.
func hold() {
	var uid, gid int
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		os.Exit(service.ExitFailure) // nobody wants it
	}
	if _, err := fmt.Sscan(line, &uid, &gid); err != nil {
		os.Exit(service.ExitFailure)
	}
	// It keeps nothing that its owner could want: no descriptor, no memory of
	// root's (a change of ids also closes it to ptrace, as this does for root).
	_ = os.Stdin.Close()
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		os.Exit(service.ExitFailure)
	}
	if syscall.Setgroups(nil) != nil || syscall.Setresgid(gid, gid, gid) != nil || syscall.Setresuid(uid, uid, uid) != nil {
		os.Exit(service.ExitFailure)
	}
	for {
		_, _ = unix.Ppoll(nil, nil, nil)
	}
}
