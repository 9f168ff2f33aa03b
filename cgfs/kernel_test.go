package cgfs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// open opens all hierarchies of this machine for the length of a test.
func open(t testing.TB, o Options) *Set {
	t.Helper()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func find(t testing.TB, s *Set, controller string) *Hierarchy {
	t.Helper()
	h, ok := s.ByController(controller)
	if controller == "unified" {
		h, ok = s.Unified()
	}
	if !ok {
		t.Fatalf("no hierarchy of %s", controller)
	}
	return h
}

// check ends the test at an error.
func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

// place is a hierarchy in a test, with a directory of the test's own in it:
// its handle, and how the rest of the machine sees it.
type place struct {
	h    *Hierarchy
	dir  *Dir
	path string
}

// each runs a test on every kind of hierarchy that this machine has.
func each(t *testing.T, f func(t *testing.T, p place)) {
	cgtest.Require(t, cgtest.Root)
	for _, c := range kinds(t) {
		t.Run(c, func(t *testing.T) {
			cgtest.NoLeaks(t)
			f(t, newPlace(t, open(t, Options{}), c))
		})
	}
}

// kinds names a controller of each kind of hierarchy that this machine has.
func kinds(t *testing.T) []string {
	t.Helper()
	s, err := Open(Options{})
	check(t, err)
	defer s.Close()
	var have []string
	for _, c := range []string{"memory", "freezer", "cpuset"} {
		if h, ok := s.ByController(c); ok && h.Version() == V1 {
			have = append(have, c)
		}
	}
	if _, ok := s.Unified(); ok {
		have = append(have, "unified")
	}
	if len(have) == 0 {
		t.Fatal("no cgroups are mounted")
	}
	return have
}

func newPlace(t testing.TB, s *Set, controller string) place {
	t.Helper()
	h := find(t, s, controller)
	root, err := h.Open("/")
	check(t, err)
	defer root.Close()
	name := cgtest.Name(t)
	d, err := root.Mkdir(name, 0, 0)
	check(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return place{h, d, filepath.Join(cgtest.Mount(t, controller), name)}
}

func (p place) write(t testing.TB, file, value string) {
	t.Helper()
	check(t, os.WriteFile(filepath.Join(p.path, file), []byte(value), 0))
}

func (p place) read(t testing.TB, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.path, file))
	check(t, err)
	return strings.TrimSpace(string(b))
}

func mkdir(t testing.TB, d *Dir, name string) *Dir {
	t.Helper()
	c, err := d.Mkdir(name, 0, 0)
	check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestKernelDiscovery(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	s := open(t, Options{})
	hs := s.Hierarchies()
	unified := slices.Contains(kinds(t), "unified")
	for i, h := range hs {
		want := "tasks"
		if last := i == len(hs)-1; last && unified {
			want = "cgroup.procs"
		}
		if v2 := want == "cgroup.procs"; h.TasksFile() != want || v2 != (h.Version() == V2) || v2 != (h.Name() == "unified") {
			t.Errorf("hierarchy %d of %d is %s, version %d, tasks in %s", i+1, len(hs), h.Name(), h.Version(), h.TasksFile())
		}
	}
	for _, c := range s.Controllers() {
		h, ok := s.ByController(c)
		if _, other := h.other(c); !ok || !h.Has(c) && !other || !slices.Contains(hs, h) {
			t.Errorf("controller %s: not found in its hierarchy", c)
		}
	}
	if !slices.IsSortedFunc(s.Controllers(), func(a, b string) int { return strings.Compare(bare(a), bare(b)) }) {
		t.Errorf("not sorted: %q", s.Controllers())
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	check(t, err)
	for _, h := range hs {
		path, ok := ProcCgroup(self).Path(h)
		if !ok {
			t.Errorf("%s: no path of our own", h.Name())
			continue
		}
		d, err := h.Open(path)
		check(t, err)
		procs, err := d.Procs()
		if err != nil || !slices.Contains(procs, int32(os.Getpid())) {
			t.Errorf("%s: %d is not among %d (%v)", h.Name(), os.Getpid(), procs, err)
		}
		if populated, err := d.Populated(); err != nil || !populated {
			t.Errorf("%s: populated %v, %v", h.Name(), populated, err)
		}
		check(t, d.Close())
	}

	less := open(t, Options{Skip: []string{"memory", "systemd", "hugetlb"}})
	for _, c := range []string{"memory", "systemd", "hugetlb"} {
		if _, ok := less.ByController(c); ok {
			t.Errorf("%s is there, though skipped", c)
		}
	}
	if _, ok := less.Unified(); ok != unified {
		t.Error("a skipped controller took all of v2 with it")
	}
	none := open(t, Options{Skip: []string{"unified"}})
	if _, ok := none.Unified(); ok {
		t.Error("unified is there, though skipped")
	}
}

func TestKernelMount(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	cgtest.NoLeaks(t)
	token := "name=cgmtest." + strconv.Itoa(os.Getpid())
	cgtest.Discard(t, token)
	s, err := Open(Options{Mount: []string{token}})
	check(t, err)
	defer s.Close()
	h := find(t, s, token)
	if !h.Named() || h.Version() != V1 || h.Name() != token {
		t.Errorf("got %s, version %d", h.Name(), h.Version())
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	check(t, err)
	if path, ok := ProcCgroup(self).Path(h); !ok || path != "/" {
		t.Errorf("own path %q, %v", path, ok)
	}
	root, err := h.Open("/")
	check(t, err)
	defer root.Close()
	c, err := root.Mkdir("cgmtest-x", 0, 0)
	check(t, err)
	check(t, c.Close())
	// A second one finds the same hierarchy, though it is not mounted anywhere.
	again := open(t, Options{Mount: []string{token}})
	c, err = find(t, again, token).Open("/cgmtest-x")
	check(t, err)
	check(t, c.Close())
	check(t, root.Rmdir("cgmtest-x"))

	for _, bad := range []string{"nosuch", "name=", "name=a b"} {
		s, err := Open(Options{Mount: []string{bad}})
		if err == nil {
			_ = s.Close()
			t.Errorf("Mount %q: no error", bad)
		}
	}
	for _, h := range again.Hierarchies() {
		for _, c := range h.Controllers() {
			// Not even with v2 out of sight.
			for _, o := range []Options{{Mount: []string{c}}, {Mount: []string{c}, Skip: []string{"unified"}}} {
				s, err := Open(o)
				if err == nil {
					check(t, s.Close())
				}
				if (err != nil) != (h.Version() == V2) {
					t.Errorf("Mount %q, which v%d has: got %v", c, h.Version(), err)
				}
			}
		}
	}
}

// Options of the mount are no controllers: "all" would take every one that is
// free.
func TestKernelMountToken(t *testing.T) {
	for _, good := range []string{"memory", "name=a", "name=A-z_0.9", "name=" + strings.Repeat("a", 63)} {
		if !validToken(good) {
			t.Errorf("%q refused", good)
		}
	}
	for _, bad := range []string{
		"", "all", "none", "noprefix", "xattr", "clone_children", "cpuset_v2_mode", "favordynmods", "release_agent=/x",
		"name=", "name=a b", "name=a,memory", "name=a:b", "name=" + strings.Repeat("a", 64), "#subsys_name", "memory\t", "\nmemory",
	} {
		if validToken(bad) {
			t.Errorf("%q accepted", bad)
		}
	}
}

// No child of the daemon's inherits a handle.
func TestKernelCloexec(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		fds := []int{p.h.fd, p.dir.fd, mkdir(t, p.dir, "c").fd}
		for _, what := range []For{ForFacts, ForRead, ForWrite} {
			f, err := p.dir.File("cgroup.procs", what)
			check(t, err)
			defer f.Close()
			fds = append(fds, f.fd)
		}
		for i, fd := range fds {
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("handle %d: descriptor flags %x, %v", i, flags, err)
			}
		}
	})
}

func TestKernelMkdir(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		const uid, gid = 100000, 100001
		c, err := p.dir.Mkdir("c", uid, gid)
		check(t, err)
		defer c.Close()
		if want := p.dir.Path() + "/c"; c.Path() != want {
			t.Errorf("path %q, want %q", c.Path(), want)
		}
		entries, err := os.ReadDir(filepath.Join(p.path, "c"))
		check(t, err)
		files, err := c.Files()
		check(t, err)
		if p.h.Version() == V2 { // has no such files of its own
			files = slices.DeleteFunc(files, func(f string) bool { return ControllerOf(f) == "devices" })
		}
		if len(files) != len(entries) || len(files) < 4 {
			t.Errorf("%d files, the directory has %d", len(files), len(entries))
		}
		for _, name := range append(files, "") {
			var st unix.Stat_t
			check(t, unix.Stat(filepath.Join(p.path, "c", name), &st))
			if st.Uid != uid || st.Gid != gid {
				t.Errorf("%q belongs to %d:%d", name, st.Uid, st.Gid)
			}
		}
		_, err = p.dir.Mkdir("c", uid, gid)
		wantErr(t, "a second time", err, fs.ErrExist)

		// Below somebody else's directory, in another one's name.
		g, err := c.Mkdir("g", 200000, 200000)
		check(t, err)
		defer g.Close()
		if a, err := g.Attr(); err != nil || a.UID != 200000 || a.GID != 200000 {
			t.Errorf("grandchild: %+v, %v", a, err)
		}

		_, err = p.dir.Mkdir("n", NoID, 0)
		wantErr(t, "nobody's directory", err, unix.EINVAL)
		for _, bad := range []string{"", ".", "..", "a/b", "/a", "../a", "a\x00b", strings.Repeat("a", 256)} {
			_, err := p.dir.Mkdir(bad, 0, 0)
			wantErr(t, strconv.Quote(bad), err, ErrName)
			wantErr(t, "rmdir "+strconv.Quote(bad), p.dir.Rmdir(bad), ErrName)
		}
		wantErr(t, "rmdir with a child", p.dir.Rmdir("c"), unix.EBUSY)
		check(t, c.Rmdir("g"))
		check(t, p.dir.Rmdir("c"))
		wantErr(t, "rmdir of nothing", p.dir.Rmdir("c"), fs.ErrNotExist)
	})
}

// TestKernelThreads proves that no thread keeps somebody else's ids.
func TestKernelThreads(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		for range 20 {
			c, err := p.dir.Mkdir("c", 100000, 100000)
			check(t, err)
			check(t, c.Close())
			check(t, p.dir.Rmdir("c"))
			_, err = p.dir.Mkdir("no/such", 100000, 100000)
			wantErr(t, "bad name", err, ErrName)
			_, err = c.Mkdir("x", 100000, 100000)
			wantErr(t, "closed directory", err, unix.EBADF)
		}
		tasks, err := os.ReadDir("/proc/self/task")
		check(t, err)
		for _, task := range tasks {
			b, err := os.ReadFile("/proc/self/task/" + task.Name() + "/status")
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); f[0] == "Uid:" || f[0] == "Gid:" {
					if f[4] != "0" {
						t.Errorf("thread %s: %s", task.Name(), line)
					}
				}
			}
		}
		if bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0); err != nil || bits != 0 {
			t.Errorf("securebits %d, %v", bits, err)
		}
	})
}

func TestKernelCpuset(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	cgtest.NoLeaks(t)
	p := newPlace(t, open(t, Options{}), "cpuset")
	if p.read(t, "cpuset.cpus") == "" || p.read(t, "cpuset.mems") == "" {
		t.Error("empty cpus or mems")
	}
	p.write(t, "cpuset.cpus", "0")
	c := mkdir(t, p.dir, "c")
	if b, err := c.read("cpuset.cpus", 100); err != nil || string(b) != "0\n" {
		t.Errorf("the child has %q, %v; its parent 0", b, err)
	}
	if v := p.read(t, "cgroup.clone_children"); v != "0" {
		t.Errorf("clone_children is %s", v)
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(p.path), "cgroup.clone_children"))
	if err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Errorf("the root's clone_children is %q, %v", b, err)
	}
}

func TestKernelOpen(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		c := mkdir(t, mkdir(t, p.dir, "a"), "b")
		d, err := p.dir.Open("a/b")
		check(t, err)
		defer d.Close()
		same, err := p.h.Open(d.Path())
		check(t, err)
		defer same.Close()
		again, err := d.Open("")
		check(t, err)
		defer again.Close()
		want, err := c.Attr()
		check(t, err)
		for _, x := range []*Dir{d, same, again} {
			if a, err := x.Attr(); err != nil || a != want || x.Path() != c.Path() || x.Hierarchy() != p.h {
				t.Errorf("%s: %+v, %v; want %+v", x.Path(), a, err, want)
			}
		}
		for _, bad := range []string{"..", "../x", "a/..", "a/../a", "/", "/a", "a/", "a//b", ".", "a\x00"} {
			_, err := p.dir.Open(bad)
			wantErr(t, "open "+strconv.Quote(bad), err, ErrName)
		}
		for _, bad := range []string{"", "a", "//", "/..", "/../x", "/a/", "/a\x00"} {
			_, err := p.h.Open(bad)
			wantErr(t, "open from the root "+strconv.Quote(bad), err, ErrName)
			_, err = p.h.Open("/secret" + bad)
			if bad != "" && bad != "a" && (!errors.Is(err, ErrName) || strings.Contains(err.Error(), "secret")) {
				t.Errorf("open below secret %q: got %v, want ErrName and no word of it", bad, err)
			}
		}
		_, err = p.dir.Open("nosuch")
		wantErr(t, "open nosuch", err, fs.ErrNotExist)
		_, err = p.dir.Open("cgroup.procs")
		wantErr(t, "a file as a directory", err, unix.ENOTDIR)
	})
}

func TestKernelFile(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		mkdir(t, p.dir, "child")
		for _, what := range []For{ForFacts, ForRead, ForWrite} {
			f, err := p.dir.File("cgroup.procs", what)
			check(t, err)
			a, err := f.Attr()
			if err != nil || a.Mode != unix.S_IFREG|0o644 || a.UID != 0 || f.Name() != "cgroup.procs" {
				t.Errorf("%s: %+v, %v", f.Name(), a, err)
			}
			// What a handle is good for besides: ownership, always.
			check(t, f.SetOwner(1000, NoID))
			check(t, f.SetOwner(NoID, 1001))
			check(t, f.SetMode(0o664))
			var st unix.Stat_t
			check(t, unix.Stat(filepath.Join(p.path, "cgroup.procs"), &st))
			if st.Uid != 1000 || st.Gid != 1001 || st.Mode != unix.S_IFREG|0o664 {
				t.Errorf("now %d:%d %o", st.Uid, st.Gid, st.Mode)
			}
			check(t, f.SetOwner(0, 0))
			check(t, f.SetMode(0o644))
			check(t, f.Close())
			check(t, f.Close())
		}
		for _, bad := range []string{"", ".", "..", "../cgroup.procs", "/cgroup.procs", "child/cgroup.procs", "a\x00", "../../../../../etc/hostname"} {
			_, err := p.dir.File(bad, ForRead)
			wantErr(t, strconv.Quote(bad), err, ErrName)
		}
		for _, what := range []For{ForFacts, ForRead, ForWrite} {
			if _, err := p.dir.File("child", what); err == nil {
				t.Errorf("a cgroup was opened as a file, for %d", what)
			}
			_, err := p.dir.File("nosuch", what)
			wantErr(t, "nosuch", err, fs.ErrNotExist)
		}
		if _, err := os.Stat(filepath.Join(p.path, "nosuch")); err == nil {
			t.Error("nosuch was created")
		}

		f, err := p.dir.File("cgroup.procs", ForWrite)
		check(t, err)
		defer f.Close()
		wantErr(t, "zero byte", f.Write("0\x000"), ErrValue)
		wantErr(t, "long value", f.Write(strings.Repeat("1", 4096)), ErrTooBig)
		wantErr(t, "nonsense", f.Write("nonsense"), unix.EINVAL)
	})
}

func TestKernelDirOwner(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		check(t, p.dir.SetOwner(1000, NoID))
		check(t, p.dir.SetOwner(NoID, 1001))
		check(t, p.dir.SetMode(0o750))
		if a, err := p.dir.Attr(); err != nil || a.UID != 1000 || a.GID != 1001 || a.Mode != unix.S_IFDIR|0o750 {
			t.Errorf("%+v, %v", a, err)
		}
		var st unix.Stat_t
		check(t, unix.Stat(filepath.Join(p.path, "cgroup.procs"), &st))
		if st.Uid != 0 || st.Gid != 0 {
			t.Errorf("cgroup.procs went along, to %d:%d", st.Uid, st.Gid)
		}
		for _, name := range p.h.DelegationFiles() {
			f, err := p.dir.File(name, ForFacts)
			if errors.Is(err, fs.ErrNotExist) && p.h.Version() == V2 {
				continue
			}
			check(t, err)
			check(t, f.Close())
		}
	})
}

func TestKernelChildren(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		for _, n := range []string{"b", "a", "ä", "x\xff", "y\x1b[0m", "z\x7f"} {
			check(t, os.Mkdir(filepath.Join(p.path, n), 0o755))
		}
		names, hidden, err := p.dir.Children()
		if err != nil || !slices.Equal(names, []string{"a", "b", "ä"}) || hidden != 3 {
			t.Errorf("got %q and %d hidden, %v", names, hidden, err)
		}
		// They are there all the same for what needs all.
		var seen []string
		check(t, p.dir.Walk(func(d *Dir) error {
			seen = append(seen, strings.TrimPrefix(d.Path(), p.dir.Path()))
			return nil
		}))
		slices.Sort(seen)
		if want := []string{"", "/a", "/b", "/x\xff", "/y\x1b[0m", "/z\x7f", "/ä"}; !slices.Equal(seen, want) {
			t.Errorf("walked %q, want %q", seen, want)
		}
	})
}

func TestKernelTasks(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		mkdir(t, p.dir, "a")
		d := mkdir(t, mkdir(t, p.dir, "b"), "c")
		populated := func(want bool) {
			t.Helper()
			for _, x := range []*Dir{p.dir, d} {
				if got, err := x.Populated(); err != nil || got != want {
					t.Errorf("%s: populated %v, %v; want %v", x.Path(), got, err, want)
				}
			}
		}
		populated(false)
		pid := cgtest.Child(t)
		f, err := d.File(p.h.TasksFile(), ForWrite)
		check(t, err)
		defer f.Close()
		check(t, f.Write(strconv.Itoa(pid)))
		populated(true)
		for name, list := range map[string]func() ([]int32, error){"procs": d.Procs, "threads": d.Threads} {
			if got, err := list(); err != nil || !slices.Equal(got, []int32{int32(pid)}) {
				t.Errorf("%s: %d, %v; want %d", name, got, err, pid)
			}
		}
		self, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
		check(t, err)
		if path, ok := ProcCgroup(self).Path(p.h); !ok || path != d.Path() {
			t.Errorf("the task says %q, %v; want %q", path, ok, d.Path())
		}
		err = p.dir.RemoveTree("b", nil)
		wantErr(t, "remove with a task", err, unix.EBUSY)
		root, err := p.h.Open("/")
		check(t, err)
		defer root.Close()
		check(t, root.write(p.h.TasksFile(), strconv.Itoa(pid)))
		populated(false)
		if got, err := d.Procs(); err != nil || len(got) != 0 {
			t.Errorf("left: %d, %v", got, err)
		}
	})
}

func TestKernelWalkAndRemoveTree(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		for _, n := range []string{"a", "a/b", "a/b/c", "a/d", "e", "a/x\xff"} {
			check(t, os.Mkdir(filepath.Join(p.path, n), 0o755))
		}
		var order []string
		check(t, p.dir.RemoveTree("a", func(d *Dir) error {
			order = append(order, strings.TrimPrefix(d.Path(), p.dir.Path()+"/"))
			return nil
		}))
		for i, d := range order {
			for _, later := range order[i:] {
				if strings.HasPrefix(later, d+"/") {
					t.Errorf("%s before %s below it", d, later)
				}
			}
		}
		if len(order) != 5 {
			t.Errorf("removed %q", order)
		}
		if names, _, err := p.dir.Children(); err != nil || !slices.Equal(names, []string{"e"}) {
			t.Errorf("left: %q, %v", names, err)
		}
		wantErr(t, "remove nothing", p.dir.RemoveTree("a", nil), fs.ErrNotExist)
		stop := errors.New("stop")
		wantErr(t, "an error of before", p.dir.RemoveTree("e", func(*Dir) error { return stop }), stop)
		if _, err := os.Stat(filepath.Join(p.path, "e")); err != nil {
			t.Errorf("e went though before said no: %v", err)
		}
	})
}

func TestKernelMarks(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		absent := func() {
			t.Helper()
			if v, ok, err := p.dir.Mark("x"); v != "" || ok || err != nil {
				t.Errorf("got %q, %v, %v", v, ok, err)
			}
		}
		absent()
		check(t, p.dir.ClearMark("x"))
		check(t, p.dir.SetMark("x", "1 2"))
		if v, ok, err := p.dir.Mark("x"); v != "1 2" || !ok || err != nil {
			t.Errorf("got %q, %v, %v", v, ok, err)
		}
		var buf [16]byte
		if n, err := unix.Getxattr(p.path, "trusted.cgmanager.x", buf[:]); err != nil || string(buf[:n]) != "1 2" {
			t.Errorf("the attribute holds %q, %v", buf[:max(n, 0)], err)
		}
		check(t, p.dir.ClearMark("x"))
		absent()
		wantErr(t, "a long mark", p.dir.SetMark("x", strings.Repeat("a", 257)), ErrTooBig)
	})
}

func TestKernelFreeze(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		able := p.h.Version() == V2 || p.h.Has("freezer")
		if p.dir.CanFreeze() != able {
			t.Fatalf("CanFreeze is %v", !able)
		}
		ctx, cancel := context.WithTimeout(t.Context(), cgtest.Patience(5*time.Second))
		defer cancel()
		if !able {
			wantErr(t, "freeze", p.dir.Freeze(ctx), ErrUnsupported)
			wantErr(t, "thaw", p.dir.Thaw(), ErrUnsupported)
			return
		}
		c := mkdir(t, p.dir, "c")
		pid := cgtest.Child(t)
		check(t, c.write(p.h.TasksFile(), strconv.Itoa(pid)))
		is := func(d *Dir, want bool) {
			t.Helper()
			if got, err := d.Frozen(); err != nil || got != want {
				t.Errorf("%s: frozen %v, %v; want %v", d.Path(), got, err, want)
			}
		}
		is(p.dir, false)
		check(t, p.dir.Freeze(ctx))
		check(t, p.dir.Freeze(ctx))
		is(p.dir, true)
		is(c, false) // its parent is, it itself not
		// The task has stopped: even SIGKILL waits on v1.
		if p.h.Version() == V1 {
			check(t, unix.Kill(pid, unix.SIGKILL))
			time.Sleep(20 * time.Millisecond)
			if err := unix.Kill(pid, 0); err != nil {
				t.Errorf("the task did not stop: %v", err)
			}
			if b, err := c.Procs(); err != nil || len(b) != 1 {
				t.Errorf("the task is gone: %v, %v", b, err)
			}
		}
		check(t, p.dir.Thaw())
		is(p.dir, false)

		root, err := p.h.Open("/")
		check(t, err)
		defer root.Close()
		if root.CanFreeze() {
			t.Error("the root can be frozen")
		}
	})
}

// Freeze returns when all have stopped, not before. A task that computes takes
// its time.
func TestKernelFreezeWaits(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		file, stopped := "freezer.state", "FROZEN"
		if p.h.Version() == V2 {
			file, stopped = "cgroup.events", "frozen 1"
		}
		if !p.dir.CanFreeze() {
			return
		}
		for range 4 {
			check(t, p.dir.write(p.h.TasksFile(), strconv.Itoa(cgtest.Child(t, "sh", "-c", "while :; do :; done"))))
		}
		ctx, cancel := context.WithTimeout(t.Context(), cgtest.Patience(10*time.Second))
		defer cancel()
		for range 20 {
			check(t, p.dir.Freeze(ctx))
			b, err := p.dir.read(file, 100)
			if err != nil || !strings.Contains(string(b), stopped) {
				t.Fatalf("after Freeze %s reads %q, %v", file, b, err)
			}
			check(t, p.dir.Thaw())
			time.Sleep(time.Millisecond)
		}
	})
}

// A context that has ended freezes nobody.
func TestKernelFreezeLate(t *testing.T) {
	each(t, func(t *testing.T, p place) {
		if !p.dir.CanFreeze() {
			return
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantErr(t, "freeze", p.dir.Freeze(ctx), context.Canceled)
		if frozen, err := p.dir.Frozen(); err != nil || frozen {
			t.Errorf("frozen %v, %v", frozen, err)
		}
	})
}

// What v2 has can be enabled, again too, and shows in the children.
func TestKernelEnable(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V2)
	cgtest.NoLeaks(t)
	s := open(t, Options{})
	p := newPlace(t, s, "unified")
	wantErr(t, "enable what is none", p.dir.Enable("nosuch"), ErrNoController)
	root, err := p.h.Open("/")
	check(t, err)
	defer root.Close()
	available, err := root.Available()
	check(t, err)
	for _, c := range p.h.Controllers() {
		if !slices.Contains(available, c) {
			t.Errorf("%s is listed, the root has %q", c, available)
		}
	}
	enabled, err := p.dir.Available() // by whoever runs this machine
	check(t, err)
	for _, c := range available {
		if !slices.Contains(enabled, c) {
			wantErr(t, "enable "+c+", which its parent did not", p.dir.Enable(c), ErrNoController)
		}
		check(t, root.Enable(c))
		check(t, p.dir.Enable(c))
		check(t, p.dir.Enable(c))
		if !slices.Contains(strings.Fields(p.read(t, "cgroup.subtree_control")), c) {
			t.Errorf("%s is not enabled", c)
		}
		_, err = p.dir.Mkdir(c+".x", 0, 0)
		wantErr(t, "a control file's name", err, ErrName)
	}
	_, err = p.dir.Mkdir("cgroup.x", 0, 0)
	wantErr(t, "a control file's name", err, ErrName)
	for _, h := range s.Hierarchies() {
		if h.Version() == V1 && !h.Named() {
			c := h.Controllers()[0]
			wantErr(t, "enable "+c+", which v1 has", p.dir.Enable(c), ErrNoController)
			mkdir(t, p.dir, c+".x")
		}
	}
}

// On v1 there is nothing to enable, and no name is a control file's.
func TestKernelEnableV1(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1)
	cgtest.NoLeaks(t)
	m := newPlace(t, open(t, Options{}), "memory")
	check(t, m.dir.Enable("memory"))
	mkdir(t, m.dir, "memory.max")
}

// A list of more than a page, of a process with more threads than that.
func TestKernelManyTasks(t *testing.T) {
	const threads = 1100
	if os.Getenv("CGM_TEST_THREADS") != "" {
		for range threads {
			go func() {
				runtime.LockOSThread()
				_ = unix.Pause()
			}()
		}
		time.Sleep(10 * time.Minute)
		return
	}
	cgtest.Require(t, cgtest.Root)
	for _, controller := range kinds(t) {
		if controller == "cpuset" || controller == "freezer" {
			continue // v1 once is enough
		}
		t.Run(controller, func(t *testing.T) {
			cgtest.NoLeaks(t)
			p := newPlace(t, open(t, Options{}), controller)
			pid := cgtest.Child(t, "/usr/bin/env", "CGM_TEST_THREADS=1", "/proc/"+strconv.Itoa(os.Getpid())+"/exe", "-test.run=^TestKernelManyTasks$")
			check(t, p.dir.write("cgroup.procs", strconv.Itoa(pid)))
			var want []int32
			cgtest.Until(10*time.Second, 10*time.Millisecond, func() bool {
				entries, err := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task")
				check(t, err)
				want = want[:0]
				for _, e := range entries {
					tid, err := strconv.Atoi(e.Name())
					check(t, err)
					want = append(want, int32(tid))
				}
				return len(want) > threads
			})
			got, err := p.dir.Threads()
			check(t, err)
			// The runtime of the other process may start a thread meanwhile.
			slices.Sort(got)
			slices.Sort(want)
			if len(want) <= threads || len(got) < len(want) || len(got) > len(want)+10 {
				t.Fatalf("%d threads listed, the process has %d", len(got), len(want))
			}
			for _, tid := range want {
				if _, ok := slices.BinarySearch(got, tid); !ok {
					t.Errorf("thread %d is missing", tid)
				}
			}
			if procs, err := p.dir.Procs(); err != nil || !slices.Equal(procs, []int32{int32(pid)}) {
				t.Errorf("procs: %d, %v; want %d", procs, err, pid)
			}
			f, err := p.dir.File(map[bool]string{true: "cgroup.threads", false: "tasks"}[p.h.Version() == V2], ForRead)
			check(t, err)
			defer f.Close()
			_, err = f.Read(4096)
			wantErr(t, "a bound of a page", err, ErrTooBig)
		})
	}
}
