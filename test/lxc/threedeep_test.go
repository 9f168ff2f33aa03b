package lxc_test

import (
	"strings"
	"testing"

	"cgmanager/test/lxc"
)

// TestKernelLXCThreeDeep: a container in a container in a container, of a user
// without any privilege, by the same files at each level and each with a proxy of
// its own; the host's socket is in each for comparison.
func TestKernelLXCThreeDeep(t *testing.T) {
	host := lxc.Host(t)
	// The host's numbers of tasks are to be nobody's inside.
	host.Do(t, "echo 20000 >/proc/sys/kernel/ns_last_pid")
	u := host.User(t, "users/u1")
	config := func(name, hostDir string, idmap string, limits ...string) lxc.Config {
		return lxc.Config{
			Name: name, IDMap: idmap, Limits: limits,
			Lines: []string{"lxc.mount.entry = " + hostDir + " run/host none bind,ro,create=dir 0 0"},
			// It goes into the background when it serves.
			Init: "cgproxy --daemon 2>/tmp/cgproxy.log; touch /tmp/started",
		}
	}
	start := func(by *lxc.Site, c lxc.Config) *lxc.Container {
		t.Helper()
		k := by.Start(t, c)
		k.Do(t, `n=0; until [ -e /tmp/started ] || [ $n = 3000 ]; do sleep 0.1; n=$((n+1)); done
[ -d /run/cgmanager.lower ] || { cat /tmp/cgproxy.log; exit 1; }`)
		return k
	}
	a := start(u, config("a", "/run/cgmanager", "", "memory.limit=120M"))
	b := start(&a.Site, config("b", "/run/host", lxc.IDMap(10000, 20000), "memory.limit=400M", "pids.limit=300"))
	says(t, &a.Site, "cgm get lxc.b memory.limit pids.limit", "memory.limit=419430400\npids.limit=300\n")
	c := start(&b.Site, config("c", "/run/host", lxc.IDMap(1000, 5000), "memory.limit=400M"))
	b.Start(t, lxc.Config{Name: "sibling", Limits: []string{"pids.limit=99"}, IDMap: lxc.IDMap(7000, 5000)})

	inits := func() string { return host.Do(t, "pgrep -f '^/bin/sh /init'") }
	// The last may be about to start its program, or a child.
	var first string
	eventually(t, "each container has a first process", func() bool {
		first = inits()
		return strings.Count(first, "\n") == 4 && inits() == first
	})
	for _, level := range []struct {
		name, around, sibling string
		site                  *lxc.Site
	}{
		{"a", "host", "../lxc.monitor.a", &a.Site},
		{"b", "a", "../lxc.monitor.b", &b.Site},
		{"c", "b", "../../lxc.sibling", &c.Site},
	} {
		t.Run(level.name, func(t *testing.T) {
			days(t, level.site)
			absolute(t, level.site)
			t.Run("against "+level.around, func(t *testing.T) {
				before := outside(t, host, level.name)
				attacks(t, level.site, "", level.sibling, strings.Fields(first))
				if level.name == "c" { // for the others TestKernelLXC does it
					attacks(t, level.site, "export CGMANAGER_ADDRESS=/run/host/sock; ", level.sibling, strings.Fields(first))
				}
				if after := outside(t, host, level.name); after != before {
					t.Errorf("around it there was\n%s, and is\n%s", before, after)
				}
			})
			if now := inits(); now != first {
				t.Fatalf("the containers' first processes were %q, and are %q", first, now)
			}
		})
	}
	t.Run("a limit of c's", func(t *testing.T) {
		says(t, &c.Site, `cgm create all small; cgm set small memory.limit=20M; sleep 1000 >/dev/null 2>&1 & beside=$!
(exec sh -c 'cgm movepid all small $$; sleep 1000 >/dev/null 2>&1 & V=$!
`+allocate("", 10)+"\n"+allocate("", 50)+`; kill $V && echo small')
kill $beside && echo beside; `+allocate("", 50)+`; cgm remove all small`,
			"0\n137\nsmall\nbeside\n0\n")
	})
	t.Run("c bound by the limit of a", func(t *testing.T) { bound(t, &c.Site) })
	if now := inits(); now != first {
		t.Errorf("the containers' first processes were %q, and are %q", first, now)
	}
	c.Stop(t)
	eventually(t, "those of c are gone in b", func() bool {
		return !strings.Contains(b.Do(t, "cgm listchildren memory ''"), "lxc.c\n")
	})
	a.Stop(t)
	gone(t, host)
}

// days has root of a container create, limit, fill, freeze, list, empty and delete,
// by dbus-send and by cgm, through the proxy and without: the answers are the same.
func days(t *testing.T, s *lxc.Site) {
	t.Helper()
	const script = `sleep 1000 >/dev/null 2>&1 & V=$!
d() { # INTERFACE.MEMBER ARGUMENT...
	m=$1; shift
	echo $(dbus-send --peer=unix:path=$sock --print-reply=literal --reply-timeout=60000 \
		/org/linuxcontainers/cgmanager org.linuxcontainers.$m "$@" 2>&1)
}
say() { # on one line, without numbers
	tr -s '\n ' ' ' | sed "s/\b$V\b/V/g; s/ $//"; echo
}
where() { sed -n -e 's/^0::\(.*day\)$/\1/p' -e 's/^[0-9]*:memory:\(.*day\)$/\1/p' /proc/$V/cgroup | sort -u; }
for sock in /run/cgmanager/sock /run/host/sock; do
	echo "= $sock, dbus-send"
	{
		d cgmanager0_0.Create string:all string:day
		d cgmanager0_0.SetValue string:pids string:day string:pids.max string:33
		d CGManager1.SetValue string:day dict:string:string:memory.limit,64M
		d CGManager1.GetValue string:day array:string:memory.limit
		d CGManager1.GetValue string:day array:string:pids.limit
		d cgmanager0_0.MovePid string:all string:day int32:$V; where
		d cgmanager0_0.GetPidCgroup string:memory int32:$V
		d CGManager1.SetValue string:day dict:string:string:state,frozen
		until d CGManager1.GetValue string:day array:string:state | grep 'state frozen'; do sleep 0.1; done
		d cgmanager0_0.GetTasks string:memory string:day
		d cgmanager0_0.ListChildren string:memory string: | tr ' ' '\n' | grep -x day
		d CGManager1.SetValue string:day dict:string:string:state,thawed
		d cgmanager0_0.Remove string:all string:day int32:1 | grep -o 'there are tasks in it'
		d cgmanager0_0.MovePid string:all string: int32:$V; where
		d cgmanager0_0.Remove string:all string:day int32:1
		d cgmanager0_0.GetTasks string:memory string:day | cut -d: -f1
	} | say
	echo "= $sock, cgm"
	export CGMANAGER_ADDRESS=$sock
	{
		cgm create all day
		cgm setvalue pids day pids.max 33
		cgm set day memory.limit=64M
		cgm get day memory.limit pids.limit
		cgm movepid all day $V; where
		cgm getpidcgroup memory $V
		cgm freeze day
		until cgm get day state | grep -x frozen; do sleep 0.1; done
		cgm gettasks memory day
		cgm listchildren memory '' | grep -x day
		cgm thaw day
		cgm remove all day 2>&1 | grep -o 'there are tasks in it'
		cgm movepid all '' $V; where
		cgm remove all day
		cgm gettasks memory day 2>/dev/null || echo none
	} | say
done
kill $V
`
	want := ""
	for _, sock := range []string{"/run/cgmanager/sock", "/run/host/sock"} {
		want += "= " + sock + ", dbus-send\n" +
			"int32 -1 array [ dict entry( memory.limit 67108864 ) ] array [ dict entry( pids.limit 33 ) ]" +
			" /day day array [ dict entry( state frozen ) ] array [ int32 V ] day there are tasks in it" +
			" int32 1 Error org.freedesktop.DBus.Error.InvalidArgs\n" +
			"= " + sock + ", cgm\n" +
			"memory.limit=67108864 pids.limit=33 /day day frozen V day there are tasks in it none\n"
	}
	if got := s.Do(t, script); got != want {
		t.Errorf("a day is\n%s\nwant\n%s", got, want)
	}
}

// absolute: what counts from the proxy's cgroup with one, and from the requestor's
// own without, where it gives no way up.
func absolute(t *testing.T, s *lxc.Site) {
	t.Helper()
	says(t, s, `cgm create all low/x; sleep 1000 >/dev/null 2>&1 & V=$!
cgm movepid all low/x $V; cgm movepid all low $$
host="cgm --address /run/host/sock"
cgm getpidcgroupabs memory $V; $host getpidcgroupabs memory $V
$host movepidabs all / $V 2>&1 | grep -o '(clause 9)'
cgm movepidabs all /.. $V 2>/dev/null || echo no further
cgm getpidcgroup memory $V
cgm movepidabs all / $V; cgm getpidcgroupabs memory $V
cgm movepidabs all / $$; cgm remove all low; kill $V`,
		"/low/x\n/x\n(clause 9)\nno further\nx\n/\n")
}

// attacks has root of a container try what is the container's around it, the
// sibling's and its own limits. The numbers of tasks are the host's.
func attacks(t *testing.T, s *lxc.Site, before, sibling string, tasks []string) {
	t.Helper()
	all := []string{
		"cgm movepidabs all .. $$",
		"cgm movepid all .. $$",
		"cgm movepid all " + sibling + " $$",
		"cgm create all ../evil",
		"cgm set .. memory.limit=max",
		"cgm set '' memory.limit=max",
		"cgm chown all '' 0 0 && cgm set '' memory.limit=max",
		"cgm set " + sibling + " pids.limit=1",
		"cgm freeze " + sibling,
		"cgm kill " + sibling,
		"cgm kill ..",
		"cgm gettasks memory ..",
	}
	for _, pid := range tasks {
		all = append(all, "cgm movepid all jail "+pid)
	}
	for i := range all {
		all[i] = before + all[i]
	}
	refused(t, s, all)
}

// outside are the limits and states of all cgroups around a container, as the host
// sees them.
func outside(t *testing.T, host *lxc.Site, name string) string {
	t.Helper()
	return host.Do(t, `find /sys/fs/cgroup/ -path '*/users/u1/*' \( -path '*/lxc.payload.`+name+`/*' -o -name .lxc \) -prune -o \
	-path '*/users/u1/*' \( -name memory.max -o -name memory.limit_in_bytes -o -name pids.max -o -name cgroup.freeze -o -name freezer.state \) \
	-exec grep -H . {} + | sort`)
}
