package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// escape makes text from others harmless to a terminal: what is not printable
// becomes a Go escape sequence, all else stays as it is.
func escape(s string) string {
	return escapeBut(s, "")
}

// escapeValue is escape for a control file's content, in which newlines and
// tabs are layout.
func escapeValue(s string) string {
	return escapeBut(s, "\n\t")
}

func escapeBut(s, keep string) string {
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case unicode.IsPrint(r) || strings.ContainsRune(keep, r):
			b.WriteString(s[:n])
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
		s = s[n:]
	}
	return b.String()
}

// printJSON prints v as JSON, indented, with a newline at the end. JSON
// escapes control characters itself.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printValues prints the values of the keys as KEY=VALUE lines.
func printValues(w io.Writer, keys []string, values map[string]string) error {
	for _, k := range keys {
		// The further lines of a value do not look like a KEY=VALUE.
		v := strings.ReplaceAll(escapeValue(values[k]), "\n", "\n\t")
		if _, err := fmt.Fprintf(w, "%s=%s\n", escape(k), v); err != nil {
			return err
		}
	}
	return nil
}

// printLines prints the items, one a line, or all of them as a JSON array.
func printLines[T any](w io.Writer, asJSON bool, items []T) error {
	if asJSON {
		if items == nil {
			items = []T{}
		}
		return printJSON(w, items)
	}
	for _, item := range items {
		if _, err := fmt.Fprintln(w, escape(fmt.Sprint(item))); err != nil {
			return err
		}
	}
	return nil
}
