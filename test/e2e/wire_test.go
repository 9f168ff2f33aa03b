package e2e_test

import (
	"bytes"
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

const (
	busName    = "org.linuxcontainers.cgmanager"
	objectPath = "/org/linuxcontainers/cgmanager"
	properties = "org.freedesktop.DBus.Properties"
	login      = "\x00AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"

	realtimeKit  = "org.freedesktop.RealtimeKit1"
	realtimePath = "/org/freedesktop/RealtimeKit1"
)

// TestKernelWireTools logs in with the tools that people have.
func TestKernelWireTools(t *testing.T) {
	harness.Require(t, "dbus-send", "gdbus", "busctl")
	doors(t, wireTools)
}

func wireTools(w *world) {
	t := w.T
	w.Make("box", 0, 0)
	p := w.host(0, "box")
	addr := "unix:path=" + w.sock()
	send := func(how, member string, args ...string) []string {
		return append([]string{"dbus-send", how + addr, "--print-reply", objectPath, member}, args...)
	}
	realtime := func(member string, args ...string) []string {
		return append([]string{"dbus-send", "--peer=" + addr, "--print-reply", realtimePath, realtimeKit + "." + member}, args...)
	}
	gdbus := func(member string, args ...string) []string {
		return append([]string{"gdbus", "call", "--address", addr, "--dest", busName, "--object-path", objectPath, "--method", member}, args...)
	}
	busctl := func(verb string, args ...string) []string {
		return append([]string{"busctl", "--address=" + addr, verb, busName, objectPath}, args...)
	}
	for _, tool := range []struct {
		what string
		argv []string
		out  string
		code int
	}{
		{"dbus-send --peer", send("--peer=", harness.V0+".Create", "string:memory", "string:peer"), "int32 -1", 0},
		{"dbus-send --peer, new interface", send("--peer=", harness.V1+".GetValue", "string:peer", "array:string:memory.limit"), `string "max"`, 0},
		{"dbus-send --peer, an error", send("--peer=", harness.V0+".Create", "string:nosuch", "string:x"), "Error org.freedesktop.DBus.Error.InvalidArgs: invalid request: ", 1},
		{"dbus-send --address", send("--address=", harness.V0+".Create", "string:memory", "string:address"), "int32 -1", 0},
		{"dbus-send --bus", send("--bus=", harness.V0+".Create", "string:memory", "string:bus"), "int32 -1", 0},
		{"dbus-send --bus with a destination", append([]string{"dbus-send", "--dest=" + busName}, send("--bus=", harness.V0+".Create", "string:memory", "string:bus")[1:]...), "int32 1", 0},
		{"gdbus", gdbus(harness.V0+".Create", "memory", "gdbus"), "(-1,)", 0},
		{"gdbus, new interface", gdbus(harness.V1+".Create", "gdbus1", "['memory', 'pids']", "{'pids.limit': '7'}"), "(true,)", 0},
		{"gdbus, a dictionary back", gdbus(harness.V1+".GetValue", "gdbus1", "['pids.limit']"), "({'pids.limit': '7'},)", 0},
		{"gdbus introspect", []string{"gdbus", "introspect", "--address", addr, "--dest", busName, "--object-path", objectPath}, "readonly i api_version = 10", 0},
		{"gdbus, an error", gdbus(harness.V1+".Delete", "nosuch"), "org.freedesktop.DBus.Error.FileNotFound", 1},
		{"busctl", busctl("call", harness.V0, "Create", "ss", "memory", "busctl"), "i -1", 0},
		{"busctl, new interface", busctl("call", harness.V1, "Create", "sasa{ss}", "busctl1", "1", "memory", "1", "memory.limit", "10M"), "b true", 0},
		{"busctl, a dictionary back", busctl("call", harness.V1, "GetValue", "sas", "busctl1", "1", "memory.limit"), `a{ss} 1 "memory.limit" "10485760"`, 0},
		{"busctl get-property", busctl("get-property", harness.V0, "api_version"), "i 10", 0},
		{"busctl introspect", busctl("introspect"), ".CreateScm", 0},
		{"busctl, an error", busctl("call", harness.V1, "Delete", "s", "nosuch"), "nosuch", 1},
		{"busctl, realtime", append(busctl("get-property")[:3], realtimeKit, realtimePath, realtimeKit, "RTTimeUSecMax"), "x 200000", 0},
		{"dbus-send, realtime", realtime("MakeThreadRealtimeWithPID", "uint64:0", "uint64:0", "uint32:20"), "Error org.freedesktop.DBus.Error.Failed: No such file or directory", 1},
		{"dbus-send, realtime by a wrong type", realtime("MakeThreadHighPriority", "uint32:0", "int32:0"), `InvalidArgs: Argument 0 is specified to be of type "uint64", but is actually of type "uint32"`, 1},
	} {
		out, code := p.Exec(nil, tool.argv...)
		if code != tool.code || !strings.Contains(out, tool.out) {
			t.Errorf("%s: exit code %d, %q, want %d and %q", tool.what, code, out, tool.code, tool.out)
		}
	}
	for _, name := range []string{"peer", "address", "bus", "gdbus", "gdbus1", "busctl", "busctl1"} {
		if !w.Exists(harness.Find(t, "memory"), "box/"+name) {
			t.Errorf("%s was not created", name)
		}
	}
}

// godbusArgs are for godbusClient.
type godbusArgs struct {
	Sock  string
	Hello bool
	PIDFD int
}

// godbusClient talks to the daemon with the D-Bus library that most Go
// programs use, and returns what it was told.
var godbusClient = harness.Inside("godbus", func(a godbusArgs) ([]string, error) {
	conn, err := dbus.Dial("unix:path=" + a.Sock)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.Auth(nil); err != nil {
		return nil, err
	}
	if a.Hello {
		if err := conn.Hello(); err != nil {
			return nil, err
		}
	}
	o := conn.Object(busName, objectPath)
	var existed int32
	if err := o.Call(harness.V0+".Create", 0, "memory,pids", "go").Store(&existed); err != nil {
		return nil, err
	}
	if err := o.Call(harness.V1+".SetValue", 0, "go", map[string]string{"pids.limit": "9"}).Err; err != nil {
		return nil, err
	}
	var values map[string]string
	if err := o.Call(harness.V1+".GetValue", 0, "go", []string{"pids.limit"}).Store(&values); err != nil {
		return nil, err
	}
	version, err := o.GetProperty(harness.V0 + ".api_version")
	if err != nil {
		return nil, err
	}
	if !conn.SupportsUnixFDs() {
		return nil, errors.New("no files can be passed")
	}
	if err := o.Call(harness.V1+".MoveFd", 0, "go", dbus.UnixFD(a.PIDFD)).Err; err != nil {
		return nil, err
	}
	refused := o.Call(harness.V1+".Delete", 0, "nosuch").Err
	e, ok := errors.AsType[dbus.Error](refused)
	if !ok {
		return nil, fmt.Errorf("the answer to Delete: %w", refused)
	}
	return []string{fmt.Sprint(existed), values["pids.limit"], version.String(), e.Name}, nil
})

func TestKernelWireGodbus(t *testing.T) {
	doors(t, wireGodbus)
}

func wireGodbus(w *world) {
	t := w.T
	for _, hello := range []bool{false, true} {
		cg := fmt.Sprint("box", hello)
		w.Make(cg, 0, 0)
		p := w.host(0, cg)
		v := w.host(0, cg)
		var got []string
		if err := p.Run(godbusClient, godbusArgs{w.sock(), hello, p.PidFD(v.HostPID)}, &got); err != nil {
			t.Fatalf("hello %v: %v", hello, err)
		}
		want(t, "the answers", got, []string{"-1", "9", "10", "org.freedesktop.DBus.Error.FileNotFound"})
		for _, ctrl := range []string{"memory", "pids"} {
			want(t, "where the process is", v.Cgroups()[harness.Find(t, ctrl).Name], w.Path(cg+"/go"))
		}
	}
}

// roundTripArgs are for roundTrip.
type roundTripArgs struct {
	Sock string
	Data []byte
	// Until ends the answer.
	Until []byte
}

type roundTripResult struct {
	Got   []byte
	Reads int
}

// roundTrip writes once and counts the reads until the answer is complete.
var roundTrip = harness.Inside("round trip", func(a roundTripArgs) (r roundTripResult, err error) {
	fd, err := dialRaw(a.Sock)
	if err != nil {
		return r, err
	}
	defer unix.Close(fd)
	if r.Got, err = harness.Begin(fd, a.Data); err != nil {
		return r, err
	}
	buf := make([]byte, 64<<10)
	for !bytes.HasSuffix(r.Got, a.Until) {
		n, err := harness.Read(fd, buf)
		if err != nil || n == 0 {
			return r, fmt.Errorf("after %q: %d, %w", r.Got, n, err)
		}
		r.Got = append(r.Got, buf[:n]...)
		r.Reads++
	}
	return r, nil
})

// dialRaw connects a socket whose reads and writes take at most five seconds, longer
// on a slow machine.
func dialRaw(sock string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	tv := timeval(5 * time.Second)
	if err := errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.Connect(fd, &unix.SockaddrUnix{Name: sock}),
	); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// timeval is how long a socket's option says to wait for what takes d at most.
func timeval(d time.Duration) unix.Timeval { return unix.NsecToTimeval(int64(cgtest.Patience(d))) }

// message encodes a method call as any client may: any byte order, any header
// fields. flags is 1 for NO_REPLY_EXPECTED.
func message(t testing.TB, order binary.ByteOrder, serial uint32, flags dbus.Flags, header map[dbus.HeaderField]any, body ...any) []byte {
	t.Helper()
	m := &dbus.Message{Type: dbus.TypeMethodCall, Flags: flags, Headers: map[dbus.HeaderField]dbus.Variant{}, Body: body}
	for k, v := range header {
		m.Headers[k] = dbus.MakeVariant(v)
	}
	if len(body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	var b bytes.Buffer
	if err := m.EncodeTo(&b, order); err != nil {
		t.Fatal(err)
	}
	// The library keeps the serial to itself.
	order.PutUint32(b.Bytes()[8:], serial)
	return b.Bytes()
}

// call is message for the usual fields.
func call(t testing.TB, serial uint32, iface, member string, body ...any) []byte {
	t.Helper()
	return message(t, binary.LittleEndian, serial, 0, fields(iface, member), body...)
}

func fields(iface, member string) map[dbus.HeaderField]any {
	return map[dbus.HeaderField]any{
		dbus.FieldPath: dbus.ObjectPath(objectPath), dbus.FieldInterface: iface, dbus.FieldMember: member,
	}
}

// emptyReply is the original daemon's answer without values, to the byte.
func emptyReply(serial, to byte) []byte {
	return []byte{
		'l', 2, 1, 1, 0, 0, 0, 0, serial, 0, 0, 0, 8, 0, 0, 0,
		5, 1, 'u', 0, to, 0, 0, 0,
	}
}

// The login and the first call go in one write, and are answered in one round
// trip: the original's took four.
func TestKernelWireRoundTrip(t *testing.T) {
	doors(t, wireRoundTrip)
}

func wireRoundTrip(w *world) {
	t := w.T
	w.Make("box", 0, 0)
	p := w.host(0, "box")
	created := append([]byte{
		'l', 2, 1, 1, 4, 0, 0, 0, 1, 0, 0, 0, 15, 0, 0, 0,
		5, 1, 'u', 0, 7, 0, 0, 0, 8, 1, 'g', 0, 1, 'i', 0, 0,
	}, 0xff, 0xff, 0xff, 0xff)
	for _, tc := range []struct {
		what  string
		data  []byte
		until []byte
		// What needs no cgroup is in one write with the end of the login.
		reads int
	}{
		{"Ping", call(t, 7, harness.V0, "Ping", int32(0)), emptyReply(1, 7), 1},
		{"Peer.Ping", call(t, 7, "org.freedesktop.DBus.Peer", "Ping"), emptyReply(1, 7), 1},
		{"three of them", bytes.Join([][]byte{
			call(t, 5, harness.V0, "Ping", int32(0)), call(t, 6, harness.V0, "Ping", int32(0)), call(t, 7, harness.V0, "Ping", int32(0)),
		}, nil), emptyReply(3, 7), 1},
		{"Ping after one without an answer", append(
			message(t, binary.LittleEndian, 6, dbus.FlagNoReplyExpected, fields(harness.V0, "Ping"), int32(0)),
			call(t, 7, harness.V0, "Ping", int32(0))...), emptyReply(1, 7), 1},
		{"Create", call(t, 7, harness.V0, "Create", "memory", "x"), created, 2},
	} {
		var r roundTripResult
		err := p.Run(roundTrip, roundTripArgs{w.sock(), append([]byte(login), tc.data...), tc.until}, &r)
		if err != nil {
			t.Errorf("%s: %v", tc.what, err)
			continue
		}
		if !bytes.HasPrefix(r.Got, []byte("OK ")) || !bytes.Contains(r.Got, []byte("\r\nAGREE_UNIX_FD\r\nl\x02")) {
			t.Errorf("%s: %q", tc.what, r.Got)
		}
		if r.Reads > tc.reads {
			t.Errorf("%s: answered in %d pieces, want %d", tc.what, r.Reads, tc.reads)
		}
	}
	// An original client asks line by line; that works too.
	fd := p.Socket(unix.SOCK_STREAM)
	if err := p.Connect(fd, w.sock()); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ say, hear string }{
		{"\x00", ""},
		{"AUTH\r\n", "REJECTED EXTERNAL\r\n"},
		{"AUTH EXTERNAL\r\n", "DATA\r\n"},
		{"DATA\r\n", "OK "},
		{"NEGOTIATE_UNIX_FD\r\n", "AGREE_UNIX_FD\r\n"},
		{"BEGIN\r\n" + string(call(t, 1, harness.V0, "Ping", int32(0))), string(emptyReply(1, 1))},
	} {
		if err := p.Send(fd, []byte(step.say), nil); err != nil {
			t.Fatal(err)
		}
		if step.hear == "" {
			continue
		}
		d, err := p.Recv(fd, 5*time.Second)
		if err != nil || !strings.HasPrefix(string(d.Data), step.hear) {
			t.Fatalf("%q is answered by %q, %v", step.say, d.Data, err)
		}
	}
}

// raw is a connection on which the test writes bytes.
type raw struct {
	t   testing.TB
	p   *harness.Proc
	fd  int
	buf []byte
}

func dial(t testing.TB, p *harness.Proc, sock string) *raw {
	t.Helper()
	r := &raw{t: t, p: p, fd: p.Socket(unix.SOCK_STREAM)}
	if err := p.Connect(r.fd, sock); err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("%x", strconv.Itoa(int(p.UID)))
	if err := p.Send(r.fd, []byte("\x00AUTH EXTERNAL "+id+"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"), nil); err != nil {
		t.Fatal(err)
	}
	for bytes.Count(r.buf, []byte("\n")) < 2 {
		r.more()
	}
	r.buf = nil
	return r
}

func (r *raw) more() {
	r.t.Helper()
	d, err := r.p.Recv(r.fd, 5*time.Second)
	if err != nil || len(d.Data) == 0 {
		r.t.Fatalf("after %q: %v", r.buf, err)
	}
	r.buf = append(r.buf, d.Data...)
}

// ask sends a message and returns the answer.
func (r *raw) ask(msg []byte, fds ...int) *dbus.Message {
	r.t.Helper()
	if err := r.p.Send(r.fd, msg, nil, fds...); err != nil {
		r.t.Fatal(err)
	}
	for {
		if len(r.buf) >= 16 {
			b := bytes.NewReader(r.buf)
			m, err := dbus.DecodeMessage(b)
			if err == nil {
				r.buf = r.buf[len(r.buf)-b.Len():]
				return m
			}
		}
		r.more()
	}
}

// Both byte orders are understood, also in turn on one connection.
func TestKernelWireByteOrder(t *testing.T) {
	doors(t, wireByteOrder)
}

func wireByteOrder(w *world) {
	t := w.T
	w.Make("box", 0, 0)
	p := w.host(0, "box")
	v := w.host(0, "box")
	r := dial(t, p, w.sock())
	for i, order := range []binary.ByteOrder{binary.BigEndian, binary.LittleEndian, binary.BigEndian} {
		name := fmt.Sprint("o", i)
		serial := uint32(0x01020304 + i)
		ask := func(iface, member string, args ...any) []any {
			t.Helper()
			serial++
			m := r.ask(message(t, order, serial, 0, fields(iface, member), args...))
			if to := m.Headers[dbus.FieldReplySerial].Value(); to != serial || m.Type != dbus.TypeMethodReply {
				t.Fatalf("%v: %s: %v", order, member, m)
			}
			return m.Body
		}
		ask(harness.V0, "Ping", int32(0))
		want(t, "Create", ask(harness.V0, "Create", "memory", name), []any{int32(-1)})
		want(t, "CGManager1.Create", ask(harness.V1, "Create", name+"/a", []string{"memory", "pids"}, map[string]string{"pids.limit": "11", "memory.limit": "20M"}), []any{true})
		want(t, "GetValue", ask(harness.V1, "GetValue", name+"/a", []string{"pids.limit"}), []any{map[string]string{"pids.limit": "11"}})
		want(t, "api_version", ask(properties, "Get", harness.V0, "api_version"), []any{dbus.MakeVariant(int32(10))})
		ask(harness.V1, "Move", name+"/a", uint32(v.HostPID))
		want(t, "ListTasks", ask(harness.V1, "ListTasks", name+"/a"), []any{[]uint32{uint32(v.HostPID)}, uint32(0)})
		if pids := ask(harness.V0, "GetTasks", "memory", name+"/a")[0].([]int32); !slices.Contains(pids, int32(v.HostPID)) {
			t.Errorf("GetTasks: %v without %d", pids, v.HostPID)
		}
		ask(harness.V0, "Chown", "memory", name, int32(1000), int32(-1))
		want(t, "the owner", w.owner(harness.Find(t, "memory"), "box/"+name, ""), "1000:0")
		ask(harness.V0, "MovePid", "all", "", int32(v.HostPID))

		// With a file: the side channel.
		ours, theirs := p.Socketpair(unix.SOCK_DGRAM)
		p.PassCred(ours)
		h := fields(harness.V0, "CreateScm")
		h[dbus.FieldUnixFDs] = uint32(1)
		msg := message(t, order, 99, 0, h, "memory", name+"/scm", dbus.UnixFDIndex(0))
		if m := r.ask(msg, theirs); m.Type != dbus.TypeMethodReply {
			t.Fatalf("%v: CreateScm: %v", order, m)
		}
		p.Close(theirs)
		if d, err := p.Recv(ours, 5*time.Second); err != nil || string(d.Data) != "1" {
			t.Fatalf("kick: %q, %v", d.Data, err)
		}
		if err := p.Send(ours, []byte{0}, &p.Cred); err != nil {
			t.Fatal(err)
		}
		if d, err := p.Recv(ours, 5*time.Second); err != nil || string(d.Data) != "1" {
			t.Fatalf("result: %q, %v", d.Data, err)
		}
		p.Close(ours)
		if !w.Exists(harness.Find(t, "memory"), "box/"+name+"/scm") {
			t.Error("CreateScm created nothing")
		}
	}
}

// What clients in the field rely on, one test for each as it was seen in their
// traces.

// field is a client of the host's root cgroups, as LXC's, and the name of the
// test's tree there.
func field(w *world) (*harness.Proc, asker, string) {
	t := w.T
	t.Helper()
	p := harness.Start(t, harness.Spec{})
	c := p.MustDial(w.sock())
	t.Cleanup(c.Close)
	a := asker{t, c}
	// libnih and dbus-glib clients begin with this, and a Ping before the
	// first call that passes a file.
	want(t, "api_version", a.ok(properties, "Get", []any{harness.V0, "api_version"}), []any{dbus.MakeVariant(int32(10))})
	a.v0("Ping", int32(0))
	// LXC does this first.
	for _, ctrl := range a.v0("ListControllers")[0].([]string) {
		a.v0("MovePidAbs", ctrl, "/", p.PID)
	}
	for _, h := range harness.Hierarchies() {
		if len(h.Controllers()) == 0 { // systemd's own beside v1: only "all" names it
			w.PlaceTop(p, h)
		}
	}
	for name, cg := range p.Cgroups() {
		if cg != "/" && !strings.HasPrefix(name, "name=cgmtest") {
			t.Errorf("in %s:%s after MovePidAbs to /", name, cg)
		}
	}
	return p, a, strings.TrimPrefix(w.Base, "/")
}

// everywhere reports in how many hierarchies the cgroup is, and fails the test
// unless that is all or none.
func (w *world) everywhere(cg string) bool {
	w.Helper()
	n := 0
	for _, h := range harness.Hierarchies() {
		if w.Exists(h, cg) {
			n++
		}
	}
	if n != 0 && n != len(harness.Hierarchies()) {
		w.Errorf("%s is in %d hierarchies of %d", cg, n, len(harness.Hierarchies()))
	}
	return n > 0
}

// init is a container's first process.
func (w *world) init() *harness.Proc {
	w.Helper()
	p := harness.Start(w.T, harness.Spec{PIDNS: true, KeepIDs: true})
	w.PlaceTop(p, harness.Hierarchies()...)
	return p
}

func TestKernelWireFieldLXCRoot(t *testing.T) {
	doors(t, fieldLXCRoot)
}

func fieldLXCRoot(w *world) {
	t := w.T
	p, a, base := field(w)
	ctrls := a.v0("ListControllers")[0].([]string)
	// Names are tried until one is new.
	want(t, "Create", a.v0("Create", "all", base+"/lxc/n"), []any{int32(-1)})
	want(t, "Create again", a.v0("Create", "all", base+"/lxc/n"), []any{int32(1)})
	want(t, "Create of another", a.v0("Create", "all", base+"/lxc/n-1"), []any{int32(-1)})
	w.everywhere("lxc/n-1")
	// LXC 2.0 probes each controller with an absolute name.
	for _, c := range ctrls {
		probe := fmt.Sprintf("/%s/lxc/lxcprobe-%d", base, p.PID)
		want(t, "the probe of "+c, a.v0("Create", c, probe), []any{int32(-1)})
		want(t, "its removal", a.v0("Remove", c, probe, int32(1)), []any{int32(1)})
	}
	init := w.init()
	for i, c := range ctrls {
		if i < 2 {
			a.v0("MovePid", c, base+"/lxc/n", int32(init.HostPID))
			want(t, "where init is", a.v0("GetPidCgroup", c, int32(init.HostPID)), []any{base + "/lxc/n"})
		}
	}
	a.v0("MovePid", "all", base+"/lxc/n", int32(init.HostPID))
	for name, cg := range init.Cgroups() {
		if cg != w.Path("lxc/n") && !strings.HasPrefix(name, "name=cgmtest") {
			t.Errorf("init is in %s:%s", name, cg)
		}
	}
	a.v0("SetValue", "memory", base+"/lxc/n", "memory.limit_in_bytes", "512M")
	a.v0("SetValue", "cpuset", base+"/lxc/n", "cpuset.cpus", "0")
	a.v0("SetValue", "devices", base+"/lxc/n", "devices.deny", "a")
	var allowed []string
	for _, dev := range []string{
		"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 5:0 rwm", "c 5:2 rwm", "c 1:8 rwm",
		"c 1:9 rwm", "c 136:* rwm", "c 254:0 rm", "c 10:229 rwm", "c 10:200 rwm",
	} {
		a.v0("SetValue", "devices", base+"/lxc/n", "devices.allow", dev)
		allowed = append(allowed, dev)
	}
	list := strings.Join(allowed, "\n")
	want(t, "devices.list", a.v0("GetValue", "devices", base+"/lxc/n", "devices.list"), []any{list})
	if devices := harness.Find(t, "devices"); !devices.V2 { // which has no such file
		want(t, "devices.list on the host", w.Read(devices, "lxc/n", "devices.list"), list)
	}
	want(t, "memory.limit_in_bytes", a.v0("GetValue", "memory", base+"/lxc/n", "memory.limit_in_bytes"), []any{"536870912"})

	// lxc-attach.
	attached := w.init()
	for _, c := range ctrls {
		cg := a.v0("GetPidCgroupAbs", c, int32(init.HostPID))[0].(string)
		want(t, "the container's cgroup in "+c, cg, w.Path("lxc/n"))
		a.v0("MovePidAbs", c, cg, int32(attached.HostPID))
	}
	tasks := a.v0("GetTasks", "memory", base+"/lxc/n")[0].([]int32)
	if len(tasks) < 2 {
		t.Errorf("tasks %v, want those of %d and %d", tasks, init.HostPID, attached.HostPID)
	}
	// lxc-stop.
	attached.Stop()
	if _, err := a.c.V0("Remove", "all", base+"/lxc/n", int32(1)); err == nil {
		t.Error("removed with a task in it")
	}
	init.Stop()
	want(t, "Remove", a.v0("Remove", "all", base+"/lxc/n", int32(1)), []any{int32(1)})
	want(t, "Remove again", a.v0("Remove", "all", base+"/lxc/n", int32(1)), []any{int32(-1)})
	if w.everywhere("lxc/n") {
		t.Error("the cgroup is still there")
	}
}

// A user's container: created by the user, whose child in the container's user
// namespace then gives the group to the container's root.
func TestKernelWireFieldLXCUnprivileged(t *testing.T) {
	doors(t, fieldLXCUnprivileged)
}

func fieldLXCUnprivileged(w *world) {
	t := w.T
	w.Make("user", 1000, 1000)
	u := w.host(1000, "user")
	c := u.MustDial(w.sock())
	defer c.Close()
	a := asker{t, c}
	for _, ctrl := range a.v0("ListControllers")[0].([]string) {
		if _, err := c.V0("MovePidAbs", ctrl, "/", u.PID); err == nil {
			t.Errorf("a user left its cgroup in %s", ctrl)
		}
	}
	want(t, "Create", a.v0("Create", "all", "lxc/n"), []any{int32(-1)})
	// The container's first process, before it becomes anybody else inside.
	maps := []syscall.SysProcIDMap{
		{ContainerID: 0, HostID: 100000, Size: 65536}, {ContainerID: 65536, HostID: 1000, Size: 1},
	}
	init := harness.Start(t, harness.Spec{UserNS: true, Maps: maps, UID: 65536, GID: 65536})
	w.Place(init, "user")
	a.v0("MovePid", "all", "lxc/n", int32(init.HostPID))
	for name, cg := range init.Cgroups() {
		if cg != w.Path("user/lxc/n") && !strings.HasPrefix(name, "name=cgmtest") {
			t.Errorf("init is in %s:%s", name, cg)
		}
	}
	// Root inside, in a user namespace where the user has a number as well.
	child := harness.Start(t, harness.Spec{UserNS: true, Maps: maps})
	w.Place(child, "user")
	cc := child.MustDial(w.sock())
	defer cc.Close()
	asker{t, cc}.v0("Ping", int32(0))
	got, err := cc.Scm("ChownScm", []harness.Cred{child.Cred, {PID: child.PID, UID: 65536, GID: 0}}, "all", "lxc/n")
	if err != nil || got != "1" {
		t.Fatalf("ChownScm: %v, %v", got, err)
	}
	a.v0("Chmod", "all", "lxc/n", "", int32(0o775))
	a.v0("Chmod", "all", "lxc/n", "tasks", int32(0o664))
	a.v0("Chmod", "all", "lxc/n", "cgroup.procs", int32(0o775))
	for _, h := range harness.Hierarchies() {
		for f, mode := range map[string]uint32{"": 0o775, h.TasksFile(): 0o664, "cgroup.procs": 0o775} {
			want(t, h.Name+" "+f, w.owner(h, "user/lxc/n", f), "1000:100000")
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(w.Dir(h, "user/lxc/n"), f), &st); err != nil {
				t.Fatal(err)
			}
			if f != h.TasksFile() || !h.V2 { // there both names mean one file
				want(t, fmt.Sprintf("the mode of %s %q", h.Name, f), st.Mode&0o7777, mode)
			}
		}
	}
	// The container's root has the group's write bit and makes its own.
	root := harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 100000, MapSize: 65536})
	w.Place(root, "user/lxc/n")
	rc := root.MustDial(w.sock())
	want(t, "Create inside", asker{t, rc}.v0("Create", "all", "init.scope"), []any{int32(-1)})
	want(t, "its owner", w.owner(harness.Find(t, "memory"), "user/lxc/n/init.scope", ""), "100000:100000")
	rc.Close()
	root.Stop()
	init.Stop()
	want(t, "Remove", a.v0("Remove", "all", "lxc/n", int32(1)), []any{int32(1)})
}

// lxc-freeze and lxc-cgroup: a child moves itself beside the container and
// names it from there.
func TestKernelWireFieldLXCFreeze(t *testing.T) {
	doors(t, fieldLXCFreeze)
}

func fieldLXCFreeze(w *world) {
	t := w.T
	p, a, base := field(w)
	a.v0("Create", "all", base+"/lxc/n")
	init := w.init()
	a.v0("MovePid", "all", base+"/lxc/n", int32(init.HostPID))
	child := p.Spawn(harness.Spec{})
	cc := child.MustDial(w.sock())
	b := asker{t, cc}
	for _, ctrl := range []string{"freezer", "memory"} {
		cg := b.v0("GetPidCgroupAbs", ctrl, int32(init.HostPID))[0].(string)
		want(t, "the container", cg, w.Path("lxc/n"))
		b.v0("MovePidAbs", ctrl, filepath.Dir(cg), child.PID)
	}
	want(t, "the state", b.v0("GetValue", "freezer", "n", "freezer.state"), []any{"THAWED"})
	b.v0("SetValue", "freezer", "n", "freezer.state", "FROZEN")
	eventually(t, "frozen", func() bool {
		return b.v0("GetValue", "freezer", "n", "freezer.state")[0] == "FROZEN"
	})
	b.v0("SetValue", "freezer", "n", "freezer.state", "THAWED")
	want(t, "the state", b.v0("GetValue", "freezer", "n", "freezer.state"), []any{"THAWED"})
	b.v0("SetValue", "memory", "n", "memory.limit_in_bytes", "300M")
	want(t, "the limit", b.v0("GetValue", "memory", "n", "memory.limit_in_bytes"), []any{"314572800"})
	if s := b.v0("GetValue", "memory", "n", "memory.stat")[0].(string); !strings.HasPrefix(s, "cache ") {
		t.Errorf("memory.stat: %q", s)
	}
	cc.Close()
	init.Stop()
}

// lxcfs: keys with a leading slash, values with a newline at the end, cgroups
// from the root.
func TestKernelWireFieldLXCFS(t *testing.T) {
	doors(t, fieldLXCFS)
}

func fieldLXCFS(w *world) {
	t := w.T
	p, a, base := field(w)
	a.v0("Create", "memory", base+"/c")
	cg := "/" + base + "/c"
	a.v0("SetValue", "memory", cg, "/memory.limit_in_bytes", "50000000\n")
	want(t, "the limit", a.v0("GetValue", "memory", cg, "/memory.limit_in_bytes"), []any{"49999872"})
	want(t, "no tasks", a.v0("GetValue", "memory", cg, "/tasks"), []any{""})
	sleeper := p.Launch(nil, "/bin/sleep", "60")
	a.v0("MovePid", "memory", base+"/c", int32(sleeper.PID))
	want(t, "one task", a.v0("GetValue", "memory", cg, "/tasks"), []any{strconv.Itoa(sleeper.PID)})
	want(t, "its process", a.v0("GetValue", "memory", cg, "/cgroup.procs"), []any{strconv.Itoa(sleeper.PID)})
	want(t, "its tasks", a.v0("GetTasks", "memory", cg), []any{[]int32{int32(sleeper.PID)}})
	want(t, "no children", a.v0("ListChildren", "memory", cg), []any{[]string{}})
	var keys []string
	for _, k := range a.v0("ListKeys", "memory", cg)[0].([][]any) {
		keys = append(keys, fmt.Sprint(k[0]))
		if mode, _ := k[3].(uint32); mode&unix.S_IFMT != unix.S_IFREG {
			t.Errorf("the mode of %v is %o, without the type of the file", k[0], k[3])
		}
	}
	if !strings.Contains(strings.Join(keys, " "), harness.Find(t, "memory").File("memory.limit_in_bytes")) {
		t.Errorf("keys %v", keys)
	}
	a.v0("Chmod", "memory", cg, "tasks", int32(0o600))
	a.v0("Chown", "memory", cg, int32(1000), int32(1000))
	if err := sleeper.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := sleeper.End(time.Second); err != nil {
		t.Fatal(err)
	}
	want(t, "Remove", a.v0("Remove", "memory", cg, int32(1)), []any{int32(1)})
}

// pam_cgm gives a session cgroups that go when its last process does.
func TestKernelWireFieldPamCgm(t *testing.T) {
	doors(t, fieldPamCgm)
}

func fieldPamCgm(w *world) {
	t := w.T
	p, a, base := field(w)
	const ctrls = "memory,freezer,cpu"
	session := base + "/user/1000/0"
	if a.v0("Remove", ctrls, session, int32(1))[0] != int32(-1) {
		t.Error("what is not there counts as removed")
	}
	a.v0("Create", ctrls, session)
	a.v0("Chown", ctrls, session, int32(1000), int32(1000))
	sh := p.Spawn(harness.Spec{})
	a.v0("MovePid", ctrls, session, sh.PID)
	sc := sh.MustDial(w.sock())
	// Asked from inside, of itself.
	asker{t, sc}.v0("RemoveOnEmpty", ctrls, "")
	sc.Close()
	tasks := a.v0("GetTasksRecursive", ctrls, base+"/user")[0].([]int32)
	if len(tasks) == 0 {
		t.Error("GetTasksRecursive: no tasks")
	}
	want(t, "ListChildren", a.v0("ListChildren", "memory", base+"/user"), []any{[]string{"1000"}})
	memory, cpu, freezer := harness.Find(t, "memory"), harness.Find(t, "cpu"), harness.Find(t, "freezer")
	for _, h := range []harness.Hierarchy{memory, cpu, freezer} {
		if !w.Exists(h, "user/1000/0") {
			t.Errorf("%s: gone before the session ended", h.Name)
		}
	}
	sh.Stop()
	for _, h := range []harness.Hierarchy{memory, cpu, freezer} {
		eventually(t, h.Name+": the session's cgroup goes", func() bool { return !w.Exists(h, "user/1000/0") })
	}
}

func TestKernelWireFieldSystemdShim(t *testing.T) {
	doors(t, fieldSystemdShim)
}

func fieldSystemdShim(w *world) {
	t := w.T
	p, a, base := field(w)
	systemd := harness.Find(t, "name=systemd")
	agent := filepath.Join(systemd.Mount, "release_agent")
	before, err := os.ReadFile(agent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(agent, before, 0); err != nil {
			t.Error(err)
		}
	})
	a.v0("SetValue", "systemd", "/", "release_agent", "/bin/true")
	if b, err := os.ReadFile(agent); err != nil || strings.TrimSpace(string(b)) != "/bin/true" {
		t.Errorf("release_agent is %q, %v", b, err)
	}
	slice := base + "/user-1000.slice/session-1.scope"
	want(t, "Create", a.v0("Create", "systemd", slice), []any{int32(-1)})
	a.v0("Chown", "systemd", slice, int32(1000), int32(-1))
	want(t, "the owner", w.owner(systemd, "user-1000.slice/session-1.scope", ""), "1000:0")
	sleeper := p.Launch(nil, "/bin/sleep", "60")
	a.v0("MovePid", "systemd", slice, int32(sleeper.PID))
	want(t, "where it is", a.v0("GetPidCgroup", "name=systemd", int32(sleeper.PID)), []any{slice})
	want(t, "the tasks", a.v0("GetTasksRecursive", "all", base), []any{[]int32{int32(sleeper.PID)}})
	a.v0("Prune", "systemd", base+"/user-1000.slice")
	if !w.Exists(systemd, "user-1000.slice/session-1.scope") {
		t.Error("pruned with a task in it")
	}
	if err := sleeper.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := sleeper.End(time.Second); err != nil {
		t.Fatal(err)
	}
	// What was not empty was marked.
	eventually(t, "pruned", func() bool { return !w.Exists(systemd, "user-1000.slice") })
}

// dbus-python introspects first, names a destination, and leaves the interface
// out.
func TestKernelWireFieldDbusPython(t *testing.T) {
	doors(t, fieldDbusPython)
}

func fieldDbusPython(w *world) {
	t := w.T
	w.Make("box", 0, 0)
	p := w.host(0, "box")
	r := dial(t, p, w.sock())
	serial := uint32(1)
	ask := func(iface, member string, args ...any) *dbus.Message {
		t.Helper()
		serial++
		h := fields(iface, member)
		h[dbus.FieldDestination] = busName
		if iface == "" {
			delete(h, dbus.FieldInterface)
		}
		return r.ask(message(t, binary.LittleEndian, serial, 0, h, args...))
	}
	m := ask("org.freedesktop.DBus.Introspectable", "Introspect")
	var node struct {
		Interfaces []struct {
			Name    string `xml:"name,attr"`
			Methods []struct {
				Name string `xml:"name,attr"`
			} `xml:"method"`
		} `xml:"interface"`
	}
	if err := xml.Unmarshal([]byte(m.Body[0].(string)), &node); err != nil {
		t.Fatal(err)
	}
	methods := map[string]int{}
	for _, i := range node.Interfaces {
		methods[i.Name] = len(i.Methods)
	}
	want(t, "methods of the original", methods[harness.V0], 34)
	m = ask(properties, "GetAll", harness.V0)
	want(t, "GetAll", m.Body, []any{map[string]dbus.Variant{"api_version": dbus.MakeVariant(int32(10))}})
	if m = ask("", "Create", "memory", "py"); m.Type != dbus.TypeMethodReply || !reflect.DeepEqual(m.Body, []any{int32(-1)}) {
		t.Errorf("Create without an interface: %v", m)
	}
	if m = ask("", "NoSuchMethod"); m.Type != dbus.TypeError || m.Headers[dbus.FieldErrorName].Value() != "org.freedesktop.DBus.Error.UnknownMethod" {
		t.Errorf("an unknown method: %v", m)
	}
	if !w.Exists(harness.Find(t, "memory"), "box/py") {
		t.Error("not created")
	}
}
