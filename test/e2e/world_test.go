package e2e_test

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// world is a daemon, a cgroup tree of the test's own, and containers in it.
type world struct {
	*testing.T
	*harness.Tree
	d *harness.Daemon
	// via is the socket that clients use, if that is not the daemon's own.
	via string
	// watch are processes that no attack may move or end.
	watch []*harness.Proc
	// around is the container in which all of it takes place, nil on the host.
	around *box
	// proxies are those around, from the outside inwards.
	proxies []*proxied
	// pace is about how long a request takes in a race.
	pace time.Duration
}

func newWorld(t *testing.T) *world {
	t.Helper()
	harness.Require(t, "root", "userns")
	tree := harness.NewTree(t)
	return &world{T: t, Tree: tree, d: harness.StartDaemon(t)}
}

// sock is the socket that clients use.
func (w *world) sock() string { return cmp.Or(w.via, w.d.Sock) }

// within is the world in a container of w, where clients use a proxy. Its
// ids are those of the container, its tree is what is below the container's
// cgroup, and its hosts are the container's processes.
func (w *world) within(b *box, x *proxied) *world {
	s := *w
	s.Tree, s.around, s.via = w.Part(b.cg, b.first), b, x.sock
	s.proxies = append(slices.Clip(w.proxies), x)
	return &s
}

// first is the test's number of the world's id 0, depth how many containers it
// is in.
func (w *world) first() uint32 {
	if w.around == nil {
		return 0
	}
	return w.around.first
}

func (w *world) depth() int {
	if w.around == nil {
		return 0
	}
	return w.around.level()
}

// abs is the name of a cgroup that counts from the root, where the requestor is
// host root, or from the innermost proxy's cgroup.
func (w *world) abs(cg string) string {
	if w.around == nil {
		return w.Path(cg)
	}
	return "/" + cg
}

// dir makes a directory of the world's root, as harness.PublicDir does.
func (w *world) dir() string {
	w.Helper()
	dir := harness.PublicDir(w.T)
	if err := os.Chown(dir, int(w.first()), int(w.first())); err != nil {
		w.Fatal(err)
	}
	return dir
}

// refused is Tree.Refused for this test, and looks after the watched
// processes too.
func (w *world) refused(what string, attack func() error) {
	w.Helper()
	w.watched(what, func() { w.Refused(w.T, what, attack) })
}

// refusedAll is refused for each attack; with -short there is one picture before
// and one after them all.
func (w *world) refusedAll(attacks map[string]func() error) {
	w.Helper()
	if testing.Short() {
		w.watched("one of the attacks", func() { w.RefusedAll(w.T, attacks) })
		return
	}
	for what, attack := range attacks {
		w.refused(what, attack)
	}
}

// harmless is Tree.Harmless with the same care.
func (w *world) harmless(what string, attack func() error) {
	w.Helper()
	w.watched(what, func() { w.Harmless(w.T, what, attack) })
}

func (w *world) watched(what string, f func()) {
	w.Helper()
	var before []map[string]string
	for _, p := range w.watch {
		before = append(before, p.Cgroups())
	}
	f()
	for i, p := range w.watch {
		if after := p.Cgroups(); !p.Alive() || !maps.Equal(before[i], after) {
			w.Errorf("%s: a watched process was in %v, is in %v", what, before[i], after)
		}
	}
}

// scmBy makes an *Scm call over c in which each of the kickers sends a
// credential, its own. The side channel is handed to them.
func scmBy(c *harness.Conn, member string, kickers []*harness.Proc, args ...any) error {
	x, err := c.OpenScm(member, args...)
	if err != nil {
		return err
	}
	defer x.Close()
	for _, k := range kickers {
		y := x.Give(k)
		err := y.Kick(k.Cred)
		y.Close()
		if err != nil {
			return err
		}
	}
	_, err = x.Finish(member)
	return err
}

// second drops a result that an attack does not look at.
func second(_ any, err error) error { return err }

// box is a container: its first process, which is root inside, in a cgroup of
// its own in every hierarchy that it owns.
type box struct {
	w *world
	*harness.Proc
	// cg is its cgroup, relative to the tree.
	cg string
	// first is the test's number of the box's id 0.
	first uint32
}

// levelMaps are the id maps of containers one in another: where id 0 is in the
// namespace around, and how many ids there are.
var levelMaps = []struct{ from, size int }{{100000, 65536}, {10000, 20000}, {5000, 5000}, {2000, 3000}, {1500, 1500}, {1100, 400}}

// box makes a container.
func (w *world) box(name string) *box {
	w.Helper()
	return w.placed(w.start(boxSpec(w.depth())), name)
}

// box makes a container inside b.
func (b *box) box(name string) *box {
	b.w.Helper()
	return b.w.placed(b.Spawn(boxSpec(b.level())), b.cg+"/"+name)
}

func boxSpec(level int) harness.Spec {
	m := levelMaps[level]
	return harness.Spec{UserNS: true, PIDNS: true, MapFrom: m.from, MapSize: m.size}
}

func (w *world) placed(p *harness.Proc, cg string) *box {
	w.Helper()
	w.Make(cg, w.uid(p), w.gid(p))
	w.Place(p, cg)
	return &box{w: w, Proc: p, cg: cg, first: p.HostUID}
}

// boxAt makes containers one in another and returns the innermost.
func (w *world) boxAt(level int) *box {
	w.Helper()
	b := w.box("c1")
	for i := 2; i <= level; i++ {
		b = b.box(fmt.Sprint("c", i))
	}
	return b
}

// user starts a process with the id inside the container.
func (b *box) user(id uint32) *harness.Proc {
	b.w.Helper()
	return b.Spawn(harness.Spec{UID: id, GID: id})
}

// host starts a process with the id, in no container but those in which the
// world is, and places it.
func (w *world) host(id uint32, cg string) *harness.Proc {
	w.Helper()
	p := w.start(harness.Spec{UID: id, GID: id})
	w.Place(p, cg)
	return p
}

// start starts a process where the world is.
func (w *world) start(s harness.Spec) *harness.Proc {
	w.Helper()
	if w.around != nil {
		return w.around.Spawn(s)
	}
	return harness.Start(w.T, s)
}

// uid and gid are a process's ids where the world is.
func (w *world) uid(p *harness.Proc) uint32 { return p.HostUID - w.first() }

func (w *world) gid(p *harness.Proc) uint32 { return p.HostGID - w.first() }

// freeze freezes a cgroup and waits until all in it stand still: a picture shows who
// does not yet.
func (w *world) freeze(cg string) {
	w.Helper()
	freezer := harness.Find(w.T, "freezer")
	w.Write(freezer, cg, "freezer.state", "FROZEN")
	eventually(w.T, cg+" is frozen", func() bool { return w.Read(freezer, cg, "freezer.state") == "FROZEN" })
}

// in reports where p is, below the tree, if that is the same in every
// hierarchy but the named ones; else all of it.
func (w *world) in(p *harness.Proc) string {
	w.Helper()
	var one string
	all := p.Cgroups()
	for _, h := range controllers() {
		if one != "" && all[h.Name] != one {
			return fmt.Sprint(all)
		}
		one = all[h.Name]
	}
	if rest, ok := strings.CutPrefix(one, w.Base+"/"); ok {
		return rest
	}
	return one
}

// sub is w for a subtest.
func (w *world) sub(t *testing.T) *world {
	s := *w
	s.T = t
	return &s
}

// level is how many containers b is in, itself included.
func (b *box) level() int { return b.w.depth() + strings.Count(b.cg, "/") + 1 }

// sees returns p's credential by the numbers of b's namespaces.
func (b *box) sees(p *harness.Proc) harness.Cred {
	b.w.Helper()
	return harness.Cred{PID: p.NSpid()[b.level()], UID: p.HostUID - b.first, GID: p.HostGID - b.first}
}

// controllers are the hierarchies that every request touches; name= ones it
// touches only when it names them.
func controllers() []harness.Hierarchy {
	var hs []harness.Hierarchy
	for _, h := range harness.Hierarchies() {
		if !h.Named() {
			hs = append(hs, h)
		}
	}
	return hs
}

// asker makes requests that must succeed.
type asker struct {
	testing.TB
	c *harness.Conn
}

func (a asker) v1(member string, args ...any) []any {
	a.Helper()
	return a.ok(harness.V1, member, args)
}

func (a asker) v0(member string, args ...any) []any {
	a.Helper()
	return a.ok(harness.V0, member, args)
}

func (a asker) ok(iface, member string, args []any) []any {
	a.Helper()
	var r []any
	err := unhurried(member, func() (err error) {
		r, err = a.c.Call(iface, member, args...)
		return err
	})
	if err != nil {
		a.Fatalf("%s%q: %v", member, args, err)
	}
	return r
}

// unhurried asks again where Kill says that tasks are left, or do not stand still, as
// they may for longer than it waits on a slow machine.
func unhurried(member string, ask func() error) error {
	for end := time.Now().Add(cgtest.Patience(10 * time.Second)); ; {
		err := ask()
		if member != "Kill" || !busy(err) || time.Now().After(end) {
			return err
		}
	}
}

func busy(err error) bool {
	var de *harness.DBusError
	return errors.As(err, &de) && de.Name == "org.linuxcontainers.CGManager1.Error.Busy"
}

// want compares a result with what it should be.
func want(t testing.TB, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s is %#v, want %#v", what, got, want)
	}
}

// owner is the owner of a file of a cgroup, by the numbers of where the world is.
func (w *world) owner(h harness.Hierarchy, cg, file string) string {
	w.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(w.Dir(h, cg), file), &st); err != nil {
		w.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", st.Uid-w.first(), st.Gid-w.first())
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	cgtest.Eventually(t, 5*time.Second, what, ok)
}

// hostChild is the host's number of p's child pid.
func hostChild(t testing.TB, p *harness.Proc, pid int) int {
	t.Helper()
	// Each thread has children of its own, and any may have started this one.
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.HostPID))
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	for _, name := range files {
		of, _ := os.ReadFile(name)
		b = append(b, of...)
	}
	for f := range strings.FieldsSeq(string(b)) {
		st, _ := os.ReadFile("/proc/" + f + "/status")
		for line := range strings.Lines(string(st)) {
			if n, ok := strings.CutPrefix(line, "NSpid:"); ok && slices.Contains(strings.Fields(n)[len(strings.Fields(n))-1:], strconv.Itoa(pid)) {
				host, _ := strconv.Atoi(f)
				return host
			}
		}
	}
	t.Fatalf("no process %d among the children of %d: %s", pid, p.HostPID, b)
	return 0
}
