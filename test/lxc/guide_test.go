package lxc_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"cgmanager/test/lxc"
)

// TestKernelLXCGuide runs the commands of docs/LXC.md one block after the other, as
// whoever is named before each.
func TestKernelLXCGuide(t *testing.T) {
	text, err := os.ReadFile("testdata/LXC.md")
	if err != nil {
		t.Fatal(err)
	}
	host := lxc.Host(t)
	// These machines have neither Debian's bridge nor AppArmor.
	before, err := os.ReadFile("/etc/lxc/default.conf")
	if err == nil {
		err = os.WriteFile("/etc/lxc/default.conf", []byte("lxc.net.0.type = empty\nlxc.apparmor.profile = unconfined\n"), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile("/etc/lxc/default.conf", before, 0o644); err != nil {
			t.Error(err)
		}
	})
	user := host.Login(t, "users/u1")
	t.Cleanup(func() {
		host.Run(t, `lxc-stop -n c1 -k; lxc-destroy -n c1`)
		user.Run(t, `lxc-stop -n c2 -k; lxc-destroy -n c2`)
		host.Run(t, `cgm remove all users`)
	})
	// What blocks print, in the order in which they stand there.
	want := [][]string{
		{},
		{"memory.limit=104857600", "150.0M", "lxc.payload.c1"},
		{"web", "20.0M"},
		{},
		{"u1:100000:65536"},
		{},
		{"104857600"},
		{"52428800", "api version  10"},
		{"20971520"},
	}
	blocks := regexp.MustCompile(`<!-- (.*) -->\n\n((?:    .*\n)+)`).FindAllStringSubmatch(string(text), -1)
	if len(blocks) != len(want) {
		t.Fatalf("%d blocks, want %d", len(blocks), len(want))
	}
	if n := len(regexp.MustCompile(`(?m)\n\n    `).FindAllString(string(text), -1)); n != len(blocks)+1 {
		t.Errorf("%d blocks, and %d of them say who runs them; all but the one for systemd must", n, len(blocks))
	}
	for i, b := range blocks {
		who, script := b[1], b[2] // indented, as it is pasted from the file
		site, stop := host, func() {}
		switch who {
		case "root", "root: shell of u1":
		case "user":
			site = user
		case "inside":
			outer := user.In(t, "outer").Start(t, lxc.Config{Name: "outer", Limits: []string{"memory.limit=80M"}})
			site, stop = &outer.Site, func() { outer.Stop(t) }
		default:
			t.Fatalf("who is %q?", who)
		}
		out := site.Do(t, "set -e\n"+script)
		stop()
		for _, w := range want[i] {
			if !strings.Contains(out, w) {
				t.Errorf("block %d does not print %q:\n%s\n%s", i+1, w, script, out)
			}
		}
	}
	gone(t, host)
}
