package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

// What a container does to its own cgroups of v2 around the daemon, in the cgroup
// file system, and what becomes of those above it who ask the daemon.

// directly makes a child of a cgroup's directory, and writes values to its files,
// each a pair of file and value.
var directly = harness.Inside("directly", func(args []string) (bool, error) {
	dir, writes := args[0], args[1:]
	if err := os.Mkdir(dir, 0o755); err != nil {
		return false, err
	}
	for i := 0; i+1 < len(writes); i += 2 {
		if err := writeFile(filepath.Join(dir, writes[i]), writes[i+1]); err != nil {
			return false, err
		}
	}
	return true, nil
})

func writeFile(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err = unix.Write(fd, []byte(value)); err != nil {
		err = &os.PathError{Op: "write", Path: path, Err: err}
	}
	return err
}

// deeply makes a chain of cgroups below a cgroup's directory.
var deeply = harness.Inside("deeply", func(args []string) (bool, error) {
	levels, err := strconv.Atoi(args[1])
	if err != nil {
		return false, err
	}
	fd, err := unix.Open(args[0], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for i := 0; err == nil && i < levels; i++ {
		if err = unix.Mkdirat(fd, "d", 0o755); err != nil {
			break
		}
		above := fd
		fd, err = unix.Openat(above, "d", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		_ = unix.Close(above)
	}
	if err == nil {
		err = unix.Close(fd)
	}
	return err == nil, err
})

// A container does not get out of Kill, nor of DeleteForce, by a threaded cgroup,
// whose list of processes cannot be read.
func TestKernelKillThreaded(t *testing.T) {
	harness.Require(t, "v2")
	h := harness.Find(t, "unified")
	for _, method := range []string{"Kill", "Kill of the threaded cgroup", "DeleteForce"} {
		t.Run(method, func(t *testing.T) {
			method, which, _ := strings.Cut(method, " ")
			w := newWorld(t)
			b := w.box("c1")
			child := b.Spawn(harness.Spec{})
			job := filepath.Join(w.Dir(h, "c1"), "job")
			if err := b.Run(directly, []string{job, "cgroup.procs", fmt.Sprint(child.PID)}, nil); err != nil {
				t.Fatal(err)
			}
			if err := b.Run(directly, []string{job + "/t", "cgroup.type", "threaded", "cgroup.procs", fmt.Sprint(child.PID)}, nil); err != nil {
				t.Fatal(err)
			}
			want(t, "the place of the process", rawCgroup(t, child.HostPID), w.Path("c1/job/t"))
			c := asker{t, w.host(0, ".").MustDial(w.d.Sock)}
			defer c.c.Close()
			if which != "" {
				c.v1(method, "c1/job/t")
			} else {
				c.v1(method, "c1/job")
			}
			if method == "Kill" {
				if !child.Dead(5 * time.Second) {
					t.Error("a process outlives Kill")
				}
			} else if w.Exists(h, "c1/job") {
				t.Error("the cgroup outlives DeleteForce")
			}
		})
	}
}

// A container whose cgroups lie deeper than anybody looks does not keep a user of
// the host from making any.
func TestKernelDeepElsewhere(t *testing.T) {
	harness.Require(t, "v2")
	h := harness.Find(t, "unified")
	w := newWorld(t)
	b := w.box("c1")
	w.Make("user", 1000, 1000)
	u := w.host(1000, "user")
	if err := b.Run(deeply, []string{w.Dir(h, "c1"), "200"}, nil); err != nil {
		t.Fatal(err)
	}
	c := asker{t, u.MustDial(w.d.Sock)}
	defer c.c.Close()
	want(t, "Create", c.v1("Create", "web", []string{}, map[string]string{}), []any{true})
}

// Who delegates a cgroup that was another's, or gives it away, leaves nobody the
// files of its hidden leaf: what they could do there they could do to the tasks.
func TestKernelLeafFollows(t *testing.T) {
	harness.Require(t, "v2")
	w := newWorld(t)
	h := harness.Find(t, "unified")
	ctrls, _ := domain(t, h)
	enableAbove(t, w, h, ctrls)
	b := w.box("c1")
	c := asker{t, b.MustDial(w.d.Sock)}
	defer c.c.Close()
	child := b.Spawn(harness.Spec{})
	c.v1("Create", "job", ctrls, map[string]string{})
	c.v1("Move", "job", uint32(child.PID))
	c.v1("Create", "job/a", ctrls, map[string]string{})
	same := func(when string) {
		t.Helper()
		for _, file := range []string{"cgroup.procs", "cgroup.freeze", "cgroup.max.depth"} {
			want(t, file+" of the leaf "+when, w.owner(h, "c1/job/.cgmanager-leaf", file), w.owner(h, "c1/job", file))
		}
	}
	same("as it was made")
	c.v1("Chown", "job", uint32(1000), uint32(1000))
	same("given away")
	c.v1("Delegate", "job", ctrls)
	same("delegated")
	want(t, "cgroup.freeze", w.owner(h, "c1/job", "cgroup.freeze"), fmt.Sprintf("0:%d", b.HostGID))
}
