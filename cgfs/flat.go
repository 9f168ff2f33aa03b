package cgfs

import (
	"errors"
	"io/fs"
)

// Flat reports whether the hierarchy has limits that bind the tasks of a cgroup
// alone, and not those of the cgroups below it. Only blkio.throttle.* of v1 are
// such: throttling there works as if all cgroups lay side by side
// (Documentation/admin-guide/cgroup-v1/blkio-controller.rst, "Hierarchical
// Cgroups").
func (h *Hierarchy) Flat() bool { return h.version == V1 && h.Has("blkio") }

// throttleFiles hold the flat limits, a line for each device.
var throttleFiles = []string{
	"blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device",
	"blkio.throttle.read_iops_device", "blkio.throttle.write_iops_device",
}

// FlatLimits reports whether limits that do not bind the cgroups below (see
// Flat) are in force in d.
func (d *Dir) FlatLimits() (bool, error) {
	if !d.h.Flat() {
		return false, nil
	}
	for _, name := range throttleFiles {
		f, err := d.File(name, ForRead)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without CONFIG_BLK_DEV_THROTTLING
		}
		if err != nil {
			return false, err
		}
		var one [1]byte
		n, err := f.pread(one[:], 0)
		_ = f.Close()
		if n > 0 || err != nil {
			return n > 0, err
		}
	}
	return false, nil
}
