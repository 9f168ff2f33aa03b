// Package polkit asks polkit whether somebody may do something.
package polkit

import (
	"context"
	"errors"
)

// ErrAbsent says that there is no system bus, or no polkit on it.
var ErrAbsent = errors.New("polkit does not run here")

// Subject is a process for which is asked: polkit's "unix-process".
type Subject struct {
	PID uint32
	// Started is when it was started (field 22, proc_pid_stat(5)).
	Started uint64
	// UID is that of who asks for it.
	UID uint32
}

// Authority is polkit on the system bus. It connects when it is first asked, and
// again where the bus was lost.
type Authority struct{}

// New makes an Authority. address is that of the bus, "" that of the system.
func New(address string) *Authority { return nil }

// Check asks whether the subject may do what the action says, without asking its
// user. Answers come in any order; ctx bounds the time.
func (a *Authority) Check(ctx context.Context, action string, s Subject) (bool, error) {
	return false, ErrAbsent
}

// Close lets go of the bus.
func (a *Authority) Close() {}
