package bus

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// Bounds on what callers may have under way, and on whom is remembered. A request
// beyond is refused as one beyond the Backend's own limits.
const (
	maxBusy        = 256
	maxAccountBusy = 32
	maxCallerBusy  = 32
	maxIdle        = 128
	// changes bounds the changes per second of a caller that is bounded at all, and
	// burst how many it may ask for at once: refusing costs something, too. The bus
	// bounds how many callers a user is.
	changes = 50
	burst   = 500
	// maxBody bounds the arguments of a call, in bytes.
	maxBody = 4 << 10
)

// session is a connection to the bus and what callers are doing over it.
type session struct {
	Config
	// life ends when no more is to be accepted.
	life context.Context
	conn *conn
	// owner is told when the name may be free, or is lost.
	owner chan struct{}

	mu       sync.Mutex
	callers  map[string]*caller       // by unique name; guarded by mu
	idle     *list.List               // of those without requests, the last used first; guarded by mu
	places   map[string]*list.Element // in idle, by unique name; guarded by mu
	busy     int                      // requests under way; guarded by mu
	accounts map[string]int           // the same, by account; guarded by mu
	ended    bool                     // nobody is remembered any more; guarded by mu
}

// The flag of RequestName, and its answers (D-Bus specification, "Message Bus
// Messages").
const (
	doNotQueue   = 4
	primaryOwner = 1
	alreadyOwner = 4
)

// run serves until life ends (nil), or the connection does.
func (s *session) run() error {
	c, err := dial(s.life, s.Address)
	if err != nil {
		return err
	}
	s.conn = c
	go c.read(s.got)
	defer s.end()
	if err := c.checkNamespaces(s.life); err != nil {
		return err
	}
	c.tell("AddMatch", match(api.RealtimeInterface))
	for s.life.Err() == nil {
		// What comes now is of after this.
		select {
		case <-s.owner:
		default:
		}
		r, err := c.call(s.life, "RequestName", "su", func(e *wire.Encoder) {
			e.String(api.RealtimeInterface)
			e.Uint32(doNotQueue)
		})
		if s.life.Err() != nil {
			break
		}
		if err != nil {
			return fmt.Errorf("own %s: %w", api.RealtimeInterface, err)
		}
		switch r.Uint32() {
		case primaryOwner:
			s.Log.WithField("name", api.RealtimeInterface).Info("serving on the bus")
		case alreadyOwner:
		default:
			s.foreign()
		}
		select {
		case <-s.owner:
		case <-c.done:
			return errLost
		case <-s.life.Done():
		}
	}
	s.leave()
	return nil
}

// foreign says that the name is somebody else's.
func (s *session) foreign() {
	log := s.Log.WithField("name", api.RealtimeInterface)
	if other, err := s.conn.credentials(s.life, api.RealtimeInterface); err == nil {
		log = log.WithField("pid", other.pid)
	}
	log.Warn("not served on the bus: the name is owned by another process (hint: end it, rtkit-daemon for instance; then it is taken)")
}

// How long requests may go on that are under way when the session ends: at first
// with the name, so that whoever ended it gets its answer from the owner.
const (
	lastAnswers = 300 * time.Millisecond
	lastGrace   = 3 * time.Second
)

// leave gives the name up.
func (s *session) leave() {
	s.await(lastAnswers)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	// The answer comes after all that was sent to the name.
	_, err := s.conn.callString(ctx, "ReleaseName", api.RealtimeInterface)
	if err != nil && !errors.Is(err, errLost) {
		s.Log.WithError(err).Warn("give up the name on the bus")
	}
	s.await(lastGrace)
}

// await waits for the requests under way.
func (s *session) await(most time.Duration) {
	for end := time.Now().Add(most); time.Now().Before(end) && s.unanswered() != nil; {
		time.Sleep(2 * time.Millisecond)
	}
}

// unanswered returns ErrUnanswered while requests are under way.
func (s *session) unanswered() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy > 0 {
		return ErrUnanswered
	}
	return nil
}

// end ends the connection, and lets go of everybody: of who has a request under way
// once that is done.
func (s *session) end() {
	s.conn.close()
	<-s.conn.done
	s.mu.Lock()
	s.ended = true
	var idle []*caller
	for _, c := range s.callers {
		if c.busy == 0 {
			idle = append(idle, c)
		}
	}
	s.mu.Unlock()
	for _, c := range idle {
		s.forget(c)
	}
}

// got is called for each message but answers, on the goroutine that reads.
func (s *session) got(m *wire.Message) {
	switch m.Type {
	case wire.Signal:
		if string(m.Sender) == busName && string(m.Member) == "NameOwnerChanged" && string(m.Signature) == "sss" {
			d := wire.NewDecoder(string(m.Body), m.BigEndian)
			name, _, now := d.String(), d.String(), d.String()
			if name == api.RealtimeInterface {
				select {
				case s.owner <- struct{}{}:
				default:
				}
			} else if now == "" {
				s.gone(name)
			}
		}
	case wire.Call:
		r := request{s: s, m: m}
		if r.find(); r.method == nil {
			r.unknown()
		} else if len(m.Body) > maxBody {
			r.fail(errorLimits, "the arguments are too long")
		} else if !r.local() && !s.start(&r) {
			r.refuse(api.Errorf(api.Limit, "%s: too many requests at once", r.method.Name))
		}
	case wire.Return, wire.Error:
	}
}

// start begins a request that the Backend answers, unless there are too many.
func (s *session) start(r *request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := string(r.m.Sender)
	c := s.callers[name]
	if s.busy >= maxBusy || c != nil && c.busy >= maxCallerBusy {
		return false
	}
	fresh := c == nil
	if fresh {
		c = &caller{name: name, known: make(chan struct{}), rate: rate.NewLimiter(changes, burst)}
		s.callers[name] = c
	}
	if at := s.places[name]; at != nil {
		s.idle.Remove(at)
		delete(s.places, name)
	}
	c.busy++
	s.busy++
	go func() {
		defer s.done(c)
		if fresh {
			s.meet(c)
		}
		<-c.known
		s.answer(r, c)
	}()
	return true
}

// meet establishes who a new caller is.
func (s *session) meet(c *caller) {
	defer close(c.known)
	defer s.recovered(&c.err)
	s.conn.tell("AddMatch", match(c.name))
	if c.rq, c.err = s.open(context.Background(), c.name); c.err != nil {
		s.Log.WithField("name", c.name).WithError(c.err).Debug("cannot tell who asks over the bus")
		return
	}
	c.accounts = c.rq.Peer.Accounts()
}

// answer answers a request of a caller that is known.
func (s *session) answer(r *request, c *caller) {
	if c.err != nil {
		r.refuse(api.Errorf(api.Internal, "cannot tell who asks").WithCause(c.err))
		return
	}
	if len(c.accounts) > 0 && r.method.Changes && !c.rate.Allow() {
		r.refuse(api.Errorf(api.Limit, "%s: too many changes a second", r.method.Name))
		return
	}
	if !s.charge(c.accounts) {
		r.refuse(api.Errorf(api.Limit, "%s: too many requests at once", r.method.Name))
		return
	}
	defer s.discharge(c.accounts)
	r.answer(&c.rq)
}

// charge counts a request of the accounts, if each has room for it.
func (s *session) charge(accounts []string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range accounts {
		if s.accounts[a] >= maxAccountBusy {
			return false
		}
	}
	for _, a := range accounts {
		s.accounts[a]++
	}
	return true
}

func (s *session) discharge(accounts []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range accounts {
		if s.accounts[a]--; s.accounts[a] == 0 {
			delete(s.accounts, a)
		}
	}
}

// done ends a request of the caller's.
func (s *session) done(c *caller) {
	s.mu.Lock()
	s.busy--
	var leaves *caller
	if c.busy--; c.busy == 0 {
		if c.gone || c.err != nil || s.ended {
			leaves = c
		} else if s.places[c.name] = s.idle.PushFront(c); s.idle.Len() > maxIdle {
			leaves, _ = s.idle.Back().Value.(*caller)
		}
	}
	s.dropLocked(leaves)
	s.mu.Unlock()
	s.forget(leaves)
}

// gone is called when a name is nobody's any more; it never comes back.
func (s *session) gone(name string) {
	s.mu.Lock()
	c := s.callers[name]
	if c != nil {
		if c.gone = true; c.busy > 0 {
			c = nil // it leaves when its last request is done
		}
	}
	s.dropLocked(c)
	s.mu.Unlock()
	s.forget(c)
}

// dropLocked takes a caller without requests off the session's maps; nil is none.
func (s *session) dropLocked(c *caller) {
	if c == nil {
		return
	}
	delete(s.callers, c.name)
	if at := s.places[c.name]; at != nil {
		s.idle.Remove(at)
		delete(s.places, c.name)
	}
}

// forget lets go of a caller that was dropped.
func (s *session) forget(c *caller) {
	if c == nil {
		return
	}
	s.conn.tell("RemoveMatch", match(c.name))
	if c.rq.Peer != nil {
		c.rq.Peer.Close()
	}
}

// recovered turns a panic into an error: a bug ends one request, not the daemon.
func (s *session) recovered(err *error) {
	if v := recover(); v != nil {
		s.Log.Errorf("panic: %v\n%s", v, debug.Stack())
		*err = api.AsError(fmt.Errorf("panic: %v", v))
	}
}
