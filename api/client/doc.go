// Package client talks to a cgmanager daemon: it finds the socket, logs in and
// has one method for each of the daemon's, with Go types.
//
// It knows nothing of cgroup files and decides nothing. The daemon takes the
// requestor's identity from the kernel, so a Client acts for the process that
// opened it and must not be handed to another one.
package client
