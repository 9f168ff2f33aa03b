package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// However many processes a container names for whom it acts, the daemon has
// descriptors for others.
func TestKernelChainCrowd(t *testing.T) {
	harness.Require(t, "setpriv", "prlimit")
	w := newWorld(t)
	a := w.box("c1")
	w.Make("u", 4000, 4000)
	u := w.host(4000, "u")
	dir := harness.PublicDir(t)
	sock, log := filepath.Join(dir, "sock"), filepath.Join(dir, "log")
	const files = 1024
	// Without the privilege to raise the bound, and few.
	d := harness.Start(t, harness.Spec{}).Launch(nil, "/bin/sh", "-c", `log=$1; shift; exec "$@" 2>"$log"`, "sh", log,
		"setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource", "prlimit", fmt.Sprintf("--nofile=%d:%[1]d", files),
		harness.Binary(t, "cgmanager"), "--listen", "unix:path="+sock, "--state-dir", filepath.Join(dir, "state"))
	eventually(t, "the daemon serves", func() bool { return harness.Ping(sock) == nil })
	pid := listenerPID(t, sock) // asked once: each time is a connection
	defer func() {
		if err := unix.Kill(pid, unix.SIGTERM); err != nil {
			t.Error(err)
		}
		if _, err := d.End(cgtest.Patience(3 * time.Second)); err != nil {
			t.Error(err)
		}
	}()
	open := func() int {
		all, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		return len(all)
	}
	before := open()
	self := a.sees(a.Proc)
	var conns []*harness.Conn
	links, most := 0, 0
	for i := 0; i < 64 && most < files-64; i++ {
		c, err := a.Dial(sock)
		if err != nil {
			break
		}
		conns = append(conns, c)
		c.As = &self
		for range 32 {
			if _, err := c.V1("ActFor"); err != nil {
				break
			}
			links++
		}
		_, _ = c.V1("ListChildren", "")
		most = max(most, open())
	}
	t.Logf("%d connections, %d links, %d files, %d before", len(conns), links, most, before)
	if most > files*3/4+before {
		t.Errorf("a container has the daemon open %d files of %d", most, files)
	}
	if links < 32 {
		t.Errorf("only %d links", links)
	}
	c := u.MustDial(sock)
	asker{t, c}.v1("Create", "late", []string{}, map[string]string{})
	c.Close()
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "what a container had is closed", func() bool { return open() <= before })
	c = mustChain(&box{w: &world{T: t, Tree: w.Tree, d: w.d, via: sock}, Proc: a.Proc, cg: a.cg, first: a.first}, a.Proc)
	asker{t, c}.v1("ListChildren", "")
	c.Close()
	if b, err := os.ReadFile(log); err != nil || strings.Contains(string(b), "too many open files") {
		t.Errorf("%v\n%s", err, b)
	}
}

// What a request costs grows with the chain, and not faster than the chain.
func TestKernelChainCost(t *testing.T) {
	w := newWorld(t)
	b := w.boxAt(4)
	self := b.sees(b.Proc)
	c := b.MustDial(w.sock())
	defer c.Close()
	rounds := harness.Rounds(20)
	took := func() time.Duration {
		best := time.Hour
		for range 5 * rounds { // the best of which no stall was in
			start := time.Now()
			asker{t, c}.v1("ListChildren", "")
			best = min(best, time.Since(start))
		}
		return best
	}
	alone := took()
	c.As = &self
	for range 32 {
		asker{t, c}.v1("ActFor")
	}
	far := took()
	t.Logf("%v alone, %v at the end of a chain", alone, far)
	if far > 40*alone {
		t.Errorf("a request takes %v at the end of the longest chain, %v without one", far, alone)
	}
}

// A user of a container makes a user namespace and is root there: that opens no
// way out of where the container's root has put it.
func TestKernelProxyEscapeSelfMade(t *testing.T) {
	harness.Require(t, "dbus-send", "unshare")
	w := newWorld(t)
	a := w.box("c1")
	x := startProxy(t, a.Proc, w.d.Sock)
	w.Make("c1/jail", a.HostUID, a.HostGID)
	u := a.user(1000)
	w.Place(u, "c1/jail")
	w.watch = []*harness.Proc{a.Proc, u}
	for name, sock := range map[string]string{"proxy": x.sock, "daemon": w.d.Sock} {
		for who, as := range map[string]string{"user": "", "root of its own": "unshare -U -r "} {
			w.refused(who+" by the "+name, func() error {
				out, code := u.Exec(nil, "sh", "-c", fmt.Sprintf("%sdbus-send --peer=unix:path=%s --print-reply /org/linuxcontainers/cgmanager "+
					"org.linuxcontainers.cgmanager0_0.MovePidAbs string:memory string:/ int32:%d", as, sock, u.NSpid()[1]))
				if code == 0 {
					return nil
				}
				_, said, _ := strings.Cut(out, "Error ")
				name, text, _ := strings.Cut(said, ": ")
				return &harness.DBusError{Name: name, Text: text}
			})
		}
	}
}

// eagerArgs are for eagerCrowd.
type eagerArgs struct {
	Sock string
	N    int
	Ask  []byte
}

// eagerCrowd makes so many connections, asks something on each, and keeps them.
var eagerCrowd = harness.Inside("an eager crowd", func(a eagerArgs) (struct{}, error) {
	for range a.N {
		fd, err := dialRaw(a.Sock)
		if err != nil {
			return struct{}{}, err
		}
		held = append(held, fd)
		// What is refused is closed.
		_, _ = harness.Begin(fd, append([]byte("\x00AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"), a.Ask...))
	}
	return struct{}{}, nil
})

// What a container may have of the daemon is there for all in it: one user takes no
// more of it through the proxy than leaves room for others.
func TestKernelProxyCrowd(t *testing.T) {
	w := newWorld(t)
	a := w.box("c1")
	x := startProxy(t, a.Proc, w.d.Sock)
	w.Make("c1/u", a.HostUID+7, a.HostGID+7)
	ask := call(t, 1, harness.V1, "ListChildren", "")
	var crowds []*harness.Proc
	for range 3 {
		u := a.user(7)
		w.Place(u, "c1/u")
		crowds = append(crowds, u)
		if err := u.Run(eagerCrowd, eagerArgs{x.sock, harness.Rounds(400), ask}, nil); err != nil {
			t.Fatal(err)
		}
	}
	settled := 0
	eventually(t, "the crowd is served", func() bool {
		last := settled
		settled = x.settled(0)
		return settled == last && settled > x.fds+3*harness.Rounds(200)
	})
	t.Logf("the proxy has %d files open, the daemon %d", settled, w.d.FDs())
	start := time.Now()
	c := a.MustDial(x.sock)
	asker{t, c}.v1("Create", "late", []string{}, map[string]string{})
	c.Close()
	if took := time.Since(start); took > patience() {
		t.Errorf("root of the container is served after %v", took)
	}
	for _, u := range crowds {
		u.Stop()
	}
}

// What becomes of a chain after it was made: each request looks at all of it as it
// is now.
func TestKernelChainChanges(t *testing.T) {
	w := newWorld(t)
	a := w.box("c1")
	b := a.box("c2")
	c := b.box("c3")
	w.Make("c1/c2x", a.HostUID, a.HostGID)
	create := func(conn *harness.Conn) error {
		return second(conn.V1("Create", "x", []string{}, map[string]string{}))
	}
	t.Run("a proxy that is moved", func(t *testing.T) {
		w := w.sub(t)
		conn := mustChain(a, b.Proc, c.Proc)
		defer conn.Close()
		asker{t, conn}.v1("ListChildren", "")
		w.Place(b.Proc, "c1/c2x")
		w.refused("beside its client", func() error { return create(conn) })
		w.refused("and upwards", func() error { return second(conn.V0("MovePidAbs", "memory", "/", int32(1))) })
		w.Place(b.Proc, "c1/c2")
		w.Place(c.Proc, "c1/c2x")
		w.refused("a client that is moved", func() error { return create(conn) })
		w.Place(c.Proc, "c1/c2/c3")
		asker{t, conn}.v1("ListChildren", "")
	})
	t.Run("a proxy that ends", func(t *testing.T) {
		w := w.sub(t)
		hop := b.user(0)
		conn := mustChain(a, hop, c.Proc)
		defer conn.Close()
		asker{t, conn}.v1("ListChildren", "")
		hop.Stop()
		w.refused("without one in the middle", func() error { return create(conn) })
	})
	t.Run("a client that makes a user namespace", func(t *testing.T) {
		w := w.sub(t)
		w.Make("c1/c2/c3/u", c.HostUID+7, c.HostGID+7)
		u := c.user(7)
		w.Place(u, "c1/c2/c3/u")
		// It opens connections by its number, and becomes root of its own.
		child := u.Launch(nil, "/bin/sh", "-c", "read x; exec unshare -U -r sh -c 'read y'")
		defer func() { _, _ = child.End(time.Second) }()
		status := fmt.Sprintf("/proc/%d/", hostChild(t, u, child.PID))
		users, err := os.Readlink(status + "ns/user")
		if err != nil {
			t.Fatal(err)
		}
		cred := harness.Cred{PID: int32(child.PID), UID: 7, GID: 7}
		conn := c.MustDial(w.sock())
		defer conn.Close()
		conn.As = &cred
		asker{t, conn}.v1("ActFor")
		asker{t, conn}.v1("Create", "own", []string{}, map[string]string{})
		asker{t, conn}.v1("Delete", "own")
		if _, err := child.In.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is root of its own", func() bool {
			now, err := os.Readlink(status + "ns/user")
			ids, merr := os.ReadFile(status + "uid_map")
			return err == nil && merr == nil && now != users && len(ids) > 0
		})
		w.refused("up to its proxy", func() error { return second(conn.V0("MovePidAbs", "memory", "/", cred.PID)) })
		w.refused("a limit of its own", func() error {
			return second(conn.V1("SetValue", "", map[string]string{"pids.limit": "max"}))
		})
		w.refused("its proxy's task", func() error { return second(conn.V1("Move", "", uint32(1))) })
	})
	t.Run("one that grows while a call waits for credentials", func(t *testing.T) {
		w := w.sub(t)
		for name, cred := range map[string]harness.Cred{"the opener's": a.sees(a.Proc), "the client's": a.sees(c.Proc)} {
			conn := a.MustDial(w.sock())
			w.refused(name, func() error {
				x, err := conn.OpenScm("CreateScm", "memory", "grown")
				if err != nil {
					return err
				}
				defer x.Close()
				inner := a.sees(b.Proc)
				conn.As = &inner
				if _, err := conn.V1("ActFor"); err != nil {
					t.Error(err)
				}
				if err := x.Kick(cred); err != nil {
					return err
				}
				return second(x.Finish("CreateScm"))
			})
			conn.Close()
		}
	})
}
