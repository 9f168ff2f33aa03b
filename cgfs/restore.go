package cgfs

import (
	"strings"
)

// Restore returns what to write to a kernel's control file to take back the
// write of written, when old is what the file read before. false means that it
// cannot be taken back.
func Restore(file, written, old string) (string, bool) {
	old = strings.TrimRight(old, "\n")
	switch file {
	case "devices.allow", "devices.deny", "cgroup.kill", "memory.force_empty", "memory.reclaim":
		return "", false
	case "memory.oom_control":
		v, ok := strings.CutPrefix(firstLine(old), "oom_kill_disable ")
		return v, ok
	case "freezer.state":
		if old == "FREEZING" {
			old = "FROZEN"
		}
		return old, old == "FROZEN" || old == "THAWED"
	case "net_prio.ifpriomap":
		return lineOf(written, old, "0")
	case "blkio.weight_device", "blkio.leaf_weight_device", "blkio.bfq.weight_device",
		"blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device",
		"blkio.throttle.read_iops_device", "blkio.throttle.write_iops_device":
		return lineOf(written, old, "0")
	case "io.max":
		return lineOf(written, old, "rbps=max wbps=max riops=max wiops=max")
	case "io.weight", "io.bfq.weight":
		if !strings.Contains(strings.TrimPrefix(written, "default "), " ") {
			return firstLine(old), true
		}
		return lineOf(written, old, "default")
	case "io.latency":
		return lineOf(written, old, "target=0")
	case "rdma.max":
		return lineOf(written, old, "hca_handle=max hca_object=max")
	}
	if strings.HasSuffix(file, ".failcnt") || strings.HasSuffix(file, "max_usage_in_bytes") || strings.Contains(old, "\n") {
		return "", false
	}
	return old, true
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// lineOf finds the line of old that starts with the same word as written (a
// device, an interface); where there is none, the word with none is what the
// kernel takes for "not set".
func lineOf(written, old, none string) (string, bool) {
	word, _, _ := strings.Cut(strings.TrimSpace(written), " ")
	if word == "" {
		return "", false
	}
	for line := range strings.Lines(old) {
		if w, _, _ := strings.Cut(line, " "); w == word {
			return strings.TrimRight(line, "\n"), true
		}
	}
	return word + " " + none, true
}
