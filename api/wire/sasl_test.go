package wire

import (
	"errors"
	"strings"
	"testing"
)

const guid = "6426d77e283b8d96d92760be6b0280a3"

func isRoot(uid uint32) bool { return uid == 0 }

// The answers that the original daemon gives, but for the mechanisms that it
// offers beside EXTERNAL.
func TestSASL(t *testing.T) {
	ok := "OK " + guid + "\r\n"
	for _, row := range []struct{ name, in, want string }{
		{"nothing", "\x00", ""},
		{"no mechanism", "\x00AUTH\r\n", rejected},
		{"anonymous", "\x00AUTH ANONYMOUS\r\n", rejected},
		{"unknown mechanism", "\x00AUTH NOSUCH 30\r\n", rejected},
		{"root", "\x00AUTH EXTERNAL 30\r\n", ok},
		{"somebody else", "\x00AUTH EXTERNAL 31303030\r\n", rejected},
		{"asks for data", "\x00AUTH EXTERNAL\r\n", "DATA\r\n"},
		{"empty data", "\x00AUTH EXTERNAL\r\nDATA\r\n", "DATA\r\n" + ok},
		{"empty data with a space", "\x00AUTH EXTERNAL\r\nDATA \r\n", "DATA\r\n" + ok},
		{"data", "\x00AUTH EXTERNAL\r\nDATA 30\r\n", "DATA\r\n" + ok},
		{"wrong data", "\x00AUTH EXTERNAL\r\nDATA 31\r\n", "DATA\r\n" + rejected},
		{"empty identity", "\x00AUTH EXTERNAL \r\n", ok},
		{"second try", "\x00AUTH EXTERNAL 31\r\nAUTH EXTERNAL 30\r\n", rejected + ok},
		{"identity not hex", "\x00AUTH EXTERNAL 3x\r\n", rejected},
		{"identity of odd length", "\x00AUTH EXTERNAL 3\r\n", rejected},
		{"identity not a number", "\x00AUTH EXTERNAL 726f6f74\r\n", rejected},
		{"identity with a sign", "\x00AUTH EXTERNAL 2b30\r\n", rejected},
		{"identity too large", "\x00AUTH EXTERNAL 34323934393637323936\r\n", rejected},
		{"identity too long", "\x00AUTH EXTERNAL " + strings.Repeat("30", 11) + "\r\n", rejected},
		{"unknown command", "\x00FOO\r\n", "ERROR \"Unknown command\"\r\n"},
		{"empty line", "\x00\r\n", "ERROR \"Unknown command\"\r\n"},
		{"lower case", "\x00auth external 30\r\n", "ERROR \"Unknown command\"\r\n"},
		{"cancel nothing", "\x00CANCEL\r\n", "ERROR \"Not currently in an auth conversation\"\r\n"},
		{"cancel", "\x00AUTH EXTERNAL\r\nCANCEL\r\n", "DATA\r\n" + rejected},
		{"cancel after OK", "\x00AUTH EXTERNAL 30\r\nCANCEL\r\nNEGOTIATE_UNIX_FD\r\n", ok + rejected + "ERROR \"Need to authenticate first\"\r\n"},
		{"error", "\x00ERROR x\r\n", rejected},
		{"descriptors too early", "\x00NEGOTIATE_UNIX_FD\r\n", "ERROR \"Need to authenticate first\"\r\n"},
		{"data too early", "\x00DATA 30\r\n", "ERROR \"No data expected\"\r\n"},
		{"two conversations", "\x00AUTH EXTERNAL 30\r\nAUTH EXTERNAL 30\r\n", ok + "ERROR \"Already in an auth conversation\"\r\n"},
		{"all at once", "\x00AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\nrest", ok + "AGREE_UNIX_FD\r\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := NewSASL(guid, isRoot)
			used, out, err := s.Read([]byte(row.in), nil)
			if err != nil || string(out) != row.want {
				t.Errorf("got %q, %v; want %q", out, err, row.want)
			}
			if begun := strings.HasSuffix(row.in, "rest"); begun != s.Begun() || begun != s.FDs() {
				t.Errorf("begun %v, descriptors %v", s.Begun(), s.FDs())
			} else if begun {
				row.in = strings.TrimSuffix(row.in, "rest")
			}
			if used != len(row.in) {
				t.Errorf("used %d of %d bytes", used, len(row.in))
			}
		})
	}
	for _, in := range []string{
		"AUTH EXTERNAL\r\n", "\x00BEGIN\r\n", "\x00AUTH EXTERNAL\r\nBEGIN\r\n",
		"\x00AUTH EXTERNAL 31\r\nBEGIN\r\n", "\x00AUTH EXTERNAL 30\r\nERROR\r\nBEGIN\r\n",
		"\x00A\x00\r\n", "\x00\xff\r\n", "\x00A\nB\r\n",
		"\x00" + strings.Repeat("A", MaxLine+1), "\x00" + strings.Repeat("A\r\n", maxLines+1),
	} {
		if _, _, err := NewSASL(guid, isRoot).Read([]byte(in), nil); !errors.Is(err, ErrHandshake) {
			t.Errorf("%.30q: %v", in, err)
		}
	}
}

// However a handshake is cut into pieces, it comes to the same, and nobody
// but root begins.
func FuzzSASL(f *testing.F) {
	f.Add("\x00AUTH EXTERNAL 30\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n", 3)
	f.Add("\x00AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\nl\x01", 1)
	f.Add("\x00AUTH EXTERNAL 31\r\nCANCEL\r\nERROR\r\n", 7)
	f.Fuzz(func(t *testing.T, in string, piece int) {
		if piece < 1 {
			return
		}
		asked := false
		accepts := func(uid uint32) bool { asked = true; return uid == 0 }
		whole := NewSASL(guid, accepts)
		used, want, wantErr := whole.Read([]byte(in), nil)
		if used > len(in) {
			t.Fatalf("used %d of %d bytes", used, len(in))
		}
		if whole.Begun() && !asked && !strings.Contains(in, "AUTH EXTERNAL") {
			t.Fatal("begun by nobody")
		}
		pieces := NewSASL(guid, accepts)
		var out, pending []byte
		var err error
		for off := 0; off < len(in) && err == nil && !pieces.Begun(); off += piece {
			pending = append(pending, in[off:min(off+piece, len(in))]...)
			var n int
			n, out, err = pieces.Read(pending, out)
			pending = pending[n:]
		}
		if (err == nil) != (wantErr == nil) && len(in) < MaxLine || err == nil && wantErr == nil && string(out) != string(want) {
			t.Fatalf("in pieces of %d: %q, %v; whole: %q, %v", piece, out, err, want, wantErr)
		}
		if pieces.Begun() != whole.Begun() && wantErr == nil {
			t.Fatal("begun or not")
		}
	})
}
