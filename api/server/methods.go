package server

import (
	"strconv"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// method is a method as the server serves it. One of local, call and pidfd is
// set.
type method struct {
	api.Method
	iface   string
	in, out string // signatures
	// sideOut is the signature of what goes over the side channel.
	sideOut string
	takesFD bool
	// lenient: arguments behind those of the signature are ignored, and what is
	// wrong with the others is told as libdbus does.
	lenient bool
	next    *method // the same name with another signature
	// second is what a call names beside cgroups: by number, or by the second
	// credential of a side channel.
	second second
	local  func(c *conn, m *wire.Message, a *args, out []byte) []byte
	call   func(b api.Backend, rq *api.Request, a *args) (result, error)
	pidfd  func(b api.Backend, rq *api.Request, a *args, fd int) error
}

type second byte

const (
	nobody second = iota
	victim
	owner
)

// result is what a Backend answers; which part of it counts, the method's
// signature says.
type result struct {
	text       string
	names      []string
	existed    api.Existed
	pids       []int32
	keys       []api.Key
	values     map[string]string
	visible    []uint32
	hidden     uint32
	created    bool
	grants     []api.Grant
	properties []property
}

// encode writes r as the method's signature wants it.
func (mt *method) encode(e *wire.Encoder, r *result) {
	switch mt.out {
	case "s":
		e.String(r.text)
	case "i":
		e.Int32(int32(r.existed))
	case "b":
		e.Bool(r.created)
	case "as":
		e.Strings(r.names)
	case "ai":
		e.Array(4, func() {
			for _, p := range r.pids {
				e.Int32(p)
			}
		})
	case "au":
		e.Uint32s(r.visible)
	case "auu":
		e.Uint32s(r.visible)
		e.Uint32(r.hidden)
	case "a{ss}":
		e.Dict(r.values)
	case "a(suuu)":
		e.Array(8, func() {
			for _, k := range r.keys {
				e.Element()
				e.String(k.Name)
				e.Uint32(k.UID)
				e.Uint32(k.GID)
				e.Uint32(k.Mode)
			}
		})
	case "a(uuusixts)":
		e.Array(8, func() {
			for _, g := range r.grants {
				e.Element()
				e.Uint32(g.PID)
				e.Uint32(g.TID)
				e.Uint32(g.UID)
				e.String(g.Policy)
				e.Int32(g.Level)
				e.Int64(g.Since)
				e.Uint64(g.CPU)
				e.String(g.State)
			}
		})
	case "v":
		r.properties[0].write(e)
	case "a{sv}":
		writeProperties(e, r.properties)
	}
}

type backendCall func(b api.Backend, rq *api.Request, a *args) (result, error)

// calls0 are the methods of cgmanager0_0; the side channel form of a method
// makes the same call.
func calls0() map[string]backendCall {
	done := func(err error) (result, error) { return result{}, err }
	text := func(s string, err error) (result, error) { return result{text: s}, err }
	existed := func(e api.Existed, err error) (result, error) { return result{existed: e}, err }
	pids := func(p []int32, err error) (result, error) { return result{pids: p}, err }
	names := func(n []string, err error) (result, error) { return result{names: n}, err }
	return map[string]backendCall{
		"GetPidCgroup": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return text(b.GetPidCgroup0(rq, a.s[0], a.victim))
		},
		"GetPidCgroupAbs": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return text(b.GetPidCgroupAbs0(rq, a.s[0], a.victim))
		},
		"MovePid": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.MovePid0(rq, a.s[0], a.s[1], a.victim))
		},
		"MovePidAbs": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.MovePidAbs0(rq, a.s[0], a.s[1], a.victim))
		},
		"Create": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return existed(b.Create0(rq, a.s[0], a.s[1]))
		},
		"Chown": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Chown0(rq, a.s[0], a.s[1], a.owner))
		},
		"Chmod": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Chmod0(rq, a.s[0], a.s[1], a.s[2], int32(a.n[0])))
		},
		"GetValue": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return text(b.GetValue0(rq, a.s[0], a.s[1], a.s[2]))
		},
		"SetValue": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.SetValue0(rq, a.s[0], a.s[1], a.s[2], a.s[3]))
		},
		"Remove": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return existed(b.Remove0(rq, a.s[0], a.s[1], a.n[0] != 0))
		},
		"GetTasks": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return pids(b.GetTasks0(rq, a.s[0], a.s[1]))
		},
		"GetTasksRecursive": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return pids(b.GetTasksRecursive0(rq, a.s[0], a.s[1]))
		},
		"ListChildren": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return names(b.ListChildren0(rq, a.s[0], a.s[1]))
		},
		"RemoveOnEmpty": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.RemoveOnEmpty0(rq, a.s[0], a.s[1]))
		},
		"Prune": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Prune0(rq, a.s[0], a.s[1]))
		},
		"ListControllers": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			return names(b.ListControllers0(rq))
		},
		"ListKeys": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			keys, err := b.ListKeys0(rq, a.s[0], a.s[1])
			return result{keys: keys}, err
		},
	}
}

// calls1 are the methods of CGManager1 but MoveFd, by name and signature.
func calls1() map[string]backendCall {
	done := func(err error) (result, error) { return result{}, err }
	names := func(n []string, err error) (result, error) { return result{names: n}, err }
	return map[string]backendCall{
		"ListControllers()": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			return names(b.ListControllers(rq, nil))
		},
		"ListControllers(s)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return names(b.ListControllers(rq, &a.s[0]))
		},
		"Create(sasa{ss})": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			created, err := b.Create(rq, a.s[0], a.list, a.dict)
			return result{created: created}, err
		},
		"SetValue(sa{ss})": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.SetValue(rq, a.s[0], a.dict))
		},
		"GetValue(sas)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			values, err := b.GetValue(rq, a.s[0], a.list)
			return result{values: values}, err
		},
		"ListChildren(s)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return names(b.ListChildren(rq, a.s[0]))
		},
		"ListTasks(s)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			pids, hidden, err := b.ListTasks(rq, a.s[0])
			return result{visible: pids, hidden: hidden}, err
		},
		"Chown(suu)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Chown(rq, a.s[0], a.n[0], a.n[1]))
		},
		"Move(su)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Move(rq, a.s[0], a.n[0]))
		},
		"Delete(s)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Delete(rq, a.s[0]))
		},
		"DeleteForce(s)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.DeleteForce(rq, a.s[0]))
		},
		"Kill(s)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Kill(rq, a.s[0]))
		},
		"Delegate(sas)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			path, err := b.Delegate(rq, a.s[0], a.list)
			return result{text: path}, err
		},
		"ActFor()": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			return done(b.ActFor(rq))
		},
		"ListGrants()": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			grants, err := b.ListGrants(rq)
			return result{grants: grants}, err
		},
		"Grant(usi)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Grant(rq, a.n[0], a.s[0], int32(a.n[1])))
		},
		"Revoke(u)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.Revoke(rq, a.n[0]))
		},
		"GrantLimits(u)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			values, err := b.GrantLimits(rq, a.n[0])
			return result{values: values}, err
		},
		"RevokeLimits(u)": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			unreached, err := b.RevokeLimits(rq, a.n[0])
			return result{visible: unreached}, err
		},
	}
}

// methodTable finds methods by interface and name.
type methodTable struct {
	byInterface map[string]map[string]*method
	order       []string          // of interfaces, for a call that names none
	paths       map[string]string // of the objects of interfaces that are not every object's
}

func newMethodTable() methodTable {
	t := methodTable{byInterface: map[string]map[string]*method{}, paths: map[string]string{}}
	c0, c1, rt, std := calls0(), calls1(), callsRealtime(), standardMethods()
	interfaces := append(api.Interfaces(), busInterface())
	for _, i := range interfaces {
		t.order = append(t.order, i.Name)
		t.byInterface[i.Name] = map[string]*method{}
		if i.Path != "" {
			t.paths[i.Name] = i.Path
		}
		for _, am := range i.Methods {
			mt := &method{Method: am, iface: i.Name, in: am.InSignature(), out: am.OutSignature()}
			switch i.Name {
			case api.Interface0:
				mt.bind0(c0, t.byInterface[i.Name])
			case api.Interface1:
				if mt.call = c1[mt.Name+"("+mt.in+")"]; mt.Name == "MoveFd" {
					mt.takesFD, mt.pidfd = true, moveFd
				}
			case api.RealtimeInterface:
				mt.call, mt.lenient = rt[mt.Name], true
			default:
				mt.local = std[i.Name+"."+mt.Name]
			}
			t.add(mt)
		}
	}
	return t
}

func moveFd(b api.Backend, rq *api.Request, a *args, fd int) error {
	return b.MoveFd(rq, a.s[0], fd)
}

// bind0 binds a method of cgmanager0_0 to its call; before holds the methods
// that come before it.
func (mt *method) bind0(calls map[string]backendCall, before map[string]*method) {
	name := mt.Name
	if mt.Scm {
		name = name[:len(name)-len("Scm")]
		mt.takesFD, mt.sideOut = true, before[name].out
	}
	switch name {
	case "Ping":
		mt.local = func(c *conn, m *wire.Message, _ *args, out []byte) []byte { return c.empty(out, m) }
	case "GetPidCgroup", "GetPidCgroupAbs", "MovePid", "MovePidAbs":
		mt.second = victim
	case "Chown":
		mt.second = owner
	}
	mt.call = calls[name]
}

func (t *methodTable) add(mt *method) {
	byName := t.byInterface[mt.iface]
	if first := byName[mt.Name]; first != nil {
		for first.next != nil {
			first = first.next
		}
		first.next = mt
		return
	}
	byName[mt.Name] = mt
}

// find returns the method that m calls: the one of that name whose signature
// fits, or else one whose does not, or nil. A call need not name an interface
// (D-Bus specification, "Message Types"); the first one in order that has a
// fitting method serves it.
func (t *methodTable) find(m *wire.Message) *method {
	if m.Interface != nil {
		byName := t.byInterface[string(m.Interface)]
		if byName == nil || !t.servedAt(string(m.Interface), string(m.Path)) {
			return nil
		}
		return byName[string(m.Member)].fitting(m)
	}
	var some *method
	for _, iface := range t.order {
		if !t.servedAt(iface, string(m.Path)) {
			continue
		}
		mt := t.byInterface[iface][string(m.Member)].fitting(m)
		if mt != nil && mt.in == string(m.Signature) {
			return mt
		}
		if some == nil {
			some = mt
		}
	}
	return some
}

// fitting returns the overload of mt whose signature is m's, or mt.
func (mt *method) fitting(m *wire.Message) *method {
	for o := mt; o != nil; o = o.next {
		if o.in == string(m.Signature) {
			return o
		}
	}
	return mt
}

// servedAt reports whether the object at path has the interface, if there is one
// of the name.
func (t *methodTable) servedAt(iface, path string) bool {
	object, ok := t.paths[iface]
	return !ok || object == path
}

func unknownMethod(m *wire.Message) string {
	return clip("Method " + quote(string(m.Member)) + " with signature " + quote(string(m.Signature)) +
		" on interface " + quote(string(m.Interface)) + " doesn't exist")
}

func quote(s string) string { return strconv.Quote(s) }
