package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/godbus/dbus/v5"

	"cgmanager/api"
)

const (
	interface0 = api.Interface0
	interface1 = api.Interface1
	properties = "org.freedesktop.DBus.Properties"
)

// Error is the daemon's refusal of a request.
type Error struct {
	// Name is the D-Bus error name.
	Name string
	// Text says what was refused and why, in the caller's own words.
	Text string
	hint string
}

// Error returns the text.
func (e *Error) Error() string { return e.Text }

// Hint returns what the daemon advises to do about it, or "".
func (e *Error) Hint() string { return e.hint }

// GoneError says that the daemon ended, or another one took its place. Whoever
// wants to go on connects again.
type GoneError struct {
	method string
	// NotSent: the request was surely not carried out. Else nobody can know.
	NotSent bool
}

// Error says what happened to the request.
func (e *GoneError) Error() string {
	if e.NotSent {
		return e.method + ": the daemon had closed the connection: it ended, or was replaced"
	}
	return e.method + ": the daemon ended before it answered: this may be done, or not"
}

// Hint says what to do about it.
func (e *GoneError) Hint() string {
	if e.NotSent {
		return "try again"
	}
	return "look what there is, and try again"
}

// gone reports whether err says that the other side has closed the connection.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// IsNotFound reports whether err is a refusal because something named in the
// request does not exist or is not visible to the caller.
func IsNotFound(err error) bool { return isNamed(err, "org.freedesktop.DBus.Error.FileNotFound") }

// IsDenied reports whether err is a refusal because the caller is not entitled.
func IsDenied(err error) bool { return isNamed(err, "org.freedesktop.DBus.Error.AccessDenied") }

// IsUnknown reports whether err is that the daemon does not know the request: it
// is the original cgmanager, or older than the request.
func IsUnknown(err error) bool { return isNamed(err, api.ErrorUnknownMethod) }

func isNamed(err error, name string) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Name == name
}

// call calls a method of the object for cgroups and stores the reply's values in out.
func (c *Client) call(ctx context.Context, iface, method string, out []any, in ...any) error {
	return c.callAt(ctx, c.cgroups, iface, method, out, in...)
}

func (c *Client) callAt(ctx context.Context, obj dbus.BusObject, iface, method string, out []any, in ...any) error {
	ctx, cancel := withTimeout(ctx)
	defer cancel()
	closed := !c.conn.Connected()
	reply := obj.CallWithContext(ctx, iface+"."+method, 0, in...)
	if closed {
		// The library sends nothing any more. It may yet answer with what ended
		// the connection, as if it had been the request.
		return &GoneError{method, true}
	}
	if reply.Err != nil {
		return callError(method, reply.Err)
	}
	if err := reply.Store(out...); err != nil {
		return fmt.Errorf("reply to %s: %w", method, err)
	}
	return nil
}

func callError(method string, err error) error {
	e, ok := errors.AsType[dbus.Error](err)
	if !ok {
		op, isOp := errors.AsType[*net.OpError](err)
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return fmt.Errorf("%s: no reply in time", method)
		case errors.Is(err, dbus.ErrClosed), isOp && op.Op == "write" && gone(err):
			return &GoneError{method, true}
		case gone(err):
			return &GoneError{method, false}
		}
		return fmt.Errorf("%s: %w", method, err)
	}
	if e.Name == api.ErrorUnknownMethod {
		return &Error{
			Name: e.Name, Text: method + ": the daemon does not know this request: it is the original cgmanager, or older",
			hint: "install this project's cgmanager on the host, or use the requests of the original",
		}
	}
	text := e.Name
	if len(e.Body) > 0 {
		if s, ok := e.Body[0].(string); ok {
			text = s
		}
	}
	refusal := &Error{Name: e.Name, Text: text}
	// The daemon's texts end in " (hint: …)" where it knows what to do.
	if before, after, ok := strings.Cut(text, " (hint: "); ok && strings.HasSuffix(after, ")") {
		refusal.Text, refusal.hint = before, strings.TrimSuffix(after, ")")
	}
	return refusal
}
