package cgfs

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of names, in bytes: those of the kernel (NAME_MAX, and PATH_MAX with
// its final zero byte).
const (
	maxComponent = 255
	maxPath      = 4095
)

// ValidName checks the name of a cgroup as a request gives it: "" (the
// requestor's own), "a", "a/b". It returns an error wrapping ErrName if the
// name starts or ends with "/", has an empty, "." or ".." component or one
// over 255 bytes, is not UTF-8, or has a control character (C0, DEL or C1).
func ValidName(name string) error {
	if name == "" {
		return nil
	}
	if err := checkRelative(name); err != nil {
		return err
	}
	if !presentable(name) {
		return fmt.Errorf("%w %q: not UTF-8, or a control character in it", ErrName, name)
	}
	return nil
}

// presentable reports whether a name can be shown to anybody: UTF-8 without
// control characters. The kernel itself allows any bytes but "/", "\n" and 0.
func presentable(name string) bool {
	return utf8.ValidString(name) && strings.IndexFunc(name, unicode.IsControl) < 0
}

// checkRelative checks the structure of a path below a directory; the bytes of
// its components are the kernel's business. The error does not repeat the
// path, which may have components that are not the caller's own words.
func checkRelative(rel string) error {
	if len(rel) > maxPath {
		return fmt.Errorf("%w: longer than %d bytes", ErrName, maxPath)
	}
	for c := range strings.SplitSeq(rel, "/") {
		if bad := badComponent(c); bad != "" {
			return fmt.Errorf("%w: %s", ErrName, bad)
		}
	}
	return nil
}

// badComponent says what is wrong with a component of a path, "" if nothing.
func badComponent(c string) string {
	switch {
	case c == "":
		return "an empty component"
	case c == "." || c == "..":
		return "a component is " + c
	case len(c) > maxComponent:
		return "a component is longer than 255 bytes"
	case strings.IndexByte(c, 0) >= 0:
		return "a zero byte in it"
	}
	return ""
}

// checkFile checks the name of a control file: one component.
func checkFile(name string) error {
	bad := badComponent(name)
	if bad == "" && strings.IndexByte(name, '/') >= 0 {
		bad = "more than one component"
	}
	if bad != "" {
		return fmt.Errorf("%w %q: %s", ErrName, name, bad)
	}
	return nil
}
