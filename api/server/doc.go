// Package server is the daemon's side of the socket: it accepts connections,
// establishes with the kernel's help who speaks, reads requests, hands them to
// an api.Backend and sends its answers.
//
// One epoll instance watches every socket, and one mutex guards everything the
// package knows. Whoever holds it never waits: all system calls made under it
// return at once. The event loop answers what needs no Backend (Ping,
// properties, introspection); a Backend's methods, and the closing of file
// descriptors that strangers passed, run in bounded pools of goroutines, each
// of which takes the mutex to send its own answer. An idle server has no timer
// and no goroutine but a few parked ones: nothing wakes it up.
//
// Invariants: a connection has one request in flight, so answers keep the
// order of requests; it is read no further while an answer of its waits to be
// sent; it holds a buffer only while part of a message or of an answer is in
// it. All bytes of a message carry one credential. Every descriptor received
// is closed, by the pool of closers, whatever happens. What a peer uses is
// charged to its accounts until it is given back in truth: a connection until
// its socket is closed and its last request has returned.
package server
