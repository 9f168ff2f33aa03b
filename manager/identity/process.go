package identity

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs"
)

// ErrGone says that the process ended before, or while, facts about it were
// read. What was read is worth nothing then: the pid may be another's by now.
var ErrGone = errors.New("the process has ended")

// Process is a handle on a process. The pidfd and the directory of /proc are
// proven to be of the same process, so that nothing read through it can be of
// a later process with the same pid.
type Process struct {
	pid   int32
	pidfd int
	proc  int // /proc/PID, O_PATH
	// pidNS is for life: setns(2) changes the pid namespace of children alone.
	// A Task has none: nothing is seen with its eyes.
	pidNS ns

	mu      sync.Mutex
	cgroup  int // /proc/PID/cgroup, kept open; guarded by mu
	pidNSFD int // guarded by mu
}

// ns names a namespace by its inode, as the links of /proc/PID/ns do
// (namespaces(7)). All of them are inodes of one file system, nsfs.
type ns uint64

// Open makes a handle on the process pid. pidfd, if it is not negative, is
// one that the kernel gave for it (SO_PEERPIDFD); Open owns it from the call
// on. It returns ErrGone if the process has ended.
func Open(pid int32, pidfd int) (*Process, error) {
	p, err := open(pid, pidfd)
	if err != nil {
		return nil, err
	}
	if p.pidNS, err = p.namespace("ns/pid"); err != nil {
		p.Close()
		return nil, err
	}
	return p.proven()
}

// open is Open without the namespace, and without the proof.
func open(pid int32, pidfd int) (*Process, error) {
	if pid <= 0 {
		closeFD(pidfd)
		return nil, ErrGone
	}
	if pidfd < 0 {
		var err error
		if pidfd, err = unix.PidfdOpen(int(pid), 0); err != nil {
			if errors.Is(err, unix.ESRCH) {
				return nil, ErrGone
			}
			return nil, fmt.Errorf("pidfd_open: %w", err)
		}
	}
	p := &Process{pid: pid, pidfd: pidfd, proc: -1, cgroup: -1, pidNSFD: -1}
	fd, err := unix.Open("/proc/"+strconv.Itoa(int(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		p.Close()
		if errors.Is(err, unix.ENOENT) {
			return nil, ErrGone
		}
		return nil, fmt.Errorf("open /proc/PID: %w", err)
	}
	p.proc = fd
	return p, nil
}

// proven returns p if its handles are of one process, and lets go of them
// otherwise.
func (p *Process) proven() (*Process, error) {
	// The pid cannot have been reused while its process was alive: the
	// directory is of the process behind the pidfd.
	if !p.Alive() {
		p.Close()
		return nil, ErrGone
	}
	return p, nil
}

// Close lets go of the handles.
func (p *Process) Close() {
	for _, fd := range []*int{&p.pidfd, &p.proc, &p.cgroup, &p.pidNSFD} {
		closeFD(*fd)
		*fd = -1
	}
}

func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// PID returns the pid in the daemon's pid namespace.
func (p *Process) PID() int32 { return p.pid }

// PidFD returns the handle on the process; it belongs to p.
func (p *Process) PidFD() int { return p.pidfd }

// Alive reports whether the process has not ended. A zombie has ended, though
// its pid is not free yet.
func (p *Process) Alive() bool {
	fds := [1]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 0
	}
}

// Unreaped reports whether the pid still belongs to the process, alive or a
// zombie: as long as it does, no other process can have the pid.
func (p *Process) Unreaped() bool {
	return !errors.Is(unix.PidfdSendSignal(p.pidfd, 0, nil, 0), unix.ESRCH)
}

// Cgroups reads the process's cgroups.
func (p *Process) Cgroups() (cgfs.ProcCgroup, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cgroup < 0 {
		fd, err := unix.Openat(p.proc, "cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, gone(err)
		}
		p.cgroup = fd
	}
	var buf [2048]byte // on the stack: what is kept of it is far shorter
	b, err := preadAll(p.cgroup, buf[:0])
	if err != nil {
		return nil, gone(err)
	}
	return bytes.Clone(b), nil
}

// OwnCgroups reads the process's cgroups as its own cgroup namespace shows them
// (cgroup_namespaces(7)): it is the reader's namespace that counts.
func (p *Process) OwnCgroups() (cgfs.ProcCgroup, error) {
	type answer struct {
		cgroups cgfs.ProcCgroup
		err     error
	}
	done := make(chan answer, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its namespace
		// is nobody else's.
		runtime.LockOSThread()
		var a answer
		if a.err = p.enterCgroupNS(); a.err == nil {
			a.cgroups, a.err = p.Cgroups()
		}
		done <- a
	}()
	a := <-done
	return a.cgroups, a.err
}

// enterCgroupNS takes the calling thread into the process's cgroup namespace.
func (p *Process) enterCgroupNS() error {
	fd, err := unix.Openat(p.proc, "ns/cgroup", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return gone(err)
	}
	defer closeFD(fd)
	return os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWCGROUP))
}

// LeaderExiting reports whether the process's first thread has begun to exit,
// be it that others go on, or that the exit takes its time. The kernel says "/"
// of its v1 cgroups then, wherever it was (proc_cgroup_show): a "/" counts only
// if this, asked afterwards, is false.
func (p *Process) LeaderExiting() bool { return p.exiting(p.pid) }

// Started returns when the process was started, in ticks since the boot
// (proc_pid_stat(5)): with the pid it tells a process from all others until the next.
func (p *Process) Started() (uint64, error) {
	b, err := p.read("stat")
	if err != nil {
		return 0, err
	}
	for number, f := range statFields(b) {
		if number == statStarted {
			if at, err := strconv.ParseUint(string(f), 10, 64); err == nil {
				return at, nil
			}
			break
		}
	}
	return 0, errMalformed
}

// exiting reports whether a thread of the process has begun to exit, or
// whether that cannot be told.
func (p *Process) exiting(tid int32) bool {
	b, err := p.read("task/" + strconv.Itoa(int(tid)) + "/stat")
	if err != nil {
		return true
	}
	for number, f := range statFields(b) {
		if number == statFlags {
			const pfExiting = 0x4 // linux/sched.h
			flags, err := strconv.ParseUint(string(f), 10, 64)
			return err != nil || flags&pfExiting != 0
		}
	}
	return true
}

// Fields of a stat file, by their numbers in proc_pid_stat(5).
const (
	statState    = 3
	statFlags    = 9
	statNice     = 19
	statStarted  = 22
	statPriority = 40
	statPolicy   = 41
)

// statFields yields the fields of a stat file, from the third on, with their numbers.
// The second, the program's name in parentheses, may hold anything.
func statFields(b []byte) iter.Seq2[int, []byte] {
	return func(yield func(int, []byte) bool) {
		i := bytes.LastIndexByte(b, ')')
		if i < 0 {
			return
		}
		number := statState
		for f := range bytes.FieldsSeq(b[i+1:]) {
			if !yield(number, f) {
				return
			}
			number++
		}
	}
}

// maxProcFile bounds what is read of a file of /proc.
const maxProcFile = 256 << 10

// maxLine is more than a line of an id map is long.
const maxLine = 64

// preadAll reads a file of /proc from its start, into buf where that has room.
// The kernel makes the content in one go, or, of an id map, line by line: a
// read that leaves room for a line has seen the end.
func preadAll(fd int, buf []byte) ([]byte, error) {
	if cap(buf) == 0 {
		buf = make([]byte, 0, 1024)
	}
	for {
		if cap(buf)-len(buf) < maxLine {
			if len(buf) >= maxProcFile {
				return nil, errors.New("file of /proc too long")
			}
			buf = slices.Grow(buf, len(buf))
		}
		n, err := unix.Pread(fd, buf[len(buf):cap(buf)], int64(len(buf)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		buf = buf[:len(buf)+n]
		if n == 0 || cap(buf)-len(buf) >= maxLine {
			return buf, nil
		}
	}
}

// read returns the content of a file of /proc/PID.
func (p *Process) read(name string) ([]byte, error) {
	fd, err := unix.Openat(p.proc, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(err)
	}
	defer closeFD(fd)
	b, err := preadAll(fd, nil)
	if err != nil {
		return nil, gone(err)
	}
	return b, nil
}

// gone turns what /proc answers for an ended process into ErrGone.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return ErrGone
	}
	return err
}

func (p *Process) namespace(name string) (ns, error) { return namespaceAt(p.proc, name) }

// namespaceAt reads a link such as "user:[4026531837]". That is half the price
// of following it for its inode number, with the same permission check.
func namespaceAt(dir int, name string) (ns, error) {
	var buf [64]byte
	n, err := unix.Readlinkat(dir, name, buf[:])
	if err != nil {
		return 0, gone(err)
	}
	_, number, ok := bytes.Cut(buf[:n], []byte{'['})
	number, closed := bytes.CutSuffix(number, []byte{']'})
	ino, err := strconv.ParseUint(string(number), 10, 64)
	if !ok || !closed || err != nil {
		return 0, errMalformed
	}
	return ns(ino), nil
}
