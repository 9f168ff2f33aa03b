package identity_test

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
)

// A handle is on one thread, and says nothing once that has ended, while others of
// its process go on.
func TestKernelThread(t *testing.T) {
	p := open(t, os.Getpid())
	tids, end := make(chan int32), make(chan struct{})
	var begin func()
	begin = func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if unix.Gettid() == os.Getpid() {
			go begin() // but for the first one, which Go keeps
			<-end
			return
		}
		if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData("a) R 1 2 (b\x00"))), 0, 0, 0); err != nil {
			t.Error(err)
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 7); err != nil {
			t.Error(err)
		}
		tids <- int32(unix.Gettid())
		<-end
	}
	go begin()
	tid := <-tids
	th, err := p.Thread(tid)
	if err != nil {
		t.Fatal(err)
	}
	defer th.Close()
	if s, err := th.Scheduling(); err != nil || s != (identity.Scheduling{Nice: 7}) {
		t.Errorf("scheduled %+v, %v, want nice 7", s, err)
	}
	if th.TID() != tid || th.Started() == 0 || !th.Alive() {
		t.Errorf("thread %d, started %d, alive %v", th.TID(), th.Started(), th.Alive())
	}
	// The kernel counts at the latest when the thread waits.
	cgtest.Eventually(t, 5*time.Second, "it has used the processor", func() bool {
		used, err := th.CPU()
		if err != nil {
			t.Fatal(err)
		}
		return used > 0
	})
	if cg, err := th.Cgroups(); err != nil || len(cg) == 0 {
		t.Errorf("its cgroups: %q, %v", cg, err)
	}
	close(end)
	cgtest.Eventually(t, 5*time.Second, "the thread ends", func() bool { return !th.Alive() })
	if _, err := th.Scheduling(); !errors.Is(err, identity.ErrGone) {
		t.Errorf("of a thread that ended: %v", err)
	}
	if _, err := th.CPU(); !errors.Is(err, identity.ErrGone) {
		t.Errorf("of a thread that ended: %v", err)
	}
	if _, err := p.Thread(tid); !errors.Is(err, identity.ErrGone) {
		t.Errorf("a handle on a thread that ended: %v", err)
	}
	if _, err := p.Thread(1); !errors.Is(err, identity.ErrGone) {
		t.Errorf("another process's thread: %v", err)
	}
}

// What a policy asks about, and the limit that rtkit asks for.
func TestKernelBackground(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	pid := cgtest.Child(t, "prlimit", "--rttime=100:200", "setpriv", "--reuid", "61000", "--regid", "61001", "--groups", "7,61002", "sleep", "300")
	cgtest.Eventually(t, 5*time.Second, "it runs sleep", func() bool { return comm(pid) == "sleep" })
	p := open(t, pid)
	bg, err := host.Background(p)
	if err != nil {
		t.Fatal(err)
	}
	if bg.UID != 61000 || bg.EGID != 61001 || !slices.Equal(bg.Groups, []uint32{7, 61002}) || bg.Container || bg.Root != 0 {
		t.Errorf("%+v", bg)
	}
	if us, limited, err := p.RTTimeMax(); err != nil || !limited || us != 200 {
		t.Errorf("RLIMIT_RTTIME %d, %v, %v; want 200", us, limited, err)
	}
	in := open(t, namespaced(t))
	if bg, err = host.Background(in); err != nil || !bg.Container || bg.Root != 100000 {
		t.Errorf("in a container: %+v, %v", bg, err)
	}
	if _, limited, err := in.RTTimeMax(); err != nil || limited {
		t.Errorf("without the limit: %v, %v", limited, err)
	}
}
