package privcheck_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	. "cgmanager/privcheck"
)

func TestClassOf(t *testing.T) {
	for class, names := range map[KeyClass]string{
		Delegable: `
			memory.limit_in_bytes memory.memsw.limit_in_bytes memory.max memory.swap.max memory.high
			cpu.shares cpu.cfs_quota_us cpu.max cpu.weight cpu.rt_runtime_us cpu.rt_period_us
			cpuset.cpus cpuset.mems devices.allow devices.deny freezer.state cgroup.freeze pids.max
			blkio.weight blkio.throttle.read_bps_device io.max io.weight
			hugetlb.2MB.limit_in_bytes hugetlb.1GB.max hugetlb.64KB.rsvd.max hugetlb.2MB.rsvd.limit_in_bytes
			memory.max_usage_in_bytes memory.failcnt cpuacct.usage`,
		HostRootOnly: `
			memory.oom_control net_prio.ifpriomap net_prio.prioidx net_cls.classid
			cpuset.sched_load_balance cpuset.sched_relax_domain_level release_agent`,
		NeverWritten: `
			tasks cgroup.procs cgroup.threads cgroup.event_control cgroup.kill cgroup.type
			cgroup.subtree_control notify_on_release memory.force_empty memory.reclaim
			memory.pressure_level memory.pressure cpu.pressure io.pressure irq.pressure cgroup.pressure
			cpuset.cpu_exclusive cpuset.mem_exclusive cpuset.cpus.exclusive cpuset.cpus.partition
			cpuset.memory_pressure_enabled cpuset.mem_hardwall cgroup.clone_children
			memory.use_hierarchy memory.move_charge_at_immigrate io.prio.class io.cost.qos io.cost.model
			memory.usage_in_bytes memory.peak`,
	} {
		for name := range strings.FieldsSeq(names) {
			if got := ClassOf(name); got != class {
				t.Errorf("ClassOf(%q) = %v, want %v", name, got, class)
			}
		}
	}
	// Near misses of what may be written.
	for _, name := range []string{
		"", "*", "/", ".", "Memory.max", "memory.max ", " memory.max", "memory.max\n", "memory.max\x00",
		"../memory.max", "a/memory.max", "/memory.max", "memory.max/", "memory.ma", "memory.maxx", "emory.max",
		"hugetlb.max", "hugetlb..max", "hugetlb.*.max", "hugetlb.2MB/../x.max", "hugetlb./.max", "hugetlb.a.b.max",
		"hugetlb.2MB.max.x", "hugetlb.2M\u00df.max", "hugetlb.2-MB.max", "hugetlb.2MB.rsvd", "hugetlb.rsvd.max.x",
		"hugetlb.[].max", "hugetlb.`.max", "hugetlb.{.max", "hugetlb.@.max", "hugetlb.:.max", "xhugetlb.2MB.max",
		"net_prio.", "net_prio.a/b", "net_prio.a.b", "hugetlb.max_usage_in_bytes",
	} {
		if got := ClassOf(name); got != NeverWritten {
			t.Errorf("ClassOf(%q) = %v, want %v", name, got, NeverWritten)
		}
	}
	for _, name := range []string{"hugetlb.0.max", "hugetlb.9.max", "hugetlb.A.max", "hugetlb.Z.max", "hugetlb.a.max", "hugetlb.z.max", "hugetlb._.max"} {
		if got := ClassOf(name); got != Delegable {
			t.Errorf("ClassOf(%q) = %v, want %v", name, got, Delegable)
		}
	}
}

// TestKeyPatterns compares the table with the lists of docs/SECURITY.md, which
// readers go by.
func TestKeyPatterns(t *testing.T) {
	data, err := os.ReadFile("../docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	for class, heading := range map[KeyClass]string{
		Delegable:    "**Whoever has write privilege over the file:**",
		HostRootOnly: "**Host root alone:**",
	} {
		_, text, ok := strings.Cut(string(data), heading)
		if !ok {
			t.Fatalf("docs/SECURITY.md has no %q", heading)
		}
		text, _, _ = strings.Cut(text, "\n\n")
		var documented, table []string
		for i, word := range strings.Split(text, "`") {
			if i%2 == 1 {
				documented = append(documented, word)
			}
		}
		for _, k := range KeyPatterns() {
			if k.Class == class {
				table = append(table, k.Pattern)
			}
		}
		for _, p := range table {
			if !slices.Contains(documented, p) {
				t.Errorf("docs/SECURITY.md does not list %q as %v", p, class)
			}
		}
		for _, p := range documented {
			if !slices.Contains(table, p) {
				t.Errorf("docs/SECURITY.md lists %q as %v, the table does not", p, class)
			}
		}
	}
}

// TestKeyPatternsAreLiteral guards the one wildcard that match knows, and the
// rule that no line hides another.
func TestKeyPatternsAreLiteral(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range KeyPatterns() {
		if strings.Count(k.Pattern, "*") > 1 || strings.Contains(k.Pattern, "/") || k.Class == NeverWritten || seen[k.Pattern] {
			t.Errorf("bad line %+v", k)
		}
		seen[k.Pattern] = true
		if name := strings.ReplaceAll(k.Pattern, "*", "x"); ClassOf(name) != k.Class {
			t.Errorf("ClassOf(%q) = %v, want %v: an earlier line matches", name, ClassOf(name), k.Class)
		}
	}
}
