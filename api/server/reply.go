package server

import (
	"errors"
	"fmt"
	"runtime/debug"
	"unicode/utf8"

	"cgmanager/api"
	"cgmanager/api/wire"
)

// D-Bus error names of the server's own answers.
const (
	nameInvalidArgs   = "org.freedesktop.DBus.Error.InvalidArgs"
	nameUnknownMethod = api.ErrorUnknownMethod
	nameAccessDenied  = "org.freedesktop.DBus.Error.AccessDenied"
	nameFailed        = "org.freedesktop.DBus.Error.Failed"
	nameNoOwner       = "org.freedesktop.DBus.Error.NameHasNoOwner"
	nameNoProperty    = "org.freedesktop.DBus.Error.UnknownProperty"
)

// errorName returns the D-Bus name of a kind of error. The original daemon,
// whose clients look at the text if at all, knew one name for every refusal.
func errorName(iface string, k api.Kind) string {
	if iface == api.Interface0 {
		return nameInvalidArgs
	}
	return api.ErrorName(k)
}

// appendFailure appends the answer to a request that failed with err.
func (s *Server) appendFailure(out []byte, iface string, serial, reply uint32, err error) []byte {
	if wrong, ok := errors.AsType[wire.ArgumentError](err); ok {
		return wire.AppendError(out, serial, reply, nameInvalidArgs, string(wrong))
	}
	e, ok := errors.AsType[*api.Error](err)
	if !ok {
		e = api.AsError(err)
		s.log.WithError(err).Error("a request failed for no reason that the peer may know")
	}
	if iface == api.RealtimeInterface {
		name, text := api.RealtimeError(e.Kind)
		return wire.AppendError(out, serial, reply, name, text)
	}
	text := e.Error()
	if iface == api.Interface0 {
		text = api.Refusal0 + ": " + text
	}
	return wire.AppendError(out, serial, reply, errorName(iface, e.Kind), clip(text))
}

// clip shortens a text to maxText bytes, between two characters.
func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	n := maxText - len("…")
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// recovered turns a panic into an error: a bug ends one request, not the
// daemon and every other request with it.
func (s *Server) recovered(err *error) {
	if v := recover(); v != nil {
		s.log.Errorf("panic: %v\n%s", v, debug.Stack())
		*err = api.AsError(fmt.Errorf("panic: %v", v))
	}
}
