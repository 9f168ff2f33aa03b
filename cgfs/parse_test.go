package cgfs

import (
	"slices"
	"strings"
	"testing"
)

// As Linux shows them on a host with v1 controllers beside cgroup2, on one
// with v2 alone, and in a container with co-mounted controllers and spaces in
// a mount point.
var mountinfos = []struct {
	name, data string
	want       []mount
}{
	{"hybrid", `23 1 0:21 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
`, []mount{
		{"cgroup", []string{"rw", "memory"}},
		{"cgroup", []string{"rw", "name=systemd"}},
		{"cgroup2", []string{"rw"}},
	}},
	{"v2 alone", `29 22 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
`, []mount{{"cgroup2", []string{"rw", "nsdelegate", "memory_recursiveprot"}}}},
	{"container", `700 600 0:40 /../../lxc/c1 /mnt/a\040-\040cgroup ro master:11 propagate_from:2 - cgroup cgroup rw,xattr,cpu,cpuacct,release_agent=/a\040b
701 600 0:41 / /x rw - tmpfs tmpfs rw
`, []mount{{"cgroup", []string{"rw", "xattr", "cpu", "cpuacct", `release_agent=/a\040b`}}}},
	{"none", "", nil},
}

func TestParseMountinfo(t *testing.T) {
	for _, c := range mountinfos {
		got, err := parseMountinfo(c.data)
		if err != nil || !slices.EqualFunc(got, c.want, func(a, b mount) bool {
			return a.fstype == b.fstype && slices.Equal(a.options, b.options)
		}) {
			t.Errorf("%s: got %v, %v; want %v", c.name, got, err, c.want)
		}
	}
	for _, bad := range []string{"\n", "31 23 0:28 / / rw cgroup cgroup rw\n", "1 2 3 - cgroup\n"} {
		if got, err := parseMountinfo(bad); err == nil {
			t.Errorf("%q: got %v, want an error", bad, got)
		}
	}
}

func TestMounted(t *testing.T) {
	ms, err := parseMountinfo(mountinfos[0].data)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		tokens string
		want   bool
	}{{"memory", true}, {"name=systemd", true}, {"", true}, {"cpu", false}, {"cpu,memory", false}, {"systemd", false}} {
		a := attached{id: "1"}
		if c.tokens != "" {
			a.tokens = strings.Split(c.tokens, ",")
		}
		if got := mounted(a, ms); got != c.want {
			t.Errorf("mounted(%q) = %v, want %v", c.tokens, got, c.want)
		}
	}
}

func FuzzMountinfo(f *testing.F) {
	for _, c := range mountinfos {
		f.Add(c.data)
	}
	f.Fuzz(func(t *testing.T, data string) {
		ms, err := parseMountinfo(data)
		if err != nil && ms != nil {
			t.Error("mounts beside an error")
		}
		for _, m := range ms {
			if m.fstype != "cgroup" && m.fstype != "cgroup2" || len(m.options) == 0 {
				t.Errorf("%q gives %v", data, m)
			}
		}
	})
}

const procCgroup = `12:name=systemd:/user.slice
4:memory:/a:b/c (deleted)
3:cpu,cpuacct:/..
2:cpuset:/../sibling
14:pids:/
1:freezer:/..x
0::/lxc/c1
`

func TestProcCgroupPath(t *testing.T) {
	for _, c := range []struct {
		id, want string
		ok       bool
	}{
		{"12", "/user.slice", true},
		{"4", "/a:b/c (deleted)", true},
		{"3", "", false},
		{"2", "", false},
		{"14", "/", true},
		{"1", "/..x", true},
		{"0", "/lxc/c1", true},
		{"5", "", false},
	} {
		got, ok := ProcCgroup(procCgroup).Path(&Hierarchy{id: c.id})
		if got != c.want || ok != c.ok {
			t.Errorf("hierarchy %s: got %q, %v; want %q, %v", c.id, got, ok, c.want, c.ok)
		}
	}
	for _, bad := range []string{"", "0::/lxc", "0::\n", "0::lxc\n", "0:/x\n", "0\n", "\n0::", "0::/..\n", "0::/../\n"} {
		if got, ok := ProcCgroup(bad).Path(&Hierarchy{id: "0"}); ok {
			t.Errorf("%q: got %q", bad, got)
		}
	}
}

func FuzzProcCgroup(f *testing.F) {
	f.Add([]byte(procCgroup), "4")
	f.Add([]byte("0::/a\n0::/b\n"), "0")
	f.Add([]byte("::/\n:/\n"), "")
	f.Fuzz(func(t *testing.T, data []byte, id string) {
		got, ok := ProcCgroup(data).Path(&Hierarchy{id: id})
		if !ok {
			if got != "" {
				t.Errorf("%q beside false", got)
			}
			return
		}
		if got[0] != '/' || strings.Contains(got, "\n") || got == "/.." || strings.HasPrefix(got, "/../") {
			t.Errorf("path %q", got)
		}
		if !strings.Contains(string(data), ":"+got+"\n") {
			t.Errorf("path %q is not what the kernel gave: %q", got, data)
		}
		_, _ = parseAttached(string(data))
	})
}

func TestParseAttached(t *testing.T) {
	as, err := parseAttached(procCgroup)
	if err != nil || len(as) != 7 {
		t.Fatalf("got %v, %v", as, err)
	}
	if as[2].id != "3" || !slices.Equal(as[2].tokens, []string{"cpu", "cpuacct"}) || as[6].tokens != nil {
		t.Errorf("got %v", as)
	}
	for _, bad := range []string{"\n", "4:memory\n", ":memory:/\n"} {
		if as, err := parseAttached(bad); err == nil {
			t.Errorf("%q: got %v, want an error", bad, as)
		}
	}
}

func FuzzDirents(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x18\x00\x04abc\x00\x00"))
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xff\xff\x04abc\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		names, err := appendDirents(nil, b, 4)
		if err != nil && names != nil {
			t.Error("names beside an error")
		}
		for _, n := range names {
			if n == "." || n == ".." || strings.Contains(n, "\x00") {
				t.Errorf("name %q", n)
			}
		}
	})
}
