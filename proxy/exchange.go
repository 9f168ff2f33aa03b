package proxy

import (
	"bytes"
	"errors"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// exchangeTimeout bounds the whole of a side channel's exchange. The daemon
// waits 3 s for a credential; what it does then may take as long as any request.
const exchangeTimeout = replyTimeout

// maxDatagram bounds what is read at once of a side channel.
const maxDatagram = 64 << 10

// maxEntries bounds the length of a list that comes by a side channel.
const maxEntries = 64 << 10

// ownCred is the credential of a victim: its number counts alone, so the ids are
// those that this process may always send.
func ownCred(pid int32) api.Cred {
	return api.Cred{PID: pid, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}

// sideChannel is the proxy's end of the socket pair of an *Scm call.
type sideChannel struct {
	l        *lower
	conn     *net.UnixConn
	deadline time.Time
	buf      []byte
	control  []byte
	// named: all credentials are sent; the request may be carried out.
	named bool
}

// exchange makes the *Scm call that belongs to g and returns its result, of the
// signature out.
func (l *lower) exchange(c *peer, rq *api.Request, g *legacy, out string, creds []api.Cred) (a answer, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return a, os.NewSyscallError("socketpair", err)
	}
	uc, err := sideConn(pair[0])
	if err != nil {
		_ = unix.Close(pair[1])
		return a, err
	}
	defer func() { _ = uc.Close() }()
	args := append(slices.Clip(g.args), handle0{})
	m := method(api.Interface0, g.name+"Scm", args.signature())
	if err = c.speaks(rq.Sender); err == nil {
		_, err = l.call(rq.Sender, api.ObjectPath, api.Interface0, m, args.encode, pair[1])
	}
	_ = unix.Close(pair[1])
	if err != nil {
		return a, notCarriedOut(err) // it asks for whom first
	}
	s := &sideChannel{l: l, conn: uc, deadline: time.Now().Add(exchangeTimeout), buf: make([]byte, maxDatagram), control: make([]byte, 256)}
	for i, cred := range creds {
		if kick, _, err := s.receive(); err != nil {
			return a, err
		} else if string(kick) != "1" {
			return a, errRefused
		}
		if err := c.speaks(cred); err != nil {
			return a, err
		}
		s.named = i == len(creds)-1
		if err := s.send(cred); err != nil {
			s.named = false
			return a, err
		}
	}
	ok, err := s.result(&a, out)
	if err == nil && !ok {
		err = errRefused
	}
	return a, err
}

// sideConn makes a connection of the proxy's end of a pair.
func sideConn(fd int) (*net.UnixConn, error) {
	// Before the daemon can send: it counts when sending.
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	f := os.NewFile(uintptr(fd), "side channel")
	defer f.Close()
	if err != nil {
		return nil, os.NewSyscallError("setsockopt SO_PASSCRED", err)
	}
	conn, err := net.FileConn(f) // of a copy
	if err != nil {
		return nil, err
	}
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, errors.New("side channel: not a Unix socket")
	}
	return uc, nil
}

// errRefused is the one refusal that a side channel knows.
var errRefused = api.Errorf(api.Invalid, "the daemon below the proxy refuses, and does not say why")

func (s *sideChannel) lost(err error) error {
	return &lostError{err: err, read: s.named}
}

// send answers a kick.
func (s *sideChannel) send(cred api.Cred) error {
	oob := unix.UnixCredentials(&unix.Ucred{Pid: cred.PID, Uid: cred.UID, Gid: cred.GID})
	_, _, err := s.conn.WriteMsgUnix([]byte{'p'}, oob, nil)
	if err == nil {
		return nil
	}
	if refused := cannotName(err); refused != nil {
		return refused
	}
	return s.lost(systemError(err))
}

// receive returns the next datagram and the pid that came with it. A pair of
// datagram sockets does not tell that its other end is closed, so that the
// connection is looked at meanwhile.
func (s *sideChannel) receive() ([]byte, int32, error) {
	const look = 200 * time.Millisecond
	for {
		until := time.Now().Add(look)
		if until.After(s.deadline) {
			until = s.deadline
		}
		if err := s.conn.SetReadDeadline(until); err != nil {
			return nil, 0, err
		}
		n, oobn, flags, _, err := s.conn.ReadMsgUnix(s.buf, s.control)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !time.Now().Before(s.deadline) {
				return nil, 0, &lostError{err: errors.New("it did not answer on the side channel in time"), read: s.named, lasting: true}
			}
			if s.l.ended() {
				return nil, 0, s.lost(errors.New("it closed the connection"))
			}
			continue
		case err != nil:
			return nil, 0, s.lost(systemError(err))
		}
		pid, err := controlPID(s.control[:oobn])
		if err != nil || flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
			return nil, 0, &lostError{err: errors.New("its answer on the side channel is malformed"), read: s.named, lasting: true}
		}
		return s.buf[:n], pid, nil
	}
}

// controlPID returns the pid of the credential among control messages, and
// closes descriptors that came with it.
func controlPID(b []byte) (pid int32, err error) {
	msgs, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
		}
		if cred, err := unix.ParseUnixCredentials(&m); err == nil {
			pid = cred.Pid
		}
	}
	return pid, nil
}

var errForm = &lostError{err: errors.New("its answer on the side channel is malformed"), read: true, lasting: true}

// result reads the result into a. It is false where the daemon refuses.
func (s *sideChannel) result(a *answer, out string) (ok bool, err error) {
	first, _, err := s.receive()
	if err != nil {
		return false, err
	}
	switch out {
	case "s":
		text, _, terminated := bytes.Cut(first, []byte{0})
		a.text = string(text)
		if len(first) > 0 && (!terminated || !wire.ValidString(a.text)) {
			return false, errForm
		}
		return len(first) > 0, nil
	case "ai", "as", "a(suuu)":
		n, whole := int32Of(first)
		if !whole || n > maxEntries {
			return false, errForm
		}
		if n < 0 {
			return false, nil
		}
		if out == "ai" {
			return true, s.pids(a, int(n))
		}
		return true, s.list(a, out, int(n))
	}
	switch string(first) {
	case "0":
		return false, nil
	case "1":
		a.number = int32(api.DidNotExist)
	case "2":
		a.number = int32(api.DidExist)
	default:
		return false, errForm
	}
	return true, nil
}

// pids reads n tasks, each a credential that the kernel translated: 0 is one that
// is not visible here.
func (s *sideChannel) pids(a *answer, n int) error {
	for range n {
		_, pid, err := s.receive()
		if err != nil {
			return err
		}
		a.pids = append(a.pids, pid)
	}
	return nil
}

// list reads a list of n names or keys.
func (s *sideChannel) list(a *answer, out string, n int) error {
	if n == 0 {
		return nil
	}
	b, _, err := s.receive()
	if err != nil {
		return err
	}
	size, whole := int32Of(b)
	if !whole || size < 0 || size > wire.MaxReply {
		return errForm
	}
	var text []byte
	for len(text) < int(size) {
		b, _, err := s.receive()
		if err != nil {
			return err
		}
		if len(b) == 0 {
			return errForm
		}
		text = append(text, b...)
	}
	if !wire.ValidString(string(bytes.ReplaceAll(text, []byte{0}, nil))) {
		return errForm
	}
	if out == "as" {
		a.names = strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		if len(a.names) != n {
			return errForm
		}
		return nil
	}
	lines := strings.Split(strings.TrimRight(string(text), "\x00\n"), "\n")
	if len(lines) != 4*n {
		return errForm
	}
	for ; len(lines) > 0; lines = lines[4:] {
		k := api.Key{Name: lines[0]}
		for i, to := range []*uint32{&k.UID, &k.GID, &k.Mode} {
			// An id that the requestor has no number for is -1 here.
			v, err := strconv.ParseInt(lines[i+1], 10, 64)
			if err != nil || v < -1 || v > int64(api.NoID) {
				return errForm
			}
			*to = uint32(v)
		}
		a.keys = append(a.keys, k)
	}
	return nil
}
