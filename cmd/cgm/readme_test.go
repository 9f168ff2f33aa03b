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

// TestKernelReadme pastes the examples of README.md into shells, one each, in
// a cgroup of the test's own.
func TestKernelReadme(t *testing.T) {
	harness.Require(t, "root", "userns", "dbus-send")
	text, err := os.ReadFile("testdata/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "## Five examples")
	section, _, ok := strings.Cut(section, "\n## ")
	if !ok {
		t.Fatal("README.md has no examples")
	}
	daemon := harness.StartDaemon(t)
	section = strings.ReplaceAll(section, "/run/cgmanager/sock", daemon.Sock)
	tree := harness.NewTree(t)
	tree.Make("box", 0, 0)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in := filepath.Join(t.TempDir(), "in")
	if err := os.Symlink(self, in); err != nil {
		t.Fatal(err)
	}
	// What each example must print, as they stand there.
	want := [][]string{
		{"CGROUP", "batch", "memory.limit=104857600", "pids.limit=50", "frozen"},
		{"/alice/job\n", "\n1\n"},
		{"below /", "/alice/ci\n", "crun --cgroup-manager=cgroupfs"},
		{"SCHED_RR|SCHED_RESET_ON_FORK", "priority: 10", "granted"},
		{"int32 -1"},
	}
	examples := regexp.MustCompile(`(?m)^\d\. `).Split(section, -1)[1:]
	if len(examples) != len(want) {
		t.Fatalf("%d examples, want %d", len(examples), len(want))
	}
	for i, example := range examples {
		var script strings.Builder
		for line := range strings.Lines(example) {
			if strings.HasPrefix(line, "       ") {
				script.WriteString(line) // as it is pasted from the file
			}
		}
		cmd := exec.Command(in, "box", "0", "bash", "-e", "-c", script.String())
		cmd.Env = append(os.Environ(),
			"PATH="+filepath.Dir(harness.Binary(t, "cgm"))+":"+os.Getenv("PATH"),
			"TREE="+tree.Base, "CGMANAGER_ADDRESS=unix:path="+daemon.Sock)
		cmd.WaitDelay = 10 * time.Second
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("example %d: %v\n%s\n%s", i+1, err, script.String(), out)
		}
		for _, w := range want[i] {
			if !strings.Contains(string(out), w) {
				t.Errorf("example %d does not print %q:\n%s", i+1, w, out)
			}
		}
	}
	if log := daemon.Log(); strings.Contains(log, "level=error") {
		t.Errorf("the daemon's log has errors:\n%s", log)
	}
	for _, name := range []string{"demo", "batch", "alice/job", "alice/job2", "alice/ci"} {
		if err := waitGone(tree.Path("box/" + name)); err != nil {
			t.Error(err)
		}
	}
}
