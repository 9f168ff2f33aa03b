package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"cgmanager/api/client"
)

// The exit codes of a shell for a command that it cannot execute
// (POSIX.1-2017, XCU 2.8.2).
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// execError says that the command could not be executed.
type execError struct {
	code int
	err  error
}

func (e *execError) Error() string { return e.err.Error() }
func (e *execError) Unwrap() error { return e.err }

func (o *options) runCommand() *cobra.Command {
	var sets, controllers []string
	cmd := &cobra.Command{
		Use:   "run NAME [--set KEY=VALUE]… [--controller CONTROLLER]… -- COMMAND [ARGUMENT]…",
		Short: "Run a command in a cgroup of its own",
		Long: `run creates the cgroup NAME, sets its limits, moves itself into it and executes
COMMAND. What run created is removed when the last process has left it. If NAME
exists already, COMMAND joins it, and the cgroup stays.

The exit status is COMMAND's; 126 if it could not be executed, 127 if it was
not found, 1 if the daemon refused, 2 for a misuse.`,
		Example: "  cgm run build --set memory.limit=2G --set pids.limit=200 -- make -j4",
		GroupID: groupCgroups,
		Args: positional(func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return errors.New("want a NAME and a COMMAND")
			}
			if dash := cmd.ArgsLenAtDash(); dash > 1 {
				return errors.New("want one NAME before --")
			}
			return nil
		}),
		DisableFlagsInUseLine: true,
		ValidArgsFunction:     o.completeNameAndCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := parseSettings(sets)
			if err != nil {
				return &usageError{cmd, err}
			}
			// Found before anything is created: the usual mistake leaves
			// nothing to clean up.
			path, err := exec.LookPath(args[1])
			if err != nil {
				return notExecutable(args[1], err)
			}
			if err := o.enter(cmd.Context(), args[0], controllers, values); err != nil {
				return err
			}
			// From here on what was created goes when this process ends.
			return notExecutable(args[1], syscall.Exec(path, args[1:], os.Environ()))
		},
	}
	cmd.Flags().StringArrayVarP(&sets, "set", "s", nil, "set `KEY=VALUE` on the new cgroup (repeatable)")
	cmd.Flags().StringArrayVarP(&controllers, "controller", "c", nil, "create the cgroup in the hierarchy of `CONTROLLER` (repeatable); all of them if none is named")
	return cmd
}

func notExecutable(name string, err error) error {
	if e, ok := errors.AsType[*exec.Error](err); ok {
		err = e.Err
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	}
	code := exitNotExecutable
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		code = exitNotFound
		err = errors.New("command not found")
	}
	return &execError{code, fmt.Errorf("%s: %w", name, err)}
}

// enter creates the cgroup and moves this process into it. On an error nothing
// is left behind.
func (o *options) enter(ctx context.Context, name string, controllers []string, values map[string]string) error {
	c, ctx, done, err := o.dial(ctx)
	if err != nil {
		return err
	}
	defer done()

	made := creations{temporary: true}
	if err := made.create(ctx, c, name, controllers, values); err != nil {
		return made.undo(ctx, c, advise(err, controllers))
	}
	return enter(ctx, c, name, &made)
}

// enter moves this process into the cgroup, and undoes what was made for it if
// that fails.
func enter(ctx context.Context, c *client.Client, name string, made *creations) error {
	err := c.Enter(ctx, name)
	if err == nil {
		return nil
	}
	// Enter has ended the connection: undo has another.
	again, dialErr := client.DialAddress(context.WithoutCancel(ctx), c.Address())
	if dialErr != nil {
		return err
	}
	defer func() { _ = again.Close() }()
	return made.undo(ctx, again, err)
}

// advisedError is a refusal with advice that only cgm can give.
type advisedError struct {
	error
	hint string
}

func (e *advisedError) Hint() string  { return e.hint }
func (e *advisedError) Unwrap() error { return e.error }

// advise tells who has no part of the tree, or of some hierarchies only, and named
// none, what to do, unless the daemon knows better.
func advise(err error, controllers []string) error {
	if len(controllers) > 0 || !client.IsDenied(err) {
		return err
	}
	if e, ok := errors.AsType[*client.Error](err); ok && e.Hint() != "" {
		return err
	}
	return &advisedError{err, "have root give you a cgroup (cgm create, chown, movepid); if it is one of some controllers only, name those with --controller"}
}

// creations are the cgroups that run or delegate has made, outermost first, each
// with the controllers in whose hierarchies it was not there before.
type creations struct {
	made []creation
	// temporary ones are marked to be removed once empty.
	temporary bool
}

type creation struct {
	name        string
	controllers []string
}

// create makes the cgroup and its missing parents one by one, so that it is
// known which of them are new.
func (made *creations) create(ctx context.Context, c *client.Client, name string, controllers []string, values map[string]string) error {
	wanted := controllers
	if len(wanted) == 0 {
		all, err := c.ListControllers(ctx)
		if err != nil {
			return err
		}
		wanted = slices.DeleteFunc(all, func(s string) bool { return strings.HasPrefix(s, "name=") })
	}
	for i := range len(name) + 1 {
		leaf := i == len(name)
		if !leaf && name[i] != '/' {
			continue
		}
		level := name[:i]
		before, err := existsIn(ctx, c, level)
		if err != nil {
			return err
		}
		missing := slices.ContainsFunc(wanted, func(s string) bool { return !slices.Contains(before, s) })
		switch {
		case leaf:
			_, err = c.Create(ctx, level, controllers, values)
		case missing:
			_, err = c.Create(ctx, level, controllers, nil)
		default:
			continue
		}
		if err != nil {
			return err
		}
		after, err := existsIn(ctx, c, level)
		if err != nil {
			return err
		}
		fresh := slices.DeleteFunc(after, func(s string) bool { return slices.Contains(before, s) })
		if len(fresh) == 0 {
			continue
		}
		if len(controllers) == 0 && len(before) == 0 {
			// A v2 hierarchy beside v1 ones that have every controller has no other name.
			fresh = []string{"all"}
		}
		made.made = append(made.made, creation{level, fresh})
		if !made.temporary {
			continue
		}
		if err := c.RemoveOnEmpty0(ctx, strings.Join(fresh, ","), level); err != nil {
			return err
		}
	}
	return nil
}

// undo removes what was made, innermost first, where it was made and nowhere
// else, and returns err, with what went wrong with that. The request may have
// failed because its time was up or the user has interrupted it: undo has a
// time of its own.
func (made *creations) undo(ctx context.Context, c *client.Client, err error) error {
	ctx = context.WithoutCancel(ctx)
	for _, m := range slices.Backward(made.made) {
		if _, undoErr := c.Remove0(ctx, strings.Join(m.controllers, ","), m.name, false); undoErr != nil {
			err = fmt.Errorf("%w; and %q is left behind: %w", err, m.name, undoErr)
		}
	}
	return err
}

// existsIn returns the controllers in whose hierarchies the cgroup exists.
func existsIn(ctx context.Context, c *client.Client, name string) ([]string, error) {
	controllers, err := c.ListControllersOf(ctx, name)
	if client.IsNotFound(err) {
		return nil, nil
	}
	return controllers, err
}
