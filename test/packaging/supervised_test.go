package packaging_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// unpack puts the programs of Debian packages where they belong, as far as these
// tests need them: the machine's init system stays what it is.
func unpack(t *testing.T, names ...string) {
	t.Helper()
	var files []string
	for _, n := range names {
		found, err := filepath.Glob(filepath.Join(os.Getenv("CGM_DEBS"), n+"_*.deb"))
		if err != nil || len(found) != 1 {
			t.Fatalf("packages %s in CGM_DEBS=%q: %q, %v", n, os.Getenv("CGM_DEBS"), found, err)
		}
		files = append(files, found[0])
	}
	t.Cleanup(func() { try(t, "dpkg --purge --force-all "+strings.Join(names, " ")) })
	sh(t, "dpkg --unpack --force-all "+strings.Join(files, " "))
}

// initFiles installs what is for this init system, by the installer that make
// install calls.
func initFiles(t *testing.T, kind string) {
	t.Helper()
	bin := filepath.Dir(harness.Binary(t, "cgmanager"))
	sh(t, "DESTDIR= SBINDIR="+bin+" SYSCONFDIR=/etc testdata/packaging/init "+kind)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Cleanup(func() {
		try(t, `rm -rf /etc/init.d/cgmanager /etc/init.d/cgproxy /etc/conf.d/cg* /etc/sv/cg* /etc/default/cgmanager \
			/etc/default/cgproxy /etc/logrotate.d/cgmanager /var/log/cgmanager* /var/log/cgproxy* /run/cgmanager* /run/openrc`)
	})
}

// passedOn checks that command has the daemon's sockets passed on, until done says
// so, with nobody turned away meanwhile, and returns the daemon that has them.
func passedOn(t *testing.T, command string, done func(pid string) bool) int {
	t.Helper()
	knocks := knocking()
	sh(t, command)
	eventually(t, command, func() bool {
		out, _ := try(t, "pgrep -x cgmanager")
		pids := strings.Fields(out)
		return len(pids) == 1 && done(pids[0])
	})
	if n, errs := knocks(); n == 0 || len(errs) > 0 {
		t.Errorf("%s: of %d connections failed %d: %v", command, n, len(errs), errs[:min(len(errs), 3)])
	}
	return served(t)
}

// TestKernelOpenRC runs the service under OpenRC's own programs.
func TestKernelOpenRC(t *testing.T) {
	harness.Require(t, "root", "vm", "unified") // one layout is enough
	unpack(t, "openrc", "librc1", "libeinfo1", "insserv")
	initFiles(t, "openrc")
	sh(t, "cd /run && mkdir openrc && cd openrc && mkdir daemons exclusive failed hotplugged inactive options scheduled started starting stopping wasinactive && touch softlevel")
	sh(t, `echo 'cgmanager_opts="--log-level debug"' >/etc/conf.d/cgmanager`)
	// What the machine's other services are is none of ours.
	rc := "rc-service --nodeps cgmanager "
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := try(t, "cat /var/log/cgmanager.log; rc-service --nodeps cgmanager stop")
			t.Log(out)
		}
	})
	sh(t, rc+"start")
	first := strconv.Itoa(served(t))
	sh(t, rc+"status")
	pid := passedOn(t, rc+"restart", func(pid string) bool { return pid != first })
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	sh(t, rc+"restart")
	served(t)
	if b, err := os.ReadFile("/var/log/cgmanager.log"); err != nil || strings.Count(string(b), "serving") < 3 {
		t.Errorf("the log: %v\n%s", err, b)
	}
	// The proxy of a container serves as soon as its start returns, and what is
	// ordered after it can rely on it.
	if out := sh(t, `cgm run ct -- unshare -m -p -f -C --mount-proc sh -ec '
		mkdir -p /tmp/aside
		mount --bind /run/cgmanager /tmp/aside
		cp -a /run/openrc /tmp/openrc
		mount -t tmpfs run /run
		mv /tmp/openrc /run/openrc
		mkdir /run/cgmanager
		mount --bind -o ro /tmp/aside /run/cgmanager
		rc-service --nodeps cgproxy start
		CGMANAGER_ADDRESS=/run/cgproxy/sock cgm ping
		rc-service --nodeps cgproxy status
		rc-service --nodeps cgproxy stop
		[ ! -e /run/cgmanager.lower/sock ]
		umount /tmp/aside
		echo served' </dev/null; rmdir /tmp/aside`); !strings.HasSuffix(out, "served\n") {
		t.Errorf("in a container: %s", out)
	}
	sh(t, rc+"stop")
	eventually(t, "no daemon is left", noDaemon(t))
	sh(t, `echo 'cgmanager_opts="--nonsense"' >/etc/conf.d/cgmanager`)
	if out, code := try(t, rc+"start"); code == 0 || !strings.Contains(out, "/var/log/cgmanager.log") {
		t.Errorf("misuse: %d, %q", code, out)
	}
	if out, code := try(t, "rc-service --nodeps cgproxy start"); code == 0 || !strings.Contains(out, "not mounted into this container") {
		t.Errorf("the proxy, which is for containers: %d, %q", code, out)
	}
}

// TestKernelRunit runs the service under runit's own programs.
func TestKernelRunit(t *testing.T) {
	harness.Require(t, "root", "vm", "unified") // one layout is enough
	unpack(t, "runit")
	initFiles(t, "runit")
	dir := t.TempDir()
	sh(t, "cp -r /etc/sv/cgmanager "+dir+"/cgmanager; runsvdir "+dir+" </dev/null >/dev/null 2>&1 & ")
	sv := "SVDIR=" + dir + " sv "
	t.Cleanup(func() {
		out, _ := try(t, sv+"shutdown cgmanager; pkill -x -HUP runsvdir; cat /var/log/cgmanager/current")
		if t.Failed() {
			t.Log(out)
		}
	})
	eventually(t, "it is supervised", func() bool { _, code := try(t, sv+"status cgmanager"); return code == 0 })
	sh(t, sv+"-w 60 start cgmanager && cgm ping") // it serves when the start returns
	first := strconv.Itoa(served(t))
	// A new version: it is taken over from runit's, which starts again and takes
	// over in its turn.
	pid := passedOn(t, "cgmanager --replace --daemon 2>/dev/null", func(pid string) bool {
		out, _ := try(t, sv+"status cgmanager")
		return pid != first && strings.Contains(out, "(pid "+pid+")")
	})
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "runit starts it again", func() bool { return harness.Ping(runSocket) == nil })
	sh(t, sv+"down cgmanager")
	eventually(t, "it is down", noDaemon(t))
}
