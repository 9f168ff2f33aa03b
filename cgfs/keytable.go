package cgfs

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
)

// Where the kernel documents the files, below Documentation/.
const (
	docV2      = "admin-guide/cgroup-v2.rst"
	docMemory  = "admin-guide/cgroup-v1/memory.rst, " + docV2
	docCpuset  = "admin-guide/cgroup-v1/cpusets.rst, " + docV2
	docCPU     = "scheduler/sched-bwc.rst, " + docV2
	docShares  = "scheduler/sched-design-CFS.rst, " + docV2
	docRT      = "scheduler/sched-rt-group.rst"
	docDevices = "admin-guide/cgroup-v1/devices.rst, " + docV2
	docNetCls  = "admin-guide/cgroup-v1/net_cls.rst"
	docNetPrio = "admin-guide/cgroup-v1/net_prio.rst"
	docHuge    = "admin-guide/cgroup-v1/hugetlb.rst, " + docV2
	docBlkio   = "admin-guide/cgroup-v1/blkio-controller.rst, block/bfq-iosched.rst, " + docV2
	docPids    = "admin-guide/cgroup-v1/pids.rst, " + docV2
	docFreezer = "admin-guide/cgroup-v1/freezer-subsystem.rst, " + docV2
	docCpuacct = "admin-guide/cgroup-v1/cpuacct.rst, " + docV2
)

// abstractKeys is the table of keys. Their order is that of docs/KEYS.md.
var abstractKeys = []*Key{
	{
		Name: "memory.limit", doc: "bytes, with K, M, G or T for powers of 1024, or `max`. On v1 a change keeps swap.limit as it is, but `max` lifts that too", source: docMemory,
		v1: &binding{"memory", "memory.limit_in_bytes, memory.memsw.limit_in_bytes", setMemory1, getLimit("memory.limit_in_bytes")},
		v2: limit2("memory.max"),
	},
	{
		Name: "memory.soft_limit", doc: "as memory.limit; v1 reclaims what is above first, v2 protects what is below", source: docMemory,
		v1: limit1("memory.soft_limit_in_bytes"),
		v2: limit2("memory.low"),
	},
	{
		Name: "swap.limit", doc: "swap alone, as memory.limit. On v1 it needs a memory.limit, or is `max`", source: docMemory,
		v1: &binding{"memory", "memory.memsw.limit_in_bytes, memory.limit_in_bytes", setSwap1, getSwap1},
		v2: limit2("memory.swap.max"),
	},
	{
		Name: "swap.soft_limit", doc: "as memory.limit", source: docMemory,
		v2: limit2("memory.swap.high"),
	},
	{
		Name: "cpus_allowed", doc: "a list of cpus, `0-3,7`", source: docCpuset,
		v1: &binding{"cpuset", "cpuset.cpus", setList("cpuset.cpus"), getText("cpuset", "cpuset.cpus")},
		v2: &binding{"cpuset", "cpuset.cpus, cpuset.cpus.effective", setList("cpuset.cpus"), getList2("cpuset.cpus")},
	},
	{
		Name: "cpus_fraction", doc: "percent of the allowed cpus, above 0 and up to 100, may have a fraction, or `max`; the period stays", source: docCPU,
		v1: &binding{"cpu", "cpu.cfs_quota_us, cpu.cfs_period_us, cpuset.effective_cpus", setCPUs(quota1{}, true), getCPUs(quota1{}, true)},
		v2: &binding{"cpu", "cpu.max, cpuset.cpus.effective", setCPUs(quota2{}, true), getCPUs(quota2{}, true)},
	},
	{
		Name: "cpus_number", doc: "cpus, may have a fraction, or `max`; the period stays", source: docCPU,
		v1: &binding{"cpu", "cpu.cfs_quota_us, cpu.cfs_period_us", setCPUs(quota1{}, false), getCPUs(quota1{}, false)},
		v2: &binding{"cpu", "cpu.max", setCPUs(quota2{}, false), getCPUs(quota2{}, false)},
	},
	{
		Name: "cpu_share_percent", doc: "percent of one default share, 1 to 10000", source: docShares,
		v1: &binding{"cpu", "cpu.shares", setShare("cpu.shares", 1024), getShare("cpu.shares", 1024)},
		v2: &binding{"cpu", "cpu.weight", setShare("cpu.weight", 100), getShare("cpu.weight", 100)},
	},
	{
		Name: "devices_whitelist", doc: "rules, comma separated, which are allowed besides what is: `c 1:3 rwm,b *:* r`; `a` is all. Reads as devices_list", source: docDevices,
		v1: &binding{"devices", "devices.allow, devices.list", setDevices("devices.allow"), getItems("devices", "devices.list")},
		v2: &binding{"devices", "devices.allow (device program)", setDevices("devices.allow"), getItems("devices", "devices.list")},
	},
	{
		Name: "devices_blacklist", doc: "rules, as devices_whitelist, which are denied from now on. Reads as devices_list", source: docDevices,
		v1: &binding{"devices", "devices.deny, devices.list", setDevices("devices.deny"), getItems("devices", "devices.list")},
		v2: &binding{"devices", "devices.deny (device program)", setDevices("devices.deny"), getItems("devices", "devices.list")},
	},
	{
		Name: "net_classid", doc: "a number, 0 to 4294967295, hexadecimal with 0x: 0xAAAABBBB is class AAAA:BBBB", source: docNetCls,
		v1: &binding{"net_cls", "net_cls.classid", setClassID, getText("net_cls", "net_cls.classid")},
	},
	{
		Name: "net_prio_interface_map", doc: "`if prio`, comma separated: `eth0 5`", source: docNetPrio,
		v1: &binding{"net_prio", "net_prio.ifpriomap", setPrioMap, getItems("net_prio", "net_prio.ifpriomap")},
	},
	{
		Name: "hugetlb_limit", doc: "`SIZE=bytes`, comma separated, bytes as for memory.limit: `2MB=512M,1GB=max`", source: docHuge,
		v1: &binding{"hugetlb", "hugetlb.SIZE.limit_in_bytes", setHuge("limit_in_bytes", show1), getHuge("limit_in_bytes")},
		v2: &binding{"hugetlb", "hugetlb.SIZE.max", setHuge("max", show2), getHuge("max")},
	},
	{
		Name: "blkio_weight", doc: "1 to 10000, 100 is the default; BFQ's weights end at 1000", source: docBlkio,
		v1: &binding{"blkio", "blkio.bfq.weight", setWeight, getWeight},
		v2: &binding{"io", "io.weight, io.bfq.weight", setWeight, getWeight},
	},
	{
		Name: "blkio_weight_device", doc: "`MAJ:MIN weight`, comma separated, weights as for blkio_weight, or `default`", source: docBlkio,
		v1: &binding{"blkio", "blkio.bfq.weight_device", setWeightDevice, getWeightDevice},
		v2: &binding{"io", "io.weight, io.bfq.weight", setWeightDevice, getWeightDevice},
	},
	{
		Name: "blkio_throttle_read", doc: "`MAJ:MIN bytes/s`, comma separated, bytes as for memory.limit and above 0: `8:0 10M`", source: docBlkio,
		v1: &binding{"blkio", "blkio.throttle.read_bps_device", setThrottle("blkio.throttle.read_bps_device", ""), getThrottle("blkio", "blkio.throttle.read_bps_device", "")},
		v2: &binding{"io", "io.max (rbps)", setThrottle("io.max", "rbps"), getThrottle("io", "io.max", "rbps")},
	},
	{
		Name: "blkio_throttle_write", doc: "as blkio_throttle_read", source: docBlkio,
		v1: &binding{"blkio", "blkio.throttle.write_bps_device", setThrottle("blkio.throttle.write_bps_device", ""), getThrottle("blkio", "blkio.throttle.write_bps_device", "")},
		v2: &binding{"io", "io.max (wbps)", setThrottle("io.max", "wbps"), getThrottle("io", "io.max", "wbps")},
	},
	{
		Name: "pids.limit", doc: "a number of tasks, or `max`", source: docPids,
		v1: &binding{"pids", "pids.max", setPids, getText("pids", "pids.max")},
		v2: &binding{"pids", "pids.max", setPids, getText("pids", "pids.max")},
	},
	{
		Name: "rt.runtime", doc: "microseconds", source: docRT,
		v1: &binding{"cpu", "cpu.rt_runtime_us", setNumber("cpu.rt_runtime_us", 0, math.MaxInt64/1000), getText("cpu", "cpu.rt_runtime_us")},
	},
	{
		Name: "rt.period", doc: "microseconds", source: docRT,
		v1: &binding{"cpu", "cpu.rt_period_us", setNumber("cpu.rt_period_us", 1, math.MaxInt64/1000), getText("cpu", "cpu.rt_period_us")},
	},
	{
		Name: "state", doc: "`frozen` or `thawed`; reads `freezing` until the last task has stopped", source: docFreezer,
		v1: &binding{"freezer", "freezer.state", setState("freezer.state", "FROZEN", "THAWED"), getState1},
		v2: &binding{"", "cgroup.freeze, cgroup.events", setState("cgroup.freeze", "1", "0"), getState2},
	},

	{
		Name: "devices_list", ReadOnly: true, doc: "rules, comma separated, as devices_whitelist", source: docDevices,
		v1: &binding{"devices", "devices.list", nil, getItems("devices", "devices.list")},
		v2: &binding{"devices", "devices.list (device program)", nil, getItems("devices", "devices.list")},
	},
	{
		Name: "net_prio_index", ReadOnly: true, doc: "a number", source: docNetPrio,
		v1: readText("net_prio", "net_prio.prioidx"),
	},
	{
		Name: "memory.usage", ReadOnly: true, doc: "bytes", source: docMemory,
		v1: readText("memory", "memory.usage_in_bytes"), v2: readText("memory", "memory.current"),
	},
	{
		Name: "memory.max_use", ReadOnly: true, doc: "bytes", source: docMemory,
		v1: readText("memory", "memory.max_usage_in_bytes"), v2: readText("memory", "memory.peak"),
	},
	{
		Name: "memory.failcnt", ReadOnly: true, doc: "how often the limit was hit", source: docMemory,
		v1: readText("memory", "memory.failcnt"), v2: readEvent("memory", "memory.events.local", "max"),
	},
	{
		Name: "memory.numa_stat", ReadOnly: true, doc: "as the kernel shows it: pages on v1, bytes on v2", source: docMemory,
		v1: readText("memory", "memory.numa_stat"), v2: readText("memory", "memory.numa_stat"),
	},
	{
		Name: "swap.max_use", ReadOnly: true, doc: "bytes; on v1 of memory and swap together", source: docMemory,
		v1: readText("memory", "memory.memsw.max_usage_in_bytes"), v2: readText("memory", "memory.swap.peak"),
	},
	{
		Name: "swap.failcnt", ReadOnly: true, doc: "how often the limit was hit; on v1 that of memory and swap together", source: docMemory,
		v1: readText("memory", "memory.memsw.failcnt"), v2: readEvent("memory", "memory.swap.events", "max"),
	},
	{
		Name: "hugetlb_usage", ReadOnly: true, doc: "`SIZE=bytes`, comma separated", source: docHuge,
		v1: readHuge("usage_in_bytes", ""), v2: readHuge("current", ""),
	},
	{
		Name: "hugetlb_max_usage", ReadOnly: true, doc: "`SIZE=bytes`, comma separated", source: docHuge,
		v1: readHuge("max_usage_in_bytes", ""),
	},
	{
		Name: "hugetlb_failcnt", ReadOnly: true, doc: "`SIZE=number`, comma separated: how often the limit was hit; v2 counts where the task was, and so the cgroups below as well", source: docHuge,
		v1: readHuge("failcnt", ""), v2: readHuge("events", "max"),
	},
	{
		Name: "cpuacct_stat", ReadOnly: true, doc: "lines `user N` and `system N`, in 1/100 s (USER_HZ)", source: docCpuacct,
		v1: readText("cpuacct", "cpuacct.stat"), v2: &binding{"", "cpu.stat", nil, getCPUStat2},
	},
	{
		Name: "pids.usage", ReadOnly: true, doc: "a number of tasks", source: docPids,
		v1: readText("pids", "pids.current"), v2: readText("pids", "pids.current"),
	},
}

// ---- limits

func limit1(file string) *binding {
	return &binding{"memory", file, setLimit(file, show1), getLimit(file)}
}

func limit2(file string) *binding {
	return &binding{"memory", file, setLimit(file, show2), getLimit(file)}
}

func setLimit(file string, show func(uint64) string) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		n, err := parseBytes(value)
		if err != nil {
			return nil, err
		}
		return []Write{{File: file, Value: show(n)}}, nil
	}
}

func getLimit(file string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		n, err := readLimit(read, "memory", file)
		return show2(n), err
	}
}

func readLimit(read Reader, controller, file string) (uint64, error) {
	v, err := read(controller, file)
	if err != nil {
		return 0, err
	}
	return limitOf(v)
}

const (
	memory1 = "memory.limit_in_bytes"
	memsw1  = "memory.memsw.limit_in_bytes"
)

// readMemsw reads v1's limit of memory and swap together, which the kernel
// lacks when it does not account swap.
func readMemsw(read Reader) (limit uint64, ok bool, err error) {
	v, ok, err := optional(read, "memory", memsw1)
	if err != nil || !ok {
		return 0, false, err
	}
	limit, err = limitOf(v)
	return limit, err == nil, err
}

// setMemory1 sets v1's limit of memory, and that of memory and swap together
// such that the limit of swap alone stays. The latter is never the lower one.
func setMemory1(_ *Set, value string, read Reader) ([]Write, error) {
	n, err := parseBytes(value)
	if err != nil {
		return nil, err
	}
	limit := Write{File: memory1, Value: show1(n)}
	both, ok, err := readMemsw(read)
	if err != nil {
		return nil, err
	}
	if !ok || both == unlimited {
		return []Write{limit}, nil
	}
	old, err := readLimit(read, "memory", memory1)
	if err != nil {
		return nil, err
	}
	return []Write{limit, {File: memsw1, Value: show1(sum(n, both-min(old, both)))}}, nil
}

// sum adds two limits; what v1 would show as no limit is none.
func sum(a, b uint64) uint64 {
	if a >= noLimit || b >= noLimit || a+b >= noLimit {
		return unlimited
	}
	return a + b
}

func setSwap1(_ *Set, value string, read Reader) ([]Write, error) {
	n, err := parseBytes(value)
	if err != nil {
		return nil, err
	}
	if _, ok, err := readMemsw(read); err != nil {
		return nil, err
	} else if !ok {
		return nil, errNoSwap
	}
	if n != unlimited {
		limit, err := readLimit(read, "memory", memory1)
		if err != nil {
			return nil, err
		}
		if limit == unlimited {
			return nil, fmt.Errorf("%w %q: on cgroup v1 it needs a memory.limit first", ErrValue, value)
		}
		n = sum(limit, n)
	}
	return []Write{{File: memsw1, Value: show1(n)}}, nil
}

var errNoSwap = fmt.Errorf("%w: this kernel does not account swap (boot option swapaccount)", ErrUnsupported)

func getSwap1(_ *Set, read Reader) (string, error) {
	both, ok, err := readMemsw(read)
	if err != nil {
		return "", err
	}
	if !ok {
		return "", errNoSwap
	}
	limit, err := readLimit(read, "memory", memory1)
	if err != nil {
		return "", err
	}
	if both == unlimited {
		return "max", nil
	}
	return show2(both - min(limit, both)), nil
}

// ---- cpus

func setList(file string) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		if _, err := parseList(value); err != nil {
			return nil, err
		}
		return []Write{{File: file, Value: value}}, nil
	}
}

// getList2 reads a list of v2's cpuset, which is empty until it is set and
// then means what the parent has.
func getList2(file string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		v, err := read("cpuset", file)
		if err == nil && strings.TrimSpace(v) == "" {
			v, err = read("cpuset", file+".effective")
		}
		return strings.TrimSpace(v), err
	}
}

// quota is how a version spells the bandwidth of a cgroup.
type quota interface {
	// read returns quota and period in microseconds; quota is unlimited or
	// not.
	read(Reader) (quota, period uint64, err error)
	// writes sets the quota and leaves the period.
	writes(quota, period uint64) []Write
}

type (
	quota1 struct{}
	quota2 struct{}
)

func (quota1) read(read Reader) (quota, period uint64, err error) {
	if quota, err = readLimit(read, "cpu", "cpu.cfs_quota_us"); err == nil {
		period, err = readLimit(read, "cpu", "cpu.cfs_period_us")
	}
	return quota, period, checkPeriod(period, err)
}

func (quota2) read(read Reader) (quota, period uint64, err error) {
	v, err := read("cpu", "cpu.max")
	if err != nil {
		return 0, 0, err
	}
	first, second, _ := strings.Cut(strings.TrimSpace(v), " ")
	if quota, err = limitOf(first); err == nil {
		period, err = limitOf(second)
	}
	return quota, period, checkPeriod(period, err)
}

func checkPeriod(period uint64, err error) error {
	if err == nil && (period == 0 || period > maxPeriod) {
		return fmt.Errorf("unexpected period %d", period)
	}
	return err
}

// The kernel's bounds, in microseconds (kernel/sched/core.c).
const (
	minQuota  = 1000
	maxPeriod = 1000000
)

func (quota1) writes(quota, _ uint64) []Write {
	return []Write{{File: "cpu.cfs_quota_us", Value: show1(quota)}}
}

func (quota2) writes(quota, period uint64) []Write {
	return []Write{{File: "cpu.max", Value: show2(quota) + " " + show2(period)}}
}

// maxCPUs bounds cpus_number.
const maxCPUs = 8192

func setCPUs(q quota, percent bool) func(*Set, string, Reader) ([]Write, error) {
	return func(s *Set, value string, read Reader) ([]Write, error) {
		var n float64
		var err error
		switch {
		case value == "max":
		case percent:
			n, err = decimal(value, 100)
		default:
			n, err = decimal(value, maxCPUs)
		}
		if err != nil {
			return nil, err
		}
		_, period, err := q.read(read)
		if err != nil {
			return nil, err
		}
		if value == "max" {
			return q.writes(unlimited, period), nil
		}
		if percent {
			cpus, err := s.allowedCPUs(read)
			if err != nil {
				return nil, err
			}
			n *= float64(cpus) / 100
		}
		us := uint64(math.Round(n * float64(period)))
		if us < minQuota {
			return nil, fmt.Errorf("%w %q: less than the kernel's least quota, %d of %d microseconds", ErrValue, value, minQuota, period)
		}
		return q.writes(us, period), nil
	}
}

func getCPUs(q quota, percent bool) func(*Set, Reader) (string, error) {
	return func(s *Set, read Reader) (string, error) {
		us, period, err := q.read(read)
		if err != nil {
			return "", err
		}
		if us == unlimited {
			return "max", nil
		}
		n := float64(us) / float64(period)
		if percent {
			cpus, err := s.allowedCPUs(read)
			if err != nil {
				return "", err
			}
			n *= 100 / float64(cpus)
		}
		return showDecimal(n), nil
	}
}

// allowedCPUs counts the cpus that the cgroup may use: those of its cpuset,
// or where there is none those that are online.
func (s *Set) allowedCPUs(read Reader) (int, error) {
	if h, ok := s.ByController("cpuset"); ok {
		file := "cpuset.effective_cpus"
		if h.version == V2 {
			file = "cpuset.cpus.effective"
		}
		list, _, err := optional(read, "cpuset", file)
		if err != nil {
			return 0, err
		}
		if list != "" {
			return parseList(list)
		}
	}
	online, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return 0, err
	}
	return parseList(strings.TrimSpace(string(online)))
}

func setShare(file string, base uint64) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		n, err := number(value, 1, 10000)
		if err != nil {
			return nil, err
		}
		return []Write{{File: file, Value: strconv.FormatUint((n*base+50)/100, 10)}}, nil
	}
}

func getShare(file string, base uint64) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		n, err := readLimit(read, "cpu", file)
		return strconv.FormatUint((n*100+base/2)/base, 10), err
	}
}

// ---- devices and network

func setDevices(file string) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		rules, err := listItems(value)
		if err != nil {
			return nil, err
		}
		var ws []Write
		for _, r := range rules {
			if err := deviceRule(r); err != nil {
				return nil, err
			}
			ws = append(ws, Write{File: file, Value: r})
		}
		return ws, nil
	}
}

func setClassID(_ *Set, value string, _ Reader) ([]Write, error) {
	base, digits := 10, value
	if hex, ok := strings.CutPrefix(value, "0x"); ok {
		base, digits = 16, hex
	}
	n, err := strconv.ParseUint(digits, base, 32)
	if err != nil {
		return nil, badValue(value, "a number from 0 to 4294967295")
	}
	return []Write{{File: "net_cls.classid", Value: strconv.FormatUint(n, 10)}}, nil
}

func setPrioMap(_ *Set, value string, _ Reader) ([]Write, error) {
	items, err := listItems(value)
	if err != nil {
		return nil, err
	}
	var ws []Write
	for _, it := range items {
		dev, prio, ok := strings.Cut(it, " ")
		_, err := number(prio, 0, math.MaxUint32)
		// dev_valid_name in the kernel; IFNAMSIZ is 16 with its zero byte.
		if !ok || err != nil || len(dev) > 15 || dev == "." || dev == ".." ||
			strings.ContainsAny(dev, "/:") || !presentable(dev) {
			return nil, badValue(it, "an interface and a priority, like eth0 5")
		}
		ws = append(ws, Write{File: "net_prio.ifpriomap", Value: dev + " " + prio})
	}
	return ws, nil
}

// ---- huge pages

func setHuge(file string, show func(uint64) string) func(*Set, string, Reader) ([]Write, error) {
	return func(s *Set, value string, _ Reader) ([]Write, error) {
		items, err := listItems(value)
		if err != nil {
			return nil, err
		}
		var ws []Write
		for _, it := range items {
			size, bytes, ok := strings.Cut(it, "=")
			if !ok {
				return nil, badValue(it, "SIZE=bytes, like 2MB=512M")
			}
			if err := s.hugeSize(size); err != nil {
				return nil, err
			}
			n, err := parseBytes(bytes)
			if err != nil {
				return nil, err
			}
			ws = append(ws, Write{File: "hugetlb." + size + "." + file, Value: show(n)})
		}
		return ws, nil
	}
}

func getHuge(file string) func(*Set, Reader) (string, error) {
	return eachHuge(func(read Reader, size string) (string, error) {
		n, err := readLimit(read, "hugetlb", "hugetlb."+size+"."+file)
		return show2(n), err
	})
}

func readHuge(file, event string) *binding {
	return &binding{
		"hugetlb", "hugetlb.SIZE." + file, nil,
		eachHuge(func(read Reader, size string) (string, error) {
			v, err := read("hugetlb", "hugetlb."+size+"."+file)
			if event != "" && err == nil {
				v, _ = flatKeyed(v, event)
			}
			return strings.TrimSpace(v), err
		}),
	}
}

func eachHuge(one func(read Reader, size string) (string, error)) func(*Set, Reader) (string, error) {
	return func(s *Set, read Reader) (string, error) {
		var items []string
		for _, size := range s.hugeSizes {
			v, err := one(read, size)
			if err != nil {
				return "", err
			}
			items = append(items, size+"="+v)
		}
		return strings.Join(items, ","), nil
	}
}

// ---- block devices

// weightFile is a file that holds weights. Which ones a cgroup has depends on
// the schedulers that the kernel has loaded.
type weightFile struct {
	controller, all, device string
	most                    uint64
}

var weightFiles = []weightFile{
	{"io", "io.weight", "io.weight", 10000},
	{"io", "io.bfq.weight", "io.bfq.weight", 1000},
	{"blkio", "blkio.bfq.weight", "blkio.bfq.weight_device", 1000},
}

// presentWeights returns the files of weights that the cgroup has, with what
// they hold.
func (s *Set) presentWeights(read Reader, name func(weightFile) string) ([]weightFile, []string, error) {
	var fs []weightFile
	var contents []string
	for _, f := range weightFiles {
		if _, ok := s.ByController(f.controller); !ok {
			continue
		}
		v, ok, err := optional(read, f.controller, name(f))
		if err != nil {
			return nil, nil, err
		}
		if ok {
			fs, contents = append(fs, f), append(contents, v)
		}
	}
	if len(fs) == 0 {
		return nil, nil, fmt.Errorf("%w: no scheduler of this kernel knows weights (BFQ, or iocost on v2)", ErrUnsupported)
	}
	return fs, contents, nil
}

func allFile(f weightFile) string    { return f.all }
func deviceFile(f weightFile) string { return f.device }

// fit bounds a weight by what a file takes. Where the only file there ends
// below it, that is an error: the value would not mean what it says.
func (f weightFile) fit(n uint64, alone bool) (string, error) {
	if n > f.most && alone {
		return "", fmt.Errorf("%w: weights of BFQ, the only scheduler here that knows them, end at %d", ErrValue, f.most)
	}
	return strconv.FormatUint(min(n, f.most), 10), nil
}

func setWeight(s *Set, value string, read Reader) ([]Write, error) {
	n, err := number(value, 1, 10000)
	if err != nil {
		return nil, err
	}
	fs, _, err := s.presentWeights(read, allFile)
	if err != nil {
		return nil, err
	}
	var ws []Write
	for _, f := range fs {
		v, err := f.fit(n, len(fs) == 1)
		if err != nil {
			return nil, err
		}
		if f.controller == "io" {
			v = "default " + v
		}
		ws = append(ws, Write{File: f.all, Value: v})
	}
	return ws, nil
}

func getWeight(s *Set, read Reader) (string, error) {
	_, contents, err := s.presentWeights(read, allFile)
	if err != nil {
		return "", err
	}
	if v, ok := flatKeyed(contents[0], "default"); ok {
		return v, nil
	}
	return strings.TrimSpace(contents[0]), nil
}

func setWeightDevice(s *Set, value string, read Reader) ([]Write, error) {
	items, err := listItems(value)
	if err != nil {
		return nil, err
	}
	type weight struct {
		device string
		n      uint64 // 0: default
	}
	var weights []weight
	for _, it := range items {
		device, v, err := deviceItem(it)
		if err != nil {
			return nil, err
		}
		w := weight{device: device}
		if v != "default" {
			if w.n, err = number(v, 1, 10000); err != nil {
				return nil, err
			}
		}
		weights = append(weights, w)
	}
	fs, _, err := s.presentWeights(read, deviceFile)
	if err != nil {
		return nil, err
	}
	var ws []Write
	for _, f := range fs {
		for _, w := range weights {
			v := keyedFiles[f.device]
			if w.n > 0 {
				if v, err = f.fit(w.n, len(fs) == 1); err != nil {
					return nil, err
				}
			}
			ws = append(ws, Write{File: f.device, Value: w.device + " " + v})
		}
	}
	return ws, nil
}

func getWeightDevice(s *Set, read Reader) (string, error) {
	_, contents, err := s.presentWeights(read, deviceFile)
	if err != nil {
		return "", err
	}
	return lines(contents[0], func(line string) (string, bool) {
		return line, line != "" && !strings.HasPrefix(line, "default")
	}), nil
}

// setThrottle sets a limit of bytes a second: on v1 (no sub) the value alone,
// where 0 means none, on v2 the key sub.
func setThrottle(file, sub string) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		items, err := listItems(value)
		if err != nil {
			return nil, err
		}
		var ws []Write
		for _, it := range items {
			device, v, err := deviceItem(it)
			if err != nil {
				return nil, err
			}
			n, err := parseBytes(v)
			if err != nil {
				return nil, err
			}
			if n == 0 {
				return nil, badValue(it, "a rate above 0; max takes a limit away")
			}
			switch {
			case sub != "":
				v = sub + "=" + show2(n)
			case n == unlimited:
				v = "0"
			default:
				v = show1(n)
			}
			ws = append(ws, Write{File: file, Value: device + " " + v})
		}
		return ws, nil
	}
}

func getThrottle(controller, file, sub string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		content, err := read(controller, file)
		if err != nil || sub == "" {
			return lines(content, func(line string) (string, bool) { return line, line != "" }), err
		}
		return lines(content, func(line string) (string, bool) {
			device, rest, _ := strings.Cut(line, " ")
			for kv := range strings.SplitSeq(rest, " ") {
				if v, ok := strings.CutPrefix(kv, sub+"="); ok && v != "max" {
					return device + " " + v, true
				}
			}
			return "", false
		}), nil
	}
}

// ---- the rest

func setPids(_ *Set, value string, _ Reader) ([]Write, error) {
	if value != "max" {
		if _, err := number(value, 0, 1<<22); err != nil { // PID_MAX_LIMIT
			return nil, err
		}
	}
	return []Write{{File: "pids.max", Value: value}}, nil
}

func setNumber(file string, low, high uint64) func(*Set, string, Reader) ([]Write, error) {
	return setConverted(file, low, high, func(n uint64) uint64 { return n })
}

func setState(file, frozen, thawed string) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		switch value {
		case "frozen":
			value = frozen
		case "thawed":
			value = thawed
		default:
			return nil, badValue(value, "frozen or thawed")
		}
		return []Write{{File: file, Value: value}}, nil
	}
}

func getState1(_ *Set, read Reader) (string, error) {
	v, err := read("freezer", "freezer.state")
	return strings.ToLower(strings.TrimSpace(v)), err
}

func getState2(_ *Set, read Reader) (string, error) {
	events, err := read("", "cgroup.events")
	if err != nil {
		return "", err
	}
	if v, _ := flatKeyed(events, "frozen"); v == "1" {
		return "frozen", nil
	}
	asked, err := read("", "cgroup.freeze")
	if err != nil {
		return "", err
	}
	if strings.TrimSpace(asked) == "1" {
		return "freezing", nil
	}
	return "thawed", nil
}

// getCPUStat2 shows v2's microseconds as cpuacct.stat does: in ticks of
// USER_HZ, which is 100 on every architecture that Go knows.
func getCPUStat2(_ *Set, read Reader) (string, error) {
	stat, err := read("", "cpu.stat")
	if err != nil {
		return "", err
	}
	var out [2]uint64
	for i, key := range []string{"user_usec", "system_usec"} {
		v, _ := flatKeyed(stat, key)
		us, err := limitOf(v)
		if err != nil {
			return "", err
		}
		out[i] = us / 10000
	}
	return fmt.Sprintf("user %d\nsystem %d", out[0], out[1]), nil
}

func getText(controller, file string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		v, err := read(controller, file)
		return strings.TrimRight(v, "\n"), err
	}
}

func getItems(controller, file string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		v, err := read(controller, file)
		return lines(v, func(line string) (string, bool) { return line, line != "" }), err
	}
}

func readText(controller, file string) *binding {
	return &binding{controller, file, nil, getText(controller, file)}
}

func readEvent(controller, file, event string) *binding {
	return &binding{controller, file + " (" + event + ")", nil, func(_ *Set, read Reader) (string, error) {
		content, err := read(controller, file)
		if err != nil {
			return "", err
		}
		v, ok := flatKeyed(content, event)
		if !ok {
			return "", fmt.Errorf("%w: no %s in %s", ErrUnsupported, event, file)
		}
		return v, nil
	}}
}
