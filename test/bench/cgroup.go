package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup is the cgroup that this process has put itself into, so that what it
// asks the daemon for lies below.
type cgroup struct {
	controller, key string
	dir             string // of the cgroup, as a path here
	from            string // the cgroup that the process came from
}

// enterCgroup makes a cgroup below this process's own, with children x, a and
// b, and enters it.
func enterCgroup() (_ *cgroup, err error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	cg := &cgroup{controller: "memory", key: "memory.limit_in_bytes"}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && slices.Contains(strings.Split(f[1], ","), cg.controller) {
			cg.from = filepath.Join("/sys/fs/cgroup/memory", f[2])
		}
	}
	if cg.from == "" {
		return nil, errors.New("needs the memory controller on version 1, mounted at /sys/fs/cgroup/memory")
	}
	cg.dir = filepath.Join(cg.from, "cgmtest-bench-"+strconv.Itoa(os.Getpid()))
	for _, d := range []string{"", "x", "a", "b"} {
		if err := os.Mkdir(filepath.Join(cg.dir, d), 0o755); err != nil {
			return nil, errors.Join(err, cg.leave())
		}
	}
	if err := enter(cg.dir); err != nil {
		return nil, errors.Join(err, cg.leave())
	}
	return cg, nil
}

func enter(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

// leave goes back and removes the cgroup.
func (cg *cgroup) leave() error {
	if err := enter(cg.from); err != nil {
		return err
	}
	var err error
	for range 100 { // a process that has ended may hold its cgroup a moment longer
		children, _ := filepath.Glob(filepath.Join(cg.dir, "*", "cgroup.procs"))
		for _, c := range children {
			_ = unix.Rmdir(filepath.Dir(c))
		}
		if err = unix.Rmdir(cg.dir); err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("rmdir %s: %w", cg.dir, err)
}

// settle waits until the kernel has freed most of the cgroups that were
// removed. It does so in its own time, and there are 65,535 memory cgroups at
// most, those not freed included: mkdir fails with EBUSY beyond that.
func (cg *cgroup) settle() error {
	const few = 2000
	for start := time.Now(); time.Since(start) < stalled; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile("/proc/cgroups")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line) // name, hierarchy, number of cgroups, enabled
			if len(f) != 4 || f[0] != cg.controller {
				continue
			}
			if n, err := strconv.Atoi(f[2]); err != nil || n < few {
				return err
			}
		}
	}
	return nil // they may be somebody else's
}
