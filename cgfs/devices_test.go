package cgfs

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func policyOf(t testing.TB, encoded string) devicePolicy {
	t.Helper()
	p, err := decodeDevicePolicy(encoded)
	check(t, err)
	return p
}

func TestParseDeviceRule(t *testing.T) {
	for _, row := range []struct {
		in, want string // "" is refused
	}{
		{"c 1:3 rwm", "c 1:3 rwm"},
		{"b 8:16 mr", "b 8:16 rm"},
		{"c *:* m", "c *:* m"},
		{"c 136:* rw\n", "c 136:* rw"},
		{" \t c\t00000000001:3\vr ", "c 1:3 r"},
		{"c 4294967295:1 r", "c *:1 r"},
		{"c 1:3 rrr", "c 1:3 r"},
		{"c 1:3 rwm and more", "c 1:3 rwm"},
		{"c 1:3 r\nc 1:5 r", "c 1:3 r"},
		{"a", "all"},
		{"a *:* rwm", "all"},
		{"anything", "all"},
		{"", ""},
		{" ", ""},
		{"x 1:3 r", ""},
		{"C 1:3 r", ""},
		{"c", ""},
		{"c1:3 r", ""},
		{"c  1:3 r", ""},
		{"c 1:3", ""},
		{"c 1:3 ", ""},
		{"c 1:3  r", ""},
		{"c 1 3 r", ""},
		{"c :3 r", ""},
		{"c 1: r", ""},
		{"c -1:3 r", ""},
		{"c 1:-3 r", ""},
		{"c 0x1:3 r", ""},
		{"c 4294967296:1 r", ""},
		{"c 000000000001:1 r", ""},
		{"c **:1 r", ""},
		{"c 1:*1 r", ""},
		{"c 1:3 x", ""},
		{"c 1:3 rx", ""},
		{"c 1:3 r w", ""},
	} {
		e, all, err := parseDeviceRule(row.in)
		got := e.String()
		switch {
		case err != nil:
			wantErr(t, row.in, err, unix.EINVAL)
			got = ""
		case all:
			got = "all"
		}
		if got != row.want {
			t.Errorf("%q: got %q, want %q", row.in, got, row.want)
		}
	}
}

// Each row is a cgroup's rules and its parent's, a write, and the rules after
// it or why it is refused.
func TestDevicePolicyChange(t *testing.T) {
	const everything = "allow\n"
	for _, row := range []struct {
		name, parent, now, file, rule string
		children                      bool
		want                          string
		err                           error
	}{
		{"deny all", everything, everything, "deny", "a", false, "deny\n", nil},
		{"deny all, children", everything, everything, "deny", "a", true, "", unix.EINVAL},
		{"allow all", everything, "deny\nc 1:3 r\n", "allow", "a", false, everything, nil},
		{"allow all, children", everything, "deny\n", "allow", "a", true, "", unix.EINVAL},
		{"allow all below a whitelist", "deny\nc *:* rwm\n", "deny\n", "allow", "a", false, "", unix.EPERM},
		{"allow all copies what the parent lacks", "allow\nc 1:3 w\n", "deny\n", "allow", "a", false, "allow\nc 1:3 w\n", nil},
		{"malformed", everything, everything, "deny", "c 1:3", false, "", unix.EINVAL},

		{"deny one", everything, everything, "deny", "c 1:3 w", false, "allow\nc 1:3 w\n", nil},
		{"deny more of one", everything, "allow\nc 1:3 w\n", "deny", "c 1:3 r", false, "allow\nc 1:3 rw\n", nil},
		{"give one back", everything, "allow\nc 1:3 rw\n", "allow", "c 1:3 r", false, "allow\nc 1:3 w\n", nil},
		{"give back what the parent lacks", "allow\nc 1:3 r\n", "allow\nc 1:3 rw\n", "allow", "c 1:3 r", false, "", unix.EPERM},
		{"give back more than the parent has", "allow\nc 1:3 r\n", "allow\nc 1:3 rw\n", "allow", "c *:* rwm", false, "", unix.EPERM},
		{"a part of an exception is none", everything, "allow\nc 1:* r\n", "allow", "c 1:3 r", false, "allow\nc 1:* r\n", nil},

		{"allow one", everything, "deny\n", "allow", "c 1:3 rw", false, "deny\nc 1:3 rw\n", nil},
		{"allow one that the parent lacks a part of", "allow\nc 1:3 m\n", "deny\n", "allow", "c 1:* rwm", false, "", unix.EPERM},
		{"allow one of a whitelist's", "deny\nc 1:* rw\n", "deny\n", "allow", "c 1:3 r", false, "deny\nc 1:3 r\n", nil},
		{"allow more than a whitelist's", "deny\nc 1:3 rw\n", "deny\n", "allow", "c 1:* r", false, "", unix.EPERM},
		{"allow what two of a whitelist have together", "deny\nc 1:* r\nc 1:3 w\n", "deny\n", "allow", "c 1:3 rw", false, "", unix.EPERM},
		{"a block device is no character device", "deny\nc 1:3 rwm\n", "deny\n", "allow", "b 1:3 r", false, "", unix.EPERM},
		{"take one", everything, "deny\nc 1:3 rw\n", "deny", "c 1:3 w", false, "deny\nc 1:3 r\n", nil},
		{"take a part of one", everything, "deny\nc 1:* r\n", "deny", "c 1:3 r", false, "deny\nc 1:* r\n", nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			next, _, err := policyOf(t, row.now).change(row.rule, row.file == "allow", policyOf(t, row.parent), row.children)
			wantErr(t, "error", err, row.err)
			if err == nil && next.encode() != row.want {
				t.Errorf("got %q, want %q", next.encode(), row.want)
			}
		})
	}
}

// What a cgroup loses, those below lose.
func TestDevicePolicyLose(t *testing.T) {
	for _, row := range []struct{ name, above, child, rule, want string }{
		{"both allow", "allow\nc 1:3 w\n", "allow\nc 1:5 w\n", "c 1:3 w", "allow\nc 1:5 w\nc 1:3 w\n"},
		{"the very rule", "deny\n", "deny\nc 1:3 rw\n", "c 1:3 w", "deny\n"},
		{"a rule within it", "deny\nc 1:5 r\n", "deny\nc 1:3 r\nc 1:5 r\n", "c *:* r", "deny\nc 1:5 r\n"},
		{"a rule around it", "allow\nc 1:3 w\n", "deny\nc *:* rwm\nb 8:0 r\n", "c 1:3 w", "deny\nb 8:0 r\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			e, _, err := parseDeviceRule(row.rule)
			check(t, err)
			above := policyOf(t, row.above)
			if got := policyOf(t, row.child).lose(e, above, above).encode(); got != row.want {
				t.Errorf("got %q, want %q", got, row.want)
			}
		})
	}
}

// A full list below stops nobody from taking something away.
func TestDevicePolicyFull(t *testing.T) {
	full := devicePolicy{allow: true}
	for i := range maxDeviceRules {
		full = full.with(deviceException{'c', 7, uint32(i), accessAll})
	}
	e := deviceException{'c', 1, 3, accessAll}
	above := devicePolicy{allow: true}.with(e)
	if got := full.lose(e, above, above); !got.equal(full) {
		t.Errorf("got %d rules", len(got.exceptions))
	}
	if back := policyOf(t, full.encode()); !back.equal(full) || len(full.encode()) > maxDevicesMark {
		t.Errorf("%d bytes are not read back", len(full.encode()))
	}
	if _, err := decodeDevicePolicy(full.with(e).encode()); err == nil {
		t.Error("more rules than there may be are accepted")
	}
}

func FuzzParseDeviceRule(f *testing.F) {
	for _, s := range []string{"a", "c 1:3 rwm", "b *:* r", "c 4294967295:0 m", "c 1:3 \nx", "\xa0c\xa01:3 r"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, all, err := parseDeviceRule(s)
		if err != nil || all || e.access == 0 {
			return
		}
		again, all, err := parseDeviceRule(e.String())
		if err != nil || all || again != e {
			t.Errorf("%q is %v, which is %v, %v, %v", s, e, again, all, err)
		}
	})
}

func FuzzDecodeDevicePolicy(f *testing.F) {
	for _, s := range []string{"allow\n", "deny\n", "deny\nc 1:3 rwm\nb *:7 m\n", "allow\nc 1:3 \n", "deny\nc 1:3 r\nc 1:3 w\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := decodeDevicePolicy(s)
		if err != nil {
			if !p.equal(devicePolicy{}) {
				t.Errorf("%q is refused, and is %v", s, p)
			}
			return
		}
		if p.encode() != s {
			t.Errorf("%q becomes %q", s, p.encode())
		}
	})
}

// FuzzDevicePolicy builds a policy below another one by any writes, and holds
// the one thing that matters against it: what the parent does not allow, it
// does not either.
func FuzzDevicePolicy(f *testing.F) {
	f.Add("pd a\npa c 1:3 rw\nca c 1:3 r\npd c 1:3 r")
	f.Add("pd c 1:* w\ncd a\nca c 1:3 r\nca b *:* rwm\npd b 1:3 m")
	f.Add("pd c 1:3 w\nca c *:* rwm\nca a")
	f.Fuzz(func(t *testing.T, script string) {
		all := devicePolicy{allow: true}
		parent, child, hasChild := all, all, false
		for line := range strings.Lines(script) {
			if len(line) < 3 {
				continue
			}
			give := line[1] == 'a'
			if line[0] == 'c' {
				if !hasChild {
					child, hasChild = parent, true
				}
				child, _, _ = child.change(line[3:], give, parent, false)
				continue
			}
			next, taken, err := parent.change(line[min(3, len(line)):], give, all, hasChild)
			if err != nil {
				continue
			}
			if parent = next; taken != nil && hasChild {
				child = child.lose(*taken, parent, parent)
			}
		}
		if !hasChild {
			return
		}
		for _, kind := range []byte{'b', 'c'} {
			for _, major := range []uint32{0, 1, 2, 8} {
				for _, minor := range []uint32{0, 1, 3, 5} {
					for a := deviceAccess(1); a <= accessAll; a++ {
						e := deviceException{kind, major, minor, a}
						if child.permits(e) && !parent.permits(e) {
							t.Fatalf("%v: allowed below %q by %q", e, parent.encode(), child.encode())
						}
					}
				}
			}
		}
	})
}

// permits is what the kernel asks when a device is used.
func (p devicePolicy) permits(e deviceException) bool {
	if p.allow {
		return !p.touches(e)
	}
	return p.covers(e)
}
