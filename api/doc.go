// Package api is the vocabulary between a transport and whoever answers:
// the methods and their arguments, who asks, the kinds of error, and the
// Backend interface that the manager implements (and a proxy can).
//
// It holds no decision about rights, opens nothing and knows no wire format;
// those are in privcheck, cgfs and api/wire.
package api
