package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"cgmanager/cgfs/cgtest"
	"cgmanager/privcheck/matrix"
	"cgmanager/test/harness"
)

// TestKernelPrivilegeMatrixReplay puts every question of the golden matrix to
// the running daemon, in the world that package matrix describes, made of real
// cgroups and processes. The answers must agree, for the reason that the
// matrix names; what is refused must change nothing, and what is allowed must
// do something where there is something to do.
func TestKernelPrivilegeMatrixReplay(t *testing.T) {
	w := newWorld(t)
	m := &replay{
		world:    w,
		helper:   w.host(0, "."),
		refusals: rate.NewLimiter(40, 100), // below what the daemon writes down of refusals
		parents: map[string]*harness.Proc{
			"host":      w.host(0, "."),
			"container": harness.Start(t, boxSpec(0)),
		},
		victims: map[string]*victim{},
	}
	w.Place(m.parents["container"], ".")
	for _, h := range harness.Hierarchies() {
		for _, tree := range []string{"host", "container"} {
			m.build(h, tree)
		}
	}
	for _, c := range matrix.Cgroups() {
		m.victim(c)
	}
	rows := matrix.Rows()
	if harness.Find(t, "memory").V2 { // which has no such file
		rows = slices.DeleteFunc(rows, func(r matrix.Row) bool { return r.Key == "memory.oom_control" })
	}
	// Before its clause, Grant asks for the policy, of which there is none here.
	rows = slices.DeleteFunc(rows, func(r matrix.Row) bool { return r.Method == "Grant" })
	// All of it would take an hour in an emulated machine; all of them together
	// take a third of it.
	rows = harness.Share(rows, 21)
	for _, who := range matrix.Requestors() {
		t.Run(who.Name, func(t *testing.T) {
			m.enter(t, who)
			defer m.leave()
			for _, row := range rows {
				if row.Requestor == who.Name {
					m.replay(row)
				}
			}
		})
	}
}

// replay is the matrix's world, with one requestor at a time.
type replay struct {
	*world
	t        *testing.T
	helper   *harness.Proc // host root, who names others on side channels
	refusals *rate.Limiter
	logged   int64
	// parents are processes outside both trees, from which the victims come.
	parents map[string]*harness.Proc
	victims map[string]*victim // by the path of their cgroup

	who       matrix.Requestor
	r         *harness.Proc
	companion *victim
	c         *harness.Conn
	normal    picture
}

// victim is a process that does nothing.
type victim struct {
	child *harness.Child
	home  string // its cgroup below the base
	host  int    // its pid on the host
	id    uint32 // its uid and gid on the host
}

// build makes the cgroups of a tree.
func (m *replay) build(h harness.Hierarchy, tree string) {
	m.Helper()
	for _, c := range matrix.Cgroups() {
		if c.Tree != tree {
			continue
		}
		m.MakeIn(c.Path, c.Owner, c.Owner, h)
		if c.Limits != c.Owner {
			continue
		}
		files, err := filepath.Glob(m.Dir(h, c.Path) + "/*.*")
		if err != nil {
			m.Fatal(err)
		}
		for _, f := range append(files, filepath.Join(m.Dir(h, c.Path), "notify_on_release")) {
			if err := os.Lchown(f, int(c.Owner), int(c.Owner)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				m.Fatal(err)
			}
		}
	}
}

// victim starts the process that belongs into a cgroup.
func (m *replay) victim(c matrix.Cgroup) {
	m.Helper()
	if c.Victim < 0 {
		return
	}
	id := uint32(c.Victim)
	parent := m.parents[c.Tree]
	inside := id - parent.HostUID
	m.victims[c.Path] = m.idle(parent, &harness.Cred{UID: inside, GID: inside}, c.Path, id)
}

// idle starts a process that does nothing as a child of p, and places it.
func (m *replay) idle(p *harness.Proc, as *harness.Cred, home string, id uint32) *victim {
	m.Helper()
	v := &victim{child: p.Launch(as, "/bin/sleep", "1000"), home: home, id: id}
	m.Cleanup(func() { v.child.In.Close(); v.child.Out.Close() })
	v.host = hostChild(m, p, v.child.PID)
	for _, h := range harness.Hierarchies() {
		m.Write(h, home, "cgroup.procs", strconv.Itoa(v.host))
	}
	return v
}

// enter starts a requestor and its companion, and takes the picture of the
// world as it is then.
func (m *replay) enter(t *testing.T, who matrix.Requestor) {
	m.Helper()
	m.t, m.who = t, who
	m.start()
	m.normal = m.look()
}

func (m *replay) start() {
	m.Helper()
	switch {
	case m.who.NoMap:
		user := harness.Start(m.t, harness.Spec{UID: m.who.UID, GID: m.who.UID})
		m.Place(user, ".")
		m.r = user.Spawn(harness.Spec{UserNS: true})
	case m.who.Tree == "container":
		inside := m.who.UID - m.parents["container"].HostUID
		m.r = m.parents["container"].Spawn(harness.Spec{UID: inside, GID: inside})
	default:
		m.r = harness.Start(m.t, harness.Spec{UID: m.who.UID, GID: m.who.UID})
	}
	want(m.t, "the requestor's uid", m.r.HostUID, m.who.UID)
	m.Place(m.r, m.path("own"))
	m.companion = m.idle(m.r, nil, m.path("own"), m.who.UID)
	identity := ""
	if !m.who.NoMap {
		identity = fmt.Sprintf("%x", strconv.Itoa(int(m.r.UID)))
	}
	var err error
	if m.c, err = m.r.DialAs(m.d.Sock, identity); err != nil {
		m.t.Fatal(err)
	}
}

func (m *replay) leave() {
	m.r.Stop()
	if err := gone(m.r); err != nil {
		m.t.Error(err)
	}
}

func gone(p *harness.Proc) error {
	if p.Alive() {
		return fmt.Errorf("process %d is still there", p.HostPID)
	}
	return nil
}

// cgroup returns one of the requestor's tree by its name in the rows.
func (m *replay) cgroup(name string) matrix.Cgroup {
	all := matrix.Cgroups()
	return all[slices.IndexFunc(all, func(c matrix.Cgroup) bool { return c.Tree == m.who.Tree && c.Name == name })]
}

func (m *replay) path(name string) string { return m.cgroup(name).Path }

// picture is what the requestor's tree looks like: the owners, modes and
// children of each cgroup, a few values, and who is in it.
type picture map[string]string

// procs ends the keys of a picture that say who is in a cgroup.
const procs = " procs"

func (m *replay) look() picture {
	m.Helper()
	names := map[string]string{strconv.Itoa(m.r.HostPID): "requestor", strconv.Itoa(m.companion.host): "companion"}
	for path, v := range m.victims {
		names[strconv.Itoa(v.host)] = "victim of " + path
	}
	// What is removed when it is empty may go while it is looked at: then once more.
	for end := time.Now().Add(cgtest.Patience(5 * time.Second)); ; {
		pic, err := picture{}, error(nil)
		for _, h := range harness.Hierarchies() {
			for _, top := range []string{m.who.Tree, "far-" + m.who.Tree} {
				err = errors.Join(err, m.lookAt(pic, names, h, top))
			}
		}
		if err == nil {
			return pic
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) || time.Now().After(end) {
			m.t.Fatal(err)
		}
	}
}

func (m *replay) lookAt(pic picture, names map[string]string, h harness.Hierarchy, cg string) error {
	m.Helper()
	dir := m.Dir(h, cg)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	key := h.Name + ":" + cg
	var all strings.Builder
	files := []string{"."}
	for _, e := range entries {
		files = append(files, e.Name())
	}
	for _, name := range files {
		var st unix.Stat_t
		if err := unix.Lstat(dir+"/"+name, &st); err != nil {
			return err
		}
		fmt.Fprintf(&all, "%s %o %d:%d\n", name, st.Mode, st.Uid, st.Gid)
	}
	pic[key] = all.String()
	var mark [64]byte
	if n, err := unix.Getxattr(dir, "trusted.cgmanager.autoremove", mark[:]); err == nil {
		pic[key+" mark"] = string(mark[:n])
	}
	for _, f := range []string{"notify_on_release", "memory.limit_in_bytes", "memory.oom_control"} {
		if b, err := os.ReadFile(dir + "/" + f); err == nil {
			pic[key+" "+f] = string(b)
		}
	}
	var list string
	if h.V2 {
		list = m.Read(h, cg, "cgroup.procs")
	} else if b, err := os.ReadFile(dir + "/cgroup.procs"); err == nil {
		list = string(b)
	} else {
		return err
	}
	in := strings.Fields(list)
	for i, pid := range in {
		if n, ok := names[pid]; ok {
			in[i] = n
		}
	}
	slices.Sort(in)
	pic[key+procs] = strings.Join(in, ", ")
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := m.lookAt(pic, names, h, cg+"/"+e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// diff returns the keys in which two pictures differ.
func (p picture) diff(q picture) []string {
	var keys []string
	for k, v := range p {
		if u, ok := q[k]; !ok || u != v {
			keys = append(keys, k)
		}
	}
	for k := range q {
		if _, ok := p[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// restore makes the world what it was.
func (m *replay) restore(now picture) {
	m.Helper()
	for path, v := range m.victims {
		if !alive(v.host) {
			if _, err := v.child.End(cgtest.Patience(time.Second)); err != nil {
				m.t.Fatal(err)
			}
			all := matrix.Cgroups()
			m.victim(all[slices.IndexFunc(all, func(c matrix.Cgroup) bool { return c.Path == path })])
		}
	}
	if !m.r.Alive() || !alive(m.companion.host) {
		m.r.Stop()
		m.start()
	}
	for _, h := range harness.Hierarchies() {
		remake := false
		for _, k := range m.normal.diff(now) {
			remake = remake || strings.HasPrefix(k, h.Name+":") && !strings.HasSuffix(k, procs)
		}
		if remake {
			m.everybody(h, func(string) string { return "." })
			for _, top := range []string{m.who.Tree, "far-" + m.who.Tree} {
				m.remove(h, top)
			}
			m.build(h, m.who.Tree)
		}
		m.everybody(h, func(home string) string { return home })
	}
	if d := m.normal.diff(m.look()); len(d) > 0 {
		m.t.Fatalf("the world is not as it was: %q", d)
	}
}

func alive(pid int) bool {
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(st), ") ")
	return after != "" && after[0] != 'Z' && after[0] != 'X'
}

// everybody puts every process of the requestor's tree where it belongs.
func (m *replay) everybody(h harness.Hierarchy, to func(home string) string) {
	m.Helper()
	m.put(h, m.r.HostPID, to(m.path("own")))
	m.put(h, m.companion.host, to(m.companion.home))
	for _, c := range matrix.Cgroups() {
		if v := m.victims[c.Path]; c.Tree == m.who.Tree && v != nil {
			m.put(h, v.host, to(v.home))
		}
	}
}

func (m *replay) put(h harness.Hierarchy, pid int, cg string) {
	m.Helper()
	if harness.CgroupsOf(pid)[h.Name] != m.Path(cg) {
		m.Write(h, cg, "cgroup.procs", strconv.Itoa(pid))
	}
}

// remove removes a cgroup with all below.
func (m *replay) remove(h harness.Hierarchy, cg string) {
	m.Helper()
	dir := m.Dir(h, cg)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			m.remove(h, cg+"/"+e.Name())
		}
	}
	eventually(m.t, "remove "+cg, func() bool {
		err := os.Remove(dir)
		return err == nil || errors.Is(err, fs.ErrNotExist)
	})
}

// answer is what the daemon said to a question.
type answer struct {
	err error
	// clause is what its log names, "" if it wrote nothing.
	clause string
}

// allowed reports whether privilege was no obstacle. That a cgroup is in use
// is the answer of a daemon that would have removed it.
func (a answer) allowed(row matrix.Row, nameable bool) bool {
	var de *harness.DBusError
	switch {
	case a.err == nil:
		return true
	case realtime(row):
		// Nothing was granted to the victims, and no policy gives them anything:
		// what else was in the way is asked behind the clause.
		return !strings.HasPrefix(a.clause, "10")
	case !removes(row) || a.clause != "":
		return false
	case errors.As(a.err, &de):
		return strings.Contains(de.Text, "there are tasks in it")
	}
	// The side channel gives no reason, but a refusal has its line in the log.
	return errors.Is(a.err, harness.ErrScmRefused) && nameable
}

// realtime reports whether a row is about scheduling and limits of the cgroup's
// victim.
func realtime(row matrix.Row) bool {
	return row.Method == "Revoke" || strings.HasSuffix(row.Method, "Limits")
}

func removes(row matrix.Row) bool {
	return strings.HasPrefix(row.Method, "Remove") || strings.HasPrefix(row.Method, "Delete") || strings.HasPrefix(row.Method, "Prune")
}

// replay asks the question of a row and looks at what came of it.
func (m *replay) replay(row matrix.Row) {
	m.Helper()
	if method := strings.TrimSuffix(row.Method, "Scm"); method == "Remove" || method == "Delete" {
		m.evacuate(row)
	}
	before := m.normal
	if removes(row) {
		before = m.look()
	}
	if !row.Decision.Allowed() || realtime(row) {
		if err := m.refusals.Wait(m.t.Context()); err != nil {
			m.t.Fatal(err)
		}
	}
	_, m.logged = m.d.LogSince(m.logged)
	a := answer{err: m.ask(row)}
	ended := errors.Is(a.err, harness.ErrGone) || a.err != nil && !m.r.Alive()
	if ended { // killed, which the daemon goes on with until it has told its log
		eventually(m.t, row.String(), func() bool { return m.clause(&a) })
		a.err = nil
	}
	m.clause(&a)
	m.judge(row, a)
	after := before
	if !ended {
		after = m.look()
	}
	d := before.diff(after)
	switch {
	case !row.Decision.Allowed() && (len(d) > 0 || ended):
		m.t.Errorf("%s: refused, but changed %q", row, d)
	case row.Decision.Allowed() && a.err == nil && acts(row) && len(d) == 0 && !ended:
		m.t.Errorf("%s: allowed, but nothing changed", row)
	}
	if ended || len(m.normal.diff(after)) > 0 {
		m.restore(after)
	}
}

// clause reads which clause the daemon has named in its log meanwhile.
func (m *replay) clause(a *answer) bool {
	m.Helper()
	var lines []harness.LogEntry
	lines, m.logged = m.d.LogSince(m.logged)
	for _, l := range lines {
		if l["msg"] == "refused" || l["msg"] == "done" {
			a.clause = l["clause"]
		}
	}
	return a.clause != ""
}

// evacuate takes the victims of the row's cgroup, and of those below, away.
func (m *replay) evacuate(row matrix.Row) {
	m.Helper()
	target := m.path(row.Cgroup)
	for path, v := range m.victims {
		if path != target && !strings.HasPrefix(path, target+"/") {
			continue
		}
		for _, h := range harness.Hierarchies() {
			m.put(h, v.host, ".")
		}
	}
}

// acts reports whether a row changes something that a picture shows, if it is
// allowed.
func acts(row matrix.Row) bool {
	switch method := strings.TrimSuffix(row.Method, "Scm"); method {
	case "Create", "Chown", "Delete", "DeleteForce", "Kill", "Remove", "RemoveOnEmpty", "Prune":
		return true
	case "Move", "MoveFd", "MovePid", "MovePidAbs":
		return row.Out || row.Cgroup != "own" // where the companion is
	case "Delegate":
		return row.Cgroup != "own" // of which the owner has the same already
	}
	return false
}

// judge compares an answer with the row's.
func (m *replay) judge(row matrix.Row, a answer) {
	m.Helper()
	if errors.Is(a.err, harness.ErrClosed) {
		m.t.Fatalf("%s: %v", row, a.err)
	}
	if a.allowed(row, m.nameable(row)) != row.Decision.Allowed() {
		m.t.Errorf("%s: the daemon says %v (%s)", row, a.err, a.clause)
		return
	}
	if row.Decision.Allowed() {
		if a.clause != "" && a.clause != row.Decision.Clause() && (a.err == nil || !realtime(row)) {
			m.t.Errorf("%s: the daemon's clause is %s", row, a.clause)
		}
		return
	}
	if why := harness.Unclean(a.err); why != "" {
		m.t.Errorf("%s: %s: %v", row, why, a.err)
	}
	if a.clause == "" {
		if m.nameable(row) {
			m.t.Errorf("%s: refused without an audit line: %v", row, a.err)
		}
		return
	}
	if reason(a.clause) != reason(row.Decision.Clause()) {
		m.t.Errorf("%s: the daemon's clause is %s", row, a.clause)
	}
	var de *harness.DBusError
	if errors.As(a.err, &de) && de.Name != map[bool]string{
		true:  "org.freedesktop.DBus.Error.AccessDenied",
		false: "org.freedesktop.DBus.Error.InvalidArgs",
	}[row.Interface == "CGManager1"] {
		m.t.Errorf("%s: refused with %v", row, de)
	}
}

// reason is the last part of a clause, which decided: "1 subtree" of "4
// sideways/1 subtree". Who cannot reach a cgroup at all is refused before the
// daemon looks at anything else of the request.
func reason(clause string) string { return clause[strings.LastIndexByte(clause, '/')+1:] }

// nameable reports whether the row's cgroup has a name in the method's
// grammar.
func (m *replay) nameable(row matrix.Row) bool {
	return row.Out || realtime(row) || row.Cgroup == "own" || row.Cgroup == "child" || m.namesFromRoot(row) || strings.HasPrefix(row.Method, "GetPidCgroup")
}

// namesFromRoot reports whether a "/" in front of a cgroup's name means the
// hierarchy's root to the method, as it does to requestors of the host.
func (m *replay) namesFromRoot(row matrix.Row) bool {
	if row.Interface == "CGManager1" || m.who.Tree == "container" || m.who.NoMap {
		return false
	}
	switch strings.TrimSuffix(row.Method, "Scm") {
	case "GetValue", "SetValue", "GetTasks", "GetTasksRecursive", "ListChildren", "ListKeys":
		return true
	}
	return row.Method == "MovePidAbs"
}

// name returns the name by which the row's cgroup, or box, is asked for.
func (m *replay) name(row matrix.Row) string {
	target := m.path(row.Cgroup)
	if row.Out {
		target = m.path("box")
	}
	if m.namesFromRoot(row) {
		return m.Path(target)
	}
	rel, err := filepath.Rel(m.path("own"), target)
	if err != nil {
		m.t.Fatal(err)
	}
	if rel == "." {
		rel = ""
	}
	return rel
}

// ask makes the row's request.
func (m *replay) ask(row matrix.Row) error {
	m.Helper()
	v := m.companion
	if row.Out || realtime(row) || strings.HasPrefix(row.Method, "GetPidCgroup") {
		v = m.victims[m.path(row.Cgroup)]
	}
	if row.Interface == "CGManager1" {
		return m.ask1(row, m.name(row), v)
	}
	return m.ask0(row, m.name(row), v)
}

// second is the second user of the tree, by the requestor's number and by the
// host's.
func (m *replay) second() (inside, outside uint32) {
	if m.who.Tree == "container" {
		return 1000, 101000
	}
	return 1001, 1001
}

// setTo is what SetValue writes: what is there already, except to tasks.
func (m *replay) setTo(row matrix.Row) string {
	if row.Key == "memory.limit_in_bytes" {
		return m.Read(harness.Find(m.t, "memory"), m.path(row.Cgroup), row.Key)
	}
	return "0"
}

func (m *replay) ask1(row matrix.Row, name string, v *victim) error {
	m.Helper()
	args := []any{name}
	switch row.Method {
	case "Create":
		args = []any{strings.TrimPrefix(name+"/new", "/"), []string{}, map[string]string{}}
	case "SetValue":
		args = append(args, map[string]string{row.Key: m.setTo(row)})
	case "GetValue":
		args = append(args, []string{row.Key})
	case "Chown":
		id, _ := m.second()
		args = append(args, id, id)
	case "Delegate":
		args = append(args, []string{})
	case "Revoke", "GrantLimits", "RevokeLimits":
		args = []any{uint32(v.child.PID)}
	case "Move":
		args = append(args, uint32(v.child.PID))
	case "MoveFd":
		fd := m.r.PidFD(v.child.PID)
		defer m.r.Close(fd)
		args = append(args, harness.FD(fd))
	}
	return unhurried(row.Method, func() error { return second(m.c.V1(row.Method, args...)) })
}

func (m *replay) ask0(row matrix.Row, name string, v *victim) error {
	m.Helper()
	method, side := strings.CutSuffix(row.Method, "Scm")
	args := []any{"memory"}
	if !strings.HasPrefix(method, "GetPidCgroup") {
		args = append(args, name)
	}
	// What a plain call says last, and a side channel by the second credential.
	var last []any
	var cred *harness.Cred
	switch method {
	case "GetPidCgroup", "GetPidCgroupAbs", "MovePid", "MovePidAbs":
		last = []any{int32(v.child.PID)}
		cred = &harness.Cred{PID: int32(v.host), UID: v.id, GID: v.id}
	case "Create":
		args[1] = strings.TrimPrefix(name+"/new", "/")
	case "Chown":
		id, outside := m.second()
		last = []any{int32(id), int32(id)}
		cred = &harness.Cred{PID: m.helper.PID, UID: outside, GID: outside}
	case "Chmod":
		mode := int32(0o755)
		if row.Key != "" {
			mode = 0o644
		}
		args = append(args, harness.Find(m.t, "memory").File(row.Key), mode)
	case "GetValue":
		args = append(args, row.Key)
	case "SetValue":
		args = append(args, row.Key, m.setTo(row))
	case "Remove":
		args = append(args, int32(1))
	}
	if !side {
		_, err := m.c.V0(method, append(args, last...)...)
		return err
	}
	x, err := m.c.OpenScm(row.Method, args...)
	if err != nil {
		return err
	}
	defer x.Close()
	if err := x.KickSelf(); err != nil {
		return err
	}
	if cred != nil {
		// Only who has CAP_SYS_ADMIN may name another process.
		y := x.Give(m.helper)
		defer y.Close()
		if err := y.Kick(*cred); err != nil {
			return err
		}
	}
	_, err = x.Finish(row.Method)
	return err
}
