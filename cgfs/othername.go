package cgfs

import "fmt"

// otherNames are controllers that one version has and the other does without,
// or calls differently. What version v does in their place belongs to the
// controller means there, or to none: on v2 every cgroup has cgroup.freeze,
// cpu.stat and device programs, and perf_event needs no enabling
// (Documentation/admin-guide/cgroup-v2.rst).
var otherNames = []struct {
	name, means string
	v           Version
}{
	{"blkio", "io", V2},
	{"cpuacct", "", V2},
	{"devices", "", V2},
	{"freezer", "", V2},
	{"perf_event", "", V2},
	{"io", "blkio", V1},
}

// other finds what a controller's name of the other version means in h.
func (h *Hierarchy) other(name string) (means string, ok bool) {
	for _, o := range otherNames {
		if o.name == name && o.v == h.version && (o.means == "" || h.Has(o.means)) {
			return o.means, true
		}
	}
	return "", false
}

// Enables returns the controller that must be enabled above a cgroup of h for
// the controller called name to work in it: on v2 "io" for "blkio". "" is none:
// v1 enables nothing, and v2 always has what name does there.
func (h *Hierarchy) Enables(name string) string {
	switch {
	case h.version == V1:
		return ""
	case h.Has(name):
		return name
	}
	means, _ := h.other(name)
	return means
}

// Missing says why ByController does not find a controller. The error wraps
// ErrUnsupported if another host has it, and names that, else ErrNoController.
func (s *Set) Missing(name string) error {
	if where, ok := whereControllers[name]; ok {
		return fmt.Errorf("controller %s: %w: it needs %s", name, ErrUnsupported, where)
	}
	return fmt.Errorf("%w: %q", ErrNoController, name)
}

const (
	onV1     = "a host with cgroup v1 and this controller mounted there"
	onV2     = "a host with cgroup v2 and this controller enabled at its root"
	onEither = "a host with this controller, mounted on cgroup v1 or enabled on v2"
)

// whereControllers says which hosts have the controllers of the kernel.
var whereControllers = map[string]string{
	"net_cls": onV1, "net_prio": onV1,
	"dmem":  onV2,
	"blkio": onEither, "cpu": onEither, "cpuacct": onEither, "cpuset": onEither,
	"devices": onEither, "freezer": onEither, "hugetlb": onEither, "io": onEither,
	"memory": onEither, "misc": onEither, "perf_event": onEither, "pids": onEither,
	"rdma": onEither,
}
