package identity

import (
	"bytes"
	"strconv"

	"golang.org/x/sys/unix"
)

// RLimits are resource limits of a process (getrlimit(2)), by the kernel's numbers of
// them: RLIMIT_RTPRIO, RLIMIT_NICE, RLIMIT_MEMLOCK in bytes, RLIMIT_RTTIME in
// microseconds.
type RLimits map[int]unix.Rlimit

// rlimitNames are the names that /proc/PID/limits has for them.
var rlimitNames = map[string]int{
	"Max realtime priority": unix.RLIMIT_RTPRIO,
	"Max nice priority":     unix.RLIMIT_NICE,
	"Max locked memory":     unix.RLIMIT_MEMLOCK,
	"Max realtime timeout":  unix.RLIMIT_RTTIME,
}

// ParseRLimits parses a /proc/PID/limits (proc_pid_limits(5)). The limits that it
// returns are all there.
func ParseRLimits(b []byte) (RLimits, error) {
	// "Max cpu time              unlimited            unlimited            seconds"
	const name, column = 26, 21
	ls := make(RLimits, len(rlimitNames))
	for line := range bytes.Lines(b) {
		if len(line) < name+2*column {
			continue
		}
		number, ok := rlimitNames[string(bytes.TrimSpace(line[:name]))]
		if !ok {
			continue
		}
		soft, err := parseRLimit(line[name : name+column])
		if err != nil {
			return nil, err
		}
		hard, err := parseRLimit(line[name+column : name+2*column])
		if err != nil {
			return nil, err
		}
		ls[number] = unix.Rlimit{Cur: soft, Max: hard}
	}
	if len(ls) != len(rlimitNames) {
		return nil, errMalformed
	}
	return ls, nil
}

func parseRLimit(b []byte) (uint64, error) {
	s := string(bytes.TrimSpace(b))
	if s == "unlimited" {
		return unix.RLIM_INFINITY, nil
	}
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, errMalformed
	}
	return v, nil
}

// RLimits reads the process's limits. prlimit(2) would need a capability that the
// daemon may lack.
func (p *Process) RLimits() (RLimits, error) {
	b, err := p.read("limits")
	if err != nil {
		return nil, err
	}
	return ParseRLimits(b)
}
