package wire

import (
	"bytes"
	"testing"

	"github.com/godbus/dbus/v5"
)

// TestNewMessage: what is written for a bus another decoder reads, and this one.
func TestNewMessage(t *testing.T) {
	const path, iface, member, to = "/a/b", "a.b", "C", ":1.7"
	for _, h := range []Head{
		{Type: Call, Path: path, Interface: iface, Member: member, Destination: to, Signature: "su", Serial: 3},
		{Type: Call, Path: path, Member: member, Destination: to, Flags: NoReplyExpected, Signature: "su", Serial: 4},
		{Type: Return, ReplySerial: 9, Destination: to, Signature: "su", Serial: 5},
		{Type: Error, ReplySerial: 9, ErrorName: "a.b.C", Destination: to, Signature: "su", Serial: 6},
		{Type: Signal, Path: path, Interface: iface, Member: member, Signature: "su", Serial: 7},
		{Type: Return, ReplySerial: 9, Destination: to, Serial: 8},
	} {
		e := NewMessage([]byte("before"), &h)
		if h.Signature != "" {
			e.String("text")
			e.Uint32(42)
		}
		b, err := e.End()
		if err != nil {
			t.Fatal(err)
		}
		b = b[len("before"):]
		if n, err := Length(b[:HeadLength]); n != len(b) || err != nil {
			t.Errorf("%+v: length %d, %v, want %d", h, n, err, len(b))
		}
		var m Message
		if err := m.Decode(b); err != nil {
			t.Errorf("%+v: %v", h, err)
			continue
		}
		got := Head{
			m.Type, m.Flags, m.Serial, m.ReplySerial, string(m.Path), string(m.Interface), string(m.Member), string(m.ErrorName),
			string(m.Destination), string(m.Signature),
		}
		if got != h {
			t.Errorf("%+v, want %+v", got, h)
		}
		theirs, err := dbus.DecodeMessage(bytes.NewReader(b))
		if err != nil || theirs.Serial() != h.Serial || len(theirs.Body) != len(h.Signature) {
			t.Errorf("%+v: another decoder reads %v, %v", h, theirs, err)
		}
	}
}

func TestLength(t *testing.T) {
	head := func(order byte, fields, body [4]byte) []byte {
		return append(append(append([]byte{order, 1, 0, 1}, body[:]...), 1, 0, 0, 0), fields[:]...)
	}
	for _, tc := range []struct {
		head []byte
		want int // 0: malformed
	}{
		{head('l', [4]byte{1}, [4]byte{}), 24},
		{head('l', [4]byte{8}, [4]byte{5}), 29},
		{head('B', [4]byte{0, 0, 0, 8}, [4]byte{0, 0, 0, 5}), 29},
		{head('l', [4]byte{0, 0, 0, 8}, [4]byte{}), 16 + 128<<20},
		{head('l', [4]byte{1, 0, 0, 8}, [4]byte{}), 0},
		{head('l', [4]byte{}, [4]byte{1, 0, 0, 8}), 0},
		{head('l', [4]byte{255, 255, 255, 255}, [4]byte{255, 255, 255, 255}), 0},
		{head('x', [4]byte{1}, [4]byte{}), 0},
		{nil, 0},
	} {
		n, err := Length(tc.head)
		if n != tc.want || (err == nil) != (tc.want > 0) {
			t.Errorf("%v: %d, %v, want %d", tc.head, n, err, tc.want)
		}
	}
}
