package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"cgmanager/api/client"
)

// status is what cgm status shows.
type status struct {
	Address string `json:"address"`
	// PID and UID are the daemon's, in the caller's namespaces: pid 0 is
	// outside of the caller's pid namespace.
	PID        int32              `json:"pid"`
	UID        uint32             `json:"uid"`
	Version    string             `json:"version"`
	APIVersion int32              `json:"api_version"`
	Cgroups    []controllerStatus `json:"cgroups"`
}

// controllerStatus is the caller's place in a controller's hierarchy.
type controllerStatus struct {
	Controller string `json:"controller"`
	// Cgroup is the caller's own cgroup as the daemon names it.
	Cgroup string `json:"cgroup,omitempty"`
	// Error says why the daemon does not tell.
	Error string `json:"error,omitempty"`
}

func (o *options) statusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show which daemon answers, and the caller's own cgroups",
		Long: `status shows the daemon's address, process, version and api version, its
controllers, and the caller's own cgroup in the hierarchy of each.`,
		GroupID:               groupCgroups,
		Args:                  positional(between(0, 0)),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				s, err := getStatus(ctx, c)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), s)
				}
				return s.print(cmd.OutOrStdout())
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func getStatus(ctx context.Context, c *client.Client) (*status, error) {
	s := &status{Address: c.Address()}
	var err error
	if s.PID, s.UID, _, err = c.Daemon(); err != nil {
		return nil, err
	}
	if s.Version, err = c.Version(ctx); client.IsUnknown(err) {
		s.Version = "none: the original cgmanager"
	} else if err != nil {
		return nil, err
	}
	if s.APIVersion, err = c.APIVersion0(ctx); err != nil {
		return nil, err
	}
	controllers, err := c.ListControllers0(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range controllers {
		cs := controllerStatus{Controller: name}
		cs.Cgroup, err = c.GetPidCgroupAbs0(ctx, name, int32(os.Getpid()))
		if err != nil {
			if !isRefusal(err) {
				return nil, err
			}
			cs.Error = err.Error()
		}
		s.Cgroups = append(s.Cgroups, cs)
	}
	return s, nil
}

func (s *status) print(w io.Writer) error {
	daemon := fmt.Sprintf("pid %d, uid %d", s.PID, s.UID)
	if s.PID == 0 {
		daemon = "outside of this pid namespace"
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "address\t%s\ndaemon\t%s\nversion\t%s\napi version\t%d\n\nCONTROLLER\tOWN CGROUP\n",
		escape(s.Address), daemon, escape(s.Version), s.APIVersion)
	for _, c := range s.Cgroups {
		cgroup := c.Cgroup
		if c.Error != "" {
			cgroup = "- (" + c.Error + ")"
		}
		fmt.Fprintf(t, "%s\t%s\n", escape(c.Controller), escape(cgroup))
	}
	return t.Flush()
}

// isRefusal reports whether err is the daemon's answer to one request, after
// which others may be made.
func isRefusal(err error) bool {
	_, ok := errors.AsType[*client.Error](err)
	return ok
}
