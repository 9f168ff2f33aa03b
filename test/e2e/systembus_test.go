package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// What the bus reads, of the package.
const (
	busPolicy  = "testdata/dbus-1/system.d/org.freedesktop.RealtimeKit1.conf"
	busService = "testdata/dbus-1/system-services/org.freedesktop.RealtimeKit1.service"
)

// busVariable is where clients look for the system's bus.
const busVariable = "DBUS_SYSTEM_BUS_ADDRESS"

// Users of every Debian system, those of a container too: dbus-daemon lets nobody log in
// whom the system does not know.
const (
	busUser   = 1     // daemon
	busNobody = 65534 // nobody
)

// rtkitTest is rtkit's own client, of Debian's package rtkit.
const rtkitTest = "/usr/libexec/installed-tests/rtkit/rtkit-test"

// busCall is a call of RealtimeKit1 over a bus.
type busCall struct {
	Address, Member string
	Args            []uint64 // a t each, but for the last one, which is an i or a u
}

// byBus makes a call inside a puppet, and returns how it failed.
var byBus = harness.Inside("call over a bus", asked)

func asked(c busCall) (string, error) {
	conn, err := dbus.Connect(c.Address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	var args []any
	for i, a := range c.Args {
		switch {
		case i < len(c.Args)-1:
			args = append(args, a)
		case strings.Contains(c.Member, "Nice"), strings.Contains(c.Member, "High"):
			args = append(args, int32(a))
		default:
			args = append(args, uint32(a))
		}
	}
	err = conn.Object(api.RealtimeInterface, api.RealtimePath).Call(api.RealtimeInterface+"."+c.Member, 0, args...).Err
	if e, ok := errors.AsType[dbus.Error](err); ok {
		return e.Name + ": " + e.Error(), nil
	}
	return "", err
}

// chrt says what chrt(1) says of a thread.
func chrt(t testing.TB, tid int) string {
	t.Helper()
	out, err := exec.Command("chrt", "-p", strconv.Itoa(tid)).CombinedOutput()
	if err != nil {
		t.Errorf("chrt -p %d: %v, %s", tid, err, out)
	}
	return string(out)
}

// isRR waits until chrt says that a thread is.
func isRR(t testing.TB, tid, priority int) {
	t.Helper()
	var out string
	for end := time.Now().Add(cgtest.Patience(10 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		out = chrt(t, tid)
		if strings.Contains(out, "SCHED_RR|SCHED_RESET_ON_FORK\n") && strings.Contains(out, fmt.Sprintf("priority: %d\n", priority)) {
			return
		}
		if time.Now().After(end) {
			t.Errorf("thread %d: %s", tid, out)
			return
		}
	}
}

// realClients has programs of others ask for realtime, as the user busUser of p's
// namespaces, for whom that is the system's bus which p has in its environment. By p's
// cgroup they may have it.
func realClients(t *testing.T, p *harness.Proc, first uint32) {
	t.Helper()
	if harness.Emulated() {
		return // they are not there
	}
	user := &harness.Cred{UID: busUser, GID: busUser}
	t.Run("rtkit-test", func(t *testing.T) {
		harness.Require(t, rtkitTest)
		// It ends at once, but for the last of what it says, for which there is
		// no room in the pipe.
		c := p.Launch(user, "/bin/sh", "-c", "PATH=/bin:/usr/bin; yes | head -c 65536; exec "+rtkitTest)
		defer func() {
			if _, err := c.End(5 * time.Second); err != nil {
				t.Error(err)
			}
		}()
		pid := hostChild(t, p, c.PID)
		isRR(t, pid, 10)
		said, err := c.Said(cgtest.Patience(5 * time.Second))
		said = strings.ReplaceAll(said, "y\n", "")
		if err != nil || !strings.Contains(said, "Successfully became high priority.") || !strings.Contains(said, "Successfully became realtime.") {
			t.Errorf("%v, it says %s", err, said)
		}
	})
	t.Run("PulseAudio", func(t *testing.T) {
		harness.Require(t, "pulseaudio")
		home := harness.PublicDir(t)
		if err := os.Chown(home, int(first+busUser), int(first+busUser)); err != nil {
			t.Fatal(err)
		}
		c := p.Launch(user, "/usr/bin/env", "PATH=/usr/bin:/bin", "HOME="+home, "XDG_RUNTIME_DIR="+home, "pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no",
			"--realtime=yes", "--high-priority=yes", "--exit-idle-time=-1", "--disable-shm", "-L", "module-null-sink")
		defer func() {
			_ = c.Kill()
			if _, err := c.End(5 * time.Second); err != nil {
				t.Error(err)
			}
		}()
		pid := hostChild(t, p, c.PID)
		sink := 0
		eventually(t, "its thread null-sink", func() bool {
			all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", pid))
			for _, name := range all {
				if b, _ := os.ReadFile(name); string(b) == "null-sink\n" {
					sink, _ = strconv.Atoi(filepath.Base(filepath.Dir(name)))
				}
			}
			return sink != 0
		})
		isRR(t, sink, 5)
		if got, err := scheduled(pid); got != "other -11 reset" {
			t.Errorf("its first thread is %q, %v", got, err)
		}
	})
}

// TestKernelSystemBus: clients of rtkit's find the daemon on the system's bus.
func TestKernelSystemBus(t *testing.T) {
	harness.Require(t, "root", "dbus-daemon", "chrt")
	bus := harness.StartBus(t, busPolicy)
	t.Setenv(busVariable, bus.Address)
	w := newRealtimeWorld(t, "--system-bus")
	w.d.terminate()
	w.policy(fmt.Sprintf("[[rule]]\nuid = [%d]\n", busUser))
	w.d = w.start()
	owned := func() bool { return bus.Owned(api.RealtimeInterface) }
	eventually(t, "the name is owned", owned)
	realClients(t, w.p, 0)

	p := w.user(busUser)
	tids := w.threads(p, 3)
	call := func(p *harness.Proc, what, want, member string, args ...uint64) {
		t.Helper()
		var got string
		if err := p.Run(byBus, busCall{bus.Address, member, args}, &got); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", what, got, err, want)
		}
	}
	const denied, notFound = "org.freedesktop.DBus.Error.AccessDenied: Operation not permitted", "org.freedesktop.DBus.Error.Failed: No such file or directory"
	call(p, "its thread", "", "MakeThreadRealtime", tids[0], 7)
	w.is(p, tids[0], "rr 7 reset")
	call(p, "its thread, by number of the process", "", "MakeThreadRealtimeWithPID", uint64(p.PID), tids[1], 8)
	w.is(p, tids[1], "rr 8 reset")
	call(p, "a nice level", "", "MakeThreadHighPriority", tids[2], uint64(1<<32-5))
	w.is(p, tids[2], "other -5 reset")
	call(p, "no thread", notFound, "MakeThreadRealtime", 1, 7)
	other := w.user(busNobody)
	call(other, "another's", denied, "MakeThreadRealtimeWithPID", uint64(p.PID), tids[2], 7)
	w.is(p, tids[2], "other -5 reset")
	call(other, "no rule", denied, "MakeThreadRealtime", 0, 7)

	root := harness.Start(t, harness.Spec{})
	call(root, "ResetKnown", "", "ResetKnown")
	for _, tid := range tids {
		w.is(p, tid, "other 0")
	}
	// Exit: the name is given up, and taken again when D-Bus wants it.
	call(p, "a thread once more", "", "MakeThreadRealtime", tids[0], 7)
	call(root, "Exit", "", "Exit")
	w.is(p, tids[0], "other 0")
	eventually(t, "the name is given up", func() bool { return !owned() })
	if out, code := root.Exec(nil, harness.Binary(t, "cgmanager"), "--activate", "--state-dir", w.dir+"/state"); code != 0 {
		t.Errorf("--activate: %d, %s", code, out)
	}
	eventually(t, "the name is owned again", owned)
	call(p, "a thread after that", "", "MakeThreadRealtime", tids[0], 7)

	// Another daemon takes the place, and the name.
	next := startService(t, w.p, w.dir, w.sock, w.dir+"/state", append(w.args, "--replace")...).serve()
	if code := w.d.wait(5 * time.Second); code != 0 {
		t.Errorf("the daemon that was replaced ended with %d", code)
	}
	w.d = next
	eventually(t, "the name is the next one's", owned)
	call(p, "a thread of the next daemon's", "", "MakeThreadRealtime", tids[1], 7)
	next.terminate()
	eventually(t, "the name is nobody's after the end", func() bool { return !owned() })
	for _, tid := range tids {
		w.is(p, tid, "other 0")
	}
}

// TestKernelSystemBusActivation: on a host without systemd, D-Bus starts the daemon when
// somebody asks, and reminds one that runs of its name.
func TestKernelSystemBusActivation(t *testing.T) {
	harness.Require(t, "root", "dbus-daemon")
	bus := harness.NewBus(t, busPolicy)
	file, err := os.ReadFile(busService)
	if err != nil {
		t.Fatal(err)
	}
	sock, state := filepath.Join(bus.Dir, "sock"), filepath.Join(bus.Dir, "state")
	text := strings.Replace(string(file), "/usr/sbin/cgmanager", harness.Binary(t, "cgmanager")+" --listen="+sock+" --state-dir="+state, 1)
	if text == string(file) {
		t.Fatalf("%s: %s", busService, file)
	}
	if err := os.WriteFile(filepath.Join(bus.Dir, "services", filepath.Base(busService)), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv(busVariable, bus.Address) // it is in the environment of what the bus starts
	bus.Start()
	pid := 0
	defer func() {
		if pid > 0 {
			_ = unix.Kill(pid, unix.SIGTERM)
			eventually(t, "the daemon ends", func() bool { return unix.Kill(pid, 0) != nil })
		}
	}()
	call := func(what, member string) {
		t.Helper()
		if got, err := asked(busCall{Address: bus.Address, Member: member}); err != nil || got != "" {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		lock, _ := os.ReadFile(filepath.Join(state, "lock"))
		now, err := strconv.Atoi(strings.TrimSpace(string(lock)))
		if err != nil || pid != 0 && now != pid {
			t.Errorf("%s: the daemon is %q, %v, before %d", what, lock, err, pid)
		}
		pid = now
	}
	call("no daemon runs", "ResetKnown")
	if err := harness.Ping(sock); err != nil {
		t.Error(err)
	}
	call("it runs", "Exit")
	eventually(t, "the name is given up", func() bool { return !bus.Owned(api.RealtimeInterface) })
	call("it has given up the name", "ResetKnown")
}

// TestKernelSystemBusInContainer: in a container, with a bus of its own, clients find
// the proxy, and get what the container may have, by its own numbers.
func TestKernelSystemBusInContainer(t *testing.T) {
	harness.Require(t, "root", "userns", "dbus-daemon", "chrt")
	const first = 100000
	bus := harness.NewBus(t, busPolicy)
	if err := os.Chown(bus.Dir, first, first); err != nil {
		t.Fatal(err)
	}
	t.Setenv(busVariable, bus.Address)
	rw, w := newRealtimeContainers(t)
	b := w.realtimeBox("ct", first)
	daemon := b.Launch(nil, append([]string{"/usr/bin/env", "PATH=/usr/bin:/bin"}, bus.Command()...)...)
	defer func() {
		_ = daemon.Kill()
		if _, err := daemon.End(5 * time.Second); err != nil {
			t.Error(err)
		}
	}()
	startProxy(t, b.Proc, rw.sock, "--system-bus")
	eventually(t, "the name is owned", func() bool {
		out, code := b.Exec(nil, "dbus-send", "--system", "--print-reply", "--dest="+api.RealtimeInterface, api.RealtimePath,
			"org.freedesktop.DBus.Properties.Get", "string:"+api.RealtimeInterface, "string:MaxRealtimePriority")
		return code == 0 && strings.Contains(out, "int32 20")
	})
	realClients(t, b.Proc, first)

	p := b.Spawn(harness.Spec{UID: busUser, GID: busUser})
	rw.limit(p, 200000)
	tid := rw.threads(p, 1)[0]
	var got string
	if err := p.Run(byBus, busCall{bus.Address, "MakeThreadRealtime", []uint64{tid, 7}}, &got); err != nil || got != "" {
		t.Errorf("its thread: %q, %v", got, err)
	}
	isRR(t, int(hostTID(t, p, tid)), 7)
	// Its number here names nothing in there, or another.
	if err := p.Run(byBus, busCall{bus.Address, "MakeThreadRealtimeWithPID", []uint64{uint64(p.HostPID), hostTID(t, p, tid), 7}}, &got); err != nil || got == "" {
		t.Errorf("by the host's numbers: %q, %v", got, err)
	}
	if err := b.Run(byBus, busCall{bus.Address, "ResetKnown", nil}, &got); err != nil || !strings.Contains(got, "AccessDenied") {
		t.Errorf("ResetKnown by the container's root: %q, %v", got, err)
	}
	isRR(t, int(hostTID(t, p, tid)), 7)
}
