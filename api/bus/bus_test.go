package bus_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/bus"
	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// user is one whom every system has: dbus-daemon lets no other log in.
const user = 1

const (
	policy    = "testdata/dbus-1/system.d/org.freedesktop.RealtimeKit1.conf"
	realtime  = api.RealtimeInterface + "."
	errPrefix = "org.freedesktop.DBus.Error."
)

// backend says what it was asked, and fails as it is told.
type backend struct {
	api.Backend
	peers atomic.Int64 // that are open
	block chan struct{}

	mu      sync.Mutex
	asked   []string // guarded by mu
	rq      api.Request
	refused error
	ends    error
}

type peer struct {
	b      *backend
	cred   api.Cred
	closed atomic.Bool
}

func (p *peer) AcceptsIdentity(uint32) bool { return true }
func (p *peer) Accounts() []string          { return []string{fmt.Sprintf("uid:%d", p.cred.UID)} }
func (p *peer) Close() {
	if !p.closed.Swap(true) {
		p.b.peers.Add(-1)
	}
}

func (b *backend) Open(opener api.Cred, pidfd int) (api.Peer, error) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd))
	if err := errors.Join(err, unix.Close(pidfd)); err != nil {
		return nil, err
	}
	if !strings.Contains(string(info), fmt.Sprintf("\nPid:\t%d\n", opener.PID)) {
		return nil, fmt.Errorf("the pidfd is not of process %d: %s", opener.PID, info)
	}
	b.peers.Add(1)
	return &peer{b: b, cred: opener}, nil
}

func (b *backend) ask(rq *api.Request, format string, args ...any) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, fmt.Sprintf(format, args...))
	b.rq = *rq
	if p, ok := rq.Peer.(*peer); !ok || p.closed.Load() {
		return errors.New("the peer is closed")
	}
	return b.ends
}

func (b *backend) last() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.asked) == 0 {
		return ""
	}
	return b.asked[len(b.asked)-1]
}

func (b *backend) set(refused, ends error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked, b.refused, b.ends = nil, refused, ends
}

func (b *backend) RealtimeRefused(*api.Request) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.refused
}

func (b *backend) MakeThreadRealtime(rq *api.Request, t api.Thread, priority uint32) error {
	if t.ID == 77 {
		panic("asked to")
	}
	if t.ID == 99 {
		<-b.block
	}
	return b.ask(rq, "realtime %v %d", t, priority)
}

func (b *backend) MakeThreadHighPriority(rq *api.Request, t api.Thread, nice int32) error {
	return b.ask(rq, "nice %v %d", t, nice)
}
func (b *backend) ResetKnown(rq *api.Request) error { return b.ask(rq, "ResetKnown") }
func (b *backend) ResetAll(rq *api.Request) error   { return b.ask(rq, "ResetAll") }
func (b *backend) Exit(rq *api.Request) error       { return b.ask(rq, "Exit") }
func (b *backend) RealtimeProperties(*api.Request) (api.RealtimeProperties, error) {
	return api.RealtimeProperties{RTTimeUSecMax: 200000, MaxRealtimePriority: 20, MinNiceLevel: -15}, nil
}

// serve serves b on the bus until the function is called that it returns, or the
// test ends.
func serve(t *testing.T, address string, b api.Backend) (stop func(), l *harness.Said) {
	t.Helper()
	l = &harness.Said{}
	logger := logrus.New()
	logger.SetOutput(io.MultiWriter(l, t.Output()))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- bus.Serve(ctx, bus.Config{Backend: b, Address: address, Log: logger}) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(cgtest.Patience(10 * time.Second)):
			t.Error("Serve does not end")
		}
	})
	t.Cleanup(stop)
	return stop, l
}

// connect is a client's connection to the bus.
func connect(t testing.TB, address string) *dbus.Conn {
	t.Helper()
	c, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func owner(c *dbus.Conn) string {
	var name string
	_ = c.BusObject().Call("org.freedesktop.DBus.GetNameOwner", 0, api.RealtimeInterface).Store(&name)
	return name
}

func awaitOwner(t *testing.T, c *dbus.Conn) string {
	t.Helper()
	var name string
	cgtest.Eventually(t, 10*time.Second, "somebody owns the name", func() bool {
		name = owner(c)
		return name != ""
	})
	return name
}

// failure is a call's error as NAME: TEXT, the usual prefix left out.
func failure(err error) string {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[dbus.Error](err); ok {
		return strings.TrimPrefix(e.Name, errPrefix) + ": " + e.Error()
	}
	return err.Error()
}

// served starts a bus on which b is served, and connects to it.
func served(t *testing.T, b api.Backend) (*harness.Bus, *dbus.Conn) {
	t.Helper()
	d := harness.StartBus(t, policy)
	serve(t, d.Address, b)
	c := connect(t, d.Address)
	awaitOwner(t, c)
	return d, c
}

// TestKernelCalls makes every call that there is, and some that are wrong.
func TestKernelCalls(t *testing.T) {
	harness.Require(t, "root")
	b := &backend{}
	_, c := served(t, b)
	obj := c.Object(api.RealtimeInterface, api.RealtimePath)

	const unknown = "UnknownMethod: Method %q with signature %q on interface %q doesn't exist"
	const props = "org.freedesktop.DBus.Properties."
	for _, tc := range []struct {
		call  string
		args  []any
		asked string // of the Backend
		err   string
	}{
		{"MakeThreadRealtime", []any{uint64(5), uint32(7)}, "realtime {0 true 5} 7", ""},
		{"MakeThreadRealtime", []any{uint64(1)<<32 + 5, uint32(7)}, "realtime {0 true 4294967301} 7", ""},
		{"MakeThreadRealtimeWithPID", []any{uint64(4), uint64(5), uint32(7)}, "realtime {4 false 5} 7", ""},
		{"MakeThreadHighPriority", []any{uint64(5), int32(-7)}, "nice {0 true 5} -7", ""},
		{"MakeThreadHighPriorityWithPID", []any{uint64(4), uint64(5), int32(-7)}, "nice {4 false 5} -7", ""},
		{"ResetKnown", nil, "ResetKnown", ""},
		{"ResetAll", nil, "ResetAll", ""},
		{"Exit", nil, "Exit", ""},
		// More arguments are left out, and none is looked at that is not needed.
		{"MakeThreadRealtime", []any{uint64(5), uint32(7), "more", uint64(8)}, "realtime {0 true 5} 7", ""},
		{"ResetKnown", []any{"more"}, "ResetKnown", ""},
		{"MakeThreadRealtime", []any{uint64(5)}, "", "InvalidArgs: Message has only 1 arguments, but more were expected"},
		{"MakeThreadRealtime", nil, "", "InvalidArgs: Argument 0 is specified to be of type \"uint64\", but is actually of type \"invalid\"\n"},
		{"MakeThreadRealtime", []any{uint32(5), uint32(7)}, "", "InvalidArgs: Argument 0 is specified to be of type \"uint64\", but is actually of type \"uint32\"\n"},
		{"MakeThreadHighPriority", []any{uint64(5), uint32(7)}, "", "InvalidArgs: Argument 1 is specified to be of type \"int32\", but is actually of type \"uint32\"\n"},
		{"MakeThreadRealtime", []any{map[string]string{"a": "b"}, uint32(7)}, "", "InvalidArgs: Argument 0 is specified to be of type \"uint64\", but is actually of type \"array\"\n"},
		{"MakeThreadRealtime", []any{uint64(77), uint32(7)}, "", "Failed: Input/output error"},
		{"MakeThreadRealtime", []any{uint64(5), uint32(7), strings.Repeat("x", 8<<10)}, "", "LimitsExceeded: the arguments are too long"},
		{"Nothing", []any{"x"}, "", fmt.Sprintf(unknown, "Nothing", "s", api.RealtimeInterface)},
		{props + "GetAll", []any{"no.such"}, "", "UnknownProperty: Unknown interface no.such"},
		{props + "Get", []any{api.RealtimeInterface, "Nothing"}, "", "UnknownProperty: Unknown property Nothing"},
		{props + "Get", []any{api.RealtimeInterface}, "", "InvalidArgs: Message has only 1 arguments, but more were expected"},
		{props + "Set", []any{api.RealtimeInterface, "MinNiceLevel", dbus.MakeVariant(int32(0))}, "", "AccessDenied: The MinNiceLevel property is read-only"},
		{"org.freedesktop.DBus.Peer.Ping", nil, "", ""},
		{api.Interface1 + ".ListControllers", nil, "", fmt.Sprintf(unknown, "ListControllers", "", api.Interface1)},
	} {
		name := tc.call
		if !strings.Contains(name, ".") {
			name = realtime + name
		}
		b.set(nil, nil)
		err := obj.Call(name, 0, tc.args...).Err
		if got := failure(err); got != tc.err || b.last() != tc.asked {
			t.Errorf("%s%v: %q, asked %q; want %q, %q", tc.call, tc.args, got, b.last(), tc.err, tc.asked)
		}
	}
	self := api.Cred{PID: int32(os.Getpid())}
	if b.rq.Opener != self || b.rq.Sender != self {
		t.Errorf("asked by %+v, %+v", b.rq.Opener, b.rq.Sender)
	}
	for _, k := range api.Kinds() {
		b.set(nil, api.Errorf(k, "the reason, which is for the log"))
		name, text := api.RealtimeError(k)
		want := strings.TrimPrefix(name, errPrefix) + ": " + text
		if got := failure(obj.Call(realtime+"MakeThreadRealtime", 0, uint64(5), uint32(7)).Err); got != want {
			t.Errorf("%v: %q, want %q", k, got, want)
		}
	}
	// Before the arguments are looked at.
	b.set(api.Errorf(api.Denied, "not now"), nil)
	if got := failure(obj.Call(realtime+"MakeThreadRealtime", 0).Err); got != "AccessDenied: Operation not permitted" {
		t.Errorf("refused for now: %q", got)
	}
	b.set(nil, nil)

	for name, want := range map[string]any{"RTTimeUSecMax": int64(200000), "MaxRealtimePriority": int32(20), "MinNiceLevel": int32(-15)} {
		v, err := obj.GetProperty(realtime + name)
		if err != nil || v.Value() != want {
			t.Errorf("%s: %v %v, want %T %v", name, v, err, want, want)
		}
	}
	var all map[string]dbus.Variant
	if err := obj.Call(props+"GetAll", 0, api.RealtimeInterface).Store(&all); err != nil || len(all) != 3 {
		t.Errorf("GetAll: %v, %v", all, err)
	}
	var xml, id, want string
	if err := obj.Call("org.freedesktop.DBus.Introspectable.Introspect", 0).Store(&xml); err != nil || !strings.Contains(xml, "MakeThreadHighPriorityWithPID") || strings.Contains(xml, api.Interface1) {
		t.Errorf("Introspect: %q, %v", xml, err)
	}
	root := c.Object(api.RealtimeInterface, "/")
	if err := root.Call("org.freedesktop.DBus.Introspectable.Introspect", 0).Store(&xml); err != nil || !strings.Contains(xml, `<node name="org"/>`) {
		t.Errorf("Introspect /: %q, %v", xml, err)
	}
	if got := failure(c.Object(api.RealtimeInterface, api.ObjectPath).Call(realtime+"ResetKnown", 0).Err); !strings.HasPrefix(got, "UnknownMethod: ") {
		t.Errorf("another object: %q", got)
	}
	if err := obj.Call("org.freedesktop.DBus.Peer.GetMachineId", 0).Store(&id); err != nil {
		t.Error(err)
	}
	if err := c.BusObject().Call("org.freedesktop.DBus.Peer.GetMachineId", 0).Store(&want); err != nil || id != want {
		t.Errorf("machine %q, %q, %v", id, want, err)
	}
	// Without an interface, and without wanting an answer.
	m := &dbus.Message{Type: dbus.TypeMethodCall, Body: []any{uint64(5), uint32(8)}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(api.RealtimeInterface),
		dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath(api.RealtimePath)),
		dbus.FieldMember:      dbus.MakeVariant("MakeThreadRealtime"),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(uint64(5), uint32(8))),
	}}
	if call := <-c.Send(m, make(chan *dbus.Call, 1)).Done; call.Err != nil || b.last() != "realtime {0 true 5} 8" {
		t.Errorf("without an interface: %v, %q", call.Err, b.last())
	}
	b.set(nil, nil)
	obj.Call(realtime+"MakeThreadHighPriority", dbus.FlagNoReplyExpected, uint64(5), int32(3))
	cgtest.Eventually(t, 5*time.Second, "a call that wants no answer is made", func() bool { return b.last() == "nice {0 true 5} 3" })
}

// as runs a command as a user, with the bus as the system's.
func as(t *testing.T, address string, uid uint32, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+address)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid + 1}}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestKernelWho: the Backend is told who asks, and the bus's policy lets root alone
// reset and end.
func TestKernelWho(t *testing.T) {
	harness.Require(t, "root", "dbus-send")
	b := &backend{}
	d, _ := served(t, b)
	send := func(member string, args ...string) (string, error) {
		return as(t, d.Address, user, "dbus-send", append([]string{
			"--system", "--print-reply", "--dest=" + api.RealtimeInterface, api.RealtimePath, realtime + member,
		}, args...)...)
	}
	if out, err := send("MakeThreadRealtime", "uint64:3", "uint32:4"); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	b.mu.Lock()
	cred := b.rq.Opener
	b.mu.Unlock()
	if cred.UID != user || cred.GID != user+1 || cred.PID <= 1 || int(cred.PID) == os.Getpid() {
		t.Errorf("asked by %+v", cred)
	}
	for _, member := range []string{"ResetKnown", "ResetAll", "Exit"} {
		b.set(nil, nil)
		if out, err := send(member); err == nil || !strings.Contains(out, "AccessDenied") || b.last() != "" {
			t.Errorf("%s by a user: %v, %q, asked %q", member, err, out, b.last())
		}
	}
	// Whoever is gone is let go of.
	cgtest.Eventually(t, 5*time.Second, "those who have gone are forgotten", func() bool { return b.peers.Load() == 0 })
	cs := make([]*dbus.Conn, 5)
	for i := range cs {
		cs[i] = connect(t, d.Address)
		if err := cs[i].Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"MakeThreadRealtime", 0, uint64(i), uint32(1)).Err; err != nil {
			t.Error(err)
		}
	}
	if n := b.peers.Load(); n != 5 {
		t.Errorf("%d callers are known, want 5", n)
	}
	for _, c := range cs {
		_ = c.Close()
	}
	cgtest.Eventually(t, 5*time.Second, "those who have gone are forgotten", func() bool { return b.peers.Load() == 0 })
}

// TestKernelManyCallers: so many are remembered, and who was forgotten is met again.
func TestKernelManyCallers(t *testing.T) {
	harness.Require(t, "root")
	b := &backend{}
	d, _ := served(t, b)
	const remembered = 128
	cs := make([]*dbus.Conn, remembered+10)
	for i := range cs {
		cs[i] = connect(t, d.Address)
	}
	for range 2 {
		for i, c := range cs {
			if err := c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"MakeThreadRealtime", 0, uint64(5), uint32(1)).Err; err != nil {
				t.Fatal(i, err)
			}
		}
		cgtest.Eventually(t, 5*time.Second, "the others are forgotten", func() bool { return b.peers.Load() == remembered })
	}
}

// TestKernelFlood: who asks without end is refused, and nobody else.
func TestKernelFlood(t *testing.T) {
	harness.Require(t, "root")
	b := &backend{}
	d, c := served(t, b)
	ask := func(c *dbus.Conn) string {
		return failure(c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"MakeThreadRealtime", 0, uint64(5), uint32(1)).Err)
	}
	refused, n := "", 0
	for end := time.Now().Add(cgtest.Patience(20 * time.Second)); refused == "" && time.Now().Before(end); n++ {
		refused = ask(c)
	}
	if refused != "AccessDenied: Device or resource busy" || n < 500 {
		t.Errorf("after %d requests: %q", n, refused)
	}
	if got := ask(connect(t, d.Address)); got != "" {
		t.Errorf("another: %q", got)
	}
}

// TestKernelBlocked: requests that take long hold up nobody else's, and are bounded.
func TestKernelBlocked(t *testing.T) {
	harness.Require(t, "root")
	b := &backend{block: make(chan struct{})}
	d, c := served(t, b)
	obj := c.Object(api.RealtimeInterface, api.RealtimePath)
	var calls []*dbus.Call
	for range 40 {
		calls = append(calls, obj.Go(realtime+"MakeThreadRealtime", 0, make(chan *dbus.Call, 1), uint64(99), uint32(1)))
	}
	refused := 0
	for _, call := range calls[32:] {
		select {
		case <-call.Done:
			if failure(call.Err) != "AccessDenied: Device or resource busy" {
				t.Errorf("one too many: %q", failure(call.Err))
			}
			refused++
		case <-time.After(cgtest.Patience(5 * time.Second)):
			t.Fatal("one too many is not answered")
		}
	}
	if refused != 8 {
		t.Errorf("%d were refused", refused)
	}
	// The same user by another connection: its bound is reached. Another is served.
	other := connect(t, d.Address).Object(api.RealtimeInterface, api.RealtimePath)
	cgtest.Eventually(t, 5*time.Second, "another connection of the user's is refused", func() bool {
		return failure(other.Call(realtime+"MakeThreadRealtime", 0, uint64(5), uint32(1)).Err) == "AccessDenied: Device or resource busy"
	})
	if out, err := as(t, d.Address, user, "dbus-send", "--system", "--print-reply", fmt.Sprint("--reply-timeout=", cgtest.Patience(10*time.Second).Milliseconds()), "--dest="+api.RealtimeInterface,
		api.RealtimePath, realtime+"MakeThreadRealtime", "uint64:3", "uint32:4"); err != nil {
		t.Errorf("another user: %v: %s", err, out)
	}
	close(b.block)
	for _, call := range calls[:32] {
		if <-call.Done; call.Err != nil {
			t.Error(call.Err)
		}
	}
	cgtest.Eventually(t, 5*time.Second, "it is served when they are done", func() bool {
		return other.Call(realtime+"MakeThreadRealtime", 0, uint64(5), uint32(1)).Err == nil
	})
}

// TestKernelBusComesAndGoes: the bus may come later, and end.
func TestKernelBusComesAndGoes(t *testing.T) {
	harness.Require(t, "root")
	d := harness.NewBus(t, policy)
	b := &backend{}
	stop, l := serve(t, d.Address, b)
	cgtest.Eventually(t, 5*time.Second, "it is said that there is no bus", func() bool { return strings.Contains(l.String(), "it is tried again") })
	for range 2 {
		d.Start()
		c := connect(t, d.Address)
		awaitOwner(t, c)
		if err := c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"MakeThreadRealtime", 0, uint64(1), uint32(1)).Err; err != nil {
			t.Error(err)
		}
		d.Stop()
		cgtest.Eventually(t, 5*time.Second, "all are forgotten", func() bool { return b.peers.Load() == 0 })
	}
	d.Start()
	c := connect(t, d.Address)
	awaitOwner(t, c)
	stop()
	cgtest.Eventually(t, 5*time.Second, "the name is nobody's", func() bool { return owner(c) == "" })
}

// TestKernelNameTaken: a name that another has is waited for.
func TestKernelNameTaken(t *testing.T) {
	harness.Require(t, "root")
	d := harness.StartBus(t, policy)
	other := connect(t, d.Address)
	if r, err := other.RequestName(api.RealtimeInterface, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}
	_, l := serve(t, d.Address, &backend{})
	cgtest.Eventually(t, 5*time.Second, "it is said that the name is another's", func() bool { return strings.Contains(l.String(), "owned by another process") })
	c := connect(t, d.Address)
	if owner(c) != other.Names()[0] {
		t.Errorf("the name is %s's", owner(c))
	}
	if _, err := other.ReleaseName(api.RealtimeInterface); err != nil {
		t.Fatal(err)
	}
	awaitOwner(t, c)
}

// TestKernelExit: whoever ends the service is answered first, and then nobody has the
// name.
func TestKernelExit(t *testing.T) {
	harness.Require(t, "root")
	d := harness.StartBus(t, policy)
	b := &exiting{backend: &backend{}}
	stop, _ := serve(t, d.Address, b)
	c := connect(t, d.Address)
	b.stop, b.c = stop, c
	awaitOwner(t, c)
	if err := c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"Exit", 0).Err; err != nil {
		t.Errorf("Exit: %v", err)
	}
	cgtest.Eventually(t, 5*time.Second, "the name is given up", func() bool { return owner(c) == "" })
}

// TestKernelExitMeanwhile: the same while the bus is asked who owns the name, as
// it is at each change of its owner, and does not answer.
func TestKernelExitMeanwhile(t *testing.T) {
	harness.Require(t, "root")
	d := harness.StartBus(t, policy)
	address, asked := withhold(t, strings.TrimPrefix(d.Address, "unix:path="), "RequestName", 2)
	b := &exiting{backend: &backend{}}
	stop, _ := serve(t, address, b)
	b.stop, b.c = stop, connect(t, d.Address)
	select {
	case <-asked:
	case <-time.After(cgtest.Patience(10 * time.Second)):
		t.Fatal("the bus is not asked again")
	}
	if err := b.c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"Exit", 0).Err; err != nil {
		t.Errorf("Exit: %v", err)
	}
	cgtest.Eventually(t, 5*time.Second, "the name is given up", func() bool { return owner(b.c) == "" })
}

// withhold is a way to the bus for one connection, on which the nth call of a
// method is lost; asked tells of it.
func withhold(t *testing.T, to, method string, nth int) (address string, asked <-chan struct{}) {
	t.Helper()
	from, lost := t.TempDir()+"/bus", make(chan struct{})
	ln, err := net.Listen("unix", from)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { _ = ln.Close(); <-done })
	go func() {
		defer close(done)
		client, err := ln.Accept()
		if err != nil {
			return
		}
		defer client.Close()
		bus, err := net.Dial("unix", to)
		if err != nil {
			t.Error(err)
			return
		}
		defer bus.Close()
		back := make(chan struct{})
		defer func() { <-back }()
		go func() {
			defer close(back)
			_, _ = io.Copy(client, bus)
			_ = client.Close()
		}()
		// Whoever waits for an answer to a message has written it by itself.
		for b := make([]byte, 4096); ; {
			n, err := client.Read(b)
			if strings.Contains(string(b[:n]), method) {
				if nth--; nth == 0 {
					n = 0
					close(lost)
				}
			}
			if _, werr := bus.Write(b[:n]); err != nil || werr != nil {
				_ = bus.Close()
				return
			}
		}
	}()
	return "unix:path=" + from, lost
}

// exiting is a Backend that has the service end when it is asked to.
type exiting struct {
	*backend
	c    *dbus.Conn
	stop func()
}

func (e *exiting) Exit(*api.Request) error {
	start := time.Now()
	go e.stop()
	time.Sleep(100 * time.Millisecond)
	// It is not waited for the answer for longer than that.
	if owner(e.c) == "" && time.Since(start) < 300*time.Millisecond {
		return errors.New("the name is given up before the answer")
	}
	return nil
}

// TestKernelElsewhere: a bus whose numbers are another namespace's is not believed.
func TestKernelElsewhere(t *testing.T) {
	harness.Require(t, "root", "userns", "unshare", "dbus-daemon")
	for name, flags := range map[string][]string{
		"pid":  {"-p", "-f", "--kill-child", "--mount-proc"},
		"user": {"-U", "-r"},
	} {
		t.Run(name, func(t *testing.T) {
			d := harness.NewBus(t, policy)
			d.Within = append([]string{"unshare"}, flags...)
			d.Start()
			_, l := serve(t, d.Address, &backend{})
			cgtest.Eventually(t, 10*time.Second, "it is said that the bus is another container's", func() bool {
				return strings.Contains(l.String(), "the bus is of another container")
			})
			if c := connect(t, d.Address); slices.Contains(c.Names(), api.RealtimeInterface) || owner(c) != "" {
				t.Error("the name is owned")
			}
		})
	}
}

// TestKernelHostile: what others send that no request is like changes nothing.
func TestKernelHostile(t *testing.T) {
	harness.Require(t, "root")
	b := &backend{}
	d, c := served(t, b)
	name := owner(c)
	ask := func(c *dbus.Conn) {
		t.Helper()
		if err := c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"MakeThreadRealtime", 0, uint64(6), uint32(1)).Err; err != nil {
			t.Error(err)
		}
	}
	ask(c)
	send := func(m *dbus.Message) {
		t.Helper()
		m.Headers[dbus.FieldDestination] = dbus.MakeVariant(name)
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(m.Body...))
		if call := c.Send(m, nil); call.Err != nil {
			t.Error(call.Err)
		}
	}
	path := func(p string) dbus.Variant { return dbus.MakeVariant(dbus.ObjectPath(p)) }
	str := func(s string) dbus.Variant { return dbus.MakeVariant(s) }
	// Far longer than anything that is read.
	send(&dbus.Message{Type: dbus.TypeMethodCall, Flags: dbus.FlagNoReplyExpected, Body: []any{make([]byte, 2<<20)}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath: path(api.RealtimePath), dbus.FieldInterface: str(api.RealtimeInterface), dbus.FieldMember: str("MakeThreadRealtime"),
	}})
	// A signal that looks like the bus's own: the caller is not gone.
	send(&dbus.Message{Type: dbus.TypeSignal, Body: []any{c.Names()[0], c.Names()[0], ""}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath: path("/org/freedesktop/DBus"), dbus.FieldInterface: str("org.freedesktop.DBus"), dbus.FieldMember: str("NameOwnerChanged"),
	}})
	ask(connect(t, d.Address))
	if n := b.peers.Load(); n != 2 {
		t.Errorf("%d callers are known, want 2", n)
	}
	ask(c)
	if owner(c) != name {
		t.Error("the connection was lost")
	}
}

// become makes a call over a bus, to which it has connected before it became another
// user, or, with FD, to which another process connected.
type become struct {
	Address string
	UID     int
	FD      int
}

var becomes = harness.Inside("call over a bus as another", func(b become) (string, error) {
	var nc net.Conn
	var err error
	if b.FD > 0 {
		f := os.NewFile(uintptr(b.FD), "bus")
		nc, err = net.FileConn(f)
	} else {
		nc, err = net.Dial("unix", strings.TrimPrefix(b.Address, "unix:path="))
	}
	if err != nil {
		return "", err
	}
	c, err := dbus.NewConn(nc)
	if err != nil {
		return "", err
	}
	defer c.Close()
	id := b.UID
	if b.FD == 0 {
		id = os.Getuid()
	}
	if err := c.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(id))}); err != nil {
		return "", err
	}
	if err := c.Hello(); err != nil {
		return "", err
	}
	if b.FD == 0 {
		if err := syscall.Setresuid(b.UID, b.UID, b.UID); err != nil {
			return "", err
		}
	}
	return failure(c.Object(api.RealtimeInterface, api.RealtimePath).Call(realtime+"ResetKnown", 0).Err), nil
})

// TestKernelNotWhoConnected: the process that connected is asked for, as it is now. One
// that has ended since, or is another user's, is not believed to be who asks.
func TestKernelNotWhoConnected(t *testing.T) {
	harness.Require(t, "root")
	d := harness.StartBus(t) // the policy of a real one would do, for root
	b := &backend{}
	serve(t, d.Address, b)
	awaitOwner(t, connect(t, d.Address))
	const refused = "Failed: Input/output error"
	p := harness.Start(t, harness.Spec{})
	var got string
	if err := p.Run(becomes, become{Address: d.Address, UID: 0}, &got); err != nil || got != "" {
		t.Errorf("who stays the same: %q, %v", got, err)
	}
	if err := p.Run(becomes, become{Address: d.Address, UID: user}, &got); err != nil || got != refused {
		t.Errorf("who became another user: %q, %v; want %q", got, err, refused)
	}
	p, heir := harness.Start(t, harness.Spec{}), harness.Start(t, harness.Spec{})
	fd := p.Socket(unix.SOCK_STREAM)
	if err := p.Connect(fd, strings.TrimPrefix(d.Address, "unix:path=")); err != nil {
		t.Fatal(err)
	}
	fd = p.Give(fd, heir)
	p.Stop()
	if err := heir.Run(becomes, become{UID: 0, FD: fd}, &got); err != nil || got != refused {
		t.Errorf("by the connection of a process that ended: %q, %v; want %q", got, err, refused)
	}
}
