package cgfs

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// What files of v2 mean on v1: the other way round.

func getSwapUsage1(_ *Set, read Reader) (string, error) {
	both, ok, err := optional(read, "memory", "memory.memsw.usage_in_bytes")
	if err != nil {
		return "", err
	}
	if !ok {
		return "", errNoSwap
	}
	n, err := limitOf(both)
	if err != nil {
		return "", err
	}
	memory, err := readLimit(read, "memory", "memory.usage_in_bytes")
	return strconv.FormatUint(n-min(memory, n), 10), err
}

func getEvents1(_ *Set, read Reader) (string, error) {
	failed, err := read("memory", "memory.failcnt")
	if err != nil {
		return "", err
	}
	oom, err := read("memory", "memory.oom_control")
	if err != nil {
		return "", err
	}
	out := "max " + strings.TrimSpace(failed)
	if v, ok := flatKeyed(oom, "oom_kill"); ok {
		out += "\noom_kill " + v
	}
	return out, nil
}

func getSwapEvents1(_ *Set, read Reader) (string, error) {
	v, ok, err := optional(read, "memory", "memory.memsw.failcnt")
	if err == nil && !ok {
		err = errNoSwap
	}
	return "max " + v, err
}

// getMemoryStat1 shows v1's fields that count the cgroups below, as v2's do.
func getMemoryStat1(_ *Set, read Reader) (string, error) {
	stat, err := read("memory", "memory.stat")
	if err != nil {
		return "", err
	}
	var out []string
	for _, f := range memoryStats {
		if v, ok := flatKeyed(stat, "total_"+f.v1); ok && f.v2 != "" {
			out = append(out, f.v2+" "+v)
		}
	}
	return strings.Join(out, "\n"), nil
}

func setConverted(file string, low, high uint64, convert func(uint64) uint64) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		n, err := number(value, low, high)
		if err != nil {
			return nil, err
		}
		return []Write{{File: file, Value: strconv.FormatUint(convert(n), 10)}}, nil
	}
}

func getConverted(controller, file string, convert func(uint64) uint64) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		n, err := readLimit(read, controller, file)
		return strconv.FormatUint(convert(n), 10), err
	}
}

func setMax1(_ *Set, value string, _ Reader) ([]Write, error) {
	first, second, two := strings.Cut(value, " ")
	us := uint64(unlimited)
	var err error
	if first != "max" {
		if us, err = number(first, minQuota, maxPeriod*maxCPUs); err != nil {
			return nil, err
		}
	}
	ws := quota1{}.writes(us, 0)
	if two {
		period, err := number(second, minQuota, maxPeriod)
		if err != nil {
			return nil, err
		}
		ws = append(ws, Write{File: "cpu.cfs_period_us", Value: show1(period)})
	}
	return ws, nil
}

func getMax1(_ *Set, read Reader) (string, error) {
	us, period, err := quota1{}.read(read)
	return show2(us) + " " + show2(period), err
}

func getCPUStat1(_ *Set, read Reader) (string, error) {
	var out []string
	for _, f := range []struct{ v2, controller, file, key string }{
		{"usage_usec", "cpuacct", "cpuacct.usage", ""},
		{"user_usec", "cpuacct", "cpuacct.usage_user", ""},
		{"system_usec", "cpuacct", "cpuacct.usage_sys", ""},
		{"nr_periods", "cpu", "cpu.stat", "nr_periods"},
		{"nr_throttled", "cpu", "cpu.stat", "nr_throttled"},
		{"throttled_usec", "cpu", "cpu.stat", "throttled_time"},
		{"nr_bursts", "cpu", "cpu.stat", "nr_bursts"},
		{"burst_usec", "cpu", "cpu.stat", "burst_time"},
	} {
		v, err := read(f.controller, f.file)
		if err != nil {
			return "", err
		}
		if f.key != "" {
			var ok bool
			if v, ok = flatKeyed(v, f.key); !ok {
				continue // this kernel is older
			}
		}
		n, err := limitOf(v)
		if err != nil {
			return "", err
		}
		if strings.HasSuffix(f.v2, "_usec") {
			n /= 1000
		}
		out = append(out, fmt.Sprintf("%s %d", f.v2, n))
	}
	return strings.Join(out, "\n"), nil
}

func setFreeze1(_ *Set, value string, _ Reader) ([]Write, error) {
	state, ok := map[string]string{"0": "THAWED", "1": "FROZEN"}[value]
	if !ok {
		return nil, badValue(value, "0 or 1")
	}
	return []Write{{Controller: "freezer", File: "freezer.state", Value: state}}, nil
}

func getEventsFrozen1(s *Set, read Reader) (string, error) {
	state, err := getState1(s, read)
	if state == "frozen" {
		return "frozen 1", err
	}
	return "frozen 0", err
}

func getHugeEvents1(file string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		v, err := read("hugetlb", file)
		return "max " + strings.TrimSpace(v), err
	}
}

// ---- block devices

// throttleSubs are the keys of io.max, in the order of throttleFiles.
var throttleSubs = []string{"rbps", "wbps", "riops", "wiops"}

// setIOMax1 takes "8:0 rbps=1048576 wiops=max" apart.
func setIOMax1(_ *Set, value string, _ Reader) ([]Write, error) {
	device, limits, err := deviceItem(value)
	if err != nil {
		return nil, err
	}
	var ws []Write
	for kv := range strings.FieldsSeq(limits) {
		sub, v, _ := strings.Cut(kv, "=")
		i := slices.Index(throttleSubs, sub)
		if i < 0 {
			return nil, badValue(kv, "one of rbps=, wbps=, riops=, wiops= and a number or max")
		}
		n := uint64(0)
		if v != "max" {
			if n, err = number(v, 1, unlimited-1); err != nil {
				return nil, err
			}
		}
		ws = append(ws, Write{File: throttleFiles[i], Value: fmt.Sprintf("%s %d", device, n)})
	}
	return ws, nil
}

func getIOMax1(_ *Set, read Reader) (string, error) {
	var devices []string
	limits := map[string][]string{}
	for i, file := range throttleFiles {
		content, err := read("blkio", file)
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(content) {
			device, v, ok := strings.Cut(strings.TrimSpace(line), " ")
			if !ok {
				continue
			}
			if limits[device] == nil {
				devices = append(devices, device)
				limits[device] = []string{"max", "max", "max", "max"}
			}
			limits[device][i] = v
		}
	}
	var out []string
	for _, device := range devices {
		line := []string{device}
		for i, v := range limits[device] {
			line = append(line, throttleSubs[i]+"="+v)
		}
		out = append(out, strings.Join(line, " "))
	}
	return strings.Join(out, "\n"), nil
}

// setIOWeight1 takes "100", "default 100" and "8:0 100" to BFQ's files.
func setIOWeight1(s *Set, value string, read Reader) ([]Write, error) {
	key, v, two := strings.Cut(value, " ")
	switch {
	case !two:
		return setWeight(s, key, read)
	case key == "default":
		return setWeight(s, v, read)
	}
	return setWeightDevice(s, value, read)
}

func getIOWeight1(s *Set, read Reader) (string, error) {
	all, err := getWeight(s, read)
	if err != nil {
		return "", err
	}
	devices, err := getWeightDevice(s, read)
	if err != nil || devices == "" {
		return "default " + all, err
	}
	return "default " + all + "\n" + strings.ReplaceAll(devices, ",", "\n"), nil
}

// getIOStat1 puts the counts of a device into one line.
func getIOStat1(_ *Set, read Reader) (string, error) {
	var devices []string
	counts := map[string]map[string]string{}
	for file, unit := range map[string]string{
		"blkio.throttle.io_service_bytes_recursive": "bytes",
		"blkio.throttle.io_serviced_recursive":      "ios",
	} {
		content, err := read("blkio", file)
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(content) {
			f := strings.Fields(line)
			if len(f) != 3 {
				continue // the sum of all devices
			}
			if counts[f[0]] == nil {
				devices = append(devices, f[0])
				counts[f[0]] = map[string]string{}
			}
			counts[f[0]][strings.ToLower(f[1][:1])+unit] = f[2]
		}
	}
	slices.Sort(devices)
	var out []string
	for _, device := range devices {
		line := []string{device}
		for _, key := range []string{"rbytes", "wbytes", "rios", "wios", "dbytes", "dios"} {
			if v, ok := counts[device][key]; ok {
				line = append(line, key+"="+v)
			}
		}
		out = append(out, strings.Join(line, " "))
	}
	return strings.Join(out, "\n"), nil
}
