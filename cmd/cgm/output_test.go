package main

import (
	"strings"
	"testing"
)

func TestEscape(t *testing.T) {
	for _, c := range []struct{ name, in, want, value string }{
		{"plain", "web/db-1.service", "web/db-1.service", "web/db-1.service"},
		{"letters", "größe 日本", "größe 日本", "größe 日本"},
		{"backslash", `dev-disk\x2d`, `dev-disk\x2d`, `dev-disk\x2d`},
		{"terminal", "a\x1b]0;x\x07b", `a\x1b]0;x\ab`, `a\x1b]0;x\ab`},
		{"layout", "a\nb\tc\r", `a\nb\tc\r`, "a\nb\tc\\r"},
		{"not UTF-8", "a\xff\x9b[31m", `a\xff\x9b[31m`, `a\xff\x9b[31m`},
		{"C1 and bidi", "a\u009b\u202eb", `a\u009b\u202eb`, `a\u009b\u202eb`},
		{"quotes", `it's "a"`, `it's "a"`, `it's "a"`},
		{"replacement character", "a\ufffd", "a\ufffd", "a\ufffd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := escape(c.in); got != c.want {
				t.Errorf("escape(%q) = %q, want %q", c.in, got, c.want)
			}
			if got := escapeValue(c.in); got != c.value {
				t.Errorf("escapeValue(%q) = %q, want %q", c.in, got, c.value)
			}
		})
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[string]string{
		"0": "0", "1023": "1023", "1024": "1.0K", "1536": "1.5K",
		"1048576": "1.0M", "2147483648": "2.0G", "18446744073709551615": "16.0E",
		"max": "max", "": "", "-1": "-1",
	} {
		if got := size(in); got != want {
			t.Errorf("size(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestPrintLines(t *testing.T) {
	names := []string{"web", "a\x1b[31m\n"}
	for _, c := range []struct {
		name  string
		json  bool
		items []string
		want  string
	}{
		{"lines", false, names, "web\na\\x1b[31m\\n\n"},
		{"no lines", false, nil, ""},
		{"JSON", true, names, "[\n  \"web\",\n  \"a\\u001b[31m\\n\"\n]\n"},
		{"no JSON", true, nil, "[]\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b strings.Builder
			if err := printLines(&b, c.json, c.items); err != nil {
				t.Fatal(err)
			}
			if b.String() != c.want {
				t.Errorf("got %q, want %q", b.String(), c.want)
			}
		})
	}
}
