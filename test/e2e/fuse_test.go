package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// fuseServer is a puppet's harness.ServeStuckFUSE.
var fuseServer struct {
	gone atomic.Bool
	done chan struct{}
}

// startFUSE mounts it at a directory, for everybody.
var startFUSE = harness.Inside("start FUSE", func(dir string) (int, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", dev)
	if err := unix.Mount("cgmtest", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(dev)
		return 0, err
	}
	fuseServer.done = make(chan struct{})
	go func() {
		defer close(fuseServer.done)
		harness.ServeStuckFUSE(dev, &fuseServer.gone)
	}()
	return 0, nil
})

// endFUSE ends the server and with it all that waits for it.
var endFUSE = harness.Inside("end FUSE", func(int) (int, error) {
	fuseServer.gone.Store(true)
	if fuseServer.done == nil {
		return 0, nil
	}
	select {
	case <-fuseServer.done:
		return 0, nil
	case <-time.After(5 * patience()):
		return 0, errors.New("the server does not end")
	}
})

// stuckArgs are for passStuck: Copies of the file with each message.
type stuckArgs struct {
	Sock, File    string
	Data          []byte
	Copies, Times int
	Read          bool
}

// stuckFile is open until the puppet ends: closing it is what takes for ever.
var stuckFile = -1

// passStuck passes the file and returns how many messages were taken.
var passStuck = harness.Inside("pass a stuck file", func(a stuckArgs) (int, error) {
	if stuckFile < 0 {
		fd, err := unix.Open(a.File, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		stuckFile = fd
	}
	fds := make([]int, a.Copies)
	for i := range fds {
		fds[i] = stuckFile
	}
	buf := make([]byte, 4096)
	taken := 0
	for range a.Times {
		c, err := dialRaw(a.Sock)
		if err != nil {
			return taken, err
		}
		got, err := harness.Login(c, []byte("\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"))
		if err != nil {
			return taken, err
		}
		if err := sendFiles(c, a.Data, fds...); err != nil {
			return taken, err
		}
		for a.Read {
			n, err := harness.Read(c, buf)
			if errors.Is(err, unix.EAGAIN) {
				return taken, fmt.Errorf("no answer after %q", got)
			}
			if n <= 0 {
				break
			}
			got = append(got, buf[:n]...)
			if bytes.Contains(got, []byte("AGREE_UNIX_FD\r\nl")) {
				taken++
				break
			}
		}
		unix.Close(c)
	}
	return taken, nil
})

// stuck is somebody with such a file: uid 1000 in a container whose root
// mounted it.
type stuck struct {
	*harness.Proc
	server *harness.Proc
	file   string
}

func newStuck(t *testing.T, tree *harness.Tree) *stuck {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		harness.Require(t, "fuse")
	}
	dir := harness.PublicDir(t)
	s := &stuck{server: harness.Start(t, harness.Spec{PIDNS: true, KeepIDs: true}), file: dir + "/file"}
	tree.Make("stuck", 1000, 1000)
	if err := s.server.Run(startFUSE, dir, nil); err != nil {
		t.Fatalf("mount FUSE: %v", err)
	}
	t.Cleanup(func() { s.end(t) })
	s.Proc = s.server.Spawn(harness.Spec{UID: 1000, GID: 1000})
	tree.Place(s.Proc, "stuck")
	return s
}

func (s *stuck) end(t *testing.T) {
	if err := s.server.Run(endFUSE, 0, nil); err != nil {
		t.Error(err)
	}
}

// Files whose close never returns hold up nobody but who passed them.
func TestKernelBadInputFUSE(t *testing.T) {
	s := newSiege(t)
	p := newStuck(t, s.Tree)
	pass := func(copies uint32, times int, data []byte, read bool) int {
		t.Helper()
		var taken int
		if err := p.Run(passStuck, stuckArgs{s.d.Sock, p.file, data, int(copies), times, read}, &taken); err != nil {
			t.Fatal(err)
		}
		return taken
	}
	ping := call(t, 1, harness.V0, "Ping", int32(0))
	h := dbus.UnixFDIndex(0)
	for what, data := range map[string][]byte{
		"not expected":  announcing(t, 1, harness.V0, "Ping", int32(0)),
		"not announced": ping,
		"CreateScm":     announcing(t, 1, harness.V0, "CreateScm", "memory", "x", h),
		"MoveFd":        announcing(t, 1, harness.V1, "MoveFd", "", h),
	} {
		if taken := pass(1, 4, data, true); taken < 4 && what != "not announced" {
			t.Errorf("%s: %d of 4 are answered", what, taken)
		}
	}
	pass(1, 4, announcing(t, 1, harness.V1, "MoveFd", "", h)[:40], false)
	// What there was before is counted with the witnesses' connections at their most.
	eventually(t, "files are stuck", func() bool { return s.d.FDs() >= s.fds+8 })
	// As many as go.
	full := announcing(t, 253, harness.V0, "Ping", int32(0))
	taken := pass(253, 12, full, true)
	t.Logf("%d of 12 messages with 253 files were taken; %d files are open, %d threads", taken, s.d.FDs(), s.threadCount())
	if taken == 12 {
		t.Error("there is no end to what may be passed")
	}
	if n := s.d.FDs(); n > s.fds+2048 {
		t.Errorf("%d files are open", n)
	}
	if n := s.threadCount(); n > s.threads+16 {
		t.Errorf("%d threads, %d before", n, s.threads)
	}
	// Its own calls are answered as before.
	start := time.Now()
	c := p.MustDial(s.d.Sock)
	asker{t, c}.v0("Create", "memory", "mine")
	c.Close()
	if took := time.Since(start); took > patience() {
		t.Errorf("its own call took %v", took)
	}
	s.witnessed(12)
	p.end(t)
	s.over(t, 5*time.Second)
}

// Such a file does not keep the daemon from ending, nor the next from starting.
func TestKernelNothingLostFUSE(t *testing.T) {
	harness.Require(t, "root")
	term := func(d *service) {
		if err := unix.Kill(d.pid, unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	kill := func(d *service) {
		if err := d.child.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		end  func(d *service)
		args []string
	}{
		"SIGTERM":                 {term, nil},
		"SIGKILL":                 {kill, nil},
		"SIGKILL and --replace":   {kill, []string{"--replace"}},
		"--replace while it runs": {func(*service) {}, []string{"--replace"}},
	} {
		t.Run(name, func(t *testing.T) {
			tree := harness.NewTree(t)
			dir := harness.PublicDir(t)
			p := harness.Start(t, harness.Spec{})
			d := startService(t, p, dir, dir+"/sock", dir+"/state").serve()
			s := newStuck(t, tree)
			var taken int
			args := stuckArgs{d.sock, s.file, announcing(t, 1, harness.V0, "Ping", int32(0)), 1, 8, true}
			if err := s.Run(passStuck, args, &taken); err != nil || taken != 8 {
				t.Fatalf("%d messages were taken: %v", taken, err)
			}
			c.end(d)
			start := time.Now()
			next := startService(t, p, dir, dir+"/sock", dir+"/state", c.args...)
			for end := start.Add(cgtest.Patience(5 * time.Second)); !next.answers() && time.Now().Before(end); {
				time.Sleep(10 * time.Millisecond)
				if ended, _ := next.ended(); ended {
					// A service manager tries again.
					next.wait(time.Second)
					next = startService(t, p, dir, dir+"/sock", dir+"/state", c.args...)
				}
			}
			took := time.Since(start)
			if !next.answers() {
				t.Fatalf("no new daemon after %v", took)
			}
			t.Logf("the next daemon serves after %v", took)
			if took > 2*patience() {
				t.Errorf("the next daemon serves after %v", took)
			}
			// The old one is waited for in the kernel, and in nobody's way.
			s.end(t)
			d.wait(5 * time.Second)
			if !next.answers() {
				t.Error("the new daemon's socket went with the old one")
			}
			next.terminate()
		})
	}
}
