package wire

import (
	"encoding/binary"
	"errors"
)

// Bounds on what a peer may send. The specification allows 128 MiB a message;
// no request to this daemon comes near the bound here.
const (
	// MaxMessage bounds a message, header and body, in bytes.
	MaxMessage = 64 << 10
	// MaxReply bounds an answer, in bytes: lists can be long.
	MaxReply = 256 << 10
	// MaxFields bounds the array of header fields, in bytes.
	MaxFields = 8 << 10
	// MaxFDs is the most file descriptors that the kernel passes with one
	// message (SCM_MAX_FD in linux/socket.h).
	MaxFDs = 253
)

// Type is the type of a message.
type Type byte

// The message types.
const (
	Call Type = iota + 1
	Return
	Error
	Signal
)

// NoReplyExpected is the flag of a call that wants no answer.
const NoReplyExpected = 1

// ErrMalformed is wrapped by every error about the form of a message. There
// is no answer to such a message but to end the connection.
var ErrMalformed = errors.New("malformed message")

type malformed string

func (m malformed) Error() string { return "malformed message: " + string(m) }
func (m malformed) Unwrap() error { return ErrMalformed }

// Message is a decoded header with the body that follows it, as it came.
type Message struct {
	Type      Type
	Flags     byte
	BigEndian bool
	Serial    uint32
	// The header fields; nil or 0 where the message has none.
	Path, Interface, Member, ErrorName, Destination, Sender, Signature []byte
	ReplySerial, UnixFDs                                               uint32
	// Body is not decoded; see Decoder.
	Body []byte
}

// WantsReply reports whether the message is a call whose caller waits.
func (m *Message) WantsReply() bool { return m.Type == Call && m.Flags&NoReplyExpected == 0 }

func u32(b []byte, big bool) uint32 {
	if big {
		return binary.BigEndian.Uint32(b)
	}
	return binary.LittleEndian.Uint32(b)
}

func align(n, to int) int { return (n + to - 1) &^ (to - 1) }

// Size returns the length of the message that starts b, or 0 if b is too short
// to tell. It returns an error wrapping ErrMalformed as soon as what is there
// cannot become a message within MaxMessage.
func Size(b []byte) (int, error) { return size(b, MaxMessage) }

// ReplySize is Size for an answer, which MaxReply bounds.
func ReplySize(b []byte) (int, error) { return size(b, MaxReply) }

func size(b []byte, most int) (int, error) {
	if len(b) > 0 && b[0] != 'l' && b[0] != 'B' {
		return 0, malformed("unknown byte order")
	}
	if len(b) > 1 && b[1] == 0 {
		return 0, malformed("type 0")
	}
	if len(b) > 3 && b[3] != 1 {
		return 0, malformed("unknown protocol version")
	}
	if len(b) < 16 {
		return 0, nil
	}
	body, fields := u32(b[4:], b[0] == 'B'), u32(b[12:], b[0] == 'B')
	if fields > MaxFields {
		return 0, malformed("header too long")
	}
	if body > uint32(most) {
		return 0, malformed("message too long")
	}
	n := align(16+int(fields), 8) + int(body)
	if n > most {
		return 0, malformed("message too long")
	}
	return n, nil
}

// Header field codes.
const (
	fieldPath = iota + 1
	fieldInterface
	fieldMember
	fieldErrorName
	fieldReplySerial
	fieldDestination
	fieldSender
	fieldSignature
	fieldUnixFDs
)

// Decode reads the message that is all of b; Size, or ReplySize, says where it
// ends. It checks everything but the body. It returns an error wrapping
// ErrMalformed.
func (m *Message) Decode(b []byte) error {
	n, err := ReplySize(b)
	if err != nil {
		return err
	}
	if n == 0 || n != len(b) {
		return malformed("truncated")
	}
	*m = Message{Type: Type(b[1]), Flags: b[2], BigEndian: b[0] == 'B'}
	m.Serial = u32(b[8:], m.BigEndian)
	if m.Serial == 0 {
		return malformed("serial 0")
	}
	end := 16 + int(u32(b[12:], m.BigEndian))
	var seen uint32
	for off := 16; off < end; {
		if off, err = m.field(b[:end], off, &seen); err != nil {
			return err
		}
	}
	start := align(end, 8)
	if !zero(b[end:start]) {
		return malformed("padding is not zero")
	}
	m.Body = b[start:]
	if len(m.Signature) == 0 && len(m.Body) != 0 {
		return malformed("body without a signature")
	}
	return m.require(seen)
}

// field reads the header field at off and returns where the next one may
// start. seen has a bit for each known field.
func (m *Message) field(b []byte, off int, seen *uint32) (int, error) {
	start := align(off, 8)
	if start+4 > len(b) || !zero(b[off:start]) {
		return 0, malformed("truncated header field")
	}
	code := b[start]
	sig, off, err := readSignature(b, start+1)
	if err != nil {
		return 0, err
	}
	if !oneType(sig) {
		return 0, malformed("a variant holds one value")
	}
	if code == 0 {
		return 0, malformed("header field 0")
	}
	if code > fieldUnixFDs {
		return skip(b, off, sig, m.BigEndian, 0)
	}
	if *seen&(1<<code) != 0 {
		return 0, malformed("header field given twice")
	}
	*seen |= 1 << code
	if len(sig) != 1 || sig[0] != "?osssussgu"[code] {
		return 0, malformed("header field of a wrong type")
	}
	switch sig[0] {
	case 'u':
		v, off, err := readUint32(b, off, m.BigEndian)
		if code == fieldReplySerial {
			if m.ReplySerial = v; v == 0 && err == nil {
				err = malformed("reply serial 0")
			}
		} else {
			m.UnixFDs = v
		}
		return off, err
	case 'g':
		m.Signature, off, err = readSignature(b, off)
		return off, err
	}
	s, off, err := readString(b, off, m.BigEndian)
	if err != nil {
		return 0, err
	}
	valid := false
	switch code {
	case fieldPath:
		m.Path, valid = s, validPath(s)
	case fieldInterface:
		m.Interface, valid = s, validInterface(s)
	case fieldMember:
		m.Member, valid = s, validMember(s)
	case fieldErrorName:
		m.ErrorName, valid = s, validInterface(s)
	case fieldDestination:
		m.Destination, valid = s, validBusName(s)
	case fieldSender:
		m.Sender, valid = s, validBusName(s)
	}
	if !valid {
		return 0, malformed("header field of an invalid form")
	}
	return off, nil
}

// require checks that the fields are there that the message's type needs.
func (m *Message) require(seen uint32) error {
	var need uint32
	switch m.Type {
	case Call:
		need = 1<<fieldPath | 1<<fieldMember
	case Return:
		need = 1 << fieldReplySerial
	case Error:
		need = 1<<fieldErrorName | 1<<fieldReplySerial
	case Signal:
		need = 1<<fieldPath | 1<<fieldInterface | 1<<fieldMember
	}
	if seen&need != need {
		return malformed("a header field is missing")
	}
	if m.UnixFDs > MaxFDs {
		return malformed("too many file descriptors")
	}
	return nil
}
