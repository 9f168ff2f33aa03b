package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// replyTimeout is how long the daemon below may take for a request: as long as
// clients wait by default.
const replyTimeout = 25 * time.Second

// ErrVersion is of a daemon below that serves cgmanager0_0 in a version that there
// is no proxy for.
var ErrVersion = errors.New("it is a cgmanager of another version")

// A lostError says that the connection to the daemon below failed.
type lostError struct {
	err error
	// read: the daemon may have read the request whole, and carried it out.
	read bool
	// lasting: waiting will not help.
	lasting bool
}

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// lower is a connection to the daemon below.
type lower struct {
	conn     *net.UnixConn
	original bool // it is the original cgmanager
	passed   int  // hops that it knows
	serial   uint32
	in       []byte // received and not read yet
}

// dialLower connects and logs in.
func dialLower(path string, deadline time.Time) (*lower, error) {
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		lasting := true
		for _, e := range []error{unix.ENOENT, unix.ECONNREFUSED, unix.EAGAIN, unix.ECONNRESET, os.ErrDeadlineExceeded, context.DeadlineExceeded} {
			lasting = lasting && !errors.Is(err, e)
		}
		return nil, &lostError{err: systemError(err), lasting: lasting}
	}
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, errors.New("not a Unix socket")
	}
	l := &lower{conn: uc}
	if err := l.login(deadline); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// systemError strips what net wraps around the system's error: its text would
// show paths to clients.
func systemError(err error) error {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno
	}
	return err
}

func (l *lower) close() { _ = l.conn.Close() }

// login shakes hands. The answer is waited for: before Linux 6.5 the daemon
// takes no request that came earlier. No identity is named: the original takes one
// for a uid of its own user namespace, and refuses that of a container's root.
func (l *lower) login(deadline time.Time) error {
	if err := l.conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := io.WriteString(l.conn, "\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"); err != nil {
		return &lostError{err: systemError(err)}
	}
	for _, want := range []string{"DATA", "OK ", "AGREE_UNIX_FD"} {
		line, err := l.line()
		if err != nil {
			return err
		}
		if !strings.HasPrefix(line, want) {
			return &lostError{err: fmt.Errorf("it answers the login with %q", line), lasting: true}
		}
	}
	return nil
}

// server returns the credentials of who listens (SO_PEERCRED): pid 0 is a
// process that is not visible here.
func (l *lower) server() (cred *unix.Ucred, err error) {
	rc, err := l.conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := rc.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	return cred, errors.Join(cerr, err)
}

// line reads a line of the login.
func (l *lower) line() (string, error) {
	for {
		if line, rest, ok := bytes.Cut(l.in, []byte("\r\n")); ok {
			l.in = rest
			return string(line), nil
		}
		if len(l.in) > wire.MaxLine {
			return "", &lostError{err: errors.New("it does not speak D-Bus"), lasting: true}
		}
		if err := l.receive(); err != nil {
			return "", &lostError{err: err}
		}
	}
}

func (l *lower) receive() error {
	var buf [4096]byte
	n, err := l.conn.Read(buf[:])
	l.in = append(l.in, buf[:n]...)
	if err != nil {
		return lostRead(err)
	}
	return nil
}

// send sends a message with the credential of the process for whom it is and,
// if fd is not -1, a descriptor. All bytes of a message carry one credential.
func (l *lower) send(b []byte, cred api.Cred, fd int) error {
	oob := unix.UnixCredentials(&unix.Ucred{Pid: cred.PID, Uid: cred.UID, Gid: cred.GID})
	first := oob
	if fd >= 0 {
		first = append(unix.UnixRights(fd), oob...)
	}
	for rest := b; len(rest) > 0; {
		n, _, err := l.conn.WriteMsgUnix(rest, first, nil)
		if err != nil {
			// After a part of a message nothing else can follow.
			if refused := cannotName(err); refused != nil && len(rest) == len(b) {
				return refused
			}
			return &lostError{err: systemError(err)}
		}
		rest, first = rest[n:], oob
	}
	return nil
}

// cannotName explains why the kernel does not let the proxy send another
// process's credential (unix(7), SCM_CREDENTIALS), or returns nil.
func cannotName(err error) *api.Error {
	switch {
	case errors.Is(err, unix.EPERM):
		return api.Errorf(api.Unsupported, "the proxy has not the privilege to say to the daemon who asks").
			WithHint("run cgproxy as root of a pid namespace that was made in its own user namespace, with CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID").WithCause(err)
	case errors.Is(err, unix.ESRCH):
		return api.Errorf(api.Denied, "the requestor has ended").WithCause(err)
	case errors.Is(err, unix.EINVAL):
		return api.Errorf(api.Denied, "your user or group id has no number in the proxy's user namespace").WithCause(err)
	}
	return nil
}

// call makes a call of the object at path and returns the values of its answer.
// The arguments are written by args. fd is passed with it, or -1.
func (l *lower) call(cred api.Cred, path, iface string, m *api.Method, args func(*wire.Encoder), fd int) (wire.Decoder, error) {
	l.serial++
	fds := 0
	if fd >= 0 {
		fds = 1
	}
	e := wire.NewCall(nil, l.serial, path, iface, m.Name, m.InSignature(), fds)
	if args != nil {
		args(&e)
	}
	b, err := e.End()
	if err != nil {
		return wire.Decoder{}, api.Errorf(api.Invalid, "an argument is %v", err)
	}
	if len(b) > wire.MaxMessage {
		return wire.Decoder{}, api.Errorf(api.Limit, "the request is longer than %d bytes", wire.MaxMessage)
	}
	if err := l.conn.SetDeadline(time.Now().Add(replyTimeout)); err != nil {
		return wire.Decoder{}, err
	}
	if err := l.send(b, cred, fd); err != nil {
		return wire.Decoder{}, err
	}
	d, err := l.reply(m.OutSignature())
	if r, ok := errors.AsType[*refusal](err); ok {
		r.realtime = path == api.RealtimePath
	}
	return d, err
}

// maxStray bounds the messages that are no answer to the call.
const maxStray = 16

// reply reads the answer to the last call.
func (l *lower) reply(sig string) (wire.Decoder, error) {
	for range maxStray {
		m, err := l.message()
		if err != nil {
			return wire.Decoder{}, err
		}
		if m.ReplySerial != l.serial {
			continue
		}
		d := wire.NewDecoder(string(m.Body), m.BigEndian)
		switch {
		case m.Type == wire.Error:
			text := ""
			if strings.HasPrefix(string(m.Signature), "s") {
				text = d.String()
			}
			return wire.Decoder{}, &refusal{name: string(m.ErrorName), text: text}
		case m.Type == wire.Return && string(m.Signature) == sig:
			return d, nil
		case m.Type == wire.Return:
			return wire.Decoder{}, &lostError{err: errors.New("its answer is of another type"), read: true, lasting: true}
		}
	}
	return wire.Decoder{}, &lostError{err: errors.New("it answers something else"), read: true, lasting: true}
}

// message reads a message.
func (l *lower) message() (*wire.Message, error) {
	for {
		n, err := wire.ReplySize(l.in)
		if err == nil && n > 0 && len(l.in) >= n {
			var m wire.Message
			if err = m.Decode(l.in[:n:n]); err == nil {
				l.in = l.in[n:]
				if len(l.in) == 0 {
					l.in = nil
				}
				return &m, nil
			}
		}
		if err != nil {
			return nil, &lostError{err: err, read: true, lasting: true}
		}
		if err := l.receive(); err != nil {
			// The kernel says ECONNRESET where the daemon closed the socket
			// with something in it unread, which only the request can be. At
			// a mere end of file the daemon may have been at work on it.
			return nil, &lostError{err: err, read: !errors.Is(err, unix.ECONNRESET), lasting: errors.Is(err, os.ErrDeadlineExceeded)}
		}
	}
}

// refusal is an error that the daemon below answered.
type refusal struct {
	name, text string
	// realtime: it is one of RealtimeKit1's, of which the names of the others
	// mean something else.
	realtime bool
}

func (r *refusal) Error() string { return r.name + ": " + r.text }

// asError returns the refusal from which the client's becomes the same again.
func (r *refusal) asError(op string) *api.Error {
	kind, ok := api.NamedKind(r.name)
	text := strings.TrimPrefix(strings.TrimPrefix(r.text, api.Refusal0), ": ")
	switch {
	case r.name == api.ErrorUnknownMethod:
		return api.Errorf(api.Unsupported, "%s: the daemon below the proxy does not know this request", op).WithCause(r)
	case r.realtime:
		return api.Errorf(api.RealtimeKind(r.name, r.text), "%s: the daemon below the proxy refuses", op).WithCause(r)
	case !ok:
		return api.Errorf(api.Internal, "%s: the daemon below the proxy fails", op).WithCause(r)
	case text == "":
		text = op + ": the daemon below the proxy refuses, and does not say why"
	}
	return &api.Error{Kind: kind, Text: text}
}

// actFor tells the daemon below of a hop, or finds that it is the original, which
// knows no such thing.
func (l *lower) actFor(hop api.Cred) error {
	_, err := l.call(hop, api.ObjectPath, api.Interface1, method(api.Interface1, "ActFor", ""), nil, -1)
	if r, ok := errors.AsType[*refusal](err); ok && r.name == api.ErrorUnknownMethod {
		// This was a round trip with the original, too. It loses a descriptor
		// that comes right behind the login; none does now.
		l.original = true
		return nil
	}
	return err
}

// properties is the interface of an object's properties.
const properties = "org.freedesktop.DBus.Properties"

// checkVersion returns an error unless the daemon below serves the interface
// cgmanager0_0 in the one version there is.
func (l *lower) checkVersion(self api.Cred) error {
	d, err := l.call(self, api.ObjectPath, properties, method(properties, "Get", "ss"), func(e *wire.Encoder) {
		e.String(api.Interface0)
		e.String("api_version")
	}, -1)
	if _, ok := errors.AsType[*refusal](err); ok {
		return &lostError{err: fmt.Errorf("it is not a cgmanager: it does not serve %s", api.Interface0), lasting: true}
	}
	if err != nil {
		return err
	}
	sig, version := d.Variant()
	if sig != "i" || version != int64(api.Version0) {
		return &lostError{err: fmt.Errorf("%w: its api_version is %v, and %d is needed", ErrVersion, version, api.Version0), lasting: true}
	}
	return nil
}

// ended reports whether the daemon below has ended the connection, without
// waiting and while no answer is due.
func (l *lower) ended() bool {
	rc, err := l.conn.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = rc.Control(func(fd uintptr) {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		gone = err == nil && n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
	})
	return gone || err != nil
}

// checkPrivilege is CheckPrivilege on a socket.
func checkPrivilege(fd int) error {
	_, err := wire.SendAs(fd, []byte{0}, api.Cred{PID: 1, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())})
	if errors.Is(err, unix.EPERM) {
		return errors.New("this process may not name others of its pid namespace (hint: it needs CAP_SYS_ADMIN in the user namespace that owns its pid namespace: start cgproxy as root of a container that has both)")
	}
	var caps uint64
	b, rerr := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, rerr = strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	if err := errors.Join(err, rerr); err != nil {
		return err
	}
	var lacks []string
	for _, c := range []struct {
		bit  int
		name string
	}{{unix.CAP_SETUID, "CAP_SETUID"}, {unix.CAP_SETGID, "CAP_SETGID"}} {
		if caps&(1<<c.bit) == 0 {
			lacks = append(lacks, c.name)
		}
	}
	if lacks != nil {
		return fmt.Errorf("lacks %s, to name processes of other users (hint: start cgproxy as root of its container)", strings.Join(lacks, " and "))
	}
	return nil
}

// int32Of reads a number of the side channel, which is in the machine's order.
func int32Of(b []byte) (int32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return int32(binary.NativeEndian.Uint32(b)), true
}
