// Command cgm asks the cgmanager daemon for cgroups and for realtime. docs/man/cgm.1
// describes it, docs/man/rtkitctl.8 what it does by that name.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cgmanager/api/client"
	"cgmanager/cmd/version"
)

// The exit codes, besides those of a shell for a command that cannot be
// executed (run.go).
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	var code int
	if filepath.Base(os.Args[0]) == rtkitctlName {
		code = rtkitctl(ctx, os.Args[1:], os.Stdout, os.Stderr)
	} else {
		code = run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	}
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	return report(stderr, err)
}

// usageError is a misuse of the command line, found before anything was done.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }
func (e *usageError) Hint() string  { return "see '" + e.cmd.CommandPath() + " --help'" }

// report prints err and returns the exit code that goes with it.
func report(w io.Writer, err error) int {
	prefix := "cgm: "
	if _, ok := errors.AsType[*originalError](err); ok {
		prefix = "" // scripts compare the original's text
	}
	fmt.Fprintln(w, prefix+escape(err.Error()))
	printHint(w, err)
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if e, ok := errors.AsType[*execError](err); ok {
		return e.code
	}
	return exitFailure
}

// printHint prints what to do about err, if that is known.
func printHint(w io.Writer, err error) {
	var hinted interface {
		error
		Hint() string
	}
	if errors.As(err, &hinted) && hinted.Hint() != "" {
		fmt.Fprintln(w, "hint: "+escape(hinted.Hint()))
	}
}

// options are the flags that every command has.
type options struct {
	address string
	timeout time.Duration
}

// check finds misuse of them.
func (o *options) check(cmd *cobra.Command) error {
	if o.timeout <= 0 {
		return &usageError{cmd, fmt.Errorf("--timeout %v: must be more than 0", o.timeout)}
	}
	if o.address != "" {
		if err := client.CheckAddress(o.address); err != nil {
			return &usageError{cmd, fmt.Errorf("--address: %w", err)}
		}
	}
	return nil
}

// dial connects to the daemon. The context it returns is that of the request:
// it ends with the timeout.
func (o *options) dial(ctx context.Context) (*client.Client, context.Context, context.CancelFunc, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	addresses := client.Addresses()
	if o.address != "" {
		addresses = []string{o.address}
	}
	c, err := client.DialAddress(ctx, addresses...)
	if err != nil {
		cancel()
		return nil, nil, nil, err
	}
	return c, ctx, func() { _ = c.Close(); cancel() }, nil
}

func newRoot() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   "cgm",
		Short: "Ask the cgroup manager for cgroups and for realtime",
		Long: `cgm asks the cgmanager daemon to create, limit, fill, list and remove cgroups, and
to grant threads realtime scheduling. Names of cgroups are relative to the
caller's own cgroup; "" is that cgroup. The daemon decides by who the caller is,
as the kernel says, wherever it runs: a host's shell, a container, or a container
in a container.`,
		Version:           version.String(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return &usageError{cmd, errors.New("no command given")}
			}
			return &usageError{cmd, fmt.Errorf("unknown command %q", args[0])}
		},
		// A name that is no command comes to RunE as an argument.
		Args:              cobra.ArbitraryArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return o.check(cmd) },
	}
	// No argument is a file, unless a command says so.
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetVersionTemplate("cgm {{.Version}}\n")
	root.PersistentFlags().StringVar(&o.address, "address", "", "D-Bus `ADDRESS` of the daemon, or the path of its socket")
	root.PersistentFlags().DurationVar(&o.timeout, "timeout", client.DefaultTimeout, "wait this `DURATION` for the daemon, such as 500ms or 1m")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{cmd, flagError(err)} })
	root.AddGroup(
		&cobra.Group{ID: groupCgroups, Title: "Commands:"},
		&cobra.Group{ID: groupOriginal, Title: "Commands of the original cgm, which name a controller:"},
	)
	root.AddCommand(o.cgroupCommands()...)
	root.AddCommand(o.originalCommands()...)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if name := cmd.Name(); name == "help" || name == "completion" {
			strict(cmd)
		}
	}
	return root
}

// strict has one of the library's commands take a word that it does not know for a
// misuse, not for a wish to see the help.
func strict(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.Run = nil
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		about := cmd
		if cmd.Name() == "help" {
			found, rest, err := cmd.Root().Find(args)
			if err != nil {
				rest = args
			}
			about, args = found, rest
		}
		if len(args) > 0 {
			return &usageError{cmd, fmt.Errorf("unknown command %q", args[0])}
		}
		return about.Help()
	}
}

// flagError is the library's error about a flag, without the name of a Go function.
func flagError(err error) error {
	invalid, ok := errors.AsType[*pflag.InvalidValueError](err)
	number, isNumber := errors.AsType[*strconv.NumError](err)
	if !ok || !isNumber {
		return err
	}
	return errors.New(strings.Replace(invalid.Error(), number.Error(), number.Err.Error(), 1))
}

// The groups of commands in the help.
const (
	groupCgroups  = "cgroups"
	groupOriginal = "original"
)

// positional wraps a check of positional arguments, so that its error is a
// misuse that shows what is wanted.
func positional(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &usageError{cmd, fmt.Errorf("%w; usage: %s", err, cmd.UseLine())}
		}
		return nil
	}
}

// between is a check for a number of positional arguments.
func between(least, most int) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return errors.New("an argument is missing")
		case len(args) > most:
			return fmt.Errorf("unexpected argument %q", args[most])
		}
		return nil
	}
}
