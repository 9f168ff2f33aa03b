package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"cgmanager/api/client"
)

// node is a cgroup as tree shows it.
type node struct {
	Name string `json:"name"`
	// Tasks counts the processes in the cgroup itself, Hidden those of them
	// that the caller cannot see.
	Tasks  int    `json:"tasks"`
	Hidden uint32 `json:"hidden"`
	// Values holds the keys that the cgroup has.
	Values map[string]string `json:"values"`
	depth  int
}

// treeKeys are the values that tree shows.
var treeKeys = []string{"memory.usage", "memory.limit", "pids.usage", "pids.limit", "cpus_number", "state"}

// maxNodes bounds what tree shows: other people make cgroups too.
const maxNodes = 10000

func (o *options) treeCommand() *cobra.Command {
	var (
		asJSON bool
		depth  int
	)
	cmd := &cobra.Command{
		Use:   "tree [NAME]",
		Short: "Show cgroups with their processes, limits and usage",
		Long: `tree shows the cgroup NAME, or the caller's own, and those below it: the number of
processes in each (and of those that the caller cannot see), memory and process
ids in use and their limits, the limit of cpus, and whether it is frozen. A "-"
is a value that the cgroup does not have.`,
		GroupID:               groupCgroups,
		Args:                  positional(between(0, 1)),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     o.completeName,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				nodes, err := walk(ctx, c, name, depth)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), nodes)
				}
				return printTree(cmd.OutOrStdout(), nodes)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().IntVarP(&depth, "depth", "d", math.MaxInt, "go down `N` levels; all that there are if not given")
	cmd.Flags().Lookup("depth").DefValue = "0" // which the help does not show
	return cmd
}

// walk returns the cgroup and those below it, each before its children.
func walk(ctx context.Context, c *client.Client, name string, levels int) ([]node, error) {
	var nodes []node
	var visit func(name string, depth int) error
	visit = func(name string, depth int) error {
		if len(nodes) == maxNodes {
			return fmt.Errorf("more than %d cgroups", maxNodes)
		}
		pids, hidden, err := c.ListTasks(ctx, name)
		if err != nil {
			return err
		}
		children, err := c.ListChildren(ctx, name)
		if err != nil {
			return err
		}
		nodes = append(nodes, node{name, len(pids), hidden, values(ctx, c, name), depth})
		if depth == levels {
			return nil
		}
		for _, child := range children {
			// One that has gone meanwhile, or that others keep to themselves,
			// does not hide its siblings.
			if err := visit(join(name, child), depth+1); err != nil && !isRefusal(err) {
				return err
			}
		}
		return nil
	}
	if err := visit(name, 0); err != nil {
		return nil, err
	}
	return nodes, nil
}

// values reads those of treeKeys that the cgroup has.
func values(ctx context.Context, c *client.Client, name string) map[string]string {
	if all, err := c.GetValue(ctx, name, treeKeys...); err == nil {
		return all
	}
	// GetValue answers all or nothing: one by one, then.
	vs := make(map[string]string)
	for _, key := range treeKeys {
		if v, err := c.GetValue(ctx, name, key); err == nil {
			vs[key] = v[key]
		}
	}
	return vs
}

func printTree(w io.Writer, nodes []node) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CGROUP\tTASKS\tMEMORY\tLIMIT\tPIDS\tLIMIT\tCPUS\tSTATE")
	for _, n := range nodes {
		label := n.Name[strings.LastIndexByte(n.Name, '/')+1:]
		if n.depth == 0 {
			label = n.Name
			if label == "" {
				label = "."
			}
		}
		tasks := strconv.Itoa(n.Tasks)
		if n.Hidden > 0 {
			tasks += fmt.Sprintf("+%d", n.Hidden)
		}
		fmt.Fprintf(t, "%s%s\t%s", strings.Repeat("  ", n.depth), escape(label), tasks)
		for _, key := range treeKeys {
			v, ok := n.Values[key]
			switch {
			case !ok:
				v = "-"
			case strings.HasPrefix(key, "memory."):
				v = size(v)
			}
			fmt.Fprintf(t, "\t%s", escape(v))
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

// size shortens a number of bytes; what is no number stays as it is.
func size(s string) string {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n < 1<<10 {
		return s
	}
	f, units := float64(n)/(1<<10), "KMGTPE"
	for f >= 1<<10 && len(units) > 1 {
		f /= 1 << 10
		units = units[1:]
	}
	return strconv.FormatFloat(f, 'f', 1, 64) + units[:1]
}
