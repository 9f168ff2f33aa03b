package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// controlFD is a puppet's end of its control socket (SOCK_SEQPACKET).
const controlFD = 3

// maxControl bounds a message on the control socket.
const maxControl = 128 << 10

// Spec says what kind of process to start. The zero value is a process like
// its parent.
type Spec struct {
	// UserNS, PIDNS, CgroupNS and NetNS make new namespaces. A process with a
	// pid namespace has a mount namespace and a /proc of its own as well.
	UserNS, PIDNS, CgroupNS, NetNS bool
	// MapFrom and MapSize: ids 0 to MapSize-1 of the new user namespace are
	// MapFrom and up of the parent's. MapSize 0 maps nothing.
	MapFrom, MapSize int
	// Maps is for maps of more than one piece, in place of the two.
	Maps []syscall.SysProcIDMap `json:",omitempty"`
	// SysAdmin keeps CAP_SYS_ADMIN over the new user namespace, also where
	// nothing is mapped and exec would drop all capabilities.
	SysAdmin bool
	// UID and GID are what the process becomes, by the numbers of its own
	// user namespace; with KeepIDs it stays what it is.
	UID, GID uint32
	KeepIDs  bool

	// entered: the parent is in another pid namespace.
	entered bool
}

// Cred is a credential as in SCM_CREDENTIALS (unix(7)), by the numbers of
// whoever sends or received it.
type Cred struct {
	PID      int32
	UID, GID uint32
}

// request is a message to a puppet, reply its answer. Files go along as
// SCM_RIGHTS.
type request struct {
	Op   string
	FD   int             `json:",omitempty"`
	FDs  []int           `json:",omitempty"`
	Num  int             `json:",omitempty"`
	Path string          `json:",omitempty"`
	Data []byte          `json:",omitempty"`
	Cred *Cred           `json:",omitempty"`
	Spec *Spec           `json:",omitempty"`
	Argv []string        `json:",omitempty"`
	Args json.RawMessage `json:",omitempty"`
	Wait time.Duration   `json:",omitempty"`
}

type reply struct {
	Err    string `json:",omitempty"`
	Errno  int    `json:",omitempty"`
	Num    int
	FDs    []int           `json:",omitempty"`
	Data   []byte          `json:",omitempty"`
	Cred   *Cred           `json:",omitempty"`
	Result json.RawMessage `json:",omitempty"`
}

// inside holds the functions that a test registered for puppets.
var inside = map[string]func(json.RawMessage) (any, error){}

// Inside registers a function that Proc.Run calls inside a puppet: for what
// must be faster than one system call at a time. It is called from a package
// level variable or an init function, so that test and puppet both have it.
func Inside[A, R any](name string, f func(A) (R, error)) string {
	if inside[name] != nil {
		panic("harness: two programs are called " + name)
	}
	inside[name] = func(raw json.RawMessage) (any, error) {
		var args A
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, err
		}
		return f(args)
	}
	return name
}

// A puppet's main goroutine stays on its first thread, which is nobody else's then, and
// lives as long as the puppet: Pdeathsig of its children is the thread's. Later than in
// init it might be on another already.
func init() {
	if os.Getenv(puppetEnv) != "" {
		runtime.LockOSThread()
	}
}

// puppetMain serves the control socket until the test closes it.
func puppetMain() {
	unix.CloseOnExec(controlFD)
	// Seldom: a thread that is realtime may wait for the collector's, which are not, and
	// take their CPU meanwhile. Where that is long RLIMIT_RTTIME ends it.
	debug.SetGCPercent(800)
	if strings.Contains(os.Getenv(puppetEnv), "proc") {
		if err := mountProc(); err != nil {
			fmt.Fprintln(os.Stderr, "puppet: mount /proc:", err)
			os.Exit(1)
		}
	}
	// The first word: the kernel tells the test who we are.
	hello, _ := json.Marshal(reply{Cred: &Cred{PID: int32(os.Getpid()), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}})
	if err := unix.Sendmsg(controlFD, hello, nil, nil, 0); err != nil {
		fmt.Fprintln(os.Stderr, "puppet: hello:", err)
		os.Exit(1)
	}
	buf := make([]byte, maxControl)
	for {
		n, fds, _, err := recvmsg(controlFD, buf, -1)
		if err != nil || n == 0 {
			os.Exit(0)
		}
		var rq request
		var rp reply
		var out []int
		if err := json.Unmarshal(buf[:n], &rq); err != nil {
			rp.Err = err.Error()
		} else {
			out, err = act(&rq, fds, &rp)
			if err != nil {
				rp.Err = err.Error()
				if no, ok := errors.AsType[unix.Errno](err); ok {
					rp.Errno = int(no)
				}
			}
		}
		b, err := json.Marshal(rp)
		if err != nil {
			b, _ = json.Marshal(reply{Err: err.Error()})
		}
		var oob []byte
		if len(out) > 0 {
			oob = unix.UnixRights(out...)
		}
		if err := unix.Sendmsg(controlFD, b, oob, nil, 0); err != nil {
			fmt.Fprintln(os.Stderr, "puppet: reply:", err)
			os.Exit(1)
		}
		if rq.Op == "launch" {
			for _, fd := range out {
				unix.Close(fd)
			}
		}
	}
}

func mountProc() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

// act does one request. The files it returns are sent with the reply.
func act(rq *request, fds []int, rp *reply) ([]int, error) {
	switch rq.Op {
	case "spawn":
		if len(fds) != 1 {
			return nil, errors.New("spawn: no control socket")
		}
		defer unix.Close(fds[0])
		pid, err := startPuppet(*rq.Spec, fds[0])
		rp.Num = pid
		return nil, err
	case "wait":
		return nil, waitPid(rq, rp)
	case "socket":
		fd, err := unix.Socket(unix.AF_UNIX, rq.Num|unix.SOCK_CLOEXEC, 0)
		rp.Num = fd
		return nil, err
	case "connect":
		return nil, unix.Connect(rq.FD, &unix.SockaddrUnix{Name: rq.Path})
	case "bind":
		return nil, unix.Bind(rq.FD, &unix.SockaddrUnix{Name: rq.Path})
	case "listen":
		return nil, unix.Listen(rq.FD, 16)
	case "accept":
		fd, _, err := unix.Accept4(rq.FD, unix.SOCK_CLOEXEC)
		rp.Num = fd
		return nil, err
	case "socketpair":
		p, err := unix.Socketpair(unix.AF_UNIX, rq.Num|unix.SOCK_CLOEXEC, 0)
		rp.FDs = p[:]
		return nil, err
	case "passcred":
		return nil, unix.SetsockoptInt(rq.FD, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	case "send":
		return nil, send(rq)
	case "recv":
		buf := make([]byte, rq.Num)
		n, got, cred, err := recvmsg(rq.FD, buf, rq.Wait)
		if err != nil {
			return nil, err
		}
		rp.Num, rp.Data, rp.FDs, rp.Cred = n, buf[:n], got, cred
		return nil, nil
	case "close":
		return nil, unix.Close(rq.FD)
	case "import":
		rp.FDs = fds
		return nil, nil
	case "export":
		return rq.FDs, nil
	case "pidfd":
		fd, err := unix.PidfdOpen(rq.Num, 0)
		rp.Num = fd
		return nil, err
	case "exec":
		return nil, runCommand(rq, rp)
	case "launch":
		return launch(rq, rp)
	case "kill":
		return nil, unix.Kill(rq.FD, unix.Signal(rq.Num))
	case "run":
		f, ok := inside[rq.Path]
		if !ok {
			return nil, fmt.Errorf("no function %q", rq.Path)
		}
		res, err := f(rq.Args)
		if err != nil {
			return nil, err
		}
		rp.Result, err = json.Marshal(res)
		return nil, err
	}
	return nil, fmt.Errorf("no operation %q", rq.Op)
}

func send(rq *request) error {
	var oob []byte
	if len(rq.FDs) > 0 {
		oob = append(oob, unix.UnixRights(rq.FDs...)...)
	}
	if rq.Cred != nil {
		oob = append(oob, unix.UnixCredentials(&unix.Ucred{Pid: rq.Cred.PID, Uid: rq.Cred.UID, Gid: rq.Cred.GID})...)
	}
	return unix.Sendmsg(rq.FD, rq.Data, oob, nil, unix.MSG_NOSIGNAL)
}

func waitPid(rq *request, rp *reply) error {
	deadline := time.Now().Add(rq.Wait)
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(rq.Num, &ws, unix.WNOHANG, nil)
		if err != nil && err != unix.EINTR {
			return err
		}
		if pid == rq.Num {
			rp.Num = int(ws)
			return nil
		}
		if time.Now().After(deadline) {
			return unix.ETIMEDOUT
		}
		time.Sleep(200 * time.Microsecond)
	}
}

func runCommand(rq *request, rp *reply) error {
	ctx, cancel := context.WithTimeout(context.Background(), rq.Wait)
	defer cancel()
	cmd := exec.CommandContext(ctx, rq.Argv[0], rq.Argv[1:]...)
	cmd.SysProcAttr = deathsig()
	if rq.Cred != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: rq.Cred.UID, Gid: rq.Cred.GID}
	}
	cmd.WaitDelay = cgtest.Patience(5 * time.Second)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	rp.Data = out.Bytes()
	if ee, ok := errors.AsType[*exec.ExitError](err); ok {
		rp.Num, err = ee.ExitCode(), nil
	}
	return err
}

// launch starts a program with pipes as its standard input and output, whose
// other ends go to the test.
func launch(rq *request, rp *reply) ([]int, error) {
	var in, out [2]int
	if err := unix.Pipe2(in[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	defer unix.Close(in[0])
	defer unix.Close(in[1])
	if err := unix.Pipe2(out[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	defer unix.Close(out[0])
	defer unix.Close(out[1])
	attr := deathsig()
	if rq.Cred != nil {
		attr.Credential = &syscall.Credential{Uid: rq.Cred.UID, Gid: rq.Cred.GID}
	}
	pid, err := syscall.ForkExec(rq.Argv[0], rq.Argv, &syscall.ProcAttr{
		Dir: "/", Env: inherited("DBUS_SYSTEM_BUS_ADDRESS"), Files: []uintptr{uintptr(in[0]), uintptr(out[1]), 2}, Sys: attr,
	})
	if err != nil {
		return nil, err
	}
	rp.Num = pid
	// Copies, because the originals are closed here.
	var fds []int
	for _, fd := range []int{in[1], out[0]} {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 10)
		if err != nil {
			return nil, err
		}
		fds = append(fds, d)
	}
	return fds, nil
}

// startPuppet clones a puppet that is described by s, with control as its end
// of the control socket, and returns its pid here.
func startPuppet(s Spec, control int) (int, error) {
	attr := deathsig()
	if s.entered {
		// The child would take a parent that it cannot see for a dead one.
		attr.Pdeathsig = 0
	}
	env := "1"
	if s.UserNS {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		m := s.Maps
		if s.MapSize > 0 {
			m = []syscall.SysProcIDMap{{ContainerID: 0, HostID: s.MapFrom, Size: s.MapSize}}
		}
		if len(m) > 0 {
			attr.UidMappings, attr.GidMappings = m, m
			attr.GidMappingsEnableSetgroups = true
		} else {
			s.KeepIDs = true // there is nothing else to become
		}
	}
	if s.PIDNS {
		attr.Cloneflags |= unix.CLONE_NEWPID | unix.CLONE_NEWNS
		if s.MapSize > 0 || len(s.Maps) > 0 || !s.UserNS {
			env += ",proc"
		}
	}
	if s.SysAdmin {
		attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
	}
	if s.CgroupNS {
		attr.Cloneflags |= unix.CLONE_NEWCGROUP
	}
	if s.NetNS {
		attr.Cloneflags |= unix.CLONE_NEWNET
	}
	if !s.KeepIDs {
		attr.Credential = &syscall.Credential{Uid: s.UID, Gid: s.GID}
	}
	dup, err := unix.FcntlInt(uintptr(control), unix.F_DUPFD_CLOEXEC, 10)
	if err != nil {
		return 0, err
	}
	defer unix.Close(dup)
	return syscall.ForkExec("/proc/self/exe", []string{"puppet"}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   append(inherited("DBUS_SYSTEM_BUS_ADDRESS", "CGM_VM"), puppetEnv+"="+env, "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"),
		Files: []uintptr{0, 1, 2, uintptr(dup)},
		Sys:   attr,
	})
}

// inherited is what of the test's own environment others have: a puppet which bus is the
// system's, and, so that it has as much patience, whether the machine is emulated.
func inherited(names ...string) (all []string) {
	for _, name := range names {
		if v := os.Getenv(name); v != "" {
			all = append(all, name+"="+v)
		}
	}
	return all
}

// recvmsg reads one message within wait (for ever if it is negative) and
// returns the files and the credential that came with it.
func recvmsg(fd int, buf []byte, wait time.Duration) (int, []int, *Cred, error) {
	if wait >= 0 {
		deadline := time.Now().Add(wait)
		for {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			left := max(time.Until(deadline), 0)
			n, err := unix.Poll(p, int((left+time.Millisecond-1)/time.Millisecond))
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return 0, nil, nil, err
			}
			if n == 0 {
				return 0, nil, nil, unix.ETIMEDOUT
			}
			break
		}
	}
	oob := make([]byte, unix.CmsgSpace(253*4)+unix.CmsgSpace(unix.SizeofUcred))
	var n, oobn, flags int
	var err error
	for {
		n, oobn, flags, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, nil, nil, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return 0, nil, nil, errors.New("control data truncated")
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, nil, nil, err
	}
	var fds []int
	var cred *Cred
	for _, m := range msgs {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
		if u, err := unix.ParseUnixCredentials(&m); err == nil {
			cred = &Cred{PID: u.Pid, UID: u.Uid, GID: u.Gid}
		}
	}
	return n, fds, cred, nil
}
