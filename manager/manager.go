package manager

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/manager/rt"
	"cgmanager/privcheck"
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
	beside   *beside         // nil where systemd does not run
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
	if m.beside, err = newBeside(c); err != nil {
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
	if m.beside != nil {
		m.beside.close()
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

// A role says why a party must be entitled.
type role string

const (
	requestor role = "requestor"
	opener    role = "opener"
	proxy     role = "proxy"
)

// party is one of those who must all be entitled to a request, with what is
// known about it.
type party struct {
	role    role
	cred    api.Cred
	proc    *identity.Process
	r       privcheck.Requestor
	cgroups cgfs.ProcCgroup
	// exiting, once asked: "/" is not where the party is.
	exiting, asked bool
	// ownPath is the answer of own for ownIn, the hierarchy last asked about.
	ownPath string
	ownIn   *cgfs.Hierarchy
	// undelegated: systemd manages where it is. scope is the path of what
	// stands for that, if there is one.
	undelegated bool
	scope       string
}

// own returns the party's own cgroup in h, "" if it is unknown.
func (p *party) own(h *cgfs.Hierarchy) string {
	if p.scope != "" && scoped(h) {
		return p.scope
	}
	return p.present(h)
}

// present returns where the party is in h, "" if that is unknown: its own
// cgroup, unless a scope stands for it.
func (p *party) present(h *cgfs.Hierarchy) string {
	if p.ownIn != h {
		p.ownPath, p.ownIn = p.findOwn(h), h
	}
	return p.ownPath
}

func (p *party) findOwn(h *cgfs.Hierarchy) string {
	path, ok := p.cgroups.Cgroup(h)
	if !ok {
		return ""
	}
	// Of a first thread that has exited the kernel says "/" on v1, where that gives
	// no rights outside anyway, and on v2 where it was then.
	suspect := path == "/" && !p.r.Outside()
	if h.Version() == cgfs.V2 {
		suspect = p.cgroups.RootAlone()
	}
	if suspect {
		if !p.asked {
			p.exiting, p.asked = p.proc.LeaderExiting(), true
		}
		if p.exiting {
			return ""
		}
	}
	return path
}

// call is a request in progress: who asks, and the handles behind the facts.
type call struct {
	m  *Manager
	op string
	// parties[0] is the requestor: names are relative to its cgroup, numbers
	// are those of its namespaces.
	parties []party
	// proxies is the index of the first party that acts for those before it,
	// or -1; see behind. root is that of the innermost proxy's opener, or else of
	// the connection's: absolute names count from its cgroup.
	proxies, root int
	// chained: the connection's opener acts for others by ActFor.
	chained bool
	// scm says that this is an *Scm call: results are in the daemon's own
	// numbers.
	scm     bool
	close   []interface{ Close() }
	tops    []*cgfs.Dir // see top
	changes []change
}

// change is something that a request has changed, for the audit line.
type change struct {
	what        string
	hierarchies string
	decision    privcheck.Decision
}

// begin establishes who asks, and for a requestor beside systemd a scope, where one is
// needed. The caller must end the call.
func (m *Manager) begin(op string, rq *api.Request) (*call, error) {
	c, err := m.beginAnywhere(op, rq)
	if err != nil {
		return nil, err
	}
	if err := c.establish(); err != nil {
		c.release()
		return nil, err
	}
	return c, nil
}

// beginAnywhere is begin, for requests that concern no cgroup.
func (m *Manager) beginAnywhere(op string, rq *api.Request) (_ *call, err error) {
	c := &call{m: m, op: op, proxies: -1, scm: rq.For != nil}
	peer, ok := rq.Peer.(*peer)
	if !ok {
		return nil, api.Errorf(api.Internal, "%s: unknown peer", op)
	}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	links := peer.links()
	if err := c.addClient(rq, links[len(links)-1]); err != nil {
		return nil, err
	}
	c.root = len(c.parties) - 1
	if outer := links[:len(links)-1]; len(outer) > 0 {
		c.chained = true
		if !c.scm {
			c.proxies, c.root = len(c.parties), len(c.parties)
		}
		for _, l := range slices.Backward(outer) {
			if err := c.addParty(proxy, l.cred, l.proc); err != nil {
				return nil, err
			}
		}
	}
	if err := c.nested(); err != nil {
		return nil, err
	}
	return c, nil
}

// addClient gathers the facts about the client at the inner end, the process
// that sent the message, and the one for whom it is an *Scm call.
func (c *call) addClient(rq *api.Request, client link) error {
	sender, first := requestor, requestor
	if c.scm {
		if *rq.For == client.cred && rq.Sender == client.cred {
			// A process that acts for itself: one party is enough.
			c.proxies = 0
			return c.addParty(requestor, client.cred, client.proc)
		}
		sender, first, c.proxies = proxy, proxy, 1
		if err := c.addParty(requestor, *rq.For, nil); err != nil {
			return err
		}
	}
	if rq.Sender != client.cred {
		if !c.scm {
			first = opener
		}
		if err := c.addParty(sender, rq.Sender, nil); err != nil {
			return err
		}
	}
	return c.addParty(first, client.cred, client.proc)
}

// end closes what the call holds and writes the audit line of what it has
// changed.
func (c *call) end(err *error) {
	c.release()
	if len(c.changes) == 0 || !c.m.log.IsLevelEnabled(logrus.InfoLevel) {
		return
	}
	last := c.changes[len(c.changes)-1]
	f := c.fields(last.what, last.decision)
	if len(c.changes) > 1 {
		var all []string
		for _, ch := range c.changes {
			all = append(all, ch.what)
		}
		f["target"] = strings.Join(all, ", ")
	}
	f["in"] = last.hierarchies
	if *err != nil {
		c.m.log.WithFields(f).WithError(*err).Info("failed on the way")
		return
	}
	c.m.log.WithFields(f).Info("done")
}

// release closes the handles that the call holds.
func (c *call) release() {
	for _, h := range c.close {
		h.Close()
	}
	for _, d := range c.tops {
		_ = d.Close()
	}
	c.close, c.tops = nil, nil
}

// addParty gathers the facts about one party. proc is nil for one known only
// by a credential that came with a message or over a side channel: its ids are
// then believed only if the process has them.
func (c *call) addParty(role role, cred api.Cred, proc *identity.Process) error {
	proven := proc != nil
	if proc == nil {
		var err error
		if proc, err = identity.Open(cred.PID, -1); err != nil {
			return c.unknown(role, err)
		}
		c.close = append(c.close, proc)
	}
	r, err := c.m.host.Requestor(proc, cred.UID, cred.GID, proven)
	if err != nil {
		return c.unknown(role, err)
	}
	cgroups, err := proc.Cgroups()
	if err != nil {
		return c.unknown(role, err)
	}
	if !proc.Alive() {
		return c.unknown(role, identity.ErrGone)
	}
	c.parties = append(c.parties, party{role: role, cred: cred, proc: proc, r: r, cgroups: cgroups})
	return nil
}

func (c *call) unknown(role role, err error) error {
	text := "%s: cannot establish who the " + string(role) + " is"
	switch {
	case errors.Is(err, identity.ErrGone):
		text = "%s: the " + string(role) + " has ended"
	case errors.Is(err, identity.ErrNotItsIDs):
		text = "%s: the credential of the " + string(role) + " is not its own"
	}
	if c.m.refusals.Allow() {
		c.m.log.WithFields(logrus.Fields{"op": c.op, "party": role}).WithError(err).Warn("refused: identity not established")
	} else {
		c.m.unwritten.Add(1)
	}
	return api.Errorf(api.Denied, text, c.op).WithCause(fmt.Errorf("%w: %w", errUnknown, err))
}

// errUnknown is a cause of the errors about who asks.
var errUnknown = errors.New("identity not established")

// r returns the requestor.
func (c *call) r() *party { return &c.parties[0] }

// decide asks question for every party; all must be allowed. It logs a
// refusal and returns it as an error about subject, the caller's own words.
func (c *call) decide(subject string, question func(p *party) privcheck.Decision) (privcheck.Decision, error) {
	var last privcheck.Decision
	for i := range c.parties {
		p := &c.parties[i]
		d := question(p)
		if !d.Allowed() {
			c.refused(subject, p.role, d, d.Reason())
			reason := d.Reason()
			if i > 0 {
				reason = string(p.role) + ": " + reason
			}
			return d, &api.Error{
				Kind: api.Denied, Text: c.op + " " + subject + ": " + reason + " (clause " + number(d.Clause()) + ")", Hint: d.Hint(),
			}
		}
		last = d
	}
	return last, nil
}

// number is that of the clause in docs/SECURITY.md which a decision names.
func number(clause string) string {
	if end := strings.IndexAny(clause, " /"); end >= 0 {
		return clause[:end]
	}
	return clause
}

func (c *call) fields(subject string, d privcheck.Decision) logrus.Fields {
	p := c.r()
	f := logrus.Fields{
		"op": c.op, "target": subject, "clause": d.Clause(),
		"pid": p.cred.PID, "uid": p.cred.UID, "gid": p.cred.GID,
	}
	if p.r.Outside() {
		f["container"] = strings.Join(c.containers(), ",")
	}
	if len(c.parties) > 1 {
		f["peer"] = c.parties[len(c.parties)-1].cred.PID
	}
	return f
}

func (c *call) containers() []string {
	if names, err := c.m.host.Containers(c.r().proc); err == nil {
		return names
	}
	return []string{"unknown"}
}

// Refusals cost who is refused nothing; so many of their audit lines a second
// are written, the rest are counted.
const (
	refusalLines = 50
	refusalBurst = 200
)

// refused writes the audit line of a refusal; who is the party that was not
// entitled.
func (c *call) refused(subject string, who role, d privcheck.Decision, reason string) {
	if !c.m.log.IsLevelEnabled(logrus.WarnLevel) {
		return
	}
	if !c.m.refusals.Allow() {
		c.m.unwritten.Add(1)
		return
	}
	f := c.fields(subject, d)
	f["party"], f["reason"] = who, reason
	if n := c.m.unwritten.Swap(0); n > 0 {
		f["unwritten"] = n
	}
	c.m.log.WithFields(f).Warn("refused")
}

// done notes a change for the audit line.
func (c *call) done(what string, h *cgfs.Hierarchy, d privcheck.Decision) {
	if n := len(c.changes); n > 0 && c.changes[n-1].what == what {
		c.changes[n-1].hierarchies += "," + h.Name()
		return
	}
	c.changes = append(c.changes, change{what: what, hierarchies: h.Name(), decision: d})
}

// kernel turns an error from below into one for the requestor: what was tried
// in its own words, and the kernel's reason.
func (c *call) kernel(subject string, err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	kind, reason := classify(err)
	if kind == api.Internal {
		c.failed(subject, err)
	}
	return &api.Error{Kind: kind, Text: c.op + " " + subject + ": " + reason, Cause: err}
}

// failed writes down what the requestor is not told.
func (c *call) failed(subject string, err error) {
	c.m.log.WithFields(logrus.Fields{"op": c.op, "target": subject}).WithError(err).Error("failed")
}

// classify maps what the kernel and cgfs say to a kind and words.
func classify(err error) (api.Kind, string) {
	var errno unix.Errno
	switch {
	case errors.Is(err, identity.ErrGone):
		return api.NotFound, "no such task"
	case errors.Is(err, cgfs.ErrNoController):
		return api.NotFound, detail(err, "no such controller on this host")
	case errors.Is(err, cgfs.ErrUnsupported):
		return api.Unsupported, detail(err, "not supported on this host")
	case errors.Is(err, cgfs.ErrValue):
		return api.Invalid, detail(err, "invalid value")
	case errors.Is(err, cgfs.ErrName):
		return api.Invalid, detail(err, "invalid name")
	case errors.Is(err, cgfs.ErrTooBig):
		return api.Limit, "the content is too big"
	case errors.As(err, &errno):
		return classifyErrno(errno)
	}
	return api.Internal, "internal error; the daemon's log says more"
}

// detail returns the text of an error of cgfs's own, which speaks of the
// caller's words alone.
func detail(err error, otherwise string) string {
	if _, ok := errors.AsType[unix.Errno](err); ok {
		return otherwise
	}
	return err.Error()
}

func classifyErrno(errno unix.Errno) (api.Kind, string) {
	switch errno {
	case unix.ENOENT, unix.ENODEV, unix.ENOTDIR:
		return api.NotFound, "no such cgroup or file"
	case unix.ESRCH:
		return api.NotFound, "no such task"
	case unix.EEXIST:
		return api.Exists, "it exists already"
	case unix.EBUSY, unix.ENOTEMPTY:
		return api.Busy, "it is in use (tasks or cgroups are left in it, or the kernel refuses for now)"
	case unix.EAGAIN:
		return api.Busy, "the kernel could not do it right now"
	case unix.EACCES, unix.EPERM, unix.EROFS:
		return api.Denied, "the kernel refuses"
	case unix.EINVAL, unix.ERANGE, unix.EOVERFLOW, unix.ENXIO, unix.EIO, unix.ELOOP, unix.EXDEV, unix.ENAMETOOLONG, unix.E2BIG:
		return api.Invalid, "the kernel refuses: " + errno.Error()
	case unix.ENOSPC:
		return api.Limit, "nothing is left to take it from (parent cgroup empty of cpus or memory nodes, or a kernel limit)"
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return api.Unsupported, "the kernel does not support it here"
	case unix.ENOMEM, unix.ENFILE, unix.EMFILE:
		return api.Limit, "out of resources"
	}
	return api.Internal, "internal error; the daemon's log says more"
}
