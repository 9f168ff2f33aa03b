package identity

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// BootID returns what tells the host's boots apart (random(4)): numbers and start
// times of processes mean nothing in another one.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Processes returns the processes of the daemon's pid namespace.
func Processes() ([]int32, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int32
	for _, e := range entries {
		if pid, err := strconv.ParseInt(e.Name(), 10, 32); err == nil {
			pids = append(pids, int32(pid))
		}
	}
	return pids, nil
}

// HostPID returns the daemon's number for the task that p knows as pid; false
// if there is none in p's pid namespace. The number is a hint: whoever uses it
// opens a handle and checks that (PIDIn) against the number asked for.
func (h *Host) HostPID(p *Process, pid int64) (int32, bool) {
	if pid <= 0 || pid > 1<<22 { // PID_MAX_LIMIT
		return 0, false
	}
	if p.pidNS == h.pid {
		return int32(pid), true
	}
	fd, err := p.pidNSHandle()
	if err != nil {
		return 0, false
	}
	n, err := ioctlValue(fd, unix.NS_GET_PID_FROM_PIDNS, int(pid))
	if err == nil {
		return int32(n), n > 0
	}
	if !errors.Is(err, unix.ENOTTY) {
		return 0, false
	}
	return h.searchPID(p, int32(pid))
}

// PIDIn returns the number that the task pid (the daemon's number) has in p's
// pid namespace; false if it is not visible there.
func (h *Host) PIDIn(p *Process, pid int32) (uint32, bool) {
	if pid <= 0 {
		return 0, false
	}
	if p.pidNS == h.pid {
		return uint32(pid), true
	}
	fd, err := p.pidNSHandle()
	if err != nil {
		return 0, false
	}
	n, err := ioctlValue(fd, unix.NS_GET_PID_IN_PIDNS, int(pid))
	if err == nil {
		return uint32(n), n > 0
	}
	if !errors.Is(err, unix.ENOTTY) {
		return 0, false
	}
	level, ok := p.level()
	if !ok {
		return 0, false
	}
	return h.pidAtLevel(p, level, "/proc/"+strconv.Itoa(int(pid)))
}

// ioctlValue is for the namespace ioctls that take a number as such and
// answer with one (Linux 6.11; ENOTTY before).
func ioctlValue(fd int, req uint, arg int) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (p *Process) pidNSHandle() (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidNSFD < 0 {
		fd, err := unix.Openat(p.proc, "ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, gone(err)
		}
		p.pidNSFD = fd
	}
	return p.pidNSFD, nil
}

// level is how deep p's pid namespace lies below the daemon's: the index of
// its numbers in the NSpid lines of what it can see.
func (p *Process) level() (int, bool) {
	st, err := p.Status()
	if err != nil {
		return 0, false
	}
	return len(st.NSpid) - 1, true
}

// searchPID is HostPID for kernels without the ioctl: it reads the NSpid line
// of every task.
func (h *Host) searchPID(p *Process, pid int32) (int32, bool) {
	level, ok := p.level()
	if !ok {
		return 0, false
	}
	procs, err := Processes()
	if err != nil {
		return 0, false
	}
	for _, host := range procs {
		tasks, err := os.ReadDir("/proc/" + strconv.Itoa(int(host)) + "/task")
		if err != nil {
			continue
		}
		for _, t := range tasks {
			if n, ok := h.pidAtLevel(p, level, "/proc/"+strconv.Itoa(int(host))+"/task/"+t.Name()); ok && n == uint32(pid) {
				tid, err := strconv.ParseInt(t.Name(), 10, 32)
				return int32(tid), err == nil
			}
		}
	}
	return 0, false
}

// pidAtLevel returns the number that the task behind dir has in p's pid
// namespace, which lies level namespaces below the daemon's. That the task is
// in that namespace, or one below, is checked: other namespaces have the same
// level.
func (h *Host) pidAtLevel(p *Process, level int, dir string) (uint32, bool) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, false
	}
	t := &Process{pidfd: -1, proc: fd, cgroup: -1, pidNSFD: -1}
	defer t.Close()
	st, err := t.Status()
	if err != nil || level >= len(st.NSpid) {
		return 0, false
	}
	chain, err := t.chain("ns/pid", h.pid)
	if err != nil {
		return 0, false
	}
	if !slices.Contains(chain, p.pidNS) {
		return 0, false
	}
	return uint32(st.NSpid[level]), true
}
