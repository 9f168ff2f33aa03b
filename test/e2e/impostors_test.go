package e2e_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cgmanager/cgfs/cgtest"
	"cgmanager/test/harness"
)

// Container root names a host process in its credentials: one that entered the
// container's pid namespace and so has a number there (nsenter, lxc-attach).
// The kernel lets it. The host process has rights over the cgroup "host".
func TestKernelImpostorSetns(t *testing.T) { impostorSetns(t, newWorld) }

func impostorSetns(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	b := w.box("c1")
	w.Make("c1/mine", w.uid(b.Proc), w.gid(b.Proc))
	w.Make("host", 0, 0)
	w.Make("host/sub", 0, 0)
	w.Make("theirs", w.uid(b.Proc), w.gid(b.Proc))
	w.Make("theirs/sub", w.uid(b.Proc), w.gid(b.Proc))
	for name, entered := range map[string]struct {
		uid uint32
		cg  string
	}{
		"host root": {0, "host"},
		// Its ids are those of the container's root, so they can be named.
		"the same id on the host":        {b.HostUID, "theirs"},
		"host root in the tree's cgroup": {0, "."},
	} {
		t.Run(name, func(t *testing.T) {
			h := harness.StartInPIDNSOf(t, b.Proc, harness.Spec{UID: entered.uid, GID: entered.uid})
			w.Place(h, entered.cg)
			u := b.user(1000)
			w := w.sub(t)
			w.watch = []*harness.Proc{h, u}
			forged := harness.Cred{PID: h.NSpid()[b.level()], UID: 0, GID: 0}
			c := b.MustDial(w.sock())
			defer c.Close()
			// The connection is good; the credential makes the difference.
			want(t, "an honest call", asker{t, c}.v1("ListChildren", "")[0], []string{"mine"})
			c.As = &forged
			w.refusedAll(map[string]func() error{
				"Create": func() error { return second(c.V1("Create", "sub/x", []string{}, map[string]string{})) },
				"Create in a named cgroup": func() error {
					return second(c.V1("Create", "host/sub/x", []string{}, map[string]string{}))
				},
				"SetValue":            func() error { return second(c.V1("SetValue", "sub", map[string]string{"pids.limit": "3"})) },
				"SetValue of its own": func() error { return second(c.V1("SetValue", "", map[string]string{"pids.limit": "3"})) },
				"GetValue":            func() error { return second(c.V1("GetValue", "sub", []string{"pids.limit"})) },
				"ListTasks":           func() error { return second(c.V1("ListTasks", "sub")) },
				"Chown":               func() error { return second(c.V1("Chown", "sub", uint32(1000), uint32(1000))) },
				"Move":                func() error { return second(c.V1("Move", "sub", uint32(u.PID))) },
				"Move itself":         func() error { return second(c.V1("Move", "sub", uint32(b.PID))) },
				"Move h":              func() error { return second(c.V1("Move", "mine", uint32(forged.PID))) },
				"Kill":                func() error { return second(c.V1("Kill", "sub")) },
				"Delete":              func() error { return second(c.V1("Delete", "sub")) },
				"MovePidAbs":          func() error { return second(c.V0("MovePidAbs", "memory", "/", b.PID)) },
				"MovePid":             func() error { return second(c.V0("MovePid", "memory", "sub", b.PID)) },
				"old Create":          func() error { return second(c.V0("Create", "memory", "sub/x")) },
				"Chmod":               func() error { return second(c.V0("Chmod", "memory", "sub", "", int32(0o777))) },
				"RemoveOnEmpty":       func() error { return second(c.V0("RemoveOnEmpty", "memory", "sub")) },
				"Remove":              func() error { return second(c.V0("Remove", "memory", "sub", int32(1))) },
				"Prune":               func() error { return second(c.V0("Prune", "memory", "sub")) },
			})
			c.As = nil
			me := b.Cred
			user := b.sees(u)
			w.refusedAll(map[string]func() error{
				"CreateScm": func() error { return second(c.Scm("CreateScm", []harness.Cred{forged}, "memory", "sub/x")) },
				"SetValueScm": func() error {
					return second(c.Scm("SetValueScm", []harness.Cred{forged}, "pids", "sub", "pids.max", "3"))
				},
				"GetValueScm": func() error { return second(c.Scm("GetValueScm", []harness.Cred{forged}, "pids", "sub", "pids.max")) },
				"RemoveScm":   func() error { return second(c.Scm("RemoveScm", []harness.Cred{forged}, "memory", "sub", int32(1))) },
				"ChownScm": func() error {
					return second(c.Scm("ChownScm", []harness.Cred{forged, user}, "memory", "sub"))
				},
				"MovePidScm of a user": func() error { return second(c.Scm("MovePidScm", []harness.Cred{forged, user}, "memory", "sub")) },
				"MovePidScm of h":      func() error { return second(c.Scm("MovePidScm", []harness.Cred{me, forged}, "memory", "mine")) },
				"MovePidScm of h by h": func() error { return second(c.Scm("MovePidScm", []harness.Cred{forged, forged}, "memory", "")) },
				"MovePidAbsScm":        func() error { return second(c.Scm("MovePidAbsScm", []harness.Cred{forged, me}, "memory", "/")) },
				"MovePidAbsScm of h":   func() error { return second(c.Scm("MovePidAbsScm", []harness.Cred{me, forged}, "memory", "/")) },
				"GetPidCgroupScm of h": func() error { return second(c.Scm("GetPidCgroupScm", []harness.Cred{me, forged}, "memory")) },
				"GetPidCgroupAbsScm":   func() error { return second(c.Scm("GetPidCgroupAbsScm", []harness.Cred{forged, forged}, "memory")) },
				"own pid with other ids": func() error {
					return second(c.Scm("CreateScm", []harness.Cred{{PID: b.PID, UID: 1000, GID: 1000}}, "memory", "mine/x"))
				},
				"a user's pid with root's ids": func() error {
					return second(c.Scm("CreateScm", []harness.Cred{{PID: u.PID, UID: 0, GID: 0}}, "memory", "mine/x"))
				},
			})
		})
	}
}

// A task is moved sideways out of a cgroup in which somebody else froze it.
// The version 1 kernel allows it to whoever owns the destination; clause 4
// does not.
func TestKernelImpostorSideways(t *testing.T) { impostorSideways(t, newWorld) }

func impostorSideways(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	freezer := harness.Find(t, "freezer")
	// Somebody else owns the yard; "mine" is the requestor's, "jail" is not.
	attacks := func(w *world, jail string, r, v *harness.Proc, pidIn func(*harness.Proc) harness.Cred) {
		w.freeze(jail)
		c := r.MustDial(w.sock())
		defer c.Close()
		fd := r.PidFD(int(pidIn(v).PID))
		pid := pidIn(v).PID
		w.refusedAll(map[string]func() error{
			"Move":            func() error { return second(c.V1("Move", "mine", uint32(pid))) },
			"Move up":         func() error { return second(c.V1("Move", "", uint32(pid))) },
			"MoveFd":          func() error { return second(c.V1("MoveFd", "mine", harness.FD(fd))) },
			"MovePid freezer": func() error { return second(c.V0("MovePid", "freezer", "mine", pid)) },
			"MovePid memory":  func() error { return second(c.V0("MovePid", "memory", "mine", pid)) },
			"MovePid up":      func() error { return second(c.V0("MovePid", "freezer", "", pid)) },
			"MovePidAbs":      func() error { return second(c.V0("MovePidAbs", "freezer", "/", pid)) },
			"thaw":            func() error { return second(c.V1("SetValue", "jail", map[string]string{"state": "thawed"})) },
			"thaw (old)":      func() error { return second(c.V0("SetValue", "freezer", "jail", "freezer.state", "THAWED")) },
			"DeleteForce":     func() error { return second(c.V1("DeleteForce", "jail")) },
			"limit":           func() error { return second(c.V1("SetValue", "jail", map[string]string{"pids.limit": "max"})) },
		})
		w.harmless("MovePid all", func() error { return second(c.V0("MovePid", "all", "mine", pid)) })
		r.Close(fd)
		// Thawed, v plays along and sends its own credential.
		w.Write(freezer, jail, "freezer.state", "THAWED")
		for _, member := range []string{"MovePidScm", "MovePidAbsScm"} {
			for _, to := range []string{"mine", "/mine", ""} {
				w.refused(member+" "+to, func() error {
					return scmBy(c, member, []*harness.Proc{r, v}, "freezer", to)
				})
			}
		}
	}

	t.Run("host user", func(t *testing.T) {
		w := newWorld(t)
		w.Make("yard", 0, 0)
		w.Make("yard/mine", 1000, 1000)
		w.Make("yard/jail", 0, 0)
		r, v := w.host(1000, "yard"), w.host(1000, "yard/jail")
		w.watch = []*harness.Proc{v}
		attacks(w, "yard/jail", r, v, func(p *harness.Proc) harness.Cred { return p.Cred })

		// The yard in which it may: going down, and sideways below what it
		// owns.
		w.Place(v, "yard")
		c := r.MustDial(w.sock())
		defer c.Close()
		a := asker{t, c}
		a.v1("Create", "mine/a", []string{}, map[string]string{})
		a.v1("Create", "mine/b", []string{}, map[string]string{})
		for _, to := range []string{"mine/a", "mine/b", "mine"} {
			a.v1("Move", to, uint32(v.PID))
			want(t, "moved", w.in(v), "yard/"+to)
		}
	})
	t.Run("jailed in one hierarchy alone", func(t *testing.T) {
		w := newWorld(t)
		w.Make("yard", 0, 0)
		w.Make("yard/mine", 1000, 1000)
		w.Make("yard/jail", 0, 0)
		r, v := w.host(1000, "yard"), w.host(1000, "yard/mine")
		w.PlaceIn(v, "yard/jail", freezer)
		w.watch = []*harness.Proc{v}
		w.freeze("yard/jail")
		c := r.MustDial(w.sock())
		defer c.Close()
		w.refused("Move", func() error { return second(c.V1("Move", "mine", uint32(v.PID))) })
		w.harmless("MovePid all", func() error { return second(c.V0("MovePid", "all", "mine", v.PID)) })
		w.refused("MovePid freezer", func() error { return second(c.V0("MovePid", "freezer", "mine", v.PID)) })
		w.Write(freezer, "yard/jail", "freezer.state", "THAWED")
	})
	t.Run("prefix of the name", func(t *testing.T) {
		w := newWorld(t)
		w.Make("yard", 0, 0)
		w.Make("yard/m", 1000, 1000)
		w.Make("yard/m/mine", 1000, 1000)
		w.Make("yard/mm", 0, 0)
		r, v := w.host(1000, "yard/m"), w.host(1000, "yard/mm")
		w.watch = []*harness.Proc{v}
		c := r.MustDial(w.sock())
		defer c.Close()
		w.refused("Move", func() error { return second(c.V1("Move", "mine", uint32(v.PID))) })
		w.refused("MovePid", func() error { return second(c.V0("MovePid", "memory", "mine", v.PID)) })
		w.refused("GetPidCgroup", func() error { return second(c.V0("GetPidCgroup", "memory", v.PID)) })
	})
	t.Run("container user", func(t *testing.T) {
		w := newWorld(t)
		b := w.box("c1")
		r, v := b.user(1000), b.user(1000)
		w.Make("c1/mine", w.uid(r), w.gid(r))
		w.Make("c1/jail", w.uid(b.Proc), w.gid(b.Proc))
		w.Place(v, "c1/jail")
		w.watch = []*harness.Proc{v}
		attacks(w, "c1/jail", r, v, b.sees)
	})
	t.Run("container root that the host jailed", func(t *testing.T) {
		w := newWorld(t)
		b := w.box("c1")
		w.Own("c1", 0, 0)
		w.Make("c1/mine", w.uid(b.Proc), w.gid(b.Proc))
		w.Make("c1/jail", 0, 0)
		v := b.user(1000)
		w.Place(v, "c1/jail")
		w.watch = []*harness.Proc{v}
		attacks(w, "c1/jail", b.Proc, v, b.sees)
	})
}

// A service's socket is passed as the side channel. What the daemon wrote
// there would carry its credentials, those of root: it must not write.
func TestKernelImpostorSideChannel(t *testing.T) { impostorSideChannel(t, newWorld) }

func impostorSideChannel(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	w.Make("yard", 1000, 1000)
	r := w.host(1000, "yard")
	root := w.host(0, ".")
	c := r.MustDial(w.sock())
	defer c.Close()
	dir := w.dir()

	// A datagram service of root's, by path and by abstract name.
	type service struct {
		name string
		fd   int
	}
	var services []service
	serve := func(typ int, name string) int {
		fd := root.Socket(typ)
		root.Bind(fd, name)
		if !strings.HasPrefix(name, "@") {
			if err := unix.Chmod(name, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		return fd
	}
	path := filepath.Join(dir, "dgram")
	abstract := "@" + path
	services = append(services,
		service{"by path", serve(unix.SOCK_DGRAM, path)},
		service{"by abstract name", serve(unix.SOCK_DGRAM, abstract)})
	stream := serve(unix.SOCK_STREAM, filepath.Join(dir, "stream"))
	root.Listen(stream)
	seq := serve(unix.SOCK_SEQPACKET, filepath.Join(dir, "seq"))
	root.Listen(seq)

	socket := func(typ int) int { return r.Socket(typ) }
	connected := func(typ int, to string) int {
		fd := socket(typ)
		if err := r.Connect(fd, to); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	channels := map[string]int{
		"connected to a path":           connected(unix.SOCK_DGRAM, path),
		"connected to an abstract name": connected(unix.SOCK_DGRAM, abstract),
		"the service's own socket":      root.Give(services[0].fd, r),
		"unconnected":                   socket(unix.SOCK_DGRAM),
		"stream connected to a service": connected(unix.SOCK_STREAM, filepath.Join(dir, "stream")),
		"seqpacket connected":           connected(unix.SOCK_SEQPACKET, filepath.Join(dir, "seq")),
		"the daemon's own socket":       connected(unix.SOCK_STREAM, w.sock()),
		"a pidfd":                       r.PidFD(int(r.PID)),
	}
	accepted := root.Accept(stream)
	services = append(services, service{"stream", accepted}, service{"seqpacket", root.Accept(seq)})
	channels["the service's end of a stream"] = root.Give(accepted, r)

	// Unnamed at its own end, but bound to a name: ours, and its peer a
	// service's.
	bound := socket(unix.SOCK_DGRAM)
	own := filepath.Join(dir, "own")
	if err := unix.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	r.Bind(bound, own)
	if err := r.Connect(bound, path); err != nil {
		t.Fatal(err)
	}
	channels["named and connected"] = bound

	// An unnamed pair that root made: one end was given away, the other is a
	// service's.
	a, z := root.Socketpair(unix.SOCK_DGRAM)
	channels["an end of root's pair"] = root.Give(z, r)
	services = append(services, service{"pair", a})
	// And one of another user's.
	other := w.host(1001, "yard")
	oa, oz := other.Socketpair(unix.SOCK_DGRAM)
	channels["an end of another user's pair"] = other.Give(oz, r)

	// An end of the requestor's own pair, connected to the service afterwards:
	// a datagram socket can be connected anew.
	pa, pz := r.Socketpair(unix.SOCK_DGRAM)
	if err := r.Connect(pz, path); err != nil {
		t.Fatal(err)
	}
	channels["a pair turned to a service"] = pz
	r.Close(pa)

	for what, fd := range channels {
		w.refused(what, func() error { return second(c.V0("CreateScm", "memory", "x", harness.FD(fd))) })
		w.refused(what+", two credentials", func() error {
			return second(c.V0("MovePidScm", "memory", "x", harness.FD(fd)))
		})
	}
	time.Sleep(300 * time.Millisecond)
	for _, s := range services {
		if d, err := root.Recv(s.fd, 0); err == nil && len(d.Data) > 0 {
			t.Errorf("service %s got %q from %+v", s.name, d.Data, d.Cred)
		}
	}
	if d, err := other.Recv(oa, 0); err == nil {
		t.Errorf("the other user got %q", d.Data)
	}
	for _, fd := range channels {
		r.Close(fd)
	}
	// The connection still works.
	want(t, "an honest call", second(c.Scm("CreateScm", []harness.Cred{r.Cred}, "memory", "x")), nil)
}

// A second process outside the jail plays the proxy, or is the one that the
// jailed process says it acts for. Neither has, by itself, the right to let
// the jailed one out.
func TestKernelImpostorProxyOutside(t *testing.T) { impostorProxyOutside(t, newWorld) }

func impostorProxyOutside(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	t.Run("host user", func(t *testing.T) {
		w := newWorld(t)
		w.Make("yard", 0, 0)
		w.Make("yard/mine", 1000, 1000)
		w.Make("yard/jail", 0, 0)
		w.Make("yard/jail/mine", 1000, 1000)
		w.Make("yard/jail/mine/cell", 1000, 1000)
		in, out := w.host(1000, "yard/jail"), w.host(1000, "yard")
		v := w.host(1000, "yard/jail/mine/cell")
		proxyOutside(w, in, out, v)
	})
	t.Run("container and host", func(t *testing.T) {
		w := newWorld(t)
		b := w.box("c1")
		w.Make("c1/mine", w.uid(b.Proc), w.gid(b.Proc))
		w.Make("outside", 0, 0)
		w.Make("outside/mine", 1000, 1000)
		v := b.user(1000)
		proxyOutside(w, b.Proc, w.host(1000, "outside"), v)
	})
	t.Run("container and the same id outside", func(t *testing.T) {
		w := newWorld(t)
		b := w.box("c1")
		w.Make("c1/mine", w.uid(b.Proc), w.gid(b.Proc))
		w.Make("outside", w.uid(b.Proc), w.gid(b.Proc))
		w.Make("outside/mine", w.uid(b.Proc), w.gid(b.Proc))
		v := b.user(1000)
		proxyOutside(w, b.Proc, w.host(w.uid(b.Proc), "outside"), v)
	})
}

// proxyOutside: in is in the jail with v, out is outside. Whatever the two do
// together, v and in stay where they are, and nothing outside the jail
// changes.
func proxyOutside(w *world, in, out, v *harness.Proc) {
	w.Helper()
	w.watch = []*harness.Proc{in, out, v}
	defer func() { w.watch = nil }()
	cin, cout := in.MustDial(w.sock()), out.MustDial(w.sock())
	defer cin.Close()
	defer cout.Close()

	both := func(c *harness.Conn, kicker, second *harness.Proc, member string, args ...any) func() error {
		kickers := []*harness.Proc{kicker}
		if second != nil {
			kickers = append(kickers, second)
		}
		return func() error { return scmBy(c, member, kickers, args...) }
	}
	for _, member := range []string{"MovePidScm", "MovePidAbsScm"} {
		for _, who := range []*harness.Proc{in, v} {
			w.refused(fmt.Sprint(member, ": jailed peer, outside requestor, victim ", who == v),
				both(cin, out, who, member, "memory", "mine"))
			w.refused(fmt.Sprint(member, ": jailed peer, outside requestor, to its own cgroup, victim ", who == v),
				both(cin, out, who, member, "memory", ""))
			w.refused(fmt.Sprint(member, ": outside peer, outside requestor, victim ", who == v),
				both(cout, out, who, member, "memory", "mine"))
		}
	}
	for _, who := range []*harness.Proc{in, v} {
		w.refused(fmt.Sprint("outside peer, jailed requestor, to the peer's own cgroup, victim ", who == v),
			both(cout, in, who, "MovePidAbsScm", "memory", "/"))
		w.refused(fmt.Sprint("outside peer, jailed requestor, to the peer's, victim ", who == v),
			both(cout, in, who, "MovePidAbsScm", "memory", "/mine"))
	}
	w.refused("jailed peer, outside requestor creates",
		both(cin, out, nil, "CreateScm", "memory", "mine/x"))
	w.refused("jailed peer, outside requestor sets",
		both(cin, out, nil, "SetValueScm", "pids", "mine", "pids.max", "9"))
	w.refused("jailed peer, outside requestor removes",
		both(cin, out, nil, "RemoveScm", "memory", "mine", int32(1)))

	// out sends the call itself over in's connection, and the other way round.
	over := cin.Give(out)
	pid := func(p *harness.Proc) uint32 { return uint32(p.NSpid()[w.depth()]) }
	for _, who := range []*harness.Proc{in, v} {
		w.refused("outside sender over the jailed one's connection", func() error {
			return second(over.V1("Move", "mine", pid(who)))
		})
		w.refused("outside sender, up to its own cgroup", func() error {
			return second(over.V1("Move", "", pid(who)))
		})
	}
	w.refused("outside sender creates", func() error {
		return second(over.V1("Create", "mine/x", []string{"memory"}, map[string]string{}))
	})
	over.Close()
	under := cout.Give(in)
	w.refused("jailed sender over the outside one's connection", func() error {
		return second(under.V1("Create", "../mine/x", []string{"memory"}, map[string]string{}))
	})
	w.refused("jailed sender leaves", func() error {
		return second(under.V0("MovePidAbs", "memory", "/", in.PID))
	})
	under.Close()
}

// A program that becomes root in mid-flight: uid 1000 may move and kill it
// until it executes a setuid program, and not after.
func TestKernelImpostorSetuidMove(t *testing.T) {
	w, r, launcher, victim, suid := setuidWorld(t)
	c := r.MustDial(w.d.Sock)
	defer c.Close()
	src := launcher.Cgroups()
	moved, refused := 0, 0
	both := func() bool { return testing.Short() || moved > 0 && refused > 0 }
	roundsUntil(t, 1000, both, func(int) {
		v := launcher.Launch(nil, victim, "exec", suid)
		err := w.race(1500*time.Microsecond,
			func() error { return second(c.V1("Move", "dst", uint32(v.PID))) },
			func() error { return becomeRoot(v) })
		first := record(t, v)
		now := harness.CgroupsOf(v.PID) // it is root and waits
		if _, err := v.End(cgtest.Patience(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for h, cg := range now {
			if cg != src[h] && first[h] == src[h] {
				t.Errorf("root's process was moved in %s from %s to %s; the answer was %v", h, first[h], cg, err)
			}
		}
		if err == nil {
			moved++
		} else {
			refused++
			if !maps.Equal(now, src) {
				t.Errorf("refused (%v), and it is in %v", err, now)
			}
		}
	})
	t.Logf("%d moved before, %d refused", moved, refused)
	if !both() {
		t.Error("there was no race: widen the jitter")
	}
}

func TestKernelImpostorSetuidKill(t *testing.T) {
	w, r, launcher, victim, suid := setuidWorld(t)
	freezer, pids := harness.Find(t, "freezer"), harness.Find(t, "pids")
	c := r.MustDial(w.d.Sock)
	defer c.Close()
	kinds := map[string][]harness.Hierarchy{
		"freezer":    {pids, freezer},
		"no freezer": {pids},
	}
	if freezer == pids { // v2 always has one
		kinds = map[string][]harness.Hierarchy{"freezer": {pids}}
	}
	for name, hs := range kinds {
		t.Run(name, func(t *testing.T) {
			cg := "k" + fmt.Sprint(len(hs))
			w.MakeIn("yard/"+cg, 1000, 1000, hs...)
			killed, refused := 0, 0
			both := func() bool { return testing.Short() || killed > 0 && refused > 0 }
			roundsUntil(t, 1000, both, func(int) {
				v := launcher.Launch(nil, victim, "exec", suid)
				for _, h := range hs {
					w.Write(h, "yard/"+cg, "cgroup.procs", fmt.Sprint(v.PID))
				}
				err := w.race(5*time.Millisecond,
					func() error { return second(c.V1("Kill", cg)) },
					func() error { return becomeRoot(v) })
				rec, werr := v.Said(cgtest.Patience(5 * time.Second))
				if werr != nil {
					t.Errorf("neither dead nor running: %v; the answer was %v", werr, err)
				}
				ws, werr := v.End(cgtest.Patience(5 * time.Second))
				if werr != nil {
					t.Fatal(werr)
				}
				switch dead := ws.Signaled() && ws.Signal() == unix.SIGKILL; {
				case dead && rec != "":
					t.Errorf("killed after it had become root; the answer was %v", err)
				case dead && err != nil && !busy(err): // it may die after that
					t.Errorf("killed, but the answer was %v", err)
				case !dead && err == nil:
					t.Error("Kill succeeded and left it alive")
				case dead:
					killed++
				default:
					refused++
				}
			})
			t.Logf("%d killed before, %d refused", killed, refused)
			if !both() {
				t.Error("there was no race: widen the jitter")
			}
		})
	}
	// Frozen for the check, thawed again.
	want(t, "freezer.state", w.Read(freezer, fmt.Sprint("yard/k", len(kinds["freezer"])), "freezer.state"), "THAWED")
}

// becomeRoot lets victim.c execute suid.c, and waits until that has said so;
// not long, because it may be frozen.
func becomeRoot(v *harness.Child) error {
	if _, err := v.In.Write([]byte{1}); err != nil && !errors.Is(err, unix.EPIPE) {
		return err
	}
	_, err := v.Said(min(cgtest.Patience(10*time.Millisecond), 100*time.Millisecond))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

func setuidWorld(t *testing.T) (w *world, r, launcher *harness.Proc, victim, suid string) {
	harness.Require(t, "cc")
	w = newWorld(t)
	w.Make("yard", 0, 0)
	w.Make("yard/dst", 1000, 1000)
	return w, w.host(1000, "yard"), w.host(1000, "yard"),
		harness.Program(t, "testdata/victim.c", 0o755), harness.Program(t, "testdata/suid.c", 0o4755)
}

// record is where suid.c was when it began.
func record(t *testing.T, v *harness.Child) map[string]string {
	t.Helper()
	s, err := v.Said(cgtest.Patience(5 * time.Second))
	if err != nil || s == "" {
		t.Fatalf("the setuid program says nothing: %v", err)
	}
	return harness.ParseCgroups(s)
}
