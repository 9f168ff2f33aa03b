package server

import (
	"errors"

	"golang.org/x/sys/unix"

	"cgmanager/api/wire"
)

// Descriptors that strangers passed are closed by the pool of closers: close
// waits up to SO_LINGER for a TCP socket with unsent data, and for ever for a
// FUSE file whose file system does not answer FLUSH.

// chargeForeign charges n received descriptors. Called with mu held.
func (s *Server) chargeForeign(accounts []*account, n int) {
	s.foreign += n
	for _, a := range accounts {
		a.foreign += n
	}
}

// foreignFull reports whether the next message could bring more descriptors
// than are allowed for. Called with mu held.
func (c *conn) foreignFull() bool {
	if c.s.foreign+wire.MaxFDs > c.s.maxForeign {
		return true
	}
	// As with connections, nobody has more than is left, nor the last of it.
	room := c.s.maxForeign - min(wire.MaxFDs, c.s.maxForeign/4) - c.s.foreign
	for _, a := range c.accounts {
		if n := a.foreign + wire.MaxFDs; n > c.s.limits.ForeignFDs || n > room {
			return true
		}
	}
	return false
}

// closeForeign closes descriptors that were charged. Called with mu held.
func (s *Server) closeForeign(accounts []*account, fds []int) {
	if len(fds) == 0 {
		return
	}
	s.closers.submit(&closing{s: s, fds: fds, done: func() {
		s.chargeForeign(accounts, -len(fds))
	}}, accounts)
}

// closing is the task that closes descriptors.
type closing struct {
	s    *Server
	fds  []int
	done func() // called with mu held
}

func (c *closing) run(buf []byte) []byte {
	c.s.closeStrange(c.fds)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.done()
	return buf
}

// closeStrange closes descriptors as a closer does.
func (s *Server) closeStrange(fds []int) {
	for _, fd := range fds {
		// So that close does not wait for data to be sent. It fails on what
		// is not a socket, and asks nothing of a file system.
		err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
		if err != nil && !errors.Is(err, unix.ENOTSOCK) {
			s.log.WithError(err).Debug("setsockopt SO_LINGER")
		}
		s.closeFD(fd)
	}
}

// leaving is the task that closes a connection, to which its peer sends no more,
// with what waits in it unread: descriptors that the kernel dropped there would
// linger.
type leaving struct{ c *conn }

func (l leaving) run(buf []byte) []byte {
	c, s := l.c, l.c.s
	var (
		receiver wire.Receiver
		data     [4096]byte
	)
	for s.reserve(c) {
		got, err := receiver.Recv(c.fd, data[:])
		s.closeStrange(got.FDs)
		s.mu.Lock()
		s.chargeForeign(c.accounts, -wire.MaxFDs)
		s.mu.Unlock()
		if got.N == 0 || err != nil && !errors.Is(err, wire.ErrControl) {
			break
		}
	}
	s.closeFD(c.fd)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.unref()
	return buf
}

// reserve charges what one message can bring, and reports whether there was room
// for it.
func (s *Server) reserve(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.foreignFull() {
		return false
	}
	s.chargeForeign(c.accounts, wire.MaxFDs)
	return true
}

// closeFD closes a descriptor. On Linux it is closed whatever close returns.
func (s *Server) closeFD(fd int) {
	if err := unix.Close(fd); err != nil && errors.Is(err, unix.EBADF) {
		s.log.WithError(err).Error("close")
	}
}
