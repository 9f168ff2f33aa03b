package server

import (
	"testing"
	"time"
)

// Who stood still for all of a deadline looks once more at what came meanwhile before
// it ends anything, and then ends it.
func TestDeadlineOverslept(t *testing.T) {
	s := &Server{}
	l := &s.patience
	l.after = 3 * time.Second
	ended := 0
	d := deadline{expire: func() { ended++ }}
	oversleep := func(by time.Duration) {
		s.mu.Lock()
		s.timer.Stop() // the test is the timer
		d.at, s.tickTime = d.at.Add(-by), s.tickTime.Add(-by)
		s.mu.Unlock()
		s.tick()
	}
	begin := func() {
		s.mu.Lock()
		s.start(&d, l)
		s.mu.Unlock()
	}
	begin()
	oversleep(10 * time.Second)
	if ended != 0 || d.list == nil || !s.ticking {
		t.Fatalf("it ended %d times at once, or is forgotten", ended)
	}
	if left := time.Until(s.tickTime); left > again {
		t.Errorf("the next look is in %v", left)
	}
	// Late once more is late enough.
	oversleep(10 * time.Second)
	if ended != 1 || d.list != nil {
		t.Fatalf("it ended %d times", ended)
	}
	// In time is in time, also after that.
	begin()
	oversleep(l.after + slack)
	if ended != 2 || s.ticking {
		t.Errorf("it ended %d times", ended)
	}
	// What was done meanwhile is not ended.
	begin()
	oversleep(10 * time.Second)
	s.mu.Lock()
	d.stop()
	s.mu.Unlock()
	oversleep(again)
	if ended != 2 {
		t.Error("what was done in time is ended")
	}
}
