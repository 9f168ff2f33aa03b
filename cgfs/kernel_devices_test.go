package cgfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// proberEnv makes the test program a process that tries to use devices.
const proberEnv = "CGM_TEST_DEVICE_PROBER"

// TestDeviceProber is no test, but what newProber starts: for each line "KIND
// MAJOR MINOR HOW" it tries to use the device and answers with the error.
func TestDeviceProber(t *testing.T) {
	if os.Getenv(proberEnv) == "" {
		return
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var kind, how string
		var major, minor uint32
		if _, err := fmt.Sscan(lines.Text(), &kind, &major, &minor, &how); err != nil {
			os.Exit(2)
		}
		node := fmt.Sprintf("%s-%d-%d", kind, major, minor)
		var err error
		flags := map[string]int{"r": unix.O_RDONLY, "w": unix.O_WRONLY, "rw": unix.O_RDWR}
		if how == "m" {
			if err = makeNode("new", kind, major, minor); err == nil {
				err = os.Remove("new")
			}
		} else {
			var fd int
			if fd, err = unix.Open(node, flags[how]|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err == nil {
				err = unix.Close(fd)
			}
		}
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			err = nil // it may be used, but there is none
		}
		fmt.Println(err)
	}
	os.Exit(0)
}

func makeNode(name, kind string, major, minor uint32) error {
	mode := uint32(unix.S_IFCHR)
	if kind == "b" {
		mode = unix.S_IFBLK
	}
	return unix.Mknod(name, mode|0o600, int(unix.Mkdev(major, minor)))
}

// device is one that the tests ask for. Nobody has those of major 240 (local
// use, Documentation/admin-guide/devices.txt).
type device struct {
	kind         string
	major, minor uint32
}

var probed = []device{
	{"c", 1, 3},
	{"c", 1, 5},
	{"c", 240, 3},
	{"c", 240, 5},
	{"b", 240, 3},
	{"b", 240, 5},
}

// prober is a process that tries to use devices in the cgroup that it is in.
type prober struct {
	testing.TB
	pid int
	in  io.Writer
	out *bufio.Scanner
}

func newProber(t testing.TB) prober {
	t.Helper()
	dir := t.TempDir()
	for _, d := range probed {
		check(t, makeNode(filepath.Join(dir, fmt.Sprintf("%s-%d-%d", d.kind, d.major, d.minor)), d.kind, d.major, d.minor))
	}
	exe, err := os.Executable()
	check(t, err)
	cmd := exec.Command(exe, "-test.run=^TestDeviceProber$")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), proberEnv+"=1")
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	t.Cleanup(func() {
		check(t, in.Close())
		check(t, cmd.Wait())
	})
	return prober{t, cmd.Process.Pid, in, bufio.NewScanner(out)}
}

// enter moves the prober.
func (p prober) enter(d *Dir) {
	p.Helper()
	check(p, d.write("cgroup.procs", strconv.Itoa(p.pid)))
}

// may reports whether the device can be used: r, w, rw, or m.
func (p prober) may(d device, how string) bool {
	p.Helper()
	_, err := fmt.Fprintln(p.in, d.kind, d.major, d.minor, how)
	check(p, err)
	if !p.out.Scan() {
		p.Fatal("the prober is gone")
	}
	switch answer := p.out.Text(); answer {
	case "<nil>":
		return true
	case "operation not permitted":
		return false
	default:
		p.Fatalf("%v %s: %s", d, how, answer)
		return false
	}
}

// all is everything that the prober may do, in a line.
func (p prober) all() string {
	p.Helper()
	var s strings.Builder
	for _, d := range probed {
		for _, how := range []string{"r", "w", "rw", "m"} {
			if p.may(d, how) {
				fmt.Fprintf(&s, "%s %d:%d %s, ", d.kind, d.major, d.minor, how)
			}
		}
	}
	return s.String()
}

// deviceTree is a tree of cgroups in one hierarchy.
type deviceTree struct {
	testing.TB
	h    *Hierarchy
	dirs map[string]*Dir
}

func newDeviceTree(t testing.TB, h *Hierarchy) deviceTree {
	t.Helper()
	root, err := h.Open("/")
	check(t, err)
	defer root.Close()
	d, err := root.Mkdir(cgtest.Name(t), 0, 0)
	check(t, err)
	tree := deviceTree{t, h, map[string]*Dir{"": d}}
	t.Cleanup(func() {
		for _, d := range tree.dirs {
			_ = d.Close()
		}
	})
	return tree
}

func (tr deviceTree) mkdir(path string) {
	tr.Helper()
	dir, name := filepath.Split(path)
	d, err := tr.dirs[strings.TrimSuffix(dir, "/")].Mkdir(name, 0, 0)
	check(tr, err)
	tr.dirs[path] = d
}

func (tr deviceTree) rmdir(path string) {
	tr.Helper()
	dir, name := filepath.Split(path)
	check(tr, tr.dirs[path].Close())
	delete(tr.dirs, path)
	check(tr, tr.dirs[strings.TrimSuffix(dir, "/")].Rmdir(name))
}

// write writes "allow RULE" or "deny RULE" and returns what the kernel says.
func (tr deviceTree) write(path, what string) error {
	tr.Helper()
	file, rule, _ := strings.Cut(what, " ")
	err := tr.dirs[path].write("devices."+file, rule)
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno
	}
	return err
}

func (tr deviceTree) list(path string) string {
	tr.Helper()
	b, err := tr.dirs[path].read("devices.list", 1<<16)
	check(tr, err)
	return string(b)
}

// deviceHierarchies are those in which this machine can restrict devices.
func deviceHierarchies(t *testing.T) []*Hierarchy {
	t.Helper()
	s := open(t, Options{})
	var hs []*Hierarchy
	for _, h := range s.Hierarchies() {
		if h.Version() == V2 || h.Has("devices") {
			hs = append(hs, h)
		}
	}
	if len(hs) == 0 {
		t.Fatal("neither cgroup v2 nor the devices controller of v1")
	}
	return hs
}

// TestKernelDeviceRules runs the same sequence wherever devices can be
// restricted, and the answers are the same.
func TestKernelDeviceRules(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	for _, h := range deviceHierarchies(t) {
		t.Run(h.Name(), func(t *testing.T) { testDeviceRules(t, h) })
	}
}

func testDeviceRules(t *testing.T, h *Hierarchy) {
	cgtest.NoLeaks(t)
	tr := newDeviceTree(t, h)
	p := newProber(t)
	null, zero := device{"c", 1, 3}, device{"c", 1, 5}
	write := func(path, what string, want error) {
		t.Helper()
		if err := tr.write(path, what); !errors.Is(err, want) {
			t.Fatalf("%q: %s: got %v, want %v", path, what, err, want)
		}
	}
	may := func(path string, d device, how string, want bool) {
		t.Helper()
		p.enter(tr.dirs[path])
		if got := p.may(d, how); got != want {
			t.Errorf("%q: %v %s: %v", path, d, how, got)
		}
	}
	list := func(path, want string) {
		t.Helper()
		if got := tr.list(path); got != want {
			t.Errorf("%q: list %q, want %q", path, got, want)
		}
	}
	const all = "a *:* rwm\n"
	list("", all)
	may("", null, "rw", true)

	// A container's cgroup, as LXC sets it up.
	tr.mkdir("c")
	write("c", "deny a", nil)
	may("c", null, "r", false)
	list("c", "")
	write("c", "allow c 1:3 rwm", nil)
	write("c", "allow c 240:* rw", nil)
	list("c", "c 1:3 rwm\nc 240:* rw\n")
	may("c", null, "rw", true)
	may("c", zero, "r", false)
	may("c", device{"c", 240, 5}, "rw", true)
	may("c", device{"c", 240, 5}, "m", false)

	// One in it: it has what the container has, and gets no more.
	tr.mkdir("c/in")
	list("c/in", "c 1:3 rwm\nc 240:* rw\n")
	may("c/in", null, "r", true)
	write("c/in", "allow c 1:5 r", unix.EPERM)
	write("c/in", "allow a", unix.EPERM)
	write("c", "deny a", unix.EINVAL)
	write("c", "allow a", unix.EINVAL)
	write("c/in", "deny c 1:3 w", nil)
	list("c/in", "c 1:3 rm\nc 240:* rw\n")
	may("c/in", null, "w", false)
	may("c/in", null, "rw", false)
	may("c/in", null, "r", true)
	may("c", null, "w", true)
	write("c/in", "allow c 1:3 w", nil)
	may("c/in", null, "w", true)

	// What the container gets later, the one in it has to ask for.
	write("c", "allow c 1:5 r", nil)
	may("c", zero, "r", true)
	may("c/in", zero, "r", false)
	write("c/in", "allow c 1:5 r", nil)
	may("c/in", zero, "r", true)

	// What the container loses, the one in it and those below lose.
	tr.mkdir("c/in/most")
	write("c/in/most", "deny c 240:* w", nil)
	write("c", "deny c 1:3 w", nil)
	for _, path := range []string{"c", "c/in", "c/in/most"} {
		may(path, null, "w", false)
		may(path, null, "r", true)
	}
	list("c/in/most", "c 1:3 rm\nc 240:* r\nc 1:5 r\n")
	write("c/in/most", "allow c 1:3 w", unix.EPERM)
	write("c", "allow c 1:3 w", nil)
	may("c", null, "w", true)
	may("c/in", null, "w", false)

	// A blacklist.
	tr.mkdir("b")
	write("b", "deny c 1:3 w", nil)
	list("b", all)
	may("b", null, "rw", false)
	may("b", null, "r", true)
	may("b", null, "m", true)
	tr.mkdir("b/in")
	may("b/in", null, "w", false)
	write("b/in", "allow c 1:3 w", unix.EPERM)
	write("b/in", "allow c *:* rwm", unix.EPERM)
	write("b", "allow c 1:3 w", nil)
	may("b", null, "w", true)
	may("b/in", null, "w", false)
	write("b/in", "allow c 1:3 w", nil)
	may("b/in", null, "w", true)
	write("b/in", "deny a", nil)
	may("b/in", null, "r", false)
	write("b/in", "allow a", nil)
	may("b/in", null, "r", true)

	write("b", "deny ", nil) // a write of no bytes
	for _, bad := range []string{"\n", "x", "c 1:3", "c 1:3 x", "c 1 r", "c 4294967296:0 r"} {
		write("b", "allow "+bad, unix.EINVAL)
		write("b", "deny "+bad, unix.EINVAL)
	}
	may("b", null, "rw", true)
	p.enter(tr.dirs[""])
}

// TestKernelDeviceRulesDiffer does the same at random with the devices
// controller of v1 and with v2, and compares errors, lists, and what can be
// done.
func TestKernelDeviceRulesDiffer(t *testing.T) {
	cgtest.Require(t, cgtest.Root, cgtest.V1, cgtest.V2)
	cgtest.NoLeaks(t)
	s := open(t, Options{})
	h1, ok := s.ByController("devices")
	if !ok || h1.Version() != V1 {
		t.Fatal("no devices controller of v1")
	}
	h2, _ := s.Unified()
	rounds := 60
	if testing.Short() {
		rounds = 2
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	one, two := newProber(t), newProber(t)
	for range rounds {
		a, b := newDeviceTree(t, h1), newDeviceTree(t, h2)
		var log []string
		for range 40 {
			op := randomOp(r, a.dirs)
			log = append(log, op.String())
			if err1, err2 := op.do(a), op.do(b); !errors.Is(err1, err2) {
				t.Fatalf("%v on v1, %v on v2 after\n%s", err1, err2, strings.Join(log, "\n"))
			}
			for path := range a.dirs {
				if l1, l2 := a.list(path), b.list(path); l1 != l2 {
					t.Fatalf("list of %q: v1 %q, v2 %q after\n%s", path, l1, l2, strings.Join(log, "\n"))
				}
			}
			if r.IntN(8) != 0 {
				continue
			}
			for path := range a.dirs {
				one.enter(a.dirs[path])
				two.enter(b.dirs[path])
				if m1, m2 := one.all(), two.all(); m1 != m2 {
					t.Fatalf("in %q v1 allows\n%s\nv2 allows\n%s\nafter\n%s", path, m1, m2, strings.Join(log, "\n"))
				}
			}
			one.enter(a.dirs[""])
			two.enter(b.dirs[""])
		}
		for _, p := range []struct {
			prober
			h *Hierarchy
		}{{one, h1}, {two, h2}} {
			root, err := p.h.Open("/")
			check(t, err)
			p.enter(root)
			check(t, root.Close())
		}
	}
}

// deviceOp is a step of a random sequence: mkdir, rmdir, or a write.
type deviceOp struct{ what, path, rule string }

func (o deviceOp) String() string { return fmt.Sprintf("%s %q %q", o.what, o.path, o.rule) }

func (o deviceOp) do(tr deviceTree) error {
	switch o.what {
	case "mkdir":
		tr.mkdir(o.path)
		return nil
	case "rmdir":
		tr.rmdir(o.path)
		return nil
	}
	err := tr.write(o.path, o.what+" "+o.rule)
	// A cgroup of v1 that was removed counts as a child until the kernel has
	// taken it apart.
	if errors.Is(err, unix.EINVAL) && strings.HasPrefix(o.rule, "a") && len(below(tr.dirs, o.path)) == 0 {
		cgtest.Until(2*time.Second, 10*time.Millisecond, func() bool {
			err = tr.write(o.path, o.what+" "+o.rule)
			return !errors.Is(err, unix.EINVAL)
		})
	}
	return err
}

func below(dirs map[string]*Dir, path string) (children []string) {
	for p := range dirs {
		if p != "" && (path == "" || strings.HasPrefix(p, path+"/")) && p != path {
			children = append(children, p)
		}
	}
	return children
}

func randomOp(r *rand.Rand, dirs map[string]*Dir) deviceOp {
	pick := func(ss ...string) string { return ss[r.IntN(len(ss))] }
	var paths []string
	for p := range dirs {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	path := pick(paths...)
	switch r.IntN(12) {
	case 0, 1:
		child := strings.TrimPrefix(path+"/"+pick("a", "b"), "/")
		if dirs[child] == nil && strings.Count(child, "/") < 3 {
			return deviceOp{"mkdir", child, ""}
		}
	case 2:
		if path != "" && len(below(dirs, path)) == 0 {
			return deviceOp{"rmdir", path, ""}
		}
	}
	rule := fmt.Sprintf("%s %s:%s %s", pick("c", "c", "c", "b"), pick("1", "1", "240", "*"), pick("3", "3", "5", "*"),
		pick("r", "w", "m", "rw", "rm", "wm", "rwm", "rwm"))
	switch r.IntN(12) {
	case 0, 1:
		rule = "a"
	case 2:
		rule = pick("a *:* rwm", "c 1:3", "c 1:3 rwmx", "c 1:3 r\nc 1:5 r", "c 1:3 \nx", "c  1:3 r", "c 01:3 w", "b 1:3r", "c 4294967295:3 r", "", "\n")
	}
	return deviceOp{pick("allow", "deny"), path, rule}
}

// newDeviceTree2 is a tree of v2.
func newDeviceTree2(t *testing.T) deviceTree {
	t.Helper()
	cgtest.Require(t, cgtest.Root, cgtest.V2)
	return newDeviceTree(t, find(t, open(t, Options{}), "unified"))
}

// Rules outlive the handles, are replaced and not piled up, and go with the
// cgroup.
func TestKernelDeviceRulesLife(t *testing.T) {
	seen := map[ebpf.ProgramID]bool{}
	t.Run("cgroup", func(t *testing.T) {
		cgtest.NoLeaks(t)
		tr := newDeviceTree2(t)
		tr.mkdir("c")
		for _, what := range []string{"deny a", "allow c 1:3 rwm", "deny a", "allow c 1:3 rwm"} {
			check(t, tr.write("c", what))
			ids, _, err := tr.dirs["c"].devicePrograms()
			check(t, err)
			if len(ids) != 1 || seen[ids[0]] {
				t.Errorf("programs %v after %v", ids, seen)
			}
			seen[ids[0]] = true
		}
		// The daemon of tomorrow.
		s := open(t, Options{})
		d, err := find(t, s, "unified").Open(tr.dirs["c"].Path())
		check(t, err)
		defer d.Close()
		b, err := d.read("devices.list", 100)
		check(t, err)
		if string(b) != "c 1:3 rwm\n" {
			t.Errorf("list %q", b)
		}
		check(t, d.write("devices.deny", "c 1:3 w"))
		if ids, _, err := d.devicePrograms(); err != nil || len(ids) != 1 {
			t.Errorf("%d programs, %v", len(ids), err)
		}
		// The handle of a removed cgroup reaches none that has its name now.
		f, err := d.File("devices.deny", ForWrite)
		check(t, err)
		defer f.Close()
		check(t, tr.dirs[""].Rmdir("c"))
		wantErr(t, "write to a removed cgroup", f.Write("a"), unix.ENOENT)
		n, err := tr.dirs[""].Mkdir("c", 0, 0)
		check(t, err)
		defer n.Close()
		wantErr(t, "write to a removed cgroup", f.Write("a"), unix.ENODEV)
		if _, own, err := n.policy(devicePolicy{}); own || err != nil {
			t.Errorf("the new one has rules (%v)", err)
		}
	})
	if !cgtest.Until(3*time.Second, 10*time.Millisecond, func() bool {
		for id := range seen {
			p, err := ebpf.NewProgramFromID(id)
			if errors.Is(err, os.ErrNotExist) {
				delete(seen, id)
				continue
			}
			check(t, err)
			check(t, p.Close())
		}
		return len(seen) == 0
	}) {
		t.Errorf("programs are left: %v", seen)
	}
}

// attachTheirs attaches a program that is not the daemon's, and returns what
// detaches it.
func attachTheirs(t *testing.T, d *Dir, p devicePolicy, flags uint32) (detach func()) {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "theirs", Type: ebpf.CGroupDevice, License: "Apache-2.0", Instructions: p.instructions(),
	})
	check(t, err)
	t.Cleanup(func() { _ = prog.Close() })
	o := link.RawAttachProgramOptions{Target: d.fd, Program: prog, Attach: ebpf.AttachCGroupDevice, Flags: flags}
	check(t, link.RawAttachProgram(o))
	return func() {
		t.Helper()
		check(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: o.Target, Program: prog, Attach: o.Attach}))
	}
}

// Programs of others stay, and where ours would switch theirs off the write is
// refused.
func TestKernelDeviceRulesForeign(t *testing.T) {
	tr := newDeviceTree2(t)
	tr.mkdir("c")
	tr.mkdir("c/in")
	attach := func(path string, flags uint32) func() {
		t.Helper()
		return attachTheirs(t, tr.dirs[path], devicePolicy{allow: true, exceptions: []deviceException{{'c', 1, 5, accessAll}}}, flags)
	}
	p := newProber(t)
	null, zero := device{"c", 1, 3}, device{"c", 1, 5}
	for _, flags := range []uint32{0, unix.BPF_F_ALLOW_OVERRIDE} {
		for _, path := range []string{"", "c/in"} {
			detach := attach(path, flags)
			for _, what := range []string{"deny a", "deny c 1:3 w", "allow c 1:3 w"} {
				wantErr(t, what+" at and below "+path, tr.write("c/in", what), ErrUnsupported)
			}
			p.enter(tr.dirs["c/in"])
			if p.may(zero, "r") {
				t.Error("their rules bind no more")
			}
			detach()
		}
	}
	// A child's rules would be ours against its own.
	check(t, tr.write("c", "deny c 1:3 w"))
	detach := attach("c/in", 0)
	wantErr(t, "give above theirs", tr.write("c", "allow c 1:3 w"), ErrUnsupported)
	p.enter(tr.dirs["c/in"])
	if p.may(null, "w") {
		t.Error("given all the same")
	}
	detach()

	defer attach("c", unix.BPF_F_ALLOW_MULTI)()
	defer attach("c/in", unix.BPF_F_ALLOW_MULTI)()
	for range 2 {
		check(t, tr.write("c/in", "deny a"))
		check(t, tr.write("c/in", "allow c 1:3 rm"))
	}
	p.enter(tr.dirs["c/in"])
	if p.may(zero, "r") || !p.may(null, "r") {
		t.Error("their program and ours do not both count")
	}
	if ids, _, err := tr.dirs["c/in"].devicePrograms(); err != nil || len(ids) != 2 {
		t.Errorf("%d programs, %v", len(ids), err)
	}
	p.enter(tr.dirs[""])
}

// The largest list that there may be is loaded, and one more rule is refused.
func TestKernelDeviceRulesMany(t *testing.T) {
	tr := newDeviceTree2(t)
	p := newProber(t)
	for _, start := range []devicePolicy{{allow: true}, {}} {
		full := start
		for i := range maxDeviceRules - 1 {
			full = full.with(deviceException{"bc"[i%2], 4294967294, uint32(i), accessRead | accessMknod})
		}
		check(t, tr.dirs[""].setPolicy(full, false))
		what := map[bool]string{true: "deny c 1:3 w", false: "allow c 1:3 w"}[start.allow]
		check(t, tr.write("", what))
		what = strings.Replace(what, "1:3", "1:5", 1)
		wantErr(t, what, tr.write("", what), ErrTooBig)
		p.enter(tr.dirs[""])
		if p.may(device{"c", 1, 3}, "w") == start.allow || p.may(device{"c", 1, 5}, "w") != start.allow {
			t.Error("the last rule does not count, or the refused one does")
		}
	}
}

// A program that the kernel does not take leaves the mark as it was, and a mark
// that it does not take the program.
func TestKernelDeviceRulesFail(t *testing.T) {
	tr := newDeviceTree2(t)
	tr.mkdir("c")
	for range maxDevicePrograms {
		attachTheirs(t, tr.dirs["c"], devicePolicy{allow: true}, unix.BPF_F_ALLOW_MULTI)
	}
	wantErr(t, "one program more than there may be", tr.write("c", "deny a"), ErrTooBig)
	if got := tr.list("c"); got != "a *:* rwm\n" {
		t.Errorf("list %q, and nothing is denied", got)
	}

	tr.mkdir("d")
	check(t, tr.write("d", "deny a"))
	h := find(t, open(t, Options{}), "unified")
	check(t, unix.MountSetattr(h.fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}))
	d, err := h.Open(tr.dirs["d"].Path())
	check(t, err)
	defer d.Close()
	wantErr(t, "a mark where nothing is written", d.changeDevices("c 1:3 r", true), unix.EROFS)
	p := newProber(t)
	p.enter(tr.dirs["d"])
	defer p.enter(tr.dirs[""])
	if p.may(device{"c", 1, 3}, "r") {
		t.Error("allowed, and not listed")
	}
}

// TestDeviceWriter is no test, but a daemon that TestKernelDeviceRulesKilled
// ends at any moment.
func TestDeviceWriter(t *testing.T) {
	path := os.Getenv(writerEnv)
	if path == "" {
		return
	}
	d, err := find(t, open(t, Options{}), "unified").Open(path)
	check(t, err)
	for start := time.Now(); ; start = time.Now() {
		check(t, d.write("devices.deny", "c 1:3 rwm"))
		check(t, d.write("devices.allow", "c 1:3 rwm"))
		fmt.Println(int64(time.Since(start)))
	}
}

const writerEnv = "CGM_TEST_DEVICE_WRITER"

// Whenever the daemon is killed, the cgroup allows no more than its list.
func TestKernelDeviceRulesKilled(t *testing.T) {
	tr := newDeviceTree2(t)
	tr.mkdir("c")
	check(t, tr.write("c", "deny a"))
	p := newProber(t)
	p.enter(tr.dirs["c"])
	defer p.enter(tr.dirs[""])
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	listed, n := 0, 0
	for ; n < rounds || n < 200 && (listed == 0 || listed == n); n++ {
		exe, err := os.Executable()
		check(t, err)
		cmd := exec.Command(exe, "-test.run=^TestDeviceWriter$")
		cmd.Env = append(os.Environ(), writerEnv+"="+tr.dirs["c"].Path())
		out, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for range 2 { // the first time takes longer
			lines.Scan()
		}
		took, err := strconv.ParseInt(lines.Text(), 10, 64)
		check(t, err)
		time.Sleep(time.Duration(rand.Int64N(3 * took)))
		check(t, cmd.Process.Kill())
		_ = cmd.Wait()
		if strings.Contains(tr.list("c"), "c 1:3 rwm") {
			listed++
			continue
		}
		if p.may(device{"c", 1, 3}, "r") {
			t.Fatal("allowed, and not listed")
		}
	}
	if listed == 0 || listed == n {
		t.Errorf("listed in %d of %d rounds: the writer did not write", listed, n)
	}
}

// The daemon ends between the two steps of a change: nothing is allowed then
// that the marks deny, and the next change goes on from there.
func TestKernelDeviceRulesHalfway(t *testing.T) {
	tr := newDeviceTree2(t)
	tr.mkdir("c")
	check(t, tr.write("c", "deny a"))
	tr.mkdir("c/in")
	p := newProber(t)
	null, zero := device{"c", 1, 3}, device{"c", 1, 5}
	load := func(path, policy string) {
		t.Helper()
		prog, err := policyOf(t, policy).load()
		check(t, err)
		defer func() { _ = prog.Close() }()
		check(t, tr.dirs[path].attachDevices(prog))
	}
	// allow c 1:3 r: the mark alone. in was settled before.
	check(t, tr.dirs["c/in"].setPolicy(devicePolicy{}, false))
	check(t, tr.dirs["c"].setMark(devicesMark, "deny\nc 1:3 r\n"))
	p.enter(tr.dirs["c"])
	if p.may(null, "r") {
		t.Error("allowed before the program is there")
	}
	check(t, tr.write("c", "allow c 1:5 r"))
	if !p.may(null, "r") || !p.may(zero, "r") {
		t.Error("the next change does not make good")
	}
	// deny c 1:3 r: the program alone.
	load("c", "deny\nc 1:5 r\n")
	if p.may(null, "r") {
		t.Error("allowed though denied")
	}
	check(t, tr.write("c", "deny c 1:3 r"))
	if p.may(null, "r") || tr.list("c") != "c 1:5 r\n" {
		t.Errorf("list %q", tr.list("c"))
	}
	// A mark that nobody of ours wrote denies every change and says nothing.
	check(t, tr.dirs["c"].setMark(devicesMark, "allow\nall\n"))
	wantErr(t, "write", tr.write("c", "deny c 1:5 r"), errDevicePolicy)
	if _, err := tr.dirs["c"].read("devices.list", 100); !errors.Is(err, errDevicePolicy) {
		t.Errorf("list: %v", err)
	}
	p.enter(tr.dirs[""])
}

// A hidden leaf is no child, and its tasks go by the rules of the cgroup that
// they count in.
func TestKernelDeviceRulesLeaf(t *testing.T) {
	tr := newDeviceTree2(t)
	tr.mkdir("c")
	leaf, err := tr.dirs["c"].makeLeaf()
	check(t, err)
	defer leaf.Close()
	p := newProber(t)
	p.enter(leaf)
	defer p.enter(tr.dirs[""])
	for _, step := range []struct {
		what string
		may  bool
	}{{"deny a", false}, {"allow c 1:3 r", true}, {"deny c 1:3 r", false}, {"allow c 1:3 rw", true}, {"allow a", true}} {
		check(t, tr.write("c", step.what))
		if p.may(device{"c", 1, 3}, "r") != step.may {
			t.Errorf("%s does not count", step.what)
		}
	}
	if _, own, err := leaf.policy(devicePolicy{}); own || err != nil {
		t.Errorf("the leaf has rules of its own, %v", err)
	}
}

// Writers at once, to a cgroup and to those above and below it: at the end no
// cgroup allows what one above it does not.
func TestKernelDeviceRulesAtOnce(t *testing.T) {
	cgtest.NoLeaks(t)
	tr := newDeviceTree2(t)
	tr.mkdir("c")
	tr.mkdir("c/in")
	done := make(chan error, 3)
	for _, path := range []string{"", "c", "c/in"} {
		go func() {
			for i := range 40 {
				what := []string{"deny c 1:3 w", "allow c 1:3 w", "deny c *:* r", "allow c 1:5 rw", "allow c *:* r"}[i%5]
				if err := tr.write(path, what); err != nil && !errors.Is(err, unix.EPERM) {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 3 {
		check(t, <-done)
	}
	parent := devicePolicy{allow: true}
	for _, path := range []string{"", "c", "c/in"} {
		p, _, err := tr.dirs[path].policy(parent)
		check(t, err)
		for _, e := range parent.exceptions {
			if parent.allow && p.allow && !p.covers(e) {
				t.Errorf("%q: %q lacks %v of %q", path, p.encode(), e, parent.encode())
			}
		}
		parent = p
	}
}

// The files can be looked at like any other, and the root has none.
func TestKernelDeviceFiles(t *testing.T) {
	tr := newDeviceTree2(t)
	root, err := tr.h.Open("/")
	check(t, err)
	defer root.Close()
	d, err := tr.dirs[""].Mkdir("c", 1234, 1235)
	check(t, err)
	defer d.Close()
	for name, mode := range deviceFiles {
		for _, what := range []For{ForFacts, ForRead, ForWrite} {
			if _, err := root.File(name, what); !errors.Is(err, ErrUnsupported) {
				t.Errorf("%s of the root: %v", name, err)
			}
		}
		a, err := d.FileAttr(name)
		check(t, err)
		f, err := d.File(name, ForFacts)
		check(t, err)
		b, err := f.Attr()
		check(t, err)
		if a != b || a.UID != 1234 || a.GID != 1235 || a.Mode != unix.S_IFREG|mode {
			t.Errorf("%s: %+v, %+v", name, a, b)
		}
		wantErr(t, "chown", f.SetOwner(0, 0), ErrUnsupported)
		wantErr(t, "chmod", f.SetMode(0o777), ErrUnsupported)
		check(t, f.Close())
		_, err = d.read(name, 100)
		if (name == "devices.list") != (err == nil) || err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("read %s: %v", name, err)
		}
		err = d.write(name, "c 1:3 r")
		if (name == "devices.list") != (err != nil) || err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("write %s: %v", name, err)
		}
	}
	if got, err := d.FileAttr("cgroup.freeze"); err != nil || got.UID != 1234 || got.Mode&0o7777 != 0o644 {
		t.Errorf("cgroup.freeze: %+v, %v", got, err)
	}
}
