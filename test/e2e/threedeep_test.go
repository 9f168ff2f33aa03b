package e2e_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// ownCgroups gives the puppet, with all that it starts from then on, a cgroup
// namespace whose root is where it is.
var ownCgroups = harness.Inside("ownCgroups", func(struct{}) (int, error) {
	return 0, os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWCGROUP))
})

// proxyMounts is what an administrator puts into a container that is to have a
// proxy: the directory of the socket around it ($1), and file systems of its own.
// The host's socket ($2) is there for comparison.
const proxyMounts = `set -e
mount -t tmpfs aside /mnt
mkdir /mnt/run /mnt/host
mount --bind "$1" /mnt/run
mount --bind "$2" /mnt/host
mount -t tmpfs run /run
chmod 755 /run
mkdir /run/cgmanager /run/host
mount --bind /mnt/host /run/host
mount --bind /mnt/run /run/cgmanager
mount -o remount,bind,ro /run/cgmanager
mount -t tmpfs cgroup /sys/fs/cgroup
if [ "$3" = unified ]; then
	mount -t cgroup2 cgroup /sys/fs/cgroup
else
	chmod 755 /sys/fs/cgroup
	mkdir /sys/fs/cgroup/cgmanager
	mount --bind /mnt/run /sys/fs/cgroup/cgmanager
	mount -o remount,bind,ro /sys/fs/cgroup/cgmanager
fi`

const (
	usualSock = "/run/cgmanager/sock"
	hostSock  = "/run/host/sock"
)

// threeDeep makes containers A, B in it and C in B, each of namespaces of its
// own for users, processes, mounts and cgroups, and with a proxy at the usual
// places that asks the one at the usual places around it.
func threeDeep(w *world) (all []*box) {
	w.Helper()
	layout := "v1"
	if hs := controllers(); len(hs) == 1 && hs[0].V2 {
		layout = "unified"
	}
	for level := range 3 {
		var b *box
		socket, host := w.d.Dir, w.d.Dir
		if level == 0 {
			b = w.box("c1")
		} else {
			b = all[level-1].box(fmt.Sprint("c", level+1))
			socket, host = "/run/cgmanager", "/run/host"
		}
		if err := b.Run(ownCgroups, struct{}{}, nil); err != nil {
			w.Fatal(err)
		}
		if out, code := b.Exec(nil, "/bin/bash", "-c", proxyMounts, "bash", socket, host, layout); code != 0 {
			w.Fatalf("the mounts of %s: %d, %s", b.cg, code, out)
		}
		dir := harness.PublicDir(w.T)
		if err := os.Chown(dir, int(b.HostUID), int(b.HostGID)); err != nil {
			w.Fatal(err)
		}
		runProxy(w.T, b.Proc, dir, "/run/cgproxy/sock")
		all = append(all, b)
	}
	return all
}

// Three containers one in another, unprivileged and each with a proxy of its own:
// root of each does with what is below its cgroup what cgmanager is for, by plain
// dbus-send and by cgm, which know nothing of it, and is answered as without
// proxies.
func TestKernelDeepProxies(t *testing.T) {
	harness.Require(t, "dbus-send", "setpriv", "unshare", "mount")
	w := newWorld(t)
	for i, b := range threeDeep(w) {
		name := string("ABC"[i])
		t.Run(name, func(t *testing.T) {
			w := w.sub(t)
			b := &box{w: w, Proc: b.Proc, cg: b.cg, first: b.first}
			out, _ := b.Exec(nil, "/bin/cat", "/proc/self/cgroup")
			for h, cg := range harness.ParseCgroups(out) {
				want(t, h+": the cgroup that it sees itself in", cg, "/")
			}
			socks := []string{usualSock}
			if out, _ := b.Exec(nil, "/bin/sh", "-c", "ls /sys/fs/cgroup"); strings.Contains(out, "cgmanager\nmanager\n") {
				socks = append(socks, "/sys/fs/cgroup/cgmanager/sock", "/sys/fs/cgroup/manager")
			}
			for _, sock := range socks {
				t.Run("dbus-send "+sock, func(t *testing.T) { deepDay(w.sub(t), b, sock, false) })
			}
			t.Run("cgm", func(t *testing.T) { deepDay(w.sub(t), b, "", true) })
			t.Run("cgm, a whole day", func(t *testing.T) { deepCgm(w.sub(t), b) })
			t.Run("absolute names", func(t *testing.T) { deepAbs(w.sub(t), b) })
			if !harness.Emulated() || name == "C" {
				t.Run("the same answers", func(t *testing.T) { deepSame(w.sub(t), b) })
			}
		})
	}
}

// deepDay creates, limits, moves, freezes, lists and deletes; after each command
// the host sees what it did.
func deepDay(w *world, b *box, sock string, cgm bool) {
	t := w.T
	memory, pids, freezer := harness.Find(t, "memory"), harness.Find(t, "pids"), harness.Find(t, "freezer")
	v := launch(t, b.Proc, "/bin/sleep", "300")
	victim := hostChild(t, b.Proc, v.PID)
	in := func(cg string) func() {
		return func() {
			t.Helper()
			all := harness.CgroupsOf(victim)
			for _, h := range controllers() {
				want(t, h.Name+": where it is", all[h.Name], w.Path(cg))
			}
		}
	}
	reads := func(h harness.Hierarchy, file, value string) func() {
		return func() { t.Helper(); want(t, file, w.Read(h, b.cg+"/day", file), value) }
	}
	frozen := func() { // on v1 once it stands still
		t.Helper()
		eventually(t, "it is frozen", func() bool { return w.Read(freezer, b.cg+"/day", "freezer.state") == "FROZEN" })
	}
	there := func(is bool) func() {
		return func() {
			t.Helper()
			for _, h := range controllers() {
				want(t, h.Name+": it exists", w.Exists(h, b.cg+"/day"), is)
			}
		}
	}
	for _, step := range []struct {
		dbus, cgm string
		says      string // "" for nothing
		check     func()
	}{
		{"$I.Create string:all string:day", "create all day", "", there(true)},
		{"$I.SetValue string:pids string:day string:pids.max string:33", "setvalue pids day pids.max 33", "", reads(pids, "pids.max", "33")},
		{
			"$I.SetValue string:memory string:day string:memory.limit_in_bytes string:64M", "set day memory.limit=64M", "",
			reads(memory, "memory.limit_in_bytes", "67108864"),
		},
		{"$J.GetValue string:day array:string:memory.limit", "get day memory.limit", "67108864", nil},
		{"$I.MovePid string:all string:day int32:$V", "movepid all day $V", "", in(b.cg + "/day")},
		{"$I.SetValue string:freezer string:day string:freezer.state string:FROZEN", "freeze day", "", frozen},
		{"$I.GetTasks string:memory string:day", "gettasks memory day", fmt.Sprint(v.PID), nil},
		{"$I.ListChildren string:memory string:", "listchildren memory ''", "day", nil},
		{"$J.SetValue string:day dict:string:string:state,thawed", "thaw day", "", reads(freezer, "freezer.state", "THAWED")},
		{"$I.GetPidCgroup string:memory int32:$V", "getpidcgroup memory $V", "day", nil},
		{"$I.MovePid string:all string: int32:$V", "movepid all '' $V", "", in(b.cg)},
		{"$I.Remove string:all string:day int32:1", "remove all day", "", there(false)},
	} {
		command := "cgm " + step.cgm
		env := "unset CGMANAGER_ADDRESS; V=" + fmt.Sprint(v.PID) + "; "
		if !cgm {
			env += "I=" + harness.V0 + " J=" + harness.V1 + "; "
			command = "dbus-send --peer=unix:path=" + sock + " --print-reply --reply-timeout=60000 /org/linuxcontainers/cgmanager " + step.dbus
		}
		out, code := b.sh(sock, env+command)
		if code != 0 || !strings.Contains(out, step.says) || cgm && step.says == "" && out != "" {
			t.Fatalf("%s: %d, %q, want %q", command, code, out, step.says)
		}
		if step.check != nil {
			step.check()
		}
	}
}

// deepAbs: what counts from the proxy's cgroup with one, and from the requestor's
// own without.
func deepAbs(w *world, b *box) {
	t := w.T
	for _, cg := range []string{"/low", "/low/x"} {
		w.Make(b.cg+cg, b.HostUID, b.HostGID)
	}
	u, v := b.user(0), b.user(7)
	pid := v.NSpid()[b.level()]
	ask := func(sock, command string) (string, int) {
		t.Helper()
		return u.Exec(nil, "/bin/sh", "-c", "dbus-send --peer=unix:path="+sock+
			" --print-reply=literal --reply-timeout=60000 /org/linuxcontainers/cgmanager "+harness.V0+"."+command+fmt.Sprint(" int32:", pid))
	}
	w.Place(u, b.cg+"/low")
	w.Place(v, b.cg+"/low/x")
	for sock, cg := range map[string]string{hostSock: "/x", usualSock: "/low/x"} {
		out, code := ask(sock, "GetPidCgroupAbs string:memory")
		if want := "   " + cg; code != 0 || strings.TrimSpace(out) != strings.TrimSpace(want) {
			t.Errorf("GetPidCgroupAbs by %s: %d, %q, want %q", sock, code, out, want)
		}
	}
	w.watch = []*harness.Proc{b.Proc, u, v}
	attacks := map[string]func() error{}
	for what, command := range map[string][2]string{
		"without a proxy":          {hostSock, "MovePidAbs string:memory string:/"},
		"without a proxy, all":     {hostSock, "MovePidAbs string:all string:/low"},
		"further than the proxy":   {usualSock, "MovePidAbs string:memory string:/.."},
		"further, without a slash": {usualSock, "MovePidAbs string:memory string:.."},
		"further, to a name":       {usualSock, "MovePidAbs string:memory string:" + w.Path("")},
	} {
		attacks[what] = func() error {
			out, code := ask(command[0], command[1])
			if code == 0 {
				return nil
			}
			name, text, _ := strings.Cut(strings.TrimPrefix(out, "Error "), ": ")
			return &harness.DBusError{Name: name, Text: strings.ReplaceAll(text, w.Path(""), "")}
		}
	}
	w.refusedAll(attacks)
	if out, code := ask(usualSock, "MovePidAbs string:all string:/"); code != 0 {
		t.Errorf("MovePidAbs: %s", out)
	}
	want(t, "where MovePidAbs put it", w.in(v), b.cg)
	w.Place(v, b.cg+"/low/x")
	if out, code := ask(usualSock, "MovePidAbs string:all string:/low"); code != 0 {
		t.Errorf("MovePidAbs: %s", out)
	}
	want(t, "where MovePidAbs put it", w.in(v), b.cg+"/low")
	u.Stop()
	v.Stop()
	c := b.MustDial(usualSock)
	defer c.Close()
	asker{t, c}.v0("Remove", "all", "low", int32(1))
}

// deepSame: with proxies and without, every plain call has the same answer.
func deepSame(w *world, b *box) {
	t := w.T
	var answers [2][]string
	for i, sock := range []string{hostSock, usualSock} {
		answers[i] = b.answers(sock, sameCommands)
		c := b.MustDial(hostSock)
		for _, name := range []string{"a", "all", "slash", "new", "mine", "inner", "x"} {
			_, _ = c.V1("DeleteForce", name)
		}
		left, err := c.V1("ListChildren", "")
		c.Close()
		if err != nil {
			t.Fatal(err)
		}
		if names, _ := left[0].([]string); slices.ContainsFunc(names, func(s string) bool { return !strings.HasPrefix(s, "c") }) {
			t.Fatalf("left behind: %q", names)
		}
	}
	done := 0
	for i, command := range sameCommands {
		if answers[0][i] != answers[1][i] {
			t.Errorf("$ %s\nby the proxy:\n%s\nby the daemon:\n%s", command, answers[1][i], answers[0][i])
		}
		if strings.HasSuffix(answers[0][i], "[exit 0]") {
			done++
		}
	}
	if done < 25 || len(sameCommands)-done < 20 {
		t.Errorf("%d of %d commands succeeded", done, len(sameCommands))
	}
}
