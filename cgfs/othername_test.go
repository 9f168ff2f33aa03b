package cgfs

import (
	"slices"
	"strings"
	"testing"
)

// TestOtherNames: a controller answers to its name of the other version, its
// own name first, and a skipped one to none.
func TestOtherNames(t *testing.T) {
	v1 := func(ctrls ...string) *Hierarchy {
		return &Hierarchy{version: V1, name: strings.Join(ctrls, ","), controllers: ctrls}
	}
	v2 := func(ctrls ...string) *Hierarchy { return &Hierarchy{version: V2, name: "unified", controllers: ctrls} }
	for _, c := range []struct {
		what string
		set  *Set
		// want is "name: hierarchy"; "-" for none.
		want []string
	}{
		{
			"unified", &Set{hierarchies: []*Hierarchy{v2("cpu", "io", "memory")}},
			[]string{"blkio: unified", "cpuacct: unified", "devices: unified", "freezer: unified", "io: unified", "perf_event: unified", "net_cls: -", "pids: -", "systemd: -", "nosuch: -", ": -"},
		},
		{
			"unified without io", &Set{hierarchies: []*Hierarchy{v2("cpu", "memory")}},
			[]string{"blkio: -", "io: -", "freezer: unified"},
		},
		{
			"legacy", &Set{hierarchies: []*Hierarchy{v1("blkio"), v1("cpu", "cpuacct"), v1("freezer")}},
			[]string{"blkio: blkio", "io: blkio", "cpuacct: cpu,cpuacct", "devices: -", "freezer: freezer", "perf_event: -"},
		},
		{
			"hybrid", &Set{hierarchies: []*Hierarchy{v1("freezer"), v1("blkio"), v2("memory")}},
			[]string{"freezer: freezer", "io: blkio", "blkio: blkio", "devices: unified", "cpuacct: unified"},
		},
		{
			"hybrid with io on v2", &Set{hierarchies: []*Hierarchy{v1("freezer"), v2("io")}},
			[]string{"io: unified", "blkio: unified"},
		},
		{
			"skipped", &Set{hierarchies: []*Hierarchy{v2("io")}, skip: []string{"freezer", "blkio"}},
			[]string{"freezer: -", "blkio: -", "io: unified", "devices: unified"},
		},
	} {
		c.set.sort()
		for _, row := range c.want {
			name, want, _ := strings.Cut(row, ": ")
			got := "-"
			if h, ok := c.set.ByController(name); ok {
				got = h.Name()
			}
			if got != want {
				t.Errorf("%s: %q is in %s, want %s", c.what, name, got, want)
			}
			if listed := slices.Contains(c.set.Controllers(), name); listed != (want != "-") {
				t.Errorf("%s: %q listed: %v", c.what, name, listed)
			}
		}
		if list := c.set.Controllers(); len(slices.Compact(slices.Clone(list))) != len(list) {
			t.Errorf("%s: twice in %q", c.what, list)
		}
	}

	unified := v2("io", "memory")
	for name, want := range map[string]string{"memory": "memory", "io": "io", "blkio": "io", "freezer": "", "devices": "", "cpuacct": "", "nosuch": ""} {
		if got := unified.Enables(name); got != want {
			t.Errorf("v2: %q enables %q, want %q", name, got, want)
		}
	}
	if got := v1("memory").Enables("memory"); got != "" {
		t.Errorf("v1 enables %q", got)
	}
}

// TestMissing: what no hierarchy has is named, with the hosts that have it.
func TestMissing(t *testing.T) {
	for _, c := range []struct {
		name, want string
		is         error
	}{
		{"net_cls", "cgroup v1", ErrUnsupported},
		{"net_prio", "cgroup v1", ErrUnsupported},
		{"dmem", "cgroup v2", ErrUnsupported},
		{"memory", "mounted on cgroup v1 or enabled on v2", ErrUnsupported},
		{"nosuch", `"nosuch"`, ErrNoController},
		{"a\nb", `"a\nb"`, ErrNoController},
	} {
		err := (&Set{}).Missing(c.name)
		wantErr(t, c.name, err, c.is)
		if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), strings.Trim(c.name, "\nab")) {
			t.Errorf("%q: %v, without %q", c.name, err, c.want)
		}
	}
}
