package rt

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"cgmanager/manager/rt/watchdog"
)

// event acts on what the watchdog has done.
func (s *Service) event(e watchdog.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.Kind == watchdog.Starving {
		if d := s.Starved(2 * s.Watchdog.Period); d > 0 {
			s.log.WithField("for", d).Warn("The canary thread is apparently starving. Nobody is granted realtime for now.")
		}
		return
	}
	g, ok := s.Get(e.ID)
	if !ok {
		return
	}
	f := fieldsOf(&g)
	switch e.Kind {
	case watchdog.Demoted:
		s.SetDemoted(g.ID, true)
		name, how := s.Hog(g.ID)
		f["used"], f["of"], f["refused"], f["for"] = e.Used, e.Window, name, how
		s.log.WithFields(f).Warnf("Demoted thread %d of process %d: it took more of a CPU than it may.", g.Thread.TID, g.Thread.PID)
	case watchdog.Starved:
		s.SetDemoted(g.ID, true)
		s.log.WithFields(f).Warnf("Demoted thread %d of process %d while the host starves.", g.Thread.TID, g.Thread.PID)
	case watchdog.Restored:
		s.SetDemoted(g.ID, false)
		s.log.WithFields(f).Infof("Restored thread %d of process %d.", g.Thread.TID, g.Thread.PID)
	case watchdog.Ended:
		if !s.settleLocked(&g) {
			s.changedLocked(&g)
		}
	case watchdog.Lost:
		s.log.WithFields(f).Errorf("Nobody watches thread %d of process %d: it is demoted.", g.Thread.TID, g.Thread.PID)
		s.revokeLocked([]Grant{g})
	case watchdog.Starving:
	}
}

// changedLocked has a thread watched for what it is now: it may give up realtime by
// itself, and have a nice level left that it was granted before.
func (s *Service) changedLocked(g *Grant) {
	h := s.held[g.ID]
	if h == nil || g.Demoted {
		return
	}
	now, err := h.thread.Scheduling()
	if err == nil && realtime(now.Policy) == realtime(g.Policy) {
		err = errors.New("it was said to have ended")
	}
	if err == nil {
		g.Policy, g.Priority, g.Nice = unix.SCHED_NORMAL, 0, now.Nice
		if realtime(now.Policy) {
			g.Policy, g.Priority = now.Policy, now.Priority
		}
		s.Change(g.ID, g.Policy, g.Priority, g.Nice)
		err = s.watchLocked(g)
	}
	if err != nil {
		s.log.WithError(err).WithFields(fieldsOf(g)).Error("cannot watch a thread any more")
		s.revokeLocked([]Grant{*g})
	}
}

// events passes on what the watchdog reports without keeping it waiting: what acts
// on it may wait for the watchdog.
type events struct {
	mu     sync.Mutex
	more   *sync.Cond
	queue  []watchdog.Event // guarded by mu
	ending bool             // guarded by mu
	done   chan struct{}
}

func (e *events) begin(act func(watchdog.Event)) {
	e.more, e.done = sync.NewCond(&e.mu), make(chan struct{})
	go func() {
		defer close(e.done)
		e.mu.Lock()
		defer e.mu.Unlock()
		for {
			for len(e.queue) == 0 {
				if e.ending {
					return
				}
				e.more.Wait()
			}
			next := e.queue[0]
			e.queue = e.queue[1:]
			e.mu.Unlock()
			act(next)
			e.mu.Lock()
		}
	}()
}

func (e *events) put(ev watchdog.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.queue = append(e.queue, ev)
	e.more.Signal()
}

func (e *events) end() {
	e.mu.Lock()
	e.ending = true
	e.more.Signal()
	e.mu.Unlock()
	<-e.done
}
