package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/api"
)

// Enter moves the calling process into the cgroup, for execve(2) to follow at
// once. It closes the connection.
//
// The cgroup may have a limit of processes (pids.max counts threads) that this
// process exceeds already. Were the runtime to make a thread after the move, to
// wake a goroutine or to take over from a system call that blocks, the program
// would crash. So Enter lets the runtime have one processor, which the calling
// goroutine keeps from the request to the reply: it talks on a socket of its
// own, by system calls that the scheduler does not see. On success this state
// is left as it is.
func (c *Client) Enter(ctx context.Context, name string) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	deadline, _ := ctx.Deadline()
	login, call, err := moveRequest(name, uint32(os.Getpid()))
	if err != nil {
		return err
	}
	fd, err := c.rawSocket(deadline)
	if err != nil {
		return fmt.Errorf("connect to cgmanager at %s: %w", c.address, err)
	}
	defer func() { _ = unix.Close(fd) }()
	_ = c.conn.Close()

	gc := debug.SetGCPercent(-1)
	procs := runtime.GOMAXPROCS(1)
	if err := enter(fd, login, call, deadline); err != nil {
		runtime.GOMAXPROCS(procs)
		debug.SetGCPercent(gc)
		return err
	}
	return nil
}

// moveRequest returns what to say: the login, and the call Move.
func moveRequest(name string, pid uint32) (login, call []byte, err error) {
	m := &dbus.Message{
		Type: dbus.TypeMethodCall,
		Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath(api.ObjectPath)),
			dbus.FieldInterface: dbus.MakeVariant(interface1),
			dbus.FieldMember:    dbus.MakeVariant("Move"),
			dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(name, pid)),
		},
		Body: []any{name, pid},
	}
	var b bytes.Buffer
	if err := m.EncodeTo(&b, binary.LittleEndian); err != nil {
		return nil, nil, fmt.Errorf("encode the request: %w", err)
	}
	// The library leaves the serial, bytes 8 to 11, to its own connections.
	binary.LittleEndian.PutUint32(b.Bytes()[8:], 1)
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	return []byte("\x00AUTH EXTERNAL " + uid + "\r\nBEGIN\r\n"), b.Bytes(), nil
}

// rawSocket connects to the daemon once more, with timeouts that make what
// follows end at the deadline.
func (c *Client) rawSocket(deadline time.Time) (fd int, err error) {
	name, err := api.SocketName(c.address)
	if err != nil {
		return -1, err
	}
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	timeout := unix.NsecToTimeval(int64(max(time.Until(deadline), time.Millisecond)))
	err = errors.Join(
		os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)),
		os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout)),
	)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: name})
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// enter logs in, sends the call and reads the reply. The call waits for the
// answer to the login: before Linux 6.5 the daemon takes none that came earlier.
func enter(fd int, login, call []byte, deadline time.Time) error {
	if err := rawWrite(fd, login); err != nil {
		return fmt.Errorf("Move: %w", err)
	}
	var reply []byte
	for {
		if done, err := entered(reply); done {
			return err
		}
		if call != nil && bytes.Contains(reply, []byte("\r\n")) {
			if err := rawWrite(fd, call); err != nil {
				return fmt.Errorf("Move: %w", err)
			}
			call = nil
		}
		if len(reply) > maxReply || time.Now().After(deadline) {
			return errors.New("Move: no reply in time")
		}
		var buf [4096]byte
		n, err := rawRead(fd, buf[:])
		switch {
		case err == unix.EAGAIN:
			return errors.New("Move: no reply in time")
		case err != 0:
			return fmt.Errorf("Move: %w", err)
		case n == 0:
			return errors.New("Move: the daemon closed the connection")
		}
		reply = append(reply, buf[:n]...)
	}
}

// maxReply bounds what is read of the daemon's answer: a line, and an error's
// text.
const maxReply = 64 << 10

// entered looks at what the daemon has answered so far: the line of the login,
// and a message. It reports whether that is all.
func entered(reply []byte) (done bool, err error) {
	line, message, ok := bytes.Cut(reply, []byte("\r\n"))
	if !ok {
		return false, nil
	}
	if !bytes.HasPrefix(line, []byte("OK ")) {
		return true, errors.New("Move: the daemon refuses the login")
	}
	if len(message) < 16 {
		return false, nil
	}
	order := binary.ByteOrder(binary.LittleEndian)
	if message[0] == 'B' {
		order = binary.BigEndian
	}
	// Head, fields (padded to 8) and body (D-Bus specification, "Message
	// Format"). Each is bounded, lest the sum be too.
	fields, body := order.Uint32(message[12:]), order.Uint32(message[4:])
	if fields > maxReply || body > maxReply {
		return true, errors.New("Move: the reply is too long")
	}
	if len(message) < 16+int(fields+7)&^7+int(body) {
		return false, nil
	}
	m, err := dbus.DecodeMessage(bytes.NewReader(message))
	if err != nil {
		return true, fmt.Errorf("reply to Move: %w", err)
	}
	if m.Type == dbus.TypeError {
		name, _ := m.Headers[dbus.FieldErrorName].Value().(string)
		return true, callError("Move", dbus.Error{Name: name, Body: m.Body})
	}
	return true, nil
}

func rawWrite(fd int, b []byte) error {
	for len(b) > 0 {
		n, _, errno := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd),
			uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		switch errno {
		case 0:
			b = b[n:]
		case unix.EINTR:
		default:
			return errno
		}
	}
	return nil
}

func rawRead(fd int, b []byte) (int, syscall.Errno) {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}
