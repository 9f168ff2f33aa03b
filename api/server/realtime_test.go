package server

import (
	"slices"
	"strings"
	"testing"

	"cgmanager/api"
	"cgmanager/api/wire"
)

func kit(member string, args ...any) call {
	return call{path: api.RealtimePath, iface: api.RealtimeInterface, member: member, args: args}
}

func property1(member string, args ...any) call {
	return call{path: api.RealtimePath, iface: "org.freedesktop.DBus.Properties", member: member, args: args}
}

// exactly makes a call that must fail with this name and this text.
func (c *client) exactly(m call, name, text string, fds ...int) {
	c.t.Helper()
	r := c.call(m, fds...)
	if n, s := failure(r); r.Type != wire.Error || n != name || s != text {
		c.t.Errorf("%s %v: got %s: %q\nwant %s: %q", m.member, m.args, n, s, name, text)
	}
}

const (
	invalidArgs = "org.freedesktop.DBus.Error.InvalidArgs"
	failed      = "org.freedesktop.DBus.Error.Failed"
	denied      = "org.freedesktop.DBus.Error.AccessDenied"
)

// What the methods are asked for, in both byte orders, with and without the name
// of the interface, and with more arguments than they take.
func TestRealtimeRequests(t *testing.T) {
	b := &fakeBackend{}
	ts := serve(t, b, Limits{})
	r, _ := pipe(t)
	for _, big := range []bool{false, true} {
		c := ts.login()
		c.big = big
		for _, tc := range []struct {
			call call
			want string
		}{
			{kit("MakeThreadRealtime", uint64(1<<32+7), uint32(20)), "realtime {Process:0 Own:true ID:4294967303} 20"},
			{kit("MakeThreadRealtimeWithPID", uint64(1<<64-1), uint64(3), uint32(1<<32-1)), "realtime {Process:18446744073709551615 Own:false ID:3} 4294967295"},
			{kit("MakeThreadHighPriority", uint64(1<<63), -15), "nice {Process:0 Own:true ID:9223372036854775808} -15"},
			{kit("MakeThreadHighPriorityWithPID", uint64(2), uint64(3), 19), "nice {Process:2 Own:false ID:3} 19"},
			{kit("ResetKnown"), "reset known"},
			{kit("ResetAll"), "reset all"},
			{kit("Exit"), "exit"},
		} {
			for _, iface := range []string{api.RealtimeInterface, ""} {
				for _, more := range [][]any{nil, {"more"}, {uint32(1), uint64(2), []string{"x"}}, {handle(0)}} {
					m := tc.call
					m.iface, m.args = iface, append(slices.Clip(m.args), more...)
					var fds []int
					if len(more) > 0 && more[0] == handle(0) {
						m.fds, fds = 1, []int{r}
					}
					b.asked.Store(nil)
					c.ok(m, "", fds...)
					if got := b.asked.Load(); got == nil || *got != tc.want {
						t.Errorf("big endian %v, interface %q, %v more: asked for %v, want %s", big, iface, more, got, tc.want)
					}
				}
			}
		}
	}
}

// The texts are those that dbus_message_get_args of libdbus 1.14 was seen to give.
func TestRealtimeArguments(t *testing.T) {
	b := &fakeBackend{}
	ts := serve(t, b, Limits{})
	c := ts.login()
	tt, one := uint64(1), uint32(1)
	for _, tc := range []struct {
		call call
		want string
	}{
		{kit("MakeThreadRealtime"), "Argument 0 is specified to be of type \"uint64\", but is actually of type \"invalid\"\n"},
		{kit("MakeThreadRealtime", tt), "Message has only 1 arguments, but more were expected"},
		{kit("MakeThreadRealtime", one), "Argument 0 is specified to be of type \"uint64\", but is actually of type \"uint32\"\n"},
		{kit("MakeThreadRealtime", one, one), "Argument 0 is specified to be of type \"uint64\", but is actually of type \"uint32\"\n"},
		{kit("MakeThreadRealtime", "x"), "Argument 0 is specified to be of type \"uint64\", but is actually of type \"string\"\n"},
		{kit("MakeThreadRealtime", tt, 1), "Argument 1 is specified to be of type \"uint32\", but is actually of type \"int32\"\n"},
		{kit("MakeThreadRealtime", tt, tt, one), "Argument 1 is specified to be of type \"uint32\", but is actually of type \"uint64\"\n"},
		{kit("MakeThreadRealtime", tt, []string{"x"}), "Argument 1 is specified to be of type \"uint32\", but is actually of type \"array\"\n"},
		{kit("MakeThreadRealtimeWithPID", tt, one), "Argument 1 is specified to be of type \"uint64\", but is actually of type \"uint32\"\n"},
		{kit("MakeThreadRealtimeWithPID", tt, tt), "Message has only 2 arguments, but more were expected"},
		{kit("MakeThreadHighPriority", tt, one), "Argument 1 is specified to be of type \"int32\", but is actually of type \"uint32\"\n"},
		{kit("MakeThreadHighPriorityWithPID", tt, tt, "x"), "Argument 2 is specified to be of type \"int32\", but is actually of type \"string\"\n"},
	} {
		for _, iface := range []string{api.RealtimeInterface, ""} {
			tc.call.iface = iface
			b.asked.Store(nil)
			c.exactly(tc.call, invalidArgs, tc.want)
			// Whom everything is refused it is refused before that.
			b.refused.Store(api.Errorf(api.Denied, "after a hog").WithHint("wait"))
			c.exactly(tc.call, denied, "Operation not permitted")
			b.refused.Store(nil)
			if got := b.asked.Load(); got != nil {
				t.Errorf("%s: asked for %s", tc.call.member, *got)
			}
		}
	}
	// They are read to the end nevertheless.
	bad := c.encode(kit("MakeThreadRealtime", "x"))
	bad[len(bad)-1] = 1
	c.write(bad)
	c.expectClosed()
	for _, args := range [][]any{{tt, one, "x"}, {"x"}} {
		c = ts.login()
		bad = c.encode(kit("MakeThreadRealtime", args...))
		bad[len(bad)-1] = 1
		c.write(bad)
		c.expectClosed()
	}
}

// Refusals have rtkit's names and texts, and nothing of the reason.
func TestRealtimeErrors(t *testing.T) {
	b := &fakeBackend{}
	ts := serve(t, b, Limits{})
	c := ts.login()
	for ends, want := range map[string][2]string{
		"fail invalid":     {failed, "Invalid argument"},
		"fail not found":   {failed, "No such file or directory"},
		"fail exists":      {denied, "Device or resource busy"},
		"fail denied":      {denied, "Operation not permitted"},
		"fail busy":        {denied, "Device or resource busy"},
		"fail limit":       {denied, "Device or resource busy"},
		"fail unsupported": {denied, "Operation not permitted"},
		"fail internal":    {failed, "Input/output error"},
		"error":            {failed, "Input/output error"},
		"panic":            {failed, "Input/output error"},
	} {
		b.realtimeEnds.Store(&ends)
		for _, m := range []call{
			kit("MakeThreadRealtime", uint64(0), uint32(1)), kit("ResetKnown"), kit("Exit"),
			property1("Get", api.RealtimeInterface, "MinNiceLevel"), property1("GetAll", api.RealtimeInterface),
		} {
			c.exactly(m, want[0], want[1])
		}
	}
	// Root's methods are asked for while the others are refused.
	b.realtimeEnds.Store(nil)
	b.refused.Store(api.Errorf(api.Denied, "after a hog"))
	c.ok(kit("ResetKnown"), "")
	c.exactly(kit("MakeThreadHighPriority", uint64(0), 1), denied, "Operation not permitted")
	c.exactly(kit("NoSuch"), "org.freedesktop.DBus.Error.UnknownMethod",
		`Method "NoSuch" with signature "" on interface "org.freedesktop.RealtimeKit1" doesn't exist`)
	// A call that wants no answer gets none.
	for _, m := range []call{kit("ResetKnown"), kit("MakeThreadRealtime"), kit("MakeThreadRealtime", uint64(0), uint32(1)), property1("Get", api.RealtimeInterface, "MinNiceLevel")} {
		m.flags = wire.NoReplyExpected
		c.write(c.encode(m))
	}
	c.ok(ping(), "")
}

// Clients look at the exact types (RTTimeUSecMax is an int64, the others int32).
func TestRealtimeProperties(t *testing.T) {
	b := &fakeBackend{}
	ts := serve(t, b, Limits{})
	for _, big := range []bool{false, true} {
		c := ts.login()
		c.big = big
		for name, want := range map[string]string{
			"RTTimeUSecMax":       "\x01x\x00\x00\x00\x00\x00\x00\x40\x0d\x03\x00\x01\x00\x00\x00",
			"MaxRealtimePriority": "\x01i\x00\x00\x14\x00\x00\x00",
			"MinNiceLevel":        "\x01i\x00\x00\xf1\xff\xff\xff",
		} {
			for _, iface := range []string{api.RealtimeInterface, ""} {
				r := c.call(property1("Get", iface, name))
				if r.Type != wire.Return || string(r.Signature) != "v" || string(r.Body) != want {
					t.Errorf("%s: type %d, signature %q, %q", name, r.Type, r.Signature, r.Body)
				}
			}
			c.exactly(property1("Set", api.RealtimeInterface, name, variant(7)), denied, "The "+name+" property is read-only")
		}
		for _, iface := range []string{api.RealtimeInterface, ""} {
			r := c.call(property1("GetAll", iface))
			// As libdbus writes it.
			want := "\x58\x00\x00\x00\x00\x00\x00\x00" +
				"\x0d\x00\x00\x00RTTimeUSecMax\x00\x01x\x00\x00\x00\x00\x40\x0d\x03\x00\x01\x00\x00\x00" +
				"\x13\x00\x00\x00MaxRealtimePriority\x00\x01i\x00\x00\x14\x00\x00\x00" +
				"\x0c\x00\x00\x00MinNiceLevel\x00\x01i\x00\xf1\xff\xff\xff"
			if string(r.Signature) != "a{sv}" || string(r.Body) != want {
				t.Errorf("GetAll: signature %q\n got %q\nwant %q", r.Signature, r.Body, want)
			}
		}
	}
	// They depend on who asks.
	c := ts.login()
	b.request.Store(nil)
	c.ok(property1("Get", api.RealtimeInterface, "MinNiceLevel"), "v")
	if rq := b.request.Load(); rq == nil || rq.Sender.PID == 0 {
		t.Errorf("the backend was asked by %+v", rq)
	}
	unknown := "org.freedesktop.DBus.Error.UnknownProperty"
	for _, m := range []string{"Get", "Set"} {
		more := []any{}
		if m == "Set" {
			more = []any{variant(7)}
		}
		ask := func(args ...any) call { return property1(m, append(args, more...)...) }
		c.exactly(ask(api.RealtimeInterface, "NoSuch"), unknown, "Unknown property NoSuch")
		c.exactly(ask("", "NoSuch"), unknown, "Unknown property NoSuch")
		for _, iface := range []string{"no.such", api.Interface1, "org.freedesktop.DBus.Peer"} {
			c.exactly(ask(iface, "MinNiceLevel"), unknown, "Unknown interface "+iface)
		}
	}
	c.exactly(property1("GetAll", "no.such"), unknown, "Unknown interface no.such")
	c.exactly(property1("GetAll", api.Interface1), unknown, "Unknown interface "+api.Interface1)
	c.fails(property1("Get", strings.Repeat("x", 60000), "y"), unknown, "Unknown interface xxx")
	if d := c.ok(property1("GetAll", "org.freedesktop.DBus.Peer"), "a{sv}"); d.Uint32() != 0 {
		t.Error("Peer has properties")
	}
	// Elsewhere there are none of it.
	m := property1("Get", api.RealtimeInterface, "MinNiceLevel")
	m.path = api.ObjectPath
	c.fails(m, "UnknownMethod", "Get")
	m = property1("GetAll", api.RealtimeInterface)
	m.path = api.ObjectPath
	c.fails(m, "UnknownMethod", "GetAll")
}

func TestRealtimeIntrospection(t *testing.T) {
	c := serve(t, &fakeBackend{}, Limits{}).login()
	for path, want := range map[string]bool{api.RealtimePath: true, api.ObjectPath: false, "/org/freedesktop": false} {
		m := call{path: path, iface: "org.freedesktop.DBus.Introspectable", member: "Introspect"}
		if got := strings.Contains(c.ok(m, "s").String(), `<arg name="thread" type="t" direction="in"/>`); got != want {
			t.Errorf("%s shows RealtimeKit1: %v", path, got)
		}
	}
	for member, want := range map[string]string{"GetNameOwner": ":1.0", "ListNames": ""} {
		m := call{path: "/", iface: busName, member: member}
		if want != "" {
			m.args = []any{api.RealtimeInterface}
			if got := c.ok(m, "s").String(); got != want {
				t.Errorf("%s: %q", member, got)
			}
		} else if got := strings.Join(c.ok(m, "as").Strings(), " "); !strings.Contains(got, api.RealtimeInterface) {
			t.Errorf("%s: %q", member, got)
		}
	}
}

func TestGrants(t *testing.T) {
	c := serve(t, &fakeBackend{}, Limits{}).login()
	r := c.call(to(api.Interface1, "ListGrants"))
	// As libdbus writes it.
	want := "\x74\x00\x00\x00\x00\x00\x00\x00" +
		"\x0a\x00\x00\x00\x0b\x00\x00\x00\xe8\x03\x00\x00\x02\x00\x00\x00rr\x00\x00\x14\x00\x00\x00" +
		"\x00\x00\x00\x00\x00\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x80\x07\x00\x00\x00granted\x00\x00\x00\x00\x00" +
		"\x0c\x00\x00\x00\x0c\x00\x00\x00\xff\xff\xff\xff\x05\x00\x00\x00other\x00\x00\x00\xf1\xff\xff\xff" + "\x00\x00\x00\x00" +
		"\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00demoted\x00"
	if string(r.Signature) != "a(uuusixts)" || string(r.Body) != want {
		t.Errorf("ListGrants: signature %q\n got %q\nwant %q", r.Signature, r.Body, want)
	}
	limits, _, _ := c.ok(to(api.Interface1, "GrantLimits", uint32(20)), "a{ss}").Dict()
	if limits["rtprio"] != "20" {
		t.Errorf("GrantLimits: %v", limits)
	}
	d := c.ok(to(api.Interface1, "RevokeLimits", uint32(20)), "au")
	if d.Uint32() != 8 || d.Uint32() != 20 || d.Uint32() != 7 || d.Close() != nil {
		t.Error("RevokeLimits")
	}
	c.fails(to(api.Interface1, "Grant", uint32(1), "fail limit", 1), "LimitsExceeded", "limit")
	c.fails(to(api.Interface1, "Grant", uint32(1), "rr", uint32(1)), "InvalidArgs", "Invalid arguments to Grant method")
}
