package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// Config is what a Server needs.
type Config struct {
	// Backend answers the requests. The methods of its Peers are called with
	// the server's mutex held and must return at once.
	Backend api.Backend
	// Listeners are the sockets to accept from. Serve closes them.
	Listeners []*Listener
	// Log gets what no Backend can know of: failures of the sockets
	// themselves. Nil discards it.
	Log logrus.FieldLogger
	// Version is the property Version of CGManager1.
	Version string
	Limits  Limits
}

// Server serves an api.Backend on Unix sockets. Make one with New.
type Server struct {
	backend   api.Backend
	listeners []*listener
	log       logrus.FieldLogger
	version   string
	limits    Limits
	guid      string // of this server, for OK lines and Peer.GetMachineId
	methods   methodTable
	epoll     *os.File
	epfd      int
	// peerPIDFD asks for SO_PEERPIDFD; tests play a kernel without.
	peerPIDFD func(fd int) (int, error)

	mu sync.Mutex
	// The rest is guarded by mu.

	sources    []slot // by file descriptor
	generation uint32
	conns      map[*conn]struct{}
	held       int // by the Backend for connections, beside their openers
	exchanges  int
	foreign    int // descriptors of strangers that are open here
	maxForeign int
	opening    int // connections whose opener is being established
	accounts   map[string]*account
	sweepAt    int // size of accounts that makes a sweep worth it
	lastID     uint64
	workers    *pool
	askers     *pool // of calls that may wait for another daemon
	closers    *pool
	handshakes deadlines
	stalls     deadlines
	patience   deadlines // of exchanges
	retries    deadlines // of accepting
	retry      deadline
	timer      *time.Timer
	ticking    bool // timer is set, for tickTime
	tickTime   time.Time
	again      bool // the last tick came too late to end anything
	paused     bool // not accepting
	draining   bool
	ending     bool // drain has begun
	handover   bool
	stopped    bool
	empty      chan struct{} // closed when draining and nothing is left

	// Buffers of whoever holds mu.
	receiver wire.Receiver
	scratch  [wire.MaxMessage]byte
	args     args
	out      []byte // the event loop's own
}

// source is something that epoll watches.
type source interface {
	// ready is called with mu held when a watched event has come.
	ready(events uint32)
}

// slot is what watches a file descriptor. The generation tells its events
// from those that were still on their way for the number's last owner.
type slot struct {
	source     source
	generation uint32
}

// New makes a Server. Its sockets are not read before Serve. It raises the
// process's RLIMIT_NOFILE, on which the bound of all connections depends.
func New(c Config) (*Server, error) {
	files := raiseFiles()
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// Nonblocking, so that the runtime's own poller watches it: a goroutine
	// waits for it without a thread, and nothing polls.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(fd))
	}
	s := &Server{
		backend: c.Backend,
		log:     c.Log,
		version: c.Version,
		limits:  c.Limits.withDefaults(files),
		guid:    bootID(),
		methods: newMethodTable(),
		epoll:   os.NewFile(uintptr(fd), "epoll"),
		epfd:    fd,
		peerPIDFD: func(fd int) (int, error) {
			return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		},
		conns:    map[*conn]struct{}{},
		accounts: map[string]*account{},
		empty:    make(chan struct{}),
	}
	if s.log == nil {
		l := logrus.New()
		l.SetLevel(logrus.PanicLevel)
		s.log = l
	}
	s.maxForeign = max(min(4096, files/8), wire.MaxFDs)
	s.workers = newPool(&s.mu, workers, s.limits.Workers, s.limits.AccountWorkers)
	s.askers = newPool(&s.mu, askers, s.limits.Workers, s.limits.AccountWorkers)
	s.closers = newPool(&s.mu, closers, s.limits.Closers, s.limits.AccountClosers)
	s.handshakes.after = s.limits.Handshake
	s.stalls.after = s.limits.Stall
	s.patience.after = s.limits.Exchange
	s.retries.after = time.Second
	s.retry.expire = s.resume
	for _, l := range c.Listeners {
		fd, err := l.prepare()
		if err != nil {
			return nil, errors.Join(err, s.epoll.Close())
		}
		s.listeners = append(s.listeners, &listener{s: s, fd: fd, Listener: l})
	}
	return s, nil
}

// bootID returns an identity that clients of this boot see alike, and that
// tells them nothing new: everybody may read it.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	id := strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")
	if err != nil || len(id) != 32 {
		return fmt.Sprintf("%032x", time.Now().UnixNano())
	}
	return id
}

// Serve accepts and answers until ctx ends. Then it removes the sockets that are
// its own, lets no peer send any more (EPIPE), answers all that was sent, and
// returns: at the latest after Limits.Drain, with requests that a Backend has
// not finished cut off. Who waits to be accepted on a socket that is not its own
// is left to whoever serves that next. A Server serves once.
func (s *Server) Serve(ctx context.Context) error {
	s.mu.Lock()
	var err error
	for _, l := range s.listeners {
		if err = s.watch(l.fd, l, unix.EPOLLIN, &l.events); err != nil {
			err = fmt.Errorf("watch %s: %w", l.Name(), err)
			break
		}
	}
	s.mu.Unlock()
	if err == nil {
		var loopErr error
		loop := make(chan struct{})
		go func() {
			defer close(loop)
			loopErr = s.loop()
		}()
		select {
		case <-ctx.Done():
			select {
			case <-s.empty:
			case <-time.After(s.drain()):
			}
			s.stop()
			<-loop // ends because its poller is closed: that is no failure
		case <-loop:
			err = loopErr
			s.stop()
		}
	} else {
		s.stop()
	}
	return err
}

// Handover has Serve leave its listening sockets open and in place when its
// context ends, for another server, and take as long as Limits.Handover for what
// was sent before: whoever connects waits meanwhile. It reports false where it is
// too late: the server ends already.
func (s *Server) Handover() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handover = !s.ending && !s.stopped
	return s.handover
}

// loop handles events until stop.
func (s *Server) loop() error {
	rc, err := s.epoll.SyscallConn()
	if err != nil {
		return err
	}
	var events [128]unix.EpollEvent
	return rc.Read(func(uintptr) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for !s.stopped {
			n := epollWait(s.epfd, events[:])
			if n == 0 {
				return false // wait; the runtime calls again
			}
			for i := range events[:n] {
				e := &events[i]
				if sl := &s.sources[e.Fd]; sl.source != nil && sl.generation == uint32(e.Pad) {
					sl.source.ready(e.Events)
				}
			}
			if s.workers.ready.head != nil || s.askers.ready.head != nil || s.closers.ready.head != nil {
				// Under load there are always events; the pools need their turn.
				s.mu.Unlock()
				runtime.Gosched()
				s.mu.Lock()
			}
		}
		return true
	})
}

// epollWait returns the number of events that are there now.
func epollWait(fd int, events []unix.EpollEvent) int {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(fd), uintptr(ptr(events)), uintptr(len(events)), 0, 0, 0)
	if e != 0 {
		return 0 // EINTR: the poller calls again
	}
	return int(n)
}

// watch changes what epoll watches fd for: events, of which now holds the
// present ones. The first call for a descriptor names its source. Called with
// mu held.
func (s *Server) watch(fd int, src source, events uint32, now *uint32) error {
	if *now == events {
		return nil
	}
	op := unix.EPOLL_CTL_MOD
	switch {
	case *now == 0:
		op = unix.EPOLL_CTL_ADD
		s.generation++
		for fd >= len(s.sources) {
			s.sources = append(s.sources, make([]slot, max(64, len(s.sources)))...)
		}
		s.sources[fd] = slot{src, s.generation}
	case events == 0:
		op = unix.EPOLL_CTL_DEL
		s.sources[fd].source = nil
	}
	*now = events
	e := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: int32(s.sources[fd].generation)}
	if err := unix.EpollCtl(s.epfd, op, fd, &e); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// forget is watch for no events, for a descriptor that is about to be closed
// and that nobody else has a copy of: epoll forgets it by itself.
func (s *Server) forget(fd int, now *uint32) {
	if *now != 0 {
		*now, s.sources[fd].source = 0, nil
	}
}

// drain lets nobody connect and no peer send any more. What was sent before
// stays in the kernel's queues and is answered. It returns how long that may take.
func (s *Server) drain() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining, s.ending = true, true
	for _, l := range s.listeners {
		l.seal()
	}
	for c := range s.conns {
		if !c.closed {
			c.sealed()
		}
	}
	s.checkEmpty()
	if s.handover {
		return s.limits.Handover
	}
	return s.limits.Drain
}

// checkEmpty tells Serve when nothing is left to drain. Called with mu held.
func (s *Server) checkEmpty() {
	if !s.draining || len(s.conns) > 0 {
		return
	}
	for _, l := range s.listeners {
		if !l.closed {
			return
		}
	}
	s.draining = false
	close(s.empty)
}

// stop ends every connection and the event loop.
func (s *Server) stop() {
	s.mu.Lock()
	s.draining = false
	s.stopped = true
	for _, l := range s.listeners {
		if err := l.close(); err != nil {
			s.log.WithError(err).Warn("close a listening socket")
		}
	}
	for c := range s.conns {
		c.close()
	}
	if s.timer != nil {
		s.timer.Stop()
	}
	s.workers.stop()
	s.askers.stop()
	s.closers.stop()
	s.mu.Unlock()
	// Close waits for the loop, which may be waiting for mu.
	if err := s.epoll.Close(); err != nil {
		s.log.WithError(err).Warn("close epoll")
	}
}

// Stats is what a Server holds, for tests and status.
type Stats struct {
	// Connections includes those that are being closed.
	Connections int
	// Exchanges is the number of pending side channel exchanges.
	Exchanges int
	// ForeignFDs is the number of passed descriptors that are open.
	ForeignFDs int
	// Accounts is the number of accounts that are remembered.
	Accounts int
}

// Stats returns what the server holds now.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{len(s.conns), s.exchanges, s.foreign, len(s.accounts)}
}
