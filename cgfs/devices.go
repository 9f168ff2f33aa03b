package cgfs

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Which devices a cgroup may use, and how that changes, is what the devices
// controller of v1 says (Documentation/admin-guide/cgroup-v1/devices.rst; where
// that is silent, security/device_cgroup.c): on v2, which has no such
// controller, the same writes get the same answers. This file has the rules
// alone, without the kernel.

// deviceAccess is a set of ways to use a device, with the kernel's numbers
// (BPF_DEVCG_ACC_* of linux/bpf.h).
type deviceAccess uint8

const (
	accessMknod deviceAccess = 1 << iota
	accessRead
	accessWrite
	accessAll = accessMknod | accessRead | accessWrite
)

// accessLetters are in the order in which v1 shows them.
var accessLetters = []struct {
	letter byte
	access deviceAccess
}{{'r', accessRead}, {'w', accessWrite}, {'m', accessMknod}}

func (a deviceAccess) String() string {
	var s []byte
	for _, l := range accessLetters {
		if a&l.access != 0 {
			s = append(s, l.letter)
		}
	}
	return string(s)
}

func accessOf(letter byte) (deviceAccess, bool) {
	for _, l := range accessLetters {
		if l.letter == letter {
			return l.access, true
		}
	}
	return 0, false
}

// anyNumber is "*", and on v1 the number 4294967295 too.
const anyNumber = ^uint32(0)

// deviceException is what a policy says of some devices, against its default.
type deviceException struct {
	kind         byte // 'b' or 'c'
	major, minor uint32
	access       deviceAccess
}

func (e deviceException) String() string {
	return fmt.Sprintf("%c %s:%s %s", e.kind, showDeviceNumber(e.major), showDeviceNumber(e.minor), e.access)
}

func showDeviceNumber(n uint32) string {
	if n == anyNumber {
		return "*"
	}
	return strconv.FormatUint(uint64(n), 10)
}

func (e deviceException) sameDevices(o deviceException) bool {
	return e.kind == o.kind && e.major == o.major && e.minor == o.minor
}

// covers reports whether e has all that o asks for (match_exception).
func (e deviceException) covers(o deviceException) bool {
	return e.kind == o.kind &&
		(e.major == anyNumber || e.major == o.major) &&
		(e.minor == anyNumber || e.minor == o.minor) &&
		o.access&^e.access == 0
}

// touches reports whether e has anything of o (match_exception_partial).
func (e deviceException) touches(o deviceException) bool {
	return e.kind == o.kind &&
		(e.major == anyNumber || o.major == anyNumber || e.major == o.major) &&
		(e.minor == anyNumber || o.minor == anyNumber || e.minor == o.minor) &&
		e.access&o.access != 0
}

// maxDeviceRules bounds the exceptions of one cgroup.
const maxDeviceRules = 512

// devicePolicy is what the cgroup may use: everything but the exceptions, or
// nothing but them. No two are of the same devices.
type devicePolicy struct {
	allow      bool
	exceptions []deviceException
}

func (p devicePolicy) equal(o devicePolicy) bool {
	return p.allow == o.allow && slices.Equal(p.exceptions, o.exceptions)
}

func (p devicePolicy) covers(e deviceException) bool {
	return slices.ContainsFunc(p.exceptions, func(x deviceException) bool { return x.covers(e) })
}

func (p devicePolicy) touches(e deviceException) bool {
	return slices.ContainsFunc(p.exceptions, func(x deviceException) bool { return x.touches(e) })
}

// with returns p with e among its exceptions.
func (p devicePolicy) with(e deviceException) devicePolicy {
	p.exceptions = slices.Clone(p.exceptions)
	for i := range p.exceptions {
		if p.exceptions[i].sameDevices(e) {
			p.exceptions[i].access |= e.access
			return p
		}
	}
	p.exceptions = append(p.exceptions, e)
	return p
}

// without returns p without what is said of exactly e's devices.
func (p devicePolicy) without(e deviceException) devicePolicy {
	var left []deviceException
	for _, x := range p.exceptions {
		if x.sameDevices(e) {
			if x.access &^= e.access; x.access == 0 {
				continue
			}
		}
		left = append(left, x)
	}
	p.exceptions = left
	return p
}

// permitsBelow reports whether a child whose default is childAllow may have the
// exception (verify_new_ex): it never gets what p lacks.
func (p devicePolicy) permitsBelow(e deviceException, childAllow bool) bool {
	switch {
	case !p.allow:
		return p.covers(e)
	case childAllow:
		return true // one more thing that it may not use
	}
	return !p.touches(e)
}

// change returns p after a write to devices.allow (give) or devices.deny of a
// cgroup below one with the policy parent. It returns EINVAL if the rule is
// malformed, or is of all devices in a cgroup with children, and EPERM if the
// parent does not have what is asked for. taken is what the cgroups below lose,
// if there is anything.
func (p devicePolicy) change(value string, give bool, parent devicePolicy, hasChildren bool) (_ devicePolicy, taken *deviceException, err error) {
	e, all, err := parseDeviceRule(value)
	switch {
	case err != nil:
		return p, nil, err
	case all && hasChildren:
		return p, nil, unix.EINVAL
	case all && !give:
		return devicePolicy{}, nil, nil
	case all && parent.allow:
		return parent, nil, nil
	case all:
		return p, nil, unix.EPERM
	case give && p.allow:
		if parent.touches(e) {
			return p, nil, unix.EPERM
		}
		return p.without(e), nil, nil
	case give:
		if !parent.permitsBelow(e, false) {
			return p, nil, unix.EPERM
		}
		return p.with(e), nil, nil
	case p.allow:
		return p.with(e), &e, nil
	}
	return p.without(e), &e, nil
}

// lose returns p after e was taken from a cgroup above, whose policy is top
// now, and which left parent to the cgroup just above (propagate_exception).
func (p devicePolicy) lose(e deviceException, top, parent devicePolicy) devicePolicy {
	if !top.allow || !p.allow {
		p = p.without(e)
	} else if next := p.with(e); len(next.exceptions) <= maxDeviceRules {
		// Else the program of the cgroup above has to do: who filled the list
		// of a cgroup must not keep those above from taking something away.
		p = next
	}
	if !slices.ContainsFunc(p.exceptions, func(x deviceException) bool { return !parent.permitsBelow(x, p.allow) }) {
		return p
	}
	left := slices.Clone(p.exceptions)
	p.exceptions = slices.DeleteFunc(left, func(x deviceException) bool { return !parent.permitsBelow(x, p.allow) })
	return p
}

// list is the content of devices.list: of a policy that allows by default v1
// does not show the exceptions.
func (p devicePolicy) list() string {
	if p.allow {
		return "a *:* rwm\n"
	}
	return p.lines()
}

func (p devicePolicy) lines() string {
	var s strings.Builder
	for _, e := range p.exceptions {
		s.WriteString(e.String())
		s.WriteByte('\n')
	}
	return s.String()
}

// Heads of an encoded policy.
const (
	headAllow = "allow\n"
	headDeny  = "deny\n"
)

// encode is the policy as it is kept with the cgroup: the default, then a line
// for each exception as devices.list has it.
func (p devicePolicy) encode() string {
	if p.allow {
		return headAllow + p.lines()
	}
	return headDeny + p.lines()
}

var errDevicePolicy = errors.New("malformed device rules")

// decodeDevicePolicy accepts what encode makes, and nothing else.
func decodeDevicePolicy(s string) (devicePolicy, error) {
	var p devicePolicy
	body, ok := strings.CutPrefix(s, headDeny)
	if !ok {
		body, p.allow = strings.CutPrefix(s, headAllow)
		if !p.allow {
			return p, errDevicePolicy
		}
	}
	for line := range strings.Lines(body) {
		e, ok := decodeException(line)
		if !ok || len(p.exceptions) == maxDeviceRules || slices.ContainsFunc(p.exceptions, e.sameDevices) {
			return devicePolicy{}, errDevicePolicy
		}
		p.exceptions = append(p.exceptions, e)
	}
	return p, nil
}

func decodeException(line string) (deviceException, bool) {
	f := strings.Split(strings.TrimSuffix(line, "\n"), " ")
	if len(f) != 3 || f[0] != "b" && f[0] != "c" {
		return deviceException{}, false
	}
	e := deviceException{kind: f[0][0]}
	var rest string
	e.major, rest, _ = cutDeviceNumber(f[1])
	e.minor, _, _ = cutDeviceNumber(strings.TrimPrefix(rest, ":"))
	for i := range len(f[2]) {
		a, _ := accessOf(f[2][i])
		e.access |= a
	}
	return e, e.String()+"\n" == line
}

// parseDeviceRule parses a rule as v1 does, which is lenient: what follows "a",
// or the three letters, does not matter, and all between a line's end and the
// end neither. all stands for a rule of all devices.
func parseDeviceRule(s string) (e deviceException, all bool, err error) {
	for s != "" && kernelSpace(s[0]) {
		s = s[1:]
	}
	for s != "" && kernelSpace(s[len(s)-1]) {
		s = s[:len(s)-1]
	}
	if s == "" {
		return e, false, unix.EINVAL
	}
	switch e.kind = s[0]; e.kind {
	case 'a':
		return e, true, nil
	case 'b', 'c':
	default:
		return e, false, unix.EINVAL
	}
	var ok bool
	if s, ok = cutSpace(s[1:]); !ok {
		return e, false, unix.EINVAL
	}
	if e.major, s, ok = cutDeviceNumber(s); !ok || !strings.HasPrefix(s, ":") {
		return e, false, unix.EINVAL
	}
	if e.minor, s, ok = cutDeviceNumber(s[1:]); !ok {
		return e, false, unix.EINVAL
	}
	if s, ok = cutSpace(s); !ok {
		return e, false, unix.EINVAL
	}
	for i := 0; i < len(s) && i < 3 && s[i] != '\n'; i++ {
		a, ok := accessOf(s[i])
		if !ok {
			return e, false, unix.EINVAL
		}
		e.access |= a
	}
	return e, false, nil
}

// kernelSpace is isspace of linux/ctype.h.
func kernelSpace(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' || c == 0xa0 }

func cutSpace(s string) (rest string, ok bool) {
	if s == "" || !kernelSpace(s[0]) {
		return "", false
	}
	return s[1:], true
}

// cutDeviceNumber cuts "*" or a number of at most 11 digits off the start.
func cutDeviceNumber(s string) (n uint32, rest string, ok bool) {
	if rest, ok = strings.CutPrefix(s, "*"); ok {
		return anyNumber, rest, true
	}
	digits := 0
	for digits < len(s) && digits < 11 && s[digits] >= '0' && s[digits] <= '9' {
		digits++
	}
	v, err := strconv.ParseUint(s[:digits], 10, 32)
	return uint32(v), s[digits:], err == nil
}
