package cgfs

import (
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
)

func badValue(value, want string) error {
	return fmt.Errorf("%w %q: not %s", ErrValue, value, want)
}

// number parses a decimal number between low and high: digits, and nothing
// else.
func number(value string, low, high uint64) (uint64, error) {
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil || n < low || n > high {
		return 0, badValue(value, fmt.Sprintf("a number from %d to %d", low, high))
	}
	return n, nil
}

// unlimited stands for "max".
const unlimited = math.MaxUint64

const wantBytes = "bytes, with K, M, G or T for powers of 1024, or max"

// parseBytes parses "4096", "512M", "max".
func parseBytes(value string) (uint64, error) {
	if value == "max" {
		return unlimited, nil
	}
	digits, shift := value, 0
	if value != "" {
		if i := strings.IndexByte("KMGT", value[len(value)-1]); i >= 0 {
			digits, shift = value[:len(value)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || bits.Len64(n)+shift > 63 {
		return 0, badValue(value, wantBytes)
	}
	return n << shift, nil
}

// noLimit is where v1's "no limit" begins when it is read back: the greatest
// int64, rounded down to pages (PAGE_COUNTER_MAX), for hugetlb huge ones.
const noLimit = 1<<63 - 1<<35

// limitOf parses a limit as the kernel shows it. "-1" and "max" are unlimited.
func limitOf(content string) (uint64, error) {
	content = strings.TrimSpace(content)
	if content == "max" || content == "-1" {
		return unlimited, nil
	}
	n, err := strconv.ParseUint(content, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("unexpected content %q", content)
	}
	if n >= noLimit {
		return unlimited, nil
	}
	return n, nil
}

// show1 and show2 spell a limit as v1 and v2 want it.
func show1(n uint64) string {
	if n == unlimited {
		return "-1"
	}
	return strconv.FormatUint(n, 10)
}

func show2(n uint64) string {
	if n == unlimited {
		return "max"
	}
	return strconv.FormatUint(n, 10)
}

// decimal parses a positive number with an optional fraction: "1", "0.5",
// "12.25". Exponents, signs, hexadecimals and "inf" are refused.
func decimal(value string, most float64) (float64, error) {
	whole, frac, dotted := strings.Cut(value, ".")
	if len(value) <= 32 && whole != "" && (frac != "") == dotted && digitsOnly(whole) && digitsOnly(frac) {
		if f, err := strconv.ParseFloat(value, 64); err == nil && f > 0 && f <= most {
			return f, nil
		}
	}
	return 0, badValue(value, fmt.Sprintf("a number above 0 and up to %g", most))
}

func digitsOnly(s string) bool {
	return strings.Trim(s, "0123456789") == ""
}

func showDecimal(f float64) string {
	return strconv.FormatFloat(math.Round(f*1000)/1000, 'f', -1, 64)
}

// maxCPU bounds the numbers in a list of cpus (NR_CPUS is 8192 at most).
const maxCPU = 1 << 16

// parseList checks a list of cpus or memory nodes, "0-3,7", as cpuset(7)
// describes it, and returns how many there are.
func parseList(value string) (count int, err error) {
	for part := range strings.SplitSeq(value, ",") {
		first, last, dash := strings.Cut(part, "-")
		if !dash {
			last = first
		}
		a, errA := number(first, 0, maxCPU)
		b, errB := number(last, a, maxCPU)
		if errA != nil || errB != nil {
			return 0, badValue(value, "a list like 0-3,7")
		}
		count += int(b-a) + 1
	}
	return count, nil
}

// listItems splits a comma separated list of at most 256 items, of which none
// is empty.
func listItems(value string) ([]string, error) {
	items := strings.Split(value, ",")
	if len(items) > 256 {
		return nil, badValue(value, "a list of at most 256 items")
	}
	for i, it := range items {
		items[i] = strings.Trim(it, " ")
		if items[i] == "" {
			return nil, badValue(value, "a list without empty items")
		}
	}
	return items, nil
}

// deviceRule checks a rule of the devices controller: "a", "c 1:3 rwm",
// "b *:* r" (Documentation/admin-guide/cgroup-v1/devices.rst).
func deviceRule(rule string) error {
	bad := badValue(rule, "a, or a rule like c 1:3 rwm")
	if rule == "a" {
		return nil
	}
	f := strings.Split(rule, " ")
	if len(f) != 3 || f[0] != "a" && f[0] != "b" && f[0] != "c" {
		return bad
	}
	major, minor, ok := strings.Cut(f[1], ":")
	if !ok {
		return bad
	}
	for _, n := range []string{major, minor} {
		if _, err := number(n, 0, math.MaxUint32); n != "*" && err != nil {
			return bad
		}
	}
	if f[2] == "" || len(f[2]) > 3 || strings.Trim(f[2], "rwm") != "" {
		return bad
	}
	return nil
}

// deviceItem splits "MAJ:MIN VALUE".
func deviceItem(item string) (device, value string, err error) {
	device, value, ok := strings.Cut(item, " ")
	major, minor, colon := strings.Cut(device, ":")
	_, errA := number(major, 0, 1<<12-1) // MINORBITS is 20 of 32
	_, errB := number(minor, 0, 1<<20-1)
	if !ok || !colon || errA != nil || errB != nil {
		return "", "", badValue(item, "a device and a value, like 8:0 100")
	}
	return device, value, nil
}

// lines turns what the kernel shows in lines into a list as keys take it.
func lines(content string, show func(line string) (string, bool)) string {
	var items []string
	for line := range strings.Lines(content) {
		if it, ok := show(strings.TrimRight(line, "\n")); ok {
			items = append(items, it)
		}
	}
	return strings.Join(items, ",")
}

// sharesToWeight converts cpu.shares of v1 to cpu.weight of v2 as runc and
// systemd 257 do, so that limits keep their meaning next to theirs: the
// exponent of 10 is the quadratic in log2(shares) through 2→1, 1024→100 and
// 262144→10000 (github.com/opencontainers/cgroups,
// ConvertCPUSharesToCgroupV2Value; its package is not worth a megabyte here).
func sharesToWeight(shares uint64) uint64 {
	switch {
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l-126)/612)))
}

// weightToShares is the inverse of sharesToWeight.
func weightToShares(weight uint64) uint64 {
	switch {
	case weight <= 1:
		return 2
	case weight >= 10000:
		return 262144
	}
	// l² + 125 l − 126 − 612 log10(weight) = 0
	c := 126 + 612*math.Log10(float64(weight))
	return uint64(math.Floor(math.Exp2((math.Sqrt(125*125+4*c) - 125) / 2)))
}

// hugeSize checks a size of huge pages against those of this host.
func (s *Set) hugeSize(size string) error {
	if !slices.Contains(s.hugeSizes, size) {
		return fmt.Errorf("%w %q: huge pages here come in %s", ErrValue, size, strings.Join(s.hugeSizes, ", "))
	}
	return nil
}
