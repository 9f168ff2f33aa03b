package cgfs

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"cgmanager/cgfs/cgtest"
)

// everywhere is a cgroup in every hierarchy of this machine. For v2 its
// controllers are enabled at the root, as the daemon does; they stay enabled,
// since somebody else may have begun to use them.
type everywhere struct {
	s    *Set
	dirs map[*Hierarchy]*Dir
}

func newEverywhere(t *testing.T) everywhere {
	t.Helper()
	e := everywhere{open(t, Options{}), make(map[*Hierarchy]*Dir)}
	name := cgtest.Name(t)
	for _, h := range e.s.Hierarchies() {
		root, err := h.Open("/")
		check(t, err)
		for _, c := range h.Controllers() {
			if h.Version() == V2 {
				if err := root.Enable(c); err != nil {
					t.Logf("enable %s: %v", c, err)
				}
			}
		}
		d, err := root.Mkdir(name, 0, 0)
		check(t, err)
		check(t, root.Close())
		t.Cleanup(func() { _ = d.Close() })
		e.dirs[h] = d
	}
	return e
}

func (e everywhere) dir(controller string) *Dir {
	h, ok := e.s.ByController(controller)
	if controller == "" {
		h, ok = e.s.Unified()
	}
	if !ok {
		return nil
	}
	return e.dirs[h]
}

func (e everywhere) read(controller, file string) (string, error) {
	d := e.dir(controller)
	if d == nil {
		return "", ErrNoController
	}
	if file == LimitsInEffect {
		return d.LimitsInEffect()
	}
	b, err := d.read(file, 1<<16)
	return string(b), err
}

func (e everywhere) set(key, value string) error {
	k, ok := FindKey(key)
	if !ok {
		return errors.New("no key " + key)
	}
	ws, err := k.Writes(e.s, value, e.read)
	if err != nil {
		return err
	}
	for _, w := range ws {
		if err := e.dir(w.Controller).write(w.File, w.Value); err != nil {
			return err
		}
	}
	return nil
}

func (e everywhere) get(key string) (string, error) {
	k, ok := FindKey(key)
	if !ok {
		return "", errors.New("no key " + key)
	}
	return k.Value(e.s, e.read)
}

// TestKernelKeys sets each key to something the kernel takes and reads it
// back. Rows run one after the other in one cgroup.
func TestKernelKeys(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	tested := map[string]bool{}
	for _, c := range []struct{ key, value, want string }{
		{"memory.limit", "64M", "67108864"},
		{"swap.limit", "32M", "33554432"},
		{"memory.limit", "128M", "134217728"}, // swap must not be in the way
		{"swap.limit", "32M", "33554432"},
		{"memory.limit", "16M", "16777216"},
		{"memory.max", "32M", "33554432"},
		{"memory.limit_in_bytes", "16777216", "16777216"},
		{"memory.limit", "max", "max"},
		{"swap.limit", "max", "max"},
		{"swap.soft_limit", "8M", "8388608"},
		{"swap.soft_limit", "max", "max"},
		{"memory.soft_limit", "1G", "1073741824"},
		{"memory.soft_limit", "max", "max"},
		{"cpus_allowed", "0", "0"},
		{"cpus_fraction", "50", "50"},
		{"cpus_fraction", "12.5", "12.5"},
		{"cpus_number", "0.25", "0.25"},
		{"cpu.max", "20000 40000", "20000 40000"},
		{"cpu.max", "100000 1000000", "100000 1000000"},
		{"cpu.max", "2000 10000", "2000 10000"},
		{"cpus_fraction", "max", "max"},
		{"cpus_number", "max", "max"},
		{"cpu_share_percent", "50", "50"},
		{"cpu_share_percent", "10000", "10000"},
		{"cpu_share_percent", "1", "1"},
		{"cpu.weight", "100", "100"},
		{"devices_blacklist", "a", ""},
		{"devices_whitelist", "c 1:3 rwm,b *:* r", "c 1:3 rwm,b *:* r"},
		{"net_classid", "0x100001", "1048577"},
		{"net_prio_interface_map", "lo 5", "lo 5"},
		{"hugetlb_limit", "2MB=4M", "2MB=4194304"},
		{"hugetlb.2MB.limit_in_bytes", "8388608", "8388608"},
		{"hugetlb_limit", "2MB=max", "2MB=max"},
		{"blkio_weight", "500", "500"},
		{"blkio_throttle_read", rootDevice + " 1M", rootDevice + " 1048576"},
		{"blkio_throttle_read", rootDevice + " max", ""},
		{"blkio_throttle_write", rootDevice + " 1M", rootDevice + " 1048576"},
		{"blkio_throttle_write", rootDevice + " max", ""},
		{"pids.limit", "100", "100"},
		{"pids.limit", "max", "max"},
		{"rt.period", "500000", "500000"},
		{"rt.runtime", "1000", "1000"},
		{"state", "frozen", "frozen"},
		{"state", "thawed", "thawed"},
	} {
		key, value, want := c.key, c.value, c.want
		if strings.HasPrefix(value, rootDevice) {
			dev := someDevice(t)
			if dev == "" {
				t.Logf("%s: no block device", key)
				continue
			}
			value, want = strings.Replace(value, rootDevice, dev, 1), strings.Replace(want, rootDevice, dev, 1)
		}
		tested[key] = true
		if k, ok := FindKey(key); !ok {
			t.Errorf("no key %s", key)
		} else if _, _, err := e.s.KeyHierarchy(k); errors.Is(err, ErrUnsupported) {
			t.Logf("%s: %v", key, err)
			continue
		}
		if err := e.set(key, value); kernelLacks(key, err) {
			t.Logf("%s: %v", key, err)
			continue
		} else if err != nil {
			t.Errorf("set %s to %q: %v", key, value, err)
			continue
		}
		got, err := e.get(key)
		if strings.Contains(key, "hugetlb") && strings.Contains(got, want) {
			got = want // the other sizes do not matter
		}
		if err != nil || got != want {
			t.Errorf("%s set to %q reads %q, %v; want %q", key, value, got, err, want)
		}
	}
	for _, k := range abstractKeys {
		_, _, err := e.s.KeyHierarchy(k)
		switch {
		case errors.Is(err, ErrUnsupported):
		case k.ReadOnly:
			if v, err := e.get(k.Name); kernelLacks(k.Name, err) {
				t.Logf("%s: %v", k.Name, err)
			} else if err != nil || v == "" {
				t.Errorf("%s: got %q, %v", k.Name, v, err)
			}
		case !tested[k.Name] && k.Name != "blkio_weight_device": // needs a device under BFQ
			t.Errorf("%s: no row", k.Name)
		}
	}
}

// kernelLacks reports whether err says that a kernel has not what the key needs:
// realtime by groups and weights of block devices, if it was built without, and
// memory.swap.peak before Linux 6.5.
func kernelLacks(key string, err error) bool {
	switch key {
	case "rt.runtime", "rt.period":
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrUnsupported)
	case "swap.max_use":
		return errors.Is(err, fs.ErrNotExist)
	case "blkio_weight":
		return errors.Is(err, ErrUnsupported)
	}
	return false
}

const rootDevice = "DEV"

// someDevice returns the number of a block device that can be throttled.
func someDevice(t *testing.T) string {
	entries, err := os.ReadDir("/sys/block")
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	check(t, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "vd") || strings.HasPrefix(e.Name(), "sd") || strings.HasPrefix(e.Name(), "nvme") {
			b, err := os.ReadFile("/sys/block/" + e.Name() + "/dev")
			check(t, err)
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

// TestKernelRestore: what Restore says puts a file back.
func TestKernelRestore(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	for key, value := range map[string]string{
		"memory.limit": "64M", "memory.soft_limit": "64M", "cpus_allowed": "0", "cpus_number": "0.5",
		"cpu_share_percent": "50", "blkio_weight": "500", "pids.limit": "10", "state": "frozen", "rt.runtime": "1000",
		"blkio_throttle_read": someDevice(t) + " 1M", "hugetlb_limit": "2MB=4M",
	} {
		k, _ := FindKey(key)
		if _, _, err := e.s.KeyHierarchy(k); errors.Is(err, ErrUnsupported) {
			continue
		}
		ws, err := k.Writes(e.s, value, e.read)
		if kernelLacks(key, err) {
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		for _, w := range ws {
			old, err := e.read(w.Controller, w.File)
			if kernelLacks(key, err) {
				continue
			}
			check(t, err)
			check(t, e.dir(w.Controller).write(w.File, w.Value))
			if now, _ := e.read(w.Controller, w.File); now == old {
				t.Errorf("%s: %q changed nothing", key, w.Value)
			}
			back, ok := Restore(w.File, w.Value, old)
			if !ok {
				t.Errorf("%s: cannot be put back", key)
				continue
			}
			check(t, e.dir(w.Controller).write(w.File, back))
			// hugetlb.SIZE.max starts with a number and is max later on.
			now, _ := e.read(w.Controller, w.File)
			if isUnlimited(now) && isUnlimited(old) {
				now = old
			}
			if now != old {
				t.Errorf("%s: %q after, %q before", key, now, old)
			}
		}
	}
}

func isUnlimited(content string) bool {
	n, err := limitOf(content)
	return err == nil && n == unlimited
}

// TestKernelFileKeys: on whichever version the host has a controller, the files
// of the other are read and written, in its own forms.
func TestKernelFileKeys(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	e := newEverywhere(t)
	// Not every kernel has them: schedulers, swap accounting, newer files.
	maybe := []string{"blkio.weight", "blkio.bfq.", "io.weight", "io.bfq.weight", "memory.memsw.", "memory.swap.", "memory.peak", "memory.max_usage_in_bytes", "memory.kmem.", "burst", "freezer.", "cgroup."}
	read := 0
	for _, k := range fileKeys {
		h, _, err := e.s.KeyHierarchy(k)
		if err != nil || !k.Translated(h) {
			continue
		}
		v, err := k.Value(e.s, e.read)
		if (errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrNoController)) &&
			slices.ContainsFunc(maybe, func(s string) bool { return strings.Contains(k.Name, s) }) {
			t.Logf("%s: %v", k.Name, err)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", k.Name, err)
		}
		t.Logf("%s: %q", k.Name, v)
		read++
	}
	if read < 10 {
		t.Errorf("only %d files were translated", read)
	}
	dev := someDevice(t)
	for _, c := range []struct {
		own               Version
		file, value, want string
	}{
		{V1, "memory.limit_in_bytes", "50M", "52428800"},
		{V1, "memory.limit_in_bytes", "-1", "9223372036854771712"},
		{V1, "memory.soft_limit_in_bytes", "1m", "1048576"},
		{V1, "cpu.shares", "1024", "1024"},
		{V1, "cpu.shares", "2", "2"},
		{V1, "cpu.cfs_period_us", "50000", "50000"},
		{V1, "cpu.cfs_quota_us", "20000", "20000"},
		{V1, "cpu.cfs_quota_us", "-1", "-1"},
		{V1, "cpuset.cpus", "0", "0"},
		{V1, "freezer.state", "FROZEN", "FROZEN"},
		{V1, "freezer.self_freezing", "", "1"},
		{V1, "freezer.state", "THAWED", "THAWED"},
		{V1, "blkio.throttle.read_bps_device", dev + " 1048576", dev + " 1048576"},
		{V1, "blkio.throttle.write_iops_device", dev + " 100", dev + " 100"},
		{V1, "blkio.throttle.read_bps_device", dev + " 0", ""},
		{V1, "blkio.throttle.write_iops_device", dev + " 0", ""},
		{V1, "memory.use_hierarchy", "", "1"},
		{V1, "memory.oom_control", "", "oom_kill_disable 0\nunder_oom 0\noom_kill 0"},
		{V2, "memory.max", "64M", "67108864"},
		{V2, "memory.max", "max", "max"},
		{V2, "memory.low", "1M", "1048576"},
		{V2, "cpu.weight", "100", "100"},
		{V2, "cpu.weight", "50", "50"},
		{V2, "cpu.max", "20000 40000", "20000 40000"},
		{V2, "cpu.max", "max", "max 40000"},
		{V2, "cgroup.freeze", "1", "1"},
		{V2, "cgroup.events", "", "frozen 1"},
		{V2, "cgroup.freeze", "0", "0"},
		{V2, "io.max", dev + " rbps=1048576 wiops=100", dev + " rbps=1048576 wbps=max riops=max wiops=100"},
		{V2, "io.max", dev + " rbps=max wiops=max", ""},
	} {
		k, ok := FindFile(c.file, c.own)
		if !ok {
			t.Fatalf("no key %s", c.file)
		}
		if _, _, err := e.s.KeyHierarchy(k); err != nil || dev == "" && strings.HasPrefix(c.value, " ") {
			t.Logf("%s: %v, device %q", c.file, err, dev)
			continue
		}
		if c.value != "" {
			ws, err := k.Writes(e.s, c.value, e.read)
			for _, w := range ws {
				if err == nil {
					err = e.dir(w.Controller).write(w.File, w.Value)
				}
			}
			if err != nil {
				t.Errorf("%s %q: %v", c.file, c.value, err)
				continue
			}
		}
		got, err := k.Value(e.s, e.read)
		if c.file == "cgroup.events" && strings.Contains(got, c.want) {
			got = c.want // v2 itself says more
		}
		if err != nil || got != c.want {
			t.Errorf("%s set to %q reads %q, %v; want %q", c.file, c.value, got, err, c.want)
		}
	}
}

// TestKernelLimitsInEffect: a limit above counts below.
func TestKernelLimitsInEffect(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Unified) // on v1 the kernel says it
	e := newEverywhere(t)
	h, _ := e.s.Unified()
	above := e.dirs[h]
	check(t, above.Enable("memory"))
	below, err := above.Mkdir("below", 0, 0)
	check(t, err)
	defer below.Close()
	defer func() { check(t, above.Rmdir("below")) }()
	is := func(d *Dir, memory string) {
		t.Helper()
		got, err := d.LimitsInEffect()
		if first, _, _ := strings.Cut(got, "\n"); err != nil || first != "memory_limit "+memory {
			t.Errorf("%s: %q, %v; want %s", d.Path(), got, err, memory)
		}
	}
	is(below, "9223372036854771712")
	check(t, below.write("memory.max", "128M"))
	is(below, "134217728")
	check(t, above.write("memory.max", "64M"))
	is(below, "67108864")
	is(above, "67108864")
	check(t, below.write("memory.max", "32M"))
	is(below, "33554432")
	is(above, "67108864")
}
