package manager

import (
	"slices"

	"cgmanager/api"
	"cgmanager/cgfs"
	"cgmanager/manager/identity"
	"cgmanager/privcheck"
)

// link is one of those through whom a request comes: the opener of a connection,
// or somebody for whom the opener acts.
type link struct {
	cred api.Cred
	proc *identity.Process
}

// links returns the chain of a connection, from its opener inwards. The last is
// a client; those before it are the proxies between.
func (p *peer) links() []link {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clip(p.chain)
}

// ActFor implements api.CGManager1. The handle that it opens stays with the
// connection: the proxy, which has one of its own, makes sure after the answer
// that the number did not become somebody else's in between.
func (m *Manager) ActFor(rq *api.Request) error {
	p, ok := rq.Peer.(*peer)
	if !ok {
		return api.Errorf(api.Internal, "ActFor: unknown peer")
	}
	c := &call{m: m, op: "ActFor"}
	links := p.links()
	if len(links) > api.MaxHops {
		return api.Errorf(api.Limit, "ActFor: more than %d proxies in a row", api.MaxHops)
	}
	proc, err := identity.Open(rq.Sender.PID, -1)
	if err != nil {
		return c.unknown(requestor, err)
	}
	// As SO_PEERCRED, its ids are those that it has at this moment.
	r, err := m.host.Requestor(proc, rq.Sender.UID, rq.Sender.GID, false)
	if err == nil && !proc.Alive() {
		err = identity.ErrGone
	}
	if err != nil {
		proc.Close()
		return c.unknown(requestor, err)
	}
	around := links[len(links)-1]
	c.parties = []party{{role: requestor, cred: rq.Sender, proc: proc, r: r}, {role: proxy, cred: around.cred, proc: around.proc}}
	c.proxies = 1
	if err := c.nested(); err != nil {
		proc.Close()
		return err
	}
	p.mu.Lock()
	p.chain = append(p.chain, link{rq.Sender, proc})
	p.mu.Unlock()
	return nil
}

// behind returns the parties that act for others, those of the innermost proxy
// first: all but the requestor, or, of a proxy that acts for itself, the
// requestor; none where there is no proxy.
func (c *call) behind() []party {
	if c.proxies < 0 {
		return nil
	}
	return c.parties[c.proxies:]
}

// nested refuses proxies that do not enclose those for whom they act: the user
// and pid namespaces of each must lie within those of the ones outside it.
func (c *call) nested() error {
	if c.proxies < 0 {
		return nil
	}
	// Read once for each: others choose how long the chain is, and how deep the
	// namespaces are.
	all := make([]identity.Nesting, len(c.parties))
	for i := range c.parties {
		p := &c.parties[i]
		var err error
		if all[i], err = c.m.host.Nesting(p.proc); err != nil {
			return c.unknown(p.role, err)
		}
		for j := range i {
			if i >= c.proxies && !all[i].Encloses(all[j]) {
				c.refused("", p.role, privcheck.Decision{}, "the requestor's namespaces do not lie within the proxy's")
				return api.Errorf(api.Denied, "%s: the requestor's namespaces do not lie within the proxy's", c.op)
			}
		}
	}
	return nil
}

// home tells of each of those for whom the innermost proxy acts whether that one is
// in its own container.
func (c *call) home() ([]bool, error) {
	root := &c.parties[c.root]
	around, err := c.m.host.Nesting(root.proc)
	if err != nil {
		return nil, c.unknown(root.role, err)
	}
	home := make([]bool, max(c.proxies, 1))
	for i := range home {
		p := &c.parties[i]
		own, err := c.m.host.Nesting(p.proc)
		if err != nil {
			return nil, c.unknown(p.role, err)
		}
		home[i] = own.Encloses(around) // and lies within it: see nested
	}
	return home, nil
}

// nestedIn is nested for the cgroups in h of a chain of ActFor: what the
// innermost may do is only confined if they enclose each other too.
func (c *call) nestedIn(h *cgfs.Hierarchy, subject string) error {
	for i := max(c.proxies, 1); c.chained && i < len(c.parties); i++ {
		outer, inner := c.parties[i].own(h), c.parties[i-1].own(h)
		if !privcheck.Below(outer, inner) {
			c.refused(subject, c.parties[i].role, privcheck.Decision{}, "the requestor's cgroup does not lie within the proxy's")
			return api.Errorf(api.Denied, "%s %s: your cgroup does not lie within that of the proxy that asks for you", c.op, subject).
				WithHint("start cgproxy in the outermost cgroup of its container")
		}
	}
	return nil
}
