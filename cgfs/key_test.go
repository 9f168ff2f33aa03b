package cgfs

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"
)

// host is a Set that is good for translating alone: a host with all
// controllers on one version. Translation touches no file but those that its
// Reader reads.
func host(v Version) *Set {
	ctrls := []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "net_cls", "net_prio", "pids"}
	s := &Set{hugeSizes: []string{"1GB", "2MB"}}
	if v == V2 {
		s.hierarchies = []*Hierarchy{{version: V2, name: "unified", controllers: []string{"cpu", "cpuset", "hugetlb", "io", "memory", "pids"}}}
		return s
	}
	for _, c := range ctrls {
		s.hierarchies = append(s.hierarchies, &Hierarchy{version: V1, name: c, controllers: []string{c}})
	}
	return s
}

// files is what a cgroup's control files hold.
type files map[string]string

func (f files) read(_, file string) (string, error) {
	if v, ok := f[file]; ok {
		return v, nil
	}
	return "", fmt.Errorf("%s: %w", file, fs.ErrNotExist)
}

// with returns f with some files changed.
func (f files) with(changes ...string) files {
	g := make(files)
	maps.Copy(g, f)
	for i := 0; i < len(changes); i += 2 {
		g[changes[i]] = changes[i+1]
	}
	return g
}

// What Linux 6.18 shows in a new cgroup of a machine with four cpus.
var (
	fresh1 = files{
		"memory.limit_in_bytes": "9223372036854771712\n", "memory.soft_limit_in_bytes": "9223372036854771712\n",
		"memory.memsw.limit_in_bytes": "9223372036854771712\n",
		"cpu.cfs_quota_us":            "-1\n", "cpu.cfs_period_us": "100000\n", "cpu.shares": "1024\n",
		"cpu.rt_runtime_us": "0\n", "cpu.rt_period_us": "1000000\n",
		"cpuset.cpus": "0-3\n", "cpuset.effective_cpus": "0-3\n",
		"devices.list": "a *:* rwm\n", "pids.max": "max\n", "freezer.state": "THAWED\n",
		"hugetlb.2MB.limit_in_bytes": "9223372036852678656\n", "hugetlb.1GB.limit_in_bytes": "9223372035781033984\n",
		"blkio.bfq.weight": "100\n", "blkio.bfq.weight_device": "", "blkio.throttle.read_bps_device": "", "blkio.throttle.write_bps_device": "",
		"memory.usage_in_bytes": "4096\n", "memory.memsw.usage_in_bytes": "12288\n", "memory.failcnt": "7\n", "memory.memsw.failcnt": "4\n",
		"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		"memory.stat":        "cache 1\nrss 2\nswap 3\npgpgin 4\ntotal_cache 20480\ntotal_rss 8192\ntotal_swap 8192\ntotal_pgpgin 9\ntotal_mapped_file 1\ntotal_unevictable 11\n",
		"cpu.cfs_burst_us":   "0\n", "cpu.stat": "nr_periods 9\nnr_throttled 8\nthrottled_time 7000\nnr_bursts 6\nburst_time 5000\n",
		"cpuacct.usage": "5000000000\n", "cpuacct.usage_user": "3000000000\n", "cpuacct.usage_sys": "2000000000\n",
		"freezer.self_freezing": "0\n", "hugetlb.2MB.failcnt": "3\n",
		"blkio.throttle.read_iops_device": "", "blkio.throttle.write_iops_device": "",
		"blkio.throttle.io_service_bytes_recursive": "8:0 Read 4096\n8:0 Write 8192\n8:0 Sync 1\n8:0 Async 2\n8:0 Discard 0\n8:0 Total 12288\nTotal 12288\n",
		"blkio.throttle.io_serviced_recursive":      "8:0 Read 1\n8:0 Write 2\n8:0 Sync 1\n8:0 Async 2\n8:0 Discard 0\n8:0 Total 3\nTotal 3\n",
		"net_cls.classid":                           "0\n", "net_prio.ifpriomap": "lo 0\neth0 0\n",
	}
	fresh2 = files{
		"memory.max": "max\n", "memory.low": "0\n", "memory.swap.max": "max\n", "memory.swap.high": "max\n",
		"memory.events.local": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 1\noom_group_kill 0\n", "memory.swap.events": "high 0\nmax 4\nfail 0\n",
		"memory.events":       "low 0\nhigh 0\nmax 8\noom 3\noom_kill 2\noom_group_kill 0\n",
		"memory.swap.current": "8192\n", LimitsInEffect: "memory_limit 4096\nmemsw_limit 8192\n",
		"memory.stat":      "anon 8192\nfile 20480\nkernel 4096\nfile_mapped 1\nfile_dirty 2\nfile_writeback 3\nswapcached 4\nanon_thp 5\nshmem 6\ninactive_anon 7\nactive_anon 8\ninactive_file 9\nactive_file 10\nunevictable 11\nworkingset_refault_anon 12\nworkingset_refault_file 13\npgfault 14\npgmajfault 15\n",
		"memory.numa_stat": "anon N0=8192 N1=0\nfile N0=20480 N1=4096\ninactive_anon N0=4096 N1=0\nactive_anon N0=4096 N1=0\ninactive_file N0=8192 N1=4096\nactive_file N0=8192 N1=0\nunevictable N0=0 N1=4096\nslab N0=5 N1=5\n",
		"cpu.max.burst":    "0\n", "cpuset.mems": "\n", "cpuset.mems.effective": "0\n",
		"devices.list":   "a *:* rwm\n",
		"io.stat":        "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n",
		"memory.current": "4096\n", "memory.peak": "8192\n",
		"cpu.max": "max 100000\n", "cpu.weight": "100\n",
		"cpu.stat":    "usage_usec 5000000\nuser_usec 3000000\nsystem_usec 2000000\nnr_periods 9\nnr_throttled 8\nthrottled_usec 7\nnr_bursts 6\nburst_usec 5\n",
		"cpuset.cpus": "\n", "cpuset.cpus.effective": "0-3\n",
		"hugetlb.2MB.max": "max\n", "hugetlb.1GB.max": "max\n", "hugetlb.2MB.current": "0\n", "hugetlb.2MB.events": "max 3\n",
		"hugetlb.1GB.current": "0\n", "hugetlb.1GB.events": "max 0\n",
		"io.weight": "default 100\n", "io.bfq.weight": "default 100\n", "io.max": "",
		"pids.max": "max\n", "cgroup.freeze": "0\n", "cgroup.events": "populated 0\nfrozen 0\n",
	}
)

func show(ws []Write) string {
	var out []string
	for _, w := range ws {
		out = append(out, w.File+"="+w.Value)
	}
	return strings.Join(out, "; ")
}

// TestKeyWrites has a row for each key and version; from is what differs from
// a new cgroup.
func TestKeyWrites(t *testing.T) {
	limited := []string{memory1, "1048576\n", memsw1, "3145728\n"} // 1 MiB and 2 MiB of swap
	for _, c := range []struct {
		version          Version
		key, value, want string
		from             []string
	}{
		{V1, "memory.limit", "1G", "memory.limit_in_bytes=1073741824", nil},
		{V1, "memory.limit", "max", "memory.limit_in_bytes=-1", nil},
		{V1, "memory.limit", "4096", "memory.limit_in_bytes=4096; memory.memsw.limit_in_bytes=2101248", limited},
		{V1, "memory.limit", "2M", "memory.limit_in_bytes=2097152; memory.memsw.limit_in_bytes=4194304", limited},
		{V1, "memory.limit", "4M", "memory.memsw.limit_in_bytes=6291456; memory.limit_in_bytes=4194304", limited},
		{V1, "memory.limit", "max", "memory.memsw.limit_in_bytes=-1; memory.limit_in_bytes=-1", limited},
		{V2, "memory.limit", "1G", "memory.max=1073741824", nil},
		{V2, "memory.limit", "max", "memory.max=max", nil},
		{V1, "memory.soft_limit", "1K", "memory.soft_limit_in_bytes=1024", nil},
		{V2, "memory.soft_limit", "1T", "memory.low=1099511627776", nil},
		{V1, "swap.limit", "max", "memory.memsw.limit_in_bytes=-1", nil},
		{V1, "swap.limit", "0", "memory.memsw.limit_in_bytes=1048576", limited},
		{V1, "swap.limit", "1M", "memory.memsw.limit_in_bytes=2097152", limited},
		{V2, "swap.limit", "1M", "memory.swap.max=1048576", nil},
		{V2, "swap.soft_limit", "max", "memory.swap.high=max", nil},
		{V1, "cpus_allowed", "0-1,3", "cpuset.cpus=0-1,3", nil},
		{V2, "cpus_allowed", "2", "cpuset.cpus=2", nil},
		{V1, "cpus_fraction", "50", "cpu.cfs_quota_us=200000", nil},
		{V1, "cpus_fraction", "50", "cpu.cfs_quota_us=50000", []string{"cpuset.effective_cpus", "0\n"}},
		{V1, "cpus_fraction", "12.5", "cpu.cfs_quota_us=25000", []string{"cpu.cfs_period_us", "50000"}},
		{V1, "cpus_fraction", "max", "cpu.cfs_quota_us=-1", []string{"cpu.cfs_quota_us", "5000"}},
		{V2, "cpus_fraction", "50", "cpu.max=200000 100000", nil},
		{V2, "cpus_fraction", "max", "cpu.max=max 50000", []string{"cpu.max", "1000 50000\n"}},
		{V1, "cpus_number", "1.5", "cpu.cfs_quota_us=150000", nil},
		{V2, "cpus_number", "1.5", "cpu.max=75000 50000", []string{"cpu.max", "1000 50000\n"}},
		{V1, "cpu_share_percent", "50", "cpu.shares=512", nil},
		{V2, "cpu_share_percent", "50", "cpu.weight=50", nil},
		{V1, "devices_whitelist", "c 1:3 rwm, b *:* r", "devices.allow=c 1:3 rwm; devices.allow=b *:* r", nil},
		{V1, "devices_blacklist", "a", "devices.deny=a", nil},
		{V1, "net_classid", "0x100001", "net_cls.classid=1048577", nil},
		{V1, "net_classid", "7", "net_cls.classid=7", nil},
		{V1, "net_prio_interface_map", "eth0 5,lo 1", "net_prio.ifpriomap=eth0 5; net_prio.ifpriomap=lo 1", nil},
		{V1, "hugetlb_limit", "2MB=4M,1GB=max", "hugetlb.2MB.limit_in_bytes=4194304; hugetlb.1GB.limit_in_bytes=-1", nil},
		{V2, "hugetlb_limit", "2MB=4M,1GB=max", "hugetlb.2MB.max=4194304; hugetlb.1GB.max=max", nil},
		{V1, "blkio_weight", "500", "blkio.bfq.weight=500", nil},
		{V2, "blkio_weight", "500", "io.weight=default 500; io.bfq.weight=default 500", nil},
		{V2, "blkio_weight", "5000", "io.weight=default 5000; io.bfq.weight=default 1000", nil},
		{V1, "blkio_weight_device", "8:0 200,8:16 default", "blkio.bfq.weight_device=8:0 200; blkio.bfq.weight_device=8:16 default", nil},
		{V2, "blkio_weight_device", "8:0 200", "io.weight=8:0 200; io.bfq.weight=8:0 200", nil},
		{V1, "blkio_throttle_read", "8:0 1M,8:16 max", "blkio.throttle.read_bps_device=8:0 1048576; blkio.throttle.read_bps_device=8:16 0", nil},
		{V2, "blkio_throttle_read", "8:0 1M,8:16 max", "io.max=8:0 rbps=1048576; io.max=8:16 rbps=max", nil},
		{V1, "blkio_throttle_write", "8:0 5", "blkio.throttle.write_bps_device=8:0 5", nil},
		{V2, "blkio_throttle_write", "8:0 5", "io.max=8:0 wbps=5", nil},
		{V1, "pids.limit", "10", "pids.max=10", nil},
		{V2, "pids.limit", "max", "pids.max=max", nil},
		{V1, "rt.runtime", "950000", "cpu.rt_runtime_us=950000", nil},
		{V1, "rt.period", "100000", "cpu.rt_period_us=100000", nil},
		{V1, "state", "frozen", "freezer.state=FROZEN", nil},
		{V2, "state", "frozen", "cgroup.freeze=1", nil},
		{V2, "state", "thawed", "cgroup.freeze=0", nil},

		// Control files under the other version's name, and on their own.
		{V1, "memory.limit_in_bytes", "1g", "memory.limit_in_bytes=1g", limited},
		{V2, "memory.limit_in_bytes", "-1", "memory.max=max", nil},
		{V2, "memory.memsw.limit_in_bytes", "3145728", "memory.swap.max=2097152", []string{"memory.max", "1048576\n"}},
		{V2, "memory.memsw.limit_in_bytes", "-1", "memory.swap.max=max", nil},
		{V1, "memory.max", "4M", "memory.memsw.limit_in_bytes=6291456; memory.limit_in_bytes=4194304", limited},
		{V1, "memory.low", "max", "memory.soft_limit_in_bytes=-1", nil},
		{V1, "memory.swap.max", "1M", "memory.memsw.limit_in_bytes=2097152", limited},
		{V2, "cpu.shares", "1024", "cpu.weight=100", nil},
		{V2, "cpu.shares", "2", "cpu.weight=1", nil},
		{V2, "cpu.shares", "262144", "cpu.weight=10000", nil},
		{V1, "cpu.weight", "100", "cpu.shares=1024", nil},
		{V2, "cpu.cfs_quota_us", "5000", "cpu.max=5000 100000", nil},
		{V2, "cpu.cfs_quota_us", "-1", "cpu.max=max 100000", nil},
		{V2, "cpu.cfs_period_us", "50000", "cpu.max=max 50000", nil},
		{V1, "cpu.max", "max", "cpu.cfs_quota_us=-1", nil},
		{V1, "cpu.max", "5000 10000", "cpu.cfs_period_us=10000; cpu.cfs_quota_us=5000", nil},
		{V1, "cpu.max", "20000 400000", "cpu.cfs_quota_us=20000; cpu.cfs_period_us=400000", []string{"cpu.cfs_quota_us", "90000"}},
		{V2, "freezer.state", "FROZEN", "cgroup.freeze=1", nil},
		{V2, "blkio.throttle.read_bps_device", "8:0 0", "io.max=8:0 rbps=max", nil},
		{V2, "hugetlb.2MB.limit_in_bytes", "-1", "hugetlb.2MB.max=max", nil},
		{V1, "hugetlb.2MB.max", "max", "hugetlb.2MB.limit_in_bytes=-1", nil},
		{V2, "hugetlb.2MB.max", "max", "hugetlb.2MB.max=max", nil},
		{V2, "memory.limit_in_bytes", "50M\n", "memory.max=52428800", nil},
		{V2, "memory.limit_in_bytes", "1g", "memory.max=1073741824", nil},
		{V2, "memory.limit_in_bytes", "9223372036854771712", "memory.max=max", nil},
		// memory.memsw.limit_in_bytes stays 3 MiB.
		{V2, "memory.limit_in_bytes", "2M", "memory.max=2097152; memory.swap.max=1048576", []string{"memory.max", "1048576\n", "memory.swap.max", "2097152\n"}},
		{V2, "memory.limit_in_bytes", "512K", "memory.max=524288; memory.swap.max=2621440", []string{"memory.max", "1048576\n", "memory.swap.max", "2097152\n"}},
		{V2, "memory.soft_limit_in_bytes", "1M", "memory.low=1048576", nil},
		{V1, "memory.max", "1g", "memory.limit_in_bytes=1073741824", nil},
		{V2, "cpu.shares", "0", "cpu.weight=1", nil},
		{V2, "cpu.shares", "1000000", "cpu.weight=10000", nil},
		{V2, "cpu.cfs_burst_us", "100", "cpu.max.burst=100", nil},
		{V1, "cpu.max.burst", "100", "cpu.cfs_burst_us=100", nil},
		{V2, "cpuset.cpus", "0-1", "cpuset.cpus=0-1", nil},
		{V2, "cpuset.mems", "0", "cpuset.mems=0", nil},
		{V2, "freezer.state", "THAWED\n", "cgroup.freeze=0", nil},
		{V1, "cgroup.freeze", "1", "freezer.state=FROZEN", nil},
		{V1, "cgroup.freeze", "0", "freezer.state=THAWED", nil},
		{V2, "devices_whitelist", "c 1:3 rwm", "devices.allow=c 1:3 rwm", nil},
		{V2, "devices_blacklist", "a", "devices.deny=a", nil},
		{V2, "blkio.throttle.write_bps_device", "8:0 1048576", "io.max=8:0 wbps=1048576", nil},
		{V2, "blkio.throttle.read_iops_device", "8:0 100", "io.max=8:0 riops=100", nil},
		{V2, "blkio.throttle.write_iops_device", "8:0 0", "io.max=8:0 wiops=max", nil},
		{V1, "io.max", "8:0 rbps=1048576 wiops=max", "blkio.throttle.read_bps_device=8:0 1048576; blkio.throttle.write_iops_device=8:0 0", nil},
		{V2, "blkio.weight", "10", "io.weight=default 1; io.bfq.weight=default 10", nil},
		{V2, "blkio.weight", "1000", "io.weight=default 10000; io.bfq.weight=default 1000", nil},
		{V2, "blkio.weight", "500", "io.weight=default 4950; io.bfq.weight=default 500", nil},
		{V2, "blkio.bfq.weight", "500", "io.weight=default 500; io.bfq.weight=default 500", nil},
		{V2, "blkio.weight_device", "8:0 500", "io.weight=8:0 4950; io.bfq.weight=8:0 500", nil},
		{V2, "blkio.bfq.weight_device", "8:0 0", "io.weight=8:0 default; io.bfq.weight=8:0 default", nil},
		{V1, "io.weight", "default 200", "blkio.bfq.weight=200", nil},
		{V1, "io.weight", "200", "blkio.bfq.weight=200", nil},
		{V1, "io.weight", "8:0 200", "blkio.bfq.weight_device=8:0 200", nil},
		{V1, "io.bfq.weight", "8:0 default", "blkio.bfq.weight_device=8:0 default", nil},
		{V2, "hugetlb.2MB.rsvd.limit_in_bytes", "4M", "hugetlb.2MB.rsvd.max=4194304", nil},
		{V2, "pids.max", "", "", nil},
	} {
		k, ok := FindKey(c.key)
		if !ok {
			if c.want != "" {
				t.Errorf("no key %s", c.key)
			}
			continue
		}
		fresh := map[Version]files{V1: fresh1, V2: fresh2}[c.version]
		ws, err := k.Writes(host(c.version), c.value, fresh.with(c.from...).read)
		if got := show(ws); err != nil || got != c.want {
			t.Errorf("v%d %s %q:\n got %s, %v\nwant %s", c.version, c.key, c.value, got, err, c.want)
		}
		for _, w := range ws {
			if w.Final != Final(w.File) {
				t.Errorf("%s: Final is %v", w.File, w.Final)
			}
		}
	}
}

func TestKeyValues(t *testing.T) {
	for _, c := range []struct {
		version   Version
		key, want string
		from      []string
	}{
		{V1, "memory.limit", "max", nil},
		{V1, "memory.limit", "1048576", []string{memory1, "1048576\n"}},
		{V2, "memory.limit", "max", nil},
		{V1, "swap.limit", "max", nil},
		{V1, "swap.limit", "2097152", []string{memory1, "1048576\n", memsw1, "3145728\n"}},
		{V2, "swap.limit", "max", nil},
		{V2, "cpus_allowed", "0-3", nil},
		{V2, "cpus_allowed", "1", []string{"cpuset.cpus", "1\n"}},
		{V1, "cpus_fraction", "max", nil},
		{V1, "cpus_fraction", "12.5", []string{"cpu.cfs_quota_us", "50000"}},
		{V2, "cpus_fraction", "25", []string{"cpu.max", "50000 50000\n"}},
		{V1, "cpus_number", "0.5", []string{"cpu.cfs_quota_us", "50000"}},
		{V1, "cpu_share_percent", "100", nil},
		{V2, "cpu_share_percent", "100", nil},
		{V1, "devices_whitelist", "a *:* rwm", nil},
		{V1, "devices_list", "c 1:3 rwm,b *:* r", []string{"devices.list", "c 1:3 rwm\nb *:* r\n"}},
		{V1, "net_prio_interface_map", "lo 0,eth0 0", nil},
		{V1, "hugetlb_limit", "1GB=max,2MB=max", nil},
		{V2, "hugetlb_limit", "1GB=max,2MB=max", nil},
		{V2, "hugetlb_failcnt", "1GB=0,2MB=3", nil},
		{V1, "blkio_weight", "100", nil},
		{V2, "blkio_weight", "100", nil},
		{V2, "blkio_weight", "70", []string{"io.weight", "default 70\n8:0 200\n"}},
		{V1, "blkio_weight_device", "", nil},
		{V2, "blkio_weight_device", "8:0 200", []string{"io.weight", "default 70\n8:0 200\n"}},
		{V1, "blkio_throttle_read", "8:0 5,8:16 6", []string{"blkio.throttle.read_bps_device", "8:0 5\n8:16 6\n"}},
		{V2, "blkio_throttle_write", "8:16 6", []string{"io.max", "8:0 rbps=5 wbps=max riops=max wiops=max\n8:16 rbps=max wbps=6 riops=max wiops=max\n"}},
		{V1, "pids.limit", "max", nil},
		{V1, "state", "thawed", nil},
		{V1, "state", "freezing", []string{"freezer.state", "FREEZING\n"}},
		{V2, "state", "thawed", nil},
		{V2, "state", "freezing", []string{"cgroup.freeze", "1\n"}},
		{V2, "state", "frozen", []string{"cgroup.freeze", "1\n", "cgroup.events", "populated 1\nfrozen 1\n"}},
		{V2, "memory.failcnt", "7", nil},
		{V2, "cpuacct_stat", "user 300\nsystem 200", nil},
		{V2, "memory.limit_in_bytes", "9223372036854771712", nil},
		{V2, "memory.memsw.limit_in_bytes", "3145728", []string{"memory.max", "1048576", "memory.swap.max", "2097152"}},
		{V1, "memory.max", "max", nil},
		{V2, "cpu.shares", "1024", nil},
		{V1, "cpu.weight", "100", nil},
		{V2, "cpu.cfs_quota_us", "-1", nil},
		{V2, "cpu.cfs_period_us", "100000", nil},
		{V1, "cpu.max", "max 100000", nil},
		{V2, "freezer.state", "FROZEN", []string{"cgroup.events", "frozen 1\n"}},
		{V2, "freezer.self_freezing", "1", []string{"cgroup.freeze", "1\n"}},
		{V2, "freezer.parent_freezing", "0", nil},
		{V2, "freezer.parent_freezing", "1", []string{"cgroup.events", "frozen 1\n"}},
		{V2, "freezer.parent_freezing", "0", []string{"cgroup.events", "frozen 1\n", "cgroup.freeze", "1\n"}},
		{V1, "cgroup.freeze", "0", nil},
		{V1, "cgroup.events", "frozen 1", []string{"freezer.state", "FROZEN\n"}},
		{V1, "cgroup.events", "frozen 0", []string{"freezer.state", "FREEZING\n"}},
		{V2, "memory.usage_in_bytes", "4096", nil},
		{V2, "memory.memsw.usage_in_bytes", "12288", nil},
		{V1, "memory.swap.current", "8192", nil},
		{V2, "memory.memsw.failcnt", "4", nil},
		{V1, "memory.swap.events", "max 4", nil},
		{V2, "memory.kmem.usage_in_bytes", "4096", nil},
		{V2, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2", nil},
		{V1, "memory.events.local", "max 7\noom_kill 2", nil},
		{V1, "memory.events", "max 7\noom_kill 2", nil},
		{V2, "memory.use_hierarchy", "1", nil},
		{V2, "memory.move_charge_at_immigrate", "0", nil},
		{V2, "notify_on_release", "0", nil},
		{V2, "cgroup.clone_children", "0", nil},
		{V2, "memory.limit_in_bytes", "1048576", []string{"memory.max", "1048576\n"}},
		{V2, "memory.memsw.limit_in_bytes", "9223372036854771712", nil},
		{V2, "hugetlb.2MB.limit_in_bytes", "9223372036852678656", nil},
		{V2, "hugetlb.1GB.limit_in_bytes", "9223372035781033984", nil},
		{V2, "hugetlb.2MB.failcnt", "3", nil},
		{V1, "hugetlb.2MB.events", "max 3", nil},
		{V2, "cpuset.effective_cpus", "0-3", nil},
		{V2, "cpuset.effective_mems", "0", nil},
		{V2, "cpuacct.usage", "5000000000", nil},
		{V2, "cpuacct.usage_sys", "2000000000", nil},
		{V1, "cpu.stat", "usage_usec 5000000\nuser_usec 3000000\nsystem_usec 2000000\nnr_periods 9\nnr_throttled 8\nthrottled_usec 7\nnr_bursts 6\nburst_usec 5", nil},
		{V1, "memory.stat", "file 20480\nanon 8192\nfile_mapped 1\nunevictable 11", nil},
		{V2, "blkio.throttle.write_bps_device", "8:16 6\n8:32 7", []string{"io.max", "8:16 rbps=max wbps=6 riops=max wiops=max\n8:32 rbps=1 wbps=7 riops=max wiops=max\n"}},
		{V1, "io.max", "8:0 rbps=5 wbps=max riops=max wiops=3\n8:16 rbps=max wbps=max riops=max wiops=2", []string{"blkio.throttle.read_bps_device", "8:0 5\n", "blkio.throttle.write_iops_device", "8:0 3\n8:16 2\n"}},
		{V2, "blkio.throttle.io_service_bytes", "8:0 Read 4096\n8:0 Write 8192\n8:0 Discard 0\n8:0 Total 12288\n8:16 Read 1\n8:16 Write 0\n8:16 Discard 0\n8:16 Total 1\nTotal 12289", nil},
		{V2, "blkio.throttle.io_serviced", "Total 0", []string{"io.stat", ""}},
		{V1, "io.stat", "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0", nil},
		{V2, "blkio.weight", "500", []string{"io.bfq.weight", "default 500\n"}},
		{V2, "blkio.weight_device", "8:0 20", []string{"io.bfq.weight", "default 100\n8:0 20\n"}},
		{V1, "io.weight", "default 100\n8:0 20", []string{"blkio.bfq.weight_device", "8:0 20\n"}},
		{V2, "devices_list", "a *:* rwm", nil},
	} {
		k, ok := FindKey(c.key)
		if !ok {
			t.Errorf("no key %s", c.key)
			continue
		}
		fresh := map[Version]files{V1: fresh1, V2: fresh2}[c.version]
		if got, err := k.Value(host(c.version), fresh.with(c.from...).read); err != nil || got != c.want {
			t.Errorf("v%d %s: got %q, %v; want %q", c.version, c.key, got, err, c.want)
		}
	}
}

// TestKeyRefused: values that no host takes, and hosts that cannot.
func TestKeyRefused(t *testing.T) {
	for key, values := range map[string][]string{
		"memory.limit":           {"", "-1", "1k", "1.5G", "1 G", "G", "0x10", "1e3", "+1", "max ", "9223372036854775808", "16777216T", "1\n", "1\x00", "1G\n2G", "١"},
		"swap.limit":             {"-1", "x", "1M"}, // the last needs a memory.limit on v1
		"cpus_allowed":           {"", ",", "0-", "-1", "3-1", "a", "0,,1", "0-3:1/2", "99999", "all", "0\n1"},
		"cpus_fraction":          {"", "0", "0.0", "-1", "100.1", "1e1", "NaN", "inf", "0x1p4", ".5", "5.", "50%", "0.0001", "1_0"},
		"cpus_number":            {"0", "10000", "1e1", "0.001"},
		"cpu_share_percent":      {"0", "10001", "1.5", "max", ""},
		"devices_whitelist":      {"", "c", "c 1:3", "c 1:3 x", "c 1:3 rwmr", "c 1 r", "d 1:3 r", "c  1:3 r", "c 1:3 r,", "c 1:-1 r", "a\nb", "c 4294967296:1 r"},
		"net_classid":            {"", "-1", "4294967296", "0x", "1:2", "0x100000000"},
		"net_prio_interface_map": {"", "eth0", "eth0 -1", "eth/0 1", "0123456789abcdef 1", "e:0 1", ".. 1", "e\n0 1"},
		"hugetlb_limit":          {"", "4M", "4MB=1", "2MB", "2MB=", "../x=1", "2MB=1,", "2MB.max\n=1"},
		"blkio_weight":           {"0", "10001", "x", ""},
		"blkio_weight_device":    {"8:0", "8 100", "8:0 0", "8:0 10001", "8:0  5", "8:0 1 2", "-8:0 5", "4096:0 5"},
		"blkio_throttle_read":    {"8:0 0", "8:0 -1", "8:0 1 1", "8:0 5 wbps=1", "8:0"},
		"pids.limit":             {"-1", "", "x", "4194305", "max\n"},
		"rt.runtime":             {"-1", "", "1.5", "9223372036854775807"},
		"rt.period":              {"0", "-1"},
		"state":                  {"FROZEN", "", "frozen\n", "freezing", "1"},
	} {
		k, ok := FindKey(key)
		if !ok {
			t.Fatalf("no key %s", key)
		}
		for _, v := range values {
			ws, err := k.Writes(host(V1), v, fresh1.read)
			if !errors.Is(err, ErrValue) || ws != nil {
				t.Errorf("v1 %s %q: got %s, %v; want ErrValue", key, v, show(ws), err)
			}
			if k.v2 == nil || key == "swap.limit" {
				continue
			}
			if ws, err := k.Writes(host(V2), v, fresh2.read); !errors.Is(err, ErrValue) || ws != nil {
				t.Errorf("v2 %s %q: got %s, %v; want ErrValue", key, v, show(ws), err)
			}
		}
	}
	for _, c := range []struct {
		version    Version
		key, value string
		without    string
	}{
		{V1, "swap.soft_limit", "1M", ""},
		{V2, "net_cls.classid", "1", ""},
		{V2, "memory.swappiness", "60", ""},
		{V2, "cpu.rt_runtime_us", "1", ""},
		{V2, "memory.oom_control", "1", ""},
		{V2, "memory.failcnt", "0", ""},
		{V2, "memory.usage_in_bytes", "0", ""},
		{V2, "cpuacct.usage", "0", ""},
		{V2, "blkio.reset_stats", "1", ""},
		{V2, "notify_on_release", "1", ""},
		{V2, "memory.memsw.limit_in_bytes", "1G", "memory.swap.max"},
		{V1, "memory.high", "1", ""},
		{V1, "memory.oom.group", "1", ""},
		{V1, "io.latency", "8:0 target=1", ""},
		{V1, "cgroup.max.depth", "1", ""},
		{V2, "net_classid", "1", ""},
		{V2, "rt.runtime", "1", ""},
		{V1, "swap.limit", "max", memsw1},
		{V1, "blkio_weight", "100", "blkio.bfq.weight"},
		{V1, "memory.usage", "1", ""},
	} {
		k, ok := FindKey(c.key)
		if !ok {
			t.Fatalf("no key %s", c.key)
		}
		content := map[Version]files{V1: fresh1, V2: fresh2}[c.version].with()
		delete(content, c.without)
		if ws, err := k.Writes(host(c.version), c.value, content.read); !errors.Is(err, ErrUnsupported) || ws != nil {
			t.Errorf("v%d %s: got %s, %v; want ErrUnsupported", c.version, c.key, show(ws), err)
		}
	}
	// On BFQ alone a weight above its own is no weight of another meaning.
	k, _ := FindKey("blkio_weight")
	if ws, err := k.Writes(host(V1), "1001", fresh1.read); !errors.Is(err, ErrValue) {
		t.Errorf("weight 1001 on BFQ: %s, %v", show(ws), err)
	}
	// The Reader's refusals come through.
	denied := errors.New("denied")
	for _, key := range []string{"memory.limit", "swap.limit", "cpus_fraction", "blkio_weight"} {
		k, _ := FindKey(key)
		_, err := k.Writes(host(V1), "50", func(string, string) (string, error) { return "", denied })
		wantErr(t, key, err, denied)
	}
}

func TestKeyTable(t *testing.T) {
	for _, k := range slices.Concat(abstractKeys, fileKeys) {
		found, ok := FindKey(k.Name)
		if k.IsFile() {
			found, ok = FindFile(k.Name, k.file)
			// A name that both have needs a key of each, else one version's
			// clients would be given the other's content.
			other := map[Version]*binding{V1: k.v2, V2: k.v1}[k.file]
			if other != nil && strings.HasPrefix(other.files, k.Name) && byFile[V1+V2-k.file][k.Name] == nil && byName[k.Name] == nil {
				t.Errorf("%s: no key of the other version's", k.Name)
			}
		}
		if !ok || found != k {
			t.Errorf("%s: not found, or there twice", k.Name)
		}
		for _, b := range []*binding{k.v1, k.v2} {
			if b == nil {
				continue
			}
			if k.ReadOnly != (b.set == nil) && slices.Contains(abstractKeys, k) {
				t.Errorf("%s: ReadOnly is %v", k.Name, k.ReadOnly)
			}
			if b.get == nil {
				t.Errorf("%s: cannot be read", k.Name)
			}
			for f := range strings.SplitSeq(b.files, ", ") {
				f, _, _ = strings.Cut(f, " ")
				if got := ControllerOf(f); f != "" && b.controller != "" && got != b.controller && got != "cpuset" && got != "cpuacct" {
					t.Errorf("%s: %s is of %s, not of %s", k.Name, f, got, b.controller)
				}
			}
		}
		if k.v1 == nil && k.v2 == nil {
			t.Errorf("%s: nowhere", k.Name)
		}
	}
	for file, want := range map[string]string{
		"memory.max": "memory", "cgroup.procs": "", "tasks": "", "notify_on_release": "", "irq.pressure": "",
		"net_cls.classid": "net_cls", "hugetlb.2MB.max": "hugetlb", "": "",
	} {
		if got := ControllerOf(file); got != want {
			t.Errorf("ControllerOf(%q) = %q, want %q", file, got, want)
		}
	}
}

func TestRestore(t *testing.T) {
	const impossible = "(impossible)"
	for _, c := range []struct{ file, value, old, want string }{
		{"memory.limit_in_bytes", "1", "9223372036854771712\n", "9223372036854771712"},
		{"cpuset.cpus", "1", "\n", "\n"},
		{"cpuset.cpus", "1", "0-3\n", "0-3"},
		{"cpu.max", "1000 1000", "max 100000\n", "max 100000"},
		{"blkio.throttle.read_bps_device", "8:0 5", "8:0 7\n8:16 9\n", "8:0 7"},
		{"blkio.throttle.read_bps_device", "8:0 5", "8:16 9\n", "8:0 0"},
		{"io.max", "8:0 rbps=5", "8:16 rbps=1 wbps=max riops=max wiops=max\n", "8:0 rbps=max wbps=max riops=max wiops=max"},
		{"io.max", "8:16 rbps=5", "8:16 rbps=1 wbps=max riops=max wiops=max\n", "8:16 rbps=1 wbps=max riops=max wiops=max"},
		{"io.weight", "default 5", "default 100\n8:0 200\n", "default 100"},
		{"io.weight", "5", "default 100\n8:0 200\n", "default 100"},
		{"io.weight", "8:0 5", "default 100\n", "8:0 default"},
		{"net_prio.ifpriomap", "eth0 5", "lo 0\neth0 2\n", "eth0 2"},
		{"freezer.state", "THAWED", "FREEZING\n", "FROZEN"},
		{"devices.allow", "a", "a *:* rwm\n", impossible},
		{"memory.failcnt", "0", "17\n", impossible},
		{"hugetlb.2MB.failcnt", "0", "17\n", impossible},
		{"memory.oom_control", "1", "oom_kill_disable 0\nunder_oom 0\n", impossible},
	} {
		got, ok := Restore(c.file, c.value, c.old)
		if !ok {
			got = impossible
		}
		if got != c.want {
			t.Errorf("%s %q over %q: %q, want %q", c.file, c.value, c.old, got, c.want)
		}
	}
}

func TestArrange(t *testing.T) {
	w := func(file, value string) Write {
		return Write{Controller: ControllerOf(file), File: file, Value: value, Final: Final(file)}
	}
	limited := fresh1.with(memory1, "1048576", memsw1, "3145728", "cpu.rt_runtime_us", "50000", "cpu.rt_period_us", "100000")
	for _, c := range []struct {
		name string
		in   []Write
		want string
	}{
		{"raising", []Write{w(memory1, "4194304"), w(memsw1, "5242880")}, "memory.memsw.limit_in_bytes=5242880; memory.limit_in_bytes=4194304"},
		{"lowering", []Write{w(memsw1, "4096"), w(memory1, "4096")}, "memory.limit_in_bytes=4096; memory.memsw.limit_in_bytes=4096"},
		{"lifting", []Write{w(memory1, "-1"), w(memsw1, "-1")}, "memory.memsw.limit_in_bytes=-1; memory.limit_in_bytes=-1"},
		{"longer period", []Write{w("cpu.rt_runtime_us", "950000"), w("cpu.rt_period_us", "1000000")}, "cpu.rt_period_us=1000000; cpu.rt_runtime_us=950000"},
		{"shorter period", []Write{w("cpu.rt_period_us", "10000"), w("cpu.rt_runtime_us", "5000")}, "cpu.rt_runtime_us=5000; cpu.rt_period_us=10000"},
		{"final last", []Write{w("freezer.state", "FROZEN"), w("pids.max", "5"), w(memory1, "5"), w("cpu.shares", "5")}, "pids.max=5; cpu.shares=5; freezer.state=FROZEN; memory.limit_in_bytes=5"},
		{"the last counts", []Write{w("pids.max", "5"), w("cpu.shares", "5"), w("pids.max", "6")}, "cpu.shares=5; pids.max=6"},
		{"lines all count", []Write{w("devices.allow", "a"), w("devices.allow", "a"), w("io.max", "8:0 rbps=1"), w("io.max", "8:0 wbps=1")}, "io.max=8:0 rbps=1; io.max=8:0 wbps=1; devices.allow=a; devices.allow=a"},
	} {
		got, err := Arrange(c.in, limited.read)
		if err != nil || show(got) != c.want {
			t.Errorf("%s:\n got %s, %v\nwant %s", c.name, show(got), err, c.want)
		}
	}
}

func TestWeights(t *testing.T) {
	for w := uint64(1); w <= 10000; w++ {
		if got := sharesToWeight(weightToShares(w)); got != w {
			t.Fatalf("weight %d comes back as %d", w, got)
		}
	}
	for shares, want := range map[uint64]uint64{2: 1, 1024: 100, 262144: 10000, 512: 59, 2048: 174} {
		if got := sharesToWeight(shares); got != want {
			t.Errorf("shares %d: weight %d, want %d", shares, got, want)
		}
	}
}

// FuzzKeyValue: whatever the value, nothing but single lines reaches the
// kernel, in files of the key's own, and what is accepted reads back.
func FuzzKeyValue(f *testing.F) {
	for _, k := range slices.Concat(abstractKeys, fileKeys) {
		for _, v := range []string{"max", "1G", "50", "0-3", "c 1:3 rwm,a", "8:0 100", "2MB=1M", "frozen", "eth0 5", "0x1", "-1", "a\nb", "1\x00", "5000 10000"} {
			f.Add(k.Name, v)
		}
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		k, ok := FindKey(name)
		if !ok {
			return
		}
		for v, content := range map[Version]files{V1: fresh1, V2: fresh2} {
			s := host(v)
			ws, err := k.Writes(s, value, content.read)
			if err != nil {
				if ws != nil {
					t.Errorf("v%d %s %q: writes beside an error", v, name, value)
				}
				continue
			}
			_, b, err := s.binding(k)
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range ws {
				if strings.ContainsAny(w.Value, "\n\x00") {
					t.Errorf("v%d %s %q: %q goes to %s", v, name, value, w.Value, w.File)
				}
				if ValidFile(w.File) != nil || ControllerOf(w.File) != w.Controller {
					t.Errorf("v%d %s %q: file %q of %q", v, name, value, w.File, w.Controller)
				}
				if !strings.Contains(b.files, w.File) && !strings.Contains(b.files, "SIZE") {
					t.Errorf("v%d %s %q: file %q is not the key's", v, name, value, w.File)
				}
			}
			after := content.with()
			for _, w := range ws {
				after[w.File] = w.Value + "\n"
			}
			if _, err := k.Value(s, after.read); err != nil && b.set != nil && !isVerbatim(k, v) {
				t.Errorf("v%d %s %q: reading back %s: %v", v, name, value, show(ws), err)
			}
		}
	})
}

func isVerbatim(k *Key, v Version) bool { return k.file == v }

// TestFindFile: a name that both versions have means the file of the version
// whose client asks.
func TestFindFile(t *testing.T) {
	for _, c := range []struct {
		own  Version
		name string
		host Version
		want string
	}{
		{V1, "memory.stat", V2, "cache 20480\nrss 8192\nrss_huge 5\nshmem 6\nmapped_file 1\ndirty 2\nwriteback 3\nworkingset_refault_anon 12\nworkingset_refault_file 13\nswap 8192\nswapcached 4\npgfault 14\npgmajfault 15\ninactive_anon 7\nactive_anon 8\ninactive_file 9\nactive_file 10\nunevictable 11\n" +
			"hierarchical_memory_limit 4096\nhierarchical_memsw_limit 8192\n" +
			"total_cache 20480\ntotal_rss 8192\ntotal_rss_huge 5\ntotal_shmem 6\ntotal_mapped_file 1\ntotal_dirty 2\ntotal_writeback 3\ntotal_workingset_refault_anon 12\ntotal_workingset_refault_file 13\ntotal_swap 8192\ntotal_swapcached 4\ntotal_pgfault 14\ntotal_pgmajfault 15\ntotal_inactive_anon 7\ntotal_active_anon 8\ntotal_inactive_file 9\ntotal_active_file 10\ntotal_unevictable 11"},
		{V1, "memory.stat", V1, strings.TrimSuffix(fresh1["memory.stat"], "\n")},
		{V2, "memory.stat", V2, strings.TrimSuffix(fresh2["memory.stat"], "\n")},
		{V2, "memory.stat", V1, "file 20480\nanon 8192\nfile_mapped 1\nunevictable 11"},
		{V1, "cpu.stat", V2, "nr_periods 9\nnr_throttled 8\nthrottled_time 7000\nnr_bursts 6\nburst_time 5000"},
		{V1, "cpuset.cpus", V2, "0-3"},
		{V2, "cpuset.cpus", V2, ""},
		{V1, "cpuset.mems", V2, "0"},
		{
			V1, "memory.numa_stat", V2,
			"total=8 N0=6 N1=2\nfile=5 N0=4 N1=1\nanon=2 N0=2 N1=0\nunevictable=1 N0=0 N1=1\n" +
				"hierarchical_total=8 N0=6 N1=2\nhierarchical_file=5 N0=4 N1=1\nhierarchical_anon=2 N0=2 N1=0\nhierarchical_unevictable=1 N0=0 N1=1",
		},
		// A name of one version is the same key to both.
		{V1, "memory.current", V1, "4096"},
		{V2, "memory.usage_in_bytes", V2, "4096"},
		{V1, "hugetlb.2MB.current", V2, "0"},
	} {
		k, ok := FindFile(c.name, c.own)
		if !ok {
			t.Errorf("no key %s", c.name)
			continue
		}
		content := map[Version]files{V1: fresh1, V2: fresh2}[c.host]
		if got, err := k.Value(host(c.host), content.read); err != nil || got != c.want {
			t.Errorf("%s as v%d knows it, on v%d:\n got %q, %v\nwant %q", c.name, c.own, c.host, got, err, c.want)
		}
	}
	if _, ok := FindFile("memory.limit", V1); ok {
		t.Error("an abstract key is found as a file")
	}
}

// TestFileRefused: values that v1's kernel refuses are refused on v2.
func TestFileRefused(t *testing.T) {
	for key, values := range map[string][]string{
		"memory.limit_in_bytes":           {"max", "", "-2", "1X", "junk", "010", "0x10", "1.5G", "1 G", "99999999999999999999", "16777216T5", "1\n2"},
		"memory.memsw.limit_in_bytes":     {"max", "junk"},
		"cpu.shares":                      {"", "-1", "x"},
		"cpu.cfs_quota_us":                {"0", "999", "x", "-2"},
		"cpu.cfs_period_us":               {"0", "999", "1000001"},
		"freezer.state":                   {"frozen", "FREEZING", "1", ""},
		"blkio.throttle.read_bps_device":  {"8:0", "8:0 1M", "8:0 max", "8:0 -1", "8:0 5 wbps=1", "8:0 5,8:16 6", "x 1"},
		"blkio.throttle.read_iops_device": {"8:0 1k"},
		"blkio.weight":                    {"9", "1001", "x"},
		"blkio.bfq.weight":                {"0", "1001"},
		"blkio.weight_device":             {"500", "8:0 5"},
		"hugetlb.2MB.limit_in_bytes":      {"max", "x"},
	} {
		k, ok := FindFile(key, V1)
		if !ok {
			t.Fatalf("no key %s", key)
		}
		for _, v := range values {
			if ws, err := k.Writes(host(V2), v, fresh2.read); !errors.Is(err, ErrValue) || ws != nil {
				t.Errorf("%s %q: got %s, %v; want ErrValue", key, v, show(ws), err)
			}
		}
	}
	limited := fresh2.with("memory.max", "1048576\n", "memory.swap.max", "1048576\n")
	for key, value := range map[string]string{"memory.limit_in_bytes": "2097153", "memory.memsw.limit_in_bytes": "1048575"} {
		k, _ := FindFile(key, V1)
		if ws, err := k.Writes(host(V2), value, limited.read); !errors.Is(err, ErrValue) {
			t.Errorf("%s %s: got %s, %v; v1 refuses it", key, value, show(ws), err)
		}
	}
	for _, bad := range []string{"0", "8:0", "8:0 rbps=0", "8:0 x=1", "8:0 rbps=1,wbps=2", "8:0 rbps", "8:0 rbps=1M"} {
		k, _ := FindKey("io.max")
		if ws, err := k.Writes(host(V1), bad, fresh1.read); !errors.Is(err, ErrValue) || ws != nil {
			t.Errorf("io.max %q: got %s, %v; want ErrValue", bad, show(ws), err)
		}
	}
}

// TestBlkioWeights: what is set reads back.
func TestBlkioWeights(t *testing.T) {
	for w := weightOfCFQ.low; w <= weightOfCFQ.high; w++ {
		if got := weightOfCFQ.fromIO(weightOfCFQ.toIO(w)); got != w {
			t.Fatalf("weight %d comes back as %d", w, got)
		}
	}
}
