package e2e_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// A limit set three containers deep, through three proxies, is one: it binds what
// it is set for and nothing else, and those further out bind all that is inside.
func TestKernelDeepLimits(t *testing.T) {
	harness.Require(t, "cc", "mount")
	w := newWorld(t)
	all := threeDeep(w)
	a, c := all[0], all[2]
	l := &limited{world: w, c: c, victim: harness.Program(t, "testdata/victim.c", 0o755)}
	// Who must live: in each container, and beside what is limited.
	w.Make(c.cg+"/beside", c.HostUID, c.HostGID)
	beside := c.user(0)
	w.Place(beside, c.cg+"/beside")
	w.watch = []*harness.Proc{a.Proc, all[1].Proc, c.Proc, beside, a.user(0), all[1].user(0), c.user(0)}

	t.Run("memory", func(t *testing.T) {
		l := l.in(t)
		l.cgm("create all eat")
		l.cgm("set eat memory.limit=32M")
		if said, ws := l.run("eat", "eat", "8"); said != "ate" || ws.ExitStatus() != 0 {
			t.Errorf("8 MiB of 32: %q, %v", said, ws)
		}
		l.watched("beyond the limit", func() {
			if said, ws := l.run("eat", "eat", "96"); !ws.Signaled() || ws.Signal() != unix.SIGKILL {
				t.Errorf("96 MiB of 32: %q, %v", said, ws)
			}
		})
		if said, ws := l.run("", "eat", "96"); said != "ate" || ws.ExitStatus() != 0 {
			t.Errorf("96 MiB beside it: %q, %v", said, ws)
		}
	})
	t.Run("cpu", func(t *testing.T) {
		l := l.in(t)
		l.cgm("create all hog")
		l.cgm("set hog cpus_number=0.25")
		l.hog("hog", 0.25, 0.9)
	})

	// What the host gave the outermost container. The one inside sets what it
	// likes.
	memory, pids := harness.Find(t, "memory"), harness.Find(t, "pids")
	t.Run("memory of the outermost", func(t *testing.T) {
		l := l.in(t)
		l.cgm("create all eat2")
		limit := l.number(memory, a.cg, map[bool]string{false: "memory.usage_in_bytes", true: "memory.current"}[memory.V2]) + 64<<20
		w.Write(memory, a.cg, "memory.limit_in_bytes", strconv.Itoa(limit))
		l.cgm("set eat2 memory.limit=1G")
		l.watched("beyond the outer limit", func() {
			if said, ws := l.run("eat2", "eat", "160"); !ws.Signaled() || ws.Signal() != unix.SIGKILL {
				t.Errorf("160 MiB of 64: %q, %v", said, ws)
			}
		})
		w.Write(memory, a.cg, "memory.limit_in_bytes", "9223372036854771712")
	})
	t.Run("pids of the outermost", func(t *testing.T) {
		l := l.in(t)
		l.cgm("create all many")
		// Some of it goes to cgm, and to threads that the proxies may want.
		const more = 40
		w.Write(pids, a.cg, "pids.max", strconv.Itoa(l.number(pids, a.cg, "pids.current")+more))
		l.cgm("set many pids.limit=max")
		said, _ := l.run("many", "fork", "80")
		if n, err := strconv.Atoi(said); err != nil || n < 1 || n > more {
			t.Errorf("%q processes, %d allowed", said, more)
		}
		w.Write(pids, a.cg, "pids.max", "max")
		if said, _ := l.run("many", "fork", "80"); said != "80" {
			t.Errorf("%q processes without the limit", said)
		}
	})
	t.Run("cpu of the outermost", func(t *testing.T) {
		l := l.in(t)
		l.cgm("create all hog2")
		cpu := harness.Find(t, "cpu")
		file, value, none := "cpu.cfs_quota_us", "25000", "-1"
		if cpu.V2 {
			file, value, none = "cpu.max", "25000 100000", "max 100000"
		}
		w.Write(cpu, a.cg, file, value)
		// Version 1 does not take a share of more than there is.
		out, code := c.sh(usualSock, "cgm set hog2 cpus_number=2")
		if code != 0 && cpu.V2 {
			t.Errorf("cgm set: %s", out)
		}
		l.hog("hog2", 0.25, 0.1)
		w.Write(cpu, a.cg, file, none)
	})
}

// limited is a container whose root sets limits, and runs what they bind.
type limited struct {
	*world
	c      *box
	victim string
}

func (l *limited) in(t *testing.T) *limited {
	return &limited{world: l.sub(t), c: l.c, victim: l.victim}
}

func (l *limited) cgm(args string) {
	l.Helper()
	if out, code := l.c.sh(usualSock, "cgm "+args); code != 0 || out != "" {
		l.Fatalf("cgm %s: %d, %q", args, code, out)
	}
}

// run runs a victim in a cgroup of the container's and returns what it says.
func (l *limited) run(cg string, args ...string) (string, unix.WaitStatus) {
	l.Helper()
	v := l.c.Launch(nil, append([]string{l.victim}, args...)...)
	l.cgm(fmt.Sprintf("movepid all '%s' %d", cg, v.PID))
	if _, err := v.In.Write([]byte{1}); err != nil {
		l.Fatal(err)
	}
	said, err := v.Said(cgtest.Patience(10 * time.Second))
	if err != nil {
		l.Error(err)
	}
	ws, err := v.End(cgtest.Patience(10 * time.Second))
	if err != nil {
		l.Error(err)
	}
	return said, ws
}

// hog runs one that takes what it gets in a cgroup. It has no more than is allowed, in
// cpus, and a tenth of that: what it has at once, as a processor that was stalled with
// it on counts it, it lacks later. Where others want the machine it may have less than
// the part of it that is to be seen for a while.
func (l *limited) hog(cg string, allowed, part float64) {
	l.Helper()
	v := l.c.Launch(nil, "/bin/sh", "-c", `ulimit -t 20; read x; while :; do :; done`)
	defer func() {
		if err := v.Kill(); err != nil {
			l.Error(err)
		}
		if _, err := v.End(cgtest.Patience(5 * time.Second)); err != nil {
			l.Error(err)
		}
	}()
	l.cgm(fmt.Sprintf("movepid all %s %d", cg, v.PID))
	if _, err := v.In.Write([]byte("\n")); err != nil {
		l.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	var share float64
	start, used := time.Now(), l.used(l.c.cg+"/"+cg)
	for range 8 {
		time.Sleep(5 * time.Second)
		had := l.used(l.c.cg+"/"+cg) - used
		took := time.Since(start)
		l.Logf("%v of cpu time in %v", had, took)
		share = had.Seconds() / took.Seconds()
		switch {
		case share > 1.1*allowed: // of a longer time it may be less
			continue
		case share >= part*allowed:
			return
		}
		start, used = time.Now(), l.used(l.c.cg+"/"+cg)
	}
	l.Errorf("it had %.3f of a cpu, and %.2f is allowed", share, allowed)
}

// used is the cpu time that a cgroup has had.
func (l *limited) used(cg string) time.Duration {
	l.Helper()
	cpu := harness.Find(l.T, "cpu")
	if !cpu.V2 {
		return time.Duration(l.number(harness.Find(l.T, "cpuacct"), cg, "cpuacct.usage"))
	}
	for line := range strings.Lines(l.Read(cpu, cg, "cpu.stat")) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "usage_usec "); ok {
			n, err := strconv.Atoi(v)
			if err != nil {
				l.Fatal(err)
			}
			return time.Duration(n) * time.Microsecond
		}
	}
	l.Fatal("no usage_usec")
	return 0
}

func (l *limited) number(h harness.Hierarchy, cg, file string) int {
	l.Helper()
	n, err := strconv.Atoi(l.Read(h, cg, file))
	if err != nil {
		l.Fatal(err)
	}
	return n
}
