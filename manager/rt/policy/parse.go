package policy

import (
	"errors"
	"fmt"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// MaxPriority is the highest priority that a rule may give. Above it there are the
// watchdog's, and the kernel's own threads that take a CPU away (stop, migration).
const MaxPriority = 98

// names are the users and groups of the host.
type names struct {
	user, group func(name string) (uint32, error)
}

// Error says what is wrong with a file, and where.
type Error struct {
	// File is its path, Line and Column (in bytes) count from 1.
	File         string
	Line, Column int
	// Reason says what, in one line.
	Reason string
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Reason)
}

// parse reads a file's bytes. An error is an *Error.
func parse(file string, data []byte, n names) (*Table, error) {
	text := strings.TrimPrefix(string(data), "\ufeff")
	// First the whole: what is wrong with its form is told for what it is.
	var all map[string]any
	if _, err := toml.Decode(text, &all); err != nil {
		return nil, located(file, 1, text, err)
	}
	t := &Table{}
	line := 1
	for _, part := range split(text) {
		r, err := parsePart(part, n)
		if err != nil {
			return nil, located(file, line, part, err)
		}
		if r != nil {
			r.verdict.Line = line
			t.rules = append(t.rules, *r)
		}
		line += strings.Count(part, "\n")
	}
	return t, nil
}

// located makes an Error of what the decoder says about a part of the file that
// begins at the line.
func located(file string, line int, part string, err error) *Error {
	e := &Error{File: file, Line: line, Column: 1, Reason: err.Error()}
	if p, ok := errors.AsType[toml.ParseError](err); ok {
		e.Reason = p.Message
		// The decoder's own column of what begins a line is that behind the line before.
		if at := p.Position.Start; at >= 0 && at <= len(part) {
			e.Line += strings.Count(part[:at], "\n")
			e.Column = at - strings.LastIndexByte(part[:at], '\n')
		}
	}
	// A name in the file may hold anything; the message is one line of a log.
	e.Reason = strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return '?'
	}, e.Reason)
	return e
}

var header = regexp.MustCompile(`(?m)^[ \t]*\[\[[ \t]*rule[ \t]*\]\]`)

// split cuts the text before each [[rule]]. The decoder knows the position of a key
// by its name alone: of rule.uid there is one in each part. What looks like a header
// may be a line of a string or of an array; the text before it is none then, since
// what was begun has no end.
func split(text string) []string {
	var parts []string
	start := 0
	for _, at := range header.FindAllStringIndex(text, -1) {
		part := text[start:at[0]]
		var ignored map[string]any
		if _, err := toml.Decode(part, &ignored); err == nil {
			parts, start = append(parts, part), at[0]
		}
	}
	return append(parts, text[start:])
}

// check looks at a value as the decoder has it. The decoder adds the position to what
// it says.
type check func(value any) error

// UnmarshalTOML implements toml.Unmarshaler.
func (c check) UnmarshalTOML(value any) error { return c(value) }

// parsePart reads what there is before the first rule, which is nothing (nil), or
// a rule.
func parsePart(text string, n names) (*rule, error) {
	var top map[string]toml.Primitive
	md, err := toml.Decode(text, &top)
	if err != nil {
		return nil, err
	}
	r := &rule{host: true, verdict: Verdict{Allow: true}}
	keys := r.keys(n)
	var given toml.Key
	found := false
	// In the order of the file, so that the first mistake is the one that is told.
	for _, key := range md.Keys() {
		isRule := len(key) == 1 && key[0] == "rule" && md.Type("rule") == "ArrayHash"
		if isRule && !found {
			found = true
			continue
		}
		c := check(func(any) error { return fmt.Errorf("unknown key %s", key[min(1, len(key)-1):]) })
		if key[0] == "rule" && !found || isRule {
			c = func(any) error { return errors.New("each rule begins with a line [[rule]]") }
		} else if key[0] == "rule" && len(key) > 1 {
			name := key[1:].String()
			if known, ok := keys[name]; ok {
				c = func(value any) error {
					if err := known(value); err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
					return nil
				}
				if given == nil && slices.Contains(gives, key[1]) {
					given = key
				}
			}
		}
		if err := visit(&md, top, key, c); err != nil {
			return nil, err
		}
	}
	if !found {
		return nil, nil
	}
	if !r.verdict.Allow && given != nil {
		return nil, visit(&md, top, given, func(any) error {
			return fmt.Errorf("%s: the rule says allow = false, and gives nothing", given[1:])
		})
	}
	return r, nil
}

// gives are the keys that say what is granted, and not to whom.
var gives = []string{"max_priority", "min_nice", "policies", "budget", "limits"}

// visit has c look at the value of a key.
func visit(md *toml.MetaData, table map[string]toml.Primitive, key toml.Key, c check) error {
	for i, part := range key {
		value := table[part]
		if i == len(key)-1 {
			return md.PrimitiveDecode(value, c)
		}
		table = nil
		if i == 0 && md.Type(part) == "ArrayHash" {
			var rules []map[string]toml.Primitive
			if err := md.PrimitiveDecode(value, &rules); err != nil {
				return err
			}
			table = rules[len(rules)-1]
		} else if err := md.PrimitiveDecode(value, &table); err != nil {
			return err
		}
	}
	return nil
}

// keys are those of a rule, each with what reads its value.
func (r *rule) keys(n names) map[string]check {
	v, limits := &r.verdict, &Limits{}
	give := func(c check) check {
		return func(value any) error {
			v.Limits = limits
			return c(value)
		}
	}
	return map[string]check{
		"uid":          ids(&r.uids, "user", n.user),
		"group":        ids(&r.groups, "group", n.group),
		"program":      each(r.program),
		"container":    each(r.container()),
		"allow":        boolean(&v.Allow),
		"max_priority": number(&v.MaxPriority, 0, MaxPriority),
		"min_nice":     number(&v.MinNice, -20, 19),
		"policies":     each(r.policy),
		"budget": func(value any) error {
			var budget *int
			err := number(&budget, 1, 100)(value)
			if err == nil {
				v.Budget = *budget
			}
			return err
		},
		"limits": func(value any) error {
			if _, ok := value.(map[string]any); !ok {
				return errors.New("it is a table: [rule.limits]")
			}
			v.Limits = limits
			return nil
		},
		"limits.rtprio":  give(number(&limits.RTPrio, 0, MaxPriority)),
		"limits.nice":    give(number(&limits.Nice, -20, 19)),
		"limits.memlock": give(size(&limits.MemLock)),
	}
}

func (r *rule) program(value any) error {
	p, ok := value.(string)
	if !ok {
		return fmt.Errorf("%v is no path: write it in quotes", value)
	}
	if !path.IsAbs(p) || path.Clean(p) != p {
		return fmt.Errorf("%q is no whole path: it begins with /, and has no empty part, no . and no .. in it", p)
	}
	r.programs = append(r.programs, p)
	return nil
}

// container returns the check of one element of container. The first that is given
// takes the place of the default.
func (r *rule) container() check {
	first, anyRoot := true, false
	return func(value any) error {
		if first {
			r.host, first = false, false
		}
		switch value {
		case "host":
			r.host = true
			return nil
		case "any":
			r.host, r.inside, r.roots, anyRoot = true, true, nil, true
			return nil
		}
		s, err := parseSpan(value)
		if errors.Is(err, errName) {
			return fmt.Errorf(`%q is neither "host" nor "any" nor uids of containers' roots`, value)
		}
		if err != nil {
			return err
		}
		r.inside = true
		if !anyRoot {
			r.roots = append(r.roots, s)
		}
		return nil
	}
}

func (r *rule) policy(value any) error {
	switch value {
	case "rr":
		r.verdict.RR = true
	case "fifo":
		r.verdict.FIFO = true
	default:
		return fmt.Errorf(`%s is neither "rr" nor "fifo"`, quoted(value))
	}
	return nil
}

// each takes one value or a list of them, which is not empty: an empty one would
// be all there are in one key, and none in another.
func each(c check) check {
	return func(value any) error {
		list, ok := value.([]any)
		if !ok {
			return c(value)
		}
		if len(list) == 0 {
			return errors.New("the list is empty: leave the key out, or name some")
		}
		for _, one := range list {
			if err := c(one); err != nil {
				return err
			}
		}
		return nil
	}
}

// ids takes ids, ranges of them, and names, which lookup knows.
func ids(to *[]span, kind string, lookup func(string) (uint32, error)) check {
	return each(func(value any) error {
		s, err := parseSpan(value)
		if errors.Is(err, errName) {
			name, _ := value.(string)
			id, err := lookup(name)
			if err != nil {
				return fmt.Errorf("no %s %q on this host", kind, name)
			}
			s = span{id, id}
		} else if err != nil {
			return err
		}
		*to = append(*to, s)
		return nil
	})
}

// errName says that a value is neither an id nor a range, and may be a name.
var errName = errors.New("not a number")

// parseSpan takes 1000, "1000" and "1000-1999".
func parseSpan(value any) (span, error) {
	switch value := value.(type) {
	case int64:
		if value < 0 || value >= math.MaxUint32 {
			return span{}, fmt.Errorf("%d is no id: they are from 0 to %d", value, uint32(math.MaxUint32-1))
		}
		return span{uint32(value), uint32(value)}, nil
	case string:
		first, last, isRange := strings.Cut(value, "-")
		if !isRange {
			last = first
		}
		if !digits(first) || !digits(last) {
			return span{}, errName
		}
		a, errA := strconv.ParseUint(first, 10, 32)
		b, errB := strconv.ParseUint(last, 10, 32)
		if errA != nil || errB != nil || b == math.MaxUint32 {
			return span{}, fmt.Errorf("%q: ids are from 0 to %d", value, uint32(math.MaxUint32-1))
		}
		if a > b {
			return span{}, fmt.Errorf("%q: the range ends before it begins", value)
		}
		return span{uint32(a), uint32(b)}, nil
	}
	return span{}, fmt.Errorf("%v is neither an id nor a name", value)
}

func digits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// number takes an integer from low to high.
func number[T int | uint64](to **T, low, high int64) check {
	return func(value any) error {
		i, ok := value.(int64)
		if !ok {
			return fmt.Errorf("%s is no whole number", quoted(value))
		}
		if i < low || i > high {
			return fmt.Errorf("%d is not from %d to %d", i, low, high)
		}
		*to = new(T(i))
		return nil
	}
}

func boolean(to *bool) check {
	return func(value any) error {
		b, ok := value.(bool)
		if !ok {
			return fmt.Errorf("%s is neither true nor false", quoted(value))
		}
		*to = b
		return nil
	}
}

// size takes bytes, also with K, M, G or T behind them, and "unlimited".
func size(to **uint64) check {
	return func(value any) error {
		if value == "unlimited" {
			*to = new(uint64(math.MaxUint64))
			return nil
		}
		text := fmt.Sprint(value)
		count, shift := text, 0
		if _, ok := value.(string); ok && text != "" {
			if i := strings.IndexByte("KMGT", text[len(text)-1]); i >= 0 {
				count, shift = text[:len(text)-1], 10*(i+1)
			}
		}
		bytes, err := strconv.ParseUint(count, 10, 63-shift)
		if !digits(count) || err != nil {
			return fmt.Errorf(`%s is no size: a number of bytes, "64M" (K, M, G, T) or "unlimited"`, quoted(value))
		}
		*to = new(bytes << shift)
		return nil
	}
}

// quoted shows a value as the file has it, about.
func quoted(value any) string {
	if s, ok := value.(string); ok {
		return strconv.Quote(s)
	}
	return fmt.Sprint(value)
}
