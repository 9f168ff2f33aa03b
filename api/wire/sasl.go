package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strconv"
)

// Bounds on a handshake.
const (
	// MaxLine bounds a line, in bytes; an honest one has a tenth of it.
	MaxLine = 1024
	// maxLines bounds how many lines there may be before BEGIN.
	maxLines = 32
)

// ErrHandshake says that a peer's handshake cannot go on.
var ErrHandshake = errors.New("authentication handshake")

type handshake string

func (h handshake) Error() string { return "authentication handshake: " + string(h) }
func (h handshake) Unwrap() error { return ErrHandshake }

// SASL is the server's side of a D-Bus authentication handshake with EXTERNAL
// as its only mechanism. The peer is who the kernel says it is; the identity
// that it names must be no other.
type SASL struct {
	guid    string
	accepts func(uid uint32) bool
	state   saslState
	lines   int
	fds     bool
}

type saslState byte

const (
	wantNUL saslState = iota
	wantAuth
	wantData
	wantBegin
	begun
)

// NewSASL starts a handshake. guid is the server's, 32 hexadecimal digits;
// accepts reports whether a uid that the peer names is its own.
func NewSASL(guid string, accepts func(uid uint32) bool) *SASL {
	return &SASL{guid: guid, accepts: accepts}
}

// Begun reports whether the handshake is over; messages follow.
func (s *SASL) Begun() bool { return s.state == begun }

// FDs reports whether the peer may pass file descriptors.
func (s *SASL) FDs() bool { return s.fds }

// Read handles the whole lines in in, up to BEGIN, appends the answers to out
// and returns how many bytes of in it used. It returns an error wrapping
// ErrHandshake where the connection must end.
func (s *SASL) Read(in, out []byte) (used int, _ []byte, err error) {
	if s.state == wantNUL && len(in) > 0 {
		if in[0] != 0 {
			return 0, out, handshake("the first byte is not NUL")
		}
		s.state = wantAuth
		used = 1
	}
	for s.state != wantNUL && s.state != begun {
		line, _, found := bytes.Cut(in[used:], []byte("\r\n"))
		if len(line) > MaxLine {
			return used, out, handshake("line too long")
		}
		if !found {
			break
		}
		used += len(line) + 2
		if s.lines++; s.lines > maxLines {
			return used, out, handshake("too many lines")
		}
		if out, err = s.line(line, out); err != nil {
			return used, out, err
		}
	}
	return used, out, nil
}

const rejected = "REJECTED EXTERNAL\r\n"

func (s *SASL) line(line, out []byte) ([]byte, error) {
	for _, c := range line {
		if c < ' ' || c > '~' {
			return out, handshake("a line is not printable ASCII")
		}
	}
	command, arg, hasArg := bytes.Cut(line, []byte(" "))
	switch string(command) {
	case "AUTH":
		if s.state != wantAuth {
			return append(out, "ERROR \"Already in an auth conversation\"\r\n"...), nil
		}
		mechanism, identity, initial := bytes.Cut(arg, []byte(" "))
		switch {
		case string(mechanism) != "EXTERNAL":
			return append(out, rejected...), nil
		case !initial:
			s.state = wantData
			return append(out, "DATA\r\n"...), nil
		}
		return s.identify(identity, out), nil
	case "DATA":
		if s.state != wantData {
			return append(out, "ERROR \"No data expected\"\r\n"...), nil
		}
		return s.identify(arg, out), nil
	case "CANCEL":
		if s.state == wantAuth {
			return append(out, "ERROR \"Not currently in an auth conversation\"\r\n"...), nil
		}
		return s.reject(out), nil
	case "ERROR":
		return s.reject(out), nil
	case "NEGOTIATE_UNIX_FD":
		if s.state != wantBegin || hasArg {
			return append(out, "ERROR \"Need to authenticate first\"\r\n"...), nil
		}
		s.fds = true
		return append(out, "AGREE_UNIX_FD\r\n"...), nil
	case "BEGIN":
		if s.state != wantBegin {
			return out, handshake("BEGIN before OK")
		}
		s.state = begun
		return out, nil
	}
	return append(out, "ERROR \"Unknown command\"\r\n"...), nil
}

func (s *SASL) reject(out []byte) []byte {
	s.state, s.fds = wantAuth, false
	return append(out, rejected...)
}

// identify judges an identity: the hexadecimal form of a decimal uid, or
// nothing, which leaves it to the kernel.
func (s *SASL) identify(identity, out []byte) []byte {
	if len(identity) > 0 {
		var digits [10]byte
		if len(identity)%2 != 0 || hex.DecodedLen(len(identity)) > len(digits) {
			return s.reject(out)
		}
		n, err := hex.Decode(digits[:], identity)
		if err != nil || !isDigit(digits[0]) {
			return s.reject(out)
		}
		uid, err := strconv.ParseUint(string(digits[:n]), 10, 32)
		if err != nil || !s.accepts(uint32(uid)) {
			return s.reject(out)
		}
	}
	s.state = wantBegin
	return append(append(append(out, "OK "...), s.guid...), "\r\n"...)
}
