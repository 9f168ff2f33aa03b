package manager_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/manager"
)

// disk returns the number of a block device that can be throttled, as
// MAJOR:MINOR. Nothing is read from it or written to it.
func disk(t *testing.T) string {
	t.Helper()
	devs, err := filepath.Glob("/sys/block/*/dev")
	if err != nil || len(devs) == 0 {
		t.Fatalf("no block device: %v", err)
	}
	return read(t, devs[0])
}

// requestor starts a process with the id in a cgroup of a controller, and
// returns a request by it. Where it is in other hierarchies it stays.
func requestor(t *testing.T, m *manager.Manager, id uint32, dir string) *api.Request {
	t.Helper()
	pid := sleeper(t, id)
	put(t, pid, dir)
	return requestOf(t, m, pid, id)
}

// A v1 throttle binds only the tasks of the very cgroup: nobody but the host's
// root may make a cgroup below a throttled one, or move a task there.
func TestKernelThrottleIsNotEscaped(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	m := newManager(t)
	name := cgtest.Name(t)
	top := filepath.Join(cgtest.Mount(t, "blkio"), name)
	mkdir := func(dir string) {
		t.Helper()
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"", "tasks", "cgroup.procs"} {
			if err := os.Chown(filepath.Join(dir, f), 1000, 1000); err != nil {
				t.Fatal(err)
			}
		}
	}
	mkdir(top)
	mkdir(filepath.Join(top, "a"))
	mkdir(filepath.Join(top, "a", "b"))
	mkdir(filepath.Join(top, "c"))
	user, root := requestor(t, m, 1000, top), requestor(t, m, 0, top)
	pid := sleeper(t, 1000)
	victim := api.Victim{PID: int64(pid)}
	in := func(rel string) {
		t.Helper()
		b := read(t, "/proc/"+strconv.Itoa(pid)+"/cgroup")
		if want := ":blkio:" + filepath.Join("/", name, rel) + "\n"; !strings.Contains(b+"\n", want) {
			t.Errorf("the task is not in %q:\n%s", rel, b)
		}
	}
	// What each may do below top, with the task in from.
	move := func(rq *api.Request, from, to string) error {
		t.Helper()
		put(t, pid, filepath.Join(top, from))
		err := m.MovePid0(rq, "blkio", to, victim)
		if err != nil {
			in(from)
		} else {
			in(to)
		}
		return err
	}
	create := func(rq *api.Request, at string) error {
		t.Helper()
		_, err := m.Create(rq, filepath.Join(at, "new"), []string{"blkio"}, nil)
		made := filepath.Join(top, at, "new")
		if exists(made) != (err == nil) {
			t.Errorf("Create below %q says %v, made: %v", at, err, exists(made))
		}
		if err := os.Remove(made); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		return err
	}
	allowed := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	denied := func(what string, err error) {
		t.Helper()
		if kind(err) != api.Denied || !strings.Contains(err.Error(), "throttling") {
			t.Errorf("%s: %v", what, err)
		}
	}

	allowed("create", create(user, ""))
	allowed("create further down", create(user, "a"))
	allowed("move down", move(user, "", "a"))
	allowed("move past", move(user, "", "a/b"))
	dev := disk(t)
	for _, rule := range []string{"read_bps", "write_bps", "read_iops", "write_iops"} {
		file := filepath.Join(top, "blkio.throttle."+rule+"_device")
		t.Run(rule, func(t *testing.T) {
			write(t, file, dev+" 1048576")
			denied("create", create(user, ""))
			denied("create further down", create(user, "a/b"))
			denied("move down", move(user, "", "a"))
			denied("move further down", move(user, "", "a/b"))
			denied("move sideways below it", move(user, "a", "c"))
			allowed("move up to it", move(user, "a", ""))
			allowed("move up below it", move(user, "a/b", "a"))
			allowed("move to where it is", move(user, "a", "a"))
			allowed("create by the host's root", create(root, ""))
			allowed("move by the host's root", move(root, "", "a"))

			write(t, file, dev+" 0")
			allowed("create without it", create(user, ""))
			allowed("move without it", move(user, "", "a"))
		})
	}
	t.Run("on the way", func(t *testing.T) {
		write(t, filepath.Join(top, "a/blkio.throttle.read_bps_device"), dev+" 1048576")
		allowed("create beside it", create(user, ""))
		allowed("move to it", move(user, "", "a"))
		denied("create below it", create(user, "a"))
		denied("create further below it", create(user, "a/b"))
		denied("move past it", move(user, "", "a/b"))
		denied("move down from it", move(user, "a", "a/b"))
		allowed("move up from it", move(user, "a", ""))
	})
	t.Run("a list passes over it", func(t *testing.T) {
		write(t, filepath.Join(top, "blkio.throttle.read_bps_device"), dev+" 1048576")
		list := "blkio,freezer"
		freezer := filepath.Join(cgtest.Mount(t, "freezer"), name)
		if err := os.Mkdir(freezer, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(freezer, 1000, 1000); err != nil {
			t.Fatal(err)
		}
		put(t, int(user.Opener.PID), freezer)
		_, err := m.Create0(user, list, "new")
		allowed("Create", err)
		if exists(filepath.Join(top, "new")) || !exists(filepath.Join(freezer, "new")) {
			t.Error("it is not in the other hierarchy alone")
		}
		_, err = m.Create(user, "all", strings.Split(list, ","), nil)
		denied("Create of CGManager1", err)
		if exists(filepath.Join(freezer, "all")) {
			t.Error("all or nothing: it is in the other hierarchy")
		}
	})
}
