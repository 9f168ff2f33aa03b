// Package manager implements api.Backend on this host's cgroups.
//
// Every request goes gather → decide → act. It gathers facts about who asks
// (manager/identity) and where (cgfs) and keeps the handles they came from;
// package privcheck decides on the facts; the act is done on the same handles
// and takes the Decision as an argument, so that a forgotten check does not
// compile. It has no wire format.
package manager
