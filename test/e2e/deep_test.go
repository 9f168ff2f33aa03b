package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// enterMounts takes the puppet, with all that it starts from then on, to the
// mount namespace of a process.
var enterMounts = harness.Inside("enterMounts", func(pid int) (int, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	// Threads that share their root and working directory cannot change it.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return 0, os.NewSyscallError("unshare", err)
	}
	return 0, os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWNS))
})

// containerMounts is what an administrator puts into a container: nothing of
// the cgroup file system, and the daemon's sockets from around it.
const containerMounts = `set -e
mount -t tmpfs aside /mnt
mkdir /mnt/run; mount --bind /run/cgmanager /mnt/run
touch /mnt/sock; mount --bind /sys/fs/cgroup/manager /mnt/sock
mount -t tmpfs run /run
chmod 755 /run
mkdir /run/cgmanager; mount --bind /mnt/run /run/cgmanager
mount -o remount,bind,ro /run/cgmanager
mount -t tmpfs cgroup /sys/fs/cgroup
chmod 755 /sys/fs/cgroup
touch /sys/fs/cgroup/manager; mount --bind /mnt/sock /sys/fs/cgroup/manager`

// The daemon's purpose in one test: on its usual sockets it serves a process
// three namespaces deep that has nothing but the socket from around it, which
// gets what is its own done, by cgm and by calls, and nothing else.
func TestKernelThreeNamespacesDeep(t *testing.T) {
	harness.Require(t, "root", "userns", "unshare", "mount")
	w := &world{T: t, Tree: harness.NewTree(t)}
	p := harness.Start(t, harness.Spec{})
	dir := harness.PublicDir(t)
	host := mountHost(t, p, dir, hostMounts)
	if err := p.Run(enterMounts, host.PID, nil); err != nil {
		t.Fatal(err)
	}
	d := p.Launch(nil, "/bin/bash", "-c", `exec "$@" 2>"$0"`, dir+"/log", harness.Binary(t, "cgmanager"))
	t.Cleanup(func() {
		terminate(t, d)
		if t.Failed() {
			log, err := os.ReadFile(dir + "/log")
			t.Logf("the daemon's log: %v\n%s", err, log)
		}
	})
	socket := fmt.Sprintf("/proc/%d/root/sys/fs/cgroup/manager", host.PID)
	eventually(t, "the daemon serves", func() bool { return harness.Ping(socket) == nil })

	// Each container gets its mounts before there is one in it.
	around := []*box{w.placed(p.Spawn(boxSpec(0)), "c1")}
	for level := 1; ; level++ {
		b := around[level-1]
		if out, code := b.Exec(nil, "/bin/bash", "-c", containerMounts); code != 0 {
			t.Fatalf("the mounts of %s: %d, %s", b.cg, code, out)
		}
		if level == 3 {
			break
		}
		around = append(around, b.box(fmt.Sprint("c", level+1)))
	}
	b := around[2]
	w.watch = []*harness.Proc{p, around[0].Proc, around[1].Proc}
	if out, code := b.Exec(nil, "/bin/bash", "-c", "ls -dA /run/cg* /run/cgmanager/* /sys/fs/cgroup/*"); code != 0 ||
		out != "/run/cgmanager\n/run/cgmanager/sock\n/sys/fs/cgroup/manager\n" {
		t.Fatalf("the innermost container sees more: %d\n%s", code, out)
	}

	t.Run("cgm", func(t *testing.T) { deepCgm(w.sub(t), b) })
	for _, sock := range []string{"/sys/fs/cgroup/manager", "/run/cgmanager/sock"} {
		t.Run(sock, func(t *testing.T) {
			s := w.sub(t)
			s.d = &harness.Daemon{Sock: sock}
			plainCGManager1(s, b)
			plainCGManager0(s, b)
			scmCalls(s, b, b)
		})
	}
	t.Run("nothing else", func(t *testing.T) { deepRefused(w.sub(t), b, around[1]) })
	// The sockets are the host's: they cannot be replaced for others.
	for _, cmd := range []string{
		"rm -f /run/cgmanager/sock", "touch /run/cgmanager/x", "rm -f /sys/fs/cgroup/manager",
		"mount -o remount,bind,rw /run/cgmanager && touch /run/cgmanager/x",
	} {
		if out, code := b.Exec(nil, "/bin/bash", "-c", cmd); code == 0 {
			t.Errorf("%s: done, %q", cmd, out)
		}
	}
	if err := harness.Ping(socket); err != nil {
		t.Errorf("the daemon in the end: %v", err)
	}
}

// deepCgm is a day in the innermost container, by the real program, which
// finds the daemon by itself.
func deepCgm(w *world, b *box) {
	t := w.T
	memory := harness.Find(t, "memory")
	web := b.cg + "/web"
	bin := harness.Binary(t, "cgm")
	cgm := func(want string, args ...string) {
		t.Helper()
		if out, code := b.Exec(nil, append([]string{bin}, args...)...); code != 0 || out != want {
			t.Fatalf("cgm %q: %d, %q, want %q", args, code, out, want)
		}
	}
	inside := "" // the cgroup of a container inside
	if all, _ := filepath.Glob(w.Dir(memory, b.cg) + "/c*[0-9]"); len(all) > 0 {
		inside = filepath.Base(all[0]) + "\n"
	}
	cgm("", "create", "all", "web")
	cgm("", "set", "web", "memory.limit=64M", "pids.limit=20")
	want(t, "memory.limit_in_bytes", w.Read(memory, web, "memory.limit_in_bytes"), "67108864")
	cgm("67108864\n", "get", "web", "memory.limit")
	cgm(inside+"web\n", "listchildren", "memory", "")
	for _, h := range controllers() {
		want(t, h.Name+": owner", w.owner(h, web, ""), fmt.Sprintf("%d:%[1]d", b.first))
	}

	// It moves itself.
	self := b.Launch(nil, "/bin/bash", "-c", `"$0" movepid all web $$; printf '\0'; read -r`, bin)
	if said, err := self.Said(cgtest.Patience(10 * time.Second)); err != nil || said != "" {
		t.Fatalf("cgm movepid: %q, %v", said, err)
	}
	all := harness.CgroupsOf(hostChild(t, b.Proc, self.PID))
	for _, h := range controllers() {
		want(t, h.Name+": where it is", all[h.Name], w.Path(web))
	}
	cgm(strconv.Itoa(self.PID)+"\n", "gettasks", "memory", "web")
	cgm("web\n", "getpidcgroup", "memory", strconv.Itoa(self.PID))
	if ws, err := self.End(cgtest.Patience(5 * time.Second)); err != nil || ws.Signaled() {
		t.Errorf("its end: %v, %v", ws, err)
	}
	cgm("", "remove", "all", "web")
	for _, h := range controllers() {
		if w.Exists(h, web) {
			t.Errorf("%s: web is still there", h.Name)
		}
	}
	// All of it at once.
	cgm("33554432\n", "run", "job", "--set", "memory.limit=32M", "--", bin, "get", "", "memory.limit")
	for _, h := range controllers() {
		eventually(t, h.Name+": job is removed", func() bool { return !w.Exists(h, b.cg+"/job") })
	}
}

// deepRefused tries what is not b's own: the container around it, whatever it
// is called.
func deepRefused(w *world, b, around *box) {
	t := w.T
	c := b.MustDial("/sys/fs/cgroup/manager")
	defer c.Close()
	bin := harness.Binary(t, "cgm")
	attacks := map[string]func() error{}
	for _, up := range []string{"..", "/" + b.cg, "/" + around.cg, w.Path(around.cg), "../../" + filepath.Base(around.cg), "./.."} {
		limit := map[string]string{"memory.limit": "1M"}
		if strings.HasPrefix(up, ".") { // "/x" is x in its own cgroup: nothing to refuse
			attacks["CGManager1 Create "+up] = func() error { return second(c.V1("Create", up+"/x", []string{}, limit)) }
			attacks["cgmanager0_0 Create "+up] = func() error { return second(c.V0("Create", "memory", up+"/x")) }
		}
		for member, args := range map[string][]any{
			"SetValue":     {up, limit},
			"GetValue":     {up, []string{"memory.limit"}},
			"Move":         {up, uint32(b.PID)},
			"Chown":        {up, uint32(0), uint32(0)},
			"ListChildren": {up},
			"ListTasks":    {up},
			"Kill":         {up},
			"Delete":       {up},
		} {
			attacks["CGManager1 "+member+" "+up] = func() error { return second(c.V1(member, args...)) }
		}
		for member, args := range map[string][]any{
			"SetValue":     {"memory", up, "memory.limit_in_bytes", "1M"},
			"MovePid":      {"memory", up, b.PID},
			"MovePidAbs":   {"memory", up, b.PID},
			"Chown":        {"memory", up, int32(0), int32(0)},
			"Chmod":        {"memory", up, "", int32(0o777)},
			"GetTasks":     {"memory", up},
			"ListChildren": {"memory", up},
			"ListKeys":     {"memory", up},
		} {
			attacks["cgmanager0_0 "+member+" "+up] = func() error { return second(c.V0(member, args...)) }
		}
	}
	// Its own limits are those of the container around, too.
	attacks["its own limit"] = func() error {
		return second(c.V1("SetValue", "", map[string]string{"memory.limit": "max"}))
	}
	// A number that it does not know is nobody's, also where it is somebody's
	// outside.
	attacks["a process outside"] = func() error {
		return second(c.V0("MovePid", "memory", "", int32(around.HostPID)))
	}
	w.watched("nothing else", func() { w.RefusedAll(t, attacks) })

	before := w.Snapshot()
	for _, args := range [][]string{
		{"create", "memory", "../x"},
		{"set", "..", "memory.limit=1M"},
		{"get", "..", "memory.limit"},
		{"movepid", "memory", "..", "1"},
		{"listchildren", "memory", ".."},
		{"gettasks", "memory", ".."},
		{"remove", "memory", ".."},
		{"chown", "memory", "..", "0", "0"},
		{"kill", ".."},
		{"freeze", ".."},
	} {
		out, code := b.Exec(nil, append([]string{bin}, args...)...)
		if code != 1 || out == "" {
			t.Errorf("cgm %q: %d, %q", args, code, out)
		}
		if why := harness.Unclean(&harness.DBusError{Name: "org.freedesktop.DBus.Error.AccessDenied", Text: out}); why != "" {
			t.Errorf("cgm %q: %s: %s", args, why, out)
		}
	}
	if d := before.Diff(w.Snapshot()); len(d) > 0 {
		t.Errorf("cgm changed\n  %s", strings.Join(d, "\n  "))
	}
}
