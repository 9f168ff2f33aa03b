package cgfs

import (
	"math"
	"slices"
	"strings"
)

// Sources of conversions, beside the kernel's documentation: projects that keep
// v1's values working on v2, so that a limit means the same next to theirs.
const (
	srcRunc    = "opencontainers/cgroups (runc): "
	srcCrun    = "crun.1, \"cgroup v2\""
	srcMemcg   = "mm/memcontrol.c, mm/memcontrol-v1.c"
	recursive  = "v2 counts the cgroups below as well"
	noneOnV2   = "always `0`: v2 has no such thing"
	noneOrSame = "unlimited is `-1` on v1 (and reads as the greatest number), `max` on v2"
)

// fileKeys are control files by their own names: those that only one version
// has, and those that both have with different content. On a host with their
// version they are themselves; on the other they are translated, or there is
// no equivalent. Their order is that of docs/KEYS.md.
var fileKeys = slices.Concat(fileKeys1, fileKeys2, untranslated)

// fileKeys1 are files of v1.
var fileKeys1 = []*Key{
	file1("memory", "memory.limit_in_bytes", noneOrSame+"; memory.memsw.limit_in_bytes stays, and bounds it", srcRunc+"fs2/memory.go", &binding{"memory", "memory.max, memory.swap.max", setMemory2, getLimit1("memory", "memory.max", pageSize)}),
	file1("memory", "memory.soft_limit_in_bytes", "the number as it is: v2 protects what is below, and has `0` until it is set", srcRunc+"fs2/memory.go", translateLimit("memory", "memory.low", true)),
	file1("memory", "memory.memsw.limit_in_bytes", "memory and swap together = memory.max + memory.swap.max", srcRunc+"ConvertMemorySwapToCgroupV2Value", &binding{"memory", "memory.swap.max, memory.max", setMemsw2, getMemsw2}),
	file1("memory", "memory.usage_in_bytes", recursiveAsV1, docMemory, readText("memory", "memory.current")),
	file1("memory", "memory.max_usage_in_bytes", "Linux 5.19; cannot be reset", docMemory, readText("memory", "memory.peak")),
	file1("memory", "memory.memsw.usage_in_bytes", "memory.current + memory.swap.current", srcRunc+"fs2/memory.go", &binding{"memory", "memory.current, memory.swap.current", nil, getMemswUsage2}),
	file1("memory", "memory.failcnt", "how often the limit was hit; cannot be reset", srcMemcg, readEvent("memory", "memory.events.local", "max")),
	file1("memory", "memory.memsw.failcnt", "how often swap's limit was hit; cannot be reset", docMemory, readEvent("memory", "memory.swap.events", "max")),
	file1("memory", "memory.kmem.usage_in_bytes", "Linux 5.18", docMemory, readEvent("memory", "memory.stat", "kernel")),
	file1("memory", "memory.stat", "v1's fields, of which v2 counts all but `pgpgin` and `pgpgout`; "+recursive+", so that `X` and `total_X` are one. `hierarchical_*` are the least limits, those of the cgroups above included", srcMemcg, &binding{"memory", "memory.stat, memory.swap.current, memory.max, memory.swap.max", nil, getMemoryStat2}),
	file1("memory", "memory.numa_stat", "bytes to pages, the lists of each kind added up; "+recursive, srcMemcg, &binding{"memory", "memory.numa_stat", nil, getNumaStat2}),
	file1("memory", "memory.oom_control", "`oom_kill_disable 0`, `under_oom 0`: v2's killer is always on; "+recursive, srcMemcg, &binding{"memory", "memory.events", nil, getOOMControl2}),
	file1("memory", "memory.use_hierarchy", "always `1`: v2 is hierarchical", docV2, always("memory", "1")),
	file1("memory", "memory.move_charge_at_immigrate", noneOnV2, docV2, always("memory", "0")),

	file1("cpu", "cpu.shares", "the exponent of 10 is quadratic in log2(shares), through 2 → 1, 1024 → 100, 262144 → 10000; reads back to within one weight", srcRunc+"ConvertCPUSharesToCgroupV2Value", &binding{"cpu", "cpu.weight", setShares2, getConverted("cpu", "cpu.weight", weightToShares)}),
	file1("cpu", "cpu.cfs_quota_us", "the first field; `-1` is `max`", docCPU, &binding{"cpu", "cpu.max", setQuota2, getMax2(0)}),
	file1("cpu", "cpu.cfs_period_us", "the second field", docCPU, &binding{"cpu", "cpu.max", setPeriod2, getMax2(1)}),
	file1("cpu", "cpu.cfs_burst_us", "the number as it is", docCPU, same("cpu", "cpu.max.burst")),
	file1("cpu", "cpu.stat", "`throttled_time` and `burst_time` in nanoseconds, from microseconds", docCPU, &binding{"cpu", "cpu.stat", nil, getThrottled2}),

	file1("cpuset", "cpuset.cpus", "what is empty on v2 reads as what is in effect, as in a cgroup that cgmanager made on v1", docCpuset, &binding{"cpuset", "cpuset.cpus, cpuset.cpus.effective", setSame("cpuset.cpus"), getList2("cpuset.cpus")}),
	file1("cpuset", "cpuset.mems", "as cpuset.cpus", docCpuset, &binding{"cpuset", "cpuset.mems, cpuset.mems.effective", setSame("cpuset.mems"), getList2("cpuset.mems")}),
	file1("cpuset", "cpuset.effective_cpus", "the list as it is", docCpuset, readText("cpuset", "cpuset.cpus.effective")),
	file1("cpuset", "cpuset.effective_mems", "the list as it is", docCpuset, readText("cpuset", "cpuset.mems.effective")),

	file1("cpuacct", "cpuacct.stat", "1/100 s (USER_HZ), from microseconds", docCpuacct, &binding{"", "cpu.stat", nil, getCPUStat2}),
	file1("cpuacct", "cpuacct.usage", "nanoseconds, from microseconds; cannot be reset", docCpuacct, readNanos("usage_usec")),
	file1("cpuacct", "cpuacct.usage_user", "as cpuacct.usage", docCpuacct, readNanos("user_usec")),
	file1("cpuacct", "cpuacct.usage_sys", "as cpuacct.usage", docCpuacct, readNanos("system_usec")),

	file1("freezer", "freezer.state", "`FROZEN` and `THAWED` are `1` and `0`; `FREEZING` while tasks have yet to stop", docFreezer, &binding{"", "cgroup.freeze, cgroup.events", setFreezerState2, getFreezerState2}),
	file1("freezer", "freezer.self_freezing", "the number as it is", docFreezer, readText("", "cgroup.freeze")),
	file1("freezer", "freezer.parent_freezing", "`1` if it is frozen by one above alone; v2 cannot tell where it is frozen itself: `0`", docFreezer, &binding{"", "cgroup.events, cgroup.freeze", nil, getParentFreezing2}),

	file1("blkio", "blkio.weight", "io.bfq.weight takes it as it is, io.weight 1 + (w − 10) · 9999 / 990", srcRunc+"ConvertBlkIOToIOWeightValue; "+srcCrun, &binding{"io", "io.bfq.weight, io.weight", setBlkioWeight2(weightOfCFQ), getBlkioWeight2(weightOfCFQ)}),
	file1("blkio", "blkio.weight_device", "`MAJ:MIN weight`, as blkio.weight", srcRunc+"fs2/io.go", &binding{"io", "io.bfq.weight, io.weight", setBlkioWeightDevice2(weightOfCFQ), getBlkioWeightDevice2(weightOfCFQ)}),
	file1("blkio", "blkio.bfq.weight", "as it is, to io.weight too: the default is 100 in both", docBlkio, &binding{"io", "io.bfq.weight, io.weight", setBlkioWeight2(weightOfBFQ), getBlkioWeight2(weightOfBFQ)}),
	file1("blkio", "blkio.bfq.weight_device", "`MAJ:MIN weight`, as blkio.bfq.weight", docBlkio, &binding{"io", "io.bfq.weight, io.weight", setBlkioWeightDevice2(weightOfBFQ), getBlkioWeightDevice2(weightOfBFQ)}),
	throttle1("blkio.throttle.read_bps_device", "rbps"),
	throttle1("blkio.throttle.write_bps_device", "wbps"),
	throttle1("blkio.throttle.read_iops_device", "riops"),
	throttle1("blkio.throttle.write_iops_device", "wiops"),
	ioStat1("blkio.throttle.io_service_bytes", "bytes"),
	ioStat1("blkio.throttle.io_service_bytes_recursive", "bytes"),
	ioStat1("blkio.throttle.io_serviced", "ios"),
	ioStat1("blkio.throttle.io_serviced_recursive", "ios"),
	ioStat1("blkio.bfq.io_service_bytes", "bytes"),
	ioStat1("blkio.bfq.io_service_bytes_recursive", "bytes"),
	ioStat1("blkio.bfq.io_serviced", "ios"),
	ioStat1("blkio.bfq.io_serviced_recursive", "ios"),

	file1("", "notify_on_release", noneOnV2, docV2, always("", "0")),
	file1("", "cgroup.clone_children", noneOnV2, docV2, always("", "0")),
}

// fileKeys2 are files of v2.
var fileKeys2 = []*Key{
	file2("memory", "memory.max", noneOrSame+"; swap's own limit stays", srcRunc+"fs/memory.go", &binding{"memory", "memory.limit_in_bytes, memory.memsw.limit_in_bytes", setAs("max", setMemory1), getLimit("memory.limit_in_bytes")}),
	file2("memory", "memory.low", "the number as it is: v1 reclaims what is above first", srcRunc+"fs/memory.go", translateLimit("memory", "memory.soft_limit_in_bytes", false)),
	file2("memory", "memory.swap.max", "memory and swap together, less the limit of memory; needs one, or is `max`", srcRunc+"ConvertMemorySwapToCgroupV2Value", &binding{"memory", "memory.memsw.limit_in_bytes, memory.limit_in_bytes", setAs("max", setSwap1), getSwap1}),
	file2("memory", "memory.current", "the number as it is", docMemory, readText("memory", "memory.usage_in_bytes")),
	file2("memory", "memory.swap.current", "memory and swap together, less memory", srcRunc+"fs/memory.go", &binding{"memory", "memory.memsw.usage_in_bytes, memory.usage_in_bytes", nil, getSwapUsage1}),
	file2("memory", "memory.peak", "the number as it is", docMemory, readText("memory", "memory.max_usage_in_bytes")),
	file2("memory", "memory.events", "as memory.events.local: v1 does not count the cgroups below", srcMemcg, &binding{"memory", "memory.failcnt, memory.oom_control", nil, getEvents1}),
	file2("memory", "memory.events.local", "`max` is memory.failcnt, `oom_kill` that of memory.oom_control; v1 counts no others", srcMemcg, &binding{"memory", "memory.failcnt, memory.oom_control", nil, getEvents1}),
	file2("memory", "memory.swap.events", "`max` is memory.memsw.failcnt", docMemory, &binding{"memory", "memory.memsw.failcnt", nil, getSwapEvents1}),
	file2("memory", "memory.stat", "v2's fields, as far as v1 has a `total_` one", srcMemcg, &binding{"memory", "memory.stat", nil, getMemoryStat1}),

	file2("cpu", "cpu.weight", "the inverse of cpu.shares", srcRunc+"ConvertCPUSharesToCgroupV2Value", &binding{"cpu", "cpu.shares", setConverted("cpu.shares", 1, 10000, weightToShares), getConverted("cpu", "cpu.shares", sharesToWeight)}),
	file2("cpu", "cpu.max", "quota and period; `max` is `-1`", docCPU, &binding{"cpu", "cpu.cfs_quota_us, cpu.cfs_period_us", setMax1, getMax1}),
	file2("cpu", "cpu.max.burst", "the number as it is", docCPU, same("cpu", "cpu.cfs_burst_us")),
	file2("cpu", "cpu.stat", "microseconds, from nanoseconds; needs the controller cpuacct", docCPU+", "+docCpuacct, &binding{"cpu", "cpu.stat, cpuacct.usage, cpuacct.usage_user, cpuacct.usage_sys", nil, getCPUStat1}),

	file2("cpuset", "cpuset.cpus", "the list as it is", docCpuset, same("cpuset", "cpuset.cpus")),
	file2("cpuset", "cpuset.mems", "the list as it is", docCpuset, same("cpuset", "cpuset.mems")),
	file2("cpuset", "cpuset.cpus.effective", "the list as it is", docCpuset, readText("cpuset", "cpuset.effective_cpus")),
	file2("cpuset", "cpuset.mems.effective", "the list as it is", docCpuset, readText("cpuset", "cpuset.effective_mems")),

	file2("", "cgroup.freeze", "`1` and `0` are `FROZEN` and `THAWED`", docFreezer, &binding{"freezer", "freezer.state, freezer.self_freezing", setFreeze1, getText("freezer", "freezer.self_freezing")}),
	file2("", "cgroup.events", "`frozen` alone: v1 does not count tasks below", docFreezer, &binding{"freezer", "freezer.state", nil, getEventsFrozen1}),

	file2("io", "io.max", "a file of v1 for each of rbps, wbps, riops and wiops; `max` is `0`", docBlkio, &binding{"blkio", strings.Join(throttleFiles, ", "), setIOMax1, getIOMax1}),
	file2("io", "io.weight", "as it is: the default is 100 in both, but BFQ's weights end at 1000", docBlkio, &binding{"blkio", "blkio.bfq.weight, blkio.bfq.weight_device", setIOWeight1, getIOWeight1}),
	file2("io", "io.bfq.weight", "as it is", docBlkio, &binding{"blkio", "blkio.bfq.weight, blkio.bfq.weight_device", setIOWeight1, getIOWeight1}),
	file2("io", "io.stat", "the counts of one device in a line", docBlkio, &binding{"blkio", "blkio.throttle.io_service_bytes_recursive, blkio.throttle.io_serviced_recursive", nil, getIOStat1}),
}

const recursiveAsV1 = "the number as it is; both count the cgroups below"

// untranslated are the files of which the other version has no equivalent.
var untranslated = func() []*Key {
	var ks []*Key
	for _, f := range []string{
		"memory.swappiness", "memory.force_empty", "memory.pressure_level",
		"memory.memsw.max_usage_in_bytes",
		"memory.kmem.limit_in_bytes", "memory.kmem.failcnt", "memory.kmem.max_usage_in_bytes", "memory.kmem.slabinfo",
		"memory.kmem.tcp.limit_in_bytes", "memory.kmem.tcp.usage_in_bytes", "memory.kmem.tcp.failcnt", "memory.kmem.tcp.max_usage_in_bytes",
		"cpu.rt_runtime_us", "cpu.rt_period_us",
		"cpuacct.usage_percpu", "cpuacct.usage_percpu_user", "cpuacct.usage_percpu_sys", "cpuacct.usage_all",
		"cpuset.cpu_exclusive", "cpuset.mem_exclusive", "cpuset.mem_hardwall", "cpuset.memory_migrate",
		"cpuset.memory_pressure", "cpuset.memory_pressure_enabled", "cpuset.memory_spread_page", "cpuset.memory_spread_slab",
		"cpuset.sched_load_balance", "cpuset.sched_relax_domain_level",
		"net_cls.classid", "net_prio.ifpriomap", "net_prio.prioidx",
		"blkio.leaf_weight", "blkio.leaf_weight_device", "blkio.reset_stats", "blkio.time", "blkio.sectors",
		"release_agent", "cgroup.event_control", "cgroup.sane_behavior",
	} {
		ks = append(ks, file1(ControllerOf(f), f, "", "", nil))
	}
	for _, f := range []string{
		"memory.min", "memory.high", "memory.oom.group", "memory.reclaim", "memory.pressure",
		"memory.swap.high", "memory.swap.peak", "memory.zswap.current", "memory.zswap.max", "memory.zswap.writeback",
		"cpu.weight.nice", "cpu.pressure", "cpu.stat.local",
		"cpuset.cpus.partition", "cpuset.cpus.exclusive", "cpuset.cpus.exclusive.effective",
		"io.latency", "io.prio.class", "io.pressure", "irq.pressure",
		"cgroup.controllers", "cgroup.subtree_control", "cgroup.type", "cgroup.kill", "cgroup.stat", "cgroup.pressure",
		"cgroup.max.depth", "cgroup.max.descendants",
	} {
		ks = append(ks, file2(ControllerOf(f), f, "", "", nil))
	}
	return ks
}()

// hugeFileKey makes the key of a file of the hugetlb controller, of which
// there is one set for each size.
func hugeFileKey(name string) (*Key, bool) {
	rest, _ := strings.CutPrefix(name, "hugetlb.")
	size, file, _ := strings.Cut(rest, ".")
	unit := strings.TrimLeft(size, "0123456789")
	shift := map[string]int{"KB": 10, "MB": 20, "GB": 30}[unit]
	n, err := number(strings.TrimSuffix(size, unit), 0, math.MaxInt64>>30)
	if shift == 0 || err != nil {
		return nil, false
	}
	const c = "hugetlb"
	prefix := c + "." + size + "."
	rsvd := ""
	if f, ok := strings.CutPrefix(file, "rsvd."); ok {
		file, rsvd = f, "rsvd."
	}
	how := "the number as it is"
	switch file {
	case "limit_in_bytes":
		to := prefix + rsvd + "max"
		return file1(c, name, noneOrSame, docHuge, &binding{c, to, setAs("-1", setLimit(to, show2)), getLimit1(c, to, max(n<<shift, 1))}), true
	case "usage_in_bytes":
		return file1(c, name, how, docHuge, readText(c, prefix+rsvd+"current")), true
	case "failcnt":
		if rsvd != "" {
			return file1(c, name, "", "", nil), true
		}
		return file1(c, name, "how often the limit was hit, or one below; cannot be reset", docHuge, readEvent(c, prefix+"events", "max")), true
	case "max_usage_in_bytes":
		return file1(c, name, "", "", nil), true
	case "max":
		return file2(c, name, noneOrSame, docHuge, translateLimit(c, prefix+rsvd+"limit_in_bytes", false)), true
	case "current":
		return file2(c, name, how, docHuge, readText(c, prefix+rsvd+"usage_in_bytes")), true
	case "events", "events.local":
		if rsvd != "" {
			return nil, false
		}
		return file2(c, name, "`max` is hugetlb.SIZE.failcnt: of this cgroup alone", docHuge, &binding{c, prefix + "failcnt", nil, getHugeEvents1(prefix + "failcnt")}), true
	}
	return nil, false
}

// file1 and file2 make the key of a file of v1 or v2 and of its equivalent on
// the other, nil if there is none; how is the conversion.
func file1(controller, file, how, source string, v2 *binding) *Key {
	return &Key{Name: file, file: V1, doc: how, source: source, v1: verbatim(controller, file), v2: v2}
}

func file2(controller, file, how, source string, v1 *binding) *Key {
	return &Key{Name: file, file: V2, doc: how, source: source, v1: v1, v2: verbatim(controller, file)}
}

func throttle1(file, sub string) *Key {
	return file1("blkio", file, "a number a second; `0`, none, is `max`", srcRunc+"fs2/io.go", &binding{"io", "io.max (" + sub + ")", setThrottle1(sub), getThrottle1(sub)})
}

func ioStat1(file, unit string) *Key {
	return file1("blkio", file, "`Read`, `Write`, `Discard` and their `Total`: v2 does not tell `Sync` from `Async`; "+recursive, docBlkio, &binding{"io", "io.stat", nil, getServiced2(unit)})
}

// verbatim is a file on a host that has it.
func verbatim(controller, file string) *binding {
	return &binding{controller, file, func(_ *Set, value string, _ Reader) ([]Write, error) {
		value = strings.TrimRight(value, "\n")
		if strings.ContainsAny(value, "\n\x00") {
			return nil, badValue(value, "one line")
		}
		return []Write{{File: file, Value: value}}, nil
	}, getText(controller, file)}
}

// same is a file whose values the other version's file takes as they are.
func same(controller, file string) *binding { return verbatim(controller, file) }

func setSame(file string) func(*Set, string, Reader) ([]Write, error) { return verbatim("", file).set }

// always is what a file of v1 shows where v2 leaves no choice.
func always(controller, value string) *binding {
	return &binding{controller, "", nil, func(*Set, Reader) (string, error) { return value, nil }}
}
