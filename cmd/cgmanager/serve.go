package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"cgmanager/api/bus"
	"cgmanager/api/server"
	"cgmanager/cgfs"
	"cgmanager/cmd/service"
	"cgmanager/cmd/version"
	"cgmanager/manager"
)

// daemon is what stays as long as the process does.
type daemon struct {
	options
	log     *logrus.Logger
	life    context.Context // ends with a signal
	asks    chan os.Signal  // SIGHUP, SIGUSR1
	set     *cgfs.Set
	sockets *sockets
}

// How long the lock of a daemon that ends is waited for: one that was killed, and
// one that was replaced.
const (
	lockWait     = 500 * time.Millisecond
	handoverWait = 5 * time.Second
)

// serve runs the daemon until a signal ends it, or another takes its place.
func serve(o options, log *logrus.Logger) (err error) {
	service.Prepare()
	d := &daemon{options: o, log: log, life: service.Life(log), asks: make(chan os.Signal, 2)}
	signal.Notify(d.asks, unix.SIGHUP, unix.SIGUSR1)
	var before *server.Predecessor
	if o.replace {
		if before, err = server.Replace(d.control()); err != nil {
			return err
		}
	}
	var unlock func()
	if before == nil {
		if unlock, err = lock(o.stateDir, lockWait); err != nil {
			return err
		}
	}
	if d.set, err = cgfs.Open(cgfs.Options{Skip: o.skip, Mount: o.mount}); err != nil {
		return fmt.Errorf("open the cgroup hierarchies: %w", err)
	}
	defer func() { err = errors.Join(err, d.set.Close()) }()
	if len(d.set.Hierarchies()) == 0 {
		return errors.New("no cgroup hierarchy is mounted (hint: mount cgroup2 at /sys/fs/cgroup, or use --mount)")
	}
	if before == nil {
		d.sockets, err = listen(o.listen, nil, log)
	} else {
		unlock, err = d.replace(before)
	}
	if err != nil {
		return err
	}
	for first := true; ; first = false {
		next, err := d.serve(before, first)
		before = nil
		if next == nil {
			d.sockets.hide()
			unlock()
			return err
		}
		if err != nil {
			log.WithError(err).Warn("not all has ended in order")
		}
		unlock()
		err = next.Done()
		if err = errors.Join(err, next.Close()); err == nil {
			log.WithField("pid", next.PID).Info("replaced")
			return d.sockets.release()
		}
		log.WithField("pid", next.PID).WithError(err).Warn("who was to take this daemon's place does not serve: going on")
		if unlock, err = lock(o.stateDir, handoverWait); err != nil {
			return errors.Join(err, d.sockets.release())
		}
		if d.life.Err() != nil {
			err = d.sockets.close()
			unlock()
			return err
		}
	}
}

func (d *daemon) control() string { return filepath.Join(d.stateDir, "control") }

// replace prepares the sockets, those that the other daemon passes on among them,
// and has it let go of everything.
func (d *daemon) replace(before *server.Predecessor) (unlock func(), err error) {
	log := d.log.WithField("pid", before.PID)
	log.Info("taking the place of the daemon that runs")
	if d.sockets, err = listen(d.listen, before.Listeners, d.log); err != nil {
		return nil, err
	}
	// Before it ends, or its service manager takes that for the service's end.
	service.Notify(mainPID(os.Getpid()))
	defer func() {
		if err != nil {
			service.Notify(mainPID(before.PID))
			err = errors.Join(err, d.sockets.close())
		}
	}()
	start := time.Now()
	if err := before.Go(server.HandoverDrain); err != nil {
		return nil, err
	}
	if unlock, err = lock(d.stateDir, handoverWait); err != nil {
		return nil, err
	}
	if err := d.sockets.renew(); err != nil {
		unlock()
		return nil, err
	}
	log.WithField("after", time.Since(start).Round(time.Millisecond)).Info("it has let go")
	return unlock, nil
}

func mainPID(pid int) string { return "MAINPID=" + strconv.Itoa(pid) }

// serve serves until a signal comes, or until another daemon, which it returns, is
// to take this one's place and everything is let go of but the sockets. The lock
// is held.
func (d *daemon) serve(before *server.Predecessor, first bool) (*server.Successor, error) {
	control, err := server.ListenControl(d.control())
	if err != nil {
		return nil, errors.Join(err, d.sockets.close())
	}
	fail := func(err error) (*server.Successor, error) {
		return nil, errors.Join(err, control.Close(), d.sockets.close())
	}
	m, err := manager.New(manager.Config{Hierarchies: d.set, MaxDepth: int(d.maxDepth), Hold: startHolder, Realtime: d.grants, Log: d.log})
	if err != nil {
		return fail(err)
	}
	defer m.Close()
	ctx, cancel := context.WithCancel(d.life)
	defer cancel()
	backend := &systemBus{Manager: m, log: d.log}
	defer d.listenTo(ctx, backend)()
	s, err := server.New(server.Config{Backend: backend, Listeners: d.sockets.listeners, Log: d.log, Version: version.String()})
	if err == nil {
		err = d.sockets.take()
	}
	if err != nil {
		if before != nil {
			m.KeepGrants() // the other daemon goes on
		}
		return fail(err)
	}
	if before != nil {
		if err := errors.Join(before.Serving(), before.Close()); err != nil {
			d.log.WithError(err).Warn("tell the daemon that was replaced")
		}
	}
	d.sockets.drop()
	if first {
		service.Ready(d.daemon, d.sigstop, d.sockets.listeners, d.log)
	} else {
		service.Notify(sdnotify.SdNotifyReady)
	}
	if d.systemBus {
		backend.start(ctx)
	}
	asked := make(chan *server.Successor, 1)
	go func() {
		asked <- d.awaitSuccessor(ctx, control, s)
		cancel()
	}()
	err = s.Serve(ctx)
	cancel()
	err = errors.Join(err, control.Close())
	next := <-asked
	if next != nil {
		m.KeepGrants() // it takes them up, or this daemon does again
	}
	n := s.Stats().Connections
	if errors.Is(backend.wait(), bus.ErrUnanswered) {
		n++
	}
	if next != nil && n > 0 {
		// They go on in the background and may yet change something: only the
		// end of the process ends them, and tells the other.
		d.log.WithField("connections", n).Warn("ending with requests that take too long")
		os.Exit(service.ExitOK)
	}
	return next, err
}

// listenTo has SIGHUP read the policy file of realtime again, and SIGUSR1 serve
// realtime again after Exit, until the returned function is called.
func (d *daemon) listenTo(ctx context.Context, b *systemBus) (stop func()) {
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case sig := <-d.asks:
				if sig == unix.SIGHUP {
					b.ReloadRealtime()
					continue
				}
				b.ResumeRealtime()
				if d.systemBus {
					b.start(ctx)
				} else {
					d.log.Warn("asked to own the name on the system bus, which is not served (hint: --system-bus)")
				}
			case <-done:
				return
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// awaitSuccessor returns a daemon that is ready to take this one's place, or nil
// once the control socket is closed.
func (d *daemon) awaitSuccessor(ctx context.Context, control *server.Control, s *server.Server) *server.Successor {
	for ctx.Err() == nil {
		next, err := control.Accept(ctx)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				d.log.WithError(err).Warn("refused to be replaced")
				time.Sleep(10 * time.Millisecond) // it may be out of descriptors
			}
			continue
		}
		log := d.log.WithField("pid", next.PID)
		log.Info("asked to hand over")
		service.Notify(sdnotify.SdNotifyReloading)
		stop := context.AfterFunc(ctx, func() { _ = next.Close() })
		err = next.Offer(d.sockets.listeners)
		if stop() && err == nil && s.Handover() {
			return next
		}
		_ = next.Close()
		if ctx.Err() == nil {
			log.WithError(err).Warn("not replaced: who asked does not go on")
			service.Notify(sdnotify.SdNotifyReady)
		}
	}
	return nil
}
