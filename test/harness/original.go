package harness

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api/wire"
	"cgmanager/cgfs/cgtest"
)

// Recorded is a call of the original daemon's, as it was recorded of version
// 0.42, and what it answered.
type Recorded struct {
	Method string
	// Args are strings and int32s, in an *Scm call those before the socket. Nil
	// are any.
	Args []any

	// Reply is the answer to a plain call, which Refused makes an error with
	// this text: int32, string, []int32, []string or []RecordedKey.
	Reply   any
	Refused string

	// Kicks is how many credentials an *Scm call asked for, Sent what it sent
	// then.
	Kicks int
	Sent  []string
	// Task is the number, here, of the task whose credential each "p" of Sent
	// has; 0 is this process.
	Task int
}

// RecordedKey is an entry of ListKeys.
type RecordedKey struct {
	Name           string
	UID, GID, Mode uint32
}

// Original answers as the original daemon did, byte for byte, and reports what it
// was told.
type Original struct {
	// Path is that of its socket.
	Path string

	t       testing.TB
	version int32
	mu      sync.Mutex
	script  []Recorded // what is to be asked yet, in this order; guarded by mu
	told    chan []Cred
}

// StartOriginal starts one of an api_version, 10, with what it is to be asked.
func StartOriginal(t testing.TB, version int32, script ...Recorded) *Original {
	t.Helper()
	o := &Original{t: t, Path: filepath.Join(PublicDir(t), "original"), version: version, script: script, told: make(chan []Cred, 1024)}
	l, err := net.Listen("unix", o.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(o.Path, 0o777); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if uc, ok := c.(*net.UnixConn); ok {
				o.serve(uc) // one at a time, as it did
			}
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return o
}

// Told returns the credentials that the next *Scm call came with, by the numbers
// of this process.
func (o *Original) Told() []Cred {
	o.t.Helper()
	select {
	case creds := <-o.told:
		return creds
	case <-time.After(cgtest.Patience(10 * time.Second)):
		o.t.Error("the original was asked nothing")
		return nil
	}
}

// Left returns how many calls of the script were not made.
func (o *Original) Left() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.script)
}

// originalConn is a connection to the original.
type originalConn struct {
	*net.UnixConn
	in  []byte
	fds []int
}

func (c *originalConn) more() error {
	var buf [4096]byte
	var oob [256]byte
	n, oobn, _, _, err := c.ReadMsgUnix(buf[:], oob[:])
	c.in = append(c.in, buf[:max(n, 0)]...)
	msgs, _ := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range msgs {
		fds, _ := unix.ParseUnixRights(&m)
		c.fds = append(c.fds, fds...)
	}
	if err == nil && n == 0 {
		return errors.New("closed")
	}
	return err
}

func (c *originalConn) close() {
	_ = c.Close()
	for _, fd := range c.fds {
		_ = unix.Close(fd)
	}
}

// serve answers on a connection until it ends.
func (o *Original) serve(uc *net.UnixConn) {
	c := &originalConn{UnixConn: uc}
	defer c.close()
	if err := c.SetDeadline(time.Now().Add(cgtest.Patience(20 * time.Second))); err != nil {
		o.t.Error(err)
	}
	if c.login() != nil {
		return
	}
	for serial := uint32(1); ; serial++ {
		n, err := wire.Size(c.in)
		for err == nil && (n == 0 || len(c.in) < n) {
			if c.more() != nil {
				return
			}
			n, err = wire.Size(c.in)
		}
		var m wire.Message
		if err == nil {
			err = m.Decode(c.in[:n])
		}
		if err != nil {
			o.t.Error(err)
			return
		}
		if serial == 1 && len(c.fds) > 0 {
			o.t.Error("a descriptor right behind the login: libdbus lost it")
		}
		fd := -1
		if len(c.fds) > 0 {
			fd, c.fds = c.fds[0], c.fds[1:]
		}
		answer, x := o.answer(&m, serial)
		_, _ = c.Write(answer)
		switch {
		case fd >= 0 && x != nil:
			o.told <- o.exchange(x, fd)
			fallthrough
		case fd >= 0:
			_ = unix.Close(fd)
		}
		c.in = c.in[n:]
	}
}

// login answers the lines of a client's login as libdbus does. An identity counts
// by the numbers of the daemon's own user namespace; without one the kernel's word
// does.
func (c *originalConn) login() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil || err != nil {
		return errors.Join(cerr, err)
	}
	own := hex.EncodeToString(strconv.AppendUint(nil, uint64(peer.Uid), 10))
	const rejected, ok = "REJECTED EXTERNAL DBUS_COOKIE_SHA1 ANONYMOUS", "OK 6426d77e283b8d96d92760be6b0280a3"
	known, asked := false, false
	for first := true; ; first = false {
		line, rest, whole := bytes.Cut(c.in, []byte("\r\n"))
		for !whole {
			if err := c.more(); err != nil {
				return err
			}
			line, rest, whole = bytes.Cut(c.in, []byte("\r\n"))
		}
		c.in = rest
		if nul := len(line) > 0 && line[0] == 0; nul != first {
			return errors.New("a login begins with NUL")
		} else if nul {
			line = line[1:]
		}
		var answer string
		switch words := strings.Fields(string(line)); {
		case len(words) == 0:
			answer = `ERROR "Unknown command"`
		case words[0] == "BEGIN":
			if !known {
				return errors.New("BEGIN before OK")
			}
			return nil
		case words[0] == "NEGOTIATE_UNIX_FD" && known:
			answer = "AGREE_UNIX_FD"
		case words[0] == "DATA" && asked && len(words) == 1, string(line) == "AUTH EXTERNAL "+own, string(line) == "AUTH ANONYMOUS":
			answer, known = ok, true
		case string(line) == "AUTH EXTERNAL":
			answer, asked = "DATA", true
		case words[0] == "AUTH", words[0] == "ERROR":
			answer = rejected
		case words[0] == "CANCEL":
			answer = `ERROR "Not currently in an auth conversation"`
		case words[0] == "NEGOTIATE_UNIX_FD":
			answer = `ERROR "Need to authenticate first"`
		default:
			answer = `ERROR "Unknown command"`
		}
		if _, err := c.Write([]byte(answer + "\r\n")); err != nil {
			return err
		}
	}
}

// answer is the recorded answer to a call, and what it was recorded of, if that
// is in the script.
func (o *Original) answer(m *wire.Message, serial uint32) ([]byte, *Recorded) {
	refuse := func(name, format string, args ...any) []byte {
		return wire.AppendError(nil, serial, m.Serial, "org.freedesktop.DBus.Error."+name, fmt.Sprintf(format, args...))
	}
	switch string(m.Interface) + "." + string(m.Member) {
	case "org.freedesktop.DBus.Properties.Get":
		d := wire.NewDecoder(string(m.Body), m.BigEndian)
		if iface, name := d.String(), d.String(); (iface == "" || iface == V0) && name == "api_version" {
			e := wire.NewReturn(nil, serial, m.Serial, "v")
			e.VariantSignature("i")
			e.Int32(o.version)
			return end(&e), nil
		}
	case V0 + ".Ping":
		return emptyReply(serial, m.Serial), nil
	case V0 + ".ListControllers":
		e := wire.NewReturn(nil, serial, m.Serial, "as")
		e.Strings([]string{
			"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "net_prio", "perf_event", "pids", "name=systemd",
		})
		return end(&e), nil
	}
	if string(m.Interface) != V0 {
		return refuse("UnknownMethod", "Method %q with signature %q on interface %q doesn't exist", m.Member, m.Signature, m.Interface), nil
	}
	x := o.next(m)
	switch {
	case x == nil || x.Refused != "":
		text := "invalid request"
		if x != nil {
			text = x.Refused
		}
		return refuse("InvalidArgs", "%s", text), nil
	case x.Reply != nil:
		return reply0(m.Serial, serial, x.Reply), x
	}
	return emptyReply(serial, m.Serial), x
}

// next returns the next call of the script, which is to be this one.
func (o *Original) next(m *wire.Message) *Recorded {
	o.mu.Lock()
	defer o.mu.Unlock()
	d := wire.NewDecoder(string(m.Body), m.BigEndian)
	args := []any{}
	for _, kind := range strings.TrimSuffix(string(m.Signature), "h") {
		if kind == 's' {
			args = append(args, d.String())
		} else {
			args = append(args, int32(d.Uint32()))
		}
	}
	if len(o.script) == 0 {
		o.t.Errorf("the original is asked for %s%q, which is not in the script", m.Member, args)
		return nil
	}
	x := o.script[0]
	o.script = o.script[1:]
	if string(m.Member) != x.Method || x.Args != nil && !reflect.DeepEqual(args, x.Args) {
		o.t.Errorf("the original is asked for %s%q, want %s%q", m.Member, args, x.Method, x.Args)
	}
	return &x
}

// emptyReply is an answer without values, to the byte.
func emptyReply(serial, to uint32) []byte {
	b := []byte("l\x02\x01\x01\x00\x00\x00\x00SSSS\x08\x00\x00\x00\x05\x01u\x00RRRR")
	binary.LittleEndian.PutUint32(b[8:], serial)
	binary.LittleEndian.PutUint32(b[20:], to)
	return b
}

// reply0 is an answer with one value.
func reply0(to, serial uint32, value any) []byte {
	var e wire.Encoder
	begin := func(sig string) { e = wire.NewReturn(nil, serial, to, sig) }
	switch v := value.(type) {
	case int32:
		begin("i")
		e.Int32(v)
	case string:
		begin("s")
		e.String(v)
	case []string:
		begin("as")
		e.Strings(v)
	case []int32:
		begin("ai")
		e.Array(4, func() {
			for _, n := range v {
				e.Int32(n)
			}
		})
	case []RecordedKey:
		begin("a(suuu)")
		e.Array(8, func() {
			for _, k := range v {
				e.Element()
				e.String(k.Name)
				e.Uint32(k.UID)
				e.Uint32(k.GID)
				e.Uint32(k.Mode)
			}
		})
	default:
		panic(fmt.Sprintf("a reply of type %T", value))
	}
	return end(&e)
}

func end(e *wire.Encoder) []byte {
	b, err := e.End()
	if err != nil {
		panic(err) // what was recorded is valid
	}
	return b
}

// exchange plays an exchange on a passed socket.
func (o *Original) exchange(x *Recorded, fd int) (creds []Cred) {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		o.t.Error(err)
	}
	buf := make([]byte, 8)
	for range x.Kicks {
		if _, err := unix.Write(fd, []byte("1")); err != nil {
			o.t.Error(err)
			return creds
		}
		n, _, cred, err := recvmsg(fd, buf, cgtest.Patience(5*time.Second))
		if err != nil || n != 1 || cred == nil {
			o.t.Errorf("%s: a credential in %d bytes: %v, %v", x.Method, n, cred, err)
			return creds
		}
		creds = append(creds, *cred)
	}
	for _, s := range x.Sent {
		var oob []byte
		if s == "p" && x.Task != 0 {
			oob = unix.UnixCredentials(&unix.Ucred{Pid: int32(x.Task)})
		}
		if err := unix.Sendmsg(fd, []byte(s), oob, nil, 0); err != nil {
			o.t.Error(err)
		}
	}
	return creds
}
