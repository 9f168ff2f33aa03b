package server

import (
	"errors"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// conn is a connection. Server.mu guards it.
type conn struct {
	s      *Server
	fd     int
	events uint32 // what epoll watches for
	id     uint64
	opener api.Cred

	peer     api.Peer // nil until the opener is established
	accounts []*account
	auth     *wire.SASL // until BEGIN
	passesFD bool       // negotiated

	// early counts the bytes, not yet received, that were there before the
	// opener was held by a pidfd, where the kernel gave none: whoever sent them
	// may have ended, and its number may be the opener's by reuse. A login gives
	// no right; calls among them end the connection.
	early  int
	in     []byte   // received and not handled yet, ...
	sender api.Cred // ... all of it with this credential
	fds    []int    // received, and of no message yet
	out    []byte   // to be sent
	serial uint32   // of the last answer

	// handshaking: charged as a connection in its handshake.
	handshaking bool
	// busy: a request is with the Backend, and nothing else is handled.
	busy bool
	// ended: end of file; the peer has sent all it can send.
	ended  bool
	closed bool
	// refs counts what needs peer and the place in accounts: the open socket,
	// requests in flight, a close that takes its time.
	refs      int
	held      int // handles that the Backend keeps beside the opener's; charged
	buffered  int // charged
	exchanges map[*exchange]struct{}
	starting  []*exchange // to be started when their calls are answered
	wait      deadline    // for the handshake, the rest of a message, or for out to be read
}

// open takes over an accepted socket. Called with mu held.
func (s *Server) open(fd int) {
	s.lastID++
	c := &conn{s: s, fd: fd, id: s.lastID, refs: 1}
	s.conns[c] = struct{}{}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err == nil {
		// Inherited from the listening socket; this is a belt to the braces.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}
	if err != nil || cred.Pid <= 0 {
		c.close()
		return
	}
	c.opener = api.Cred{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}
	if s.draining && !c.sealed() {
		return
	}
	c.wait.expire = c.close
	s.start(&c.wait, &s.handshakes)
	pidfd, err := s.peerPIDFD(fd)
	switch {
	case errors.Is(err, unix.ENOPROTOOPT):
		pidfd = -1 // Linux before 6.5; see early
	case err != nil:
		c.close() // the peer has ended, and its number may be another's
		return
	}
	s.opening++
	c.refs++
	// Nobody knows the opener's containers yet: charged to its uid.
	var accounts []*account
	if cred.Uid != 0 {
		accounts = []*account{s.account("opening " + strconv.FormatUint(uint64(cred.Uid), 10))}
	}
	s.workers.submit(&opening{c, pidfd}, accounts)
}

// opening is the task that establishes the opener of a connection.
type opening struct {
	c     *conn
	pidfd int
}

func (o *opening) run(buf []byte) []byte {
	c := o.c
	peer, err := c.s.openPeer(c.opener, o.pidfd)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.opening--
	c.s.resumeIfRoom()
	out := buf[:0]
	if err != nil {
		c.close()
	} else if c.peer = peer; !c.charge() {
		c.close()
	} else if !c.closed {
		if o.pidfd < 0 {
			c.early = unread(c.fd)
		}
		c.auth = wire.NewSASL(c.s.guid, peer.AcceptsIdentity)
		c.watch(unix.EPOLLIN)
		out = c.read(out) // what a pipelining client has sent already
	}
	c.unref()
	return out
}

// openPeer calls the Backend.
func (s *Server) openPeer(opener api.Cred, pidfd int) (peer api.Peer, err error) {
	defer s.recovered(&err)
	peer, err = s.backend.Open(opener, pidfd)
	if err != nil {
		s.log.WithError(err).WithField("pid", opener.PID).Debug("refused a connection")
	}
	return peer, err
}

// charge charges the connection to the peer's accounts and reports whether
// all of them can bear it: nobody has more than is left for others, so that
// however many accounts take what they may there is room for one more, and the
// last of it is for peers without accounts. Called with mu held.
func (c *conn) charge() bool {
	l := &c.s.limits
	ok := true
	room := c.s.room()
	c.handshaking = true
	for _, name := range c.peer.Accounts() {
		a := c.s.account(name)
		c.accounts = append(c.accounts, a)
		a.conns++
		a.handshakes++
		if a.conns > l.Connections || a.conns > room || a.handshakes > l.Handshakes {
			ok = false
		}
	}
	return ok
}

// room is how many more connections peers with accounts may have.
func (s *Server) room() int {
	return s.limits.TotalConnections - s.limits.TotalConnections/16 - s.places()
}

// places is how many are taken by connections, and by what a Backend holds for
// them.
func (s *Server) places() int { return len(s.conns) + s.held }

// hold charges a handle that the Backend is to keep for the connection as a
// connection more, and reports whether there is room for it. Called with mu held.
func (c *conn) hold() bool {
	c.charged(1)
	l, room := &c.s.limits, c.s.room()
	ok := c.s.places() <= l.TotalConnections
	for _, a := range c.accounts {
		ok = ok && a.conns <= l.Connections && a.conns <= room
	}
	if !ok {
		c.charged(-1)
	}
	return ok
}

// charged changes the number of handles that the Backend keeps for the
// connection. Called with mu held.
func (c *conn) charged(n int) {
	c.held += n
	c.s.held += n
	for _, a := range c.accounts {
		a.conns += n
	}
}

// begun is called when the handshake is over.
func (c *conn) begun() {
	c.passesFD = c.auth.FDs()
	c.auth = nil
	c.wait.stop()
	c.handshaking = false
	for _, a := range c.accounts {
		a.handshakes--
	}
}

// close ends the connection. What it leaves behind goes when the last
// reference does. Called with mu held.
func (c *conn) close() {
	if c.closed {
		return
	}
	c.closed = true
	c.wait.stop()
	for e := range c.exchanges {
		e.end()
	}
	c.starting = nil
	c.s.closeForeign(c.accounts, c.fds)
	c.in, c.fds, c.out = nil, nil, nil
	c.recharge()
	// Descriptors that wait in the socket unread are dropped inside close,
	// which can block as closing them can. After this the peer sends no more.
	if !c.ended {
		if err := unix.Shutdown(c.fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
			c.s.log.WithError(err).Warn("shutdown")
		}
	}
	if c.ended || unread(c.fd) == 0 {
		c.s.forget(c.fd, &c.events)
		c.s.closeFD(c.fd)
		c.unref()
		return
	}
	c.watch(0)
	c.s.closers.submit(leaving{c}, c.accounts)
}

// unread returns how many bytes wait in a socket (SIOCINQ, unix(7)).
func unread(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	if err != nil {
		return -1
	}
	return n
}

// unref gives up a reference. Called with mu held.
func (c *conn) unref() {
	if c.refs--; c.refs > 0 {
		return
	}
	c.charged(-c.held)
	for _, a := range c.accounts {
		a.conns--
		if c.handshaking {
			a.handshakes--
		}
	}
	if c.peer != nil {
		c.peer.Close()
	}
	delete(c.s.conns, c)
	c.s.resumeIfRoom()
	c.s.checkEmpty()
}

// resumeIfRoom accepts again where a bound was why not.
func (s *Server) resumeIfRoom() {
	if s.paused && s.places() < s.limits.TotalConnections && s.opening < maxOpening/2 {
		s.resume()
	}
}

// watch is Server.watch for the connection.
func (c *conn) watch(events uint32) {
	if err := c.s.watch(c.fd, c, events, &c.events); err != nil {
		c.s.log.WithError(err).Error("watch a connection")
		c.close()
	}
}

// ready is called when the socket can be read or written, or its peer left.
func (c *conn) ready(uint32) {
	switch {
	case c.busy:
		// More input, or the end of it: it waits. Not watched meanwhile, or
		// epoll would tell again and again.
		c.watch(0)
	case len(c.out) > 0:
		if c.flush(nil); !c.closed && len(c.out) == 0 {
			c.s.out = c.advance(c.in, c.s.out[:0])
		}
	default:
		c.s.out = c.read(c.s.out[:0])
	}
}

// read receives once and handles what came. out is a buffer for the answers;
// it returns the buffer to use next. Called with mu held.
func (c *conn) read(out []byte) []byte {
	s := c.s
	buf := s.scratch[:]
	if c.foreignFull() {
		// May pass no more descriptors until its others are closed.
		n, fds, err := wire.Peek(c.fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return out
		case err != nil || fds:
			c.close()
			return out
		case n == 0:
			c.end()
			return out
		}
		buf = buf[:n]
	}
	got, err := s.receiver.Recv(c.fd, buf)
	if errors.Is(err, unix.EAGAIN) {
		return out
	}
	s.chargeForeign(c.accounts, len(got.FDs))
	c.fds = append(c.fds, got.FDs...)
	if err == nil && got.N == 0 { // whatever the credential says
		c.end()
		return out
	}
	switch {
	case err != nil,
		got.Cred.PID <= 0, // not visible here, or sent before SO_PASSCRED
		len(c.fds) > wire.MaxFDs,
		len(c.in) > 0 && got.Cred != c.sender: // two speak in one message
		c.close()
		return out
	}
	c.sender = got.Cred
	if len(c.in) > 0 {
		c.in = append(c.in, buf[:got.N]...)
		out = c.advance(c.in, out)
	} else {
		out = c.advance(buf[:got.N], out)
	}
	c.early = max(c.early-got.N, 0)
	return out
}

// flushAt is how many bytes of answers are gathered before they are sent.
const flushAt = 32 << 10

// advance handles in, as far as it can: up to half a message, a request that
// the Backend must answer, or answers that cannot be sent. It appends answers
// to out and sends them, keeps what is left of in, and returns out's buffer.
// Called with mu held.
func (c *conn) advance(in, out []byte) []byte {
	if c.auth != nil {
		used, o, err := c.auth.Read(in, out)
		in, out = in[used:], o
		if err != nil {
			c.flush(out)
			c.close()
			return out
		}
		if c.auth.Begun() {
			c.begun()
		}
	}
	if c.auth == nil && !c.passesFD && len(c.fds) > 0 {
		c.close() // not negotiated
		return out
	}
	if c.auth == nil && c.early > 0 && len(in) > 0 {
		c.s.log.WithField("pid", c.opener.PID).Debug("a call came before its sender was held by a pidfd")
		c.close()
		return out
	}
	for c.auth == nil && !c.busy && !c.closed && len(c.out) == 0 {
		n, err := wire.Size(in)
		if err == nil && (n == 0 || n > len(in)) {
			break
		}
		c.wait.stop()
		var m wire.Message
		if err == nil {
			err = m.Decode(in[:n])
		}
		if err == nil {
			out, err = c.handle(&m, out)
		}
		if err != nil {
			c.flush(out)
			c.close()
			return out
		}
		in = in[n:]
		if len(out) >= flushAt {
			c.flush(out)
			out = out[:0]
		}
	}
	c.flush(out)
	if c.closed {
		return out
	}
	if len(c.fds) > 0 && (len(in) == 0 || c.auth != nil) {
		c.close() // descriptors that no message announced
		return out
	}
	if len(in) == 0 {
		c.in = nil
	} else {
		c.in = append(c.in[:0], in...)
	}
	if !c.recharge() {
		c.close()
		return out
	}
	for _, e := range c.starting {
		e.start()
	}
	c.starting = nil
	if !c.busy && len(c.out) == 0 && !c.closed {
		if c.auth == nil && len(in) > 0 && c.wait.list == nil {
			c.s.start(&c.wait, &c.s.stalls)
		}
		c.watch(unix.EPOLLIN)
	}
	return out
}

// flush sends what waits, then b, and keeps what cannot be sent now. Called
// with mu held.
func (c *conn) flush(b []byte) {
	if len(c.out) > 0 {
		c.out = append(c.out, b...)
		b = c.out
	}
	if c.closed || len(b) == 0 {
		return
	}
	n, err := wire.Send(c.fd, b)
	if err != nil && (!errors.Is(err, unix.EAGAIN) || c.auth != nil) {
		c.close()
		return
	}
	waited := len(c.out) > 0
	if n == len(b) {
		if waited {
			c.out = nil
			c.wait.stop()
		}
		return
	}
	// A copy, so that the buffer of an answer half sent shrinks.
	c.out = append([]byte(nil), b[n:]...)
	if !c.recharge() {
		c.close()
		return
	}
	if n > 0 || !waited {
		c.s.start(&c.wait, &c.s.stalls)
	}
	c.watch(unix.EPOLLOUT)
}

// recharge charges what the connection buffers and reports whether its
// accounts can bear it. Called with mu held.
func (c *conn) recharge() bool {
	n := cap(c.in) + cap(c.out)
	ok := true
	for _, a := range c.accounts {
		a.buffered += n - c.buffered
		if a.buffered > c.s.limits.Buffered && n > c.buffered {
			ok = false
		}
	}
	c.buffered = n
	return ok
}

// sealed lets the peer send no more, so that the server can end once all that
// was sent is answered: the kernel fails what comes later (EPIPE), and a request
// that was sent is not lost. It reports whether the connection goes on. Called
// with mu held.
func (c *conn) sealed() bool {
	if err := unix.Shutdown(c.fd, unix.SHUT_RD); err != nil && !errors.Is(err, unix.ENOTCONN) {
		c.s.log.WithError(err).Warn("shutdown")
		c.close()
	}
	return !c.closed
}

// end is called at end of file, when all that came before is answered. Called
// with mu held.
func (c *conn) end() {
	c.ended = true
	if c.s.draining && len(c.exchanges) > 0 {
		// It was us who ended it, and the last exchange will close it.
		c.watch(0)
		return
	}
	c.close()
}

// takeFDs returns the descriptors that came with m, which are at most as many
// as it announces.
func (c *conn) takeFDs(m *wire.Message) []int {
	n := min(int(m.UnixFDs), len(c.fds))
	if n == 0 {
		return nil
	}
	fds := c.fds[:n:n]
	if c.fds = c.fds[n:]; len(c.fds) == 0 {
		c.fds = nil
	}
	return fds
}

func ptr[T any](s []T) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(s)) }
