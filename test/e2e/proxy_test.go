package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// proxied is a cgproxy with a socket of its own.
type proxied struct {
	t *testing.T
	// sock is the path of its socket, dir the directory around it.
	sock, dir string
	child     *harness.Child
	// pid is the host's number of it, fds how many files it had open at first.
	pid, fds int
	ended    bool
}

// startProxy starts cgproxy as a child of p, asking the daemon at lower, and
// waits until it serves, at a socket of its own.
func startProxy(t *testing.T, p *harness.Proc, lower string, args ...string) *proxied {
	t.Helper()
	dir := harness.PublicDir(t)
	if err := os.Chown(dir, int(p.HostUID), int(p.HostGID)); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "sock")
	return runProxy(t, p, dir, sock, append([]string{"--lower", "unix:path=" + lower, "--listen", "unix:path=" + sock}, args...)...)
}

// runProxy starts cgproxy as a child of p, with its log in dir, and waits until
// it serves at sock. At the end of the test it must end in order, holding no more
// files than at first.
func runProxy(t *testing.T, p *harness.Proc, dir, sock string, args ...string) *proxied {
	t.Helper()
	x := &proxied{t: t, dir: dir, sock: sock}
	x.child = p.Launch(nil, append([]string{
		"/bin/sh", "-c", `log=$1; shift; exec "$@" 2>"$log"`, "sh", filepath.Join(x.dir, "log"), harness.Binary(t, "cgproxy"),
		"--log-level", "debug",
	}, args...)...)
	t.Cleanup(func() { x.end() })
	x.pid = hostChild(t, p, x.child.PID)
	eventually(t, "the proxy serves", func() bool {
		c, err := p.Dial(x.sock)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	x.fds = x.settled(0)
	return x
}

func (x *proxied) log() string {
	b, err := os.ReadFile(filepath.Join(x.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// settled waits until the proxy has at most limit files open, or with 0 until
// the number no longer changes, and returns it.
func (x *proxied) settled(limit int) int {
	last, same := -1, 0
	for end := time.Now().Add(cgtest.Patience(5 * time.Second)); time.Now().Before(end); {
		all, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", x.pid))
		n := len(all)
		if same++; n != last {
			last, same = n, 0
		}
		if limit > 0 && n <= limit || limit == 0 && same == 5 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return last
}

// Pause stops the proxy wherever it is; Resume lets it go on.
func (x *proxied) Pause() error { return harness.Pause(x.pid) }

// Resume is described with Pause.
func (x *proxied) Resume() error { return unix.Kill(x.pid, unix.SIGCONT) }

// end ends the proxy by SIGTERM.
func (x *proxied) end() {
	x.t.Helper()
	if x.ended {
		return
	}
	x.ended = true
	if n := x.settled(x.fds); x.fds > 0 && n > x.fds {
		x.t.Errorf("the proxy has %d files open, %d in the beginning", n, x.fds)
	}
	if err := unix.Kill(x.pid, unix.SIGTERM); err != nil {
		x.t.Error(err)
	}
	status, err := x.child.End(cgtest.Patience(10 * time.Second))
	if err != nil || !status.Exited() || status.ExitStatus() != 0 {
		x.t.Errorf("the proxy ended with %v (%#x)", err, status)
	}
	if x.t.Failed() {
		x.t.Logf("the proxy's log:\n%s", x.log())
	}
}

// sh runs a script in b, with cgm in the path, and returns what it says and its
// exit code.
func (b *box) sh(sock, script string) (string, int) {
	b.w.Helper()
	return b.Exec(nil, "bash", "-c", "export CGMANAGER_ADDRESS=unix:path="+sock+" PATH="+
		filepath.Dir(harness.Binary(b.w.T, "cgm"))+":/usr/sbin:/sbin:$PATH\n"+script)
}

// sameCommands are for any container; what they say does not depend on whether a
// proxy is between. $V is a process of the container.
var sameCommands = []string{
	"$S $I.Ping int32:0",
	"$S $J.ListControllers",
	"$S $I.ListControllers",
	"$S $I.Create string:memory string:a",
	"$S $I.Create string:memory string:a",
	"$S $I.Create string:memory,freezer string:a/b",
	"$S $I.Create string:all string:all",
	"$S $I.Create string:nosuch string:a",
	"$S $I.Create string:memory string:../a",
	"$S $I.Create string:memory string:/slash",
	"$S $I.MovePid string:memory string:a int32:$V",
	"$S $I.MovePid string:memory string:/a int32:$V",
	"$S $I.MovePid string:memory string:nosuch int32:$V",
	"$S $I.MovePid string:memory string:a int32:999999",
	"$S $I.GetPidCgroup string:memory int32:$V",
	"$S $I.GetTasks string:memory string:a",
	"$S $I.GetTasksRecursive string:memory string:a",
	"$S $I.GetTasks string:memory string:nosuch",
	"$S $I.ListChildren string:memory string:",
	"$S $I.ListKeys string:freezer string:a",
	"$S $I.SetValue string:pids string:all string:pids.max string:77",
	"$S $I.GetValue string:pids string:all string:pids.max",
	"$S $I.SetValue string:pids string: string:pids.max string:77",
	"$S $I.GetValue string:memory string:a string:tasks",
	"$S $I.GetValue string:memory string:a string:../tasks",
	"$S $I.Chown string:memory string:a/b int32:7 int32:8",
	"$S $I.Chown string:memory string:a/b int32:-1 int32:-1",
	"$S $I.Chown string:memory string:a int32:70000 int32:7",
	"$S $I.Chmod string:memory string:a/b string:tasks int32:436",
	"$S $I.Chmod string:memory string:a/b string: int32:4095",
	"$S $I.ListKeys string:memory string:a/b | grep -A3 tasks",
	"$S $I.RemoveOnEmpty string:memory string:nosuch",
	"$S $I.Prune string:memory string:nosuch",
	"$S $J.Create string:new array:string: dict:string:string:pids.limit,9",
	"$S $J.Create string:new array:string:nosuch dict:string:string:",
	"$S $J.GetValue string:new array:string:pids.limit",
	"$S $J.GetValue string:new array:string:no.limit",
	"$S $J.SetValue string:new dict:string:string:pids.limit,junk",
	"$S $J.SetValue string: dict:string:string:pids.limit,9",
	"$S $J.ListControllers string:new",
	"$S $J.ListChildren string:",
	"$S $J.Move string:new uint32:$V",
	"$S $J.Move string:new uint32:999999",
	"$S $J.ListTasks string:new",
	"$S $J.Chown string:new uint32:5 uint32:70000",
	"$S $J.Delete string:new",
	"$S $J.Kill string:nosuch",
	"$S $J.Move string: uint32:$V",
	"$S $J.Delete string:new",
	"$S $J.DeleteForce string:../x",
	"$S $J.NoSuchMethod",
	"$S $I.Create int32:0",
	"$S $I.Remove string:memory string:a int32:0",
	"$S $I.Remove string:memory string:a int32:1",
	"$S $I.Remove string:memory string:a int32:1",
	"$S $J.Delegate string:mine array:string:pids",
	"$S $J.Delete string:mine",
	"$S $I.Remove string:all string:all int32:1",
	"$U1 $S $I.Create string:memory string:not-mine",
	"cgm run x --set pids.limit=20 -- cgm get '' pids.limit",
	"cgm tree a",
	"unshare -p -f --mount-proc $S $I.GetPidCgroup string:memory int32:1",
	"unshare -U -r -p -f --mount-proc $S $I.Create string:memory string:inner",
}

// answers are what who serves at sock says to commands like sameCommands, with the
// exit codes.
func (b *box) answers(sock string, commands []string) (all []string) {
	b.w.Helper()
	// A number that is no other in what is said.
	b.sh(sock, "for i in {1..1000}; do (:); done")
	v := b.Launch(nil, "/bin/sh", "-c", "while :; do read x || exit; done")
	defer func() { _, _ = v.End(time.Second) }()
	vars := fmt.Sprintf(`
S="dbus-send --peer=unix:path=%s --print-reply --reply-timeout=%d /org/linuxcontainers/cgmanager"
I=org.linuxcontainers.cgmanager0_0 J=org.linuxcontainers.CGManager1
U1="setpriv --reuid 1000 --regid 1000 --clear-groups" V=%d
`, sock, cgtest.Patience(10*time.Second).Milliseconds(), v.PID)
	pid := regexp.MustCompile(fmt.Sprintf(`\b%d\b`, v.PID))
	stamp := regexp.MustCompile(`time=[0-9.]+ `)
	for _, command := range commands {
		out, code := b.sh(sock, vars+command)
		out = pid.ReplaceAllString(stamp.ReplaceAllString(out, ""), "$$V")
		all = append(all, fmt.Sprintf("%s[exit %d]", out, code))
	}
	return all
}

// Whether a client asks the daemon or a proxy, or a proxy that asks a proxy, it is
// answered the same, but for what counts from a proxy's cgroup.
func TestKernelProxySame(t *testing.T) {
	harness.Require(t, "dbus-send", "setpriv", "unshare")
	w := newWorld(t)
	outer := w.box("c1")
	first := startProxy(t, outer.Proc, w.d.Sock)
	answers := map[string][]string{}
	vias := []string{"the daemon", "two proxies", "a proxy", "the outer proxy"}
	if harness.Emulated() {
		vias = vias[:2]
	}
	for i, via := range vias {
		b := outer.box(fmt.Sprint("i", i))
		sock := w.d.Sock
		switch via {
		case "a proxy":
			sock = startProxy(t, b.Proc, w.d.Sock).sock
		case "two proxies":
			sock = startProxy(t, b.Proc, first.sock).sock
		case "the outer proxy":
			sock = first.sock
		}
		for _, said := range b.answers(sock, sameCommands) {
			answers[via] = append(answers[via], strings.ReplaceAll(said, fmt.Sprint("c1/i", i), "OWN"))
		}
	}
	refusals := 0
	for i, command := range sameCommands {
		direct := answers[vias[0]][i]
		if strings.Contains(direct, "[exit 1]") {
			refusals++
		}
		for _, via := range vias[1:] {
			if got := answers[via][i]; got != direct {
				t.Errorf("$ %s\nby %s:\n%s\nby the daemon:\n%s", command, via, got, direct)
			}
		}
	}
	if done := len(sameCommands) - refusals; done < 25 || refusals < 20 {
		t.Errorf("%d commands succeeded, %d were refused", done, refusals)
	}
}

// Root of a container may move tasks up to its own proxy's cgroup, and no further:
// the proxy of the container around, whose socket its own asks, does not let it out
// of what that container confined it to.
func TestKernelProxyEscape(t *testing.T) {
	w := newWorld(t)
	outer := w.box("c1")
	inner := outer.box("c2")
	first := startProxy(t, outer.Proc, w.d.Sock)
	second := startProxy(t, inner.Proc, first.sock)
	u, v := inner.user(0), inner.user(7)
	w.Make("c1/c2/deep", inner.HostUID, inner.HostGID)
	for _, tc := range []struct {
		via  string
		to   string
		name string
	}{{"its own proxy", "c1/c2", second.sock}, {"the outer proxy", "c1", first.sock}} {
		w.Place(u, "c1/c2/deep")
		w.Place(v, "c1/c2/deep")
		conn := u.MustDial(tc.name)
		// In the lower cgroup, u can move nothing out of it.
		want(t, "GetPidCgroupAbs", asker{t, conn}.v0("GetPidCgroupAbs", "memory", v.NSpid()[2])[0],
			strings.TrimPrefix("c1/c2/deep", tc.to))
		if tc.name == second.sock {
			asker{t, conn}.v0("MovePidAbs", "all", "/", v.NSpid()[2])
			want(t, "where it is by "+tc.via, w.in(v), tc.to)
		} else {
			for _, to := range []string{"/", "/c2", "/c2/deep"} {
				w.refused("by "+tc.via+" to "+to, func() error {
					_, err := conn.V0("MovePidAbs", "all", to, v.NSpid()[2])
					return err
				})
			}
		}
		w.watch = []*harness.Proc{inner.Proc, outer.Proc, v, u}
		for _, to := range []string{"..", "/..", "/../c1"} {
			w.refused("further by "+tc.via, func() error {
				_, err := conn.V0("MovePidAbs", "memory", to, u.NSpid()[2])
				return err
			})
		}
		low := v.MustDial(tc.name)
		w.Place(v, "c1/c2/deep")
		w.refused("by one who is not root, by "+tc.via, func() error {
			_, err := low.V0("MovePidAbs", "memory", "/", v.NSpid()[2])
			return err
		})
		low.Close()
		conn.Close()
	}
	direct := u.MustDial(w.d.Sock)
	defer direct.Close()
	w.refused("without a proxy", func() error {
		_, err := direct.V0("MovePidAbs", "memory", "/", v.NSpid()[2])
		return err
	})
}

// The pidfd goes down with the request, and nothing is left open.
func TestKernelProxyMoveFd(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	x := startProxy(t, b.Proc, w.d.Sock)
	v := b.user(7)
	c := b.MustDial(x.sock)
	defer c.Close()
	asker{t, c}.v1("Create", "x", []string{}, map[string]string{})
	fd := b.PidFD(int(v.NSpid()[1]))
	asker{t, c}.v1("MoveFd", "x", harness.FD(fd))
	want(t, "where it is", w.in(v), "c1/x")
	b.Close(fd)
	a, bb := b.Socketpair(unix.SOCK_STREAM)
	w.refused("no pidfd", func() error { return second(c.V1("MoveFd", "x", harness.FD(a))) })
	b.Close(a)
	b.Close(bb)
}

// Requests wait for the daemon below. What was surely not carried out is sent
// again; what may have been fails, and says so.
func TestKernelProxyRestart(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	dir := harness.PublicDir(t)
	sock := filepath.Join(dir, "sock")
	start := func(args ...string) *harness.Child {
		t.Helper()
		p := harness.Start(t, harness.Spec{})
		c := p.Launch(nil, append([]string{
			harness.Binary(t, "cgmanager"), "--listen", "unix:path=" + sock,
			"--state-dir", filepath.Join(dir, "state"), "--log-level", "error",
		}, args...)...)
		eventually(t, "the daemon serves", func() bool { return harness.Ping(sock) == nil })
		return c
	}
	d := start()
	// One that waits longer than a daemon takes to start on any machine.
	x := startProxy(t, b.Proc, sock, "--wait", "1m")
	c := b.MustDial(x.sock)
	defer c.Close()
	ask := asker{t, c}
	ask.v1("Create", "before", []string{}, map[string]string{})

	for _, how := range []string{"TERM", "KILL"} {
		if how == "KILL" {
			if err := d.Kill(); err != nil {
				t.Fatal(err)
			}
		} else if err := unix.Kill(listenerPID(t, sock), unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if _, err := d.End(cgtest.Patience(3 * time.Second)); err != nil {
			t.Fatal(err)
		}
		// The daemon is away for a while: the request waits.
		if err := c.Send(harness.V1, "Create", how, []string{}, map[string]string{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		d = start()
		if _, err := c.Reply(); err != nil {
			t.Errorf("Create while the daemon was away (%s): %v", how, err)
		}
		ask.v1("Delete", how)
	}

	// It hangs, and is killed before it reads the request: sent again.
	if err := harness.Pause(listenerPID(t, sock)); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(harness.V1, "Create", "unread", []string{}, map[string]string{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = d.End(cgtest.Patience(3 * time.Second))
	d = start()
	if _, err := c.Reply(); err != nil {
		t.Errorf("a request that the daemon did not read: %v", err)
	}

	// It does not come back.
	hasty := startProxy(t, b.Proc, sock, "--wait", "2s")
	h := b.MustDial(hasty.sock)
	defer h.Close()
	asker{t, h}.v1("ListChildren", "")
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	_, _ = d.End(cgtest.Patience(3 * time.Second))
	began := time.Now()
	err := second(h.V1("Create", "lost", []string{}, map[string]string{}))
	var de *harness.DBusError
	if took := time.Since(began); !errors.As(err, &de) || !strings.HasSuffix(de.Name, ".Error.Busy") || !strings.Contains(de.Text, "not carried out") {
		t.Errorf("after %v: %v", took, err)
	} else if took < 1500*time.Millisecond || took > cgtest.Patience(8*time.Second) {
		t.Errorf("the request waited %v", took)
	}
	d = start()
	want(t, "what is there", ask.v1("ListChildren", ""), []any{[]string{"before", "unread"}})
	ask.v1("Delete", "unread")
	ask.v1("Delete", "before")
	// The client that opened the connection is gone: nobody else is named.
	u := b.user(7)
	lost := u.MustDial(x.sock).Give(b.Proc)
	defer lost.Close()
	u.Stop()
	w.refused("for one that has ended", func() error { return second(lost.V1("Create", "x", []string{}, map[string]string{})) })
	if _, err := d.End(0); err != nil {
		t.Error(err)
	}
	x.fds, hasty.fds = 0, 0 // the daemon is away: a client's lower connection is not there
}

// listenerPID is the process that listens at a socket.
func listenerPID(t *testing.T, sock string) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: sock}); err != nil {
		t.Fatal(err)
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		t.Fatal(err)
	}
	return int(cred.Pid)
}

// A proxy serves many clients and leaves nothing behind, whatever they do.
func TestKernelProxyLeaks(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	x := startProxy(t, b.Proc, w.d.Sock)
	for range harness.Rounds(100) {
		c := b.MustDial(x.sock)
		asker{t, c}.v1("ListChildren", "")
		if e, err := c.OpenScm("CreateScm", "memory", "y"); err == nil {
			e.Close()
		}
		_ = c.Send(harness.V1, "ListTasks", "")
		c.Close()
	}
	if n := x.settled(x.fds); n > x.fds {
		t.Errorf("%d files open, %d in the beginning", n, x.fds)
	}
}

// The usual places: taken aside, served, used again after a kill, put back; also
// where mounts on one place appear at others, as in the containers of LXC.
func TestKernelProxyPlaces(t *testing.T) {
	for _, propagation := range []string{"private", "shared"} {
		t.Run(propagation, func(t *testing.T) { testPlaces(t, propagation) })
	}
}

func testPlaces(t *testing.T, propagation string) {
	w := newWorld(t)
	b := w.box("c1")
	d := filepath.Dir(w.d.Sock)
	script := `
set -e
mount --make-r` + propagation + ` /
mount -t tmpfs none /run
mkdir /run/cgmanager
mount --bind ` + d + ` /run/cgmanager
mount -t tmpfs none /sys/fs/cgroup
mkdir /sys/fs/cgroup/cgmanager
mount --bind ` + d + ` /sys/fs/cgroup/cgmanager
unset CGMANAGER_ADDRESS
before=$(cat /proc/self/mountinfo)
places="/run/cgmanager/sock /sys/fs/cgroup/cgmanager/sock"
lower="/run/cgmanager.lower/sock /sys/fs/cgroup/cgmanager.lower/sock"
proxys() {
	for s in $places /sys/fs/cgroup/manager; do
		[ "$(CGMANAGER_ADDRESS=$s cgm status 2>/dev/null | grep daemon)" = "daemon       pid $1, uid 0" ] || { echo "$s is not the proxy's"; return 1; }
	done
}
serves() {
	for i in $(seq 300); do proxys $1 >/dev/null && break; sleep 0.1; done
	proxys $1 || exit 1
	for s in $lower; do
		CGMANAGER_ADDRESS=$s cgm status | grep -q "outside of this pid namespace" || { echo "$s is not the daemon's"; exit 1; }
	done
}
cgproxy & pid=$!
serves $pid
mkdir /run/inner
mount --bind /run/cgmanager /run/inner
if cgproxy --wait 0; then echo "a second proxy started"; exit 1; fi
kill -9 $pid
wait $pid || true
cgproxy & pid=$!
serves $pid
CGMANAGER_ADDRESS=/run/inner/sock cgm ping
kill $pid
wait $pid
umount /run/inner
[ "$before" = "$(cat /proc/self/mountinfo)" ] || { echo "$before"; echo ---; cat /proc/self/mountinfo; exit 1; }
for s in $places; do
	CGMANAGER_ADDRESS=$s cgm status | grep -q "outside of this pid namespace" || { echo "$s is not the daemon's"; exit 1; }
done
ls -d /run/*.lower /sys/fs/cgroup/*.lower /sys/fs/cgroup/manager 2>/dev/null && { echo "left behind"; exit 1; }
echo fine
`
	child := b.Launch(nil, "/bin/bash", "-c", "exec 2>&1; export PATH="+filepath.Dir(harness.Binary(t, "cgm"))+":/usr/sbin:/sbin:$PATH\n"+script)
	out, err := child.Said(cgtest.Patience(45 * time.Second))
	if err != nil {
		t.Error(err)
	}
	status, err := child.End(cgtest.Patience(10 * time.Second))
	if err != nil || !status.Exited() || status.ExitStatus() != 0 || !strings.HasSuffix(out, "fine\n") || !strings.Contains(out, "another cgproxy serves this container already") {
		t.Errorf("exit %#x: %s", status, out)
	}
}

// What cannot work is said at once, with what to do about it.
func TestKernelProxyBadInput(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	dir := harness.PublicDir(t)
	stale := filepath.Join(dir, "stale")
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: stale}), os.Chmod(stale, 0o777), unix.Close(l)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	mine := func(args string) string {
		return "cgproxy --wait 0 --listen unix:path=" + dir + "/sock " + args
	}
	for _, tc := range []struct {
		name, script string
		code         int
		says         []string
	}{
		{
			"no socket", "mount -t tmpfs none /run; mount -t tmpfs none /sys/fs/cgroup; cgproxy --wait 0", 1,
			[]string{"there is no cgmanager socket in this container", "hint: bind-mount"},
		},
		{"not there", mine("--lower unix:path=" + dir + "/none"), 1, []string{dir + "/none", "no such file", "hint:"}},
		{"stale", mine("--lower unix:path=" + stale), 1, []string{stale, "connection refused", "hint: the socket is stale"}},
		{
			"another version", mine("--lower unix:path=" + harness.StartOriginal(t, 9).Path), 1,
			[]string{"of another version", "api_version is 9, and 10 is needed", "hint: upgrade cgmanager on the host"},
		},
		{"the same", "cgproxy --lower unix:path=" + dir + "/sock --listen unix:path=" + dir + "/sock", 2, []string{"--listen", "--lower"}},
		{"no address", "cgproxy --lower tcp:host=x", 2, []string{"--lower", "unix:path=/PATH"}},
		{"what is it", "cgproxy --wait 2h", 2, []string{"--wait"}},
		{"a file of no place", "cgproxy --pidfile cgproxy.pid", 2, []string{"--pidfile", "absolute"}},
		{"a file that cannot be", mine("--lower unix:path=" + w.d.Sock + " --pidfile /nonexistent/pid"), 1, []string{"--pidfile", "/nonexistent/pid", "no such file"}},
		{
			"a link for a file", "ln -s " + dir + "/there " + dir + "/link; " + mine("--lower unix:path="+w.d.Sock+" --pidfile "+dir+"/link") + "; r=$?; rm " + dir + "/link; exit $r", 1,
			[]string{"--pidfile", "too many levels of symbolic links"},
		},
		{"in use", "cgproxy --lower unix:path=" + w.d.Sock + " --listen unix:path=" + dir + "/taken & p=$!; for i in {1..300}; do CGMANAGER_ADDRESS=" + dir + "/taken cgm ping 2>/dev/null && break; sleep 0.1; done; cgproxy --lower unix:path=" +
			w.d.Sock + " --listen unix:path=" + dir + "/taken; r=$?; kill $p; wait $p; exit $r", 1, []string{"another daemon answers there", "hint:"}},
		{
			"no privilege", "setpriv --bounding-set -sys_admin --inh-caps -sys_admin cgproxy --lower unix:path=" + w.d.Sock + " --listen unix:path=" + dir + "/p", 1,
			[]string{"may not name others", "CAP_SYS_ADMIN"},
		},
		{
			"no setuid", "setpriv --bounding-set -setuid --inh-caps -setuid cgproxy --lower unix:path=" + w.d.Sock + " --listen unix:path=" + dir + "/p", 1,
			[]string{"lacks CAP_SETUID", "hint:"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, code := b.sh("", tc.script)
			if code != tc.code {
				t.Errorf("exit %d", code)
			}
			for _, s := range tc.says {
				if !strings.Contains(out, s) {
					t.Errorf("%q is not in %q", s, out)
				}
			}
		})
	}

	t.Run("on the host", func(t *testing.T) {
		p := harness.Start(t, harness.Spec{})
		out, code := p.Exec(nil, "unshare", "-m", "sh", "-c", "mount -t tmpfs none /run; mkdir /run/cgmanager; mount --bind "+
			filepath.Dir(w.d.Sock)+" /run/cgmanager; mount -t tmpfs none /sys/fs/cgroup; exec timeout 60 "+harness.Binary(t, "cgproxy"))
		if code != 1 || !strings.Contains(out, "here nobody needs a proxy") {
			t.Errorf("exit %d: %s", code, out)
		}
	})
	if all, _ := filepath.Glob(dir + "/*"); !slices.Equal(all, []string{stale}) {
		t.Errorf("left behind: %q", all)
	}
}

// TestKernelProxyReference replays what was recorded in a container behind the
// original's proxy.
func TestKernelProxyReference(t *testing.T) {
	harness.Require(t, "v1")
	w := newWorld(t)
	b := w.box("c0")
	w.via = startProxy(t, b.Proc, w.d.Sock).sock
	b.sh("", "for i in {1..1000}; do (:); done") // numbers that are no others
	v := launch(t, b.Proc, "/bin/sleep", "300")
	entries := readRecorded(t, "proxy-0.42.txt")
	if len(entries) < 20 {
		t.Fatalf("%d commands", len(entries))
	}
	w.replay(b.Proc, "", entries, fmt.Sprintf("SL=%d; export PATH=%s:$PATH CGMANAGER_ADDRESS=unix:path=%s",
		v.PID, filepath.Dir(harness.Binary(t, "cgm")), w.via), v.PID)
}

// The original's proxy works below this one: *Scm calls of a client, for somebody
// else, go down as such, and are confined to that client's cgroup.
func TestKernelProxyOfOriginal(t *testing.T) {
	w := newWorld(t)
	outer := w.box("c1")
	inner := outer.box("c2")
	x := startProxy(t, outer.Proc, w.d.Sock)
	u, v := inner.user(0), inner.user(7)
	w.Make("c1/c2/low", inner.HostUID, inner.HostGID)
	w.Place(u, "c1/c2/low")
	w.Place(v, "c1/c2/low")
	c := inner.MustDial(x.sock)
	defer c.Close()
	scm := func(member string, creds []harness.Cred, args ...any) any {
		t.Helper()
		got, err := c.Scm(member, creds, args...)
		if err != nil {
			t.Errorf("%s: %v", member, err)
		}
		return got
	}
	self, victim := []harness.Cred{u.Cred}, []harness.Cred{u.Cred, v.Cred}
	want(t, "CreateScm", scm("CreateScm", self, "memory", "x"), "1")
	want(t, "CreateScm", scm("CreateScm", self, "memory", "x"), "2")
	want(t, "MovePidScm", scm("MovePidScm", victim, "memory", "x"), "1")
	want(t, "GetPidCgroupScm", scm("GetPidCgroupScm", victim, "memory"), "x")
	want(t, "GetPidCgroupAbsScm", scm("GetPidCgroupAbsScm", victim, "memory"), "/low/x")
	want(t, "ListChildrenScm", scm("ListChildrenScm", self, "memory", ""), []string{"x"})
	tasks, _ := scm("GetTasksScm", self, "memory", "x").([]int32)
	if len(tasks) == 0 || !slices.Contains(tasks, v.PID) {
		t.Errorf("GetTasksScm: %v, want %d", tasks, v.PID)
	}
	want(t, "ChownScm", scm("ChownScm", []harness.Cred{u.Cred, {PID: u.PID, UID: 7, GID: 8}}, "memory", "x"), "1")
	memory := harness.Find(t, "memory")
	want(t, "owner", w.owner(memory, "c1/c2/low/x", ""), fmt.Sprintf("%d:%d", inner.HostUID+7, inner.HostGID+8))
	want(t, "MovePidAbsScm", scm("MovePidAbsScm", victim, "memory", "/"), "1")
	if got := v.Cgroups()[memory.Name]; got != w.Path("c1/c2") {
		t.Errorf("it is in %s", got)
	}
	w.watch = []*harness.Proc{outer.Proc, inner.Proc, u, v}
	low := []harness.Cred{v.Cred, v.Cred}
	for what, attack := range map[string]func() error{
		"an escape further": func() error { return second(c.Scm("MovePidAbsScm", victim, "memory", "/..")) },
		"an escape for one who is not root": func() error {
			return second(c.Scm("MovePidAbsScm", low, "memory", "/"))
		},
		"one who does not own it": func() error { return second(c.Scm("CreateScm", low[:1], "memory", "y")) },
	} {
		w.refused(what, attack)
	}
	want(t, "RemoveScm", scm("RemoveScm", self, "memory", "x", int32(1)), "2")
}

// A connection that was passed on carries the rights of whoever sends, and of
// whoever opened it, also through a proxy.
func TestKernelProxySender(t *testing.T) {
	w := newWorld(t)
	b := w.box("c1")
	x := startProxy(t, b.Proc, w.d.Sock)
	u := b.user(7)
	w.watch = []*harness.Proc{b.Proc, u}
	create := func(c *harness.Conn) error {
		defer c.Close()
		return second(c.V1("Create", "x", []string{}, map[string]string{}))
	}
	fromRoot := b.MustDial(x.sock)
	defer fromRoot.Close()
	w.refused("a user, over root's connection", func() error { return create(fromRoot.Give(u)) })
	fromUser := u.MustDial(x.sock)
	defer fromUser.Close()
	w.refused("root, over a user's connection", func() error { return create(fromUser.Give(b.Proc)) })
	if err := create(b.MustDial(x.sock)); err != nil {
		t.Error(err)
	}
}

// Where /sys/fs/cgroup is the unified hierarchy, the old address is a mount on a
// cgroup, and nothing can be made beside it.
func TestKernelProxyPlacesUnified(t *testing.T) {
	harness.Require(t, "v2")
	w := newWorld(t)
	b := w.box("c1")
	d := filepath.Dir(w.d.Sock)
	script := `
set -e
mount -t tmpfs none /run
mkdir /run/cgmanager
mount --bind ` + d + ` /run/cgmanager
mount -t tmpfs none /sys/fs/cgroup # not twice the same right above itself: EBUSY
mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup/cgmanager
mount --bind /run/cgmanager /sys/fs/cgroup/cgmanager
unset CGMANAGER_ADDRESS
before=$(cat /proc/self/mountinfo)
proxys() {
	for s in /run/cgmanager/sock /sys/fs/cgroup/cgmanager/sock; do
		[ "$(CGMANAGER_ADDRESS=$s cgm status 2>/dev/null | grep daemon)" = "daemon       pid $1, uid 0" ] || { echo "$s is not the proxy's"; return 1; }
	done
}
for kill in 9 15; do
	cgproxy & pid=$!
	for i in $(seq 300); do proxys $pid >/dev/null && break; sleep 0.1; done
	proxys $pid || exit 1
	kill -$kill $pid
	wait $pid || [ $kill = 9 ]
done
[ "$before" = "$(cat /proc/self/mountinfo)" ] || { echo "$before"; echo ---; cat /proc/self/mountinfo; exit 1; }
ls -d /run/*.lower /sys/fs/cgroup/*.lower 2>/dev/null && { echo "left behind"; exit 1; }
umount /sys/fs/cgroup/cgmanager
rmdir /sys/fs/cgroup/cgmanager
echo fine
`
	child := b.Launch(nil, "/usr/bin/unshare", "-C", "/bin/bash", "-c", "exec 2>&1; export PATH="+filepath.Dir(harness.Binary(t, "cgm"))+":/usr/sbin:/sbin:$PATH\n"+script)
	out, err := child.Said(cgtest.Patience(45 * time.Second))
	if err != nil {
		t.Error(err)
	}
	status, err := child.End(cgtest.Patience(10 * time.Second))
	if err != nil || !status.Exited() || status.ExitStatus() != 0 || !strings.HasSuffix(out, "fine\n") || strings.Contains(out, "left behind") {
		t.Errorf("exit %#x: %s", status, out)
	}
}
