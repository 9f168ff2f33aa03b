// Package proxy is an api.Backend that asks another daemon: that of the host, a
// proxy further out, or the original cgmanager. It decides nothing. It names, to
// the one below, the process that asks, and makes sure that this is no other than
// the one that opened the connection here; everything else is the daemon's.
//
// Each connection of a client has one connection to the daemon below, opened at
// the first request and anew after the daemon was restarted. On it go the hops
// of the chain (ActFor), then the client's requests, one at a time, each with the
// credential of the process that sent it. Nothing else is remembered.
//
// What comes from below is bounded like what comes from a client: that daemon is
// more privileged, but a bug of its must not end the proxy.
package proxy
