package wire

import "encoding/binary"

// What a bus passes on comes from anybody on it, and may be far longer than what
// is read of it: the bounds of Size and Decode are not the bus's.
const (
	// HeadLength is that of the part of a message that says how long it is.
	HeadLength = 16
	// maxOnBus bounds a message in the specification, in bytes.
	maxOnBus = 128 << 20
)

// Length returns the length of the message that starts with head, HeadLength
// bytes of it. It returns an error wrapping ErrMalformed where that is none.
func Length(head []byte) (int, error) {
	if len(head) != HeadLength || head[0] != 'l' && head[0] != 'B' {
		return 0, malformed("unknown byte order")
	}
	body, fields := u32(head[4:], head[0] == 'B'), u32(head[12:], head[0] == 'B')
	if body > maxOnBus || fields > maxOnBus {
		return 0, malformed("message too long")
	}
	return align(HeadLength+int(fields), 8) + int(body), nil
}

// Head is the header of a message to a bus. An empty field is left out.
type Head struct {
	Type                Type
	Flags               byte
	Serial, ReplySerial uint32
	Path, Interface     string
	Member, ErrorName   string
	Destination         string
	// Signature is that of the values that the caller writes.
	Signature string
}

// NewMessage starts a message at the end of buf.
func NewMessage(buf []byte, h *Head) Encoder {
	e := Encoder{buf: buf, start: len(buf)}
	e.buf = append(e.buf, 'l', byte(h.Type), h.Flags, 1)
	e.buf = binary.LittleEndian.AppendUint32(e.buf, 0) // the body's length; see End
	e.buf = binary.LittleEndian.AppendUint32(e.buf, h.Serial)
	e.Array(8, func() {
		for _, f := range [...]struct {
			code, kind byte
			text       string
		}{
			{fieldPath, 'o', h.Path},
			{fieldInterface, 's', h.Interface},
			{fieldMember, 's', h.Member},
			{fieldErrorName, 's', h.ErrorName},
			{fieldDestination, 's', h.Destination},
		} {
			if f.text != "" {
				e.pad(8)
				e.buf = append(e.buf, f.code, 1, f.kind, 0)
				e.raw(f.text)
			}
		}
		if h.ReplySerial != 0 {
			e.pad(8)
			e.buf = append(e.buf, fieldReplySerial, 1, 'u', 0)
			e.Uint32(h.ReplySerial)
		}
		if h.Signature != "" {
			e.pad(8)
			e.signature(h.Signature)
		}
	})
	e.pad(8)
	e.body = len(e.buf)
	return e
}
