package e2e_test

import (
	"fmt"
	"strings"
	"testing"

	"cgmanager/test/harness"
)

// chain connects as outer and has it act for the others, from the outside
// inwards; what follows is sent with the credential of the last.
func chain(outer *box, others ...*harness.Proc) (*harness.Conn, error) {
	c, err := outer.Dial(outer.w.sock())
	if err != nil {
		return nil, err
	}
	for _, p := range others {
		cred := outer.sees(p)
		c.As = &cred
		if _, err := c.V1("ActFor"); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

func mustChain(outer *box, others ...*harness.Proc) *harness.Conn {
	outer.w.Helper()
	c, err := chain(outer, others...)
	if err != nil {
		outer.w.Fatal(err)
	}
	return c
}

// Through any number of proxies a client is answered as without, but for what
// counts from the innermost proxy.
func TestKernelChain(t *testing.T) {
	w := newWorld(t)
	a := w.box("c1")
	b := a.box("c2")
	c := b.box("c3")
	u := c.user(7)
	low := c.user(0)
	w.Make("c1/c2/c3/low", c.HostUID, c.HostGID)
	conns := map[string]struct {
		c *harness.Conn
		// from is the cgroup of the innermost proxy.
		from string
		// own: that is in the requestor's container, root of which may leave
		// its cgroup for the proxy's.
		own bool
	}{
		"no proxy":             {c.MustDial(w.d.Sock), "c1/c2/c3", false},
		"one proxy":            {mustChain(b, c.Proc), "c1/c2", false},
		"far proxy":            {mustChain(a, c.Proc), "c1", false},
		"two proxies":          {mustChain(a, b.Proc, c.Proc), "c1/c2", false},
		"its own proxy":        {mustChain(c, low), "c1/c2/c3", true},
		"its own, behind one":  {mustChain(b, c.Proc, low), "c1/c2/c3", true},
		"its own, behind both": {mustChain(a, b.Proc, c.Proc, low), "c1/c2/c3", true},
	}
	for name, via := range conns {
		t.Run(name, func(t *testing.T) {
			w := w.sub(t)
			defer via.c.Close()
			ask := asker{t, via.c}
			want(t, "Create", ask.v1("Create", "x", []string{}, map[string]string{"pids.limit": "9"})[0], true)
			want(t, "GetValue", ask.v1("GetValue", "x", []string{"pids.limit"})[0], map[string]string{"pids.limit": "9"})
			for _, h := range controllers() {
				want(t, "owner", w.owner(h, "c1/c2/c3/x", ""), fmt.Sprintf("%d:%d", c.HostUID, c.HostGID))
			}
			ask.v1("Move", "x", uint32(u.NSpid()[3]))
			want(t, "where it is", w.in(u), "c1/c2/c3/x")
			tasks := ask.v1("ListTasks", "x")
			want(t, "ListTasks", tasks, []any{[]uint32{uint32(u.NSpid()[3])}, uint32(0)})
			want(t, "GetPidCgroup", ask.v0("GetPidCgroup", "memory", u.NSpid()[3])[0], "x")
			wantThreads(t, "GetTasks", u, c, func() any { return ask.v0("GetTasks", "memory", "x")[0] })
			abs := strings.TrimPrefix("c1/c2/c3/x", via.from)
			want(t, "GetPidCgroupAbs", ask.v0("GetPidCgroupAbs", "memory", u.NSpid()[3])[0], abs)
			ask.v1("Chown", "x", uint32(7), uint32(7))
			w.refused("a limit of its own cgroup", func() error {
				return second(via.c.V1("SetValue", "", map[string]string{"pids.limit": "9"}))
			})
			w.refused("a task that it cannot see", func() error { return second(via.c.V1("Move", "x", uint32(b.HostPID))) })
			w.refused("MovePidAbs above", func() error { return second(via.c.V0("MovePidAbs", "memory", "/../", u.NSpid()[3])) })
			ask.v1("Move", "", uint32(u.NSpid()[3]))
			ask.v1("Delete", "x")

			w.Place(u, "c1/c2/c3/low")
			if via.own {
				w.Place(low, "c1/c2/c3/low")
				ask.v0("MovePidAbs", "all", "/", u.NSpid()[3])
				want(t, "where it is", w.in(u), via.from)
				w.Place(low, "c1/c2/c3")
			} else {
				w.refused("MovePidAbs", func() error { return second(via.c.V0("MovePidAbs", "memory", "/", u.NSpid()[3])) })
			}
			w.Place(u, "c1/c2/c3")
		})
	}
}

// A proxy gains nothing by naming somebody else than who asks it, and a chain
// that does not nest is refused.
func TestKernelChainLies(t *testing.T) { lyingProxies(t, newWorld) }

func lyingProxies(t *testing.T, newWorld func(*testing.T) *world) {
	t.Helper()
	w := newWorld(t)
	a := w.box("c1")
	b := a.box("c2")
	c := b.box("c3")
	side := a.box("c2x")
	other := w.box("c9")
	deep := b.user(0) // of b, but in a cgroup below c's
	w.Make("c1/c2/c3/deep", w.uid(b.Proc), w.gid(b.Proc))
	w.Place(deep, "c1/c2/c3/deep")
	// Likewise, in a cgroup in which all of a, c and itself may do as they like.
	within := b.user(0)
	w.Make("c1/c2/c3/within", w.uid(c.Proc), w.gid(c.Proc))
	w.Place(within, "c1/c2/c3/within")
	entered := harness.StartInPIDNSOf(t, c.Proc, harness.Spec{UID: c.HostUID, GID: c.HostGID})
	w.Place(entered, ".")
	u := c.user(7)
	w.watch = []*harness.Proc{a.Proc, u, b.Proc, c.Proc, side.Proc, other.Proc, entered}
	for _, via := range []string{"around", "proxy"} {
		t.Run(via, func(t *testing.T) {
			if via == "proxy" {
				w.via = startProxy(t, a.Proc, w.sock()).sock
			}
			w.chainLies(a, b, c, side, deep, within, u, entered)
		})
	}
}

func (w *world) chainLies(a, b, c, side *box, deep, within, u, entered *harness.Proc) {
	w.Helper()
	create := func(c *harness.Conn, err error) error {
		if err != nil {
			return err
		}
		defer c.Close()
		return second(c.V1("Create", "lie", []string{}, map[string]string{}))
	}
	w.refusedAll(map[string]func() error{
		"inside out":             func() error { return create(chain(a, c.Proc, b.Proc)) },
		"sideways":               func() error { return create(chain(a, b.Proc, side.Proc)) },
		"outwards":               func() error { return create(chain(b, c.Proc, b.Proc)) },
		"a cgroup that encloses": func() error { return create(chain(a, deep, c.Proc)) },
		"namespaces that do":     func() error { return create(chain(a, c.Proc, within)) },
		"a cgroup below the requestor's": func() error {
			conn, err := chain(a, within, c.Proc)
			if err != nil {
				return err
			}
			defer conn.Close()
			return second(conn.V1("Create", "within/lie", []string{}, map[string]string{}))
		},
		"entered from the host": func() error { return create(chain(a, b.Proc, c.Proc, entered)) },
		"entered, by c":         func() error { return create(chain(c, entered)) },
		"sender of another": func() error {
			conn, err := chain(a, b.Proc, c.Proc)
			if err == nil {
				cred := a.sees(side.Proc)
				conn.As = &cred
			}
			return create(conn, err)
		},
		"sender further out": func() error {
			conn, err := chain(a, b.Proc, c.Proc)
			if err == nil {
				conn.As = nil
			}
			return create(conn, err)
		},
		"ids that it has not": func() error {
			conn, err := a.Dial(w.sock())
			if err != nil {
				return err
			}
			cred := a.sees(c.Proc)
			cred.UID = 0
			conn.As = &cred
			defer conn.Close()
			if _, err := conn.V1("ActFor"); err != nil {
				return err
			}
			return create(conn, nil)
		},
		"further up than the proxy": func() error {
			conn, err := chain(a, b.Proc, c.Proc)
			if err != nil {
				return err
			}
			defer conn.Close()
			return second(conn.V0("MovePidAbs", "memory", "/..", int32(1)))
		},
		"an escape for one who is not root": func() error {
			conn, err := chain(b, u)
			if err != nil {
				return err
			}
			defer conn.Close()
			return second(conn.V0("MovePidAbs", "memory", "/", u.NSpid()[3]))
		},
		"an escape of another's task": func() error {
			conn, err := chain(a, b.Proc, c.Proc)
			if err != nil {
				return err
			}
			defer conn.Close()
			return second(conn.V0("MovePidAbs", "memory", "/", int32(side.HostPID)))
		},
		"for ever": func() error {
			conn, err := a.Dial(w.sock())
			if err != nil {
				return err
			}
			defer conn.Close()
			for i := 0; err == nil && i < 1000; i++ {
				_, err = conn.V1("ActFor")
			}
			return err
		},
	})

	// Another speaks for it, over its connection to the proxy.
	gone, heir := c.user(7), a.sees(c.Proc)
	conn := mustChain(a, b.Proc, gone)
	conn.As = &heir
	gone.Stop()
	w.refused("for one that has ended", func() error { return create(conn, nil) })
}
