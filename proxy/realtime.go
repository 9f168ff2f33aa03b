package proxy

import "cgmanager/api"

// realtime makes a call of RealtimeKit1. The numbers of processes and threads are
// those of the requestor, whom the daemon below is told of.
func (p *Proxy) realtime(rq *api.Request, name string, args ...any) error {
	_, err := p.forward(rq, api.RealtimePath, api.RealtimeInterface, name, -1, args)
	return err
}

// makeThread makes the call of the name, or the one that names the process too.
func (p *Proxy) makeThread(rq *api.Request, name string, t api.Thread, level any) error {
	if t.Own {
		return p.realtime(rq, name, t.ID, level)
	}
	return p.realtime(rq, name+"WithPID", t.Process, t.ID, level)
}

// RealtimeRefused implements api.RealtimeKit1: the daemon below says it when it is
// asked for something.
func (p *Proxy) RealtimeRefused(*api.Request) error { return nil }

// MakeThreadRealtime implements api.RealtimeKit1.
func (p *Proxy) MakeThreadRealtime(rq *api.Request, t api.Thread, priority uint32) error {
	return p.makeThread(rq, "MakeThreadRealtime", t, priority)
}

// MakeThreadHighPriority implements api.RealtimeKit1.
func (p *Proxy) MakeThreadHighPriority(rq *api.Request, t api.Thread, nice int32) error {
	return p.makeThread(rq, "MakeThreadHighPriority", t, nice)
}

// ResetKnown implements api.RealtimeKit1.
func (p *Proxy) ResetKnown(rq *api.Request) error { return p.realtime(rq, "ResetKnown") }

// ResetAll implements api.RealtimeKit1.
func (p *Proxy) ResetAll(rq *api.Request) error { return p.realtime(rq, "ResetAll") }

// Exit implements api.RealtimeKit1.
func (p *Proxy) Exit(rq *api.Request) error { return p.realtime(rq, "Exit") }

// RealtimeProperties implements api.RealtimeKit1.
func (p *Proxy) RealtimeProperties(rq *api.Request) (api.RealtimeProperties, error) {
	a, err := p.forward(rq, api.RealtimePath, properties, "GetAll", -1, arguments{api.RealtimeInterface})
	return a.realtime, err
}

// ListGrants implements api.CGManager1.
func (p *Proxy) ListGrants(rq *api.Request) ([]api.Grant, error) {
	a, err := p.call1(rq, "ListGrants", -1)
	return a.grants, err
}

// Grant implements api.CGManager1.
func (p *Proxy) Grant(rq *api.Request, thread uint32, policy string, level int32) error {
	_, err := p.call1(rq, "Grant", -1, thread, policy, level)
	return err
}

// Revoke implements api.CGManager1.
func (p *Proxy) Revoke(rq *api.Request, thread uint32) error {
	_, err := p.call1(rq, "Revoke", -1, thread)
	return err
}

// GrantLimits implements api.CGManager1.
func (p *Proxy) GrantLimits(rq *api.Request, pid uint32) (map[string]string, error) {
	a, err := p.call1(rq, "GrantLimits", -1, pid)
	return a.values, err
}

// RevokeLimits implements api.CGManager1.
func (p *Proxy) RevokeLimits(rq *api.Request, pid uint32) ([]uint32, error) {
	a, err := p.call1(rq, "RevokeLimits", -1, pid)
	return a.visible, err
}
