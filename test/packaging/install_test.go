package packaging_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cgmanager/test/harness"
)

// installed is what make install leaves below PREFIX, whatever starts the daemon.
// Of directories with a file for each of something there is one of them.
var installed = []string{
	"bin/cgm",
	"sbin/cgmanager",
	"sbin/cgproxy",
	"sbin/rtkitctl",
	"share/bash-completion/completions/cgm",
	"share/doc/cgmanager/CHANGELOG.md",
	"share/doc/cgmanager/LICENSE",
	"share/doc/cgmanager/README.md",
	"share/doc/cgmanager/docs/SECURITY.md",
	"share/doc/cgmanager/licenses/go/LICENSE",
	"share/doc/cgmanager/licenses/golang.org/x/sys/LICENSE",
	"share/fish/vendor_completions.d/cgm.fish",
	"share/man/man1/cgm.1",
	"share/man/man5/cgmanager-realtime.toml.5",
	"share/man/man8/cgmanager.8",
	"share/man/man8/cgproxy.8",
	"share/man/man8/rtkitctl.8",
	"share/zsh/site-functions/_cgm",
}

// lxc is what LXC reads, below /usr/share/lxc.
var lxc = []string{
	"config/cgmanager-socket.conf",
	"config/cgmanager.conf",
	"hooks/cgmanager-mount",
	"hooks/cgmanager-start",
}

// desktop is what the system bus and polkit read, below /usr/share.
var desktop = []string{
	"dbus-1/system-services/org.freedesktop.RealtimeKit1.service",
	"dbus-1/system.d/org.freedesktop.RealtimeKit1.conf",
	"polkit-1/actions/org.freedesktop.RealtimeKit1.policy",
}

// policy is installed whatever starts the daemon, and the administrator's.
const policy = "etc/cgmanager/realtime.toml"

// kinds are the init systems, and what is installed for each.
var kinds = map[string][]string{
	"systemd": {
		"opt/c/lib/systemd/system/cgmanager.service",
		"opt/c/lib/systemd/system/cgmanager-realtime.service",
		"opt/c/lib/systemd/system/cgmanager.socket",
		"opt/c/lib/systemd/system/cgproxy.service",
		"etc/default/cgmanager", "etc/default/cgproxy",
	},
	"openrc": {
		"etc/init.d/cgmanager", "etc/init.d/cgproxy", "etc/conf.d/cgmanager", "etc/conf.d/cgproxy",
		"etc/logrotate.d/cgmanager",
	},
	"sysv": {
		"etc/init.d/cgmanager", "etc/init.d/cgproxy", "etc/default/cgmanager", "etc/default/cgproxy",
		"etc/logrotate.d/cgmanager",
	},
	"runit": {
		"etc/sv/cgmanager/run", "etc/sv/cgmanager/check", "etc/sv/cgmanager/log/run", "etc/sv/cgproxy/run", "etc/sv/cgproxy/check", "etc/sv/cgproxy/log/run",
		"etc/default/cgmanager", "etc/default/cgproxy",
	},
	"": nil,
}

// TestInstall: everything is where it is said to be, and finds what it starts.
func TestInstall(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds the programs")
	}
	harness.Require(t, "make", "go")
	build := t.TempDir()
	for kind, files := range kinds {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			install := func() {
				t.Helper()
				out, err := exec.Command("make", "-s", "-C", "../..", "install", "BUILD="+build, "DESTDIR="+dir,
					"PREFIX=/opt/c", "INIT="+kind, "VERSION=7.5").CombinedOutput()
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			install()
			files := append(slices.Clone(files), policy)
			want := slices.Clone(files)
			for _, f := range installed {
				want = append(want, "opt/c/"+f)
			}
			for _, f := range lxc {
				want = append(want, "usr/share/lxc/"+f)
			}
			for _, f := range desktop {
				want = append(want, "usr/share/"+f)
			}
			found := map[string]fs.FileMode{}
			err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				// What a link leads to, in this tree.
				info, err := os.Stat(path)
				if err != nil {
					return err
				}
				found[path[len(dir)+1:]] = info.Mode()
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range want {
				if _, ok := found[f]; !ok {
					t.Errorf("%s is missing", f)
				}
			}
			for f, mode := range found {
				program := strings.Contains(f, "bin/") || strings.Contains(f, "/init.d/") || strings.Contains(f, "/hooks/") || strings.HasSuffix(f, "/run") || strings.HasSuffix(f, "/check")
				if program != (mode.Perm() == 0o755) || !program && mode.Perm() != 0o644 {
					t.Errorf("%s has mode %o", f, mode.Perm())
				}
				doc := strings.HasPrefix(f, "opt/c/share/doc/cgmanager/")
				if !doc && !slices.Contains(want, f) {
					t.Errorf("%s is installed too", f)
				}
				if doc || strings.Contains(f, "bin/") {
					continue
				}
				b, err := os.ReadFile(filepath.Join(dir, f))
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(string(b), "/usr/sbin/cg") {
					t.Errorf("%s looks for programs in /usr/sbin", f)
				}
			}
			for program, path := range map[string]string{"cgm": "bin", "cgmanager": "sbin", "cgproxy": "sbin", "rtkitctl": "sbin"} {
				out, err := exec.Command(filepath.Join(dir, "opt/c", path, program), "--version").CombinedOutput()
				if err != nil || !strings.Contains(string(out), " 7.5\n") {
					t.Errorf("%s --version: %q, %v", program, out, err)
				}
			}
			// A second time leaves the administrator's files alone.
			mine := slices.DeleteFunc(slices.Clone(files), func(f string) bool {
				return !strings.Contains(f, "default") && !strings.Contains(f, "conf.d") && f != policy
			})
			for _, f := range mine {
				if err := os.WriteFile(filepath.Join(dir, f), []byte("mine\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			install()
			for _, f := range mine {
				if b, err := os.ReadFile(filepath.Join(dir, f)); err != nil || string(b) != "mine\n" {
					t.Errorf("%s holds %q now, %v", f, b, err)
				}
			}
		})
	}
}

// TestUnits has systemd look at its units as they are installed.
func TestUnits(t *testing.T) {
	harness.Require(t, "systemd-analyze")
	units, err := filepath.Glob("../../packaging/systemd/*")
	if err != nil || len(units) < 3 {
		t.Fatalf("%v, %v", units, err)
	}
	// The programs need not be installed here.
	dir := t.TempDir()
	bin := t.TempDir()
	for _, p := range []string{"cgmanager", "cgproxy"} {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"verify", "--man=no"}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.Base(u))
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(b), "/usr/sbin/", bin+"/")), 0o644); err != nil {
			t.Fatal(err)
		}
		args = append(args, path)
	}
	if out, err := exec.Command("systemd-analyze", args...).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}
