package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write the generated man pages")

// TestManPages proves that the committed man pages are those of the text in
// docs/man/*.md and of the commands as they are; `make man` writes them.
func TestManPages(t *testing.T) {
	const dir = "../../docs/man"
	for _, page := range []string{"cgm.1", "cgmanager.8", "cgmanager-realtime.toml.5", "cgproxy.8", "rtkitctl.8"} {
		t.Run(page, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join(dir, page+".md"))
			if err != nil {
				t.Fatal(err)
			}
			text = bytes.Replace(text, []byte("<!-- commands -->\n"), []byte(manCommands(newRoot())), 1)
			want := md2man.Render(text)
			path := filepath.Join(dir, page)
			if *update {
				if err := os.WriteFile(path, want, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s is not up to date: run make man", path)
			}
		})
	}
}

// manCommands describes the commands, group by group, as Markdown.
func manCommands(root *cobra.Command) string {
	var b strings.Builder
	for _, group := range root.Groups() {
		fmt.Fprintf(&b, "# %s\n\n", strings.ToUpper(strings.TrimSuffix(group.Title, ":")))
		for _, cmd := range root.Commands() {
			if cmd.GroupID != group.ID {
				continue
			}
			manCommand(&b, "", cmd)
			for _, sub := range cmd.Commands() {
				manCommand(&b, cmd.Name()+" ", sub)
			}
		}
	}
	return b.String()
}

func manCommand(b *strings.Builder, parent string, cmd *cobra.Command) {
	name, rest, _ := strings.Cut(cmd.Use, " ")
	fmt.Fprintf(b, "## **%s%s** %s\n\n%s.\n\n", parent, name, manMarkdown(rest), manMarkdown(cmd.Short))
	if cmd.Long != "" {
		fmt.Fprintf(b, "%s\n\n", manMarkdown(cmd.Long))
	}
	cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		value, usage := pflag.UnquoteUsage(f)
		fmt.Fprint(b, "**")
		if f.Shorthand != "" {
			fmt.Fprintf(b, "-%s**, **", f.Shorthand)
		}
		fmt.Fprintf(b, "--%s**", f.Name)
		if value != "" {
			fmt.Fprintf(b, " *%s*", value)
		}
		fmt.Fprintf(b, "\n: %s.\n\n", manMarkdown(usage))
	})
}

func manMarkdown(s string) string {
	return strings.NewReplacer("_", `\_`, "*", `\*`, "[", `\[`, "]", `\]`, "…", "...").Replace(s)
}
