package privcheck_test

import (
	"testing"

	. "cgmanager/privcheck"
)

func TestIDMap(t *testing.T) {
	two := IDMap{{Inside: 0, Outside: 100000, Count: 10}, {Inside: 1000, Outside: 1000, Count: 1}}
	wide := IDMap{{Inside: 10, Outside: 20, Count: NoID}} // runs over the end of both columns
	for _, tc := range []struct {
		name            string
		m               IDMap
		inside, outside uint32 // NoID where the other has none
	}{
		{"first", two, 0, 100000},
		{"last of a range", two, 9, 100009},
		{"second range", two, 1000, 1000},
		{"identity", identity, 0, 0},
		{"identity, largest id", identity, NoID - 1, NoID - 1},
		{"in front of the end", wide, NoID - 11, NoID - 1},
	} {
		if in, ok := tc.m.ToInside(tc.outside); !ok || in != tc.inside {
			t.Errorf("%s: ToInside(%d) = %d, %v, want %d", tc.name, tc.outside, in, ok, tc.inside)
		}
		if out, ok := tc.m.ToOutside(tc.inside); !ok || out != tc.outside {
			t.Errorf("%s: ToOutside(%d) = %d, %v, want %d", tc.name, tc.inside, out, ok, tc.outside)
		}
		if !tc.m.Mapped(tc.outside) {
			t.Errorf("%s: %d is not mapped", tc.name, tc.outside)
		}
	}
	// The kernel takes no map that wraps; here it must not make ids up either.
	wrapsIn := IDMap{{Inside: NoID - 1, Outside: 100, Count: 10}}
	wrapsOut := IDMap{{Inside: 100, Outside: NoID - 1, Count: 10}}
	for _, tc := range []struct {
		name string
		m    IDMap
		id   uint32
	}{
		{"empty", nil, 0},
		{"below", two, 99999},
		{"above", two, 100010},
		{"between", two, 1001},
		{"an inside number is no outside one", two, 0},
		{"no id", identity, NoID},
		{"no id, beyond a range", IDMap{{Inside: 0, Outside: 100, Count: NoID}}, NoID},
		{"NoID inside", wrapsIn, 101},
		{"wrapped inside", wrapsIn, 102},
	} {
		if in, ok := tc.m.ToInside(tc.id); ok || in != NoID {
			t.Errorf("%s: ToInside(%d) = %d, %v, want none", tc.name, tc.id, in, ok)
		}
		if tc.m.Mapped(tc.id) {
			t.Errorf("%s: %d is mapped", tc.name, tc.id)
		}
	}
	for _, tc := range []struct {
		name string
		m    IDMap
		id   uint32
	}{
		{"empty", nil, 0},
		{"above", two, 10},
		{"below", IDMap{{Inside: 5, Outside: 100, Count: 10}}, 4},
		{"no id", identity, NoID},
		{"no id, beyond a range", IDMap{{Inside: 100, Outside: 0, Count: NoID}}, NoID},
		{"NoID outside", wrapsOut, 101},
		{"wrapped outside", wrapsOut, 102},
	} {
		if out, ok := tc.m.ToOutside(tc.id); ok || out != NoID {
			t.Errorf("%s: ToOutside(%d) = %d, %v, want none", tc.name, tc.id, out, ok)
		}
	}
}

func TestBelow(t *testing.T) {
	for _, tc := range []struct {
		dir, path string
		want      bool
	}{
		{"/", "/", true},
		{"/", "/a", true},
		{"/a", "/a", true},
		{"/a", "/a/b/c", true},
		{"/a", "/ab", false},
		{"/a", "/", false},
		{"/a/b", "/a", false},
		{"/a", "/b/a", false},
		{"/", "/a (deleted)", true},
		// What is no path lies nowhere.
		{"", "/a", false},
		{"", "", false},
		{"/", "", false},
		{"/", "a", false},
		{"a", "a/b", false},
		{"ab", "ab", false},
		{"/", "ab", false},
		{"/a", "/a/", false},
		{"/a/", "/a/", false},
		{"/", "//", false},
		{"/", "//a", false},
		{"/a", "/a//b", false},
		{"/a", "/a/..", false},
		{"/a", "/a/../b", false},
		{"/a", "/a/./b", false},
		{"/..", "/../a", false},
		{"/", "/..", false},
		{"/a/.", "/a/.", false},
	} {
		if got := Below(tc.dir, tc.path); got != tc.want {
			t.Errorf("Below(%q, %q) = %v, want %v", tc.dir, tc.path, got, tc.want)
		}
	}
}

func TestCommonAncestor(t *testing.T) {
	for _, tc := range []struct{ a, b, want string }{
		{"/", "/", "/"},
		{"/a", "/a", "/a"},
		{"/a/b", "/a/c", "/a"},
		{"/a/b/c", "/a", "/a"},
		{"/a", "/a/b/c", "/a"},
		{"/a/b", "/ab/b", "/"},
		{"/ab", "/a", "/"},
		{"/", "/a/b", "/"},
		{"", "/a", ""},
		{"/a", "", ""},
		{"a", "/a", ""},
		{"/a", "/a/../b", ""},
		{"/a//b", "/a", ""},
	} {
		if got := CommonAncestor(tc.a, tc.b); got != tc.want {
			t.Errorf("CommonAncestor(%q, %q) = %q, want %q", tc.a, tc.b, got, tc.want)
		}
	}
}

func TestRequestor(t *testing.T) {
	for _, tc := range []struct {
		name                string
		r                   Requestor
		root, outside, host bool
	}{
		{"host root", hostRoot, true, false, true},
		{"owner", owner, false, false, false},
		{"container root", ctRoot, true, true, false},
		{"container user", ctUser, false, true, false},
		{"privileged container", privRoot, true, true, false},
		{"unmapped", unmapped, false, true, false},
		{"nobody", Requestor{}, false, true, false},
	} {
		if got := tc.r.RootInUserNS(); got != tc.root {
			t.Errorf("%s: RootInUserNS() = %v", tc.name, got)
		}
		if got := tc.r.Outside(); got != tc.outside {
			t.Errorf("%s: Outside() = %v", tc.name, got)
		}
		if got := tc.r.HostRoot(); got != tc.host {
			t.Errorf("%s: HostRoot() = %v", tc.name, got)
		}
	}
}
