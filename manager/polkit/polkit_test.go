package polkit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// within is a context that ends in time.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// long is longer than any answer takes on a busy machine.
var long = cgtest.Patience(20 * time.Second)

// timeUp is a context whose time is up when the test says so.
type timeUp struct {
	context.Context
	up chan struct{}
}

func (c timeUp) Done() <-chan struct{} { return c.up }

func (c timeUp) Err() error {
	select {
	case <-c.up:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

func authority(t *testing.T, address string) *Authority {
	a := New(address)
	t.Cleanup(a.Close)
	return a
}

// result is what polkit answers.
type result struct {
	Authorized, Challenge bool
	Details               map[string]string
}

// stub is an authority that answers as the action says.
type stub struct {
	conn *dbus.Conn

	mu       sync.Mutex
	subjects []string      // guarded by mu
	open     []string      // ids of questions that are slow; guarded by mu
	canceled []string      // guarded by mu
	slow     chan struct{} // closed: slow ones are answered
}

func (s *stub) CheckAuthorization(subject struct {
	Kind    string
	Details map[string]dbus.Variant
}, action string, details map[string]string, flags uint32, id string,
) (result, *dbus.Error) {
	s.mu.Lock()
	s.subjects = append(s.subjects, fmt.Sprint(subject.Kind, " ", subject.Details, " ", details, " ", flags))
	if action == "slow" {
		s.open = append(s.open, id)
	}
	s.mu.Unlock()
	switch action {
	case "yes":
		return result{Authorized: true}, nil
	case "no":
		return result{}, nil
	case "ask":
		return result{Challenge: true}, nil
	case "slow":
		<-s.slow
		return result{Authorized: true}, nil
	case "gone":
		s.conn.Close()
	}
	return result{Authorized: true}, dbus.NewError("org.freedesktop.PolicyKit1.Error.Failed", []any{"Action " + action + " is not registered"})
}

func (s *stub) CancelCheckAuthorization(id string) *dbus.Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.canceled = append(s.canceled, id)
	return nil
}

// serve makes conn the authority.
func serve(t *testing.T, conn *dbus.Conn, methods any) {
	t.Helper()
	var err error
	if table, ok := methods.(map[string]any); ok {
		err = conn.ExportMethodTable(table, path, iface)
	} else {
		err = conn.Export(methods, path, iface)
	}
	if err != nil {
		t.Fatal(err)
	}
	if r, err := conn.RequestName(name, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner && r != dbus.RequestNameReplyAlreadyOwner {
		t.Fatal(r, err)
	}
}

func startStub(t *testing.T, bus *harness.Bus) *stub {
	t.Helper()
	s := &stub{conn: bus.Connect(), slow: make(chan struct{})}
	serve(t, s.conn, s)
	return s
}

// asked has a ask a question that is slow, and waits until it is there. What becomes
// of it is sent.
func (s *stub) asked(t *testing.T, a *Authority) <-chan error {
	t.Helper()
	ended := make(chan error)
	go func() {
		_, err := a.Check(within(t, long), "slow", somebody)
		ended <- err
	}()
	for asked := false; !asked; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		asked = len(s.open) > 0
		s.mu.Unlock()
	}
	return ended
}

var somebody = Subject{PID: 12345, Started: 1 << 40, UID: 1000}

func TestAnswers(t *testing.T) {
	bus := harness.StartBus(t)
	s := startStub(t, bus)
	a := authority(t, bus.Address)
	for _, tc := range []struct {
		action string
		yes    bool
		err    string
	}{
		{"yes", true, ""},
		{"no", false, ""},
		{"ask", false, ""},
		{"unknown", false, "org.freedesktop.PolicyKit1.Error.Failed: Action unknown is not registered"},
		{"yes", true, ""},
	} {
		yes, err := a.Check(within(t, long), tc.action, somebody)
		if yes != tc.yes || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) || errors.Is(err, ErrAbsent) {
			t.Errorf("%s: got %v, %v, want %v, %q", tc.action, yes, err, tc.yes, tc.err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	want := "unix-process map[pid:@u 12345 start-time:@t 1099511627776 uid:1000] map[] 0"
	if got := s.subjects[0]; got != want {
		t.Errorf("asked about %s\nwant %s", got, want)
	}
	if len(s.canceled) != 0 {
		t.Errorf("canceled %v", s.canceled)
	}
}

// TestSlow: who waits for an answer holds up nobody, and who has waited long enough
// takes the question back.
func TestSlow(t *testing.T) {
	bus := harness.StartBus(t)
	s := startStub(t, bus)
	a := authority(t, bus.Address)
	var waiting sync.WaitGroup
	for range 50 {
		waiting.Go(func() {
			if yes, err := a.Check(within(t, long), "slow", somebody); !yes || err != nil {
				t.Errorf("at last: %v, %v", yes, err)
			}
		})
	}
	tired, late := timeUp{t.Context(), make(chan struct{})}, make(chan struct{})
	go func() {
		defer close(late)
		if yes, err := a.Check(tired, "slow", somebody); yes || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrAbsent) {
			t.Errorf("too slow: %v, %v", yes, err)
		}
	}()
	cgtest.Eventually(t, 20*time.Second, "all are asked", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.open) == 51
	})
	select {
	case <-late:
		t.Error("it was not waited for the answer")
	default:
	}
	close(tired.up)
	select {
	case <-late:
	case <-time.After(cgtest.Patience(10 * time.Second)):
		t.Error("it is waited for the answer although the time is up")
	}
	for range 100 {
		if yes, err := a.Check(within(t, long), "yes", somebody); !yes || err != nil {
			t.Fatalf("beside slow ones: %v, %v", yes, err)
		}
	}
	deadline := time.Now().Add(long)
	canceled := func() []string {
		s.mu.Lock()
		defer s.mu.Unlock()
		return slices.Clone(s.canceled)
	}
	for len(canceled()) == 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	s.mu.Lock()
	if len(s.canceled) != 1 || !slices.Contains(s.open, s.canceled[0]) || len(slices.Compact(slices.Sorted(slices.Values(s.open)))) != 51 {
		t.Errorf("canceled %v of %v", s.canceled, s.open)
	}
	s.mu.Unlock()
	close(s.slow)
	waiting.Wait()
}

// TestGone: polkit ends while it is asked; then there is none; then another.
func TestGone(t *testing.T) {
	bus := harness.StartBus(t)
	startStub(t, bus)
	a := authority(t, bus.Address)
	if yes, err := a.Check(within(t, long), "gone", somebody); yes || err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("as it ends: %v, %v", yes, err)
	}
	if yes, err := a.Check(within(t, long), "yes", somebody); yes || !errors.Is(err, ErrAbsent) {
		t.Errorf("when it has ended: %v, %v", yes, err)
	}
	startStub(t, bus)
	if yes, err := a.Check(within(t, long), "yes", somebody); !yes || err != nil {
		t.Errorf("when there is another: %v, %v", yes, err)
	}
}

// TestBusGone: the bus ends while polkit is asked; then there is none; then another.
func TestBusGone(t *testing.T) {
	bus := harness.NewBus(t)
	a := authority(t, bus.Address)
	absent := func(when string) {
		t.Helper()
		if yes, err := a.Check(within(t, long), "yes", somebody); yes || !errors.Is(err, ErrAbsent) {
			t.Errorf("%s: %v, %v", when, yes, err)
		}
	}
	absent("before the bus is there")
	bus.Start()
	absent("without polkit")
	s := startStub(t, bus)
	if yes, err := a.Check(within(t, long), "yes", somebody); !yes || err != nil {
		t.Errorf("with polkit: %v, %v", yes, err)
	}
	ended := s.asked(t, a)
	bus.Stop()
	if err := <-ended; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("as the bus ends: %v", err)
	}
	close(s.slow)
	absent("when the bus has ended")
	bus.Start()
	startStub(t, bus)
	if yes, err := a.Check(within(t, long), "yes", somebody); !yes || err != nil {
		t.Errorf("on another bus: %v, %v", yes, err)
	}
}

// TestBusHangs: time is up, whatever the bus does, and when it goes on so do we.
func TestBusHangs(t *testing.T) {
	bus := harness.StartBus(t)
	startStub(t, bus)
	a := authority(t, bus.Address)
	bus.Signal(unix.SIGSTOP)
	var waiting sync.WaitGroup
	late := func() {
		start := time.Now()
		yes, err := a.Check(within(t, 200*time.Millisecond), "yes", somebody)
		if d := time.Since(start); yes || !errors.Is(err, context.DeadlineExceeded) || d > cgtest.Patience(10*time.Second) {
			t.Errorf("after %v: %v, %v", d, yes, err)
		}
	}
	late() // as it logs in
	bus.Signal(unix.SIGCONT)
	if yes, err := a.Check(within(t, long), "yes", somebody); !yes || err != nil {
		t.Errorf("when it goes on: %v, %v", yes, err)
	}
	bus.Signal(unix.SIGSTOP)
	// Enough to fill what the kernel keeps for the bus.
	for range 10 {
		for range 200 {
			waiting.Go(late)
		}
		waiting.Wait()
	}
	if n := len(a.pending); n > maxPending {
		t.Errorf("%d questions are open", n)
	}
	bus.Signal(unix.SIGCONT)
	// It refuses questions while it has so many.
	var yes bool
	var err error
	for deadline := time.Now().Add(long); !yes && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		yes, err = a.Check(within(t, long), "yes", somebody)
	}
	if !yes {
		t.Errorf("when it goes on again: %v", err)
	}
}

// TestMalformed: what is not an answer is none.
func TestMalformed(t *testing.T) {
	bus := harness.StartBus(t)
	conn := bus.Connect()
	a := authority(t, bus.Address)
	type subject struct {
		Kind    string
		Details map[string]dbus.Variant
	}
	for name, method := range map[string]any{
		"nothing": func(subject, string, map[string]string, uint32, string) *dbus.Error { return nil },
		"bool":    func(subject, string, map[string]string, uint32, string) (bool, *dbus.Error) { return true, nil },
		"variant": func(subject, string, map[string]string, uint32, string) (dbus.Variant, *dbus.Error) {
			return dbus.MakeVariant(result{Authorized: true}), nil
		},
		"numbers": func(subject, string, map[string]string, uint32, string) (struct {
			A, B uint32
			C    map[string]string
		}, *dbus.Error,
		) {
			return struct {
				A, B uint32
				C    map[string]string
			}{1, 1, nil}, nil
		},
		"short": func(subject, string, map[string]string, uint32, string) (struct{ A bool }, *dbus.Error) {
			return struct{ A bool }{true}, nil
		},
		"long": func(subject, string, map[string]string, uint32, string) (struct {
			A, B bool
			C    map[string]string
			D    uint32
		}, *dbus.Error,
		) {
			return struct {
				A, B bool
				C    map[string]string
				D    uint32
			}{A: true}, nil
		},
		"two": func(subject, string, map[string]string, uint32, string) (result, bool, *dbus.Error) {
			return result{Authorized: true}, true, nil
		},
		"other details": func(subject, string, map[string]string, uint32, string) (struct {
			A, B bool
			C    map[string]uint32
		}, *dbus.Error,
		) {
			return struct {
				A, B bool
				C    map[string]uint32
			}{A: true, C: map[string]uint32{"a": 1}}, nil
		},
	} {
		serve(t, conn, map[string]any{"CheckAuthorization": method})
		if yes, err := a.Check(within(t, long), "yes", somebody); yes || err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, %v", name, yes, err)
		}
	}
}

// TestActivation: polkit that is not there and cannot be started is not absent.
func TestActivation(t *testing.T) {
	bus := harness.NewBus(t)
	file := "[D-BUS Service]\nName=" + name + "\nExec=/bin/false\n"
	if err := os.WriteFile(filepath.Join(bus.Dir, "services", name+".service"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	bus.Start()
	if yes, err := authority(t, bus.Address).Check(within(t, long), "yes", somebody); yes || err == nil || errors.Is(err, ErrAbsent) {
		t.Errorf("got %v, %v", yes, err)
	}
}

func TestAddress(t *testing.T) {
	for _, address := range []string{"", "unix:path=/nonexistent/bus", "unix:abstract=cgmtest-nobody"} {
		t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/system_bus")
		if yes, err := authority(t, address).Check(within(t, long), "yes", somebody); yes || !errors.Is(err, ErrAbsent) {
			t.Errorf("%q: %v, %v", address, yes, err)
		}
	}
	if yes, err := authority(t, "nonsense").Check(within(t, long), "yes", somebody); yes || err == nil || errors.Is(err, ErrAbsent) {
		t.Errorf("nonsense: %v, %v", yes, err)
	}
}

func TestClose(t *testing.T) {
	bus := harness.StartBus(t)
	s := startStub(t, bus)
	a := authority(t, bus.Address)
	ended := s.asked(t, a)
	a.Close()
	if err := <-ended; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the open question ends with %v", err)
	}
	close(s.slow)
	if yes, err := a.Check(within(t, long), "yes", somebody); yes || err == nil {
		t.Errorf("afterwards: %v, %v", yes, err)
	}
}

const rules = `
polkit.addRule(function(action, subject) {
	if (action.id != "org.cgmanager.test")
		return polkit.Result.NOT_HANDLED;
	polkit.log("asked: " + subject.user + " pid " + subject.pid);
	if (subject.user == "daemon" || subject.isInGroup("sys") || subject.user == "101000" || subject.user == "-1193967296")
		return polkit.Result.YES;
	if (subject.user == "games")
		return polkit.Result.AUTH_ADMIN;
	return polkit.Result.NO;
});
`

const actions = `<?xml version="1.0"?>
<!DOCTYPE policyconfig PUBLIC "-//freedesktop//DTD PolicyKit Policy Configuration 1.0//EN" "http://www.freedesktop.org/standards/PolicyKit/1/policyconfig.dtd">
<policyconfig>
  <action id="org.cgmanager.test">
    <description>a test</description>
    <message>a test</message>
    <defaults><allow_any>no</allow_any><allow_inactive>yes</allow_inactive><allow_active>yes</allow_active></defaults>
  </action>
  <action id="org.cgmanager.test.session">
    <description>a test</description>
    <message>a test</message>
    <defaults><allow_any>no</allow_any><allow_inactive>yes</allow_inactive><allow_active>yes</allow_active></defaults>
  </action>
</policyconfig>
`

// TestKernelPolkit asks Debian's polkitd.
func TestKernelPolkit(t *testing.T) {
	bus := harness.StartBus(t)
	polkit := bus.StartPolkit(rules, actions)
	a := authority(t, bus.Address)
	const action = "org.cgmanager.test"
	p := harness.Start(t, harness.Spec{})
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.HostPID))
	if err != nil {
		t.Fatal(err)
	}
	started, err := strconv.ParseUint(strings.Fields(string(b[bytes.LastIndexByte(b, ')'):]))[20], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	subject := func(uid uint32) Subject { return Subject{PID: uint32(p.HostPID), Started: started, UID: uid} }
	another := subject(1)
	another.Started--
	for _, tc := range []struct {
		name, action string
		who          Subject
		yes          bool
		err          string
	}{
		{"a user whom a rule allows", action, subject(1), true, ""},
		{"a user whom a rule refuses", action, subject(2), false, ""},
		{"a user who would have to log in", action, subject(5), false, ""},
		{"a user without a session", action + ".session", subject(1), false, ""},
		{"a container's number", action, subject(101000), true, ""},
		{"another container's number", action, subject(101001), false, ""},
		// Which is how polkit calls it.
		{"a number above 2^31", action, subject(1<<32 - 1193967296), true, ""},
		{"a process of that number that has ended", action, another, false, "replaced"},
		{"no such action", "org.cgmanager.other", subject(1), false, "not registered"},
	} {
		yes, err := a.Check(within(t, long), tc.action, tc.who)
		if yes != tc.yes || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: got %v, %v, want %v, %q", tc.name, yes, err, tc.yes, tc.err)
		}
	}
	polkit.Stop()
	cgtest.Eventually(t, 5*time.Second, "the bus knows that polkit has ended", func() bool { return !bus.Owned(name) })
	if yes, err := a.Check(within(t, long), action, subject(1)); yes || !errors.Is(err, ErrAbsent) {
		t.Errorf("when polkit has ended: %v, %v", yes, err)
	}
}
