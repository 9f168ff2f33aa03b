package api

import (
	"errors"
	"fmt"
)

// Kind says what went wrong in terms a client can act on. The set is closed:
// api/server maps every kind to a D-Bus error name in one switch.
type Kind int

// The kinds of error. The zero Kind is not valid.
const (
	// Invalid: the request itself is malformed; asking again will not help.
	Invalid Kind = iota + 1
	// NotFound: the cgroup, key, controller or task does not exist, or is not
	// visible to the requestor. The two are not told apart.
	NotFound
	// Exists: what was to be created is already there.
	Exists
	// Denied: a clause of docs/SECURITY.md refuses.
	Denied
	// Busy: the kernel refuses for now (tasks or children are left, no
	// internal processes, a deadline passed).
	Busy
	// Limit: a bound of the daemon's own is reached.
	Limit
	// Unsupported: this host, hierarchy or kernel cannot do it.
	Unsupported
	// Internal: a failure of the daemon. The peer learns no more than that.
	Internal
)

// Kinds lists every valid Kind, for tests and tables.
func Kinds() []Kind {
	return []Kind{Invalid, NotFound, Exists, Denied, Busy, Limit, Unsupported, Internal}
}

// String returns the kind's name in lower case.
func (k Kind) String() string {
	switch k {
	case Invalid:
		return "invalid"
	case NotFound:
		return "not found"
	case Exists:
		return "exists"
	case Denied:
		return "denied"
	case Busy:
		return "busy"
	case Limit:
		return "limit"
	case Unsupported:
		return "unsupported"
	case Internal:
		return "internal"
	}
	return "unknown"
}

// ErrorUnknownMethod is the D-Bus name of the answer to a method that the
// object does not have.
const ErrorUnknownMethod = "org.freedesktop.DBus.Error.UnknownMethod"

// Refusal0 starts the text of every refusal of Interface0, whose name is that
// of Invalid whatever the kind.
const Refusal0 = "invalid request"

// ErrorName returns the D-Bus name of a kind of error.
func ErrorName(k Kind) string {
	switch k {
	case Invalid:
		return "org.freedesktop.DBus.Error.InvalidArgs"
	case NotFound:
		return "org.freedesktop.DBus.Error.FileNotFound"
	case Exists:
		return "org.freedesktop.DBus.Error.FileExists"
	case Denied:
		return "org.freedesktop.DBus.Error.AccessDenied"
	case Busy:
		return ErrorBusy
	case Limit:
		return "org.freedesktop.DBus.Error.LimitsExceeded"
	case Unsupported:
		return "org.freedesktop.DBus.Error.NotSupported"
	case Internal:
	}
	return "org.freedesktop.DBus.Error.Failed"
}

// The errors of RealtimeInterface: a D-Bus name, and the text of an errno, which
// is all that rtkit says.
const (
	errorFailed = "org.freedesktop.DBus.Error.Failed"
	errorDenied = "org.freedesktop.DBus.Error.AccessDenied"
)

// RealtimeError returns the D-Bus name and the text by which RealtimeInterface
// tells of a kind of error, as rtkit's clients know them.
func RealtimeError(k Kind) (name, text string) {
	switch k {
	case Denied, Unsupported:
		return errorDenied, "Operation not permitted"
	case Busy, Limit, Exists:
		return errorDenied, "Device or resource busy"
	case NotFound:
		return errorFailed, "No such file or directory"
	case Invalid:
		return errorFailed, "Invalid argument"
	case Internal:
	}
	return errorFailed, "Input/output error"
}

// RealtimeKind returns the kind of an error of RealtimeInterface.
func RealtimeKind(name, text string) Kind {
	for _, k := range []Kind{Denied, Busy, NotFound, Invalid} {
		if n, t := RealtimeError(k); n == name && t == text {
			return k
		}
	}
	if name == errorDenied {
		return Denied
	}
	return Internal
}

// NamedKind returns the kind of error that has the D-Bus name, and whether
// there is one.
func NamedKind(name string) (Kind, bool) {
	for _, k := range Kinds() {
		if ErrorName(k) == name {
			return k, true
		}
	}
	return 0, false
}

// Error is what a Backend returns. Text goes to the peer and is made of the
// peer's own words: never a path or a pid of the host. Cause goes to the log
// alone.
type Error struct {
	Kind Kind
	// Text names the operation, the caller's argument and the reason, lower
	// case and without a final period.
	Text string
	// Hint says what to do about it; may be empty.
	Hint string
	// Cause is the error underneath, for the log; may be nil.
	Cause error
}

// Error returns Text, with the hint if there is one. It is safe to send to
// the peer.
func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Text
	}
	return e.Text + " (hint: " + e.Hint + ")"
}

// Unwrap returns the cause, for errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Cause }

// Errorf makes an Error whose text is formatted; the arguments must be the
// caller's own words.
func Errorf(k Kind, format string, args ...any) *Error {
	return &Error{Kind: k, Text: fmt.Sprintf(format, args...)}
}

// WithHint returns e with the hint set.
func (e *Error) WithHint(hint string) *Error {
	e.Hint = hint
	return e
}

// WithCause returns e with the cause set.
func (e *Error) WithCause(err error) *Error {
	e.Cause = err
	return e
}

// AsError returns err as an *Error. What is not one becomes Internal, with a
// text that gives nothing away.
func AsError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: Internal, Text: "internal error; the daemon's log says more", Cause: err}
}
