package e2e_test

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// Numbers of what is no thread, or no more, or another's, of every size: nothing but
// the error, and nothing granted.
func TestKernelRealtimeBadInputNumbers(t *testing.T) {
	rw, w := newRealtimeContainers(t, "--actions-per-burst-max=100000")
	b := w.realtimeBox("c1", 200000)
	in := b.user(1000)
	rw.limit(in, 200000)
	for name, p := range map[string]*harness.Proc{"host": rw.user(1000), "container": in} {
		own := uint64(p.PID)
		gone := rw.threads(p, 1)[0]
		var ended uint64
		if err := p.Run(startThread, struct{}{}, &ended); err != nil {
			t.Fatal(err)
		}
		if err := p.Run(endThread, ended, nil); err != nil {
			t.Fatal(err)
		}
		zombie := p.Launch(nil, "/bin/true") // it is not waited for
		eventually(t, "a child has ended", func() bool {
			st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", hostChild(t, p, zombie.PID)))
			return err == nil && strings.Contains(string(st), ") Z ")
		})
		c := p.MustDial(rw.sock)
		for _, member := range []string{"MakeThreadRealtime", "MakeThreadHighPriority"} {
			level := any(uint32(5))
			if member == "MakeThreadHighPriority" {
				level = int32(-5)
			}
			check := func(what string, process, thread uint64, want harness.DBusError) {
				t.Helper()
				if process != own {
					values, err := c.RT(member+"WithPID", process, thread, level)
					rw.answers(fmt.Sprintf("%s: %sWithPID of %s", name, member, what), want, values, err)
					return
				}
				values, err := c.RT(member, thread, level)
				rw.answers(fmt.Sprintf("%s: %s of %s", name, member, what), want, values, err)
			}
			check("a thread that has ended", own, ended, rtNotFound)
			check("a child that has ended", uint64(zombie.PID), 0, rtNotFound)
			check("the thread of a child that has ended", uint64(zombie.PID), uint64(zombie.PID), rtNotFound)
			for _, n := range []uint64{
				1 << 31, 1<<31 + own, math.MaxInt32, math.MaxUint32 - 1, math.MaxUint32, 1 << 32, 1<<32 + own, 1<<32 + gone,
				1<<33 + gone, 1<<63 + own, math.MaxInt64, math.MaxUint64 - 1, math.MaxUint64,
			} {
				check(fmt.Sprintf("thread %#x", n), own, n, rtNotFound)
				if n != math.MaxUint32 && n != math.MaxUint64 { // that is who asks
					check(fmt.Sprintf("process %#x", n), n, 0, rtNotFound)
					check(fmt.Sprintf("process %#x, thread of who asks", n), n, gone, rtNotFound)
				}
			}
			check("process 0", 0, own, rtNotFound)
			check("the first process's thread", own, 1, rtNotFound)
			check("thread of another process", uint64(zombie.PID), own, rtNotFound)
		}
		c.Close()
		rw.ordinary(name, p)
		if _, err := zombie.End(time.Second); err != nil {
			t.Error(err)
		}
	}
}

// orphaned is a process whose first thread ends before the others. What these ask for
// then is written to a file.
type orphaned struct {
	Sock, File string
	// Thread is the one that asks, Leader and Own are what it is answered about the
	// first thread and about itself.
	Thread      int
	Leader, Own harness.DBusError
	Err         string
}

var askWithoutLeader = harness.Inside("ask without a first thread", func(o orphaned) (int, error) {
	tid := make(chan int)
	go func() {
		tid <- newThread()
	}()
	o.Thread = <-tid
	threadsOf[o.Thread] <- func() {
		go func() {
			stat := fmt.Sprintf("/proc/self/task/%d/stat", os.Getpid())
			cgtest.Until(30*time.Second, time.Millisecond, func() bool {
				b, err := os.ReadFile(stat)
				return err != nil || strings.Contains(string(b), ") Z ")
			})
			err := error(nil)
			q := wanted{Sock: o.Sock, Process: 1<<32 - 1, Realtime: true, Level: 4}
			if o.Leader, err = q.ask(); err == nil {
				q.Thread = uint64(o.Thread)
				o.Own, err = q.ask()
			}
			out := fmt.Sprintf("%q %q", o.Leader.Error(), o.Own.Error())
			if err != nil {
				out = err.Error()
			}
			_ = os.WriteFile(o.File+".new", []byte(out), 0o600)
			_ = os.Rename(o.File+".new", o.File)
		}()
	}
	return o.Thread, nil
})

var endLeader = harness.Inside("end the first thread", func(struct{}) (struct{}, error) {
	unix.Close(3) // the test's: it is not to wait for an answer
	_, _, err := unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	return struct{}{}, err
})

// A process whose first thread has ended is none that is helped by 0, and no thread
// but its own is ever meant.
func TestKernelRealtimeBadInputNoLeader(t *testing.T) {
	rw := newRealtimeWorld(t)
	t.Cleanup(func() { rw.d.terminate() })
	p := rw.user(1000)
	dir := harness.PublicDir(t)
	if err := os.Chown(dir, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	var tid uint64
	if err := p.Run(askWithoutLeader, orphaned{Sock: rw.sock, File: dir + "/answers"}, &tid); err != nil {
		t.Fatal(err)
	}
	if err := p.Run(endLeader, struct{}{}, nil); !errors.Is(err, harness.ErrGone) {
		t.Fatalf("the first thread: %v", err)
	}
	var b []byte
	eventually(t, "there are answers", func() (ok bool) {
		var err error
		b, err = os.ReadFile(dir + "/answers")
		return err == nil
	})
	t.Logf("asked by itself: %s", b)
	var leader, own string
	if _, err := fmt.Sscanf(string(b), "%q %q", &leader, &own); err != nil {
		t.Fatal(err)
	}
	if leader != rtNotFound.Error() && leader != rtFailed.Error() {
		t.Errorf("its first thread: %s", leader)
	}
	// What the kernel shows is what it was told.
	got, err := scheduled(int(tid))
	if want := map[bool]string{true: "rr 4 reset", false: "other 0"}[own == rtGranted.Error()]; err != nil || got != want {
		t.Errorf("its other thread is %q (%v), and it was told %q", got, err, own)
	}
	// Another asks for it: root.
	c := rw.p.MustDial(rw.sock)
	defer c.Close()
	values, err := c.RT("MakeThreadRealtimeWithPID", uint64(p.PID), uint64(0), uint32(5))
	rw.answers("root, for the first thread", rtNotFound, values, err)
}

// A policy file that is wrong, or that anybody can have written: the daemon does not
// start with it, and one that runs goes on with what it had.
func TestKernelRealtimeBadInputPolicy(t *testing.T) {
	rw := newRealtimeWorld(t)
	t.Cleanup(func() { rw.d.terminate() })
	path := rw.dir + "/realtime.toml"
	p := rw.user(1000)
	c := p.MustDial(rw.sock)
	defer c.Close()
	write := func(text string, mode uint32) func() error {
		return func() error { return errors.Join(os.WriteFile(path, []byte(text), 0o600), unix.Chmod(path, mode)) }
	}
	good := write(rules, 0o644)
	for _, bad := range []struct {
		name string
		make func() error
		says string
	}{
		{"a syntax error", write("[[rule]]\nuid = 1000\nallow = = true\n", 0o600), "realtime.toml:3:9: "},
		{"an unknown key", write("[[rule]]\n  prio = 5\n", 0o600), "realtime.toml:2:10: unknown key prio"},
		{"a value out of range", write("\n[[rule]]\nmax_priority = 99\nmin_nice = -21\n", 0o600), "realtime.toml:"},
		{"a user that is not there", write("[[rule]]\nuid = \"no-such-user\"\n", 0o600), "realtime.toml:2:"},
		{"half a file", write(rules+"\n[[rule]]\nuid = [1,\n", 0o600), "realtime.toml:"},
		{"zero bytes", write("\x00\x00[[rule]]", 0o600), "realtime.toml:1:"},
		{"a file that others can write", write(rules, 0o602), "can be written by others"},
		{"a file that a group can write", write(rules, 0o620), "can be written by others"},
		{"a file of another user", func() error { return errors.Join(good(), os.Chown(path, 1000, 1000)) }, "belongs to uid 1000"},
		{"a huge file", write(rules+strings.Repeat("# no\n", 20000), 0o600), "more than 65536 bytes"},
		{"a FIFO", func() error { return unix.Mkfifo(path, 0o600) }, "no regular file"},
		{"a directory", func() error { return os.Mkdir(path, 0o700) }, "no regular file"},
		{"a device", func() error { return os.Symlink("/dev/zero", path) }, "no regular file"},
	} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := bad.make(); err != nil {
			t.Fatal(err)
		}
		before := len(rw.log())
		if err := unix.Kill(rw.d.pid, unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		eventually(t, bad.name+" is complained about", func() bool { return strings.Contains(rw.log()[before:], "what it said before holds") })
		if log := rw.log()[before:]; !strings.Contains(log, bad.says) {
			t.Errorf("%s: the log does not say %q:\n%s", bad.name, bad.says, log)
		}
		values, err := c.RT("MakeThreadRealtime", uint64(0), uint32(3))
		rw.answers(bad.name+": what it said before holds", rtGranted, values, err)

		// A daemon of its own, with the same file.
		dir := harness.PublicDir(t)
		s := startService(t, rw.p, dir, dir+"/sock", dir+"/state", "--realtime-policy="+path)
		if code := s.wait(10 * time.Second); code != 1 {
			t.Errorf("%s: a daemon that starts with it ends with %d, want 1", bad.name, code)
		}
		if b, err := os.ReadFile(s.log); err != nil || !strings.Contains(string(b), bad.says) {
			t.Errorf("%s: its log does not say %q: %s, %v", bad.name, bad.says, b, err)
		}
	}
	// A good one is read again, and that there is none is no mistake: then nobody is
	// allowed anything.
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	before := len(rw.log())
	if err := unix.Kill(rw.d.pid, unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is read again", func() bool { return strings.Contains(rw.log()[before:], "was read again") })
	values, err := c.RT("MakeThreadRealtime", uint64(0), uint32(3))
	rw.answers("without a file", rtDenied, values, err)
}
