package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"cgmanager/test/harness"
)

// session is a command of testdata/original-0.42.txt.
type session struct {
	line    int
	command string
	asked   []harness.Recorded // at most one
	printed string
	exit    int
}

func readSessions(t *testing.T) []session {
	t.Helper()
	b, err := os.ReadFile("testdata/original-0.42.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all []session
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		line = strings.TrimSuffix(line, "\n")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		kind, rest, _ := strings.Cut(line, " ")
		if kind == "$" {
			all = append(all, session{line: n, command: rest})
			continue
		}
		s := &all[len(all)-1]
		switch kind {
		case "C:":
			name, args, _ := strings.Cut(rest, " ")
			s.asked = []harness.Recorded{{Method: name, Args: recordedValues(t, args)}}
		case "S:":
			answer(t, &s.asked[0], rest)
		case "|":
			s.printed += rest + "\n"
		case "exit":
			s.exit, err = strconv.Atoi(rest)
		default:
			err = fmt.Errorf("%q", line)
		}
		if err != nil {
			t.Fatalf("line %d: %v", n, err)
		}
	}
	return all
}

// answer adds a line of an answer to what was recorded.
func answer(t *testing.T, r *harness.Recorded, line string) {
	t.Helper()
	kind, rest, _ := strings.Cut(line, " ")
	switch kind {
	case "refused":
		r.Refused = recordedValues(t, rest)[0].(string)
	case "pid":
		pids, _ := r.Reply.([]int32)
		r.Reply = append(pids, recordedValues(t, rest)[0].(int32))
	case "name":
		names, _ := r.Reply.([]string)
		r.Reply = append(names, recordedValues(t, rest)[0].(string))
	case "key":
		keys, _ := r.Reply.([]harness.RecordedKey)
		k := harness.RecordedKey{}
		if _, err := fmt.Sscanf(rest, "%s %d %d %o", &k.Name, &k.UID, &k.GID, &k.Mode); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		r.Reply = append(keys, k)
	default:
		r.Reply = recordedValues(t, line)[0]
	}
}

var valuePattern = regexp.MustCompile(`"[^"]*"|-?[0-9]+`)

// recordedValues reads strings and numbers.
func recordedValues(t *testing.T, text string) []any {
	t.Helper()
	vs := []any{}
	for _, w := range valuePattern.FindAllString(text, -1) {
		if s, ok := strings.CutPrefix(w, `"`); ok {
			vs = append(vs, strings.TrimSuffix(s, `"`))
			continue
		}
		n, err := strconv.ParseInt(w, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		vs = append(vs, int32(n))
	}
	return vs
}

// Against the original daemon cgm asks and prints what the original's did.
func TestRecordedOriginal(t *testing.T) {
	sessions := readSessions(t)
	if len(sessions) < 30 {
		t.Fatalf("%d commands", len(sessions))
	}
	for _, s := range sessions {
		t.Run(s.command, func(t *testing.T) {
			o := harness.StartOriginal(t, 10, s.asked...)
			got, exit := cgmAt(t, o, s.command)
			if got != s.printed || exit != s.exit {
				t.Errorf("line %d: exit %d:\n%swant %d:\n%s", s.line, exit, got, s.exit, s.printed)
			}
			if n := o.Left(); n > 0 {
				t.Errorf("line %d: the daemon was not asked for %v", s.line, s.asked)
			}
		})
	}
}

// What the original does not know fails, and says that.
func TestRecordedOriginalTooOld(t *testing.T) {
	for _, command := range []string{
		"cgm tree", "cgm set web pids.limit=9", "cgm get web pids.limit", "cgm run web -- true", "cgm kill web", "cgm freeze web", "cgm delegate web",
	} {
		t.Run(command, func(t *testing.T) {
			got, exit := cgmAt(t, harness.StartOriginal(t, 10), command)
			if exit != 1 || !strings.Contains(got, "it is the original cgmanager") || !strings.Contains(got, "\nhint: ") {
				t.Errorf("exit %d: %s", exit, got)
			}
		})
	}
	places := slices.Repeat([]harness.Recorded{{Method: "GetPidCgroupAbs", Reply: "/lxc/n"}}, 13)
	got, exit := cgmAt(t, harness.StartOriginal(t, 10, places...), "cgm status")
	if exit != 0 || !strings.Contains(got, "the original cgmanager\napi version  10\n") || !strings.HasSuffix(got, "name=systemd  /lxc/n\n") {
		t.Errorf("cgm status: exit %d: %s", exit, got)
	}
}

// cgmAt runs a command against the original and returns what it printed and its
// exit code.
func cgmAt(t *testing.T, o *harness.Original, command string) (string, int) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", command)
	cmd.Env = append(os.Environ(), "CGMANAGER_ADDRESS=unix:path="+o.Path, "PATH="+filepath.Dir(harness.Binary(t, "cgm"))+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// TestExamples: the examples in the help of the original's verbs are no misuse.
func TestExamples(t *testing.T) {
	for _, v := range verbs {
		if (v.example == "") != (v.args == 0) {
			t.Errorf("%s: example %q", v.use, v.example)
		}
		for line := range strings.Lines(v.example) {
			words := strings.Fields(line)
			cmd, args, err := newRoot().Find(words[1:])
			if err == nil {
				err = cmd.Args(cmd, args)
			}
			if err == nil && v.check != nil {
				err = v.check(args)
			}
			if words[0] != "cgm" || cmd.Use != v.use || err != nil {
				t.Errorf("%s: %q: %v", v.use, line, err)
			}
		}
	}
}
