package harness

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// spawner is the one thread that starts processes: a parent-death signal goes
// off when the thread that cloned ends, and a change of the pid namespace for
// children is a thread's.
var spawner = sync.OnceValue(func() chan func() {
	ch := make(chan func())
	go spawnerLoop(ch)
	return ch
})

func spawnerLoop(ch chan func()) {
	runtime.LockOSThread() // never unlocked: the thread lives as long as the process
	for f := range ch {
		f()
	}
}

// onSpawner runs f on the spawner's thread.
func onSpawner(f func() error) error {
	res := make(chan error)
	spawner() <- func() { res <- f() }
	return <-res
}

// inPidNS runs f on the spawner's thread with the pid namespace for children
// set to that of the process pid, as setns(2) does for nsenter and lxc-attach.
func inPidNS(pid int, f func() error) error {
	return onSpawner(func() error {
		theirs, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
		if err != nil {
			return err
		}
		defer theirs.Close()
		ours, err := os.Open("/proc/self/ns/pid")
		if err != nil {
			return err
		}
		defer ours.Close()
		if err := unix.Setns(int(theirs.Fd()), unix.CLONE_NEWPID); err != nil {
			return os.NewSyscallError("setns", err)
		}
		ferr := f()
		if err := unix.Setns(int(ours.Fd()), unix.CLONE_NEWPID); err != nil {
			panic(err) // every later child would be in the wrong namespace
		}
		return ferr
	})
}

func deathsig() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
