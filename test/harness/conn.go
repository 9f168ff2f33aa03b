package harness

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// The names on the wire, written out once more: these are what clients in the
// field send.
const (
	objectPath = "/org/linuxcontainers/cgmanager"
	ifacePeer  = "org.freedesktop.DBus.Peer"
	// V0 is the original daemon's interface, V1 that of this project, RT rtkit's,
	// which has an object of its own.
	V0     = "org.linuxcontainers.cgmanager0_0"
	V1     = "org.linuxcontainers.CGManager1"
	RT     = "org.freedesktop.RealtimeKit1"
	rtPath = "/org/freedesktop/RealtimeKit1"
)

// replyTimeout is how long a client waits for the daemon.
const replyTimeout = 15 * time.Second

// DBusError is an error that the daemon replied.
type DBusError struct {
	Name, Text string
	// asked is what the caller said itself.
	asked string
}

func (e *DBusError) Error() string { return e.Name + ": " + e.Text }

// Refusals that are not a D-Bus error: the daemon closed the connection, or
// answered "failed" on the side channel of an *Scm call.
var (
	ErrClosed     = errors.New("connection closed by the daemon")
	ErrScmRefused = errors.New("refused on the side channel")
)

// errorNames are those that a client has to expect from the daemon.
var errorNames = []string{
	"org.freedesktop.DBus.Error.InvalidArgs",
	"org.freedesktop.DBus.Error.AccessDenied",
	"org.freedesktop.DBus.Error.FileNotFound",
	"org.freedesktop.DBus.Error.FileExists",
	"org.freedesktop.DBus.Error.NotSupported",
	"org.freedesktop.DBus.Error.LimitsExceeded",
	"org.linuxcontainers.CGManager1.Error.Busy",
}

// Unclean returns what is wrong with an error as the answer to an attack, or
// "": it must come from the daemon, say no failure of the daemon's own, and
// give nothing away.
func Unclean(err error) string {
	if errors.Is(err, ErrClosed) || errors.Is(err, ErrScmRefused) {
		return ""
	}
	var de *DBusError
	if !errors.As(err, &de) {
		return "the attack did not reach the daemon"
	}
	if !slices.Contains(errorNames, de.Name) {
		return "not an error of the interface"
	}
	for _, secret := range []string{"/sys/fs", "/proc", "internal error", "cgmtest"} {
		if strings.Contains(de.Text, secret) && !strings.Contains(de.asked, secret) {
			return fmt.Sprintf("the text contains %q", secret)
		}
	}
	return ""
}

// Conn is a client's connection, owned by a puppet.
type Conn struct {
	P *Proc
	// As is the credential that goes with every message; nil lets the kernel
	// fill in the sender's own.
	As *Cred

	fd     int
	serial uint32
	buf    []byte
	asked  string // the last call
}

// Dial connects and logs in with p's own uid, everything in one write.
func (p *Proc) Dial(sock string) (*Conn, error) {
	id := hex.EncodeToString(strconv.AppendUint(nil, uint64(p.UID), 10))
	return p.DialAs(sock, id)
}

// DialAs is Dial with the identity as it goes on the wire.
func (p *Proc) DialAs(sock, identity string) (*Conn, error) {
	c := &Conn{P: p, fd: p.Socket(unix.SOCK_STREAM)}
	if err := p.Connect(c.fd, sock); err != nil {
		p.Close(c.fd)
		return nil, fmt.Errorf("connect: %w", err)
	}
	if err := p.Send(c.fd, handshake(identity), nil); err != nil {
		return nil, err
	}
	for bytes.Count(c.buf, []byte("\r\n")) < 2 {
		if bytes.HasPrefix(c.buf, []byte("REJECTED")) && bytes.Contains(c.buf, []byte("\r\n")) {
			p.Close(c.fd)
			return nil, fmt.Errorf("login: %q", c.buf)
		}
		if err := c.more(); err != nil {
			p.Close(c.fd)
			return nil, fmt.Errorf("login: %w", err)
		}
	}
	ok, rest, _ := bytes.Cut(c.buf, []byte("\r\n"))
	agree, rest, _ := bytes.Cut(rest, []byte("\r\n"))
	if !bytes.HasPrefix(ok, []byte("OK ")) || string(agree) != "AGREE_UNIX_FD" {
		p.Close(c.fd)
		return nil, fmt.Errorf("login: %q %q", ok, agree)
	}
	c.buf = rest
	return c, nil
}

// MustDial is Dial where a failure ends the test.
func (p *Proc) MustDial(sock string) *Conn {
	p.t.Helper()
	c, err := p.Dial(sock)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

func handshake(identity string) []byte {
	return []byte("\x00AUTH EXTERNAL " + identity + "\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
}

// Close closes the connection.
func (c *Conn) Close() { c.P.Close(c.fd) }

// Give passes the connected socket to q, as SCM_RIGHTS does. c stays usable
// too, but not both at once.
func (c *Conn) Give(q *Proc) *Conn {
	return &Conn{P: q, fd: c.P.Give(c.fd, q), serial: c.serial + 1000, buf: slices.Clone(c.buf)}
}

func (c *Conn) more() error {
	d, err := c.P.Recv(c.fd, replyTimeout)
	switch {
	case errors.Is(err, unix.ECONNRESET):
		return ErrClosed
	case err != nil:
		return err
	case len(d.Data) == 0:
		return ErrClosed
	}
	c.buf = append(c.buf, d.Data...)
	return nil
}

// FD is an argument of type h: a file of the calling process.
type FD int

// Call makes a method call and returns the values of the reply.
func (c *Conn) Call(iface, member string, args ...any) ([]any, error) {
	if err := c.Send(iface, member, args...); err != nil {
		return nil, err
	}
	return c.Reply()
}

// V0 and V1 call a method of the two interfaces.
func (c *Conn) V0(member string, args ...any) ([]any, error) { return c.Call(V0, member, args...) }

// V1 calls a method of CGManager1.
func (c *Conn) V1(member string, args ...any) ([]any, error) { return c.Call(V1, member, args...) }

// RT calls a method of rtkit's interface.
func (c *Conn) RT(member string, args ...any) ([]any, error) { return c.Call(RT, member, args...) }

// Send sends a method call; Reply waits for the answer.
func (c *Conn) Send(iface, member string, args ...any) error {
	c.serial++
	c.asked = fmt.Sprint(member, args)
	var fds []int
	for _, a := range args {
		if fd, ok := a.(FD); ok {
			fds = append(fds, int(fd))
		}
	}
	err := c.P.Send(c.fd, encodeCall(c.serial, objectOf(iface), iface, member, args), c.As, fds...)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return ErrClosed
	}
	return err
}

func objectOf(iface string) string {
	if iface == RT {
		return rtPath
	}
	return objectPath
}

// AnswerTo waits, at another end of the same socket, for the reply to the last call
// on c, and returns its error.
func (c *Conn) AnswerTo(at *Conn) error {
	at.serial, at.asked = c.serial, c.asked
	_, err := at.Reply()
	return err
}

// Reply returns the reply to the last call.
func (c *Conn) Reply() ([]any, error) {
	for {
		for !complete(c.buf) {
			if err := c.more(); err != nil {
				return nil, err
			}
		}
		to, values, rest, err := answer(c.buf, c.asked)
		if c.buf = rest; to == c.serial || to == 0 && err != nil {
			return values, err
		}
	}
}

// answer reads the first message of b, which is whole: to which request it is the
// answer, and what it says, an error as a *DBusError. asked is the request.
func answer(b []byte, asked string) (to uint32, values []any, rest []byte, err error) {
	n := messageLen(b)
	msg, err := dbus.DecodeMessage(bytes.NewReader(b[:n]))
	if err != nil {
		return 0, nil, b[n:], fmt.Errorf("the daemon's message: %w", err)
	}
	to, _ = msg.Headers[dbus.FieldReplySerial].Value().(uint32)
	if msg.Type == dbus.TypeError {
		e := &DBusError{asked: asked}
		e.Name, _ = msg.Headers[dbus.FieldErrorName].Value().(string)
		if len(msg.Body) > 0 {
			e.Text, _ = msg.Body[0].(string)
		}
		return to, nil, b[n:], e
	}
	return to, msg.Body, b[n:], nil
}

func complete(b []byte) bool { return len(b) >= 16 && len(b) >= messageLen(b) }

// messageLen is the length of a little endian message; the daemon sends no
// other.
func messageLen(b []byte) int {
	body := int(binary.LittleEndian.Uint32(b[4:]))
	fields := int(binary.LittleEndian.Uint32(b[12:]))
	return (16+fields+7)&^7 + body
}

// encodeCall encodes a method call in little endian. The types of args are
// string, int32, uint32, uint64, bool, []string, map[string]string and FD.
func encodeCall(serial uint32, path, iface, member string, args []any) []byte {
	var body encoder
	var sig strings.Builder
	fds := uint32(0)
	for _, a := range args {
		switch v := a.(type) {
		case string:
			sig.WriteString("s")
			body.str(v)
		case int32:
			sig.WriteString("i")
			body.u32(uint32(v))
		case uint32:
			sig.WriteString("u")
			body.u32(v)
		case uint64:
			sig.WriteString("t")
			body.u64(v)
		case bool:
			sig.WriteString("b")
			if v {
				body.u32(1)
			} else {
				body.u32(0)
			}
		case []string:
			sig.WriteString("as")
			at := body.array(4)
			for _, s := range v {
				body.str(s)
			}
			body.end(at, 4)
		case map[string]string:
			sig.WriteString("a{ss}")
			at := body.array(8)
			for k, s := range v {
				body.pad(8)
				body.str(k)
				body.str(s)
			}
			body.end(at, 8)
		case FD:
			sig.WriteString("h")
			body.u32(fds)
			fds++
		default:
			panic(fmt.Sprintf("argument of type %T", a))
		}
	}
	var m encoder
	m.b = append(m.b, 'l', 1, 0, 1)
	m.u32(uint32(len(body.b)))
	m.u32(serial)
	at := m.array(8)
	field := func(code byte, typ, val string) {
		m.pad(8)
		m.b = append(m.b, code)
		m.sig(typ)
		if typ == "g" {
			m.sig(val)
		} else {
			m.str(val)
		}
	}
	field(1, "o", path)
	if iface != "" {
		field(2, "s", iface)
	}
	field(3, "s", member)
	if sig.String() != "" {
		field(8, "g", sig.String())
	}
	if fds > 0 {
		m.pad(8)
		m.b = append(m.b, 9)
		m.sig("u")
		m.u32(fds)
	}
	m.end(at, 8)
	m.pad(8)
	return append(m.b, body.b...)
}

type encoder struct{ b []byte }

func (e *encoder) pad(n int) {
	for len(e.b)%n != 0 {
		e.b = append(e.b, 0)
	}
}

func (e *encoder) u32(v uint32) {
	e.pad(4)
	e.b = binary.LittleEndian.AppendUint32(e.b, v)
}

func (e *encoder) u64(v uint64) {
	e.pad(8)
	e.b = binary.LittleEndian.AppendUint64(e.b, v)
}

func (e *encoder) str(s string) {
	e.u32(uint32(len(s)))
	e.b = append(append(e.b, s...), 0)
}

func (e *encoder) sig(s string) {
	e.b = append(e.b, byte(len(s)))
	e.b = append(append(e.b, s...), 0)
}

// array begins an array and returns where its length goes; its elements are
// aligned to align.
func (e *encoder) array(align int) int {
	e.u32(0)
	at := len(e.b) - 4
	e.pad(align)
	return at
}

func (e *encoder) end(at, align int) {
	start := (at + 4 + align - 1) / align * align
	binary.LittleEndian.PutUint32(e.b[at:], uint32(len(e.b)-start))
}
