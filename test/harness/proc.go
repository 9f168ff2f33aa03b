package harness

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// Proc is a process under test, a puppet that does what the test asks. Its
// methods fail the test on an error of the harness; those that return an error
// return what the kernel answered to the puppet.
type Proc struct {
	// Cred is what it is by the numbers of its own namespaces; HostPID,
	// HostUID and HostGID are the same by those of the test.
	Cred
	HostPID          int
	HostUID, HostGID uint32

	t        testing.TB
	mu       sync.Mutex // one request at a time on ctl
	ctl      int
	parent   *Proc
	pidHere  int // its number in its parent's pid namespace
	children []*Proc
	reaped   bool
}

// Start starts a process as a child of the test process.
func Start(t testing.TB, s Spec) *Proc {
	t.Helper()
	ignoreSIGPIPE()
	return start(t, nil, s, func(control int) (int, error) {
		var pid int
		err := onSpawner(func() (err error) {
			pid, err = startPuppet(s, control)
			return err
		})
		return pid, err
	})
}

// StartInPIDNSOf starts a process of the host that enters p's pid namespace
// alone, as nsenter --pid does: user namespace and cgroups stay the host's.
func StartInPIDNSOf(t testing.TB, p *Proc, s Spec) *Proc {
	t.Helper()
	s.entered = true
	return start(t, nil, s, func(control int) (int, error) {
		var pid int
		err := inPidNS(p.HostPID, func() (err error) {
			pid, err = startPuppet(s, control)
			return err
		})
		return pid, err
	})
}

// Spawn starts a process as p's child.
func (p *Proc) Spawn(s Spec) *Proc {
	p.t.Helper()
	return start(p.t, p, s, func(control int) (int, error) {
		rp, _, err := p.do(request{Op: "spawn", Spec: &s}, control)
		return rp.Num, err
	})
}

func start(t testing.TB, parent *Proc, s Spec, spawn func(int) (int, error)) *Proc {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &Proc{t: t, ctl: pair[0], parent: parent}
	if err := unix.SetsockoptInt(p.ctl, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		t.Fatal(err)
	}
	p.pidHere, err = spawn(pair[1])
	unix.Close(pair[1]) // or a puppet that dies would never be noticed
	if err != nil {
		unix.Close(p.ctl)
		t.Fatalf("start %+v: %v", s, err)
	}
	if parent != nil {
		parent.children = append(parent.children, p)
	} else {
		t.Cleanup(p.Stop)
	}
	buf := make([]byte, maxControl)
	n, _, cred, err := recvmsg(p.ctl, buf, cgtest.Patience(10*time.Second))
	if err != nil || n == 0 || cred == nil {
		t.Fatalf("start %+v: no word from the puppet: %v", s, err)
	}
	var hello reply
	if err := json.Unmarshal(buf[:n], &hello); err != nil {
		t.Fatal(err)
	}
	p.Cred = *hello.Cred
	p.HostPID, p.HostUID, p.HostGID = int(cred.PID), cred.UID, cred.GID
	return p
}

// Stop ends p and all its children, and waits for them.
func (p *Proc) Stop() {
	p.t.Helper()
	for _, c := range p.children {
		c.Stop()
	}
	p.children = nil
	if p.ctl >= 0 {
		unix.Close(p.ctl)
		p.ctl = -1
	}
	if p.reaped {
		return
	}
	if _, err := p.wait(200 * time.Millisecond); err != nil {
		// It hangs in a request, or is frozen: it is our own child, unreaped,
		// so the number is still its.
		_ = unix.Kill(p.HostPID, unix.SIGKILL)
		if _, err := p.wait(cgtest.Patience(5 * time.Second)); err != nil && !errors.Is(err, unix.ECHILD) {
			p.t.Errorf("process %d does not end: %v", p.HostPID, err)
		}
	}
}

// Reaped says that another function of the test's has ended p and waited for it.
func (p *Proc) Reaped() {
	p.reaped = true
	if p.ctl >= 0 {
		unix.Close(p.ctl)
		p.ctl = -1
	}
}

// Wait waits until p has ended and returns how. With a timeout it returns
// unix.ETIMEDOUT.
func (p *Proc) Wait(timeout time.Duration) (unix.WaitStatus, error) {
	p.t.Helper()
	return p.wait(cgtest.Patience(timeout))
}

func (p *Proc) wait(timeout time.Duration) (unix.WaitStatus, error) {
	if p.reaped {
		return 0, unix.ECHILD
	}
	rq := request{Op: "wait", Num: p.pidHere, Wait: timeout}
	var rp reply
	var err error
	if p.parent != nil {
		rp, _, err = p.parent.do(rq)
	} else {
		err = waitPid(&rq, &rp)
	}
	if err != nil {
		return 0, err
	}
	p.reaped = true
	return unix.WaitStatus(rp.Num), nil
}

// Dead reports whether p is killed within the timeout.
func (p *Proc) Dead(timeout time.Duration) bool {
	ws, err := p.wait(cgtest.Patience(timeout))
	return err == nil && ws.Signaled() && ws.Signal() == unix.SIGKILL
}

// Alive reports whether p has not ended: a zombie is dead.
func (p *Proc) Alive() bool {
	if p.reaped {
		return false
	}
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.HostPID))
	if err != nil {
		return false
	}
	_, after, ok := strings.Cut(string(st), ") ")
	return ok && after[0] != 'Z' && after[0] != 'X'
}

// ErrGone says that a puppet ended instead of answering.
var ErrGone = errors.New("the process is gone")

func (p *Proc) do(rq request, fds ...int) (reply, []int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var rp reply
	if p.ctl < 0 {
		return rp, nil, ErrGone
	}
	b, err := json.Marshal(rq)
	if err != nil {
		return rp, nil, err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(p.ctl, b, oob, nil, unix.MSG_NOSIGNAL); err != nil {
		return rp, nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	buf := make([]byte, maxControl)
	wait := cgtest.Patience(20*time.Second) + rq.Wait
	if rq.Op == "run" {
		wait = 5 * time.Minute
	}
	n, got, _, err := recvmsg(p.ctl, buf, wait)
	if err != nil {
		return rp, nil, fmt.Errorf("%s in process %d: %w", rq.Op, p.HostPID, err)
	}
	if n == 0 {
		return rp, nil, ErrGone
	}
	if err := json.Unmarshal(buf[:n], &rp); err != nil {
		return rp, nil, err
	}
	switch {
	case rp.Errno != 0:
		return rp, got, unix.Errno(rp.Errno)
	case rp.Err != "":
		return rp, got, errors.New(rp.Err)
	}
	return rp, got, nil
}

func (p *Proc) must(rq request, fds ...int) (reply, []int) {
	p.t.Helper()
	rp, got, err := p.do(rq, fds...)
	if err != nil {
		p.t.Fatalf("%s %s: %v", rq.Op, rq.Path, err)
	}
	return rp, got
}

// Run calls a function registered by Inside in p and stores its result.
func (p *Proc) Run(name string, args, result any) error {
	b, err := json.Marshal(args)
	if err != nil {
		return err
	}
	rp, _, err := p.do(request{Op: "run", Path: name, Args: b})
	if err != nil {
		return err
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(rp.Result, result)
}

// Exec runs a program as p's child, for at most 10 seconds or more on a busy
// machine, and returns its output and exit code. as may be nil.
func (p *Proc) Exec(as *Cred, argv ...string) (string, int) {
	p.t.Helper()
	rp, _ := p.must(request{Op: "exec", Argv: argv, Cred: as, Wait: cgtest.Patience(10 * time.Second)})
	return string(rp.Data), rp.Num
}

// Child is a program that a puppet launched.
type Child struct {
	// PID is its number in the puppet's pid namespace.
	PID int
	// In is the other end of its standard input, Out of its output.
	In, Out *os.File
	p       *Proc
	said    []byte
	ended   bool // all is said
}

// Said returns what the child wrote up to its first zero byte, or up to the end
// if it ended before. The error is os.ErrDeadlineExceeded if neither comes in
// time.
func (c *Child) Said(timeout time.Duration) (string, error) {
	if err := c.Out.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	buf := make([]byte, 4096)
	for !c.ended {
		n, err := c.Out.Read(buf)
		c.said = append(c.said, buf[:n]...)
		switch {
		case errors.Is(err, io.EOF), bytes.IndexByte(buf[:n], 0) >= 0:
			c.ended = true
		case err != nil:
			return "", err
		}
	}
	said, _, _ := bytes.Cut(c.said, []byte{0})
	return string(said), nil
}

// Launch starts a program as p's child, in p's cgroups, and does not wait for
// it. as may be nil.
func (p *Proc) Launch(as *Cred, argv ...string) *Child {
	p.t.Helper()
	rp, fds := p.must(request{Op: "launch", Argv: argv, Cred: as})
	// So that a read can be given a deadline.
	if err := unix.SetNonblock(fds[1], true); err != nil {
		p.t.Fatal(err)
	}
	return &Child{PID: rp.Num, In: os.NewFile(uintptr(fds[0]), "in"), Out: os.NewFile(uintptr(fds[1]), "out"), p: p}
}

// Kill kills the child, which has not been waited for.
func (c *Child) Kill() error {
	_, _, err := c.p.do(request{Op: "kill", FD: c.PID, Num: int(unix.SIGKILL)})
	return err
}

// End closes the pipes, after which the test's programs end, kills if that
// takes more than the timeout, and returns how it ended.
func (c *Child) End(timeout time.Duration) (unix.WaitStatus, error) {
	c.In.Close()
	c.Out.Close()
	rp, _, err := c.p.do(request{Op: "wait", Num: c.PID, Wait: timeout})
	if errors.Is(err, unix.ETIMEDOUT) {
		if err := c.Kill(); err != nil {
			return 0, err
		}
		rp, _, err = c.p.do(request{Op: "wait", Num: c.PID, Wait: cgtest.Patience(5 * time.Second)})
	}
	return unix.WaitStatus(rp.Num), err
}

// Socket makes an AF_UNIX socket of the type in p.
func (p *Proc) Socket(typ int) int {
	p.t.Helper()
	rp, _ := p.must(request{Op: "socket", Num: typ})
	return rp.Num
}

// Socketpair makes an unnamed pair of the type in p.
func (p *Proc) Socketpair(typ int) (int, int) {
	p.t.Helper()
	rp, _ := p.must(request{Op: "socketpair", Num: typ})
	return rp.FDs[0], rp.FDs[1]
}

// Connect connects the socket to a path ("@name" is an abstract one).
func (p *Proc) Connect(fd int, path string) error {
	_, _, err := p.do(request{Op: "connect", FD: fd, Path: path})
	return err
}

// Bind gives the socket a name.
func (p *Proc) Bind(fd int, path string) {
	p.t.Helper()
	p.must(request{Op: "bind", FD: fd, Path: path})
}

// Listen makes the socket accept connections.
func (p *Proc) Listen(fd int) {
	p.t.Helper()
	p.must(request{Op: "listen", FD: fd})
}

// Accept takes a connection that is already there.
func (p *Proc) Accept(fd int) int {
	p.t.Helper()
	rp, _ := p.must(request{Op: "accept", FD: fd})
	return rp.Num
}

// PassCred sets SO_PASSCRED.
func (p *Proc) PassCred(fd int) {
	p.t.Helper()
	p.must(request{Op: "passcred", FD: fd})
}

// Send writes one message with an explicit credential (nil: the kernel fills
// in p's own) and files.
func (p *Proc) Send(fd int, data []byte, cred *Cred, fds ...int) error {
	_, _, err := p.do(request{Op: "send", FD: fd, Data: data, Cred: cred, FDs: fds})
	return err
}

// Datagram is what Recv got. Cred is by the numbers of the receiver's
// namespaces.
type Datagram struct {
	Data []byte
	Cred *Cred
	FDs  []int
}

// Recv reads one message or as much of a stream as there is; the error is
// unix.ETIMEDOUT if nothing comes in the time, or longer on a busy machine.
func (p *Proc) Recv(fd int, wait time.Duration) (Datagram, error) {
	rp, _, err := p.do(request{Op: "recv", FD: fd, Num: 64 << 10, Wait: cgtest.Patience(wait)})
	return Datagram{Data: rp.Data, Cred: rp.Cred, FDs: rp.FDs}, err
}

// Close closes a file in p.
func (p *Proc) Close(fd int) {
	p.t.Helper()
	p.must(request{Op: "close", FD: fd})
}

// PidFD opens a pidfd in p for a pid of p's namespace.
func (p *Proc) PidFD(pid int) int {
	p.t.Helper()
	rp, _ := p.must(request{Op: "pidfd", Num: pid})
	return rp.Num
}

// Give passes one of p's open files to q and returns its number there.
func (p *Proc) Give(fd int, q *Proc) int {
	p.t.Helper()
	_, fds := p.must(request{Op: "export", FDs: []int{fd}})
	if len(fds) != 1 {
		p.t.Fatalf("export: %d files", len(fds))
	}
	defer unix.Close(fds[0])
	rp, _ := q.must(request{Op: "import"}, fds[0])
	return rp.FDs[0]
}

// Cgroups returns where p is: the path in each hierarchy, by the hierarchy's
// name.
func (p *Proc) Cgroups() map[string]string { return CgroupsOf(p.HostPID) }

// CgroupsOf returns where a process is, or nil if it is no more.
func CgroupsOf(pid int) map[string]string {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return nil
	}
	return ParseCgroups(string(b))
}

// ParseCgroups parses a /proc/PID/cgroup (cgroups(7)), but for hierarchies that
// other tests made for themselves.
func ParseCgroups(s string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(s) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		name := f[1]
		if name == "" {
			name = unified
		}
		if othersTest(name) {
			continue
		}
		m[name] = visible(name, f[2])
	}
	return m
}

// visible is a path without the hidden leaf that it may end in.
func visible(hierarchy, cg string) string {
	if dir, base := path.Split(cg); hierarchy == unified && strings.HasPrefix(base, leafName) {
		return path.Clean(dir)
	}
	return cg
}

var ignoreSIGPIPE = sync.OnceFunc(func() { signal.Ignore(unix.SIGPIPE) })

// NSpid returns p's numbers in its pid namespaces, from the test's inwards
// (proc_pid_status(5)).
func (p *Proc) NSpid() []int32 {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.HostPID))
	if err != nil {
		p.t.Fatal(err)
	}
	return p.nspid(string(b))
}

// Threads returns the same for each of p's threads.
func (p *Proc) Threads() [][]int32 {
	p.t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.HostPID))
	if err != nil {
		p.t.Fatal(err)
	}
	var all [][]int32
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended meanwhile
		}
		if err != nil {
			p.t.Fatal(err)
		}
		all = append(all, p.nspid(string(b)))
	}
	return all
}

func (p *Proc) nspid(status string) []int32 {
	p.t.Helper()
	for line := range strings.Lines(status) {
		if v, ok := strings.CutPrefix(line, "NSpid:"); ok {
			var pids []int32
			for f := range strings.FieldsSeq(v) {
				n, err := strconv.ParseInt(f, 10, 32)
				if err != nil {
					p.t.Fatal(err)
				}
				pids = append(pids, int32(n))
			}
			return pids
		}
	}
	p.t.Fatal("no NSpid line")
	return nil
}
