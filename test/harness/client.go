package harness

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// Client is a connection of the process itself: of a function that runs inside a
// puppet. It tells what was sent from what was not.
type Client struct {
	fd     int
	serial uint32
	buf    []byte
}

// ErrNotSent says that the kernel did not take the whole of a request: it was
// surely not carried out.
var ErrNotSent = errors.New("not sent")

// DialClient connects and logs in.
func DialClient(sock string) (*Client, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	c := &Client{fd: fd}
	if err := c.login(sock); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) login(sock string) error {
	wait := unix.NsecToTimeval(int64(cgtest.Patience(replyTimeout)))
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	if err := unix.Connect(c.fd, &unix.SockaddrUnix{Name: sock}); err != nil {
		return err
	}
	id := fmt.Sprintf("%x", strconv.Itoa(unix.Getuid()))
	if err := c.send(handshake(id)); err != nil {
		return err
	}
	for !bytes.Contains(c.buf, []byte("AGREE_UNIX_FD\r\n")) {
		if err := c.more(); err != nil {
			return fmt.Errorf("login: %w", err)
		}
	}
	_, c.buf, _ = bytes.Cut(c.buf, []byte("AGREE_UNIX_FD\r\n"))
	return nil
}

// Close closes the connection.
func (c *Client) Close() { unix.Close(c.fd) }

func (c *Client) send(b []byte) error {
	for len(b) > 0 {
		n, err := uninterrupted(func(fd int, b []byte) (int, error) {
			return unix.SendmsgN(fd, b, nil, nil, unix.MSG_NOSIGNAL)
		}, c.fd, b)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrNotSent, err)
		}
		b = b[n:]
	}
	return nil
}

func (c *Client) more() error {
	b := make([]byte, 4096)
	n, err := Read(c.fd, b)
	if err == nil && n == 0 {
		err = io.EOF
	}
	c.buf = append(c.buf, b[:max(n, 0)]...)
	return err
}

// Call makes a method call and returns the values of the reply. The error is a
// *DBusError, ErrNotSent, or whatever came in place of the answer to a request
// that was sent.
func (c *Client) Call(iface, member string, args ...any) ([]any, error) {
	c.serial++
	if err := c.send(encodeCall(c.serial, objectOf(iface), iface, member, args)); err != nil {
		return nil, err
	}
	for !complete(c.buf) {
		if err := c.more(); err != nil {
			return nil, err
		}
	}
	to, values, rest, err := answer(c.buf, fmt.Sprint(member, args))
	if c.buf = rest; err == nil && to != c.serial {
		err = fmt.Errorf("an answer to request %d, not %d", to, c.serial)
	}
	return values, err
}
