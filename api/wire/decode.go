package wire

import (
	"strings"
	"unicode/utf8"
)

// Decoder reads a message's body, whose types the caller knows from its
// signature. The strings that it returns are parts of the body that it was
// given. After the first failure every method returns zero values.
type Decoder struct {
	body string
	off  int
	big  bool
	err  error
}

// NewDecoder returns a Decoder of body.
func NewDecoder(body string, bigEndian bool) Decoder {
	return Decoder{body: body, big: bigEndian}
}

// Close reports the first failure, which wraps ErrMalformed; a body that was
// not read to its end is one.
func (d *Decoder) Close() error {
	if d.err == nil && d.off != len(d.body) {
		d.err = malformed("bytes behind the last argument")
	}
	return d.err
}

func (d *Decoder) fail(why string) {
	if d.err == nil {
		d.err = malformed(why)
	}
}

// pad moves to the next multiple of n.
func (d *Decoder) pad(n int) {
	end := align(d.off, n)
	if end > len(d.body) {
		d.fail("truncated value")
		return
	}
	for ; d.off < end; d.off++ {
		if d.body[d.off] != 0 {
			d.fail("padding is not zero")
			return
		}
	}
}

// Uint32 reads a u, i or h.
func (d *Decoder) Uint32() uint32 {
	d.pad(4)
	if d.err != nil || len(d.body)-d.off < 4 {
		d.fail("truncated value")
		return 0
	}
	s := d.body[d.off:]
	d.off += 4
	if d.big {
		return uint32(s[3]) | uint32(s[2])<<8 | uint32(s[1])<<16 | uint32(s[0])<<24
	}
	return uint32(s[0]) | uint32(s[1])<<8 | uint32(s[2])<<16 | uint32(s[3])<<24
}

// Uint64 reads a t or x.
func (d *Decoder) Uint64() uint64 {
	d.pad(8)
	if d.err != nil || len(d.body)-d.off < 8 {
		d.fail("truncated value")
		return 0
	}
	first, second := uint64(d.Uint32()), uint64(d.Uint32())
	if d.big {
		return first<<32 | second
	}
	return second<<32 | first
}

// String reads an s.
func (d *Decoder) String() string {
	n := d.Uint32()
	if d.err != nil || uint64(n) >= uint64(len(d.body)-d.off) {
		d.fail("truncated string")
		return ""
	}
	s := d.body[d.off : d.off+int(n)]
	d.off += int(n)
	if d.body[d.off] != 0 || !ValidString(s) {
		d.fail("a string must be UTF-8 without NUL and end in one")
		return ""
	}
	d.off++
	return s
}

// ValidString reports whether s may be a D-Bus string: UTF-8 without NUL.
func ValidString(s string) bool {
	return strings.IndexByte(s, 0) < 0 && utf8.ValidString(s)
}

// array reads the length of an array whose elements have the given alignment
// and returns where it ends.
func (d *Decoder) array(alignment int) int {
	n := d.Uint32()
	d.pad(alignment)
	if d.err != nil || uint64(n) > uint64(len(d.body)-d.off) {
		d.fail("truncated array")
		return d.off
	}
	return d.off + int(n)
}

// Array reads an array whose elements have the given alignment; element reads
// each of them, at least one byte.
func (d *Decoder) Array(alignment int, element func()) {
	end := d.array(alignment)
	for d.err == nil && d.off < end {
		d.pad(alignment)
		element()
	}
	if d.off != end {
		d.fail("array of a wrong length")
	}
}

// Strings reads an as.
func (d *Decoder) Strings() []string {
	var list []string
	d.Array(4, func() { list = append(list, d.String()) })
	if d.err != nil {
		return nil
	}
	return list
}

// Dict reads an a{ss}. twice is a key that occurs more than once, which the
// specification leaves without a meaning.
func (d *Decoder) Dict() (dict map[string]string, twice string, dup bool) {
	dict = map[string]string{}
	d.Array(8, func() {
		k, v := d.String(), d.String()
		if _, ok := dict[k]; ok && d.err == nil {
			twice, dup = k, true
		}
		dict[k] = v
	})
	if d.err != nil {
		return nil, "", false
	}
	return dict, twice, dup
}

// VariantSignature reads the signature that starts a v; the value follows.
func (d *Decoder) VariantSignature() string {
	if d.err != nil {
		return ""
	}
	b, off, err := readSignature([]byte(d.body), d.off)
	if err == nil && !oneType(b) {
		err = malformed("a variant holds one value")
	}
	if err != nil {
		d.err = err
		return ""
	}
	d.off = off
	return string(b)
}

// Variant reads a v that holds an i, a u or an x; sig says which. Another one is
// an error.
func (d *Decoder) Variant() (sig string, value int64) {
	switch sig = d.VariantSignature(); sig {
	case "i":
		return sig, int64(int32(d.Uint32()))
	case "u":
		return sig, int64(d.Uint32())
	case "x":
		return sig, int64(d.Uint64())
	}
	d.fail("not a number")
	return "", 0
}

// Bool reads a b.
func (d *Decoder) Bool() bool {
	n := d.Uint32()
	if n > 1 {
		d.fail("a boolean is 0 or 1")
	}
	return n == 1
}

// Skip checks whatever values of the signature sig come next and leaves them
// out.
func (d *Decoder) Skip(sig string) {
	if d.err != nil {
		return
	}
	off, err := skip([]byte(d.body), d.off, []byte(sig), d.big, 0)
	if err != nil {
		d.err = err
		return
	}
	d.off = off
}
