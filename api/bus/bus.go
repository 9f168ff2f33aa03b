// Package bus serves org.freedesktop.RealtimeKit1 on a message bus: whoever asks
// over it is asked for by name, and its requests go to an api.Backend like those of
// a connection of its own.
//
// The bus says who sent a message, and is believed as a process of the same
// namespaces; everything else in a message is somebody else's.
package bus

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"cgmanager/api"
)

// Config says what to serve.
type Config struct {
	Backend api.Backend
	// Address is that of the bus, "" that of the system: $DBUS_SYSTEM_BUS_ADDRESS,
	// or the usual one.
	Address string
	Log     *logrus.Logger
}

// systemAddress is where the system's bus is unless the environment says otherwise
// (D-Bus specification, "Well-known Message Bus Instances").
const systemAddress = "unix:path=/run/dbus/system_bus_socket"

// How long after a failure the bus is looked for again.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 15 * time.Second
)

// ErrUnanswered says that requests take too long to wait for their end.
var ErrUnanswered = errors.New("requests over the bus take too long: not all were answered")

// Serve owns the name and answers until ctx ends; then it answers what it has
// accepted, gives up the name, and returns ErrUnanswered if something is still under
// way, else nil. It waits for a bus that is not there yet or any more, and for a name
// that somebody else has. It returns another error at once where the address is none.
func Serve(ctx context.Context, c Config) error {
	if c.Address == "" {
		if c.Address = os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); c.Address == "" {
			c.Address = systemAddress
		}
	}
	for one := range strings.SplitSeq(c.Address, ";") {
		if _, err := api.SocketName(one); err != nil {
			return fmt.Errorf("address %q: %w", c.Address, err)
		}
	}
	pause, told := firstPause, ""
	for ctx.Err() == nil {
		start := time.Now()
		s := &session{
			Config: c, life: ctx, owner: make(chan struct{}, 1),
			callers: map[string]*caller{}, idle: list.New(), places: map[string]*list.Element{}, accounts: map[string]int{},
		}
		err := s.run()
		if ctx.Err() != nil {
			return s.unanswered()
		}
		if time.Since(start) > lastPause {
			pause, told = firstPause, ""
		}
		if err.Error() != told { // once for each reason
			told = err.Error()
			c.Log.WithError(err).WithField("address", c.Address).Warn("not served on the bus; it is tried again")
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
	return nil
}
