package watchdog

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The descriptors of the process; it has no others but those it opens.
const (
	ordersFD = iota
	reportsFD
	stderrFD
	lockFD
	canaryFD
)

// priority is SCHED_FIFO's highest: whom the watchdog watches is below.
const priority = 99

// environment is the process's. Every turn of its loop does without allocation, so
// there is no collector; if something grew all the same, the limit would start it.
var environment = []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=16MiB"}

// Main is the process. It returns its exit code.
//
// It comes in two stages. Only a thread can be made realtime, and Go's runtime has
// threads from the beginning, which the loop needs: so the first stage makes one
// realtime and executes the program anew, and all threads of the second come from it.
func Main() int {
	// A service manager's signals are for the daemon, which takes back what it
	// granted; until then it is watched.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	if st, errno := self(); errno != 0 || st.policy != unix.SCHED_FIFO || st.priority != priority {
		return firstStage()
	}
	d := dog{clocks: kernelClocks{}, parent: os.Getppid(), in: ordersFD, out: reportsFD, canary: canaryFD}
	if err := d.prepare(); err != nil {
		if r, ok := errors.AsType[*refusal](err); ok {
			d.report(report{event: Event{Kind: refused}, op: r.op, errno: r.errno})
		}
		return 1
	}
	return d.run()
}

// refusal is why the process is of no use.
type refusal struct {
	op    op
	errno unix.Errno
}

func (r *refusal) Error() string {
	if r.errno == 0 {
		return r.op.String()
	}
	if r.op == opRealtime && r.errno == unix.EPERM {
		return fmt.Sprintf("%v: %v: there is no CAP_SYS_NICE, or no realtime runtime in its cgroup", r.op, r.errno)
	}
	return fmt.Sprintf("%v: %v", r.op, r.errno)
}

func refuse(o op, err error) error {
	var errno unix.Errno
	errors.As(err, &errno)
	return &refusal{o, errno}
}

// self returns the stat of the first thread.
func self() (stat, unix.Errno) {
	dir, errno := openAt(unix.AT_FDCWD, []byte("/proc/self\x00"), unix.O_PATH|unix.O_DIRECTORY)
	if errno != 0 {
		return stat{}, errno
	}
	defer unix.Close(dir)
	return readStat(dir)
}

// firstStage becomes realtime and executes itself. Where the kernel refuses, it says
// so, and tries again when it is told to.
func firstStage() int {
	runtime.LockOSThread()
	d := dog{in: ordersFD, out: reportsFD}
	// What the daemon was left with by whoever started it. Not before exec: there is
	// the runtime's own among it.
	_ = unix.CloseRange(canaryFD+1, ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC)
	// Huge pages would lock 2 MB for a byte.
	_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
	for {
		attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: priority}
		err := unix.SchedSetAttr(0, &attr, 0)
		o := opRealtime
		if err == nil {
			// execve(2) leaves the calling thread alone, and realtime.
			err, o = syscall.Exec("/proc/self/exe", []string{"cgmanager", Arg}, environment), opExec
		}
		var errno unix.Errno
		errors.As(err, &errno)
		d.report(report{event: Event{Kind: refused}, op: o, errno: errno})
		if next, err := d.order(); err != nil || next.kind != retry {
			return 1
		}
	}
}

// dog is the second stage.
type dog struct {
	clocks clocks
	in     int // orders come here
	out    int // reports go there
	canary int // an eventfd of the daemon's
	parent int // the daemon

	judge   judge
	threads []thread // of judge.slots
	acts    []act
	wait    *waiter
	buf     [64 * orderSize]byte

	scan  *scanner
	task  int           // the daemon's /proc/PID/task
	sung  time.Duration // the CPU time that the daemon had taken
	asked time.Duration // when the canary was last given a reason to sing
	flags uint32

	cheep, grace time.Duration
	end          time.Duration // of an orphan; 0: it is none
}

// MaxWatched is how many threads can be watched, descriptors allowing.
const MaxWatched = 4096

// prepare makes everything ready that the loop needs, and locks it in memory.
func (d *dog) prepare() error {
	if fd, err := unix.Open("/proc/self/comm", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		_, _ = unix.Write(fd, []byte("cgm-watchdog"))
		_ = unix.Close(fd)
	}
	var errno unix.Errno
	if d.task, errno = taskDir(d.parent); errno != 0 {
		return &refusal{opRead, errno}
	}
	own, errno := taskDir(os.Getpid())
	if errno != 0 {
		return &refusal{opRead, errno}
	}
	defer unix.Close(own)
	scan, err := newScanner()
	if err != nil {
		return refuse(opRead, err)
	}
	d.scan = scan
	realtime := true
	scan.threads(own, func(_, _ int, st stat) bool {
		realtime = realtime && st.policy == unix.SCHED_FIFO && st.priority == priority
		return true
	})
	if !realtime {
		return &refusal{opRealtime, 0}
	}
	d.report(report{event: Event{Kind: started}})
	config, err := d.order()
	if err != nil || config.kind != configure {
		return refuse(opRead, err)
	}
	if err := unix.SetNonblock(d.in, true); err != nil {
		return refuse(opRead, err)
	}
	if err := unix.SetNonblock(d.out, true); err != nil {
		return refuse(opRead, err)
	}
	if err := d.configure(config); err != nil {
		return refuse(opRead, err)
	}
	if err := d.rehearse(); err != nil {
		return err
	}
	// Only what was touched, and what will be: all that the runtime has reserved
	// would be 40 MB.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return refuse(opLock, err)
	}
	if err := takeOver(); err != nil {
		return refuse(opTakeOver, err)
	}
	now, boot := d.clocks.now()
	d.judge.begin(now, boot)
	d.report(report{event: Event{Kind: ready}})
	return nil
}

func (d *dog) configure(o order) error {
	d.judge = judge{period: o.period, slots: make([]slot, 0, MaxWatched)}
	d.threads = make([]thread, 0, MaxWatched)
	d.acts = make([]act, 0, MaxWatched+2)
	d.flags, d.cheep, d.grace = o.flags, o.cheep, o.grace
	var err error
	d.wait, err = newWaiter(d.in)
	return err
}

// rehearse does what the loop does, with a thread of its own: what is touched now is
// not read from a disk when nothing else runs.
func (d *dog) rehearse() error {
	st, errno := self()
	if errno != 0 {
		return &refusal{opAccount, errno}
	}
	pid := int32(os.Getpid())
	g := Grant{PID: pid, TID: pid, Started: st.started, Policy: unix.SCHED_FIFO, Priority: priority}
	now, boot := d.clocks.now()
	d.judge.begin(now, boot)
	d.watch(order{kind: watch, grant: g})
	if len(d.threads) != 1 {
		return &refusal{opAccount, 0}
	}
	if used, err := d.threads[0].used(); err != nil || used == 0 {
		return &refusal{opAccount, 0}
	}
	d.look()
	d.scan.wantsToRun(d.task)
	attr, err := d.threads[0].attr()
	if err == nil {
		err = d.threads[0].set(&attr) // as it is
	}
	if err != nil {
		return refuse(opRealtime, err)
	}
	d.wait.at(now, 0)
	if _, _, err := d.wait.wait(); err != nil {
		return refuse(opRead, err)
	}
	d.release(0)
	d.judge.slots, d.threads = d.judge.slots[:0], d.threads[:0]
	return nil
}

// takeOver ends the watchdog of a daemon that died, if there is one: whose lock is in
// the way is in the state directory's file, and the kernel knows who that is.
func takeOver() error {
	for range 10 {
		err := unix.FcntlFlock(lockFD, unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return err
		}
		pid := lockedBy()
		if pid <= 0 {
			continue
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		// It is still who has the lock: the pidfd is not another's with its number.
		if lockedBy() == pid {
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 1000)
		}
		_ = unix.Close(pidfd)
	}
	return unix.EBUSY
}

// lockedBy returns the process that has the lock, or 0.
func lockedBy() int {
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(lockFD, unix.F_GETLK, &l); err != nil || l.Type == unix.F_UNLCK {
		return 0
	}
	return int(l.Pid)
}

// run is the loop.
func (d *dog) run() int {
	for {
		d.wait.at(d.judge.due, 0)
		pipe, late, err := d.wait.wait()
		if err != nil {
			return 1 // the daemon starts another
		}
		if pipe {
			d.orders()
		}
		if late {
			d.look()
		}
		if d.end == 0 {
			continue
		}
		if now, _ := d.clocks.now(); now >= d.end {
			d.takeBack()
			return 0
		}
		d.judge.due = min(d.judge.due, d.end)
	}
}

// order reads one, and waits for it.
func (d *dog) order() (order, error) {
	for {
		n, err := unix.Read(d.in, d.buf[:orderSize])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return order{}, err
		case n != orderSize:
			return order{}, unix.EPIPE
		}
		var o order
		o.get(d.buf[:])
		return o, nil
	}
}

// orders reads and follows those that are there.
func (d *dog) orders() {
	n, errno := rawRead(d.in, d.buf[:])
	if errno != 0 {
		return
	}
	if n == 0 {
		// The daemon is dead. Its grants are not, and a new one may come for them.
		now, _ := d.clocks.now()
		d.judge.orphan, d.end = true, now+d.grace
		d.wait.forget(d.in)
		return
	}
	for b := d.buf[:n]; len(b) >= orderSize; b = b[orderSize:] {
		var o order
		o.get(b)
		switch o.kind {
		case watch:
			d.watch(o)
		case unwatch:
			if i := d.find(o.grant.ID); i >= 0 {
				d.release(i)
			}
		case retry, configure:
		}
	}
}

// find returns the slot of a grant, or -1.
func (d *dog) find(id uint64) int {
	for i := range d.threads {
		if d.threads[i].grant.ID == id && d.judge.slots[i].state != free {
			return i
		}
	}
	return -1
}

// before returns what was seen of the thread of g under a grant that it has already,
// nothing if it has none.
func (d *dog) before(g *Grant) slot {
	for i := range d.threads {
		has := &d.threads[i].grant
		if d.judge.slots[i].state == granted && has.TID == g.TID && has.Started == g.Started {
			return d.judge.slots[i]
		}
	}
	return slot{}
}

func (d *dog) watch(o order) {
	before := d.before(&o.grant)
	if i := d.find(o.grant.ID); i >= 0 {
		d.release(i)
	}
	t, err := openThread(o.grant)
	if err != nil {
		d.lost(o.grant.ID, err)
		return
	}
	now, _ := d.clocks.now()
	used, err := t.used()
	if err != nil {
		t.close()
		d.lost(o.grant.ID, err)
		return
	}
	i := 0
	for i < len(d.threads) && d.judge.slots[i].state != free {
		i++
	}
	if i == len(d.threads) {
		if i == MaxWatched { // the Supervisor sees to it that it is not
			t.close()
			d.lost(o.grant.ID, unix.ENFILE)
			return
		}
		d.threads, d.judge.slots = d.threads[:i+1], d.judge.slots[:i+1]
	}
	d.threads[i] = t
	st := granted
	if o.flags&wasSuspended != 0 {
		st = suspended
		d.judge.starved = max(d.judge.starved, now)
	}
	d.judge.add(i, now, used, isRealtime(uint32(o.grant.Policy)), o.grant.Share, st)
	d.judge.goOn(i, &before)
}

func (d *dog) release(i int) {
	d.threads[i].close()
	d.judge.slots[i].state = free
}

// lost tells of a thread that is not watched.
func (d *dog) lost(id uint64, err error) {
	kind := Lost
	if errors.Is(err, errGone) {
		kind = Ended
	}
	d.report(report{event: Event{Kind: kind, ID: id}})
}

// report tells the daemon. If it does not read, there are more reports waiting than
// there can be threads, and it will look for itself.
func (d *dog) report(r report) {
	var b [reportSize]byte
	r.put(&b)
	for {
		if _, err := unix.Write(d.out, b[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// look looks at everybody, and does what is to be done.
func (d *dog) look() {
	v := seen{}
	v.now, v.boot = d.clocks.now()
	for i := range d.threads {
		if d.judge.slots[i].state == free {
			continue
		}
		used, err := d.threads[i].used()
		if err != nil {
			d.lost(d.threads[i].grant.ID, err)
			d.release(i)
			continue
		}
		d.judge.slots[i].sampled(v.now, used)
	}
	// The canary is the daemon itself. That it ran is the kernel's word, not its own.
	sung := clock(cpuClock(d.parent))
	v.sang, d.sung = sung != d.sung, sung
	v.done, _ = d.clocks.now()
	v.starving = !v.sang && v.now-d.judge.sang >= d.judge.period && d.scan.wantsToRun(d.task)
	if !d.judge.orphan && v.now-d.asked >= d.cheep {
		d.asked = v.now
		d.ask()
	}
	d.acts = d.judge.look(v, d.acts[:0])
	for _, a := range d.acts {
		d.do(a)
	}
}

// ask gives the daemon a reason to run. Go's poller has the other end of the eventfd,
// and nobody reads it: each time one thread wakes for it, and no goroutine.
func (d *dog) ask() {
	one := [8]byte{0: 1}
	_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(d.canary), uintptr(unsafe.Pointer(&one)), 8)
}

func (d *dog) do(a act) {
	e := Event{Kind: a.kind, Used: a.used, Window: a.window}
	if a.kind == Starving {
		d.report(report{event: e})
		return
	}
	if a.kind == unknown {
		if d.flags&demoteUnknown != 0 {
			d.scan.demoteAll(d.flags&demoteRoot != 0, d.parent, os.Getpid())
		}
		return
	}
	t := &d.threads[a.slot]
	e.ID = t.grant.ID
	var err error
	if a.kind == Restored {
		err = t.restore()
	} else {
		err = t.demote()
	}
	if err != nil {
		d.lost(e.ID, err)
		d.release(a.slot)
		return
	}
	d.report(report{event: e})
}

// takeBack takes from all threads what they were granted, because there is nobody
// any more who could.
func (d *dog) takeBack() {
	n := 0
	for i := range d.threads {
		if d.judge.slots[i].state == granted && d.threads[i].demote() == nil {
			n++
		}
	}
	// Whoever reads this may not read: it is the last thing done, and does not block.
	line := fmt.Appendf(nil, "cgmanager: watchdog: no daemon for %v: %d grants taken back\n", d.grace, n)
	if ready, err := unix.Poll([]unix.PollFd{{Fd: stderrFD, Events: unix.POLLOUT}}, 0); err == nil && ready == 1 {
		_, _ = unix.Write(stderrFD, line)
	}
}
