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
	for _, fd := range c.fds {
		// So that close does not wait for data to be sent. It fails on what
		// is not a socket, and asks nothing of a file system.
		err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
		if err != nil && !errors.Is(err, unix.ENOTSOCK) {
			c.s.log.WithError(err).Debug("setsockopt SO_LINGER")
		}
		c.s.closeFD(fd)
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.done()
	return buf
}

// closeFD closes a descriptor. On Linux it is closed whatever close returns.
func (s *Server) closeFD(fd int) {
	if err := unix.Close(fd); err != nil && errors.Is(err, unix.EBADF) {
		s.log.WithError(err).Error("close")
	}
}
