package wire

import (
	"bytes"
	"unicode/utf8"
)

// maxDepth bounds how deep containers nest, in a signature and in the values
// of nested variants.
const maxDepth = 32

func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func readUint32(b []byte, off int, big bool) (uint32, int, error) {
	start := align(off, 4)
	if start+4 > len(b) {
		return 0, 0, malformed("truncated value")
	}
	if !zero(b[off:start]) {
		return 0, 0, malformed("padding is not zero")
	}
	return u32(b[start:], big), start + 4, nil
}

func readString(b []byte, off int, big bool) ([]byte, int, error) {
	n, off, err := readUint32(b, off, big)
	if err != nil {
		return nil, 0, err
	}
	if uint64(n) >= uint64(len(b)-off) {
		return nil, 0, malformed("truncated string")
	}
	end := off + int(n)
	s := b[off:end:end]
	if b[end] != 0 || !validString(s) {
		return nil, 0, malformed("a string must be UTF-8 without NUL and end in one")
	}
	return s, end + 1, nil
}

func validString(s []byte) bool {
	return bytes.IndexByte(s, 0) < 0 && utf8.Valid(s)
}

func readSignature(b []byte, off int) ([]byte, int, error) {
	if off >= len(b) {
		return nil, 0, malformed("truncated signature")
	}
	n := int(b[off])
	off++
	if off+n >= len(b) || b[off+n] != 0 {
		return nil, 0, malformed("truncated signature")
	}
	s := b[off : off+n : off+n]
	for rest := s; len(rest) > 0; {
		m := typeLen(rest, 0, 0)
		if m == 0 {
			return nil, 0, malformed("invalid signature")
		}
		rest = rest[m:]
	}
	return s, off + n + 1, nil
}

// typeLen returns the length of the single complete type that starts sig, or
// 0 if there is none.
func typeLen(sig []byte, arrays, structs int) int {
	if len(sig) == 0 || arrays > maxDepth || structs > maxDepth {
		return 0
	}
	switch sig[0] {
	case 'y', 'b', 'n', 'q', 'i', 'u', 'x', 't', 'd', 's', 'o', 'g', 'h', 'v':
		return 1
	case 'a':
		if len(sig) > 1 && sig[1] == '{' {
			return dictLen(sig, arrays+1, structs)
		}
		if n := typeLen(sig[1:], arrays+1, structs); n > 0 {
			return 1 + n
		}
	case '(':
		for off := 1; off < len(sig); {
			if sig[off] == ')' {
				if off == 1 {
					return 0
				}
				return off + 1
			}
			n := typeLen(sig[off:], arrays, structs+1)
			if n == 0 {
				return 0
			}
			off += n
		}
	}
	return 0
}

// dictLen is typeLen for an array of dictionary entries.
func dictLen(sig []byte, arrays, structs int) int {
	if len(sig) < 5 || bytes.IndexByte([]byte("ybnqiuxtdsogh"), sig[2]) < 0 {
		return 0
	}
	n := typeLen(sig[3:], arrays, structs+1)
	if n == 0 || 3+n >= len(sig) || sig[3+n] != '}' {
		return 0
	}
	return 4 + n
}

func oneType(sig []byte) bool { return len(sig) > 0 && typeLen(sig, 0, 0) == len(sig) }

// alignment of a type's value, by the type's first byte.
func alignment(t byte) int {
	switch t {
	case 'y', 'g', 'v':
		return 1
	case 'n', 'q':
		return 2
	case 'x', 't', 'd', '(', '{':
		return 8
	}
	return 4
}

// skip checks the values of the valid signature sig at off and returns the
// offset after them.
func skip(b []byte, off int, sig []byte, big bool, depth int) (int, error) {
	if depth > maxDepth {
		return 0, malformed("nested too deep")
	}
	var err error
	for len(sig) > 0 && err == nil {
		n := typeLen(sig, 0, 0)
		if sig[0] == '{' {
			n = len(sig)
		}
		if n == 0 {
			return 0, malformed("invalid signature")
		}
		off, err = skipOne(b, off, sig[:n], big, depth)
		sig = sig[n:]
	}
	return off, err
}

func skipOne(b []byte, off int, sig []byte, big bool, depth int) (int, error) {
	start := align(off, alignment(sig[0]))
	if start > len(b) || !zero(b[off:start]) {
		return 0, malformed("truncated value")
	}
	off = start
	size := 0
	switch sig[0] {
	case 'y':
		size = 1
	case 'n', 'q':
		size = 2
	case 'i', 'u', 'h':
		size = 4
	case 'x', 't', 'd':
		size = 8
	case 'b':
		v, off, err := readUint32(b, off, big)
		if err == nil && v > 1 {
			err = malformed("a boolean is 0 or 1")
		}
		return off, err
	case 's':
		_, off, err := readString(b, off, big)
		return off, err
	case 'o':
		s, off, err := readString(b, off, big)
		if err == nil && !validPath(s) {
			err = malformed("invalid object path")
		}
		return off, err
	case 'g':
		_, off, err := readSignature(b, off)
		return off, err
	case 'v':
		inner, off, err := readSignature(b, off)
		if err != nil {
			return 0, err
		}
		if !oneType(inner) {
			return 0, malformed("a variant holds one value")
		}
		return skip(b, off, inner, big, depth+1)
	case '(', '{':
		return skip(b, off, sig[1:len(sig)-1], big, depth+1)
	case 'a':
		return skipArray(b, off, sig[1:], big, depth+1)
	}
	if off+size > len(b) {
		return 0, malformed("truncated value")
	}
	return off + size, nil
}

func skipArray(b []byte, off int, elem []byte, big bool, depth int) (int, error) {
	n, off, err := readUint32(b, off, big)
	if err != nil {
		return 0, err
	}
	start := align(off, alignment(elem[0]))
	if start > len(b) || !zero(b[off:start]) || uint64(n) > uint64(len(b)-start) {
		return 0, malformed("truncated array")
	}
	off = start
	end := start + int(n)
	if depth > maxDepth {
		return 0, malformed("nested too deep")
	}
	for off < end && err == nil {
		off, err = skipOne(b[:end], off, elem, big, depth)
	}
	return off, err
}

func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || isDigit(c)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// validPath reports whether s is an object path.
func validPath(s []byte) bool {
	if len(s) == 0 || s[0] != '/' {
		return false
	}
	if len(s) == 1 {
		return true
	}
	last := s[0]
	for _, c := range s[1:] {
		if c == '/' && last == '/' || c != '/' && !isNameByte(c) {
			return false
		}
		last = c
	}
	return last != '/'
}

// validMember reports whether s is a member name: one element without hyphens
// that does not start with a digit.
func validMember(s []byte) bool {
	if len(s) == 0 || len(s) > 255 || isDigit(s[0]) {
		return false
	}
	for _, c := range s {
		if !isNameByte(c) {
			return false
		}
	}
	return true
}

// validInterface reports whether s is the name of an interface or an error.
func validInterface(s []byte) bool { return validDotted(s, false, false) }

// validBusName reports whether s is a well-known or a unique bus name.
func validBusName(s []byte) bool {
	if len(s) > 255 {
		return false
	}
	if rest, ok := bytes.CutPrefix(s, []byte(":")); ok {
		return validDotted(rest, true, true)
	}
	return validDotted(s, true, false)
}

// validDotted reports whether s is two or more elements joined by periods.
func validDotted(s []byte, hyphens, leadingDigits bool) bool {
	if len(s) == 0 || len(s) > 255 {
		return false
	}
	elements, empty := 1, true
	for _, c := range s {
		switch {
		case c == '.':
			if empty {
				return false
			}
			elements++
			empty = true
			continue
		case isDigit(c):
			if empty && !leadingDigits {
				return false
			}
		case isNameByte(c), c == '-' && hyphens:
		default:
			return false
		}
		empty = false
	}
	return elements > 1 && !empty
}
