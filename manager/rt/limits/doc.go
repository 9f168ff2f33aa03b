// Package limits gives processes resource limits, and takes them back (prlimit(2)):
// with RLIMIT_RTPRIO, RLIMIT_NICE and RLIMIT_MEMLOCK a process makes its threads
// realtime, and locks memory, by itself.
//
// Limits are inherited. To find again whoever has inherited them, also where no chain
// of parents leads to it any more, the hard RLIMIT_RTTIME is lowered along with every
// grant, to a number that no other grant has: nobody in a container can raise it again,
// and nobody on the host but root. So a process descends from the grant if it was
// started after it, is in the same container, and
//   - its parent does, or
//   - its hard RLIMIT_RTTIME is the grant's, or lower.
//
// A process that has a grant of its own does not, nor does an orphan of such a one: the
// number and the uid tell. Anybody can take on a number, and be a parent
// (PR_SET_CHILD_SUBREAPER). So it counts only if one of its uids is that of the process
// that was given the limits, or if it is in a user namespace that this uid has made; in
// a container also if the number is the very one, or that uid is root there.
//
// What is given is noted in a file before it is given, for the next daemon.
package limits
