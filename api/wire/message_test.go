package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
)

// encode has godbus write a call.
func encode(t testing.TB, order binary.ByteOrder, body ...any) []byte {
	t.Helper()
	m := &dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:        dbus.MakeVariant(dbus.ObjectPath("/org/linuxcontainers/cgmanager")),
		dbus.FieldInterface:   dbus.MakeVariant("org.linuxcontainers.cgmanager0_0"),
		dbus.FieldMember:      dbus.MakeVariant("Create"),
		dbus.FieldDestination: dbus.MakeVariant(":1.7"),
	}, Body: body}
	if len(body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	var b bytes.Buffer
	if err := m.EncodeTo(&b, order); err != nil {
		t.Fatal(err)
	}
	binary.NativeEndian.PutUint32(b.Bytes()[8:], 0)
	order.PutUint32(b.Bytes()[8:], 7)
	return b.Bytes()
}

// bodies are of the signatures that the daemon takes.
func bodies() [][]any {
	return [][]any{
		{},
		{int32(-1)},
		{"memory"},
		{"memory", "x"},
		{"memory", "x", int32(5)},
		{"memory", int32(5)},
		{"memory", "ü", "tasks", int32(436)},
		{"a", "b", "c", "d"},
		{"a", "b", int32(1), int32(2)},
		{"x", uint32(1), uint32(2)},
		{"x", []string{"a", "bc", ""}},
		{"x", map[string]string{"k": "v"}},
		{"x", []string{}, map[string]string{}},
		{"x", []string{"memory"}, map[string]string{"memory.limit": "1G", "a": ""}},
		{uint32(3), "rr", int32(-20)},
		{uint64(1<<63 + 7), uint32(20)},
		{uint64(1<<32 - 1), uint64(5), int32(-15)},
		{uint64(1), int64(-1 << 40), "more"},
		{uint32(1), uint64(2), "x", uint64(3)},
		{"i", "p", dbus.MakeVariant(int32(11))},
		{"i", "p", dbus.MakeVariant(map[string][]dbus.Variant{"k": {dbus.MakeVariant("deep")}})},
	}
}

func TestDecode(t *testing.T) {
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		for _, body := range bodies() {
			b := encode(t, order, body...)
			for n := range b {
				if size, err := Size(b[:n]); err != nil || size != 0 && size != len(b) {
					t.Fatalf("after %d bytes: size %d, %v", n, size, err)
				}
			}
			var m Message
			if err := m.Decode(b); err != nil {
				t.Fatalf("%v: %v", body, err)
			}
			if m.Serial != 7 || string(m.Member) != "Create" || !m.WantsReply() || string(m.Destination) != ":1.7" {
				t.Errorf("got %+v", m)
			}
			same(t, b, &m)
			for n := range b {
				if err := new(Message).Decode(b[:n]); !errors.Is(err, ErrMalformed) {
					t.Fatalf("cut at %d: %v", n, err)
				}
			}
		}
	}
}

// same checks that godbus reads the same from b, if it reads it.
func same(t *testing.T, b []byte, m *Message) {
	t.Helper()
	values, ok := read(string(m.Signature), string(m.Body), m.BigEndian)
	theirs, err := dbus.DecodeMessage(bytes.NewReader(b))
	if err != nil || theirs.IsValid() != nil {
		return // stricter than we are, or unable
	}
	header := func(f dbus.HeaderField) string {
		switch v := theirs.Headers[f].Value().(type) {
		case nil:
			return ""
		case string:
			return v
		case dbus.ObjectPath:
			return string(v)
		case dbus.Signature:
			return v.String()
		}
		return "of another type"
	}
	for f, ours := range map[dbus.HeaderField][]byte{
		dbus.FieldPath: m.Path, dbus.FieldInterface: m.Interface, dbus.FieldMember: m.Member, dbus.FieldErrorName: m.ErrorName,
		dbus.FieldDestination: m.Destination, dbus.FieldSender: m.Sender, dbus.FieldSignature: m.Signature,
	} {
		if header(f) != string(ours) {
			t.Fatalf("field %d: %q, godbus has %q", f, ours, header(f))
		}
	}
	if byte(theirs.Type) != byte(m.Type) || byte(theirs.Flags) != m.Flags || theirs.Serial() != m.Serial {
		t.Fatalf("type %d, flags %d, serial %d; godbus has %+v", m.Type, m.Flags, m.Serial, theirs)
	}
	if ok && !reflect.DeepEqual(values, theirs.Body) && len(values)+len(theirs.Body) > 0 {
		t.Fatalf("body %#v, godbus has %#v", values, theirs.Body)
	}
}

// read reads a body of one of our signatures into the types of godbus. It
// returns false for other ones and for what is malformed.
func read(sig, body string, big bool) (values []any, ok bool) {
	d := NewDecoder(body, big)
	for sig != "" && ok == (len(values) > 0) {
		var v any
		n := 1
		switch {
		case strings.HasPrefix(sig, "s"):
			v = d.String()
		case strings.HasPrefix(sig, "i"):
			v = int32(d.Uint32())
		case strings.HasPrefix(sig, "u"):
			v = d.Uint32()
		case strings.HasPrefix(sig, "t"):
			v = d.Uint64()
		case strings.HasPrefix(sig, "x"):
			v = int64(d.Uint64())
		case strings.HasPrefix(sig, "as"):
			list := d.Strings()
			if list == nil {
				list = []string{}
			}
			v, n = list, 2
		case strings.HasPrefix(sig, "a{ss}"):
			dict, _, _ := d.Dict()
			v, n = dict, 5
		default:
			return nil, false
		}
		values, ok = append(values, v), true
		sig = sig[n:]
	}
	return values, d.Close() == nil
}

func TestMalformedFields(t *testing.T) {
	good := encode(t, binary.LittleEndian, "memory", "x")
	for name, change := range map[string]func(b []byte) []byte{
		"twice the path": func(b []byte) []byte { return bytes.Replace(b, []byte("\x02\x01s"), []byte("\x01\x01o"), 1) },
		"wrong type":     func(b []byte) []byte { return bytes.Replace(b, []byte("\x02\x01s"), []byte("\x02\x01u"), 1) },
		"field 0":        func(b []byte) []byte { return bytes.Replace(b, []byte("\x02\x01s"), []byte("\x00\x01s"), 1) },
		"no member":      func(b []byte) []byte { return bytes.Replace(b, []byte("\x03\x01s"), []byte("\x0a\x01s"), 1) },
		"path":           func(b []byte) []byte { return bytes.Replace(b, []byte("/cgm"), []byte("//gm"), 1) },
		"interface":      func(b []byte) []byte { return bytes.Replace(b, []byte("s.cg"), []byte("s..g"), 1) },
		"member":         func(b []byte) []byte { return bytes.Replace(b, []byte("Create"), []byte("Cre.te"), 1) },
		"bus name":       func(b []byte) []byte { return bytes.Replace(b, []byte(":1.7"), []byte(":1/7"), 1) },
		"signature":      func(b []byte) []byte { return bytes.Replace(b, []byte("\x02ss"), []byte("\x02a}"), 1) },
		"padding": func(b []byte) []byte {
			return bytes.Replace(b, []byte("cgmanager\x00\x00"), []byte("cgmanager\x00\x01"), 1)
		},
	} {
		b := change(bytes.Clone(good))
		if bytes.Equal(b, good) {
			t.Fatalf("%s: nothing changed", name)
		}
		if err := new(Message).Decode(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A field that is not known yet is skipped.
	if err := new(Message).Decode(bytes.Replace(good, []byte("\x02\x01s"), []byte("\x0b\x01s"), 1)); err != nil {
		t.Errorf("unknown field: %v", err)
	}
}

func TestDeepSignatures(t *testing.T) {
	for sig, want := range map[string]bool{
		"": true, "a": false, "(": false, "()": false, "a{sv}": true, "a{vs}": false, "{ss}": false, "a{s}": false, "a{sss}": false,
		strings.Repeat("a", 32) + "s": true, strings.Repeat("a", 33) + "s": false,
		strings.Repeat("(", 32) + "s" + strings.Repeat(")", 32): true,
		strings.Repeat("(", 33) + "s" + strings.Repeat(")", 33): false,
		"z": false, "a{s(iu)}a(sa{sv})": true,
	} {
		b := append(append([]byte{byte(len(sig))}, sig...), 0)
		if _, _, err := readSignature(b, 0); (err == nil) != want {
			t.Errorf("%q: %v", sig, err)
		}
	}
	// Variants in variants end as well.
	deep := []byte{}
	for range 100 {
		deep = append(deep, 1, 'v', 0)
	}
	deep = append(deep, 1, 'y', 0, 7)
	if d := NewDecoder(string(deep), false); true {
		if d.Skip("v"); !errors.Is(d.Close(), ErrMalformed) {
			t.Error("a hundred variants in each other")
		}
	}
}

func TestVariant(t *testing.T) {
	for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
		for _, tc := range []struct {
			value any
			sig   string
			want  int64
		}{
			{int32(-15), "i", -15},
			{uint32(1<<32 - 1), "u", 1<<32 - 1},
			{int64(-1<<40 + 3), "x", -1<<40 + 3},
			{uint64(1), "", 0},
			{"x", "", 0},
		} {
			var m Message
			if err := m.Decode(encode(t, order, "odd", dbus.MakeVariant(tc.value))); err != nil {
				t.Fatal(err)
			}
			d := NewDecoder(string(m.Body), m.BigEndian)
			d.Skip("s")
			sig, got := d.Variant()
			if err := d.Close(); sig != tc.sig || got != tc.want || (err == nil) != (tc.sig != "") {
				t.Errorf("%v: %q, %d, %v", tc.value, sig, got, err)
			}
		}
	}
}

// What the encoder writes, godbus reads.
func TestEncode(t *testing.T) {
	check := func(sig string, want []any, write func(e *Encoder)) {
		t.Helper()
		e := NewReturn([]byte("before"), 3, 9, sig)
		if write != nil {
			write(&e)
		}
		b, err := e.End()
		if err != nil || !bytes.HasPrefix(b, []byte("before")) {
			t.Fatalf("%s: %v", sig, err)
		}
		m, err := dbus.DecodeMessage(bytes.NewReader(b[6:]))
		if err != nil {
			t.Fatalf("%s: %v", sig, err)
		}
		if m.Headers[dbus.FieldReplySerial].Value() != uint32(9) || len(want)+len(m.Body) > 0 && !reflect.DeepEqual(m.Body, want) {
			t.Errorf("%s: got %v %#v, want %#v", sig, m.Headers, m.Body, want)
		}
	}
	check("", nil, nil)
	check("i", []any{int32(-1)}, func(e *Encoder) { e.Int32(-1) })
	check("b", []any{true}, func(e *Encoder) { e.Bool(true) })
	check("s", []any{"ü"}, func(e *Encoder) { e.String("ü") })
	check("as", []any{[]string{"a", "bcd"}}, func(e *Encoder) { e.Strings([]string{"a", "bcd"}) })
	check("as", []any{[]string{}}, func(e *Encoder) { e.Strings(nil) })
	check("auu", []any{[]uint32{1, 2}, uint32(3)}, func(e *Encoder) {
		e.Uint32s([]uint32{1, 2})
		e.Uint32(3)
	})
	check("uxst", []any{uint32(1), int64(-1 << 40), "x", uint64(1<<63 + 1)}, func(e *Encoder) {
		e.Uint32(1)
		e.Int64(-1 << 40)
		e.String("x")
		e.Uint64(1<<63 + 1)
	})
	check("a(ut)", []any{[][]any{{uint32(1), uint64(2)}, {uint32(3), uint64(4)}}}, func(e *Encoder) {
		e.Array(8, func() {
			for i := range uint32(2) {
				e.Element()
				e.Uint32(2*i + 1)
				e.Uint64(uint64(2*i + 2))
			}
		})
	})
	check("a(suuu)", []any{[][]any{{"k", uint32(1), uint32(2), uint32(3)}}}, func(e *Encoder) {
		e.Array(8, func() {
			e.Element()
			e.String("k")
			e.Uint32(1)
			e.Uint32(2)
			e.Uint32(3)
		})
	})
	check("a{ss}", []any{map[string]string{"a": "b", "c": "d"}}, func(e *Encoder) {
		e.Array(8, func() {
			for _, k := range []string{"ab", "cd"} {
				e.Element()
				e.String(k[:1])
				e.String(k[1:])
			}
		})
	})
	check("a{ss}", []any{map[string]string{}}, func(e *Encoder) { e.Array(8, func() {}) })
	check("v", []any{dbus.MakeVariant(int32(10))}, func(e *Encoder) { e.VariantSignature("i"); e.Int32(10) })
	check("a{sv}", []any{map[string]dbus.Variant{"v": dbus.MakeVariant("x")}}, func(e *Encoder) {
		e.Array(8, func() { e.Element(); e.String("v"); e.VariantSignature("s"); e.String("x") })
	})
	b := AppendError(nil, 1, 2, "org.freedesktop.DBus.Error.InvalidArgs", "why")
	m, err := dbus.DecodeMessage(bytes.NewReader(b))
	if err != nil || m.Type != dbus.TypeError || m.Body[0] != "why" || m.IsValid() != nil {
		t.Errorf("error: %v, %v", m, err)
	}
	for _, s := range []string{"\xff", "a\x00b"} {
		e := NewReturn([]byte("before"), 1, 2, "s")
		e.String(s)
		if b, err := e.End(); !errors.Is(err, ErrNotUTF8) || string(b) != "before" {
			t.Errorf("%q: %q, %v", s, b, err)
		}
	}
}

// Decode takes what comes, agrees with godbus where both take it, and never
// looks behind the message.
func FuzzMessage(f *testing.F) {
	for _, body := range bodies() {
		f.Add(encode(f, binary.LittleEndian, body...))
		f.Add(encode(f, binary.BigEndian, body...))
	}
	f.Add(AppendError(nil, 1, 2, "org.freedesktop.DBus.Error.InvalidArgs", "why"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := Size(b)
		if n > MaxMessage || err != nil && n != 0 {
			t.Fatalf("size %d, %v", n, err)
		}
		if err != nil || n == 0 || n > len(b) {
			return
		}
		var m Message
		if err := m.Decode(b[:n:n]); err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		same(t, b[:n], &m)
	})
}

// A body of any signature is read to its end or refused.
func FuzzBody(f *testing.F) {
	for _, body := range bodies() {
		for _, order := range []binary.ByteOrder{binary.LittleEndian, binary.BigEndian} {
			var m Message
			if err := m.Decode(encode(f, order, body...)); err != nil {
				f.Fatal(err)
			}
			f.Add(string(m.Signature), string(m.Body), m.BigEndian)
		}
	}
	f.Fuzz(func(t *testing.T, sig, body string, big bool) {
		if len(sig) > 255 || len(body) > MaxMessage {
			return
		}
		raw := append(append([]byte{byte(len(sig))}, sig...), 0)
		if _, _, err := readSignature(raw, 0); err != nil {
			return
		}
		d := NewDecoder(body, big)
		d.Skip(sig)
		skipped := d.Close() == nil
		_, ok := read(sig, body, big)
		if ok && !skipped && sig != "" {
			t.Fatalf("%q is read, but not skipped: %v", sig, d.Close())
		}
		if !ok && skipped && known(sig) {
			t.Fatalf("%q is skipped, but not read", sig)
		}
	})
}

// known reports whether read knows all types of sig.
func known(sig string) bool {
	return strings.Trim(strings.NewReplacer("a{ss}", "", "as", "").Replace(sig), "siutx") == ""
}

// What NewCall writes is read back as what was asked.
func TestNewCall(t *testing.T) {
	const before = "before"
	e := NewCall([]byte(before), 7, "/a/b", "a.b", "Do", "sasa{ss}h", 1)
	e.String("x")
	e.Strings([]string{"one", "three"})
	e.Dict(map[string]string{"k": "v"})
	e.Uint32(0)
	b, err := e.End()
	if err != nil {
		t.Fatal(err)
	}
	b = b[len(before):]
	if n, err := Size(b); n != len(b) || err != nil {
		t.Errorf("Size: %d of %d, %v", n, len(b), err)
	}
	var m Message
	if err := m.Decode(b); err != nil {
		t.Fatal(err)
	}
	if m.Type != Call || m.Serial != 7 || m.UnixFDs != 1 || !m.WantsReply() || string(m.Path) != "/a/b" ||
		string(m.Interface) != "a.b" || string(m.Member) != "Do" || string(m.Signature) != "sasa{ss}h" {
		t.Errorf("got %+v", m)
	}
	d := NewDecoder(string(m.Body), m.BigEndian)
	s, list := d.String(), d.Strings()
	dict, _, _ := d.Dict()
	if h := d.Uint32(); s != "x" || !slices.Equal(list, []string{"one", "three"}) || dict["k"] != "v" || h != 0 || d.Close() != nil {
		t.Errorf("got %q %q %q %d %v", s, list, dict, h, d.Close())
	}
	// godbus reads the same.
	g, err := dbus.DecodeMessage(bytes.NewReader(b))
	if err != nil || len(g.Body) != 4 || g.Body[0] != "x" {
		t.Errorf("godbus reads %v, %v", g, err)
	}
}
