package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "in" {
		fmt.Fprintln(os.Stderr, "in:", enterAndExec(os.Args[1:]))
		os.Exit(125)
	}
	harness.Main(m)
}

// enterAndExec is the program "in CGROUP UID COMMAND…" of the scripts: it moves
// itself, as root, to the cgroup of the script's tree in every hierarchy,
// becomes UID and executes the command.
func enterAndExec(args []string) error {
	if len(args) < 3 {
		return errors.New("want CGROUP UID COMMAND")
	}
	id, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	for _, h := range harness.Hierarchies() {
		if err := harness.Place(filepath.Join(h.Mount, os.Getenv("TREE"), args[0]), "0"); err != nil {
			return err
		}
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(id), syscall.Setuid(id)); err != nil {
		return err
	}
	path, err := exec.LookPath(args[2])
	if err != nil {
		return err
	}
	return syscall.Exec(path, args[2:], os.Environ())
}

// scriptCommands are what the scripts have besides testscript's own commands.
var scriptCommands = map[string]func(*testscript.TestScript, bool, []string){
	// exits CODE COMMAND…: the command ends with just this code.
	"exits": func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) < 2 {
			ts.Fatalf("usage: exits CODE COMMAND…")
		}
		code := 0
		if err := ts.Exec(args[1], args[2:]...); err != nil {
			e, ok := errors.AsType[*exec.ExitError](err)
			if !ok {
				ts.Fatalf("%v", err)
			}
			code = e.ExitCode()
		}
		if strconv.Itoa(code) != args[0] {
			ts.Fatalf("exit code %d, want %s", code, args[0])
		}
	},
	// gone CGROUP: the cgroup is in no hierarchy any more, or soon will be:
	// the daemon removes it once the kernel says that it is empty.
	"gone": func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) != 1 {
			ts.Fatalf("usage: gone CGROUP")
		}
		if err := waitGone(ts.Getenv("TREE") + "/" + args[0]); err != nil {
			ts.Fatalf("%v", err)
		}
	},
	// capture NAME: sets the variable to the last standard output.
	"capture": func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) != 1 {
			ts.Fatalf("usage: capture NAME")
		}
		ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
	},
}

func waitGone(cgroup string) error {
	deadline := time.Now().Add(cgtest.Patience(5 * time.Second))
	for _, h := range harness.Hierarchies() {
		for {
			_, err := os.Stat(filepath.Join(h.Mount, cgroup))
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s is still there in %s", cgroup, h.Name)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

// programs returns a PATH with cgm, by its other name too, and the program in.
func programs(t *testing.T) (path string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin, cgm := harness.PublicDir(t), harness.Binary(t, "cgm")
	for name, program := range map[string]string{"in": self, rtkitctlName: cgm} {
		if err := os.Symlink(program, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Dir(cgm) + ":" + bin + ":" + os.Getenv("PATH")
}

// TestScripts runs the scripts that need no daemon.
func TestScripts(t *testing.T) {
	path := programs(t)
	testscript.Run(t, testscript.Params{
		Dir:  "testdata/plain",
		Cmds: scriptCommands,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", path)
			return nil
		},
	})
}

// TestKernelScripts runs the scripts that need a daemon. Each has a tree of
// cgroups of its own: box, owned by root, and home, owned by uid 1000.
func TestKernelScripts(t *testing.T) {
	harness.Require(t, "root", "userns")
	files, err := filepath.Glob("testdata/daemon/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	rules := filepath.Join(t.TempDir(), "realtime.toml")
	if err := os.WriteFile(rules, []byte("[[rule]]\nuid = 1000\ncontainer = ['host', 1000]\nlimits.rtprio = 30\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon := harness.StartDaemon(t, "--realtime-policy", rules)
	path := programs(t)
	memory := harness.Find(t, "memory")
	for _, file := range harness.Share(files, 2) {
		name := strings.TrimSuffix(filepath.Base(file), ".txtar")
		t.Run(name, func(t *testing.T) {
			tree := harness.NewTree(t)
			tree.Make("box", 0, 0)
			tree.Make("home", 1000, 1000)
			if name == "rt" { // there is not enough for all of them
				fund(tree, "home")
			}
			testscript.Run(t, testscript.Params{
				Files: []string{file},
				Cmds:  scriptCommands,
				Condition: func(cond string) (bool, error) {
					switch cond {
					case "apart": // each controller has a hierarchy of its own
						return !memory.V2, nil
					case "sysresource":
						return harness.Has(cond), nil
					}
					return false, errors.New("no such condition")
				},
				Setup: func(env *testscript.Env) error {
					for name, value := range memoryFiles(memory.V2) {
						env.Setenv(name, value)
					}
					// How /proc/self/cgroup says that a task is in the tree.
					if env.Setenv("IN", ":memory:"+tree.Base); memory.V2 {
						env.Setenv("IN", "0::"+tree.Base)
					}
					env.Setenv("PATH", path)
					env.Setenv("TREE", tree.Base)
					env.Setenv("CGMANAGER_ADDRESS", "unix:path="+daemon.Sock)
					env.Setenv("SOCK", daemon.Sock)
					env.Setenv("DAEMON", strconv.Itoa(daemon.PID))
					env.Setenv("MEMORY", memory.Mount+tree.Base)
					env.Setenv("ESC", "\x1b")
					return nil
				},
			})
		})
	}
}

// fund gives a cgroup realtime runtime, where the kernel budgets it: inside a container
// there is none to lend but what the container was given.
func fund(tree *harness.Tree, name string) {
	const file = "cpu.rt_runtime_us"
	for _, h := range harness.Hierarchies() {
		if _, err := os.Stat(filepath.Join(tree.Dir(h, name), file)); err == nil {
			tree.Write(h, "", file, "300000")
			tree.Write(h, name, file, "100000")
		}
	}
}

// memoryFiles are the kernel's own names that the scripts look at, as variables.
func memoryFiles(v2 bool) map[string]string {
	if v2 {
		return map[string]string{"LIMIT": "memory.max", "USAGE": "memory.current", "TASKS": "cgroup.threads"}
	}
	return map[string]string{"LIMIT": "memory.limit_in_bytes", "USAGE": "memory.usage_in_bytes", "TASKS": "tasks"}
}
