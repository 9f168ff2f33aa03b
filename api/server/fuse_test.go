package server

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// stuckFile returns a file whose close waits for ever. giveUp ends the waiting.
func stuckFile(t *testing.T) (file int, giveUp func()) {
	t.Helper()
	cgtest.Require(t, cgtest.Root)
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	must(t, err)
	var gone atomic.Bool
	served := make(chan struct{})
	dir := t.TempDir()
	type opened struct {
		fd  int
		err error
	}
	done := make(chan opened)
	go func() {
		runtime.LockOSThread() // a mount namespace of its own; the thread ends with it
		open := func() (int, error) {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return 0, err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return 0, err
			}
			options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", dev)
			if err := unix.Mount("cgmtest", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
				return 0, err
			}
			go func() { // not before: there is nothing to read
				defer close(served)
				harness.ServeStuckFUSE(dev, &gone)
			}()
			return unix.Open(dir+"/file", unix.O_RDWR|unix.O_CLOEXEC, 0)
		}
		fd, err := open()
		done <- opened{fd, err}
	}()
	o := <-done
	must(t, o.err)
	return o.fd, func() {
		gone.Store(true)
		<-served
		_ = unix.Close(o.fd) // ENOTCONN
	}
}

// Files whose close never returns hold up their own account's closers alone.
func TestStuckFiles(t *testing.T) {
	ts := serve(t, &fakeBackend{accounts: byUID}, Limits{AccountClosers: 2, ForeignFDs: 300})
	file, giveUp := stuckFile(t)
	defer giveUp()
	c := ts.loginAs(1000)
	c.expect(fmt.Sprintf(loggedIn, ts.guid))
	for range 48 { // 300-253, and one
		c.fails(scm("Create", "m", "x"), "InvalidArgs", "not an end of an unnamed socket pair", file)
	}
	if n := ts.Stats().ForeignFDs; n != 48 {
		t.Errorf("%d descriptors are open: is the file stuck at all?", n)
	}
	c.ok(ping(), "")
	ts.serves()
	// Nobody else's descriptors are behind them in the queue.
	other := ts.login()
	s := newSide(t, unix.SOCK_DGRAM)
	s.begin(other, scm("Create", "m", "x"))
	s.expect("1")
	s.cred(os.Getpid(), 0, 0)
	s.expect("1")
	eventually(t, "the other's is closed", func() bool { return ts.Stats().ForeignFDs == 48 })
	// The account may pass no more, but can still call.
	refused := ts.loginAs(1000)
	refused.expect(fmt.Sprintf(loggedIn, ts.guid))
	refused.write(refused.encode(scm("Create", "m", "x")), file)
	refused.expectClosed()
	c.ok(to(api.Interface1, "ListTasks", "x"), "auu")
	// Not even these hold up the end.
	start := time.Now()
	ts.stop()
	if d := time.Since(start); d > cgtest.Patience(5*time.Second) {
		t.Errorf("the end took %v", d)
	}
}
