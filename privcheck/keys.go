package privcheck

import (
	"slices"
	"strings"
)

// KeyClass says who may write a kind of control file (clause 6).
type KeyClass int

// The classes. The zero value may be written by nobody.
const (
	// NeverWritten: not by anybody, over this interface.
	NeverWritten KeyClass = iota
	// HostRootOnly: by host root alone.
	HostRootOnly
	// Delegable: by whoever has write privilege over the file.
	Delegable
)

// String returns the class as docs/SECURITY.md has it.
func (c KeyClass) String() string {
	switch c {
	case HostRootOnly:
		return "host root"
	case Delegable:
		return "delegable"
	case NeverWritten:
	}
	return "never"
}

// KeyPattern is a line of the table of files that may be written. A "*" in
// Pattern stands for one or more letters, digits or underscores.
type KeyPattern struct {
	Pattern string
	Class   KeyClass
}

// Files for which SetValue has a rule of its own.
const (
	releaseAgent = "release_agent"
	rtPeriod     = "cpu.rt_period_us"
)

// keyPatterns lists every file that may be written at all. What is not listed
// is refused, so a file that a future kernel brings is closed until somebody has
// thought about it. Two tests admit a file as Delegable: whatever is written to
// it in a cgroup, that cgroup and those below stay within what their ancestors
// allow; and nothing outside changes but the share that siblings get.
// Documentation/admin-guide/cgroup-v1/ and cgroup-v2.rst describe the files.
var keyPatterns = []KeyPattern{
	{"blkio.bfq.weight", Delegable},
	{"blkio.bfq.weight_device", Delegable},
	{"blkio.leaf_weight", Delegable},
	{"blkio.leaf_weight_device", Delegable},
	{"blkio.throttle.read_bps_device", Delegable},
	{"blkio.throttle.read_iops_device", Delegable},
	{"blkio.throttle.write_bps_device", Delegable},
	{"blkio.throttle.write_iops_device", Delegable},
	{"blkio.weight", Delegable},
	{"blkio.weight_device", Delegable},

	{"cgroup.freeze", Delegable},
	{"cgroup.max.depth", Delegable},
	{"cgroup.max.descendants", Delegable},

	{"cpu.cfs_burst_us", Delegable},
	{"cpu.cfs_period_us", Delegable},
	{"cpu.cfs_quota_us", Delegable},
	{"cpu.idle", Delegable},
	{"cpu.max", Delegable},
	{"cpu.max.burst", Delegable},
	{rtPeriod, Delegable}, // within bounds: see SetValue
	{"cpu.rt_runtime_us", Delegable},
	{"cpu.shares", Delegable},
	{"cpu.uclamp.max", Delegable},
	{"cpu.uclamp.min", Delegable},
	{"cpu.weight", Delegable},
	{"cpu.weight.nice", Delegable},

	{"cpuacct.usage", Delegable}, // writing 0 resets it

	{"cpuset.cpus", Delegable},
	{"cpuset.memory_migrate", Delegable},
	{"cpuset.memory_spread_page", Delegable},
	{"cpuset.memory_spread_slab", Delegable},
	{"cpuset.mems", Delegable},
	// They rebuild the scheduling domains of the whole host.
	{"cpuset.sched_load_balance", HostRootOnly},
	{"cpuset.sched_relax_domain_level", HostRootOnly},

	// The kernel lets no cgroup allow what its parent does not.
	{"devices.allow", Delegable},
	{"devices.deny", Delegable},

	{"dmem.low", Delegable},
	{"dmem.max", Delegable},
	{"dmem.min", Delegable},

	{"freezer.state", Delegable},

	{"hugetlb.*.failcnt", Delegable},
	{"hugetlb.*.limit_in_bytes", Delegable},
	{"hugetlb.*.max", Delegable},
	{"hugetlb.*.max_usage_in_bytes", Delegable},
	{"hugetlb.*.rsvd.failcnt", Delegable},
	{"hugetlb.*.rsvd.limit_in_bytes", Delegable},
	{"hugetlb.*.rsvd.max", Delegable},
	{"hugetlb.*.rsvd.max_usage_in_bytes", Delegable},

	{"io.bfq.weight", Delegable},
	{"io.latency", Delegable}, // a missed target throttles siblings alone
	{"io.max", Delegable},
	{"io.weight", Delegable},

	{"memory.failcnt", Delegable}, // this and the other counters: writing 0 resets
	{"memory.high", Delegable},
	{"memory.kmem.failcnt", Delegable},
	{"memory.kmem.limit_in_bytes", Delegable},
	{"memory.kmem.max_usage_in_bytes", Delegable},
	{"memory.kmem.tcp.failcnt", Delegable},
	{"memory.kmem.tcp.limit_in_bytes", Delegable},
	{"memory.kmem.tcp.max_usage_in_bytes", Delegable},
	{"memory.limit_in_bytes", Delegable},
	{"memory.low", Delegable},
	{"memory.max", Delegable},
	{"memory.max_usage_in_bytes", Delegable},
	{"memory.memsw.failcnt", Delegable},
	{"memory.memsw.limit_in_bytes", Delegable},
	{"memory.memsw.max_usage_in_bytes", Delegable},
	{"memory.min", Delegable},
	{"memory.oom.group", Delegable},
	// With the killer off, tasks at their limit sleep, holding what locks of
	// the kernel they hold.
	{"memory.oom_control", HostRootOnly},
	{"memory.soft_limit_in_bytes", Delegable},
	{"memory.swap.high", Delegable},
	{"memory.swap.max", Delegable},
	{"memory.swappiness", Delegable},
	{"memory.zswap.max", Delegable},

	{"misc.max", Delegable},

	// Not hierarchical: a child may take any class and any priority, whatever its
	// parent has, so these are no limits that can be handed on.
	{"net_cls.classid", HostRootOnly},
	{"net_prio.*", HostRootOnly},

	{"pids.max", Delegable},

	{"rdma.max", Delegable},

	{releaseAgent, HostRootOnly}, // of a hierarchy's root: see SetValue
}

// KeyPatterns returns the table of files that may be written, sorted.
func KeyPatterns() []KeyPattern { return slices.Clone(keyPatterns) }

// ClassOf returns the class of the kernel's control file called name. A name
// that is not in the table is NeverWritten; it may still be read.
func ClassOf(name string) KeyClass {
	for _, k := range keyPatterns {
		if match(k.Pattern, name) {
			return k.Class
		}
	}
	return NeverWritten
}

// match reports whether name is what pattern, with at most one "*", describes.
func match(pattern, name string) bool {
	before, after, wild := strings.Cut(pattern, "*")
	if !wild {
		return pattern == name
	}
	rest, ok := strings.CutPrefix(name, before)
	if !ok {
		return false
	}
	word, ok := strings.CutSuffix(rest, after)
	if !ok || word == "" {
		return false
	}
	return !strings.ContainsFunc(word, func(c rune) bool {
		return c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z')
	})
}
