package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// polkitRules are polkit's: it calls users that the host does not have by their number.
const polkitRules = `
polkit.addRule(function(action, subject) {
	if (subject.user == "2000" && action.id == "org.freedesktop.RealtimeKit1.acquire-real-time" ||
	    subject.user == "2001" && action.id == "org.freedesktop.RealtimeKit1.acquire-high-priority" ||
	    subject.user == "100000")
		return polkit.Result.YES;
});
`

// TestKernelRealtimePolkit: Debian's polkitd is asked, with the actions that are
// installed, where no rule of ours decides; and nobody waits for it but who needs it.
func TestKernelRealtimePolkit(t *testing.T) {
	harness.Require(t, "root", "userns", harness.Polkitd)
	bus := harness.StartBus(t)
	actions, err := os.ReadFile("../../packaging/polkit-1/actions/org.freedesktop.RealtimeKit1.policy")
	if err != nil {
		t.Fatal(err)
	}
	polkit := bus.StartPolkit(polkitRules, string(actions))
	rules := filepath.Join(harness.PublicDir(t), "realtime.toml")
	if err := os.WriteFile(rules, []byte("[[rule]]\nuid = [1000, 3000]\nmax_priority = 30\n[[rule]]\nuid = 2002\nallow = false\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.Address)
	d := harness.StartDaemon(t, "--realtime-policy", rules)
	w := &realtimeWorld{T: t, sock: d.Sock, rttime: 200000}

	try := func(what string, p *harness.Proc, method string, level any, want harness.DBusError, is string) {
		t.Helper()
		c := p.MustDial(w.sock)
		defer c.Close()
		values, err := c.RT(method, uint64(0), level)
		w.answers(what, want, values, err)
		w.is(p, uint64(p.PID), is)
	}
	const realtime, nice = "MakeThreadRealtime", "MakeThreadHighPriority"
	try("polkit allows realtime", w.user(2000), realtime, uint32(20), rtGranted, "rr 20 reset")
	try("polkit allows the daemon's bounds", w.user(2000), realtime, uint32(21), rtDenied, "other 0")
	try("polkit allows realtime alone", w.user(2000), nice, int32(-5), rtDenied, "other 0")
	try("polkit allows high priority", w.user(2001), nice, int32(-5), rtGranted, "other -5 reset")
	try("polkit allows high priority alone", w.user(2001), realtime, uint32(20), rtDenied, "other 0")
	try("polkit says nothing, and there is no session", w.user(2003), realtime, uint32(20), rtDenied, "other 0")
	try("a rule allows", w.user(1000), realtime, uint32(30), rtGranted, "rr 30 reset")
	try("a rule refuses", w.user(2002), nice, int32(-5), rtDenied, "other 0")
	inside := harness.Start(t, harness.Spec{UserNS: true, PIDNS: true, MapFrom: 100000, MapSize: 65536})
	w.limit(inside, 200000)
	try("polkit allows a container's root", inside, realtime, uint32(20), rtGranted, "rr 20 reset")

	// polkit hangs.
	type client struct {
		p *harness.Proc
		c *harness.Conn
	}
	var others []client
	for range 5 {
		p := w.user(3000)
		others = append(others, client{p, p.MustDial(w.sock)})
	}
	late := w.user(2000)
	c := late.MustDial(w.sock)
	defer c.Close()
	polkit.Signal(unix.SIGSTOP)
	waited := make(chan struct{})
	start := time.Now()
	go func() {
		defer close(waited)
		values, err := c.RT(realtime, uint64(0), uint32(20))
		w.answers("polkit hangs", rtDenied, values, err)
		if d := time.Since(start); d < 4*time.Second || d > cgtest.Patience(30*time.Second) {
			t.Errorf("polkit was waited for for %v", d)
		}
	}()
	time.Sleep(200 * time.Millisecond) // polkit is asked
	for _, o := range others {
		values, err := o.c.RT(realtime, uint64(0), uint32(30))
		w.answers("a rule allows, polkit or not", rtGranted, values, err)
	}
	select {
	case <-waited:
		t.Error("who needs no polkit waited as long as who does")
	default:
	}
	for _, o := range others {
		w.is(o.p, uint64(o.p.PID), "rr 30 reset")
		o.c.Close()
	}
	<-waited
	w.is(late, uint64(late.PID), "other 0")
	polkit.Signal(unix.SIGCONT)
	// What was asked meanwhile was taken back: it grants nothing afterwards.
	try("polkit goes on", w.user(2000), realtime, uint32(20), rtGranted, "rr 20 reset")
	w.is(late, uint64(late.PID), "other 0")

	polkit.Stop()
	eventually(t, "the bus knows that polkit has ended", func() bool { return !bus.Owned("org.freedesktop.PolicyKit1") })
	try("polkit has ended", w.user(2000), realtime, uint32(20), rtDenied, "other 0")
	bus.Stop()
	try("the bus has ended", w.user(2000), realtime, uint32(20), rtDenied, "other 0")
	if log := d.Log(); strings.Count(log, "polkit does not run here") != 2 {
		t.Errorf("the log does not tell why:\n%s", log)
	}
}
