// Package lxc starts containers with real LXC for tests, on the daemon's real
// sockets and with what packaging/lxc installs: so in virtual machines alone.
//
// A Site is where containers are started, by somebody: the host's root, a user,
// or root of a container. A Container is a Site again, to any depth.
package lxc
