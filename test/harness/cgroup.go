package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
)

// unified is the name of the v2 hierarchy.
const unified = "unified"

// Hierarchy is a mounted cgroup hierarchy.
type Hierarchy struct {
	// Name is its controllers or name=X as in /proc/PID/cgroup, or "unified".
	Name  string
	Mount string
	V2    bool
}

// Hierarchies returns what is mounted here, in the order of the mounts.
var Hierarchies = sync.OnceValue(func() []Hierarchy {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	names := map[string]string{} // the options of a v1 mount, sorted → the name
	for name := range CgroupsOf(os.Getpid()) {
		names[sorted(name)] = name
	}
	var hs []Hierarchy
	seen := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(strings.TrimSpace(line), " - ")
		if !ok {
			continue
		}
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 3 || l[3] != "/" {
			continue
		}
		h := Hierarchy{Mount: l[4]}
		switch r[0] {
		case "cgroup2":
			h.Name, h.V2 = unified, true
		case "cgroup":
			var opts []string
			for o := range strings.SplitSeq(r[2], ",") {
				if _, known := names[o]; known || strings.HasPrefix(o, "name=") || isController(o) {
					opts = append(opts, o)
				}
			}
			h.Name = names[sorted(strings.Join(opts, ","))]
		}
		if h.Name == "" || seen[h.Name] || othersTest(h.Name) {
			continue
		}
		seen[h.Name] = true
		hs = append(hs, h)
	}
	return hs
})

// othersTest says whether another test made the hierarchy for itself. It comes
// and goes as that one likes.
func othersTest(hierarchy string) bool { return strings.HasPrefix(hierarchy, "name=cgmtest") }

func sorted(list string) string {
	s := strings.Split(list, ",")
	slices.Sort(s)
	return strings.Join(s, ",")
}

func isController(s string) bool {
	b, err := os.ReadFile("/proc/cgroups")
	return err == nil && strings.Contains("\n"+string(b), "\n"+s+"\t")
}

// Controllers are those of h.
func (h Hierarchy) Controllers() []string {
	if !h.V2 {
		return strings.Split(h.Name, ",")
	}
	b, err := os.ReadFile(filepath.Join(h.Mount, "cgroup.controllers"))
	if err != nil {
		panic(err)
	}
	return strings.Fields(string(b))
}

// Named reports whether h is a v1 hierarchy without controllers.
func (h Hierarchy) Named() bool { return strings.HasPrefix(h.Name, "name=") }

// TasksFile is the file that a task is written to.
func (h Hierarchy) TasksFile() string { return h.File("tasks") }

var trees atomic.Int32

// Tree is a cgroup of the same name in every hierarchy, and what is below. It
// is removed after the test with all processes in it.
type Tree struct {
	// Base is its path in every hierarchy.
	Base string
	// top is that of the whole tree, whose part this may be.
	top string
	// first is the test's number of id 0 of those who give cgroups away here.
	first uint32
	t     testing.TB
}

// Part is the part of the tree below a cgroup, in which ids count from first on:
// what the root of a container has of it. A picture is one of the whole tree all
// the same. It is removed with the tree.
func (tr *Tree) Part(cg string, first uint32) *Tree {
	return &Tree{Base: tr.Path(cg), top: tr.top, first: first, t: tr.t}
}

// NewTree makes a cgroup at the top of every hierarchy, owned by root.
func NewTree(t testing.TB) *Tree {
	t.Helper()
	tr := &Tree{t: t, Base: fmt.Sprintf("/cgmtest-%d-%d", os.Getpid(), trees.Add(1))}
	tr.top = tr.Base
	for _, h := range Hierarchies() {
		tr.mkdir(h, tr.Base)
	}
	t.Cleanup(tr.remove)
	return tr
}

func (tr *Tree) mkdir(h Hierarchy, cg string) {
	tr.t.Helper()
	dir := filepath.Join(h.Mount, cg)
	if err := os.Mkdir(dir, 0o755); err != nil {
		tr.t.Fatal(err)
	}
	if h.V2 {
		tr.enable(h, path.Dir(cg))
	}
	if h.Name != "cpuset" {
		return
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(path.Dir(dir), f))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, f), b, 0)
		}
		if err != nil {
			tr.t.Fatal(err)
		}
	}
}

// enable gives the children of a v2 cgroup the controllers that tests use, as
// the daemon does for its clients: as far as the cgroup was given them.
func (tr *Tree) enable(h Hierarchy, cg string) {
	tr.t.Helper()
	dir := filepath.Join(h.Mount, cg)
	given, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		tr.t.Fatal(err)
	}
	var on []string
	for c := range strings.FieldsSeq(string(given)) {
		if slices.Contains([]string{"cpu", "cpuset", "io", "memory", "pids"}, c) {
			on = append(on, "+"+c)
		}
	}
	if len(on) == 0 {
		return
	}
	enable := func() error {
		return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(strings.Join(on, " ")), 0)
	}
	err = enable()
	for range 10 { // no internal processes; some may fork meanwhile
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		var l string
		if l, err = makeLeaf(dir); err != nil {
			break
		}
		b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for pid := range strings.FieldsSeq(string(b)) {
			if err := Place(l, pid); err != nil && !errors.Is(err, unix.ESRCH) {
				tr.t.Fatal(err)
			}
		}
		err = enable()
	}
	if err != nil {
		tr.t.Fatal(err)
	}
}

// leafName is where the tasks of a v2 cgroup are that has children with
// controllers; leafMark is the attribute by which the daemon knows it.
const (
	leafName = ".cgmanager-leaf"
	leafMark = "trusted.cgmanager.leaf"
)

// leaf returns the hidden leaf of a cgroup, or "".
func leaf(dir string) string {
	found, _ := filepath.Glob(filepath.Join(dir, leafName+"*"))
	for _, l := range found {
		if _, err := unix.Lgetxattr(l, leafMark, nil); err == nil {
			return l
		}
	}
	return ""
}

// tasks returns the numbers in the file of a cgroup, and of its hidden leaf.
func tasks(dir, file string) []string {
	b, _ := os.ReadFile(filepath.Join(dir, file))
	if l := leaf(dir); l != "" {
		more, _ := os.ReadFile(filepath.Join(l, file))
		b = append(b, more...)
	}
	return strings.Fields(string(b))
}

// makeLeaf returns the hidden leaf of a cgroup, made if there is none.
func makeLeaf(dir string) (string, error) {
	if l := leaf(dir); l != "" {
		return l, nil
	}
	l := filepath.Join(dir, leafName)
	if err := os.Mkdir(l, 0o755); err != nil {
		return "", err
	}
	return l, unix.Setxattr(l, leafMark, []byte("1"), 0)
}

// Place moves the process pid, 0 for the caller, to the cgroup in dir, that is to
// its hidden leaf if it has or needs one.
func Place(dir, pid string) error {
	if leaf(dir) == "" {
		err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(pid), 0)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	l, err := makeLeaf(dir)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(l, "cgroup.procs"), []byte(pid), 0)
}

// Path returns the path of a cgroup of the tree, from the hierarchies' roots.
func (tr *Tree) Path(name string) string { return path.Join(tr.Base, name) }

// Dir returns the directory of a cgroup of the tree.
func (tr *Tree) Dir(h Hierarchy, name string) string {
	return filepath.Join(h.Mount, tr.Base, name)
}

// Make makes the cgroup in every hierarchy (its parent must be there) and
// gives directory and files of delegation to uid and gid, by the tree's numbers.
func (tr *Tree) Make(name string, uid, gid uint32) {
	tr.t.Helper()
	tr.MakeIn(name, uid, gid, Hierarchies()...)
}

// MakeIn is Make for some hierarchies only.
func (tr *Tree) MakeIn(name string, uid, gid uint32, hs ...Hierarchy) {
	tr.t.Helper()
	for _, h := range hs {
		tr.mkdir(h, tr.Path(name))
		tr.own(h, name, uid, gid)
	}
}

// Own gives an existing cgroup to uid and gid, as Make does.
func (tr *Tree) Own(name string, uid, gid uint32) {
	tr.t.Helper()
	for _, h := range Hierarchies() {
		tr.own(h, name, uid, gid)
	}
}

func (tr *Tree) own(h Hierarchy, name string, uid, gid uint32) {
	tr.t.Helper()
	dir := tr.Dir(h, name)
	for _, f := range []string{"", "tasks", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
		err := os.Chown(filepath.Join(dir, f), int(tr.first+uid), int(tr.first+gid))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			tr.t.Fatal(err)
		}
	}
}

// Place moves the process p to the cgroup in every hierarchy, with the rights
// of host root.
func (tr *Tree) Place(p *Proc, name string) {
	tr.t.Helper()
	tr.PlaceIn(p, name, Hierarchies()...)
}

// PlaceIn is Place for some hierarchies only.
func (tr *Tree) PlaceIn(p *Proc, name string, hs ...Hierarchy) {
	tr.t.Helper()
	for _, h := range hs {
		if err := Place(tr.Dir(h, name), strconv.Itoa(p.HostPID)); err != nil {
			tr.t.Fatal(err)
		}
	}
}

// PlaceTop moves the process to the root cgroup of hierarchies.
func (tr *Tree) PlaceTop(p *Proc, hs ...Hierarchy) {
	tr.t.Helper()
	for _, h := range hs {
		if err := os.WriteFile(filepath.Join(h.Mount, "cgroup.procs"), strconv.AppendInt(nil, int64(p.HostPID), 10), 0); err != nil {
			tr.t.Fatal(err)
		}
	}
}

// Read returns a control file without its last newline. On v2 the names and
// values of v1 files are translated, and tasks are those of a hidden leaf too.
func (tr *Tree) Read(h Hierarchy, name, file string) string {
	tr.t.Helper()
	if h.V2 {
		switch file {
		case "tasks":
			file = "cgroup.procs"
			fallthrough
		case "cgroup.procs":
			return strings.Join(tasks(tr.Dir(h, name), file), "\n")
		}
	}
	f := h.File(file)
	b, err := os.ReadFile(filepath.Join(tr.Dir(h, name), f))
	if err != nil {
		tr.t.Fatal(err)
	}
	v := strings.TrimSuffix(string(b), "\n")
	if f != file {
		if w, ok := v1Files[file].values[v]; ok {
			v = w
		}
	}
	return v
}

// Write writes a control file with the rights of host root. On v2 the names
// and values of v1 files are translated.
func (tr *Tree) Write(h Hierarchy, name, file, value string) {
	tr.t.Helper()
	f := h.File(file)
	var err error
	if f == "cgroup.procs" {
		err = Place(tr.Dir(h, name), value)
	} else {
		if f != file {
			for v2, v1 := range v1Files[file].values {
				if v1 == value {
					value = v2
				}
			}
		}
		err = os.WriteFile(filepath.Join(tr.Dir(h, name), f), []byte(value), 0)
	}
	if err != nil {
		tr.t.Fatal(err)
	}
}

// v1Files are the files of v1 that tests look at, what v2 has in their place,
// and which values have other words there: v2's to v1's.
var v1Files = map[string]struct {
	name   string
	values map[string]string
}{
	"tasks":                 {"cgroup.procs", nil},
	"freezer.state":         {"cgroup.freeze", map[string]string{"0": "THAWED", "1": "FROZEN"}},
	"memory.limit_in_bytes": {"memory.max", map[string]string{"max": "9223372036854771712"}},
	"cpu.shares":            {"cpu.weight", map[string]string{"100": "1024", "59": "512"}},
}

// File returns the name that a file of v1 has in h.
func (h Hierarchy) File(name string) string {
	if f, ok := v1Files[name]; ok && h.V2 {
		return f.name
	}
	return name
}

// Exists reports whether the cgroup is there.
func (tr *Tree) Exists(h Hierarchy, name string) bool {
	_, err := os.Stat(tr.Dir(h, name))
	return err == nil
}

// Find returns the hierarchy that has the controller: v1's, else that of v2,
// which has the freezer and devices without a controller. It skips the test if
// there is none (see Require).
func Find(t testing.TB, ctrl string) Hierarchy {
	t.Helper()
	for _, v2 := range []bool{false, true} {
		for _, h := range Hierarchies() {
			core := []string{"freezer", "devices", unified}
			if h.V2 == v2 && (slices.Contains(h.Controllers(), ctrl) || v2 && slices.Contains(core, ctrl)) {
				return h
			}
		}
	}
	needs := "v1"
	if ctrl == unified {
		needs = "v2"
	}
	if required(needs) {
		t.Fatalf("no hierarchy with %s", ctrl)
	}
	t.Skipf("needs %s: no hierarchy with %s", needs, ctrl)
	return Hierarchy{}
}

// remove kills what is in the tree and removes it.
func (tr *Tree) remove() {
	for _, h := range Hierarchies() {
		dir := filepath.Join(h.Mount, tr.Base)
		for end := time.Now().Add(cgtest.Patience(5 * time.Second)); !sweep(dir) && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		if _, err := os.Stat(dir); err == nil {
			tr.t.Errorf("%s:%s cannot be removed", h.Name, tr.Base)
		}
	}
}

// sweepStale removes what test processes left that did not live to do it
// themselves: a test that times out cleans nothing up.
func sweepStale() {
	name := regexp.MustCompile(`^cgmtest-([0-9]+)-[0-9]+$`)
	for _, h := range Hierarchies() {
		entries, err := os.ReadDir(h.Mount)
		if err != nil {
			continue
		}
		for _, e := range entries {
			m := name.FindStringSubmatch(e.Name())
			if m == nil {
				continue
			}
			if pid, err := strconv.Atoi(m[1]); err != nil || unix.Kill(pid, 0) == nil {
				continue // its test runs
			}
			for range 20 {
				if sweep(filepath.Join(h.Mount, e.Name())) {
					break
				}
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
}

// sweep kills, thaws and removes once, from the leaves up. Whatever is in here
// was put here by the test, and every process of it is a test's.
func sweep(dir string) bool {
	var dirs []string
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, d := range dirs {
		_ = os.WriteFile(filepath.Join(d, "freezer.state"), []byte("THAWED"), 0)
		_ = os.WriteFile(filepath.Join(d, "cgroup.freeze"), []byte("0"), 0)
		b, _ := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		for f := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 && pid != os.Getpid() {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		_ = os.Remove(d)
	}
	_, err := os.Stat(dir)
	return errors.Is(err, fs.ErrNotExist)
}

// volatile says which files change by themselves.
func volatile(name string) bool {
	for _, s := range []string{
		"usage", "stat", "failcnt", "pressure", "events", "cpuacct.", "numa", "current", "peak",
		"slabinfo", "io_service", "io_wait", "io_merged", "io_queued", "sectors", "time", "recursive", "effective",
	} {
		if strings.Contains(name, s) && !strings.Contains(name, "limit") && name != "cpuset.cpus" {
			return true
		}
	}
	return false
}

// Snapshot is a picture of the tree: every directory and file with owner, mode
// and value, and the tasks of every cgroup.
type Snapshot map[string]string

// Snapshot takes one.
func (tr *Tree) Snapshot() Snapshot {
	tr.t.Helper()
	s := Snapshot{}
	for _, h := range Hierarchies() {
		root := filepath.Join(h.Mount, tr.top)
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(p, &st); err != nil {
				return err
			}
			key := h.Name + ":" + strings.TrimPrefix(p, h.Mount)
			val := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
			if !d.IsDir() && st.Mode&0o444 != 0 && !volatile(d.Name()) {
				// Some cannot be read in some states; the error is the value.
				v := contents(p)
				switch d.Name() {
				case "tasks", "cgroup.threads":
					v = "" // a Go process starts threads as it likes
				case "cgroup.procs":
					f := strings.Fields(v)
					slices.Sort(f)
					v = strings.Join(slices.Compact(f), " ")
				}
				val += " " + strings.TrimSpace(v)
			}
			s[key] = val
			return nil
		})
		if err != nil {
			tr.t.Fatal(err)
		}
	}
	return s
}

// contents returns what a file says, or the error. A picture has thousands of
// files, and package os asks the kernel three times as much for each.
func contents(name string) string {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	var all []byte
	buf := make([]byte, 4096)
	for {
		n, err := Read(fd, buf)
		if err != nil {
			return err.Error()
		}
		all = append(all, buf[:n]...)
		if n < len(buf)-256 { // a line more would have had room
			return string(all)
		}
	}
}

// Diff returns what is different in b, sorted.
func (s Snapshot) Diff(b Snapshot) []string {
	var d []string
	for _, k := range slices.Sorted(maps.Keys(s)) {
		if v, ok := b[k]; !ok {
			d = append(d, "gone: "+k)
		} else if v != s[k] {
			d = append(d, fmt.Sprintf("%s: %q is now %q", k, s[k], v))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(b)) {
		if _, ok := s[k]; !ok {
			d = append(d, "new: "+k)
		}
	}
	return d
}

// Refused runs an attack and fails the test unless it ends in a clean error
// and nothing in the tree changed.
func (tr *Tree) Refused(t testing.TB, what string, attack func() error) {
	t.Helper()
	tr.Harmless(t, what, func() error {
		err := attack()
		if err == nil {
			t.Errorf("%s: no error", what)
		}
		return err
	})
}

// Harmless is Refused for the requests that the old interface answers with
// success although it does nothing: "all" leaves out where it may not.
func (tr *Tree) Harmless(t testing.TB, what string, attack func() error) {
	t.Helper()
	before := tr.Snapshot()
	if err := attack(); err != nil {
		if why := Unclean(err); why != "" {
			t.Errorf("%s: %s: %v", what, why, err)
		} else {
			t.Logf("%s: %v", what, err)
		}
	}
	if d := before.Diff(tr.Snapshot()); len(d) > 0 {
		t.Errorf("%s: changed\n  %s", what, strings.Join(d, "\n  "))
	}
}
