package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"cgmanager/api/client"
)

// cgroupCommands are the commands over CGManager1, which name no controller.
func (o *options) cgroupCommands() []*cobra.Command {
	return []*cobra.Command{
		o.runCommand(),
		o.delegateCommand(),
		o.treeCommand(),
		o.statusCommand(),
		o.getCommand(),
		o.setCommand(),
		o.action("kill", "Kill every process in a cgroup and below",
			func(ctx context.Context, c *client.Client, name string) error { return c.Kill(ctx, name) }),
		o.action("freeze", "Stop every process in a cgroup until it is thawed", setState("frozen")),
		o.action("thaw", "Let the processes of a frozen cgroup go on", setState("thawed")),
		o.rtCommand(),
	}
}

func setState(state string) func(context.Context, *client.Client, string) error {
	return func(ctx context.Context, c *client.Client, name string) error {
		return c.SetValue(ctx, name, map[string]string{"state": state})
	}
}

// action is a command that does one thing to one cgroup.
func (o *options) action(verb, short string, do func(context.Context, *client.Client, string) error) *cobra.Command {
	return &cobra.Command{
		Use:                   verb + " NAME",
		Short:                 short,
		GroupID:               groupCgroups,
		Args:                  positional(between(1, 1)),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     o.completeName,
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				return do(ctx, c, args[0])
			})
		},
	}
}

// with calls do with a connection to the daemon.
func (o *options) with(ctx context.Context, do func(context.Context, *client.Client) error) error {
	c, ctx, done, err := o.dial(ctx)
	if err != nil {
		return err
	}
	defer done()
	return do(ctx, c)
}

func (o *options) getCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "get NAME KEY…",
		Short: "Print values of a cgroup",
		Long: `get prints the value of each KEY of the cgroup NAME: the value alone for one KEY,
KEY=VALUE lines for several. A KEY is one of the abstract keys, which are the
same on every host (memory.limit, cpus_number, pids.usage, …; see
docs/KEYS.md), or a control file's name.`,
		Example:               "  cgm get build memory.usage\n  cgm get --json build memory.limit memory.usage pids.usage",
		GroupID:               groupCgroups,
		Args:                  positional(between(2, math.MaxInt)),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     o.completeName,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, keys := args[0], args[1:]
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				values, err := c.GetValue(ctx, name, keys...)
				if err != nil {
					return err
				}
				out := cmd.OutOrStdout()
				switch {
				case asJSON:
					return printJSON(out, values)
				case len(keys) == 1:
					_, err = fmt.Fprintln(out, escapeValue(values[keys[0]]))
					return err
				}
				return printValues(out, keys, values)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (o *options) setCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "set NAME KEY=VALUE…",
		Short: "Set values of a cgroup: all of them, or none on an error",
		Long: `set sets each KEY of the cgroup NAME to its VALUE. If one of them is refused none
is set. Keys are as for get.`,
		Example:               "  cgm set build memory.limit=1G cpus_number=1.5",
		GroupID:               groupCgroups,
		Args:                  positional(between(2, math.MaxInt)),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     o.completeName,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := parseSettings(args[1:])
			if err != nil {
				return &usageError{cmd, err}
			}
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				return c.SetValue(ctx, args[0], values)
			})
		},
	}
}

// parseSettings parses KEY=VALUE arguments.
func parseSettings(settings []string) (map[string]string, error) {
	values := make(map[string]string, len(settings))
	for _, s := range settings {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE", s)
		}
		if _, ok := values[k]; ok {
			return nil, errors.New("key " + k + " is given twice")
		}
		values[k] = v
	}
	return values, nil
}

// completeName completes the name of a cgroup for the shell, level by level.
func (o *options) completeName(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	parent := ""
	if i := strings.LastIndexByte(word, '/'); i >= 0 {
		parent = word[:i]
	}
	var names []string
	err := o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
		children, err := c.ListChildren(ctx, parent)
		for _, child := range children {
			names = append(names, join(parent, child))
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeNameAndCommand is completeName, for a command that executes another.
func (o *options) completeNameAndCommand(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return completeCommand(cmd, args, word)
	}
	return o.completeName(cmd, args, word)
}

// completeCommand leaves it to the shell to complete a command and its arguments.
func completeCommand(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// join returns the name of a cgroup's child.
func join(parent, child string) string {
	if parent == "" {
		return child
	}
	return parent + "/" + child
}
