// Package identity establishes facts about processes from the kernel alone:
// who a requestor is, what its numbers mean here, and what a victim is made
// of. Every fact is read through handles (a pidfd and a /proc/PID directory
// proven to be of the same process) and counts only if the process is still
// alive after the reading.
//
// It decides nothing and changes nothing.
package identity
