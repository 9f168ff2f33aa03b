package server

import (
	"slices"
	"strconv"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// busName is the interface of a message bus. There is none here, but clients
// that cannot do without (busctl, dbus-send --bus, bindings) ask a few things
// of one when they log in.
const busName = "org.freedesktop.DBus"

func busInterface() api.Interface {
	str := func(name string) []api.Arg { return []api.Arg{{Name: name, Type: "s"}} }
	return api.Interface{Name: busName, Methods: []api.Method{
		{Name: "Hello", Out: str("unique_name")},
		{Name: "AddMatch", In: str("rule")},
		{Name: "RemoveMatch", In: str("rule")},
		{Name: "GetNameOwner", In: str("name"), Out: str("unique_name")},
		{Name: "NameHasOwner", In: str("name"), Out: []api.Arg{{Name: "has_owner", Type: "b"}}},
		{Name: "ListNames", Out: []api.Arg{{Name: "names", Type: "as"}}},
		{Name: "GetId", Out: str("id")},
	}}
}

// names are the bus names that the daemon is said to own.
var names = []string{busName, api.BusName, api.Interface1, api.RealtimeInterface}

type localMethod = func(c *conn, m *wire.Message, a *args, out []byte) []byte

// standardMethods are the methods that need no Backend, by their full names.
func standardMethods() map[string]localMethod {
	empty := func(c *conn, m *wire.Message, _ *args, out []byte) []byte { return c.empty(out, m) }
	id := func(c *conn, m *wire.Message, _ *args, out []byte) []byte { return c.text(out, m, c.s.guid) }
	return map[string]localMethod{
		"org.freedesktop.DBus.Peer.Ping":                 empty,
		"org.freedesktop.DBus.Peer.GetMachineId":         id,
		"org.freedesktop.DBus.Properties.Get":            getProperty,
		"org.freedesktop.DBus.Properties.GetAll":         getProperties,
		"org.freedesktop.DBus.Properties.Set":            setProperty,
		"org.freedesktop.DBus.Introspectable.Introspect": introspect,
		busName + ".Hello": func(c *conn, m *wire.Message, _ *args, out []byte) []byte {
			return c.text(out, m, ":1."+strconv.FormatUint(c.id, 10))
		},
		busName + ".AddMatch":     empty,
		busName + ".RemoveMatch":  empty,
		busName + ".GetNameOwner": getNameOwner,
		busName + ".NameHasOwner": func(c *conn, m *wire.Message, a *args, out []byte) []byte {
			return c.answer(out, m, "b", func(e *wire.Encoder) { e.Bool(slices.Contains(names, a.s[0])) })
		},
		busName + ".ListNames": func(c *conn, m *wire.Message, _ *args, out []byte) []byte {
			return c.answer(out, m, "as", func(e *wire.Encoder) { e.Strings(names) })
		},
		busName + ".GetId": id,
	}
}

// text answers with a string.
func (c *conn) text(out []byte, m *wire.Message, s string) []byte {
	return c.answer(out, m, "s", func(e *wire.Encoder) { e.String(s) })
}

func getNameOwner(c *conn, m *wire.Message, a *args, out []byte) []byte {
	switch {
	case a.s[0] == busName:
		return c.text(out, m, busName)
	case slices.Contains(names, a.s[0]):
		return c.text(out, m, ":1.0")
	}
	return c.fail(out, m, nameNoOwner, clip("Name "+quote(a.s[0])+" has no owner"))
}

func introspect(c *conn, m *wire.Message, _ *args, out []byte) []byte {
	xml, ok := api.Introspect(string(m.Path))
	if !ok {
		return c.fail(out, m, nameUnknownMethod, unknownMethod(m))
	}
	return c.text(out, m, xml)
}

// property is a property's value, written as a variant.
type property struct {
	iface, name string
	write       func(e *wire.Encoder)
}

// properties returns those of the object at path that have the interface's
// name, or all for "", and whether there is such an interface.
func (s *Server) properties(path, iface string) (found []property, ok bool) {
	all := append(realtimeProperties(api.RealtimeProperties{}), []property{
		{api.Interface0, "api_version", func(e *wire.Encoder) {
			e.VariantSignature("i")
			e.Int32(api.Version0)
		}},
		{api.Interface1, "Version", func(e *wire.Encoder) {
			e.VariantSignature("s")
			e.String(s.version)
		}},
	}...)
	for _, p := range all {
		if s.methods.servedAt(p.iface, path) && (iface == "" || iface == p.iface) {
			found = append(found, p)
		}
	}
	_, ok = s.methods.byInterface[iface]
	return found, ok && s.methods.servedAt(iface, path) || iface == ""
}

func (s *Server) property(path, iface, name string) (property, bool) {
	found, _ := s.properties(path, iface)
	for _, p := range found {
		if p.name == name {
			return p, true
		}
	}
	return property{}, false
}

// noProperty answers that there is no property of the name, or no interface: as
// the original daemon, or rtkit.
func (c *conn) noProperty(out []byte, m *wire.Message, a *args) []byte {
	switch {
	case string(m.Path) != api.RealtimePath:
		return c.fail(out, m, nameUnknownMethod, unknownMethod(m))
	case a.s[0] == "" || a.s[0] == api.RealtimeInterface:
		return c.fail(out, m, nameNoProperty, clip("Unknown property "+a.s[1]))
	}
	return c.fail(out, m, nameNoProperty, clip("Unknown interface "+a.s[0]))
}

func getProperty(c *conn, m *wire.Message, a *args, out []byte) []byte {
	p, ok := c.s.property(string(m.Path), a.s[0], a.s[1])
	switch {
	case !ok:
		return c.noProperty(out, m, a)
	case p.iface == api.RealtimeInterface:
		return c.submit(getRealtimeProperty, m, a, -1, out)
	}
	return c.answer(out, m, "v", p.write)
}

func getProperties(c *conn, m *wire.Message, a *args, out []byte) []byte {
	found, ok := c.s.properties(string(m.Path), a.s[0])
	switch {
	case !ok:
		return c.noProperty(out, m, a)
	case len(found) > 0 && found[0].iface == api.RealtimeInterface:
		return c.submit(getRealtimeProperties, m, a, -1, out)
	}
	return c.answer(out, m, "a{sv}", func(e *wire.Encoder) { writeProperties(e, found) })
}

// writeProperties writes an a{sv}.
func writeProperties(e *wire.Encoder, ps []property) {
	e.Array(8, func() {
		for _, p := range ps {
			e.Element()
			e.String(p.name)
			p.write(e)
		}
	})
}

func setProperty(c *conn, m *wire.Message, a *args, out []byte) []byte {
	if _, ok := c.s.property(string(m.Path), a.s[0], a.s[1]); !ok {
		return c.noProperty(out, m, a)
	}
	return c.fail(out, m, nameAccessDenied, "The "+a.s[1]+" property is read-only")
}
