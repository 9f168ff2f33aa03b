package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"cgmanager/api"
	"cgmanager/api/client"
)

// A grant is a thread's. rt run asks for one and executes the command in the same
// thread, which must be the process's first: execve(2) ends all the others, and what
// the daemon knows of the thread would not be true any more.
func init() { runtime.LockOSThread() }

func (o *options) rtCommand() *cobra.Command {
	list := o.rtListCommand()
	cmd := &cobra.Command{
		Use:   "rt",
		Short: "Realtime: show what is granted, grant, revoke",
		Long: `rt shows the grants of realtime and of high priority that the caller may know of:
its own, those of the processes that it has privilege over, all of them for the
host's root. Without a further word it is rt list.`,
		GroupID:               groupCgroups,
		DisableFlagsInUseLine: true,
		Args:                  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{cmd, fmt.Errorf("unknown command %q of rt", args[0])}
			}
			return list.RunE(cmd, args)
		},
	}
	cmd.Flags().AddFlagSet(list.Flags())
	cmd.AddCommand(list, o.rtGrantCommand(), o.rtRevokeCommand(), o.rtRunCommand(),
		o.rtLimitsCommand(), o.rtStatusCommand(), o.rtResetCommand())
	return cmd
}

func (o *options) rtListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show who was granted what, since when, and the CPU time used since",
		Long: `list shows a line for each thread, or for each process that was given resource
limits. A grant whose state is "demoted" is suspended: the watchdog has taken it
back for now.`,
		Args:                  positional(between(0, 0)),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				grants, err := c.ListGrants(ctx)
				if err != nil {
					return err
				}
				return printGrants(cmd.OutOrStdout(), asJSON, grants)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// grant is a grant as --json shows it.
type grant struct {
	PID uint32 `json:"pid"`
	// TID is left out of limits, which are a process's.
	TID uint32 `json:"tid,omitempty"`
	// UID is left out where it is not mapped in the caller's user namespace.
	UID *uint32 `json:"uid,omitempty"`
	// Command is the thread's name, as far as this process's /proc tells it.
	Command string    `json:"command,omitempty"`
	Policy  string    `json:"policy"`
	Level   int32     `json:"level"`
	Since   time.Time `json:"since"`
	// CPU is in seconds.
	CPU   float64 `json:"cpu_seconds"`
	State string  `json:"state"`
}

func printGrants(w io.Writer, asJSON bool, grants []api.Grant) error {
	shown := make([]grant, len(grants))
	for i, g := range grants {
		shown[i] = grant{
			PID: g.PID, TID: g.TID, Command: threadName(g.PID, g.TID), Policy: g.Policy, Level: g.Level,
			Since: time.Unix(g.Since, 0), CPU: float64(g.CPU) / 1e6, State: g.State,
		}
		if g.UID != api.NoID {
			shown[i].UID = &g.UID
		}
	}
	if asJSON {
		return printJSON(w, shown)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PID\tTID\tUID\tCOMMAND\tPOLICY\tLEVEL\tSINCE\tCPU\tSTATE")
	for _, g := range shown {
		tid, uid, level := "-", "-", "-"
		if g.TID != 0 {
			tid = strconv.FormatUint(uint64(g.TID), 10)
			level = strconv.Itoa(int(g.Level))
		}
		if g.UID != nil {
			uid = strconv.FormatUint(uint64(*g.UID), 10)
		}
		command := g.Command
		if command == "" {
			command = "-"
		}
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%.2fs\t%s\n", g.PID, tid, uid, escape(command),
			escape(g.Policy), level, g.Since.Format(time.DateTime), g.CPU, escape(g.State))
	}
	return t.Flush()
}

// threadName returns the name of a thread, or of a process where tid is 0, or "" where
// this process's /proc does not tell. It is there to be read by people, and nothing
// depends on it.
func threadName(pid, tid uint32) string {
	if tid == 0 {
		tid = pid
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/comm", pid, tid))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(name), "\n")
}

// wish is what is asked for by --policy and --priority, or by --nice.
type wish struct {
	policy         string
	priority, nice int32
}

// defaultPriority is what rtkit's own test client asks for.
const defaultPriority = 10

func (w *wish) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&w.policy, "policy", "rr", "scheduling `POLICY`: rr or fifo")
	// The error is that there is no such flag.
	_ = cmd.RegisterFlagCompletionFunc("policy", cobra.FixedCompletions([]string{"rr", "fifo"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().Int32VarP(&w.priority, "priority", "p", defaultPriority, "realtime at priority `N`, 1 to 99")
	cmd.Flags().Int32VarP(&w.nice, "nice", "n", 0, "no realtime, but nice level `N`, -20 to 19")
}

// words are what is asked for in those of the request. Whether the daemon gives it, and
// takes it for a policy at all, it says itself.
func (w *wish) words(cmd *cobra.Command) (policy string, level int32, err error) {
	set := cmd.Flags().Changed
	switch {
	case !set("nice"):
		return w.policy, w.priority, nil
	case set("priority") || set("policy"):
		return "", 0, &usageError{cmd, errors.New("--nice goes without --priority and --policy: it is no realtime")}
	}
	return "other", w.nice, nil
}

func (o *options) rtGrantCommand() *cobra.Command {
	var w wish
	cmd := &cobra.Command{
		Use:   "grant [--policy rr|fifo] [--priority N | --nice N] THREAD…",
		Short: "Give threads realtime scheduling, or a nice level",
		Long: `grant gives each THREAD, a number as ps -eL shows it, what is asked for: realtime
round robin at priority 10 if nothing else is said. The first thread of a process has
the process's number. The daemon keeps watch over it and takes the grant back when it
takes more of a CPU than it may. What the thread forks does not inherit it.

A process gets realtime only while its hard RLIMIT_RTTIME is set, and not above what rt
status shows: the kernel then kills it if it hangs. Programs that use rtkit set it by
themselves; for others there are rt run and prlimit(1).`,
		Example:               "  cgm rt grant --priority 15 4711 4712",
		Args:                  positional(between(1, math.MaxInt)),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, level, err := w.words(cmd)
			if err != nil {
				return err
			}
			return o.eachThread(cmd, args, func(ctx context.Context, c *client.Client, thread uint32) error {
				return c.Grant(ctx, thread, policy, level)
			})
		},
	}
	w.flags(cmd)
	return cmd
}

func (o *options) rtRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:                   "revoke THREAD…",
		Short:                 "Take grants back: the threads are scheduled like all others again",
		Example:               "  cgm rt revoke 4711",
		Args:                  positional(between(1, math.MaxInt)),
		ValidArgsFunction:     o.completeThread,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.eachThread(cmd, args, func(ctx context.Context, c *client.Client, thread uint32) error {
				return c.Revoke(ctx, thread)
			})
		},
	}
}

// eachThread does something with each thread that the arguments name. A refusal of one
// does not keep it from the others; the last refusal is the error, those before it are
// printed.
func (o *options) eachThread(cmd *cobra.Command, args []string, do func(context.Context, *client.Client, uint32) error) error {
	threads := make([]uint32, len(args))
	for i, arg := range args {
		var err error
		if threads[i], err = parseTask(arg, "thread"); err != nil {
			return &usageError{cmd, err}
		}
	}
	return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
		var last error
		for _, thread := range threads {
			err := do(ctx, c, thread)
			if err == nil {
				continue
			}
			if last != nil {
				report(cmd.ErrOrStderr(), last)
			}
			last = err
			if !isRefusal(err) {
				break
			}
		}
		return last
	})
}

// completeThread completes the number of a thread that has a grant.
func (o *options) completeThread(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	var threads []string
	err := o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
		grants, err := c.ListGrants(ctx)
		for _, g := range grants {
			if g.TID != 0 {
				threads = append(threads, fmt.Sprintf("%d\t%s %s %d", g.TID, escape(threadName(g.PID, g.TID)), g.Policy, g.Level))
			}
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return threads, cobra.ShellCompDirectiveNoFileComp
}

// parseTask parses the number of a thread or process.
func parseTask(s, what string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not the number of a %s", s, what)
	}
	return uint32(n), nil
}

func (o *options) rtRunCommand() *cobra.Command {
	var w wish
	var rttime int64
	cmd := &cobra.Command{
		Use:   "run [--policy rr|fifo] [--priority N | --nice N] [--rttime USEC] -- COMMAND [ARGUMENT]…",
		Short: "Run a command with realtime scheduling, or at a nice level",
		Long: `run asks for what grant does for itself, and executes COMMAND, whose first thread has
it: chrt(1) for those who are not the host's root, in a container or out of it. Threads
and processes that COMMAND makes are scheduled like all others (SCHED_RESET_ON_FORK): a
shell script as COMMAND gains nothing for the programs that it starts.

For realtime it sets its RLIMIT_RTTIME first, as the daemon demands: a COMMAND that
uses the CPU for so long without ever sleeping gets SIGXCPU a fifth earlier, and then
SIGKILL.

The exit status is as for cgm run.`,
		Example:               "  cgm rt run --priority 15 -- arecord -f cd take.wav\n  cgm rt run --nice -10 -- make",
		ValidArgsFunction:     completeCommand,
		DisableFlagsInUseLine: true,
		Args: positional(func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); len(args) == 0 || dash > 0 {
				return errors.New("want a COMMAND after --")
			}
			return nil
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			if rttime < 0 {
				return &usageError{cmd, fmt.Errorf("--rttime %d: want microseconds", rttime)}
			}
			policy, level, err := w.words(cmd)
			if err != nil {
				return err
			}
			path, err := exec.LookPath(args[0])
			if err != nil {
				return notExecutable(args[0], err)
			}
			err = o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				if policy != "other" {
					if err := limitRTTime(ctx, c, rttime); err != nil {
						return err
					}
				}
				return c.Grant(ctx, uint32(os.Getpid()), policy, level)
			})
			if err != nil {
				return err
			}
			return notExecutable(args[0], syscall.Exec(path, args, os.Environ()))
		},
	}
	w.flags(cmd)
	cmd.Flags().Int64Var(&rttime, "rttime", 0, "set RLIMIT_RTTIME to `USEC` microseconds; what the daemon allows at most if not given")
	return cmd
}

// limitRTTime sets this process's RLIMIT_RTTIME to usec, or, with 0, to what the daemon
// allows at most (or what it is, where that is less). It may be lowered by anybody.
func limitRTTime(ctx context.Context, c *client.Client, usec int64) error {
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_RTTIME, &now); err != nil {
		return os.NewSyscallError("getrlimit RLIMIT_RTTIME", err)
	}
	p, err := c.RealtimeProperties(ctx)
	if err != nil {
		return err
	}
	limit := uint64(usec)
	switch {
	case usec == 0:
		limit = min(uint64(p.RTTimeUSecMax), now.Max)
	case usec > p.RTTimeUSecMax:
		return &advisedError{
			fmt.Errorf("--rttime %d: the daemon takes a hard RLIMIT_RTTIME of %d at most", usec, p.RTTimeUSecMax),
			"leave --rttime out to have that",
		}
	}
	// SIGXCPU, which says what happened, comes before SIGKILL.
	err = unix.Setrlimit(unix.RLIMIT_RTTIME, &unix.Rlimit{Cur: limit / 5 * 4, Max: limit})
	if errors.Is(err, unix.EPERM) {
		return &advisedError{
			fmt.Errorf("--rttime %d: the hard RLIMIT_RTTIME is %d already, and only lowered", limit, now.Max),
			"leave --rttime out",
		}
	}
	return os.NewSyscallError("setrlimit RLIMIT_RTTIME", err)
}

func (o *options) rtLimitsCommand() *cobra.Command {
	var asJSON, revoke bool
	cmd := &cobra.Command{
		Use:   "limits [--revoke] PID",
		Short: "Give a process the resource limits that the policy has for it",
		Long: `limits raises the resource limits of the process PID to what the host's policy file
gives it (RLIMIT_RTPRIO, RLIMIT_NICE, RLIMIT_MEMLOCK), and prints them. The process can
make its threads realtime and lock memory by itself then, without a new login; its
children inherit the limits.

With --revoke they are taken back, from the process and from all its descendants in its
container, whose threads are scheduled like all others again. Those that could not be
reached, because they have gone from their parents, are printed, and the exit status is 1.`,
		Example:               "  cgm rt limits $$\n  cgm rt limits --revoke 4711",
		Args:                  positional(between(1, 1)),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := parseTask(args[0], "process")
			if err != nil {
				return &usageError{cmd, err}
			}
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				if revoke {
					return revokeLimits(ctx, c, cmd.OutOrStdout(), asJSON, pid)
				}
				given, err := c.GrantLimits(ctx, pid)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), given)
				}
				return printValues(cmd.OutOrStdout(), slices.Sorted(maps.Keys(given)), given)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&revoke, "revoke", false, "take them back")
	return cmd
}

func revokeLimits(ctx context.Context, c *client.Client, w io.Writer, asJSON bool, pid uint32) error {
	unreached, err := c.RevokeLimits(ctx, pid)
	if err != nil {
		return err
	}
	if err := printLines(w, asJSON, unreached); err != nil {
		return err
	}
	if len(unreached) > 0 {
		return &advisedError{
			fmt.Errorf("processes that could not be reached: %d", len(unreached)),
			"they keep their limits: end them, or have the host's root take the limits with prlimit(1)",
		}
	}
	return nil
}

func (o *options) rtStatusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the bounds of what is granted",
		Long: `status shows the daemon's properties MaxRealtimePriority, MinNiceLevel and
RTTimeUSecMax, as rtkit's clients see them: the highest priority, the lowest nice
level, and the highest hard RLIMIT_RTTIME with which a process gets realtime.`,
		Args:                  positional(between(0, 0)),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				p, err := c.RealtimeProperties(ctx)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd.OutOrStdout(), map[string]int64{
						"max_realtime_priority": int64(p.MaxRealtimePriority),
						"min_nice_level":        int64(p.MinNiceLevel),
						"rttime_usec_max":       p.RTTimeUSecMax,
					})
				}
				t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				fmt.Fprintf(t, "highest priority\t%d\nlowest nice level\t%d\nhighest RLIMIT_RTTIME\t%d us\n",
					p.MaxRealtimePriority, p.MinNiceLevel, p.RTTimeUSecMax)
				return t.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (o *options) rtResetCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "reset [--all]",
		Short: "Take back every grant of the host",
		Long: `reset takes back every grant. With --all it takes realtime from every thread of the
host that has it, whoever gave it, but from root's. That is for the host's root alone.`,
		Args:                  positional(between(0, 0)),
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				reset := c.ResetKnown
				if all {
					reset = c.ResetAll
				}
				err := reset(ctx)
				if client.IsDenied(err) { // told as rtkit does: without a word of why
					err = &advisedError{fmt.Errorf("reset: %w", err), "it is for the host's root alone; cgm rt revoke takes back one's own"}
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "also what others than the daemon have given")
	return cmd
}
