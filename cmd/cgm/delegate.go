package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/spf13/cobra"
)

// delegatedEnv tells the command where the cgroup is that was delegated to it.
const delegatedEnv = "CGM_CGROUP"

func (o *options) delegateCommand() *cobra.Command {
	var sets, controllers []string
	cmd := &cobra.Command{
		Use:   "delegate NAME [--set KEY=VALUE]… [--controller CONTROLLER]… [-- COMMAND [ARGUMENT]…]",
		Short: "Give a cgroup to a container runtime to manage by itself",
		Long: `delegate creates the cgroup NAME if need be, sets its limits, and makes it the
caller's to manage without the daemon: cgroups can be made, limited and filled
below it, as with 'systemd-run --user --scope -p Delegate=yes'. Its own limits are
fixed from then on: the host's root alone can change them.

Without a COMMAND delegate prints the cgroup's path. With one it moves itself into
the cgroup and executes COMMAND, with the path in the environment variable
CGM_CGROUP; what delegate created is removed when the last process has left it. A
rootless runc makes its containers there without a flag. crun and podman have to
be told, and run without limits if they are not; delegate prints how, on
standard error.

The exit status is as for run.`,
		Example:               "  cgm delegate ci --set memory.limit=4G -- runc run job\n  cgm delegate ci -- sh -c 'podman --cgroup-manager=cgroupfs run --cgroup-parent=$CGM_CGROUP -m 1g alpine'",
		GroupID:               groupCgroups,
		DisableFlagsInUseLine: true,
		Args: positional(func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			switch {
			case len(args) == 0 || dash == 0:
				return errors.New("want a NAME")
			case dash > 1 || dash < 0 && len(args) > 1:
				return errors.New("want one NAME, and -- before the COMMAND")
			case dash == len(args):
				return errors.New("want a COMMAND after --")
			}
			return nil
		}),
		ValidArgsFunction: o.completeNameAndCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := parseSettings(sets)
			if err != nil {
				return &usageError{cmd, err}
			}
			name, command := args[0], args[1:]
			if len(command) == 0 {
				path, err := o.delegate(cmd.Context(), name, controllers, values, nil)
				if err == nil {
					_, err = fmt.Fprintln(cmd.OutOrStdout(), escape(path))
				}
				return err
			}
			program, err := exec.LookPath(command[0])
			if err != nil {
				return notExecutable(command[0], err)
			}
			path, err := o.delegate(cmd.Context(), name, controllers, values, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if err := os.Setenv(delegatedEnv, path); err != nil {
				return err
			}
			return notExecutable(command[0], syscall.Exec(program, command, os.Environ()))
		},
	}
	cmd.Flags().StringArrayVarP(&sets, "set", "s", nil, "set `KEY=VALUE` before it is given away (repeatable)")
	cmd.Flags().StringArrayVarP(&controllers, "controller", "c", nil, "delegate `CONTROLLER` (repeatable); all that there are if none is named")
	return cmd
}

// delegate creates and delegates the cgroup and returns its path. With a writer
// it tells that how to use the cgroup, and moves this process into it. On an
// error nothing is left behind.
func (o *options) delegate(ctx context.Context, name string, controllers []string, values map[string]string, advice io.Writer) (string, error) {
	c, ctx, done, err := o.dial(ctx)
	if err != nil {
		return "", err
	}
	defer done()

	made := creations{temporary: advice != nil}
	if err := made.create(ctx, c, name, controllers, values); err != nil {
		return "", made.undo(ctx, c, advise(err, controllers))
	}
	path, err := c.Delegate(ctx, name, controllers)
	if err != nil {
		return "", made.undo(ctx, c, advise(err, controllers))
	}
	if advice == nil {
		return path, nil
	}
	// From the move on this process makes no thread, for which there may be no
	// room: see client.Enter.
	printAdvice(advice, path)
	return path, enter(ctx, c, name, &made)
}

// printAdvice says how runtimes find the cgroup at path.
func printAdvice(w io.Writer, path string) {
	shown := escape(path)
	fmt.Fprintf(w, "cgm: delegated %s; runc needs no flag\n", shown)
	fmt.Fprintf(w, "cgm: crun --cgroup-manager=cgroupfs, with \"cgroupsPath\": \"%s/CONTAINER\" in config.json\n", shown)
	fmt.Fprintf(w, "cgm: podman --cgroup-manager=cgroupfs run --cgroup-parent=%s\n", shown)
}
