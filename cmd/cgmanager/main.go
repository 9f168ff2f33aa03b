// Command cgmanager is the daemon that parcels out cgroups to processes on the
// host and in containers. docs/man/cgmanager.8.md describes it.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"

	"cgmanager/api"
	"cgmanager/cmd/service"
	"cgmanager/cmd/version"
	"cgmanager/manager"
	"cgmanager/manager/rt"
	"cgmanager/manager/rt/watchdog"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == holdArg {
		hold()
	}
	if len(os.Args) == 2 && os.Args[1] == watchdog.Arg {
		os.Exit(watchdog.Main())
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// options are the command line's.
type options struct {
	mount, skip []string
	maxDepth    int64
	daemon      bool
	sigstop     bool
	listen      []string
	stateDir    string
	replace     bool
	logLevel    string
	mountOnly   bool
	unmountOnly bool
	systemBus   bool
	activate    bool
	version     bool
	help        bool
	realtime    realtimeOptions
	grants      *rt.Config // what those mean
}

// parse returns also what --help prints.
func parse(args []string, stderr io.Writer) (o options, usage string, err error) {
	own, realtime := pflag.NewFlagSet("own", pflag.ContinueOnError), pflag.NewFlagSet("realtime", pflag.ContinueOnError)
	o.add(own)
	o.realtime.add(realtime)
	usage = "Flags:\n" + service.FlagUsages(own) + "\nRealtime flags, which have rtkit's names and defaults:\n" + service.FlagUsages(realtime)
	f := pflag.NewFlagSet("cgmanager", pflag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {}
	f.AddFlagSet(own)
	f.AddFlagSet(realtime)
	if err := f.Parse(args); err != nil {
		return o, usage, err
	}
	return o, usage, o.check(f.Args())
}

func (o *options) add(f *pflag.FlagSet) {
	f.StringSliceVarP(&o.mount, "mount", "m", nil, "bind these `CONTROLLERS`, or name=X, to a new v1 hierarchy if they have none")
	f.StringSliceVarP(&o.skip, "skip", "M", nil, "leave the hierarchies of these `CONTROLLERS` alone")
	o.maxDepth = manager.DefaultMaxDepth
	f.Var(number{&o.maxDepth, 1, many}, "max-depth", "how deep below a hierarchy's root a cgroup may be created")
	f.BoolVar(&o.daemon, "daemon", false, "go to the background once the sockets are served")
	f.BoolVar(&o.sigstop, "sigstop", false, "raise SIGSTOP once the sockets are served")
	f.StringArrayVar(&o.listen, "listen", nil, "serve this `ADDRESS` (unix:path=PATH) instead of the usual ones; repeatable")
	f.StringVar(&o.stateDir, "state-dir", "/run/cgmanager.private", "private `DIRECTORY` of the daemon")
	f.BoolVar(&o.replace, "replace", false, "take the place of the daemon that runs, if there is one: it hands over its sockets and ends")
	f.BoolVar(&o.systemBus, "system-bus", false, "own org.freedesktop.RealtimeKit1 on the system's D-Bus: clients of rtkit ask there")
	f.BoolVar(&o.activate, "activate", false, "have the daemon that runs own that name again, and end; where none runs, be that daemon")
	f.StringVar(&o.logLevel, "log-level", "info", "error, warning, info or debug: the lowest `LEVEL` that is logged")
	f.BoolVar(&o.mountOnly, "mount-sockets", false, "show /run/cgmanager at the addresses below /sys/fs/cgroup, and end: for a service manager that holds the socket")
	f.BoolVar(&o.unmountOnly, "unmount-sockets", false, "take back what --mount-sockets has done, and end")
	for _, name := range []string{"allow-autoremove-premounted", "autoremove-premounted-set-release-agent"} {
		f.Bool(name, false, "accepted for the original's sake: RemoveOnEmpty works everywhere")
	}
	f.BoolVar(&o.version, "version", false, "print the version")
	f.BoolVarP(&o.help, "help", "h", false, "print this help")
}

// check finds misuse, and makes of the options for realtime what they mean.
func (o *options) check(args []string) (err error) {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument: %q", args[0])
	}
	if _, err := logrus.ParseLevel(o.logLevel); err != nil {
		return fmt.Errorf("--log-level %q: error, warning, info or debug", o.logLevel)
	}
	if o.mountOnly && o.unmountOnly {
		return errors.New("--mount-sockets and --unmount-sockets: one of the two")
	}
	// In the background they would be others: a daemon's directory is /.
	for _, file := range []struct{ flag, path string }{{"--state-dir", o.stateDir}, {"--realtime-policy", o.realtime.policy}} {
		if !filepath.IsAbs(file.path) {
			return fmt.Errorf("%s %q: must be an absolute path", file.flag, file.path)
		}
	}
	if o.grants, err = o.realtime.config(o.stateDir); err != nil {
		return err
	}
	for _, a := range o.listen {
		if _, err := service.SocketPath(a); err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
	}
	return nil
}

func run(args []string, stdout, stderr io.Writer) int {
	o, usage, err := parse(args, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "cgmanager: %v\nhint: cgmanager --help lists the flags\n", err)
		return service.ExitUsage
	}
	if o.help {
		fmt.Fprintf(stdout, "cgmanager parcels out cgroups to processes on the host and in containers.\n\nUsage: cgmanager [flags]\n\n%s", usage)
		return service.ExitOK
	}
	if o.version {
		fmt.Fprintln(stdout, "cgmanager", version.String())
		return service.ExitOK
	}
	if o.realtime.introspect {
		xml, _ := api.Introspect(api.RealtimePath)
		fmt.Fprint(stdout, xml)
		return service.ExitOK
	}
	if os.Geteuid() != 0 {
		fmt.Fprintf(stderr, "cgmanager: only root may write control groups\nhint: start it as root, once for the whole host\n")
		return service.ExitFailure
	}
	if o.activate {
		switch running, err := wake(o.stateDir); {
		case err != nil:
			fmt.Fprintf(stderr, "cgmanager: --activate: %v\n", err)
			return service.ExitFailure
		case running:
			return service.ExitOK
		}
		o.systemBus = true
	}
	if o.mountOnly || o.unmountOnly {
		service.Prepare()
		do := mountSockets
		if o.unmountOnly {
			do = unmountSockets
		}
		if err := do(); err != nil {
			fmt.Fprintf(stderr, "cgmanager: show the sockets below %s: %v\n", service.CgroupDir, err)
			return service.ExitFailure
		}
		return service.ExitOK
	}
	return service.Run(o.daemon, o.logLevel, stderr, func(log *logrus.Logger) error { return serve(o, log) })
}
