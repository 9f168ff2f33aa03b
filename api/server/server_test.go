package server

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
	"cgmanager/cgfs/cgtest"
)

// The bytes are those that the original daemon was seen to send.
func TestPipelinedHandshake(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	c := ts.dial()
	c.write(append([]byte(authRoot), c.encode(ping())...))
	c.expect("OK " + ts.guid + "\r\n" + agreement +
		"l\x02\x01\x01\x00\x00\x00\x00\x01\x00\x00\x00\x08\x00\x00\x00\x05\x01u\x00\x01\x00\x00\x00")
}

// Before Linux 6.5 the kernel gives no pidfd of the opener. Calls that were there
// before one was opened for its number may be another's; the login counts.
func TestWithoutPeerPIDFD(t *testing.T) {
	opened := make(chan struct{})
	ts := serve(t, &fakeBackend{open: func(api.Cred) error { <-opened; return nil }}, Limits{})
	kernel := func(err error) {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		ts.peerPIDFD = func(int) (int, error) { return -1, err }
	}
	kernel(unix.ENOPROTOOPT)
	login, early, behind := ts.dial(), ts.dial(), ts.dial()
	login.write([]byte(authRoot))
	early.write(append([]byte(authRoot), early.encode(ping())...))
	// Received by itself: the kernel does not mix credentials.
	behind.write([]byte(authRoot))
	must(t, behind.tryWrite(behind.encode(ping()), &unix.Ucred{Pid: 1}))
	// The connections come in order: with the last all of them are there.
	eventually(t, "three openers", func() bool {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		return ts.opening == 3
	})
	close(opened)
	for what, c := range map[string]*client{"with the login": early, "behind it": behind} {
		c.expectClosed()
		if bytes.Contains(c.in, []byte("l\x02")) {
			t.Errorf("%s: a call that came too early was answered: %q", what, c.in)
		}
	}
	login.expect("OK " + ts.guid + "\r\n" + agreement)
	login.ok(ping(), "")
	// Where there is such an option, a peer without a pidfd has ended.
	kernel(unix.ESRCH)
	ts.dial().expectClosed()
}

// A pipelining client gets all its answers, in order, with the handshake's
// answers before them, also where some need the backend and some do not.
func TestPipelinedCalls(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	c := ts.dial()
	b := []byte(authRoot)
	for i := range 100 {
		switch i % 3 {
		case 0:
			b = append(b, c.encode(ping())...)
		case 1:
			b = append(b, c.encode(to(api.Interface0, "GetValue", "memory", "x", fmt.Sprint(i)))...)
		case 2:
			b = append(b, c.encode(to(api.Interface1, "Kill", "fail busy"))...)
		}
	}
	// In pieces that end anywhere.
	for piece := range slices.Chunk(b, 77) {
		c.write(piece)
	}
	c.expect("OK " + ts.guid + "\r\n" + agreement)
	for i := range uint32(100) {
		m := c.message()
		if m.ReplySerial != i+1 || m.Serial != i+1 {
			t.Fatalf("answer %d has serial %d and answers %d", i+1, m.Serial, m.ReplySerial)
		}
		if wantError := i%3 == 2; wantError != (m.Type == wire.Error) {
			t.Fatalf("answer %d is of type %d", i+1, m.Type)
		}
	}
}

func TestByteOrders(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	for _, big := range []bool{false, true} {
		c := ts.login()
		c.big = big
		d := c.ok(to(api.Interface0, "GetPidCgroup", "memory", 258), "s")
		if got := d.String(); got != "pid 258" {
			t.Errorf("big endian %v: got %q", big, got)
		}
		d = c.ok(to(api.Interface1, "Create", "a", []string{"b", "c"}, [][2]string{{"d", "e"}, {"f", "g"}}), "b")
		if d.Uint32() != 1 {
			t.Errorf("big endian %v: arrays of wrong lengths", big)
		}
	}
}

// Every method of every interface, with arguments of its signature, reaches
// the backend and comes back with its results.
func TestEveryMethod(t *testing.T) {
	b := &fakeBackend{pids: []int32{5, 6}}
	ts := serve(t, b, Limits{})
	c := ts.login()
	for _, i := range api.Interfaces()[:3] {
		for _, m := range i.Methods {
			if m.Scm || m.Name == "MoveFd" {
				continue
			}
			var args []any
			for _, a := range m.In {
				switch a.Type {
				case "s":
					args = append(args, a.Name)
				case "i":
					args = append(args, 1)
				case "u":
					args = append(args, uint32(1))
				case "t":
					args = append(args, uint64(1))
				case "as":
					args = append(args, []string{"k"})
				case "a{ss}":
					args = append(args, [][2]string{{"k", "v"}})
				}
			}
			ask := to(i.Name, m.Name, args...)
			ask.path = i.Path
			r := c.call(ask)
			if r.Type != wire.Return || string(r.Signature) != m.OutSignature() {
				t.Errorf("%s.%s: type %d, signature %q", i.Name, m.Name, r.Type, r.Signature)
			}
			// RealtimeKit1 is as lenient as rtkit.
			ask.args = append(args, uint32(1), "more")
			if i.Name == api.RealtimeInterface {
				c.ok(ask, "")
			} else {
				c.fails(ask, "InvalidArgs", "Invalid arguments to "+m.Name+" method")
			}
			for _, elsewhere := range []string{"/", api.ObjectPath, api.RealtimePath} {
				if ask.path = elsewhere; elsewhere != i.Path {
					c.fails(ask, "UnknownMethod", m.Name)
				}
			}
		}
	}
}

func TestResults(t *testing.T) {
	ts := serve(t, &fakeBackend{pids: []int32{5, -1}}, Limits{})
	c := ts.login()
	text := func(m call, want string) {
		t.Helper()
		if got := c.ok(m, "s").String(); got != want {
			t.Errorf("%s: got %q, want %q", m.member, got, want)
		}
	}
	text(to(api.Interface0, "GetValue", "memory", "x", "key"), "memory x key")
	text(to(api.Interface0, "GetPidCgroupAbs", "memory", -7), "/pid -7")
	text(call{path: "/any", iface: "org.freedesktop.DBus", member: "Hello"}, ":1.1")
	if got := c.ok(to(api.Interface0, "Create", "memory", "x"), "i").Uint32(); int32(got) != -1 {
		t.Errorf("Create: got %d", int32(got))
	}
	if got := c.ok(to(api.Interface0, "Create", "memory", "there"), "i").Uint32(); got != 1 {
		t.Errorf("Create of what is there: got %d", got)
	}
	d := c.ok(to(api.Interface0, "GetTasks", "memory", "x"), "ai")
	if n, a, b := d.Uint32(), d.Uint32(), d.Uint32(); n != 8 || a != 5 || int32(b) != -1 || d.Close() != nil {
		t.Errorf("GetTasks: got %d bytes: %d, %d", n, a, b)
	}
	d = c.ok(to(api.Interface1, "ListTasks", "x"), "auu")
	if n := d.Uint32(); n != 12 || d.Uint32() != 1 || d.Uint32() != 2 || d.Uint32() != 3 || d.Uint32() != 4 || d.Close() != nil {
		t.Errorf("ListTasks")
	}
	d = c.ok(to(api.Interface0, "ListKeys", "memory", "x"), "a(suuu)")
	d.Skip("a(suuu)")
	must(t, d.Close())
	values, _, _ := c.ok(to(api.Interface1, "GetValue", "x", []string{"a", "b"}), "a{ss}").Dict()
	if len(values) != 2 || values["a"] != "x" {
		t.Errorf("GetValue: got %v", values)
	}
	if got := c.ok(to(api.Interface1, "ListControllers", "x"), "as").Strings(); !slices.Equal(got, []string{"memory", "x"}) {
		t.Errorf("ListControllers of x: got %v", got)
	}
	// Without an interface the first one that has the method serves it.
	if got := c.ok(to("", "ListChildren", "memory", "x"), "as").Strings(); len(got) != 2 {
		t.Errorf("ListChildren without an interface: got %v", got)
	}
	if got := c.ok(to("", "ListChildren", "x"), "as").Strings(); len(got) != 1 {
		t.Errorf("ListChildren of the other interface: got %v", got)
	}
}

func TestErrors(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	c := ts.login()
	names := map[api.Kind]string{
		api.Invalid: "DBus.Error.InvalidArgs", api.NotFound: "DBus.Error.FileNotFound",
		api.Exists: "DBus.Error.FileExists", api.Denied: "DBus.Error.AccessDenied",
		api.Busy: "CGManager1.Error.Busy", api.Limit: "DBus.Error.LimitsExceeded",
		api.Unsupported: "DBus.Error.NotSupported", api.Internal: "DBus.Error.Failed",
	}
	for _, k := range api.Kinds() {
		c.fails(to(api.Interface1, "Kill", "fail "+k.String()), names[k], k.String())
		c.fails(to(api.Interface0, "Create", "memory", "fail "+k.String()), "InvalidArgs", "invalid request: create ")
	}
	for _, name := range []string{"error", "panic"} {
		r := c.call(to(api.Interface1, "Kill", name))
		if n, s := failure(r); n != nameFailed || strings.Contains(s, "secret") || strings.Contains(s, "asked") {
			t.Errorf("%s: %s: %s", name, n, s)
		}
	}
	props := "org.freedesktop.DBus.Properties"
	for _, row := range []struct {
		call call
		want string
	}{
		// As the original answers.
		{to("no.such.Interface", "Ping", 0), `UnknownMethod: Method "Ping" with signature "i" on interface "no.such.Interface" doesn't exist`},
		{to(api.Interface0, "NoSuchMethod"), `UnknownMethod: Method "NoSuchMethod" with signature "" on interface "` + api.Interface0 + `" doesn't exist`},
		{call{path: "/no/such", iface: api.Interface0, member: "Ping", args: []any{0}}, `UnknownMethod: Method "Ping" with signature "i" on interface "` + api.Interface0 + `" doesn't exist`},
		{to(api.Interface0, "Ping"), "InvalidArgs: Invalid arguments to Ping method"},
		{to(api.Interface0, "GetPidCgroupScm", "memory", 3), "InvalidArgs: Invalid arguments to GetPidCgroupScm method"},
		{to(api.Interface0, "CreateScm", "memory", "x", handle(0)), "InvalidArgs: Failed to set passcred: Bad file descriptor"},
		{to(props, "Get", api.Interface0, "nosuch"), `UnknownMethod: Method "Get" with signature "ss" on interface "` + props + `" doesn't exist`},
		{to(props, "Get", "no.such.iface", "api_version"), `UnknownMethod: Method "Get" with signature "ss" on interface "` + props + `" doesn't exist`},
		{to(api.Interface1, "SetValue", "x", [][2]string{{"k", "1"}, {"k", "2"}}), `InvalidArgs: key "k" is given twice`},
		{to(api.Interface0, "GetValue", "m", "x", "long"), "InvalidArgs: invalid request: GetValue: the answer is longer than"},
		{to(api.Interface0, "GetValue", "m", "x", "binary"), "InvalidArgs: invalid request: GetValue: the answer has text in it that is not valid UTF-8"},
		{to(api.Interface0, "Prune", "m", strings.Repeat("fail invalid", 5000)), ""},
	} {
		r := c.call(row.call)
		n, s := failure(r)
		if got := strings.TrimPrefix(n, "org.freedesktop.DBus.Error.") + ": " + s; row.want != "" && !strings.HasPrefix(got, row.want) {
			t.Errorf("got  %s\nwant %s", got, row.want)
		}
		if len(s) > maxText {
			t.Errorf("a text of %d bytes", len(s))
		}
	}
	// A call that wants no answer gets none, not even an error.
	for _, m := range []call{ping(), to("no.such.Interface", "Ping"), to(api.Interface1, "Kill", "fail busy"), to(api.Interface1, "Kill", "x")} {
		m.flags = wire.NoReplyExpected
		c.write(c.encode(m))
	}
	if r := c.call(ping()); r.Type != wire.Return {
		t.Error("an answer that nobody wanted")
	}
}

func TestProperties(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	c := ts.login()
	props := "org.freedesktop.DBus.Properties"
	for _, iface := range []string{"", api.Interface0} {
		d := c.ok(to(props, "Get", iface, "api_version"), "v")
		if d.Skip("v"); d.Close() != nil {
			t.Error("not a variant")
		}
		r := c.call(to(props, "Get", iface, "api_version"))
		if string(r.Body) != "\x01i\x00\x00\x0a\x00\x00\x00" {
			t.Errorf("api_version: got %q", r.Body)
		}
	}
	d := c.ok(to(props, "GetAll", ""), "a{sv}")
	d.Skip("a{sv}")
	must(t, d.Close())
	for path, want := range map[string]string{"/": `<node name="org"/>`, "/org": `<node name="linuxcontainers"/>`, api.ObjectPath: "MovePidAbsScm"} {
		xml := c.ok(call{path: path, iface: "org.freedesktop.DBus.Introspectable", member: "Introspect"}, "s").String()
		if !strings.Contains(xml, want) {
			t.Errorf("introspection of %s has no %s", path, want)
		}
	}
	c.fails(call{path: "/no/such", iface: "org.freedesktop.DBus.Introspectable", member: "Introspect"}, "UnknownMethod", "")
}

// What cannot be a message ends the connection, and nobody else's.
func TestMalformed(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	good := (&client{}).encode(to(api.Interface0, "Create", "memory", "x"))
	change := func(at int, to ...byte) []byte {
		b := slices.Clone(good)
		copy(b[at:], to)
		return b
	}
	for name, b := range map[string][]byte{
		"byte order":      change(0, 'x'),
		"type 0":          change(1, 0),
		"version":         change(3, 2),
		"serial 0":        change(8, 0),
		"body too long":   change(4, 0, 0, 1, 0),
		"fields too long": change(12, 1, 0x20, 0, 0),
		"no fields":       change(12, 0, 0, 0, 0),
		"huge body":       change(4, 0xff, 0xff, 0xff, 0xff),
		"string too long": change(len(good)-17, 0x80),
		"no NUL":          change(len(good)-1, 1),
		"invalid UTF-8":   change(len(good)-2, 0xff),
		"garbage":         []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			ts.t = t
			c := ts.login()
			c.write(b)
			c.expectClosed()
			ts.serves()
		})
	}
	ts.t = t
	// Half a message, and then nothing: no answer, no harm.
	c := ts.login()
	c.write(good[:len(good)-1])
	ts.serves()
	c.close()
}

func TestHandshakeEnds(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	for name, b := range map[string]string{
		"no NUL":        "AUTH EXTERNAL\r\n",
		"endless line":  "\x00AUTH EXTERNAL " + strings.Repeat("30", wire.MaxLine),
		"many lines":    "\x00" + strings.Repeat("FOO\r\n", 100),
		"BEGIN at once": "\x00BEGIN\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			ts.t = t
			c := ts.dial()
			c.write([]byte(b))
			c.expectClosed()
			ts.serves()
		})
	}
	ts.t = t
}

func TestDeadlines(t *testing.T) {
	const limit = 700 * time.Millisecond
	ts := serve(t, &fakeBackend{}, Limits{Handshake: limit})
	var done *client
	for ok := false; !ok; { // once more if the test itself was too slow
		start := time.Now()
		done = ts.dial()
		_ = done.tryWrite([]byte(authRoot), nil)
		for !ok && done.fill() {
			ok = strings.HasSuffix(string(done.in), agreement)
		}
		if took := time.Since(start); !ok && took < limit {
			t.Fatalf("a login ended after %v: %q", took, done.in)
		}
	}
	done.in = nil
	start := time.Now()
	slow := ts.dial()
	slow.write([]byte("\x00AUTH EXTERNAL"))
	slow.expectClosed()
	if d := time.Since(start); d < 600*time.Millisecond || d > cgtest.Patience(5*time.Second) {
		t.Errorf("an endless handshake ended after %v", d)
	}
	done.ok(ping(), "") // not hit by it

	// Never reads.
	ts = serve(t, &fakeBackend{}, Limits{Stall: 200 * time.Millisecond})
	done = ts.login()
	deaf := ts.login()
	introspect := deaf.encode(to("org.freedesktop.DBus.Introspectable", "Introspect"))
	must(t, unix.SetNonblock(deaf.fd, true))
	for start := time.Now(); ; {
		err := deaf.tryWrite(introspect, nil)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			break
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		if time.Since(start) > cgtest.Patience(5*time.Second) {
			t.Fatal("a client that never reads stays connected")
		}
		if err != nil {
			ts.serves()
			time.Sleep(10 * time.Millisecond)
		}
	}
	done.ok(ping(), "")
}

func pipe(t testing.TB) (r, w int) {
	t.Helper()
	var p [2]int
	must(t, unix.Pipe2(p[:], unix.O_CLOEXEC))
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return p[0], p[1]
}

func many(fd, n int) []int {
	return slices.Repeat([]int{fd}, n)
}

// Descriptors that no message announces end the connection; all are closed.
func TestStrayFDs(t *testing.T) {
	ts := serve(t, &fakeBackend{}, Limits{})
	r, _ := pipe(t)
	announced := ping()
	announced.fds = 1
	notNegotiated := ts.dial()
	notNegotiated.write([]byte("\x00AUTH EXTERNAL 30\r\nBEGIN\r\n"))
	notNegotiated.expect("OK " + ts.guid + "\r\n")
	scm := to(api.Interface0, "CreateScm", "memory", "x", handle(0))
	scm.fds = 1
	for name, send := range map[string]func() *client{
		"253 with a message that announces none": func() *client {
			c := ts.login()
			c.write(c.encode(ping()), many(r, wire.MaxFDs)...)
			return c
		},
		"two where one is announced": func() *client {
			c := ts.login()
			c.write(c.encode(announced), r, r)
			return c
		},
		"in the handshake": func() *client {
			c := ts.dial()
			c.write([]byte("\x00AUTH EXTERNAL 30\r\n"), r)
			return c
		},
		"with BEGIN and nothing behind it": func() *client {
			c := ts.dial()
			c.write([]byte(authRoot), r)
			return c
		},
		"without negotiation": func() *client {
			notNegotiated.write(notNegotiated.encode(scm), r)
			return notNegotiated
		},
	} {
		t.Run(name, func(t *testing.T) {
			ts.t = t
			c := send()
			c.expectClosed()
			c.close()
			ts.serves()
		})
	}
	ts.t = t
	c := ts.login()
	c.fails(announced, "InvalidArgs", "Invalid file descriptors for Ping method", r)
}
