package bus

import (
	"context"
	"slices"
	"strconv"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// D-Bus error names of the bus's own, beside those of api.
const (
	errorInvalidArgs     = "org.freedesktop.DBus.Error.InvalidArgs"
	errorUnknownProperty = "org.freedesktop.DBus.Error.UnknownProperty"
	errorAccessDenied    = "org.freedesktop.DBus.Error.AccessDenied"
	errorLimits          = "org.freedesktop.DBus.Error.LimitsExceeded"
)

// The interfaces that are there beside RealtimeKit1: every object has the first
// two.
const (
	peerInterface       = busName + ".Peer"
	introspectInterface = busName + ".Introspectable"
	propertiesInterface = busName + ".Properties"
)

// request is a call that came over the bus.
type request struct {
	s      *session
	m      *wire.Message
	iface  string      // of method
	method *api.Method // nil if there is none
}

// find looks for the method that is called. A call need not name an interface.
func (r *request) find() {
	for _, i := range api.Interfaces() {
		switch i.Name {
		case peerInterface, introspectInterface:
		case api.RealtimeInterface, propertiesInterface:
			if string(r.m.Path) != api.RealtimePath {
				continue
			}
		default:
			continue
		}
		if r.m.Interface != nil && string(r.m.Interface) != i.Name {
			continue
		}
		at := slices.IndexFunc(i.Methods, func(m api.Method) bool { return m.Name == string(r.m.Member) })
		if at >= 0 {
			r.iface, r.method = i.Name, &i.Methods[at]
			return
		}
	}
}

// local answers what needs no Backend, and reports whether that was it.
func (r *request) local() bool {
	switch r.iface + "." + r.method.Name {
	case peerInterface + ".Ping":
		r.reply("", nil)
	case introspectInterface + ".Introspect":
		if xml, ok := api.Introspect(string(r.m.Path), api.RealtimePath); ok {
			r.reply("s", func(e *wire.Encoder) { e.String(xml) })
		} else {
			r.unknown()
		}
	default:
		return false
	}
	return true
}

// machineID answers what the bus, on the same machine, answers.
func (r *request) machineID() {
	h := toBus("GetMachineId", "")
	h.Interface = peerInterface
	got, err := r.s.conn.ask(context.Background(), h, nil)
	if err != nil || got.sig != "s" {
		r.refuse(api.AsError(err))
		return
	}
	id := got.String()
	r.reply("s", func(e *wire.Encoder) { e.String(id) })
}

// answer asks the Backend, for whom rq names.
func (r *request) answer(rq *api.Request) {
	var err error
	switch r.iface {
	case peerInterface:
		r.machineID()
	case propertiesInterface:
		err = r.property(rq)
	default:
		if err = r.realtime(rq); err == nil {
			r.reply("", nil)
		}
	}
	if err != nil {
		r.refuse(err)
	}
}

// arguments returns a decoder of arguments of the method's types.
func (r *request) arguments() (d wire.Decoder, err error) {
	if wrong := wire.WrongArguments(r.method.In, string(r.m.Signature)); wrong != "" {
		return d, wrong
	}
	return wire.NewDecoder(string(r.m.Body), r.m.BigEndian), nil
}

// realtime makes a call of RealtimeKit1.
func (r *request) realtime(rq *api.Request) (err error) {
	b := r.s.Backend
	defer r.s.recovered(&err)
	switch r.method.Name {
	case "ResetKnown":
		return b.ResetKnown(rq)
	case "ResetAll":
		return b.ResetAll(rq)
	case "Exit":
		return b.Exit(rq)
	}
	// Whom rtkit refuses for now it refuses before it looks at arguments.
	if err := b.RealtimeRefused(rq); err != nil {
		return err
	}
	d, err := r.arguments()
	if err != nil {
		return err
	}
	t := api.Thread{Own: len(r.method.In) == 2}
	if !t.Own {
		t.Process = d.Uint64()
	}
	t.ID = d.Uint64()
	level := d.Uint32()
	d.Skip(string(r.m.Signature[len(r.method.In):]))
	if err := d.Close(); err != nil {
		return wire.ArgumentError(err.Error())
	}
	switch r.method.Name {
	case "MakeThreadRealtime", "MakeThreadRealtimeWithPID":
		return b.MakeThreadRealtime(rq, t, level)
	}
	return b.MakeThreadHighPriority(rq, t, int32(level))
}

// property answers Get, GetAll and Set.
func (r *request) property(rq *api.Request) (err error) {
	defer r.s.recovered(&err)
	d, err := r.arguments()
	if err != nil {
		return err
	}
	var iface, name string
	if iface = d.String(); r.method.Name != "GetAll" {
		name = d.String()
	}
	if iface != "" && iface != api.RealtimeInterface {
		r.fail(errorUnknownProperty, "Unknown interface "+iface)
		return nil
	}
	values, err := r.s.Backend.RealtimeProperties(rq)
	if err != nil {
		return err
	}
	all := wire.RealtimeProperties(values)
	if r.method.Name == "GetAll" {
		r.reply("a{sv}", func(e *wire.Encoder) {
			e.Array(8, func() {
				for _, p := range all {
					e.Element()
					e.String(p.Name)
					p.Write(e)
				}
			})
		})
		return nil
	}
	for _, p := range all {
		if p.Name != name {
			continue
		}
		if r.method.Name == "Set" {
			r.fail(errorAccessDenied, "The "+name+" property is read-only")
		} else {
			r.reply("v", p.Write)
		}
		return nil
	}
	r.fail(errorUnknownProperty, "Unknown property "+name)
	return nil
}

// reply answers with values of the signature, if an answer is wanted.
func (r *request) reply(sig string, body func(*wire.Encoder)) {
	r.send(&wire.Head{Type: wire.Return, Signature: sig}, body)
}

// fail answers with an error, if an answer is wanted.
func (r *request) fail(name, text string) {
	r.send(&wire.Head{Type: wire.Error, ErrorName: name, Signature: "s"}, func(e *wire.Encoder) { e.String(text) })
}

func (r *request) send(h *wire.Head, body func(*wire.Encoder)) {
	if !r.m.WantsReply() {
		return
	}
	h.Flags, h.ReplySerial, h.Destination = wire.NoReplyExpected, r.m.Serial, string(r.m.Sender)
	if err := r.s.conn.send(h, body); err != nil {
		r.s.Log.WithError(err).Debug("answer over the bus")
	}
}

// refuse answers that a request failed.
func (r *request) refuse(err error) {
	if wrong, ok := err.(wire.ArgumentError); ok { //nolint:errorlint // Never wrapped.
		r.fail(errorInvalidArgs, string(wrong))
		return
	}
	e := api.AsError(err)
	if e.Kind == api.Internal {
		r.s.Log.WithError(err).WithField("op", r.method.Name).Warn("a request over the bus failed")
	}
	r.fail(api.RealtimeError(e.Kind))
}

func (r *request) unknown() {
	r.fail(api.ErrorUnknownMethod, "Method "+strconv.Quote(string(r.m.Member))+" with signature "+strconv.Quote(string(r.m.Signature))+
		" on interface "+strconv.Quote(string(r.m.Interface))+" doesn't exist")
}
