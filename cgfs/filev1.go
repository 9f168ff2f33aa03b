package cgfs

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/bits"
	"os"
	"strconv"
	"strings"
)

// What files of v1 mean on v2: their values as v1's kernel takes and shows
// them, to and from v2's files.

var pageSize = uint64(os.Getpagesize())

// fileLimit parses a limit as both versions take it in a control file: a
// number, with K, M, G, T, P or E of either case for powers of 1024
// (lib/cmdline.c, memparse), or what stands for no limit.
func fileLimit(value, none string) (uint64, error) {
	if value == none {
		return unlimited, nil
	}
	digits, shift := value, 0
	if value != "" {
		if i := strings.IndexByte("KMGTPE", value[len(value)-1]&^0x20); i >= 0 {
			digits, shift = value[:len(value)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	// A leading 0 would be octal to the kernel.
	if err != nil || bits.Len64(n)+shift > 64 || len(digits) > 1 && digits[0] == '0' {
		return 0, badValue(value, "bytes, with K, M, G or T for powers of 1024, or "+none)
	}
	if n <<= shift; n >= noLimit {
		return unlimited, nil
	}
	return n, nil
}

// setAs is set with a limit as a control file takes it.
func setAs(none string, set func(*Set, string, Reader) ([]Write, error)) func(*Set, string, Reader) ([]Write, error) {
	return func(s *Set, value string, read Reader) ([]Write, error) {
		n, err := fileLimit(value, none)
		if err != nil {
			return nil, err
		}
		return set(s, show2(n), read)
	}
}

// getLimit1 reads a limit of v2 as v1 shows it, where none is the greatest
// int64 rounded down to unit, a power of 2.
func getLimit1(controller, file string, unit uint64) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		n, err := readLimit(read, controller, file)
		return shown1(n, unit), err
	}
}

func shown1(n, unit uint64) string {
	if n == unlimited {
		n = math.MaxInt64 &^ (unit - 1)
	}
	return strconv.FormatUint(n, 10)
}

// translateLimit is a limit under its other name.
func translateLimit(controller, file string, toV2 bool) *binding {
	if toV2 {
		return &binding{controller, file, setAs("-1", setLimit(file, show2)), getLimit1(controller, file, pageSize)}
	}
	return &binding{controller, file, setAs("max", setLimit(file, show1)), func(_ *Set, read Reader) (string, error) {
		n, err := readLimit(read, controller, file)
		return show2(n), err
	}}
}

// ---- memory

// readSwap2 reads the limits of memory and of swap. Without swap accounting
// ok is false.
func readSwap2(read Reader) (memory, swap uint64, ok bool, err error) {
	if memory, err = readLimit(read, "memory", "memory.max"); err != nil {
		return 0, 0, false, err
	}
	content, ok, err := optional(read, "memory", "memory.swap.max")
	if err != nil || !ok {
		return memory, unlimited, false, err
	}
	swap, err = limitOf(content)
	return memory, swap, true, err
}

// setMemory2 sets memory.limit_in_bytes. On v1 memory.memsw.limit_in_bytes
// stays as it is and is never below it, so that swap gets what is left.
func setMemory2(_ *Set, value string, read Reader) ([]Write, error) {
	n, err := fileLimit(value, "-1")
	if err != nil {
		return nil, err
	}
	old, swap, ok, err := readSwap2(read)
	if err != nil {
		return nil, err
	}
	limit := Write{File: "memory.max", Value: show2(n)}
	both := sum(old, swap)
	// Of two in one request the order does not matter, as on v1.
	if v, asked, err := optional(read, "memory", memsw1); err != nil {
		return nil, err
	} else if asked {
		if both, err = fileLimit(v, "-1"); err != nil {
			return nil, err
		}
	}
	if !ok || both == unlimited {
		return []Write{limit}, nil
	}
	if n > both {
		return nil, fmt.Errorf("%w %q: above memory.memsw.limit_in_bytes, which must be raised first", ErrValue, value)
	}
	return []Write{limit, {File: "memory.swap.max", Value: show2(both - n)}}, nil
}

func setMemsw2(_ *Set, value string, read Reader) ([]Write, error) {
	n, err := fileLimit(value, "-1")
	if err != nil {
		return nil, err
	}
	limit, _, ok, err := readSwap2(read)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errNoSwap
	}
	if n != unlimited {
		if limit > n {
			return nil, fmt.Errorf("%w %q: below memory.limit_in_bytes, which must be lowered first", ErrValue, value)
		}
		n -= limit
	}
	return []Write{{File: "memory.swap.max", Value: show2(n)}}, nil
}

func getMemsw2(_ *Set, read Reader) (string, error) {
	memory, swap, ok, err := readSwap2(read)
	if err == nil && !ok {
		err = errNoSwap
	}
	return shown1(sum(memory, swap), pageSize), err
}

func getMemswUsage2(_ *Set, read Reader) (string, error) {
	var total uint64
	for _, file := range []string{"memory.current", "memory.swap.current"} {
		n, err := readLimit(read, "memory", file)
		if err != nil {
			return "", err
		}
		total += n
	}
	return strconv.FormatUint(total, 10), nil
}

// LimitsInEffect is what a Reader is asked for where the limits of the cgroups
// above count too, as they do in v1's memory.stat.
const LimitsInEffect = "limits in effect"

// LimitsInEffect returns the least limit of d and of those above: a line
// "memory_limit N", and with swap accounting "memsw_limit N", as v1 shows them.
func (d *Dir) LimitsInEffect() (string, error) {
	memory, both, swaps := uint64(unlimited), uint64(unlimited), false
	for path := d.path; path != "/"; path = path[:max(strings.LastIndexByte(path, '/'), 1)] {
		at, err := d.h.Open(path)
		if err != nil {
			return "", err
		}
		m, s, ok, err := readSwap2(func(_, file string) (string, error) {
			b, err := at.read(file, maxValue)
			return string(b), err
		})
		_ = at.Close()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was not given the controller
		}
		if err != nil {
			return "", err
		}
		memory, both, swaps = min(memory, m), min(both, sum(m, s)), swaps || ok
	}
	out := "memory_limit " + shown1(memory, pageSize) + "\n"
	if swaps {
		out += "memsw_limit " + shown1(both, pageSize) + "\n"
	}
	return out, nil
}

// memoryStats are the fields of v1's memory.stat in its order, each with v2's;
// swap is in a file of its own there, and of pages paged in and out there is
// nothing.
var memoryStats = []struct{ v1, v2 string }{
	{"cache", "file"},
	{"rss", "anon"},
	{"rss_huge", "anon_thp"},
	{"shmem", "shmem"},
	{"mapped_file", "file_mapped"},
	{"dirty", "file_dirty"},
	{"writeback", "file_writeback"},
	{"workingset_refault_anon", "workingset_refault_anon"},
	{"workingset_refault_file", "workingset_refault_file"},
	{"swap", ""},
	{"swapcached", "swapcached"},
	{"pgfault", "pgfault"},
	{"pgmajfault", "pgmajfault"},
	{"inactive_anon", "inactive_anon"},
	{"active_anon", "active_anon"},
	{"inactive_file", "inactive_file"},
	{"active_file", "active_file"},
	{"unevictable", "unevictable"},
}

func getMemoryStat2(_ *Set, read Reader) (string, error) {
	stat, err := read("memory", "memory.stat")
	if err != nil {
		return "", err
	}
	swap, hasSwap, err := optional(read, "memory", "memory.swap.current")
	if err != nil {
		return "", err
	}
	var own, total strings.Builder
	for _, f := range memoryStats {
		v, ok := strings.TrimSpace(swap), hasSwap
		if f.v2 != "" {
			v, ok = flatKeyed(stat, f.v2)
		}
		if ok {
			fmt.Fprintf(&own, "%s %s\n", f.v1, v)
			fmt.Fprintf(&total, "total_%s %s\n", f.v1, v)
		}
	}
	limits, err := read("memory", LimitsInEffect)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(limits) {
		fmt.Fprintf(&own, "hierarchical_%s", line)
	}
	return own.String() + strings.TrimSuffix(total.String(), "\n"), nil
}

// getNumaStat2 counts in pages, as v1 does, and by its kinds.
func getNumaStat2(_ *Set, read Reader) (string, error) {
	stat, err := read("memory", "memory.numa_stat")
	if err != nil {
		return "", err
	}
	var nodes []string // N0, N1, ...
	pages := map[string]map[string]uint64{"total": {}, "file": {}, "anon": {}, "unevictable": {}}
	for line := range strings.Lines(stat) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		_, kind, _ := strings.Cut(fields[0], "active_") // inactive_anon, active_anon
		if fields[0] == "unevictable" {
			kind = fields[0]
		}
		if kind == "" {
			continue
		}
		first := len(nodes) == 0
		for _, f := range fields[1:] {
			node, v, _ := strings.Cut(f, "=")
			n, err := limitOf(v)
			if err != nil {
				return "", err
			}
			if first {
				nodes = append(nodes, node)
			}
			pages[kind][node] += n / pageSize
			pages["total"][node] += n / pageSize
		}
	}
	var out []string
	for _, prefix := range []string{"", "hierarchical_"} {
		for _, kind := range []string{"total", "file", "anon", "unevictable"} {
			var all uint64
			var each strings.Builder
			for _, node := range nodes {
				all += pages[kind][node]
				fmt.Fprintf(&each, " %s=%d", node, pages[kind][node])
			}
			out = append(out, fmt.Sprintf("%s%s=%d%s", prefix, kind, all, each.String()))
		}
	}
	return strings.Join(out, "\n"), nil
}

// getOOMControl2 does not read memory.events.local, which counts where the task
// was: in a divided cgroup in its hidden leaf.
func getOOMControl2(s *Set, read Reader) (string, error) {
	n, err := readEvent("memory", "memory.events", "oom_kill").get(s, read)
	return "oom_kill_disable 0\nunder_oom 0\noom_kill " + n, err
}

// ---- cpu

// setShares2 takes any number, as v1 does, which keeps it between 2 and 262144.
func setShares2(_ *Set, value string, _ Reader) ([]Write, error) {
	n, err := number(value, 0, math.MaxUint64)
	if err != nil {
		return nil, err
	}
	return []Write{{File: "cpu.weight", Value: strconv.FormatUint(sharesToWeight(n), 10)}}, nil
}

func setQuota2(_ *Set, value string, read Reader) ([]Write, error) {
	_, period, err := quota2{}.read(read)
	if err != nil {
		return nil, err
	}
	if value == "-1" {
		return quota2{}.writes(unlimited, period), nil
	}
	us, err := number(value, minQuota, maxPeriod*maxCPUs)
	if err != nil {
		return nil, err
	}
	return quota2{}.writes(us, period), nil
}

func setPeriod2(_ *Set, value string, read Reader) ([]Write, error) {
	us, _, err := quota2{}.read(read)
	if err != nil {
		return nil, err
	}
	period, err := number(value, minQuota, maxPeriod)
	if err != nil {
		return nil, err
	}
	return quota2{}.writes(us, period), nil
}

// getMax2 reads the quota (0) or the period (1) of cpu.max as v1 shows them.
func getMax2(field int) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		us, period, err := quota2{}.read(read)
		return show1([]uint64{us, period}[field]), err
	}
}

// getThrottled2 shows what the controller cpu counts.
func getThrottled2(_ *Set, read Reader) (string, error) {
	stat, err := read("cpu", "cpu.stat")
	if err != nil {
		return "", err
	}
	var out []string
	for _, f := range []struct {
		v1, v2 string
		unit   uint64
	}{
		{"nr_periods", "nr_periods", 1},
		{"nr_throttled", "nr_throttled", 1},
		{"throttled_time", "throttled_usec", 1000},
		{"nr_bursts", "nr_bursts", 1},
		{"burst_time", "burst_usec", 1000},
	} {
		v, ok := flatKeyed(stat, f.v2)
		if !ok {
			continue // the controller is not enabled here, or the kernel is older
		}
		n, err := limitOf(v)
		if err != nil {
			return "", err
		}
		out = append(out, fmt.Sprintf("%s %d", f.v1, n*f.unit))
	}
	return strings.Join(out, "\n"), nil
}

// readNanos reads a time of cpu.stat, in nanoseconds.
func readNanos(key string) *binding {
	b := readEvent("", "cpu.stat", key)
	micros := b.get
	b.get = func(s *Set, read Reader) (string, error) {
		v, err := micros(s, read)
		if err != nil {
			return "", err
		}
		n, err := limitOf(v)
		return strconv.FormatUint(n*1000, 10), err
	}
	return b
}

// ---- freezer

func setFreezerState2(s *Set, value string, read Reader) ([]Write, error) {
	if value != "FROZEN" && value != "THAWED" {
		return nil, badValue(value, "FROZEN or THAWED")
	}
	return setState("cgroup.freeze", "1", "0")(s, strings.ToLower(value), read)
}

func getFreezerState2(s *Set, read Reader) (string, error) {
	v, err := getState2(s, read)
	return strings.ToUpper(v), err
}

func getParentFreezing2(s *Set, read Reader) (string, error) {
	frozen, err := readEvent("", "cgroup.events", "frozen").get(s, read)
	if err != nil {
		return "", err
	}
	self, err := read("", "cgroup.freeze")
	if frozen == "1" && strings.TrimSpace(self) == "0" {
		return "1", err
	}
	return "0", err
}

// ---- block devices

// weightScale is how weights of a file of v1 show in those of v2.
type weightScale struct {
	low, high uint64
	toIO      func(uint64) uint64
	fromIO    func(uint64) uint64
}

var (
	// weightOfBFQ: io.weight's default is the same.
	weightOfBFQ = weightScale{1, 1000, func(w uint64) uint64 { return w }, func(w uint64) uint64 { return min(w, 1000) }}
	// weightOfCFQ: a scheduler of Linux before 5.0, whose range is stretched.
	weightOfCFQ = weightScale{
		10, 1000, func(w uint64) uint64 { return 1 + (w-10)*9999/990 },
		func(w uint64) uint64 { return 10 + (w*990-990+9998)/9999 },
	}
)

func (ws weightScale) parse(value string) (uint64, error) { return number(value, ws.low, ws.high) }

// in converts a weight for a file of v2.
func (ws weightScale) in(f weightFile, n uint64) string {
	if f.all == "io.weight" {
		n = ws.toIO(n)
	}
	return strconv.FormatUint(n, 10)
}

// out converts a weight that a file of v2 shows.
func (ws weightScale) out(f weightFile, shown string) (string, error) {
	n, err := limitOf(shown)
	if f.all == "io.weight" {
		n = ws.fromIO(n)
	}
	return strconv.FormatUint(n, 10), err
}

func setBlkioWeight2(scale weightScale) func(*Set, string, Reader) ([]Write, error) {
	return func(s *Set, value string, read Reader) ([]Write, error) {
		n, err := scale.parse(value)
		if err != nil {
			return nil, err
		}
		fs, _, err := s.presentWeights(read, allFile)
		if err != nil {
			return nil, err
		}
		var ws []Write
		for _, f := range fs {
			ws = append(ws, Write{File: f.all, Value: "default " + scale.in(f, n)})
		}
		return ws, nil
	}
}

func getBlkioWeight2(scale weightScale) func(*Set, Reader) (string, error) {
	return func(s *Set, read Reader) (string, error) {
		fs, contents, err := s.presentWeights(read, allFile)
		if err != nil {
			return "", err
		}
		i := len(fs) - 1 // BFQ's, if there is one
		v, _ := flatKeyed(contents[i], "default")
		return scale.out(fs[i], v)
	}
}

func setBlkioWeightDevice2(scale weightScale) func(*Set, string, Reader) ([]Write, error) {
	return func(s *Set, value string, read Reader) ([]Write, error) {
		device, v, err := deviceItem(value)
		if err != nil {
			return nil, err
		}
		var n uint64
		if v != "0" && v != "default" { // both take it away
			if n, err = scale.parse(v); err != nil {
				return nil, err
			}
		}
		fs, _, err := s.presentWeights(read, deviceFile)
		if err != nil {
			return nil, err
		}
		var ws []Write
		for _, f := range fs {
			v := "default"
			if n > 0 {
				v = scale.in(f, n)
			}
			ws = append(ws, Write{File: f.device, Value: device + " " + v})
		}
		return ws, nil
	}
}

func getBlkioWeightDevice2(scale weightScale) func(*Set, Reader) (string, error) {
	return func(s *Set, read Reader) (string, error) {
		fs, contents, err := s.presentWeights(read, deviceFile)
		if err != nil {
			return "", err
		}
		i := len(fs) - 1
		var out []string
		for line := range strings.Lines(contents[i]) {
			device, shown, _ := strings.Cut(strings.TrimSpace(line), " ")
			if device == "default" || device == "" {
				continue
			}
			v, err := scale.out(fs[i], shown)
			if err != nil {
				return "", err
			}
			out = append(out, device+" "+v)
		}
		return strings.Join(out, "\n"), nil
	}
}

// setThrottle1 takes v1's values to io.max: 0 is no limit there.
func setThrottle1(sub string) func(*Set, string, Reader) ([]Write, error) {
	return func(_ *Set, value string, _ Reader) ([]Write, error) {
		device, v, err := deviceItem(value)
		if err != nil {
			return nil, err
		}
		n, err := number(v, 0, math.MaxUint64-1)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			n = unlimited
		}
		return []Write{{File: "io.max", Value: device + " " + sub + "=" + show2(n)}}, nil
	}
}

func getThrottle1(sub string) func(*Set, Reader) (string, error) {
	items := getThrottle("io", "io.max", sub)
	return func(s *Set, read Reader) (string, error) {
		v, err := items(s, read)
		return strings.ReplaceAll(v, ",", "\n"), err
	}
}

// getServiced2 shows the bytes or the operations ("ios") of io.stat.
func getServiced2(unit string) func(*Set, Reader) (string, error) {
	return func(_ *Set, read Reader) (string, error) {
		stat, err := read("io", "io.stat")
		if err != nil {
			return "", err
		}
		var out strings.Builder
		var all uint64
		for line := range strings.Lines(stat) {
			fields := strings.Fields(line)
			var total uint64
			found := false
			for _, dir := range []string{"Read", "Write", "Discard"} {
				for _, f := range fields {
					v, ok := strings.CutPrefix(f, strings.ToLower(dir[:1])+unit+"=")
					if !ok {
						continue
					}
					n, err := limitOf(v)
					if err != nil {
						return "", err
					}
					fmt.Fprintf(&out, "%s %s %d\n", fields[0], dir, n)
					total, found = total+n, true
				}
			}
			if found {
				fmt.Fprintf(&out, "%s Total %d\n", fields[0], total)
				all += total
			}
		}
		return fmt.Sprintf("%sTotal %d", out.String(), all), nil
	}
}
