package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"

	"github.com/spf13/cobra"

	"cgmanager/api"
	"cgmanager/api/client"
)

// The verbs of the original cgm. Their arguments, output and error texts are
// what scripts have relied on for years and stay word for word; the daemon
// appends a reason to its "invalid request".

// originalError is a refusal, told as the original does: by the name of the
// C function that the original's client library has for the call.
type originalError struct {
	function string
	err      error
}

func (e *originalError) Error() string {
	return "call to cgmanager_" + e.function + " failed: " + e.err.Error()
}
func (e *originalError) Unwrap() error { return e.err }

// request is one invocation of a verb.
type request struct {
	c    *client.Client
	args []string
	out  io.Writer
	json bool
}

// verb is one verb of the original's.
type verb struct {
	use, short string
	// example shows what CONTROLLER may be, among the rest; "" for a verb without arguments.
	example string
	// args is the number of arguments; one more may be given if optional.
	args     int
	optional bool
	// lists says that the verb prints a list, and so has --json.
	lists bool
	// function is the name for originalError.
	function string
	// check finds misuse before the daemon is asked; may be nil.
	check func(args []string) error
	run   func(context.Context, *request) error
}

var verbs = []verb{
	{
		use: "ping", short: "Check that the daemon answers", function: "ping_sync",
		run: func(ctx context.Context, r *request) error { return r.c.Ping0(ctx) },
	},
	{
		use: "apiversion", short: "Print the daemon's api version", function: "get_api_version_sync",
		run: func(ctx context.Context, r *request) error {
			v, err := r.c.APIVersion0(ctx)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(r.out, v)
			return err
		},
	},
	{
		use: "create CONTROLLER CGROUP", short: "Create a cgroup", args: 2, function: "create_sync",
		example: "  cgm create all web\n  cgm create memory,cpu web/db",
		run: func(ctx context.Context, r *request) error {
			existed, err := r.c.Create0(ctx, r.args[0], r.args[1])
			if err == nil && existed == api.DidExist {
				_, err = fmt.Fprintln(r.out, "Path existed")
			}
			return err
		},
	},
	{
		use: "chown CONTROLLER CGROUP UID GID", short: "Give a cgroup away", args: 4, function: "chown_sync",
		example: "  cgm chown all alice 1000 1000",
		check:   func(args []string) error { return cmp.Or(isID(args[2]), isID(args[3])) },
		run: func(ctx context.Context, r *request) error {
			return r.c.Chown0(ctx, r.args[0], r.args[1], id(r.args[2]), id(r.args[3]))
		},
	},
	{
		use: "chmod CONTROLLER CGROUP MODE", short: "Change the mode of a cgroup's directory", args: 3, function: "chmod_sync",
		example: "  cgm chmod all alice 0750",
		check:   func(args []string) error { return isMode(args[2]) },
		run: func(ctx context.Context, r *request) error {
			return r.c.Chmod0(ctx, r.args[0], r.args[1], "", mode(r.args[2]))
		},
	},
	{
		use: "chmodfile CONTROLLER CGROUP FILE MODE", short: "Change the mode of a cgroup's file", args: 4, function: "chmod_sync",
		example: "  cgm chmodfile memory alice tasks 0664",
		check:   func(args []string) error { return isMode(args[3]) },
		run: func(ctx context.Context, r *request) error {
			return r.c.Chmod0(ctx, r.args[0], r.args[1], r.args[2], mode(r.args[3]))
		},
	},
	{
		use: "remove CONTROLLER CGROUP [RECURSIVE]", short: "Remove a cgroup; those below too, unless RECURSIVE is 0",
		example: "  cgm remove all web\n  cgm remove memory web 0",
		args:    2, optional: true,
		check: func(args []string) error {
			if len(args) < 3 {
				return nil
			}
			if _, err := strconv.Atoi(args[2]); err != nil {
				return fmt.Errorf("%q is neither 0 nor 1", args[2])
			}
			return nil
		},
		run: func(ctx context.Context, r *request) error {
			recursive, how := true, "recursive"
			if len(r.args) == 3 {
				if n, _ := strconv.Atoi(r.args[2]); n == 0 {
					recursive, how = false, "non-recursive"
				}
			}
			existed, err := r.c.Remove0(ctx, r.args[0], r.args[1], recursive)
			if err != nil {
				return &originalError{"remove_sync (" + how + ")", err}
			}
			if existed == api.DidNotExist {
				_, err = fmt.Fprintln(r.out, "Path did not exist")
			}
			return err
		},
	},
	{
		use: "getpidcgroup CONTROLLER PID", short: "Print a task's cgroup, relative to the caller's", args: 2, function: "get_pid_cgroup_sync",
		example: "  cgm getpidcgroup memory 4711",
		check:   func(args []string) error { return isPID(args[1]) },
		run: func(ctx context.Context, r *request) error {
			return r.line(r.c.GetPidCgroup0(ctx, r.args[0], pid(r.args[1])))
		},
	},
	{
		use: "getpidcgroupabs CONTROLLER PID", short: "Print a task's cgroup, relative to the daemon's", args: 2, function: "get_pid_cgroup_abs_sync",
		example: "  cgm getpidcgroupabs memory 4711",
		check:   func(args []string) error { return isPID(args[1]) },
		run: func(ctx context.Context, r *request) error {
			return r.line(r.c.GetPidCgroupAbs0(ctx, r.args[0], pid(r.args[1])))
		},
	},
	{
		use: "movepid CONTROLLER CGROUP PID", short: "Move a task into a cgroup", args: 3, function: "move_pid_main_sync",
		example: "  cgm movepid all web 4711",
		check:   func(args []string) error { return isPID(args[2]) },
		run: func(ctx context.Context, r *request) error {
			return r.c.MovePid0(ctx, r.args[0], r.args[1], pid(r.args[2]))
		},
	},
	{
		use: "movepidabs CONTROLLER CGROUP PID", short: "Move a task into any cgroup (host root)", args: 3, function: "move_pid_abs_sync",
		example: "  cgm movepidabs all / 4711",
		check:   func(args []string) error { return isPID(args[2]) },
		run: func(ctx context.Context, r *request) error {
			return r.c.MovePidAbs0(ctx, r.args[0], r.args[1], pid(r.args[2]))
		},
	},
	{
		use: "getvalue CONTROLLER CGROUP KEY", short: "Print the content of a control file", args: 3, function: "get_value_sync",
		example: "  cgm getvalue memory web memory.usage_in_bytes",
		run: func(ctx context.Context, r *request) error {
			v, err := r.c.GetValue0(ctx, r.args[0], r.args[1], r.args[2])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(r.out, escapeValue(v))
			return err
		},
	},
	{
		use: "setvalue CONTROLLER CGROUP KEY VALUE", short: "Write a control file", args: 4, function: "set_value_sync",
		example: "  cgm setvalue memory web memory.limit_in_bytes 104857600",
		run: func(ctx context.Context, r *request) error {
			return r.c.SetValue0(ctx, r.args[0], r.args[1], r.args[2], r.args[3])
		},
	},
	{
		use: "gettasks CONTROLLER CGROUP", short: "List the tasks of a cgroup", args: 2, lists: true, function: "get_tasks_sync",
		example: "  cgm gettasks memory web",
		run: func(ctx context.Context, r *request) error {
			return list(r, func() ([]int32, error) { return r.c.GetTasks0(ctx, r.args[0], r.args[1]) })
		},
	},
	{
		use: "gettasksrecursive CONTROLLER CGROUP", short: "List the tasks of a cgroup and of those below", args: 2, lists: true, function: "get_tasks_recursive_sync",
		example: "  cgm gettasksrecursive all web",
		run: func(ctx context.Context, r *request) error {
			return list(r, func() ([]int32, error) { return r.c.GetTasksRecursive0(ctx, r.args[0], r.args[1]) })
		},
	},
	{
		use: "listchildren CONTROLLER [CGROUP]", short: "List the cgroups directly below one, or below the caller's", args: 1, optional: true,
		example: "  cgm listchildren memory\n  cgm listchildren memory web",
		lists:   true, function: "list_children_sync",
		run: func(ctx context.Context, r *request) error {
			cgroup := ""
			if len(r.args) == 2 {
				cgroup = r.args[1]
			}
			return list(r, func() ([]string, error) { return r.c.ListChildren0(ctx, r.args[0], cgroup) })
		},
	},
	{
		use: "removeonempty CONTROLLER CGROUP", short: "Have a cgroup removed when its last task has left", args: 2, function: "remove_on_empty_sync",
		example: "  cgm removeonempty all web",
		run:     func(ctx context.Context, r *request) error { return r.c.RemoveOnEmpty0(ctx, r.args[0], r.args[1]) },
	},
	{
		use: "prune CONTROLLER CGROUP", short: "Remove the empty cgroups below one", args: 2, function: "prune_sync",
		example: "  cgm prune all web",
		run:     func(ctx context.Context, r *request) error { return r.c.Prune0(ctx, r.args[0], r.args[1]) },
	},
	{
		use: "listcontrollers", short: "List the controllers", lists: true, function: "list_controllers_sync",
		run: func(ctx context.Context, r *request) error {
			return list(r, func() ([]string, error) { return r.c.ListControllers0(ctx) })
		},
	},
	{
		use: "listkeys CONTROLLER CGROUP", short: "List the files of a cgroup with owner, group and mode", args: 2, lists: true, function: "list_keys_sync",
		example: "  cgm listkeys memory web",
		run: func(ctx context.Context, r *request) error {
			return list(r, func() ([]key, error) {
				keys, err := r.c.ListKeys0(ctx, r.args[0], r.args[1])
				ks := make([]key, len(keys))
				for i, k := range keys {
					ks[i] = key{k.Name, k.UID, k.GID, strconv.FormatUint(uint64(k.Mode), 8)}
				}
				return ks, err
			})
		},
	},
}

func (o *options) originalCommands() []*cobra.Command {
	cmds := make([]*cobra.Command, 0, len(verbs))
	for _, v := range verbs {
		most := v.args
		if v.optional {
			most++
		}
		var asJSON bool
		cmd := &cobra.Command{
			Use:                   v.use,
			Short:                 v.short,
			Example:               v.example,
			GroupID:               groupOriginal,
			Args:                  positional(between(v.args, most)),
			DisableFlagsInUseLine: true,
			RunE: func(cmd *cobra.Command, args []string) error {
				if v.check != nil {
					if err := v.check(args); err != nil {
						return &usageError{cmd, err}
					}
				}
				c, ctx, done, err := o.dial(cmd.Context())
				if err != nil {
					return err
				}
				defer done()
				err = v.run(ctx, &request{c: c, args: args, out: cmd.OutOrStdout(), json: asJSON})
				if err == nil {
					return nil
				}
				if _, ok := errors.AsType[*originalError](err); ok || v.function == "" {
					return err
				}
				return &originalError{v.function, err}
			},
		}
		if v.lists {
			cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
		} else {
			// Values and ids may start with "-".
			cmd.Flags().SetInterspersed(false)
		}
		cmds = append(cmds, cmd)
	}
	return cmds
}

// line prints one name.
func (r *request) line(s string, err error) error {
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(r.out, escape(s))
	return err
}

// list prints what get returns.
func list[T any](r *request, get func() ([]T, error)) error {
	items, err := get()
	if err != nil {
		return err
	}
	return printLines(r.out, r.json, items)
}

// key is api.Key as the original prints it, and as JSON.
type key struct {
	Name string `json:"name"`
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	// Mode is the whole st_mode, octal.
	Mode string `json:"mode"`
}

func (k key) String() string { return fmt.Sprintf("%s %d %d %s", k.Name, k.UID, k.GID, k.Mode) }

func isPID(s string) error {
	if _, err := strconv.ParseInt(s, 10, 32); err != nil {
		return fmt.Errorf("%q is not a pid", s)
	}
	return nil
}

func pid(s string) int32 {
	n, _ := strconv.ParseInt(s, 10, 32)
	return int32(n)
}

// isID accepts a uid_t or gid_t, and -1 for "leave as it is".
func isID(s string) error {
	if n, err := strconv.ParseInt(s, 10, 64); err != nil || n < -1 || n > math.MaxUint32 {
		return fmt.Errorf("%q is not a number of a user or group", s)
	}
	return nil
}

// id returns the id as the interface's int32, which has the bits of a uid_t.
func id(s string) int32 {
	n, _ := strconv.ParseInt(s, 10, 64)
	return int32(uint32(n))
}

func isMode(s string) error {
	if _, err := strconv.ParseInt(s, 8, 32); err != nil {
		return fmt.Errorf("%q is not an octal mode", s)
	}
	return nil
}

func mode(s string) int32 {
	n, _ := strconv.ParseInt(s, 8, 32)
	return int32(n)
}
