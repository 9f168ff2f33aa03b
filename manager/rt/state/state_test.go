package state

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("whole", "12345678")
	write("long", "123456789")
	if err := os.Symlink("whole", in("link")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(in("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"absent": "",
		"whole":  "12345678",
		"long":   "more than 8 bytes",
		"link":   "too many levels of symbolic links",
		"fifo":   "not a file of the daemon's",
		".":      "not a file of the daemon's",
	} {
		b, err := Read(in(name), 8)
		if err != nil {
			if name == "absent" || name == "whole" || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", name, err)
			}
		} else if string(b) != want {
			t.Errorf("%s: %q, want %q", name, b, want)
		}
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(in("whole"), 1, -1); err != nil {
			t.Fatal(err)
		}
		if b, err := Read(in("whole"), 8); err == nil {
			t.Errorf("another's file is read: %q", b)
		}
	}
}

func TestReplace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(dir, "file")
	var last *os.File
	// What a daemon left that ended in the middle.
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", []byte("longer than all others"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"the first", "one", ""} {
		f, err := Replace(path, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if b, err := os.ReadFile(path); err != nil || string(b) != text {
			t.Errorf("%q, %v, want %q", b, err, text)
		}
		last = f
	}
	for range 2 {
		if _, err := last.WriteString("more "); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "more more " {
		t.Errorf("appended: %q, %v", b, err)
	}

	f, err := Replace(filepath.Join(dir, "made", "file"), nil)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	// What cannot be replaced is as it was, and nothing is left beside it.
	if _, err := Replace(filepath.Join(dir, "made"), []byte("x")); err == nil {
		t.Error("a directory is replaced")
	}
	if err := SetAside(path); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Remove(path); err != nil {
			t.Error(err)
		}
	}
	var names []string
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if err != nil || strings.Join(names, " ") != "file.bad made" {
		t.Errorf("left: %q, %v", names, err)
	}
}
