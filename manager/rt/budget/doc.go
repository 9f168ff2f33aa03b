// Package budget lends realtime runtime to cgroups, where the kernel budgets it
// (RT_GROUP_SCHED, cgroup v1's cpu.rt_runtime_us; Documentation/scheduler/sched-rt-group.rst):
// no task of a cgroup without runtime may be realtime (EPERM), and cgroups side by
// side have no more together than the one above them, as shares of their periods.
//
// A cgroup without runtime gets a share of its period, and so does every one above
// it, up to the first that has runtime of its own, out of what that has left. The
// share is what each CPU may spend on the cgroup's realtime threads, which compete
// for it: with several loans to one cgroup it has the largest share that one of them
// asked for. Runtime that somebody else has set is never changed.
//
// What is lent is marked on the cgroup itself and given back in full, by the next
// daemon if need be, unless somebody has set another value meanwhile.
package budget
