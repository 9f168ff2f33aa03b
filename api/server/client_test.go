package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
	"cgmanager/cgfs/cgtest"
)

// testServer is a Server with a fakeBackend that serves until the test ends,
// and must then have left nothing behind.
type testServer struct {
	*Server
	t       testing.TB
	path    string
	backend *fakeBackend
	cancel  context.CancelFunc
	done    chan error
	stopped bool
}

func serve(t testing.TB, b *fakeBackend, l Limits) *testServer {
	t.Helper()
	// Where a test shows no bound of time, none is to be hit on a machine that stalls.
	l.Handshake, l.Stall, l.Exchange = cmp.Or(l.Handshake, time.Minute), cmp.Or(l.Stall, time.Minute), cmp.Or(l.Exchange, time.Minute)
	fds, goroutines := countFDs(t), runtime.NumGoroutine()
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o755)) // others connect as well
	ts := &testServer{t: t, backend: b, path: filepath.Join(dir, "sock"), done: make(chan error, 1)}
	// Last in, first out: after the clients' own cleanups.
	t.Cleanup(func() {
		ts.stop()
		eventually(t, "file descriptors as before", func() bool { return countFDs(t) <= fds })
		eventually(t, "goroutines as before", func() bool { return runtime.NumGoroutine() <= goroutines })
		if n := b.peers.Load(); n != 0 {
			t.Errorf("%d peers were not closed", n)
		}
		if st := ts.Stats(); st.Connections != 0 || st.Exchanges != 0 || st.ForeignFDs != 0 {
			t.Errorf("left behind: %+v", st)
		}
		for name, a := range ts.accounts {
			if a.conns != 0 || a.handshakes != 0 || a.exchanges != 0 || a.foreign != 0 || a.buffered != 0 ||
				!a.poolsIdle() {
				t.Errorf("account %q is still charged: %+v", name, a)
			}
		}
	})
	listener, err := Listen(ts.path)
	must(t, err)
	ts.Server, err = New(Config{Backend: b, Listeners: []*Listener{listener}, Version: "test", Limits: l})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ts.cancel = cancel
	go func() { ts.done <- ts.Serve(ctx) }()
	return ts
}

// stop ends the server and waits for Serve.
func (ts *testServer) stop() {
	ts.t.Helper()
	if ts.stopped {
		return
	}
	ts.stopped = true
	ts.cancel()
	select {
	case err := <-ts.done:
		must(ts.t, err)
	case <-time.After(cgtest.Patience(10 * time.Second)):
		ts.t.Fatal("Serve did not return")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func countFDs(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(d)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	cgtest.Eventually(t, 5*time.Second, what, ok)
}

// client is the client's end of a connection, byte by byte.
type client struct {
	t      testing.TB
	fd     int
	closed bool
	serial uint32
	in     []byte
	big    bool
}

// dial connects. The handshake is the caller's.
func (ts *testServer) dial() *client {
	ts.t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(ts.t, err)
	c := &client{t: ts.t, fd: fd}
	ts.t.Cleanup(c.close)
	must(ts.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, inTime()))
	must(ts.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, inTime()))
	must(ts.t, unix.Connect(fd, &unix.SockaddrUnix{Name: ts.path}))
	return c
}

// inTime is how long a client waits for what must come.
func inTime() *unix.Timeval {
	wait := unix.NsecToTimeval(int64(cgtest.Patience(5 * time.Second)))
	return &wait
}

func (c *client) close() {
	if !c.closed {
		c.closed = true
		must(c.t, unix.Close(c.fd))
	}
}

const (
	authRoot  = "\x00AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
	agreement = "AGREE_UNIX_FD\r\n"
)

// login connects and shakes hands.
func (ts *testServer) login() *client {
	ts.t.Helper()
	c := ts.dial()
	c.write([]byte(authRoot))
	c.expect("OK " + ts.guid + "\r\n" + agreement)
	return c
}

func (c *client) write(b []byte, fds ...int) {
	c.t.Helper()
	must(c.t, c.tryWrite(b, nil, fds...))
}

func (c *client) tryWrite(b []byte, cred *unix.Ucred, fds ...int) error {
	var control []byte
	if cred != nil {
		control = append(control, unix.UnixCredentials(cred)...)
	}
	if len(fds) > 0 {
		control = append(control, unix.UnixRights(fds...)...)
	}
	for len(b) > 0 {
		n, err := retry(func() (int, error) { return unix.SendmsgN(c.fd, b, control, nil, unix.MSG_NOSIGNAL) })
		if err != nil {
			return err
		}
		b, control = b[n:], nil
	}
	return nil
}

// retry calls again what a signal interrupted.
func retry(f func() (int, error)) (n int, err error) {
	for n, err = f(); errors.Is(err, unix.EINTR); n, err = f() {
	}
	return n, err
}

// expect reads exactly the given bytes.
func (c *client) expect(want string) {
	c.t.Helper()
	for len(c.in) < len(want) {
		if !c.fill() {
			c.t.Fatalf("got %q and the end, want %q", c.in, want)
		}
	}
	if got := string(c.in[:len(want)]); got != want {
		c.t.Fatalf("got %q, want %q", got, want)
	}
	c.in = c.in[len(want):]
}

// fill reads more and returns false at the end of file.
func (c *client) fill() bool {
	c.t.Helper()
	var b [4096]byte
	n, err := retry(func() (int, error) { return unix.Read(c.fd, b[:]) })
	if errors.Is(err, unix.ECONNRESET) {
		return false
	}
	if err != nil {
		c.t.Fatalf("read: %v (have %q)", err, c.in)
	}
	c.in = append(c.in, b[:n]...)
	return n > 0
}

// expectClosed reads until the server ends the connection.
func (c *client) expectClosed() {
	c.t.Helper()
	for c.fill() {
	}
}

// message reads a message.
func (c *client) message() *wire.Message {
	c.t.Helper()
	for {
		n, err := wire.Size(c.in)
		must(c.t, err)
		if n > 0 && len(c.in) >= n {
			var m wire.Message
			must(c.t, m.Decode(bytes.Clone(c.in[:n])))
			c.in = c.in[n:]
			return &m
		}
		if !c.fill() {
			c.t.Fatalf("the end, after %q", c.in)
		}
	}
}

// body writes arguments; the order is the client's.
type body struct {
	big bool
	b   []byte
}

func (b *body) order() binary.AppendByteOrder {
	if b.big {
		return binary.BigEndian
	}
	return binary.LittleEndian
}

func (b *body) pad(n int) {
	for len(b.b)%n != 0 {
		b.b = append(b.b, 0)
	}
}

func (b *body) u(v uint32) {
	b.pad(4)
	b.b = b.order().AppendUint32(b.b, v)
}

func (b *body) s(s string) {
	b.u(uint32(len(s)))
	b.b = append(append(b.b, s...), 0)
}

func (b *body) g(s string) {
	b.b = append(append(append(b.b, byte(len(s))), s...), 0)
}

// put writes values of the Go types that stand for s, i, u, t, as, a{ss}.
func (b *body) put(values ...any) (sig string) {
	for _, v := range values {
		switch v := v.(type) {
		case string:
			b.s(v)
			sig += "s"
		case int:
			b.u(uint32(int32(v)))
			sig += "i"
		case uint32:
			b.u(v)
			sig += "u"
		case uint64:
			b.pad(8)
			b.b = b.order().AppendUint64(b.b, v)
			sig += "t"
		case handle:
			b.u(uint32(v))
			sig += "h"
		case variant:
			b.g("i")
			b.u(uint32(v))
			sig += "v"
		case []string:
			inner := body{big: b.big}
			for _, s := range v {
				inner.s(s)
			}
			b.u(uint32(len(inner.b)))
			b.b = append(b.b, inner.b...)
			sig += "as"
		case [][2]string:
			inner := body{big: b.big}
			for _, e := range v {
				inner.pad(8)
				inner.s(e[0])
				inner.s(e[1])
			}
			b.u(uint32(len(inner.b)))
			b.pad(8)
			b.b = append(b.b, inner.b...)
			sig += "a{ss}"
		default:
			panic("put")
		}
	}
	return sig
}

type handle uint32

// variant is a v that holds an i.
type variant int32

// call is a message to be encoded.
type call struct {
	path, iface, member string
	flags               byte
	fds                 uint32 // announced
	args                []any
}

func to(iface, member string, args ...any) call {
	return call{path: api.ObjectPath, iface: iface, member: member, args: args}
}

func ping() call { return to(api.Interface0, "Ping", 0) }

func (c *client) encode(m call) []byte {
	c.serial++
	arguments := body{big: c.big}
	sig := arguments.put(m.args...)
	b := body{big: c.big}
	order := byte('l')
	if c.big {
		order = 'B'
	}
	b.b = append(b.b, order, 1, m.flags, 1)
	b.u(uint32(len(arguments.b)))
	b.u(c.serial)
	b.u(0)
	field := func(code byte, kind, value string) {
		if value == "" {
			return
		}
		b.pad(8)
		b.b = append(b.b, code)
		b.g(kind)
		if kind == "g" {
			b.g(value)
		} else {
			b.s(value)
		}
	}
	field(1, "o", m.path)
	field(2, "s", m.iface)
	field(3, "s", m.member)
	field(8, "g", sig)
	if m.fds > 0 {
		b.pad(8)
		b.b = append(b.b, 9)
		b.g("u")
		b.u(m.fds)
	}
	length := body{big: c.big}
	length.u(uint32(len(b.b) - 16))
	copy(b.b[12:], length.b)
	b.pad(8)
	return append(b.b, arguments.b...)
}

// call sends a call and returns its answer.
func (c *client) call(m call, fds ...int) *wire.Message {
	c.t.Helper()
	c.write(c.encode(m), fds...)
	r := c.message()
	if r.ReplySerial != c.serial {
		c.t.Fatalf("answer to %d, want %d", r.ReplySerial, c.serial)
	}
	return r
}

// ok makes a call that must succeed and returns a decoder of its results.
func (c *client) ok(m call, sig string, fds ...int) *wire.Decoder {
	c.t.Helper()
	r := c.call(m, fds...)
	if r.Type != wire.Return {
		name, text := failure(r)
		c.t.Fatalf("%s: %s: %s", m.member, name, text)
	}
	if string(r.Signature) != sig {
		c.t.Fatalf("%s: signature %q, want %q", m.member, r.Signature, sig)
	}
	d := wire.NewDecoder(string(r.Body), r.BigEndian)
	return &d
}

// fails makes a call that must fail, with an error name that ends in name and
// a text that contains text.
func (c *client) fails(m call, name, text string, fds ...int) {
	c.t.Helper()
	r := c.call(m, fds...)
	if r.Type != wire.Error {
		c.t.Fatalf("%s: succeeded", m.member)
	}
	n, s := failure(r)
	if !strings.HasSuffix(n, name) || !strings.Contains(s, text) {
		c.t.Fatalf("%s: %s: %s; want %s: %s", m.member, n, s, name, text)
	}
}

func failure(r *wire.Message) (name, text string) {
	d := wire.NewDecoder(string(r.Body), r.BigEndian)
	return string(r.ErrorName), d.String()
}

// serves checks that the server still serves others.
func (ts *testServer) serves() {
	ts.t.Helper()
	start := time.Now()
	c := ts.login()
	c.ok(ping(), "")
	c.ok(to(api.Interface0, "Create", "memory", "x"), "i")
	c.close()
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		ts.t.Errorf("others had to wait for %v", d)
	}
}
