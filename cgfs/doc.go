// Package cgfs reaches the kernel's cgroup hierarchies: a detached mount of
// each, held by a handle; directories and control files below it, resolved by
// openat2 alone; the parsers of /proc/PID/cgroup and mountinfo; and the
// translation of abstract keys into control files. Version 1 and version 2
// stand behind the same types and differ in data.
//
// It knows nothing of rights: whoever calls it has decided already. It never
// creates a control file, follows no symbolic link and crosses no mount.
package cgfs
