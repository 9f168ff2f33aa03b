// Command bench measures the daemon: it starts the one it is given on a socket
// of its own, loads it from one thread with a closed loop (one request in
// flight on each connection), and prints what a request costs beside its
// floor: what the kernel alone takes for the same, measured in the same run.
//
// Processor time is what the scheduler has booked for the daemon's threads
// (/proc/PID/task/*/schedstat), so it tells more than the clock does on a
// machine that others use. Each figure is the median of several rounds, in
// which daemon and floor take turns.
package main
