package lxc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// patience is how long a script may take.
func patience() time.Duration { return cgtest.Patience(60 * time.Second) }

// Host is Idle, and starts the daemon on its default sockets, for as long as the
// test runs.
func Host(t testing.TB) *Site {
	t.Helper()
	s := Idle(t)
	startDaemon(t)
	return s
}

// Idle installs the programs and what packaging/lxc has, as a package would, for as
// long as the test runs, and starts no daemon. It returns the site of the host's
// root. The test's testdata must have a link "packaging" to packaging/lxc.
func Idle(t testing.TB) *Site {
	t.Helper()
	harness.Require(t, "root", "userns", "vm", "lxc-start")
	for _, program := range []string{"cgm", "cgmanager", "cgproxy"} {
		dir := "/usr/sbin"
		if program == "cgm" {
			dir = "/usr/bin"
		}
		install(t, harness.Binary(t, program), filepath.Join(dir, program), 0o755)
	}
	for _, file := range []string{
		"config/cgmanager-socket.conf",
		"config/cgmanager.conf",
		"hooks/cgmanager-mount",
		"hooks/cgmanager-start",
	} {
		mode := os.FileMode(0o644)
		if strings.HasPrefix(file, "hooks") {
			mode = 0o755
		}
		install(t, filepath.Join("testdata/packaging", file), filepath.Join("/usr/share/lxc", file), mode)
	}
	return &Site{
		Dir: harness.PublicDir(t),
		command: func(ctx context.Context, script string) *exec.Cmd {
			return exec.CommandContext(ctx, "sh", "-c", script)
		},
	}
}

func install(t testing.TB, from, to string, mode os.FileMode) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		// A program that runs cannot be written.
		err = os.WriteFile(to+".new", b, mode)
	}
	if err == nil {
		err = os.Rename(to+".new", to)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(to); err != nil {
			t.Error(err)
		}
	})
}

func startDaemon(t testing.TB) {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cgmanager")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	said := func() string {
		b, _ := os.ReadFile(log.Name())
		return string(b)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the daemon's end: %v", err)
			}
		case <-time.After(patience()):
			_ = cmd.Process.Kill()
			t.Error("the daemon does not end")
		}
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", said())
		}
		_ = log.Close()
	})
	for end := time.Now().Add(patience()); harness.Ping("/run/cgmanager/sock") != nil; {
		if time.Now().After(end) {
			t.Fatalf("the daemon does not serve:\n%s", said())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Site is where somebody starts containers.
type Site struct {
	// Dir is a directory of theirs, as they see it, for containers.
	Dir string
	// idmap is the IDMap of a Config that has none.
	idmap   string
	command func(ctx context.Context, script string) *exec.Cmd
	// outer is the site around; nil for one on the host.
	outer *Site
	// stopped says that the container whose site this is has been stopped.
	stopped bool
}

// ended says that nothing can run there any more.
func (s *Site) ended() bool { return s != nil && (s.stopped || s.outer.ended()) }

// User returns the site of uid 1000 of the host in the cgroup name, which the host's
// root makes for it, without a systemd or a session. Its subordinate ids are those
// of the machine's user u1.
func (s *Site) User(t testing.TB, name string) *Site {
	t.Helper()
	s.Do(t, fmt.Sprintf("cgm create all %s && cgm chown all %[1]s 1000 1000", name))
	t.Cleanup(func() { s.Do(t, "cgm remove all "+name) })
	return user(t, "cgm movepid all "+name+" $$ && ")
}

// user is uid 1000 of the host, after what root does for it.
func user(t testing.TB, before string) *Site {
	t.Helper()
	dir := harness.PublicDir(t)
	if err := os.Chown(dir, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	return &Site{
		Dir:   dir,
		idmap: IDMap(100000, 65536),
		command: func(ctx context.Context, script string) *exec.Cmd {
			return exec.CommandContext(ctx, "sh", "-c",
				before+`cd "$1" && exec setpriv --reuid 1000 --regid 1000 --clear-groups env HOME="$1" USER=u1 sh -c "$0"`,
				script, dir)
		},
	}
}

// Login returns the site of the user u1 after a login, in the cgroup name, which root
// has made for it.
func (s *Site) Login(t testing.TB, name string) *Site {
	t.Helper()
	return &Site{
		Dir:   "/home/u1",
		idmap: IDMap(100000, 65536),
		command: func(ctx context.Context, script string) *exec.Cmd {
			return exec.CommandContext(ctx, "sh", "-c", `cgm movepid all "$0" $$ && exec su - u1 -c "$1"`, name, script)
		},
	}
}

// Stranger returns the site of uid 1000 of the host where nobody has given it a
// cgroup.
func (s *Site) Stranger(t testing.TB) *Site {
	t.Helper()
	return user(t, "")
}

// In returns the site of the same one with another directory, below its own.
func (s *Site) In(t testing.TB, dir string) *Site {
	t.Helper()
	other := *s
	other.outer = s
	other.Dir += "/" + dir
	s.Do(t, "mkdir "+other.Dir)
	return &other
}

// IDMap is what a Config has for a container with n ids that start at first.
func IDMap(first, n int) string {
	return fmt.Sprintf("u 0 %d %d\nlxc.idmap = g 0 %[1]d %[2]d", first, n)
}

// Run runs a script there, and returns what it says and its exit code.
func (s *Site) Run(t testing.TB, script string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience())
	defer cancel()
	cmd := s.command(ctx, script)
	// Not a pipe, which a monitor in the background would hold.
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	b, readErr := os.ReadFile(out.Name())
	if readErr != nil {
		t.Fatal(readErr)
	}
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		t.Fatalf("%s: %v\n%s", script, err, b)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

// Do runs a script there that must succeed, and returns what it says.
func (s *Site) Do(t testing.TB, script string) string {
	t.Helper()
	out, code := s.Run(t, script)
	if code != 0 {
		t.Fatalf("%s: exit code %d\n%s", script, code, out)
	}
	return out
}

// Config is what a container is to be.
type Config struct {
	Name string
	// IDMap are the ids that it has (see the function); by default those that
	// the site gives, which may be none: a container without a user namespace.
	IDMap string
	// Limits are the lines of its file "limits".
	Limits []string
	// Alone leaves its cgroups to LXC.
	Alone bool
	// Lines are more of its configuration.
	Lines []string
	// Init is what its first process does first, in sh.
	Init string
}

// Container is one that runs; as a Site, it is that of its root.
type Container struct {
	Site
	Name string
}

// config is that of a container whose root file system has the programs of the
// one outside; %s are the idmap, who makes the cgroups, the directory, and more
// lines.
const config = `lxc.include = /usr/share/lxc/config/common.conf
%s
lxc.include = /usr/share/lxc/config/nesting.conf
lxc.apparmor.profile = unconfined
lxc.include = /usr/share/lxc/config/cgmanager-socket.conf
%s
lxc.rootfs.path = dir:%s/rootfs
lxc.net.0.type = empty
lxc.mount.auto = cgroup:rw:force
lxc.mount.entry = /usr usr none bind,ro 0 0
lxc.mount.entry = tmpfs tmp tmpfs mode=1777 0 0
lxc.mount.entry = tmpfs var tmpfs mode=0755 0 0
lxc.init.cmd = /init
%s
`

// Make makes the container's files: a root file system with the programs of the
// site, and lxc in it.
func (s *Site) Make(t testing.TB, c Config) *Container {
	t.Helper()
	dir := s.Dir + "/" + c.Name
	idmap := s.idmap
	if c.IDMap != "" {
		idmap = c.IDMap
	}
	if idmap != "" {
		idmap = "lxc.include = /usr/share/lxc/config/userns.conf\nlxc.idmap = " + idmap
	}
	cgroups := "lxc.include = /usr/share/lxc/config/cgmanager.conf"
	if c.Alone {
		cgroups = ""
	}
	text := fmt.Sprintf(config, idmap, cgroups, dir, strings.Join(c.Lines, "\n"))
	script := `set -e; umask 022; mkdir -p ` + dir + `; cd ` + dir + `
mkdir -p rootfs && cd rootfs
mkdir usr etc proc sys dev run tmp root var mnt
for d in bin sbin lib lib64; do ln -s usr/$d $d; done
echo root:x:0:0::/root:/bin/sh >etc/passwd
echo root:x:0: >etc/group
mkdir etc/lxc
printf 'lxc.net.0.type = empty\nlxc.apparmor.profile = unconfined\n' >etc/lxc/default.conf
echo root:0:65536 | tee etc/subuid >etc/subgid
cat >init <<'END'
#!/bin/sh
trap 'exit 0' PWR TERM
trap 'exec busybox reboot -f' INT
` + c.Init + `
while :; do sleep 1000 & wait $!; done
END
chmod 755 init
cat >../config <<'END'
` + text + `END
`
	if len(c.Limits) > 0 {
		script += "cat >../limits <<'END'\n" + strings.Join(c.Limits, "\n") + "\nEND\n"
	}
	s.Do(t, script)
	return &Container{
		Name: c.Name,
		Site: Site{
			Dir:   "/tmp",
			outer: s,
			command: func(ctx context.Context, script string) *exec.Cmd {
				return s.command(ctx, fmt.Sprintf("exec lxc-attach -P %s -n %s -- sh -c %s", s.Dir, c.Name, Quote(toTop+script)))
			},
		},
	}
}

// toTop moves the shell to the container's own cgroup, where its services are: on
// v2 lxc-attach puts what it starts into a cgroup of their own beside them, from
// where the daemon shows and gives no more than that. In a cgroup that is divided
// there is room in the leaf alone.
const toTop = `for top in /sys/fs/cgroup /sys/fs/cgroup/unified; do
for d in $top $top/.cgmanager-leaf; do
{ echo $$ >$d/cgroup.procs; } 2>/dev/null && break
done
done
`

// Quote makes one word of a shell of s.
func Quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Start makes a container and starts it, and stops it after the test.
func (s *Site) Start(t testing.TB, c Config) *Container {
	t.Helper()
	k := s.Make(t, c)
	k.StartIt(t)
	t.Cleanup(func() { k.Stop(t) })
	return k
}

// StartIt starts a container that was made.
func (c *Container) StartIt(t testing.TB) {
	t.Helper()
	c.stopped = false
	if out, code := c.outer.Run(t, c.start()+fmt.Sprintf(" && lxc-wait -P %s -n %s -s RUNNING -t %d", c.outer.Dir, c.Name, int(patience().Seconds()))); code != 0 {
		t.Fatalf("%s does not start: %s\n%s", c.Name, out, c.log(t))
	}
}

// Fails starts a container that was made and must not start, and returns the log
// that LXC has left.
func (c *Container) Fails(t testing.TB) string {
	t.Helper()
	if out, code := c.outer.Run(t, c.start()); code == 0 {
		t.Errorf("%s has started: %s", c.Name, out)
		c.Stop(t)
	}
	return c.log(t)
}

func (c *Container) start() string {
	return fmt.Sprintf("cd %s/%s && lxc-start -P %[1]s -n %[2]s -o log -l DEBUG -d", c.outer.Dir, c.Name)
}

func (c *Container) log(t testing.TB) string {
	t.Helper()
	log, _ := c.outer.Run(t, fmt.Sprintf("grep -v -e ' seccomp ' -e get_rundir %s/%s/log | tail -n 60", c.outer.Dir, c.Name))
	return log
}

// Pid returns the number of its first process, "" if it does not run.
func (c *Container) Pid(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(c.outer.Do(t, fmt.Sprintf("lxc-info -P %s -n %s -p -H", c.outer.Dir, c.Name)))
}

// Stop ends the container, if it runs, with those in it.
func (c *Container) Stop(t testing.TB) {
	t.Helper()
	if c.ended() {
		return
	}
	c.stopped = true
	if out, code := c.outer.Run(t, fmt.Sprintf(`lxc-info -P %s -n %s -s | grep -q STOPPED || lxc-stop -P %[1]s -n %[2]s -k`, c.outer.Dir, c.Name)); code != 0 {
		t.Errorf("%s does not stop: %s", c.Name, out)
	}
}
