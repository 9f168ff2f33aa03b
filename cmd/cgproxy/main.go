// Command cgproxy serves cgmanager's requests inside a container, by asking the
// daemon outside. docs/man/cgproxy.8.md describes it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"cgmanager/api/bus"
	"cgmanager/api/server"
	"cgmanager/cmd/service"
	"cgmanager/cmd/version"
	"cgmanager/proxy"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// options are the command line's.
type options struct {
	lower    string
	listen   []string
	wait     time.Duration
	daemon   bool
	pidFile  string
	sigstop  bool
	debug    bool
	logLevel string
	bus      bool
	version  bool
	help     bool
}

func parse(args []string, stderr io.Writer) (options, *pflag.FlagSet, error) {
	var o options
	f := pflag.NewFlagSet("cgproxy", pflag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {}
	f.StringVar(&o.lower, "lower", "", "`ADDRESS` (unix:path=PATH) of the daemon to ask, instead of the bind-mounted one")
	f.StringArrayVar(&o.listen, "listen", nil, "serve this `ADDRESS` (unix:path=PATH) instead of the usual ones, and move no mount; repeatable")
	f.DurationVar(&o.wait, "wait", proxy.DefaultWait, "let requests wait this `DURATION` for the daemon below to come back: 0 to 1m")
	f.BoolVar(&o.daemon, "daemon", false, "go to the background once the sockets are served")
	f.StringVar(&o.pidFile, "pidfile", "", "write the process's number to this `FILE` once the sockets are served")
	f.BoolVar(&o.sigstop, "sigstop", false, "raise SIGSTOP once the sockets are served")
	f.BoolVar(&o.debug, "debug", false, "the same as --log-level debug")
	f.StringVar(&o.logLevel, "log-level", "info", "error, warning, info or debug: the lowest `LEVEL` that is logged")
	f.BoolVar(&o.bus, "system-bus", false, "own org.freedesktop.RealtimeKit1 on the container's own system D-Bus: clients of rtkit ask there")
	f.BoolVar(&o.version, "version", false, "print the version")
	f.BoolVarP(&o.help, "help", "h", false, "print this help")
	if err := f.Parse(args); err != nil {
		return o, f, err
	}
	if f.NArg() > 0 {
		return o, f, fmt.Errorf("unexpected argument: %q", f.Arg(0))
	}
	if _, err := logrus.ParseLevel(o.logLevel); err != nil {
		return o, f, fmt.Errorf("--log-level %q: error, warning, info or debug", o.logLevel)
	}
	if o.debug {
		o.logLevel = "debug"
	}
	if o.wait < 0 || o.wait > time.Minute {
		return o, f, fmt.Errorf("--wait %v: must be 0 to 1m", o.wait)
	}
	if o.lower != "" {
		path, err := service.SocketPath(o.lower)
		if err != nil {
			return o, f, fmt.Errorf("--lower: %w", err)
		}
		o.lower = path
	}
	if o.pidFile != "" && !filepath.IsAbs(o.pidFile) {
		return o, f, fmt.Errorf("--pidfile %s: must be an absolute path", o.pidFile)
	}
	for i, a := range o.listen {
		path, err := service.SocketPath(a)
		if err != nil {
			return o, f, fmt.Errorf("--listen: %w", err)
		}
		if path == o.lower {
			return o, f, fmt.Errorf("--listen %s: that is where the daemon to ask is (--lower)", a)
		}
		o.listen[i] = path
	}
	return o, f, nil
}

func run(args []string, stdout, stderr io.Writer) int {
	o, flags, err := parse(args, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "cgproxy: %v\nhint: cgproxy --help lists the flags\n", err)
		return service.ExitUsage
	}
	if o.help {
		fmt.Fprintf(stdout, "cgproxy serves cgmanager's requests inside a container, by asking the daemon outside.\n\nUsage: cgproxy [flags]\n\nFlags:\n%s", service.FlagUsages(flags))
		return service.ExitOK
	}
	if o.version {
		fmt.Fprintln(stdout, "cgproxy", version.String())
		return service.ExitOK
	}
	return service.Run(o.daemon, o.logLevel, stderr, func(log *logrus.Logger) error { return serve(o, log) })
}

// share is what one user, or one container further in, has of the proxy. To the
// daemon all of them are one container, with that container's bounds: nobody takes
// more than half of these. A connection there is two, with the client that it is for.
var share = server.Limits{Connections: 512, AccountWorkers: 4, Changes: 500, Burst: 2500}

// serve runs the proxy until a signal ends it.
func serve(o options, log *logrus.Logger) (err error) {
	service.Prepare()
	life := service.Life(log)
	if err := proxy.CheckPrivilege(); err != nil {
		return err
	}
	usual := len(o.listen) == 0
	if usual {
		unlock, err := lock()
		if err != nil {
			return err
		}
		defer unlock()
	}
	lower, err := findLower(o, log)
	if err != nil {
		return err
	}
	listen := o.listen
	if usual {
		var end func() error
		if lower, end, err = takeAside(lower, o.lower != ""); err != nil {
			return err
		}
		defer func() {
			if eerr := end(); eerr != nil {
				log.WithError(eerr).Warn("a mount is left behind")
			}
		}()
		listen = usualSockets()
	}
	p := proxy.New(proxy.Config{Lower: lower, Wait: o.wait, Log: log})
	listeners, err := listenAt(listen, usual, log)
	if err != nil {
		return err
	}
	s, err := server.New(server.Config{Backend: p, Listeners: listeners, Log: log, Version: version.String(), Limits: share})
	if err != nil {
		for _, l := range listeners {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	if o.pidFile != "" {
		if err := writePID(o.pidFile); err != nil {
			for _, l := range listeners {
				err = errors.Join(err, l.Close())
			}
			return err
		}
		defer func() { _ = os.Remove(o.pidFile) }() // else it names nobody, which init scripts see
	}
	service.Ready(o.daemon, o.sigstop, listeners, log)
	// Requests that wait for the daemon below give up: they are answered while
	// the server drains.
	context.AfterFunc(life, p.End)
	served := make(chan error, 1)
	go func() {
		if !o.bus {
			served <- nil
			return
		}
		served <- bus.Serve(life, bus.Config{Backend: p, Log: log})
	}()
	return errors.Join(s.Serve(life), <-served)
}

// writePID writes this process's number to a file.
func writePID(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o644)
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	return nil
}
