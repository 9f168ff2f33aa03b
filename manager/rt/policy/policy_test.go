package policy

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cgmanager/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// host has the users and groups of the tests.
var host = names{
	user:  lookup(map[string]uint32{"root": 0, "anna": 1000, "bob-2": 1001, "x": 7}),
	group: lookup(map[string]uint32{"audio": 29, "realtime": 980, "x": 8}),
}

func lookup(ids map[string]uint32) func(string) (uint32, error) {
	return func(name string) (uint32, error) {
		if id, ok := ids[name]; ok {
			return id, nil
		}
		return 0, errors.New("no such name")
	}
}

func TestDecide(t *testing.T) {
	const nobody = math.MaxUint32
	user := Target{UID: 1000, EGID: 1000, Groups: []uint32{24, 29}, Program: "/usr/bin/jackd", Root: nobody}
	with := func(change func(*Target)) Target {
		c := user
		change(&c)
		return c
	}
	inside := with(func(c *Target) { c.Container, c.UID, c.EGID, c.Groups, c.Root = true, 101000, 101000, nil, 100000 })
	// Root of it is the user: anybody can make such a one.
	own := with(func(c *Target) { c.Container, c.Root = true, 1000 })
	for _, tc := range []struct {
		name, file string
		who        Target
		line       int // of the rule that decides, 0 for none
	}{
		{"nothing said", "", user, 0},
		{"only a remark", "# [[rule]]\n", user, 0},
		{"everybody", "[[rule]]", user, 1},
		{"uid", "[[rule]]\nuid = 1000", user, 1},
		{"another uid", "[[rule]]\nuid = 1001", user, 0},
		{"uid as text", "[[rule]]\nuid = '1000'", user, 1},
		{"uid by name", "[[rule]]\nuid = 'anna'", user, 1},
		{"another's name", "[[rule]]\nuid = 'bob-2'", user, 0},
		{"a user's name is no group's", "[[rule]]\nuid = 'x'", with(func(c *Target) { c.UID = 8 }), 0},
		{"first of a range", "[[rule]]\nuid = '1000-1001'", user, 1},
		{"last of a range", "[[rule]]\nuid = '0-1000'", user, 1},
		{"beside a range", "[[rule]]\nuid = '1001-2000'", user, 0},
		{"one of a list", "[[rule]]\nuid = [7, '20-30', 'anna']", user, 1},
		{"none of a list", "[[rule]]\nuid = [7, '20-30', 'root']", user, 0},
		{"uid 0", "[[rule]]\nuid = 0", with(func(c *Target) { c.UID = 0 }), 1},
		{"an unknown uid is nobody's", "[[rule]]\nuid = '0-4294967294'", with(func(c *Target) { c.UID = nobody }), 0},

		{"supplementary group", "[[rule]]\ngroup = 'audio'", user, 1},
		{"effective gid", "[[rule]]\ngroup = 1000", user, 1},
		{"another group", "[[rule]]\ngroup = 'realtime'", user, 0},
		{"group by number", "[[rule]]\ngroup = ['28', 29]", user, 1},
		{"no groups", "[[rule]]\ngroup = 29", with(func(c *Target) { c.Groups = nil }), 0},

		{"program", "[[rule]]\nprogram = '/usr/bin/jackd'", user, 1},
		{"one of the programs", "[[rule]]\nprogram = ['/usr/bin/x', '/usr/bin/jackd']", user, 1},
		{"another program", "[[rule]]\nprogram = '/usr/bin/jack'", user, 0},
		{"no pattern", "[[rule]]\nprogram = '/usr/bin/*'", user, 0},
		{"an unknown program", "[[rule]]\nprogram = '/usr/bin/jackd'", with(func(c *Target) { c.Program = "" }), 0},
		{"a program that is gone", "[[rule]]\nprogram = '/usr/bin/jackd'", with(func(c *Target) { c.Program += " (deleted)" }), 0},

		{"all of several", "[[rule]]\nuid = 1000\ngroup = 29\nprogram = '/usr/bin/jackd'", user, 1},
		{"not the uid", "[[rule]]\nuid = 1\ngroup = 29\nprogram = '/usr/bin/jackd'", user, 0},
		{"not the group", "[[rule]]\nuid = 1000\ngroup = 30\nprogram = '/usr/bin/jackd'", user, 0},
		{"not the program", "[[rule]]\nuid = 1000\ngroup = 29\nprogram = '/usr/bin/x'", user, 0},

		{"a rule is for the host", "[[rule]]", inside, 0},
		{"a rule for the host", "[[rule]]\ncontainer = 'host'", inside, 0},
		{"a rule for all, inside", "[[rule]]\ncontainer = 'any'", inside, 1},
		{"a rule for all, on the host", "[[rule]]\ncontainer = 'any'", user, 1},
		{"a rule for all, inside without a root", "[[rule]]\ncontainer = 'any'", with(func(c *Target) { c.Container = true }), 1},
		{"a container's root", "[[rule]]\ncontainer = 100000", inside, 1},
		{"a range of roots", "[[rule]]\ncontainer = '100000-165535'", inside, 1},
		{"another root", "[[rule]]\ncontainer = '100001-165535'", inside, 0},
		{"a rule for containers, on the host", "[[rule]]\ncontainer = '0-4294967294'", user, 0},
		{"a rule for containers, without a root", "[[rule]]\ncontainer = '0-4294967294'", with(func(c *Target) { c.Container = true }), 0},
		{"host and a container, on the host", "[[rule]]\ncontainer = ['host', 100000]", user, 1},
		{"host and a container, inside", "[[rule]]\ncontainer = [100000, 'host']", inside, 1},
		{"host and a container, in another", "[[rule]]\ncontainer = ['host', 100001]", inside, 0},
		{"any and a container, in another", "[[rule]]\ncontainer = ['any', 100001]", inside, 1},
		{"a container and any, in another", "[[rule]]\ncontainer = [100001, 'any']", inside, 1},
		{"a container of one's own is not the host", "[[rule]]\ngroup = 'audio'\nprogram = '/usr/bin/jackd'", own, 0},
		{"a container's uid is the host's number", "[[rule]]\nuid = 1000\ncontainer = 'any'", inside, 0},

		{"the first that matches", "[[rule]]\nuid = 7\n\n[[rule]]\nuid = 1000\nallow = false\n[[rule]]\n", user, 4},
		{"a part of a string is no rule", "[[rule]]\nprogram = '''/\n[[rule]]\n'''\n[[rule]]\nuid = 1000", user, 5},
		{"a part of a list is no rule", "[[rule]]\nuid = [\n# a\n  1,\n[[rule]]\n] # wrong, and told", user, -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table, err := parse("f", []byte(tc.file), host)
			if tc.line < 0 {
				if err == nil {
					t.Fatal("no error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			v, ok := table.Decide(tc.who)
			if ok != (tc.line != 0) || v.Line != tc.line {
				t.Errorf("got line %d, %v, want line %d", v.Line, ok, tc.line)
			}
		})
	}
}

// Nobody gets out of a rule that refuses by making a namespace.
func TestRefusedInANamespace(t *testing.T) {
	table, err := parse("test", []byte(`[[rule]]
uid = 1001
allow = false
[[rule]]
uid = 1002
max_priority = 5
[[rule]]
group = 29
allow = false
[[rule]]
container = 5000
allow = false
[[rule]]
container = "any"
`), names{})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		who   Target
		line  int
		allow bool
	}{
		"on the host":                      {Target{UID: 1001}, 1, false},
		"in a namespace of its own":        {Target{UID: 1001, Container: true, Root: 1001, Maker: 1001}, 1, false},
		"under another uid there":          {Target{UID: 200005, Container: true, Root: 200000, Maker: 1001}, 1, false},
		"the uid in a container of root's": {Target{UID: 1001, Container: true, Root: 100000}, 13, true},
		"the uid in another's container":   {Target{UID: 1001, Container: true, Root: 1003, Maker: 1003}, 1, false},
		"somebody else's container":        {Target{UID: 1003, Container: true, Root: 1003, Maker: 1003}, 13, true},
		"a rule that gives":                {Target{UID: 1002, Container: true, Root: 1002, Maker: 1002}, 13, true},
		"a group":                          {Target{UID: 1003, EGID: 29, Container: true, Root: 1003, Maker: 1003}, 7, false},
		"a rule for containers":            {Target{UID: 1003, Container: true, Root: 5001, Maker: 1003}, 13, true},
		"for this one":                     {Target{UID: 1003, Container: true, Root: 5000, Maker: 1003}, 10, false},
	} {
		if v, ok := table.Decide(tc.who); !ok || v.Line != tc.line || v.Allow != tc.allow {
			t.Errorf("%s: line %d, allow %t, %t; want line %d, allow %t", name, v.Line, v.Allow, ok, tc.line, tc.allow)
		}
	}
}

func TestVerdict(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		want       Verdict
	}{
		{"nothing said", "", Verdict{Allow: true}},
		{"refused", "allow = false", Verdict{}},
		{"allowed", "allow = true", Verdict{Allow: true}},
		{"priority", "max_priority = 98", Verdict{Allow: true, MaxPriority: new(98)}},
		{"no realtime", "max_priority = 0", Verdict{Allow: true, MaxPriority: new(0)}},
		{"nice", "min_nice = -20", Verdict{Allow: true, MinNice: new(-20)}},
		{"rr", "policies = 'rr'", Verdict{Allow: true, RR: true}},
		{"fifo", "policies = ['fifo']", Verdict{Allow: true, FIFO: true}},
		{"both", "policies = ['fifo', 'rr']", Verdict{Allow: true, RR: true, FIFO: true}},
		{"budget", "budget = 100", Verdict{Allow: true, Budget: 100}},
		{"empty limits", "[rule.limits]", Verdict{Allow: true, Limits: &Limits{}}},
		{"limits", "[rule.limits]\nrtprio = 95\nnice = -19\nmemlock = '4G'", Verdict{Allow: true, Limits: &Limits{
			RTPrio: new(uint64(95)), Nice: new(-19), MemLock: new(uint64(4 << 30)),
		}}},
		{"limits inline", "limits = { rtprio = 0 }", Verdict{Allow: true, Limits: &Limits{RTPrio: new(uint64(0))}}},
		{"limits dotted", "limits.nice = 19", Verdict{Allow: true, Limits: &Limits{Nice: new(19)}}},
		{"no limit", "limits.memlock = 'unlimited'", Verdict{Allow: true, Limits: &Limits{MemLock: new(uint64(math.MaxUint64))}}},
		{"bytes", "limits.memlock = 65536", Verdict{Allow: true, Limits: &Limits{MemLock: new(uint64(65536))}}},
		{"bytes as text", "limits.memlock = '65537'", Verdict{Allow: true, Limits: &Limits{MemLock: new(uint64(65537))}}},
		{"kilobytes", "limits.memlock = '3K'", Verdict{Allow: true, Limits: &Limits{MemLock: new(uint64(3 << 10))}}},
		{"megabytes", "limits.memlock = '3M'", Verdict{Allow: true, Limits: &Limits{MemLock: new(uint64(3 << 20))}}},
		{"terabytes", "limits.memlock = '3T'", Verdict{Allow: true, Limits: &Limits{MemLock: new(uint64(3 << 40))}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			table, err := parse("f", []byte("[[rule]]\nuid = 1\n[[rule]]\n"+tc.file+"\n[[rule]]\nallow = false\n"), host)
			if err != nil {
				t.Fatal(err)
			}
			tc.want.Line = 3
			got, ok := table.Decide(Target{UID: 1000})
			if diff := cmp.Diff(tc.want, got); diff != "" || !ok || table.Rules() != 3 {
				t.Errorf("%v, %d rules, -want +got:\n%s", ok, table.Rules(), diff)
			}
		})
	}
}

// TestMistakes: each is told at its place, which is marked in the text by a ¦.
func TestMistakes(t *testing.T) {
	const before = "# realtime\n[[rule]]\nuid = 1\nmax_priority = 3\n[rule.limits]\nrtprio = 5\n\n"
	const after = "\n\n[[rule]]\nuid = 9\nmax_priority = 4\ncontainer = 'any'\nlimits.rtprio = 1\nlimits.nice = 1\n"
	for _, tc := range []struct{ name, file, want string }{
		{"form", "[[rule]]\nuid ¦1000", "expected '.' or '='"},
		{"no end", "[[rule]]\nprogram = '/usr¦", "strings cannot contain newlines"},
		{"twice", "[[rule]]\nuid = 1000\n¦uid = 1001", "Key 'rule.uid' has already been defined"},
		{"control", "[[rule]]\nprogram = '¦/\x01'", "control characters"},
		{"unknown key", "[[rule]]\n  priority = ¦20", "unknown key priority"},
		{"unknown key in capitals", "[[rule]]\nUID = ¦20", "unknown key UID"},
		{"unknown limit", "[[rule]]\nuid = 1\n[rule.limits]\nnofile = ¦20", "unknown key limits.nofile"},
		{"unknown table", "[[rule]]\nuid = 1\n¦[limits]\nrtprio = 3", "unknown key limits"},
		{"unknown table of the rule", "[[rule]]\nuid = 1\n¦[rule.x]\nrtprio = 3", "unknown key x"},
		{"unknown dotted", "[[rule]]\nuid = 1\nx.y.z = ¦3", "unknown key x.y.z"},
		{"no dot in a name", "[[rule]]\n\"limits.rtprio\" = ¦3", "unknown key \"limits.rtprio\""},
		{"a name of any bytes", "[[rule]]\n\"\\u0007\\n\" = ¦3", "unknown key"},
		{"a table", "[[rule]]\nuid = {¦ a = 1 }", "neither an id nor a name"},
		{"list of tables", "[[rule]]\n¦[[rule.limits]]\nrtprio = 3", "limits: it is a table"},
		{"no table", "[[rule]]\nlimits = ¦3", "limits: it is a table"},
		{"deeper", "[[rule]]\nlimits.rtprio.x = ¦3", "unknown key limits.rtprio.x"},

		{"uid", "[[rule]]\nuid = ¦-1", "uid: -1 is no id"},
		{"uid 2^32-1", "[[rule]]\nuid = ¦4294967295", "uid: 4294967295 is no id"},
		{"uid 2^32-1 as text", "[[rule]]\nuid = '¦4294967295'", "ids are from 0 to 4294967294"},
		{"uid 2^64", "[[rule]]\nuid = '¦18446744073709551616'", "ids are from 0"},
		{"uid of a range", "[[rule]]\nuid = '¦5-4294967295'", "ids are from 0"},
		{"range backwards", "[[rule]]\nuid = '¦5-4'", "the range ends before it begins"},
		{"uid as number with a point", "[[rule]]\nuid = ¦1.5", "1.5 is neither an id nor a name"},
		{"uid as a truth", "[[rule]]\nuid = ¦true", "true is neither an id nor a name"},
		{"uid as a date", "[[rule]]\nuid = ¦2020-01-02", "neither an id nor a name"},
		{"unknown user", "[[rule]]\nuid = [¦'anna', 'audio']", `uid: no user "audio" on this host`},
		{"no user", "[[rule]]\nuid = '¦'", `uid: no user "" on this host`},
		{"no number", "[[rule]]\nuid = '¦1000-'", `uid: no user "1000-" on this host`},
		{"a list of no users", "[[rule]]\nuid = [¦]", "uid: the list is empty"},
		{"list in a list", "[[rule]]\nuid = [¦[1]]", "neither an id nor a name"},
		{"unknown group", "[[rule]]\ngroup = '¦anna'", `group: no group "anna" on this host`},
		{"program", "[[rule]]\nprogram = '¦jackd'", `program: "jackd" is no whole path`},
		{"program with ..", "[[rule]]\nprogram = '¦/usr/../bin/x'", "is no whole path"},
		{"program with //", "[[rule]]\nprogram = [¦'/a', '//bin/x']", "is no whole path"},
		{"no program", "[[rule]]\nprogram = '¦'", "is no whole path"},
		{"program as number", "[[rule]]\nprogram = ¦5", "5 is no path"},
		{"container", "[[rule]]\ncontainer = '¦all'", `container: "all" is neither "host" nor "any"`},
		{"a user's container", "[[rule]]\ncontainer = '¦anna'", `container: "anna" is neither`},
		{"no container", "[[rule]]\ncontainer = [¦]", "container: the list is empty"},
		{"allow", "[[rule]]\nallow = '¦yes'", `allow: "yes" is neither true nor false`},
		{"allow a list", "[[rule]]\nallow = [¦true]", "neither true nor false"},
		{"priority", "[[rule]]\nmax_priority = ¦99", "max_priority: 99 is not from 0 to 98"},
		{"priority below", "[[rule]]\nmax_priority = ¦-1", "-1 is not from 0 to 98"},
		{"priority as text", "[[rule]]\nmax_priority = '¦20'", `max_priority: "20" is no whole number`},
		{"priority as list", "[[rule]]\nmax_priority = [¦20]", "is no whole number"},
		{"priority 2^64", "[[rule]]\nmax_priority = ¦18446744073709551616", "out of range"},
		{"nice below", "[[rule]]\nmin_nice = ¦-21", "min_nice: -21 is not from -20 to 19"},
		{"nice above", "[[rule]]\nmin_nice = ¦20", "min_nice: 20 is not from -20 to 19"},
		{"policies", "[[rule]]\npolicies = [¦'rr', 'deadline']", `policies: "deadline" is neither`},
		{"policies in capitals", "[[rule]]\npolicies = '¦RR'", `policies: "RR" is neither`},
		{"no policies", "[[rule]]\npolicies = [¦]", "policies: the list is empty"},
		{"budget below", "[[rule]]\nbudget = ¦0", "budget: 0 is not from 1 to 100"},
		{"budget above", "[[rule]]\nbudget = ¦101", "budget: 101 is not from 1 to 100"},
		{"rtprio", "[[rule]]\nlimits.rtprio = ¦99", "limits.rtprio: 99 is not from 0 to 98"},
		{"limit nice", "[[rule]]\n[rule.limits]\nnice = ¦20", "limits.nice: 20 is not from -20 to 19"},
		{"memlock", "[[rule]]\n[rule.limits]\nmemlock = '¦64MB'", `limits.memlock: "64MB" is no size`},
		{"memlock below", "[[rule]]\n[rule.limits]\nmemlock = ¦-1", "limits.memlock: -1 is no size"},
		{"memlock too much", "[[rule]]\n[rule.limits]\nmemlock = '¦8388608T'", "is no size"},
		{"no memlock", "[[rule]]\n[rule.limits]\nmemlock = '¦'", "is no size"},
		{"memlock of nothing", "[[rule]]\n[rule.limits]\nmemlock = '¦K'", "is no size"},
		{"signed memlock", "[[rule]]\n[rule.limits]\nmemlock = '¦+5'", "is no size"},
		{"memlock with a point", "[[rule]]\n[rule.limits]\nmemlock = ¦5.5", "is no size"},
		{"given and refused", "[[rule]]\nmin_nice = ¦-5\nallow = false", "min_nice: the rule says allow = false"},
		{"limits given and refused", "[[rule]]\nallow = false\nlimits.nice = ¦-5", "limits.nice: the rule says allow = false"},
		{"the first of two", "[[rule]]\nbudget = ¦0\nuid = -1", "budget: 0"},
		{"the first of two, in the other order", "[[rule]]\nuid = ¦-1\nbudget = 0", "uid: -1"},
		{"a header in quotes", "[[rule]]\nuid = 1\n¦[[\"rule\"]]\nuid = 2", "each rule begins with a line [[rule]]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := before + tc.file + after
			at := strings.Index(text, "¦")
			line := strings.Count(text[:at], "\n") + 1
			column := at - strings.LastIndex(text[:at], "\n")
			_, err := parse("/etc/f.toml", []byte(strings.Replace(text, "¦", "", 1)), host)
			e, ok := errors.AsType[*Error](err)
			if !ok {
				t.Fatalf("got %v, want an Error", err)
			}
			if e.Line != line || e.Column != column || !strings.Contains(e.Reason, tc.want) || strings.ContainsAny(e.Reason, "\n\a") {
				t.Errorf("got %v\nwant line %d, column %d: %s", e, line, column, tc.want)
			}
		})
	}
}

// TestBeforeRules: nothing stands before the first rule.
func TestBeforeRules(t *testing.T) {
	for text, want := range map[string]string{
		"uid = 1000":            "f:1:7: unknown key uid",
		"\n[x]\n[[rule]]":       "f:2:1: unknown key x",
		"rule = 5":              "f:1:8: each rule begins with a line [[rule]]",
		"rule = [{ uid = 5 }]":  "f:1:9: each rule begins with a line [[rule]]",
		"[rule]\nuid = 5":       "f:1:1: each rule begins with a line [[rule]]",
		"rule.uid = 5":          "f:1:12: each rule begins with a line [[rule]]",
		"[[rule.limits]]":       "f:1:1: each rule begins with a line [[rule]]",
		"[[rules]]\nuid = 5":    "f:1:1: unknown key rules",
		"x = '''\n[[rule]]\n''": "f:3:2: unexpected EOF",
	} {
		if _, err := parse("f", []byte(text), host); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", text, err, want)
		}
	}
}

// TestShipped: the file that is installed says nothing, and what it has as remarks
// is right.
func TestShipped(t *testing.T) {
	text, err := os.ReadFile("../../../packaging/realtime.toml")
	if err != nil {
		t.Fatal(err)
	}
	none := names{user: lookup(nil), group: lookup(nil)}
	if table, err := parse("realtime.toml", text, none); err != nil || table.Rules() != 0 {
		t.Fatalf("%v, %v", table, err)
	}
	table, err := parse("realtime.toml", regexp.MustCompile(`(?m)^#(\S)`).ReplaceAll(text, []byte("$1")), shipped)
	if err != nil {
		t.Fatal(err)
	}
	var got []Verdict
	for _, who := range []Target{{EGID: 1}, {EGID: 2}, {EGID: 3}, {Container: true, Root: 100000}, {}} {
		v, ok := table.Decide(who)
		if !ok {
			t.Errorf("no rule is for %+v", who)
		}
		v.Line = 0
		got = append(got, v)
	}
	want := []Verdict{
		{Allow: true, MaxPriority: new(20), MinNice: new(-15)},
		{Allow: true, MaxPriority: new(70), RR: true, FIFO: true, Budget: 50},
		{Allow: true, MaxPriority: new(95), MinNice: new(-19), Limits: &Limits{RTPrio: new(uint64(95)), Nice: new(-19), MemLock: new(uint64(4 << 30))}},
		{Allow: true, MaxPriority: new(10), Budget: 20},
		{},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// shipped has the groups of the examples.
var shipped = names{user: lookup(nil), group: lookup(map[string]uint32{"audio": 1, "pipewire": 2, "realtime": 3})}

// TestManPage: the examples of the man page, and the mistake that it shows, are right.
func TestManPage(t *testing.T) {
	text, err := os.ReadFile("../../../docs/man/cgmanager-realtime.toml.5.md")
	if err != nil {
		t.Fatal(err)
	}
	_, examples, ok := strings.Cut(string(text), "\n# EXAMPLES\n")
	if !ok {
		t.Fatal("no examples")
	}
	var b strings.Builder
	for line := range strings.Lines(examples) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			b.WriteString(code)
		}
	}
	if table, err := parse("man", []byte(b.String()), shipped); err != nil || table.Rules() != 5 {
		t.Errorf("%v, %v", table, err)
	}
	shown := regexp.MustCompile(`/etc/cgmanager/realtime.toml:(\d+):\d+: .*`).FindSubmatch(text)
	line, err := strconv.Atoi(string(shown[1]))
	if err != nil {
		t.Fatal(err)
	}
	_, err = parse("/etc/cgmanager/realtime.toml", []byte(strings.Repeat("\n", line-2)+"[[rule]]\nmax_priority = 99"), shipped)
	if err == nil || err.Error() != string(shown[0]) {
		t.Errorf("got %v\nwant %s", err, shown[0])
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "[[rule]]", "[[rule]]\nuid = [1, '2-3', 'anna']\n[rule.limits]\nmemlock = '64M'\n[[rule]]\nallow = false",
		"[[rule]]\nprogram = '''\n[[rule]]\n'''", "\xff\xfe", "\xef\xbb\xbf[[rule]]", "[[rule]]\nuid = [\n[[rule]]\n]", "rule = [{a=1}]",
		"[[\"rule\"]]\r\n[[rule]]\r\ncontainer=['any',5]", "[[rule]]\nlimits.rtprio.x=1\n", "[[rule]]\nx=2020-01-02\n[rule.limits.a]",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 {
			return
		}
		table, err := parse("f", data, host)
		if err != nil {
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Line < 1 || e.Line > strings.Count(string(data), "\n")+1 || e.Column < 1 || e.Reason == "" || strings.Contains(e.Reason, "\n") {
				t.Fatalf("%#v", err)
			}
			return
		}
		v, ok := table.Decide(Target{UID: 1000, EGID: 29, Program: "/x"})
		if v.MaxPriority != nil && (*v.MaxPriority < 0 || *v.MaxPriority > MaxPriority) || ok != (v.Line > 0) || ok && table.Rules() == 0 {
			t.Fatalf("%+v, %v", v, ok)
		}
	})
}

// write makes a file that root alone may write.
func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestLoad(t *testing.T) {
	harness.Require(t, "root")
	path := filepath.Join(t.TempDir(), "realtime.toml")
	refused := func(want string) {
		t.Helper()
		table, err := Load(path)
		if err == nil || table != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, %v, want %q", table, err, want)
		}
	}
	if table, err := Load(path); err != nil || table.Rules() != 0 {
		t.Errorf("without a file: %v, %v", table, err)
	}
	write(t, path, "[[rule]]\nuid = ['root', '5']\ngroup = 'root'\n")
	table, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := table.Decide(Target{}); !ok {
		t.Error("root of group root is not found")
	}
	write(t, path, "[[rule]]\nuid = 'nobody-of-that-name'\n")
	refused(path + `:2:8: uid: no user "nobody-of-that-name" on this host`)
	write(t, path, "[[rule]]\ngroup = 'nobody-of-that-name'\n")
	refused(path + `:2:10: group: no group "nobody-of-that-name" on this host`)

	write(t, path, "[[rule]]\n"+strings.Repeat("#", MaxFile-9))
	if _, err := Load(path); err != nil {
		t.Error("as large as may be: ", err)
	}
	write(t, path, "[[rule]]\n"+strings.Repeat("#", MaxFile-8))
	refused("has more than 65536 bytes")

	write(t, path, "[[rule]]\n")
	for _, mode := range []os.FileMode{0o664, 0o646, 0o602} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		refused("can be written by others than root")
	}
	if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, 1000, 0)); err != nil {
		t.Fatal(err)
	}
	refused("belongs to uid 1000")

	// What it is a link to is what counts.
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	path, link = link, path
	refused("belongs to uid 1000")
	if err := os.Chown(link, 0, 0); err != nil {
		t.Fatal(err)
	}
	if table, err := Load(path); err != nil || table.Rules() != 1 {
		t.Errorf("through a link: %v, %v", table, err)
	}

	path = t.TempDir()
	refused("is no regular file")
	path = filepath.Join(path, "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("is no regular file")
	path = "/dev/zero"
	refused("is no regular file")
}

func TestReload(t *testing.T) {
	harness.Require(t, "root")
	path := filepath.Join(t.TempDir(), "realtime.toml")
	write(t, path, "[[rule]\n")
	if f, err := Open(path); err == nil || f != nil {
		t.Errorf("a bad file is opened: %v", err)
	}
	write(t, path, "[[rule]]\n")
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	first := f.Current()
	write(t, path, "[[rule]]\n[[rule]]\nuid = -1\n")
	if err := f.Reload(); err == nil || !strings.Contains(err.Error(), path+":3:7: ") {
		t.Errorf("got %v", err)
	}
	if f.Current() != first {
		t.Error("a bad file took the place of a good one")
	}
	write(t, path, "[[rule]]\n[[rule]]\n")
	if err := f.Reload(); err != nil || f.Current().Rules() != 2 {
		t.Errorf("got %v, %d rules", err, f.Current().Rules())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := f.Reload(); err != nil || f.Current().Rules() != 0 {
		t.Errorf("without the file: %v, %d rules", err, f.Current().Rules())
	}
}
