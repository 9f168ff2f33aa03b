package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"cgmanager/test/harness"
)

// TestKernelRealtimeGuide runs the commands of docs/REALTIME.md one block after the
// other, as whoever is named before each.
func TestKernelRealtimeGuide(t *testing.T) {
	harness.Require(t, "root", "userns", "dbus-send", "chrt", "prlimit", "setpriv")
	text, err := os.ReadFile("testdata/REALTIME.md")
	if err != nil {
		t.Fatal(err)
	}
	rules := filepath.Join(harness.PublicDir(t), "realtime.toml")
	// What a processor stood still for counts as if it had been used: where the machine
	// is emulated the kernel would kill some of the programs.
	rttime := "200000"
	if harness.Emulated() {
		rttime = "20000000"
	}
	daemon := harness.StartDaemon(t, "--realtime-policy", rules, "--rttime-usec-max", rttime)
	path, tree := programs(t), harness.NewTree(t)
	tree.Make("box", 0, 0)
	tree.Make("c1", 100000, 100000)
	fund(tree, "c1")
	places := strings.NewReplacer(
		"/etc/cgmanager/realtime.toml", rules, "/etc/cgmanager", filepath.Dir(rules),
		"/run/cgmanager.private", filepath.Join(daemon.Dir, "state"), "/run/cgmanager/sock", daemon.Sock,
		"--rttime=200000:200000", "--rttime="+rttime+":"+rttime)
	as := map[string][]string{
		"root": nil,
		"user": {"setpriv", "--reuid", "1000", "--regid", "1000", "--groups", "audio"},
		// Root of it is uid 100000 on the host.
		"container": {"setpriv", "--reuid", "100000", "--regid", "100000", "--clear-groups", "unshare", "-U", "-r", "-p", "-f", "--mount-proc"},
	}
	as["limits"] = as["user"]
	const realtime = "SCHED_RR|SCHED_RESET_ON_FORK"
	// What blocks print, in the order in which they stand there.
	want := [][]string{
		{realtime, "priority: 10", "granted"},
		{},
		{"highest priority", "20\n", rttime + " us", realtime, "priority: 10", "-10\n"},
		{realtime, "priority: 5", "sleep", "1000", "granted", "SCHED_OTHER"},
		{},
		{realtime, "priority: 10", "granted"},
		{"RTTimeUSecMax", "int64 " + rttime, "MinNiceLevel", "int32 -15"},
		{},
		{"rtprio=70", "memlock=536870912", "70\n"},
	}
	raises := harness.Has("sysresource")
	if !raises {
		want[len(want)-1] = []string{"CAP_SYS_RESOURCE"}
	}
	blocks := regexp.MustCompile(`(?m)^ *<!-- (.*) -->\n\n((?: {4,}.*\n)+)`).FindAllStringSubmatch(string(text), -1)
	if len(blocks) != len(want) {
		t.Fatalf("%d blocks, want %d", len(blocks), len(want))
	}
	for i, b := range blocks {
		who, script := b[1], b[2] // indented, as it is pasted from the file
		prefix, ok := as[who]
		if !ok {
			t.Fatalf("who is %q?", who)
		}
		cgroup := "box"
		if who == "container" {
			cgroup = "c1"
		}
		args := append([]string{"PATH=" + path, "in", cgroup, "0"}, prefix...)
		cmd := exec.Command("env", append(args, "bash", "-e", "-c", places.Replace(script))...)
		cmd.Env = append(os.Environ(), "TREE="+tree.Base, "CGMANAGER_ADDRESS="+daemon.Sock)
		cmd.WaitDelay = 10 * time.Second
		out, err := cmd.CombinedOutput()
		if refused := who == "limits" && !raises; (err != nil) != refused {
			t.Errorf("block %d: %v\n%s\n%s", i+1, err, script, out)
		}
		for _, w := range want[i] {
			if !strings.Contains(string(out), w) {
				t.Errorf("block %d does not print %q:\n%s\n%s", i+1, w, script, out)
			}
		}
	}
	if t.Failed() {
		t.Log(daemon.Log())
	}
}
