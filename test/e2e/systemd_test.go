package e2e_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// unit is a shell in a unit of systemd's, with the daemon's address.
type unit struct {
	t    *testing.T
	in   io.WriteCloser
	out  *bufio.Reader
	done chan struct{}
	path string // of its cgroup
}

var units int

// startUnit starts one: a service with these properties.
func startUnit(t *testing.T, d *harness.Daemon, properties ...string) *unit {
	t.Helper()
	units++
	args := []string{"--quiet", "--collect", "--pipe", fmt.Sprintf("--unit=cgmtest-%d-%d", os.Getpid(), units)}
	for _, p := range properties {
		args = append(args, "-p", p)
	}
	args = append(args, "-E", "CGMANAGER_ADDRESS=unix:path="+d.Sock, "-E", "PATH="+filepath.Dir(harness.Binary(t, "cgm"))+":/usr/bin:/bin", "sh")
	cmd := exec.Command("systemd-run", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	u := &unit{t: t, in: in, out: bufio.NewReader(out), done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(u.done)
	}()
	t.Cleanup(u.end)
	// The scopes that it was given would go when a daemon looks after them.
	t.Cleanup(func() { _ = exec.Command("systemctl", "stop", "cgm-*.scope").Run() })
	u.path = u.cgroup(u.must("echo $$"))
	return u
}

// loginSession starts a session of a user, as a login does.
func loginSession(t *testing.T, d *harness.Daemon) *unit {
	t.Helper()
	u := startUnit(t, d, "User=u1", "PAMName=login")
	if !strings.HasPrefix(u.path, "/user.slice/user-1000.slice/session-") {
		t.Fatalf("a session's process is in %s", u.path)
	}
	return u
}

// end ends the shell, and waits until its unit has ended.
func (u *unit) end() {
	_ = u.in.Close()
	select {
	case <-u.done:
	case <-time.After(cgtest.Patience(30 * time.Second)):
		u.t.Error("the unit does not end")
	}
}

var verdict = regexp.MustCompile(`^<end (\d+)>\n$`)

// run runs a command in it and returns its output.
func (u *unit) run(command string) (string, int) {
	u.t.Helper()
	if _, err := fmt.Fprintf(u.in, "{ %s\n} 2>&1; echo \"<end $?>\"\n", command); err != nil {
		u.t.Fatal(err)
	}
	type answer struct {
		out  string
		code int
	}
	got := make(chan answer, 1)
	go func() {
		var out strings.Builder
		for {
			line, err := u.out.ReadString('\n')
			if m := verdict.FindStringSubmatch(line); m != nil {
				code, _ := strconv.Atoi(m[1])
				got <- answer{out.String(), code}
				return
			}
			out.WriteString(line)
			if err != nil {
				got <- answer{out.String() + err.Error(), -1}
				return
			}
		}
	}()
	select {
	case a := <-got:
		return strings.TrimSuffix(a.out, "\n"), a.code
	case <-time.After(scriptTime()):
		u.t.Fatalf("%s: no answer", command)
		return "", -1
	}
}

func (u *unit) must(command string) string {
	u.t.Helper()
	out, code := u.run(command)
	if code != 0 {
		u.t.Fatalf("%s: %d: %s", command, code, out)
	}
	return out
}

// launch starts a command in the background that becomes a sleep, and returns its
// pid.
func (u *unit) launch(command string) string {
	u.t.Helper()
	out := u.must("log=$(mktemp); " + command + ` >$log 2>&1 & p=$!
		for i in $(seq 300); do
			c=$(cat /proc/$p/comm 2>/dev/null) || break
			[ "$c" != sleep ] || break
			sleep 0.2
		done
		echo $c; cat $log; rm $log; echo $p`)
	pid, ok := strings.CutPrefix(out, "sleep\n")
	if !ok {
		u.t.Fatalf("%s: %s", command, out)
	}
	return pid
}

// refused runs a command that must fail and say all these words.
func (u *unit) refused(command string, words ...string) {
	u.t.Helper()
	out, code := u.run(command)
	if code == 0 {
		u.t.Errorf("%s: not refused: %s", command, out)
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			u.t.Errorf("%s: refused with %q, want something about %q", command, out, w)
		}
	}
}

// cgroup returns where a process is in the hierarchy by which systemd knows its
// units.
func (u *unit) cgroup(pid string) string {
	u.t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil {
		u.t.Fatal(err)
	}
	return harness.CgroupsOf(n)["unified"]
}

// dirOf is the directory of a cgroup in the hierarchy of a controller.
func dirOf(t *testing.T, ctrl, path string) string {
	t.Helper()
	return filepath.Join(harness.Find(t, ctrl).Mount, path)
}

func readAt(t *testing.T, dir string, names ...string) string {
	t.Helper()
	var err error
	for _, n := range names {
		var b []byte
		if b, err = os.ReadFile(filepath.Join(dir, n)); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	t.Fatal(err)
	return ""
}

func command(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return string(out)
}

// scopesOf returns the scopes that stand for a session of the user's.
func scopesOf(t *testing.T, session string) []string {
	t.Helper()
	dirs, err := filepath.Glob(dirOf(t, "unified", "/user.slice/user-1000.slice/cgm-*"+session))
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

// within waits until what is asked for holds.
func within(t *testing.T, what string, wait time.Duration, f func() bool) {
	t.Helper()
	for end := time.Now().Add(cgtest.Patience(wait)); !f(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("%s: not within %v", what, wait)
			return
		}
	}
}

// A login user's process creates, limits, fills and delegates through the socket,
// in a scope of its own, and systemd leaves all of it alone.
func TestKernelSystemdSession(t *testing.T) {
	harness.Require(t, "root", "systemd")
	d := harness.StartDaemon(t)
	s := loginSession(t, d)
	session := filepath.Base(s.path)

	s.must("cgm status; cgm tree")
	if got := scopesOf(t, session); len(got) > 0 {
		t.Errorf("a request that changes nothing made %v", got)
	}
	scope := "/user.slice/user-1000.slice/cgm-1000-" + session
	pid := s.launch("cgm run web --set memory.limit=64M --set pids.limit=50 -- sleep 1000")
	shell := s.must("echo $$")
	// Below what it was given the user manages by itself.
	ci := s.launch("sh -c 'exec cgm delegate ci --set memory.limit=128M -- sleep 1000 2>/dev/null'")
	own := dirOf(t, "pids", scope+"/ci/own")
	s.must("mkdir " + own + " && echo 9 >" + own + "/pids.max")
	delegated := harness.CgroupsOf(mustAtoi(t, ci))

	check := func(when string) {
		t.Helper()
		n, _ := strconv.Atoi(pid)
		for _, h := range harness.Hierarchies() {
			at := harness.CgroupsOf(mustAtoi(t, ci))[h.Name]
			want(t, when+": where the delegated process is in "+h.Name, at, delegated[h.Name])
			if !h.Named() && !strings.HasPrefix(at+"/", scope+"/ci/") {
				t.Errorf("%s: the delegated process is in %s of %s", when, at, h.Name)
			}
		}
		want(t, when+": memory limit of the delegated", readAt(t, dirOf(t, "memory", scope+"/ci"), "memory.max", "memory.limit_in_bytes"), "134217728")
		want(t, when+": pids limit below it", s.must("cat "+own+"/pids.max"), "9")
		for _, h := range harness.Hierarchies() {
			if !h.Named() {
				want(t, when+": where the process is in "+h.Name, harness.CgroupsOf(n)[h.Name], scope+"/web")
			}
		}
		want(t, when+": where the shell is", s.cgroup(shell), s.path)
		memory, pids := dirOf(t, "memory", scope+"/web"), dirOf(t, "pids", scope+"/web")
		want(t, when+": memory limit", readAt(t, memory, "memory.max", "memory.limit_in_bytes"), "67108864")
		want(t, when+": pids limit", readAt(t, pids, "pids.max"), "50")
		want(t, when+": memory limit as the user reads it", s.must("cgm get web memory.limit"), "67108864")
		for _, h := range harness.Hierarchies() {
			if h.Named() && h.Name != "name=systemd" {
				continue
			}
			dir := filepath.Join(h.Mount, scope)
			for name, uid := range map[string]uint32{"": 1000, "cgroup.procs": 1000, "pids.max": 0, "memory.max": 0, "memory.limit_in_bytes": 0, "cpu.shares": 0} {
				var st unix.Stat_t
				if err := unix.Stat(filepath.Join(dir, name), &st); err == nil {
					want(t, when+": owner of "+name+" in "+h.Name, st.Uid, uid)
				} else if name == "" {
					t.Errorf("%s: %v", when, err)
				}
			}
		}
		want(t, when+": systemd's view", strings.TrimSpace(command(t, "systemctl", "is-active", filepath.Base(scope))), "active")
		want(t, when+": the scopes", len(scopesOf(t, session)), 1)
	}
	check("at first")
	s.refused("cgm set '' memory.limit=1G", "")
	s.refused("cgm run ../x -- true", "..")

	// What the shell itself is in stays systemd's, and it may enter.
	want(t, "the shell's controllers", readAt(t, dirOf(t, "unified", s.path), "cgroup.subtree_control"), "")
	s.must("sleep 1000 & mv=$!; cgm movepid " + oneController() + " web $mv && grep -q " + scope + "/web /proc/$mv/cgroup")

	bystander := fmt.Sprintf("cgmtest-bystander-%d.service", os.Getpid())
	command(t, "systemd-run", "--quiet", "--unit="+bystander, "sleep", "1000")
	defer command(t, "systemctl", "stop", bystander)
	command(t, "systemctl", "daemon-reload")
	command(t, "systemctl", "restart", bystander)
	check("after a reload and a restart")

	cgls := command(t, "systemd-cgls", "--no-pager", "-u", "user-1000.slice")
	for _, part := range []string{filepath.Base(scope), "web", pid + " sleep 1000", "ci", ci + " sleep 1000", "--hold-scope", session} {
		if !strings.Contains(cgls, part) {
			t.Errorf("systemd-cgls does not show %q", part)
		}
	}
	t.Logf("systemd-cgls:\n%s", cgls)

	out := s.must("cgm delegate job --set memory.limit=128M -- sh -c 'echo $CGM_CGROUP'")
	if !strings.Contains(out, scope+"/job") {
		t.Errorf("delegate says %q", out)
	}

	// The next daemon finds the scope again.
	d2 := harness.StartDaemon(t)
	s.must("export CGMANAGER_ADDRESS=unix:path=" + d2.Sock)
	s.must("cgm run again -- true")
	check("with another daemon")

	// Nothing stays when all has ended.
	s.must("rmdir " + own + "; kill $mv " + pid + " " + ci)
	s.end()
	within(t, "the session's cgroup goes", 20*time.Second, func() bool { return !there(dirOf(t, "unified", s.path)) })
	within(t, "the scope goes", 90*time.Second, func() bool {
		for _, h := range harness.Hierarchies() {
			if there(filepath.Join(h.Mount, scope)) {
				return false
			}
		}
		return true
	})
	if f, ok := freezer(); ok {
		within(t, "what was made on the way to the scope goes", 20*time.Second, func() bool { return !there(filepath.Join(f.Mount, "user.slice")) })
	}
}

// oneController names a controller of the hierarchy by which systemd knows its
// units, for a client that has to name one.
func oneController() string {
	for _, h := range harness.Hierarchies() {
		if h.Name == "memory" {
			return "all"
		}
	}
	return "memory"
}

func freezer() (harness.Hierarchy, bool) {
	for _, h := range harness.Hierarchies() {
		if h.Name == "freezer" {
			return h, true
		}
	}
	return harness.Hierarchy{}, false
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Who may have no scope is told what to do. Nobody leaves a limit by having one.
func TestKernelSystemdRefusals(t *testing.T) {
	harness.Require(t, "root", "systemd")
	d := harness.StartDaemon(t)
	const hint = "Delegate=yes"

	t.Run("service", func(t *testing.T) {
		s := startUnit(t, d, "User=u1", "MemoryMax=100M")
		s.refused("cgm run x -- true", hint, "clause 3")
		s.refused("cgm kill ''", hint)
		s.must("cgm status")
	})
	t.Run("delegated service", func(t *testing.T) {
		s := startUnit(t, d, "User=u1", "MemoryMax=100M", "Delegate=yes")
		if !harness.Find(t, "memory").V2 {
			// systemd gives nothing of v1 away but to root.
			s.refused("cgm run x -c memory -- true", "neither its owner")
			return
		}
		pid := s.launch("cgm run x -c memory --set memory.limit=32M -- sleep 1000")
		n, _ := strconv.Atoi(pid)
		cg := harness.CgroupsOf(n)
		at, ok := cg["memory"]
		if !ok {
			at = cg["unified"]
		}
		want(t, "where it runs", at, s.path+"/x")
		s.must("kill " + pid)
	})
	t.Run("container", func(t *testing.T) {
		s := startUnit(t, d, "User=u1")
		s.refused("unshare -Ur cgm run x -- true", hint)
	})
	t.Run("limits", func(t *testing.T) {
		s := loginSession(t, d)
		session := filepath.Base(s.path)
		command(t, "systemctl", "set-property", "--runtime", session, "MemoryMax=200M")
		s.refused("cgm run x -- true", "limit", "memory")
		want(t, "scopes", len(scopesOf(t, session)), 0)
		command(t, "systemctl", "set-property", "--runtime", session, "MemoryMax=infinity")
		s.must("cgm run x -- true")
		want(t, "scopes", len(scopesOf(t, session)), 1)
		// A limit that comes later holds whoever has not left.
		command(t, "systemctl", "set-property", "--runtime", session, "MemoryMax=200M")
		s.refused("cgm run y -- true", "limit", "memory")
		want(t, "where the shell is", s.cgroup(s.must("echo $$")), s.path)

		// Somebody else in that slice, as after su.
		other := harness.Start(t, harness.Spec{UID: 1001, GID: 1001})
		for _, h := range harness.Hierarchies() {
			dir := filepath.Join(h.Mount, harness.CgroupsOf(mustAtoi(t, s.must("echo $$")))[h.Name])
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(other.HostPID)), 0); err != nil {
				t.Fatal(err)
			}
		}
		c := other.MustDial(d.Sock)
		defer c.Close()
		_, err := c.V1("Create", "x", []string{}, map[string]string{})
		if err == nil || !strings.Contains(err.Error(), hint) {
			t.Errorf("another user's request: %v", err)
		}
	})
	t.Run("host root", func(t *testing.T) {
		s := startUnit(t, d, "MemoryMax=100M")
		pid := s.launch("cgm run x --set pids.limit=7 -- sleep 1000")
		at := s.cgroup(pid)
		if !strings.HasPrefix(at, "/system.slice/cgm-0-") || !strings.HasSuffix(at, ".scope/x") {
			t.Errorf("host root's command runs in %s", at)
		}
		s.must("kill " + pid)
	})
}

// Realtime concerns no cgroup: whoever systemd has delegated nothing to asks for it as
// anybody does, and is given no scope for it.
func TestKernelSystemdRealtime(t *testing.T) {
	harness.Require(t, "root", "systemd")
	file := filepath.Join(harness.PublicDir(t), "realtime.toml")
	if err := os.WriteFile(file, []byte(anybody), 0o600); err != nil {
		t.Fatal(err)
	}
	d := harness.StartDaemon(t, "--realtime-policy="+file)
	service := startUnit(t, d, "User=u1", "MemoryMax=100M")
	session := loginSession(t, d)
	for what, u := range map[string]*unit{"service": service, "session": session} {
		u.must("cgm rt status; cgm rt list")
		pid := u.launch("sleep 1000")
		u.must("prlimit --pid " + pid + " --rttime=200000; cgm rt grant --policy rr --priority 5 " + pid)
		if got := u.must("chrt -p " + pid); !strings.Contains(got, "SCHED_RR") {
			t.Errorf("%s: %s", what, got)
		}
		u.must("cgm rt revoke " + pid)
		u.must("kill " + pid)
	}
	if got := scopesOf(t, filepath.Base(session.path)); len(got) > 0 {
		t.Errorf("requests for realtime made %v", got)
	}
}

func mustAtoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Without systemd nothing is asked of it, whatever cgroups are called.
func TestKernelSystemdAbsent(t *testing.T) {
	harness.Require(t, "root")
	if b, err := os.ReadFile("/proc/1/comm"); err != nil || string(b) == "systemd\n" {
		return // this host has it
	}
	// What looks like systemd's socket, for the daemon alone.
	listener := listenAsSystemd(t)
	w := &world{T: t, Tree: harness.NewTree(t)}
	d := harness.StartDaemon(t)
	w.d = d
	w.Make("user.slice", 0, 0)
	w.Make("user.slice/user-1000.slice", 0, 0)
	w.Make("user.slice/user-1000.slice/session-1.scope", 1000, 1000)
	p := w.host(1000, "user.slice/user-1000.slice/session-1.scope")
	c := p.MustDial(d.Sock)
	defer c.Close()
	a := asker{t, c}
	want(t, "Create", a.v1("Create", "x", []string{}, map[string]string{})[0], true)
	for _, h := range harness.Hierarchies() {
		if !h.Named() {
			want(t, "where it is made in "+h.Name, w.Exists(h, "user.slice/user-1000.slice/session-1.scope/x"), true)
		}
	}
	// Whoever has connected waits there.
	if err := listener.SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if c, err := listener.Accept(); err == nil {
		c.Close()
		t.Error("the daemon connected to what may be systemd")
	}
	if strings.Contains(d.Log(), "systemd") {
		t.Errorf("the log speaks of it:\n%s", d.Log())
	}
}

// listenAsSystemd listens where systemd would, unless something is there.
func listenAsSystemd(t *testing.T) *net.UnixListener {
	t.Helper()
	const dir = "/run/systemd"
	if there(dir + "/private") {
		t.Fatal("somebody listens at systemd's place")
	}
	var made []string
	for _, p := range []string{dir, dir + "/system"} {
		if err := os.Mkdir(p, 0o755); err == nil {
			made = append(made, p)
		} else if !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/private", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = l.Close()
		for i := range made {
			_ = syscall.Rmdir(made[len(made)-1-i])
		}
	})
	return l
}

// A unit whose ExecReload= is --replace goes on with another main process, and
// its clients notice nothing.
func TestKernelSystemdReplace(t *testing.T) {
	harness.Require(t, "root", "systemd")
	dir := harness.PublicDir(t)
	name := fmt.Sprintf("cgmtest-replace-%d.service", os.Getpid())
	command := fmt.Sprintf("%s --listen %s/sock --state-dir %s/state", harness.Binary(t, "cgmanager"), dir, dir)
	file := filepath.Join("/run/systemd/system", name)
	text := "[Service]\nType=notify\nNotifyAccess=all\nTimeoutStartSec=120\nExecStart=" + command + "\nExecReload=" + command + " --replace --daemon\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	systemctl := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("systemctl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("systemctl %v: %v\n%s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := exec.Command("journalctl", "--no-pager", "-o", "short-precise", "-u", name).CombinedOutput()
			t.Logf("%s", log)
		}
		_ = exec.Command("systemctl", "stop", name).Run()
		_ = os.Remove(file)
		_ = exec.Command("systemctl", "daemon-reload").Run()
	})
	systemctl("daemon-reload")
	systemctl("start", name)
	pid := systemctl("show", "-P", "MainPID", name)
	for range 3 {
		if err := harness.Ping(dir + "/sock"); err != nil {
			t.Error(err)
		}
		systemctl("reload", name)
		now := systemctl("show", "-P", "MainPID", name)
		if state := systemctl("show", "-P", "ActiveState,SubState", name); now == pid || now == "0" || state != "active\nrunning" {
			t.Errorf("process %s, then %s; the unit is %q", pid, now, state)
		}
		fd, err := dialRaw(dir + "/sock")
		if err != nil {
			t.Fatal(err)
		}
		cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		unix.Close(fd)
		if err != nil || strconv.Itoa(int(cred.Pid)) != now {
			t.Errorf("%v serves, the main process is %s (%v)", cred, now, err)
		}
		pid = now
	}
	systemctl("stop", name)
	if got := systemctl("show", "-P", "Result", name); got != "success" {
		t.Errorf("it ended with %s", got)
	}
	if _, err := os.Lstat(dir + "/sock"); err == nil {
		t.Error("the socket is left")
	}
}
