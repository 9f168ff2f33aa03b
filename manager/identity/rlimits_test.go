package identity_test

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/manager/identity"
)

const someLimits = `Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max locked memory         8388608              unlimited            bytes     
Max nice priority         0                    31                   
Max realtime priority     10                   18446744073709551614 
Max realtime timeout      199999               200000               us        
`

func TestParseRLimits(t *testing.T) {
	ls, err := identity.ParseRLimits([]byte(someLimits))
	if err != nil {
		t.Fatal(err)
	}
	for number, want := range map[int]unix.Rlimit{
		unix.RLIMIT_MEMLOCK: {Cur: 8388608, Max: unix.RLIM_INFINITY},
		unix.RLIMIT_NICE:    {Cur: 0, Max: 31},
		unix.RLIMIT_RTPRIO:  {Cur: 10, Max: unix.RLIM_INFINITY - 1},
		unix.RLIMIT_RTTIME:  {Cur: 199999, Max: 200000},
	} {
		if ls[number] != want {
			t.Errorf("limit %d: %+v, want %+v", number, ls[number], want)
		}
	}
	for name, bad := range map[string]string{
		"empty":       "",
		"cut":         someLimits[:len(someLimits)-60],
		"a number":    strings.Replace(someLimits, "199999", "19x999", 1),
		"hard":        strings.Replace(someLimits, "200000", "-20000", 1),
		"another one": strings.Replace(someLimits, "Max nice", "Max mice", 1),
	} {
		if ls, err := identity.ParseRLimits([]byte(bad)); err == nil {
			t.Errorf("%s: %v", name, ls)
		}
	}
}

func FuzzParseRLimits(f *testing.F) {
	f.Add([]byte(someLimits))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ls, err := identity.ParseRLimits(b); err == nil && len(ls) != 4 {
			t.Errorf("%v", ls)
		}
	})
}

// What /proc says is what getrlimit(2) does, and the parent is the one that it is.
func TestKernelRLimits(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	p := open(t, os.Getpid())
	ls, err := p.RLimits()
	if err != nil {
		t.Fatal(err)
	}
	for _, number := range []int{unix.RLIMIT_MEMLOCK, unix.RLIMIT_NICE, unix.RLIMIT_RTPRIO, unix.RLIMIT_RTTIME} {
		var want unix.Rlimit
		if err := unix.Getrlimit(number, &want); err != nil {
			t.Fatal(err)
		}
		if ls[number] != want {
			t.Errorf("limit %d: %+v, want %+v", number, ls[number], want)
		}
	}
	if ppid, err := open(t, cgtest.Child(t)).Parent(); err != nil || int(ppid) != os.Getpid() {
		t.Errorf("parent %d, %v, want %d", ppid, err, os.Getpid())
	}
}

// A container contains itself and what is below it; the host contains all.
func TestKernelWithin(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.Userns)
	host, err := identity.NewHost()
	if err != nil {
		t.Fatal(err)
	}
	in := func(pid int) identity.Nesting {
		n, err := host.Nesting(open(t, pid))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	self, one, other := in(os.Getpid()), in(namespaced(t)), in(namespaced(t))
	if self.Container() != (identity.Container{}) || one.Container() == (identity.Container{}) {
		t.Errorf("containers %+v, %+v", self.Container(), one.Container())
	}
	for _, tc := range []struct {
		name     string
		who, whm identity.Nesting
		want     bool
	}{
		{"itself", one, one, true},
		{"in the host", one, self, true},
		{"the host in it", self, one, false},
		{"beside it", other, one, false},
	} {
		if got := tc.who.Within(tc.whm.Container()); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}
