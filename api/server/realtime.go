package server

import (
	"cgmanager/api"
	"cgmanager/api/wire"
)

// callsRealtime are the methods of RealtimeKit1.
func callsRealtime() map[string]backendCall {
	done := func(err error) (result, error) { return result{}, err }
	return map[string]backendCall{
		"MakeThreadRealtime": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.MakeThreadRealtime(rq, api.Thread{Own: true, ID: a.t[0]}, a.n[0]))
		},
		"MakeThreadRealtimeWithPID": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.MakeThreadRealtime(rq, api.Thread{Process: a.t[0], ID: a.t[1]}, a.n[0]))
		},
		"MakeThreadHighPriority": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.MakeThreadHighPriority(rq, api.Thread{Own: true, ID: a.t[0]}, int32(a.n[0])))
		},
		"MakeThreadHighPriorityWithPID": func(b api.Backend, rq *api.Request, a *args) (result, error) {
			return done(b.MakeThreadHighPriority(rq, api.Thread{Process: a.t[0], ID: a.t[1]}, int32(a.n[0])))
		},
		"ResetKnown": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			return done(b.ResetKnown(rq))
		},
		"ResetAll": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			return done(b.ResetAll(rq))
		},
		"Exit": func(b api.Backend, rq *api.Request, _ *args) (result, error) {
			return done(b.Exit(rq))
		},
	}
}

// realtimeProperties are the properties of RealtimeKit1 with the values.
func realtimeProperties(v api.RealtimeProperties) (all []property) {
	for _, p := range wire.RealtimeProperties(v) {
		all = append(all, property{api.RealtimeInterface, p.Name, p.Write})
	}
	return all
}

// The methods of Properties at the object of RealtimeKit1, where the Backend is
// asked. What is there is known by then.
var (
	getRealtimeProperty   = &method{Method: api.Method{Name: "Get"}, iface: api.RealtimeInterface, out: "v", call: askProperties}
	getRealtimeProperties = &method{Method: api.Method{Name: "GetAll"}, iface: api.RealtimeInterface, out: "a{sv}", call: askProperties}
)

// askProperties returns the property that is asked for, or all.
func askProperties(b api.Backend, rq *api.Request, a *args) (r result, err error) {
	values, err := b.RealtimeProperties(rq)
	for _, p := range realtimeProperties(values) {
		if a.s[1] == "" || a.s[1] == p.name {
			r.properties = append(r.properties, p)
		}
	}
	return r, err
}
