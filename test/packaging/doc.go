// Package packaging tests what is installed: the tree of make install, the Debian
// package in a machine of its own, and what starts the daemon under each init
// system.
package packaging
