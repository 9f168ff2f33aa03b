package watchdog

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// patience is how long a new process may take to become realtime.
	patience = 10 * time.Second
	// pause is how long a process that could not be is not tried again.
	pause = 5 * time.Second
	// restarts is how often in a row the process may end within a minute.
	restarts = 5
	// pipeSize is asked for, for the pipes: room for an order and a report about
	// everybody who can be watched.
	pipeSize = 1 << 20
)

// Supervisor is the daemon's side: it starts the process with the first grant,
// again if it ends, and ends it after the last.
type Supervisor struct {
	config Config
	limit  int

	events sync.Mutex // held while Config.Events runs: one at a time

	mu      sync.Mutex
	grants  map[uint64]*watched // guarded by mu
	proc    *process            // guarded by mu; nil: there is none
	idle    *time.Timer         // guarded by mu; ends a process that has nobody to watch
	failed  error               // guarded by mu; why there is none, which is not tried again ...
	before  time.Time           // ... before this; guarded by mu
	deaths  int                 // guarded by mu; in a row
	closing bool                // guarded by mu
}

// watched is a grant, and what became of it.
type watched struct {
	grant     Grant
	suspended bool
}

// New makes a Supervisor; nothing is started yet.
func New(c Config) *Supervisor {
	c.Cheep, c.Period = cmp.Or(c.Cheep, 5*time.Second), cmp.Or(c.Period, 10*time.Second)
	c.Grace, c.Linger = cmp.Or(c.Grace, 30*time.Second), cmp.Or(c.Linger, 10*time.Second)
	s := &Supervisor{config: c, grants: make(map[uint64]*watched), limit: MaxWatched}
	var rl unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &rl) == nil && rl.Max < MaxWatched+64 {
		s.limit = max(int(rl.Max)-64, 1)
	}
	s.idle = time.AfterFunc(time.Hour, s.rest)
	s.idle.Stop()
	return s
}

// Ready starts the process if there is none, and returns an error where it is not
// realtime: then nothing may be granted.
func (s *Supervisor) Ready() error {
	if s.config.NoCanary {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.readyLocked()
}

func (s *Supervisor) readyLocked() error {
	if s.closing {
		return errors.New("the watchdog is being ended")
	}
	if s.proc != nil {
		if s.proc.beats(s.config.Period) {
			return nil
		}
		s.proc.kill()
		return errors.New("the watchdog does not move; another is started")
	}
	if time.Now().Before(s.before) {
		return s.failed
	}
	p, err := s.start()
	if err == nil {
		if err = s.introduce(p); err != nil {
			p.end()
			p.reap()
		}
	}
	if err != nil {
		s.failed, s.before = fmt.Errorf("no watchdog: %w", err), time.Now().Add(pause)
		s.config.Log.Errorf("realtime: %v; nothing is granted", s.failed)
		return s.failed
	}
	s.proc = p
	for _, w := range s.grants {
		if err := p.watch(w); err != nil {
			p.kill() // its end is noticed, and another started
			return err
		}
	}
	if len(s.grants) == 0 {
		s.idle.Reset(s.config.Linger)
	}
	go s.attend(p)
	return nil
}

// Watch begins to watch a thread, before it is given what it is granted. The
// error is that of Ready, or says that too many are watched.
func (s *Supervisor) Watch(g Grant) error {
	if s.config.NoCanary {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, again := s.grants[g.ID]; !again && len(s.grants) >= s.limit {
		return fmt.Errorf("%d threads are watched already, no more can be", len(s.grants))
	}
	if err := s.readyLocked(); err != nil {
		return err
	}
	w := &watched{grant: g}
	if err := s.proc.watch(w); err != nil {
		s.proc.kill()
		return err
	}
	s.grants[g.ID] = w
	s.idle.Stop()
	return nil
}

// Unwatch lets a thread go. The process undoes nothing more of it.
func (s *Supervisor) Unwatch(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.grants[id]; ok {
		s.forgetLocked(id)
	}
}

// Replaced is Unwatch for a grant in whose place the same thread is watched under
// another by now. The process hears of it with its next order, or a moment later:
// each order takes the processor from whoever runs.
func (s *Supervisor) Replaced(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.grants[id]; !ok {
		return
	}
	if len(s.grants) == 1 || s.proc == nil {
		s.forgetLocked(id)
		return
	}
	delete(s.grants, id)
	s.proc.later(id)
}

func (s *Supervisor) forgetLocked(id uint64) {
	delete(s.grants, id)
	if s.proc == nil {
		return
	}
	if err := s.proc.send(&order{kind: unwatch, grant: Grant{ID: id}}); err != nil {
		s.proc.kill()
	}
	if len(s.grants) == 0 {
		// Whoever asks for realtime again and again shall not cost a process each.
		s.idle.Reset(s.config.Linger)
	}
}

// rest ends a process that has had nobody to watch for a while.
func (s *Supervisor) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.grants) == 0 && s.proc != nil {
		s.proc.end()
		s.proc = nil
	}
}

// Close ends the process, which undoes nothing: who wants grants revoked has done
// so. With leave it goes on without the daemon, until the next one's is started or,
// after a time, nobody has: then it takes all grants back, and ends.
func (s *Supervisor) Close(leave bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	s.idle.Stop()
	if s.proc == nil {
		return
	}
	if leave {
		s.proc.leave()
	} else {
		s.proc.end()
	}
	s.proc = nil
}

// DemoteUnknown takes realtime from every thread of the host, as the process does
// where the canary starves and Config says so: but from the kernel's own threads,
// those of the first process, ours and, without Config.DemoteRoot, root's. It returns
// how many had it.
func (s *Supervisor) DemoteUnknown() (int, error) {
	scan, err := newScanner()
	if err != nil {
		return 0, err
	}
	defer scan.close()
	s.mu.Lock()
	dog := 0
	if s.proc != nil {
		dog = s.proc.pid
	}
	s.mu.Unlock()
	return scan.demoteAll(s.config.DemoteRoot, os.Getpid(), dog), nil
}

// attend hears what the process has to say, until it ends, and then starts another
// if it was needed.
func (s *Supervisor) attend(p *process) {
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	ended := make(chan struct{})
	go func() {
		for {
			// Once without a signal: it may have come before anybody heard it.
			if p.stopped() {
				s.config.Log.Warn("realtime: the watchdog was stopped; another is started")
				p.kill()
			}
			select {
			case <-child:
			case <-ended:
				return
			}
		}
	}()
	p.hear(s.config.Period, func(e Event) { s.handle(p, e) }, func() {
		s.config.Log.Warn("realtime: the watchdog does not move; another is started")
	})
	signal.Stop(child)
	close(ended)
	p.reap()
	s.mu.Lock()
	if s.proc != p {
		s.mu.Unlock() // it was to end
		return
	}
	s.proc = nil
	if time.Since(p.began) > time.Minute {
		s.deaths = 0
	}
	s.deaths++
	n := s.deaths
	s.config.Log.Warnf("realtime: the watchdog ended (%s)", how(p.status))
	s.mu.Unlock()
	s.again(n)
}

// how says how a process ended.
func how(status syscall.WaitStatus) string {
	if status.Signaled() {
		return unix.SignalName(status.Signal())
	}
	return fmt.Sprintf("status %d", status.ExitStatus())
}

// again starts the process once more for the threads that are granted something. If
// that does not succeed they lose it: nobody watches them.
func (s *Supervisor) again(deaths int) {
	for n := deaths; ; n++ {
		if n > 1 {
			time.Sleep(50 * time.Millisecond << n)
		}
		s.mu.Lock()
		if s.closing || s.proc != nil || len(s.grants) == 0 {
			s.mu.Unlock()
			return
		}
		var err error
		if n <= restarts {
			s.before = time.Time{}
			err = s.readyLocked()
		} else {
			err = errors.New("no watchdog: it ended again and again")
			s.failed, s.before, s.deaths = err, time.Now().Add(pause), 0
		}
		if err == nil {
			s.config.Log.Warnf("realtime: another watchdog watches %d threads", len(s.grants))
			s.mu.Unlock()
			return
		}
		if n < restarts {
			s.mu.Unlock()
			continue
		}
		lost := make([]uint64, 0, len(s.grants))
		for id := range s.grants {
			lost = append(lost, id)
		}
		clear(s.grants)
		s.mu.Unlock()
		s.config.Log.Errorf("realtime: %v: %d grants are revoked", err, len(lost))
		for _, id := range lost {
			s.tell(Event{Kind: Lost, ID: id})
		}
		return
	}
}

// handle takes note of what the process p has done.
func (s *Supervisor) handle(p *process, e Event) {
	s.mu.Lock()
	w := s.grants[e.ID]
	known := s.proc == p && (e.Kind == Starving || w != nil)
	if known {
		switch e.Kind {
		case Ended, Lost:
			s.forgetLocked(e.ID)
		case Starved, Restored:
			w.suspended = e.Kind == Starved
		default:
		}
	}
	s.mu.Unlock()
	if known {
		s.tell(e)
	}
}

func (s *Supervisor) tell(e Event) {
	s.events.Lock()
	defer s.events.Unlock()
	s.config.Events(e)
}

// process is the process, as the daemon sees it.
type process struct {
	pid    int
	began  time.Time
	orders int
	wait   *waiter
	in     int      // its reports
	canary *os.File // an eventfd: the process has one of our threads run

	mu     sync.Mutex
	gone   bool               // guarded by mu; it was reaped
	left   bool               // guarded by mu; orders is closed
	status syscall.WaitStatus // guarded by mu until it is gone
	beat   time.Duration      // guarded by mu; the CPU time it had taken
	beatAt time.Duration      // guarded by mu; when it had taken less
	// late are the grants of which it is to be told with its next order, or by tell.
	late []uint64    // guarded by mu
	tell *time.Timer // guarded by mu
}

const (
	// maxLate is how many orders one write takes at most, which a pipe takes whole.
	maxLate = 16
	// lateness is how long they wait.
	lateness = 20 * time.Millisecond
)

// start starts it.
func (s *Supervisor) start() (*process, error) {
	lock, err := unix.Open(filepath.Join(s.config.Dir, "watchdog"), unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the lock in the state directory: %w", err)
	}
	defer unix.Close(lock)
	var orders, reports [2]int
	if err := unix.Pipe2(orders[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(orders[0])
	if err := unix.Pipe2(reports[:], unix.O_CLOEXEC); err != nil {
		_ = unix.Close(orders[1])
		return nil, os.NewSyscallError("pipe2", err)
	}
	defer unix.Close(reports[1]) // then its end is the pipe's
	p := &process{began: time.Now(), orders: orders[1], in: reports[0]}
	for _, fd := range []int{p.orders, p.in} {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, pipeSize)
		err = errors.Join(err, unix.SetNonblock(fd, true))
	}
	if err == nil {
		p.wait, err = newWaiter(p.in)
	}
	var canary int
	if err == nil {
		p.canary, canary, err = newCanary()
	}
	if err == nil {
		// It is no exec.Cmd: nothing runs but ourselves, and no thread waits for it.
		p.pid, err = syscall.ForkExec("/proc/self/exe", []string{"cgmanager", Arg}, &syscall.ProcAttr{
			Dir: "/", Env: environment,
			Files: []uintptr{
				ordersFD: uintptr(orders[0]), reportsFD: uintptr(reports[1]), stderrFD: 2,
				lockFD: uintptr(lock), canaryFD: uintptr(canary),
			},
			Sys: &syscall.SysProcAttr{Setsid: true},
		})
	}
	if err != nil {
		p.gone = true
		p.reap()
		return nil, err
	}
	return p, nil
}

// introduce tells a new process what it needs, and returns when it watches.
func (s *Supervisor) introduce(p *process) error {
	p.wait.at(clock(unix.CLOCK_MONOTONIC)+patience, 0)
	for funded := false; ; {
		r, err := p.next()
		if err != nil {
			return err
		}
		switch r.event.Kind {
		case ready:
			return nil
		case started:
			o := order{kind: configure, cheep: s.config.Cheep, period: s.config.Period, grace: s.config.Grace}
			if s.config.DemoteUnknown {
				o.flags |= demoteUnknown
			}
			if s.config.DemoteRoot {
				o.flags |= demoteRoot
			}
			err = p.send(&o)
		case refused:
			err = &refusal{r.op, r.errno}
			if r.op == opRealtime && !funded && s.config.Fund != nil {
				funded = true
				if ferr := s.config.Fund(p.pid); ferr != nil {
					return fmt.Errorf("%w; bringing it to the root cgroup: %w", err, ferr)
				}
				err = p.send(&order{kind: retry})
			}
		default:
			err = fmt.Errorf("it says %d", r.event.Kind)
		}
		if err != nil {
			return err
		}
	}
}

// next returns its next report, while it is new.
func (p *process) next() (report, error) {
	for {
		var b [reportSize]byte
		n, errno := rawRead(p.in, b[:])
		switch {
		case errno == unix.EAGAIN:
			if _, late, err := p.wait.wait(); err != nil {
				return report{}, err
			} else if late {
				return report{}, fmt.Errorf("it is not realtime after %v", patience)
			}
			continue
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return report{}, errno
		case n != reportSize:
			return report{}, errors.New("it ended")
		}
		var r report
		r.get(b[:])
		return r, nil
	}
}

// hear calls f with its reports until it ends. If it does not move hear calls stuck,
// and kills it.
func (p *process) hear(period time.Duration, f func(Event), stuck func()) {
	var b [64 * reportSize]byte
	// That it moves is seen whenever something is granted, too. Its end, and that it
	// was stopped, the kernel tells.
	rest := 6 * period
	p.wait.at(clock(unix.CLOCK_MONOTONIC)+rest, rest)
	for {
		pipe, late, err := p.wait.wait()
		if err != nil {
			p.kill()
			return
		}
		if late && !p.beats(period) {
			stuck()
			p.kill()
		}
		if !pipe {
			continue
		}
		n, errno := rawRead(p.in, b[:])
		if errno == unix.EAGAIN || errno == unix.EINTR {
			continue
		}
		if errno != 0 || n == 0 {
			return
		}
		for at := 0; at+reportSize <= n; at += reportSize {
			var r report
			r.get(b[at:])
			f(r.event)
		}
	}
}

// newCanary makes the canary, in Go's poller: a thread of ours wakes each time it is
// written to. No goroutine does, which would wake more threads.
func newCanary() (*os.File, int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, -1, os.NewSyscallError("eventfd", err)
	}
	f := os.NewFile(uintptr(fd), "canary")
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		_ = f.Close()
		return nil, -1, err // the poller has not taken it
	}
	return f, fd, nil
}

func (p *process) watch(w *watched) error {
	o := order{kind: watch, grant: w.grant}
	if w.suspended {
		o.flags = wasSuspended
	}
	return p.send(&o)
}

// later has it unwatch a grant before long.
func (p *process) later(id uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.late = append(p.late, id)
	switch {
	case len(p.late) == maxLate:
		p.told(p.sendLocked(nil))
	case p.tell == nil:
		p.tell = time.AfterFunc(lateness, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if len(p.late) > 0 {
				p.told(p.sendLocked(nil))
			}
		})
	case len(p.late) == 1:
		p.tell.Reset(lateness)
	}
}

// told ends a process that could not be told: another is told anew. Called with mu
// held.
func (p *process) told(err error) {
	if err != nil && !p.left && !p.gone {
		_ = unix.Kill(p.pid, unix.SIGKILL)
	}
}

func (p *process) send(o *order) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sendLocked(o)
}

// sendLocked sends what waits, and o, unless it is nil.
func (p *process) sendLocked(o *order) error {
	if p.left {
		return errors.New("the watchdog is left alone")
	}
	var all [maxLate + 1][orderSize]byte
	n := 0
	for _, id := range p.late {
		(&order{kind: unwatch, grant: Grant{ID: id}}).put(&all[n])
		n++
	}
	p.late = p.late[:0]
	if o != nil {
		o.put(&all[n])
		n++
	}
	b := unsafe.Slice(&all[0][0], n*orderSize)
	for {
		_, err := unix.Write(p.orders, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			// It goes before everything: it reads at once, or not at all.
			if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(p.orders), Events: unix.POLLOUT}}, 1000); n == 1 {
				continue
			}
			return errors.New("the watchdog does not read its orders")
		}
		return os.NewSyscallError("write", err)
	}
}

// beats reports whether it ran lately. It looks at least once a period.
func (p *process) beats(period time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	beat, now := clock(cpuClock(p.pid)), clock(unix.CLOCK_MONOTONIC)
	if beat == 0 {
		return false // it is gone
	}
	if beat != p.beat {
		p.beat, p.beatAt = beat, now
		return true
	}
	return now-p.beatAt < 2*period+time.Second
}

// stopped reports whether it was stopped by a signal.
func (p *process) stopped() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return false
	}
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, p.pid, &info, unix.WSTOPPED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err == nil && info.Signo == int32(unix.SIGCHLD)
}

// kill kills it. Its end is noticed.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.gone {
		_ = unix.Kill(p.pid, unix.SIGKILL)
	}
}

// end kills it and waits for its end, which is soon.
func (p *process) end() {
	p.kill()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waitLocked()
}

func (p *process) waitLocked() {
	for !p.gone {
		pid, err := syscall.Wait4(p.pid, &p.status, 0, nil)
		p.gone = pid == p.pid || err != nil && !errors.Is(err, unix.EINTR)
	}
}

// leave lets it go on alone.
func (p *process) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.left {
		p.left = true
		_ = unix.Close(p.orders)
	}
}

// reap is for when it has ended: nothing of it is left.
func (p *process) reap() {
	p.leave()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waitLocked()
	if p.wait != nil {
		p.wait.close()
	}
	if p.canary != nil {
		_ = p.canary.Close()
	}
	_ = unix.Close(p.in)
}
