package watchdog

import (
	"bytes"
	"os"
	"slices"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What is read of /proc here is read without allocation: there is no collector.

// stat is what is read of a thread's stat (proc_pid_stat(5)).
type stat struct {
	state   byte
	flags   uint64
	started uint64
	// priority (realtime's) and policy as sched_setscheduler(2) has them.
	priority, policy uint32
}

// kernelThread is PF_KTHREAD, in the flags.
const kernelThread = 0x00200000

// readStat reads the file stat in the directory of a process or thread.
func readStat(dir int) (stat, unix.Errno) {
	fd, errno := openAt(dir, []byte("stat\x00"), unix.O_RDONLY)
	if errno != 0 {
		return stat{}, errno
	}
	defer unix.Close(fd)
	var b [1024]byte
	n, errno := rawRead(fd, b[:])
	if errno != 0 {
		return stat{}, errno
	}
	return parseStat(b[:n])
}

// parseStat parses it. A name may hold anything, but the fields after it nothing
// but numbers: the last ")" ends it.
func parseStat(b []byte) (st stat, errno unix.Errno) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || i+2 >= len(b) {
		return stat{}, unix.EINVAL
	}
	b = b[i+2:]
	st.state = b[0]
	b = b[1:]
	for field := 4; len(b) > 1; field++ {
		b = b[1:] // the space
		var v uint64
		v, b = number(b)
		switch field {
		case 9:
			st.flags = v
		case 22:
			st.started = v
		case 40:
			st.priority = uint32(v)
		case 41:
			st.policy = uint32(v)
			return st, 0
		}
	}
	return stat{}, unix.EINVAL
}

// number returns the number that b begins with (0 for a negative one), and the rest.
func number(b []byte) (v uint64, rest []byte) {
	negative := len(b) > 0 && b[0] == '-'
	i := 0
	if negative {
		i++
	}
	for ; i < len(b) && b[i] >= '0' && b[i] <= '9'; i++ {
		v = v*10 + uint64(b[i]-'0')
	}
	if negative {
		v = 0
	}
	return v, b[i:]
}

// openAt opens a name that ends with a zero byte.
func openAt(dir int, name []byte, flags int) (int, unix.Errno) {
	for {
		fd, _, errno := syscall.Syscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])),
			uintptr(flags|unix.O_CLOEXEC), 0, 0, 0)
		if errno != unix.EINTR {
			return int(fd), errno
		}
	}
}

// numbers calls f with each entry of a directory that is a number, until f returns
// false. buf is for the kernel's answers.
func numbers(dir int, buf []byte, f func(name []byte, n int) bool) {
	_, _ = unix.Seek(dir, 0, 0)
	for {
		n, err := unix.Getdents(dir, buf)
		if err != nil || n <= 0 {
			return
		}
		for b := buf[:n]; len(b) > 0; {
			// struct linux_dirent64: inode, offset (8 each), length (2), type (1), name.
			length := int(b[16]) | int(b[17])<<8
			name := b[19:length]
			name = name[:bytes.IndexByte(name, 0)+1]
			if v, rest := number(name); name[0] != '-' && len(rest) == 1 && !f(name, int(v)) {
				return
			}
			b = b[length:]
		}
	}
}

// scanner walks /proc.
type scanner struct {
	root       int // of /proc
	outer, buf []byte
}

func newScanner() (*scanner, error) {
	root, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /proc", err)
	}
	return &scanner{root: root, outer: make([]byte, 8<<10), buf: make([]byte, 8<<10)}, nil
}

func (s *scanner) close() { _ = unix.Close(s.root) }

// wantsToRun reports whether a thread of the process in whose directory task is
// would run if it were given a CPU, or runs.
func (s *scanner) wantsToRun(task int) bool {
	found := false
	s.threads(task, func(_ int, _ int, st stat) bool {
		found = st.state == 'R'
		return !found
	})
	return found
}

func (s *scanner) threads(task int, f func(dir, tid int, st stat) bool) {
	numbers(task, s.buf, func(name []byte, tid int) bool {
		dir, errno := openAt(task, name, unix.O_PATH|unix.O_DIRECTORY)
		if errno != 0 {
			return true
		}
		defer unix.Close(dir)
		st, errno := readStat(dir)
		return errno != 0 || f(dir, tid, st)
	})
}

// demoteAll takes realtime from every thread of the host but the kernel's own, those
// of the first process and of the processes in except, and, unless root is set,
// those of root's processes. It returns how many.
func (s *scanner) demoteAll(root bool, except ...int) int {
	n := 0
	numbers(s.root, s.outer, func(name []byte, pid int) bool {
		if pid == 1 || slices.Contains(except, pid) {
			return true
		}
		n += s.demoteProcess(name, root)
		return true
	})
	return n
}

func (s *scanner) demoteProcess(name []byte, root bool) int {
	dir, errno := openAt(s.root, name, unix.O_PATH|unix.O_DIRECTORY)
	if errno != 0 {
		return 0
	}
	defer unix.Close(dir)
	// The directory belongs to the process's effective uid.
	var st unix.Stat_t
	if unix.Fstat(dir, &st) != nil || st.Uid == 0 && !root {
		return 0
	}
	task, errno := openAt(dir, []byte("task\x00"), unix.O_RDONLY|unix.O_DIRECTORY)
	if errno != 0 {
		return 0
	}
	defer unix.Close(task)
	n := 0
	s.threads(task, func(dir, tid int, st stat) bool {
		if st.flags&kernelThread != 0 || !isRealtime(st.policy) {
			return st.flags&kernelThread == 0
		}
		attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
		if unix.SchedSetAttr(tid, &attr, 0) == nil {
			n++
		}
		return true
	})
	return n
}

// taskDir opens the directory of a process's threads.
func taskDir(pid int) (int, unix.Errno) {
	path := append([]byte("/proc/"), strconv.Itoa(pid)...)
	return openAt(unix.AT_FDCWD, append(path, "/task\x00"...), unix.O_RDONLY|unix.O_DIRECTORY)
}
