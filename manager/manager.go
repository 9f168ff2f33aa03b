package manager

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	"golang.org/x/time/rate"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt"
)

// DefaultMaxDepth is how deep below a hierarchy's root a cgroup may be made.
const DefaultMaxDepth = 16

// Config says what a Manager works on.
type Config struct {
	// Hierarchies are those to be managed; they stay the caller's.
	Hierarchies *cgfs.Set
	// MaxDepth bounds the depth of cgroups that are created, counted from the
	// hierarchy's root. 0 means DefaultMaxDepth.
	MaxDepth int
	// MaxCgroups bounds how many cgroups an owner may have in a hierarchy; see
	// quota. 0 means DefaultMaxCgroups.
	MaxCgroups int
	// Hold starts the process that a scope of systemd's begins with. Without it
	// nothing is asked of systemd, and nothing known of what it manages.
	Hold func() (Holder, error)
	// Realtime says what is granted of realtime; nil: nothing is.
	Realtime *rt.Config
	// Log receives a line for each change and each refusal.
	Log *logrus.Logger
}

// Manager answers requests on this host's cgroups. It implements api.Backend.
type Manager struct {
	set      *cgfs.Set
	host     *identity.Host
	log      *logrus.Logger
	maxDepth int
	quota    *quota
	ledger   *ledger
	reaper   *reaper
	scopes   *scopes         // nil where systemd does not run
	rt       *rt.Service     // nil where realtime is not granted
	moving   locks[int32]    // by pid; held from the last look at a task to its move
	freezing locks[watchKey] // of cgroups; held while Kill, or dividing one, freezes and thaws
	// keepGrants leaves what was granted of realtime to the next daemon.
	keepGrants bool
	// refusals bounds the audit lines of refusals; unwritten counts those
	// since the last one.
	refusals  *rate.Limiter
	unwritten atomic.Int64
}

var _ api.Backend = (*Manager)(nil)

// New makes a Manager and starts looking after the cgroups that carry a
// RemoveOnEmpty mark, those of an earlier run included.
func New(c Config) (*Manager, error) {
	host, err := identity.NewHost()
	if err != nil {
		return nil, err
	}
	m := &Manager{
		set: c.Hierarchies, host: host, log: c.Log, maxDepth: c.MaxDepth,
		refusals: rate.NewLimiter(refusalLines, refusalBurst),
	}
	if m.maxDepth == 0 {
		m.maxDepth = DefaultMaxDepth
	}
	m.quota = newQuota(c.MaxCgroups)
	m.ledger = newLedger(m.quota.max)
	if m.scopes, err = newScopes(c); err != nil {
		return nil, err
	}
	if m.reaper, err = newReaper(m.set, m.log, m.ledger.gone); err != nil {
		return nil, err
	}
	if c.Realtime != nil {
		if m.rt, err = rt.Open(*c.Realtime, m.set, m.host, m.log); err != nil {
			m.Close()
			return nil, err
		}
	}
	return m, nil
}

// Close takes realtime back, unless KeepGrants was called, and stops looking after
// marked cgroups. Marks stay where they are, in the kernel.
func (m *Manager) Close() {
	if m.rt != nil {
		m.rt.Close(m.keepGrants)
	}
	if m.scopes != nil {
		m.scopes.close()
	}
	m.reaper.close()
}

// peer is the opener of a connection.
type peer struct {
	m        *Manager
	accounts []string

	mu    sync.Mutex
	chain []link // guarded by mu; the first is the opener
}

// Open implements api.Backend.
func (m *Manager) Open(opener api.Cred, pidfd int) (api.Peer, error) {
	proc, err := identity.Open(opener.PID, pidfd)
	if err != nil {
		return nil, api.Errorf(api.Denied, "the process that connected has ended").WithCause(err)
	}
	p := &peer{m: m, chain: []link{{opener, proc}}}
	if p.accounts, err = m.accounts(proc, opener.UID); err != nil {
		proc.Close()
		return nil, err
	}
	return p, nil
}

// accounts names whom to charge for what a process with the uid uses; none for host
// root. See api.Peer.
func (m *Manager) accounts(proc *identity.Process, uid uint32) ([]string, error) {
	all, err := m.host.Containers(proc)
	if err != nil {
		return nil, api.Errorf(api.Denied, "cannot tell in which namespaces the process is").WithCause(err)
	}
	if uid != 0 || len(all) > 0 {
		all = append(all, fmt.Sprintf("uid:%d", uid))
	}
	makers, err := m.host.Makers(proc)
	if err != nil {
		return nil, api.Errorf(api.Denied, "cannot tell who made the namespaces of the process").WithCause(err)
	}
	for _, maker := range makers {
		if maker != 0 && maker != uid {
			all = append(all, fmt.Sprintf("uid:%d", maker))
		}
	}
	return all, nil
}

// AcceptsIdentity implements api.Peer.
func (p *peer) AcceptsIdentity(uid uint32) bool {
	opener := p.links()[0]
	in, ok := p.m.host.InnerUID(opener.proc, opener.cred.UID)
	return ok && in == uid
}

// Accounts implements api.Peer.
func (p *peer) Accounts() []string { return p.accounts }

// Close implements api.Peer.
func (p *peer) Close() {
	for _, l := range p.links() {
		l.proc.Close()
	}
}
