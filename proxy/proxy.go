package proxy

import (
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"cgmanager/api"
)

// DefaultWait is how long requests wait for the daemon below to come back.
const DefaultWait = 5 * time.Second

// Config is what a Proxy needs.
type Config struct {
	// Lower is the path of the daemon's socket.
	Lower string
	// Wait is how long a request waits for the daemon below to come back; 0 is
	// not at all.
	Wait time.Duration
	// Log gets what becomes of the daemon below. Nil discards it.
	Log logrus.FieldLogger
}

// Proxy implements api.Backend by asking the daemon below. Make one with New.
type Proxy struct {
	lower string
	wait  time.Duration
	log   logrus.FieldLogger
	down  atomic.Bool // the daemon below is, for the log
	lines *rate.Limiter

	ending chan struct{} // closed by End
	end    sync.Once
}

// New makes a Proxy. It asks nothing of the daemon below yet.
func New(c Config) *Proxy {
	if c.Log == nil {
		l := logrus.New()
		l.SetLevel(logrus.PanicLevel)
		c.Log = l
	}
	return &Proxy{
		lower: c.Lower, wait: c.Wait, log: c.Log,
		lines: rate.NewLimiter(rate.Every(time.Second), 10), ending: make(chan struct{}),
	}
}

// End makes requests that wait for the daemon below give up.
func (p *Proxy) End() { p.end.Do(func() { close(p.ending) }) }

// peer is a client's connection.
type peer struct {
	p        *Proxy
	facts    facts
	accounts []string

	// turn is taken by the request that goes down: there is one at a time. What
	// follows belongs to whoever has it.
	turn chan struct{}
	// hops are those for whom the requests on this connection are: the client,
	// and, where it is a proxy, those for whom it asks itself.
	hops  []*handle
	lower *lower // nil until the first request, and after a failure
}

// Open implements api.Backend.
func (p *Proxy) Open(opener api.Cred, pidfd int) (api.Peer, error) {
	h, err := hold(opener, pidfd)
	if err == nil {
		var f facts
		if f, err = learn(h); err == nil {
			c := &peer{p: p, facts: f, turn: make(chan struct{}, 1), hops: []*handle{h}}
			c.accounts = accounts(opener.UID, f)
			return c, nil
		}
		h.close()
	}
	return nil, api.Errorf(api.Denied, "cannot establish who connected").WithCause(err)
}

// accounts charges a client by its uid and the namespaces around it; root of the
// proxy's own namespaces is bounded by nobody here, as host root in the daemon.
func accounts(uid uint32, f facts) []string {
	if uid == 0 && len(f.around) == 0 {
		return nil
	}
	return append([]string{"uid " + strconv.FormatUint(uint64(uid), 10)}, f.around...)
}

// AcceptsIdentity implements api.Peer.
func (c *peer) AcceptsIdentity(uid uint32) bool {
	own := c.hops[0].cred.UID
	if c.facts.sameUsers {
		return uid == own
	}
	outer, ok := c.facts.uids.outer(uid)
	return ok && outer == own
}

// Accounts implements api.Peer.
func (c *peer) Accounts() []string { return c.accounts }

// Close implements api.Peer.
func (c *peer) Close() {
	c.hangUp()
	for _, h := range c.hops {
		h.close()
	}
}

// hangUp ends the connection to the daemon below.
func (c *peer) hangUp() {
	if c.lower != nil {
		c.lower.close()
		c.lower = nil
	}
}

// ActFor implements api.CGManager1: the client is a proxy itself, and names one
// for whom it asks.
func (p *Proxy) ActFor(rq *api.Request) error {
	const op = "ActFor"
	c, err := p.take(op, rq)
	if err != nil {
		return err
	}
	defer c.release()
	if len(c.hops) >= api.MaxHops {
		return api.Errorf(api.Limit, "%s: more than %d proxies in a row", op, api.MaxHops)
	}
	h, err := hold(rq.Sender, -1)
	if err != nil {
		return api.Errorf(api.Denied, "%s: the requestor has ended", op).WithCause(err)
	}
	c.hops = append(c.hops, h)
	err = c.try(op, false, func(l *lower) error {
		if l.original {
			return api.Errorf(api.Unsupported, "%s: the daemon below is the original cgmanager, which serves one proxy and no chain of them", op).
				WithHint("run this project's cgmanager on the host")
		}
		return nil // try has passed all hops on
	})
	if err != nil {
		c.hangUp()
		c.hops = c.hops[:len(c.hops)-1]
		h.close()
	}
	return err
}

// take returns the request's connection once it is this request's turn.
func (p *Proxy) take(op string, rq *api.Request) (*peer, error) {
	c, ok := rq.Peer.(*peer)
	if !ok {
		return nil, api.Errorf(api.Internal, "%s: unknown peer", op)
	}
	select {
	case c.turn <- struct{}{}:
		return c, nil
	case <-p.ending:
		return nil, ended(op)
	}
}

func (c *peer) release() { <-c.turn }

func ended(op string) error {
	return api.Errorf(api.Busy, "%s: the proxy is ending", op)
}

// Lower says what the daemon below is.
type Lower struct {
	// Original: it is the original cgmanager, which knows no chains.
	Original bool
	// PID is that of who listens there, 0 if it is in no pid namespace that
	// this process sees into, as it should be: who sees the daemon has the
	// numbers that the daemon knows, and needs no proxy.
	PID int32
}

// Check asks whether the daemon below is one that a proxy can use. It waits for
// it as requests do. The error wraps the system's where nobody answers, and
// ErrVersion where the wrong one does.
func (p *Proxy) Check() (Lower, error) {
	self := ownCred(int32(os.Getpid()))
	c := &peer{p: p, turn: make(chan struct{}, 1)}
	defer c.hangUp()
	var found Lower
	err := c.persist(false, func(l *lower) error {
		cred, err := l.server()
		if err != nil {
			return err
		}
		found.PID = cred.Pid
		if err := l.checkVersion(self); err != nil {
			return err
		}
		err = l.actFor(self)
		found.Original = l.original
		return err
	})
	return found, err
}

// CheckPrivilege returns an error that says what this process lacks to name
// others: it sends itself a message in the name of process 1.
func CheckPrivilege() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	return checkPrivilege(pair[0])
}
