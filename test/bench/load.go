package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgmanager/api/wire"
)

// load is a closed loop over some connections, on one thread.
type load struct {
	conns   int
	path    string
	plain   bool // an echo server: no handshake, the answer is as long as the question
	request *request
	victims victims
}

// figures are what a load measured, times in µs per call.
type figures struct{ rate, p50, p99, cpu float64 }

// stalled is how long an answer may take.
const stalled = 10 * time.Second

var errStalled = errors.New("no answer for " + stalled.String())

// run loads the server behind l.path for d. The processes are those whose
// processor time counts.
func (l *load) run(ctx context.Context, pids []int, d time.Duration) (figures, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return figures{}, os.NewSyscallError("epoll_create1", err)
	}
	defer unix.Close(ep)
	cs := make([]*loop, l.conns)
	for i := range cs {
		c := &loop{load: l, calls: l.request.calls}
		if l.request.perConn != nil {
			var victim *os.Process
			if l.victims != nil {
				victim = l.victims[i]
			}
			c.calls = l.request.perConn(i, victim)
		}
		defer func() { c.close() }()
		if !l.request.reconnect {
			if err := c.open(ep, i); err != nil {
				return figures{}, err
			}
			if !l.plain {
				if err := c.login(); err != nil {
					return figures{}, err
				}
			}
		}
		cs[i] = c
	}
	before, err := cpuTime(pids...)
	if err != nil {
		return figures{}, err
	}
	start := time.Now()
	times := make([]time.Duration, 0, 1<<16)
	for i, c := range cs {
		if err := c.start(ep, i); err != nil {
			return figures{}, err
		}
	}
	var events [64]unix.EpollEvent
	for live := len(cs); live > 0; {
		n, err := epollWait(ep, events[:])
		if err != nil {
			return figures{}, err
		}
		for _, e := range events[:n] {
			c := cs[e.Fd]
			done, err := c.read()
			if err != nil {
				return figures{}, err
			}
			if !done {
				continue
			}
			now := time.Now()
			times = append(times, now.Sub(c.asked))
			// The calls of a connection belong together: all or none.
			if c.next == 0 && (now.Sub(start) > d || ctx.Err() != nil) {
				live--
				continue
			}
			if err := c.start(ep, int(e.Fd)); err != nil {
				return figures{}, err
			}
		}
	}
	took := time.Since(start)
	after, err := cpuTime(pids...)
	if err != nil {
		return figures{}, err
	}
	slices.Sort(times)
	n := float64(len(times))
	return figures{
		rate: n / took.Seconds(),
		p50:  micros(times[len(times)/2]),
		p99:  micros(times[len(times)*99/100]),
		cpu:  micros(after-before) / n,
	}, ctx.Err()
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// epollWait waits on this thread: nothing else is to run in this process.
func epollWait(ep int, events []unix.EpollEvent) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), uintptr(unsafe.Pointer(&events[0])),
			uintptr(len(events)), uintptr(stalled.Milliseconds()), 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return 0, os.NewSyscallError("epoll_pwait", errno)
		case n == 0:
			return 0, errStalled
		}
		return int(n), nil
	}
}

// loop is a connection that repeats its calls.
type loop struct {
	*conn
	load  *load
	calls [][]byte
	next  int // of calls
	asked time.Time
}

func (c *loop) close() {
	if c.conn != nil {
		c.conn.close()
	}
}

func (c *loop) open(ep, index int) (err error) {
	if c.conn, err = dial(c.load.path, c.load.plain); err != nil {
		return err
	}
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(index)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, c.fd, &e))
}

// start sends the next call, on a new connection where the request wants one.
func (c *loop) start(ep, index int) error {
	c.asked = time.Now()
	call := c.calls[c.next]
	c.next = (c.next + 1) % len(c.calls)
	if !c.load.request.reconnect {
		return c.ask(call)
	}
	c.close()
	if err := c.open(ep, index); err != nil {
		return err
	}
	switch {
	case c.load.plain:
		return c.ask(call)
	case c.load.request.pipelined:
		c.pending = call
		return c.sendAll(append(slices.Clone(logInFirst), logInLast...))
	}
	c.pending = call
	return c.send(logInFirst)
}

// The client's side of the handshake, as libdbus does it: it waits for an
// answer after each of the first two lines.
var (
	logInFirst = []byte("\x00AUTH EXTERNAL " + hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid()))) + "\r\n")
	logInFDs   = []byte("NEGOTIATE_UNIX_FD\r\n")
	logInBegin = []byte("BEGIN\r\n")
	logInLast  = append(slices.Clone(logInFDs), logInBegin...)
)

// conn is a connection.
type conn struct {
	fd      int
	in      []byte
	serial  uint32
	plain   bool
	want    int    // bytes of an echo that are still to come
	state   int    // lines of the handshake that were answered
	pending []byte // the first call, until the handshake is over
}

func dial(path string, plain bool) (*conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	return &conn{fd: fd, plain: plain, in: make([]byte, 0, 512)}, nil
}

func (c *conn) close() {
	if c.fd >= 0 {
		_ = unix.Close(c.fd)
		c.fd = -1
	}
}

func (c *conn) send(b []byte) error {
	n, err := wire.Send(c.fd, b)
	if err == nil && n != len(b) {
		err = errors.New("short write")
	}
	return err
}

// ask sends a call.
func (c *conn) ask(call []byte) error {
	if c.plain {
		c.want = len(call)
		return c.send(call)
	}
	c.serial++
	binary.LittleEndian.PutUint32(call[8:], c.serial)
	return c.send(call)
}

// sendAll sends the handshake and the pending call at once.
func (c *conn) sendAll(handshake []byte) error {
	c.serial++
	binary.LittleEndian.PutUint32(c.pending[8:], c.serial)
	b := append(handshake, c.pending...)
	c.pending, c.state = nil, 2
	return c.send(b)
}

// login logs in and waits for it.
func (c *conn) login() error {
	if err := c.send(append(slices.Clone(logInFirst), logInLast...)); err != nil {
		return err
	}
	deadline := time.Now().Add(stalled)
	for bytes.Count(c.in, []byte("\n")) < 2 {
		if err := c.receive(); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return errStalled
		}
	}
	c.in = c.in[:0]
	c.state = loggedIn
	return nil
}

// loggedIn is the state in which only answers to calls are to come.
const loggedIn = 4

func (c *conn) receive() error {
	n, err := unix.Read(c.fd, c.in[len(c.in):cap(c.in)])
	if err != nil && !errors.Is(err, unix.EINTR) {
		return os.NewSyscallError("read", err)
	}
	if n == 0 && err == nil {
		return errors.New("the server closed the connection")
	}
	c.in = c.in[:len(c.in)+max(n, 0)]
	return nil
}

// read receives and reports whether a call has been answered.
func (c *conn) read() (bool, error) {
	if err := c.receive(); err != nil {
		return false, err
	}
	if c.plain {
		c.want -= len(c.in)
		c.in = c.in[:0]
		return c.want == 0, nil
	}
	for c.state < loggedIn {
		line, rest, whole := bytes.Cut(c.in, []byte("\r\n"))
		if !whole {
			return false, nil
		}
		want := "OK "
		if c.state%2 == 1 {
			want = "AGREE_UNIX_FD"
		}
		if !bytes.HasPrefix(line, []byte(want)) {
			return false, fmt.Errorf("log in: %q", line)
		}
		c.in = c.in[:copy(c.in, rest)]
		var err error
		switch c.state {
		case 0: // line by line: OK
			c.state, err = 1, c.send(logInFDs)
		case 1: // line by line: AGREE_UNIX_FD
			c.state = loggedIn
			c.serial++
			binary.LittleEndian.PutUint32(c.pending[8:], c.serial)
			err = c.send(append(slices.Clone(logInBegin), c.pending...))
		case 2: // all at once: OK
			c.state = 3
		case 3:
			c.state = loggedIn
		}
		if err != nil {
			return false, err
		}
	}
	n, err := wire.Size(c.in)
	if err != nil || n == 0 || n > len(c.in) {
		return false, err
	}
	var m wire.Message
	if err := m.Decode(c.in[:n]); err != nil {
		return false, err
	}
	if m.Type != wire.Return || m.ReplySerial != c.serial {
		return false, fmt.Errorf("an answer of type %d: %q", m.Type, m.Body)
	}
	c.in = c.in[:copy(c.in, c.in[n:])]
	return true, nil
}
