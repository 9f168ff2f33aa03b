package cgfs

import (
	"fmt"
	"strings"
)

// mount is what matters here of a line of /proc/PID/mountinfo
// (proc_pid_mountinfo(5)).
type mount struct {
	fstype  string
	options []string // of the superblock: rw, controllers, name=X
}

// parseMountinfo returns the mounts of type cgroup and cgroup2.
func parseMountinfo(data string) ([]mount, error) {
	var ms []mount
	n := 0
	for line := range strings.Lines(data) {
		n++
		// Optional fields end with a lone "-", then come the type, the
		// source and the superblock's options. No field holds a space: the
		// kernel escapes those.
		_, rest, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		f := strings.Split(rest, " ")
		if !ok || len(f) < 3 {
			return nil, fmt.Errorf("mountinfo line %d: malformed", n)
		}
		if f[0] == "cgroup" || f[0] == "cgroup2" {
			ms = append(ms, mount{fstype: f[0], options: strings.Split(f[len(f)-1], ",")})
		}
	}
	return ms, nil
}
