package cgfs

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// A new cgroup has no limit in force; each that is set shows, and no other.
func TestKernelInForce(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	s := open(t, Options{})
	set := map[string][][2]string{ // by controller: file and value
		"memory": {
			{"memory.max", "64M"},
			{"memory.high", "64M"},
			{"memory.swap.max", "0"},
			{"memory.limit_in_bytes", "64M"},
			{"memory.soft_limit_in_bytes", "64M"},
		},
		"pids":     {{"pids.max", "100"}},
		"cpu":      {{"cpu.max", "50000 100000"}, {"cpu.weight", "50"}, {"cpu.idle", "1"}, {"cpu.cfs_quota_us", "50000"}, {"cpu.shares", "512"}},
		"cpuset":   {{"cpuset.cpus", "0"}},
		"freezer":  {{"freezer.state", "FROZEN"}},
		"net_cls":  {{"net_cls.classid", "7"}},
		"net_prio": {{"net_prio.ifpriomap", "lo 3"}},
		"hugetlb":  {{"hugetlb.2MB.max", "2M"}, {"hugetlb.2MB.limit_in_bytes", "2M"}},
		"unified":  {{"cgroup.freeze", "1"}, {"cgroup.max.depth", "7"}},
		"blkio":    {{"blkio.throttle.read_bps_device", blockDevice(t) + " 1000"}},
		"io":       {{"io.max", blockDevice(t) + " rbps=1000"}},
	}
	tried := 0
	for ctrl, files := range set {
		h, ok := s.ByController(ctrl)
		if ctrl == "unified" {
			h, ok = s.Unified()
		}
		if !ok || ctrl != "unified" && !h.Has(ctrl) {
			continue
		}
		for _, f := range files {
			t.Run(f[0], func(t *testing.T) {
				p := newPlace(t, s, h.controllerFor(ctrl))
				if h.Version() == V2 && ctrl != "unified" {
					root, err := h.Open("/")
					check(t, err)
					defer root.Close()
					check(t, root.Enable(ctrl))
					check(t, p.dir.Enable(ctrl))
				}
				d := mkdir(t, p.dir, "d")
				if _, err := d.FileAttr(f[0]); err != nil {
					return // the other version's
				}
				before, err := d.InForce()
				check(t, err)
				// The rules of v1 cannot all be seen.
				before = slices.DeleteFunc(before, func(l Limit) bool { return l.Name == "devices.list" })
				if len(before) > 0 {
					t.Errorf("a new cgroup has limits: %v", before)
				}
				check(t, d.write(f[0], f[1]))
				after, err := d.InForce()
				check(t, err)
				if !slices.ContainsFunc(after, func(l Limit) bool { return l.Name == f[0] }) {
					t.Errorf("%s = %s shows as %v", f[0], f[1], after)
				}
				tried++
			})
		}
	}
	if tried < 2 {
		t.Errorf("%d limits tried", tried)
	}
}

// controllerFor is what newPlace finds h by.
func (h *Hierarchy) controllerFor(ctrl string) string {
	if h.version == V2 {
		return "unified"
	}
	return ctrl
}

// blockDevice is the number of some disk.
func blockDevice(t *testing.T) string {
	t.Helper()
	devs, err := filepath.Glob("/sys/block/*/dev")
	check(t, err)
	for _, d := range devs {
		if b, err := os.ReadFile(d); err == nil {
			return string(b[:len(b)-1])
		}
	}
	return "7:0"
}

// A device program, such as systemd's DevicePolicy= loads, is a limit.
func TestKernelInForcePrograms(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V2)
	p := newPlace(t, open(t, Options{}), "unified")
	d := mkdir(t, p.dir, "d")
	if in, err := d.InForce(); err != nil || len(in) > 0 {
		t.Fatalf("a new cgroup has limits: %v, %v", in, err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupDevice, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(t, err)
	defer func() { check(t, prog.Close()) }()
	check(t, link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: d.fd, Program: prog, Attach: ebpf.AttachCGroupDevice, Flags: unix.BPF_F_ALLOW_MULTI,
	}))
	in, err := d.InForce()
	check(t, err)
	if len(in) != 1 || in[0].Name != "program" || in[0].Attr.UID != NoID {
		t.Errorf("a device program shows as %v", in)
	}
}

func TestKernelDelegated(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		marked := func() bool {
			t.Helper()
			yes, err := p.dir.Delegated()
			check(t, err)
			return yes
		}
		if marked() {
			t.Error("delegated without a mark")
		}
		for _, v := range []string{"0", "11", "yes and much more than fits"} {
			check(t, unix.Fsetxattr(p.dir.fd, "trusted.delegate", []byte(v), 0))
			if marked() {
				t.Errorf("delegated with the mark %q", v)
			}
		}
		check(t, unix.Fsetxattr(p.dir.fd, "trusted.delegate", []byte("1"), 0))
		if !marked() {
			t.Error("not delegated with the mark")
		}
		check(t, unix.Fremovexattr(p.dir.fd, "trusted.delegate"))
		if err := unix.Fsetxattr(p.dir.fd, "user.delegate", []byte("1"), 0); err != nil {
			t.Logf("user.delegate: %v", err) // v1
		} else if !marked() {
			t.Error("not delegated with the mark for users")
		}
	})
}
