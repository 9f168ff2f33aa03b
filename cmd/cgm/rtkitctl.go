package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/godbus/dbus/v5"

	"cgmanager/api"
	"cgmanager/api/client"
	"cgmanager/cmd/version"
)

// rtkitctlName is the name by which this program is rtkit's rtkitctl, for scripts and
// for administrators who know that.
const rtkitctlName = "rtkitctl"

const rtkitctlHelp = `rtkitctl takes back realtime, and ends or starts the realtime service.

Usage: rtkitctl OPERATION

      --reset-known  take back every grant of realtime and high priority
      --reset-all    take realtime from every thread of the host but root's
      --start        start the realtime service, if it does not run
  -k, --exit         take back every grant and end the realtime service

  -h, --help         print this help
      --version      print the version

The operations are for the host's root. See also 'cgm rt --help'.
`

// rtkitctl does what rtkit's program of this name does: one operation, the last that is
// named. It returns the exit code, 0 or 1.
func rtkitctl(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var request string
	var send func(context.Context) error
	unexpected := false
	for _, arg := range args {
		switch arg {
		case "-h", "--help":
			fmt.Fprint(stdout, rtkitctlHelp)
			return exitOK
		case "--version":
			fmt.Fprintln(stdout, rtkitctlName, version.String())
			return exitOK
		case "--reset-known":
			request, send = "ResetKnown", toDaemon((*client.Client).ResetKnown)
		case "--reset-all":
			request, send = "ResetAll", toDaemon((*client.Client).ResetAll)
		case "-k", "--exit":
			request, send = "Exit", toDaemon((*client.Client).ExitRealtime)
		case "--start":
			request, send = "StartServiceByName", startRealtime
		default:
			if strings.HasPrefix(arg, "-") {
				fmt.Fprintf(stderr, "%s: unrecognized option '%s'\nUnknown command.\n", rtkitctlName, escape(arg))
				return exitFailure
			}
			unexpected = true
		}
	}
	switch {
	case unexpected:
		fmt.Fprintln(stderr, "Too many arguments.")
		return exitFailure
	case send == nil:
		fmt.Fprintln(stderr, "Need to specify operation.")
		return exitFailure
	}
	ctx, cancel := context.WithTimeout(ctx, client.DefaultTimeout)
	defer cancel()
	if err := send(ctx); err != nil {
		fmt.Fprintf(stderr, "Failed to send %s request: %s\n", request, escape(err.Error()))
		printHint(stderr, err)
		return exitFailure
	}
	return exitOK
}

// toDaemon asks the daemon on its own socket, which needs no bus.
func toDaemon(request func(*client.Client, context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		c, err := client.Dial(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		return request(c, ctx)
	}
}

// startRealtime has the system bus start the service, as for a client that calls it.
// Where there is no bus nobody but an init system starts anything: it runs, or not.
func startRealtime(ctx context.Context) error {
	bus, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return toDaemon(func(c *client.Client, ctx context.Context) error {
			_, err := c.RealtimeProperties(ctx)
			return err
		})(ctx)
	}
	defer func() { _ = bus.Close() }()
	return bus.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.StartServiceByName", 0, api.RealtimeInterface, uint32(0)).Err
}
