package lxc_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
	"cgmanager/test/lxc"
)

func TestMain(m *testing.M) { harness.Main(m) }

// LXC as Debian packages it, with what packaging/lxc installs.

// TestKernelLXC: what root of a container may do over the socket that appears in
// it, and what not.
func TestKernelLXC(t *testing.T) {
	host := lxc.Host(t)
	t.Run("privileged", func(t *testing.T) { judge(t, host, host) })
	t.Run("unprivileged", func(t *testing.T) { judge(t, host, host.User(t, "users/u1")) })
	gone(t, host)
}

func judge(t *testing.T, host, by *lxc.Site) {
	sibling := by.Start(t, lxc.Config{Name: "sibling", Limits: []string{"pids.limit=99"}})
	c := by.Start(t, lxc.Config{Name: "c1", Limits: []string{"# of c1", "memory.limit=100M", "", "pids.limit=200"}})
	says(t, by, "cgm get lxc.c1 memory.limit pids.limit", "memory.limit=104857600\npids.limit=200\n")
	says(t, &c.Site, "cgm ping && stat -c %a /run/cgmanager/sock; rm /run/cgmanager/sock 2>/dev/null || echo stays", "777\nstays\n")
	works(t, &c.Site)
	if !unified() {
		// The original's address.
		says(t, &c.Site, "cgm --address /sys/fs/cgroup/cgmanager/sock apiversion; rm /sys/fs/cgroup/cgmanager/sock 2>/dev/null || echo stays", "10\nstays\n")
	}
	confined(t, &c.Site, &sibling.Site)
	says(t, by, "cgm get lxc.sibling pids.limit state", "pids.limit=99\nstate=thawed\n")

	// Whatever its root writes, the limit is above, and kills what goes beyond.
	bound(t, &c.Site)
	reboots(t, host, by, c)
	bound(t, &c.Site)
	says(t, by, "cgm get lxc.c1 memory.limit pids.limit", "memory.limit=104857600\npids.limit=200\n")
	// Whoever started it may change the limit.
	by.Do(t, "cgm set lxc.c1 memory.limit=300M")
	says(t, &c.Site, allocate("", 150), "0\n")

	c.Stop(t)
	sibling.Stop(t)
	gone(t, host)
}

// reboots has a container reboot twice: it is where it was, and not one level deeper
// each time.
func reboots(t *testing.T, host, by *lxc.Site, c *lxc.Container) {
	t.Helper()
	where := func() string {
		return host.Do(t, `find /sys/fs/cgroup/ -type d \( -name 'lxc.monitor.*' -o -name 'lxc.payload.*' \) 2>/dev/null | sort`)
	}
	before := where()
	for range 2 {
		first := c.Pid(t)
		by.Do(t, fmt.Sprintf("lxc-stop -P %s -n %s -r", by.Dir, c.Name))
		eventually(t, "it has rebooted", func() bool { p := c.Pid(t); return p != "" && p != first })
		// What LXC makes anew it may not have removed before.
		after := ""
		eventually(t, "after a reboot it is where it was", func() bool { after = where(); return after == before })
		if after != before {
			t.Errorf("after a reboot there are\n%s, before\n%s", after, before)
		}
	}
}

// unified says that no hierarchy is one of v1.
func unified() bool {
	for _, h := range harness.Hierarchies() {
		if !h.V2 {
			return false
		}
	}
	return true
}

func says(t *testing.T, s *lxc.Site, script, want string) {
	t.Helper()
	if got := s.Do(t, script); got != want {
		t.Errorf("%s: %q, want %q", script, got, want)
	}
}

// works has root of a container create, limit, fill, freeze, list and remove: in
// one script, because it takes a second to get into a container.
func works(t *testing.T, s *lxc.Site) {
	t.Helper()
	says(t, s, `set -e
cgm create all web
cgm set web memory.limit=50M pids.limit=20 cpus_number=0.5
cgm get web memory.limit pids.limit cpus_number
sleep 1000 >/dev/null 2>&1 & cgm movepid all web $!
cgm getpidcgroup memory $!
cgm gettasks memory web | wc -l
cgm freeze web; until cgm get web state | grep -x frozen; do sleep 0.1; done; cgm thaw web
cgm tree web | grep -o 50.0M
cgm remove memory web 2>&1 | grep -o 'there are tasks in it'
cgm kill web; wait $! || cgm remove all web
dbus-send --peer=unix:path=/run/cgmanager/sock --print-reply /org/linuxcontainers/cgmanager \
	org.linuxcontainers.cgmanager0_0.Create string:memory string:old | grep -o 'int32 .*'
cgm listchildren memory '' | grep -x -e old -e web
cgm remove memory old
`+allocate("cgm run small --set memory.limit=20M --", 50)+"\n"+allocate("", 50),
		`memory.limit=52428800
pids.limit=20
cpus_number=0.5
web
1
frozen
50.0M
there are tasks in it
int32 -1
old
137
0
`)
}

// allocate is a script that allocates so many MiB, and prints how that ended.
func allocate(by string, mib int) string {
	return fmt.Sprintf("%s dd if=/dev/zero of=/dev/null bs=%dM count=1 2>/dev/null && echo 0 || echo $?", by, mib)
}

// confined tries to get out of a container, to its host and to its sibling.
func confined(t *testing.T, s, sibling *lxc.Site) {
	t.Helper()
	first := func() string { return strings.Fields(sibling.Do(t, "cat /proc/1/stat"))[21] }
	started := first()
	attacks := []string{
		"cgm movepidabs all / $$",
		"cgm movepid all / $$",
		"cgm movepid all .. $$",
		"cgm movepid all ../lxc.payload.c1 $$",
		"cgm movepid all jail 1 && cgm movepid all '' 1 && cgm movepidabs all .. 1",
		"cgm create all ../evil",
		"cgm create memory jail/../../evil",
		"cgm get .. memory.limit",
		"cgm get ../../lxc.sibling pids.limit",
		"cgm set .. memory.limit=max",
		"cgm set '' memory.limit=max",
		"cgm set '' state=thawed",
		"cgm set ../../lxc.sibling state=frozen",
		"cgm freeze ../../lxc.sibling",
		"cgm kill ../../lxc.sibling",
		"cgm kill ..",
		"cgm remove all ..",
		"cgm chown all '' 0 0 && cgm set '' memory.limit=max",
		"cgm chown all .. 0 0",
		"cgm setvalue memory / memory.limit_in_bytes -1",
		"cgm gettasks memory ..",
		"cgm gettasksrecursive memory /..",
	}
	refused(t, s, attacks)
	if first() != started {
		t.Error("the sibling's first process is another")
	}
}

// refused runs commands in a cgroup of a container, each of which must fail and leave
// the shell where it is. There is a cgroup "jail" below.
func refused(t *testing.T, s *lxc.Site, attacks []string) {
	t.Helper()
	script := `cgm create all jail; where=$(cat /proc/self/cgroup)
attack() {
	if out=$(eval "$1" 2>&1); then echo "DONE: $1: $out"; else echo "$1: $out"; fi
	[ "$(cat /proc/self/cgroup)" = "$where" ] || echo "MOVED: $1"
}
`
	for _, a := range attacks {
		script += "attack " + lxc.Quote(a) + "\n"
	}
	out := s.Do(t, script+"cgm movepid all '' 1; cgm remove all jail")
	if strings.Contains(out, "DONE: ") || strings.Contains(out, "MOVED: ") || strings.Count(out, "(clause ") < 2 {
		t.Errorf("attacks:\n%s", out)
	}
}

// bound has root of a container write to all limits that it sees, and allocate
// 150 MiB, which the limit of 100 MiB does not let it.
func bound(t *testing.T, s *lxc.Site) {
	t.Helper()
	s.Run(t, `cgm set '' memory.limit=max
for f in memory.max memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes; do
	for v in max -1; do echo $v >/sys/fs/cgroup/$f; done
done`)
	says(t, s, "kill -0 1; "+allocate("", 150)+"; kill -0 1; "+allocate("", 50), "137\n0\n")
}

// eventually waits, as long as a container's end may take.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	cgtest.Eventually(t, 20*time.Second, what, ok)
}

// gone waits until no cgroup of LXC's or of the hook's is left anywhere.
func gone(t *testing.T, host *lxc.Site) {
	t.Helper()
	var left string
	eventually(t, "the cgroups of containers are gone", func() bool {
		// What goes meanwhile is no error.
		left = host.Do(t, `find /sys/fs/cgroup/ -type d \( -name 'lxc.*' -o -name .lxc \) 2>/dev/null || true`)
		return left == ""
	})
	if left != "" {
		t.Errorf("left: %s", left)
	}
}

// TestKernelLXCNoDaemon: where no daemon runs, a container that is to have the socket
// starts without, and has nothing more than an empty directory in /run.
func TestKernelLXCNoDaemon(t *testing.T) {
	host := lxc.Idle(t)
	t.Cleanup(func() {
		// LXC leaves that of the process which removed the others.
		host.Do(t, "find /sys/fs/cgroup/ -depth -type d -name lxc.pivot -exec rmdir {} +")
		gone(t, host)
	})
	c := host.Start(t, lxc.Config{Name: "c1", Alone: true, Init: "touch /run/mine"})
	says(t, &c.Site, "find /run; stat -f -c %T /run; cgm ping 2>&1 | grep -o 'cannot reach cgmanager'",
		"/run\n/run/mine\n/run/cgmanager\ntmpfs\ncannot reach cgmanager\n")
}

// TestKernelLXCRefused: a container that is to have limits does not start without
// them; the log says why, and nothing is left.
func TestKernelLXCRefused(t *testing.T) {
	host := lxc.Host(t)
	u := host.User(t, "users/u1")
	for _, test := range []struct {
		name, limit, want string
	}{
		{"no equals sign", "memory.limit 100M", `limits: "memory.limit 100M" is not KEY=VALUE`},
		{"no such key", "memory.limits=1", `"memory.limits"`},
		{"no such value", "memory.limit=lots", `"lots"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			name := strings.ReplaceAll(test.name, " ", "")
			c := u.Make(t, lxc.Config{Name: name, Limits: []string{"pids.limit=100", test.limit}})
			log := c.Fails(t)
			if !strings.Contains(log, "cgmanager: container "+name+": ") || !strings.Contains(log, test.want) {
				t.Errorf("the log does not say %q:\n%s", test.want, log)
			}
			gone(t, host)
		})
	}
	t.Run("no cgroup of one's own", func(t *testing.T) {
		// A user whom nobody gave a cgroup, as after a login without systemd.
		c := host.Stranger(t).Make(t, lxc.Config{Name: "c1"})
		if log := c.Fails(t); !strings.Contains(log, "cgmanager: container c1: ") || !strings.Contains(log, "have the host's root give you one") {
			t.Errorf("the log:\n%s", log)
		}
		gone(t, host)
	})
	t.Run("one of the same name runs", func(t *testing.T) {
		first := u.Start(t, lxc.Config{Name: "twin", Limits: []string{"pids.limit=99"}})
		other := u.In(t, "other")
		second := other.Start(t, lxc.Config{Name: "twin", Limits: []string{"pids.limit=77"}})
		says(t, u, "cgm get lxc.twin pids.limit; cgm get lxc.twin-1 pids.limit", "99\n77\n")
		first.Stop(t)
		second.Stop(t)
		gone(t, host)
	})
}
