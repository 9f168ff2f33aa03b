package proxy

import "cgmanager/api"

// call1 makes a call of CGManager1.
func (p *Proxy) call1(rq *api.Request, name string, fd int, args ...any) (answer, error) {
	return p.forward(rq, api.ObjectPath, api.Interface1, name, fd, args)
}

// forward makes a call that the original daemon does not know, which goes down as
// it is.
func (p *Proxy) forward(rq *api.Request, path, iface, name string, fd int, args arguments) (a answer, err error) {
	c, err := p.take(name, rq)
	if err != nil {
		return a, err
	}
	defer c.release()
	m := method(iface, name, args.signature())
	err = c.try(name, m.Changes, func(l *lower) error {
		if l.original {
			return api.Errorf(api.Unsupported, "the daemon below the proxy is the original cgmanager, which knows %s alone", api.Interface0)
		}
		a, err = l.ask(c, rq, path, iface, m, args, fd)
		return err
	})
	return a, err
}

// ListControllers implements api.CGManager1.
func (p *Proxy) ListControllers(rq *api.Request, name *string) ([]string, error) {
	var args []any
	if name != nil {
		args = []any{*name}
	}
	a, err := p.call1(rq, "ListControllers", -1, args...)
	return a.names, err
}

// Create implements api.CGManager1.
func (p *Proxy) Create(rq *api.Request, name string, controllers []string, values map[string]string) (bool, error) {
	a, err := p.call1(rq, "Create", -1, name, controllers, values)
	return a.created, err
}

// SetValue implements api.CGManager1.
func (p *Proxy) SetValue(rq *api.Request, name string, values map[string]string) error {
	_, err := p.call1(rq, "SetValue", -1, name, values)
	return err
}

// GetValue implements api.CGManager1.
func (p *Proxy) GetValue(rq *api.Request, name string, keys []string) (map[string]string, error) {
	a, err := p.call1(rq, "GetValue", -1, name, keys)
	return a.values, err
}

// ListChildren implements api.CGManager1.
func (p *Proxy) ListChildren(rq *api.Request, name string) ([]string, error) {
	a, err := p.call1(rq, "ListChildren", -1, name)
	return a.names, err
}

// ListTasks implements api.CGManager1.
func (p *Proxy) ListTasks(rq *api.Request, name string) (pids []uint32, hidden uint32, err error) {
	a, err := p.call1(rq, "ListTasks", -1, name)
	return a.visible, a.hidden, err
}

// Chown implements api.CGManager1.
func (p *Proxy) Chown(rq *api.Request, name string, uid, gid uint32) error {
	_, err := p.call1(rq, "Chown", -1, name, uid, gid)
	return err
}

// Move implements api.CGManager1.
func (p *Proxy) Move(rq *api.Request, name string, pid uint32) error {
	_, err := p.call1(rq, "Move", -1, name, pid)
	return err
}

// MoveFd implements api.CGManager1.
func (p *Proxy) MoveFd(rq *api.Request, name string, pidfd int) error {
	_, err := p.call1(rq, "MoveFd", pidfd, name, handle0{})
	return err
}

// Delete implements api.CGManager1.
func (p *Proxy) Delete(rq *api.Request, name string) error {
	_, err := p.call1(rq, "Delete", -1, name)
	return err
}

// DeleteForce implements api.CGManager1.
func (p *Proxy) DeleteForce(rq *api.Request, name string) error {
	_, err := p.call1(rq, "DeleteForce", -1, name)
	return err
}

// Kill implements api.CGManager1.
func (p *Proxy) Kill(rq *api.Request, name string) error {
	_, err := p.call1(rq, "Kill", -1, name)
	return err
}

// Delegate implements api.CGManager1.
func (p *Proxy) Delegate(rq *api.Request, name string, controllers []string) (string, error) {
	a, err := p.call1(rq, "Delegate", -1, name, controllers)
	return a.text, err
}
