package wire

import (
	"encoding/binary"
	"errors"
)

// ErrNotUTF8 says that a string to be sent is not one that D-Bus can carry.
var ErrNotUTF8 = errors.New("not valid UTF-8")

// Encoder writes one message, little endian, behind what a buffer holds
// already. The caller writes what the signature promises, then calls End.
type Encoder struct {
	buf   []byte
	start int // of the message
	body  int // where the body starts
	err   error
}

// NewReturn starts a METHOD_RETURN at the end of buf. As the original daemon,
// it names neither sender nor destination, and no signature where sig is "".
func NewReturn(buf []byte, serial, replySerial uint32, sig string) Encoder {
	e := Encoder{buf: buf, start: len(buf)}
	fields := uint32(8)
	if sig != "" {
		fields += uint32(4 + 1 + len(sig) + 1)
	}
	e.header(Return, serial, replySerial, fields)
	if sig != "" {
		e.signature(sig)
	}
	e.pad(8)
	e.body = len(e.buf)
	return e
}

// NewCall starts a METHOD_CALL at the end of buf. fds is how many descriptors
// go with it.
func NewCall(buf []byte, serial uint32, path, iface, member, sig string, fds int) Encoder {
	e := Encoder{buf: buf, start: len(buf)}
	e.buf = append(e.buf, 'l', byte(Call), 0, 1)
	e.buf = binary.LittleEndian.AppendUint32(e.buf, 0) // the body's length; see End
	e.buf = binary.LittleEndian.AppendUint32(e.buf, serial)
	e.Array(8, func() {
		for _, f := range [...]struct {
			code, kind byte
			text       string
		}{{fieldPath, 'o', path}, {fieldInterface, 's', iface}, {fieldMember, 's', member}} {
			e.pad(8)
			e.buf = append(e.buf, f.code, 1, f.kind, 0)
			e.raw(f.text)
		}
		if sig != "" {
			e.pad(8)
			e.signature(sig)
		}
		if fds > 0 {
			e.pad(8)
			e.buf = append(e.buf, fieldUnixFDs, 1, 'u', 0)
			e.Uint32(uint32(fds))
		}
	})
	e.pad(8)
	e.body = len(e.buf)
	return e
}

// AppendError appends an ERROR with one string as its body.
func AppendError(buf []byte, serial, replySerial uint32, name, text string) []byte {
	e := Encoder{buf: buf, start: len(buf)}
	named := align(8+8+len(name)+1, 8)
	e.header(Error, serial, replySerial, uint32(named+4+1+1+1))
	e.buf = append(e.buf, fieldErrorName, 1, 's', 0)
	e.raw(name)
	e.pad(8)
	e.signature("s")
	e.pad(8)
	e.body = len(e.buf)
	if !ValidString(text) {
		text = "the text of this error is not valid UTF-8"
	}
	e.String(text)
	b, _ := e.End() // the text was checked
	return b
}

func (e *Encoder) header(t Type, serial, replySerial, fields uint32) {
	e.buf = append(e.buf, 'l', byte(t), NoReplyExpected, 1)
	e.buf = binary.LittleEndian.AppendUint32(e.buf, 0) // the body's length; see End
	e.buf = binary.LittleEndian.AppendUint32(e.buf, serial)
	e.buf = binary.LittleEndian.AppendUint32(e.buf, fields)
	e.buf = append(e.buf, fieldReplySerial, 1, 'u', 0)
	e.buf = binary.LittleEndian.AppendUint32(e.buf, replySerial)
}

func (e *Encoder) signature(sig string) {
	e.buf = append(e.buf, fieldSignature, 1, 'g', 0, byte(len(sig)))
	e.buf = append(append(e.buf, sig...), 0)
}

// End finishes the message and returns the buffer, cut back to what it was
// before where a value could not be sent.
func (e *Encoder) End() ([]byte, error) {
	if e.err != nil {
		return e.buf[:e.start], e.err
	}
	binary.LittleEndian.PutUint32(e.buf[e.start+4:], uint32(len(e.buf)-e.body))
	return e.buf, nil
}

func (e *Encoder) pad(n int) {
	for (len(e.buf)-e.start)%n != 0 {
		e.buf = append(e.buf, 0)
	}
}

// Uint32 writes a u.
func (e *Encoder) Uint32(v uint32) {
	e.pad(4)
	e.buf = binary.LittleEndian.AppendUint32(e.buf, v)
}

// Int32 writes an i.
func (e *Encoder) Int32(v int32) { e.Uint32(uint32(v)) }

// Uint64 writes a t.
func (e *Encoder) Uint64(v uint64) {
	e.pad(8)
	e.buf = binary.LittleEndian.AppendUint64(e.buf, v)
}

// Int64 writes an x.
func (e *Encoder) Int64(v int64) { e.Uint64(uint64(v)) }

// Bool writes a b.
func (e *Encoder) Bool(v bool) {
	if v {
		e.Uint32(1)
	} else {
		e.Uint32(0)
	}
}

// String writes an s.
func (e *Encoder) String(s string) {
	if !ValidString(s) {
		e.err = ErrNotUTF8
		return
	}
	e.raw(s)
}

func (e *Encoder) raw(s string) {
	e.Uint32(uint32(len(s)))
	e.buf = append(append(e.buf, s...), 0)
}

// VariantSignature writes the signature that starts a v; the value follows.
func (e *Encoder) VariantSignature(sig string) {
	e.buf = append(append(append(e.buf, byte(len(sig))), sig...), 0)
}

// Array writes an array whose elements have the given alignment; elements
// writes them, each one padded by Element where the alignment is 8.
func (e *Encoder) Array(alignment int, elements func()) {
	e.Uint32(0)
	at := len(e.buf) - 4
	e.pad(alignment)
	start := len(e.buf)
	elements()
	binary.LittleEndian.PutUint32(e.buf[at:], uint32(len(e.buf)-start))
}

// Dict writes an a{ss}.
func (e *Encoder) Dict(dict map[string]string) {
	e.Array(8, func() {
		for k, v := range dict {
			e.Element()
			e.String(k)
			e.String(v)
		}
	})
}

// Uint32s writes an au.
func (e *Encoder) Uint32s(list []uint32) {
	e.Array(4, func() {
		for _, v := range list {
			e.Uint32(v)
		}
	})
}

// Element starts a struct or a dictionary entry.
func (e *Encoder) Element() { e.pad(8) }

// Strings writes an as.
func (e *Encoder) Strings(list []string) {
	e.Array(4, func() {
		for _, s := range list {
			e.String(s)
		}
	})
}
