package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// service is a daemon that the test starts and ends as it likes.
type service struct {
	t        *testing.T
	child    *harness.Child
	pid      int
	sock     string
	log      string
	finished bool
}

// startService starts the daemon as a child of p without waiting for it.
func startService(t *testing.T, p *harness.Proc, dir, sock, state string, args ...string) *service {
	t.Helper()
	return holdService(t, p, dir, sock, state, args...).release()
}

// release lets it start.
func (s *service) release() *service {
	s.t.Helper()
	if _, err := s.child.In.Write([]byte("\n")); err != nil {
		s.t.Fatal(err)
	}
	return s
}

// holdService is startService for a daemon that waits for release.
func holdService(t *testing.T, p *harness.Proc, dir, sock, state string, args ...string) *service {
	t.Helper()
	s := &service{t: t, sock: sock, log: filepath.Join(dir, "log")}
	argv := append([]string{
		"/bin/bash", "-c", `read -r; exec "$@" 2>>"$0"`, s.log,
		harness.Binary(t, "cgmanager"), "--log-level=debug", "--listen=unix:path=" + sock, "--state-dir=" + state,
	}, args...)
	s.child = p.Launch(nil, argv...)
	s.pid = s.child.PID
	t.Cleanup(func() {
		if !s.finished {
			_ = s.child.Kill()
			s.wait(time.Second)
		}
		if t.Failed() {
			b, _ := os.ReadFile(s.log)
			t.Logf("%s:\n%s", s.log, b)
		}
	})
	return s
}

// wait waits until it ends, or kills it after the timeout, longer on a slow
// machine, and returns the exit code, or -1.
func (s *service) wait(timeout time.Duration) int {
	s.t.Helper()
	ws, err := s.child.End(cgtest.Patience(timeout))
	if err != nil {
		s.t.Fatalf("wait for the daemon: %v", err)
	}
	s.finished = true
	return ws.ExitStatus()
}

// serve waits until the daemon answers.
func (s *service) serve() *service {
	s.t.Helper()
	var err error
	if !cgtest.Until(10*time.Second, 5*time.Millisecond, func() bool {
		err = harness.Ping(s.sock)
		return err == nil
	}) {
		s.t.Fatalf("the daemon does not answer: %v", err)
	}
	return s
}

// answers reports whether it is this daemon that answers.
func (s *service) answers() bool {
	fd, err := dialRaw(s.sock)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	return err == nil && int(cred.Pid) == s.pid && harness.Ping(s.sock) == nil
}

// ended reports whether it ended, waited for or not.
func (s *service) ended() (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist), err
	}
	_, after, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(after, "Z"), nil
}

// kill9 is what no daemon can prepare for.
func (s *service) kill9() {
	s.t.Helper()
	if err := s.child.Kill(); err != nil {
		s.t.Fatal(err)
	}
	if code := s.wait(5 * time.Second); code != -1 {
		s.t.Fatalf("the daemon ended with %d, was not killed", code)
	}
}

func (s *service) signal(sig unix.Signal) {
	s.t.Helper()
	send := unix.Kill
	if sig == unix.SIGSTOP {
		send = func(pid int, _ unix.Signal) error { return harness.Pause(pid) }
	}
	if err := send(s.pid, sig); err != nil {
		s.t.Fatal(err)
	}
}

// terminate ends it in order, which takes a second at most.
func (s *service) terminate() {
	s.t.Helper()
	start := time.Now()
	s.signal(unix.SIGTERM)
	code := s.wait(5 * time.Second)
	if took := time.Since(start); code != 0 || took > patience() {
		s.t.Errorf("the daemon ended with %d after %v, want 0 within a second", code, took)
	}
}

// burstArgs are for burst: so many connections, each of which writes the login
// and its own message stream at once and reads nothing. FDs are connections
// that have logged in already.
type burstArgs struct {
	Sock    string
	Streams [][]byte
	FDs     []int
}

var burst = harness.Inside("burst", func(a burstArgs) ([]int, error) {
	fds := a.FDs
	for i, s := range a.Streams {
		if len(a.FDs) == 0 {
			fd, err := dialRaw(a.Sock)
			if err != nil {
				return nil, err
			}
			fds = append(fds, fd)
			s = append([]byte(login), s...)
		}
		if _, err := harness.Begin(fds[i], s); err != nil {
			return nil, err
		}
	}
	return fds, nil
})

// gather reads each connection to its end and returns what came.
var gather = harness.Inside("gather", func(fds []int) ([][]byte, error) {
	var all [][]byte
	buf := make([]byte, 64<<10)
	for _, fd := range fds {
		var got []byte
		for {
			n, err := harness.Read(fd, buf)
			if errors.Is(err, unix.ECONNRESET) || err == nil && n == 0 {
				break
			}
			if err != nil {
				return nil, err
			}
			got = append(got, buf[:n]...)
		}
		unix.Close(fd)
		all = append(all, got)
	}
	return all, nil
})

// hammerResult counts what a hammering client saw.
type hammerResult struct {
	Answered int
	End      string
}

// hammerArgs are for hammer: a connection on which the first Ask is sent.
type hammerArgs struct {
	FD          int
	Ask, Answer []byte
}

// hammer asks one thing after the other until the daemon ends.
var hammer = harness.Inside("hammer", func(a hammerArgs) (r hammerResult, err error) {
	defer unix.Close(a.FD)
	buf := make([]byte, 4096)
	for {
		var got []byte
		for !bytes.HasSuffix(got, a.Answer) {
			n, err := harness.Read(a.FD, buf)
			if err != nil {
				r.End = err.Error()
				return r, nil
			}
			if n == 0 {
				r.End = "end of file"
				return r, nil
			}
			got = append(got, buf[:n]...)
			if n >= len(a.Answer) && r.Answered > 0 {
				break // serials differ, sizes do not
			}
		}
		r.Answered++
		if _, err := harness.Write(a.FD, a.Ask); err != nil {
			r.End = err.Error()
			return r, nil
		}
	}
})

// SIGTERM: what was accepted is answered, the socket is removed, and the daemon
// ends within a second, under load as well.
func TestKernelNothingLostTermination(t *testing.T) {
	harness.Require(t, "root")
	conns, creates := 24, 12
	if harness.Emulated() {
		conns, creates = 3, 2 // what can be done in the time that there is
	}
	for round := range harness.Rounds(5) {
		t.Run(fmt.Sprint("round ", round), func(t *testing.T) {
			w := &world{T: t, Tree: harness.NewTree(t)}
			dir := harness.PublicDir(t)
			p := harness.Start(t, harness.Spec{})
			d := startService(t, p, dir, dir+"/sock", dir+"/state").serve()
			w.Make("box", 0, 0)
			c := w.host(0, "box")

			// An exchange that has begun.
			sc := c.MustDial(d.sock)
			x, err := sc.OpenScm("CreateScm", "pids", "scm")
			if err != nil {
				t.Fatal(err)
			}
			// Some who ask for nothing, and half a message.
			idle := make([][]byte, 20)
			idle[0] = call(t, 1, harness.V0, "Ping", int32(0))[:20]
			var idleFDs []int
			if err := c.Run(burst, burstArgs{Sock: d.sock, Streams: idle}, &idleFDs); err != nil {
				t.Fatal(err)
			}
			// Some who never stop.
			hammered := make(chan hammerResult, 2)
			for range cap(hammered) {
				h := w.host(0, "box")
				ping := call(t, 1, harness.V0, "Ping", int32(0))
				var fd []int
				if err := h.Run(burst, burstArgs{Sock: d.sock, Streams: [][]byte{ping}}, &fd); err != nil {
					t.Fatal(err)
				}
				go func() {
					var r hammerResult
					if err := h.Run(hammer, hammerArgs{fd[0], ping, emptyReply(1, 1)}, &r); err != nil {
						r.End = err.Error()
					}
					hammered <- r
				}()
			}
			var streams [][]byte
			for i := range conns {
				var s []byte
				for j := range creates {
					s = append(s, call(t, uint32(2*j+1), harness.V0, "Create", "pids", fmt.Sprintf("c%d-%d", i, j))...)
					s = append(s, call(t, uint32(2*j+2), harness.V0, "GetValue", "pids", fmt.Sprintf("c%d-%d", i, j), "pids.max")...)
				}
				streams = append(streams, s)
			}
			// All of it is in the kernel before the daemon sees any, and the
			// signal is there as well.
			var fds []int
			if !harness.Pipelines() {
				if err := c.Run(burst, burstArgs{Sock: d.sock, Streams: make([][]byte, conns)}, &fds); err != nil {
					t.Fatal(err)
				}
			}
			d.signal(unix.SIGSTOP)
			if err := c.Run(burst, burstArgs{d.sock, streams, fds}, &fds); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			d.signal(unix.SIGTERM)
			var (
				kicked error
				lost   []string // what was not answered, or not done
			)
			lose := func(format string, args ...any) { lost = append(lost, fmt.Sprintf(format, args...)) }
			if harness.Emulated() { // too slow for the time that the daemon gives it
				kicked = x.Kick(c.Cred)
			}
			goesOn := time.Now()
			d.signal(unix.SIGCONT)
			if !harness.Emulated() {
				kicked = x.Kick(c.Cred)
			}
			if kicked != nil {
				lose("the exchange: %v", kicked)
			} else if got, err := x.Finish("CreateScm"); err != nil || got != "1" {
				lose("the exchange: %v, %v", got, err)
			}
			var got [][]byte
			if err := c.Run(gather, fds, &got); err != nil {
				t.Fatal(err)
			}
			code := d.wait(5 * time.Second)
			hadTime := time.Since(goesOn)
			if took := time.Since(start); code != 0 || took > patience() {
				t.Errorf("the daemon ended with %d after %v", code, took)
			} else {
				t.Logf("the daemon ended after %v", took)
			}
			pids := harness.Find(t, "pids")
			for i, b := range got {
				if n := bytes.Count(b, []byte("l\x02\x01\x01")); n != 2*creates {
					lose("connection %d: %d answers to %d requests", i, n, 2*creates)
				}
				for j := range creates {
					if name := fmt.Sprintf("box/c%d-%d", i, j); !w.Exists(pids, name) {
						lose("%s was not created", name)
					}
				}
			}
			for range cap(hammered) {
				switch r := <-hammered; {
				case strings.Contains(r.End, "timed out") || strings.Contains(r.End, "temporarily"):
					t.Errorf("a client that never stops: %+v", r)
				case r.Answered == 0:
					lose("a client that never stops: %+v", r)
				}
			}
			// An emulated machine may stand still for all of the time that the daemon gives
			// itself (server.Limits.Drain), and then what is left is cut off: not before.
			switch what := strings.Join(lost, "\n"); {
			case what == "":
			case harness.Emulated() && hadTime >= 700*time.Millisecond:
				t.Logf("in the %v that it had, the daemon did not get to it:\n%s", hadTime, what)
			default:
				t.Errorf("after %v:\n%s", hadTime, what)
			}
			if err := c.Run(gather, idleFDs, nil); err != nil {
				t.Errorf("idle connections: %v", err)
			}
			if left, err := os.ReadDir(dir); err != nil {
				t.Error(err)
			} else {
				for _, e := range left {
					if e.Name() != "log" && e.Name() != "state" {
						t.Errorf("%s is left behind", e.Name())
					}
				}
			}
		})
	}
}

// kill -9 and a new start: every cgroup, limit and mark is still there.
func TestKernelNothingLostKill(t *testing.T) {
	harness.Require(t, "root")
	w := &world{T: t, Tree: harness.NewTree(t)}
	dir := harness.PublicDir(t)
	p := harness.Start(t, harness.Spec{})
	start := func() *service {
		return startService(t, p, dir, dir+"/sock", dir+"/state").serve()
	}
	d := start()
	w.Make("box", 0, 0)
	c := w.host(0, "box")
	conn := c.MustDial(d.sock)
	a := asker{t, conn}
	values := map[string]string{"memory.limit": "67108864", "pids.limit": "33", "cpu_share_percent": "50", "blkio_weight": "300"}
	keys := []string{"memory.limit", "pids.limit", "cpu_share_percent"}
	if _, err := conn.V1("Create", "keep", []string{}, values); err != nil {
		delete(values, "blkio_weight") // not every kernel has it
		a.v1("Create", "keep", []string{}, values)
	}
	if slices.ContainsFunc(harness.Hierarchies(), func(h harness.Hierarchy) bool { return h.Name == "name=systemd" }) {
		a.v0("Create", "name=systemd", "keep")
	}
	a.v0("SetValue", "devices", "keep", "devices.deny", "a")
	a.v0("SetValue", "devices", "keep", "devices.allow", "c 1:3 rwm")
	a.v0("Chown", "all", "keep", int32(1000), int32(1000))
	a.v0("SetValue", "freezer", "keep", "freezer.state", "FROZEN")
	tasks := map[string]*harness.Child{}
	for _, name := range []string{"stays", "ends", "empty"} {
		a.v0("Create", "all", name)
		if name != "empty" {
			tasks[name] = c.Launch(nil, "/bin/sleep", "300")
			a.v0("MovePid", "all", name, int32(tasks[name].PID))
		}
		a.v0("RemoveOnEmpty", "all", name)
	}
	end := func(name string) {
		t.Helper()
		if err := tasks[name].Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := tasks[name].End(time.Second); err != nil {
			t.Fatal(err)
		}
	}
	limits := a.v1("GetValue", "keep", keys)
	before := w.Snapshot()
	conn.Close()
	d.kill9()
	if diff := before.Diff(w.Snapshot()); len(diff) > 0 {
		t.Errorf("changed by the end of the daemon:\n  %s", strings.Join(diff, "\n  "))
	}
	if _, err := os.Stat(d.sock); err != nil {
		t.Fatalf("nothing can be removed by a daemon that was killed: %v", err)
	}
	d = start()
	if diff := before.Diff(w.Snapshot()); len(diff) > 0 {
		t.Errorf("changed by the new daemon:\n  %s", strings.Join(diff, "\n  "))
	}
	// Again, and a task ends while there is no daemon.
	d.kill9()
	end("ends")
	d = start()
	conn = c.MustDial(d.sock)
	a = asker{t, conn}
	want(t, "the limits", a.v1("GetValue", "keep", keys), limits)
	everyMark := func(what string, there map[string]bool) {
		t.Helper()
		for name, there := range there {
			for _, h := range harness.Hierarchies() {
				if there {
					if !w.Exists(h, "box/"+name) {
						t.Errorf("%s: %s is gone from %s", what, name, h.Name)
					}
				} else {
					eventually(t, what+": "+name+" goes from "+h.Name, func() bool { return !w.Exists(h, "box/"+name) })
				}
			}
		}
	}
	everyMark("after the new start", map[string]bool{"ends": false, "stays": true, "empty": true, "keep": true})
	end("stays")
	everyMark("after the task ended", map[string]bool{"stays": false, "empty": true, "keep": true})
	tasks["late"] = c.Launch(nil, "/bin/sleep", "300")
	a.v0("MovePid", "all", "empty", int32(tasks["late"].PID))
	everyMark("filled at last", map[string]bool{"empty": true})
	end("late")
	everyMark("and empty again", map[string]bool{"empty": false, "keep": true})
	a.v0("SetValue", "freezer", "keep", "freezer.state", "THAWED")
	a.v0("Remove", "all", "keep", int32(1))
	conn.Close()
	d.terminate()
}

// Two daemons never serve at once.
func TestKernelNothingLostSecondDaemon(t *testing.T) {
	harness.Require(t, "root")
	dir := harness.PublicDir(t)
	p := harness.Start(t, harness.Spec{})
	d := startService(t, p, dir, dir+"/sock", dir+"/state").serve()
	inode := func() uint64 {
		var st unix.Stat_t
		if err := unix.Lstat(dir+"/sock", &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	before := inode()
	for what, second := range map[string]*service{
		"the same state":  startService(t, p, dir, dir+"/sock2", dir+"/state"),
		"the same socket": startService(t, p, dir, dir+"/sock", dir+"/state2"),
		"all the same":    startService(t, p, dir, dir+"/sock", dir+"/state"),
	} {
		if code := second.wait(5 * time.Second); code != 1 {
			t.Errorf("%s: a second daemon ended with %d", what, code)
		}
	}
	if err := harness.Ping(dir + "/sock"); err != nil || inode() != before {
		t.Errorf("the first daemon's socket: %v", err)
	}
	if _, err := os.Stat(dir + "/sock2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the second one's socket: %v", err)
	}
	log, err := os.ReadFile(d.log)
	if err != nil || !strings.Contains(string(log), "another cgmanager is running") || !strings.Contains(string(log), "another daemon answers there") {
		t.Errorf("what they said: %v\n%s", err, log)
	}
	// A daemon that is stopped is still the daemon.
	d.signal(unix.SIGSTOP)
	if code := startService(t, p, dir, dir+"/sock", dir+"/state").wait(5 * time.Second); code != 1 {
		t.Errorf("beside a stopped one: a second daemon ended with %d", code)
	}
	d.signal(unix.SIGCONT)
	d.serve().terminate()
}

// Started at the same moment, one serves and the others end.
func TestKernelNothingLostSameMoment(t *testing.T) {
	harness.Require(t, "root")
	p := harness.Start(t, harness.Spec{})
	for name, start := range map[string]func(t *testing.T, dir string, i int) *service{
		"the same state and socket": func(t *testing.T, dir string, _ int) *service {
			return holdService(t, p, dir, dir+"/sock", dir+"/state")
		},
		"the same socket": func(t *testing.T, dir string, i int) *service {
			return holdService(t, p, dir, dir+"/sock", dir+"/state"+strconv.Itoa(i))
		},
	} {
		for _, stale := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stale %v", name, stale), func(t *testing.T) {
				for round := range harness.Rounds(20) {
					dir := harness.PublicDir(t)
					if stale {
						fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
						if err != nil {
							t.Fatal(err)
						}
						if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: dir + "/sock"}), unix.Close(fd)); err != nil {
							t.Fatal(err)
						}
					}
					all := make([]*service, 3)
					for i := range all {
						all[i] = start(t, dir, i)
					}
					for _, s := range all {
						s.release()
					}
					// Whoever answers is the one; the others end by themselves.
					all[0].serve()
					fd, err := dialRaw(dir + "/sock")
					if err != nil {
						t.Fatal(err)
					}
					cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
					unix.Close(fd)
					if err != nil {
						t.Fatal(err)
					}
					for _, s := range all {
						if s.pid == int(cred.Pid) {
							continue
						}
						if code := s.wait(5 * time.Second); code != 1 {
							t.Errorf("round %d: another daemon ended with %d", round, code)
						}
					}
					if err := harness.Ping(dir + "/sock"); err != nil {
						t.Errorf("round %d: the one that serves: %v", round, err)
					}
					for _, s := range all {
						if s.pid == int(cred.Pid) {
							s.terminate()
						}
					}
					if _, err := os.Lstat(dir + "/sock"); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("round %d: the socket is left: %v", round, err)
					}
					if t.Failed() {
						return
					}
				}
			})
		}
	}
}
