package cgfs

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Limit is a limit in force on a cgroup.
type Limit struct {
	// Name is that of its file, or "program" for one of the kernel's BPF
	// programs (devices, network), which has none.
	Name string
	// Attr is the file's; a program has no owner (NoID).
	Attr Attr
}

// InForce returns the limits in force on d itself: all that its tasks would
// leave behind in a cgroup beside it. A share below the usual one counts as a
// limit. So does being frozen, and whatever else of a file's content is not known
// to limit nothing. Not looked at are those above d, and protections, which bind
// only others.
func (d *Dir) InForce() ([]Limit, error) {
	var limits []Limit
	if d.h.version == V2 {
		attached, err := d.programs()
		if err != nil {
			return nil, err
		}
		if attached {
			limits = append(limits, Limit{Name: "program", Attr: Attr{UID: NoID, GID: NoID}})
		}
	}
	files, err := d.Files()
	if err != nil {
		return nil, err
	}
	for _, name := range files {
		free := d.h.idle(name)
		if free == nil {
			continue
		}
		content, attr, err := d.content(name)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, fs.ErrNotExist) {
			continue // what the kernel does not do limits nothing
		}
		if err != nil {
			return nil, err
		}
		if !free(d, strings.TrimSpace(content)) {
			limits = append(limits, Limit{Name: name, Attr: attr})
		}
	}
	return limits, nil
}

func (d *Dir) content(name string) (string, Attr, error) {
	f, err := d.File(name, ForRead)
	if err != nil {
		return "", Attr{}, err
	}
	defer f.Close()
	b, err := f.Read(1 << 20)
	return string(b), f.attr, err
}

// idle returns what reports whether a file's content limits nothing; nil if the
// file is of no limit. Sources: cgroup-v2.rst, and cgroup-v1/*.rst of the kernel's
// Documentation/admin-guide.
func (h *Hierarchy) idle(name string) func(d *Dir, content string) bool {
	if h.version == V2 {
		switch name {
		case "cpu.max", "cpu.uclamp.max":
			return firstWord("max")
		case "cpu.weight", "io.weight", "io.bfq.weight":
			return atLeast(100)
		case "cpu.idle", "cgroup.freeze":
			return is("0")
		case "cpuset.cpus", "cpuset.mems", "cpuset.cpus.exclusive", "io.max":
			return is("")
		case "io.prio.class":
			return is("no-change")
		case "cgroup.max.depth", "cgroup.max.descendants", "memory.high", "memory.swap.high":
			return allMax
		}
		if strings.HasSuffix(name, ".max") {
			return allMax
		}
		return nil
	}
	switch name {
	case "cpu.cfs_quota_us":
		return is("-1")
	case "cpu.shares":
		return atLeast(1024)
	case "cpu.idle", "net_cls.classid":
		return is("0")
	case "cpu.uclamp.max":
		return firstWord("max")
	case "cpuset.cpus", "cpuset.mems":
		return func(d *Dir, content string) bool { return d.asAbove(name, content) }
	case "devices.list":
		// It does not show what is denied while all else is allowed.
		return func(d *Dir, _ string) bool { return d.IsRoot() }
	case "freezer.state":
		return is("THAWED")
	case "net_prio.ifpriomap":
		return atMost(0)
	case "pids.max", "rdma.max", "misc.max":
		return allMax
	case "blkio.weight", "blkio.leaf_weight":
		return atLeast(500)
	case "blkio.bfq.weight", "blkio.bfq.weight_device":
		return atLeast(100)
	case "blkio.weight_device", "blkio.leaf_weight_device":
		return atLeast(500)
	}
	switch {
	case strings.HasSuffix(name, ".limit_in_bytes"), name == "memory.soft_limit_in_bytes":
		return atLeast(noLimit)
	case slices.Contains(throttleFiles, name):
		return is("")
	}
	return nil
}

func is(value string) func(*Dir, string) bool {
	return func(_ *Dir, content string) bool { return content == value }
}

func firstWord(word string) func(*Dir, string) bool {
	return func(_ *Dir, content string) bool {
		first, _, _ := strings.Cut(content, " ")
		return first == word
	}
}

// atLeast reports whether the last word of each line is a number not below n.
func atLeast(n int64) func(*Dir, string) bool {
	return lastWords(func(v int64) bool { return v >= n })
}

func atMost(n int64) func(*Dir, string) bool {
	return lastWords(func(v int64) bool { return v <= n })
}

func lastWords(fits func(int64) bool) func(*Dir, string) bool {
	return func(_ *Dir, content string) bool {
		for line := range strings.Lines(content) {
			words := strings.Fields(line)
			if len(words) == 0 {
				continue
			}
			v, err := strconv.ParseInt(words[len(words)-1], 10, 64)
			if err != nil || !fits(v) {
				return false
			}
		}
		return true
	}
}

// allMax reports whether each value is "max", or the number that stands for it.
// Files with several have a line for each thing, with its name in front: "mlx4_0
// hca_handle=max hca_object=max".
func allMax(_ *Dir, content string) bool {
	if n, err := strconv.ParseInt(content, 10, 64); content == "max" || err == nil && n >= noLimit {
		return true
	}
	for line := range strings.Lines(content) {
		words := strings.Fields(line)
		if len(words) < 2 {
			return false
		}
		for _, w := range words[1:] {
			if w != "max" && !strings.HasSuffix(w, "=max") {
				return false
			}
		}
	}
	return true
}

// asAbove reports whether a file reads the same in the parent of d. A v1 cpuset
// always names its cpus; those that it has no fewer of than the one above limit
// nothing.
func (d *Dir) asAbove(name, content string) bool {
	i := strings.LastIndexByte(d.path, '/')
	if d.path == "/" {
		return true
	}
	above, err := d.h.Open(d.path[:max(i, 1)])
	if err != nil {
		return false
	}
	defer above.Close()
	theirs, _, err := above.content(name)
	return err == nil && strings.TrimSpace(theirs) == content
}

// cgroupPrograms are the places at which BPF programs bind a cgroup's tasks.
var cgroupPrograms = []ebpf.AttachType{
	ebpf.AttachCGroupDevice,
	ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress,
	ebpf.AttachCGroupInetSockCreate, ebpf.AttachCgroupInetSockRelease, ebpf.AttachCGroupSockOps,
	ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind,
	ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind,
	ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
	ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
	ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
	ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSetsockopt, ebpf.AttachCGroupSysctl,
	ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
	ebpf.AttachCgroupInet4GetSockname, ebpf.AttachCgroupInet6GetSockname,
	ebpf.AttachCgroupUnixConnect, ebpf.AttachCgroupUnixSendmsg, ebpf.AttachCgroupUnixRecvmsg,
	ebpf.AttachCgroupUnixGetpeername, ebpf.AttachCgroupUnixGetsockname,
	ebpf.AttachLSMCgroup,
}

// programs reports whether a program is attached to d itself.
func (d *Dir) programs() (bool, error) {
	for _, at := range cgroupPrograms {
		q, err := link.QueryPrograms(link.QueryOptions{Target: d.fd, Attach: at})
		// A kernel that does not know the place has nothing there.
		if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("query the programs of %s: %w", d.path, err)
		}
		if len(q.Programs) > 0 {
			return true, nil
		}
	}
	return false, nil
}
