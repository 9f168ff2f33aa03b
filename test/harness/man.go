package harness

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// SameFlags fails the test if the manual page in the file page, in Markdown, describes
// other flags than help, which is what the program prints for --help.
func SameFlags(t *testing.T, help, page string) {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	// A flag is described below a line that begins with it.
	var terms strings.Builder
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "**-") {
			terms.WriteString(line)
		}
	}
	flags := func(text, expression string) []string {
		var found []string
		for _, m := range regexp.MustCompile(expression).FindAllStringSubmatch(text, -1) {
			found = append(found, m[1])
		}
		slices.Sort(found)
		return slices.Compact(found)
	}
	inPage, inHelp := flags(terms.String(), `\*\*--([a-z-]+)\*\*`), flags(help, `(?m)^  (?:-.,|   ) --([a-z-]+)`)
	if len(inHelp) == 0 || !slices.Equal(inPage, inHelp) {
		t.Errorf("the manual page has\n%q, --help\n%q", inPage, inHelp)
	}
}
