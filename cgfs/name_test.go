package cgfs

import (
	"errors"
	"path"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestValidName(t *testing.T) {
	long := strings.Repeat("a", 255)
	for _, good := range []string{"", "a", "web/db", "a..b", "...", " ", "é", "a (deleted)", long, long + "/" + long} {
		if err := ValidName(good); err != nil {
			t.Errorf("ValidName(%q) = %v", good, err)
		}
	}
	for _, bad := range []string{
		"/", "/a", "a/", "a//b", ".", "..", "a/./b", "a/../b", "../a", "a/..", "\x00", "a\x00b", "a\nb", "a\x7fb", "a\u0085b",
		"a\xffb", long + "a", strings.Repeat("a/", 2100) + "a",
	} {
		if err := ValidName(bad); !errors.Is(err, ErrName) {
			t.Errorf("ValidName(%q) = %v, want ErrName", bad, err)
		}
	}
}

func TestValidFile(t *testing.T) {
	for _, good := range []string{"tasks", "memory.limit_in_bytes", "no.such"} {
		if err := ValidFile(good); err != nil {
			t.Errorf("ValidFile(%q) = %v", good, err)
		}
	}
	for _, bad := range []string{"", ".", "..", "/", "/tasks", "a/tasks", "../tasks", "tasks/", "tasks\n", "tasks\x00", "\xff"} {
		if err := ValidFile(bad); !errors.Is(err, ErrName) {
			t.Errorf("ValidFile(%q) = %v, want ErrName", bad, err)
		}
	}
}

func FuzzValidName(f *testing.F) {
	for _, s := range []string{"", "a/b", "../a", "a//b", "/", "a\x00", "a/./b", "x\x7f", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if ValidName(name) != nil {
			return
		}
		const base = "/hierarchy/own"
		joined := path.Join(base, name)
		if joined != base && !strings.HasPrefix(joined, base+"/") {
			t.Errorf("%q leads out, to %q", name, joined)
		}
		if name != "" && joined != base+"/"+name {
			t.Errorf("%q is not in its shortest form", name)
		}
		if !utf8.ValidString(name) || strings.ContainsAny(name, "\x00\n\x7f\x1b") {
			t.Errorf("%q accepted", name)
		}
	})
}
