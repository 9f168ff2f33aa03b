package manager

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

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
