package server

import (
	"cmp"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bounds what peers can use. A field that is zero has its default. A
// peer without accounts, which is host root, is bound by the totals alone.
type Limits struct {
	// Connections bounds the connections of an account. A process for whom the
	// opener of one acts (ActFor) counts as one more. 2,048.
	Connections int
	// TotalConnections bounds all connections in the same way; beyond it the
	// rest wait to be accepted. 16,384, or what RLIMIT_NOFILE leaves room for.
	TotalConnections int
	// Handshakes bounds an account's connections that have not finished
	// their handshake. 1,024.
	Handshakes int
	// Exchanges bounds the pending side channel exchanges of an account, and
	// of a connection. 64.
	Exchanges int
	// ForeignFDs bounds the file descriptors that an account has passed and
	// that are not closed yet. 1,024.
	ForeignFDs int
	// Buffered bounds the bytes that are kept for an account: parts of
	// messages and answers that it does not read. 8 MiB.
	Buffered int
	// Workers bounds the requests that run at once, and AccountWorkers those
	// of one account, apart for those that may wait for another daemon. 64 and 8.
	Workers, AccountWorkers int
	// Closers bounds the goroutines that close passed descriptors, and
	// AccountClosers those that one account occupies. 256 and 4: who blocks one
	// costs a thread, and 64 accounts would have to conspire.
	Closers, AccountClosers int
	// Changes bounds an account's changes per second, and Burst how many it
	// may save up. 1,000 and 5,000.
	Changes, Burst float64
	// Handshake is how long a handshake may take. 10 s.
	Handshake time.Duration
	// Stall is how long an answer may wait for a peer that does not read, and
	// half a message for its rest. 10 s.
	Stall time.Duration
	// Exchange is how long a side channel exchange may wait for the peer's
	// credentials, and then again for it to read the result. 3 s.
	Exchange time.Duration
	// Drain is how long Serve goes on after its context ended, to answer what
	// was received before. 700 ms.
	Drain time.Duration
	// Handover is the same where another daemon waits to serve. 3 s.
	Handover time.Duration
}

// HandoverDrain is the default of Limits.Handover.
const HandoverDrain = 3 * time.Second

const (
	// maxText bounds the text of an error, in bytes.
	maxText = 1024
	// maxOpening bounds the connections whose opener is being established;
	// beyond it the rest wait to be accepted.
	maxOpening = 256
)

// handles is how many descriptors a connection may need: its socket, and what
// a Backend's Peer holds of the opener, or of one for whom it acts.
const handles = 6

// withDefaults fills in what l leaves open. files is RLIMIT_NOFILE: three
// quarters of it are for connections, an eighth is for descriptors that
// strangers pass. It must never be reached: what recvmsg cannot install, the
// kernel closes on the spot, and that can block.
func (l Limits) withDefaults(files int) Limits {
	l.Connections = cmp.Or(l.Connections, 2048)
	l.TotalConnections = min(cmp.Or(l.TotalConnections, 16384), max(files*3/4/handles, 16))
	l.Handshakes = cmp.Or(l.Handshakes, 1024)
	l.Exchanges = cmp.Or(l.Exchanges, 64)
	l.ForeignFDs = cmp.Or(l.ForeignFDs, 1024)
	l.Buffered = cmp.Or(l.Buffered, 8<<20)
	l.Workers = cmp.Or(l.Workers, 64)
	l.AccountWorkers = cmp.Or(l.AccountWorkers, 8)
	l.Closers = cmp.Or(l.Closers, 256)
	l.AccountClosers = cmp.Or(l.AccountClosers, 4)
	l.Changes = cmp.Or(l.Changes, 1000)
	l.Burst = cmp.Or(l.Burst, 5000)
	l.Handshake = cmp.Or(l.Handshake, 10*time.Second)
	l.Stall = cmp.Or(l.Stall, 10*time.Second)
	l.Exchange = cmp.Or(l.Exchange, 3*time.Second)
	l.Drain = cmp.Or(l.Drain, 700*time.Millisecond)
	l.Handover = cmp.Or(l.Handover, HandoverDrain)
	return l
}

// raiseFiles raises RLIMIT_NOFILE as far as the process may and the server has
// a use for, and returns it.
func raiseFiles() int {
	const want = 1 << 17
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1024
	}
	if r.Cur < want {
		more := unix.Rlimit{Cur: want, Max: max(want, r.Max)}
		if unix.Setrlimit(unix.RLIMIT_NOFILE, &more) == nil { // else it stays as it is
			r = more
		}
	}
	return int(min(r.Cur, want))
}

// account is who is charged: a uid, or a container. Server.mu guards it.
type account struct {
	name                         string
	conns, handshakes, exchanges int
	foreign, buffered            int
	pools                        [pools]poolAccount
	tokens                       float64
	refilled                     time.Time
}

// spend takes one change from the account's allowance and reports whether
// there was one.
func (a *account) spend(l *Limits, now time.Time) bool {
	a.tokens = min(l.Burst, a.tokens+l.Changes*now.Sub(a.refilled).Seconds())
	a.refilled = now
	if a.tokens < 1 {
		return false
	}
	a.tokens--
	return true
}

// idle reports whether forgetting the account forgets nothing.
func (a *account) idle(l *Limits, now time.Time) bool {
	return a.conns == 0 && a.exchanges == 0 && a.foreign == 0 && a.buffered == 0 &&
		a.poolsIdle() &&
		a.tokens+l.Changes*now.Sub(a.refilled).Seconds() >= l.Burst
}

// poolsIdle reports whether no task of the account's is waiting or running.
func (a *account) poolsIdle() bool {
	for i := range a.pools {
		if !a.pools[i].idle() {
			return false
		}
	}
	return true
}

// account returns the account called name. Called with mu held.
func (s *Server) account(name string) *account {
	if a, ok := s.accounts[name]; ok {
		return a
	}
	now := time.Now()
	if len(s.accounts) >= s.sweepAt {
		for n, a := range s.accounts {
			if a.idle(&s.limits, now) {
				delete(s.accounts, n)
			}
		}
		s.sweepAt = max(256, 2*len(s.accounts))
	}
	a := &account{name: name, tokens: s.limits.Burst, refilled: now}
	s.accounts[name] = a
	return a
}
