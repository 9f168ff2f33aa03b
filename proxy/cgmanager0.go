package proxy

import (
	"slices"
	"strings"

	"cgmanager/api"
)

// legacy is a call of cgmanager0_0. It goes down as it is, or, for somebody else
// or below the original daemon, by a side channel.
type legacy struct {
	name string
	args arguments // without the numbers of a victim or an owner
	// One of these may be set.
	victim *api.Victim
	owner  *api.Owner
}

// numbered returns all arguments of the plain form.
func (g *legacy) numbered() arguments {
	args := slices.Clip(g.args)
	switch {
	case g.victim != nil:
		args = append(args, int32(g.victim.PID))
	case g.owner != nil:
		args = append(args, int32(g.owner.UID), int32(g.owner.GID))
	}
	return args
}

// call0 makes the call.
func (p *Proxy) call0(rq *api.Request, g legacy) (a answer, err error) {
	c, err := p.take(g.name, rq)
	if err != nil {
		return a, err
	}
	defer c.release()
	args := g.numbered()
	m := method(api.Interface0, g.name, args.signature())
	err = c.try(g.name, m.Changes, func(l *lower) error {
		if rq.For == nil && (!l.original || g.name == "ListControllers") {
			a, err = l.ask(c, rq, api.ObjectPath, api.Interface0, m, args, -1)
			return err
		}
		creds, err := c.sideCreds(l, rq, &g)
		if err != nil {
			return err
		}
		a, err = l.exchange(c, rq, &g, m.OutSignature(), creds)
		return err
	})
	return a, err
}

// sideCreds returns the credentials that the call takes by its side channel.
func (c *peer) sideCreds(l *lower, rq *api.Request, g *legacy) ([]api.Cred, error) {
	if l.original && rq.Sender.PID != c.hops[0].cred.PID {
		// It would judge the sender alone; and numbers are translated by the
		// opener's namespaces.
		return nil, api.Errorf(api.Unsupported, "another process opened this connection, and the daemon below the proxy is the original cgmanager, which serves a connection's opener alone").
			WithHint("open a connection of your own")
	}
	if rq.For != nil {
		if l.original && (!c.facts.samePIDs || !c.facts.sameUsers) {
			// It would judge the requestor and this proxy, and nobody between.
			return nil, api.Errorf(api.Unsupported, "the daemon below the proxy is the original cgmanager, which serves no proxy behind a proxy").
				WithHint("run this project's cgmanager on the host")
		}
		creds := []api.Cred{*rq.For}
		switch {
		case g.victim != nil:
			creds = append(creds, *g.victim.Cred)
		case g.owner != nil:
			creds = append(creds, api.Cred{PID: rq.For.PID, UID: g.owner.UID, GID: g.owner.GID})
		}
		return creds, nil
	}
	creds := []api.Cred{rq.Sender}
	if (g.victim != nil || strings.HasPrefix(g.name, "GetTasks")) && !c.facts.samePIDs {
		return nil, api.Errorf(api.Unsupported, "you are in another pid namespace than the proxy, and the original cgmanager below it knows no numbers but the proxy's").
			WithHint("start a cgproxy in your own container, below this project's cgmanager")
	}
	switch {
	case g.victim != nil:
		if g.victim.PID <= 0 || g.victim.PID > 1<<31-1 {
			return nil, api.Errorf(api.NotFound, "no process %d", g.victim.PID)
		}
		creds = append(creds, ownCred(int32(g.victim.PID)))
	case g.owner != nil:
		uid, gid, err := c.outerIDs(*g.owner)
		if err != nil {
			return nil, err
		}
		creds = append(creds, api.Cred{PID: rq.Sender.PID, UID: uid, GID: gid})
	}
	return creds, nil
}

// outerIDs returns a new owner in the proxy's own numbers.
func (c *peer) outerIDs(o api.Owner) (uid, gid uint32, err error) {
	if o.UID == api.NoID || o.GID == api.NoID {
		return 0, 0, api.Errorf(api.Unsupported, "the original cgmanager, which is below the proxy, changes both ids at once").
			WithHint("name the uid and the gid")
	}
	if c.facts.sameUsers {
		return o.UID, o.GID, nil
	}
	uid, ok := c.facts.uids.outer(o.UID)
	gid, ok2 := c.facts.gids.outer(o.GID)
	if !ok || !ok2 {
		return 0, 0, api.Errorf(api.Denied, "%d:%d: not mapped in your user namespace", o.UID, o.GID)
	}
	return uid, gid, nil
}

// GetPidCgroup0 implements api.CGManager0.
func (p *Proxy) GetPidCgroup0(rq *api.Request, controller string, v api.Victim) (string, error) {
	a, err := p.call0(rq, legacy{name: "GetPidCgroup", args: arguments{controller}, victim: &v})
	return a.text, err
}

// GetPidCgroupAbs0 implements api.CGManager0.
func (p *Proxy) GetPidCgroupAbs0(rq *api.Request, controller string, v api.Victim) (string, error) {
	a, err := p.call0(rq, legacy{name: "GetPidCgroupAbs", args: arguments{controller}, victim: &v})
	return a.text, err
}

// MovePid0 implements api.CGManager0.
func (p *Proxy) MovePid0(rq *api.Request, controller, cgroup string, v api.Victim) error {
	_, err := p.call0(rq, legacy{name: "MovePid", args: arguments{controller, cgroup}, victim: &v})
	return err
}

// MovePidAbs0 implements api.CGManager0.
func (p *Proxy) MovePidAbs0(rq *api.Request, controller, cgroup string, v api.Victim) error {
	_, err := p.call0(rq, legacy{name: "MovePidAbs", args: arguments{controller, cgroup}, victim: &v})
	return err
}

// Create0 implements api.CGManager0.
func (p *Proxy) Create0(rq *api.Request, controller, cgroup string) (api.Existed, error) {
	a, err := p.call0(rq, legacy{name: "Create", args: arguments{controller, cgroup}})
	return api.Existed(a.number), err
}

// Chown0 implements api.CGManager0.
func (p *Proxy) Chown0(rq *api.Request, controller, cgroup string, owner api.Owner) error {
	_, err := p.call0(rq, legacy{name: "Chown", args: arguments{controller, cgroup}, owner: &owner})
	return err
}

// Chmod0 implements api.CGManager0.
func (p *Proxy) Chmod0(rq *api.Request, controller, cgroup, file string, mode int32) error {
	_, err := p.call0(rq, legacy{name: "Chmod", args: arguments{controller, cgroup, file, mode}})
	return err
}

// GetValue0 implements api.CGManager0.
func (p *Proxy) GetValue0(rq *api.Request, controller, cgroup, key string) (string, error) {
	a, err := p.call0(rq, legacy{name: "GetValue", args: arguments{controller, cgroup, key}})
	return a.text, err
}

// SetValue0 implements api.CGManager0.
func (p *Proxy) SetValue0(rq *api.Request, controller, cgroup, key, value string) error {
	_, err := p.call0(rq, legacy{name: "SetValue", args: arguments{controller, cgroup, key, value}})
	return err
}

// Remove0 implements api.CGManager0.
func (p *Proxy) Remove0(rq *api.Request, controller, cgroup string, recursive bool) (api.Existed, error) {
	var r int32
	if recursive {
		r = 1
	}
	a, err := p.call0(rq, legacy{name: "Remove", args: arguments{controller, cgroup, r}})
	return api.Existed(a.number), err
}

// GetTasks0 implements api.CGManager0.
func (p *Proxy) GetTasks0(rq *api.Request, controller, cgroup string) ([]int32, error) {
	a, err := p.call0(rq, legacy{name: "GetTasks", args: arguments{controller, cgroup}})
	return a.pids, err
}

// GetTasksRecursive0 implements api.CGManager0.
func (p *Proxy) GetTasksRecursive0(rq *api.Request, controller, cgroup string) ([]int32, error) {
	a, err := p.call0(rq, legacy{name: "GetTasksRecursive", args: arguments{controller, cgroup}})
	return a.pids, err
}

// ListChildren0 implements api.CGManager0.
func (p *Proxy) ListChildren0(rq *api.Request, controller, cgroup string) ([]string, error) {
	a, err := p.call0(rq, legacy{name: "ListChildren", args: arguments{controller, cgroup}})
	return a.names, err
}

// RemoveOnEmpty0 implements api.CGManager0.
func (p *Proxy) RemoveOnEmpty0(rq *api.Request, controller, cgroup string) error {
	_, err := p.call0(rq, legacy{name: "RemoveOnEmpty", args: arguments{controller, cgroup}})
	return err
}

// Prune0 implements api.CGManager0.
func (p *Proxy) Prune0(rq *api.Request, controller, cgroup string) error {
	_, err := p.call0(rq, legacy{name: "Prune", args: arguments{controller, cgroup}})
	return err
}

// ListControllers0 implements api.CGManager0.
func (p *Proxy) ListControllers0(rq *api.Request) ([]string, error) {
	a, err := p.call0(rq, legacy{name: "ListControllers"})
	return a.names, err
}

// ListKeys0 implements api.CGManager0.
func (p *Proxy) ListKeys0(rq *api.Request, controller, cgroup string) ([]api.Key, error) {
	a, err := p.call0(rq, legacy{name: "ListKeys", args: arguments{controller, cgroup}})
	return a.keys, err
}
