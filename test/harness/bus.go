package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// Bus is a message bus (dbus-daemon) of a test's own, on which everybody may do
// everything.
type Bus struct {
	// Address is its D-Bus address, Dir the directory that its socket "bus" is in,
	// which everybody may search. Before Start it may be given a directory
	// "services" with files for activation.
	Address, Dir string
	// Within is a command that starts the bus: unshare, say. It ends the bus when it
	// is killed.
	Within []string

	t       testing.TB
	process *BusProgram
}

const busConfig = `<busconfig>
  <type>custom</type>
  <listen>%s</listen>
  <auth>EXTERNAL</auth>
  <servicedir>%s/services</servicedir>
  <policy context="default">
    <allow user="*"/>
    %s
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
  %s
</busconfig>
`

// What everybody may do: all, or what the system's bus lets them.
const (
	busOpen   = `<allow own="*"/><allow send_type="method_call"/>`
	busSystem = `<deny own="*"/><deny send_type="method_call"/><allow send_destination="org.freedesktop.DBus"/>`
)

// NewBus prepares a bus, whose address is known before it is started. It ends with
// the test. With policies, which are files, it is one like the system's, and they say
// who may do what.
func NewBus(t testing.TB, policies ...string) *Bus {
	t.Helper()
	Require(t, "dbus-daemon")
	b := &Bus{t: t, Dir: PublicDir(t)}
	b.Address = "unix:path=" + filepath.Join(b.Dir, "bus")
	if err := os.Mkdir(filepath.Join(b.Dir, "services"), 0o755); err != nil {
		t.Fatal(err)
	}
	may, include := busOpen, ""
	for _, p := range policies {
		text, err := os.ReadFile(p)
		copied := filepath.Join(b.Dir, filepath.Base(p))
		if err == nil {
			err = os.WriteFile(copied, text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		may, include = busSystem, include+"<include>"+copied+"</include>"
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "config"), fmt.Appendf(nil, busConfig, b.Address, b.Dir, may, include), 0o644); err != nil {
		t.Fatal(err)
	}
	return b
}

// StartBus is NewBus and Start.
func StartBus(t testing.TB, policies ...string) *Bus {
	t.Helper()
	b := NewBus(t, policies...)
	b.Start()
	return b
}

// Command is what runs the bus.
func (b *Bus) Command() []string {
	return append(slices.Clone(b.Within), "dbus-daemon", "--config-file="+filepath.Join(b.Dir, "config"), "--nofork", "--nopidfile", "--nosyslog")
}

// Start starts the bus, also once more after Stop, and returns when it is served.
func (b *Bus) Start() {
	b.t.Helper()
	argv := b.Command()
	b.process = b.run(exec.Command(argv[0], argv[1:]...), func() bool {
		conn, err := dbus.Connect(b.Address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// Stop kills the bus.
func (b *Bus) Stop() {
	b.process.Stop()
	if err := os.Remove(filepath.Join(b.Dir, "bus")); err != nil {
		b.t.Error(err)
	}
}

// Signal sends the bus a signal.
func (b *Bus) Signal(sig os.Signal) {
	b.t.Helper()
	b.process.Signal(sig)
}

// Connect returns a connection that ends with the test.
func (b *Bus) Connect() *dbus.Conn {
	b.t.Helper()
	conn, err := dbus.Connect(b.Address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

// Owned reports whether somebody has the name.
func (b *Bus) Owned(name string) bool {
	conn, err := dbus.Connect(b.Address)
	if err != nil {
		return false
	}
	defer conn.Close()
	var owned bool
	return conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, name).Store(&owned) == nil && owned
}

// Polkitd is the daemon of polkit, which has no place in PATH.
const Polkitd = "/usr/lib/polkit-1/polkitd"

// StartPolkit starts Debian's polkitd on the bus, with these rules (JavaScript,
// polkit(8)) and no action but those that the text says (XML, polkit(8)). It ends
// with the test, or when it is stopped.
func (b *Bus) StartPolkit(rules, actions string) *BusProgram {
	b.t.Helper()
	Require(b.t, "root", Polkitd)
	dir := PublicDir(b.t)
	for name, text := range map[string]string{"rules.d/10-test.rules": rules, "actions/test.policy": actions} {
		path := filepath.Join(dir, name)
		if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
			b.t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	cmd := exec.Command("sh", "-ec", `
		mount --bind "$0/rules.d" /etc/polkit-1/rules.d
		mount --bind "$0/actions" /usr/share/polkit-1/actions
		exec `+Polkitd+` --no-debug`, dir)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+b.Address)
	cmd.SysProcAttr = deathsig()
	cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	return b.run(cmd, func() bool { return b.Owned("org.freedesktop.PolicyKit1") })
}

// BusProgram is a program beside a bus, or the bus itself.
type BusProgram struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// Stop kills it, and waits until it has ended. More than once does no harm.
func (p *BusProgram) Stop() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Signal sends it a signal.
func (p *BusProgram) Signal(sig os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
}

// run starts a program, and waits until it is ready.
func (b *Bus) run(cmd *exec.Cmd, ready func() bool) *BusProgram {
	b.t.Helper()
	log := &Said{}
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = deathsig()
	}
	if err := onSpawner(cmd.Start); err != nil {
		b.t.Fatal(err)
	}
	p := &BusProgram{t: b.t, cmd: cmd, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.done)
	}()
	b.t.Cleanup(p.Stop)
	for deadline := time.Now().Add(cgtest.Patience(20 * time.Second)); !ready(); time.Sleep(10 * time.Millisecond) {
		select {
		case <-p.done:
			b.t.Fatalf("%s ended: %v\n%s", cmd.Path, cmd.ProcessState, log)
		default:
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%s is not ready\n%s", cmd.Path, log)
		}
	}
	return p
}
