package cgfs

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"strconv"
	"strings"
)

// Write is one write to a control file.
type Write struct {
	// Controller has the file, in whichever hierarchy; "" is a core file of
	// the v2 hierarchy.
	Controller, File, Value string
	// Final: the write cannot be taken back (device rules, state), or what it
	// did cannot (a limit that reclaims or kills). Such writes come last.
	Final bool
}

// Reader reads a control file of the cgroup in question, in the hierarchy of
// controller ("" for a core file of v2). Trailing newlines do not matter. For
// a file that does not exist it must return an error wrapping fs.ErrNotExist.
// LimitsInEffect, which is no file, is what Dir.LimitsInEffect returns.
type Reader func(controller, file string) (string, error)

// Key is a key of the interface CGManager1: an abstract one, the same on every
// host, or a control file's own name, which the other version spells
// differently.
type Key struct {
	Name string
	// ReadOnly: the key can be read alone.
	ReadOnly bool

	// file is the version whose control file has this name; 0 for an abstract
	// key.
	file   Version
	doc    string // the value, or a file's conversion, for docs/KEYS.md
	source string // where that comes from
	v1, v2 *binding
}

// binding is a key on one version of the interface. It has the files that are
// written or read, for the documentation, and the translation both ways.
type binding struct {
	controller string
	files      string
	set        func(s *Set, value string, read Reader) ([]Write, error)
	get        func(s *Set, read Reader) (string, error)
}

// FindKey finds a key by name: an abstract one, or a control file's that the
// hosts of the other version do not have as it is. A name that both versions
// have with different content means v2's file.
func FindKey(name string) (*Key, bool) {
	if k, ok := byName[name]; ok {
		return k, true
	}
	return FindFile(name, V2)
}

// FindFile finds the key of a control file's own name, as FindKey does. A name
// that both versions have means the file of version own.
func FindFile(name string, own Version) (*Key, bool) {
	for _, v := range []Version{own, V1 + V2 - own} {
		if k, ok := byFile[v][name]; ok {
			return k, true
		}
	}
	return hugeFileKey(name)
}

// IsFile reports whether the key is a control file's own name.
func (k *Key) IsFile() bool { return k.file != 0 }

// Translated reports whether on a host where the key lives in h it is something
// else than the control file of its name.
func (k *Key) Translated(h *Hierarchy) bool { return k.file != h.version }

var byName = func() map[string]*Key {
	m := make(map[string]*Key)
	for _, k := range abstractKeys {
		m[k.Name] = k
	}
	return m
}()

var byFile = func() map[Version]map[string]*Key {
	m := map[Version]map[string]*Key{V1: {}, V2: {}}
	for _, k := range fileKeys {
		m[k.file][k.Name] = k
	}
	return m
}()

// binding picks the version of a key for this host: that of the hierarchy
// which has the controller.
func (s *Set) binding(k *Key) (*Hierarchy, *binding, error) {
	for _, c := range []struct {
		b *binding
		v Version
	}{{k.v1, V1}, {k.v2, V2}} {
		if c.b == nil {
			continue
		}
		h, ok := s.ByController(c.b.controller)
		if c.b.controller == "" {
			h, ok = s.core(c.v)
		}
		if ok && h.version == c.v {
			return h, c.b, nil
		}
	}
	return nil, nil, fmt.Errorf("key %s: %w: needs %s", k.Name, ErrUnsupported, k.needs())
}

// core returns the hierarchy whose core files are meant where no controller is
// named: on v1, where all have the same, the first.
func (s *Set) core(v Version) (*Hierarchy, bool) {
	for _, h := range s.hierarchies {
		if h.version == v && !h.named {
			return h, true
		}
	}
	return nil, false
}

// needs says on which hosts a key works.
func (k *Key) needs() string {
	var hosts []string
	add := func(b *binding, version string) {
		switch {
		case b == nil:
		case b.controller == "":
			hosts = append(hosts, "cgroup "+version)
		default:
			hosts = append(hosts, "the controller "+b.controller+" on cgroup "+version)
		}
	}
	add(k.v1, "v1")
	add(k.v2, "v2")
	return strings.Join(hosts, " or ")
}

// KeyHierarchy returns the hierarchy that a key lives in on this host and its
// controller there, "" for the core of v2. It returns an error wrapping
// ErrUnsupported if there is none.
func (s *Set) KeyHierarchy(k *Key) (*Hierarchy, string, error) {
	h, b, err := s.binding(k)
	if err != nil {
		return nil, "", err
	}
	return h, b.controller, nil
}

// V1Controller returns the controller that the key has on v1, or "": also of a
// key that v2 has in its core.
func (k *Key) V1Controller() string {
	if k.v1 == nil {
		return ""
	}
	return k.v1.controller
}

// Writes checks a value and returns the writes that set it, in their order.
// It returns an error wrapping ErrValue if the value is malformed, one
// wrapping ErrUnsupported if this host cannot do it, and those of read.
func (k *Key) Writes(s *Set, value string, read Reader) ([]Write, error) {
	_, b, err := s.binding(k)
	if err != nil {
		return nil, err
	}
	if k.ReadOnly || b.set == nil {
		if k.file != 0 {
			return nil, fmt.Errorf("key %s: %w: read only but on cgroup v%d", k.Name, ErrUnsupported, k.file)
		}
		return nil, fmt.Errorf("key %s: %w: read only", k.Name, ErrUnsupported)
	}
	if k.file != 0 {
		value = strings.TrimSpace(value) // as the kernel does
	}
	ws, err := b.set(s, value, read)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", k.Name, err)
	}
	for i := range ws {
		if ws[i].Controller == "" {
			ws[i].Controller = b.controller
		}
		ws[i].Final = Final(ws[i].File)
	}
	for _, p := range pairs {
		if err := p.arrange(ws, read); err != nil {
			return nil, fmt.Errorf("key %s: %w", k.Name, err)
		}
	}
	return ws, nil
}

// Value reads a key's value, in the form in which it is set.
func (k *Key) Value(s *Set, read Reader) (string, error) {
	_, b, err := s.binding(k)
	if err != nil {
		return "", err
	}
	v, err := b.get(s, read)
	if err != nil {
		return "", fmt.Errorf("key %s: %w", k.Name, err)
	}
	return v, nil
}

// ValidFile checks the name of a control file: one component, which can be
// shown to anybody. It returns an error wrapping ErrName.
func ValidFile(name string) error {
	if err := checkFile(name); err != nil {
		return err
	}
	if !presentable(name) {
		return fmt.Errorf("%w %q: not UTF-8, or a control character in it", ErrName, name)
	}
	return nil
}

// ControllerOf returns the controller to which the kernel's control file
// belongs, "" for cgroup.* and the other files of the core.
func ControllerOf(file string) string {
	prefix, _, ok := strings.Cut(file, ".")
	if !ok || prefix == "cgroup" || prefix == "irq" { // irq.pressure has no controller
		return ""
	}
	return prefix
}

// finals are the files of which a write cannot be taken back, or not what it
// did. The value tells whether the file can at least read as before.
var finals = map[string]bool{
	// An older rule may have covered the same device.
	"devices.allow": false, "devices.deny": false,
	// The tasks missed time, or had it.
	"freezer.state": true, "cgroup.freeze": true,
	// A lower limit reclaims, and v2's kills.
	"memory.limit_in_bytes": true, "memory.memsw.limit_in_bytes": true,
	"memory.kmem.limit_in_bytes": true, "memory.kmem.tcp.limit_in_bytes": true,
	"memory.max": true, "memory.high": true,
	"memory.swap.max": true, "memory.swap.high": true, "memory.zswap.max": true,
	"memory.force_empty": false, "memory.reclaim": false,
	"cgroup.kill": false, "cgroup.type": false,
	// Any write starts the count afresh.
	"memory.max_usage_in_bytes": false, "memory.failcnt": false,
	"memory.memsw.max_usage_in_bytes": false, "memory.memsw.failcnt": false,
	"memory.kmem.max_usage_in_bytes": false, "memory.kmem.failcnt": false,
	"memory.kmem.tcp.max_usage_in_bytes": false, "memory.kmem.tcp.failcnt": false,
	"memory.peak": false, "memory.swap.peak": false,
	"blkio.reset_stats": false, "cpuacct.usage": false,
}

// final finds a file in finals.
func final(file string) (restorable, ok bool) {
	if strings.HasPrefix(file, "hugetlb.") &&
		(strings.HasSuffix(file, ".failcnt") || strings.HasSuffix(file, ".max_usage_in_bytes")) {
		return false, true
	}
	restorable, ok = finals[file]
	return restorable, ok
}

// Final reports whether a write to the kernel's file cannot be taken back, or
// what it did cannot.
func Final(file string) bool {
	_, ok := final(file)
	return ok
}

// Readable reports whether a file shows what was written to it, and so whether
// it is of use to read it first.
func Readable(file string) bool {
	switch file {
	case "devices.allow", "devices.deny", "memory.force_empty", "memory.reclaim",
		"blkio.reset_stats", "cgroup.kill", "cgroup.event_control":
		return false
	}
	return true
}

// Restore returns what has to be written to file, to which value was or will
// be written, so that it reads old again; false if that is not possible.
func Restore(file, value, old string) (string, bool) {
	if restorable, ok := final(file); !Readable(file) || ok && !restorable {
		return "", false
	}
	old = strings.TrimRight(old, "\n")
	if unset, keyed := keyedFiles[file]; keyed {
		return restoreLine(unset, value, old)
	}
	switch {
	case strings.Contains(old, "\n"):
		return "", false
	case old == "":
		return "\n", true // cpuset.cpus; a write of no bytes would not reach it
	case file == "freezer.state" && old == "FREEZING":
		return "FROZEN", true
	}
	return old, true
}

// keyedFiles hold a line for each device or interface, of which a write
// changes one. The value here is what takes a line away.
var keyedFiles = map[string]string{
	"blkio.throttle.read_bps_device":   "0",
	"blkio.throttle.write_bps_device":  "0",
	"blkio.throttle.read_iops_device":  "0",
	"blkio.throttle.write_iops_device": "0",
	"blkio.bfq.weight_device":          "default",
	"io.weight":                        "default",
	"io.bfq.weight":                    "default",
	"io.max":                           "rbps=max wbps=max riops=max wiops=max",
	"io.latency":                       "target=0",
	"net_prio.ifpriomap":               "0",
}

func restoreLine(unset, value, old string) (string, bool) {
	key, _, ok := strings.Cut(strings.TrimSpace(value), " ")
	if !ok {
		key = "default" // io.weight takes a lone number so
	}
	if v, ok := flatKeyed(old, key); ok {
		return key + " " + v, true
	}
	if key == "default" {
		return strings.TrimSpace(old), old != "" && !strings.Contains(old, "\n")
	}
	return key + " " + unset, true
}

// Arrange returns the writes of one request in an order in which the kernel
// takes them: one limit that bounds another is raised before and lowered after
// it, and those that are final come last. Of several writes to one file that
// holds a single value, the last counts. read gives what is there now.
func Arrange(ws []Write, read Reader) ([]Write, error) {
	var out []Write
	for i, w := range ws {
		if !overwritten(w, ws[i+1:]) {
			out = append(out, w)
		}
	}
	for _, p := range pairs {
		if err := p.arrange(out, read); err != nil {
			return nil, err
		}
	}
	sorted := make([]Write, 0, len(out))
	for _, final := range []bool{false, true} {
		for _, w := range out {
			if w.Final == final {
				sorted = append(sorted, w)
			}
		}
	}
	return sorted, nil
}

func overwritten(w Write, later []Write) bool {
	if _, keyed := keyedFiles[w.File]; keyed || !Readable(w.File) {
		return false
	}
	for _, l := range later {
		if l.Controller == w.Controller && l.File == w.File {
			return true
		}
	}
	return false
}

// pair is two files of a controller of which one bounds the other. After the
// first of two writes the kernel must still accept what is there.
type pair struct {
	low, high string
	// highFirst says which write comes first, given what is there and what
	// will be.
	highFirst func(oldLow, oldHigh, newLow, newHigh float64) bool
}

const noBound = math.MaxInt64

var pairs = []pair{
	// The limit of memory and swap is never below that of memory.
	{
		"memory.limit_in_bytes", "memory.memsw.limit_in_bytes",
		func(_, oldHigh, newLow, _ float64) bool { return newLow > oldHigh },
	},
	// In between, the share of time is the smaller one of new/old and old/new:
	// neither the parent's nor, for realtime, the whole is exceeded.
	{
		"cpu.cfs_quota_us", "cpu.cfs_period_us",
		func(oldLow, oldHigh, newLow, newHigh float64) bool {
			return oldLow == noBound || newLow != noBound && newLow*newHigh > oldLow*oldHigh
		},
	},
	{
		"cpu.rt_runtime_us", "cpu.rt_period_us",
		func(oldLow, oldHigh, newLow, newHigh float64) bool { return newLow*newHigh > oldLow*oldHigh },
	},
}

func (p pair) arrange(ws []Write, read Reader) error {
	lo, hi := -1, -1
	for i, w := range ws {
		switch w.File {
		case p.low:
			lo = i
		case p.high:
			hi = i
		}
	}
	if lo < 0 || hi < 0 {
		return nil
	}
	var v [4]float64
	for i, file := range []string{p.low, p.high} {
		now, err := read(ws[lo].Controller, file)
		if err != nil {
			return err
		}
		var ok bool
		if v[i], ok = plainNumber(now); !ok {
			return fmt.Errorf("%s: unexpected content %q", file, now)
		}
	}
	for i, w := range []Write{ws[lo], ws[hi]} {
		var ok bool
		if v[2+i], ok = plainNumber(w.Value); !ok {
			return nil // 1G: a file's own name keeps the caller's order
		}
	}
	if p.highFirst(v[0], v[1], v[2], v[3]) != (hi < lo) {
		ws[lo], ws[hi] = ws[hi], ws[lo]
	}
	return nil
}

// plainNumber parses what bounds something: a number, or -1 for no bound.
func plainNumber(s string) (float64, bool) {
	n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
	if n < 0 {
		n = noBound
	}
	return float64(n), err == nil
}

// optional turns the absence of a file into false.
func optional(read Reader, controller, file string) (string, bool, error) {
	v, err := read(controller, file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	return strings.TrimRight(v, "\n"), err == nil, err
}
