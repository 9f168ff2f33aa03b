// Package wire is the bytes on the socket: the SASL handshake, D-Bus messages
// (D-Bus specification 0.43) for the signatures that the daemon serves, and
// the control messages beside them (unix(7)).
//
// Everything it reads comes from an attacker. It bounds before it allocates,
// rejects what the specification does not allow, and holds no state but a
// handshake's. Slices in a decoded Message point into the buffer it came from.
package wire
