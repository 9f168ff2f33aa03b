package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// recorded is a command of a file in testdata, such as reference-0.42.txt, with what the original
// daemon answered, and what this one does where it differs.
type recorded struct {
	line    int
	command string
	answer  []string
	why     string
	ours    []string
}

func readRecorded(t *testing.T, file string) []recorded {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	var all []recorded
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		line = strings.TrimSuffix(line, "\n")
		command, isCommand := strings.CutPrefix(line, "$ ")
		why, isOurs := strings.CutPrefix(line, "ours: ")
		switch {
		case line == "", strings.HasPrefix(line, "#"):
		case isCommand:
			all = append(all, recorded{line: n, command: command})
		case len(all) == 0:
			t.Fatalf("line %d: an answer without a command", n)
		case isOurs:
			all[len(all)-1].why = why
		case all[len(all)-1].why != "":
			all[len(all)-1].ours = append(all[len(all)-1].ours, line)
		default:
			all[len(all)-1].answer = append(all[len(all)-1].answer, line)
		}
	}
	return all
}

// asRecorded matches an answer line by line; a bare "invalid request" stands
// for one with a reason.
func asRecorded(got, want []string) bool {
	if len(got) != len(want) {
		return false
	}
	for i := range want {
		reason, ok := strings.CutPrefix(got[i], want[i]+": ")
		if strings.HasSuffix(want[i], ": invalid request") {
			if !ok || reason == "" {
				return false
			}
		} else if got[i] != want[i] {
			return false
		}
	}
	return true
}

// TestKernelReference replays what was recorded of the original daemon against
// this one.
func TestKernelReference(t *testing.T) {
	// The recording looks into the hierarchies of a v1 host; oldclient.txt is
	// for every layout.
	harness.Require(t, "v1", "dbus-send", "setpriv", "unshare", "stat")
	entries := readRecorded(t, "reference-0.42.txt")
	if len(entries) < 150 {
		t.Fatalf("%d commands", len(entries))
	}
	doors(t, func(w *world) {
		p, prefix := atTheTop(w)
		sl, sl2 := launch(w.T, p, "/bin/sleep", "300"), launch(w.T, p, "/bin/sleep", "300")
		w.replay(p, prefix, entries, fmt.Sprintf("SL=%d; SL2=%d", sl.PID, sl2.PID), sl.PID)
	})
}

// doors runs a test of clients by the daemon's own socket, and by that of a proxy
// at the top: nobody can tell which it is.
func doors(t *testing.T, test func(w *world)) {
	t.Helper()
	for _, via := range []string{"daemon", "proxy"} {
		t.Run(via, func(t *testing.T) {
			w := newWorld(t)
			if via == "proxy" {
				p := harness.Start(t, harness.Spec{})
				w.PlaceTop(p, harness.Hierarchies()...)
				w.via = startProxy(t, p, w.d.Sock).sock
			}
			test(w)
		})
	}
}

// TestKernelOldClientUnified: what an old client does with a container is
// answered to the letter as on v1, on every layout.
func TestKernelOldClientUnified(t *testing.T) {
	harness.Require(t, "dbus-send")
	doors(t, func(w *world) {
		p, prefix := atTheTop(w)
		sl := launch(w.T, p, "/bin/sh", "-c", "while :; do :; done")
		w.replay(p, prefix, readRecorded(w.T, "oldclient.txt"), fmt.Sprintf("SL=%d", sl.PID), sl.PID)
	})
}

// launch starts a program as p's child until the test ends.
func launch(t *testing.T, p *harness.Proc, argv ...string) *harness.Child {
	c := p.Launch(nil, argv...)
	t.Cleanup(func() {
		if err := c.Kill(); err != nil {
			t.Error(err)
		}
		if _, err := c.End(time.Second); err != nil {
			t.Error(err)
		}
	})
	return c
}

// replay has p run the commands, with the variables that their file describes,
// and compares the answers. sl is the process that shows as $SL there.
func (w *world) replay(p *harness.Proc, prefix string, entries []recorded, vars string, sl int) {
	w.Helper()
	vars += fmt.Sprintf(`; ADDRESS=unix:path=%s; T=%s
S="dbus-send --peer=$ADDRESS --print-reply --reply-timeout=%d /org/linuxcontainers/cgmanager"
I=org.linuxcontainers.cgmanager0_0
U1="setpriv --reuid 1000 --regid 1000 --clear-groups"
NS="unshare -p -f --mount-proc"
`, w.sock(), prefix, cgtest.Patience(5*time.Second).Milliseconds())
	header := regexp.MustCompile(`^method return time=[0-9.]+ sender=\(null sender\) -> destination=\(null destination\) serial=1 reply_serial=1$`)
	number := regexp.MustCompile(`^\d+:`)
	pid := regexp.MustCompile(fmt.Sprintf(`\b%d\b`, sl))
	run := func(command string) []string {
		out, code := p.Exec(nil, "bash", "-c", vars+command)
		var got []string
		for line := range strings.Lines(out) {
			line = strings.TrimSuffix(line, "\n")
			line = header.ReplaceAllString(line, "return")
			line = number.ReplaceAllString(line, "N:")
			line = pid.ReplaceAllString(line, "$$SL")
			if line = strings.ReplaceAll(line, prefix, ""); line != "" {
				got = append(got, line)
			}
		}
		return append(got, fmt.Sprintf("[exit %d]", code))
	}
	for _, e := range entries {
		if w.via != "" && strings.Contains(e.command, "$NS") && strings.Contains(e.command, "GetPidCgroupAbs") {
			continue // relative to the proxy's cgroup, not to its own
		}
		got := run(e.command)
		// The kernel takes back what it charged in advance to a cgroup on another
		// processor when that one gets to it: a low limit may not be met yet.
		end := time.Now().Add(cgtest.Patience(2 * time.Second))
		for strings.Contains(e.command, ".SetValue ") && strings.Contains(got[0], "it is in use") && time.Now().Before(end) {
			time.Sleep(10 * time.Millisecond)
			got = run(e.command)
		}
		want := e.answer
		if e.why != "" {
			want = e.ours
			if asRecorded(got, e.answer) {
				w.Errorf("line %d: $ %s\nanswered as the original did, but differs on purpose: %s", e.line, e.command, e.why)
				continue
			}
		}
		if !asRecorded(got, want) {
			w.Errorf("line %d: $ %s\n%s\nwant\n%s", e.line, e.command, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// atTheTop starts a process in the root cgroup of every hierarchy, and returns
// what names there begin with. What is left of them in the end is removed.
func atTheTop(w *world) (*harness.Proc, string) {
	w.Helper()
	p := harness.Start(w.T, harness.Spec{})
	w.PlaceTop(p, harness.Hierarchies()...)
	prefix := strings.TrimPrefix(w.Base, "/") + "-"
	w.Cleanup(func() {
		for _, h := range harness.Hierarchies() {
			left, _ := filepath.Glob(filepath.Join(h.Mount, prefix+"*"))
			for _, dir := range left {
				removeTree(w.T, dir)
			}
		}
	})
	return p, prefix
}

// TestKernelReferenceScm makes the calls with a side channel that were recorded
// of the original daemon: the same kicks, the same datagrams.
func TestKernelReferenceScm(t *testing.T) {
	doors(t, referenceScm)
}

func referenceScm(w *world) {
	t := w.T
	p, prefix := atTheTop(w)
	c := p.MustDial(w.sock())
	defer c.Close()
	v := launch(t, p, "/bin/sleep", "300")
	me := p.Cred
	self := []harness.Cred{me}
	victim := []harness.Cred{me, {PID: int32(v.PID)}}
	owner := []harness.Cred{me, {PID: me.PID, UID: 1000, GID: 1000}}
	scmx, nosuch := prefix+"scmx", prefix+"nosuch"
	const failed, gone = "0", "\xff\xff\xff\xff"
	for _, tc := range []struct {
		member string
		creds  []harness.Cred
		args   []any
		answer []string
	}{
		{"CreateScm", self, []any{"memory", scmx}, []string{"1"}},
		{"CreateScm", self, []any{"memory", scmx}, []string{"2"}},
		{"CreateScm", self, []any{"memory", "../x"}, []string{failed}},
		{"CreateScm", self, []any{"nosuch", scmx}, []string{failed}},
		{"MovePidScm", victim, []any{"memory", scmx}, []string{"1"}},
		{"MovePidScm", victim, []any{"memory", nosuch}, []string{failed}},
		{"MovePidAbsScm", victim, []any{"memory", "/" + scmx}, []string{"1"}},
		{"GetPidCgroupScm", victim, []any{"memory"}, []string{scmx + "\x00"}},
		{"GetPidCgroupAbsScm", victim, []any{"memory"}, []string{"/" + scmx + "\x00"}},
		{"GetPidCgroupScm", victim, []any{"nosuch"}, []string{""}},
		{"GetTasksScm", self, []any{"memory", scmx}, []string{"\x01\x00\x00\x00", "p"}},
		{"GetTasksScm", self, []any{"memory", nosuch}, []string{gone}},
		{"GetTasksRecursiveScm", self, []any{"memory", scmx}, []string{"\x01\x00\x00\x00", "p"}},
		{"GetTasksRecursiveScm", self, []any{"memory", nosuch}, []string{gone}},
		{"GetValueScm", self, []any{"memory", scmx, "memory.limit_in_bytes"}, []string{"9223372036854771712\x00"}},
		{"GetValueScm", self, []any{"memory", scmx, "nosuch"}, []string{""}},
		{"SetValueScm", self, []any{"memory", scmx, "memory.limit_in_bytes", "50000000"}, []string{"1"}},
		{"SetValueScm", self, []any{"memory", scmx, "memory.limit_in_bytes", "junk"}, []string{failed}},
		{"ChownScm", owner, []any{"memory", scmx}, []string{"1"}},
		{"ChownScm", owner, []any{"memory", nosuch}, []string{failed}},
		{"ChmodScm", self, []any{"memory", scmx, "tasks", int32(436)}, []string{"1"}},
		{"ChmodScm", self, []any{"memory", scmx, "nosuch", int32(436)}, []string{failed}},
		{"CreateScm", self, []any{"memory", scmx + "/k1"}, []string{"1"}},
		{"CreateScm", self, []any{"memory", scmx + "/k2"}, []string{"1"}},
		{"ListChildrenScm", self, []any{"memory", scmx}, []string{"\x02\x00\x00\x00", "\x06\x00\x00\x00", "k1\x00k2\x00"}},
		{"ListChildrenScm", self, []any{"memory", scmx + "/k1"}, []string{"\x00\x00\x00\x00"}},
		{"ListChildrenScm", self, []any{"memory", nosuch}, []string{gone}},
		{"ListKeysScm", self, []any{"freezer", ""}, nil},
		{"ListKeysScm", self, []any{"memory", nosuch}, []string{gone}},
		// The original's '0' here was that the hierarchy was not its own.
		{"RemoveOnEmptyScm", self, []any{"memory", scmx}, []string{"1"}},
		{"PruneScm", self, []any{"memory", nosuch}, []string{failed}},
		{"RemoveScm", self, []any{"memory", scmx, int32(0)}, []string{failed}},
		{"MovePidAbsScm", victim, []any{"memory", "/"}, []string{"1"}},
	} {
		what := fmt.Sprintf("%s%q", tc.member, tc.args)
		x, err := c.OpenScm(tc.member, tc.args...)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		for _, cred := range tc.creds {
			if err := x.Kick(cred); err != nil {
				t.Errorf("%s: kick: %v", what, err)
			}
		}
		answer := tc.answer
		for i := 0; i < len(answer) || answer == nil && i < 3; i++ {
			d, err := x.Result()
			if err != nil {
				t.Errorf("%s: datagram %d: %v", what, i, err)
				break
			}
			if answer != nil && string(d.Data) != answer[i] {
				t.Errorf("%s: datagram %d is %q, want %q", what, i, d.Data, answer[i])
			}
			if d.Cred != nil && answer != nil && answer[i] == "p" && d.Cred.PID != int32(v.PID) {
				t.Errorf("%s: task %d, want %d", what, d.Cred.PID, v.PID)
			}
			if answer == nil && i == 2 && !strings.Contains("\n"+string(d.Data), "\ncgroup.procs\n0\n0\n33188\n") {
				t.Errorf("%s: %.60q", what, d.Data)
			}
		}
		// Then the daemon lets go of its end.
		eventually(t, what+": the daemon closed its end", func() bool { return !x.Open() })
		x.Close()
	}
	// The mark is of before the task left.
	memory := harness.Find(t, "memory")
	eventually(t, "removed when empty", func() bool {
		_, err := os.Stat(filepath.Join(memory.Mount, scmx))
		return os.IsNotExist(err)
	})
	for _, again := range []string{"2", "1"} {
		if again == "2" {
			if _, err := c.Scm("CreateScm", self, "memory", scmx); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := c.Scm("RemoveScm", self, "memory", scmx, int32(1)); err != nil || got != again {
			t.Errorf("RemoveScm: %v, %v, want %s", got, err, again)
		}
	}
}

// removeTree removes an empty cgroup with what is below.
func removeTree(t *testing.T, dir string) {
	t.Helper()
	sub, _ := filepath.Glob(filepath.Join(dir, "*/"))
	for _, s := range sub {
		if st, err := os.Lstat(s); err == nil && st.IsDir() {
			removeTree(t, s)
		}
	}
	if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
}
