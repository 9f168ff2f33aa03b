package server

import "time"

// deadline is a moment at which something is to end unless it is done before.
// The zero value is not pending.
type deadline struct {
	at         time.Time
	prev, next *deadline
	list       *deadlines
	expire     func() // called with mu held
}

// deadlines are pending deadlines of one duration, so the first is the
// earliest. Server.mu guards them.
type deadlines struct {
	after       time.Duration
	first, last *deadline
}

// start makes d pending, or starts it anew. Called with mu held.
func (s *Server) start(d *deadline, l *deadlines) {
	d.stop()
	d.at, d.list, d.prev = time.Now().Add(l.after), l, l.last
	if l.last == nil {
		l.first = d
	} else {
		l.last.next = d
	}
	l.last = d
	if !s.ticking || d.at.Before(s.tickTime) {
		s.tickAt(d.at)
	}
}

// stop makes d no longer pending. Called with mu held.
func (d *deadline) stop() {
	l := d.list
	if l == nil {
		return
	}
	if d.prev == nil {
		l.first = d.next
	} else {
		d.prev.next = d.next
	}
	if d.next == nil {
		l.last = d.prev
	} else {
		d.next.prev = d.prev
	}
	d.list, d.prev, d.next = nil, nil, nil
}

// slack is how late a deadline may be noticed: one timer serves them all.
const slack = 100 * time.Millisecond

// A deadline that is noticed later than by overslept was so because the daemon, or
// the whole machine, stood still: what peers have said meanwhile is read first, and
// those that stood still with it have as long as again to say it.
const (
	overslept = 500 * time.Millisecond
	again     = time.Second
)

// tickAt sets the one timer. It runs only while a deadline is pending, and at
// most one more time. Called with mu held.
func (s *Server) tickAt(at time.Time) {
	s.ticking, s.tickTime = true, at
	wait := time.Until(at) + slack
	if s.timer == nil {
		s.timer = time.AfterFunc(wait, s.tick)
	} else {
		s.timer.Reset(wait)
	}
}

// tick ends what is due.
func (s *Server) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ticking = false
	if s.stopped {
		return
	}
	now := time.Now()
	if late := now.Sub(s.tickTime) > slack+overslept; late && !s.again {
		s.again = true
		s.tickAt(now.Add(again - slack))
		return
	}
	s.again = false
	all := [...]*deadlines{&s.handshakes, &s.stalls, &s.patience, &s.retries}
	for _, l := range all {
		for l.first != nil && !l.first.at.After(now) {
			d := l.first
			d.stop()
			d.expire()
		}
	}
	for _, l := range all {
		if l.first != nil && (!s.ticking || l.first.at.Before(s.tickTime)) {
			s.tickAt(l.first.at)
		}
	}
}
