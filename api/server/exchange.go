package server

import (
	"encoding/binary"
	"errors"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// exchange is the side channel of an *Scm call (docs/PROTOCOL.md). The caller,
// a proxy, passed one end of a socket pair. The daemon sends a byte '1' for
// each credential that it wants, the caller answers each with a message that
// carries one, and the daemon sends the result, in one or more messages, and
// closes its end. Server.mu guards it.
type exchange struct {
	c      *conn
	fd     int
	events uint32 // what epoll watches for
	method *method
	rq     api.Request
	args   args
	creds  []api.Cred
	wait   deadline
	// The result, as far as it is not sent.
	frames [][]byte
	pids   []int32
	ended  bool
}

// exchange starts the side channel of a call, which is answered at once, as
// the original does. It reports whether it keeps fd. Called with mu held.
func (c *conn) exchange(mt *method, m *wire.Message, a *args, fd int, out []byte) ([]byte, bool) {
	var err error
	switch {
	case !c.isSidePair(fd):
		err = api.Errorf(api.Invalid, "%s: the file descriptor is not an end of an unnamed socket pair of the caller's own", mt.Name)
	case !c.roomForExchange():
		err = api.Errorf(api.Limit, "%s: too many calls wait for their credentials", mt.Name).WithHint("answer the kicks first")
	case mt.Changes && !c.spend():
		err = tooManyChanges(mt)
	}
	if err != nil {
		if m.WantsReply() {
			out = c.s.appendFailure(out, mt.iface, c.nextSerial(), m.Serial, err)
		}
		return out, false
	}
	e := &exchange{c: c, fd: fd, method: mt, rq: c.request(), args: *a}
	e.wait.expire = e.end
	if c.exchanges == nil {
		c.exchanges = map[*exchange]struct{}{}
	}
	c.exchanges[e] = struct{}{}
	c.refs++
	c.s.exchanges++
	for _, acct := range c.accounts {
		acct.exchanges++
	}
	c.starting = append(c.starting, e)
	return c.empty(out, m), true
}

func (c *conn) roomForExchange() bool {
	if len(c.exchanges) >= c.s.limits.Exchanges {
		return false
	}
	for _, a := range c.accounts {
		if a.exchanges >= c.s.limits.Exchanges {
			return false
		}
	}
	return true
}

// isSidePair reports whether fd is a connected Unix socket without a name on
// either side that a process of the opener's uid made, and has the kernel pass
// credentials over it: the daemon writes to nothing else. None of what it asks
// can block, whatever fd is.
func (c *conn) isSidePair(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || domain != unix.AF_UNIX {
		return false
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_DGRAM && kind != unix.SOCK_STREAM {
		return false
	}
	if !unnamed(unix.SYS_GETSOCKNAME, fd) || !unnamed(unix.SYS_GETPEERNAME, fd) {
		return false
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Pid <= 0 || cred.Uid != c.opener.UID {
		return false
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1) == nil
}

// unnamed reports whether a Unix socket, or its peer, has no name: an address
// of no more than its family (unix(7)).
func unnamed(call uintptr, fd int) bool {
	var addr unix.RawSockaddrUnix
	size := uint32(unsafe.Sizeof(addr))
	_, _, e := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&addr)), uintptr(unsafe.Pointer(&size)))
	return e == 0 && size == uint32(unsafe.Sizeof(addr.Family))
}

// wanted is how many credentials the call takes: of the requestor, and of the
// victim or the new owner.
func (e *exchange) wanted() int {
	if e.method.second == nobody {
		return 1
	}
	return 2
}

// start asks for the first credential. Called with mu held.
func (e *exchange) start() {
	if e.ended {
		return
	}
	e.c.s.start(&e.wait, &e.c.s.patience)
	e.kick()
}

// kick asks for a credential.
func (e *exchange) kick() {
	if _, err := wire.SendAs(e.fd, []byte{'1'}, e.c.opener); err != nil {
		e.end()
		return
	}
	e.watch(unix.EPOLLIN)
}

func (e *exchange) watch(events uint32) {
	if err := e.c.s.watch(e.fd, e, events, &e.events); err != nil {
		e.c.s.log.WithError(err).Debug("watch a side channel")
		e.end()
	}
}

// ready is called with mu held when the socket can be read, or, once there is
// a result, written.
func (e *exchange) ready(events uint32) {
	if e.events&unix.EPOLLOUT != 0 {
		e.send()
		return
	}
	var b [1]byte
	got, err := e.c.s.receiver.Recv(e.fd, b[:])
	if errors.Is(err, unix.EAGAIN) && events&(unix.EPOLLHUP|unix.EPOLLERR) == 0 {
		return
	}
	if len(got.FDs) > 0 {
		e.c.s.chargeForeign(e.c.accounts, len(got.FDs))
		e.c.s.closeForeign(e.c.accounts, append([]int(nil), got.FDs...))
		e.end()
		return
	}
	if err != nil || got.N == 0 || got.Cred.PID <= 0 {
		e.end()
		return
	}
	if e.creds = append(e.creds, got.Cred); len(e.creds) < e.wanted() {
		e.kick()
		return
	}
	e.wait.stop()
	e.watch(0)
	e.rq.For = &e.creds[0]
	switch e.method.second {
	case nobody:
	case victim:
		e.args.victim = api.Victim{Cred: &e.creds[1]}
	case owner:
		e.args.owner = api.Owner{UID: e.creds[1].UID, GID: e.creds[1].GID, Host: true}
	}
	e.c.refs++
	e.c.s.workers.submit(e, e.c.accounts)
}

// run makes the call, as a task.
func (e *exchange) run(buf []byte) []byte {
	s := e.c.s
	s.mu.Lock()
	ended := e.ended
	s.mu.Unlock()
	var r result
	var err error
	if !ended {
		r, err = s.call(e.method, &e.rq, &e.args, -1)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !e.ended {
		e.frames, e.pids = e.method.frames(&r, err)
		s.start(&e.wait, &s.patience)
		e.send()
	}
	e.c.unref()
	return buf
}

// maxFrame bounds a message on the side channel, in bytes: a datagram must fit
// the socket's buffer whole.
const maxFrame = 64 << 10

// keysBlock is what the original rounds the text of ListKeysScm up to.
const keysBlock = 1024

// frames returns the messages that make up a result on the side channel, and
// the pids that follow them, one message each.
func (mt *method) frames(r *result, err error) ([][]byte, []int32) {
	out := mt.sideOut
	if err != nil {
		switch out {
		case "s":
			return [][]byte{{}}, nil
		case "ai", "as", "a(suuu)":
			return [][]byte{int32Frame(-1)}, nil
		}
		return [][]byte{{'0'}}, nil
	}
	switch out {
	case "s":
		if len(r.text) >= maxFrame {
			return [][]byte{{}}, nil
		}
		return [][]byte{append([]byte(r.text), 0)}, nil
	case "i":
		if r.existed == api.DidExist {
			return [][]byte{{'2'}}, nil
		}
	case "ai":
		return [][]byte{int32Frame(len(r.pids))}, r.pids
	case "as":
		var block []byte
		for _, n := range r.names {
			block = append(append(block, n...), 0)
		}
		return listFrames(len(r.names), block), nil
	case "a(suuu)":
		var block []byte
		for _, k := range r.keys {
			block = append(append(block, k.Name...), '\n')
			for _, n := range []uint32{k.UID, k.GID, k.Mode} {
				block = append(strconv.AppendUint(block, uint64(n), 10), '\n')
			}
		}
		size := (len(block) + keysBlock) / keysBlock * keysBlock
		return listFrames(len(r.keys), append(block, make([]byte, size-len(block))...)), nil
	}
	return [][]byte{{'1'}}, nil
}

// listFrames are the messages of a list of n entries: its length, the length
// of its text, its text.
func listFrames(n int, text []byte) [][]byte {
	switch {
	case len(text) > maxFrame:
		return [][]byte{int32Frame(-1)}
	case n == 0:
		return [][]byte{int32Frame(0)}
	}
	return [][]byte{int32Frame(n), int32Frame(len(text)), text}
}

// int32Frame is a number in the machine's own byte order.
func int32Frame(n int) []byte {
	return binary.NativeEndian.AppendUint32(nil, uint32(int32(n)))
}

// sendBatch is how many messages of a result are sent before others get a
// turn.
const sendBatch = 256

// send sends what it can of the result, and ends when all is sent. Called with
// mu held.
func (e *exchange) send() {
	for range sendBatch {
		var err error
		switch {
		case len(e.frames) > 0:
			var n int
			if n, err = wire.SendAs(e.fd, e.frames[0], e.c.opener); err == nil {
				if e.frames[0] = e.frames[0][n:]; len(e.frames[0]) == 0 {
					e.frames = e.frames[1:]
				}
			}
		case len(e.pids) > 0:
			if err = e.sendPID(e.pids[0]); err == nil {
				e.pids = e.pids[1:]
			}
		default:
			e.end()
			return
		}
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			e.end()
			return
		}
	}
	e.watch(unix.EPOLLOUT)
}

// sendPID sends a task's number as a credential, with the opener's ids. The
// caller was told how many there are; in the place of one that is gone by now,
// it gets the daemon's own number.
func (e *exchange) sendPID(pid int32) error {
	cred := api.Cred{PID: pid, UID: e.c.opener.UID, GID: e.c.opener.GID}
	_, err := wire.SendAs(e.fd, []byte{'p'}, cred)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EPERM) {
		cred.PID = int32(os.Getpid())
		_, err = wire.SendAs(e.fd, []byte{'p'}, cred)
	}
	return err
}

// end closes the daemon's end of the socket. Called with mu held.
func (e *exchange) end() {
	if e.ended {
		return
	}
	e.ended = true
	e.wait.stop()
	s, c := e.c.s, e.c
	// The caller may hold a copy of the socket, so epoll must be told.
	if err := s.watch(e.fd, e, 0, &e.events); err != nil {
		s.log.WithError(err).Error("forget a side channel")
	}
	e.frames, e.pids = nil, nil
	delete(c.exchanges, e)
	s.exchanges--
	for _, a := range c.accounts {
		a.exchanges--
	}
	s.closeForeign(c.accounts, []int{e.fd})
	c.unref()
	if c.ended && len(c.exchanges) == 0 {
		c.close()
	}
}
